//! The cipher of one direction: all that the record layer asks of a library of cryptography.
//!
//! Kept this small so that another library can take its place. A nonce is used once: the sequence
//! number is in here, goes up with every record and cannot be set.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::psk::Suite;
use crate::secret::Secret;

/// Length of an authentication tag.
pub(super) const TAG_LEN: usize = 16;

/// Length of a block of the cipher.
const BLOCK_LEN: u64 = 16;
/// Blocks that a full record costs its key: plaintext with the inner type, and the tag's own.
const RECORD_BLOCKS: u64 = (1 << 14) / BLOCK_LEN + 2;

/// The record is not what the peer sealed.
pub(super) struct Forged;

/// Key, nonce and the secret that the next key comes from.
pub(super) struct Cipher {
    suite: Suite,
    secret: Secret,
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    /// Number of the next record.
    seq: u64,
    /// Blocks sealed with the present key.
    blocks: u64,
}

impl Cipher {
    pub(super) fn new(suite: Suite, secret: Secret, seq: u64) -> Cipher {
        let (key, iv) = keys(suite, &secret);
        Cipher { suite, secret, key, iv, seq, blocks: seq.saturating_mul(RECORD_BLOCKS) }
    }

    /// Goes on to the next generation of keys (RFC 8446, section 7.2).
    pub(super) fn update(&mut self) {
        let hash = self.suite.hash();
        let next = hash.expand_label(&self.secret, "traffic upd", &[], hash.len_bytes());
        *self = Cipher::new(self.suite, next.expect("a short label without context"), 0);
    }

    /// What was sealed with the present key, in full records, rounded up. What an observer learns
    /// grows with the blocks, so that many small records wear a key no more than few large ones.
    pub(super) fn wear(&self) -> u64 {
        self.blocks.div_ceil(RECORD_BLOCKS)
    }

    #[cfg(test)]
    pub(super) fn skip_to_for_test(&mut self, seq: u64) {
        assert!(seq >= self.seq, "a nonce is used once");
        (self.seq, self.blocks) = (seq, seq.saturating_mul(RECORD_BLOCKS));
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, seq) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.seq.to_be_bytes()) {
            *byte ^= seq;
        }
        // The record layer ends a key long before.
        self.seq = self.seq.checked_add(1).expect("fewer than 2^64 records");
        Nonce::assume_unique_for_key(nonce)
    }

    /// Counts a record of `len` bytes that is sealed.
    fn wear_by(&mut self, len: usize) {
        self.blocks = self.blocks.saturating_add(len as u64 / BLOCK_LEN + 2);
    }

    /// Seals `in_out` and the inner type `kind` in place; type and tag go to `tail`.
    pub(super) fn seal_in_place(
        &mut self,
        header: [u8; 5],
        in_out: &mut [u8],
        kind: u8,
        tail: &mut [u8; 1 + TAG_LEN],
    ) {
        let nonce = self.nonce();
        self.wear_by(in_out.len());
        self.key
            .seal_in_place_scatter(nonce, Aad::from(header), in_out, &[kind], tail)
            .expect("a record is shorter than the cipher's limit, and its tail has its length");
    }

    /// As above, from `plain` to `out` of the same length.
    pub(super) fn seal(
        &mut self,
        header: [u8; 5],
        plain: &[u8],
        out: &mut [u8],
        kind: u8,
        tail: &mut [u8; 1 + TAG_LEN],
    ) {
        let nonce = self.nonce();
        self.wear_by(plain.len());
        self.key
            .seal_out_of_place_scatter(nonce, Aad::from(header), plain, out, &[kind], tail)
            .expect("a record is shorter than the cipher's limit, and both ends have one length");
    }

    /// Opens ciphertext and tag in place; the plaintext, with the inner type and padding, is at the
    /// front. After an error the bytes are of no use.
    pub(super) fn open_in_place(
        &mut self,
        header: [u8; 5],
        in_out: &mut [u8],
    ) -> Result<usize, Forged> {
        let nonce = self.nonce();
        match self.key.open_in_place(nonce, Aad::from(header), in_out) {
            Ok(plain) => Ok(plain.len()),
            Err(_) => Err(Forged),
        }
    }
}

fn keys(suite: Suite, secret: &Secret) -> (LessSafeKey, [u8; NONCE_LEN]) {
    let (hash, algorithm) = match suite {
        Suite::Aes128GcmSha256 => (suite.hash(), &AES_128_GCM),
        Suite::Aes256GcmSha384 => (suite.hash(), &AES_256_GCM),
    };
    let expand = |label, len| {
        hash.expand_label(secret, label, &[], len).expect("a short label without context")
    };
    let key = UnboundKey::new(algorithm, expand("key", suite.key_len()).expose());
    let iv = expand("iv", NONCE_LEN);
    (
        LessSafeKey::new(key.expect("the key has the suite's length")),
        iv.expose().try_into().expect("as long as a nonce"),
    )
}
