//! Queues in guest memory: where entries are.
//!
//! A queue is a few pieces of guest memory of the same size, usually one. The guest says where when
//! it creates the queue; the addresses are kept, because the memory behind them may be mapped
//! anew at any time.

use std::rc::Rc;

use iobuf::{GuestSlice, GuestView};
use nvme::spec::Status;
use nvme::xfer::{Copying, MEMORY_PAGE_BYTES, walk_queue};

/// Where a queue is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest addresses of its pages; of the whole queue if `is_contiguous`.
    addresses: Vec<u64>,
    is_contiguous: bool,
    bytes: u64,
}

impl Place {
    /// A queue of `entries` of `entry_bytes` at `address`, or in the pages of the PRP list there.
    ///
    /// # Errors
    /// Data Transfer Error if the list is not in memory, PRP Offset Invalid if it is wrong,
    /// Invalid Field in Command if the queue wraps around the address space.
    pub fn new(
        view: &GuestView,
        address: u64,
        is_contiguous: bool,
        entries: u32,
        entry_bytes: u32,
    ) -> Result<Place, Status> {
        let bytes = u64::from(entries) * u64::from(entry_bytes);
        if is_contiguous {
            if address.checked_add(bytes).is_none() {
                return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
            }
            return Ok(Place { addresses: vec![address], is_contiguous, bytes });
        }
        let mut addresses = Vec::new();
        walk_queue(
            address,
            bytes,
            &mut Copying {
                read: |addr, dst: &mut [u8]| {
                    view.read(addr, dst).map_err(|_| Status::DATA_TRANSFER_ERROR.dnr())
                },
                piece: |addr, _| {
                    addresses.push(addr);
                    Ok(())
                },
            },
        )?;
        Ok(Place { addresses, is_contiguous, bytes })
    }

    /// The memory there; `None` if some of it is none.
    pub fn bind(&self, view: &Rc<GuestView>, entry_bytes: u32) -> Option<Ring> {
        let entry_shift = entry_bytes.trailing_zeros();
        if let [address] = self.addresses[..]
            && let Ok(whole) = view.slice(address, self.bytes)
        {
            return Some(Ring { pieces: vec![whole], piece_shift: u32::BITS - 1, entry_shift });
        }
        // Page by page: that is how the guest has put it, or it crosses regions.
        let pages = self.bytes.div_ceil(MEMORY_PAGE_BYTES);
        let piece = |page: u64| {
            let address = if self.is_contiguous {
                self.addresses[0] + page * MEMORY_PAGE_BYTES
            } else {
                *self.addresses.get(page as usize)?
            };
            let len = (self.bytes - page * MEMORY_PAGE_BYTES).min(MEMORY_PAGE_BYTES);
            view.slice(address, len).ok()
        };
        Some(Ring {
            pieces: (0..pages).map(piece).collect::<Option<_>>()?,
            piece_shift: MEMORY_PAGE_BYTES.trailing_zeros() - entry_shift,
            entry_shift,
        })
    }

    /// Guest address of an entry.
    pub fn address(&self, index: u32, entry_bytes: u32) -> u64 {
        let offset = u64::from(index) * u64::from(entry_bytes);
        if self.is_contiguous {
            return self.addresses[0] + offset;
        }
        let page = (offset / MEMORY_PAGE_BYTES) as usize;
        self.addresses.get(page).map_or(0, |page| page + offset % MEMORY_PAGE_BYTES)
    }
}

/// A queue's memory.
#[derive(Debug)]
pub struct Ring {
    pieces: Vec<GuestSlice>,
    /// Entries of a piece, as a power of two.
    piece_shift: u32,
    entry_shift: u32,
}

impl Ring {
    /// Piece and offset of an entry.
    #[inline]
    pub fn entry(&self, index: u32) -> Option<(&GuestSlice, usize)> {
        let piece = self.pieces.get((index >> self.piece_shift) as usize)?;
        let index = index & ((1 << self.piece_shift) - 1);
        Some((piece, (index as usize) << self.entry_shift))
    }
}
