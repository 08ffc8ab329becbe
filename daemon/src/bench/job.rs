//! One job: a task that keeps `depth` I/Os in flight on one channel.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use block::{Channel, Geometry, Io, IoError, Op, Volume};
use hdrhistogram::Histogram;
use iobuf::SgList;
use reactor::{Local, Progress, Task};

use super::pattern::{self, Expect, Mismatch};
use super::plan::{Plan, PlanConfig, Step};
use super::{Share, Workload};

/// Longest latency told apart; longer ones count as this.
const LATENCY_NS_MAX: u64 = 600_000_000_000;

/// Starts and stops all jobs of a run.
#[derive(Debug, Clone, Default)]
pub(super) struct Signal(Arc<AtomicU8>);

const WAITING: u8 = 0;
const RUNNING: u8 = 1;
const STOPPED: u8 = 2;

// Relaxed throughout: the flag carries no data with it.
impl Signal {
    pub(super) fn go(&self) {
        self.0.store(RUNNING, Ordering::Relaxed);
    }

    pub(super) fn stop(&self) {
        self.0.store(STOPPED, Ordering::Relaxed);
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

pub(super) struct Settings {
    pub(super) workload: Workload,
    pub(super) share: Share,
    pub(super) run_id: u32,
    pub(super) geometry: Geometry,
    pub(super) signal: Signal,
}

/// What a job says.
pub(super) enum Event {
    /// The measured part is over: everything started in the runtime has ended.
    Measured,
    /// The job is over.
    Ended(Box<Outcome>),
}

/// One direction's numbers.
pub(super) struct Counts {
    pub(super) ios: u64,
    /// Latencies in nanoseconds.
    pub(super) latency: Histogram<u64>,
}

impl Counts {
    pub(super) fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)
            .expect("bounds are constant and allowed: 1 <= low, 2 * low <= high, digits <= 5");
        Counts { ios: 0, latency }
    }
}

/// A job's result.
pub(super) struct Outcome {
    pub(super) reads: Counts,
    pub(super) writes: Counts,
    pub(super) errors: u64,
    /// The first error: where, and what.
    pub(super) first_error: Option<(u64, IoError)>,
    pub(super) checked: u64,
    pub(super) mismatches: u64,
    pub(super) first_mismatch: Option<Mismatch>,
    /// From the first submission to the last completion of the measured part.
    pub(super) elapsed: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Until the run begins.
    Waiting,
    /// I/Os are started until the time is up.
    Measuring,
    /// What was started ends.
    Draining,
    /// One flush, so that what is read back is what was stored.
    Flushing,
    /// Every place written is read.
    ReadingBack,
}

struct Slot {
    step: Step,
    begun: Instant,
}

pub(super) struct Job {
    settings: Settings,
    plan: Plan,
    channel: Box<dyn Channel>,
    phase: Phase,
    /// A step the channel had no room for: it comes next.
    refused: Option<Step>,
    /// The buffer of the I/O that is the flush.
    lent: SgList,
    /// I/Os at rest; their `tag` names their slot.
    #[expect(clippy::vec_box, reason = "channels take and give back the boxes")]
    idle: Vec<Box<Io>>,
    slots: Vec<Slot>,
    /// Completions of one poll; its capacity is kept.
    #[expect(clippy::vec_box, reason = "channels take and give back the boxes")]
    done: Vec<Box<Io>>,
    scratch: Vec<u8>,
    outcome: Option<Box<Outcome>>,
    begun: Instant,
    events: mpsc::Sender<Event>,
}

impl Job {
    /// Opens the channel and makes every I/O with its buffer.
    pub(super) fn new(
        settings: Settings,
        volume: &dyn Volume,
        local: &Local,
        events: mpsc::Sender<Event>,
    ) -> io::Result<Job> {
        let workload = &settings.workload;
        let depth = workload.depth as usize;
        let io_bytes = workload.io_bytes as usize;
        let channel = volume.open(local, workload.depth)?;
        let mut scratch = vec![0; io_bytes];
        pattern::fill(workload.seed, 0, 0, &mut scratch);
        let mut idle = Vec::with_capacity(depth);
        let mut slots = Vec::with_capacity(depth);
        let now = Instant::now();
        for index in 0..depth {
            let mut io = Box::new(Io::new(Op::Read, 0, 0));
            io.tag = index as u64;
            local.pool().alloc(io_bytes, &mut io.data).map_err(io::Error::other)?;
            io.data.copy_from_slice(0, &scratch).map_err(io::Error::other)?;
            idle.push(io);
            slots.push(Slot { step: Step { read: false, place: 0, writes: 0 }, begun: now });
        }
        let tracked = workload.verify && workload.access.read_percent != 100;
        let plan = Plan::new(PlanConfig {
            first: settings.share.first,
            count: settings.share.count,
            random: workload.access.random,
            read_percent: workload.access.read_percent,
            seed: workload.seed,
            tracked,
        });
        Ok(Job {
            plan,
            channel,
            phase: Phase::Waiting,
            refused: None,
            lent: SgList::default(),
            idle,
            slots,
            done: Vec::with_capacity(depth),
            scratch,
            outcome: Some(Box::new(Outcome {
                reads: Counts::new(),
                writes: Counts::new(),
                errors: 0,
                first_error: None,
                checked: 0,
                mismatches: 0,
                first_mismatch: None,
                elapsed: Duration::ZERO,
            })),
            begun: now,
            events,
            settings,
        })
    }

    fn is_quiet(&self) -> bool {
        self.idle.len() == self.slots.len() && self.refused.is_none()
    }

    /// The generation of the `writes`-th write of this run to a place.
    fn generation(&self, writes: u32) -> u64 {
        (u64::from(self.settings.run_id) << 32) | u64::from(writes)
    }

    /// Starts what may be started. `true` if anything was.
    fn start(&mut self) -> bool {
        let mut started = false;
        while let Some(mut io) = self.idle.pop() {
            let step = match self.phase {
                Phase::Waiting | Phase::Flushing => None,
                _ if self.refused.is_some() => self.refused.take(),
                Phase::Measuring => self.plan.next(),
                Phase::ReadingBack => self.plan.next_read_back(),
                Phase::Draining => None,
            };
            let Some(step) = step else {
                self.idle.push(io);
                break;
            };
            let workload = &self.settings.workload;
            io.op = if step.read { Op::Read } else { Op::Write };
            io.offset = step.place * workload.io_bytes;
            io.len = workload.io_bytes;
            if workload.verify && !step.read {
                let generation = self.generation(step.writes);
                pattern::fill(workload.seed, io.offset, generation, &mut self.scratch);
                // The buffer has the length of the I/O since `new`.
                let _ = io.data.copy_from_slice(0, &self.scratch);
            }
            let slot = io.tag as usize;
            self.slots[slot] = Slot { step, begun: Instant::now() };
            if let Err(block::Busy(io)) = self.channel.submit(io) {
                self.refused = Some(step);
                self.idle.push(io);
                break;
            }
            started = true;
        }
        started
    }

    /// Takes what has ended. `true` if anything had.
    fn reap(&mut self) -> bool {
        let done = &mut self.done;
        self.channel.poll(&mut |io| done.push(io));
        if self.done.is_empty() {
            return false;
        }
        let now = Instant::now();
        let mut done = std::mem::take(&mut self.done);
        for io in done.drain(..) {
            self.finish(io, now);
        }
        self.done = done;
        true
    }

    fn finish(&mut self, mut io: Box<Io>, now: Instant) {
        let generation = self.generation(self.slots[io.tag as usize].step.writes);
        let Slot { step, begun } = &self.slots[io.tag as usize];
        let Some(outcome) = self.outcome.as_deref_mut() else {
            self.idle.push(io);
            return;
        };
        match io.result {
            Err(error) => {
                outcome.errors += 1;
                outcome.first_error.get_or_insert((io.offset, error));
            }
            Ok(()) if io.op == Op::Flush => {}
            Ok(()) => {
                let measured = matches!(self.phase, Phase::Measuring | Phase::Draining);
                if measured {
                    let counts = if step.read { &mut outcome.reads } else { &mut outcome.writes };
                    counts.ios += 1;
                    let latency = now.saturating_duration_since(*begun).as_nanos() as u64;
                    counts.latency.saturating_record(latency);
                    outcome.elapsed = now.saturating_duration_since(self.begun);
                }
                let expect = match (step.writes, self.settings.workload.access.read_percent) {
                    (_, 100) => Some(Expect::Any),
                    (0, _) => None,
                    _ => Some(Expect::Generation(generation)),
                };
                if self.settings.workload.verify
                    && step.read
                    && let Some(expect) = expect
                {
                    let seed = self.settings.workload.seed;
                    // The buffer has the length of the I/O since `new`.
                    let _ = io.data.copy_to_slice(0, &mut self.scratch);
                    outcome.checked += 1;
                    if let Err(wrong) = pattern::check(seed, io.offset, expect, &self.scratch) {
                        outcome.mismatches += 1;
                        outcome.first_mismatch.get_or_insert(wrong);
                    }
                }
            }
        }
        if io.op == Op::Flush {
            io.data = std::mem::take(&mut self.lent);
        } else {
            self.plan.end(*step);
        }
        self.idle.push(io);
    }

    /// Moves to the next phase when this one is over. `true` if it did.
    fn advance(&mut self) -> bool {
        let stop = self.settings.signal.get() == STOPPED || self.outcome_is_bad();
        match self.phase {
            Phase::Waiting => {
                if self.settings.signal.get() == WAITING {
                    return false;
                }
                self.begun = Instant::now();
                self.phase = Phase::Measuring;
            }
            Phase::Measuring => {
                if !stop && self.begun.elapsed() < self.settings.workload.runtime {
                    return false;
                }
                self.phase = Phase::Draining;
            }
            Phase::Draining => {
                if !self.is_quiet() {
                    return false;
                }
                // The receiver may have given up; then nobody wants to know.
                let _ = self.events.send(Event::Measured);
                self.phase = Phase::Flushing;
                let verify = self.settings.workload.verify
                    && self.settings.workload.access.read_percent != 100;
                if !verify || self.outcome_is_bad() {
                    self.end();
                } else if self.settings.geometry.write_cache {
                    self.flush();
                }
            }
            Phase::Flushing => {
                if !self.is_quiet() {
                    return false;
                }
                self.phase = Phase::ReadingBack;
            }
            Phase::ReadingBack => {
                if !self.is_quiet() {
                    return false;
                }
                self.end();
            }
        }
        true
    }

    fn outcome_is_bad(&self) -> bool {
        self.outcome.as_ref().is_none_or(|outcome| outcome.errors != 0 || outcome.mismatches != 0)
    }

    fn flush(&mut self) {
        let Some(mut io) = self.idle.pop() else { return };
        self.lent = std::mem::take(&mut io.data);
        io.op = Op::Flush;
        io.offset = 0;
        io.len = 0;
        if let Err(block::Busy(mut io)) = self.channel.submit(io) {
            // Nothing else is in flight: a channel without room for one I/O is broken.
            io.data = std::mem::take(&mut self.lent);
            self.idle.push(io);
            if let Some(outcome) = &mut self.outcome {
                outcome.errors += 1;
                outcome.first_error.get_or_insert((0, IoError::Aborted));
            }
        }
    }

    fn end(&mut self) {
        if let Some(outcome) = self.outcome.take() {
            // The receiver may have given up; then nobody wants to know.
            let _ = self.events.send(Event::Ended(outcome));
        }
    }
}

impl Task for Job {
    fn poll(&mut self, _now: Duration) -> Progress {
        let mut worked = self.reap();
        worked |= self.start();
        while self.advance() {
            worked = true;
            if self.outcome.is_none() {
                return Progress::Done;
            }
            self.start();
        }
        if worked { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        self.channel.deadline()
    }
}
