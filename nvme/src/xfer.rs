//! Where a command's data is: the data pointer of an SQE.
//!
//! Over fabrics it is parsed by [`parse_data`]; a PCI function's is walked by [`walk`] (`memory`).
//!
//! NVMe/TCP commands carry one SGL descriptor, either a Data Block at an offset in the capsule or
//! a Transport SGL Data Block (NVMe/TCP Transport 1.0, "Data Transfers"). Everything else,
//! PRPs included, is refused with the status the base specification gives.

mod memory;

pub use self::memory::{
    Copying, Discarding, HostMemory, MEMORY_PAGE_BYTES, SGL_DESCRIPTORS_MAX, walk, walk_queue,
};
use crate::spec::{Direction, SglDescriptor, Sqe, Status};
use crate::subsys::Limits;

/// How commands and their data reach a controller.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Transport {
    /// In capsules: a Connect command makes the controller, Property Set moves it.
    #[default]
    Fabrics,
    /// A PCI function: queues, PRPs and SGLs are in the host's memory, properties are registers.
    Pcie,
}

/// Bytes that the data pointer of a command is about, of which the command needs `needed` (at
/// least). A PRP has no length of its own, and an SGL may be longer than what is needed
/// (SGLS bit 18): on PCIe the length is what the command says, and [`walk`] finds out whether an
/// SGL is too short.
///
/// # Errors
/// Over fabrics as [`parse_data`]; on PCIe Invalid Field in Command for the reserved PSDT.
#[inline]
pub fn data_len(sqe: &Sqe, limits: &Limits, needed: u32) -> Result<u32, Status> {
    match limits.transport {
        Transport::Fabrics => parse_data(sqe, limits.in_capsule_bytes).map(DataPtr::len),
        Transport::Pcie if sqe.psdt() == 0b11 => Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
        Transport::Pcie => Ok(needed),
    }
}

/// A checked data pointer. Lengths are in bytes and at most the limit passed to [`parse_data`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataPtr {
    /// The command moves no data.
    None,
    /// The data is in the capsule, behind the SQE.
    InCapsule {
        /// Offset from the start of the in-capsule data.
        offset: u32,
        /// Length.
        len: u32,
    },
    /// The transport moves the data: R2T and H2CData, or C2HData.
    Transport {
        /// Length.
        len: u32,
    },
}

impl DataPtr {
    /// Length of the transfer in bytes.
    #[must_use]
    pub const fn len(self) -> u32 {
        match self {
            DataPtr::None => 0,
            DataPtr::InCapsule { len, .. } | DataPtr::Transport { len } => len,
        }
    }

    /// Whether no data is moved.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Parses the data pointer of a fabrics SQE.
///
/// `in_capsule_bytes` is the in-capsule data the queue allows (8192 for an admin queue of
/// NVMe/TCP, `IOCCSZ * 16 - 64` for an I/O queue). Whether that much really came with the capsule
/// is known to the driver only, and it must check.
///
/// # Errors
/// - Invalid Field in Command: PSDT says PRP ("PSDT shall be 01b or 10b" in fabrics).
/// - SGL Descriptor Type Invalid: a descriptor NVMe/TCP does not use (segments, keyed blocks and
///   bit buckets among them: a capsule holds one descriptor), or in-capsule data for a command
///   whose data goes to the host: response capsules have none.
/// - SGL Offset Invalid: in-capsule data that begins outside the capsule.
/// - Data SGL Length Invalid: in-capsule data that begins in the capsule and ends outside.
#[inline]
pub fn parse_data(sqe: &Sqe, in_capsule_bytes: u32) -> Result<DataPtr, Status> {
    let sgl = &sqe.dptr;
    let len = sgl.length.get();
    if !matches!(sqe.psdt(), 0b01 | 0b10) {
        // Hosts leave the field 0 on commands without data; nothing is lost by accepting that.
        if sqe.psdt() == 0 && *sgl == SglDescriptor::default() {
            return Ok(DataPtr::None);
        }
        return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    }
    match sgl.identifier {
        SglDescriptor::TRANSPORT_DATA_BLOCK if len == 0 => Ok(DataPtr::None),
        SglDescriptor::TRANSPORT_DATA_BLOCK => Ok(DataPtr::Transport { len }),
        // A descriptor of zeros with PSDT set says "no data" as well.
        SglDescriptor::DATA_BLOCK_OFFSET | 0 if len == 0 => Ok(DataPtr::None),
        SglDescriptor::DATA_BLOCK_OFFSET if sqe.direction() != Direction::ToHost => {
            let offset = sgl.address.get();
            let limit = u64::from(in_capsule_bytes);
            if offset >= limit {
                Err(Status::SGL_OFFSET_INVALID.dnr())
            } else if u64::from(len) > limit - offset {
                Err(Status::DATA_SGL_LENGTH_INVALID.dnr())
            } else {
                Ok(DataPtr::InCapsule { offset: offset as u32, len })
            }
        }
        _ => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u8 = 0;
    const WRITE: u8 = 1;
    const READ: u8 = 2;

    fn sqe(opcode: u8, dptr: SglDescriptor) -> Sqe {
        Sqe { dptr, ..Sqe::new(opcode) }
    }

    /// Every type and subtype, with and without a length, for each direction.
    #[test]
    fn descriptors() {
        for (opcode, identifier, len) in [NONE, WRITE, READ]
            .into_iter()
            .flat_map(|opcode| (0..=u8::MAX).map(move |identifier| (opcode, identifier)))
            .flat_map(|(opcode, identifier)| [0, 1, 4096].map(|len| (opcode, identifier, len)))
        {
            let dptr = SglDescriptor { identifier, ..SglDescriptor::transport(len) };
            let want = match (identifier, len) {
                (0x00 | 0x01 | 0x5a, 0) => Ok(DataPtr::None),
                (0x5a, len) => Ok(DataPtr::Transport { len }),
                (0x01, len) if opcode != READ => Ok(DataPtr::InCapsule { offset: 0, len }),
                _ => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr()),
            };
            let got = parse_data(&sqe(opcode, dptr), 4096);
            assert_eq!(got, want, "opcode {opcode} descriptor {identifier:02x} length {len}");
        }
    }

    #[test]
    fn in_capsule_offsets() {
        let offset_invalid = Err(Status::SGL_OFFSET_INVALID.dnr());
        let length_invalid = Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        for (offset, len, capsule, want) in [
            (0, 4096, 4096, Ok(DataPtr::InCapsule { offset: 0, len: 4096 })),
            (512, 4096, 8192, Ok(DataPtr::InCapsule { offset: 512, len: 4096 })),
            (4095, 1, 4096, Ok(DataPtr::InCapsule { offset: 4095, len: 1 })),
            (0, 4097, 4096, length_invalid),
            (1, 4096, 4096, length_invalid),
            (4095, u32::MAX, 4096, length_invalid),
            (4096, 1, 4096, offset_invalid),
            (u64::MAX, 1, 4096, offset_invalid),
            (u64::MAX, u32::MAX, u32::MAX, offset_invalid),
            // The driver asks with what really came: nothing.
            (0, 1, 0, offset_invalid),
        ] {
            let got = parse_data(&sqe(WRITE, SglDescriptor::in_capsule(offset, len)), capsule);
            assert_eq!(got, want, "{len} bytes at {offset} of {capsule}");
        }
        assert_eq!(
            parse_data(&sqe(WRITE, SglDescriptor::transport(u32::MAX)), 0),
            Ok(DataPtr::Transport { len: u32::MAX })
        );
    }

    #[test]
    fn psdt() {
        for psdt in 0..4u8 {
            let sqe = Sqe { flags: psdt << 6, ..sqe(WRITE, SglDescriptor::transport(512)) };
            let want = match psdt {
                1 | 2 => Ok(DataPtr::Transport { len: 512 }),
                _ => Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
            };
            assert_eq!(parse_data(&sqe, 0), want, "PSDT {psdt:02b}");
        }
        // Commands without data may leave it all 0.
        let empty = Sqe { flags: 0, ..sqe(NONE, SglDescriptor::default()) };
        assert_eq!(parse_data(&empty, 0), Ok(DataPtr::None));
    }
}
