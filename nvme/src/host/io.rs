//! SQEs of I/O commands (NVM Command Set 1.0). The cid is 0: the qpair machine sets it.
//!
//! `nlb` is one-based, 1..=65536. With `in_capsule` the data descriptor says "offset 0 in the
//! capsule", else the transport moves the data.

use crate::spec::{NvmOpcode, SglDescriptor, Sqe};

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
        ];
        for (bytes, command) in cases {
            assert_eq!(decode(&Sqe::from_bytes(&bytes), &subsys), Ok(command));
        }
    }
}
