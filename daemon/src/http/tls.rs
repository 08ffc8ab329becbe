//! The management API on TCP: TLS 1.3 and certificates on both ends, nothing else.
//!
//! ```text
//!  accept ─► first byte ─┬─ no TLS ─► one answer that says so
//!                        └─ handshake (a place among those, some seconds) ─► certificate judged
//!                                   └─► a place among the connections ─► HTTP, as on the socket
//! ```
//!
//! Who has a certificate of the operator's authority, which has not revoked it, may do everything.
//! Nothing is resumed, so that each connection shows a certificate that is good now. Strangers take places among handshakes
//! alone: they cannot keep the Unix socket or clients that have a connection from being served.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use api::{Code, Problem};
use axum::Router;
use rustls::CertificateError;
use rustls::server::{NoServerSessionStorage, ServerConfig, WebPkiClientVerifier};
use rustls::version::TLS13;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{CONNECTIONS_MAX, Pauses, Place, Server, exchange};
use crate::config::ApiTls;
use crate::{listen, pem};

/// Handshakes at a time; more wait in the listener's queue.
const HANDSHAKES_MAX: usize = 256;
/// How long a handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// A refused client gets its alert before the connection is reset: its last words are read so long.
const LINGER: Duration = Duration::from_secs(1);
/// No more than that is read of them.
const LINGER_BYTES: u64 = 64 << 10;
/// Refusals in the log, in a second.
const LINES_PER_SECOND: u32 = 5;
/// First byte of a TLS handshake (RFC 8446, 5.1: ContentType).
const HANDSHAKE: u8 = 22;

/// A listener that has its address and its certificates.
pub(crate) struct Listener {
    listener: TcpListener,
    addr: SocketAddr,
    identity: Identity,
}

/// Binds the address and reads the files. One clear line if something is not as it should be.
pub(crate) fn bind(config: &ApiTls) -> anyhow::Result<Listener> {
    let identity = Identity::open(config).context("management API")?;
    let listener = listen::bind(config.addr, "--api-listen").context("management API")?;
    listener.set_nonblocking(true)?;
    let addr = listener.local_addr()?;
    Ok(Listener { listener, addr, identity })
}

/// Serves a router. Must be called inside a tokio runtime.
pub(crate) fn serve(listener: Listener, router: Router) -> anyhow::Result<Server> {
    let Listener { listener, addr, mut identity } = listener;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let task = tokio::spawn(async move {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let refusals = Arc::new(Refusals::default());
        let mut pauses = Pauses::default();
        loop {
            let Ok(turn) = handshakes.clone().acquire_owned().await else { return };
            let Some((stream, peer)) = pauses.accepted(listener.accept().await).await else {
                continue;
            };
            let config = identity.now();
            let (router, places, refusals) = (router.clone(), places.clone(), refusals.clone());
            tokio::spawn(async move {
                let stream =
                    match tokio::time::timeout(HANDSHAKE_TIME, secure(stream, config)).await {
                        Ok(Ok(stream)) => stream,
                        Ok(Err(reason)) => return refusals.say(peer, &reason),
                        Err(_) => return refusals.say(peer, "no certificate in time"),
                    };
                let Ok(place) = places.acquire_owned().await else { return };
                drop(turn);
                exchange(stream, router).await;
                drop(place);
            });
        }
    });
    Ok(Server { place: Place::Tcp(addr), task })
}

/// The server's end of a handshake; `Err` says why there is none.
async fn secure(
    mut stream: TcpStream,
    config: Arc<ServerConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(0) => return Err("it went away without a word".to_owned()),
        Ok(_) if first[0] == HANDSHAKE => {}
        Ok(_) => {
            let _ = stream.write_all(&plain_answer()).await;
            linger(stream).await;
            return Err("it does not speak TLS".to_owned());
        }
        Err(error) => return Err(error.to_string()),
    }
    match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(stream) => Ok(stream),
        Err((error, stream)) => {
            linger(stream).await;
            Err(explain(&error))
        }
    }
}

/// Why there is no connection, with what to do about it where revocation lists are the reason.
fn explain(error: &std::io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    let Some(rustls::Error::InvalidCertificate(problem)) = cause else { return error.to_string() };
    match problem {
        CertificateError::Revoked => {
            "its certificate is revoked by a list of --api-client-crl".to_owned()
        }
        CertificateError::UnknownRevocationStatus => {
            "--api-client-crl has no list of an authority of its certificate: give it one of each \
             authority between it and --api-client-ca"
                .to_owned()
        }
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => format!(
            "a list of --api-client-crl has expired, so that nobody knows what is revoked; renew it \
             ({problem})"
        ),
        _ => error.to_string(),
    }
}

/// What a client gets that speaks HTTP without TLS.
fn plain_answer() -> Vec<u8> {
    let problem = Problem {
        error: Code::Invalid,
        what: "the management API on TCP speaks TLS alone".to_owned(),
        allowed: "https:// with a client certificate".to_owned(),
    };
    let body = serde_json::to_string(&problem).unwrap_or_default();
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Ends a connection so that the client reads what it was told: closing with unread bytes would
/// reset it.
async fn linger(mut stream: TcpStream) {
    let _ = stream.shutdown().await;
    let mut rest = stream.take(LINGER_BYTES);
    let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

/// What the server shows and whom it takes, as the files are now.
struct Identity {
    files: ApiTls,
    /// Of the files that were last looked into, whatever came of it.
    stamps: [Option<Stamp>; 4],
    config: Arc<ServerConfig>,
}

/// Tells one version of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    ino: u64,
    len: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let metadata = std::fs::metadata(path).ok()?;
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Some(Stamp { ino: metadata.ino(), len: metadata.len(), changed })
    }
}

fn stamps(files: &ApiTls) -> [Option<Stamp>; 4] {
    let all =
        [Some(&files.cert), Some(&files.key), Some(&files.client_ca), files.client_crl.as_ref()];
    all.map(|path| Stamp::of(path?))
}

impl Identity {
    fn open(files: &ApiTls) -> anyhow::Result<Identity> {
        let stamps = stamps(files);
        Ok(Identity { files: files.clone(), stamps, config: load(files)? })
    }

    /// Takes up certificates and revocation lists that were renewed. Files that do not fit, as in the middle of a
    /// renewal, change nothing.
    fn now(&mut self) -> Arc<ServerConfig> {
        let stamps = stamps(&self.files);
        if stamps != self.stamps {
            self.stamps = stamps;
            match load(&self.files) {
                Ok(config) => {
                    self.config = config;
                    tracing::info!("the management API has taken up its new certificates");
                }
                Err(error) => {
                    tracing::error!("the management API keeps its old certificates: {error:#}");
                }
            }
        }
        self.config.clone()
    }
}

fn load(files: &ApiTls) -> anyhow::Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = pem::certificates(&files.cert).context("--api-cert")?;
    let key = pem::key(&files.key).context("--api-key")?;
    let roots = pem::roots(&files.client_ca).context("--api-client-ca")?;
    let mut clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    if let Some(path) = &files.client_crl {
        // The whole chain is judged, and what no list knows of is refused, as by an old list.
        let lists = pem::revocations(path).context("--api-client-crl")?;
        clients = clients.with_crls(lists).enforce_revocation_expiration();
    }
    let clients = clients.build().with_context(|| match &files.client_crl {
        Some(path) => format!("--api-client-ca and --api-client-crl {}", path.display()),
        None => "--api-client-ca".to_owned(),
    })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .with_context(|| {
            let (cert, key) = (files.cert.display(), files.key.display());
            format!("--api-cert {cert} and --api-key {key}")
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Lines about clients that were refused: so many in a second.
struct Refusals {
    second: Mutex<(Instant, u32)>,
}

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals { second: Mutex::new((Instant::now(), 0)) }
    }
}

impl Refusals {
    fn say(&self, peer: SocketAddr, reason: &str) {
        let mut second = self.second.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if second.0.elapsed() >= Duration::from_secs(1) {
            *second = (Instant::now(), 0);
        }
        if second.1 < LINES_PER_SECOND {
            second.1 += 1;
            tracing::warn!(%peer, reason, "the management API has refused a client");
        }
    }
}
