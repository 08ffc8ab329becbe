//! The cipher of one direction: all that the record layer asks of a library of cryptography.
//!
//! Kept this small so that another library can take its place. A nonce seals once: the sequence
//! number is in here, goes up with every record and cannot be set.
//!
//! AES-GCM is fed piece by piece, so that a record is sealed from wherever its bytes are, and opened
//! to wherever they belong, in one pass each. The safe form of the library takes whole records alone.

// UNSAFETY: payload is guest or pool memory, which is read and written by address, as references
// would promise that nobody else does; and the library is C.
#![expect(unsafe_code)]

use std::ffi::c_int;
use std::ptr::{self, NonNull};
use std::slice;

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_ctrl, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new,
    EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG, EVP_CipherFinal_ex, EVP_CipherInit_ex,
    EVP_CipherUpdate, EVP_aes_128_gcm, EVP_aes_256_gcm,
};
use iobuf::{Gather, Segment, SgList};

use crate::psk::Suite;
use crate::secret::Secret;

/// Length of an authentication tag.
pub(super) const TAG_LEN: usize = 16;

const NONCE_LEN: usize = 12;
/// Length of a block of the cipher.
const BLOCK_LEN: u64 = 16;
/// Blocks that a full record costs its key: plaintext with the inner type, and the tag's own.
const RECORD_BLOCKS: u64 = (1 << 14) / BLOCK_LEN + 2;

/// The record is not what the peer sealed.
pub(super) struct Forged;

/// What a cipher is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Seal,
    Open,
}

/// Key, nonce and the secret that the next key comes from.
pub(super) struct Cipher {
    suite: Suite,
    secret: Secret,
    gcm: Gcm,
    iv: [u8; NONCE_LEN],
    /// Number of the next record.
    seq: u64,
    /// Blocks sealed or opened with the present key.
    blocks: u64,
}

impl Cipher {
    pub(super) fn new(purpose: Use, suite: Suite, secret: Secret, seq: u64) -> Cipher {
        let hash = suite.hash();
        let expand = |label, len| {
            hash.expand_label(&secret, label, &[], len).expect("a short label without context")
        };
        let gcm = Gcm::new(purpose, suite, expand("key", suite.key_len()).expose());
        let iv = expand("iv", NONCE_LEN);
        let iv = iv.expose().try_into().expect("as long as a nonce");
        Cipher { suite, secret, gcm, iv, seq, blocks: seq.saturating_mul(RECORD_BLOCKS) }
    }

    /// Goes on to the next generation of keys (RFC 8446, section 7.2).
    pub(super) fn update(&mut self) {
        let hash = self.suite.hash();
        let next = hash.expand_label(&self.secret, "traffic upd", &[], hash.len_bytes());
        let next = next.expect("a short label without context");
        *self = Cipher::new(self.gcm.purpose, self.suite, next, 0);
    }

    /// What was sealed or opened with the present key, in full records, rounded up. What an observer learns
    /// grows with the blocks, so that many small records wear a key no more than few large ones.
    pub(super) fn wear(&self) -> u64 {
        self.blocks.div_ceil(RECORD_BLOCKS)
    }

    #[cfg(test)]
    pub(super) fn skip_to_for_test(&mut self, seq: u64) {
        assert!(seq >= self.seq, "a nonce is used once");
        (self.seq, self.blocks) = (seq, seq.saturating_mul(RECORD_BLOCKS));
    }

    /// Starts on the next record.
    fn begin(&mut self, header: [u8; 5]) {
        let mut nonce = self.iv;
        for (byte, seq) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.seq.to_be_bytes()) {
            *byte ^= seq;
        }
        self.gcm.begin(&nonce, &header);
    }

    /// Goes on to the next record; this one had `len` bytes.
    fn advance(&mut self, len: usize) {
        // The record layer ends a key long before.
        self.seq = self.seq.checked_add(1).expect("fewer than 2^64 records");
        self.blocks = self.blocks.saturating_add(len as u64 / BLOCK_LEN + 2);
    }

    /// Appends to `out` the record of the next `len` bytes of `plain`. They may change meanwhile: each
    /// is read once.
    ///
    /// # Panics
    ///
    /// If there are fewer: a mistake of the caller.
    pub(super) fn seal(
        &mut self,
        header: [u8; 5],
        plain: &mut Source<'_>,
        len: usize,
        kind: u8,
        out: &mut Vec<u8>,
    ) {
        assert!(self.gcm.purpose == Use::Seal, "a cipher for sealing");
        self.begin(header);
        self.advance(len);
        out.extend_from_slice(&header);
        out.reserve(len + 1 + TAG_LEN);
        let to = out.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        let mut at = 0;
        while at < len {
            let part = plain.next(len - at).expect("as many bytes as were counted");
            // SAFETY: the part can be read as long as `plain` lives (its invariant) and is not longer
            // than asked for, and the room behind `at` has `len - at` bytes and more (just reserved),
            // which nothing else refers to.
            unsafe { self.gcm.update(part.as_ptr(), to.wrapping_add(at), part.len()) };
            at += part.len();
        }
        // SAFETY: `kind` is a byte, and `1 + TAG_LEN` bytes are reserved behind the content.
        unsafe { self.gcm.update(&raw const kind, to.wrapping_add(len), 1) };
        let tag = self.gcm.tag();
        // SAFETY: `len + 1` bytes behind the length have been written, part by part.
        unsafe { out.set_len(out.len() + len + 1) };
        out.extend_from_slice(&tag);
    }

    /// Opens ciphertext and tag in place; the plaintext, with the inner type and padding, is at the
    /// front. After an error the bytes are of no use.
    pub(super) fn open_in_place(
        &mut self,
        header: [u8; 5],
        in_out: &mut [u8],
    ) -> Result<usize, Forged> {
        assert!(self.gcm.purpose == Use::Open, "a cipher for opening");
        let len = in_out.len().checked_sub(TAG_LEN).ok_or(Forged)?;
        let (text, tag) = in_out.split_at_mut(len);
        self.begin(header);
        self.advance(len.saturating_sub(1)); // without the inner type
        // SAFETY: it is one slice, which the library may write as it reads it.
        unsafe { self.gcm.update(text.as_ptr(), text.as_mut_ptr(), len) };
        if self.gcm.is_authentic(tag) { Ok(len) } else { Err(Forged) }
    }

    /// Opens `record`, all but its last byte, to `to` from `offset`, where others may change it
    /// meanwhile; the last byte is returned: where there is no padding, the inner type. The record
    /// counts as opened when [`accept`](Cipher::accept) follows, and can be opened in place otherwise,
    /// as it is not changed.
    ///
    /// # Panics
    ///
    /// If the list ends before: a mistake of the caller.
    pub(super) fn open_to(
        &mut self,
        header: [u8; 5],
        record: &[u8],
        to: &SgList,
        offset: usize,
    ) -> Result<u8, Forged> {
        assert!(self.gcm.purpose == Use::Open, "a cipher for opening");
        let len = record.len().checked_sub(1 + TAG_LEN).ok_or(Forged)?;
        let (text, tag) = record.split_at(len + 1);
        self.begin(header);
        let mut at = 0;
        for part in to.range(offset, len) {
            let from = &text[at..at + part.len()];
            // SAFETY: `from` is as long as the part, which can be written as long as the list lives
            // (its invariant); memory of lists is never lent by reference, so that `record`
            // is none of it.
            unsafe { self.gcm.update(from.as_ptr(), part.as_ptr(), from.len()) };
            at += part.len();
        }
        assert_eq!(at, len, "room for all of the plaintext");
        let mut last = 0;
        // SAFETY: the last byte of the text, and a byte of the stack.
        unsafe { self.gcm.update(text[len..].as_ptr(), &raw mut last, 1) };
        if self.gcm.is_authentic(tag) { Ok(last) } else { Err(Forged) }
    }

    /// The record of `len` bytes that was just opened by [`open_to`](Cipher::open_to) was good.
    pub(super) fn accept(&mut self, len: usize) {
        self.advance(len);
    }
}

/// What is sealed, taken in portions of any length. Invariant: it can be read for `'a`.
pub(super) struct Source<'a> {
    pieces: Pieces<'a>,
    /// What is left of the piece that was taken last.
    rest: Segment,
}

enum Pieces<'a> {
    Gather(iobuf::Range<'a>),
    Slices(slice::Iter<'a, &'a [u8]>),
}

impl<'a> Source<'a> {
    pub(super) fn of_gather(gather: &Gather<'a>) -> Source<'a> {
        Source { pieces: Pieces::Gather(gather.parts()), rest: Segment::new(ptr::null_mut(), 0) }
    }

    pub(super) fn of_slices(slices: &'a [&'a [u8]]) -> Source<'a> {
        Source { pieces: Pieces::Slices(slices.iter()), rest: Segment::new(ptr::null_mut(), 0) }
    }

    /// The next part, of `max` bytes at the most. No part is empty.
    fn next(&mut self, max: usize) -> Option<Segment> {
        while self.rest.is_empty() {
            self.rest = match &mut self.pieces {
                Pieces::Gather(parts) => parts.next()?,
                Pieces::Slices(slices) => {
                    let slice = slices.next()?;
                    Segment::new(slice.as_ptr().cast_mut(), slice.len())
                }
            };
        }
        let (part, rest) = self.rest.split(max);
        self.rest = rest;
        Some(part)
    }
}

/// AES-GCM of the library under one key: begin, update for each piece, and the tag.
struct Gcm {
    /// Owned.
    context: NonNull<EVP_CIPHER_CTX>,
    purpose: Use,
}

// SAFETY: the context is memory of the library's own that only this value refers to, and nothing in
// it belongs to a thread.
unsafe impl Send for Gcm {}

impl Gcm {
    fn new(purpose: Use, suite: Suite, key: &[u8]) -> Gcm {
        assert_eq!(key.len(), suite.key_len(), "a key of the suite's length");
        // SAFETY: takes nothing.
        let context = unsafe { EVP_CIPHER_CTX_new() };
        let context = NonNull::new(context).expect("memory for a cipher");
        let gcm = Gcm { context, purpose };
        let cipher = match suite {
            // SAFETY: takes nothing, and gives a constant.
            Suite::Aes128GcmSha256 => unsafe { EVP_aes_128_gcm() },
            // SAFETY: as above.
            Suite::Aes256GcmSha384 => unsafe { EVP_aes_256_gcm() },
        };
        let (key, encrypt) = (key.as_ptr(), c_int::from(purpose == Use::Seal));
        // SAFETY: a live context, a constant of the library, no engine, a key of the cipher's length,
        // which is copied, and no nonce yet.
        let is_set = unsafe {
            EVP_CipherInit_ex(gcm.as_ptr(), cipher, ptr::null_mut(), key, ptr::null(), encrypt)
        };
        assert_eq!(is_set, 1, "the cipher takes a key of its length");
        gcm
    }

    fn as_ptr(&self) -> *mut EVP_CIPHER_CTX {
        self.context.as_ptr()
    }

    /// Starts a message with this nonce and additional data.
    fn begin(&mut self, nonce: &[u8; NONCE_LEN], aad: &[u8; 5]) {
        const AS_BEFORE: c_int = -1;

        // SAFETY: a live context that has cipher and key, and a nonce of the cipher's length, which
        // is copied.
        let is_set = unsafe {
            EVP_CipherInit_ex(
                self.as_ptr(),
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                nonce.as_ptr(),
                AS_BEFORE,
            )
        };
        assert_eq!(is_set, 1, "the cipher takes a nonce of its length");
        // SAFETY: a live array; no output asks for additional data.
        unsafe { self.update(aad.as_ptr(), ptr::null_mut(), aad.len()) };
    }

    /// Goes on by `len` bytes.
    ///
    /// # Safety
    ///
    /// `from` can be read and `to` written for `len` bytes; they are the same or do not overlap.
    unsafe fn update(&mut self, from: *const u8, to: *mut u8, len: usize) {
        let mut written = 0;
        let len = c_int::try_from(len).expect("no record is as long");
        // SAFETY: a live context between `begin` and the tag; the ranges are the caller's promise.
        let is_done = unsafe { EVP_CipherUpdate(self.as_ptr(), to, &raw mut written, from, len) };
        assert_eq!(is_done, 1, "a record is shorter than the cipher's limit");
    }

    /// Ends a message that was sealed.
    fn tag(&mut self) -> [u8; TAG_LEN] {
        let mut tag = [0; TAG_LEN];
        assert!(self.finish(), "sealing cannot fail at the end");
        self.control(EVP_CTRL_AEAD_GET_TAG, tag.as_mut_ptr());
        tag
    }

    /// Ends a message that was opened: whether it is what was sealed. In constant time.
    fn is_authentic(&mut self, tag: &[u8]) -> bool {
        let mut tag: [u8; TAG_LEN] = tag.try_into().expect("a tag");
        self.control(EVP_CTRL_AEAD_SET_TAG, tag.as_mut_ptr());
        self.finish()
    }

    fn finish(&mut self) -> bool {
        let (mut rest, mut len) = ([0_u8; 16], 0);
        // SAFETY: a live context; this cipher leaves nothing for the end, and a block would fit.
        unsafe { EVP_CipherFinal_ex(self.as_ptr(), rest.as_mut_ptr(), &raw mut len) == 1 }
    }

    /// Reads or sets the tag.
    fn control(&mut self, command: c_int, tag: *mut u8) {
        // SAFETY: a live context; both commands take the address of a tag of this length, which both
        // callers have on their stack.
        let is_done =
            unsafe { EVP_CIPHER_CTX_ctrl(self.as_ptr(), command, TAG_LEN as c_int, tag.cast()) };
        assert_eq!(is_done, 1, "tags have this length");
    }
}

impl Drop for Gcm {
    fn drop(&mut self) {
        // SAFETY: the context is owned and not used again. The library wipes what it frees.
        unsafe { EVP_CIPHER_CTX_free(self.as_ptr()) };
    }
}
