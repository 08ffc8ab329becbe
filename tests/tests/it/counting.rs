//! An allocator that counts what chosen threads allocate.

// UNSAFETY: a global allocator is an unsafe trait; this one only counts and passes on.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

static COUNTED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_COUNTED: Cell<bool> = const { Cell::new(false) };
}

pub(crate) struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // The flag is gone while a thread ends; nothing is counted then.
    if IS_COUNTED.try_with(Cell::get).unwrap_or(false) {
        COUNTED.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system allocator unchanged, which upholds the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are handed on; the memory came from the same allocator.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are handed on; the memory came from the same allocator.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// From now on the calling thread's allocations are counted.
pub(crate) fn count_this_thread() {
    IS_COUNTED.set(true);
}

/// Allocations counted so far, of all such threads.
pub(crate) fn counted() -> u64 {
    COUNTED.load(Ordering::Relaxed)
}
