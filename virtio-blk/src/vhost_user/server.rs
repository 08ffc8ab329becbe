//! The control thread of a device: listens, talks to one client at a time, and has the cores do
//! what its session decides.
//!
//! ```text
//!   socket ──► Connection ──► Session ──► Action ──► reactor::Sender ──► CoreTask (one per core)
//!   socket ◄── reply ◄── on_done ◄── all events are in ◄── eventfd ◄──── Event
//! ```
//!
//! One `poll` waits for everything: the listening socket, the client, and an eventfd for events of
//! the cores and requests of the owner. Nothing here blocks and nothing is retried in a loop, so a
//! client can neither hang the thread nor make it spin.
//!
//! The next client is accepted when all requests of the last one have come back. An I/O that
//! outlived its client could otherwise overwrite what the next one has written.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use block::Volume;
use reactor::unix::{Listener, Waker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{info, warn};

use super::session::{Action, Refusal, Session, Step};
use super::socket::{Connection, ConnectionError, Received};
use super::wire;
use crate::device::{Device, DeviceOptions};
use crate::worker::{Command, Event};
use crate::{DeviceConfig, DeviceState, QueueState};

/// Messages taken from the client before looking at anything else.
const MESSAGES_PER_TURN: usize = 32;
/// Pause after a connection could not be accepted, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often the volume is looked at while a client is there.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// Log lines that clients can cause in one [`LOG_PERIOD`].
const LOG_LINES: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// From the device's owner.
pub(crate) enum Request {
    State(mpsc::Sender<DeviceState>),
    /// The volume may have changed.
    Look,
    Stop,
}

struct Client {
    connection: Connection,
    session: Session,
    /// Some core may have something of it.
    has_acted: bool,
    /// For requests of ours.
    backend: Option<Connection>,
}

/// Commands that were sent for one purpose.
struct Outstanding {
    op: u64,
    /// The cores that have to answer, once per command.
    cores: Vec<usize>,
    outcome: Result<Option<u32>, String>,
}

struct Snapshot {
    op: u64,
    cores: Vec<usize>,
    queues: Vec<QueueState>,
}

struct Core {
    commands: reactor::Sender<Command>,
    is_gone: bool,
}

/// What a control thread is made of.
pub(crate) struct Parts {
    pub(crate) config: DeviceConfig,
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) listener: Listener,
    pub(crate) waker: Waker,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) cores: Vec<reactor::Sender<Command>>,
}

pub(crate) struct Server {
    config: DeviceConfig,
    volume: Arc<dyn Volume>,
    device: Arc<Device>,
    listener: Listener,
    waker: Waker,
    requests: mpsc::Receiver<Request>,
    events: mpsc::Receiver<Event>,
    cores: Vec<Core>,
    client: Option<Client>,
    /// What the client's last message is waiting for.
    message: Option<Outstanding>,
    /// The cores are taking back what the last client had.
    reset: Option<Outstanding>,
    /// The cores are told of the volume's new size.
    resize: Option<Outstanding>,
    look_at: Option<Instant>,
    snapshot: Option<Snapshot>,
    askers: VecDeque<mpsc::Sender<DeviceState>>,
    next_op: u64,
    is_stopping: bool,
    accept_after: Option<Instant>,
    log: LogLimit,
    /// Clients that come and go in good order have their own budget.
    log_clients: LogLimit,
}

impl Server {
    pub(crate) fn new(parts: Parts) -> Server {
        let Parts { config, volume, listener, waker, requests, events, cores } = parts;
        let device = Arc::new(describe(&config, &*volume));
        Server {
            config,
            volume,
            device,
            listener,
            waker,
            requests,
            events,
            cores: cores.into_iter().map(|commands| Core { commands, is_gone: false }).collect(),
            client: None,
            message: None,
            reset: None,
            resize: None,
            look_at: None,
            snapshot: None,
            askers: VecDeque::new(),
            next_op: 0,
            is_stopping: false,
            accept_after: None,
            log: LogLimit::default(),
            log_clients: LogLimit::default(),
        }
    }

    /// Until the owner says stop and all cores have let go.
    pub(crate) fn run(mut self) {
        loop {
            while let Ok(event) = self.events.try_recv() {
                self.on_event(event);
            }
            while let Ok(request) = self.requests.try_recv() {
                self.on_request(request);
            }
            self.start_snapshot();
            self.look();
            if self.is_stopping && self.cores.iter().all(|core| core.is_gone) {
                return;
            }
            self.wait();
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|at| *at > now);
        let is_accepting = self.client.is_none()
            && self.reset.is_none()
            && !self.is_stopping
            && self.accept_after.is_none();
        let client_flags = match &self.client {
            // An end of the connection is reported even without a flag.
            Some(client) if client.connection.has_output() => PollFlags::OUT,
            Some(_) if self.message.is_none() => PollFlags::IN,
            _ => PollFlags::empty(),
        };
        let listener_flags = if is_accepting { PollFlags::IN } else { PollFlags::empty() };
        let waker = self.waker.clone();
        let mut fds = vec![
            PollFd::from_borrowed_fd(waker.eventfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), listener_flags),
        ];
        if let Some(client) = &self.client {
            fds.push(PollFd::from_borrowed_fd(client.connection.as_fd(), client_flags));
        }
        let timeout = [self.accept_after, self.look_at].into_iter().flatten().min().map(|at| {
            let left = at.saturating_duration_since(now).min(LOOK_PERIOD);
            Timespec { tv_sec: 0, tv_nsec: left.as_nanos() as i64 }
        });
        if poll(&mut fds, timeout.as_ref()).is_err() {
            // EINTR: look at everything again. There is no other reason with valid arguments.
            return;
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        if !ready[0].is_empty() {
            waker.clear();
        }
        if is_accepting && !ready[1].is_empty() {
            self.accept();
        } else if let Some(flags) = ready.get(2)
            && !flags.is_empty()
        {
            self.serve(*flags);
        }
    }

    /// Whether the volume has another size than the client knows.
    fn look(&mut self) {
        if self.client.is_none() || self.is_stopping || self.resize.is_some() {
            self.look_at = None;
            return;
        }
        let now = Instant::now();
        if self.look_at.is_some_and(|at| at > now) {
            return;
        }
        self.look_at = Some(now + LOOK_PERIOD);
        let options = device_options(&self.config);
        let Some(device) = self.device.resized(&self.volume.geometry(), &options) else {
            if self.log.allows() {
                let device = &self.config.name;
                warn!(%device, "the volume has another block size now: it is not passed on");
            }
            return;
        };
        let device = device.worn(self.volume.wear());
        if device.is_alike(&self.device) {
            return;
        }
        let bytes = device.limits().capacity_bytes;
        info!(device = %self.config.name, bytes, "the volume has changed");
        self.device = Arc::new(device);
        // First the cores, so that no request beyond the old end is refused.
        let op = self.next_op();
        let mut resize = Outstanding { op, cores: Vec::new(), outcome: Ok(None) };
        let limits = *self.device.limits();
        for (index, core) in self.cores.iter().enumerate().filter(|(_, core)| !core.is_gone) {
            if core.commands.send(Command::SetLimits { op, limits }).is_ok() {
                resize.cores.push(index);
            }
        }
        self.resize = Some(resize);
        self.finish_resize();
    }

    /// The cores know: tell the client.
    fn finish_resize(&mut self) {
        if self.resize.take_if(|resize| resize.cores.is_empty()).is_none() {
            return;
        }
        let Some(client) = &mut self.client else { return };
        client.session.set_device(Arc::clone(&self.device));
        let Some(backend) = &mut client.backend else { return };
        // A notice that does not fit into the socket stands there already, many times.
        let is_sent = backend.flush().is_ok()
            && (backend.has_output() || backend.send(&wire::config_change()).is_ok());
        if !is_sent {
            client.backend = None;
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok(None) => {}
            Ok(Some(socket)) => {
                // The volume may have become known, or have another size, since the last client.
                self.device = Arc::new(describe(&self.config, &*self.volume));
                let session = Session::new(Arc::clone(&self.device), self.config.queue_size_max);
                let connection = Connection::new(socket);
                self.client = Some(Client { connection, session, has_acted: false, backend: None });
                if self.log_clients.allows() {
                    info!(device = %self.config.name, "vhost-user client connected");
                }
            }
            Err(error) => {
                self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                if self.log.allows() {
                    warn!(device = %self.config.name, %error, "cannot accept a vhost-user client");
                }
            }
        }
    }

    /// The client's socket is ready for something.
    fn serve(&mut self, flags: PollFlags) {
        let Some(client) = &mut self.client else { return };
        if let Err(error) = client.connection.flush() {
            return self.end_client(Some(&error));
        }
        for _ in 0..MESSAGES_PER_TURN {
            let Some(client) = &mut self.client else { return };
            if self.message.is_some() || client.connection.has_output() {
                break;
            }
            match client.connection.receive() {
                Ok(Received::Empty) => return,
                Ok(Received::Closed) => return self.end_client(None),
                Ok(Received::Message(message)) => match client.session.on_message(message) {
                    Ok(step) => {
                        if let Some(socket) = client.session.take_backend() {
                            client.backend = Some(Connection::new(socket));
                        }
                        self.follow(step);
                    }
                    Err(refusal) => return self.end_client(Some(&refusal)),
                },
                Err(error) => return self.end_client(Some(&error)),
            }
        }
        // It will not take replies, and what it still has to say can have no effect.
        if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.end_client(None);
        }
    }

    fn follow(&mut self, step: Step) {
        let Step { actions, reply, fd } = step;
        let Some(client) = &mut self.client else { return };
        if let Some(reply) = reply
            && let Err(error) = client.connection.send_with(&reply, fd)
        {
            return self.end_client(Some(&error));
        }
        if actions.is_empty() {
            return;
        }
        client.has_acted = true;
        let op = self.next_op();
        let mut outstanding = Outstanding { op, cores: Vec::new(), outcome: Ok(None) };
        for action in actions {
            self.command(action, &mut outstanding);
        }
        self.message = Some(outstanding);
        self.conclude_message();
    }

    /// Send an action to the core of its ring, or to all.
    fn command(&mut self, action: Action, outstanding: &mut Outstanding) {
        match action {
            Action::SetMemory { memory, has_removed } => {
                for core in 0..self.cores.len() {
                    let memory = memory.clone();
                    let action = Action::SetMemory { memory, has_removed };
                    self.command_core(core, action, outstanding);
                }
            }
            Action::SetWriteThrough(on) => {
                for core in 0..self.cores.len() {
                    self.command_core(core, Action::SetWriteThrough(on), outstanding);
                }
            }
            Action::Start(ref start) => {
                let core = self.core_of(start.index);
                self.command_core(core, action, outstanding);
            }
            Action::Stop { index, .. }
            | Action::SetEnabled { index, .. }
            | Action::SetLogging { index, .. }
            | Action::SetKick { index, .. }
            | Action::SetCall { index, .. }
            | Action::SetErr { index, .. } => {
                let core = self.core_of(index);
                self.command_core(core, action, outstanding);
            }
        }
    }

    fn command_core(&mut self, core: usize, action: Action, outstanding: &mut Outstanding) {
        let command = Command::Do { op: outstanding.op, action, limits: *self.device.limits() };
        match self.cores[core].commands.send(command) {
            Ok(()) if !self.cores[core].is_gone => outstanding.cores.push(core),
            _ => outstanding.outcome = Err(format!("core {core} does not take commands")),
        }
    }

    /// Round robin.
    fn core_of(&self, index: u16) -> usize {
        usize::from(index) % self.cores.len()
    }

    fn next_op(&mut self) -> u64 {
        self.next_op += 1;
        self.next_op
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Done { core, op, outcome } => {
                for outstanding in
                    [&mut self.message, &mut self.reset, &mut self.resize].into_iter().flatten()
                {
                    if outstanding.op == op {
                        outstanding.take(core, &outcome);
                    }
                }
            }
            Event::Snapshot { core, op, queues } => {
                if let Some(snapshot) = &mut self.snapshot
                    && snapshot.op == op
                {
                    snapshot.cores.retain(|other| *other != core);
                    snapshot.queues.extend(queues);
                }
            }
            Event::Broken { index, broken } => {
                if self.log.allows() {
                    let device = &self.config.name;
                    warn!(%device, queue = index, reason = %broken, "virtqueue needs a reset");
                }
            }
            Event::Gone { core } => {
                self.cores[core].is_gone = true;
                for outstanding in
                    [&mut self.message, &mut self.reset, &mut self.resize].into_iter().flatten()
                {
                    outstanding.lose(core);
                }
                if let Some(snapshot) = &mut self.snapshot {
                    snapshot.cores.retain(|other| *other != core);
                }
            }
        }
        self.conclude_message();
        self.finish_resize();
        self.reset.take_if(|reset| reset.cores.is_empty());
        self.finish_snapshot();
    }

    /// Answer the client's message when everything for it is done.
    fn conclude_message(&mut self) {
        if self.message.as_ref().is_none_or(|message| !message.cores.is_empty()) {
            return;
        }
        let Some(Outstanding { outcome, .. }) = self.message.take() else { return };
        if let Err(reason) = &outcome
            && self.log.allows()
        {
            warn!(device = %self.config.name, %reason, "cannot do what the frontend asks for");
        }
        let Some(client) = &mut self.client else { return };
        match client.session.on_done(outcome) {
            Ok(None) => {}
            Ok(Some(reply)) => {
                if let Err(error) = client.connection.send(&reply) {
                    self.end_client(Some(&error));
                }
            }
            Err(refusal) => self.end_client(Some(&refusal)),
        }
    }

    fn end_client(&mut self, reason: Option<&dyn EndReason>) {
        let Some(client) = self.client.take() else { return };
        // Cores may still answer to it; nobody listens.
        self.message = None;
        let device = &self.config.name;
        match reason {
            None if self.log_clients.allows() => info!(%device, "vhost-user client left"),
            None => {}
            Some(reason) if self.log.allows() => {
                warn!(%device, %reason, "vhost-user connection closed");
            }
            Some(_) => {}
        }
        if client.has_acted {
            self.reset_cores();
        }
    }

    fn reset_cores(&mut self) {
        let op = self.next_op();
        let mut reset = Outstanding { op, cores: Vec::new(), outcome: Ok(None) };
        for (index, core) in self.cores.iter().enumerate().filter(|(_, core)| !core.is_gone) {
            // It does not fail but with a core that is going, which says so.
            if core.commands.send(Command::Reset { op }).is_ok() {
                reset.cores.push(index);
            }
        }
        self.reset = Some(reset).filter(|reset| !reset.cores.is_empty());
    }

    fn on_request(&mut self, request: Request) {
        match request {
            Request::State(asker) => self.askers.push_back(asker),
            Request::Look => self.look_at = None,
            Request::Stop if self.is_stopping => {}
            Request::Stop => {
                info!(device = %self.config.name, "virtio-blk device stops");
                self.is_stopping = true;
                self.end_client(None);
                for core in &mut self.cores {
                    // A core that cannot be told is gone, and its events say so.
                    let _ = core.commands.send(Command::Leave);
                }
            }
        }
    }

    fn start_snapshot(&mut self) {
        if self.askers.is_empty() || self.snapshot.is_some() {
            return;
        }
        let op = self.next_op();
        let mut snapshot = Snapshot { op, cores: Vec::new(), queues: Vec::new() };
        for (index, core) in self.cores.iter().enumerate().filter(|(_, core)| !core.is_gone) {
            if core.commands.send(Command::Snapshot { op }).is_ok() {
                snapshot.cores.push(index);
            }
        }
        self.snapshot = Some(snapshot);
        self.finish_snapshot();
    }

    fn finish_snapshot(&mut self) {
        let is_complete = |snapshot: &mut Snapshot| snapshot.cores.is_empty();
        let Some(mut snapshot) = self.snapshot.take_if(is_complete) else { return };
        snapshot.queues.sort_by_key(|queue| queue.index);
        let state = DeviceState {
            client_connected: self.client.is_some(),
            features: self.client.as_ref().and_then(|client| client.session.features()),
            queues: snapshot.queues,
        };
        for asker in self.askers.drain(..) {
            // Whoever asked may have stopped waiting.
            let _ = asker.send(state.clone());
        }
    }
}

impl Outstanding {
    fn take(&mut self, core: usize, outcome: &Result<Option<u32>, String>) {
        let Some(at) = self.cores.iter().position(|other| *other == core) else { return };
        self.cores.swap_remove(at);
        match (&self.outcome, outcome) {
            (Err(_), _) | (_, Ok(None)) => {}
            (Ok(_), outcome) => self.outcome = outcome.clone(),
        }
    }

    fn lose(&mut self, core: usize) {
        let before = self.cores.len();
        self.cores.retain(|other| *other != core);
        if self.cores.len() < before {
            self.outcome = Err(format!("core {core} has stopped"));
        }
    }
}

/// Why a connection ends, for the log.
trait EndReason: std::fmt::Display {}
impl EndReason for ConnectionError {}
impl EndReason for Refusal {}

fn describe(config: &DeviceConfig, volume: &dyn Volume) -> Device {
    let device = Device::new(&volume.geometry(), &volume.identity(), &device_options(config));
    device.with_lifetime(volume.wear())
}

fn device_options(config: &DeviceConfig) -> DeviceOptions {
    DeviceOptions {
        queues: config.queues,
        serial: config.serial.clone(),
        read_only: config.read_only,
    }
}

/// A client can fail as often as it likes; the log must not fill with it.
#[derive(Default)]
struct LogLimit {
    since: Option<Instant>,
    lines: u32,
}

impl LogLimit {
    fn allows(&mut self) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now - since >= LOG_PERIOD) {
            self.since = Some(now);
            self.lines = 0;
        }
        self.lines += 1;
        self.lines <= LOG_LINES
    }
}
