//! Interrupts: which eventfd a vector has, what is masked, and which cores have to look again.
//!
//! The control thread changes the table, cores read it. A core keeps a copy and takes a lock only
//! when the table has changed since, which a guest causes when it sets up its interrupts.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::record::QUEUES_MAX;

/// Vectors of the MSI-X table: one for each queue.
pub const VECTORS: u16 = QUEUES_MAX;

/// What is set up now.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Eventfds of the vectors.
    pub msix: Vec<Option<Arc<OwnedFd>>>,
    /// Masked vectors.
    pub msix_masked: Vec<bool>,
    /// Eventfd of the INTx line, if the line is used and MSI-X is not.
    pub intx: Option<Arc<OwnedFd>>,
    /// The line waits for the client to unmask it.
    pub intx_masked: bool,
    /// The line is masked by the host (INTMS), or disabled in its command register.
    pub intx_disabled: bool,
    /// MSI-X is enabled: the line is not used.
    pub is_msix: bool,
    /// The function may write to memory, which is what MSI-X does.
    pub is_master: bool,
}

/// The table that control thread and cores share.
#[derive(Debug, Default)]
pub struct Vectors {
    /// Counts changes. Written under the lock with Release, read without it with Acquire: who sees
    /// a new number takes the lock, and so sees the change.
    changes: AtomicU64,
    setup: Mutex<Setup>,
}

impl Vectors {
    /// Changes the set-up. Cores have to be woken afterwards.
    pub fn change<R>(&self, change: impl FnOnce(&mut Setup) -> R) -> R {
        let mut setup = self.setup.lock().unwrap_or_else(PoisonError::into_inner);
        setup.msix.resize(usize::from(VECTORS), None);
        setup.msix_masked.resize(usize::from(VECTORS), false);
        let result = change(&mut setup);
        self.changes.fetch_add(1, Ordering::Release);
        result
    }

    /// INTx was signalled: it is masked until the client says otherwise. False if it was already.
    fn take_intx(&self) -> bool {
        self.change(|setup| !std::mem::replace(&mut setup.intx_masked, true))
    }
}

/// Signals an eventfd. A full counter means that the reader has been told already.
pub(crate) fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// A core's copy of the table.
#[derive(Debug)]
pub struct Interrupts {
    shared: Arc<Vectors>,
    seen: u64,
    setup: Setup,
}

impl Interrupts {
    /// A copy that is refreshed at the first look.
    pub fn new(shared: Arc<Vectors>) -> Interrupts {
        Interrupts { shared, seen: u64::MAX, setup: Setup::default() }
    }

    /// Takes up changes. True if there were some: what was raised while nobody listened, or while
    /// it was masked, is to be raised again.
    #[inline]
    pub fn refresh(&mut self) -> bool {
        let changes = self.shared.changes.load(Ordering::Acquire);
        if changes == self.seen {
            return false;
        }
        self.setup = self.shared.setup.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.seen = changes;
        true
    }

    /// Raises a vector. False if it cannot be now, and should be after the next change.
    pub fn raise(&mut self, vector: u16) -> bool {
        if self.setup.is_msix {
            let index = usize::from(vector);
            let is_masked = self.setup.msix_masked.get(index).is_none_or(|masked| *masked);
            return match self.setup.msix.get(index) {
                Some(Some(eventfd)) if !is_masked && self.setup.is_master => {
                    signal(eventfd);
                    true
                }
                _ => false,
            };
        }
        let Some(intx) = self.setup.intx.clone() else { return false };
        if self.setup.intx_masked || self.setup.intx_disabled || !self.shared.take_intx() {
            return false;
        }
        signal(&intx);
        true
    }
}
