//! Keep alive with traffic based keep alive support (CTRATT.TBKAS).
//!
//! "If Traffic Based Keep Alive is supported, the timer is restarted when it expires and a
//! command was processed during the interval": the intervals are laid end to end from the start,
//! and the association dies at the end of the first one without a command. That is between one
//! and two KATO after the last command.

use core::time::Duration;

/// Keep Alive Support (KAS): granularity of the timeout in units of 100 ms. KATO is rounded up
/// to it.
pub(crate) const KAS: u16 = 1;
const GRANULARITY_MS: u64 = KAS as u64 * 100;

#[derive(Debug)]
pub(crate) struct KeepAlive {
    kato: Duration,
    /// Start of the first interval.
    origin: Duration,
    /// Last command.
    last: Duration,
}

impl KeepAlive {
    pub(crate) fn new(kato: Duration, now: Duration) -> KeepAlive {
        let ms = u64::try_from(kato.as_millis()).unwrap_or(u64::from(u32::MAX));
        let kato = Duration::from_millis(ms.next_multiple_of(GRANULARITY_MS));
        KeepAlive { kato, origin: now, last: now }
    }

    pub(crate) fn kato(&self) -> Duration {
        self.kato
    }

    #[inline]
    pub(crate) fn touch(&mut self, now: Duration) {
        // Commands of other cores may be reported a little late, never backwards.
        self.last = self.last.max(now);
    }

    /// End of the interval after the one with the last command; `None`: disabled.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let kato = self.kato.as_nanos();
        let intervals = (self.last - self.origin).as_nanos().checked_div(kato)?;
        let end = u64::try_from((intervals + 2) * kato).unwrap_or(u64::MAX);
        Some(self.origin.saturating_add(Duration::from_nanos(end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn expires_one_to_two_timeouts_after_the_last_command() {
        let mut ka = KeepAlive::new(MS(5000), MS(100));
        assert_eq!(ka.deadline(), Some(MS(10_100)));
        ka.touch(MS(5_099));
        assert_eq!(ka.deadline(), Some(MS(10_100)));
        ka.touch(MS(5_100));
        assert_eq!(ka.deadline(), Some(MS(15_100)));
        ka.touch(MS(200));
        assert_eq!(ka.deadline(), Some(MS(15_100)), "time does not go back");
    }

    #[test]
    fn granularity_and_off() {
        assert_eq!(KeepAlive::new(MS(1), MS(0)).kato(), MS(100));
        assert_eq!(KeepAlive::new(MS(100), MS(0)).kato(), MS(100));
        assert_eq!(KeepAlive::new(MS(0), MS(0)).deadline(), None);
        assert!(KeepAlive::new(Duration::MAX, MS(0)).deadline().is_some());
    }
}
