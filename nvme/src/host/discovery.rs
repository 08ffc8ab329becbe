//! Reading a discovery controller's log page, as `nvme discover` does.
//!
//! ```text
//! bring-up ─► header (20 bytes at 0) ─► records (4 KiB pieces from 1024) ─► header again
//!                  ▲                                                          │ GENCTR changed
//!                  └──────────────────────────────────────────────────────────┘ (bounded)
//!                                                           else CC.SHN, CSTS.SHST ─► Done
//! ```

use core::time::Duration;

use super::bring_up::{BringUp, ControllerInfo, Request, Shutdown};
use super::{AdminCommand, Authenticate, Authentication, ConnectNames, SessionError};
use crate::spec::{AdminOpcode, Cqe, GetLogPage, LogPage, Sqe};
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

/// What a client needs to know.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Host, and discovery subsystem: usually [`crate::spec::Nqn::discovery`].
    pub names: ConnectNames,
    /// How long an answer may take.
    pub command_timeout: Duration,
    /// Whether the driver authenticates, see [`Client::authentication`].
    pub authenticate: Authenticate,
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
    /// Under way.
    Reading,
    /// Done, and the controller is shut down as far as it lets itself be.
    Done(&'a Discovered),
    /// Over; close the connection.
    Failed(&'a SessionError),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    BringUp,
    Header,
    Records(HeaderInfo),
    Check(HeaderInfo),
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
    controller: Option<ControllerInfo>,
    entries: Vec<Result<DiscoveryEntry, InvalidEntry>>,
    retries: u32,
    result: Option<Discovered>,
    error: Option<SessionError>,
}

impl Client {
    /// A client that is to begin with Connect on a fresh connection.
    #[must_use]
    pub fn new(config: ClientConfig) -> Client {
        Client {
            step: Step::BringUp,
            // No keep alive: the association lives for a few commands.
            bring_up: BringUp::new(config.names.clone(), Duration::ZERO, config.authenticate),
            shutdown: None,
            in_flight: None,
            controller: None,
            entries: Vec::new(),
            retries: 0,
            result: None,
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

    /// The next command to send, if any. Call after every completion and at [`Client::deadline`].
    pub fn next_command(&mut self, now: Duration) -> Option<AdminCommand> {
        if let Some(command) = self.in_flight {
            let after = self.config.command_timeout;
            if now >= command.sent_at.saturating_add(after) {
                self.fail(SessionError::Timeout { what: command.what, after });
            }
            return None;
        }
        let request = match self.step {
            Step::BringUp => self.bring_up.request(now)?,
            Step::Header | Step::Check(_) => get_log(0, HEADER_READ_LEN as u64),
            Step::Records(header) => {
                let at = self.entries.len() as u64;
                let count = (header.records - at).min(PIECE_RECORDS);
                get_log(HEADER_LEN as u64 + at * RECORD_LEN as u64, count * RECORD_LEN as u64)
            }
            Step::Shutdown => self.shutdown.as_ref()?.request(now)?,
            Step::Over => return None,
        };
        let read_len = request.read_len;
        self.in_flight = Some(InFlight { what: request.what, sent_at: now, read_len });
        Some(AdminCommand { tag: 0, sqe: request.sqe.to_bytes(), write: request.write, read_len })
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
        if tag != 0 {
            return Err(SessionError::UnknownTag(tag));
        }
        let InFlight { what, read_len, .. } =
            self.in_flight.take().ok_or(SessionError::UnknownTag(tag))?;
        let status = cqe.status();
        if status.is_success() && data.len() != read_len as usize {
            return Err(SessionError::Length { what, len: data.len(), expected: read_len });
        }
        match self.step {
            Step::BringUp => {
                if let Some(info) = self.bring_up.on_reply(what, cqe, data, now)? {
                    self.controller = Some(info);
                    self.step = Step::Header;
                }
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
            Step::Over => return Ok(()),
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
                let Some(controller) = self.controller.take() else { return self.restart() };
                let entries = core::mem::take(&mut self.entries);
                self.result = Some(Discovered { genctr: header.genctr, entries, controller });
                self.shutdown = Some(Shutdown::new(now, self.bring_up.ready_timeout()));
                self.step = Step::Shutdown;
            }
            Step::BringUp | Step::Shutdown | Step::Over => {}
        }
        Ok(())
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
        if let Some(command) = &self.in_flight {
            return Some(command.sent_at.saturating_add(self.config.command_timeout));
        }
        match self.step {
            Step::BringUp => self.bring_up.poll_at(),
            Step::Shutdown => self.shutdown.as_ref().map(Shutdown::poll_at),
            _ => None,
        }
    }

    fn fail(&mut self, error: SessionError) {
        self.in_flight = None;
        self.step = Step::Over;
        // With the log read, a controller that goes silent during shutdown is no failure.
        if self.result.is_none() {
            self.error = Some(error);
        }
    }
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
