//! One connection as a stream of messages.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::journal::Journal;
use super::session::Reply;
use super::wire::{Decoder, FDS_MAX, Message, WireFault};

/// Most bytes read at once.
const PIECE_BYTES: usize = 4096;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Wire(#[from] WireFault),
    #[error("socket error: {0}")]
    Socket(Errno),
    #[error("journal: {0}")]
    Journal(#[from] io::Error),
}

/// What a connection has for us.
#[derive(Debug)]
pub(crate) enum Received {
    Message(Message),
    /// Nothing more now.
    Empty,
    /// The peer has closed, between two messages.
    Closed,
}

/// A client's connection, not blocking.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    decoder: Decoder,
    out: Vec<u8>,
    /// Goes with the first byte of `out`.
    out_fd: Option<OwnedFd>,
    out_sent: usize,
    /// `out` goes with a file descriptor, and so not through the pipe of a journal.
    is_direct: bool,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Connection {
        Connection {
            socket,
            decoder: Decoder::new(),
            out: Vec::new(),
            out_fd: None,
            out_sent: 0,
            is_direct: false,
        }
    }

    /// Goes on where a predecessor was. Gives the message it had taken and not answered, if it had
    /// one; the bytes of one that was not whole are in the decoder.
    pub(crate) fn inherit(
        socket: OwnedFd,
        message: &[u8],
        fds: Vec<OwnedFd>,
        reply: Option<Vec<u8>>,
    ) -> Result<(Connection, Option<Message>), ConnectionError> {
        let mut connection = Connection::new(socket);
        if let Some(reply) = reply {
            connection.out = reply;
            return Ok((connection, None));
        }
        connection.decoder.push_fds(fds)?;
        let mut input = message;
        let message = connection.decoder.push(&mut input)?;
        Ok((connection, message))
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next message. Never more is read than belongs to it.
    pub(crate) fn receive(
        &mut self,
        journal: &mut Option<Journal>,
    ) -> Result<Received, ConnectionError> {
        loop {
            let mut bytes = [0; PIECE_BYTES];
            let wanted = self.decoder.wanted().min(PIECE_BYTES);
            let mut slices = [IoSliceMut::new(&mut bytes[..wanted])];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            // Descriptors that are not taken out are closed with it.
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            if journal.is_some() {
                flags |= RecvFlags::PEEK;
            }
            let received =
                match rustix::net::recvmsg(&self.socket, &mut slices, &mut control, flags) {
                    Ok(received) => received,
                    Err(Errno::AGAIN) => return Ok(Received::Empty),
                    Err(Errno::INTR) => continue,
                    Err(error) => return Err(ConnectionError::Socket(error)),
                };
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(WireFault::Fds.into());
            }
            if received.bytes == 0 {
                self.decoder.end()?;
                return Ok(Received::Closed);
            }
            let mut input = bytes.get(..received.bytes).unwrap_or_default();
            let fds = control.drain().flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
                _ => Vec::new(),
            });
            match journal {
                None => self.decoder.push_fds(fds)?,
                Some(journal) => {
                    let fds: Vec<OwnedFd> = fds.collect();
                    if journal.receive(self.socket.as_fd(), input, &fds)? {
                        self.decoder.push_fds(fds)?;
                    }
                }
            }
            let message = self.decoder.push(&mut input)?;
            if let Some(journal) = journal {
                journal.received(message.is_some())?;
            }
            if let Some(message) = message {
                return Ok(Received::Message(message));
            }
        }
    }

    /// Send a reply, now or when the peer takes it.
    pub(crate) fn send(
        &mut self,
        reply: Reply,
        journal: &mut Option<Journal>,
    ) -> Result<(), ConnectionError> {
        assert!(!self.has_output(), "no message is read while a reply waits");
        self.out = reply.bytes;
        self.is_direct = reply.fd.is_some();
        self.out_fd = reply.fd;
        self.flush(journal)
    }

    /// Whether a reply is waiting for the peer. No message is read meanwhile, so that no more than
    /// one collects.
    pub(crate) fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    pub(crate) fn flush(&mut self, journal: &mut Option<Journal>) -> Result<(), ConnectionError> {
        if let Some(journal) = journal
            && !self.is_direct
        {
            if !self.out.is_empty() && journal.send(self.socket.as_fd(), &self.out)? {
                self.out = Vec::new();
            }
            return Ok(());
        }
        if self.out.is_empty() {
            return Ok(());
        }
        while self.out_sent < self.out.len() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = self.out_fd.as_ref().map(|fd| [fd.as_fd()]);
            if let Some(fds) = &fds {
                let is_pushed = control.push(SendAncillaryMessage::ScmRights(fds));
                debug_assert!(is_pushed, "there is room for one");
            }
            let slices = [IoSlice::new(&self.out[self.out_sent..])];
            match rustix::net::sendmsg(&self.socket, &slices, &mut control, flags) {
                Ok(sent) => {
                    self.out_sent += sent;
                    self.out_fd = None;
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(ConnectionError::Socket(error)),
            }
        }
        self.out = Vec::new();
        self.out_sent = 0;
        self.is_direct = false;
        if let Some(journal) = journal {
            journal.answered()?;
        }
        Ok(())
    }
}
