//! Nothing of an old state lands after a change was answered: over seeded schedules in which I/O
//! takes up to seconds, hosts go on sending, and every kind of change comes at any moment.
//!
//! When a change is finished, the test takes the blocks of the hosts that lost them and writes its
//! own mark there, below the target. From then on every block must keep it.

use std::sync::Arc;
use std::time::Duration;

use block::fault::{FaultHandle, FaultPlan, FaultVolume};
use block::ram::RamVolume;
use block::{Identity, Io, Op, Volume};
use nvme::spec::{AdminOpcode, Nqn, NvmOpcode, SglDescriptor, Sqe, Status};
use nvmf_target::{AnaState, Change, ChangeError, ListenerKind, NamespaceConfig, Port, Request};
use reactor::Local;

use crate::host::{Data, Queue};
use crate::rig::{
    BLOCK, BLOCKS, Host, Rig, SUBNQN, hostnqn, pattern, ranged, rw, status, uuid, write,
};

const SEEDS: u64 = 1600;
/// Blocks that one host writes; host `n` has those from `n` times as many on.
const SHARE: u64 = 64;
/// Blocks of one command at most.
const REQUEST: u64 = 12;
/// Longer than any I/O takes.
const SETTLE: Duration = Duration::from_secs(6);

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    }
}

/// The way below the target.
struct Below {
    ram: Arc<dyn Volume>,
    local: Local,
}

impl Below {
    fn io(&self, op: Op, block: u64, bytes: &mut [u8]) {
        let mut channel = self.ram.open(&self.local, 1).expect("memory");
        let mut io = Box::new(Io::with_capacity(4));
        (io.op, io.offset, io.len) = (op, block * BLOCK as u64, bytes.len() as u64);
        self.local.pool().alloc(bytes.len(), &mut io.data).expect("memory for a test");
        io.data.copy_from_slice(0, bytes).expect("as long");
        channel.submit(io).expect("one at a time");
        let mut back = None;
        channel.poll(&mut |io| back = Some(io));
        let io = back.expect("memory completes at once");
        assert_eq!(io.result, Ok(()));
        io.data.copy_to_slice(0, bytes).expect("as long");
    }

    /// Makes a host's blocks the test's own.
    fn seize(&self, host: u8) {
        let mut mark = vec![0xee; SHARE as usize * BLOCK];
        self.io(Op::Write, u64::from(host) * SHARE, &mut mark);
    }

    /// Blocks of a host that are not the test's own any more.
    fn lost(&self, host: u8) -> Vec<usize> {
        let mut bytes = vec![0; SHARE as usize * BLOCK];
        self.io(Op::Read, u64::from(host) * SHARE, &mut bytes);
        let is_mine = |block: &[u8]| block.iter().all(|b| *b == 0xee);
        bytes.chunks(BLOCK).enumerate().filter(|(_, b)| !is_mine(b)).map(|(at, _)| at).collect()
    }
}

/// A host that changes its own blocks, without an end and without looking back.
struct Writer {
    n: u8,
    host: Host,
    sent: Vec<(Queue, u64)>,
}

impl Writer {
    fn send(&mut self, random: &mut Random) {
        let queue = &self.host.io[random.below(self.host.io.len() as u64) as usize];
        let base = u64::from(self.n) * SHARE;
        let blocks = 1 + random.below(REQUEST);
        let at = base + random.below(SHARE - blocks);
        let len = blocks as usize * BLOCK;
        let bytes = pattern(random.below(1 << 40), len);
        let (sqe, data) = match random.below(8) {
            0 => (ranged(NvmOpcode::WRITE_ZEROES, at, blocks as usize), Data::None),
            1 => {
                // Many ranges: pieces that are on their way one after the other.
                let ranges: Vec<u8> = (0..blocks)
                    .flat_map(|_| {
                        let mut range = [0; 16];
                        range[4] = 1;
                        range[8..].copy_from_slice(&(base + random.below(SHARE)).to_le_bytes());
                        range
                    })
                    .collect();
                let mut sqe = Sqe::new(NvmOpcode::DATASET_MANAGEMENT.0);
                sqe.nsid.set(1);
                sqe.dptr = SglDescriptor::in_capsule(0, ranges.len() as u32);
                sqe.cdw10.set(blocks as u32 - 1);
                sqe.cdw11.set(4);
                (sqe, Data::Capsule(ranges))
            }
            2 => {
                let mut sqe = Sqe::new(NvmOpcode::FLUSH.0);
                sqe.nsid.set(1);
                (sqe, Data::None)
            }
            3 | 4 => {
                let mut sqe = rw(NvmOpcode::WRITE, at, len);
                sqe.dptr = SglDescriptor::in_capsule(0, len as u32);
                (sqe, Data::Capsule(bytes))
            }
            _ => (rw(NvmOpcode::WRITE, at, len), Data::Fetched(bytes)),
        };
        let queue = queue.clone();
        let id = queue.send(sqe, data);
        self.sent.push((queue, id));
    }

    /// What has ended since the last call.
    fn ended(&mut self) -> Vec<Result<(), Status>> {
        let mut ended = Vec::new();
        self.sent.retain(|(queue, id)| match queue.take(*id) {
            Some(done) => {
                ended.push(status(&done));
                false
            }
            None => !queue.is_over(),
        });
        ended
    }
}

struct World {
    rig: Rig,
    random: Random,
    below: Below,
    writers: Vec<Writer>,
    faults: FaultHandle,
    /// Namespace 1's volume, as the target has it.
    volume: Arc<dyn Volume>,
}

const OTHER_PORT: u16 = 2;

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let bytes = (BLOCKS * BLOCK) as u64;
        let ram: Arc<dyn Volume> = Arc::new(
            RamVolume::new(Identity::from_uuid(uuid(9)), bytes, BLOCK as u32).expect("memory"),
        );
        let (volume, faults) = FaultVolume::new(Arc::clone(&ram), seed);
        let volume: Arc<dyn Volume> = Arc::new(volume);
        let mut rig = Rig::with(seed, |config| {
            config.subsystems[0].namespaces[0] = NamespaceConfig::new(1, Arc::clone(&volume));
            let ram = RamVolume::new(Identity::from_uuid(uuid(8)), bytes, BLOCK as u32);
            let second = NamespaceConfig::new(2, Arc::new(ram.expect("memory")));
            config.subsystems[0].namespaces.push(second);
            let addr = "10.0.0.2:4420".parse().expect("an address");
            config.ports.push(Port {
                id: OTHER_PORT,
                kind: ListenerKind::Io,
                addr,
                tls: nvmf_target::Tls::Off,
                auth: nvmf_target::AuthDemand::default(),
                hidden: false,
            });
        });
        let below = Below { ram, local: rig.cores[2].local() };
        let mut writers = Vec::new();
        for n in 1..=2 {
            rig.port = if n == 1 { 1 } else { OTHER_PORT };
            rig.kato = if n == 1 { Duration::from_secs(2) } else { Duration::ZERO };
            let host = rig.host(n, 2);
            writers.push(Writer { n, host, sent: Vec::new() });
        }
        let longest = random.below(3_000);
        faults.set(FaultPlan {
            delays_per_million: 200_000 + random.below(800_000) as u32,
            delay_max: Duration::from_millis(longest),
            busy_per_million: 20_000,
            ..FaultPlan::default()
        });
        World { rig, random, below, writers, faults, volume }
    }

    /// Both hosts send and time passes, for a while.
    fn stir(&mut self, rounds: u64) {
        for _ in 0..rounds {
            for writer in &mut self.writers {
                if writer.sent.len() < 24 {
                    writer.send(&mut self.random);
                }
            }
            let pause = Duration::from_micros(self.random.below(2_000));
            self.rig.run_for(pause);
            for writer in &mut self.writers {
                writer.ended();
            }
        }
    }

    fn finish(&mut self, change: Change) {
        // Hosts go on sending while it is waited for.
        for _ in 0..50 {
            if change.is_done() {
                return;
            }
            self.stir(1);
        }
        self.rig.until("the change's end", || change.is_done());
    }

    fn begin(&mut self, request: Request) -> Change {
        self.rig.target.begin(request).expect("a sound request")
    }

    /// `losers` have lost their blocks: whatever they sent and send, it does not land. The others
    /// feel nothing.
    fn judge(&mut self, losers: &[u8], seed: u64, kind: &str) {
        for n in losers {
            self.below.seize(*n);
        }
        for writer in &mut self.writers {
            writer.ended();
        }
        for _ in 0..6 {
            for writer in &mut self.writers {
                writer.send(&mut self.random);
            }
        }
        self.rig.run_for(SETTLE);
        for n in losers {
            let lost = self.below.lost(*n);
            assert!(lost.is_empty(), "seed {seed}, {kind}: host {n} wrote blocks {lost:?} late");
        }
        for writer in self.writers.iter_mut().filter(|w| !losers.contains(&w.n)) {
            let mut ended = writer.ended();
            // Ranges of a deallocate come one after the other.
            for _ in 0..REQUEST {
                if !writer.sent.is_empty() {
                    self.rig.run_for(SETTLE);
                    ended.extend(writer.ended());
                }
            }
            assert!(!ended.is_empty() && writer.sent.is_empty(), "seed {seed}, {kind}");
            for end in ended {
                assert_eq!(end, Ok(()), "seed {seed}, {kind}: host {} is innocent", writer.n);
            }
        }
    }
}

fn nqn(n: u8) -> Nqn {
    Nqn::new(hostnqn(n).as_str()).expect("well formed")
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let rounds = 1 + world.random.below(12);
    world.stir(rounds);
    let subsystem = || SUBNQN.to_owned();
    match seed % 10 {
        0 => {
            let change = world.begin(Request::Detach { nqn: subsystem(), nsid: 1 });
            world.finish(change);
            let users = Arc::strong_count(&world.volume);
            assert_eq!(users, 1, "seed {seed}: a detached volume is still held");
            world.judge(&[1, 2], seed, "detach");
        }
        1 | 2 => {
            let state = [AnaState::Inaccessible, AnaState::PersistentLoss, AnaState::Change]
                [world.random.below(3) as usize];
            let nqn = (seed % 10 == 1).then(subsystem);
            let change = world.begin(Request::Ana { nqn, port: 1, group: 1, state });
            world.finish(change);
            world.judge(&[1], seed, "ANA");
        }
        3 => {
            let hosts = Some(vec![nqn(2)]);
            let change = world.begin(Request::NamespaceHosts { nqn: subsystem(), nsid: 1, hosts });
            world.finish(change);
            world.judge(&[1], seed, "namespace mask");
        }
        4 => {
            let hosts = Some(vec![nqn(2)]);
            let change = world.begin(Request::SubsystemHosts { nqn: subsystem(), hosts });
            world.finish(change);
            world.judge(&[1], seed, "subsystem mask");
        }
        5 => {
            let request = Request::DisconnectHost { nqn: None, hostnqn: nqn(1) };
            let change = world.begin(request);
            world.finish(change);
            world.judge(&[1], seed, "disconnected host");
        }
        6 => {
            let change =
                world.begin(Request::WriteProtect { nqn: subsystem(), nsid: 1, protect: true });
            world.finish(change);
            world.judge(&[1, 2], seed, "write protect");
        }
        7 => {
            let change = world.begin(Request::RemoveSubsystem { nqn: subsystem() });
            world.finish(change);
            assert_eq!(Arc::strong_count(&world.volume), 1, "seed {seed}");
            world.judge(&[1, 2], seed, "removed subsystem");
        }
        8 => {
            // The admin queue is lost; the I/O queues are still there and full.
            world.writers[0].host.admin.cut();
            let again = reconnect(&mut world);
            world.judge(&[1], seed, "reconnect");
            drop(again);
        }
        _ => {
            // Nothing is heard of the host: its next controller comes after the last write.
            world.rig.run_for(Duration::from_secs(6));
            let again = reconnect(&mut world);
            let is_over = world.writers[0].host.admin.is_over();
            assert!(is_over, "seed {seed}: keep alive timeout");
            world.judge(&[1], seed, "keep alive timeout");
            drop(again);
        }
    }
}

/// Host 1 comes again, by a port of its choice; its controller begins when the old one has ended.
fn reconnect(world: &mut World) -> Host {
    world.rig.port = 1 + world.random.below(2) as u16;
    world.rig.kato = Duration::ZERO;
    // What sends no command at all is not in the way of the new one.
    world.rig.host(1, 1)
}

#[test]
fn no_write_of_before_lands_after_a_change_was_answered() {
    let only = std::env::var("PENSTOCK_SIM_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    for seed in only.map_or(0..SEEDS, |seed| seed..seed + 1) {
        run(seed);
    }
}

/// Failover as a stock host does it: what the lost path did not answer goes out again by the other
/// one at once, while the first copy still is at the volume.
#[test]
fn what_a_lost_path_left_at_the_volume_does_not_overtake_the_other_path() {
    for seed in 0..400 {
        let mut world = World::new(seed);
        world.rig.port = OTHER_PORT;
        world.rig.kato = Duration::ZERO;
        let other = world.rig.host(1, 2);
        world.faults.set(FaultPlan {
            delays_per_million: 800_000,
            delay_max: Duration::from_secs(4),
            ..FaultPlan::default()
        });
        let rounds = 4 + world.random.below(12);
        world.stir(rounds);
        let lost = world.writers.remove(0).host;
        if seed % 4 != 0 {
            // Otherwise it falls silent, until its keep alive timeout.
            lost.admin.cut();
            if seed % 2 == 0 {
                lost.io.iter().for_each(Queue::cut);
            }
        }
        // The target knows, on all cores; what is at the volume takes longer.
        let target = world.rig.target.clone();
        let is_known = || target.status().controllers.iter().any(|c| c.draining);
        world.rig.until("the end of the path", || is_known() || target.connected().1 == 2);
        world.rig.run_for(Duration::from_millis(1));
        let fresh = pattern(1 << 41 | seed, SHARE as usize * BLOCK);
        let blocks = 1 + world.random.below(REQUEST);
        let sent: Vec<(Queue, u64)> = fresh
            .chunks(blocks as usize * BLOCK)
            .zip((SHARE..).step_by(blocks as usize))
            .map(|(bytes, at)| {
                let queue = other.io[world.random.below(2) as usize].clone();
                let (sqe, data) = write(at, bytes);
                let id = queue.send(sqe, data);
                (queue, id)
            })
            .collect();
        for (queue, id) in sent {
            assert_eq!(status(&world.rig.outcome(&queue, id)), Ok(()), "seed {seed}");
        }
        world.rig.run_for(SETTLE);
        let mut found = vec![0; fresh.len()];
        world.below.io(Op::Read, SHARE, &mut found);
        let late: Vec<u64> = (0..SHARE)
            .filter(|at| {
                let bytes = *at as usize * BLOCK..(*at as usize + 1) * BLOCK;
                found[bytes.clone()] != fresh[bytes]
            })
            .collect();
        assert!(late.is_empty(), "seed {seed}: blocks {late:?} were written late");
    }
}

#[test]
fn a_stuck_volume_leaves_the_change_in_force_and_says_so() {
    let mut world = World::new(3);
    world.faults.set(FaultPlan::default());
    world.faults.hold();
    world.stir(4);
    let request =
        Request::NamespaceHosts { nqn: SUBNQN.into(), nsid: 1, hosts: Some(vec![nqn(2)]) };
    let change = world.begin(request);
    world.rig.run_for(Duration::from_secs(1));
    assert!(!change.is_done());
    let waited = Duration::from_millis(1);
    match change.wait(waited) {
        Err(ChangeError::StillDraining { waited: told }) => assert_eq!(told, waited),
        other => panic!("{other:?}"),
    }
    let sees = |world: &mut World, n: usize| {
        let queue = world.writers[n].host.io[0].clone();
        let sqe = rw(NvmOpcode::READ, 0, BLOCK);
        world.rig.command(&queue, sqe, Data::Reply(BLOCK)).cqe.status()
    };
    assert_eq!(sees(&mut world, 0), Status::INVALID_FIELD_IN_COMMAND.dnr(), "inactive");
    world.faults.release();
    world.rig.run_for(SETTLE);
    assert!(sees(&mut world, 1).is_success());
    // The number of a volume that comes and goes is used again, and never by two at a time.
    for round in 0..20 {
        let ram = RamVolume::new(Identity::from_uuid(uuid(20 + round)), 1 << 20, BLOCK as u32);
        let namespace = NamespaceConfig::new(3, Arc::new(ram.expect("memory")));
        let change = world.begin(Request::Attach { nqn: SUBNQN.into(), namespace });
        world.rig.until("attached", || change.is_done());
        let queue = world.writers[1].host.io[0].clone();
        let mut sqe = rw(NvmOpcode::WRITE, 0, BLOCK);
        sqe.nsid.set(3);
        let done = world.rig.command(&queue, sqe, Data::Fetched(vec![round; BLOCK]));
        assert_eq!(status(&done), Ok(()));
        let change = world.begin(Request::Detach { nqn: SUBNQN.into(), nsid: 3 });
        world.rig.until("detached", || change.is_done());
    }
}

#[test]
fn host_that_loses_its_rights_and_has_them_back_at_once_is_ended_all_the_same() {
    let mut world = World::new(6);
    let set = |hosts| Request::SubsystemHosts { nqn: SUBNQN.to_owned(), hosts };
    let first = world.begin(set(Some(vec![nqn(2)])));
    let second = world.begin(set(None));
    // Sooner than by its keep alive timeout.
    world.rig.run_for(Duration::from_secs(1));
    assert!(first.is_done() && second.is_done());
    let (one, two) = (&world.writers[0].host.admin, &world.writers[1].host.admin);
    let (one, two) = (one.clone(), two.clone());
    world.rig.until("the end of host 1", || one.is_over());
    assert!(!two.is_over());
    world.rig.port = 1;
    world.rig.host(1, 1);
}

/// Identify with this CNS.
fn identify(world: &mut World, n: usize, cns: u8, nsid: u32) -> Vec<u8> {
    let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
    sqe.nsid.set(nsid);
    sqe.dptr = SglDescriptor::transport(4096);
    sqe.cdw10.set(cns.into());
    let queue = world.writers[n].host.admin.clone();
    let done = world.rig.command(&queue, sqe, Data::Reply(4096));
    assert_eq!(status(&done), Ok(()));
    done.reply
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.chunks(4).map(|w| u32::from_le_bytes(w.try_into().expect("4 bytes")));
    words.take_while(|nsid| *nsid != 0).collect()
}

#[test]
fn hosts_are_told_of_what_comes_grows_and_goes() {
    let mut world = World::new(4);
    let event = |world: &World, n: usize| {
        let queue = world.writers[n].host.admin.clone();
        let id = queue.send(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0), Data::None);
        (queue, id)
    };
    for n in 0..2 {
        let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
        sqe.cdw10.set(0x0b);
        sqe.cdw11.set(1 << 8 | 1 << 11);
        let queue = world.writers[n].host.admin.clone();
        assert_eq!(status(&world.rig.command(&queue, sqe, Data::None)), Ok(()));
    }
    let (one, two) = (event(&world, 0), event(&world, 1));
    world.rig.run_for(Duration::from_millis(10));
    // Only host 2 sees namespace 7.
    let ram = RamVolume::new(Identity::from_uuid(uuid(30)), 1 << 20, BLOCK as u32);
    let namespace = NamespaceConfig {
        hosts: Some(vec![nqn(2)]),
        ..NamespaceConfig::new(7, Arc::new(ram.expect("memory")))
    };
    let change = world.begin(Request::Attach { nqn: SUBNQN.into(), namespace });
    world.finish(change);
    world.rig.run_for(Duration::from_millis(10));
    assert!(two.0.is_done(two.1), "the one that sees it is told");
    assert!(!one.0.is_done(one.1), "the other is not");
    assert_eq!(words(&identify(&mut world, 0, 2, 0)), [1, 2]);
    assert_eq!(words(&identify(&mut world, 1, 2, 0)), [1, 2, 7]);

    // A change of an ANA state is told on its port.
    let request = Request::Ana { nqn: None, port: 1, group: 1, state: AnaState::NonOptimized };
    let change = world.begin(request);
    world.finish(change);
    world.rig.run_for(Duration::from_millis(10));
    let done = one.0.take(one.1).expect("told");
    assert_eq!(done.cqe.dw0() >> 8 & 0xff, 3, "Asymmetric Namespace Access Change");

    // Refused, with nothing changed.
    let refused = |world: &mut World, request: Request| {
        world.rig.target.begin(request).map(drop).expect_err("a refusal")
    };
    let nqn = || SUBNQN.to_owned();
    let again = NamespaceConfig::new(9, Arc::clone(&world.volume));
    let request = Request::Attach { nqn: nqn(), namespace: again };
    assert!(matches!(refused(&mut world, request), ChangeError::InUse));
    let request = Request::Detach { nqn: nqn(), nsid: 99 };
    assert!(matches!(refused(&mut world, request), ChangeError::UnknownNamespace));
    let request = Request::RemoveSubsystem { nqn: "nqn.2026-11.io.penstock:none".into() };
    assert!(matches!(refused(&mut world, request), ChangeError::UnknownSubsystem));
    let request = Request::MoveNamespace { nqn: nqn(), nsid: 1, group: 129 };
    assert!(matches!(refused(&mut world, request), ChangeError::Invalid(_)));
    let request = Request::Ana { nqn: None, port: 9, group: 1, state: AnaState::Change };
    assert!(matches!(refused(&mut world, request), ChangeError::Invalid(_)));

    let status = world.rig.target.status();
    assert_eq!(status.subsystems.len(), 1);
    let nsids: Vec<_> = status.subsystems[0].namespaces.iter().map(|ns| ns.nsid).collect();
    assert_eq!(nsids, [1, 2, 7]);
    assert!(status.subsystems[0].ana.contains(&(1, 1, AnaState::NonOptimized)));
    let hosts: Vec<_> =
        status.controllers.iter().map(|c| (c.hostnqn.clone(), c.io_queues)).collect();
    assert_eq!(hosts, [(hostnqn(1), 2), (hostnqn(2), 2)]);
    let request = Request::DisconnectHost { nqn: None, hostnqn: self::nqn(1) };
    let change = world.begin(request);
    world.finish(change);
    assert_eq!(world.rig.target.status().controllers.len(), 1);
}
