//! A layer that makes trouble: errors, delays, refusals and held I/O, from a seed.
//!
//! ```text
//!   submit ─► plan: busy? error? delay? ─► held ─► inner channel ─► back through poll
//! ```
//!
//! For tests of everything above, and of a running target by hand. The plan is changed through a
//! [`FaultHandle`] from any thread and takes effect for I/O submitted afterwards; with the same
//! seed and the same order of events the same I/Os are hit.

use std::cmp::{Ordering as Order, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reactor::{CoreHandle, Local};

use crate::io::{Io, IoError, Op, check};
use crate::volume::{Busy, Channel, Geometry, Identity, Volume};

/// What goes wrong, and how often. The default does nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// I/Os in a million that fail without having been done.
    pub errors_per_million: u32,
    /// What they fail with; `None` is [`IoError::Medium`].
    pub error: Option<IoError>,
    /// Which operations fail; `None` is all of them.
    pub only: Option<Op>,
    /// Submissions in a million that are answered `Busy` although there is room.
    pub busy_per_million: u32,
    /// I/Os in a million that wait before they are done.
    pub delays_per_million: u32,
    /// Shortest wait.
    pub delay_min: Duration,
    /// Longest wait; at least the shortest.
    pub delay_max: Duration,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounters {
    /// I/Os accepted, by [`Op::index`].
    pub submitted: [u64; Op::COUNT],
    /// I/Os given back, by [`Op::index`].
    pub completed: [u64; Op::COUNT],
    /// I/Os failed by the plan.
    pub errors: u64,
    /// I/Os delayed by the plan.
    pub delays: u64,
    /// Submissions refused by the plan.
    pub refusals: u64,
}

/// Relaxed throughout: single values with no order between them, read by people and tests that have
/// other means to know that an I/O has ended.
#[derive(Default)]
struct Shared {
    errors_per_million: AtomicU32,
    error: AtomicU32,
    only: AtomicU32,
    busy_per_million: AtomicU32,
    delays_per_million: AtomicU32,
    delay_min_ns: AtomicU64,
    delay_max_ns: AtomicU64,
    is_held: AtomicBool,
    submitted: [AtomicU64; Op::COUNT],
    completed: [AtomicU64; Op::COUNT],
    errors: AtomicU64,
    delays: AtomicU64,
    refusals: AtomicU64,
    /// Cores with channels, to wake on release. Only touched when channels open and by the handle.
    cores: Mutex<Vec<CoreHandle>>,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Changes the plan and reads the counters, from any thread.
#[derive(Clone)]
pub struct FaultHandle(Arc<Shared>);

impl FaultHandle {
    /// Replaces the plan.
    pub fn set(&self, plan: FaultPlan) {
        let shared = &self.0;
        let error = plan.error.unwrap_or(IoError::Medium);
        let index = IoError::ALL.iter().position(|x| *x == error).unwrap_or(0);
        shared.error.store(index as u32, Relaxed);
        shared.only.store(plan.only.map_or(0, |op| op.index() as u32 + 1), Relaxed);
        shared.delay_min_ns.store(nanos(plan.delay_min), Relaxed);
        shared.delay_max_ns.store(nanos(plan.delay_max.max(plan.delay_min)), Relaxed);
        shared.busy_per_million.store(plan.busy_per_million, Relaxed);
        shared.delays_per_million.store(plan.delays_per_million, Relaxed);
        shared.errors_per_million.store(plan.errors_per_million, Relaxed);
    }

    /// From now on I/O is accepted and kept, as behind a lost path.
    pub fn hold(&self) {
        self.0.is_held.store(true, Relaxed);
    }

    /// Lets held I/O go on, and what follows pass.
    pub fn release(&self) {
        self.0.is_held.store(false, Relaxed);
        for core in self.0.cores.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            core.wake();
        }
    }

    /// What has happened so far.
    pub fn counters(&self) -> FaultCounters {
        let shared = &self.0;
        FaultCounters {
            submitted: shared.submitted.each_ref().map(|n| n.load(Relaxed)),
            completed: shared.completed.each_ref().map(|n| n.load(Relaxed)),
            errors: shared.errors.load(Relaxed),
            delays: shared.delays.load(Relaxed),
            refusals: shared.refusals.load(Relaxed),
        }
    }
}

/// See the module.
pub struct FaultVolume {
    inner: Arc<dyn Volume>,
    shared: Arc<Shared>,
    seed: u64,
    channels: AtomicU64,
}

impl FaultVolume {
    /// A layer over `inner` that does nothing yet.
    pub fn new(inner: Arc<dyn Volume>, seed: u64) -> (FaultVolume, FaultHandle) {
        let shared = Arc::new(Shared::default());
        let handle = FaultHandle(Arc::clone(&shared));
        (FaultVolume { inner, shared, seed, channels: AtomicU64::new(0) }, handle)
    }
}

impl Volume for FaultVolume {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn open(&self, local: &Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        let inner = self.inner.open(local, depth)?;
        self.shared.cores.lock().unwrap_or_else(PoisonError::into_inner).push(local.handle());
        let number = self.channels.fetch_add(1, Relaxed);
        let room = depth as usize;
        Ok(Box::new(FaultChannel {
            inner,
            volume: Arc::clone(&self.inner),
            shared: Arc::clone(&self.shared),
            local: local.clone(),
            random: Random(self.seed ^ number.wrapping_mul(0xA076_1D64_78BD_642F)),
            depth: room,
            in_flight: 0,
            sequence: 0,
            delayed: BinaryHeap::with_capacity(room),
            ready: VecDeque::with_capacity(room),
            done: VecDeque::with_capacity(room),
        }))
    }

    fn refresh(&self) -> io::Result<Geometry> {
        self.inner.refresh()
    }

    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    fn used_bytes(&self) -> Option<u64> {
        self.inner.used_bytes()
    }

    fn notices(&self) -> Vec<String> {
        let mut notices = self.inner.notices();
        notices.push("a fault layer is in place: I/O may fail or stall on purpose".to_owned());
        notices
    }
}

/// SplitMix64: small, seeded, good enough to choose victims.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn hits(&mut self, per_million: u32) -> bool {
        per_million > 0 && self.next() % 1_000_000 < u64::from(per_million)
    }
}

/// An I/O that waits for its time; among equals the first submitted goes first.
struct Delayed {
    due: Duration,
    sequence: u64,
    io: Box<Io>,
}

impl PartialEq for Delayed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Order::Equal
    }
}

impl Eq for Delayed {}

impl PartialOrd for Delayed {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}

impl Ord for Delayed {
    fn cmp(&self, other: &Self) -> Order {
        (self.due, self.sequence).cmp(&(other.due, other.sequence))
    }
}

struct FaultChannel {
    inner: Box<dyn Channel>,
    volume: Arc<dyn Volume>,
    shared: Arc<Shared>,
    local: Local,
    random: Random,
    depth: usize,
    in_flight: usize,
    sequence: u64,
    delayed: BinaryHeap<Reverse<Delayed>>,
    /// Waiting for the inner channel, or for the release.
    ready: VecDeque<Box<Io>>,
    /// Failed here.
    done: VecDeque<Box<Io>>,
}

impl FaultChannel {
    /// Passes on what is due, unless everything is held.
    fn push(&mut self) {
        if self.shared.is_held.load(Relaxed) {
            return;
        }
        let now = self.local.now();
        while let Some(Reverse(first)) = self.delayed.peek()
            && first.due <= now
            && let Some(Reverse(first)) = self.delayed.pop()
        {
            self.ready.push_back(first.io);
        }
        while let Some(io) = self.ready.pop_front() {
            if let Err(Busy(io)) = self.inner.submit(io) {
                self.ready.push_front(io);
                break;
            }
        }
    }

    fn delay(&mut self) -> Duration {
        let min = self.shared.delay_min_ns.load(Relaxed);
        let max = self.shared.delay_max_ns.load(Relaxed).max(min);
        let spread = (max - min).saturating_add(1);
        Duration::from_nanos(min + self.random.next() % spread)
    }
}

impl Channel for FaultChannel {
    fn submit(&mut self, mut io: Box<Io>) -> Result<(), Busy> {
        if self.in_flight == self.depth {
            return Err(Busy(io));
        }
        if self.random.hits(self.shared.busy_per_million.load(Relaxed)) && self.in_flight > 0 {
            self.shared.refusals.fetch_add(1, Relaxed);
            return Err(Busy(io));
        }
        self.in_flight += 1;
        self.shared.submitted[io.op.index()].fetch_add(1, Relaxed);
        // What the inner channel would refuse is refused the same way, however long it is held.
        io.result = check(&self.volume.geometry(), &io);
        let only = self.shared.only.load(Relaxed);
        let is_victim = only == 0 || only == io.op.index() as u32 + 1;
        if io.result.is_ok()
            && is_victim
            && self.random.hits(self.shared.errors_per_million.load(Relaxed))
        {
            self.shared.errors.fetch_add(1, Relaxed);
            let error = IoError::ALL.get(self.shared.error.load(Relaxed) as usize);
            io.result = Err(error.copied().unwrap_or(IoError::Medium));
        }
        if io.result.is_err() {
            self.done.push_back(io);
        } else if self.random.hits(self.shared.delays_per_million.load(Relaxed)) {
            self.shared.delays.fetch_add(1, Relaxed);
            let due = self.local.now().saturating_add(self.delay());
            self.sequence += 1;
            self.delayed.push(Reverse(Delayed { due, sequence: self.sequence, io }));
        } else {
            self.ready.push_back(io);
            self.push();
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        if self.in_flight == 0 {
            return;
        }
        self.push();
        let (in_flight, shared) = (&mut self.in_flight, &self.shared);
        let mut give = |io: Box<Io>| {
            *in_flight -= 1;
            shared.completed[io.op.index()].fetch_add(1, Relaxed);
            done(io);
        };
        while let Some(io) = self.done.pop_front() {
            give(io);
        }
        self.inner.poll(&mut give);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn deadline(&self) -> Option<Duration> {
        let own = if !self.done.is_empty() {
            Some(Duration::ZERO)
        } else if self.shared.is_held.load(Relaxed) {
            None
        } else {
            self.delayed.peek().map(|Reverse(first)| first.due)
        };
        [own, self.inner.deadline()].into_iter().flatten().min()
    }

    fn abort(&mut self) {
        let delayed = self.delayed.drain().map(|Reverse(d)| d.io);
        for mut io in delayed.chain(self.ready.drain(..)) {
            io.result = Err(IoError::Aborted);
            self.done.push_back(io);
        }
        self.inner.abort();
    }
}
