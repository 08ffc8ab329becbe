//! What a core counts of its I/O, readable from outside without disturbing it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one subsystem on one core. Only that core writes, so a plain load and store will do.
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
