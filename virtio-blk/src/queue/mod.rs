//! Virtqueues: what a driver may put into one, and what makes one unusable.

use std::fmt;
use std::rc::Rc;

use iobuf::GuestView;

pub mod inflight;
pub mod packed;
pub mod ring;
pub mod shared;
pub mod split;

/// Largest queue size the device serves.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most descriptors followed in one chain, an indirect table included. A chain may not be longer
/// than its queue (Virtual I/O Device 1.2, section 2.7.5.3.1), but drivers with small queues do
/// fill longer indirect tables.
pub const CHAIN_MAX: usize = 1024;

/// Why a virtqueue cannot be served any more: the driver broke a rule and there is no status byte
/// to tell it so. In the specification's words the device needs a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// A ring is not where it was said to be.
    RingAddress,
    /// The available index moved by more than the size of the queue.
    AvailableIndex,
    /// A chain begins outside the descriptor table.
    Head,
    /// A descriptor's `next` is outside its table.
    Next,
    /// More descriptors than a table has: the chain bites its tail.
    Loop,
    /// An indirect descriptor, but the feature was not negotiated.
    IndirectNotNegotiated,
    /// An indirect descriptor that also has a next one, or stands in an indirect table.
    IndirectNested,
    /// An indirect table of no descriptors, or not of whole ones.
    IndirectLength,
    /// An indirect table outside guest memory.
    IndirectAddress,
    /// No device-writable byte for the status.
    NoStatus,
    /// The status byte is outside guest memory.
    StatusAddress,
    /// The record of requests in flight is not one for this ring.
    Inflight,
    /// The eventfd of the driver's notifications failed.
    Kick,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Broken::RingAddress => "a ring is not in guest memory or not aligned",
            Broken::AvailableIndex => "the available index moved by more than the queue size",
            Broken::Head => "a chain begins outside the descriptor table",
            Broken::Next => "a descriptor points outside its table",
            Broken::Loop => "a descriptor chain is longer than its table",
            Broken::IndirectNotNegotiated => "an indirect descriptor without the feature",
            Broken::IndirectNested => "an indirect descriptor in a chain or in an indirect table",
            Broken::IndirectLength => "an indirect table that is empty or not of whole descriptors",
            Broken::IndirectAddress => "an indirect table outside guest memory",
            Broken::NoStatus => "a request without a writable status byte",
            Broken::StatusAddress => "a status byte outside guest memory",
            Broken::Inflight => "the record of requests in flight does not fit the ring",
            Broken::Kick => "waiting for the driver's eventfd failed",
        })
    }
}

/// One buffer of a chain: `len` bytes of guest memory at `addr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Guest physical address, not yet checked.
    pub addr: u64,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// How a chain is given back: what the driver and the queue know it by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Token {
    /// The driver's name for it: of a split queue the index of the first descriptor, of a packed
    /// one the buffer ID.
    pub id: u16,
    /// Descriptors that it takes in a packed ring.
    pub descriptors: u16,
    /// Where it stands in a packed queue's record of requests in flight.
    pub entry: u16,
}

/// A descriptor chain, copied out of guest memory. One is recycled for all chains of a queue.
#[derive(Debug)]
pub struct Chain {
    /// What it is known by.
    pub token: Token,
    /// What the driver wrote for the device, in order.
    pub readable: Vec<Piece>,
    /// What the device shall write, in order.
    pub writable: Vec<Piece>,
    /// Whether all readable buffers came before all writable ones, as a driver must put them.
    pub is_ordered: bool,
}

impl Default for Chain {
    fn default() -> Chain {
        Chain {
            token: Token::default(),
            readable: Vec::with_capacity(CHAIN_MAX),
            writable: Vec::with_capacity(CHAIN_MAX),
            is_ordered: true,
        }
    }
}

impl Chain {
    /// An empty chain with room for the longest one.
    pub fn new() -> Chain {
        Chain::default()
    }

    fn restart(&mut self, id: u16) {
        self.token = Token { id, ..Token::default() };
        self.readable.clear();
        self.writable.clear();
        self.is_ordered = true;
    }

    #[inline]
    fn push(&mut self, piece: Piece, is_writable: bool) {
        if piece.len == 0 {
            return;
        }
        if is_writable {
            self.writable.push(piece);
        } else {
            self.is_ordered &= self.writable.is_empty();
            self.readable.push(piece);
        }
    }
}

/// Length of a descriptor of either kind.
pub(crate) const DESC_BYTES: usize = 16;

/// Visit the descriptors of an indirect table. `visit` gets an index, the number of descriptors and
/// the bytes of one, and tells which one is next, or that it was the last.
fn walk_table(
    view: &Rc<GuestView>,
    addr: u64,
    len: u32,
    mut visit: impl FnMut(usize, usize, [u8; DESC_BYTES]) -> Result<Option<usize>, Broken>,
) -> Result<(), Broken> {
    let len = len as usize;
    if len == 0 || !len.is_multiple_of(DESC_BYTES) {
        return Err(Broken::IndirectLength);
    }
    let count = len / DESC_BYTES;
    // In one piece nearly always; a table may lie across two regions.
    let table = view.slice(addr, len as u64).ok();
    let mut index = 0usize;
    for _ in 0..count.min(CHAIN_MAX) {
        let offset = index * DESC_BYTES;
        let bytes = match &table {
            Some(table) => table.read(offset)?,
            None => {
                let mut bytes = [0; DESC_BYTES];
                let addr = addr.checked_add(offset as u64);
                view.read(addr.ok_or(Broken::IndirectAddress)?, &mut bytes)
                    .map_err(|_| Broken::IndirectAddress)?;
                bytes
            }
        };
        match visit(index, count, bytes)? {
            None => return Ok(()),
            Some(next) => index = next,
        }
    }
    Err(Broken::Loop)
}

/// Bytes of all pieces.
pub fn bytes(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.len)).sum()
}
