//! How long a core looks for work before it sleeps.
//!
//! Looking saves the wake-up when work comes soon, and wastes the processor when it does not. Which of
//! the two it will be is guessed from the last pauses, as kernels do for idle virtual processors: after
//! two short pauses the core looks for long, after a long one for half as long as before, down to not at
//! all. Two, as a late wake-up makes the pause before the next of regular bursts short.
//!
//! Two sides that answer each other (one request at a time between an initiator and a target) keep each
//! other asleep once both have stopped to look: every pause then has a wake-up of either side in it, and
//! seems long. So the longest look is twice a short pause, long enough to see the answer of a side that
//! had to wake up, and a core that does not look any more tries it again now and then, and after each
//! pause that was so long that the last work says nothing of the next. A try that finds nothing makes the
//! next one rarer.
//!
//! Work that comes at a fixed distance, just longer than a short pause, seems to come sooner after a
//! wake-up than after a look: a core that goes by what it sees after sleeping then looks for ever, in vain.
//! So when looks have found work late, pauses that ended by a wake-up are not taken for shorter than they
//! seemed, until looking is tried anew.

use std::time::Duration;

/// What a wake-up takes, about: a pause that ended by one was shorter than it seems.
const WAKE_UP: Duration = Duration::from_micros(20);
/// The shortest look that is worth the clock readings, and the shortest pause that says something of
/// the next: shorter ones are within one burst of work.
const LEAST: Duration = Duration::from_micros(5);
/// Short pauses in a row that are believed.
const SHORT: u32 = 2;
/// Looks in a row that may find work only after a long pause: worth it while the other side wakes up, and
/// not for ever.
const LONG_LOOKS: u32 = 4;
/// A pause after which another kind of work may begin: one long look in such a time is no load.
const FRESH: Duration = Duration::from_millis(10);
/// Sleeps without a look after which it is tried again, at first and when that has failed often.
const SLEEPS: u32 = 64;
const SLEEPS_MAX: u32 = 512;

/// The time to look for work, which follows the pauses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    max: Duration,
    now: Duration,
    /// Short pauses in a row.
    short: u32,
    /// Looks in a row that found work late.
    late: u32,
    /// Sleeps without a look before them, and how many it takes until a look is tried.
    blind: u32,
    patience: u32,
    /// Looks found work late: a pause is as long as it seems.
    is_regular: bool,
}

impl Spin {
    /// Starts with the longest, `max`.
    pub(crate) fn new(max: Duration) -> Spin {
        let (patience, is_regular) = (SLEEPS, false);
        Spin { max, now: max, short: 0, late: 0, blind: 0, patience, is_regular }
    }

    /// How long to look this time.
    #[inline]
    pub(crate) fn time(&self) -> Duration {
        self.now
    }

    /// A look found work, `pause` after the last.
    #[inline]
    pub(crate) fn on_found(&mut self, pause: Duration) {
        if pause < LEAST {
            return;
        }
        if pause <= self.max / 2 {
            (self.patience, self.is_regular) = (SLEEPS, false);
            return self.on_short();
        }
        self.short = 0;
        self.late += 1;
        if self.late >= LONG_LOOKS {
            self.is_regular = true;
            self.shorten();
        }
    }

    /// The core slept; from its last work until it was awake again it took `pause`.
    pub(crate) fn on_slept(&mut self, pause: Duration) {
        let wake_up = if self.is_regular { Duration::ZERO } else { WAKE_UP };
        if pause <= self.max / 2 + wake_up {
            return self.on_short();
        }
        self.short = 0;
        if pause >= FRESH {
            *self = Spin::new(self.max);
            return;
        }
        if self.now > Duration::ZERO {
            self.blind = 0;
            self.shorten();
            return;
        }
        self.blind += 1;
        if self.blind >= self.patience {
            self.blind = 0;
            self.patience = (2 * self.patience).min(SLEEPS_MAX);
            self.is_regular = false;
            self.now = self.max;
        }
    }

    fn on_short(&mut self) {
        self.late = 0;
        self.short += 1;
        if self.short >= SHORT {
            self.short = SHORT;
            self.now = self.max;
        }
    }

    fn shorten(&mut self) {
        self.late = 0;
        self.now /= 2;
        if self.now < LEAST {
            self.now = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// A pause of a core: whether it slept, and for how long it looked.
    fn pause(spin: &mut Spin, pause: Duration) -> (bool, Duration) {
        let time = spin.time();
        if pause < time {
            spin.on_found(pause);
            return (false, pause);
        }
        spin.on_slept(pause + WAKE_UP);
        (true, time)
    }

    #[test]
    fn long_pauses_end_looking_and_short_ones_bring_it_back() {
        let mut spin = Spin::new(MAX);
        assert_eq!(spin.time(), MAX);
        for _ in 0..4 {
            spin.on_slept(micros(84));
        }
        assert_eq!(spin.time(), Duration::ZERO);
        spin.on_slept(micros(40));
        assert_eq!(spin.time(), Duration::ZERO);
        spin.on_slept(micros(84));
        spin.on_slept(micros(40));
        assert_eq!(spin.time(), Duration::ZERO, "two in a row");
        spin.on_slept(micros(40));
        assert_eq!(spin.time(), MAX);
    }

    #[test]
    fn one_long_pause_does_not_end_it() {
        let mut spin = Spin::new(MAX);
        spin.on_slept(micros(9000));
        assert_eq!(spin.time(), MAX / 2);
        spin.on_slept(micros(30));
        spin.on_found(micros(12));
        assert_eq!(spin.time(), MAX);
    }

    #[test]
    fn looks_in_vain_become_rare() {
        let mut spin = Spin::new(MAX);
        let looks = (0..10_000).filter(|_| pause(&mut spin, micros(90)).1 > Duration::ZERO).count();
        assert!((40..200).contains(&looks), "{looks} looks");
    }

    /// The first requests after a rest are not slept for, whatever was before.
    #[test]
    fn a_rest_is_a_new_start() {
        let mut spin = Spin::new(MAX);
        for _ in 0..10 {
            spin.on_slept(micros(90));
        }
        assert_eq!(spin.time(), Duration::ZERO);
        spin.on_slept(Duration::from_secs(1));
        assert_eq!(spin.time(), MAX);
    }

    #[test]
    fn pauses_within_a_burst_say_nothing() {
        let mut spin = Spin::new(MAX);
        for _ in 0..10 {
            spin.on_slept(micros(90));
            (0..3).for_each(|_| spin.on_found(micros(1)));
        }
        assert_eq!(spin.time(), Duration::ZERO);
    }

    /// Bursts at a distance that a look would bridge only just, or just not, are slept for; also if
    /// some are taken up late, so that the next is close.
    #[test]
    fn little_is_looked_for_bursts() {
        for gaps in
            [&[27][..], &[30], &[35], &[40], &[45], &[49], &[52], &[60], &[200], &[52, 52, 52, 22]]
        {
            let mut spin = Spin::new(MAX);
            let all = || gaps.repeat(10_000).into_iter().map(micros);
            let looked: Duration = all().map(|gap| pause(&mut spin, gap).1).sum();
            let share = looked.as_secs_f64() / all().sum::<Duration>().as_secs_f64();
            assert!(share < 0.08, "{share} of the time between bursts at {gaps:?} us");
        }
    }

    /// Bursts on a clock, whatever becomes of the ones before: what is late makes the next pause short.
    #[test]
    fn little_is_looked_for_bursts_on_a_clock() {
        let work = micros(6);
        for period in (39..200).map(micros) {
            let mut spin = Spin::new(MAX);
            let mut looked = Duration::ZERO;
            let mut arrival = Duration::ZERO;
            let mut idle_since = work;
            for _ in 0..10_000 {
                arrival += period;
                let gap = arrival.saturating_sub(idle_since);
                let (has_slept, look) = pause(&mut spin, gap);
                looked += look;
                let begun = if has_slept { arrival + WAKE_UP } else { arrival.max(idle_since) };
                idle_since = begun + work;
            }
            let share = looked.as_secs_f64() / arrival.as_secs_f64();
            assert!(share < 0.08, "{share} of the time looked, at a burst each {period:?}");
        }
    }

    /// Two cores that answer each other in 6 us each find out of any state in which they sleep.
    #[test]
    fn two_sides_that_answer_each_other_wake_each_other_up() {
        for (a, b) in [(0, 0), (0, 50), (50, 0), (25, 25), (25, 0), (0, 12), (6, 6)] {
            let side = |now| Spin { now: micros(now), ..Spin::new(MAX) };
            let mut sides = [side(a), side(b)];
            // What the side that waits has waited already when the other starts to wait.
            let mut delay = Duration::ZERO;
            let mut slept = Vec::new();
            for step in 0..1000 {
                let waited = micros(12) + delay;
                let (has_slept, _) = pause(&mut sides[step % 2], waited);
                delay = if has_slept { WAKE_UP } else { Duration::ZERO };
                slept.push(has_slept);
            }
            let last = slept.iter().rposition(|slept| *slept).unwrap_or(0);
            assert!(last < 150, "{a} and {b}: asleep at step {last}");
        }
    }

    #[test]
    fn a_core_that_is_not_to_look_never_does() {
        let mut spin = Spin::new(Duration::ZERO);
        for pause in [0, 10, 1000].repeat(100) {
            spin.on_slept(micros(pause));
            spin.on_found(micros(pause));
            assert_eq!(spin.time(), Duration::ZERO);
        }
    }
}
