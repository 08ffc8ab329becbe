//! Abort, Keep Alive, properties and NVM Subsystem Reset.

use super::*;
use crate::spec::NSSR_RESET;

fn abort(sqid: u16, cid: u16) -> Sqe {
    let mut sqe = Sqe::new(AdminOpcode::ABORT.0);
    sqe.cdw10.set(u32::from(cid) << 16 | u32::from(sqid));
    sqe
}

#[test]
fn a_held_request_is_aborted_here_and_everything_else_by_the_driver() {
    let mut rig = Rig::io();
    let mut aer = Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0);
    aer.cid.set(0x77);
    rig.run(aer).unwrap();
    assert_eq!(rig.run(abort(1, 0x77)), Ok(ASKED), "another queue");
    assert_eq!(rig.asked.take(), Some(AdminOutcome::Abort { sqid: 1, cid: 0x77 }));
    assert_eq!(rig.run(abort(0, 0x77)), Ok(0));
    assert_eq!(rig.ctrl.poll_event(), Some((5, Status::COMMAND_ABORT_REQUESTED, 0)));
    assert_eq!(rig.run(abort(0, 0x77)), Ok(ASKED), "it is gone");
}

#[test]
fn aborts_are_limited() {
    let mut rig = Rig::io();
    for _ in 0..ABORT_MAX {
        assert_eq!(rig.run(abort(1, 1)), Ok(ASKED));
    }
    let limit = Err(Status::ABORT_COMMAND_LIMIT_EXCEEDED.dnr());
    assert_eq!(rig.run(abort(1, 1)), limit);
    rig.ctrl.abort_done();
    assert_eq!(rig.run(abort(1, 1)), Ok(ASKED));
    assert_eq!(rig.run(abort(1, 1)), limit);
}

#[test]
fn a_subsystem_reset_is_the_drivers() {
    let mut rig = Rig::io();
    assert_ne!(rig.get(Property::CAP).unwrap() & Cap::NSSRS, 0);
    assert_eq!(rig.get(Property::NSSR), Ok(0));
    assert_eq!(rig.set(Property::NSSR, 1), Ok(0), "anything but \"NVMe\" has no effect");
    assert_eq!(rig.asked, None);
    assert_eq!(rig.set(Property::NSSR, NSSR_RESET), Ok(ASKED));
    let outcome = AdminOutcome::SubsystemReset { status: Status::SUCCESS, result: 0 };
    assert_eq!(rig.asked, Some(outcome));
    rig.ctrl.note_subsystem_reset();
    assert_eq!(rig.get(Property::CSTS), Ok(u64::from(Csts::NSSRO | Csts::RDY)));
    rig.set(Property::CSTS, Csts::NSSRO).unwrap();
    assert_eq!(rig.get(Property::CSTS), Ok(u64::from(Csts::RDY)));
}
