//! The control thread of a device: listens, talks to one client at a time, and calls the function.
//!
//! ```text
//!   socket ──► Connection ──► Session ──► Function ──► cores
//!   socket ◄── reply ◄─────── on_done ◄── poll ◄─────── waker
//! ```
//!
//! One `poll` waits for everything: the listening socket, the client, the waker of the function and
//! of the owner's requests. Nothing here blocks and nothing is retried in a loop, so a client can
//! neither hang the thread nor make it spin.
//!
//! The next client is accepted when the function has let go of everything the last one had. An I/O
//! that outlived its client could otherwise overwrite what the next one has written.

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use reactor::unix::{Listener, Waker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{info, warn};

use super::journal::{Inherited, Journal};
use super::session::{Outcome, Session};
use super::socket::{Connection, ConnectionError, Received};
use super::wire::{Command, Message};
use crate::function::{Event, Function, Step};

/// Messages taken from the client before looking at anything else.
const MESSAGES_PER_TURN: usize = 32;
/// Pause after a connection could not be accepted, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Log lines that clients can cause in one [`LOG_PERIOD`].
const LOG_LINES: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// What the server itself knows of its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientState {
    /// A client is connected.
    pub is_connected: bool,
    /// And has negotiated a version.
    pub is_negotiated: bool,
    /// Maps of its memory.
    pub maps: usize,
}

/// Run on the control thread, which must not be held up.
pub type Ask<F> = Box<dyn FnOnce(&mut F, ClientState) + Send>;

/// From the device's owner. Wake the server's [`Waker`] after sending one.
pub enum Request<F> {
    /// Look at the function, or change it.
    Ask(Ask<F>),
    /// Ask the client to unplug the device; answers whether it listens to that.
    Unplug(mpsc::Sender<bool>),
    /// Disconnect the client, bring the function to rest and end.
    Stop,
    /// End at once and leave the client to a successor that has the journal. Without a journal the
    /// same as [`Request::Stop`].
    Leave,
}

struct Client {
    connection: Connection,
    session: Session,
    /// The message at hand may change the session.
    is_changing: bool,
    /// The session of a predecessor is being taken up.
    is_importing: bool,
    /// A message that a predecessor had taken and not answered.
    again: Option<Message>,
}

impl Client {
    fn new(connection: Connection, session: Session) -> Client {
        Client { connection, session, is_changing: false, is_importing: false, again: None }
    }
}

/// Commands that leave the session as it is.
const READ_ONLY: [Command; 7] = [
    Command::DEVICE_GET_INFO,
    Command::DEVICE_GET_REGION_INFO,
    Command::DEVICE_GET_REGION_IO_FDS,
    Command::DEVICE_GET_IRQ_INFO,
    Command::REGION_READ,
    Command::REGION_WRITE,
    Command::REGION_WRITE_MULTI,
];

/// The control thread of one function.
pub struct Server<F> {
    name: String,
    function: F,
    listener: Listener,
    waker: Waker,
    requests: mpsc::Receiver<Request<F>>,
    journal: Option<Journal>,
    client: Option<Client>,
    /// The function is letting go of what the last client had.
    is_detaching: bool,
    is_stopping: bool,
    is_leaving: bool,
    accept_after: Option<Instant>,
    log: LogLimit,
    /// Clients that come and go in good order have their own budget.
    log_clients: LogLimit,
}

impl<F: Function> Server<F> {
    /// A server that waits for its first client, or goes on with that of the journal. `waker` is
    /// the one that the function wakes, and that is woken for `requests`. `name` is for logs.
    pub fn new(
        name: String,
        function: F,
        listener: Listener,
        waker: Waker,
        requests: mpsc::Receiver<Request<F>>,
        journal: Option<Journal>,
    ) -> Server<F> {
        Server {
            name,
            function,
            listener,
            waker,
            requests,
            journal,
            client: None,
            is_detaching: false,
            is_stopping: false,
            is_leaving: false,
            accept_after: None,
            log: LogLimit::default(),
            log_clients: LogLimit::default(),
        }
    }

    /// Until the owner says stop and the function has let go, or says leave. Gives the function
    /// back.
    pub fn run(mut self) -> F {
        self.inherit();
        loop {
            while let Some(event) = self.function.poll() {
                self.on_event(event);
            }
            loop {
                match self.requests.try_recv() {
                    Ok(request) => self.on_request(request),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => {
                        self.stop();
                        break;
                    }
                }
            }
            if self.is_leaving || self.is_stopping && !self.is_detaching {
                return self.function;
            }
            self.wait();
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|at| *at > now);
        let is_accepting = self.client.is_none()
            && !self.is_detaching
            && !self.is_stopping
            && self.accept_after.is_none();
        let listener_flags = if is_accepting { PollFlags::IN } else { PollFlags::empty() };
        let waker = self.waker.clone();
        let mut fds = vec![
            PollFd::from_borrowed_fd(waker.eventfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), listener_flags),
        ];
        if let Some(client) = &self.client {
            // An end of the connection is reported even without a flag.
            let flags = match client.connection.has_output() {
                true => PollFlags::OUT,
                false if client.session.is_pending() => PollFlags::empty(),
                false => PollFlags::IN,
            };
            fds.push(PollFd::from_borrowed_fd(client.connection.as_fd(), flags));
            if let Some(unmask) = client.session.unmask_eventfd() {
                fds.push(PollFd::from_borrowed_fd(unmask, PollFlags::IN));
            }
        }
        let timeout = self.accept_after.map(|at| Timespec {
            tv_sec: 0,
            tv_nsec: (at - now).min(ACCEPT_PAUSE).as_nanos() as i64,
        });
        if poll(&mut fds, timeout.as_ref()).is_err() {
            // EINTR: look at everything again. There is no other reason with valid arguments.
            return;
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if !ready[0].is_empty() {
            waker.clear();
        }
        if is_accepting && !ready[1].is_empty() {
            self.accept();
        }
        if ready.get(3).is_some_and(|flags| !flags.is_empty()) {
            self.unmask();
        }
        if let Some(flags) = ready.get(2).filter(|flags| !flags.is_empty()) {
            self.serve(*flags);
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok(None) => {}
            Ok(Some(socket)) => {
                let session = Session::new(&self.function);
                if let Some(journal) = &mut self.journal
                    && let Err(error) = journal.begin(socket.as_fd(), &session.export())
                {
                    warn!(device = %self.name, %error, "cannot write the journal");
                    return;
                }
                self.client = Some(Client::new(Connection::new(socket), session));
                if self.log_clients.allows() {
                    info!(device = %self.name, "vfio-user client connected");
                }
            }
            Err(error) => {
                self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                if self.log.allows() {
                    warn!(device = %self.name, %error, "cannot accept a vfio-user client");
                }
            }
        }
    }

    /// The client's kernel says that the guest has taken an INTx.
    fn unmask(&mut self) {
        let Some(client) = &mut self.client else { return };
        if let Some(eventfd) = client.session.unmask_eventfd() {
            // EAGAIN: somebody has read it already.
            let _ = rustix::io::read(eventfd, &mut [0; 8]);
            client.session.on_unmask(&mut self.function);
        }
    }

    /// The client's socket is ready for something.
    fn serve(&mut self, flags: PollFlags) {
        let Some(client) = &mut self.client else { return };
        if let Err(error) = client.connection.flush(&mut self.journal) {
            return self.end_client(Some(&error));
        }
        for _ in 0..MESSAGES_PER_TURN {
            let Some(client) = &mut self.client else { return };
            if client.session.is_pending() || client.connection.has_output() {
                break;
            }
            if let Some(message) = client.again.take() {
                client.is_changing = !READ_ONLY.contains(&message.command);
                let outcome = client.session.on_message_again(message, &mut self.function);
                self.follow(outcome);
                continue;
            }
            match client.connection.receive(&mut self.journal) {
                Ok(Received::Empty) => break,
                Ok(Received::Closed) => return self.end_client(None),
                Ok(Received::Message(message)) => {
                    client.is_changing = !READ_ONLY.contains(&message.command);
                    let outcome = client.session.on_message(message, &mut self.function);
                    self.follow(outcome);
                }
                Err(error) => return self.end_client(Some(&error)),
            }
        }
        // It will not take replies, and what it still has to say can have no effect.
        if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.end_client(None);
        }
    }

    fn follow(&mut self, outcome: Outcome) {
        let Some(client) = &mut self.client else { return };
        if let Err(error) = client.follow(outcome, &mut self.journal) {
            self.end_client(Some(&error));
        }
    }

    /// Go on with the client of a predecessor.
    fn inherit(&mut self) {
        let Some(journal) = &mut self.journal else { return };
        match resume(journal, &mut self.function) {
            Ok(Some(client)) => {
                info!(device = %self.name, "goes on with the client of its predecessor");
                self.client = Some(client);
                // There may be a message to carry out again, of which the socket says nothing.
                self.serve(PollFlags::empty());
            }
            Ok(None) => self.detach(),
            Err(error) => {
                warn!(device = %self.name, %error, "cannot go on with the client of its predecessor");
                self.end_journal();
                self.detach();
            }
        }
    }

    fn end_journal(&mut self) {
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.end()
        {
            warn!(device = %self.name, %error, "cannot write the journal");
        }
    }

    fn detach(&mut self) {
        self.is_detaching = self.function.detach() == Step::Pending;
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Done if self.is_detaching => self.is_detaching = false,
            Event::Done => {
                if let Some(client) = &mut self.client
                    && client.session.is_pending()
                {
                    let outcome = client.session.on_done(&mut self.function);
                    self.follow(outcome);
                    // There may be messages of which the socket has told already.
                    self.serve(PollFlags::empty());
                }
            }
            Event::Failed => {
                let is_told = self.client.as_mut().is_some_and(|client| client.session.on_failed());
                if self.log.allows() {
                    warn!(device = %self.name, is_told, "the function has failed");
                }
            }
        }
    }

    fn end_client(&mut self, reason: Option<&ConnectionError>) {
        if self.client.take().is_none() {
            return;
        }
        let device = &self.name;
        match reason {
            None if self.log_clients.allows() => info!(%device, "vfio-user client left"),
            None => {}
            Some(reason) if self.log.allows() => {
                warn!(%device, %reason, "vfio-user connection closed");
            }
            Some(_) => {}
        }
        self.end_journal();
        self.detach();
    }

    fn on_request(&mut self, request: Request<F>) {
        match request {
            Request::Ask(ask) => {
                let state =
                    self.client.as_ref().map_or_else(ClientState::default, |client| ClientState {
                        is_connected: true,
                        is_negotiated: client.session.is_negotiated(),
                        maps: client.session.maps(),
                    });
                ask(&mut self.function, state);
            }
            Request::Unplug(asker) => {
                let client = self.client.as_mut();
                let listens = client.is_some_and(|client| client.session.request_unplug());
                // Whoever asked may have stopped waiting.
                let _ = asker.send(listens);
            }
            Request::Stop => self.stop(),
            Request::Leave if self.journal.is_some() => self.is_leaving = true,
            Request::Leave => self.stop(),
        }
    }

    fn stop(&mut self) {
        if !self.is_stopping {
            info!(device = %self.name, "vfio-user device stops");
            self.is_stopping = true;
            self.end_client(None);
        }
    }
}

impl Client {
    fn follow(
        &mut self,
        outcome: Outcome,
        journal: &mut Option<Journal>,
    ) -> Result<(), ConnectionError> {
        if matches!(outcome, Outcome::Pending) {
            return Ok(());
        }
        // That was no message.
        if std::mem::take(&mut self.is_importing) {
            return Ok(());
        }
        if let Some(journal) = journal {
            let session = self.is_changing.then(|| self.session.export());
            let reply = match &outcome {
                Outcome::Reply(reply) => Some((reply.bytes.as_slice(), reply.fd.is_some())),
                _ => None,
            };
            journal.answer(session.as_ref(), reply)?;
        }
        match outcome {
            Outcome::Reply(reply) => self.connection.send(reply, journal),
            _ => Ok(()),
        }
    }
}

/// The client that a predecessor had.
fn resume(
    journal: &mut Journal,
    function: &mut dyn Function,
) -> Result<Option<Client>, Box<dyn std::error::Error>> {
    let Some(inherited) = journal.inherit()? else { return Ok(None) };
    let Inherited { socket, session, message, message_fds, mut fds, reply } = inherited;
    let (connection, again) = Connection::inherit(socket, &message, message_fds, reply)?;
    let (session, outcome) = Session::import(&session, &mut fds, function)?;
    journal.settle(&session.export())?;
    let mut client = Client::new(connection, session);
    client.is_importing = matches!(outcome, Outcome::Pending);
    client.again = again;
    Ok(Some(client))
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

#[cfg(test)]
mod tests;
