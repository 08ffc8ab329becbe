//! Guest memory and the driver's half of a split virtqueue.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use iobuf::{GuestMemory, GuestRegion, GuestSlice, GuestView};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_ring as ring;

use crate::queue::split::{RingAddress, need_event};
use crate::vhost_user::wire::MemoryRegion;

const NEXT: u16 = ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = ring::VRING_DESC_F_INDIRECT as u16;

/// Where the guest's memory begins in guest addresses.
const GUEST_ADDR: u64 = 0x4000_0000;
/// Where it begins in the frontend's addresses.
const USER_ADDR: u64 = 0x7f12_0000_0000;

/// Guest memory: one region of a memfd.
pub struct TestMemory {
    fd: OwnedFd,
    size: u64,
    memory: GuestMemory,
    view: Rc<GuestView>,
}

impl TestMemory {
    /// `size` bytes of zeros.
    pub fn new(size: u64) -> TestMemory {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, size).expect("memfd size");
        let region = GuestRegion::map(fd.as_fd(), 0, size, GUEST_ADDR, USER_ADDR).expect("map");
        let memory = GuestMemory::new(vec![region]).expect("one region");
        let view = memory.view();
        TestMemory { fd, size, memory, view }
    }

    /// First guest address.
    pub fn base(&self) -> u64 {
        GUEST_ADDR
    }

    /// Its length.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.size
    }

    /// Its file.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// As a memory table names it.
    pub fn region(&self) -> MemoryRegion {
        MemoryRegion {
            guest_addr: GUEST_ADDR,
            size: self.size,
            user_addr: USER_ADDR,
            mmap_offset: 0,
        }
    }

    /// The table of this region.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Access to it.
    pub fn view(&self) -> &Rc<GuestView> {
        &self.view
    }

    /// What stands at a guest address.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.view.read(addr, &mut bytes).expect("in guest memory");
        bytes
    }

    /// Put bytes at a guest address.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.view.write(addr, bytes).expect("in guest memory");
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Length.
    pub len: u32,
    /// The device may write it.
    pub is_writable: bool,
}

impl Buffer {
    /// For the device to read.
    pub fn readable(addr: u64, len: u32) -> Buffer {
        Buffer { addr, len, is_writable: false }
    }

    /// For the device to write.
    pub fn writable(addr: u64, len: u32) -> Buffer {
        Buffer { addr, len, is_writable: true }
    }
}

/// A driver's half of a split virtqueue.
pub struct TestQueue {
    desc: GuestSlice,
    avail: GuestSlice,
    used: GuestSlice,
    address: RingAddress,
    size: u16,
    event_idx: bool,
    avail_idx: u16,
    published: u16,
    used_idx: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl TestQueue {
    /// Bytes that a ring takes.
    pub fn bytes(size: u16) -> u64 {
        // Descriptors, available ring, padding, used ring.
        u64::from(size) * 26 + 6 + 4 + 6
    }

    /// Lay out a ring at `base`, a multiple of 16.
    pub fn new(view: &Rc<GuestView>, base: u64, size: u16, event_idx: bool) -> TestQueue {
        let n = u64::from(size);
        let available = base + 16 * n;
        let used = (available + 6 + 2 * n).next_multiple_of(4);
        let slice = |addr, len| view.slice(addr, len).expect("ring in guest memory");
        TestQueue {
            desc: slice(base, 16 * n),
            avail: slice(available, 6 + 2 * n),
            used: slice(used, 6 + 8 * n),
            address: RingAddress { descriptor: base, available, used },
            size,
            event_idx,
            avail_idx: 0,
            published: 0,
            used_idx: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// Where the device finds it.
    pub fn address(&self) -> RingAddress {
        self.address
    }

    /// Write any descriptor.
    pub fn set_desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.desc.write(usize::from(index) * 16, &bytes).expect("in the table");
    }

    /// Put any head in the next available entry.
    pub fn push_head(&mut self, head: u16) {
        let slot = usize::from(self.avail_idx % self.size);
        self.avail.store_u16(4 + 2 * slot, head, Ordering::Relaxed).expect("in the ring");
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Add a chain of direct descriptors. None: not enough are free.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let at = self.free.len().checked_sub(buffers.len())?;
        let chain: Vec<u16> = self.free.split_off(at);
        for (i, (index, buffer)) in chain.iter().zip(buffers).enumerate() {
            let next = chain.get(i + 1);
            let flags = if next.is_some() { NEXT } else { 0 };
            let flags = flags | if buffer.is_writable { WRITE } else { 0 };
            self.set_desc(*index, buffer.addr, buffer.len, flags, next.copied().unwrap_or(0));
        }
        let head = *chain.first()?;
        self.push_head(head);
        self.chains.insert(head, chain);
        Some(head)
    }

    /// Add a chain as an indirect table at `table`. None: no descriptor is free.
    pub fn add_indirect(
        &mut self,
        view: &Rc<GuestView>,
        table: u64,
        buffers: &[Buffer],
    ) -> Option<u16> {
        let head = self.free.pop()?;
        for (i, buffer) in buffers.iter().enumerate() {
            let is_last = i + 1 == buffers.len();
            let flags = if is_last { 0 } else { NEXT };
            let flags = flags | if buffer.is_writable { WRITE } else { 0 };
            let mut bytes = buffer.addr.to_le_bytes().to_vec();
            bytes.extend(buffer.len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((i as u16 + 1).to_le_bytes());
            view.write(table + 16 * i as u64, &bytes).expect("table in guest memory");
        }
        self.set_desc(head, table, 16 * buffers.len() as u32, INDIRECT, 0);
        self.push_head(head);
        self.chains.insert(head, vec![head]);
        Some(head)
    }

    /// Show the device everything added. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        self.avail.store_u16(2, self.avail_idx, Ordering::Release).expect("in the ring");
        fence(Ordering::SeqCst);
        let (old, new) = (self.published, self.avail_idx);
        self.published = new;
        if self.event_idx {
            let offset = 4 + 8 * usize::from(self.size);
            let event = self.used.load_u16(offset, Ordering::Relaxed).expect("in the ring");
            need_event(event, new, old)
        } else {
            self.used.load_u16(0, Ordering::Relaxed).expect("in the ring") & 1 == 0
        }
    }

    /// Show the device an available index of any value.
    pub fn publish_index(&mut self, index: u16) {
        self.avail_idx = index;
        self.published = index;
        self.avail.store_u16(2, index, Ordering::Release).expect("in the ring");
    }

    /// The next chain that the device gave back, and how much it wrote.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        if self.used.load_u16(2, Ordering::Acquire).expect("in the ring") == self.used_idx {
            return None;
        }
        let slot = usize::from(self.used_idx % self.size);
        let element: [u8; 8] = self.used.read(4 + 8 * slot).expect("in the ring");
        let word = u64::from_le_bytes(element);
        self.used_idx = self.used_idx.wrapping_add(1);
        let head = u16::try_from(word & 0xffff_ffff).expect("a head is a descriptor index");
        let chain = self.chains.remove(&head).expect("used what was available");
        self.free.extend(chain);
        Some((head, (word >> 32) as u32))
    }

    /// Ask for an interrupt when the next chain comes back. True: one came meanwhile.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            let offset = 4 + 2 * usize::from(self.size);
            self.avail.store_u16(offset, self.used_idx, Ordering::Relaxed).expect("in the ring");
        } else {
            self.avail.store_u16(0, 0, Ordering::Relaxed).expect("in the ring");
        }
        fence(Ordering::SeqCst);
        self.used.load_u16(2, Ordering::Acquire).expect("in the ring") != self.used_idx
    }

    /// Ask for no interrupts (a hint).
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.avail.store_u16(0, 1, Ordering::Relaxed).expect("in the ring");
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether event indexes are used.
    pub fn has_event_idx(&self) -> bool {
        self.event_idx
    }

    /// Used index as the device has shown it last.
    pub fn device_used_idx(&self) -> u16 {
        self.used.load_u16(2, Ordering::Acquire).expect("in the ring")
    }

    /// Used index as the driver has seen it.
    pub fn used_idx(&self) -> u16 {
        self.used_idx
    }

    /// Chains the device has.
    pub fn outstanding(&self) -> usize {
        self.chains.len()
    }
}
