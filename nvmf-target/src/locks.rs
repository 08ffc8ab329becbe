//! Who may change which bytes of a volume now: what makes a compare-and-write one step.
//!
//! ```text
//!   pair (fused Compare and Write): enter ─► may_go ─► fence, read, compare, write ─► leave
//!   any other change:     blocks? ─► no: submit        (one atomic load)
//!                                └─► yes: enter ─► may_go ─► submit ─► leave
//!   change at the volume when its connection ends:  enter as a pair ─► it is back ─► leave
//! ```
//!
//! Entries of one volume stand in one line. A pair goes when nothing before it overlaps; a change
//! goes when no pair before it overlaps. Both so wait for older entries only, which wait for older
//! ones still: there is no circle, and nobody is overtaken for ever. A command has one entry at a
//! time and asks for all the memory it needs before it enters, so that what stands in line never
//! waits for anything that stands behind it. A change whose connection ended waits for nothing: it
//! is at the volume.
//!
//! Changes that were submitted before the pair entered are no business of this table: the pair
//! waits for a fence of its range. Ordering: an entry is published (`SeqCst`, under the lock) before
//! the fence is asked for, and a core answers the fence after it has seen the request; what it
//! submits from then on has seen the entry.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Stands for an entry; must come back through [`RangeLocks::leave`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

#[derive(Debug)]
struct Entry {
    ticket: u64,
    start: u64,
    end: u64,
    is_pair: bool,
}

impl Entry {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }
}

/// See the module's documentation. One per volume, shared by all cores.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    /// Pairs in `line`: what a change looks at before it looks at anything else.
    pairs: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// Oldest first.
    entries: VecDeque<Entry>,
    next: u64,
}

impl RangeLocks {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a change of `len` bytes at `offset` has to enter the line.
    #[inline]
    pub(crate) fn blocks(&self, offset: u64, len: u64) -> bool {
        self.pairs.load(Ordering::SeqCst) != 0 && self.is_in_line(offset, len)
    }

    #[cold]
    fn is_in_line(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        self.line().entries.iter().any(|e| e.is_pair && e.overlaps(offset, end))
    }

    /// Takes a place at the end of the line.
    pub(crate) fn enter(&self, offset: u64, len: u64, is_pair: bool) -> Ticket {
        let mut line = self.line();
        let ticket = line.next;
        line.next += 1;
        let end = offset.saturating_add(len);
        line.entries.push_back(Entry { ticket, start: offset, end, is_pair });
        if is_pair {
            self.pairs.fetch_add(1, Ordering::SeqCst);
        }
        Ticket(ticket)
    }

    /// Whether it is this entry's turn; once it is, it stays so until the entry leaves.
    pub(crate) fn may_go(&self, ticket: Ticket) -> bool {
        let line = self.line();
        let Some(at) = line.entries.iter().position(|e| e.ticket == ticket.0) else {
            debug_assert!(false, "an entry that has left asks for its turn");
            return false;
        };
        let entry = &line.entries[at];
        let mut before = line.entries.range(..at);
        !before.any(|e| (e.is_pair || entry.is_pair) && e.overlaps(entry.start, entry.end))
    }

    /// Gives the place up; `true` if somebody stands in line who may be able to go now.
    pub(crate) fn leave(&self, ticket: Ticket) -> bool {
        let mut line = self.line();
        let at = line.entries.iter().position(|e| e.ticket == ticket.0);
        let Some(entry) = at.and_then(|at| line.entries.remove(at)) else {
            debug_assert!(false, "an entry leaves once");
            return false;
        };
        if entry.is_pair {
            self.pairs.fetch_sub(1, Ordering::SeqCst);
        }
        !line.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_pass_where_no_pair_is() {
        let locks = RangeLocks::default();
        assert!(!locks.blocks(0, u64::MAX));
        let pair = locks.enter(4096, 512, true);
        assert!(locks.may_go(pair));
        assert!(!locks.blocks(0, 4096) && !locks.blocks(4608, 512), "neighbours feel nothing");
        assert!(locks.blocks(4000, 200) && locks.blocks(4607, 1) && locks.blocks(0, u64::MAX));
        assert!(!locks.leave(pair));
        assert!(!locks.blocks(4096, 512));
    }

    #[test]
    fn first_come_first_served_where_ranges_meet() {
        let locks = RangeLocks::default();
        let a = locks.enter(0, 512, true);
        let write = locks.enter(0, 4096, false);
        let b = locks.enter(512, 512, true);
        let elsewhere = locks.enter(1 << 20, 512, true);
        assert!(locks.may_go(a) && locks.may_go(elsewhere));
        assert!(!locks.may_go(write), "behind the first pair");
        assert!(!locks.may_go(b), "not before the older write, although no pair is in its way");
        assert!(locks.leave(a));
        assert!(locks.may_go(write) && !locks.may_go(b));
        assert!(locks.leave(write));
        assert!(locks.may_go(b));
        locks.leave(b);
        assert!(!locks.leave(elsewhere), "nobody is left to be woken");
    }

    #[test]
    fn changes_do_not_wait_for_each_other() {
        let locks = RangeLocks::default();
        let pair = locks.enter(0, 512, true);
        let (a, b) = (locks.enter(0, 512, false), locks.enter(0, 512, false));
        locks.leave(pair);
        assert!(locks.may_go(a) && locks.may_go(b));
    }

    #[test]
    fn one_who_gives_up_in_the_middle_of_the_line_holds_up_nobody() {
        let locks = RangeLocks::default();
        let (a, b) = (locks.enter(0, 512, true), locks.enter(0, 512, true));
        let c = locks.enter(0, 512, false);
        assert!(locks.leave(b));
        assert!(!locks.may_go(c));
        assert!(locks.leave(a));
        assert!(locks.may_go(c));
    }

    /// Random arrivals and departures: what goes never overlaps another that goes unless both are
    /// plain changes, and as long as anybody waits somebody can go.
    #[test]
    fn no_order_of_events_lets_two_in_or_sticks() {
        let mut seed = 0x1234_5678_9abc_def1_u64;
        let mut below = |bound: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % bound
        };
        let locks = RangeLocks::default();
        let mut present: Vec<(Ticket, u64, u64, bool)> = Vec::new();
        for _ in 0..20_000 {
            if present.len() < 12 && below(2) == 0 {
                let (start, len, is_pair) = (below(16), 1 + below(4), below(2) == 0);
                present.push((locks.enter(start, len, is_pair), start, len, is_pair));
            }
            let going: Vec<_> =
                present.iter().enumerate().filter(|(_, e)| locks.may_go(e.0)).collect();
            assert!(present.is_empty() || !going.is_empty(), "somebody can always go");
            for (i, (_, a)) in going.iter().enumerate() {
                for (_, b) in &going[..i] {
                    let apart = a.1 + a.2 <= b.1 || b.1 + b.2 <= a.1;
                    assert!(apart || (!a.3 && !b.3), "{a:?} and {b:?} at a time");
                }
            }
            if !going.is_empty() && below(3) > 0 {
                let at = going[below(going.len() as u64) as usize].0;
                locks.leave(present.swap_remove(at).0);
            }
        }
    }
}
