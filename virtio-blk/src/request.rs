//! A block request in a descriptor chain (Virtual I/O Device 1.2, section 5.2.6).
//!
//! The chain's layout means nothing but order: the header is the first 16 readable bytes, the
//! status the last writable byte, the data what is left, whatever descriptors they lie in
//! (section 2.7.4.2).

use std::rc::Rc;

use block::IoError;
use iobuf::{BadAddress, GuestSlice, GuestView, SgList};
use virtio_bindings::virtio_blk as blk;

use crate::device::{Features, ID_BYTES, LIFETIME_BYTES, Limits, RANGES_MAX, SECTOR_BYTES};
use crate::queue::shared::DirtyLog;
use crate::queue::{Broken, Chain, Piece, bytes};

/// Length of `type`, `reserved` and `sector`.
pub const HEADER_BYTES: usize = 16;
/// Get lifetime (Virtual I/O Device 1.2, section 5.2.6), which the bindings have not.
const T_GET_LIFETIME: u32 = 10;
/// Length of one `struct virtio_blk_discard_write_zeroes`.
pub const RANGE_BYTES: usize = 16;

/// Status byte of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u8);

impl Status {
    /// Success.
    pub const OK: Status = Status(blk::VIRTIO_BLK_S_OK as u8);
    /// Device or driver error.
    pub const IOERR: Status = Status(blk::VIRTIO_BLK_S_IOERR as u8);
    /// Unsupported request.
    pub const UNSUPP: Status = Status(blk::VIRTIO_BLK_S_UNSUPP as u8);
}

/// The one place where an I/O error becomes a status byte.
impl From<IoError> for Status {
    fn from(error: IoError) -> Status {
        match error {
            IoError::NotSupported => Status::UNSUPP,
            IoError::OutOfRange
            | IoError::Misaligned
            | IoError::ReadOnly
            | IoError::NoSpace
            | IoError::Medium
            | IoError::Gone
            | IoError::Aborted
            | IoError::TooLarge
            | IoError::Overlapping
            | IoError::CompareFailed
            | IoError::ReservationConflict => Status::IOERR,
        }
    }
}

/// Part of the volume, in bytes, of a discard or write zeroes request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Write zeroes only: blocks may be deallocated.
    pub unmap: bool,
}

/// What a request asks for, checked against the device's limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Read `len` bytes of the volume into the first writable bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes, not 0.
        len: u64,
    },
    /// Write the `len` readable bytes behind the header to the volume.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes, not 0.
        len: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// Deallocate the ranges collected beside.
    Discard,
    /// Zero the ranges collected beside.
    WriteZeroes,
    /// Done already, or refused.
    Done(Status),
}

/// A request, copied out of guest memory.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub action: Action,
    /// Where its status byte is.
    pub status: GuestSlice,
    /// Bytes written from the first writable byte on, without a gap, if the request succeeds: what
    /// the used ring says.
    pub written: u32,
    /// The same if it fails: nothing, or the status byte if it is the first.
    pub written_failed: u32,
}

impl Request {
    /// Understand a chain. `ranges` receives the ranges of a discard or write zeroes request.
    ///
    /// An error means that there is no status byte to write to.
    pub fn parse(
        chain: &Chain,
        view: &Rc<GuestView>,
        limits: &Limits,
        features: Features,
        ranges: &mut Vec<Range>,
    ) -> Result<Request, Broken> {
        let last = chain.writable.last().ok_or(Broken::NoStatus)?;
        let status_addr = last.addr.checked_add(u64::from(last.len - 1));
        let status = status_addr.and_then(|addr| view.slice(addr, 1).ok());
        let status = status.ok_or(Broken::StatusAddress)?;

        let room = bytes(&chain.writable) - 1;
        let mut request = Request {
            action: Action::Done(Status::IOERR),
            status,
            written: 0,
            written_failed: u32::from(room == 0),
        };
        if let Ok((action, data)) = action(chain, room, view, limits, features, ranges) {
            request.action = action;
            let written = if data == room { data + 1 } else { data };
            request.written = u32::try_from(written).unwrap_or(u32::MAX);
        }
        Ok(request)
    }
}

/// Any reason to answer with VIRTIO_BLK_S_IOERR.
struct Refused;

impl From<BadAddress> for Refused {
    fn from(_: BadAddress) -> Refused {
        Refused
    }
}

/// What to do, and how many bytes of data the driver gets.
fn action(
    chain: &Chain,
    room: u64,
    view: &GuestView,
    limits: &Limits,
    features: Features,
    ranges: &mut Vec<Range>,
) -> Result<(Action, u64), Refused> {
    let sent = bytes(&chain.readable).checked_sub(HEADER_BYTES as u64).ok_or(Refused)?;
    if !chain.is_ordered {
        return Err(Refused);
    }
    let mut header = [0; HEADER_BYTES];
    gather(view, &chain.readable, 0, &mut header)?;
    let header = u128::from_le_bytes(header);
    let (kind, sector) = (header as u32, (header >> 64) as u64);

    let unsupported = Ok((Action::Done(Status::UNSUPP), 0));
    match kind {
        blk::VIRTIO_BLK_T_IN => {
            let offset = data_range(sector, room, limits)?;
            match room {
                0 => Ok((Action::Done(Status::OK), 0)),
                len => Ok((Action::Read { offset, len }, room)),
            }
        }
        blk::VIRTIO_BLK_T_OUT => {
            let offset = data_range(sector, sent, limits)?;
            match sent {
                _ if limits.read_only => Err(Refused),
                0 => Ok((Action::Done(Status::OK), 0)),
                len => Ok((Action::Write { offset, len }, 0)),
            }
        }
        blk::VIRTIO_BLK_T_FLUSH => Ok((Action::Flush, 0)),
        blk::VIRTIO_BLK_T_GET_ID => {
            let len = room.min(ID_BYTES as u64) as usize;
            scatter(view, &chain.writable, &limits.serial[..len])?;
            Ok((Action::Done(Status::OK), len as u64))
        }
        // "The length of data MUST be the size of virtio_blk_lifetime."
        T_GET_LIFETIME if features.has(Features::LIFETIME) => {
            let lifetime = limits.lifetime.ok_or(Refused)?;
            if room != LIFETIME_BYTES as u64 {
                return Err(Refused);
            }
            scatter(view, &chain.writable, &lifetime)?;
            Ok((Action::Done(Status::OK), room))
        }
        blk::VIRTIO_BLK_T_DISCARD => {
            if !features.has(Features::DISCARD) {
                return unsupported;
            }
            match parse_ranges(view, chain, sent, limits, 0, ranges)? {
                Status::OK => Ok((Action::Discard, 0)),
                status => Ok((Action::Done(status), 0)),
            }
        }
        blk::VIRTIO_BLK_T_WRITE_ZEROES => {
            if !features.has(Features::WRITE_ZEROES) {
                return unsupported;
            }
            let flags = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            match parse_ranges(view, chain, sent, limits, flags, ranges)? {
                Status::OK => Ok((Action::WriteZeroes, 0)),
                status => Ok((Action::Done(status), 0)),
            }
        }
        _ => unsupported,
    }
}

/// First byte of a transfer of `len` bytes, whole sectors inside the volume.
fn data_range(sector: u64, len: u64, limits: &Limits) -> Result<u64, Refused> {
    if !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Refused);
    }
    range(sector, len, limits)
}

fn range(sector: u64, len: u64, limits: &Limits) -> Result<u64, Refused> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refused)?;
    let end = offset.checked_add(len).ok_or(Refused)?;
    (end <= limits.capacity_bytes).then_some(offset).ok_or(Refused)
}

/// All ranges are checked before the first is executed.
fn parse_ranges(
    view: &GuestView,
    chain: &Chain,
    sent: u64,
    limits: &Limits,
    flags_allowed: u32,
    ranges: &mut Vec<Range>,
) -> Result<Status, Refused> {
    ranges.clear();
    let count = (sent / RANGE_BYTES as u64) as usize;
    if limits.read_only
        || count == 0
        || count > RANGES_MAX
        || !sent.is_multiple_of(RANGE_BYTES as u64)
    {
        return Err(Refused);
    }
    let len_max = match flags_allowed {
        0 => limits.discard_bytes_max,
        _ => limits.write_zeroes_bytes_max,
    };
    for index in 0..count {
        let mut bytes = [0; RANGE_BYTES];
        gather(view, &chain.readable, HEADER_BYTES + index * RANGE_BYTES, &mut bytes)?;
        let word = u128::from_le_bytes(bytes);
        let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
        // "The device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard, secure erase
        // and write zeroes commands if any unknown flag is set", and for discard if unmap is set
        // (Virtual I/O Device 1.2, section 5.2.6.2).
        if flags & !flags_allowed != 0 {
            return Ok(Status::UNSUPP);
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        if len > len_max {
            return Err(Refused);
        }
        let offset = range(sector, len, limits)?;
        ranges.push(Range { offset, len, unmap: flags != 0 });
    }
    Ok(Status::OK)
}

/// Copy `out.len()` bytes out of `pieces`, which have them, from byte `skip` on.
fn gather(
    view: &GuestView,
    pieces: &[Piece],
    skip: usize,
    out: &mut [u8],
) -> Result<(), BadAddress> {
    let mut at = 0;
    for (addr, len) in cut(pieces, skip as u64, out.len() as u64) {
        let len = len as usize;
        view.read(addr, &mut out[at..at + len])?;
        at += len;
    }
    Ok(())
}

/// Copy `from` to the first bytes of `pieces`.
fn scatter(view: &GuestView, pieces: &[Piece], from: &[u8]) -> Result<(), BadAddress> {
    let mut at = 0;
    for (addr, len) in cut(pieces, 0, from.len() as u64) {
        let len = len as usize;
        view.write(addr, &from[at..at + len])?;
        at += len;
    }
    Ok(())
}

/// Append `len` bytes of `pieces`, from byte `skip` on, to a list.
#[inline]
pub fn append(
    view: &Rc<GuestView>,
    pieces: &[Piece],
    skip: u64,
    len: u64,
    sg: &mut SgList,
) -> Result<(), BadAddress> {
    for (addr, len) in cut(pieces, skip, len) {
        view.append(sg, addr, len)?;
    }
    Ok(())
}

/// The first `len` bytes of `pieces` have been written.
pub fn mark(log: &DirtyLog, pieces: &[Piece], len: u64) {
    for (addr, len) in cut(pieces, 0, len) {
        log.mark(addr, len);
    }
}

/// The parts of `pieces` that hold bytes `skip..skip + len`, as address and length.
fn cut(pieces: &[Piece], skip: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut skip, mut left) = (skip, len);
    pieces.iter().filter_map(move |piece| {
        let len = u64::from(piece.len);
        if skip >= len {
            skip -= len;
            return None;
        }
        let now = (len - skip).min(left);
        // An address that wraps is refused by whoever accesses it: the last byte of all is no guest
        // memory.
        let addr = piece.addr.saturating_add(skip);
        (skip, left) = (0, left - now);
        (now > 0).then_some((addr, now))
    })
}

#[cfg(test)]
mod tests;
