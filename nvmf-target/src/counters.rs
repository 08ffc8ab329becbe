//! What a core counts of its I/O, readable from outside without disturbing it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counters of one subsystem on one core, or of one queue. Only that core writes, so a plain load and
/// store will do.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    media_errors: AtomicU64,
}

/// Sums over all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Read and Compare commands completed.
    pub reads: u64,
    /// Write commands completed.
    pub writes: u64,
    /// Bytes read, compared or verified by hosts.
    pub read_bytes: u64,
    /// Bytes written by hosts.
    pub written_bytes: u64,
    /// Commands failed by the medium.
    pub media_errors: u64,
}

/// I/O of one controller: that of its queues, and of those that it had.
#[derive(Debug, Default)]
pub(crate) struct QueueCounters(Mutex<(Vec<Arc<Counters>>, Totals)>);

impl QueueCounters {
    fn lock(&self) -> MutexGuard<'_, (Vec<Arc<Counters>>, Totals)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counters for another queue.
    pub(crate) fn join(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.lock().0.push(Arc::clone(&counters));
        counters
    }

    /// The queue is gone; what it did stays.
    pub(crate) fn leave(&self, counters: &Arc<Counters>) {
        let mut state = self.lock();
        let (queues, past) = &mut *state;
        if let Some(at) = queues.iter().position(|other| Arc::ptr_eq(other, counters)) {
            queues.swap_remove(at).add_to(past);
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        let state = self.lock();
        let mut totals = state.1;
        state.0.iter().for_each(|counters| counters.add_to(&mut totals));
        totals
    }
}

fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn read(&self, bytes: u64) {
        bump(&self.reads, 1);
        bump(&self.read_bytes, bytes);
    }

    /// A Compare is a read command, and what it compared was read.
    pub(crate) fn compare(&self, bytes: u64) {
        self.read(bytes);
    }

    /// What a Verify looked at counts as read; the command itself is no read command.
    pub(crate) fn verify(&self, bytes: u64) {
        bump(&self.read_bytes, bytes);
    }

    pub(crate) fn write(&self, bytes: u64) {
        bump(&self.writes, 1);
        bump(&self.written_bytes, bytes);
    }

    pub(crate) fn media_error(&self) {
        bump(&self.media_errors, 1);
    }

    pub(crate) fn add_to(&self, totals: &mut Totals) {
        totals.reads += self.reads.load(Ordering::Relaxed);
        totals.writes += self.writes.load(Ordering::Relaxed);
        totals.read_bytes += self.read_bytes.load(Ordering::Relaxed);
        totals.written_bytes += self.written_bytes.load(Ordering::Relaxed);
        totals.media_errors += self.media_errors.load(Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controller_keeps_what_its_queues_did() {
        let controller = QueueCounters::default();
        let (a, b) = (controller.join(), controller.join());
        a.read(512);
        b.write(4096);
        controller.leave(&a);
        b.write(4096);
        let expected = Totals {
            reads: 1,
            read_bytes: 512,
            writes: 2,
            written_bytes: 8192,
            ..Totals::default()
        };
        assert_eq!(controller.totals(), expected);
        controller.leave(&b);
        controller.leave(&b);
        assert_eq!(controller.totals(), expected);
    }
}
