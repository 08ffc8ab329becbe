//! What other queues and other hosts' commands have to tell a controller.
//!
//! The controller lives with its admin queue, on that queue's core; what happens to it elsewhere
//! is posted here. One relaxed load tells that there is nothing, which is nearly always.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nvme::ctrl::{ERROR_LOG_MAX, ErrorRecord};
use nvme::subsys::reservation::NoticeKind;

/// Failed commands kept for a controller that does not look. The log keeps the newest
/// [`ERROR_LOG_MAX`]; that many more are kept so that its count stays right in a burst.
const ERRORS_MAX: usize = 16 * ERROR_LOG_MAX;

/// Reservation notices kept for a controller that does not look; its own log has 255.
const NOTICES_MAX: usize = 255;

/// Letters to one controller.
#[derive(Debug, Default)]
pub(crate) struct Letters {
    /// Something is in the box. Set after a letter is in, cleared before the box is emptied, both
    /// under the lock: a letter is never left behind.
    any: AtomicBool,
    errors: Mutex<VecDeque<ErrorRecord>>,
    /// Of hosts' reservation commands.
    has_notices: AtomicBool,
    notices: Mutex<VecDeque<(u32, NoticeKind)>>,
}

impl Letters {
    fn errors(&self) -> MutexGuard<'_, VecDeque<ErrorRecord>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A command failed for the medium's or the target's own sake.
    #[cold]
    pub(crate) fn post_error(&self, record: ErrorRecord) {
        let mut errors = self.errors();
        if errors.len() == ERRORS_MAX {
            errors.pop_front();
        }
        errors.push_back(record);
        self.any.store(true, Ordering::Relaxed);
    }

    /// Another host's reservation command concerns this controller's host.
    pub(crate) fn post_notice(&self, nsid: u32, kind: NoticeKind) {
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() == NOTICES_MAX {
            notices.pop_front();
        }
        notices.push_back((nsid, kind));
        self.has_notices.store(true, Ordering::Relaxed);
    }

    /// The next notice, if there is one.
    pub(crate) fn take_notice(&self) -> Option<(u32, NoticeKind)> {
        if !self.has_notices.load(Ordering::Relaxed) {
            return None;
        }
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        let notice = notices.pop_front();
        self.has_notices.store(!notices.is_empty(), Ordering::Relaxed);
        notice
    }

    /// Takes what has come, if anything has.
    pub(crate) fn take_errors(&self, mut each: impl FnMut(&ErrorRecord)) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let mut errors = self.errors();
        self.any.store(false, Ordering::Relaxed);
        errors.drain(..).for_each(|record| each(&record));
    }
}

#[cfg(test)]
mod tests {
    use nvme::spec::Status;

    use super::*;

    #[test]
    fn letters_come_in_order_and_the_oldest_give_way() {
        let letters = Letters::default();
        let record = |cid| ErrorRecord {
            sqid: 1,
            cid,
            status: Status::WRITE_FAULT.dnr(),
            opcode: 1,
            nsid: 1,
            lba: 7,
        };
        let taken = |letters: &Letters| {
            let mut cids = Vec::new();
            letters.take_errors(|r| cids.push(r.cid));
            cids
        };
        assert_eq!(taken(&letters), []);
        letters.post_error(record(3));
        letters.post_error(record(2));
        assert_eq!(taken(&letters), [3, 2]);
        assert_eq!(taken(&letters), []);
        for cid in 0..=ERRORS_MAX as u16 {
            letters.post_error(record(cid));
        }
        let left = taken(&letters);
        assert_eq!((left.len(), left.first(), left.last()), (ERRORS_MAX, Some(&1), Some(&1024)));
    }
}
