//! What a transport asks of the device: registers, resets, memory, interrupts and its state.

use super::*;

impl Function for Device {
    fn region(&self, region: Region) -> RegionInfo {
        match region {
            Region::BAR0 => RegionInfo {
                size_bytes: BAR0_BYTES,
                is_readable: true,
                is_writable: true,
                mappable: match self.doorbells {
                    Doorbells::Mapped => {
                        vec![Area { offset: DOORBELLS_AT, len_bytes: DOORBELLS_BYTES }]
                    }
                    Doorbells::Trapped => Vec::new(),
                },
            },
            Region::BAR4 => RegionInfo {
                size_bytes: LAYOUT.bar4_bytes(),
                is_readable: true,
                is_writable: true,
                mappable: Vec::new(),
            },
            Region::CONFIG => RegionInfo {
                size_bytes: pci::CONFIG_BYTES as u64,
                is_readable: true,
                is_writable: true,
                mappable: Vec::new(),
            },
            _ => RegionInfo::default(),
        }
    }

    fn region_fd(&self, region: Region) -> Option<BorrowedFd<'_>> {
        let is_there = region == Region::BAR0 && self.doorbells == Doorbells::Mapped;
        is_there.then(|| self.record.doorbells())
    }

    fn vectors(&self, irq: Irq) -> u32 {
        match irq {
            Irq::Intx => 1,
            Irq::Msix => u32::from(VECTORS),
        }
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        if region != Region::CONFIG && !self.pci.is_powered() {
            // In D3hot a function answers to configuration space alone.
            return data.fill(0xff);
        }
        match region {
            Region::BAR0 => {}
            Region::BAR4 => {
                let table = usize::try_from(offset).ok().and_then(|at| self.msix_table.get(at..));
                let table = table.unwrap_or_default();
                let len = data.len().min(table.len());
                data.fill(0);
                data[..len].copy_from_slice(&table[..len]);
                return;
            }
            _ => {
                let is_pending = self.is_intx_pending();
                self.pci.set_intx_pending(is_pending);
                return self.pci.read(offset, data);
            }
        }
        for (at, byte) in (offset..).zip(data) {
            // Doorbells are for writing.
            let register = if at < DOORBELLS_AT { at as u32 } else { 0xffc };
            let value = self.controller.register_read(register & !3);
            *byte = value.to_le_bytes()[(at & 3) as usize];
        }
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> Step {
        if region != Region::CONFIG && !self.pci.is_powered() {
            return Step::Done;
        }
        match region {
            Region::BAR0 if self.is_being_remade() => return Step::Done,
            Region::BAR0 => {}
            Region::BAR4 => {
                let table = VECTORS as usize * pci::MSIX_ENTRY_BYTES as usize;
                for (at, byte) in (offset..).zip(data).filter(|(at, _)| *at < table as u64) {
                    self.msix_table[at as usize] = *byte;
                }
                return Step::Done;
            }
            _ => {
                let changes = self.pci.write(offset, data);
                if changes.starts_flr {
                    self.reset_queues(After::FunctionLevel);
                    return Step::Pending;
                }
                if changes.command || changes.msix || changes.power {
                    self.route_interrupts();
                }
                self.save_controller();
                return Step::Done;
            }
        }
        // "Accesses shall be aligned dwords or qwords": others are dropped.
        if !offset.is_multiple_of(4) || !matches!(data.len(), 4 | 8) {
            return Step::Done;
        }
        for (at, dword) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes(dword.try_into().unwrap_or([0; 4]));
            if at < DOORBELLS_AT {
                self.register_write(at as u32, value);
            } else {
                self.doorbell_write(at, value);
            }
        }
        Step::Done
    }

    fn reset(&mut self, reset: Reset) -> Step {
        let Reset::Conventional = reset;
        self.reset_queues(After::Function);
        Step::Pending
    }

    fn set_memory(&mut self, memory: &GuestMemory, has_removed: bool) -> Step {
        self.memory = memory.clone();
        let all = self.all();
        // Memory that was added is to be there before the guest is told that it is.
        self.begin(Purpose::Call, all, || Action::SetMemory {
            memory: memory.clone(),
            has_removed,
        });
        self.rebuild();
        self.run_admin();
        Step::Pending
    }

    fn set_trigger(&mut self, irq: Irq, vector: u32, eventfd: Option<Arc<OwnedFd>>) {
        self.vectors.change(|setup| match irq {
            Irq::Intx => {
                setup.intx = eventfd;
                setup.intx_masked = false;
            }
            Irq::Msix => {
                if let Some(entry) = setup.msix.get_mut(vector as usize) {
                    *entry = eventfd;
                }
            }
        });
        self.route_interrupts();
    }

    fn set_masked(&mut self, irq: Irq, vector: u32, is_masked: bool) {
        self.vectors.change(|setup| match irq {
            Irq::Intx => setup.intx_masked = is_masked,
            Irq::Msix => {
                if let Some(entry) = setup.msix_masked.get_mut(vector as usize) {
                    *entry = is_masked;
                }
            }
        });
        self.wake_cores();
        self.raise_admin();
    }

    fn trigger(&mut self, irq: Irq, vector: u32) {
        let eventfd = self.vectors.change(|setup| match irq {
            Irq::Intx => setup.intx.clone(),
            Irq::Msix => setup.msix.get(vector as usize).cloned().flatten(),
        });
        if let Some(eventfd) = eventfd {
            signal(&eventfd);
        }
    }

    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) -> Step {
        self.dirty = log.clone();
        let all = self.all();
        self.begin(Purpose::Call, all, || Action::SetDirtyLog(log.clone()));
        Step::Pending
    }

    fn set_running(&mut self, is_running: bool) -> Step {
        self.is_running = is_running;
        let all = self.all();
        self.begin(Purpose::Call, all, || Action::SetRunning(is_running));
        self.rebuild();
        self.run_admin();
        Step::Pending
    }

    fn save(&mut self) -> Vec<u8> {
        self.save_controller();
        let mut state = SAVED_MAGIC.to_vec();
        let record = self.record.view();
        for part in [&record.controller().unwrap_or_default(), &save_queues(&record)] {
            state.extend_from_slice(&(part.len() as u32).to_le_bytes());
            state.extend_from_slice(part);
        }
        state
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        // Its queues would be there beside those of the state.
        if self.is_in_use() {
            return Err(BadState::InUse);
        }
        let rest = state.strip_prefix(SAVED_MAGIC).ok_or(BadState::Unknown)?;
        let (controller, rest) = part(rest).ok_or(BadState::Damaged)?;
        let (queues, rest) = part(rest).ok_or(BadState::Damaged)?;
        if !rest.is_empty() {
            return Err(BadState::Damaged);
        }
        let record = self.record.view();
        record.clear_queues();
        restore_queues(&record, queues).ok_or(BadState::Damaged)?;
        let restored = self.take_up(controller);
        if restored.is_err() {
            record.clear_queues();
            self.pci.reset();
            let now = self.now();
            self.controller.function_reset(now);
        }
        self.save_controller();
        restored
    }

    fn detach(&mut self) -> Step {
        // What was pending is answered by this.
        self.said.clear();
        for one in self.outstanding.values_mut() {
            if matches!(one.purpose, Purpose::Call) {
                one.purpose = Purpose::None;
            }
        }
        self.is_to_be_rebuilt = false;
        self.reset_queues(After::Detach);
        Step::Pending
    }

    fn poll(&mut self) -> Option<Said> {
        while let Ok(event) = self.events.try_recv() {
            self.on_event(event);
        }
        self.cores.iter_mut().for_each(Core::flush);
        self.said.pop_front()
    }
}
