//! Reading a discovery controller's log page, as `nvme discover` does.
//!
//! ```text
//! bring-up ─► header (20 bytes at 0) ─► records (4 KiB pieces from 1024) ─► header again
//!                  ▲                                                          │ GENCTR changed
//!                  └──────────────────────────────────────────────────────────┘ (bounded)
//!                                                           else CC.SHN, CSTS.SHST ─► Done
//! ```
//!
//! With a keep alive timeout the association is an explicit persistent one: after the log it stays,
//! asks to be told of changes (Asynchronous Event Configuration, bit 31), and reads the log again
//! when it is told, or every minute where the controller tells nothing.

use core::time::Duration;

use super::bring_up::{BringUp, ControllerInfo, Request, Shutdown};
use super::session::set_features;
use super::{AdminCommand, Authenticate, Authentication, ConnectNames, SessionError};
use crate::spec::{AdminOpcode, Cqe, Feature, GetLogPage, IdentifyController, LogPage, Sqe, event};
use crate::subsys::discovery::{
    DiscoveryEntry, HEADER_LEN, HEADER_READ_LEN, HeaderInfo, InvalidEntry, RECORD_LEN,
    parse_header, parse_records,
};

/// Most records a host takes: 4 MiB of log.
pub const RECORDS_MAX: u64 = 4096;
/// How often the log may change under the reader.
const RETRIES_MAX: u32 = 10;
/// Records per command: 4 KiB.
const PIECE_RECORDS: u64 = 4;
/// Shortest time between two Asynchronous Event Requests, and from an event to the reading of the
/// log: several changes often come together.
const EVENT_INTERVAL: Duration = Duration::from_millis(50);
/// Shortest time from the end of a reading to the next: a controller whose log changes without end
/// must not keep a host busy.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// How often the log of a controller that tells of no change is read.
const POLL_INTERVAL: Duration = Duration::from_secs(60);

const TAG_STEP: u16 = 0;
const TAG_KEEP_ALIVE: u16 = 1;
const TAG_EVENT: u16 = 2;

/// What a client needs to know.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Host, and discovery subsystem: usually [`crate::spec::Nqn::discovery`].
    pub names: ConnectNames,
    /// How long an answer may take.
    pub command_timeout: Duration,
    /// Whether the driver authenticates, see [`Client::authentication`].
    pub authenticate: Authenticate,
    /// Keep alive timeout of an association that stays (an explicit persistent connection), in
    /// whole milliseconds. Zero: it ends when the log is read.
    pub kato: Duration,
}

/// A discovery log, read consistently.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Discovered {
    /// Generation counter.
    pub genctr: u64,
    /// Entries in the order of the log. One that makes no sense says why.
    pub entries: Vec<Result<DiscoveryEntry, InvalidEntry>>,
    /// The controller.
    pub controller: ControllerInfo,
}

/// Where a client stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClientState<'a> {
    /// Under way, for the first time.
    Reading,
    /// The log as it was last read. An association that does not stay is over then, and the
    /// controller is shut down as far as it lets itself be.
    Done(&'a Discovered),
    /// Over; close the connection.
    Failed(&'a SessionError),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    BringUp,
    EventConfiguration,
    Header,
    Records(HeaderInfo),
    Check(HeaderInfo),
    /// Nothing to do but keep alive and events. Moved on by `read_at`.
    Idle,
    Shutdown,
    Over,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    what: &'static str,
    sent_at: Duration,
    read_len: u32,
}

/// The admin queue of a discovery controller. See the module documentation of [`crate::host`].
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    step: Step,
    bring_up: BringUp,
    shutdown: Option<Shutdown>,
    in_flight: Option<InFlight>,
    keep_alive: Option<InFlight>,
    /// `None`: the controller takes no Keep Alive.
    keep_alive_at: Option<Duration>,
    event: Option<InFlight>,
    /// When the next Asynchronous Event Request may be sent; `None`: events are not enabled.
    event_at: Option<Duration>,
    /// When the log is to be read again.
    read_at: Option<Duration>,
    /// When the log was last read to its end.
    last_read: Option<Duration>,
    controller: Option<ControllerInfo>,
    entries: Vec<Result<DiscoveryEntry, InvalidEntry>>,
    retries: u32,
    result: Option<Discovered>,
    is_new: bool,
    error: Option<SessionError>,
}

impl Client {
    /// A client that is to begin with Connect on a fresh connection.
    #[must_use]
    pub fn new(config: ClientConfig) -> Client {
        Client {
            step: Step::BringUp,
            // Without a timeout there is no keep alive: the association lives for a few commands.
            bring_up: BringUp::new(config.names.clone(), config.kato, config.authenticate),
            shutdown: None,
            in_flight: None,
            keep_alive: None,
            keep_alive_at: (config.kato != Duration::ZERO).then_some(Duration::ZERO),
            event: None,
            event_at: None,
            read_at: None,
            last_read: None,
            controller: None,
            entries: Vec::new(),
            retries: 0,
            result: None,
            is_new: false,
            error: None,
            config,
        }
    }

    /// Where the client stands.
    #[must_use]
    pub fn state(&self) -> ClientState<'_> {
        match (&self.error, &self.result, self.step) {
            (Some(error), ..) => ClientState::Failed(error),
            (None, Some(result), Step::Over) => ClientState::Done(result),
            (None, Some(result), _) if self.stays() => ClientState::Done(result),
            _ => ClientState::Reading,
        }
    }

    /// `Some`: nothing else is sent before the driver has authenticated on this queue and said so
    /// with [`Client::authenticated`].
    #[must_use]
    pub fn authentication(&self) -> Option<Authentication> {
        if self.error.is_some() { None } else { self.bring_up.authentication() }
    }

    /// The authentication has ended well.
    pub fn authenticated(&mut self) {
        self.bring_up.authenticated();
    }

    /// Whether the log was read to its end since the last call.
    pub fn take_read(&mut self) -> bool {
        core::mem::take(&mut self.is_new)
    }

    fn stays(&self) -> bool {
        self.config.kato != Duration::ZERO
    }

    /// The next command to send, if any. Call after every completion and at [`Client::deadline`].
    pub fn next_command(&mut self, now: Duration) -> Option<AdminCommand> {
        let limits =
            [(self.in_flight, self.config.command_timeout), (self.keep_alive, self.config.kato)];
        for (command, after) in limits {
            if let Some(InFlight { what, sent_at, .. }) = command
                && now >= sent_at.saturating_add(after)
            {
                self.fail(SessionError::Timeout { what, after });
                return None;
            }
        }
        let is_up = self.stays() && self.bring_up.is_enabled() && self.step != Step::Over;
        if is_up && self.keep_alive.is_none() && self.keep_alive_at.is_some_and(|at| now >= at) {
            self.keep_alive_at = Some(now + self.config.kato / 2);
            let request = Request::plain("Keep Alive", Sqe::new(AdminOpcode::KEEP_ALIVE.0));
            return Some(send(request, TAG_KEEP_ALIVE, now, &mut self.keep_alive));
        }
        if is_up && self.event.is_none() && self.event_at.is_some_and(|at| now >= at) {
            let sqe = Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0);
            let request = Request::plain("Asynchronous Event Request", sqe);
            return Some(send(request, TAG_EVENT, now, &mut self.event));
        }
        if self.in_flight.is_some() {
            return None;
        }
        if self.step == Step::Idle && self.read_at.is_some_and(|at| now >= at) {
            self.read_at = None;
            self.retries = 0;
            self.step = Step::Header;
        }
        let request = match self.step {
            Step::BringUp => self.bring_up.request(now)?,
            Step::EventConfiguration => set_features(
                "Set Features: Asynchronous Event Configuration",
                Feature::ASYNC_EVENT_CONFIGURATION,
                IdentifyController::OAES_DISCOVERY_LOG,
            ),
            Step::Header | Step::Check(_) => get_log(0, HEADER_READ_LEN as u64),
            Step::Records(header) => {
                let at = self.entries.len() as u64;
                let count = (header.records - at).min(PIECE_RECORDS);
                get_log(HEADER_LEN as u64 + at * RECORD_LEN as u64, count * RECORD_LEN as u64)
            }
            Step::Shutdown => self.shutdown.as_ref()?.request(now)?,
            Step::Idle | Step::Over => return None,
        };
        Some(send(request, TAG_STEP, now, &mut self.in_flight))
    }

    /// A completion, with the controller-to-host data of the command.
    ///
    /// # Errors
    /// What [`ClientState::Failed`] says from now on.
    pub fn on_completion(
        &mut self,
        tag: u16,
        cqe: &[u8; 16],
        data: &[u8],
        now: Duration,
    ) -> Result<(), SessionError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let result = self.complete(tag, &Cqe::from_bytes(cqe), data, now);
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn complete(
        &mut self,
        tag: u16,
        cqe: &Cqe,
        data: &[u8],
        now: Duration,
    ) -> Result<(), SessionError> {
        let slot = match tag {
            TAG_STEP => &mut self.in_flight,
            TAG_KEEP_ALIVE => &mut self.keep_alive,
            TAG_EVENT => &mut self.event,
            _ => return Err(SessionError::UnknownTag(tag)),
        };
        let InFlight { what, read_len, .. } = slot.take().ok_or(SessionError::UnknownTag(tag))?;
        let status = cqe.status();
        if status.is_success() && data.len() != read_len as usize {
            return Err(SessionError::Length { what, len: data.len(), expected: read_len });
        }
        match tag {
            TAG_KEEP_ALIVE => {
                if !status.is_success() {
                    // It has none, as discovery controllers of old; its connection stays or not.
                    self.keep_alive_at = None;
                }
                return Ok(());
            }
            TAG_EVENT => {
                self.on_event(cqe, now);
                return Ok(());
            }
            _ => {}
        }
        match self.step {
            Step::BringUp => {
                if let Some(info) = self.bring_up.on_reply(what, cqe, data, now)? {
                    let tells = info.oaes & IdentifyController::OAES_DISCOVERY_LOG != 0;
                    self.controller = Some(info);
                    self.step = match self.stays() && tells {
                        true => Step::EventConfiguration,
                        false => Step::Header,
                    };
                }
                return Ok(());
            }
            Step::EventConfiguration => {
                self.event_at = status.is_success().then_some(now);
                self.step = Step::Header;
                return Ok(());
            }
            Step::Shutdown => {
                // The log is read; a controller that does not shut down changes nothing.
                let is_over = match &mut self.shutdown {
                    Some(shutdown) => shutdown.on_reply(what, cqe, now).unwrap_or(true),
                    None => true,
                };
                if is_over {
                    self.step = Step::Over;
                }
                return Ok(());
            }
            Step::Idle | Step::Over => return Ok(()),
            Step::Header | Step::Records(_) | Step::Check(_) => {}
        }
        if !status.is_success() {
            // Discover Restart: the log changed in a way that makes the offsets meaningless.
            if status.is(crate::spec::Status::DISCOVER_RESTART) {
                return self.restart();
            }
            return Err(SessionError::Command { what, status });
        }
        match self.step {
            Step::Header => {
                let header = parse_header(data, RECORDS_MAX)?;
                self.entries.clear();
                self.step =
                    if header.records == 0 { Step::Check(header) } else { Step::Records(header) };
            }
            Step::Records(header) => {
                self.entries.extend(parse_records(data));
                if self.entries.len() as u64 >= header.records {
                    self.step = Step::Check(header);
                }
            }
            Step::Check(header) => {
                if parse_header(data, RECORDS_MAX)? != header {
                    return self.restart();
                }
                let Some(controller) = self.controller.clone() else { return self.restart() };
                let entries = core::mem::take(&mut self.entries);
                self.result = Some(Discovered { genctr: header.genctr, entries, controller });
                self.is_new = true;
                self.last_read = Some(now);
                if self.stays() {
                    if self.event_at.is_none() {
                        self.read_at = Some(now + POLL_INTERVAL);
                    }
                    self.step = Step::Idle;
                } else {
                    self.shutdown = Some(Shutdown::new(now, self.bring_up.ready_timeout()));
                    self.step = Step::Shutdown;
                }
            }
            Step::BringUp | Step::EventConfiguration | Step::Idle | Step::Shutdown | Step::Over => {
            }
        }
        Ok(())
    }

    fn on_event(&mut self, cqe: &Cqe, now: Duration) {
        if !cqe.status().is_success() {
            // The limit is exceeded or requests are aborted: live without events.
            self.event_at = None;
            self.read_at.get_or_insert(now + POLL_INTERVAL);
            return;
        }
        self.event_at = Some(now + EVENT_INTERVAL);
        let dw0 = cqe.dw0();
        if dw0 & 7 == event::TYPE_NOTICE && dw0 >> 8 & 0xff == event::NOTICE_DISCOVERY_LOG {
            let earliest = self.last_read.map_or(now, |at| at + READ_INTERVAL);
            self.read_at.get_or_insert(earliest.max(now + EVENT_INTERVAL));
        }
    }

    fn restart(&mut self) -> Result<(), SessionError> {
        self.retries += 1;
        if self.retries > RETRIES_MAX {
            return Err(SessionError::Unstable(self.retries));
        }
        self.step = Step::Header;
        Ok(())
    }

    /// When [`Client::next_command`] wants to be called although nothing happened.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        if self.step == Step::Over {
            return None;
        }
        let overdue = |command: &Option<InFlight>, after: Duration| {
            command.as_ref().map(|command| command.sent_at.saturating_add(after))
        };
        let step = match self.step {
            _ if self.in_flight.is_some() => None,
            Step::BringUp => self.bring_up.poll_at(),
            Step::Shutdown => self.shutdown.as_ref().map(Shutdown::poll_at),
            Step::Idle => self.read_at,
            _ => None,
        };
        let is_up = self.stays() && self.bring_up.is_enabled();
        let if_up = |is_out: bool, at: Option<Duration>| if is_up && !is_out { at } else { None };
        [
            overdue(&self.in_flight, self.config.command_timeout),
            overdue(&self.keep_alive, self.config.kato),
            step,
            if_up(self.keep_alive.is_some(), self.keep_alive_at),
            if_up(self.event.is_some(), self.event_at),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn fail(&mut self, error: SessionError) {
        (self.in_flight, self.keep_alive, self.event) = (None, None, None);
        self.step = Step::Over;
        // With the log read, a controller that goes silent during shutdown is no failure.
        if self.result.is_none() || self.stays() {
            self.error = Some(error);
        }
    }
}

fn send(
    request: Request,
    tag: u16,
    now: Duration,
    in_flight: &mut Option<InFlight>,
) -> AdminCommand {
    let Request { what, mut sqe, write, read_len } = request;
    *in_flight = Some(InFlight { what, sent_at: now, read_len });
    sqe.cid.set(tag);
    AdminCommand { tag, sqe: sqe.to_bytes(), write, read_len }
}

fn get_log(offset: u64, len: u64) -> Request {
    let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
    GetLogPage {
        lid: LogPage::DISCOVERY,
        lsp: 0,
        rae: false,
        len,
        offset,
        lsi: 0,
        offset_is_index: false,
        csi: 0,
        uuid_index: 0,
    }
    .apply(&mut sqe);
    Request::read("Get Log Page: Discovery", sqe, len as u32)
}
