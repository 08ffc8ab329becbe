//! Submission and completion queue entries, opcodes and SGL descriptors.

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Status;

/// Namespace identifier "all namespaces" (broadcast value).
pub const NSID_ALL: u32 = 0xffff_ffff;

/// Open `u8` newtype with the specification's names.
macro_rules! open_u8 {
    ($(#[$type_doc:meta])* $type:ident { $($(#[$doc:meta])* $name:ident = $value:literal;)* }) => {
        $(#[$type_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(transparent)]
        pub struct $type(pub u8);

        impl $type {
            $($(#[$doc])* pub const $name: $type = $type($value);)*
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $($type::$name => f.write_str(stringify!($name)),)*
                    $type(other) => write!(f, "{}({other:02x}h)", stringify!($type)),
                }
            }
        }
    };
}
pub(crate) use open_u8;

open_u8! {
    /// Opcode of an Admin command (NVMe Base 2.0, "Opcodes for Admin Commands").
    AdminOpcode {
        /// Delete I/O Submission Queue (memory-based transports only).
        DELETE_IO_SQ = 0x00;
        /// Create I/O Submission Queue (memory-based transports only).
        CREATE_IO_SQ = 0x01;
        /// Get Log Page.
        GET_LOG_PAGE = 0x02;
        /// Delete I/O Completion Queue (memory-based transports only).
        DELETE_IO_CQ = 0x04;
        /// Create I/O Completion Queue (memory-based transports only).
        CREATE_IO_CQ = 0x05;
        /// Identify.
        IDENTIFY = 0x06;
        /// Abort.
        ABORT = 0x08;
        /// Set Features.
        SET_FEATURES = 0x09;
        /// Get Features.
        GET_FEATURES = 0x0a;
        /// Asynchronous Event Request.
        ASYNC_EVENT_REQUEST = 0x0c;
        /// Keep Alive.
        KEEP_ALIVE = 0x18;
        /// Cross-Controller Reset (NVMe Base 2.3): end another controller of the same host.
        CROSS_CONTROLLER_RESET = 0x38;
        /// Doorbell Buffer Config (memory-based transports only).
        DOORBELL_BUFFER_CONFIG = 0x7c;
        /// Fabrics commands; FCTYPE says which.
        FABRICS = 0x7f;
    }
}

open_u8! {
    /// Opcode of an NVM Command Set I/O command (NVM Command Set 1.0).
    NvmOpcode {
        /// Flush.
        FLUSH = 0x00;
        /// Write.
        WRITE = 0x01;
        /// Read.
        READ = 0x02;
        /// Write Uncorrectable.
        WRITE_UNCORRECTABLE = 0x04;
        /// Compare.
        COMPARE = 0x05;
        /// Write Zeroes.
        WRITE_ZEROES = 0x08;
        /// Dataset Management.
        DATASET_MANAGEMENT = 0x09;
        /// Verify.
        VERIFY = 0x0c;
        /// Reservation Register.
        RESERVATION_REGISTER = 0x0d;
        /// Reservation Report.
        RESERVATION_REPORT = 0x0e;
        /// Reservation Acquire.
        RESERVATION_ACQUIRE = 0x11;
        /// Reservation Release.
        RESERVATION_RELEASE = 0x15;
        /// Copy.
        COPY = 0x19;
        /// Fabrics commands; FCTYPE says which.
        FABRICS = 0x7f;
    }
}

open_u8! {
    /// Fabrics Command Type (FCTYPE): byte 4 of a fabrics SQE. Bits 1:0 are the data direction.
    FabricsType {
        /// Property Set.
        PROPERTY_SET = 0x00;
        /// Connect.
        CONNECT = 0x01;
        /// Property Get.
        PROPERTY_GET = 0x04;
        /// Authentication Send.
        AUTHENTICATION_SEND = 0x05;
        /// Authentication Receive.
        AUTHENTICATION_RECEIVE = 0x06;
        /// Disconnect.
        DISCONNECT = 0x08;
    }
}

/// Direction of a command's data, from opcode bits 1:0 (FCTYPE bits 1:0 for fabrics commands).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// 00b: no data.
    None,
    /// 01b: host to controller.
    ToController,
    /// 10b: controller to host.
    ToHost,
    /// 11b: both ways; no command this crate supports does that.
    Bidirectional,
}

/// SGL descriptor (NVMe Base 2.0, "SGL Descriptor Format"): how a fabrics command says where its
/// data is.
#[derive(
    Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// Address; for a Data Block with subtype Offset, the offset into the capsule.
    pub address: U64,
    /// Length in bytes.
    pub length: U32,
    /// Reserved for the types used here.
    pub reserved: [u8; 3],
    /// SGL Descriptor Type in bits 7:4, subtype in bits 3:0.
    pub identifier: u8,
}
const _: () = assert!(size_of::<SglDescriptor>() == 16);

impl SglDescriptor {
    /// Identifier: Data Block at an address (type 0h, subtype 0h).
    pub const DATA_BLOCK: u8 = 0x00;
    /// Identifier: Segment (type 2h): the address of more descriptors, the last of which is a
    /// segment again.
    pub const SEGMENT: u8 = 0x20;
    /// Identifier of a Bit Bucket: data for the host that it does not want.
    pub const BIT_BUCKET: u8 = 0x10;
    /// Identifier: Last Segment (type 3h): the address of more descriptors, none a segment.
    pub const LAST_SEGMENT: u8 = 0x30;
    /// Identifier: Data Block at an offset in the capsule (type 0h, subtype 1h).
    pub const DATA_BLOCK_OFFSET: u8 = 0x01;
    /// Identifier: Transport SGL Data Block (type 5h, subtype Ah): the transport moves the data.
    pub const TRANSPORT_DATA_BLOCK: u8 = 0x5a;

    /// Data that follows the SQE in the same capsule.
    #[must_use]
    pub fn in_capsule(offset: u64, len: u32) -> Self {
        SglDescriptor {
            address: U64::new(offset),
            length: U32::new(len),
            reserved: [0; 3],
            identifier: Self::DATA_BLOCK_OFFSET,
        }
    }

    /// Data moved by the transport (R2T/H2CData or C2HData).
    #[must_use]
    pub fn transport(len: u32) -> Self {
        SglDescriptor {
            address: U64::ZERO,
            length: U32::new(len),
            reserved: [0; 3],
            identifier: Self::TRANSPORT_DATA_BLOCK,
        }
    }
}

impl fmt::Debug for SglDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sgl {:02x}h address {:#x} length {}",
            self.identifier,
            self.address.get(),
            self.length.get()
        )
    }
}

/// Submission queue entry, 64 bytes (NVMe Base 2.0, "Common Command Format").
#[derive(
    Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Sqe {
    /// Opcode; its meaning depends on the queue.
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub flags: u8,
    /// Command identifier.
    pub cid: U16,
    /// Namespace identifier; byte 0 is FCTYPE in fabrics commands.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata pointer.
    pub mptr: U64,
    /// Data pointer: one SGL descriptor in fabrics.
    pub dptr: SglDescriptor,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}
const _: () = assert!(size_of::<Sqe>() == 64);

/// PSDT value 01b: the data pointer is an SGL, metadata (if any) one contiguous buffer. What
/// fabrics hosts send.
pub const FLAGS_PSDT_SGL: u8 = 0b01 << 6;

impl Sqe {
    /// From the bytes of a capsule.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 64]) -> Sqe {
        zerocopy::transmute!(*bytes)
    }

    /// As bytes of a capsule.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 64] {
        zerocopy::transmute!(*self)
    }

    /// An SQE with this opcode, the SGL flag fabrics require, and everything else zero.
    #[must_use]
    pub fn new(opcode: u8) -> Sqe {
        Sqe { opcode, flags: FLAGS_PSDT_SGL, dptr: SglDescriptor::transport(0), ..Sqe::default() }
    }

    /// A fabrics SQE of this type.
    #[must_use]
    pub fn fabrics(fctype: FabricsType) -> Sqe {
        Sqe { nsid: U32::new(u32::from(fctype.0)), ..Sqe::new(AdminOpcode::FABRICS.0) }
    }

    /// FCTYPE, meaningful when the opcode is Fabrics.
    #[must_use]
    pub fn fctype(&self) -> FabricsType {
        FabricsType(self.nsid.get().to_le_bytes()[0])
    }

    /// Whether the opcode is Fabrics (7Fh).
    #[must_use]
    pub fn is_fabrics(&self) -> bool {
        self.opcode == AdminOpcode::FABRICS.0
    }

    /// FUSE field: 0 for a normal command.
    #[must_use]
    pub fn fuse(&self) -> u8 {
        self.flags & 0b11
    }

    /// PRP or SGL for Data Transfer.
    #[must_use]
    pub fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// Data direction by opcode or FCTYPE. Set Features, Flush and others may still carry none.
    #[must_use]
    pub fn direction(&self) -> Direction {
        let code = if self.is_fabrics() { self.fctype().0 } else { self.opcode };
        match code & 0b11 {
            0 => Direction::None,
            1 => Direction::ToController,
            2 => Direction::ToHost,
            _ => Direction::Bidirectional,
        }
    }

    /// PRP Entry 1 and PRP Entry 2, meaningful when PSDT is 00b.
    #[must_use]
    pub fn prps(&self) -> (u64, u64) {
        let bytes: [u8; 16] = zerocopy::transmute!(self.dptr);
        let value = u128::from_le_bytes(bytes);
        (value as u64, (value >> 64) as u64)
    }

    /// Sets PRP Entry 1 and PRP Entry 2.
    pub fn set_prps(&mut self, prp1: u64, prp2: u64) {
        let bytes = (u128::from(prp1) | u128::from(prp2) << 64).to_le_bytes();
        self.dptr = zerocopy::transmute!(bytes);
        self.flags &= 0b11;
    }

    /// 64-bit value in dwords 10 and 11 (starting LBA of I/O commands).
    #[must_use]
    pub fn cdw10_11(&self) -> u64 {
        u64::from(self.cdw10.get()) | u64::from(self.cdw11.get()) << 32
    }

    /// 64-bit value in dwords 12 and 13 (log page offset, property value).
    #[must_use]
    pub fn cdw12_13(&self) -> u64 {
        u64::from(self.cdw12.get()) | u64::from(self.cdw13.get()) << 32
    }
}

impl fmt::Debug for Sqe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Sqe {{ opc {:02x}h flags {:02x}h cid {:#x} nsid {:#x} {:?} cdw10.. {:08x} {:08x} {:08x} {:08x} {:08x} {:08x} }}",
            self.opcode,
            self.flags,
            self.cid.get(),
            self.nsid.get(),
            self.dptr,
            self.cdw10.get(),
            self.cdw11.get(),
            self.cdw12.get(),
            self.cdw13.get(),
            self.cdw14.get(),
            self.cdw15.get()
        )
    }
}

/// Completion queue entry, 16 bytes (NVMe Base 2.0, "Common Completion Queue Entry Layout").
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
pub struct Cqe {
    /// Dwords 0 and 1: command specific. Property Get uses all 64 bits, others the low 32.
    pub result: U64,
    /// Submission queue head pointer.
    pub sqhd: U16,
    /// Submission queue identifier (reserved in fabrics).
    pub sqid: U16,
    /// Command identifier.
    pub cid: U16,
    /// Status field shifted by the phase tag; see [`Cqe::status`].
    pub status_raw: U16,
}
const _: () = assert!(size_of::<Cqe>() == 16);

impl Cqe {
    /// A completion of `cid`.
    #[must_use]
    pub fn new(cid: u16, status: Status, result: u64) -> Cqe {
        Cqe {
            result: U64::new(result),
            sqhd: U16::ZERO,
            sqid: U16::ZERO,
            cid: U16::new(cid),
            status_raw: U16::new(status.to_wire()),
        }
    }

    /// From the bytes of a response capsule.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 16]) -> Cqe {
        zerocopy::transmute!(*bytes)
    }

    /// As bytes of a response capsule.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 16] {
        zerocopy::transmute!(*self)
    }

    /// The status without the phase tag.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_wire(self.status_raw.get())
    }

    /// Dword 0.
    #[must_use]
    pub fn dw0(&self) -> u32 {
        self.result.get() as u32
    }
}

/// Range of a Dataset Management command (NVM Command Set 1.0, "Dataset Management – Range
/// Definition"), 16 bytes.
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
pub struct DsmRange {
    /// Context attributes: hints.
    pub context_attributes: U32,
    /// Length in logical blocks (one-based: 0 means none).
    pub nlb: U32,
    /// Starting LBA.
    pub slba: U64,
}
const _: () = assert!(size_of::<DsmRange>() == 16);

/// Source range of a Copy command, Copy Descriptor Format 0h (NVM Command Set 1.0, "Copy – Source
/// Range Entries Copy Descriptor Format 0h"), 32 bytes.
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
pub struct CopyRange {
    /// Bytes 0..8: reserved in this format.
    pub reserved_0: U64,
    /// Starting LBA.
    pub slba: U64,
    /// Number of logical blocks, zero-based.
    pub nlb_z: U16,
    /// Bytes 18..24: reserved in this format.
    pub reserved_18: [u8; 6],
    /// Expected initial logical block reference tag: protection information.
    pub eilbrt: U32,
    /// Expected logical block application tag: protection information.
    pub elbat: U16,
    /// Expected logical block application tag mask: protection information.
    pub elbatm: U16,
}
const _: () = assert!(size_of::<CopyRange>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    /// Built by hand: a Read of 8 blocks at LBA 0x1_0000_0002 on namespace 3, cid 0x1234.
    #[test]
    fn sqe_matches_hand_built_bytes() {
        let mut bytes = [0u8; 64];
        bytes[0] = 0x02;
        bytes[1] = 0x40;
        bytes[2..4].copy_from_slice(&[0x34, 0x12]);
        bytes[4] = 3;
        bytes[32..36].copy_from_slice(&[0x00, 0x10, 0, 0]);
        bytes[39] = 0x5a;
        bytes[40] = 2;
        bytes[44] = 1;
        bytes[48] = 7;
        let sqe = Sqe::from_bytes(&bytes);
        assert_eq!((sqe.opcode, sqe.cid.get(), sqe.nsid.get()), (2, 0x1234, 3));
        assert_eq!((sqe.psdt(), sqe.fuse()), (1, 0));
        assert_eq!(sqe.dptr, SglDescriptor::transport(4096));
        assert_eq!(sqe.cdw10_11(), 0x1_0000_0002);
        assert_eq!(sqe.cdw12.get(), 7);
        assert_eq!(sqe.direction(), Direction::ToHost);
        assert_eq!(sqe.to_bytes(), bytes);
    }

    #[test]
    fn fabrics_type_is_byte_4() {
        let mut bytes = [0u8; 64];
        bytes[0] = 0x7f;
        bytes[4] = 0x01;
        bytes[5] = 0xee;
        let sqe = Sqe::from_bytes(&bytes);
        assert!(sqe.is_fabrics());
        assert_eq!(sqe.fctype(), FabricsType::CONNECT);
        assert_eq!(sqe.direction(), Direction::ToController);
        assert_eq!(
            format!("{:?} {:?}", sqe.fctype(), FabricsType(0xc0)),
            "CONNECT FabricsType(c0h)"
        );
    }

    #[test]
    fn cqe_matches_hand_built_bytes() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0, 0, 0, 0x34, 0x12, 0x04, 0x80];
        let cqe = Cqe::from_bytes(&bytes);
        assert_eq!(cqe.result.get(), 0x0807_0605_0403_0201);
        assert_eq!(cqe.dw0(), 0x0403_0201);
        assert_eq!((cqe.sqhd.get(), cqe.cid.get()), (0x10, 0x1234));
        assert_eq!(cqe.status(), Status::INVALID_FIELD_IN_COMMAND.dnr());
        assert_eq!(cqe.to_bytes(), bytes);
        let built = Cqe::new(0x1234, Status::INVALID_FIELD_IN_COMMAND.dnr(), 0x0807_0605_0403_0201);
        assert_eq!(built.to_bytes()[12..], bytes[12..]);
    }

    #[test]
    fn dsm_range_matches_hand_built_bytes() {
        let bytes = [0u8, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let range: DsmRange = zerocopy::transmute!(bytes);
        assert_eq!((range.nlb.get(), range.slba.get()), (8, 256));
    }

    #[test]
    fn copy_range_matches_hand_built_bytes() {
        let mut bytes = [0u8; 32];
        bytes[9] = 1;
        bytes[16] = 7;
        bytes[24] = 0xee;
        bytes[28] = 0xdd;
        let range: CopyRange = zerocopy::transmute!(bytes);
        assert_eq!((range.nlb_z.get(), range.slba.get()), (7, 256));
        assert_eq!((range.eilbrt.get(), range.elbat.get()), (0xee, 0xdd));
    }
}
