//! After warm-up no I/O allocates.

// UNSAFETY: a global allocator, which only counts.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout as MemoryLayout, System};
use std::cell::Cell;
use std::sync::Arc;

use block::fault::FaultVolume;
use block::null::NullVolume;
use block::ram::RamVolume;
use block::uring::{FileOptions, FileVolume};
use block::{Extent, Io, IoError, Op, Volume};
use reactor::sim::World;
use tempfile::TempDir;

use crate::harness::{Bench, identity};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        // A thread that ends has no counter any more.
        let _ = COUNT.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: MemoryLayout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: usize = 8;

/// Rounds of everything the volume can do; recycles the same boxes and lists.
fn rounds(bench: &mut Bench, parked: &mut Vec<Box<Io>>, count: u64, can_copy: bool) {
    let pool = bench.local().pool().clone();
    let ops = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::WriteZeroes,
        Op::Deallocate,
        Op::Compare,
        Op::Verify,
        Op::Copy,
    ];
    let ops = if can_copy { &ops[..] } else { &ops[..7] };
    for round in 0..count {
        for i in 0..DEPTH as u64 {
            let mut io = parked.pop().unwrap();
            io.op = ops[(round + i) as usize % ops.len()];
            io.offset = i * 65536;
            // Also lengths that take several segments.
            io.len = [4096, 16384, 12800, 512][(round % 4) as usize];
            io.fua = round % 3 == 0 && io.op.is_change();
            io.data.clear();
            if io.op.has_data() {
                pool.alloc(io.len as usize, &mut io.data).unwrap();
            }
            if io.op == Op::Copy {
                io.sources.clear();
                let half = io.len / 1024 * 512;
                let parts = [(0, half), (1 << 20, io.len - half)];
                let parts = parts.into_iter().filter(|(_, len)| *len > 0);
                io.sources.extend(parts.map(|(at, len)| Extent { offset: (2 << 20) + at, len }));
            }
            bench.submit(io).unwrap();
        }
        while parked.len() < DEPTH {
            let io = bench.wait();
            // What is compared with is whatever the pool's memory held.
            if io.op != Op::Compare || io.result != Err(IoError::CompareFailed) {
                assert_eq!(io.result, Ok(()), "{:?}", io.op);
            }
            parked.push(io);
        }
    }
}

fn check(name: &str, volume: &dyn Volume, bench: &mut Bench, count: u64) {
    let can_copy = volume.geometry().copy.ranges_max > 0;
    let mut parked: Vec<Box<Io>> = (0..DEPTH).map(|_| Box::new(Io::with_capacity(8))).collect();
    rounds(bench, &mut parked, 200, can_copy);
    let before = COUNT.get();
    rounds(bench, &mut parked, count, can_copy);
    assert_eq!(COUNT.get() - before, 0, "{name}: allocations in {} I/Os", count * DEPTH as u64);
}

#[test]
fn the_counter_counts() {
    let before = COUNT.get();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(COUNT.get() - before, 1);
}

#[test]
fn memory_and_layers_do_not_allocate() {
    let world = World::new(1);
    let ram: Arc<dyn Volume> = Arc::new(RamVolume::new(identity(), 4 << 20, 512).unwrap());
    check("ram", &*ram, &mut Bench::simulated(&world, &*ram, DEPTH as u32), 500);
    let null = NullVolume::new(identity(), 4 << 20, 512);
    check("null", &null, &mut Bench::simulated(&world, &null, DEPTH as u32), 500);
    let (fault, _) = FaultVolume::new(ram, 1);
    check("fault", &fault, &mut Bench::simulated(&world, &fault, DEPTH as u32), 500);
}

#[test]
fn files_do_not_allocate() {
    let dir = TempDir::new().unwrap();
    let options = FileOptions { size_bytes: Some(4 << 20), ..FileOptions::default() };
    let volume = FileVolume::open(&dir.path().join("disk"), identity(), &options).unwrap();
    let mut bench = Bench::real(&volume, DEPTH as u32);
    check("file", &volume, &mut bench, 300);
}
