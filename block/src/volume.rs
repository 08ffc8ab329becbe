//! Volumes and channels: the two traits that every backend and layer implements.

use std::fmt;
use std::io;
use std::time::Duration;

use iobuf::SgList;
use reactor::Local;

use crate::io::Io;

/// Who a volume is, for hosts that compare paths and for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// RFC 9562 UUID, in the order it is written.
    pub uuid: [u8; 16],
    /// Namespace globally unique identifier (NVMe NGUID), big endian.
    pub nguid: [u8; 16],
    /// Serial number, ASCII, padded with spaces.
    pub serial: [u8; 20],
}

impl Identity {
    /// Everything from one UUID: the NGUID is the UUID, the serial number its first 20 hex digits.
    pub fn from_uuid(uuid: [u8; 16]) -> Identity {
        let mut serial = [b' '; 20];
        for (i, digit) in serial.iter_mut().enumerate() {
            let nibble = (uuid[i / 2] >> (4 * (1 - i % 2))) & 0xF;
            *digit = b"0123456789abcdef"[usize::from(nibble)];
        }
        Identity { uuid, nguid: uuid, serial }
    }
}

/// Shape and abilities of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block size, a power of two; offsets and lengths are multiples of it.
    pub block_bytes: u32,
    /// Size in logical blocks.
    pub blocks: u64,
    /// What the backing storage writes without reading first.
    pub physical_block_bytes: u32,
    /// Longest read, write or compare.
    pub io_bytes_max: u32,
    /// Changes are refused.
    pub read_only: bool,
    /// Completed writes may be lost with the power until a flush.
    pub write_cache: bool,
    /// Deallocate is supported.
    pub deallocate: bool,
    /// Write zeroes is supported.
    pub write_zeroes: bool,
    /// Deallocating less than this, or not aligned to it, may free nothing.
    pub deallocate_granularity_bytes: u32,
    /// Deallocated blocks read as zeros.
    pub deallocated_reads_zero: bool,
    /// Writes of multiples of this are the fastest (a stripe of an array, an erase block);
    /// 0: nothing is known.
    pub optimal_io_bytes: u32,
    /// Compare is supported.
    pub compare: bool,
    /// Compare and write is supported, of one block.
    pub compare_and_write: bool,
    /// Verify is supported.
    pub verify: bool,
    /// What a copy may be; the default is that there is none.
    pub copy: CopyLimits,
    /// Reservation Capabilities of NVMe (RESCAP): bit 0 says that reservations can persist through
    /// a loss of power, bits 1 to 6 which types there are. 0: no reservations.
    pub rescap: u8,
}

/// What one copy may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyLimits {
    /// Most source ranges; 0: copy is not supported.
    pub ranges_max: u16,
    /// Longest source range.
    pub range_bytes_max: u64,
    /// Most bytes altogether.
    pub bytes_max: u64,
}

impl Geometry {
    /// A volume that reads, writes and flushes, 1 MiB at a time, and can do nothing else.
    pub const fn new(block_bytes: u32, blocks: u64) -> Geometry {
        Geometry {
            block_bytes,
            blocks,
            physical_block_bytes: block_bytes,
            io_bytes_max: 1 << 20,
            read_only: false,
            write_cache: false,
            deallocate: false,
            write_zeroes: false,
            deallocate_granularity_bytes: block_bytes,
            deallocated_reads_zero: false,
            optimal_io_bytes: 0,
            compare: false,
            compare_and_write: false,
            verify: false,
            copy: CopyLimits { ranges_max: 0, range_bytes_max: 0, bytes_max: 0 },
            rescap: 0,
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_bytes))
    }
}

/// How worn the media behind a volume are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wear {
    /// Life used, percent of what the vendor expects; may be over 100, and 255 is that or more.
    pub percentage_used: u8,
    /// Spare capacity that remains, percent.
    pub spare_percent: u8,
    /// Below which spare capacity is critical, percent.
    pub spare_threshold_percent: u8,
    /// What is wrong with the media, as the bits of NVMe's Critical Warning.
    pub critical_warning: u8,
}

/// Longest read or write that the backends of this crate take. What is done in the kernel or by
/// copying is cut into smaller pieces anyway; this bounds what one submitter may ask at a time.
pub(crate) const IO_BYTES_MAX: u32 = 32 << 20;

/// A disk: one per backing object, shared by all cores.
pub trait Volume: Send + Sync {
    /// Shape and abilities, as known now. May grow when [`Volume::refresh`] finds the backing
    /// object grown, or whenever the far end says so ([`Volume::generation`]).
    fn geometry(&self) -> Geometry;

    /// Who the volume is; never changes.
    fn identity(&self) -> Identity;

    /// The calling core's way to the volume, with at most `depth` I/Os accepted at a time.
    ///
    /// Called on the core that will use the channel. Returns at once: a volume that is not
    /// reachable yet gives a channel that holds I/O.
    fn open(&self, local: &Local, depth: u32) -> io::Result<Box<dyn Channel>>;

    /// Looks at the backing object again and returns the geometry found. May block: for the control
    /// plane only.
    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry())
    }

    /// How worn the media are, where somebody who knows has said so. `None` means that nobody knows,
    /// which is so of files and of everything else in this crate.
    fn wear(&self) -> Option<Wear> {
        None
    }

    /// Rises whenever [`Volume::geometry`] or [`Volume::wear`] is not what it was before: devices look at it, as cheap
    /// as a load, once per turn or so, and tell their guests. A volume that changes only by
    /// [`Volume::refresh`] may leave it at 0: whoever calls that knows.
    fn generation(&self) -> u64 {
        0
    }

    /// Bytes that the backing object takes now, where it may be fewer than its size and asking is
    /// cheap; `None` where nobody knows, or all are taken. For the control plane: may make a system
    /// call.
    fn used_bytes(&self) -> Option<u64> {
        None
    }

    /// What an operator should know about how the volume was opened, one sentence each.
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }
}

/// One core's way to a volume. Not `Send`.
///
/// The channel's side: every accepted [`Io`] comes back through `poll` exactly once, with
/// [`Io::result`] set; a refused one (see [`crate::check`]) too. Nothing is given back inside
/// `submit`.
///
/// The user's side: poll once per turn of the core, drain the channel before dropping it, and do
/// not touch the memory of a read until it is back.
pub trait Channel {
    /// Takes an I/O, or gives it back when `depth` I/Os are in flight: then poll and try again.
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy>;

    /// Lends memory of the core's own that has the `len` bytes at `offset` and will not change: a read
    /// that is then submitted with it has nothing left to do. `false`: the reader brings memory.
    ///
    /// Nobody writes to lent memory.
    fn lend(&mut self, offset: u64, len: usize, into: &mut SgList) -> bool {
        let _ = (offset, len, into);
        false
    }

    /// Calls `done` with each I/O that has ended. Called in every turn of the core, whether or not
    /// anything is in flight: a channel may have connections to set up and to look after. Cheap when
    /// there is nothing to do.
    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>));

    /// I/Os accepted and not given back yet.
    fn in_flight(&self) -> usize;

    /// When `poll` wants to run although nothing happened on the core.
    fn deadline(&self) -> Option<Duration> {
        None
    }

    /// Gives back, as [`Aborted`](crate::IoError::Aborted), what can be given back early, by the
    /// next `poll`: I/O held behind a lost path, or not started yet.
    fn abort(&mut self) {}
}

/// The channel has as many I/Os in flight as its depth allows; here is the one it did not take.
pub struct Busy(pub Box<Io>);

impl fmt::Debug for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Busy").field(&self.0.op).field(&self.0.offset).field(&self.0.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_from_a_uuid() {
        let uuid = 0x0123_4567_89ab_cdef_0011_2233_4455_6677u128.to_be_bytes();
        let identity = Identity::from_uuid(uuid);
        assert_eq!(&identity.serial, b"0123456789abcdef0011");
        assert_eq!(identity.nguid, uuid);
    }

    #[test]
    fn a_geometry_beyond_u64_bytes_saturates() {
        let geometry = Geometry::new(4096, u64::MAX);
        assert_eq!(geometry.bytes(), u64::MAX);
    }
}
