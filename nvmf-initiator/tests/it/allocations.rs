//! The data path allocates nothing: what `submit` and `poll` of a channel take from the heap is
//! counted.

// UNSAFETY: a global allocator is an unsafe trait; this one counts and passes on.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;

use block::{Extent, Io, Op};
use nvme::subsys::Limits;
use nvmf_initiator::{PathConfig, PathPolicy, RemoteConfig};

use crate::fake::Script;
use crate::rig::{Disk, Rig, Setup, TARGET, pattern};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`.
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Sums up what is allocated in some calls.
#[derive(Default)]
pub struct Allocations {
    pub count: u64,
}

impl Allocations {
    pub fn watch<T>(&mut self, f: impl FnOnce() -> T) -> T {
        let before = COUNT.with(Cell::get);
        let result = f();
        self.count += COUNT.with(Cell::get) - before;
        result
    }
}

/// One of everything, at a depth that fills the queue.
fn round(rig: &mut Rig, disk: &Disk) {
    for tag in 0..24 {
        let offset = tag * 65_536;
        match tag % 10 {
            0 => disk.write(tag, offset, &pattern(tag, 4096)),
            1 => disk.write(tag, offset, &pattern(tag, 65_536)),
            2 => disk.read(tag, offset, 4096),
            3 => disk.read(tag, offset, 65_536),
            4 => disk.op(tag, Op::Deallocate, offset, 4096),
            5 => disk.op(tag, Op::Verify, offset, 65_536),
            6 => {
                // Of few ranges and of more than fit a capsule.
                let len = 512;
                let count = if tag < 12 { 2 } else { 128 };
                let source = |n| Extent { offset: (4 << 20) + n * len, len };
                let sources = (0..count).map(source).collect();
                disk.submit(Box::new(Io {
                    tag,
                    sources,
                    ..Io::new(Op::Copy, offset, count * len)
                }));
            }
            7 => disk.read(tag, 6 << 20, 4096),
            8 => disk.compare(tag, 7 << 20, &[0; 20_480]),
            _ => disk.op(tag, Op::Flush, 0, 0),
        }
    }
    rig.wait_ok(disk, 24);
}

#[test]
fn the_data_path_allocates_nothing() {
    for (data_digest, paths) in [(false, 1), (true, 1), (true, 3)] {
        let limits = Limits { mdts_bytes: 16_384, ..Limits::default() };
        let addrs = (1..=paths).map(|n| SocketAddr::from(([10, 0, 0, n], 4420)));
        let ways: Vec<PathConfig> = addrs.clone().map(PathConfig::from).collect();
        let config = move |config| RemoteConfig {
            queue_depth: 16,
            data_digest,
            paths: ways.clone(),
            policy: PathPolicy::QueueDepth,
            ..config
        };
        // One that ends what the host had before has no room for a second path.
        let script = Script { fences: paths == 1, ..Script::default() };
        let mut rig =
            Setup { limits, script, config: Box::new(config), ..Setup::default() }.start();
        addrs.for_each(|addr| rig.fake.listen_at(addr, &rig.cores[TARGET]));
        rig.until("all paths", |volume| volume.state().paths.iter().all(|path| path.is_live));
        let disk = rig.disk(1, 24);
        for _ in 0..50 {
            round(&mut rig, &disk);
        }
        let before = disk.allocations();
        assert!(before > 0, "connecting the queue allocates, so nothing is counted");
        for _ in 0..100 {
            round(&mut rig, &disk);
        }
        assert_eq!(disk.allocations() - before, 0, "allocations in 2,400 I/Os");
        let counters = rig.volume.path_counters();
        assert!(counters.iter().all(|path| path.commands > 100), "{counters:?}");
        rig.finish_all();
    }
}
