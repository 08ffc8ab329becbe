//! NVMe/TCP PDU headers as they are on the wire.
//!
//! Document: NVM Express TCP Transport Specification, Revision 1.0 ("NVMe/TCP 1.0" below);
//! figures and sections are those of that revision. Every field is little endian (section 2).
//!
//! These are raw layouts: any bytes of the right length are a value, nothing is checked here. The
//! qpair machines of [`crate::tcp`] are the one place that checks them, because what is right
//! depends on what was negotiated and asked for.
//!
//! ```text
//!  0        8          HLEN     +4 if HDGSTF   PDO                    PLEN
//!  | CH     | PSH      | HDGST  | PAD          | DATA     | DDGST     |
//! ```

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// PDU type, also called the PDU opcode (NVMe/TCP 1.0, Figure 10). Bit 0 is the direction: clear
/// from host to controller, set from controller to host.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct PduType(pub u8);

impl PduType {
    /// Initialize Connection Request, host to controller.
    pub const IC_REQ: Self = Self(0x00);
    /// Initialize Connection Response, controller to host.
    pub const IC_RESP: Self = Self(0x01);
    /// Terminate Connection Request, host to controller.
    pub const H2C_TERM_REQ: Self = Self(0x02);
    /// Terminate Connection Request, controller to host.
    pub const C2H_TERM_REQ: Self = Self(0x03);
    /// Command Capsule, host to controller.
    pub const CAPSULE_CMD: Self = Self(0x04);
    /// Response Capsule, controller to host.
    pub const CAPSULE_RESP: Self = Self(0x05);
    /// Data, host to controller.
    pub const H2C_DATA: Self = Self(0x06);
    /// Data, controller to host.
    pub const C2H_DATA: Self = Self(0x07);
    /// Ready to Transfer, controller to host.
    pub const R2T: Self = Self(0x09);
}

/// FLAGS of the common header. Which bits have a meaning depends on the PDU type; the others are
/// reserved.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct PduFlags(pub u8);

impl PduFlags {
    /// HDGSTF: a valid HDGST follows the PDU header.
    pub const HDGSTF: Self = Self(1 << 0);
    /// DDGSTF: a valid DDGST follows the PDU data.
    pub const DDGSTF: Self = Self(1 << 1);
    /// LAST_PDU: the last H2CData PDU of an R2T, or the last C2HData PDU of a command.
    pub const LAST_PDU: Self = Self(1 << 2);
    /// SUCCESS: the command of this C2HData PDU is complete, no response capsule follows.
    pub const SUCCESS: Self = Self(1 << 3);

    /// Whether all bits of `bits` are set.
    #[inline]
    #[must_use]
    pub const fn contains(self, bits: Self) -> bool {
        self.0 & bits.0 == bits.0
    }

    /// These flags, and `bits` too if `on`.
    #[inline]
    #[must_use]
    pub const fn with(self, bits: Self, on: bool) -> Self {
        if on { Self(self.0 | bits.0) } else { self }
    }
}

/// DGST of ICReq and ICResp: the digests asked for, or granted (NVMe/TCP 1.0, Figures 20 and 21).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct DigestFlags(pub u8);

impl DigestFlags {
    /// HDGST_ENABLE: header digest.
    pub const HDGST_ENABLE: Self = Self(1 << 0);
    /// DDGST_ENABLE: data digest.
    pub const DDGST_ENABLE: Self = Self(1 << 1);

    /// The flags for these two digests.
    #[must_use]
    pub const fn new(header: bool, data: bool) -> Self {
        Self(header as u8 | (data as u8) << 1)
    }

    /// Whether the header digest is enabled.
    #[must_use]
    pub const fn header(self) -> bool {
        self.0 & Self::HDGST_ENABLE.0 != 0
    }

    /// Whether the data digest is enabled.
    #[must_use]
    pub const fn data(self) -> bool {
        self.0 & Self::DDGST_ENABLE.0 != 0
    }
}

/// Fatal Error Status of a TermReq PDU (NVMe/TCP 1.0, Figures 22 and 23).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct FatalErrorStatus(pub U16);

impl FatalErrorStatus {
    /// A field of the PDU header is invalid; the FEI is its offset in the header in bytes.
    pub const INVALID_PDU_HEADER_FIELD: Self = Self(U16::new(0x01));
    /// An unexpected protocol sequence; no FEI.
    pub const PDU_SEQUENCE_ERROR: Self = Self(U16::new(0x02));
    /// HDGST does not match the header; the FEI is the HDGST received.
    pub const HEADER_DIGEST_ERROR: Self = Self(U16::new(0x03));
    /// Data outside the range of its R2T or command data buffer; no FEI.
    pub const DATA_TRANSFER_OUT_OF_RANGE: Self = Self(U16::new(0x04));
    /// C2HTermReq only: an H2CData PDU is longer than MAXH2CDATA; no FEI.
    pub const DATA_TRANSFER_LIMIT_EXCEEDED: Self = Self(U16::new(0x05));
    /// H2CTermReq only: more R2T PDUs outstanding than MAXR2T; no FEI.
    pub const R2T_LIMIT_EXCEEDED: Self = Self(U16::new(0x05));
    /// An unsupported parameter; the FEI is its offset in the header in bytes.
    pub const UNSUPPORTED_PARAMETER: Self = Self(U16::new(0x06));

    /// The value as a number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

/// PDU Common Header, CH (NVMe/TCP 1.0, Figure 19).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CommonHeader {
    /// PDU-Type.
    pub pdu_type: PduType,
    /// FLAGS.
    pub flags: PduFlags,
    /// HLEN: bytes of the header, without HDGST.
    pub hlen: u8,
    /// PDO: offset of the data from the start of the PDU in bytes; reserved without data.
    pub pdo: u8,
    /// PLEN: bytes of the whole PDU: CH, PSH, HDGST, PAD, DATA and DDGST.
    pub plen: U32,
}
const _: () = assert!(size_of::<CommonHeader>() == 8);

impl CommonHeader {
    /// That of a PDU of `hlen` bytes without flags, digest and data.
    #[must_use]
    pub const fn fixed(pdu_type: PduType, hlen: usize) -> Self {
        Self { pdu_type, flags: PduFlags(0), hlen: hlen as u8, pdo: 0, plen: U32::new(hlen as u32) }
    }
}

/// Initialize Connection Request, ICReq (NVMe/TCP 1.0, Figure 20).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IcReq {
    /// Common header: HLEN and PLEN 128, FLAGS and PDO reserved.
    pub ch: CommonHeader,
    /// PFV: PDU format version, 0.
    pub pfv: U16,
    /// HPDA: alignment of the data of C2HData PDUs in dwords, zero-based, 0 to 31.
    pub hpda_z: u8,
    /// DGST: digests the host asks for.
    pub dgst: DigestFlags,
    /// MAXR2T: R2T PDUs of one command that may be outstanding, zero-based.
    pub maxr2t_z: U32,
    /// Reserved.
    pub reserved16: [u8; 112],
}
const _: () = assert!(size_of::<IcReq>() == 128);

/// Initialize Connection Response, ICResp (NVMe/TCP 1.0, Figure 21).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IcResp {
    /// Common header: HLEN and PLEN 128, FLAGS and PDO reserved.
    pub ch: CommonHeader,
    /// PFV: PDU format version, 0.
    pub pfv: U16,
    /// CPDA: alignment of in-capsule data and of the data of H2CData PDUs in dwords, zero-based,
    /// 0 to 31.
    pub cpda_z: u8,
    /// DGST: digests that are used on this connection.
    pub dgst: DigestFlags,
    /// MAXH2CDATA: most bytes of data in one H2CData PDU, a multiple of 4 and no less than 4,096.
    pub maxh2cdata: U32,
    /// Reserved.
    pub reserved16: [u8; 112],
}
const _: () = assert!(size_of::<IcResp>() == 128);

/// Terminate Connection Request, H2CTermReq and C2HTermReq (NVMe/TCP 1.0, Figures 22 and 23). The
/// header of the PDU in error follows as data, at most 128 bytes of it. Never has a digest.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct TermReq {
    /// Common header: HLEN 24, PLEN 24 to 152, FLAGS and PDO reserved.
    pub ch: CommonHeader,
    /// FES: what went wrong.
    pub fes: FatalErrorStatus,
    /// FEI: where it went wrong. Not aligned: it is at offset 10.
    pub fei: U32,
    /// Reserved.
    pub reserved14: [u8; 10],
}
const _: () = assert!(size_of::<TermReq>() == 24);

/// Command Capsule, CapsuleCmd (NVMe/TCP 1.0, Figure 24).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CapsuleCmd {
    /// Common header: HLEN 72.
    pub ch: CommonHeader,
    /// CCSQE: the submission queue entry.
    pub sqe: [u8; 64],
}
const _: () = assert!(size_of::<CapsuleCmd>() == 72);

/// Response Capsule, CapsuleResp (NVMe/TCP 1.0, Figure 25).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CapsuleResp {
    /// Common header: HLEN 24, PDO reserved.
    pub ch: CommonHeader,
    /// RCCQE: the completion queue entry.
    pub cqe: [u8; 16],
}
const _: () = assert!(size_of::<CapsuleResp>() == 24);

/// Host to Controller Data, H2CData (NVMe/TCP 1.0, Figure 26).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct H2cData {
    /// Common header: HLEN 24.
    pub ch: CommonHeader,
    /// CCCID: identifier of the command that the data belongs to.
    pub cccid: U16,
    /// TTAG: transfer tag of the R2T that asked for the data.
    pub ttag: U16,
    /// DATAO: offset in the command data buffer in bytes, a multiple of 4.
    pub datao: U32,
    /// DATAL: bytes of data in this PDU, a multiple of 4.
    pub datal: U32,
    /// Reserved.
    pub reserved20: [u8; 4],
}
const _: () = assert!(size_of::<H2cData>() == 24);

/// Controller to Host Data, C2HData (NVMe/TCP 1.0, Figure 27).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct C2hData {
    /// Common header: HLEN 24.
    pub ch: CommonHeader,
    /// CCCID: identifier of the command that the data belongs to.
    pub cccid: U16,
    /// Reserved.
    pub reserved10: [u8; 2],
    /// DATAO: offset in the command data buffer in bytes, a multiple of 4.
    pub datao: U32,
    /// DATAL: bytes of data in this PDU, a multiple of 4.
    pub datal: U32,
    /// Reserved.
    pub reserved20: [u8; 4],
}
const _: () = assert!(size_of::<C2hData>() == 24);

/// Ready to Transfer, R2T (NVMe/TCP 1.0, Figure 28).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct R2t {
    /// Common header: HLEN 24, PDO reserved.
    pub ch: CommonHeader,
    /// CCCID: identifier of the command whose data is asked for.
    pub cccid: U16,
    /// TTAG: the controller's tag for this transfer.
    pub ttag: U16,
    /// R2TO: offset in the command data buffer in bytes, a multiple of 4.
    pub r2to: U32,
    /// R2TL: bytes asked for, a multiple of 4.
    pub r2tl: U32,
    /// Reserved.
    pub reserved20: [u8; 4],
}
const _: () = assert!(size_of::<R2t>() == 24);

/// Bytes of a header or data digest.
pub const DIGEST_BYTES: usize = 4;
/// Most bytes of the PDU header that a TermReq PDU repeats (NVMe/TCP 1.0, section 3.5).
pub const TERM_REQ_DATA_BYTES_MAX: usize = 128;
/// Largest zero-based HPDA and CPDA: 128 bytes (NVMe/TCP 1.0, section 3.3).
pub const PDA_Z_MAX: u8 = 31;
/// Least MAXH2CDATA (NVMe/TCP 1.0, Figure 21).
pub const MAXH2CDATA_MIN: u32 = 4096;
/// Most bytes of in-capsule data of an Admin or Fabrics command (NVMe/TCP 1.0, section 3.3.1).
pub const ADMIN_IN_CAPSULE_BYTES_MAX: u32 = 8192;

/// Offsets of fields in a PDU header in bytes, as the FEI of a TermReq PDU gives them.
pub mod offset {
    /// PDU-Type.
    pub const PDU_TYPE: u32 = 0;
    /// FLAGS.
    pub const FLAGS: u32 = 1;
    /// HLEN.
    pub const HLEN: u32 = 2;
    /// PDO.
    pub const PDO: u32 = 3;
    /// PLEN.
    pub const PLEN: u32 = 4;
    /// PFV of ICReq and ICResp.
    pub const PFV: u32 = 8;
    /// HPDA of ICReq, CPDA of ICResp.
    pub const PDA: u32 = 10;
    /// DGST of ICReq and ICResp.
    pub const DGST: u32 = 11;
    /// MAXH2CDATA of ICResp.
    pub const MAXH2CDATA: u32 = 12;
    /// CCCID of H2CData, C2HData and R2T.
    pub const CCCID: u32 = 8;
    /// TTAG of H2CData and R2T.
    pub const TTAG: u32 = 10;
    /// DATAL of H2CData and C2HData, R2TL of R2T.
    pub const DATAL: u32 = 16;
    /// CID of the completion queue entry in CapsuleResp.
    pub const RCCQE_CID: u32 = 20;
}

#[cfg(test)]
pub(crate) mod tests;
