//! Records after the handshake: changed on the way, or made by a peer that has the keys and
//! misbehaves.
//!
//! Invariants checked: no panic; what comes out is a beginning of what was put in; all of it comes
//! out if nothing was changed; cutting the stream elsewhere, or opening into place, changes nothing.
#![no_main]

use std::sync::{Arc, OnceLock};

use crypto::TlsKey;
use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey, Suite};
use crypto::tls::{
    Client, Established, KeyUpdates, Progress, PskLookup, RecordError, Server, Session, Unknown,
    candidates,
};
use iobuf::{Pool, SgList};
use libfuzzer_sys::fuzz_target;
use penstock_fuzz::{Input, cut};

const HOST: &str = "nqn.2014-08.org.example:host";
const SUB: &str = "nqn.2014-08.org.example:sub";
const WIRE_MAX: usize = 256 << 10;

struct Store(TlsKey);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        Ok(candidates([&self.0], identity))
    }
}

/// Both ends of one handshake, from which all sessions are made.
fn ends() -> &'static (Established, Established) {
    static ENDS: OnceLock<(Established, Established)> = OnceLock::new();
    ENDS.get_or_init(|| {
        let key = TlsKey::generate(Suite::Aes128GcmSha256, &[1; 48]);
        let retained = RetainedKey::new(&key, HOST, Derivation::Rfc8446).expect("a name");
        let psk = retained.psk(IdentityVersion::V1, HOST, SUB).expect("names");
        let mut client = Client::new(&psk).expect("a key");
        let mut server = Server::new(Arc::new(Store(key))).expect("settings");
        server.feed(&client.take()).expect("a good hello");
        assert_eq!(client.feed(&server.take()).expect("a good answer"), Progress::Done);
        assert_eq!(server.feed(&client.take()).expect("a good end"), Progress::Done);
        (client.finish().expect("done"), server.finish().expect("done"))
    })
}

/// What a receiver made of `wire`, given in pieces of up to `piece` bytes.
fn open(
    session: &mut Session,
    wire: &[u8],
    seed: u64,
    piece: usize,
) -> (Vec<u8>, Result<(), RecordError>) {
    let (mut plain, mut result) = (Vec::new(), Ok(()));
    cut(wire, seed, piece, |piece| {
        let mut last = 0;
        result = session.open(&mut piece.to_vec(), &mut |p| {
            if let crypto::tls::Plain::InPlace(range, _) = &p {
                assert!(range.start >= last && range.end <= piece.len(), "in place and in order");
                last = range.end;
            }
            plain.extend_from_slice(p.bytes());
        });
        result.is_ok()
    });
    (plain, result)
}

/// The same by a receiver that has what comes opened into place wherever it fits. What was opened in a
/// call that failed is not in it.
fn open_to(session: &mut Session, wire: &[u8], seed: u64) -> (Vec<u8>, Result<(), RecordError>) {
    const ROOM: usize = 20_000;

    let pool = Pool::new(1 << 20).expect("memory");
    let mut place = SgList::default();
    pool.alloc(ROOM, &mut place).expect("a new pool");
    let (mut plain, mut result) = (Vec::new(), Ok(()));
    cut(wire, seed, 3000, |piece| {
        let mut piece = piece.to_vec();
        let mut rest = &mut piece[..];
        while !rest.is_empty() && result.is_ok() {
            // Now all of it, now little or nothing.
            let room = ROOM >> ((plain.len() + seed as usize) % 17);
            match session.open_to(rest, &place, ROOM - room, room) {
                Err(error) => result = Err(error),
                Ok((taken, placed)) => {
                    let mut bytes = vec![0; placed];
                    place.copy_to_slice(ROOM - room, &mut bytes).expect("inside");
                    plain.extend(bytes);
                    let len = session.first_len(&rest[taken..]);
                    let part = &mut rest[taken..taken + len];
                    result = session.open(part, &mut |p| plain.extend_from_slice(p.bytes()));
                    rest = &mut rest[taken + len..];
                }
            }
        }
        result.is_ok()
    });
    (plain, result)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (seed, to_client) = (u64::from(input.byte()), input.byte() & 1 == 1);
    let (client, server) = ends();
    let (from, to) = if to_client { (server, client) } else { (client, server) };
    let mut sender = Session::new(from, KeyUpdates::Auto);
    let (mut wire, mut sealed) = (Vec::new(), Vec::new());
    let (mut is_changed, mut is_own) = (false, true);
    while !input.is_empty() && wire.len() < WIRE_MAX {
        let before = wire.len();
        match input.byte() % 12 {
            0..4 => {
                let len = usize::from(input.byte()) * usize::from(input.byte() % 80);
                let data = vec![input.byte(); len];
                if sender.seal_slices(&[&data], &mut wire).is_ok() {
                    sealed.extend(data);
                }
            }
            4 => sender.update_key(input.byte() & 1 == 1, &mut wire),
            5 => sender.close(&mut wire),
            6..9 => {
                // Content, type and padding of any kind, under the right keys.
                let len = usize::from(input.byte() % 32);
                let inner = input.take(len);
                if !inner.is_empty() {
                    sender.seal_raw(inner, &mut wire);
                    is_own = false;
                }
            }
            9 => {
                let at = usize::from(input.byte()) << 8 | usize::from(input.byte());
                let value = input.byte();
                let len = wire.len();
                if len > 0 {
                    wire[at % len] ^= value;
                    is_changed |= value != 0;
                }
            }
            10 => {
                // Bytes of anybody.
                let len = usize::from(input.byte() % 16);
                wire.extend_from_slice(input.take(len));
                is_changed |= wire.len() > before;
            }
            _ => {
                wire.truncate(before.saturating_sub(usize::from(input.byte())));
                is_changed |= wire.len() < before;
            }
        }
    }
    let mut whole = Session::new(to, KeyUpdates::Auto);
    let (plain, result) = open(&mut whole, &wire, seed, usize::MAX >> 1);
    let mut pieces = Session::new(to, KeyUpdates::Auto);
    let (plain_pieces, result_pieces) = open(&mut pieces, &wire, seed, 50);
    assert_eq!((&plain, result), (&plain_pieces, result_pieces), "the cut changes nothing");
    let mut placing = Session::new(to, KeyUpdates::Auto);
    let (plain_placed, result_placed) = open_to(&mut placing, &wire, seed);
    assert_eq!(result, result_placed, "the place changes nothing");
    assert!(plain.starts_with(&plain_placed), "nothing but what comes out otherwise");
    assert!(result.is_err() || plain == plain_placed, "all of it");
    if is_own {
        assert!(sealed.starts_with(&plain), "nothing but what was sealed");
        if !is_changed && result.is_ok() {
            assert!(plain == sealed, "all of it");
        }
        // Many changes of keys without data in between are too much; else all is well.
        assert!(is_changed || matches!(result, Ok(()) | Err(RecordError::Idle)));
    }
    // The answer to what was asked for, or the alert that tells why not.
    let mut answer = Vec::new();
    match result {
        Ok(()) => whole.seal_slices(&[b"answer"], &mut answer).expect("a new key"),
        Err(error) => whole.farewell(error, &mut answer),
    }
    let (plain, heard) = open(&mut sender, &answer, seed, 20);
    match result {
        Ok(()) => assert_eq!((plain.as_slice(), heard), (&b"answer"[..], Ok(()))),
        Err(_) => assert!(plain.is_empty() && matches!(heard, Ok(()) | Err(RecordError::Alert(_)))),
    }
});
