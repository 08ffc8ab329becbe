//! Segments, holds and scatter-gather lists.

// UNSAFETY: a list names memory that the kernel or a guest may access at the same time, which
// references cannot express.
#![expect(unsafe_code)]

use std::fmt;
use std::mem::MaybeUninit;
use std::rc::Rc;
use std::slice;

use crate::raw;

/// One contiguous piece of memory, laid out as `struct iovec`.
///
/// A segment promises nothing by itself: only one inside an [`SgList`] is known to be mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    base: *mut u8,
    len: usize,
}

const _: () = assert!(size_of::<Segment>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<Segment>() == align_of::<libc::iovec>());
const _: () =
    assert!(std::mem::offset_of!(Segment, base) == std::mem::offset_of!(libc::iovec, iov_base));
const _: () =
    assert!(std::mem::offset_of!(Segment, len) == std::mem::offset_of!(libc::iovec, iov_len));

impl Segment {
    /// Names `len` bytes at `base`.
    pub fn new(base: *mut u8, len: usize) -> Segment {
        Segment { base, len }
    }

    /// Bytes in the segment.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the segment has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// The first `at` bytes (all, if there are fewer), and the rest.
    pub fn split(&self, at: usize) -> (Segment, Segment) {
        let at = at.min(self.len);
        let rest = Segment { base: self.base.wrapping_add(at), len: self.len - at };
        (Segment { base: self.base, len: at }, rest)
    }
}

/// Keeps the memory behind segments mapped, and takes back what lists owned.
///
/// A clone of the `Rc` keeps memory *mapped*. To keep it *out of other hands* as well, while the
/// kernel still works on it, pair [`Hold::retain`] with [`Hold::release`] on the same segments.
pub trait Hold {
    /// One more user of these segments: their memory is given to nobody else before the matching
    /// `release`.
    fn retain(&self, segments: &[Segment]);
    /// One user less. Called once by the list that owned the segments, and once per `retain`.
    fn release(&self, segments: &[Segment]);
    /// Whether the memory is reached through lists of this thread only, and by the kernel for the
    /// time of an operation on them: no guest and no other thread has it.
    fn is_private(&self) -> bool {
        false
    }
}

/// An offset and length beyond the end of a list or slice, or an address not aligned for the
/// access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBounds;

impl fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("access out of bounds")
    }
}

impl std::error::Error for OutOfBounds {}

/// A scatter-gather list: segments in order, and the hold that keeps them mapped.
///
/// The list keeps its capacity when cleared, so that a recycled one allocates nothing.
///
/// ```
/// let pool = iobuf::Pool::new(1 << 20)?;
/// let mut sg = iobuf::SgList::default();
/// pool.alloc(20_000, &mut sg)?;
/// sg.copy_from_slice(16_000, b"penstock")?;
/// let mut back = [0; 8];
/// sg.copy_to_slice(16_000, &mut back)?;
/// assert_eq!(&back, b"penstock");
/// sg.clear(); // the memory is back in the pool
/// assert_eq!(pool.available(), pool.capacity());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default)]
pub struct SgList {
    /// Invariant, upheld by whoever calls `append`: each segment is mapped, readable and writable
    /// while `hold` lives.
    segments: Vec<Segment>,
    len_bytes: usize,
    hold: Option<Rc<dyn Hold>>,
}

impl SgList {
    /// An empty list with room for `segments_max` segments.
    pub fn with_capacity(segments_max: usize) -> Self {
        SgList { segments: Vec::with_capacity(segments_max), len_bytes: 0, hold: None }
    }

    /// Bytes in all segments.
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether the list has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The segments in order; none is empty.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The hold behind the segments; `None` when the list is empty.
    pub fn hold(&self) -> Option<Rc<dyn Hold>> {
        self.hold.clone()
    }

    /// Empties the list. Owned or shared memory goes back to its hold; capacity stays.
    pub fn clear(&mut self) {
        self.len_bytes = 0;
        if let Some(hold) = self.hold.take() {
            hold.release(&self.segments);
        }
        self.segments.clear();
    }

    /// Adds a segment that this list now owns one use of. Empty segments are dropped.
    ///
    /// # Safety
    ///
    /// The segment is mapped, readable and writable as long as `hold` lives, and the list may call
    /// `hold.release` with it (or with a shorter one of the same base) once.
    ///
    /// # Panics
    ///
    /// If the list already has segments of another hold: that is a mistake of the caller, not of
    /// its peer.
    pub unsafe fn append<H: Hold + 'static>(&mut self, hold: &Rc<H>, segment: Segment) {
        if segment.len == 0 {
            return;
        }
        match &self.hold {
            None => self.hold = Some(Rc::clone(hold) as Rc<dyn Hold>),
            Some(own) => {
                assert!(is_same(own, Rc::as_ptr(hold).cast()), "segments of two holds in one list")
            }
        }
        self.segments.push(segment);
        self.len_bytes += segment.len;
    }

    /// Whether the segments are held by `hold`.
    pub(crate) fn is_held_by<H>(&self, hold: &Rc<H>) -> bool {
        self.hold.as_ref().is_some_and(|own| is_same(own, Rc::as_ptr(hold).cast()))
    }

    /// Makes the last segment longer by `len` bytes, when the memory behind it goes on.
    ///
    /// # Safety
    ///
    /// As for `append`: the longer segment is mapped as long as the list's hold lives.
    pub(crate) unsafe fn grow_last(&mut self, len: usize) {
        if let Some(last) = self.segments.last_mut() {
            last.len += len;
            self.len_bytes += len;
        }
    }

    /// Adds `len` bytes of `src` from `offset`, sharing the memory: it stays in use until both
    /// lists let go.
    ///
    /// # Panics
    ///
    /// If this list already has segments of another hold.
    pub fn append_range(
        &mut self,
        src: &SgList,
        offset: usize,
        len: usize,
    ) -> Result<(), OutOfBounds> {
        src.check(offset, len)?;
        let Some(hold) = &src.hold else { return Ok(()) };
        if len == 0 {
            return Ok(());
        }
        match &self.hold {
            None => self.hold = Some(Rc::clone(hold)),
            Some(own) => {
                assert!(is_same(own, Rc::as_ptr(hold).cast()), "segments of two holds in one list")
            }
        }
        let first = self.segments.len();
        self.segments.extend(src.range(offset, len));
        hold.retain(&self.segments[first..]);
        self.len_bytes += len;
        Ok(())
    }

    /// Shortens the list to `len` bytes; does nothing if it is not longer. Segments left without
    /// bytes go back to the hold.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len_bytes {
            return;
        }
        if len == 0 {
            return self.clear();
        }
        let mut left = len;
        let mut keep = 0;
        for segment in &mut self.segments {
            segment.len = segment.len.min(left);
            left -= segment.len;
            keep += 1;
            if left == 0 {
                break;
            }
        }
        if let Some(hold) = &self.hold
            && keep < self.segments.len()
        {
            hold.release(&self.segments[keep..]);
        }
        self.segments.truncate(keep);
        self.len_bytes = len;
    }

    /// Copies `src` into the list at `offset`.
    pub fn copy_from_slice(&self, offset: usize, src: &[u8]) -> Result<(), OutOfBounds> {
        self.check(offset, src.len())?;
        let mut at = 0;
        for segment in self.range(offset, src.len()) {
            let part = &src[at..at + segment.len];
            // SAFETY: the segment is mapped (list invariant) and as long as `part`; no `&mut`
            // overlaps it, as list memory is never lent out by reference.
            unsafe { raw::copy(part.as_ptr(), segment.base, part.len()) };
            at += segment.len;
        }
        Ok(())
    }

    /// Copies `dst.len()` bytes at `offset` out of the list.
    pub fn copy_to_slice(&self, offset: usize, dst: &mut [u8]) -> Result<(), OutOfBounds> {
        self.check(offset, dst.len())?;
        let mut at = 0;
        for segment in self.range(offset, dst.len()) {
            let part = &mut dst[at..at + segment.len];
            // SAFETY: the segment is mapped (list invariant) and as long as `part`.
            unsafe { raw::copy(segment.base, part.as_mut_ptr(), part.len()) };
            at += segment.len;
        }
        Ok(())
    }

    /// Sets `len` bytes at `offset` to `byte`.
    pub fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<(), OutOfBounds> {
        self.check(offset, len)?;
        for segment in self.range(offset, len) {
            // SAFETY: the segment is mapped (list invariant).
            unsafe { raw::fill(segment.base, byte, segment.len) };
        }
        Ok(())
    }

    /// Copies `len` bytes at `offset` to `dst` at `dst_offset`. Where the memory of both overlaps
    /// (a guest may choose so), the result is some mixture of both.
    pub fn copy_to(
        &self,
        offset: usize,
        dst: &SgList,
        dst_offset: usize,
        len: usize,
    ) -> Result<(), OutOfBounds> {
        self.check(offset, len)?;
        dst.check(dst_offset, len)?;
        let mut targets = dst.range(dst_offset, len);
        let mut target = Segment { base: std::ptr::null_mut(), len: 0 };
        for mut source in self.range(offset, len) {
            while source.len > 0 {
                if target.len == 0 {
                    match targets.next() {
                        Some(next) => target = next,
                        None => return Err(OutOfBounds), // both ranges have `len` bytes
                    }
                }
                let part = source.len.min(target.len);
                // SAFETY: both segments are mapped (list invariant) and at least `part` long.
                unsafe { raw::copy(source.base, target.base, part) };
                source = Segment { base: source.base.wrapping_add(part), len: source.len - part };
                target = Segment { base: target.base.wrapping_add(part), len: target.len - part };
            }
        }
        Ok(())
    }

    /// Whether `len` bytes at `offset` equal those of `other` at `other_offset`, neither of which
    /// has to hold still.
    pub fn is_equal(
        &self,
        offset: usize,
        other: &SgList,
        other_offset: usize,
        len: usize,
    ) -> Result<bool, OutOfBounds> {
        let (mut left, mut right) = ([0; BOUNCE_BYTES], [0; BOUNCE_BYTES]);
        let mut done = 0;
        while done < len {
            let part = BOUNCE_BYTES.min(len - done);
            self.copy_to_slice(offset + done, &mut left[..part])?;
            other.copy_to_slice(other_offset + done, &mut right[..part])?;
            if left[..part] != right[..part] {
                return Ok(false);
            }
            done += part;
        }
        Ok(true)
    }

    /// The pieces of `len` bytes at `offset`, cut off at the end of the list. No piece is empty.
    pub fn range(&self, offset: usize, len: usize) -> Range<'_> {
        Range::new(&self.segments, offset, len)
    }

    /// Shows `len` bytes at `offset` to `f`, piece by piece, each copied to the stack first: safe
    /// to look at although a guest or the kernel may change the original.
    pub fn for_each_chunk(
        &self,
        offset: usize,
        len: usize,
        f: &mut dyn FnMut(&[u8]),
    ) -> Result<(), OutOfBounds> {
        self.check(offset, len)?;
        let mut bounce = Bounce([MaybeUninit::uninit(); BOUNCE_BYTES]);
        let mut filled = 0;
        for mut segment in self.range(offset, len) {
            while segment.len > 0 {
                let part = segment.len.min(BOUNCE_BYTES - filled);
                let room = &mut bounce.0[filled..filled + part];
                // SAFETY: the segment is mapped (list invariant) and at least `part` long.
                unsafe { raw::copy(segment.base, room.as_mut_ptr().cast(), part) };
                segment =
                    Segment { base: segment.base.wrapping_add(part), len: segment.len - part };
                filled += part;
                if filled == BOUNCE_BYTES {
                    // SAFETY: all of it has been written.
                    f(unsafe { bounce.first(filled) });
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            // SAFETY: so much of it has been written.
            f(unsafe { bounce.first(filled) });
        }
        Ok(())
    }

    /// As [`SgList::for_each_chunk`], but without a copy where the memory is private: to go once
    /// over data at rest, for a digest. `f` can be sent to another thread, and so has no list by
    /// which it could change what it is shown.
    ///
    /// Data at rest: no operation under way writes to the list's memory.
    pub fn for_each_piece(
        &self,
        offset: usize,
        len: usize,
        f: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<(), OutOfBounds> {
        if !self.hold.as_ref().is_some_and(|hold| hold.is_private()) {
            return self.for_each_chunk(offset, len, f);
        }
        self.check(offset, len)?;
        for segment in self.range(offset, len) {
            // SAFETY: the segment is mapped (list invariant). It is private, and neither `f`, which
            // has no list, nor the kernel, as nothing is under way, writes to it meanwhile.
            f(unsafe { slice::from_raw_parts(segment.base, segment.len) });
        }
        Ok(())
    }

    /// Whether every segment starts and ends at a multiple of `align` bytes (a power of two), as
    /// direct I/O wants it.
    pub fn is_aligned(&self, align: usize) -> bool {
        let mask = align.wrapping_sub(1);
        self.segments.iter().all(|s| (s.base.addr() | s.len) & mask == 0)
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), OutOfBounds> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len_bytes => Ok(()),
            _ => Err(OutOfBounds),
        }
    }
}

/// Bytes shown at a time by `for_each_chunk`: one page, so that the copy stays in the first-level
/// cache.
const BOUNCE_BYTES: usize = 4096;

/// Their memory, which is not filled before: that would be as dear as the copy.
struct Bounce([MaybeUninit<u8>; BOUNCE_BYTES]);

impl Bounce {
    /// # Safety
    ///
    /// The first `len` bytes have been written.
    unsafe fn first(&self, len: usize) -> &[u8] {
        let bytes = &self.0[..len];
        // SAFETY: all of these bytes are initialised (the caller's promise).
        unsafe { slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
    }
}

fn is_same(own: &Rc<dyn Hold>, other: *const ()) -> bool {
    std::ptr::addr_eq(Rc::as_ptr(own), other)
}

impl Drop for SgList {
    fn drop(&mut self) {
        self.clear();
    }
}

impl fmt::Debug for SgList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SgList")
            .field("len_bytes", &self.len_bytes)
            .field("segments", &self.segments.len())
            .finish()
    }
}

/// Iterator of [`SgList::range`] and [`Gather::parts`](crate::Gather::parts).
#[derive(Clone, Debug)]
pub struct Range<'a> {
    segments: slice::Iter<'a, Segment>,
    skip: usize,
    left: usize,
}

impl<'a> Range<'a> {
    /// The pieces of `len` bytes behind the first `skip` of `segments`.
    pub(crate) fn new(segments: &'a [Segment], skip: usize, len: usize) -> Range<'a> {
        Range { segments: segments.iter(), skip, left: len }
    }
}

impl Iterator for Range<'_> {
    type Item = Segment;

    #[inline]
    fn next(&mut self) -> Option<Segment> {
        while self.left > 0 {
            let segment = self.segments.next()?;
            if self.skip >= segment.len {
                self.skip -= segment.len;
                continue;
            }
            let len = (segment.len - self.skip).min(self.left);
            let base = segment.base.wrapping_add(self.skip);
            self.skip = 0;
            self.left -= len;
            return Some(Segment { base, len });
        }
        None
    }
}

#[cfg(test)]
mod tests;
