//! TLS for hosts that know nothing of it: the harness's own hosts speak through a tunnel.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crypto::psk::Psk;
use crypto::tls::{Client, Established, KeyUpdates, Progress, Session};

use crate::wire::PATIENCE;

/// A handshake as a host; what belongs to it is gone from the stream.
///
/// # Errors
/// Socket errors, or `PermissionDenied` with what the handshake says.
pub fn handshake(mut stream: &TcpStream, psk: &Psk) -> io::Result<Established> {
    let denied = |why: String| io::Error::new(io::ErrorKind::PermissionDenied, why);
    let mut client = Client::new(psk).map_err(|failure| denied(failure.to_string()))?;
    let mut buffer = vec![0; 16 << 10];
    stream.write_all(&client.take())?;
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Err(denied("the target has closed the connection".to_owned()));
        }
        let step = client.feed(&buffer[..len]).map_err(|failure| denied(failure.to_string()))?;
        stream.write_all(&client.take())?;
        if step == Progress::Done {
            return client.finish().ok_or_else(|| denied("it came to nothing".to_owned()));
        }
    }
}

/// The first flight of a host, as a stranger may have heard it.
///
/// # Errors
/// The library refuses the key.
pub fn first_flight(psk: &Psk) -> io::Result<Vec<u8>> {
    Client::new(psk)
        .map(|mut client| client.take())
        .map_err(|failure| io::Error::other(failure.to_string()))
}

/// A listener on loopback whose connections go to a target, encrypted; it ends when dropped, and
/// the connections with their ends.
pub struct Tunnel {
    /// Where hosts connect to.
    pub addr: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Tunnel {
    /// A tunnel to `target` with the key of one host.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(target: SocketAddr, psk: &Psk) -> io::Result<Tunnel> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (psk, stopping) = (psk.clone(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if stopping.load(Ordering::Acquire) {
                    return;
                }
                let psk = psk.clone();
                // Dropping the near end is what its host sees of an error.
                std::thread::spawn(move || drop(carry(near, target, &psk)));
            }
        });
        Ok(Tunnel { addr, stop, thread: Some(thread) })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        drop(TcpStream::connect(self.addr));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn carry(mut near: TcpStream, target: SocketAddr, psk: &Psk) -> io::Result<()> {
    let mut far = TcpStream::connect(target)?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    far.set_read_timeout(Some(PATIENCE))?;
    let mut established = handshake(&far, psk)?;
    far.set_read_timeout(None)?;
    let mut leftover = std::mem::take(&mut established.leftover);
    let session = Mutex::new(Session::new(&established, KeyUpdates::Auto));
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut near_in, mut far_out) = (near.try_clone()?, far.try_clone()?);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut buffer, mut sealed) = (vec![0; 64 << 10], Vec::new());
            while let Ok(len @ 1..) = near_in.read(&mut buffer) {
                sealed.clear();
                let is_sealed = lock().seal_slices(&[&buffer[..len]], &mut sealed).is_ok();
                if !is_sealed || far_out.write_all(&sealed).is_err() {
                    break;
                }
            }
            sealed.clear();
            lock().close(&mut sealed);
            let _ = far_out.write_all(&sealed);
            let _ = far_out.shutdown(Shutdown::Both);
        });
        let (mut buffer, mut plain) = (vec![0; 64 << 10], Vec::new());
        let mut wire = &mut leftover[..];
        loop {
            plain.clear();
            let opened = lock().open(wire, &mut |part| plain.extend_from_slice(part.bytes()));
            if opened.is_err() || near.write_all(&plain).is_err() {
                break;
            }
            let Ok(len @ 1..) = far.read(&mut buffer) else { break };
            wire = &mut buffer[..len];
        }
        let _ = near.shutdown(Shutdown::Both);
        let _ = far.shutdown(Shutdown::Both);
    });
    Ok(())
}
