//! The admin queue: where it is, and what its commands are doing.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::Ordering::Release;

use iobuf::GuestView;
use nvme::ctrl::AdminQueues;
use nvme::spec::{Sqe, Status};

/// Commands of the admin queue at a time.
pub(crate) const ADMIN_SLOTS: u16 = 64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum AdminSlot {
    #[default]
    Free,
    /// Held, or waits for the cores.
    Busy,
    /// To be posted.
    Done { status: Status, result: u64 },
}

/// The admin queue.
#[derive(Debug, Default)]
pub(crate) struct Admin {
    pub(crate) queues: Option<AdminQueues>,
    pub(crate) fetched: u64,
    pub(crate) tail: u64,
    pub(crate) head: u64,
    pub(crate) slots: Vec<AdminSlot>,
    pub(crate) sqes: Vec<Sqe>,
    pub(crate) backlog: VecDeque<u16>,
    pub(crate) is_pending: bool,
    pub(crate) bad_tail: Option<u32>,
}

impl Admin {
    pub(crate) fn new(queues: AdminQueues) -> Admin {
        Admin {
            queues: Some(queues),
            slots: vec![AdminSlot::Free; usize::from(ADMIN_SLOTS)],
            sqes: vec![Sqe::default(); usize::from(ADMIN_SLOTS)],
            ..Admin::default()
        }
    }

    /// The host has consumed entries up to this index, if there is such an entry.
    pub(crate) fn see_head(&mut self, index: u32) {
        let Some(queues) = self.queues else { return };
        let entries = u64::from(queues.cq_entries);
        let step = (u64::from(index) + entries - self.head % entries) % entries;
        if index < queues.cq_entries && self.head + step <= self.tail {
            self.head += step;
        }
    }
}

/// Phase of an entry at this position: 1 in the first lap, then in turns.
pub(crate) fn phase(position: u64, entries: u32) -> u16 {
    ((position / u64::from(entries) + 1) & 1) as u16
}

/// Writes a completion of the admin queue: its last dword, with the phase, after the rest.
pub(crate) fn write_cqe(
    view: &Rc<GuestView>,
    queues: &AdminQueues,
    position: u64,
    bytes: &[u8; 16],
) {
    let at = queues.cq_address + position % u64::from(queues.cq_entries) * 16;
    let [head @ .., a, b, c, d] = *bytes;
    if let Ok(entry) = view.slice(at, 16) {
        let _ = entry.write(0, &head);
        let _ = entry.store_u32(12, u32::from_le_bytes([a, b, c, d]), Release);
    }
}

/// Whether the entry at this position was written in this lap.
pub(crate) fn has_cqe(view: &Rc<GuestView>, queues: &AdminQueues, position: u64) -> bool {
    let at = queues.cq_address + position % u64::from(queues.cq_entries) * 16;
    let mut bytes = [0; 2];
    view.read(at + 14, &mut bytes).is_ok()
        && u16::from_le_bytes(bytes) & 1 == phase(position, queues.cq_entries)
}
