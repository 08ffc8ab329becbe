//! Several paths to a target that cannot end controllers when asked, so that time has to.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{IoError, Op};
use nvme::spec::{NvmOpcode, Status};
use nvme::subsys::ana::{AnaGroup, AnaState};
use nvmf_initiator::{Phase, RemoteConfig, RemoteVolume};

use crate::fake::{Answer, Script, is_op};
use crate::rig::{Rig, Setup, TARGET};

const SECOND: Duration = Duration::from_secs(1);
/// Keep alive twice, and some.
const FENCE: Duration = Duration::from_secs(15);

fn second() -> SocketAddr {
    ([10, 0, 0, 2], 4420).into()
}

/// Two paths, of which the first is taken. While `mute` is set, writes are not answered.
fn start(change: fn(RemoteConfig) -> RemoteConfig) -> (Rig, Rc<Cell<bool>>) {
    let (mut rig, mute) = start_first(change);
    rig.fake.listen_at(second(), &rig.cores[TARGET]);
    rig.until("both paths", |volume| volume.state().paths.iter().all(|path| path.is_live));
    (rig, mute)
}

/// The same without anybody who listens at the end of the second.
fn start_first(change: fn(RemoteConfig) -> RemoteConfig) -> (Rig, Rc<Cell<bool>>) {
    let mute = Rc::new(Cell::new(false));
    let muted = Rc::clone(&mute);
    let on_io = move |sqe: &_| match muted.get() && is_op(sqe, NvmOpcode::WRITE) {
        true => Answer::Silence,
        false => Answer::Good,
    };
    let script = Script { on_io: Box::new(on_io), fences: false, ..Script::default() };
    let config = move |mut config: RemoteConfig| {
        config.paths.push(second().into());
        change(RemoteConfig { command_timeout: 2 * SECOND, ..config })
    };
    let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
    set_ana(&rig, AnaState::Optimized);
    rig.until_live();
    (rig, mute)
}

/// On all paths.
fn set_ana(rig: &Rig, state: AnaState) {
    let group = AnaGroup { id: 1, state, change_count: 1 };
    let subsys = rig.fake.subsys.borrow().as_ref().clone().with_ana_groups(vec![group]).unwrap();
    *rig.fake.subsys.borrow_mut() = Arc::new(subsys);
    rig.cores[TARGET].handle().wake();
}

fn commands(volume: &RemoteVolume) -> Vec<u64> {
    volume.path_counters().iter().map(|path| path.commands).collect()
}

#[test]
fn a_write_goes_elsewhere_only_when_the_lost_controller_has_ended() {
    let (mut rig, mute) = start(|config| config);
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    assert_eq!(commands(&rig.volume), [1, 0]);
    mute.set(true);
    let begin = rig.world.now();
    disk.write(1, 0, &[2; 4096]);
    rig.until("the loss", |volume| volume.state().losses == 1);
    mute.set(false);
    // Nobody listens any more where the path was.
    rig.world.unlisten(rig.fake.addr);
    let lost = rig.world.now();
    // Others go on at once, on the other path.
    disk.write(2, 8192, &[3; 4096]);
    disk.read(3, 8192, 4096);
    rig.wait_ok(&disk, 2);
    assert!(rig.world.now() - lost < SECOND && lost - begin >= 2 * SECOND);
    assert_eq!(commands(&rig.volume)[1], 2);
    assert_eq!(rig.state().phase, Phase::Live);
    // Not given back, not even when asked for, while it may still be done.
    disk.abort();
    rig.run_for(FENCE - 2 * SECOND);
    assert_eq!(disk.done(), 0);
    let path = &rig.state().paths[0];
    assert!(!path.is_live && path.fenced < path.generation, "{path:?}");
    rig.wait_errors(&disk, 1, IoError::Aborted);
    let took = rig.world.now() - lost;
    assert!(took >= FENCE - SECOND && took < FENCE + SECOND, "{took:?}");
    // The same without an abort: it is done in the end.
    rig.fake.restart(&rig.cores[TARGET]);
    rig.until("both paths", |volume| volume.state().paths.iter().all(|path| path.is_live));
    mute.set(true);
    disk.write(4, 0, &[4; 4096]);
    rig.until("the loss", |volume| volume.state().losses == 2);
    mute.set(false);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow()[..4096] == [4; 4096]);
    rig.finish_all();
}

#[test]
fn after_the_loss_timeout_no_path_is_used_before_the_old_controllers_have_ended() {
    let change = |config| RemoteConfig { ctrl_loss_timeout: Some(3 * SECOND), ..config };
    let (mut rig, mute) = start_first(change);
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    mute.set(true);
    disk.write(1, 0, &[2; 4096]);
    rig.run_for(SECOND);
    rig.fake.stop(&rig.cores[TARGET]);
    let lost = rig.world.now();
    rig.wait_errors(&disk, 1, IoError::Gone);
    let took = rig.world.now() - lost;
    assert!(took >= 3 * SECOND && took < 5 * SECOND, "{took:?}");
    mute.set(false);
    // The second path comes up. It could be used, but for what the first may still do.
    rig.fake.listen_at(second(), &rig.cores[TARGET]);
    rig.until("the path", |volume| volume.state().paths[1].is_live);
    assert_eq!(rig.state().phase, Phase::Gone);
    rig.until_live();
    let took = rig.world.now() - lost;
    assert!(took >= FENCE - SECOND && took < FENCE + 6 * SECOND, "{took:?}");
    disk.write(2, 0, &[3; 4096]);
    rig.wait_ok(&disk, 1);
    rig.fake.restart(&rig.cores[TARGET]);
    rig.finish_all();
}

#[test]
fn ana_states_say_where_io_goes_and_when_it_waits() {
    let (mut rig, _) = start(|config| config);
    let disk = rig.disk(1, 8);
    let ana = |volume: &RemoteVolume| volume.state().paths[0].ana;
    for state in [AnaState::NonOptimized, AnaState::Optimized] {
        set_ana(&rig, state);
        rig.until("the state", |volume| ana(volume) == Some(state));
        disk.read(0, 0, 512);
        rig.wait_ok(&disk, 1);
    }
    // All paths inaccessible: I/O waits without an error, however long.
    set_ana(&rig, AnaState::Inaccessible);
    disk.write(1, 0, &[7; 4096]);
    rig.run_for(100 * SECOND);
    assert_eq!((disk.done(), rig.state().phase, rig.state().losses), (0, Phase::Connecting, 0));
    set_ana(&rig, AnaState::Optimized);
    rig.wait_ok(&disk, 1);
    // A change that does not end is a failure of the path.
    set_ana(&rig, AnaState::Change);
    rig.until("the loss", |volume| volume.state().losses > 0);
    assert!(rig.state().last_error.as_ref().unwrap().contains("ANA"), "{:?}", rig.state());
    set_ana(&rig, AnaState::Optimized);
    disk.read(2, 0, 512);
    rig.wait_ok(&disk, 1);
    // Lost for good on all paths: held I/O would be held for ever.
    set_ana(&rig, AnaState::PersistentLoss);
    disk.read(3, 0, 512);
    rig.wait_errors(&disk, 1, IoError::Gone);
}

/// The only namespace is attached to the controllers, or is not.
fn attach(rig: &Rig, is_attached: bool) {
    let subsys = rig.fake.subsys.borrow().as_ref().clone();
    let namespaces = match is_attached {
        true => vec![crate::fake::namespace(rig.fake.disk.borrow().len() as u64 / 512)],
        false => Vec::new(),
    };
    *rig.fake.subsys.borrow_mut() = Arc::new(subsys.with_namespaces(namespaces).unwrap());
    rig.cores[TARGET].handle().wake();
}

#[test]
fn io_waits_for_a_namespace_that_is_detached() {
    let (mut rig, _) = start(|config| config);
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    for round in 0..2 {
        attach(&rig, false);
        // Sent before anybody here knows, and after.
        disk.write(1, 0, &[2 + round; 4096]);
        rig.until("news", |volume| volume.state().paths.iter().all(|path| path.is_detached));
        disk.read(2, 0, 4096);
        rig.run_for(100 * SECOND);
        let state = rig.state();
        assert_eq!((disk.done(), state.phase, state.losses), (0, Phase::Connecting, 0));
        attach(&rig, true);
        let done = rig.wait_ok(&disk, 2);
        assert_eq!(crate::rig::bytes_of(&done[1]), [2 + round; 4096]);
        assert_eq!(rig.state().losses, 0);
        assert!(rig.state().paths.iter().all(|path| !path.is_detached));
    }
    rig.finish_all();
}

#[test]
fn io_to_a_detached_namespace_fails_after_the_loss_timeout() {
    let (mut rig, _) =
        start(|config| RemoteConfig { ctrl_loss_timeout: Some(3 * SECOND), ..config });
    let disk = rig.disk(1, 8);
    attach(&rig, false);
    let begin = rig.world.now();
    disk.read(0, 0, 4096);
    rig.wait_errors(&disk, 1, IoError::Gone);
    let took = rig.world.now() - begin;
    assert!(took >= 3 * SECOND && took < 4 * SECOND, "{took:?}");
    attach(&rig, true);
    rig.until_live();
    disk.read(1, 0, 4096);
    rig.wait_ok(&disk, 1);
}

#[test]
fn a_refused_io_is_done_on_the_other_path() {
    let (mut rig, _) = start(|config| config);
    let disk = rig.disk(1, 8);
    for status in [Status::INTERNAL_PATH_ERROR, Status::ANA_TRANSITION, Status::INTERNAL_ERROR] {
        let before = commands(&rig.volume);
        let mut left = 1;
        rig.fake.script.borrow_mut().on_io = Box::new(move |_| {
            left -= 1;
            if left == 0 { Answer::Status(status) } else { Answer::Good }
        });
        let begin = rig.world.now();
        disk.op(0, Op::Flush, 0, 0);
        rig.wait_ok(&disk, 1);
        assert!(rig.world.now() - begin < Duration::from_millis(5), "{status}: it waited");
        let after = commands(&rig.volume);
        assert_eq!((after[0] - before[0], after[1] - before[1]), (1, 1), "{status}");
    }
    rig.finish_all();
}
