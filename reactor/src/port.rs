//! A task's share of the ring.

use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use iobuf::SgList;

use crate::core::{Local, Shared};
use crate::error::{Busy, Errno};
use crate::fd::{Fd, Socket};
use crate::net::Tx;
use crate::ops::{Connect, Event, OpId, Queue, Request};
use crate::ready::Ready;
use crate::sys::{self, RawAddr};

/// What an operation that succeeded gave.
#[derive(Debug)]
pub enum Outcome {
    /// Bytes moved by a read or write; may be fewer than asked for.
    Bytes(u32),
    /// Done; nothing more to say.
    Done,
    /// The value drained from a watched event descriptor.
    Signal(u64),
    /// A connected socket.
    Socket(Socket),
}

/// The end of an operation (or one signal of a watched descriptor).
#[derive(Debug)]
pub struct Completion {
    /// The token given at submission.
    pub token: u64,
    /// What came of it.
    pub result: Result<Outcome, Errno>,
}

/// A task's share of the ring.
///
/// Every call is safe whatever the caller does next: the segments of a list are copied, and their
/// memory stays mapped and in nobody else's hands until the kernel is done, even if list,
/// descriptor and port are dropped at once. Each accepted operation gives exactly one
/// [`Completion`] through [`Port::next`] ([`Port::watch`]: one per signal, and one at its end),
/// unless the port is dropped, which cancels.
///
/// [`Busy`] means that no slot is free on the core, or that this port has as many completions
/// waiting to be taken as the core has slots: take them and try again.
pub struct Port {
    shared: Rc<Shared>,
    queue: Rc<Queue>,
    /// Reads and writes go through the ring that is polled.
    polled: bool,
}

impl Port {
    pub(crate) fn new(local: &Local) -> Port {
        Port { shared: Rc::clone(&local.0), queue: Queue::new(), polled: false }
    }

    pub(crate) fn polled(local: &Local) -> Port {
        let mut port = Port::new(local);
        port.polled = true;
        port
    }

    /// Reads at byte `offset` of `file` into `sg`. Short reads are not continued here.
    pub fn readv(&mut self, file: &Fd, offset: u64, sg: &SgList, token: u64) -> Result<(), Busy> {
        self.start_memory(Request::Read { offset, polled: self.polled }, file, sg, token)
    }

    /// Writes `sg` at byte `offset` of `file`; with `dsync` the data is on stable media when it
    /// completes (`RWF_DSYNC`). Short writes are not continued here.
    pub fn writev(
        &mut self,
        file: &Fd,
        offset: u64,
        sg: &SgList,
        dsync: bool,
        token: u64,
    ) -> Result<(), Busy> {
        self.start_memory(Request::Write { offset, dsync, polled: self.polled }, file, sg, token)
    }

    /// Makes completed writes stable; `data_only` leaves out metadata that is not needed to read
    /// them back (`fdatasync`).
    pub fn fsync(&mut self, file: &Fd, data_only: bool, token: u64) -> Result<(), Busy> {
        self.start_fd(Request::Fsync { data_only }, file, token).map(drop)
    }

    /// `fallocate(2)`: `mode` as there, offset and length in bytes.
    pub fn fallocate(
        &mut self,
        file: &Fd,
        mode: i32,
        offset: u64,
        len: u64,
        token: u64,
    ) -> Result<(), Busy> {
        self.start_fd(Request::Fallocate { mode, offset, len }, file, token).map(drop)
    }

    /// Waits for signals of an event descriptor: each gives [`Outcome::Signal`] with the drained
    /// value, and the watch stays. Signals between two calls of [`Port::next`] add up.
    ///
    /// The watch ends with an error if the descriptor is not one (reads do not give 8 bytes).
    pub fn watch(&mut self, eventfd: &Fd, token: u64) -> Result<(), Busy> {
        self.start_fd(Request::Watch, eventfd, token).map(drop)
    }

    /// Connects over TCP, without Nagle's delay; [`Errno::TIMED_OUT`] after `timeout`.
    pub fn connect(&mut self, addr: SocketAddr, timeout: Duration, token: u64) -> Result<(), Busy> {
        let op = self.reserve()?;
        let socket =
            if self.shared.is_simulated() { Ok(None) } else { sys::tcp_socket(&addr).map(Some) };
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                let errno = Errno(error.raw_os_error().unwrap_or(libc::EIO));
                self.shared.ops.borrow_mut().refuse(op, token, errno);
                return Ok(());
            }
        };
        let connect = Connect {
            socket,
            raw: RawAddr::new(&addr),
            addr,
            timeout,
            timespec: Default::default(),
        };
        let request = Request::Connect(Box::new(connect));
        self.shared.ops.borrow_mut().start(op, token, request, None, None);
        Ok(())
    }

    /// Cancels everything in flight. Each operation still completes, as cancelled or not.
    pub fn cancel_all(&mut self) {
        self.shared.ops.borrow_mut().cancel_queue(&self.queue);
    }

    /// Operations not completed yet (watches included).
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// The oldest recorded completion. Does nothing else, and is cheap when there is none.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: it may have more later")]
    pub fn next(&mut self) -> Option<Completion> {
        match self.next_event()? {
            Event::Done(completion) => Some(completion),
            Event::Signal { token, value, op } => {
                self.shared.ops.borrow_mut().rearm(op);
                Some(Completion { token, result: Ok(Outcome::Signal(value)) })
            }
            // Streams have ports of their own.
            Event::Chunk(_) | Event::RecvEnd(_) | Event::Sent(_) => None,
        }
    }

    pub(crate) fn has_event(&self) -> bool {
        !self.queue.events.borrow().is_empty()
    }

    pub(crate) fn note_in(&self, ready: Rc<Ready>, index: u32) {
        self.queue.note_in(ready, index);
    }

    pub(crate) fn next_event(&mut self) -> Option<Event> {
        self.queue.events.borrow_mut().pop_front()
    }

    /// Starts an operation without memory of its own.
    pub(crate) fn start_fd(&mut self, request: Request, fd: &Fd, token: u64) -> Result<OpId, Busy> {
        let op = self.reserve()?;
        self.shared.ops.borrow_mut().start(op, token, request, Some(fd.clone()), None);
        Ok(op)
    }

    /// Sends of the message that `tx` has prepared what the socket takes without waiting.
    pub(crate) fn send_now(&mut self, tx: &Tx, fd: &Fd) -> Result<usize, Errno> {
        self.shared.ops.borrow_mut().send_now(tx, fd)
    }

    fn start_memory(
        &mut self,
        request: Request,
        file: &Fd,
        sg: &SgList,
        token: u64,
    ) -> Result<(), Busy> {
        let op = self.reserve()?;
        let hold = sg.hold();
        if let Some(hold) = &hold {
            // One more user of the memory, until the slot is released. Foreign code: `ops` is not
            // borrowed here.
            hold.retain(sg.segments());
        }
        let memory = hold.map(|hold| (hold, sg.segments()));
        self.shared.ops.borrow_mut().start(op, token, request, Some(file.clone()), memory);
        Ok(())
    }

    fn reserve(&self) -> Result<OpId, Busy> {
        self.shared.ops.borrow_mut().reserve(&self.queue)
    }

    pub(crate) fn cancel(&mut self, op: OpId) {
        self.shared.ops.borrow_mut().cancel(op);
    }

    pub(crate) fn shared(&self) -> &Rc<Shared> {
        &self.shared
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.shared.ops.borrow_mut().close_queue(&self.queue);
        // Recorded events go outside the borrow: a received chunk or a socket has its own drop.
        self.queue.events.borrow_mut().clear();
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}
