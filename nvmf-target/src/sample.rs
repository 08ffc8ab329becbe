//! Where the time of a request goes, found by following one request in many.
//!
//! ```text
//!   socket ─► Receive, Decrypt ─► Parse ─► Data ─► Queue ─► Backend ─► Respond ─► Encrypt, Send
//! ```
//!
//! A core follows one request at a time, and begins with another when so many have come since the
//! last. Off, each seam is one comparison with a number that no request has; on, a followed request
//! costs about ten readings of the clock. What a request waits for others in the same batch counts
//! for the stage it waits in, so that the stages add up to the time from taking its bytes off the
//! socket to handing its answer to the socket.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// A part of a request's way through the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From looking at the connection to its bytes in hand, without [`Stage::Decrypt`].
    Receive,
    /// Opening TLS records.
    Decrypt,
    /// From there to the command: commands before it in the same bytes, its own decoding.
    Parse,
    /// Waiting for the rest of its data from the host, and copying it.
    Data,
    /// To the volume: memory, its turn, room in the channel.
    Queue,
    /// At the volume.
    Backend,
    /// Building the answer.
    Respond,
    /// Sealing TLS records while the answer waits to be sent.
    Encrypt,
    /// From the answer to the end of its send call, without [`Stage::Encrypt`].
    Send,
}

impl Stage {
    /// All of them, in the order in which a request goes through them.
    pub const ALL: [Stage; 9] = [
        Stage::Receive,
        Stage::Decrypt,
        Stage::Parse,
        Stage::Data,
        Stage::Queue,
        Stage::Backend,
        Stage::Respond,
        Stage::Encrypt,
        Stage::Send,
    ];

    /// Its name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Receive => "receive",
            Stage::Decrypt => "decrypt",
            Stage::Parse => "parse",
            Stage::Data => "data",
            Stage::Queue => "queue",
            Stage::Backend => "backend",
            Stage::Respond => "respond",
            Stage::Encrypt => "encrypt",
            Stage::Send => "send",
        }
    }
}

const STAGES: usize = Stage::ALL.len();

/// What the followed requests of one direction took so far, over all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Requests followed to their end.
    pub requests: u64,
    /// Nanoseconds in each stage, in the order of [`Stage::ALL`].
    pub ns: [u64; STAGES],
}

/// Reads and other requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakdown {
    /// One request in so many is followed; 0: none.
    pub every: u32,
    /// Read commands.
    pub reads: Taken,
    /// All others.
    pub writes: Taken,
}

/// Sums of one core. Only that core adds, so a plain load and store will do.
#[derive(Debug, Default)]
struct Sums {
    requests: AtomicU64,
    ns: [AtomicU64; STAGES],
}

impl Sums {
    fn add(&self, ns: &[u64; STAGES]) {
        let bump = |sum: &AtomicU64, by| {
            sum.store(sum.load(Ordering::Relaxed) + by, Ordering::Relaxed);
        };
        bump(&self.requests, 1);
        self.ns.iter().zip(ns).for_each(|(sum, ns)| bump(sum, *ns));
    }

    fn add_to(&self, taken: &mut Taken) {
        taken.requests += self.requests.load(Ordering::Relaxed);
        for (sum, ns) in taken.ns.iter_mut().zip(&self.ns) {
            *sum += ns.load(Ordering::Relaxed);
        }
    }
}

/// What all cores share of it. Relaxed throughout: nothing is published by these numbers, and a
/// reader that sees a request's sums in part is off by one request in its mean.
#[derive(Debug)]
pub(crate) struct Sampling {
    every: AtomicU32,
    cores: Box<[[Sums; 2]]>,
}

impl Sampling {
    pub(crate) fn new(cores: usize) -> Sampling {
        Sampling {
            every: AtomicU32::new(0),
            cores: (0..cores).map(|_| Default::default()).collect(),
        }
    }

    /// Follows one request in `every` from now on; 0: none.
    pub(crate) fn set(&self, every: u32) {
        self.every.store(every, Ordering::Relaxed);
    }

    pub(crate) fn breakdown(&self) -> Breakdown {
        let every = self.every.load(Ordering::Relaxed);
        let mut sum = Breakdown { every, ..Breakdown::default() };
        for [reads, writes] in &self.cores {
            reads.add_to(&mut sum.reads);
            writes.add_to(&mut sum.writes);
        }
        sum
    }
}

/// What the record layers of a core took, while somebody wants to know.
#[derive(Debug, Default)]
pub(crate) struct CipherTime {
    is_wanted: Cell<bool>,
    opened_ns: Cell<u64>,
    sealed_ns: Cell<u64>,
}

impl CipherTime {
    fn measure<T>(&self, sum: &Cell<u64>, work: impl FnOnce() -> T) -> T {
        if !self.is_wanted.get() {
            return work();
        }
        let start = Instant::now();
        let result = work();
        sum.set(sum.get() + nanos(start, Instant::now()));
        result
    }

    /// Runs what opens records.
    pub(crate) fn opening<T>(&self, work: impl FnOnce() -> T) -> T {
        self.measure(&self.opened_ns, work)
    }

    /// Runs what seals records.
    pub(crate) fn sealing<T>(&self, work: impl FnOnce() -> T) -> T {
        self.measure(&self.sealed_ns, work)
    }
}

fn nanos(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

/// No request has this number: connections are counted in 32 bits, slots in 16.
const NOBODY: u64 = u64::MAX;

/// Added to the number of a request whose answer waits to be sent: its slot may be another's already.
const ANSWERED: u64 = 1 << 48;

/// So many commands before the one that is followed arrivals are timed: as many as come at once,
/// mostly. Fewer, and always the first of a batch would be followed; more, and all are timed.
const LOOK_AHEAD: u32 = 64;

/// Names a request among those of its core.
pub(crate) fn tag(conn: u32, slot: u16) -> u64 {
    u64::from(conn) << 16 | u64::from(slot)
}

/// How far the connection is that a core receives from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// Nobody wants to know.
    Unseen,
    /// It was looked at.
    Looked,
    /// Its bytes are there.
    InHand,
}

/// One core's follower.
pub(crate) struct Sampler {
    every: u32,
    /// Requests to come before the next one is followed.
    left: u32,
    followed: u64,
    is_read: bool,
    since: Instant,
    ns: [u64; STAGES],
    cipher: Rc<CipherTime>,
    /// Of the connection that is being received from: when it was looked at, when its bytes were
    /// there, and what opening them took.
    arrival: Arrival,
    looked: Instant,
    in_hand: Instant,
    opened_before: u64,
    opened_ns: u64,
    sealed_before: u64,
}

impl Sampler {
    pub(crate) fn new() -> Sampler {
        let now = Instant::now();
        Sampler {
            every: 0,
            left: 0,
            followed: NOBODY,
            is_read: false,
            since: now,
            ns: [0; STAGES],
            cipher: Rc::default(),
            arrival: Arrival::Unseen,
            looked: now,
            in_hand: now,
            opened_before: 0,
            opened_ns: 0,
            sealed_before: 0,
        }
    }

    /// For the core's record layers.
    pub(crate) fn cipher(&self) -> &Rc<CipherTime> {
        &self.cipher
    }

    /// Takes up what was asked for, once per turn.
    #[inline]
    pub(crate) fn follow_setting(&mut self, sampling: &Sampling) {
        let every = sampling.every.load(Ordering::Relaxed);
        if every != self.every {
            (self.every, self.left, self.followed) = (every, every, NOBODY);
            self.cipher.is_wanted.set(every != 0);
        }
    }

    /// A connection is asked for received bytes.
    #[inline]
    pub(crate) fn look(&mut self) {
        self.arrival = Arrival::Unseen;
        if self.every != 0 && self.followed == NOBODY && self.left <= LOOK_AHEAD {
            self.arrival = Arrival::Looked;
            self.looked = Instant::now();
            self.opened_before = self.cipher.opened_ns.get();
        }
    }

    /// It has given some.
    #[inline]
    pub(crate) fn got(&mut self) {
        if self.arrival == Arrival::Looked {
            self.arrival = Arrival::InHand;
            self.in_hand = Instant::now();
            self.opened_ns = self.cipher.opened_ns.get() - self.opened_before;
        }
    }

    /// An I/O command has come.
    #[inline]
    pub(crate) fn command(&mut self, tag: u64, is_read: bool) {
        if self.every == 0 {
            return;
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 && self.followed == NOBODY && self.arrival == Arrival::InHand {
            self.begin(tag, is_read);
        }
    }

    #[cold]
    fn begin(&mut self, tag: u64, is_read: bool) {
        (self.left, self.followed, self.is_read) = (self.every, tag, is_read);
        self.ns = [0; STAGES];
        self.ns[Stage::Decrypt as usize] = self.opened_ns;
        let in_all = nanos(self.looked, self.in_hand);
        self.ns[Stage::Receive as usize] = in_all.saturating_sub(self.opened_ns);
        self.since = self.in_hand;
        self.mark_now(Stage::Parse);
    }

    /// Whether it is this request that is followed, and it has no answer yet.
    #[inline]
    pub(crate) fn is(&self, tag: u64) -> bool {
        self.followed == tag
    }

    /// Whether it is the answer of this request that waits to be sent.
    #[inline]
    pub(crate) fn is_answered(&self, tag: u64) -> bool {
        self.followed == tag | ANSWERED
    }

    /// If it is followed, the time since its last mark was spent in `stage`.
    #[inline]
    pub(crate) fn mark(&mut self, tag: u64, stage: Stage) {
        if self.is(tag) {
            self.mark_now(stage);
        }
    }

    #[cold]
    fn mark_now(&mut self, stage: Stage) {
        let now = Instant::now();
        self.ns[stage as usize] += nanos(self.since, now);
        self.since = now;
        if stage == Stage::Respond {
            self.sealed_before = self.cipher.sealed_ns.get();
            self.followed |= ANSWERED;
        }
    }

    /// The answer of the followed request of connection `conn`, which [waits](Sampler::is_answered)
    /// to be sent, is with the socket.
    #[cold]
    pub(crate) fn sent(&mut self, conn: u32, sampling: &Sampling, core: usize) {
        if self.followed >> 16 != u64::from(conn) | ANSWERED >> 16 {
            return;
        }
        self.mark_now(Stage::Send);
        let sealed = self.cipher.sealed_ns.get() - self.sealed_before;
        let send = &mut self.ns[Stage::Send as usize];
        // What was sealed for others in the meantime is part of the wait.
        let sealed = sealed.min(*send);
        *send -= sealed;
        self.ns[Stage::Encrypt as usize] = sealed;
        self.followed = NOBODY;
        let sums = &sampling.cores[core][usize::from(!self.is_read)];
        sums.add(&self.ns);
    }

    /// Requests of this connection are not followed any more: it has ended.
    pub(crate) fn forget(&mut self, conn: u32) {
        if self.followed != NOBODY && (self.followed >> 16) as u32 == conn {
            self.followed = NOBODY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sampler: &mut Sampler, sampling: &Sampling, tag: u64, is_read: bool) {
        sampler.look();
        sampler.cipher.opening(|| ());
        sampler.got();
        sampler.command(tag, is_read);
        for stage in [Stage::Queue, Stage::Backend, Stage::Respond] {
            sampler.mark(tag, stage);
        }
        sampler.cipher.sealing(|| ());
        if sampler.is_answered(tag) {
            sampler.sent((tag >> 16) as u32, sampling, 0);
        }
    }

    #[test]
    fn off_nothing_is_followed_and_on_one_in_so_many_is() {
        let sampling = Sampling::new(1);
        let mut sampler = Sampler::new();
        sampler.follow_setting(&sampling);
        (0..10).for_each(|slot| run(&mut sampler, &sampling, tag(3, slot), true));
        assert_eq!(sampling.breakdown(), Breakdown::default());

        sampling.set(4);
        sampler.follow_setting(&sampling);
        (0..12).for_each(|slot| run(&mut sampler, &sampling, tag(3, slot), slot < 8));
        let found = sampling.breakdown();
        assert_eq!((found.every, found.reads.requests, found.writes.requests), (4, 2, 1));
        assert!(found.reads.ns.iter().sum::<u64>() > 0);
        // Stages that were not gone through took nothing.
        assert_eq!(found.reads.ns[Stage::Data as usize], 0);

        sampling.set(0);
        sampler.follow_setting(&sampling);
        (0..12).for_each(|slot| run(&mut sampler, &sampling, tag(3, slot), true));
        assert_eq!(sampling.breakdown().reads.requests, 2);
    }

    #[test]
    fn one_request_is_followed_at_a_time_and_a_lost_one_is_given_up() {
        let sampling = Sampling::new(1);
        let mut sampler = Sampler::new();
        sampling.set(1);
        sampler.follow_setting(&sampling);
        sampler.look();
        sampler.got();
        sampler.command(tag(1, 0), true);
        sampler.command(tag(2, 0), true);
        assert!(sampler.is(tag(1, 0)) && !sampler.is(tag(2, 0)));
        // Neither another connection's answer is its answer, nor one of before it has any.
        sampler.sent(2, &sampling, 0);
        sampler.sent(1, &sampling, 0);
        assert_eq!(sampling.breakdown().reads.requests, 0);
        // Answered, its slot is another's, which is not followed.
        sampler.mark(tag(1, 0), Stage::Respond);
        assert!(!sampler.is(tag(1, 0)) && sampler.is_answered(tag(1, 0)));
        let before = sampler.ns;
        sampler.mark(tag(1, 0), Stage::Backend);
        assert_eq!(sampler.ns, before);
        sampler.forget(2);
        assert!(sampler.is_answered(tag(1, 0)));
        sampler.forget(1);
        assert!(!sampler.is_answered(tag(1, 0)));
        // What is not known to have come just now is not followed.
        sampler.look();
        sampler.command(tag(2, 1), false);
        assert!(!sampler.is(tag(2, 1)));
        sampler.got();
        sampler.command(tag(2, 1), false);
        assert!(sampler.is(tag(2, 1)));
    }

    #[test]
    fn stages_are_in_the_order_of_their_numbers() {
        for (at, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as usize, at, "{}", stage.name());
        }
    }
}
