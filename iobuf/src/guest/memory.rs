//! All memory of one guest.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use super::region::GuestRegion;
use super::view::GuestView;

/// Why regions do not make a guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadMemory {
    /// Two regions claim the same guest addresses.
    Overlap {
        /// First guest address of the lower region.
        lower: u64,
        /// First guest address of the higher region.
        higher: u64,
    },
}

impl fmt::Display for BadMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadMemory::Overlap { lower, higher } => {
                write!(f, "guest regions at {lower:#x} and {higher:#x} overlap")
            }
        }
    }
}

impl std::error::Error for BadMemory {}

/// The regions of one guest, sorted by guest address. Cheap to clone and shared by all cores; a
/// change of the guest's memory map makes a new one.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Arc<[Arc<GuestRegion>]>,
}

impl GuestMemory {
    /// Sorts the regions; refuses overlapping ones.
    pub fn new(mut regions: Vec<Arc<GuestRegion>>) -> Result<Self, BadMemory> {
        regions.sort_by_key(|r| r.guest_addr());
        for pair in regions.windows(2) {
            let (lower, higher) = (pair[0].guest_addr(), pair[1].guest_addr());
            if higher - lower < pair[0].len() {
                return Err(BadMemory::Overlap { lower, higher });
            }
        }
        Ok(GuestMemory { regions: regions.into() })
    }

    /// The regions, by ascending guest address.
    pub fn regions(&self) -> &[Arc<GuestRegion>] {
        &self.regions
    }

    /// Access for the calling core. The regions stay mapped as long as the view does.
    pub fn view(&self) -> Rc<GuestView> {
        Rc::new(GuestView::new(Arc::clone(&self.regions)))
    }

    /// Translates an address of the process that owns the guest.
    pub fn user_to_guest(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = user_addr.checked_sub(r.user_addr())?;
            (offset < r.len()).then(|| r.guest_addr() + offset)
        })
    }

    /// Whether some region was truncated by its owner. The device should stop.
    pub fn is_poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.is_poisoned())
    }
}
