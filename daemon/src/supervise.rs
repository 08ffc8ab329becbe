//! A small process that outlives the emulator: it keeps what cannot be made again, and starts the
//! next one.
//!
//! ```text
//!  supervisor                                    worker: the emulator
//!  ──────────                                    ────────────────────
//!  listening sockets ─────── at its start ──────►  serves them
//!  files by device and key ─ at its start ──────►  goes on where its predecessor was
//!                    ◄─────── KEEP, RELEASE ─────  clients' sockets, guests' memory, queues
//!  waits for its end ◄─────── READY ─────────────
//! ```
//!
//! A worker that dies, or is replaced by a newer program (SIGHUP), loses nothing: clients stay
//! connected or come again to a socket that is still there. The supervisor looks into no file and
//! reads nothing of a guest's; what a worker tells it are messages of 16 bytes with at most one file.
//! It is not contained and stays the user that it was, because it starts programs; the worker is, and
//! becomes the user it is told to be, and ends with it.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nvme_pci::vfio_user::journal::FdKeeper;
use reactor::unix::Listener;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::devices;
use crate::user::User;

/// Length of a message: kind (4), device (4), key (8), little-endian.
const MESSAGE_BYTES: usize = 16;
/// Files of one device: a map of its guest's memory has one, and so has an interrupt.
const FILES_MAX: usize = 4096;
/// First pause before a worker that ended by itself is started again; doubles each time.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A worker that has lived for so long did not end because of how it was started.
const LIVED: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// To the worker, with a file: the listening socket of a device.
    Listener,
    /// To the worker, with a file: what a predecessor had kept.
    File,
    /// To the worker: that is all.
    Go,
    /// From the worker, with a file.
    Keep,
    /// From the worker.
    Release,
    /// From the worker: it has started.
    Ready,
}

const KINDS: [Kind; 6] =
    [Kind::Listener, Kind::File, Kind::Go, Kind::Keep, Kind::Release, Kind::Ready];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    kind: Kind,
    device: u32,
    key: u64,
}

impl Message {
    fn encode(self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..4].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.device.to_le_bytes());
        bytes[8..].copy_from_slice(&self.key.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, rest) = bytes.split_first_chunk::<4>()?;
        let (device, key) = rest.split_first_chunk::<4>()?;
        Some(Message {
            kind: *KINDS.get(u32::from_le_bytes(*kind) as usize)?,
            device: u32::from_le_bytes(*device),
            key: u64::from_le_bytes(key.try_into().ok()?),
        })
    }
}

fn send(link: BorrowedFd<'_>, message: Message, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = message.encode();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: &[BorrowedFd<'_>] = match &file {
        Some(file) => std::slice::from_ref(file),
        None => &[],
    };
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    loop {
        let slices = [IoSlice::new(&bytes)];
        match rustix::net::sendmsg(link, &slices, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The next message; `None`: the other side is gone. A message that makes no sense is an error.
fn receive(link: BorrowedFd<'_>) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(link, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => files.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let file = files.next();
    if received.bytes == 0 {
        return Ok(None);
    }
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "a message that makes no sense");
    if received.bytes != MESSAGE_BYTES
        || received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(odd());
    }
    Ok(Some((Message::decode(&bytes).ok_or_else(odd)?, file)))
}

/// What a worker is given at its start.
pub struct Inherited {
    link: Arc<OwnedFd>,
    /// By device, in the order of the configuration.
    pub(crate) devices: Vec<Legacy>,
}

/// What there is of one device.
pub(crate) struct Legacy {
    pub(crate) listener: Listener,
    pub(crate) keeper: Keeper,
    /// What a predecessor had kept, by key.
    pub(crate) files: BTreeMap<u64, OwnedFd>,
}

impl Inherited {
    /// Takes what the supervisor gives, over the socket that is this process's standard input.
    pub fn receive() -> anyhow::Result<Inherited> {
        let link = io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
        let mut listeners = BTreeMap::new();
        let mut files: BTreeMap<u32, BTreeMap<u64, OwnedFd>> = BTreeMap::new();
        loop {
            let received = receive(link.as_fd()).context("what the supervisor gives")?;
            match received.context("the supervisor is gone")? {
                (Message { kind: Kind::Listener, device, .. }, Some(file)) => {
                    listeners.insert(device, Listener::adopt(file)?);
                }
                (Message { kind: Kind::File, device, key }, Some(file)) => {
                    files.entry(device).or_default().insert(key, file);
                }
                (Message { kind: Kind::Go, .. }, None) => break,
                (message, _) => bail!("the supervisor says {message:?}"),
            }
        }
        let link = Arc::new(link);
        let devices = listeners.into_iter().map(|(device, listener)| Legacy {
            listener,
            keeper: Keeper { link: link.clone(), device },
            files: files.remove(&device).unwrap_or_default(),
        });
        Ok(Inherited { devices: devices.collect(), link })
    }

    /// The other end, once everything is taken over.
    pub fn link(&self) -> Link {
        Link(self.link.clone())
    }
}

/// Has files of one device kept.
#[derive(Clone)]
pub(crate) struct Keeper {
    link: Arc<OwnedFd>,
    device: u32,
}

impl FdKeeper for Keeper {
    fn keep(&mut self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        send(self.link.as_fd(), Message { kind: Kind::Keep, device: self.device, key }, Some(fd))
    }

    fn release(&mut self, key: u64) {
        let message = Message { kind: Kind::Release, device: self.device, key };
        // Without a supervisor there is nothing to let go of.
        let _ = send(self.link.as_fd(), message, None);
    }
}

/// A worker's way to its supervisor.
#[derive(Clone)]
pub struct Link(Arc<OwnedFd>);

impl Link {
    /// Says that the start has succeeded.
    pub fn ready(&self) -> io::Result<()> {
        send(self.0.as_fd(), Message { kind: Kind::Ready, device: 0, key: 0 }, None)
    }

    /// Waits for the supervisor's end: nobody would start a successor any more.
    pub async fn ended(&self) {
        let Ok(socket) = self.0.try_clone().and_then(watched) else {
            return std::future::pending().await;
        };
        // It sends nothing after the start, so that there is something to read only at its end.
        if socket.readable().await.is_err() {
            std::future::pending().await
        }
    }
}

/// Keeps the sockets of the devices of `config`, and has a worker serve them: `worker`, which is this
/// program told to be one. Returns the worker's exit code when it ended in order.
pub async fn run(config: &Config, worker: impl Fn() -> Command) -> anyhow::Result<u8> {
    let listeners = config.devices.iter().map(devices::listen_for);
    let mut store = Store {
        listeners: listeners.collect::<anyhow::Result<_>>()?,
        files: BTreeMap::new(),
        files_max: FILES_MAX,
        is_ready: false,
    };
    if let Some(user) = config.user.as_deref().map(User::find).transpose()? {
        for device in &config.devices {
            user.own(&device.socket)?;
        }
    }
    raise_files_limit();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut replace = signal(SignalKind::hangup())?;
    let (mut is_stopping, mut was_ready, mut pause) = (false, false, PAUSE);
    loop {
        let born = Instant::now();
        store.is_ready = false;
        let Running { mut child, link, end } = store.start(worker())?;
        let pid = Pid::from_child(&child);
        let (mut is_replaced, mut is_open) = (false, true);
        loop {
            let sent = tokio::select! {
                biased;
                message = link.readable(), if is_open => {
                    let mut message = message?;
                    match store.take_all(link.get_ref().as_fd()) {
                        // A socket that is closed stays readable; it is not looked at again.
                        Ok(open) => is_open = open,
                        // Its end is seen by the descriptor of the process.
                        Err(error) => {
                            tracing::error!(%error, "the worker speaks out of turn; it is ended");
                            rustix::process::kill_process(pid, Signal::KILL)?;
                            break;
                        }
                    }
                    message.clear_ready();
                    continue;
                }
                _ = end.readable() => break,
                _ = terminate.recv() => Signal::TERM,
                _ = interrupt.recv() => Signal::INT,
                _ = replace.recv() => Signal::KILL,
            };
            match sent {
                Signal::KILL => {
                    tracing::info!("replacing the worker");
                    is_replaced = true;
                    rustix::process::kill_process(pid, Signal::KILL)?;
                }
                Signal::INT if is_stopping => rustix::process::kill_process(pid, Signal::KILL)?,
                _ => {
                    is_stopping = true;
                    rustix::process::kill_process(pid, Signal::TERM)?;
                }
            }
        }
        let status = child.wait()?;
        // What it has kept at last is part of what its successor needs.
        store.take_all(link.get_ref().as_fd())?;
        was_ready |= store.is_ready;
        if is_stopping || !was_ready || status.success() {
            return Ok(exit_code(status));
        }
        if is_replaced || born.elapsed() >= LIVED {
            pause = PAUSE;
        }
        tracing::error!(%status, pause_ms = pause.as_millis() as u64, "the worker ended; starting it again");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = terminate.recv() => return Ok(0),
            _ = interrupt.recv() => return Ok(0),
        }
        if !is_replaced {
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

#[expect(deprecated, reason = "sound for an owned descriptor; what replaces it is unsafe code")]
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// It holds files for all devices. What the limit is the kernel says when it is reached.
fn raise_files_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit on open files stays");
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// What is kept.
struct Store {
    listeners: Vec<Listener>,
    files: BTreeMap<(u32, u64), OwnedFd>,
    /// Most of one device.
    files_max: usize,
    is_ready: bool,
}

struct Running {
    child: Child,
    link: AsyncFd<OwnedFd>,
    /// Readable when the process has ended.
    end: AsyncFd<OwnedFd>,
}

impl Store {
    fn start(&self, mut command: Command) -> anyhow::Result<Running> {
        let flags = SocketFlags::CLOEXEC;
        let (link, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // A signal from a terminal is for the supervisor, which tells the worker.
        command.process_group(0);
        let child = command.stdin(theirs).spawn().context("starting the worker")?;
        // Its end of the socket is with it alone, so that its end is seen.
        drop(command);
        for (device, listener) in (0..).zip(&self.listeners) {
            let message = Message { kind: Kind::Listener, device, key: 0 };
            send(link.as_fd(), message, Some(listener.as_fd()))?;
        }
        for ((device, key), file) in &self.files {
            let message = Message { kind: Kind::File, device: *device, key: *key };
            send(link.as_fd(), message, Some(file.as_fd()))?;
        }
        send(link.as_fd(), Message { kind: Kind::Go, device: 0, key: 0 }, None)?;
        rustix::io::ioctl_fionbio(&link, true)?;
        let end = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::NONBLOCK)?;
        Ok(Running { child, link: watched(link)?, end: watched(end)? })
    }

    /// Takes what the worker has sent. `false`: it will send nothing more.
    fn take_all(&mut self, link: BorrowedFd<'_>) -> anyhow::Result<bool> {
        loop {
            match receive(link) {
                Ok(Some((message, file))) => self.take(message, file)?,
                Ok(None) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take(&mut self, message: Message, file: Option<OwnedFd>) -> anyhow::Result<()> {
        let Message { kind, device, key } = message;
        match (kind, file) {
            (Kind::Keep, Some(file)) => {
                ensure!((device as usize) < self.listeners.len(), "device {device}");
                let count = self.files.range((device, 0)..=(device, u64::MAX)).count();
                let max = self.files_max;
                ensure!(count < max, "more than {max} files of device {device}");
                self.files.insert((device, key), file);
            }
            (Kind::Release, None) => {
                self.files.remove(&(device, key));
            }
            (Kind::Ready, None) => self.is_ready = true,
            (kind, file) => bail!("{kind:?} with {} file", if file.is_some() { "a" } else { "no" }),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn store(dir: &std::path::Path) -> Store {
        let listener = Listener::new(&dir.join("a.sock"), 0o600).unwrap();
        Store { listeners: vec![listener], files: BTreeMap::new(), files_max: 4, is_ready: false }
    }

    #[test]
    fn messages_are_what_they_were() {
        for kind in KINDS {
            let message = Message { kind, device: 7, key: u64::MAX - 2 };
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(&[0; 15]), None);
        let mut unknown = [0; MESSAGE_BYTES];
        unknown[0] = 6;
        assert_eq!(Message::decode(&unknown), None);
    }

    #[test]
    fn files_are_kept_until_they_are_released() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = store(dir.path());
        let (ours, theirs) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"queues").unwrap();
        let keep = Message { kind: Kind::Keep, device: 0, key: 9 };
        send(theirs.as_fd(), keep, Some(file.as_fd())).unwrap();
        send(theirs.as_fd(), Message { kind: Kind::Ready, ..keep }, None).unwrap();
        drop((file, theirs));
        // The worker is gone; what it sent is not.
        assert!(!store.take_all(ours.as_fd()).unwrap());
        assert!(store.is_ready);
        let mut kept = std::fs::File::from(store.files.remove(&(0, 9)).unwrap());
        kept.rewind().unwrap();
        let mut text = String::new();
        kept.read_to_string(&mut text).unwrap();
        assert_eq!(text, "queues");

        let (ours, theirs) = pair();
        send(theirs.as_fd(), keep, Some(kept.as_fd())).unwrap();
        send(theirs.as_fd(), Message { kind: Kind::Release, ..keep }, None).unwrap();
        assert!(store.take_all(ours.as_fd()).unwrap());
        assert!(store.files.is_empty());
    }

    #[test]
    fn a_worker_that_speaks_out_of_turn_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = store(dir.path());
        let odd = |store: &mut Store, message, with: bool| {
            let (ours, theirs) = pair();
            send(theirs.as_fd(), message, with.then(|| theirs.as_fd())).unwrap();
            store.take_all(ours.as_fd()).unwrap_err().to_string()
        };
        let keep = Message { kind: Kind::Keep, device: 0, key: 1 };
        assert!(odd(&mut store, keep, false).contains("Keep with no file"));
        assert!(odd(&mut store, Message { device: 1, ..keep }, true).contains("device 1"));
        assert!(odd(&mut store, Message { kind: Kind::Go, ..keep }, false).contains("Go"));
        let (ours, theirs) = pair();
        rustix::net::send(&theirs, &[1, 2, 3], SendFlags::NOSIGNAL).unwrap();
        assert!(store.take_all(ours.as_fd()).is_err());
        store.files_max = 2;
        for key in 0..2 {
            store.take(Message { key, ..keep }, Some(ours.try_clone().unwrap())).unwrap();
        }
        let error = store.take(Message { key: 2, ..keep }, Some(ours)).unwrap_err().to_string();
        assert!(error.contains("more than 2 files"), "{error}");
    }
}
