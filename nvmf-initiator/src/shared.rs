//! What the cores of one remote volume share: the snapshot of its paths and the list of channels.
//!
//! Nothing here is touched per I/O. A channel reads one atomic word per poll ([`Shared::epoch`])
//! and takes the lock only when that word has changed, which happens a handful of times per
//! association.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Geometry, Identity};
use nvme::host::Wear;
use nvme::subsys::ana::AnaState;
use reactor::CoreHandle;

use crate::auth::Worker;
use crate::config::{ConfigError, PathConfig, RemoteConfig, check_paths};
use crate::security::{Offers, Security, Tls};

/// Where the volume stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No path can be used, for the first time or again. I/O is held.
    Connecting,
    /// I/O can be sent on at least one path.
    Live,
    /// No path could be used for longer than the controller loss time-out. I/O fails; connecting
    /// goes on.
    Gone,
    /// The volume is shut down. I/O fails for good.
    Stopped {
        /// The associations are over as well, and the admin task has ended.
        is_over: bool,
    },
}

/// What is known of one path.
#[derive(Clone, Debug)]
pub struct PathState {
    /// Listener of the controller.
    pub addr: SocketAddr,
    /// It is one of those that the volume is to use. One that is not any more is left as soon as
    /// another can be used, or when it is lost.
    pub is_wanted: bool,
    /// No new I/O is sent on it, as it is about to be left.
    pub is_leaving: bool,
    /// There is no path here now: the place is kept for one to come.
    pub is_vacant: bool,
    /// NUMA node that it is near to.
    pub node: Option<u32>,
    /// There is an association: channels may connect their I/O queues.
    pub is_live: bool,
    /// Number of the association: 1 for the first one that became ready, 0 before that.
    pub generation: u64,
    /// Associations up to this one can change nothing any more: their controllers have ended.
    pub fenced: u64,
    /// ANA state of the namespace; `None`: the controller does not report any.
    pub ana: Option<AnaState>,
    /// The subsystem has detached the namespace from the controller. I/O waits, as without a path.
    pub is_detached: bool,
    /// Namespaces that the controller has, as it said last; of a
    /// [`RemoteSubsystem`](crate::RemoteSubsystem).
    pub attached: Option<Vec<u32>>,
    /// Wear of the media behind the controller, if it knows it.
    pub wear: Option<Wear>,
    /// Controller ID the subsystem gave to this association.
    pub cntlid: u16,
    /// I/O queues granted by the controller.
    pub queues: u16,
    /// Entries per I/O submission queue the controller supports (one-based).
    pub queue_entries: u16,
    /// Bytes of write data that may travel inside an I/O command capsule.
    pub in_capsule_bytes: u32,
    /// Bytes one command may transfer; `u32::MAX` when the controller names no limit.
    pub transfer_bytes_max: u32,
    /// Logical blocks of one Write Zeroes command.
    pub write_zeroes_blocks_max: u32,
    /// Logical blocks of one Deallocate command.
    pub deallocate_blocks_max: u32,
    /// Logical blocks of one Verify command.
    pub verify_blocks_max: u32,
    /// The controller supports Compare and Write, and its queues have room for the two commands.
    pub compare_and_write: bool,
    /// Why the last attempt or association ended. Kept while the next one is up, for the operator.
    pub last_error: Option<String>,
    /// Associations lost after they had been ready.
    pub losses: u64,
    /// Attempts to set up an association, this one included.
    pub attempts: u64,
}

impl PathState {
    pub(crate) fn unknown(config: &PathConfig) -> PathState {
        PathState {
            addr: config.addr,
            is_wanted: true,
            is_leaving: false,
            is_vacant: false,
            node: config.node,
            is_live: false,
            generation: 0,
            fenced: 0,
            ana: None,
            is_detached: false,
            attached: None,
            wear: None,
            cntlid: 0,
            queues: 0,
            queue_entries: 0,
            in_capsule_bytes: 0,
            transfer_bytes_max: 0,
            write_zeroes_blocks_max: 0,
            deallocate_blocks_max: 0,
            verify_blocks_max: 0,
            compare_and_write: false,
            last_error: None,
            losses: 0,
            attempts: 0,
        }
    }

    /// How good the path is for I/O, 0 being the best; `None`: it cannot be used.
    pub fn rank(&self) -> Option<u8> {
        if !self.is_live || self.is_leaving || self.is_detached {
            return None;
        }
        match self.ana {
            None | Some(AnaState::Optimized) => Some(0),
            Some(AnaState::NonOptimized) => Some(1),
            Some(AnaState::Inaccessible | AnaState::PersistentLoss | AnaState::Change) => None,
        }
    }

    /// Whether its last association is over and may still change something.
    pub(crate) fn is_unfenced(&self) -> bool {
        !self.is_live && self.fenced < self.generation
    }
}

/// What the control plane and the channels know of the remote namespace. Published as a whole;
/// never changed in place.
#[derive(Clone, Debug)]
pub struct RemoteState {
    /// Where the volume stands.
    pub phase: Phase,
    /// Associations that became ready so far, over all paths.
    pub generation: u64,
    /// Shape of the namespace; no blocks before the first association.
    pub geometry: Geometry,
    /// Identity of the namespace; all zero before the first association.
    pub identity: Identity,
    /// Why the last attempt or association ended, on whatever path. Kept, for the operator.
    pub last_error: Option<String>,
    /// Associations lost after they had been ready.
    pub losses: u64,
    /// Attempts to set up an association.
    pub attempts: u64,
    /// The paths, in the order of the configuration; where paths change, in the places they got.
    pub paths: Vec<PathState>,
    /// Namespaces of the subsystem by any live path, ascending, as the controllers said last; of a
    /// [`RemoteSubsystem`](crate::RemoteSubsystem), once one has answered.
    pub attached: Option<Vec<u32>>,
    /// Wear of the media behind the namespace, as a controller said last, if one knows it.
    pub wear: Option<Wear>,
    /// How often all queues were told to authenticate again.
    pub(crate) auth_round: u64,
    /// Losses and attempts of paths that are gone, and whose places others have.
    pub(crate) of_gone: (u64, u64),
}

impl RemoteState {
    /// Before the first association.
    pub(crate) fn unknown(config: &RemoteConfig) -> RemoteState {
        RemoteState {
            phase: Phase::Connecting,
            generation: 0,
            geometry: Geometry { io_bytes_max: 0, ..Geometry::new(512, 0) },
            identity: Identity { uuid: [0; 16], nguid: [0; 16], serial: [b' '; 20] },
            last_error: None,
            losses: 0,
            attempts: 0,
            paths: config.paths.iter().map(PathState::unknown).collect(),
            attached: None,
            wear: None,
            auth_round: 0,
            of_gone: (0, 0),
        }
    }

    /// The controller at the end of a live path has these namespaces. Those that it has no more are
    /// gone from lost paths, too: a namespace is not taken for detached because a path is lost, nor for
    /// attached because one cannot be asked.
    pub(crate) fn set_attached(&mut self, path: usize, list: &[u32]) {
        let before = self.paths[path].attached.replace(list.to_vec()).unwrap_or_default();
        let is_gone = |nsid: &u32| before.contains(nsid) && !list.contains(nsid);
        for other in self.paths.iter_mut().filter(|path| !path.is_live) {
            other.attached.iter_mut().for_each(|list| list.retain(|nsid| !is_gone(nsid)));
        }
    }

    /// What follows from the paths.
    fn conclude(&mut self) {
        // A path that is lost takes pairs again when it is back. Until one has said what it takes,
        // what those took counts that are gone.
        let takes_pairs = |path: &PathState| !path.is_vacant && path.compare_and_write;
        if self.paths.iter().any(takes_pairs) {
            self.geometry.compare_and_write = true;
        } else if self.paths.iter().any(|path| path.is_live) {
            self.geometry.compare_and_write = false;
        }
        let sum = |of: fn(&PathState) -> u64| self.paths.iter().map(of).sum();
        self.generation = sum(|path| path.generation);
        self.losses = self.of_gone.0 + sum(|path| path.losses);
        self.attempts = self.of_gone.1 + sum(|path| path.attempts);
        // What was said last counts until something else is.
        let lists =
            || self.paths.iter().filter(|path| !path.is_vacant).filter_map(|p| p.attached.as_ref());
        if lists().next().is_some() {
            let all: BTreeSet<u32> = lists().flatten().copied().collect();
            self.attached = Some(all.into_iter().collect());
        }
        let mut live = self.paths.iter().filter(|path| path.is_live);
        self.wear = live.find_map(|path| path.wear).or(self.wear);
        let can_send = self.paths.iter().any(|path| path.rank().is_some());
        self.phase = match self.phase {
            // What was lost has been given back, so it must not land behind what is sent from now
            // on: not before each of the old controllers has ended.
            Phase::Gone if self.paths.iter().any(PathState::is_unfenced) => Phase::Gone,
            Phase::Connecting | Phase::Live | Phase::Gone if can_send => Phase::Live,
            Phase::Live => Phase::Connecting,
            phase => phase,
        };
    }
}

/// A channel's place: the index decides its queue ID (index + 1).
struct Seat {
    core: CoreHandle,
    counters: Arc<ChannelCounters>,
    /// One for each path.
    paths: Vec<Arc<PathCounts>>,
}

/// Of one channel on one path, written as [`ChannelCounters`] are.
#[derive(Debug, Default)]
pub(crate) struct PathCounts {
    pub(crate) in_flight: AtomicU64,
    pub(crate) commands: AtomicU64,
    pub(crate) latency_ns: AtomicU64,
}

/// Sums over all open channels of what went over one path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathCounters {
    /// Commands sent and not answered.
    pub in_flight: u64,
    /// Commands answered.
    pub commands: u64,
    /// Time from sending to answer, over all of them.
    pub latency: Duration,
}

impl PathCounters {
    /// Mean time from sending to answer; zero before the first.
    pub fn latency_mean(&self) -> Duration {
        let nanos = self.latency.as_nanos() / u128::from(self.commands.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Written by one core, read by any: plain loads and stores, no order between the fields.
#[derive(Debug, Default)]
pub(crate) struct ChannelCounters {
    pub(crate) in_flight: AtomicU64,
    pub(crate) commands: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) resends: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) write_bytes: AtomicU64,
    pub(crate) errors: AtomicU64,
}

impl ChannelCounters {
    /// Adds to a counter that only this core writes, so a load and a store do what a locked add
    /// would.
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

/// Sums over all channels of a volume, those already closed included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Associations lost after they had been ready.
    pub losses: u64,
    /// Attempts to set up an association.
    pub attempts: u64,
    /// I/Os accepted and not given back.
    pub in_flight: u64,
    /// Commands sent on I/O queues.
    pub commands: u64,
    /// I/Os sent again because the controller answered with a status that allows it.
    pub retries: u64,
    /// I/Os sent again because the path was lost under them.
    pub resends: u64,
    /// Bytes of reads done.
    pub read_bytes: u64,
    /// Bytes of writes done.
    pub write_bytes: u64,
    /// I/Os given back with an error.
    pub errors: u64,
}

/// What the admin task is asked for on a path.
#[derive(Debug, Default)]
pub(crate) struct AskedPath {
    /// Association that a channel found broken, and how. Taken once.
    pub(crate) fault: Option<(u64, String)>,
    /// Last association on which a channel's queue was connected.
    pub(crate) connected: u64,
    /// I/O was refused because of the namespace's state. Taken once.
    pub(crate) rescan: bool,
    /// The queue is to authenticate again. Taken once.
    pub(crate) reauthenticate: bool,
}

/// What the admin task is asked for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) paths: Vec<AskedPath>,
    /// What the paths are to be, if that is another set than before. Taken once.
    pub(crate) wanted: Option<Vec<PathConfig>>,
    /// The volume is to be shut down.
    pub(crate) stop: bool,
}

struct Inner {
    state: Arc<RemoteState>,
    asked: Asked,
    seats: Vec<Option<Seat>>,
    /// What connections of each path offer; `None`: plaintext.
    offers: Vec<Option<Arc<Offers>>>,
    /// What the next authentication is with.
    security: Arc<Security>,
    /// Sums of the channels that were closed.
    closed: Counters,
}

pub(crate) struct Shared {
    pub(crate) config: RemoteConfig,
    /// Core of the admin task.
    admin: CoreHandle,
    /// Bumped (Release, under the lock) after each change to `Inner::state`; a reader that sees a
    /// new value (Acquire) takes the lock, so the word carries no data and cannot be torn from it.
    epoch: AtomicU64,
    /// Bumped the same way when `Inner::asked` changes.
    requests: AtomicU64,
    /// Bumped when geometry or wear change. Relaxed: whoever sees it then takes the lock.
    geometry: AtomicU64,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// For authentication.
    pub(crate) worker: Worker,
}

impl Shared {
    /// `offers`: for each path.
    pub(crate) fn new(
        config: RemoteConfig,
        admin: CoreHandle,
        state: RemoteState,
        offers: Vec<Option<Arc<Offers>>>,
    ) -> Arc<Shared> {
        let paths = (0..config.paths_max()).map(|_| AskedPath::default()).collect();
        let security = Arc::new(config.security.clone());
        Arc::new(Shared {
            config,
            admin,
            geometry: AtomicU64::new(0),
            epoch: AtomicU64::new(1),
            requests: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                state: Arc::new(state),
                asked: Asked { paths, wanted: None, stop: false },
                seats: Vec::new(),
                offers,
                security,
                closed: Counters::default(),
            }),
            changed: Condvar::new(),
            worker: Worker::default(),
        })
    }

    /// What connections of a path offer; `None`: plaintext.
    pub(crate) fn offers(&self, path: usize) -> Option<Arc<Offers>> {
        self.lock().offers.get(path).cloned().flatten()
    }

    /// TLS and authentication as they are now. Whether connections are encrypted never changes.
    pub(crate) fn security(&self) -> Arc<Security> {
        Arc::clone(&self.lock().security)
    }

    /// Other keys in the place of those of the configuration.
    pub(crate) fn renew_security(&self, security: Security) -> Result<(), ConfigError> {
        let config = &self.config;
        security.replaces(&config.security).map_err(|(key, value, allowed)| ConfigError {
            key,
            value,
            allowed,
        })?;
        let offers = match &security.tls {
            Tls::Keys(_) => Some(config.offers(&security)?),
            Tls::Off | Tls::Concatenate => None,
        };
        self.set_security(security, offers);
        Ok(())
    }

    /// From now on. `offers`: for each path, where they are made from keys.
    fn set_security(&self, security: Security, offers: Option<Vec<Option<Arc<Offers>>>>) {
        let mut inner = self.lock();
        inner.security = Arc::new(security);
        if let Some(offers) = offers {
            inner.offers = offers;
        }
    }

    /// An authentication has made a key for a path, or it is over with that key.
    pub(crate) fn set_offers(&self, path: usize, offers: Option<Arc<Offers>>) {
        if let Some(place) = self.lock().offers.get_mut(path) {
            *place = offers;
        }
    }

    /// A panic elsewhere leaves no half-made value here (every update is one assignment), so a
    /// poisoned lock is usable.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rises with each change of geometry or wear.
    pub(crate) fn geometry_generation(&self) -> u64 {
        self.geometry.load(Ordering::Relaxed)
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.lock().state.phase == Phase::Gone
    }

    /// Changes what is known of one path.
    pub(crate) fn publish_path(&self, path: usize, change: impl FnOnce(&mut PathState)) {
        self.publish(|state| {
            if let Some(path) = state.paths.get_mut(path) {
                change(path);
            }
        });
    }

    /// Changes with every publication; compare it with the value of the last look.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn state(&self) -> Arc<RemoteState> {
        Arc::clone(&self.lock().state)
    }

    /// Replaces the snapshot and wakes whoever waits for it: channels on their cores, `wait_ready`
    /// on its thread.
    pub(crate) fn publish(&self, change: impl FnOnce(&mut RemoteState)) {
        let mut inner = self.lock();
        let mut state = (*inner.state).clone();
        change(&mut state);
        state.conclude();
        if state.geometry != inner.state.geometry || state.wear != inner.state.wear {
            self.geometry.fetch_add(1, Ordering::Relaxed);
        }
        inner.state = Arc::new(state);
        self.epoch.fetch_add(1, Ordering::Release);
        for seat in inner.seats.iter().flatten() {
            seat.core.wake();
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Asks the admin task for something and wakes it.
    fn ask(&self, change: impl FnOnce(&mut Asked)) {
        let mut inner = self.lock();
        change(&mut inner.asked);
        self.requests.fetch_add(1, Ordering::Release);
        drop(inner);
        self.admin.wake();
    }

    fn ask_path(&self, path: usize, change: impl FnOnce(&mut AskedPath)) {
        self.ask(|asked| {
            if let Some(path) = asked.paths.get_mut(path) {
                change(path);
            }
        });
    }

    /// A channel's connection of association `generation` broke: the admin task ends the whole
    /// association.
    pub(crate) fn report_fault(&self, path: usize, generation: u64, text: &str) {
        self.ask_path(path, |asked| {
            // The first reason is the cause, later ones its echoes.
            if asked.fault.as_ref().is_none_or(|(earlier, _)| *earlier < generation) {
                asked.fault = Some((generation, text.to_owned()));
            }
        });
    }

    /// A channel's queue of association `generation` is connected.
    pub(crate) fn note_connected(&self, path: usize, generation: u64) {
        self.ask_path(path, |asked| asked.connected = asked.connected.max(generation));
    }

    /// I/O was refused with an ANA status: the state is not what it is taken for.
    pub(crate) fn ask_rescan(&self, path: usize) {
        self.ask_path(path, |asked| asked.rescan = true);
    }

    /// All queues are to authenticate again.
    pub(crate) fn ask_reauthentication(&self) {
        self.publish(|state| state.auth_round += 1);
        self.ask(|asked| asked.paths.iter_mut().for_each(|path| path.reauthenticate = true));
    }

    /// What the paths are to be from now on, if they may change and these can be some.
    pub(crate) fn set_paths(&self, paths: &[PathConfig]) -> Result<(), ConfigError> {
        if !self.config.paths_change {
            let value = paths.len().to_string();
            return Err(ConfigError { key: "paths", value, allowed: "those of the start" });
        }
        check_paths(paths)?;
        self.want_paths(paths.to_vec());
        Ok(())
    }

    /// What the paths are to be from now on.
    pub(crate) fn want_paths(&self, paths: Vec<PathConfig>) {
        self.ask(|asked| asked.wanted = Some(paths));
    }

    pub(crate) fn request_stop(&self) {
        self.ask(|asked| asked.stop = true);
    }

    /// Changes when [`Shared::take_asked`] has something new.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    pub(crate) fn take_asked(&self) -> Asked {
        let asked = &mut self.lock().asked;
        let take = |path: &mut AskedPath| AskedPath {
            fault: path.fault.take(),
            connected: path.connected,
            rescan: std::mem::take(&mut path.rescan),
            reauthenticate: std::mem::take(&mut path.reauthenticate),
        };
        Asked {
            paths: asked.paths.iter_mut().map(take).collect(),
            wanted: asked.wanted.take(),
            stop: asked.stop,
        }
    }

    /// Gives a channel the lowest free seat. `None`: all `config.queues` are taken.
    pub(crate) fn take_seat(
        &self,
        core: CoreHandle,
        counters: Arc<ChannelCounters>,
        paths: Vec<Arc<PathCounts>>,
    ) -> Option<u16> {
        let mut inner = self.lock();
        let free = inner.seats.iter().position(Option::is_none).unwrap_or(inner.seats.len());
        let index = u16::try_from(free).ok().filter(|i| *i < self.config.queues)?;
        let seat = Some(Seat { core, counters, paths });
        match inner.seats.get_mut(free) {
            Some(place) => *place = seat,
            None => inner.seats.push(seat),
        }
        Some(index)
    }

    pub(crate) fn leave_seat(&self, index: u16) {
        let mut inner = self.lock();
        if let Some(seat) = inner.seats.get_mut(usize::from(index)).and_then(Option::take) {
            let mut closed = inner.closed;
            add(&mut closed, &seat.counters);
            closed.in_flight = 0;
            inner.closed = closed;
        }
    }

    /// I/O queues the open channels need: the highest seat in use.
    pub(crate) fn queues_needed(&self) -> u16 {
        let inner = self.lock();
        let needed = inner.seats.iter().rposition(Option::is_some).map_or(0, |i| i + 1);
        u16::try_from(needed).unwrap_or(u16::MAX)
    }

    pub(crate) fn counters(&self) -> Counters {
        let inner = self.lock();
        let mut sum = inner.closed;
        for seat in inner.seats.iter().flatten() {
            add(&mut sum, &seat.counters);
        }
        sum.losses = inner.state.losses;
        sum.attempts = inner.state.attempts;
        sum
    }

    /// Commands out on a path, over the open channels, as they last said.
    pub(crate) fn path_in_flight(&self, path: usize) -> u64 {
        let inner = self.lock();
        let seats = inner.seats.iter().flatten();
        seats.filter_map(|seat| Some(seat.paths.get(path)?.in_flight.load(Ordering::Relaxed))).sum()
    }

    /// Commands answered on a path, over the open channels.
    pub(crate) fn path_done(&self, path: usize) -> u64 {
        let inner = self.lock();
        let seats = inner.seats.iter().flatten();
        seats.filter_map(|seat| Some(seat.paths.get(path)?.commands.load(Ordering::Relaxed))).sum()
    }

    /// Of each path, over the open channels.
    pub(crate) fn path_counters(&self) -> Vec<PathCounters> {
        let inner = self.lock();
        let mut sums = vec![PathCounters::default(); inner.state.paths.len()];
        for seat in inner.seats.iter().flatten() {
            for (sum, from) in sums.iter_mut().zip(&seat.paths) {
                let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
                sum.in_flight += get(&from.in_flight);
                sum.commands += get(&from.commands);
                sum.latency += Duration::from_nanos(get(&from.latency_ns));
            }
        }
        sums
    }

    /// Gives the place of a path that is gone to another one, with the numbers of its associations.
    pub(crate) fn settle(&self, index: usize, config: &PathConfig, generation: u64) {
        self.publish(|state| {
            let Some(path) = state.paths.get_mut(index) else { return };
            state.of_gone.0 += path.losses;
            state.of_gone.1 += path.attempts;
            *path = PathState { generation, fenced: generation, ..PathState::unknown(config) };
        });
    }

    /// Blocks the calling thread (never a core) until `ready` says so or the time is over; gives
    /// the last snapshot.
    pub(crate) fn wait(
        &self,
        timeout: Duration,
        ready: impl Fn(&RemoteState) -> bool,
    ) -> Arc<RemoteState> {
        let until = Instant::now().checked_add(timeout);
        let mut inner = self.lock();
        while !ready(&inner.state) {
            let left = match until {
                Some(until) => until.saturating_duration_since(Instant::now()),
                None => Duration::MAX,
            };
            if left.is_zero() {
                break;
            }
            inner =
                self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Arc::clone(&inner.state)
    }
}

fn add(sum: &mut Counters, from: &ChannelCounters) {
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    sum.in_flight += get(&from.in_flight);
    sum.commands += get(&from.commands);
    sum.retries += get(&from.retries);
    sum.resends += get(&from.resends);
    sum.read_bytes += get(&from.read_bytes);
    sum.write_bytes += get(&from.write_bytes);
    sum.errors += get(&from.errors);
}
