//! One core's queues being served: entries become I/Os, finished I/Os become completions.
//!
//! ```text
//!   doorbell ─► Ring ─► copy of the SQE ─► record ─► io::decode ─► xfer::walk ─► Channel::submit
//!   interrupt ◄─ Ring ◄─ record ◄─ status, queue by queue as there is room ◄──── Channel::poll
//! ```
//!
//! A completion queue and all submission queues that use it are on one core. A command takes a slot
//! of its submission queue and, while the volume works on it, one [`Io`]. All are allocated when the
//! queue is created. Data is not copied: an I/O's list points into guest memory and holds it.
//!
//! The order in which the record is written is in [`crate::record`].

mod command;
mod completions;
mod counters;
mod fused;
mod shadow;

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use block::{Busy, Channel, Extent, Io, IoError, Op, Reserve};
use iobuf::{GuestSlice, GuestView, Pool, SgList};
use nvme::ctrl::Coalescing;
use nvme::ctrl::io::{self, COPY_RANGE_LEN, DSM_RANGE_LEN, Fuse, FusedPairing, IoCommand};
use nvme::spec::{Cqe, NSID_ALL, Sqe, Status};
use nvme::subsys::SubsystemInfo;
use nvme::subsys::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationType,
};
use nvme::xfer::{Copying, Discarding, walk};

use self::completions::{Cq, Done};
pub use self::counters::Counters;
use self::fused::Pair;
use self::shadow::{behind, is_far, shadow_at};
use crate::dirty::DirtyLog;
use crate::msix::Interrupts;
use crate::queue::{Place, Ring};
use crate::record::{CqRecord, ENTRIES_MAX, QUEUES_MAX, RecordView, SqRecord};
use crate::status;

/// What a device takes in one turn of its core, over all its queues there, so that other devices get
/// their share: so many commands, or as many as move so many bytes, and at least one.
const TURN_COMMANDS: u32 = 128;
const TURN_BYTES: u64 = 512 << 10;
/// Most commands of one queue among them.
const QUEUE_TURN_MAX: u32 = 64;
/// At most one command in this time is measured: a look at the clock costs as much as decoding one.
const MEASURE_EVERY: Duration = Duration::from_micros(20);
/// Most commands under measurement.
const MEASURED_MAX: usize = 64;
/// Most segments of one I/O: one for each page of the largest transfer, and as many again for
/// buffers that cross memory regions.
const SEGMENTS_MAX: usize = 514;
/// Segments that an I/O has room for from the start; a longer list allocates once.
const SEGMENTS: usize = 66;
/// Tag of an I/O: which submission queue, in the upper half.
const TAG_SHIFT: u32 = 16;

/// Stands for a queue in the tag of an I/O that belongs to no command.
const NO_QUEUE: u16 = u16::MAX;

const TRANSFER: Status = Status::DATA_TRANSFER_ERROR.dnr();
/// Of a queue with the identifier of another. Who sends the commands knows, and does not ask.
const TAKEN: Status = Status::INVALID_QUEUE_IDENTIFIER.dnr();
/// Of a command to a namespace that there could be and is not.
const INACTIVE: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();

/// A command that failed for a reason that is not the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Queue.
    pub sqid: u16,
    /// Its identifier.
    pub cid: u16,
    /// What it completed with.
    pub status: Status,
    /// Opcode.
    pub opcode: u8,
    /// Namespace.
    pub nsid: u32,
    /// First byte.
    pub offset: u64,
}

/// What the control thread is to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A doorbell was rung with a value that its queue does not have.
    BadDoorbell,
    /// For the error log.
    Failed(Failure),
}

/// Most notices kept; more are dropped, as the error log has no room for them either.
const NOTICES_MAX: usize = 64;

#[derive(Debug, Default)]
struct Slot {
    sqe: Sqe,
    command: Option<IoCommand>,
    /// Ranges done, of commands with several; of a flush of all, the NSID done last.
    step: u32,
    /// Data of commands that have structures.
    data: Vec<u8>,
    taken_at: Duration,
    /// When exactly, if it is measured.
    measured_from: Option<Instant>,
    /// Memory table it was taken under.
    epoch: u64,
    is_used: bool,
    is_completed: bool,
    /// Its data is in memory of the core's, for parts of it to be copied to the guest's.
    is_bounced: bool,
    /// Its part in a fused pair.
    pair: Pair,
}

struct Sq {
    qid: u16,
    entries: u32,
    cqid: u16,
    place: Place,
    ring: Option<Ring>,
    fetched: u64,
    /// What `fetched` was when the event index was written last.
    told: u64,
    /// Tail that was refused last, to complain only once.
    bad_tail: u32,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Fused commands of the queue.
    pairing: FusedPairing,
    is_closing: bool,
}

impl Sq {
    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// A volume, to the queues of a core.
struct Space {
    nsid: u32,
    channel: Box<dyn Channel>,
    /// I/Os that the channel did not take.
    waiting: VecDeque<Box<Io>>,
    /// Not a namespace any more; goes when its last I/O is back.
    is_leaving: bool,
}

/// Why a queue cannot be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub Status);

/// One core's queues. See the [module](self).
pub struct Engine {
    view: Rc<GuestView>,
    record: RecordView,
    /// Shadow doorbells and event indexes, and where the latter are.
    shadow: Option<(GuestSlice, GuestSlice, u64)>,
    /// The guest uses shadow doorbells, whether their memory is there or not.
    is_shadowed: bool,
    subsys: Arc<SubsystemInfo>,
    spaces: Vec<Space>,
    sqs: Vec<Sq>,
    cqs: Vec<Cq>,
    #[expect(clippy::vec_box, reason = "the boxes move between here and the channels")]
    ios: Vec<Box<Io>>,
    /// I/Os that a channel has just given back; empty between two calls.
    #[expect(clippy::vec_box, reason = "the boxes move between here and the channels")]
    returned: Vec<Box<Io>>,
    interrupts: Interrupts,
    dirty: Option<Arc<DirtyLog>>,
    pool: Option<Pool>,
    epoch: u64,
    is_running: bool,
    /// The function may use the guest's memory.
    is_master: bool,
    /// Nothing is taken until the queues are gone: the controller is shut down.
    is_draining: bool,
    /// Nothing is posted any more: the controller is being reset.
    is_resetting: bool,
    /// I/Os at volumes or waiting for them.
    at_volume: usize,
    counters: Counters,
    notices: VecDeque<Notice>,
    now: Duration,
    /// Where the queues of each identifier are in `sqs` and `cqs`.
    sq_at: Places,
    cq_at: Places,
    /// Counts turns: which queue is first.
    first: usize,
    /// What may still be taken in this turn.
    turn_commands: u32,
    turn_bytes: u64,
    /// When the next command may be measured.
    measure_at: Duration,
    /// Measured commands that were posted in this turn: when they were taken.
    measured: Vec<Instant>,
}

/// Positions by queue identifier.
struct Places([Option<u8>; QUEUES_MAX as usize]);

impl Places {
    fn none() -> Places {
        Places([None; QUEUES_MAX as usize])
    }

    #[inline]
    fn get(&self, qid: u16) -> Option<usize> {
        self.0.get(usize::from(qid)).copied().flatten().map(usize::from)
    }

    /// Fewer than 256 queues are numbered anew.
    fn set(&mut self, qids: impl Iterator<Item = u16>) {
        self.0.fill(None);
        for (at, qid) in qids.enumerate() {
            if let Some(place) = self.0.get_mut(usize::from(qid)) {
                *place = u8::try_from(at).ok();
            }
        }
    }
}

impl Engine {
    /// Without queues, without memory.
    pub fn new(
        view: Rc<GuestView>,
        record: RecordView,
        subsys: Arc<SubsystemInfo>,
        interrupts: Interrupts,
    ) -> Engine {
        Engine {
            view,
            record,
            shadow: None,
            is_shadowed: false,
            subsys,
            spaces: Vec::new(),
            sqs: Vec::new(),
            cqs: Vec::new(),
            ios: Vec::new(),
            returned: Vec::new(),
            interrupts,
            dirty: None,
            pool: None,
            epoch: 0,
            is_running: true,
            is_master: true,
            is_draining: false,
            is_resetting: false,
            at_volume: 0,
            counters: Counters::default(),
            notices: VecDeque::with_capacity(NOTICES_MAX),
            now: Duration::ZERO,
            sq_at: Places::none(),
            cq_at: Places::none(),
            first: 0,
            turn_commands: 0,
            turn_bytes: 0,
            measure_at: Duration::ZERO,
            measured: Vec::with_capacity(MEASURED_MAX),
        }
    }

    fn number_queues(&mut self) {
        self.sq_at.set(self.sqs.iter().map(|sq| sq.qid));
        self.cq_at.set(self.cqs.iter().map(|cq| cq.qid));
    }

    /// Memory for reads that leave bytes out. Without it they fail.
    pub fn set_pool(&mut self, pool: Pool) {
        self.pool = Some(pool);
    }

    /// Another view of the namespaces. `open` gives the channel of one that is new here. Commands to
    /// those that are gone end: with what their volume makes of them if it has begun, else "as if
    /// they were issued to an inactive namespace" (NVMe Base 2.1, "Namespace Attachment").
    pub fn set_namespaces(
        &mut self,
        subsys: Arc<SubsystemInfo>,
        mut open: impl FnMut(u32) -> Option<Box<dyn Channel>>,
    ) {
        self.subsys = Arc::clone(&subsys);
        for at in 0..self.spaces.len() {
            let space = &mut self.spaces[at];
            if space.is_leaving || subsys.namespace(space.nsid).is_some() {
                continue;
            }
            space.is_leaving = true;
            self.abort_space(at);
        }
        self.drop_left();
        for ns in subsys.namespaces() {
            if self.space_of(ns.nsid).is_none()
                && let Some(channel) = open(ns.nsid)
            {
                let waiting = VecDeque::new();
                self.spaces.push(Space { nsid: ns.nsid, channel, waiting, is_leaving: false });
            }
        }
    }

    /// Gives back what can be of a volume's I/O.
    fn abort_space(&mut self, at: usize) {
        self.spaces[at].channel.abort();
        for _ in 0..self.spaces[at].waiting.len() {
            let Some(mut io) = self.spaces[at].waiting.pop_front() else { break };
            io.result = Err(IoError::Aborted);
            self.on_io(io);
        }
    }

    /// Closes the channels of namespaces that are gone and have nothing in flight.
    fn drop_left(&mut self) {
        let is_gone = |space: &Space| {
            space.is_leaving && space.channel.in_flight() == 0 && space.waiting.is_empty()
        };
        self.spaces.retain(|space| !is_gone(space));
    }

    fn space_of(&self, nsid: u32) -> Option<usize> {
        self.spaces.iter().position(|space| space.nsid == nsid && !space.is_leaving)
    }

    /// The memory table has changed. Queues that are not in it pause until the next change.
    /// Commands in flight keep the memory they were given.
    pub fn set_memory(&mut self, view: Rc<GuestView>) {
        self.epoch += 1;
        for sq in &mut self.sqs {
            sq.ring = sq.place.bind(&view, 64);
        }
        for cq in &mut self.cqs {
            cq.ring = cq.place.bind(&view, 16);
        }
        self.view = view;
        let shadow = self.record.shadow();
        self.bind_shadow(shadow, false);
    }

    /// Commands that hold memory of before the last change.
    pub fn in_flight_old(&self) -> usize {
        // A first command that waits for its second has none yet.
        let holds = |slot: &&Slot| slot.is_used && !slot.is_completed && slot.pair != Pair::Held;
        let slots = self.sqs.iter().flat_map(|sq| &sq.slots).filter(holds);
        slots.filter(|slot| slot.epoch != self.epoch).count()
    }

    /// Log writes to guest memory.
    pub fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.dirty = log;
    }

    /// Take commands, or leave them in their queues and finish what was taken.
    pub fn set_running(&mut self, is_running: bool) {
        self.is_running = is_running;
    }

    /// Use the guest's memory, or leave it alone: take nothing, post nothing. What is at a volume
    /// finishes its data, as requests that a device has sent already do.
    pub fn set_master(&mut self, is_master: bool) {
        self.is_master = is_master;
    }

    /// Ends a command that waits for a volume to take it. False: there is none, or the volume has
    /// it; it completes by itself then. The completion is posted before this returns, if there is
    /// room for it.
    pub fn abort_command(&mut self, sqid: u16, cid: u16) -> bool {
        let Some(at) = self.sq_at.get(sqid) else { return false };
        let is_it = |slot: &Slot| slot.is_used && !slot.is_completed && slot.sqe.cid.get() == cid;
        let Some(slot) = self.sqs[at].slots.iter().position(is_it) else { return false };
        let slot = slot as u16;
        // A pair has one I/O, and ends as one.
        let owner = match self.sqs[at].slots[usize::from(slot)].pair {
            Pair::Held => {
                self.give_up_held(at, Status::COMMAND_ABORT_REQUESTED);
                self.post_queue_of(at);
                return true;
            }
            Pair::First { second } => second,
            _ => slot,
        };
        let tag = u64::from(sqid) << TAG_SHIFT | u64::from(owner);
        for space in &mut self.spaces {
            let Some(place) = space.waiting.iter().position(|io| io.tag == tag) else { continue };
            let Some(mut io) = space.waiting.remove(place) else { continue };
            io.data.clear();
            self.ios.push(io);
            self.at_volume -= 1;
            self.end(at, owner, Status::COMMAND_ABORT_REQUESTED, false);
            self.post_queue_of(at);
            return true;
        }
        false
    }

    /// Posts what a submission queue has completed, if it may.
    fn post_queue_of(&mut self, at: usize) {
        let cqid = self.sqs[at].cqid;
        if let Some(cq) = self.cq_at.get(cqid)
            && !self.is_resetting
            && self.is_master
        {
            self.post(cq);
        }
    }

    /// When to tell of completions.
    pub fn set_coalescing(&mut self, coalescing: impl Fn(u16) -> Coalescing) {
        for cq in &mut self.cqs {
            if let Some(vector) = cq.vector {
                cq.coalescing = coalescing(vector);
            }
        }
    }

    /// Creates a completion queue, or takes up that of a predecessor, which posted `cq.tail`
    /// entries.
    ///
    /// # Errors
    /// What the command is to complete with.
    pub fn create_cq(
        &mut self,
        qid: u16,
        cq: &CqRecord,
        coalescing: Coalescing,
        is_recovered: bool,
    ) -> Result<(), Refused> {
        if self.cq_at.get(qid).is_some() {
            return Err(Refused(TAKEN));
        }
        let entries = u32::from(cq.entries);
        let place =
            Place::new(&self.view, cq.address, cq.is_contiguous, entries, 16).map_err(Refused)?;
        let ring = place.bind(&self.view, 16).ok_or(Refused(TRANSFER))?;
        if !is_recovered {
            self.record.ring(qid, true, 0);
            self.clear_shadow(qid, true);
            self.record.set_cq(qid, Some(cq));
        }
        let tail = cq.tail;
        self.cqs.push(Cq {
            qid,
            entries,
            place,
            ring: Some(ring),
            vector: cq.vector,
            tail,
            // The oldest that the host can be at; the doorbell says more.
            head: tail.saturating_sub(u64::from(entries) - 1),
            told: 0,
            bad_head: u32::MAX,
            backlog: VecDeque::with_capacity(64),
            coalescing,
            // Whoever posted before may have gone between posting and telling.
            untold: u32::from(is_recovered),
            untold_since: Duration::ZERO,
            is_pending: false,
        });
        self.number_queues();
        Ok(())
    }

    /// Creates a submission queue, or takes up that of a predecessor with the commands it had not
    /// completed. The completion queue is here.
    ///
    /// # Errors
    /// What the command is to complete with.
    pub fn create_sq(
        &mut self,
        qid: u16,
        sq: &SqRecord,
        is_recovered: bool,
    ) -> Result<(), Refused> {
        if self.sq_at.get(qid).is_some() {
            return Err(Refused(TAKEN));
        }
        let entries = u32::from(sq.entries);
        let place =
            Place::new(&self.view, sq.address, sq.is_contiguous, entries, 64).map_err(Refused)?;
        let ring = place.bind(&self.view, 64).ok_or(Refused(TRANSFER))?;
        if !self.cqs.iter().any(|cq| cq.qid == sq.cqid) {
            return Err(Refused(Status::COMPLETION_QUEUE_INVALID.dnr()));
        }
        if !is_recovered {
            self.record.ring(qid, false, 0);
            self.clear_shadow(qid, false);
            self.record.set_sq(qid, Some(sq));
        }
        let slots = entries.min(u32::from(ENTRIES_MAX)) as u16;
        self.sqs.push(Sq {
            qid,
            entries,
            cqid: sq.cqid,
            place,
            ring: Some(ring),
            fetched: sq.fetched,
            told: sq.fetched,
            bad_tail: u32::MAX,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            free: (0..slots).rev().collect(),
            pairing: FusedPairing::new(),
            is_closing: false,
        });
        self.number_queues();
        let wanted = self.ios.len() + usize::from(slots);
        self.ios.resize_with(wanted, || Box::new(Io::with_capacity(SEGMENTS)));
        if is_recovered {
            self.recover(self.sqs.len() - 1);
        }
        Ok(())
    }

    /// Takes up the commands that a predecessor took and did not complete; see [`crate::record`].
    fn recover(&mut self, at: usize) {
        let qid = self.sqs[at].qid;
        let mut found: Vec<_> = (0..self.sqs[at].slots.len() as u16)
            .filter_map(|slot| Some((slot, self.record.slot(qid, slot)?)))
            .collect();
        found.sort_by_key(|(_, slot)| slot.seq);
        let last = found.last().map_or(0, |(_, slot)| slot.seq).max(self.sqs[at].fetched);
        for (slot, saved) in found {
            let sq = &mut self.sqs[at];
            sq.fetched = sq.fetched.max(saved.seq);
            let cqid = sq.cqid;
            if saved.post != 0
                && let Some(cq) = self.cqs.iter_mut().find(|cq| cq.qid == cqid)
            {
                let position = saved.post - 1;
                let is_there = position < cq.tail || cq.has(position);
                if !is_there {
                    cq.write(position, &saved.cqe);
                }
                if position >= cq.tail {
                    cq.tail = position + 1;
                    // The host may have seen it already: its head is where this one begins to count.
                    cq.head = cq.head.max(cq.tail.saturating_sub(u64::from(cq.entries) - 1));
                    self.record.set_tail(cqid, cq.tail);
                }
                cq.untold += 1;
                self.record.free(qid, slot);
                continue;
            }
            sq.free.retain(|free| *free != slot);
            let sqe = Sqe::from_bytes(&saved.sqe);
            match Fuse::of(&sqe) {
                Fuse::None => self.begin(at, slot, sqe),
                // Its second is still in the queue.
                Fuse::First if saved.seq == last => self.begin(at, slot, sqe),
                _ => self.begin_lost_half(at, slot, sqe),
            }
        }
    }

    /// Deletes a submission queue as soon as its commands are back: take no more of it now.
    pub fn close_sq(&mut self, qid: u16) {
        if let Some(at) = self.sqs.iter().position(|sq| sq.qid == qid) {
            self.sqs[at].is_closing = true;
            self.give_up_held(at, Status::ABORTED_SQ_DELETION);
        }
    }

    /// Deletes a closing submission queue whose commands have all completed. False: not yet.
    pub fn remove_sq(&mut self, qid: u16) -> bool {
        let Some(at) = self.sqs.iter().position(|sq| sq.qid == qid) else { return true };
        if self.sqs[at].in_flight() > 0 {
            return false;
        }
        self.sqs.swap_remove(at);
        self.number_queues();
        self.record.set_sq(qid, None);
        let wanted = self.at_most();
        // Those at volumes come back to the pool and go with the next queue.
        self.ios.truncate(wanted.saturating_sub(self.at_volume));
        true
    }

    fn at_most(&self) -> usize {
        self.sqs.iter().map(|sq| sq.slots.len()).sum()
    }

    /// Deletes a completion queue.
    pub fn remove_cq(&mut self, qid: u16) {
        self.cqs.retain(|cq| cq.qid != qid);
        self.number_queues();
        self.record.set_cq(qid, None);
    }

    /// The controller is shut down: take nothing more, and complete what was taken.
    pub fn drain(&mut self) {
        self.is_draining = true;
        for at in 0..self.sqs.len() {
            self.give_up_held(at, Status::ABORTED_MISSING_FUSED.dnr());
        }
    }

    /// Flushes every volume, for nobody in particular.
    pub fn flush_all(&mut self) {
        for at in 0..self.spaces.len() {
            let mut io = Box::new(Io::new(Op::Flush, 0, 0));
            io.tag = u64::from(NO_QUEUE) << TAG_SHIFT;
            self.submit(at, io);
        }
    }

    /// The controller is reset: nothing is taken or posted from now on. When nothing is at the
    /// volumes any more, call [`Engine::clear`].
    pub fn reset(&mut self) {
        self.is_resetting = true;
    }

    /// All queues are gone.
    pub fn clear(&mut self) {
        debug_assert_eq!(self.at_volume, 0, "I/O of a queue that goes");
        self.sqs.clear();
        self.cqs.clear();
        self.number_queues();
        self.ios.clear();
        self.shadow = None;
        self.is_shadowed = false;
        self.is_resetting = false;
        self.is_draining = false;
    }

    /// I/Os at volumes, or waiting to be.
    pub fn at_volume(&self) -> usize {
        self.at_volume
    }

    /// Whether a core that does not take commands has come to rest: nothing is at the volumes, and
    /// nothing can be posted.
    pub fn is_quiet(&self) -> bool {
        let is_stuck = |cq: &Cq| {
            cq.backlog.is_empty()
                || cq.is_full()
                || !self.is_master
                || cq.ring.is_none()
                || self.doorbell(cq.qid, true).is_none()
        };
        self.at_volume == 0 && self.cqs.iter().all(is_stuck)
    }

    /// Commands taken and not completed.
    pub fn in_flight(&self) -> usize {
        self.sqs.iter().map(Sq::in_flight).sum()
    }

    /// Submission and completion queues.
    pub fn queues(&self) -> (usize, usize) {
        (self.sqs.len(), self.cqs.len())
    }

    /// Queues, entries and commands in flight of each submission queue.
    pub fn submission_queues(&self) -> impl Iterator<Item = (u16, u16, u32, usize)> + '_ {
        self.sqs.iter().map(|sq| (sq.qid, sq.cqid, sq.entries, sq.in_flight()))
    }

    /// Identifiers of the completion queues.
    pub fn completion_queues(&self) -> impl Iterator<Item = u16> + '_ {
        self.cqs.iter().map(|cq| cq.qid)
    }

    /// Counters since the start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Puts them in the record, as those of this core of the device.
    pub fn save_counters(&self, core: usize) {
        self.record.set_counters(core, &self.counters);
    }

    /// The next thing that the control thread is to hear of.
    pub fn notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    fn tell(&mut self, notice: Notice) {
        if self.notices.len() < NOTICES_MAX {
            self.notices.push_back(notice);
        }
    }

    /// I/O that has not come back for too long: give back what can be.
    pub fn abort(&mut self) {
        for at in 0..self.spaces.len() {
            self.abort_space(at);
        }
    }

    /// When something is to be done although nothing happens on the core.
    pub fn deadline(&self) -> Option<Duration> {
        let channels = self.spaces.iter().filter_map(|space| space.channel.deadline());
        let stuck = self
            .spaces
            .iter()
            .any(|space| !space.waiting.is_empty() && space.channel.in_flight() == 0)
            .then(|| self.now + Duration::from_millis(1));
        let untold = self.cqs.iter().filter(|cq| cq.untold > 0 && !cq.is_pending);
        let untold = untold.map(|cq| cq.untold_since + cq.coalescing.time);
        channels.chain(stuck).chain(untold).min()
    }

    /// One turn: take, submit, complete, post, tell. True if something moved.
    pub fn poll(&mut self, now: Duration) -> bool {
        self.now = now;
        let mut has_worked = false;
        for at in 0..self.spaces.len() {
            has_worked |= self.submit_waiting(at);
        }
        if self.is_running && self.is_master && !self.is_draining && !self.is_resetting {
            (self.turn_commands, self.turn_bytes) = (TURN_COMMANDS, TURN_BYTES);
            // Queues take turns to be first.
            self.first = self.first.wrapping_add(1);
            let count = self.sqs.len();
            let first = self.first.checked_rem(count).unwrap_or(0);
            for at in (first..count).chain(0..first) {
                has_worked |= self.take(at);
            }
        }
        has_worked |= self.reap();
        if !self.is_resetting && self.is_master {
            for at in 0..self.cqs.len() {
                has_worked |= self.post(at);
            }
            self.interrupt();
        }
        if !self.measured.is_empty() {
            let now = Instant::now();
            for from in self.measured.drain(..) {
                self.counters.latency.record(now.saturating_duration_since(from));
            }
        }
        has_worked
    }

    fn reap(&mut self) -> bool {
        let mut has_worked = false;
        for at in 0..self.spaces.len() {
            let space = &mut self.spaces[at];
            let mut returned = std::mem::take(&mut self.returned);
            space.channel.poll(&mut |io| returned.push(io));
            has_worked |= !returned.is_empty();
            for io in returned.drain(..) {
                self.on_io(io);
            }
            self.returned = returned;
        }
        self.drop_left();
        has_worked
    }

    fn submit_waiting(&mut self, at: usize) -> bool {
        let space = &mut self.spaces[at];
        let mut has_worked = false;
        while let Some(io) = space.waiting.pop_front() {
            if let Err(Busy(io)) = space.channel.submit(io) {
                space.waiting.push_front(io);
                break;
            }
            has_worked = true;
        }
        has_worked
    }

    fn submit(&mut self, at: usize, io: Box<Io>) {
        self.at_volume += 1;
        let space = &mut self.spaces[at];
        if !space.waiting.is_empty() {
            space.waiting.push_back(io);
        } else if let Err(Busy(io)) = space.channel.submit(io) {
            self.counters.busy += 1;
            space.waiting.push_back(io);
        }
    }

    /// A doorbell as it was rung last; `None` if it is in guest memory that is not there now.
    #[inline]
    fn doorbell(&self, qid: u16, is_cq: bool) -> Option<u32> {
        match &self.shadow {
            Some((doorbells, ..)) => doorbells.load_u32(shadow_at(qid, is_cq), Acquire).ok(),
            // The others are old, and would be taken for news.
            None if self.is_shadowed => None,
            None => Some(self.record.doorbell(qid, is_cq)),
        }
    }

    /// Takes commands of a submission queue.
    fn take(&mut self, at: usize) -> bool {
        let sq = &self.sqs[at];
        let Some(tail) = self.doorbell(sq.qid, false) else { return false };
        let sq = &mut self.sqs[at];
        let entries = u64::from(sq.entries);
        if (sq.fetched % entries) as u32 == tail {
            return false;
        }
        if tail >= sq.entries {
            if sq.bad_tail != tail {
                sq.bad_tail = tail;
                self.tell(Notice::BadDoorbell);
            }
            return false;
        }
        sq.bad_tail = u32::MAX;
        let mut has_worked = false;
        for _ in 0..QUEUE_TURN_MAX.min(self.turn_commands) {
            if self.turn_bytes == 0 {
                break;
            }
            let sq = &mut self.sqs[at];
            let head = (sq.fetched % entries) as u32;
            if head == tail || sq.is_closing {
                break;
            }
            let Some((piece, offset)) = sq.ring.as_ref().and_then(|ring| ring.entry(head)) else {
                break;
            };
            let Ok(bytes) = piece.read::<64>(offset) else { break };
            let Some(slot) = sq.free.pop() else { break };
            sq.fetched += 1;
            self.turn_commands -= 1;
            self.record.take(sq.qid, slot, &bytes, sq.fetched);
            self.begin(at, slot, Sqe::from_bytes(&bytes));
            has_worked = true;
        }
        let sq = &mut self.sqs[at];
        if self.shadow.is_some() && is_far(sq.fetched - sq.told, sq.entries) {
            sq.told = sq.fetched;
            let (qid, behind) = (sq.qid, behind(sq.fetched, sq.entries));
            self.put_event_idx(qid, false, behind);
        }
        has_worked
    }

    /// Begins the command in a slot.
    fn begin(&mut self, at: usize, slot: u16, sqe: Sqe) {
        self.fill(at, slot, sqe);
        if let Err(status) = self.start(at, slot, &sqe) {
            self.complete(at, slot, status, 0);
        }
    }

    /// Puts a command into a slot.
    #[inline]
    fn fill(&mut self, at: usize, slot: u16, sqe: Sqe) {
        let (now, epoch) = (self.now, self.epoch);
        let entry = &mut self.sqs[at].slots[usize::from(slot)];
        (entry.sqe, entry.step, entry.taken_at, entry.epoch) = (sqe, 0, now, epoch);
        (entry.is_used, entry.is_completed, entry.command) = (true, false, None);
        (entry.measured_from, entry.is_bounced, entry.pair) = (None, false, Pair::Alone);
        if now >= self.measure_at {
            self.measure_at = now + MEASURE_EVERY;
            entry.measured_from = Some(Instant::now());
        }
    }

    /// An I/O is back.
    fn on_io(&mut self, mut io: Box<Io>) {
        self.at_volume -= 1;
        let (qid, slot) = ((io.tag >> TAG_SHIFT) as u16, io.tag as u16);
        let (op, offset, result) = (io.op, io.offset, io.result);
        if qid == NO_QUEUE {
            return;
        }
        let scattered = match self.is_bounced(qid, slot) && result.is_ok() && !self.is_resetting {
            true => self.scatter(qid, slot, &io.data),
            false => Ok(()),
        };
        io.data.clear();
        self.ios.push(io);
        if self.is_resetting {
            return;
        }
        let Some(at) = self.sq_at.get(qid) else {
            debug_assert!(false, "queues stay until their I/O is back");
            return;
        };
        if self.sqs[at].slots[usize::from(slot)].pair == Pair::Lost {
            self.complete(at, slot, Status::COMMAND_ABORT_REQUESTED, 0);
            return;
        }
        if let Err(error) = result {
            let mut status = status::of(error, op);
            if matches!(error, IoError::Aborted | IoError::Gone) && self.is_detached(at, slot) {
                match self.sqs[at].slots[usize::from(slot)].command {
                    // What was left to flush was the others.
                    Some(IoCommand::Flush { nsid: NSID_ALL }) => {
                        if let Err(status) = self.next_step(at, slot) {
                            self.complete(at, slot, status, 0);
                        }
                        return;
                    }
                    _ => status = INACTIVE,
                }
                self.end(at, slot, status, true);
                return;
            }
            let sqe = &self.sqs[at].slots[usize::from(slot)].sqe;
            let is_failure = matches!(error, IoError::Medium | IoError::Gone | IoError::NoSpace);
            if is_failure {
                let failure = Failure {
                    sqid: qid,
                    cid: sqe.cid.get(),
                    status,
                    opcode: sqe.opcode,
                    nsid: sqe.nsid.get(),
                    offset,
                };
                self.counters.media_errors += u64::from(error == IoError::Medium);
                self.tell(Notice::Failed(failure));
            }
            self.end(at, slot, status, is_failure || error == IoError::Aborted);
            return;
        }
        if let Err(status) = scattered {
            self.complete(at, slot, status, 0);
            return;
        }
        let more = match op {
            Op::Flush | Op::Deallocate => self.next_step(at, slot),
            Op::Read | Op::ReservationReport => {
                if self.dirty.is_some() {
                    self.log_data(at, slot);
                }
                self.complete(at, slot, Status::SUCCESS, 0);
                Ok(())
            }
            _ => {
                self.end(at, slot, Status::SUCCESS, true);
                Ok(())
            }
        };
        if let Err(status) = more {
            self.complete(at, slot, status, 0);
        }
    }

    /// Whether the namespace of a command in flight is one no more.
    #[cold]
    fn is_detached(&self, at: usize, slot: u16) -> bool {
        let entry = &self.sqs[at].slots[usize::from(slot)];
        let nsid = match entry.command {
            Some(IoCommand::Flush { nsid: NSID_ALL }) => entry.step,
            _ => entry.sqe.nsid.get(),
        };
        self.subsys.namespace(nsid).is_none()
    }

    fn is_bounced(&self, qid: u16, slot: u16) -> bool {
        let sq = self.sq_at.get(qid).and_then(|at| self.sqs.get(at));
        sq.and_then(|sq| sq.slots.get(usize::from(slot))).is_some_and(|entry| entry.is_bounced)
    }

    /// Copies what was read to where the command wants it, and leaves out what it does not want. The
    /// list is read again: a guest that has changed it meanwhile misleads only itself.
    #[cold]
    fn scatter(&self, qid: u16, slot: u16, data: &SgList) -> Result<(), Status> {
        let Some(sq) = self.sq_at.get(qid).and_then(|at| self.sqs.get(at)) else { return Ok(()) };
        let (view, entry) = (&self.view, &sq.slots[usize::from(slot)]);
        let at = Cell::new(0);
        walk(
            &entry.sqe,
            data.len() as u32,
            true,
            &mut Discarding {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    let from = at.replace(at.get() + len as usize);
                    let mut to = addr;
                    let mut is_there = true;
                    let copied = data.for_each_chunk(from, len as usize, &mut |bytes| {
                        is_there &= view.write(to, bytes).is_ok();
                        to = to.wrapping_add(bytes.len() as u64);
                    });
                    if copied.is_ok() && is_there { Ok(()) } else { Err(TRANSFER) }
                },
                discard: |len| {
                    at.set(at.get() + len as usize);
                    Ok(())
                },
            },
        )
    }

    /// Logs the data of a command that wrote to guest memory. Lists are read again: a guest that
    /// changes them while the command runs misleads only itself.
    #[cold]
    fn log_data(&self, at: usize, slot: u16) {
        let (Some(log), view) = (&self.dirty, &self.view) else { return };
        let entry = &self.sqs[at].slots[usize::from(slot)];
        let len = entry.command.map_or(0, |command| command.reply_len());
        let _ = walk(
            &entry.sqe,
            len,
            true,
            &mut Discarding {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    log.mark(addr, len);
                    Ok(())
                },
                discard: |_| Ok(()),
            },
        );
    }

    /// A command's result is known.
    fn complete(&mut self, at: usize, slot: u16, status: Status, result: u32) {
        let sq = &mut self.sqs[at];
        let entry = &mut sq.slots[usize::from(slot)];
        entry.is_completed = true;
        let counters = &mut self.counters;
        let took = self.now.saturating_sub(entry.taken_at);
        counters.busy_time += took;
        counters.latency.saw(took);
        counters.errors += u64::from(!status.is_success());
        match entry.command {
            Some(IoCommand::Read { len, .. }) => {
                counters.reads += 1;
                counters.read_bytes += if status.is_success() { u64::from(len) } else { 0 };
            }
            Some(IoCommand::Write { len, .. }) => {
                counters.writes += 1;
                counters.written_bytes += if status.is_success() { u64::from(len) } else { 0 };
            }
            _ => counters.others += 1,
        }
        let done = Done { sqid: sq.qid, slot, status, result };
        let cqid = sq.cqid;
        match self.cq_at.get(cqid).and_then(|at| self.cqs.get_mut(at)) {
            Some(cq) => cq.backlog.push_back(done),
            None => debug_assert!(false, "completion queues outlive those that use them"),
        }
    }

    /// Posts what a completion queue has room for.
    fn post(&mut self, at: usize) -> bool {
        if self.cqs[at].backlog.is_empty() {
            return false;
        }
        let qid = self.cqs[at].qid;
        let Some(head) = self.doorbell(qid, true) else { return false };
        let cq = &mut self.cqs[at];
        if !cq.see_head(head) && cq.bad_head != head {
            cq.bad_head = head;
            self.tell(Notice::BadDoorbell);
        }
        let cq = &mut self.cqs[at];
        if self.shadow.is_some() && is_far(cq.head.saturating_sub(cq.told), cq.entries) {
            cq.told = cq.head;
            let behind = behind(cq.head, cq.entries);
            self.put_event_idx(qid, true, behind);
        }
        let cq = &mut self.cqs[at];
        let mut has_worked = false;
        while !cq.is_full() && cq.ring.is_some() {
            let Some(done) = cq.backlog.pop_front() else { break };
            let Some(sq) = self.sq_at.get(done.sqid).and_then(|at| self.sqs.get_mut(at)) else {
                continue;
            };
            let entry = &mut sq.slots[usize::from(done.slot)];
            let mut cqe = Cqe::new(entry.sqe.cid.get(), done.status, u64::from(done.result));
            cqe.sqid.set(sq.qid);
            cqe.sqhd.set((sq.fetched % u64::from(sq.entries)) as u16);
            let phase = cq.phase(cq.tail);
            cqe.status_raw.set(cqe.status_raw.get() & !1 | phase);
            let bytes = cqe.to_bytes();
            self.record.completing(sq.qid, done.slot, &bytes, cq.tail + 1);
            cq.write(cq.tail, &bytes);
            if let Some(log) = &self.dirty {
                let index = (cq.tail % u64::from(cq.entries)) as u32;
                log.mark(cq.place.address(index, 16), 16);
            }
            cq.tail += 1;
            self.record.set_tail(qid, cq.tail);
            self.record.free(sq.qid, done.slot);
            entry.is_used = false;
            if let Some(from) = entry.measured_from.take()
                && self.measured.len() < MEASURED_MAX
            {
                self.measured.push(from);
            }
            sq.free.push(done.slot);
            if cq.untold == 0 {
                cq.untold_since = self.now;
            }
            cq.untold += 1;
            has_worked = true;
        }
        has_worked
    }

    /// Raises the vectors of queues with news: once for all that came in this turn, later if the
    /// host wants to gather more.
    fn interrupt(&mut self) {
        let has_changed = self.interrupts.refresh();
        for at in 0..self.cqs.len() {
            let (qid, vector) = (self.cqs[at].qid, self.cqs[at].vector);
            let head = if has_changed { self.doorbell(qid, true) } else { None };
            let cq = &mut self.cqs[at];
            let Some(vector) = vector else {
                cq.untold = 0;
                continue;
            };
            if has_changed {
                // What nobody listened to is told now, if it has not been seen.
                let _ = head.map(|head| cq.see_head(head));
                cq.is_pending |= cq.head < cq.tail;
            }
            let is_due = cq.untold > 0
                && (cq.untold >= cq.coalescing.entries
                    || self.now >= cq.untold_since + cq.coalescing.time);
            if is_due || (cq.is_pending && has_changed) {
                cq.untold = 0;
                cq.is_pending = !self.interrupts.raise(vector);
                self.counters.interrupts += u64::from(!cq.is_pending);
            }
        }
    }

    /// Whether a turn would do something.
    pub fn has_work(&self) -> bool {
        if self.is_resetting || !self.is_master {
            return false;
        }
        let can_take = |sq: &Sq| {
            let Some(tail) = self.doorbell(sq.qid, false) else { return false };
            self.is_running
                && !self.is_draining
                && !sq.is_closing
                && sq.ring.is_some()
                && !sq.free.is_empty()
                && tail < sq.entries
                && (sq.fetched % u64::from(sq.entries)) as u32 != tail
        };
        let can_post = |cq: &Cq| {
            if cq.backlog.is_empty() || cq.ring.is_none() {
                return false;
            }
            let Some(head) = self.doorbell(cq.qid, true) else { return false };
            !cq.is_full() || head != (cq.head % u64::from(cq.entries)) as u32 && head != cq.bad_head
        };
        self.sqs.iter().any(can_take) || self.cqs.iter().any(can_post)
    }
}

#[cfg(test)]
mod tests;
