//! Hosts that authenticate in band.

use std::sync::Arc;
use std::time::Duration;

use crypto::dhchap::{
    self, Concatenation, DhGroup, ENTROPY_LEN, HostConfig, MESSAGE_BYTES_MAX, Outcome,
};
use crypto::psk::IdentityVersion;
use crypto::{DhchapKey, Hash, KeyHash};
use nvme::spec::{NvmOpcode, SglDescriptor, Sqe, Status};
use nvmf_target::{AuthDemand, AuthPolicy, HostDhchapKey, HostKeys, KeyStore, TargetConfig, Tls};

use crate::host::{Data, Queue};
use crate::rig::{BLOCK, Rig, SUBNQN, hostnqn, pattern, property_get, property_set, rw, write};

/// AUTHREQ of a Connect response.
const ATR: u32 = 1 << 17;

pub(crate) fn secret(n: u8) -> DhchapKey {
    DhchapKey::new(KeyHash::Sha256, &[n; 32]).expect("a secret")
}

fn keys(secrets: &[u8], controller: Option<u8>) -> HostKeys {
    let entry = |n: u8| HostDhchapKey { key: secret(n), expires: None };
    HostKeys {
        dhchap: secrets.iter().copied().map(entry).collect(),
        dhchap_controller: controller.map(entry),
        ..HostKeys::default()
    }
}

fn policy(hash: Hash, group: DhGroup) -> AuthPolicy {
    AuthPolicy { hashes: vec![hash], groups: vec![group] }
}

/// Host 1 has to authenticate, with secret 1; the controller has secret 9.
fn rig(tls: Tls) -> (Rig, Arc<KeyStore>) {
    // Exchanges are computed on a thread that knows nothing of virtual time.
    rig_with(tls, Duration::from_secs(1 << 24))
}

fn rig_with(tls: Tls, handshake: Duration) -> (Rig, Arc<KeyStore>) {
    let store = Arc::new(KeyStore::with_clock(|| 1_000));
    store.set(&hostnqn(1), keys(&[1], Some(9)));
    store.set_policy(policy(Hash::Sha256, DhGroup::Null));
    let given = Arc::clone(&store);
    let rig = Rig::with(1, move |config: &mut TargetConfig| {
        config.ports[0].tls = tls;
        config.keys = given;
        config.limits.handshake = handshake;
    });
    (rig, store)
}

fn host(n: u8, secret_of: u8, controller: Option<u8>) -> HostConfig {
    HostConfig {
        hostnqn: hostnqn(n),
        subnqn: SUBNQN.to_owned(),
        host_key: secret(secret_of),
        controller_key: controller.map(secret),
        hashes: vec![Hash::Sha256, Hash::Sha384, Hash::Sha512],
        groups: DhGroup::ALL.to_vec(),
        concatenation: Concatenation::No,
        t_id: 77,
    }
}

fn auth_command(fctype: u8, len: usize) -> Sqe {
    let mut bytes = [0; 64];
    (bytes[0], bytes[1], bytes[4]) = (0x7f, 0x40, fctype);
    bytes[41..44].copy_from_slice(&[1, 1, 0xe9]);
    bytes[44..48].copy_from_slice(&(len as u32).to_le_bytes());
    let mut sqe = Sqe::from_bytes(&bytes);
    sqe.dptr = if fctype == 5 {
        SglDescriptor::in_capsule(0, len as u32)
    } else {
        SglDescriptor::transport(len as u32)
    };
    sqe
}

/// Waits for a command that a thread outside of the simulation has a part in.
fn wait(rig: &mut Rig, queue: &Queue, id: u64) -> crate::host::Done {
    while !queue.is_done(id) {
        assert!(!queue.is_over(), "the connection ended");
        rig.run_for(Duration::from_millis(1));
        std::thread::yield_now();
    }
    queue.take(id).expect("it is done")
}

/// Everything that is said of secrets, of good ones and wrong ones: for who listens.
pub(crate) fn talk(old: u8, new: u8, controller: u8) {
    let (mut rig, store) = rig(Tls::Off);
    for (secrets, of_host) in [(&[old][..], old), (&[old, new], new), (&[new], old)] {
        store.set(&hostnqn(1), keys(secrets, Some(controller)));
        let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
        // What comes of it is for other tests.
        let _ = authenticate(&mut rig, &admin, host(1, of_host, Some(controller)));
        admin.cut();
    }
    assert_eq!(rig.target.status().refusals_total, 1);
}

/// A whole authentication; what the host makes of it.
fn authenticate(rig: &mut Rig, queue: &Queue, config: HostConfig) -> Result<Outcome, String> {
    let mut machine = dhchap::Host::new(config, &[0x5a; ENTROPY_LEN]);
    loop {
        while let Some(message) = machine.next_message() {
            let len = message.len();
            let id = queue.send(auth_command(5, len), Data::Capsule(message));
            let status = wait(rig, queue, id).cqe.status();
            assert!(status.is_success(), "authentication send: {status}");
        }
        match machine.status() {
            dhchap::Status::Running => {}
            dhchap::Status::Done(outcome) => return Ok(outcome.clone()),
            dhchap::Status::Failed(failure) => return Err(failure.to_string()),
        }
        let command = auth_command(6, MESSAGE_BYTES_MAX);
        let id = queue.send(command, Data::Reply(MESSAGE_BYTES_MAX));
        let done = wait(rig, queue, id);
        assert!(done.cqe.status().is_success(), "receive: {}", done.cqe.status());
        if let Some(task) = machine.on_message(&done.reply) {
            machine.on_computed(task.run());
        }
    }
}

#[test]
fn every_hash_and_the_groups_one_way_and_mutual_on_every_queue() {
    let (mut rig, store) = rig(Tls::Off);
    for (hash, group, mutual) in [
        (Hash::Sha256, DhGroup::Null, None),
        (Hash::Sha384, DhGroup::Null, Some(9)),
        (Hash::Sha512, DhGroup::Ffdhe2048, Some(9)),
        (Hash::Sha256, DhGroup::Ffdhe3072, None),
    ] {
        store.set_policy(policy(hash, group));
        let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
        assert_eq!(done.cqe.dw0() & !0xffff, ATR);
        let cntlid = done.cqe.dw0() as u16;
        // Nothing before.
        for sqe in [property_get(0), property_set(0x14, 0x0046_0001)] {
            let status = rig.command(&admin, sqe, Data::None).cqe.status();
            assert_eq!(status, Status::AUTHENTICATION_REQUIRED.dnr());
        }
        let outcome =
            authenticate(&mut rig, &admin, host(1, 1, mutual)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((outcome.hash, outcome.group), (hash, group));
        assert_eq!(outcome.is_mutual, mutual.is_some());
        rig.enable(&admin);
        let mut sqe = Sqe::new(9);
        sqe.cdw10.set(7);
        assert!(rig.command(&admin, sqe, Data::None).cqe.status().is_success());

        let (io, done) = rig.connect(1, SUBNQN, 1, cntlid);
        assert_eq!(done.cqe.dw0() & !0xffff, ATR);
        let read = rw(NvmOpcode::READ, 0, BLOCK);
        let status = rig.command(&io, read, Data::Reply(BLOCK)).cqe.status();
        assert_eq!(status, Status::AUTHENTICATION_REQUIRED.dnr());
        authenticate(&mut rig, &io, host(1, 1, mutual)).unwrap_or_else(|e| panic!("{e}"));
        rig.write(&io, 3, &[7; BLOCK]);
        // Again, while I/O goes on.
        let id = io.send(rw(NvmOpcode::READ, 3, BLOCK), Data::Reply(BLOCK));
        authenticate(&mut rig, &io, host(1, 1, mutual)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(rig.outcome(&io, id).reply, [7; BLOCK]);
        let status = rig.target.status();
        let how = status.controllers[0].authenticated.clone().expect("it has");
        assert!(how.contains(&format!("{hash:?} {group:?}")), "{how}");
        admin.cut();
        rig.until("the end", || io.is_over());
        let target = Arc::clone(&rig.target);
        rig.until("no association", || target.connected().1 == 0);
    }
    // Each queue sent something before its proof, and is told of once for that.
    let status = rig.target.status();
    assert_eq!(status.refusals_total, 8);
    let why = &status.refusals[0].why;
    assert!(why.contains("but sent another command") && why.contains(&hostnqn(1)), "{why}");
}

/// Both queues prove themselves again and again, each time with another secret, while the I/O queue
/// is full of writes: nothing is lost, nothing waits for a proof, nobody reconnects.
#[test]
fn secrets_change_and_are_proven_under_load() {
    let (mut rig, store) = rig(Tls::Off);
    store.set_policy(policy(Hash::Sha384, DhGroup::Ffdhe2048));
    store.set(&hostnqn(1), keys(&[1], None));
    let prove = |rig: &mut Rig, queue: &Queue, n: u8| {
        authenticate(rig, queue, host(1, n, None)).unwrap_or_else(|e| panic!("secret {n}: {e}"));
    };
    let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
    let cntlid = done.cqe.dw0() as u16;
    prove(&mut rig, &admin, 1);
    rig.enable(&admin);
    let mut sqe = Sqe::new(9);
    sqe.cdw10.set(7);
    assert!(rig.command(&admin, sqe, Data::None).cqe.status().is_success());
    let (io, _) = rig.connect(1, SUBNQN, 1, cntlid);
    prove(&mut rig, &io, 1);
    for round in 2..=5u8 {
        store.set(&hostnqn(1), keys(&[round - 1, round], None));
        let stamp = |n: u64| u64::from(round) * 1000 + n;
        let ids: Vec<u64> = (0..100)
            .map(|n| {
                let (sqe, data) = write(n * 8, &pattern(stamp(n), 8 * BLOCK));
                io.send(sqe, data)
            })
            .collect();
        prove(&mut rig, &io, round);
        prove(&mut rig, &admin, round);
        // The old one ends, and with it nothing that is connected.
        store.set(&hostnqn(1), keys(&[round], None));
        for id in ids {
            assert!(rig.outcome(&io, id).cqe.status().is_success());
        }
        for n in 0..100 {
            assert!(
                rig.read(&io, n * 8, 8 * BLOCK) == pattern(stamp(n), 8 * BLOCK),
                "{round}, {n}"
            );
        }
    }
    assert_eq!(rig.target.connected(), (2, 1));
    assert_eq!(rig.target.status().refusals_total, 0);
    // The secret of before is none any more.
    assert!(authenticate(&mut rig, &admin, host(1, 4, None)).is_err());
    assert_eq!(rig.target.status().refusals_total, 1);
}

#[test]
fn the_wrong_secret_is_refused_and_explained() {
    let (mut rig, store) = rig(Tls::Off);
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    let error = authenticate(&mut rig, &admin, host(1, 2, None)).err().expect("the wrong secret");
    assert!(error.contains("authentication failed"), "{error}");
    let status = rig.command(&admin, property_get(0), Data::None).cqe.status();
    assert_eq!(status, Status::AUTHENTICATION_REQUIRED.dnr());
    rig.until("the end of the connection", || admin.is_over());
    let refusal = rig.target.status().refusals.pop().expect("one");
    assert!(refusal.why.contains("another secret than ours"), "{}", refusal.why);

    // The controller has none of its own.
    store.set(&hostnqn(1), keys(&[1], None));
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    assert!(authenticate(&mut rig, &admin, host(1, 1, Some(9))).is_err());
    let refusal = rig.target.status().refusals.pop().expect("one");
    assert!(refusal.why.contains("prove itself"), "{}", refusal.why);

    // Old and new secret at the same time, then the new one alone.
    for (secrets, takes) in [(&[1, 2][..], [true, true]), (&[2], [false, true])] {
        store.set(&hostnqn(1), keys(secrets, None));
        for (n, takes) in [1, 2].into_iter().zip(takes) {
            let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
            assert_eq!(authenticate(&mut rig, &admin, host(1, n, None)).is_ok(), takes, "{n}");
            admin.cut();
        }
    }
    // Who has none is not asked.
    let (_, done) = rig.connect(2, SUBNQN, 0, 0xffff);
    assert_eq!(done.cqe.dw0() & !0xffff, 0);
}

#[test]
fn a_listener_that_demands_authentication_takes_nobody_without_a_secret() {
    let store = Arc::new(KeyStore::default());
    store.set(&hostnqn(1), keys(&[1], None));
    store.set_policy(policy(Hash::Sha256, DhGroup::Null));
    let given = Arc::clone(&store);
    let mut rig = Rig::with(1, move |config: &mut TargetConfig| {
        config.ports[0].auth = AuthDemand::Required;
        config.keys = given;
    });
    for (n, subnqn) in [SUBNQN, nvme::spec::DISCOVERY_NQN].into_iter().enumerate() {
        let (_, done) = rig.connect(2, subnqn, 0, 0xffff);
        assert_eq!(done.cqe.status(), Status::CONNECT_INVALID_HOST.dnr());
        let why = rig.target.status().refusals[n].why.clone();
        assert!(why.contains(&hostnqn(2)) && why.contains("auth=required"), "{why}");
        assert!(why.contains("`penstock key generate --host"), "{why}");
    }
    let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
    assert_eq!(done.cqe.dw0() & !0xffff, ATR);
    authenticate(&mut rig, &admin, host(1, 1, None)).unwrap_or_else(|e| panic!("{e}"));
    rig.enable(&admin);
}

/// Names are no secret: who knows one must not be able to keep its host out.
#[test]
fn strangers_take_nothing_of_the_host_that_they_name() {
    const HANDSHAKES: usize = 6;

    let store = Arc::new(KeyStore::default());
    store.set(&hostnqn(1), keys(&[1], None));
    store.set_policy(policy(Hash::Sha256, DhGroup::Null));
    let mut rig = Rig::with(1, move |config: &mut TargetConfig| {
        config.keys = store;
        config.limits.handshake = Duration::from_secs(1 << 24);
        config.limits.handshakes_per_peer = HANDSHAKES;
        config.limits.controllers_per_host = 1;
        config.limits.controllers = 2;
        config.limits.connections_per_host = 2;
    });
    let mut strangers = Vec::new();
    for _ in 0..HANDSHAKES - 2 {
        let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
        assert_eq!((done.cqe.status(), done.cqe.dw0() & !0xffff), (Status::SUCCESS, ATR));
        strangers.push(admin);
    }
    let status = rig.target.status();
    assert!(status.controllers.is_empty() && status.hosts.is_empty(), "nobody is there yet");
    let prove = |rig: &mut Rig, queue: &Queue| {
        authenticate(rig, queue, host(1, 1, None)).unwrap_or_else(|e| panic!("{e}"));
    };
    let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
    let cntlid = done.cqe.dw0() as u16;
    prove(&mut rig, &admin);
    rig.enable(&admin);
    let mut sqe = Sqe::new(9);
    sqe.cdw10.set(7);
    assert!(rig.command(&admin, sqe, Data::None).cqe.status().is_success());
    assert_eq!(rig.target.status().controllers.len(), 1);
    // Nor does a queue of a stranger take the place of the host's.
    let (squatter, done) = rig.connect(1, SUBNQN, 1, cntlid);
    assert_eq!((done.cqe.status(), done.cqe.dw0() & !0xffff), (Status::SUCCESS, ATR));
    let (io, _) = rig.connect(1, SUBNQN, 1, cntlid);
    prove(&mut rig, &io);
    rig.write(&io, 3, &[7; BLOCK]);
    strangers.push(squatter);
    // What has not proven itself counts for its address.
    for _ in strangers.len()..HANDSHAKES {
        let discovery = nvme::spec::DISCOVERY_NQN;
        strangers.push(rig.connect(1, discovery, 0, 0xffff).0);
    }
    let refused = rig.connection();
    rig.until("the end of one too many", || refused.is_over());
    assert!(!strangers.iter().any(Queue::is_over));
    strangers.iter().for_each(Queue::cut);
    let target = Arc::clone(&rig.target);
    rig.until("the end of the strangers", || target.connected() == (2, 1));
    assert_eq!(rig.read(&io, 3, BLOCK), [7; BLOCK]);
}

#[test]
fn who_may_not_use_a_subsystem_is_told_of() {
    let mut rig = Rig::with(1, |config: &mut TargetConfig| {
        let only = nvme::spec::Nqn::new(&hostnqn(1)).expect("a name");
        config.subsystems[0].hosts = Some(vec![only]);
    });
    let (_, done) = rig.connect(2, SUBNQN, 0, 0xffff);
    assert_eq!(done.cqe.status(), Status::CONNECT_INVALID_HOST.dnr());
    let none = "nqn.2014-08.org.example:none";
    assert!(!rig.connect(1, none, 0, 0xffff).1.cqe.status().is_success());
    let said: Vec<String> = rig.target.status().refusals.into_iter().map(|r| r.why).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains(&hostnqn(2)) && said[0].contains("not among its hosts"), "{said:?}");
    assert!(said[1].contains(none) && said[1].contains("not on this listener"), "{said:?}");
}

#[test]
fn a_key_for_tls_is_made_where_it_can_be_used() {
    let (mut rig, store) = rig(Tls::Off);
    store.set_policy(policy(Hash::Sha384, DhGroup::Ffdhe2048));
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    let config = HostConfig { concatenation: Concatenation::New, ..host(1, 1, None) };
    assert!(authenticate(&mut rig, &admin, config).is_err());
    let why = rig.target.status().refusals.pop().expect("one").why;
    assert!(why.contains("a listener with tls=allowed"), "{why}");
}

#[test]
fn authentication_yields_a_key_for_tls() {
    let (mut rig, store) = rig(Tls::Allowed);
    store.set_policy(policy(Hash::Sha384, DhGroup::Ffdhe2048));
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    let config = HostConfig { concatenation: Concatenation::New, ..host(1, 1, None) };
    let outcome = authenticate(&mut rig, &admin, config).unwrap_or_else(|e| panic!("{e}"));
    let generated = outcome.generated.expect("a key");
    admin.cut();
    let psk = generated.psk(IdentityVersion::V1, &hostnqn(1), SUBNQN).expect("short names");
    assert!(psk.identity().starts_with("NVMe1G02 "));
    rig.psk = Some(psk);
    let host = rig.host(1, 1);
    rig.write(&host.io[0], 1, &[3; BLOCK]);
    assert_eq!(rig.read(&host.io[0], 1, BLOCK), [3; BLOCK]);
    // The key ends with the secret that it came from, whatever others the host has by then.
    store.set(&hostnqn(1), keys(&[1, 2], None));
    let again = rig.host(1, 1);
    assert_eq!(rig.read(&again.io[0], 1, BLOCK), [3; BLOCK]);
    store.set(&hostnqn(1), keys(&[2], None));
    let queue = rig.connection();
    rig.until("the end of the connection", || queue.is_over());
    assert_eq!(rig.read(&host.io[0], 1, BLOCK), [3; BLOCK]);
}

/// As Linux does that is not given a secret.
#[test]
fn who_goes_instead_of_authenticating_is_told_of_once() {
    let (mut rig, _store) = rig(Tls::Off);
    let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
    assert_eq!(done.cqe.dw0() & !0xffff, ATR);
    admin.cut();
    let target = Arc::clone(&rig.target);
    rig.until("the end of the association", || target.connected() == (0, 0));
    let status = rig.target.status();
    assert_eq!(status.refusals_total, 1);
    let why = &status.refusals[0].why;
    assert!(why.contains("did not go on with DH-HMAC-CHAP but closed the connection"), "{why}");
    assert!(why.contains(&hostnqn(1)) && why.contains("`penstock key export`"), "{why}");
    // A host that has proven itself goes without a word, and one that was refused is told of once.
    for (secret, total) in [(1, 1), (2, 2)] {
        let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
        assert_eq!(authenticate(&mut rig, &admin, host(1, secret, None)).is_ok(), secret == 1);
        admin.cut();
        let target = Arc::clone(&rig.target);
        rig.until("the end of the association", || target.connected() == (0, 0));
        assert_eq!(rig.target.status().refusals_total, total);
    }
}

#[test]
fn who_does_not_authenticate_in_time_is_cut_and_explained() {
    let (mut rig, _store) = rig_with(Tls::Off, Duration::from_secs(10));
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    rig.until("the end of the connection", || admin.is_over());
    let refusal = rig.target.status().refusals.pop().expect("one");
    let why = refusal.why;
    assert!(why.contains("did not go on with DH-HMAC-CHAP within 10 s"), "{why}");
    assert!(why.contains(&hostnqn(1)) && why.contains("`penstock key export`"), "{why}");
}

/// The time is for a step: what a slow host computes between two of them may take long.
#[test]
fn a_slow_host_has_the_time_for_each_step() {
    const SLOW: Duration = Duration::from_secs(8);

    let (mut rig, _store) = rig_with(Tls::Off, Duration::from_secs(10));
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    // Something else has to move meanwhile, for time to pass.
    let slow = |rig: &mut Rig| {
        let end = rig.world.now() + SLOW;
        let world = rig.world.clone();
        rig.until("some seconds", || world.now() >= end);
    };
    let begin = rig.world.now();
    let mut machine = dhchap::Host::new(host(1, 1, Some(9)), &[0x5a; ENTROPY_LEN]);
    while *machine.status() == dhchap::Status::Running {
        slow(&mut rig);
        assert!(!admin.is_over(), "{:?}", rig.target.status().refusals);
        if let Some(message) = machine.next_message() {
            let id = admin.send(auth_command(5, message.len()), Data::Capsule(message));
            assert!(rig.outcome(&admin, id).cqe.status().is_success());
        }
        let command = auth_command(6, MESSAGE_BYTES_MAX);
        let id = admin.send(command, Data::Reply(MESSAGE_BYTES_MAX));
        assert!(machine.on_message(&rig.outcome(&admin, id).reply).is_none(), "there is no group");
    }
    assert!(matches!(machine.status(), dhchap::Status::Done(_)), "no failure");
    assert!(rig.world.now() - begin > Duration::from_secs(15));
    // One that stops in the middle does not get more.
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    let mut machine = dhchap::Host::new(host(1, 1, Some(9)), &[0x5b; ENTROPY_LEN]);
    let message = machine.next_message().expect("the first");
    let id = admin.send(auth_command(5, message.len()), Data::Capsule(message));
    assert!(rig.outcome(&admin, id).cqe.status().is_success());
    let begin = rig.world.now();
    rig.until("the end of the connection", || admin.is_over());
    assert!(rig.world.now() - begin < Duration::from_secs(12));
}

#[test]
fn secrets_end_while_the_target_runs_and_that_is_said() {
    let (mut rig, store) = rig(Tls::Off);
    // The store's clock says 1,000.
    for (expires, is_live) in [(1_001, true), (1_000, false)] {
        let with_end = |n| HostDhchapKey { key: secret(n), expires: Some(expires) };
        let of_host = HostDhchapKey { key: secret(1), expires: None };
        store.set(
            &hostnqn(1),
            HostKeys {
                dhchap: vec![of_host],
                dhchap_controller: Some(with_end(9)),
                ..HostKeys::default()
            },
        );
        let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
        assert_eq!(authenticate(&mut rig, &admin, host(1, 1, Some(9))).is_ok(), is_live);
        store.set(&hostnqn(1), HostKeys { dhchap: vec![with_end(1)], ..HostKeys::default() });
        let (admin, done) = rig.connect(1, SUBNQN, 0, 0xffff);
        assert_eq!(done.cqe.dw0() & !0xffff, ATR, "one that has expired is no way around");
        assert_eq!(authenticate(&mut rig, &admin, host(1, 1, None)).is_ok(), is_live);
    }
    let said: Vec<String> = rig.target.status().refusals.into_iter().map(|r| r.why).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("the controller to prove itself, whose secret has expired"));
    assert!(said[1].contains(&format!("secret of host `{}` has expired", hostnqn(1))));
}

#[test]
fn hosts_that_offer_nothing_that_is_allowed_are_told_of_with_what_to_change() {
    let (mut rig, store) = rig(Tls::Off);
    for (allowed, expected) in [
        (policy(Hash::Sha512, DhGroup::Ffdhe2048), "--auth-hash"),
        (policy(Hash::Sha256, DhGroup::Ffdhe8192), "--auth-group"),
    ] {
        store.set_policy(allowed);
        let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
        let offer = HostConfig {
            hashes: vec![Hash::Sha256],
            groups: vec![DhGroup::Ffdhe2048],
            ..host(1, 1, None)
        };
        assert!(authenticate(&mut rig, &admin, offer).is_err());
        let why = rig.target.status().refusals.pop().expect("one").why;
        assert!(why.contains(&hostnqn(1)) && why.contains(expected), "{why}");
    }
}

#[test]
fn nobody_may_try_for_ever() {
    let (mut rig, _store) = rig(Tls::Off);
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    let junk = vec![0; 72];
    for _ in 0..5 {
        admin.send(auth_command(5, 72), Data::Capsule(junk.clone()));
    }
    rig.until("the end of the connection", || admin.is_over());
    let (admin, _) = rig.connect(1, SUBNQN, 0, 0xffff);
    for fctype in [5, 6] {
        let data = if fctype == 5 { Data::Capsule(vec![1; 8192]) } else { Data::Reply(16384) };
        let len = if fctype == 5 { 8192 } else { 16384 };
        let done = rig.command(&admin, auth_command(fctype, len), data);
        assert!(!done.cqe.status().is_success());
    }
}
