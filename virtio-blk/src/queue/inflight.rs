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

use super::packed::{Desc, Position};
use super::shared::Shared;
use super::{Broken, QUEUE_SIZE_MAX, Token};

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
    /// Bytes that are used for one queue.
    pub fn record_bytes(&self, is_packed: bool) -> u64 {
        let (header, entry) = match is_packed {
            true => (packed::HEADER, packed::ENTRY),
            false => (split::HEADER, split::ENTRY),
        };
        header as u64 + u64::from(self.queue_size) * entry as u64
    }

    /// Bytes from one queue to the next.
    pub fn queue_bytes(&self, is_packed: bool) -> u64 {
        self.record_bytes(is_packed).next_multiple_of(ALIGN_BYTES)
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
    pub(super) const FREE_HEAD: usize = 12;
    pub(super) const OLD_FREE_HEAD: usize = 14;
    /// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter` and two bytes of
    /// padding: one word, so that an index never goes with the other lap's counter.
    pub(super) const USED: usize = 16;
    pub(super) const HEADER: usize = 32;

    pub(super) const ENTRY: usize = 32;
    /// One byte; the padding behind it is written with it.
    pub(super) const INFLIGHT: usize = 0;
    pub(super) const NEXT: usize = 2;
    pub(super) const LAST: usize = 4;
    pub(super) const NUM: usize = 6;
    pub(super) const COUNTER: usize = 8;
    /// `id`, `flags`, `len` and `addr`.
    pub(super) const DESC: usize = 16;
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
    /// Nobody wrote to it before.
    is_new: bool,
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
            is_new: false,
        };
        match inflight.shared.load_u16(VERSION_AT, Ordering::Acquire)? {
            0 => inflight.begin_record(room as u16)?,
            VERSION => inflight.recover(size)?,
            _ => return Err(Broken::Inflight),
        }
        Ok(inflight)
    }

    fn begin_record(&mut self, room: u16) -> Result<(), Broken> {
        self.is_new = true;
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

    /// Whether it tells of nothing before, also not of what may have been in flight.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
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

/// The record of a packed queue: copies of all descriptors that were taken, as the ring's are
/// written over, chained in a free list or in the chain that they belong to.
#[derive(Debug)]
pub(crate) struct PackedInflight {
    shared: Shared,
    /// Entries.
    room: u16,
    counter: u64,
    /// Chains to be taken again, in order: first entry and number of descriptors, as they were when
    /// the record was judged.
    resubmit: VecDeque<(u16, u16)>,
    /// Entries of chains given back and not yet published.
    batch: Vec<u16>,
    free_head: u16,
    used: Position,
    /// Nobody wrote to it before.
    is_new: bool,
    /// Descriptors of all chains in flight, when the record was taken over.
    descriptors: u16,
    /// First entry of the chain that is being taken.
    head: u16,
}

impl PackedInflight {
    /// Take over the record of a ring of `size` descriptors. If there is none yet, the ring goes on
    /// at `start`. `is_used` tells whether the driver can see a used descriptor somewhere.
    pub(crate) fn new(
        slice: GuestSlice,
        size: u16,
        start: Position,
        is_used: impl FnOnce(Position) -> Result<bool, Broken>,
    ) -> Result<Self, Broken> {
        let shared = Shared::new(slice);
        let room = shared.len().saturating_sub(packed::HEADER) / packed::ENTRY;
        let room = u16::try_from(room).unwrap_or(u16::MAX).min(QUEUE_SIZE_MAX);
        if size > room {
            return Err(Broken::Inflight);
        }
        let mut inflight = PackedInflight {
            shared,
            room,
            counter: 0,
            resubmit: VecDeque::with_capacity(usize::from(size)),
            batch: Vec::with_capacity(usize::from(size)),
            free_head: 0,
            used: start,
            is_new: false,
            descriptors: 0,
            head: 0,
        };
        match inflight.shared.load_u16(VERSION_AT, Ordering::Acquire)? {
            0 => inflight.begin_record()?,
            VERSION => inflight.recover(size, is_used)?,
            _ => return Err(Broken::Inflight),
        }
        Ok(inflight)
    }

    fn begin_record(&mut self) -> Result<(), Broken> {
        self.is_new = true;
        let shared = &self.shared;
        shared.store_u64(FEATURES, 0, Ordering::Relaxed)?;
        for entry in 0..self.room {
            let at = entry_at(entry);
            shared.store_u16(at + packed::INFLIGHT, 0, Ordering::Relaxed)?;
            shared.store_u16(at + packed::NEXT, entry + 1, Ordering::Relaxed)?;
        }
        shared.store_u16(DESC_NUM, self.room, Ordering::Relaxed)?;
        shared.store_u16(packed::FREE_HEAD, 0, Ordering::Relaxed)?;
        shared.store_u16(packed::OLD_FREE_HEAD, 0, Ordering::Relaxed)?;
        shared.store_u64(packed::USED, used_word(self.used, self.used), Ordering::Relaxed)?;
        shared.store_u16(VERSION_AT, VERSION, Ordering::Release)?;
        Ok(())
    }

    fn recover(
        &mut self,
        size: u16,
        is_used: impl FnOnce(Position) -> Result<bool, Broken>,
    ) -> Result<(), Broken> {
        let shared = &self.shared;
        let free_head = shared.load_u16(packed::FREE_HEAD, Ordering::Relaxed)?;
        let old_free_head = shared.load_u16(packed::OLD_FREE_HEAD, Ordering::Relaxed)?;
        let (used, old_used) = from_used_word(shared.load_u64(packed::USED, Ordering::Relaxed)?);
        if used.index >= size || old_used.index >= size {
            return Err(Broken::Inflight);
        }
        // It died while a batch was given back: what counts is whether the driver can see it.
        // Everything else that was begun is taken back.
        let is_done = used != old_used && is_used(old_used)?;
        (self.used, self.free_head) =
            if is_done { (used, free_head) } else { (old_used, old_free_head) };
        shared.store_u16(packed::FREE_HEAD, self.free_head, Ordering::Relaxed)?;
        shared.store_u16(packed::OLD_FREE_HEAD, self.free_head, Ordering::Release)?;
        shared.store_u64(packed::USED, used_word(self.used, self.used), Ordering::Release)?;

        let mut is_known = vec![false; usize::from(self.room)];
        let mut visit = |entry: u16| {
            let is_known = is_known.get_mut(usize::from(entry)).ok_or(Broken::Inflight)?;
            match std::mem::replace(is_known, true) {
                true => Err(Broken::Inflight),
                false => Ok(()),
            }
        };
        let mut entry = self.free_head;
        while entry < self.room {
            visit(entry)?;
            self.set_inflight(entry, false)?;
            entry = self.shared.load_u16(entry_at(entry) + packed::NEXT, Ordering::Relaxed)?;
        }
        let mut chains = Vec::new();
        for entry in 0..self.room {
            let at = entry_at(entry);
            if self.shared.read::<1>(at + packed::INFLIGHT)? != [1] {
                continue;
            }
            let count = self.chain_len(entry)?;
            let mut part = entry;
            for _ in 0..count {
                visit(part)?;
                part = self.shared.load_u16(entry_at(part) + packed::NEXT, Ordering::Relaxed)?;
            }
            self.descriptors += count;
            let counter = self.shared.load_u64(at + packed::COUNTER, Ordering::Relaxed)?;
            chains.push((counter, entry, count));
        }
        if self.descriptors > size {
            return Err(Broken::Inflight);
        }
        chains.sort_unstable();
        if let Some((last, ..)) = chains.last() {
            self.counter = last.wrapping_add(1);
        }
        self.resubmit.extend(chains.into_iter().map(|(_, entry, count)| (entry, count)));
        Ok(())
    }

    /// Whether it tells of nothing before, also not of what may have been in flight.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }

    /// Where the next used descriptor goes.
    pub(crate) fn used(&self) -> Position {
        self.used
    }

    /// Descriptors of all chains that were in flight when the record was taken over.
    pub(crate) fn descriptors(&self) -> u16 {
        self.descriptors
    }

    pub(crate) fn has_resubmits(&self) -> bool {
        !self.resubmit.is_empty()
    }

    /// A chain to be taken again before any other: first entry and number of descriptors.
    pub(crate) fn next_resubmit(&mut self) -> Option<(u16, u16)> {
        self.resubmit.pop_front()
    }

    /// It could not be taken now.
    pub(crate) fn resubmit_again(&mut self, token: Token) {
        self.resubmit.push_front((token.entry, token.descriptors));
    }

    /// Descriptors of a chain.
    fn chain_len(&self, entry: u16) -> Result<u16, Broken> {
        let count = self.shared.load_u16(entry_at(entry) + packed::NUM, Ordering::Relaxed)?;
        match (1..=self.room).contains(&count) {
            true => Ok(count),
            false => Err(Broken::Inflight),
        }
    }

    /// A descriptor of a chain, and where the next one is.
    pub(crate) fn descriptor(&self, entry: u16) -> Result<(Desc, u16), Broken> {
        if entry >= self.room {
            return Err(Broken::Inflight);
        }
        let word = u128::from_le_bytes(self.shared.read(entry_at(entry) + packed::DESC)?);
        let desc = Desc {
            id: word as u16,
            flags: (word >> 16) as u16,
            len: (word >> 32) as u32,
            addr: (word >> 64) as u64,
        };
        let next = self.shared.load_u16(entry_at(entry) + packed::NEXT, Ordering::Relaxed)?;
        Ok((desc, next))
    }

    /// A descriptor of a chain is being taken; its entry is the result.
    pub(crate) fn take(
        &mut self,
        desc: &Desc,
        is_first: bool,
        is_last: bool,
    ) -> Result<u16, Broken> {
        let entry = self.free_head;
        if entry >= self.room {
            return Err(Broken::Inflight);
        }
        let (shared, at) = (&self.shared, entry_at(entry));
        if is_first {
            self.head = entry;
            shared.store_u16(at + packed::NUM, 0, Ordering::Relaxed)?;
            shared.store_u64(at + packed::COUNTER, self.counter, Ordering::Relaxed)?;
            self.counter = self.counter.wrapping_add(1);
            shared.store_u16(at + packed::INFLIGHT, 1, Ordering::Release)?;
        }
        let head = entry_at(self.head);
        if is_last {
            shared.store_u16(head + packed::LAST, entry, Ordering::Relaxed)?;
        }
        let count = shared.load_u16(head + packed::NUM, Ordering::Relaxed)?;
        shared.store_u16(head + packed::NUM, count.wrapping_add(1), Ordering::Relaxed)?;
        let mut word = u128::from(desc.id) | u128::from(desc.flags) << 16;
        word |= u128::from(desc.len) << 32 | u128::from(desc.addr) << 64;
        shared.write(at + packed::DESC, &word.to_le_bytes())?;
        self.free_head = shared.load_u16(at + packed::NEXT, Ordering::Relaxed)?;
        shared.store_u16(packed::FREE_HEAD, self.free_head, Ordering::Release)?;
        if is_last {
            // From here on the chain counts.
            shared.store_u16(packed::OLD_FREE_HEAD, self.free_head, Ordering::Release)?;
        }
        Ok(entry)
    }

    /// A chain was put back, as if never taken. It was the last one that was taken, so what follows
    /// it in the list of entries is what is free.
    pub(crate) fn cancel(&mut self, token: Token) -> Result<(), Broken> {
        self.free_head = token.entry;
        self.shared.store_u16(packed::OLD_FREE_HEAD, token.entry, Ordering::Release)?;
        self.shared.store_u16(packed::FREE_HEAD, token.entry, Ordering::Release)?;
        self.set_inflight(token.entry, false)
    }

    /// A chain is given back with the next batch. It is written down only then: chains that are
    /// taken meanwhile need the list of free entries as it is.
    pub(crate) fn give_back(&mut self, entry: u16) {
        self.batch.push(entry);
    }

    /// The driver is about to see the batch, up to `used`.
    pub(crate) fn begin_batch_end(&mut self, used: Position) -> Result<(), Broken> {
        for entry in &self.batch {
            let last = self.shared.load_u16(entry_at(*entry) + packed::LAST, Ordering::Relaxed)?;
            if last >= self.room {
                return Err(Broken::Inflight);
            }
            let next = entry_at(last) + packed::NEXT;
            self.shared.store_u16(next, self.free_head, Ordering::Relaxed)?;
            self.free_head = *entry;
        }
        self.shared.store_u16(packed::FREE_HEAD, self.free_head, Ordering::Release)?;
        let word = used_word(used, self.used);
        self.shared.store_u64(packed::USED, word, Ordering::Release)?;
        Ok(())
    }

    /// The driver sees the batch.
    pub(crate) fn end_batch(&mut self, used: Position) -> Result<(), Broken> {
        for entry in self.batch.drain(..) {
            let at = entry_at(entry) + packed::INFLIGHT;
            self.shared.store_u16(at, 0, Ordering::Release)?;
        }
        self.shared.store_u16(packed::OLD_FREE_HEAD, self.free_head, Ordering::Release)?;
        self.used = used;
        self.shared.store_u64(packed::USED, used_word(used, used), Ordering::Release)?;
        Ok(())
    }

    fn set_inflight(&self, entry: u16, is_inflight: bool) -> Result<(), Broken> {
        let at = entry_at(entry) + packed::INFLIGHT;
        self.shared.store_u16(at, u16::from(is_inflight), Ordering::Release)?;
        Ok(())
    }
}

#[inline]
fn entry_at(entry: u16) -> usize {
    packed::HEADER + usize::from(entry) * packed::ENTRY
}

fn used_word(used: Position, old: Position) -> u64 {
    let indexes = u64::from(used.index) | u64::from(old.index) << 16;
    indexes | u64::from(used.wrap) << 32 | u64::from(old.wrap) << 40
}

fn from_used_word(word: u64) -> (Position, Position) {
    let position = |index: u64, wrap: u64| Position { index: index as u16, wrap: wrap & 1 == 1 };
    (position(word, word >> 32), position(word >> 16, word >> 40))
}
