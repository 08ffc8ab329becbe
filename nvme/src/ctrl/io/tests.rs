//! Decoding of I/O commands.

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
    refused(sqe, Status::DATA_SGL_LENGTH_INVALID);
    let known = [
        Op::READ,
        Op::WRITE,
        Op::FLUSH,
        Op::WRITE_ZEROES,
        Op::DATASET_MANAGEMENT,
        Op::COMPARE,
        Op::VERIFY,
        Op::COPY,
    ];
    // Without the namespace's flag the reservation commands and Write Uncorrectable do not exist.
    for opcode in (0..=255).map(NvmOpcode).filter(|opcode| !known.contains(opcode)) {
        refused(rw(opcode, 1, 0, 1, 512), Status::INVALID_COMMAND_OPCODE);
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
        Ok(IoCommand::WriteZeroes { nsid: 1, offset: 4096, len: 8192, no_unmap: true, fua: false })
    );
    sqe.cdw12.set(15 | 1 << 25 | 1 << 30);
    assert_eq!(
        decode(&sqe, &subsys),
        Ok(IoCommand::WriteZeroes { nsid: 1, offset: 4096, len: 8192, no_unmap: false, fua: true })
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
        let range =
            DsmRange { context_attributes: U32::ZERO, nlb: U32::new(nlb), slba: U64::new(slba) };
        dsm_range(range.as_bytes().try_into().unwrap(), ns)
    };
    assert_eq!(range(2040, 8), Ok((2040 * 512, 4096)));
    assert_eq!(range(2048, 0), Ok((2048 * 512, 0)));
    assert_eq!(range(2041, 8), Err(Status::LBA_OUT_OF_RANGE.dnr()));
    assert_eq!(range(u64::MAX, 2), Err(Status::LBA_OUT_OF_RANGE.dnr()));
}
