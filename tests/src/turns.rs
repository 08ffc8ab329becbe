//! Sides that take turns, and what a difference between them is worth on a machine that others use.
//!
//! ```text
//!  round 1   base   base again   tree        one ratio of each round, from turns that follow each
//!  round 2   base again   tree   base        other: what slows the machine for longer than a round
//!  round 3   tree   base   base again        slows all of them
//! ```

use std::time::Duration;

use anyhow::Result;

use crate::load::Figures;

/// What a side does in its turn: load its target for so long.
pub type Side<'a> = Box<dyn FnMut(Duration) -> Result<Figures> + 'a>;

/// Lets every side run once a round and adds what it found to `found`. Each round begins with
/// another side; one round before the first warms caches and counts for nothing.
///
/// # Errors
/// That of a side.
pub fn take(
    sides: &mut [Side<'_>],
    rounds: usize,
    time: Duration,
    found: &mut [Vec<Figures>],
) -> Result<()> {
    let count = sides.len();
    for round in 0..=rounds {
        for turn in 0..count {
            let at = (round + turn) % count;
            let figures = sides[at](time)?;
            if round > 0 {
                found[at].push(figures);
            }
        }
    }
    Ok(())
}

/// What a side reaches of a base that took two turns in each round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Median of the rounds' ratios; 1: the same.
    pub value: f64,
    /// Differences from 1 up to this one say nothing: the base showed them against itself, or the
    /// median of so few rounds may be off by as much (three standard errors).
    pub noise: f64,
}

impl Ratio {
    /// From the IOPS of at least one round; the lists are of one length.
    pub fn of(side: &[Figures], base: &[Figures], base_again: &[Figures]) -> Ratio {
        let ln = |figures: &Figures| figures.iops.max(f64::MIN_POSITIVE).ln();
        let both = || base.iter().zip(base_again);
        let own: Vec<f64> = both().map(|(one, other)| ln(other) - ln(one)).collect();
        let ratios = side.iter().zip(both());
        let ratios: Vec<f64> =
            ratios.map(|(side, (one, other))| ln(side) - (ln(one) + ln(other)) / 2.0).collect();
        Ratio { value: median(&ratios).exp(), noise: beyond_zero(&own).exp() - 1.0 }
    }

    /// Whether the side is known to be on one side of `goal`: the noise is not larger than the
    /// `margin` that is judged, or the goal is farther away than the noise.
    pub fn is_decided(&self, goal: f64, margin: f64) -> bool {
        self.noise <= margin || (self.value - goal).abs() > self.noise
    }

    /// Whether the side is slower than the base by more than the noise and by at least `least`.
    pub fn is_loss(&self, least: f64) -> bool {
        1.0 - self.value > self.noise.max(least)
    }
}

/// How far from 0 the median of such values may lie by chance.
fn beyond_zero(values: &[f64]) -> f64 {
    let middle = median(values);
    let apart: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    // Of normal values 1.4826 median deviations are a standard deviation, and a median's standard
    // error is 1.2533 times the mean's. Medians throughout: single turns are off by half.
    let error = 1.2533 * 1.4826 * median(&apart) / (values.len() as f64).sqrt();
    middle.abs() + 3.0 * error
}

/// The value in the middle, or between the two there; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => 0.0,
        len if len % 2 == 0 => (values[half - 1] + values[half]) / 2.0,
        _ => values[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(iops: impl IntoIterator<Item = f64>) -> Vec<Figures> {
        iops.into_iter().map(|iops| Figures { iops, ..Figures::default() }).collect()
    }

    #[test]
    fn sides_take_turns_and_the_first_round_does_not_count() {
        let order = std::cell::RefCell::new(Vec::new());
        let side = |name: u8| -> Side<'_> {
            let order = &order;
            Box::new(move |_| {
                order.borrow_mut().push(name);
                Ok(Figures { iops: f64::from(name), ..Figures::default() })
            })
        };
        let mut found = [Vec::new(), Vec::new()];
        take(&mut [side(1), side(2)], 2, Duration::ZERO, &mut found).unwrap();
        assert_eq!(*order.borrow(), [1, 2, 2, 1, 1, 2]);
        for (list, iops) in found.iter().zip([1.0, 2.0]) {
            assert_eq!(list.iter().map(|one| one.iops).collect::<Vec<_>>(), [iops, iops]);
        }
    }

    #[test]
    fn a_loss_is_seen_although_the_machine_is_slower_in_some_rounds() {
        // Every third round at half the speed, and a percent of difference between turns.
        let speed = |round: usize| if round.is_multiple_of(3) { 500.0 } else { 1000.0 };
        let jitter = |round: usize, by: usize| 1.0 + ((round * by) % 7) as f64 / 700.0;
        let side = |share: f64, by| figures((0..40).map(|n| speed(n) * share * jitter(n, by)));
        let (base, again) = (side(1.0, 3), side(1.0, 5));
        let same = Ratio::of(&side(1.0, 2), &base, &again);
        assert!(same.noise < 0.01 && !same.is_loss(0.0), "{same:?}");
        let slower = Ratio::of(&side(0.95, 2), &base, &again);
        assert!((slower.value - 0.95).abs() < 0.01, "{slower:?}");
        assert!(slower.is_loss(0.0) && slower.is_loss(0.02) && !slower.is_loss(0.06));
        assert!(!Ratio::of(&side(1.1, 2), &base, &again).is_loss(0.0), "a gain is none");
    }

    #[test]
    fn what_is_closer_to_the_goal_than_the_noise_is_undecided() {
        let is_decided = |value, noise| Ratio { value, noise }.is_decided(0.98, 0.02);
        assert!(is_decided(0.97, 0.01) && is_decided(0.99, 0.02), "quiet enough");
        assert!(!is_decided(0.97, 0.03) && !is_decided(1.0, 0.03));
        assert!(is_decided(0.90, 0.03) && is_decided(1.05, 0.03), "far enough");
    }

    #[test]
    fn what_the_base_shows_against_itself_is_noise() {
        // The second process of the same program is slower by a tenth.
        let (base, again) = (figures([1000.0; 9]), figures([900.0; 9]));
        let ratio = Ratio::of(&figures([900.0; 9]), &base, &again);
        assert!(ratio.noise > 0.1 && !ratio.is_loss(0.0), "{ratio:?}");
        // Turns that differ by half leave only large differences.
        let wild = |first| figures((0..9).map(move |n| 1000.0 / (1 + (n + first) % 3) as f64));
        let ratio = Ratio::of(&figures([800.0; 9]), &wild(0), &wild(1));
        assert!(ratio.noise > 0.3, "{ratio:?}");
    }
}
