//! What hosts use up, and how often they met a bound.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::state::LimitsHit;

/// Counts of limits met; relaxed: single values that people read.
#[derive(Debug, Default)]
pub(crate) struct Hits {
    pub(crate) connections: AtomicU64,
    pub(crate) handshakes: AtomicU64,
    pub(crate) connections_of_host: AtomicU64,
    pub(crate) controllers: AtomicU64,
    pub(crate) controllers_of_host: AtomicU64,
    pub(crate) admin_commands: AtomicU64,
    pub(crate) queue_overruns: AtomicU64,
    pub(crate) buffers: AtomicU64,
}

pub(crate) fn hit(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Hits {
    pub(crate) fn read(&self) -> LimitsHit {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LimitsHit {
            connections: read(&self.connections),
            handshakes: read(&self.handshakes),
            connections_of_host: read(&self.connections_of_host),
            controllers: read(&self.controllers),
            controllers_of_host: read(&self.controllers_of_host),
            admin_commands: read(&self.admin_commands),
            queue_overruns: read(&self.queue_overruns),
            buffers: read(&self.buffers),
        }
    }
}

/// Admin commands that a host may still send: fills with time up to a burst.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Billionths of a command that are missing, and when that was so. `None`: never used.
    state: Mutex<Option<(u64, Duration)>>,
    per_second: u64,
    burst: u64,
}

/// One command, in the unit of the bucket: what a rate of one per second adds in a nanosecond.
const COMMAND: u64 = 1_000_000_000;

impl Bucket {
    pub(crate) fn new(per_second: u32, burst: u32) -> Bucket {
        Bucket {
            state: Mutex::default(),
            per_second: per_second.max(1).into(),
            burst: u64::from(burst.max(1)) * COMMAND,
        }
    }

    /// Takes one command; `false`: there is none.
    pub(crate) fn take(&self, now: Duration) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (missing, since) = state.unwrap_or((0, now));
        let passed = u64::try_from(now.saturating_sub(since).as_nanos()).unwrap_or(u64::MAX);
        let missing = missing.saturating_sub(passed.saturating_mul(self.per_second));
        let is_there = missing + COMMAND <= self.burst;
        // Cores read the clock at different moments: time does not go back for the bucket.
        *state = Some((missing + if is_there { COMMAND } else { 0 }, now.max(since)));
        is_there
    }
}

/// Connections that have not come to a Connect command, by peer address without port.
#[derive(Debug, Default)]
pub(crate) struct Handshakes(Mutex<BTreeMap<String, usize>>);

impl Handshakes {
    fn host(peer: &str) -> &str {
        peer.rsplit_once(':').map_or(peer, |(host, _)| host)
    }

    /// Counts a connection of `peer` unless there are `max`.
    pub(crate) fn begin(&self, peer: &str, max: usize) -> bool {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = table.entry(Self::host(peer).to_owned()).or_insert(0);
        if *count >= max.max(1) {
            return false;
        }
        *count += 1;
        true
    }

    /// The connection is a queue now, or gone.
    pub(crate) fn end(&self, peer: &str) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = table.get_mut(Self::host(peer)) {
            *count -= 1;
            if *count == 0 {
                table.remove(Self::host(peer));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let bucket = Bucket::new(10, 3);
        let at = Duration::from_millis;
        assert_eq!([0, 0, 0, 0].map(|_: u8| bucket.take(at(500))), [true, true, true, false]);
        assert!(!bucket.take(at(599)));
        assert!(bucket.take(at(600)), "one more after a tenth of a second");
        assert!(!bucket.take(at(600)));
        // A clock that is behind gives nothing and takes nothing.
        assert!(!bucket.take(at(100)));
        assert!(bucket.take(at(700)));
        assert_eq!([0; 4].map(|_: u8| bucket.take(at(60_000))), [true, true, true, false]);
    }

    #[test]
    fn handshakes_are_counted_per_address() {
        let handshakes = Handshakes::default();
        assert!(handshakes.begin("[::1]:1", 2) && handshakes.begin("[::1]:2", 2));
        assert!(!handshakes.begin("[::1]:3", 2));
        assert!(handshakes.begin("10.0.0.1:3", 2));
        handshakes.end("[::1]:1");
        assert!(handshakes.begin("[::1]:3", 2));
        handshakes.end("10.0.0.1:3");
        handshakes.end("10.0.0.1:3");
        assert!(handshakes.begin("10.0.0.1:4", 1));
    }
}
