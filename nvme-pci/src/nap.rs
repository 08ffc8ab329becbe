//! Short sleeps of a core whose guest need not ring.
//!
//! A guest that is asked to ring leaves its processor for its hypervisor, which sends a message that
//! wakes the device's control thread, which wakes the core: 10 microseconds of processor time and more
//! for each burst of commands. While bursts come close after each other it costs less to sleep for a
//! moment without asking, and to look at the doorbells in the guest's memory then. Where that finds
//! nothing, the guest is asked to ring.

use std::time::Duration;

/// How long a core sleeps without being told: about what a message takes on its way, twice.
const NAP: Duration = Duration::from_micros(60);
/// Naps in a row that find nothing, after which the guest is asked.
const NAPS: u32 = 3;
/// The most rests without a nap after naps that found nothing.
const RESTS_MAX: u32 = 256;

/// When to nap.
#[derive(Debug, Default)]
pub(crate) struct Nap {
    /// When the nap ends that the core takes, if it takes one.
    until: Option<Duration>,
    /// Naps since there was work.
    empty: u32,
    /// Rests yet to be taken without a nap, and how many it will be next time.
    rests: u32,
    next_rests: u32,
    is_resting: bool,
}

impl Nap {
    /// There was work.
    #[inline]
    pub(crate) fn on_work(&mut self) {
        if self.empty > 0 && !self.is_resting {
            self.next_rests = 0;
        }
        (self.empty, self.is_resting) = (0, false);
    }

    /// The core is about to sleep. `true`: for a moment only, the guest is not to be asked.
    pub(crate) fn begin(&mut self, now: Duration) -> bool {
        self.until = None;
        if self.is_resting {
            return false;
        }
        if self.rests > 0 {
            self.rests -= 1;
            self.is_resting = true;
            return false;
        }
        if self.empty >= NAPS {
            self.next_rests = (2 * self.next_rests).clamp(1, RESTS_MAX);
            self.rests = self.next_rests;
            self.is_resting = true;
            return false;
        }
        self.empty += 1;
        self.until = Some(now + NAP);
        true
    }

    /// The core is awake.
    pub(crate) fn end(&mut self) {
        self.until = None;
    }

    /// When the nap is over.
    pub(crate) fn until(&self) -> Option<Duration> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sleeps until work comes after `pause`; the number of naps, and whether the guest was asked.
    fn pause(nap: &mut Nap, pause: Duration) -> (u32, bool) {
        let (mut now, mut naps) = (Duration::ZERO, 0);
        let is_asked = loop {
            if now >= pause {
                break false;
            }
            if !nap.begin(now) {
                break true;
            }
            naps += 1;
            now = nap.until().expect("a nap has an end");
            nap.end();
        };
        nap.on_work();
        (naps, is_asked)
    }

    #[test]
    fn close_bursts_are_never_rung_for() {
        let mut nap = Nap::default();
        for _ in 0..1000 {
            assert_eq!(pause(&mut nap, NAP - Duration::from_micros(5)), (1, false));
        }
        assert_eq!(pause(&mut nap, 2 * NAP), (2, false));
    }

    #[test]
    fn rare_ones_are_and_naps_in_vain_become_rare() {
        let mut nap = Nap::default();
        assert_eq!(pause(&mut nap, 100 * NAP), (NAPS, true));
        let naps: u32 = (0..10_000).map(|_| pause(&mut nap, 100 * NAP).0).sum();
        assert!(naps < 200, "{naps} naps");
        // When bursts come close again, that is found out.
        let asked = (0..1000).filter(|_| pause(&mut nap, NAP / 2).1).count();
        assert!(asked <= RESTS_MAX as usize, "asked for {asked}");
        assert_eq!(pause(&mut nap, NAP / 2), (1, false));
        // And then one long rest means little.
        assert_eq!(pause(&mut nap, 100 * NAP), (NAPS, true));
        assert_eq!(pause(&mut nap, NAP / 2), (0, true));
        assert_eq!(pause(&mut nap, NAP / 2), (1, false));
    }

    #[test]
    fn a_core_that_has_asked_does_not_nap_before_there_is_work() {
        let mut nap = Nap::default();
        pause(&mut nap, 100 * NAP);
        assert!(!nap.begin(Duration::ZERO));
        for _ in 0..10 {
            assert!(!nap.begin(Duration::ZERO), "it has asked already");
        }
    }
}
