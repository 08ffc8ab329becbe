//! The handshake of either side.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use s2n_tls::callbacks::{ClientHelloCallback, ConnectionFuture};
use s2n_tls::config::Config;
use s2n_tls::connection::Connection;
use s2n_tls::enums::{Blinding, Mode, PskHmac, SerializationVersion};
use s2n_tls::error::{Error, ErrorType};
use s2n_tls::security::Policy;
use zeroize::Zeroizing;

use super::alert::AlertCode;
use super::client_hello::{Offers, offers_tls_1_3};
use super::ffi::Pipe;
use super::record::Role;
use super::refusal::{Cause, Used};
use crate::kdf::Hash;
use crate::key::TlsKey;
use crate::psk::{Derivation, Identity, Psk, RetainedKey, Suite};
use crate::secret::Secret;

/// Bytes that a peer may send before the handshake ends. The largest message of it, a ClientHello
/// with a hybrid key share and long names, has about 3 KiB.
pub const HANDSHAKE_BYTES_MAX: usize = 16 << 10;
/// Keys that are tried for one identity: eight keys of a host, each in both derivations.
pub const CANDIDATES_MAX: usize = 16;

/// TLS 1.3 only, the hybrid groups first. It has ChaCha20 too, which is refused afterwards.
const POLICY: &str = "AWS-CRT-SDK-TLSv1.3-2025-PQ";
/// For clients with a key of 48 bytes: that suite alone, ML-KEM-1024 and P-384. A server that takes
/// the client's first suite, as OpenSSL does by itself, would otherwise choose one that the key is
/// not for, and drop the key.
const POLICY_SHA384: &str = "20260720";
/// How long the library wants a failed connection to linger at most, so that the time of a failure
/// tells less. It is a remedy for suites that are not spoken here, so it may be short.
const BLINDING_S: u32 = 1;
/// Characters of a peer's identity that are shown.
const SHOWN_MAX: usize = 500;
/// Type of a record that carries handshake messages, and of one that carries an alert.
const HANDSHAKE: u8 = 22;
const ALERT: u8 = 21;

/// Whether a connection begins with TLS, told by its first byte. Plain NVMe/TCP begins with 00h,
/// the type of an ICReq.
pub fn looks_like_tls(first: u8) -> bool {
    first == HANDSHAKE
}

/// Where a server finds its keys. Called during a handshake, with what an unauthenticated peer
/// sent.
pub trait PskLookup: Send + Sync {
    /// The keys that the named host may have for the named subsystem, at most [`CANDIDATES_MAX`] of
    /// them, whatever their identities. The one whose proof the client has given is taken. Usually
    /// [`candidates`] of the host's configured keys.
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown>;
}

/// Why there is no key for an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// No such host is registered.
    #[error("this host is not registered")]
    Host,
    /// The host has no key for this subsystem.
    #[error("this host has no key for this subsystem")]
    Key,
    /// It had one.
    #[error("the key of this host has expired")]
    Expired,
}

/// The pre-shared keys that `keys` give for an identity: of its suite and version, in both
/// derivations.
pub fn candidates<'k>(
    keys: impl IntoIterator<Item = &'k TlsKey>,
    identity: &Identity<'_>,
) -> Vec<Psk> {
    if identity.is_generated {
        return Vec::new();
    }
    let ways = keys.into_iter().flat_map(|key| Derivation::ALL.map(|way| (key, way)));
    let derive = |(key, way)| {
        let key = RetainedKey::new(key, identity.hostnqn, way).ok()?;
        if key.suite() != identity.suite {
            return None;
        }
        key.psk(identity.version, identity.hostnqn, identity.subnqn).ok()
    };
    ways.filter_map(derive).take(CANDIDATES_MAX).collect()
}

/// What a handshake came to.
pub struct Established {
    /// Which end this is.
    pub role: Role,
    /// The cipher suite.
    pub suite: Suite,
    /// For what this end sends.
    pub tx: TrafficSecret,
    /// For what it receives.
    pub rx: TrafficSecret,
    /// Under which identity the key was found. It is proven that the peer has its key.
    pub identity: String,
    /// How that key was derived.
    pub derivation: Derivation,
    /// The group of the key exchange.
    pub group: String,
    /// Bytes behind the handshake, which are for the record layer.
    pub leftover: Vec<u8>,
}

/// The secret of one direction and the number of its next record.
pub struct TrafficSecret {
    pub(super) secret: Secret,
    pub(super) seq: u64,
}

/// Whether a handshake has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It waits for the peer.
    Running,
    /// It has ended well. There may be bytes to send yet.
    Done,
}

/// A handshake failed. Its text is one line for the operator; the peer is told `alert` only.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What happened.
    pub cause: Cause,
    /// What is left to send says this.
    pub alert: Option<AlertCode>,
    /// How long to wait before the connection is closed, so that the time tells less.
    pub close_after: Duration,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl std::error::Error for Failure {}

fn shown(identity: &[u8]) -> String {
    let text = String::from_utf8_lossy(identity);
    text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect()
}

/// What the server chose, or why it chose nothing.
enum Choice {
    Psk { identity: Vec<u8>, name: String, suite: Suite, derivation: Derivation },
    Refused(Cause, AlertCode),
}

type Chosen = Arc<Mutex<Option<Choice>>>;

fn lock(chosen: &Chosen) -> MutexGuard<'_, Option<Choice>> {
    chosen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a server's connection carries for the callback.
struct ServerContext {
    lookup: Arc<dyn PskLookup>,
    chosen: Chosen,
}

/// Gives the connection the one key that its client has.
struct ChoosePsk;

impl ClientHelloCallback for ChoosePsk {
    fn on_client_hello(
        &self,
        connection: &mut Connection,
    ) -> Result<Option<std::pin::Pin<Box<dyn ConnectionFuture>>>, Error> {
        let Some(context) = connection.application_context::<ServerContext>() else {
            return Err(Error::application("no context".into()));
        };
        let (lookup, chosen) = (context.lookup.clone(), context.chosen.clone());
        let hello = connection.client_hello()?;
        let (body, random) = (hello.raw_message()?, hello.random()?);
        let choice = match choose(&body, &random, &*lookup) {
            Ok((offered, psk)) => {
                connection.append_psk(&library_psk(&offered, &psk)?)?;
                Choice::Psk {
                    identity: offered,
                    name: psk.identity().to_owned(),
                    suite: psk.suite(),
                    derivation: psk.derivation(),
                }
            }
            Err((cause, alert)) => Choice::Refused(cause, alert),
        };
        let is_refused = matches!(choice, Choice::Refused(..));
        *lock(&chosen) = Some(choice);
        if is_refused { Err(Error::application("refused".into())) } else { Ok(None) }
    }
}

/// The first offered key that the client has proven to have.
fn choose(
    body: &[u8],
    random: &[u8; 32],
    lookup: &dyn PskLookup,
) -> Result<(Vec<u8>, Psk), (Cause, AlertCode)> {
    let Some(offers) = Offers::parse(body) else {
        if offers_tls_1_3(body) {
            return Err((Cause::NoPsk, AlertCode::HANDSHAKE_FAILURE));
        }
        let what = "it does not offer TLS 1.3".to_owned();
        let cause = Cause::Protocol { what, role: Role::Server, used: None };
        return Err((cause, AlertCode::PROTOCOL_VERSION));
    };
    let mut refusal = (Cause::NoPsk, AlertCode::HANDSHAKE_FAILURE);
    for offer in &offers.list {
        let received = shown(offer.identity);
        let Some(identity) = Identity::parse(offer.identity) else {
            refusal = (Cause::NotNvme { received }, AlertCode::UNKNOWN_PSK_IDENTITY);
            continue;
        };
        let keys = match lookup.find(&identity) {
            Ok(keys) => keys,
            Err(why) => {
                refusal = (Cause::Unknown { received, why }, AlertCode::UNKNOWN_PSK_IDENTITY);
                continue;
            }
        };
        let name = offer.identity.strip_suffix(b"\0").unwrap_or(offer.identity);
        let mut tried = Vec::new();
        for key in keys.iter().take(CANDIDATES_MAX) {
            if key.identity().as_bytes() != name {
                continue;
            }
            if offers.is_proven(offer, key, random) {
                return Ok((offer.identity.to_vec(), key.clone()));
            }
            tried.push(key.derivation());
        }
        refusal = if !tried.is_empty() {
            (Cause::WrongKey { received, tried }, AlertCode::DECRYPT_ERROR)
        } else if keys.is_empty() {
            let cause = Cause::Unknown { received, why: Unknown::Key };
            (cause, AlertCode::UNKNOWN_PSK_IDENTITY)
        } else {
            let mine = keys.iter().take(CANDIDATES_MAX);
            // They have the names in them that the peer sent.
            let expected = mine.map(|k| (shown(k.identity().as_bytes()), k.derivation())).collect();
            (Cause::OtherIdentity { received, expected }, AlertCode::UNKNOWN_PSK_IDENTITY)
        };
    }
    Err(refusal)
}

fn library_psk(identity: &[u8], psk: &Psk) -> Result<s2n_tls::psk::Psk, Error> {
    let mut builder = s2n_tls::psk::Psk::builder()?;
    builder.set_identity(identity)?.set_secret(psk.secret().expose())?.set_hmac(
        match psk.suite().hash() {
            Hash::Sha384 => PskHmac::SHA384,
            Hash::Sha256 | Hash::Sha512 => PskHmac::SHA256,
        },
    )?;
    builder.build()
}

/// The library's settings for a server, or for a client with a key of a suite; each made once.
fn config(key: Option<Suite>) -> Result<Config, Error> {
    static CONFIGS: [OnceLock<Config>; 3] = [const { OnceLock::new() }; 3];
    let (cell, policy) = match key {
        None => (&CONFIGS[0], POLICY),
        Some(Suite::Aes128GcmSha256) => (&CONFIGS[1], POLICY),
        Some(Suite::Aes256GcmSha384) => (&CONFIGS[2], POLICY_SHA384),
    };
    if let Some(config) = cell.get() {
        return Ok(config.clone());
    }
    let mut builder = Config::builder();
    builder
        .with_system_certs(false)?
        .set_security_policy(&Policy::from_version(policy)?)?
        .set_serialization_version(SerializationVersion::V1)?
        .set_max_blinding_delay(BLINDING_S)?;
    if key.is_none() {
        builder.set_client_hello_callback(ChoosePsk)?;
    }
    Ok(cell.get_or_init(|| builder.build().expect("settings without a conflict")).clone())
}

/// The alert for a rule that the peer broke, by the library's name of it.
fn alert_of(name: &str) -> AlertCode {
    match name {
        "S2N_ERR_PROTOCOL_VERSION_UNSUPPORTED" | "S2N_ERR_UNKNOWN_PROTOCOL_VERSION" => {
            AlertCode::PROTOCOL_VERSION
        }
        "S2N_ERR_BAD_MESSAGE" | "S2N_ERR_STUFFER_OUT_OF_DATA" => AlertCode::DECODE_ERROR,
        "S2N_ERR_MISSING_EXTENSION" => AlertCode::MISSING_EXTENSION,
        _ => AlertCode::HANDSHAKE_FAILURE,
    }
}

/// What both roles have.
struct Handshake {
    role: Role,
    pipe: Pipe,
    chosen: Chosen,
    is_first: bool,
    state: State,
}

enum State {
    /// Moved on by `feed`.
    Running,
    Done(Box<Established>),
    Failed(Failure),
}

impl Handshake {
    /// `key` is a client's.
    fn new(key: Option<Suite>, chosen: Chosen) -> Result<Handshake, Error> {
        let role = if key.is_none() { Role::Server } else { Role::Client };
        let mut connection = Connection::new(match role {
            Role::Server => Mode::Server,
            Role::Client => Mode::Client,
        });
        connection
            .set_config(config(key)?)?
            .set_blinding(Blinding::SelfService)?
            .set_waker(Some(Waker::noop()))?;
        if role == Role::Server {
            // Buffers for small records: nothing but the handshake goes through them. A client has
            // few handshakes, and its hello stays in one record.
            connection.prefer_low_latency()?;
        }
        let pipe = Pipe::new(connection, HANDSHAKE_BYTES_MAX)?;
        Ok(Handshake { role, pipe, chosen, is_first: true, state: State::Running })
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<Progress, Failure> {
        match &mut self.state {
            State::Running => {}
            State::Done(established) => {
                established.leftover.extend_from_slice(bytes);
                return Ok(Progress::Done);
            }
            State::Failed(failure) => return Err(failure.clone()),
        }
        if let Some(first) = bytes.first()
            && std::mem::take(&mut self.is_first)
            && !(looks_like_tls(*first) || (*first == ALERT && self.role == Role::Client))
        {
            let cause = Cause::Plaintext { first: *first, role: self.role };
            return self.fail(cause, None, Duration::ZERO);
        }
        self.pipe.buffers().received.extend_from_slice(bytes);
        let result = match self.pipe.connection().poll_negotiate() {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(_)) => Ok(true),
            Poll::Ready(Err(error)) => Err(error),
        };
        match result {
            Ok(false) => {
                let mut buffers = self.pipe.buffers();
                // It asks for more only when it has taken everything.
                let taken = std::mem::take(&mut buffers.taken);
                buffers.received.drain(..taken);
                Ok(Progress::Running)
            }
            Ok(true) => match self.export() {
                Ok(established) => {
                    self.state = State::Done(Box::new(established));
                    Ok(Progress::Done)
                }
                Err(cause) => self.fail(cause, None, Duration::ZERO),
            },
            Err(error) => self.on_error(&error),
        }
    }

    fn on_error(&mut self, error: &Error) -> Result<Progress, Failure> {
        let close_after =
            self.pipe.connection().remaining_blinding_delay().unwrap_or(Duration::ZERO);
        let choice = lock(&self.chosen).take();
        let used = match choice {
            Some(Choice::Refused(cause, alert)) => {
                // Decided by us in a time that tells nothing: no need to wait.
                return self.fail(cause, Some(alert), Duration::ZERO);
            }
            Some(Choice::Psk { name, suite, derivation, .. }) => {
                Some(Used { identity: name, suite, derivation })
            }
            None => None,
        };
        let role = self.role;
        if self.pipe.buffers().is_over_budget {
            return self.fail(Cause::TooLong { role }, Some(AlertCode::DECODE_ERROR), close_after);
        }
        if error.kind() == ErrorType::Alert {
            let code = AlertCode(self.pipe.connection().alert().unwrap_or(0));
            return self.fail(Cause::Alert { code, role, used }, None, close_after);
        }
        let what = format!("{} ({})", error.message(), error.name());
        match error.kind() {
            ErrorType::InternalError | ErrorType::UsageError | ErrorType::UnknownErrorType => {
                let alert = Some(AlertCode::INTERNAL_ERROR);
                self.fail(Cause::Internal { what }, alert, close_after)
            }
            _ => {
                let alert = Some(alert_of(error.name()));
                self.fail(Cause::Protocol { what, role, used }, alert, close_after)
            }
        }
    }

    /// The library writes no alert. Ours can only be one without protection, so it is written as
    /// long as nothing encrypted was.
    fn fail(
        &mut self,
        cause: Cause,
        alert: Option<AlertCode>,
        close_after: Duration,
    ) -> Result<Progress, Failure> {
        let mut buffers = self.pipe.buffers();
        let alert = alert.filter(|_| !buffers.is_protected);
        if let Some(alert) = alert {
            buffers.to_send.extend_from_slice(&alert.plain_record());
        }
        buffers.received = Vec::new();
        drop(buffers);
        let failure = Failure { cause, alert, close_after };
        self.state = State::Failed(failure.clone());
        Err(failure)
    }

    /// Takes out what was agreed on. Afterwards the library's connection is of no use.
    fn export(&mut self) -> Result<Established, Cause> {
        let internal = |error: &Error| Cause::Internal {
            what: format!("{} ({})", error.message(), error.name()),
        };
        let connection = self.pipe.connection();
        let read = |connection: &Connection| -> Result<_, Error> {
            let mut identity = vec![0; connection.negotiated_psk_identity_length()?];
            connection.negotiated_psk_identity(&mut identity)?;
            let mut blob = Zeroizing::new(vec![0; connection.serialization_length()?]);
            connection.serialize(&mut blob)?;
            Ok((identity, blob))
        };
        let group = connection.selected_key_exchange_group().unwrap_or("unknown").to_owned();
        let (negotiated, blob) = read(connection).map_err(|e| internal(&e))?;
        let Some(Choice::Psk { identity, name, suite, derivation }) = lock(&self.chosen).take()
        else {
            return Err(Cause::NoPsk);
        };
        if negotiated != identity {
            return Err(Cause::Internal { what: "another identity than the chosen".to_owned() });
        }
        let Some(Exported { agreed, client, server }) = Exported::parse(&blob, suite) else {
            return Err(Cause::Internal { what: "unknown form of the exported state".to_owned() });
        };
        if agreed != suite.iana() {
            let used = Used { identity: name, suite, derivation };
            return Err(Cause::Suite { agreed, role: self.role, used });
        }
        let (Some(client), Some(server)) = (client, server) else {
            return Err(Cause::Internal { what: "short exported state".to_owned() });
        };
        let (tx, rx) = match self.role {
            Role::Server => (server, client),
            Role::Client => (client, server),
        };
        let mut buffers = self.pipe.buffers();
        let taken = buffers.taken;
        let leftover = buffers.received.split_off(taken);
        buffers.received = Vec::new();
        drop(buffers);
        let role = self.role;
        Ok(Established { role, suite, tx, rx, identity: name, derivation, group, leftover })
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.pipe.buffers().to_send)
    }

    fn finish(self) -> Option<Established> {
        match self.state {
            State::Done(established) => Some(*established),
            State::Running | State::Failed(_) => None,
        }
    }
}

/// The library's serialised connection, version 1.
struct Exported {
    agreed: u16,
    client: Option<TrafficSecret>,
    server: Option<TrafficSecret>,
}

impl Exported {
    /// `None` if it is not of the form that this version of the library is known to write: version
    /// u64, protocol 3 and 4, suite u16, sequence numbers of client and server u64, fragment length
    /// u16, secrets of client, server and resumption; all numbers big-endian.
    fn parse(blob: &[u8], suite: Suite) -> Option<Exported> {
        const FORM: u64 = 1;
        let (form, rest) = blob.split_first_chunk()?;
        let (protocol, rest) = rest.split_first_chunk::<2>()?;
        let (agreed, rest) = rest.split_first_chunk()?;
        let (client_seq, rest) = rest.split_first_chunk()?;
        let (server_seq, rest) = rest.split_first_chunk()?;
        let (_, rest) = rest.split_first_chunk::<2>()?;
        if u64::from_be_bytes(*form) != FORM || *protocol != [3, 4] {
            return None;
        }
        let agreed = u16::from_be_bytes(*agreed);
        let len = suite.hash().len_bytes();
        if agreed != suite.iana() {
            return Some(Exported { agreed, client: None, server: None });
        }
        if rest.len() != 3 * len {
            return None;
        }
        let secret = |at: usize, seq: &[u8; 8]| {
            let secret = Secret::new(&rest[at * len..][..len])?;
            Some(TrafficSecret { secret, seq: u64::from_be_bytes(*seq) })
        };
        Some(Exported { agreed, client: secret(0, client_seq), server: secret(1, server_seq) })
    }
}

/// The handshake of a target.
pub struct Server(Handshake);

impl Server {
    /// A handshake that finds its key by `lookup`.
    pub fn new(lookup: Arc<dyn PskLookup>) -> Result<Server, Failure> {
        let chosen = Chosen::default();
        let mut handshake = Handshake::new(None, chosen.clone()).map_err(|e| set_up(&e))?;
        handshake.pipe.connection().set_application_context(ServerContext { lookup, chosen });
        Ok(Server(handshake))
    }

    /// Takes what the client sent, cut anywhere.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Progress, Failure> {
        self.0.feed(bytes)
    }

    /// What is to be sent; also after a failure.
    pub fn take(&mut self) -> Vec<u8> {
        self.0.take()
    }

    /// What it came to, when done.
    pub fn finish(self) -> Option<Established> {
        self.0.finish()
    }
}

/// The handshake of a host.
pub struct Client(Handshake);

impl Client {
    /// A handshake that offers `psk`. Its first message is there to [`take`](Client::take).
    pub fn new(psk: &Psk) -> Result<Client, Failure> {
        let identity = psk.identity().as_bytes();
        let choice = Choice::Psk {
            identity: identity.to_vec(),
            name: psk.identity().to_owned(),
            suite: psk.suite(),
            derivation: psk.derivation(),
        };
        let make = || {
            let mut handshake =
                Handshake::new(Some(psk.suite()), Arc::new(Mutex::new(Some(choice))))?;
            handshake.pipe.connection().append_psk(&library_psk(identity, psk)?)?;
            Ok(handshake)
        };
        let mut handshake: Handshake = make().map_err(|e| set_up(&e))?;
        handshake.feed(&[])?;
        Ok(Client(handshake))
    }

    /// Takes what the server sent, cut anywhere.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Progress, Failure> {
        self.0.feed(bytes)
    }

    /// What is to be sent; also after a failure.
    pub fn take(&mut self) -> Vec<u8> {
        self.0.take()
    }

    /// What it came to, when done.
    pub fn finish(self) -> Option<Established> {
        self.0.finish()
    }
}

/// Makes what the first handshake of a process makes: the library's settings and state. For a process
/// that gives up its access to files and system calls before that.
pub fn prepare() -> Result<(), Failure> {
    for suite in [None, Some(Suite::Aes128GcmSha256), Some(Suite::Aes256GcmSha384)] {
        let mut handshake = Handshake::new(suite, Chosen::default()).map_err(|e| set_up(&e))?;
        // A host's first message takes random bytes and makes keys; without a key to offer, it fails.
        let _ = handshake.feed(&[]);
    }
    Ok(())
}

fn set_up(error: &Error) -> Failure {
    let what = format!("{} ({})", error.message(), error.name());
    Failure { cause: Cause::Internal { what }, alert: None, close_after: Duration::ZERO }
}
