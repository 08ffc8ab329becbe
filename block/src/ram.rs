//! A volume in memory, shared by all cores. Contents are gone when it is dropped.
//!
//! Data is copied in `submit`, while a received payload is still in the cache, and the I/O comes
//! back at the next `poll`. Making a long range zero, or copying one, is cut into slices, one per poll, so that
//! other work of the core goes on. Pages take memory when first written; the size is the only
//! bound, so a volume larger than the machine's free memory can run the machine out of it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use iobuf::{OutOfBounds, SharedBytes};
use reactor::Local;

use crate::io::{Io, IoError, Op, check};
use crate::volume::{Busy, Channel, CopyLimits, Geometry, IO_BYTES_MAX, Identity, Volume};

/// Zeroed at a time; about 50 microseconds of writing.
const SLICE_BYTES: u64 = 512 << 10;

/// See the module.
#[derive(Debug)]
pub struct RamVolume {
    memory: Arc<SharedBytes>,
    geometry: Geometry,
    identity: Identity,
}

impl RamVolume {
    /// A volume of `bytes`, rounded down to whole blocks of `block_bytes` (a power of two), full of
    /// zeros.
    pub fn new(identity: Identity, bytes: u64, block_bytes: u32) -> io::Result<RamVolume> {
        let blocks = bytes / u64::from(block_bytes);
        let geometry = Geometry {
            physical_block_bytes: block_bytes.max(4096),
            io_bytes_max: IO_BYTES_MAX,
            deallocate: true,
            write_zeroes: true,
            deallocate_granularity_bytes: 4096,
            deallocated_reads_zero: true,
            compare: true,
            verify: true,
            copy: CopyLimits {
                ranges_max: 128,
                range_bytes_max: IO_BYTES_MAX.into(),
                bytes_max: IO_BYTES_MAX.into(),
            },
            ..Geometry::new(block_bytes, blocks)
        };
        let len = usize::try_from(geometry.bytes())
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(RamVolume { memory: Arc::new(SharedBytes::new(len)?), geometry, identity })
    }
}

impl Volume for RamVolume {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn open(&self, _: &Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        let depth = depth as usize;
        Ok(Box::new(RamChannel {
            memory: Arc::clone(&self.memory),
            geometry: self.geometry,
            depth,
            done: VecDeque::with_capacity(depth),
            long: VecDeque::with_capacity(depth),
        }))
    }
}

struct RamChannel {
    memory: Arc<SharedBytes>,
    geometry: Geometry,
    depth: usize,
    done: VecDeque<Box<Io>>,
    /// Ranges to be made zero, or copied, in slices; `scratch` counts the bytes done. Taken in turn.
    long: VecDeque<Box<Io>>,
}

impl RamChannel {
    /// Does the part of `io` from `at`, at most `len` bytes of it. The range was checked.
    fn work(&self, io: &Io, at: u64, len: u64) -> Result<(), IoError> {
        // Both fit: the range lies in the mapping.
        let (offset, len) = ((io.offset + at) as usize, len as usize);
        let result = match io.op {
            Op::Read => self.memory.read(offset, &io.data),
            Op::Write => self.memory.write(offset, &io.data),
            Op::Flush => Ok(()),
            Op::WriteZeroes if io.no_unmap => self.memory.zero(offset, len),
            Op::WriteZeroes | Op::Deallocate => self.memory.discard(offset, len),
            Op::Compare => match self.memory.is_equal(offset, &io.data) {
                Ok(true) => Ok(()),
                Ok(false) => return Err(IoError::CompareFailed),
                Err(error) => Err(error),
            },
            // Memory can be read.
            Op::Verify => Ok(()),
            Op::Copy => self.copy(io, at, len),
            Op::Reserve | Op::ReservationReport => return Err(IoError::NotSupported),
        };
        result.map_err(|OutOfBounds| IoError::OutOfRange)
    }

    /// Copies `len` bytes of the sources from byte `at` of all of them.
    fn copy(&self, io: &Io, mut at: u64, len: usize) -> Result<(), OutOfBounds> {
        let mut to = (io.offset + at) as usize;
        let end = to + len;
        for source in &io.sources {
            if at >= source.len {
                at -= source.len;
                continue;
            }
            let part = ((source.len - at) as usize).min(end - to);
            self.memory.copy_within((source.offset + at) as usize, to, part)?;
            (to, at) = (to + part, 0);
        }
        Ok(())
    }
}

impl Channel for RamChannel {
    fn submit(&mut self, mut io: Box<Io>) -> Result<(), Busy> {
        if self.in_flight() == self.depth {
            return Err(Busy(io));
        }
        io.result = check(&self.geometry, &io);
        if io.result.is_ok() {
            if matches!(io.op, Op::WriteZeroes | Op::Deallocate | Op::Copy) && io.len > SLICE_BYTES
            {
                io.scratch = 0;
                self.long.push_back(io);
                return Ok(());
            }
            io.result = self.work(&io, 0, io.len);
        }
        self.done.push_back(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        if let Some(mut io) = self.long.pop_front() {
            let slice = SLICE_BYTES.min(io.len - io.scratch);
            io.result = self.work(&io, io.scratch, slice);
            io.scratch += slice;
            if io.result.is_ok() && io.scratch < io.len {
                self.long.push_back(io);
            } else {
                self.done.push_back(io);
            }
        }
        while let Some(io) = self.done.pop_front() {
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.done.len() + self.long.len()
    }

    fn deadline(&self) -> Option<Duration> {
        // More to do, right away.
        (self.in_flight() > 0).then_some(Duration::ZERO)
    }

    fn abort(&mut self) {
        while let Some(mut io) = self.long.pop_front() {
            io.result = Err(IoError::Aborted);
            self.done.push_back(io);
        }
    }
}
