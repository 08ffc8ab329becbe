//! The per-core buffer pool.

// UNSAFETY: chunks are handed out as raw segments; `SgList::append` asks for a promise about them.
#![expect(unsafe_code)]

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::rc::Rc;

use crate::mapping::Mapping;
use crate::sg::{Hold, Segment, SgList};

/// The unit the arena is cut into. A block serves chunks of one class, or is free.
const BLOCK_BYTES: usize = 128 << 10;
/// Smallest chunk, and the unit in which users are counted.
const PAGE_BYTES: usize = 4 << 10;
const PAGES_PER_BLOCK: usize = BLOCK_BYTES / PAGE_BYTES;
/// Chunk sizes. 16 KiB is one TLS record; 128 KiB the size that one send moves best.
const CLASS_BYTES: [usize; 3] = [PAGE_BYTES, 16 << 10, BLOCK_BYTES];
const CLASSES: usize = CLASS_BYTES.len();
/// Logarithms of their pages: divisions by them are on the way of every I/O.
const CLASS_PAGES_LOG2: [u32; CLASSES] = [
    (CLASS_BYTES[0] / PAGE_BYTES).ilog2(),
    (CLASS_BYTES[1] / PAGE_BYTES).ilog2(),
    (CLASS_BYTES[2] / PAGE_BYTES).ilog2(),
];
const NONE: u32 = u32::MAX;

/// The pool has no memory left for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the core's buffer pool is exhausted")
    }
}

impl std::error::Error for Exhausted {}

/// The buffer pool of one core: a bounded arena, cut into chunks of 4 KiB, 16 KiB and 128 KiB.
///
/// Pages take memory when first used and keep it. The lowest free chunk of the block used last is
/// taken first, so a core with little in flight stays in its caches. Chunks are page-aligned.
/// Contents are stale: see the crate's rules.
///
/// What happens at the limit: `alloc` says [`Exhausted`], and the caller keeps its request and
/// tries again when other I/O has finished.
#[derive(Clone)]
pub struct Pool(Rc<Arena>);

impl Pool {
    /// A pool of at most `bytes_max` bytes, rounded up to whole blocks of 128 KiB.
    pub fn new(bytes_max: usize) -> io::Result<Pool> {
        let blocks = bytes_max.div_ceil(BLOCK_BYTES).max(1);
        let too_big = || {
            io::Error::new(io::ErrorKind::InvalidInput, format!("buffer pool of {bytes_max} bytes"))
        };
        let blocks = u32::try_from(blocks).map_err(|_| too_big())?;
        let len = (blocks as usize).checked_mul(BLOCK_BYTES).ok_or_else(too_big)?;
        let map = Mapping::anonymous(len)?;
        Ok(Pool(Rc::new(Arena { map, state: RefCell::new(State::new(blocks)) })))
    }

    /// Empties `into`, then fills it with `len` bytes of stale contents, in as few segments as the
    /// chunk sizes give. Either all of it or nothing.
    pub fn alloc(&self, len: usize, into: &mut SgList) -> Result<(), Exhausted> {
        into.clear();
        let mut left = len;
        while left > 0 {
            let taken = self.0.state.borrow_mut().take(left);
            let Some((page, class)) = taken else {
                into.clear();
                return Err(Exhausted);
            };
            let part = left.min(CLASS_BYTES[class]);
            let segment = Segment::new(self.0.map.base().wrapping_add(page * PAGE_BYTES), part);
            // SAFETY: the chunk lies in the arena's mapping, which lives as long as the hold, and
            // was free until now; it goes back by exactly one release of a segment with this base.
            unsafe { into.append(&self.0, segment) };
            left -= part;
        }
        Ok(())
    }

    /// Bytes in free chunks. A request of this size can still fail: what is left may be in chunks
    /// too big to fill.
    pub fn available(&self) -> usize {
        self.0.state.borrow().available
    }

    /// The whole arena, to be registered with a kernel. It stays in place as long as the pool or any
    /// list filled from it.
    pub fn arena(&self) -> Segment {
        Segment::new(self.0.map.base(), self.0.map.len())
    }

    /// Bytes in the arena.
    pub fn capacity(&self) -> usize {
        self.0.map.len()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("available", &self.available())
            .field("capacity", &self.capacity())
            .finish()
    }
}

struct Arena {
    map: Mapping,
    state: RefCell<State>,
}

impl Arena {
    /// Page number of a segment that lies in the arena.
    fn page(&self, segment: &Segment) -> usize {
        let offset = segment.as_ptr().addr().wrapping_sub(self.map.base().addr());
        assert!(offset < self.map.len(), "segment of another pool");
        offset / PAGE_BYTES
    }
}

impl Hold for Arena {
    fn retain(&self, segments: &[Segment]) {
        let mut state = self.state.borrow_mut();
        for segment in segments {
            state.retain(self.page(segment));
        }
    }

    fn release(&self, segments: &[Segment]) {
        let mut state = self.state.borrow_mut();
        for segment in segments {
            state.release(self.page(segment));
        }
    }

    fn is_private(&self) -> bool {
        true
    }
}

/// One block: free, or cut into chunks of `class`. Blocks with some chunks free are linked per
/// class.
#[derive(Clone, Copy)]
struct Block {
    class: u8,
    /// Bit n: chunk n is free.
    free: u32,
    previous: u32,
    next: u32,
}

struct State {
    blocks: Vec<Block>,
    /// Whole blocks of no class, used last on top.
    unused: Vec<u32>,
    /// Per class, first block with a free chunk.
    partial: [u32; CLASSES],
    /// Users of the chunk that starts at this page.
    users: Vec<u32>,
    available: usize,
}

impl State {
    fn new(blocks: u32) -> State {
        State {
            blocks: vec![Block { class: 0, free: 0, previous: NONE, next: NONE }; blocks as usize],
            unused: (0..blocks).rev().collect(),
            partial: [NONE; CLASSES],
            users: vec![0; blocks as usize * PAGES_PER_BLOCK],
            available: blocks as usize * BLOCK_BYTES,
        }
    }

    /// The chunk to begin a request of `left` bytes with, as first page and class: the class that
    /// fits best, else a bigger one, else smaller ones (the request then gets more segments).
    fn take(&mut self, left: usize) -> Option<(usize, usize)> {
        // A chunk may be left half empty, not more; what remains is served by smaller ones.
        let best = (0..CLASSES).rev().find(|&c| left > CLASS_BYTES[c] / 2).unwrap_or(0);
        (best..CLASSES)
            .chain((0..best).rev())
            .find_map(|class| Some((self.take_chunk(class)?, class)))
    }

    fn take_chunk(&mut self, class: usize) -> Option<usize> {
        if self.partial[class] == NONE {
            let index = self.unused.pop()?;
            self.blocks[index as usize] =
                Block { class: class as u8, free: full_mask(class), previous: NONE, next: NONE };
            self.link(index);
        }
        let index = self.partial[class];
        let block = &mut self.blocks[index as usize];
        let chunk = block.free.trailing_zeros() as usize;
        block.free &= block.free - 1;
        if block.free == 0 {
            self.unlink(index);
        }
        let page = index as usize * PAGES_PER_BLOCK + (chunk << CLASS_PAGES_LOG2[class]);
        self.users[page] = 1;
        self.available -= CLASS_BYTES[class];
        Some(page)
    }

    /// First page of the chunk that `page` lies in.
    fn chunk_start(&self, page: usize) -> usize {
        let class = usize::from(self.blocks[page / PAGES_PER_BLOCK].class);
        let log2 = CLASS_PAGES_LOG2[class];
        page >> log2 << log2
    }

    fn retain(&mut self, page: usize) {
        let start = self.chunk_start(page);
        let users = &mut self.users[start];
        assert!(*users > 0 && *users < u32::MAX, "retain of a chunk that is not in use");
        *users += 1;
    }

    fn release(&mut self, page: usize) {
        let start = self.chunk_start(page);
        let users = &mut self.users[start];
        assert!(*users > 0, "a chunk was released twice");
        *users -= 1;
        if *users > 0 {
            return;
        }
        let index = (start / PAGES_PER_BLOCK) as u32;
        let block = &mut self.blocks[index as usize];
        let class = usize::from(block.class);
        let chunk = (start % PAGES_PER_BLOCK) >> CLASS_PAGES_LOG2[class];
        let was_full = block.free == 0;
        block.free |= 1 << chunk;
        let is_unused = block.free == full_mask(class);
        self.available += CLASS_BYTES[class];
        if is_unused {
            if !was_full {
                self.unlink(index);
            }
            self.unused.push(index);
        } else if was_full {
            self.link(index);
        }
    }

    /// Puts a block first among those of its class with a free chunk.
    fn link(&mut self, index: u32) {
        let class = usize::from(self.blocks[index as usize].class);
        let head = self.partial[class];
        self.blocks[index as usize].previous = NONE;
        self.blocks[index as usize].next = head;
        if head != NONE {
            self.blocks[head as usize].previous = index;
        }
        self.partial[class] = index;
    }

    fn unlink(&mut self, index: u32) {
        let Block { class, previous, next, .. } = self.blocks[index as usize];
        if previous == NONE {
            self.partial[usize::from(class)] = next;
        } else {
            self.blocks[previous as usize].next = next;
        }
        if next != NONE {
            self.blocks[next as usize].previous = previous;
        }
    }
}

fn full_mask(class: usize) -> u32 {
    u32::MAX >> (32 - BLOCK_BYTES / CLASS_BYTES[class])
}

#[cfg(test)]
mod tests;
