//! Identify data structures, 4096 bytes each (NVMe Base 2.0, "Identify command"; NVM Command Set
//! 1.0 for the namespace and command set specific ones). Fields this crate never sets keep their
//! specification name in comments of the reserved ranges.

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of every Identify data structure.
pub const IDENTIFY_LEN: usize = 4096;

/// Controller or Namespace Structure (CNS): what an Identify command asks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cns(pub u8);

impl Cns {
    /// Identify Namespace (NVM Command Set).
    pub const NAMESPACE: Cns = Cns(0x00);
    /// Identify Controller.
    pub const CONTROLLER: Cns = Cns(0x01);
    /// Active Namespace ID list.
    pub const ACTIVE_NAMESPACES: Cns = Cns(0x02);
    /// Namespace Identification Descriptor list.
    pub const NAMESPACE_DESCRIPTORS: Cns = Cns(0x03);
    /// I/O Command Set specific Identify Namespace.
    pub const IOCS_NAMESPACE: Cns = Cns(0x05);
    /// I/O Command Set specific Identify Controller.
    pub const IOCS_CONTROLLER: Cns = Cns(0x06);
    /// I/O Command Set specific Active Namespace ID list.
    pub const IOCS_ACTIVE_NAMESPACES: Cns = Cns(0x07);
    /// I/O Command Set Independent Identify Namespace.
    pub const INDEPENDENT_NAMESPACE: Cns = Cns(0x08);
    /// Allocated Namespace ID list.
    pub const ALLOCATED_NAMESPACES: Cns = Cns(0x10);
    /// Identify Namespace for an allocated NSID.
    pub const ALLOCATED_NAMESPACE: Cns = Cns(0x11);
    /// Controllers attached to a namespace.
    pub const NAMESPACE_CONTROLLERS: Cns = Cns(0x12);
    /// Controllers of the subsystem.
    pub const CONTROLLERS: Cns = Cns(0x13);
    /// Endurance Group list.
    pub const ENDURANCE_GROUPS: Cns = Cns(0x19);
    /// I/O Command Set data structure.
    pub const COMMAND_SETS: Cns = Cns(0x1c);
}

/// Identify Controller (CNS 01h).
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI Vendor ID (0: not a PCI function).
    pub vid: U16,
    /// PCI Subsystem Vendor ID.
    pub ssvid: U16,
    /// Serial Number, ASCII, space padded.
    pub sn: [u8; 20],
    /// Model Number, ASCII, space padded.
    pub mn: [u8; 40],
    /// Firmware Revision, ASCII, space padded.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst.
    pub rab: u8,
    /// IEEE OUI Identifier.
    pub ieee: [u8; 3],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
    pub cmic: u8,
    /// Maximum Data Transfer Size: power of two in units of CAP.MPSMIN; 0: no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: U16,
    /// Version, as the VS property.
    pub ver: U32,
    /// RTD3 Resume Latency.
    pub rtd3r: U32,
    /// RTD3 Entry Latency, microseconds: how long a host should wait at shutdown.
    pub rtd3e: U32,
    /// Optional Asynchronous Events Supported.
    pub oaes: U32,
    /// Controller Attributes.
    pub ctratt: U32,
    /// Read Recovery Levels Supported.
    pub rrls: U16,
    /// Bytes 102..111: BPCAP, NSSL, PLSI.
    pub reserved_102: [u8; 9],
    /// Controller Type.
    pub cntrltype: u8,
    /// FRU Globally Unique Identifier.
    pub fguid: [u8; 16],
    /// Command Retry Delay Time 1 to 3, units of 100 ms.
    pub crdt: [U16; 3],
    /// Controller Reachability Capabilities.
    pub crcap: u8,
    /// Controller Instance Uniquifier (NVMe Base 2.3): differs from the last controller that had
    /// this identifier; 0: Cross-Controller Reset is not supported.
    pub ciu: u8,
    /// Controller Instance Random Number (NVMe Base 2.3).
    pub cirn: U64,
    /// Bytes 144..253: reserved.
    pub reserved_144: [u8; 109],
    /// NVM Subsystem Report.
    pub nvmsr: u8,
    /// VPD Write Cycle Information.
    pub vwci: u8,
    /// Management Endpoint Capabilities.
    pub mec: u8,
    /// Optional Admin Command Support.
    pub oacs: U16,
    /// Abort Command Limit, zero-based.
    pub acl_z: u8,
    /// Asynchronous Event Request Limit, zero-based.
    pub aerl_z: u8,
    /// Firmware Updates.
    pub frmw: u8,
    /// Log Page Attributes.
    pub lpa: u8,
    /// Error Log Page Entries, zero-based.
    pub elpe_z: u8,
    /// Number of Power States Support, zero-based.
    pub npss_z: u8,
    /// Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, kelvin.
    pub wctemp: U16,
    /// Critical Composite Temperature Threshold, kelvin.
    pub cctemp: U16,
    /// Bytes 270..280: MTFA, HMPRE, HMMIN.
    pub reserved_270: [u8; 10],
    /// Total NVM Capacity, bytes.
    pub tnvmcap: U128,
    /// Unallocated NVM Capacity, bytes.
    pub unvmcap: U128,
    /// Bytes 312..320: RPMBS, EDSTT, DSTO, FWUG.
    pub reserved_312: [u8; 8],
    /// Keep Alive Support: granularity in units of 100 ms; 0: not supported.
    pub kas: U16,
    /// Bytes 322..328: HCTMA, MNTMT, MXTMT.
    pub reserved_322: [u8; 6],
    /// Sanitize Capabilities; 0: none.
    pub sanicap: U32,
    /// Bytes 332..340: HMMINDS, HMMAXD, NSETIDMAX.
    pub reserved_332: [u8; 8],
    /// Endurance Group Identifier Maximum.
    pub endgidmax: U16,
    /// ANA Transition Time, seconds.
    pub anatt: u8,
    /// Asymmetric Namespace Access Capabilities.
    pub anacap: u8,
    /// ANA Group Identifier Maximum.
    pub anagrpmax: U32,
    /// Number of ANA Group Identifiers.
    pub nanagrpid: U32,
    /// Bytes 352..386: PELS, DOMAINID, KPIOC, MPTFAWR, MEGCAP, TMPTHHA.
    pub reserved_352: [u8; 34],
    /// Command Quiesce Time, milliseconds.
    pub cqt: U16,
    /// Bytes 388..512: reserved.
    pub reserved_388: [u8; 124],
    /// Submission Queue Entry Size: required in bits 3:0, maximum in 7:4, powers of two.
    pub sqes: u8,
    /// Completion Queue Entry Size, likewise.
    pub cqes: u8,
    /// Maximum Outstanding Commands per I/O queue; fabrics controllers shall report it.
    pub maxcmd: U16,
    /// Number of Namespaces: the largest valid NSID.
    pub nn: U32,
    /// Optional NVM Command Support.
    pub oncs: U16,
    /// Fused Operation Support.
    pub fuses: U16,
    /// Format NVM Attributes.
    pub fna: u8,
    /// Volatile Write Cache.
    pub vwc: u8,
    /// Atomic Write Unit Normal, zero-based, logical blocks.
    pub awun_z: U16,
    /// Atomic Write Unit Power Fail, zero-based, logical blocks.
    pub awupf_z: U16,
    /// I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// Namespace Write Protection Capabilities.
    pub nwpc: u8,
    /// Atomic Compare & Write Unit, zero-based.
    pub acwu_z: U16,
    /// Copy Descriptor Formats Supported (CDFS; OCFS in the revisions before 2.1).
    pub cdfs: U16,
    /// SGL Support.
    pub sgls: U32,
    /// Maximum Number of Allowed Namespaces.
    pub mnan: U32,
    /// Bytes 544..768: MAXDNA, MAXCNA, OAQD and what later revisions added.
    pub reserved_544: [u8; 224],
    /// NVM Subsystem NVMe Qualified Name, NUL terminated.
    pub subnqn: [u8; 256],
    /// Bytes 1024..1792: reserved.
    pub reserved_1024: [u8; 768],
    /// I/O Queue Command Capsule Supported Size, units of 16 bytes (fabrics).
    pub ioccsz: U32,
    /// I/O Queue Response Capsule Supported Size, units of 16 bytes (fabrics).
    pub iorcsz: U32,
    /// In Capsule Data Offset, units of 16 bytes (fabrics).
    pub icdoff: U16,
    /// Fabrics Controller Attributes.
    pub fcatt: u8,
    /// Maximum SGL Data Block Descriptors.
    pub msdbd: u8,
    /// Optional Fabrics Commands Support: bit 0 Disconnect.
    pub ofcs: U16,
    /// Discovery Controller Type.
    pub dctype: u8,
    /// Cross-Controller Reset Limit (NVMe Base 2.3): such resets that may be in progress at once;
    /// 0: the command is not supported.
    pub ccrl: u8,
    /// Bytes 1808..2048: reserved.
    pub reserved_1808: [u8; 240],
    /// Power State Descriptors 0 to 31, 32 bytes each.
    pub psd: [[u8; 32]; 32],
    /// Vendor Specific.
    pub vendor: [u8; 1024],
}
const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_LEN);

impl IdentifyController {
    /// CMIC: the subsystem may have more than one port.
    pub const CMIC_MULTI_PORT: u8 = 1 << 0;
    /// CMIC: the subsystem may have more than one controller.
    pub const CMIC_MULTI_CONTROLLER: u8 = 1 << 1;
    /// CMIC: Asymmetric Namespace Access Reporting.
    pub const CMIC_ANA: u8 = 1 << 3;
    /// OAES: Namespace Attribute Notices.
    pub const OAES_NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
    /// OAES: Asymmetric Namespace Access Change Notices.
    pub const OAES_ANA: u32 = 1 << 11;
    /// OAES: Discovery Log Page Change Notification.
    pub const OAES_DISCOVERY_LOG: u32 = 1 << 31;
    /// CTRATT: Host Identifier Support (128 bits).
    pub const CTRATT_HOST_ID_128: u32 = 1 << 0;
    /// CTRATT: Endurance Groups.
    pub const CTRATT_ENDURANCE_GROUPS: u32 = 1 << 4;
    /// CTRATT: Traffic Based Keep Alive Support.
    pub const CTRATT_TBKAS: u32 = 1 << 6;
    /// CNTRLTYPE: I/O controller.
    pub const CNTRLTYPE_IO: u8 = 1;
    /// CNTRLTYPE: Discovery controller.
    pub const CNTRLTYPE_DISCOVERY: u8 = 2;
    /// DCTYPE: Direct Discovery Controller.
    pub const DCTYPE_DDC: u8 = 1;
    /// LPA: Commands Supported and Effects log page.
    pub const LPA_EFFECTS: u8 = 1 << 1;
    /// LPA: extended data (NUMDU and 64-bit log page offsets).
    pub const LPA_EXTENDED: u8 = 1 << 2;
    /// ONCS: Compare.
    pub const ONCS_COMPARE: u16 = 1 << 0;
    /// ONCS: Write Uncorrectable.
    pub const ONCS_WRITE_UNCORRECTABLE: u16 = 1 << 1;
    /// ONCS: Dataset Management.
    pub const ONCS_DSM: u16 = 1 << 2;
    /// ONCS: Write Zeroes.
    pub const ONCS_WRITE_ZEROES: u16 = 1 << 3;
    /// ONCS: Save field of Set Features and Select field of Get Features.
    pub const ONCS_SAVE_SELECT: u16 = 1 << 4;
    /// ONCS: reservations.
    pub const ONCS_RESERVATIONS: u16 = 1 << 5;
    /// ONCS: Timestamp feature.
    pub const ONCS_TIMESTAMP: u16 = 1 << 6;
    /// ONCS: Verify.
    pub const ONCS_VERIFY: u16 = 1 << 7;
    /// ONCS: Copy.
    pub const ONCS_COPY: u16 = 1 << 8;
    /// FUSES: Compare and Write.
    pub const FUSES_COMPARE_AND_WRITE: u16 = 1 << 0;
    /// NWPC: No Write Protect and Write Protect states.
    pub const NWPC_WRITE_PROTECT: u8 = 1 << 0;
    /// ANACAP: reports the Optimized, Non-Optimized, Inaccessible, Persistent Loss and Change
    /// states. Bit 6 (ANAGRPID does not change) is clear: namespaces can be moved.
    pub const ANACAP_ALL_STATES: u8 = 0b1_1111;
    /// VWC: a volatile write cache is present.
    pub const VWC_PRESENT: u8 = 1;
    /// VWC: Flush takes NSID FFFFFFFFh and flushes all namespaces (bits 2:1 = 11b).
    pub const VWC_BROADCAST_FLUSH: u8 = 3 << 1;
    /// SGLS: SGLs supported, no alignment needed (bits 1:0 = 01b).
    pub const SGLS_SUPPORTED: u32 = 1;
    /// SGLS: Bit Bucket descriptors.
    pub const SGLS_BIT_BUCKET: u32 = 1 << 16;
    /// SGLS: SGLs may be longer than the data.
    pub const SGLS_LONGER: u32 = 1 << 18;
    /// SGLS: the address of a Data Block may be an offset (in-capsule data).
    pub const SGLS_OFFSET: u32 = 1 << 20;
    /// SGLS: Transport SGL Data Block descriptor.
    pub const SGLS_TRANSPORT: u32 = 1 << 21;
    /// OACS: Doorbell Buffer Config.
    pub const OACS_DOORBELL_BUFFER: u16 = 1 << 8;
    /// OFCS: Disconnect command.
    pub const OFCS_DISCONNECT: u16 = 1;
}

/// LBA Format (4 bytes).
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata Size in bytes.
    pub ms: U16,
    /// LBA Data Size as a power of two.
    pub lbads: u8,
    /// Relative Performance: 0 is best.
    pub rp: u8,
}

/// Identify Namespace for the NVM Command Set (CNS 00h).
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Namespace Size in logical blocks; 0: not an active namespace.
    pub nsze: U64,
    /// Namespace Capacity in logical blocks.
    pub ncap: U64,
    /// Namespace Utilization in logical blocks.
    pub nuse: U64,
    /// Namespace Features.
    pub nsfeat: u8,
    /// Number of LBA Formats, zero-based.
    pub nlbaf_z: u8,
    /// Formatted LBA Size: index in bits 3:0 and 6:5, extended metadata in bit 4.
    pub flbas: u8,
    /// Metadata Capabilities.
    pub mc: u8,
    /// End-to-end Data Protection Capabilities.
    pub dpc: u8,
    /// End-to-end Data Protection Type Settings.
    pub dps: u8,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
    pub nmic: u8,
    /// Reservation Capabilities.
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// Deallocate Logical Block Features.
    pub dlfeat: u8,
    /// Namespace Atomic Write Unit Normal, zero-based.
    pub nawun_z: U16,
    /// Namespace Atomic Write Unit Power Fail, zero-based.
    pub nawupf_z: U16,
    /// Namespace Atomic Compare & Write Unit, zero-based.
    pub nacwu_z: U16,
    /// Namespace Atomic Boundary Size Normal, zero-based.
    pub nabsn_z: U16,
    /// Namespace Atomic Boundary Offset.
    pub nabo: U16,
    /// Namespace Atomic Boundary Size Power Fail, zero-based.
    pub nabspf_z: U16,
    /// Namespace Optimal I/O Boundary, logical blocks.
    pub noiob: U16,
    /// NVM Capacity, bytes.
    pub nvmcap: U128,
    /// Namespace Preferred Write Granularity, zero-based.
    pub npwg_z: U16,
    /// Namespace Preferred Write Alignment, zero-based.
    pub npwa_z: U16,
    /// Namespace Preferred Deallocate Granularity, zero-based.
    pub npdg_z: U16,
    /// Namespace Preferred Deallocate Alignment, zero-based.
    pub npda_z: U16,
    /// Namespace Optimal Write Size, zero-based.
    pub nows_z: U16,
    /// Maximum Single Source Range Length of Copy, logical blocks.
    pub mssrl: U16,
    /// Maximum Copy Length, logical blocks.
    pub mcl: U32,
    /// Maximum Source Range Count of Copy, zero-based.
    pub msrc_z: u8,
    /// Bytes 81..92: KPIOS, NULBAF, KPIODAAG.
    pub reserved_81: [u8; 11],
    /// ANA Group Identifier.
    pub anagrpid: U32,
    /// Bytes 96..99: reserved.
    pub reserved_96: [u8; 3],
    /// Namespace Attributes: bit 0 write protected.
    pub nsattr: u8,
    /// NVM Set Identifier.
    pub nvmsetid: U16,
    /// Endurance Group Identifier.
    pub endgid: U16,
    /// Namespace Globally Unique Identifier (big endian); zero: none.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier (big endian); zero: none.
    pub eui64: [u8; 8],
    /// LBA Formats.
    pub lbaf: [LbaFormat; 64],
    /// Vendor Specific.
    pub vendor: [u8; 3712],
}
const _: () = assert!(size_of::<IdentifyNamespace>() == IDENTIFY_LEN);

impl IdentifyNamespace {
    /// NSFEAT: NGUID and EUI64 are never reused.
    pub const NSFEAT_UID_REUSE: u8 = 1 << 3;
    /// NSFEAT: NPWG, NPWA, NPDG, NPDA and NOWS are defined.
    pub const NSFEAT_OPTPERF: u8 = 1 << 4;
    /// NMIC: may be attached to several controllers at once.
    pub const NMIC_SHARED: u8 = 1;
    /// RESCAP: Persist Through Power Loss.
    pub const RESCAP_PTPL: u8 = 1 << 0;
    /// RESCAP: all six reservation types, and Ignore Existing Key as of revision 1.3.
    pub const RESCAP_ALL_TYPES: u8 = 0b1111_1110;
    /// NSATTR: currently write protected.
    pub const NSATTR_WRITE_PROTECTED: u8 = 1;
    /// DLFEAT bits 2:0: deallocated blocks read as zeroes.
    pub const DLFEAT_READS_ZERO: u8 = 1;
    /// DLFEAT: the Deallocate bit of Write Zeroes is supported.
    pub const DLFEAT_WRITE_ZEROES: u8 = 1 << 3;

    /// Index of the LBA format in use.
    #[must_use]
    pub fn lba_format_index(&self) -> usize {
        usize::from(self.flbas & 0xf | (self.flbas >> 5 & 3) << 4)
    }
}

/// I/O Command Set Independent Identify Namespace (CNS 08h).
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespaceIndependent {
    /// Common Namespace Features; bits as in [`IdentifyNamespace::nsfeat`] where they apply.
    pub nsfeat: u8,
    /// As [`IdentifyNamespace::nmic`].
    pub nmic: u8,
    /// Reservation Capabilities.
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// ANA Group Identifier.
    pub anagrpid: U32,
    /// Namespace Attributes.
    pub nsattr: u8,
    /// Reserved.
    pub reserved_9: u8,
    /// NVM Set Identifier.
    pub nvmsetid: U16,
    /// Endurance Group Identifier.
    pub endgid: U16,
    /// Namespace Status: bit 0 ready.
    pub nstat: u8,
    /// Bytes 15..4096: reserved here.
    pub reserved_15: [u8; 4081],
}
const _: () = assert!(size_of::<IdentifyNamespaceIndependent>() == IDENTIFY_LEN);

impl IdentifyNamespaceIndependent {
    /// NSFEAT: no volatile write cache is behind this namespace, whatever the controller's VWC
    /// says (NVMe Base 2.1; reserved, and ignored by hosts, before).
    pub const NSFEAT_VWC_NOT_PRESENT: u8 = 1 << 5;
    /// NSTAT: the namespace is ready.
    pub const NSTAT_READY: u8 = 1;
}

/// Identify Controller for the NVM Command Set (CNS 06h, CSI 00h).
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyControllerNvm {
    /// Verify Size Limit: power of two in units of CAP.MPSMIN; 0: no limit.
    pub vsl: u8,
    /// Write Zeroes Size Limit, likewise.
    pub wzsl: u8,
    /// Write Uncorrectable Size Limit, likewise.
    pub wusl: u8,
    /// Dataset Management Ranges Limit; 0: no limit.
    pub dmrl: u8,
    /// Dataset Management Range Size Limit in logical blocks; 0: no limit.
    pub dmrsl: U32,
    /// Dataset Management Size Limit in logical blocks; 0: no limit.
    pub dmsl: U64,
    /// Bytes 16..4096: reserved here.
    pub reserved_16: [u8; 4080],
}
const _: () = assert!(size_of::<IdentifyControllerNvm>() == IDENTIFY_LEN);

/// Namespace Identifier Type of an identification descriptor (CNS 03h): a 4-byte head (NIDT,
/// NIDL, two reserved bytes) and NIDL bytes of identifier.
pub mod nidt {
    /// IEEE Extended Unique Identifier, 8 bytes.
    pub const EUI64: u8 = 1;
    /// Namespace Globally Unique Identifier, 16 bytes.
    pub const NGUID: u8 = 2;
    /// Namespace UUID, 16 bytes.
    pub const UUID: u8 = 3;
    /// Command Set Identifier, 1 byte.
    pub const CSI: u8 = 4;
}

/// Command Set Identifier of the NVM Command Set.
pub const CSI_NVM: u8 = 0;

/// An ASCII field of fixed width, left justified and padded with spaces (SN, MN, FR).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AsciiField<const N: usize>([u8; N]);

/// A string does not fit an [`AsciiField`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be at most {max} printable ASCII characters")]
pub struct InvalidAscii {
    /// Widest string allowed.
    pub max: usize,
}

impl<const N: usize> AsciiField<N> {
    /// Checks (printable ASCII, at most `N`) and pads.
    ///
    /// # Errors
    /// [`InvalidAscii`] when it is too long or not printable ASCII.
    pub fn new(text: &str) -> Result<Self, InvalidAscii> {
        if text.len() > N || !text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Err(InvalidAscii { max: N });
        }
        let mut field = [b' '; N];
        field[..text.len()].copy_from_slice(text.as_bytes());
        Ok(AsciiField(field))
    }

    /// From wire bytes: bytes outside printable ASCII (NULs of sloppy peers too) become spaces.
    #[must_use]
    pub fn from_wire(mut bytes: [u8; N]) -> Self {
        for b in &mut bytes {
            if !(b' '..=b'~').contains(b) {
                *b = b' ';
            }
        }
        AsciiField(bytes)
    }

    /// The padded bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; N] {
        &self.0
    }

    /// The text without padding.
    #[must_use]
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.0).expect("constructors admit printable ASCII only").trim_end()
    }
}

impl<const N: usize> fmt::Display for AsciiField<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<const N: usize> fmt::Debug for AsciiField<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    /// Offsets as the specification prints them, so that a slip in a reserved range shows.
    #[test]
    fn controller_offsets() {
        macro_rules! at {
            ($($field:ident: $offset:literal),* $(,)?) => {
                $(assert_eq!(offset_of!(IdentifyController, $field), $offset, stringify!($field));)*
            };
        }
        at! {
            sn: 4, mn: 24, fr: 64, rab: 72, ieee: 73, cmic: 76, mdts: 77, cntlid: 78, ver: 80,
            rtd3r: 84, rtd3e: 88, oaes: 92, ctratt: 96, rrls: 100, cntrltype: 111, fguid: 112,
            crdt: 128, crcap: 134, ciu: 135, cirn: 136, nvmsr: 253, oacs: 256, acl_z: 258, aerl_z: 259, frmw: 260, lpa: 261,
            elpe_z: 262, npss_z: 263, wctemp: 266, cctemp: 268, tnvmcap: 280, unvmcap: 296, kas: 320, sanicap: 328, endgidmax: 340,
            anatt: 342, anacap: 343, anagrpmax: 344, nanagrpid: 348, cqt: 386, sqes: 512, cqes: 513,
            maxcmd: 514, nn: 516, oncs: 520, fuses: 522, fna: 524, vwc: 525, awun_z: 526, awupf_z: 528,
            nwpc: 531, acwu_z: 532, cdfs: 534, sgls: 536, mnan: 540, subnqn: 768, ioccsz: 1792,
            iorcsz: 1796, icdoff: 1800, fcatt: 1802, msdbd: 1803, ofcs: 1804, dctype: 1806, ccrl: 1807, psd: 2048,
            vendor: 3072,
        }
    }

    #[test]
    fn namespace_offsets() {
        macro_rules! at {
            ($($field:ident: $offset:literal),* $(,)?) => {
                $(assert_eq!(offset_of!(IdentifyNamespace, $field), $offset, stringify!($field));)*
            };
        }
        at! {
            nsze: 0, ncap: 8, nuse: 16, nsfeat: 24, nlbaf_z: 25, flbas: 26, mc: 27, dpc: 28, dps: 29,
            nmic: 30, rescap: 31, fpi: 32, dlfeat: 33, nawun_z: 34, noiob: 46, nvmcap: 48, npwg_z: 64,
            npwa_z: 66, npdg_z: 68, npda_z: 70, nows_z: 72, mssrl: 74, mcl: 76, msrc_z: 80, anagrpid: 92, nsattr: 99, nvmsetid: 100,
            endgid: 102, nguid: 104, eui64: 120, lbaf: 128, vendor: 384,
        }
        assert_eq!(offset_of!(IdentifyNamespaceIndependent, anagrpid), 4);
        assert_eq!(offset_of!(IdentifyNamespaceIndependent, nsattr), 8);
        assert_eq!(offset_of!(IdentifyNamespaceIndependent, nstat), 14);
        assert_eq!(offset_of!(IdentifyControllerNvm, wzsl), 1);
        assert_eq!(offset_of!(IdentifyControllerNvm, dmrsl), 4);
    }

    #[test]
    fn lba_format_index_uses_both_parts() {
        let mut ns = IdentifyNamespace::read_from_bytes(&[0u8; 4096]).unwrap();
        ns.flbas = 0b0101_0011;
        assert_eq!(ns.lba_format_index(), 0b10_0011);
    }

    #[test]
    fn ascii_fields_pad_and_refuse() {
        let field = AsciiField::<8>::new("1.0").unwrap();
        assert_eq!(field.bytes(), b"1.0     ");
        assert_eq!(field.to_string(), "1.0");
        assert!(AsciiField::<2>::new("abc").is_err());
        assert!(AsciiField::<8>::new("é").is_err());
        assert_eq!(AsciiField::from_wire(*b"a\0\xffb").as_str(), "a  b");
    }
}
