//! What guests may do and drivers do not: commands that do not wait for one another, resets of
//! resets, and devices that lose something.

use nvme::spec::{Cqe, Sqe, Status};
use proptest::prelude::*;

use super::*;
use crate::function::{BadState, Irq, Reset, Step};
use crate::testing::wild;

/// A command that creates or deletes a queue. The memory of each is a place of its own.
fn queue_sqe(opcode: AdminOpcode, qid: u32, entries: u32, cqid: u32) -> Sqe {
    let is_cq = opcode == AdminOpcode::CREATE_IO_CQ;
    let cdw11 = if is_cq { 1 } else { 1 | cqid << 16 };
    let size = if entries == 0 { qid } else { qid | (entries - 1) << 16 };
    let mut sqe = TestHost::<Direct>::admin_sqe(opcode, size, cdw11);
    sqe.set_prps(0x80_0000 + u64::from(qid) * 0x2_0000 + if is_cq { 0x1_0000 } else { 0 }, 0);
    sqe
}

/// Puts commands into the admin queue, rings once, and gives their statuses in the order of the
/// commands.
fn batch(host: &mut TestHost<Direct>, commands: &[Sqe]) -> Vec<Status> {
    let cids: Vec<u16> = commands.iter().map(|sqe| host.push(0, sqe)).collect();
    host.kick(0);
    let found: Vec<Cqe> = commands.iter().map(|_| host.complete(0)).collect();
    let status = |cid: &u16| found.iter().find(|cqe| cqe.cid.get() == *cid).map(Cqe::status);
    cids.iter().map(|cid| status(cid).expect("a completion of each")).collect()
}

/// Queues as the cores have them: submission queue, completion queue and core.
fn on_cores(host: &mut TestHost<Direct>) -> Vec<(u16, u16, usize)> {
    let queues = host.bus.state().queues.into_iter();
    let mut found: Vec<_> = queues.map(|queue| (queue.qid, queue.cqid, queue.core)).collect();
    found.sort_unstable();
    found
}

/// A host need not wait for a completion before it rings for more.
#[test]
fn queue_commands_in_one_batch_see_one_another() {
    use AdminOpcode as Op;
    let cores = Cores::start(2);
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    host.plug_in();
    host.enable(128);
    let (ok, taken) = (Status::SUCCESS, Status::INVALID_QUEUE_IDENTIFIER.dnr());
    let in_use = Status::INVALID_QUEUE_DELETION.dnr();
    let cq = |qid, entries| queue_sqe(Op::CREATE_IO_CQ, qid, entries, 0);
    let sq = |qid, entries, cqid| queue_sqe(Op::CREATE_IO_SQ, qid, entries, cqid);
    let delete_sq = |qid| queue_sqe(Op::DELETE_IO_SQ, qid, 0, 0);
    let delete_cq = |qid| queue_sqe(Op::DELETE_IO_CQ, qid, 0, 0);

    // Each on a core of its own, if there were two.
    assert_eq!(batch(&mut host, &[cq(1, 64), cq(1, 2)]), [ok, taken]);
    // Slots of the one do not exist in the other.
    assert_eq!(batch(&mut host, &[sq(1, 64, 1), sq(1, 2, 1)]), [ok, taken]);
    let read = transfer(NvmOpcode::READ, 1, 0, 8, DATA);
    for at in 0..3u64 {
        host.write(0x82_0000 + at * 64, &read.to_bytes());
    }
    host.ring(1, false, 3);
    host.wait("completions", |host| {
        (0..3).all(|at| host.read(0x83_0000 + at * 16 + 14, 1)[0] & 1 == 1)
    });
    host.ring(1, true, 3);
    let many: Vec<Sqe> = (0..63).map(|_| sq(2, 1024, 1)).collect();
    let statuses = batch(&mut host, &many);
    assert_eq!(statuses[0], ok);
    assert!(statuses[1..].iter().all(|status| *status == taken));
    assert_eq!(on_cores(&mut host), [(1, 1, 0), (2, 1, 0)]);

    // Going, a queue has its identifier still.
    assert_eq!(
        batch(&mut host, &[delete_sq(2), delete_sq(2), sq(2, 2, 1), delete_cq(1)]),
        [ok, taken, taken, in_use]
    );
    assert_eq!(batch(&mut host, &[delete_sq(1), delete_cq(1)]), [ok, in_use]);
    assert_eq!(batch(&mut host, &[sq(1, 2, 1), delete_cq(1)]), [ok, in_use]);
    assert_eq!(batch(&mut host, &[delete_sq(1)]), [ok]);
    assert_eq!(batch(&mut host, &[delete_cq(1), delete_cq(1), cq(1, 2)]), [ok, taken, taken]);
    assert_eq!(on_cores(&mut host), []);

    // One that cannot be created leaves its identifier to the next.
    let mut nowhere = cq(1, 64);
    nowhere.set_prps(1 << 40, 0);
    assert!(!batch(&mut host, &[nowhere])[0].is_success());
    assert_eq!(batch(&mut host, &[cq(1, 64)]), [ok]);
    drop(host);
    cores.stop();
}

/// A device whose volume keeps its I/O, with a read at it.
fn held(cores: &Cores) -> (TestHost<Direct>, Arc<TestVolume>) {
    let volume = TestVolume::new(8, 1, false);
    let config =
        DeviceConfig { drain_grace: Duration::from_secs(600), ..DeviceConfig::new("test", "") };
    let volumes: Vec<(u32, Arc<dyn Volume>)> = vec![(1, volume.clone())];
    let (device, _) = build(&config, volumes, &cores.handles, None).expect("a device");
    let mut host = TestHost::new(Direct::new(device), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    host.create_queues(1, 16);
    volume.hold(true);
    host.push(1, &transfer(NvmOpcode::READ, 1, 0, 8, DATA));
    host.kick(1);
    host.wait("I/O at the volume", |host| host.bus.state().queues[0].in_flight == 1);
    (host, volume)
}

#[test]
fn resets_do_not_pile_up() {
    let cores = Cores::start(1);
    let (mut host, volume) = held(&cores);
    // The first one is under way as long as the volume has the I/O.
    host.set_register(0x14, nvme::spec::Cc::ENABLE.0 & !1);
    for _ in 0..200 {
        host.set_register(0x20, NSSR_RESET);
        host.set_register(0x14, nvme::spec::Cc::ENABLE.0);
    }
    assert_eq!(host.bus.device.outstanding(), 1);
    // Those that the client waits for are no more of them.
    let step = host.bus.device.write(Region::CONFIG, 0x69, &[0x80]);
    assert_eq!((step, host.bus.device.outstanding()), (Step::Pending, 1));
    volume.hold(false);
    cores.handles[0].wake();
    host.bus.finish(step);
    host.bus.pump();
    assert_eq!(host.register(0x1c), 0);
    host.plug_in();
    host.enable(32);
    host.create_queues(1, 16);
    exchange(&mut host, 1, 3);
    drop(host);
    cores.stop();
}

#[test]
fn a_state_does_not_go_into_a_device_that_is_used() {
    let cores = Cores::start(1);
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    host.create_queues(1, 16);
    let step = host.bus.device.set_running(false);
    host.bus.finish(step);
    let state = host.bus.device.save();
    assert_eq!(host.bus.device.restore(&state), Err(BadState::InUse));
    assert_eq!(host.bus.device.save(), state);
    let step = host.bus.device.set_running(true);
    host.bus.finish(step);
    exchange(&mut host, 1, 3);
    assert_eq!(on_cores(&mut host), [(1, 1, 0)]);

    // After a reset it does, and once more if nothing was done with it.
    let step = host.bus.device.set_running(false);
    host.bus.finish(step);
    let state = host.bus.device.save();
    let step = host.bus.device.reset(Reset::Conventional);
    host.bus.finish(step);
    assert_eq!(host.bus.device.restore(&state), Ok(()));
    assert_eq!(host.bus.device.restore(&state), Ok(()));
    let step = host.bus.device.set_running(true);
    host.bus.finish(step);
    exchange(&mut host, 1, 3);
    assert_eq!(on_cores(&mut host), [(1, 1, 0)]);
    drop(host);
    cores.stop();
}

#[test]
fn a_volume_that_not_every_core_can_open() {
    let cores = Cores::start(2);
    let limited = || -> Arc<dyn Volume> { TestVolume::new(8, 2, true) };
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    for qid in 1..=2 {
        host.create_queues(qid, 16);
    }
    assert_eq!(on_cores(&mut host), [(1, 1, 0), (2, 2, 1)]);
    let outcome = host.bus.attach(2, limited());
    let Err(AttachError::Open { nsid: 2, reason, .. }) = &outcome else { panic!("{outcome:?}") };
    assert_eq!(reason, "no more queues");
    assert_eq!(host.bus.state().namespaces.len(), 1);
    exchange(&mut host, 2, 4);
    assert_eq!(host.bus.attach(2, ram(8, 2)), Ok(()), "the identifier is free");
    host.disable();

    // Without queues there, it can do without the core.
    assert_eq!(host.bus.attach(3, limited()), Ok(()));
    host.enable(32);
    for qid in 1..=3 {
        host.create_queues(qid, 16);
        let read = transfer(NvmOpcode::READ, 3, 0, 8, DATA);
        assert!(host.run(qid, &read).status().is_success());
    }
    let first = on_cores(&mut host)[0].2;
    assert!(on_cores(&mut host).iter().all(|(.., core)| *core == first));
    drop(host);

    // Two such volumes may not be on the same core, so that none has both.
    let volumes = vec![(1, limited()), (2, ram(8, 1))];
    let mut host = TestHost::new(direct(&cores, volumes, None), MEMORY, 4);
    host.plug_in();
    host.bus.state();
    assert_eq!(host.bus.state().namespaces.len(), 2);
    host.enable(32);
    host.create_queues(1, 16);
    let read = transfer(NvmOpcode::READ, 1, 0, 8, DATA);
    assert!(host.run(1, &read).status().is_success());
    drop(host);
    cores.stop();
}

#[test]
fn a_function_in_d3hot_does_nothing() {
    const PMCSR: u64 = 0x44;
    let cores = Cores::start(1);
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    host.create_queues(1, 16);
    exchange(&mut host, 1, 3);
    let read = transfer(NvmOpcode::READ, 1, 0, 8, DATA);
    let cid = host.push(1, &read);
    host.bus.write(Region::CONFIG, PMCSR, &[3]);
    assert_eq!((host.register(0x1c), host.register(0x14)), (u32::MAX, u32::MAX));
    host.set_register(0x14, 0);
    host.kick(1);
    // What was rung before, and not seen.
    host.bus.device.record().view().ring(1, false, 7);
    host.bus.state();
    cores.handles[0].wake();
    host.bus.state();
    assert_eq!(host.pop(1), None);
    host.bus.write(Region::CONFIG, PMCSR, &[0]);
    assert_eq!(host.register(0x1c), Csts::RDY);
    assert_eq!(host.complete(1).cid.get(), cid);
    exchange(&mut host, 1, 3);
    drop(host);
    cores.stop();
}

#[test]
fn intx_shows_in_the_status_register() {
    let cores = Cores::start(1);
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    let step = host.bus.device.set_memory(&host.memory, false);
    host.bus.finish(step);
    let line = Arc::new(TestClient::eventfd());
    host.bus.device.set_trigger(Irq::Intx, 0, Some(Arc::clone(&line)));
    host.bus.write(Region::CONFIG, 4, &[6, 0]);
    host.enable(32);
    let status = |host: &mut TestHost<Direct>| {
        let mut status = [0];
        host.bus.read(Region::CONFIG, 6, &mut status);
        status[0] >> 3 & 1
    };
    assert_eq!(status(&mut host), 0);
    host.push(0, &TestHost::<Direct>::admin_sqe(AdminOpcode::IDENTIFY, 1, 0));
    host.kick(0);
    host.wait("completion", |host| host.pop(0).is_some());
    assert_eq!(status(&mut host), 1);
    let mut count = [0; 8];
    rustix::io::read(&*line, &mut count).expect("it was signalled");
    host.set_register(0x0c, 1);
    assert_eq!(status(&mut host), 0, "masked");
    host.set_register(0x10, 1);
    assert_eq!(status(&mut host), 1);
    host.release(0);
    assert_eq!(status(&mut host), 0, "taken");
    drop(host);
    cores.stop();
}

#[test]
fn a_core_that_ends_is_told_of() {
    let cores = Cores::start(2);
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    for qid in 1..=2 {
        host.create_queues(qid, 16);
    }
    exchange(&mut host, 2, 4);
    host.bus.may_fail = true;
    cores.handles[1].stop();
    host.wait("end of the core", |host| host.bus.has_failed);
    assert_eq!(host.register(0x1c), Csts::RDY | Csts::CFS);
    host.disable();
    host.enable(32);
    for qid in 1..=3 {
        host.create_queues(qid, 16);
    }
    exchange(&mut host, 3, 6);
    assert!(on_cores(&mut host).iter().all(|(.., core)| *core == 0));
    // And without any.
    host.bus.has_failed = false;
    cores.handles[0].stop();
    host.wait("end of the other", |host| host.bus.has_failed);
    host.disable();
    host.set_register(0x14, nvme::spec::Cc::ENABLE.0);
    assert_eq!(host.register(0x1c) & Csts::CFS, Csts::CFS);
    let step = host.bus.device.detach();
    host.bus.finish(step);
    drop(host);
    cores.stop();
}

#[test]
fn a_guest_that_does_anything() {
    let cores = Cores::start(2);
    let config = ProptestConfig { cases: 64, ..ProptestConfig::default() };
    proptest!(config, |(bytes in proptest::collection::vec(any::<u8>(), 1..1000))| {
        wild(&cores.handles, &bytes);
    });
    cores.stop();
}
