//! Reading a discovery log, for the control plane: blocking, on a socket of its own, over in
//! bounded time.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nvme::host::discovery::{Client, ClientConfig, ClientState, Discovered};
use nvme::host::{AdminCommand, ConnectNames, SessionError, TAGS};
use nvme::spec::Nqn;
use nvme::tcp::{Crc32c, Fault, Host, HostConfig, HostEvent, Transfer};

/// Received at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// Whom to ask, and as whom.
#[derive(Clone, Debug)]
pub struct DiscoverConfig {
    /// The discovery controller's listener.
    pub addr: SocketAddr,
    /// Discovery subsystem; [`Nqn::discovery`] unless it has a name of its own.
    pub subnqn: Nqn,
    /// NQN this host goes by.
    pub hostnqn: Nqn,
    /// Host Identifier that belongs to `hostnqn`; not zero.
    pub hostid: [u8; 16],
    /// How long all of it may take.
    pub timeout: Duration,
}

/// A discovery log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// Nobody answers there.
    #[error("connecting to {addr}")]
    Connect {
        /// The listener.
        addr: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The controller closed the connection in the middle.
    #[error("the controller closed the connection")]
    Closed,
    /// It took too long.
    #[error("the log was not read within {0:?}")]
    Timeout(Duration),
    /// The controller broke the protocol.
    #[error("the controller broke the protocol")]
    Protocol(#[source] Fault),
    /// The controller ended the connection because of something we sent.
    #[error("the controller ended the connection with fatal error status {0:#06x}")]
    Terminated(u16),
    /// The controller refused or contradicted itself.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Connects to a discovery controller, reads its log page and shuts the controller down again.
///
/// Blocks the calling thread for at most `timeout`, whatever the controller does.
///
/// # Errors
/// [`DiscoverError`] says what went wrong and at which step.
pub fn discover(config: &DiscoverConfig) -> Result<Discovered, DiscoverError> {
    let start = Instant::now();
    let connect = |source| DiscoverError::Connect { addr: config.addr, source };
    let socket =
        TcpStream::connect_timeout(&config.addr, config.timeout.max(Duration::from_millis(1)))
            .map_err(connect)?;
    socket.set_nodelay(true).map_err(DiscoverError::Io)?;
    let client = Client::new(ClientConfig {
        names: ConnectNames {
            hostnqn: config.hostnqn.clone(),
            hostid: config.hostid,
            subnqn: config.subnqn.clone(),
        },
        command_timeout: config.timeout,
    });
    let host = Host::new(HostConfig { queue_depth: TAGS, ..HostConfig::default() });
    let mut reader = Reader {
        socket,
        start,
        timeout: config.timeout,
        client,
        host,
        data: Vec::new(),
        received: 0,
    };
    let result = reader.run();
    if let Err(DiscoverError::Protocol(fault)) = &result {
        // A courtesy: the connection is over either way.
        let _ = reader.socket.write_all(&reader.host.term_req(fault));
    }
    result
}

struct Reader {
    socket: TcpStream,
    start: Instant,
    timeout: Duration,
    client: Client,
    host: Host,
    /// Of the command in flight, of which there is one at a time.
    data: Vec<u8>,
    received: usize,
}

impl Reader {
    fn run(&mut self) -> Result<Discovered, DiscoverError> {
        self.write(&self.host.icreq())?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let now = self.start.elapsed();
            if self.host.is_initialized() {
                while let Some(command) = self.client.next_command(now) {
                    self.send(&command)?;
                }
                match self.client.state() {
                    ClientState::Reading => {}
                    ClientState::Done(log) => return Ok(log.clone()),
                    ClientState::Failed(error) => return Err(error.clone().into()),
                }
            }
            let len = self.read(&mut chunk)?;
            let mut input = &chunk[..len];
            while let Some(event) = self.host.next(&mut input).map_err(DiscoverError::Protocol)? {
                match event {
                    HostEvent::Initialized => {}
                    HostEvent::Data { offset, bytes, .. } => {
                        let end = offset as usize + bytes.len();
                        if let Some(place) = self.data.get_mut(offset as usize..end) {
                            place.copy_from_slice(bytes);
                            self.received = end;
                        }
                    }
                    HostEvent::Complete { cid, cqe } => {
                        let data = &self.data[..self.received];
                        self.client.on_completion(cid, &cqe, data, self.start.elapsed())?;
                    }
                    // All our data travels in capsules, so the machine takes an R2T for a fault.
                    HostEvent::R2t { .. } => {}
                    HostEvent::Terminated { fes } => return Err(DiscoverError::Terminated(fes)),
                }
            }
        }
    }

    fn send(&mut self, command: &AdminCommand) -> Result<(), DiscoverError> {
        self.data.clear();
        self.data.resize(command.read_len as usize, 0);
        self.received = 0;
        let data = command.write.as_deref().unwrap_or(&[]);
        let transfer = match (data.len(), command.read_len) {
            (0, 0) => Transfer::None,
            (0, len) => Transfer::Read { len },
            (len, _) => Transfer::Write { len: len as u32, in_capsule: true },
        };
        let mut pdu = self.host.command(command.tag, &command.sqe, transfer).to_vec();
        pdu.extend_from_slice(data);
        if !data.is_empty() && self.host.data_digest() {
            pdu.extend_from_slice(&Crc32c::of(data));
        }
        self.write(&pdu)
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

    fn write(&mut self, bytes: &[u8]) -> Result<(), DiscoverError> {
        let left = self.left()?;
        self.socket.set_write_timeout(Some(left)).map_err(DiscoverError::Io)?;
        self.socket.write_all(bytes).map_err(|error| self.io_error(error))
    }

    /// Waits for bytes, or until the client wants to be called again (then there are none).
    fn read(&mut self, chunk: &mut [u8]) -> Result<usize, DiscoverError> {
        let left = self.left()?;
        let wake = self.client.deadline().map(|at| at.saturating_sub(self.start.elapsed()));
        // A wait of zero would be one without end.
        let wait = wake
            .unwrap_or(left)
            .clamp(Duration::from_millis(1), left.max(Duration::from_millis(1)));
        self.socket.set_read_timeout(Some(wait)).map_err(DiscoverError::Io)?;
        match self.socket.read(chunk) {
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

#[cfg(test)]
mod tests;
