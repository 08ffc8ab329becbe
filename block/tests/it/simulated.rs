//! RAM, and files of a simulated kernel with faults and power cuts.

use std::time::Duration;

use block::ram::RamVolume;
use block::uring::{FileVolume, Layout};
use block::{Io, IoError, Op, Volume};
use reactor::CoreConfig;
use reactor::sim::{FileFaults, World};

use crate::harness::{Bench, identity};
use crate::model::{self, Options};

const BYTES: usize = 2 << 20;

fn layout() -> Layout {
    Layout {
        block_bytes: 512,
        physical_block_bytes: 4096,
        memory_align: 512,
        deallocate_granularity_bytes: 4096,
        read_only: false,
        can_punch: true,
        optimal_io_bytes: 0,
        poll: false,
    }
}

fn file(world: &World, layout: Layout) -> FileVolume {
    FileVolume::over(world.file("disk", BYTES as u64).share(), identity(), BYTES as u64, layout)
}

#[test]
fn ram_is_an_array_of_bytes() {
    for (seed, block) in [(1, 512), (2, 4096), (3, 512)] {
        let world = World::new(seed);
        let volume = RamVolume::new(identity(), BYTES as u64, block).unwrap();
        let mut bench = Bench::simulated(&world, &volume, 16);
        let options = Options { len_max: 1_500_000, ..Options::new(seed, 2000) };
        model::run(&mut bench, &volume, vec![0; BYTES], &options);
    }
}

#[test]
fn ram_is_shared_by_cores_and_long_work_comes_in_slices() {
    let world = World::new(1);
    let volume = RamVolume::new(identity(), 64 << 20, 512).unwrap();
    let mut one = Bench::simulated(&world, &volume, 4);
    let mut two = Bench::simulated(&world, &volume, 4);
    one.write(60 << 20, &[7; 4096], false).unwrap();
    assert_eq!(two.read(60 << 20, 4096), Ok(vec![7; 4096]));
    // A long zeroing takes many polls, and other I/O passes it.
    let mut long = Io::new(Op::WriteZeroes, 0, 64 << 20);
    (long.tag, long.no_unmap) = (1, true);
    two.submit(Box::new(long)).unwrap();
    two.submit(Box::new(Io { tag: 2, ..Io::new(Op::Flush, 0, 0) })).unwrap();
    assert_eq!(two.wait().tag, 2);
    assert_eq!(two.in_flight(), 1);
    let io = two.wait();
    assert_eq!((io.tag, io.result), (1, Ok(())));
    assert_eq!(one.read(60 << 20, 4096), Ok(vec![0; 4096]));
    // An abort gives it back early.
    two.submit(Box::new(Io::new(Op::Deallocate, 0, 64 << 20))).unwrap();
    two.abort();
    assert_eq!(two.wait().result, Err(IoError::Aborted));
}

#[test]
fn a_file_is_an_array_of_bytes() {
    for seed in 10..13 {
        let world = World::new(seed);
        let faults = FileFaults { delay_max: Duration::from_micros(300), ..FileFaults::default() };
        world.set_file_faults(faults);
        let volume = file(&world, layout());
        let mut bench = Bench::simulated(&world, &volume, 16);
        let options = Options { len_max: 1_500_000, ..Options::new(seed, 800) };
        model::run(&mut bench, &volume, vec![0; BYTES], &options);
    }
}

#[test]
fn short_transfers_are_continued() {
    for seed in 20..23 {
        let world = World::new(seed);
        world.set_file_faults(FileFaults {
            delay_max: Duration::from_micros(300),
            short_per_million: 300_000,
            ..FileFaults::default()
        });
        let volume = file(&world, layout());
        let mut bench = Bench::simulated(&world, &volume, 16);
        model::run(&mut bench, &volume, vec![0; BYTES], &Options::new(seed, 800));
    }
}

#[test]
fn errors_are_reported_and_never_wrong_data() {
    for seed in 30..33 {
        let world = World::new(seed);
        world.set_file_faults(FileFaults {
            delay_max: Duration::from_micros(300),
            short_per_million: 100_000,
            error_per_million: 50_000,
        });
        let volume = file(&world, layout());
        let mut bench = Bench::simulated(&world, &volume, 16);
        let options = Options { may_fail: Some(IoError::Medium), ..Options::new(seed, 800) };
        model::run(&mut bench, &volume, vec![0; BYTES], &options);
    }
}

#[test]
fn little_memory_and_few_ring_slots_only_slow_down() {
    let world = World::new(40);
    let config = CoreConfig { entries: 4, pool_bytes: 3 << 20, ..CoreConfig::default() };
    let volume = file(&world, layout());
    let mut bench = Bench::on(world.core_with(config), Some(world.clone()), &volume, 16);
    // What the test itself takes leaves little for bouncing: most of it has to wait.
    let options = Options { len_max: 100_000, ..Options::new(40, 1000) };
    model::run(&mut bench, &volume, vec![0; BYTES], &options);
}

#[test]
fn waiting_io_is_given_back_on_abort() {
    let world = World::new(41);
    let config = CoreConfig { entries: 2, ..CoreConfig::default() };
    let volume = file(&world, layout());
    let mut bench = Bench::on(world.core_with(config), Some(world.clone()), &volume, 16);
    for tag in 0..16 {
        bench.submit(Box::new(Io { tag, ..Io::new(Op::Flush, 0, 0) })).unwrap();
    }
    bench.abort();
    let results: Vec<_> = (0..16).map(|_| bench.wait().result).collect();
    let aborted = results.iter().filter(|r| **r == Err(IoError::Aborted)).count();
    assert_eq!(results.iter().filter(|r| r.is_ok()).count() + aborted, 16);
    assert!((1..16).contains(&aborted), "{aborted} aborted");
}

/// Writes old contents, does `change`, cuts the power and returns what is there then.
fn after_power_cut(seed: u64, change: impl FnOnce(&mut Bench)) -> Vec<u8> {
    let world = World::new(seed);
    let volume = file(&world, layout());
    let mut bench = Bench::simulated(&world, &volume, 8);
    bench.write(0, &[9; 65536], true).unwrap();
    change(&mut bench);
    world.power_cut();
    let volume = file(&world, layout());
    Bench::simulated(&world, &volume, 8).read(0, 65536).unwrap()
}

#[test]
fn fua_survives_a_power_cut() {
    let mut lost = 0;
    for seed in 50..80 {
        let seen = after_power_cut(seed, |bench| {
            bench.write(0, &[1; 4096], true).unwrap();
            bench.write(24576, &[3; 4096], false).unwrap();
        });
        assert_eq!(seen[..4096], [1; 4096], "seed {seed}");
        assert!(seen[24576..28672].iter().all(|b| matches!(b, 3 | 9)), "seed {seed}");
        assert_eq!(seen[4096..24576], [9; 20480], "seed {seed}");
        lost += usize::from(seen[24576..28672].contains(&9));
        for op in [Op::WriteZeroes, Op::Deallocate] {
            let seen = after_power_cut(seed, |b| b.range(op, 8192, 4096, true).unwrap());
            assert_eq!(seen[8192..12288], [0; 4096], "seed {seed}: {op:?}");
        }
    }
    assert!(lost > 0, "no power cut lost anything: the test shows nothing");
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    for seed in 80..110 {
        let seen = after_power_cut(seed, |bench| {
            bench.write(0, &[2; 4096], false).unwrap();
            bench.range(Op::WriteZeroes, 4096, 4096, false).unwrap();
            bench.range(Op::Deallocate, 8192, 4096, false).unwrap();
            bench.range(Op::Flush, 0, 0, false).unwrap();
        });
        assert_eq!(seen[..4096], [2; 4096], "seed {seed}");
        assert_eq!(seen[4096..12288], [0; 8192], "seed {seed}");
    }
}

#[test]
fn without_punching_there_is_no_deallocate_but_there_are_zeros() {
    let world = World::new(90);
    let volume = file(&world, Layout { can_punch: false, ..layout() });
    assert!(!volume.geometry().deallocate && volume.geometry().write_zeroes);
    let mut bench = Bench::simulated(&world, &volume, 8);
    bench.write(0, &[5; 8192], false).unwrap();
    assert_eq!(bench.range(Op::Deallocate, 0, 4096, false), Err(IoError::NotSupported));
    assert_eq!(bench.read(0, 4096), Ok(vec![5; 4096]));
    assert_eq!(bench.range(Op::WriteZeroes, 0, 4096, false), Ok(()));
    assert_eq!(bench.read(0, 4096), Ok(vec![0; 4096]));
    assert_eq!(bench.read(4096, 4096), Ok(vec![5; 4096]));
}

#[test]
fn a_polled_volume_is_an_array_of_bytes() {
    let world = World::new(91);
    world.set_file_faults(FileFaults {
        delay_max: Duration::from_micros(300),
        short_per_million: 100_000,
        ..FileFaults::default()
    });
    let volume = file(&world, Layout { poll: true, ..layout() });
    let mut bench = Bench::simulated(&world, &volume, 16);
    model::run(&mut bench, &volume, vec![0; BYTES], &Options::new(91, 800));
}

#[test]
fn what_the_page_cache_lost_stays_lost() {
    let broken = FileFaults { error_per_million: 1_000_000, ..FileFaults::default() };
    for (memory_align, afterwards) in [(512, Ok(())), (1, Err(IoError::Medium))] {
        let world = World::new(92);
        let volume = file(&world, Layout { memory_align, ..layout() });
        let mut bench = Bench::simulated(&world, &volume, 4);
        assert_eq!(bench.range(Op::Flush, 0, 0, false), Ok(()));
        world.set_file_faults(broken);
        assert_eq!(bench.range(Op::Flush, 0, 0, false), Err(IoError::Medium));
        world.set_file_faults(FileFaults::default());
        // The kernel would say that all is well now.
        assert_eq!(bench.range(Op::Flush, 0, 0, false), afterwards);
        assert_eq!(bench.write(0, &[1; 512], true), afterwards);
        assert_eq!(bench.write(0, &[2; 512], false), Ok(()));
        assert_eq!(bench.read(0, 512), Ok(vec![2; 512]));
    }
}
