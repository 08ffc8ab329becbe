//! What every backend refuses, and that refusals come back like anything else.

use std::sync::Arc;

use block::fault::FaultVolume;
use block::null::NullVolume;
use block::ram::RamVolume;
use block::uring::{FileVolume, Layout};
use block::{Busy, Extent, Io, IoError, Op, Volume};
use iobuf::SgList;
use reactor::sim::World;

use crate::harness::{Bench, bytes, identity};

const BYTES: u64 = 1 << 20;

fn layout(read_only: bool) -> Layout {
    Layout {
        block_bytes: 512,
        physical_block_bytes: 4096,
        memory_align: 512,
        deallocate_granularity_bytes: 4096,
        read_only,
        can_punch: true,
        optimal_io_bytes: 0,
        poll: false,
    }
}

fn volumes(world: &World) -> Vec<(&'static str, Arc<dyn Volume>)> {
    let ram = RamVolume::new(identity(), BYTES, 512).unwrap();
    let inner = Arc::new(NullVolume::new(identity(), BYTES, 512));
    let file = world.file("file", BYTES).share();
    vec![
        ("null", Arc::new(NullVolume::new(identity(), BYTES, 512))),
        ("ram", Arc::new(ram)),
        ("fault", Arc::new(FaultVolume::new(inner, 1).0)),
        ("file", Arc::new(FileVolume::over(file, identity(), BYTES, layout(false)))),
    ]
}

#[test]
fn bad_ranges_come_back_with_the_reason() {
    let world = World::new(1);
    for (name, volume) in volumes(&world) {
        let mut bench = Bench::simulated(&world, &*volume, 4);
        let geometry = volume.geometry();
        assert_eq!(geometry.bytes(), BYTES, "{name}");
        assert_eq!(volume.identity(), identity(), "{name}");
        assert_eq!(volume.refresh().unwrap(), geometry, "{name}");
        let too_large = u64::from(geometry.io_bytes_max) + 512;
        for (op, offset, len, want) in [
            (Op::WriteZeroes, BYTES, 512, Err(IoError::OutOfRange)),
            (Op::Deallocate, BYTES - 512, 1024, Err(IoError::OutOfRange)),
            (Op::WriteZeroes, u64::MAX - 511, 512, Err(IoError::OutOfRange)),
            (Op::Deallocate, 0, u64::MAX, Err(IoError::OutOfRange)),
            (Op::WriteZeroes, 100, 512, Err(IoError::Misaligned)),
            (Op::Deallocate, 512, 100, Err(IoError::Misaligned)),
            (Op::Read, 0, 512, Err(IoError::Misaligned)), // without memory
            (Op::Read, 0, too_large.min(BYTES), Err(IoError::Misaligned)),
            (Op::Read, 0, 0, Ok(())),
            (Op::Write, BYTES, 0, Ok(())),
            (Op::Deallocate, 512, 0, Ok(())),
            (Op::Flush, u64::MAX, u64::MAX, Ok(())),
            (Op::WriteZeroes, 0, BYTES, Ok(())),
            (Op::Verify, 512, BYTES, Err(IoError::OutOfRange)),
            (Op::Verify, 0, BYTES, Ok(())),
            (Op::Compare, 0, 512, Err(IoError::Misaligned)), // without memory
            (Op::Compare, BYTES, 0, Ok(())),
            (Op::Reserve, 0, 0, Err(IoError::NotSupported)),
            (Op::ReservationReport, 0, 64, Err(IoError::NotSupported)),
        ] {
            let io = bench.run(Io { tag: 77, ..Io::new(op, offset, len) });
            assert_eq!(io.result, want, "{name}: {op:?} {offset} {len}");
            assert_eq!((io.tag, io.op, io.offset, io.len), (77, op, offset, len), "{name}");
        }
        assert_eq!(bench.in_flight(), 0, "{name}");
    }
}

#[test]
fn depth_is_the_limit_and_the_io_is_given_back() {
    let world = World::new(1);
    for (name, volume) in volumes(&world) {
        let mut bench = Bench::simulated(&world, &*volume, 3);
        for tag in 0..3 {
            bench.submit(Box::new(Io { tag, ..Io::new(Op::Flush, 0, 0) })).unwrap();
        }
        let Err(Busy(io)) = bench.submit(Box::new(Io { tag: 3, ..Io::new(Op::Flush, 0, 0) }))
        else {
            panic!("{name}: more than depth");
        };
        assert_eq!((io.tag, bench.in_flight()), (3, 3), "{name}");
        let mut tags: Vec<u64> = (0..3).map(|_| bench.wait().tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2], "{name}");
        bench.submit(io).unwrap();
        assert_eq!(bench.wait().tag, 3, "{name}");
    }
}

#[test]
fn a_read_only_volume_is_not_changed() {
    let world = World::new(1);
    let file = world.file("file", BYTES).share();
    let volume = FileVolume::over(file, identity(), BYTES, layout(true));
    let mut bench = Bench::simulated(&world, &volume, 4);
    assert_eq!(bench.write(0, &[1; 512], false), Err(IoError::ReadOnly));
    assert_eq!(bench.range(Op::WriteZeroes, 0, 512, false), Err(IoError::ReadOnly));
    assert_eq!(bench.range(Op::Deallocate, 0, 512, false), Err(IoError::ReadOnly));
    assert_eq!(bench.range(Op::Flush, 0, 0, false), Ok(()));
    assert_eq!(bench.read(0, 512), Ok(vec![0; 512]));
}

#[test]
fn null_reads_zeros_whatever_was_written() {
    let world = World::new(1);
    let volume = NullVolume::new(identity(), BYTES, 4096);
    let mut bench = Bench::simulated(&world, &volume, 4);
    assert_eq!(bench.write(4096, &[1; 8192], true), Ok(()));
    assert_eq!(bench.read(0, 16384), Ok(vec![0; 16384]));
}

#[test]
fn null_lends_zeros_and_what_may_change_is_not_lent() {
    let world = World::new(1);
    for (name, volume) in volumes(&world) {
        let mut bench = Bench::simulated(&world, &*volume, 4);
        let local = bench.local();
        let mut channel = volume.open(&local, 4).unwrap();
        let mut lent = SgList::default();
        assert_eq!(channel.lend(0, 40_000, &mut lent), name == "null", "{name}");
        if name != "null" {
            assert!(lent.is_empty(), "{name}");
            continue;
        }
        assert!(bytes(&lent) == vec![0; 40_000] && local.is_zeros(&lent));
        // However many borrow, it is the same memory; and a buffer of the pool is none of it.
        let free = local.pool().available();
        let mut io = Io::new(Op::Read, 0, 4096);
        assert!(channel.lend(0, 4096, &mut io.data));
        assert_eq!(local.pool().available(), free);
        let io = bench.run(io);
        assert_eq!((io.result, bytes(&io.data)), (Ok(()), vec![0; 4096]));
        drop((io, lent));
        assert_eq!(local.pool().available(), free);
        let mut own = SgList::default();
        local.pool().alloc(4096, &mut own).unwrap();
        assert!(!local.is_zeros(&own));
    }
}

#[test]
fn copies_are_done_or_refused() {
    let world = World::new(1);
    for (name, volume) in volumes(&world) {
        let mut bench = Bench::simulated(&world, &*volume, 4);
        let sources = vec![Extent { offset: 4096, len: 4096 }];
        let io = bench.run(Io { sources, ..Io::new(Op::Copy, 65536, 4096) });
        let want = match volume.geometry().copy.ranges_max {
            0 => Err(IoError::NotSupported),
            _ => Ok(()),
        };
        assert_eq!((io.result, name == "ram"), (want, want.is_ok()), "{name}");
    }
}
