//! The management API's server: HTTP/1.1 on a Unix socket, every piece of it bounded.
//!
//! The socket is for its owner alone (mode 0600), and there is no TCP listener: whoever can change
//! what hosts see has an account on this machine. A connection carries one request; what it may
//! take in memory, time and company is bounded, and what makes no sense gets an answer in JSON.

mod routes;

use std::io;
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

/// A server; dropping it ends it and takes the socket away.
pub(crate) struct Server {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        // Gone already if somebody else took it away.
        let _ = std::fs::remove_file(&self.path);
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
        let mut complained = false;
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::error!(%error, "the management API takes no requests for now");
                    }
                    tokio::time::sleep(REST).await;
                    continue;
                }
            };
            complained = false;
            let service = TowerToHyperService::new(router.clone());
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .max_buf_size(HEAD_BYTES_MAX)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(async move {
                // What goes wrong on the way is the caller's to see.
                let _ = tokio::time::timeout(CONNECTION_TIME, connection).await;
                drop(place);
            });
        }
    });
    Ok(Server { path, task })
}

#[cfg(test)]
mod tests;
