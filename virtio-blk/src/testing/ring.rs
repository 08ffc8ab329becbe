//! The driver's half of a virtqueue of either kind.

use std::rc::Rc;

use iobuf::GuestView;

use super::driver::{Buffer, TestQueue};
use super::packed::TestPackedQueue;
use crate::queue::split::RingAddress;

/// A driver's half of a virtqueue.
pub enum TestRing {
    /// Split.
    Split(TestQueue),
    /// Packed.
    Packed(TestPackedQueue),
}

macro_rules! both {
    ($self:ident, $queue:ident => $what:expr) => {
        match $self {
            TestRing::Split($queue) => $what,
            TestRing::Packed($queue) => $what,
        }
    };
}

impl TestRing {
    /// Bytes that a ring of either kind takes at most.
    pub fn bytes(size: u16) -> u64 {
        TestQueue::bytes(size).max(TestPackedQueue::bytes(size))
    }

    /// Lay out a ring at `base`, a multiple of 16.
    pub fn new(
        view: &Rc<GuestView>,
        base: u64,
        size: u16,
        event_idx: bool,
        is_packed: bool,
    ) -> TestRing {
        match is_packed {
            false => TestRing::Split(TestQueue::new(view, base, size, event_idx)),
            true => TestRing::Packed(TestPackedQueue::new(view, base, size, event_idx)),
        }
    }

    /// The split queue that it is.
    pub fn split(&mut self) -> &mut TestQueue {
        match self {
            TestRing::Split(queue) => queue,
            TestRing::Packed(_) => panic!("the queue is packed"),
        }
    }

    /// Whether it is packed.
    pub fn is_packed(&self) -> bool {
        matches!(self, TestRing::Packed(_))
    }

    /// Where the device finds it.
    pub fn address(&self) -> RingAddress {
        both!(self, queue => queue.address())
    }

    /// Add a chain of direct descriptors. None: not enough are free.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        both!(self, queue => queue.add(buffers))
    }

    /// Add a chain as an indirect table at `table`. None: no descriptor is free.
    pub fn add_indirect(
        &mut self,
        view: &Rc<GuestView>,
        table: u64,
        buffers: &[Buffer],
    ) -> Option<u16> {
        both!(self, queue => queue.add_indirect(view, table, buffers))
    }

    /// Show the device everything added. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        both!(self, queue => queue.publish())
    }

    /// The next chain that the device gave back, and how much it wrote.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        both!(self, queue => queue.pop_used())
    }

    /// Ask for an interrupt when the next chain comes back. True: one came meanwhile.
    pub fn arm(&mut self) -> bool {
        both!(self, queue => queue.arm())
    }

    /// Ask for no interrupts (a hint).
    pub fn disarm(&mut self) {
        both!(self, queue => queue.disarm());
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        both!(self, queue => queue.size())
    }

    /// Whether event indexes are used.
    pub fn has_event_idx(&self) -> bool {
        both!(self, queue => queue.has_event_idx())
    }

    /// What SET_VRING_BASE says of a new ring.
    pub fn base_at_start(&self) -> u32 {
        match self {
            TestRing::Split(_) => 0,
            TestRing::Packed(queue) => queue.base_after_crash(),
        }
    }

    /// What QEMU says of the ring after a device died: all that it knows.
    pub fn base_after_crash(&self) -> u32 {
        match self {
            TestRing::Split(queue) => u32::from(queue.device_used_idx()),
            TestRing::Packed(queue) => queue.base_after_crash(),
        }
    }

    /// Chains the device has.
    pub fn outstanding(&self) -> usize {
        both!(self, queue => queue.outstanding())
    }
}
