//! The Connect command: parsing, its refusals, and building one (NVMe Base 2.0, "Connect Command
//! and Response").
//!
//! ```text
//! SQE:  40 RECFMT  42 QID  44 SQSIZE (zero-based)  46 CATTR  48 KATO (ms)
//! data:  0 HOSTID  16 CNTLID  256 SUBNQN  512 HOSTNQN
//! ```

use core::time::Duration;

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, IntoBytes};

use crate::spec::fabrics::{CATTR_DISABLE_SQ_FLOW, CNTLID_DYNAMIC, CONNECT_DATA_LEN};
use crate::spec::{ConnectData, FabricsType, Nqn, SglDescriptor, Sqe, Status};

/// A parsed Connect command. Whether the subsystem, host and queue exist is for the caller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectRequest {
    /// Queue to create: 0 is the admin queue.
    pub qid: u16,
    /// Entries of the submission queue, one-based, at least 2.
    pub queue_entries: u32,
    /// Keep alive timeout; zero: disabled. Meaningful on the admin queue only.
    pub kato: Duration,
    /// The host asked to disable submission queue flow control.
    pub sq_flow_disabled: bool,
    /// Host Identifier, not zero.
    pub hostid: [u8; 16],
    /// Controller ID asked for.
    pub cntlid: u16,
    /// Subsystem to connect to.
    pub subnqn: Nqn,
    /// Connecting host.
    pub hostnqn: Nqn,
}

/// A refused Connect: status and dword 0 (IPO and IATTR for Connect Invalid Parameters).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("connect refused: {status}")]
pub struct ConnectReject {
    /// Status of the response.
    pub status: Status,
    /// Dword 0 of the response: Invalid Parameter Offset in 15:0, IATTR in 23:16.
    pub dw0: u32,
}

impl ConnectReject {
    const fn plain(status: Status) -> Self {
        ConnectReject { status, dw0: 0 }
    }

    const fn sqe(offset: u16) -> Self {
        ConnectReject { status: Status::CONNECT_INVALID_PARAMETERS.dnr(), dw0: offset as u32 }
    }

    const fn data(offset: u16) -> Self {
        ConnectReject {
            status: Status::CONNECT_INVALID_PARAMETERS.dnr(),
            dw0: offset as u32 | 1 << 16,
        }
    }

    /// Unknown RECFMT.
    pub const INCOMPATIBLE_FORMAT: Self = Self::plain(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr());
    /// No controller can be given now; the host retries.
    pub const BUSY: Self = Self::plain(Status::CONNECT_CONTROLLER_BUSY);
    /// The host is to read the discovery log again.
    pub const RESTART_DISCOVERY: Self = Self::plain(Status::CONNECT_RESTART_DISCOVERY.dnr());
    /// This host may not use the subsystem.
    pub const INVALID_HOST: Self = Self::plain(Status::CONNECT_INVALID_HOST.dnr());
    /// The Connect data does not have 1024 bytes.
    pub const DATA_LENGTH: Self = Self::plain(Status::DATA_SGL_LENGTH_INVALID.dnr());
    /// The queue is already connected, or a command came in the wrong order.
    pub const SEQUENCE: Self = Self::plain(Status::COMMAND_SEQUENCE_ERROR.dnr());
    /// QID out of range.
    pub const QID: Self = Self::sqe(42);
    /// SQSIZE zero or larger than the controller supports.
    pub const SQSIZE: Self = Self::sqe(44);
    /// CATTR: an unsupported attribute.
    pub const CATTR: Self = Self::sqe(46);
    /// KATO longer than the controller allows.
    pub const KATO: Self = Self::sqe(48);
    /// HOSTID zero, or not the one of the admin queue.
    pub const HOSTID: Self = Self::data(0);
    /// CNTLID not known, or not dynamic on an admin queue.
    pub const CNTLID: Self = Self::data(16);
    /// SUBNQN malformed.
    pub const SUBNQN: Self = Self::data(256);
    /// HOSTNQN malformed, or not the one of the admin queue.
    pub const HOSTNQN: Self = Self::data(512);
    /// SUBNQN well formed, but no such subsystem here *now*. Without Do Not Retry: after a
    /// restart a subsystem may come back a moment later, and a host that sees DNR gives up its
    /// reconnect attempts for good.
    pub const UNKNOWN_SUBSYSTEM: Self =
        ConnectReject { status: Status::CONNECT_INVALID_PARAMETERS, dw0: 256 | 1 << 16 };
    /// CNTLID of an I/O Connect names no controller *now*: its association is gone. Without Do
    /// Not Retry, for the same reason.
    pub const UNKNOWN_CONTROLLER: Self =
        ConnectReject { status: Status::CONNECT_INVALID_PARAMETERS, dw0: 16 | 1 << 16 };
}

impl ConnectRequest {
    /// Parses a Connect SQE and its data. `data` must be what the command transferred.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn parse(sqe: &Sqe, data: &[u8]) -> Result<ConnectRequest, ConnectReject> {
        let cdw10 = sqe.cdw10.get();
        let cdw11 = sqe.cdw11.get();
        if cdw10 & 0xffff != 0 {
            return Err(ConnectReject::INCOMPATIBLE_FORMAT);
        }
        let Ok(data) = ConnectData::ref_from_bytes(data) else {
            return Err(ConnectReject::DATA_LENGTH);
        };
        let sqsize_z = cdw11 & 0xffff;
        if sqsize_z == 0 {
            return Err(ConnectReject::SQSIZE);
        }
        let cattr = (cdw11 >> 16) as u8;
        // Bits 1:0 are the priority class, which round robin ignores; bit 2 disables SQ flow
        // control; bit 3 says that the host can delete a single I/O queue (Disconnect).
        if cattr & !0b1111 != 0 {
            return Err(ConnectReject::CATTR);
        }
        if data.hostid == [0; 16] {
            return Err(ConnectReject::HOSTID);
        }
        Ok(ConnectRequest {
            qid: (cdw10 >> 16) as u16,
            queue_entries: sqsize_z + 1,
            kato: Duration::from_millis(u64::from(sqe.cdw12.get())),
            sq_flow_disabled: cattr & CATTR_DISABLE_SQ_FLOW != 0,
            hostid: data.hostid,
            cntlid: data.cntlid.get(),
            subnqn: Nqn::from_field(&data.subnqn).map_err(|_| ConnectReject::SUBNQN)?,
            hostnqn: Nqn::from_field(&data.hostnqn).map_err(|_| ConnectReject::HOSTNQN)?,
        })
    }

    /// Builds the SQE (cid 0; data in the capsule at offset 0) and the data: the inverse of
    /// [`ConnectRequest::parse`]. `queue_entries` is clamped to 2..=65536 and `kato` to `u32`
    /// milliseconds.
    #[must_use]
    pub fn encode(&self) -> (Sqe, [u8; CONNECT_DATA_LEN]) {
        let mut sqe = Sqe::fabrics(FabricsType::CONNECT);
        let sqsize_z = self.queue_entries.clamp(2, 1 << 16) - 1;
        let cattr = if self.sq_flow_disabled { CATTR_DISABLE_SQ_FLOW } else { 0 };
        sqe.dptr = SglDescriptor::in_capsule(0, CONNECT_DATA_LEN as u32);
        sqe.cdw10.set(u32::from(self.qid) << 16);
        sqe.cdw11.set(sqsize_z | u32::from(cattr) << 16);
        sqe.cdw12.set(u32::try_from(self.kato.as_millis()).unwrap_or(u32::MAX));
        let mut data = [0; CONNECT_DATA_LEN];
        ConnectData {
            hostid: self.hostid,
            cntlid: U16::new(self.cntlid),
            reserved_18: [0; 238],
            subnqn: self.subnqn.to_field(),
            hostnqn: self.hostnqn.to_field(),
            reserved_768: [0; 256],
        }
        .write_to(&mut data)
        .expect("ConnectData is 1024 bytes");
        (sqe, data)
    }

    /// Whether this Connect asks for an admin queue.
    #[must_use]
    pub const fn is_admin(&self) -> bool {
        self.qid == 0
    }

    /// Whether any controller will do.
    #[must_use]
    pub const fn is_dynamic(&self) -> bool {
        self.cntlid == CNTLID_DYNAMIC
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ConnectRequest {
        ConnectRequest {
            qid: 3,
            queue_entries: 128,
            kato: Duration::from_secs(5),
            sq_flow_disabled: true,
            hostid: [7; 16],
            cntlid: 0x1234,
            subnqn: Nqn::new("nqn.2024-01.io.penstock:db0").unwrap(),
            hostnqn: Nqn::new("nqn.2014-08.org.nvmexpress:uuid:x").unwrap(),
        }
    }

    #[test]
    fn encode_matches_hand_built_bytes_and_parses_back() {
        let (sqe, data) = request().encode();
        let bytes = sqe.to_bytes();
        assert_eq!(bytes[0..5], [0x7f, 0x40, 0, 0, 1]);
        assert_eq!(bytes[24..40], [0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[40..52], [0, 0, 3, 0, 127, 0, 4, 0, 0x88, 0x13, 0, 0]);
        assert_eq!(data[16..18], [0x34, 0x12]);
        assert_eq!(&data[256..267], b"nqn.2024-01");
        assert_eq!(&data[512..523], b"nqn.2014-08");
        assert_eq!(ConnectRequest::parse(&sqe, &data).unwrap(), request());
    }

    #[test]
    fn refusals_name_the_field() {
        let (sqe, data) = request().encode();
        let with_sqe = |f: &dyn Fn(&mut Sqe)| {
            let mut sqe = sqe;
            f(&mut sqe);
            ConnectRequest::parse(&sqe, &data).unwrap_err()
        };
        let with_data = |at: usize, byte: u8| {
            let mut data = data;
            data[at] = byte;
            ConnectRequest::parse(&sqe, &data).unwrap_err()
        };
        assert_eq!(with_sqe(&|s| s.cdw10.set(1)), ConnectReject::INCOMPATIBLE_FORMAT);
        assert_eq!(with_sqe(&|s| s.cdw11.set(0)), ConnectReject::SQSIZE);
        assert_eq!(with_sqe(&|s| s.cdw11.set(1 | 16 << 16)), ConnectReject::CATTR);
        assert_eq!(with_data(256, b'x'), ConnectReject::SUBNQN);
        assert_eq!(with_data(512, 0), ConnectReject::HOSTNQN);
        assert_eq!(
            ConnectRequest::parse(&sqe, &data[..1023]).unwrap_err(),
            ConnectReject::DATA_LENGTH
        );
        let mut no_host = data;
        no_host[..16].fill(0);
        assert_eq!(ConnectRequest::parse(&sqe, &no_host).unwrap_err(), ConnectReject::HOSTID);
        // IATTR bit 0 says "in the data"; IPO is the byte offset there.
        assert_eq!(ConnectReject::SUBNQN.dw0, 0x0001_0100);
        assert_eq!(ConnectReject::SQSIZE.dw0, 44);
        assert!(ConnectReject::SUBNQN.status.is_dnr());
        assert!(!ConnectReject::UNKNOWN_SUBSYSTEM.status.is_dnr());
        assert!(!ConnectReject::BUSY.status.is_dnr());
    }
}
