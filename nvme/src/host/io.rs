//! SQEs of I/O commands (NVM Command Set 1.0). The cid is 0: the qpair machine sets it.
//!
//! `nlb` is one-based, 1..=65536. With `in_capsule` the data descriptor says "offset 0 in the
//! capsule", else the transport moves the data.

use crate::ctrl::io::Fuse;
use crate::spec::{NvmOpcode, SglDescriptor, Sqe};
use crate::subsys::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationRequest,
};

/// Logical blocks one command addresses at most.
pub const BLOCKS_MAX: u32 = 1 << 16;

fn lba_command(opcode: NvmOpcode, nsid: u32, slba: u64, nlb: u32, fua: bool) -> Sqe {
    debug_assert!((1..=BLOCKS_MAX).contains(&nlb));
    let mut sqe = Sqe::new(opcode.0);
    sqe.nsid.set(nsid);
    sqe.cdw10.set(slba as u32);
    sqe.cdw11.set((slba >> 32) as u32);
    sqe.cdw12.set((nlb.wrapping_sub(1) & 0xffff) | u32::from(fua) << 30);
    sqe
}

fn descriptor(len: u32, in_capsule: bool) -> SglDescriptor {
    if in_capsule { SglDescriptor::in_capsule(0, len) } else { SglDescriptor::transport(len) }
}

/// Read `nlb` blocks, `len` bytes.
#[must_use]
#[inline]
pub fn read(nsid: u32, slba: u64, nlb: u32, len: u32, fua: bool) -> [u8; 64] {
    let mut sqe = lba_command(NvmOpcode::READ, nsid, slba, nlb, fua);
    sqe.dptr = SglDescriptor::transport(len);
    sqe.to_bytes()
}

/// Write `nlb` blocks, `len` bytes.
#[must_use]
#[inline]
pub fn write(nsid: u32, slba: u64, nlb: u32, len: u32, in_capsule: bool, fua: bool) -> [u8; 64] {
    let mut sqe = lba_command(NvmOpcode::WRITE, nsid, slba, nlb, fua);
    sqe.dptr = descriptor(len, in_capsule);
    sqe.to_bytes()
}

/// Flush one namespace.
#[must_use]
pub fn flush(nsid: u32) -> [u8; 64] {
    let mut sqe = Sqe::new(NvmOpcode::FLUSH.0);
    sqe.nsid.set(nsid);
    sqe.to_bytes()
}

/// Write zeroes; `deallocate` allows the controller to deallocate the blocks (DEAC).
#[must_use]
pub fn write_zeroes(nsid: u32, slba: u64, nlb: u32, deallocate: bool, fua: bool) -> [u8; 64] {
    let mut sqe = lba_command(NvmOpcode::WRITE_ZEROES, nsid, slba, nlb, fua);
    sqe.cdw12.set(sqe.cdw12.get() | u32::from(deallocate) << 25);
    sqe.to_bytes()
}

/// Dataset Management with the Deallocate attribute and `ranges` ranges (1..=256) as data, 16
/// bytes each: [`crate::spec::DsmRange`].
#[must_use]
pub fn deallocate(nsid: u32, ranges: u16, in_capsule: bool) -> [u8; 64] {
    debug_assert!((1..=256).contains(&ranges));
    let mut sqe = Sqe::new(NvmOpcode::DATASET_MANAGEMENT.0);
    sqe.nsid.set(nsid);
    sqe.cdw10.set(u32::from(ranges.wrapping_sub(1) & 0xff));
    sqe.cdw11.set(1 << 2);
    sqe.dptr = descriptor(u32::from(ranges) * 16, in_capsule);
    sqe.to_bytes()
}

/// Compare `nlb` blocks with `len` bytes of data.
#[must_use]
pub fn compare(nsid: u32, slba: u64, nlb: u32, len: u32, in_capsule: bool, fua: bool) -> [u8; 64] {
    let mut sqe = lba_command(NvmOpcode::COMPARE, nsid, slba, nlb, fua);
    sqe.dptr = descriptor(len, in_capsule);
    sqe.to_bytes()
}

/// The command as half of a fused operation: a Compare as the first, a Write as the second. The two
/// are sent one directly after the other on one queue (NVMe Base 2.0, "Fused Operation").
#[must_use]
pub fn fused(mut sqe: [u8; 64], fuse: Fuse) -> [u8; 64] {
    sqe[1] = sqe[1] & !3
        | match fuse {
            Fuse::None => 0,
            Fuse::First => 1,
            Fuse::Second => 2,
        };
    sqe
}

/// Verify `nlb` blocks.
#[must_use]
pub fn verify(nsid: u32, slba: u64, nlb: u32, fua: bool) -> [u8; 64] {
    lba_command(NvmOpcode::VERIFY, nsid, slba, nlb, fua).to_bytes()
}

/// Copy `ranges` source ranges (1..=128, [`crate::spec::CopyRange`] in format 0h, 32 bytes each, as
/// data) to `slba`.
#[must_use]
pub fn copy(nsid: u32, slba: u64, ranges: u16, in_capsule: bool, fua: bool) -> [u8; 64] {
    debug_assert!((1..=128).contains(&ranges));
    let mut sqe = lba_command(NvmOpcode::COPY, nsid, slba, u32::from(ranges), fua);
    sqe.dptr = descriptor(u32::from(ranges) * 32, in_capsule);
    sqe.to_bytes()
}

/// A reservation command (Register, Acquire or Release), and its data, of which the first
/// [`reservation_len`] bytes are sent.
#[must_use]
pub fn reservation(
    nsid: u32,
    request: &ReservationRequest,
    in_capsule: bool,
) -> ([u8; 64], [u8; 16]) {
    let (opcode, cdw10, first, second) = match *request {
        ReservationRequest::Register { action, iekey, persist, crkey, nrkey } => {
            let action = match action {
                RegisterAction::Register => 0,
                RegisterAction::Unregister => 1,
                RegisterAction::Replace => 2,
            };
            let persist = match persist {
                PersistChange::Keep => 0,
                PersistChange::Clear => 2,
                PersistChange::Set => 3u32,
            };
            let cdw10 = action | u32::from(iekey) << 3 | persist << 30;
            (NvmOpcode::RESERVATION_REGISTER, cdw10, crkey, nrkey)
        }
        ReservationRequest::Acquire { action, rtype, crkey, prkey } => {
            let action = match action {
                AcquireAction::Acquire => 0,
                AcquireAction::Preempt => 1,
                AcquireAction::PreemptAndAbort => 2,
            };
            let cdw10 = action | u32::from(rtype.to_wire()) << 8;
            (NvmOpcode::RESERVATION_ACQUIRE, cdw10, crkey, prkey)
        }
        ReservationRequest::Release { action, crkey } => {
            let cdw10 = match action {
                ReleaseAction::Release(rtype) => {
                    rtype.map_or(0, |rtype| u32::from(rtype.to_wire()) << 8)
                }
                ReleaseAction::Clear => 1,
            };
            (NvmOpcode::RESERVATION_RELEASE, cdw10, crkey, 0)
        }
    };
    let mut sqe = Sqe::new(opcode.0);
    sqe.nsid.set(nsid);
    sqe.cdw10.set(cdw10);
    sqe.dptr = descriptor(reservation_len(request), in_capsule);
    let mut data = [0; 16];
    data[..8].copy_from_slice(&first.to_le_bytes());
    data[8..].copy_from_slice(&second.to_le_bytes());
    (sqe.to_bytes(), data)
}

/// Bytes of data of a reservation command.
#[must_use]
pub const fn reservation_len(request: &ReservationRequest) -> u32 {
    match request {
        ReservationRequest::Release { .. } => 8,
        _ => 16,
    }
}

/// Reservation Report of `len` bytes (a multiple of 4, not 0) in the extended format.
#[must_use]
pub fn reservation_report(nsid: u32, len: u32) -> [u8; 64] {
    debug_assert!(len > 0 && len.is_multiple_of(4));
    let mut sqe = Sqe::new(NvmOpcode::RESERVATION_REPORT.0);
    sqe.nsid.set(nsid);
    sqe.cdw10.set((len / 4).wrapping_sub(1));
    sqe.cdw11.set(1);
    sqe.dptr = SglDescriptor::transport(len);
    sqe.to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctrl::io::{IoCommand, decode};
    use crate::spec::Sqe;
    use crate::subsys::tests::sample;

    /// What the host encodes is what the controller decodes.
    #[test]
    fn encode_then_decode() {
        let subsys = sample();
        let cases = [
            (
                read(1, 8, 8, 4096, true),
                IoCommand::Read { nsid: 1, offset: 4096, len: 4096, fua: true },
            ),
            (
                write(9, 1 << 39, 1, 512, true, false),
                IoCommand::Write { nsid: 9, offset: 1 << 48, len: 512, fua: false },
            ),
            (
                write(1, 0, 2048, 1 << 20, false, true),
                IoCommand::Write { nsid: 1, offset: 0, len: 1 << 20, fua: true },
            ),
            (flush(3), IoCommand::Flush { nsid: 3 }),
            (
                write_zeroes(1, 1, 2, true, false),
                IoCommand::WriteZeroes {
                    nsid: 1,
                    offset: 512,
                    len: 1024,
                    no_unmap: false,
                    fua: false,
                },
            ),
            (
                write_zeroes(1, 1, 2, false, true),
                IoCommand::WriteZeroes {
                    nsid: 1,
                    offset: 512,
                    len: 1024,
                    no_unmap: true,
                    fua: true,
                },
            ),
            (deallocate(1, 256, false), IoCommand::Deallocate { nsid: 1, ranges: 256 }),
            (deallocate(1, 1, true), IoCommand::Deallocate { nsid: 1, ranges: 1 }),
            (
                compare(1, 8, 8, 4096, true, true),
                IoCommand::Compare { nsid: 1, offset: 4096, len: 4096, fua: true },
            ),
            (
                verify(1, 8, 16, false),
                IoCommand::Verify { nsid: 1, offset: 4096, len: 8192, fua: false },
            ),
            (
                copy(1, 8, 128, false, true),
                IoCommand::Copy { nsid: 1, offset: 4096, ranges: 128, fua: true },
            ),
            (
                copy(1, 0, 1, true, false),
                IoCommand::Copy { nsid: 1, offset: 0, ranges: 1, fua: false },
            ),
        ];
        for (bytes, command) in cases {
            assert_eq!(decode(&Sqe::from_bytes(&bytes), &subsys), Ok(command));
            for fuse in [Fuse::None, Fuse::First, Fuse::Second] {
                let sqe = Sqe::from_bytes(&fused(bytes, fuse));
                let fits = matches!(
                    (fuse, command),
                    (Fuse::None, _)
                        | (Fuse::First, IoCommand::Compare { .. })
                        | (Fuse::Second, IoCommand::Write { .. })
                );
                assert_eq!((Fuse::of(&sqe), decode(&sqe, &subsys).is_ok()), (fuse, fits));
            }
        }
    }

    #[test]
    fn reservations_encode_then_decode() {
        use crate::subsys::reservation::ReservationType;
        let mut namespaces = sample().namespaces().to_vec();
        (namespaces[0].reservations, namespaces[0].ptpl) = (true, true);
        let subsys = sample().with_namespaces(namespaces).unwrap();
        let mut requests = Vec::new();
        for action in
            [RegisterAction::Register, RegisterAction::Unregister, RegisterAction::Replace]
        {
            for persist in [PersistChange::Keep, PersistChange::Clear, PersistChange::Set] {
                for iekey in [false, true] {
                    let (crkey, nrkey) = (0x0102_0304_0506_0708, u64::MAX - 1);
                    requests.push(ReservationRequest::Register {
                        action,
                        iekey,
                        persist,
                        crkey,
                        nrkey,
                    });
                }
            }
        }
        for rtype in ReservationType::ALL {
            for action in
                [AcquireAction::Acquire, AcquireAction::Preempt, AcquireAction::PreemptAndAbort]
            {
                requests.push(ReservationRequest::Acquire { action, rtype, crkey: 1, prkey: 2 });
            }
            let action = ReleaseAction::Release(Some(rtype));
            requests.push(ReservationRequest::Release { action, crkey: 3 });
        }
        requests.push(ReservationRequest::Release { action: ReleaseAction::Clear, crkey: 4 });
        for request in requests {
            let (sqe, data) = reservation(1, &request, true);
            let command = decode(&Sqe::from_bytes(&sqe), &subsys).unwrap();
            assert_eq!(command.host_data_len(), reservation_len(&request));
            let data = &data[..reservation_len(&request) as usize];
            assert_eq!(ReservationRequest::parse(&command, data), Ok(request));
        }
        assert_eq!(
            decode(&Sqe::from_bytes(&reservation_report(1, 64)), &subsys),
            Ok(IoCommand::ReservationReport { nsid: 1, len: 64 })
        );
    }
}
