//! A virtio-blk device over vhost-user, in front of any [`block::Volume`].
//!
//! ```text
//!  frontend (QEMU, libblkio)                control thread                 cores
//!  ──────── Unix socket ───────► vhost_user::{wire, session, server} ──► worker::CoreTask
//!           guest memory ◄──────────────────────────────────────────────► engine::Engine
//!           kick eventfd ────────────── reactor::Port ──────────────────►   queue::{split, packed}
//!           call eventfd ◄───────────────────────────────────────────────   request
//!                                                          block::Channel ◄─┘
//! ```
//!
//! [`serve`] starts a control thread that listens on a Unix socket and one reactor task on each
//! core. Queues are placed on the cores round robin; from then on a queue, its channel to the
//! volume and its eventfds belong to that core. A request is copied out of the ring once, checked,
//! and becomes a [`block::Io`] whose data is the guest's memory itself. On the way of an I/O there
//! is no allocation, no lock and no system call but the notification of the driver, once per
//! batch.
//!
//! `device`, `request`, `queue` and `engine` know no socket, no file descriptor and no reactor.
//!
//! # Hostile peers
//!
//! The guest controls rings and buffers, the frontend controls the socket. Neither can make the
//! device panic, touch memory outside the shared regions, grow without bound or stop serving
//! others. A request that cannot be understood fails with a status byte if there is one; a ring
//! that breaks the rules stops until its driver resets it. A frontend that breaks the protocol is
//! disconnected, and the next one is served.
//!
//! One thing is trusted: the eventfds of a frontend are made non-blocking when they arrive. A
//! frontend that undoes that and also fills their counters can hold up the core of its queues, so
//! who may open the socket is who may use the host's CPU ([`DeviceConfig::socket_mode`]).
//!
//! # What it needs at run time
//!
//! Files are opened when [`serve`] is called: the socket is made there. Afterwards the control
//! thread accepts, sends and receives messages with file descriptors, asks these descriptors what
//! they are (`fstat`, `fstatfs`, `fcntl`, `readlink` below /proc/self/fd, where a missing /proc is
//! lived with), maps them, and makes memory for the record of requests in flight (`memfd_create`,
//! `ftruncate`, seals). The first region that is mapped sets a handler for SIGBUS. At the end the
//! socket's file is removed, if that is still possible.
//!
//! # Replaced while a driver runs
//!
//! A frontend may lend memory in which requests in flight are recorded ([`queue::inflight`]). A
//! device that is killed, or stopped while its path to storage is lost, is then replaced without an
//! error: the next one finds what was taken and not answered, and does it again. The driver gets
//! each request back once; the volume may see a write twice, before the driver has it back.
//!
//! # Migrated while a driver runs
//!
//! Between two machines a frontend has pages marked that the device writes, stops the rings when
//! the rest is copied, and goes on at the other machine with the same volume. A page is marked after
//! it is written and before the driver can know.
//!
//! # What this crate does not do
//!
//! No virtual IOMMU, no in-band notifications, no postcopy migration. Little-endian machines only.
//!
//! Start reading at `engine`, then `vhost_user::session`.

// The tests bring an allocator that counts.
#![cfg_attr(not(test), forbid(unsafe_code))]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io, thread};

use block::Volume;
use reactor::CoreHandle;
use reactor::unix::{Listener, Waker};

pub mod device;
pub mod engine;
pub mod queue;
pub mod request;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vhost_user;
mod worker;

pub use device::Features;
pub use engine::Counters;
pub use queue::{Broken, QUEUE_SIZE_MAX};
pub use vhost_user::ListenError;

use vhost_user::server::{Parts, Request, Server};
use worker::{CoreTask, Events, Running};

/// Most queues of one device. A ring's number has 8 bits in vhost-user.
pub const QUEUES_MAX: u16 = 256;
/// How long [`DeviceHandle::state`] waits for the cores.
const STATE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a device is and where it is found.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Name for logs.
    pub name: String,
    /// Path of the Unix socket.
    pub socket: PathBuf,
    /// Permission bits of the socket file. Whoever may write to it may use the device.
    pub socket_mode: u32,
    /// Number of queues, up to [`QUEUES_MAX`].
    pub queues: u16,
    /// Largest queue size: a power of two up to [`QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
    /// What the guest reads as the disk's serial: up to 20 ASCII characters. Empty: the volume's.
    pub serial: String,
    /// Refuse everything that changes the volume.
    pub read_only: bool,
    /// When a queue stops: how long its requests may take to come back by themselves. Then those
    /// that can be are aborted, so that a lost path to storage does not hang the frontend: they stay
    /// in the frontend's record of requests in flight for when the queue starts again, and fail where
    /// there is none.
    pub drain_grace: Duration,
}

impl DeviceConfig {
    /// A device of one queue of up to 256 entries, with a socket for owner and group.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>) -> DeviceConfig {
        DeviceConfig {
            name: name.into(),
            socket: socket.into(),
            socket_mode: 0o660,
            queues: 1,
            queue_size_max: 256,
            serial: String::new(),
            read_only: false,
            drain_grace: Duration::from_secs(2),
        }
    }

    fn check(&self) -> Result<(), ServeError> {
        if !(1..=QUEUES_MAX).contains(&self.queues) {
            return Err(ServeError::Queues(self.queues));
        }
        if !self.queue_size_max.is_power_of_two() || self.queue_size_max > QUEUE_SIZE_MAX {
            return Err(ServeError::QueueSize(self.queue_size_max));
        }
        let is_printable = self.serial.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        if self.serial.len() > device::ID_BYTES || !is_printable {
            return Err(ServeError::Serial(self.serial.clone()));
        }
        if self.socket_mode > 0o777 {
            return Err(ServeError::SocketMode(self.socket_mode));
        }
        Ok(())
    }
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Bad number of queues.
    #[error("{0} queues: 1 to {QUEUES_MAX} are possible")]
    Queues(u16),
    /// Bad queue size.
    #[error("queue size {0}: a power of two up to {QUEUE_SIZE_MAX} is possible")]
    QueueSize(u16),
    /// Bad serial.
    #[error("serial {0:?}: up to 20 printable ASCII characters are possible")]
    Serial(String),
    /// Bad permission bits.
    #[error("socket mode {0:o}: permission bits up to 777 are possible")]
    SocketMode(u32),
    /// Nothing to run on.
    #[error("a device needs a core")]
    NoCores,
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A core's mailbox is full or closed.
    #[error("core {0} does not take the device")]
    Core(usize),
    /// No more file descriptors or threads.
    #[error("cannot start the device's control thread")]
    Start(#[source] io::Error),
}

/// What one queue is doing and has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Its number.
    pub index: u16,
    /// Position of its core in the list given to [`serve`].
    pub core: usize,
    /// A frontend has started it.
    pub is_running: bool,
    /// And lets it take requests.
    pub is_enabled: bool,
    /// It stops as soon as its requests are back.
    pub is_stopping: bool,
    /// Number of descriptors, 0 when not running.
    pub size: u16,
    /// Requests taken and not answered.
    pub in_flight: usize,
    /// Why it waits for a reset, if so.
    pub broken: Option<Broken>,
    /// Since the device was started, over all clients.
    pub counters: Counters,
}

/// What a device is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// A frontend is connected.
    pub client_connected: bool,
    /// Features negotiated with its driver.
    pub features: Option<Features>,
    /// All queues, by number. Those of a core that has stopped are missing.
    pub queues: Vec<QueueState>,
}

/// The device does not answer: it has stopped, or its cores have not run for two seconds.
#[derive(Debug, thiserror::Error)]
#[error("the device does not answer")]
pub struct NoAnswer;

/// A device that is served. Dropping it stops it, without waiting.
pub struct DeviceHandle {
    requests: mpsc::Sender<Request>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

/// Serve `volume` as a virtio-blk device on the given cores. Returns when the socket is listened
/// on.
pub fn serve(
    config: DeviceConfig,
    volume: Arc<dyn Volume>,
    cores: Vec<CoreHandle>,
) -> Result<DeviceHandle, ServeError> {
    config.check()?;
    let listener = Listener::new(&config.socket, config.socket_mode)?;
    serve_on(listener, config, volume, cores)
}

/// Serve `volume` on a socket that is listened on already: by a process that may not make one any
/// more. The socket's path and mode in `config` are not looked at.
pub fn serve_on(
    listener: Listener,
    config: DeviceConfig,
    volume: Arc<dyn Volume>,
    cores: Vec<CoreHandle>,
) -> Result<DeviceHandle, ServeError> {
    config.check()?;
    if cores.is_empty() {
        return Err(ServeError::NoCores);
    }
    let waker = Waker::new().map_err(ServeError::Start)?;
    let (event_sender, events) = mpsc::channel();
    let (requests, request_receiver) = mpsc::channel();

    let mut senders = Vec::with_capacity(cores.len());
    for (core, handle) in cores.iter().enumerate() {
        let queues: Vec<(u16, Counters)> = (0..config.queues)
            .filter(|index| usize::from(*index) % cores.len() == core)
            .map(|index| (index, Counters::default()))
            .collect();
        // One message of a client at a time, with a command or two for each queue; then a new size
        // of the volume, a reset, a snapshot and the end.
        let bound = 2 * queues.len() + 8;
        let (commands, receiver) = reactor::channel(handle, bound);
        let events = Events { core, sender: event_sender.clone(), waker: waker.clone() };
        let (volume, grace) = (Arc::clone(&volume), config.drain_grace);
        let start = move |spawner: &mut reactor::Spawner<'_>| {
            spawner.spawn(Box::new(CoreTask {
                local: spawner.local().clone(),
                volume,
                commands: receiver,
                events,
                grace,
                past: queues,
                running: Running::default(),
            }));
        };
        handle.post(Box::new(start)).map_err(|_| ServeError::Core(core))?;
        senders.push(commands);
    }

    let name = config.name.clone();
    let server = Server::new(Parts {
        config,
        volume,
        listener,
        waker: waker.clone(),
        requests: request_receiver,
        events,
        cores: senders,
    });
    let thread = thread::Builder::new()
        .name(format!("vblk {}", name.replace('\0', "")))
        .spawn(move || server.run())
        .map_err(ServeError::Start)?;
    Ok(DeviceHandle { requests, waker, thread: Some(thread) })
}

impl DeviceHandle {
    /// What the device is doing. Waits for its cores, so not for a core's thread.
    pub fn state(&self) -> Result<DeviceState, NoAnswer> {
        let (sender, receiver) = mpsc::channel();
        self.request(Request::State(sender)).ok_or(NoAnswer)?;
        receiver.recv_timeout(STATE_TIMEOUT).map_err(|_| NoAnswer)
    }

    /// The volume has changed its size, or may have: look at it now. It is looked at anyway, twice a
    /// second while a client is there. A driver that is running is told by an interrupt.
    pub fn volume_changed(&self) {
        self.request(Request::Look);
    }

    /// Disconnect the client, let requests in flight finish or abort them, remove the socket.
    /// Returns when all of that is done; so not for a core's thread.
    pub fn stop(mut self) {
        self.request(Request::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    fn request(&self, request: Request) -> Option<()> {
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
