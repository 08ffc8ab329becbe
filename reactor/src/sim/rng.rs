//! The world's random numbers: small, fast and the same on every machine.

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`; zero if that is zero. The bias is of no account here.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// 1 to `max`, small values as likely as large ones; 0 only if `max` is.
    pub(crate) fn skewed(&mut self, max: usize) -> usize {
        if max == 0 {
            return 0;
        }
        let bits = u64::from(usize::BITS - max.leading_zeros());
        let cap = 1u64 << (1 + self.below(bits));
        1 + self.below(cap.min(max as u64)) as usize
    }

    pub(crate) fn chance(&mut self, per_million: u32) -> bool {
        per_million > 0 && self.below(1_000_000) < u64::from(per_million)
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// Scatters the bits of `z`.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_in_range_and_repeat() {
        let (mut a, mut b) = (Rng::new(7), Rng::new(7));
        for max in 1..200 {
            assert!(a.below(max as u64) < max as u64);
            let n = a.skewed(max);
            assert!((1..=max).contains(&n));
            b.below(max as u64);
            assert_eq!(b.skewed(max), n);
        }
        assert_eq!(a.skewed(0), 0);
        assert!(!a.chance(0));
        assert!(a.chance(1_000_000));
    }
}
