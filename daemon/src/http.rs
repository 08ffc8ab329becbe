//! The management API's server: HTTP/1.1, every piece of it bounded.
//!
//! The Unix socket is for its owner alone (mode 0600): whoever can change what hosts see has an
//! account on this machine. On TCP there is TLS and a certificate of the operator's authority
//! ([`tls`]). A connection carries one request; what it may take in memory, time and company is
//! bounded, and what makes no sense gets an answer in JSON.

mod routes;
pub(crate) mod tls;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;

pub(crate) use routes::{devices, router};

/// Connections served at a time; more wait in the socket's queue, which has room for as many.
const CONNECTIONS_MAX: usize = 32;
/// How long the head of a request may take.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// How long a connection may take in all: a change as long as it may, and some time for the rest.
const CONNECTION_TIME: Duration = Duration::from_secs(api::TIMEOUT_S_MAX + 30);
/// How long accepting rests when the system is out of something.
const REST: Duration = Duration::from_millis(200);

/// A socket that has its path.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

/// Takes the path. A socket that nobody listens at any more is replaced, and nothing else.
pub(crate) fn bind(path: &Path) -> anyhow::Result<Socket> {
    bind_at(path).with_context(|| format!("management API: cannot listen at {}", path.display()))
}

fn bind_at(path: &Path) -> anyhow::Result<Socket> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("there is something that is no socket; choose another path with --api PATH")
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => bail!(
                "another process listens there; stop it, or choose another path with --api PATH"
            ),
            // Left by a process that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).context("removing a socket nobody listens at")?;
            }
            Err(error) => return Err(error).context("there is a socket that cannot be asked"),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The socket file takes its mode from here: there is no moment in which others may connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)
        .context("choose another path with --api PATH")?;
    rustix::net::listen(&socket, CONNECTIONS_MAX as i32)?;
    Ok(Socket { listener: UnixListener::from(socket), path: path.to_owned() })
}

/// Where a server is.
#[derive(Debug)]
pub(crate) enum Place {
    Socket(PathBuf),
    /// TCP, with TLS.
    Tcp(SocketAddr),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Socket(path) => write!(f, "{}", path.display()),
            Place::Tcp(addr) => write!(f, "https://{addr}"),
        }
    }
}

/// A server; dropping it ends it and takes its socket away.
pub(crate) struct Server {
    place: Place,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if let Place::Socket(path) = &self.place {
            // Gone already if somebody else took it away.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Serves a router at `socket`. Must be called inside a tokio runtime.
pub(crate) fn serve(mut socket: Socket, router: Router) -> anyhow::Result<Server> {
    let listener = tokio::net::UnixListener::from_std(socket.listener.try_clone()?)?;
    // From here on the server takes the path away.
    let path = std::mem::take(&mut socket.path);
    let task = tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut pauses = Pauses::default();
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let Some((stream, _)) = pauses.accepted(listener.accept().await).await else {
                continue;
            };
            let router = router.clone();
            tokio::spawn(async move {
                exchange(stream, router).await;
                drop(place);
            });
        }
    });
    Ok(Server { place: Place::Socket(path), task })
}

/// One request and its answer, within its time.
async fn exchange(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router) {
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong on the way is the caller's to see.
    let _ = tokio::time::timeout(CONNECTION_TIME, connection).await;
}

/// Rests when the system is out of something, and says so once.
#[derive(Default)]
struct Pauses {
    complained: bool,
}

impl Pauses {
    async fn accepted<T>(&mut self, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(accepted) => {
                self.complained = false;
                Some(accepted)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::error!(%error, "the management API takes no requests for now");
                }
                tokio::time::sleep(REST).await;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
