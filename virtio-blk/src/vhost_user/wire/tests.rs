use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use super::*;

fn fd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn one(bytes: &[u8], fds: Vec<OwnedFd>) -> Message {
    let mut decoder = Decoder::new();
    let mut input = bytes;
    decoder.push_fds(fds).unwrap();
    let message = decoder.push(&mut input).unwrap().unwrap();
    assert!(input.is_empty() && !decoder.is_inside());
    message
}

fn parse(kind: Request, payload: &[u8], fds: usize) -> Result<Command, Malformed> {
    let fds = (0..fds).map(|_| fd()).collect();
    one(&request(kind, false, payload), fds).parse()
}

/// Bytes as QEMU sends them for a SET_VRING_ADDR with need_reply.
#[test]
fn golden_set_vring_addr() {
    let mut bytes = vec![9, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0];
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    for word in [0x7f00_0000_1000u64, 0x7f00_0000_3000, 0x7f00_0000_2000, 0] {
        bytes.extend(word.to_le_bytes());
    }
    let message = one(&bytes, vec![]);
    assert!(message.need_reply);
    let Command::SetVringAddr(addr) = message.parse().unwrap() else { panic!() };
    assert_eq!((addr.index, addr.flags, addr.log), (1, 0, 0));
    assert_eq!(addr.descriptor, 0x7f00_0000_1000);
    assert_eq!(addr.used, 0x7f00_0000_3000);
    assert_eq!(addr.available, 0x7f00_0000_2000);
    assert_eq!(request(Request::SET_VRING_ADDR, true, addr.as_bytes()), bytes);
}

#[test]
fn golden_replies() {
    assert_eq!(
        reply_u64(Request::GET_FEATURES, 0x1_7000_0202),
        [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 2, 2, 0, 0x70, 1, 0, 0, 0]
    );
    assert_eq!(
        reply_vring_base(1, 0x1234),
        [11, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0x34, 0x12, 0, 0]
    );
    let config = reply_config(32, &[1, 0]);
    assert_eq!(config[..12], [24, 0, 0, 0, 5, 0, 0, 0, 14, 0, 0, 0]);
    assert_eq!(config[12..], [32, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    // An error: no payload at all.
    assert_eq!(reply(Request::GET_CONFIG, &[]), [24, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn memory_regions() {
    let region =
        MemoryRegion { guest_addr: 1 << 32, size: 4096, user_addr: 0x7f00, mmap_offset: 512 };
    let mut table = vec![2, 0, 0, 0, 0, 0, 0, 0];
    table.extend(region.as_bytes());
    table.extend(region.as_bytes());
    let Ok(Command::SetMemTable(regions)) = parse(Request::SET_MEM_TABLE, &table, 2) else {
        panic!()
    };
    assert_eq!(regions[1].0, region);
    // Fewer or more file descriptors than regions, a count that does not fit, too many regions.
    assert!(matches!(parse(Request::SET_MEM_TABLE, &table, 1), Err(Malformed::Fds { .. })));
    assert!(matches!(parse(Request::SET_MEM_TABLE, &table, 3), Err(Malformed::Fds { .. })));
    table[0] = 1;
    assert!(matches!(parse(Request::SET_MEM_TABLE, &table, 1), Err(Malformed::Length { .. })));
    let mut nine = vec![9, 0, 0, 0, 0, 0, 0, 0];
    (0..9).for_each(|_| nine.extend(region.as_bytes()));
    assert!(matches!(parse(Request::SET_MEM_TABLE, &nine, 8), Err(Malformed::Length { .. })));

    let mut single = vec![0; 8];
    single.extend(region.as_bytes());
    let added = parse(Request::ADD_MEM_REG, &single, 1);
    assert!(matches!(added, Ok(Command::AddMemReg(r, _)) if r == region));
    assert!(matches!(parse(Request::ADD_MEM_REG, &single, 0), Err(Malformed::Fds { .. })));
    for fds in 0..=1 {
        let removed = parse(Request::REM_MEM_REG, &single, fds);
        assert!(matches!(removed, Ok(Command::RemMemReg(r)) if r == region));
    }
}

#[test]
fn ring_eventfds() {
    for kind in [Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR] {
        let with = parse(kind, &3u64.to_ne_bytes(), 1).unwrap();
        let without = parse(kind, &0x103u64.to_ne_bytes(), 0).unwrap();
        let split = |command| match command {
            Command::SetVringKick(v) | Command::SetVringCall(v) | Command::SetVringErr(v) => v,
            other => panic!("{other:?}"),
        };
        let (with, without) = (split(with), split(without));
        assert!(with.index == 3 && with.fd.is_some());
        assert!(without.index == 3 && without.fd.is_none());
        assert!(matches!(parse(kind, &3u64.to_ne_bytes(), 0), Err(Malformed::Fds { .. })));
        assert!(matches!(parse(kind, &0x103u64.to_ne_bytes(), 1), Err(Malformed::Fds { .. })));
        assert!(matches!(parse(kind, &3u64.to_ne_bytes(), 2), Err(Malformed::Fds { .. })));
    }
}

#[test]
fn configuration_space_length_must_match() {
    let mut payload = vec![0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0];
    payload.extend([0; 60]);
    let got = parse(Request::GET_CONFIG, &payload, 0);
    assert!(matches!(got, Ok(Command::GetConfig { offset: 0, size: 60 })));
    payload.pop();
    assert!(matches!(parse(Request::GET_CONFIG, &payload, 0), Err(Malformed::Length { .. })));
    payload.truncate(11);
    assert!(matches!(parse(Request::SET_CONFIG, &payload, 0), Err(Malformed::Length { .. })));
}

#[test]
fn payload_and_descriptors_where_none_belong() {
    assert!(matches!(parse(Request::GET_FEATURES, &[0], 0), Err(Malformed::Length { .. })));
    assert!(matches!(parse(Request::GET_FEATURES, &[], 1), Err(Malformed::Fds { .. })));
    assert!(matches!(parse(Request::SET_FEATURES, &[0; 7], 0), Err(Malformed::Length { .. })));
    assert!(matches!(parse(Request(99), &[1, 2, 3], 0), Ok(Command::Unknown(Request(99)))));
}

#[test]
fn hostile_headers() {
    let header = |flags: u32, size: u32| {
        let mut bytes = 1u32.to_ne_bytes().to_vec();
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(size.to_ne_bytes());
        Decoder::new().push(&mut bytes.as_slice()).map(|m| m.is_some())
    };
    assert_eq!(header(1, 0), Ok(true));
    assert_eq!(header(1, 8), Ok(false));
    assert_eq!(header(0, 0), Err(WireFault::Version(0)));
    assert_eq!(header(2, 0), Err(WireFault::Version(2)));
    assert_eq!(header(5, 0), Err(WireFault::Reply(Request::GET_FEATURES)));
    assert_eq!(
        header(1, u32::MAX),
        Err(WireFault::Size { request: Request::GET_FEATURES, size: u32::MAX })
    );
    assert!(header(1, PAYLOAD_BYTES_MAX as u32 + 1).is_err());
}

#[test]
fn too_many_file_descriptors() {
    let mut decoder = Decoder::new();
    decoder.push_fds((0..5).map(|_| fd())).unwrap();
    decoder.push(&mut &request(Request::GET_FEATURES, false, &[])[..3]).unwrap();
    decoder.push_fds((0..3).map(|_| fd())).unwrap();
    assert_eq!(decoder.push_fds([fd()]), Err(WireFault::Fds));
}

#[test]
fn end_of_stream() {
    let mut decoder = Decoder::new();
    assert_eq!(decoder.end(), Ok(()));
    decoder.push(&mut &[1u8][..]).unwrap();
    assert_eq!(decoder.end(), Err(WireFault::Truncated));
}

proptest! {
    #[test]
    fn any_split_gives_the_same_messages(
        messages in prop::collection::vec(
            (any::<u32>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..100)), 1..6),
        pieces in prop::collection::vec(1usize..40, 1..200),
    ) {
        let mut stream = Vec::new();
        for (kind, need_reply, payload) in &messages {
            stream.extend(request(Request(*kind), *need_reply, payload));
        }
        let mut decoder = Decoder::new();
        let mut decoded = Vec::new();
        let (mut rest, mut pieces) = (stream.as_slice(), pieces.iter().cycle());
        while !rest.is_empty() {
            // As the socket does: never beyond what is wanted.
            let n = (*pieces.next().unwrap()).min(decoder.wanted()).min(rest.len());
            prop_assert!(n > 0);
            let (mut now, later) = rest.split_at(n);
            rest = later;
            while !now.is_empty() {
                if let Some(message) = decoder.push(&mut now).unwrap() {
                    decoded.push((message.request.0, message.need_reply, message.payload));
                }
            }
        }
        prop_assert!(!decoder.is_inside());
        prop_assert_eq!(decoded, messages);
    }

    #[test]
    fn any_junk_is_an_answer(
        junk in prop::collection::vec(any::<u8>(), 0..400),
        plausible in any::<bool>(),
    ) {
        let mut junk = junk;
        if plausible && junk.len() >= HEADER_BYTES {
            junk[1..4].fill(0);
            junk[4..8].copy_from_slice(&1u32.to_ne_bytes());
            junk[9..12].fill(0);
        }
        let mut decoder = Decoder::new();
        let mut input = junk.as_slice();
        while !input.is_empty() {
            match decoder.push(&mut input) {
                Ok(Some(message)) => drop(message.parse()),
                Ok(None) => prop_assert!(input.is_empty() && decoder.wanted() > 0),
                Err(_) => break,
            }
        }
    }
}
