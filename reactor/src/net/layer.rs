//! The record layer between a stream's user and its socket.

use std::fmt;
use std::ops::Range;

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
    /// Decrypted in place: this range of the wire bytes just given. Ranges ascend and do not overlap.
    InPlace(Range<usize>),
    /// Bytes of a record that was spread over several pieces of wire bytes; they are copied.
    Copied(&'a [u8]),
}

/// Bytes to be sent, scattered in memory.
pub struct Gather<'a> {
    _bytes: &'a (),
}

impl Gather<'_> {
    /// Bytes in total.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `dst.len()` bytes from `offset`; the range must lie inside.
    pub fn copy_to_slice(&self, offset: usize, dst: &mut [u8]) -> Result<(), iobuf::OutOfBounds> {
        let _ = (offset, dst);
        todo!()
    }
}

/// A record layer such as TLS: one per stream and direction pair, in place where possible.
pub trait Layer {
    /// Appends to `out` the records that carry `plain`. The bytes of `plain` are not needed afterwards.
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError>;

    /// Takes all of `wire`, keeps what is incomplete, and reports plaintext to `sink` in order.
    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError>;
}
