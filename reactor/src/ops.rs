//! Operations in flight on one core: a bounded slab, the queues of the ports, and what the kernel
//! still needs while it works.
//!
//! A slot owns everything the kernel may touch: a clone of the descriptor, of the hold behind the
//! iovecs, of a stream's send queue, the socket address. It is freed when the last completion of
//! the operation arrived. Generations in the user data make late completions harmless.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use iobuf::{Hold, Segment};

use crate::error::{Busy, Errno};
use crate::fd::{Fd, Socket};
use crate::kernel::{Cqe, Kernel, PushError};
use crate::look::Look;
use crate::net::Tx;
use crate::port::{Completion, Outcome};
use crate::ready::Ready;
use crate::rx::{RxChunk, RxPool, SPARE_BYTES, Spare};
use crate::sys::RawAddr;

/// What a slot asks of the kernel.
pub(crate) enum Request {
    /// The slot is free.
    None,
    /// Read into the slot's segments.
    Read { offset: u64, polled: bool },
    /// Write the slot's segments.
    Write { offset: u64, dsync: bool, polled: bool },
    /// Make writes stable.
    Fsync { data_only: bool },
    /// Change a file's allocation.
    Fallocate { mode: i32, offset: u64, len: u64 },
    /// Drain an event descriptor, again and again.
    Watch,
    /// Connect the socket that the request owns.
    Connect(Box<Connect>),
    /// Receive, again and again, into buffers of the core.
    Recv { lent: Rc<Cell<bool>>, spare: Option<Spare> },
    /// Send the message that the queue has prepared.
    Send(Rc<Tx>),
}

impl Request {
    /// Whether it goes through the ring that is polled.
    pub(crate) fn is_polled(&self) -> bool {
        matches!(self, Request::Read { polled: true, .. } | Request::Write { polled: true, .. })
    }
}

pub(crate) struct Connect {
    /// Created at submission; `None` on a simulated kernel, which has it when connected.
    pub(crate) socket: Option<OwnedFd>,
    pub(crate) raw: RawAddr,
    pub(crate) addr: SocketAddr,
    pub(crate) timeout: Duration,
    pub(crate) timespec: io_uring::types::Timespec,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Allocated, or finished and about to be freed.
    Held,
    /// Waits for room in the submission queue.
    Queued,
    /// A receive that waits for a buffer.
    Starved,
    /// A watch whose signal nobody has taken yet: armed again when it is.
    Parked,
    /// A receive that the core makes itself, in each turn: see [`Look`].
    Looked,
    /// With the kernel.
    Flying,
}

/// One operation.
pub(crate) struct Slot {
    generation: u32,
    state: State,
    cancelled: bool,
    token: u64,
    queue: Option<Rc<Queue>>,
    pub(crate) fd: Option<Fd>,
    pub(crate) request: Request,
    pub(crate) segments: Vec<Segment>,
    hold: Option<Rc<dyn Hold>>,
}

/// Names one use of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpId {
    index: u32,
    generation: u32,
}

impl OpId {
    pub(crate) fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(crate) fn from_user_data(user_data: u64) -> OpId {
        OpId { index: user_data as u32, generation: (user_data >> 32) as u32 }
    }
}

/// What a completion left for the owner of a port.
pub(crate) enum Event {
    /// An operation of the public kind.
    Done(Completion),
    /// A watched descriptor was signalled; taking the event arms the watch again.
    Signal { token: u64, value: u64, op: OpId },
    /// Received bytes.
    Chunk(RxChunk),
    /// The receive is over: end of stream, or an error.
    RecvEnd(Result<(), Errno>),
    /// A send took this many bytes.
    Sent(Result<usize, Errno>),
}

/// The recorded completions of one port.
pub(crate) struct Queue {
    pub(crate) events: RefCell<VecDeque<Event>>,
    in_flight: Cell<usize>,
    closed: Cell<bool>,
    /// Where to note that there are events.
    ready: RefCell<Option<(Rc<Ready>, u32)>>,
}

impl Queue {
    pub(crate) fn new() -> Rc<Queue> {
        Rc::new(Queue {
            events: RefCell::new(VecDeque::with_capacity(16)),
            in_flight: Cell::new(0),
            closed: Cell::new(false),
            ready: RefCell::new(None),
        })
    }

    /// Notes every event from now on.
    pub(crate) fn note_in(&self, ready: Rc<Ready>, index: u32) {
        *self.ready.borrow_mut() = Some((ready, index));
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    fn record(&self, event: Event) {
        if !self.closed.get() {
            self.events.borrow_mut().push_back(event);
            if let Some((ready, index)) = &*self.ready.borrow() {
                ready.mark(*index);
            }
        }
    }
}

/// All operations of a core, and its kernel.
pub(crate) struct Ops {
    pub(crate) kernel: Kernel,
    slots: Box<[Slot]>,
    /// Where the kernel stores the values of watched descriptors, one per slot.
    values: Box<[AtomicU64]>,
    free: Vec<u32>,
    /// Slots in state `Queued`, and others that left it; the same for `starved`.
    backlog: VecDeque<OpId>,
    starved: VecDeque<OpId>,
    cancels: VecDeque<OpId>,
    /// Finished slots, to be freed outside the borrow of `Ops`: a hold runs foreign code.
    finished: Vec<u32>,
    flying: usize,
    /// Which receive the core makes itself.
    look: Look,
    /// Something was recorded since `take_recorded`.
    recorded: bool,
    closed: bool,
}

impl Ops {
    pub(crate) fn new(kernel: Kernel, count: u32) -> Ops {
        let slots = (0..count).map(|_| Slot {
            generation: 0,
            state: State::Free,
            cancelled: false,
            token: 0,
            queue: None,
            fd: None,
            request: Request::None,
            segments: Vec::new(),
            hold: None,
        });
        let room = count as usize;
        let look = kernel.look();
        Ops {
            kernel,
            slots: slots.collect(),
            values: (0..count).map(|_| AtomicU64::new(0)).collect(),
            // The lowest index is taken first: few operations in flight touch few cache lines.
            free: (0..count).rev().collect(),
            backlog: VecDeque::with_capacity(room),
            starved: VecDeque::with_capacity(room),
            cancels: VecDeque::with_capacity(room),
            finished: Vec::with_capacity(room),
            flying: 0,
            look,
            recorded: false,
            closed: false,
        }
    }

    fn slot(&mut self, op: OpId) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(op.index as usize)?;
        (slot.generation == op.generation && slot.state != State::Free).then_some(slot)
    }

    /// Takes a slot for `queue`, without giving it to the kernel yet.
    pub(crate) fn reserve(&mut self, queue: &Rc<Queue>) -> Result<OpId, Busy> {
        // Completions that nobody takes count, too: that bounds the queue.
        let used = queue.in_flight.get() + queue.events.borrow().len();
        if self.closed || used >= self.slots.len() {
            return Err(Busy);
        }
        let index = self.free.pop().ok_or(Busy)?;
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.state = State::Held;
        slot.cancelled = false;
        slot.queue = Some(Rc::clone(queue));
        queue.in_flight.set(queue.in_flight.get() + 1);
        Ok(OpId { index, generation: slot.generation })
    }

    /// Hands a reserved slot to the kernel.
    pub(crate) fn start(
        &mut self,
        op: OpId,
        token: u64,
        request: Request,
        fd: Option<Fd>,
        memory: Option<(Rc<dyn Hold>, &[Segment])>,
    ) {
        let slot = &mut self.slots[op.index as usize];
        debug_assert!(slot.generation == op.generation && slot.state == State::Held);
        slot.token = token;
        slot.request = request;
        slot.fd = fd;
        if let Some((hold, segments)) = memory {
            slot.segments.extend_from_slice(segments);
            slot.hold = Some(hold);
        }
        self.push(op);
    }

    /// Ends a reserved slot that could not be prepared.
    pub(crate) fn refuse(&mut self, op: OpId, token: u64, errno: Errno) {
        self.slots[op.index as usize].token = token;
        self.fail(op.index, errno);
    }

    /// Gives the slot's request to the kernel, or queues it until there is room.
    fn push(&mut self, op: OpId) {
        let index = op.index as usize;
        let value = self.values[index].as_ptr();
        let slot = &mut self.slots[index];
        match self.kernel.push(op.user_data(), slot, value) {
            Ok(()) => {
                slot.state = State::Flying;
                self.flying += 1;
            }
            Err(PushError::NoRoom) => {
                slot.state = State::Queued;
                self.backlog.push_back(op);
            }
            Err(PushError::Unfit) => {
                slot.state = State::Held;
                self.fail(op.index, Errno::BAD_DESCRIPTOR);
            }
        }
    }

    /// Ends an operation that is not with the kernel.
    fn fail(&mut self, index: u32, errno: Errno) {
        let slot = &mut self.slots[index as usize];
        let event = match &slot.request {
            Request::Recv { .. } => Event::RecvEnd(Err(errno)),
            Request::Send(_) => Event::Sent(Err(errno)),
            _ => Event::Done(Completion { token: slot.token, result: Err(errno) }),
        };
        self.finish(index, event);
    }

    /// Records the last event of an operation; its slot is freed by `retire`.
    fn finish(&mut self, index: u32, event: Event) {
        self.recorded = true;
        let slot = &mut self.slots[index as usize];
        slot.state = State::Held;
        if self.look.op() == Some(OpId { index, generation: slot.generation }) {
            self.look.give_up(true);
        }
        if let Some(queue) = slot.queue.take() {
            queue.in_flight.set(queue.in_flight.get() - 1);
            queue.record(event);
        }
        self.finished.push(index);
    }

    /// Asks for the end of one operation. It still completes.
    pub(crate) fn cancel(&mut self, op: OpId) {
        let Some(slot) = self.slot(op) else { return };
        if slot.cancelled {
            return;
        }
        slot.cancelled = true;
        match slot.state {
            State::Free | State::Held => {}
            State::Queued | State::Starved | State::Parked | State::Looked => {
                self.fail(op.index, Errno::CANCELED);
            }
            // A device that is polled finishes what it has; there is no way to take it back.
            State::Flying if slot.request.is_polled() => {}
            State::Flying => {
                if self.kernel.cancel(op.user_data()).is_err() {
                    self.cancels.push_back(op);
                }
            }
        }
    }

    /// Asks for the end of all operations of a port.
    pub(crate) fn cancel_queue(&mut self, queue: &Rc<Queue>) {
        if queue.in_flight.get() == 0 {
            return;
        }
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if slot.queue.as_ref().is_some_and(|own| Rc::ptr_eq(own, queue)) {
                let op = OpId { index: index as u32, generation: slot.generation };
                self.cancel(op);
            }
        }
    }

    /// The port is gone: nobody will look at its events.
    pub(crate) fn close_queue(&mut self, queue: &Rc<Queue>) {
        queue.closed.set(true);
        self.cancel_queue(queue);
    }

    /// The signal of a watch was taken: wait for the next.
    pub(crate) fn rearm(&mut self, op: OpId) {
        if self.slot(op).is_some_and(|slot| slot.state == State::Parked) {
            self.push(op);
        }
    }

    /// Before entering the kernel: what had no room or no buffer tries again.
    pub(crate) fn retry(&mut self, rx: &Rc<RxPool>) {
        while let Some(op) = self.cancels.pop_front() {
            let flying = self.slot(op).is_some_and(|slot| slot.state == State::Flying);
            if flying && self.kernel.cancel(op.user_data()).is_err() {
                self.cancels.push_front(op);
                break;
            }
        }
        for _ in 0..self.backlog.len() {
            let Some(op) = self.backlog.pop_front() else { break };
            if self.slot(op).is_some_and(|slot| slot.state == State::Queued) {
                self.push(op);
            }
        }
        if !self.starved.is_empty() {
            self.feed_starved(rx);
        }
    }

    /// Arms receives that found no buffer: as many as there are buffers now. If there is none at
    /// all, tasks sit on them, perhaps because they wait for bytes of the very streams that starve.
    /// So each of these may receive once into a spare buffer of its own.
    fn feed_starved(&mut self, rx: &Rc<RxPool>) {
        let mut buffers = rx.provided();
        let use_spares = buffers == 0;
        for _ in 0..self.starved.len() {
            if buffers == 0 && !use_spares {
                break;
            }
            let Some(op) = self.starved.pop_front() else { break };
            let Some(slot) = self.slot(op) else { continue };
            if slot.state != State::Starved {
                continue;
            }
            let Request::Recv { lent, spare } = &mut slot.request else { continue };
            if use_spares {
                if lent.get() {
                    self.starved.push_back(op);
                    continue;
                }
                *spare = Some(rx.spare());
            } else {
                buffers -= 1;
            }
            self.push(op);
        }
    }

    /// Whether something waits for room or buffers that `retry` could give.
    pub(crate) fn has_backlog(&self) -> bool {
        !self.cancels.is_empty() || !self.backlog.is_empty()
    }

    /// Whether a receive waits for a buffer, and one has come back.
    pub(crate) fn can_feed(&self, rx: &RxPool) -> bool {
        !self.starved.is_empty() && rx.provided() > 0
    }

    /// Records one completion.
    pub(crate) fn on_cqe(&mut self, cqe: Cqe, rx: &Rc<RxPool>) {
        let op = OpId::from_user_data(cqe.user_data);
        let Some(slot) = self.slot(op) else { return };
        debug_assert_eq!(slot.state, State::Flying, "only what flies completes");
        self.recorded = true;
        let slot = &mut self.slots[op.index as usize];
        let token = slot.token;
        let cancelled = slot.cancelled;
        let more = cqe.more();
        if !more {
            slot.state = State::Held;
            self.flying -= 1;
        }
        let slot = &mut self.slots[op.index as usize];
        match &mut slot.request {
            Request::None => {}
            Request::Recv { lent, spare } => {
                let chunk = match (cqe.buffer(), spare.take()) {
                    (Some(bid), _) => {
                        Some(rx.take(bid, cqe.res.max(0) as usize, cqe.buffer_more()))
                    }
                    (None, Some(spare)) if cqe.res > 0 => {
                        Some(spare.lend(lent).into_chunk(cqe.res as usize))
                    }
                    (None, _) => None,
                };
                if cqe.res > 0
                    && let (Some(chunk), Some(queue)) = (chunk, &slot.queue)
                {
                    queue.record(Event::Chunk(chunk));
                    self.on_received(op, cqe.res as usize);
                }
                if more {
                    return;
                }
                match cqe.res {
                    0 => self.finish(op.index, Event::RecvEnd(Ok(()))),
                    _ if cancelled => self.fail(op.index, Errno::CANCELED),
                    // The kernel may end a multishot receive at any time; so does a spare buffer, and
                    // the core that wants to receive by itself.
                    res if res > 0 || is_transient(-res) || res == -libc::ECANCELED => {
                        self.receive_on(op);
                    }
                    res if res == -libc::ENOBUFS => {
                        self.slots[op.index as usize].state = State::Starved;
                        self.starved.push_back(op);
                    }
                    res => self.fail(op.index, Errno(-res)),
                }
            }
            Request::Send(_) => {
                let result = usize::try_from(cqe.res).map_err(|_| Errno(-cqe.res));
                self.finish(op.index, Event::Sent(result));
            }
            Request::Watch => match cqe.res {
                8 => {
                    // Relaxed: the kernel stored it before it published the completion.
                    let value = self.values[op.index as usize].load(Ordering::Relaxed);
                    if let Some(queue) = &slot.queue {
                        queue.record(Event::Signal { token, value, op });
                    }
                    slot.state = State::Parked;
                    if cancelled {
                        self.fail(op.index, Errno::CANCELED);
                    }
                }
                res if !cancelled && res < 0 && is_transient(-res) => self.push(op),
                res if res < 0 => self.fail(op.index, Errno(-res)),
                // Not an event descriptor: it would be read in circles.
                _ => self.fail(op.index, Errno::BAD_DESCRIPTOR),
            },
            Request::Connect(connect) => {
                let result = match cqe.res {
                    0 => {
                        let socket = self.kernel.take_connected(op.user_data());
                        let socket = socket.or_else(|| connect.socket.take().map(Socket::from));
                        socket.map(Outcome::Socket).ok_or(Errno::BAD_DESCRIPTOR)
                    }
                    // The linked timeout cancels the connect.
                    res if res == -libc::ECANCELED && !cancelled => Err(Errno::TIMED_OUT),
                    res => Err(Errno(-res)),
                };
                self.finish(op.index, Event::Done(Completion { token, result }));
            }
            Request::Read { .. } | Request::Write { .. } => {
                let result = u32::try_from(cqe.res).map_err(|_| Errno(-cqe.res));
                let result = result.map(Outcome::Bytes);
                self.finish(op.index, Event::Done(Completion { token, result }));
            }
            Request::Fsync { .. } | Request::Fallocate { .. } => {
                let result = if cqe.res < 0 { Err(Errno(-cqe.res)) } else { Ok(Outcome::Done) };
                self.finish(op.index, Event::Done(Completion { token, result }));
            }
        }
    }

    /// `op` has received `len` bytes: who makes its next receive, and that of others?
    fn on_received(&mut self, op: OpId, len: usize) {
        let large = len >= SPARE_BYTES;
        if self.look.op().is_some_and(|own| own != op || large) {
            self.give_up_look(false);
        }
        if self.look.on_received(op, large)
            && self.slot(op).is_some_and(|slot| slot.state == State::Flying)
            && self.kernel.cancel(op.user_data()).is_err()
        {
            self.give_up_look(true);
        }
    }

    /// A receive is back from the kernel, and goes on.
    fn receive_on(&mut self, op: OpId) {
        if self.look.op() == Some(op) {
            self.slots[op.index as usize].state = State::Looked;
        } else {
            self.push(op);
        }
    }

    /// Makes the receive that is the core's own, if there is one.
    #[inline]
    pub(crate) fn look(&mut self, rx: &Rc<RxPool>) {
        if let Some(op) = self.look.op() {
            self.look_at(op, rx);
        }
    }

    fn look_at(&mut self, op: OpId, rx: &Rc<RxPool>) {
        let slot = &mut self.slots[op.index as usize];
        let (State::Looked, Request::Recv { lent, spare }, Some(fd)) =
            (slot.state, &mut slot.request, &slot.fd)
        else {
            return;
        };
        if spare.is_none() && lent.get() {
            // Its owner sits on bytes, perhaps until more arrive.
            return self.give_up_look(false);
        }
        let buffer = spare.get_or_insert_with(|| rx.spare());
        match self.kernel.recv_now(fd, buffer) {
            Ok(0) => self.finish(op.index, Event::RecvEnd(Ok(()))),
            Ok(len) => {
                if let (Some(spare), Some(queue)) = (spare.take(), &slot.queue) {
                    queue.record(Event::Chunk(spare.lend(lent).into_chunk(len)));
                }
                self.recorded = true;
                self.on_received(op, len);
            }
            Err(Errno(errno)) if is_transient(errno) => {}
            Err(errno) => self.fail(op.index, errno),
        }
    }

    /// The ring makes all receives: the core `sleeps`, or its own did not pay.
    pub(crate) fn give_up_look(&mut self, sleeps: bool) {
        let Some(op) = self.look.give_up(sleeps) else { return };
        let Some(slot) = self.slot(op) else { return };
        if slot.state != State::Looked {
            return; // on its way back from the kernel, which gets it again
        }
        if let Request::Recv { spare, .. } = &mut slot.request {
            *spare = None;
        }
        self.push(op);
    }

    /// Takes one finished slot apart; `recycle` gets it back without what it held.
    pub(crate) fn take_finished(&mut self) -> Option<Finished> {
        let index = self.finished.pop()?;
        let slot = &mut self.slots[index as usize];
        Some(Finished {
            index,
            segments: mem::take(&mut slot.segments),
            hold: slot.hold.take(),
            request: mem::replace(&mut slot.request, Request::None),
            fd: slot.fd.take(),
        })
    }

    /// Makes a slot free.
    pub(crate) fn recycle(&mut self, index: u32, mut segments: Vec<Segment>) {
        segments.clear();
        let slot = &mut self.slots[index as usize];
        slot.segments = segments; // its capacity is worth keeping
        slot.state = State::Free;
        self.free.push(index);
    }

    /// See [`Kernel::send_now`]. What it sends counts as recorded: its sender has to look again.
    pub(crate) fn send_now(&mut self, tx: &Tx, fd: &Fd) -> Result<usize, Errno> {
        if self.closed {
            return Err(Errno::CANCELED);
        }
        self.recorded = true;
        self.kernel.send_now(fd, tx)
    }

    /// Whether ports may have new events since the last call.
    pub(crate) fn take_recorded(&mut self) -> bool {
        mem::take(&mut self.recorded)
    }

    /// Operations that the kernel has.
    pub(crate) fn flying(&self) -> usize {
        self.flying
    }

    /// Nothing starts any more; everything in flight is cancelled.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        for index in 0..self.slots.len() {
            let op = OpId { index: index as u32, generation: self.slots[index].generation };
            self.cancel(op);
        }
    }
}

/// What a finished operation held. The kernel is done with it.
pub(crate) struct Finished {
    index: u32,
    segments: Vec<Segment>,
    hold: Option<Rc<dyn Hold>>,
    request: Request,
    fd: Option<Fd>,
}

impl Finished {
    /// Lets go of everything; this may run foreign code. Returns what `recycle` wants.
    pub(crate) fn release(self) -> (u32, Vec<Segment>) {
        if let Some(hold) = self.hold {
            hold.release(&self.segments);
        }
        drop(self.request);
        drop(self.fd);
        (self.index, self.segments)
    }
}

fn is_transient(errno: i32) -> bool {
    errno == libc::EINTR || errno == libc::EAGAIN
}
