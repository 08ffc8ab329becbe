//! Lost paths: what is held, resent, retried, aborted, given up.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{IoError, Op, Volume};
use nvme::fabrics::ConnectReject;
use nvme::spec::{NvmOpcode, Status};
use nvme::subsys::Limits;
use nvmf_initiator::{Phase, RemoteConfig};

use crate::fake::{self, Answer, Script, is_op};
use crate::rig::{Rig, Setup, TARGET, bytes_of, pattern};

const SECOND: Duration = Duration::from_secs(1);

/// Answers the first `times` commands with `answer`.
fn first(times: u64, answer: impl Fn() -> Answer + 'static) -> Script {
    let mut left = times;
    let on_io = move |_: &_| {
        if left == 0 {
            return Answer::Good;
        }
        left -= 1;
        answer()
    };
    Script { on_io: Box::new(on_io), ..Script::default() }
}

#[test]
fn io_is_held_while_the_target_is_away() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 16);
    disk.write(0, 0, &pattern(1, 8192));
    rig.wait_ok(&disk, 1);
    rig.fake.stop(&rig.cores[TARGET]);
    rig.until("the loss", |volume| volume.state().phase == Phase::Connecting);
    for tag in 0..8 {
        disk.write(tag, tag * 8192, &pattern(tag, 8192));
    }
    disk.op(8, Op::Flush, 0, 0);
    disk.read(9, 0, 512);
    rig.run_for(30 * SECOND);
    assert_eq!(disk.done(), 0, "reported done without a target");
    assert_eq!(rig.volume.counters().in_flight, 10);
    let state = rig.state();
    assert_eq!((state.phase, state.losses), (Phase::Connecting, 1));
    assert!(state.last_error.as_ref().unwrap().contains("refused"), "{state:?}");
    assert!(state.attempts < 30, "no back-off: {state:?}");
    rig.fake.restart(&rig.cores[TARGET]);
    rig.wait_ok(&disk, 10);
    for tag in 0..8 {
        assert!(rig.fake.disk.borrow()[tag as usize * 8192..][..8192] == pattern(tag, 8192));
    }
    assert_eq!(rig.state().generation, 2);
    assert_eq!(rig.fake.seen.get().flushes, 1);
    rig.finish();
}

#[test]
fn io_submitted_before_the_target_exists_waits_for_it() {
    let mut rig = Setup::default().start();
    rig.fake.stop(&rig.cores[TARGET]);
    let disk = rig.disk(1, 4);
    disk.write(0, 4096, &pattern(3, 4096));
    rig.run_for(3 * SECOND);
    assert_eq!((disk.done(), rig.state().generation), (0, 0));
    let error = rig.volume.wait_ready(Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("10.0.0.1:4420") && error.contains("refused"), "{error}");
    rig.fake.restart(&rig.cores[TARGET]);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow()[4096..8192] == pattern(3, 4096));
    rig.finish();
}

/// Cuts every connection when the n-th I/O command arrives, for each n.
#[test]
fn a_cut_in_the_middle_of_anything_is_invisible() {
    for cut_at in 0..12u64 {
        let script = Script {
            c2h_bytes: 4096,
            r2t_bytes: 4096,
            delay_max: Duration::from_micros(200),
            ..Script::default()
        };
        let mut rig = Setup { seed: cut_at + 1, script, ..Setup::default() }.start();
        let world = rig.world.clone();
        let mut count = 0;
        rig.fake.script.borrow_mut().on_io = Box::new(move |_| {
            count += 1;
            if count == cut_at {
                world.cut_all();
            }
            Answer::Good
        });
        let disk = rig.disk(1, 16);
        for tag in 0..6 {
            disk.write(tag, tag * 65_536, &pattern(tag + 100, 40_960));
        }
        disk.op(6, Op::Flush, 0, 0);
        rig.wait_ok(&disk, 7);
        for tag in 0..6 {
            disk.read(tag, tag * 65_536, 40_960);
        }
        for (tag, io) in rig.wait_ok(&disk, 6).iter().enumerate() {
            assert!(bytes_of(io) == pattern(tag as u64 + 100, 40_960), "cut {cut_at} read {tag}");
        }
        assert_eq!(rig.state().losses, u64::from(cut_at > 0));
        rig.finish();
    }
}

#[test]
fn statuses_that_may_be_retried_are() {
    for status in [
        Status::NAMESPACE_NOT_READY,
        Status::COMMAND_INTERRUPTED,
        Status::TRANSIENT_TRANSPORT_ERROR,
        Status::INTERNAL_ERROR,
        Status::ANA_TRANSITION,
        Status::INTERNAL_PATH_ERROR,
    ] {
        let script = first(5, move || Answer::Status(status));
        let mut rig = Setup { script, ..Setup::default() }.start();
        let disk = rig.disk(1, 4);
        rig.until_live();
        let start = rig.world.now();
        disk.write(0, 0, &[9; 4096]);
        rig.wait_ok(&disk, 1);
        let took = rig.world.now() - start;
        assert!(took > Duration::from_millis(600), "{status}: retried without delay, {took:?}");
        assert!(rig.fake.disk.borrow()[..4096] == [9; 4096]);
        let counters = rig.volume.counters();
        assert_eq!((counters.retries, counters.losses), (5, 0), "{status}");
        rig.finish();
    }
}

#[test]
fn retries_end_and_final_statuses_are_not_retried() {
    for (status, error, commands) in [
        (Status::NAMESPACE_NOT_READY, IoError::Medium, 4),
        (Status::INTERNAL_ERROR.dnr(), IoError::Medium, 1),
        (Status::UNRECOVERED_READ_ERROR, IoError::Medium, 1),
        (Status::LBA_OUT_OF_RANGE.dnr(), IoError::OutOfRange, 1),
        (Status::NAMESPACE_IS_WRITE_PROTECTED, IoError::ReadOnly, 1),
        (Status::CAPACITY_EXCEEDED.dnr(), IoError::NoSpace, 1),
        (Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), IoError::Gone, 4),
        (Status::INVALID_FIELD_IN_COMMAND.dnr(), IoError::Medium, 4),
        (Status::ANA_PERSISTENT_LOSS, IoError::Gone, 4),
    ] {
        let script = first(u64::MAX, move || Answer::Status(status));
        let config = |config| RemoteConfig { retries_max: 3, ..config };
        let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
        let disk = rig.disk(1, 4);
        disk.write(0, 0, &[9; 65_536]);
        rig.wait_errors(&disk, 1, error);
        let counters = rig.volume.counters();
        assert_eq!((counters.commands, counters.losses), (commands, 0), "{status}");
        rig.finish();
    }
}

/// One part of a split request fails: the request fails once, when all its parts are back.
#[test]
fn one_part_of_many_fails() {
    let mut count = 0;
    let on_io = move |_: &_| {
        count += 1;
        if count == 5 { Answer::Status(Status::WRITE_FAULT) } else { Answer::Good }
    };
    let script =
        Script { on_io: Box::new(on_io), delay_max: Duration::from_millis(1), ..Script::default() };
    let limits = Limits { mdts_bytes: 8192, ..Limits::default() };
    let config = |config| RemoteConfig { queue_depth: 4, ..config };
    let setup = Setup { script, limits, config: Box::new(config), ..Setup::default() };
    let mut rig = setup.start();
    let disk = rig.disk(1, 4);
    disk.write(0, 0, &[9; 1 << 20]);
    rig.wait_errors(&disk, 1, IoError::Medium);
    assert!(rig.volume.counters().commands < 20, "the rest was sent in vain");
    disk.write(0, 0, &[8; 1 << 20]);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow()[..1 << 20].iter().all(|byte| *byte == 8));
    rig.finish();
}

#[test]
fn a_command_without_an_answer_ends_the_association() {
    let script = first(1, || Answer::Silence);
    let config = |config| RemoteConfig { command_timeout: 10 * SECOND, ..config };
    let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
    let disk = rig.disk(1, 4);
    rig.until_live();
    let start = rig.world.now();
    disk.write(0, 0, &[3; 8192]);
    disk.write(1, 8192, &[4; 8192]);
    rig.wait_ok(&disk, 2);
    let took = rig.world.now() - start;
    assert!(took >= 10 * SECOND && took < 12 * SECOND, "{took:?}");
    let state = rig.state();
    assert_eq!(state.losses, 1);
    assert!(state.last_error.as_ref().unwrap().contains("not answered within 10s"), "{state:?}");
    assert!(rig.fake.disk.borrow()[..8192] == [3; 8192]);
    // The second was answered, so it was not sent again.
    assert_eq!(rig.volume.counters().resends, 1);
    rig.finish();
}

/// The I/O queue is well, and goes down with the association all the same: reset, so that nothing
/// of it is sent any more.
#[test]
fn a_keep_alive_without_an_answer_ends_the_association() {
    let script = Script { fences: false, ..Script::default() };
    let mut rig = Setup { script, ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    rig.fake.script.borrow_mut().is_admin_mute = true;
    rig.fake.script.borrow_mut().refuse = Some(ConnectReject::BUSY);
    rig.until("the loss", |volume| volume.state().losses == 1);
    assert!(rig.state().last_error.as_ref().unwrap().contains("Keep Alive"), "{:?}", rig.state());
    rig.run_for(Duration::from_millis(1));
    let seen = rig.fake.seen.get();
    assert_eq!((seen.io_resets, seen.io_ends), (1, 0));
    rig.fake.script.borrow_mut().is_admin_mute = false;
    rig.fake.script.borrow_mut().refuse = None;
    rig.until_live();
    assert_eq!(rig.state().generation, 2);
    rig.finish();
}

/// A write is over when it is answered and its memory is not sent from any more: before that, a new
/// owner of the memory would find it on its way to the controller.
#[test]
fn memory_still_being_sent_is_not_given_back() {
    let early = Some(Status::CAPACITY_EXCEEDED.dnr());
    for is_cut in [false, true] {
        let script = Script { early, ..Script::default() };
        let mut rig = Setup { script, ..Setup::default() }.start();
        let disk = rig.disk(1, 8);
        disk.write(0, 0, &[1; 1 << 20]);
        rig.run_for(3 * SECOND);
        assert_eq!(disk.done(), 0, "given back while it is being sent");
        if is_cut {
            rig.world.cut_all();
        } else {
            rig.fake.read_on(&rig.cores[TARGET]);
        }
        rig.wait_errors(&disk, 1, IoError::NoSpace);
        rig.fake.script.borrow_mut().early = None;
        disk.write(0, 0, &[2; 1 << 20]);
        rig.wait_ok(&disk, 1);
        assert!(rig.fake.disk.borrow()[..1 << 20].iter().all(|byte| *byte == 2));
        rig.finish();
    }
}

/// As above, when it is the channel that ends the connection: it waits until the kernel has let go.
#[test]
fn memory_of_a_lost_path_is_given_back_when_the_kernel_has_let_go() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    drop(rig.wait_ok(&disk, 1));
    let local = rig.cores[1].local();
    let free = local.pool().available();
    {
        let mut script = rig.fake.script.borrow_mut();
        script.early = Some(Status::CAPACITY_EXCEEDED.dnr());
        script.is_admin_mute = true;
        script.refuse = Some(ConnectReject::BUSY);
    }
    disk.expect_free(free);
    disk.write(0, 0, &[1; 1 << 20]);
    rig.until("the loss", |volume| volume.state().losses == 1);
    rig.wait_errors(&disk, 1, IoError::NoSpace);
    rig.fake.script.borrow_mut().is_admin_mute = false;
    rig.fake.script.borrow_mut().refuse = None;
    rig.finish();
}

#[test]
fn all_queues_go_down_and_come_back_together() {
    let config = |config| RemoteConfig { queues: 2, ..config };
    let mut rig = Setup { hosts: 2, config: Box::new(config), ..Setup::default() }.start();
    let disks = [rig.disk(1, 8), rig.disk(2, 8)];
    let is_closing = Rc::new(Cell::new(false));
    let closes = Rc::clone(&is_closing);
    rig.fake.script.borrow_mut().on_io =
        Box::new(move |_| if closes.take() { Answer::Close } else { Answer::Good });
    for (i, disk) in disks.iter().enumerate() {
        disk.write(0, i as u64 * 4096, &[1; 4096]);
        rig.wait_ok(disk, 1);
    }
    // One queue's connection is closed under one command; the other queue's I/O goes on afterwards.
    is_closing.set(true);
    disks[0].write(0, 0, &[2; 4096]);
    rig.wait_ok(&disks[0], 1);
    disks[1].write(0, 4096, &[3; 4096]);
    rig.wait_ok(&disks[1], 1);
    let seen = rig.fake.seen.get();
    assert_eq!((seen.associations, seen.io_connects), (2, 4));
    assert_eq!((rig.state().generation, rig.state().losses), (2, 1));
    assert!(rig.state().last_error.as_ref().unwrap().starts_with("I/O queue 1: "));
    rig.finish();
}

#[test]
fn the_controller_loss_timeout_fails_what_is_held_until_the_target_is_back() {
    let config = |config| RemoteConfig { ctrl_loss_timeout: Some(20 * SECOND), ..config };
    let mut rig = Setup { config: Box::new(config), ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    // Short losses do not add up.
    for _ in 0..5 {
        rig.fake.stop(&rig.cores[TARGET]);
        rig.run_for(6 * SECOND);
        rig.fake.restart(&rig.cores[TARGET]);
        disk.write(0, 0, &[2; 4096]);
        rig.wait_ok(&disk, 1);
    }
    rig.fake.stop(&rig.cores[TARGET]);
    let start = rig.world.now();
    for tag in 0..4 {
        disk.write(tag, 0, &[3; 4096]);
    }
    rig.wait_errors(&disk, 4, IoError::Gone);
    let took = rig.world.now() - start;
    assert!(took >= 19 * SECOND && took < 21 * SECOND, "{took:?}");
    assert_eq!(rig.state().phase, Phase::Gone);
    // New I/O fails at once.
    let start = rig.world.now();
    disk.read(0, 0, 512);
    rig.wait_errors(&disk, 1, IoError::Gone);
    assert!(rig.world.now() - start < SECOND / 10);
    rig.fake.restart(&rig.cores[TARGET]);
    rig.until_live();
    disk.read(0, 0, 512);
    let done = rig.wait_ok(&disk, 1);
    assert_eq!(bytes_of(&done[0]), [2; 512]);
    rig.finish();
}

/// With a time-out of nothing I/O fails as soon as no path is left, but not while the first one is
/// set up; the way back is looked for all the same.
#[test]
fn without_a_controller_loss_timeout_io_fails_at_once() {
    let script = Script { refuse: Some(ConnectReject::UNKNOWN_SUBSYSTEM), ..Script::default() };
    let config = |config| RemoteConfig { ctrl_loss_timeout: Some(Duration::ZERO), ..config };
    let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
    rig.run_for(10 * SECOND);
    assert_eq!(rig.state().phase, Phase::Connecting, "nothing has gone yet");
    rig.fake.script.borrow_mut().refuse = None;
    rig.until_live();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    for round in 2..4 {
        // One that is out, and one that comes later.
        rig.fake.script.borrow_mut().on_io = Box::new(|_| Answer::Silence);
        disk.write(0, 0, &[9; 4096]);
        rig.run_for(SECOND / 10);
        rig.fake.stop(&rig.cores[TARGET]);
        let start = rig.world.now();
        rig.wait_errors(&disk, 1, IoError::Gone);
        disk.read(1, 0, 512);
        rig.wait_errors(&disk, 1, IoError::Gone);
        assert!(rig.world.now() - start < SECOND / 10);
        assert_eq!(rig.state().phase, Phase::Gone);
        rig.fake.script.borrow_mut().on_io = Box::new(|_| Answer::Good);
        rig.fake.restart(&rig.cores[TARGET]);
        rig.until_live();
        disk.write(0, 0, &[round; 4096]);
        rig.wait_ok(&disk, 1);
    }
    rig.finish();
}

/// The admin queue comes up each time, the I/O queue never: that is no association worth its name.
#[test]
fn an_io_queue_that_is_always_refused_counts_as_loss() {
    let script = Script { refuse_io: Some(ConnectReject::INVALID_HOST), ..Script::default() };
    let config = |config| RemoteConfig { ctrl_loss_timeout: Some(20 * SECOND), ..config };
    let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    disk.read(0, 0, 512);
    rig.wait_errors(&disk, 1, IoError::Gone);
    let state = rig.state();
    assert!(state.last_error.as_ref().unwrap().contains("CONNECT_INVALID_HOST"), "{state:?}");
    assert!(state.attempts < 20, "no back-off: {state:?}");
    rig.fake.script.borrow_mut().refuse_io = None;
    // It fails until an association is up.
    rig.run_for(10 * SECOND);
    disk.read(0, 0, 512);
    rig.wait_ok(&disk, 1);
    rig.finish();
}

#[test]
fn a_refused_association_says_why_and_is_tried_again() {
    let script = Script { refuse: Some(ConnectReject::UNKNOWN_SUBSYSTEM), ..Script::default() };
    let mut rig = Setup { script, ..Setup::default() }.start();
    rig.run_for(10 * SECOND);
    let error = rig.volume.wait_ready(Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("no such subsystem"), "{error}");
    rig.fake.script.borrow_mut().refuse = None;
    rig.until_live();
    rig.finish();
}

#[test]
fn abort_gives_back_what_is_held_and_nothing_else() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 8);
    rig.until_live();
    // On a live path, what is sent stays.
    let is_silent = Rc::new(Cell::new(true));
    let silent = Rc::clone(&is_silent);
    rig.fake.script.borrow_mut().on_io =
        Box::new(move |_| if silent.get() { Answer::Silence } else { Answer::Good });
    disk.write(0, 0, &[1; 4096]);
    rig.run_for(SECOND);
    disk.abort();
    rig.run_for(SECOND);
    assert_eq!(disk.done(), 0);
    // It is given back when the path is lost, instead of being held.
    disk.write(1, 4096, &[2; 4096]);
    rig.run_for(SECOND);
    is_silent.set(false);
    rig.fake.stop(&rig.cores[TARGET]);
    let done = rig.wait(&disk, 1);
    assert_eq!((done[0].tag, done[0].result), (0, Err(IoError::Aborted)));
    // What came after the abort is held, until it is aborted too.
    disk.write(2, 8192, &[3; 4096]);
    rig.run_for(SECOND);
    assert_eq!(disk.done(), 0);
    disk.abort();
    rig.wait_errors(&disk, 2, IoError::Aborted);
    disk.write(3, 8192, &[4; 4096]);
    rig.fake.restart(&rig.cores[TARGET]);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow()[..8192].iter().all(|byte| *byte == 0), "aborted, then sent");
    rig.finish();
}

/// What was sent on the lost association may still be executed by a target that does not end it
/// when asked.
#[test]
fn nothing_is_sent_again_while_the_old_controller_may_write() {
    for fences in [true, false] {
        let script = Script { fences, ..Script::default() };
        let mut rig = Setup { script, ..Setup::default() }.start();
        let disk = rig.disk(1, 8);
        disk.write(0, 0, &[1; 4096]);
        rig.wait_ok(&disk, 1);
        let start = rig.world.now();
        rig.world.cut_all();
        disk.write(0, 0, &[2; 4096]);
        rig.wait_ok(&disk, 1);
        let took = rig.world.now() - start;
        if fences {
            assert!(took < SECOND, "{took:?}");
        } else {
            // Two keep alive time-outs and some.
            assert!(took >= 10 * SECOND && took < 20 * SECOND, "{took:?}");
        }
        rig.finish();
    }
}

#[test]
fn another_namespace_under_the_same_name_is_not_used() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    rig.fake.stop(&rig.cores[TARGET]);
    rig.run_for(SECOND);
    let right = Arc::clone(&rig.fake.subsys.borrow());
    let mut namespace = fake::namespace(16 << 10);
    namespace.uuid[0] ^= 1;
    *rig.fake.subsys.borrow_mut() = Arc::new(right.with_namespaces(vec![namespace]).unwrap());
    rig.fake.restart(&rig.cores[TARGET]);
    disk.write(1, 0, &[2; 4096]);
    rig.run_for(20 * SECOND);
    assert_eq!(disk.done(), 0);
    assert!(rig.state().last_error.as_ref().unwrap().contains("another one"), "{:?}", rig.state());
    assert!(rig.fake.disk.borrow()[..4096] == [1; 4096], "written to the wrong namespace");
    rig.fake.stop(&rig.cores[TARGET]);
    rig.run_for(SECOND);
    *rig.fake.subsys.borrow_mut() = right;
    rig.fake.restart(&rig.cores[TARGET]);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow()[..4096] == [2; 4096]);
    rig.finish();
}

#[test]
fn fewer_queues_than_channels_is_said_and_waited_for() {
    let config = |config| RemoteConfig { queues: 2, ..config };
    let limits = Limits { io_queues_max: 1, ..Limits::default() };
    let setup = Setup { hosts: 2, limits, config: Box::new(config), ..Setup::default() };
    let mut rig = setup.start();
    let one = rig.disk(1, 4);
    let two = rig.disk(2, 4);
    two.read(0, 0, 512);
    rig.run_for(10 * SECOND);
    let text = rig.state().last_error.clone().unwrap();
    assert!(text.contains("grants 1 I/O queues, 2 are in use"), "{text}");
    // With one channel less there is enough; a second is refused then, and the first goes on.
    two.abort();
    rig.wait_errors(&two, 1, IoError::Aborted);
    two.close();
    one.read(0, 0, 512);
    rig.wait_ok(&one, 1);
    let error = rig.volume.open(&rig.cores[2].local(), 1).err().unwrap();
    assert!(error.to_string().contains("grants only 1 I/O queues"), "{error}");
    one.read(0, 0, 512);
    rig.wait_ok(&one, 1);
    assert_eq!(rig.state().losses, 0);
    rig.finish();
}

#[test]
fn shutdown_fails_what_is_held_and_ends_the_task() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 8);
    rig.until_live();
    rig.fake.stop(&rig.cores[TARGET]);
    disk.write(0, 0, &[1; 4096]);
    rig.run_for(SECOND);
    rig.volume.shutdown();
    rig.wait_errors(&disk, 1, IoError::Gone);
    rig.until("the end", |volume| volume.wait_stopped(Duration::ZERO));
    disk.read(0, 0, 512);
    rig.wait_errors(&disk, 1, IoError::Gone);
    assert_eq!(rig.cores[1].tasks(), 1, "only the channel's owner is left");
}

#[test]
fn dropping_the_volume_shuts_the_controller_down() {
    let Rig { world, mut cores, fake, volume } = Setup::default().start();
    let met = world.run_until(&mut cores, 10 * SECOND, &mut || volume.state().phase == Phase::Live);
    assert!(met);
    drop(volume);
    let met = world.run_until(&mut cores, 10 * SECOND, &mut || fake.seen.get().shutdowns == 1);
    assert!(met, "no shutdown");
}

#[test]
fn lost_digest_support_is_not_accepted() {
    let config = |config| RemoteConfig { data_digest: true, ..config };
    let mut rig = Setup { config: Box::new(config), ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &[1; 4096]);
    rig.wait_ok(&disk, 1);
    rig.fake.script.borrow_mut().allows_digests = false;
    rig.fake.stop(&rig.cores[TARGET]);
    rig.run_for(SECOND);
    rig.fake.restart(&rig.cores[TARGET]);
    rig.run_for(10 * SECOND);
    assert!(rig.state().last_error.as_ref().unwrap().contains("digest"), "{:?}", rig.state());
    assert_eq!(rig.state().phase, Phase::Connecting);
    rig.fake.script.borrow_mut().allows_digests = true;
    rig.until_live();
    rig.finish();
}

/// A write that a damaged digest keeps the controller from taking is sent again, whole.
#[test]
fn writes_are_resent_with_the_same_bytes() {
    let failures = Rc::new(Cell::new(0));
    let count = Rc::clone(&failures);
    let script = Script {
        on_io: Box::new(move |sqe| {
            if is_op(sqe, NvmOpcode::WRITE) && count.get() < 3 {
                count.set(count.get() + 1);
                return Answer::Status(Status::TRANSIENT_TRANSPORT_ERROR);
            }
            Answer::Good
        }),
        ..Script::default()
    };
    let mut rig = Setup { script, ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 512, &pattern(77, 100 * 512));
    rig.wait_ok(&disk, 1);
    assert_eq!(failures.get(), 3);
    assert!(rig.fake.disk.borrow()[512..][..100 * 512] == pattern(77, 100 * 512));
    rig.finish();
}

/// Traffic Based Keep Alive: while there are other commands, none is sent for its own sake.
#[test]
fn commands_stand_for_keep_alives() {
    let mut rig = Setup::default().start();
    rig.until_live();
    let disk = rig.disk(1, 8);
    // Keep alives that an idle host would send: one each half time-out.
    let due = |rig: &Rig, since: Duration| (rig.world.now() - since).as_millis() as u64 / 2500;
    let begin = rig.world.now();
    for tag in 0..80 {
        disk.read(tag, 0, 512);
        rig.wait_ok(&disk, 1);
        rig.run_for(Duration::from_millis(500));
    }
    let (busy, idle) = (rig.fake.seen.get().keep_alives, due(&rig, begin));
    assert!(busy * 4 < idle, "{busy}, where an idle host sends {idle}");
    let begin = rig.world.now();
    rig.run_for(Duration::from_secs(40));
    let (sent, idle) = (rig.fake.seen.get().keep_alives - busy, due(&rig, begin));
    assert!(sent + 1 >= idle, "{sent}, where an idle host sends {idle}");
    assert_eq!(rig.state().losses, 0);
    rig.finish();
}
