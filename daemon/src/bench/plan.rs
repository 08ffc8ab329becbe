//! Which I/O comes next: offsets, direction, and what each place should hold. Pure.

use super::pattern::mix;

/// Tries for a random place with no I/O in flight before the job waits for one to end.
const TRIES: usize = 32;

/// What to do and where, of one job.
#[derive(Debug, Clone)]
pub(crate) struct PlanConfig {
    /// Places of one I/O each, beginning at `first`.
    pub(crate) first: u64,
    /// How many places there are; at least one.
    pub(crate) count: u64,
    pub(crate) random: bool,
    /// Percentage of reads: 100 reads only, 0 writes only.
    pub(crate) read_percent: u8,
    pub(crate) seed: u64,
    /// Keep generations and never have two I/Os at one place at a time.
    pub(crate) tracked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) read: bool,
    /// Index of the place, counted from the beginning of the volume in I/O sizes.
    pub(crate) place: u64,
    /// Times this job has written the place, this write included.
    pub(crate) writes: u32,
}

/// The source of steps.
#[derive(Debug)]
pub(crate) struct Plan {
    config: PlanConfig,
    state: u64,
    next: u64,
    next_read_back: u64,
    /// Per place, if tracked: the top bit says an I/O is in flight, the rest counts writes.
    places: Vec<u32>,
}

const BUSY: u32 = 1 << 31;

impl Plan {
    pub(crate) fn new(config: PlanConfig) -> Self {
        let places = if config.tracked { vec![0; config.count as usize] } else { Vec::new() };
        let state = mix(config.seed ^ mix(config.first));
        Plan { config, state, next: 0, next_read_back: 0, places }
    }

    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `bound` (multiply and shift: no division, bias far below what matters).
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.random()) * u128::from(bound)) >> 64) as u64
    }

    /// The next step; `None` if every place tried has an I/O in flight.
    pub(crate) fn next(&mut self) -> Option<Step> {
        let mut index = None;
        if self.config.random {
            for _ in 0..TRIES {
                let candidate = self.below(self.config.count);
                if !self.is_busy(candidate) {
                    index = Some(candidate);
                    break;
                }
            }
        } else if !self.is_busy(self.next) {
            index = Some(self.next);
            self.next = (self.next + 1) % self.config.count;
        }
        let index = index?;
        let read = match self.config.read_percent {
            0 => false,
            100 => true,
            percent => self.below(100) < u64::from(percent),
        };
        Some(self.begin(index, read))
    }

    /// The next place to read back: each that was written, once.
    pub(crate) fn next_read_back(&mut self) -> Option<Step> {
        while self.next_read_back < self.places.len() as u64 {
            let index = self.next_read_back;
            self.next_read_back += 1;
            if self.places[index as usize] != 0 {
                return Some(self.begin(index, true));
            }
        }
        None
    }

    fn is_busy(&self, index: u64) -> bool {
        self.places.get(index as usize).is_some_and(|place| place & BUSY != 0)
    }

    fn begin(&mut self, index: u64, read: bool) -> Step {
        let writes = match self.places.get_mut(index as usize) {
            Some(place) => {
                if !read {
                    *place = (*place + 1) & !BUSY;
                }
                let writes = *place;
                *place |= BUSY;
                writes
            }
            None => 0,
        };
        Step { read, place: self.config.first + index, writes }
    }

    /// The I/O of a step has ended.
    pub(crate) fn end(&mut self, step: Step) {
        let index = step.place - self.config.first;
        if let Some(place) = self.places.get_mut(index as usize) {
            *place &= !BUSY;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn config() -> PlanConfig {
        PlanConfig { first: 100, count: 8, random: false, read_percent: 0, seed: 1, tracked: true }
    }

    #[test]
    fn sequential_plans_go_round() {
        let mut plan = Plan::new(PlanConfig { tracked: false, ..config() });
        let places: Vec<_> = (0..10).map(|_| plan.next().unwrap().place).collect();
        assert_eq!(places, [100, 101, 102, 103, 104, 105, 106, 107, 100, 101]);
    }

    #[test]
    fn a_place_in_flight_is_left_alone_and_writes_are_counted() {
        let mut plan = Plan::new(PlanConfig { random: true, ..config() });
        let mut flying = Vec::new();
        while let Some(step) = plan.next() {
            flying.push(step);
            assert!(flying.len() <= 8);
        }
        let places: BTreeSet<_> = flying.iter().map(|step| step.place).collect();
        assert_eq!(places.len(), flying.len());
        for step in flying {
            assert_eq!(step.writes, 1);
            plan.end(step);
        }
        assert_eq!(plan.next().map(|step| step.writes), Some(2));
    }

    #[test]
    fn read_back_covers_what_was_written() {
        let mut plan = Plan::new(config());
        for _ in 0..3 {
            let step = plan.next().unwrap();
            plan.end(step);
        }
        let back: Vec<_> = std::iter::from_fn(|| plan.next_read_back()).collect();
        assert_eq!(back.iter().map(|step| step.place).collect::<Vec<_>>(), [100, 101, 102]);
        assert!(back.iter().all(|step| step.read && step.writes == 1));
    }

    #[test]
    fn random_plans_cover_their_region_and_keep_the_mix() {
        let mut plan =
            Plan::new(PlanConfig { random: true, read_percent: 70, tracked: false, ..config() });
        let steps: Vec<_> = (0..10_000).map(|_| plan.next().unwrap()).collect();
        let places: BTreeSet<_> = steps.iter().map(|step| step.place).collect();
        assert_eq!(places.into_iter().collect::<Vec<_>>(), (100..108).collect::<Vec<_>>());
        let reads = steps.iter().filter(|step| step.read).count();
        assert!((6_700..7_300).contains(&reads), "{reads}");
    }
}
