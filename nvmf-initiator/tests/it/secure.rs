//! The end of TLS, as both ends say and hear it, and authentications that are asked for.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crypto::dhchap::DhGroup;
use crypto::{DhchapKey, KeyHash, TlsKey};
use nvmf_initiator::{Dhchap, Phase, RemoteConfig, RemoteVolume, Security, Tls, TlsKeys};

use crate::fake::{self, Script, Sealed};
use crate::rig::{Rig, Setup, TARGET, bytes_of, pattern};

pub fn key() -> TlsKey {
    TlsKey::new(KeyHash::Sha256, &[1; 32]).unwrap()
}

/// The target has our key, and we have it.
pub fn with_tls(change: impl Fn(RemoteConfig) -> RemoteConfig + 'static) -> Setup {
    let config = move |config| {
        let tls = Tls::Keys(TlsKeys::new(vec![key()]));
        change(RemoteConfig { security: Security { tls, dhchap: None }, ..config })
    };
    Setup { tls: Some(fake::Tls::new(vec![key()])), config: Box::new(config), ..Setup::default() }
}

fn last_error(rig: &Rig) -> String {
    rig.state().last_error.clone().unwrap_or_default()
}

/// Connections whose end the target has seen: with the end of TLS, and without.
fn ends(rig: &Rig) -> (u64, u64) {
    let seen = rig.fake.seen.get();
    (seen.tls_ends, seen.tls_cuts)
}

#[test]
fn a_host_that_ends_in_order_says_so() {
    let mut rig = with_tls(|config| config).start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &pattern(1, 65_536));
    disk.read(1, 0, 65_536);
    rig.wait_ok(&disk, 2);
    disk.close();
    rig.run_for(Duration::from_millis(100));
    let before = ends(&rig);
    rig.volume.shutdown();
    rig.until("the end", |volume| volume.wait_stopped(Duration::ZERO));
    rig.run_for(Duration::from_millis(100));
    assert_eq!(ends(&rig), (before.0 + 1, before.1), "the admin queue");
    assert_eq!((rig.state().losses, last_error(&rig)), (0, String::new()));
}

/// A path that is left has nothing more to say on any of its queues, and says that.
#[test]
fn a_path_that_is_left_is_left_in_order() {
    let second: SocketAddr = ([10, 0, 0, 2], 4420).into();
    let change = move |mut config: RemoteConfig| {
        config.paths.push(second.into());
        RemoteConfig { paths_change: true, ..config }
    };
    let mut setup = with_tls(change);
    setup.script = Script { fences: false, ..Script::default() };
    let mut rig = setup.start();
    rig.fake.listen_at(second, &rig.cores[TARGET]);
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &pattern(1, 4096));
    rig.wait_ok(&disk, 1);
    rig.until("both paths", |volume| volume.state().paths.iter().all(|path| path.is_live));
    rig.run_for(Duration::from_millis(100));
    rig.volume.set_paths(&[rig.fake.addr.into()]).unwrap();
    rig.until("a vacant place", |volume| volume.state().paths[1].is_vacant);
    rig.run_for(Duration::from_millis(100));
    assert_eq!(ends(&rig), (2, 0), "an admin queue and an I/O queue");
    disk.read(1, 0, 4096);
    let done = rig.wait_ok(&disk, 1);
    assert!(bytes_of(&done[0]) == pattern(1, 4096));
    assert_eq!(rig.state().losses, 0);
    rig.finish();
}

/// An end inside TLS is one, whatever becomes of the connection; an end of the connection alone may
/// have been made by anybody on the way.
#[test]
fn an_end_in_order_is_told_apart_from_a_cut() {
    let mut rig = with_tls(|config| config).start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &pattern(1, 4096));
    rig.wait_ok(&disk, 1);
    rig.fake.part(&rig.cores[TARGET]);
    rig.until("the loss", |volume| volume.state().losses == 1);
    let why = last_error(&rig);
    assert!(why.ends_with("the controller closed the connection"), "{why}");
    rig.until_live();
    disk.read(1, 0, 4096);
    rig.wait_ok(&disk, 1);
    rig.fake.stop(&rig.cores[TARGET]);
    rig.until("the loss", |volume| volume.state().losses == 2);
    let why = rig.state().paths[0].last_error.clone().unwrap();
    assert!(why.contains("without the end of TLS (close_notify)"), "{why}");
    rig.fake.restart(&rig.cores[TARGET]);
    disk.read(2, 0, 4096);
    let done = rig.wait_ok(&disk, 1);
    assert!(bytes_of(&done[0]) == pattern(1, 4096));
    rig.finish();
}

/// What somebody puts behind the end of TLS is ignored, whatever it is: it is no fault of the target.
#[test]
fn what_follows_the_end_of_tls_is_not_heard() {
    let setup = with_tls(|config| config);
    let tls = Rc::clone(setup.tls.as_ref().unwrap());
    let mut rig = setup.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &pattern(1, 4096));
    rig.wait_ok(&disk, 1);
    *tls.meddler.borrow_mut() = Some(Box::new(move |what, session, bytes| {
        if let (Sealed::Io, Some(session)) = (what, session) {
            session.close(bytes);
            bytes.extend([0x17; 5000]);
        }
    }));
    disk.read(1, 0, 4096);
    let read = rig.wait_ok(&disk, 1);
    assert!(bytes_of(&read[0]) == pattern(1, 4096), "what came before counts");
    rig.until("the loss", |volume| volume.state().losses == 1);
    *tls.meddler.borrow_mut() = None;
    let why = last_error(&rig);
    assert!(why.ends_with("the controller closed the connection"), "{why}");
    disk.read(2, 0, 4096);
    rig.wait_ok(&disk, 1);
    assert_eq!(rig.state().generation, 2);
    rig.finish();
}

/// A target that goes on without reading does not keep the host from its end.
#[test]
fn a_target_that_does_not_read_holds_nobody() {
    let mut setup = with_tls(|config| config);
    let early = Some(nvme::spec::Status::CAPACITY_EXCEEDED.dnr());
    setup.script = Script { early, ..Script::default() };
    let mut rig = setup.start();
    let disk = rig.disk(1, 8);
    // More than the network holds: a part of it waits in the host.
    disk.write(0, 0, &[1; 1 << 20]);
    rig.run_for(Duration::from_secs(3));
    assert_eq!(disk.done(), 0);
    let begin = rig.world.now();
    rig.volume.shutdown();
    rig.until("the end of the I/O", |_| disk.done() == 1);
    rig.until("the end", |volume| volume.wait_stopped(Duration::ZERO));
    assert!(rig.world.now() - begin < Duration::from_secs(10));
}

fn secret() -> DhchapKey {
    DhchapKey::new(KeyHash::Sha256, &[5; 32]).unwrap()
}

/// What is asked for while an authentication is under way is not taken for answered by it: the
/// controller has chosen its keys when that began. Asked for at each of its four commands (the
/// Negotiate, the Receive of the challenge, the Reply, the Receive of the result), which have come to
/// the controller and are not answered yet; in the first authentication of a connection, and in a
/// later one.
#[test]
fn an_authentication_asked_for_during_another_follows_it() {
    for qid in [0, 1] {
        for moment in 0..4 {
            for is_first in [true, false] {
                asked_for_during_another(qid, moment, is_first);
            }
        }
    }
}

fn asked_for_during_another(qid: u16, moment: u32, is_first: bool) {
    let what = format!("queue {qid}, command {moment}, first {is_first}");
    let volume = Rc::new(RefCell::new(Weak::<RemoteVolume>::new()));
    let (is_armed, count) = (Rc::new(Cell::new(is_first)), Cell::new(0));
    let (asked, armed) = (Rc::clone(&volume), Rc::clone(&is_armed));
    let on_auth = move |of: u16| {
        if of != qid || !armed.get() {
            return;
        }
        if count.replace(count.get() + 1) == moment {
            armed.set(false);
            asked.borrow().upgrade().unwrap().reauthenticate();
        }
    };
    let config = |config| {
        let dhchap = Dhchap { groups: vec![DhGroup::Null], ..Dhchap::new(secret()) };
        RemoteConfig { security: Security { tls: Tls::Off, dhchap: Some(dhchap) }, ..config }
    };
    let on_auth = Box::new(on_auth);
    let script = Script { secret: Some(secret()), on_auth, ..Script::default() };
    let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
    *volume.borrow_mut() = Arc::downgrade(&rig.volume);
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    let mut expected = 2;
    if !is_first {
        is_armed.set(true);
        rig.volume.reauthenticate();
        expected = 3;
    }
    rig.run_for(Duration::from_secs(2));
    assert!(!is_armed.get(), "{what}: nothing was asked for");
    let begun = rig.fake.authentications.borrow()[&qid];
    assert_eq!(begun, expected, "{what}: {:?}", rig.fake.authentications.borrow());
    assert_eq!((rig.state().losses, rig.state().phase), (0, Phase::Live), "{what}");
    disk.read(1, 0, 4096);
    rig.wait_ok(&disk, 1);
    rig.finish();
}
