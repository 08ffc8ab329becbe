//! Our initiator and our target with TLS and in-band authentication: on sockets with real cores, and
//! simulated on a faulty network.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block::ram::RamVolume;
use block::{Channel, Identity, Io, Op, Volume};
use crypto::dhchap::DhGroup;
use crypto::psk::{Derivation, IdentityVersion};
use crypto::{DhchapKey, Hash, KeyHash, TlsKey};
use it::rig::{Rig, SUBNQN};
use nvme::spec::Nqn;
use nvmf_initiator::{
    Dhchap, DiscoverConfig, Phase, RemoteConfig, RemoteState, RemoteVolume, Security, TlsKeys,
    Watch, WatchConfig, discover,
};
use nvmf_target::{
    AuthPolicy, ControllerStatus, HostDhchapKey, HostKeys, HostTlsKey, KeyStore, Limits, Tls,
};
use reactor::{Core, CoreConfig, Local};

use crate::sim;

const HOSTNQN: &str = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-0000000000aa";
/// Real time that nothing here takes.
const LIMIT: Duration = Duration::from_secs(30);
const IO_BYTES: usize = 16 << 10;

fn tls_key(n: u8) -> TlsKey {
    TlsKey::new(KeyHash::Sha256, &[n; 32]).expect("a key")
}

fn secret(n: u8) -> DhchapKey {
    DhchapKey::new(KeyHash::Sha256, &[n; 32]).expect("a secret")
}

fn nqn(text: &str) -> Nqn {
    Nqn::new(text).expect("a name")
}

/// The host, with its identifier.
fn host() -> (Nqn, [u8; 16]) {
    (nqn(HOSTNQN), [9; 16])
}

/// What the target knows of the host.
fn known(tls: &[TlsKey], dhchap: &[DhchapKey], controller: Option<DhchapKey>) -> HostKeys {
    let tls = tls.iter().cloned().map(|key| HostTlsKey { key, subnqn: None, expires: None });
    let entry = |key| HostDhchapKey { key, expires: None };
    let dhchap = dhchap.iter().cloned().map(entry);
    let dhchap_controller = controller.map(entry);
    HostKeys { tls: tls.collect(), dhchap: dhchap.collect(), dhchap_controller }
}

fn with_tls(keys: Vec<TlsKey>) -> Security {
    Security { tls: nvmf_initiator::Tls::Keys(TlsKeys::new(keys)), dhchap: None }
}

fn with_dhchap(key: DhchapKey, controller_key: Option<DhchapKey>) -> Security {
    let dhchap = Some(Dhchap { controller_key, ..Dhchap::new(key) });
    Security { dhchap, ..Security::default() }
}

/// A target on a socket, and a host on this thread.
struct Pair {
    rig: Rig,
    keys: Arc<KeyStore>,
    core: Core,
    local: Local,
    volume: Arc<RemoteVolume>,
    channel: Box<dyn Channel>,
}

impl Pair {
    fn start(tls: Tls, keys: HostKeys, security: Security) -> Pair {
        Pair::start_with(tls, keys, |addr| RemoteConfig {
            security,
            ..RemoteConfig::new(addr, nqn(SUBNQN), 1, host())
        })
    }

    /// The same with a volume of one's own making for the target at an address.
    fn start_with(
        tls: Tls,
        keys: HostKeys,
        config: impl FnOnce(SocketAddr) -> RemoteConfig,
    ) -> Pair {
        let store = Arc::new(KeyStore::default());
        store.set(HOSTNQN, keys);
        let volume: Arc<dyn Volume> =
            Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 16 << 20, 512).expect("memory"));
        let secure = (tls, Arc::clone(&store));
        let listen = [Ipv4Addr::LOCALHOST.into()];
        let rig = Rig::start_secure(&listen, vec![volume], 1, Limits::default(), secure)
            .expect("a target");
        let mut core = Core::new(CoreConfig::default()).expect("a core");
        let config = RemoteConfig {
            reconnect_delay: Duration::from_millis(1),
            reconnect_delay_max: Duration::from_millis(20),
            ..config(rig.addr)
        };
        let local = core.local();
        let (volume, task) = RemoteVolume::start(config, &local).expect("a configuration");
        core.spawn(task);
        let channel = volume.open(&local, 8).expect("a channel");
        Pair { rig, keys: store, core, local, volume, channel }
    }

    fn state(&self) -> Arc<RemoteState> {
        self.volume.state()
    }

    fn run(&mut self, what: &str, mut is_done: impl FnMut(&mut Pair, Vec<Box<Io>>) -> bool) {
        let begun = Instant::now();
        loop {
            self.core.turn(false);
            let mut done = Vec::new();
            self.channel.poll(&mut |io| done.push(io));
            if is_done(self, done) {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{what} never happens: {:?}", self.state());
            std::thread::yield_now();
        }
    }

    fn until_live(&mut self) {
        self.run("ready", |pair, _| pair.state().phase == Phase::Live);
    }

    /// Why the volume cannot be used.
    fn refusal(&mut self) -> String {
        self.run("a refusal", |pair, _| {
            assert_ne!(pair.state().phase, Phase::Live, "it should not have been taken");
            pair.state().last_error.is_some()
        });
        self.state().last_error.clone().expect("there is one")
    }

    fn io(&mut self, op: Op, offset: u64, fill: u8) -> Box<Io> {
        let mut io = Box::new(Io::new(op, offset, IO_BYTES as u64));
        self.local.pool().alloc(IO_BYTES, &mut io.data).expect("memory");
        io.data.fill(0, IO_BYTES, fill).expect("in the buffer");
        self.channel.submit(io).expect("room");
        let mut back = None;
        self.run("the end of the I/O", |_, done| {
            back = done.into_iter().next();
            back.is_some()
        });
        back.expect("it came back")
    }

    /// Writes and reads back.
    fn verify(&mut self, seed: u8) {
        for n in 0..8u8 {
            let io = self.io(Op::Write, u64::from(n) * IO_BYTES as u64, seed ^ n);
            assert_eq!(io.result, Ok(()));
        }
        for n in 0..8u8 {
            let io = self.io(Op::Read, u64::from(n) * IO_BYTES as u64, 0xEE);
            assert_eq!(io.result, Ok(()));
            let mut bytes = vec![0; IO_BYTES];
            io.data.copy_to_slice(0, &mut bytes).expect("in the buffer");
            assert!(bytes.iter().all(|byte| *byte == seed ^ n), "block {n} of seed {seed}");
        }
    }

    /// The only controller, as the target sees it.
    fn controller(&self) -> ControllerStatus {
        let mut controllers = self.rig.target.status().controllers;
        assert_eq!(controllers.len(), 1, "{controllers:?}");
        controllers.remove(0)
    }
}

#[test]
fn tls_carries_io_with_every_kind_of_key() {
    for (hash, len) in [(KeyHash::None, 32), (KeyHash::Sha256, 32), (KeyHash::Sha384, 48)] {
        for version in [IdentityVersion::V0, IdentityVersion::V1] {
            for derivation in Derivation::ALL {
                let key = TlsKey::new(hash, &[7; 48][..len]).expect("a key");
                let keys = TlsKeys {
                    versions: vec![version],
                    derivations: vec![derivation],
                    ..TlsKeys::new(vec![key.clone()])
                };
                let tls = nvmf_initiator::Tls::Keys(keys);
                let security = Security { tls, dhchap: None };
                let mut pair = Pair::start(Tls::Required, known(&[key], &[], None), security);
                pair.until_live();
                pair.verify(len as u8);
                let suite = if len == 32 { "TLS_AES_128_GCM" } else { "TLS_AES_256_GCM" };
                let controller = pair.controller();
                let shown = controller.tls.as_deref().expect("it is encrypted");
                assert!(shown.starts_with(suite), "{shown}");
                assert_eq!(pair.state().losses, 0);
            }
        }
    }
}

#[test]
fn keys_are_offered_until_the_target_takes_one() {
    let security = with_tls(vec![tls_key(1), tls_key(2), tls_key(3)]);
    let mut pair = Pair::start(Tls::Required, known(&[tls_key(3)], &[], None), security);
    pair.until_live();
    pair.verify(3);
    // That it took several connections is no failed attempt.
    assert_eq!((pair.state().attempts, pair.state().last_error.clone()), (1, None));
    let refused = pair.rig.target.status().refusals_total;
    // Two keys in four forms each. The I/O queue began with the one that the target took.
    assert_eq!(refused, 8);
}

#[test]
fn a_target_without_our_key_is_told_apart_and_the_line_says_what_to_do() {
    let cases = [
        (known(&[tls_key(2)], &[], None), "unknown_psk_identity"),
        (HostKeys::default(), "unknown_psk_identity"),
    ];
    for (keys, alert) in cases {
        let mut pair = Pair::start(Tls::Required, keys, with_tls(vec![tls_key(1)]));
        let why = pair.refusal();
        assert!(why.contains(alert) && why.contains("penstock key import"), "{why}");
        assert!(why.contains(HOSTNQN), "{why}");
    }
    // Without a hash in its identity the key itself is what does not fit.
    let mut keys = TlsKeys::new(vec![tls_key(1)]);
    keys.versions = vec![IdentityVersion::V0];
    let security = Security { tls: nvmf_initiator::Tls::Keys(keys), dhchap: None };
    let mut pair = Pair::start(Tls::Required, known(&[tls_key(2)], &[], None), security);
    let why = pair.refusal();
    assert!(why.contains("decrypt_error"), "{why}");
}

#[test]
fn plaintext_and_tls_do_not_meet() {
    let keys = known(&[tls_key(1)], &[], None);
    let mut pair = Pair::start(Tls::Required, keys.clone(), Security::default());
    let why = pair.refusal();
    assert!(why.contains("require TLS"), "{why}");
    // Nothing is sent in plaintext to a target that would take it so.
    let mut pair = Pair::start(Tls::Off, keys, with_tls(vec![tls_key(1)]));
    let why = pair.refusal();
    assert!(why.contains("does not speak TLS") || why.contains("closed the connection"), "{why}");
}

/// Somebody on the way who passes everything on and writes it down: what hosts send, and what the
/// target sends.
#[derive(Clone, Default)]
struct Tap {
    seen: Arc<Mutex<[Vec<Vec<u8>>; 2]>>,
}

impl Tap {
    fn start(&self, target: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let addr = listener.local_addr().expect("it is bound");
        let tap = self.clone();
        std::thread::spawn(move || {
            while let Ok((host, _)) = listener.accept() {
                let target = TcpStream::connect(target).expect("the target listens");
                let ends = [&host, &target].map(|end| end.try_clone().expect("a descriptor"));
                let [host_too, target_too] = ends;
                for (side, from, to) in [(0, host, target_too), (1, target, host_too)] {
                    let tap = tap.clone();
                    std::thread::spawn(move || tap.pass(side, from, to));
                }
            }
        });
        addr
    }

    fn pass(&self, side: usize, mut from: TcpStream, mut to: TcpStream) {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 16 << 10]);
        // Who closes while the other's last words arrive resets the connection: as good an end.
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..len]);
            // Whoever has gone hears nothing any more.
            let _ = to.write_all(&buffer[..len]);
        }
        let _ = to.shutdown(Shutdown::Write);
        self.seen.lock().expect("no panic")[side].push(bytes);
    }

    /// What `side` has sent, when so many of its connections are over.
    fn ended(&self, side: usize, count: usize) -> Option<Vec<Vec<u8>>> {
        let seen = &self.seen.lock().expect("no panic")[side];
        (seen.len() >= count).then(|| seen.clone())
    }
}

/// Whether the last record has room for an alert and for nothing else: its two bytes, type and tag.
fn ends_with_alert(mut bytes: &[u8]) -> bool {
    let mut last = 0;
    while let Some(len) = bytes.get(3..5).map(|len| u16::from_be_bytes([len[0], len[1]])) {
        last = usize::from(len);
        bytes = bytes.get(5 + last..).expect("whole records");
    }
    last == 2 + 1 + 16
}

/// Both ends say that nothing follows before they close (RFC 8446, section 6.1).
#[test]
fn connections_with_tls_end_in_order_on_the_wire() {
    let (tap, keys) = (Tap::default(), known(&[tls_key(1)], &[], None));
    let security = with_tls(vec![tls_key(1)]);
    let mut pair = Pair::start_with(Tls::Required, keys, |addr| RemoteConfig {
        security,
        ..RemoteConfig::new(tap.start(addr), nqn(SUBNQN), 1, host())
    });
    pair.until_live();
    pair.verify(1);
    let Pair { rig, mut core, volume, channel, .. } = pair;
    // The channel goes, then the volume; nobody of the channel is left to wait.
    drop(channel);
    let mut run = |what: &str, is_done: &mut dyn FnMut() -> bool| {
        let begun = Instant::now();
        while !is_done() {
            core.turn(false);
            assert!(begun.elapsed() < LIMIT, "{what} never happens");
            std::thread::yield_now();
        }
    };
    run("the end of the I/O queue", &mut || tap.ended(0, 1).is_some());
    volume.shutdown();
    run("the end", &mut || volume.wait_stopped(Duration::ZERO));
    for side in [0, 1] {
        run("the end of both", &mut || tap.ended(side, 2).is_some());
        for bytes in tap.ended(side, 2).expect("both have ended") {
            assert!(ends_with_alert(&bytes), "side {side}");
        }
    }
    drop(rig);
}

#[test]
fn a_key_is_changed_without_a_disconnect() {
    let security = with_tls(vec![tls_key(1), tls_key(2)]);
    let mut pair = Pair::start(Tls::Required, known(&[tls_key(1)], &[], None), security);
    pair.until_live();
    pair.verify(1);
    pair.keys.set(HOSTNQN, known(&[tls_key(1), tls_key(2)], &[], None));
    pair.verify(2);
    pair.keys.set(HOSTNQN, known(&[tls_key(2)], &[], None));
    pair.verify(3);
    assert_eq!((pair.state().losses, pair.state().attempts), (0, 1));
}

#[test]
fn new_keys_are_for_what_comes_next_and_io_goes_on() {
    let by = |n| {
        let dhchap = with_dhchap(secret(n), Some(secret(n + 10))).dhchap;
        Security { dhchap, ..with_tls(vec![tls_key(n)]) }
    };
    let at_target = |n| known(&[tls_key(n)], &[secret(n)], Some(secret(n + 10)));
    let (mut pair, watch) = told(Tls::Required, at_target(1), &by(1));
    pair.until_live();
    pair.run("discovery", |_, _| watch.state()[0].is_connected);
    pair.verify(1);
    let give = |pair: &Pair, n| {
        pair.volume.set_security(by(n)).expect("keys for keys");
        watch.set_security(by(n)).expect("keys for keys");
    };
    give(&pair, 2);
    pair.verify(2);
    pair.keys.set(HOSTNQN, at_target(2));
    for round in 3..6 {
        // With the secret of the start each would be a loss.
        pair.volume.reauthenticate();
        pair.verify(round);
    }
    assert_eq!((pair.state().losses, pair.state().attempts), (0, 1));
    // The next connections are by the new keys alone, those to discovery as well.
    let disconnect = |pair: &Pair| {
        pair.rig.target.disconnect_host(None, &nqn(HOSTNQN)).expect("a host");
    };
    disconnect(&pair);
    pair.run("the loss", |pair, _| pair.state().losses == 1);
    pair.until_live();
    pair.verify(6);
    // Keys that the target lacks keep the next connection out until there are others.
    give(&pair, 3);
    pair.verify(7);
    disconnect(&pair);
    pair.run("a refusal", |pair, _| {
        pair.state().last_error.as_ref().is_some_and(|why| why.contains("unknown_psk_identity"))
    });
    pair.keys.set(HOSTNQN, at_target(3));
    pair.until_live();
    pair.verify(8);
    pair.run("discovery", |_, _| watch.state()[0].is_connected);
    // TLS is not switched off on the way.
    assert!(pair.volume.set_security(Security::default()).is_err());
    assert!(watch.set_security(Security::default()).is_err());
}

#[test]
fn every_hash_and_group_authenticates() {
    let cases = [
        (Hash::Sha256, DhGroup::Null),
        (Hash::Sha384, DhGroup::Ffdhe2048),
        (Hash::Sha512, DhGroup::Ffdhe3072),
        (Hash::Sha256, DhGroup::Ffdhe4096),
        (Hash::Sha384, DhGroup::Ffdhe6144),
        (Hash::Sha512, DhGroup::Ffdhe8192),
    ];
    for (hash, group) in cases {
        for controller in [None, Some(secret(9))] {
            let mut security = with_dhchap(secret(1), controller.clone());
            if let Some(dhchap) = &mut security.dhchap {
                (dhchap.hashes, dhchap.groups) = (vec![hash], vec![group]);
            }
            let keys = known(&[], &[secret(1)], controller.clone());
            let mut pair = Pair::start(Tls::Off, keys, security);
            pair.until_live();
            pair.verify(group as u8);
            let mutual = if controller.is_some() { " mutual" } else { "" };
            let want = format!("DH-HMAC-CHAP {hash:?} {group:?}{mutual}");
            assert_eq!(pair.controller().authenticated, Some(want));
            assert_eq!(pair.state().losses, 0);
        }
    }
}

#[test]
fn who_does_not_prove_itself_is_not_used() {
    // The host has another secret, or none.
    let keys = known(&[], &[secret(2)], None);
    let mut pair = Pair::start(Tls::Off, keys.clone(), with_dhchap(secret(1), None));
    let why = pair.refusal();
    assert!(why.contains("DH-HMAC-CHAP") && why.contains("another secret"), "{why}");
    let mut pair = Pair::start(Tls::Off, keys, Security::default());
    let why = pair.refusal();
    assert!(why.contains("asks this host to authenticate"), "{why}");
    // The controller has another secret, or none, or does not even ask the host for its own.
    let host = [secret(1)];
    for keys in [known(&[], &host, Some(secret(8))), known(&[], &host, None), HostKeys::default()] {
        let mut pair = Pair::start(Tls::Off, keys, with_dhchap(secret(1), Some(secret(9))));
        let why = pair.refusal();
        assert!(why.contains("DH-HMAC-CHAP"), "{why}");
    }
}

#[test]
fn an_authentication_makes_the_key_for_tls() {
    let security = Security {
        tls: nvmf_initiator::Tls::Concatenate,
        ..with_dhchap(secret(1), Some(secret(9)))
    };
    let keys = known(&[], &[secret(1)], Some(secret(9)));
    let mut pair = Pair::start(Tls::Allowed, keys, security.clone());
    pair.until_live();
    pair.verify(5);
    assert!(pair.controller().tls.is_some(), "{:?}", pair.controller());
    assert_eq!((pair.state().losses, pair.state().last_error.clone()), (0, None));
    // A target without TLS has no use for the key, and nothing goes in plaintext.
    let keys = known(&[], &[secret(1)], Some(secret(9)));
    let mut pair = Pair::start(Tls::Off, keys, security);
    let why = pair.refusal();
    assert!(why.contains("TLS") || why.contains("secure channel"), "{why}");
}

#[test]
fn queues_authenticate_again_under_io() {
    let keys = known(&[], &[secret(1)], None);
    let mut pair = Pair::start(Tls::Off, keys, with_dhchap(secret(1), None));
    pair.until_live();
    for round in 0..5 {
        pair.volume.reauthenticate();
        pair.verify(round);
    }
    assert_eq!((pair.state().losses, pair.state().attempts), (0, 1));
    // It is a real one: with another secret at the target it fails.
    pair.keys.set(HOSTNQN, known(&[], &[secret(2)], None));
    pair.verify(77);
    assert_eq!(pair.state().losses, 0, "connections that exist stay");
    pair.volume.reauthenticate();
    pair.run("the loss", |pair, _| pair.state().losses == 1);
    let why = pair.state().last_error.clone().expect("there is one");
    assert!(why.contains("another secret"), "{why}");
    // And back.
    pair.keys.set(HOSTNQN, known(&[], &[secret(1)], None));
    pair.until_live();
    pair.verify(78);
}

#[test]
fn tls_and_authentication_go_together() {
    let keys = known(&[tls_key(1)], &[secret(1)], None);
    let security = Security { dhchap: Some(Dhchap::new(secret(1))), ..with_tls(vec![tls_key(1)]) };
    let mut pair = Pair::start(Tls::Required, keys, security);
    pair.until_live();
    pair.verify(1);
    let controller = pair.controller();
    assert!(controller.tls.is_some() && controller.authenticated.is_some(), "{controller:?}");
}

#[test]
fn discovery_speaks_tls_and_authenticates() {
    let store = Arc::new(KeyStore::default());
    store.set(HOSTNQN, known(&[tls_key(1)], &[secret(1)], Some(secret(9))));
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 1 << 20, 512).expect("memory"));
    let listen = [Ipv4Addr::LOCALHOST.into()];
    let ask = |tls: Tls, security: Security| {
        let secure = (tls, Arc::clone(&store));
        let rig =
            Rig::start_secure(&listen, vec![Arc::clone(&volume)], 1, Limits::default(), secure)
                .expect("a target");
        discover(&DiscoverConfig {
            addr: rig.addr,
            subnqn: Nqn::discovery(),
            hostnqn: Nqn::new(HOSTNQN).expect("a name"),
            hostid: [9; 16],
            timeout: LIMIT,
            security,
        })
    };
    let dhchap = with_dhchap(secret(1), Some(secret(9))).dhchap;
    let both = Security { dhchap: dhchap.clone(), ..with_tls(vec![tls_key(2), tls_key(1)]) };
    assert_eq!(ask(Tls::Required, both).expect("a log").entries.len(), 2);
    let plain = Security { dhchap: dhchap.clone(), ..Security::default() };
    assert_eq!(ask(Tls::Allowed, plain).expect("a log").entries.len(), 2);
    let concatenated = Security { dhchap, tls: nvmf_initiator::Tls::Concatenate };
    assert_eq!(ask(Tls::Allowed, concatenated.clone()).expect("a log").entries.len(), 2);
    let refused = |tls, security| ask(tls, security).expect_err("it is refused").to_string();
    assert!(refused(Tls::Required, with_tls(vec![tls_key(3)])).contains("unknown_psk_identity"));
    assert!(refused(Tls::Allowed, Security::default()).contains("asks this host"));
    let wrong = with_dhchap(secret(1), Some(secret(8)));
    assert!(refused(Tls::Off, wrong).contains("DH-HMAC-CHAP"));
    let why = refused(Tls::Off, concatenated);
    assert!(why.contains("TLS") || why.contains("secure channel"), "{why}");
}

/// A volume whose only way is told by the target's own discovery controller, asked with `security`.
fn told(tls: Tls, keys: HostKeys, security: &Security) -> (Pair, Watch) {
    let mut pair = Pair::start_with(tls, keys, |_| RemoteConfig {
        security: security.clone(),
        ..RemoteConfig::unplaced(nqn(SUBNQN), 1, host())
    });
    let addr = pair.rig.addr;
    let config = WatchConfig {
        ports: [addr.port()].into(),
        has_tls: !matches!(security.tls, nvmf_initiator::Tls::Off),
        security: security.clone(),
        reconnect_delay: Duration::from_millis(1),
        reconnect_delay_max: Duration::from_millis(20),
        ..WatchConfig::new(vec![addr], nqn(SUBNQN), host())
    };
    let volumes = [Arc::clone(&pair.volume)];
    let (watch, task) = Watch::start(config, &volumes, &pair.local).expect("a configuration");
    pair.core.spawn(task);
    (pair, watch)
}

#[test]
fn paths_are_told_over_tls_and_after_authentication() {
    let dhchap = with_dhchap(secret(1), Some(secret(9))).dhchap;
    let secrets = || known(&[tls_key(1)], &[secret(1)], Some(secret(9)));
    let derived = |version, derivation| TlsKeys {
        versions: vec![version],
        derivations: vec![derivation],
        ..TlsKeys::new(vec![tls_key(2), tls_key(1)])
    };
    let by = |keys| Security { tls: nvmf_initiator::Tls::Keys(keys), dhchap: dhchap.clone() };
    for (tls, security) in [
        (Tls::Required, by(TlsKeys::new(vec![tls_key(2), tls_key(1)]))),
        (Tls::Required, by(derived(IdentityVersion::V0, Derivation::Libnvme))),
        (Tls::Required, by(derived(IdentityVersion::V1, Derivation::Libnvme))),
        (Tls::Off, with_dhchap(secret(1), Some(secret(9)))),
        (Tls::Allowed, Security { tls: nvmf_initiator::Tls::Concatenate, dhchap: dhchap.clone() }),
    ] {
        let (mut pair, watch) = told(tls, secrets(), &security);
        pair.until_live();
        pair.verify(3);
        assert!(watch.state()[0].is_connected);
        let controllers = pair.rig.target.status().controllers;
        assert_eq!(controllers.len(), 2, "{controllers:?}");
        for controller in controllers {
            assert_eq!(controller.tls.is_some(), tls != Tls::Off, "{controller:?}");
            // What an authentication made is proof of both.
            let is_made = matches!(security.tls, nvmf_initiator::Tls::Concatenate);
            assert!(is_made || controller.authenticated.is_some(), "{controller:?}");
        }
    }
}

#[test]
fn a_discovery_controller_that_is_not_the_one_tells_nothing() {
    let refusal = |tls, keys, security: &Security| {
        let (mut pair, watch) = told(tls, keys, security);
        pair.run("a refusal", |_, _| watch.state()[0].last_error.is_some());
        let state = watch.state()[0].clone();
        assert!(!state.is_connected && state.genctr.is_none(), "{state:?}");
        assert!(pair.state().paths.is_empty());
        state.last_error.expect("there is one")
    };
    let tls = with_tls(vec![tls_key(1)]);
    let other = known(&[tls_key(2)], &[], None);
    let why = refusal(Tls::Required, other.clone(), &tls);
    assert!(why.contains("`penstock key import --host "), "{why}");
    let why = refusal(Tls::Off, other, &tls);
    assert!(why.starts_with("TLS: "), "{why}");
    // A key for the subsystem alone is none for the discovery subsystem.
    let mut alone = known(&[tls_key(1)], &[], None);
    alone.tls[0].subnqn = Some(SUBNQN.to_owned());
    let why = refusal(Tls::Required, alone, &tls);
    assert!(why.contains("unknown_psk_identity"), "{why}");
    let mutual = with_dhchap(secret(1), Some(secret(8)));
    let why = refusal(Tls::Off, known(&[], &[secret(1)], Some(secret(9))), &mutual);
    assert!(why.starts_with("DH-HMAC-CHAP: "), "{why}");
    let why = refusal(Tls::Off, known(&[], &[secret(1)], None), &Security::default());
    assert!(why.contains("asks this host"), "{why}");
}

/// As the simulation without TLS, on its worst network.
#[test]
fn a_faulty_network_loses_and_doubles_nothing_under_tls() {
    for seed in 0..60 {
        let store = Arc::new(KeyStore::default());
        store.set(sim::HOSTNQN, known(&[tls_key(1)], &[secret(1)], Some(secret(9))));
        store.set_policy(AuthPolicy { groups: vec![DhGroup::Null], ..AuthPolicy::default() });
        let mut security = with_tls(vec![tls_key(1)]);
        if seed % 2 == 0 {
            // Without a group, as virtual time does not wait for a thread.
            let dhchap = with_dhchap(secret(1), Some(secret(9))).dhchap;
            security.dhchap = dhchap.map(|d| Dhchap { groups: vec![DhGroup::Null], ..d });
        } else {
            store.set(sim::HOSTNQN, known(&[tls_key(1)], &[], None));
        }
        let change = |config| RemoteConfig { security, ..config };
        let sim = sim::build_secure(seed, 60, 1, change, (Tls::Required, store));
        match sim.finish() {
            Ok(count) => assert_eq!(count, 60, "seed {seed}"),
            Err(failure) => panic!("seed {seed}: {failure}"),
        }
    }
}
