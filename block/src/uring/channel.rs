//! One core's channel: a slot per I/O, each with at most one operation in the kernel.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use iobuf::{OutOfBounds, SgList};
use reactor::{Completion, Errno, Fd, Local, Outcome, Port, SharedFd};

use super::{Layout, Shared};
use crate::io::{Io, IoError, Op, check};
use crate::volume::{Busy, Channel};

/// Moved by one operation at most: keeps one I/O from filling the device's queue.
const PIECE_BYTES: u64 = 1 << 20;
/// Segments of one operation at most; the kernel takes 1,024.
const SEGMENTS_MAX: usize = 256;
/// Copied at a time when memory does not suit direct I/O.
const BOUNCE_BYTES: u64 = 128 << 10;
/// Zeros kept to write them over and over.
const ZERO_BYTES: u64 = 64 << 10;
/// Range of one `fallocate` at most: bounds how long a worker thread of the ring is away.
const FALLOCATE_BYTES: u64 = 1 << 30;
/// When to look again for memory or a ring slot, if nothing else happens.
const RETRY: Duration = Duration::from_millis(1);

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// What the next (or running) operation of a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Read or write a piece, or read one to compare it or only to see that it can be read.
    Transfer,
    /// Flush, or make a `fallocate` durable.
    Sync,
    /// `fallocate` a piece with this mode.
    Allocate(i32),
    /// Write zeros over a piece.
    ZeroFill,
}

/// What came of an attempt to go on.
enum Step {
    /// An operation is in the kernel.
    Running,
    /// No memory or no ring slot: try again later.
    Stalled,
    /// The I/O has ended.
    Ended(Result<(), IoError>),
}

struct Slot {
    io: Option<Box<Io>>,
    stage: Stage,
    /// Bytes of the range that are done.
    done: u64,
    /// Bytes of the range that the running operation covers.
    piece: u64,
    /// Pool memory that stands in for misaligned memory or takes what is compared, or zeros to be
    /// written.
    bounce: SgList,
    /// The part of a list that the running operation works on.
    part: SgList,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            io: None,
            stage: Stage::Sync,
            done: 0,
            piece: 0,
            bounce: SgList::default(),
            part: SgList::default(),
        }
    }
}

/// What all slots use.
struct Engine {
    local: Local,
    port: Port,
    file: Fd,
    shared: Arc<Shared>,
}

pub(super) struct FileChannel {
    engine: Engine,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots to be started again, oldest first.
    stalled: VecDeque<u32>,
    done: VecDeque<Box<Io>>,
    in_flight: usize,
}

impl FileChannel {
    pub(super) fn new(
        local: &Local,
        fd: SharedFd,
        shared: Arc<Shared>,
        depth: u32,
    ) -> io::Result<FileChannel> {
        let room = depth as usize;
        let port = if shared.layout.poll { local.polled_port()? } else { local.port() };
        let engine = Engine { local: local.clone(), port, file: local.register(fd), shared };
        Ok(FileChannel {
            engine,
            slots: (0..depth).map(|_| Slot::new()).collect(),
            free: (0..depth).rev().collect(),
            stalled: VecDeque::with_capacity(room),
            done: VecDeque::with_capacity(room),
            in_flight: 0,
        })
    }

    /// Goes on with a slot; false if it has to wait.
    fn start(&mut self, index: u32) -> bool {
        let slot = &mut self.slots[index as usize];
        let Some(io) = &slot.io else { return true };
        let step = self.engine.next(io, slot.stage, slot.done, &mut slot.bounce, &mut slot.part);
        match step {
            (Step::Running, piece) => {
                slot.piece = piece;
                true
            }
            (Step::Stalled, _) => false,
            (Step::Ended(result), _) => {
                self.end(index, result);
                true
            }
        }
    }

    fn start_or_stall(&mut self, index: u32) {
        // Those who wait already go first.
        if !self.stalled.is_empty() || !self.start(index) {
            self.stalled.push_back(index);
        }
    }

    fn end(&mut self, index: u32, result: Result<(), IoError>) {
        let slot = &mut self.slots[index as usize];
        slot.part.clear();
        slot.bounce.clear();
        if let Some(mut io) = slot.io.take() {
            io.result = result;
            self.done.push_back(io);
            self.free.push(index);
        }
    }

    fn on_completion(&mut self, completion: Completion) {
        let Ok(index) = u32::try_from(completion.token) else { return };
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        if slot.io.is_none() {
            return;
        }
        let step = match completion.result {
            Ok(outcome) => self.engine.on_success(slot, &outcome),
            // Try the same again.
            Err(Errno(libc::EINTR | libc::EAGAIN)) => None,
            Err(errno) => self.engine.on_error(slot, errno),
        };
        match step {
            Some(result) => self.end(index, result),
            None => self.start_or_stall(index),
        }
    }
}

impl Engine {
    /// Starts the next operation of an I/O. Returns the bytes of the range that it covers.
    fn next(
        &mut self,
        io: &Io,
        stage: Stage,
        done: u64,
        bounce: &mut SgList,
        part: &mut SgList,
    ) -> (Step, u64) {
        // The slot's number travels in the I/O.
        let token = io.scratch;
        let offset = io.offset + done;
        let left = io.len - done;
        let (started, piece) = match stage {
            Stage::Sync => (self.port.fsync(&self.file, true, token), 0),
            Stage::Allocate(mode) => {
                let piece = left.min(FALLOCATE_BYTES);
                (self.port.fallocate(&self.file, mode, offset, piece, token), piece)
            }
            Stage::ZeroFill => {
                let piece = left.min(PIECE_BYTES);
                if bounce.is_empty() {
                    let len = left.min(ZERO_BYTES) as usize;
                    let filled = self.local.pool().alloc(len, bounce).is_ok()
                        && bounce.fill(0, len, 0).is_ok();
                    if !filled {
                        return (Step::Stalled, 0);
                    }
                }
                part.clear();
                while (part.len() as u64) < piece {
                    let len = bounce.len().min((piece - part.len() as u64) as usize);
                    if part.append_range(bounce, 0, len).is_err() {
                        return (Step::Ended(Err(IoError::Medium)), 0);
                    }
                }
                (self.port.writev(&self.file, offset, part, false, token), piece)
            }
            Stage::Transfer => {
                // Usually everything at once, from where it is.
                let is_direct = matches!(io.op, Op::Read | Op::Write);
                if done == 0 && is_direct && self.suits(&io.data) {
                    return match self.transfer(io, offset, &io.data, token) {
                        Ok(()) => (Step::Running, left),
                        Err(reactor::Busy) => (Step::Stalled, 0),
                    };
                }
                // What is compared or verified is read into memory of our own.
                let direct = match is_direct {
                    true => direct_piece(&self.shared.layout, &io.data, done, left),
                    false => 0,
                };
                part.clear();
                let (list, piece) = if direct > 0 {
                    bounce.clear();
                    if part.append_range(&io.data, done as usize, direct as usize).is_err() {
                        return (Step::Ended(Err(IoError::Misaligned)), 0);
                    }
                    (&*part, direct)
                } else {
                    let piece = left.min(BOUNCE_BYTES);
                    if bounce.len() as u64 != piece
                        && self.local.pool().alloc(piece as usize, bounce).is_err()
                    {
                        return (Step::Stalled, 0);
                    }
                    if io.op == Op::Write
                        && io.data.copy_to(done as usize, bounce, 0, piece as usize).is_err()
                    {
                        return (Step::Ended(Err(IoError::Misaligned)), 0);
                    }
                    (&*bounce, piece)
                };
                (self.transfer(io, offset, list, token), piece)
            }
        };
        match started {
            Ok(()) => (Step::Running, piece),
            Err(reactor::Busy) => (Step::Stalled, 0),
        }
    }

    fn transfer(
        &mut self,
        io: &Io,
        offset: u64,
        list: &SgList,
        token: u64,
    ) -> Result<(), reactor::Busy> {
        if io.op != Op::Write {
            self.port.readv(&self.file, offset, list, token)
        } else {
            self.port.writev(&self.file, offset, list, io.fua, token)
        }
    }

    /// Whether a whole list can go into one operation as it is.
    fn suits(&self, data: &SgList) -> bool {
        data.len() as u64 <= PIECE_BYTES
            && data.segments().len() <= SEGMENTS_MAX
            && data.is_aligned(self.shared.layout.memory_align as usize)
    }

    /// Notes what an operation did. `Some` ends the I/O, `None` goes on with it.
    fn on_success(&self, slot: &mut Slot, outcome: &Outcome) -> Option<Result<(), IoError>> {
        let io = slot.io.as_ref()?;
        match slot.stage {
            Stage::Sync if self.shared.lost_writes.load(Relaxed) => {
                return Some(Err(IoError::Medium));
            }
            Stage::Sync => return Some(Ok(())),
            Stage::Allocate(_) => slot.done += slot.piece,
            Stage::Transfer | Stage::ZeroFill => {
                let Outcome::Bytes(moved) = outcome else { return Some(Err(IoError::Medium)) };
                let moved = whole_blocks(&self.shared.layout, u64::from(*moved), slot.piece);
                if moved == 0 {
                    // The end of the file, where there should be data.
                    return Some(Err(IoError::Medium));
                }
                if io.op == Op::Read
                    && !slot.bounce.is_empty()
                    && slot.bounce.copy_to(0, &io.data, slot.done as usize, moved as usize).is_err()
                {
                    return Some(Err(IoError::Misaligned));
                }
                if io.op == Op::Compare {
                    let (at, len) = (slot.done as usize, moved as usize);
                    match slot.bounce.is_equal(0, &io.data, at, len) {
                        Ok(true) => {}
                        Ok(false) => return Some(Err(IoError::CompareFailed)),
                        Err(OutOfBounds) => return Some(Err(IoError::Misaligned)),
                    }
                }
                slot.done += moved;
            }
        }
        if slot.done < io.len {
            return None;
        }
        if io.fua && self.shared.lost_writes.load(Relaxed) {
            return Some(Err(IoError::Medium));
        }
        if io.fua && matches!(io.op, Op::WriteZeroes | Op::Deallocate) {
            // Zeros and holes become durable in one go.
            slot.stage = Stage::Sync;
            return None;
        }
        Some(Ok(()))
    }

    /// Finds another way after an error, or ends the I/O.
    fn on_error(&self, slot: &mut Slot, errno: Errno) -> Option<Result<(), IoError>> {
        let io = slot.io.as_ref()?;
        let is_refused = matches!(errno.0, libc::EOPNOTSUPP | libc::ENOSYS);
        match slot.stage {
            Stage::Allocate(mode) if is_refused => {
                let flag =
                    if mode == PUNCH_HOLE { &self.shared.can_punch } else { &self.shared.can_zero };
                flag.store(false, Relaxed);
                match first_stage(&self.shared, io) {
                    Some(stage) => {
                        slot.stage = stage;
                        None
                    }
                    None => Some(Err(IoError::NotSupported)),
                }
            }
            // The error may be that of any write before.
            Stage::Sync | Stage::Transfer | Stage::ZeroFill
                if !self.shared.layout.is_direct()
                    && (slot.stage == Stage::Sync || io.fua)
                    && from_errno(errno) == IoError::Medium =>
            {
                self.shared.lost_writes.store(true, Relaxed);
                Some(Err(IoError::Medium))
            }
            _ => Some(Err(from_errno(errno))),
        }
    }
}

/// Bytes from `done` that can go into one operation as they are; 0 means that they must be copied.
fn direct_piece(layout: &Layout, data: &SgList, done: u64, left: u64) -> u64 {
    let mask = layout.memory_align as usize - 1;
    let mut piece = 0;
    for segment in data.range(done as usize, left.min(PIECE_BYTES) as usize).take(SEGMENTS_MAX) {
        if (segment.as_ptr().addr() | segment.len()) & mask != 0 {
            break;
        }
        piece += segment.len() as u64;
    }
    // Whole blocks, or the offset of the next piece would not suit.
    piece - piece % u64::from(layout.block_bytes)
}

/// What counts of the bytes moved: after a short transfer the next piece begins at a whole block,
/// and what is behind it is done again.
fn whole_blocks(layout: &Layout, moved: u64, piece: u64) -> u64 {
    if moved >= piece { piece } else { moved - moved % u64::from(layout.block_bytes) }
}

/// How an I/O begins; `None` if the storage cannot do it.
fn first_stage(shared: &Shared, io: &Io) -> Option<Stage> {
    let can_punch = shared.can_punch.load(Relaxed);
    Some(match io.op {
        Op::Read | Op::Write | Op::Compare | Op::Verify => Stage::Transfer,
        Op::Flush => Stage::Sync,
        Op::Deallocate if can_punch => Stage::Allocate(PUNCH_HOLE),
        Op::Deallocate => return None,
        Op::WriteZeroes if can_punch && !io.no_unmap => Stage::Allocate(PUNCH_HOLE),
        Op::WriteZeroes if shared.can_zero.load(Relaxed) => Stage::Allocate(ZERO_RANGE),
        Op::WriteZeroes => Stage::ZeroFill,
        // `check` has refused them.
        Op::Copy | Op::Reserve | Op::ReservationReport | Op::CompareAndWrite => return None,
    })
}

fn from_errno(errno: Errno) -> IoError {
    match errno.0 {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => IoError::NoSpace,
        libc::EROFS | libc::EPERM | libc::EBADF => IoError::ReadOnly,
        libc::EINVAL => IoError::Misaligned,
        libc::EOPNOTSUPP | libc::ENOSYS => IoError::NotSupported,
        libc::ENODEV | libc::ENXIO | libc::ESTALE | libc::ENOMEDIUM => IoError::Gone,
        // EFAULT: the submitter's memory went away under us.
        libc::ECANCELED | libc::EFAULT => IoError::Aborted,
        _ => IoError::Medium,
    }
}

impl Channel for FileChannel {
    fn submit(&mut self, mut io: Box<Io>) -> Result<(), Busy> {
        if self.in_flight == self.slots.len() {
            return Err(Busy(io));
        }
        io.result = check(&self.engine.shared.geometry(), &io);
        let stage = first_stage(&self.engine.shared, &io);
        if io.result.is_ok() && stage.is_none() {
            io.result = Err(IoError::NotSupported);
        }
        self.in_flight += 1;
        let is_empty = io.len == 0 && io.op.has_range();
        match (stage, self.free.pop()) {
            (Some(stage), Some(index)) if io.result.is_ok() && !is_empty => {
                io.scratch = u64::from(index);
                let slot = &mut self.slots[index as usize];
                slot.stage = stage;
                slot.done = 0;
                slot.io = Some(io);
                self.start_or_stall(index);
            }
            (_, index) => {
                self.free.extend(index);
                self.done.push_back(io);
            }
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        if self.in_flight == 0 {
            return;
        }
        while let Some(completion) = self.engine.port.next() {
            self.on_completion(completion);
        }
        while let Some(&index) = self.stalled.front()
            && self.start(index)
        {
            self.stalled.pop_front();
        }
        while let Some(io) = self.done.pop_front() {
            self.in_flight -= 1;
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn deadline(&self) -> Option<Duration> {
        if !self.done.is_empty() {
            return Some(Duration::ZERO);
        }
        (!self.stalled.is_empty()).then(|| self.engine.local.now().saturating_add(RETRY))
    }

    fn abort(&mut self) {
        while let Some(index) = self.stalled.pop_front() {
            self.end(index, Err(IoError::Aborted));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iobuf::Pool;

    fn layout(block_bytes: u32, memory_align: u32) -> Layout {
        Layout {
            block_bytes,
            physical_block_bytes: 4096,
            memory_align,
            deallocate_granularity_bytes: 4096,
            read_only: false,
            can_punch: true,
            optimal_io_bytes: 0,
            poll: false,
        }
    }

    #[test]
    fn a_short_transfer_counts_in_whole_blocks() {
        let layout = layout(512, 512);
        for (moved, want) in [(0, 0), (511, 0), (512, 512), (1500, 1024), (2048, 2048)] {
            assert_eq!(whole_blocks(&layout, moved, 4096), want);
        }
        assert_eq!(whole_blocks(&layout, 4096, 4096), 4096);
        assert_eq!(whole_blocks(&layout, 5000, 4096), 4096);
    }

    #[test]
    fn pieces_are_whole_blocks_of_aligned_memory() {
        let pool = Pool::new(4 << 20).unwrap();
        let mut whole = SgList::default();
        pool.alloc(3 << 20, &mut whole).unwrap();
        let list = |parts: &[(usize, usize)]| {
            let mut list = SgList::default();
            for (offset, len) in parts {
                list.append_range(&whole, *offset, *len).unwrap();
            }
            list
        };
        let piece = |layout: &Layout, list: &SgList, done: u64| {
            direct_piece(layout, list, done, list.len() as u64 - done)
        };
        let small = layout(512, 512);
        let large = layout(4096, 512);
        let all = list(&[(0, 3 << 20)]);
        assert_eq!(piece(&small, &all, 0), PIECE_BYTES);
        assert_eq!(piece(&small, &all, 5 << 19), 1 << 19);
        // Up to the misaligned part, in whole blocks.
        let mixed = list(&[(0, 1536), (4096, 4096), (8196, 512), (12288, 4096)]);
        assert_eq!(piece(&small, &mixed, 0), 5632);
        assert_eq!(piece(&large, &mixed, 0), 4096);
        assert_eq!(piece(&small, &mixed, 5632), 0);
        assert_eq!(piece(&small, &mixed, 6144), 4096);
        // A multiple of the alignment in each segment, but no whole block before the odd one.
        assert_eq!(piece(&large, &list(&[(0, 1536), (4, 2560)]), 0), 0);
        // More segments than one operation takes.
        let many = list(&vec![(0, 512); SEGMENTS_MAX + 3]);
        assert_eq!(piece(&small, &many, 0), 512 * SEGMENTS_MAX as u64);
        assert_eq!(piece(&large, &many, 512), 512 * SEGMENTS_MAX as u64);
        let many = list(&vec![(0, 4); 2 * SEGMENTS_MAX]);
        assert_eq!(piece(&layout(512, 4), &many, 0), 1024);
        let many = list(&vec![(0, 1); 512]);
        assert_eq!(piece(&layout(512, 1), &many, 0), 0, "too many pieces for one block");
    }

    #[test]
    fn operations_begin_where_the_storage_allows() {
        let shared = |can_punch, can_zero| Shared {
            layout: layout(512, 512),
            blocks: 8.into(),
            can_punch: std::sync::atomic::AtomicBool::new(can_punch),
            can_zero: std::sync::atomic::AtomicBool::new(can_zero),
            lost_writes: Default::default(),
        };
        let first = |punch, zero, op, no_unmap| {
            first_stage(&shared(punch, zero), &Io { no_unmap, ..Io::new(op, 0, 512) })
        };
        let (punch, zero) = (Stage::Allocate(PUNCH_HOLE), Stage::Allocate(ZERO_RANGE));
        assert_eq!(first(true, true, Op::Deallocate, false), Some(punch));
        assert_eq!(first(false, true, Op::Deallocate, false), None);
        assert_eq!(first(true, true, Op::WriteZeroes, false), Some(punch));
        assert_eq!(first(true, true, Op::WriteZeroes, true), Some(zero));
        assert_eq!(first(false, true, Op::WriteZeroes, false), Some(zero));
        assert_eq!(first(true, false, Op::WriteZeroes, true), Some(Stage::ZeroFill));
        assert_eq!(first(false, false, Op::WriteZeroes, false), Some(Stage::ZeroFill));
    }

    #[test]
    fn errors_of_the_kernel_say_what_to_expect() {
        for (errno, want) in [
            (libc::ENOSPC, IoError::NoSpace),
            (libc::EDQUOT, IoError::NoSpace),
            (libc::EIO, IoError::Medium),
            (libc::EREMOTEIO, IoError::Medium),
            (libc::EROFS, IoError::ReadOnly),
            (libc::EINVAL, IoError::Misaligned),
            (libc::ENODEV, IoError::Gone),
            (libc::ECANCELED, IoError::Aborted),
        ] {
            assert_eq!(from_errno(Errno(errno)), want);
        }
    }
}
