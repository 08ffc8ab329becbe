//! A completion queue as its core sees it.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

use nvme::ctrl::Coalescing;
use nvme::spec::Status;

use crate::queue::{Place, Ring};
use crate::record::step;

pub(super) struct Cq {
    pub(super) qid: u16,
    pub(super) entries: u32,
    pub(super) place: Place,
    pub(super) ring: Option<Ring>,
    pub(super) vector: Option<u16>,
    pub(super) tail: u64,
    pub(super) head: u64,
    /// What `head` was when the event index was written last.
    pub(super) told: u64,
    pub(super) bad_head: u32,
    pub(super) backlog: VecDeque<Done>,
    pub(super) coalescing: Coalescing,
    /// Posted since the vector was raised, and when the first of them was.
    pub(super) untold: u32,
    pub(super) untold_since: Duration,
    /// The vector could not be raised.
    pub(super) is_pending: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) sqid: u16,
    pub(super) slot: u16,
    pub(super) status: Status,
    pub(super) result: u32,
}

impl Cq {
    /// Phase of an entry at this position: 1 in the first lap, then in turns.
    pub(super) fn phase(&self, position: u64) -> u16 {
        ((position / u64::from(self.entries) + 1) & 1) as u16
    }

    /// "The queue is full when the head is one more than the tail": one entry stays free.
    pub(super) fn is_full(&self) -> bool {
        self.tail - self.head >= u64::from(self.entries) - 1
    }

    /// The host has consumed entries up to this index. False if there is no such entry.
    pub(super) fn see_head(&mut self, index: u32) -> bool {
        if index >= self.entries {
            return false;
        }
        let entries = u64::from(self.entries);
        let step = (u64::from(index) + entries - self.head % entries) % entries;
        if self.head + step > self.tail {
            return false;
        }
        self.head += step;
        self.bad_head = u32::MAX;
        true
    }

    /// Writes an entry: its last dword, with the phase, after the rest.
    pub(super) fn write(&self, position: u64, bytes: &[u8; 16]) {
        let index = (position % u64::from(self.entries)) as u32;
        if let Some((piece, offset)) = self.ring.as_ref().and_then(|ring| ring.entry(index)) {
            let [head @ .., a, b, c, d] = *bytes;
            step();
            let _ = piece.write(offset, &head);
            step();
            let _ = piece.store_u32(offset + 12, u32::from_le_bytes([a, b, c, d]), Release);
        }
    }

    /// Whether the entry at this position was written in this lap.
    pub(super) fn has(&self, position: u64) -> bool {
        let index = (position % u64::from(self.entries)) as u32;
        let entry = self.ring.as_ref().and_then(|ring| ring.entry(index));
        let last = entry.and_then(|(piece, at)| piece.load_u32(at + 12, Acquire).ok());
        last.is_some_and(|last| (last >> 16 & 1) as u16 == self.phase(position))
    }
}
