//! The driver's half of a packed virtqueue.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use iobuf::{GuestSlice, GuestView};
use virtio_bindings::virtio_ring as ring;

use super::driver::Buffer;
use crate::queue::packed::{Position, is_available};
use crate::queue::split::RingAddress;

const NEXT: u16 = ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = ring::VRING_DESC_F_INDIRECT as u16;

/// A driver's half of a packed virtqueue.
pub struct TestPackedQueue {
    desc: GuestSlice,
    driver_event: GuestSlice,
    device_event: GuestSlice,
    address: RingAddress,
    size: u16,
    event_idx: bool,
    avail: Position,
    published: Position,
    /// Flags of the first descriptor that is not published yet.
    first: Option<(u16, u16)>,
    used: Position,
    free: u16,
    ids: Vec<u16>,
    /// Descriptors of each chain that the device has, by buffer ID.
    chains: HashMap<u16, u16>,
}

impl TestPackedQueue {
    /// Bytes that a ring takes.
    pub fn bytes(size: u16) -> u64 {
        u64::from(size) * 16 + 8
    }

    /// Lay out a ring at `base`, a multiple of 16.
    pub fn new(view: &Rc<GuestView>, base: u64, size: u16, event_idx: bool) -> TestPackedQueue {
        let available = base + 16 * u64::from(size);
        let address = RingAddress { descriptor: base, available, used: available + 4 };
        let slice = |addr, len| view.slice(addr, len).expect("ring in guest memory");
        TestPackedQueue {
            desc: slice(base, 16 * u64::from(size)),
            driver_event: slice(address.available, 4),
            device_event: slice(address.used, 4),
            address,
            size,
            event_idx,
            avail: Position::START,
            published: Position::START,
            first: None,
            used: Position::START,
            free: size,
            // Not in order: a buffer ID is no place in the ring.
            ids: (0..size).map(|id| id.wrapping_mul(3) % size.max(1)).rev().collect(),
            chains: HashMap::new(),
        }
        .with_distinct_ids()
    }

    fn with_distinct_ids(mut self) -> TestPackedQueue {
        let mut seen = vec![false; usize::from(self.size)];
        self.ids.retain(|id| !std::mem::replace(&mut seen[usize::from(*id)], true));
        self.ids.extend((0..self.size).filter(|id| !seen[usize::from(*id)]));
        self
    }

    /// Where the device finds it.
    pub fn address(&self) -> RingAddress {
        self.address
    }

    /// Write any descriptor at any place.
    pub fn set_desc(&self, index: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.desc.write(usize::from(index) * 16, &bytes).expect("in the ring");
    }

    /// Flags of a descriptor that makes it available at the driver's position, which moves on.
    pub fn next_flags(&mut self) -> (u16, u16) {
        let (index, flags) = (self.avail.index, self.avail.avail_flags());
        self.avail.advance(1, self.size);
        (index, flags)
    }

    fn put(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let (index, avail) = self.next_flags();
        self.free -= 1;
        if self.first.is_some() {
            self.set_desc(index, addr, len, id, flags | avail);
            return;
        }
        // The first of all is shown last.
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        self.desc.write(usize::from(index) * 16, &bytes).expect("in the ring");
        self.first = Some((index, flags | avail));
    }

    /// Add a chain of direct descriptors. None: not enough are free.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let count = buffers.len() as u16;
        if count > self.free || count == 0 {
            return None;
        }
        let id = self.ids.pop()?;
        for (i, buffer) in buffers.iter().enumerate() {
            let is_last = i + 1 == buffers.len();
            let flags = if is_last { 0 } else { NEXT };
            let flags = flags | if buffer.is_writable { WRITE } else { 0 };
            // Only the last one's ID counts.
            self.put(buffer.addr, buffer.len, if is_last { id } else { 0xffff }, flags);
        }
        self.chains.insert(id, count);
        Some(id)
    }

    /// Add a chain as an indirect table at `table`. None: no descriptor is free.
    pub fn add_indirect(
        &mut self,
        view: &Rc<GuestView>,
        table: u64,
        buffers: &[Buffer],
    ) -> Option<u16> {
        if self.free == 0 {
            return None;
        }
        let id = self.ids.pop()?;
        for (i, buffer) in buffers.iter().enumerate() {
            let mut bytes = buffer.addr.to_le_bytes().to_vec();
            bytes.extend(buffer.len.to_le_bytes());
            bytes.extend([0xff; 2]);
            bytes.extend(if buffer.is_writable { WRITE } else { 0 }.to_le_bytes());
            view.write(table + 16 * i as u64, &bytes).expect("table in guest memory");
        }
        self.put(table, 16 * buffers.len() as u32, id, INDIRECT);
        self.chains.insert(id, 1);
        Some(id)
    }

    /// Show the device everything added. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        let Some((index, flags)) = self.first.take() else { return false };
        let at = usize::from(index) * 16 + 14;
        self.desc.store_u16(at, flags, Ordering::Release).expect("in the ring");
        fence(Ordering::SeqCst);
        let (old, new) = (self.published, self.avail);
        self.published = new;
        let event = self.device_event.load_u32(0, Ordering::Relaxed).expect("in memory");
        match event >> 16 {
            0 => true,
            1 => false,
            2 => {
                assert!(self.event_idx, "an event index, not negotiated");
                // Has the place asked for been filled? Looked at one by one.
                let asked = Position::from_bits(event as u16);
                let mut at = old;
                loop {
                    if at == asked {
                        return true;
                    }
                    at.advance(1, self.size);
                    if at == new {
                        return false;
                    }
                }
            }
            flags => panic!("event flags {flags}"),
        }
    }

    /// The next chain that the device gave back, and how much it wrote.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        let at = usize::from(self.used.index) * 16;
        let flags = self.desc.load_u16(at + 14, Ordering::Acquire).expect("in the ring");
        let both = flags & (1 << 7 | 1 << 15);
        let is_used = both == if self.used.wrap { 1 << 7 | 1 << 15 } else { 0 };
        if !is_used || self.chains.is_empty() {
            return None;
        }
        debug_assert!(!is_available(flags, self.used));
        let bytes: [u8; 8] = self.desc.read(at + 8).expect("in the ring");
        let word = u64::from_le_bytes(bytes);
        let (len, id) = (word as u32, (word >> 32) as u16);
        let count = self.chains.remove(&id).expect("used what was available");
        self.used.advance(count, self.size);
        self.free += count;
        self.ids.push(id);
        Some((id, if flags & WRITE == 0 { 0 } else { len }))
    }

    /// Ask for an interrupt when the next chain comes back. True: one came meanwhile.
    pub fn arm(&mut self) -> bool {
        let flags = if self.event_idx { 2u32 } else { 0 };
        let both = u32::from(self.used.bits()) | flags << 16;
        self.driver_event.store_u32(0, both, Ordering::Relaxed).expect("in memory");
        fence(Ordering::SeqCst);
        let at = usize::from(self.used.index) * 16 + 14;
        let flags = self.desc.load_u16(at, Ordering::Acquire).expect("in the ring");
        let both = flags & (1 << 7 | 1 << 15);
        both == if self.used.wrap { 1 << 7 | 1 << 15 } else { 0 } && !self.chains.is_empty()
    }

    /// Ask for no interrupts (a hint).
    pub fn disarm(&mut self) {
        self.driver_event.store_u32(0, 1 << 16, Ordering::Relaxed).expect("in memory");
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether event indexes are used.
    pub fn has_event_idx(&self) -> bool {
        self.event_idx
    }

    /// What QEMU says of the ring after a device died: where it began.
    pub fn base_after_crash(&self) -> u32 {
        let start = u32::from(Position::START.bits());
        start | start << 16
    }

    /// Chains the device has.
    pub fn outstanding(&self) -> usize {
        self.chains.len()
    }
}
