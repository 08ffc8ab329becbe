//! Connect, and what an admin queue adds to a connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{Geometry, Identity, Op};
use nvme::ctrl::{
    self, AdminOutcome, Controller, ControllerConfig, ControllerKind, ControllersWanted,
    HealthCounters,
};
use nvme::fabrics::{ConnectReject, ConnectRequest};
use nvme::spec::{AdminOpcode, AsciiField, NSID_ALL, Nqn, Status, WriteProtectState};
use nvme::subsys::discovery::{DiscoveryLog, HEADER_LEN};
use nvme::subsys::{self, NamespaceInfo, SubsystemInfo};

use crate::abort::{self, Abort};
use crate::auth::Demand;
use crate::change::{self, Change, Request};
use crate::config::{Limits, ListenerKind, SubsystemConfig};
use crate::conn::{Conn, Held, Life, Role};
use crate::core::Env;
use crate::limits::count;
use crate::registry::{Applicant, Association, HostKey, Refusal, Served};
use crate::table::{Table, View};
use crate::target::Shared;
use crate::vitals::Vitals;

/// Model number of every controller.
const MODEL: &str = "Penstock";

/// Firmware revision: the version of this crate, which is eight characters at the most.
const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// What an admin queue has beside its commands.
pub(crate) struct Admin {
    pub(crate) controller: Controller,
    /// What a discovery controller serves; empty for the others.
    log: Arc<DiscoveryLog>,
    /// Of the directory that it was last made from.
    log_generation: u64,
    /// Commands that wait for something that they began.
    awaited: Vec<(u16, Awaited)>,
    /// A namespace that the host has protected, whose volume is to be flushed.
    protecting: Option<Protecting>,
    /// What the controller returns, command by command; kept for its memory.
    out: Vec<u8>,
    /// What the host sent along, likewise.
    input: Vec<u8>,
}

impl Admin {
    /// Whether a command waits for something that it began.
    pub(crate) fn awaits(&self) -> bool {
        !self.awaited.is_empty()
    }
}

/// What an admin command began.
enum Awaited {
    Abort(Arc<Abort>),
    /// And the namespace that is protected by it, if one is.
    Change(Change, Option<u32>),
}

/// What is in the volatile write cache for a namespace is committed when it becomes write protected,
/// before the host is told (NVMe Base 2.2, section 5.1.25.1.31).
#[derive(Clone, Copy)]
struct Protecting {
    /// The command that is answered then.
    slot: u16,
    nsid: u32,
    /// The flush is at the volume.
    is_flushing: bool,
}

impl Awaited {
    fn is_done(&self) -> bool {
        match self {
            Awaited::Abort(abort) => abort.outcome().is_some(),
            Awaited::Change(change, _) => change.is_done(),
        }
    }
}

/// The description that controllers give of a subsystem.
pub(crate) fn subsystem_info(
    config: &SubsystemConfig,
    namespaces: Vec<NamespaceInfo>,
    limits: &Limits,
) -> Result<SubsystemInfo, String> {
    let limits = subsys::Limits {
        queue_entries_max: limits.queue_entries,
        io_queues_max: limits.io_queues,
        mdts_bytes: limits.transfer_bytes,
        in_capsule_bytes: limits.in_capsule_bytes,
        kato_max: limits.kato_max,
        namespaces_max: limits.namespaces_max,
        transport: nvme::xfer::Transport::Fabrics,
    };
    let ascii = |e: nvme::spec::InvalidAscii| format!("serial \"{}\" {e}", config.serial);
    SubsystemInfo::new(
        Nqn::new(&config.nqn).map_err(|e| e.to_string())?,
        AsciiField::new(&config.serial).map_err(ascii)?,
        AsciiField::new(MODEL).map_err(|e| e.to_string())?,
        AsciiField::new(FIRMWARE).map_err(|e| e.to_string())?,
        namespaces,
        limits,
    )
    .map_err(|e| e.to_string())
}

/// The discovery subsystem's description.
pub(crate) fn discovery_info(nqn: Option<&Nqn>, limits: &Limits) -> Result<SubsystemInfo, String> {
    let nqn = nqn.map_or(nvme::spec::DISCOVERY_NQN, Nqn::as_str);
    let config = SubsystemConfig::new(nqn, MODEL);
    subsystem_info(&config, Vec::new(), limits)
}

/// The description that controllers give of a volume.
pub(crate) fn namespace_info(nsid: u32, geometry: &Geometry, identity: &Identity) -> NamespaceInfo {
    NamespaceInfo {
        uuid: identity.uuid,
        nguid: identity.nguid,
        read_only: geometry.read_only,
        write_cache: geometry.write_cache,
        deallocate: geometry.deallocate,
        write_zeroes: geometry.write_zeroes,
        deallocated_reads_zero: geometry.deallocated_reads_zero,
        write_granularity_bytes: geometry.physical_block_bytes,
        deallocate_granularity_bytes: geometry.deallocate_granularity_bytes,
        optimal_write_bytes: geometry.optimal_io_bytes,
        ..NamespaceInfo::new(nsid, geometry.block_bytes, geometry.blocks)
    }
}

/// The counters of the SMART log, as far as the cores count them.
pub(crate) fn health(view: Option<&View>, shared: &Arc<Shared>, now: Duration) -> HealthCounters {
    let Some(view) = view else { return HealthCounters::default() };
    let totals = view.subsystem.totals();
    let power = shared.vitals.power(now);
    HealthCounters {
        read_commands: totals.reads,
        write_commands: totals.writes,
        bytes_read: totals.read_bytes,
        bytes_written: totals.written_bytes,
        media_errors: totals.media_errors,
        busy: view.subsystem.busy.total(now),
        power_cycles: power.power_cycles,
        power_on: power.power_on,
        unsafe_shutdowns: power.unsafe_shutdowns,
        temperature_kelvin: Vitals::temperature_kelvin(shared, now),
        ..HealthCounters::default()
    }
}

/// The live controllers of a controller's subsystem, as Identify asks for them.
fn controllers(wanted: ControllersWanted, of: &Association, env: &Env<'_>) -> Vec<u16> {
    let hosts = match (wanted, of.served) {
        (ControllersWanted::Attached(nsid), Served::Subsystem(id)) => {
            let ns = env.table.subsystems.get(&id).and_then(|s| s.namespace(nsid));
            ns.map(|ns| &ns.hosts)
        }
        _ => None,
    };
    let is_meant = |a: &Arc<Association>| {
        a.is_proven() && !a.is_dead() && hosts.is_none_or(|hosts| hosts.admits(&a.host.hostnqn))
    };
    let list = env.shared.registry.list(Some(of.served));
    list.iter().filter(|a| is_meant(a)).map(|a| a.cntlid).collect()
}

fn reject_of(refusal: Refusal) -> ConnectReject {
    match refusal {
        Refusal::Controllers | Refusal::ControllersOfHost | Refusal::QueuesOfHost => {
            ConnectReject::BUSY
        }
        Refusal::UnknownController => ConnectReject::UNKNOWN_CONTROLLER,
        Refusal::NotReady => ConnectReject::SEQUENCE,
        Refusal::QueueIdentifier => ConnectReject::QID,
    }
}

/// Counts a refusal that a limit is the reason of.
pub(crate) fn count_refusal(refusal: Refusal, env: &Env<'_>) {
    let hits = &env.shared.hits;
    match refusal {
        Refusal::Controllers => count(&hits.controllers),
        Refusal::ControllersOfHost => count(&hits.controllers_of_host),
        Refusal::QueuesOfHost => count(&hits.connections_of_host),
        Refusal::UnknownController | Refusal::NotReady | Refusal::QueueIdentifier => {}
    }
}

impl Conn {
    /// A Connect command with all its data.
    pub(crate) fn connect(&mut self, slot: u16, env: &mut Env<'_>) {
        let mut data = [0; 1024];
        if self.slot_data(slot, &mut data) != data.len() {
            self.reject(slot, ConnectReject::DATA_LENGTH, env);
            return;
        }
        let request = match ConnectRequest::parse(self.slot_sqe(slot), &data) {
            Ok(request) => request,
            Err(reject) => return self.reject(slot, reject, env),
        };
        let Some(served) = self.served(&request.subnqn, env.table) else {
            let why = format!(
                "host `{}` asks for subsystem `{}`, which is not on this listener; what is there \
                 `penstock status` says, and to the host `nvme discover`",
                request.hostnqn, request.subnqn
            );
            env.shared.refusals.note(self.peer(), self.port().id, why, env.now);
            return self.reject(slot, ConnectReject::UNKNOWN_SUBSYSTEM, env);
        };
        let host = HostKey { hostnqn: request.hostnqn.as_str().to_owned(), hostid: request.hostid };
        if let Some(proven) = &self.proven
            && (proven.hostnqn != host.hostnqn || proven.subnqn != request.subnqn.as_str())
        {
            let why = format!(
                "the host has proven by its TLS key to be `{}` for `{}`, but its Connect command \
                 says `{}` for `{}`: give the host a key of the names that it connects with",
                proven.hostnqn, proven.subnqn, host.hostnqn, request.subnqn
            );
            env.shared.refusals.note(self.peer(), self.port().id, why, env.now);
            return self.reject(slot, ConnectReject::INVALID_HOST, env);
        }
        let state = match served {
            Served::Subsystem(id) => env.table.subsystems.get(&id).cloned(),
            Served::Discovery => None,
        };
        if state.as_ref().is_some_and(|state| !state.hosts.admits(&host.hostnqn)) {
            let why = format!(
                "host `{}` may not use subsystem `{}`: it is not among its hosts (`hosts=`, \
                 `penstock subsystem hosts`)",
                request.hostnqn, request.subnqn
            );
            env.shared.refusals.note(self.peer(), self.port().id, why, env.now);
            return self.reject(slot, ConnectReject::INVALID_HOST, env);
        }
        let demand = self.demand(&host.hostnqn, env);
        if demand == Demand::Impossible {
            let why = format!(
                "host `{0}` has no secret for DH-HMAC-CHAP, and this listener, with auth=required, \
                 takes nobody without: `penstock key generate --host {0} --kind dhchap`, and on the \
                 host run what `penstock key export` prints for it",
                host.hostnqn
            );
            env.shared.refusals.note(self.peer(), self.port().id, why, env.now);
            return self.reject(slot, ConnectReject::INVALID_HOST, env);
        }
        let view = state.map(|state| state.view(self.port().id, &host.hostnqn));
        if !request.is_admin() {
            return self.connect_io(slot, &request, (served, host, demand), view, env);
        }
        if env.shared.registry.is_fenced(served, &host) {
            // The host was here before and its old controller still has writes that can land. The
            // new one begins when they are done: what it is sent then comes after them.
            self.keep_handshake();
            self.hold(Held::Connect(slot));
            return;
        }
        self.connect_admin(slot, &request, (served, host, demand), view, env);
    }

    fn applicant(&self, (served, host, demand): (Served, HostKey, Demand)) -> Applicant<'_> {
        let tls = self.proven.as_ref().map(|proven| proven.text.as_str());
        let is_proven = demand == Demand::Nothing;
        Applicant { served, host, port: self.port().id, peer: self.peer(), tls, is_proven }
    }

    fn served(&self, subnqn: &Nqn, table: &Table) -> Option<Served> {
        if subnqn.is_discovery() || subnqn == table.directory.info.nqn() {
            return Some(Served::Discovery);
        }
        if self.port().kind == ListenerKind::Discovery {
            return None;
        }
        table.ids.get(subnqn).copied().map(Served::Subsystem)
    }

    fn refuse(&mut self, slot: u16, refusal: Refusal, env: &mut Env<'_>) {
        count_refusal(refusal, env);
        self.reject(slot, reject_of(refusal), env);
    }

    fn reject(&mut self, slot: u16, reject: ConnectReject, env: &mut Env<'_>) {
        tracing::debug!(peer = self.peer(), %reject, "connect refused");
        self.respond(slot, reject.status, reject.dw0.into(), env);
    }

    fn connect_admin(
        &mut self,
        slot: u16,
        request: &ConnectRequest,
        who: (Served, HostKey, Demand),
        view: Option<Arc<View>>,
        env: &mut Env<'_>,
    ) {
        let (_, host, demand) = &who;
        let demand = *demand;
        let (kind, subsys, log) = match &view {
            Some(view) => (ControllerKind::Io, &view.info, Arc::new(DiscoveryLog::new(0, &[]))),
            None => {
                let log = Arc::new(env.table.discovery_log(self.port(), &host.hostnqn));
                let kind = ControllerKind::Discovery(Arc::clone(&log));
                (kind, &env.table.directory.info, log)
            }
        };
        if let Err(reject) = ctrl::admit_admin(request, subsys) {
            return self.reject(slot, reject, env);
        }
        let applicant = self.applicant(who);
        let created = env.shared.registry.create(applicant, env.local.random_u64());
        let association = match created {
            Ok(association) => association,
            Err(refusal) => return self.refuse(slot, refusal, env),
        };
        let config = ControllerConfig {
            cntlid: association.cntlid,
            kind,
            hostnqn: request.hostnqn.clone(),
            hostid: request.hostid,
            kato: request.kato,
            subsys: Arc::clone(subsys),
        };
        let mut controller = Controller::new(config, env.now);
        controller.set_instance(association.instance);
        controller.set_port(self.port().id);
        if view.as_ref().is_some_and(|view| view.subsystem.was_reset.load(Ordering::Acquire)) {
            controller.note_subsystem_reset();
        }
        let cntlid = association.cntlid;
        let admin = Box::new(Admin {
            controller,
            log,
            log_generation: env.table.directory.generation,
            awaited: Vec::new(),
            protecting: None,
            out: Vec::new(),
            input: Vec::new(),
        });
        self.become_queue(Role::Admin(admin), association, view, request, None);
        let authreq = self.begin_auth(demand, env);
        self.respond_connected(slot, cntlid, authreq, env);
    }

    fn connect_io(
        &mut self,
        slot: u16,
        request: &ConnectRequest,
        who: (Served, HostKey, Demand),
        view: Option<Arc<View>>,
        env: &mut Env<'_>,
    ) {
        let Some(view) = view else {
            // A discovery controller has no I/O queues.
            return self.reject(slot, ConnectReject::QID, env);
        };
        if request.queue_entries > env.shared.limits.queue_entries.into() {
            return self.reject(slot, ConnectReject::SQSIZE, env);
        }
        let demand = who.2;
        let applicant = self.applicant(who);
        let registry = &env.shared.registry;
        let joined = registry.join(request.cntlid, request.qid, &applicant);
        let (association, epoch) = match joined {
            Ok(joined) => joined,
            Err(refusal) => return self.refuse(slot, refusal, env),
        };
        let cntlid = association.cntlid;
        let in_capsule = view.info.limits().in_capsule_bytes;
        let role = Role::Io { epoch };
        self.become_queue(role, association, Some(view), request, Some(in_capsule));
        let authreq = self.begin_auth(demand, env);
        self.respond_connected(slot, cntlid, authreq, env);
    }

    /// An admin command with all its data.
    pub(crate) fn admin(&mut self, slot: u16, env: &mut Env<'_>) {
        let sqe = *self.slot_sqe(slot);
        let len = self.slot_len(slot);
        let (Role::Admin(mut admin), Some(association)) =
            (std::mem::replace(&mut self.role, Role::Fresh), self.association.clone())
        else {
            debug_assert!(false, "admin commands come on admin queues");
            return;
        };
        admin.input.resize(len, 0);
        let mut input = std::mem::take(&mut admin.input);
        self.slot_data(slot, &mut input);
        if let Some(wanted) = Controller::controllers_wanted(&sqe) {
            let cntlids = controllers(wanted, &association, env);
            admin.controller.set_controllers(&cntlids);
        }
        if sqe.opcode == AdminOpcode::GET_LOG_PAGE.0 {
            association.letters.take_errors(|record| admin.controller.record_error(record));
            admin.controller.set_health(health(self.view.as_deref(), env.shared, env.now));
        }
        let outcome = admin.controller.admin(slot, &sqe, &input, &mut admin.out, env.now);
        association.grant(admin.controller.io_queues_granted());
        let out = std::mem::take(&mut admin.out);
        admin.input = input;
        let ready = admin.controller.is_ready();
        self.role = Role::Admin(admin);
        match outcome {
            AdminOutcome::Complete { status, result } => {
                association.set_ready(ready);
                if status.is_success() && !out.is_empty() {
                    self.respond_bytes(slot, &out, result, env);
                } else {
                    self.respond(slot, status, result, env);
                }
            }
            AdminOutcome::Pending => self.keep(slot),
            AdminOutcome::CrossReset { cntlid, instance } => {
                let registry = &env.shared.registry;
                if registry.end_instance(cntlid, instance, association.served, &association.host) {
                    env.shared.wake_all();
                    self.keep(slot);
                    self.hold(Held::CrossReset { slot, cntlid, instance });
                } else {
                    self.respond(slot, Status::INVALID_CONTROLLER_IDENTIFIER.dnr(), 0, env);
                }
            }
            AdminOutcome::Abort { sqid, cid } => match association.abort(sqid, cid) {
                Some(abort) => {
                    env.shared.wake_all();
                    self.await_outcome(slot, Awaited::Abort(abort));
                }
                None => self.abort_done(slot, abort::Outcome::NotAborted, env),
            },
            AdminOutcome::SubsystemReset { status, result } => {
                // This one goes when its answer is out.
                self.respond_and_part(slot, status, result, env);
                if let Some(view) = &self.view {
                    view.subsystem.was_reset.store(true, Ordering::Release);
                }
                env.shared.registry.end_subsystem(association.served);
                env.shared.wake_all();
            }
            AdminOutcome::SetWriteProtect { nsid, state } => {
                self.set_write_protect(slot, nsid, state, env);
            }
            AdminOutcome::ReservationPersistence { nsid, set } => {
                self.persistence(slot, nsid, set, env);
            }
            // Refused to controllers that are not PCI functions.
            AdminOutcome::Queue(_) | AdminOutcome::DoorbellBuffer { .. } => {
                debug_assert!(false, "queues of fabrics are connected");
                self.respond(slot, Status::INVALID_COMMAND_OPCODE.dnr(), 0, env);
            }
            AdminOutcome::ResetQueues { status, result, shutdown } => {
                // The host polls CSTS for the end of it, which comes when the queues are gone.
                association.end_io_queues();
                env.shared.wake_all();
                self.hold(if shutdown { Held::Shutdown } else { Held::Reset });
                self.respond(slot, status, result, env);
            }
        }
        if let Role::Admin(admin) = &mut self.role {
            admin.out = out;
        }
    }

    /// Keeps an admin command until what it began is done.
    fn await_outcome(&mut self, slot: u16, awaited: Awaited) {
        self.keep(slot);
        if let Role::Admin(admin) = &mut self.role {
            admin.awaited.push((slot, awaited));
        }
    }

    fn abort_done(&mut self, slot: u16, outcome: abort::Outcome, env: &mut Env<'_>) {
        if let Role::Admin(admin) = &mut self.role {
            admin.controller.abort_done();
        }
        let result = match outcome {
            abort::Outcome::Aborted => 0,
            abort::Outcome::NotAborted => ctrl::ABORT_NOT_DONE,
        };
        self.respond(slot, Status::SUCCESS, result, env);
    }

    /// A host protects a namespace, for all its controllers.
    fn set_write_protect(
        &mut self,
        slot: u16,
        nsid: u32,
        state: WriteProtectState,
        env: &mut Env<'_>,
    ) {
        let protect = match state {
            WriteProtectState::NoWriteProtect => false,
            WriteProtectState::WriteProtect => true,
        };
        let Some(view) = &self.view else {
            return self.respond(slot, Status::INVALID_FIELD_IN_COMMAND.dnr(), 0, env);
        };
        let nqn = view.subsystem.nqn.to_string();
        match change::begin(env.shared, Request::WriteProtect { nqn, nsid, protect }) {
            Ok(change) => {
                let protected = protect.then_some(nsid);
                self.await_outcome(slot, Awaited::Change(change, protected));
            }
            // Namespace or subsystem went away in this moment.
            Err(_) => self.respond(slot, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, env),
        }
    }

    /// Answers what [`Conn::await_outcome`] keeps.
    fn poll_awaited(&mut self, env: &mut Env<'_>) -> bool {
        let mut worked = self.protect(env);
        while let Role::Admin(admin) = &mut self.role
            && let Some(at) = admin.awaited.iter().position(|(_, awaited)| {
                // One namespace is flushed after the other.
                let waits =
                    matches!(awaited, Awaited::Change(_, Some(_))) && admin.protecting.is_some();
                !waits && awaited.is_done()
            })
        {
            worked = true;
            let (slot, awaited) = admin.awaited.swap_remove(at);
            match awaited {
                Awaited::Abort(abort) => {
                    let outcome = abort.outcome().unwrap_or(abort::Outcome::NotAborted);
                    self.abort_done(slot, outcome, env);
                }
                Awaited::Change(_, None) => self.respond(slot, Status::SUCCESS, 0, env),
                Awaited::Change(_, Some(nsid)) => {
                    admin.protecting = Some(Protecting { slot, nsid, is_flushing: false });
                    self.protect(env);
                }
            }
        }
        worked
    }

    /// Flushes the volume of a namespace that was protected: no write of before is under way.
    fn protect(&mut self, env: &mut Env<'_>) -> bool {
        let Role::Admin(admin) = &mut self.role else { return false };
        let Some(protecting) = &mut admin.protecting else { return false };
        if protecting.is_flushing {
            return false;
        }
        // Set first: a volume that cannot be opened answers at once.
        protecting.is_flushing = true;
        let nsid = protecting.nsid;
        let Some(volume) = self.volume(nsid, 0) else {
            // It went away in this moment.
            self.protected(Err(Status::INVALID_NAMESPACE_OR_FORMAT.dnr()), env);
            return true;
        };
        let mut io = env.ios.take();
        (io.op, io.offset, io.len) = (Op::Flush, 0, 0);
        let is_submitted = self.submit_protecting(volume, io, env);
        if !is_submitted
            && let Role::Admin(admin) = &mut self.role
            && let Some(protecting) = &mut admin.protecting
        {
            protecting.is_flushing = false;
        }
        is_submitted
    }

    /// The flush for a protected namespace is over.
    pub(crate) fn protected(&mut self, result: Result<(), Status>, env: &mut Env<'_>) {
        let Role::Admin(admin) = &mut self.role else { return };
        let Some(protecting) = admin.protecting.take() else { return };
        if self.life == Life::Open {
            self.respond(protecting.slot, result.err().unwrap_or(Status::SUCCESS), 0, env);
        }
    }

    /// Looks after commands that wait for something other than the host or a volume.
    pub(crate) fn poll_held(&mut self, env: &mut Env<'_>) -> bool {
        let mut worked = self.poll_awaited(env);
        match self.held() {
            Some(Held::Connect(slot)) => {
                self.hold_nothing();
                self.connect(slot, env);
                worked = self.held().is_none();
            }
            Some(Held::CrossReset { slot, cntlid, instance }) => {
                let still = self.association.as_ref().is_some_and(|a| {
                    env.shared.registry.end_instance(cntlid, instance, a.served, &a.host)
                });
                if !still {
                    self.hold_nothing();
                    self.respond(slot, Status::SUCCESS, ctrl::CROSS_RESET_IMMEDIATE, env);
                    worked = true;
                }
            }
            Some(Held::Shutdown) if self.has_no_io_queues() => {
                // What hosts were promised stays: the volumes' caches are written out first.
                worked = self.flush_volume(0, env);
            }
            Some(Held::Reset) if self.has_no_io_queues() => {
                self.hold_nothing();
                if let Role::Admin(admin) = &mut self.role {
                    admin.controller.queues_closed(env.now);
                }
                worked = true;
            }
            _ => {}
        }
        if let (Role::Admin(admin), Some(association)) = (&mut self.role, &self.association) {
            while let Some((nsid, kind)) = association.letters.take_notice() {
                admin.controller.reservation_notice(nsid, kind);
            }
        }
        while let Role::Admin(admin) = &mut self.role
            && let Some((slot, status, result)) = admin.controller.poll_event()
        {
            self.respond(slot, status, result, env);
            worked = true;
        }
        worked
    }

    fn has_no_io_queues(&self) -> bool {
        self.association.as_ref().is_none_or(|a| a.io_queues() == 0)
    }

    /// Flushes the volumes of the namespaces after `nsid`; `false`: later.
    pub(crate) fn flush_volume(&mut self, nsid: u32, env: &mut Env<'_>) -> bool {
        let next = self.volume(NSID_ALL, nsid);
        let found = next.and_then(|index| {
            let ns = self.view.as_ref()?.info.namespaces().get(index)?;
            Some((index, ns.nsid))
        });
        let Some((volume, nsid)) = found else {
            self.hold(Held::Reset);
            return true;
        };
        let mut io = env.ios.take();
        (io.op, io.offset, io.len) = (Op::Flush, 0, 0);
        // Held first: a volume that cannot be opened answers at once.
        self.hold(Held::Flushing(nsid));
        if self.submit_own(volume, io, env) {
            return true;
        }
        self.hold(Held::Shutdown);
        false
    }

    /// What is served is not what it was.
    pub(crate) fn follow_table(&mut self, env: &mut Env<'_>) {
        let Some(association) = &self.association else { return };
        match association.served {
            Served::Subsystem(id) => {
                let state = env.table.subsystems.get(&id);
                let state = state.filter(|s| s.hosts.admits(&association.host.hostnqn));
                let Some(state) = state else {
                    // Its view holds on to volumes; what is at them is waited for as ever.
                    self.view = None;
                    if !association.is_dead() {
                        association.kill();
                        env.shared.wake_all();
                    }
                    return;
                };
                if self.view.as_ref().is_some_and(|view| view.generation == state.generation) {
                    return;
                }
                let view = state.view(self.port().id, &association.host.hostnqn);
                if let Role::Admin(admin) = &mut self.role {
                    admin.controller.update_subsys(Arc::clone(&view.info));
                }
                self.view = Some(view);
            }
            Served::Discovery => {
                let generation = env.table.directory.generation;
                if let Role::Admin(admin) = &mut self.role
                    && std::mem::replace(&mut admin.log_generation, generation) == generation
                {
                    return;
                }
                let log = env.table.discovery_log(self.port(), &association.host.hostnqn);
                // The counter of a log that says the same as before stays: nobody is woken for it.
                if let Role::Admin(admin) = &mut self.role
                    && admin.log.bytes()[HEADER_LEN..] != log.bytes()[HEADER_LEN..]
                {
                    admin.log = Arc::new(log);
                    admin.controller.update_discovery(Arc::clone(&admin.log));
                }
            }
        }
    }
}
