//! The control-plane side of the target: what is served, to whom, by which cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use block::Volume;
use nvme::spec::Nqn;
use nvme::spec::discovery::SubsystemType;
use nvme::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use nvme::subsys::{NamespaceInfo, SubsystemInfo};
use reactor::{CoreHandle, Local, Receiver, Sender, Socket, Task};

use crate::config::{
    AnaState, ChangeError, Limits, ListenerKind, NamespaceConfig, Port, SetupError,
    SubsystemConfig, TargetConfig,
};
use crate::core::CoreTask;
use crate::counters::{Counters, Totals};
use crate::registry::Registry;
use crate::state::TargetStatus;

/// One subsystem as the cores see it.
pub(crate) struct Served {
    pub(crate) info: Arc<SubsystemInfo>,
    /// Volume of `info.namespaces[i]`, as an index into [`Shared::volumes`].
    pub(crate) volumes: Vec<usize>,
    /// One per core.
    pub(crate) counters: Vec<Counters>,
}

/// What all cores share. Nothing here is locked on the data path.
pub(crate) struct Shared {
    pub(crate) subsystems: Vec<Served>,
    pub(crate) volumes: Vec<Arc<dyn Volume>>,
    pub(crate) discovery: Arc<DiscoveryLog>,
    pub(crate) discovery_info: Arc<SubsystemInfo>,
    pub(crate) registry: Registry,
    pub(crate) limits: Limits,
    pub(crate) ports: Vec<Port>,
    pub(crate) connections: AtomicUsize,
    cores: Vec<CoreHandle>,
}

impl Shared {
    /// Lets every core look at the associations again: one was killed, reset or is drained.
    pub(crate) fn wake_all(&self) {
        self.cores.iter().for_each(CoreHandle::wake);
    }

    pub(crate) fn totals(&self, subsystem: usize) -> Totals {
        let mut totals = Totals::default();
        for counters in &self.subsystems[subsystem].counters {
            counters.add_to(&mut totals);
        }
        totals
    }
}

/// A connection on its way to its core.
pub(crate) struct Handover {
    pub(crate) socket: Socket,
    pub(crate) port: Port,
}

/// Handle to a target. Cheap to share; every call may come from any thread.
pub struct Target {
    shared: Arc<Shared>,
    inboxes: Vec<Sender<Handover>>,
    tasks: Mutex<Vec<Option<Receiver<Handover>>>>,
    next: AtomicUsize,
}

/// Connections that may wait for one core to take them.
const INBOX_DEPTH: usize = 256;

impl Target {
    /// A target on `cores`; [`Target::core_task`] makes the task that each of them is to run.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn new(config: TargetConfig, cores: Vec<CoreHandle>) -> Result<Arc<Target>, SetupError> {
        if cores.is_empty() {
            return Err(SetupError::NoCore);
        }
        for (index, port) in config.ports.iter().enumerate() {
            if port.id == 0 || config.ports[..index].iter().any(|p| p.id == port.id) {
                return Err(SetupError::Port(port.id));
            }
        }
        let discovery = Arc::new(discovery_log(&config));
        let mut volumes = Vec::new();
        let mut subsystems = Vec::new();
        for mut subsystem in config.subsystems {
            subsystem.namespaces.sort_by_key(|ns| ns.nsid);
            let mut last = 0;
            let mut infos = Vec::new();
            let mut indexes = Vec::new();
            for ns in &subsystem.namespaces {
                if ns.nsid == last || ns.nsid == u32::MAX {
                    return Err(SetupError::Nsid { nqn: subsystem.nqn, nsid: ns.nsid });
                }
                last = ns.nsid;
                infos.push(namespace_info(ns));
                indexes.push(volumes.len());
                volumes.push(Arc::clone(&ns.volume));
            }
            let info = crate::admin::subsystem_info(&subsystem, infos, &config.limits)
                .map_err(|reason| SetupError::Subsystem { nqn: subsystem.nqn.clone(), reason })?;
            subsystems.push(Served {
                info: Arc::new(info),
                volumes: indexes,
                counters: cores.iter().map(|_| Counters::default()).collect(),
            });
        }
        let (mut inboxes, mut tasks) = (Vec::new(), Vec::new());
        for core in &cores {
            let (sender, receiver) = reactor::channel(core, INBOX_DEPTH);
            inboxes.push(sender);
            tasks.push(Some(receiver));
        }
        let discovery_info = crate::admin::discovery_info(&config.limits).map_err(|reason| {
            SetupError::Subsystem { nqn: nvme::spec::DISCOVERY_NQN.to_owned(), reason }
        })?;
        let registry = Registry::new(config.limits.controllers, config.limits.controllers_per_host);
        let shared = Arc::new(Shared {
            subsystems,
            volumes,
            discovery,
            discovery_info: Arc::new(discovery_info),
            registry,
            limits: config.limits,
            ports: config.ports,
            connections: AtomicUsize::new(0),
            cores,
        });
        let tasks = Mutex::new(tasks);
        Ok(Arc::new(Target { shared, inboxes, tasks, next: AtomicUsize::new(0) }))
    }

    /// The task of core number `core`; to be called on that core, once.
    ///
    /// Returns `None` when the core does not exist or has its task already.
    pub fn core_task(&self, core: usize, local: &Local) -> Option<Box<dyn Task>> {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let inbox = tasks.get_mut(core)?.take()?;
        Some(Box::new(CoreTask::new(core, Arc::clone(&self.shared), local.clone(), inbox)))
    }

    /// Hands an accepted connection to one of the cores, which take turns.
    ///
    /// A connection beyond the limits is closed, and one through a port that does not exist; the
    /// host may try again.
    pub fn add_connection(&self, socket: Socket, port: u16) {
        let Some(port) = self.shared.ports.iter().find(|p| p.id == port) else {
            tracing::warn!(port, "connection refused: there is no such port");
            return;
        };
        let limits = &self.shared.limits;
        if self.shared.connections.fetch_add(1, Ordering::AcqRel) >= limits.connections {
            self.shared.connections.fetch_sub(1, Ordering::AcqRel);
            tracing::debug!(limit = limits.connections, "connection refused: too many");
            return;
        }
        let core = self.next.fetch_add(1, Ordering::Relaxed) % self.inboxes.len();
        if self.inboxes[core].send(Handover { socket, port: port.clone() }).is_err() {
            self.shared.connections.fetch_sub(1, Ordering::AcqRel);
            tracing::debug!(core, "connection refused: the core's inbox is full");
        }
    }

    /// Serves another subsystem from now on.
    ///
    /// # Errors
    /// The NQN is taken, or the subsystem is not possible.
    pub fn add_subsystem(&self, subsystem: SubsystemConfig) -> Result<(), ChangeError> {
        drop(subsystem);
        Err(fixed())
    }

    /// Ends a subsystem and all associations with it.
    ///
    /// # Errors
    /// There is no such subsystem, or its I/O takes longer than [`Limits::change_wait`].
    pub fn remove_subsystem(&self, _nqn: &str) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Adds a namespace to a subsystem.
    ///
    /// # Errors
    /// There is no such subsystem, or the identifier or the volume is taken.
    pub fn attach(&self, _nqn: &str, _namespace: NamespaceConfig) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Takes a namespace away; the volume is not used any more when this returns.
    ///
    /// # Errors
    /// There is none, or its I/O takes longer than [`Limits::change_wait`].
    pub fn detach(&self, _nqn: &str, _nsid: u32) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Looks at a namespace's volume again and tells hosts its new size.
    ///
    /// # Errors
    /// There is none, the volume cannot be read or has become smaller.
    pub fn refresh(&self, _nqn: &str, _nsid: u32) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Which hosts see a namespace from now on; `None`: all.
    ///
    /// # Errors
    /// There is none, or I/O of hosts that lose it takes longer than [`Limits::change_wait`].
    pub fn set_namespace_hosts(
        &self,
        _nqn: &str,
        _nsid: u32,
        _hosts: Option<Vec<Nqn>>,
    ) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Which hosts may connect from now on; `None`: all. Associations of others end.
    ///
    /// # Errors
    /// There is no such subsystem, or their I/O takes longer than [`Limits::change_wait`].
    pub fn set_subsystem_hosts(
        &self,
        _nqn: &str,
        _hosts: Option<Vec<Nqn>>,
    ) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// The state of an ANA group on a port, in one subsystem or in all of them.
    ///
    /// # Errors
    /// There is no such subsystem or port, or I/O through the port takes longer than
    /// [`Limits::change_wait`].
    pub fn set_ana(
        &self,
        _nqn: Option<&str>,
        _port: u16,
        _group: u32,
        _state: AnaState,
    ) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Moves a namespace to another ANA group.
    ///
    /// # Errors
    /// There is no such namespace, or the group is not possible.
    pub fn move_namespace(&self, _nqn: &str, _nsid: u32, _group: u32) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Refuses writes to a namespace from now on, or takes them again.
    ///
    /// # Errors
    /// There is no such namespace, or writes take longer than [`Limits::change_wait`].
    pub fn set_write_protect(
        &self,
        _nqn: &str,
        _nsid: u32,
        _protect: bool,
    ) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Ends the associations that a host has now, in one subsystem or in all of them.
    ///
    /// # Errors
    /// There is no such subsystem, or its I/O takes longer than [`Limits::change_wait`].
    pub fn disconnect_host(&self, _nqn: Option<&str>, _hostnqn: &Nqn) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// Replaces the discovery log's entries of other discovery subsystems.
    ///
    /// # Errors
    /// An entry is not possible.
    pub fn set_referrals(&self, _referrals: Vec<DiscoveryEntry>) -> Result<(), ChangeError> {
        Err(fixed())
    }

    /// What is served and to whom, as it is now.
    pub fn status(&self) -> TargetStatus {
        let (connections, _) = self.connected();
        TargetStatus { connections, ..TargetStatus::default() }
    }

    /// I/O done for subsystem `nqn` so far.
    pub fn totals(&self, nqn: &str) -> Option<Totals> {
        let index = self.shared.subsystems.iter().position(|s| s.info.nqn().as_str() == nqn)?;
        Some(self.shared.totals(index))
    }

    /// Connections and associations that exist at this moment.
    pub fn connected(&self) -> (usize, usize) {
        (self.shared.connections.load(Ordering::Acquire), self.shared.registry.len())
    }
}

/// What hosts are told: one record per subsystem and I/O port, and the referrals.
fn discovery_log(config: &TargetConfig) -> DiscoveryLog {
    let mut entries = Vec::new();
    for subsystem in config.subsystems.iter().filter(|s| !s.hidden) {
        let Ok(nqn) = Nqn::new(&subsystem.nqn) else { continue };
        for port in config.ports.iter().filter(|p| p.kind == ListenerKind::Io) {
            entries.push(DiscoveryEntry::tcp(SubsystemType::NVM, port.addr, port.id, nqn.clone()));
        }
    }
    entries.extend(config.referrals.iter().cloned());
    DiscoveryLog::new(config.discovery_generation, &entries)
}

fn namespace_info(ns: &NamespaceConfig) -> NamespaceInfo {
    crate::admin::namespace_info(ns.nsid, &ns.volume.geometry(), &ns.volume.identity())
}

fn fixed() -> ChangeError {
    ChangeError::Invalid("this cannot be changed while the target runs".to_owned())
}
