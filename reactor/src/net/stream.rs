//! The stream: coalescing send queue, receive from the core's buffers.

use std::io;
use std::ops::{Deref, DerefMut};

use iobuf::SgList;

use crate::core::Local;
use crate::error::{Errno, Full};
use crate::fd::Socket;
use crate::net::Layer;

/// Longest header that [`Stream::push`] takes, in bytes.
pub const HEAD_BYTES_MAX: usize = 512;

/// Sizes of one stream. Build it with `..StreamConfig::default()`.
pub struct StreamConfig {
    /// PDUs that may wait or be in flight at once.
    pub tx_entries_max: usize,
    /// Bytes that one `sendmsg` takes, unless a single PDU is longer.
    pub tx_batch_bytes: usize,
    /// Record layer; `None` sends and receives as is.
    pub layer: Option<Box<dyn Layer>>,
}

impl Default for StreamConfig {
    fn default() -> Self {
        StreamConfig { tx_entries_max: 256, tx_batch_bytes: 128 << 10, layer: None }
    }
}

/// What [`Stream::recv`] found.
#[derive(Debug)]
pub enum Rx {
    /// Nothing yet.
    Empty,
    /// Received bytes.
    Data(RxChunk),
    /// The peer closed its side; nothing more will come.
    Eof,
    /// The connection failed.
    Failed(Errno),
}

/// Received bytes. Their buffer goes back to the core when the chunk is dropped, so hold it only as long as needed.
#[derive(Debug)]
pub struct RxChunk {}

impl RxChunk {
    /// Drops the first `len` bytes (all, if there are fewer): they were consumed.
    pub fn advance(&mut self, len: usize) {
        let _ = len;
        todo!()
    }
}

impl Deref for RxChunk {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        todo!()
    }
}

impl DerefMut for RxChunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        todo!()
    }
}

/// A connected stream socket with a send queue.
pub struct Stream {}

impl Stream {
    /// Takes over a connected socket and starts to receive.
    pub fn new(local: &Local, socket: Socket, config: StreamConfig) -> io::Result<Stream> {
        let _ = (local, socket, config);
        todo!()
    }

    /// The next received bytes.
    pub fn recv(&mut self) -> Rx {
        todo!()
    }

    /// Stops receiving (back-pressure). What has arrived already still comes out of [`Stream::recv`].
    pub fn pause(&mut self) {
        todo!()
    }

    /// Receives again.
    pub fn resume(&mut self) {
        todo!()
    }

    /// Queues one PDU: `head` (at most [`HEAD_BYTES_MAX`]) and `tail` are copied, the payload (`len` bytes of a list from
    /// `offset`) is sent from where it is. `token` comes back from [`Stream::sent`] when its memory is no longer needed.
    ///
    /// # Panics
    ///
    /// If the head is too long or the payload range is not inside the list: a mistake of the caller, never of a peer.
    pub fn push(
        &mut self,
        head: &[u8],
        payload: Option<(&SgList, usize, usize)>,
        tail: Option<[u8; 4]>,
        token: Option<u32>,
    ) -> Result<(), Full> {
        let _ = (head, payload, tail, token);
        todo!()
    }

    /// PDUs that can still be pushed.
    pub fn room(&self) -> usize {
        todo!()
    }

    /// Starts a send if none is in flight. What is pushed while one is in flight goes with the next.
    pub fn flush(&mut self) {
        todo!()
    }

    /// Acts on recorded completions. `true` if there were any.
    pub fn poll(&mut self) -> bool {
        todo!()
    }

    /// The next token whose PDU is sent (or will never be, after a failure or shutdown), in the order of the pushes.
    pub fn sent(&mut self) -> Option<u32> {
        todo!()
    }

    /// Why the connection failed, if it did.
    pub fn failed(&self) -> Option<Errno> {
        todo!()
    }

    /// Stops sending and receiving. Tokens still come back through [`Stream::sent`] as the kernel lets go.
    pub fn shutdown(&mut self) {
        todo!()
    }

    /// Nothing is in flight: no byte of any payload will be touched after this.
    pub fn is_quiet(&self) -> bool {
        todo!()
    }

    /// The address of the peer, as text.
    pub fn peer(&self) -> String {
        todo!()
    }
}
