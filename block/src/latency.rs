//! How long I/Os took: counts by duration, of fixed size.

use std::time::Duration;

/// Parts of each power of two, so that a bucket's bounds are at most a quarter apart.
const PARTS: usize = 4;
/// Durations from 2^40 ns (18 minutes) on are in the last bucket.
const OCTAVES: usize = 40;
const BUCKETS: usize = PARTS * (OCTAVES - 1);

/// A histogram of durations with its sum and the longest one. A few nanoseconds to record one, no
/// memory beside itself.
///
/// ```
/// use std::time::Duration;
/// let mut latency = block::Latency::default();
/// for us in 1..=100 {
///     latency.record(Duration::from_micros(us));
/// }
/// assert_eq!(latency.count(), 100);
/// assert_eq!(latency.mean(), Some(Duration::from_nanos(50_500)));
/// let p99 = latency.percentile(0.99).unwrap();
/// assert!(p99 >= Duration::from_micros(99) && p99 <= Duration::from_micros(125));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    buckets: [u64; BUCKETS],
    sum_ns: u64,
    max_ns: u64,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency { buckets: [0; BUCKETS], sum_ns: 0, max_ns: 0 }
    }
}

impl Latency {
    /// One more.
    #[inline]
    pub fn record(&mut self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)] += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// One that is not counted took so long: only the longest is remembered.
    #[inline]
    pub fn saw(&mut self, took: Duration) {
        self.max_ns = self.max_ns.max(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds others.
    pub fn add(&mut self, other: &Latency) {
        for (sum, count) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += count;
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Durations recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Their mean; `None`: there are none.
    pub fn mean(&self) -> Option<Duration> {
        self.sum_ns.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// The longest of those recorded or seen; `None`: there are none.
    pub fn max(&self) -> Option<Duration> {
        (self.max_ns > 0).then(|| Duration::from_nanos(self.max_ns))
    }

    /// What this share of them (0.99: 99 of 100) took at most, a quarter too long at worst; `None`:
    /// there are none.
    pub fn percentile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = ((count as f64 * share).ceil() as u64).clamp(1, count);
        let mut sum = 0;
        let index = self.buckets.iter().position(|count| {
            sum += count;
            sum >= wanted
        })?;
        Some(Duration::from_nanos(bound(index).min(self.max_ns)))
    }
}

/// The bucket of a duration.
#[inline]
fn bucket(ns: u64) -> usize {
    if ns < PARTS as u64 {
        return ns as usize;
    }
    // At least 2, because of the check above.
    let octave = ns.ilog2() as usize;
    let part = (ns >> (octave - 2)) as usize & (PARTS - 1);
    ((octave - 1) * PARTS + part).min(BUCKETS - 1)
}

/// The longest duration of a bucket, in nanoseconds.
fn bound(index: usize) -> u64 {
    if index < PARTS {
        return index as u64;
    }
    let (octave, part) = (index / PARTS + 1, index % PARTS);
    ((PARTS + part + 1) as u64) << (octave - 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_above_the_bound_before_it() {
        for index in 1..BUCKETS - 1 {
            let (low, high) = (bound(index - 1), bound(index));
            assert!(low < high && (index < 8 || high - low <= low / 3), "{index}: {low}..{high}");
            // The bound of an octave's buckets is the first duration of the next one.
            let inside = if index < PARTS { high } else { high - 1 };
            assert_eq!(bucket(inside), index, "{inside}");
        }
        for ns in [1 << 40, 1 << 45, u64::MAX] {
            assert_eq!(bucket(ns), BUCKETS - 1);
        }
    }

    #[test]
    fn sums_are_those_of_the_parts() {
        let ns = Duration::from_nanos;
        let mut all = Latency::default();
        assert_eq!((all.mean(), all.max(), all.percentile(0.5)), (None, None, None));
        let mut more = Latency::default();
        (0..900).for_each(|_| all.record(ns(100)));
        (0..100).for_each(|_| more.record(ns(10_000)));
        more.saw(ns(50_000));
        all.add(&more);
        assert_eq!((all.count(), all.mean()), (1000, Some(ns(1090))));
        assert_eq!(all.max(), Some(ns(50_000)));
        let half = all.percentile(0.5).unwrap();
        assert!(half >= ns(100) && half <= ns(125), "{half:?}");
        let most = all.percentile(0.99).unwrap();
        assert!(most >= ns(10_000) && most <= ns(12_500), "{most:?}");
        assert_eq!(all.percentile(0.9), all.percentile(0.5));
    }
}
