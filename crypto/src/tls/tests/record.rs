use iobuf::{Gather, Pool, SgList};
use proptest::prelude::*;

use super::support::*;
use crate::tls::{AlertCode, KeyUpdates, Plain, RECORD_PLAIN_MAX, RecordError, Session};

#[test]
fn both_directions_and_both_suites() {
    for len in [32, 48] {
        let (mut client, mut server) = sessions(len);
        for size in [1, 72, 4096, RECORD_PLAIN_MAX, RECORD_PLAIN_MAX + 1, 300_000] {
            let data: Vec<u8> = (0..size).map(|n| (n * 7) as u8).collect();
            let wire = seal(&mut client, &data);
            assert_eq!(wire.len(), size + size.div_ceil(RECORD_PLAIN_MAX) * 22);
            assert!(wire.len() <= Session::sealed_len_max(size));
            assert_eq!(open(&mut server, &wire), (data.clone(), Ok(())));
            let wire = seal(&mut server, &data);
            assert_eq!(open(&mut client, &wire), (data, Ok(())));
        }
        assert_eq!(client.counters().sealed_bytes, server.counters().opened_bytes);
        assert_eq!(client.counters().sealed_records, server.counters().opened_records);
        assert_eq!(server.counters().copied_bytes, 0, "whole records are opened in place");
    }
}

#[test]
fn the_two_ways_to_seal_agree() {
    let (mut a, _) = sessions(32);
    // The same keys, so that the records have to be the same too.
    let key = key(32, 0);
    let psk = psk(&key, crate::psk::IdentityVersion::V1, crate::psk::Derivation::Rfc8446);
    let ends = talk(client(&psk), server(&[key]), usize::MAX);
    let done = ends.client.ok().unwrap();
    let mut peer = Session::new(&ends.server.ok().unwrap(), KeyUpdates::Never);
    let data: Vec<u8> = (0..40_000_u32).map(|n| ((n * 31) >> 3) as u8).collect();
    let mut wires = Vec::new();
    for cuts in [vec![40_000], vec![16, 20_000, 40_000], vec![0, 16_384, 16_384, 16_385, 40_000]] {
        let mut session = Session::new(&done, KeyUpdates::Never);
        let mut parts = Vec::new();
        let mut from = 0;
        for to in cuts {
            parts.push(&data[from..to]);
            from = to;
        }
        let mut wire = Vec::new();
        session.seal_slices(&parts, &mut wire).unwrap();
        wires.push(wire);
    }
    let mut session = Session::new(&done, KeyUpdates::Never);
    let mut wire = Vec::new();
    let pool = Pool::new(1 << 20).unwrap();
    let mut list = SgList::default();
    pool.alloc(data.len(), &mut list).unwrap();
    list.copy_from_slice(0, &data).unwrap();
    session.seal(&Gather::of_list(&list), &mut wire).unwrap();
    assert!(wires.iter().all(|other| *other == wire));
    assert_eq!(open(&mut peer, &wire), (data, Ok(())));
    // Another connection with the same key has other keys.
    assert!(seal(&mut a, b"x") != seal(&mut session, b"x"));
}

#[test]
fn nothing_is_nothing() {
    let (mut client, mut server) = sessions(32);
    assert!(seal(&mut client, &[]).is_empty());
    assert_eq!(open(&mut server, &[]), (vec![], Ok(())));
}

#[test]
fn keys_are_updated_on_request_and_answered() {
    let (mut client, mut server) = sessions(48);
    let mut wire = Vec::new();
    client.update_key(true, &mut wire);
    wire.extend(seal(&mut client, b"under the new key"));
    assert_eq!(open(&mut server, &wire).0, b"under the new key");
    assert_eq!((server.counters().rx_key_updates, server.counters().tx_key_updates), (1, 0));
    // The answer goes before the next data, and asks for nothing.
    let wire = seal(&mut server, b"answer");
    assert_eq!(server.counters().tx_key_updates, 1);
    assert_eq!(open(&mut client, &wire), (b"answer".to_vec(), Ok(())));
    let wire = seal(&mut client, b"on");
    assert_eq!(client.counters().tx_key_updates, 1);
    assert_eq!(open(&mut server, &wire), (b"on".to_vec(), Ok(())));
}

#[test]
fn the_limit_of_the_key_is_honoured() {
    let (mut near, mut far) = sessions(32);
    near.tx_records_for_test(1 << 23);
    far.rx_records_for_test(1 << 23);
    let wire = seal(&mut near, b"data");
    assert_eq!(near.counters().tx_key_updates, 1);
    assert_eq!(open(&mut far, &wire), (b"data".to_vec(), Ok(())));

    let key = key(32, 0);
    let psk = psk(&key, crate::psk::IdentityVersion::V1, crate::psk::Derivation::Rfc8446);
    let ends = talk(client(&psk), server(&[key]), usize::MAX);
    let mut host = Session::new(&ends.client.ok().unwrap(), KeyUpdates::Never);
    let mut target = Session::new(&ends.server.ok().unwrap(), KeyUpdates::Never);
    host.tx_records_for_test((1 << 24) - 3);
    target.rx_records_for_test((1 << 24) - 3);
    assert_eq!(host.key_records_left(), 1);
    let wire = seal(&mut host, b"last");
    assert_eq!(open(&mut target, &wire), (b"last".to_vec(), Ok(())));
    assert_eq!(host.key_records_left(), 0);
    let mut out = Vec::new();
    assert_eq!(host.seal_slices(&[b"more"], &mut out), Err(RecordError::KeyWornOut));
    assert!(out.is_empty());
    host.farewell(RecordError::KeyWornOut, &mut out);
    assert_eq!(open(&mut target, &out), (vec![], Ok(())));
    assert!(target.is_peer_closed());
}

/// So a target that takes no new keys by itself, since Linux hosts cannot follow, goes on for ever with
/// a host of ours.
#[test]
fn a_peer_that_takes_no_new_key_is_asked_for_one_in_time() {
    let key = key(32, 0);
    let psk = psk(&key, crate::psk::IdentityVersion::V1, crate::psk::Derivation::Rfc8446);
    let ends = talk(client(&psk), server(&[key]), usize::MAX);
    let mut host = Session::new(&ends.client.ok().unwrap(), KeyUpdates::Auto);
    let mut target = Session::new(&ends.server.ok().unwrap(), KeyUpdates::Never);
    let mut updates = 0;
    for worn in [(3 << 22) - 100, 3 << 22, (1 << 24) - 3] {
        target.tx_records_for_test(worn);
        host.rx_records_for_test(worn);
        updates += u64::from(worn >= 3 << 22);
        for _ in 0..3 {
            // Commands one way, much data the other; and now and then none has come yet.
            let commands = [seal(&mut host, b"read"), seal(&mut host, b"and read")].concat();
            assert_eq!(host.counters().tx_key_updates, updates, "it asks once");
            assert_eq!(open(&mut target, &commands), (b"readand read".to_vec(), Ok(())));
            let data = seal(&mut target, &[7; 3 << 14]);
            assert_eq!(target.counters().tx_key_updates, updates);
            assert_eq!(open(&mut host, &data), (vec![7; 3 << 14], Ok(())));
        }
    }
}

/// What was sealed and is not sent would leave the peer with an alert that it cannot open.
#[test]
fn nothing_is_sealed_of_what_the_key_does_not_suffice_for() {
    let key = key(32, 0);
    let psk = psk(&key, crate::psk::IdentityVersion::V1, crate::psk::Derivation::Rfc8446);
    let ends = talk(client(&psk), server(&[key]), usize::MAX);
    let mut host = Session::new(&ends.client.ok().unwrap(), KeyUpdates::Never);
    let mut target = Session::new(&ends.server.ok().unwrap(), KeyUpdates::Never);
    host.tx_records_for_test((1 << 24) - 4);
    target.rx_records_for_test((1 << 24) - 4);
    let mut out = Vec::new();
    assert_eq!(host.seal_slices(&[&[7; 3 << 14]], &mut out), Err(RecordError::KeyWornOut));
    host.farewell(RecordError::KeyWornOut, &mut out);
    assert_eq!(open(&mut target, &out), (vec![], Ok(())));
    assert!(target.is_peer_closed());
}

#[test]
fn small_records_wear_a_key_by_their_blocks() {
    let (mut near, _far) = sessions(32);
    let fresh = near.key_records_left();
    // 4 KiB are 256 blocks, one more for the inner type and one for the tag: four such records are
    // a little more than a full one, which has 1,026.
    for (records, worn) in [(1, 1), (3, 2), (4, 3)] {
        for _ in 0..records {
            seal(&mut near, &[7; 4096]);
        }
        assert_eq!(fresh - near.key_records_left(), worn, "after {records} more");
    }
    seal(&mut near, &[7; 1 << 14]);
    assert_eq!(fresh - near.key_records_left(), 4);
}

#[test]
fn the_end_is_orderly_and_told_once() {
    let (mut client, mut server) = sessions(32);
    let mut wire = seal(&mut client, b"last");
    client.close(&mut wire);
    let len = wire.len();
    client.close(&mut wire);
    client.farewell(RecordError::Forged, &mut wire);
    assert_eq!(wire.len(), len, "one end");
    assert_eq!(client.seal_slices(&[b"x"], &mut wire), Err(RecordError::Closed));
    wire.extend_from_slice(b"anything at all");
    assert_eq!(open(&mut server, &wire), (b"last".to_vec(), Ok(())));
    assert!(server.is_peer_closed());
    assert_eq!(open(&mut server, b"and more of it"), (vec![], Ok(())));
    // The other direction is still open.
    let wire = seal(&mut server, b"bye");
    assert_eq!(open(&mut client, &wire), (b"bye".to_vec(), Ok(())));

    let mut wire = Vec::new();
    server.farewell(RecordError::Forged, &mut wire);
    let result = open(&mut client, &wire).1;
    assert_eq!(result, Err(RecordError::Alert(AlertCode::BAD_RECORD_MAC)));
}

#[test]
fn tickets_are_skipped_by_the_client_only() {
    let ticket = [&[4, 0, 0, 200][..], &[1; 200]].concat();
    let (mut client, mut server) = sessions(32);
    let mut wire = Vec::new();
    // Two in one record, one in three records with a cut in its head.
    server.control_for_test(22, &ticket.repeat(2), &mut wire);
    server.control_for_test(22, &ticket[..2], &mut wire);
    server.control_for_test(22, &ticket[2..100], &mut wire);
    server.control_for_test(22, &ticket[100..], &mut wire);
    wire.extend(seal(&mut server, b"data"));
    assert_eq!(open(&mut client, &wire), (b"data".to_vec(), Ok(())));
    assert_eq!(client.counters().tickets, 3);

    let mut wire = Vec::new();
    client.control_for_test(22, &ticket, &mut wire);
    assert_eq!(open(&mut server, &wire).1, Err(RecordError::Unexpected(4)));
}

#[test]
fn padding_is_taken_off() {
    let (mut client, mut server) = sessions(32);
    let mut wire = Vec::new();
    client.seal_raw(b"data\x17\0\0\0\0", &mut wire);
    assert_eq!(open(&mut server, &wire), (b"data".to_vec(), Ok(())));
}

/// Records that only the peer itself could have made, and must not.
#[test]
fn misbehaviour_inside_the_encryption() {
    use RecordError::{Alert, Empty, Idle, Malformed, Overflow, Unexpected};

    let long = [&vec![1; RECORD_PLAIN_MAX + 1][..], &[23]].concat();
    let cases: [(&[&[u8]], RecordError); 13] = [
        (&[&[0; 40]], Empty),
        (&[&[0]], Empty),
        (&[&long], Overflow),
        (&[b"x\x14"], Unexpected(20)),
        (&[b"x\x63"], Unexpected(99)),
        (&[b"\x16"], Malformed(22)),
        (&[b"\x02\x15"], Malformed(21)),
        (&[b"\x02\x14\x15"], Alert(AlertCode::BAD_RECORD_MAC)),
        (&[b"\x18\0\0\x02\0\0\x16"], Malformed(24)),
        (&[b"\x18\0\0\x01\x02\x16"], Malformed(24)),
        (&[b"\x18\0\0\x01\0\x18\x16"], Malformed(24)),
        (&[b"\x0D\0\0\0\x16"], Unexpected(13)),
        (&[b"\x18\0\0\x16", b"data\x17"], Unexpected(23)),
    ];
    for (records, want) in cases {
        let (mut client, mut server) = sessions(32);
        let mut wire = Vec::new();
        for record in records {
            client.seal_raw(record, &mut wire);
        }
        let (plain, result) = open(&mut server, &wire);
        assert!(plain.is_empty());
        assert_eq!(result, Err(want));
        let again = seal(&mut client, b"x");
        assert_eq!(open(&mut server, &again), (vec![], Err(want)), "no way back");
    }
    // Records without end and without data.
    let (mut client, mut server) = sessions(32);
    let mut wire = Vec::new();
    for _ in 0..33 {
        client.seal_raw(b"\x17", &mut wire);
    }
    assert_eq!(open(&mut server, &wire).1, Err(Idle));
    let (mut client, mut server) = sessions(32);
    for _ in 0..40 {
        let mut wire = Vec::new();
        client.update_key(false, &mut wire);
        wire.extend(seal(&mut client, b"x"));
        assert_eq!(open(&mut server, &wire), (b"x".to_vec(), Ok(())), "data in between");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 48, ..Default::default()
    })]

    /// However the stream is cut, the same bytes come out, each once.
    #[test]
    fn any_split_gives_the_same(
        sizes in proptest::collection::vec(1_usize..40_000, 1..6),
        pieces in proptest::collection::vec(1_usize..20_000, 1..40),
        update in any::<bool>(),
    ) {
        let (mut client, mut server) = sessions(32);
        let mut wire = Vec::new();
        let mut want = Vec::new();
        for (n, size) in sizes.iter().enumerate() {
            let data: Vec<u8> = (0..*size).map(|i| (i * 13 + n) as u8).collect();
            client.seal_slices(&[&data], &mut wire).unwrap();
            if update {
                client.update_key(n % 2 == 0, &mut wire);
            }
            want.extend(data);
        }
        let mut got = Vec::new();
        let mut at = 0;
        for piece in pieces.iter().cycle() {
            if at == wire.len() {
                break;
            }
            let end = (at + piece).min(wire.len());
            let mut last = 0;
            server.open(&mut wire[at..end], &mut |plain| {
                if let Plain::InPlace(range, bytes) = &plain {
                    assert!(range.start >= last && range.end <= end - at);
                    assert_eq!(range.len(), bytes.len());
                    last = range.end;
                }
                got.extend_from_slice(plain.bytes());
            }).unwrap();
            at = end;
        }
        prop_assert!(got == want);
    }
}
