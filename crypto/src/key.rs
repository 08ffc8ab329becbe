//! The interchange formats: prefix, hash, base64 of key and CRC-32, colon.

use zeroize::Zeroizing;

use crate::base64;
use crate::psk::Suite;
use crate::secret::{SECRET_BYTES_MAX, Secret, SecretText};

const CRC_BYTES: usize = 4;

/// The hash that a configured key is transformed with before use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyHash {
    /// Used as it is.
    None,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512; for DH-HMAC-CHAP only.
    Sha512,
}

impl KeyHash {
    const ALL: [(KeyHash, &str); 4] = [
        (KeyHash::None, "00"),
        (KeyHash::Sha256, "01"),
        (KeyHash::Sha384, "02"),
        (KeyHash::Sha512, "03"),
    ];

    fn code(self) -> &'static str {
        KeyHash::ALL[self as usize].1
    }
}

/// Why a text or bytes are not a key. Never contains any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It begins with something else.
    #[error("a key begins with `{expected}`")]
    Prefix {
        /// How it should begin.
        expected: &'static str,
    },
    /// The two characters behind the prefix name no hash.
    #[error("unknown key hash; allowed are {allowed}")]
    Hash {
        /// What may stand there.
        allowed: &'static str,
    },
    /// No colon, or not exactly one, where the format has one.
    #[error("a key has the form `{form}`, with a colon at the end")]
    Form {
        /// The form.
        form: &'static str,
    },
    /// The part between hash and final colon is not base64.
    #[error("the key is not valid base64")]
    Base64,
    /// The key is too short or too long.
    #[error("a key has {allowed} bytes")]
    Length {
        /// Lengths in bytes.
        allowed: &'static str,
    },
    /// The checksum does not match: the text was damaged or mistyped.
    #[error("the key's checksum is wrong: check that it was copied completely")]
    Checksum,
}

/// One of the two formats.
struct Format {
    prefix: &'static str,
    form: &'static str,
    /// Number of hashes from `KeyHash::ALL`.
    hashes: usize,
    hashes_text: &'static str,
    lengths: &'static [usize],
    lengths_text: &'static str,
}

const TLS: Format = Format {
    prefix: "NVMeTLSkey-1:",
    form: "NVMeTLSkey-1:hh:base64:",
    hashes: 3,
    hashes_text: "00 (none), 01 (SHA-256) and 02 (SHA-384)",
    lengths: &[32, 48],
    lengths_text: "32 or 48",
};

const DHCHAP: Format = Format {
    prefix: "DHHC-1:",
    form: "DHHC-1:hh:base64:",
    hashes: 4,
    hashes_text: "00 (none), 01 (SHA-256), 02 (SHA-384) and 03 (SHA-512)",
    lengths: &[32, 48, 64],
    lengths_text: "32, 48 or 64",
};

impl Format {
    fn check(&self, hash: KeyHash, len: usize) -> Result<(), KeyError> {
        if hash as usize >= self.hashes {
            return Err(KeyError::Hash { allowed: self.hashes_text });
        }
        if !self.lengths.contains(&len) {
            return Err(KeyError::Length { allowed: self.lengths_text });
        }
        Ok(())
    }

    fn secret(&self, hash: KeyHash, bytes: &[u8]) -> Result<Secret, KeyError> {
        self.check(hash, bytes.len())?;
        Secret::new(bytes).ok_or(KeyError::Length { allowed: self.lengths_text })
    }

    fn parse(&self, text: &str) -> Result<(KeyHash, Secret), KeyError> {
        let form = KeyError::Form { form: self.form };
        let rest = text.strip_prefix(self.prefix);
        let rest = rest.ok_or(KeyError::Prefix { expected: self.prefix })?;
        let (hash, rest) = rest.split_once(':').ok_or(form)?;
        let (digits, rest) = rest.split_once(':').ok_or(form)?;
        if !rest.is_empty() {
            return Err(form);
        }
        let known = KeyHash::ALL[..self.hashes].iter().find(|(_, code)| *code == hash);
        let (hash, _) = *known.ok_or(KeyError::Hash { allowed: self.hashes_text })?;

        let mut bytes = Zeroizing::new([0; SECRET_BYTES_MAX + CRC_BYTES]);
        // What has the alphabet but not the room is too long, not malformed.
        if digits.len() > bytes.len().div_ceil(3) * 4 {
            return Err(KeyError::Length { allowed: self.lengths_text });
        }
        let len = base64::decode(digits.as_bytes(), &mut bytes[..]).ok_or(KeyError::Base64)?;
        let Some((key, crc)) = bytes[..len].split_last_chunk::<CRC_BYTES>() else {
            return Err(KeyError::Length { allowed: self.lengths_text });
        };
        let secret = self.secret(hash, key)?;
        if crc32fast::hash(key).to_le_bytes() != *crc {
            return Err(KeyError::Checksum);
        }
        Ok((hash, secret))
    }

    fn text(&self, hash: KeyHash, secret: &Secret) -> SecretText {
        let key = secret.expose();
        let mut bytes = Zeroizing::new([0; SECRET_BYTES_MAX + CRC_BYTES]);
        let bytes = &mut bytes[..key.len() + CRC_BYTES];
        bytes[..key.len()].copy_from_slice(key);
        bytes[key.len()..].copy_from_slice(&crc32fast::hash(key).to_le_bytes());
        // Large enough from the start: growing would leave copies behind.
        let mut text = String::with_capacity(self.form.len() + bytes.len().div_ceil(3) * 4);
        text.push_str(self.prefix);
        text.push_str(hash.code());
        text.push(':');
        base64::encode(bytes, &mut text);
        text.push(':');
        SecretText::new(text)
    }
}

macro_rules! key {
    ($(#[$doc:meta])* $name:ident, $format:expr, $hash_doc:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name {
            hash: KeyHash,
            secret: Secret,
        }

        impl $name {
            /// A key of these bytes.
            pub fn new(hash: KeyHash, bytes: &[u8]) -> Result<Self, KeyError> {
                Ok(Self { hash, secret: $format.secret(hash, bytes)? })
            }

            /// Reads the interchange format. Nothing may precede or follow it.
            pub fn parse(text: &str) -> Result<Self, KeyError> {
                let (hash, secret) = $format.parse(text)?;
                Ok(Self { hash, secret })
            }

            /// Writes the interchange format.
            pub fn to_text(&self) -> SecretText {
                $format.text(self.hash, &self.secret)
            }

            #[doc = $hash_doc]
            pub fn hash(&self) -> KeyHash {
                self.hash
            }

            /// The key as configured, not transformed.
            pub fn secret(&self) -> &Secret {
                &self.secret
            }
        }
    };
}

key!(
    /// A configured pre-shared key for TLS, 32 or 48 bytes (NVMe/TCP Transport Specification, PSK
    /// interchange format): `NVMeTLSkey-1:hh:` base64 of key and CRC-32 `:`.
    TlsKey,
    TLS,
    "The hash that derives the retained key from the configured one."
);

key!(
    /// A secret for DH-HMAC-CHAP, 32, 48 or 64 bytes (NVMe Base Specification, secret
    /// representation): `DHHC-1:hh:` base64 of key and CRC-32 `:`.
    DhchapKey,
    DHCHAP,
    "The hash that the secret is transformed with, together with an NQN."
);

impl TlsKey {
    /// A new key for `suite`, of random bytes.
    pub fn generate(suite: Suite, random: &[u8; 48]) -> TlsKey {
        let (hash, len) = match suite {
            Suite::Aes128GcmSha256 => (KeyHash::Sha256, 32),
            Suite::Aes256GcmSha384 => (KeyHash::Sha384, 48),
        };
        TlsKey::new(hash, &random[..len]).unwrap_or_else(|_| unreachable!("a key's length"))
    }
}

impl DhchapKey {
    /// A new secret of random bytes, as long as the digests of `hash`, or 32 bytes long if it is
    /// not to be transformed.
    pub fn generate(hash: KeyHash, random: &[u8; 64]) -> DhchapKey {
        let len = match hash {
            KeyHash::None | KeyHash::Sha256 => 32,
            KeyHash::Sha384 => 48,
            KeyHash::Sha512 => 64,
        };
        DhchapKey::new(hash, &random[..len]).unwrap_or_else(|_| unreachable!("a key's length"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VECTOR: &str = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";

    fn counting(len: usize) -> Vec<u8> {
        (0..len as u8).collect()
    }

    /// The bytes 00 to 1f, as nvme-cli 2.16 and SPDK write and read them.
    #[test]
    fn vector() {
        let key = TlsKey::parse(VECTOR).ok().unwrap();
        assert_eq!(key.hash(), KeyHash::Sha256);
        assert_eq!(key.secret().expose(), counting(32));
        assert_eq!(key.to_text().expose(), VECTOR);
        // The two formats differ in the prefix only.
        let dhchap = DhchapKey::parse(&VECTOR.replace("NVMeTLSkey", "DHHC")).ok().unwrap();
        assert!(dhchap.secret() == key.secret());
    }

    #[test]
    fn generated_keys_have_the_right_form() {
        for (suite, start) in [(Suite::Aes128GcmSha256, "01"), (Suite::Aes256GcmSha384, "02")] {
            let key = TlsKey::generate(suite, &[7; 48]);
            assert!(key.to_text().expose().starts_with(&format!("NVMeTLSkey-1:{start}:")));
            assert_eq!(key.secret().expose().len(), suite.hash().len_bytes());
        }
        for (hash, code) in KeyHash::ALL {
            let key = DhchapKey::generate(hash, &[7; 64]);
            assert!(key.to_text().expose().starts_with(&format!("DHHC-1:{code}:")));
        }
    }

    #[test]
    fn refusals_say_what_is_allowed() {
        let short = TLS.text(KeyHash::None, &Secret::new(&[1; 16]).unwrap());
        let long = TLS.text(KeyHash::None, &Secret::new(&[1; 64]).unwrap());
        let cases: [(&str, &str); 18] = [
            ("", "begins with `NVMeTLSkey-1:`"),
            ("NVMeTLSkey-2:01:AAAA:", "begins with `NVMeTLSkey-1:`"),
            (" NVMeTLSkey-1:01:AAAA:", "begins with"),
            ("NVMeTLSkey-1:", "form `NVMeTLSkey-1:hh:base64:`"),
            ("NVMeTLSkey-1:01", "form"),
            (VECTOR.strip_suffix(':').unwrap(), "colon at the end"),
            (&format!("{VECTOR}\n"), "form"),
            (&format!("{VECTOR}:"), "form"),
            (&VECTOR.replace(":01:", ":03:"), "allowed are 00 (none), 01 (SHA-256) and 02"),
            (&VECTOR.replace(":01:", ":1:"), "unknown key hash"),
            (&VECTOR.replace(":01:", "::"), "unknown key hash"),
            (&VECTOR.replace("AAEC", "AAE-"), "not valid base64"),
            (&VECTOR.replace("AAEC", "AAE"), "not valid base64"),
            (&VECTOR.replace("AAEC", "AAED"), "checksum"),
            ("NVMeTLSkey-1:01::", "32 or 48 bytes"),
            (short.expose(), "32 or 48 bytes"),
            (long.expose(), "32 or 48 bytes"),
            (&format!("NVMeTLSkey-1:00:{}:", "A".repeat(100_000)), "32 or 48 bytes"),
        ];
        for (text, want) in cases {
            let message = TlsKey::parse(text).err().unwrap().to_string();
            assert!(message.contains(want), "{text}: {message}");
        }
        let none = TlsKey::new(KeyHash::Sha512, &[1; 32]).err();
        assert_eq!(none, Some(KeyError::Hash { allowed: TLS.hashes_text }));
        let none = DhchapKey::new(KeyHash::Sha512, &[1; 40]).err();
        assert_eq!(none, Some(KeyError::Length { allowed: "32, 48 or 64" }));
        assert!(DhchapKey::parse(VECTOR).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn keys_survive_their_text(
            bytes in proptest::collection::vec(any::<u8>(), 64),
            hash in 0..4usize,
            len in 0..3usize,
        ) {
            let (hash, len) = (KeyHash::ALL[hash].0, DHCHAP.lengths[len]);
            let key = DhchapKey::new(hash, &bytes[..len]).unwrap_or_else(|e| panic!("{e}"));
            let text = key.to_text();
            prop_assert!(text.expose().starts_with("DHHC-1:0"));
            prop_assert!(DhchapKey::parse(text.expose()).is_ok_and(|k| k == key));
            if hash != KeyHash::Sha512 && len < 64 {
                let key = TlsKey::new(hash, &bytes[..len]).unwrap_or_else(|e| panic!("{e}"));
                prop_assert!(TlsKey::parse(key.to_text().expose()).is_ok_and(|k| k == key));
            }
        }

        /// A changed character is never taken for the same key, and any text is answered.
        #[test]
        fn damage_is_noticed(at in 0..VECTOR.len(), c in "[ -~]") {
            let mut text = VECTOR.to_owned();
            text.replace_range(at..at + 1, &c);
            let (Ok(read), Ok(original)) = (TlsKey::parse(&text), TlsKey::parse(VECTOR)) else {
                return Ok(());
            };
            prop_assert!(text == VECTOR || (read != original && read.hash() != original.hash()));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,80}") {
            prop_assert!(TlsKey::parse(&text).is_err());
            let _ = DhchapKey::parse(&format!("DHHC-1:00:{text}:"));
        }
    }
}
