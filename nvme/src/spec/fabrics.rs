//! Fabrics Connect data and the dwords of fabrics commands (NVMe Base 2.0, "Fabrics Command Set").

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Data of a Connect command, 1024 bytes.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConnectData {
    /// Host Identifier.
    pub hostid: [u8; 16],
    /// Controller ID asked for; FFFFh for the admin queue of a dynamic controller.
    pub cntlid: U16,
    /// Reserved.
    pub reserved_18: [u8; 238],
    /// NVM Subsystem NVMe Qualified Name.
    pub subnqn: [u8; 256],
    /// Host NVMe Qualified Name.
    pub hostnqn: [u8; 256],
    /// Reserved.
    pub reserved_768: [u8; 256],
}
const _: () = assert!(size_of::<ConnectData>() == 1024);

/// Length of the data of a Connect command.
pub const CONNECT_DATA_LEN: usize = 1024;

/// CNTLID that asks a subsystem with the dynamic controller model for any controller.
pub const CNTLID_DYNAMIC: u16 = 0xffff;
/// Largest controller ID a subsystem may assign.
pub const CNTLID_MAX: u16 = 0xffef;

/// CATTR bit 2: the host asks to disable submission queue flow control.
pub const CATTR_DISABLE_SQ_FLOW: u8 = 1 << 2;

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn offsets() {
        assert_eq!(offset_of!(ConnectData, cntlid), 16);
        assert_eq!(offset_of!(ConnectData, subnqn), 256);
        assert_eq!(offset_of!(ConnectData, hostnqn), 512);
    }
}
