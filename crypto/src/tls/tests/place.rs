//! Records opened straight to where their bytes belong.

use iobuf::{Pool, SgList};
use proptest::prelude::*;

use super::support::*;
use crate::tls::{RECORD_PLAIN_MAX, RecordError, Session};

/// A list of `len` bytes in segments that end at odd places, all of them FFh.
fn list(len: usize) -> SgList {
    let pool = Pool::new(4 << 20).unwrap();
    let mut whole = SgList::default();
    pool.alloc(2 * len + 4096, &mut whole).unwrap();
    let mut list = SgList::default();
    let (mut at, mut step) = (0, 1);
    while list.len() < len {
        let part = step.min(len - list.len());
        list.append_range(&whole, at, part).unwrap();
        // A gap after each, which nobody may write to.
        (at, step) = (at + part + 1, (step * 3).min(9973));
    }
    whole.fill(0, whole.len(), 0xFF).unwrap();
    list
}

fn bytes(list: &SgList, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    list.copy_to_slice(0, &mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + (n >> 8)) as u8).collect()
}

#[test]
fn whole_records_go_into_place_and_what_does_not_fit_waits() {
    for key_len in [32, 48] {
        let (mut client, mut server) = sessions(key_len);
        let data = pattern(50_000);
        let wire = seal(&mut client, &data);
        let to = list(data.len());
        // Room for two records and most of a third.
        let (taken, placed) = server.open_to(&wire, &to, 0, 49_000).unwrap();
        assert_eq!((taken, placed), (2 * (RECORD_PLAIN_MAX + 22), 2 * RECORD_PLAIN_MAX));
        let (more, last) = server.open_to(&wire[taken..], &to, placed, 50_000 - placed).unwrap();
        assert_eq!((taken + more, placed + last), (wire.len(), 50_000));
        assert!(bytes(&to, 50_000) == data);
        assert_eq!(server.counters().placed_bytes, 50_000);
        assert_eq!(server.counters().opened_records, client.counters().sealed_records);
        // The session goes on.
        let wire = seal(&mut client, b"on");
        assert_eq!(open(&mut server, &wire), (b"on".to_vec(), Ok(())));
    }
}

#[test]
fn nothing_beyond_the_place_is_written() {
    let (mut client, mut server) = sessions(32);
    let to = list(40_000);
    let wire = seal(&mut client, &vec![0; RECORD_PLAIN_MAX]);
    let opened = server.open_to(&wire, &to, 10_000, RECORD_PLAIN_MAX).unwrap();
    assert_eq!(opened, (wire.len(), RECORD_PLAIN_MAX));
    let mut want = vec![0xFF; 40_000];
    want[10_000..][..RECORD_PLAIN_MAX].fill(0);
    assert!(bytes(&to, 40_000) == want);
}

#[test]
fn padding_messages_and_empty_records_are_left_to_open() {
    let (mut client, mut server) = sessions(32);
    let to = list(1000);
    let mut wire = Vec::new();
    client.seal_raw(b"padded\x17\0\0\0", &mut wire);
    client.update_key(true, &mut wire);
    client.seal_raw(b"\x17", &mut wire);
    wire.extend(seal(&mut client, b"placed"));
    client.close(&mut wire);
    let (mut at, mut plain) = (0, Vec::new());
    let mut placed = 0;
    while at < wire.len() {
        let (taken, count) = server.open_to(&wire[at..], &to, placed, 1000 - placed).unwrap();
        (at, placed) = (at + taken, placed + count);
        let len = server.first_len(&wire[at..]);
        let (more, result) = open(&mut server, &wire[at..at + len]);
        assert_eq!(result, Ok(()));
        plain.extend(more);
        at += len;
    }
    assert_eq!((plain.as_slice(), placed), (&b"padded"[..], 6));
    assert_eq!(bytes(&to, 6), b"placed");
    assert_eq!(server.counters().rx_key_updates, 1);
    assert!(server.is_peer_closed());
    assert_eq!(server.open_to(b"anything", &to, 0, 1000), Ok((0, 0)), "ignored");
}

#[test]
fn a_record_that_is_not_authentic_counts_for_nothing() {
    let flips = [0, 1, 3, 4, 5, 30, 5000, 16_388, 16_389, 16_400, 16_405];
    for at in flips {
        let (mut client, mut server) = sessions(32);
        let to = list(40_000);
        let mut wire = seal(&mut client, &vec![7; 40_000]);
        let second = RECORD_PLAIN_MAX + 22;
        wire[second + at] ^= 0x40;
        // The first alone, then the changed one.
        let (taken, placed) = server.open_to(&wire[..second], &to, 0, 40_000).unwrap();
        assert_eq!((taken, placed), (second, RECORD_PLAIN_MAX));
        let rest = &wire[taken..];
        let mut result = server.open_to(rest, &to, placed, 40_000 - placed);
        if result == Ok((0, 0)) {
            // A length that is wrong may look like one that does not fit, or is not there yet.
            let mut more = rest.to_vec();
            more.extend([0; 70_000]);
            result = server.open(&mut more, &mut |_| panic!("not authentic")).map(|()| (0, 0));
        }
        assert!(result.is_err(), "byte {at}");
        let error = result.unwrap_err();
        assert_eq!(server.open_to(rest, &to, placed, 100), Err(error), "no way back");
        assert_eq!(open(&mut server, rest), (vec![], Err(error)), "no way back");
        assert_eq!(server.counters().placed_bytes, placed as u64);
    }
}

#[test]
fn dropped_and_repeated_records_are_noticed() {
    for order in [[1, 2], [0, 0], [0, 2]] {
        let (mut client, mut server) = sessions(32);
        let to = list(4000);
        let records = [1, 2, 3].map(|n| seal(&mut client, &[n; 1000]));
        let wire = order.map(|n: usize| records[n].clone()).concat();
        assert_eq!(server.open_to(&wire, &to, 0, 4000), Err(RecordError::Forged), "{order:?}");
    }
}

/// Takes `wire` in pieces as a stream does, into `to` where it can be.
fn receive(
    server: &mut Session,
    wire: &mut [u8],
    to: &SgList,
    pieces: &[usize],
    windows: &[usize],
) {
    let (mut at, mut done) = (0, 0);
    let mut windows = windows.iter().cycle();
    for piece in pieces.iter().cycle() {
        if at == wire.len() {
            break;
        }
        let end = (at + piece).min(wire.len());
        let mut from = at;
        while from < end {
            let window = (*windows.next().unwrap()).min(to.len() - done);
            let (taken, placed) = server.open_to(&wire[from..end], to, done, window).unwrap();
            (from, done) = (from + taken, done + placed);
            let len = server.first_len(&wire[from..end]);
            let part = &mut wire[from..from + len];
            let mut copy = |plain: crate::tls::Plain<'_>| {
                to.copy_from_slice(done, plain.bytes()).unwrap();
                done += plain.bytes().len();
            };
            server.open(part, &mut copy).unwrap();
            from += len;
        }
        at = end;
    }
    assert_eq!(done, to.len());
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 48, ..Default::default()
    })]

    /// However the stream is cut and whatever there is room for, the same bytes are in the same places.
    #[test]
    fn any_split_and_any_room_give_the_same(
        sizes in proptest::collection::vec(1_usize..40_000, 1..6),
        pieces in proptest::collection::vec(1_usize..40_000, 1..40),
        windows in proptest::collection::vec(0_usize..40_000, 1..40),
        update in any::<bool>(),
    ) {
        let (mut client, mut server) = sessions(32);
        let (mut wire, mut want) = (Vec::new(), Vec::new());
        for (n, size) in sizes.iter().enumerate() {
            let data: Vec<u8> = (0..*size).map(|i| (i * 13 + n) as u8).collect();
            client.seal_slices(&[&data], &mut wire).unwrap();
            if update {
                client.update_key(n % 2 == 0, &mut wire);
            }
            want.extend(data);
        }
        let to = list(want.len());
        receive(&mut server, &mut wire, &to, &pieces, &windows);
        prop_assert!(bytes(&to, want.len()) == want);
    }
}
