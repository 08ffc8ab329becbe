//! Bytes to be sent, wherever they are.

// UNSAFETY: payload to be sealed or copied is guest or pool memory, which is read by address.
#![expect(unsafe_code)]

use std::fmt;

use crate::raw;
use crate::sg::{OutOfBounds, Range, Segment, SgList};

/// A range of bytes scattered in memory that others (a guest) may write to at the same time.
#[derive(Clone, Copy)]
pub struct Gather<'a> {
    /// Invariant: mapped and readable for `'a`.
    segments: &'a [Segment],
    /// Bytes of the segments that lie before the range.
    skip: usize,
    /// Invariant: the segments have as many bytes behind `skip`.
    len: usize,
}

impl<'a> Gather<'a> {
    /// All of `segments`.
    ///
    /// # Safety
    ///
    /// All segments are mapped and readable for `'a`.
    pub unsafe fn new(segments: &'a [Segment]) -> Gather<'a> {
        Gather { segments, skip: 0, len: segments.iter().map(Segment::len).sum() }
    }

    /// All of a list.
    pub fn of_list(list: &'a SgList) -> Gather<'a> {
        // A list keeps its segments mapped (its invariant).
        Gather { segments: list.segments(), skip: 0, len: list.len() }
    }

    /// Bytes in total.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` of the bytes, from `offset`.
    pub fn slice(&self, offset: usize, len: usize) -> Result<Gather<'a>, OutOfBounds> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {}
            _ => return Err(OutOfBounds),
        }
        let (mut segments, mut skip) = (self.segments, self.skip + offset);
        while let Some((first, rest)) = segments.split_first()
            && skip >= first.len()
        {
            skip -= first.len();
            segments = rest;
        }
        Ok(Gather { segments, skip, len })
    }

    /// The pieces in order; none is empty. They can be read for `'a`.
    pub fn parts(&self) -> Range<'a> {
        Range::new(self.segments, self.skip, self.len)
    }

    /// Appends `len` bytes from `offset` to `out`, whose new room is not filled before.
    pub fn append_to(
        &self,
        offset: usize,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OutOfBounds> {
        let range = self.slice(offset, len)?;
        out.reserve(len);
        for part in range.parts() {
            let room = &mut out.spare_capacity_mut()[..part.len()];
            // SAFETY: the part can be read (invariant); `room` is a separate buffer of its length.
            unsafe { raw::copy(part.as_ptr(), room.as_mut_ptr().cast(), part.len()) };
            // SAFETY: so many bytes behind the length have just been written.
            unsafe { out.set_len(out.len() + part.len()) };
        }
        Ok(())
    }
}

impl fmt::Debug for Gather<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gather_copies_across_segments_and_refuses_what_is_outside() {
        let (mut a, mut b) = (*b"012", *b"3456789");
        let segments =
            [Segment::new(a.as_mut_ptr(), a.len()), Segment::new(b.as_mut_ptr(), b.len())];
        // SAFETY: both arrays live to the end of the test.
        let gather = unsafe { Gather::new(&segments) };
        assert_eq!(gather.len(), 10);
        for start in 0..=10 {
            for end in start..=10 {
                let mut out = b"before".to_vec();
                gather.append_to(start, end - start, &mut out).unwrap();
                assert_eq!(out, [b"before", &b"0123456789"[start..end]].concat());
                let slice = gather.slice(start, end - start).unwrap();
                assert_eq!(slice.parts().map(|part| part.len()).sum::<usize>(), end - start);
                for from in 0..=slice.len() {
                    let mut out = Vec::new();
                    slice.append_to(from, slice.len() - from, &mut out).unwrap();
                    assert_eq!(out, b"0123456789"[start + from..end]);
                    assert_eq!(slice.slice(from, slice.len() + 1).unwrap_err(), OutOfBounds);
                }
            }
        }
        let mut out = Vec::new();
        assert_eq!(gather.append_to(5, 6, &mut out), Err(OutOfBounds));
        assert_eq!(gather.append_to(usize::MAX, 2, &mut out), Err(OutOfBounds));
        assert!(out.is_empty());
    }
}
