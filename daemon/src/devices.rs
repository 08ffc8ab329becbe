//! Emulated devices: each waits for its target, is served, is reported, and goes.

mod by_hand;
mod namespaces;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use api::{Code, Problem};
use block::{Latency, Volume};
use nvme::spec::Nqn;
use nvme_pci::vfio_user::journal::{FdKeeper, Journal};
use nvmf_initiator::{
    DiscoveryState, PathState, Phase, RemoteConfig, RemoteSubsystem, RemoteVolume, Security, Tls,
    Watch, WatchConfig,
};
use reactor::CoreHandle;
use reactor::unix::Listener;
use tokio::sync::mpsc;
use uuid::Uuid;

use self::by_hand::ByHand;
use self::namespaces::{Opener, READY, Spaces};
use crate::config::{DeviceConfig, DeviceKind};
use crate::cores::Cores;
use crate::credentials::{self, Part};
use crate::identity::{self, HostIdentity};
use crate::manage::serial_text;
use crate::supervise::Legacy;

/// How long a device waits for its association to say goodbye.
const FAREWELL: Duration = Duration::from_secs(3);
/// Who may write to a device's socket may use the device: owner and group.
const SOCKET_MODE: u32 = 0o660;
/// How often a thread that waits for a target looks whether it should end.
const LOOK: Duration = Duration::from_millis(200);

/// The devices of a process, for whoever asks what they are doing.
#[derive(Default)]
pub(crate) struct Book(Mutex<Vec<Arc<Entry>>>);

/// What a device proves itself with.
#[derive(Clone, Debug)]
pub(crate) struct DeviceSecurity {
    pub(crate) target: Security,
    /// Towards discovery controllers.
    pub(crate) discovery: Security,
}

/// A device on its way to being served, or served.
pub(crate) struct Entry {
    pub(crate) config: DeviceConfig,
    /// Namespaces of its target.
    spaces: Mutex<Spaces>,
    /// Where they come from, if it has a target.
    opener: Option<Opener>,
    /// Which there are, if it follows that.
    subsystem: Option<Arc<RemoteSubsystem>>,
    /// What an operator has changed of them.
    by_hand: Mutex<ByHand>,
    /// Held while namespaces are attached or detached.
    changing: Mutex<()>,
    /// Its own volume, instead of remote ones.
    local: Option<Arc<dyn Volume>>,
    /// Looks out for their paths, if discovery tells them.
    watch: Mutex<Option<Watch>>,
    security: Mutex<DeviceSecurity>,
    /// Who it is to its target, if it has one.
    hostnqn: Option<Nqn>,
    stop: AtomicBool,
    handle: Mutex<Option<Handle>>,
    failed: Mutex<Option<String>>,
}

/// A device that is served.
enum Handle {
    VirtioBlk(virtio_blk::DeviceHandle),
    Nvme(nvme_pci::DeviceHandle),
}

/// Where a device is served.
pub(crate) enum Place {
    /// At a socket of this process's.
    Own(Listener),
    /// At one that a supervisor keeps, with what else it keeps.
    Kept(Legacy),
}

/// What is kept of an NVMe device beside its client's: the journal of the connection, doorbells and
/// queues. Keys that the journal does not use.
const JOURNAL_KEY: u64 = u64::MAX - 16;
const DOORBELLS_KEY: u64 = u64::MAX - 17;
const QUEUES_KEY: u64 = u64::MAX - 18;

/// A device, and the thread that brings it into service.
pub(crate) struct RunningDevice {
    pub(crate) entry: Arc<Entry>,
    book: Arc<Book>,
    /// Waits for the target, then serves the socket; ends when that is done or no longer wanted.
    starter: Option<JoinHandle<()>>,
}

/// The device's socket, before the target is asked for anything.
pub(crate) fn listen_for(config: &DeviceConfig) -> anyhow::Result<Listener> {
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
    Listener::new(&config.socket, SOCKET_MODE).with_context(|| format!("device {:?}", config.name))
}

impl RunningDevice {
    /// Begins to reach the target; core `first` of `cores` drives the association.
    pub(crate) fn start(
        config: DeviceConfig,
        security: &DeviceSecurity,
        mut place: Place,
        host: &HostIdentity,
        (cores, first): (&Cores, usize),
        book: &Arc<Book>,
        failed: mpsc::UnboundedSender<String>,
    ) -> anyhow::Result<RunningDevice> {
        let host = config.host.as_ref().unwrap_or(host);
        let local = match &config.volume {
            Some(spec) => {
                let identity = identity::derive_volume(&config.subnqn, &config.name);
                Some(
                    spec.open_for_device(identity)
                        .with_context(|| format!("device {:?}", config.name))?,
                )
            }
            None => None,
        };
        let queues = match config.kind {
            // Each ring of the device opens a channel, which is an I/O queue.
            DeviceKind::VirtioBlk => config.queues,
            // Each core opens one, and for a change of namespaces one more.
            DeviceKind::Nvme => (2 * cores.handles().len()).clamp(1, 1024) as u16,
        };
        let of_device = || format!("device {:?}", config.name);
        let opener = local.is_none().then(|| Opener {
            config: RemoteConfig {
                queues,
                paths: config.connect.clone(),
                paths_change: !config.discover.is_empty(),
                policy: config.policy,
                ctrl_loss_timeout: config.ctrl_loss_timeout,
                security: security.target.clone(),
                ..RemoteConfig::unplaced(config.subnqn.clone(), 1, (host.nqn.clone(), host.id))
            },
            core: cores.handles()[first].clone(),
        });
        let by_hand = match &mut place {
            Place::Kept(legacy) if config.kind == DeviceKind::Nvme && opener.is_some() => {
                ByHand::kept(legacy).with_context(of_device)?
            }
            _ => ByHand::default(),
        };
        let mut remotes = Vec::with_capacity(config.nsids.len());
        let mut subsystem = None;
        if let Some(opener) = &opener {
            for nsid in by_hand.namespaces(&config.nsids) {
                remotes.push((nsid, opener.open(nsid, &security.target).with_context(of_device)?));
            }
            if config.follows {
                subsystem = Some(opener.list().with_context(of_device)?);
            }
        }
        let watch = match config.discover.as_slice() {
            [] => None,
            discover => {
                let host = (host.nqn.clone(), host.id);
                let watch = WatchConfig {
                    always: config.connect.clone(),
                    ports: config.ports.clone(),
                    has_tls: !matches!(security.target.tls, Tls::Off),
                    security: security.discovery.clone(),
                    ..WatchConfig::new(discover.to_vec(), config.subnqn.clone(), host)
                };
                let volumes: Vec<_> =
                    remotes.iter().map(|(_, volume)| Arc::clone(volume)).collect();
                let started = cores.on(first, move |spawner| {
                    let (watch, task) = Watch::start(watch, &volumes, spawner.local())?;
                    spawner.spawn(task);
                    Ok::<_, nvmf_initiator::ConfigError>(watch)
                })?;
                let watch = started.with_context(of_device)?;
                if let Some(subsystem) = &subsystem {
                    watch.add_subsystem(subsystem).with_context(of_device)?;
                }
                Some(watch)
            }
        };

        let count = cores.handles().len();
        // Devices take turns with the cores, so that small ones do not all share the first.
        let handles: Vec<_> =
            (0..count).map(|index| cores.handles()[(first + index) % count].clone()).collect();
        let name = format!("start-{}", config.name);
        let hostnqn = local.is_none().then(|| host.nqn.clone());
        let entry = Arc::new(Entry {
            config,
            spaces: Mutex::new(Spaces { remotes, ..Spaces::default() }),
            opener,
            subsystem,
            by_hand: Mutex::new(by_hand),
            changing: Mutex::new(()),
            local,
            watch: Mutex::new(watch),
            security: Mutex::new(security.clone()),
            hostnqn,
            stop: AtomicBool::new(false),
            handle: Mutex::new(None),
            failed: Mutex::new(None),
        });
        let starter = std::thread::Builder::new().name(name).spawn({
            let entry = entry.clone();
            move || entry.serve_when_ready(place, handles, &failed)
        })?;
        lock(&book.0).push(entry.clone());
        Ok(RunningDevice { entry, book: book.clone(), starter: Some(starter) })
    }

    /// Drains the device, takes its socket away and says goodbye to the target. Blocks.
    pub(crate) fn stop(mut self) {
        self.entry.give_up();
        if let Some(starter) = self.starter.take() {
            // A panic in it has been reported by the panic hook; there is no device then.
            let _ = starter.join();
        }
        match lock(&self.entry.handle).take() {
            Some(Handle::VirtioBlk(handle)) => handle.stop(),
            Some(Handle::Nvme(handle)) => handle.stop(),
            None => {}
        }
        drop(lock(&self.entry.watch).take());
        let remotes = std::mem::take(&mut lock(&self.entry.spaces).remotes);
        for (_, remote) in &remotes {
            remote.shutdown();
        }
        for (nsid, remote) in &remotes {
            if !remote.wait_stopped(FAREWELL) {
                let device = &self.entry.config.name;
                tracing::warn!(%device, nsid, "the target gave no answer to the goodbye");
            }
        }
        if let Some(subsystem) = &self.entry.subsystem {
            subsystem.wait_stopped(FAREWELL);
        }
    }
}

impl Drop for RunningDevice {
    fn drop(&mut self) {
        self.entry.give_up();
        lock(&self.book.0).retain(|other| !Arc::ptr_eq(other, &self.entry));
    }
}

impl Entry {
    /// Tells the thread that waits for the target, or follows it, that nobody waits for it.
    pub(crate) fn give_up(&self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(subsystem) = &self.subsystem {
            subsystem.shutdown();
        }
    }

    /// Whether it is served; an error says why it never will be.
    pub(crate) fn is_served(&self) -> anyhow::Result<bool> {
        if let Some(problem) = lock(&self.failed).clone() {
            bail!("{problem}");
        }
        Ok(lock(&self.handle).is_some())
    }

    /// What keeps it from its target.
    pub(crate) fn last_error(&self) -> Option<String> {
        let of_subsystem =
            self.subsystem.as_ref().and_then(|subsystem| subsystem.state().last_error.clone());
        let remotes = lock(&self.spaces).remotes.clone();
        let mut of_remotes =
            remotes.iter().filter_map(|(_, remote)| remote.state().last_error.clone());
        of_subsystem.or_else(|| of_remotes.next())
    }

    /// Waits for the target, then serves the device's socket.
    fn serve_when_ready(
        &self,
        place: Place,
        cores: Vec<CoreHandle>,
        failed: &mpsc::UnboundedSender<String>,
    ) {
        if let Some(subsystem) = &self.subsystem {
            if !self.gather(subsystem) {
                return;
            }
        } else {
            // Who asks what the device is doing is not to wait with it.
            let remotes = lock(&self.spaces).remotes.clone();
            let by_hand_until = Instant::now() + READY;
            for (nsid, remote) in remotes {
                // What was attached by hand may be gone; what is configured is waited for.
                let is_optional = !self.config.nsids.contains(&nsid);
                // The initiator logs what keeps it from the target; nothing to add here.
                while remote.wait_ready(LOOK).is_err() {
                    if self.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if is_optional && Instant::now() >= by_hand_until {
                        self.leave_out(nsid);
                        break;
                    }
                }
            }
        }
        let config = &self.config;
        match self.serve(place, cores) {
            Ok(handle) => {
                let socket = config.socket.display();
                tracing::info!(device = %config.name, kind = %config.kind, %socket, "device ready");
                *lock(&self.handle) = Some(handle);
                if let Some(subsystem) = &self.subsystem {
                    self.follow(subsystem);
                }
            }
            Err(error) => {
                let problem = format!("device {:?}: {error:#}", config.name);
                *lock(&self.failed) = Some(problem.clone());
                // Nobody listens any more once the process stops in order.
                let _ = failed.send(problem);
            }
        }
    }

    fn serve(&self, place: Place, cores: Vec<CoreHandle>) -> anyhow::Result<Handle> {
        let config = &self.config;
        let volumes: Vec<(u32, Arc<dyn Volume>)> = match &self.local {
            Some(volume) => vec![(1, volume.clone())],
            None => {
                let remotes = lock(&self.spaces).remotes.clone();
                let is_ready = |one: &RemoteVolume| one.state().phase != Phase::Connecting;
                let remotes =
                    remotes.into_iter().filter(|(_, one)| !config.follows || is_ready(one));
                remotes.map(|(nsid, remote)| (nsid, remote as Arc<dyn Volume>)).collect()
            }
        };
        let own = identity::derive_device(&config.subnqn, &config.name);
        let identity = match volumes.first() {
            _ if config.follows => own,
            first => {
                let first = first.map(|(_, volume)| volume.identity());
                let identity = lock(&self.by_hand).identity(first).context("who it is")?;
                identity.context("no namespace")?
            }
        };
        let serial = serial_text(&identity.serial);
        if self.opener.is_some() {
            lock(&self.spaces).shown = volumes.iter().map(|(nsid, _)| *nsid).collect();
        }
        match config.kind {
            DeviceKind::VirtioBlk => {
                let (_, volume) = volumes.first().ok_or_else(|| anyhow!("no namespace"))?;
                let device = virtio_blk::DeviceConfig {
                    queues: config.queues,
                    queue_size_max: virtio_blk::QUEUE_SIZE_MAX,
                    serial,
                    read_only: config.read_only,
                    ..virtio_blk::DeviceConfig::new(&config.name, &config.socket)
                };
                let listener = match place {
                    Place::Own(listener) => listener,
                    // Its clients connect again, and bring what a predecessor left.
                    Place::Kept(Legacy { listener, .. }) => listener,
                };
                let handle = virtio_blk::serve_on(listener, device, volume.clone(), cores)?;
                Ok(Handle::VirtioBlk(handle))
            }
            DeviceKind::Nvme => {
                let device = nvme_pci::DeviceConfig {
                    queues: config.queues,
                    serial: serial.trim_end().to_owned(),
                    uuid: Some(identity.uuid),
                    doorbells: config.doorbells,
                    ..nvme_pci::DeviceConfig::new(&config.name, &config.socket)
                };
                match place {
                    Place::Own(listener) => {
                        Ok(Handle::Nvme(nvme_pci::serve_on(listener, device, volumes, &cores)?))
                    }
                    Place::Kept(legacy) => {
                        Ok(Handle::Nvme(serve_kept(device, volumes, &cores, legacy)?))
                    }
                }
            }
        }
    }

    /// Has connections and authentications from now on use other keys.
    fn set_keys(&self, request: &api::SetDeviceKeys) -> Result<(), Problem> {
        let invalid = |what: String| Problem {
            error: Code::Invalid,
            what,
            allowed: "keys of a device with a target".to_owned(),
        };
        if self.local.is_some() {
            return Err(invalid("the device has a volume of its own, and no target".to_owned()));
        }
        // Held to the end: two requests at once come one after the other, and no namespace is opened
        // with the old ones meanwhile.
        let _turn = lock(&self.changing);
        let mut security = lock(&self.security);
        let watch = lock(&self.watch);
        let new = DeviceSecurity {
            target: credentials::renewed(&security.target, request, Part::Target)?,
            discovery: match watch.is_some() {
                true => credentials::renewed(&security.discovery, request, Part::Discovery)?,
                false => security.discovery.clone(),
            },
        };
        let remotes = lock(&self.spaces).remotes.clone();
        for (_, remote) in &remotes {
            remote.set_security(new.target.clone()).map_err(|error| invalid(error.to_string()))?;
        }
        if let Some(subsystem) = &self.subsystem {
            subsystem
                .set_security(new.target.clone())
                .map_err(|error| invalid(error.to_string()))?;
        }
        if let Some(watch) = &*watch {
            watch
                .set_security(new.discovery.clone())
                .map_err(|error| invalid(error.to_string()))?;
        }
        *security = new;
        tracing::info!(
            device = %self.config.name,
            psk = request.psk.len(),
            dhchap = request.dhchap.is_some(),
            dhchap_ctrl = request.dhchap_ctrl.is_some(),
            "new keys"
        );
        if request.reauthenticate {
            remotes.iter().for_each(|(_, remote)| remote.reauthenticate());
            self.subsystem.iter().for_each(|subsystem| subsystem.reauthenticate());
        }
        Ok(())
    }

    fn report(&self) -> api::Device {
        let config = &self.config;
        let mut device = api::Device {
            name: config.name.clone(),
            kind: config.kind.to_string(),
            socket: config.socket.display().to_string(),
            hostnqn: self.hostnqn.as_ref().map_or_else(String::new, Nqn::to_string),
            is_served: false,
            guest_attached: false,
            namespaces: match &self.local {
                Some(volume) => vec![self.local_namespace(&**volume)],
                None => {
                    let remotes = lock(&self.spaces).remotes.clone();
                    let mut spaces: Vec<_> =
                        remotes.iter().map(|remote| self.namespace(remote)).collect();
                    spaces.sort_by_key(|ns| ns.nsid);
                    spaces
                }
            },
            follows: config.follows,
            withheld: match config.follows {
                true => lock(&self.by_hand).detached().iter().copied().collect(),
                false => Vec::new(),
            },
            discovery: match &*lock(&self.watch) {
                Some(watch) => watch.state().iter().map(discovery).collect(),
                None => Vec::new(),
            },
            queues: Vec::new(),
            in_flight: 0,
            counters: api::DeviceCounters::default(),
            problem: lock(&self.failed).clone(),
        };
        match &*lock(&self.handle) {
            None => {}
            Some(Handle::Nvme(handle)) => {
                device.is_served = true;
                match handle.state() {
                    Ok(state) => nvme(&mut device, &state),
                    Err(error) => device.problem = Some(error.to_string()),
                }
            }
            Some(Handle::VirtioBlk(handle)) => {
                device.is_served = true;
                match handle.state() {
                    Ok(state) => virtio(&mut device, &state),
                    Err(error) => device.problem = Some(error.to_string()),
                }
            }
        }
        device.in_flight = device.queues.iter().map(|queue| queue.in_flight).sum();
        device
    }

    fn local_namespace(&self, volume: &dyn Volume) -> api::DeviceNamespace {
        let (identity, geometry) = (volume.identity(), volume.geometry());
        api::DeviceNamespace {
            nsid: 1,
            is_shown: true,
            subnqn: String::new(),
            volume: self.config.volume.as_ref().map(ToString::to_string),
            uuid: Uuid::from_bytes(identity.uuid).to_string(),
            serial: serial_text(&identity.serial),
            size_bytes: geometry.bytes(),
            block_bytes: geometry.block_bytes,
            paths: Vec::new(),
        }
    }

    fn namespace(&self, (nsid, remote): &(u32, Arc<RemoteVolume>)) -> api::DeviceNamespace {
        let state = remote.state();
        let path = |path: &PathState| api::DevicePath {
            addr: path.addr.to_string(),
            state: match (state.phase, path.is_live) {
                (Phase::Stopped { .. }, _) => "stopped",
                (_, true) if path.is_detached => "detached",
                (_, true) if !path.is_wanted => "leaving",
                (_, true) => "live",
                (_, false) => "connecting",
            }
            .to_owned(),
            ana: path.ana.map(|ana| format!("{ana:?}")),
            associations: path.generation,
            losses: path.losses,
            last_error: path.last_error.clone(),
        };
        api::DeviceNamespace {
            nsid: *nsid,
            is_shown: lock(&self.spaces).shown.contains(nsid),
            subnqn: self.config.subnqn.to_string(),
            volume: None,
            uuid: Uuid::from_bytes(state.identity.uuid).to_string(),
            serial: serial_text(&state.identity.serial),
            size_bytes: state.geometry.bytes(),
            block_bytes: state.geometry.block_bytes,
            paths: state.paths.iter().filter(|path| !path.is_vacant).map(path).collect(),
        }
    }
}

fn discovery(state: &DiscoveryState) -> api::DeviceDiscovery {
    api::DeviceDiscovery {
        addr: state.addr.to_string(),
        referred_by: state.referred_by.map(|addr| addr.to_string()),
        state: if state.is_connected { "connected" } else { "connecting" }.to_owned(),
        genctr: state.genctr,
        entries: state.entries as u64,
        paths: state.paths.iter().map(ToString::to_string).collect(),
        left_out: state.left_out.clone(),
        last_error: state.last_error.clone(),
    }
}

/// Serves an NVMe device that outlives this process, with what its predecessor left, if there was
/// one.
fn serve_kept(
    config: nvme_pci::DeviceConfig,
    volumes: Vec<(u32, Arc<dyn Volume>)>,
    cores: &[CoreHandle],
    legacy: Legacy,
) -> anyhow::Result<nvme_pci::DeviceHandle> {
    let Legacy { listener, mut keeper, mut files } = legacy;
    let state = match files.remove(&JOURNAL_KEY) {
        Some(state) => state,
        None => {
            let state =
                rustix::fs::memfd_create("penstock-journal", rustix::fs::MemfdFlags::CLOEXEC)?;
            keeper.keep(JOURNAL_KEY, state.as_fd())?;
            state
        }
    };
    let left = match (files.remove(&DOORBELLS_KEY), files.remove(&QUEUES_KEY)) {
        (Some(doorbells), Some(queues)) => Some(nvme_pci::Files { doorbells, queues }),
        _ => None,
    };
    let is_new = left.is_none();
    let journal = Journal::new(state, Box::new(keeper.clone()), files).context("journal")?;
    let kept = nvme_pci::Kept { listener, journal, files: left };
    let handle = nvme_pci::serve_kept(config, volumes, cores, kept)?;
    if is_new {
        let (doorbells, queues) = handle.files();
        keeper.keep(DOORBELLS_KEY, doorbells)?;
        keeper.keep(QUEUES_KEY, queues)?;
    }
    Ok(handle)
}

fn nvme(device: &mut api::Device, state: &nvme_pci::DeviceState) {
    device.guest_attached = state.client_connected;
    device.queues = state
        .queues
        .iter()
        .map(|queue| api::DeviceQueue {
            index: queue.qid,
            core: queue.core,
            entries: queue.entries,
            in_flight: queue.in_flight as u64,
            broken: None,
        })
        .collect();
    let counters = &state.counters;
    device.counters = api::DeviceCounters {
        reads_total: counters.reads,
        writes_total: counters.writes,
        others_total: counters.others,
        read_bytes_total: counters.read_bytes,
        written_bytes_total: counters.written_bytes,
        errors_total: counters.errors,
        interrupts_total: counters.interrupts,
        ..api::DeviceCounters::default()
    };
    latency(&mut device.counters, &counters.latency);
}

fn latency(counters: &mut api::DeviceCounters, latency: &Latency) {
    let ns = |time: Option<Duration>| time.map(|time| time.as_nanos() as u64);
    counters.latency_mean_ns = ns(latency.mean());
    counters.latency_p50_ns = ns(latency.percentile(0.5));
    counters.latency_p99_ns = ns(latency.percentile(0.99));
    counters.latency_p999_ns = ns(latency.percentile(0.999));
    counters.latency_max_ns = ns(latency.max());
}

fn virtio(device: &mut api::Device, state: &virtio_blk::DeviceState) {
    device.guest_attached = state.client_connected;
    let started = state.queues.iter().filter(|queue| queue.is_running);
    device.queues = started
        .map(|queue| api::DeviceQueue {
            index: queue.index,
            core: queue.core,
            entries: queue.size.into(),
            in_flight: queue.in_flight as u64,
            broken: queue.broken.map(|broken| broken.to_string()),
        })
        .collect();
    let sum = &mut device.counters;
    let mut all = Latency::default();
    for virtio_blk::QueueState { counters, .. } in &state.queues {
        sum.reads_total += counters.reads;
        sum.writes_total += counters.writes;
        sum.others_total +=
            counters.flushes + counters.discards + counters.write_zeroes + counters.others;
        sum.read_bytes_total += counters.read_bytes;
        sum.written_bytes_total += counters.written_bytes;
        sum.errors_total += counters.errors;
        sum.interrupts_total += counters.calls;
        all.add(&counters.latency);
    }
    latency(sum, &all);
}

impl Book {
    /// All devices, in the order they were added.
    pub(crate) fn list(&self) -> Vec<api::Device> {
        // Asking waits for cores; nobody else has to wait with it.
        let entries = lock(&self.0).clone();
        entries.iter().map(|entry| entry.report()).collect()
    }

    /// One of them.
    pub(crate) fn device(&self, name: &str) -> Result<api::Device, Problem> {
        Ok(self.entry(name)?.report())
    }

    /// Gives one of them other keys.
    pub(crate) fn set_keys(
        &self,
        name: &str,
        request: &api::SetDeviceKeys,
    ) -> Result<api::Device, Problem> {
        let entry = self.entry(name)?;
        entry.set_keys(request)?;
        Ok(entry.report())
    }

    fn entry(&self, name: &str) -> Result<Arc<Entry>, Problem> {
        let entries = lock(&self.0).clone();
        let found = entries.into_iter().find(|entry| entry.config.name == name);
        found.ok_or_else(|| Problem {
            error: Code::NotFound,
            what: format!("there is no device {name:?}"),
            allowed: "the names that /v1/devices lists".to_owned(),
        })
    }
}

/// A panic elsewhere cannot leave these values half changed, so a poisoned lock is used on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
