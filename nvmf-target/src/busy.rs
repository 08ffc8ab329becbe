//! Time during which a subsystem had I/O outstanding, of whatever queue on whatever core.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Adds up the time in which at least one queue is busy.
///
/// A queue tells when it becomes busy and when it is idle again, once per turn of its core at the
/// most and never while it stays what it is: under load nothing is written here at all.
#[derive(Debug, Default)]
pub(crate) struct BusyClock {
    /// Busy queues (low 16 bits), and when the first of them became busy (microseconds above).
    state: AtomicU64,
    /// Microseconds of the times that have ended.
    ended_us: AtomicU64,
}

const QUEUES: u64 = 0xffff;

fn micros(now: Duration) -> u64 {
    // 48 bits: nine years of microseconds.
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX) & (u64::MAX >> 16)
}

impl BusyClock {
    /// A queue has a command outstanding now and had none before.
    pub(crate) fn begin(&self, now: Duration) {
        // Relaxed throughout: the word is whole in itself, and the sum is only ever read as a sum.
        let next = |state: u64| {
            let since = if state & QUEUES == 0 { micros(now) } else { state >> 16 };
            Some(since << 16 | ((state & QUEUES) + 1).min(QUEUES))
        };
        let _ = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    /// A queue that had one has none any more.
    pub(crate) fn end(&self, now: Duration) {
        let next = |state: u64| Some(state - u64::from(state & QUEUES != 0));
        let before = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        let (Ok(state) | Err(state)) = before;
        if state & QUEUES == 1 {
            let spent = micros(now).saturating_sub(state >> 16);
            self.ended_us.fetch_add(spent, Ordering::Relaxed);
        }
    }

    /// All of it until `now`.
    pub(crate) fn total(&self, now: Duration) -> Duration {
        let state = self.state.load(Ordering::Relaxed);
        let running = if state & QUEUES == 0 { 0 } else { micros(now).saturating_sub(state >> 16) };
        Duration::from_micros(self.ended_us.load(Ordering::Relaxed).saturating_add(running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn time_of_several_queues_counts_once() {
        let clock = BusyClock::default();
        assert_eq!(clock.total(at(100)), at(0));
        clock.begin(at(100));
        assert_eq!(clock.total(at(103)), at(3), "still running");
        clock.begin(at(105));
        clock.end(at(110));
        assert_eq!(clock.total(at(112)), at(12), "the other queue is still busy");
        clock.end(at(120));
        assert_eq!(clock.total(at(500)), at(20));
        clock.begin(at(600));
        clock.end(at(601));
        assert_eq!(clock.total(at(900)), at(21));
    }

    #[test]
    fn time_that_runs_backwards_between_cores_adds_nothing() {
        let clock = BusyClock::default();
        clock.begin(at(10));
        clock.end(at(9));
        assert_eq!(clock.total(at(9)), at(0));
    }
}
