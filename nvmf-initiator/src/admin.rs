//! The admin queue: sets up the association, keeps it alive, notices its end, sets it up again.
//!
//! ```text
//!  Waiting ─► Opening ─► BringUp ─► Live ─────────────┐ fault of any queue, keep alive, time-out
//!     ▲                                               ▼
//!     └────────────── back-off ◄──────────────── Leaving ─► Stopped (after shutdown)
//! ```
//!
//! There is one way out of an association, [`AdminTask::lose`]: whatever queue finds whatever
//! wrong, the admin task publishes that the association is over, each channel ends its connection,
//! and the next association has another number.

use std::sync::Arc;
use std::time::Duration;

use block::{Geometry, Identity};
use iobuf::SgList;
use nvme::host::{
    ADMIN_QUEUE_ENTRIES, AdminCommand, Backoff, OldController, ReadyInfo, RemoteNamespace, Session,
    SessionConfig, SessionState, TAGS,
};
use nvme::tcp::{HostConfig, HostEvent, Transfer};
use reactor::{Local, Progress, Task};

use crate::link::{Link, Loss};
use crate::shared::{Phase, RemoteState, Shared};

/// An association that has been ready for so long counts as sound: the next loss starts with the
/// shortest delay again.
const SOUND_AFTER: Duration = Duration::from_secs(10);
/// What is added to the time in which a lost controller ends by itself: it must notice, and finish
/// what it began.
const OLD_CONTROLLER_MARGIN: Duration = Duration::from_secs(5);
/// How long the controller may take to shut down before the connection is closed without it.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest data of an admin command, in either direction (Identify, log pages).
const ADMIN_DATA_BYTES: usize = 4096;
/// Longest read or write this volume takes. More than one command may carry is cut into several.
const IO_BYTES_MAX: u32 = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No connection. Moved on by `until`.
    Waiting { until: Duration },
    /// The link is opening. Moved on by ICResp.
    Opening,
    /// The session brings the controller up. Moved on by the session.
    BringUp,
    /// The association is published. Ended by `lose` or `stop`.
    Live { since: Duration },
    /// The session shuts the controller down. Moved on by the session or `until`.
    ShuttingDown { until: Duration },
    /// The link is closing. Moved on when it is quiet.
    Leaving,
    /// Nothing more happens.
    Stopped,
}

/// A command on the admin queue; its place is its tag and cid.
#[derive(Default)]
struct Slot {
    data: Vec<u8>,
    read_len: usize,
    received: usize,
}

/// See the [module](self).
pub(crate) struct AdminTask {
    shared: Arc<Shared>,
    local: Local,
    stage: Stage,
    link: Link,
    session: Option<Session>,
    slots: Vec<Slot>,
    /// Data of Connect, the only admin command here that sends any.
    write_data: SgList,
    backoff: Backoff,
    /// Of the association in `Live`, or of the last one.
    generation: u64,
    /// The namespace as it was first seen: another one under its name is not taken for it.
    known: Option<RemoteNamespace>,
    /// The controller that I/O was last sent to. While there is no association, it may still write.
    old: Option<OldController>,
    /// Since when there has been no sound association.
    lost_at: Duration,
    is_gone: bool,
    is_stopping: bool,
    requests_seen: u64,
}

impl AdminTask {
    pub(crate) fn new(shared: Arc<Shared>, local: &Local) -> AdminTask {
        let config = &shared.config;
        let host_config = HostConfig {
            queue_depth: TAGS,
            header_digest: config.header_digest,
            data_digest: config.data_digest,
            ..HostConfig::default()
        };
        let tx_entries_max = usize::from(TAGS) + 2;
        let link =
            Link::new(local, config.addr, host_config, tx_entries_max, config.connect_timeout);
        let now = local.now();
        let slot = |_| Slot { data: vec![0; ADMIN_DATA_BYTES], ..Slot::default() };
        AdminTask {
            local: local.clone(),
            stage: Stage::Waiting { until: now },
            link,
            session: None,
            slots: (0..TAGS).map(slot).collect(),
            write_data: SgList::with_capacity(1),
            backoff: Backoff::new(config.reconnect_delay, config.reconnect_delay_max),
            generation: 0,
            known: None,
            old: None,
            lost_at: now,
            is_gone: false,
            is_stopping: false,
            requests_seen: 0,
            shared,
        }
    }

    /// What channels and the control plane ask for. One atomic load when there is nothing.
    fn look(&mut self, now: Duration) -> Result<(), Loss> {
        if self.local.is_stopping() {
            self.stop(now);
        }
        let requests = self.shared.requests();
        if requests == self.requests_seen {
            return Ok(());
        }
        self.requests_seen = requests;
        let asked = self.shared.take_asked();
        if asked.stop {
            self.stop(now);
        }
        if asked.connected == self.generation && matches!(self.stage, Stage::Live { .. }) {
            // I/O flows: the association is worth its name.
            self.backoff.reset();
            self.lost_at = Duration::MAX;
        }
        match asked.fault {
            Some((generation, text))
                if generation == self.generation && matches!(self.stage, Stage::Live { .. }) =>
            {
                Err(Loss::Command(text))
            }
            _ => Ok(()),
        }
    }

    /// Begins the orderly end.
    fn stop(&mut self, now: Duration) {
        if self.is_stopping {
            return;
        }
        self.is_stopping = true;
        // Before the controller is told: channels hold nothing for it any more.
        self.shared.publish(|state| state.phase = Phase::Stopped { is_over: false });
        match (self.stage, &mut self.session) {
            (Stage::Live { .. }, Some(session)) => {
                session.shutdown(now);
                self.stage = Stage::ShuttingDown { until: now + SHUTDOWN_TIMEOUT };
            }
            _ => self.leave(now, None),
        }
    }

    /// The association, or the attempt at one, is over.
    #[cold]
    fn lose(&mut self, now: Duration, loss: &Loss) {
        let text = loss.to_string();
        if let Stage::Live { since } = self.stage {
            tracing::warn!(
                addr = %self.shared.config.addr,
                subnqn = %self.shared.config.subnqn,
                cause = text,
                "association lost; I/O is held"
            );
            if now.saturating_sub(since) >= SOUND_AFTER {
                self.backoff.reset();
                self.lost_at = Duration::MAX;
            }
            // With traffic based keep alive a controller may count up to two time-outs from the
            // last command.
            if let Some(old) = &mut self.old {
                old.safe_at = now + self.shared.config.kato * 2 + OLD_CONTROLLER_MARGIN;
            }
            // A sound association was lost just now, a doubtful one when the sound one before it
            // was.
            self.lost_at = self.lost_at.min(now);
            self.shared.publish(|state| {
                state.phase = Phase::Connecting;
                state.losses += 1;
                state.last_error = Some(text);
            });
        } else if !matches!(self.stage, Stage::Stopped | Stage::Leaving) {
            let is_new = self.shared.state().last_error.as_deref() != Some(&*text);
            if is_new && !self.is_stopping {
                tracing::warn!(
                    addr = %self.shared.config.addr,
                    subnqn = %self.shared.config.subnqn,
                    cause = text,
                    "cannot set up an association; trying again"
                );
                self.shared.publish(|state| state.last_error = Some(text));
            }
        }
        self.leave(now, Some(loss));
    }

    fn leave(&mut self, now: Duration, loss: Option<&Loss>) {
        self.session = None;
        self.stage = Stage::Leaving;
        self.link.close(now, loss.and_then(Loss::fault));
        if self.link.is_closed() {
            self.on_left(now);
        }
    }

    fn on_left(&mut self, now: Duration) {
        if self.is_stopping {
            self.stage = Stage::Stopped;
            self.shared.publish(|state| state.phase = Phase::Stopped { is_over: true });
            return;
        }
        let delay = self.backoff.next_delay(self.local.random_u64());
        self.stage = Stage::Waiting { until: now + delay };
    }

    /// Fails held I/O when there has been no sound association for too long.
    fn check_gone(&mut self, now: Duration) {
        if self.is_gone || self.is_stopping || self.gone_at().is_none_or(|at| now < at) {
            return;
        }
        self.is_gone = true;
        tracing::error!(
            addr = %self.shared.config.addr,
            subnqn = %self.shared.config.subnqn,
            "no association within the controller loss time-out; I/O fails"
        );
        self.shared.publish(|state| state.phase = Phase::Gone);
    }

    fn gone_at(&self) -> Option<Duration> {
        let is_live = matches!(self.stage, Stage::Live { .. });
        let timeout = self.shared.config.ctrl_loss_timeout?;
        if is_live || self.is_gone { None } else { self.lost_at.checked_add(timeout) }
    }

    fn step(&mut self, now: Duration) -> Result<bool, Loss> {
        self.look(now)?;
        let mut progressed = self.link.poll(now)?;
        match self.stage {
            Stage::Stopped => return Ok(progressed),
            Stage::Waiting { until } if now >= until => {
                self.stage = Stage::Opening;
                self.shared.publish(|state| state.attempts += 1);
                self.link.open()?;
                progressed = true;
            }
            Stage::Leaving if self.link.is_closed() => {
                self.on_left(now);
                progressed = true;
            }
            Stage::ShuttingDown { until } if now >= until => {
                self.leave(now, None);
                progressed = true;
            }
            _ => {}
        }
        while self.link.sent().is_some() {}
        while let Some(chunk) = self.link.recv()? {
            progressed = true;
            let mut input: &[u8] = &chunk;
            while let Some(event) = self.link.next(&mut input)? {
                self.on_event(event, now)?;
            }
        }
        progressed |= self.run_session(now)?;
        self.link.flush();
        Ok(progressed)
    }

    fn on_event(&mut self, event: HostEvent<'_>, now: Duration) -> Result<(), Loss> {
        match event {
            HostEvent::Initialized => {
                let config = &self.shared.config;
                let session_config = SessionConfig {
                    names: config.names(),
                    nsid: config.nsid,
                    kato: config.kato,
                    queues_wanted: config.queues,
                    queue_entries: config.queue_depth + 1,
                    command_timeout: config.command_timeout,
                };
                let mut session = Session::new(session_config, now);
                if let Some(old) = self.old {
                    session.end_old(old);
                }
                self.session = Some(session);
                self.stage = Stage::BringUp;
            }
            HostEvent::Data { cid, offset, bytes } => {
                let slot = &mut self.slots[usize::from(cid)];
                let start = offset as usize;
                let end = start + bytes.len();
                // The qpair machine lets no byte through that the command did not ask for.
                let Some(place) = slot.data.get_mut(start..end) else {
                    return Err(Loss::Command("data for no buffer".to_owned()));
                };
                place.copy_from_slice(bytes);
                slot.received = end;
            }
            HostEvent::Complete { cid, cqe } => {
                let slot = &self.slots[usize::from(cid)];
                let Some(session) = &mut self.session else { return Ok(()) };
                session
                    .on_completion(cid, &cqe, &slot.data[..slot.received.min(slot.read_len)], now)
                    .map_err(Loss::Session)?;
            }
            HostEvent::R2t { .. } => {
                return Err(Loss::Command("R2T on the admin queue".to_owned()));
            }
            HostEvent::Terminated { fes } => return Err(Loss::Terminated { fes }),
        }
        Ok(())
    }

    /// Sends what the session wants to send, and follows its state.
    fn run_session(&mut self, now: Duration) -> Result<bool, Loss> {
        let mut progressed = false;
        while self.link.room() > 0 {
            let Some(session) = &mut self.session else { return Ok(progressed) };
            let Some(command) = session.next_command(now) else { break };
            self.send(&command)?;
            progressed = true;
        }
        let Some(session) = &mut self.session else { return Ok(progressed) };
        let is_changed = session.take_changed();
        match (session.state(), self.stage) {
            (SessionState::Failed(error), _) => return Err(Loss::Session(error.clone())),
            (SessionState::Ready(info), Stage::BringUp) => {
                let info = info.clone();
                self.go_live(&info, now)?;
                progressed = true;
            }
            (SessionState::Ready(info), Stage::Live { .. }) if is_changed => {
                let geometry = geometry(info);
                let limits =
                    (info.namespace.write_zeroes_blocks_max, info.namespace.deallocate_blocks_max);
                self.shared.publish(|state| {
                    state.geometry = geometry;
                    (state.write_zeroes_blocks_max, state.deallocate_blocks_max) = limits;
                });
            }
            (SessionState::Closed, _) => {
                self.leave(now, None);
                progressed = true;
            }
            _ => {}
        }
        Ok(progressed)
    }

    fn send(&mut self, command: &AdminCommand) -> Result<(), Loss> {
        let read_len = command.read_len as usize;
        let slot = self.slots.get_mut(usize::from(command.tag));
        let Some(slot) = slot.filter(|slot| read_len <= slot.data.len()) else {
            return Err(Loss::Command("an admin command too big".to_owned()));
        };
        (slot.read_len, slot.received) = (read_len, 0);
        let Some(data) = &command.write else {
            let transfer = match command.read_len {
                0 => Transfer::None,
                len => Transfer::Read { len },
            };
            let head = self.link.host.command(command.tag, &command.sqe, transfer);
            return self.link.push(&head, None, None);
        };
        let no_memory = || Loss::Command("the core's buffer pool is exhausted".to_owned());
        self.local.pool().alloc(data.len(), &mut self.write_data).map_err(|_| no_memory())?;
        self.write_data.copy_from_slice(0, data).map_err(|_| no_memory())?;
        let transfer = Transfer::Write { len: data.len() as u32, in_capsule: true };
        let head = self.link.host.command(command.tag, &command.sqe, transfer);
        // The stream keeps the memory until it is sent, so the list may be used for something else.
        self.link.push(&head, Some((&self.write_data, 0, data.len())), None)?;
        self.write_data.clear();
        Ok(())
    }

    /// The controller is ready: checks that it is the right one, and lets the channels go.
    fn go_live(&mut self, info: &ReadyInfo, now: Duration) -> Result<(), Loss> {
        let namespace = &info.namespace;
        let needed = self.shared.queues_needed();
        if info.queues < needed {
            let text =
                format!("the controller grants {} I/O queues, {needed} are in use", info.queues);
            return Err(Loss::Command(text));
        }
        let known = self.known.get_or_insert_with(|| namespace.clone());
        let is_same = known.uuid == namespace.uuid
            && known.nguid == namespace.nguid
            && known.eui64 == namespace.eui64
            && known.block_bytes == namespace.block_bytes;
        if !is_same {
            let text = format!("namespace {} is another one than before", namespace.nsid);
            return Err(Loss::Command(text));
        }
        self.stage = Stage::Live { since: now };
        self.old = Some(OldController {
            cntlid: info.cntlid,
            instance: info.controller.instance,
            safe_at: Duration::MAX,
        });
        self.generation += 1;
        self.is_gone = false;
        tracing::info!(
            addr = %self.shared.config.addr,
            subnqn = %self.shared.config.subnqn,
            cntlid = info.cntlid,
            "association ready"
        );
        let generation = self.generation;
        self.shared.publish(|state| {
            *state = RemoteState {
                phase: Phase::Live,
                generation,
                cntlid: info.cntlid,
                queues: info.queues,
                queue_entries: info.queue_entries,
                in_capsule_bytes: info.in_capsule_bytes,
                transfer_bytes_max: info.transfer_bytes_max,
                write_zeroes_blocks_max: namespace.write_zeroes_blocks_max,
                deallocate_blocks_max: namespace.deallocate_blocks_max,
                geometry: geometry(info),
                identity: Identity {
                    uuid: namespace.uuid,
                    nguid: namespace.nguid,
                    serial: *info.controller.serial.bytes(),
                },
                last_error: state.last_error.take(),
                losses: state.losses,
                attempts: state.attempts,
            };
        });
        Ok(())
    }
}

fn geometry(info: &ReadyInfo) -> Geometry {
    let namespace = &info.namespace;
    Geometry {
        physical_block_bytes: namespace.write_granularity_bytes.max(namespace.block_bytes),
        io_bytes_max: IO_BYTES_MAX,
        read_only: namespace.read_only,
        write_cache: namespace.write_cache,
        deallocate: namespace.deallocate,
        write_zeroes: namespace.write_zeroes,
        deallocate_granularity_bytes: match namespace.deallocate_granularity_bytes {
            0 => namespace.block_bytes,
            bytes => bytes,
        },
        deallocated_reads_zero: namespace.deallocated_reads_zero,
        ..Geometry::new(namespace.block_bytes, namespace.blocks)
    }
}

impl Task for AdminTask {
    fn poll(&mut self, now: Duration) -> Progress {
        let progressed = match self.step(now) {
            Ok(progressed) => progressed,
            Err(loss) => {
                self.lose(now, &loss);
                true
            }
        };
        self.check_gone(now);
        match (self.stage, progressed) {
            (Stage::Stopped, _) => Progress::Done,
            (_, true) => Progress::Worked,
            (_, false) => Progress::Idle,
        }
    }

    fn deadline(&self) -> Option<Duration> {
        let stage = match self.stage {
            Stage::Waiting { until } | Stage::ShuttingDown { until } => Some(until),
            _ => None,
        };
        let session = self.session.as_ref().and_then(Session::deadline);
        [stage, session, self.link.deadline(), self.gone_at()].into_iter().flatten().min()
    }
}

impl Drop for AdminTask {
    /// A core that goes down without ending its tasks leaves nobody waiting.
    fn drop(&mut self) {
        if self.stage != Stage::Stopped {
            self.shared.publish(|state| state.phase = Phase::Stopped { is_over: true });
        }
    }
}

const _: () = assert!(TAGS < ADMIN_QUEUE_ENTRIES);
