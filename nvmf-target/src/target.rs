//! The control-plane side of the target: what is served, to whom, by which cores.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nvme::spec::Nqn;
use nvme::subsys::ana::ANA_GROUPS_MAX;
use reactor::{CoreHandle, Local, Receiver, Sender, Socket, Task};

use crate::config::{Limits, ListenerKind, Port, SetupError, TargetConfig};
use crate::core::CoreTask;
use crate::counters::Totals;
use crate::fence::{Board, Fence, Scope};
use crate::home::Homes;
use crate::jobs::Jobs;
use crate::keys::KeyStore;
use crate::limits::{Closed, Door, LimitCounters, Pass, Rate, count, peer_of};
use crate::refusals::Refusals;
use crate::registry::{Bounds, Registry, Served};
use crate::sample::{Breakdown, Sampling};
use crate::state::{ControllerStatus, NamespaceStatus, SubsystemStatus, TargetStatus};
use crate::table::{Ana, Directory, Table};
use crate::vitals::Vitals;

/// What all cores share. Nothing here is locked on the data path.
pub(crate) struct Shared {
    /// What is served now. Cores keep a copy and compare the number in each turn.
    table: Mutex<Arc<Table>>,
    /// The table's generation; Release after the table is in place.
    pub(crate) generation: AtomicU64,
    /// Held while a change is made: one at a time.
    pub(crate) changing: Mutex<()>,
    pub(crate) board: Board,
    pub(crate) homes: Homes,
    pub(crate) jobs: Jobs,
    /// What takes a processor for milliseconds.
    pub(crate) heavy: Jobs,
    pub(crate) vitals: Vitals,
    pub(crate) registry: Registry,
    pub(crate) keys: Arc<KeyStore>,
    pub(crate) refusals: Refusals,
    pub(crate) limits: Limits,
    pub(crate) hits: LimitCounters,
    pub(crate) sampling: Sampling,
    /// Of the admin commands of one host NQN.
    pub(crate) admin_rate: Rate,
    /// Counts connections from accept to close.
    pub(crate) door: Arc<Door>,
    pub(crate) cores: Vec<CoreHandle>,
    /// How often all cores were called to look at their associations again.
    pub(crate) calls: AtomicU64,
    /// Channel numbers that no core uses, and the first that was never used.
    free_volumes: Arc<Mutex<Vec<u32>>>,
    next_volume: AtomicU32,
    /// Next [`VolumeState::serial`](crate::volume::VolumeState::serial).
    pub(crate) next_serial: AtomicU64,
    /// Next [`Subsystem::id`](crate::table::Subsystem::id).
    pub(crate) next_subsystem: AtomicU32,
}

impl Shared {
    /// Lets every core look at the associations again: one was killed, reset or is drained.
    pub(crate) fn wake_all(&self) {
        // Release: whoever sees the new number sees what was changed before the call.
        self.calls.fetch_add(1, Ordering::Release);
        self.cores.iter().for_each(CoreHandle::wake);
    }

    /// A fence is done or an association gone: whoever waits for it looks again.
    pub(crate) fn settled(&self) {
        self.board.notify();
        self.wake_all();
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts a new table in force; the caller holds `changing`.
    pub(crate) fn publish(&self, table: Table) {
        let generation = table.generation;
        let old = {
            let mut current = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, Arc::new(table))
        };
        self.generation.store(generation, Ordering::Release);
        // Outside of the lock: a volume may be closed here.
        drop(old);
    }

    /// Raises a fence and lets the cores see it.
    pub(crate) fn fence(&self, scope: Scope) -> Arc<Fence> {
        let fence = self.board.raise(scope, None);
        self.wake_all();
        fence
    }

    /// Raises a fence on volumes that are not served any more; their numbers are free afterwards.
    pub(crate) fn retire(&self, mut volumes: Vec<u32>) -> Arc<Fence> {
        volumes.sort_unstable();
        let (free, numbers) = (Arc::clone(&self.free_volumes), volumes.clone());
        let fence = self
            .board
            .raise(Scope::Retire(volumes), Some(Box::new(move || free_numbers(&free, &numbers))));
        self.wake_all();
        fence
    }

    /// Gives back numbers that no core has seen.
    pub(crate) fn free_numbers(&self, numbers: &[u32]) {
        free_numbers(&self.free_volumes, numbers);
    }

    /// A channel number for another volume.
    pub(crate) fn volume_number(&self) -> u32 {
        let free = self.free_volumes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| self.next_volume.fetch_add(1, Ordering::Relaxed))
    }
}

fn free_numbers(free: &Mutex<Vec<u32>>, numbers: &[u32]) {
    free.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(numbers);
}

/// A connection on its way to its core.
pub(crate) struct Handover {
    pub(crate) socket: Socket,
    pub(crate) port: Port,
    pub(crate) pass: Pass,
}

/// Handle to a target. Cheap to share; every call may come from any thread, those that change
/// something from any that is no core.
pub struct Target {
    pub(crate) shared: Arc<Shared>,
    inboxes: Vec<Sender<Handover>>,
    tasks: Mutex<Vec<Option<Receiver<Handover>>>>,
    next: AtomicUsize,
}

/// Connections that may wait for one core to take them.
const INBOX_DEPTH: usize = 256;

/// Checks ports and ANA states.
fn check(config: &TargetConfig) -> Result<(), SetupError> {
    for (index, port) in config.ports.iter().enumerate() {
        if port.id == 0 || config.ports[..index].iter().any(|p| p.id == port.id) {
            return Err(SetupError::Port(port.id));
        }
    }
    for (port, group, _) in &config.ana {
        let is_io = |p: &Port| p.id == *port && p.kind == ListenerKind::Io;
        if !config.ports.iter().any(is_io) || !(1..=ANA_GROUPS_MAX).contains(group) {
            return Err(SetupError::Ana { port: *port, group: *group });
        }
    }
    Ok(())
}

impl Target {
    /// A target on `cores`; [`Target::core_task`] makes the task that each of them is to run.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn new(config: TargetConfig, cores: Vec<CoreHandle>) -> Result<Arc<Target>, SetupError> {
        if cores.is_empty() {
            return Err(SetupError::NoCore);
        }
        check(&config)?;
        let (mut inboxes, mut tasks) = (Vec::new(), Vec::new());
        for core in &cores {
            let (sender, receiver) = reactor::channel(core, INBOX_DEPTH);
            inboxes.push(sender);
            tasks.push(Some(receiver));
        }
        let info = crate::admin::discovery_info(config.discovery_nqn.as_ref(), &config.limits)
            .map_err(|reason| SetupError::Subsystem {
                nqn: nvme::spec::DISCOVERY_NQN.to_owned(),
                reason,
            })?;
        let table = Table {
            generation: 1,
            subsystems: BTreeMap::new(),
            ids: BTreeMap::new(),
            ports: config.ports.into(),
            directory: Directory {
                generation: config.discovery_generation,
                referrals: config.referrals.into(),
                info: Arc::new(info),
            },
        };
        let limits = config.limits;
        let registry = Registry::new(Bounds {
            controllers: limits.controllers,
            controllers_per_host: limits.controllers_per_host,
            queues_per_host: limits.connections_per_host,
            cores: cores.len(),
        });
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(table.generation),
            calls: AtomicU64::new(0),
            table: Mutex::new(Arc::new(table)),
            changing: Mutex::new(()),
            board: Board::new(cores.len()),
            homes: Homes::new(config.store),
            jobs: Jobs::default(),
            heavy: Jobs::default(),
            vitals: Vitals::new(config.power),
            registry,
            keys: config.keys,
            refusals: Refusals::default(),
            admin_rate: Rate::new(limits.admin_commands_per_second, limits.admin_commands_burst),
            door: Door::new(limits.connections, limits.handshakes_per_peer),
            limits,
            hits: LimitCounters::default(),
            sampling: Sampling::new(cores.len()),
            cores,
            free_volumes: Arc::default(),
            next_volume: AtomicU32::new(0),
            next_serial: AtomicU64::new(1),
            next_subsystem: AtomicU32::new(1),
        });
        for subsystem in config.subsystems {
            let mut ana = Ana::default();
            for (port, group, state) in &config.ana {
                ana.set(*port, *group, *state);
            }
            crate::change::set_up(&shared, subsystem, ana)?;
        }
        // What was there before any host could ask is the first log.
        let mut table = Table::clone(&shared.table());
        table.directory.generation = config.discovery_generation;
        shared.publish(table);
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
        let shared = &self.shared;
        let table = shared.table();
        let Some(port) = table.port(port) else {
            tracing::warn!(port, "connection refused: there is no such port");
            return;
        };
        let pass = match shared.door.admit(peer_of(&socket.peer())) {
            Ok((pass, false)) => pass,
            Ok((pass, true)) => {
                count(&shared.hits.handshakes_dropped);
                shared.wake_all();
                pass
            }
            Err(closed) => {
                count(match closed {
                    Closed::Connections => &shared.hits.connections,
                    Closed::Handshakes => &shared.hits.handshakes,
                });
                tracing::debug!(?closed, "connection refused: too many");
                return;
            }
        };
        let core = self.next.fetch_add(1, Ordering::Relaxed) % self.inboxes.len();
        if self.inboxes[core].send(Handover { socket, port: port.clone(), pass }).is_err() {
            count(&shared.hits.connections);
            tracing::debug!(core, "connection refused: the core's inbox is full");
        }
    }

    /// What is served and to whom, as it is now.
    pub fn status(&self) -> TargetStatus {
        let table = self.shared.table();
        let subsystems = table.subsystems.values().map(|subsystem| SubsystemStatus {
            nqn: subsystem.fixed.nqn.as_str().to_owned(),
            namespaces: subsystem
                .namespaces
                .iter()
                .map(|ns| NamespaceStatus {
                    nsid: ns.info.nsid,
                    uuid: ns.info.uuid,
                    blocks: ns.info.blocks,
                    block_bytes: ns.info.block_bytes,
                    read_only: ns.info.read_only,
                    write_protect: ns.info.write_protect,
                    ana_group: ns.info.ana_group,
                    hosts: ns.hosts.to_vec(),
                })
                .collect(),
            hosts: subsystem.hosts.to_vec(),
            hidden: subsystem.hidden,
            ana: subsystem.ana.to_vec(&table.ports),
            totals: subsystem.fixed.totals(),
        });
        let mut controllers = self.shared.registry.list(None);
        controllers.retain(|association| association.is_proven());
        let controllers = controllers.into_iter().map(|association| {
            let nqn = match association.served {
                Served::Subsystem(id) => table.subsystems.get(&id).map(|s| &s.fixed.nqn),
                Served::Discovery => Some(table.directory.info.nqn()),
            };
            ControllerStatus {
                cntlid: association.cntlid,
                subnqn: nqn.map_or(String::new(), Nqn::to_string),
                hostnqn: association.host.hostnqn.clone(),
                hostid: association.host.hostid,
                port: association.port,
                peer: association.peer.clone(),
                tls: association.tls.clone(),
                authenticated: association.authenticated(),
                io_queues: association.io_queues(),
                totals: association.counters.totals(),
                draining: association.is_dead(),
            }
        });
        let (refusals, refusals_total) = self.shared.refusals.snapshot();
        TargetStatus {
            refusals,
            refusals_total,
            subsystems: subsystems.collect(),
            controllers: controllers.collect(),
            connections: self.shared.door.connections(),
            hosts: self.shared.registry.hosts(),
            limits: self.shared.hits.snapshot(),
        }
    }

    /// Follows one I/O command in `every` on each core from now on, to see where its time goes; 0:
    /// none, which costs nothing.
    pub fn set_sampling(&self, every: u32) {
        self.shared.sampling.set(every);
    }

    /// Where the time of followed commands went since the start.
    pub fn breakdown(&self) -> Breakdown {
        self.shared.sampling.breakdown()
    }

    /// I/O done for subsystem `nqn` so far.
    pub fn totals(&self, nqn: &str) -> Option<Totals> {
        let nqn = Nqn::new(nqn).ok()?;
        let table = self.shared.table();
        Some(table.subsystems.get(table.ids.get(&nqn)?)?.fixed.totals())
    }

    /// Connections and associations that exist at this moment.
    pub fn connected(&self) -> (usize, usize) {
        (self.shared.door.connections(), self.shared.registry.len())
    }
}
