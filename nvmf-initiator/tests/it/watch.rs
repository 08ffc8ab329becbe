//! Paths that discovery controllers name, and that come and go with their logs.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crypto::dhchap::DhGroup;
use crypto::{DhchapKey, KeyHash, TlsKey};
use nvme::spec::discovery::SubsystemType;
use nvme::spec::{Nqn, NvmOpcode};
use nvme::subsys::discovery::DiscoveryEntry;
use nvmf_initiator::{
    Dhchap, PathState, Phase, RemoteConfig, Security, Tls, TlsKeys, Watch, WatchConfig,
};

use crate::fake::{Answer, Fake, SUBNQN, Script, is_op};
use crate::rig::{Rig, Setup, TARGET, nqn};

const SECOND: Duration = Duration::from_secs(1);

/// Where the target listens, in tests with several paths.
fn path(number: u8) -> SocketAddr {
    ([10, 0, 0, number], 4420).into()
}

/// A discovery controller's listener.
fn controller(number: u8) -> SocketAddr {
    ([10, 0, 1, number], 8009).into()
}

/// Entries for these paths of the target, and one of another subsystem.
fn entries(paths: &[u8]) -> Vec<DiscoveryEntry> {
    let other = nqn("nqn.2025-01.io.example:other");
    let tcp = |addr, nqn: Nqn| DiscoveryEntry::tcp(SubsystemType::NVM, addr, 1, nqn);
    let ours = paths.iter().map(|number| tcp(path(*number), nqn(SUBNQN)));
    ours.chain([tcp(path(99), other)]).collect()
}

fn referral(number: u8) -> DiscoveryEntry {
    DiscoveryEntry::referral(controller(number), 1, Nqn::discovery())
}

struct Bed {
    rig: Rig,
    watch: Watch,
    /// The controllers, each with the index of its core.
    controllers: Vec<(Rc<Fake>, usize)>,
    /// While it is set, writes are not answered.
    mute: Rc<Cell<bool>>,
}

impl Bed {
    /// A target with three paths, and a discovery controller for each of `logs`, of which the first
    /// is configured.
    fn start(logs: &[Vec<DiscoveryEntry>], always: &[SocketAddr]) -> Bed {
        Bed::start_secure(logs, always, Security::default())
    }

    /// The same with a watch that proves itself, and wants proof, so. The controllers know of nothing.
    fn start_secure(
        logs: &[Vec<DiscoveryEntry>],
        always: &[SocketAddr],
        security: Security,
    ) -> Bed {
        let mute = Rc::new(Cell::new(false));
        let muted = Rc::clone(&mute);
        let on_io = move |sqe: &_| match muted.get() && is_op(sqe, NvmOpcode::WRITE) {
            true => Answer::Silence,
            false => Answer::Good,
        };
        let script = Script { on_io: Box::new(on_io), fences: false, ..Script::default() };
        let paths: Vec<_> = always.iter().map(|addr| (*addr).into()).collect();
        let at_first = paths.clone();
        let config = move |config| RemoteConfig {
            paths: at_first.clone(),
            paths_change: true,
            command_timeout: 20 * SECOND,
            ..config
        };
        let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
        for number in 2..=3 {
            rig.fake.listen_at(path(number), &rig.cores[TARGET]);
        }
        let mut controllers = Vec::new();
        for (number, log) in (1..).zip(logs) {
            let (fake, core) = Fake::discovery(&rig.world, controller(number), log);
            rig.cores.push(core);
            controllers.push((fake, rig.cores.len() - 1));
        }
        let local = rig.cores[1].local();
        let host = (nqn("nqn.2025-01.io.example:host"), [7; 16]);
        let config = WatchConfig {
            always: paths,
            security,
            ..WatchConfig::new(vec![controller(1)], nqn(SUBNQN), host)
        };
        let (watch, task) = Watch::start(config, &[Arc::clone(&rig.volume)], &local).unwrap();
        rig.cores[1].spawn(task);
        Bed { rig, watch, controllers, mute }
    }

    fn tell(&self, number: usize, log: &[DiscoveryEntry]) {
        let (fake, core) = &self.controllers[number - 1];
        fake.tell(log, &self.rig.cores[*core]);
    }

    /// The paths that there are.
    fn paths(&self) -> Vec<PathState> {
        self.rig.state().paths.iter().filter(|path| !path.is_vacant).cloned().collect()
    }

    /// Runs until the live paths are these, and there are no others.
    fn until_paths(&mut self, numbers: &[u8]) {
        let mut wanted: Vec<SocketAddr> = numbers.iter().map(|number| path(*number)).collect();
        wanted.sort();
        self.rig.until(&format!("paths {numbers:?}"), |volume| {
            let state = volume.state();
            let there = state.paths.iter().filter(|path| !path.is_vacant);
            let mut there: Vec<_> = there.map(|path| (path.addr, path.is_live)).collect();
            there.sort();
            there.iter().all(|(_, is_live)| *is_live)
                && there.iter().map(|(addr, _)| *addr).eq(wanted.iter().copied())
        });
    }

    /// Runs until `condition` holds of the discovery controllers.
    fn until_watch(&mut self, what: &str, condition: impl Fn(&Watch) -> bool) {
        let watch = &self.watch;
        self.rig.until(what, |_| condition(watch));
    }
}

#[test]
fn paths_come_and_go_with_the_log_and_no_write_is_late_or_lost() {
    let mut bed = Bed::start(&[entries(&[1])], &[]);
    bed.until_paths(&[1]);
    let disk = bed.rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    bed.rig.wait_ok(&disk, 1);
    bed.tell(1, &entries(&[1, 2]));
    bed.until_paths(&[1, 2]);

    // A write is out on the first path when that is not named any more.
    bed.mute.set(true);
    disk.write(1, 0, &[2; 4096]);
    bed.rig.run_for(SECOND);
    bed.mute.set(false);
    let begin = bed.rig.world.now();
    bed.tell(1, &entries(&[2]));
    bed.until_paths(&[2]);
    // New I/O went the other way at once; this one waits until the controller has ended, as its
    // target ends nothing.
    disk.write(2, 8192, &[3; 4096]);
    bed.rig.wait_ok(&disk, 1);
    let took = bed.rig.world.now() - begin;
    assert!(took < 4 * SECOND, "{took:?}");
    bed.rig.wait_ok(&disk, 1);
    let took = bed.rig.world.now() - begin;
    assert!(took >= 10 * SECOND && took < 20 * SECOND, "{took:?}");
    {
        let disk = bed.rig.fake.disk.borrow();
        assert!(disk[..4096] == [2; 4096] && disk[8192..12288] == [3; 4096]);
    }
    assert_eq!(bed.rig.state().losses, 0, "a path that was left is not lost");

    // The next path gets the place, with another address.
    bed.tell(1, &entries(&[2, 3]));
    bed.until_paths(&[2, 3]);
    assert_eq!(bed.rig.state().paths.len(), 2);
    bed.tell(1, &entries(&[3]));
    bed.until_paths(&[3]);
    let commands = bed.rig.volume.path_counters()[0].commands;
    disk.write(3, 4096, &[4; 4096]);
    disk.read(4, 0, 4096);
    let done = bed.rig.wait_ok(&disk, 2);
    assert_eq!(crate::rig::bytes_of(&done[1]), [2; 4096]);
    assert_eq!(bed.rig.volume.path_counters()[0].commands, commands + 2);
    drop(bed.watch);
    bed.rig.volume.shutdown();
    bed.rig.until("the end", |volume| volume.wait_stopped(Duration::ZERO));
}

#[test]
fn idle_paths_are_left_in_order() {
    let mut bed = Bed::start(&[entries(&[1, 2])], &[]);
    bed.until_paths(&[1, 2]);
    let _disk = bed.rig.disk(1, 8);
    bed.rig.run_for(SECOND);
    let begin = bed.rig.world.now();
    bed.tell(1, &entries(&[2]));
    bed.until_paths(&[2]);
    assert!(bed.rig.world.now() - begin < 2 * SECOND);
    assert_eq!(bed.rig.fake.seen.get().shutdowns, 1);
    // Named again before its place is free: it gets another one.
    bed.tell(1, &entries(&[1, 2]));
    bed.until_paths(&[1, 2]);
}

#[test]
fn what_works_stays_while_nothing_else_does() {
    let mut bed = Bed::start(&[entries(&[1])], &[]);
    bed.until_paths(&[1]);
    let disk = bed.rig.disk(1, 8);
    // The log names no path: the one there is goes on.
    bed.tell(1, &entries(&[]));
    bed.rig.until("news", |volume| volume.state().paths.iter().all(|path| !path.is_wanted));
    bed.rig.run_for(60 * SECOND);
    disk.write(0, 0, &[1; 4096]);
    bed.rig.wait_ok(&disk, 1);
    // Named again.
    bed.tell(1, &entries(&[1]));
    bed.rig.until("news", |volume| volume.state().paths.iter().all(|path| path.is_wanted));
    // The controller is away.
    let (fake, core) = &bed.controllers[0];
    fake.stop(&bed.rig.cores[*core]);
    bed.until_watch("silence", |watch| !watch.state()[0].is_connected);
    bed.rig.run_for(60 * SECOND);
    assert_eq!(bed.paths().len(), 1);
    // Even a path that is lost meanwhile comes back.
    bed.rig.world.cut_all();
    disk.write(1, 0, &[2; 4096]);
    bed.rig.wait_ok(&disk, 1);
    assert!(bed.watch.state()[0].last_error.is_some());
    // Only a path that is neither named nor works is given up; I/O waits for another.
    let (fake, core) = &bed.controllers[0];
    fake.restart(&bed.rig.cores[*core]);
    bed.tell(1, &entries(&[]));
    bed.rig.until("news", |volume| volume.state().paths.iter().all(|path| !path.is_wanted));
    bed.rig.world.cut_all();
    bed.rig.until("no path", |volume| volume.state().paths.iter().all(|path| path.is_vacant));
    disk.read(2, 0, 4096);
    bed.rig.run_for(60 * SECOND);
    assert_eq!((disk.done(), bed.rig.state().phase), (0, Phase::Connecting));
    bed.tell(1, &entries(&[2]));
    bed.until_paths(&[2]);
    bed.rig.wait_ok(&disk, 1);
}

#[test]
fn referrals_are_followed_to_an_end() {
    // 1 refers to 2 and to itself, each to the next, the last to the first.
    let log = |number: u8, paths: &[u8]| {
        let mut log = entries(paths);
        log.extend([referral(number), referral(number % 6 + 1)]);
        log
    };
    let logs: Vec<_> = (1..=6).map(|number| log(number, &[number.min(3)])).collect();
    let mut bed = Bed::start(&logs, &[]);
    bed.until_paths(&[1, 2, 3]);
    let state = bed.watch.state();
    // No further than three referrals away.
    let found: Vec<_> = state.iter().map(|node| (node.addr, node.referred_by)).collect();
    assert_eq!(
        found,
        [
            (controller(1), None),
            (controller(2), Some(controller(1))),
            (controller(3), Some(controller(2))),
            (controller(4), Some(controller(3)))
        ]
    );
    // One that nobody refers to any more is forgotten, and those behind it.
    bed.tell(2, &entries(&[2]));
    bed.until_paths(&[1, 2]);
    assert_eq!(bed.watch.state().len(), 2);
    bed.tell(1, &entries(&[1]));
    bed.until_paths(&[1]);
    assert_eq!(bed.watch.state().len(), 1);
}

#[test]
fn configured_paths_stay_whatever_the_log_says() {
    let mut bed = Bed::start(&[entries(&[2])], &[path(1)]);
    bed.until_paths(&[1, 2]);
    bed.tell(1, &entries(&[3]));
    bed.until_paths(&[1, 3]);
    bed.tell(1, &entries(&[]));
    bed.until_paths(&[1]);
}

/// More paths than there are places for, named in any order: each in its turn.
#[test]
fn a_log_that_names_everything_is_bounded() {
    let many: Vec<u8> = (1..=60).collect();
    let mut bed = Bed::start(&[entries(&many)], &[]);
    bed.rig.until("places", |volume| volume.state().paths.len() == 16);
    let few: Vec<u8> = (40..=60).chain([3]).collect();
    bed.tell(1, &entries(&few));
    bed.rig.run_for(SECOND);
    bed.tell(1, &entries(&[3, 2]));
    bed.until_paths(&[2, 3]);
    assert_eq!(bed.rig.state().paths.len(), 16);
}

/// Who stands in for a discovery controller and has no key can say what it likes.
#[test]
fn nobody_without_the_key_can_name_a_path_to_a_host_with_tls() {
    let key = TlsKey::new(KeyHash::Sha256, &[7; 32]).unwrap();
    let security = Security { tls: Tls::Keys(TlsKeys::new(vec![key])), dhchap: None };
    let mut bed = Bed::start_secure(&[entries(&[1, 2])], &[path(3)], security);
    bed.until_paths(&[3]);
    bed.until_watch("an error", |watch| watch.state()[0].last_error.is_some());
    bed.rig.run_for(60 * SECOND);
    let state = bed.watch.state()[0].clone();
    assert!(!state.is_connected && state.genctr.is_none() && state.entries == 0, "{state:?}");
    assert!(state.last_error.unwrap().starts_with("TLS: "));
    assert_eq!(bed.paths().len(), 1);
    // Not a word was said to it in plaintext.
    assert_eq!(bed.controllers[0].0.seen.get().associations, 0);
}

#[test]
fn a_controller_that_does_not_prove_itself_names_no_path() {
    let secret = |n| DhchapKey::new(KeyHash::Sha256, &[n; 32]).unwrap();
    let dhchap = Dhchap { groups: vec![DhGroup::Null], ..Dhchap::new(secret(1)) };
    let mutual = Dhchap { controller_key: Some(secret(2)), ..dhchap.clone() };
    let security = |dhchap| Security { dhchap: Some(dhchap), ..Security::default() };
    let mut bed = Bed::start_secure(&[entries(&[1, 2])], &[path(3)], security(mutual));
    bed.until_paths(&[3]);
    bed.rig.run_for(60 * SECOND);
    let state = bed.watch.state()[0].clone();
    assert!(!state.is_connected && state.genctr.is_none(), "{state:?}");
    assert!(state.last_error.unwrap().starts_with("DH-HMAC-CHAP: "));
    assert_eq!(bed.paths().len(), 1);
    // A secret of the host is for controllers that ask for it.
    let mut bed = Bed::start_secure(&[entries(&[1])], &[], security(dhchap));
    bed.until_paths(&[1]);
}
