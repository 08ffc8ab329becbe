//! The composition root: checked configuration in, a running target and emulator out.
//!
//! Order matters and is the same every time. Start: listeners bound (a port in use is found before
//! anything is touched), another user become, data directory, identities stored, volumes opened, cores, target, devices.
//! Stop: listeners closed, devices drained, associations shut down, target cores finished, volumes
//! flushed.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use block::{Geometry, Identity};
use nvmf_initiator::{Security, Tls};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::config::{Config, DeviceConfig};
use crate::contain::{self, Needs};
use crate::cores::{self, Cores};
use crate::devices::{self, Book, DeviceSecurity, Place, RunningDevice};
use crate::http::{self, Server};
use crate::identity::{HostIdentity, SubsystemIdentity};
use crate::listen;
use crate::manage::serial_text;
use crate::serve::{self, Hidden, RunningTarget};
use crate::state::State;
use crate::supervise::Inherited;
use crate::user::User;

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

/// Everything that listens: a port or socket in use is found before anything is touched, and a
/// process that has become another user or is contained makes none any more.
struct Bound {
    target: Option<listen::Bound>,
    api: Option<http::Socket>,
    api_tls: Option<http::tls::Listener>,
    /// Of the devices, in their order.
    places: Vec<Place>,
}

impl Bound {
    fn new(config: &Config, inherited: Option<Inherited>) -> anyhow::Result<Bound> {
        let target = config.target.as_ref().map(listen::bind_all).transpose()?;
        let api = config.api.as_deref().map(http::bind).transpose()?;
        let api_tls = match (&config.target, &config.api_tls) {
            (Some(_), Some(api)) => Some(http::tls::bind(api)?),
            _ => None,
        };
        let is_supervised = inherited.is_some();
        let mut legacies = inherited.into_iter().flat_map(|inherited| inherited.devices);
        let place = |device: &DeviceConfig| match legacies.next() {
            Some(legacy) => Ok(Place::Kept(legacy)),
            None if is_supervised => {
                bail!("device {:?}: the supervisor has no socket for it", device.name)
            }
            None => Ok(Place::Own(devices::listen_for(device)?)),
        };
        let places = config.devices.iter().map(place).collect::<anyhow::Result<_>>()?;
        Ok(Bound { target, api, api_tls, places })
    }
}

struct RunningEmulator {
    cores: Cores,
    next_core: usize,
    devices: Vec<RunningDevice>,
}

/// A running process's parts. Must be made inside a tokio runtime.
pub struct Daemon {
    host: HostIdentity,
    data_dir: Option<PathBuf>,
    emulator_cores: Option<u16>,
    emulator_busy_poll_us: Option<u16>,
    target: Option<RunningTarget>,
    emulator: Option<RunningEmulator>,
    devices: Arc<Book>,
    /// The emulator's own; a target has one as well.
    api: Option<Server>,
    failures: mpsc::UnboundedReceiver<String>,
    failed: mpsc::UnboundedSender<String>,
}

impl Daemon {
    /// Starts everything `config` describes.
    pub fn start(config: Config) -> anyhow::Result<Daemon> {
        Daemon::start_as_user(config, None)
    }

    /// The same as a worker of a supervisor, with the sockets it keeps.
    pub fn start_supervised(config: Config, inherited: Inherited) -> anyhow::Result<Daemon> {
        Daemon::start_as_user(config, Some(inherited))
    }

    fn start_as_user(config: Config, inherited: Option<Inherited>) -> anyhow::Result<Daemon> {
        let user = config.user.as_deref().map(User::find).transpose()?;
        let is_supervised = inherited.is_some();
        let bound = Bound::new(&config, inherited)?;
        if let Some(user) = user {
            // Those of a supervisor have been given by it.
            let devices = config.devices.iter().filter(|_| !is_supervised);
            for path in devices.map(|device| &device.socket).chain(&config.api) {
                user.own(path)?;
            }
            user.become_it()?;
        }
        let state = match &config.data_dir {
            Some(dir) => State::open(dir)?,
            None => State::fleeting(),
        };
        Daemon::start_bound(config, state, None, bound)
    }

    /// Starts with a state that is already open, and a hidden subsystem beside the others.
    pub(crate) fn start_with(
        config: Config,
        state: State,
        hidden: Option<Hidden>,
    ) -> anyhow::Result<Daemon> {
        let bound = Bound::new(&config, None)?;
        Daemon::start_bound(config, state, hidden, bound)
    }

    fn start_bound(
        config: Config,
        mut state: State,
        hidden: Option<Hidden>,
        bound: Bound,
    ) -> anyhow::Result<Daemon> {
        let Bound { target: bound, mut api, api_tls, places } = bound;
        let host = state.host();
        let data_dir = state.path().map(Path::to_owned);
        let (failed, failures) = mpsc::unbounded_channel();
        let roles = usize::from(config.target.is_some()) + usize::from(!config.devices.is_empty());
        let mut left = None;
        let target = match (&config.target, bound) {
            (Some(settings), Some(bound)) => Some(serve::start(serve::Parts {
                config: &config,
                settings,
                bound,
                api: api.take(),
                api_tls,
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
            data_dir,
            emulator_cores: config.emulator_cores,
            emulator_busy_poll_us: config.emulator_busy_poll_us,
            target,
            emulator: None,
            devices: Arc::default(),
            api: None,
            failures,
            failed,
        };
        let mut needs = Needs { connect_ports: Some(BTreeSet::new()), ..Needs::default() };
        if let (None, Some(path)) = (&daemon.target, &config.api) {
            needs.socket(path);
        }
        // Files with keys are read while files can be opened.
        let mut securities = Vec::with_capacity(places.len());
        for (device, place) in config.devices.iter().zip(&places) {
            // Those of a supervisor are its own to take away.
            if matches!(place, Place::Own(_)) {
                needs.socket(&device.socket);
            }
            needs.connect_ports.iter_mut().for_each(|ports| {
                ports.extend(device.connect.iter().map(|path| path.addr.port()));
                if !device.discover.is_empty() {
                    // What is found later may be at any of these, and nowhere else.
                    ports.extend(&device.ports);
                }
            });
            securities.push(daemon.security_of(device)?);
        }
        if !securities.is_empty() {
            crypto::tls::prepare()?;
        }
        // An emulator needs its data directory at the start alone: keys may be put there now.
        drop(left);
        let contained = match &daemon.target {
            None => contain::enter(config.containment, &needs)?,
            // It opens what it is told to at run time.
            Some(_) => None,
        };
        let devices = config.devices.into_iter().zip(securities).zip(places);
        for ((device, security), place) in devices {
            daemon.add_device_on(device, &security, place)?;
        }
        if let Some(socket) = api {
            let router = http::devices(daemon.devices.clone());
            daemon.api = Some(http::serve(socket, router).context("management API")?);
        }
        if let Some(contained) = contained {
            contained.close()?;
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

    /// Address of the target's management API on TCP, with the port the system chose where 0 was
    /// asked for.
    pub fn api_address(&self) -> Option<SocketAddr> {
        let mut servers = self.target.iter().flat_map(|target| target.apis());
        servers.find_map(|server| match server.place() {
            http::Place::Tcp(addr) => Some(*addr),
            http::Place::Socket(_) => None,
        })
    }

    /// Follows one I/O command in `every` on each core of the target, to see where its time goes; 0:
    /// none.
    pub fn set_sampling(&self, every: u32) {
        if let Some(target) = &self.target {
            target.target.set_sampling(every);
        }
    }

    /// Where the time of followed commands went; nothing without a target.
    pub fn breakdown(&self) -> api::Breakdown {
        self.target.as_ref().map_or_else(Default::default, |target| target.manager.breakdown())
    }

    /// Connections and associations of the target at this moment.
    pub fn connected(&self) -> (usize, usize) {
        self.target.as_ref().map_or((0, 0), |target| target.target.connected())
    }

    /// Associations of the target at this moment that are encrypted.
    pub fn encrypted(&self) -> usize {
        let Some(target) = &self.target else { return 0 };
        let controllers = target.target.status().controllers;
        controllers.iter().filter(|controller| controller.tls.is_some()).count()
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
            for server in target.apis() {
                tracing::info!(at = %server.place(), "management API");
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
        if let Some(api) = &self.api {
            tracing::info!(at = %api.place(), "management API");
        }
        if self.emulator.is_some() {
            tracing::info!(hostnqn = %self.host.nqn, "host");
        }
    }

    /// Begins to emulate a device. Its socket is there at once; who connects to it is served as soon
    /// as the target has answered.
    pub fn add_device(&mut self, config: DeviceConfig) -> anyhow::Result<()> {
        let security = self.security_of(&config)?;
        let place = Place::Own(devices::listen_for(&config)?);
        self.add_device_on(config, &security, place)
    }

    /// What a device proves itself with. Opens files: not for a process that is contained.
    fn security_of(&self, device: &DeviceConfig) -> anyhow::Result<DeviceSecurity> {
        let host = &device.host.as_ref().unwrap_or(&self.host).nqn;
        let (credentials, data) = (&device.credentials, self.data_dir.as_deref());
        let load = || {
            let target = credentials.load(host, &device.subnqn, data)?;
            let discovery = match (device.discover.is_empty(), device.discover_in_plaintext) {
                (true, _) => Security::default(),
                (false, true) => Security { tls: Tls::Off, ..target.clone() },
                (false, false) => credentials.load_discovery(&target, host, data)?,
            };
            anyhow::Ok(DeviceSecurity { target, discovery })
        };
        load().with_context(|| format!("device {:?}", device.name))
    }

    fn add_device_on(
        &mut self,
        config: DeviceConfig,
        security: &DeviceSecurity,
        place: Place,
    ) -> anyhow::Result<()> {
        if self.emulator.is_none() {
            let roles = 1 + usize::from(self.target.is_some());
            let count = self.emulator_cores.unwrap_or_else(|| cores::default_count(roles));
            let ended = ended(self.failed.clone());
            let core_config = cores::emulator_config(self.emulator_busy_poll_us);
            let cores = Cores::start("emulator", count, &core_config, ended)?;
            self.emulator = Some(RunningEmulator { cores, next_core: 0, devices: Vec::new() });
        }
        let failed = self.failed.clone();
        let Some(emulator) = &mut self.emulator else { bail!("no core for the device") };
        let first = emulator.next_core % emulator.cores.handles().len();
        emulator.next_core = emulator.next_core.wrapping_add(1);
        let cores = (&emulator.cores, first);
        let host = &self.host;
        let device =
            RunningDevice::start(config, security, place, host, cores, &self.devices, failed)?;
        emulator.devices.push(device);
        Ok(())
    }

    /// Tries from inside what a guest that took this process over would try. Blocks.
    pub fn try_to_break_out(&self) -> Vec<contain::probe::Attempt> {
        let Some(emulator) = &self.emulator else { return Vec::new() };
        let dir = emulator.devices.first().and_then(|device| device.entry.config.socket.parent());
        contain::probe::attempts(&emulator.cores, dir.unwrap_or(Path::new(".")))
    }

    /// Waits until device `name` is served. Blocks; for set-up only.
    pub(crate) fn wait_device(&self, name: &str, timeout: Duration) -> anyhow::Result<()> {
        let begun = std::time::Instant::now();
        let device = self
            .emulator
            .iter()
            .flat_map(|emulator| &emulator.devices)
            .find(|device| device.entry.config.name == name)
            .ok_or_else(|| anyhow!("there is no device {name:?}"))?;
        loop {
            if device.entry.is_served()? {
                return Ok(());
            }
            let left = timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let reason = device.entry.last_error();
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
            && let Some(index) =
                emulator.devices.iter().position(|device| device.entry.config.name == name)
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
        self.api = None;
        if let Some(target) = &mut self.target {
            target.close();
        }
        if let Some(emulator) = self.emulator.take() {
            for device in &emulator.devices {
                device.entry.give_up();
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
