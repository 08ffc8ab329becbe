//! Compare and Write: two fused commands next to each other, done as one, and never said to differ
//! because it was done. The fake target fails a test in which something comes between the two.

use std::cell::RefCell;
use std::time::Duration;

use block::{IoError, Op, Volume};
use nvme::spec::{NvmOpcode, Sqe, Status};
use nvme::subsys::Limits;
use nvmf_initiator::{Phase, RemoteConfig};

use crate::fake::{self, Answer, Script, is_op};
use crate::rig::{Rig, Setup, TARGET, pattern};

const SECOND: Duration = Duration::from_secs(1);
const BLOCK: usize = 512;

fn block(n: u64) -> Vec<u8> {
    pattern(n, BLOCK)
}

/// What the target has in a block.
fn stored(rig: &Rig, number: usize) -> Vec<u8> {
    rig.fake.disk.borrow()[number * BLOCK..][..BLOCK].to_vec()
}

fn store(rig: &Rig, number: usize, bytes: &[u8]) {
    rig.fake.disk.borrow_mut()[number * BLOCK..][..BLOCK].copy_from_slice(bytes);
}

/// The answers to the first commands with these opcodes; then all is well.
fn answers(list: Vec<(NvmOpcode, Status)>) -> Script {
    let list = RefCell::new(list);
    let on_io = move |sqe: &Sqe| {
        let mut list = list.borrow_mut();
        match list.first() {
            Some((opcode, _)) if is_op(sqe, *opcode) => Answer::Status(list.remove(0).1),
            _ => Answer::Good,
        }
    };
    Script { on_io: Box::new(on_io), ..Script::default() }
}

#[test]
fn what_is_equal_is_written_and_nothing_comes_between() {
    for (seed, in_capsule_bytes) in [(1, 4096), (2, 0), (3, 256)] {
        let limits = Limits { in_capsule_bytes, ..Limits::default() };
        let script = Script { delay_max: Duration::from_micros(300), ..Script::default() };
        let mut rig = Setup { seed, limits, script, ..Setup::default() }.start();
        // Room for few: pairs and others wait for each other.
        let disk = rig.disk(1, 5);
        rig.until_live();
        assert!(rig.volume.geometry().compare_and_write);
        for round in 0..40u64 {
            let (old, new) = (block(round), block(round + 1));
            for n in 0..8 {
                store(&rig, n, &old);
            }
            for n in 0..8 {
                let at = n * BLOCK as u64;
                // Every third is compared with something else.
                let compared = if (n + round) % 3 == 0 { &new } else { &old };
                disk.compare_and_write(n, at, compared, &new);
                disk.write(100 + n, (100 + n) << 12, &pattern(n, 4096));
                disk.read(200 + n, 1 << 20, 8192);
            }
            for io in rig.wait(&disk, 24) {
                let differs = io.tag < 8 && (io.tag + round) % 3 == 0;
                let want = if differs { Err(IoError::CompareFailed) } else { Ok(()) };
                assert_eq!(io.result, want, "{io:?}");
                if io.tag < 8 {
                    let want = if differs { &old } else { &new };
                    assert!(stored(&rig, io.tag as usize) == *want, "block {}", io.tag);
                }
            }
        }
        assert_eq!(rig.fake.seen.get().pairs, 8 * 40);
        rig.finish();
    }
}

#[test]
fn a_channel_of_one_has_room_for_both_commands() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 1);
    for round in 0..3 {
        store(&rig, 4, &block(round));
        disk.compare_and_write(0, 4 * BLOCK as u64, &block(round), &block(round + 1));
        rig.wait_ok(&disk, 1);
        assert!(stored(&rig, 4) == block(round + 1));
    }
    rig.finish();
}

#[test]
fn a_target_or_a_queue_that_cannot_is_not_asked() {
    let depth_one = |config| RemoteConfig { queue_depth: 1, ..config };
    for change in [depth_one, |config| config] {
        let can = change(RemoteConfig::new(
            ([10, 0, 0, 1], 4420).into(),
            crate::rig::nqn(fake::SUBNQN),
            1,
            (crate::rig::nqn(fake::HOSTNQN), [7; 16]),
        ))
        .queue_depth
            > 1;
        let mut rig = Setup { config: Box::new(change), ..Setup::default() }.start();
        if can {
            let mut plain = fake::namespace(16 << 10);
            plain.compare_and_write = false;
            *rig.fake.subsys.borrow_mut() = fake::subsystem(plain, Limits::default());
        }
        let disk = rig.disk(1, 4);
        rig.until_live();
        assert!(!rig.volume.geometry().compare_and_write);
        disk.compare_and_write(0, 0, &block(1), &block(2));
        rig.wait_errors(&disk, 1, IoError::NotSupported);
        disk.compare(1, 0, &stored(&rig, 0));
        rig.wait_ok(&disk, 1);
        assert_eq!(rig.fake.seen.get().pairs, 0);
        rig.finish();
    }
}

/// Whatever the two commands are answered with.
#[test]
fn it_is_sent_again_only_if_it_was_not_done() {
    use NvmOpcode as Opcode;
    const BUSY: Status = Status::NAMESPACE_NOT_READY;
    for (script, want, pairs) in [
        (vec![(Opcode::COMPARE, BUSY), (Opcode::COMPARE, BUSY)], Ok(()), 3),
        (vec![(Opcode::COMPARE, Status::UNRECOVERED_READ_ERROR)], Err(IoError::Medium), 1),
        (vec![(Opcode::COMPARE, Status::RESERVATION_CONFLICT.dnr())], conflict(), 1),
        (vec![(Opcode::WRITE, Status::CAPACITY_EXCEEDED)], Err(IoError::NoSpace), 1),
        // It may be done already, as far as the host knows.
        (vec![(Opcode::WRITE, BUSY)], Err(IoError::Aborted), 1),
        (vec![(Opcode::WRITE, Status::ANA_INACCESSIBLE)], Err(IoError::Aborted), 1),
    ] {
        let what = format!("{script:?}");
        let mut rig = Setup { script: answers(script), ..Setup::default() }.start();
        let disk = rig.disk(1, 4);
        rig.until_live();
        store(&rig, 3, &block(1));
        disk.compare_and_write(0, 3 * BLOCK as u64, &block(1), &block(2));
        assert_eq!(rig.wait(&disk, 1)[0].result, want, "{what}");
        assert_eq!(rig.fake.seen.get().pairs, pairs, "{what}");
        rig.finish();
    }
}

fn conflict() -> Result<(), IoError> {
    Err(IoError::ReservationConflict)
}

/// Cuts the connections when the target carries out the first or the second command, or any time
/// before and after; it does what it has when its connection ends, or not.
#[test]
fn what_may_have_been_done_is_given_back_when_it_is_decided_and_not_said_to_differ() {
    let mut seen = [0; 3];
    for seed in 0..48u64 {
        let (cut_at, lands_late) = (1 + seed % 4, seed % 3 != 0);
        // Long enough for the next association to end what is not done by then.
        let delay_max = Duration::from_millis(if lands_late { 4 } else { 20_000 });
        let script = Script { delay_max, lands_late, ..Script::default() };
        let mut rig = Setup { seed: seed + 1, script, ..Setup::default() }.start();
        let disk = rig.disk(1, 8);
        rig.until_live();
        store(&rig, 3, &block(1));
        let world = rig.world.clone();
        let mut left = if cut_at <= 2 { cut_at } else { 0 };
        rig.fake.script.borrow_mut().on_io = Box::new(move |sqe: &Sqe| {
            if sqe.fuse() != 0 && left > 0 {
                left -= 1;
                if left == 0 {
                    world.cut_all();
                }
            }
            Answer::Good
        });
        disk.compare_and_write(0, 3 * BLOCK as u64, &block(1), &block(2));
        if cut_at > 2 {
            rig.run_for(Duration::from_micros(200 * (seed / 4)));
            rig.world.cut_all();
        }
        let io = rig.wait(&disk, 1).pop().expect("it is back");
        let at_the_end = stored(&rig, 3);
        match io.result {
            Ok(()) => assert!(at_the_end == block(2), "seed {seed}"),
            error => assert_eq!(error, Err(IoError::Aborted), "seed {seed}"),
        }
        // Nothing of it comes later.
        store(&rig, 3, &block(1));
        rig.run_for(30 * SECOND);
        assert!(stored(&rig, 3) == block(1), "seed {seed}: it was done after it was given back");
        store(&rig, 3, &at_the_end);
        let kind = match io.result {
            Ok(()) => 0,
            Err(_) => 1 + usize::from(at_the_end == block(2)),
        };
        seen[kind] += 1;
        // The blocks say what happened, and the next pair goes by that.
        disk.compare_and_write(1, 3 * BLOCK as u64, &at_the_end, &block(9));
        rig.wait_ok(&disk, 1);
        assert!(stored(&rig, 3) == block(9));
        assert_eq!(rig.state().phase, Phase::Live);
        rig.finish();
    }
    assert!(seen.iter().all(|kind| *kind > 0), "done, not done, done unknown: {seen:?}");
}

#[test]
fn a_pair_that_was_not_sent_waits_for_the_target() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 4);
    rig.until_live();
    store(&rig, 3, &block(1));
    rig.fake.stop(&rig.cores[TARGET]);
    rig.until("the loss", |volume| volume.state().phase == Phase::Connecting);
    disk.compare_and_write(0, 3 * BLOCK as u64, &block(1), &block(2));
    disk.op(1, Op::Flush, 0, 0);
    rig.run_for(20 * SECOND);
    assert_eq!(disk.done(), 0);
    rig.fake.restart(&rig.cores[TARGET]);
    rig.wait_ok(&disk, 2);
    assert!(stored(&rig, 3) == block(2));
    rig.finish();
}

/// Of two paths only the first takes pairs, and is down: the pair waits for it, and nothing waits
/// for the pair.
#[test]
fn a_pair_waits_for_the_path_that_takes_it() {
    for comes_back in [true, false] {
        let second = ([10, 0, 0, 2], 4420).into();
        let config = move |mut config: RemoteConfig| {
            config.paths.push(std::net::SocketAddr::into(second));
            config
        };
        let script = Script { fences: false, ..Script::default() };
        let mut rig = Setup { script, config: Box::new(config), ..Setup::default() }.start();
        let disk = rig.disk(1, 4);
        rig.until_live();
        let able = rig.fake.subsys.borrow().clone();
        let mut plain = fake::namespace(16 << 10);
        plain.compare_and_write = false;
        *rig.fake.subsys.borrow_mut() = fake::subsystem(plain, Limits::default());
        rig.fake.listen_at(second, &rig.cores[TARGET]);
        rig.until("both paths", |volume| volume.state().paths.iter().all(|path| path.is_live));
        rig.fake.stop(&rig.cores[TARGET]);
        rig.until("the loss", |volume| !volume.state().paths[0].is_live);
        rig.until("the second path", |volume| volume.state().paths[1].is_live);
        store(&rig, 3, &block(1));
        disk.compare_and_write(0, 3 * BLOCK as u64, &block(1), &block(2));
        disk.op(1, Op::Flush, 0, 0);
        assert_eq!(rig.wait_ok(&disk, 1)[0].tag, 1);
        rig.run_for(SECOND);
        assert_eq!(disk.done(), 0);
        if comes_back {
            *rig.fake.subsys.borrow_mut() = able;
            rig.fake.restart(&rig.cores[TARGET]);
            rig.wait_ok(&disk, 1);
            assert!(stored(&rig, 3) == block(2));
        } else {
            rig.run_for(60 * SECOND);
            rig.wait_errors(&disk, 1, IoError::Aborted);
            assert!(stored(&rig, 3) == block(1));
            rig.fake.restart(&rig.cores[TARGET]);
        }
        rig.finish_all();
    }
}
