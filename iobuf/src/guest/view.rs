//! A core's access to guest memory.

// UNSAFETY: guest memory changes under us, which references cannot express.
#![expect(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use super::region::GuestRegion;
use super::slice::GuestSlice;
use crate::raw;
use crate::sg::{Hold, Segment, SgList};

/// Guest addresses that are not (all) memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress {
    /// First address asked for.
    pub addr: u64,
    /// Bytes asked for.
    pub len: u64,
}

impl fmt::Display for BadAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no guest memory at {:#x}, {} bytes", self.addr, self.len)
    }
}

impl std::error::Error for BadAddress {}

/// A region, flattened for the look-up.
#[derive(Clone, Copy)]
struct Row {
    guest_addr: u64,
    len: u64,
    base: *mut u8,
    is_writable: bool,
}

/// What is going to happen to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

impl Row {
    fn allows(&self, access: Access) -> bool {
        self.is_writable || access == Access::Read
    }
}

/// One core's access to a [`GuestMemory`](super::GuestMemory), and the hold of lists made from it.
///
/// Small reads and writes touch each byte once; larger ones are one opaque copy.
pub struct GuestView {
    /// By ascending guest address, no overlap (checked by `GuestMemory::new`).
    rows: Vec<Row>,
    /// The row found last: requests mostly stay in one region.
    last: Cell<usize>,
    /// Keeps what `rows` points into mapped.
    regions: Arc<[Arc<GuestRegion>]>,
}

/// Up to this size `read` and `write` go word by word, without a call: a queue entry.
const SMALL_BYTES: usize = 64;

impl GuestView {
    pub(crate) fn new(regions: Arc<[Arc<GuestRegion>]>) -> GuestView {
        let row = |r: &Arc<GuestRegion>| Row {
            guest_addr: r.guest_addr(),
            len: r.len(),
            base: r.base(),
            is_writable: r.is_writable(),
        };
        GuestView { rows: regions.iter().map(row).collect(), last: Cell::new(0), regions }
    }

    /// Lists, slices and clones that still use this view. A change of the memory map may be
    /// confirmed to the guest's owner when it is 0.
    pub fn users(self: &Rc<Self>) -> usize {
        Rc::strong_count(self) - 1
    }

    /// Whether some region was truncated by its owner. The device should stop.
    pub fn is_poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.is_poisoned())
    }

    /// Appends `len` bytes of guest memory at `addr` to `sg`, going on into adjacent regions. On
    /// error `sg` is unchanged. Memory that must not be written to is an error.
    ///
    /// # Panics
    ///
    /// If `sg` has segments of the pool or of another view.
    #[inline]
    pub fn append(self: &Rc<Self>, sg: &mut SgList, addr: u64, len: u64) -> Result<(), BadAddress> {
        if len == 0 {
            return Ok(());
        }
        match self.find(addr) {
            Some((row, offset)) if len <= row.len - offset && row.is_writable => {
                self.append_in(sg, &row, offset, len);
                Ok(())
            }
            _ => self.append_over(sg, addr, len, Access::Write),
        }
    }

    /// As [`GuestView::append`], for a list that is only read from: the data of a write to a
    /// volume, which may lie in a ROM. Who writes to such a list all the same faults.
    ///
    /// # Panics
    ///
    /// As [`GuestView::append`].
    pub fn append_source(
        self: &Rc<Self>,
        sg: &mut SgList,
        addr: u64,
        len: u64,
    ) -> Result<(), BadAddress> {
        self.append_over(sg, addr, len, Access::Read)
    }

    /// A piece inside one region, for rings and other structures that are accessed in place.
    pub fn slice(self: &Rc<Self>, addr: u64, len: u64) -> Result<GuestSlice, BadAddress> {
        match self.find(addr) {
            Some((row, offset)) if len <= row.len - offset && row.is_writable => {
                let ptr = row.base.wrapping_add(offset as usize);
                // SAFETY: `offset + len` is inside the region, which this view keeps mapped.
                Ok(unsafe { GuestSlice::new(ptr, len as usize, Rc::clone(self)) })
            }
            _ => Err(BadAddress { addr, len }),
        }
    }

    /// Copies `dst.len()` bytes at `addr` out of guest memory. On error `dst` may be partly
    /// overwritten.
    #[inline]
    pub fn read(&self, addr: u64, dst: &mut [u8]) -> Result<(), BadAddress> {
        if dst.len() <= SMALL_BYTES
            && let Some((row, offset)) = self.find(addr)
            && dst.len() as u64 <= row.len - offset
        {
            // SAFETY: the range was just checked to be inside the region, which this view keeps
            // mapped.
            unsafe { raw::read_volatile(row.base.wrapping_add(offset as usize), dst) };
            return Ok(());
        }
        self.each(addr, dst.len(), Access::Read, |memory, at, part| {
            let to = &mut dst[at..at + part];
            // SAFETY: `each` passes a range inside a region, which this view keeps mapped.
            unsafe { raw::copy(memory, to.as_mut_ptr(), part) }
        })
    }

    /// Copies `src` to guest memory at `addr`; on error nothing is copied.
    #[inline]
    pub fn write(&self, addr: u64, src: &[u8]) -> Result<(), BadAddress> {
        if src.len() <= SMALL_BYTES
            && let Some((row, offset)) = self.find(addr)
            && src.len() as u64 <= row.len - offset
            && row.is_writable
        {
            // SAFETY: the range was just checked to be inside the region, which this view keeps
            // mapped.
            unsafe { raw::write_volatile(row.base.wrapping_add(offset as usize), src) };
            return Ok(());
        }
        self.each(addr, src.len(), Access::Write, |memory, at, part| {
            let from = &src[at..at + part];
            // SAFETY: `each` passes a range inside a region, which this view keeps mapped.
            unsafe { raw::copy(from.as_ptr(), memory, part) }
        })
    }

    /// Where `len` bytes of our memory are in guest addresses: the way back from a segment that
    /// [`GuestView::append`] made. `None` if they are not inside one region of this view.
    pub fn guest_addr(&self, ptr: *const u8, len: usize) -> Option<u64> {
        self.rows.iter().find_map(|row| {
            let offset = (ptr.addr() as u64).checked_sub(row.base.addr() as u64)?;
            let is_inside = offset < row.len && len as u64 <= row.len - offset;
            is_inside.then(|| row.guest_addr + offset)
        })
    }

    /// The region that `addr` lies in, and the offset there (less than its length).
    #[inline]
    fn find(&self, addr: u64) -> Option<(Row, u64)> {
        if let Some(row) = self.rows.get(self.last.get()) {
            let offset = addr.wrapping_sub(row.guest_addr);
            if offset < row.len {
                return Some((*row, offset));
            }
        }
        self.search(addr)
    }

    fn search(&self, addr: u64) -> Option<(Row, u64)> {
        let index = self.rows.partition_point(|r| r.guest_addr <= addr).checked_sub(1)?;
        let row = self.rows[index];
        let offset = addr - row.guest_addr;
        if offset >= row.len {
            return None;
        }
        self.last.set(index);
        Some((row, offset))
    }

    #[inline]
    fn append_in(self: &Rc<Self>, sg: &mut SgList, row: &Row, offset: u64, len: u64) {
        let base = row.base.wrapping_add(offset as usize);
        // Pages that follow each other become one segment.
        if offset > 0
            && let Some(last) = sg.segments().last()
            && last.as_ptr().wrapping_add(last.len()) == base
            && last.as_ptr().addr() >= row.base.addr()
            && sg.is_held_by(self)
        {
            // SAFETY: the longer segment is inside the same region, which the list's hold (this
            // view) keeps mapped.
            unsafe { sg.grow_last(len as usize) };
            return;
        }
        // SAFETY: the caller checked that `offset + len` is inside the region, which this view
        // keeps mapped; its `release` does nothing.
        unsafe { sg.append(self, Segment::new(base, len as usize)) };
    }

    #[cold]
    fn append_over(
        self: &Rc<Self>,
        sg: &mut SgList,
        addr: u64,
        len: u64,
        access: Access,
    ) -> Result<(), BadAddress> {
        self.each_row(addr, len, access, |row, offset, part| self.append_in(sg, row, offset, part))
    }

    fn each(
        &self,
        addr: u64,
        len: usize,
        access: Access,
        mut f: impl FnMut(*mut u8, usize, usize),
    ) -> Result<(), BadAddress> {
        let mut at = 0;
        self.each_row(addr, len as u64, access, |row, offset, part| {
            f(row.base.wrapping_add(offset as usize), at, part as usize);
            at += part as usize;
        })
    }

    /// Calls `f(region, offset, bytes)` for each region that the range crosses; not at all if some
    /// part of the range is no memory, or not for this.
    fn each_row(
        &self,
        addr: u64,
        len: u64,
        access: Access,
        mut f: impl FnMut(&Row, u64, u64),
    ) -> Result<(), BadAddress> {
        let bad = BadAddress { addr, len };
        for apply in [false, true] {
            let (mut addr, mut left) = (addr, len);
            while left > 0 {
                let (row, offset) = self.find(addr).ok_or(bad)?;
                if !row.allows(access) {
                    return Err(bad);
                }
                let part = left.min(row.len - offset);
                if apply {
                    f(&row, offset, part);
                }
                left -= part;
                // No region ends beyond the last address; `GuestRegion::map` checked it.
                addr += part;
            }
        }
        Ok(())
    }
}

impl Hold for GuestView {
    fn retain(&self, _: &[Segment]) {}

    fn release(&self, _: &[Segment]) {}
}

impl fmt::Debug for GuestView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestView").field("regions", &self.regions.len()).finish()
    }
}
