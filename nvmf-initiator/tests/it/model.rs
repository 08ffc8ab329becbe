//! Random I/O over a network that splits, delays and cuts at any byte, against a model of the disk.
//!
//! With one path to a target that ends old controllers, and with three paths to one that does not:
//! what that has under way when a path is lost lands up to seconds later, whatever the host does on
//! another path meanwhile. There only what the initiator does itself keeps an old write from landing
//! behind a newer one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use block::Op;
use nvme::spec::Status;
use nvme::subsys::Limits;
use nvmf_initiator::{PathPolicy, RemoteConfig};
use reactor::sim::NetFaults;

use crate::fake::{Answer, Script};
use crate::rig::{Disk, Rig, Setup, TARGET, bytes_of, pattern};

/// The disk is used in units of so many bytes, each with one I/O at a time, so that its contents
/// are always known.
const UNIT: u64 = 24 << 10;
const UNITS: u64 = 40;
const STEPS: usize = 120;
const SEEDS: u64 = 150;
/// Paths to the target that ends nothing.
const PATHS: u8 = 3;
/// Longest that it takes for an I/O; the initiator waits 15 s for a controller to end.
const LATE_MAX: Duration = Duration::from_secs(8);
/// Units used with that target: few, so that what lands late often meets something newer.
const HOT_UNITS: u64 = 6;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % n
    }
}

enum Pending {
    Write(Vec<u8>),
    Read,
    Other,
}

struct Model {
    units: Vec<Vec<u8>>,
    /// By unit, which is also the tag. Flush has the tag behind the last one.
    pending: BTreeMap<u64, Pending>,
    seed: u64,
    done: usize,
    /// What was acknowledged is on the disk at that moment: not where it may be done twice.
    is_strict: bool,
}

impl Model {
    fn submit(&mut self, disk: &Disk, random: &mut Random, number: u64) {
        let unit = random.below(self.units.len() as u64 + 1);
        if self.pending.contains_key(&unit) {
            return;
        }
        let offset = unit * UNIT;
        let pending = if unit == self.units.len() as u64 {
            disk.op(unit, Op::Flush, 0, 0);
            Pending::Other
        } else {
            match random.below(8) {
                0..=3 => {
                    let bytes = pattern(self.seed << 32 | number, UNIT as usize);
                    disk.write(unit, offset, &bytes);
                    Pending::Write(bytes)
                }
                4 => {
                    disk.op(unit, Op::WriteZeroes, offset, UNIT);
                    Pending::Write(vec![0; UNIT as usize])
                }
                5 => {
                    disk.op(unit, Op::Deallocate, offset, UNIT);
                    Pending::Write(vec![0; UNIT as usize])
                }
                _ => {
                    disk.read(unit, offset, UNIT as usize);
                    Pending::Read
                }
            }
        };
        self.pending.insert(unit, pending);
    }

    fn take(&mut self, disk: &Disk, truth: &[u8]) {
        for io in disk.take_done() {
            let seed = self.seed;
            assert_eq!(io.result, Ok(()), "seed {seed}: {io:?}");
            let pending = self.pending.remove(&io.tag);
            let pending = pending.unwrap_or_else(|| panic!("seed {seed}: {io:?} came back twice"));
            self.done += 1;
            match pending {
                Pending::Write(bytes) => {
                    // Acknowledged means stored, at this moment and from now on.
                    let at = (io.tag * UNIT) as usize;
                    assert!(
                        !self.is_strict || truth[at..][..UNIT as usize] == bytes,
                        "seed {seed}: {io:?} not stored"
                    );
                    self.units[io.tag as usize] = bytes;
                }
                Pending::Read => {
                    let is_right = bytes_of(&io) == self.units[io.tag as usize];
                    assert!(is_right, "seed {seed}: {io:?} read something else");
                }
                Pending::Other => {}
            }
        }
    }
}

/// One history. Gives the number of associations it took.
fn run(seed: u64) -> u64 {
    let _seed = Announce(seed);
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut status_random = Random(random.below(u64::MAX) | 1);
    let status_chance = random.below(4) * 5;
    let on_io = move |_: &_| {
        if status_random.below(1000) < status_chance {
            Answer::Status(Status::COMMAND_INTERRUPTED)
        } else {
            Answer::Good
        }
    };
    let script = Script {
        on_io: Box::new(on_io),
        delay_max: Duration::from_micros(random.below(3) * 400),
        r2t_bytes: [4096, 12_288, 1 << 20][random.below(3) as usize],
        c2h_bytes: [2048, 10_000, 1 << 20][random.below(3) as usize],
        max_h2c_data: [4096, 131_072][random.below(2) as usize],
        uses_success: random.below(2) == 0,
        ..Script::default()
    };
    let limits = Limits {
        mdts_bytes: [8192, 1 << 20][random.below(2) as usize],
        in_capsule_bytes: [0, 4096, 16_384][random.below(3) as usize],
        ..Limits::default()
    };
    let digests = random.below(3);
    let queue_depth = [3, 128][random.below(2) as usize];
    let config = move |config| RemoteConfig {
        queues: 2,
        queue_depth,
        header_digest: digests == 1,
        data_digest: digests >= 1,
        retries_max: 200,
        ..config
    };
    let blocks = UNITS * UNIT / 512;
    let mut rig =
        Setup { seed, blocks, limits, script, hosts: 2, tls: None, config: Box::new(config) }
            .start();
    let disks = [rig.disk(1, 24), rig.disk(2, 24)];
    let mut model = Model {
        units: vec![vec![0; UNIT as usize]; UNITS as usize],
        pending: BTreeMap::new(),
        seed,
        done: 0,
        is_strict: true,
    };
    let cut_per_million = [0, 300, 1500, 6000][random.below(4) as usize];
    rig.world.set_faults(NetFaults {
        split: random.below(2) == 0,
        delay_max: Duration::from_micros(random.below(300)),
        cut_per_million,
        refuse_per_million: cut_per_million,
        ..NetFaults::default()
    });
    for step in 0..STEPS {
        for part in 0..random.below(6) {
            let disk = &disks[random.below(2) as usize];
            model.submit(disk, &mut random, step as u64 * 8 + part);
        }
        match random.below(60) {
            0 => rig.world.cut_all(),
            1 => {
                rig.fake.stop(&rig.cores[TARGET]);
                rig.run_for(Duration::from_millis(random.below(2000)));
                rig.fake.restart(&rig.cores[TARGET]);
            }
            _ => {}
        }
        rig.run_for(Duration::from_micros(random.below(2000)));
        for disk in &disks {
            model.take(disk, &rig.fake.disk.borrow());
        }
    }
    rig.world.set_faults(NetFaults::default());
    let expected = model.pending.len();
    let before = model.done;
    rig.until("the end of the I/O", |_| disks[0].done() + disks[1].done() >= expected);
    for disk in &disks {
        model.take(disk, &rig.fake.disk.borrow());
    }
    assert_eq!(model.done - before, expected, "seed {seed}");
    assert!(model.pending.is_empty(), "seed {seed}");
    let truth = rig.fake.disk.borrow();
    assert!(
        truth[..] == model.units.concat(),
        "seed {seed}: the disk is not what was acknowledged"
    );
    drop(truth);
    assert_eq!(rig.volume.counters().in_flight, 0, "seed {seed}");
    let generation = rig.state().generation;
    rig.finish();
    generation
}

/// One history with several paths. Gives the associations it took, and the changes that landed late.
fn run_on_paths(seed: u64) -> (u64, u64) {
    let _seed = Announce(seed);
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let script = Script {
        delay_max: LATE_MAX,
        delay_percent: 25,
        fences: false,
        lands_late: true,
        r2t_bytes: [4096, 1 << 20][random.below(2) as usize],
        ..Script::default()
    };
    let policy = [PathPolicy::Numa, PathPolicy::RoundRobin, PathPolicy::QueueDepth];
    let policy = policy[random.below(3) as usize];
    let addr = |path: u8| SocketAddr::from(([10, 0, 0, path], 4420));
    let config = move |config| RemoteConfig {
        queues: 2,
        policy,
        paths: (1..=PATHS).map(|path| addr(path).into()).collect(),
        ..config
    };
    let setup =
        Setup { seed, blocks: HOT_UNITS * UNIT / 512, script, hosts: 2, ..Setup::default() };
    let mut rig = Setup { config: Box::new(config), ..setup }.start();
    let listen = |rig: &Rig, path: u8| rig.fake.listen_at(addr(path), &rig.cores[TARGET]);
    (2..=PATHS).for_each(|path| listen(&rig, path));
    let disks = [rig.disk(1, 24), rig.disk(2, 24)];
    let mut model = Model {
        units: vec![vec![0; UNIT as usize]; HOT_UNITS as usize],
        pending: BTreeMap::new(),
        seed,
        done: 0,
        is_strict: false,
    };
    // Single connections are cut, so that others go on.
    rig.world.set_faults(NetFaults { cut_per_million: 3000, ..NetFaults::default() });
    let mut is_down = [false; PATHS as usize];
    for step in 0..STEPS {
        for part in 0..random.below(6) {
            let disk = &disks[random.below(2) as usize];
            model.submit(disk, &mut random, step as u64 * 8 + part);
        }
        let path = random.below(PATHS.into()) as u8 + 1;
        let is_down = &mut is_down[usize::from(path) - 1];
        match random.below(24) {
            0..=3 if *is_down => {
                listen(&rig, path);
                *is_down = false;
            }
            0 => {
                rig.world.unlisten(addr(path));
                *is_down = true;
            }
            2 => rig.world.cut_all(),
            _ => {}
        }
        rig.run_for(Duration::from_millis(random.below(1000)));
        for disk in &disks {
            model.take(disk, &rig.fake.disk.borrow());
        }
    }
    rig.world.set_faults(NetFaults::default());
    for path in (1..=PATHS).filter(|path| is_down[usize::from(*path) - 1]) {
        listen(&rig, path);
    }
    let expected = model.pending.len();
    rig.until("the end of the I/O", |_| disks[0].done() + disks[1].done() >= expected);
    // Whatever may still land does.
    rig.run_for(2 * LATE_MAX);
    for disk in &disks {
        model.take(disk, &rig.fake.disk.borrow());
    }
    assert!(model.pending.is_empty(), "seed {seed}");
    assert!(
        rig.fake.disk.borrow()[..] == model.units.concat(),
        "seed {seed}: the disk is not what was acknowledged"
    );
    let seen = rig.fake.seen.get();
    let generation = rig.state().generation;
    rig.finish_all();
    (generation, seen.late)
}

/// Says on a failure which history it was.
struct Announce(u64);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to run this history alone: PENSTOCK_SIM_SEED={}", self.0);
        }
    }
}

#[test]
fn random_histories() {
    if let Some(seed) = std::env::var("PENSTOCK_SIM_SEED").ok().and_then(|s| s.parse().ok()) {
        run(seed);
        return;
    }
    let associations: u64 = (1..=SEEDS).map(run).sum();
    assert!(associations > 2 * SEEDS, "hardly a path was lost: {associations}");
}

#[test]
fn random_histories_on_paths_to_a_target_that_ends_nothing() {
    if let Some(seed) = std::env::var("PENSTOCK_SIM_SEED").ok().and_then(|s| s.parse().ok()) {
        run_on_paths(seed);
        return;
    }
    let runs = (1..=SEEDS / 3).map(run_on_paths);
    let (associations, late) = runs.fold((0, 0), |sum, run| (sum.0 + run.0, sum.1 + run.1));
    assert!(associations > 2 * SEEDS, "hardly a path was lost: {associations}");
    assert!(late > SEEDS / 2, "hardly anything landed late: {late}");
}

#[test]
fn a_history_replays_from_its_seed() {
    assert_eq!(run(17), run(17));
}
