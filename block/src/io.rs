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
}

impl Op {
    /// All of them, in the order of [`Op::index`].
    pub const ALL: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::WriteZeroes, Op::Deallocate];

    /// A small number for tables of counters.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Whether the operation changes what is stored.
    pub fn is_change(self) -> bool {
        matches!(self, Op::Write | Op::WriteZeroes | Op::Deallocate)
    }
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
    /// Longer than [`Geometry::io_bytes_max`].
    TooLarge,
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
    /// Bytes in the range; ignored by flush. 0 does nothing, successfully.
    pub len: u64,
    /// Memory: for read and write exactly `len` bytes, otherwise not looked at.
    pub data: SgList,
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
    if io.op == Op::Flush {
        return Ok(());
    }
    let end = io.offset.checked_add(io.len).ok_or(IoError::OutOfRange)?;
    if end > geometry.bytes() {
        return Err(IoError::OutOfRange);
    }
    let mask = u64::from(geometry.block_bytes) - 1;
    if (io.offset | io.len) & mask != 0 {
        return Err(IoError::Misaligned);
    }
    if io.op.is_change() && geometry.read_only {
        return Err(IoError::ReadOnly);
    }
    match io.op {
        Op::Read | Op::Write => {
            if io.len > u64::from(geometry.io_bytes_max) {
                return Err(IoError::TooLarge);
            }
            if io.data.len() as u64 != io.len {
                return Err(IoError::Misaligned);
            }
        }
        Op::WriteZeroes if !geometry.write_zeroes => return Err(IoError::NotSupported),
        Op::Deallocate if !geometry.deallocate => return Err(IoError::NotSupported),
        Op::WriteZeroes | Op::Deallocate | Op::Flush => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use iobuf::Pool;

    fn geometry() -> Geometry {
        Geometry {
            block_bytes: 512,
            blocks: 1000,
            physical_block_bytes: 4096,
            io_bytes_max: 65536,
            read_only: false,
            write_cache: true,
            deallocate: true,
            write_zeroes: true,
            deallocate_granularity_bytes: 4096,
            deallocated_reads_zero: true,
            optimal_io_bytes: 0,
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
        let all = geometry();
        let read_only = Geometry { read_only: true, ..geometry() };
        let plain = Geometry { deallocate: false, write_zeroes: false, ..geometry() };
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
        ] {
            assert_eq!(check(geometry, &io), want, "{io:?}");
        }
    }

    #[test]
    fn indices_match_the_table() {
        for (i, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op.index(), i);
        }
    }
}
