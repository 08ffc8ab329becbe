//! Keep alive with traffic based keep alive support (CTRATT.TBKAS).
//!
//! "If Traffic Based Keep Alive is supported, the timer is restarted when it expires and a
//! command was processed during the interval": the intervals are laid end to end from the start,
//! and the association dies at the end of the first one without a command. That is between one
//! and two KATO after the last command.
//!
//! A discovery controller without a keep alive timeout is for a few commands: it ends when none has
//! come for two minutes (NVMe Base 2.0, Discovery controller activity timeout), so that hosts that
//! forget it do not hold it for ever.

use core::time::Duration;

/// Keep Alive Support (KAS): granularity of the timeout in units of 100 ms. KATO is rounded up
/// to it.
pub(crate) const KAS: u16 = 1;
const GRANULARITY_MS: u64 = KAS as u64 * 100;

/// Discovery controller activity timeout.
const ACTIVITY_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(crate) struct KeepAlive {
    kato: Duration,
    /// When a controller without keep alive timeout ends for want of commands; `None`: never.
    activity_timeout: Option<Duration>,
    /// Start of the first interval.
    origin: Duration,
    /// Last command.
    last: Duration,
}

impl KeepAlive {
    pub(crate) fn new(kato: Duration, is_discovery: bool, now: Duration) -> KeepAlive {
        let activity_timeout = is_discovery.then_some(ACTIVITY_TIMEOUT);
        let mut timer =
            KeepAlive { kato: Duration::ZERO, activity_timeout, origin: now, last: now };
        timer.set_kato(kato, now);
        timer
    }

    /// Another timeout, from now on.
    pub(crate) fn set_kato(&mut self, kato: Duration, now: Duration) {
        let ms = u64::try_from(kato.as_millis()).unwrap_or(u64::from(u32::MAX));
        self.kato = Duration::from_millis(ms.next_multiple_of(GRANULARITY_MS));
        (self.origin, self.last) = (now, now);
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
        let Some(intervals) = (self.last - self.origin).as_nanos().checked_div(kato) else {
            return self.activity_timeout.map(|timeout| self.last.saturating_add(timeout));
        };
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
        let mut ka = KeepAlive::new(MS(5000), false, MS(100));
        assert_eq!(ka.deadline(), Some(MS(10_100)));
        ka.touch(MS(5_099));
        assert_eq!(ka.deadline(), Some(MS(10_100)));
        ka.touch(MS(5_100));
        assert_eq!(ka.deadline(), Some(MS(15_100)));
        ka.touch(MS(200));
        assert_eq!(ka.deadline(), Some(MS(15_100)), "time does not go back");
    }

    #[test]
    fn a_discovery_controller_without_timeout_ends_when_nobody_uses_it() {
        let mut ka = KeepAlive::new(MS(0), true, MS(500));
        assert_eq!((ka.kato(), ka.deadline()), (MS(0), Some(MS(120_500))));
        ka.touch(MS(119_000));
        assert_eq!(ka.deadline(), Some(MS(239_000)));
        ka.set_kato(MS(5000), MS(119_000));
        assert_eq!(ka.deadline(), Some(MS(129_000)));
        ka.set_kato(MS(0), MS(120_000));
        assert_eq!(ka.deadline(), Some(MS(240_000)));
    }

    #[test]
    fn granularity_and_off() {
        assert_eq!(KeepAlive::new(MS(1), false, MS(0)).kato(), MS(100));
        assert_eq!(KeepAlive::new(MS(100), true, MS(0)).kato(), MS(100));
        assert_eq!(KeepAlive::new(MS(0), false, MS(0)).deadline(), None);
        assert!(KeepAlive::new(Duration::MAX, false, MS(0)).deadline().is_some());
    }
}
