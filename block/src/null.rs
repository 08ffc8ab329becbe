//! A volume that stores nothing: reads give zeros. For measuring everything around it.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use iobuf::SgList;
use reactor::Local;

use crate::io::{Io, IoError, Op, check};
use crate::volume::{Busy, Channel, Geometry, IO_BYTES_MAX, Identity, Volume};

/// See the module.
#[derive(Debug)]
pub struct NullVolume {
    geometry: Geometry,
    identity: Identity,
}

impl NullVolume {
    /// A volume of `bytes`, rounded down to whole blocks of `block_bytes` (a power of two).
    pub fn new(identity: Identity, bytes: u64, block_bytes: u32) -> NullVolume {
        let blocks = bytes / u64::from(block_bytes);
        let geometry = Geometry {
            physical_block_bytes: block_bytes.max(4096),
            io_bytes_max: IO_BYTES_MAX,
            deallocate: true,
            write_zeroes: true,
            deallocated_reads_zero: true,
            compare: true,
            compare_and_write: true,
            verify: true,
            ..Geometry::new(block_bytes, blocks)
        };
        NullVolume { geometry, identity }
    }
}

impl Volume for NullVolume {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn open(&self, local: &Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        let depth = depth as usize;
        let (geometry, local) = (self.geometry, local.clone());
        Ok(Box::new(NullChannel { geometry, local, depth, done: VecDeque::new() }))
    }
}

struct NullChannel {
    geometry: Geometry,
    local: Local,
    depth: usize,
    /// Grows to what is in flight at once, `depth` at most.
    done: VecDeque<Box<Io>>,
}

impl Channel for NullChannel {
    fn submit(&mut self, mut io: Box<Io>) -> Result<(), Busy> {
        if self.done.len() == self.depth {
            return Err(Busy(io));
        }
        io.result = check(&self.geometry, &io);
        if io.result.is_ok() {
            io.result = match io.op {
                Op::Read if self.local.is_zeros(&io.data) => Ok(()),
                Op::Read => io.data.fill(0, io.data.len(), 0).map_err(|_| IoError::Misaligned),
                // What is stored is given up at once, and so in one step.
                Op::Compare | Op::CompareAndWrite => compare_zeros(&io.data, io.len as usize),
                _ => Ok(()),
            };
        }
        self.done.push_back(io);
        Ok(())
    }

    fn lend(&mut self, _: u64, len: usize, into: &mut SgList) -> bool {
        self.local.zeros(len, into)
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        while let Some(io) = self.done.pop_front() {
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn deadline(&self) -> Option<Duration> {
        (!self.done.is_empty()).then_some(Duration::ZERO)
    }
}

/// Whether the first `len` bytes of the memory are nothing but zeros.
fn compare_zeros(data: &SgList, len: usize) -> Result<(), IoError> {
    let mut is_zero = true;
    let look = &mut |bytes: &[u8]| is_zero &= bytes.iter().all(|byte| *byte == 0);
    data.for_each_piece(0, len, look).map_err(|_| IoError::Misaligned)?;
    if is_zero { Ok(()) } else { Err(IoError::CompareFailed) }
}
