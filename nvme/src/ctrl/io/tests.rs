//! Decoding of I/O commands.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::*;
use crate::spec::SglDescriptor;
use crate::subsys::ana::{AnaGroup, AnaState};
use crate::subsys::reservation::ReservationRequest;
use crate::subsys::tests::{build, sample};
use crate::subsys::{COPY_RANGE_BYTES_MAX, Limits};

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
    assert_eq!(
        decode(&rw(NvmOpcode::FLUSH, NSID_ALL, 0, 1, 0), &subsys),
        Ok(IoCommand::Flush { nsid: NSID_ALL })
    );
    let mut fused = rw(NvmOpcode::FLUSH, NSID_ALL, 0, 1, 0);
    fused.flags |= 1;
    refused(fused, Status::INVALID_FIELD_IN_COMMAND);
    refused(rw(NvmOpcode::FLUSH, NSID_ALL, 0, 1, 4), Status::DATA_SGL_LENGTH_INVALID);
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

/// [`sample`] with every optional command: namespace 1 with reservations that can be kept, 3 (read
/// only) and 9 (a host protected it from writes) with reservations that cannot.
fn full() -> SubsystemInfo {
    let mut namespaces = sample().namespaces().to_vec();
    for ns in &mut namespaces {
        ns.write_uncorrectable = true;
        ns.write_zeroes = true;
        ns.reservations = true;
        ns.ptpl = ns.nsid == 1;
        ns.write_protect = ns.nsid == 9;
        ns.ana_group = ns.nsid;
    }
    build(namespaces, Limits::default()).unwrap()
}

#[track_caller]
fn refused_full(sqe: Sqe, status: Status) {
    assert_eq!(decode(&sqe, &full()), Err(status.dnr()));
}

#[test]
fn compare() {
    let subsys = sample();
    let mut sqe = rw(NvmOpcode::COMPARE, 3, 255, 1, 4096);
    // A read-only namespace can be compared with; Limited Retry is a hint.
    sqe.cdw12.set(1 << 30 | 1 << 31);
    assert_eq!(
        decode(&sqe, &subsys),
        Ok(IoCommand::Compare { nsid: 3, offset: 255 * 4096, len: 4096, fua: true })
    );
    refused(rw(NvmOpcode::COMPARE, 1, 2048, 1, 512), Status::LBA_OUT_OF_RANGE);
    refused(rw(NvmOpcode::COMPARE, 1, 0, 1, 1024), Status::DATA_SGL_LENGTH_INVALID);
    let too_long = rw(NvmOpcode::COMPARE, 9, 0, 2049, (1 << 20) + 512);
    refused(too_long, Status::INVALID_FIELD_IN_COMMAND);
}

#[test]
fn verify() {
    let subsys = sample();
    assert_eq!(
        decode(&rw(NvmOpcode::VERIFY, 9, 4, 65536, 0), &subsys),
        Ok(IoCommand::Verify { nsid: 9, offset: 2048, len: 32 << 20, fua: false })
    );
    refused(rw(NvmOpcode::VERIFY, 1, 2041, 8, 0), Status::LBA_OUT_OF_RANGE);
    refused(rw(NvmOpcode::VERIFY, 1, 0, 1, 512), Status::DATA_SGL_LENGTH_INVALID);
    // 8193 blocks of 4096 bytes are more than VSL.
    let mut big = sample().namespaces().to_vec();
    big[1].blocks = 1 << 20;
    let subsys = build(big, Limits::default()).unwrap();
    assert!(decode(&rw(NvmOpcode::VERIFY, 3, 0, 8192, 0), &subsys).is_ok());
    assert_eq!(
        decode(&rw(NvmOpcode::VERIFY, 3, 0, 8193, 0), &subsys),
        Err(Status::INVALID_FIELD_IN_COMMAND.dnr())
    );
}

#[test]
fn write_uncorrectable() {
    let command = rw(NvmOpcode::WRITE_UNCORRECTABLE, 1, 8, 8, 0);
    assert_eq!(
        decode(&command, &full()),
        Ok(IoCommand::WriteUncorrectable { nsid: 1, offset: 4096, len: 4096 })
    );
    refused(command, Status::INVALID_COMMAND_OPCODE);
    for nsid in [3, 9] {
        let sqe = rw(NvmOpcode::WRITE_UNCORRECTABLE, nsid, 0, 1, 0);
        refused_full(sqe, Status::NAMESPACE_IS_WRITE_PROTECTED);
    }
    let sqe = rw(NvmOpcode::WRITE_UNCORRECTABLE, 1, 2048, 1, 0);
    refused_full(sqe, Status::LBA_OUT_OF_RANGE);
}

/// A host that protected a namespace may read and flush it.
#[test]
fn write_protection_by_the_host() {
    use NvmOpcode as Op;
    for opcode in [Op::READ, Op::COMPARE] {
        assert!(decode(&rw(opcode, 9, 0, 1, 512), &full()).is_ok());
    }
    for opcode in [Op::FLUSH, Op::VERIFY] {
        assert!(decode(&rw(opcode, 9, 0, 1, 0), &full()).is_ok());
    }
    let mut copy = rw(Op::COPY, 9, 0, 1, 32);
    copy.cdw12.set(0);
    let mut deallocate = rw(Op::DATASET_MANAGEMENT, 9, 0, 1, 16);
    deallocate.cdw11.set(4);
    for sqe in [rw(Op::WRITE, 9, 0, 1, 512), rw(Op::WRITE_ZEROES, 9, 0, 1, 0), copy, deallocate] {
        refused_full(sqe, Status::NAMESPACE_IS_WRITE_PROTECTED);
    }
}

fn copy_command(nsid: u32, sdlba: u64, ranges: u32, len: u32) -> Sqe {
    let mut sqe = rw(NvmOpcode::COPY, nsid, sdlba, 1, len);
    sqe.cdw12.set(ranges - 1);
    sqe
}

#[test]
fn copy() {
    let subsys = sample();
    assert_eq!(
        decode(&copy_command(1, 2047, 1, 32), &subsys),
        Ok(IoCommand::Copy { nsid: 1, offset: 2047 * 512, ranges: 1, fua: false })
    );
    let mut sqe = copy_command(1, 0, 128, 4096);
    sqe.cdw12.set(sqe.cdw12.get() | 1 << 30);
    assert_eq!(
        decode(&sqe, &subsys),
        Ok(IoCommand::Copy { nsid: 1, offset: 0, ranges: 128, fua: true })
    );
    refused(copy_command(1, 0, 129, 4096), Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    refused(copy_command(1, 2048, 1, 32), Status::LBA_OUT_OF_RANGE);
    refused(copy_command(1, 0, 2, 32), Status::DATA_SGL_LENGTH_INVALID);
    refused(copy_command(1, 0, 1, 4100), Status::DATA_SGL_LENGTH_INVALID);
    refused(copy_command(3, 0, 1, 32), Status::NAMESPACE_IS_WRITE_PROTECTED);
    let with = |bits: u32| {
        let mut sqe = copy_command(1, 0, 1, 32);
        sqe.cdw12.set(bits);
        sqe
    };
    // Descriptor formats other than 0h, a directive, protection information at either end.
    for format in 1..16 {
        refused(with(format << 8), Status::INVALID_FIELD_IN_COMMAND);
    }
    refused(with(1 << 20), Status::INVALID_FIELD_IN_COMMAND);
    refused(with(1 << 12), Status::INVALID_PROTECTION_INFORMATION);
    refused(with(1 << 29), Status::INVALID_PROTECTION_INFORMATION);
}

fn copy_source(slba: u64, blocks: u32) -> [u8; 32] {
    let range = CopyRange {
        slba: U64::new(slba),
        nlb_z: U16::new((blocks - 1) as u16),
        ..CopyRange::default()
    };
    range.as_bytes().try_into().unwrap()
}

#[test]
fn copy_sources() {
    let subsys = sample();
    let (one, nine) = (subsys.namespace(1).unwrap(), subsys.namespace(9).unwrap());
    assert_eq!(copy_range(&copy_source(2040, 8), one), Ok((2040 * 512, 4096)));
    let out = Err(Status::LBA_OUT_OF_RANGE.dnr());
    assert_eq!(copy_range(&copy_source(2041, 8), one), out);
    assert_eq!(copy_range(&copy_source(u64::MAX, 8), one), out);
    // MSSRL is 4 MiB.
    assert_eq!((nine.mssrl_blocks(), nine.mcl_blocks()), (8192, 65536));
    assert!(copy_range(&copy_source(0, 8192), nine).is_ok());
    let too_much = Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr());
    assert_eq!(copy_range(&copy_source(0, 8193), nine), too_much);

    let check = |to: u64, ranges: &[[u8; 32]], ns| {
        let count = ranges.len() as u16;
        copy_check(to * 512, count, ns, |index| ranges.get(usize::from(index)).copied())
            .map(|bytes| bytes / 512)
    };
    assert_eq!(check(100, &[copy_source(0, 50), copy_source(200, 7)], one), Ok(57));
    // Sources may overlap each other and touch the destination, not overlap it.
    assert_eq!(check(100, &[copy_source(0, 100), copy_source(0, 100)], one), Ok(200));
    assert_eq!(
        check(100, &[copy_source(150, 50), copy_source(50, 50)], one).err(),
        Some(Status::OVERLAPPING_IO_RANGE.dnr())
    );
    assert_eq!(check(100, &[copy_source(150, 50)], one), Ok(50));
    assert_eq!(
        check(100, &[copy_source(149, 50)], one).err(),
        Some(Status::OVERLAPPING_IO_RANGE.dnr())
    );
    assert_eq!(check(2000, &[copy_source(0, 49)], one), out.map(|_: (u64, u64)| 0));
    // MCL is 32 MiB, eight of the longest sources.
    let eight = [copy_source(0, 8192); 8];
    assert_eq!(check(1 << 20, &eight, nine), Ok(65536));
    let mut nine_sources = eight.to_vec();
    nine_sources.push(copy_source(0, 1));
    assert_eq!(check(1 << 20, &nine_sources, nine).err(), too_much.err());
    assert_eq!(
        copy_check(0, 1, one, |_| None),
        Err(Status::DATA_SGL_LENGTH_INVALID.dnr()),
        "less data than ranges"
    );
}

fn reservation(opcode: NvmOpcode, nsid: u32, cdw10: u32, len: u32) -> Sqe {
    let mut sqe = rw(opcode, nsid, 0, 1, len);
    sqe.cdw10.set(cdw10);
    sqe
}

#[test]
fn reservation_commands() {
    use NvmOpcode as Op;
    let ok = |sqe: Sqe, command| assert_eq!(decode(&sqe, &full()), Ok(command));
    ok(
        reservation(Op::RESERVATION_REGISTER, 1, 2 | 1 << 3 | 3 << 30, 16),
        IoCommand::ReservationRegister {
            nsid: 1,
            action: RegisterAction::Replace,
            iekey: true,
            persist: PersistChange::Set,
        },
    );
    ok(
        reservation(Op::RESERVATION_REGISTER, 3, 1 | 2 << 30, 4096),
        IoCommand::ReservationRegister {
            nsid: 3,
            action: RegisterAction::Unregister,
            iekey: false,
            persist: PersistChange::Clear,
        },
    );
    ok(
        reservation(Op::RESERVATION_ACQUIRE, 9, 2 | 6 << 8, 16),
        IoCommand::ReservationAcquire {
            nsid: 9,
            action: AcquireAction::PreemptAndAbort,
            rtype: ReservationType::ExclusiveAccessAllRegistrants,
        },
    );
    ok(
        reservation(Op::RESERVATION_RELEASE, 1, 1 << 8, 8),
        IoCommand::ReservationRelease {
            nsid: 1,
            action: ReleaseAction::Release(Some(ReservationType::WriteExclusive)),
        },
    );
    // The type means nothing to Clear, and to Release that it cannot be held.
    ok(
        reservation(Op::RESERVATION_RELEASE, 1, 1 | 99 << 8, 16),
        IoCommand::ReservationRelease { nsid: 1, action: ReleaseAction::Clear },
    );
    ok(
        reservation(Op::RESERVATION_RELEASE, 1, 99 << 8, 16),
        IoCommand::ReservationRelease { nsid: 1, action: ReleaseAction::Release(None) },
    );
    let mut report = reservation(Op::RESERVATION_REPORT, 1, 15, 64);
    report.cdw11.set(1);
    ok(report, IoCommand::ReservationReport { nsid: 1, len: 64 });
}

#[test]
fn reservation_command_refusals() {
    use NvmOpcode as Op;
    let field = Status::INVALID_FIELD_IN_COMMAND;
    for action in 3..8 {
        for opcode in [Op::RESERVATION_REGISTER, Op::RESERVATION_RELEASE] {
            refused_full(reservation(opcode, 1, action, 16), field);
        }
        refused_full(reservation(Op::RESERVATION_ACQUIRE, 1, action | 1 << 8, 16), field);
    }
    refused_full(reservation(Op::RESERVATION_RELEASE, 1, 2, 16), field);
    // CPTPL: 01b is reserved, 11b needs a namespace that can.
    refused_full(reservation(Op::RESERVATION_REGISTER, 1, 1 << 30, 16), field);
    refused_full(reservation(Op::RESERVATION_REGISTER, 3, 3 << 30, 16), field);
    for rtype in [0, 7, 255] {
        refused_full(reservation(Op::RESERVATION_ACQUIRE, 1, rtype << 8, 16), field);
    }
    // IEKEY is for Register.
    refused_full(reservation(Op::RESERVATION_ACQUIRE, 1, 1 << 3 | 1 << 8, 16), field);
    refused_full(reservation(Op::RESERVATION_RELEASE, 1, 1 << 3 | 1 << 8, 16), field);
    let length = Status::DATA_SGL_LENGTH_INVALID;
    for (opcode, len) in [
        (Op::RESERVATION_REGISTER, 15),
        (Op::RESERVATION_ACQUIRE, 15),
        (Op::RESERVATION_RELEASE, 7),
        (Op::RESERVATION_REGISTER, 4097),
    ] {
        refused_full(reservation(opcode, 1, 1 << 8, len), length);
    }
    let report = |cdw10, cdw11: u32, len| {
        let mut sqe = reservation(Op::RESERVATION_REPORT, 1, cdw10, len);
        sqe.cdw11.set(cdw11);
        sqe
    };
    refused_full(report(15, 0, 64), Status::HOST_IDENTIFIER_INCONSISTENT_FORMAT);
    refused_full(report(15, 1, 60), length);
    refused_full(report((1 << 18) - 1, 1, 64), length);
    refused_full(report(1 << 18, 1, (1 << 20) + 4), field);
    refused_full(report(u32::MAX, 1, 0), field);
    // A namespace that hosts do not share has none of the commands.
    for opcode in [
        Op::RESERVATION_REGISTER,
        Op::RESERVATION_ACQUIRE,
        Op::RESERVATION_RELEASE,
        Op::RESERVATION_REPORT,
    ] {
        refused(reservation(opcode, 1, 0, 16), Status::INVALID_COMMAND_OPCODE);
    }
}

/// Commands of every kind to namespace 1 of [`full`].
fn one_of_each() -> Vec<Sqe> {
    use NvmOpcode as Op;
    let mut report = reservation(Op::RESERVATION_REPORT, 1, 15, 64);
    report.cdw11.set(1);
    let mut deallocate = reservation(Op::DATASET_MANAGEMENT, 1, 0, 16);
    deallocate.cdw11.set(4);
    vec![
        rw(Op::READ, 1, 0, 1, 512),
        rw(Op::COMPARE, 1, 0, 1, 512),
        rw(Op::VERIFY, 1, 0, 1, 0),
        rw(Op::WRITE, 1, 0, 1, 512),
        rw(Op::FLUSH, 1, 0, 1, 0),
        rw(Op::WRITE_ZEROES, 1, 0, 1, 0),
        deallocate,
        reservation(Op::DATASET_MANAGEMENT, 1, 0, 16),
        copy_command(1, 0, 1, 32),
        rw(Op::WRITE_UNCORRECTABLE, 1, 0, 1, 0),
        reservation(Op::RESERVATION_REGISTER, 1, 0, 16),
        reservation(Op::RESERVATION_ACQUIRE, 1, 1 << 8, 16),
        reservation(Op::RESERVATION_RELEASE, 1, 1, 16),
        report,
    ]
}

#[test]
fn ana_states_refuse_io() {
    let state_of = |state| {
        let groups = [(1, state), (3, AnaState::Optimized), (9, AnaState::NonOptimized)];
        let groups = groups.map(|(id, state)| AnaGroup::new(id, state)).to_vec();
        full().with_ana_groups(groups).unwrap()
    };
    for (state, refusal) in [
        (AnaState::Optimized, None),
        (AnaState::NonOptimized, None),
        (AnaState::Inaccessible, Some(Status::ANA_INACCESSIBLE)),
        (AnaState::PersistentLoss, Some(Status::ANA_PERSISTENT_LOSS)),
        (AnaState::Change, Some(Status::ANA_TRANSITION)),
    ] {
        let subsys = state_of(state);
        for sqe in one_of_each() {
            assert_eq!(decode(&sqe, &subsys).err(), refusal, "{state:?} {sqe:?}");
        }
        // Other groups are as before, and there is still no namespace 2.
        assert!(decode(&rw(NvmOpcode::READ, 3, 0, 1, 4096), &subsys).is_ok());
        assert!(decode(&rw(NvmOpcode::READ, 9, 0, 1, 512), &subsys).is_ok());
        let none = decode(&rw(NvmOpcode::READ, 2, 0, 1, 512), &subsys);
        assert_eq!(none, Err(Status::INVALID_FIELD_IN_COMMAND.dnr()));
    }
}

#[test]
fn access_and_data_of_each_command() {
    let read = (Access::Read, 0);
    let expected = [
        read,
        (Access::Read, 512),
        read,
        (Access::Write, 512),
        (Access::Write, 0),
        (Access::Write, 0),
        (Access::Write, 16),
        (Access::Write, 0),
        (Access::Write, 32),
        (Access::Write, 0),
        (Access::Other, 16),
        (Access::Other, 16),
        (Access::Other, 8),
        (Access::Other, 0),
    ];
    for (sqe, (access, host_data)) in one_of_each().into_iter().zip(expected) {
        let command = decode(&sqe, &full()).unwrap();
        assert_eq!((command.access(), command.host_data_len()), (access, host_data), "{sqe:?}");
        assert_eq!(command.nsid(), 1);
        let is_advisory = matches!(command, IoCommand::Advisory { .. });
        assert_eq!(command.takes_data(), host_data > 0 || is_advisory);
        let reply = match command {
            IoCommand::Read { .. } => 512,
            IoCommand::ReservationReport { .. } => 64,
            _ => 0,
        };
        assert_eq!(command.reply_len(), reply);
    }
}

#[test]
fn fuse_fits_compare_first_and_write_second_only() {
    for mut sqe in one_of_each() {
        let opcode = NvmOpcode(sqe.opcode);
        for fuse in 1..4 {
            sqe.flags = sqe.flags & !3 | fuse;
            let fits = matches!((opcode, fuse), (NvmOpcode::COMPARE, 1) | (NvmOpcode::WRITE, 2));
            let expected = (!fits).then_some(Status::INVALID_FIELD_IN_COMMAND.dnr());
            assert_eq!(decode(&sqe, &full()).err(), expected, "{sqe:?}");
        }
    }
}

/// SQEs of which many decode: the fields' usual values, and any.
fn sqes() -> impl Strategy<Value = Sqe> {
    let known = one_of_each().into_iter().map(|sqe| sqe.opcode).collect::<Vec<_>>();
    let opcode = prop_oneof![8 => proptest::sample::select(known), 1 => any::<u8>()];
    let dword = || prop_oneof![4 => 0u32..16, 2 => 0u32..4096, 1 => any::<u32>()];
    let bit = prop_oneof![4 => Just(0u32), 4 => Just(1), 1 => any::<u32>()];
    // `None`: what the command of this size has, or a structure.
    let len = prop_oneof![
        8 => Just(None),
        1 => Just(Some(0u32)),
        1 => Just(Some(4096u32)),
        1 => any::<u32>().prop_map(Some),
    ];
    let flags = prop_oneof![8 => Just(0x40u8), 1 => 0x41u8..0x43, 1 => any::<u8>()];
    let nsid = prop_oneof![4 => Just(1u32), 2 => Just(3), 2 => Just(9), 1 => 0u32..12];
    let dwords = (dword(), bit, dword());
    (any::<[u8; 64]>(), opcode, flags, nsid, dwords, len).prop_map(
        |(bytes, opcode, flags, nsid, (cdw10, cdw11, cdw12), len)| {
            let mut sqe = Sqe::from_bytes(&bytes);
            (sqe.opcode, sqe.flags) = (opcode, flags);
            sqe.nsid.set(nsid);
            sqe.cdw10.set(cdw10);
            sqe.cdw11.set(cdw11);
            sqe.cdw12.set(cdw12);
            let block_bytes = if nsid == 3 { 4096 } else { 512 };
            let own = match NvmOpcode(opcode) {
                NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::COMPARE => {
                    ((cdw12 & 0xffff) + 1) * block_bytes
                }
                NvmOpcode::RESERVATION_REPORT => cdw10.wrapping_add(1).wrapping_mul(4),
                _ if sqe.direction() == crate::spec::Direction::None => 0,
                NvmOpcode::WRITE_UNCORRECTABLE => 0,
                _ => 4096,
            };
            sqe.dptr = SglDescriptor::transport(len.unwrap_or(own));
            sqe
        },
    )
}

/// What holds of every decoded command: its range, and what it says of its data.
fn check_decoded(sqe: &Sqe, subsys: &SubsystemInfo) -> Result<(), TestCaseError> {
    let command = match decode(sqe, subsys) {
        Ok(command) => command,
        Err(status) => {
            prop_assert!(!status.is_success());
            // Only the state of a path passes.
            prop_assert_eq!(status.is_dnr(), status.sct() != crate::spec::SCT_PATH);
            return Ok(());
        }
    };
    let ns = subsys.namespace(command.nsid()).unwrap();
    let block = u64::from(ns.block_bytes);
    let range = match command {
        IoCommand::Read { offset, len, .. }
        | IoCommand::Write { offset, len, .. }
        | IoCommand::Compare { offset, len, .. } => Some((offset, u64::from(len))),
        IoCommand::WriteZeroes { offset, len, .. }
        | IoCommand::Verify { offset, len, .. }
        | IoCommand::WriteUncorrectable { offset, len, .. } => Some((offset, len)),
        IoCommand::Copy { offset, .. } => Some((offset, block)),
        _ => None,
    };
    if let Some((offset, len)) = range {
        prop_assert!(len > 0 && offset % block == 0 && len % block == 0);
        prop_assert!(offset.checked_add(len).is_some_and(|end| end <= ns.size_bytes()));
        prop_assert!(len <= 32 << 20);
    }
    let sent = xfer::parse_data(sqe, subsys.limits().in_capsule_bytes).unwrap().len();
    let moved = command.host_data_len().max(command.reply_len());
    prop_assert!(moved <= sent && sent <= subsys.limits().mdts_bytes);
    prop_assert!(sent == 0 || command.takes_data() != (command.reply_len() > 0));
    if command.access() == Access::Write {
        let only_hints = matches!(command, IoCommand::Flush { .. } | IoCommand::Advisory { .. });
        prop_assert!(only_hints || !ns.refuses_writes());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_64_bytes(bytes in any::<[u8; 64]>()) {
        check_decoded(&Sqe::from_bytes(&bytes), &full())?;
    }

    #[test]
    fn likely_commands(sqe in sqes(), impaired in 1u32..10) {
        let states = [AnaState::Optimized, AnaState::Inaccessible];
        let groups = [1, 3, 9].map(|id| AnaGroup::new(id, states[usize::from(id == impaired)]));
        check_decoded(&sqe, &full())?;
        check_decoded(&sqe, &full().with_ana_groups(groups.to_vec()).unwrap())?;
    }

    #[test]
    fn any_range(bytes in any::<[u8; 32]>(), small in 0u64..3000, zeroes in 0usize..16) {
        let subsys = full();
        for ns in subsys.namespaces() {
            // Any bytes, and the same with a start that may be inside.
            let mut near = bytes;
            near[8..16].copy_from_slice(&small.to_le_bytes());
            near[18 - zeroes.min(2)..18].fill(0);
            for bytes in [bytes, near] {
                if let Ok((offset, len)) = copy_range(&bytes, ns) {
                    prop_assert!(len > 0 && len <= u64::from(COPY_RANGE_BYTES_MAX));
                    prop_assert!(offset + len <= ns.size_bytes());
                }
                let range = bytes.first_chunk::<16>().unwrap();
                if let Ok((offset, len)) = dsm_range(range, ns) {
                    prop_assert!(offset.checked_add(len).unwrap() <= ns.size_bytes());
                }
            }
        }
    }

    #[test]
    fn any_copy(
        to in 0u64..2048,
        sources in proptest::collection::vec((0u64..2100, 1u32..300), 1..20),
    ) {
        let subsys = full();
        let ns = subsys.namespace(1).unwrap();
        let bytes: Vec<_> = sources.iter().map(|&(slba, n)| copy_source(slba, n)).collect();
        let got = copy_check(to * 512, bytes.len() as u16, ns, |at| bytes.get(usize::from(at)).copied());
        let total: u64 = sources.iter().map(|&(_, n)| u64::from(n)).sum();
        let outside = sources.iter().any(|&(slba, n)| slba + u64::from(n) > ns.blocks);
        // Block by block.
        let overlaps = sources
            .iter()
            .any(|&(slba, n)| (slba..slba + u64::from(n)).any(|b| b >= to && b < to + total));
        let expected = if outside || to + total > ns.blocks {
            Err(Status::LBA_OUT_OF_RANGE.dnr())
        } else if overlaps {
            Err(Status::OVERLAPPING_IO_RANGE.dnr())
        } else {
            Ok(total * 512)
        };
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn any_reservation_data(sqe in sqes(), data in proptest::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(command) = decode(&sqe, &full()) {
            let parsed = ReservationRequest::parse(&command, &data);
            let is_request = command.access() == Access::Other && command.takes_data();
            let is_enough = data.len() >= command.host_data_len() as usize;
            prop_assert_eq!(parsed.is_ok(), is_request && is_enough);
        }
    }
}

/// The strategy above makes what it is for: every kind of command, many of which decode.
#[test]
fn likely_commands_are_likely() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (strategy, subsys) = (sqes(), full());
    let mut kinds = std::collections::HashSet::new();
    let mut decoded = 0;
    for _ in 0..4000 {
        let sqe = strategy.new_tree(&mut runner).unwrap().current();
        if let Ok(command) = decode(&sqe, &subsys) {
            kinds.insert(core::mem::discriminant(&command));
            decoded += 1;
        }
    }
    assert!(decoded > 500 && kinds.len() == 14, "{decoded} of {} kinds", kinds.len());
}
