//! One core's part of a device: a reactor task that owns the queues placed on the core.
//!
//! The control thread sends [`Command`]s and gets an [`Event`] for each when it is done. Between
//! commands nothing is shared: a queue, its eventfds, its port and its channel belong to the task.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use block::{Channel, Volume};
use iobuf::GuestMemory;
use reactor::unix::Waker;
use reactor::{Fd, Local, Port, Progress, Receiver, Task};

use crate::device::Limits;
use crate::engine::{Budget, Counters, Engine, EngineConfig};
use crate::queue::Broken;
use crate::queue::ring::Ring;
use crate::queue::shared::DirtyLog;
use crate::queue::split::{RingAddress, RingConfig};
use crate::vhost_user::session::{Action, Logging, RingStart};
use crate::vhost_user::wire::VringAddr;
use crate::{Features, QueueState};

/// When to look again at what could not be submitted although nothing is in flight.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// From the control thread. Each gives one event with its `op`.
pub(crate) enum Command {
    Do {
        op: u64,
        action: Action,
        limits: Limits,
    },
    /// The volume has another size.
    SetLimits {
        op: u64,
        limits: Limits,
    },
    /// The client is gone: stop all queues.
    Reset {
        op: u64,
    },
    Snapshot {
        op: u64,
    },
    /// Stop all queues and end. The event is [`Event::Gone`].
    Leave,
}

/// To the control thread.
pub(crate) enum Event {
    Done {
        core: usize,
        op: u64,
        outcome: Result<Option<u32>, String>,
    },
    Snapshot {
        core: usize,
        op: u64,
        queues: Vec<QueueState>,
    },
    /// A queue cannot be served any more until its driver sets it up anew.
    Broken {
        index: u16,
        broken: Broken,
    },
    /// The task has ended; nothing more comes from it.
    Gone {
        core: usize,
    },
}

/// A full counter means that the reader has been told already.
fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// A task's way to the control thread. Dropped with the task, or with the message that would have
/// started it, it says that the task is gone.
pub(crate) struct Events {
    pub(crate) core: usize,
    pub(crate) sender: mpsc::Sender<Event>,
    pub(crate) waker: Waker,
}

impl Events {
    fn send(&self, event: Event) {
        // Without a control thread nobody waits for it.
        let _ = self.sender.send(event);
        self.waker.wake();
    }

    fn done(&self, op: u64, outcome: Result<Option<u32>, String>) {
        self.send(Event::Done { core: self.core, op, outcome });
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.send(Event::Gone { core: self.core });
    }
}

struct Stop {
    /// The command to answer; None: all queues stop.
    op: Option<u64>,
    abort_at: Duration,
    is_aborted: bool,
}

struct Queue {
    index: u16,
    engine: Engine,
    channel: Box<dyn Channel>,
    /// Only for the kick eventfd.
    port: Port,
    kick: Option<Fd>,
    is_watched: bool,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    address: VringAddr,
    size: u16,
    is_enabled: bool,
    is_broken_told: bool,
    stop: Option<Stop>,
    retry_at: Option<Duration>,
    log: Option<(DirtyLog, Arc<OwnedFd>)>,
}

/// A changed memory table that waits for requests admitted under the old one.
struct Drain {
    op: u64,
    give_up_at: Duration,
}

/// One core's part of a device.
pub(crate) struct CoreTask {
    pub(crate) local: Local,
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) events: Events,
    /// How long requests in flight may take to come back by themselves when a queue stops.
    pub(crate) grace: Duration,
    /// Counters of the queues placed here, of their earlier lives.
    pub(crate) past: Vec<(u16, Counters)>,
    pub(crate) running: Running,
}

/// What a task begins without.
#[derive(Default)]
pub(crate) struct Running {
    queues: Vec<Queue>,
    drains: Vec<Drain>,
    /// Counts turns: which queue is first.
    first: usize,
    reset: Option<u64>,
    is_leaving: bool,
}

impl Task for CoreTask {
    fn poll(&mut self, now: Duration) -> Progress {
        let mut has_worked = false;
        while let Some(command) = self.commands.try_recv() {
            self.on_command(command, now);
            has_worked = true;
        }
        if !self.running.is_leaving && (self.local.is_stopping() || self.commands.is_disconnected())
        {
            self.leave(now);
        }
        // Queues take turns to be first at what the device may take.
        let running = &mut self.running;
        let mut budget = Budget::default();
        running.first = running.first.wrapping_add(1);
        let at = running.first.checked_rem(running.queues.len()).unwrap_or(0);
        let (rest, first) = running.queues.split_at_mut(at);
        for queue in first.iter_mut().chain(rest) {
            has_worked |= queue.poll(now, &self.events, &mut budget);
        }
        has_worked |= self.settle(now);
        match has_worked {
            _ if self.running.is_leaving && self.running.queues.is_empty() => Progress::Done,
            true => Progress::Worked,
            false => Progress::Idle,
        }
    }

    fn arm(&mut self) -> bool {
        let mut has_work = false;
        for queue in &mut self.running.queues {
            has_work |= queue.engine.arm();
            // Nobody will tell us.
            has_work |= queue.kick.is_none() && queue.engine.can_take();
        }
        has_work
    }

    fn disarm(&mut self) {
        for queue in &mut self.running.queues {
            queue.engine.disarm();
        }
    }

    fn deadline(&self) -> Option<Duration> {
        let queues = self.running.queues.iter().filter_map(Queue::deadline);
        let drains = self.running.drains.iter().map(|drain| drain.give_up_at);
        queues.chain(drains).min()
    }
}

impl CoreTask {
    fn on_command(&mut self, command: Command, now: Duration) {
        match command {
            Command::Do { op, action, limits } => {
                if let Some(outcome) = self.on_action(op, action, limits, now) {
                    self.events.done(op, outcome);
                }
            }
            Command::SetLimits { op, limits } => {
                for queue in &mut self.running.queues {
                    queue.engine.set_limits(limits);
                }
                self.events.done(op, Ok(None));
            }
            Command::Reset { op } => {
                self.stop_all(now);
                self.running.reset = Some(op);
            }
            Command::Snapshot { op } => {
                let queues = self.snapshot();
                self.events.send(Event::Snapshot { core: self.events.core, op, queues });
            }
            Command::Leave => self.leave(now),
        }
    }

    /// None: the event follows.
    fn on_action(
        &mut self,
        op: u64,
        action: Action,
        limits: Limits,
        now: Duration,
    ) -> Option<Result<Option<u32>, String>> {
        match action {
            Action::Start(start) => {
                let started = Queue::start(&self.local, &*self.volume, *start, limits);
                return Some(started.map(|queue| {
                    self.running.queues.push(queue);
                    None
                }));
            }
            Action::Stop { index, is_kept } => {
                let abort_at = now + self.grace;
                if let Some(queue) = self.queue(index) {
                    queue.stop(Some(op), is_kept, abort_at);
                    return None;
                }
            }
            Action::SetMemory { memory, has_removed } => {
                for queue in &mut self.running.queues {
                    queue.engine.set_memory(memory.view(), locate(&memory, &queue.address));
                }
                if has_removed {
                    let give_up_at = now + self.grace;
                    self.running.drains.push(Drain { op, give_up_at });
                    return None;
                }
            }
            Action::SetEnabled { index, is_enabled } => {
                if let Some(queue) = self.queue(index) {
                    queue.set_enabled(is_enabled);
                }
            }
            Action::SetKick { index, kick } => {
                let port = self.local.port();
                if let Some(queue) = self.queue(index) {
                    queue.port = port;
                    queue.kick = kick.map(Fd::from);
                    queue.is_watched = false;
                }
            }
            Action::SetCall { index, call } => {
                if let Some(queue) = self.queue(index) {
                    queue.call = call;
                    // What was completed before may have been told to the other one only.
                    queue.signal_call();
                }
            }
            Action::SetErr { index, err } => {
                if let Some(queue) = self.queue(index) {
                    queue.err = err;
                }
            }
            Action::SetLogging { index, logging } => {
                if let Some(queue) = self.queue(index) {
                    queue.set_logging(logging);
                }
            }
            Action::SetWriteThrough(write_through) => {
                for queue in &mut self.running.queues {
                    queue.engine.set_write_through(write_through);
                }
            }
        }
        Some(Ok(None))
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.running.queues.iter_mut().find(|queue| queue.index == index)
    }

    fn stop_all(&mut self, now: Duration) {
        let abort_at = now + self.grace;
        for queue in &mut self.running.queues {
            // Its client has gone, or we go: it may come back and find the rest recorded.
            queue.stop(None, true, abort_at);
        }
    }

    fn leave(&mut self, now: Duration) {
        self.stop_all(now);
        self.running.is_leaving = true;
    }

    /// Answer what has become true.
    fn settle(&mut self, now: Duration) -> bool {
        let CoreTask { running, events, past, .. } = self;
        let mut has_worked = false;
        running.queues.retain_mut(|queue| {
            let Some(stop) = &queue.stop else { return true };
            if queue.engine.in_flight() > 0 {
                return true;
            }
            if let Some(op) = stop.op {
                events.done(op, Ok(Some(queue.engine.base())));
            }
            if let Some((_, past)) = past.iter_mut().find(|(index, _)| *index == queue.index) {
                past.add(queue.engine.counters());
            }
            has_worked = true;
            false
        });
        let in_flight_old: usize =
            running.queues.iter().map(|queue| queue.engine.in_flight_old()).sum();
        // Late requests keep what they write to mapped: to answer all the same is safe for us, and
        // to wait for ever would not be for the frontend.
        running.drains.retain(|drain| {
            let is_open = in_flight_old > 0 && now < drain.give_up_at;
            if !is_open {
                events.done(drain.op, Ok(None));
                has_worked = true;
            }
            is_open
        });
        if running.queues.is_empty()
            && let Some(op) = running.reset.take()
        {
            events.done(op, Ok(None));
            has_worked = true;
        }
        has_worked
    }

    fn snapshot(&mut self) -> Vec<QueueState> {
        let CoreTask { running, events, past, .. } = self;
        let state = |(index, past): &(u16, Counters)| {
            let mut state = QueueState {
                index: *index,
                core: events.core,
                is_running: false,
                is_enabled: false,
                is_stopping: false,
                size: 0,
                in_flight: 0,
                broken: None,
                counters: *past,
            };
            if let Some(queue) = running.queues.iter_mut().find(|queue| queue.index == *index) {
                state.is_running = true;
                state.is_enabled = queue.is_enabled;
                state.is_stopping = queue.stop.is_some();
                state.size = queue.size;
                state.in_flight = queue.engine.in_flight();
                state.broken = queue.engine.broken();
                state.counters.add(queue.engine.counters());
            }
            state
        };
        past.iter().map(state).collect()
    }
}

impl Queue {
    fn start(
        local: &Local,
        volume: &dyn Volume,
        start: RingStart,
        limits: Limits,
    ) -> Result<Queue, String> {
        let view = start.memory.view();
        let address = locate(&start.memory, &start.address)
            .ok_or_else(|| format!("ring {}: {}", start.index, Broken::RingAddress))?;
        let config = RingConfig {
            size: start.size,
            address,
            base: start.base,
            event_idx: start.features.has(Features::EVENT_IDX),
            indirect: start.features.has(Features::INDIRECT_DESC),
            packed: start.features.has(Features::RING_PACKED),
        };
        let inflight = match &start.inflight {
            Some(inflight) => inflight.queue(start.index, start.features),
            None => None,
        };
        let ring = Ring::new(&view, &config, inflight)
            .map_err(|broken| format!("ring {}: {broken}", start.index))?;
        let channel = volume
            .open(local, u32::from(start.size))
            .map_err(|error| format!("opening the volume for ring {}: {error}", start.index))?;
        let config =
            EngineConfig { limits, features: start.features, write_through: start.write_through };
        let mut queue = Queue {
            index: start.index,
            engine: Engine::new(ring, view, config),
            channel,
            port: local.port(),
            kick: start.kick.map(Fd::from),
            is_watched: false,
            call: start.call,
            err: start.err,
            address: start.address,
            size: start.size,
            is_enabled: false,
            is_broken_told: false,
            stop: None,
            retry_at: None,
            log: None,
        };
        queue.set_logging(start.logging);
        queue.set_enabled(true);
        // Whoever served the ring before may have gone between completing and telling.
        queue.signal_call();
        Ok(queue)
    }

    fn set_enabled(&mut self, is_enabled: bool) {
        self.is_enabled = is_enabled;
        self.engine.set_enabled(is_enabled && self.stop.is_none());
    }

    /// `is_kept`: the record of what is in flight stays, so what does not come back is left there.
    fn stop(&mut self, op: Option<u64>, is_kept: bool, abort_at: Duration) {
        let stop = Stop { op, abort_at, is_aborted: false };
        match &mut self.stop {
            Some(stop) => stop.op = op.or(stop.op),
            None => self.stop = Some(stop),
        }
        if is_kept {
            self.engine.leave_aborted();
        }
        self.engine.set_enabled(false);
    }

    fn set_logging(&mut self, logging: Option<Logging>) {
        let log = logging.as_ref().and_then(Logging::bitmap).map(DirtyLog::new);
        let (Some(log), Some(logging)) = (log, logging) else {
            self.log = None;
            return self.engine.set_log(None, None);
        };
        self.log = logging.eventfd.map(|eventfd| (log.clone(), eventfd));
        let used = logging.used.map(|addr| (log.clone(), addr));
        self.engine.set_log(logging.data.then_some(log), used);
    }

    fn signal_call(&mut self) {
        if let Some(call) = &self.call {
            signal(call);
            self.engine.counters().calls += 1;
        }
    }

    fn poll(&mut self, now: Duration, events: &Events, budget: &mut Budget) -> bool {
        let mut has_worked = false;
        while let Some(completion) = self.port.next() {
            has_worked = true;
            match completion.result {
                Ok(_) => self.engine.counters().kicks += 1,
                Err(_) => self.engine.break_down(Broken::Kick),
            }
        }
        if !self.is_watched
            && let Some(kick) = &self.kick
        {
            self.is_watched = self.port.watch(kick, 0).is_ok();
        }
        if let Some(stop) = &mut self.stop
            && !stop.is_aborted
            && now >= stop.abort_at
        {
            stop.is_aborted = true;
            self.channel.abort();
            self.engine.abort_waiting();
            has_worked = true;
        }

        let turn = self.engine.poll_within(&mut *self.channel, now, budget);
        has_worked |= turn.has_worked;
        if turn.wants_call {
            self.signal_call();
        }
        if let Some((log, eventfd)) = &self.log
            && log.take_marked()
        {
            signal(eventfd);
        }
        if let Some(broken) = self.engine.broken()
            && !self.is_broken_told
        {
            self.is_broken_told = true;
            if let Some(err) = &self.err {
                signal(err);
            }
            events.send(Event::Broken { index: self.index, broken });
        }
        let is_stuck = self.engine.waiting() > 0 && self.channel.in_flight() == 0;
        let is_unwatched = self.kick.is_some() && !self.is_watched;
        self.retry_at = (is_stuck || is_unwatched).then(|| now + RETRY_AFTER);
        has_worked
    }

    fn deadline(&self) -> Option<Duration> {
        let abort_at = self.stop.as_ref().filter(|stop| !stop.is_aborted).map(|s| s.abort_at);
        [self.channel.deadline(), abort_at, self.retry_at].into_iter().flatten().min()
    }
}

/// Where a ring is in guest memory.
fn locate(memory: &GuestMemory, address: &VringAddr) -> Option<RingAddress> {
    Some(RingAddress {
        descriptor: memory.user_to_guest(address.descriptor)?,
        available: memory.user_to_guest(address.available)?,
        used: memory.user_to_guest(address.used)?,
    })
}
