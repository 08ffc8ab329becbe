//! The record layer between a stream's user and its socket.

use std::fmt;
use std::ops::Range;

use iobuf::{Gather, SgList};

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

/// What [`Layer::open_to`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Wire bytes that were taken, from the front.
    pub taken: usize,
    /// Plaintext bytes that are in place, all authentic.
    pub placed: usize,
}

/// A record layer such as TLS: one per stream, for both directions.
///
/// The stream promises: `seal` gets the bytes in the order of the pushes, and its output is sent in
/// that order, all of it or none after a failure; `open` and `open_to` get received bytes in order, in
/// pieces cut anywhere. After an error none of them is called again, only `farewell` after one of
/// `open` or `open_to`. `close` is the last call, when the stream is shut down without an error.
pub trait Layer {
    /// Appends to `out` the records that carry `plain`, whose bytes are not needed afterwards. The
    /// stream begins a record with each large payload, so that the other end can open it into place.
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError>;

    /// Takes all of `wire`, keeps what is incomplete, and reports plaintext to `sink` in order.
    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError>;

    /// Length of the first part of `wire` that gives plaintext by itself, such as one record: that
    /// much is given to the next `open`. All of it where there is no such part.
    fn first_len(&self, wire: &[u8]) -> usize {
        wire.len()
    }

    /// Opens records at the front of `wire` straight into up to `len` bytes of `to` from `offset`:
    /// those that certainly hold nothing but the plaintext that belongs there. What is left, if only
    /// for now, is for `open`.
    ///
    /// Bytes that it writes but does not count, and all of them after an error, are of no use: they
    /// may be anybody's.
    fn open_to(
        &mut self,
        wire: &mut [u8],
        to: &SgList,
        offset: usize,
        len: usize,
    ) -> Result<Placed, LayerError> {
        let _ = (wire, to, offset, len);
        Ok(Placed::default())
    }

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
