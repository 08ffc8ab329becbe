//! A steady state allocates nothing: its own binary, as it counts for the whole process.

#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]
#![expect(unsafe_code, reason = "an allocator that counts")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use reactor::net::{Layer, Rx, Stream, StreamConfig};
use reactor::{Core, Fd, Outcome};
use support::xor::Xor;
use support::{core, list, pattern, until};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn count() -> u64 {
    COUNT.with(Cell::get)
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

/// Runs `round` until the state is steady, then counts its allocations.
fn assert_steady(core: &mut Core, mut round: impl FnMut(&mut Core)) {
    for _ in 0..300 {
        round(core);
    }
    let before = count();
    for _ in 0..1000 {
        round(core);
    }
    assert_eq!(count() - before, 0, "allocations in 1000 rounds");
}

#[test]
fn the_counter_counts() {
    let before = count();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(count() - before, 1);
}

fn echo(layers: bool) {
    let mut core = core();
    let local = core.local();
    let (a, b) = UnixStream::pair().unwrap();
    let [mut near, mut far] = [a, b].map(|end| {
        let layer = layers.then(|| Box::new(Xor::default()) as Box<dyn Layer>);
        let config = StreamConfig { layer, ..StreamConfig::default() };
        Stream::new(&local, end.into(), config).unwrap()
    });
    let payload = list(&local, &pattern(20_000, 1));
    let mut size = 0;
    assert_steady(&mut core, |core| {
        size = (size + 977) % 20_000;
        let mut left = 4 * (24 + size + 4);
        for token in 0..4 {
            near.push(&[1; 24], Some((&payload, 0, size)), Some([2; 4]), Some(token)).unwrap();
        }
        near.flush();
        let mut tokens = 0;
        until(core, || {
            near.poll();
            far.poll();
            while let Rx::Data(chunk) = far.recv() {
                left -= chunk.len();
            }
            while near.sent().is_some() {
                tokens += 1;
            }
            (left == 0 && tokens == 4).then_some(())
        });
    });
}

#[test]
fn streams_do_not_allocate() {
    echo(false);
}

#[test]
fn streams_with_a_record_layer_do_not_allocate() {
    echo(true);
}

#[test]
fn file_operations_do_not_allocate() {
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    let fd = Fd::from(OwnedFd::from(tempfile::tempfile().unwrap()));
    let small = list(&local, &pattern(4096, 1));
    let large = list(&local, &pattern(200_000, 1));
    assert_steady(&mut core, |core| {
        port.writev(&fd, 0, &small, false, 1).unwrap();
        port.writev(&fd, 1 << 20, &large, false, 2).unwrap();
        port.readv(&fd, 4096, &large, 3).unwrap();
        port.fallocate(&fd, libc::FALLOC_FL_KEEP_SIZE, 0, 4096, 4).unwrap();
        let mut done = 0;
        until(core, || {
            while let Some(completion) = port.next() {
                assert!(completion.result.is_ok());
                done += 1;
            }
            (done == 4).then_some(())
        });
    });
}

#[test]
fn signals_do_not_allocate() {
    let mut core = core();
    let mut port = core.local().port();
    // SAFETY: takes no pointer.
    let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    // SAFETY: just created, owned by nobody else.
    let raw = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) };
    let file = std::fs::File::from(raw.try_clone().unwrap());
    port.watch(&Fd::from(raw), 1).unwrap();
    assert_steady(&mut core, |core| {
        std::io::Write::write_all(&mut &file, &1u64.to_ne_bytes()).unwrap();
        let done = until(core, || port.next());
        assert!(matches!(done.result, Ok(Outcome::Signal(1))));
    });
}
