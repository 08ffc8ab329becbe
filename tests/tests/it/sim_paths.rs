//! The simulation of [`crate::sim`] with several paths to one target: ports that go away and come
//! back, connections cut at any byte, ANA states that change under load, paths that are given up and taken
//! up again.
//!
//! The target's volume takes up to two seconds for an I/O, so that what was sent on a lost path is
//! often still on its way when the same blocks are written again on another. Two things stand
//! against that, either of which is enough here: the initiator keeps such writes until the lost
//! controller has ended, and the target lets what a lost path has at a volume go first. That the
//! initiator does its part also where the target does not is shown by its own tests (`paths.rs`,
//! and random ones in `model.rs`).

use std::time::Duration;

use nvme::subsys::ana::AnaState;
use nvmf_initiator::{PathConfig, PathPolicy, Phase, RemoteConfig};
use nvmf_target::Request;

use crate::sim::{Random, SUBNQN, Sim, addr, build_with, listen};

/// Each takes a quarter of a second; `PENSTOCK_SIM_SEEDS` asks for more.
const SEEDS: u64 = 200;
const REQUESTS: u64 = 150;
/// Ports of the target.
const PATHS: u16 = 3;

fn policy(seed: u64) -> PathPolicy {
    [PathPolicy::Numa, PathPolicy::RoundRobin, PathPolicy::QueueDepth][(seed % 3) as usize]
}

/// What is done to the paths meanwhile.
struct Trouble {
    random: Random,
    is_down: [bool; PATHS as usize],
    paths_change: bool,
    left: u32,
}

impl Trouble {
    fn step(&mut self, sim: &Sim) {
        let port = 1 + self.random.below(PATHS.into()) as u16;
        let is_down = &mut self.is_down[usize::from(port) - 1];
        if self.left == 0 {
            // The end of it: everything is well again, so that the load can end.
            for port in (1..=PATHS).filter(|port| self.is_down[usize::from(*port) - 1]) {
                listen(&sim.world, &sim.target, port);
            }
            self.is_down = [false; PATHS as usize];
            Self::set_ana(sim, port, AnaState::Optimized);
            self.set_paths(sim, 0b111);
            return;
        }
        self.left -= 1;
        match self.random.below(8) {
            0 => sim.world.cut_all(),
            1 | 2 if *is_down => {
                listen(&sim.world, &sim.target, port);
                *is_down = false;
            }
            1 | 2 => {
                sim.world.unlisten(addr(port));
                *is_down = true;
                if self.random.below(2) == 0 {
                    sim.world.cut_all();
                }
            }
            3..=5 => {
                use AnaState::{Change, Inaccessible, NonOptimized, Optimized};
                let states = [Optimized, Optimized, NonOptimized, Inaccessible, Change];
                let state = states[self.random.below(5) as usize];
                Self::set_ana(sim, port, state);
            }
            6 => {
                let set = 1 + self.random.below(7) as u8;
                self.set_paths(sim, set);
            }
            _ => {}
        }
    }

    /// Where paths change, these are the ones from now on, one bit each.
    fn set_paths(&self, sim: &Sim, set: u8) {
        if self.paths_change {
            let ports = (1..=PATHS).filter(|port| set >> (port - 1) & 1 != 0);
            let paths: Vec<PathConfig> = ports.map(|port| addr(port).into()).collect();
            sim.remote.set_paths(&paths).expect("paths that change");
        }
    }

    fn set_ana(sim: &Sim, port: u16, state: AnaState) {
        let nqn = Some(SUBNQN.to_owned());
        let request = Request::Ana { nqn, port, group: 1, state };
        // Hosts find out by themselves when it is in force.
        drop(sim.target.begin(request).expect("a port of the target"));
    }
}

/// How many paths were used, and how many pairs were lost with one.
fn run(seed: u64) -> Result<(u64, u64), String> {
    let paths_change = seed % 2 == 1;
    let change = |config| RemoteConfig { policy: policy(seed), paths_change, ..config };
    let mut sim = build_with(seed, REQUESTS, PATHS, change);
    let mut trouble = Trouble {
        random: Random::new(seed ^ 0x70a7_4540),
        is_down: [false; PATHS as usize],
        paths_change,
        left: 60,
    };
    let report = std::rc::Rc::clone(&sim.report);
    for _ in 0..2000 {
        let pause = Duration::from_millis(1 + trouble.random.below(300));
        let end = sim.world.now() + pause;
        let world = sim.world.clone();
        let mut is_over = || report.borrow().done || world.now() >= end;
        sim.world.run_until(&mut sim.cores, pause, &mut is_over);
        if report.borrow().done {
            break;
        }
        trouble.step(&sim);
    }
    let switched = sim.remote.path_counters().iter().filter(|path| path.commands > 0).count();
    sim.finish()?;
    Ok((switched as u64, report.borrow().unknown))
}

#[test]
fn seeds_of_failing_paths_lose_and_double_nothing() {
    let only = std::env::var("PENSTOCK_SIM_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let count = std::env::var("PENSTOCK_SIM_SEEDS").ok().and_then(|s| s.parse::<u64>().ok());
    let count = count.unwrap_or(SEEDS);
    let seeds = only.map_or(0..count, |seed| seed..seed + 1);
    let (mut on_several, mut unknown) = (0, 0);
    for seed in seeds {
        match run(seed) {
            Ok((paths, lost)) => {
                on_several += u64::from(paths > 1);
                unknown += lost;
            }
            Err(failure) => panic!(
                "seed {seed}: {failure}\nreplay: PENSTOCK_SIM_SEED={seed} cargo nextest run -p it sim_paths"
            ),
        }
    }
    if only.is_none() {
        assert!(on_several > count / 2, "only {on_several} runs used more than one path");
        assert!(unknown > 0, "no pair was lost with its path");
    }
}

/// Without any trouble, each policy does what it says.
#[test]
fn policies_choose_their_paths() {
    for seed in 0..3 {
        let change = |config| RemoteConfig { policy: policy(seed), ..config };
        let mut sim = build_with(seed, 300, PATHS, change);
        sim.world.set_faults(reactor::sim::NetFaults::default());
        let remote = std::sync::Arc::clone(&sim.remote);
        let is_up = |path: &nvmf_initiator::PathState| path.is_live;
        let met = sim.world.run_until(&mut sim.cores, Duration::from_secs(60), &mut || {
            remote.state().phase == Phase::Live && remote.state().paths.iter().all(is_up)
        });
        assert!(met);
        let report = std::rc::Rc::clone(&sim.report);
        let limit = Duration::from_secs(3600);
        assert!(sim.world.run_until(&mut sim.cores, limit, &mut || report.borrow().done));
        let counts: Vec<u64> = remote.path_counters().iter().map(|path| path.commands).collect();
        let total: u64 = counts.iter().sum();
        match policy(seed) {
            // Which one it was before all were up is a matter of chance.
            PathPolicy::Numa => assert!(counts[0] > total * 9 / 10, "{counts:?}"),
            _ => assert!(counts.iter().all(|count| *count > total / 5), "{counts:?}"),
        }
        assert_eq!(sim.finish(), Ok(300));
    }
}
