//! Golden bytes: decode, compare each field, encode, compare.

use std::fmt::Debug;
use std::mem::offset_of;

use super::*;

/// The bytes of `testdata/pdu/{name}.hex`.
pub(crate) fn golden(name: &str) -> Vec<u8> {
    let path = format!("{}/testdata/pdu/{name}.hex", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("golden PDU");
    text.lines()
        .flat_map(|line| line.split('#').next().unwrap_or("").split_whitespace())
        .map(|byte| u8::from_str_radix(byte, 16).expect("two hexadecimal digits"))
        .collect()
}

/// Decodes the header of a golden PDU, compares it, encodes `header` and compares that.
fn check<H>(name: &str, header: &H)
where
    H: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned + PartialEq + Debug,
{
    let bytes = golden(name);
    let (decoded, _) = H::ref_from_prefix(&bytes).expect("long enough");
    assert_eq!(decoded, header, "{name}");
    assert_eq!(header.as_bytes(), &bytes[..size_of::<H>()], "{name}");
}

fn ch(pdu_type: PduType, flags: u8, hlen: u8, pdo: u8, plen: u32) -> CommonHeader {
    CommonHeader { pdu_type, flags: PduFlags(flags), hlen, pdo, plen: U32::new(plen) }
}

#[test]
fn ic_req_and_resp() {
    let header = IcReq {
        ch: ch(PduType::IC_REQ, 0, 128, 0, 128),
        pfv: U16::ZERO,
        hpda_z: 15,
        dgst: DigestFlags::new(true, true),
        maxr2t_z: U32::new(3),
        reserved16: [0; 112],
    };
    check("icreq", &header);
    let header = IcResp {
        ch: ch(PduType::IC_RESP, 0, 128, 0, 128),
        pfv: U16::ZERO,
        cpda_z: 0,
        dgst: DigestFlags::new(true, true),
        maxh2cdata: U32::new(128 << 10),
        reserved16: [0; 112],
    };
    check("icresp", &header);
}

#[test]
fn term_req() {
    let header = TermReq {
        ch: ch(PduType::H2C_TERM_REQ, 0, 24, 0, 48),
        fes: FatalErrorStatus::R2T_LIMIT_EXCEEDED,
        fei: U32::ZERO,
        reserved14: [0; 10],
    };
    check("h2c-term-req", &header);
    assert_eq!(golden("h2c-term-req")[24..], golden("r2t"));
    let header = TermReq {
        ch: ch(PduType::C2H_TERM_REQ, 0, 24, 0, 48),
        fes: FatalErrorStatus::INVALID_PDU_HEADER_FIELD,
        fei: U32::new(offset::TTAG),
        reserved14: [0; 10],
    };
    check("c2h-term-req", &header);
    assert_eq!(golden("c2h-term-req")[24..], golden("h2c-data")[..24]);
}

#[test]
fn capsules() {
    let mut sqe = [0; 64];
    sqe[..8].copy_from_slice(&[0x01, 0x40, 0x34, 0x12, 1, 0, 0, 0]);
    sqe[32..36].copy_from_slice(&8192u32.to_le_bytes());
    sqe[39] = 0x5a;
    sqe[40] = 16;
    sqe[48] = 15;
    check("capsule-cmd", &CapsuleCmd { ch: ch(PduType::CAPSULE_CMD, 0, 72, 0, 72), sqe });
    sqe[32..36].copy_from_slice(&16u32.to_le_bytes());
    sqe[39] = 0x01;
    sqe[48] = 0;
    let flags = PduFlags::HDGSTF.0 | PduFlags::DDGSTF.0;
    let header = CapsuleCmd { ch: ch(PduType::CAPSULE_CMD, flags, 72, 80, 100), sqe };
    check("capsule-cmd-in-capsule", &header);

    let mut cqe = [0; 16];
    cqe[..4].copy_from_slice(&0xdead_beefu32.to_le_bytes());
    cqe[8] = 5;
    cqe[12..14].copy_from_slice(&[0x34, 0x12]);
    check("capsule-resp", &CapsuleResp { ch: ch(PduType::CAPSULE_RESP, 0, 24, 0, 24), cqe });
    let header = CapsuleResp { ch: ch(PduType::CAPSULE_RESP, 1, 24, 0, 28), cqe };
    check("capsule-resp-digest", &header);
}

#[test]
fn data_and_r2t() {
    for (name, flags, pdo, plen) in [
        ("h2c-data", PduFlags::LAST_PDU.0, 24, 32),
        ("h2c-data-cpda-digests", PduFlags::LAST_PDU.0 | 3, 64, 76),
    ] {
        let header = H2cData {
            ch: ch(PduType::H2C_DATA, flags, 24, pdo, plen),
            cccid: U16::new(0x1234),
            ttag: U16::new(7),
            datao: U32::new(4096),
            datal: U32::new(8),
            reserved20: [0; 4],
        };
        check(name, &header);
    }
    let end = PduFlags::LAST_PDU.0 | PduFlags::SUCCESS.0;
    for (name, flags, pdo, plen) in [
        ("c2h-data", end, 24, 32),
        ("c2h-data-hpda", 0, 32, 40),
        ("c2h-data-hpda-digests", end | 3, 64, 76),
    ] {
        let header = C2hData {
            ch: ch(PduType::C2H_DATA, flags, 24, pdo, plen),
            cccid: U16::new(0x1234),
            reserved10: [0; 2],
            datao: U32::ZERO,
            datal: U32::new(8),
            reserved20: [0; 4],
        };
        check(name, &header);
    }
    for (name, flags, plen) in [("r2t", 0, 24), ("r2t-digest", 1, 28)] {
        let header = R2t {
            ch: ch(PduType::R2T, flags, 24, 0, plen),
            cccid: U16::new(0x1234),
            ttag: U16::new(7),
            r2to: U32::new(4096),
            r2tl: U32::new(8192),
            reserved20: [0; 4],
        };
        check(name, &header);
    }
}

/// The offsets that faults report are those of the structures.
#[test]
fn field_offsets() {
    let at = |offset: usize, want: u32| assert_eq!(offset as u32, want);
    at(offset_of!(CommonHeader, pdu_type), offset::PDU_TYPE);
    at(offset_of!(CommonHeader, flags), offset::FLAGS);
    at(offset_of!(CommonHeader, hlen), offset::HLEN);
    at(offset_of!(CommonHeader, pdo), offset::PDO);
    at(offset_of!(CommonHeader, plen), offset::PLEN);
    at(offset_of!(IcReq, pfv), offset::PFV);
    at(offset_of!(IcReq, hpda_z), offset::PDA);
    at(offset_of!(IcReq, dgst), offset::DGST);
    at(offset_of!(IcResp, pfv), offset::PFV);
    at(offset_of!(IcResp, cpda_z), offset::PDA);
    at(offset_of!(IcResp, dgst), offset::DGST);
    at(offset_of!(IcResp, maxh2cdata), offset::MAXH2CDATA);
    at(offset_of!(H2cData, cccid), offset::CCCID);
    at(offset_of!(H2cData, ttag), offset::TTAG);
    at(offset_of!(H2cData, datal), offset::DATAL);
    at(offset_of!(C2hData, cccid), offset::CCCID);
    at(offset_of!(C2hData, datal), offset::DATAL);
    at(offset_of!(R2t, cccid), offset::CCCID);
    at(offset_of!(R2t, ttag), offset::TTAG);
    at(offset_of!(R2t, r2tl), offset::DATAL);
    at(offset_of!(CapsuleResp, cqe) + 12, offset::RCCQE_CID);
    at(offset_of!(TermReq, fei), 10);
}
