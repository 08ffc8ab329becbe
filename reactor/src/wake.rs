//! Who wakes a core: one atomic word between it and those who bring it work.
//!
//! The atomics come from the parent module, so that `tests/wake.rs` can put this file on loom's.

use super::atomic::{AtomicU32, Ordering};

/// The core is awake and has not been notified since its turn began.
const RUNNING: u32 = 0;
/// Somebody left work since the turn began: the core must not sleep before it has looked.
const NOTIFIED: u32 = 1;
/// The core sleeps in the kernel, or is about to: a notifier must signal the event descriptor.
const SLEEPING: u32 = 2;

/// The flag that decides who wakes the core.
///
/// One atomic word carries both directions, so no pair of fences is needed: a notifier first
/// publishes its work, then swaps in `NOTIFIED` (release); the core swaps it out (acquire) before
/// it looks for work, and falls asleep only by exchanging `RUNNING` for `SLEEPING`, which fails if
/// a notifier came in between.
#[derive(Debug, Default)]
pub(crate) struct WakeFlag(AtomicU32);

impl WakeFlag {
    /// Leaves a notice. `true`: the core sleeps and the caller must signal it.
    pub(crate) fn notify(&self) -> bool {
        self.0.swap(NOTIFIED, Ordering::AcqRel) == SLEEPING
    }

    /// Start of a turn: takes the notice.
    pub(crate) fn take(&self) -> bool {
        // The load keeps the cache line shared while nobody writes.
        self.0.load(Ordering::Relaxed) != RUNNING
            && self.0.swap(RUNNING, Ordering::AcqRel) == NOTIFIED
    }

    /// Whether a notice waits.
    pub(crate) fn is_notified(&self) -> bool {
        self.0.load(Ordering::Acquire) == NOTIFIED
    }

    /// About to sleep. `false`: a notice is there, look again first.
    pub(crate) fn try_sleep(&self) -> bool {
        self.0.compare_exchange(RUNNING, SLEEPING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Back from sleep; a notice that arrived meanwhile stays for [`WakeFlag::take`].
    pub(crate) fn woke(&self) {
        // Failure means NOTIFIED: that is what `take` wants to find.
        let _ = self.0.compare_exchange(SLEEPING, RUNNING, Ordering::AcqRel, Ordering::Relaxed);
    }
}
