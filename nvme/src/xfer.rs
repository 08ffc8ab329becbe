//! Where a command's data is: parsing of the data pointer of a fabrics SQE.
//!
//! NVMe/TCP commands carry one SGL descriptor, either a Data Block at an offset in the capsule or
//! a Transport SGL Data Block (NVMe/TCP Transport 1.0, "Data Transfers"). Everything else,
//! PRPs included, is refused with the status the base specification gives.

use crate::spec::{SglDescriptor, Sqe, Status};

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
/// - SGL Descriptor Type Invalid: a descriptor NVMe/TCP does not use.
/// - SGL Offset Invalid: in-capsule data outside the capsule.
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
        _ if len == 0 => Ok(DataPtr::None),
        SglDescriptor::TRANSPORT_DATA_BLOCK => Ok(DataPtr::Transport { len }),
        SglDescriptor::DATA_BLOCK_OFFSET => {
            let offset = sgl.address.get();
            match offset.checked_add(u64::from(len)) {
                Some(end) if end <= u64::from(in_capsule_bytes) => {
                    Ok(DataPtr::InCapsule { offset: offset as u32, len })
                }
                _ => Err(Status::SGL_OFFSET_INVALID.dnr()),
            }
        }
        _ => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sqe(dptr: SglDescriptor) -> Sqe {
        Sqe { dptr, ..Sqe::new(1) }
    }

    #[test]
    fn the_two_descriptors_of_tcp() {
        assert_eq!(
            parse_data(&sqe(SglDescriptor::transport(512)), 0),
            Ok(DataPtr::Transport { len: 512 })
        );
        assert_eq!(
            parse_data(&sqe(SglDescriptor::in_capsule(0, 4096)), 4096),
            Ok(DataPtr::InCapsule { offset: 0, len: 4096 })
        );
        assert_eq!(parse_data(&sqe(SglDescriptor::transport(0)), 0), Ok(DataPtr::None));
        assert_eq!(
            parse_data(&Sqe { flags: 0, ..sqe(SglDescriptor::default()) }, 0),
            Ok(DataPtr::None)
        );
    }

    #[test]
    fn refusals() {
        let offset_invalid = Err(Status::SGL_OFFSET_INVALID.dnr());
        assert_eq!(parse_data(&sqe(SglDescriptor::in_capsule(1, 4096)), 4096), offset_invalid);
        assert_eq!(parse_data(&sqe(SglDescriptor::in_capsule(u64::MAX, 1)), 4096), offset_invalid);
        for identifier in [0x00, 0x40, 0x4f, 0x20, 0x5b, 0xf0] {
            let dptr = SglDescriptor { identifier, ..SglDescriptor::transport(8) };
            assert_eq!(
                parse_data(&sqe(dptr), 4096),
                Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr()),
                "{identifier:02x}"
            );
        }
        for flags in [0, 0b11 << 6] {
            let sqe = Sqe { flags, ..sqe(SglDescriptor::transport(512)) };
            assert_eq!(parse_data(&sqe, 0), Err(Status::INVALID_FIELD_IN_COMMAND.dnr()));
        }
    }
}
