//! The receive buffers of a core: a provided-buffer ring shared by all its streams.

// UNSAFETY: the kernel writes into buffers that it picks itself, and their ring is memory shared
// with it.
#![expect(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::rc::Rc;
use std::slice;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use crate::sys::Mapping;

/// Size of a spare buffer: one TLS record's plaintext.
pub(crate) const SPARE_BYTES: usize = 16 << 10;
/// Spare buffers kept for the next use. More may exist (one per stream whose bytes are not taken),
/// but are freed.
const SPARES_KEPT: usize = 16;

#[derive(Clone, Copy, Default)]
struct Buffer {
    /// Chunks that lend parts of it.
    chunks: u32,
    /// The kernel may still write into it.
    with_kernel: bool,
    /// Where the kernel writes next (incremental mode).
    used: u32,
}

/// The buffers, and the ring that hands them to the kernel (a list, if the kernel is simulated).
pub(crate) struct RxPool {
    memory: Mapping,
    ring: Option<Mapping>,
    buffer_bytes: u32,
    buffers: Box<[Cell<Buffer>]>,
    tail: Cell<u16>,
    /// Buffers that the kernel may write into.
    provided: Cell<u32>,
    /// For the simulated kernel: what the ring would hold.
    free: RefCell<VecDeque<u16>>,
    spares: RefCell<Vec<Rc<SpareBytes>>>,
}

impl RxPool {
    /// `count` (a power of two) buffers of `buffer_bytes`, all provided. `shared`: with a ring for
    /// the kernel to read.
    pub(crate) fn new(count: u16, buffer_bytes: u32, shared: bool) -> io::Result<Rc<RxPool>> {
        let ring_bytes = usize::from(count) * size_of::<BufRingEntry>();
        let pool = RxPool {
            memory: Mapping::anonymous(usize::from(count) * buffer_bytes as usize)?,
            ring: if shared { Some(Mapping::anonymous(ring_bytes)?) } else { None },
            buffer_bytes,
            buffers: (0..count).map(|_| Cell::default()).collect(),
            tail: Cell::new(0),
            provided: Cell::new(0),
            free: RefCell::new(VecDeque::with_capacity(if shared { 0 } else { count.into() })),
            spares: RefCell::new(Vec::with_capacity(SPARES_KEPT)),
        };
        for bid in 0..count {
            pool.provide(bid);
        }
        Ok(Rc::new(pool))
    }

    pub(crate) fn count(&self) -> u16 {
        self.buffers.len() as u16 // built from a u16
    }

    /// Address of the ring, for its registration.
    pub(crate) fn ring_addr(&self) -> u64 {
        self.ring.as_ref().map_or(0, |ring| ring.base().addr() as u64)
    }

    pub(crate) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes as usize
    }

    /// Buffers that the kernel may write into, as far as reaped completions tell.
    pub(crate) fn provided(&self) -> u32 {
        self.provided.get()
    }

    /// Gives a buffer to the kernel.
    fn provide(&self, bid: u16) {
        self.buffers[usize::from(bid)].set(Buffer { chunks: 0, with_kernel: true, used: 0 });
        self.provided.set(self.provided.get() + 1);
        let Some(ring) = &self.ring else {
            self.free.borrow_mut().push_back(bid);
            return;
        };
        let first = ring.base().cast::<BufRingEntry>();
        let tail = self.tail.get();
        let at = usize::from(tail) & (self.buffers.len() - 1);
        // SAFETY: `at` is below the number of entries, for which the mapping has room.
        let entry = unsafe { first.add(at) };
        // SAFETY: the kernel reads entries only below the tail, and this one is published by the
        // store below. It is plain old data inside a live mapping, and no other reference to it
        // exists.
        let entry = unsafe { &mut *entry };
        entry.set_addr(self.base(bid).addr() as u64);
        entry.set_len(self.buffer_bytes);
        entry.set_bid(bid);
        self.tail.set(tail.wrapping_add(1));
        // SAFETY: `first` is the start of the ring, as `tail` asks for.
        let shared_tail = unsafe { BufRingEntry::tail(first) };
        // SAFETY: the field is a live, aligned u16 that only this thread writes and the kernel
        // reads.
        let shared_tail = unsafe { AtomicU16::from_ptr(shared_tail.cast_mut()) };
        // Release: the entry is complete before the kernel can see it.
        shared_tail.store(self.tail.get(), Ordering::Release);
    }

    fn base(&self, bid: u16) -> *mut u8 {
        self.memory.base().wrapping_add(usize::from(bid) * self.buffer_bytes as usize)
    }

    /// The kernel has written `len` bytes into buffer `bid`; `more`: it will write on behind them
    /// (incremental mode).
    pub(crate) fn take(self: &Rc<Self>, bid: u16, len: usize, more: bool) -> RxChunk {
        let cell = &self.buffers[usize::from(bid)];
        let mut buffer = cell.get();
        let start = buffer.used as usize;
        assert!(
            buffer.with_kernel && start + len <= self.buffer_bytes as usize,
            "the kernel completed {len} bytes at {start} of receive buffer {bid}, which it does not have"
        );
        buffer.chunks += 1;
        buffer.used += len as u32; // no more than buffer_bytes
        buffer.with_kernel = more;
        cell.set(buffer);
        if !more {
            self.provided.set(self.provided.get() - 1);
        }
        RxChunk { memory: Memory::Ring { pool: Rc::clone(self), bid }, start, len }
    }

    fn release(&self, bid: u16) {
        let cell = &self.buffers[usize::from(bid)];
        let mut buffer = cell.get();
        buffer.chunks -= 1;
        cell.set(buffer);
        if buffer.chunks == 0 && !buffer.with_kernel {
            self.provide(bid);
        }
    }

    /// For the simulated kernel: takes a buffer to write into.
    pub(crate) fn pick(&self) -> Option<u16> {
        self.free.borrow_mut().pop_front()
    }

    /// For the simulated kernel: writes to the start of a buffer it picked. Returns how many bytes
    /// fit.
    pub(crate) fn write(&self, bid: u16, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.buffer_bytes as usize);
        let buffer = self.buffers[usize::from(bid)].get();
        assert!(
            buffer.with_kernel && buffer.chunks == 0,
            "the simulated kernel owns what it picked"
        );
        // SAFETY: the buffer is mapped, `len` bytes long, and lent to no chunk.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base(bid), len) };
        len
    }

    /// A spare buffer of [`SPARE_BYTES`], outside the ring.
    pub(crate) fn spare(self: &Rc<Self>) -> Spare {
        let kept = self.spares.borrow_mut().pop();
        let bytes = kept.unwrap_or_else(|| Rc::new(SpareBytes::new()));
        Spare { pool: Rc::clone(self), bytes }
    }
}

/// The memory of a spare buffer.
struct SpareBytes {
    /// From a `Box<[u8]>` of [`SPARE_BYTES`]; a raw pointer, since the kernel may be writing to it.
    base: *mut u8,
    /// Tells its stream that one is out: a stream has at most one, which bounds their number.
    lent: RefCell<Option<Rc<Cell<bool>>>>,
}

impl SpareBytes {
    fn new() -> SpareBytes {
        let bytes = vec![0u8; SPARE_BYTES].into_boxed_slice();
        SpareBytes { base: Box::into_raw(bytes).cast(), lent: RefCell::new(None) }
    }
}

impl Drop for SpareBytes {
    fn drop(&mut self) {
        let bytes = std::ptr::slice_from_raw_parts_mut(self.base, SPARE_BYTES);
        // SAFETY: the pointer came from `Box::into_raw` of a slice of this length. Whoever lends it
        // to the kernel keeps a `Spare` until the kernel is done.
        drop(unsafe { Box::from_raw(bytes) });
    }
}

/// A buffer outside the ring: for a stream that finds the ring empty, and for plaintext that must
/// be copied. Clones are parts of one buffer, which returns to the pool with the last.
#[derive(Clone)]
pub(crate) struct Spare {
    pool: Rc<RxPool>,
    bytes: Rc<SpareBytes>,
}

impl Spare {
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.bytes.base
    }

    /// Sets `lent` for as long as the buffer is out.
    pub(crate) fn lend(self, lent: &Rc<Cell<bool>>) -> Spare {
        lent.set(true);
        *self.bytes.lent.borrow_mut() = Some(Rc::clone(lent));
        self
    }

    /// The first `len` bytes as a chunk.
    pub(crate) fn into_chunk(self, len: usize) -> RxChunk {
        assert!(len <= SPARE_BYTES, "more bytes than a spare buffer has");
        RxChunk { memory: Memory::Spare(self), start: 0, len }
    }

    /// A chunk with a copy of as many bytes as fit.
    pub(crate) fn copy_of(self, bytes: &[u8]) -> (RxChunk, usize) {
        let len = bytes.len().min(SPARE_BYTES);
        // SAFETY: the buffer is at least `len` bytes long, and nobody else has it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr(), len) };
        (self.into_chunk(len), len)
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        if Rc::strong_count(&self.bytes) > 1 {
            return;
        }
        if let Some(lent) = self.bytes.lent.take() {
            lent.set(false);
        }
        let mut spares = self.pool.spares.borrow_mut();
        if spares.len() < SPARES_KEPT {
            spares.push(Rc::clone(&self.bytes));
        }
    }
}

enum Memory {
    Ring { pool: Rc<RxPool>, bid: u16 },
    Spare(Spare),
}

/// Received bytes. Their buffer goes back to the core when the chunk is dropped, so hold it only as
/// long as needed: all streams of the core share the buffers.
pub struct RxChunk {
    memory: Memory,
    /// Invariant: `[start, start + len)` lies in the buffer and belongs to no other chunk and not
    /// to the kernel.
    start: usize,
    len: usize,
}

impl RxChunk {
    /// Drops the first `len` bytes (all, if there are fewer): they were consumed.
    pub fn advance(&mut self, len: usize) {
        let len = len.min(self.len);
        self.start += len;
        self.len -= len;
    }

    /// Splits off what lies before `at` (everything, if there is less); `self` keeps the rest.
    pub fn split_to(&mut self, at: usize) -> RxChunk {
        let at = at.min(self.len);
        let memory = match &self.memory {
            Memory::Ring { pool, bid } => {
                let cell = &pool.buffers[usize::from(*bid)];
                let mut buffer = cell.get();
                buffer.chunks += 1;
                cell.set(buffer);
                Memory::Ring { pool: Rc::clone(pool), bid: *bid }
            }
            Memory::Spare(spare) => Memory::Spare(spare.clone()),
        };
        let front = RxChunk { memory, start: self.start, len: at };
        self.advance(at);
        front
    }

    /// Splits off a range, given in ascending order by repeated calls; `consumed` is what earlier
    /// calls cut off.
    pub(crate) fn cut(&mut self, range: Range<usize>, consumed: &mut usize) -> Option<RxChunk> {
        let skip = range.start.checked_sub(*consumed)?;
        let len = range.end.checked_sub(range.start)?;
        if skip.checked_add(len)? > self.len {
            return None;
        }
        self.advance(skip);
        *consumed = range.end;
        Some(self.split_to(len))
    }

    fn as_ptr(&self) -> *mut u8 {
        let base = match &self.memory {
            Memory::Ring { pool, bid } => pool.base(*bid),
            Memory::Spare(spare) => spare.as_ptr(),
        };
        base.wrapping_add(self.start)
    }
}

impl Drop for RxChunk {
    fn drop(&mut self) {
        if let Memory::Ring { pool, bid } = &self.memory {
            pool.release(*bid);
        }
    }
}

impl Deref for RxChunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped as long as `memory` lives, and belongs to this chunk alone
        // (invariant of `start`). The memory is zeroed at first, so every byte is initialised.
        unsafe { slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl DerefMut for RxChunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `self` is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.as_ptr(), self.len) }
    }
}

impl fmt::Debug for RxChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Payload is never logged.
        f.debug_struct("RxChunk").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(pool: &Rc<RxPool>, bytes: &[u8]) -> RxChunk {
        let bid = pool.pick().unwrap();
        let len = pool.write(bid, bytes);
        pool.take(bid, len, false)
    }

    #[test]
    fn a_buffer_returns_when_its_last_part_is_dropped() {
        let pool = RxPool::new(1, 4096, false).unwrap();
        let mut chunk = receive(&pool, b"0123456789");
        assert_eq!(pool.provided(), 0);
        let mut front = chunk.split_to(4);
        front.copy_from_slice(b"abcd");
        assert_eq!((&*front, &*chunk), (&b"abcd"[..], &b"456789"[..]));
        drop(front);
        assert_eq!(pool.provided(), 0);
        chunk.advance(100);
        assert!(chunk.is_empty());
        drop(chunk);
        assert_eq!(pool.provided(), 1);
        assert_eq!(pool.pick(), Some(0));
    }

    #[test]
    fn incremental_use_returns_a_buffer_only_when_the_kernel_is_done_too() {
        let pool = RxPool::new(1, 8, false).unwrap();
        let bid = pool.pick().unwrap();
        let first = pool.take(bid, 5, true);
        drop(first);
        assert_eq!((pool.provided(), pool.pick()), (1, None));
        let second = pool.take(bid, 3, false);
        assert_eq!(second.len(), 3);
        assert_eq!(pool.provided(), 0);
        drop(second);
        assert_eq!((pool.provided(), pool.pick()), (1, Some(bid)));
    }

    #[test]
    fn cutting_ranges_refuses_what_overlaps_or_overruns() {
        let pool = RxPool::new(2, 4096, false).unwrap();
        let mut chunk = receive(&pool, b"0123456789");
        let mut consumed = 0;
        assert_eq!(&*chunk.cut(2..4, &mut consumed).unwrap(), b"23");
        assert_eq!(&*chunk.cut(4..5, &mut consumed).unwrap(), b"4");
        assert!(chunk.cut(3..6, &mut consumed).is_none(), "overlaps");
        assert!(chunk.cut(8..11, &mut consumed).is_none(), "overruns");
        assert!(chunk.cut(Range { start: 8, end: 7 }, &mut consumed).is_none(), "reversed");
        assert_eq!(&*chunk.cut(8..10, &mut consumed).unwrap(), b"89");
    }

    #[test]
    fn spares_are_recycled() {
        let pool = RxPool::new(1, 4096, false).unwrap();
        let (chunk, len) = pool.spare().copy_of(&[7; SPARE_BYTES + 1]);
        assert_eq!((chunk.len(), len), (SPARE_BYTES, SPARE_BYTES));
        let at = chunk.as_ptr();
        drop(chunk);
        assert_eq!(pool.spare().as_ptr(), at);
    }
}
