//! When to try again.

use core::time::Duration;

/// Delays that double from `first` to `max`, each shortened by up to half at random so that hosts
/// cut off together do not come back together.
///
/// ```
/// use std::time::Duration;
/// let mut backoff = nvme::host::Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
/// let delay = backoff.next_delay(0x1234_5678);
/// assert!(delay >= Duration::from_millis(50) && delay <= Duration::from_millis(100));
/// ```
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    current: Duration,
}

impl Backoff {
    /// Delays from `first` (at least 1 ms) to `max` (at least `first`).
    #[must_use]
    pub fn new(first: Duration, max: Duration) -> Backoff {
        let first = first.max(Duration::from_millis(1));
        Backoff { first, max: max.max(first), current: first }
    }

    /// The next delay. `random` is any random number.
    pub fn next_delay(&mut self, random: u64) -> Duration {
        let base = self.current;
        self.current = base.saturating_mul(2).min(self.max);
        let half = base / 2;
        let span_ns = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX).saturating_add(1);
        base - Duration::from_nanos(random % span_ns)
    }

    /// An attempt succeeded: begin again with `first`.
    pub fn reset(&mut self) {
        self.current = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_maximum_and_starts_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(350));
        let delays: Vec<Duration> = (0..4).map(|_| backoff.next_delay(0)).collect();
        assert_eq!(delays, [ms(100), ms(200), ms(350), ms(350)]);
        backoff.reset();
        assert_eq!(backoff.next_delay(0), ms(100));
        for random in [1, u64::MAX / 3, u64::MAX] {
            let delay = backoff.clone().next_delay(random);
            assert!((ms(100)..=ms(200)).contains(&delay), "{delay:?}");
        }
        assert_eq!(Backoff::new(Duration::ZERO, Duration::ZERO).next_delay(0), ms(1));
    }
}
