//! The fault layer does what its plan says, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use block::fault::{FaultHandle, FaultPlan, FaultVolume};
use block::ram::RamVolume;
use block::{Io, IoError, Op, Volume};
use reactor::sim::World;

use crate::harness::{Bench, identity};
use crate::model::{self, Options};

const BYTES: usize = 1 << 20;

fn volume(seed: u64) -> (FaultVolume, FaultHandle) {
    let ram = RamVolume::new(identity(), BYTES as u64, 512).unwrap().with_compare_and_write();
    FaultVolume::new(Arc::new(ram), seed)
}

fn plan() -> FaultPlan {
    FaultPlan {
        errors_per_million: 50_000,
        error: Some(IoError::Gone),
        busy_per_million: 50_000,
        delays_per_million: 300_000,
        delay_min: Duration::from_micros(10),
        delay_max: Duration::from_millis(2),
        ..FaultPlan::default()
    }
}

#[test]
fn without_a_plan_it_only_counts() {
    let world = World::new(1);
    let (volume, handle) = volume(1);
    let mut bench = Bench::simulated(&world, &volume, 16);
    model::run(&mut bench, &volume, vec![0; BYTES], &Options::new(1, 500));
    let counters = handle.counters();
    assert_eq!((counters.errors, counters.delays, counters.refusals), (0, 0, 0));
    assert_eq!(counters.submitted, counters.completed);
    let all = Op::ALL.into_iter().zip(counters.submitted);
    assert!(all.clone().all(|(op, n)| (n > 0) == (op.has_range() || op == Op::Flush)), "{all:?}");
    assert!(volume.notices().iter().any(|n| n.contains("fault layer")));
}

#[test]
fn trouble_is_reported_counted_and_repeatable() {
    let run = |seed| {
        let world = World::new(seed);
        let (volume, handle) = volume(seed);
        handle.set(plan());
        let mut bench = Bench::simulated(&world, &volume, 16);
        let options = Options { may_fail: Some(IoError::Gone), ..Options::new(seed, 1000) };
        let contents = model::run(&mut bench, &volume, vec![0; BYTES], &options);
        (handle.counters(), contents, world.now())
    };
    let (counters, contents, took) = run(5);
    assert!(counters.errors > 10 && counters.delays > 100 && counters.refusals > 10);
    assert_eq!(counters.submitted, counters.completed);
    assert!(took > Duration::from_millis(2));
    assert!(run(5) == (counters, contents, took), "the same seed gives the same trouble");
    assert!(run(6).0 != counters);
}

#[test]
fn only_the_chosen_operation_fails() {
    let world = World::new(1);
    let (volume, handle) = volume(1);
    handle.set(FaultPlan {
        errors_per_million: 1_000_000,
        only: Some(Op::Flush),
        ..FaultPlan::default()
    });
    let mut bench = Bench::simulated(&world, &volume, 4);
    assert_eq!(bench.write(0, &[1; 512], false), Ok(()));
    assert_eq!(bench.range(Op::Flush, 0, 0, false), Err(IoError::Medium));
    handle.set(FaultPlan { errors_per_million: 1_000_000, ..FaultPlan::default() });
    // Fails without having been done.
    assert_eq!(bench.write(0, &[2; 512], false), Err(IoError::Medium));
    handle.set(FaultPlan::default());
    assert_eq!(bench.read(0, 512), Ok(vec![1; 512]));
    // A refusal stays the refusal it is.
    handle.set(FaultPlan { errors_per_million: 1_000_000, ..FaultPlan::default() });
    assert_eq!(bench.range(Op::Deallocate, 1, 1, false), Err(IoError::Misaligned));
}

#[test]
fn held_io_waits_for_the_release_or_the_abort() {
    let world = World::new(1);
    let (volume, handle) = volume(1);
    let mut bench = Bench::simulated(&world, &volume, 4);
    bench.write(0, &[1; 512], false).unwrap();
    handle.hold();
    for tag in 0..3 {
        bench.submit(Box::new(Io { tag, ..Io::new(Op::WriteZeroes, 0, 512) })).unwrap();
    }
    while bench.turn() {}
    assert!(bench.take().is_none(), "held");
    assert_eq!(bench.in_flight(), 3);
    handle.release();
    for _ in 0..3 {
        assert_eq!(bench.wait().result, Ok(()));
    }
    assert_eq!(bench.read(0, 512), Ok(vec![0; 512]));

    bench.write(0, &[2; 512], false).unwrap();
    handle.hold();
    bench.submit(Box::new(Io::new(Op::WriteZeroes, 0, 512))).unwrap();
    bench.abort();
    assert_eq!(bench.wait().result, Err(IoError::Aborted));
    handle.release();
    assert_eq!(bench.read(0, 512), Ok(vec![2; 512]), "what was aborted was not done");
}

#[test]
fn a_delay_is_as_long_as_planned() {
    let world = World::new(1);
    let (volume, handle) = volume(1);
    let delay = Duration::from_millis(70);
    handle.set(FaultPlan {
        delays_per_million: 1_000_000,
        delay_min: delay,
        delay_max: delay,
        ..FaultPlan::default()
    });
    let mut bench = Bench::simulated(&world, &volume, 4);
    let before = world.now();
    bench.range(Op::Flush, 0, 0, false).unwrap();
    let took = world.now() - before;
    assert!(took >= delay && took < delay + Duration::from_millis(1), "{took:?}");
}
