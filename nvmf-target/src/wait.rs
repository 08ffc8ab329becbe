//! Commands that cannot go on yet: each waits in the list of its connection, the connections of a
//! core take turns.
//!
//! Why a command waits:
//! - its connection has enough on its way to the socket already, or has begun enough reads in this
//!   turn: what a slow reader does not take holds neither memory nor the volume;
//! - its connection or its host holds its share of the core's buffers;
//! - the pool is empty: whoever finds it so first is served first, and nobody overtakes;
//! - the volume's channel is full;
//! - its host sends admin commands faster than it may.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use block::Io;
use nvme::spec::{AdminOpcode, Status};

use crate::conn::{Conn, Life, Phase};
use crate::core::Env;
use crate::limits::{ADMIN_PATIENCE, Account, count};

/// Read data that a connection may have waiting for its socket; the reads behind it wait before
/// they take memory. One read may exceed it.
///
/// The kernel's send buffer, a few megabytes, comes on top: this has to cover the time from one
/// `sendmsg` to the next only. Measured with 128 KiB reads at depth 32 over loopback on two shared
/// cores (null volume, medians of five interleaved runs, thousands of commands per second): 7.5
/// with 128 KiB, 8.8 with 256, 9.6 with 512, 10.2 with 1,024 and 7.6 without a bound. The two best
/// are within each other's spread; the smaller one it is. 4 KiB reads do not care.
pub(crate) const UNSENT_BYTES: usize = 512 << 10;

/// Read data that a connection begins with in one turn, so that the first of a burst is on its way
/// before the last has a buffer. Not less than a volume can do in a turn.
pub(crate) const BEGUN_BYTES: usize = 512 << 10;

/// Share of the pool (1 of so many) that data to be asked for leaves alone.
///
/// Such data comes behind what the host has sent before: if that is a capsule with data, and it found
/// no memory because all is promised, nothing would ever move again. What a capsule takes comes back
/// without the host's doing.
const FETCH_LEAVES: usize = 8;
/// Capsules of a connection that are beyond all shares: the two of a fused pair, which go on together.
const CAPSULES_BEYOND: usize = 2;
/// Share of the pool that they leave alone: less than the above, so that there is memory for them, and
/// something for others.
const CAPSULE_LEAVES: usize = 16;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// What the target sends, or works with.
    Own,
    /// Data that the host will be asked for.
    Fetch,
    /// Data behind a capsule: nothing else is received before.
    Capsule,
}

/// What a connection may hold although its host has its share.
const FLOOR_BYTES: usize = 64 << 10;

/// Waiting commands of one connection that go on in one turn, before it is the next one's.
const SERVED_MAX: usize = 32;

/// For how long a command that found the pool empty has precedence.
const PRECEDENCE: Duration = Duration::from_millis(10);

/// The connections of a core that have commands waiting, each once, in the order of their turns.
#[derive(Debug, Default)]
pub(crate) struct Rota {
    conns: VecDeque<u32>,
    /// Who found the pool empty, and when: what others give back is for it.
    short: Option<(u32, Duration)>,
    /// When the first of the commands that wait for a time may go on.
    due: Option<Duration>,
}

impl Rota {
    /// Begins a turn; returns how many connections take turns.
    pub(crate) fn begin(&mut self, now: Duration) -> usize {
        self.due = None;
        if self.short.is_some_and(|(_, since)| now >= since + PRECEDENCE) {
            self.short = None;
        }
        self.conns.len()
    }

    pub(crate) fn next(&mut self) -> Option<u32> {
        self.conns.pop_front()
    }

    /// Everybody has had a turn: another one is the first in the next.
    pub(crate) fn end(&mut self) {
        match self.short {
            Some((first, since)) => {
                self.wake_at(since + PRECEDENCE);
                if let Some(at) = self.conns.iter().position(|conn| *conn == first) {
                    self.conns.rotate_left(at);
                }
            }
            None if !self.conns.is_empty() => self.conns.rotate_left(1),
            None => {}
        }
    }

    pub(crate) fn wake_at(&mut self, at: Duration) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    pub(crate) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// Whether memory that becomes free is for another connection.
    fn is_for_another(&self, conn: u32) -> bool {
        self.short.is_some_and(|(first, _)| first != conn)
    }

    fn found_empty(&mut self, conn: u32, now: Duration) {
        if self.short.is_none() {
            self.short = Some((conn, now));
        }
    }

    fn found_memory(&mut self, conn: u32) {
        if self.short.is_some_and(|(first, _)| first == conn) {
            self.short = None;
        }
    }

    fn remove(&mut self, conn: u32) {
        self.found_memory(conn);
        self.conns.retain(|other| *other != conn);
    }
}

/// What a connection has waiting, and what it holds.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    /// Slots that wait for memory or for room in a channel, in order of arrival.
    list: VecDeque<u16>,
    in_rota: bool,
    is_served: bool,
    /// Admin commands that are held back, each until a time.
    delayed: VecDeque<(Duration, u16)>,
    /// Pool bytes of all its commands.
    held: usize,
    /// Commands among them whose data came in the capsule.
    capsules: usize,
    /// Those that are on their way to the socket.
    unsent: usize,
    /// Bytes of the reads begun in turn number `lap`.
    begun: usize,
    lap: u64,
}

impl Conn {
    /// Puts a command on the connection's list.
    pub(crate) fn wait_in(&mut self, phase: Phase, slot: u16, env: &mut Env<'_>) -> bool {
        self.slots[slot as usize].phase = phase;
        self.waits.list.push_back(slot);
        if !self.waits.in_rota {
            self.waits.in_rota = true;
            env.rota.conns.push_back(self.index);
        }
        false
    }

    /// The connection's turn: its first commands go on. `true` if one did.
    pub(crate) fn serve(&mut self, env: &mut Env<'_>) -> bool {
        let mut worked = false;
        self.waits.is_served = true;
        for _ in 0..SERVED_MAX {
            let Some(slot) = self.waits.list.pop_front() else { break };
            if !self.retry(slot, env) {
                // It was queued again, at the back: turn it round.
                if let Some(again) = self.waits.list.pop_back() {
                    self.waits.list.push_front(again);
                }
                break;
            }
            worked = true;
        }
        self.waits.is_served = false;
        if self.waits.list.is_empty() {
            self.waits.in_rota = false;
        } else {
            env.rota.conns.push_back(self.index);
        }
        worked
    }

    /// Tries a waiting command again; `false`: it was queued anew.
    fn retry(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        if self.life != Life::Open {
            return true;
        }
        match self.slots[slot as usize].phase {
            Phase::WaitFetch => self.fetch(slot, env),
            Phase::WaitSubmit => self.submit(slot, env),
            _ => true,
        }
    }

    /// Whether a command of the connection may take `len` bytes of the pool now. Commands in the
    /// list go first, unless this one holds up the whole connection.
    pub(crate) fn may_take(&self, len: usize, need: Need, env: &Env<'_>) -> bool {
        let waits = &self.waits;
        let is_urgent = need == Need::Capsule;
        let is_new = !waits.is_served && !self.is_stalled();
        if env.rota.is_for_another(self.index)
            || !waits.is_served && !is_urgent && !waits.list.is_empty()
        {
            return false;
        }
        let may = self.has_share(len, need, env);
        if !may && is_new {
            count(&env.shared.hits.buffers);
        }
        may
    }

    /// Whether `len` bytes more are within what the connection and its host may hold.
    ///
    /// A host may have as much as is left for all others: the more hosts want memory, the less each
    /// gets, and there always is some for one more. The first capsules of a connection are beyond
    /// all shares: see [`FETCH_LEAVES`].
    fn has_share(&self, len: usize, need: Need, env: &Env<'_>) -> bool {
        let limits = &env.shared.limits;
        let (held, available, capacity) =
            (self.waits.held, env.pool.available(), env.pool.capacity());
        match need {
            Need::Fetch if available < capacity && available < len + capacity / FETCH_LEAVES => {
                return false;
            }
            Need::Capsule
                if self.waits.capsules < CAPSULES_BEYOND
                    && available >= len + capacity / CAPSULE_LEAVES =>
            {
                return true;
            }
            _ => {}
        }
        if held > 0 && held + len > limits.buffer_bytes_per_connection {
            return false;
        }
        let Some(account) = &self.account else { return true };
        let of_host = account.held(env.core);
        of_host == 0
            || of_host + len <= limits.buffer_bytes_per_host.min(available)
            // One command of each queue, or a few small ones, as long as that is no danger to
            // others: so the host's admin queues go on whatever its I/O queues do.
            || (held == 0 || held + len <= FLOOR_BYTES) && available >= capacity / 4
    }

    /// Gives a read of `len` bytes at `offset` of a namespace its buffer, or memory that the volume
    /// lends; `false`: it has to wait.
    pub(crate) fn take_read_buffer(
        &mut self,
        slot: u16,
        (nsid, offset, len): (u32, u64, u32),
        env: &mut Env<'_>,
    ) -> bool {
        let len = len as usize;
        if self.waits.lap != env.lap {
            (self.waits.lap, self.waits.begun) = (env.lap, 0);
        }
        let Waits { unsent, begun, .. } = self.waits;
        if unsent > 0 && unsent + len > UNSENT_BYTES || begun > 0 && begun + len > BEGUN_BYTES {
            return false;
        }
        let entry = &mut self.slots[slot as usize];
        let mut io = entry.io.take().unwrap_or_else(|| env.ios.take());
        let (is_lent, got) = if self.may_borrow(nsid, offset, len, &mut io, env) {
            (true, true)
        } else if self.may_take(len, Need::Own, env) {
            (false, env.pool.alloc(len, &mut io.data).is_ok())
        } else {
            self.slots[slot as usize].io = Some(io);
            return false;
        };
        self.slots[slot as usize].io = Some(io);
        if got {
            self.waits.begun += len;
        }
        is_lent || self.taken(slot, len, got, env)
    }

    /// Has the volume lend the memory of a read, if it can and no command waits that would go first.
    fn may_borrow(
        &self,
        nsid: u32,
        offset: u64,
        len: usize,
        io: &mut Io,
        env: &mut Env<'_>,
    ) -> bool {
        let is_next = self.waits.is_served || self.waits.list.is_empty();
        let (Some(index), Some(view)) = (self.volume(nsid, 0), &self.view) else { return false };
        is_next && env.volumes.lend(&view.volumes[index], offset, len, &mut io.data)
    }

    /// Notes that a command got `len` bytes of the pool, or found it empty.
    pub(crate) fn taken(&mut self, slot: u16, len: usize, got: bool, env: &mut Env<'_>) -> bool {
        if !got {
            env.rota.found_empty(self.index, env.now);
            return false;
        }
        env.rota.found_memory(self.index);
        // Before Connect there is no host whose it could be.
        if let Some(account) = &self.account {
            account.hold(env.core, len);
            let entry = &mut self.slots[slot as usize];
            if entry.phase == Phase::Capsule && !entry.is_capsule {
                entry.is_capsule = true;
                self.waits.capsules += 1;
            }
            self.waits.held += len;
            entry.held += len as u32;
        }
        true
    }

    /// A command's memory has gone back to the pool.
    pub(crate) fn given_back(&mut self, slot: u16, env: &Env<'_>) {
        let entry = &mut self.slots[slot as usize];
        let held = std::mem::take(&mut entry.held) as usize;
        self.waits.unsent -= std::mem::take(&mut entry.unsent) as usize;
        self.waits.held -= held;
        self.waits.capsules -= usize::from(std::mem::take(&mut entry.is_capsule));
        if held > 0
            && let Some(account) = &self.account
        {
            account.unhold(env.core, held);
        }
    }

    /// What the connection's commands hold, and will, is held by `account` from now on.
    pub(crate) fn charge(&mut self, account: Arc<Account>, env: &Env<'_>) {
        account.hold(env.core, self.waits.held);
        if let Some(old) = self.account.replace(account) {
            old.unhold(env.core, self.waits.held);
        }
    }

    /// A command's data is with the stream.
    pub(crate) fn sending(&mut self, slot: u16, len: u32) {
        self.waits.unsent += len as usize;
        self.slots[slot as usize].unsent += len;
    }

    /// Carries out an admin command, unless its host sends too many: then it is held back, and
    /// refused when that took too long.
    pub(crate) fn admit_admin(&mut self, slot: u16, env: &mut Env<'_>) {
        let opcode = self.slots[slot as usize].sqe.opcode;
        // A host that is slowed down must still be able to say that it is alive.
        let is_free = [AdminOpcode::KEEP_ALIVE.0, AdminOpcode::ASYNC_EVENT_REQUEST.0];
        let Some(account) = self.account.as_ref().filter(|_| !is_free.contains(&opcode)) else {
            return self.admin(slot, env);
        };
        let hits = &env.shared.hits;
        match account.admin.take(env.shared.admin_rate, env.now, ADMIN_PATIENCE) {
            Some(Duration::ZERO) => self.admin(slot, env),
            Some(wait) => {
                count(&hits.admin_waits);
                self.keep(slot);
                self.waits.delayed.push_back((env.now + wait, slot));
            }
            None => {
                count(&hits.admin_commands);
                self.respond(slot, Status::COMMAND_INTERRUPTED, 0, env);
            }
        }
    }

    /// Admin commands whose time has come.
    pub(crate) fn poll_delayed(&mut self, env: &mut Env<'_>) -> bool {
        let mut worked = false;
        while let Some((at, slot)) = self.waits.delayed.front().copied() {
            if env.now < at {
                env.rota.wake_at(at);
                break;
            }
            self.waits.delayed.pop_front();
            self.admin(slot, env);
            worked = true;
        }
        worked
    }

    /// The connection goes.
    pub(crate) fn leave_rota(&mut self, env: &mut Env<'_>) {
        env.rota.remove(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_secs(1);

    fn line(conns: &[u32]) -> Rota {
        Rota { conns: conns.iter().copied().collect(), ..Rota::default() }
    }

    /// One turn in which nobody's wait ends.
    fn order(line: &mut Rota, now: Duration) -> Vec<u32> {
        let count = line.begin(now);
        let order: Vec<u32> = (0..count).filter_map(|_| line.next()).collect();
        line.conns.extend(&order);
        line.end();
        order
    }

    #[test]
    fn connections_take_turns_at_being_first() {
        let mut line = line(&[1, 2, 3]);
        assert_eq!(order(&mut line, T), [1, 2, 3]);
        assert_eq!(order(&mut line, T), [2, 3, 1]);
        assert_eq!(order(&mut line, T), [3, 1, 2]);
        assert_eq!(order(&mut line, T), [1, 2, 3]);
    }

    #[test]
    fn who_finds_the_pool_empty_is_first_but_not_for_ever() {
        let mut line = line(&[1, 2, 3]);
        line.found_empty(2, T);
        line.found_empty(3, T);
        assert!(line.is_for_another(1) && line.is_for_another(3) && !line.is_for_another(2));
        order(&mut line, T);
        assert_eq!(line.due(), Some(T + PRECEDENCE), "the core looks again then");
        assert_eq!(order(&mut line, T), [2, 3, 1]);
        assert_eq!(order(&mut line, T + PRECEDENCE), [2, 3, 1]);
        assert!(!line.is_for_another(1), "its time is over");
        assert_eq!(order(&mut line, T + PRECEDENCE), [3, 1, 2], "and others come before it");
        line.found_empty(1, T);
        line.found_memory(2);
        assert!(line.is_for_another(2));
        line.found_memory(1);
        assert!(!line.is_for_another(2));
    }

    #[test]
    fn who_goes_leaves_nothing_behind() {
        let mut line = line(&[1, 2]);
        line.found_empty(1, T);
        line.remove(1);
        assert!(!line.is_for_another(2));
        assert_eq!(order(&mut line, T), [2]);
    }
}
