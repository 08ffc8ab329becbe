//! A function that does nothing of its own: it remembers what it was told, holds the transport to
//! the contract, and lets a test decide which calls take time.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iobuf::GuestMemory;
use reactor::unix::signal;

use super::client::memfd;
use crate::dirty::DirtyLog;
use crate::function::{Area, BadState, Event, Function, Irq, Region, RegionInfo, Reset, Step};
use crate::pci::{ConfigSpace, Ids, Layout};

/// What a function was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// `write`.
    Write(Region, u64, Vec<u8>),
    /// `reset`.
    Reset,
    /// `set_memory`: guest address and bytes of each region, and whether some have gone.
    SetMemory(Vec<(u64, u64)>, bool),
    /// `set_trigger`, and whether there is one now.
    SetTrigger(Irq, u32, bool),
    /// `set_masked`.
    SetMasked(Irq, u32, bool),
    /// `trigger`.
    Trigger(Irq, u32),
    /// `set_dirty_log`, and whether there is one now.
    SetDirtyLog(bool),
    /// `set_running`.
    SetRunning(bool),
    /// `restore`.
    Restore(Vec<u8>),
    /// `detach`.
    Detach,
}

/// The function. Its BAR0 is memory, with the doorbell page at 1000h in a file.
pub struct ModelFunction {
    /// Everything it was told, reads excepted.
    pub calls: Vec<Call>,
    /// Calls that can be pending are.
    pub is_slow: bool,
    /// `poll` says that a pending call is done.
    pub can_finish: bool,
    /// `poll` says that the function has failed, once.
    pub has_failed: bool,
    /// Runs; false while stopped.
    pub is_running: bool,
    /// What it can reach.
    pub memory: GuestMemory,
    /// What it logs writes to.
    pub log: Option<Arc<DirtyLog>>,
    /// Configuration space.
    pub config: ConfigSpace,
    /// Eventfds by vector.
    pub triggers: BTreeMap<(u32, u32), Arc<OwnedFd>>,
    /// Bytes of BAR0.
    pub bar0: Vec<u8>,
    bar4: Vec<u8>,
    doorbells: OwnedFd,
    is_pending: bool,
}

const LAYOUT: Layout = Layout {
    ids: Ids { vendor: 1, device: 2, subsystem_vendor: 3, subsystem: 4, revision: 5 },
    bar0_bytes: 0x4000,
    msix_vectors: 9,
};

impl Default for ModelFunction {
    fn default() -> ModelFunction {
        ModelFunction {
            calls: Vec::new(),
            is_slow: false,
            can_finish: false,
            has_failed: false,
            is_running: true,
            memory: GuestMemory::default(),
            log: None,
            config: ConfigSpace::new(&LAYOUT),
            triggers: BTreeMap::new(),
            bar0: vec![0; LAYOUT.bar0_bytes as usize],
            bar4: vec![0; LAYOUT.bar4_bytes() as usize],
            doorbells: memfd(LAYOUT.bar0_bytes),
            is_pending: false,
        }
    }
}

impl ModelFunction {
    /// A call is pending.
    pub fn is_pending(&self) -> bool {
        self.is_pending
    }

    /// Signal a vector, if somebody listens.
    pub fn raise(&self, irq: Irq, vector: u32) {
        if let Some(trigger) = self.triggers.get(&(irq as u32, vector)) {
            signal(&**trigger);
        }
    }

    fn call(&mut self, call: Call) -> Step {
        assert!(!self.is_pending || call == Call::Detach, "{call:?} while another is pending");
        self.calls.push(call);
        self.is_pending = self.is_slow;
        if self.is_slow { Step::Pending } else { Step::Done }
    }

    fn bytes(&mut self, region: Region) -> &mut [u8] {
        match region {
            Region::BAR0 => &mut self.bar0,
            _ => &mut self.bar4,
        }
    }
}

impl Function for ModelFunction {
    fn region(&self, region: Region) -> RegionInfo {
        let size_bytes = match region {
            Region::BAR0 => LAYOUT.bar0_bytes,
            Region::BAR4 => LAYOUT.bar4_bytes(),
            Region::CONFIG => crate::pci::CONFIG_BYTES as u64,
            _ => return RegionInfo::default(),
        };
        let doorbells = Area { offset: 0x1000, len_bytes: 0x1000 };
        let mappable = if region == Region::BAR0 { vec![doorbells] } else { Vec::new() };
        RegionInfo { size_bytes, is_readable: true, is_writable: true, mappable }
    }

    fn region_fd(&self, region: Region) -> Option<BorrowedFd<'_>> {
        (region == Region::BAR0).then(|| self.doorbells.as_fd())
    }

    fn vectors(&self, irq: Irq) -> u32 {
        match irq {
            Irq::Intx => 1,
            Irq::Msix => LAYOUT.msix_vectors.into(),
        }
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        if region == Region::CONFIG {
            return self.config.read(offset, data);
        }
        let from = offset as usize;
        data.copy_from_slice(&self.bytes(region)[from..from + data.len()]);
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> Step {
        let step = self.call(Call::Write(region, offset, data.to_vec()));
        if region == Region::CONFIG {
            if self.config.write(offset, data).starts_flr {
                self.config.reset_function();
            }
            return step;
        }
        let from = offset as usize;
        self.bytes(region)[from..from + data.len()].copy_from_slice(data);
        step
    }

    fn reset(&mut self, _: Reset) -> Step {
        self.config.reset();
        self.bar0.fill(0);
        self.call(Call::Reset)
    }

    fn set_memory(&mut self, memory: &GuestMemory, has_removed: bool) -> Step {
        self.memory = memory.clone();
        let regions = memory.regions().iter().map(|r| (r.guest_addr(), r.len())).collect();
        self.call(Call::SetMemory(regions, has_removed))
    }

    fn set_trigger(&mut self, irq: Irq, vector: u32, eventfd: Option<Arc<OwnedFd>>) {
        assert!(vector < self.vectors(irq));
        self.calls.push(Call::SetTrigger(irq, vector, eventfd.is_some()));
        match eventfd {
            Some(eventfd) => self.triggers.insert((irq as u32, vector), eventfd),
            None => self.triggers.remove(&(irq as u32, vector)),
        };
    }

    fn set_masked(&mut self, irq: Irq, vector: u32, is_masked: bool) {
        assert!(vector < self.vectors(irq));
        self.calls.push(Call::SetMasked(irq, vector, is_masked));
    }

    fn trigger(&mut self, irq: Irq, vector: u32) {
        assert!(vector < self.vectors(irq));
        self.calls.push(Call::Trigger(irq, vector));
        self.raise(irq, vector);
    }

    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) -> Step {
        self.log = log;
        self.call(Call::SetDirtyLog(self.log.is_some()))
    }

    fn set_running(&mut self, is_running: bool) -> Step {
        assert_ne!(self.is_running, is_running, "a change is a change");
        self.is_running = is_running;
        self.call(Call::SetRunning(is_running))
    }

    fn save(&mut self) -> Vec<u8> {
        assert!(!self.is_running && !self.is_pending);
        self.bar0.clone()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        assert!(!self.is_running && !self.is_pending);
        self.calls.push(Call::Restore(state.to_vec()));
        if state.len() != self.bar0.len() {
            return Err(BadState::Mismatch);
        }
        self.bar0.copy_from_slice(state);
        Ok(())
    }

    fn detach(&mut self) -> Step {
        self.memory = GuestMemory::default();
        self.triggers.clear();
        self.log = None;
        self.is_running = true;
        self.config.reset();
        self.bar0.fill(0);
        self.call(Call::Detach)
    }

    fn poll(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.has_failed) {
            return Some(Event::Failed);
        }
        (self.can_finish && std::mem::take(&mut self.is_pending)).then_some(Event::Done)
    }
}
