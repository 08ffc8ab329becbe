//! How long a core looks for work before it sleeps.
//!
//! Looking saves the wake-up when work comes soon, and wastes the processor when it does not. Which of
//! the two it will be is guessed from the last pauses, as kernels do for idle virtual processors: after
//! a pause that the longest look would have bridged it is looked for longer, after a longer one
//! shorter, down to not at all.

use std::time::Duration;

/// What a wake-up takes, about: a pause that ended by one was shorter than it seems.
const WAKE_UP: Duration = Duration::from_micros(20);
/// The shortest look that is worth the clock readings.
const LEAST: Duration = Duration::from_micros(5);

/// The time to look for work, which follows the pauses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    max: Duration,
    now: Duration,
}

impl Spin {
    /// Starts with the longest, `max`.
    pub(crate) fn new(max: Duration) -> Spin {
        Spin { max, now: max }
    }

    /// How long to look this time.
    #[inline]
    pub(crate) fn time(&self) -> Duration {
        self.now
    }

    /// The core slept; from its last work until it was awake again it took `pause`.
    pub(crate) fn on_slept(&mut self, pause: Duration) {
        if pause <= self.max + WAKE_UP {
            self.now = (self.now * 2).max(LEAST).min(self.max);
        } else {
            self.now /= 2;
            if self.now < LEAST {
                self.now = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    #[test]
    fn long_pauses_end_looking_and_short_ones_bring_it_back() {
        let mut spin = Spin::new(MAX);
        assert_eq!(spin.time(), MAX);
        for _ in 0..4 {
            spin.on_slept(Duration::from_micros(84));
        }
        assert_eq!(spin.time(), Duration::ZERO);
        // A pause of 40 us and the wake-up.
        let mut times = Vec::new();
        for _ in 0..5 {
            spin.on_slept(Duration::from_micros(60));
            times.push(spin.time().as_micros());
        }
        assert_eq!(times, [5, 10, 20, 40, 50]);
    }

    #[test]
    fn one_long_pause_does_not_end_it() {
        let mut spin = Spin::new(MAX);
        spin.on_slept(Duration::from_secs(1));
        assert_eq!(spin.time(), MAX / 2);
        spin.on_slept(Duration::from_micros(30));
        assert_eq!(spin.time(), MAX);
    }

    #[test]
    fn a_core_that_is_not_to_look_never_does() {
        let mut spin = Spin::new(Duration::ZERO);
        for pause in [0, 10, 1000] {
            spin.on_slept(Duration::from_micros(pause));
            assert_eq!(spin.time(), Duration::ZERO);
        }
    }
}
