//! The split virtqueue, device side (Virtual I/O Device 1.2, section 2.7).
//!
//! Every descriptor is copied out of guest memory once and judged by the copy. Nothing is
//! allocated after a queue has been set up.
//!
//! # Ordering
//!
//! The driver is another process or a virtual CPU, so what orders accesses is what the other side
//! can see:
//!
//! - the available index is loaded with `Acquire`: ring entries and descriptors it covers are
//!   read after it;
//! - the used index is stored with `Release`: data, status bytes and used elements are visible
//!   before it;
//! - a `SeqCst` fence stands between publishing used entries and reading whether the driver wants
//!   an interrupt, and between asking for notifications and looking at the available index again.
//!   The driver has the mirror image of both, and without the fences each side could miss the
//!   other's store and both would wait.

use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use iobuf::{GuestSlice, GuestView, OutOfBounds};
use virtio_bindings::virtio_ring as ring;

use super::inflight::SplitInflight;
use super::shared::{DirtyLog, Shared};
use super::{Broken, Chain, DESC_BYTES, Piece, QUEUE_SIZE_MAX, Token, walk_table};

const NEXT: u16 = ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = ring::VRING_DESC_F_INDIRECT as u16;
const NO_INTERRUPT: u16 = ring::VRING_AVAIL_F_NO_INTERRUPT as u16;
const NO_NOTIFY: u16 = ring::VRING_USED_F_NO_NOTIFY as u16;

const FLAGS: usize = 0;
const IDX: usize = 2;
const RING: usize = 4;

impl From<OutOfBounds> for Broken {
    /// Ring accesses are checked when the ring is set up, so this does not happen later.
    fn from(_: OutOfBounds) -> Broken {
        Broken::RingAddress
    }
}

/// Where the three parts of a ring are, in guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddress {
    /// Descriptor table.
    pub descriptor: u64,
    /// Available ring (driver area).
    pub available: u64,
    /// Used ring (device area).
    pub used: u64,
}

/// How a queue is set up.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Number of descriptors: a power of two up to [`QUEUE_SIZE_MAX`].
    pub size: u16,
    /// Where it is.
    pub address: RingAddress,
    /// Where to go on, in the form of the queue's kind (see `Ring::base`), unless a record of
    /// requests in flight says it.
    pub base: u32,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_RING_PACKED was negotiated. `descriptor` is then the ring, and `available` and
    /// `used` are the event areas of driver and device.
    pub packed: bool,
}

/// A split virtqueue in guest memory.
#[derive(Debug)]
pub struct SplitQueue {
    parts: Parts,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    /// Available index as last loaded: entries up to it can be taken without another load.
    avail_idx: u16,
    next_used: u16,
    /// Used index as the driver sees it.
    published: u16,
    /// Used index at the last decision about an interrupt. None: there was none yet, and a driver
    /// that was here before may wait for one.
    signalled: Option<u16>,
    inflight: Option<SplitInflight>,
    /// The chain popped last came from the record.
    is_resubmitted: bool,
    log: Option<(DirtyLog, u64)>,
}

#[derive(Debug)]
struct Parts {
    desc: GuestSlice,
    avail: GuestSlice,
    used: Shared,
}

impl Parts {
    fn new(view: &Rc<GuestView>, size: u16, address: &RingAddress) -> Result<Parts, Broken> {
        let (size, slice) = (usize::from(size), |addr, len: usize| {
            view.slice(addr, len as u64).map_err(|_| Broken::RingAddress)
        });
        let parts = Parts {
            desc: slice(address.descriptor, size * DESC_BYTES)?,
            // Both end with the event field, which is there whether it is used or not.
            avail: slice(address.available, RING + size * 2 + 2)?,
            used: Shared::new(slice(address.used, RING + size * 8 + 2)?),
        };
        let is_aligned = address.descriptor.is_multiple_of(16)
            && address.available.is_multiple_of(2)
            && address.used.is_multiple_of(4);
        if !is_aligned {
            return Err(Broken::RingAddress);
        }
        // A region may be mapped so that guest alignment is not ours: find out now.
        parts.avail.load_u16(IDX, Ordering::Relaxed)?;
        parts.used.load_u32(RING, Ordering::Relaxed)?;
        Ok(parts)
    }
}

/// Whether the event index `event` was passed on the way from `old` to `new`
/// (Virtual I/O Device 1.2, section 2.7.10, `vring_need_event`).
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl SplitQueue {
    /// Take over a ring. It goes on behind the used index found in memory, and notifications are
    /// off until [`SplitQueue::arm`].
    ///
    /// `inflight` is the memory in which requests in flight are recorded, if they are. What it has
    /// comes first, and the available entries go on behind it: whatever was taken is used or in
    /// flight. Without a record, or with one that is new, the ring goes on where it is said to: if
    /// chains were in flight that nobody knows, those are lost, but none is taken that the driver
    /// has back.
    pub fn new(
        view: &Rc<GuestView>,
        config: &RingConfig,
        inflight: Option<GuestSlice>,
    ) -> Result<SplitQueue, Broken> {
        if !config.size.is_power_of_two() || config.size > QUEUE_SIZE_MAX {
            return Err(Broken::RingAddress);
        }
        let parts = Parts::new(view, config.size, &config.address)?;
        let used = parts.used.load_u16(IDX, Ordering::Relaxed)?;
        let mut inflight = match inflight {
            Some(slice) => Some(SplitInflight::new(slice, config.size, used)?),
            None => None,
        };
        let next_avail = match &mut inflight {
            Some(inflight) if !inflight.is_new() => {
                used.wrapping_add(inflight.resubmit().len() as u16)
            }
            _ => config.base as u16,
        };
        let mut queue = SplitQueue {
            parts,
            size: config.size,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_avail,
            avail_idx: next_avail,
            next_used: used,
            published: used,
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
        self.parts.used.set_log(self.log.clone());
        Ok(())
    }

    /// Mark what is written to the used ring, its first byte being at this address of the log.
    pub fn set_log(&mut self, log: Option<(DirtyLog, u64)>) {
        self.log = log;
        self.parts.used.set_log(self.log.clone());
    }

    /// Whether requests in flight are recorded, so that another device could go on with them.
    pub fn has_record(&self) -> bool {
        self.inflight.is_some()
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The available entry to be taken next.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Whether the driver has put something in since the last [`SplitQueue::pop`].
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, Broken> {
        if self.next_avail != self.avail_idx {
            return Ok(true);
        }
        if let Some(inflight) = &mut self.inflight
            && !inflight.resubmit().is_empty()
        {
            return Ok(true);
        }
        let idx = self.parts.avail.load_u16(IDX, Ordering::Acquire)?;
        if idx.wrapping_sub(self.next_avail) > self.size {
            return Err(Broken::AvailableIndex);
        }
        self.avail_idx = idx;
        Ok(idx != self.next_avail)
    }

    /// Take the next chain and copy its descriptors to `chain`. False: there is none.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        if let Some(inflight) = &mut self.inflight
            && let Some(head) = inflight.resubmit().pop_front()
        {
            chain.restart(head);
            self.walk(head, chain)?;
            self.is_resubmitted = true;
            return Ok(true);
        }
        if !self.has_available()? {
            return Ok(false);
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = u16::from_le_bytes(self.parts.avail.read(RING + slot * 2)?);
        chain.restart(head);
        self.walk(head, chain)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(head)?;
            self.is_resubmitted = false;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Put back the chain that was popped last.
    pub fn unpop(&mut self, token: Token) -> Result<(), Broken> {
        if let Some(inflight) = &mut self.inflight {
            if self.is_resubmitted {
                inflight.resubmit().push_front(token.id);
                return Ok(());
            }
            inflight.cancel(token.id)?;
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
        Ok(())
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        if head >= self.size {
            return Err(Broken::Head);
        }
        let mut index = head;
        for _ in 0..self.size {
            let desc = Desc::parse(self.parts.desc.read(usize::from(index) * DESC_BYTES)?);
            if desc.flags & INDIRECT != 0 {
                if !self.indirect {
                    return Err(Broken::IndirectNotNegotiated);
                }
                if desc.flags & NEXT != 0 {
                    return Err(Broken::IndirectNested);
                }
                return self.walk_indirect(&desc, chain);
            }
            chain.push(desc.piece(), desc.flags & WRITE != 0);
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            if desc.next >= self.size {
                return Err(Broken::Next);
            }
            index = desc.next;
        }
        Err(Broken::Loop)
    }

    /// The flag WRITE of the descriptor that refers to the table means nothing
    /// (Virtual I/O Device 1.2, section 2.7.5.3.2).
    fn walk_indirect(&self, outer: &Desc, chain: &mut Chain) -> Result<(), Broken> {
        walk_table(self.parts.desc.view(), outer.addr, outer.len, |_, count, bytes| {
            let desc = Desc::parse(bytes);
            if desc.flags & INDIRECT != 0 {
                return Err(Broken::IndirectNested);
            }
            chain.push(desc.piece(), desc.flags & WRITE != 0);
            match usize::from(desc.next) {
                _ if desc.flags & NEXT == 0 => Ok(None),
                next if next >= count => Err(Broken::Next),
                next => Ok(Some(next)),
            }
        })
    }

    /// Give a chain back with the number of bytes written to it. The driver sees it after
    /// [`SplitQueue::publish`].
    #[inline]
    pub fn push_used(&mut self, token: Token, written: u32) -> Result<(), Broken> {
        let slot = usize::from(self.next_used & (self.size - 1));
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(token.id).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        self.parts.used.write(RING + slot * 8, &element)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.give_back(token.id)?;
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Show the driver everything pushed since the last time. True: it wants an interrupt.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, Broken> {
        if self.next_used == self.published {
            return Ok(false);
        }
        self.parts.used.store_u16(IDX, self.next_used, Ordering::Release)?;
        self.published = self.next_used;
        if let Some(inflight) = &mut self.inflight {
            inflight.end_batch(self.published)?;
        }
        fence(Ordering::SeqCst);
        let old = self.signalled.replace(self.published);
        if !self.event_idx {
            let flags = self.parts.avail.load_u16(FLAGS, Ordering::Relaxed)?;
            return Ok(flags & NO_INTERRUPT == 0);
        }
        let event = self.parts.avail.load_u16(self.used_event(), Ordering::Relaxed)?;
        Ok(old.is_none_or(|old| need_event(event, self.published, old)))
    }

    /// Ask for a notification of the next chain. True: one came meanwhile.
    pub fn arm(&mut self) -> Result<bool, Broken> {
        if self.event_idx {
            let avail_event = self.avail_event();
            self.parts.used.store_u16(avail_event, self.next_avail, Ordering::Relaxed)?;
        } else {
            self.parts.used.store_u16(FLAGS, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Notifications are not needed for now. A hint; with event indexes there is nothing to do,
    /// as the index asked for lies behind once it has been passed.
    pub fn disarm(&mut self) {
        let flags = if self.event_idx { 0 } else { NO_NOTIFY };
        // The offset was checked when the ring was set up.
        let _ = self.parts.used.store_u16(FLAGS, flags, Ordering::Relaxed);
    }

    fn used_event(&self) -> usize {
        RING + usize::from(self.size) * 2
    }

    fn avail_event(&self) -> usize {
        RING + usize::from(self.size) * 8
    }
}

#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    #[inline]
    fn parse(bytes: [u8; DESC_BYTES]) -> Desc {
        let word = u128::from_le_bytes(bytes);
        Desc {
            addr: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        }
    }

    fn piece(&self) -> Piece {
        Piece { addr: self.addr, len: self.len }
    }
}

#[cfg(test)]
mod tests;
