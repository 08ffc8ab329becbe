//! One I/O.

use std::fmt;

use iobuf::SgList;

use crate::volume::Geometry;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill `data` from the volume.
    Read,
    /// Store `data`.
    Write,
    /// Make everything written and completed before this was submitted survive a loss of power.
    Flush,
    /// Make a range read as zeros.
    WriteZeroes,
    /// Give up the contents of a range: it reads as zeros if [`Geometry::deallocated_reads_zero`],
    /// else as anything.
    Deallocate,
    /// Compare the range with `data`: [`IoError::CompareFailed`] where they differ.
    Compare,
    /// Read the range without giving it away, so that what cannot be read is known.
    Verify,
    /// Copy [`Io::sources`], one after the other, to the range. The sources and the range do not
    /// overlap. A copy that fails may have been done in part.
    Copy,
    /// Change registrations and reservations as [`Io::reserve`] says; offset and length are
    /// ignored.
    Reserve,
    /// Fill the first `len` bytes of `data` with the Extended Reservation Status data structure of
    /// NVMe (Reservation Report with 128-bit host identifiers); offset is ignored.
    ReservationReport,
    /// Compare the range, one block, with the first half of `data` and, if it is equal, store the
    /// second half, in one step for everyone who changes the volume. Where it differs nothing is
    /// changed: [`IoError::CompareFailed`]. That is never said of a range that was equal: what may
    /// have been done already is not tried again, and comes back as [`IoError::Aborted`].
    CompareAndWrite,
}

impl Op {
    /// All of them, in the order of [`Op::index`].
    pub const ALL: [Op; Op::COUNT] = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::WriteZeroes,
        Op::Deallocate,
        Op::Compare,
        Op::Verify,
        Op::Copy,
        Op::Reserve,
        Op::ReservationReport,
        Op::CompareAndWrite,
    ];

    /// How many there are.
    pub const COUNT: usize = 11;

    /// A small number for tables of counters.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Whether the operation changes what is stored.
    pub fn is_change(self) -> bool {
        use Op::*;
        matches!(self, Write | WriteZeroes | Deallocate | Copy | CompareAndWrite)
    }

    /// Whether [`Io::data`] holds the range's bytes, or is to, once.
    pub fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write | Op::Compare)
    }

    /// Whether the operation is about a range of the volume.
    pub fn has_range(self) -> bool {
        !matches!(self, Op::Flush | Op::Reserve | Op::ReservationReport)
    }
}

/// A range to copy from, in bytes, whole blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, not 0.
    pub len: u64,
}

/// Reservation Type of NVMe (RTYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ReservationType {
    /// The holder writes, everyone reads.
    WriteExclusive = 1,
    /// The holder reads and writes.
    ExclusiveAccess = 2,
    /// Registrants write, everyone reads.
    WriteExclusiveRegistrantsOnly = 3,
    /// Registrants read and write.
    ExclusiveAccessRegistrantsOnly = 4,
    /// Registrants write, everyone reads; every registrant is a holder.
    WriteExclusiveAllRegistrants = 5,
    /// Registrants read and write; every registrant is a holder.
    ExclusiveAccessAllRegistrants = 6,
}

impl ReservationType {
    /// From its number in NVMe; `None` for 0 and reserved ones.
    pub fn from_wire(value: u8) -> Option<ReservationType> {
        use ReservationType::*;
        Some(match value {
            1 => WriteExclusive,
            2 => ExclusiveAccess,
            3 => WriteExclusiveRegistrantsOnly,
            4 => ExclusiveAccessRegistrantsOnly,
            5 => WriteExclusiveAllRegistrants,
            6 => ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }

    /// Its number in NVMe.
    pub const fn to_wire(self) -> u8 {
        self as u8
    }
}

/// Reservation Register Action of NVMe (RREGA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RegisterAction {
    /// Register a key.
    Register = 0,
    /// Unregister.
    Unregister = 1,
    /// Replace the key.
    Replace = 2,
}

/// Reservation Acquire Action of NVMe (RACQA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AcquireAction {
    /// Acquire.
    Acquire = 0,
    /// Take it from another, or only take others' registrations away.
    Preempt = 1,
    /// Preempt, and abort the others' commands.
    PreemptAndAbort = 2,
}

/// What [`Op::Reserve`] does; fields have the names of NVMe's reservation commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reserve {
    /// Reservation Register.
    Register {
        /// What to do.
        action: RegisterAction,
        /// Ignore Existing Key: `crkey` is not looked at.
        iekey: bool,
        /// Persist Through Power Loss: change it to this, or leave it.
        persist: Option<bool>,
        /// Current Reservation Key.
        crkey: u64,
        /// New Reservation Key.
        nrkey: u64,
    },
    /// Reservation Acquire.
    Acquire {
        /// What to do.
        action: AcquireAction,
        /// Type of the reservation.
        rtype: ReservationType,
        /// Current Reservation Key.
        crkey: u64,
        /// Preempt Reservation Key.
        prkey: u64,
    },
    /// Reservation Release, of the reservation of this type.
    Release {
        /// Type of the reservation.
        rtype: ReservationType,
        /// Current Reservation Key.
        crkey: u64,
    },
    /// Reservation Release with action Clear: releases, and unregisters everyone.
    Clear {
        /// Current Reservation Key.
        crkey: u64,
    },
}

/// Why an I/O failed. Small and `Copy`: whoever knows the wire maps it to a status there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoError {
    /// The range does not lie in the volume.
    OutOfRange,
    /// Offset or length is not a multiple of the block size, or `data` is not as long as `len`.
    Misaligned,
    /// The volume cannot do this operation.
    NotSupported,
    /// The volume must not be changed.
    ReadOnly,
    /// The backing storage is full.
    NoSpace,
    /// The backing device failed.
    Medium,
    /// The backing object, or the path to it, is lost for good.
    Gone,
    /// Given back early on request ([`Channel::abort`](crate::Channel::abort)), or cancelled. A
    /// write may have happened or not.
    Aborted,
    /// Longer than [`Geometry::io_bytes_max`], or a copy past [`Geometry::copy`].
    TooLarge,
    /// A copy whose sources and destination overlap.
    Overlapping,
    /// What was compared differs.
    CompareFailed,
    /// A reservation of another host forbids it, or the reservation command does not fit what is
    /// registered.
    ReservationConflict,
}

impl IoError {
    /// All of them.
    pub const ALL: [IoError; 12] = [
        IoError::OutOfRange,
        IoError::Misaligned,
        IoError::NotSupported,
        IoError::ReadOnly,
        IoError::NoSpace,
        IoError::Medium,
        IoError::Gone,
        IoError::Aborted,
        IoError::TooLarge,
        IoError::Overlapping,
        IoError::CompareFailed,
        IoError::ReservationConflict,
    ];
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoError::OutOfRange => "range outside the volume",
            IoError::Misaligned => "range not in whole blocks",
            IoError::NotSupported => "operation not supported by the volume",
            IoError::ReadOnly => "volume is read-only",
            IoError::NoSpace => "backing storage is full",
            IoError::Medium => "backing device failed",
            IoError::Gone => "backing object is gone",
            IoError::Aborted => "aborted",
            IoError::TooLarge => "longer than the volume's largest I/O",
            IoError::Overlapping => "source and destination overlap",
            IoError::CompareFailed => "compared data differs",
            IoError::ReservationConflict => "reservation conflict",
        })
    }
}

impl std::error::Error for IoError {}

/// One I/O: what to do, the memory for it and, when it comes back, what came of it.
///
/// Owned by exactly one place at a time and recycled by the queue that made it.
#[derive(Debug)]
pub struct Io {
    /// What to do.
    pub op: Op,
    /// A change is on stable media when it completes.
    pub fua: bool,
    /// Write zeroes must keep the blocks allocated.
    pub no_unmap: bool,
    /// First byte of the range; ignored by flush.
    pub offset: u64,
    /// Bytes in the range, of a copy those of all sources; ignored by flush and reservations. 0
    /// does nothing, successfully.
    pub len: u64,
    /// Memory: for read, write and compare exactly `len` bytes, for compare and write twice as many,
    /// for a reservation report as many as are wanted, otherwise not looked at.
    pub data: SgList,
    /// Where a copy reads from; only looked at by [`Op::Copy`]. Clear and fill it, so that its room
    /// is used again.
    pub sources: Vec<Extent>,
    /// Only looked at by [`Op::Reserve`].
    pub reserve: Reserve,
    /// Set by the channel before it gives the `Io` back.
    pub result: Result<(), IoError>,
    /// The submitter's own mark; nobody else touches it.
    pub tag: u64,
    /// For whoever holds the `Io` now, such as a backend's slot number. Means nothing to others.
    pub scratch: u64,
}

impl Io {
    /// An I/O without memory.
    pub fn new(op: Op, offset: u64, len: u64) -> Io {
        Io {
            op,
            fua: false,
            no_unmap: false,
            offset,
            len,
            data: SgList::default(),
            sources: Vec::new(),
            reserve: Reserve::Clear { crkey: 0 },
            result: Ok(()),
            tag: 0,
            scratch: 0,
        }
    }

    /// An I/O to be filled in later, with room for `segments_max` segments of memory.
    pub fn with_capacity(segments_max: usize) -> Io {
        Io { data: SgList::with_capacity(segments_max), ..Io::new(Op::Flush, 0, 0) }
    }
}

/// Whether `io` may be done on a volume like this. Every backend calls it in `submit`.
pub fn check(geometry: &Geometry, io: &Io) -> Result<(), IoError> {
    if !io.op.has_range() {
        return check_without_range(geometry, io);
    }
    check_range(geometry, io.offset, io.len)?;
    if io.op.is_change() && geometry.read_only {
        return Err(IoError::ReadOnly);
    }
    match io.op {
        Op::Compare if !geometry.compare => return Err(IoError::NotSupported),
        Op::Read | Op::Write | Op::Compare => {
            if io.len > u64::from(geometry.io_bytes_max) {
                return Err(IoError::TooLarge);
            }
            if io.data.len() as u64 != io.len {
                return Err(IoError::Misaligned);
            }
        }
        Op::CompareAndWrite => check_compare_and_write(geometry, io)?,
        Op::WriteZeroes if !geometry.write_zeroes => return Err(IoError::NotSupported),
        Op::Deallocate if !geometry.deallocate => return Err(IoError::NotSupported),
        Op::Verify if !geometry.verify => return Err(IoError::NotSupported),
        Op::Copy => check_copy(geometry, io)?,
        _ => {}
    }
    Ok(())
}

/// Whether a range is whole blocks of the volume.
#[inline]
fn check_range(geometry: &Geometry, offset: u64, len: u64) -> Result<(), IoError> {
    let end = offset.checked_add(len).ok_or(IoError::OutOfRange)?;
    if end > geometry.bytes() {
        return Err(IoError::OutOfRange);
    }
    let mask = u64::from(geometry.block_bytes) - 1;
    if (offset | len) & mask != 0 {
        return Err(IoError::Misaligned);
    }
    Ok(())
}

fn check_without_range(geometry: &Geometry, io: &Io) -> Result<(), IoError> {
    match io.op {
        Op::Reserve | Op::ReservationReport if geometry.rescap == 0 => Err(IoError::NotSupported),
        // NUMD counts dwords.
        Op::ReservationReport
            if io.len == 0 || !io.len.is_multiple_of(4) || io.data.len() as u64 != io.len =>
        {
            Err(IoError::Misaligned)
        }
        Op::ReservationReport if io.len > u64::from(geometry.io_bytes_max) => {
            Err(IoError::TooLarge)
        }
        _ => Ok(()),
    }
}

#[cold]
fn check_compare_and_write(geometry: &Geometry, io: &Io) -> Result<(), IoError> {
    if !geometry.compare_and_write {
        return Err(IoError::NotSupported);
    }
    if io.len > u64::from(geometry.block_bytes) {
        return Err(IoError::TooLarge);
    }
    if io.data.len() as u64 == 2 * io.len { Ok(()) } else { Err(IoError::Misaligned) }
}

/// The sources of a copy, whose destination was checked.
#[cold]
fn check_copy(geometry: &Geometry, io: &Io) -> Result<(), IoError> {
    let limits = geometry.copy;
    if limits.ranges_max == 0 {
        return Err(IoError::NotSupported);
    }
    if io.len > limits.bytes_max || io.sources.len() > usize::from(limits.ranges_max) {
        return Err(IoError::TooLarge);
    }
    let end = io.offset + io.len;
    let mut total = 0;
    for source in &io.sources {
        check_range(geometry, source.offset, source.len)?;
        if source.len > limits.range_bytes_max {
            return Err(IoError::TooLarge);
        }
        if source.len == 0 {
            return Err(IoError::Misaligned);
        }
        if source.offset < end && io.offset < source.offset + source.len {
            return Err(IoError::Overlapping);
        }
        total = source.len.checked_add(total).ok_or(IoError::TooLarge)?;
    }
    if total == io.len { Ok(()) } else { Err(IoError::Misaligned) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::CopyLimits;
    use iobuf::Pool;

    fn geometry() -> Geometry {
        Geometry {
            physical_block_bytes: 4096,
            io_bytes_max: 65536,
            write_cache: true,
            deallocate: true,
            write_zeroes: true,
            deallocate_granularity_bytes: 4096,
            deallocated_reads_zero: true,
            compare: true,
            compare_and_write: true,
            verify: true,
            copy: CopyLimits { ranges_max: 2, range_bytes_max: 8192, bytes_max: 12288 },
            rescap: 0x7f,
            ..Geometry::new(512, 1000)
        }
    }

    #[test]
    fn refusals() {
        let pool = Pool::new(1 << 20).unwrap();
        let io = |op, offset, len: u64| {
            let mut io = Io::new(op, offset, len);
            if len <= 1 << 20 {
                pool.alloc(len as usize, &mut io.data).unwrap();
            }
            io
        };
        let pair = |offset, len: u64| Io { len, ..io(Op::CompareAndWrite, offset, 2 * len) };
        let all = geometry();
        let read_only = Geometry { read_only: true, ..geometry() };
        let plain = Geometry { io_bytes_max: 65536, ..Geometry::new(512, 1000) };
        let end = 512_000;
        use IoError::*;
        for (geometry, io, want) in [
            (&all, io(Op::Read, 0, 512), Ok(())),
            (&all, io(Op::Write, end - 512, 512), Ok(())),
            (&all, io(Op::Read, end, 0), Ok(())),
            (&all, io(Op::Read, end, 512), Err(OutOfRange)),
            (&all, io(Op::Read, end - 512, 1024), Err(OutOfRange)),
            (&all, io(Op::Deallocate, u64::MAX - 511, 512), Err(OutOfRange)),
            (&all, io(Op::Deallocate, 512, u64::MAX), Err(OutOfRange)),
            (&all, io(Op::Read, 1, 512), Err(Misaligned)),
            (&all, io(Op::Write, 512, 513), Err(Misaligned)),
            (&all, io(Op::Write, 0, 65536), Ok(())),
            (&all, io(Op::Write, 0, 66048), Err(TooLarge)),
            (&all, io(Op::WriteZeroes, 0, end), Ok(())),
            (&all, Io::new(Op::Write, 0, 512), Err(Misaligned)),
            (&read_only, io(Op::Write, 0, 512), Err(ReadOnly)),
            (&read_only, io(Op::WriteZeroes, 0, 512), Err(ReadOnly)),
            (&read_only, io(Op::Deallocate, 0, 512), Err(ReadOnly)),
            (&read_only, io(Op::Read, 0, 512), Ok(())),
            (&read_only, io(Op::Flush, u64::MAX, 3), Ok(())),
            (&plain, io(Op::WriteZeroes, 0, 512), Err(NotSupported)),
            (&plain, io(Op::Deallocate, 0, 512), Err(NotSupported)),
            (&all, io(Op::Compare, 0, 512), Ok(())),
            (&all, Io::new(Op::Compare, 0, 512), Err(Misaligned)),
            (&all, io(Op::Compare, 0, 66048), Err(TooLarge)),
            (&plain, io(Op::Compare, 0, 512), Err(NotSupported)),
            (&all, pair(512, 512), Ok(())),
            (&all, pair(0, 0), Ok(())),
            (&all, pair(0, 1024), Err(TooLarge)),
            (&all, pair(100, 512), Err(Misaligned)),
            (&all, pair(end, 512), Err(OutOfRange)),
            (&all, io(Op::CompareAndWrite, 0, 512), Err(Misaligned)),
            (&read_only, pair(0, 512), Err(ReadOnly)),
            (&plain, pair(0, 512), Err(NotSupported)),
            (&read_only, Io::new(Op::Verify, 0, end), Ok(())),
            (&all, Io::new(Op::Verify, end, 512), Err(OutOfRange)),
            (&plain, Io::new(Op::Verify, 0, 512), Err(NotSupported)),
            (&read_only, Io::new(Op::Reserve, 1, 1), Ok(())),
            (&plain, Io::new(Op::Reserve, 0, 0), Err(NotSupported)),
            (&all, io(Op::ReservationReport, 1, 64), Ok(())),
            (&all, io(Op::ReservationReport, 0, 62), Err(Misaligned)),
            (&all, Io::new(Op::ReservationReport, 0, 64), Err(Misaligned)),
            (&plain, io(Op::ReservationReport, 0, 64), Err(NotSupported)),
        ] {
            assert_eq!(check(geometry, &io), want, "{io:?}");
        }
    }

    #[test]
    fn copies() {
        let all = geometry();
        let end = 512_000;
        use IoError::*;
        let copy = |offset, sources: &[(u64, u64)]| {
            let len = sources.iter().map(|(_, len)| len).sum();
            let sources = sources.iter().map(|&(offset, len)| Extent { offset, len }).collect();
            Io { sources, ..Io::new(Op::Copy, offset, len) }
        };
        for (io, want) in [
            (copy(0, &[(4608, 512), (8192, 4096)]), Ok(())),
            (copy(0, &[(4096, 512), (8192, 4096)]), Err(Overlapping)),
            (copy(512, &[(0, 512), (4096, 512)]), Ok(())),
            (copy(end - 1024, &[(0, 512), (4096, 512)]), Ok(())),
            (copy(end - 512, &[(0, 512), (4096, 512)]), Err(OutOfRange)),
            (copy(0, &[(end, 512)]), Err(OutOfRange)),
            (copy(0, &[(u64::MAX - 511, 512)]), Err(OutOfRange)),
            (copy(0, &[(1024, 100), (4096, 412)]), Err(Misaligned)),
            (copy(0, &[(1024, 512), (4096, 0)]), Err(Misaligned)),
            (copy(0, &[(16384, 8704)]), Err(TooLarge)),
            (copy(0, &[(16384, 8192), (65536, 8192)]), Err(TooLarge)),
            (copy(0, &[(16384, 512), (65536, 512), (2048, 512)]), Err(TooLarge)),
            (copy(0, &[]), Ok(())),
            (Io { len: 1024, ..copy(0, &[(8192, 512)]) }, Err(Misaligned)),
        ] {
            assert_eq!(check(&all, &io), want, "{io:?}");
        }
        let io = copy(0, &[(512, 512)]);
        assert_eq!(check(&Geometry { read_only: true, ..all }, &io), Err(ReadOnly));
        let none = Geometry { copy: CopyLimits::default(), ..all };
        assert_eq!(check(&none, &io), Err(NotSupported));
    }

    #[test]
    fn indices_match_the_table() {
        for (i, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op.index(), i);
        }
    }
}
