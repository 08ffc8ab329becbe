//! The packed virtqueue, device side (Virtual I/O Device 1.2, section 2.8).
//!
//! One ring of descriptors that both sides write: the driver makes descriptors available where the
//! device has used some, the device writes used ones in the order it finishes, from its own
//! position on. Two bits in each descriptor say whose it is; what they mean turns round with every
//! wrap of the ring.
//!
//! # Ordering
//!
//! - The flags of a descriptor are loaded with `Acquire` before the rest of it is read; of a chain
//!   those of the first, as the driver writes them last.
//! - The flags of a used descriptor are stored with `Release`. Of a batch those of the first
//!   descriptor come last, so that the driver finds all of the batch or nothing.
//! - `SeqCst` fences stand where they do in a split queue, for the same reason.

use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use iobuf::{GuestSlice, GuestView};
use virtio_bindings::virtio_ring as ring;

use super::inflight::PackedInflight;
use super::shared::{DirtyLog, Shared};
use super::split::{RingAddress, RingConfig, need_event};
use super::{Broken, Chain, DESC_BYTES, Piece, QUEUE_SIZE_MAX, Token, walk_table};

const NEXT: u16 = ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = ring::VRING_DESC_F_INDIRECT as u16;
const AVAIL: u16 = 1 << ring::VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << ring::VRING_PACKED_DESC_F_USED;

const EVENT_ENABLE: u16 = ring::VRING_PACKED_EVENT_FLAG_ENABLE as u16;
const EVENT_DISABLE: u16 = ring::VRING_PACKED_EVENT_FLAG_DISABLE as u16;
const EVENT_DESC: u16 = ring::VRING_PACKED_EVENT_FLAG_DESC as u16;
/// Of `desc_event_off` and of each half of a ring's base.
const WRAP: u16 = 1 << ring::VRING_PACKED_EVENT_F_WRAP_CTR;

// `struct pvirtq_desc`.
const LEN: usize = 8;
const FLAGS: usize = 14;

// `struct pvirtq_event_suppress`.
const EVENT_FLAGS: usize = 2;
const EVENT_BYTES: u64 = 4;

/// A place in the ring, and how often it was passed, modulo 2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Position {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Position {
    /// Where both sides begin.
    pub(crate) const START: Position = Position { index: 0, wrap: true };

    pub(crate) fn advance(&mut self, count: u16, size: u16) {
        self.index += count;
        if self.index >= size {
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }

    pub(crate) fn from_bits(bits: u16) -> Position {
        Position { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    pub(crate) fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// Flags of a descriptor that the driver has made available here.
    pub(crate) fn avail_flags(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Descriptors from here on up to `end`, if there are no more than there can be.
    fn distance(self, end: Position, size: u16) -> Option<u16> {
        let laps = if self.wrap == end.wrap { 0 } else { size };
        (end.index + laps).checked_sub(self.index).filter(|count| *count <= size)
    }

    fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// Whether a descriptor with these flags is the driver's answer to `position`.
pub(crate) fn is_available(flags: u16, position: Position) -> bool {
    flags & (AVAIL | USED) == position.avail_flags()
}

/// A packed virtqueue in guest memory.
#[derive(Debug)]
pub struct PackedQueue {
    parts: Parts,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: Position,
    next_used: Position,
    /// Descriptors taken and not given back.
    taken: u16,
    /// First descriptor of the batch that the driver does not see yet, with its flags.
    first: Option<(Position, u16)>,
    /// Used position at the last decision about an interrupt. None: there was none yet.
    signalled: Option<Position>,
    inflight: Option<PackedInflight>,
    is_resubmitted: bool,
    log: Option<(DirtyLog, u64)>,
}

#[derive(Debug)]
struct Parts {
    desc: Shared,
    driver_event: GuestSlice,
    device_event: Shared,
}

impl Parts {
    fn new(view: &Rc<GuestView>, size: u16, address: &RingAddress) -> Result<Parts, Broken> {
        let slice = |addr, len| view.slice(addr, len).map_err(|_| Broken::RingAddress);
        let parts = Parts {
            desc: Shared::new(slice(address.descriptor, u64::from(size) * DESC_BYTES as u64)?),
            driver_event: slice(address.available, EVENT_BYTES)?,
            device_event: Shared::new(slice(address.used, EVENT_BYTES)?),
        };
        let is_aligned = address.descriptor.is_multiple_of(16)
            && address.available.is_multiple_of(4)
            && address.used.is_multiple_of(4);
        if !is_aligned {
            return Err(Broken::RingAddress);
        }
        // A region may be mapped so that guest alignment is not ours: find out now.
        parts.desc.load_u32(LEN, Ordering::Relaxed)?;
        parts.driver_event.load_u32(0, Ordering::Relaxed)?;
        parts.device_event.load_u32(0, Ordering::Relaxed)?;
        Ok(parts)
    }

    /// Whether no descriptor was ever used. Some frontends give 0 as the base of a new ring, which
    /// begins with a wrap counter of 1. In a ring that really was passed an odd number of times some
    /// descriptor has the bit: it was used on that way, or made available again after it.
    fn is_new(&self, size: u16) -> Result<bool, Broken> {
        for index in 0..usize::from(size) {
            if self.desc.load_u16(index * DESC_BYTES + FLAGS, Ordering::Relaxed)? & USED != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn set_log(&mut self, log: &Option<(DirtyLog, u64)>) {
        self.device_event.set_log(log.clone());
        // Used descriptors lie where available ones do, and the address for the log is that of the
        // device's event area.
        let descriptors = self.desc.guest_addr();
        let log = log.as_ref().zip(descriptors).map(|((log, _), at)| (log.clone(), at));
        self.desc.set_log(log);
    }
}

impl PackedQueue {
    /// Take over a ring. Notifications are off until [`PackedQueue::arm`].
    ///
    /// `inflight` is the memory in which requests in flight are recorded, if they are. It knows
    /// where to go on, too.
    pub fn new(
        view: &Rc<GuestView>,
        config: &RingConfig,
        inflight: Option<GuestSlice>,
    ) -> Result<PackedQueue, Broken> {
        if !(1..=QUEUE_SIZE_MAX).contains(&config.size) {
            return Err(Broken::RingAddress);
        }
        let parts = Parts::new(view, config.size, &config.address)?;
        let size = config.size;
        let mut next_avail = Position::from_bits(config.base as u16);
        if config.base == 0 && parts.is_new(size)? {
            next_avail = Position::START;
        }
        // A ring that was stopped has given back all that it took, so the used position is the
        // available one: some frontends leave the upper half of the base empty. If it says something
        // else, what lies between was left in a record.
        let mut next_used = Position::from_bits((config.base >> 16) as u16);
        let mut taken = next_used.distance(next_avail, size).unwrap_or(0);
        if config.base >> 16 == 0 || taken == 0 || next_used.index >= size {
            (next_used, taken) = (next_avail, 0);
        }
        let inflight = match inflight {
            Some(slice) => {
                let is_used = |position: Position| {
                    let at = usize::from(position.index) * DESC_BYTES + FLAGS;
                    let flags = parts.desc.load_u16(at, Ordering::Acquire)?;
                    Ok(!is_available(flags, position))
                };
                let inflight = PackedInflight::new(slice, size, next_used, is_used)?;
                // Whatever was taken is used or in flight. A record that is new does not know of
                // what was: that is lost, and the ring goes on behind it.
                if !inflight.is_new() {
                    next_used = inflight.used();
                    taken = inflight.descriptors();
                    next_avail = next_used;
                    // Of a batch the flags of the first descriptor come last. If the device before
                    // us died in between, the driver would find the others' as soon as it passes
                    // ours.
                    for _ in 0..taken {
                        let at = usize::from(next_avail.index) * DESC_BYTES + FLAGS;
                        if !is_available(parts.desc.load_u16(at, Ordering::Relaxed)?, next_avail) {
                            parts.desc.store_u16(
                                at,
                                next_avail.avail_flags(),
                                Ordering::Release,
                            )?;
                        }
                        next_avail.advance(1, size);
                    }
                }
                Some(inflight)
            }
            None => None,
        };
        if next_avail.index >= size {
            return Err(Broken::AvailableIndex);
        }
        let mut queue = PackedQueue {
            parts,
            size,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_avail,
            next_used,
            taken,
            first: None,
            signalled: None,
            inflight,
            is_resubmitted: false,
            log: None,
        };
        queue.disarm();
        Ok(queue)
    }

    /// The memory map changed: the ring is at another place of our memory now. On error the old
    /// place is still used.
    pub fn rebind(&mut self, view: &Rc<GuestView>, address: &RingAddress) -> Result<(), Broken> {
        self.parts = Parts::new(view, self.size, address)?;
        self.parts.set_log(&self.log);
        Ok(())
    }

    /// Mark what is written to the ring; the device's event area is at this address of the log.
    pub fn set_log(&mut self, log: Option<(DirtyLog, u64)>) {
        self.log = log;
        self.parts.set_log(&self.log);
    }

    /// Whether requests in flight are recorded, so that another device could go on with them.
    pub fn has_record(&self) -> bool {
        self.inflight.is_some()
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where to go on: the available position in bits 0 to 15, the used one in bits 16 to 31, each
    /// with its wrap counter in the highest bit (vhost-user protocol, "Vring state description").
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// Whether there is a chain to take.
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, Broken> {
        if self.inflight.as_ref().is_some_and(PackedInflight::has_resubmits) {
            return Ok(true);
        }
        if self.taken == self.size {
            return Ok(false);
        }
        let at = usize::from(self.next_avail.index) * DESC_BYTES;
        let flags = self.parts.desc.load_u16(at + FLAGS, Ordering::Acquire)?;
        Ok(is_available(flags, self.next_avail))
    }

    /// Take the next chain and copy its descriptors to `chain`. False: there is none.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        if let Some(inflight) = &mut self.inflight
            && let Some((entry, count)) = inflight.next_resubmit()
        {
            chain.restart(0);
            self.is_resubmitted = true;
            return self.walk_again(entry, count, chain).map(|()| true);
        }
        if !self.has_available()? {
            return Ok(false);
        }
        chain.restart(0);
        self.is_resubmitted = false;
        self.walk(chain)?;
        self.next_avail.advance(chain.token.descriptors, self.size);
        self.taken += chain.token.descriptors;
        Ok(true)
    }

    /// Put back the chain that was popped last.
    pub fn unpop(&mut self, token: Token) -> Result<(), Broken> {
        if let Some(inflight) = &mut self.inflight {
            if self.is_resubmitted {
                inflight.resubmit_again(token);
                return Ok(());
            }
            inflight.cancel(token)?;
        }
        let Position { index, wrap } = self.next_avail;
        self.next_avail = match index.checked_sub(token.descriptors) {
            Some(index) => Position { index, wrap },
            None => Position { index: index + self.size - token.descriptors, wrap: !wrap },
        };
        self.taken -= token.descriptors;
        Ok(())
    }

    fn walk(&mut self, chain: &mut Chain) -> Result<(), Broken> {
        let mut position = self.next_avail;
        let mut count = 0;
        let mut begun = None;
        loop {
            // Descriptors that are taken and not given back cannot be there again.
            if count == self.size - self.taken {
                return Err(Broken::Loop);
            }
            let at = usize::from(position.index) * DESC_BYTES;
            let desc = Desc::parse(self.parts.desc.read(at)?);
            count += 1;
            let is_last = self.follow(&desc, count == 1, chain)?;
            if let Some(inflight) = &mut self.inflight {
                let entry = inflight.take(&desc, begun.is_none(), is_last)?;
                begun.get_or_insert(entry);
            }
            if is_last {
                chain.token =
                    Token { id: desc.id, descriptors: count, entry: begun.unwrap_or_default() };
                return Ok(());
            }
            position.advance(1, self.size);
        }
    }

    /// A chain as the record has it: the ring may hold something else there by now.
    fn walk_again(&mut self, entry: u16, count: u16, chain: &mut Chain) -> Result<(), Broken> {
        let Some(inflight) = &self.inflight else { return Err(Broken::Inflight) };
        let mut at = entry;
        for index in 0..count {
            let (desc, next) = inflight.descriptor(at)?;
            let is_last = self.follow(&desc, index == 0, chain)?;
            if is_last != (index + 1 == count) {
                return Err(Broken::Inflight);
            }
            chain.token = Token { id: desc.id, descriptors: count, entry };
            at = next;
        }
        Ok(())
    }

    /// Add a descriptor to a chain. True: it is the last one.
    #[inline]
    fn follow(&self, desc: &Desc, is_first: bool, chain: &mut Chain) -> Result<bool, Broken> {
        if desc.flags & INDIRECT == 0 {
            chain.push(Piece { addr: desc.addr, len: desc.len }, desc.flags & WRITE != 0);
            return Ok(desc.flags & NEXT == 0);
        }
        if !self.indirect {
            return Err(Broken::IndirectNotNegotiated);
        }
        if desc.flags & NEXT != 0 || !is_first {
            return Err(Broken::IndirectNested);
        }
        walk_table(self.parts.desc.view(), desc.addr, desc.len, |index, count, bytes| {
            let desc = Desc::parse(bytes);
            if desc.flags & INDIRECT != 0 {
                return Err(Broken::IndirectNested);
            }
            chain.push(Piece { addr: desc.addr, len: desc.len }, desc.flags & WRITE != 0);
            // They are all of the table, in order.
            Ok((index + 1 < count).then_some(index + 1))
        })?;
        Ok(true)
    }

    /// Give a chain back with the number of bytes written to it. The driver sees it after
    /// [`PackedQueue::publish`].
    #[inline]
    pub fn push_used(&mut self, token: Token, written: u32) -> Result<(), Broken> {
        let position = self.next_used;
        let at = usize::from(position.index) * DESC_BYTES;
        let mut bytes = [0; 6];
        bytes[..4].copy_from_slice(&written.to_le_bytes());
        bytes[4..].copy_from_slice(&token.id.to_le_bytes());
        self.parts.desc.write(at + LEN, &bytes)?;
        // Without WRITE the length means nothing.
        let flags = position.used_flags() | if written > 0 { WRITE } else { 0 };
        match self.first {
            None => self.first = Some((position, flags)),
            Some(_) => self.parts.desc.store_u16(at + FLAGS, flags, Ordering::Release)?,
        }
        self.next_used.advance(token.descriptors, self.size);
        self.taken -= token.descriptors;
        if let Some(inflight) = &mut self.inflight {
            inflight.give_back(token.entry);
        }
        Ok(())
    }

    /// Show the driver everything pushed since the last time. True: it wants an interrupt.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, Broken> {
        let Some((position, flags)) = self.first.take() else { return Ok(false) };
        if let Some(inflight) = &mut self.inflight {
            inflight.begin_batch_end(self.next_used)?;
        }
        let at = usize::from(position.index) * DESC_BYTES;
        self.parts.desc.store_u16(at + FLAGS, flags, Ordering::Release)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.end_batch(self.next_used)?;
        }
        fence(Ordering::SeqCst);
        let old = self.signalled.replace(self.next_used);
        // Both halves at once, as they belong together.
        let event = self.parts.driver_event.load_u32(0, Ordering::Relaxed)?;
        let (offset, flags) = (event as u16, (event >> 16) as u16);
        match flags & 3 {
            EVENT_DISABLE => Ok(false),
            EVENT_DESC if self.event_idx => {
                let Some(old) = old else { return Ok(true) };
                let (event, new) = (Position::from_bits(offset), self.next_used);
                let back = |position: Position| match position.wrap == new.wrap {
                    true => position.index,
                    // One lap behind.
                    false => position.index.wrapping_sub(self.size),
                };
                // As much as the whole ring may have been used since: then the two are alike.
                Ok(old == new || need_event(back(event), new.index, back(old)))
            }
            _ => Ok(true),
        }
    }

    /// Ask for a notification of the next chain. True: one came meanwhile.
    pub fn arm(&mut self) -> Result<bool, Broken> {
        let event = &self.parts.device_event;
        let flags = if self.event_idx { EVENT_DESC } else { EVENT_ENABLE };
        let both = u32::from(self.next_avail.bits()) | u32::from(flags) << 16;
        event.store_u32(0, both, Ordering::Relaxed)?;
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Notifications are not needed for now.
    pub fn disarm(&mut self) {
        // The offset was checked when the ring was set up.
        let _ = self.parts.device_event.store_u16(EVENT_FLAGS, EVENT_DISABLE, Ordering::Relaxed);
    }
}

/// `struct pvirtq_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl Desc {
    #[inline]
    fn parse(bytes: [u8; DESC_BYTES]) -> Desc {
        let word = u128::from_le_bytes(bytes);
        Desc {
            addr: word as u64,
            len: (word >> 64) as u32,
            id: (word >> 96) as u16,
            flags: (word >> 112) as u16,
        }
    }
}

#[cfg(test)]
mod tests;
