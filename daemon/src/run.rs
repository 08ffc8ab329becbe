//! The composition root: checked configuration in, a running target and emulator out.
//!
//! Order matters and is the same every time. Start: data directory, listeners bound (a port in use
//! is found before anything is touched), identities stored, volumes opened, cores, target, devices.
//! Stop: listeners closed, devices drained, associations shut down, target cores finished, volumes
//! flushed.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use block::{Geometry, Identity, Volume};
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use nvmf_target::{Limits, ListenerKind, NamespaceConfig, Port, SubsystemConfig, Target};
use reactor::CoreHandle;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::config::{Config, DeviceConfig, Listen, TargetConfig};
use crate::cores::{self, Cores};
use crate::flush;
use crate::identity::{self, HostIdentity, SubsystemIdentity};
use crate::listen;
use crate::state::DataDir;

/// How long a device waits for its association to say goodbye.
const FAREWELL: Duration = Duration::from_secs(3);
/// How often a thread that waits for a target looks whether it should end.
const LOOK: Duration = Duration::from_millis(200);

/// One volume as it is served.
#[derive(Debug, Clone)]
pub struct Served {
    /// Its name.
    pub name: String,
    /// What is behind it, as text.
    pub spec: String,
    /// Namespace ID.
    pub nsid: u32,
    /// Who it is.
    pub identity: Identity,
    /// Its shape.
    pub geometry: Geometry,
}

/// A subsystem that hosts can connect to but the discovery log does not tell.
pub(crate) struct Hidden {
    pub(crate) subsystem: SubsystemIdentity,
    pub(crate) volume: Arc<dyn Volume>,
}

struct RunningTarget {
    target: Arc<Target>,
    cores: Cores,
    /// By name.
    volumes: Vec<(String, Arc<dyn Volume>)>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    listen: Vec<SocketAddr>,
    discovery: Vec<SocketAddr>,
}

/// A device on its way to being served, or served.
struct RunningDevice {
    name: String,
    remote: Arc<RemoteVolume>,
    state: Arc<DeviceState>,
    /// Waits for the target, then serves the socket; ends when that is done or no longer wanted.
    starter: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct DeviceState {
    stop: AtomicBool,
    handle: Mutex<Option<virtio_blk::DeviceHandle>>,
    failed: Mutex<Option<String>>,
}

struct RunningEmulator {
    cores: Cores,
    next_core: usize,
    devices: Vec<RunningDevice>,
}

/// A running process's parts. Must be made inside a tokio runtime.
pub struct Daemon {
    subsystem: Option<SubsystemIdentity>,
    host: HostIdentity,
    served: Vec<Served>,
    emulator_cores: Option<u16>,
    target: Option<RunningTarget>,
    emulator: Option<RunningEmulator>,
    failures: mpsc::UnboundedReceiver<String>,
    failed: mpsc::UnboundedSender<String>,
    _data: Option<DataDir>,
}

impl Daemon {
    /// Starts everything `config` describes.
    pub fn start(config: Config) -> anyhow::Result<Daemon> {
        let data = match &config.data_dir {
            Some(dir) => Some(DataDir::open(dir)?),
            None => None,
        };
        Daemon::start_with(config, data, None)
    }

    /// Starts with a data directory that is already open, and a hidden subsystem beside the others.
    pub(crate) fn start_with(
        config: Config,
        mut data: Option<DataDir>,
        hidden: Option<Hidden>,
    ) -> anyhow::Result<Daemon> {
        let bound = match &config.target {
            Some(target) => Some(listen::bind_all(target)?),
            None => None,
        };

        let subsystem = config.target.as_ref().map(|target| match &mut data {
            Some(data) => data.subsystem(target.subnqn.as_ref()),
            None => identity::derive_subsystem(
                target.subnqn.as_ref(),
                &target.listen.first().map(Listen::to_string).unwrap_or_default(),
            ),
        });
        let host = match &mut data {
            Some(data) => data.host(),
            None => identity::derive_host(),
        };
        let mut volumes = Vec::new();
        let mut served = Vec::new();
        if let Some(subsystem) = &subsystem {
            let numbered = number_volumes(&config, subsystem, data.as_mut())?;
            if let Some(data) = &mut data {
                data.save()?;
            }
            for (volume, (nsid, identity)) in config.volumes.iter().zip(numbered) {
                let opened = volume
                    .spec
                    .open(identity)
                    .with_context(|| format!("opening volume {:?}", volume.name))?;
                for notice in opened.notices() {
                    tracing::info!(volume = %volume.name, "{notice}");
                }
                served.push(Served {
                    name: volume.name.clone(),
                    spec: volume.spec.to_string(),
                    nsid,
                    identity: opened.identity(),
                    geometry: opened.geometry(),
                });
                volumes.push(opened);
            }
        } else if let Some(data) = &mut data {
            data.save()?;
        }

        let (failed, failures) = mpsc::unbounded_channel();
        let roles = usize::from(config.target.is_some()) + usize::from(!config.devices.is_empty());
        let target = match (&config.target, bound, &subsystem) {
            (Some(settings), Some(bound), Some(subsystem)) => Some(start_target(TargetParts {
                settings,
                bound,
                subsystem,
                served: &served,
                volumes,
                hidden,
                roles,
                failed: failed.clone(),
            })?),
            _ => None,
        };
        let mut daemon = Daemon {
            subsystem,
            host,
            served,
            emulator_cores: config.emulator_cores,
            target,
            emulator: None,
            failures,
            failed,
            _data: data,
        };
        for device in config.devices {
            daemon.add_device(device)?;
        }
        Ok(daemon)
    }

    /// The subsystem served, if there is a target.
    pub fn subsystem(&self) -> Option<&SubsystemIdentity> {
        self.subsystem.as_ref()
    }

    /// This process as a host.
    pub fn host(&self) -> &HostIdentity {
        &self.host
    }

    /// The volumes served.
    pub fn served(&self) -> &[Served] {
        &self.served
    }

    /// Addresses of the I/O listeners, with the ports the system chose where 0 was asked for.
    pub fn io_addresses(&self) -> &[SocketAddr] {
        self.target.as_ref().map_or(&[], |target| &target.listen)
    }

    /// Addresses of the discovery listeners.
    pub fn discovery_addresses(&self) -> &[SocketAddr] {
        self.target.as_ref().map_or(&[], |target| &target.discovery)
    }

    /// Connections and associations of the target at this moment.
    pub fn connected(&self) -> (usize, usize) {
        self.target.as_ref().map_or((0, 0), |target| target.target.connected())
    }

    /// Says in the log what is served where.
    pub fn announce(&self) {
        if let Some(subsystem) = &self.subsystem {
            let serial = serial_text(&subsystem.serial);
            tracing::info!(subnqn = %subsystem.nqn, %serial, "subsystem");
        }
        for served in &self.served {
            tracing::info!(
                volume = %served.name,
                spec = %served.spec,
                nsid = served.nsid,
                uuid = %Uuid::from_bytes(served.identity.uuid),
                size_bytes = served.geometry.bytes(),
                block_bytes = served.geometry.block_bytes,
                "volume"
            );
        }
        for addr in self.io_addresses() {
            tracing::info!(%addr, "listening for NVMe/TCP");
        }
        for addr in self.discovery_addresses() {
            tracing::info!(%addr, "listening for discovery");
        }
        if self.emulator.is_some() {
            tracing::info!(hostnqn = %self.host.nqn, "host");
        }
    }

    /// Begins to emulate a device. Its socket appears when the target has answered.
    pub fn add_device(&mut self, config: DeviceConfig) -> anyhow::Result<()> {
        check_socket(&config)?;
        if self.emulator.is_none() {
            let roles = 1 + usize::from(self.target.is_some());
            let count = self.emulator_cores.unwrap_or_else(|| cores::default_count(roles));
            let ended = ended(self.failed.clone());
            let cores = Cores::start("emulator", count, &cores::core_config(), ended)?;
            self.emulator = Some(RunningEmulator { cores, next_core: 0, devices: Vec::new() });
        }
        let host = self.host.clone();
        let failed = self.failed.clone();
        let Some(emulator) = &mut self.emulator else { bail!("no core for the device") };
        let device = emulator.start_device(config, host, failed)?;
        emulator.devices.push(device);
        Ok(())
    }

    /// Waits until device `name` is served. Blocks; for set-up only.
    pub(crate) fn wait_device(&self, name: &str, timeout: Duration) -> anyhow::Result<()> {
        let begun = std::time::Instant::now();
        let device = self
            .emulator
            .iter()
            .flat_map(|emulator| &emulator.devices)
            .find(|device| device.name == name)
            .ok_or_else(|| anyhow!("there is no device {name:?}"))?;
        loop {
            if let Some(problem) = lock(&device.state.failed).clone() {
                bail!("{problem}");
            }
            if lock(&device.state.handle).is_some() {
                return Ok(());
            }
            let left = timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let reason = device.remote.state().last_error.clone();
                bail!(
                    "device {name:?} is not ready after {} s{}",
                    timeout.as_secs(),
                    reason.map(|reason| format!(": {reason}")).unwrap_or_default()
                );
            }
            std::thread::park_timeout(left.min(Duration::from_millis(5)));
        }
    }

    /// Takes device `name` away again: drained, its socket gone.
    pub(crate) fn remove_device(&mut self, name: &str) {
        if let Some(emulator) = &mut self.emulator
            && let Some(index) = emulator.devices.iter().position(|device| device.name == name)
        {
            emulator.devices.remove(index).stop();
        }
    }

    /// Waits for something that ends the process: a core that failed. Never returns otherwise.
    pub async fn failure(&mut self) -> String {
        match self.failures.recv().await {
            Some(problem) => problem,
            None => std::future::pending().await,
        }
    }

    /// Stops in order. Blocks until everything is drained; call it off the runtime's thread.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let mut problems = Vec::new();
        if let Some(target) = &mut self.target {
            for task in target.tasks.drain(..) {
                task.abort();
            }
        }
        if let Some(emulator) = self.emulator.take() {
            for device in &emulator.devices {
                device.state.stop.store(true, Ordering::Relaxed);
            }
            // Each may wait for its disk and its target: all at once.
            std::thread::scope(|scope| {
                for device in emulator.devices {
                    scope.spawn(move || device.stop());
                }
            });
            if !emulator.cores.stop() {
                problems.push("an emulator core panicked".to_owned());
            }
        }
        if let Some(target) = self.target.take() {
            let RunningTarget { target, cores, volumes, .. } = target;
            if !cores.stop() {
                problems.push("a target core panicked".to_owned());
            }
            drop(target);
            if let Err(error) = flush::flush_all(&volumes) {
                problems.push(format!("{error:#}"));
            }
        }
        if problems.is_empty() { Ok(()) } else { bail!("{}", problems.join("; ")) }
    }
}

/// Namespace IDs and identities of the configured volumes, in order.
fn number_volumes(
    config: &Config,
    subsystem: &SubsystemIdentity,
    mut data: Option<&mut DataDir>,
) -> anyhow::Result<Vec<(u32, Identity)>> {
    let mut numbered = Vec::with_capacity(config.volumes.len());
    // IDs the operator chose are kept free of the others.
    let chosen: Vec<u32> = config.volumes.iter().filter_map(|volume| volume.nsid).collect();
    let mut next = 1;
    for volume in &config.volumes {
        let pair = match &mut data {
            Some(data) => data
                .volume(&volume.name, volume.nsid)
                .with_context(|| format!("volume {:?}", volume.name))?,
            None => {
                let nsid = volume.nsid.unwrap_or_else(|| {
                    while chosen.contains(&next) {
                        next += 1;
                    }
                    next += 1;
                    next - 1
                });
                (nsid, identity::derive_volume(&subsystem.nqn, &volume.name))
            }
        };
        numbered.push(pair);
    }
    Ok(numbered)
}

/// The text of a serial number.
fn serial_text(serial: &[u8; 20]) -> String {
    String::from_utf8_lossy(serial).trim_end().to_owned()
}

/// The listeners as the target's ports, I/O before discovery: one identifier per listener, the same
/// after a restart with the same configuration.
fn ports(bound: &listen::Bound, listen: &[SocketAddr], discovery: &[SocketAddr]) -> Vec<Port> {
    let io = bound.io.iter().zip(listen).map(|pair| (ListenerKind::Io, pair));
    let only = bound.discovery.iter().zip(discovery).map(|pair| (ListenerKind::Discovery, pair));
    io.chain(only)
        .zip(1..)
        .map(|((kind, ((listen, _), bound)), id)| Port {
            id,
            kind,
            addr: listen.advertise.unwrap_or(*bound),
        })
        .collect()
}

struct TargetParts<'a> {
    settings: &'a TargetConfig,
    bound: listen::Bound,
    subsystem: &'a SubsystemIdentity,
    served: &'a [Served],
    volumes: Vec<Arc<dyn Volume>>,
    hidden: Option<Hidden>,
    roles: usize,
    failed: mpsc::UnboundedSender<String>,
}

fn start_target(parts: TargetParts<'_>) -> anyhow::Result<RunningTarget> {
    let TargetParts { settings, bound, subsystem, served, volumes, hidden, roles, failed } = parts;
    let local = |listeners: &[(Listen, TcpListener)]| -> std::io::Result<Vec<SocketAddr>> {
        listeners.iter().map(|(_, listener)| listener.local_addr()).collect()
    };
    let listen = local(&bound.io)?;
    let discovery = local(&bound.discovery)?;

    let namespaces = served
        .iter()
        .zip(&volumes)
        .map(|(served, volume)| NamespaceConfig::new(served.nsid, volume.clone()))
        .collect();
    let mut subsystems = vec![SubsystemConfig {
        namespaces,
        ..SubsystemConfig::new(subsystem.nqn.to_string(), serial_text(&subsystem.serial))
    }];
    let mut volumes: Vec<_> =
        served.iter().map(|served| served.name.clone()).zip(volumes).collect();
    if let Some(hidden) = hidden {
        subsystems.push(SubsystemConfig {
            namespaces: vec![NamespaceConfig::new(1, hidden.volume.clone())],
            hidden: true,
            ..SubsystemConfig::new(
                hidden.subsystem.nqn.to_string(),
                serial_text(&hidden.subsystem.serial),
            )
        });
        volumes.push(("self-check".to_owned(), hidden.volume));
    }
    let defaults = Limits::default();
    let limits = Limits {
        io_queues: settings.io_queues_max.unwrap_or(defaults.io_queues),
        queue_entries: settings.queue_entries_max.unwrap_or(defaults.queue_entries),
        ..defaults
    };
    let ports = ports(&bound, &listen, &discovery);
    let config = nvmf_target::TargetConfig {
        subsystems,
        ports: ports.clone(),
        // Another start may serve another log: the clock tells them apart.
        discovery_generation: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |since| since.as_millis() as u64),
        limits,
        ..nvmf_target::TargetConfig::default()
    };

    let count = settings.cores.unwrap_or_else(|| cores::default_count(roles));
    let cores = Cores::start("target", count, &cores::target_config(), ended(failed))?;
    let target = Target::new(config, cores.handles().to_vec())?;
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

    let mut tasks = Vec::new();
    for ((_, listener), port) in bound.io.into_iter().chain(bound.discovery).zip(ports) {
        tasks.push(listen::accept(listener, target.clone(), port.id).context("accepting")?);
    }
    Ok(RunningTarget { target, cores, volumes, tasks, listen, discovery })
}

/// What a core's thread says when it ends.
fn ended(failed: mpsc::UnboundedSender<String>) -> impl Fn(String) + Send + Clone + 'static {
    move |name| {
        // Nobody listens any more once the process stops in order.
        let _ = failed.send(format!("core {name} ended by itself; this is a defect"));
    }
}

/// Finds what would make serving the socket fail, before the target is asked for anything.
fn check_socket(config: &DeviceConfig) -> anyhow::Result<()> {
    let dir = config.socket.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    if !dir.is_dir() {
        bail!(
            "device {:?}: socket {}: {} is no directory; create it, or choose another path",
            config.name,
            config.socket.display(),
            dir.display()
        );
    }
    Ok(())
}

impl RunningEmulator {
    fn start_device(
        &mut self,
        config: DeviceConfig,
        host: HostIdentity,
        failed: mpsc::UnboundedSender<String>,
    ) -> anyhow::Result<RunningDevice> {
        let remote = RemoteConfig {
            // Each ring of the device opens a channel, which is an I/O queue.
            queues: config.queues,
            ..RemoteConfig::new(
                config.connect,
                config.subnqn.clone(),
                config.nsid,
                (host.nqn, host.id),
            )
        };
        remote.check().with_context(|| format!("device {:?}", config.name))?;

        let count = self.cores.handles().len();
        let first = self.next_core % count;
        self.next_core = self.next_core.wrapping_add(1);
        // Devices take turns with the cores, so that small ones do not all share the first.
        let handles: Vec<_> =
            (0..count).map(|index| self.cores.handles()[(first + index) % count].clone()).collect();
        let volume = self.cores.on(first, move |spawner| {
            let (volume, task) = RemoteVolume::start(remote, spawner.local())?;
            spawner.spawn(task);
            Ok::<_, nvmf_initiator::ConfigError>(volume)
        })?;
        let volume = volume.with_context(|| format!("device {:?}", config.name))?;

        let state = Arc::new(DeviceState::default());
        let name = config.name.clone();
        let starter = std::thread::Builder::new().name(format!("start-{name}")).spawn({
            let (volume, state) = (volume.clone(), state.clone());
            move || serve_when_ready(config, &volume, handles, &state, &failed)
        })?;
        Ok(RunningDevice { name, remote: volume, state, starter: Some(starter) })
    }
}

/// Waits for the target, then serves the device's socket.
fn serve_when_ready(
    config: DeviceConfig,
    volume: &Arc<RemoteVolume>,
    cores: Vec<CoreHandle>,
    state: &DeviceState,
    failed: &mpsc::UnboundedSender<String>,
) {
    // The initiator logs what keeps it from the target; nothing to add here.
    while volume.wait_ready(LOOK).is_err() {
        if state.stop.load(Ordering::Relaxed) {
            return;
        }
    }
    let serial = serial_text(&volume.identity().serial);
    let device = virtio_blk::DeviceConfig {
        queues: config.queues,
        serial,
        read_only: config.read_only,
        ..virtio_blk::DeviceConfig::new(&config.name, &config.socket)
    };
    match virtio_blk::serve(device, volume.clone(), cores) {
        Ok(handle) => {
            tracing::info!(device = %config.name, socket = %config.socket.display(), "device ready");
            *lock(&state.handle) = Some(handle);
        }
        Err(error) => {
            let problem = format!("device {:?}: {:#}", config.name, anyhow!(error));
            *lock(&state.failed) = Some(problem.clone());
            // Nobody listens any more once the process stops in order.
            let _ = failed.send(problem);
        }
    }
}

impl Drop for RunningDevice {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
    }
}

impl RunningDevice {
    /// Drains the device, takes its socket away and says goodbye to the target. Blocks.
    fn stop(mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        if let Some(starter) = self.starter.take() {
            // A panic in it has been reported by the panic hook; there is no device then.
            let _ = starter.join();
        }
        if let Some(handle) = lock(&self.state.handle).take() {
            handle.stop();
        }
        self.remote.shutdown();
        if !self.remote.wait_stopped(FAREWELL) {
            tracing::warn!(device = %self.name, "the target gave no answer to the goodbye");
        }
    }
}

/// A panic elsewhere cannot leave these values half changed, so a poisoned lock is used on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
