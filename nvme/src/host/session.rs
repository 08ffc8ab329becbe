//! The admin queue of an I/O controller, from Connect to shutdown.
//!
//! ```text
//! bring-up ─► Number of Queues ─► event configuration ─► SMART log ─► Identify (CNS 06, 03, 00, 08) ─► ANA ─► Ready
//!                                                            ▲                              │
//!     └► end the old controller (after a loss)               │
//!                     Changed Namespace List ◄── event ──────┼──────────────────────────────┤
//!                               └────────────────────────────┘          shutdown() ─► CC.SHN ─► Closed
//! ```
//! A session of no namespace ([`NSID_ALL`]) needs no I/O queues: it reads the list of namespaces (CNS
//! 02) in place of Identify, and again when an event says that it has changed.
//!
//! Beside the steps, one Keep Alive every KATO/2, or only when there was no other command for KATO/4
//! where the controller counts those, and one Asynchronous Event Request. A ready session
//! also ends controllers of this host on other paths ([`Session::end_other`]).

use core::time::Duration;

use super::bring_up::{BringUp, ControllerInfo, Request, Shutdown, identify_data};
use super::{AdminCommand, Authenticate, Authentication, ConnectNames, SessionError};
use crate::ctrl::{CROSS_RESET_IMMEDIATE, Instance};
use crate::spec::{
    ANA_LSP_GROUPS_ONLY, AdminOpcode, Cns, Cqe, Feature, GetLogPage, IDENTIFY_LEN,
    IdentifyController, IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent,
    LogPage, NSID_ALL, SmartLog, Sqe, Status, critical_warning, event, nidt,
};
use crate::subsys::ana::{AnaState, log_state};

const TAG_STEP: u16 = 0;
const TAG_KEEP_ALIVE: u16 = 1;
const TAG_EVENT: u16 = 2;

/// Shortest time between two Asynchronous Event Requests, and from an event to the next rescan:
/// a controller that raises events without end must not keep a host busy.
const EVENT_INTERVAL: Duration = Duration::from_millis(50);
/// How often a namespace that is detached is looked for, beside when an event tells of it.
const DETACHED_INTERVAL: Duration = Duration::from_secs(5);
/// How often the list of namespaces is read where no event tells of a change.
const LIST_INTERVAL: Duration = Duration::from_secs(10);
/// How often the controller is asked for its health, beside when an event tells of it.
const HEALTH_INTERVAL: Duration = Duration::from_secs(60);
/// Critical Warning bits that are to raise an event: all but the temperature.
const HEALTH_EVENTS: u8 = critical_warning::SPARE
    | critical_warning::DEGRADED
    | critical_warning::READ_ONLY
    | critical_warning::VOLATILE_MEMORY_BACKUP;
/// From an event of its health to the question.
const HEALTH_DELAY: Duration = Duration::from_secs(1);
/// Bytes of the SMART log.
const SMART_BYTES: u32 = size_of::<SmartLog>() as u32;
/// Most bytes of the ANA log that are read: a header and 127 groups.
const ANA_LOG_BYTES_MAX: u32 = 4096;

/// What a session needs to know.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Host and subsystem.
    pub names: ConnectNames,
    /// Namespace to use; [`NSID_ALL`]: none, the session is about which ones there are.
    pub nsid: u32,
    /// Keep alive timeout; zero: none.
    pub kato: Duration,
    /// I/O queues wanted, at least 1.
    pub queues_wanted: u16,
    /// Entries per I/O queue wanted, one-based, at least 2.
    pub queue_entries: u16,
    /// How long an answer may take.
    pub command_timeout: Duration,
    /// Whether the driver authenticates, see [`Session::authentication`].
    pub authenticate: Authenticate,
}

/// The controller that this host had before and lost the path to: its I/O may still land.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OldController {
    /// Its identifier.
    pub cntlid: u16,
    /// Its instance, if it supports Cross-Controller Reset.
    pub instance: Option<Instance>,
    /// By then it has ended by itself: its keep alive timeout is over, wherever in it the last
    /// command fell.
    pub safe_at: Duration,
}

/// The remote namespace, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteNamespace {
    /// Namespace identifier.
    pub nsid: u32,
    /// The subsystem still has it attached to the controller. All else is as it was when it had.
    pub is_attached: bool,
    /// Logical block size, bytes: a power of two, 512..=65536.
    pub block_bytes: u32,
    /// Size in blocks; not 0, and the size in bytes fits 63 bits.
    pub blocks: u64,
    /// UUID; zero: none.
    pub uuid: [u8; 16],
    /// NGUID; zero: none.
    pub nguid: [u8; 16],
    /// EUI64; zero: none.
    pub eui64: [u8; 8],
    /// Write protected.
    pub read_only: bool,
    /// A volatile write cache is present: Flush matters.
    pub write_cache: bool,
    /// Dataset Management is supported.
    pub deallocate: bool,
    /// Blocks one Deallocate range may have.
    pub deallocate_blocks_max: u32,
    /// Write Zeroes is supported.
    pub write_zeroes: bool,
    /// Blocks one Write Zeroes command may have, 1..=65536.
    pub write_zeroes_blocks_max: u32,
    /// Deallocated blocks read as zeroes.
    pub deallocated_reads_zero: bool,
    /// Preferred write granularity, bytes; 0: not reported.
    pub write_granularity_bytes: u32,
    /// Preferred deallocate granularity, bytes; 0: not reported.
    pub deallocate_granularity_bytes: u32,
    /// Compare is supported.
    pub compare: bool,
    /// Compare and Write is supported, as a fused operation of one block.
    pub compare_and_write: bool,
    /// Blocks one Verify command may have, 1..=65536; 0: it is not supported.
    pub verify_blocks_max: u32,
    /// What one Copy command may be; `None`: it is not supported.
    pub copy: Option<CopyLimits>,
    /// Reservation Capabilities (RESCAP); 0: there are no reservations.
    pub rescap: u8,
    /// Its ANA group; 0: none is reported.
    pub ana_group: u32,
    /// State of that group at this controller; `None`: none is reported.
    pub ana: Option<AnaState>,
}

/// How worn the media behind a controller are, as its SMART log says (NVMe Base 2.1, "SMART / Health
/// Information").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wear {
    /// Life used, percent of what the vendor expects; may be over 100, and 255 is that or more.
    pub percentage_used: u8,
    /// Spare capacity that remains, percent.
    pub spare_percent: u8,
    /// Below which spare capacity is critical, percent.
    pub spare_threshold_percent: u8,
    /// Critical Warning, without the temperature: spare, reliability, read-only and so on.
    pub critical_warning: u8,
}

impl Wear {
    /// What a SMART log says; `None`: nothing. Targets in software fill in a page that says neither
    /// when spare is critical nor that anything is used, which no medium that wears does.
    #[must_use]
    pub fn from_log(log: &SmartLog) -> Option<Wear> {
        let knows = log.available_spare_threshold != 0 || log.percentage_used != 0;
        let is_possible = log.available_spare <= 100 && log.available_spare_threshold <= 100;
        (knows && is_possible).then_some(Wear {
            percentage_used: log.percentage_used,
            spare_percent: log.available_spare,
            spare_threshold_percent: log.available_spare_threshold,
            critical_warning: log.critical_warning & !critical_warning::TEMPERATURE,
        })
    }
}

/// Limits of the Copy command of a namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyLimits {
    /// Source ranges (MSRC), 1..=128: those that a page has room for.
    pub ranges_max: u16,
    /// Blocks of one range (MSSRL), not 0.
    pub range_blocks_max: u16,
    /// Blocks altogether (MCL), not 0.
    pub blocks_max: u32,
}

/// What is known once a session is ready.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadyInfo {
    /// Controller ID, for the Connect of I/O queues.
    pub cntlid: u16,
    /// I/O queues granted: qid 1 to this number, at most what was wanted; 0 without a namespace.
    pub queues: u16,
    /// Entries per I/O queue, one-based, at most what was wanted.
    pub queue_entries: u16,
    /// In-capsule data of an I/O command, bytes.
    pub in_capsule_bytes: u32,
    /// Bytes one Read or Write may transfer (at least one block); `u32::MAX`: no limit.
    pub transfer_bytes_max: u32,
    /// The namespace; `None` for a session of none.
    pub namespace: Option<RemoteNamespace>,
    /// Namespaces attached to the controller, ascending, the first 1,024; of a session of none.
    pub attached: Vec<u32>,
    /// Wear of the media, once it is known, if the controller knows it.
    pub wear: Option<Wear>,
    /// The controller.
    pub controller: ControllerInfo,
}

/// Where a session stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionState<'a> {
    /// Bring-up is under way.
    Connecting,
    /// I/O queues may be connected and used.
    Ready(&'a ReadyInfo),
    /// Shutdown is under way.
    ShuttingDown,
    /// The controller has shut down, or nothing was there to shut down.
    Closed,
    /// Over; close the connection.
    Failed(&'a SessionError),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    BringUp,
    /// The old controller is being ended.
    EndOld,
    /// The old controller ends by itself. Moved on by `safe_at`.
    OutliveOld,
    Queues,
    EventConfiguration,
    NvmController,
    Descriptors,
    Namespace,
    Independent,
    AnaLog,
    /// The list of namespaces is being read, of a session of none.
    List,
    Health,
    /// A controller on another path is being ended.
    EndOther,
    /// Nothing to do but keep alive and events.
    Idle,
    ChangedNamespaces,
    Shutdown,
    Closed,
    Failed,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    what: &'static str,
    sent_at: Duration,
    read_len: u32,
}

/// Identifiers collected by the Identify steps.
#[derive(Clone, Debug, Default)]
struct Draft {
    uuid: [u8; 16],
    nguid: [u8; 16],
    eui64: [u8; 8],
    namespace: Option<RemoteNamespace>,
}

/// From CNS 06.
#[derive(Clone, Copy, Debug)]
struct NvmLimits {
    /// Bytes of one Write Zeroes command.
    write_zeroes_bytes: u64,
    /// Bytes of one Verify command.
    verify_bytes: u64,
    /// Blocks of one Deallocate range.
    deallocate_blocks: u32,
}

/// The admin queue of an I/O controller. See the module documentation of [`crate::host`].
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    /// Must be unable to write before this session is ready.
    old: Option<OldController>,
    step: Step,
    bring_up: BringUp,
    shutdown: Option<Shutdown>,
    in_flight: Option<InFlight>,
    keep_alive: Option<InFlight>,
    keep_alive_at: Duration,
    event: Option<InFlight>,
    /// When the next Asynchronous Event Request may be sent; `None`: events are not enabled.
    event_at: Option<Duration>,
    /// When the namespace is to be looked at again.
    rescan_at: Option<Duration>,
    /// When the SMART log is to be read again; `None`: not at all.
    health_at: Option<Duration>,
    /// As the SMART log said last.
    wear: Option<Wear>,
    /// The controller is asked for events of its health, too; some take that for an error.
    tells_health: bool,
    controller: Option<ControllerInfo>,
    queues: u16,
    limits: NvmLimits,
    /// A controller on another path that is to be ended, and whether it was, once that is known.
    other: Option<OldController>,
    other_ended: Option<bool>,
    draft: Draft,
    ready: Option<ReadyInfo>,
    changed: bool,
    error: Option<SessionError>,
}

impl Session {
    /// A session that is to begin with Connect on a fresh connection.
    #[must_use]
    pub fn new(mut config: SessionConfig, now: Duration) -> Session {
        config.queues_wanted = config.queues_wanted.clamp(1, u16::MAX - 1);
        config.queue_entries = config.queue_entries.max(2);
        Session {
            old: None,
            step: Step::BringUp,
            bring_up: BringUp::new(config.names.clone(), config.kato, config.authenticate),
            shutdown: None,
            in_flight: None,
            keep_alive: None,
            keep_alive_at: now + config.kato / 2,
            event: None,
            event_at: None,
            rescan_at: None,
            health_at: None,
            wear: None,
            tells_health: config.nsid != NSID_ALL,
            controller: None,
            queues: 0,
            limits: NvmLimits {
                write_zeroes_bytes: 0,
                verify_bytes: 0,
                deallocate_blocks: u32::MAX,
            },
            other: None,
            other_ended: None,
            draft: Draft::default(),
            ready: None,
            changed: false,
            error: None,
            config,
        }
    }

    /// Lets the session become ready only when `old` can write no more: what is sent again then
    /// cannot be overtaken by what was sent before. To be called before the first command.
    ///
    /// A target with Cross-Controller Reset is asked to end `old`; with any other, and when it
    /// refuses, the session waits until `old` has ended by itself.
    pub fn end_old(&mut self, old: OldController) {
        self.old = Some(old);
    }

    /// The old controller has ended otherwise: nothing has to be done or waited for any more.
    pub fn old_is_over(&mut self) {
        self.old = None;
    }

    /// Asks the target to end a controller that this host has lost the path to, in another session:
    /// a Cross-Controller Reset. `false`: this session cannot, or is about another one.
    /// [`Session::take_other_ended`] says what came of it.
    pub fn end_other(&mut self, other: OldController) -> bool {
        let can = self.controller.as_ref().is_some_and(|info| info.instance.is_some());
        let is_busy = self.other.is_some() || self.other_ended.is_some();
        if !can || other.instance.is_none() || is_busy || self.ready.is_none() {
            return false;
        }
        (self.other, self.other_ended) = (Some(other), None);
        true
    }

    /// Whether the other controller has ended (nothing of it can land any more), once that is
    /// known.
    pub fn take_other_ended(&mut self) -> Option<bool> {
        self.other_ended.take()
    }

    /// Whether a Keep Alive is due that other commands can stand for.
    #[must_use]
    pub fn needs_traffic(&self, now: Duration) -> bool {
        let counts = self.controller.as_ref().is_some_and(|info| info.traffic_keep_alive);
        counts && self.ready.is_some() && self.keep_alive.is_none() && now >= self.keep_alive_at
    }

    /// Commands have been answered on I/O queues since the last call. A controller with Traffic
    /// Based Keep Alive needs no other for now: it counts a time-out from the last one at most, and
    /// is asked again after a quarter of that.
    pub fn on_traffic(&mut self, now: Duration) {
        if self.needs_traffic(now) {
            self.keep_alive_at = now + self.config.kato / 4;
        }
    }

    /// The ANA state of the namespace is to be read again: I/O was refused because of it.
    pub fn rescan(&mut self, now: Duration) {
        self.rescan_at.get_or_insert(now + EVENT_INTERVAL);
    }

    /// `Some`: the controller has taken Connect, and nothing else is sent before the driver has
    /// authenticated on this queue and said so with [`Session::authenticated`].
    #[must_use]
    pub fn authentication(&self) -> Option<Authentication> {
        if self.error.is_some() { None } else { self.bring_up.authentication() }
    }

    /// The authentication has ended well.
    pub fn authenticated(&mut self) {
        self.bring_up.authenticated();
    }

    /// Where the session stands. While a changed namespace is looked at again it stays ready,
    /// with what was known before.
    #[must_use]
    pub fn state(&self) -> SessionState<'_> {
        match (&self.error, &self.ready, self.step) {
            (Some(error), ..) => SessionState::Failed(error),
            (None, _, Step::Closed) => SessionState::Closed,
            _ if self.shutdown.is_some() => SessionState::ShuttingDown,
            (None, Some(ready), _) => SessionState::Ready(ready),
            (None, None, _) => SessionState::Connecting,
        }
    }

    /// Whether the namespace changed (size, protection) since the last call, after it was ready.
    pub fn take_changed(&mut self) -> bool {
        core::mem::take(&mut self.changed)
    }

    /// Begins an orderly shutdown. I/O queues should be idle. Before the controller is enabled
    /// there is nothing to shut down and the session is closed at once.
    pub fn shutdown(&mut self, now: Duration) {
        if self.shutdown.is_some() || matches!(self.step, Step::Closed | Step::Failed) {
            return;
        }
        if !self.bring_up.is_enabled() {
            self.step = Step::Closed;
            return;
        }
        self.shutdown = Some(Shutdown::new(now, self.bring_up.ready_timeout()));
        if self.in_flight.is_none() {
            self.step = Step::Shutdown;
        }
    }

    /// The next command to send, if any. Call until it gives `None`, after every completion, and
    /// at [`Session::deadline`].
    pub fn next_command(&mut self, now: Duration) -> Option<AdminCommand> {
        if matches!(self.step, Step::Closed | Step::Failed) {
            return None;
        }
        if let Some(error) = self.overdue(now) {
            self.fail(error);
            return None;
        }
        let is_up = self.bring_up.is_enabled() && self.shutdown.is_none();
        if is_up && self.has_keep_alive() && self.keep_alive.is_none() && now >= self.keep_alive_at
        {
            self.keep_alive_at = now + self.config.kato / 2;
            let request = Request::plain("Keep Alive", Sqe::new(AdminOpcode::KEEP_ALIVE.0));
            return Some(Self::send(request, TAG_KEEP_ALIVE, now, &mut self.keep_alive));
        }
        let event_due = self.event_at.is_some_and(|at| now >= at);
        if is_up && event_due && self.event.is_none() && self.controller.is_some() {
            let sqe = Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0);
            let request = Request::plain("Asynchronous Event Request", sqe);
            return Some(Self::send(request, TAG_EVENT, now, &mut self.event));
        }
        if self.in_flight.is_some() {
            return None;
        }
        if self.step == Step::OutliveOld && self.old.is_none_or(|old| now >= old.safe_at) {
            self.step = Step::Queues;
        }
        if self.step == Step::Idle && self.other.is_some() {
            self.step = Step::EndOther;
        }
        if self.step == Step::Idle && self.rescan_at.is_some_and(|at| now >= at) {
            self.rescan_at = None;
            // Where events tell of changes, reading the log has the next change told as well.
            let is_told = self.events() & IdentifyController::OAES_NAMESPACE_ATTRIBUTE != 0;
            self.step = match self.is_list() && !is_told {
                true => Step::List,
                false => Step::ChangedNamespaces,
            };
        }
        if self.step == Step::Idle && self.health_at.is_some_and(|at| now >= at) {
            self.step = Step::Health;
        }
        let request = self.step_request(now)?;
        Some(Self::send(request, TAG_STEP, now, &mut self.in_flight))
    }

    fn send(
        request: Request,
        tag: u16,
        now: Duration,
        in_flight: &mut Option<InFlight>,
    ) -> AdminCommand {
        *in_flight =
            Some(InFlight { what: request.what, sent_at: now, read_len: request.read_len });
        let mut sqe = request.sqe;
        sqe.cid.set(tag);
        AdminCommand { tag, sqe: sqe.to_bytes(), write: request.write, read_len: request.read_len }
    }

    fn step_request(&self, now: Duration) -> Option<Request> {
        let nsid = self.config.nsid;
        Some(match self.step {
            Step::BringUp => return self.bring_up.request(now),
            Step::EndOld => cross_controller_reset(self.old?)?,
            Step::EndOther => cross_controller_reset(self.other?)?,
            Step::OutliveOld => return None,
            Step::Queues => {
                let wanted_z = u32::from(self.config.queues_wanted - 1);
                let value = wanted_z << 16 | wanted_z;
                set_features("Set Features: Number of Queues", Feature::NUMBER_OF_QUEUES, value)
            }
            Step::EventConfiguration => set_features(
                "Set Features: Asynchronous Event Configuration",
                Feature::ASYNC_EVENT_CONFIGURATION,
                self.events() | if self.tells_health { u32::from(HEALTH_EVENTS) } else { 0 },
            ),
            Step::NvmController => {
                Request::identify("Identify Controller (NVM)", Cns::IOCS_CONTROLLER, 0)
            }
            Step::Descriptors => Request::identify(
                "Identify Namespace Descriptors",
                Cns::NAMESPACE_DESCRIPTORS,
                nsid,
            ),
            Step::Namespace => Request::identify("Identify Namespace", Cns::NAMESPACE, nsid),
            Step::Independent => Request::identify(
                "Identify Namespace (independent)",
                Cns::INDEPENDENT_NAMESPACE,
                nsid,
            ),
            Step::ChangedNamespaces => {
                let what = "Get Log Page: Changed Namespaces";
                log_page(what, LogPage::CHANGED_NAMESPACES, 0, 4096)
            }
            Step::AnaLog => {
                let len = self.ana_log_len()?;
                log_page("Get Log Page: ANA", LogPage::ANA, ANA_LSP_GROUPS_ONLY, len)
            }
            Step::List => Request::identify("Identify Namespaces", Cns::ACTIVE_NAMESPACES, 0),
            Step::Health => log_page("Get Log Page: SMART", LogPage::SMART, 0, SMART_BYTES),
            Step::Shutdown => return self.shutdown.as_ref()?.request(now),
            Step::Idle | Step::Closed | Step::Failed => return None,
        })
    }

    /// A completion, with the controller-to-host data of the command.
    ///
    /// # Errors
    /// What [`SessionState::Failed`] says from now on.
    pub fn on_completion(
        &mut self,
        tag: u16,
        cqe: &[u8; 16],
        data: &[u8],
        now: Duration,
    ) -> Result<(), SessionError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let result = self.complete(tag, &Cqe::from_bytes(cqe), data, now);
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn complete(
        &mut self,
        tag: u16,
        cqe: &Cqe,
        data: &[u8],
        now: Duration,
    ) -> Result<(), SessionError> {
        let slot = match tag {
            TAG_STEP => &mut self.in_flight,
            TAG_KEEP_ALIVE => &mut self.keep_alive,
            TAG_EVENT => &mut self.event,
            _ => return Err(SessionError::UnknownTag(tag)),
        };
        let InFlight { what, read_len, .. } = slot.take().ok_or(SessionError::UnknownTag(tag))?;
        let status = cqe.status();
        if status.is_success() && data.len() != read_len as usize {
            return Err(SessionError::Length { what, len: data.len(), expected: read_len });
        }
        match tag {
            TAG_KEEP_ALIVE if !status.is_success() && self.shutdown.is_none() => {
                Err(SessionError::Command { what, status })
            }
            TAG_KEEP_ALIVE => Ok(()),
            TAG_EVENT => {
                self.on_event(cqe, now);
                Ok(())
            }
            _ => {
                self.on_step(what, cqe, data, now)?;
                if self.shutdown.is_some() && self.step != Step::Closed {
                    self.step = Step::Shutdown;
                }
                Ok(())
            }
        }
    }

    fn on_event(&mut self, cqe: &Cqe, now: Duration) {
        if !cqe.status().is_success() {
            // The limit is exceeded or requests are aborted: live without events.
            self.event_at = None;
            return;
        }
        self.event_at = Some(now + EVENT_INTERVAL);
        let dw0 = cqe.dw0();
        let notice = dw0 >> 8 & 0xff;
        let is_change = dw0 & 7 == event::TYPE_NOTICE
            && matches!(notice, event::NOTICE_NAMESPACE_ATTRIBUTE | event::NOTICE_ANA);
        if is_change {
            self.rescan(now);
        }
        if dw0 & 7 == event::TYPE_SMART {
            self.health_at = self.health_at.map(|at| at.min(now + HEALTH_DELAY));
        }
    }

    /// Whether it is about which namespaces there are, and none of them.
    fn is_list(&self) -> bool {
        self.config.nsid == NSID_ALL
    }

    /// The events to be told of, of those that the controller has.
    fn events(&self) -> u32 {
        let wanted = match self.is_list() {
            true => IdentifyController::OAES_NAMESPACE_ATTRIBUTE,
            false => IdentifyController::OAES_NAMESPACE_ATTRIBUTE | IdentifyController::OAES_ANA,
        };
        self.controller.as_ref().map_or(0, |info| info.oaes & wanted)
    }

    /// Bytes of the ANA log without namespaces; `None`: there is no such log.
    fn ana_log_len(&self) -> Option<u32> {
        const HEADER: u32 = 16;
        const GROUP: u32 = 32;
        let info = self.controller.as_ref()?;
        let groups = info.ana?.groups.min((ANA_LOG_BYTES_MAX - HEADER) / GROUP);
        Some((HEADER + groups * GROUP).min(info.transfer_bytes_max & !3))
    }

    /// The namespace is known but for its ANA state.
    fn after_namespace(&mut self) -> Result<(), SessionError> {
        if self.ana_log_len().is_some() {
            self.step = Step::AnaLog;
            return Ok(());
        }
        self.finish_scan()
    }

    fn on_step(
        &mut self,
        what: &'static str,
        cqe: &Cqe,
        data: &[u8],
        now: Duration,
    ) -> Result<(), SessionError> {
        let status = cqe.status();
        let ok = status.is_success();
        let required = || if ok { Ok(()) } else { Err(SessionError::Command { what, status }) };
        match self.step {
            Step::BringUp => {
                if let Some(info) = self.bring_up.on_reply(what, cqe, data, now)? {
                    if info.cntrltype == IdentifyController::CNTRLTYPE_DISCOVERY {
                        let value = u64::from(info.cntrltype);
                        return Err(SessionError::Invalid { what: "controller type", value });
                    }
                    self.controller = Some(info.clone());
                    self.step = match self.old {
                        _ if self.is_list() && self.events() != 0 => Step::EventConfiguration,
                        _ if self.is_list() => Step::List,
                        // Or there was one and it is over by now.
                        None => Step::Queues,
                        Some(old) if old.instance.is_some() && info.instance.is_some() => {
                            Step::EndOld
                        }
                        Some(_) => Step::OutliveOld,
                    };
                }
            }
            Step::EndOld => {
                self.step = if has_ended(cqe) { Step::Queues } else { Step::OutliveOld };
            }
            Step::Queues => {
                required()?;
                // NSQA in 15:0, NCQA in 31:16, zero-based; a queue is a pair.
                let granted_z = (cqe.dw0() & 0xffff).min(cqe.dw0() >> 16) as u16;
                self.queues = granted_z.saturating_add(1).min(self.config.queues_wanted);
                self.step =
                    if self.events() != 0 { Step::EventConfiguration } else { Step::Health };
            }
            Step::EventConfiguration => {
                if !ok && core::mem::take(&mut self.tells_health) {
                    // Linux's target takes no event that it does not have.
                    return Ok(());
                }
                self.event_at = ok.then_some(now);
                self.step = if self.is_list() { Step::List } else { Step::Health };
            }
            Step::NvmController => {
                self.on_nvm_controller(what, ok, data)?;
                self.step = Step::Descriptors;
            }
            Step::ChangedNamespaces => {
                required()?;
                self.step = if self.is_list() { Step::List } else { Step::Descriptors };
            }
            Step::List => {
                required()?;
                let attached = active_namespaces(what, data)?;
                if self.event_at.is_none() {
                    self.rescan_at = Some(now + LIST_INTERVAL);
                }
                self.finish(None, attached)?;
            }
            Step::Health => {
                // A controller that does not tell is not asked again.
                self.health_at = ok.then_some(now + HEALTH_INTERVAL);
                let log = if ok { Some(identify_data::<SmartLog>(what, data)?) } else { None };
                self.wear = log.and_then(Wear::from_log);
                self.step = match &mut self.ready {
                    Some(ready) => {
                        self.changed |= ready.wear != self.wear;
                        ready.wear = self.wear;
                        Step::Idle
                    }
                    None => Step::NvmController,
                };
            }
            Step::Descriptors => {
                self.draft = Draft::default();
                if ok {
                    self.on_descriptors(data)?;
                }
                self.step = Step::Namespace;
            }
            Step::Namespace => {
                let found = match required() {
                    Ok(()) => self.check_namespace(identify_data(what, data)?),
                    Err(_) if status.is(Status::INVALID_NAMESPACE_OR_FORMAT) => {
                        Err(SessionError::NoNamespace(self.config.nsid))
                    }
                    Err(error) => Err(error),
                };
                let namespace = match found {
                    Err(SessionError::NoNamespace(_)) if self.ready.is_some() => {
                        self.on_detached(now);
                        return Ok(());
                    }
                    found => found?,
                };
                let has_independent = self.controller.as_ref().is_some_and(|info| {
                    info.version >= crate::spec::VERSION_2_0 && info.write_cache
                });
                self.draft.namespace = Some(namespace);
                if has_independent {
                    self.step = Step::Independent;
                } else {
                    self.after_namespace()?;
                }
            }
            Step::Independent => {
                if ok {
                    let id = identify_data::<IdentifyNamespaceIndependent>(what, data)?;
                    if let Some(namespace) = &mut self.draft.namespace
                        && id.nsfeat & IdentifyNamespaceIndependent::NSFEAT_VWC_NOT_PRESENT != 0
                    {
                        namespace.write_cache = false;
                    }
                }
                self.after_namespace()?;
            }
            Step::AnaLog => {
                // Without the log nothing is known, as with a controller that has none.
                if ok && let Some(namespace) = &mut self.draft.namespace {
                    namespace.ana = log_state(data, namespace.ana_group);
                }
                self.finish_scan()?;
            }
            Step::EndOther => {
                self.other = None;
                self.other_ended = Some(has_ended(cqe));
                self.step = Step::Idle;
            }
            Step::Shutdown => {
                if let Some(shutdown) = &mut self.shutdown
                    && shutdown.on_reply(what, cqe, now)?
                {
                    self.step = Step::Closed;
                }
            }
            Step::OutliveOld | Step::Idle | Step::Closed | Step::Failed => {}
        }
        Ok(())
    }

    /// CNS 06 is optional: without it the transfer limit is assumed for Write Zeroes and Verify too.
    fn on_nvm_controller(
        &mut self,
        what: &'static str,
        ok: bool,
        data: &[u8],
    ) -> Result<(), SessionError> {
        let Some(info) = &self.controller else { return Ok(()) };
        self.limits = if ok {
            let id = identify_data::<IdentifyControllerNvm>(what, data)?;
            let bytes = |limit: u8| match limit {
                0 => u64::MAX,
                limit => 1u64
                    .checked_shl(u32::from(limit))
                    .and_then(|pages| pages.checked_mul(info.page_bytes))
                    .unwrap_or(u64::MAX),
            };
            let range = id.dmrsl.get();
            NvmLimits {
                write_zeroes_bytes: bytes(id.wzsl),
                verify_bytes: bytes(id.vsl),
                deallocate_blocks: if range == 0 { u32::MAX } else { range },
            }
        } else {
            let bytes = u64::from(info.transfer_bytes_max);
            NvmLimits {
                write_zeroes_bytes: bytes,
                verify_bytes: bytes,
                deallocate_blocks: u32::MAX,
            }
        };
        Ok(())
    }

    fn on_descriptors(&mut self, mut list: &[u8]) -> Result<(), SessionError> {
        while let [kind, len, _, _, rest @ ..] = list {
            let (kind, len) = (*kind, usize::from(*len));
            if kind == 0 || len == 0 || len > rest.len() {
                break;
            }
            let (id, rest) = rest.split_at(len);
            match (kind, len) {
                (nidt::EUI64, 8) => self.draft.eui64.copy_from_slice(id),
                (nidt::NGUID, 16) => self.draft.nguid.copy_from_slice(id),
                (nidt::UUID, 16) => self.draft.uuid.copy_from_slice(id),
                (nidt::CSI, 1) if id[0] != crate::spec::CSI_NVM => {
                    let value = u64::from(id[0]);
                    return Err(SessionError::Invalid { what: "command set", value });
                }
                _ => {}
            }
            list = rest;
        }
        Ok(())
    }

    fn check_namespace(&self, id: &IdentifyNamespace) -> Result<RemoteNamespace, SessionError> {
        let nsid = self.config.nsid;
        let Some(controller) = &self.controller else {
            return Err(SessionError::NoNamespace(nsid));
        };
        let blocks = id.nsze.get();
        if blocks == 0 {
            return Err(SessionError::NoNamespace(nsid));
        }
        let invalid = |what, value: u64| Err(SessionError::Invalid { what, value });
        let format = id.lbaf[id.lba_format_index()];
        if !(9..=16).contains(&format.lbads) {
            return invalid("block size (LBADS)", u64::from(format.lbads));
        }
        if format.ms.get() != 0 {
            return invalid("metadata size", u64::from(format.ms.get()));
        }
        if id.dps & 7 != 0 {
            return invalid("protection information type", u64::from(id.dps & 7));
        }
        let block_bytes = 1u32 << format.lbads;
        let fits = blocks.checked_mul(u64::from(block_bytes)).is_some_and(|b| b <= i64::MAX as u64);
        if !fits {
            return invalid("namespace size in blocks", blocks);
        }
        if controller.transfer_bytes_max < block_bytes {
            return invalid("transfer limit (MDTS)", u64::from(controller.transfer_bytes_max));
        }
        let or_id = |from_list: [u8; 16], from_id: [u8; 16]| {
            if from_list == [0; 16] { from_id } else { from_list }
        };
        let has_granularities = id.nsfeat & IdentifyNamespace::NSFEAT_OPTPERF != 0;
        let granularity = |blocks_z: u16| {
            let bytes = (u32::from(blocks_z) + 1).checked_mul(block_bytes);
            if has_granularities { bytes.unwrap_or(0) } else { 0 }
        };
        let blocks_of = |bytes: u64| (bytes / u64::from(block_bytes)).min(1 << 16) as u32;
        let zeroes_blocks = blocks_of(self.limits.write_zeroes_bytes);
        let can = |command: u16| controller.oncs & command != 0;
        // A page of source ranges of format 0h; what has no such format is not used.
        let copy = CopyLimits {
            ranges_max: (u16::from(id.msrc_z) + 1).min(128),
            range_blocks_max: id.mssrl.get(),
            blocks_max: id.mcl.get(),
        };
        let can_copy = can(IdentifyController::ONCS_COPY)
            && controller.cdfs & 1 != 0
            && copy.range_blocks_max > 0
            && copy.blocks_max > 0;
        Ok(RemoteNamespace {
            nsid,
            is_attached: true,
            block_bytes,
            blocks,
            uuid: self.draft.uuid,
            nguid: or_id(self.draft.nguid, id.nguid),
            eui64: if self.draft.eui64 == [0; 8] { id.eui64 } else { self.draft.eui64 },
            read_only: id.nsattr & IdentifyNamespace::NSATTR_WRITE_PROTECTED != 0,
            write_cache: controller.write_cache,
            deallocate: can(IdentifyController::ONCS_DSM),
            deallocate_blocks_max: self.limits.deallocate_blocks,
            write_zeroes: can(IdentifyController::ONCS_WRITE_ZEROES) && zeroes_blocks > 0,
            write_zeroes_blocks_max: zeroes_blocks.max(1),
            deallocated_reads_zero: id.dlfeat & 7 == IdentifyNamespace::DLFEAT_READS_ZERO,
            write_granularity_bytes: granularity(id.npwg_z.get()),
            deallocate_granularity_bytes: granularity(id.npdg_z.get()),
            compare: can(IdentifyController::ONCS_COMPARE),
            compare_and_write: can(IdentifyController::ONCS_COMPARE)
                && controller.fuses & IdentifyController::FUSES_COMPARE_AND_WRITE != 0,
            verify_blocks_max: match can(IdentifyController::ONCS_VERIFY) {
                true => blocks_of(self.limits.verify_bytes),
                false => 0,
            },
            copy: can_copy.then_some(copy),
            rescap: match can(IdentifyController::ONCS_RESERVATIONS) {
                true => id.rescap,
                false => 0,
            },
            ana_group: if controller.ana.is_some() { id.anagrpid.get() } else { 0 },
            ana: None,
        })
    }

    /// The namespace was there, and is not any more. It may come back.
    fn on_detached(&mut self, now: Duration) {
        if let Some(namespace) = self.ready.as_mut().and_then(|ready| ready.namespace.as_mut()) {
            self.changed |= namespace.is_attached;
            namespace.is_attached = false;
        }
        self.rescan_at = Some(now + DETACHED_INTERVAL);
        self.step = Step::Idle;
    }

    fn finish_scan(&mut self) -> Result<(), SessionError> {
        let namespace = self.draft.namespace.take();
        let namespace = namespace.ok_or(SessionError::NoNamespace(self.config.nsid))?;
        self.finish(Some(namespace), Vec::new())
    }

    fn finish(
        &mut self,
        namespace: Option<RemoteNamespace>,
        attached: Vec<u32>,
    ) -> Result<(), SessionError> {
        let Some(controller) = &self.controller else {
            return Err(SessionError::NoNamespace(self.config.nsid));
        };
        let entries = u32::from(self.config.queue_entries).min(controller.queue_entries_max);
        let ready = ReadyInfo {
            cntlid: controller.cntlid,
            queues: self.queues,
            queue_entries: entries as u16,
            in_capsule_bytes: controller.in_capsule_bytes,
            transfer_bytes_max: controller.transfer_bytes_max,
            namespace,
            attached,
            wear: self.wear,
            controller: controller.clone(),
        };
        if let Some(before) = &self.ready {
            if let (Some(old), Some(new)) = (&before.namespace, &ready.namespace) {
                let same_identity = old.uuid == new.uuid
                    && old.nguid == new.nguid
                    && old.eui64 == new.eui64
                    && old.block_bytes == new.block_bytes;
                if !same_identity {
                    let value = u64::from(new.nsid);
                    return Err(SessionError::Invalid {
                        what: "another identity for namespace",
                        value,
                    });
                }
            }
            self.changed |=
                before.namespace != ready.namespace || before.attached != ready.attached;
        }
        self.ready = Some(ready);
        self.step = Step::Idle;
        Ok(())
    }

    /// When [`Session::next_command`] wants to be called although nothing happened.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        if matches!(self.step, Step::Closed | Step::Failed) {
            return None;
        }
        let is_up = self.bring_up.is_enabled() && self.shutdown.is_none();
        let timeout = |in_flight: &Option<InFlight>, after: Duration| {
            in_flight.as_ref().map(|command| command.sent_at.saturating_add(after))
        };
        let idle = |at: Option<Duration>| if self.in_flight.is_none() { at } else { None };
        let polls = match self.step {
            Step::BringUp => idle(self.bring_up.poll_at()),
            Step::Shutdown => idle(self.shutdown.as_ref().map(Shutdown::poll_at)),
            Step::OutliveOld => self.old.map_or(Some(Duration::ZERO), |old| Some(old.safe_at)),
            Step::Idle if self.other.is_some() => Some(Duration::ZERO),
            Step::Idle => self.rescan_at.into_iter().chain(self.health_at).min(),
            _ => None,
        };
        [
            timeout(&self.in_flight, self.config.command_timeout),
            timeout(&self.keep_alive, self.config.kato),
            polls,
            (is_up && self.has_keep_alive() && self.keep_alive.is_none())
                .then_some(self.keep_alive_at),
            if is_up && self.event.is_none() { self.event_at } else { None },
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn has_keep_alive(&self) -> bool {
        self.config.kato != Duration::ZERO
            && self.controller.as_ref().is_none_or(|info| info.has_keep_alive)
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        let limits =
            [(&self.in_flight, self.config.command_timeout), (&self.keep_alive, self.config.kato)];
        limits.into_iter().find_map(|(in_flight, after)| {
            let command = in_flight.as_ref()?;
            (now >= command.sent_at.saturating_add(after))
                .then_some(SessionError::Timeout { what: command.what, after })
        })
    }

    fn fail(&mut self, error: SessionError) {
        self.error = Some(error);
        self.step = Step::Failed;
        self.in_flight = None;
        self.keep_alive = None;
        self.event = None;
    }
}

/// An Active Namespace ID list: ascending, and zeroes behind the last.
fn active_namespaces(what: &'static str, data: &[u8]) -> Result<Vec<u32>, SessionError> {
    let expected = IDENTIFY_LEN as u32;
    if data.len() != IDENTIFY_LEN {
        return Err(SessionError::Length { what, len: data.len(), expected });
    }
    let (list, _) = data.as_chunks::<4>();
    let mut nsids = Vec::new();
    for nsid in list.iter().map(|bytes| u32::from_le_bytes(*bytes)).take_while(|nsid| *nsid != 0) {
        if nsids.last().is_some_and(|last| nsid <= *last) {
            let value = u64::from(nsid);
            return Err(SessionError::Invalid { what: "namespace out of order", value });
        }
        nsids.push(nsid);
    }
    Ok(nsids)
}

fn log_page(what: &'static str, lid: LogPage, lsp: u8, len: u32) -> Request {
    let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
    sqe.nsid.set(NSID_ALL);
    GetLogPage {
        lid,
        lsp,
        rae: false,
        len: u64::from(len),
        offset: 0,
        lsi: 0,
        offset_is_index: false,
        csi: 0,
        uuid_index: 0,
    }
    .apply(&mut sqe);
    Request::read(what, sqe, len)
}

fn cross_controller_reset(old: OldController) -> Option<Request> {
    let instance = old.instance?;
    let mut sqe = Sqe::new(AdminOpcode::CROSS_CONTROLLER_RESET.0);
    sqe.cdw10.set(u32::from(old.cntlid) | u32::from(instance.ciu) << 16);
    sqe.cdw12.set(instance.cirn as u32);
    sqe.cdw13.set((instance.cirn >> 32) as u32);
    Some(Request::plain("Cross-Controller Reset", sqe))
}

/// Whether the answer to a Cross-Controller Reset says that nothing of the controller can land any
/// more. "No such controller" says as much as "ended"; it is also the answer of a target that was
/// restarted.
fn has_ended(cqe: &Cqe) -> bool {
    let status = cqe.status();
    (status.is_success() && u64::from(cqe.dw0()) & CROSS_RESET_IMMEDIATE != 0)
        || status.is(Status::INVALID_CONTROLLER_IDENTIFIER)
}

pub(super) fn set_features(what: &'static str, fid: Feature, value: u32) -> Request {
    let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
    sqe.cdw10.set(u32::from(fid.0));
    sqe.cdw11.set(value);
    Request::plain(what, sqe)
}
