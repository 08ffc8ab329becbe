//! How a peer breaks the protocol, and the PDU that says so.

use zerocopy::little_endian::U32;

use super::PduHead;
use crate::spec::pdu::{CommonHeader, FatalErrorStatus, PduType, TERM_REQ_DATA_BYTES_MAX, TermReq};

/// A fatal transport error (NVMe/TCP 1.0, section 3.5): the peer broke the protocol, nothing that
/// arrives after it is read. The owner of the connection sends a TermReq PDU
/// ([`Target::term_req`](super::Target::term_req), [`Host::term_req`](super::Host::term_req)) and
/// closes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} (FES {:#04x}, FEI {fei:#x})", .fes.get())]
pub struct Fault {
    /// Fatal Error Status.
    pub fes: FatalErrorStatus,
    /// Fatal Error Information; what it means depends on `fes`.
    pub fei: u32,
    /// What was wrong, for a log.
    pub what: &'static str,
}

impl Fault {
    /// Invalid PDU Header Field, at this offset in the header.
    #[cold]
    pub(super) const fn field(offset: u32, what: &'static str) -> Self {
        Self { fes: FatalErrorStatus::INVALID_PDU_HEADER_FIELD, fei: offset, what }
    }

    /// Unsupported Parameter, at this offset in the header.
    #[cold]
    pub(super) const fn unsupported(offset: u32, what: &'static str) -> Self {
        Self { fes: FatalErrorStatus::UNSUPPORTED_PARAMETER, fei: offset, what }
    }

    /// PDU Sequence Error.
    #[cold]
    pub(super) const fn sequence(what: &'static str) -> Self {
        Self { fes: FatalErrorStatus::PDU_SEQUENCE_ERROR, fei: 0, what }
    }

    /// A status that has no FEI.
    #[cold]
    pub(super) const fn status(fes: FatalErrorStatus, what: &'static str) -> Self {
        Self { fes, fei: 0, what }
    }

    /// Header Digest Error, with the digest received.
    #[cold]
    pub(super) const fn header_digest(received: [u8; 4]) -> Self {
        Self {
            fes: FatalErrorStatus::HEADER_DIGEST_ERROR,
            fei: u32::from_le_bytes(received),
            what: "header digest does not match the header",
        }
    }

    /// The TermReq PDU for this fault, with the `header` (of at most 128 bytes) that was being
    /// processed when it was found. `pdu_type` is `H2C_TERM_REQ` or `C2H_TERM_REQ`.
    #[must_use]
    pub fn term_req(&self, pdu_type: PduType, header: &[u8]) -> PduHead {
        let header = &header[..header.len().min(TERM_REQ_DATA_BYTES_MAX)];
        let hlen = size_of::<TermReq>();
        let pdu = TermReq {
            ch: CommonHeader {
                plen: U32::new((hlen + header.len()) as u32),
                ..CommonHeader::fixed(pdu_type, hlen)
            },
            fes: self.fes,
            fei: U32::new(self.fei),
            reserved14: [0; 10],
        };
        PduHead::new(&pdu, false, hlen).with_data(header)
    }
}
