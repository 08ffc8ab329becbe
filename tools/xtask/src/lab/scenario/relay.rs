//! A way to a port of the target that can be cut, slowed down and silenced.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::super::service::free_ports;

/// Bytes that go through at a time.
const CHUNK_BYTES: usize = 32 << 10;

/// Forwards the connections that a port gets to another port of this machine.
pub(super) struct Relay {
    pub(super) port: u16,
    to: u16,
    running: Option<Running>,
}

struct Running {
    is_cut: Arc<AtomicBool>,
    way: Arc<Way>,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
    acceptor: JoinHandle<()>,
}

/// What all connections of a relay go through.
#[derive(Default)]
struct Way {
    mode: Mutex<Mode>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Open,
    /// Each piece takes so long, one way.
    Slow(Duration),
    /// Nothing goes through, neither bytes nor the end of a connection, and nobody is told.
    Silent,
    /// What has not gone through never will.
    Cut,
}

impl Way {
    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
        self.changed.notify_all();
    }

    /// Waits until the next piece may go through. `false`: it may not any more.
    fn pass(&self) -> bool {
        let begin = Instant::now();
        let mut mode = self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = match *mode {
                Mode::Open => return true,
                Mode::Cut => return false,
                Mode::Silent => Duration::MAX,
                Mode::Slow(delay) => match delay.checked_sub(begin.elapsed()) {
                    None | Some(Duration::ZERO) => return true,
                    Some(left) => left,
                },
            };
            // The longest wait that the system takes without overflow is a matter of the system.
            let left = left.min(Duration::from_secs(3600));
            mode = self.changed.wait_timeout(mode, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Relay {
    pub(super) fn start(to: u16) -> Result<Relay> {
        let [port] = free_ports()?;
        let mut relay = Relay { port, to, running: None };
        relay.restore()?;
        Ok(relay)
    }

    /// Ends every connection and takes no more.
    pub(super) fn cut(&mut self) -> Result<()> {
        let running = self.running.take().context("cut twice")?;
        running.is_cut.store(true, Ordering::SeqCst);
        running.way.set(Mode::Cut);
        // Wakes the one that accepts.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        let ended = running.acceptor.join();
        for socket in running.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        ended.map_err(|_| anyhow!("the relay's thread panicked"))
    }

    /// Takes connections again.
    pub(super) fn restore(&mut self) -> Result<()> {
        let listener = TcpListener::bind(("127.0.0.1", self.port))?;
        let (is_cut, sockets) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let way = Arc::<Way>::default();
        let (cut, kept, to) = (Arc::clone(&is_cut), Arc::clone(&sockets), self.to);
        let through = Arc::clone(&way);
        let acceptor = std::thread::spawn(move || {
            for near in listener.incoming() {
                if cut.load(Ordering::SeqCst) {
                    return;
                }
                let far = TcpStream::connect(("127.0.0.1", to));
                let (Ok(near), Ok(far)) = (near, far) else { continue };
                // A connection that cannot be set up is one that ends at once.
                let _ =
                    forward(&near, &far, &through).and_then(|()| forward(&far, &near, &through));
                kept.lock().unwrap_or_else(PoisonError::into_inner).extend([near, far]);
            }
        });
        self.running = Some(Running { is_cut, way, sockets, acceptor });
        Ok(())
    }

    /// Lets every piece of a connection take so long, one way.
    pub(super) fn slow(&self, delay: Duration) -> Result<()> {
        self.set(Mode::Slow(delay))
    }

    /// Lets nothing through any more, without telling anybody. What has been sent goes through when
    /// the relay is open again, however late.
    pub(super) fn silence(&self) -> Result<()> {
        self.set(Mode::Silent)
    }

    /// Ends [`Relay::slow`] and [`Relay::silence`].
    pub(super) fn open(&self) -> Result<()> {
        self.set(Mode::Open)
    }

    fn set(&self, mode: Mode) -> Result<()> {
        let running = self.running.as_ref().context("the relay is cut")?;
        running.way.set(mode);
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.running.is_some() {
            let _ = self.cut();
        }
    }
}

/// Moves bytes one way on a thread of its own, until either end is gone.
fn forward(from: &TcpStream, to: &TcpStream, way: &Arc<Way>) -> std::io::Result<()> {
    let (mut from, mut to, way) = (from.try_clone()?, to.try_clone()?, Arc::clone(way));
    from.set_nodelay(true)?;
    std::thread::spawn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let len = from.read(&mut chunk).unwrap_or(0);
            if !way.pass() || len == 0 || to.write_all(&chunk[..len]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::service::is_listening;
    use super::*;

    /// A connection through a relay, both ends.
    fn connect(relay: &Relay, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(("127.0.0.1", relay.port)).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_relay_is_cut_and_restored() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut relay = Relay::start(listener.local_addr().unwrap().port()).unwrap();
        for _ in 0..2 {
            let (mut near, mut far) = connect(&relay, &listener);
            near.write_all(b"ping").unwrap();
            let mut said = [0; 4];
            far.read_exact(&mut said).unwrap();
            far.write_all(b"pong").unwrap();
            near.read_exact(&mut said).unwrap();
            assert_eq!(&said, b"pong");
            relay.cut().unwrap();
            assert!(matches!(near.read(&mut said), Ok(0) | Err(_)), "the connection is cut");
            assert!(!is_listening(relay.port));
            relay.restore().unwrap();
        }
    }

    #[test]
    fn a_silent_relay_keeps_what_it_got_and_a_slow_one_takes_its_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut relay = Relay::start(listener.local_addr().unwrap().port()).unwrap();
        let (mut near, mut far) = connect(&relay, &listener);
        let mut said = [0; 4];
        let delay = Duration::from_millis(30);
        relay.slow(delay).unwrap();
        let begin = Instant::now();
        near.write_all(b"slow").unwrap();
        far.read_exact(&mut said).unwrap();
        assert!(&said == b"slow" && begin.elapsed() >= delay);

        relay.silence().unwrap();
        near.write_all(b"held").unwrap();
        far.set_read_timeout(Some(delay)).unwrap();
        // Neither the bytes nor the end come through.
        near.shutdown(Shutdown::Both).unwrap();
        assert!(far.read(&mut said).is_err());
        far.set_read_timeout(None).unwrap();
        relay.open().unwrap();
        far.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"held");
        assert_eq!(far.read(&mut said).unwrap(), 0);

        // What a cut finds on its way is lost.
        let (mut near, mut far) = connect(&relay, &listener);
        relay.silence().unwrap();
        near.write_all(b"lost").unwrap();
        relay.cut().unwrap();
        assert!(matches!(far.read(&mut said), Ok(0) | Err(_)));
    }
}
