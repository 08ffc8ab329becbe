//! What a connection needs to outlive this process, killed at any instruction.
//!
//! QEMU does not reconnect. So a supervisor keeps what cannot be made again: the client's socket,
//! the file descriptors the client has passed, and a file in memory (a memfd) that says how far
//! this process had come. It looks into none of them. A successor is given all three and goes on
//! with the same connection: no byte of the stream is lost or read twice, each message has effect
//! once, and each reply is sent once.
//!
//! ```text
//!   supervisor                 this process
//!   ──────────                 ────────────
//!   fds by key  ◄── FdKeeper ── Journal ──► state file:  progress (64 bytes, one write)
//!   state file                                           two sessions, one of them current
//!   listening socket                                     the message at hand and its keys
//!                                                        the reply at hand
//! ```
//!
//! # How
//!
//! - *One write is one step.* A write of 64 bytes within a page of the state file either happens or
//!   does not, since a kill takes effect outside of it. Everything else is written before, to places
//!   that the progress in force does not name.
//! - *Receiving.* Bytes are peeked at, written down and only then consumed. The kernel counts what
//!   was peeked at and not consumed (`SO_PEEK_OFF`), and so tells whether the last step was done. A
//!   peek may come with the file descriptors of the message behind; consuming tells them apart. If
//!   the process dies between that and the note of it, they are taken for this message's, which
//!   matters to a map without a file (a ROM) alone.
//! - *Acting.* The message is whole and written down. If the process dies, the successor is given
//!   it again, and the session sees to it that it has effect once (`Session::on_message_again`).
//! - *Answering.* The reply is written down together with the session it leaves. It goes to the
//!   socket through a pipe that the supervisor keeps too: what is in the pipe has been given away
//!   and not sent, what is not has been sent or not been given. A reply with a file descriptor (that
//!   of a mappable region) cannot go through a pipe; if the process dies within the call that sends
//!   it, it may be sent twice. Clients ask for it once, before their guest runs.
//! - *File descriptors* are with the supervisor before anything says that they are needed, and let
//!   go after nothing does.
//!
//! A planned restart needs nothing else: the process may as well be killed.
//!
//! # Contract with the supervisor
//!
//! - One journal belongs to one device. Its state file begins empty and stays the same file.
//! - [`FdKeeper::keep`] returns when the supervisor is sure to have the duplicate even if this
//!   process dies at once; a successful `sendmsg` on a Unix socket is enough. Keys are never used
//!   for another file while the supervisor has the old one.
//! - A successor gets every file it has not been told to release, in [`Journal::new`]. Files it
//!   does not know are released by it.
//! - Two processes must not work with one journal at a time: the successor starts when its
//!   predecessor is gone.
//! - System calls beyond those of an ordinary server: `pwrite`, `pread`, `splice`, `ioctl(FIONREAD)`
//!   and the socket option `SO_PEEK_OFF`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::session::{Exported, REPORT_BYTES_MAX};
use super::wire::{FDS_MAX, HEADER_BYTES, PAYLOAD_BYTES_MAX};

/// The client's socket.
const SOCKET_KEY: u64 = u64::MAX;
const PIPE_READER_KEY: u64 = u64::MAX - 1;
const PIPE_WRITER_KEY: u64 = u64::MAX - 2;
/// A file that came with a message, before the session gives it a key of its own.
const MESSAGE_KEYS: u64 = 1 << 63;

/// Bytes given to the pipe at once: what POSIX writes whole or not at all.
const CHUNK_BYTES: usize = 4096;

// Layout of the state file. Each part begins on a page.
const PART_BYTES: u64 = 4 << 20;
const SESSION_AT: [u64; 2] = [4096, PART_BYTES];
const MESSAGE_AT: u64 = 2 * PART_BYTES;
const KEYS_AT: u64 = 3 * PART_BYTES;
const REPLY_AT: u64 = 4 * PART_BYTES;
const STATE_BYTES: u64 = 5 * PART_BYTES;

const MESSAGE_BYTES_MAX: usize = HEADER_BYTES + PAYLOAD_BYTES_MAX;
/// The longest reply is a report of dirty pages.
const REPLY_BYTES_MAX: usize = REPORT_BYTES_MAX as usize + 4096;
const _: () = assert!(REPLY_BYTES_MAX < PART_BYTES as usize);

const MAGIC: u64 = u64::from_le_bytes(*b"PSTKJNL1");

/// Keeps file descriptors for a successor. See the [module](self) for the contract.
pub trait FdKeeper: Send {
    /// Keep a duplicate under this key. An error ends the client's connection, so a keeper that has
    /// lost its supervisor for good may rather go on without one.
    fn keep(&mut self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Nothing needs it any more.
    fn release(&mut self, key: u64);
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
struct Phase(u32);

impl Phase {
    /// No client.
    const IDLE: Phase = Phase(0);
    const RECEIVING: Phase = Phase(1);
    const ACTING: Phase = Phase(2);
    const ANSWERING: Phase = Phase(3);
}

/// File descriptors of a message, and those of the next one that came with a peek.
const MESSAGE_FDS_MAX: usize = 2 * FDS_MAX;

/// How far the process has come. Written at once.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
struct Progress {
    magic: u64,
    phase: Phase,
    /// Which of the two sessions is current.
    session: u32,
    session_len: u32,
    /// Bytes of the message at hand.
    message_len: u32,
    /// Of these, peeked at and perhaps not consumed.
    unconsumed: u32,
    /// File descriptors of the message at hand.
    message_fds: u32,
    reply_len: u32,
    /// Bytes of the reply that have been given to the pipe or the socket.
    reply_given: u32,
    /// Bytes of the chunk in the pipe; 0: it is not known to have been given.
    chunk_len: u32,
    /// The reply goes with a file descriptor, and so not through the pipe.
    is_direct: u32,
    /// Message keys given so far.
    keys: u64,
    /// Of the message's file descriptors, those that came with the bytes in `unconsumed`.
    piece_fds: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Progress>() == 64);

/// What a predecessor left of its client.
pub(crate) struct Inherited {
    pub(crate) socket: OwnedFd,
    /// The session, for `Session::import`.
    pub(crate) session: Vec<u8>,
    /// Bytes of the message at hand that have been consumed.
    pub(crate) message: Vec<u8>,
    pub(crate) message_fds: Vec<OwnedFd>,
    /// All others, by key.
    pub(crate) fds: BTreeMap<u64, OwnedFd>,
    /// The message has had its effect, and this is the answer.
    pub(crate) reply: Option<Vec<u8>>,
}

/// The journal of one device.
pub struct Journal {
    state: OwnedFd,
    keeper: Box<dyn FdKeeper>,
    /// Keys that the keeper has.
    kept: BTreeSet<u64>,
    progress: Progress,
    pipe: Option<Pipe>,
    inherited: BTreeMap<u64, OwnedFd>,
    #[cfg(any(test, feature = "testing"))]
    hook: Option<Hook>,
}

/// Called before each step that leaves something behind; a test stops the process there.
#[cfg(any(test, feature = "testing"))]
pub type Hook = Box<dyn FnMut(&'static str) -> io::Result<()> + Send>;

struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("progress", &self.progress).finish_non_exhaustive()
    }
}

impl Journal {
    /// The journal in the file `state`, empty or left by a predecessor, and the files that were
    /// kept with it.
    pub fn new(
        state: OwnedFd,
        keeper: Box<dyn FdKeeper>,
        kept: BTreeMap<u64, OwnedFd>,
    ) -> io::Result<Journal> {
        if rustix::fs::fstat(&state)?.st_size.cast_unsigned() < STATE_BYTES {
            rustix::fs::ftruncate(&state, STATE_BYTES)?;
        }
        let mut bytes = [0; size_of::<Progress>()];
        read_exact(&state, &mut bytes, 0)?;
        let progress: Progress = zerocopy::transmute!(bytes);
        let is_sound = progress.session < 2
            && u64::from(progress.session_len) <= PART_BYTES - 4096
            && progress.message_len as usize <= MESSAGE_BYTES_MAX
            && progress.unconsumed <= progress.message_len
            && progress.message_fds as usize <= MESSAGE_FDS_MAX
            && progress.piece_fds <= progress.message_fds
            && progress.reply_len as usize <= REPLY_BYTES_MAX
            && progress.reply_given <= progress.reply_len;
        let progress = match progress {
            Progress { magic: MAGIC, .. } if is_sound => progress,
            Progress { magic: 0, .. } => Progress { magic: MAGIC, ..Progress::default() },
            _ => {
                let what = "the state file is not that of a vfio-user journal of this version";
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        };
        Ok(Journal {
            state,
            keeper,
            kept: kept.keys().copied().collect(),
            progress,
            pipe: None,
            inherited: kept,
            #[cfg(any(test, feature = "testing"))]
            hook: None,
        })
    }

    /// Have `hook` called before each step; an error of it is an error of the step.
    #[cfg(any(test, feature = "testing"))]
    pub fn set_hook(&mut self, hook: Hook) {
        self.hook = Some(hook);
    }

    #[cfg(any(test, feature = "testing"))]
    fn step(&mut self, name: &'static str) -> io::Result<()> {
        self.hook.as_mut().map_or(Ok(()), |hook| hook(name))
    }

    #[cfg(not(any(test, feature = "testing")))]
    #[expect(clippy::unused_self, reason = "tests stop here")]
    fn step(&mut self, _: &'static str) -> io::Result<()> {
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        self.step("commit")?;
        write_all(&self.state, self.progress.as_bytes(), 0)
    }

    fn keep(&mut self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.step("keep")?;
        self.keeper.keep(key, fd)?;
        self.kept.insert(key);
        Ok(())
    }

    /// Release everything but what `is_needed`.
    fn release(&mut self, is_needed: impl Fn(u64) -> bool) -> io::Result<()> {
        let gone: Vec<u64> = self.kept.iter().copied().filter(|key| !is_needed(*key)).collect();
        for key in gone {
            self.step("release")?;
            self.keeper.release(key);
            self.kept.remove(&key);
        }
        Ok(())
    }

    /// What a predecessor left; None: it had no client.
    pub(crate) fn inherit(&mut self) -> io::Result<Option<Inherited>> {
        let mut fds = std::mem::take(&mut self.inherited);
        let progress = self.progress;
        if progress.phase == Phase::IDLE {
            self.release(|_| false)?;
            return Ok(None);
        }
        let missing = |_| io::Error::new(io::ErrorKind::NotFound, "the keeper has lost a file");
        let socket = fds.remove(&SOCKET_KEY).ok_or(()).map_err(missing)?;
        let reader = fds.remove(&PIPE_READER_KEY).ok_or(()).map_err(missing)?;
        let writer = fds.remove(&PIPE_WRITER_KEY).ok_or(()).map_err(missing)?;
        self.pipe = Some(Pipe { reader, writer });
        let mut session = vec![0; progress.session_len as usize];
        read_exact(&self.state, &mut session, SESSION_AT[progress.session as usize])?;
        let mut message = vec![0; progress.message_len as usize];
        read_exact(&self.state, &mut message, MESSAGE_AT)?;
        let mut keys = vec![0u64; progress.message_fds as usize];
        read_exact(&self.state, keys.as_mut_bytes(), KEYS_AT)?;
        let mut message_fds = Vec::new();
        for key in keys {
            message_fds.push(fds.remove(&key).ok_or(()).map_err(missing)?);
        }
        // Was the last piece consumed? The kernel knows. If nothing is unconsumed, whatever it
        // says was peeked at is not written down, and is peeked at again.
        if progress.unconsumed > 0 {
            let peeked = reactor::unix::peek_offset(&socket)?;
            let came =
                self.consume(socket.as_fd(), peeked.min(progress.unconsumed.cast_signed()))?;
            let is_foreign = if peeked >= progress.unconsumed.cast_signed() {
                !came
            } else {
                // It was consumed already, and nobody knows any more whose they are. A client sends
                // all those of a message at once.
                progress.message_fds > progress.piece_fds
            };
            if is_foreign {
                self.progress.message_fds -= progress.piece_fds;
                message_fds.truncate(self.progress.message_fds as usize);
            }
            (self.progress.unconsumed, self.progress.piece_fds) = (0, 0);
            self.commit()?;
        }
        reactor::unix::set_peek_offset(&socket, 0)?;
        let reply = match progress.phase {
            Phase::ANSWERING if progress.is_direct == 0 => {
                let mut reply = vec![0; progress.reply_len as usize];
                read_exact(&self.state, &mut reply, REPLY_AT)?;
                Some(reply)
            }
            // The file that goes with it is the function's: the message is carried out again.
            _ => None,
        };
        Ok(Some(Inherited { socket, session, message, message_fds, fds, reply }))
    }

    /// The session that was inherited is in force: release what neither it nor the message at hand
    /// names.
    pub(crate) fn settle(&mut self, session: &Exported<'_>) -> io::Result<()> {
        let needed: BTreeSet<u64> = session.fds.iter().map(|(key, _)| *key).collect();
        // Keys that were given and not written down will be given again.
        let given = MESSAGE_KEYS..MESSAGE_KEYS + self.progress.keys;
        self.release(|key| needed.contains(&key) || given.contains(&key) || key >= PIPE_WRITER_KEY)
    }

    /// A client has connected, with this session.
    pub(crate) fn begin(
        &mut self,
        socket: BorrowedFd<'_>,
        session: &Exported<'_>,
    ) -> io::Result<()> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        reactor::unix::set_peek_offset(socket, 0)?;
        self.keep(SOCKET_KEY, socket)?;
        self.keep(PIPE_READER_KEY, reader.as_fd())?;
        self.keep(PIPE_WRITER_KEY, writer.as_fd())?;
        self.pipe = Some(Pipe { reader, writer });
        let keys = self.progress.keys;
        self.progress =
            Progress { magic: MAGIC, phase: Phase::RECEIVING, keys, ..Progress::default() };
        self.write_session(session)?;
        self.commit()
    }

    /// The client is gone.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        self.progress.phase = Phase::IDLE;
        self.commit()?;
        self.pipe = None;
        self.release(|_| false)
    }

    /// Bytes of the message at hand have been peeked at, with file descriptors: write them down,
    /// then consume them. Whether the descriptors are this message's: a peek that ends where a message
    /// does gives those of the next one, too, if that is in the socket already.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        bytes: &[u8],
        fds: &[OwnedFd],
    ) -> io::Result<bool> {
        if self.progress.message_fds as usize + fds.len() > MESSAGE_FDS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many files"));
        }
        self.progress.piece_fds = fds.len() as u32;
        for fd in fds {
            let key = MESSAGE_KEYS + self.progress.keys;
            self.keep(key, fd.as_fd())?;
            let at = KEYS_AT + u64::from(self.progress.message_fds) * 8;
            write_all(&self.state, key.as_bytes(), at)?;
            self.progress.keys += 1;
            self.progress.message_fds += 1;
        }
        let at = MESSAGE_AT + u64::from(self.progress.message_len);
        write_all(&self.state, bytes, at)?;
        self.progress.message_len += bytes.len() as u32;
        self.progress.unconsumed = bytes.len() as u32;
        self.commit()?;
        let is_own = self.consume(socket, self.progress.unconsumed.cast_signed())?;
        if !is_own {
            // Nothing names them any more once this is committed; they go with the message's own.
            self.progress.message_fds -= self.progress.piece_fds;
        }
        self.progress.piece_fds = 0;
        Ok(is_own)
    }

    /// The last piece has been consumed, and the message is whole or not.
    pub(crate) fn received(&mut self, is_whole: bool) -> io::Result<()> {
        (self.progress.unconsumed, self.progress.piece_fds) = (0, 0);
        if is_whole {
            self.progress.phase = Phase::ACTING;
        }
        self.commit()
    }

    /// Takes bytes off the socket that are written down. Whether file descriptors came with them:
    /// here the kernel tells of no others.
    fn consume(&mut self, socket: BorrowedFd<'_>, mut left: i32) -> io::Result<bool> {
        self.step("consume")?;
        let mut bytes = [0; CHUNK_BYTES];
        let mut came = false;
        while left > 0 {
            let len = left.cast_unsigned().min(CHUNK_BYTES as u32) as usize;
            let mut slices = [IoSliceMut::new(&mut bytes[..len])];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            // The duplicates are closed with it.
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(socket, &mut slices, &mut control, flags) {
                // They were peeked at, so they are there.
                Ok(received) if received.bytes == 0 => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(received) => left -= received.bytes as i32,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            came |= control.drain().any(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.count() > 0,
                _ => false,
            });
        }
        Ok(came)
    }

    fn write_session(&mut self, session: &Exported<'_>) -> io::Result<()> {
        if session.bytes.len() as u64 > PART_BYTES - 4096 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        for (key, fd) in &session.fds {
            if !self.kept.contains(key) {
                self.keep(*key, *fd)?;
            }
        }
        let other = 1 - self.progress.session;
        self.step("session")?;
        write_all(&self.state, &session.bytes, SESSION_AT[other as usize])?;
        self.progress.session = other;
        self.progress.session_len = session.bytes.len() as u32;
        Ok(())
    }

    /// The message at hand has had its effect: it leaves this session, if it has changed, and this
    /// reply, if one is wanted.
    pub(crate) fn answer(
        &mut self,
        session: Option<&Exported<'_>>,
        reply: Option<(&[u8], bool)>,
    ) -> io::Result<()> {
        if let Some(session) = session {
            self.write_session(session)?;
        }
        match reply {
            Some((bytes, is_direct)) => {
                if bytes.len() > REPLY_BYTES_MAX {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                write_all(&self.state, bytes, REPLY_AT)?;
                self.progress.phase = Phase::ANSWERING;
                self.progress.reply_len = bytes.len() as u32;
                self.progress.reply_given = 0;
                self.progress.chunk_len = 0;
                self.progress.is_direct = is_direct.into();
                self.commit()?;
            }
            None => self.answered()?,
        }
        if let Some(session) = session {
            let needed: BTreeSet<u64> = session.fds.iter().map(|(key, _)| *key).collect();
            self.release(|key| needed.contains(&key) || key >= MESSAGE_KEYS)?;
        }
        Ok(())
    }

    /// Send more of a reply that goes through the pipe. True when all of it has been sent, false
    /// when the socket takes no more now.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, reply: &[u8]) -> io::Result<bool> {
        loop {
            let pipe = self.pipe.as_ref().expect("there is a client");
            let mut in_pipe = rustix::io::ioctl_fionread(&pipe.reader)?;
            if self.progress.chunk_len == 0 && in_pipe > 0 {
                // Given by a predecessor that did not come to say so.
                self.progress.chunk_len = in_pipe as u32;
                self.progress.reply_given += in_pipe as u32;
                self.commit()?;
            }
            while in_pipe > 0 {
                self.step("splice")?;
                let pipe = self.pipe.as_ref().expect("there is a client");
                let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
                match splice(&pipe.reader, None, socket, None, in_pipe as usize, flags) {
                    Ok(_) => {}
                    Err(Errno::AGAIN) => return Ok(false),
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                in_pipe = rustix::io::ioctl_fionread(&pipe.reader)?;
            }
            let left = reply.get(self.progress.reply_given as usize..).unwrap_or_default();
            if left.is_empty() {
                self.answered()?;
                return Ok(true);
            }
            if self.progress.chunk_len > 0 {
                self.progress.chunk_len = 0;
                self.commit()?;
            }
            self.step("give")?;
            let chunk = &left[..left.len().min(CHUNK_BYTES)];
            let pipe = self.pipe.as_ref().expect("there is a client");
            let given = rustix::io::write(&pipe.writer, chunk)?;
            debug_assert_eq!(given, chunk.len(), "an empty pipe takes a page at once");
            self.progress.chunk_len = given as u32;
            self.progress.reply_given += given as u32;
            self.commit()?;
        }
    }

    /// The reply has been sent, and the next message can come.
    pub(crate) fn answered(&mut self) -> io::Result<()> {
        self.progress.phase = Phase::RECEIVING;
        self.progress.message_len = 0;
        self.progress.message_fds = 0;
        self.progress.reply_len = 0;
        self.progress.reply_given = 0;
        self.progress.chunk_len = 0;
        self.progress.is_direct = 0;
        self.commit()?;
        self.release(|key| !(MESSAGE_KEYS..PIPE_WRITER_KEY).contains(&key))
    }
}

fn read_exact(file: &OwnedFd, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pread(file, &mut *bytes, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => {
                at += len as u64;
                bytes = &mut bytes[len..];
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(len) => {
                at += len as u64;
                bytes = &bytes[len..];
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
