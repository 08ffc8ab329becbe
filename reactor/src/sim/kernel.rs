//! The simulated kernel of one core: takes operations, answers with completions in virtual time.

// UNSAFETY: like the real kernel, it reads and writes memory that operations name by address; their
// slots keep that memory in place until they complete.
#![expect(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use iobuf::Segment;

use crate::error::Errno;
use crate::fd::{Socket, SocketKind, Source};
use crate::kernel::{Cqe, PushError};
use crate::net::Tx;
use crate::ops::{Request, Slot};
use crate::rx::{RxPool, SPARE_BYTES, Spare};
use crate::sim::file::SECTOR_BYTES;
use crate::sim::net::{Accepted, End, EndId};
use crate::sim::{SimSocket, State, WorldState};

/// `IORING_CQE_F_BUFFER` and `IORING_CQE_F_MORE`.
const CQE_BUFFER: u32 = 1;
const CQE_MORE: u32 = 2;
/// Time that a file operation takes when no delay is asked for.
const FILE_DELAY_MIN: Duration = Duration::from_micros(10);

enum Work {
    /// Memory of a file operation.
    Read {
        file: usize,
        offset: u64,
        memory: Vec<Segment>,
    },
    Write {
        file: usize,
        offset: u64,
        memory: Vec<Segment>,
        dsync: bool,
    },
    /// `mark`: which writes the sync covers.
    Fsync {
        file: usize,
        mark: u64,
    },
    Fallocate {
        file: usize,
        mode: i32,
        offset: u64,
        len: u64,
    },
    Connect {
        addr: SocketAddr,
        fails: bool,
    },
    Watch {
        event: usize,
        value: *mut u64,
    },
    Recv {
        end: EndId,
        spare: Option<*mut u8>,
    },
    /// `ready`: when the next bytes are taken.
    Send {
        end: EndId,
        tx: Rc<Tx>,
        taken: usize,
        ready: Duration,
    },
}

struct Operation {
    user_data: u64,
    /// When it completes, for those that take a time known from the start.
    due: Duration,
    /// Power cuts that the file had seen at submission.
    epoch: u64,
    work: Work,
}

pub(crate) struct SimKernel {
    world: WorldState,
    rx: Rc<RxPool>,
    operations: Vec<Operation>,
    cqes: VecDeque<Cqe>,
    connected: BTreeMap<u64, Socket>,
    /// Reused by each receive.
    scratch: Vec<u8>,
}

impl SimKernel {
    pub(crate) fn new(world: WorldState, rx: Rc<RxPool>) -> SimKernel {
        SimKernel {
            world,
            rx,
            operations: Vec::new(),
            cqes: VecDeque::new(),
            connected: BTreeMap::new(),
            scratch: Vec::new(),
        }
    }

    pub(crate) fn push(
        &mut self,
        user_data: u64,
        slot: &mut Slot,
        value: *mut u64,
    ) -> Result<(), PushError> {
        let mut state = self.world.lock();
        let state = &mut *state;
        let source = slot.fd.as_ref().map(|fd| fd.source());
        let (mut due, mut epoch) = (state.now, 0);
        let work = match (&slot.request, source) {
            (Request::Connect(connect), None) => {
                let lost = state.rng.chance(state.net.faults.lost_per_million);
                let refused = state.rng.chance(state.net.faults.refuse_per_million);
                let delay = 2 * state.net.delay(&mut state.rng);
                // A lost handshake ends with the timeout, and so does a slow one.
                let timed_out = lost || delay > connect.timeout;
                due += if timed_out { connect.timeout } else { delay };
                if timed_out {
                    Work::Connect { addr: SocketAddr::from(([0; 4], 0)), fails: true }
                } else {
                    Work::Connect { addr: connect.addr, fails: refused }
                }
            }
            (Request::Recv { spare, .. }, Some(Source::Socket(socket))) => {
                Work::Recv { end: socket.end(), spare: spare.as_ref().map(|spare| spare.as_ptr()) }
            }
            (Request::Send(tx), Some(Source::Socket(socket))) => {
                Work::Send { end: socket.end(), tx: Rc::clone(tx), taken: 0, ready: state.now }
            }
            (Request::Watch, Some(Source::Event(event))) => {
                Work::Watch { event: event.index(), value }
            }
            (request, Some(Source::File(file))) => {
                let file = file.index();
                let spread = state.file_faults.delay_max.saturating_sub(FILE_DELAY_MIN);
                due += FILE_DELAY_MIN;
                due += Duration::from_nanos(state.rng.below(spread.as_nanos() as u64 + 1));
                epoch = state.files[file].epoch;
                let memory = slot.segments.clone();
                match *request {
                    Request::Read { offset, .. } => Work::Read { file, offset, memory },
                    Request::Write { offset, dsync, .. } => {
                        Work::Write { file, offset, memory, dsync }
                    }
                    Request::Fsync { .. } => Work::Fsync { file, mark: state.files[file].mark() },
                    Request::Fallocate { mode, offset, len } => {
                        Work::Fallocate { file, mode, offset, len }
                    }
                    _ => return Err(PushError::Unfit),
                }
            }
            _ => return Err(PushError::Unfit),
        };
        self.operations.push(Operation { user_data, due, epoch, work });
        Ok(())
    }

    /// What waits for somebody else ends at once; what the disk does goes on.
    pub(crate) fn cancel(&mut self, user_data: u64) {
        let Some(index) = self.operations.iter().position(|op| op.user_data == user_data) else {
            return;
        };
        let res = match &self.operations[index].work {
            Work::Recv { .. } | Work::Watch { .. } | Work::Connect { .. } => -libc::ECANCELED,
            Work::Send { taken: 0, .. } => -libc::ECANCELED,
            Work::Send { taken, .. } => *taken as i32,
            _ => return,
        };
        self.operations.remove(index);
        self.complete(user_data, res, 0);
    }

    /// The core goes away: nothing stays in flight. The disk finishes some of its writes.
    pub(crate) fn abandon(&mut self) {
        for operation in std::mem::take(&mut self.operations) {
            let mut state = self.world.lock();
            let state = &mut *state;
            let is_current = |file: usize| state.files[file].epoch == operation.epoch;
            if let Work::Write { file, offset, memory, .. } = &operation.work
                && is_current(*file)
            {
                let bytes = gather(memory);
                write_torn(state, *file, *offset as usize, &bytes);
            }
            self.cqes.push_back(Cqe {
                user_data: operation.user_data,
                res: -libc::ECANCELED,
                flags: 0,
            });
        }
    }

    fn complete(&mut self, user_data: u64, res: i32, flags: u32) {
        self.cqes.push_back(Cqe { user_data, res, flags });
    }

    /// Does everything that can be done at this time.
    pub(crate) fn enter(&mut self) {
        // The disk completes in the order of its delays, others in the order of submission.
        let now = self.world.lock().now;
        let mut due: Vec<_> = (self.operations.iter())
            .filter(|op| op.due <= now)
            .map(|op| (op.due, op.user_data))
            .collect();
        due.sort_by_key(|(due, _)| *due);
        for (_, user_data) in due {
            let Some(index) = self.operations.iter().position(|op| op.user_data == user_data)
            else {
                continue;
            };
            let mut operation = self.operations.swap_remove(index);
            if !self.run(&mut operation, now) {
                self.operations.push(operation);
            }
        }
    }

    /// Runs one operation as far as it goes. `true`: it is over.
    fn run(&mut self, operation: &mut Operation, now: Duration) -> bool {
        let user_data = operation.user_data;
        let res = match &mut operation.work {
            Work::Recv { end, spare } => return self.receive(user_data, *end, *spare, now),
            Work::Send { end, tx, taken, ready } => {
                if now < *ready {
                    return false;
                }
                match self.send(*end, tx, taken, ready, now) {
                    None => return false,
                    Some(res) => res,
                }
            }
            Work::Watch { event, value } => {
                let mut state = self.world.lock();
                match std::mem::take(&mut state.events[*event]) {
                    0 => return false,
                    count => {
                        // SAFETY: the address is that of an `AtomicU64` of `Ops`, which outlives
                        // this kernel.
                        let value = unsafe { AtomicU64::from_ptr(*value) };
                        value.store(count, Ordering::Relaxed);
                        8
                    }
                }
            }
            Work::Connect { addr, fails } => self.connect(user_data, *addr, *fails),
            work => self.disk(work, operation.epoch),
        };
        self.complete(user_data, res, 0);
        true
    }

    fn connect(&mut self, user_data: u64, addr: SocketAddr, fails: bool) -> i32 {
        let mut state = self.world.lock();
        if addr.port() == 0 {
            return -libc::ECANCELED; // as a linked timeout does it
        }
        if fails || !state.net.listening.contains(&addr) {
            return -libc::ECONNREFUSED;
        }
        let port = 40_000 + state.rng.below(20_000);
        let [near, far] = state.net.connect([addr.to_string(), format!("127.0.0.1:{port}")]);
        let far = Socket(SocketKind::Sim(SimSocket::new(&self.world, far)));
        state.accepts.push_back((addr, far));
        let near = Socket(SocketKind::Sim(SimSocket::new(&self.world, near)));
        self.connected.insert(user_data, near);
        0
    }

    fn receive(
        &mut self,
        user_data: u64,
        end: EndId,
        spare: Option<*mut u8>,
        now: Duration,
    ) -> bool {
        loop {
            let mut state = self.world.lock();
            let state = &mut *state;
            if !state.net.is_readable(end, now) {
                let Some(how) = state.net.end(end, now) else { return false };
                let res = if how == End::Fin { 0 } else { -libc::ECONNRESET };
                self.cqes.push_back(Cqe { user_data, res, flags: 0 });
                return true;
            }
            if let Some(spare) = spare {
                let scratch = &mut self.scratch;
                state.net.receive(end, SPARE_BYTES, now, &mut state.rng, scratch);
                // SAFETY: the operation's slot keeps the spare buffer of SPARE_BYTES, which lies
                // apart from `scratch`.
                unsafe { std::ptr::copy_nonoverlapping(scratch.as_ptr(), spare, scratch.len()) };
                let res = scratch.len() as i32;
                self.cqes.push_back(Cqe { user_data, res, flags: 0 });
                return true;
            }
            let Some(bid) = self.rx.pick() else {
                self.cqes.push_back(Cqe { user_data, res: -libc::ENOBUFS, flags: 0 });
                return true;
            };
            let max = self.rx.buffer_bytes();
            state.net.receive(end, max, now, &mut state.rng, &mut self.scratch);
            let res = self.rx.write(bid, &self.scratch) as i32;
            let flags = CQE_BUFFER | u32::from(bid) << 16;
            // The kernel may end a multishot receive at any time.
            if state.net.faults.split && state.rng.one_in(32) {
                self.cqes.push_back(Cqe { user_data, res, flags });
                return true;
            }
            self.cqes.push_back(Cqe { user_data, res, flags: flags | CQE_MORE });
        }
    }

    /// A receive that does not wait.
    pub(crate) fn recv_now(&mut self, end: EndId, spare: &Spare) -> Result<usize, Errno> {
        let mut state = self.world.lock();
        let state = &mut *state;
        let now = state.now;
        if !state.net.is_readable(end, now) {
            return match state.net.end(end, now) {
                None => Err(Errno(libc::EAGAIN)),
                Some(End::Fin) => Ok(0),
                Some(End::Reset) => Err(Errno(libc::ECONNRESET)),
            };
        }
        let scratch = &mut self.scratch;
        state.net.receive(end, SPARE_BYTES, now, &mut state.rng, scratch);
        // SAFETY: the buffer has SPARE_BYTES, is nobody else's, and lies apart from `scratch`.
        unsafe { std::ptr::copy_nonoverlapping(scratch.as_ptr(), spare.as_ptr(), scratch.len()) };
        state.note(scratch.len() as u64);
        Ok(scratch.len())
    }

    /// A send that does not wait. On a network that splits it takes something half of the time, so
    /// that both ways are gone; on others nothing, so that what the simulation itself needs for it
    /// is not done in a task's turn.
    pub(crate) fn send_now(&mut self, end: EndId, tx: &Tx) -> Result<usize, Errno> {
        let now = {
            let mut state = self.world.lock();
            if !state.net.faults.split || state.rng.one_in(2) {
                return Err(Errno(libc::EAGAIN));
            }
            state.now
        };
        let (mut taken, mut ready) = (0, now);
        match self.send(end, tx, &mut taken, &mut ready, now) {
            Some(res) => usize::try_from(res).map_err(|_| Errno(-res)),
            None if taken > 0 => Ok(taken),
            None => Err(Errno(libc::EAGAIN)),
        }
    }

    /// Takes bytes of a message. `Some`: the result of the send.
    fn send(
        &mut self,
        end: EndId,
        tx: &Tx,
        taken: &mut usize,
        ready: &mut Duration,
        now: Duration,
    ) -> Option<i32> {
        // SAFETY: the message is stable while it is being sent, which it is.
        let header = unsafe { &*tx.message() };
        // SAFETY: the header names this array, in segments (laid out as iovecs), which is as
        // stable.
        let segments = unsafe {
            std::slice::from_raw_parts(header.msg_iov.cast::<Segment>(), header.msg_iovlen)
        };
        let total: usize = segments.iter().map(Segment::len).sum();
        // Read only now, and only what is not taken yet: memory given back too early shows.
        let bytes = gather(segments);
        while *taken < total {
            let mut state = self.world.lock();
            let state = &mut *state;
            match state.net.send(end, &bytes[*taken..], now, &mut state.rng) {
                Accepted::Broken(_) if *taken > 0 => return Some(*taken as i32),
                Accepted::Broken(errno) => return Some(-errno),
                Accepted::Bytes(0) => return None, // the window is full
                Accepted::Bytes(len) => *taken += len,
            }
            if state.net.faults.split && *taken < total {
                if state.rng.one_in(16) {
                    return Some(*taken as i32);
                }
                if state.rng.one_in(4) {
                    *ready = now + state.net.delay(&mut state.rng);
                    return None;
                }
            }
        }
        Some(total as i32)
    }

    fn disk(&mut self, work: &Work, epoch: u64) -> i32 {
        let mut state = self.world.lock();
        let state = &mut *state;
        let (Work::Read { file, .. }
        | Work::Write { file, .. }
        | Work::Fsync { file, .. }
        | Work::Fallocate { file, .. }) = work
        else {
            return -libc::EBADF;
        };
        let fails = state.rng.chance(state.file_faults.error_per_million);
        let short = state.rng.chance(state.file_faults.short_per_million);
        if fails || state.files[*file].epoch != epoch {
            if let Work::Write { offset, memory, .. } = work
                && state.files[*file].epoch == epoch
            {
                write_torn(state, *file, *offset as usize, &gather(memory));
            }
            return -libc::EIO;
        }
        let mut cut = |len: usize| {
            let sectors = len / SECTOR_BYTES;
            if short && sectors > 1 {
                SECTOR_BYTES * (1 + state.rng.below(sectors as u64 - 1) as usize)
            } else {
                len
            }
        };
        match work {
            Work::Read { file, offset, memory } => {
                let want = cut(memory.iter().map(Segment::len).sum());
                let bytes = state.files[*file].read(*offset as usize, want);
                scatter(bytes, memory);
                bytes.len() as i32
            }
            Work::Write { file, offset, memory, dsync } => {
                let mut bytes = gather(memory);
                bytes.truncate(cut(bytes.len()));
                state.files[*file].write(*offset as usize, &bytes, *dsync);
                bytes.len() as i32
            }
            Work::Fsync { file, mark } => {
                state.files[*file].sync(*mark);
                0
            }
            Work::Fallocate { file, mode, offset, len } => {
                let file = &mut state.files[*file];
                let (offset, len) = (*offset as usize, *len as usize);
                let keep = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
                match mode & !libc::FALLOC_FL_KEEP_SIZE {
                    0 if keep => 0,
                    0 => {
                        file.grow(offset + len);
                        0
                    }
                    libc::FALLOC_FL_PUNCH_HOLE if keep => {
                        file.zero(offset, len, false);
                        0
                    }
                    libc::FALLOC_FL_ZERO_RANGE => {
                        file.zero(offset, len, !keep);
                        0
                    }
                    _ => -libc::EOPNOTSUPP,
                }
            }
            _ => -libc::EBADF,
        }
    }

    pub(crate) fn reap(&mut self, into: &mut Vec<Cqe>) -> bool {
        if self.cqes.is_empty() {
            return false;
        }
        let mut state = self.world.lock();
        for cqe in self.cqes.drain(..) {
            let now = state.now.as_nanos() as u64;
            for word in [now, cqe.user_data, cqe.res as u64, u64::from(cqe.flags)] {
                state.note(word);
            }
            into.push(cqe);
        }
        true
    }

    pub(crate) fn take_connected(&mut self, user_data: u64) -> Option<Socket> {
        self.connected.remove(&user_data)
    }

    /// When the next operation can go on.
    pub(crate) fn next_event(&self) -> Option<Duration> {
        let state = self.world.lock();
        let due = self.operations.iter().filter_map(|op| match &op.work {
            Work::Recv { end, .. } => state.net.next_arrival(*end),
            Work::Send { end, ready, .. } if *ready <= state.now => state.net.break_time(*end),
            Work::Send { ready, .. } => Some(*ready),
            Work::Watch { event, .. } => (state.events[*event] > 0).then_some(state.now),
            _ => Some(op.due),
        });
        due.min()
    }
}

/// A write that did not finish: some of its sectors are on the disk.
fn write_torn(state: &mut State, file: usize, offset: usize, bytes: &[u8]) {
    for (index, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
        if state.rng.one_in(2) {
            state.files[file].write(offset + index * SECTOR_BYTES, sector, false);
        }
    }
}

fn gather(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(segments.iter().map(Segment::len).sum());
    for segment in segments {
        let at = bytes.len();
        bytes.resize(at + segment.len(), 0);
        // SAFETY: the operation's slot keeps the segment mapped; the vector has room for it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                segment.as_ptr(),
                bytes[at..].as_mut_ptr(),
                segment.len(),
            );
        }
    }
    bytes
}

fn scatter(mut bytes: &[u8], segments: &[Segment]) {
    for segment in segments {
        let (part, rest) = bytes.split_at(segment.len().min(bytes.len()));
        // SAFETY: the operation's slot keeps the segment mapped, and it has `part.len()` bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(part.as_ptr(), segment.as_ptr(), part.len());
        }
        bytes = rest;
    }
}
