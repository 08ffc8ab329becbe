//! What the fuzz targets share: reading decisions off the fuzzer's input, and cutting a stream.

pub mod nvm;

/// The fuzzer's input, read from the front. An empty input gives zeros, so that a decision is
/// always possible.
#[derive(Clone, Copy)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// The next `len` bytes, or what is left.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Small and seeded: decisions that need not be the fuzzer's.
pub struct Random(pub u64);

impl Random {
    /// A number below `below`, or 0.
    pub fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as usize % below.max(1)
    }
}

/// Calls `f` with one piece of `stream` after the other, each of at most `piece_max` bytes, until
/// it returns false.
pub fn cut<'a>(
    mut stream: &'a [u8],
    seed: u64,
    piece_max: usize,
    mut f: impl FnMut(&'a [u8]) -> bool,
) {
    let mut random = Random(seed);
    while !stream.is_empty() {
        let (piece, rest) = stream.split_at((1 + random.below(piece_max)).min(stream.len()));
        stream = rest;
        if !f(piece) {
            return;
        }
    }
}

/// Makes NVMe/TCP PDUs of a peer that mostly keeps to the protocol, so that the fuzzer gets past
/// lengths and digests.
pub struct Peer<'d> {
    /// Header digest in use.
    pub header_digest: bool,
    /// Data digest in use.
    pub data_digest: bool,
    /// Alignment of data, bytes.
    pub align: usize,
    /// Computes a digest.
    pub digest: &'d dyn Fn(&[u8]) -> [u8; 4],
}

impl Peer<'_> {
    /// PDUs of these types until the input is empty.
    pub fn pdus(&self, mut input: Input<'_>, types: &[u8]) -> Vec<u8> {
        let mut stream = Vec::new();
        while !input.is_empty() {
            let pick = usize::from(input.byte()) % types.len();
            self.pdu(&mut input, types[pick], &mut stream);
        }
        stream
    }

    fn pdu(&self, input: &mut Input<'_>, pdu_type: u8, stream: &mut Vec<u8>) {
        const CAPSULE_CMD: u8 = 4;
        const CAPSULE_RESP: u8 = 5;
        const R2T: u8 = 9;
        let hlen = if pdu_type == CAPSULE_CMD { 72 } else { 24 };
        let mut header = vec![0; hlen];
        let (fields, damage) = (input.byte(), input.byte());
        let mut data_len = 0;
        match pdu_type {
            CAPSULE_CMD => {
                // Opcode, flags, cid; the length in the SGL; in-capsule data if a bit says so.
                (header[8], header[9], header[10]) = (input.byte(), input.byte(), fields % 8);
                let len = 4 * u16::from(input.byte());
                header[40..42].copy_from_slice(&len.to_le_bytes());
                data_len = if fields & 8 == 8 { usize::from(len) } else { 0 };
            }
            CAPSULE_RESP => (header[20], header[22]) = (fields % 8, fields >> 3 & 2),
            _ => {
                // cccid, ttag, offset and length of H2CData, C2HData and R2T.
                (header[8], header[10]) = (fields % 8, fields >> 3 & 7);
                for at in [12, 16] {
                    let value = 4 * u16::from(input.byte());
                    header[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
                if pdu_type != R2T {
                    data_len = usize::from(u16::from_le_bytes([header[16], header[17]]));
                    header[1] = (fields >> 6) << 2; // LAST_PDU, SUCCESS
                }
            }
        }
        let with_digest = hlen + if self.header_digest { 4 } else { 0 };
        let (mut pdo, mut plen) = (0, with_digest);
        header[1] |= u8::from(self.header_digest);
        if data_len > 0 {
            pdo = with_digest.next_multiple_of(self.align);
            plen = pdo + data_len + if self.data_digest { 4 } else { 0 };
            header[1] |= u8::from(self.data_digest) << 1;
        }
        (header[0], header[2], header[3]) = (pdu_type, hlen as u8, pdo as u8);
        header[4..8].copy_from_slice(&(plen as u32).to_le_bytes());
        if damage >= 240 {
            header[usize::from(input.byte()) % hlen] ^= input.byte();
        }
        stream.extend(&header);
        if self.header_digest {
            stream.extend((self.digest)(&header));
        }
        if data_len > 0 {
            stream.resize(stream.len() + pdo - with_digest, 0);
            let data = vec![damage; data_len];
            stream.extend(&data);
            if self.data_digest {
                let digest = (self.digest)(&data);
                stream.extend(digest.map(|byte| if damage == 1 { !byte } else { byte }));
            }
        }
    }
}
