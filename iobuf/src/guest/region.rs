//! One mapped piece of guest memory.

// UNSAFETY: fstat and fstatfs have no safe form for a borrowed descriptor.
#![expect(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use crate::mapping::{Mapping, page_bytes};
use crate::sigbus::{self, Slot};

/// A piece of guest memory, mapped from a file that the guest's owner passed to us.
///
/// Shared by all cores and unmapped when the last user lets go. If the file is truncated later, the
/// region turns into zero pages and says so by [`GuestRegion::is_poisoned`]: the process survives,
/// and the device should stop.
#[derive(Debug)]
pub struct GuestRegion {
    // Unregistered (in `drop`) before `map` is unmapped, as fields drop afterwards.
    slot: &'static Slot,
    map: Mapping,
    /// First byte of the region in `map`: the file offset need not be a page multiple.
    delta: usize,
    len: usize,
    guest_addr: u64,
    user_addr: u64,
    is_writable: bool,
}

impl GuestRegion {
    /// Maps `size` bytes of `fd` from `offset`, which the guest knows as `guest_addr` and the
    /// guest's owner as `user_addr` (0 if it does not matter).
    ///
    /// Refused: anything but a regular file (memfd, shared memory and hugetlbfs files are), a range
    /// beyond its end, no bytes, and addresses that wrap around.
    pub fn map(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        guest_addr: u64,
        user_addr: u64,
    ) -> io::Result<Arc<GuestRegion>> {
        GuestRegion::map_as(fd, offset, size, guest_addr, user_addr, true)
    }

    /// As [`GuestRegion::map`], of memory that the guest does not let us write to: a ROM. A view
    /// reads it and refuses everything else.
    pub fn map_read_only(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        guest_addr: u64,
        user_addr: u64,
    ) -> io::Result<Arc<GuestRegion>> {
        GuestRegion::map_as(fd, offset, size, guest_addr, user_addr, false)
    }

    fn map_as(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        guest_addr: u64,
        user_addr: u64,
        is_writable: bool,
    ) -> io::Result<Arc<GuestRegion>> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        if size == 0 {
            return Err(invalid("guest region of 0 bytes".to_owned()));
        }
        if guest_addr.checked_add(size).is_none() || user_addr.checked_add(size).is_none() {
            return Err(invalid(format!(
                "guest region of {size} bytes wraps around the address space"
            )));
        }
        let (file_bytes, page) = file_size(fd)?;
        match offset.checked_add(size) {
            Some(end) if end <= file_bytes => {}
            _ => {
                return Err(invalid(format!(
                    "guest region at offset {offset} with {size} bytes ends beyond its file of {file_bytes} bytes"
                )));
            }
        }
        let delta = offset % page;
        let map_len =
            (delta + size).checked_next_multiple_of(page).and_then(|len| usize::try_from(len).ok());
        let map_len = map_len.ok_or_else(|| invalid(format!("guest region of {size} bytes")))?;
        let map = Mapping::file(fd, offset - delta, map_len, is_writable)?;
        let slot = sigbus::register(map.base(), map.len())?;
        // Both fit: they are parts of `map_len`.
        let (delta, len) = (delta as usize, size as usize);
        Ok(Arc::new(GuestRegion { slot, map, delta, len, guest_addr, user_addr, is_writable }))
    }

    /// First guest address.
    pub fn guest_addr(&self) -> u64 {
        self.guest_addr
    }

    /// First address in the process that owns the guest.
    pub fn user_addr(&self) -> u64 {
        self.user_addr
    }

    /// Size in bytes, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether we may write to it.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Whether the file was truncated under us: contents are lost, and what is written reaches
    /// nobody.
    pub fn is_poisoned(&self) -> bool {
        self.slot.is_poisoned()
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.map.base().wrapping_add(self.delta)
    }
}

impl Drop for GuestRegion {
    fn drop(&mut self) {
        sigbus::unregister(self.slot);
    }
}

/// Bytes in a regular file, and the page size of mappings of it.
fn file_size(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    // SAFETY: stat is plain data for which zeros are valid.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open (borrowed) and `stat` is a valid place.
    if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "guest memory is not a regular file",
        ));
    }
    // SAFETY: statfs is plain data for which zeros are valid.
    let mut fs: libc::statfs = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open (borrowed) and `fs` is a valid place.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), &mut fs) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let small = page_bytes() as u64;
    let page =
        if fs.f_type == libc::HUGETLBFS_MAGIC { small.max(fs.f_bsize as u64) } else { small };
    Ok((stat.st_size as u64, page))
}
