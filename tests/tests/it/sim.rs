//! Both ends in one thread, virtual time, a network that splits, delays and cuts at any byte.
//!
//! Invariants checked, for every seed:
//! - every read returns what the last completed write put there, never older, never newer;
//! - no I/O fails, is lost or completes twice, however often the path is cut;
//! - in the end the volume behind the target holds exactly what was acknowledged.
//!
//! I/Os that are outstanding together never overlap, so that one order alone is right: a write that
//! lands late, behind a newer one of the same block, is seen as a mismatch.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::fault::{FaultPlan, FaultVolume};
use block::ram::RamVolume;
use block::{Busy, Channel, Extent, Identity, Io, IoError, Op, Volume};
use nvme::spec::Nqn;
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use nvmf_target::{
    KeyStore, Limits, ListenerKind, NamespaceConfig, Port, SubsystemConfig, Target, TargetConfig,
    Tls,
};
use reactor::sim::{NetFaults, World};
use reactor::{Core, Local, Progress, Task};

pub(crate) const SUBNQN: &str = "nqn.2026-11.io.penstock:sim";
pub(crate) const HOSTNQN: &str =
    "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000005";
const BLOCK: usize = 512;
const BLOCKS: usize = 1024;
/// Longest request: more than fits a capsule, and more than one R2T may ask for.
const REQUEST_BLOCKS_MAX: u64 = 160;
const DEPTH: usize = 8;
const SEEDS: u64 = 1000;

/// xorshift64*: small, and the same everywhere for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// What the load found, shared with the test.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) completed: u64,
    pub(crate) done: bool,
    /// Pairs of which nobody could say whether they were done.
    pub(crate) unknown: u64,
    failure: Option<String>,
    /// Stamp of each block; 0 where it is zero.
    disk: Vec<u64>,
}

struct Outstanding {
    op: Op,
    start: usize,
    count: usize,
    stamp: u64,
    /// Where a copy reads.
    source: usize,
    /// What the block of a compare and write may hold after it: as it was, or as it was to be.
    either: Option<[u64; 2]>,
}

struct Load {
    local: Local,
    channel: Box<dyn Channel>,
    random: Random,
    left: u64,
    stamp: u64,
    busy: Vec<bool>,
    outstanding: BTreeMap<u64, Outstanding>,
    /// Blocks of pairs of which nobody knows whether they were done: they are read next.
    unknown: Vec<(usize, [u64; 2])>,
    next_tag: u64,
    report: Rc<RefCell<Report>>,
}

impl Load {
    /// Looks what a block holds, which may be one of two stamps.
    fn look(&mut self) -> bool {
        let Some((start, either)) = self.unknown.pop() else { return false };
        let mut io = Box::new(Io::new(Op::Read, (start * BLOCK) as u64, BLOCK as u64));
        io.tag = self.next_tag;
        self.local.pool().alloc(BLOCK, &mut io.data).expect("pool for eight requests");
        if self.channel.submit(io).is_err() {
            self.unknown.push((start, either));
            return false;
        }
        let (op, either) = (Op::Read, Some(either));
        let out = Outstanding { op, start, count: 1, stamp: 0, source: 0, either };
        self.outstanding.insert(self.next_tag, out);
        self.next_tag += 1;
        true
    }

    fn issue(&mut self) -> bool {
        let (start, count) = (
            self.random.below(BLOCKS as u64) as usize,
            1 + self.random.below(REQUEST_BLOCKS_MAX) as usize,
        );
        let count = count.min(BLOCKS - start);
        if self.busy[start..start + count].iter().any(|b| *b) {
            return false;
        }
        let op = match self.random.below(20) {
            0 => Op::Flush,
            1 => Op::WriteZeroes,
            2 => Op::Deallocate,
            3 => Op::Compare,
            4 => Op::Verify,
            5 => Op::Copy,
            6 => Op::CompareAndWrite,
            7..=11 => Op::Write,
            _ => Op::Read,
        };
        // Far enough from the destination, and not in use either.
        let source = (start + BLOCKS / 2) % BLOCKS;
        let reach = start.abs_diff(source).min(BLOCKS - source);
        let count = if op == Op::Copy { count.min(reach) } else { count };
        if op == Op::Copy && self.busy[source..source + count].iter().any(|b| *b) {
            return false;
        }
        let count = if op == Op::CompareAndWrite { 1 } else { count };
        let mut io = Box::new(Io::with_capacity(16));
        io.op = op;
        io.tag = self.next_tag;
        let count = if op == Op::Flush { 0 } else { count };
        io.offset = if op == Op::Flush { 0 } else { (start * BLOCK) as u64 };
        io.len = (count * BLOCK) as u64;
        io.fua = op == Op::Write && self.random.below(4) == 0;
        if op.has_data() {
            self.local.pool().alloc(count * BLOCK, &mut io.data).expect("pool for eight requests");
        }
        if op == Op::Write {
            self.stamp += 1;
            for block in 0..count {
                let bytes = self.stamp.to_le_bytes().repeat(BLOCK / 8);
                io.data.copy_from_slice(block * BLOCK, &bytes).expect("a request's length");
            }
        }
        if op == Op::Compare {
            let report = self.report.borrow();
            for block in 0..count {
                let bytes = report.disk[start + block].to_le_bytes().repeat(BLOCK / 8);
                io.data.copy_from_slice(block * BLOCK, &bytes).expect("a request's length");
            }
        }
        let mut either = None;
        if op == Op::CompareAndWrite {
            self.stamp += 1;
            let old = self.report.borrow().disk[start];
            // One in four is compared with what is not there.
            let differs = self.random.below(4) == 0;
            either = Some([old, if differs { old } else { self.stamp }]);
            self.local.pool().alloc(2 * BLOCK, &mut io.data).expect("pool for eight requests");
            let compared = if differs { old ^ 1 << 63 } else { old };
            for (half, stamp) in [compared, self.stamp].into_iter().enumerate() {
                let bytes = stamp.to_le_bytes().repeat(BLOCK / 8);
                io.data.copy_from_slice(half * BLOCK, &bytes).expect("a request's length");
            }
        }
        if op == Op::Copy {
            io.sources.push(Extent { offset: (source * BLOCK) as u64, len: io.len });
        }
        match self.channel.submit(io) {
            Ok(()) => {}
            Err(Busy(_)) => return false,
        }
        self.busy[start..start + count].fill(true);
        if op == Op::Copy {
            self.busy[source..source + count].fill(true);
        }
        let stamp = self.stamp;
        self.outstanding
            .insert(self.next_tag, Outstanding { op, start, count, stamp, source, either });
        self.next_tag += 1;
        self.left -= 1;
        true
    }

    fn finish(&mut self, io: &Io) -> Result<(), String> {
        let out = self.outstanding.remove(&io.tag);
        let Some(Outstanding { op, start, count, stamp, source, either }) = out else {
            return Err(format!("I/O {} completed twice", io.tag));
        };
        let is_pair = op == Op::CompareAndWrite;
        if let (true, Err(IoError::Aborted), Some(either)) = (is_pair, io.result, either) {
            // Lost with its path. Nobody else touches the block until it is known what it holds.
            self.unknown.push((start, either));
            let mut report = self.report.borrow_mut();
            (report.completed, report.unknown) = (report.completed + 1, report.unknown + 1);
            return Ok(());
        }
        let differs = either.is_some_and(|[old, new]| old == new);
        if is_pair && differs != (io.result == Err(IoError::CompareFailed)) {
            return Err(format!("pair at {start} said {:?}, differs: {differs}", io.result));
        }
        if let Err(error) = io.result
            && !differs
        {
            return Err(format!("{op:?} of {count} blocks at {start} failed: {error:?}"));
        }
        self.busy[start..start + count].fill(false);
        let mut report = self.report.borrow_mut();
        if op == Op::Copy {
            self.busy[source..source + count].fill(false);
            report.disk.copy_within(source..source + count, start);
        }
        match op {
            Op::Write => report.disk[start..start + count].fill(stamp),
            Op::CompareAndWrite if differs => {}
            Op::CompareAndWrite => report.disk[start] = stamp,
            Op::Read if either.is_some() => {
                let found = block_stamp(io, 0)?;
                if either.is_some_and(|either| !either.contains(&found)) {
                    return Err(format!("block {start} of a pair: {found}, not {either:?}"));
                }
                report.disk[start] = found;
                return Ok(());
            }
            Op::WriteZeroes | Op::Deallocate => report.disk[start..start + count].fill(0),
            Op::Read => {
                for block in 0..count {
                    let want = report.disk[start + block];
                    let found = block_stamp(io, block)?;
                    if found != want {
                        return Err(format!("block {}: {found}, not {want}", start + block));
                    }
                }
            }
            _ => {}
        }
        report.completed += 1;
        Ok(())
    }
}

/// The stamp of a block in a buffer; an error if the block is torn.
fn block_stamp(io: &Io, block: usize) -> Result<u64, String> {
    let mut bytes = [0; BLOCK];
    io.data.copy_to_slice(block * BLOCK, &mut bytes).map_err(|_| "a short buffer".to_owned())?;
    let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    if bytes != *stamp.to_le_bytes().repeat(BLOCK / 8) {
        return Err(format!("block {block} of a read is torn"));
    }
    Ok(stamp)
}

impl Task for Load {
    fn poll(&mut self, _now: Duration) -> Progress {
        if self.report.borrow().done {
            return Progress::Idle;
        }
        let mut finished = Vec::new();
        self.channel.poll(&mut |io| finished.push(io));
        let mut worked = !finished.is_empty();
        for io in finished {
            if let Err(failure) = self.finish(&io) {
                let mut report = self.report.borrow_mut();
                report.failure = Some(failure);
                report.done = true;
                return Progress::Worked;
            }
        }
        while self.look() {
            worked = true;
        }
        while self.left > 0 && self.outstanding.len() < DEPTH && self.issue() {
            worked = true;
        }
        if self.left == 0 && self.outstanding.is_empty() && self.unknown.is_empty() {
            self.report.borrow_mut().done = true;
        }
        if worked { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        self.channel.deadline()
    }
}

pub(crate) struct Sim {
    pub(crate) world: World,
    pub(crate) cores: Vec<Core>,
    pub(crate) report: Rc<RefCell<Report>>,
    volume: Arc<dyn Volume>,
    /// Held: dropping it ends the association.
    pub(crate) remote: Arc<RemoteVolume>,
    pub(crate) target: Arc<Target>,
}

fn nqn(text: &str) -> Nqn {
    Nqn::new(text).expect("well formed")
}

/// Address of port 1, 2, ..
pub(crate) fn addr(port: u16) -> SocketAddr {
    ([10, 0, 0, port as u8], 4420).into()
}

pub(crate) fn start_target(
    world: &World,
    core: &mut Core,
    volume: &Arc<dyn Volume>,
    ports: u16,
) -> Arc<Target> {
    start_secure_target(world, core, volume, ports, (Tls::Off, Arc::default()))
}

pub(crate) fn start_secure_target(
    world: &World,
    core: &mut Core,
    volume: &Arc<dyn Volume>,
    ports: u16,
    (tls, keys): (Tls, Arc<KeyStore>),
) -> Arc<Target> {
    let config = TargetConfig {
        subsystems: vec![SubsystemConfig {
            namespaces: vec![NamespaceConfig::new(1, Arc::clone(volume))],
            ..SubsystemConfig::new(SUBNQN, "SIM")
        }],
        ports: (1..=ports)
            .map(|id| {
                let auth = nvmf_target::AuthDemand::default();
                Port { id, kind: ListenerKind::Io, addr: addr(id), tls, auth, hidden: false }
            })
            .collect(),
        limits: Limits {
            h2c_data_bytes: 16 << 10,
            in_capsule_bytes: 16 << 10,
            ..Limits::default()
        },
        keys,
        ..TargetConfig::default()
    };
    let target = Target::new(config, vec![core.handle()]).expect("a sound configuration");
    core.spawn(target.core_task(0, &core.local()).expect("the core's first task"));
    for port in 1..=ports {
        listen(world, &target, port);
    }
    target
}

pub(crate) fn listen(world: &World, target: &Arc<Target>, port: u16) {
    let accept = Arc::clone(target);
    world.listen(addr(port), Box::new(move |socket| accept.add_connection(socket, port)));
}

fn build(seed: u64, requests: u64) -> Sim {
    build_with(seed, requests, 1, |config| config)
}

/// The same with several ports, each of them a path, and a configuration to be changed.
pub(crate) fn build_with(
    seed: u64,
    requests: u64,
    ports: u16,
    change: impl FnOnce(RemoteConfig) -> RemoteConfig,
) -> Sim {
    build_secure(seed, requests, ports, change, (Tls::Off, Arc::default()))
}

/// The same with what the target asks of hosts.
pub(crate) fn build_secure(
    seed: u64,
    requests: u64,
    ports: u16,
    change: impl FnOnce(RemoteConfig) -> RemoteConfig,
    secure: (Tls, Arc<KeyStore>),
) -> Sim {
    let world = World::new(seed);
    let mut random = Random::new(seed);
    let mut cores = vec![world.core(), world.core()];
    let ram: Arc<dyn Volume> = Arc::new(
        RamVolume::new(Identity::from_uuid([1; 16]), (BLOCKS * BLOCK) as u64, BLOCK as u32)
            .expect("memory"),
    );
    // Some I/O takes much longer than a reconnect, so that writes of a lost association are still on
    // their way when the next one is used.
    let (slow, faults) = FaultVolume::new(Arc::clone(&ram), seed);
    faults.set(FaultPlan {
        delays_per_million: 300_000,
        delay_max: Duration::from_millis(random.below(2_000)),
        busy_per_million: 10_000,
        ..FaultPlan::default()
    });
    let volume: Arc<dyn Volume> = Arc::new(slow);
    let target = start_secure_target(&world, &mut cores[0], &volume, ports, secure);
    let digests = random.below(4);
    let config = RemoteConfig {
        header_digest: digests & 1 != 0,
        data_digest: digests & 2 != 0,
        reconnect_delay: Duration::from_millis(1),
        reconnect_delay_max: Duration::from_millis(20),
        paths: (1..=ports).map(|port| addr(port).into()).collect(),
        ..RemoteConfig::new(addr(1), nqn(SUBNQN), 1, (nqn(HOSTNQN), [5; 16]))
    };
    let local = cores[1].local();
    let (remote, session) =
        RemoteVolume::start(change(config), &local).expect("a sound configuration");
    cores[1].spawn(session);
    let report = Rc::new(RefCell::new(Report { disk: vec![0; BLOCKS], ..Report::default() }));
    let channel = remote.open(&local, DEPTH as u32).expect("a channel");
    cores[1].spawn(Box::new(Load {
        local,
        channel,
        random: Random::new(seed ^ 0xdead_beef),
        left: requests,
        stamp: 0,
        busy: vec![false; BLOCKS],
        outstanding: BTreeMap::new(),
        unknown: Vec::new(),
        next_tag: 0,
        report: Rc::clone(&report),
    }));
    let faults = NetFaults {
        split: random.below(2) == 0,
        delay_max: Duration::from_micros(random.below(2_000)),
        cut_per_million: if random.below(4) == 0 { 0 } else { random.below(3_000) as u32 },
        refuse_per_million: random.below(300_000) as u32,
        ..NetFaults::default()
    };
    world.set_faults(faults);
    Sim { world, cores, report, volume: ram, remote, target }
}

impl Sim {
    /// Runs the load to its end, mends the network and compares the volume with the model.
    pub(crate) fn finish(mut self) -> Result<u64, String> {
        let report = Rc::clone(&self.report);
        let limit = Duration::from_secs(3600);
        let ended = self.world.run_until(&mut self.cores, limit, &mut || report.borrow().done);
        if let Some(failure) = &self.report.borrow().failure {
            return Err(failure.clone());
        }
        if !ended {
            let completed = self.report.borrow().completed;
            return Err(format!(
                "stuck after {completed} completions at {:?}: {:?} {:?}, target has {:?}",
                self.world.now(),
                self.remote.state(),
                self.remote.counters(),
                self.target.connected(),
            ));
        }
        self.compare()?;
        Ok(self.report.borrow().completed)
    }

    /// The volume itself, below the target, against the model.
    fn compare(&mut self) -> Result<(), String> {
        let local = self.cores[0].local();
        let mut channel = self.volume.open(&local, 1).map_err(|e| e.to_string())?;
        for block in 0..BLOCKS {
            let mut io = Box::new(Io::with_capacity(16));
            (io.op, io.offset, io.len) = (Op::Read, (block * BLOCK) as u64, BLOCK as u64);
            local.pool().alloc(BLOCK, &mut io.data).map_err(|e| format!("{e:?}"))?;
            channel.submit(io).map_err(|_| "the volume is busy".to_owned())?;
            let mut found = None;
            channel.poll(&mut |io| found = Some(io));
            let io = found.ok_or("memory completes at once")?;
            let (found, want) = (block_stamp(&io, 0)?, self.report.borrow().disk[block]);
            if found != want {
                return Err(format!("in the end block {block} is {found}, not {want}"));
            }
        }
        Ok(())
    }
}

#[test]
fn thousand_seeds_of_a_faulty_network_lose_and_double_nothing() {
    let only = std::env::var("PENSTOCK_SIM_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let seeds = only.map_or(0..SEEDS, |seed| seed..seed + 1);
    let (mut completed, mut unknown) = (0, 0);
    for seed in seeds {
        let sim = build(seed, 120);
        let report = Rc::clone(&sim.report);
        match sim.finish() {
            Ok(count) => {
                assert_eq!(count, 120, "seed {seed}");
                completed += count;
                unknown += report.borrow().unknown;
            }
            Err(failure) => panic!(
                "seed {seed}: {failure}\nreplay: PENSTOCK_SIM_SEED={seed} cargo nextest run -p it sim"
            ),
        }
    }
    println!("{completed} I/Os verified, of which {unknown} pairs were lost with their path");
    assert!(unknown > 0 || only.is_some(), "no pair was lost with its path");
}

#[test]
fn same_seed_replays_the_same_world() {
    let fingerprint = |seed| {
        let mut sim = build(seed, 60);
        let report = Rc::clone(&sim.report);
        let limit = Duration::from_secs(3600);
        assert!(sim.world.run_until(&mut sim.cores, limit, &mut || report.borrow().done));
        sim.world.fingerprint()
    };
    assert_eq!(fingerprint(7), fingerprint(7));
    assert_ne!(fingerprint(7), fingerprint(8));
}
