//! The control-plane side of the target: what is served, to whom, by which cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use block::Volume;
use nvme::subsys::discovery::DiscoveryLog;
use nvme::subsys::{NamespaceInfo, SubsystemInfo};
use reactor::{CoreHandle, Local, Receiver, Sender, Socket, Task};
use thiserror::Error;

use crate::core::CoreTask;
use crate::counters::{Counters, Totals};
use crate::registry::Registry;

/// Which controllers a listener leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// I/O controllers of every subsystem, and the discovery controller.
    Io,
    /// The discovery controller alone.
    Discovery,
}

/// One volume as a namespace.
#[derive(Clone)]
pub struct NamespaceConfig {
    /// Namespace identifier, 1 or more, unique in its subsystem.
    pub nsid: u32,
    /// Where its blocks are.
    pub volume: Arc<dyn Volume>,
}

/// An NVM subsystem and its namespaces.
#[derive(Clone)]
pub struct SubsystemConfig {
    /// Subsystem NQN.
    pub nqn: String,
    /// Serial number: at most 20 ASCII characters.
    pub serial: String,
    /// Its namespaces.
    pub namespaces: Vec<NamespaceConfig>,
}

/// What hosts may use up.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections (queues) of all hosts together.
    pub connections: usize,
    /// Controllers of all hosts together.
    pub controllers: usize,
    /// Controllers of one host.
    pub controllers_per_host: usize,
    /// I/O queues of one controller.
    pub io_queues: u16,
    /// Entries of one I/O queue.
    pub queue_entries: u16,
    /// Largest transfer of one command in bytes; a power of two of 4 KiB pages.
    pub transfer_bytes: u32,
    /// Write payload taken along with an I/O command, in bytes; a multiple of 16.
    pub in_capsule_bytes: u32,
    /// Bytes that a host may send in one H2CData PDU; a multiple of 4, at least 4,096.
    pub h2c_data_bytes: u32,
    /// How long a connection may take from accept to Connect.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 4096,
            controllers: 1024,
            controllers_per_host: 64,
            io_queues: 128,
            queue_entries: 128,
            transfer_bytes: 1 << 20,
            in_capsule_bytes: 16 << 10,
            h2c_data_bytes: 1 << 20,
            handshake: Duration::from_secs(10),
        }
    }
}

/// All of a target's configuration.
#[derive(Clone)]
pub struct TargetConfig {
    /// What is served.
    pub subsystems: Vec<SubsystemConfig>,
    /// What the discovery log page says, for every host alike.
    pub discovery: Arc<DiscoveryLog>,
    /// Bounds.
    pub limits: Limits,
}

/// Why a target cannot be made.
#[derive(Debug, Error)]
pub enum SetupError {
    /// No core was given.
    #[error("a target needs at least one core")]
    NoCore,
    /// A namespace identifier is 0, FFFFFFFFh or used twice.
    #[error(
        "subsystem {nqn}: namespace identifier {nsid} is not allowed: each must be 1 to {max}, once",
        max = u32::MAX - 1
    )]
    Nsid {
        /// The subsystem.
        nqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// The subsystem's own description was refused.
    #[error("subsystem {nqn}: {reason}")]
    Subsystem {
        /// The subsystem.
        nqn: String,
        /// Why.
        reason: String,
    },
}

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
    pub(crate) listener: Listener,
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
            discovery: config.discovery,
            discovery_info: Arc::new(discovery_info),
            registry,
            limits: config.limits,
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
    /// A connection beyond the limits is closed; the host may try again.
    pub fn add_connection(&self, socket: Socket, listener: Listener) {
        let limits = &self.shared.limits;
        if self.shared.connections.fetch_add(1, Ordering::AcqRel) >= limits.connections {
            self.shared.connections.fetch_sub(1, Ordering::AcqRel);
            tracing::debug!(limit = limits.connections, "connection refused: too many");
            return;
        }
        let core = self.next.fetch_add(1, Ordering::Relaxed) % self.inboxes.len();
        if self.inboxes[core].send(Handover { socket, listener }).is_err() {
            self.shared.connections.fetch_sub(1, Ordering::AcqRel);
            tracing::debug!(core, "connection refused: the core's inbox is full");
        }
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

fn namespace_info(ns: &NamespaceConfig) -> NamespaceInfo {
    crate::admin::namespace_info(ns.nsid, &ns.volume.geometry(), &ns.volume.identity())
}
