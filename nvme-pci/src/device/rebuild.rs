//! Going on as a predecessor: its queues, and the admin commands it had not completed.

use super::*;

impl Device {
    /// Takes up a saved controller; its queues follow when there is memory.
    pub(super) fn take_up(&mut self, saved: &[u8]) -> Result<(), BadState> {
        let now = self.now();
        let (pci, controller) = saved.split_first_chunk().ok_or(BadState::Damaged)?;
        if !self.pci.restore(pci) {
            return Err(BadState::Mismatch);
        }
        self.controller.restore(controller, now).ok_or(BadState::Damaged)?;
        self.is_to_be_rebuilt = true;
        self.rebuild();
        Ok(())
    }

    /// Serves the queues of the record, once their memory is there.
    pub(super) fn rebuild(&mut self) {
        // Where queues can be is known when the volumes have been opened.
        if !self.is_to_be_rebuilt || self.is_taking() {
            return;
        }
        let Some(queues) = self.controller.admin_queues() else {
            // Nothing was enabled.
            self.is_to_be_rebuilt = false;
            self.route_interrupts();
            return;
        };
        let view = self.memory.view();
        let sq = view.slice(queues.sq_address, u64::from(queues.sq_entries) * 64);
        let cq = view.slice(queues.cq_address, u64::from(queues.cq_entries) * 16);
        if sq.is_err() || cq.is_err() || !self.is_running {
            return;
        }
        self.is_to_be_rebuilt = false;
        let record = self.record.view();
        if self.controller.is_ending() {
            // It was in the middle of a reset or shutdown: nothing of the queues matters, or they
            // have to be drained as the predecessor would have.
            if !self.is_enabled() {
                self.reset_queues(After::Controller);
                return;
            }
        }
        self.admin = Admin::new(queues);
        let saved = record.cq(0).map_or(0, |cq| cq.tail);
        self.admin.tail = saved;
        self.admin.head = saved.saturating_sub(u64::from(queues.cq_entries) - 1);
        self.admin.fetched = record.sq(0).map_or(0, |sq| sq.fetched);
        for qid in 1..QUEUES_MAX {
            let Some(cq) = record.cq(qid) else { continue };
            let Some(core) = self.place(qid) else { continue };
            let coalescing = cq.vector.map(|v| self.controller.coalescing(v)).unwrap_or_default();
            self.controller.queue_changed(&QueueChange::CreateCq(nvme::ctrl::CqConfig {
                qid,
                entries: u32::from(cq.entries),
                address: cq.address,
                is_contiguous: cq.is_contiguous,
                vector: cq.vector,
            }));
            self.begin(Purpose::None, vec![core], || Action::CreateCq {
                qid,
                cq,
                coalescing,
                is_recovered: true,
            });
        }
        for qid in 1..QUEUES_MAX {
            let Some(sq) = record.sq(qid) else { continue };
            let core = self.cq_cores.get(&sq.cqid).copied().unwrap_or(0);
            self.controller.queue_changed(&QueueChange::CreateSq(nvme::ctrl::SqConfig {
                qid,
                entries: u32::from(sq.entries),
                address: sq.address,
                is_contiguous: sq.is_contiguous,
                cqid: sq.cqid,
            }));
            self.begin(Purpose::None, vec![core], || Action::CreateSq {
                qid,
                sq,
                is_recovered: true,
            });
        }
        let mut found: Vec<_> =
            (0..ADMIN_SLOTS).filter_map(|slot| Some((slot, record.slot(0, slot)?))).collect();
        found.sort_by_key(|(_, slot)| slot.seq);
        for (slot, saved) in found {
            self.admin.fetched = self.admin.fetched.max(saved.seq);
            if saved.post != 0 {
                let position = saved.post - 1;
                if position >= self.admin.tail {
                    if !has_cqe(&view, &queues, position) {
                        write_cqe(&view, &queues, position, &saved.cqe);
                    }
                    self.admin.tail = position + 1;
                    let oldest = self.admin.tail.saturating_sub(u64::from(queues.cq_entries) - 1);
                    self.admin.head = self.admin.head.max(oldest);
                    record.set_tail(0, self.admin.tail);
                }
                record.free(0, slot);
                continue;
            }
            self.start_command(slot, &Sqe::from_bytes(&saved.sqe), true);
        }
        if self.controller.is_ending() {
            let all = self.all();
            self.begin(Purpose::Shutdown, all, || Action::Shutdown);
        }
        self.admin.is_pending = true;
        self.route_interrupts();
        self.run_admin();
    }
}
