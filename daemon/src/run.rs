//! The composition root: checked configuration in, a running target and emulator out.
//!
//! Order matters and is the same every time. Start: data directory, listeners bound (a port in use
//! is found before anything is touched), identities stored, volumes opened, cores, target, devices.
//! Stop: listeners closed, devices drained, associations shut down, target cores finished, volumes
//! flushed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use block::{Geometry, Identity, Volume};
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use reactor::CoreHandle;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::config::{Config, DeviceConfig};
use crate::cores::{self, Cores};
use crate::http;
use crate::identity::{HostIdentity, SubsystemIdentity};
use crate::listen;
use crate::manage::serial_text;
use crate::serve::{self, Hidden, RunningTarget};
use crate::state::State;

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
    host: HostIdentity,
    emulator_cores: Option<u16>,
    target: Option<RunningTarget>,
    emulator: Option<RunningEmulator>,
    failures: mpsc::UnboundedReceiver<String>,
    failed: mpsc::UnboundedSender<String>,
    /// Without a target nobody else keeps the lock on the data directory.
    _state: Option<State>,
}

impl Daemon {
    /// Starts everything `config` describes.
    pub fn start(config: Config) -> anyhow::Result<Daemon> {
        let state = match &config.data_dir {
            Some(dir) => State::open(dir)?,
            None => State::fleeting(),
        };
        Daemon::start_with(config, state, None)
    }

    /// Starts with a state that is already open, and a hidden subsystem beside the others.
    pub(crate) fn start_with(
        config: Config,
        mut state: State,
        hidden: Option<Hidden>,
    ) -> anyhow::Result<Daemon> {
        // A port or socket in use is found before anything is touched.
        let bound = match &config.target {
            Some(target) => Some(listen::bind_all(target)?),
            None => None,
        };
        let api = match (&config.target, &config.api) {
            (Some(_), Some(path)) => Some(http::bind(path)?),
            _ => None,
        };
        let host = state.host();
        let (failed, failures) = mpsc::unbounded_channel();
        let roles = usize::from(config.target.is_some()) + usize::from(!config.devices.is_empty());
        let mut left = None;
        let target = match (&config.target, bound) {
            (Some(settings), Some(bound)) => Some(serve::start(serve::Parts {
                config: &config,
                settings,
                bound,
                api,
                state,
                host: &host.nqn,
                hidden,
                roles,
                failed: failed.clone(),
            })?),
            _ => {
                state.save()?;
                left = Some(state);
                None
            }
        };
        let mut daemon = Daemon {
            host,
            emulator_cores: config.emulator_cores,
            target,
            emulator: None,
            failures,
            failed,
            _state: left,
        };
        for device in config.devices {
            daemon.add_device(device)?;
        }
        Ok(daemon)
    }

    /// The first subsystem served, if there is a target: the default one, where it is used.
    pub fn subsystem(&self) -> Option<SubsystemIdentity> {
        let target = self.target.as_ref()?;
        let book = target.manager.book();
        let first = book.subsystems.first()?;
        Some(SubsystemIdentity { nqn: first.nqn.clone(), serial: first.serial })
    }

    /// This process as a host.
    pub fn host(&self) -> &HostIdentity {
        &self.host
    }

    /// The volumes served at this moment.
    pub fn served(&self) -> Vec<Served> {
        let Some(target) = &self.target else { return Vec::new() };
        let book = target.manager.book();
        let served = book.volumes.iter().filter_map(|entry| {
            let geometry = entry.volume.as_ref()?.geometry();
            Some(Served {
                name: entry.record.name.clone(),
                spec: entry.record.spec.to_string(),
                nsid: entry.record.nsid,
                identity: entry.record.identity,
                geometry,
            })
        });
        served.collect()
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

    /// Looks whether backing objects have grown, soon.
    pub fn refresh(&self) {
        if let Some(target) = &self.target {
            target.caretaker.refresh();
        }
    }

    /// Says in the log what is served where.
    pub fn announce(&self) {
        if let Some(target) = &self.target {
            for subsystem in &target.manager.book().subsystems {
                let serial = serial_text(&subsystem.serial);
                tracing::info!(
                    name = %subsystem.name, subnqn = %subsystem.nqn, %serial, "subsystem"
                );
            }
            if let Some(path) = target.api_path() {
                tracing::info!(socket = %path.display(), "management API");
            }
        }
        for served in self.served() {
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
            let cores = Cores::start("emulator", count, &cores::emulator_config(), ended)?;
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
            target.close();
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
            target.stop(&mut problems);
        }
        if problems.is_empty() { Ok(()) } else { bail!("{}", problems.join("; ")) }
    }
}

/// What a core's thread says when it ends.
pub(crate) fn ended(
    failed: mpsc::UnboundedSender<String>,
) -> impl Fn(String) + Send + Clone + 'static {
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
