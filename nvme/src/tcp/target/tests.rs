//! What the controller's side builds, accepts and refuses. Streams of random shape are in
//! `tcp/tests.rs`.

use zerocopy::IntoBytes;

use super::*;
use crate::spec::pdu::tests::golden;
use crate::tcp::Crc32c;

const CID: u16 = 0x1234;

/// What a target made of a stream; payload joined per event run.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Reply(Vec<u8>),
    Command { slot: u16, cid: u16, in_capsule_len: u32 },
    Data { slot: u16, offset: u32, bytes: Vec<u8> },
    End(u16),
    DigestError(u16),
    Terminated(u16),
}

fn seen(target: &Target, event: TargetEvent<'_>) -> Seen {
    match event {
        TargetEvent::Initialized { reply } => Seen::Reply(reply.to_vec()),
        TargetEvent::Command { slot, in_capsule_len, .. } => {
            Seen::Command { slot, cid: target.cid(slot), in_capsule_len }
        }
        TargetEvent::Data { slot, offset, bytes } => {
            Seen::Data { slot, offset, bytes: bytes.to_vec() }
        }
        TargetEvent::DataEnd { slot } => Seen::End(slot),
        TargetEvent::DataDigestError { slot } => Seen::DigestError(slot),
        TargetEvent::Terminated { fes } => Seen::Terminated(fes),
    }
}

/// Feeds `bytes` whole.
fn feed(target: &mut Target, mut bytes: &[u8]) -> Result<Vec<Seen>, Fault> {
    let mut all = Vec::new();
    while let Some(event) = target.next(&mut bytes)? {
        all.push(seen(target, event));
    }
    assert!(bytes.is_empty(), "Ok(None) means that the input is used up");
    Ok(all)
}

/// Feeds `bytes` one by one; pieces of payload are joined.
fn trickle(target: &mut Target, bytes: &[u8]) -> Result<Vec<Seen>, Fault> {
    let mut all: Vec<Seen> = Vec::new();
    for byte in bytes {
        for item in feed(target, &[*byte])? {
            match (all.last_mut(), item) {
                (
                    Some(Seen::Data { slot, offset, bytes }),
                    Seen::Data { slot: next, offset: at, bytes: more },
                ) if *slot == next && *offset + bytes.len() as u32 == at => bytes.extend(more),
                (_, item) => all.push(item),
            }
        }
    }
    Ok(all)
}

fn fault(target: &mut Target, bytes: &[u8]) -> Fault {
    feed(target, bytes).expect_err("must be refused")
}

fn ic_req(hpda_z: u8, header: bool, data: bool) -> IcReq {
    IcReq {
        ch: CommonHeader::fixed(PduType::IC_REQ, 128),
        pfv: U16::ZERO,
        hpda_z,
        dgst: DigestFlags::new(header, data),
        maxr2t_z: U32::ZERO,
        reserved16: [0; 112],
    }
}

/// A target that has answered ICReq.
fn ready(config: TargetConfig, hpda_z: u8, header: bool, data: bool) -> Target {
    let mut target = Target::new(config);
    let all = feed(&mut target, ic_req(hpda_z, header, data).as_bytes()).expect("valid");
    assert!(matches!(all[..], [Seen::Reply(_)]));
    assert_eq!((target.header_digest(), target.data_digest()), (header, data));
    target
}

fn plain() -> Target {
    ready(TargetConfig::default(), 0, false, false)
}

/// A command that is waiting for an R2T of `len` bytes from 0.
fn writing(target: &mut Target, len: u32) -> u16 {
    let all = feed(target, &golden("capsule-cmd")).expect("valid");
    let [Seen::Command { slot, cid: CID, in_capsule_len: 0 }] = all[..] else { panic!("{all:?}") };
    let _ = target.r2t(slot, 0, len);
    slot
}

fn h2c_data(ttag: u16, datao: u32, data: &[u8], last: bool) -> (H2cData, Vec<u8>) {
    let pdu = H2cData {
        ch: CommonHeader {
            pdu_type: PduType::H2C_DATA,
            flags: PduFlags::default().with(PduFlags::LAST_PDU, last),
            hlen: 24,
            pdo: 24,
            plen: U32::new(24 + data.len() as u32),
        },
        cccid: U16::new(CID),
        ttag: U16::new(ttag),
        datao: U32::new(datao),
        datal: U32::new(data.len() as u32),
        reserved20: [0; 4],
    };
    (pdu, data.to_vec())
}

fn bytes((pdu, data): &(H2cData, Vec<u8>)) -> Vec<u8> {
    [pdu.as_bytes(), data].concat()
}

#[test]
fn golden_session() {
    let config = TargetConfig { slots: 8, ..TargetConfig::default() };
    // Two ways to cut the stream; the events are the same.
    for feed in [feed, trickle] {
        let mut target = Target::new(config.clone());
        assert!(!target.is_initialized());
        let all = feed(&mut target, &golden("icreq")).expect("valid");
        assert_eq!(all, [Seen::Reply(golden("icresp"))]);
        assert!(target.is_initialized() && target.header_digest() && target.data_digest());

        let head = {
            // The golden commands have cid 1234h; slots count from 0, the golden R2T has tag 7.
            let mut capsule = golden("capsule-cmd");
            capsule[1] |= PduFlags::HDGSTF.0;
            capsule[4] = 76;
            let digest = Crc32c::of(&capsule);
            capsule.extend(digest);
            for slot in 0..8 {
                let all = feed(&mut target, &capsule).expect("valid");
                assert_eq!(all, [Seen::Command { slot, cid: CID, in_capsule_len: 0 }]);
            }
            let _ = target.r2t(7, 0, 4096);
            for slot in 0..7 {
                target.release(slot);
            }
            assert_eq!(target.outstanding(), 1);
            let mut first = h2c_data(7, 0, &[0x5a; 4096], true);
            first.0.ch.flags = PduFlags(PduFlags::LAST_PDU.0 | 3);
            first.0.ch.pdo = 28;
            first.0.ch.plen = U32::new(28 + 4096 + 4);
            let mut stream = first.0.as_bytes().to_vec();
            stream.extend(Crc32c::of(&stream));
            stream.extend(&first.1);
            stream.extend(Crc32c::of(&first.1));
            let all = feed(&mut target, &stream).expect("valid");
            assert_eq!(all, [Seen::Data { slot: 7, offset: 0, bytes: first.1 }, Seen::End(7)]);
            target.r2t(7, 4096, 8192)
        };
        assert_eq!(*head, golden("r2t-digest"));
        assert_eq!(
            *target.response(7, &golden("capsule-resp")[8..].try_into().expect("16 bytes")),
            golden("capsule-resp-digest")
        );
        let data: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
        let head = target.c2h_data(7, 0, 8, true, true);
        let pdu = [&*head, &data, &Crc32c::of(&data)].concat();
        assert_eq!(pdu, golden("c2h-data-hpda-digests"));
    }
}

#[test]
fn golden_without_digests() {
    let mut target = ready(TargetConfig { slots: 8, ..TargetConfig::default() }, 3, false, false);
    let commands = golden("capsule-cmd").repeat(8);
    assert_eq!(feed(&mut target, &commands).expect("valid").len(), 8);
    let data: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
    let _ = target.r2t(7, 0, 4096);
    feed(&mut target, &bytes(&h2c_data(7, 0, &[0; 4096], true))).expect("valid");
    assert_eq!(*target.r2t(7, 4096, 8192), golden("r2t"));
    // CID 0 in the CQE: the target puts the command's.
    let mut cqe: [u8; 16] = golden("capsule-resp")[8..].try_into().expect("16 bytes");
    cqe[12..14].fill(0);
    assert_eq!(*target.response(7, &cqe), golden("capsule-resp"));
    let pdu = [&*target.c2h_data(7, 0, 8, false, false), &data].concat();
    assert_eq!(pdu, golden("c2h-data-hpda"));
    // The golden H2CData is 8 bytes at 4096 with LAST_PDU, so ask for just that.
    let mut target = ready(TargetConfig { slots: 8, ..TargetConfig::default() }, 0, false, false);
    assert_eq!(feed(&mut target, &commands).expect("valid").len(), 8);
    let _ = target.r2t(7, 0, 4096);
    feed(&mut target, &bytes(&h2c_data(7, 0, &[0; 4096], true))).expect("valid");
    let _ = target.r2t(7, 4096, 8);
    let want = [Seen::Data { slot: 7, offset: 4096, bytes: data.to_vec() }, Seen::End(7)];
    assert_eq!(feed(&mut target, &golden("h2c-data")).expect("valid"), want);
    let pdu = [&*target.c2h_data(7, 0, 8, true, true), &data].concat();
    assert_eq!(pdu, golden("c2h-data"));
}

#[test]
fn golden_with_cpda() {
    for feed in [feed, trickle] {
        let config = TargetConfig { cpda: 15, slots: 8, ..TargetConfig::default() };
        let mut target = ready(config, 0, true, true);
        let mut capsule = golden("capsule-cmd");
        (capsule[1], capsule[4]) = (PduFlags::HDGSTF.0, 76);
        capsule.extend(Crc32c::of(&capsule));
        assert_eq!(feed(&mut target, &capsule.repeat(8)).expect("valid").len(), 8);
        let _ = target.r2t(7, 0, 4096);
        target.slots[7].r2t_next = 4096; // as if they had arrived
        let _ = target.r2t(7, 4096, 8);
        let all = feed(&mut target, &golden("h2c-data-cpda-digests")).expect("valid");
        let data = vec![0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(all, [Seen::Data { slot: 7, offset: 4096, bytes: data }, Seen::End(7)]);

        let config = TargetConfig { cpda: 3, ..TargetConfig::default() };
        let mut target = ready(config, 0, true, true);
        let all = feed(&mut target, &golden("capsule-cmd-in-capsule")).expect("valid");
        let want = [
            Seen::Command { slot: 0, cid: CID, in_capsule_len: 16 },
            Seen::Data { slot: 0, offset: 0, bytes: (0xa0..0xb0).collect() },
            Seen::End(0),
        ];
        assert_eq!(all, want);
    }
}

/// NVMe/TCP 1.0, Figure 16: 12,288 bytes by three R2Ts and four H2CData PDUs.
#[test]
fn figure_16() {
    let mut target = plain();
    let slot = writing(&mut target, 3000);
    let data: Vec<u8> = (0..12288u32).map(|i| (i / 7) as u8).collect();
    let mut got: Vec<u8> = Vec::new();
    let mut take = |target: &mut Target, from: usize, to: usize, last: bool| {
        let pdu = bytes(&h2c_data(slot, from as u32, &data[from..to], last));
        let all = feed(target, &pdu).expect("valid");
        let Some(Seen::Data { offset, bytes, .. }) = all.first() else { panic!("{all:?}") };
        assert_eq!(*offset as usize, got.len());
        got.extend(bytes);
        assert_eq!(all.len() == 2, last);
        got.len()
    };
    take(&mut target, 0, 1000, false);
    take(&mut target, 1000, 3000, true);
    let _ = target.r2t(slot, 3000, 8192);
    take(&mut target, 3000, 11192, true);
    let _ = target.r2t(slot, 11192, 1096);
    assert_eq!(take(&mut target, 11192, 12288, true), 12288);
    assert_eq!(got, data);
}

#[test]
fn ic_req_is_checked() {
    let good = ic_req(0, false, false);
    let with = |edit: &dyn Fn(&mut IcReq)| {
        let mut pdu = good;
        edit(&mut pdu);
        let mut target = Target::new(TargetConfig::default());
        let got = fault(&mut target, pdu.as_bytes());
        let term = target.term_req(&got);
        assert!(pdu.as_bytes().starts_with(&term[24..]), "the header in error is repeated");
        (got.fes, got.fei)
    };
    let field = FatalErrorStatus::INVALID_PDU_HEADER_FIELD;
    assert_eq!(with(&|pdu| pdu.ch.hlen = 127), (field, 2));
    assert_eq!(with(&|pdu| pdu.ch.plen = U32::new(129)), (field, 4));
    assert_eq!(with(&|pdu| pdu.pfv = U16::new(1)), (FatalErrorStatus::UNSUPPORTED_PARAMETER, 8));
    assert_eq!(with(&|pdu| pdu.hpda_z = 32), (field, 10));
    // The lowest offset is reported.
    let both = |pdu: &mut IcReq| (pdu.hpda_z, pdu.ch.plen) = (32, U32::ZERO);
    assert_eq!(with(&both), (field, 4));
    // Reserved bits are not looked at.
    let mut pdu = good;
    (pdu.ch.flags, pdu.ch.pdo, pdu.dgst) = (PduFlags(0xff), 9, DigestFlags(0xfc));
    pdu.reserved16.fill(0xff);
    let mut target = Target::new(TargetConfig::default());
    assert_eq!(feed(&mut target, pdu.as_bytes()).expect("valid").len(), 1);
}

#[test]
fn ic_resp_says_what_is_allowed() {
    let config = TargetConfig {
        max_h2c_data: 5003,
        allow_header_digest: false,
        cpda: 200,
        ..TargetConfig::default()
    };
    let mut target = Target::new(config.clone());
    let all = feed(&mut target, ic_req(31, true, true).as_bytes()).expect("valid");
    let [Seen::Reply(reply)] = &all[..] else { panic!("{all:?}") };
    let reply: &IcResp = view(reply);
    assert_eq!(reply.dgst, DigestFlags::DDGST_ENABLE);
    assert_eq!(reply.maxh2cdata.get(), 5000);
    assert_eq!(reply.cpda_z, 31);
    let mut target = Target::new(TargetConfig { max_h2c_data: 0, ..config });
    let all = feed(&mut target, ic_req(0, false, false).as_bytes()).expect("valid");
    let [Seen::Reply(reply)] = &all[..] else { panic!("{all:?}") };
    assert_eq!(view::<IcResp>(reply).maxh2cdata.get(), 4096);
    assert_eq!(view::<IcResp>(reply).dgst, DigestFlags(0));
}

#[test]
fn order_of_pdus() {
    let sequence = FatalErrorStatus::PDU_SEQUENCE_ERROR;
    for early in ["capsule-cmd", "h2c-data"] {
        let mut target = Target::new(TargetConfig::default());
        // The common header alone is enough to tell.
        assert_eq!(fault(&mut target, &golden(early)[..8]).fes, sequence);
    }
    let mut target = plain();
    assert_eq!(fault(&mut target, &golden("icreq")).fes, sequence);
    // Every type that a host does not send.
    for pdu_type in (0..=255).filter(|t| ![0, 2, 4, 6].contains(t)) {
        for mut target in [Target::new(TargetConfig::default()), plain()] {
            let got = fault(&mut target, &[pdu_type, 0, 24, 0, 24, 0, 0, 0]);
            assert_eq!((got.fes.get(), got.fei), (1, 0), "type {pdu_type}");
        }
    }
}

#[test]
fn capsule_headers_are_checked() {
    let good = golden("capsule-cmd");
    let with = |at: usize, value: u8| {
        let mut pdu = good.clone();
        pdu[at] = value;
        pdu.resize(8300, 0);
        let mut target = plain();
        let got = fault(&mut target, &pdu);
        (got.fes.get(), got.fei, target.term_req(&got).len())
    };
    assert_eq!(with(1, PduFlags::HDGSTF.0), (1, 1, 24 + 8));
    assert_eq!(with(2, 24), (1, 2, 24 + 8));
    assert_eq!(with(2, 255), (1, 2, 24 + 8));
    // PLEN too short for the header, and one that leaves data but no valid place for it.
    assert_eq!(with(4, 71), (1, 4, 24 + 72));
    assert_eq!(with(4, 80), (1, 3, 24 + 72));
    let data = |flags: u8, pdo: u8, plen: u32, opcode: u8, cpda: u8, max: u32| {
        let mut pdu = good.clone();
        (pdu[1], pdu[3], pdu[8]) = (flags, pdo, opcode);
        pdu[4..8].copy_from_slice(&plen.to_le_bytes());
        let config = TargetConfig { cpda, ..TargetConfig::default() };
        let mut target = ready(config, 0, false, false);
        target.set_limits(4, max);
        feed(&mut target, &pdu).map_err(|fault| (fault.fes.get(), fault.fei))
    };
    let accepted = |in_capsule_len| Ok(vec![Seen::Command { slot: 0, cid: CID, in_capsule_len }]);
    assert_eq!(data(0, 72, 72 + 8192, 1, 0, 8192), accepted(8192));
    assert_eq!(data(0, 72, 72 + 8193, 1, 0, 8192), Err((1, 4)));
    assert_eq!(data(0, 72, u32::MAX, 1, 0, 8192), Err((1, 4)));
    assert_eq!(data(0, 72, 72 + 4, 1, 0, 0), Err((1, 4)));
    assert_eq!(data(0, 72, 72 + 16384, 1, 0, 16384), accepted(16384));
    // A Fabrics command may have 8,192 bytes on any queue.
    assert_eq!(data(0, 72, 72 + 1024, 0x7f, 0, 0), accepted(1024));
    assert_eq!(data(0, 72, 72 + 8193, 0x7f, 0, 0), Err((1, 4)));
    assert_eq!(data(PduFlags::DDGSTF.0, 72, 80, 1, 0, 8192), Err((1, 1)));
    assert_eq!(data(0, 68, 80, 1, 0, 8192), Err((1, 3)));
    assert_eq!(data(0, 73, 80, 1, 0, 8192), Err((1, 3)));
    assert_eq!(data(0, 76, 80, 1, 0, 8192), accepted(4));
    assert_eq!(data(0, 76, 80, 1, 1, 8192), Err((1, 3)));
    assert_eq!(data(0, 80, 84, 1, 1, 8192), accepted(4));
    assert_eq!(data(0, 80, 80, 1, 0, 8192), Err((1, 4)));
    assert_eq!(data(0, 80, 76, 1, 0, 8192), Err((1, 4)));
    // Without data PDO and DDGSTF mean nothing.
    assert_eq!(data(PduFlags::DDGSTF.0, 9, 72, 1, 0, 0), accepted(0));
}

#[test]
fn h2c_data_headers_are_checked() {
    let with = |edit: &dyn Fn(&mut H2cData)| {
        let mut target =
            ready(TargetConfig { max_h2c_data: 4096, ..TargetConfig::default() }, 0, false, false);
        let slot = writing(&mut target, 8192);
        feed(&mut target, &bytes(&h2c_data(slot, 0, &[0; 64], false))).expect("valid");
        let mut pdu = h2c_data(slot, 64, &[0; 64], false);
        edit(&mut pdu.0);
        let got = fault(&mut target, pdu.0.as_bytes());
        let term = target.term_req(&got);
        assert_eq!(term[..2], [3, 0]);
        assert!(pdu.0.as_bytes().starts_with(&term[24..]));
        (got.fes.get(), got.fei)
    };
    let plen = |pdu: &mut H2cData, datal: u32| {
        pdu.datal = U32::new(datal);
        pdu.ch.plen = U32::new(24 + datal);
    };
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::HDGSTF), (1, 1));
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::DDGSTF), (1, 1));
    assert_eq!(with(&|pdu| pdu.ch.hlen = 72), (1, 2));
    assert_eq!(with(&|pdu| pdu.ch.pdo = 0), (1, 3));
    assert_eq!(with(&|pdu| pdu.ch.pdo = 25), (1, 3));
    assert_eq!(with(&|pdu| pdu.ch.pdo = 28), (1, 4));
    assert_eq!(with(&|pdu| pdu.ch.plen = U32::new(0)), (1, 4));
    assert_eq!(with(&|pdu| pdu.ch.plen = U32::new(u32::MAX)), (1, 4));
    assert_eq!(with(&|pdu| pdu.datal = U32::new(60)), (1, 4));
    assert_eq!(with(&|pdu| pdu.cccid = U16::new(CID + 1)), (1, 8));
    assert_eq!(with(&|pdu| pdu.ttag = U16::new(1)), (1, 10));
    assert_eq!(with(&|pdu| pdu.ttag = U16::new(u16::MAX)), (1, 10));
    assert_eq!(with(&|pdu| plen(pdu, 0)), (1, 16));
    assert_eq!(with(&|pdu| plen(pdu, 62)), (1, 16));
    // Longer than MAXH2CDATA, although the R2T asked for as much.
    assert_eq!(with(&|pdu| plen(pdu, 4100)), (5, 0));
    // Outside of the R2T: behind it, over its end, and wrapping around.
    assert_eq!(with(&|pdu| pdu.datao = U32::new(8192)), (4, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(8132)), (4, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(u32::MAX - 3)), (4, 0));
    // A gap and a repetition.
    assert_eq!(with(&|pdu| pdu.datao = U32::new(68)), (2, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(0)), (2, 0));
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::LAST_PDU), (2, 0));
}

#[test]
fn h2c_data_needs_an_r2t() {
    // No R2T at all.
    let mut target = plain();
    feed(&mut target, &golden("capsule-cmd")).expect("valid");
    let got = fault(&mut target, &bytes(&h2c_data(0, 0, &[0; 8], true)));
    assert_eq!((got.fes.get(), got.fei), (1, 10));
    // The end of the R2T without LAST_PDU.
    let mut target = plain();
    let slot = writing(&mut target, 8);
    let got = fault(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], false)));
    assert_eq!((got.fes.get(), got.fei), (2, 0));
    // Once more after the end.
    let mut target = plain();
    let slot = writing(&mut target, 8);
    feed(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], true))).expect("valid");
    let got = fault(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], true)));
    assert_eq!((got.fes.get(), got.fei), (2, 0));
    // Before the start of a second R2T.
    let mut target = plain();
    let slot = writing(&mut target, 8);
    feed(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], true))).expect("valid");
    let _ = target.r2t(slot, 8, 8);
    let got = fault(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], true)));
    assert_eq!((got.fes.get(), got.fei), (4, 0));
    // The slot is free again.
    let mut target = plain();
    let slot = writing(&mut target, 8);
    feed(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], true))).expect("valid");
    target.release(slot);
    let got = fault(&mut target, &bytes(&h2c_data(slot, 0, &[0; 8], true)));
    assert_eq!((got.fes.get(), got.fei), (1, 10));
}

#[test]
fn an_odd_length_is_what_was_asked_for() {
    let mut target = plain();
    let slot = writing(&mut target, 7);
    let all = feed(&mut target, &bytes(&h2c_data(slot, 0, &[9; 7], true))).expect("valid");
    assert_eq!(all, [Seen::Data { slot, offset: 0, bytes: vec![9; 7] }, Seen::End(slot)]);
}

#[test]
fn header_digest() {
    let good = {
        let mut pdu = golden("capsule-cmd");
        (pdu[1], pdu[4]) = (PduFlags::HDGSTF.0, 76);
        pdu.extend(Crc32c::of(&pdu));
        pdu
    };
    let fresh = || ready(TargetConfig::default(), 0, true, false);
    assert_eq!(feed(&mut fresh(), &good).expect("valid").len(), 1);
    // Any flipped bit is found: in the type, HDGSTF and HLEN as such, elsewhere by the digest.
    for bit in 0..good.len() * 8 {
        let mut pdu = good.clone();
        pdu[bit / 8] ^= 1 << (bit % 8);
        let mut target = fresh();
        // The type of ICReq and of H2CData need more bytes or fewer.
        pdu.resize(128, 0);
        let got = fault(&mut target, &pdu);
        if !matches!(bit / 8, 0 | 2) && bit != 8 {
            assert_eq!(got.fes, FatalErrorStatus::HEADER_DIGEST_ERROR, "bit {bit}");
            let digest: [u8; 4] = pdu[72..76].try_into().expect("4 bytes");
            assert_eq!(got.fei, u32::from_le_bytes(digest), "the digest received");
            assert_eq!(&target.term_req(&got)[24..], &pdu[..72], "the header without digest");
        }
    }
    // A host that leaves it out.
    let got = fault(&mut fresh(), &golden("capsule-cmd"));
    assert_eq!((got.fes.get(), got.fei), (1, 1));
}

#[test]
fn data_digest_error_concerns_one_command() {
    for feed in [feed, trickle] {
        let config = TargetConfig { cpda: 3, ..TargetConfig::default() };
        let mut target = ready(config, 0, true, true);
        let mut capsule = golden("capsule-cmd-in-capsule");
        capsule[85] ^= 1;
        let all = feed(&mut target, &capsule).expect("not fatal");
        assert_eq!(all[2..], [Seen::DigestError(0)]);
        // The next command is not affected, nor is the slot when it is used again.
        let good = golden("capsule-cmd-in-capsule");
        assert_eq!(feed(&mut target, &good).expect("valid")[2..], [Seen::End(1)]);
        target.release(0);
        assert_eq!(feed(&mut target, &good).expect("valid")[2..], [Seen::End(0)]);
    }
}

#[test]
fn data_digest_error_is_reported_at_the_end_of_the_r2t() {
    let mut target = ready(TargetConfig::default(), 0, false, true);
    let slot = writing(&mut target, 16);
    let pdu = |at: u32, damage: u8, last: bool| {
        let mut pdu = h2c_data(slot, at, &[at as u8; 8], last);
        pdu.0.ch.flags = pdu.0.ch.flags.with(PduFlags::DDGSTF, true);
        pdu.0.ch.plen = U32::new(36);
        let mut digest = Crc32c::of(&pdu.1);
        digest[3] ^= damage;
        [pdu.0.as_bytes(), &pdu.1, &digest].concat()
    };
    let all = feed(&mut target, &pdu(0, 0x80, false)).expect("not fatal");
    assert_eq!(all, [Seen::Data { slot, offset: 0, bytes: vec![0; 8] }]);
    let all = feed(&mut target, &pdu(8, 0, true)).expect("valid");
    assert_eq!(all[1..], [Seen::DigestError(slot)]);
    let _ = target.r2t(slot, 16, 8);
    let all = feed(&mut target, &pdu(16, 0, true)).expect("valid");
    assert_eq!(all[1..], [Seen::End(slot)]);
}

#[test]
fn slots_are_bounded() {
    let config = TargetConfig { slots: 3, ..TargetConfig::default() };
    let mut target = ready(config, 0, false, false);
    let capsule = golden("capsule-cmd");
    assert_eq!(feed(&mut target, &capsule.repeat(3)).expect("valid").len(), 3);
    assert_eq!(target.outstanding(), 3);
    target.release(1);
    let all = feed(&mut target, &capsule).expect("valid");
    assert_eq!(all, [Seen::Command { slot: 1, cid: CID, in_capsule_len: 0 }]);
    let got = fault(&mut target, &capsule);
    assert_eq!(got.fes, FatalErrorStatus::PDU_SEQUENCE_ERROR);
}

#[test]
fn limits_grow_and_shrink() {
    let config = TargetConfig { slots: 2, ..TargetConfig::default() };
    let mut target = ready(config, 0, false, false);
    let capsule = golden("capsule-cmd");
    feed(&mut target, &capsule).expect("valid");
    target.set_limits(5, 4096);
    assert_eq!(feed(&mut target, &capsule.repeat(4)).expect("valid").len(), 4);
    target.set_limits(2, 0);
    // Slots beyond the limit live until they are released, and are not handed out again.
    for slot in 0..5 {
        target.release(slot);
    }
    let all = feed(&mut target, &capsule.repeat(2)).expect("valid");
    let slots: Vec<_> = all
        .iter()
        .map(|seen| if let Seen::Command { slot, .. } = seen { *slot } else { 99 })
        .collect();
    assert!(slots.iter().all(|slot| *slot < 2) && slots[0] != slots[1], "{slots:?}");
    assert!(feed(&mut target, &capsule).is_err());
}

#[test]
fn data_of_a_released_slot_is_swallowed() {
    // In a capsule: the driver refuses the command when it sees it.
    let config = TargetConfig { cpda: 3, slots: 2, ..TargetConfig::default() };
    let mut target = ready(config, 0, true, true);
    let good = golden("capsule-cmd-in-capsule");
    let mut cut = &good[..];
    let event = target.next(&mut cut).expect("valid").expect("a command");
    assert!(matches!(event, TargetEvent::Command { slot: 0, in_capsule_len: 16, .. }));
    target.release(0);
    assert_eq!(target.outstanding(), 0);
    assert_eq!(feed(&mut target, cut).expect("valid"), []);
    assert!(matches!(
        feed(&mut target, &good).expect("valid")[..],
        [Seen::Command { slot: 0, .. }, Seen::Data { .. }, Seen::End(0)]
    ));
    // With an R2T outstanding: the slot is not handed out until its data is through.
    let config = TargetConfig { slots: 2, ..TargetConfig::default() };
    let mut target = ready(config, 0, false, false);
    let slot = writing(&mut target, 16);
    feed(&mut target, &bytes(&h2c_data(slot, 0, &[1; 8], false))).expect("valid");
    target.release(slot);
    let capsule = golden("capsule-cmd");
    let all = feed(&mut target, &capsule).expect("valid");
    assert_eq!(all, [Seen::Command { slot: 1 - slot, cid: CID, in_capsule_len: 0 }]);
    assert_eq!(feed(&mut target, &bytes(&h2c_data(slot, 8, &[1; 8], true))).expect("valid"), []);
    let all = feed(&mut target, &capsule).expect("valid");
    assert_eq!(all, [Seen::Command { slot, cid: CID, in_capsule_len: 0 }]);
}

#[test]
fn term_req_ends_the_connection() {
    for mut target in [Target::new(TargetConfig::default()), plain()] {
        let all = feed(&mut target, &golden("h2c-term-req")).expect("valid");
        assert_eq!(all, [Seen::Terminated(5)]);
        assert_eq!(feed(&mut target, &golden("capsule-cmd")).expect("swallowed"), []);
    }
    // PLEN beyond 152 or below 24, or another HLEN: not looked at, but the end all the same.
    for (at, value) in [(4, 153), (4, 23), (2, 25)] {
        let mut pdu = golden("h2c-term-req");
        pdu[at] = value;
        assert_eq!(feed(&mut plain(), &pdu).expect("no fault"), [Seen::Terminated(0)]);
    }
    // Digests do not apply to it.
    let mut target = ready(TargetConfig::default(), 0, true, true);
    assert_eq!(trickle(&mut target, &golden("h2c-term-req")).expect("valid").len(), 1);
}

#[test]
fn a_fault_is_final() {
    let mut target = plain();
    let mut pdu = golden("capsule-cmd");
    pdu[2] = 3;
    let first = trickle(&mut target, &pdu).expect_err("HLEN");
    assert_eq!(fault(&mut target, &golden("capsule-cmd")), first);
    assert_eq!(first.to_string(), "HLEN is not that of the PDU type (FES 0x01, FEI 0x2)");
    // The header that the TermReq repeats is the one in error, not what came later.
    assert_eq!(target.term_req(&first)[24..], pdu[..8]);
}

#[test]
fn golden_term_req() {
    let mut target = plain();
    let got = fault(&mut target, &golden("h2c-data"));
    assert_eq!(*target.term_req(&got), golden("c2h-term-req"));
}

/// A TermReq has at most 152 bytes (NVMe/TCP 1.0, section 3.5).
#[test]
fn term_req_is_bounded() {
    let fault = Fault::sequence("test");
    for (len, want) in [(0, 24), (128, 152), (200, 152)] {
        let head = fault.term_req(PduType::C2H_TERM_REQ, &[0x77; 200][..len]);
        assert_eq!((head.len(), view::<CommonHeader>(&head).plen.get()), (want, want as u32));
    }
}
