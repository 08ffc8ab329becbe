//! Fused Compare and Write.

use super::*;

const OK: Status = Status::SUCCESS;
const FAILED: Status = Status::ABORTED_FAILED_FUSED.dnr();
const MISSING: Status = Status::ABORTED_MISSING_FUSED.dnr();
const FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
const ABORTED: Status = Status::COMMAND_ABORT_REQUESTED;

/// Where the data of the two is.
const OLD: u64 = DATA + 0x8000;
const NEW: u64 = DATA + 0x9000;

fn pair(slba: u64, blocks: u32) -> [Sqe; 2] {
    let mut first = command(NvmOpcode::COMPARE, slba, blocks, OLD, 0);
    let mut second = command(NvmOpcode::WRITE, slba, blocks, NEW, 0);
    (first.flags, second.flags) = (1, 2);
    [first, second]
}

impl Rig {
    /// Commands 1, 2, .. in a row; what each completed with, in the order of completion.
    fn run_all(&mut self, commands: &[Sqe]) -> Vec<(u16, Status)> {
        for (cid, sqe) in (1..).zip(commands) {
            self.push(cid, sqe);
        }
        self.ring();
        self.settle();
        self.ended()
    }

    fn ended(&mut self) -> Vec<(u16, Status)> {
        std::iter::from_fn(|| self.pop()).map(|cqe| (cqe.cid.get(), cqe.status())).collect()
    }

    fn block(&self, number: usize) -> Vec<u8> {
        self.disk.borrow().bytes[number * 512..][..512].to_vec()
    }

    fn data(&self, old: u8, new: u8) {
        self.write(OLD, &[old; 512]);
        self.write(NEW, &[new; 512]);
    }
}

#[test]
fn a_pair_is_one_io_of_its_volume() {
    let mut rig = Rig::new(8);
    rig.data(5, 0x77);
    rig.disk.borrow_mut().allowed = Some(0);
    let [first, second] = pair(5, 1);
    // The first alone waits, however long, and is not at the volume.
    rig.push(1, &first);
    rig.ring();
    rig.settle();
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume(), rig.pop()), (1, 0, None));
    assert!(rig.engine.is_quiet() && !rig.engine.has_work());
    rig.push(2, &second);
    rig.push(3, &command(NvmOpcode::READ, 5, 1, DATA, 0));
    rig.ring();
    rig.settle();
    let ops: Vec<Op> = rig.disk.borrow().held.iter().map(|io| io.op).collect();
    assert_eq!(ops, [Op::CompareAndWrite, Op::Read]);
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!(rig.ended(), [(1, OK), (2, OK), (3, OK)]);
    assert_eq!(rig.block(5), [0x77; 512]);
    // What differs is not written.
    let differs = [(1, Status::COMPARE_FAILURE.dnr()), (2, FAILED)];
    assert_eq!(rig.run_all(&pair(5, 1)), differs);
    assert_eq!(rig.block(5), [0x77; 512]);
    // Data in pieces, by SGLs.
    let mut scattered = pair(5, 1);
    for (n, sqe) in scattered.iter_mut().enumerate() {
        let list = 0x4000 + 0x100 * n as u64;
        let byte = [0x77, 0x78][n];
        for piece in 0..4u64 {
            let at = DATA + 0x1003 * piece + 0x600 * n as u64;
            rig.write(at, &[byte; 128]);
            rig.write(list + 16 * piece, &at.to_le_bytes());
            rig.write(list + 16 * piece + 8, &[128, 0, 0, 0, 0, 0, 0, 0]);
        }
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&list.to_le_bytes());
        descriptor[8] = 64;
        descriptor[15] = 0x30;
        let mut bytes = sqe.to_bytes();
        bytes[24..40].copy_from_slice(&descriptor);
        *sqe = Sqe::from_bytes(&bytes);
        sqe.flags |= 0x40;
    }
    assert_eq!(rig.run_all(&scattered), [(1, OK), (2, OK)]);
    assert_eq!(rig.block(5), [0x78; 512]);
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume()), (0, 0));
}

#[test]
fn halves_and_misfits_change_nothing() {
    let mut rig = Rig::new(16);
    rig.data(5, 0x77);
    let [first, second] = pair(5, 1);
    let read = command(NvmOpcode::READ, 0, 1, DATA, 0);
    assert_eq!(rig.run_all(&[second]), [(1, MISSING)]);
    assert_eq!(rig.run_all(&[first, read]), [(1, MISSING), (2, OK)]);
    assert_eq!(rig.run_all(&[first, read, second]), [(1, MISSING), (3, MISSING), (2, OK)]);
    assert_eq!(rig.run_all(&[first, first, second]), [(1, MISSING), (2, OK), (3, OK)]);
    rig.data(0x77, 5);
    assert_eq!(rig.run_all(&[first, second]), [(1, OK), (2, OK)]);
    rig.data(5, 0x77);
    let other = pair(6, 1)[1];
    assert_eq!(rig.run_all(&[first, other]), [(1, FIELD), (2, FIELD)]);
    let unit = Status::ATOMIC_WRITE_UNIT_EXCEEDED.dnr();
    assert_eq!(rig.run_all(&pair(5, 2)), [(1, unit), (2, unit)]);
    // One whose first cannot be, and one whose memory is not there.
    let beyond = Status::LBA_OUT_OF_RANGE.dnr();
    assert_eq!(rig.run_all(&pair(BLOCKS, 1)), [(1, beyond), (2, FAILED)]);
    for (half, want) in [(0, [TRANSFER, FAILED]), (1, [FAILED, TRANSFER])] {
        let mut commands = pair(5, 1);
        commands[half].set_prps(MEMORY, 0);
        let ended = rig.run_all(&commands);
        assert_eq!(ended, [(1, want[0]), (2, want[1])]);
    }
    for mut sqe in [first, second, read] {
        sqe.flags = 3;
        assert_eq!(rig.run_all(&[sqe]), [(1, FIELD)]);
    }
    assert_eq!(rig.block(5), [5; 512]);
    assert_eq!(rig.run_all(&pair(5, 1)), [(1, OK), (2, OK)]);
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume()), (0, 0));
}

#[test]
fn a_namespace_that_cannot_is_not_asked() {
    let mut rig = Rig::new(8);
    let mut list = subsys().namespaces().to_vec();
    list[0].compare_and_write = false;
    let plain = Arc::new(subsys().with_namespaces(list).unwrap());
    rig.engine.set_namespaces(plain, |_| None);
    assert_eq!(rig.run_all(&pair(5, 1)), [(1, FIELD), (2, FAILED)]);
    let compare = command(NvmOpcode::COMPARE, 5, 1, OLD, 0);
    rig.data(5, 6);
    assert_eq!(rig.run_all(&[compare]), [(1, OK)]);
}

#[test]
fn both_say_so_where_it_may_have_been_done() {
    let conflict = Status::RESERVATION_CONFLICT.dnr();
    let (fault, full) = (Status::WRITE_FAULT.dnr(), Status::CAPACITY_EXCEEDED.dnr());
    let mut rig = Rig::new(8);
    rig.data(5, 0x77);
    for (error, want) in [
        (IoError::ReservationConflict, [conflict, FAILED]),
        (IoError::NotSupported, [FIELD, FAILED]),
        (IoError::ReadOnly, [Status::NAMESPACE_IS_WRITE_PROTECTED.dnr(), FAILED]),
        (IoError::Aborted, [ABORTED; 2]),
        (IoError::Gone, [Status::INTERNAL_ERROR; 2]),
        (IoError::Medium, [fault; 2]),
        (IoError::NoSpace, [full; 2]),
    ] {
        rig.disk.borrow_mut().fail = Some(error);
        let ended = rig.run_all(&pair(5, 1));
        assert_eq!(ended, [(1, want[0]), (2, want[1])], "{error:?}");
    }
    // At the volume when the namespace goes.
    rig.disk.borrow_mut().fail = None;
    (rig.disk.borrow_mut().depth, rig.disk.borrow_mut().allowed) = (1, Some(0));
    rig.push(9, &command(NvmOpcode::READ, 0, 1, DATA, 0));
    assert_eq!(rig.run_all(&pair(5, 1)), []);
    let nothing = Arc::new(subsys().restricted(|_| false));
    rig.engine.set_namespaces(nothing, |_| None);
    rig.settle();
    assert_eq!(rig.ended(), [(1, FIELD), (2, FIELD)]);
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!(rig.ended(), [(9, OK)]);
}

#[test]
fn an_abort_ends_a_first_that_waits_and_a_pair_that_no_volume_has() {
    let mut rig = Rig::new(16);
    rig.data(5, 0x77);
    let [first, second] = pair(5, 1);
    assert_eq!(rig.run_all(&[first]), []);
    assert!(rig.engine.abort_command(1, 1) && !rig.engine.abort_command(1, 1));
    assert_eq!(rig.ended(), [(1, ABORTED)]);
    assert_eq!(rig.run_all(&[second]), [(1, FAILED)]);
    for named in 1..=2 {
        (rig.disk.borrow_mut().depth, rig.disk.borrow_mut().allowed) = (1, Some(0));
        rig.push(9, &command(NvmOpcode::READ, 0, 1, DATA, 0));
        assert_eq!(rig.run_all(&[first, second]), []);
        assert!(!rig.engine.abort_command(1, 9), "it is at the volume");
        assert!(rig.engine.abort_command(1, named));
        assert_eq!(rig.ended(), [(1, ABORTED), (2, FAILED)], "both, whichever was named");
        rig.disk.borrow_mut().allowed = None;
        rig.settle();
        assert_eq!(rig.ended(), [(9, OK)]);
    }
    assert_eq!(rig.block(5), [5; 512]);
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume()), (0, 0));
}

#[test]
fn nothing_waits_for_a_second_that_does_not_come() {
    let first = pair(5, 1)[0];
    let mut rig = Rig::new(8);
    rig.data(5, 0x77);
    assert_eq!(rig.run_all(&[first]), []);
    // Memory may go: it has none yet, and its data is looked for when the second is here.
    rig.engine.set_memory(GuestMemory::default().view());
    assert_eq!(rig.engine.in_flight_old(), 0);
    rig.engine.set_memory(rig.memory.view());
    rig.push(2, &pair(5, 1)[1]);
    rig.ring();
    rig.disk.borrow_mut().allowed = Some(0);
    rig.settle();
    rig.engine.set_memory(rig.memory.view());
    assert_eq!(rig.engine.in_flight_old(), 2, "now they have");
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!(rig.ended(), [(1, OK), (2, OK)]);
    // A queue that is deleted.
    assert_eq!(rig.run_all(&[first]), []);
    rig.engine.close_sq(1);
    rig.settle();
    assert_eq!(rig.ended(), [(1, Status::ABORTED_SQ_DELETION)]);
    assert!(rig.engine.remove_sq(1));
    // A controller that is shut down.
    let mut rig = Rig::new(8);
    assert_eq!(rig.run_all(&[first]), []);
    rig.engine.drain();
    rig.settle();
    assert_eq!((rig.ended(), rig.engine.in_flight()), (vec![(1, MISSING)], 0));
}

/// The next process, where this one has been ended.
fn succeed(rig: &mut Rig) {
    let mut engine = engine(&rig.memory, &rig.record, &rig.disk);
    let view = rig.record.view();
    let (cq, sq) = (view.cq(1).unwrap(), view.sq(1).unwrap());
    engine.create_cq(1, &cq, Coalescing::default(), true).unwrap();
    engine.create_sq(1, &sq, true).unwrap();
    rig.engine = engine;
}

#[test]
fn a_successor_takes_up_a_first_and_aborts_a_pair_behind_a_flush() {
    let mut rig = Rig::new(8);
    rig.data(5, 0x77);
    let [first, second] = pair(5, 1);
    assert_eq!(rig.run_all(&[first]), []);
    succeed(&mut rig);
    rig.push(2, &second);
    rig.ring();
    rig.settle();
    assert_eq!(rig.ended(), [(1, OK), (2, OK)]);
    rig.data(0x77, 5);
    rig.disk.borrow_mut().allowed = Some(0);
    assert_eq!(rig.run_all(&[first, second]), []);
    // It is done, and its answer is lost.
    let held: Vec<_> = rig.disk.borrow_mut().held.drain(..).collect();
    for mut io in held {
        rig.disk.borrow_mut().run(&mut io);
    }
    succeed(&mut rig);
    rig.settle();
    assert!(rig.disk.borrow().held.iter().all(|io| io.op == Op::Flush));
    assert_eq!(rig.ended(), []);
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!(rig.ended(), [(1, ABORTED), (2, ABORTED)]);
    assert_eq!(rig.block(5), [5; 512]);
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume()), (0, 0));
}

/// A host counts in a block by pairs while the process ends at every step, once or twice. Each command
/// completes once; nothing is said to differ, as only this host counts; and the block is what the
/// pairs say that were done, and those of which nobody knows.
#[test]
fn no_end_of_the_process_makes_a_pair_differ_or_be_done_twice() {
    let mut steps = 0;
    while count(steps, steps % 5) {
        steps += 1;
    }
    assert!(steps > 100, "only {steps} steps");
}

fn count(first: u64, second: u64) -> bool {
    const PAIRS: u8 = 8;
    let mut rig = Rig::new(8);
    let mut ended = 0;
    let mut value = 5;
    crash::after(Some(first));
    for n in 0..PAIRS {
        rig.data(value, value + 1);
        let [compare, write] = pair(5, 1);
        rig.push(2 * u16::from(n), &compare);
        if n % 3 == 0 {
            // The second comes later.
            rig.ring();
        }
        let mut statuses = [None; 2];
        for turn in 0.. {
            assert!(turn < 100, "stuck after {first} steps: {statuses:?}");
            if turn == if n % 3 == 0 { 2 } else { 0 } {
                rig.push(2 * u16::from(n) + 1, &write);
                rig.ring();
            }
            rig.disk.borrow_mut().allowed = Some(turn % 2);
            if catch_unwind(AssertUnwindSafe(|| rig.turn())).is_err() {
                ended += 1;
                crash::after((ended < 2).then_some(second));
                // What was in flight has reached the disk, or not.
                let held: Vec<_> = rig.disk.borrow_mut().held.drain(..).collect();
                for mut io in held.into_iter().filter(|_| first.is_multiple_of(2)) {
                    rig.disk.borrow_mut().run(&mut io);
                }
                if catch_unwind(AssertUnwindSafe(|| succeed(&mut rig))).is_err() {
                    ended += 1;
                    crash::after(None);
                    rig.disk.borrow_mut().held.clear();
                    succeed(&mut rig);
                }
            }
            while let Some(cqe) = rig.pop() {
                let half = usize::from(cqe.cid.get() - 2 * u16::from(n));
                assert_eq!(statuses[half].replace(cqe.status()), None, "twice");
            }
            if statuses.iter().all(Option::is_some) {
                break;
            }
        }
        let stored = rig.block(5)[0];
        match statuses.map(Option::unwrap) {
            [OK, OK] => assert_eq!(stored, value + 1),
            // Nobody knows.
            [OK | ABORTED, ABORTED] => assert!(stored == value || stored == value + 1),
            other => panic!("after {first} steps pair {n} ended with {other:?}"),
        }
        value = stored;
    }
    crash::after(None);
    assert_eq!(rig.engine.in_flight(), 0);
    ended > 0
}
