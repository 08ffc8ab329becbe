//! What hosts may use up: the door that connections come through, a budget per host NQN, and the
//! count of those who were turned away.
//!
//! ```text
//!  accept ──► Door: connections in all, ──► Connect ──► Account: controllers, queues,
//!             handshakes per peer                       admin commands, buffers of a host NQN
//! ```
//!
//! The door's lock is taken when a connection comes, passes Connect and goes; an account is atomic
//! and taken without a lock.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::state::LimitsHit;

/// For how long an admin command beyond the rate is held back before it is answered with Command
/// Interrupted.
///
/// It is held back at all since neither Linux (passthrough requests are "fail fast") nor SPDK
/// repeats an admin command that failed, whatever its status: a scan would fail instead of taking
/// longer. Five seconds is far below the time that hosts give an admin command (Linux: 60 s).
pub(crate) const ADMIN_PATIENCE: Duration = Duration::from_secs(5);

/// Connections that were told to go for newer ones, and have not gone yet. More are not told so:
/// the target's connections are bounded by this and [`Limits::connections`](crate::Limits).
const LEAVING_MAX: usize = 256;

/// How often each limit was met. Written by whoever meets it, which is rare: no order is needed.
#[derive(Debug, Default)]
pub(crate) struct LimitCounters {
    pub(crate) connections: AtomicU64,
    pub(crate) handshakes: AtomicU64,
    pub(crate) handshakes_dropped: AtomicU64,
    pub(crate) connections_of_host: AtomicU64,
    pub(crate) controllers: AtomicU64,
    pub(crate) controllers_of_host: AtomicU64,
    pub(crate) admin_waits: AtomicU64,
    pub(crate) admin_commands: AtomicU64,
    pub(crate) queue_overruns: AtomicU64,
    pub(crate) buffers: AtomicU64,
}

/// Counts one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl LimitCounters {
    pub(crate) fn snapshot(&self) -> LimitsHit {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LimitsHit {
            connections: of(&self.connections),
            handshakes: of(&self.handshakes),
            handshakes_dropped: of(&self.handshakes_dropped),
            connections_of_host: of(&self.connections_of_host),
            controllers: of(&self.controllers),
            controllers_of_host: of(&self.controllers_of_host),
            admin_waits: of(&self.admin_waits),
            admin_commands: of(&self.admin_commands),
            queue_overruns: of(&self.queue_overruns),
            buffers: of(&self.buffers),
        }
    }
}

/// A rate, and what may come at once before it counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    interval_ns: u64,
    burst_ns: u64,
}

impl Rate {
    /// `per_second` and `burst` of 0 count as 1.
    pub(crate) fn new(per_second: u32, burst: u32) -> Rate {
        let interval_ns = 1_000_000_000 / u64::from(per_second.max(1));
        Rate { interval_ns, burst_ns: interval_ns * u64::from(burst.max(1)) }
    }
}

/// A token bucket: the moment at which it will be full again, in nanoseconds of the cores' clock.
#[derive(Debug, Default)]
pub(crate) struct Bucket {
    // On its own: nothing is published by it, so no order is needed.
    full_at: AtomicU64,
}

impl Bucket {
    /// Takes a token and tells how long to wait for it; takes none and returns `None` when that is
    /// longer than `patience`.
    pub(crate) fn take(&self, rate: Rate, now: Duration, patience: Duration) -> Option<Duration> {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let now = ns(now);
        let wait = |full_at: u64| {
            full_at
                .max(now)
                .saturating_add(rate.interval_ns)
                .saturating_sub(now)
                .saturating_sub(rate.burst_ns)
        };
        let before = self
            .full_at
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                (wait(full_at) <= ns(patience))
                    .then(|| full_at.max(now).saturating_add(rate.interval_ns))
            })
            .ok()?;
        Some(Duration::from_nanos(wait(before)))
    }
}

/// What one host NQN uses, over all of its controllers.
#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) admin: Bucket,
    /// Commands beyond the size of their queue.
    pub(crate) overruns: AtomicU64,
    /// Pool bytes that its commands hold, per core: only that core writes.
    held: Box<[AtomicUsize]>,
}

impl Account {
    pub(crate) fn new(cores: usize) -> Account {
        Account {
            admin: Bucket::default(),
            overruns: AtomicU64::new(0),
            held: (0..cores).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// Pool bytes held on a core.
    pub(crate) fn held(&self, core: usize) -> usize {
        self.held[core].load(Ordering::Relaxed)
    }

    /// `bytes` more are held on this core.
    pub(crate) fn hold(&self, core: usize, bytes: usize) {
        self.held[core].store(self.held(core) + bytes, Ordering::Relaxed);
    }

    /// `bytes` were given back on this core.
    pub(crate) fn unhold(&self, core: usize, bytes: usize) {
        debug_assert!(self.held(core) >= bytes, "given back is what was taken");
        self.held[core].store(self.held(core).saturating_sub(bytes), Ordering::Relaxed);
    }
}

/// Whose budget of handshakes a connection counts against: an address, of IPv6 the first 64 bits,
/// which is the least that one party is given. `None`: no address, such as a Unix socket's.
pub(crate) type Peer = Option<IpAddr>;

/// The peer that a socket's address text names.
pub(crate) fn peer_of(address: &str) -> Peer {
    let ip = address.parse::<SocketAddr>().ok()?.ip().to_canonical();
    Some(match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => IpAddr::from((v6.to_bits() & !u128::from(u64::MAX)).to_be_bytes()),
    })
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// As many connections as are allowed exist, and all have passed Connect.
    Connections,
    /// The peer has as many handshakes in progress as it is allowed.
    Handshakes,
}

/// Counts connections from accept to close, and those before Connect per peer.
#[derive(Debug)]
pub(crate) struct Door {
    state: Mutex<DoorState>,
    connections_max: usize,
    handshakes_max: usize,
}

#[derive(Debug, Default)]
struct DoorState {
    /// All that were let in and not told to go.
    connections: usize,
    /// Told to go, and not gone yet.
    leaving: usize,
    handshakes: HashMap<Peer, usize>,
    /// Connections that nothing has come from yet but a handshake, the oldest first.
    idle: BTreeMap<u64, Arc<AtomicBool>>,
    next: u64,
}

impl Door {
    pub(crate) fn new(connections_max: usize, handshakes_max: usize) -> Arc<Door> {
        Arc::new(Door { state: Mutex::default(), connections_max, handshakes_max })
    }

    fn state(&self) -> MutexGuard<'_, DoorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection in. When there is no room, the connection that has kept its Connect
    /// command back for longest makes some: [`Pass::is_revoked`] then tells it to go.
    ///
    /// Returns the pass, and whether another was revoked for it.
    pub(crate) fn admit(self: &Arc<Door>, peer: Peer) -> Result<(Pass, bool), Closed> {
        let mut state = self.state();
        if state.handshakes.get(&peer).is_some_and(|count| *count >= self.handshakes_max) {
            return Err(Closed::Handshakes);
        }
        let mut is_instead = false;
        if state.connections >= self.connections_max {
            if state.leaving >= LEAVING_MAX {
                return Err(Closed::Connections);
            }
            let (_, revoked) = state.idle.pop_first().ok_or(Closed::Connections)?;
            // Release is not needed: the flag says nothing of other memory.
            revoked.store(true, Ordering::Relaxed);
            state.connections -= 1;
            state.leaving += 1;
            is_instead = true;
        }
        state.connections += 1;
        *state.handshakes.entry(peer).or_default() += 1;
        let number = state.next;
        state.next += 1;
        let revoked = Arc::new(AtomicBool::new(false));
        state.idle.insert(number, Arc::clone(&revoked));
        let door = Arc::clone(self);
        Ok((Pass { door, peer, number, revoked, in_handshake: true }, is_instead))
    }

    /// Connections that exist.
    pub(crate) fn connections(&self) -> usize {
        let state = self.state();
        state.connections + state.leaving
    }
}

impl DoorState {
    fn end_handshake(&mut self, peer: &Peer) {
        if let Some(count) = self.handshakes.get_mut(peer) {
            *count -= 1;
            if *count == 0 {
                self.handshakes.remove(peer);
            }
        }
    }
}

/// A connection's place among all; given back when dropped.
#[derive(Debug)]
pub(crate) struct Pass {
    door: Arc<Door>,
    peer: Peer,
    number: u64,
    revoked: Arc<AtomicBool>,
    in_handshake: bool,
}

impl Pass {
    /// Whether the connection has to make room for another one.
    pub(crate) fn is_revoked(&self) -> bool {
        self.in_handshake && self.revoked.load(Ordering::Relaxed)
    }

    /// Its Connect command is here and waits for us: the connection stays.
    pub(crate) fn keep(&self) {
        self.door.state().idle.remove(&self.number);
    }

    /// Connect succeeded. A connection that has been told to go already still has to.
    pub(crate) fn connected(&mut self) {
        let mut state = self.door.state();
        // Read under the lock that it is written under.
        if self.in_handshake && !self.revoked.load(Ordering::Relaxed) {
            self.in_handshake = false;
            state.idle.remove(&self.number);
            state.end_handshake(&self.peer);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.door.state();
        state.idle.remove(&self.number);
        if self.in_handshake {
            state.end_handshake(&self.peer);
        }
        if self.revoked.load(Ordering::Relaxed) {
            state.leaving -= 1;
        } else {
            state.connections -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn bucket_grants_a_burst_then_the_rate_then_refuses() {
        let rate = Rate::new(100, 3);
        let bucket = Bucket::default();
        let take = |now, patience| bucket.take(rate, ms(now), ms(patience));
        let start = 1_000;
        for _ in 0..3 {
            assert_eq!(take(start, 0), Some(ms(0)));
        }
        assert_eq!(take(start, 0), None, "nothing is left, and nothing was taken by asking");
        assert_eq!(take(start, 9), None);
        assert_eq!(take(start, 10), Some(ms(10)));
        assert_eq!(take(start, 30), Some(ms(20)));
        assert_eq!(take(start + 20, 0), None, "both that wait are served first");
        assert_eq!(take(start + 30, 0), Some(ms(0)));
        for _ in 0..3 {
            assert_eq!(take(start + 60_000, 0), Some(ms(0)), "full again, and no fuller");
        }
        assert_eq!(take(start + 60_000, 0), None);
    }

    #[test]
    fn bucket_keeps_the_rate_over_time_and_survives_extremes() {
        let rate = Rate::new(1_000, 10);
        let bucket = Bucket::default();
        let granted = (0..10_000u64)
            .filter(|i| {
                bucket.take(rate, Duration::from_micros(1_000_000 + i * 100), ms(0)).is_some()
            })
            .count();
        assert!((1_000..=1_010).contains(&granted), "{granted} in a second");
        let all = Rate::new(0, 0);
        assert_eq!(Bucket::default().take(all, Duration::MAX, Duration::MAX), Some(ms(0)));
        let bucket = Bucket::default();
        assert!(bucket.take(Rate::new(u32::MAX, u32::MAX), ms(0), ms(0)).is_some());
    }

    #[test]
    fn account_counts_bytes_per_core() {
        let account = Account::new(2);
        account.hold(0, 4096);
        account.hold(1, 512);
        account.unhold(0, 4096);
        assert_eq!((account.held(0), account.held(1)), (0, 512));
    }

    #[test]
    fn peers_are_addresses_and_ipv6_networks() {
        assert_eq!(peer_of("192.0.2.1:7"), peer_of("192.0.2.1:4420"));
        assert_ne!(peer_of("192.0.2.1:7"), peer_of("192.0.2.2:7"));
        assert_eq!(peer_of("[2001:db8::1]:7"), peer_of("[2001:db8::ffff:0:0:1]:9"));
        assert_ne!(peer_of("[2001:db8::1]:7"), peer_of("[2001:db8:0:1::1]:7"));
        assert_eq!(peer_of("[::ffff:192.0.2.1]:7"), peer_of("192.0.2.1:7"));
        assert_eq!(peer_of("unix socket"), None);
    }

    fn peer(n: u8) -> Peer {
        Some(IpAddr::from([192, 0, 2, n]))
    }

    #[test]
    fn one_peer_has_its_budget_of_handshakes_and_others_theirs() {
        let door = Door::new(100, 2);
        let (mut a, _) = door.admit(peer(1)).expect("room");
        let (_b, _) = door.admit(peer(1)).expect("room");
        assert_eq!(door.admit(peer(1)).err(), Some(Closed::Handshakes));
        let _other = door.admit(peer(2)).expect("another peer feels nothing");
        a.connected();
        a.connected();
        let (c, _) = door.admit(peer(1)).expect("one handshake is over");
        assert_eq!(door.admit(peer(1)).err(), Some(Closed::Handshakes));
        drop(c);
        let _d = door.admit(peer(1)).expect("one went away");
        assert_eq!(door.connections(), 4);
    }

    #[test]
    fn oldest_idle_handshake_goes_for_a_new_connection() {
        let door = Door::new(3, 10);
        let (mut connected, _) = door.admit(peer(1)).expect("room");
        connected.connected();
        let (waits_for_us, _) = door.admit(peer(1)).expect("room");
        waits_for_us.keep();
        let (idle, _) = door.admit(peer(1)).expect("room");
        let (newer, instead) = door.admit(peer(2)).expect("the idle one goes");
        assert!(instead);
        assert!(idle.is_revoked());
        assert!(!connected.is_revoked() && !waits_for_us.is_revoked() && !newer.is_revoked());
        assert_eq!(door.connections(), 4, "the idle one is not gone yet");
        drop(idle);
        assert_eq!(door.connections(), 3);
        newer.keep();
        assert_eq!(door.admit(peer(3)).err(), Some(Closed::Connections), "nobody is idle");
        drop((connected, waits_for_us, newer));
        assert_eq!(door.connections(), 0);
        assert!(door.state().handshakes.is_empty() && door.state().idle.is_empty());
    }

    #[test]
    fn connection_that_was_told_to_go_goes_although_its_connect_came() {
        let door = Door::new(1, 10);
        let (mut first, _) = door.admit(peer(1)).expect("room");
        let (second, _) = door.admit(peer(2)).expect("the first goes");
        first.connected();
        assert!(first.is_revoked());
        drop((first, second));
        assert_eq!(door.connections(), 0);
    }

    #[test]
    fn connections_told_to_go_are_bounded() {
        let door = Door::new(1, 10_000);
        let mut passes = Vec::new();
        while let Ok((pass, _)) = door.admit(peer(1)) {
            passes.push(pass);
            assert!(passes.len() <= LEAVING_MAX + 1);
        }
        assert_eq!(door.connections(), LEAVING_MAX + 1);
        passes.clear();
        assert_eq!(door.connections(), 0);
    }
}
