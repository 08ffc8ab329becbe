//! Connections with TLS: who gets in, who does not and what is said of it.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crypto::psk::{Derivation, IdentityVersion, Psk, RetainedKey};
use crypto::{KeyHash, TlsKey};
use nvme::spec::{AdminOpcode, NvmOpcode, Sqe, Status};
use nvmf_target::{HostKeys, HostTlsKey, KeyStore, TargetConfig, Tls};
use reactor::net::{Rx, Stream, StreamConfig};
use reactor::{Core, Progress, Socket, Task};

use crate::host::{DEPTH, Data};
use crate::rig::{BLOCK, Rig, SUBNQN, hostnqn, pattern, rw, write};

pub(crate) fn key(n: u8, len: usize) -> TlsKey {
    TlsKey::new(KeyHash::Sha256, &vec![n; len]).expect("a key")
}

pub(crate) fn entry(key: TlsKey) -> HostTlsKey {
    HostTlsKey { key, subnqn: None, expires: None }
}

pub(crate) fn tls_keys(tls: Vec<HostTlsKey>) -> HostKeys {
    HostKeys { tls, ..HostKeys::default() }
}

fn psk(key: &TlsKey, host: u8, version: IdentityVersion, way: Derivation) -> Psk {
    let retained = RetainedKey::new(key, &hostnqn(host), way).expect("a name");
    retained.psk(version, &hostnqn(host), SUBNQN).expect("short names")
}

pub(crate) fn usual(key: &TlsKey, host: u8) -> Psk {
    psk(key, host, IdentityVersion::V1, Derivation::Rfc8446)
}

/// A rig whose port speaks TLS, and its keys: host 1 has key 1, of 32 bytes.
pub(crate) fn rig(tls: Tls) -> (Rig, Arc<KeyStore>) {
    let keys = Arc::new(KeyStore::with_clock(|| 1_000));
    keys.set(&hostnqn(1), tls_keys(vec![entry(key(1, 32))]));
    let store = Arc::clone(&keys);
    let mut rig = Rig::with(1, move |config: &mut TargetConfig| {
        config.ports[0].tls = tls;
        config.keys = store;
    });
    rig.psk = Some(usual(&key(1, 32), 1));
    (rig, keys)
}

/// Connects as host 1, which has to fail; what both ends say of it.
#[track_caller]
fn refused(rig: &mut Rig) -> (Option<String>, String) {
    let before = rig.target.status().refusals_total;
    let queue = rig.connection();
    rig.until("the end of the connection", || queue.is_over());
    let status = rig.target.status();
    assert_eq!(status.refusals_total, before + 1);
    (queue.refused(), status.refusals.last().expect("one").why.clone())
}

#[test]
fn every_kind_of_identity_is_taken_and_io_is_right() {
    let (mut rig, keys) = rig(Tls::Required);
    for len in [32, 48] {
        let key = key(len as u8, len);
        keys.set(&hostnqn(1), tls_keys(vec![entry(key.clone())]));
        for version in [IdentityVersion::V0, IdentityVersion::V1] {
            for way in Derivation::ALL {
                rig.psk = Some(psk(&key, 1, version, way));
                let host = rig.host(1, 1);
                let text: Vec<u8> = (0..32 * BLOCK).map(|n| (n * 7 + len) as u8).collect();
                rig.write(&host.io[0], 5, &text);
                assert!(rig.read(&host.io[0], 5, text.len()) == text, "bytes differ");
                let status = rig.target.status();
                let tls = status.controllers.last().and_then(|c| c.tls.clone());
                let suite =
                    if len == 32 { "TLS_AES_128_GCM_SHA256" } else { "TLS_AES_256_GCM_SHA384" };
                assert!(tls.expect("encrypted").starts_with(suite));
                host.admin.cut();
                rig.until("the end", || host.io[0].is_over());
            }
        }
    }
    assert_eq!(rig.target.status().refusals_total, 0);
}

#[test]
fn the_wrong_key_is_refused_and_explained() {
    let (mut rig, keys) = rig(Tls::Required);
    // Version 0 identities of two keys are equal: only the proof tells.
    rig.psk = Some(psk(&key(2, 32), 1, IdentityVersion::V0, Derivation::Rfc8446));
    let (host, why) = refused(&mut rig);
    assert!(host.is_some_and(|text| text.contains("decrypt_error")), "the right alert");
    assert!(why.contains("RFC 8446, libnvme < 1.16") && why.contains("NVMe0R01"), "{why}");

    rig.psk = Some(usual(&key(2, 32), 1));
    let (host, why) = refused(&mut rig);
    assert!(host.is_some_and(|text| text.contains("unknown_psk_identity")));
    assert!(why.contains("expected `NVMe1R01"), "{why}");

    rig.psk = Some(usual(&key(1, 32), 9));
    let (host, why) = refused(&mut rig);
    assert!(host.is_some_and(|text| text.contains("unknown_psk_identity")));
    assert!(why.contains("not registered"), "{why}");

    let expired = HostTlsKey { expires: Some(999), ..entry(key(1, 32)) };
    keys.set(&hostnqn(1), tls_keys(vec![expired]));
    rig.psk = Some(usual(&key(1, 32), 1));
    assert!(refused(&mut rig).1.contains("expired"));

    keys.set(&hostnqn(1), tls_keys(vec![entry(key(1, 32))]));
    rig.host(1, 1);
}

#[test]
fn a_listener_takes_what_it_says() {
    let (mut rig, _keys) = rig(Tls::Required);
    rig.psk = None;
    assert!(refused(&mut rig).1.contains("does not speak TLS"));

    let (mut rig, _keys) = self::rig(Tls::Allowed);
    let secure = rig.host(1, 1);
    rig.psk = None;
    let plain = rig.host(2, 1);
    for (host, n) in [(&secure, 1), (&plain, 2)] {
        rig.write(&host.io[0], n, &[n as u8; BLOCK]);
        assert_eq!(rig.read(&host.io[0], n, BLOCK), [n as u8; BLOCK]);
    }
    let status = rig.target.status();
    let tls: Vec<bool> = status.controllers.iter().map(|c| c.tls.is_some()).collect();
    assert_eq!(tls, [true, false]);

    // A host that wants TLS where there is none.
    let (mut rig, _keys) = self::rig(Tls::Off);
    assert!(refused(&mut rig).1.contains("this listener does not (tls=off)"));
}

#[test]
fn a_host_is_who_its_key_says() {
    let (mut rig, _keys) = rig(Tls::Required);
    let (_, done) = rig.connect(2, SUBNQN, 0, 0xffff);
    assert_eq!(done.cqe.status(), Status::CONNECT_INVALID_HOST.dnr());
    let (_, done) = rig.connect(1, nvme::spec::DISCOVERY_NQN, 0, 0xffff);
    assert_eq!(done.cqe.status(), Status::CONNECT_INVALID_HOST.dnr());
    let status = rig.target.status();
    assert_eq!(status.refusals_total, 2);
    assert!(status.refusals[0].why.contains(&hostnqn(1)), "{}", status.refusals[0].why);
}

/// Somebody who knows the names must not add a queue of his own.
#[test]
fn a_plain_queue_does_not_join_an_encrypted_controller() {
    let (mut rig, _keys) = rig(Tls::Allowed);
    let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
    let cntlid = done.cqe.dw0() as u16;
    rig.enable(&admin);
    let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
    sqe.cdw10.set(7);
    assert!(rig.command(&admin, sqe, Data::None).cqe.status().is_success());
    let psk = rig.psk.take();
    let (_, done) = rig.connect(1, SUBNQN, 1, cntlid);
    assert!(!done.cqe.status().is_success());
    rig.psk = psk;
    let (_, done) = rig.connect(1, SUBNQN, 1, cntlid);
    assert!(done.cqe.status().is_success());
}

#[test]
fn a_key_is_rotated_while_io_goes_on() {
    let (mut rig, keys) = rig(Tls::Required);
    let old = rig.host(1, 1);
    let reads = |rig: &mut Rig, n: u64| {
        rig.write(&old.io[0], n, &[n as u8; BLOCK]);
        assert_eq!(rig.read(&old.io[0], n, BLOCK), [n as u8; BLOCK]);
    };
    reads(&mut rig, 1);
    keys.set(&hostnqn(1), tls_keys(vec![entry(key(1, 32)), entry(key(2, 32))]));
    reads(&mut rig, 2);
    rig.psk = Some(usual(&key(2, 32), 1));
    rig.host(1, 1);
    rig.psk = Some(usual(&key(1, 32), 1));
    rig.host(1, 1);
    keys.set(&hostnqn(1), tls_keys(vec![entry(key(2, 32))]));
    reads(&mut rig, 3);
    refused(&mut rig);
    reads(&mut rig, 4);
}

/// A connection that sends what it is told to and says what came back.
#[derive(Clone, Default)]
struct Raw(Rc<RefCell<RawState>>);

#[derive(Default)]
struct RawState {
    received: Vec<u8>,
    is_over: bool,
}

struct RawTask {
    stream: Stream,
    to_send: Vec<u8>,
    raw: Raw,
}

impl Raw {
    fn open(core: &mut Core, socket: Socket, to_send: Vec<u8>) -> Raw {
        let stream = Stream::new(&core.local(), socket, StreamConfig::default()).expect("a stream");
        let raw = Raw::default();
        core.spawn(Box::new(RawTask { stream, to_send, raw: raw.clone() }));
        raw
    }

    fn is_over(&self) -> bool {
        self.0.borrow().is_over
    }
}

impl Task for RawTask {
    fn poll(&mut self, _now: Duration) -> Progress {
        for part in std::mem::take(&mut self.to_send).chunks(100) {
            self.stream.push(part, None, None, None).expect("room");
        }
        self.stream.flush();
        self.stream.poll();
        let mut raw = self.raw.0.borrow_mut();
        loop {
            match self.stream.recv() {
                Rx::Data(chunk) => raw.received.extend_from_slice(&chunk),
                Rx::Empty => return Progress::Idle,
                Rx::Eof | Rx::Failed(_) => {
                    raw.is_over = true;
                    self.stream.shutdown();
                    return Progress::Done;
                }
            }
        }
    }
}

/// A first flight as it goes over the wire.
fn client_hello() -> Vec<u8> {
    crypto::tls::Client::new(&usual(&key(1, 32), 1)).expect("a sound key").take()
}

/// Strangers that repeat what they have heard: whole, but nothing follows.
#[test]
fn repeated_first_flights_end_and_others_go_on() {
    let (mut rig, _keys) = rig(Tls::Required);
    let host = rig.host(1, 1);
    let hello = client_hello();
    let mut repeated = Vec::new();
    for _ in 0..50 {
        let socket = rig.socket();
        repeated.push(Raw::open(rig.host_core(), socket, hello.clone()));
    }
    for n in 0..50 {
        rig.write(&host.io[0], n, &[n as u8; BLOCK]);
        assert_eq!(rig.read(&host.io[0], n, BLOCK), [n as u8; BLOCK]);
    }
    assert!(repeated.iter().all(|raw| !raw.is_over()), "there is time for a handshake");
    rig.until("the time for a handshake", || repeated.iter().all(Raw::is_over));
    assert!(repeated.iter().all(|raw| raw.0.borrow().received[..1] == [22]), "it was answered");
    assert_eq!(rig.read(&host.io[0], 7, BLOCK), [7; BLOCK]);
    let (connections, associations) = rig.target.connected();
    assert_eq!((connections, associations), (2, 1));
    let status = rig.target.status();
    assert_eq!(status.refusals_total, 50);
    let why = &status.refusals.last().expect("one").why;
    assert!(why.contains("did not go on within 10 s in the middle of the TLS handshake"), "{why}");
}

#[test]
fn plain_bytes_behind_a_handshake_reach_nobody() {
    let (mut rig, _keys) = rig(Tls::Required);
    let host = rig.host(1, 1);
    rig.write(&host.io[0], 0, &[9; BLOCK]);
    let mut bytes = client_hello();
    // As if a write were to be smuggled in: 16 KiB of junk behind the first flight.
    bytes.extend(std::iter::repeat_n(0xa5, 16 << 10));
    let socket = rig.socket();
    let raw = Raw::open(rig.host_core(), socket, bytes);
    rig.until("the end", || raw.is_over());
    let done = rig.command(&host.io[0], rw(NvmOpcode::READ, 0, BLOCK), Data::Reply(BLOCK));
    assert_eq!(done.reply, [9; BLOCK]);
}

#[test]
fn keys_change_under_load_and_io_is_right() {
    let (mut rig, _keys) = rig(Tls::Required);
    let host = rig.host(1, 1);
    for round in 1..=20u64 {
        // A queue full of writes, with new keys on both ends in the middle of them.
        let ids: Vec<u64> = (0..u64::from(DEPTH))
            .map(|n| {
                let (sqe, data) = write(n * 8, &pattern(round * 100 + n, 8 * BLOCK));
                host.io[0].send(sqe, data)
            })
            .collect();
        host.io[0].update_keys();
        for id in ids {
            assert!(rig.outcome(&host.io[0], id).cqe.status().is_success());
        }
        for n in 0..u64::from(DEPTH) {
            let read = rig.read(&host.io[0], n * 8, 8 * BLOCK);
            assert!(read == pattern(round * 100 + n, 8 * BLOCK), "round {round}, {n}");
        }
        let counters = host.io[0].tls_counters();
        assert_eq!((counters.tx_key_updates, counters.rx_key_updates), (round, round));
    }
    // The target changes none by itself: a Linux host could not follow. A host asks in time.
    assert_eq!(host.admin.tls_counters().rx_key_updates, 0);
}

#[test]
fn both_ends_say_that_nothing_follows() {
    let (mut rig, _keys) = rig(Tls::Required);
    let host = rig.host(1, 2);
    rig.write(&host.io[0], 3, &[3; BLOCK]);
    // A host that says so and leaves the connection open: what it sent before counts, and it goes.
    let (sqe, data) = write(4, &[4; BLOCK]);
    host.io[0].send(sqe, data);
    host.io[0].say_close();
    rig.until("the end of the queue", || host.io[0].is_over());
    assert!(host.io[0].is_closed_in_order(), "the target says so, too");
    // A target that ends what is left of an association.
    let host = rig.host(1, 1);
    assert!(!host.io[0].is_closed_in_order());
    host.admin.cut();
    rig.until("the end of the association", || host.io[0].is_over());
    assert!(host.io[0].is_closed_in_order(), "it was no accident");
    assert!(rig.target.status().refusals.is_empty());
    let host = rig.host(1, 1);
    assert_eq!(rig.read(&host.io[0], 3, BLOCK), [3; BLOCK]);
}
