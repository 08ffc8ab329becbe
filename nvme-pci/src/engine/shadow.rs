//! Doorbells in guest memory, and the event indexes by which a host knows whether to ring.

use super::*;

impl Engine {
    /// Doorbells are in guest memory from now on, or no more. False if there is none there.
    pub fn set_shadow(&mut self, shadow: Option<(u64, u64)>) -> bool {
        self.bind_shadow(shadow, true)
    }

    pub(super) fn bind_shadow(&mut self, shadow: Option<(u64, u64)>, is_new: bool) -> bool {
        self.shadow = None;
        self.is_shadowed = shadow.is_some();
        let Some((doorbells, event_idx)) = shadow else { return true };
        let (Ok(doorbells), Ok(events)) =
            (self.view.slice(doorbells, 4096), self.view.slice(event_idx, 4096))
        else {
            return false;
        };
        if is_new {
            // A host that has rung doorbells already goes on from there.
            for (qid, is_cq) in self.doorbells() {
                let value = self.record.doorbell(qid, is_cq);
                let _ = doorbells.store_u32(shadow_at(qid, is_cq), value, Release);
            }
        }
        self.shadow = Some((doorbells, events, event_idx));
        self.disarm();
        true
    }

    fn doorbells(&self) -> Vec<(u16, bool)> {
        let sqs = self.sqs.iter().map(|sq| (sq.qid, false));
        sqs.chain(self.cqs.iter().map(|cq| (cq.qid, true))).collect()
    }

    pub(super) fn clear_shadow(&self, qid: u16, is_cq: bool) {
        if let Some((doorbells, events, _)) = &self.shadow {
            let _ = doorbells.store_u32(shadow_at(qid, is_cq), 0, Release);
            let _ = events.store_u32(shadow_at(qid, is_cq), 0, Release);
        }
    }

    /// Writes the event index of a doorbell: the value that the host rings for when it passes it.
    pub(super) fn put_event_idx(&self, qid: u16, is_cq: bool, value: u32) {
        let Some((_, events, address)) = &self.shadow else { return };
        let _ = events.store_u32(shadow_at(qid, is_cq), value, Relaxed);
        if let Some(log) = &self.dirty {
            log.mark(*address, 4096);
        }
    }

    /// Whether all that a guest has to say of its queues is in its memory: whoever looks there now and
    /// then need not be told.
    pub fn is_fed_by_memory(&self) -> bool {
        self.shadow.is_some() && !self.sqs.is_empty()
    }

    /// Asks to be told of the next command, by doorbells that are not in guest memory. True: there
    /// is work already.
    pub fn arm(&mut self) -> bool {
        if self.shadow.is_some() {
            self.tell_event_idx(true);
            // The event index must be seen before the doorbells are looked at: the host writes the
            // doorbell, then looks at the index.
            fence(SeqCst);
        }
        self.has_work()
    }

    /// No need to be told.
    pub fn disarm(&mut self) {
        if self.shadow.is_some() {
            self.tell_event_idx(false);
        }
    }

    fn tell_event_idx(&mut self, is_wanted: bool) {
        let Some((_, events, address)) = &self.shadow else { return };
        for sq in &mut self.sqs {
            sq.told = sq.fetched;
            let value = match is_wanted {
                true => (sq.fetched % u64::from(sq.entries)) as u32,
                false => behind(sq.fetched, sq.entries),
            };
            let _ = events.store_u32(shadow_at(sq.qid, false), value, Relaxed);
        }
        for cq in &mut self.cqs {
            cq.told = cq.head;
            // Only a full queue waits for its host.
            let value = match is_wanted && !cq.backlog.is_empty() {
                true => (cq.head % u64::from(cq.entries)) as u32,
                false => behind(cq.head, cq.entries),
            };
            let _ = events.store_u32(shadow_at(cq.qid, true), value, Relaxed);
        }
        if let Some(log) = &self.dirty {
            log.mark(*address, 4096);
        }
    }
}

#[inline]
pub(super) fn shadow_at(qid: u16, is_cq: bool) -> usize {
    8 * usize::from(qid) + if is_cq { 4 } else { 0 }
}

/// An event index that was passed just now: "an event if the index is passed", and this one is not
/// again before the doorbell has gone almost once around.
#[inline]
pub(super) fn behind(position: u64, entries: u32) -> u32 {
    ((position + u64::from(entries) - 1) % u64::from(entries)) as u32
}

/// Whether a doorbell has come so far since its event index was written that the index has to
/// follow, or the host would ring for it in the next lap though nobody sleeps.
#[inline]
pub(super) fn is_far(steps: u64, entries: u32) -> bool {
    steps > 0 && steps >= u64::from(entries / 4)
}
