//! Hashes and the key derivation of TLS 1.3 (RFC 5869, RFC 8446 section 7.1) over secrets.

use aws_lc_rs::{digest, hmac};
use zeroize::Zeroize;

use crate::secret::{SECRET_BYTES_MAX, Secret};

/// A hash of the SHA-2 family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hash {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// Length of a digest in bytes.
    pub const fn len_bytes(self) -> usize {
        match self {
            Hash::Sha256 => 32,
            Hash::Sha384 => 48,
            Hash::Sha512 => 64,
        }
    }

    fn digest_algorithm(self) -> &'static digest::Algorithm {
        match self {
            Hash::Sha256 => &digest::SHA256,
            Hash::Sha384 => &digest::SHA384,
            Hash::Sha512 => &digest::SHA512,
        }
    }

    fn hmac_algorithm(self) -> hmac::Algorithm {
        match self {
            Hash::Sha256 => hmac::HMAC_SHA256,
            Hash::Sha384 => hmac::HMAC_SHA384,
            Hash::Sha512 => hmac::HMAC_SHA512,
        }
    }

    /// The digest of all `parts`, one after the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Secret {
        let mut context = digest::Context::new(self.digest_algorithm());
        for part in parts {
            context.update(part);
        }
        whole(context.finish().as_ref())
    }

    /// HMAC (RFC 2104) of all `parts`, one after the other.
    pub(crate) fn hmac(self, key: &[u8], parts: &[&[u8]]) -> Secret {
        let mut context = hmac::Context::with_key(&hmac::Key::new(self.hmac_algorithm(), key));
        for part in parts {
            context.update(part);
        }
        whole(context.sign().as_ref())
    }

    /// HKDF-Extract with a salt of zeros.
    pub(crate) fn extract(self, secret: &[u8]) -> Secret {
        self.hmac(&[0; SECRET_BYTES_MAX][..self.len_bytes()], &[secret])
    }

    /// HKDF-Expand to `len` bytes, at most 64.
    pub(crate) fn expand(self, key: &Secret, info: &[&[u8]], len: usize) -> Secret {
        assert!(len <= SECRET_BYTES_MAX, "no derived key is longer");
        let mut bytes = [0; SECRET_BYTES_MAX];
        let mut block = whole(&[]);
        for (counter, out) in (1_u8..).zip(bytes[..len].chunks_mut(self.len_bytes())) {
            let counter = [counter];
            let parts = [&[block.expose()], info, &[&counter[..]]].concat();
            let next = self.hmac(key.expose(), &parts);
            out.copy_from_slice(&next.expose()[..out.len()]);
            block = next;
        }
        let secret = whole(&bytes[..len]);
        bytes.zeroize();
        secret
    }

    /// HKDF-Expand-Label (RFC 8446, section 7.1); `None` if the context is longer than its length
    /// byte can say, or the label.
    pub(crate) fn expand_label(
        self,
        key: &Secret,
        label: &str,
        context: &[&[u8]],
        len: usize,
    ) -> Option<Secret> {
        let label_len = u8::try_from(LABEL_PREFIX.len() + label.len()).ok()?;
        let context_len =
            u8::try_from(context.iter().map(|part| part.len()).sum::<usize>()).ok()?;
        let len_bytes = u16::try_from(len).ok()?.to_be_bytes();
        let (label_len, context_len) = ([label_len], [context_len]);
        let mut info: Vec<&[u8]> =
            vec![&len_bytes, &label_len, LABEL_PREFIX, label.as_bytes(), &context_len];
        info.extend_from_slice(context);
        Some(self.expand(key, &info, len))
    }
}

/// What HkdfLabel begins every label with.
pub(crate) const LABEL_PREFIX: &[u8] = b"tls13 ";

fn whole(bytes: &[u8]) -> Secret {
    Secret::new(bytes).expect("no digest is longer than 64 bytes")
}

/// Whether two values are equal, in a time that tells nothing but their lengths.
pub(crate) fn is_equal(a: &[u8], b: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::hex;

    /// RFC 5869, test case 3: no salt, no info, more than one block.
    #[test]
    fn hkdf_vector() {
        let prk = Hash::Sha256.extract(&[0x0b; 22]);
        let want = "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04";
        assert_eq!(prk.expose(), hex(want));
        let okm = Hash::Sha256.expand(&prk, &[], 42);
        let want = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d\
                    9d201395faa4b61a96c8";
        assert_eq!(okm.expose(), hex(want));
    }

    /// RFC 8448, section 3: "derived" from the early secret, and the write key from a traffic
    /// secret.
    #[test]
    fn expand_label_vectors() {
        let early = Hash::Sha256.extract(&[0; 32]);
        let want = "33ad0a1c607ec03b09e6cd9893680ce210adf300aa1f2660e1b22e10f170f92a";
        assert_eq!(early.expose(), hex(want));
        let empty = Hash::Sha256.digest(&[]);
        let derived = Hash::Sha256.expand_label(&early, "derived", &[empty.expose()], 32).unwrap();
        let want = "6f2615a108c702c5678f54fc9dbab69716c076189c48250cebeac3576c3611ba";
        assert_eq!(derived.expose(), hex(want));
        let secret = "b3eddb126e067f35a780b3abf45e2d8f3b1a950738f52e9600746a0e27a55a21";
        let secret = Secret::new(&hex(secret)).unwrap();
        let key = Hash::Sha256.expand_label(&secret, "key", &[], 16).unwrap();
        assert_eq!(key.expose(), hex("dbfaa693d1762c5b666af5d950258d01"));
        let iv = Hash::Sha256.expand_label(&secret, "iv", &[], 12).unwrap();
        assert_eq!(iv.expose(), hex("5bd3c71b836e0b76bb73265f"));
    }

    /// RFC 4231, test case 2.
    #[test]
    fn hmac_vectors() {
        let mac = Hash::Sha512.hmac(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        let want = "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea250554\
                    9758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737";
        assert_eq!(mac.expose(), hex(want));
        let mac = Hash::Sha384.hmac(b"Jefe", &[b"what do ya want for nothing?"]);
        let want = "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e\
                    8e2240ca5e69e2c78b3239ecfab21649";
        assert_eq!(mac.expose(), hex(want));
    }

    #[test]
    fn a_context_longer_than_its_length_byte_is_refused() {
        let key = Hash::Sha256.extract(b"x");
        assert!(Hash::Sha256.expand_label(&key, "l", &[&[0; 255]], 32).is_some());
        assert!(Hash::Sha256.expand_label(&key, "l", &[&[0; 200], &[0; 56]], 32).is_none());
    }
}
