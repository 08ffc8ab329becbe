//! A blocking connection, with TLS or without.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crypto::tls::{self, Cause, Progress, Session};

use super::DiscoverError;
use crate::security::Offers;

/// Received at a time.
const CHUNK_BYTES: usize = 16 << 10;

pub(super) struct Wire {
    socket: TcpStream,
    start: Instant,
    timeout: Duration,
    session: Option<Session>,
    received: Vec<u8>,
    /// Plaintext that came with the end of the handshake.
    early: Vec<u8>,
}

/// Random bytes from the system, for the few that are needed.
pub(super) fn getrandom(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}

impl Wire {
    /// Connects, with TLS if there are keys to offer: one after the other until the target takes
    /// one.
    pub(super) fn open(
        addr: SocketAddr,
        start: Instant,
        timeout: Duration,
        offers: Option<Arc<Offers>>,
    ) -> Result<Wire, DiscoverError> {
        let Some(offers) = offers else { return Wire::connect(addr, start, timeout) };
        let mut first_refusal = None;
        for refused in 0..offers.len() {
            let mut wire = Wire::connect(addr, start, timeout)?;
            match wire.shake(&offers, refused) {
                Ok(()) => return Ok(wire),
                Err(Shaken::Refused(why)) => {
                    first_refusal.get_or_insert(why);
                }
                Err(Shaken::Failed(error)) => return Err(error),
            }
        }
        let first = first_refusal.unwrap_or_else(|| "there is no key to offer".to_owned());
        Err(DiscoverError::Security(format!("TLS: {}", offers.explain(&first))))
    }

    fn connect(addr: SocketAddr, start: Instant, timeout: Duration) -> Result<Wire, DiscoverError> {
        let left = timeout.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
        let socket = TcpStream::connect_timeout(&addr, left)
            .map_err(|source| DiscoverError::Connect { addr, source })?;
        socket.set_nodelay(true).map_err(DiscoverError::Io)?;
        let received = vec![0; CHUNK_BYTES];
        Ok(Wire { socket, start, timeout, session: None, received, early: Vec::new() })
    }

    pub(super) fn is_tls(&self) -> bool {
        self.session.is_some()
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn shake(&mut self, offers: &Offers, refused: usize) -> Result<(), Shaken> {
        let (index, psk) = offers
            .get(0, refused)
            .ok_or_else(|| Shaken::Refused("there is no key to offer".to_owned()))?;
        let failed = |text: String| Shaken::Failed(DiscoverError::Security(format!("TLS: {text}")));
        let mut client = tls::Client::new(psk).map_err(|failure| failed(failure.to_string()))?;
        let cut = |error: DiscoverError| match error {
            DiscoverError::Closed | DiscoverError::Io(_) => {
                Shaken::Refused("the target closed the connection during the handshake".to_owned())
            }
            other => Shaken::Failed(other),
        };
        self.send(&client.take()).map_err(cut)?;
        loop {
            let len = self.receive(None).map_err(cut)?;
            let result = client.feed(&self.received[..len]);
            let answer = client.take();
            let sent = if answer.is_empty() { Ok(()) } else { self.send(&answer) };
            match result {
                Ok(Progress::Running) => sent.map_err(cut)?,
                Ok(Progress::Done) => {
                    sent.map_err(cut)?;
                    break;
                }
                Err(failure) => {
                    return Err(match failure.cause {
                        Cause::Alert { .. } | Cause::Protocol { .. } => {
                            Shaken::Refused(failure.to_string())
                        }
                        _ => failed(failure.to_string()),
                    });
                }
            }
        }
        let established =
            client.finish().ok_or_else(|| failed("the handshake came to nothing".to_owned()))?;
        offers.took(index);
        let mut session = Session::new(&established, offers.updates);
        let mut leftover = established.leftover;
        let early = &mut self.early;
        let opened =
            session.open(&mut leftover, &mut |plain| early.extend_from_slice(plain.bytes()));
        opened.map_err(|error| failed(error.to_string()))?;
        self.session = Some(session);
        Ok(())
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), DiscoverError> {
        let Some(session) = &mut self.session else { return self.send(bytes) };
        let mut records = Vec::new();
        session
            .seal_slices(&[bytes], &mut records)
            .map_err(|error| DiscoverError::Security(format!("TLS: {error}")))?;
        self.send(&records)
    }

    /// Waits for bytes, or until `wake`, a time since the start (then there may be none).
    pub(super) fn read(
        &mut self,
        plain: &mut Vec<u8>,
        wake: Option<Duration>,
    ) -> Result<(), DiscoverError> {
        plain.clear();
        if !self.early.is_empty() {
            std::mem::swap(plain, &mut self.early);
            return Ok(());
        }
        let len = self.receive(wake)?;
        let received = &mut self.received[..len];
        let Some(session) = &mut self.session else {
            plain.extend_from_slice(received);
            return Ok(());
        };
        let opened = session.open(received, &mut |part| plain.extend_from_slice(part.bytes()));
        if let Err(error) = opened {
            let mut alert = Vec::new();
            session.farewell(error, &mut alert);
            // A courtesy: the connection is over either way.
            let _ = self.send(&alert);
            return Err(DiscoverError::Security(format!("TLS: {error}")));
        }
        if plain.is_empty() && session.is_peer_closed() {
            return Err(DiscoverError::Closed);
        }
        Ok(())
    }

    /// Time left; none is an error.
    fn left(&self) -> Result<Duration, DiscoverError> {
        let left = self.timeout.saturating_sub(self.start.elapsed());
        if left.is_zero() { Err(DiscoverError::Timeout(self.timeout)) } else { Ok(left) }
    }

    fn io_error(&self, error: io::Error) -> DiscoverError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                DiscoverError::Timeout(self.timeout)
            }
            io::ErrorKind::UnexpectedEof => DiscoverError::Closed,
            _ => DiscoverError::Io(error),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), DiscoverError> {
        let left = self.left()?;
        self.socket.set_write_timeout(Some(left)).map_err(DiscoverError::Io)?;
        self.socket.write_all(bytes).map_err(|error| self.io_error(error))
    }

    fn receive(&mut self, wake: Option<Duration>) -> Result<usize, DiscoverError> {
        let left = self.left()?;
        let wake = wake.map(|at| at.saturating_sub(self.start.elapsed()));
        // A wait of zero would be one without end.
        let wait = wake
            .unwrap_or(left)
            .clamp(Duration::from_millis(1), left.max(Duration::from_millis(1)));
        self.socket.set_read_timeout(Some(wait)).map_err(DiscoverError::Io)?;
        match self.socket.read(&mut self.received) {
            Ok(0) if self.session.is_some() => Err(DiscoverError::CutOff),
            Ok(0) => Err(DiscoverError::Closed),
            Ok(len) => Ok(len),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::TimedOut
                | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(self.io_error(error)),
            },
        }
    }
}

impl Drop for Wire {
    /// The controller is told that nothing follows (RFC 8446, section 6.1), if the socket has room.
    fn drop(&mut self) {
        let Some(session) = &mut self.session else { return };
        let mut end = Vec::new();
        session.close(&mut end);
        if !end.is_empty() && self.socket.set_nonblocking(true).is_ok() {
            // A courtesy: the connection is over either way.
            let _ = self.socket.write(&end);
        }
    }
}

/// How a handshake failed.
enum Shaken {
    /// The target does not take the key that was offered.
    Refused(String),
    Failed(DiscoverError),
}
