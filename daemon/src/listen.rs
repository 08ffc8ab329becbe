//! Listeners: bound by `std`, accepted on tokio, handed over to the target's cores.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use nvmf_target::Target;
use reactor::Socket;

use crate::config::{Listen, TargetConfig};

/// How long accepting rests when the system is out of something.
const REST: Duration = Duration::from_millis(200);

/// Listeners that have their address.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) io: Vec<(Listen, TcpListener)>,
    pub(crate) discovery: Vec<(Listen, TcpListener)>,
}

/// Binds every address of the target. One clear line if one cannot be had.
pub(crate) fn bind_all(config: &TargetConfig) -> anyhow::Result<Bound> {
    let bind = |listeners: &[Listen], flag: &str| -> anyhow::Result<Vec<_>> {
        listeners.iter().map(|listen| Ok((*listen, self::bind(listen.addr, flag)?))).collect()
    };
    Ok(Bound {
        io: bind(&config.listen, "--listen")?,
        discovery: bind(&config.discovery, "--discovery")?,
    })
}

/// Binds an address that `flag` has named.
pub(crate) fn bind(addr: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).map_err(|error| anyhow!(refusal(addr, flag, &error)))
}

/// What happened and what to do about it.
fn refusal(addr: SocketAddr, flag: &str, error: &io::Error) -> String {
    let port = addr.port();
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another process uses this port: stop it (`ss -ltnp 'sport = :{port}'` shows it), or \
             choose another with {flag} {}:{}",
            host(addr),
            if port == 4420 { 4421 } else { port.wrapping_add(1).max(1024) },
        ),
        io::ErrorKind::PermissionDenied => format!(
            "ports below 1024 need root or CAP_NET_BIND_SERVICE: choose another with {flag} \
             {}:4420, or run as root",
            host(addr)
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "no interface of this machine has this address: `ip addr` shows those there are, \
             choose one with {flag}"
        ),
        _ => format!("choose another with {flag}"),
    };
    format!("cannot listen on {addr}: {error}; {hint}")
}

fn host(addr: SocketAddr) -> String {
    if addr.is_ipv6() { format!("[{}]", addr.ip()) } else { addr.ip().to_string() }
}

/// Accepts until the task is aborted.
pub(crate) fn accept(
    listener: TcpListener,
    target: Arc<Target>,
    port: u16,
) -> io::Result<tokio::task::JoinHandle<()>> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Ok(tokio::spawn(async move {
        let mut complained = false;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    complained = false;
                    match hand_over(stream) {
                        Ok(socket) => target.add_connection(socket, port),
                        Err(error) => tracing::warn!(%peer, %error, "connection lost at once"),
                    }
                }
                // The peer was gone before we took it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors or memory: it will pass, or the operator has to act; either
                    // way one line is enough.
                    if !complained {
                        tracing::error!(%error, "cannot accept connections for now");
                        complained = true;
                    }
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }))
}

/// From tokio to the ring, which wants a blocking descriptor: it waits itself.
fn hand_over(stream: tokio::net::TcpStream) -> io::Result<Socket> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(Socket::from(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: SocketAddr) -> TargetConfig {
        let mut draft = crate::Draft::new();
        draft.add_volume("a=null:1MiB").unwrap();
        draft.set_listen(&[listen.to_string()]);
        draft.check().unwrap().target.unwrap()
    }

    #[test]
    fn a_port_in_use_says_what_to_do() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = taken.local_addr().unwrap();
        let message = bind_all(&config(addr)).unwrap_err().to_string();
        assert!(message.starts_with(&format!("cannot listen on {addr}: ")), "{message}");
        assert!(message.contains("another process uses this port"), "{message}");
        assert!(message.contains("--listen 127.0.0.1:"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }

    #[test]
    fn a_foreign_address_says_what_to_do() {
        // TEST-NET-1: no interface has it.
        let message = bind_all(&config("192.0.2.1:4420".parse().unwrap())).unwrap_err().to_string();
        assert!(message.contains("no interface of this machine"), "{message}");
    }

    #[test]
    fn missing_rights_say_what_to_do() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let message = refusal("[::1]:80".parse().unwrap(), "--discovery", &denied);
        assert!(message.contains("CAP_NET_BIND_SERVICE"), "{message}");
        assert!(message.contains("--discovery [::1]:4420"), "{message}");
    }
}
