//! What an operator has changed of a device's namespaces, for a successor of this process.
//!
//! It is in a small file in memory that a supervisor keeps, like the device's queues. The changes are
//! one write of 64 bytes: a process that ends meanwhile leaves those of before or those of after. On a
//! page of its own is who the device is: its serial number is that of the namespace that was its
//! first, which may be detached when a successor begins.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use block::Identity;
use nvme_pci::NAMESPACES_MAX;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::supervise::Legacy;

/// Key of the file.
const KEY: u64 = u64::MAX - 19;
const IDENTITY_AT: u64 = 4096;
const BYTES: u64 = 2 * 4096;
/// A bit for each namespace, from the first one on.
const SET_BYTES: usize = NAMESPACES_MAX as usize / 8;
const CHANGES_BYTES: usize = 2 * SET_BYTES;
/// Whether there is one, serial number, UUID, NGUID.
const IDENTITY_BYTES: usize = 1 + 20 + 16 + 16;

/// See the [module](self). Without a supervisor it ends with the process.
#[derive(Default)]
pub(super) struct ByHand {
    file: Option<File>,
    /// Beside what is configured.
    attached: BTreeSet<u32>,
    /// Of what is configured, or of what the target has.
    detached: BTreeSet<u32>,
}

impl ByHand {
    /// What a predecessor has left, or nothing.
    pub(super) fn kept(legacy: &mut Legacy) -> io::Result<ByHand> {
        use nvme_pci::vfio_user::journal::FdKeeper;
        if let Some(file) = legacy.files.remove(&KEY) {
            return ByHand::open(File::from(file));
        }
        let file = File::from(memfd_create("penstock-namespaces", MemfdFlags::CLOEXEC)?);
        file.set_len(BYTES)?;
        legacy.keeper.keep(KEY, file.as_fd())?;
        ByHand::open(file)
    }

    fn open(file: File) -> io::Result<ByHand> {
        let mut bytes = [0; CHANGES_BYTES];
        file.read_exact_at(&mut bytes, 0)?;
        let (attached, detached) = bytes.split_at(SET_BYTES);
        let set = |bits: &[u8]| {
            let is_in = |nsid: &u32| bits[(*nsid as usize - 1) / 8] >> ((*nsid - 1) % 8) & 1 != 0;
            (1..=NAMESPACES_MAX).filter(is_in).collect()
        };
        Ok(ByHand { attached: set(attached), detached: set(detached), file: Some(file) })
    }

    /// The namespaces to begin with, where these are configured.
    pub(super) fn namespaces(&self, configured: &[u32]) -> Vec<u32> {
        let kept = configured.iter().filter(|nsid| !self.detached.contains(nsid));
        let added = self.attached.iter().filter(|nsid| !configured.contains(nsid));
        kept.chain(added).copied().collect()
    }

    /// Those that are not to be there although they are configured, or the target has them.
    pub(super) fn detached(&self) -> &BTreeSet<u32> {
        &self.detached
    }

    /// A namespace was attached; `is_expected`: it would be there without that.
    pub(super) fn on_attached(&mut self, nsid: u32, is_expected: bool) {
        self.detached.remove(&nsid);
        if !is_expected {
            self.attached.insert(nsid);
        }
        self.save();
    }

    /// A namespace is detached; `is_expected`: it would be there without that.
    pub(super) fn on_detached(&mut self, nsid: u32, is_expected: bool) {
        self.attached.remove(&nsid);
        if is_expected {
            self.detached.insert(nsid);
        }
        self.save();
    }

    fn save(&self) {
        let Some(file) = &self.file else { return };
        let mut bytes = [0; CHANGES_BYTES];
        let (attached, detached) = bytes.split_at_mut(SET_BYTES);
        for (bits, set) in [(attached, &self.attached), (detached, &self.detached)] {
            // The device has no others.
            for nsid in set.iter().filter(|nsid| (1..=NAMESPACES_MAX).contains(nsid)) {
                bits[(*nsid as usize - 1) / 8] |= 1 << ((*nsid - 1) % 8);
            }
        }
        if let Err(error) = file.write_all_at(&bytes, 0) {
            tracing::warn!(%error, "a change of namespaces is not kept for a restart");
        }
    }

    /// Who the device is: as a predecessor was, or as its first namespace says. `None`: nobody knows.
    pub(super) fn identity(&self, first: Option<Identity>) -> io::Result<Option<Identity>> {
        let Some(file) = &self.file else { return Ok(first) };
        let mut bytes = [0; IDENTITY_BYTES];
        file.read_exact_at(&mut bytes, IDENTITY_AT)?;
        if bytes[0] != 0 {
            let mut identity = Identity { uuid: [0; 16], nguid: [0; 16], serial: [0; 20] };
            identity.serial.copy_from_slice(&bytes[1..21]);
            identity.uuid.copy_from_slice(&bytes[21..37]);
            identity.nguid.copy_from_slice(&bytes[37..]);
            return Ok(Some(identity));
        }
        if let Some(Identity { uuid, nguid, serial }) = first {
            bytes[0] = 1;
            bytes[1..21].copy_from_slice(&serial);
            bytes[21..37].copy_from_slice(&uuid);
            bytes[37..].copy_from_slice(&nguid);
            file.write_all_at(&bytes, IDENTITY_AT)?;
        }
        Ok(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(BYTES).unwrap();
        file
    }

    #[test]
    fn a_successor_begins_with_what_was_changed_and_as_who_it_was() {
        let file = file();
        let successor = || ByHand::open(file.try_clone().unwrap()).unwrap();
        let configured = [1, 8, 256];
        let mut by_hand = successor();
        assert_eq!(by_hand.namespaces(&configured), configured);
        assert_eq!(by_hand.identity(None).unwrap(), None);
        let first = Identity::from_uuid([3; 16]);
        assert_eq!(by_hand.identity(Some(first)).unwrap(), Some(first));
        by_hand.on_attached(9, false);
        by_hand.on_attached(255, false);
        by_hand.on_detached(1, true);
        by_hand.on_detached(256, true);
        by_hand = successor();
        assert_eq!(by_hand.namespaces(&configured), [8, 9, 255]);
        assert_eq!(by_hand.detached(), &BTreeSet::from([1, 256]));
        // Its first namespace is another one now, or there is none.
        for other in [Some(Identity::from_uuid([8; 16])), None] {
            assert_eq!(by_hand.identity(other).unwrap(), Some(first));
        }
        by_hand.on_detached(9, false);
        by_hand.on_attached(1, true);
        by_hand = successor();
        assert_eq!(by_hand.namespaces(&configured), [1, 8, 255]);
        // What was attached by hand is configured in the meantime, and what was detached no more.
        assert_eq!(by_hand.namespaces(&[255]), [255]);
    }

    #[test]
    fn without_a_supervisor_nothing_is_kept_and_all_works() {
        let mut by_hand = ByHand::default();
        by_hand.on_detached(1, true);
        assert_eq!(by_hand.namespaces(&[1, 2]), [2]);
        let first = Some(Identity::from_uuid([3; 16]));
        assert_eq!(by_hand.identity(first).unwrap(), first);
    }
}
