//! Files in memory that lose what was not synced when power fails.

use std::collections::BTreeMap;

use crate::sim::rng::Rng;

/// The unit that is written whole or not at all.
pub(crate) const SECTOR_BYTES: usize = 512;
/// Versions of one sector that a power cut may choose from; later ones replace the last.
const VERSIONS_MAX: usize = 8;

type Sector = [u8; SECTOR_BYTES];

/// What a sector may hold after power failed: what was stable, or any version written since.
struct Unsynced {
    stable: Sector,
    /// With the number of the write that made each.
    versions: Vec<(u64, Sector)>,
}

pub(crate) struct File {
    /// What reads see.
    bytes: Vec<u8>,
    unsynced: BTreeMap<usize, Unsynced>,
    writes: u64,
    /// Counts power cuts: operations from before fail.
    pub(crate) epoch: u64,
}

impl File {
    pub(crate) fn new(size: usize) -> File {
        File { bytes: vec![0; size], unsynced: BTreeMap::new(), writes: 0, epoch: 0 }
    }

    pub(crate) fn size(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes from `offset`, at most `len`: fewer at the end of the file.
    pub(crate) fn read(&self, offset: usize, len: usize) -> &[u8] {
        let start = offset.min(self.bytes.len());
        let end = start.saturating_add(len).min(self.bytes.len());
        &self.bytes[start..end]
    }

    /// Writes and grows the file if needed; `stable` survives a power cut from here on.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8], stable: bool) {
        self.change(offset, bytes.len(), stable, |to| to.copy_from_slice(bytes));
    }

    /// Writes zeros, not beyond the end unless `grow`.
    pub(crate) fn zero(&mut self, offset: usize, len: usize, grow: bool) {
        let len = if grow { len } else { len.min(self.bytes.len().saturating_sub(offset)) };
        self.change(offset, len, false, |to| to.fill(0));
    }

    pub(crate) fn grow(&mut self, size: usize) {
        if size > self.bytes.len() {
            self.bytes.resize(size, 0);
        }
    }

    fn change(&mut self, offset: usize, len: usize, stable: bool, f: impl FnOnce(&mut [u8])) {
        if len == 0 {
            return;
        }
        self.grow(offset + len);
        let sectors = offset / SECTOR_BYTES..=(offset + len - 1) / SECTOR_BYTES;
        if !stable {
            for sector in sectors.clone() {
                let stable = self.sector(sector);
                self.unsynced
                    .entry(sector)
                    .or_insert_with(|| Unsynced { stable, versions: Vec::new() });
            }
        }
        f(&mut self.bytes[offset..offset + len]);
        self.writes += 1;
        for sector in sectors {
            if stable {
                // An older version in the device's cache cannot come back over this one.
                self.unsynced.remove(&sector);
                continue;
            }
            let now = self.sector(sector);
            if let Some(unsynced) = self.unsynced.get_mut(&sector) {
                if unsynced.versions.len() == VERSIONS_MAX {
                    unsynced.versions.pop();
                }
                unsynced.versions.push((self.writes, now));
            }
        }
    }

    fn sector(&self, sector: usize) -> Sector {
        let mut bytes = [0; SECTOR_BYTES];
        let from = self.read(sector * SECTOR_BYTES, SECTOR_BYTES);
        bytes[..from.len()].copy_from_slice(from);
        bytes
    }

    /// Names the writes done so far, for a sync that begins now.
    pub(crate) fn mark(&self) -> u64 {
        self.writes
    }

    /// Makes the writes up to `mark` stable.
    pub(crate) fn sync(&mut self, mark: u64) {
        self.unsynced.retain(|_, unsynced| {
            let covered = unsynced.versions.iter().take_while(|(write, _)| *write <= mark).count();
            if let Some((_, sector)) = unsynced.versions[..covered].last() {
                unsynced.stable = *sector;
            }
            unsynced.versions.drain(..covered);
            !unsynced.versions.is_empty()
        });
    }

    /// Power fails: each unsynced sector holds some version, chosen on its own.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        self.epoch += 1;
        for (sector, unsynced) in std::mem::take(&mut self.unsynced) {
            let choice = rng.below(unsynced.versions.len() as u64 + 1) as usize;
            let chosen = match choice.checked_sub(1) {
                None => &unsynced.stable,
                Some(version) => &unsynced.versions[version].1,
            };
            let start = sector * SECTOR_BYTES;
            let end = (start + SECTOR_BYTES).min(self.bytes.len());
            self.bytes[start..end].copy_from_slice(&chosen[..end - start]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synced_and_stable_writes_survive_a_power_cut() {
        for seed in 0..50 {
            let mut file = File::new(4096);
            file.write(0, &[1; 1024], false);
            let mark = file.mark();
            file.sync(mark);
            file.write(1024, &[2; 512], true);
            file.write(0, &[3; 512], false);
            file.power_cut(&mut Rng::new(seed));
            assert!(matches!(file.read(0, 1)[0], 1 | 3));
            assert_eq!(file.read(512, 512), [1; 512]);
            assert_eq!(file.read(1024, 512), [2; 512]);
            assert_eq!(file.read(1536, 512), [0; 512]);
        }
    }

    #[test]
    fn unsynced_writes_are_lost_torn_or_kept() {
        let mut outcomes = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let mut file = File::new(1024);
            file.write(0, &[1; 1024], false);
            file.power_cut(&mut Rng::new(seed));
            outcomes.insert((file.read(0, 1)[0], file.read(1023, 1)[0]));
        }
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [(0, 0), (0, 1), (1, 0), (1, 1)]);
    }

    #[test]
    fn a_sync_covers_only_what_was_written_before_it_began() {
        let mut lost = false;
        for seed in 0..50 {
            let mut file = File::new(512);
            file.write(0, &[1; 512], false);
            let mark = file.mark();
            file.write(0, &[2; 512], false);
            file.sync(mark);
            file.power_cut(&mut Rng::new(seed));
            assert!(matches!(file.read(0, 1)[0], 1 | 2));
            lost |= file.read(0, 1)[0] == 1;
        }
        assert!(lost, "the later write is not promised");
    }

    #[test]
    fn an_old_version_never_returns_over_a_stable_one() {
        for seed in 0..50 {
            let mut file = File::new(512);
            file.write(0, &[1; 512], false);
            file.write(0, &[2; 512], true);
            file.power_cut(&mut Rng::new(seed));
            assert_eq!(file.read(0, 512), [2; 512]);
        }
    }

    #[test]
    fn files_grow_by_writes_and_not_by_holes() {
        let mut file = File::new(100);
        file.write(90, &[1; 20], false);
        assert_eq!(file.size(), 110);
        file.zero(100, 1000, false);
        assert_eq!(
            (file.size(), file.read(99, 100)),
            (110, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..])
        );
        assert_eq!(file.read(1 << 40, 8), []);
        file.power_cut(&mut Rng::new(1));
        assert_eq!(file.size(), 110);
    }
}
