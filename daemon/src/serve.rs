//! The target of a process: started in order, watched while it runs, stopped in order.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use block::Volume;
use nvme::spec::Nqn;
use nvmf_target::{
    AuthDemand, KeyStore, Limits, ListenerKind, NamespaceConfig, Port, PowerHistory,
    ReservationStore, SubsystemConfig, Target, Tls,
};
use tokio::sync::mpsc;

use crate::caretaker::Caretaker;
use crate::config::{Config, Listen, TargetConfig};
use crate::cores::{self, Cores};
use crate::flush;
use crate::http::{self, Server};
use crate::identity::SubsystemIdentity;
use crate::keys::KeyBook;
use crate::listen::{self, Bound};
use crate::manage::plan::{self, Plan};
use crate::manage::{self, Beginning, Manager, PortRecord, PowerUp};
use crate::mdns::Advertiser;
use crate::reservations::Store;
use crate::run::ended;
use crate::state::State;

/// How long the target waits for I/O of before a change: as long as a caller of the management API
/// may.
const CHANGE_WAIT: Duration = Duration::from_secs(api::TIMEOUT_S_MAX);

/// A subsystem that hosts can connect to but the discovery log does not tell.
pub(crate) struct Hidden {
    pub(crate) subsystem: SubsystemIdentity,
    pub(crate) volume: Arc<dyn Volume>,
}

/// What a target is made of.
pub(crate) struct Parts<'a> {
    pub(crate) config: &'a Config,
    pub(crate) settings: &'a TargetConfig,
    pub(crate) bound: Bound,
    pub(crate) api: Option<http::Socket>,
    pub(crate) api_tls: Option<http::tls::Listener>,
    pub(crate) state: State,
    /// This process as a host: the only one that sees the hidden subsystem.
    pub(crate) host: &'a Nqn,
    pub(crate) hidden: Option<Hidden>,
    pub(crate) roles: usize,
    pub(crate) failed: mpsc::UnboundedSender<String>,
}

/// A running target.
pub(crate) struct RunningTarget {
    pub(crate) manager: Arc<Manager>,
    pub(crate) target: Arc<Target>,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) discovery: Vec<SocketAddr>,
    pub(crate) caretaker: Caretaker,
    cores: Cores,
    hidden: Option<Arc<dyn Volume>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    apis: Vec<Server>,
    advert: Option<Advertiser>,
}

/// Starts a target. Must be called inside a tokio runtime.
pub(crate) fn start(parts: Parts<'_>) -> anyhow::Result<RunningTarget> {
    let Parts { config, settings, bound, api, api_tls, mut state, host, hidden, roles, failed } =
        parts;
    let local = |listeners: &[(Listen, TcpListener)]| -> std::io::Result<Vec<SocketAddr>> {
        listeners.iter().map(|(_, listener)| listener.local_addr()).collect()
    };
    let listen = local(&bound.io)?;
    let discovery = local(&bound.discovery)?;

    // Everything minted is durable before anything is served under it.
    let plan = plan::plan(config, settings, &mut state, &place(settings))?;
    for notice in &plan.notices {
        tracing::warn!("{notice}");
    }
    let (ports, records) = ports(&bound, &listen, &discovery, &mut state);
    let (cycles, before, unsafe_shutdowns) = state.power_up();
    state.save()?;
    let volumes = open(&plan)?;

    let mut subsystems = subsystems(&plan, &volumes);
    if let Some(hidden) = &hidden {
        subsystems.push(SubsystemConfig {
            namespaces: vec![NamespaceConfig::new(1, hidden.volume.clone())],
            hosts: Some(vec![host.clone()]),
            hidden: true,
            ..SubsystemConfig::new(
                hidden.subsystem.nqn.to_string(),
                manage::serial_text(&hidden.subsystem.serial),
            )
        });
    }
    let keys = Arc::new(KeyStore::default());
    keys.set_policy(settings.auth.clone());
    let book = KeyBook::open(state.path(), keys.clone())?;
    let limits = limits(settings);
    let discovery_nqn = plan.discovery_nqn.clone().context("no NQN for the discovery subsystem")?;
    let store = state.path().map(|dir| Arc::new(Store::new(dir)) as Arc<dyn ReservationStore>);
    let mut ana = Vec::new();
    for configured in &settings.ana {
        let io = ports.iter().filter(|port| port.kind == ListenerKind::Io);
        for port in io.filter(|port| configured.port.is_none_or(|id| id == port.id)) {
            // What is said of one port comes after what is said of all.
            ana.retain(|(id, group, _)| (*id, *group) != (port.id, configured.group));
            ana.push((port.id, configured.group, manage::ana_state(configured.state)));
        }
    }
    let target_config = nvmf_target::TargetConfig {
        subsystems,
        ports: ports.clone(),
        referrals: manage::referral_entries(&plan.referrals),
        discovery_nqn: Some(discovery_nqn.clone()),
        // Another start may serve another log: the clock tells them apart.
        discovery_generation: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |since| since.as_millis() as u64),
        ana,
        limits: limits.clone(),
        keys,
        store,
        power: PowerHistory { power_cycles: cycles, power_on: before, unsafe_shutdowns },
    };

    let count = settings.cores.unwrap_or_else(|| cores::default_count(roles));
    let core_config = cores::target_config(settings.busy_poll_us);
    let cores = Cores::start("target", count, &core_config, ended(failed))?;
    let target = Target::new(target_config, cores.handles().to_vec())?;
    for index in 0..cores.handles().len() {
        let target = target.clone();
        let started =
            cores.on(index, move |spawner| match target.core_task(index, spawner.local()) {
                Some(task) => {
                    spawner.spawn(task);
                    true
                }
                None => false,
            })?;
        if !started {
            bail!("target core {index} did not take its task");
        }
    }
    for (record, volume) in std::iter::zip(&plan.volumes, &volumes) {
        let subsystem = plan.subsystems.iter().find(|s| s.name == record.subsystem);
        if let (true, Some(_), Some(subsystem)) = (record.write_protect, volume, subsystem) {
            target
                .set_write_protect(subsystem.nqn.as_str(), record.nsid, true)
                .with_context(|| format!("protecting volume {:?}", record.name))?;
        }
    }
    let manager = Arc::new(Manager::new(Beginning {
        target: target.clone(),
        limits,
        ports: records,
        plan,
        volumes,
        discovery_nqn: discovery_nqn.clone(),
        configured_referrals: settings.referrals.clone(),
        configured_ana: settings.ana.clone(),
        power: PowerUp { cycles, before, unsafe_shutdowns },
        state,
        keys: book,
    }));
    manager.restore_ana().context("setting ANA states as they were")?;

    let advert = match settings.mdns {
        true => {
            let listeners = ports.iter().filter(|port| port.kind == ListenerKind::Discovery);
            let addresses: Vec<SocketAddr> = listeners.map(|port| port.addr).collect();
            Some(Advertiser::start(&discovery_nqn, &addresses)?)
        }
        false => None,
    };
    let mut tasks = Vec::new();
    for ((_, listener), port) in bound.io.into_iter().chain(bound.discovery).zip(ports) {
        tasks.push(listen::accept(listener, target.clone(), port.id).context("accepting")?);
    }
    let mut apis = Vec::new();
    // Changes of both are made one at a time.
    let router = http::router(manager.clone());
    if let Some(socket) = api {
        apis.push(http::serve(socket, router.clone()).context("management API")?);
    }
    if let Some(listener) = api_tls {
        apis.push(http::tls::serve(listener, router).context("management API")?);
    }
    Ok(RunningTarget {
        caretaker: Caretaker::start(manager.clone())?,
        manager,
        target,
        listen,
        discovery,
        cores,
        hidden: hidden.map(|hidden| hidden.volume),
        tasks,
        apis,
        advert,
    })
}

impl RunningTarget {
    /// Nobody new from now on.
    pub(crate) fn close(&mut self) {
        // Hosts that look for a target do not find one that is about to end.
        self.advert = None;
        self.apis.clear();
        for task in self.tasks.drain(..) {
            task.abort();
        }
    }

    /// The management API, wherever it is.
    pub(crate) fn apis(&self) -> &[Server] {
        &self.apis
    }

    /// Ends everything in order; what went wrong is added to `problems`.
    pub(crate) fn stop(mut self, problems: &mut Vec<String>) {
        self.close();
        let RunningTarget { manager, target, cores, hidden, caretaker, .. } = self;
        caretaker.stop();
        if !cores.stop() {
            problems.push("a target core panicked".to_owned());
        }
        drop(target);
        let mut volumes = manager.open_volumes();
        volumes.extend(hidden.map(|volume| ("self-check".to_owned(), volume)));
        match flush::flush_all(&volumes) {
            // Only now nothing can be lost any more.
            Ok(()) if problems.is_empty() => {
                if let Err(error) = manager.keep_power(true) {
                    problems.push(format!("{:#}", anyhow::Error::new(error)));
                }
            }
            Ok(()) => {}
            Err(error) => problems.push(format!("{error:#}")),
        }
    }
}

/// What makes derived identities of two targets on one machine differ: the address of the first
/// listener.
fn place(settings: &TargetConfig) -> String {
    let first = settings.listen.first();
    first
        .map(|listen| Listen {
            portid: None,
            tls: Tls::Off,
            auth: AuthDemand::default(),
            ..*listen
        })
        .map(|listen| listen.to_string())
        .unwrap_or_default()
}

/// The listeners as the target's ports, I/O before discovery, each with the identifier it had before.
fn ports(
    bound: &Bound,
    listen: &[SocketAddr],
    discovery: &[SocketAddr],
    state: &mut State,
) -> (Vec<Port>, Vec<PortRecord>) {
    let io = bound.io.iter().zip(listen).map(|pair| (ListenerKind::Io, pair));
    let only = bound.discovery.iter().zip(discovery).map(|pair| (ListenerKind::Discovery, pair));
    let all: Vec<_> = io.chain(only).collect();
    let names: Vec<_> = all
        .iter()
        .map(|(kind, ((listen, _), _))| {
            let kind = if *kind == ListenerKind::Io { "io" } else { "discovery" };
            (format!("{kind} {}", listen.addr), listen.portid)
        })
        .collect();
    let ids = state.ports(&names);
    std::iter::zip(all, ids)
        .map(|((kind, ((listen, _), bound)), id)| {
            let addr = listen.advertise.unwrap_or(*bound);
            let record = PortRecord {
                id,
                is_io: kind == ListenerKind::Io,
                listen: bound.to_string(),
                advertise: addr.to_string(),
                tls: listen.tls,
            };
            (
                Port { id, kind, addr, tls: listen.tls, auth: listen.auth, hidden: listen.hidden },
                record,
            )
        })
        .unzip()
}

/// Opens what is wanted. A volume of the configuration has to be there; one that was attached at
/// run time may be missing, so that the target can be started to say so.
fn open(plan: &Plan) -> anyhow::Result<Vec<Option<Arc<dyn Volume>>>> {
    let mut volumes = Vec::with_capacity(plan.volumes.len());
    for record in &plan.volumes {
        if !record.wanted {
            volumes.push(None);
            continue;
        }
        let opened = record.spec.open(record.identity);
        match opened.with_context(|| format!("opening volume {:?}", record.name)) {
            Ok(opened) => {
                for notice in opened.notices() {
                    tracing::info!(volume = %record.name, "{notice}");
                }
                volumes.push(Some(opened));
            }
            Err(error) if record.runtime => {
                tracing::error!(
                    "{error:#}; it was attached at run time and is not served now: `penstock volume \
                     attach {}` tries again, `penstock volume detach {}` gives it up",
                    record.name,
                    record.name
                );
                volumes.push(None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(volumes)
}

fn subsystems(plan: &Plan, volumes: &[Option<Arc<dyn Volume>>]) -> Vec<SubsystemConfig> {
    let one = |subsystem: &plan::SubsystemRecord| {
        let namespaces = std::iter::zip(&plan.volumes, volumes)
            .filter(|(record, _)| record.subsystem == subsystem.name)
            .filter_map(|(record, volume)| {
                Some(NamespaceConfig {
                    nsid: record.nsid,
                    volume: volume.clone()?,
                    ana_group: record.ana_group,
                    hosts: record.hosts.clone(),
                })
            })
            .collect();
        manage::subsystem_config(subsystem, namespaces)
    };
    plan.subsystems.iter().map(one).collect()
}

fn limits(settings: &TargetConfig) -> Limits {
    let defaults = Limits::default();
    let chosen = &settings.limits;
    let count = |chosen: Option<u32>, default: usize| chosen.map_or(default, |n| n as usize);
    Limits {
        connections: count(chosen.connections, defaults.connections),
        connections_per_host: count(chosen.connections_per_host, defaults.connections_per_host),
        handshakes_per_peer: count(chosen.handshakes_per_peer, defaults.handshakes_per_peer),
        controllers: count(chosen.controllers, defaults.controllers),
        controllers_per_host: count(chosen.controllers_per_host, defaults.controllers_per_host),
        admin_commands_per_second: chosen
            .admin_commands_per_second
            .unwrap_or(defaults.admin_commands_per_second),
        namespaces_max: chosen.namespaces_max.unwrap_or(defaults.namespaces_max),
        in_capsule_bytes: chosen.in_capsule_bytes.unwrap_or(defaults.in_capsule_bytes),
        transfer_bytes: chosen.transfer_bytes.unwrap_or(defaults.transfer_bytes),
        kato_max: chosen.kato_max_s.map_or(defaults.kato_max, |s| Duration::from_secs(s.into())),
        io_queues: settings.io_queues_max.unwrap_or(defaults.io_queues),
        queue_entries: settings.queue_entries_max.unwrap_or(defaults.queue_entries),
        change_wait: CHANGE_WAIT,
        ..defaults
    }
}
