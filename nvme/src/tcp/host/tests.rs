//! What the host's side builds, accepts and refuses. Streams of random shape are in `tcp/tests.rs`.

use zerocopy::IntoBytes;

use super::*;
use crate::spec::pdu::tests::golden;
use crate::tcp::Crc32c;

const CID: u16 = 0x1234;
const DATA: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

/// What a host made of a stream.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Initialized,
    Data { cid: u16, offset: u32, bytes: Vec<u8> },
    R2t { cid: u16, ttag: u16, offset: u32, len: u32 },
    Complete { cid: u16, cqe: [u8; 16] },
    Terminated(u16),
}

fn seen(event: HostEvent<'_>) -> Seen {
    match event {
        HostEvent::Initialized => Seen::Initialized,
        HostEvent::Data { cid, offset, bytes } => Seen::Data { cid, offset, bytes: bytes.to_vec() },
        HostEvent::R2t { cid, ttag, offset, len } => Seen::R2t { cid, ttag, offset, len },
        HostEvent::Complete { cid, cqe } => Seen::Complete { cid, cqe },
        HostEvent::Terminated { fes } => Seen::Terminated(fes),
    }
}

fn feed(host: &mut Host, mut bytes: &[u8]) -> Result<Vec<Seen>, Fault> {
    let mut all = Vec::new();
    while let Some(event) = host.next(&mut bytes)? {
        all.push(seen(event));
    }
    assert!(bytes.is_empty(), "Ok(None) means that the input is used up");
    Ok(all)
}

/// Feeds `bytes` one by one; pieces of payload are joined.
fn trickle(host: &mut Host, bytes: &[u8]) -> Result<Vec<Seen>, Fault> {
    let mut all: Vec<Seen> = Vec::new();
    for byte in bytes {
        for item in feed(host, &[*byte])? {
            match (all.last_mut(), item) {
                (
                    Some(Seen::Data { cid, offset, bytes }),
                    Seen::Data { cid: next, offset: at, bytes: more },
                ) if *cid == next && *offset + bytes.len() as u32 == at => bytes.extend(more),
                (_, item) => all.push(item),
            }
        }
    }
    Ok(all)
}

fn fault(host: &mut Host, bytes: &[u8]) -> Fault {
    feed(host, bytes).expect_err("must be refused")
}

fn config() -> HostConfig {
    HostConfig { queue_depth: CID + 1, ..HostConfig::default() }
}

fn ready(config: HostConfig) -> Host {
    let dgst = DigestFlags::new(config.header_digest, config.data_digest);
    let mut host = Host::new(config);
    let mut reply = golden("icresp");
    reply[11] = dgst.0;
    assert_eq!(feed(&mut host, &reply).expect("valid"), [Seen::Initialized]);
    host
}

/// A host with command `CID` outstanding.
fn with(config: HostConfig, transfer: Transfer) -> Host {
    let mut host = ready(config);
    let _ = host.command(CID, &[0; 64], transfer);
    host
}

fn reading(len: u32) -> Host {
    with(config(), Transfer::Read { len })
}

fn writing(len: u32) -> Host {
    with(config(), Transfer::Write { len, in_capsule: false })
}

fn c2h_data(datao: u32, datal: u32, flags: u8) -> C2hData {
    C2hData {
        ch: CommonHeader {
            pdu_type: PduType::C2H_DATA,
            flags: PduFlags(flags),
            hlen: 24,
            pdo: 24,
            plen: U32::new(24 + datal),
        },
        cccid: U16::new(CID),
        reserved10: [0; 2],
        datao: U32::new(datao),
        datal: U32::new(datal),
        reserved20: [0; 4],
    }
}

fn r2t(r2to: u32, r2tl: u32) -> R2t {
    R2t {
        ch: CommonHeader::fixed(PduType::R2T, 24),
        cccid: U16::new(CID),
        ttag: U16::new(7),
        r2to: U32::new(r2to),
        r2tl: U32::new(r2tl),
        reserved20: [0; 4],
    }
}

fn response(cid: u16, status: u16) -> CapsuleResp {
    let mut cqe = [0; 16];
    cqe[12..14].copy_from_slice(&cid.to_le_bytes());
    cqe[14..].copy_from_slice(&(status << 1).to_le_bytes());
    CapsuleResp { ch: CommonHeader::fixed(PduType::CAPSULE_RESP, 24), cqe }
}

const LAST: u8 = PduFlags::LAST_PDU.0;
const SUCCESS: u8 = PduFlags::SUCCESS.0 | LAST;

fn sqe(golden: &[u8]) -> [u8; 64] {
    let mut sqe: [u8; 64] = golden[8..72].try_into().expect("64 bytes");
    sqe[2..4].fill(0xff); // the host puts the cid
    sqe
}

#[test]
fn golden_session() {
    for feed in [feed, trickle] {
        let config =
            HostConfig { header_digest: true, data_digest: true, max_r2t: 4, hpda: 15, ..config() };
        let mut host = Host::new(config);
        assert_eq!(*host.icreq(), golden("icreq"));
        assert!(!host.is_initialized());
        assert_eq!(feed(&mut host, &golden("icresp")).expect("valid"), [Seen::Initialized]);
        assert!(host.is_initialized() && host.header_digest() && host.data_digest());
        assert_eq!(host.max_h2c_data(), 128 << 10);

        let _ = host.command(CID, &[0; 64], Transfer::Read { len: 8 });
        assert!(host.is_outstanding(CID));
        let all = feed(&mut host, &golden("c2h-data-hpda-digests")).expect("valid");
        let cqe = response(CID, 0).cqe;
        let data = Seen::Data { cid: CID, offset: 0, bytes: DATA.to_vec() };
        assert_eq!(all, [data, Seen::Complete { cid: CID, cqe }]);
        assert!(!host.is_outstanding(CID) && host.outstanding() == 0);

        let transfer = Transfer::Write { len: 12288, in_capsule: false };
        let _ = host.command(CID, &[0; 64], transfer);
        let mut first = r2t(0, 4096);
        (first.ch.flags, first.ch.plen) = (PduFlags::HDGSTF, U32::new(28));
        let digest = Crc32c::of(first.as_bytes());
        let all = feed(&mut host, &[first.as_bytes(), &digest].concat()).expect("valid");
        assert_eq!(all, [Seen::R2t { cid: CID, ttag: 7, offset: 0, len: 4096 }]);
        let all = feed(&mut host, &golden("r2t-digest")).expect("valid");
        assert_eq!(all, [Seen::R2t { cid: CID, ttag: 7, offset: 4096, len: 8192 }]);
        let _ = host.h2c_data(CID, 7, 0, 4096, true);
        let _ = host.h2c_data(CID, 7, 4096, 8192, true);
        let all = feed(&mut host, &golden("capsule-resp-digest")).expect("valid");
        let cqe = golden("capsule-resp")[8..].try_into().expect("16 bytes");
        assert_eq!(all, [Seen::Complete { cid: CID, cqe }]);
    }
}

#[test]
fn golden_without_digests() {
    let mut host = ready(config());
    let transfer = Transfer::Write { len: 8192, in_capsule: false };
    let capsule = golden("capsule-cmd");
    assert_eq!(*host.command(CID, &sqe(&capsule), transfer), capsule);
    assert_eq!([&*host.h2c_data(CID, 7, 4096, 8, true), &DATA].concat(), golden("h2c-data"));

    let mut host = reading(8);
    assert_eq!(feed(&mut host, &golden("c2h-data")).expect("valid").len(), 2);

    let mut host = with(HostConfig { hpda: 3, ..config() }, Transfer::Read { len: 16 });
    let data = Seen::Data { cid: CID, offset: 0, bytes: DATA.to_vec() };
    assert_eq!(feed(&mut host, &golden("c2h-data-hpda")).expect("valid"), [data]);
}

#[test]
fn golden_with_cpda() {
    let with_cpda = |cpda_z: u8| {
        let mut host = Host::new(HostConfig { header_digest: true, data_digest: true, ..config() });
        let mut reply = golden("icresp");
        reply[10] = cpda_z;
        feed(&mut host, &reply).expect("valid");
        host
    };
    let mut host = with_cpda(3);
    let capsule = golden("capsule-cmd-in-capsule");
    let transfer = Transfer::Write { len: 16, in_capsule: true };
    let head = host.command(CID, &sqe(&capsule), transfer);
    let data: Vec<u8> = (0xa0..0xb0).collect();
    assert_eq!([&*head, &data, &Crc32c::of(&data)].concat(), capsule);
    let mut host = with_cpda(15);
    let head = host.h2c_data(CID, 7, 4096, 8, true);
    let pdu = [&*head, &DATA, &Crc32c::of(&DATA)].concat();
    assert_eq!(pdu, golden("h2c-data-cpda-digests"));
}

/// NVMe/TCP 1.0, Figure 15: 12,288 bytes in four C2HData PDUs and a response.
#[test]
fn figure_15() {
    let mut host = reading(12288);
    let data: Vec<u8> = (0..12288u32).map(|i| (i / 7) as u8).collect();
    let mut got: Vec<u8> = Vec::new();
    for (from, to) in [(0, 1000), (1000, 3000), (3000, 11192), (11192, 12288)] {
        let flags = if to == 12288 { LAST } else { 0 };
        let pdu = c2h_data(from as u32, (to - from) as u32, flags);
        let all = feed(&mut host, &[pdu.as_bytes(), &data[from..to]].concat()).expect("valid");
        let [Seen::Data { cid: CID, offset, bytes }] = &all[..] else { panic!("{all:?}") };
        assert_eq!(*offset as usize, got.len());
        got.extend(bytes);
    }
    assert_eq!(got, data);
    let resp = response(CID, 0);
    let all = feed(&mut host, resp.as_bytes()).expect("valid");
    assert_eq!(all, [Seen::Complete { cid: CID, cqe: resp.cqe }]);
}

#[test]
fn ic_resp_is_checked() {
    let good = golden("icresp");
    let with = |at: usize, value: u8, header_digest: bool, data_digest: bool| {
        let mut pdu = good.clone();
        pdu[at] = value;
        let mut host = Host::new(HostConfig { header_digest, data_digest, ..config() });
        let got = fault(&mut host, &pdu);
        let term = host.term_req(&got);
        assert_eq!(term[0], PduType::H2C_TERM_REQ.0);
        assert!(pdu.starts_with(&term[24..]), "the header in error is repeated");
        (got.fes.get(), got.fei)
    };
    assert_eq!(with(2, 24, true, true), (1, 2));
    assert_eq!(with(4, 24, true, true), (1, 4));
    assert_eq!(with(8, 1, true, true), (6, 8));
    assert_eq!(with(9, 1, true, true), (6, 8));
    assert_eq!(with(10, 32, true, true), (1, 10));
    // Digests that were not asked for, and one that was and is not granted.
    assert_eq!(with(11, 3, false, true), (1, 11));
    assert_eq!(with(11, 3, true, false), (1, 11));
    assert_eq!(with(11, 2, true, true), (6, 11));
    assert_eq!(with(11, 1, true, true), (6, 11));
    // MAXH2CDATA 131073, 4092, 0.
    assert_eq!(with(12, 1, true, true), (1, 12));
    let small = |value: u32| {
        let mut pdu = good.clone();
        pdu[11] = 0;
        pdu[12..16].copy_from_slice(&value.to_le_bytes());
        let mut host = Host::new(config());
        feed(&mut host, &pdu).map(|_| host.max_h2c_data()).map_err(|f| (f.fes.get(), f.fei))
    };
    assert_eq!(small(4092), Err((1, 12)));
    assert_eq!(small(0), Err((1, 12)));
    assert_eq!(small(4096), Ok(4096));
}

#[test]
fn order_of_pdus() {
    for early in ["capsule-resp", "c2h-data", "r2t"] {
        let got = fault(&mut Host::new(config()), &golden(early)[..8]);
        assert_eq!(got.fes, FatalErrorStatus::PDU_SEQUENCE_ERROR);
    }
    let got = fault(&mut ready(config()), &golden("icresp"));
    assert_eq!(got.fes, FatalErrorStatus::PDU_SEQUENCE_ERROR);
    for pdu_type in (0..=255).filter(|t| ![1, 3, 5, 7, 9].contains(t)) {
        for mut host in [Host::new(config()), ready(config())] {
            let got = fault(&mut host, &[pdu_type, 0, 24, 0, 24, 0, 0, 0]);
            assert_eq!((got.fes.get(), got.fei), (1, 0), "type {pdu_type}");
        }
    }
}

#[test]
fn c2h_data_headers_are_checked() {
    let with = |edit: &dyn Fn(&mut C2hData)| {
        let mut host = reading(4096);
        let first = [c2h_data(0, 64, 0).as_bytes(), &[0; 64]].concat();
        feed(&mut host, &first).expect("valid");
        let mut pdu = c2h_data(64, 64, 0);
        edit(&mut pdu);
        let got = fault(&mut host, pdu.as_bytes());
        assert!(pdu.as_bytes().starts_with(&host.term_req(&got)[24..]));
        (got.fes.get(), got.fei)
    };
    let len = |pdu: &mut C2hData, datal: u32| {
        pdu.datal = U32::new(datal);
        pdu.ch.plen = U32::new(24 + datal);
    };
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::HDGSTF), (1, 1));
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::DDGSTF), (1, 1));
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::SUCCESS), (1, 1));
    assert_eq!(with(&|pdu| pdu.ch.hlen = 128), (1, 2));
    assert_eq!(with(&|pdu| pdu.ch.pdo = 20), (1, 3));
    assert_eq!(with(&|pdu| pdu.ch.pdo = 26), (1, 3));
    assert_eq!(with(&|pdu| pdu.ch.pdo = 28), (1, 4));
    assert_eq!(with(&|pdu| pdu.ch.plen = U32::new(23)), (1, 4));
    assert_eq!(with(&|pdu| pdu.ch.plen = U32::new(92)), (1, 4));
    assert_eq!(with(&|pdu| pdu.cccid = U16::new(CID - 1)), (1, 8));
    assert_eq!(with(&|pdu| pdu.cccid = U16::new(u16::MAX)), (1, 8));
    assert_eq!(with(&|pdu| len(pdu, 0)), (1, 16));
    assert_eq!(with(&|pdu| len(pdu, 3)), (1, 16));
    assert_eq!(with(&|pdu| len(pdu, 4036)), (4, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(4096)), (4, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(u32::MAX - 7)), (4, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(128)), (2, 0));
    assert_eq!(with(&|pdu| pdu.datao = U32::new(0)), (2, 0));
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags(SUCCESS)), (2, 0));
    // HPDA of 16 bytes.
    let mut host =
        super::tests::with(HostConfig { hpda: 3, ..config() }, Transfer::Read { len: 8 });
    let got = fault(&mut host, &golden("c2h-data"));
    assert_eq!((got.fes.get(), got.fei), (1, 3));
}

#[test]
fn c2h_data_is_for_reads_and_ends_with_last() {
    for transfer in
        [Transfer::None, Transfer::Write { len: 8, in_capsule: false }, Transfer::Read { len: 0 }]
    {
        let mut host = with(config(), transfer);
        assert_eq!(fault(&mut host, &golden("c2h-data")).fes.get(), 2);
    }
    let mut host = reading(16);
    feed(&mut host, &[c2h_data(0, 8, LAST).as_bytes(), &DATA].concat()).expect("valid");
    assert_eq!(fault(&mut host, c2h_data(8, 8, LAST).as_bytes()).fes.get(), 2);
}

#[test]
fn success_needs_all_data() {
    // No data, some data, some data with LAST_PDU: each with a response of success.
    let short: [Option<u8>; 3] = [None, Some(0), Some(LAST)];
    for flags in short {
        let part = flags.map(|flags| [c2h_data(0, 8, flags).as_bytes(), &DATA].concat());
        let mut host = reading(16);
        feed(&mut host, &part.clone().unwrap_or_default()).expect("valid");
        assert_eq!(fault(&mut host, response(CID, 0).as_bytes()).fes.get(), 2);
        // An error may come at any time.
        let mut host = reading(16);
        feed(&mut host, &part.unwrap_or_default()).expect("valid");
        let resp = response(CID, 0x0281);
        let all = feed(&mut host, resp.as_bytes()).expect("valid");
        assert_eq!(all, [Seen::Complete { cid: CID, cqe: resp.cqe }]);
    }
    // A write that was not asked for whole, or whose data has not been sent.
    let mut host = writing(16);
    assert_eq!(fault(&mut host, response(CID, 0).as_bytes()).fes.get(), 2);
    let mut host = writing(16);
    feed(&mut host, r2t(0, 16).as_bytes()).expect("valid");
    assert_eq!(fault(&mut host, response(CID, 0).as_bytes()).fes.get(), 2);
    let mut host = writing(16);
    feed(&mut host, r2t(0, 16).as_bytes()).expect("valid");
    let _ = host.h2c_data(CID, 7, 0, 8, false);
    let all = feed(&mut host, response(CID, 6).as_bytes()).expect("an error is fine");
    assert!(matches!(all[..], [Seen::Complete { .. }]));
    // What is sent afterwards does not touch the next command with this cid.
    let transfer = Transfer::Write { len: 8, in_capsule: true };
    let _ = host.command(CID, &[0; 64], transfer);
    let _ = host.h2c_data(CID, 7, 8, 8, true);
    assert_eq!(feed(&mut host, response(CID, 0).as_bytes()).expect("valid").len(), 1);
}

#[test]
fn r2ts_are_checked() {
    let with = |edit: &dyn Fn(&mut R2t)| {
        let mut host = super::tests::with(
            HostConfig { max_r2t: 2, ..config() },
            Transfer::Write { len: 4096, in_capsule: false },
        );
        feed(&mut host, r2t(0, 64).as_bytes()).expect("valid");
        let mut pdu = r2t(64, 64);
        edit(&mut pdu);
        let got = fault(&mut host, pdu.as_bytes());
        (got.fes.get(), got.fei)
    };
    assert_eq!(with(&|pdu| pdu.ch.flags = PduFlags::HDGSTF), (1, 1));
    assert_eq!(with(&|pdu| pdu.ch.hlen = 23), (1, 2));
    assert_eq!(with(&|pdu| pdu.ch.plen = U32::new(28)), (1, 4));
    assert_eq!(with(&|pdu| pdu.cccid = U16::new(3)), (1, 8));
    assert_eq!(with(&|pdu| pdu.r2tl = U32::new(0)), (1, 16));
    assert_eq!(with(&|pdu| pdu.r2tl = U32::new(62)), (1, 16));
    assert_eq!(with(&|pdu| pdu.r2tl = U32::new(4036)), (4, 0));
    assert_eq!(with(&|pdu| pdu.r2tl = U32::new(u32::MAX - 3)), (4, 0));
    assert_eq!(with(&|pdu| pdu.r2to = U32::new(4096)), (4, 0));
    assert_eq!(with(&|pdu| pdu.r2to = U32::new(0)), (2, 0));
    assert_eq!(with(&|pdu| pdu.r2to = U32::new(128)), (2, 0));
    for transfer in
        [Transfer::None, Transfer::Read { len: 64 }, Transfer::Write { len: 64, in_capsule: true }]
    {
        let mut host = super::tests::with(config(), transfer);
        assert_eq!(fault(&mut host, r2t(0, 64).as_bytes()).fes.get(), 2);
    }
}

#[test]
fn r2ts_outstanding_are_limited() {
    let transfer = Transfer::Write { len: 64, in_capsule: false };
    let mut host = with(HostConfig { max_r2t: 2, ..config() }, transfer);
    feed(&mut host, r2t(0, 8).as_bytes()).expect("valid");
    feed(&mut host, r2t(8, 8).as_bytes()).expect("valid");
    let _ = host.h2c_data(CID, 7, 0, 4, false);
    let _ = host.h2c_data(CID, 7, 4, 4, true);
    feed(&mut host, r2t(16, 8).as_bytes()).expect("one has been answered");
    let got = fault(&mut host, r2t(24, 8).as_bytes());
    assert_eq!((got.fes, got.fei), (FatalErrorStatus::R2T_LIMIT_EXCEEDED, 0));
    // MAXR2T is zero-based: 0 asked for means 1.
    let host = Host::new(HostConfig { max_r2t: 0, ..config() });
    assert_eq!(view::<IcReq>(&host.icreq()).maxr2t_z.get(), 0);
}

#[test]
fn golden_term_req() {
    let transfer = Transfer::Write { len: 16384, in_capsule: false };
    let mut host = with(config(), transfer);
    feed(&mut host, r2t(0, 4096).as_bytes()).expect("valid");
    let got = fault(&mut host, &golden("r2t"));
    assert_eq!(*host.term_req(&got), golden("h2c-term-req"));
}

#[test]
fn responses_are_checked() {
    let mut host = with(config(), Transfer::None);
    let mut pdu = response(CID, 0);
    pdu.ch.plen = U32::new(28);
    let got = fault(&mut host, pdu.as_bytes());
    assert_eq!((got.fes.get(), got.fei), (1, 4));
    for cid in [0, CID + 1, u16::MAX] {
        let got = fault(&mut with(config(), Transfer::None), response(cid, 0).as_bytes());
        assert_eq!((got.fes.get(), got.fei), (1, 20));
    }
    // Twice.
    let mut host = with(config(), Transfer::None);
    feed(&mut host, response(CID, 0).as_bytes()).expect("valid");
    assert_eq!(fault(&mut host, response(CID, 0).as_bytes()).fei, 20);
}

#[test]
fn header_digest() {
    let fresh = || {
        with(
            HostConfig { header_digest: true, ..config() },
            Transfer::Write { len: 12288, in_capsule: false },
        )
    };
    let good = golden("capsule-resp-digest");
    for bit in 0..good.len() * 8 {
        let mut pdu = good.clone();
        pdu[bit / 8] ^= 1 << (bit % 8);
        pdu.resize(128, 0);
        let mut host = fresh();
        // The type may become that of a TermReq, which ends the connection too.
        match feed(&mut host, &pdu) {
            Ok(all) => assert!(bit < 8 && matches!(all[..], [Seen::Terminated(_)]), "bit {bit}"),
            Err(got) if matches!(bit / 8, 0 | 2) || bit == 8 => assert_ne!(got.fes.get(), 0),
            Err(got) => {
                assert_eq!(got.fes, FatalErrorStatus::HEADER_DIGEST_ERROR, "bit {bit}");
                assert_eq!(&host.term_req(&got)[24..], &pdu[..24], "the header without digest");
            }
        }
    }
}

#[test]
fn data_digest_error_fails_the_command() {
    let transient = response(CID, 0x22).cqe;
    let config = HostConfig { data_digest: true, ..config() };
    let pdu = |datao: u32, flags: u8, damage: u8| {
        let mut header = c2h_data(datao, 8, flags | PduFlags::DDGSTF.0);
        header.ch.plen = U32::new(36);
        let mut digest = Crc32c::of(&DATA);
        digest[0] ^= damage;
        [header.as_bytes(), &DATA, &digest].concat()
    };
    for feed in [feed, trickle] {
        // SUCCESS with the damaged data, and SUCCESS behind it.
        let mut host = with(config.clone(), Transfer::Read { len: 16 });
        feed(&mut host, &pdu(0, 0, 0)).expect("valid");
        let all = feed(&mut host, &pdu(8, SUCCESS, 1)).expect("not fatal");
        assert_eq!(all[1..], [Seen::Complete { cid: CID, cqe: transient }]);
        let mut host = with(config.clone(), Transfer::Read { len: 16 });
        feed(&mut host, &pdu(0, 0, 1)).expect("not fatal");
        let all = feed(&mut host, &pdu(8, SUCCESS, 0)).expect("valid");
        assert_eq!(all[1..], [Seen::Complete { cid: CID, cqe: transient }]);
        // A response capsule behind it; an error in that stays what it is.
        for (status, want) in [(0, transient), (0x0281, response(CID, 0x0281).cqe)] {
            let mut host = with(config.clone(), Transfer::Read { len: 8 });
            feed(&mut host, &pdu(0, LAST, 1)).expect("not fatal");
            let all = feed(&mut host, response(CID, status).as_bytes()).expect("valid");
            assert_eq!(all, [Seen::Complete { cid: CID, cqe: want }]);
        }
        // The next command on this cid is not affected.
        let mut host = with(config.clone(), Transfer::Read { len: 8 });
        feed(&mut host, &pdu(0, SUCCESS, 1)).expect("not fatal");
        let _ = host.command(CID, &[0; 64], Transfer::Read { len: 8 });
        let all = feed(&mut host, &pdu(0, SUCCESS, 0)).expect("valid");
        assert_eq!(all[1..], [Seen::Complete { cid: CID, cqe: response(CID, 0).cqe }]);
    }
}

#[test]
fn odd_lengths_at_the_end() {
    let mut host = reading(7);
    let pdu = [c2h_data(0, 7, SUCCESS).as_bytes(), &DATA[..7]].concat();
    assert_eq!(feed(&mut host, &pdu).expect("valid").len(), 2);
    let mut host = writing(7);
    assert_eq!(feed(&mut host, r2t(0, 7).as_bytes()).expect("valid").len(), 1);
}

#[test]
fn term_req_ends_the_connection() {
    for mut host in [Host::new(config()), ready(config())] {
        let all = feed(&mut host, &golden("c2h-term-req")).expect("valid");
        assert_eq!(all, [Seen::Terminated(1)]);
        assert_eq!(feed(&mut host, &golden("r2t")).expect("swallowed"), []);
    }
    for (at, value) in [(4, 153), (4, 23), (2, 25)] {
        let mut pdu = golden("c2h-term-req");
        pdu[at] = value;
        assert_eq!(feed(&mut ready(config()), &pdu).expect("no fault"), [Seen::Terminated(0)]);
    }
}

#[test]
fn a_fault_is_final() {
    let mut host = with(config(), Transfer::None);
    let first = trickle(&mut host, &golden("r2t")).expect_err("no write");
    assert_eq!(fault(&mut host, response(CID, 0).as_bytes()), first);
    assert_eq!(host.term_req(&first)[24..], golden("r2t"));
}
