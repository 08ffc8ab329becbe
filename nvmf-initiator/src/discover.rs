//! Reading a discovery log, for the control plane: blocking, on a socket of its own, over in
//! bounded time.

mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crypto::psk::IdentityVersion;
use nvme::host::discovery::{Client, ClientConfig, ClientState, Discovered};
use nvme::host::{AdminCommand, Authenticate, ConnectNames, SessionError, TAGS};
use nvme::spec::{Cqe, Nqn};
use nvme::tcp::{Crc32c, Fault, Host, HostConfig, HostEvent, Transfer};

use crate::auth::{self, Auth, RECEIVE_BYTES};
use crate::link::Loss;
use crate::security::{Offers, Security, Tls};
use wire::{Wire, getrandom};

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
    /// TLS and authentication.
    pub security: Security,
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
    /// TLS or authentication did not come about; the text says why and what to do.
    #[error("{0}")]
    Security(String),
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The controller closed the connection in the middle.
    #[error("the controller closed the connection")]
    Closed,
    /// The connection ended without the end of TLS (close_notify).
    #[error("the connection was cut off: it ended without the end of TLS (close_notify)")]
    CutOff,
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
    config.security.check().map_err(|(key, value, allowed)| {
        DiscoverError::Security(format!("{key}: {value} is not allowed; {allowed}"))
    })?;
    let start = Instant::now();
    let mut offers = match &config.security.tls {
        Tls::Keys(tls) => {
            let offers = Offers::new(tls, config.hostnqn.as_str(), config.subnqn.as_str());
            Some(offers.map_err(|error| DiscoverError::Security(format!("TLS: {error}")))?)
        }
        Tls::Off | Tls::Concatenate => None,
    };
    loop {
        match attempt(config, start, offers)? {
            Read::Done(log) => return Ok(log),
            Read::Renewed(generated) => offers = Some(generated),
        }
    }
}

fn attempt(
    config: &DiscoverConfig,
    start: Instant,
    offers: Option<Arc<Offers>>,
) -> Result<Read, DiscoverError> {
    let wire = Wire::open(config.addr, start, config.timeout, offers)?;
    let client = Client::new(ClientConfig {
        names: config.names(),
        command_timeout: config.timeout,
        // What the controller asks for is judged here.
        authenticate: Authenticate::Always,
        kato: Duration::ZERO,
    });
    let host = Host::new(HostConfig { queue_depth: TAGS, ..HostConfig::default() });
    let mut reader =
        Reader { config, wire, client, host, auth: None, data: Vec::new(), received: 0 };
    let result = reader.run();
    if let Err(DiscoverError::Protocol(fault)) = &result {
        // A courtesy: the connection is over either way.
        let _ = reader.wire.write(&reader.host.term_req(fault));
    }
    result
}

impl DiscoverConfig {
    fn names(&self) -> ConnectNames {
        ConnectNames {
            hostnqn: self.hostnqn.clone(),
            hostid: self.hostid,
            subnqn: self.subnqn.clone(),
        }
    }
}

impl From<Loss> for DiscoverError {
    fn from(loss: Loss) -> DiscoverError {
        DiscoverError::Security(loss.to_string())
    }
}

/// How an attempt ended that did not fail.
enum Read {
    Done(Discovered),
    /// The authentication made this key for TLS: again with it.
    Renewed(Arc<Offers>),
}

struct Reader<'a> {
    config: &'a DiscoverConfig,
    wire: Wire,
    client: Client,
    host: Host,
    auth: Option<Auth>,
    /// Of the command in flight, of which there is one at a time.
    data: Vec<u8>,
    received: usize,
}

impl Reader<'_> {
    fn run(&mut self) -> Result<Read, DiscoverError> {
        self.wire.write(&self.host.icreq())?;
        let mut chunk = Vec::new();
        loop {
            let now = self.wire.elapsed();
            if self.host.is_initialized() {
                if let Some(offers) = self.authenticate()? {
                    return Ok(Read::Renewed(offers));
                }
                while let Some(command) = self.client.next_command(now) {
                    self.send(&command)?;
                }
                match self.client.state() {
                    ClientState::Reading => {}
                    ClientState::Done(log) => return Ok(Read::Done(log.clone())),
                    ClientState::Failed(error) => return Err(error.clone().into()),
                }
            }
            self.wire.read(&mut chunk, self.client.deadline())?;
            let mut input = &chunk[..];
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
                        match &mut self.auth {
                            Some(auth) => {
                                let status = Cqe::from_bytes(&cqe).status();
                                // This thread may take the time.
                                if let Some(task) = auth.on_completion(status, data)? {
                                    auth.on_computed(task.run());
                                }
                            }
                            None => self.client.on_completion(cid, &cqe, data, now)?,
                        }
                    }
                    // All our data travels in capsules, so the machine takes an R2T for a fault.
                    HostEvent::R2t { .. } => {}
                    HostEvent::Terminated { fes } => return Err(DiscoverError::Terminated(fes)),
                }
            }
        }
    }

    /// Sees to the authentication after Connect. A key for TLS may come of it.
    fn authenticate(&mut self) -> Result<Option<Arc<Offers>>, DiscoverError> {
        let (Some(asked), security) = (self.client.authentication(), &self.config.security) else {
            return Ok(None);
        };
        if self.auth.is_none() {
            let wanted = auth::wanted(security, asked, self.wire.is_tls())?;
            let (Some(concatenation), Some(dhchap)) = (wanted, &security.dhchap) else {
                self.client.authenticated();
                return Ok(None);
            };
            let until = self.config.timeout;
            let names = self.config.names();
            // As many random bytes as there are.
            let mut failed = None;
            let random = &mut || {
                let mut bytes = [0; 8];
                if let Err(error) = getrandom(&mut bytes) {
                    failed = Some(error);
                }
                u64::from_ne_bytes(bytes)
            };
            self.auth = Some(Auth::new(dhchap, &names, concatenation, random, until));
            if let Some(error) = failed {
                return Err(DiscoverError::Io(error));
            }
        }
        let Some(auth) = &mut self.auth else { return Ok(None) };
        if let Some(command) = auth.next_command() {
            let read_len = if command.message.is_some() { 0 } else { RECEIVE_BYTES as u32 };
            self.send(&AdminCommand {
                tag: 0,
                sqe: command.sqe,
                write: command.message,
                read_len,
            })?;
            return Ok(None);
        }
        let Some(outcome) = auth.outcome()? else { return Ok(None) };
        let is_renewed = matches!(security.tls, Tls::Concatenate) && !self.wire.is_tls();
        if is_renewed {
            let no_key = |text: String| DiscoverError::Security(format!("DH-HMAC-CHAP: {text}"));
            let generated = outcome.generated.as_ref();
            let generated = generated.ok_or_else(|| no_key("it made no key for TLS".to_owned()))?;
            let (hostnqn, subnqn) = (self.config.hostnqn.as_str(), self.config.subnqn.as_str());
            let psk = generated.psk(IdentityVersion::V1, hostnqn, subnqn);
            let psk = psk.map_err(|error| no_key(error.to_string()))?;
            return Ok(Some(Offers::generated(psk)));
        }
        self.auth = None;
        self.client.authenticated();
        Ok(None)
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
        self.wire.write(&pdu)
    }
}

#[cfg(test)]
mod tests;
