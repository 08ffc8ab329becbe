//! Rings and other structures in guest memory, accessed in place.

// UNSAFETY: guest memory changes under us, so access is volatile or atomic, by raw pointer.
#![expect(unsafe_code)]

use std::fmt;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::view::GuestView;
use crate::raw;
use crate::sg::OutOfBounds;

/// Contiguous guest memory that stays mapped as long as the slice.
///
/// Each access checks its bounds, and atomic ones their alignment; both answer [`OutOfBounds`].
/// Integers are in the machine's byte order (little-endian on every machine Penstock runs on, as
/// rings of NVMe and virtio are).
pub struct GuestSlice {
    /// Invariant: `len` bytes are mapped, readable and writable, while `view` lives.
    ptr: *mut u8,
    len: usize,
    view: Rc<GuestView>,
}

macro_rules! atomic {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        #[doc = concat!("Loads a `", stringify!($int), "` at `offset`, which must be aligned.")]
        ///
        /// `order` is `Relaxed`, `Acquire` or `SeqCst`.
        #[inline]
        pub fn $load(&self, offset: usize, order: Ordering) -> Result<$int, OutOfBounds> {
            let ptr = self.aligned::<$int>(offset)?;
            // SAFETY: in bounds and aligned (just checked), mapped (invariant); only atomic and
            // volatile accesses are made by us, and other processes' are outside the language's
            // memory model.
            let atomic = unsafe { <$atomic>::from_ptr(ptr) };
            Ok(atomic.load(order))
        }

        #[doc = concat!("Stores a `", stringify!($int), "` at `offset`, which must be aligned.")]
        ///
        /// `order` is `Relaxed`, `Release` or `SeqCst`.
        #[inline]
        pub fn $store(
            &self,
            offset: usize,
            value: $int,
            order: Ordering,
        ) -> Result<(), OutOfBounds> {
            let ptr = self.aligned::<$int>(offset)?;
            // SAFETY: as for the load.
            let atomic = unsafe { <$atomic>::from_ptr(ptr) };
            atomic.store(value, order);
            Ok(())
        }
    };
}

impl GuestSlice {
    /// # Safety
    ///
    /// `len` bytes at `ptr` are mapped, readable and writable, as long as `view` lives.
    pub(crate) unsafe fn new(ptr: *mut u8, len: usize, view: Rc<GuestView>) -> GuestSlice {
        GuestSlice { ptr, len, view }
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The view that keeps the memory mapped.
    pub fn view(&self) -> &Rc<GuestView> {
        &self.view
    }

    /// Copies `N` bytes out, touching each once: what is validated afterwards is this copy.
    #[inline]
    pub fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], OutOfBounds> {
        let ptr = self.at(offset, N)?;
        let mut bytes = [0; N];
        // SAFETY: in bounds (just checked) and mapped (invariant).
        unsafe { raw::read_volatile(ptr, &mut bytes) };
        Ok(bytes)
    }

    /// Writes `src`, touching each byte once. The order of bytes is not defined; publish with an
    /// atomic store.
    #[inline]
    pub fn write(&self, offset: usize, src: &[u8]) -> Result<(), OutOfBounds> {
        let ptr = self.at(offset, src.len())?;
        // SAFETY: in bounds (just checked) and mapped (invariant).
        unsafe { raw::write_volatile(ptr, src) };
        Ok(())
    }

    /// Sets bits of the byte at `offset`, which others may change at the same time.
    #[inline]
    pub fn set_bits_u8(&self, offset: usize, bits: u8, order: Ordering) -> Result<(), OutOfBounds> {
        let ptr = self.aligned::<u8>(offset)?;
        // SAFETY: as for the loads and stores below: in bounds, mapped, and accessed by us only
        // atomically or volatile.
        let atomic = unsafe { AtomicU8::from_ptr(ptr) };
        atomic.fetch_or(bits, order);
        Ok(())
    }

    /// Guest address of the first byte.
    pub fn guest_addr(&self) -> Option<u64> {
        self.view.guest_addr(self.ptr, self.len)
    }

    atomic!(load_u16, store_u16, u16, AtomicU16);
    atomic!(load_u32, store_u32, u32, AtomicU32);
    atomic!(load_u64, store_u64, u64, AtomicU64);

    #[inline]
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, OutOfBounds> {
        if offset <= self.len && len <= self.len - offset {
            Ok(self.ptr.wrapping_add(offset))
        } else {
            Err(OutOfBounds)
        }
    }

    #[inline]
    fn aligned<T>(&self, offset: usize) -> Result<*mut T, OutOfBounds> {
        let ptr = self.at(offset, size_of::<T>())?.cast::<T>();
        if ptr.is_aligned() { Ok(ptr) } else { Err(OutOfBounds) }
    }
}

impl fmt::Debug for GuestSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestSlice").field("len", &self.len).finish()
    }
}
