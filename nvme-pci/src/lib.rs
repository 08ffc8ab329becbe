//! An NVMe controller as a PCI function, served over vfio-user.
//!
//! ```text
//!  client (QEMU)                           control thread
//!  ──────────── Unix socket ───────► vfio_user::{wire, session, server}
//!               guest memory                     │ function::Function
//!               eventfd per vector               ▼
//!                                     device: pci, nvme::ctrl, admin queue      cores
//!               doorbells ─────────────────────────────┴──────────────► worker, engine, queue
//!                                                                             │ block::Channel
//!               record (a successor goes on from it) ◄────────────────────────┘
//! ```
//!
//! [`function::Function`] is the seam: a transport (vfio-user, in software) on one side, a PCI
//! function on the other. Neither knows the other.
//!
//! [`serve`] starts a control thread that listens on a Unix socket and one reactor task on each
//! core. Registers and the admin queue belong to the control thread. A completion queue and the
//! submission queues that use it are placed on a core when the guest creates them; from then on they
//! belong to that core. On the way of an I/O there is no allocation, no lock and no system call but
//! the interrupt, once per batch.
//!
//! `engine`, `queue` and `record` know no socket and no reactor.
//!
//! # Hostile guests
//!
//! A guest controls registers, queues, data pointers and memory, and may change any of them at any
//! time. It cannot make the device panic, touch memory outside its own, grow without bound or stop
//! others from being served. Each entry is read once, and what was checked is what is used. A command
//! that cannot be done fails with the status that the specification has for it.
//!
//! # What this crate does not do
//!
//! No metadata and protection information, no controller memory buffer, no SR-IOV. An Abort ends a command that waits, not one that is at a volume. Little-endian machines only.
//!
//! Start reading at [`function`], then `device`, then [`engine`].

#![cfg_attr(not(test), forbid(unsafe_code))]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io, thread};

use block::{Geometry, Identity, Volume};
use iobuf::GuestMemory;
use nvme::spec::{AsciiField, Nqn};
use nvme::subsys::{
    COPY_BYTES_MAX, COPY_RANGE_BYTES_MAX, COPY_RANGES_MAX, Limits, NamespaceInfo, SubsystemInfo,
};
use nvme::xfer::Transport;
use reactor::CoreHandle;
use reactor::unix::{Listener, Waker};

mod admin;
pub mod device;
pub mod dirty;
pub mod engine;
pub mod function;
pub mod msix;
mod nap;
pub mod pci;
pub mod queue;
pub mod record;
mod saved;
mod status;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vfio_user;
mod worker;

pub use device::Device;
pub use engine::Counters;
pub use reactor::unix::ListenError;
pub use vfio_user::server::ClientState;

use record::Record;
use vfio_user::journal::Journal;
use vfio_user::server::{Request, Server};
use worker::{Attached, CoreTask, Events, Running};

/// Most I/O queues of each kind.
pub const IO_QUEUES_MAX: u16 = record::QUEUES_MAX - 1;
/// Largest read or write.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Smallest that a volume must take at once.
const TRANSFER_BYTES_MIN: u32 = 8192;
/// Namespaces of a device.
pub const NAMESPACES_MAX: u32 = 256;
/// How long [`DeviceHandle::state`] waits for the cores.
const STATE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bound of a core's mailbox; the rest waits at the sender.
const COMMANDS: usize = 64;

/// How a core hears of the doorbells of its queues. See docs/decisions/nvme-doorbells.md.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doorbells {
    /// The client sends each ring as a message, and an idle core sleeps. Guests that use shadow
    /// doorbells, as Linux does, ring only when the core sleeps.
    #[default]
    Trapped,
    /// The client writes to them in shared memory. Nobody is told, so that the core looks at them
    /// from time to time even if nothing happens.
    Mapped,
}

/// What a device is and where it is found.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Name for logs.
    pub name: String,
    /// Path of the Unix socket.
    pub socket: PathBuf,
    /// Permission bits of the socket file. Whoever may write to it may use the device.
    pub socket_mode: u32,
    /// I/O queues of each kind, up to [`IO_QUEUES_MAX`].
    pub queues: u16,
    /// Entries of a queue, 2 to 1,024.
    pub queue_entries_max: u16,
    /// Serial number, up to 20 printable ASCII characters. Empty: that of the first volume.
    pub serial: String,
    /// UUID that the subsystem's name is made of. `None`: that of the first volume.
    pub uuid: Option<[u8; 16]>,
    /// How doorbells are heard of.
    pub doorbells: Doorbells,
    /// When something waits for I/O in flight: how long it may take to come back by itself. Then
    /// what can be is aborted.
    pub drain_grace: Duration,
}

impl DeviceConfig {
    /// A device of up to 64 queues of up to 1,024 entries, with a socket for owner and group.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>) -> DeviceConfig {
        DeviceConfig {
            name: name.into(),
            socket: socket.into(),
            socket_mode: 0o660,
            queues: IO_QUEUES_MAX,
            queue_entries_max: record::ENTRIES_MAX,
            serial: String::new(),
            uuid: None,
            doorbells: Doorbells::default(),
            drain_grace: Duration::from_secs(2),
        }
    }
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Bad number of queues.
    #[error("{0} I/O queues: 1 to {IO_QUEUES_MAX} are possible")]
    Queues(u16),
    /// Bad queue size.
    #[error("queues of {0} entries: 2 to 1024 are possible")]
    QueueEntries(u16),
    /// Bad serial number.
    #[error("serial {0:?}: up to 20 printable ASCII characters are possible")]
    Serial(String),
    /// Nothing to run on.
    #[error("a device needs a core")]
    NoCores,
    /// A namespace.
    #[error(transparent)]
    Namespace(#[from] AttachError),
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A core's mailbox is full or closed.
    #[error("core {0} does not take the device")]
    Core(usize),
    /// No more file descriptors or threads.
    #[error("cannot start the device")]
    Start(#[source] io::Error),
}

/// Why a volume cannot be a namespace of a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// There is one with this identifier.
    #[error("namespace {0} is attached already")]
    InUse(u32),
    /// There is none with this identifier.
    #[error("namespace {0} is not attached")]
    NotAttached(u32),
    /// The guest has been told of longer transfers than the volume takes.
    #[error("the volume takes {volume} bytes at once, the device promises {device}")]
    TransferBytes {
        /// What the volume takes.
        volume: u32,
        /// What the device promises.
        device: u32,
    },
    /// A controller cannot have such a namespace.
    #[error(transparent)]
    Invalid(#[from] nvme::subsys::InvalidSubsystem),
    /// The volume cannot be opened where the device has queues, or on any of its cores.
    #[error("namespace {nsid} cannot be opened on core {core}: {reason}")]
    Open {
        /// Its identifier.
        nsid: u32,
        /// Position of the core in the list given to [`serve`].
        core: usize,
        /// What the volume said.
        reason: String,
    },
    /// The device has stopped, or does not answer.
    #[error("the device does not answer")]
    NoAnswer,
}

/// One submission queue of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Its identifier.
    pub qid: u16,
    /// Its completion queue.
    pub cqid: u16,
    /// Position of its core in the list given to [`serve`].
    pub core: usize,
    /// Entries.
    pub entries: u32,
    /// Commands taken and not completed.
    pub in_flight: usize,
}

/// One namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceState {
    /// Its identifier.
    pub nsid: u32,
    /// Size.
    pub bytes: u64,
}

/// What a device is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// A client is connected.
    pub client_connected: bool,
    /// The guest has enabled the controller, and it is ready.
    pub is_enabled: bool,
    /// Queues of the guest.
    pub queues: Vec<QueueState>,
    /// Identifiers of the completion queues.
    pub completion_queues: Vec<u16>,
    /// Namespaces.
    pub namespaces: Vec<NamespaceState>,
    /// Since the device was started, over all clients.
    pub counters: Counters,
}

/// The device does not answer: it has stopped, or its cores have not run for two seconds.
#[derive(Debug, thiserror::Error)]
#[error("the device does not answer")]
pub struct NoAnswer;

/// What a volume is as a namespace.
fn namespace_info(nsid: u32, geometry: &Geometry, identity: &Identity) -> NamespaceInfo {
    let copy = geometry.copy;
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
        compare: geometry.compare,
        compare_and_write: geometry.compare_and_write,
        verify: geometry.verify,
        // The limits that Identify tells are those of the protocol core: a volume that takes less
        // has no Copy.
        copy: copy.ranges_max >= COPY_RANGES_MAX
            && copy.range_bytes_max >= u64::from(COPY_RANGE_BYTES_MAX)
            && copy.bytes_max >= u64::from(COPY_BYTES_MAX),
        reservations: geometry.rescap != 0,
        ptpl: geometry.rescap & 1 != 0,
        ..NamespaceInfo::new(nsid, geometry.block_bytes, geometry.blocks)
    }
}

/// The same subsystem with the volumes as they are now.
fn namespaces(subsys: &SubsystemInfo, attached: &[Attached]) -> Result<SubsystemInfo, AttachError> {
    let device = subsys.limits().mdts_bytes;
    let mut list = Vec::with_capacity(attached.len());
    for Attached { nsid, volume } in attached {
        let geometry = volume.geometry();
        if geometry.io_bytes_max < device {
            return Err(AttachError::TransferBytes { volume: geometry.io_bytes_max, device });
        }
        list.push(namespace_info(*nsid, &geometry, &volume.identity()));
    }
    Ok(subsys.with_namespaces(list)?)
}

fn subsystem(config: &DeviceConfig, attached: &[Attached]) -> Result<SubsystemInfo, ServeError> {
    let first = attached.first().map(|one| one.volume.identity());
    let identity = first.unwrap_or(Identity::from_uuid(config.uuid.unwrap_or_default()));
    let own = String::from_utf8_lossy(&identity.serial);
    let serial = if config.serial.is_empty() { own.trim_end() } else { &config.serial };
    let bad_serial = || ServeError::Serial(serial.to_owned());
    let uuid: String =
        config.uuid.unwrap_or(identity.uuid).iter().map(|byte| format!("{byte:02x}")).collect();
    let nqn = format!("nqn.2024-01.io.penstock:device:{uuid}");
    let smallest = attached.iter().map(|one| one.volume.geometry().io_bytes_max).min();
    let limits = Limits {
        queue_entries_max: config.queue_entries_max,
        io_queues_max: config.queues,
        mdts_bytes: smallest
            .unwrap_or(TRANSFER_BYTES_MAX)
            .clamp(TRANSFER_BYTES_MIN, TRANSFER_BYTES_MAX),
        namespaces_max: NAMESPACES_MAX,
        transport: Transport::Pcie,
        ..Limits::default()
    };
    let other = |error: String| ServeError::Start(io::Error::other(error));
    let subsys = SubsystemInfo::new(
        Nqn::new(&nqn).map_err(|error| other(error.to_string()))?,
        AsciiField::new(serial).map_err(|_| bad_serial())?,
        AsciiField::new("Penstock").map_err(|error| other(error.to_string()))?,
        AsciiField::new(env!("CARGO_PKG_VERSION")).map_err(|error| other(error.to_string()))?,
        Vec::new(),
        limits,
    )
    .map_err(AttachError::from)?;
    Ok(namespaces(&subsys, attached)?)
}

/// The files in which a device's queues are, for a successor of this process.
#[derive(Debug)]
pub struct Files {
    /// The doorbells.
    pub doorbells: OwnedFd,
    /// Queues, commands in flight and the controller.
    pub queues: OwnedFd,
}

/// Builds a device on its cores, without a transport. With `files` of a predecessor it goes on as
/// that device, as soon as it is given the memory of its guest.
///
/// # Errors
/// See [`ServeError`].
pub fn build(
    config: &DeviceConfig,
    volumes: Vec<(u32, Arc<dyn Volume>)>,
    cores: &[CoreHandle],
    files: Option<Files>,
) -> Result<(Device, Waker), ServeError> {
    if !(1..=IO_QUEUES_MAX).contains(&config.queues) {
        return Err(ServeError::Queues(config.queues));
    }
    if !(2..=record::ENTRIES_MAX).contains(&config.queue_entries_max) {
        return Err(ServeError::QueueEntries(config.queue_entries_max));
    }
    if cores.is_empty() {
        return Err(ServeError::NoCores);
    }
    let attached: Vec<Attached> =
        volumes.into_iter().map(|(nsid, volume)| Attached { nsid, volume }).collect();
    let subsys = subsystem(config, &attached)?;
    let record = match files {
        None => Record::new(),
        Some(files) => Record::open(files.doorbells, files.queues),
    }
    .map_err(ServeError::Start)?;
    let waker = Waker::new().map_err(ServeError::Start)?;
    let vectors = Arc::new(msix::Vectors::default());
    let (event_sender, events) = mpsc::channel();
    let mut parts = Vec::with_capacity(cores.len());
    for (core, handle) in cores.iter().enumerate() {
        let (commands, receiver) = reactor::channel(handle, COMMANDS);
        let events = Events { core, sender: event_sender.clone(), waker: waker.clone() };
        let (record, vectors) = (record.clone(), Arc::clone(&vectors));
        let (grace, doorbells) = (config.drain_grace, config.doorbells);
        let subsys = Arc::new(subsys.restricted(|_| false));
        let start = move |spawner: &mut reactor::Spawner<'_>| {
            let mut engine = engine::Engine::new(
                GuestMemory::default().view(),
                record.view(),
                subsys,
                msix::Interrupts::new(vectors),
            );
            engine.set_pool(spawner.local().pool().clone());
            spawner.spawn(Box::new(CoreTask {
                local: spawner.local().clone(),
                commands: receiver,
                events,
                grace,
                engine,
                doorbells,
                admin: (core == 0).then(|| record.view()),
                running: Running::default(),
            }));
        };
        handle.post(Box::new(start)).map_err(|_| ServeError::Core(core))?;
        parts.push((handle.clone(), commands));
    }
    let device = Device::new(device::Parts {
        name: config.name.clone(),
        subsys,
        attached,
        record,
        vectors,
        doorbells: config.doorbells,
        cores: parts,
        events,
    });
    Ok((device, waker))
}

/// A device that is served. Dropping it stops it, without waiting.
pub struct DeviceHandle {
    requests: mpsc::Sender<Request<Device>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    record: Record,
}

/// What a supervisor keeps for a device whose process may be killed at any time.
pub struct Kept {
    /// The listening socket, in place of one at [`DeviceConfig::socket`].
    pub listener: Listener,
    /// The client's connection.
    pub journal: Journal,
    /// Doorbells and queues; `None`: the device begins, and [`DeviceHandle::files`] are to be kept.
    pub files: Option<Files>,
}

/// Serve volumes as the namespaces of an NVMe controller on the given cores. Returns when the
/// socket is listened on.
///
/// # Errors
/// See [`ServeError`].
pub fn serve(
    config: DeviceConfig,
    volumes: Vec<(u32, Arc<dyn Volume>)>,
    cores: &[CoreHandle],
) -> Result<DeviceHandle, ServeError> {
    let listener = Listener::new(&config.socket, config.socket_mode)?;
    serve_on(listener, config, volumes, cores)
}

/// [`serve`] on a socket that is listened on already: by a process that may not make one any more.
///
/// # Errors
/// See [`ServeError`].
pub fn serve_on(
    listener: Listener,
    config: DeviceConfig,
    volumes: Vec<(u32, Arc<dyn Volume>)>,
    cores: &[CoreHandle],
) -> Result<DeviceHandle, ServeError> {
    let (device, waker) = build(&config, volumes, cores, None)?;
    start(config, device, waker, listener, None)
}

/// [`serve`] under a supervisor. With the files of a predecessor the device goes on as that one, and
/// its client does not notice more than a pause.
///
/// # Errors
/// See [`ServeError`].
pub fn serve_kept(
    config: DeviceConfig,
    volumes: Vec<(u32, Arc<dyn Volume>)>,
    cores: &[CoreHandle],
    kept: Kept,
) -> Result<DeviceHandle, ServeError> {
    let Kept { listener, journal, files } = kept;
    let (device, waker) = build(&config, volumes, cores, files)?;
    start(config, device, waker, listener, Some(journal))
}

fn start(
    config: DeviceConfig,
    device: Device,
    waker: Waker,
    listener: Listener,
    journal: Option<Journal>,
) -> Result<DeviceHandle, ServeError> {
    let record = device.record().clone();
    let (requests, receiver) = mpsc::channel();
    let (name, server_waker) = (config.name, waker.clone());
    let thread = thread::Builder::new()
        .name(format!("nvme {}", name.replace('\0', "")))
        .spawn(move || {
            let device = Server::new(name, device, listener, server_waker, receiver, journal).run();
            // Its cores are told to go.
            drop(device);
        })
        .map_err(ServeError::Start)?;
    Ok(DeviceHandle { requests, waker, thread: Some(thread), record })
}

impl DeviceHandle {
    /// What the device is doing. Waits for its cores, so not for a core's thread.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub fn state(&self) -> Result<DeviceState, NoAnswer> {
        let (sender, receiver) = mpsc::channel();
        self.ask(move |device, client| device.ask_state(client, sender)).ok_or(NoAnswer)?;
        receiver.recv_timeout(STATE_TIMEOUT).map_err(|_| NoAnswer)
    }

    /// Makes a volume a namespace of the running device. The guest is told.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(&self, nsid: u32, volume: Arc<dyn Volume>) -> Result<(), AttachError> {
        self.change(move |device| device.attach_namespace(nsid, volume))
    }

    /// Takes a namespace away from the running device. The guest is told. What is in flight completes
    /// as its volume has it, or, where that only waits, as a command to a namespace that is not there.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn detach(&self, nsid: u32) -> Result<(), AttachError> {
        self.change(move |device| device.detach_namespace(nsid))
    }

    /// Looks at the volumes again: one that has grown is told to the guest.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn refresh(&self) -> Result<(), AttachError> {
        self.change(Device::refresh)
    }

    /// Asks the client to unplug the device. Whether it listens to that.
    pub fn unplug(&self) -> bool {
        let (sender, receiver) = mpsc::channel();
        self.request(Request::Unplug(sender)).is_some()
            && receiver.recv_timeout(STATE_TIMEOUT).unwrap_or(false)
    }

    /// The files that a successor goes on from: doorbells, and queues.
    pub fn files(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.record.doorbells(), self.record.queues())
    }

    /// Disconnects the client, lets I/O in flight finish or aborts it, removes the socket. Returns
    /// when all of that is done; so not for a core's thread.
    pub fn stop(mut self) {
        self.request(Request::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    /// Ends without a word to the client, for a successor to go on. Commands that are not completed
    /// stay in the record.
    pub fn leave(mut self) {
        self.request(Request::Leave);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Device) -> Result<(), AttachError> + Send + 'static,
    ) -> Result<(), AttachError> {
        let (sender, receiver) = mpsc::channel();
        self.ask(move |device, _| match change(device) {
            Ok(()) => device.tell_when_done(sender),
            Err(error) => {
                let _ = sender.send(Err(error));
            }
        })
        .ok_or(AttachError::NoAnswer)?;
        receiver.recv_timeout(STATE_TIMEOUT).unwrap_or(Err(AttachError::NoAnswer))
    }

    fn ask(&self, ask: impl FnOnce(&mut Device, ClientState) + Send + 'static) -> Option<()> {
        self.request(Request::Ask(Box::new(ask)))
    }

    fn request(&self, request: Request<Device>) -> Option<()> {
        self.requests.send(request).ok()?;
        self.waker.wake();
        Some(())
    }
}

impl Drop for DeviceHandle {
    fn drop(&mut self) {
        self.request(Request::Stop);
    }
}

impl fmt::Debug for DeviceHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceHandle").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
