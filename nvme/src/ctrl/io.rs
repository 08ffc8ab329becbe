//! I/O commands: from an SQE to a checked byte range of a namespace (NVM Command Set 1.0).
//!
//! Everything the command itself can be wrong about is settled here; what is left for the caller
//! is to move data and run the operation. No allocation, no hashing: this runs once per I/O.
//!
//! ```text
//!   SQE ─► decode ─► IoCommand ─► Fuse::of + FusedPairing (only for fused commands)
//!                        │
//!                        ├─ access(): what reservations judge it by
//!                        └─ host_data_len() bytes of data ─► dsm_range, copy_check + copy_range,
//!                                                            ReservationRequest::parse
//! ```

mod fused;
#[cfg(test)]
mod tests;

pub use self::fused::{Fuse, FusedPairing, Paired, Pairing};
use crate::spec::{CopyRange, DsmRange, NSID_ALL, NvmOpcode, Sqe, Status};
use crate::subsys::reservation::{
    Access, AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationType,
};
pub use crate::subsys::{COPY_BYTES_MAX, COPY_RANGES_MAX};
use crate::subsys::{
    COPY_RANGE_BYTES_MAX, NamespaceInfo, SubsystemInfo, VERIFY_BYTES_MAX,
    WRITE_UNCORRECTABLE_BYTES_MAX, WRITE_ZEROES_BYTES_MAX,
};
use crate::xfer;

/// Most ranges in one Dataset Management command. DMRL, DMRSL and DMSL are 0 (no limits but the
/// fields' widths): a Deallocate of any size is passed on range by range.
pub const DSM_RANGES_MAX: u16 = 256;
/// Bytes of one Dataset Management range.
pub const DSM_RANGE_LEN: u32 = 16;
/// Bytes of one source range of a Copy command, in the one format supported.
pub const COPY_RANGE_LEN: u32 = 32;
/// Copy Descriptor Formats Supported (CDFS): format 0h. Format 1h is for namespaces with 32-bit or
/// 64-bit guards; there are none.
pub const COPY_FORMATS: u16 = 1 << 0;
/// Most bytes of a command whose data is a list or structure: hosts may send a whole page.
const STRUCTURE_BYTES_MAX: u32 = 4096;
const _: () = assert!(COPY_RANGES_MAX as u32 * COPY_RANGE_LEN <= STRUCTURE_BYTES_MAX);
const _: () = assert!(DSM_RANGES_MAX as u32 * DSM_RANGE_LEN <= STRUCTURE_BYTES_MAX);

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
const INVALID_OPCODE: Status = Status::INVALID_COMMAND_OPCODE.dnr();
const WRITE_PROTECTED: Status = Status::NAMESPACE_IS_WRITE_PROTECTED.dnr();
const SIZE_LIMIT: Status = Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr();

/// A checked I/O command. Offsets and lengths are bytes, inside the namespace, whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoCommand {
    /// Read; the data pointer has exactly `len` bytes.
    Read {
        /// Namespace.
        nsid: u32,
        /// First byte.
        offset: u64,
        /// Bytes, not 0, at most MDTS.
        len: u32,
        /// Force Unit Access: what is returned is on non-volatile media.
        fua: bool,
    },
    /// Write; the data pointer has exactly `len` bytes.
    Write {
        /// Namespace.
        nsid: u32,
        /// First byte.
        offset: u64,
        /// Bytes, not 0, at most MDTS.
        len: u32,
        /// Force Unit Access: completes when the data is on non-volatile media.
        fua: bool,
    },
    /// Flush the volatile write cache of a namespace, or of all that the controller has.
    Flush {
        /// Namespace, or [`NSID_ALL`].
        nsid: u32,
    },
    /// Write Zeroes.
    WriteZeroes {
        /// Namespace.
        nsid: u32,
        /// First byte.
        offset: u64,
        /// Bytes, not 0, at most [`WRITE_ZEROES_BYTES_MAX`].
        len: u64,
        /// DEAC is clear: the blocks must stay allocated.
        no_unmap: bool,
        /// Force Unit Access.
        fua: bool,
    },
    /// Deallocate: the first `ranges * 16` bytes of the command's data are ranges for
    /// [`dsm_range`]. The data may be longer: hosts send a full page whatever the number.
    Deallocate {
        /// Namespace.
        nsid: u32,
        /// Ranges, 1..=256.
        ranges: u16,
    },
    /// Dataset Management that asks for nothing this namespace does (access hints, or deallocate
    /// where that is not supported): succeeds without effect. Data sent with it is ignored.
    Advisory {
        /// Namespace.
        nsid: u32,
    },
    /// Compare with the host's data, of which there are exactly `len` bytes; Compare Failure if
    /// they differ.
    Compare {
        /// Namespace.
        nsid: u32,
        /// First byte.
        offset: u64,
        /// Bytes, not 0, at most MDTS.
        len: u32,
        /// Force Unit Access: what is compared with is on non-volatile media.
        fua: bool,
    },
    /// Verify: read without giving the data away.
    Verify {
        /// Namespace.
        nsid: u32,
        /// First byte.
        offset: u64,
        /// Bytes, not 0, at most [`VERIFY_BYTES_MAX`].
        len: u64,
        /// Force Unit Access: what is verified is on non-volatile media.
        fua: bool,
    },
    /// Copy to `offset`, which is inside the namespace. The first
    /// `ranges * `[`COPY_RANGE_LEN`] bytes of the command's data are the source; check them with
    /// [`copy_check`] as a whole, then take them one by one with [`copy_range`].
    Copy {
        /// Namespace.
        nsid: u32,
        /// First byte of the destination.
        offset: u64,
        /// Source ranges, 1..=[`COPY_RANGES_MAX`].
        ranges: u16,
        /// Force Unit Access: completes when the copy is on non-volatile media.
        fua: bool,
    },
    /// Write Uncorrectable: reads fail until the blocks are written again.
    WriteUncorrectable {
        /// Namespace.
        nsid: u32,
        /// First byte.
        offset: u64,
        /// Bytes, not 0, at most [`WRITE_UNCORRECTABLE_BYTES_MAX`].
        len: u64,
    },
    /// Reservation Register; 16 bytes of data for
    /// [`ReservationRequest::parse`](crate::subsys::reservation::ReservationRequest::parse).
    ReservationRegister {
        /// Namespace.
        nsid: u32,
        /// What to do.
        action: RegisterAction,
        /// Ignore Existing Key.
        iekey: bool,
        /// What to do about power loss.
        persist: PersistChange,
    },
    /// Reservation Acquire; 16 bytes of data, likewise.
    ReservationAcquire {
        /// Namespace.
        nsid: u32,
        /// What to do.
        action: AcquireAction,
        /// Type of the reservation.
        rtype: ReservationType,
    },
    /// Reservation Release; 8 bytes of data, likewise.
    ReservationRelease {
        /// Namespace.
        nsid: u32,
        /// What to do.
        action: ReleaseAction,
    },
    /// Reservation Report in the extended format (128-bit host identifiers); the data pointer has
    /// exactly `len` bytes, which may be less or more than there is to report.
    ReservationReport {
        /// Namespace.
        nsid: u32,
        /// Bytes wanted, a multiple of 4, not 0, at most MDTS.
        len: u32,
    },
}
const _: () = assert!(size_of::<IoCommand>() <= 24);

impl IoCommand {
    /// The namespace.
    #[must_use]
    #[inline]
    pub const fn nsid(&self) -> u32 {
        match *self {
            IoCommand::Read { nsid, .. }
            | IoCommand::Write { nsid, .. }
            | IoCommand::Flush { nsid }
            | IoCommand::WriteZeroes { nsid, .. }
            | IoCommand::Deallocate { nsid, .. }
            | IoCommand::Advisory { nsid }
            | IoCommand::Compare { nsid, .. }
            | IoCommand::Verify { nsid, .. }
            | IoCommand::Copy { nsid, .. }
            | IoCommand::WriteUncorrectable { nsid, .. }
            | IoCommand::ReservationRegister { nsid, .. }
            | IoCommand::ReservationAcquire { nsid, .. }
            | IoCommand::ReservationRelease { nsid, .. }
            | IoCommand::ReservationReport { nsid, .. } => nsid,
        }
    }

    /// Whether the host sends data with it, which the data pointer tells the length of. It is at
    /// least [`IoCommand::host_data_len`] and at most 4096 bytes or, for Write and Compare, MDTS.
    #[must_use]
    #[inline]
    pub const fn takes_data(&self) -> bool {
        self.host_data_len() != 0 || matches!(self, IoCommand::Advisory { .. })
    }

    /// Bytes of the host's data that the command is about; 0: none.
    #[must_use]
    #[inline]
    pub const fn host_data_len(&self) -> u32 {
        match *self {
            IoCommand::Write { len, .. } | IoCommand::Compare { len, .. } => len,
            IoCommand::Deallocate { ranges, .. } => ranges as u32 * DSM_RANGE_LEN,
            IoCommand::Copy { ranges, .. } => ranges as u32 * COPY_RANGE_LEN,
            IoCommand::ReservationRegister { .. } | IoCommand::ReservationAcquire { .. } => 16,
            IoCommand::ReservationRelease { .. } => 8,
            IoCommand::Read { .. }
            | IoCommand::Flush { .. }
            | IoCommand::WriteZeroes { .. }
            | IoCommand::Advisory { .. }
            | IoCommand::Verify { .. }
            | IoCommand::WriteUncorrectable { .. }
            | IoCommand::ReservationReport { .. } => 0,
        }
    }

    /// Bytes the host is given on success; 0: none.
    #[must_use]
    #[inline]
    pub const fn reply_len(&self) -> u32 {
        match *self {
            IoCommand::Read { len, .. } | IoCommand::ReservationReport { len, .. } => len,
            _ => 0,
        }
    }

    /// What reservations judge the command by (NVMe Base 2.0, "Command Behavior in the Presence
    /// of a Reservation"). A Copy reads, too, but nobody may write what he may not read.
    #[must_use]
    #[inline]
    pub const fn access(&self) -> Access {
        match self {
            IoCommand::Read { .. } | IoCommand::Compare { .. } | IoCommand::Verify { .. } => {
                Access::Read
            }
            IoCommand::Write { .. }
            | IoCommand::Flush { .. }
            | IoCommand::WriteZeroes { .. }
            | IoCommand::Deallocate { .. }
            | IoCommand::Advisory { .. }
            | IoCommand::Copy { .. }
            | IoCommand::WriteUncorrectable { .. } => Access::Write,
            IoCommand::ReservationRegister { .. }
            | IoCommand::ReservationAcquire { .. }
            | IoCommand::ReservationRelease { .. }
            | IoCommand::ReservationReport { .. } => Access::Other,
        }
    }
}

/// Decodes a command of an I/O queue and checks it against the subsystem. Fabrics commands
/// (opcode 7Fh: Connect, Disconnect) are not I/O commands; take them before.
///
/// The FUSE field is checked to be one the command can have; pairing is [`FusedPairing`]'s.
///
/// # Errors
/// The status to complete the command with.
#[inline]
pub fn decode(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let opcode = NvmOpcode(sqe.opcode);
    match opcode {
        NvmOpcode::READ | NvmOpcode::WRITE => read_write(sqe, subsys, opcode == NvmOpcode::WRITE),
        NvmOpcode::FLUSH => flush(sqe, subsys),
        NvmOpcode::WRITE_ZEROES => write_zeroes(sqe, subsys),
        NvmOpcode::DATASET_MANAGEMENT => dataset_management(sqe, subsys),
        _ => decode_other(sqe, subsys),
    }
}

/// The commands that a host in normal operation does not send.
fn decode_other(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    match NvmOpcode(sqe.opcode) {
        NvmOpcode::COMPARE => compare(sqe, subsys),
        NvmOpcode::VERIFY => verify(sqe, subsys),
        NvmOpcode::COPY => copy(sqe, subsys),
        NvmOpcode::WRITE_UNCORRECTABLE => write_uncorrectable(sqe, subsys),
        NvmOpcode::RESERVATION_REGISTER => reservation_register(sqe, subsys),
        NvmOpcode::RESERVATION_ACQUIRE => reservation_acquire(sqe, subsys),
        NvmOpcode::RESERVATION_RELEASE => reservation_release(sqe, subsys),
        NvmOpcode::RESERVATION_REPORT => reservation_report(sqe, subsys),
        _ => Err(INVALID_OPCODE),
    }
}

/// Checks one range of a Deallocate: byte offset and length. A length of 0 is allowed and means
/// nothing to do.
///
/// # Errors
/// LBA Out of Range.
pub fn dsm_range(bytes: &[u8; 16], ns: &NamespaceInfo) -> Result<(u64, u64), Status> {
    let range: DsmRange = zerocopy::transmute!(*bytes);
    byte_range(range.slba.get(), u64::from(range.nlb.get()), ns)
}

/// Checks one source range of a Copy: byte offset and length, which is not 0.
///
/// # Errors
/// Command Size Limit Exceeded (MSSRL), LBA Out of Range.
pub fn copy_range(bytes: &[u8; 32], ns: &NamespaceInfo) -> Result<(u64, u64), Status> {
    let range: CopyRange = zerocopy::transmute!(*bytes);
    let blocks = u64::from(range.nlb_z.get()) + 1;
    if blocks << ns.block_shift() > u64::from(COPY_RANGE_BYTES_MAX) {
        return Err(SIZE_LIMIT);
    }
    byte_range(range.slba.get(), blocks, ns)
}

/// Checks all source ranges of a Copy to byte `offset` of `ns`, as decoded; `range_at` gives the
/// ranges by index. Returns the bytes to copy.
///
/// # Errors
/// - What [`copy_range`] says of a range, Data SGL Length Invalid if `range_at` has none.
/// - Command Size Limit Exceeded (MCL): too much altogether.
/// - LBA Out of Range: the destination does not end inside the namespace.
/// - Overlapping I/O Range: a source overlaps the destination, so that the result would depend on
///   the order in which blocks are moved.
pub fn copy_check(
    offset: u64,
    ranges: u16,
    ns: &NamespaceInfo,
    mut range_at: impl FnMut(u16) -> Option<[u8; 32]>,
) -> Result<u64, Status> {
    let mut range = |index| {
        let bytes = range_at(index).ok_or(Status::DATA_SGL_LENGTH_INVALID.dnr())?;
        copy_range(&bytes, ns)
    };
    let mut total = 0;
    for index in 0..ranges {
        total += range(index)?.1;
        if total > u64::from(COPY_BYTES_MAX) {
            return Err(SIZE_LIMIT);
        }
    }
    let end = match offset.checked_add(total) {
        Some(end) if end <= ns.size_bytes() => end,
        _ => return Err(Status::LBA_OUT_OF_RANGE.dnr()),
    };
    for index in 0..ranges {
        let (source, len) = range(index)?;
        if source < end && offset < source + len {
            return Err(Status::OVERLAPPING_IO_RANGE.dnr());
        }
    }
    Ok(total)
}

/// Blocks as bytes, if they are inside the namespace.
#[inline]
fn byte_range(slba: u64, blocks: u64, ns: &NamespaceInfo) -> Result<(u64, u64), Status> {
    match slba.checked_add(blocks) {
        Some(end) if end <= ns.blocks => Ok((slba << ns.block_shift(), blocks << ns.block_shift())),
        _ => Err(Status::LBA_OUT_OF_RANGE.dnr()),
    }
}

/// Namespace of a command that takes one, after the checks all I/O commands share.
#[inline]
fn namespace<'a>(sqe: &Sqe, subsys: &'a SubsystemInfo) -> Result<&'a NamespaceInfo, Status> {
    let nsid = sqe.nsid.get();
    let Some(index) = subsys.namespace_index(nsid) else { return Err(no_namespace(nsid, subsys)) };
    if sqe.fuse() != 0 {
        fused::check(sqe, &subsys.namespaces()[index])?;
    }
    match subsys.ana_refusal(index) {
        None => Ok(&subsys.namespaces()[index]),
        Some(status) => Err(status),
    }
}

/// An NSID in 1..=NN without a namespace is inactive: "Invalid Field in Command". One that can
/// never be valid: "Invalid Namespace or Format" (NVMe Base 2.0, "NSID and Namespace Usage").
#[cold]
fn no_namespace(nsid: u32, subsys: &SubsystemInfo) -> Status {
    if nsid == 0 || nsid > subsys.limits().namespaces_max {
        Status::INVALID_NAMESPACE_OR_FORMAT.dnr()
    } else {
        INVALID_FIELD
    }
}

/// Byte range of a command with SLBA in dwords 10, 11 and NLB (zero-based) in dword 12, and the
/// checks those commands share. PRINFO must be clear: no namespace has protection information.
/// Limited Retry is a hint; reads are not retried here anyway.
#[inline]
fn lba_range(sqe: &Sqe, ns: &NamespaceInfo) -> Result<(u64, u64), Status> {
    let cdw12 = sqe.cdw12.get();
    if cdw12 >> 26 & 0xf != 0 {
        return Err(Status::INVALID_PROTECTION_INFORMATION.dnr());
    }
    byte_range(sqe.cdw10_11(), u64::from(cdw12 & 0xffff) + 1, ns)
}

/// [`lba_range`] of a command without data, of at most `max` bytes, which is what VSL, WZSL or WUSL
/// says.
#[inline]
fn limited_range(
    sqe: &Sqe,
    subsys: &SubsystemInfo,
    ns: &NamespaceInfo,
    max: u32,
) -> Result<(u64, u64), Status> {
    let (offset, len) = lba_range(sqe, ns)?;
    if len > u64::from(max) {
        return Err(INVALID_FIELD);
    }
    expect_no_data(sqe, subsys)?;
    Ok((offset, len))
}

/// [`lba_range`] of a command whose data has its length.
#[inline]
fn data_range(sqe: &Sqe, subsys: &SubsystemInfo, ns: &NamespaceInfo) -> Result<(u64, u32), Status> {
    let (offset, len) = lba_range(sqe, ns)?;
    // "If the length exceeds MDTS the controller shall abort with Invalid Field in Command."
    if len > u64::from(subsys.limits().mdts_bytes) {
        return Err(INVALID_FIELD);
    }
    let len = len as u32;
    if xfer::data_len(sqe, subsys.limits(), len)? != len {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    Ok((offset, len))
}

#[inline]
fn fua(sqe: &Sqe) -> bool {
    sqe.cdw12.get() & 1 << 30 != 0
}

/// DTYPE: directives are not supported.
#[inline]
fn has_directive(sqe: &Sqe) -> bool {
    sqe.cdw12.get() >> 20 & 0xf != 0
}

#[inline]
fn read_write(sqe: &Sqe, subsys: &SubsystemInfo, is_write: bool) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if is_write {
        if has_directive(sqe) {
            return Err(INVALID_FIELD);
        }
        if ns.refuses_writes() {
            return Err(WRITE_PROTECTED);
        }
    }
    let (offset, len) = data_range(sqe, subsys, ns)?;
    let (nsid, fua) = (ns.nsid, fua(sqe));
    Ok(if is_write {
        IoCommand::Write { nsid, offset, len, fua }
    } else {
        IoCommand::Read { nsid, offset, len, fua }
    })
}

fn compare(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if !ns.compare {
        return Err(INVALID_OPCODE);
    }
    let (offset, len) = data_range(sqe, subsys, ns)?;
    Ok(IoCommand::Compare { nsid: ns.nsid, offset, len, fua: fua(sqe) })
}

fn flush(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let nsid = sqe.nsid.get();
    if nsid != NSID_ALL {
        namespace(sqe, subsys)?;
    } else if sqe.fuse() != 0 {
        return Err(INVALID_FIELD);
    } else if let Some(status) =
        (0..subsys.namespaces().len()).find_map(|index| subsys.ana_refusal(index))
    {
        // One that cannot be flushed here: to say that all are would be untrue.
        return Err(status);
    }
    expect_no_data(sqe, subsys)?;
    Ok(IoCommand::Flush { nsid })
}

fn write_zeroes(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if !ns.write_zeroes {
        return Err(INVALID_OPCODE);
    }
    if ns.refuses_writes() {
        return Err(WRITE_PROTECTED);
    }
    let (offset, len) = limited_range(sqe, subsys, ns, WRITE_ZEROES_BYTES_MAX)?;
    let deac = sqe.cdw12.get() & 1 << 25 != 0;
    Ok(IoCommand::WriteZeroes { nsid: ns.nsid, offset, len, no_unmap: !deac, fua: fua(sqe) })
}

fn write_uncorrectable(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if !ns.write_uncorrectable {
        return Err(INVALID_OPCODE);
    }
    if has_directive(sqe) {
        return Err(INVALID_FIELD);
    }
    if ns.refuses_writes() {
        return Err(WRITE_PROTECTED);
    }
    let (offset, len) = limited_range(sqe, subsys, ns, WRITE_UNCORRECTABLE_BYTES_MAX)?;
    Ok(IoCommand::WriteUncorrectable { nsid: ns.nsid, offset, len })
}

fn verify(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if !ns.verify {
        return Err(INVALID_OPCODE);
    }
    let (offset, len) = limited_range(sqe, subsys, ns, VERIFY_BYTES_MAX)?;
    Ok(IoCommand::Verify { nsid: ns.nsid, offset, len, fua: fua(sqe) })
}

fn copy(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if !ns.copy {
        return Err(INVALID_OPCODE);
    }
    let cdw12 = sqe.cdw12.get();
    let (ranges, format) = ((cdw12 & 0xff) as u16 + 1, cdw12 >> 8 & 0xf);
    if COPY_FORMATS >> format & 1 == 0 || has_directive(sqe) {
        return Err(INVALID_FIELD);
    }
    // PRINFOW, PRINFOR.
    if cdw12 >> 26 & 0xf != 0 || cdw12 >> 12 & 0xf != 0 {
        return Err(Status::INVALID_PROTECTION_INFORMATION.dnr());
    }
    if ns.refuses_writes() {
        return Err(WRITE_PROTECTED);
    }
    if ranges > COPY_RANGES_MAX {
        return Err(SIZE_LIMIT);
    }
    let (offset, _) = byte_range(sqe.cdw10_11(), 1, ns)?;
    expect_structure(sqe, subsys, u32::from(ranges) * COPY_RANGE_LEN)?;
    Ok(IoCommand::Copy { nsid: ns.nsid, offset, ranges, fua: fua(sqe) })
}

fn dataset_management(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
    let ns = namespace(sqe, subsys)?;
    let nsid = ns.nsid;
    let ranges = (sqe.cdw10.get() & 0xff) as u16 + 1;
    expect_structure(sqe, subsys, u32::from(ranges) * DSM_RANGE_LEN)?;
    if sqe.cdw11.get() & ATTRIBUTE_DEALLOCATE == 0 {
        return Ok(IoCommand::Advisory { nsid });
    }
    if ns.refuses_writes() {
        return Err(WRITE_PROTECTED);
    }
    Ok(if ns.deallocate {
        IoCommand::Deallocate { nsid, ranges }
    } else {
        IoCommand::Advisory { nsid }
    })
}

/// Namespace of a reservation command.
fn reservable<'a>(sqe: &Sqe, subsys: &'a SubsystemInfo) -> Result<&'a NamespaceInfo, Status> {
    let ns = namespace(sqe, subsys)?;
    if ns.reservations { Ok(ns) } else { Err(INVALID_OPCODE) }
}

/// IEKEY of the reservation commands.
fn ignores_key(sqe: &Sqe) -> bool {
    sqe.cdw10.get() & 1 << 3 != 0
}

/// RTYPE of Reservation Acquire and Release.
fn rtype(sqe: &Sqe) -> Option<ReservationType> {
    ReservationType::from_wire((sqe.cdw10.get() >> 8) as u8)
}

fn reservation_register(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = reservable(sqe, subsys)?;
    let cdw10 = sqe.cdw10.get();
    let action = match cdw10 & 7 {
        0 => RegisterAction::Register,
        1 => RegisterAction::Unregister,
        2 => RegisterAction::Replace,
        _ => return Err(INVALID_FIELD),
    };
    let persist = match cdw10 >> 30 {
        0 => PersistChange::Keep,
        2 => PersistChange::Clear,
        3 if ns.ptpl => PersistChange::Set,
        _ => return Err(INVALID_FIELD),
    };
    expect_structure(sqe, subsys, 16)?;
    Ok(IoCommand::ReservationRegister { nsid: ns.nsid, action, iekey: ignores_key(sqe), persist })
}

fn reservation_acquire(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = reservable(sqe, subsys)?;
    let action = match sqe.cdw10.get() & 7 {
        0 => AcquireAction::Acquire,
        1 => AcquireAction::Preempt,
        2 => AcquireAction::PreemptAndAbort,
        _ => return Err(INVALID_FIELD),
    };
    // The key is always looked at: IEKEY is an error, here and in Release.
    let (false, Some(rtype)) = (ignores_key(sqe), rtype(sqe)) else { return Err(INVALID_FIELD) };
    expect_structure(sqe, subsys, 16)?;
    Ok(IoCommand::ReservationAcquire { nsid: ns.nsid, action, rtype })
}

fn reservation_release(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = reservable(sqe, subsys)?;
    let action = match sqe.cdw10.get() & 7 {
        0 => ReleaseAction::Release(rtype(sqe)),
        1 => ReleaseAction::Clear,
        _ => return Err(INVALID_FIELD),
    };
    if ignores_key(sqe) {
        return Err(INVALID_FIELD);
    }
    expect_structure(sqe, subsys, 8)?;
    Ok(IoCommand::ReservationRelease { nsid: ns.nsid, action })
}

fn reservation_report(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = reservable(sqe, subsys)?;
    // EDS: hosts of fabrics have 128-bit identifiers, which the other structure cannot hold.
    if sqe.cdw11.get() & 1 == 0 {
        return Err(Status::HOST_IDENTIFIER_INCONSISTENT_FORMAT.dnr());
    }
    let len = (u64::from(sqe.cdw10.get()) + 1) * 4;
    if len > u64::from(subsys.limits().mdts_bytes) {
        return Err(INVALID_FIELD);
    }
    let len = len as u32;
    if xfer::data_len(sqe, subsys.limits(), len)? != len {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    Ok(IoCommand::ReservationReport { nsid: ns.nsid, len })
}

/// Checks that the host sends at least `min` bytes, and no more than a page.
fn expect_structure(sqe: &Sqe, subsys: &SubsystemInfo, min: u32) -> Result<(), Status> {
    let len = xfer::data_len(sqe, subsys.limits(), min)?;
    if (min..=STRUCTURE_BYTES_MAX).contains(&len) {
        Ok(())
    } else {
        Err(Status::DATA_SGL_LENGTH_INVALID.dnr())
    }
}

#[inline]
fn expect_no_data(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<(), Status> {
    if xfer::data_len(sqe, subsys.limits(), 0)? == 0 {
        Ok(())
    } else {
        Err(Status::DATA_SGL_LENGTH_INVALID.dnr())
    }
}
