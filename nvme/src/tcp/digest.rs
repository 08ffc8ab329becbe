//! CRC32C, the header and data digest.

use crc_fast::{CrcAlgorithm, Digest};

/// CRC32C over a stream of slices (NVMe/TCP 1.0, section 3.3.1.1; RFC 3385). The result is in wire
/// order, as HDGST and DDGST carry it.
///
/// ```
/// use nvme::tcp::Crc32c;
/// let mut crc = Crc32c::new();
/// crc.update(b"12345").update(b"6789");
/// assert_eq!(crc.finish(), 0xe306_9283u32.to_le_bytes());
/// assert_eq!(crc.finish(), Crc32c::of(b"123456789"));
/// ```
#[derive(Clone, Debug)]
pub struct Crc32c(Digest);

impl Crc32c {
    /// Over nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// Over the bytes so far and `bytes`.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    /// The digest of the bytes so far.
    #[inline]
    #[must_use]
    pub fn finish(&self) -> [u8; 4] {
        (self.0.finalize() as u32).to_le_bytes()
    }

    /// Over nothing again; cheaper than a new one.
    #[inline]
    pub fn reset(&mut self) {
        self.0.reset();
    }

    /// The digest of one slice.
    #[inline]
    #[must_use]
    pub fn of(bytes: &[u8]) -> [u8; 4] {
        crc_fast::crc32_iscsi(bytes).to_le_bytes()
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The polynomial division bit by bit: what the fast code must agree with.
    fn bitwise(bytes: &[u8]) -> [u8; 4] {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        (!crc).to_le_bytes()
    }

    #[test]
    fn rfc_3720_vectors() {
        // RFC 3720, appendix B.4, in wire order.
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let mut read_cdb = [0u8; 48];
        for (at, value) in
            [(0, 0x01), (1, 0xc0), (16, 0x14), (22, 0x04), (27, 0x14), (31, 0x18), (32, 0x28)]
        {
            read_cdb[at] = value;
        }
        read_cdb[40] = 0x02;
        for (bytes, digest) in [
            (&[0u8; 32][..], [0xaa, 0x36, 0x91, 0x8a]),
            (&[0xffu8; 32][..], [0x43, 0xab, 0xa8, 0x62]),
            (&ascending, [0x4e, 0x79, 0xdd, 0x46]),
            (&descending, [0x5c, 0xdb, 0x3f, 0x11]),
            (&read_cdb, [0x56, 0x3a, 0x96, 0xd9]),
        ] {
            assert_eq!(bitwise(bytes), digest);
            assert_eq!(Crc32c::of(bytes), digest);
            assert_eq!(Crc32c::new().update(bytes).finish(), digest);
        }
    }

    #[test]
    fn every_length_and_split_agrees_with_the_bitwise_division() {
        // The fast code takes different paths by length, so each length up to a few vectors counts.
        let bytes: Vec<u8> = (0..1500u32).map(|i| (i * 31 + i / 7) as u8).collect();
        let mut crc = Crc32c::new();
        for len in (0..600).chain([1023, 1024, 1025, 1500]) {
            let want = bitwise(&bytes[..len]);
            assert_eq!(Crc32c::of(&bytes[..len]), want, "length {len}");
            let (head, tail) = bytes[..len].split_at(len / 3);
            crc.reset();
            assert_eq!(crc.update(head).update(tail).finish(), want, "length {len}, split");
        }
    }
}
