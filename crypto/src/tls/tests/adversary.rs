//! What somebody between the two ends can do: no byte that the peer did not seal may come out.

use super::support::*;
use crate::psk::{Derivation, IdentityVersion};
use crate::tls::{Progress, RecordError};

/// Three records with 40, 50 and 60 bytes.
fn three(client: &mut crate::tls::Session) -> [Vec<u8>; 3] {
    [40, 50, 60].map(|len| seal(client, &vec![len; len.into()]))
}

#[test]
fn every_flipped_bit_of_a_record_is_noticed() {
    for at in 0..72 {
        for bit in 0..8 {
            let (mut client, mut server) = cached();
            let mut wire = seal(&mut client, &[5; 50]);
            let before = wire.len();
            wire[at] ^= 1 << bit;
            wire.extend(seal(&mut client, &[6; 50]));
            // A longer length waits for more bytes; give it some.
            wire.extend([0; 70_000]);
            let (plain, result) = open(&mut server, &wire);
            assert!(plain.is_empty() && result.is_err(), "byte {at} of {before}, bit {bit}");
        }
    }
}

/// Fresh sessions are what takes time in these tests; the bit flips make do with one handshake.
fn cached() -> (crate::tls::Session, crate::tls::Session) {
    use std::sync::OnceLock;

    use crate::tls::{Established, KeyUpdates, Session};
    static ENDS: OnceLock<(Established, Established)> = OnceLock::new();
    let (client, server) = ENDS.get_or_init(|| {
        let key = key(32, 0);
        let psk = psk(&key, IdentityVersion::V1, Derivation::Rfc8446);
        let ends = talk(client(&psk), server(&[key]), usize::MAX);
        (ends.client.ok().unwrap(), ends.server.ok().unwrap())
    });
    (Session::new(client, KeyUpdates::Auto), Session::new(server, KeyUpdates::Auto))
}

#[test]
fn dropped_repeated_and_reordered_records_are_noticed() {
    let orders: [&[usize]; 6] = [&[1], &[0, 2], &[0, 0], &[0, 1, 1], &[1, 0], &[0, 2, 1]];
    for order in orders {
        let (mut client, mut server) = cached();
        let records = three(&mut client);
        let wire: Vec<u8> = order.iter().flat_map(|n| records[*n].clone()).collect();
        let good: Vec<u8> = order
            .iter()
            .enumerate()
            .take_while(|(n, record)| n == *record)
            .flat_map(|(n, _)| vec![40 + 10 * n as u8; 40 + 10 * n])
            .collect();
        assert_eq!(open(&mut server, &wire), (good, Err(RecordError::Forged)), "{order:?}");
    }
}

#[test]
fn cut_records_are_held_back() {
    let (mut client, _) = cached();
    let wire = seal(&mut client, &[5; 50]);
    for len in 0..wire.len() {
        let (_, mut server) = cached();
        assert_eq!(open(&mut server, &wire[..len]), (vec![], Ok(())), "{len} bytes");
        assert!(!server.is_peer_closed(), "an end without close_notify is none");
    }
}

#[test]
fn records_of_the_other_direction_or_connection_are_noticed() {
    let (mut client, mut server) = cached();
    let own = seal(&mut server, b"mirror");
    assert_eq!(open(&mut server, &own), (vec![], Err(RecordError::Forged)));
    let (mut other, _) = sessions(32);
    let (_, mut server) = cached();
    let foreign = seal(&mut other, b"foreign");
    assert_eq!(open(&mut server, &foreign), (vec![], Err(RecordError::Forged)));
    drop(seal(&mut client, b"x"));
}

#[test]
fn plaintext_and_wrong_lengths_are_refused_by_the_header() {
    let cases: [(&[u8], RecordError); 9] = [
        (&[20, 3, 3, 0, 1, 1], RecordError::Plaintext(20)),
        (&[21, 3, 3, 0, 2, 1, 0], RecordError::Plaintext(21)),
        (&[22, 3, 3, 0, 5], RecordError::Plaintext(22)),
        (&[0, 0, 128, 0, 128], RecordError::Unexpected(0)),
        (&[24, 3, 3, 0, 64], RecordError::Unexpected(24)),
        (&[23, 3, 3, 0x41, 1], RecordError::Overflow),
        (&[23, 3, 3, 0xFF, 0xFF], RecordError::Overflow),
        (&[23, 3, 3, 0, 0], RecordError::Empty),
        (&[23, 3, 3, 0, 16], RecordError::Empty),
    ];
    for (wire, want) in cases {
        let (mut client, mut server) = cached();
        let good = seal(&mut client, b"good");
        let wire = [&good[..], wire].concat();
        // At once, and byte by byte.
        assert_eq!(open(&mut server, &wire), (b"good".to_vec(), Err(want)));
        let (_, mut server) = cached();
        let mut plain = Vec::new();
        let result = wire.iter().try_for_each(|byte| {
            let (bytes, result) = open(&mut server, &[*byte]);
            plain.extend(bytes);
            result
        });
        assert_eq!((plain.as_slice(), result), (&b"good"[..], Err(want)));
    }
}

/// A handshake whose bytes are changed anywhere ends without a session on the side that got them,
/// or on the other.
#[test]
fn every_changed_byte_of_the_handshake_is_noticed() {
    let key = key(32, 0);
    let psk = psk(&key, IdentityVersion::V0, Derivation::Rfc8446);
    let hello_len = client(&psk).take().len();
    // Each round is a handshake: every byte near the ends, some of the key shares between.
    let places = (0..hello_len).filter(|n| *n < 200 || n % 29 == 0 || *n + 200 > hello_len);
    let mut agreed = Vec::new();
    for at in places {
        let (mut host, mut target) = (client(&psk), server(std::slice::from_ref(&key)));
        let mut hello = host.take();
        if at >= hello.len() {
            continue;
        }
        hello[at] ^= 1;
        let Ok(progress) = target.feed(&hello) else { continue };
        assert_eq!(progress, Progress::Running);
        let Ok(Progress::Done) = host.feed(&target.take()) else { continue };
        if matches!(target.feed(&host.take()), Ok(Progress::Done)) {
            agreed.push(at);
        }
    }
    // Only what no party looks at and nothing protects: the version of the record, 5 bytes in all.
    assert!(agreed.iter().all(|at| *at < 5), "{agreed:?}");
}

#[test]
fn a_handshake_cut_anywhere_is_not_done() {
    let key = key(48, 0);
    let psk = psk(&key, IdentityVersion::V1, Derivation::Rfc8446);
    let (mut host, mut target) = (client(&psk), server(std::slice::from_ref(&key)));
    let hello = host.take();
    for byte in &hello[..hello.len() - 1] {
        assert_eq!(target.feed(&[*byte]).unwrap(), Progress::Running);
        assert!(target.take().is_empty(), "no answer to half a message");
    }
    assert_eq!(target.feed(&hello[hello.len() - 1..]).unwrap(), Progress::Running);
    let flight = target.take();
    for byte in &flight[..flight.len() - 1] {
        assert_eq!(host.feed(&[*byte]).unwrap(), Progress::Running);
    }
    assert_eq!(host.feed(&flight[flight.len() - 1..]).unwrap(), Progress::Done);
    let finished = host.take();
    for byte in &finished[..finished.len() - 1] {
        assert_eq!(target.feed(&[*byte]).unwrap(), Progress::Running);
    }
    assert!(target.finish().is_none(), "half a handshake is none");
}

/// Memory that half-open handshakes hold ends with them, and they do not touch each other.
#[test]
fn many_half_open_handshakes() {
    let key = key(32, 0);
    let psk = psk(&key, IdentityVersion::V0, Derivation::Rfc8446);
    let store = store(&[key]);
    let mut open: Vec<_> = (0..200)
        .map(|_| {
            let mut host = client(&psk);
            let mut target =
                crate::tls::Server::new(store.clone()).unwrap_or_else(|e| panic!("{e}"));
            target.feed(&host.take()).unwrap();
            (host, target)
        })
        .collect();
    for (host, target) in &mut open {
        assert_eq!(host.feed(&target.take()).unwrap(), Progress::Done);
        assert_eq!(target.feed(&host.take()).unwrap(), Progress::Done);
    }
}
