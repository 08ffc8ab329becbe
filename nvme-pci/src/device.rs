//! The device: registers, the admin queue, and what the cores are told to do. Lives on the control
//! thread, as the [`Function`] that a transport connects.
//!
//! ```text
//!   BAR0, admin queue ─► nvme::ctrl::Controller ─► Action ─► worker::CoreTask (one per core)
//!   completion, CSTS  ◄─ finish(purpose) ◄─ all cores have answered ◄─ Event
//! ```
//!
//! What needs other cores is begun with a `Purpose` and goes on when all have answered. A reset
//! makes everything of before pointless: answers to what was begun under an older *epoch* are
//! counted and nothing more.

mod function;
mod namespaces;
mod rebuild;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use block::{Volume, Wear};
use iobuf::GuestMemory;
use nvme::ctrl::{
    ABORT_NOT_DONE, AdminOutcome, AdminQueues, Controller, ControllerConfig, ControllerKind,
    ErrorRecord, HealthCounters, QueueChange, RegisterEffect,
};
use nvme::spec::{AdminOpcode, Cqe, LogPage, Nqn, Property, Sqe, Status};
use nvme::subsys::SubsystemInfo;
use nvme::xfer::{Copying, walk};
use reactor::CoreHandle;

use crate::admin::{ADMIN_SLOTS, Admin, AdminSlot, has_cqe, phase, write_cqe};
use crate::dirty::DirtyLog;
use crate::engine::{Counters, Notice};
use crate::function::{
    Area, BadState, Event as Said, Function, Irq, Region, RegionInfo, Reset, Step,
};
use crate::msix::{Interrupts, VECTORS, Vectors, signal};
use crate::pci;
use crate::record::{CqRecord, DOORBELLS_AT, DOORBELLS_BYTES, QUEUES_MAX, Record, SqRecord};
use crate::saved::{part, restore_queues, save_queues};
use crate::vfio_user::server::ClientState;
use crate::worker::{Action, Attached, Command, CoreState, Event};
use crate::{AttachError, DeviceState, Doorbells, NamespaceState, QueueState};

/// What a saved device begins with.
const SAVED_MAGIC: &[u8] = b"penstock nvme 1\0";
/// Bytes of BAR0: a page of registers and one of doorbells.
const BAR0_BYTES: u64 = 0x2000;
/// Commands taken from the admin queue before the client is looked at again.
const ADMIN_TURN: usize = 64;

/// Identity and size of the function.
const LAYOUT: pci::Layout = pci::Layout {
    ids: pci::Ids {
        // What SPDK's vfio-user controller has. Drivers go by the class code, and none has a quirk
        // for these numbers; Linux ignores the namespaces' identifiers of those that QEMU's own
        // controller has (1b36:0010).
        vendor: 0x4e58,
        device: 0x0001,
        subsystem_vendor: 0x4e58,
        subsystem: 0x0001,
        revision: 1,
    },
    bar0_bytes: BAR0_BYTES,
    msix_vectors: VECTORS,
};

const TRANSFER: Status = Status::DATA_TRANSFER_ERROR.dnr();

/// What is to be done when all cores have answered.
#[derive(Clone, Debug)]
enum Purpose {
    /// Nothing.
    None,
    /// A queue was created or deleted for an admin command.
    Queue { slot: u16, change: QueueChange },
    /// Doorbell Buffer Config.
    Shadow { slot: u16 },
    /// Abort: whether a core has found the command.
    Abort { slot: u16 },
    /// A log page of counters, for an admin command.
    Health { slot: u16 },
    /// CC.EN was cleared, or the whole function reset.
    Reset(After),
    /// CC.SHN.
    Shutdown,
    /// The transport waits.
    Call,
    /// An operator waits.
    State { sender: mpsc::Sender<DeviceState>, is_connected: bool },
    /// An operator waits for what was begun before.
    Told(mpsc::Sender<Result<(), AttachError>>),
    /// Other namespaces are in use: tell the controller.
    Namespaces(Taking),
}

/// Namespaces that the cores are taking up.
#[derive(Clone, Debug)]
struct Taking {
    subsys: Arc<SubsystemInfo>,
    /// Volumes that could not be opened: the core, the namespace and why.
    failed: Vec<(usize, u32, String)>,
    /// Operators who wait for it.
    told: Vec<mpsc::Sender<Result<(), AttachError>>>,
}

/// What a reset was for, in the order in which one includes another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum After {
    /// CC.EN.
    Controller,
    /// NSSR.
    Subsystem,
    /// Function-level reset; the transport waits.
    FunctionLevel,
    /// Conventional reset; the transport waits.
    Function,
    /// The client is gone; the transport waits.
    Detach,
}

struct Outstanding {
    purpose: Purpose,
    epoch: u64,
    cores: Vec<usize>,
    outcome: Result<(), Status>,
    states: Vec<CoreState>,
}

struct Core {
    handle: CoreHandle,
    commands: reactor::Sender<Command>,
    /// What its mailbox had no room for.
    outbox: VecDeque<Command>,
    is_gone: bool,
    /// Completion queues placed there.
    queues: usize,
    /// Namespaces whose volumes cannot be opened there.
    missing: Vec<u32>,
}

/// What a device is made of.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) subsys: SubsystemInfo,
    pub(crate) attached: Vec<Attached>,
    pub(crate) record: Record,
    pub(crate) vectors: Arc<Vectors>,
    pub(crate) doorbells: Doorbells,
    pub(crate) cores: Vec<(CoreHandle, reactor::Sender<Command>)>,
    pub(crate) events: mpsc::Receiver<Event>,
}

/// An NVMe controller as a PCI function. See the [module](self).
pub struct Device {
    name: String,
    controller: Controller,
    subsys: Arc<SubsystemInfo>,
    attached: Vec<Attached>,
    pci: pci::ConfigSpace,
    /// BAR4. Vectors and masks are the client's affair; the guest's table is kept for who reads it.
    msix_table: Vec<u8>,
    record: Record,
    vectors: Arc<Vectors>,
    interrupts: Interrupts,
    doorbells: Doorbells,
    memory: GuestMemory,
    dirty: Option<Arc<DirtyLog>>,
    admin: Admin,
    cores: Vec<Core>,
    events: mpsc::Receiver<Event>,
    outstanding: BTreeMap<u64, Outstanding>,
    next_op: u64,
    epoch: u64,
    /// The reset that is under way.
    resetting: Option<u64>,
    /// Core of each completion queue.
    cq_cores: BTreeMap<u16, usize>,
    /// What the transport is to hear.
    said: VecDeque<Said>,
    is_running: bool,
    /// What the cores were told last of the right to use the guest's memory.
    is_master: bool,
    /// Queues of the record wait for memory to be served from.
    is_to_be_rebuilt: bool,
    started: Instant,
    /// How old the device was then, and what predecessors had counted.
    age: Duration,
    inherited: Counters,
    out: Vec<u8>,
}

fn new_controller(subsys: &Arc<SubsystemInfo>, now: Duration) -> Controller {
    let config = ControllerConfig {
        cntlid: 1,
        kind: ControllerKind::Io,
        hostnqn: Nqn::discovery(),
        hostid: [0; 16],
        kato: Duration::ZERO,
        subsys: Arc::clone(subsys),
    };
    Controller::new(config, now)
}

impl Device {
    pub(crate) fn new(parts: Parts) -> Device {
        let subsys = Arc::new(parts.subsys);
        let cores = parts.cores.into_iter().map(|(handle, commands)| Core {
            handle,
            commands,
            outbox: VecDeque::new(),
            is_gone: false,
            queues: 0,
            missing: Vec::new(),
        });
        let (age, inherited) = {
            let record = parts.record.view();
            (record.age(), record.inherit_counters())
        };
        let mut device = Device {
            name: parts.name,
            controller: new_controller(&subsys, Duration::ZERO),
            subsys,
            attached: parts.attached,
            pci: pci::ConfigSpace::new(&LAYOUT),
            msix_table: vec![0; LAYOUT.bar4_bytes() as usize],
            record: parts.record,
            interrupts: Interrupts::new(Arc::clone(&parts.vectors)),
            vectors: parts.vectors,
            doorbells: parts.doorbells,
            memory: GuestMemory::default(),
            dirty: None,
            admin: Admin::default(),
            cores: cores.collect(),
            events: parts.events,
            outstanding: BTreeMap::new(),
            next_op: 0,
            epoch: 0,
            resetting: None,
            cq_cores: BTreeMap::new(),
            said: VecDeque::new(),
            is_running: true,
            is_master: true,
            is_to_be_rebuilt: false,
            started: Instant::now(),
            age,
            inherited,
            out: Vec::new(),
        };
        device.vectors.change(|_| ());
        device.follow_master();
        if let Err(error) = device.set_namespaces(device.attached.clone()) {
            tracing::warn!(device = %device.name, %error, "a volume has changed meanwhile");
        }
        if let Some(saved) = device.record.view().controller()
            && device.take_up(&saved).is_ok()
        {
            // The predecessor may have had others, or smaller ones.
            device.controller.namespaces_may_have_changed();
        }
        device
    }

    /// What was begun and not finished: for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Identifiers of the submission and completion queues that the host was told of, while it can
    /// use them; `None` while it cannot, or they change: for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn settled_queues(&self) -> Option<(Vec<u16>, Vec<u16>)> {
        let is_settled = self.outstanding.is_empty() && self.controller.is_ready();
        is_settled.then(|| self.controller.queue_ids())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    // Cores.

    fn begin(&mut self, purpose: Purpose, cores: Vec<usize>, mut action: impl FnMut() -> Action) {
        let op = self.next_op;
        self.next_op += 1;
        let cores: Vec<usize> =
            cores.into_iter().filter(|core| !self.cores[*core].is_gone).collect();
        for core in &cores {
            self.send(*core, Command::Do { op, action: action() });
        }
        let outstanding =
            Outstanding { purpose, epoch: self.epoch, cores, outcome: Ok(()), states: Vec::new() };
        self.outstanding.insert(op, outstanding);
        self.settle(op);
    }

    fn all(&self) -> Vec<usize> {
        (0..self.cores.len()).collect()
    }

    fn send(&mut self, core: usize, command: Command) {
        let core = &mut self.cores[core];
        core.outbox.push_back(command);
        core.flush();
    }

    fn wake_cores(&self) {
        for core in &self.cores {
            core.handle.wake();
        }
    }

    /// Goes on if all cores have answered.
    fn settle(&mut self, op: u64) {
        if self.outstanding.get(&op).is_some_and(|one| one.cores.is_empty())
            && let Some(done) = self.outstanding.remove(&op)
        {
            self.finish(done);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Done { core, op, outcome } => self.answered(core, op, outcome, None),
            Event::State { core, op, state } => self.answered(core, op, Ok(()), Some(*state)),
            Event::Admin => self.run_admin(),
            Event::Changed => {
                if let Err(error) = self.refresh() {
                    tracing::warn!(device = %self.name, %error, "a volume has become impossible");
                }
            }
            Event::Notice(Notice::BadDoorbell) => {
                self.controller.doorbell_error(false);
                self.run_admin();
            }
            Event::Notice(Notice::Failed(failure)) => {
                let block_bytes =
                    self.subsys.namespace(failure.nsid).map_or(1, |ns| u64::from(ns.block_bytes));
                self.controller.record_error(&ErrorRecord {
                    sqid: failure.sqid,
                    cid: failure.cid,
                    status: failure.status,
                    opcode: failure.opcode,
                    nsid: failure.nsid,
                    lba: failure.offset / block_bytes,
                });
            }
            Event::CannotOpen { core, op, nsid, error } => {
                if let Some(one) = self.outstanding.get_mut(&op)
                    && let Purpose::Namespaces(taking) = &mut one.purpose
                {
                    taking.failed.push((core, nsid, error));
                }
            }
            Event::Gone { core } => self.on_gone(core),
        }
    }

    /// A core answers no more, and what was in flight there does not come back. The host is told
    /// by CSTS.CFS and its client by an interrupt. After a reset it goes on with the other cores.
    fn on_gone(&mut self, core: usize) {
        tracing::error!(device = %self.name, core, "a core of the device has ended");
        self.cores[core].is_gone = true;
        let ops: Vec<u64> = self.outstanding.keys().copied().collect();
        for op in ops {
            if let Some(one) = self.outstanding.get_mut(&op)
                && one.cores.contains(&core)
            {
                one.cores.retain(|other| *other != core);
                if matches!(one.purpose, Purpose::Queue { .. }) {
                    one.outcome = Err(Status::INTERNAL_ERROR);
                }
            }
            self.settle(op);
        }
        self.controller.fail();
        self.said.push_back(Said::Failed);
    }

    fn answered(
        &mut self,
        core: usize,
        op: u64,
        outcome: Result<(), Status>,
        state: Option<CoreState>,
    ) {
        if let Some(one) = self.outstanding.get_mut(&op) {
            one.cores.retain(|other| *other != core);
            if one.outcome.is_ok() {
                one.outcome = outcome;
            }
            one.states.extend(state);
        }
        self.settle(op);
    }

    fn finish(&mut self, done: Outstanding) {
        let is_current = done.epoch == self.epoch;
        match done.purpose {
            Purpose::None => {}
            Purpose::Call => self.said.push_back(Said::Done),
            Purpose::State { sender, is_connected } => {
                let _ = sender.send(self.describe(is_connected, &done.states));
            }
            Purpose::Told(sender) => {
                let _ = sender.send(Ok(()));
            }
            Purpose::Namespaces(taking) => self.namespaces_taken(taking),
            Purpose::Reset(after) => {
                self.resetting = None;
                self.after_reset(after);
            }
            // The host did not wait for the end of the shutdown.
            Purpose::Shutdown if is_current && !self.is_enabled() => {
                self.reset_queues(After::Controller);
            }
            Purpose::Shutdown if is_current => {
                let now = self.now();
                self.controller.queues_closed(now);
                self.run_admin();
            }
            Purpose::Queue { slot, change } if is_current => {
                if done.outcome.is_ok() {
                    self.controller.queue_changed(&change);
                } else {
                    self.controller.queue_unchanged(&change);
                    if let QueueChange::CreateCq(cq) = change
                        && let Some(core) = self.cq_cores.remove(&cq.qid)
                    {
                        self.cores[core].queues -= 1;
                    }
                }
                self.complete(slot, done.outcome.err().unwrap_or(Status::SUCCESS), 0);
                self.run_admin();
            }
            Purpose::Shadow { slot } if is_current => {
                if done.outcome.is_err() {
                    self.record.view().set_shadow(None);
                    let all = self.all();
                    self.begin(Purpose::None, all, || Action::SetShadow(None));
                }
                self.complete(slot, done.outcome.err().unwrap_or(Status::SUCCESS), 0);
                self.run_admin();
            }
            Purpose::Abort { slot } if is_current => {
                self.controller.abort_done();
                let result = if done.outcome.is_ok() { 0 } else { ABORT_NOT_DONE };
                self.complete(slot, Status::SUCCESS, result);
                self.run_admin();
            }
            Purpose::Health { slot } if is_current => {
                let mut counters = sum(&done.states);
                counters.add(&self.inherited);
                self.controller.set_health(self.health(&counters));
                let sqe = self.admin.sqes[usize::from(slot)];
                self.run_command(slot, &sqe);
                self.run_admin();
            }
            _ => {}
        }
    }

    /// What the volumes say of themselves and the cores have counted. Of several volumes' wear the
    /// worst is told.
    fn health(&self, counters: &Counters) -> HealthCounters {
        let wear = self.wear();
        let fresh = HealthCounters::default();
        HealthCounters {
            critical_warning: wear.map_or(0, |wear| wear.critical_warning),
            available_spare_percent: wear
                .map_or(fresh.available_spare_percent, |wear| wear.spare_percent),
            available_spare_threshold_percent: wear
                .map_or(fresh.available_spare_threshold_percent, |w| w.spare_threshold_percent),
            percentage_used: wear.map_or(fresh.percentage_used, |wear| wear.percentage_used),
            bytes_read: counters.read_bytes,
            bytes_written: counters.written_bytes,
            read_commands: counters.reads,
            write_commands: counters.writes,
            busy: counters.busy_time,
            power_cycles: 1,
            power_on: self.age + self.now(),
            media_errors: counters.media_errors,
            ..fresh
        }
    }

    fn wear(&self) -> Option<Wear> {
        let wears = self.attached.iter().filter_map(|one| one.volume.wear());
        wears.reduce(|one, other| Wear {
            percentage_used: one.percentage_used.max(other.percentage_used),
            spare_percent: one.spare_percent.min(other.spare_percent),
            spare_threshold_percent: one.spare_threshold_percent.max(other.spare_threshold_percent),
            critical_warning: one.critical_warning | other.critical_warning,
        })
    }

    fn describe(&self, client_connected: bool, states: &[CoreState]) -> DeviceState {
        let queues = states.iter().flat_map(|state| &state.queues);
        DeviceState {
            client_connected,
            is_enabled: self.controller.is_ready(),
            queues: queues
                .map(|&(qid, cqid, entries, in_flight)| QueueState {
                    qid,
                    cqid,
                    core: self.cq_cores.get(&cqid).copied().unwrap_or(0),
                    entries,
                    in_flight,
                })
                .collect(),
            completion_queues: states
                .iter()
                .flat_map(|state| state.completion_queues.clone())
                .collect(),
            namespaces: self
                .subsys
                .namespaces()
                .iter()
                .map(|ns| NamespaceState { nsid: ns.nsid, bytes: ns.size_bytes() })
                .collect(),
            counters: sum(states),
        }
    }

    // Registers.

    fn register_write(&mut self, offset: u32, value: u32) {
        let effect = self.controller.register_write(offset, value);
        match effect {
            RegisterEffect::None => {}
            RegisterEffect::Enabled(queues) => self.enable(queues),
            RegisterEffect::ResetQueues { shutdown: true } => {
                let all = self.all();
                self.begin(Purpose::Shutdown, all, || Action::Shutdown);
            }
            RegisterEffect::ResetQueues { shutdown: false } => self.reset_queues(After::Controller),
            RegisterEffect::SubsystemReset => self.reset_queues(After::Subsystem),
            RegisterEffect::InterruptMask => self.set_intx(),
        }
        self.save_controller();
    }

    /// CC.EN.
    fn is_enabled(&self) -> bool {
        self.controller.register_read(Property::CC.0) & 1 != 0
    }

    fn enable(&mut self, queues: AdminQueues) {
        if self.cores.iter().all(|core| core.is_gone) {
            self.controller.fail();
            return;
        }
        let view = self.memory.view();
        let sq = view.slice(queues.sq_address, u64::from(queues.sq_entries) * 64);
        let cq = view.slice(queues.cq_address, u64::from(queues.cq_entries) * 16);
        if sq.is_err() || cq.is_err() {
            tracing::warn!(device = %self.name, "the admin queues are not in the guest's memory");
            self.controller.enable_failed();
            return;
        }
        let record = self.record.view();
        record.clear_queues();
        record.set_cq(
            0,
            Some(&CqRecord {
                address: queues.cq_address,
                entries: queues.cq_entries as u16,
                is_contiguous: true,
                vector: Some(0),
                tail: 0,
            }),
        );
        record.set_sq(
            0,
            Some(&SqRecord {
                address: queues.sq_address,
                entries: queues.sq_entries as u16,
                is_contiguous: true,
                cqid: 0,
                fetched: 0,
            }),
        );
        self.admin = Admin::new(queues);
    }

    /// Closes all queues. Everything of before is pointless from now on.
    fn reset_queues(&mut self, after: After) {
        self.admin = Admin::default();
        self.is_to_be_rebuilt = false;
        if let Some(one) = self.resetting.and_then(|op| self.outstanding.get_mut(&op))
            && let Purpose::Reset(begun) = &mut one.purpose
        {
            // The cores are at it, and there are no queues until they have answered: however often
            // it is asked for, there is one reset at a time.
            *begun = after.max(*begun);
            return;
        }
        self.epoch += 1;
        self.resetting = Some(self.next_op);
        let all = self.all();
        self.begin(Purpose::Reset(after), all, || Action::Reset);
    }

    /// The registers are about to be as after power-on: what is written to them till then is lost.
    fn is_being_remade(&self) -> bool {
        let reset = self.resetting.and_then(|op| self.outstanding.get(&op));
        reset.is_some_and(|one| !matches!(one.purpose, Purpose::Reset(After::Controller)))
    }

    /// There are queues, or there may be.
    fn is_in_use(&self) -> bool {
        self.resetting.is_some()
            || self.admin.queues.is_some()
            || self.controller.is_ending()
            || self.controller.queue_ids() != (Vec::new(), Vec::new())
            // A state that was taken up and not gone on with can be replaced.
            || self.is_enabled() && !self.is_to_be_rebuilt
    }

    fn after_reset(&mut self, after: After) {
        let now = self.now();
        self.record.view().clear_queues();
        self.cq_cores.clear();
        self.cores.iter_mut().for_each(|core| core.queues = 0);
        if after == After::Controller {
            self.controller.queues_closed(now);
        } else {
            self.controller.function_reset(now);
        }
        // Event requests of before are nobody's.
        while self.controller.poll_event().is_some() {}
        match after {
            After::Controller => {}
            After::Subsystem => self.controller.note_subsystem_reset(),
            After::Function | After::FunctionLevel => {
                match after {
                    After::Function => self.pci.reset(),
                    _ => self.pci.reset_function(),
                }
                self.msix_table.fill(0);
                self.said.push_back(Said::Done);
            }
            After::Detach => {
                self.pci.reset();
                self.msix_table.fill(0);
                self.dirty = None;
                self.is_running = true;
                self.memory = GuestMemory::default();
                self.vectors.change(|setup| *setup = crate::msix::Setup::default());
                self.vectors.change(|_| ());
                let (memory, all) = (self.memory.clone(), self.all());
                self.begin(Purpose::None, all.clone(), || Action::SetDirtyLog(None));
                self.begin(Purpose::None, all.clone(), || Action::SetRunning(true));
                self.begin(Purpose::Call, all, || Action::SetMemory {
                    memory: memory.clone(),
                    has_removed: true,
                });
            }
        }
        self.route_interrupts();
        self.save_controller();
    }

    /// Saves configuration space and controller in the record.
    fn save_controller(&self) {
        let mut bytes = self.pci.save().to_vec();
        bytes.extend(self.controller.save());
        if !self.record.view().set_controller(&bytes) {
            tracing::warn!(device = %self.name, "the controller's state does not fit the record");
        }
    }

    /// Follows bus master enable and the power state: without power or leave the function leaves the guest's memory alone, and
    /// raises no MSI-X vector, which would be a write to memory.
    fn follow_master(&mut self) {
        let is_master = self.pci.is_bus_master() && self.pci.is_powered();
        if self.is_master == is_master {
            return;
        }
        self.is_master = is_master;
        let all = self.all();
        self.begin(Purpose::None, all, || Action::SetMaster(is_master));
        self.run_admin();
    }

    /// Follows MSI-X enable, interrupt disable, the interrupt mask and the power state.
    fn route_interrupts(&mut self) {
        self.follow_master();
        let (is_msix, is_disabled) = (self.pci.is_msix_enabled(), self.pci.is_intx_disabled());
        let is_masked = self.controller.interrupt_mask() & 1 != 0;
        let (is_master, is_powered) = (self.is_master, self.pci.is_powered());
        self.vectors.change(|setup| {
            // A client that only sets eventfds means them, too.
            setup.is_msix = is_msix || setup.msix.iter().any(Option::is_some);
            setup.intx_disabled = is_disabled || is_masked || !is_powered;
            setup.is_master = is_master;
        });
        self.wake_cores();
        self.raise_admin();
    }

    fn set_intx(&mut self) {
        self.route_interrupts();
    }

    /// Whether INTx is asserted, or would be if it were not disabled: some completion queue has
    /// entries that the host has not taken.
    fn is_intx_pending(&self) -> bool {
        if self.pci.is_msix_enabled() || self.controller.interrupt_mask() & 1 != 0 {
            return false;
        }
        let (record, view) = (self.record.view(), self.memory.view());
        let head = |qid: u16| match record.shadow() {
            Some((doorbells, _)) if qid > 0 => {
                let mut bytes = [0; 4];
                let at = doorbells.checked_add(8 * u64::from(qid) + 4)?;
                view.read(at, &mut bytes).ok()?;
                Some(u32::from_le_bytes(bytes))
            }
            _ => Some(record.doorbell(qid, true)),
        };
        (0..QUEUES_MAX).any(|qid| {
            record.cq(qid).is_some_and(|cq| {
                let tail = (cq.tail % u64::from(cq.entries)) as u32;
                cq.vector.is_some() && head(qid).is_some_and(|head| head != tail)
            })
        })
    }

    fn doorbell_write(&mut self, offset: u64, value: u32) {
        let index = (offset - DOORBELLS_AT) / 4;
        let (qid, is_cq) = ((index / 2) as u16, index % 2 == 1);
        let record = self.record.view();
        let exists = qid < QUEUES_MAX
            && if is_cq { record.cq(qid).is_some() } else { record.sq(qid).is_some() };
        if !exists {
            if self.controller.is_ready() {
                self.controller.doorbell_error(true);
                self.run_admin();
            }
            return;
        }
        record.ring(qid, is_cq, value);
        let cqid = if is_cq { Some(qid) } else { record.sq(qid).map(|sq| sq.cqid) };
        drop(record);
        if qid == 0 {
            self.run_admin();
            return;
        }
        if let Some(core) = cqid.and_then(|cqid| self.cq_cores.get(&cqid)) {
            self.cores[*core].handle.wake();
        }
    }

    // The admin queue.

    /// Takes and completes commands of the admin queue.
    fn run_admin(&mut self) {
        if self.is_running && self.is_master && !self.is_to_be_rebuilt {
            for _ in 0..ADMIN_TURN {
                let Some((slot, sqe)) = self.take_admin() else { break };
                self.start_command(slot, &sqe, false);
            }
        }
        while let Some((slot, status, result)) = self.controller.poll_event() {
            self.complete(slot, status, result);
        }
        self.post_admin();
    }

    fn take_admin(&mut self) -> Option<(u16, Sqe)> {
        let queues = self.admin.queues?;
        if !self.controller.is_ready() {
            return None;
        }
        let record = self.record.view();
        let tail = record.doorbell(0, false);
        let entries = u64::from(queues.sq_entries);
        let head = (self.admin.fetched % entries) as u32;
        if tail == head {
            return None;
        }
        if tail >= queues.sq_entries {
            if self.admin.bad_tail.replace(tail) != Some(tail) {
                self.controller.doorbell_error(false);
            }
            return None;
        }
        self.admin.bad_tail = None;
        let slot = self.admin.slots.iter().position(|slot| *slot == AdminSlot::Free)?;
        let mut bytes = [0; 64];
        let view = self.memory.view();
        view.read(queues.sq_address + u64::from(head) * 64, &mut bytes).ok()?;
        self.admin.fetched += 1;
        record.take(0, slot as u16, &bytes, self.admin.fetched);
        Some((slot as u16, Sqe::from_bytes(&bytes)))
    }

    fn start_command(&mut self, slot: u16, sqe: &Sqe, is_recovered: bool) {
        self.admin.slots[usize::from(slot)] = AdminSlot::Busy;
        self.admin.sqes[usize::from(slot)] = *sqe;
        if is_recovered && self.was_done(sqe) {
            self.complete(slot, Status::SUCCESS, 0);
            return;
        }
        let lid = LogPage(sqe.cdw10.get() as u8);
        let is_counters = matches!(lid, LogPage::SMART | LogPage::ENDURANCE_GROUP);
        if AdminOpcode(sqe.opcode) == AdminOpcode::GET_LOG_PAGE && is_counters {
            let all = self.all();
            self.begin(Purpose::Health { slot }, all, || Action::Snapshot);
            return;
        }
        self.run_command(slot, sqe);
    }

    /// Whether a queue command that a predecessor took had its effect.
    fn was_done(&self, sqe: &Sqe) -> bool {
        let (qid, record) = (sqe.cdw10.get() as u16, self.record.view());
        if qid == 0 || qid >= QUEUES_MAX {
            return false;
        }
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::CREATE_IO_CQ => record.cq(qid).is_some(),
            AdminOpcode::CREATE_IO_SQ => record.sq(qid).is_some(),
            AdminOpcode::DELETE_IO_CQ => record.cq(qid).is_none(),
            AdminOpcode::DELETE_IO_SQ => record.sq(qid).is_none(),
            _ => false,
        }
    }

    fn run_command(&mut self, slot: u16, sqe: &Sqe) {
        let view = self.memory.view();
        let mut data = Vec::new();
        let needed = Controller::needs_host_memory(sqe);
        let read = walk(
            sqe,
            needed,
            false,
            &mut Copying {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    let from = data.len();
                    data.resize(from + len as usize, 0);
                    view.read(addr, &mut data[from..]).map_err(|_| TRANSFER)
                },
            },
        );
        if let Err(status) = read {
            return self.complete(slot, status, 0);
        }
        let (mut out, now) = (std::mem::take(&mut self.out), self.now());
        let outcome = self.controller.admin(slot, sqe, &data, &mut out, now);
        match outcome {
            AdminOutcome::Complete { status, result } => {
                let mut status = status;
                if status.is_success() && !out.is_empty() {
                    status = self.give(sqe, &out).err().unwrap_or(status);
                }
                if AdminOpcode(sqe.opcode) == AdminOpcode::SET_FEATURES {
                    self.save_controller();
                    self.set_coalescing();
                }
                self.complete(slot, status, result);
            }
            AdminOutcome::Pending => {}
            AdminOutcome::Queue(change) => self.change_queue(slot, change),
            AdminOutcome::DoorbellBuffer { shadow, event_idx } => {
                self.record.view().set_shadow(Some((shadow, event_idx)));
                let all = self.all();
                self.begin(Purpose::Shadow { slot }, all, || {
                    Action::SetShadow(Some((shadow, event_idx)))
                });
            }
            AdminOutcome::Abort { sqid, cid } => {
                // What is at a volume comes back by itself, or is aborted when its queue goes.
                let record = self.record.view();
                let cqid = if sqid < QUEUES_MAX { record.sq(sqid).map(|sq| sq.cqid) } else { None };
                match cqid.and_then(|cqid| self.cq_cores.get(&cqid)) {
                    Some(core) => {
                        let core = vec![*core];
                        self.begin(Purpose::Abort { slot }, core, || Action::Abort { sqid, cid });
                    }
                    None => {
                        self.controller.abort_done();
                        self.complete(slot, Status::SUCCESS, ABORT_NOT_DONE);
                    }
                }
            }
            AdminOutcome::ResetQueues { .. }
            | AdminOutcome::CrossReset { .. }
            | AdminOutcome::SubsystemReset { .. }
            | AdminOutcome::SetWriteProtect { .. }
            | AdminOutcome::ReservationPersistence { .. } => {
                // Persistence of a volume's reservations is changed with a registration.
                self.complete(slot, Status::INVALID_FIELD_IN_COMMAND.dnr(), 0);
            }
        }
        self.out = out;
    }

    /// Copies a command's data to guest memory.
    fn give(&self, sqe: &Sqe, out: &[u8]) -> Result<(), Status> {
        let (view, mut at) = (self.memory.view(), 0);
        walk(
            sqe,
            out.len() as u32,
            false,
            &mut Copying {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    let part = &out[at..at + len as usize];
                    at += part.len();
                    self.mark(addr, len);
                    view.write(addr, part).map_err(|_| TRANSFER)
                },
            },
        )
    }

    fn mark(&self, addr: u64, len: u64) {
        if let Some(log) = &self.dirty {
            log.mark(addr, len);
        }
    }

    fn set_coalescing(&mut self) {
        let table: Vec<_> = (0..VECTORS).map(|vector| self.controller.coalescing(vector)).collect();
        let all = self.all();
        self.begin(Purpose::None, all, || Action::SetCoalescing(table.clone()));
    }

    fn change_queue(&mut self, slot: u16, change: QueueChange) {
        let core = match change {
            QueueChange::CreateCq(cq) => match self.place(cq.qid) {
                Some(core) => core,
                None => {
                    self.controller.queue_unchanged(&change);
                    return self.complete(slot, Status::INTERNAL_ERROR, 0);
                }
            },
            QueueChange::DeleteCq(qid) => {
                let core = self.cq_cores.remove(&qid).unwrap_or(0);
                self.cores[core].queues = self.cores[core].queues.saturating_sub(1);
                core
            }
            QueueChange::CreateSq(sq) => self.cq_cores.get(&sq.cqid).copied().unwrap_or(0),
            QueueChange::DeleteSq(qid) => {
                let cqid = self.record.view().sq(qid).map_or(0, |sq| sq.cqid);
                self.cq_cores.get(&cqid).copied().unwrap_or(0)
            }
        };
        let action = match change {
            QueueChange::CreateCq(cq) => Action::CreateCq {
                qid: cq.qid,
                cq: CqRecord {
                    address: cq.address,
                    entries: cq.entries as u16,
                    is_contiguous: cq.is_contiguous,
                    vector: cq.vector,
                    tail: 0,
                },
                coalescing: cq.vector.map(|v| self.controller.coalescing(v)).unwrap_or_default(),
                is_recovered: false,
            },
            QueueChange::CreateSq(sq) => Action::CreateSq {
                qid: sq.qid,
                sq: SqRecord {
                    address: sq.address,
                    entries: sq.entries as u16,
                    is_contiguous: sq.is_contiguous,
                    cqid: sq.cqid,
                    fetched: 0,
                },
                is_recovered: false,
            },
            QueueChange::DeleteCq(qid) => Action::DeleteCq { qid },
            QueueChange::DeleteSq(qid) => Action::DeleteSq { qid },
        };
        let mut action = Some(action);
        self.begin(Purpose::Queue { slot, change }, vec![core], || {
            action.take().unwrap_or(Action::Snapshot)
        });
    }

    /// The core of a completion queue that is to be created: one with the fewest, of those that
    /// have every volume. `None`: no core is left.
    fn place(&mut self, qid: u16) -> Option<usize> {
        let is_possible = |core: &usize| self.cores[*core].can_have_queues();
        let core = (0..self.cores.len())
            .filter(is_possible)
            .min_by_key(|core| self.cores[*core].queues)?;
        self.cores[core].queues += 1;
        self.cq_cores.insert(qid, core);
        Some(core)
    }

    fn complete(&mut self, slot: u16, status: Status, result: u64) {
        let Some(entry) = self.admin.slots.get_mut(usize::from(slot)) else { return };
        *entry = AdminSlot::Done { status, result };
        self.admin.backlog.push_back(slot);
    }

    fn post_admin(&mut self) {
        let Some(queues) = self.admin.queues else { return };
        // A stopped device touches no memory. What is not posted is in the record, and is carried out
        // again by who goes on.
        if self.admin.backlog.is_empty() || !self.is_running || !self.is_master {
            return;
        }
        self.save_controller();
        let (record, view) = (self.record.view(), self.memory.view());
        self.admin.see_head(record.doorbell(0, true));
        let mut is_told = true;
        while self.admin.tail - self.admin.head < u64::from(queues.cq_entries) - 1 {
            let Some(slot) = self.admin.backlog.pop_front() else { break };
            let AdminSlot::Done { status, result } = self.admin.slots[usize::from(slot)] else {
                continue;
            };
            let sqe = &self.admin.sqes[usize::from(slot)];
            let mut cqe = Cqe::new(sqe.cid.get(), status, result & 0xffff_ffff);
            cqe.sqhd.set((self.admin.fetched % u64::from(queues.sq_entries)) as u16);
            let position = self.admin.tail;
            let phase = phase(position, queues.cq_entries);
            cqe.status_raw.set(cqe.status_raw.get() & !1 | phase);
            record.completing(0, slot, &cqe.to_bytes(), position + 1);
            write_cqe(&view, &queues, position, &cqe.to_bytes());
            self.mark(queues.cq_address, u64::from(queues.cq_entries) * 16);
            self.admin.tail += 1;
            record.set_tail(0, self.admin.tail);
            record.free(0, slot);
            self.admin.slots[usize::from(slot)] = AdminSlot::Free;
            is_told = false;
        }
        if !is_told {
            self.admin.is_pending = true;
            self.raise_admin();
        }
    }

    fn raise_admin(&mut self) {
        let has_changed = self.interrupts.refresh();
        if self.admin.queues.is_none() {
            return;
        }
        if has_changed {
            self.admin.see_head(self.record.view().doorbell(0, true));
            self.admin.is_pending |= self.admin.head < self.admin.tail;
        }
        if self.admin.is_pending {
            self.admin.is_pending = !self.interrupts.raise(0);
        }
    }

    pub(crate) fn record(&self) -> &Record {
        &self.record
    }
}

impl Core {
    fn can_have_queues(&self) -> bool {
        !self.is_gone && self.missing.is_empty()
    }

    fn flush(&mut self) {
        while let Some(command) = self.outbox.pop_front() {
            if let Err(command) = self.commands.send(command) {
                self.outbox.push_front(command);
                break;
            }
        }
    }
}

fn sum(states: &[CoreState]) -> Counters {
    let mut sum = Counters::default();
    states.iter().for_each(|state| sum.add(&state.counters));
    sum
}

impl Drop for Device {
    fn drop(&mut self) {
        for core in 0..self.cores.len() {
            self.send(core, Command::Leave);
        }
    }
}
