//! The controller: one per association, I/O or discovery. Pure: a Property Set over fabrics and
//! a write to a PCI function's register are the same event, time is a parameter, and what must
//! happen outside (closing queues, sending a completion later) is an [`AdminOutcome`].
//!
//! ```text
//!   Connect qid 0 ─► admit_admin ─► Controller::new
//!   SQE (qid 0)   ─► Controller::admin ─► Complete | Pending (AER) | ResetQueues | Abort | ..
//!   Connect qid n ─► Controller::connect_io
//!   SQE (qid n)   ─► io::decode                  (needs no Controller, only the SubsystemInfo)
//!   config change ─► update_subsys / update_discovery ─┐
//!   set_health, internal_error, reservation_notice ────┴► poll_event (AER completions)
//!   any command   ─► touch;   timer ─► is_expired
//! ```
//!
//! The parts: `enable` (registers), `admin` (dispatch), `identify`, `features`, `log`, `aer`,
//! `keep_alive`, and [`io`]. ANA states and reservations are in [`crate::subsys`]. Not here:
//! authentication; namespace management, which no host is offered. `docs/support.md` lists what is
//! supported, code by code.

mod admin;
mod aer;
mod enable;
mod features;
mod identify;
pub mod io;
mod keep_alive;
mod log;
mod queues;
#[cfg(test)]
mod tests;

use core::time::Duration;
use std::sync::Arc;

pub use self::admin::{ABORT_NOT_DONE, AdminOutcome, CROSS_RESET_IMMEDIATE, io_queue_fabrics};
pub use self::log::{ErrorRecord, HealthCounters};
pub use self::queues::{AdminQueues, Coalescing, CqConfig, QueueChange, RegisterEffect, SqConfig};
use crate::fabrics::{ConnectReject, ConnectRequest};
use crate::spec::{AdminOpcode, Cns, Nqn, Sqe, Status, critical_warning};
use crate::subsys::SubsystemInfo;
use crate::subsys::discovery::DiscoveryLog;
use crate::subsys::reservation::NoticeKind;

/// Asynchronous Event Requests a controller holds (AERL, one-based).
pub const AER_MAX: usize = 4;
/// Abort commands a host may have outstanding (ACL, one-based).
pub const ABORT_MAX: u8 = 4;
/// Entries of the Error Information log (ELPE, one-based).
pub const ERROR_LOG_MAX: usize = 64;
/// Most controller-to-host bytes of a command that is not Get Log Page.
pub const ADMIN_DATA_MAX: u32 = 4096;

/// Which of the controllers that ever had an identifier this is (NVMe Base 2.3, CIU and CIRN).
///
/// The random number is told to the controller's own host alone (in Identify), so that whoever
/// names it in a Cross-Controller Reset has been that host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instance {
    /// Controller Instance Uniquifier, not 0.
    pub ciu: u8,
    /// Controller Instance Random Number, not 0.
    pub cirn: u64,
}

/// What kind of controller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControllerKind {
    /// I/O controller.
    Io,
    /// Discovery controller, serving this log.
    Discovery(Arc<DiscoveryLog>),
}

/// What a controller is made from: the accepted Connect command and the subsystem.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Controller ID assigned.
    pub cntlid: u16,
    /// I/O or discovery.
    pub kind: ControllerKind,
    /// Host of the association.
    pub hostnqn: Nqn,
    /// Its identifier.
    pub hostid: [u8; 16],
    /// Keep alive timeout asked for in Connect; zero: none.
    pub kato: Duration,
    /// The subsystem.
    pub subsys: Arc<SubsystemInfo>,
}

/// Whether an admin-queue Connect fits the subsystem. The caller has found `subsys` by SUBNQN and
/// checked that the host may use it.
///
/// # Errors
/// The refusal to answer with.
pub fn admit_admin(request: &ConnectRequest, subsys: &SubsystemInfo) -> Result<(), ConnectReject> {
    if request.qid != 0 {
        return Err(ConnectReject::QID);
    }
    if request.queue_entries > u32::from(subsys.limits().queue_entries_max) {
        return Err(ConnectReject::SQSIZE);
    }
    if request.kato > subsys.limits().kato_max {
        return Err(ConnectReject::KATO);
    }
    // "FFFFh shall be used to create a controller in the dynamic controller model."
    if !request.is_dynamic() {
        return Err(ConnectReject::CNTLID);
    }
    // The discovery subsystem may be reached by the well-known NQN and by its own.
    if request.subnqn != *subsys.nqn() && !request.subnqn.is_discovery() {
        return Err(ConnectReject::SUBNQN);
    }
    Ok(())
}

/// One controller. See the module documentation.
#[derive(Debug)]
pub struct Controller {
    cntlid: u16,
    kind: ControllerKind,
    hostnqn: Nqn,
    hostid: [u8; 16],
    subsys: Arc<SubsystemInfo>,
    registers: enable::Registers,
    keep_alive: keep_alive::KeepAlive,
    aer: aer::AsyncEvents,
    features: features::Features,
    log: log::Logs,
    /// I/O queues connected, by qid; index 0 unused.
    queues: Vec<bool>,
    /// What other controllers of this host name it by; `None`: no Cross-Controller Reset here.
    instance: Option<Instance>,
    /// Port of the association, for the port local entries of the discovery log.
    portid: Option<u16>,
    /// What `set_controllers` said last: ascending.
    controllers: Vec<u16>,
    /// Aborts the driver is trying; at most [`ABORT_MAX`].
    aborts: u8,
    /// What only a PCI function has.
    pcie: queues::Queues,
}

/// Which controllers an Identify command asks for; see [`Controller::controllers_wanted`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ControllersWanted {
    /// All of the subsystem.
    All,
    /// Those that have this namespace attached (may access it).
    Attached(u32),
}

impl Controller {
    /// A controller as it is after an accepted Connect: not enabled, keep alive running.
    #[must_use]
    pub fn new(config: ControllerConfig, now: Duration) -> Controller {
        let limits = *config.subsys.limits();
        let is_discovery = matches!(config.kind, ControllerKind::Discovery(_));
        let io_queues = if is_discovery { 0 } else { limits.io_queues_max };
        let keep_alive = keep_alive::KeepAlive::new(config.kato, is_discovery, now);
        Controller {
            cntlid: config.cntlid,
            kind: config.kind,
            hostnqn: config.hostnqn,
            hostid: config.hostid,
            registers: enable::Registers::new(
                limits.queue_entries_max,
                is_discovery,
                limits.transport,
            ),
            aer: aer::AsyncEvents::default(),
            features: features::Features::new(io_queues, keep_alive.kato(), now),
            keep_alive,
            log: log::Logs::default(),
            queues: vec![false; usize::from(io_queues) + 1],
            instance: None,
            portid: None,
            controllers: vec![config.cntlid],
            aborts: 0,
            pcie: queues::Queues::default(),
            subsys: config.subsys,
        }
    }

    /// Names this controller for Cross-Controller Reset, which it then supports, too. To be called
    /// before the host can ask: the driver must be able to carry out
    /// [`AdminOutcome::CrossReset`].
    pub fn set_instance(&mut self, instance: Instance) {
        self.instance = Some(instance);
    }

    /// Tells on which port (PORTID of the discovery log) the association is: what Port Local
    /// Entries Only of the discovery log page goes by.
    pub fn set_port(&mut self, portid: u16) {
        self.portid = Some(portid);
    }

    /// The next [`Controller::admin`] for this command wants to know these controllers: give them
    /// by [`Controller::set_controllers`] before. Only they know one another through the driver,
    /// and hosts hardly ever ask: that is why no list is kept up to date all the time.
    #[must_use]
    pub fn controllers_wanted(sqe: &Sqe) -> Option<ControllersWanted> {
        match (AdminOpcode(sqe.opcode), Cns(sqe.cdw10.get() as u8)) {
            (AdminOpcode::IDENTIFY, Cns::CONTROLLERS | Cns::COMMAND_SETS) => {
                Some(ControllersWanted::All)
            }
            (AdminOpcode::IDENTIFY, Cns::NAMESPACE_CONTROLLERS) => {
                Some(ControllersWanted::Attached(sqe.nsid.get()))
            }
            _ => None,
        }
    }

    /// The controllers that [`Controller::controllers_wanted`] asked for, in any order. Until it
    /// is called a controller knows of itself alone.
    pub fn set_controllers(&mut self, cntlids: &[u16]) {
        self.controllers.clear();
        self.controllers.extend_from_slice(cntlids);
        self.controllers.sort_unstable();
        self.controllers.dedup();
    }

    /// The subsystem was reset ([`AdminOutcome::SubsystemReset`]) since the target started:
    /// CSTS.NSSRO is 1 until the host clears it.
    pub fn note_subsystem_reset(&mut self) {
        self.registers.note_subsystem_reset();
    }

    /// An [`AdminOutcome::Abort`] is completed.
    pub fn abort_done(&mut self) {
        debug_assert!(self.aborts > 0, "every abort that was begun is done once");
        self.aborts = self.aborts.saturating_sub(1);
    }

    /// Controller ID; also dword 0 of the Connect response (no authentication required).
    #[must_use]
    pub fn cntlid(&self) -> u16 {
        self.cntlid
    }
    /// Host NQN of the association.
    #[must_use]
    pub fn hostnqn(&self) -> &Nqn {
        &self.hostnqn
    }
    /// The subsystem as this controller sees it now.
    #[must_use]
    pub fn subsys(&self) -> &Arc<SubsystemInfo> {
        &self.subsys
    }
    /// Whether it is a discovery controller.
    #[must_use]
    pub fn is_discovery(&self) -> bool {
        matches!(self.kind, ControllerKind::Discovery(_))
    }
    /// Whether I/O may be admitted: enabled, ready, and neither resetting nor shutting down.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.registers.is_ready()
    }
    /// Controller Fatal Status: the host asked for a configuration that does not exist.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.registers.csts().cfs()
    }
    /// I/O queues the host may connect: qid 1 to this number.
    #[must_use]
    pub fn io_queues_granted(&self) -> u16 {
        self.features.io_queues_granted()
    }
    /// I/O queues connected now.
    #[must_use]
    pub fn io_queues_connected(&self) -> usize {
        self.queues.iter().filter(|&&connected| connected).count()
    }

    /// Checks an I/O queue's Connect and marks the queue connected.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn connect_io(&mut self, request: &ConnectRequest) -> Result<(), ConnectReject> {
        if request.cntlid != self.cntlid {
            return Err(ConnectReject::CNTLID);
        }
        if request.subnqn != *self.subsys.nqn() {
            return Err(ConnectReject::SUBNQN);
        }
        if request.hostnqn != self.hostnqn {
            return Err(ConnectReject::HOSTNQN);
        }
        if request.hostid != self.hostid {
            return Err(ConnectReject::HOSTID);
        }
        if self.is_discovery() || request.qid == 0 || request.qid > self.io_queues_granted() {
            return Err(ConnectReject::QID);
        }
        if request.queue_entries > u32::from(self.subsys.limits().queue_entries_max) {
            return Err(ConnectReject::SQSIZE);
        }
        if !self.is_ready() {
            return Err(ConnectReject::SEQUENCE);
        }
        let connected = &mut self.queues[usize::from(request.qid)];
        if *connected {
            return Err(ConnectReject::SEQUENCE);
        }
        *connected = true;
        Ok(())
    }

    /// An I/O queue is gone: its connection ended, or Disconnect was completed.
    pub fn disconnect_io(&mut self, qid: u16) {
        if let Some(connected) = self.queues.get_mut(usize::from(qid)) {
            *connected = false;
        }
    }

    /// Another view of the subsystem: namespaces came, went or changed, or ANA groups have other
    /// states. Raises the Namespace Attribute Changed and the Asymmetric Namespace Access Change
    /// event if the host enabled them. Whether there is ANA reporting at all, NQN and limits must be the same: they are
    /// what the host was told in Identify.
    pub fn update_subsys(&mut self, subsys: Arc<SubsystemInfo>) {
        debug_assert_eq!(self.subsys.limits(), subsys.limits());
        let changed = aer::changed_namespaces(&self.subsys, &subsys);
        let ana_changed = log::ana_changed(&self.subsys, &subsys);
        self.subsys = subsys;
        self.features.retain_namespaces(|nsid| self.subsys.namespace(nsid).is_some());
        if !changed.is_empty() {
            self.aer.namespaces_changed(&changed);
        }
        if ana_changed {
            self.aer.raise(aer::Kind::Ana);
        }
    }

    /// Namespaces may have changed while nobody looked: between the process that a host was told of
    /// them by and this one. Raises the Namespace Attribute Changed event if the host enabled it.
    pub fn namespaces_may_have_changed(&mut self) {
        self.aer.all_changed();
    }

    /// Another discovery log. Raises the Discovery Log Page Change event if the host enabled it.
    /// Nothing happens on an I/O controller.
    pub fn update_discovery(&mut self, log: Arc<DiscoveryLog>) {
        if let ControllerKind::Discovery(current) = &mut self.kind
            && *current != log
        {
            *current = log;
            self.aer.raise(aer::Kind::Discovery);
        }
    }

    /// Completions of Asynchronous Event Requests that are due: slot, status, dword 0. Call until
    /// `None` after every call that may raise one.
    pub fn poll_event(&mut self) -> Option<(u16, Status, u64)> {
        self.aer.poll()
    }

    /// The I/O queues that [`AdminOutcome::ResetQueues`] asked to close are closed and all they
    /// admitted is finished: the reset or shutdown is complete and CSTS says so.
    pub fn queues_closed(&mut self, now: Duration) {
        self.queues.fill(false);
        match self.registers.finish() {
            Some(enable::Ending::Reset) => {
                self.reset_features(now);
            }
            Some(enable::Ending::Shutdown) => {
                self.aer.reset();
                self.pcie = queues::Queues::default();
            }
            None => {}
        }
    }

    /// What a Controller Level Reset does to everything but the registers.
    fn reset_features(&mut self, now: Duration) {
        let io_queues = (self.queues.len() - 1) as u16;
        self.features.reset(io_queues, now);
        self.aer.reset();
        self.log.notices.reset();
        self.pcie = queues::Queues::default();
        self.aborts = 0;
    }

    /// Whether a reset or shutdown waits for [`Controller::queues_closed`].
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.registers.is_ending()
    }

    /// A command arrived on any queue of the association (traffic based keep alive).
    #[inline]
    pub fn touch(&mut self, now: Duration) {
        self.keep_alive.touch(now);
    }
    /// Whether the keep alive timer expired: the association is to be torn down.
    #[must_use]
    pub fn is_expired(&self, now: Duration) -> bool {
        self.deadline().is_some_and(|deadline| now >= deadline)
    }
    /// When the keep alive timer expires if nothing arrives; `None`: never.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        // "The Keep Alive Timer is not active while the controller is shut down": a host that
        // has asked for shutdown sends nothing more and disconnects when it has seen the end.
        if self.registers.is_shut_down() { None } else { self.keep_alive.deadline() }
    }
    /// Keep alive timeout in force; zero: none.
    #[must_use]
    pub fn kato(&self) -> Duration {
        self.keep_alive.kato()
    }

    /// Counters behind the SMART and endurance group logs. Call it before a Get Log Page command
    /// or from time to time: critical warnings that are new raise an event if the host enabled it.
    pub fn set_health(&mut self, counters: HealthCounters) {
        self.log.health.set(counters);
        self.check_health();
    }

    /// Whether the host wants to be told of critical warnings: [`Controller::set_health`] is to be
    /// called from time to time then, and not just before the log is read.
    #[must_use]
    pub fn has_health_events(&self) -> bool {
        self.aer.config() & u32::from(critical_warning::ALL) != 0
    }

    /// The Critical Warning bits ([`crate::spec::critical_warning`]) are these from now on (the
    /// temperature bit follows from the temperature by itself). New ones raise an event if the
    /// host enabled it.
    pub fn health_warning(&mut self, bits: u8) {
        self.log.health.set_critical_warning(bits);
        self.check_health();
    }

    fn check_health(&mut self) {
        let warning = self.log.health.critical_warning(self.features.thresholds());
        self.aer.critical_warning(warning);
    }

    /// Records a failed command in the Error Information log. For errors of the controller or
    /// its media: not for commands refused because the host asked for nonsense.
    pub fn record_error(&mut self, record: &ErrorRecord) {
        self.log.health.record(record);
    }

    /// Something failed that belongs to no command, and it stays broken (`is_persistent`) or not:
    /// an entry in the Error Information log and an error event, which hosts cannot disable.
    pub fn internal_error(&mut self, is_persistent: bool) {
        const NO_COMMAND: u16 = 0xffff;
        self.log.health.record(&ErrorRecord {
            sqid: NO_COMMAND,
            cid: NO_COMMAND,
            status: Status::INTERNAL_ERROR,
            opcode: 0,
            nsid: 0,
            lba: 0,
        });
        let kind =
            if is_persistent { aer::Kind::PersistentError } else { aer::Kind::TransientError };
        self.aer.raise(kind);
    }

    /// A reservation notification for this host: unless the host masked it (Reservation
    /// Notification Mask), a page of the Reservation Notification log and an event.
    pub fn reservation_notice(&mut self, nsid: u32, kind: NoticeKind) {
        if !self.features.masks_notice(nsid, kind) {
            self.log.notices.push(nsid, kind);
            self.aer.raise(aer::Kind::ReservationLog);
        }
    }

    /// Whether ANA is reported to this host.
    pub(crate) fn has_ana(&self) -> bool {
        !self.is_discovery() && !self.subsys.ana_groups().is_empty()
    }
}
