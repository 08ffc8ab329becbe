//! Who was refused for want of the right key, and why: for the log and for the operator's status.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::limits::{Bucket, Rate};
use crate::state::RefusalStatus;

/// Refusals that are remembered; the oldest go.
const KEPT_MAX: usize = 64;
/// Lines that strangers may write to the log in a second, and at once.
const LINES_PER_SECOND: u32 = 5;
const LINES_BURST: u32 = 50;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Refusals {
    state: Mutex<State>,
    rate: Rate,
    lines: Bucket,
}

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<RefusalStatus>,
    total: u64,
}

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals {
            state: Mutex::default(),
            rate: Rate::new(LINES_PER_SECOND, LINES_BURST),
            lines: Bucket::default(),
        }
    }
}

impl Refusals {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer was refused. `why` is one line without key material.
    pub(crate) fn note(&self, peer: &str, port: u16, why: String, now: Duration) {
        if self.lines.take(self.rate, now, Duration::ZERO).is_some() {
            tracing::warn!(peer, port, "refused: {why}");
        }
        let refusal = RefusalStatus { at: SystemTime::now(), peer: peer.to_owned(), port, why };
        let mut state = self.state();
        state.total += 1;
        if state.kept.len() == KEPT_MAX {
            state.kept.pop_front();
        }
        state.kept.push_back(refusal);
    }

    /// The last ones, the newest last, and how many there were.
    pub(crate) fn snapshot(&self) -> (Vec<RefusalStatus>, u64) {
        let state = self.state();
        (state.kept.iter().cloned().collect(), state.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_kept() {
        let refusals = Refusals::default();
        for n in 0..KEPT_MAX + 3 {
            refusals.note("192.0.2.1:1", 1, format!("reason {n}"), Duration::ZERO);
        }
        let (kept, total) = refusals.snapshot();
        assert_eq!((kept.len(), total), (KEPT_MAX, KEPT_MAX as u64 + 3));
        assert_eq!(kept[0].why, "reason 3");
        assert_eq!(kept[KEPT_MAX - 1].why, format!("reason {}", KEPT_MAX + 2));
    }
}
