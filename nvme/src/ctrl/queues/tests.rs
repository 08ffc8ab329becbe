use std::sync::Arc;

use zerocopy::FromBytes;

use super::*;
use crate::ctrl::io::{IoCommand, decode};
use crate::ctrl::{ControllerConfig, ControllerKind};
use crate::spec::{Cc, Cns, Csts, IdentifyController, NSSR_RESET, Nqn, SglDescriptor, event};
use crate::subsys::tests::{build, sample};
use crate::subsys::{Limits, SubsystemInfo};

const ADMIN: AdminQueues =
    AdminQueues { sq_address: 0x1_0000_1000, sq_entries: 32, cq_address: 0x2000, cq_entries: 2 };

fn subsys() -> SubsystemInfo {
    let limits = Limits {
        queue_entries_max: 1024,
        io_queues_max: 4,
        transport: Transport::Pcie,
        ..Limits::default()
    };
    build(sample().namespaces().to_vec(), limits).unwrap()
}

fn controller() -> Controller {
    let config = ControllerConfig {
        cntlid: 1,
        kind: ControllerKind::Io,
        hostnqn: Nqn::new("nqn.2014-08.org.example:host").unwrap(),
        hostid: [0; 16],
        kato: Duration::ZERO,
        subsys: Arc::new(subsys()),
    };
    Controller::new(config, Duration::ZERO)
}

fn set_queues(controller: &mut Controller) {
    for (offset, value) in [(0x24, 0x0001_001f), (0x28, 0x1000), (0x2c, 1), (0x30, 0x2000)] {
        assert_eq!(controller.register_write(offset, value), RegisterEffect::None);
    }
}

fn enabled() -> Controller {
    let mut controller = controller();
    set_queues(&mut controller);
    let effect = controller.register_write(0x14, Cc::ENABLE.0);
    assert_eq!(effect, RegisterEffect::Enabled(ADMIN));
    controller
}

fn run(controller: &mut Controller, sqe: &Sqe, data: &[u8]) -> (AdminOutcome, Vec<u8>) {
    let mut out = Vec::new();
    let outcome = controller.admin(0, sqe, data, &mut out, Duration::ZERO);
    (outcome, out)
}

fn status(controller: &mut Controller, sqe: &Sqe) -> Status {
    match run(controller, sqe, &[0; 512]).0 {
        AdminOutcome::Complete { status, .. } => status,
        AdminOutcome::Queue(change) => {
            controller.queue_changed(&change);
            Status::SUCCESS
        }
        outcome => panic!("{outcome:?}"),
    }
}

fn admin(opcode: AdminOpcode, cdw10: u32, cdw11: u32) -> Sqe {
    let mut sqe = Sqe { opcode: opcode.0, ..Sqe::default() };
    sqe.set_prps(0x4000, 0);
    (sqe.cdw10, sqe.cdw11) = (U32::new(cdw10), U32::new(cdw11));
    sqe
}

#[test]
fn registers_are_there_dword_by_dword() {
    let mut c = controller();
    // MQES 1023, not CQR; NSSRS and CSS in the high half; CRMS.
    assert_eq!((c.register_read(0), c.register_read(4)), (0x1e00_03ff, 0x0800_0030));
    assert_eq!((c.register_read(8), c.register_read(0x68)), (0x0002_0000, 30));
    set_queues(&mut c);
    let read = [0x24, 0x28, 0x2c, 0x30, 0x34].map(|offset| c.register_read(offset));
    assert_eq!(read, [0x0001_001f, 0x1000, 1, 0x2000, 0]);
    // What is not there, and reserved bits of AQA.
    assert_eq!(c.register_write(0x38, 7), RegisterEffect::None);
    assert_eq!((c.register_read(0x38), c.register_read(0xffc)), (0, 0));
    let _ = c.register_write(0x24, u32::MAX);
    assert_eq!(c.register_read(0x24), 0x0fff_0fff);
    // The mask is set by one register, cleared by the other, and read at both.
    assert_eq!(c.register_write(0x0c, 0b1011), RegisterEffect::InterruptMask);
    assert_eq!(c.register_write(0x10, 0b0001), RegisterEffect::InterruptMask);
    assert_eq!((c.register_read(0x0c), c.register_read(0x10)), (0b1010, 0b1010));
    assert_eq!(c.interrupt_mask(), 0b1010);
}

#[test]
fn enable_reset_shutdown() {
    let mut c = enabled();
    let _ = c.register_write(0x28, 0x7000);
    assert_eq!(c.register_read(0x28), 0x1000, "not while it is enabled");
    let effect = c.register_write(0x14, Cc::ENABLE.with_shn(1).0);
    assert_eq!(effect, RegisterEffect::ResetQueues { shutdown: true });
    assert_eq!(c.register_read(0x1c), Csts::RDY | Csts::SHST_OCCURRING);
    c.queues_closed(Duration::ZERO);
    assert_eq!(c.register_read(0x1c), Csts::RDY | Csts::SHST_COMPLETE);
    let effect = c.register_write(0x14, 0);
    assert_eq!(effect, RegisterEffect::ResetQueues { shutdown: false });
    assert_eq!(c.register_write(0x14, Cc::ENABLE.0), RegisterEffect::None, "too early");
    c.queues_closed(Duration::ZERO);
    assert_eq!(c.register_read(0x1c), 0);
    assert_eq!(c.register_write(0x14, Cc::ENABLE.0), RegisterEffect::Enabled(ADMIN));
    assert_eq!(c.register_write(0x20, 1), RegisterEffect::None);
    assert_eq!(c.register_write(0x20, NSSR_RESET), RegisterEffect::SubsystemReset);
    c.function_reset(Duration::ZERO);
    c.note_subsystem_reset();
    assert_eq!(c.register_read(0x1c), Csts::NSSRO);
    assert_eq!(c.register_read(0x24), 0);
}

#[test]
fn impossible_queues_are_fatal() {
    for (offset, value) in [(0x28, 0x1008), (0x30, 0x2004), (0x24, 0x0001_0000), (0x24, 0x1f)] {
        let mut c = controller();
        set_queues(&mut c);
        let _ = c.register_write(offset, value);
        assert_eq!(c.register_write(0x14, Cc::ENABLE.0), RegisterEffect::None);
        assert_eq!(c.register_read(0x1c), Csts::CFS, "{offset:x} {value:x}");
        assert_eq!(c.register_write(0x14, 0), RegisterEffect::None);
        assert_eq!(c.register_read(0x1c), 0);
    }
    let mut c = enabled();
    c.enable_failed();
    assert_eq!(c.register_read(0x1c), Csts::CFS);
}

#[test]
fn a_failed_controller_has_its_queues_until_it_is_reset() {
    let mut c = enabled();
    assert_eq!(status(&mut c, &admin(AdminOpcode::CREATE_IO_CQ, 1 | 1 << 16, 1)), Status::SUCCESS);
    c.fail();
    assert_eq!(c.register_read(0x1c), Csts::RDY | Csts::CFS);
    assert!(!c.is_ready() && c.admin_queues().is_some());
    let effect = c.register_write(0x14, 0);
    assert_eq!(effect, RegisterEffect::ResetQueues { shutdown: false });
    // Failing once more while it is reset.
    c.fail();
    c.queues_closed(Duration::ZERO);
    assert_eq!((c.register_read(0x1c), c.queue_ids()), (0, (vec![], vec![])));
    c.fail();
    assert_eq!(c.register_read(0x1c), Csts::CFS);
    assert_eq!(c.register_write(0x14, Cc::ENABLE.0), RegisterEffect::Enabled(ADMIN));
    assert_eq!(c.register_read(0x1c), Csts::RDY);
}

#[test]
fn queues_are_created_and_deleted_in_order() {
    use AdminOpcode as Op;
    let mut c = enabled();
    let mut check = |sqe: Sqe, want: Status| {
        assert_eq!(status(&mut c, &sqe), want, "{sqe:?}");
    };
    let cq = |qid: u32, size_z: u32, cdw11| admin(Op::CREATE_IO_CQ, qid | size_z << 16, cdw11);
    let sq = |qid: u32, size_z: u32, cdw11| admin(Op::CREATE_IO_SQ, qid | size_z << 16, cdw11);
    let ok = Status::SUCCESS;
    let size = Status::INVALID_QUEUE_SIZE.dnr();
    check(cq(0, 1, 1), INVALID_QUEUE);
    check(cq(5, 1, 1), INVALID_QUEUE);
    check(cq(1, 0, 1), size);
    check(cq(1, 1024, 1), size);
    check(cq(1, 1, 3 | 5 << 16), Status::INVALID_INTERRUPT_VECTOR.dnr());
    let mut odd = cq(1, 1, 1);
    odd.set_prps(0x4010, 0);
    check(odd, Status::PRP_OFFSET_INVALID.dnr());
    check(Sqe { flags: 0x40, ..cq(1, 1, 1) }, Status::INVALID_FIELD_IN_COMMAND.dnr());
    check(sq(1, 1, 1 | 1 << 16), Status::COMPLETION_QUEUE_INVALID.dnr());
    check(cq(1, 1, 3 | 4 << 16), ok);
    check(cq(1, 1, 1), INVALID_QUEUE);
    check(cq(2, 1023, 0), ok);
    check(sq(1, 1023, 1), INVALID_QUEUE);
    check(sq(1, 1023, 1 | 5 << 16), INVALID_QUEUE);
    check(sq(1, 1023, 1 | 1 << 16), ok);
    check(sq(2, 1, 1 << 16), ok);
    check(sq(2, 1, 1 | 1 << 16), INVALID_QUEUE);
    check(admin(Op::SET_FEATURES, 7, 0), Status::COMMAND_SEQUENCE_ERROR.dnr());
    check(admin(Op::DELETE_IO_CQ, 1, 0), Status::INVALID_QUEUE_DELETION.dnr());
    check(admin(Op::DELETE_IO_CQ, 3, 0), INVALID_QUEUE);
    check(admin(Op::DELETE_IO_SQ, 3, 0), INVALID_QUEUE);
    check(admin(Op::DELETE_IO_SQ, 1, 0), ok);
    check(admin(Op::DELETE_IO_SQ, 2, 0), ok);
    check(admin(Op::DELETE_IO_CQ, 1, 0), ok);
    check(admin(Op::DELETE_IO_CQ, 1, 0), INVALID_QUEUE);
    // Entries of a size that does not exist.
    let _ = c.register_write(0x14, Cc::ENABLE.0 & !(0xff << 16));
    assert_eq!(status(&mut c, &cq(3, 1, 1)), size);
}

/// A host need not wait for one command before it sends the next.
#[test]
fn queues_on_their_way_count() {
    use AdminOpcode as Op;
    let mut c = enabled();
    let cq = |qid: u32| admin(Op::CREATE_IO_CQ, qid | 1 << 16, 1);
    let sq = |qid: u32, cqid: u32| admin(Op::CREATE_IO_SQ, qid | 1 << 16, 1 | cqid << 16);
    let (no_cq, in_use) =
        (Status::COMPLETION_QUEUE_INVALID.dnr(), Status::INVALID_QUEUE_DELETION.dnr());
    let begin = |c: &mut Controller, sqe: Sqe| match run(c, &sqe, &[]).0 {
        AdminOutcome::Queue(change) => change,
        outcome => panic!("{outcome:?}"),
    };
    let cq_1 = begin(&mut c, cq(1));
    for (sqe, want) in [
        (cq(1), INVALID_QUEUE),
        (sq(1, 1), no_cq),
        (admin(Op::DELETE_IO_CQ, 1, 0), INVALID_QUEUE),
        (admin(Op::SET_FEATURES, 7, 0), Status::COMMAND_SEQUENCE_ERROR.dnr()),
    ] {
        assert_eq!(status(&mut c, &sqe), want, "{sqe:?}");
    }
    c.queue_changed(&cq_1);
    let sq_1 = begin(&mut c, sq(1, 1));
    for (sqe, want) in [
        (sq(1, 1), INVALID_QUEUE),
        (admin(Op::DELETE_IO_SQ, 1, 0), INVALID_QUEUE),
        (admin(Op::DELETE_IO_CQ, 1, 0), in_use),
    ] {
        assert_eq!(status(&mut c, &sqe), want, "{sqe:?}");
    }
    c.queue_unchanged(&sq_1);
    assert_eq!(c.queue_ids(), (vec![], vec![1]));
    assert_eq!(status(&mut c, &sq(1, 1)), Status::SUCCESS);

    let delete = begin(&mut c, admin(Op::DELETE_IO_SQ, 1, 0));
    for (sqe, want) in [
        (sq(1, 1), INVALID_QUEUE),
        (admin(Op::DELETE_IO_SQ, 1, 0), INVALID_QUEUE),
        (admin(Op::DELETE_IO_CQ, 1, 0), in_use),
    ] {
        assert_eq!(status(&mut c, &sqe), want, "{sqe:?}");
    }
    c.queue_unchanged(&delete);
    let delete = begin(&mut c, admin(Op::DELETE_IO_SQ, 1, 0));
    c.queue_changed(&delete);
    let delete = begin(&mut c, admin(Op::DELETE_IO_CQ, 1, 0));
    for (sqe, want) in
        [(cq(1), INVALID_QUEUE), (sq(1, 1), no_cq), (admin(Op::DELETE_IO_CQ, 1, 0), INVALID_QUEUE)]
    {
        assert_eq!(status(&mut c, &sqe), want, "{sqe:?}");
    }
    c.queue_changed(&delete);
    assert_eq!(c.queue_ids(), (vec![], vec![]));
    assert_eq!(status(&mut c, &cq(1)), Status::SUCCESS);
}

#[test]
fn what_a_queue_command_says_reaches_the_driver() {
    let mut c = enabled();
    let outcome = run(&mut c, &admin(AdminOpcode::CREATE_IO_CQ, 2 | 63 << 16, 2 | 3 << 16), &[]).0;
    let cq =
        CqConfig { qid: 2, entries: 64, address: 0x4000, is_contiguous: false, vector: Some(3) };
    assert_eq!(outcome, AdminOutcome::Queue(QueueChange::CreateCq(cq)));
    c.queue_changed(&QueueChange::CreateCq(cq));
    let outcome = run(&mut c, &admin(AdminOpcode::CREATE_IO_SQ, 1 | 7 << 16, 1 | 2 << 16), &[]).0;
    let sq = SqConfig { qid: 1, entries: 8, address: 0x4000, is_contiguous: true, cqid: 2 };
    assert_eq!(outcome, AdminOutcome::Queue(QueueChange::CreateSq(sq)));
    let mut sqe = admin(AdminOpcode::DOORBELL_BUFFER_CONFIG, 0, 0);
    sqe.set_prps(0x8000, 0x9000);
    let outcome = run(&mut c, &sqe, &[]).0;
    assert_eq!(outcome, AdminOutcome::DoorbellBuffer { shadow: 0x8000, event_idx: 0x9000 });
    sqe.set_prps(0x8000, 0x9004);
    assert_eq!(status(&mut c, &sqe), Status::INVALID_FIELD_IN_COMMAND.dnr());
}

#[test]
fn interrupt_features() {
    let mut c = enabled();
    let one = Coalescing { entries: 1, time: Duration::ZERO };
    assert_eq!(c.coalescing(0), one);
    let set = |fid: u32, cdw11| admin(AdminOpcode::SET_FEATURES, fid, cdw11);
    assert_eq!(status(&mut c, &set(8, 0x0307)), Status::SUCCESS);
    assert_eq!(c.coalescing(1), Coalescing { entries: 8, time: Duration::from_micros(300) });
    assert_eq!(status(&mut c, &set(9, 1 << 16 | 1)), Status::SUCCESS);
    assert_eq!(status(&mut c, &set(9, 5)), Status::INVALID_FIELD_IN_COMMAND.dnr());
    assert_eq!((c.coalescing(1), c.coalescing(2).entries), (one, 8));
    let (outcome, _) = run(&mut c, &admin(AdminOpcode::GET_FEATURES, 9, 1), &[]);
    assert_eq!(outcome, AdminOutcome::Complete { status: Status::SUCCESS, result: 0x1_0001 });
    assert_eq!(status(&mut c, &set(9, 1)), Status::SUCCESS);
    assert_eq!(c.coalescing(1).entries, 8);
}

#[test]
fn identify_has_no_fabrics_fields() {
    let mut c = enabled();
    let mut sqe = admin(AdminOpcode::IDENTIFY, u32::from(Cns::CONTROLLER.0), 0);
    let (outcome, out) = run(&mut c, &sqe, &[]);
    assert_eq!(outcome, AdminOutcome::Complete { status: Status::SUCCESS, result: 0 });
    let id = IdentifyController::read_from_bytes(&out[..]).unwrap();
    assert_eq!((id.ioccsz.get(), id.iorcsz.get(), id.msdbd, id.ofcs.get()), (0, 0, 0, 0));
    assert_eq!((id.kas.get(), id.cmic, id.fuses.get(), id.oacs.get()), (0, 0, 1, 1 << 8));
    assert_eq!(id.sgls.get(), 1 | 1 << 16 | 1 << 18);
    assert_eq!(id.ctratt.get() & IdentifyController::CTRATT_TBKAS, 0);
    sqe.flags = 0x40;
    assert_eq!(status(&mut c, &sqe), Status::INVALID_FIELD_IN_COMMAND.dnr());
    for opcode in [AdminOpcode::FABRICS, AdminOpcode::KEEP_ALIVE] {
        let want = Status::INVALID_COMMAND_OPCODE.dnr();
        assert_eq!(status(&mut c, &admin(opcode, 0, 0)), want, "{opcode:?}");
    }
}

#[test]
fn features_give_no_more_than_they_have() {
    let mut c = enabled();
    let (_, out) = run(&mut c, &admin(AdminOpcode::GET_FEATURES, 0x0e, 0), &[]);
    assert_eq!(out.len(), 8);
    let mut set = admin(AdminOpcode::SET_FEATURES, 0x81, 1);
    assert_eq!(Controller::needs_host_memory(&set), 16);
    let done = AdminOutcome::Complete { status: Status::SUCCESS, result: 0 };
    assert_eq!(run(&mut c, &set, &[7; 16]).0, done);
    let (_, out) = run(&mut c, &admin(AdminOpcode::GET_FEATURES, 0x81, 1), &[]);
    assert_eq!(out, [7; 16]);
    set.cdw11 = U32::new(0);
    assert_eq!(Controller::needs_host_memory(&set), 8);
    assert_eq!(run(&mut c, &set, &[9; 8]).0, done);
    let (_, out) = run(&mut c, &admin(AdminOpcode::GET_FEATURES, 0x81, 0), &[]);
    assert_eq!(out, [9; 8]);
}

#[test]
fn io_commands_need_no_length_in_the_data_pointer() {
    let subsys = subsys();
    let mut sqe = Sqe { opcode: 2, nsid: U32::new(1), ..Sqe::default() };
    sqe.cdw12 = U32::new(7);
    sqe.set_prps(0x1000, 0);
    let read = IoCommand::Read { nsid: 1, offset: 0, len: 4096, fua: false };
    assert_eq!(decode(&sqe, &subsys), Ok(read));
    // Fused, as half of a pair.
    sqe.opcode = 5;
    sqe.flags = 1;
    let compare = IoCommand::Compare { nsid: 1, offset: 0, len: 4096, fua: false };
    assert_eq!(decode(&sqe, &subsys), Ok(compare));
    let mut none = subsys.namespaces().to_vec();
    none[0].compare_and_write = false;
    let none = subsys.with_namespaces(none).unwrap();
    assert_eq!(decode(&sqe, &none), Err(Status::INVALID_FIELD_IN_COMMAND.dnr()));
    sqe.opcode = 2;
    sqe.dptr = SglDescriptor::default();
    for (flags, want) in [
        (0x40, Ok(read)),
        (0x80, Ok(read)),
        (0xc0, Err(Status::INVALID_FIELD_IN_COMMAND.dnr())),
        // Fused.
        (0x01, Err(Status::INVALID_FIELD_IN_COMMAND.dnr())),
    ] {
        sqe.flags = flags;
        assert_eq!(decode(&sqe, &subsys), want, "{flags:x}");
    }
}

#[test]
fn doorbell_errors_are_events() {
    let mut c = enabled();
    for slot in 0..2 {
        let aer = admin(AdminOpcode::ASYNC_EVENT_REQUEST, 0, 0);
        let mut out = Vec::new();
        assert_eq!(c.admin(slot, &aer, &[], &mut out, Duration::ZERO), AdminOutcome::Pending);
    }
    c.doorbell_error(false);
    c.doorbell_error(true);
    let dw0 = |info| u64::from(event::dw0(event::TYPE_ERROR, info, 1));
    assert_eq!(c.poll_event(), Some((0, Status::SUCCESS, dw0(event::ERROR_DOORBELL_REGISTER))));
    assert_eq!(c.poll_event(), Some((1, Status::SUCCESS, dw0(event::ERROR_DOORBELL_VALUE))));
}

#[test]
fn a_saved_controller_goes_on() {
    let mut c = enabled();
    let set = |fid: u32, cdw11| admin(AdminOpcode::SET_FEATURES, fid, cdw11);
    for (fid, cdw11) in [(7, 1 << 16 | 1), (8, 0x0105), (9, 1 << 16 | 2), (0x0b, 0x100), (1, 3)] {
        assert_eq!(status(&mut c, &set(fid, cdw11)), Status::SUCCESS, "{fid}");
    }
    let mut of_one = set(5, 9);
    of_one.nsid = U32::new(1);
    assert_eq!(status(&mut c, &of_one), Status::SUCCESS);
    let saved = c.save();

    let mut next = controller();
    assert_eq!(next.restore(&saved, Duration::ZERO), Some(()));
    assert_eq!(next.register_read(0x14), Cc::ENABLE.0);
    assert_eq!(next.register_read(0x1c), Csts::RDY);
    assert_eq!(next.admin_queues(), Some(ADMIN));
    assert_eq!(next.io_queues_granted(), 2);
    assert_eq!(next.coalescing(2).entries, 1);
    assert_eq!(next.coalescing(1).entries, 6);
    for (fid, want) in [(0x0b, 0x100), (1, 3)] {
        let (outcome, _) = run(&mut next, &admin(AdminOpcode::GET_FEATURES, fid, 0), &[]);
        let want = AdminOutcome::Complete { status: Status::SUCCESS, result: want };
        assert_eq!(outcome, want);
    }
    let mut get = admin(AdminOpcode::GET_FEATURES, 5, 0);
    get.nsid = U32::new(1);
    let (outcome, _) = run(&mut next, &get, &[]);
    assert_eq!(outcome, AdminOutcome::Complete { status: Status::SUCCESS, result: 9 });
    assert_eq!(next.save(), saved);
    for len in 0..saved.len() {
        assert_eq!(controller().restore(&saved[..len], Duration::ZERO), None, "{len}");
    }
}
