//! Figures of the queues of a core.

use std::time::Duration;

use block::Latency;

/// What the queues of a core have done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Read commands completed, errors included.
    pub reads: u64,
    /// Write commands completed, errors included.
    pub writes: u64,
    /// All other commands completed.
    pub others: u64,
    /// Bytes of successful reads.
    pub read_bytes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Commands that did not succeed.
    pub errors: u64,
    /// Errors of the medium.
    pub media_errors: u64,
    /// Time from when they were taken to when they were completed, of all commands, to within a
    /// turn of the core.
    pub busy_time: Duration,
    /// From when a command was taken until the host could see it done: of one command in 20 us at
    /// most, and the longest of all, to within a turn of the core.
    pub latency: Latency,
    /// Interrupts raised.
    pub interrupts: u64,
    /// I/Os that a volume's channel did not take at once.
    pub busy: u64,
}

impl Counters {
    /// Adds others.
    pub fn add(&mut self, other: &Counters) {
        let Counters {
            reads,
            writes,
            others,
            read_bytes,
            written_bytes,
            errors,
            media_errors,
            busy_time,
            latency,
            interrupts,
            busy,
        } = other;
        self.reads += reads;
        self.writes += writes;
        self.others += others;
        self.read_bytes += read_bytes;
        self.written_bytes += written_bytes;
        self.errors += errors;
        self.media_errors += media_errors;
        self.busy_time += *busy_time;
        self.latency.add(latency);
        self.interrupts += interrupts;
        self.busy += busy;
    }

    /// Commands completed.
    pub fn commands(&self) -> u64 {
        self.reads + self.writes + self.others
    }
}
