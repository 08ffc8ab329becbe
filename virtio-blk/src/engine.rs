//! One virtqueue being served: chains become I/Os, finished I/Os become used entries.
//!
//! ```text
//!  Ring::pop → Request::parse → Slot + Io(s) → Channel::submit
//!  Ring::push_used ← status byte ← Slot ← Channel::poll
//! ```
//!
//! A request takes a slot, and one [`Io`] or more if it is longer than the volume takes at once.
//! All are allocated when the queue starts and only move afterwards. Data is not copied: an I/O's
//! list points into guest memory and holds it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Busy, Channel, Io, IoError, Latency, Op};
use iobuf::{GuestSlice, GuestView};

use crate::device::{Features, Limits, PARTS_MAX, SEG_MAX};
use crate::queue::ring::Ring;
use crate::queue::shared::DirtyLog;
#[cfg(test)]
use crate::queue::shared::cut;
use crate::queue::split::RingAddress;
use crate::queue::{Broken, Chain, Piece, Token};
use crate::request::{self, Action, HEADER_BYTES, Range, Request, Status};

/// At most one request in this time is measured: a look at the clock costs as much as parsing a
/// request.
const MEASURE_EVERY: Duration = Duration::from_micros(20);
/// Most requests under measurement.
const MEASURED_MAX: usize = 64;
/// Most segments in one I/O. More than `seg_max` allows, because a buffer that crosses memory
/// regions is cut.
const SEGMENTS_MAX: usize = 2 * SEG_MAX as usize;

/// What a device may take in one turn of its core, over all its queues there, so that other devices
/// get their share: 128 requests, or as many as have 512 KiB of data, and at least one.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    requests: u32,
    bytes: u64,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget { requests: 128, bytes: 512 << 10 }
    }
}

impl Budget {
    /// Whether nothing more may be taken.
    pub fn is_spent(&self) -> bool {
        self.requests == 0 || self.bytes == 0
    }

    fn spend(&mut self, bytes: u64) {
        self.requests = self.requests.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// What a queue has done since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Read requests completed, errors included.
    pub reads: u64,
    /// Write requests completed, errors included.
    pub writes: u64,
    /// Flush requests completed, errors included.
    pub flushes: u64,
    /// Discard requests completed, errors included.
    pub discards: u64,
    /// Write zeroes requests completed, errors included.
    pub write_zeroes: u64,
    /// Requests answered at once: GET_ID, unsupported and malformed ones.
    pub others: u64,
    /// Bytes of successful reads.
    pub read_bytes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Requests that were not answered with VIRTIO_BLK_S_OK.
    pub errors: u64,
    /// I/Os that the volume's channel did not take at once.
    pub busy: u64,
    /// Notifications from the driver.
    pub kicks: u64,
    /// Notifications to the driver.
    pub calls: u64,
    /// From when a request was taken until the driver could see it done: of one request in 20 us at
    /// most, and the longest of all, to within a turn of the core.
    pub latency: Latency,
}

impl Counters {
    /// Add the counts of another life of the queue.
    pub fn add(&mut self, other: &Counters) {
        let Counters {
            reads,
            writes,
            flushes,
            discards,
            write_zeroes,
            others,
            read_bytes,
            written_bytes,
            errors,
            busy,
            kicks,
            calls,
            latency,
        } = other;
        self.reads += reads;
        self.writes += writes;
        self.flushes += flushes;
        self.discards += discards;
        self.write_zeroes += write_zeroes;
        self.others += others;
        self.read_bytes += read_bytes;
        self.written_bytes += written_bytes;
        self.errors += errors;
        self.busy += busy;
        self.kicks += kicks;
        self.calls += calls;
        self.latency.add(latency);
    }
}

/// How a queue is to be served.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// What requests are checked against.
    pub limits: Limits,
    /// Negotiated features.
    pub features: Features,
    /// Every write must be durable before it completes.
    pub write_through: bool,
}

/// Result of a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Something moved.
    pub has_worked: bool,
    /// The driver wants an interrupt.
    pub wants_call: bool,
}

#[derive(Debug, Default)]
struct Slot {
    /// None: the slot is free.
    status_byte: Option<GuestSlice>,
    token: Token,
    op: Option<Op>,
    /// I/Os that are out.
    parts: u16,
    /// Some I/O of it was aborted.
    is_aborted: bool,
    status: Option<Status>,
    written: u32,
    written_failed: u32,
    data_bytes: u64,
    epoch: u64,
    /// When the turn began that took it.
    taken_at: Duration,
    /// When it was taken, if it is measured.
    measured_from: Option<Instant>,
    /// Ranges left to do, last first.
    ranges: Vec<Range>,
}

/// One virtqueue being served.
#[expect(clippy::vec_box, reason = "the boxes move between here and the channel")]
pub struct Engine {
    ring: Ring,
    view: Rc<GuestView>,
    config: EngineConfig,
    chain: Chain,
    ranges: Vec<Range>,
    parts: Vec<Box<Io>>,
    slots: Vec<Slot>,
    free_slots: Vec<u16>,
    free_ios: Vec<Box<Io>>,
    /// I/Os to be submitted before anything else: refused by the channel, or next ranges.
    waiting: VecDeque<Box<Io>>,
    /// The last request that was looked at needs more free I/Os than there were.
    is_starved: bool,
    is_enabled: bool,
    leaves_aborted: bool,
    log: Option<DirtyLog>,
    /// The ring is not in the current memory table.
    is_detached: bool,
    broken: Option<Broken>,
    /// Counts memory tables.
    epoch: u64,
    /// Requests in flight that were admitted under older tables.
    in_flight_old: usize,
    counters: Counters,
    /// When the turn began.
    now: Duration,
    /// When the next request may be measured.
    measure_at: Duration,
    /// Measured requests that were answered in this turn: when they were taken.
    measured: Vec<Instant>,
}

impl Engine {
    /// Serve a ring, as soon as [`Engine::set_enabled`] says so.
    pub fn new(ring: Ring, view: Rc<GuestView>, config: EngineConfig) -> Engine {
        let size = usize::from(ring.size());
        let ios = size.max(PARTS_MAX);
        Engine {
            ring,
            view,
            config,
            chain: Chain::new(),
            ranges: Vec::new(),
            parts: Vec::with_capacity(PARTS_MAX),
            slots: (0..size).map(|_| Slot::default()).collect(),
            free_slots: (0..size as u16).rev().collect(),
            free_ios: (0..ios).map(|_| Box::new(Io::with_capacity(SEG_MAX as usize + 2))).collect(),
            waiting: VecDeque::with_capacity(ios),
            is_starved: false,
            is_enabled: false,
            leaves_aborted: false,
            log: None,
            is_detached: false,
            broken: None,
            epoch: 0,
            in_flight_old: 0,
            counters: Counters::default(),
            now: Duration::ZERO,
            measure_at: Duration::ZERO,
            measured: Vec::with_capacity(MEASURED_MAX),
        }
    }

    /// Take new requests, or leave them in the ring.
    pub fn set_enabled(&mut self, is_enabled: bool) {
        self.is_enabled = is_enabled;
    }

    /// Every write from now on must be durable before it completes, or need not.
    pub fn set_write_through(&mut self, write_through: bool) {
        self.config.write_through = write_through;
    }

    /// The volume has another size: what requests are checked against from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.config.limits = limits;
    }

    /// Mark pages that are written from now on: data and status bytes in `data`, the device area in
    /// `used`, where it begins at the address beside. Requests in flight are marked when they
    /// complete, so as those that come later.
    pub fn set_log(&mut self, data: Option<DirtyLog>, used: Option<(DirtyLog, u64)>) {
        self.log = data;
        self.ring.set_log(used);
    }

    /// The memory table has changed. `address` is where the ring is now; None, or an address that
    /// leads nowhere, pauses the queue until the next change: a table may be changed in several
    /// steps. Requests in flight keep the memory they were given.
    pub fn set_memory(&mut self, view: Rc<GuestView>, address: Option<RingAddress>) {
        self.epoch += 1;
        self.in_flight_old = self.in_flight();
        self.is_detached = address.is_none_or(|at| self.ring.rebind(&view, &at).is_err());
        self.view = view;
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Requests taken under an older memory table and not answered.
    pub fn in_flight_old(&self) -> usize {
        self.in_flight_old
    }

    /// I/Os that the channel has not accepted yet.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Where to go on later, as GET_VRING_BASE tells it.
    pub fn base(&self) -> u32 {
        self.ring.base()
    }

    /// From now on a request whose I/O was aborted is not answered, if the ring records what is in
    /// flight: whoever serves the ring next does it again, and the driver sees no error. No write is
    /// lost by that or lands late: what is aborted cannot be done any more ([`Channel::abort`]), or
    /// not after what the same volume is given next, and the driver does not have it back.
    pub fn leave_aborted(&mut self) {
        self.leaves_aborted = self.ring.has_record();
    }

    /// Why the queue cannot be served any more, if so.
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Counters, for the owner to read and to count notifications.
    pub fn counters(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// Stop taking requests: something the queue depends on has failed.
    pub fn break_down(&mut self, broken: Broken) {
        self.broken.get_or_insert(broken);
    }

    /// Whether a new request would be taken now. If not, a completion changes it, or its owner.
    pub fn can_take(&self) -> bool {
        self.is_enabled
            && !self.is_detached
            && !self.is_starved
            && self.broken.is_none()
            && self.waiting.is_empty()
            && !self.free_slots.is_empty()
    }

    /// One turn: take requests, submit, complete, publish. With a [`Budget`] of its own, at the time
    /// of the turn before.
    pub fn poll(&mut self, channel: &mut dyn Channel) -> Turn {
        self.poll_within(channel, self.now, &mut Budget::default())
    }

    /// One turn that begins at `now`, on a clock that does not go back, and takes no more than there
    /// is in the budget.
    pub fn poll_within(
        &mut self,
        channel: &mut dyn Channel,
        now: Duration,
        budget: &mut Budget,
    ) -> Turn {
        self.now = now;
        let mut has_worked = self.submit_waiting(channel);
        has_worked |= self.take(channel, budget);
        channel.poll(&mut |io| {
            has_worked = true;
            self.on_io(io);
        });
        // The next ranges of discards and the like.
        has_worked |= self.submit_waiting(channel);
        let wants_call = self.ring.publish().unwrap_or_else(|broken| {
            self.broken = Some(broken);
            false
        });
        if !self.measured.is_empty() {
            let now = Instant::now();
            for from in self.measured.drain(..) {
                self.counters.latency.record(now.saturating_duration_since(from));
            }
        }
        Turn { has_worked, wants_call }
    }

    /// Ask the driver for a notification of the next request. True: there is work already.
    pub fn arm(&mut self) -> bool {
        // While nothing can be taken, a completion wakes us.
        self.can_take()
            && self.ring.arm().unwrap_or_else(|broken| {
                self.broken = Some(broken);
                true
            })
    }

    /// Notifications are not needed for now.
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Answer what has not reached the channel yet as aborted.
    pub fn abort_waiting(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some(mut io) = self.waiting.pop_front() else { break };
            io.result = Err(IoError::Aborted);
            self.on_io(io);
        }
    }

    fn submit_waiting(&mut self, channel: &mut dyn Channel) -> bool {
        let mut has_worked = false;
        while let Some(io) = self.waiting.pop_front() {
            if let Err(Busy(io)) = channel.submit(io) {
                self.waiting.push_front(io);
                break;
            }
            has_worked = true;
        }
        has_worked
    }

    fn submit(&mut self, channel: &mut dyn Channel, io: Box<Io>) {
        if !self.waiting.is_empty() {
            self.waiting.push_back(io);
        } else if let Err(Busy(io)) = channel.submit(io) {
            self.counters.busy += 1;
            self.waiting.push_back(io);
        }
    }

    fn take(&mut self, channel: &mut dyn Channel, budget: &mut Budget) -> bool {
        let mut has_worked = false;
        while !budget.is_spent() && self.can_take() {
            let taken = match self.ring.pop(&mut self.chain) {
                Ok(false) => break,
                Ok(true) => self.admit(channel, budget),
                Err(broken) => Err(broken),
            };
            match taken {
                Ok(true) => has_worked = true,
                Ok(false) => {
                    if let Err(broken) = self.ring.unpop(self.chain.token) {
                        self.broken = Some(broken);
                    }
                    self.is_starved = true;
                    break;
                }
                Err(broken) => {
                    self.broken = Some(broken);
                    has_worked = true;
                }
            }
        }
        has_worked
    }

    /// Begin the request in `chain`. False: not enough I/Os are free.
    fn admit(&mut self, channel: &mut dyn Channel, budget: &mut Budget) -> Result<bool, Broken> {
        let EngineConfig { limits, features, write_through } = self.config;
        let request = Request::parse(&self.chain, &self.view, &limits, features, &mut self.ranges)?;
        let (op, data_bytes) = match request.action {
            Action::Read { offset, len } => match self.build(Op::Read, offset, len, false)? {
                Built::Ready => (Op::Read, len),
                Built::Starved => return Ok(false),
                Built::Refused => return self.answer(&request, Status::IOERR, budget),
            },
            Action::Write { offset, len } => {
                match self.build(Op::Write, offset, len, write_through)? {
                    Built::Ready => (Op::Write, len),
                    Built::Starved => return Ok(false),
                    Built::Refused => return self.answer(&request, Status::IOERR, budget),
                }
            }
            Action::Flush => {
                let Some(mut io) = self.free_ios.pop() else { return Ok(false) };
                prepare(&mut io, Op::Flush, 0, 0);
                self.parts.push(io);
                (Op::Flush, 0)
            }
            Action::Discard | Action::WriteZeroes => {
                let op = match request.action {
                    Action::Discard => Op::Deallocate,
                    _ => Op::WriteZeroes,
                };
                self.ranges.retain(|range| range.len > 0);
                self.ranges.reverse();
                let Some(first) = self.ranges.pop() else {
                    return self.answer(&request, Status::OK, budget);
                };
                let Some(mut io) = self.free_ios.pop() else { return Ok(false) };
                prepare_range(&mut io, op, &first, write_through);
                self.parts.push(io);
                (op, 0)
            }
            Action::Done(status) => return self.answer(&request, status, budget),
        };

        let Some(index) = self.free_slots.pop() else {
            // `can_take` has looked; be safe and try again later.
            self.free_ios.append(&mut self.parts);
            return Ok(false);
        };
        let slot = &mut self.slots[usize::from(index)];
        slot.token = self.chain.token;
        slot.op = Some(op);
        slot.parts = self.parts.len() as u16;
        slot.status = None;
        slot.is_aborted = false;
        slot.written = request.written;
        slot.written_failed = request.written_failed;
        slot.status_byte = Some(request.status);
        slot.data_bytes = data_bytes;
        slot.epoch = self.epoch;
        slot.taken_at = self.now;
        if self.now >= self.measure_at {
            self.measure_at = self.now + MEASURE_EVERY;
            slot.measured_from = Some(Instant::now());
        }
        budget.spend(data_bytes);
        slot.ranges.clear();
        if matches!(op, Op::Deallocate | Op::WriteZeroes) {
            std::mem::swap(&mut slot.ranges, &mut self.ranges);
        }
        let mut parts = std::mem::take(&mut self.parts);
        for mut io in parts.drain(..) {
            io.tag = u64::from(index);
            self.submit(channel, io);
        }
        self.parts = parts;
        Ok(true)
    }

    /// Fill `parts` with the I/Os of a transfer.
    fn build(&mut self, op: Op, offset: u64, len: u64, fua: bool) -> Result<Built, Broken> {
        let part_max = self.config.limits.io_bytes_max;
        let parts = len.div_ceil(part_max);
        if parts > PARTS_MAX as u64 {
            return Ok(Built::Refused);
        }
        if parts > self.free_ios.len() as u64 {
            return Ok(Built::Starved);
        }
        let (pieces, skip): (&[Piece], u64) = match op {
            Op::Read => (&self.chain.writable, 0),
            _ => (&self.chain.readable, HEADER_BYTES as u64),
        };
        let mut done = 0;
        while done < len {
            let Some(mut io) = self.free_ios.pop() else { break };
            let now = part_max.min(len - done);
            prepare(&mut io, op, offset + done, now);
            io.fua = fua;
            let appended = request::append(&self.view, pieces, skip + done, now, &mut io.data);
            let is_good = appended.is_ok() && io.data.segments().len() <= SEGMENTS_MAX;
            self.parts.push(io);
            if !is_good {
                self.parts.iter_mut().for_each(|io| io.data.clear());
                self.free_ios.append(&mut self.parts);
                return Ok(Built::Refused);
            }
            done += now;
        }
        Ok(Built::Ready)
    }

    /// Answer a request that needs no I/O. It counts in the turn like any other: a driver that adds
    /// such requests as fast as they are answered would keep the core for ever.
    fn answer(
        &mut self,
        request: &Request,
        status: Status,
        budget: &mut Budget,
    ) -> Result<bool, Broken> {
        budget.spend(0);
        put_status(&request.status, status, &self.log)?;
        let written = match status {
            Status::OK => request.written,
            _ => request.written_failed,
        };
        if let Some(log) = &self.log {
            request::mark(log, &self.chain.writable, u64::from(written));
        }
        self.ring.push_used(self.chain.token, written)?;
        self.counters.others += 1;
        self.counters.errors += u64::from(status != Status::OK);
        Ok(true)
    }

    /// An I/O is back.
    fn on_io(&mut self, mut io: Box<Io>) {
        let index = io.tag as u16;
        let slot = &mut self.slots[usize::from(index)];
        // Failed reads as well: some of it may have been written.
        if let (Some(log), Op::Read, Some(status)) = (&self.log, io.op, &slot.status_byte) {
            for segment in io.data.segments() {
                let addr = status.view().guest_addr(segment.as_ptr(), segment.len());
                debug_assert!(addr.is_some(), "a request's data and status are of one table");
                if let Some(addr) = addr {
                    log.mark(addr, segment.len() as u64);
                }
            }
        }
        io.data.clear();
        let status = io.result.map_or_else(Status::from, |()| Status::OK);
        slot.is_aborted |= io.result == Err(IoError::Aborted);
        if slot.status.is_none_or(|status| status == Status::OK) {
            slot.status = Some(status);
        }
        slot.parts -= 1;
        self.is_starved = false;
        if slot.parts > 0 {
            self.free_ios.push(io);
            return;
        }
        if let (Some(Status::OK), Some(op), Some(range)) = (slot.status, slot.op, slot.ranges.pop())
        {
            slot.parts = 1;
            prepare_range(&mut io, op, &range, self.config.write_through);
            self.waiting.push_back(io);
            return;
        }
        self.free_ios.push(io);
        if let Err(broken) = self.finish(index) {
            self.broken = Some(broken);
        }
    }

    /// All I/Os of a request are back: tell the driver.
    fn finish(&mut self, index: u16) -> Result<(), Broken> {
        let slot = &mut self.slots[usize::from(index)];
        let status = slot.status.take().unwrap_or(Status::IOERR);
        if slot.is_aborted && self.leaves_aborted {
            slot.status_byte = None;
            slot.measured_from = None;
            self.in_flight_old -= usize::from(slot.epoch != self.epoch);
            self.free_slots.push(index);
            return Ok(());
        }
        let is_ok = status == Status::OK;
        let counters = &mut self.counters;
        match slot.op {
            Some(Op::Read) => {
                counters.reads += 1;
                counters.read_bytes += if is_ok { slot.data_bytes } else { 0 };
            }
            Some(Op::Write) => {
                counters.writes += 1;
                counters.written_bytes += if is_ok { slot.data_bytes } else { 0 };
            }
            Some(Op::Flush) => counters.flushes += 1,
            Some(Op::Deallocate) => counters.discards += 1,
            Some(Op::WriteZeroes) => counters.write_zeroes += 1,
            // No request is one of the others.
            Some(_) | None => {}
        }
        counters.errors += u64::from(!is_ok);
        counters.latency.saw(self.now.saturating_sub(slot.taken_at));
        if let Some(from) = slot.measured_from.take()
            && self.measured.len() < MEASURED_MAX
        {
            self.measured.push(from);
        }
        self.in_flight_old -= usize::from(slot.epoch != self.epoch);
        self.free_slots.push(index);
        if let Some(byte) = slot.status_byte.take() {
            put_status(&byte, status, &self.log)?;
        }
        self.ring.push_used(slot.token, if is_ok { slot.written } else { slot.written_failed })
    }
}

fn put_status(byte: &GuestSlice, status: Status, log: &Option<DirtyLog>) -> Result<(), Broken> {
    #[cfg(test)]
    if !cut::step() {
        return Ok(());
    }
    byte.write(0, &[status.0])?;
    if let (Some(log), Some(addr)) = (log, byte.guest_addr()) {
        log.mark(addr, 1);
    }
    Ok(())
}

enum Built {
    Ready,
    /// Not enough I/Os are free now.
    Starved,
    /// Cannot be done.
    Refused,
}

fn prepare(io: &mut Io, op: Op, offset: u64, len: u64) {
    io.op = op;
    io.fua = false;
    io.no_unmap = false;
    io.offset = offset;
    io.len = len;
    io.result = Ok(());
}

fn prepare_range(io: &mut Io, op: Op, range: &Range, write_through: bool) {
    prepare(io, op, range.offset, range.len);
    io.fua = write_through && op == Op::WriteZeroes;
    io.no_unmap = !range.unmap;
}

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;
