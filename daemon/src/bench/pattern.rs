//! Blocks that know where they belong: a pattern that can be checked without keeping a copy.
//!
//! Each 512-byte unit starts with the generation it was written in (8 bytes, little endian); the
//! rest follows from seed, place and generation. So a block that landed elsewhere, an old block, a
//! torn block and a block of somebody else are all told apart, also in a later run.

/// Every logical block size is a multiple of this.
pub(crate) const UNIT_BYTES: usize = 512;

/// What a read should have brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// The write of exactly this generation.
    Generation(u64),
    /// A write of any generation, whole and in its place.
    Any,
}

/// The first unit that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Place on the volume in bytes.
    pub offset: u64,
    /// What was found there.
    pub found: &'static str,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "at byte {}: {}", self.offset, self.found)
    }
}

/// A well-mixed 64-bit permutation (the finalizer of SplitMix64).
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn key(seed: u64, unit: u64, generation: u64) -> u64 {
    mix(mix(mix(seed) ^ unit) ^ generation)
}

/// Fills `buffer`, which belongs at byte `offset` of the volume, for `generation`.
pub(crate) fn fill(seed: u64, offset: u64, generation: u64, buffer: &mut [u8]) {
    for (index, unit) in buffer.chunks_mut(UNIT_BYTES).enumerate() {
        let place = offset / UNIT_BYTES as u64 + index as u64;
        let key = key(seed, place, generation);
        for (word, bytes) in unit.chunks_mut(8).enumerate() {
            let value = if word == 0 { generation } else { mix(key ^ word as u64) };
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
    }
}

/// Checks what was read from byte `offset` of the volume.
pub(crate) fn check(seed: u64, offset: u64, expect: Expect, buffer: &[u8]) -> Result<(), Mismatch> {
    for (index, unit) in buffer.chunks(UNIT_BYTES).enumerate() {
        let place = offset / UNIT_BYTES as u64 + index as u64;
        let found = generation(unit);
        let wrong = |what| Err(Mismatch { offset: place * UNIT_BYTES as u64, found: what });
        if !is_whole(seed, place, found, unit) {
            if unit.iter().all(|byte| *byte == 0) {
                return wrong("zeros, where the pattern should be");
            }
            return wrong("no block of this pattern and seed, or a torn one");
        }
        if let Expect::Generation(generation) = expect
            && found != generation
        {
            return wrong("an older block: a write that was reported done is lost");
        }
    }
    Ok(())
}

fn generation(unit: &[u8]) -> u64 {
    unit.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn is_whole(seed: u64, place: u64, generation: u64, unit: &[u8]) -> bool {
    let key = key(seed, place, generation);
    unit.chunks(8)
        .enumerate()
        .skip(1)
        .all(|(word, bytes)| bytes == &mix(key ^ word as u64).to_le_bytes()[..bytes.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_filled_checks() {
        let mut buffer = vec![0; 4096];
        fill(7, 8192, 3, &mut buffer);
        assert_eq!(check(7, 8192, Expect::Generation(3), &buffer), Ok(()));
        assert_eq!(check(7, 8192, Expect::Any, &buffer), Ok(()));
        // A piece of it, read with a smaller size.
        assert_eq!(check(7, 8192 + 512, Expect::Any, &buffer[512..1024]), Ok(()));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let mut buffer = vec![0; 1024];
        fill(1, 0, 9, &mut buffer);
        for index in 0..buffer.len() {
            buffer[index] ^= 0x40;
            let error = check(1, 0, Expect::Generation(9), &buffer).unwrap_err();
            assert_eq!(error.offset, (index / 512 * 512) as u64);
            buffer[index] ^= 0x40;
        }
    }

    #[test]
    fn misplaced_old_and_foreign_blocks_are_told() {
        let mut buffer = vec![0; 512];
        fill(1, 4096, 2, &mut buffer);
        assert!(check(1, 0, Expect::Any, &buffer).is_err(), "misplaced");
        assert!(check(2, 4096, Expect::Any, &buffer).is_err(), "other seed");
        let old = check(1, 4096, Expect::Generation(3), &buffer).unwrap_err();
        assert!(old.found.contains("older"), "{old}");
        let zeros = check(1, 4096, Expect::Any, &[0; 512]).unwrap_err();
        assert!(zeros.found.contains("zeros"), "{zeros}");
    }

    #[test]
    fn torn_blocks_are_told() {
        let (mut old, mut new) = (vec![0; 512], vec![0; 512]);
        fill(1, 0, 1, &mut old);
        fill(1, 0, 2, &mut new);
        new[256..].copy_from_slice(&old[256..]);
        assert!(check(1, 0, Expect::Any, &new).is_err());
    }
}
