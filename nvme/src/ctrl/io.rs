//! I/O commands: from an SQE to a checked byte range of a namespace (NVM Command Set 1.0).
//!
//! Everything the command itself can be wrong about is settled here; what is left for the caller
//! is to move data and run the operation. No allocation, no hashing: this runs once per I/O.

use crate::spec::{DsmRange, NSID_ALL, NvmOpcode, Sqe, Status};
use crate::subsys::{NamespaceInfo, SubsystemInfo, WRITE_ZEROES_BYTES_MAX};
use crate::xfer;

/// Most ranges in one Dataset Management command.
pub const DSM_RANGES_MAX: u16 = 256;
/// Bytes of one Dataset Management range.
pub const DSM_RANGE_LEN: u32 = 16;

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
    /// Flush the volatile write cache of a namespace.
    Flush {
        /// Namespace.
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
}

impl IoCommand {
    /// The namespace.
    #[must_use]
    pub const fn nsid(&self) -> u32 {
        match *self {
            IoCommand::Read { nsid, .. }
            | IoCommand::Write { nsid, .. }
            | IoCommand::Flush { nsid }
            | IoCommand::WriteZeroes { nsid, .. }
            | IoCommand::Deallocate { nsid, .. }
            | IoCommand::Advisory { nsid } => nsid,
        }
    }
}

/// Decodes a command of an I/O queue and checks it against the subsystem. Fabrics commands
/// (opcode 7Fh: Connect, Disconnect) are not I/O commands; take them before.
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
        _ => Err(Status::INVALID_COMMAND_OPCODE.dnr()),
    }
}

/// Checks one range of a Deallocate: byte offset and length. A length of 0 is allowed and means
/// nothing to do.
///
/// # Errors
/// LBA Out of Range.
pub fn dsm_range(bytes: &[u8; 16], ns: &NamespaceInfo) -> Result<(u64, u64), Status> {
    let range: DsmRange = zerocopy::transmute!(*bytes);
    let blocks = u64::from(range.nlb.get());
    let slba = range.slba.get();
    match slba.checked_add(blocks) {
        Some(end) if end <= ns.blocks => Ok((slba << ns.block_shift(), blocks << ns.block_shift())),
        _ => Err(Status::LBA_OUT_OF_RANGE.dnr()),
    }
}

/// Namespace of a command that takes one, after the checks all I/O commands share.
#[inline]
fn namespace<'a>(sqe: &Sqe, subsys: &'a SubsystemInfo) -> Result<&'a NamespaceInfo, Status> {
    if sqe.fuse() != 0 {
        return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    }
    let nsid = sqe.nsid.get();
    subsys.namespace(nsid).ok_or_else(|| {
        // An NSID in 1..=NN without a namespace is inactive: "Invalid Field in Command". One that
        // can never be valid: "Invalid Namespace or Format" (NVMe Base 2.0, "NSID and Namespace
        // Usage").
        if nsid == 0 || nsid > subsys.limits().namespaces_max {
            Status::INVALID_NAMESPACE_OR_FORMAT.dnr()
        } else {
            Status::INVALID_FIELD_IN_COMMAND.dnr()
        }
    })
}

/// Byte range of a command with SLBA in dwords 10, 11 and NLB (zero-based) in dword 12, and the
/// checks those commands share. PRINFO must be clear: no namespace has protection information.
#[inline]
fn lba_range(sqe: &Sqe, ns: &NamespaceInfo) -> Result<(u64, u64), Status> {
    let cdw12 = sqe.cdw12.get();
    if cdw12 >> 26 & 0xf != 0 {
        return Err(Status::INVALID_PROTECTION_INFORMATION.dnr());
    }
    let slba = sqe.cdw10_11();
    let nlb = u64::from(cdw12 & 0xffff) + 1;
    match slba.checked_add(nlb) {
        Some(end) if end <= ns.blocks => Ok((slba << ns.block_shift(), nlb << ns.block_shift())),
        _ => Err(Status::LBA_OUT_OF_RANGE.dnr()),
    }
}

fn fua(sqe: &Sqe) -> bool {
    sqe.cdw12.get() & 1 << 30 != 0
}

#[inline]
fn read_write(sqe: &Sqe, subsys: &SubsystemInfo, is_write: bool) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if is_write {
        // DTYPE: directives are not supported.
        if sqe.cdw12.get() >> 20 & 0xf != 0 {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        if ns.read_only {
            return Err(Status::NAMESPACE_IS_WRITE_PROTECTED.dnr());
        }
    }
    let (offset, len) = lba_range(sqe, ns)?;
    // "If the length exceeds MDTS the controller shall abort with Invalid Field in Command."
    if len > u64::from(subsys.limits().mdts_bytes) {
        return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    }
    let len = len as u32;
    if xfer::parse_data(sqe, subsys.limits().in_capsule_bytes)?.len() != len {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    let (nsid, fua) = (ns.nsid, fua(sqe));
    Ok(if is_write {
        IoCommand::Write { nsid, offset, len, fua }
    } else {
        IoCommand::Read { nsid, offset, len, fua }
    })
}

fn flush(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    // VWC bits 2:1 say 10b: "the controller does not support the NSID set to FFFFFFFFh".
    if sqe.nsid.get() == NSID_ALL {
        return Err(Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
    }
    let ns = namespace(sqe, subsys)?;
    expect_no_data(sqe, subsys)?;
    Ok(IoCommand::Flush { nsid: ns.nsid })
}

fn write_zeroes(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    let ns = namespace(sqe, subsys)?;
    if !ns.write_zeroes {
        return Err(Status::INVALID_COMMAND_OPCODE.dnr());
    }
    if ns.read_only {
        return Err(Status::NAMESPACE_IS_WRITE_PROTECTED.dnr());
    }
    let (offset, len) = lba_range(sqe, ns)?;
    // WZSL: "shall abort the command with Invalid Field in Command".
    if len > u64::from(WRITE_ZEROES_BYTES_MAX) {
        return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    }
    expect_no_data(sqe, subsys)?;
    let deac = sqe.cdw12.get() & 1 << 25 != 0;
    Ok(IoCommand::WriteZeroes { nsid: ns.nsid, offset, len, no_unmap: !deac, fua: fua(sqe) })
}

fn dataset_management(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<IoCommand, Status> {
    const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
    let ns = namespace(sqe, subsys)?;
    let nsid = ns.nsid;
    let ranges = (sqe.cdw10.get() & 0xff) as u16 + 1;
    let len = xfer::parse_data(sqe, subsys.limits().in_capsule_bytes)?.len();
    let (min, max) = (u32::from(ranges) * DSM_RANGE_LEN, u32::from(DSM_RANGES_MAX) * DSM_RANGE_LEN);
    if !(min..=max).contains(&len) {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    if sqe.cdw11.get() & ATTRIBUTE_DEALLOCATE == 0 {
        return Ok(IoCommand::Advisory { nsid });
    }
    if ns.read_only {
        return Err(Status::NAMESPACE_IS_WRITE_PROTECTED.dnr());
    }
    Ok(if ns.deallocate {
        IoCommand::Deallocate { nsid, ranges }
    } else {
        IoCommand::Advisory { nsid }
    })
}

fn expect_no_data(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<(), Status> {
    if xfer::parse_data(sqe, subsys.limits().in_capsule_bytes)?.is_empty() {
        Ok(())
    } else {
        Err(Status::DATA_SGL_LENGTH_INVALID.dnr())
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;
    use zerocopy::little_endian::{U32, U64};

    use super::*;
    use crate::spec::SglDescriptor;
    use crate::subsys::tests::sample;

    fn rw(opcode: NvmOpcode, nsid: u32, slba: u64, blocks: u32, len: u32) -> Sqe {
        let mut sqe = Sqe::new(opcode.0);
        sqe.nsid.set(nsid);
        sqe.cdw10.set(slba as u32);
        sqe.cdw11.set((slba >> 32) as u32);
        sqe.cdw12.set(blocks - 1);
        sqe.dptr = SglDescriptor::transport(len);
        sqe
    }

    #[track_caller]
    fn refused(sqe: Sqe, status: Status) {
        assert_eq!(decode(&sqe, &sample()), Err(status.dnr()));
    }

    #[test]
    fn read_and_write() {
        let subsys = sample();
        assert_eq!(
            decode(&rw(NvmOpcode::READ, 1, 2040, 8, 4096), &subsys),
            Ok(IoCommand::Read { nsid: 1, offset: 2040 * 512, len: 4096, fua: false })
        );
        let mut sqe = rw(NvmOpcode::WRITE, 9, (1 << 40) - 8, 8, 4096);
        sqe.cdw12.set(7 | 1 << 30 | 1 << 31);
        sqe.dptr = SglDescriptor::in_capsule(0, 4096);
        assert_eq!(
            decode(&sqe, &subsys),
            Ok(IoCommand::Write { nsid: 9, offset: ((1 << 40) - 8) << 9, len: 4096, fua: true })
        );
        // MDTS of the sample is 1 MiB.
        assert!(decode(&rw(NvmOpcode::READ, 9, 0, 2048, 1 << 20), &subsys).is_ok());
        refused(rw(NvmOpcode::READ, 9, 0, 2049, (1 << 20) + 512), Status::INVALID_FIELD_IN_COMMAND);
        assert!(decode(&rw(NvmOpcode::READ, 3, 255, 1, 4096), &subsys).is_ok());
    }

    #[test]
    fn read_and_write_refusals() {
        use NvmOpcode as Op;
        refused(rw(Op::READ, 1, 2041, 8, 4096), Status::LBA_OUT_OF_RANGE);
        refused(rw(Op::READ, 1, u64::MAX, 1, 512), Status::LBA_OUT_OF_RANGE);
        refused(rw(Op::READ, 9, u64::MAX - 7, 8, 4096), Status::LBA_OUT_OF_RANGE);
        refused(rw(Op::READ, 1, 0, 8, 4095), Status::DATA_SGL_LENGTH_INVALID);
        refused(rw(Op::READ, 1, 0, 8, 8192), Status::DATA_SGL_LENGTH_INVALID);
        refused(rw(Op::READ, 1, 0, 8, 0), Status::DATA_SGL_LENGTH_INVALID);
        refused(rw(Op::WRITE, 3, 0, 1, 4096), Status::NAMESPACE_IS_WRITE_PROTECTED);
        refused(rw(Op::READ, 2, 0, 1, 512), Status::INVALID_FIELD_IN_COMMAND);
        refused(rw(Op::READ, 0, 0, 1, 512), Status::INVALID_NAMESPACE_OR_FORMAT);
        refused(rw(Op::READ, NSID_ALL, 0, 1, 512), Status::INVALID_NAMESPACE_OR_FORMAT);
        let mut sqe = rw(Op::READ, 1, 0, 1, 512);
        sqe.cdw12.set(1 << 29);
        refused(sqe, Status::INVALID_PROTECTION_INFORMATION);
        sqe = rw(Op::WRITE, 1, 0, 1, 512);
        sqe.cdw12.set(1 << 20);
        refused(sqe, Status::INVALID_FIELD_IN_COMMAND);
        sqe = rw(Op::WRITE, 1, 0, 1, 512);
        sqe.flags |= 1;
        refused(sqe, Status::INVALID_FIELD_IN_COMMAND);
        sqe = rw(Op::WRITE, 1, 0, 16, 8192);
        sqe.dptr = SglDescriptor::in_capsule(0, 8192);
        refused(sqe, Status::SGL_OFFSET_INVALID);
        for opcode in (0..=255).map(NvmOpcode) {
            let supported =
                [Op::READ, Op::WRITE, Op::FLUSH, Op::WRITE_ZEROES, Op::DATASET_MANAGEMENT];
            if !supported.contains(&opcode) {
                refused(rw(opcode, 1, 0, 1, 512), Status::INVALID_COMMAND_OPCODE);
            }
        }
    }

    #[test]
    fn flush() {
        let subsys = sample();
        assert_eq!(
            decode(&rw(NvmOpcode::FLUSH, 3, 0, 1, 0), &subsys),
            Ok(IoCommand::Flush { nsid: 3 })
        );
        refused(rw(NvmOpcode::FLUSH, NSID_ALL, 0, 1, 0), Status::INVALID_NAMESPACE_OR_FORMAT);
        refused(rw(NvmOpcode::FLUSH, 1, 0, 1, 4), Status::DATA_SGL_LENGTH_INVALID);
    }

    #[test]
    fn write_zeroes() {
        let subsys = sample();
        let mut sqe = rw(NvmOpcode::WRITE_ZEROES, 1, 8, 16, 0);
        assert_eq!(
            decode(&sqe, &subsys),
            Ok(IoCommand::WriteZeroes {
                nsid: 1,
                offset: 4096,
                len: 8192,
                no_unmap: true,
                fua: false
            })
        );
        sqe.cdw12.set(15 | 1 << 25 | 1 << 30);
        assert_eq!(
            decode(&sqe, &subsys),
            Ok(IoCommand::WriteZeroes {
                nsid: 1,
                offset: 4096,
                len: 8192,
                no_unmap: false,
                fua: true
            })
        );
        refused(rw(NvmOpcode::WRITE_ZEROES, 1, 2048, 1, 0), Status::LBA_OUT_OF_RANGE);
        refused(rw(NvmOpcode::WRITE_ZEROES, 9, 0, 1, 0), Status::INVALID_COMMAND_OPCODE);
        refused(rw(NvmOpcode::WRITE_ZEROES, 1, 0, 1, 512), Status::DATA_SGL_LENGTH_INVALID);
    }

    #[test]
    fn dataset_management() {
        let subsys = sample();
        let dsm = |nsid, ranges: u32, attributes, len| {
            let mut sqe = rw(NvmOpcode::DATASET_MANAGEMENT, nsid, 0, 1, len);
            sqe.cdw10.set(ranges - 1);
            sqe.cdw11.set(attributes);
            sqe
        };
        // What Linux sends: one range, a page of data.
        assert_eq!(
            decode(&dsm(1, 1, 4, 4096), &subsys),
            Ok(IoCommand::Deallocate { nsid: 1, ranges: 1 })
        );
        assert_eq!(
            decode(&dsm(1, 256, 4, 4096), &subsys),
            Ok(IoCommand::Deallocate { nsid: 1, ranges: 256 })
        );
        assert_eq!(decode(&dsm(1, 1, 3, 16), &subsys), Ok(IoCommand::Advisory { nsid: 1 }));
        assert_eq!(decode(&dsm(9, 1, 4, 16), &subsys), Ok(IoCommand::Advisory { nsid: 9 }));
        refused(dsm(1, 2, 4, 16), Status::DATA_SGL_LENGTH_INVALID);
        refused(dsm(1, 2, 4, 4112), Status::DATA_SGL_LENGTH_INVALID);
        refused(dsm(3, 1, 4, 16), Status::NAMESPACE_IS_WRITE_PROTECTED);
    }

    #[test]
    fn ranges_are_checked_against_the_namespace() {
        let subsys = sample();
        let ns = subsys.namespace(1).unwrap();
        let range = |slba, nlb| {
            let range = DsmRange {
                context_attributes: U32::ZERO,
                nlb: U32::new(nlb),
                slba: U64::new(slba),
            };
            dsm_range(range.as_bytes().try_into().unwrap(), ns)
        };
        assert_eq!(range(2040, 8), Ok((2040 * 512, 4096)));
        assert_eq!(range(2048, 0), Ok((2048 * 512, 0)));
        assert_eq!(range(2041, 8), Err(Status::LBA_OUT_OF_RANGE.dnr()));
        assert_eq!(range(u64::MAX, 2), Err(Status::LBA_OUT_OF_RANGE.dnr()));
    }
}
