//! Descriptors that operations name: real ones, or objects of a simulated world.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;

use crate::registered::Registered;
use crate::sim::{SimEvent, SimFile, SimSocket};
use crate::sys;

#[derive(Clone)]
pub(crate) enum Source {
    Os(Arc<OwnedFd>),
    File(SimFile),
    Socket(Arc<SimSocket>),
    Event(SimEvent),
}

/// A descriptor for use with a [`Port`](crate::Port). Cheap to clone; closed when the last clone is
/// gone and no operation on it is in flight. Belongs to one core; [`Fd::share`] carries it to
/// others.
#[derive(Clone)]
pub struct Fd(Rc<Inner>);

struct Inner {
    /// Given back before the file is closed.
    registered: Option<Registered>,
    source: Source,
}

impl Fd {
    fn new(source: Source) -> Fd {
        Fd(Rc::new(Inner { registered: None, source }))
    }

    pub(crate) fn registered_as(source: Source, registered: Registered) -> Fd {
        Fd(Rc::new(Inner { registered: Some(registered), source }))
    }

    /// A handle that may go to other threads, naming the same open file.
    pub fn share(&self) -> SharedFd {
        SharedFd(self.0.source.clone())
    }

    /// The real descriptor; `None` for a simulated file.
    pub fn as_os(&self) -> Option<BorrowedFd<'_>> {
        match &self.0.source {
            Source::Os(fd) => Some(fd.as_fd()),
            _ => None,
        }
    }

    pub(crate) fn source(&self) -> &Source {
        &self.0.source
    }

    /// See [`Socket::set_reset_on_close`]; without effect on what is no socket.
    pub(crate) fn set_reset_on_close(&self, resets: bool) -> io::Result<()> {
        match &self.0.source {
            Source::Os(fd) => sys::set_reset_on_close(fd, resets),
            Source::Socket(socket) => {
                socket.set_reset_on_close(resets);
                Ok(())
            }
            Source::File(_) | Source::Event(_) => Ok(()),
        }
    }

    /// The file's place in the core's table of registered files.
    pub(crate) fn registered(&self) -> Option<&Registered> {
        self.0.registered.as_ref()
    }
}

impl From<OwnedFd> for Fd {
    fn from(fd: OwnedFd) -> Fd {
        Fd::new(Source::Os(Arc::new(fd)))
    }
}

impl From<SharedFd> for Fd {
    fn from(shared: SharedFd) -> Fd {
        Fd::new(shared.0)
    }
}

impl From<SimFile> for Fd {
    fn from(file: SimFile) -> Fd {
        Fd::new(Source::File(file))
    }
}

impl From<SimEvent> for Fd {
    fn from(event: SimEvent) -> Fd {
        Fd::new(Source::Event(event))
    }
}

impl fmt::Debug for Fd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.source {
            Source::Os(fd) => f.debug_tuple("Fd").field(fd).finish(),
            Source::File(file) => f.debug_tuple("Fd").field(file).finish(),
            Source::Socket(socket) => f.debug_tuple("Fd").field(socket).finish(),
            Source::Event(event) => f.debug_tuple("Fd").field(event).finish(),
        }
    }
}

/// An [`Fd`] on its way between threads. Each core makes its own `Fd` from it.
#[derive(Clone)]
pub struct SharedFd(pub(crate) Source);

impl From<OwnedFd> for SharedFd {
    fn from(fd: OwnedFd) -> SharedFd {
        SharedFd(Source::Os(Arc::new(fd)))
    }
}

impl fmt::Debug for SharedFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedFd").finish_non_exhaustive()
    }
}

pub(crate) enum SocketKind {
    Os(OwnedFd),
    Sim(SimSocket),
}

/// A connected stream socket that has no [`net::Stream`](crate::net::Stream) yet. Dropping it
/// closes the connection.
pub struct Socket(pub(crate) SocketKind);

impl Socket {
    /// The address of the peer, as text.
    pub fn peer(&self) -> String {
        match &self.0 {
            SocketKind::Os(fd) => match sys::peer_addr(fd.as_fd()) {
                Ok(Some(addr)) => addr.to_string(),
                Ok(None) => "unix socket".to_owned(),
                Err(_) => "disconnected".to_owned(),
            },
            SocketKind::Sim(socket) => socket.peer(),
        }
    }

    pub(crate) fn is_simulated(&self) -> bool {
        matches!(self.0, SocketKind::Sim(_))
    }

    /// Switches Nagle's delay off, where there is one (not on a Unix socket).
    pub(crate) fn set_nodelay(&self) {
        if let SocketKind::Os(fd) = &self.0 {
            let _ = sys::set_nodelay(fd);
        }
    }

    /// Closing this connection discards what the kernel has not sent yet and resets it (`SO_LINGER`
    /// of zero). Without it, bytes of a connection given up can reach the peer long after its
    /// close, when the path comes back. What is on the wire already is out of reach.
    pub fn set_reset_on_close(&self) -> io::Result<()> {
        match &self.0 {
            SocketKind::Os(fd) => sys::set_reset_on_close(fd, true),
            SocketKind::Sim(socket) => {
                socket.set_reset_on_close(true);
                Ok(())
            }
        }
    }

    pub(crate) fn into_fd(self) -> Fd {
        match self.0 {
            SocketKind::Os(fd) => Fd::from(fd),
            SocketKind::Sim(socket) => Fd::new(Source::Socket(Arc::new(socket))),
        }
    }
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Socket {
        Socket(SocketKind::Os(fd))
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Socket {
        Socket(SocketKind::Os(stream.into()))
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Socket {
        Socket(SocketKind::Os(stream.into()))
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.peer()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    #[test]
    fn a_socket_that_resets_on_close_does_not_finish_in_order() {
        for resets in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut far, _) = listener.accept().unwrap();
            let socket = Socket::from(near);
            if resets {
                socket.set_reset_on_close().unwrap();
            }
            drop(socket);
            let end = far.read(&mut [0]).map_err(|error| error.kind());
            assert_eq!(end, if resets { Err(io::ErrorKind::ConnectionReset) } else { Ok(0) });
        }
    }
}
