//! The admin queues: one per path sets up the association, keeps it alive, notices its end, sets it
//! up again.
//!
//! ```text
//!  Waiting ─► Opening ─► BringUp ─► Live ─────────────┐ fault of any queue, keep alive, time-out
//!     ▲                                               ▼
//!     └────────────── back-off ◄──────────────── Leaving ─► Stopped (after shutdown)
//! ```
//!
//! There is one way out of an association, [`Path::lose`]: whatever queue finds whatever wrong, the
//! admin task publishes that the association is over, each channel ends its connection, and the
//! next association of the path has another number.
//!
//! The controller at the other end of a lost path may go on for a while with what it was sent. It
//! is *fenced*, so known to have ended, in the first of three ways ([`AdminTask::fence`]): a
//! session on another path resets it, the next session on its own path does, or its keep alive has
//! certainly run out. Channels keep changes that were lost until then.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use block::{CopyLimits, Geometry, Identity};
use crypto::dhchap::{Concatenation, Outcome};
use crypto::psk::IdentityVersion;
use nvme::host::{
    ADMIN_QUEUE_ENTRIES, AdminCommand, Authenticate, Backoff, OldController, ReadyInfo,
    RemoteNamespace, Session, SessionConfig, SessionState, TAGS,
};
use nvme::spec::Cqe;
use nvme::subsys::ana::AnaState;
use nvme::tcp::{HostConfig, HostEvent};
use reactor::{Local, Progress, Task};

use crate::auth::{self, Auth, Computing, RECEIVE_BYTES};
use crate::config::PathConfig;
use crate::link::{Link, Loss};
use crate::security::{Offers, Tls};
use crate::shared::{AskedPath, PathState, Phase, Shared};
use crate::slots::Slots;

/// An association that has been ready for so long counts as sound: the next loss starts with the
/// shortest delay again.
const SOUND_AFTER: Duration = Duration::from_secs(10);
/// What is added to the time in which a lost controller ends by itself: it must notice, and finish
/// what it began.
const OLD_CONTROLLER_MARGIN: Duration = Duration::from_secs(5);
/// How long the controller may take to shut down before the connection is closed without it.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// The commands of an authentication go under this cid, behind those of the session.
const AUTH_TAG: u16 = TAGS;
/// How often a path that is to be left is asked for what it still has to do, and for how long.
const DRAIN_POLL: Duration = Duration::from_millis(10);
const DRAIN_MAX: Duration = Duration::from_secs(2);
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
    /// There is no path here. Moved on when one gets the place.
    Vacant,
    /// Nothing more happens.
    Stopped,
}

/// What the paths of a volume have in common.
struct Group {
    /// The namespace as it was first seen: another one under its name is not taken for it.
    known: Option<RemoteNamespace>,
    is_stopping: bool,
}

/// The admin queue of one path.
struct Path {
    shared: Arc<Shared>,
    local: Local,
    /// In the configuration.
    index: usize,
    addr: SocketAddr,
    stage: Stage,
    link: Link,
    session: Option<Session>,
    /// Of `session`: each gets another.
    session_number: u64,
    slots: Slots,
    /// An authentication under way, and an exponentiation of it.
    auth: Option<(Auth, Option<Computing>)>,
    /// The host has authenticated on this connection.
    is_authenticated: bool,
    /// Another authentication is asked for; it begins when none is under way.
    is_auth_due: bool,
    /// The connection ended as its only purpose was to make the key for the next.
    is_renewed: bool,
    /// It is one of those that the volume is to use.
    is_wanted: bool,
    /// No new I/O is sent on it since this time; it is left when nothing is out any more.
    leaving_since: Option<Duration>,
    drain_at: Duration,
    backoff: Backoff,
    /// Of the association in `Live`, or of the last one.
    generation: u64,
    /// The controller that I/O was last sent to. While there is no association, it may still write.
    old: Option<OldController>,
    /// Path and number of the session that was asked to end `old`, until it answers.
    asked: Option<(usize, u64)>,
    /// A session on another path could not end `old`.
    is_refused: bool,
    /// Since when there has been no sound association; `MAX` while there is.
    lost_at: Duration,
    /// Since when the namespace has been in its ANA state.
    ana: (Option<AnaState>, Duration),
    ana_transition_time: Duration,
    /// Since when the namespace has been detached.
    detached_since: Option<Duration>,
    /// Commands answered on I/O queues when that last mattered.
    done_seen: u64,
}

/// See the [module](self).
pub(crate) struct AdminTask {
    shared: Arc<Shared>,
    local: Local,
    paths: Vec<Path>,
    group: Group,
    requests_seen: u64,
    started: Duration,
    /// Some path could be used once.
    was_usable: bool,
    /// What the paths are to be, as long as there is no place for all of them.
    unplaced: Option<Vec<PathConfig>>,
}

impl AdminTask {
    pub(crate) fn new(shared: Arc<Shared>, local: &Local) -> AdminTask {
        let config = shared.config.paths.iter().enumerate();
        let paths = config.map(|(index, path)| Path::new(&shared, local, index, path.addr));
        AdminTask {
            local: local.clone(),
            paths: paths.collect(),
            started: local.now(),
            was_usable: false,
            unplaced: None,
            group: Group { known: None, is_stopping: false },
            requests_seen: 0,
            shared,
        }
    }

    /// What channels and the control plane ask for. One atomic load when there is nothing.
    fn look(&mut self, now: Duration) {
        if self.local.is_stopping() {
            self.stop(now);
        }
        let requests = self.shared.requests();
        if requests == self.requests_seen {
            return;
        }
        self.requests_seen = requests;
        let asked = self.shared.take_asked();
        if asked.stop {
            self.stop(now);
        }
        if asked.wanted.is_some() {
            self.unplaced = asked.wanted;
        }
        for (path, asked) in self.paths.iter_mut().zip(asked.paths) {
            if let Err(loss) = path.on_asked(asked, now) {
                path.lose(now, &loss, self.group.is_stopping);
            }
        }
    }

    /// Makes the paths what they are to be, as far as that can be done now: a place is free again
    /// when what was sent by the path that had it can do nothing any more.
    fn place(&mut self, now: Duration) -> bool {
        let Some(wanted) = self.unplaced.take() else { return false };
        if self.group.is_stopping {
            return false;
        }
        for path in self.paths.iter_mut().filter(|path| path.stage != Stage::Vacant) {
            path.want(wanted.iter().any(|config| config.addr == path.addr));
        }
        let mut progressed = false;
        for config in &wanted {
            let has_place = |path: &Path| path.stage != Stage::Vacant && path.addr == config.addr;
            if self.paths.iter().any(has_place) {
                continue;
            }
            let free = |path: &Path| path.stage == Stage::Vacant && path.old.is_none();
            match self.paths.iter().position(free) {
                Some(index) => self.paths[index].settle(config, now),
                None if self.paths.len() < self.shared.config.paths_max() => {
                    let index = self.paths.len();
                    self.paths.push(Path::new(&self.shared, &self.local, index, config.addr));
                    let state = PathState::unknown(config);
                    self.shared.publish(|all| all.paths.push(state));
                }
                None => {
                    self.unplaced = Some(wanted);
                    return progressed;
                }
            }
            tracing::info!(addr = %config.addr, subnqn = %self.shared.config.subnqn, "new path");
            progressed = true;
        }
        progressed
    }

    /// Leaves paths that are not wanted any more: live ones when another can be used.
    fn leave_unwanted(&mut self, now: Duration) -> bool {
        let mut progressed = false;
        for index in 0..self.paths.len() {
            let path = &self.paths[index];
            if path.is_wanted || path.leaving_since.is_some() || self.group.is_stopping {
                continue;
            }
            let is_replaced = || {
                let mut others = self.paths.iter();
                others.any(|other| other.is_wanted && other.down_since().is_none())
            };
            match path.stage {
                Stage::Live { .. } if !is_replaced() => {}
                Stage::Vacant | Stage::Stopped => {}
                _ => {
                    self.paths[index].begin_leaving(now);
                    progressed = true;
                }
            }
        }
        progressed
    }

    /// Begins the orderly end.
    fn stop(&mut self, now: Duration) {
        if self.group.is_stopping {
            return;
        }
        self.group.is_stopping = true;
        // Before the controllers are told: channels hold nothing for them any more.
        self.shared.publish(|state| state.phase = Phase::Stopped { is_over: false });
        for path in &mut self.paths {
            path.stop(now);
        }
    }

    fn is_stopped(&self) -> bool {
        self.group.is_stopping && self.paths.iter().all(|path| path.stage == Stage::Stopped)
    }

    /// Sees to it that controllers behind lost paths end, and notices when they have.
    fn fence(&mut self, now: Duration) -> bool {
        let mut progressed = false;
        for index in 0..self.paths.len() {
            let path = &self.paths[index];
            let Some(old) = path.old.filter(|old| old.safe_at != Duration::MAX) else { continue };
            let mut has_ended = now >= old.safe_at;
            if let Some((by, number)) = path.asked {
                let answer = match &mut self.paths[by] {
                    other if other.session_number != number => Some(None),
                    other => match other.session.as_mut().map(Session::take_other_ended) {
                        None => Some(None),
                        Some(answer) => answer.map(Some),
                    },
                };
                let path = &mut self.paths[index];
                match answer {
                    Some(Some(true)) => has_ended = true,
                    Some(Some(false)) => (path.asked, path.is_refused) = (None, true),
                    // The session went away: another may be asked.
                    Some(None) => path.asked = None,
                    None => {}
                }
            }
            if has_ended {
                self.paths[index].on_fenced();
                progressed = true;
                continue;
            }
            let path = &self.paths[index];
            if path.asked.is_some() || path.is_refused || self.group.is_stopping {
                continue;
            }
            let able = (0..self.paths.len()).filter(|other| *other != index).find(|other| {
                let session = &mut self.paths[*other].session;
                session.as_mut().is_some_and(|session| session.end_other(old))
            });
            if let Some(by) = able {
                self.paths[index].asked = Some((by, self.paths[by].session_number));
                progressed = true;
            }
        }
        progressed
    }

    /// Since when no path can be used; `None`: one can, or I/O fails already.
    fn down_since(&self) -> Option<Duration> {
        if self.group.is_stopping {
            return None;
        }
        let mut since = self.started;
        for path in &self.paths {
            since = since.max(path.down_since()?);
        }
        (!self.shared.is_gone()).then_some(since)
    }

    fn gone_at(&self) -> Option<Duration> {
        let timeout = self.shared.config.ctrl_loss_timeout?;
        // What has never been there has not gone: the first association takes its time.
        if timeout.is_zero() && !self.was_usable {
            return None;
        }
        self.down_since()?.checked_add(timeout)
    }

    /// Fails held I/O when there has been no path for too long, or there will be none.
    fn check_gone(&mut self, now: Duration) {
        self.was_usable |= self.paths.iter().any(|path| path.down_since().is_none());
        let mut is_lost_for_good = self.down_since().is_some();
        let mut present = self.paths.iter().filter(|path| path.stage != Stage::Vacant).peekable();
        is_lost_for_good &= present.peek().is_some();
        is_lost_for_good &= present.all(|path| {
            matches!(path.stage, Stage::Live { .. }) && path.ana.0 == Some(AnaState::PersistentLoss)
        });
        if !is_lost_for_good && self.gone_at().is_none_or(|at| now < at) {
            return;
        }
        tracing::error!(
            subnqn = %self.shared.config.subnqn,
            "no path within the controller loss time-out; I/O fails"
        );
        self.shared.publish(|state| state.phase = Phase::Gone);
    }
}

impl Path {
    fn new(shared: &Arc<Shared>, local: &Local, index: usize, addr: SocketAddr) -> Path {
        let config = &shared.config;
        let link = link_to(shared, local, addr);
        let now = local.now();
        Path {
            local: local.clone(),
            index,
            addr,
            stage: Stage::Waiting { until: now },
            link,
            session: None,
            session_number: 0,
            slots: Slots::new(TAGS + 1),
            auth: None,
            is_authenticated: false,
            is_auth_due: false,
            is_renewed: false,
            is_wanted: true,
            leaving_since: None,
            drain_at: Duration::MAX,
            backoff: Backoff::new(config.reconnect_delay, config.reconnect_delay_max),
            generation: 0,
            old: None,
            asked: None,
            is_refused: false,
            lost_at: now,
            ana: (None, now),
            ana_transition_time: Duration::MAX,
            detached_since: None,
            done_seen: 0,
            shared: Arc::clone(shared),
        }
    }

    /// Another path takes this place, which is vacant. Associations are counted on: what channels
    /// know of the old ones stays true.
    fn settle(&mut self, config: &PathConfig, now: Duration) {
        debug_assert!(self.stage == Stage::Vacant && self.old.is_none());
        self.addr = config.addr;
        self.link = link_to(&self.shared, &self.local, config.addr);
        self.backoff.reset();
        (self.is_wanted, self.leaving_since) = (true, None);
        (self.ana, self.lost_at) = ((None, now), now);
        self.stage = Stage::Waiting { until: now };
        self.shared.settle(self.index, config, self.generation);
    }

    /// Whether the volume is to use it.
    fn want(&mut self, is_wanted: bool) {
        if self.is_wanted == is_wanted {
            return;
        }
        self.is_wanted = is_wanted;
        // What is being left already comes back as a new path does.
        if is_wanted && self.leaving_since.is_some_and(|_| matches!(self.stage, Stage::Live { .. }))
        {
            self.leaving_since = None;
        }
        let is_leaving = self.leaving_since.is_some();
        self.shared.publish_path(self.index, |path| {
            (path.is_wanted, path.is_leaving) = (is_wanted, is_leaving);
        });
    }

    /// It is not wanted any more, and is not needed.
    fn begin_leaving(&mut self, now: Duration) {
        self.leaving_since = Some(now);
        self.drain_at = now + DRAIN_POLL;
        tracing::info!(addr = %self.addr, subnqn = %self.shared.config.subnqn, "leaving the path");
        match self.stage {
            // What it has is waited for first.
            Stage::Live { .. } => {
                self.shared.publish_path(self.index, |path| path.is_leaving = true);
            }
            Stage::Leaving => {}
            _ => self.leave(now, None, false),
        }
    }

    /// Leaves a path that has nothing to do any more, or has had long enough to do it. What is out
    /// nevertheless is lost, and treated so.
    fn drain(&mut self, now: Duration) -> bool {
        let (Some(since), Stage::Live { .. }) = (self.leaving_since, self.stage) else {
            return false;
        };
        if now < self.drain_at {
            return false;
        }
        self.drain_at = now + DRAIN_POLL;
        if self.shared.path_in_flight(self.index) > 0 && now < since + DRAIN_MAX {
            return false;
        }
        self.outlive_old(now);
        self.lost_at = self.lost_at.min(now);
        self.shared.publish_path(self.index, |path| path.is_live = false);
        self.stop(now);
        true
    }

    /// From now on the controller ends by itself, at the latest. With traffic based keep alive it
    /// may count up to two time-outs from the last command.
    fn outlive_old(&mut self, now: Duration) {
        if let Some(old) = &mut self.old {
            old.safe_at = now + self.shared.config.kato * 2 + OLD_CONTROLLER_MARGIN;
        }
    }

    fn on_asked(&mut self, asked: AskedPath, now: Duration) -> Result<(), Loss> {
        let is_live = matches!(self.stage, Stage::Live { .. });
        if asked.connected == self.generation && is_live {
            // I/O flows: the association is worth its name.
            self.backoff.reset();
            self.lost_at = Duration::MAX;
        }
        if let Some(session) = self.session.as_mut().filter(|_| asked.rescan && is_live) {
            session.rescan(now);
        }
        // Before the first authentication has begun, it will be with what is true then.
        let is_proven_or_at_it = self.is_authenticated || self.auth.is_some();
        self.is_auth_due |= asked.reauthenticate && is_proven_or_at_it;
        self.authenticate_again(now)?;
        match asked.fault {
            Some((generation, text)) if generation == self.generation && is_live => {
                Err(Loss::Command(text))
            }
            _ => Ok(()),
        }
    }

    fn stop(&mut self, now: Duration) {
        match (self.stage, &mut self.session) {
            (Stage::Live { .. }, Some(session)) => {
                session.shutdown(now);
                self.stage = Stage::ShuttingDown { until: now + SHUTDOWN_TIMEOUT };
            }
            _ => self.leave(now, None, true),
        }
    }

    /// The controller that I/O was sent to can change nothing any more.
    fn on_fenced(&mut self) {
        tracing::info!(addr = %self.addr, "the controller of the lost association has ended");
        (self.old, self.asked, self.is_refused) = (None, None, false);
        if let Some(session) = &mut self.session {
            session.old_is_over();
        }
        let generation = self.generation;
        self.shared.publish_path(self.index, |path| path.fenced = generation);
    }

    /// Since when it cannot be used for I/O; `None`: it can.
    fn down_since(&self) -> Option<Duration> {
        if let (Stage::Live { .. }, Some(since)) = (self.stage, self.detached_since) {
            return Some(since);
        }
        match (self.stage, self.ana) {
            (
                Stage::Live { .. },
                (None | Some(AnaState::Optimized | AnaState::NonOptimized), _),
            ) => None,
            (Stage::Live { .. }, (_, since)) => Some(since),
            _ => Some(self.lost_at),
        }
    }

    /// When the namespace has been in the Change state for too long.
    fn ana_overdue_at(&self) -> Option<Duration> {
        let is_live = matches!(self.stage, Stage::Live { .. });
        match self.ana {
            (Some(AnaState::Change), since) if is_live => {
                since.checked_add(self.ana_transition_time)
            }
            _ => None,
        }
    }

    /// The association, or the attempt at one, is over.
    #[cold]
    fn lose(&mut self, now: Duration, loss: &Loss, is_stopping: bool) {
        let text = loss.to_string();
        if let Stage::Live { since } = self.stage {
            tracing::warn!(
                addr = %self.addr,
                subnqn = %self.shared.config.subnqn,
                cause = text,
                "association lost; its I/O is held or goes another way"
            );
            if now.saturating_sub(since) >= SOUND_AFTER {
                self.backoff.reset();
                self.lost_at = Duration::MAX;
            }
            self.outlive_old(now);
            // A sound association was lost just now, a doubtful one when the sound one before it
            // was.
            self.lost_at = self.lost_at.min(now);
            let index = self.index;
            self.shared.publish(|state| {
                state.paths[index].is_live = false;
                state.paths[index].losses += 1;
                state.paths[index].last_error = Some(text.clone());
                state.last_error = Some(text);
            });
        } else if !matches!(self.stage, Stage::Stopped | Stage::Leaving | Stage::Vacant) {
            let index = self.index;
            let is_new = self.shared.state().paths[index].last_error.as_deref() != Some(&*text);
            if is_new && !is_stopping && self.leaving_since.is_none() {
                tracing::warn!(
                    addr = %self.addr,
                    subnqn = %self.shared.config.subnqn,
                    cause = text,
                    "cannot set up an association; trying again"
                );
                self.shared.publish(|state| {
                    state.paths[index].last_error = Some(text.clone());
                    state.last_error = Some(text);
                });
            }
        }
        self.leave(now, Some(loss), is_stopping);
    }

    fn leave(&mut self, now: Duration, loss: Option<&Loss>, is_stopping: bool) {
        let is_over = |session: Session| matches!(session.state(), SessionState::Closed);
        let is_shut_down = self.session.take().is_some_and(is_over);
        (self.auth, self.is_authenticated, self.is_auth_due) = (None, false, false);
        if !self.is_renewed && matches!(self.shared.config.security.tls, Tls::Concatenate) {
            // Each association makes its own.
            self.shared.set_offers(self.index, None);
        }
        self.stage = Stage::Leaving;
        if loss.is_none() && is_shut_down {
            self.link.finish(now);
        } else {
            self.link.close(now, loss.and_then(Loss::fault));
        }
        if self.link.is_closed() {
            self.on_left(now, is_stopping);
        }
    }

    fn on_left(&mut self, now: Duration, is_stopping: bool) {
        if is_stopping {
            self.stage = Stage::Stopped;
            return;
        }
        let is_renewed = std::mem::take(&mut self.is_renewed);
        if self.leaving_since.is_some() && !self.is_wanted {
            self.stage = Stage::Vacant;
            self.shared.publish_path(self.index, |path| path.is_vacant = true);
            return;
        }
        if self.leaving_since.take().is_some() {
            self.shared.publish_path(self.index, |path| path.is_leaving = false);
        }
        if is_renewed {
            self.stage = Stage::Waiting { until: now };
            return;
        }
        let delay = self.backoff.next_delay(self.local.random_u64());
        self.stage = Stage::Waiting { until: now + delay };
    }

    fn step(&mut self, now: Duration, group: &mut Group) -> Result<bool, Loss> {
        let mut progressed = self.link.poll(now)?;
        match self.stage {
            Stage::Stopped | Stage::Vacant => return Ok(progressed),
            Stage::Waiting { until } if now >= until => {
                self.stage = Stage::Opening;
                self.shared.publish_path(self.index, |path| path.attempts += 1);
                self.link.open(self.shared.offers(self.index))?;
                progressed = true;
            }
            Stage::Leaving if self.link.is_closed() => {
                self.on_left(now, group.is_stopping);
                progressed = true;
            }
            Stage::ShuttingDown { until } if now >= until => {
                self.leave(now, None, group.is_stopping);
                progressed = true;
            }
            _ => {}
        }
        progressed |= self.drain(now);
        if self.ana_overdue_at().is_some_and(|at| now >= at) {
            let text = format!("the ANA state has changed for more than {:?}", now - self.ana.1);
            return Err(Loss::Command(text));
        }
        while self.link.sent().is_some() {}
        while let Some(chunk) = self.link.recv()? {
            progressed = true;
            let mut input: &[u8] = &chunk;
            while let Some(event) = self.link.next(&mut input)? {
                self.on_event(event, now)?;
            }
        }
        progressed |= self.run_auth(now, group)?;
        progressed |= self.run_session(now, group)?;
        self.link.flush();
        Ok(progressed)
    }

    fn deadline(&self) -> Option<Duration> {
        let stage = match self.stage {
            Stage::Waiting { until } | Stage::ShuttingDown { until } => Some(until),
            Stage::Live { .. } => self.leaving_since.map(|_| self.drain_at),
            _ => None,
        };
        let session = self.session.as_ref().and_then(Session::deadline);
        let auth = self.auth.as_ref().map(|(auth, _)| auth.until);
        let fence = self.old.map(|old| old.safe_at).filter(|at| *at != Duration::MAX);
        [stage, session, auth, self.link.deadline(), self.ana_overdue_at(), fence]
            .into_iter()
            .flatten()
            .min()
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
                    // What the controller asks for is judged here.
                    authenticate: Authenticate::Always,
                };
                let mut session = Session::new(session_config, now);
                if let Some(old) = self.old {
                    session.end_old(old);
                }
                self.session = Some(session);
                self.session_number += 1;
                self.stage = Stage::BringUp;
            }
            HostEvent::Data { cid, offset, bytes } => {
                self.slots.on_data(cid, offset, bytes)?;
            }
            HostEvent::Complete { cid: AUTH_TAG, cqe } => {
                let data = self.slots.data(AUTH_TAG);
                if let Some((auth, computing)) = &mut self.auth {
                    let status = Cqe::from_bytes(&cqe).status();
                    if let Some(task) = auth.on_completion(status, data)? {
                        *computing =
                            Some(Computing::start(task, &self.shared.worker, &self.local)?);
                    }
                }
            }
            HostEvent::Complete { cid, cqe } => {
                let Some(session) = &mut self.session else { return Ok(()) };
                let data = self.slots.data(cid);
                session.on_completion(cid, &cqe, data, now).map_err(Loss::Session)?;
            }
            HostEvent::R2t { .. } => {
                return Err(Loss::Command("R2T on the admin queue".to_owned()));
            }
            HostEvent::Terminated { fes } => return Err(Loss::Terminated { fes }),
        }
        Ok(())
    }

    /// Authenticates: after Connect what the controller or the configuration wants, later what the
    /// control plane asks for.
    fn run_auth(&mut self, now: Duration, group: &Group) -> Result<bool, Loss> {
        let mut progressed = false;
        let asked = self.session.as_ref().and_then(Session::authentication);
        if let Some(asked) = asked
            && self.auth.is_none()
        {
            let wanted = auth::wanted(&self.shared.security(), asked, self.link.is_tls())?;
            match wanted {
                Some(concatenation) => self.begin_auth(concatenation, now)?,
                None => self.session.iter_mut().for_each(Session::authenticated),
            }
            progressed = true;
        }
        let Some((auth, computing)) = &mut self.auth else { return Ok(progressed) };
        auth.is_late(now)?;
        if let Some(done) = computing.as_ref().and_then(Computing::take) {
            *computing = None;
            auth.on_computed(done);
            progressed = true;
        }
        if self.link.room() == 0 {
            return Ok(progressed);
        }
        if let Some(command) = auth.next_command() {
            let read_len = if command.message.is_some() { 0 } else { RECEIVE_BYTES as u32 };
            let command =
                AdminCommand { tag: AUTH_TAG, sqe: command.sqe, write: command.message, read_len };
            self.slots.send(&command, &mut self.link, &self.local)?;
            return Ok(true);
        }
        let Some(outcome) = auth.outcome()?.cloned() else { return Ok(progressed) };
        self.auth = None;
        self.on_authenticated(&outcome, now, group)?;
        self.authenticate_again(now)?;
        Ok(true)
    }

    /// What was asked for during an authentication may be about what has changed since it began.
    fn authenticate_again(&mut self, now: Duration) -> Result<(), Loss> {
        let is_live = matches!(self.stage, Stage::Live { .. });
        if !is_live || self.auth.is_some() || !std::mem::take(&mut self.is_auth_due) {
            return Ok(());
        }
        self.begin_auth(Concatenation::No, now)
    }

    fn begin_auth(&mut self, concatenation: Concatenation, now: Duration) -> Result<(), Loss> {
        let config = &self.shared.config;
        let security = self.shared.security();
        let Some(dhchap) = &security.dhchap else {
            return Err(Loss::Authentication("there is no secret".to_owned()));
        };
        let (local, until) = (&self.local, now + config.command_timeout);
        let random = &mut || local.random_u64();
        let auth = Auth::new(dhchap, &config.names(), concatenation, random, until);
        self.auth = Some((auth, None));
        Ok(())
    }

    fn on_authenticated(
        &mut self,
        outcome: &Outcome,
        now: Duration,
        group: &Group,
    ) -> Result<(), Loss> {
        tracing::debug!(
            addr = %self.addr,
            hash = ?outcome.hash,
            group = ?outcome.group,
            mutual = outcome.is_mutual,
            "authenticated"
        );
        self.is_authenticated = true;
        let Some(generated) = &outcome.generated else {
            if matches!(self.shared.config.security.tls, Tls::Concatenate) && !self.link.is_tls() {
                return Err(Loss::Authentication("it made no key for TLS".to_owned()));
            }
            self.session.iter_mut().for_each(Session::authenticated);
            return Ok(());
        };
        let config = &self.shared.config;
        let psk = generated
            .psk(IdentityVersion::V1, config.hostnqn.as_str(), config.subnqn.as_str())
            .map_err(|error| Loss::Authentication(error.to_string()))?;
        self.shared.set_offers(self.index, Some(Offers::generated(psk)));
        // "The host shall then disconnect and connect again with TLS" (TP8018).
        self.is_renewed = true;
        self.leave(now, None, group.is_stopping);
        Ok(())
    }

    /// Sends what the session wants to send, and follows its state.
    fn run_session(&mut self, now: Duration, group: &mut Group) -> Result<bool, Loss> {
        let mut progressed = false;
        if let Some(session) = self.session.as_mut().filter(|session| session.needs_traffic(now)) {
            let done = self.shared.path_done(self.index);
            if done != self.done_seen {
                self.done_seen = done;
                session.on_traffic(now);
            }
        }
        while self.link.room() > 0 {
            let Some(session) = &mut self.session else { return Ok(progressed) };
            let Some(command) = session.next_command(now) else { break };
            self.slots.send(&command, &mut self.link, &self.local)?;
            progressed = true;
        }
        let Some(session) = &mut self.session else { return Ok(progressed) };
        let is_changed = session.take_changed();
        match (session.state(), self.stage) {
            (SessionState::Failed(error), _) => return Err(Loss::Session(error.clone())),
            (SessionState::Ready(info), Stage::BringUp) => {
                let info = info.clone();
                self.go_live(&info, now, group)?;
                progressed = true;
            }
            (SessionState::Ready(info), Stage::Live { .. }) if is_changed => {
                let info = info.clone();
                self.on_changed(&info, now);
                progressed = true;
            }
            (SessionState::Closed, _) => {
                self.leave(now, None, group.is_stopping);
                progressed = true;
            }
            _ => {}
        }
        Ok(progressed)
    }

    /// The namespace of a live association is not what it was.
    fn on_changed(&mut self, info: &ReadyInfo, now: Duration) {
        let Some(namespace) = &info.namespace else {
            tracing::info!(addr = %self.addr, attached = ?info.attached, "namespaces");
            self.shared.publish(|state| state.set_attached(self.index, &info.attached));
            return;
        };
        self.note_ana(namespace.ana, now);
        if namespace.is_attached == self.detached_since.is_some() {
            let nsid = namespace.nsid;
            if namespace.is_attached {
                tracing::info!(addr = %self.addr, nsid, "the namespace is attached again");
                self.detached_since = None;
            } else {
                tracing::warn!(addr = %self.addr, nsid, "the namespace is detached; I/O waits");
                self.detached_since = Some(now);
            }
        }
        let (index, geometry) = (self.index, geometry(namespace));
        self.shared.publish(|state| {
            let path = &mut state.paths[index];
            set_namespace(path, namespace, self.shared.config.queue_depth);
            path.wear = info.wear;
            state.geometry = geometry;
        });
    }

    fn note_ana(&mut self, ana: Option<AnaState>, now: Duration) {
        if self.ana.0 != ana {
            tracing::info!(addr = %self.addr, ?ana, "ANA state");
            self.ana = (ana, now);
        }
    }

    /// The controller is ready: checks that it is the right one, and lets the channels go.
    fn go_live(&mut self, info: &ReadyInfo, now: Duration, group: &mut Group) -> Result<(), Loss> {
        let Some(namespace) = &info.namespace else {
            self.go_live_as_list(info, now);
            return Ok(());
        };
        let needed = self.shared.queues_needed();
        if info.queues < needed {
            let text =
                format!("the controller grants {} I/O queues, {needed} are in use", info.queues);
            return Err(Loss::Command(text));
        }
        let known = group.known.get_or_insert_with(|| namespace.clone());
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
        (self.asked, self.is_refused) = (None, false);
        self.ana = (namespace.ana, now);
        self.detached_since = None;
        self.ana_transition_time =
            info.controller.ana.map_or(Duration::MAX, |ana| ana.transition_time);
        self.generation += 1;
        tracing::info!(
            addr = %self.addr,
            subnqn = %self.shared.config.subnqn,
            cntlid = info.cntlid,
            ana = ?namespace.ana,
            "association ready"
        );
        let (index, generation) = (self.index, self.generation);
        self.shared.publish(|state| {
            let path = &mut state.paths[index];
            path.is_live = true;
            // The session has seen to the end of the controller before.
            (path.generation, path.fenced) = (generation, generation - 1);
            path.cntlid = info.cntlid;
            path.queues = info.queues;
            path.queue_entries = info.queue_entries;
            path.in_capsule_bytes = info.in_capsule_bytes;
            path.transfer_bytes_max = info.transfer_bytes_max;
            set_namespace(path, namespace, self.shared.config.queue_depth);
            path.wear = info.wear;
            state.geometry = geometry(namespace);
            state.identity = Identity {
                uuid: namespace.uuid,
                nguid: namespace.nguid,
                serial: *info.controller.serial.bytes(),
            };
        });
        self.authenticate_again(now)
    }
}

impl Path {
    /// The same without a namespace: there is no I/O that could land late.
    fn go_live_as_list(&mut self, info: &ReadyInfo, now: Duration) {
        self.stage = Stage::Live { since: now };
        self.generation += 1;
        self.backoff.reset();
        self.lost_at = Duration::MAX;
        let attached = &info.attached;
        let subnqn = &self.shared.config.subnqn;
        tracing::info!(addr = %self.addr, %subnqn, ?attached, "namespaces");
        let (generation, cntlid) = (self.generation, info.cntlid);
        self.shared.publish(|state| {
            let path = &mut state.paths[self.index];
            path.is_live = true;
            (path.generation, path.fenced, path.cntlid) = (generation, generation, cntlid);
            state.set_attached(self.index, attached);
        });
    }
}

/// The connection of an admin queue to the listener at `addr`.
fn link_to(shared: &Shared, local: &Local, addr: SocketAddr) -> Link {
    let config = &shared.config;
    let host_config = HostConfig {
        queue_depth: TAGS + 1,
        header_digest: config.header_digest,
        data_digest: config.data_digest,
        ..HostConfig::default()
    };
    let tx_entries_max = usize::from(TAGS) + 3;
    Link::new(local, addr, host_config, tx_entries_max, config.connect_timeout)
}

fn set_namespace(path: &mut PathState, namespace: &RemoteNamespace, queue_depth: u16) {
    path.ana = namespace.ana;
    path.is_detached = !namespace.is_attached;
    path.write_zeroes_blocks_max = namespace.write_zeroes_blocks_max;
    path.deallocate_blocks_max = namespace.deallocate_blocks_max;
    path.verify_blocks_max = namespace.verify_blocks_max;
    // Two commands take three entries.
    let has_room = queue_depth >= 2 && path.queue_entries >= 3;
    path.compare_and_write = namespace.compare_and_write && has_room;
}

fn geometry(namespace: &RemoteNamespace) -> Geometry {
    let bytes = |blocks: u32| u64::from(blocks) * u64::from(namespace.block_bytes);
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
        compare: namespace.compare,
        verify: namespace.verify_blocks_max > 0,
        copy: match namespace.copy {
            Some(limits) => CopyLimits {
                ranges_max: limits.ranges_max,
                range_bytes_max: bytes(limits.range_blocks_max.into()),
                bytes_max: bytes(limits.blocks_max),
            },
            None => CopyLimits::default(),
        },
        rescap: namespace.rescap,
        ..Geometry::new(namespace.block_bytes, namespace.blocks)
    }
}

impl Task for AdminTask {
    fn poll(&mut self, now: Duration) -> Progress {
        self.look(now);
        let mut progressed = false;
        for path in &mut self.paths {
            progressed |= match path.step(now, &mut self.group) {
                Ok(progressed) => progressed,
                Err(loss) => {
                    path.lose(now, &loss, self.group.is_stopping);
                    true
                }
            };
        }
        progressed |= self.fence(now);
        progressed |= self.leave_unwanted(now);
        progressed |= self.place(now);
        self.check_gone(now);
        if self.is_stopped() {
            self.shared.publish(|state| state.phase = Phase::Stopped { is_over: true });
            return Progress::Done;
        }
        if progressed { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        let paths = self.paths.iter().filter_map(Path::deadline).min();
        [paths, self.gone_at()].into_iter().flatten().min()
    }
}

impl Drop for AdminTask {
    /// A core that goes down without ending its tasks leaves nobody waiting.
    fn drop(&mut self) {
        if !self.is_stopped() {
            self.shared.publish(|state| state.phase = Phase::Stopped { is_over: true });
        }
    }
}

const _: () = assert!(TAGS < ADMIN_QUEUE_ENTRIES);
