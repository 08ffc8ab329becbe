//! One core's part of a device: a reactor task that owns the queues placed on the core.
//!
//! The control thread sends [`Command`]s and gets an [`Event`] for each when it is done. Between
//! commands nothing is shared but the doorbells, the record and the table of vectors.

use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use block::Volume;
use iobuf::GuestMemory;
use nvme::ctrl::Coalescing;
use nvme::spec::Status;
use nvme::subsys::SubsystemInfo;
use reactor::unix::Waker;
use reactor::{Local, Progress, Receiver, Task};

use crate::Doorbells;
use crate::dirty::DirtyLog;
use crate::engine::{Counters, Engine, Notice, Refused};
use crate::nap::Nap;
use crate::record::{CqRecord, RecordView, SqRecord};

/// I/Os that one core has at one volume at most; the rest waits in the device.
pub(crate) const DEPTH: u32 = 256;
/// How often a core that cannot be woken by doorbells looks at them when nothing happens: at first,
/// and at last.
const LOOK: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(5)];

/// How often the volumes are asked whether they have changed by themselves.
const VOLUMES_EVERY: Duration = Duration::from_millis(200);

/// At most how often a core saves its counters for a successor, which loses what came after.
const SAVE_EVERY: Duration = Duration::from_millis(200);

/// A namespace and its volume.
#[derive(Clone)]
pub(crate) struct Attached {
    pub(crate) nsid: u32,
    pub(crate) volume: Arc<dyn Volume>,
}

/// From the control thread. Each gives one event with its `op`.
pub(crate) enum Action {
    CreateCq {
        qid: u16,
        cq: CqRecord,
        coalescing: Coalescing,
        is_recovered: bool,
    },
    CreateSq {
        qid: u16,
        sq: SqRecord,
        is_recovered: bool,
    },
    DeleteCq {
        qid: u16,
    },
    DeleteSq {
        qid: u16,
    },
    /// Done when nothing is at the volumes; the queues are gone then.
    Reset,
    /// Done when nothing is at the volumes and volatile caches are flushed.
    Shutdown,
    SetMemory {
        memory: GuestMemory,
        has_removed: bool,
    },
    SetShadow(Option<(u64, u64)>),
    SetNamespaces {
        subsys: Arc<SubsystemInfo>,
        attached: Vec<Attached>,
    },
    SetDirtyLog(Option<Arc<DirtyLog>>),
    /// Done when nothing is in flight, if it is false.
    SetRunning(bool),
    SetCoalescing(Vec<Coalescing>),
    /// The function may use the guest's memory, or not.
    SetMaster(bool),
    /// End a command that no volume has yet; the outcome is an error if there is none.
    Abort {
        sqid: u16,
        cid: u16,
    },
    Snapshot,
}

pub(crate) enum Command {
    Do {
        op: u64,
        action: Action,
    },
    /// End. The event is [`Event::Gone`].
    Leave,
}

/// What a core's queues are doing.
#[derive(Clone, Debug, Default)]
pub(crate) struct CoreState {
    pub(crate) queues: Vec<(u16, u16, u32, usize)>,
    pub(crate) completion_queues: Vec<u16>,
    pub(crate) counters: Counters,
}

/// To the control thread.
pub(crate) enum Event {
    Done {
        core: usize,
        op: u64,
        outcome: Result<(), Status>,
    },
    State {
        core: usize,
        op: u64,
        state: Box<CoreState>,
    },
    /// The admin queue's doorbell was rung.
    Admin,
    /// A volume has another geometry.
    Changed,
    Notice(Notice),
    /// The volume of a namespace cannot be opened on the core. Before the answer to `op`.
    CannotOpen {
        core: usize,
        op: u64,
        nsid: u32,
        error: String,
    },
    /// The task has ended; nothing more comes from it.
    Gone {
        core: usize,
    },
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

    fn done(&self, op: u64, outcome: Result<(), Status>) {
        self.send(Event::Done { core: self.core, op, outcome });
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.send(Event::Gone { core: self.core });
    }
}

/// Something that is not done yet.
struct Waiting {
    op: u64,
    until: Until,
    abort_at: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Nothing is at the volumes.
    Reset,
    /// Nothing is in flight; then the volumes are flushed.
    Drained,
    /// Nothing is in flight.
    Quiet,
    /// Nothing holds memory of before.
    OldMemory,
    /// The queue's commands have completed.
    Closed(u16),
}

/// One core's part of a device.
pub(crate) struct CoreTask {
    pub(crate) local: Local,
    pub(crate) commands: Receiver<Command>,
    pub(crate) events: Events,
    /// How long I/O in flight may take to come back by itself when something waits for it.
    pub(crate) grace: Duration,
    pub(crate) engine: Engine,
    pub(crate) doorbells: Doorbells,
    /// To look at the admin queue's doorbell: the first core.
    pub(crate) admin: Option<RecordView>,
    pub(crate) running: Running,
}

/// What a task begins without.
#[derive(Default)]
pub(crate) struct Running {
    waiting: Vec<Waiting>,
    is_leaving: bool,
    admin_tail: u32,
    admin_head: u32,
    /// Volumes to be watched, and how often each had changed when it was looked at last: on the
    /// first core.
    volumes: Vec<(Arc<dyn Volume>, u64)>,
    volumes_at: Duration,
    /// Commands completed when the counters were saved last, and when to look again.
    saved: u64,
    save_at: Duration,
    /// When to look at doorbells again.
    look_at: Duration,
    look_every: Duration,
    nap: Nap,
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
        has_worked |= self.engine.poll(now);
        while let Some(notice) = self.engine.notice() {
            self.events.send(Event::Notice(notice));
        }
        has_worked |= self.look_at_admin();
        if now >= self.running.save_at {
            self.save_counters(now);
        }
        if now >= self.running.volumes_at {
            self.running.volumes_at = now + VOLUMES_EVERY;
            self.look_at_volumes();
        }
        has_worked |= self.settle(now);
        if has_worked {
            self.running.nap.on_work();
        }
        if self.doorbells == Doorbells::Mapped {
            let running = &mut self.running;
            let [first, last] = LOOK;
            if has_worked {
                running.look_every = first;
                running.look_at = now + first;
            } else if now >= running.look_at {
                running.look_every = (running.look_every * 2).clamp(first, last);
                running.look_at = now + running.look_every;
            }
        }
        match has_worked {
            _ if self.running.is_leaving && self.running.waiting.is_empty() => Progress::Done,
            true => Progress::Worked,
            false => Progress::Idle,
        }
    }

    fn arm(&mut self) -> bool {
        let can_nap = self.engine.is_fed_by_memory();
        if can_nap && self.running.nap.begin(self.local.now()) {
            return self.engine.has_work();
        }
        self.engine.arm()
    }

    fn disarm(&mut self) {
        let has_napped = self.running.nap.until().is_some();
        self.running.nap.end();
        if !has_napped {
            self.engine.disarm();
        }
    }

    fn deadline(&self) -> Option<Duration> {
        let has_queues = self.engine.queues() != (0, 0) || self.admin.is_some();
        let look =
            (self.doorbells == Doorbells::Mapped && has_queues).then_some(self.running.look_at);
        let waiting = self.running.waiting.iter().map(|waiting| waiting.abort_at);
        let running = &self.running;
        let nap = running.nap.until();
        let volumes = (!running.volumes.is_empty()).then_some(running.volumes_at);
        let is_saved = self.engine.counters().commands() == running.saved;
        let save = (!is_saved).then_some(running.save_at);
        self.engine
            .deadline()
            .into_iter()
            .chain(look)
            .chain(nap)
            .chain(volumes)
            .chain(save)
            .chain(waiting)
            .min()
    }
}

impl CoreTask {
    fn on_command(&mut self, command: Command, now: Duration) {
        match command {
            Command::Do { op, action: Action::Snapshot } => {
                let state = Box::new(CoreState {
                    queues: self.engine.submission_queues().collect(),
                    completion_queues: self.engine.completion_queues().collect(),
                    counters: *self.engine.counters(),
                });
                self.events.send(Event::State { core: self.events.core, op, state });
            }
            Command::Do { op, action } => match self.on_action(op, action) {
                Ok(Some(until)) => {
                    let abort_at = now + self.grace;
                    self.running.waiting.push(Waiting { op, until, abort_at });
                }
                Ok(None) => self.events.done(op, Ok(())),
                Err(status) => self.events.done(op, Err(status)),
            },
            Command::Leave => self.leave(now),
        }
    }

    fn on_action(&mut self, op: u64, action: Action) -> Result<Option<Until>, Status> {
        let engine = &mut self.engine;
        match action {
            Action::CreateCq { qid, cq, coalescing, is_recovered } => {
                engine
                    .create_cq(qid, &cq, coalescing, is_recovered)
                    .map_err(|Refused(status)| status)?;
            }
            Action::CreateSq { qid, sq, is_recovered } => {
                engine.create_sq(qid, &sq, is_recovered).map_err(|Refused(status)| status)?;
            }
            Action::DeleteCq { qid } => engine.remove_cq(qid),
            Action::DeleteSq { qid } => {
                engine.close_sq(qid);
                return Ok(Some(Until::Closed(qid)));
            }
            Action::Reset => {
                engine.reset();
                return Ok(Some(Until::Reset));
            }
            Action::Shutdown => {
                engine.drain();
                return Ok(Some(Until::Drained));
            }
            Action::SetMemory { memory, has_removed } => {
                engine.set_memory(memory.view());
                if has_removed {
                    return Ok(Some(Until::OldMemory));
                }
            }
            Action::SetShadow(shadow) => {
                if !engine.set_shadow(shadow) {
                    return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
                }
            }
            Action::SetNamespaces { subsys, attached } => {
                if self.admin.is_some() {
                    // A new one is looked at once more: it may have changed since it was described.
                    let volumes = &mut self.running.volumes;
                    let watched = |one: &Attached| {
                        let same =
                            |(known, _): &&(Arc<dyn Volume>, u64)| Arc::ptr_eq(known, &one.volume);
                        let seen = volumes.iter().find(same).map_or(0, |(_, seen)| *seen);
                        (Arc::clone(&one.volume), seen)
                    };
                    *volumes = attached.iter().map(watched).collect::<Vec<_>>();
                }
                let (local, events) = (&self.local, &self.events);
                engine.set_namespaces(subsys, |nsid| {
                    let volume = &attached.iter().find(|one| one.nsid == nsid)?.volume;
                    let told = |error: &io::Error| {
                        let (core, error) = (events.core, error.to_string());
                        events.send(Event::CannotOpen { core, op, nsid, error });
                    };
                    volume.open(local, DEPTH).inspect_err(told).ok()
                });
            }
            Action::SetDirtyLog(log) => engine.set_dirty_log(log),
            Action::SetRunning(is_running) => {
                engine.set_running(is_running);
                if !is_running {
                    return Ok(Some(Until::Quiet));
                }
            }
            Action::SetCoalescing(table) => engine.set_coalescing(|vector| {
                table.get(usize::from(vector)).copied().unwrap_or_default()
            }),
            Action::SetMaster(is_master) => engine.set_master(is_master),
            Action::Abort { sqid, cid } => {
                if !engine.abort_command(sqid, cid) {
                    return Err(Status::INVALID_FIELD_IN_COMMAND);
                }
            }
            Action::Snapshot => {}
        }
        Ok(None)
    }

    fn save_counters(&mut self, now: Duration) {
        let running = &mut self.running;
        running.save_at = now + SAVE_EVERY;
        let commands = self.engine.counters().commands();
        if std::mem::replace(&mut running.saved, commands) != commands {
            self.engine.save_counters(self.events.core);
        }
    }

    fn leave(&mut self, now: Duration) {
        self.save_counters(now);
        if !self.running.is_leaving {
            self.running.is_leaving = true;
            self.engine.reset();
            // Nobody waits for the answer: an op of its own kind is not needed.
            let abort_at = now + self.grace;
            self.running.waiting.push(Waiting { op: u64::MAX, until: Until::Reset, abort_at });
        }
    }

    fn look_at_volumes(&mut self) {
        let mut has_changed = false;
        for (volume, seen) in &mut self.running.volumes {
            let generation = volume.generation();
            has_changed |= generation != *seen;
            *seen = generation;
        }
        if has_changed {
            self.events.send(Event::Changed);
        }
    }

    fn look_at_admin(&mut self) -> bool {
        if self.doorbells == Doorbells::Trapped {
            return false;
        }
        let Some(view) = &self.admin else { return false };
        let (tail, head) = (view.doorbell(0, false), view.doorbell(0, true));
        let running = &mut self.running;
        if (tail, head) == (running.admin_tail, running.admin_head) {
            return false;
        }
        (running.admin_tail, running.admin_head) = (tail, head);
        self.events.send(Event::Admin);
        true
    }

    /// Answer what has become true.
    fn settle(&mut self, now: Duration) -> bool {
        let CoreTask { running, engine, events, grace, .. } = self;
        if running.waiting.is_empty() {
            return false;
        }
        let mut has_worked = false;
        if running.waiting.iter().any(|waiting| now >= waiting.abort_at) {
            engine.abort();
            // What cannot be aborted is at the kernel or the network, which end it in time.
            for waiting in &mut running.waiting {
                waiting.abort_at = waiting.abort_at.max(now + *grace);
            }
        }
        running.waiting.retain_mut(|waiting| {
            if waiting.until == Until::Drained && engine.is_quiet() {
                engine.flush_all();
                waiting.until = Until::Quiet;
                has_worked = true;
            }
            let is_done = match waiting.until {
                Until::Reset => engine.at_volume() == 0,
                Until::Drained => false,
                Until::Quiet => engine.is_quiet(),
                Until::OldMemory => engine.in_flight_old() == 0,
                Until::Closed(qid) => engine.remove_sq(qid),
            };
            if is_done {
                has_worked = true;
                if waiting.until == Until::Reset {
                    engine.clear();
                }
                if waiting.op != u64::MAX {
                    events.done(waiting.op, Ok(()));
                }
            }
            !is_done
        });
        has_worked
    }
}
