//! Memory shared by all cores, behind a RAM disk.

// UNSAFETY: several cores copy in and out at the same time, which references cannot express.
#![expect(unsafe_code)]

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::mapping::{Mapping, page_bytes};
use crate::raw;
use crate::sg::{OutOfBounds, SgList};

/// Accesses of one aligned unit of this many bytes exclude each other. Blocks are no larger.
const UNIT: usize = 4096;

/// Locks of units of all memories, each in a cache line of its own. A unit's is found by its address,
/// so others have the same one now and then.
static LOCKS: [Lock; 1024] = [const { Lock(Mutex::new(())) }; 1024];

#[repr(align(64))]
struct Lock(Mutex<()>);

/// Zero-filled memory that all cores copy in and out of at once, as they would on a disk.
///
/// Accesses of the same bytes at the same time are not ordered, but each aligned unit of 4,096 bytes is
/// read and written whole: of a block, which is no larger, a reader sees old or new bytes, and of two
/// writers one has it. That is what NVMe promises of a single block (NVM Command Set, "Atomic
/// Operations": AWUN is one block at least); of several blocks neither it nor virtio promises more.
/// Taking the memory of whole pages back is the exception. Pages take memory when first written.
#[derive(Debug)]
pub struct SharedBytes {
    map: Mapping,
    len: usize,
    page: usize,
}

impl SharedBytes {
    /// Reserves `len` bytes of address space, reading as zeros.
    pub fn new(len: usize) -> io::Result<SharedBytes> {
        let page = page_bytes();
        let map = Mapping::anonymous(len.max(1).next_multiple_of(page))?;
        Ok(SharedBytes { map, len, page })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `to.len()` bytes at `offset` into the list.
    pub fn read(&self, offset: usize, to: &SgList) -> Result<(), OutOfBounds> {
        self.each(offset, to, |ours, theirs, len| {
            // SAFETY: `each` gives memory of the list, which is mapped, and as many bytes of ours.
            unsafe { raw::copy(ours, theirs, len) }
        })
    }

    /// Copies the whole list to `offset`.
    pub fn write(&self, offset: usize, from: &SgList) -> Result<(), OutOfBounds> {
        self.each(offset, from, |ours, theirs, len| {
            // SAFETY: as in `read`.
            unsafe { raw::copy(theirs, ours, len) }
        })
    }

    /// Makes `len` bytes at `offset` zero and keeps their memory.
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), OutOfBounds> {
        self.check(offset, len)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = rest_of_unit(at).min(end - at);
            let (memory, _lock) = self.unit(at);
            // SAFETY: the range was just checked to be in the mapping.
            unsafe { raw::fill(memory, 0, part) };
            at += part;
        }
        Ok(())
    }

    /// Makes `len` bytes at `offset` zero and gives the memory of whole pages back to the system.
    pub fn discard(&self, offset: usize, len: usize) -> Result<(), OutOfBounds> {
        self.check(offset, len)?;
        let end = offset + len;
        let first = offset.next_multiple_of(self.page);
        let last = end - end % self.page;
        // Locked memory (mlockall) cannot be given back: then write zeros, the contents are the
        // promise.
        if first >= last || self.map.discard(first, last - first).is_err() {
            return self.zero(offset, len);
        }
        self.zero(offset, first - offset)?;
        self.zero(last, end - last)
    }

    /// Whether the bytes at `offset` are those of the list. Compared piece by piece, in copies.
    pub fn is_equal(&self, offset: usize, with: &SgList) -> Result<bool, OutOfBounds> {
        self.check(offset, with.len())?;
        let (mut ours, mut theirs) = ([0; UNIT], [0; UNIT]);
        let mut done = 0;
        while done < with.len() {
            let len = rest_of_unit(offset + done).min(with.len() - done);
            self.peek(offset + done, &mut ours[..len]);
            with.copy_to_slice(done, &mut theirs[..len])?;
            if ours[..len] != theirs[..len] {
                return Ok(false);
            }
            done += len;
        }
        Ok(true)
    }

    /// Copies `len` bytes at `from` to `to`; the two ranges do not overlap, or what is at `to` is
    /// unspecified.
    pub fn copy_within(&self, from: usize, to: usize, len: usize) -> Result<(), OutOfBounds> {
        self.check(from, len)?;
        self.check(to, len)?;
        let mut piece = [0; UNIT];
        let mut done = 0;
        while done < len {
            // Whole blocks of either side, if both ranges begin with one.
            let part = rest_of_unit(from + done).min(rest_of_unit(to + done)).min(len - done);
            self.peek(from + done, &mut piece[..part]);
            let (memory, _lock) = self.unit(to + done);
            // SAFETY: the range was checked above to be in the mapping.
            unsafe { raw::copy(piece.as_ptr(), memory, part) };
            done += part;
        }
        Ok(())
    }

    /// Copies bytes of one unit, in a range that was checked.
    fn peek(&self, offset: usize, to: &mut [u8]) {
        let (memory, _lock) = self.unit(offset);
        // SAFETY: the caller has checked the range to be in the mapping.
        unsafe { raw::copy(memory, to.as_mut_ptr(), to.len()) };
    }

    /// The memory at `offset`, and its unit for oneself.
    #[inline]
    fn unit(&self, offset: usize) -> (*mut u8, MutexGuard<'static, ()>) {
        let memory = self.map.base().wrapping_add(offset);
        let lock = &LOCKS[memory.addr() / UNIT % LOCKS.len()];
        // Nothing panics while it is held, and it guards no value.
        (memory, lock.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `f` with memory of ours, that of the list which belongs to it, and how many bytes: one unit
    /// at most. A unit is held until the last of its bytes, in however many segments.
    #[inline]
    fn each(
        &self,
        offset: usize,
        sg: &SgList,
        mut f: impl FnMut(*mut u8, *mut u8, usize),
    ) -> Result<(), OutOfBounds> {
        self.check(offset, sg.len())?;
        let mut at = offset;
        let mut held = None;
        for segment in sg.segments() {
            let (mut theirs, mut left) = (segment.as_ptr(), segment.len());
            while left > 0 {
                let len = rest_of_unit(at).min(left);
                if at.is_multiple_of(UNIT) || held.is_none() {
                    // One at a time: who waits for one holds none.
                    drop(held.take());
                    held = Some(self.unit(at).1);
                }
                f(self.map.base().wrapping_add(at), theirs, len);
                (at, left, theirs) = (at + len, left - len, theirs.wrapping_add(len));
            }
        }
        Ok(())
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), OutOfBounds> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(OutOfBounds),
        }
    }
}

/// Bytes from `at` to the end of its unit.
#[inline]
fn rest_of_unit(at: usize) -> usize {
    UNIT - at % UNIT
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::Pool;

    /// Several cores at one block: what is read is what somebody has written, in pieces or not.
    #[test]
    fn a_block_is_read_and_written_whole() {
        let memory = SharedBytes::new(3 * UNIT).unwrap();
        let list = |pool: &Pool, pieces: &[usize]| {
            let mut list = SgList::default();
            for len in pieces {
                let mut part = SgList::default();
                pool.alloc(*len, &mut part).unwrap();
                list.append_range(&part, 0, *len).unwrap();
            }
            list
        };
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for mark in [1u8, 2] {
                let (memory, is_over) = (&memory, &is_over);
                scope.spawn(move || {
                    let pool = Pool::new(1 << 20).unwrap();
                    let from = list(&pool, &[1000, UNIT - 1000 + 512]);
                    from.fill(0, from.len(), mark).unwrap();
                    while !is_over.load(Ordering::Relaxed) {
                        memory.write(UNIT, &from).unwrap();
                        memory.copy_within(UNIT, 0, 512).unwrap();
                    }
                });
            }
            let pool = Pool::new(1 << 20).unwrap();
            let to = list(&pool, &[300, 3 * UNIT - 300]);
            let mut bytes = vec![0; 3 * UNIT];
            let (mut last, mut changes, mut torn) = (0, 0, 0);
            while changes < 200 && torn == 0 {
                memory.read(0, &to).unwrap();
                to.copy_to_slice(0, &mut bytes).unwrap();
                for block in [0..512, UNIT..2 * UNIT, 2 * UNIT..2 * UNIT + 512] {
                    let first = bytes[block.start];
                    torn += usize::from(bytes[block].iter().any(|byte| *byte != first));
                }
                changes += usize::from(bytes[UNIT] != last);
                last = bytes[UNIT];
            }
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(torn, 0, "blocks of two writers");
        });
    }

    #[test]
    fn ranges_are_written_read_zeroed_and_discarded() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut sg = SgList::default();
        pool.alloc(20_000, &mut sg).unwrap();
        let memory = SharedBytes::new(50_000).unwrap();
        for discard in [false, true] {
            sg.fill(0, 20_000, 5).unwrap();
            memory.write(10_000, &sg).unwrap();
            let (offset, len) = (11_000, 15_000);
            match discard {
                true => memory.discard(offset, len).unwrap(),
                false => memory.zero(offset, len).unwrap(),
            }
            memory.read(10_000, &sg).unwrap();
            let mut bytes = vec![0; 20_000];
            sg.copy_to_slice(0, &mut bytes).unwrap();
            for (i, byte) in bytes.iter().enumerate() {
                assert_eq!(*byte, if (1_000..16_000).contains(&i) { 0 } else { 5 }, "at {i}");
            }
        }
        // Inside one page, nothing whole to give back.
        memory.discard(10_001, 3).unwrap();
        assert_eq!(memory.read(30_001, &sg), Err(OutOfBounds));
        assert_eq!(memory.write(usize::MAX, &sg), Err(OutOfBounds));
        assert_eq!(memory.discard(50_000, 1), Err(OutOfBounds));
        assert_eq!(memory.zero(1, usize::MAX), Err(OutOfBounds));
    }

    #[test]
    fn bytes_are_compared_and_moved() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut sg = SgList::default();
        pool.alloc(20_000, &mut sg).unwrap();
        let bytes: Vec<u8> = (0..20_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        sg.copy_from_slice(0, &bytes).unwrap();
        let memory = SharedBytes::new(50_000).unwrap();
        memory.write(3, &sg).unwrap();
        assert_eq!(memory.is_equal(3, &sg), Ok(true));
        assert_eq!(memory.is_equal(4, &sg), Ok(false));
        memory.copy_within(3, 30_000, 20_000).unwrap();
        assert_eq!(memory.is_equal(30_000, &sg), Ok(true));
        for at in [0, 4095, 4096, 19_999] {
            sg.copy_from_slice(at, &[!bytes[at]]).unwrap();
            assert_eq!(memory.is_equal(30_000, &sg), Ok(false), "byte {at}");
            sg.copy_from_slice(at, &bytes[at..=at]).unwrap();
        }
        assert_eq!(memory.is_equal(30_001, &sg), Err(OutOfBounds));
        assert_eq!(memory.copy_within(0, 49_999, 2), Err(OutOfBounds));
        assert_eq!(memory.copy_within(49_999, 0, 2), Err(OutOfBounds));
    }
}
