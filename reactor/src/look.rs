//! Which receive a core makes itself, by a call in each turn, in place of the ring.
//!
//! A receive of the ring costs more than a call that finds its bytes: work is queued for the core when
//! they arrive, the core sees its flag, enters the kernel, and the kernel asks the socket a second time
//! whether there is more. A call that finds nothing costs less than all that, so for one busy connection
//! a core that is awake asks for itself; for several it would ask in vain too often, and large payloads
//! are for the ring's large buffers. Before it sleeps, the ring takes the receive over.

use crate::ops::OpId;

/// Receives in a row of one operation after which the core makes them itself.
const STREAK: u32 = 64;
/// The most that is asked for after it did not pay.
const STREAK_MAX: u32 = STREAK << 8;

/// Follows what is received.
#[derive(Debug)]
pub(crate) struct Look {
    least: u32,
    needed: u32,
    last: Option<OpId>,
    /// Receives in a row of `last`.
    streak: u32,
    /// The operation that the core has taken over, or is about to.
    op: Option<OpId>,
}

impl Look {
    /// `least`: see [`STREAK`].
    pub(crate) fn new(least: u32) -> Look {
        Look { least, needed: least, last: None, streak: 0, op: None }
    }

    pub(crate) fn real() -> Look {
        Look::new(STREAK)
    }

    /// The operation that the core has, or wants to have.
    #[inline]
    pub(crate) fn op(&self) -> Option<OpId> {
        self.op
    }

    /// `op` received something, which was `large` or not. `true`: from now on the core makes its
    /// receives.
    #[inline]
    pub(crate) fn on_received(&mut self, op: OpId, large: bool) -> bool {
        if large || self.last != Some(op) {
            self.last = Some(op);
            self.streak = 0;
            return false;
        }
        self.streak = self.streak.saturating_add(1);
        if self.streak < self.needed || self.op.is_some() {
            return false;
        }
        self.op = Some(op);
        self.streak = 0;
        true
    }

    /// The ring takes the receive over, since the core `sleeps`, or since it did not pay.
    pub(crate) fn give_up(&mut self, sleeps: bool) -> Option<OpId> {
        let op = self.op.take()?;
        if self.streak >= 4 * self.needed {
            self.needed = self.least;
        } else if !sleeps {
            self.needed = (2 * self.needed).min(STREAK_MAX.max(self.least));
        }
        self.streak = 0;
        Some(op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(index: u64) -> OpId {
        OpId::from_user_data(1 << 32 | index)
    }

    fn streak(look: &mut Look, op: OpId) -> u32 {
        let all = (1..).find(|_| look.on_received(op, false));
        all.expect("a streak ends")
    }

    #[test]
    fn one_busy_receive_is_taken_over() {
        let mut look = Look::real();
        assert_eq!(streak(&mut look, op(1)), STREAK + 1);
        assert_eq!(look.op(), Some(op(1)));
        assert!((0..1000).all(|_| !look.on_received(op(1), false)), "once");
        assert_eq!(look.give_up(true), Some(op(1)));
        assert_eq!((look.op(), look.give_up(true)), (None, None));
    }

    #[test]
    fn several_busy_ones_and_large_payloads_are_the_rings() {
        let mut look = Look::real();
        for round in 0..10_000 {
            assert!(!look.on_received(op(round % 2), false));
        }
        for round in 0..10_000 {
            assert!(!look.on_received(op(1), round % 50 == 0));
        }
    }

    #[test]
    fn what_did_not_pay_is_tried_later_and_later() {
        let mut look = Look::real();
        let mut last = 0;
        for _ in 0..20 {
            let needed = streak(&mut look, op(1));
            assert!(needed >= last);
            last = needed;
            look.give_up(false);
        }
        assert!(last >= STREAK_MAX);
        // A core that goes to sleep says nothing of whether it paid.
        look.on_received(op(2), false);
        streak(&mut look, op(1));
        look.give_up(true);
        assert_eq!(streak(&mut look, op(1)), STREAK_MAX);
        assert!((0..4 * STREAK_MAX).all(|_| !look.on_received(op(1), false)));
        look.give_up(false);
        assert_eq!(streak(&mut look, op(1)), STREAK, "it has paid");
    }
}
