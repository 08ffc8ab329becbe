//! Cuts a byte stream into PDU headers and pieces of PDU data: what the two qpair machines share.
//!
//! ```text
//!            whole header            pad skipped       last byte        digest read
//!   Header ───────────────► Pad ────────────────► Data ─────────► Digest ─────────► End ─┐
//!     ▲  (no data)                                  └──── no data digest ─────────►──────┤
//!     └──────────────────────────────────────────────────────────────────────────────────┘
//!   Dead: after a fault or a TermReq; swallows everything.
//! ```
//!
//! A header that is whole in the input is handed out as a slice of the input; only one that is cut
//! by the end of the input is collected in `partial`. Data is always handed out as slices.

use zerocopy::little_endian::U32;

use super::{Crc32c, Fault};
use crate::spec::pdu::{CommonHeader, DIGEST_BYTES, PduFlags, PduType, offset};

/// Bytes of the common header: with these the length of the whole header is known.
const CH_BYTES: usize = size_of::<CommonHeader>();
/// Longest header with its digest: ICReq and ICResp, which have none, at 128 bytes.
pub(super) const HEADER_BYTES_MAX: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between PDUs or inside a header; moved on by the byte that completes it.
    Header,
    /// Before the data; `pad` bytes are still to be skipped.
    Pad,
    /// `left` bytes of data are still to come.
    Data,
    /// After the data; `tail` collects the digest.
    Digest,
    /// The PDU is whole; moved on by reporting so.
    End,
    /// Connection over.
    Dead,
}

/// Where the data of a PDU is, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DataLayout {
    /// Bytes between header (or header digest) and data.
    pub(super) pad: u8,
    /// Bytes of data.
    pub(super) len: u32,
}

/// What is at the front of the input when a header is expected.
pub(super) enum Whole<'a> {
    /// The header lies in the input in one piece.
    Input(&'a [u8]),
    /// The header came in pieces and lies in the first bytes of this copy.
    Partial([u8; HEADER_BYTES_MAX], usize),
    /// Not all there yet; the input is used up.
    No,
}

/// What is at the front of the input when data is expected.
pub(super) enum Item<'a> {
    /// A piece of data of the command at `index`.
    Bytes { index: u16, offset: u32, bytes: &'a [u8] },
    /// The PDU is whole.
    End { index: u16, digest_ok: bool },
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Framer {
    phase: Phase,
    /// Digests are in use; set once, after ICReq and ICResp.
    header_digest: bool,
    data_digest: bool,
    /// Of the PDU whose data was received last; true without digests.
    digest_ok: bool,
    /// Bytes in `tail`.
    tail_len: u8,
    tail: [u8; DIGEST_BYTES],
    pad: u8,
    /// Slot or cid that the data belongs to.
    index: u16,
    /// Offset of the next byte of data in the command's buffer.
    offset: u32,
    /// Bytes of data still to come in this PDU.
    left: u32,
    /// Bytes in `partial`: 0 unless a header was cut by the end of an input.
    partial_len: u8,
    partial: [u8; HEADER_BYTES_MAX],
    crc: Crc32c,
    fault: Option<Fault>,
}

impl Framer {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Header,
            header_digest: false,
            data_digest: false,
            digest_ok: true,
            tail_len: 0,
            tail: [0; DIGEST_BYTES],
            pad: 0,
            index: 0,
            offset: 0,
            left: 0,
            partial_len: 0,
            partial: [0; HEADER_BYTES_MAX],
            crc: Crc32c::new(),
            fault: None,
        }
    }

    /// Digests as negotiated; they count from the next PDU on.
    pub(super) fn enable_digests(&mut self, header: bool, data: bool) {
        self.header_digest = header;
        self.data_digest = data;
    }

    #[inline]
    pub(super) fn header_digest(&self) -> bool {
        self.header_digest
    }

    #[inline]
    pub(super) fn data_digest(&self) -> bool {
        self.data_digest
    }

    /// Bytes of a header of `hlen` bytes with the digest, if in use.
    #[inline]
    pub(super) fn with_header_digest(&self, hlen: usize) -> usize {
        hlen + if self.header_digest { DIGEST_BYTES } else { 0 }
    }

    /// The common header of an outgoing PDU, HDGSTF as negotiated.
    #[inline]
    pub(super) fn common(
        &self,
        pdu_type: PduType,
        flags: PduFlags,
        hlen: usize,
        pdo: usize,
        plen: usize,
    ) -> CommonHeader {
        CommonHeader {
            pdu_type,
            flags: flags.with(PduFlags::HDGSTF, self.header_digest),
            hlen: hlen as u8,
            pdo: pdo as u8,
            plen: U32::new(u32::try_from(plen).expect("a PDU is less than 4 GiB")),
        }
    }

    /// Where the data of an outgoing PDU starts, and the PLEN: for a header of `hlen` bytes and
    /// `len` bytes of data aligned to `align` bytes.
    #[inline]
    pub(super) fn outgoing_layout(&self, hlen: usize, len: u32, align: u32) -> (usize, usize) {
        let pdo = self.with_header_digest(hlen).next_multiple_of(align as usize);
        let digest = if self.data_digest { DIGEST_BYTES } else { 0 };
        (pdo, pdo + len as usize + digest)
    }

    #[inline]
    pub(super) fn is_in_header(&self) -> bool {
        self.phase == Phase::Header
    }

    /// Whose data is being received.
    pub(super) fn receiving(&self) -> Option<u16> {
        match self.phase {
            Phase::Header | Phase::Dead => None,
            Phase::Pad | Phase::Data | Phase::Digest | Phase::End => Some(self.index),
        }
    }

    /// The connection is over because of `fault` (or because the peer said so); `header` is what
    /// a TermReq repeats. From now on the input is swallowed.
    #[cold]
    pub(super) fn die(&mut self, fault: Option<Fault>, header: &[u8]) {
        let len = header.len().min(HEADER_BYTES_MAX);
        self.phase = Phase::Dead;
        self.partial[..len].copy_from_slice(&header[..len]);
        self.partial_len = len as u8;
        self.fault = fault;
    }

    /// The header that [`Framer::die`] was called with.
    pub(super) fn header_in_error(&self) -> &[u8] {
        match self.phase {
            Phase::Dead => &self.partial[..usize::from(self.partial_len)],
            _ => &[],
        }
    }

    /// `Some` if the connection is over: takes the input and repeats the fault.
    #[inline]
    pub(super) fn dead(&mut self, input: &mut &[u8]) -> Option<Result<(), Fault>> {
        if self.phase != Phase::Dead {
            return None;
        }
        *input = &[];
        Some(self.fault.map_or(Ok(()), Err))
    }

    /// Takes the next header from the input. `len_of` is asked once the common header is there and
    /// gives the length of the whole header, its digest included, at most 128 bytes.
    #[inline]
    pub(super) fn header<'a>(
        &mut self,
        input: &mut &'a [u8],
        len_of: impl Fn(&Self, &CommonHeader) -> Result<usize, Fault>,
    ) -> Result<Whole<'a>, Fault> {
        if self.partial_len == 0
            && let Some((ch, _)) = split_common_header(input)
        {
            let len = match len_of(self, ch) {
                Ok(len) => len,
                Err(fault) => {
                    self.die(Some(fault), &input[..CH_BYTES]);
                    return Err(fault);
                }
            };
            if let Some((header, rest)) = input.split_at_checked(len) {
                *input = rest;
                return Ok(Whole::Input(header));
            }
        }
        self.collect_header(input, len_of)
    }

    /// The slow half of [`Framer::header`]: the header does not lie in one piece.
    #[cold]
    fn collect_header<'a>(
        &mut self,
        input: &mut &'a [u8],
        len_of: impl Fn(&Self, &CommonHeader) -> Result<usize, Fault>,
    ) -> Result<Whole<'a>, Fault> {
        self.collect(input, CH_BYTES);
        let Some((ch, _)) = split_common_header(&self.partial[..usize::from(self.partial_len)])
        else {
            return Ok(Whole::No);
        };
        let ch = *ch;
        let len = match len_of(self, &ch) {
            Ok(len) => len,
            Err(fault) => {
                let header = self.partial;
                self.die(Some(fault), &header[..CH_BYTES]);
                return Err(fault);
            }
        };
        self.collect(input, len);
        if usize::from(self.partial_len) < len {
            return Ok(Whole::No);
        }
        self.partial_len = 0;
        Ok(Whole::Partial(self.partial, len))
    }

    /// Moves bytes from the input to `partial` until that has `len` bytes or the input is empty.
    fn collect(&mut self, input: &mut &[u8], len: usize) {
        let have = usize::from(self.partial_len);
        let count = len.saturating_sub(have).min(input.len());
        let (bytes, rest) = input.split_at(count);
        self.partial[have..have + count].copy_from_slice(bytes);
        self.partial_len = (have + count) as u8;
        *input = rest;
    }

    /// Checks what must be right before the digest of a header can be found: HDGSTF and HLEN.
    /// Gives the length of the header with its digest.
    #[inline]
    pub(super) fn check_length(&self, ch: &CommonHeader, hlen: usize) -> Result<usize, Fault> {
        if ch.flags.contains(PduFlags::HDGSTF) != self.header_digest {
            return Err(Fault::field(offset::FLAGS, "HDGSTF is not as negotiated"));
        }
        check_hlen(ch, hlen)?;
        Ok(self.with_header_digest(hlen))
    }

    /// Checks the digest of a header of `hlen` bytes, if digests are in use.
    #[inline]
    pub(super) fn check_digest(&self, header: &[u8], hlen: usize) -> Result<(), Fault> {
        if self.header_digest {
            let (header, digest) = header.split_at(hlen);
            if digest != Crc32c::of(header) {
                let mut received = [0; DIGEST_BYTES];
                received.copy_from_slice(digest);
                return Err(Fault::header_digest(received));
            }
        }
        Ok(())
    }

    /// Checks DDGSTF, PDO and PLEN of a PDU with data. `header_len` is that of the header with its
    /// digest, `align` the alignment of the data in bytes.
    #[inline]
    pub(super) fn data_layout(
        &self,
        ch: &CommonHeader,
        header_len: usize,
        align: u32,
    ) -> Result<DataLayout, Fault> {
        if ch.flags.contains(PduFlags::DDGSTF) != self.data_digest {
            return Err(Fault::field(offset::FLAGS, "DDGSTF is not as negotiated"));
        }
        let pdo = usize::from(ch.pdo);
        if pdo < header_len {
            return Err(Fault::field(offset::PDO, "PDO is inside the header"));
        }
        if !u32::from(ch.pdo).is_multiple_of(align) {
            return Err(Fault::field(offset::PDO, "PDO is not aligned as agreed"));
        }
        let digest = if self.data_digest { DIGEST_BYTES as u32 } else { 0 };
        match ch.plen.get().checked_sub(u32::from(ch.pdo) + digest) {
            Some(len) => Ok(DataLayout { pad: (pdo - header_len) as u8, len }),
            None => Err(Fault::field(offset::PLEN, "PLEN ends before the data")),
        }
    }

    /// The header just taken is followed by data (at least one byte) for `index`, which goes to
    /// `offset` in that command's buffer.
    #[inline]
    pub(super) fn expect_data(&mut self, index: u16, offset: u32, layout: DataLayout) {
        debug_assert!(layout.len > 0);
        self.index = index;
        self.offset = offset;
        self.pad = layout.pad;
        self.left = layout.len;
        self.phase = if layout.pad == 0 { Phase::Data } else { Phase::Pad };
        if self.data_digest {
            self.crc.reset();
            self.tail_len = 0;
        }
    }

    /// Where the next byte of the input belongs, if that is data: index and offset as given to
    /// [`Framer::expect_data`], and how many bytes follow there. `None` with a data digest, too, which
    /// needs to see the bytes.
    #[inline]
    pub(super) fn incoming(&self) -> Option<(u16, u32, u32)> {
        let is_data = self.phase == Phase::Data && !self.data_digest;
        is_data.then_some((self.index, self.offset, self.left))
    }

    /// The next `len` bytes, no more than [`Framer::incoming`] said, are where they belong.
    #[inline]
    pub(super) fn placed(&mut self, len: u32) {
        assert!(self.incoming().is_some_and(|(_, _, left)| len <= left), "data is expected");
        self.offset += len;
        self.left -= len;
        if self.left == 0 {
            self.phase = Phase::End;
        }
    }

    /// Takes the next piece of the PDU's data from the input. `None`: it needs more input.
    #[inline]
    pub(super) fn data<'a>(&mut self, input: &mut &'a [u8]) -> Option<Item<'a>> {
        loop {
            match self.phase {
                Phase::Pad => {
                    let count = usize::from(self.pad).min(input.len());
                    *input = &input[count..];
                    self.pad -= count as u8;
                    if self.pad > 0 {
                        return None;
                    }
                    self.phase = Phase::Data;
                }
                Phase::Data => {
                    if input.is_empty() {
                        return None;
                    }
                    let count = input.len().min(self.left as usize);
                    let (bytes, rest) = input.split_at(count);
                    *input = rest;
                    let offset = self.offset;
                    // `count` is at most `left`, a u32; and the caller of `expect_data` has
                    // checked that offset + length is one too.
                    self.offset += count as u32;
                    self.left -= count as u32;
                    if self.data_digest {
                        self.crc.update(bytes);
                    }
                    if self.left == 0 {
                        self.phase = if self.data_digest { Phase::Digest } else { Phase::End };
                    }
                    return Some(Item::Bytes { index: self.index, offset, bytes });
                }
                Phase::Digest => {
                    let have = usize::from(self.tail_len);
                    let count = (DIGEST_BYTES - have).min(input.len());
                    let (bytes, rest) = input.split_at(count);
                    *input = rest;
                    self.tail[have..have + count].copy_from_slice(bytes);
                    self.tail_len += count as u8;
                    if usize::from(self.tail_len) < DIGEST_BYTES {
                        return None;
                    }
                    self.digest_ok = self.tail == self.crc.finish();
                    self.phase = Phase::End;
                }
                Phase::End => {
                    self.phase = Phase::Header;
                    return Some(Item::End { index: self.index, digest_ok: self.digest_ok });
                }
                Phase::Header | Phase::Dead => return None,
            }
        }
    }
}

/// Checks HLEN; gives it back as the length of a header that never has a digest.
#[inline]
pub(super) fn check_hlen(ch: &CommonHeader, hlen: usize) -> Result<usize, Fault> {
    if usize::from(ch.hlen) != hlen {
        return Err(Fault::field(offset::HLEN, "HLEN is not that of the PDU type"));
    }
    Ok(hlen)
}

/// The common header at the front of `bytes`, if there is one.
#[inline]
fn split_common_header(bytes: &[u8]) -> Option<(&CommonHeader, &[u8])> {
    zerocopy::FromBytes::ref_from_prefix(bytes).ok()
}

/// A reference to the header `H` at the front of `bytes`, which the framer has taken whole.
#[inline]
pub(super) fn view<H>(bytes: &[u8]) -> &H
where
    H: zerocopy::FromBytes + zerocopy::Immutable + zerocopy::KnownLayout + zerocopy::Unaligned,
{
    match H::ref_from_prefix(bytes) {
        Ok((header, _)) => header,
        // Each caller asks for the type whose size it gave as the header's length.
        Err(_) => unreachable!("the framer takes whole headers"),
    }
}

/// The PDU type of a header.
#[inline]
pub(super) fn type_of(header: &[u8]) -> PduType {
    view::<CommonHeader>(header).pdu_type
}
