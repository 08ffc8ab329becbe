//! Building outgoing PDU headers.

use std::fmt;

use zerocopy::{Immutable, IntoBytes};

use super::Crc32c;
use crate::spec::pdu::{DIGEST_BYTES, TERM_REQ_DATA_BYTES_MAX, TermReq};

/// The longest head: a TermReq with the header it complains of. The others end at 128 bytes at
/// the latest, the largest PDO that an alignment of up to 128 bytes can ask for.
const HEAD_BYTES_MAX: usize = size_of::<TermReq>() + TERM_REQ_DATA_BYTES_MAX;

/// All bytes of an outgoing PDU that come before its data: header, header digest if enabled, and
/// padding up to the data. Kept inline, so that building one allocates nothing.
#[derive(Clone)]
pub struct PduHead {
    len: u8,
    bytes: [u8; HEAD_BYTES_MAX],
}

impl PduHead {
    /// `header`, then its digest if `digest`, then zeros until `len` bytes.
    #[inline]
    pub(super) fn new<H: IntoBytes + Immutable>(header: &H, digest: bool, len: usize) -> Self {
        let header = header.as_bytes();
        let mut bytes = [0; HEAD_BYTES_MAX];
        bytes[..header.len()].copy_from_slice(header);
        if digest {
            bytes[header.len()..header.len() + DIGEST_BYTES].copy_from_slice(&Crc32c::of(header));
        }
        Self { len: len as u8, bytes }
    }

    /// The same with `data` behind it, which must fit.
    pub(super) fn with_data(mut self, data: &[u8]) -> Self {
        let start = usize::from(self.len);
        self.bytes[start..start + data.len()].copy_from_slice(data);
        self.len += data.len() as u8;
        self
    }
}

impl AsRef<[u8]> for PduHead {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::ops::Deref for PduHead {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.as_ref()
    }
}

impl PartialEq for PduHead {
    fn eq(&self, other: &Self) -> bool {
        self.as_ref() == other.as_ref()
    }
}

impl Eq for PduHead {}

impl fmt::Debug for PduHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PduHead(")?;
        for byte in self.as_ref() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}
