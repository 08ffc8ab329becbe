//! The record of requests in flight (vhost-user protocol, "Inflight I/O tracking").
//!
//! The frontend keeps this memory while the device is replaced or has died. The next device finds
//! there which chains were taken and not given back, and in which order.
//!
//! A device may die between any two writes. So each change is written such that every point in
//! between can be told apart and leads to the same: a chain is given back once.
//!
//! What stands in this memory is the frontend's to change at any time, so it is checked as a ring
//! is.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use iobuf::GuestSlice;

use super::shared::Shared;
use super::{Broken, QUEUE_SIZE_MAX};

/// Where the memory for one queue begins: a multiple of this.
const ALIGN_BYTES: u64 = 64;
const VERSION: u16 = 1;

/// How the memory is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightLayout {
    /// Queues that are recorded.
    pub queues: u16,
    /// Descriptors of each, at most.
    pub queue_size: u16,
}

impl InflightLayout {
    /// Bytes for one queue.
    pub fn queue_bytes(&self, is_packed: bool) -> u64 {
        let (header, entry) = match is_packed {
            true => (packed::HEADER, packed::ENTRY),
            false => (split::HEADER, split::ENTRY),
        };
        (header as u64 + u64::from(self.queue_size) * entry as u64).next_multiple_of(ALIGN_BYTES)
    }

    /// Bytes for all queues.
    pub fn bytes(&self, is_packed: bool) -> u64 {
        self.queue_bytes(is_packed) * u64::from(self.queues)
    }
}

// Both layouts begin alike.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;

/// `QueueRegionSplit` and `DescStateSplit`.
mod split {
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    pub(super) const HEADER: usize = 16;

    pub(super) const ENTRY: usize = 16;
    /// One byte; the padding behind it is written with it.
    pub(super) const INFLIGHT: usize = 0;
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
}

/// `QueueRegionPacked` and `DescStatePacked`.
mod packed {
    pub(super) const HEADER: usize = 32;
    pub(super) const ENTRY: usize = 32;
}

/// The record of a split queue.
#[derive(Debug)]
pub(crate) struct SplitInflight {
    shared: Shared,
    counter: u64,
    /// Heads to be taken again, in order.
    resubmit: VecDeque<u16>,
    /// Heads given back and not yet published.
    batch: Vec<u16>,
    used_idx: u16,
}

impl SplitInflight {
    /// Take over the record of a ring of `size` descriptors whose used index is `used_idx`.
    pub(crate) fn new(slice: GuestSlice, size: u16, used_idx: u16) -> Result<Self, Broken> {
        let shared = Shared::new(slice);
        let room = (shared.len().saturating_sub(split::HEADER) / split::ENTRY) as u64;
        if u64::from(size) > room {
            return Err(Broken::Inflight);
        }
        let mut inflight = SplitInflight {
            shared,
            counter: 0,
            resubmit: VecDeque::with_capacity(usize::from(size)),
            batch: Vec::with_capacity(usize::from(size)),
            used_idx,
        };
        match inflight.shared.load_u16(VERSION_AT, Ordering::Acquire)? {
            0 => inflight.begin_record(room as u16)?,
            VERSION => inflight.recover(size)?,
            _ => return Err(Broken::Inflight),
        }
        Ok(inflight)
    }

    fn begin_record(&mut self, room: u16) -> Result<(), Broken> {
        let shared = &self.shared;
        shared.store_u64(FEATURES, 0, Ordering::Relaxed)?;
        shared.store_u16(DESC_NUM, room.min(QUEUE_SIZE_MAX), Ordering::Relaxed)?;
        shared.store_u16(split::LAST_BATCH_HEAD, 0, Ordering::Relaxed)?;
        shared.store_u16(split::USED_IDX, self.used_idx, Ordering::Relaxed)?;
        // "Zero value indicates an uninitialized buffer": the last to be written.
        shared.store_u16(VERSION_AT, VERSION, Ordering::Release)?;
        Ok(())
    }

    fn recover(&mut self, size: u16) -> Result<(), Broken> {
        let known = self.shared.load_u16(split::USED_IDX, Ordering::Relaxed)?;
        let batch = self.used_idx.wrapping_sub(known);
        if batch > size {
            // No batch is that long: the record tells of an earlier life of the ring, and of chains
            // that are the driver's again.
            for head in 0..size {
                self.set_inflight(head, false)?;
            }
        } else if batch > 0 {
            // It died after the driver could see the last batch and before all of it was noted.
            let mut head = self.shared.load_u16(split::LAST_BATCH_HEAD, Ordering::Relaxed)?;
            for _ in 0..batch {
                if head >= size {
                    return Err(Broken::Inflight);
                }
                self.set_inflight(head, false)?;
                head = self.shared.load_u16(at(head) + split::NEXT, Ordering::Relaxed)?;
            }
        }
        self.shared.store_u16(split::USED_IDX, self.used_idx, Ordering::Release)?;

        let mut heads = Vec::new();
        for head in 0..size {
            if self.shared.read::<1>(at(head) + split::INFLIGHT)? == [1] {
                let counter = self.shared.load_u64(at(head) + split::COUNTER, Ordering::Relaxed)?;
                heads.push((counter, head));
            }
        }
        heads.sort_unstable();
        if let Some((last, _)) = heads.last() {
            self.counter = last.wrapping_add(1);
        }
        self.resubmit.extend(heads.into_iter().map(|(_, head)| head));
        Ok(())
    }

    /// Chains to be taken again before any other.
    pub(crate) fn resubmit(&mut self) -> &mut VecDeque<u16> {
        &mut self.resubmit
    }

    /// A chain has been taken.
    #[inline]
    pub(crate) fn begin(&mut self, head: u16) -> Result<(), Broken> {
        self.shared.store_u64(at(head) + split::COUNTER, self.counter, Ordering::Relaxed)?;
        self.counter = self.counter.wrapping_add(1);
        self.set_inflight(head, true)
    }

    /// It was put back, as if never taken.
    pub(crate) fn cancel(&mut self, head: u16) -> Result<(), Broken> {
        self.set_inflight(head, false)
    }

    /// A chain is given back, by the next [`SplitInflight::end_batch`]. To be called before the used
    /// index covers it.
    #[inline]
    pub(crate) fn give_back(&mut self, head: u16) -> Result<(), Broken> {
        let last = self.shared.load_u16(split::LAST_BATCH_HEAD, Ordering::Relaxed)?;
        self.shared.store_u16(at(head) + split::NEXT, last, Ordering::Relaxed)?;
        self.shared.store_u16(split::LAST_BATCH_HEAD, head, Ordering::Release)?;
        self.batch.push(head);
        Ok(())
    }

    /// The driver sees all that was given back, up to `used_idx`.
    #[inline]
    pub(crate) fn end_batch(&mut self, used_idx: u16) -> Result<(), Broken> {
        for head in self.batch.drain(..) {
            self.shared.store_u16(at(head) + split::INFLIGHT, 0, Ordering::Release)?;
        }
        self.used_idx = used_idx;
        self.shared.store_u16(split::USED_IDX, used_idx, Ordering::Release)?;
        Ok(())
    }

    fn set_inflight(&mut self, head: u16, is_inflight: bool) -> Result<(), Broken> {
        let value = u16::from(is_inflight);
        self.shared.store_u16(at(head) + split::INFLIGHT, value, Ordering::Release)?;
        Ok(())
    }
}

/// Where the entry of a descriptor is.
#[inline]
fn at(head: u16) -> usize {
    split::HEADER + usize::from(head) * split::ENTRY
}
