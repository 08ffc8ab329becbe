//! Discovery log page (NVMe Base 2.0, "Discovery Log Page", LID 70h).

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::command::open_u8;

open_u8! {
    /// Transport Type (TRTYPE).
    TransportType {
        /// RDMA.
        RDMA = 1;
        /// Fibre Channel.
        FC = 2;
        /// TCP.
        TCP = 3;
        /// Intra-host.
        LOOP = 254;
    }
}

open_u8! {
    /// Address Family (ADRFAM).
    AddressFamily {
        /// IPv4.
        IPV4 = 1;
        /// IPv6.
        IPV6 = 2;
        /// InfiniBand.
        IB = 3;
        /// Fibre Channel.
        FC = 4;
        /// Intra-host.
        LOOP = 254;
    }
}

open_u8! {
    /// Subsystem Type (SUBTYPE).
    SubsystemType {
        /// Referral to another discovery subsystem.
        REFERRAL = 1;
        /// NVM subsystem with I/O controllers.
        NVM = 2;
        /// The discovery subsystem this log page comes from.
        CURRENT_DISCOVERY = 3;
    }
}

/// Discovery Log Page header, 1024 bytes.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiscoveryHeader {
    /// Generation Counter: changes whenever the page does.
    pub genctr: U64,
    /// Number of Records.
    pub numrec: U64,
    /// Record Format: 0.
    pub recfmt: U16,
    /// Discovery Log Page Flags (NVMe Base 2.1): what the page is, in the bits of the Log Specific
    /// Parameter that asked for it ([`LSP_EXTENDED`] and its neighbours).
    pub dlpf: u8,
    /// Reserved.
    pub reserved_19: u8,
    /// Total Discovery Log Page Length in bytes (NVMe Base 2.1); 0 in pages of basic entries.
    pub tdlpl: U32,
    /// Reserved.
    pub reserved_24: [u8; 1000],
}
const _: () = assert!(size_of::<DiscoveryHeader>() == 1024);

/// Discovery Log Page Entry, 1024 bytes.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiscoveryRecord {
    /// Transport Type.
    pub trtype: TransportType,
    /// Address Family.
    pub adrfam: AddressFamily,
    /// Subsystem Type.
    pub subtype: SubsystemType,
    /// Transport Requirements: secure channel in bits 1:0, SQ flow control disable in bit 2.
    pub treq: u8,
    /// Port ID.
    pub portid: U16,
    /// Controller ID: FFFFh for the dynamic controller model.
    pub cntlid: U16,
    /// Admin Max SQ Size; at least 32.
    pub asqsz: U16,
    /// Entry Flags.
    pub eflags: U16,
    /// Reserved.
    pub reserved_12: [u8; 20],
    /// Transport Service Identifier (the TCP port in decimal), ASCII.
    pub trsvcid: [u8; 32],
    /// Reserved.
    pub reserved_64: [u8; 192],
    /// NVM Subsystem Qualified Name.
    pub subnqn: [u8; 256],
    /// Transport Address, ASCII.
    pub traddr: [u8; 256],
    /// Transport Specific Address Subtype; for TCP byte 0 is SECTYPE.
    pub tsas: [u8; 256],
}
const _: () = assert!(size_of::<DiscoveryRecord>() == 1024);

/// What follows the 1024 bytes of a [`DiscoveryRecord`] in an extended entry; Extended Attributes
/// follow it.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedTail {
    /// Total Entry Length in bytes, the 1024 included; a multiple of 4.
    pub tel: U32,
    /// Number of Extended Attributes.
    pub numexat: U16,
    /// Reserved.
    pub reserved: U16,
}
const _: () = assert!(size_of::<ExtendedTail>() == 8);

/// Head of an Extended Attribute; EXATLEN bytes of value follow.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedAttribute {
    /// Extended Attribute Type: 1 Host Identifier, 2 Admin Label.
    pub exattype: U16,
    /// Extended Attribute Length: of the value, a multiple of 4.
    pub exatlen: U16,
}
const _: () = assert!(size_of::<ExtendedAttribute>() == 4);

/// LSP bit 0 of LID 70h, EXTDLPE: extended entries.
pub const LSP_EXTENDED: u8 = 1 << 0;
/// LSP bit 1 of LID 70h, PLEO: Port Local Entries Only.
pub const LSP_PORT_LOCAL: u8 = 1 << 1;
/// LSP bit 2 of LID 70h, ALLSUBE: All NVM Subsystem Entries, those that the host may not use
/// included.
pub const LSP_ALL_SUBSYSTEMS: u8 = 1 << 2;
/// LID specific field of LID 70h in the Supported Log Pages: EXTDLPES and PLEOS. ALLSUBES is clear:
/// no host is told of what others may use.
pub const DISCOVERY_LID_SPECIFIC: u16 = 0b011;

/// EFLAGS bit 0: Duplicate Returned Information.
pub const EFLAGS_DUPRETINFO: u16 = 1;
/// EFLAGS bit 1: Explicit Persistent Connection Support for Discovery.
pub const EFLAGS_EPCSD: u16 = 1 << 1;
/// EFLAGS bit 2: No CDC Connectivity: no centralized discovery controller knows this subsystem.
pub const EFLAGS_NCC: u16 = 1 << 2;
/// TREQ bits 1:0: whether a secure channel is required.
pub const TREQ_SECURE_MASK: u8 = 0b11;
/// TREQ bits 1:0 = 01b: a secure channel is required.
pub const TREQ_SECURE_REQUIRED: u8 = 1;
/// TREQ bits 1:0 = 10b: a secure channel is not required.
pub const TREQ_SECURE_NOT_REQUIRED: u8 = 2;
/// TREQ bit 2: SQ flow control may be disabled.
pub const TREQ_SQ_FLOW_DISABLE: u8 = 1 << 2;
/// SECTYPE of an NVMe/TCP entry: TLS 1.3 (NVMe/TCP Transport Specification, TSAS).
pub const SECTYPE_TLS13: u8 = 2;
/// Smallest Admin Max SQ Size a subsystem may report.
pub const ASQSZ_MIN: u16 = 32;

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn offsets() {
        assert_eq!(offset_of!(DiscoveryHeader, numrec), 8);
        assert_eq!(offset_of!(DiscoveryHeader, recfmt), 16);
        assert_eq!(offset_of!(DiscoveryHeader, dlpf), 18);
        assert_eq!(offset_of!(DiscoveryHeader, tdlpl), 20);
        assert_eq!(offset_of!(ExtendedTail, numexat), 4);
        assert_eq!(offset_of!(ExtendedAttribute, exatlen), 2);
        assert_eq!(offset_of!(DiscoveryRecord, portid), 4);
        assert_eq!(offset_of!(DiscoveryRecord, asqsz), 8);
        assert_eq!(offset_of!(DiscoveryRecord, eflags), 10);
        assert_eq!(offset_of!(DiscoveryRecord, trsvcid), 32);
        assert_eq!(offset_of!(DiscoveryRecord, subnqn), 256);
        assert_eq!(offset_of!(DiscoveryRecord, traddr), 512);
        assert_eq!(offset_of!(DiscoveryRecord, tsas), 768);
    }
}
