//! Memory shared by all cores, behind a RAM disk.

// UNSAFETY: several cores copy in and out at the same time, which references cannot express.
#![expect(unsafe_code)]

use std::io;

use crate::mapping::{Mapping, page_bytes};
use crate::raw;
use crate::sg::{OutOfBounds, Segment, SgList};

/// Bytes that lie on the stack while they are compared or moved.
const PIECE: usize = 4096;

/// Zero-filled memory that all cores copy in and out of at once, as they would on a disk.
///
/// Accesses of the same bytes at the same time are not ordered: the reader sees old, new or mixed
/// bytes, exactly what NVMe and virtio promise for overlapping commands in flight. Pages take
/// memory when first written.
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
        self.each(offset, to, |segment, memory| {
            // SAFETY: the list's segment is mapped, and `memory` has as many bytes inside our
            // mapping (checked by `each`).
            unsafe { raw::copy(memory, segment.as_ptr(), segment.len()) }
        })
    }

    /// Copies the whole list to `offset`.
    pub fn write(&self, offset: usize, from: &SgList) -> Result<(), OutOfBounds> {
        self.each(offset, from, |segment, memory| {
            // SAFETY: the list's segment is mapped, and `memory` has as many bytes inside our
            // mapping (checked by `each`).
            unsafe { raw::copy(segment.as_ptr(), memory, segment.len()) }
        })
    }

    /// Makes `len` bytes at `offset` zero and keeps their memory.
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), OutOfBounds> {
        self.check(offset, len)?;
        // SAFETY: the range was just checked to be in the mapping.
        unsafe { raw::fill(self.map.base().wrapping_add(offset), 0, len) };
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
        let (mut ours, mut theirs) = ([0; PIECE], [0; PIECE]);
        let mut done = 0;
        while done < with.len() {
            let len = PIECE.min(with.len() - done);
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
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < len {
            let part = PIECE.min(len - done);
            self.peek(from + done, &mut piece[..part]);
            let memory = self.map.base().wrapping_add(to + done);
            // SAFETY: the range was checked above to be in the mapping.
            unsafe { raw::copy(piece.as_ptr(), memory, part) };
            done += part;
        }
        Ok(())
    }

    /// Copies bytes of a range that was checked.
    fn peek(&self, offset: usize, to: &mut [u8]) {
        let memory = self.map.base().wrapping_add(offset);
        // SAFETY: the caller has checked the range to be in the mapping.
        unsafe { raw::copy(memory, to.as_mut_ptr(), to.len()) };
    }

    fn each(
        &self,
        offset: usize,
        sg: &SgList,
        mut f: impl FnMut(&Segment, *mut u8),
    ) -> Result<(), OutOfBounds> {
        self.check(offset, sg.len())?;
        let mut memory = self.map.base().wrapping_add(offset);
        for segment in sg.segments() {
            f(segment, memory);
            memory = memory.wrapping_add(segment.len());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pool;

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
