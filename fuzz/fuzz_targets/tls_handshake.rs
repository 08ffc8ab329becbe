//! What the other end of a TLS handshake sends, on either side.
//!
//! Invariants checked: no panic; a failed handshake stays failed and says little; one that changed
//! nothing succeeds; two ends that both say that they are done understand each other.
#![no_main]

use std::sync::{Arc, OnceLock};

use crypto::TlsKey;
use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey, Suite};
use crypto::tls::{Client, KeyUpdates, Progress, PskLookup, Server, Session, Unknown, candidates};
use libfuzzer_sys::fuzz_target;
use penstock_fuzz::{Input, cut};

const HOST: &str = "nqn.2014-08.org.example:host";
const SUB: &str = "nqn.2014-08.org.example:sub";

struct Store([TlsKey; 3]);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        if identity.hostnqn != HOST {
            return Err(Unknown::Host);
        }
        Ok(candidates(&self.0, identity))
    }
}

fn store() -> Arc<Store> {
    static STORE: OnceLock<Arc<Store>> = OnceLock::new();
    let make = |suite, fill| TlsKey::generate(suite, &[fill; 48]);
    STORE
        .get_or_init(|| {
            Arc::new(Store([
                make(Suite::Aes128GcmSha256, 1),
                make(Suite::Aes128GcmSha256, 2),
                make(Suite::Aes256GcmSha384, 3),
            ]))
        })
        .clone()
}

/// One direction: the bytes that one end sent, changed as the input says. Whether they were.
fn change(mut bytes: Vec<u8>, input: &mut Input<'_>) -> (Vec<u8>, bool) {
    let mut is_changed = false;
    for _ in 0..input.byte() % 4 {
        let at = usize::from(input.byte()) << 8 | usize::from(input.byte());
        let (what, value) = (input.byte(), input.byte());
        let Some(byte) = bytes.get_mut(at % 4096) else { continue };
        match what % 4 {
            0 => {
                bytes.truncate(at);
                is_changed = true;
            }
            1 => {
                bytes.insert(at % bytes.len(), value);
                is_changed = true;
            }
            _ => {
                is_changed |= value != 0;
                *byte ^= value;
            }
        }
    }
    (bytes, is_changed)
}

macro_rules! feed {
    ($end:expr, $bytes:expr, $seed:expr) => {{
        let mut result = Ok(Progress::Running);
        cut($bytes, $seed, 2000, |piece| {
            result = $end.feed(piece);
            result.is_ok()
        });
        if let Err(failure) = &result {
            assert!(!failure.to_string().contains('\n'), "{failure:?}");
            assert!($end.feed(b"more").is_err(), "it stays failed");
            assert!($end.take().len() <= 16 << 10);
        }
        result.ok()
    }};
}

fn both(mut input: Input<'_>) {
    let (pick, how, seed) = (input.byte(), input.byte(), u64::from(input.byte()));
    let key = &store().0[usize::from(pick % 3)];
    let way = Derivation::ALL[usize::from(how & 1)];
    let version = if how & 2 == 0 { IdentityVersion::V0 } else { IdentityVersion::V1 };
    let retained = RetainedKey::new(key, HOST, way).expect("a name");
    let psk = retained.psk(version, HOST, SUB).expect("names");
    let mut client = Client::new(&psk).expect("a key");
    let mut server = Server::new(store()).expect("settings");

    let (hello, is_hello_changed) = change(client.take(), &mut input);
    if feed!(server, &hello, seed).is_none() {
        assert!(is_hello_changed, "a good hello is accepted");
        return;
    }
    let (flight, is_flight_changed) = change(server.take(), &mut input);
    if feed!(client, &flight, seed + 1) != Some(Progress::Done) {
        assert!(is_hello_changed || is_flight_changed, "a good answer is accepted");
        return;
    }
    let (finished, is_finished_changed) = change(client.take(), &mut input);
    if feed!(server, &finished, seed + 2) != Some(Progress::Done) {
        assert!(is_hello_changed || is_flight_changed || is_finished_changed, "a good end");
        return;
    }
    let (client, server) = (client.finish().expect("done"), server.finish().expect("done"));
    assert_eq!(server.identity, psk.identity());
    assert_eq!((client.suite, server.suite), (psk.suite(), psk.suite()));
    // What was put behind the last message is for the record layer, and not meant here.
    let mut target = Session::new(&server, KeyUpdates::Auto);
    let mut host = Session::new(&client, KeyUpdates::Auto);
    let mut wire = Vec::new();
    host.seal_slices(&[b"agreed"], &mut wire).expect("a new key");
    let mut plain = Vec::new();
    target.open(&mut wire, &mut |p| plain.extend_from_slice(p.bytes())).expect("the same keys");
    assert_eq!(plain, b"agreed");
}

/// Any bytes as handshake records, or as they are.
fn junk(mut input: Input<'_>) {
    let (how, seed) = (input.byte(), u64::from(input.byte()));
    let mut bytes = Vec::new();
    if how & 1 == 0 {
        bytes.extend([22, 3, 1]);
        bytes.extend((input.0.len() as u16).to_be_bytes());
    }
    bytes.extend_from_slice(input.0);
    if how & 2 == 0 {
        let mut server = Server::new(store()).expect("settings");
        assert_ne!(feed!(server, &bytes, seed), Some(Progress::Done));
    } else {
        let retained = RetainedKey::new(&store().0[0], HOST, Derivation::Rfc8446).expect("a name");
        let psk = retained.psk(IdentityVersion::V0, HOST, SUB).expect("names");
        let mut client = Client::new(&psk).expect("a key");
        assert_ne!(feed!(client, &bytes, seed), Some(Progress::Done));
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => junk(input),
        _ => both(input),
    }
});
