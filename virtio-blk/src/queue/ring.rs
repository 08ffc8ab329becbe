//! A virtqueue of either kind, as the engine sees it.

use std::rc::Rc;

use iobuf::{GuestSlice, GuestView};

use super::packed::PackedQueue;
use super::shared::DirtyLog;
use super::split::{RingAddress, RingConfig, SplitQueue};
use super::{Broken, Chain, Token};

/// A virtqueue, split or packed.
#[derive(Debug)]
pub enum Ring {
    /// Split (Virtual I/O Device 1.2, section 2.7).
    Split(SplitQueue),
    /// Packed (Virtual I/O Device 1.2, section 2.8).
    Packed(PackedQueue),
}

macro_rules! both {
    ($self:ident, $queue:ident => $what:expr) => {
        match $self {
            Ring::Split($queue) => $what,
            Ring::Packed($queue) => $what,
        }
    };
}

impl Ring {
    /// Take over a ring. `inflight` is the memory in which its requests in flight are recorded.
    pub fn new(
        view: &Rc<GuestView>,
        config: &RingConfig,
        inflight: Option<GuestSlice>,
    ) -> Result<Ring, Broken> {
        match config.packed {
            false => SplitQueue::new(view, config, inflight).map(Ring::Split),
            true => PackedQueue::new(view, config, inflight).map(Ring::Packed),
        }
    }

    /// See [`SplitQueue::rebind`].
    pub fn rebind(&mut self, view: &Rc<GuestView>, address: &RingAddress) -> Result<(), Broken> {
        both!(self, queue => queue.rebind(view, address))
    }

    /// Mark what is written to the device area, which begins at this address of the log.
    pub fn set_log(&mut self, log: Option<(DirtyLog, u64)>) {
        both!(self, queue => queue.set_log(log));
    }

    /// Whether requests in flight are recorded.
    pub fn has_record(&self) -> bool {
        both!(self, queue => queue.has_record())
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        both!(self, queue => queue.size())
    }

    /// Where another device would go on, as GET_VRING_BASE tells it: of a split queue the next
    /// available index, of a packed one see [`PackedQueue::base`].
    pub fn base(&self) -> u32 {
        match self {
            Ring::Split(queue) => u32::from(queue.next_avail()),
            Ring::Packed(queue) => queue.base(),
        }
    }

    /// See [`SplitQueue::pop`].
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        both!(self, queue => queue.pop(chain))
    }

    /// Put back the chain that was popped last.
    pub fn unpop(&mut self, token: Token) -> Result<(), Broken> {
        both!(self, queue => queue.unpop(token))
    }

    /// See [`SplitQueue::push_used`].
    #[inline]
    pub fn push_used(&mut self, token: Token, written: u32) -> Result<(), Broken> {
        both!(self, queue => queue.push_used(token, written))
    }

    /// See [`SplitQueue::publish`].
    #[inline]
    pub fn publish(&mut self) -> Result<bool, Broken> {
        both!(self, queue => queue.publish())
    }

    /// See [`SplitQueue::arm`].
    pub fn arm(&mut self) -> Result<bool, Broken> {
        both!(self, queue => queue.arm())
    }

    /// See [`SplitQueue::disarm`].
    pub fn disarm(&mut self) {
        both!(self, queue => queue.disarm());
    }
}
