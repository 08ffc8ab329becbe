//! An owned `mmap`.

// UNSAFETY: mmap, madvise and munmap have no safe form in std.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// A mapping that is unmapped on drop. Its bytes are reached by raw pointers only.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory with no thread affinity; `Mapping` itself gives out nothing
// but a pointer.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the fields.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private zero pages that take memory only when touched.
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = Mapping::new(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
        // A core dump must not carry what a tenant stored. Failure changes nothing else.
        // SAFETY: the range is exactly the mapping just made.
        let _ = unsafe { libc::madvise(mapping.base.cast(), len, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }

    /// `len` bytes of a file from `offset`, shared with whoever else maps it. Both must suit the
    /// file's page size. Without `is_writable` a write to it is a fault, ours or the kernel's.
    pub(crate) fn file(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        is_writable: bool,
    ) -> io::Result<Mapping> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let prot = if is_writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let mapping = Mapping::new(len, prot, flags, fd.as_raw_fd(), offset)?;
        // SAFETY: the range is exactly the mapping just made.
        let _ = unsafe { libc::madvise(mapping.base.cast(), len, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }

    fn new(len: usize, prot: i32, flags: i32, fd: i32, offset: libc::off_t) -> io::Result<Mapping> {
        // SAFETY: no address is asked for, so no existing mapping is touched; the kernel checks fd,
        // offset and length.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { base: base.cast(), len })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Makes whole pages of an anonymous mapping read as zeros and gives their memory back.
    /// `offset` and `len` are page multiples inside the mapping.
    pub(crate) fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset <= self.len && len <= self.len - offset, "discard outside the mapping");
        // SAFETY: the range was just checked to be in the mapping; nobody holds references into it,
        // only raw pointers.
        let rc = unsafe {
            libc::madvise(self.base.wrapping_add(offset).cast(), len, libc::MADV_DONTNEED)
        };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of our own mmap, and whoever had pointers into it held
        // this mapping alive.
        let rc = unsafe { libc::munmap(self.base.cast(), self.len) };
        debug_assert_eq!(rc, 0, "munmap of our own mapping");
    }
}

/// Bytes in a page of this machine.
pub(crate) fn page_bytes() -> usize {
    // SAFETY: sysconf has no preconditions.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(page).unwrap_or(4096)
}
