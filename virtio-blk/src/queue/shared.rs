//! Memory that the device writes and others see: rings, the record of requests in flight, status
//! bytes. One place for what goes with each such write: the log of dirty pages.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use iobuf::{GuestSlice, GuestView, OutOfBounds};

/// The pages of guest memory that a migration has to copy again (vhost-user protocol,
/// "Migration"): one bit for each page of 4 KiB, from guest address 0 on.
#[derive(Clone, Debug)]
pub struct DirtyLog {
    bitmap: Rc<GuestSlice>,
    is_marked: Rc<Cell<bool>>,
}

/// `VHOST_LOG_PAGE`.
const PAGE_BYTES: u64 = 0x1000;

impl DirtyLog {
    /// Mark in `bitmap`.
    pub fn new(bitmap: GuestSlice) -> DirtyLog {
        DirtyLog { bitmap: Rc::new(bitmap), is_marked: Rc::default() }
    }

    /// `len` bytes at `addr` have been written. To be called after the write: a page that is copied
    /// between its mark and the write would be lost.
    ///
    /// Pages beyond the bitmap are passed over: its length is the owner's to choose, and "should be
    /// large enough to cover all known guest addresses".
    pub fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| addr.checked_add(more)) else { return };
        for page in addr / PAGE_BYTES..=last / PAGE_BYTES {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            // "Use atomic operations, as the log may be concurrently manipulated."
            if self.bitmap.set_bits_u8(byte, 1 << (page % 8), Ordering::SeqCst).is_err() {
                return;
            }
        }
        self.is_marked.set(true);
    }

    /// Whether something was marked since the last time.
    pub fn take_marked(&self) -> bool {
        self.is_marked.take()
    }
}

/// A piece of shared memory that the device writes.
#[derive(Debug)]
pub(crate) struct Shared {
    slice: GuestSlice,
    /// With the address that the first byte has there.
    log: Option<(DirtyLog, u64)>,
}

macro_rules! forward {
    ($load:ident, $store:ident, $int:ty) => {
        #[inline]
        pub(crate) fn $load(&self, offset: usize, order: Ordering) -> Result<$int, OutOfBounds> {
            self.slice.$load(offset, order)
        }

        #[inline]
        pub(crate) fn $store(
            &self,
            offset: usize,
            value: $int,
            order: Ordering,
        ) -> Result<(), OutOfBounds> {
            #[cfg(test)]
            if !cut::step() {
                return Ok(());
            }
            self.slice.$store(offset, value, order)?;
            self.mark(offset, size_of::<$int>());
            Ok(())
        }
    };
}

#[allow(dead_code, reason = "the widths are made alike")]
impl Shared {
    pub(crate) fn new(slice: GuestSlice) -> Shared {
        Shared { slice, log: None }
    }

    /// Mark writes from now on, the first byte of this memory being at `addr` of the log.
    pub(crate) fn set_log(&mut self, log: Option<(DirtyLog, u64)>) {
        self.log = log;
    }

    pub(crate) fn view(&self) -> &Rc<GuestView> {
        self.slice.view()
    }

    pub(crate) fn guest_addr(&self) -> Option<u64> {
        self.slice.guest_addr()
    }

    pub(crate) fn len(&self) -> usize {
        self.slice.len()
    }

    #[inline]
    pub(crate) fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], OutOfBounds> {
        self.slice.read(offset)
    }

    #[inline]
    pub(crate) fn write(&self, offset: usize, src: &[u8]) -> Result<(), OutOfBounds> {
        #[cfg(test)]
        if !cut::step() {
            return Ok(());
        }
        self.slice.write(offset, src)?;
        self.mark(offset, src.len());
        Ok(())
    }

    forward!(load_u16, store_u16, u16);
    forward!(load_u32, store_u32, u32);
    forward!(load_u64, store_u64, u64);

    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if let Some((log, addr)) = &self.log {
            log.mark(addr.saturating_add(offset as u64), len as u64);
        }
    }
}

/// A device that dies at a given write: nothing that it would do later reaches anybody. For tests,
/// which then let another device go on with the memory that is left.
#[cfg(test)]
pub(crate) mod cut {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// Die after `steps` writes.
    pub(crate) fn after(steps: u64) {
        LEFT.set(steps);
    }

    /// Live on.
    pub(crate) fn never() {
        LEFT.set(u64::MAX);
    }

    /// Writes until it dies.
    pub(crate) fn left() -> u64 {
        LEFT.get()
    }

    pub(crate) fn is_dead() -> bool {
        LEFT.get() == 0
    }

    /// Something becomes visible to others. False: it does not, the device is dead.
    #[inline]
    pub(crate) fn step() -> bool {
        match LEFT.get() {
            u64::MAX => true,
            0 => false,
            left => {
                LEFT.set(left - 1);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMemory;

    #[test]
    fn pages_are_marked_after_the_write() {
        let (guest, bitmap) = (TestMemory::new(0x4000), TestMemory::new(4));
        let log = DirtyLog::new(bitmap.view().slice(bitmap.base(), 4).unwrap());
        assert!(!log.take_marked());
        log.mark(0, 0);
        assert!(!log.take_marked());
        log.mark(0x0fff, 2);
        log.mark(0x9000, 0x1000);
        assert!(log.take_marked() && !log.take_marked());
        assert_eq!(bitmap.read(bitmap.base(), 4), [3, 2, 0, 0]);
        // Not covered, or no address at all.
        log.mark(0x1f_f000, u64::MAX);
        log.mark(32 * 0x1000, 1);
        assert_eq!(bitmap.read(bitmap.base(), 4), [3, 2, 0, 0]);
        log.mark(31 * 0x1000, 0x2000);
        assert_eq!(bitmap.read(bitmap.base(), 4), [3, 2, 0, 0x80]);

        let mut shared = Shared::new(guest.view().slice(guest.base(), 0x2000).unwrap());
        shared.store_u16(0, 1, Ordering::Relaxed).unwrap();
        shared.set_log(Some((log, 0x4800)));
        shared.write(0x7ff, &[1, 2]).unwrap();
        assert!(shared.write(0x2000, &[1]).is_err());
        assert_eq!(bitmap.read(bitmap.base(), 4), [0x33, 2, 0, 0x80]);
    }
}
