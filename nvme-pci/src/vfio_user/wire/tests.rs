use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::testing::memfd;

/// Written down from the header of the vfio-user document.
#[test]
fn messages_have_their_golden_bytes() {
    let access = RegionAccess { offset: 0x1004, region: 0, count: 4 };
    let bytes = command(0x0102, Command::REGION_WRITE, true, &[access.as_bytes(), &[9, 8, 7, 6]]);
    #[rustfmt::skip]
    let golden = [
        0x02, 0x01, 0x0A, 0x00, 0x24, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0,
        0x04, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x04, 0, 0, 0, 9, 8, 7, 6,
    ];
    assert_eq!(bytes, golden);
    let bytes = reply(7, Command::DMA_MAP, &[]);
    assert_eq!(bytes, [7, 0, 2, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let bytes = error_reply(7, Command::DMA_MAP, 17);
    assert_eq!(bytes, [7, 0, 2, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 17, 0, 0, 0]);
}

type Plain = (u16, u16, bool, Vec<u8>);

/// Messages of a stream that comes in these pieces, what is missing at the end, and the fault.
fn decode(stream: &[u8], pieces: &[usize]) -> (Vec<Plain>, usize, Option<WireFault>) {
    let (mut decoder, mut messages, mut rest) = (Decoder::new(), Vec::new(), stream);
    let mut pieces = pieces.iter().copied().chain(std::iter::repeat(usize::MAX));
    while !rest.is_empty() {
        let len = pieces.next().expect("endless").clamp(1, rest.len());
        let (mut piece, after) = rest.split_at(len);
        rest = after;
        while !piece.is_empty() {
            assert!(decoder.wanted() > 0);
            match decoder.push(&mut piece) {
                Ok(Some(m)) => messages.push((m.id, m.command.0, m.no_reply, m.payload)),
                Ok(None) => assert!(piece.is_empty()),
                Err(fault) => return (messages, 0, Some(fault)),
            }
        }
    }
    (messages, decoder.wanted(), None)
}

proptest! {
    #[test]
    fn any_split_of_the_stream_gives_the_same_messages(
        messages in vec((any::<u16>(), any::<u16>(), any::<bool>(), vec(any::<u8>(), 0..50)), 0..6),
        tail in vec(any::<u8>(), 0..40),
        pieces in vec(1usize..30, 0..60),
    ) {
        let mut stream = Vec::new();
        for (id, kind, no_reply, payload) in &messages {
            stream.extend(command(*id, Command(*kind), *no_reply, &[payload]));
        }
        prop_assert_eq!(&decode(&stream, &pieces).0, &messages);
        stream.extend(tail);
        prop_assert_eq!(decode(&stream, &pieces), decode(&stream, &[]));
    }
}

#[test]
fn a_stream_that_cannot_be_followed_is_a_fault() {
    let header = |size: u32, flags: u32| {
        Header { id: 1, command: 1, size, flags, error: 0 }.as_bytes().to_vec()
    };
    for size in [0, 8, 15, (HEADER_BYTES + PAYLOAD_BYTES_MAX + 1) as u32, u32::MAX] {
        assert_eq!(decode(&header(size, 0), &[]).2, Some(WireFault::Size(size)));
    }
    for flags in [1, 2, 0xF, 0x21] {
        assert_eq!(decode(&header(16, flags), &[]).2, Some(WireFault::Flags(flags)));
    }
    let longest = (HEADER_BYTES + PAYLOAD_BYTES_MAX) as u32;
    assert_eq!(decode(&header(longest, 0), &[]), (vec![], PAYLOAD_BYTES_MAX, None));
}

#[test]
fn file_descriptors_belong_to_the_message_at_hand_and_have_a_bound() {
    let mut decoder = Decoder::new();
    let bytes = command(1, Command::DEVICE_SET_IRQS, false, &[&[0; 4]]);
    decoder.push_fds([memfd(1)]).unwrap();
    assert!(decoder.push(&mut &bytes[..10]).unwrap().is_none());
    assert_eq!(decoder.end(), Err(WireFault::Truncated));
    decoder.push_fds([memfd(1)]).unwrap();
    let message = decoder.push(&mut &bytes[10..]).unwrap().unwrap();
    assert_eq!(message.fds.len(), 2);
    assert_eq!(decoder.end(), Ok(()));
    for _ in 0..FDS_MAX {
        decoder.push_fds([memfd(1)]).unwrap();
    }
    assert_eq!(decoder.push_fds([memfd(1)]), Err(WireFault::Fds));
    assert_eq!(decoder.end(), Err(WireFault::Truncated), "files without a message");
}
