//! The record layer between a stream's user and its socket.

// UNSAFETY: payload to be sealed is guest or pool memory, which is copied out by address.
#![expect(unsafe_code)]

use std::fmt;
use std::ops::Range;

use iobuf::{OutOfBounds, Segment};

/// The peer's records are wrong, or the layer cannot go on. The stream fails with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerError(pub &'static str);

impl fmt::Display for LayerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for LayerError {}

/// Where plaintext came out of [`Layer::open`].
#[derive(Debug)]
pub enum Plain<'a> {
    /// Decrypted in place: this range of the wire bytes just given. Ranges ascend and do not
    /// overlap.
    InPlace(Range<usize>),
    /// Bytes of a record that was spread over several pieces of wire bytes; they are copied.
    Copied(&'a [u8]),
}

/// Bytes to be sent, scattered in memory that others (a guest) may write to at the same time.
pub struct Gather<'a> {
    /// Invariant: mapped and readable for `'a`.
    segments: &'a [Segment],
    len: usize,
}

impl<'a> Gather<'a> {
    /// # Safety
    ///
    /// All segments are mapped and readable for `'a`.
    pub(crate) unsafe fn new(segments: &'a [Segment]) -> Gather<'a> {
        Gather { segments, len: segments.iter().map(Segment::len).sum() }
    }

    /// Bytes in total.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `len` bytes from `offset` to `out`, whose new room is not filled before.
    pub fn append_to(
        &self,
        offset: usize,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OutOfBounds> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {}
            _ => return Err(OutOfBounds),
        }
        out.reserve(len);
        let (mut skip, mut left) = (offset, len);
        for segment in self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.len() {
                skip -= segment.len();
                continue;
            }
            let part = (segment.len() - skip).min(left);
            let from = segment.as_ptr().wrapping_add(skip);
            let room = &mut out.spare_capacity_mut()[..part];
            // SAFETY: `from` is inside a segment that is readable (invariant) and has `part` bytes
            // from there; `room` is a separate buffer of that length.
            unsafe { copy(from, room.as_mut_ptr().cast(), part) };
            // SAFETY: the first `part` bytes behind the length have just been written.
            unsafe { out.set_len(out.len() + part) };
            left -= part;
            skip = 0;
        }
        Ok(())
    }
}

impl fmt::Debug for Gather<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather").field("len", &self.len).finish_non_exhaustive()
    }
}

/// A record layer such as TLS: one per stream, for both directions.
///
/// The stream promises: `seal` gets the bytes in the order of the pushes, and its output is sent in
/// that order, all of it or none after a failure; `open` gets received bytes in order, in pieces
/// cut anywhere. After an error neither is called again, only `farewell` after one of `open`. `close` is
/// the last call, when the stream is shut down without an error.
pub trait Layer {
    /// Appends to `out` the records that carry `plain`, whose bytes are not needed afterwards.
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError>;

    /// Takes all of `wire`, keeps what is incomplete, and reports plaintext to `sink` in order.
    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError>;

    /// Appends to `out` what the peer is to be told after `open` has failed, such as a TLS alert. Called
    /// once at most, and nothing is called after it.
    fn farewell(&mut self, out: &mut Vec<u8>) {
        let _ = out;
    }

    /// Appends to `out` what the peer is to be told when this side ends in an orderly way, such as
    /// close_notify of TLS. It is sent if nothing else is being sent.
    fn close(&mut self, out: &mut Vec<u8>) {
        let _ = out;
    }

    /// Whether the peer has said inside the layer that nothing follows. The stream has then ended like
    /// one whose peer has closed its side.
    fn is_ended(&self) -> bool {
        false
    }
}

/// Copies memory that others may change meanwhile: not inlined, so that the optimiser can neither
/// repeat nor forward the access.
///
/// # Safety
///
/// `src` is readable and `dst` writable for `len` bytes, and they do not overlap.
#[inline(never)]
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller promises both ranges.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, len) }
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
            }
        }
        let mut out = Vec::new();
        assert_eq!(gather.append_to(5, 6, &mut out), Err(OutOfBounds));
        assert_eq!(gather.append_to(usize::MAX, 2, &mut out), Err(OutOfBounds));
        assert!(out.is_empty());
    }
}
