//! Admin commands that reach beyond their own queue, and the discovery controller.

use std::sync::Arc;
use std::time::Duration;

use block::fault::FaultPlan;
use block::ram::RamVolume;
use block::{Identity, IoError, Op};
use nvme::spec::{AdminOpcode, DISCOVERY_NQN, Nqn, NvmOpcode, SglDescriptor, Sqe, Status};
use nvme::subsys::discovery::{DiscoveryEntry, HEADER_LEN, parse_header, parse_records};
use nvmf_target::{NamespaceConfig, Request, SubsystemConfig};

use crate::host::{Data, Queue};
use crate::rig::{
    BLOCK, Rig, SUBNQN, hostnqn, pattern, property_get, property_set, rw, status, uuid, write,
};

const OWN_NQN: &str = "nqn.2026-11.io.penstock:discovery";

fn abort(sqid: u16, cid: u16) -> Sqe {
    let mut sqe = Sqe::new(AdminOpcode::ABORT.0);
    sqe.cdw10.set(u32::from(cid) << 16 | u32::from(sqid));
    sqe
}

#[test]
fn abort_ends_what_waits_on_any_core_and_leaves_what_is_at_the_volume() {
    let mut rig = Rig::new(1);
    let host = rig.host(1, 3);
    rig.faults.hold();
    // Queues 1 and 3 are on one core, and want more memory together than it has.
    let len = 1 << 20;
    let mut sent: Vec<(Queue, u64)> = Vec::new();
    for nth in 0..32 {
        for io in [&host.io[0], &host.io[2]] {
            sent.push((io.clone(), io.send(rw(NvmOpcode::READ, 0, len), Data::Reply(len))));
        }
        if nth == 2 {
            // Some of both are at the volume.
            rig.run_for(Duration::from_millis(50));
        }
    }
    rig.run_for(Duration::from_millis(50));
    let admin = host.admin.clone();
    let mut aborted = 0;
    for cid in 0..32 {
        // The Connect command had identifier 0 and is over: the reads begin with it again.
        let (queue, id) = &sent[2 * usize::from(cid) + 1];
        let done = rig.command(&admin, abort(3, cid), Data::None);
        assert_eq!(status(&done), Ok(()));
        if done.cqe.dw0() & 1 == 0 {
            aborted += 1;
            rig.until("the aborted command's end", || queue.is_done(*id));
            let done = queue.take(*id).expect("done");
            assert_eq!(status(&done), Err(Status::COMMAND_ABORT_REQUESTED));
        } else {
            assert!(!queue.is_done(*id), "command {cid} is at the volume");
        }
    }
    assert!((1..32).contains(&aborted), "{aborted} of 32");
    // What does not exist is not aborted.
    for sqe in [abort(3, 500), abort(9, 0), abort(0, 77)] {
        assert_eq!(rig.command(&admin, sqe, Data::None).cqe.dw0() & 1, 1);
    }
    rig.faults.release();
    rig.until("all ends", || {
        sent.retain(|(queue, id)| match queue.take(*id) {
            Some(done) => {
                assert!(done.cqe.status().is_success());
                false
            }
            None => true,
        });
        sent.len() <= aborted
    });
    rig.write(&host.io[2], 0, &pattern(1, 4096));
}

#[test]
fn host_that_protects_a_namespace_binds_all_and_is_answered_after_the_last_write() {
    let mut rig = Rig::new(2);
    let (one, two) = (rig.host(1, 1), rig.host(2, 1));
    rig.faults.set(FaultPlan {
        delays_per_million: 1_000_000,
        delay_min: Duration::from_secs(2),
        delay_max: Duration::from_secs(2),
        ..FaultPlan::default()
    });
    let (sqe, data) = write(0, &pattern(1, 4096));
    let old = two.io[0].send(sqe, data);
    rig.run_for(Duration::from_millis(100));
    let protect = |on: u32| {
        let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
        sqe.nsid.set(1);
        sqe.cdw10.set(0x84);
        sqe.cdw11.set(on);
        sqe
    };
    let id = one.admin.send(protect(1), Data::None);
    rig.until("the answer", || one.admin.is_done(id));
    assert!(two.io[0].is_done(old), "not before the write of before is over");
    assert_eq!(status(&one.admin.take(id).expect("done")), Ok(()));
    assert_eq!(status(&two.io[0].take(old).expect("done")), Ok(()));
    rig.faults.set(FaultPlan::default());
    for host in [&one, &two] {
        let (sqe, data) = write(0, &pattern(2, 4096));
        let done = rig.command(&host.io[0], sqe, data);
        assert_eq!(status(&done), Err(Status::NAMESPACE_IS_WRITE_PROTECTED.dnr()));
    }
    assert!(rig.target.status().subsystems[0].namespaces[0].write_protect);
    assert_eq!(status(&rig.command(&two.admin, protect(0), Data::None)), Ok(()));
    rig.write(&one.io[0], 0, &pattern(2, 4096));

    // What was written before is on the media when the host is told that nothing can be.
    rig.faults.set(FaultPlan {
        errors_per_million: 1_000_000,
        error: Some(IoError::Medium),
        only: Some(Op::Flush),
        ..FaultPlan::default()
    });
    let done = rig.command(&one.admin, protect(1), Data::None);
    assert_eq!(status(&done), Err(Status::WRITE_FAULT.dnr()), "it could not be flushed");
    assert_eq!(status(&rig.command(&two.admin, protect(0), Data::None)), Ok(()), "no flush");
    rig.faults.set(FaultPlan::default());
    assert_eq!(status(&rig.command(&one.admin, protect(1), Data::None)), Ok(()));
}

#[test]
fn subsystem_reset_is_answered_ends_all_and_is_told_of_later() {
    let other = "nqn.2026-11.io.penstock:other";
    let mut rig = Rig::with(3, |config| {
        config.subsystems.push(SubsystemConfig::new(other, "OTHER"));
    });
    let (one, two, else_) = (rig.host(1, 2), rig.host(2, 1), rig.host_of(3, other, 1));
    let csts =
        |rig: &mut Rig, queue: &Queue| rig.command(queue, property_get(0x1c), Data::None).cqe.dw0();
    assert_eq!(csts(&mut rig, &one.admin) & 1 << 4, 0);
    let reset = property_set(0x20, 0x4e56_4d65);
    assert_eq!(status(&rig.command(&one.admin, reset, Data::None)), Ok(()), "answered first");
    let queues = [&one.admin, &one.io[0], &one.io[1], &two.admin, &two.io[0]];
    rig.until("all queues end", || queues.iter().all(|queue| queue.is_over()));
    assert!(!else_.admin.is_over() && !else_.io[0].is_over(), "another subsystem feels nothing");
    let two = rig.host(2, 1);
    assert_ne!(csts(&mut rig, &two.admin) & 1 << 4, 0, "NSSRO");
    assert_eq!(csts(&mut rig, &else_.admin) & 1 << 4, 0);
}

#[test]
fn controllers_are_listed_by_subsystem_and_by_namespace() {
    let mut rig = Rig::with(4, |config| {
        let ram = RamVolume::new(Identity::from_uuid(uuid(7)), 1 << 20, BLOCK as u32);
        config.subsystems[0].namespaces.push(NamespaceConfig {
            hosts: Some(vec![Nqn::new(hostnqn(2).as_str()).expect("well formed")]),
            ..NamespaceConfig::new(7, Arc::new(ram.expect("memory")))
        });
    });
    let (one, two) = (rig.host(1, 1), rig.host(2, 1));
    let list = |rig: &mut Rig, cns: u32, nsid: u32| -> Vec<u16> {
        let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
        sqe.nsid.set(nsid);
        sqe.dptr = SglDescriptor::transport(4096);
        sqe.cdw10.set(cns);
        let done = rig.command(&two.admin, sqe, Data::Reply(4096));
        assert_eq!(status(&done), Ok(()), "CNS {cns:x}h of namespace {nsid}");
        let words: Vec<_> =
            done.reply.chunks(2).map(|w| u16::from_le_bytes([w[0], w[1]])).collect();
        words[1..=usize::from(words[0])].to_vec()
    };
    let ids: Vec<u16> = rig.target.status().controllers.iter().map(|c| c.cntlid).collect();
    assert_eq!(ids.len(), 2);
    assert_eq!(list(&mut rig, 0x13, 0), ids);
    assert_eq!(list(&mut rig, 0x12, 1), ids);
    assert_eq!(list(&mut rig, 0x12, 7), ids[1..], "the one that sees it");
    one.admin.cut();
    rig.run_for(Duration::from_secs(1));
    assert_eq!(list(&mut rig, 0x13, 0), ids[1..]);
}

/// A discovery controller of host `n`, reached by `nqn`.
fn discovery(rig: &mut Rig, n: u8, nqn: &str) -> Queue {
    let (queue, done) = rig.connect(n, nqn, 0, 0xffff);
    assert_eq!(status(&done), Ok(()), "{nqn}");
    rig.enable(&queue);
    queue
}

fn log(rig: &mut Rig, queue: &Queue) -> (u64, Vec<DiscoveryEntry>) {
    let len = 16 << 10;
    let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
    sqe.dptr = SglDescriptor::transport(len);
    sqe.cdw10.set(0x70 | (len / 4 - 1) << 16);
    let done = rig.command(queue, sqe, Data::Reply(len as usize));
    assert_eq!(status(&done), Ok(()));
    let header = parse_header(&done.reply, 64).expect("sound");
    let records = parse_records(&done.reply[HEADER_LEN..]);
    let entries = records.take(header.records as usize).map(|r| r.expect("sound")).collect();
    (header.genctr, entries)
}

#[test]
fn discovery_controllers_tell_their_host_of_what_changes_for_it() {
    let mut rig = Rig::with(5, |config| {
        config.discovery_nqn = Some(Nqn::new(OWN_NQN).expect("well formed"));
        config.discovery_generation = 1000;
    });
    let (one, two) = (discovery(&mut rig, 1, DISCOVERY_NQN), discovery(&mut rig, 2, OWN_NQN));
    for queue in [&one, &two] {
        let (genctr, entries) = log(&mut rig, queue);
        let nqns: Vec<_> = entries.iter().map(|e| e.subnqn.as_str()).collect();
        assert_eq!((genctr, nqns), (1000, vec![OWN_NQN, SUBNQN]));
    }
    let mut events = Vec::new();
    for queue in [&one, &two] {
        let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
        sqe.cdw10.set(0x0b);
        sqe.cdw11.set(1 << 31);
        assert_eq!(status(&rig.command(queue, sqe, Data::None)), Ok(()));
        events.push(queue.send(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0), Data::None));
    }
    // A subsystem for host 2 alone, and a hidden one for nobody.
    let secret = "nqn.2026-11.io.penstock:secret";
    let hosts = Some(vec![Nqn::new(hostnqn(2).as_str()).expect("well formed")]);
    let hidden = SubsystemConfig { hidden: true, ..SubsystemConfig::new("nqn.2026-11.x:h", "H") };
    let shown = SubsystemConfig { hosts, ..SubsystemConfig::new(secret, "S") };
    for subsystem in [hidden, shown] {
        let change = rig.target.begin(Request::AddSubsystem(subsystem)).expect("sound");
        rig.until("the change", || change.is_done());
    }
    rig.run_for(Duration::from_millis(10));
    assert!(!one.is_done(events[0]), "nothing is new for host 1");
    let done = two.take(events[1]).expect("host 2 is told");
    assert_eq!(done.cqe.dw0() & 0xffff, 0xf002, "Discovery Log Page Change");
    let (genctr, entries) = log(&mut rig, &two);
    assert!(genctr > 1000);
    assert!(entries.iter().any(|e| e.subnqn.as_str() == secret));
    let (genctr, entries) = log(&mut rig, &one);
    assert_eq!((genctr, entries.len()), (1000, 2), "the same page has the same number");

    // Host 1 may not connect there; Host 2 may.
    let (_, done) = rig.connect(1, secret, 0, 0xffff);
    assert_eq!(status(&done), Err(Status::CONNECT_INVALID_HOST.dnr()));
    let (_, done) = rig.connect(2, secret, 0, 0xffff);
    assert_eq!(status(&done), Ok(()));
}
