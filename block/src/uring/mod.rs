//! Files and block devices, by direct I/O through the core's ring.
//!
//! ```text
//!   FileVolume::open (control plane) : lock, size, alignment, abilities
//!        │ open(core, depth)
//!        ▼
//!   channel: slot per I/O ─► piece (≤ 1 MiB, bounced if misaligned) ─► Port ─► next piece or done
//! ```
//!
//! | operation | in the kernel |
//! |---|---|
//! | read, write | `READV`, `WRITEV`, in pieces; short ones are continued. With `poll` through a
//! ring that asks the device instead of waiting for its interrupt |
//! | FUA | `RWF_DSYNC`, or `fdatasync` after a `fallocate` |
//! | flush | `fdatasync` |
//! | deallocate | `fallocate(PUNCH_HOLE)` |
//! | compare, verify | `READV` into memory of the core's pool |
//! | write zeroes | `fallocate(PUNCH_HOLE)`, or `ZERO_RANGE` to keep blocks allocated; else zeros
//! are written |
//!
//! # Limits
//!
//! - Acknowledged as durable means: in the hands of the device, past its cache. A process that is
//!   killed loses nothing that completed, durable or not, as the kernel has it; a machine that
//!   loses power loses what was not flushed.
//! - A file that is cut behind our back is noticed by [`Volume::refresh`]. Until then reads beyond
//!   its new end fail, and writes there make it longer again.
//! - I/O in the kernel is not taken back: `abort` returns only what waits for memory or a ring
//!   slot.
//! - Copy and reservations are refused: a file has no such operations of its own.
//! - Memory that does not suit direct I/O is copied through the core's pool, 128 KiB per I/O at a
//!   time; with the pool exhausted such I/O waits.
//! - Where direct I/O is not possible at all the volume works on the page cache, slowly, and says
//!   so
//!   in [`Volume::notices`].

mod channel;
mod open;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use reactor::{Local, SharedFd};

use crate::spec::OpenError;
use crate::volume::{Channel, Geometry, IO_BYTES_MAX, Identity, Volume};

/// How to open a file or block device.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// Size of a file that is not there yet or empty; an existing file keeps its own.
    pub size_bytes: Option<u64>,
    /// Logical block size, 512 or 4096; `None` takes 512 if the storage can do it, else 4096.
    pub block_bytes: Option<u32>,
    /// Refuse changes; the volume can then be shared with other readers.
    pub read_only: bool,
    /// Poll the device for reads and writes instead of waiting for its interrupts: shorter latency,
    /// at the price of a core that does not sleep while I/O is in flight. Refused where the device
    /// has no queues for it.
    pub poll: bool,
    /// How long to wait for another process to let go: one that was just killed still has I/O in
    /// the kernel, which must not land on top of ours.
    pub lock_wait: Duration,
}

impl Default for FileOptions {
    fn default() -> FileOptions {
        FileOptions {
            size_bytes: None,
            block_bytes: None,
            read_only: false,
            poll: false,
            lock_wait: Duration::from_secs(5),
        }
    }
}

/// What the backing object wants and can do. Fixed when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Logical block size; a power of two from 512, and a multiple of what direct I/O demands of
    /// offsets.
    pub block_bytes: u32,
    /// What the storage writes without reading first.
    pub physical_block_bytes: u32,
    /// Alignment that memory must have, a power of two; 1 without direct I/O.
    pub memory_align: u32,
    /// Smallest piece that can be deallocated.
    pub deallocate_granularity_bytes: u32,
    /// Refuse changes.
    pub read_only: bool,
    /// Whether to begin with `fallocate(PUNCH_HOLE)`.
    pub can_punch: bool,
    /// The storage's preferred unit of writes; 0 if it has none.
    pub optimal_io_bytes: u32,
    /// Reads and writes are polled.
    pub poll: bool,
}

impl Layout {
    /// Whether reads and writes go past the page cache.
    fn is_direct(&self) -> bool {
        self.memory_align > 1
    }
}

/// What all channels of a volume know. Relaxed throughout: each value stands for itself, and one
/// that is seen late is only a refusal or an attempt too many.
#[derive(Debug)]
struct Shared {
    layout: Layout,
    blocks: AtomicU64,
    /// `fallocate(PUNCH_HOLE)` works, as far as known.
    can_punch: AtomicBool,
    /// `fallocate(ZERO_RANGE)` works, as far as known.
    can_zero: AtomicBool,
    /// A flush of the page cache failed. The kernel says so once and then takes the lost pages for
    /// clean; we go on saying it.
    lost_writes: AtomicBool,
}

impl Shared {
    fn geometry(&self) -> Geometry {
        let can_punch = self.can_punch.load(Relaxed);
        Geometry {
            physical_block_bytes: self.layout.physical_block_bytes,
            io_bytes_max: IO_BYTES_MAX,
            read_only: self.layout.read_only,
            // The page cache or the device's own cache: flushing is never wrong.
            write_cache: true,
            deallocate: can_punch,
            write_zeroes: true,
            deallocate_granularity_bytes: self.layout.deallocate_granularity_bytes,
            deallocated_reads_zero: can_punch,
            optimal_io_bytes: self.layout.optimal_io_bytes,
            compare: true,
            verify: true,
            ..Geometry::new(self.layout.block_bytes, self.blocks.load(Relaxed))
        }
    }
}

/// A file or block device. See the module.
#[derive(Debug)]
pub struct FileVolume {
    shared: Arc<Shared>,
    identity: Identity,
    fd: SharedFd,
    /// For the control plane; shares lock and flags with `fd`. `None` for a simulated file.
    control: Option<File>,
    path: PathBuf,
    notices: Vec<String>,
}

impl FileVolume {
    /// Opens a file, and makes it first if it is not there and `size_bytes` says how large.
    ///
    /// The file is locked (`flock`) against other processes as long as the volume lives. Blocks up
    /// to `lock_wait`.
    pub fn open(
        path: &Path,
        identity: Identity,
        options: &FileOptions,
    ) -> Result<FileVolume, OpenError> {
        let found = open::file(path, options)?;
        FileVolume::from_found(path, identity, found)
    }

    /// Opens a block device for ourselves alone; refused while it is mounted or in use otherwise.
    ///
    /// Blocks up to `lock_wait`.
    pub fn open_device(
        path: &Path,
        identity: Identity,
        options: &FileOptions,
    ) -> Result<FileVolume, OpenError> {
        let found = open::device(path, options)?;
        FileVolume::from_found(path, identity, found)
    }

    fn from_found(
        path: &Path,
        identity: Identity,
        found: open::Found,
    ) -> Result<FileVolume, OpenError> {
        let data = found.file.try_clone();
        let data = data.map_err(|e| OpenError::io("cannot duplicate the descriptor", e))?;
        let mut volume = FileVolume::over(
            SharedFd::from(std::os::fd::OwnedFd::from(data)),
            identity,
            found.bytes,
            found.layout,
        );
        volume.control = Some(found.file);
        volume.path = path.to_owned();
        volume.notices = found.notices;
        Ok(volume)
    }

    /// A volume over an open file, real or simulated, that nobody looks at any closer.
    pub fn over(fd: SharedFd, identity: Identity, bytes: u64, layout: Layout) -> FileVolume {
        let shared = Shared {
            layout,
            blocks: AtomicU64::new(bytes / u64::from(layout.block_bytes)),
            can_punch: AtomicBool::new(layout.can_punch),
            can_zero: AtomicBool::new(true),
            lost_writes: AtomicBool::new(false),
        };
        let path = PathBuf::new();
        FileVolume {
            shared: Arc::new(shared),
            identity,
            fd,
            control: None,
            path,
            notices: Vec::new(),
        }
    }

    /// Makes a file larger: to `bytes`, which must be whole blocks and more than it has. May block.
    pub fn grow(&self, bytes: u64) -> io::Result<Geometry> {
        let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let now = self.refresh()?;
        let name = self.path.display();
        let Some(file) = &self.control else {
            return refuse("a simulated file does not grow".to_owned());
        };
        if now.read_only {
            return refuse(format!("{name} is open read-only"));
        }
        if !file.metadata()?.is_file() {
            return refuse(format!("{name} is a device: grow it by its own means, then refresh"));
        }
        if bytes <= now.bytes() || !bytes.is_multiple_of(u64::from(now.block_bytes)) {
            return refuse(format!(
                "{name} can grow from {} bytes to a larger multiple of {} bytes, not to {bytes}",
                now.bytes(),
                now.block_bytes,
            ));
        }
        file.set_len(bytes)?;
        file.sync_all()?;
        self.refresh()
    }
}

impl Volume for FileVolume {
    fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn open(&self, local: &Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        let shared = Arc::clone(&self.shared);
        let channel = channel::FileChannel::new(local, self.fd.clone(), shared, depth)?;
        Ok(Box::new(channel))
    }

    fn refresh(&self) -> io::Result<Geometry> {
        if let Some(file) = &self.control {
            let bytes = open::size(file)?;
            self.shared.blocks.store(bytes / u64::from(self.shared.layout.block_bytes), Relaxed);
        }
        Ok(self.geometry())
    }

    fn used_bytes(&self) -> Option<u64> {
        // A device has no count of what is in use on it.
        let meta = self.control.as_ref()?.metadata().ok().filter(|meta| meta.is_file())?;
        // `st_blocks` counts units of 512 bytes on every file system, also metadata on some.
        Some(meta.blocks().saturating_mul(512).min(self.geometry().bytes()))
    }

    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }
}
