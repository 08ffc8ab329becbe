//! One connection to the controller: TCP connect, TLS, ICReq/ICResp, and an end after which nothing
//! of it can still be sent.
//!
//! Used by the admin queue and by each I/O queue; what travels on it is theirs.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crypto::tls::RecordError;
use iobuf::SgList;
use nvme::tcp::{Crc32c, Fault, Host, HostConfig, HostEvent};
use reactor::net::{Rx, RxChunk, Stream, StreamConfig};
use reactor::{Errno, Local, Outcome, Port};

use crate::security::Offers;
use crate::shake::{self, Shake, Shaken};

/// How long the controller may take to close a connection that an H2CTermReq ended. Closing it from
/// here at once would take the H2CTermReq back, as our sockets are reset on close.
const TERM_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the controller may take to make room for the end of TLS. One that has answered everything
/// has room: this is for one that stops reading in that very moment.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a connection, and with it the association, ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Loss {
    #[error("connecting to {addr}: {errno}")]
    Connect { addr: SocketAddr, errno: Errno },
    #[error("the core has no free operation slot for a connect")]
    Busy,
    #[error("no ICResp in time")]
    InitTimeout,
    #[error("the controller closed the connection")]
    Eof,
    #[error(
        "the connection ended without the end of TLS (close_notify): the controller's process went \
         away, or somebody on the way cut it off"
    )]
    CutOff,
    #[error(
        "the controller closed the connection before it was set up: does the listener require TLS?"
    )]
    EofEarly,
    #[error("TLS: {0}")]
    Tls(String),
    #[error("TLS: {0}")]
    Record(RecordError),
    #[error("DH-HMAC-CHAP: {0}")]
    Authentication(String),
    #[error("the connection failed: {0}")]
    Io(Errno),
    #[error("setting up the socket: {0}")]
    Socket(std::io::Error),
    #[error("the controller broke the protocol: {0}")]
    Fault(Fault),
    #[error("the controller ended the connection with fatal error status {fes:#06x}")]
    Terminated { fes: u16 },
    #[error(transparent)]
    Session(nvme::host::SessionError),
    #[error("{0}")]
    Command(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No connection, nothing in flight. Moved on by `open`.
    Closed,
    /// TCP connect in flight. Moved on by its completion, which has its own time-out.
    Connecting,
    /// A connect in flight whose result is not wanted any more.
    Abandoned,
    /// TLS is being agreed on. Moved on by the target, turns that have time, or `until`.
    Shaking { until: Duration },
    /// The target did not take a key; the stream is shut down, and another connection is made for the
    /// next key when it is quiet.
    Again,
    /// ICReq sent. Moved on by ICResp, or by `until`.
    Initializing { until: Duration },
    /// ICResp received: commands may be sent.
    Up,
    /// H2CTermReq queued; what comes is thrown away. Moved on when the controller closes, or by
    /// `until`.
    Terminating { until: Duration },
    /// The stream is shut down; moved on when it is quiet. What it has to say yet is given up at
    /// `until`.
    Closing { until: Duration },
}

pub(crate) struct Link {
    local: Local,
    port: Port,
    addr: SocketAddr,
    state: State,
    stream: Option<Stream>,
    pub(crate) host: Host,
    host_config: HostConfig,
    tx_entries_max: usize,
    connect_timeout: Duration,
    /// Of a connection with TLS, until it is agreed on.
    shake: Option<Shake>,
    is_tls: bool,
    /// The target is being told why the handshake failed.
    is_parting: bool,
    /// Why the record layer ended the stream, if it did.
    record_error: Rc<Cell<Option<RecordError>>>,
}

impl Link {
    pub(crate) fn new(
        local: &Local,
        addr: SocketAddr,
        host_config: HostConfig,
        tx_entries_max: usize,
        connect_timeout: Duration,
    ) -> Link {
        Link {
            local: local.clone(),
            port: local.port(),
            addr,
            state: State::Closed,
            stream: None,
            host: Host::new(host_config.clone()),
            host_config,
            tx_entries_max,
            connect_timeout,
            shake: None,
            is_tls: false,
            is_parting: false,
            record_error: Rc::default(),
        }
    }

    /// Whether the connection is, or will be, encrypted.
    pub(crate) fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// Nothing of an earlier connection can be sent any more, and its payload memory is free.
    pub(crate) fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Starts to connect, with TLS if there are keys to offer. The link must be closed.
    pub(crate) fn open(&mut self, offers: Option<Arc<Offers>>) -> Result<(), Loss> {
        debug_assert!(self.is_closed(), "open of a link in use");
        self.is_tls = offers.is_some();
        self.shake = offers.map(Shake::new);
        self.is_parting = false;
        self.record_error.set(None);
        self.connect()
    }

    fn connect(&mut self) -> Result<(), Loss> {
        self.port.connect(self.addr, self.connect_timeout, 0).map_err(|_| Loss::Busy)?;
        self.host = Host::new(self.host_config.clone());
        self.state = State::Connecting;
        Ok(())
    }

    /// Ends the connection at once: what the controller has not been sent yet must never be sent. With
    /// `fault`, it is told first what it did wrong. `is_closed` says when it is over.
    ///
    /// With TLS it is told that nothing follows (close_notify, RFC 8446, section 6.1), if nothing else
    /// is being sent and the socket takes that at once.
    pub(crate) fn close(&mut self, now: Duration, fault: Option<&Fault>) {
        self.end(now, fault, false);
    }

    /// As `close`, when everything that was sent is answered: the controller gets the end of TLS even
    /// if it is lost on the way.
    pub(crate) fn finish(&mut self, now: Duration) {
        self.end(now, None, self.is_tls);
    }

    fn end(&mut self, now: Duration, fault: Option<&Fault>, is_in_order: bool) {
        match (self.state, &mut self.stream) {
            (State::Connecting, _) => {
                self.port.cancel_all();
                self.state = State::Abandoned;
            }
            (State::Shaking { .. }, Some(_)) if self.is_parting => {
                self.state = State::Terminating { until: now + TERM_TIMEOUT };
            }
            (State::Again, Some(_)) => {
                self.state = State::Closing { until: now };
                self.check_quiet();
            }
            (State::Shaking { .. } | State::Initializing { .. } | State::Up, Some(stream)) => {
                let fault = fault.filter(|_| !matches!(self.state, State::Shaking { .. }));
                let told = fault.is_some_and(|fault| {
                    let head = self.host.term_req(fault);
                    stream.push(&head, None, None, None).is_ok()
                });
                if told {
                    stream.flush();
                    self.state = State::Terminating { until: now + TERM_TIMEOUT };
                } else {
                    self.shut_down(now, is_in_order);
                    self.check_quiet();
                }
            }
            _ => {}
        }
    }

    fn shut_down(&mut self, now: Duration, is_in_order: bool) {
        let Some(stream) = &mut self.stream else { return };
        // Whatever else waits to be sent must not be.
        if is_in_order && !stream.is_sending() && stream.set_reset_on_close(false).is_ok() {
            stream.shutdown();
            self.state = State::Closing { until: now + CLOSE_TIMEOUT };
        } else {
            stream.shutdown();
            self.state = State::Closing { until: now };
            self.give_up_last_words();
        }
    }

    /// What the socket has not taken of the end of TLS is not sent any more.
    fn give_up_last_words(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        if !stream.is_quiet() {
            // It can fail on a socket alone that is of no use any more.
            let _ = stream.set_reset_on_close(true);
            stream.shutdown();
        }
        self.state = State::Closing { until: Duration::MAX };
    }

    /// Moves the connection on: completions of connect and sends. `Ok(true)`: it is now
    /// initialising or closed, or tokens may be waiting. An error is final; the caller then calls
    /// `close`.
    pub(crate) fn poll(&mut self, now: Duration) -> Result<bool, Loss> {
        let mut progressed = false;
        if self.port.in_flight() > 0 || matches!(self.state, State::Connecting | State::Abandoned) {
            while let Some(completion) = self.port.next() {
                progressed = true;
                self.on_connected(now, completion.result)?;
            }
        }
        let Some(stream) = &mut self.stream else { return Ok(progressed) };
        progressed |= stream.poll();
        match self.state {
            State::Initializing { until } if now >= until => return Err(Loss::InitTimeout),
            State::Shaking { until } if now >= until => {
                return Err(Loss::Tls(
                    "the target did not finish the handshake in time".to_owned(),
                ));
            }
            State::Shaking { .. } => progressed |= self.shake(now)?,
            State::Again if stream.is_quiet() => {
                self.stream = None;
                self.state = State::Closed;
                self.connect()?;
                return Ok(true);
            }
            State::Terminating { until } => {
                let mut is_over = now >= until || stream.failed().is_some();
                while !is_over {
                    match stream.recv() {
                        Rx::Data(_) => {}
                        Rx::Empty => break,
                        Rx::Eof | Rx::Failed(_) => is_over = true,
                    }
                }
                if is_over {
                    self.shut_down(now, false);
                    progressed = true;
                }
            }
            State::Closing { until } if now >= until => self.give_up_last_words(),
            _ => {}
        }
        progressed |= self.check_quiet();
        Ok(progressed)
    }

    /// A step of the handshake.
    fn shake(&mut self, now: Duration) -> Result<bool, Loss> {
        let (Some(shake), Some(stream)) = (&mut self.shake, &mut self.stream) else {
            return Ok(false);
        };
        match shake.step(stream, &self.local, &self.record_error) {
            Shaken::Waits => Ok(false),
            Shaken::Went => Ok(true),
            Shaken::Done => {
                self.shake = None;
                self.initialize(now);
                Ok(true)
            }
            Shaken::Next => {
                stream.shutdown();
                self.state = State::Again;
                Ok(true)
            }
            Shaken::Failed(why, is_parting) => {
                self.is_parting = is_parting;
                Err(Loss::Tls(why))
            }
        }
    }

    /// The stream stands: the first PDU.
    fn initialize(&mut self, now: Duration) {
        let Some(stream) = &mut self.stream else { return };
        let pushed = stream.push(&self.host.icreq(), None, None, None);
        debug_assert!(pushed.is_ok() || stream.failed().is_some(), "a new stream has room");
        stream.flush();
        self.state = State::Initializing { until: now + self.connect_timeout };
    }

    fn check_quiet(&mut self) -> bool {
        let is_quiet = self.stream.as_ref().is_none_or(Stream::is_quiet);
        if !matches!(self.state, State::Closing { .. }) || !is_quiet {
            return false;
        }
        self.stream = None;
        self.state = State::Closed;
        true
    }

    fn on_connected(&mut self, now: Duration, result: Result<Outcome, Errno>) -> Result<(), Loss> {
        if self.state != State::Connecting {
            self.state = State::Closed;
            return Ok(());
        }
        // Closed until the new stream stands, so that no error below leaves a connection half made.
        self.state = State::Closed;
        let socket = match result {
            Ok(Outcome::Socket(socket)) => socket,
            Ok(_) => return Err(Loss::Connect { addr: self.addr, errno: Errno::BAD_DESCRIPTOR }),
            Err(errno) => return Err(Loss::Connect { addr: self.addr, errno }),
        };
        // What this connection has not sent when it is given up must never be sent.
        socket.set_reset_on_close().map_err(Loss::Socket)?;
        let tx_entries_max = match self.is_tls {
            true => self.tx_entries_max.max(shake::ENTRIES),
            false => self.tx_entries_max,
        };
        let config = StreamConfig { tx_entries_max, ..StreamConfig::default() };
        self.stream = Some(Stream::new(&self.local, socket, config).map_err(Loss::Socket)?);
        if self.shake.is_some() {
            self.state = State::Shaking { until: now + self.connect_timeout };
        } else {
            self.initialize(now);
        }
        Ok(())
    }

    /// The next received bytes, for [`Link::next`].
    pub(crate) fn recv(&mut self) -> Result<Option<RxChunk>, Loss> {
        if !matches!(self.state, State::Initializing { .. } | State::Up) {
            return Ok(None);
        }
        let Some(stream) = &mut self.stream else { return Ok(None) };
        let errno = match stream.recv() {
            Rx::Empty => match stream.failed() {
                None => return Ok(None),
                Some(errno) => errno,
            },
            Rx::Data(chunk) => return Ok(Some(chunk)),
            Rx::Eof if !self.is_tls && self.state != State::Up => return Err(Loss::EofEarly),
            Rx::Eof if self.is_tls && !stream.is_ended_in_layer() => return Err(Loss::CutOff),
            Rx::Eof => return Err(Loss::Eof),
            Rx::Failed(errno) => errno,
        };
        Err(self.record_error.get().map_or(Loss::Io(errno), Loss::Record))
    }

    /// Has received data that belongs to `to` from `offset` on opened straight into there, where there
    /// is a record layer. Returns how many bytes that was; [`Link::next`] goes on behind them.
    pub(crate) fn recv_to(&mut self, to: &SgList, offset: usize, len: usize) -> usize {
        let Some(stream) = &mut self.stream else { return 0 };
        let placed = stream.recv_to(to, offset, len);
        if placed > 0 {
            self.host.placed(placed as u32); // at most what the machine asked for
        }
        placed
    }

    /// The next event in `input`. Becoming `Up` and the end of the connection are noticed on the
    /// way.
    #[inline]
    pub(crate) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<HostEvent<'a>>, Loss> {
        match self.host.next(input) {
            Ok(Some(HostEvent::Initialized)) => {
                self.state = State::Up;
                Ok(Some(HostEvent::Initialized))
            }
            Ok(Some(HostEvent::Terminated { fes })) => Err(Loss::Terminated { fes }),
            Ok(event) => Ok(event),
            Err(fault) => Err(Loss::Fault(fault)),
        }
    }

    /// PDUs that can still be pushed; none unless the link is up.
    #[inline]
    pub(crate) fn room(&self) -> usize {
        match &self.stream {
            Some(stream) if self.state == State::Up => stream.room(),
            _ => 0,
        }
    }

    /// Queues a PDU built by `host`; `payload` is a range of a list, and gets its data digest here
    /// if there is one. `room` must have said that there is room.
    #[inline]
    pub(crate) fn push(
        &mut self,
        head: &[u8],
        payload: Option<(&SgList, usize, usize)>,
        token: Option<u32>,
    ) -> Result<(), Loss> {
        let tail = match payload {
            Some((list, offset, len)) if self.host.data_digest() => {
                let mut crc = Crc32c::new();
                let update = &mut |bytes: &[u8]| {
                    crc.update(bytes);
                };
                list.for_each_piece(offset, len, update)
                    .map_err(|_| Loss::Command("payload outside its buffer".to_owned()))?;
                Some(crc.finish())
            }
            _ => None,
        };
        self.push_raw(head, payload, tail, token)
    }

    /// Queues a PDU whose data is at the end of `pdu` already.
    pub(crate) fn push_inline(&mut self, pdu: &[u8], data: &[u8]) -> Result<(), Loss> {
        let tail = self.host.data_digest().then(|| Crc32c::of(data));
        self.push_raw(pdu, None, tail, None)
    }

    #[inline]
    fn push_raw(
        &mut self,
        head: &[u8],
        payload: Option<(&SgList, usize, usize)>,
        tail: Option<[u8; 4]>,
        token: Option<u32>,
    ) -> Result<(), Loss> {
        let stream = self.stream.as_mut().ok_or(Loss::Eof)?;
        stream
            .push(head, payload, tail, token)
            .map_err(|_| Loss::Command("the send queue is full".to_owned()))
    }

    /// The next token whose payload memory is free again.
    #[inline]
    pub(crate) fn sent(&mut self) -> Option<u32> {
        self.stream.as_mut().and_then(Stream::sent)
    }

    #[inline]
    pub(crate) fn flush(&mut self) {
        if let Some(stream) = &mut self.stream
            && self.state == State::Up
        {
            stream.flush();
        }
    }

    /// When `poll` must run although nothing happened.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match (self.state, &self.shake, &self.stream) {
            (State::Shaking { .. }, Some(shake), Some(stream)) if shake.is_due(stream) => {
                return Some(self.local.now());
            }
            _ => {}
        }
        match self.state {
            State::Shaking { until } => Some(until),
            State::Initializing { until } | State::Terminating { until } => Some(until),
            State::Closing { until } if until != Duration::MAX => Some(until),
            _ => None,
        }
    }
}

impl Loss {
    /// What to tell the controller, if it is its fault.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        match self {
            Loss::Fault(fault) => Some(fault),
            _ => None,
        }
    }
}
