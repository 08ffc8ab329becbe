//! A namespace's volume and what all cores share of it while it is attached.

use std::fmt;
use std::sync::Arc;

use block::Volume;

use crate::home::Home;

/// See the module's documentation. Attaching makes a new one, also of the same volume.
pub(crate) struct VolumeState {
    /// Number of its channel on every core. Another volume gets it when all cores have dropped
    /// theirs.
    pub(crate) index: u32,
    /// Never used again: what tells it from others that had the index.
    pub(crate) serial: u64,
    /// The table's generation that it came with: commands decoded before were not meant for it.
    pub(crate) attached: u64,
    pub(crate) volume: Arc<dyn Volume>,
    /// What it shares with other namespaces that are the same volume.
    pub(crate) home: Arc<Home>,
}

impl Drop for VolumeState {
    fn drop(&mut self) {
        self.home.leave(self.index);
    }
}

#[cfg(test)]
impl VolumeState {
    /// One of nothing, with this number.
    pub(crate) fn sample(index: u32) -> VolumeState {
        use block::Identity;
        use block::ram::RamVolume;
        let volume = RamVolume::new(Identity::from_uuid([index as u8; 16]), 1 << 20, 512);
        let volume = Arc::new(volume.expect("memory"));
        let home = crate::home::Homes::default().home([index as u8; 16]).expect("nothing to load");
        VolumeState { index, serial: index.into(), attached: 1, volume, home }
    }
}

impl fmt::Debug for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeState")
            .field("index", &self.index)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}
