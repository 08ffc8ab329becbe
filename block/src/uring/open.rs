//! Opening: everything that may block, done once on the control plane.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use iobuf::SgList;
use reactor::{Core, CoreConfig, Fd};
use rustix::fs::{AtFlags, FallocateFlags, OFlags, StatxFlags};

use super::{FileOptions, Layout};
use crate::spec::OpenError;
use crate::volume::IO_BYTES_MAX;

/// An opened object and what was learned about it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) file: File,
    pub(super) bytes: u64,
    pub(super) layout: Layout,
    pub(super) notices: Vec<String>,
}

/// Pause between attempts to get a lock.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

pub(super) fn file(path: &Path, options: &FileOptions) -> Result<Found, OpenError> {
    let (file, is_new) = match fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => {
            return Err(OpenError::new("it is a block device; write blockdev: instead of file:"));
        }
        Ok(meta) if !meta.is_file() => {
            return Err(OpenError::new("it is neither a file nor a block device"));
        }
        Ok(_) => (open_existing(path, options)?, false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => (create(path, options)?, true),
        Err(e) => return Err(OpenError::io("cannot look at the path", e)),
    };
    let ready = examine(path, file, options);
    if ready.is_err() && is_new {
        // Nobody has used it: leave nothing half made. If this fails, the next open completes it.
        let _ = fs::remove_file(path);
    }
    ready
}

/// Locks a file, gives it its size if it has none, and finds out what it can do.
fn examine(path: &Path, file: File, options: &FileOptions) -> Result<Found, OpenError> {
    let (bytes, mut notices) = prepare_file(path, &file, options)?;
    let meta = file.metadata().map_err(|e| OpenError::io("cannot look at the file", e))?;
    let storage_block = power_of_two(meta.blksize(), 4096);
    let direct = direct_io(&file, None, &mut notices);
    let block_bytes = pick_block(options.block_bytes, direct.map(|d| d.unit), &mut notices)?;
    if direct.is_none() {
        buffered(&file, &notices)?;
    }
    let can_punch = !options.read_only && punches_holes(&file, bytes);
    let found =
        finish(file, bytes, direct, block_bytes, storage_block, can_punch, options, notices)?;
    if options.poll {
        // A file system passes polling on to the one device it is on, if it does at all.
        check_poll(&found, direct, meta.dev())?;
    }
    Ok(found)
}

pub(super) fn device(path: &Path, options: &FileOptions) -> Result<Found, OpenError> {
    let meta = fs::metadata(path).map_err(|e| OpenError::io("cannot look at the path", e))?;
    if !meta.file_type().is_block_device() {
        return Err(OpenError::new("it is not a block device; write file: for a file"));
    }
    if options.size_bytes.is_some() {
        return Err(OpenError::new("a block device has its own size; leave size= out"));
    }
    // O_EXCL on a block device: not while it is mounted, part of an array, or open like this.
    let exclusive = OFlags::EXCL.bits() as i32;
    let mut open = OpenOptions::new();
    open.read(true).write(!options.read_only).custom_flags(exclusive);
    let file = wait(options.lock_wait, || match open.open(path) {
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(None),
        other => other.map(Some),
    });
    let file = match file {
        Ok(Some(file)) => file,
        Ok(None) => {
            return Err(OpenError::new(
                "it is in use: mounted, part of another device, or open in another program",
            ));
        }
        Err(e) => return Err(OpenError::io("cannot open it", e)),
    };
    let bytes = size(&file).map_err(|e| OpenError::io("cannot read its size", e))?;
    let logical = rustix::fs::ioctl_blksszget(&file)
        .map_err(|e| OpenError::io("cannot read its logical block size", e.into()))?;
    let physical = rustix::fs::ioctl_blkpbszget(&file)
        .map_err(|e| OpenError::io("cannot read its physical block size", e.into()))?;
    let mut notices = Vec::new();
    let direct = direct_io(&file, Some(logical), &mut notices);
    let block_bytes = pick_block(options.block_bytes, direct.map(|d| d.unit), &mut notices)?;
    if direct.is_none() {
        buffered(&file, &notices)?;
    }
    // Punching a hole in a device is writing zeroes with leave to unmap.
    let can_punch =
        !options.read_only && queue_limit(meta.rdev(), "write_zeroes_max_bytes").unwrap_or(0) > 0;
    let storage_block = power_of_two(u64::from(physical), 4096);
    let mut found =
        finish(file, bytes, direct, block_bytes, storage_block, can_punch, options, notices)?;
    if let Some(granularity) = queue_limit(meta.rdev(), "discard_granularity")
        && let Ok(granularity) = u32::try_from(granularity)
    {
        let layout = &mut found.layout;
        layout.deallocate_granularity_bytes = granularity.max(layout.block_bytes);
    }
    found.layout.optimal_io_bytes =
        optimal(queue_limit(meta.rdev(), "optimal_io_size"), block_bytes);
    if options.poll {
        check_poll(&found, direct, meta.rdev())?;
    }
    Ok(found)
}

#[expect(clippy::too_many_arguments, reason = "the common end of two openers")]
fn finish(
    file: File,
    bytes: u64,
    direct: Option<Direct>,
    block_bytes: u32,
    storage_block: u32,
    can_punch: bool,
    options: &FileOptions,
    mut notices: Vec<String>,
) -> Result<Found, OpenError> {
    if bytes < u64::from(block_bytes) {
        return Err(OpenError::new(format!(
            "it has {bytes} bytes, less than one block of {block_bytes}"
        )));
    }
    let rest = bytes % u64::from(block_bytes);
    if rest != 0 {
        notices.push(format!(
            "its size of {bytes} bytes is not a multiple of the block size of {block_bytes} bytes; \
             the last {rest} bytes are not used"
        ));
    }
    let layout = Layout {
        block_bytes,
        physical_block_bytes: storage_block.max(block_bytes),
        memory_align: direct.map_or(1, |d| d.memory),
        deallocate_granularity_bytes: storage_block.max(block_bytes),
        read_only: options.read_only,
        can_punch,
        optimal_io_bytes: 0,
        poll: options.poll,
    };
    Ok(Found { file, bytes, layout, notices })
}

fn open_existing(path: &Path, options: &FileOptions) -> Result<File, OpenError> {
    OpenOptions::new().read(true).write(!options.read_only).open(path).map_err(|e| {
        let hint = e.kind() == io::ErrorKind::PermissionDenied && !options.read_only;
        OpenError::io(if hint { "cannot open it for writing" } else { "cannot open it" }, e)
    })
}

fn create(path: &Path, options: &FileOptions) -> Result<File, OpenError> {
    if options.size_bytes.is_none() {
        return Err(OpenError::new("there is no such file; add size=SIZE to make it"));
    }
    if options.read_only {
        return Err(OpenError::new("there is no such file, and a read-only one is not made"));
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| OpenError::io("cannot make the file", e))
}

/// Locks the file and gives it its size if it has none. Returns the size, and what to say about it.
fn prepare_file(
    path: &Path,
    file: &File,
    options: &FileOptions,
) -> Result<(u64, Vec<String>), OpenError> {
    let locked = wait(options.lock_wait, || {
        let lock = if options.read_only { file.try_lock_shared() } else { file.try_lock() };
        match lock {
            Ok(()) => Ok(Some(())),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    });
    match locked {
        Ok(Some(())) => {}
        Ok(None) => {
            return Err(OpenError::new(format!(
                "another process has it locked and did not let go within {} s",
                options.lock_wait.as_secs_f32()
            )));
        }
        Err(e) => return Err(OpenError::io("cannot lock it", e)),
    }
    let bytes = size(file).map_err(|e| OpenError::io("cannot read its size", e))?;
    let Some(wanted) = options.size_bytes else { return Ok((bytes, Vec::new())) };
    if bytes == 0 && !options.read_only {
        file.set_len(wanted)
            .map_err(|e| OpenError::io(format!("cannot make it {wanted} bytes long"), e))?;
        // The name and the size survive a loss of power from here on.
        file.sync_all().map_err(|e| OpenError::io("cannot sync it", e))?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))
            .and_then(|dir| dir.sync_all())
            .map_err(|e| OpenError::io("cannot sync its directory", e))?;
        return Ok((wanted, Vec::new()));
    }
    let mut notices = Vec::new();
    if bytes != wanted {
        notices.push(format!(
            "it has {bytes} bytes and keeps them, although {wanted} were asked for; growing is a \
             step of its own"
        ));
    }
    Ok((bytes, notices))
}

/// Tries until there is something, or the time is over (`None`).
fn wait<T>(
    limit: Duration,
    mut attempt: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let end = Instant::now() + limit;
    loop {
        match attempt() {
            Ok(None) if Instant::now() < end => thread::sleep(LOCK_PAUSE),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

pub(super) fn size(mut file: &File) -> io::Result<u64> {
    // Also right for block devices, where metadata says 0.
    file.seek(SeekFrom::End(0))
}

/// What direct I/O demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Direct {
    /// Of offsets and lengths.
    unit: u32,
    /// Of memory.
    memory: u32,
}

/// Switches direct I/O on and finds out what it demands; `None` if it cannot be had.
fn direct_io(file: &File, logical: Option<u32>, notices: &mut Vec<String>) -> Option<Direct> {
    let switched = rustix::fs::fcntl_getfl(file)
        .and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT));
    if let Err(e) = switched {
        notices.push(format!(
            "direct I/O (O_DIRECT) is refused here ({}): the page cache is used, which is much \
             slower",
            io::Error::from(e)
        ));
        return None;
    }
    let stated = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    if let Some(stat) = stated
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let (unit, memory) = (stat.stx_dio_offset_align, stat.stx_dio_mem_align);
        if unit == 0 || memory == 0 {
            notices.push(
                "the file system does no direct I/O on this file: the page cache is used, which is \
                 much slower"
                    .to_owned(),
            );
            return None;
        }
        return Some(Direct { unit, memory: power_of_two(u64::from(memory), 4096) });
    }
    if let Some(logical) = logical {
        return Some(Direct { unit: logical, memory: logical.max(512) });
    }
    // Neither the kernel nor the file system says: a read of one small block shows it.
    let unit = if reads_unaligned(file) { 512 } else { 4096 };
    Some(Direct { unit, memory: unit })
}

/// Whether 512 bytes at offset 512 can be read into memory aligned to 512.
fn reads_unaligned(file: &File) -> bool {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Page([0; 4096]);
    file.read_at(&mut page.0[512..1024], 512).is_ok()
}

/// Switches direct I/O off again.
fn buffered(file: &File, notices: &[String]) -> Result<(), OpenError> {
    let flags = rustix::fs::fcntl_getfl(file);
    let switched =
        flags.and_then(|flags| rustix::fs::fcntl_setfl(file, flags.difference(OFlags::DIRECT)));
    switched.map_err(|e| OpenError::io(notices.join("; "), e.into()))
}

/// The logical block size, from what was asked for and what direct I/O can do.
fn pick_block(
    wanted: Option<u32>,
    unit: Option<u32>,
    notices: &mut Vec<String>,
) -> Result<u32, OpenError> {
    let unit = unit.unwrap_or(1);
    match wanted {
        Some(block) if unit > block => Err(OpenError::new(format!(
            "a block size of {block} is not possible: direct I/O works in units of {unit} bytes \
             here{}",
            if unit <= 4096 { "; use block=4096" } else { "" }
        ))),
        Some(block) => Ok(block),
        None if unit <= 512 => Ok(512),
        None if unit <= 4096 => {
            notices.push(format!(
                "the block size is 4096, as direct I/O works in units of {unit} bytes here"
            ));
            Ok(4096)
        }
        None => Err(OpenError::new(format!(
            "direct I/O works in units of {unit} bytes here, more than the largest block of 4096"
        ))),
    }
}

/// Whether holes can be punched: tried behind the end, where there is nothing to lose.
fn punches_holes(file: &File, bytes: u64) -> bool {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    bytes
        .checked_next_multiple_of(1 << 20)
        .is_some_and(|behind| rustix::fs::fallocate(file, mode, behind, 4096).is_ok())
}

/// A limit of a device's request queue; a partition's are those of its disk.
fn queue_limit(device: u64, name: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let base = format!("/sys/dev/block/{major}:{minor}");
    let text = fs::read_to_string(format!("{base}/queue/{name}"))
        .or_else(|_| fs::read_to_string(format!("{base}/../queue/{name}")));
    text.ok()?.trim().parse().ok()
}

/// The preferred unit of writes, if it is whole blocks and believable.
fn optimal(limit: Option<u64>, block_bytes: u32) -> u32 {
    let limit = limit.and_then(|limit| u32::try_from(limit).ok());
    limit.filter(|bytes| bytes.is_multiple_of(block_bytes) && *bytes <= IO_BYTES_MAX).unwrap_or(0)
}

/// Refuses what cannot be polled, and says why not.
fn check_poll(found: &Found, direct: Option<Direct>, device: u64) -> Result<(), OpenError> {
    if direct.is_none() {
        return Err(OpenError::new("poll is not possible without direct I/O; leave poll out"));
    }
    if queue_limit(device, "io_poll") != Some(1) {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        return Err(OpenError::new(format!(
            "poll is not possible: the device {major}:{minor} below has no polled queues \
             (/sys/dev/block/{major}:{minor}/queue/io_poll is not 1); set them up where its driver \
             has them (nvme.poll_queues=N) or leave poll out"
        )));
    }
    match read_polled(found) {
        Ok(()) => Ok(()),
        Err(e) => Err(OpenError::io("poll is not possible: a polled read failed", e)),
    }
}

/// Reads the first block through a polled ring of its own: what the device's settings promise, the
/// file system may still refuse.
fn read_polled(found: &Found) -> io::Result<()> {
    let config = CoreConfig {
        entries: 1,
        rx_buffers: 1,
        rx_buffer_bytes: 64,
        pool_bytes: 128 << 10,
        ..CoreConfig::default()
    };
    let mut core = Core::new(config).map_err(io::Error::other)?;
    let local = core.local();
    let mut port = local.polled_port()?;
    let file = Fd::from(OwnedFd::from(found.file.try_clone()?));
    let mut page = SgList::default();
    let len = found.layout.block_bytes.max(found.layout.memory_align) as usize;
    let len = len.min(usize::try_from(found.bytes).unwrap_or(len));
    local.pool().alloc(len, &mut page).map_err(io::Error::other)?;
    port.readv(&file, 0, &page, 0).map_err(io::Error::other)?;
    loop {
        core.turn(true);
        if let Some(completion) = port.next() {
            return completion.result.map(drop).map_err(io::Error::from);
        }
    }
}

fn power_of_two(value: u64, otherwise: u32) -> u32 {
    match u32::try_from(value) {
        Ok(value) if value.is_power_of_two() && value <= 1 << 20 => value,
        _ => otherwise,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_size_follows_direct_io() {
        let pick = |wanted, unit| {
            let mut notices = Vec::new();
            let block = pick_block(wanted, unit, &mut notices).map_err(|e| e.reason);
            (block, notices.len())
        };
        assert_eq!(pick(None, Some(512)), (Ok(512), 0));
        assert_eq!(pick(None, Some(1)), (Ok(512), 0));
        assert_eq!(pick(None, None), (Ok(512), 0));
        assert_eq!(pick(None, Some(4096)), (Ok(4096), 1));
        assert_eq!(pick(Some(4096), Some(512)), (Ok(4096), 0));
        assert_eq!(pick(Some(512), None), (Ok(512), 0));
        let (refused, _) = pick(Some(512), Some(4096));
        assert!(refused.unwrap_err().contains("units of 4096 bytes here; use block=4096"));
        assert!(pick(None, Some(65536)).0.unwrap_err().contains("more than the largest block"));
    }

    #[test]
    fn odd_alignments_are_taken_as_a_page() {
        assert_eq!(power_of_two(512, 4096), 512);
        assert_eq!(power_of_two(0, 4096), 4096);
        assert_eq!(power_of_two(3000, 4096), 4096);
        assert_eq!(power_of_two(u64::MAX, 4096), 4096);
    }
}
