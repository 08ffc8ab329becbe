//! What the control thread of a device is made of: a listening Unix socket, and an eventfd that
//! wakes the thread out of its `poll`. None of it is for cores.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sys;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait while a client is served.
const BACKLOG: i32 = 16;

/// How long the set-up of other sockets in the same folder is waited for.
const FOLDER_LOCK_LIMIT: Duration = Duration::from_secs(5);
/// How often the folder's lock is tried.
const FOLDER_LOCK_PAUSE: Duration = Duration::from_millis(1);

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Something else has this name.
    #[error("{} exists and is not a socket; choose another path or remove it", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another process serves it.
    #[error("{} is in use: another process listens on it", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot {step} {}", path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A listening socket. Its file is removed on drop, if it is still this socket's.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    /// Path, device and inode of the socket file, if it is ours to remove.
    file: Option<(PathBuf, (u64, u64))>,
}

impl Listener {
    /// Listen on `path`. A socket file that nobody listens on any more is replaced; `mode` are the
    /// permission bits of the new one.
    pub fn new(path: &Path, mode: u32) -> Result<Listener, ListenError> {
        let io = |step| {
            move |error: Errno| ListenError::Io {
                step,
                path: path.to_path_buf(),
                source: error.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(io("use the path"))?;
        // Of two processes that find the same stale file one must not remove the other's new one.
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder =
            rustix::fs::open(folder, flags, Mode::empty()).map_err(io("open the folder of"))?;
        // Somebody else's socket in the same folder is no conflict: its set-up is waited for, but not
        // for ever, since whoever may read the folder may lock it.
        let end = Instant::now() + FOLDER_LOCK_LIMIT;
        loop {
            match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                    std::thread::park_timeout(FOLDER_LOCK_PAUSE);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(io("lock the folder of")(error)),
            }
        }
        remove_stale(path, &address)?;

        let socket = new_socket().map_err(io("make a socket for"))?;
        rustix::net::bind(&socket, &address).map_err(io("bind"))?;
        // Nobody can connect before `listen`, so the file is never open to more than `mode` says.
        let failed = |step, source| ListenError::Io { step, path: path.into(), source };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(|error| failed("set permissions of", error))?;
        let metadata = fs::symlink_metadata(path).map_err(|error| failed("look at", error))?;
        rustix::net::listen(&socket, BACKLOG).map_err(io("listen on"))?;
        let file = (metadata.dev(), metadata.ino());
        Ok(Listener { fd: socket, file: Some((path.into(), file)) })
    }

    /// A socket that somebody else listens with too: whoever keeps it over restarts of this
    /// process, and owns its file.
    pub fn adopt(fd: OwnedFd) -> io::Result<Listener> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Listener { fd, file: None })
    }

    /// For `poll`: readable when a client waits.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The next client, if one waits. Its socket does not block.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.fd, flags) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, file)) = &self.file else { return };
        let is_ours = |m: fs::Metadata| (m.dev(), m.ino()) == *file;
        if fs::symlink_metadata(path).is_ok_and(is_ours) {
            // If it cannot be removed, the next one to listen replaces it.
            let _ = fs::remove_file(path);
        }
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let failed = |step, source| ListenError::Io { step, path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    let probe = new_socket().map_err(|error| failed("make a socket for", error.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            fs::remove_file(path).map_err(|error| failed("replace the unused socket", error))
        }
        Err(Errno::NOENT) => Ok(()),
        // EAGAIN: so many wait already.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.into() }),
        Err(error) => Err(failed("find out whether somebody listens on", error.into())),
    }
}

/// Wakes a control thread out of its `poll`. Cheap to clone; any thread may wake.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Makes the eventfd.
    pub fn new() -> io::Result<Waker> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Waker(Arc::new(eventfd)))
    }

    /// Wakes the thread, now or when it next waits.
    pub fn wake(&self) {
        signal(&*self.0);
    }

    /// What the thread waits for.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Forgets wake-ups so far. Look for what they were for afterwards.
    pub fn clear(&self) {
        // EAGAIN: there was none.
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }
}

/// Takes an eventfd of a peer, to signal it: checks that it is one, and makes it non-blocking, so
/// that a full counter does not hold us up.
///
/// This binds a peer that plays by the rules, not a hostile one: the flag belongs to the open file,
/// which the peer has as well. It can clear the flag later and fill the counter, and then a write
/// waits until somebody reads. Nothing better is known: an eventfd cannot be opened anew, takes no
/// write with RWF_NOWAIT, and to look before each write would cost a system call and still race.
pub fn adopt_eventfd(fd: OwnedFd) -> io::Result<OwnedFd> {
    // Without /proc there is nothing to tell them apart by.
    if let Ok(found) = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        && found.as_os_str() != "anon_inode:[eventfd]"
    {
        let what = format!("{} instead of an eventfd", found.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(fd)
}

/// Makes each peek of a Unix stream go on where the last one ended, beginning `offset` bytes after
/// what was consumed. The kernel keeps the offset with the socket and takes off what is consumed,
/// so it tells a process that took the socket over how much its predecessor had peeked at and not
/// consumed.
pub fn set_peek_offset(socket: impl AsFd, offset: i32) -> io::Result<()> {
    sys::set_peek_offset(socket.as_fd(), offset)
}

/// Where the next peek begins; negative if [`set_peek_offset`] was never called.
pub fn peek_offset(socket: impl AsFd) -> io::Result<i32> {
    sys::peek_offset(socket.as_fd())
}

/// Signals an eventfd that does not block. A full counter means that whoever waits has been told
/// already. Of a peer's eventfd the peer decides whether it blocks ([`adopt_eventfd`]).
pub fn signal(eventfd: impl AsFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests;
