//! A hostile host at every limit, while another one's I/O goes on as if nothing were.

use std::sync::Arc;
use std::time::Duration;

use block::Identity;
use block::fault::FaultPlan;
use block::ram::RamVolume;
use nvme::fabrics::ConnectRequest;
use nvme::spec::{AdminOpcode, Nqn, NvmOpcode, SglDescriptor, Sqe, Status};
use nvmf_target::{Limits, NamespaceConfig, TargetConfig};

use crate::host::{DEPTH, Data, Done, Queue};
use crate::rig::{BLOCK, BLOCKS, Host, Rig, SUBNQN, hostnqn, pattern, property_get, rw, uuid};

const POOL_BYTES: usize = 32 << 20;
/// What a command of an idle target's host takes at most: a network of no delay, but commands that
/// are looked at again after a while.
const SOON: Duration = Duration::from_millis(50);
const HOSTILE: u8 = 1;
const GOOD: u8 = 2;

/// Namespace 2 is a volume that nobody holds up.
fn rig(limits: Limits) -> Rig {
    Rig::with(11, |config: &mut TargetConfig| {
        config.limits = Limits { h2c_data_bytes: 128 << 10, ..limits };
        let ram =
            RamVolume::new(Identity::from_uuid(uuid(2)), (BLOCKS * BLOCK) as u64, BLOCK as u32);
        config.subsystems[0].namespaces.push(NamespaceConfig::new(2, Arc::new(ram.expect("ram"))));
    })
}

fn on(nsid: u32, mut sqe: Sqe) -> Sqe {
    sqe.nsid.set(nsid);
    sqe
}

/// Writes and reads back on every queue, and none of it takes long.
#[track_caller]
fn verify(rig: &mut Rig, host: &Host, rounds: u64) {
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        for queue in &host.io {
            let bytes = pattern(round + 1, 16 << 10);
            let slba = round * 32 % BLOCKS as u64;
            let start = rig.world.now();
            let write = on(2, rw(NvmOpcode::WRITE, slba, bytes.len()));
            let done = rig.command(queue, write, Data::Fetched(bytes.clone()));
            assert!(done.cqe.status().is_success(), "write: {}", done.cqe.status());
            let read = on(2, rw(NvmOpcode::READ, slba, bytes.len()));
            let done = rig.command(queue, read, Data::Reply(bytes.len()));
            assert!(done.reply == bytes, "round {round} reads what it wrote");
            slowest = slowest.max(rig.world.now() - start);
        }
    }
    assert!(slowest < SOON, "the slowest round took {slowest:?}");
}

/// Pool bytes in use, over all cores of the target.
fn held(rig: &Rig) -> usize {
    rig.cores[..2].iter().map(|core| POOL_BYTES - core.local().pool().available()).sum()
}

fn identify() -> (Sqe, Data) {
    let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
    sqe.dptr = SglDescriptor::transport(4096);
    sqe.cdw10.set(1);
    (sqe, Data::Reply(4096))
}

fn keep_alive() -> Sqe {
    Sqe::new(AdminOpcode::KEEP_ALIVE.0)
}

#[track_caller]
fn all_succeed(rig: &mut Rig, queue: &Queue, ids: &[u64]) {
    for id in ids {
        let done = rig.outcome(queue, *id);
        assert!(done.cqe.status().is_success(), "{}", done.cqe.status());
    }
}

#[test]
fn slow_reader_holds_little_memory_and_nobody_up() {
    let mut rig = rig(Limits::default());
    let slow = rig.host(HOSTILE, 2);
    let good = rig.host(GOOD, 2);
    let len = 1 << 20;
    let mut reads = Vec::new();
    for queue in &slow.io {
        queue.set_deaf(true);
        let read = rw(NvmOpcode::READ, 0, len);
        reads.push((0..DEPTH).map(|_| queue.send(read, Data::Reply(len))).collect::<Vec<_>>());
    }
    rig.run_for(Duration::from_millis(100));
    verify(&mut rig, &good, 100);
    // A read of a megabyte is more than may be unsent, so that each queue has one.
    assert!(held(&rig) <= 2 * len, "{} bytes are held", held(&rig));
    for (queue, ids) in slow.io.iter().zip(&reads) {
        queue.set_deaf(false);
        all_succeed(&mut rig, queue, ids);
    }
    assert_eq!(held(&rig), 0);
}

#[test]
fn host_that_fills_the_pool_leaves_some_for_others() {
    let mut rig = rig(Limits::default());
    let greedy = rig.host(HOSTILE, 6);
    let good = rig.host(GOOD, 2);
    rig.faults.hold();
    let len = 512 << 10;
    let bytes = pattern(9, len);
    let mut writes = Vec::new();
    for queue in &greedy.io {
        let write = || queue.send(rw(NvmOpcode::WRITE, 0, len), Data::Fetched(bytes.clone()));
        writes.push((0..DEPTH).map(|_| write()).collect::<Vec<_>>());
    }
    rig.run_for(Duration::from_millis(100));
    assert!(held(&rig) > POOL_BYTES / 2, "only {} bytes are held", held(&rig));
    assert!(held(&rig) <= 2 * (POOL_BYTES / 2 + len), "{} bytes are held", held(&rig));
    assert!(rig.target.status().limits.buffers > 0);
    verify(&mut rig, &good, 50);
    // Its own admin queue goes on, too.
    let start = rig.world.now();
    let (sqe, data) = identify();
    assert!(rig.command(&greedy.admin, sqe, data).cqe.status().is_success());
    assert!(rig.world.now() - start < SOON);
    rig.faults.release();
    for (queue, ids) in greedy.io.iter().zip(&writes) {
        all_succeed(&mut rig, queue, ids);
    }
    assert_eq!(held(&rig), 0);
}

#[test]
fn full_channel_holds_up_its_own_volume_alone() {
    let mut rig = rig(Limits::default());
    let busy = rig.host(HOSTILE, 4);
    let good = rig.host(GOOD, 2);
    rig.faults.set(FaultPlan { busy_per_million: 1_000_000, ..FaultPlan::default() });
    let mut reads = Vec::new();
    for queue in &busy.io {
        let read = || queue.send(rw(NvmOpcode::READ, 0, 4096), Data::Reply(4096));
        reads.push((0..DEPTH).map(|_| read()).collect::<Vec<_>>());
    }
    rig.run_for(Duration::from_millis(100));
    verify(&mut rig, &good, 50);
    assert!(rig.faults.counters().refusals > 0, "the channel was full");
    rig.faults.set(FaultPlan::default());
    for (queue, ids) in busy.io.iter().zip(&reads) {
        all_succeed(&mut rig, queue, ids);
    }
}

#[test]
fn admin_commands_beyond_the_rate_wait_and_are_refused_in_the_end() {
    let limits =
        Limits { admin_commands_per_second: 2, admin_commands_burst: 8, ..Limits::default() };
    let mut rig = rig(limits);
    let good = rig.host(GOOD, 2);
    let hostile = rig.host(HOSTILE, 1);
    let ids: Vec<u64> = (0..DEPTH - 1)
        .map(|_| {
            let (sqe, data) = identify();
            hostile.admin.send(sqe, data)
        })
        .collect();
    rig.run_for(Duration::from_millis(1));
    verify(&mut rig, &good, 50);
    // Keep Alive is not limited, nor is anybody else.
    let start = rig.world.now();
    assert!(rig.command(&hostile.admin, keep_alive(), Data::None).cqe.status().is_success());
    let (sqe, data) = identify();
    assert!(rig.command(&good.admin, sqe, data).cqe.status().is_success());
    assert!(rig.world.now() - start < SOON);
    let start = rig.world.now();
    let (mut served, mut refused) = (0, 0);
    for id in ids {
        match rig.outcome(&hostile.admin, id).cqe.status() {
            status if status.is_success() => served += 1,
            status => {
                assert_eq!(status, Status::COMMAND_INTERRUPTED, "to be retried");
                refused += 1;
            }
        }
    }
    let waited = rig.world.now() - start;
    assert!(waited > Duration::from_secs(4) && waited < Duration::from_secs(6), "{waited:?}");
    assert!((10..=18).contains(&served), "{served} served, {refused} refused");
    let hit = rig.target.status().limits;
    assert_eq!(hit.admin_commands, refused);
    assert!(hit.admin_waits >= 9, "{hit:?}");
    let (sqe, data) = identify();
    assert!(rig.command(&hostile.admin, sqe, data).cqe.status().is_success(), "and on it goes");
}

#[test]
fn controllers_and_queues_of_a_host_are_refused_as_busy() {
    let limits = Limits {
        controllers: 3,
        controllers_per_host: 2,
        connections_per_host: 3,
        ..Limits::default()
    };
    let mut rig = rig(limits);
    let good = rig.host(GOOD, 2);
    let first = rig.host(HOSTILE, 1);
    let is_busy = |done: &Done| {
        let status = done.cqe.status();
        assert_eq!(status, Status::CONNECT_CONTROLLER_BUSY, "without DNR");
    };
    let (second, done) = rig.connect(HOSTILE, SUBNQN, 0, 0xffff);
    assert!(done.cqe.status().is_success());
    let (_third, done) = rig.connect(3, SUBNQN, 0, 0xffff);
    is_busy(&done);
    second.cut();
    rig.run_for(Duration::from_millis(10));
    let (admin, done) = rig.connect(HOSTILE, SUBNQN, 0, 0xffff);
    assert!(done.cqe.status().is_success(), "room again");
    for _ in 0..20 {
        is_busy(&rig.connect(HOSTILE, SUBNQN, 0, 0xffff).1);
    }
    admin.cut();
    rig.run_for(Duration::from_millis(10));
    verify(&mut rig, &good, 20);
    let hit = rig.target.status().limits;
    assert!(hit.controllers > 0, "{hit:?}");
    let hosts = rig.target.status().hosts;
    let of = |n| hosts.iter().find(|h| h.hostnqn == hostnqn(n)).expect("a host").clone();
    assert_eq!((of(GOOD).controllers, of(GOOD).connections), (1, 3));
    assert_eq!((of(HOSTILE).controllers, of(HOSTILE).connections), (1, 2));
    drop(first);
}

#[test]
fn idle_handshakes_make_room_for_who_has_something_to_say() {
    let limits = Limits { connections: 12, handshakes_per_peer: 10, ..Limits::default() };
    let mut rig = rig(limits);
    let good = rig.host(GOOD, 2);
    let idle: Vec<Queue> = (0..9).map(|_| rig.connection()).collect();
    rig.run_for(Duration::from_millis(1));
    assert_eq!(rig.target.connected(), (12, 1), "full");
    let other = rig.host(3, 2);
    verify(&mut rig, &good, 10);
    verify(&mut rig, &other, 10);
    let gone = idle.iter().filter(|queue| queue.is_over()).count();
    assert_eq!(gone, 3, "one for each connection of the new host");
    assert!(idle[..3].iter().all(Queue::is_over), "the oldest");
    assert_eq!(rig.target.status().limits.handshakes_dropped, 3);
    // The rest go when their time is over, whoever asks.
    rig.run_for(Duration::from_secs(30));
    assert_eq!(rig.target.connected(), (6, 2));
}

#[test]
fn peer_with_too_many_handshakes_is_turned_away_and_nobody_else() {
    let limits = Limits { handshakes_per_peer: 4, ..Limits::default() };
    let mut rig = rig(limits);
    let good = rig.host(GOOD, 2);
    let idle: Vec<Queue> = (0..10).map(|_| rig.connection()).collect();
    rig.run_for(Duration::from_millis(10));
    let gone = idle.iter().filter(|queue| queue.is_over()).count();
    assert_eq!(gone, 6);
    assert_eq!(rig.target.status().limits.handshakes, 6);
    verify(&mut rig, &good, 10);
}

/// An association of one I/O queue with so many entries.
fn host_with_entries(rig: &mut Rig, n: u8, entries: u32) -> (Host, Queue) {
    let host = rig.host(n, 1);
    host.io[0].cut();
    rig.run_for(Duration::from_millis(10));
    let status = rig.target.status();
    let found = status.controllers.iter().find(|c| c.hostnqn == hostnqn(n));
    let request = ConnectRequest {
        qid: 1,
        queue_entries: entries,
        kato: Duration::ZERO,
        sq_flow_disabled: false,
        hostid: [n; 16],
        cntlid: found.expect("the controller").cntlid,
        subnqn: Nqn::new(SUBNQN).expect("well formed"),
        hostnqn: Nqn::new(&hostnqn(n)).expect("well formed"),
    };
    let (sqe, data) = request.encode();
    let queue = rig.connection();
    let done = rig.command(&queue, sqe, Data::Capsule(data.to_vec()));
    assert!(done.cqe.status().is_success(), "connect: {}", done.cqe.status());
    (host, queue)
}

#[test]
fn more_commands_than_entries_are_counted_then_not_taken() {
    let mut rig = rig(Limits::default());
    let good = rig.host(GOOD, 2);
    let (_lax, queue) = host_with_entries(&mut rig, HOSTILE, 16);
    rig.faults.hold();
    let read = |queue: &Queue| queue.send(rw(NvmOpcode::READ, 0, 512), Data::Reply(512));
    let ids: Vec<u64> = (0..DEPTH).map(|_| read(&queue)).collect();
    rig.run_for(Duration::from_millis(10));
    let overruns = u64::from(DEPTH) - 16;
    let status = rig.target.status();
    assert_eq!(status.limits.queue_overruns, overruns);
    let of = |n| status.hosts.iter().find(|h| h.hostnqn == hostnqn(n)).expect("a host");
    assert_eq!((of(HOSTILE).queue_overruns, of(GOOD).queue_overruns), (overruns, 0));
    rig.faults.release();
    all_succeed(&mut rig, &queue, &ids);
    verify(&mut rig, &good, 10);
    // Beyond the slack: the controller takes it for what it is.
    let (_hostile, queue) = host_with_entries(&mut rig, 3, 4);
    rig.faults.hold();
    queue.expect_fault();
    (0..DEPTH).for_each(|_| {
        read(&queue);
    });
    rig.until("the termination", || queue.is_over());
    assert_eq!(queue.fault(), Some(2), "PDU Sequence Error");
    rig.faults.release();
    verify(&mut rig, &good, 10);
}

#[test]
fn keep_alive_is_heard_while_the_volume_is_saturated() {
    let mut rig = rig(Limits::default());
    rig.kato = Duration::from_secs(2);
    let host = rig.host(HOSTILE, 4);
    let silent = rig.host(GOOD, 1);
    let plan = FaultPlan {
        delays_per_million: 1_000_000,
        delay_min: Duration::from_secs(3),
        delay_max: Duration::from_secs(20),
        busy_per_million: 300_000,
        ..FaultPlan::default()
    };
    rig.faults.set(plan);
    let len = 256 << 10;
    let bytes = pattern(4, len);
    for queue in &host.io {
        for i in 0..2 * DEPTH {
            if i % 2 == 0 {
                queue.send(rw(NvmOpcode::WRITE, 0, len), Data::Fetched(bytes.clone()));
            } else {
                queue.send(rw(NvmOpcode::READ, 0, len), Data::Reply(len));
            }
        }
    }
    let mut slowest = Duration::ZERO;
    for _ in 0..60 {
        rig.run_for(Duration::from_secs(1));
        let start = rig.world.now();
        assert!(rig.command(&host.admin, keep_alive(), Data::None).cqe.status().is_success());
        let (sqe, data) = (property_get(0x1c), Data::None);
        assert!(rig.command(&host.admin, sqe, data).cqe.status().is_success());
        slowest = slowest.max(rig.world.now() - start);
    }
    assert!(slowest < SOON, "{slowest:?}");
    assert!(!host.admin.is_over() && host.io.iter().all(|queue| !queue.is_over()));
    assert!(silent.admin.is_over(), "who says nothing is still found out");
    let totals = rig.target.totals(SUBNQN).expect("the subsystem");
    assert!(totals.writes > 0 && totals.reads > 0, "{totals:?}");
}
