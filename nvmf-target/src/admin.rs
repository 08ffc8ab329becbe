//! Connect, and what an admin queue adds to a connection.

use std::sync::Arc;
use std::time::Duration;

use block::{Geometry, Identity, Op};
use nvme::ctrl::{
    self, AdminOutcome, Controller, ControllerConfig, ControllerKind, HealthCounters,
};
use nvme::fabrics::{ConnectReject, ConnectRequest};
use nvme::spec::{AdminOpcode, AsciiField, Nqn, Status};
use nvme::subsys::{self, NamespaceInfo, SubsystemInfo};

use crate::config::{Limits, ListenerKind, SubsystemConfig};
use crate::conn::{Conn, Held, Role};
use crate::core::Env;
use crate::registry::{HostKey, Refusal, Served};
use crate::target::Shared;

/// Model number of every controller.
const MODEL: &str = "Penstock";

/// Firmware revision: the version of this crate, which is eight characters at the most.
const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// Longest keep alive timeout granted.
const KATO_MAX: Duration = Duration::from_secs(600);

/// Largest namespace identifier of a subsystem.
const NAMESPACES_MAX: u32 = 10_240;

/// What an admin queue has beside its commands.
pub(crate) struct Admin {
    pub(crate) controller: Controller,
    /// What the controller returns, command by command; kept for its memory.
    out: Vec<u8>,
    /// What the host sent along, likewise.
    input: Vec<u8>,
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
        kato_max: KATO_MAX,
        namespaces_max: NAMESPACES_MAX,
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
pub(crate) fn discovery_info(limits: &Limits) -> Result<SubsystemInfo, String> {
    let config = SubsystemConfig::new(nvme::spec::DISCOVERY_NQN, MODEL);
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
fn health(shared: &Shared, served: Served) -> HealthCounters {
    let Served::Subsystem(index) = served else { return HealthCounters::default() };
    let totals = shared.totals(index);
    HealthCounters {
        read_commands: totals.reads,
        write_commands: totals.writes,
        bytes_read: totals.read_bytes,
        bytes_written: totals.written_bytes,
        media_errors: totals.media_errors,
        ..HealthCounters::default()
    }
}

fn reject_of(refusal: Refusal) -> ConnectReject {
    match refusal {
        Refusal::Busy => ConnectReject::BUSY,
        Refusal::UnknownController => ConnectReject::UNKNOWN_CONTROLLER,
        Refusal::NotReady => ConnectReject::SEQUENCE,
        Refusal::QueueIdentifier => ConnectReject::QID,
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
        let Some(served) = self.served(&request.subnqn, env.shared) else {
            tracing::info!(
                peer = self.peer(),
                hostnqn = request.hostnqn.as_str(),
                subnqn = request.subnqn.as_str(),
                "connect refused: no such subsystem on this listener"
            );
            return self.reject(slot, ConnectReject::UNKNOWN_SUBSYSTEM, env);
        };
        let host = HostKey { hostnqn: request.hostnqn.as_str().to_owned(), hostid: request.hostid };
        if !request.is_admin() {
            return self.connect_io(slot, &request, served, &host, env);
        }
        if env.shared.registry.is_fenced(served, &host) {
            // The host was here before and its old controller still has writes that can land. The
            // new one begins when they are done: what it is sent then comes after them.
            self.hold(Held::Connect(slot));
            return;
        }
        self.connect_admin(slot, &request, served, host, env);
    }

    fn served(&self, subnqn: &Nqn, shared: &Shared) -> Option<Served> {
        if subnqn.is_discovery() {
            return Some(Served::Discovery);
        }
        if self.port().kind == ListenerKind::Discovery {
            return None;
        }
        shared.subsystems.iter().position(|s| s.info.nqn() == subnqn).map(Served::Subsystem)
    }

    fn reject(&mut self, slot: u16, reject: ConnectReject, env: &mut Env<'_>) {
        tracing::debug!(peer = self.peer(), %reject, "connect refused");
        self.respond(slot, reject.status, reject.dw0.into(), env);
    }

    fn connect_admin(
        &mut self,
        slot: u16,
        request: &ConnectRequest,
        served: Served,
        host: HostKey,
        env: &mut Env<'_>,
    ) {
        let (kind, subsys) = match served {
            Served::Subsystem(index) => (ControllerKind::Io, &env.shared.subsystems[index].info),
            Served::Discovery => {
                let log = Arc::clone(&env.shared.discovery);
                (ControllerKind::Discovery(log), &env.shared.discovery_info)
            }
        };
        if let Err(reject) = ctrl::admit_admin(request, subsys) {
            return self.reject(slot, reject, env);
        }
        let association = match env.shared.registry.create(served, host, env.local.random_u64()) {
            Ok(association) => association,
            Err(refusal) => return self.reject(slot, reject_of(refusal), env),
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
        tracing::info!(
            peer = self.peer(),
            hostnqn = request.hostnqn.as_str(),
            subnqn = request.subnqn.as_str(),
            cntlid = association.cntlid,
            "association created"
        );
        let cntlid = association.cntlid;
        let admin = Box::new(Admin { controller, out: Vec::new(), input: Vec::new() });
        self.become_queue(Role::Admin(admin), association, request, None);
        self.respond_connected(slot, cntlid, env);
    }

    fn connect_io(
        &mut self,
        slot: u16,
        request: &ConnectRequest,
        served: Served,
        host: &HostKey,
        env: &mut Env<'_>,
    ) {
        let Served::Subsystem(subsystem) = served else {
            // A discovery controller has no I/O queues.
            return self.reject(slot, ConnectReject::QID, env);
        };
        if request.queue_entries > env.shared.limits.queue_entries.into() {
            return self.reject(slot, ConnectReject::SQSIZE, env);
        }
        let joined = env.shared.registry.join(request.cntlid, request.qid, served, host);
        let (association, epoch) = match joined {
            Ok(joined) => joined,
            Err(refusal) => return self.reject(slot, reject_of(refusal), env),
        };
        let cntlid = association.cntlid;
        let in_capsule = env.shared.subsystems[subsystem].info.limits().in_capsule_bytes;
        self.become_queue(Role::Io { subsystem, epoch }, association, request, Some(in_capsule));
        self.respond_connected(slot, cntlid, env);
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
        if sqe.opcode == AdminOpcode::GET_LOG_PAGE.0 {
            association.letters.take_errors(|record| admin.controller.record_error(record));
            admin.controller.set_health(health(env.shared, association.served));
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
            AdminOutcome::Abort { .. } => {
                // Whatever it names is with the volume already and runs to its end.
                if let Role::Admin(admin) = &mut self.role {
                    admin.controller.abort_done();
                }
                self.respond(slot, Status::SUCCESS, ctrl::ABORT_NOT_DONE, env);
            }
            AdminOutcome::SubsystemReset { status, result } => {
                self.respond(slot, status, result, env);
                env.shared.registry.end_subsystem(association.served);
                env.shared.wake_all();
            }
            AdminOutcome::SetWriteProtect { .. } | AdminOutcome::ReservationPersistence { .. } => {
                self.respond(slot, Status::FEATURE_NOT_CHANGEABLE.dnr(), 0, env);
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

    /// Looks after commands that wait for something other than the host or a volume.
    pub(crate) fn poll_held(&mut self, env: &mut Env<'_>) -> bool {
        let mut worked = false;
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

    /// Flushes the subsystem's volumes, beginning with number `index`; `false`: later.
    pub(crate) fn flush_volume(&mut self, index: usize, env: &mut Env<'_>) -> bool {
        let served = self.association.as_ref().map(|a| a.served);
        let volume = match served {
            Some(Served::Subsystem(subsystem)) => {
                env.shared.subsystems[subsystem].volumes.get(index).copied()
            }
            _ => None,
        };
        let Some(volume) = volume else {
            self.hold(Held::Reset);
            return true;
        };
        let mut io = env.ios.take();
        (io.op, io.offset, io.len) = (Op::Flush, 0, 0);
        // Held first: a volume that cannot be opened answers at once.
        self.hold(Held::Flushing(index));
        if self.submit_own(volume, io, env) {
            return true;
        }
        self.hold(Held::Shutdown);
        false
    }
}
