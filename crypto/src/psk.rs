//! From a configured key to the pre-shared key and identity of a TLS 1.3 handshake.
//!
//! NVMe/TCP Transport Specification, "TLS PSK and PSK Identity Derivation": the configured key
//! becomes a *retained* one that belongs to a host, this an *identity* text and a *TLS PSK* for a
//! host and subsystem. All hosts in the field agree on the identity's form, but not on the
//! derivation: see [`Derivation`].

use std::fmt;

use crate::base64;
use crate::kdf::{Hash, LABEL_PREFIX};
use crate::key::{KeyHash, TlsKey};
use crate::secret::Secret;

/// Appended to what a digest is made of.
const PROTOCOL: &[u8] = b"NVMe-over-Fabrics";
/// Longest NQN in bytes (NVMe Base Specification, "NVMe Qualified Names").
pub(crate) const NQN_BYTES_MAX: usize = 223;

/// The cipher suite that a key belongs to, by its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suite {
    /// TLS_AES_128_GCM_SHA256, for keys of 32 bytes.
    Aes128GcmSha256,
    /// TLS_AES_256_GCM_SHA384, for keys of 48 bytes.
    Aes256GcmSha384,
}

impl Suite {
    /// The suite's hash.
    pub const fn hash(self) -> Hash {
        match self {
            Suite::Aes128GcmSha256 => Hash::Sha256,
            Suite::Aes256GcmSha384 => Hash::Sha384,
        }
    }

    /// Length of the suite's traffic keys.
    pub(crate) const fn key_len(self) -> usize {
        match self {
            Suite::Aes128GcmSha256 => 16,
            Suite::Aes256GcmSha384 => 32,
        }
    }

    /// The number that TLS gives it (RFC 8446, appendix B.4).
    pub const fn iana(self) -> u16 {
        match self {
            Suite::Aes128GcmSha256 => 0x1301,
            Suite::Aes256GcmSha384 => 0x1302,
        }
    }

    /// The two digits of an identity.
    const fn code(self) -> &'static str {
        match self {
            Suite::Aes128GcmSha256 => "01",
            Suite::Aes256GcmSha384 => "02",
        }
    }

    fn from_key_len(len: usize) -> Option<Suite> {
        match len {
            32 => Some(Suite::Aes128GcmSha256),
            48 => Some(Suite::Aes256GcmSha384),
            _ => None,
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Suite::Aes128GcmSha256 => "TLS_AES_128_GCM_SHA256",
            Suite::Aes256GcmSha384 => "TLS_AES_256_GCM_SHA384",
        })
    }
}

/// Form of an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IdentityVersion {
    /// The names only.
    V0,
    /// The names and a digest of the key, so that several keys of one host are told apart.
    V1,
}

impl IdentityVersion {
    const fn digit(self) -> char {
        match self {
            IdentityVersion::V0 => '0',
            IdentityVersion::V1 => '1',
        }
    }
}

/// How keys are derived. Two ways are in the field, and they do not understand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Derivation {
    /// HKDF-Expand-Label as RFC 8446 has it: libnvme 1.16 and later, nvme-cli 2.16 and later, SPDK.
    Rfc8446,
    /// The label without its length bytes and with a little-endian length: libnvme before 1.16
    /// (nvme-cli 2.13 in Debian 13), and later ones with `--compat`.
    Libnvme,
}

impl Derivation {
    /// Both, the one of the standard first.
    pub const ALL: [Derivation; 2] = [Derivation::Rfc8446, Derivation::Libnvme];
}

impl fmt::Display for Derivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Derivation::Rfc8446 => "RFC 8446",
            Derivation::Libnvme => "libnvme < 1.16",
        })
    }
}

/// Why no key could be derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PskError {
    /// A name is longer than an NQN can be, or has a character that would end it in an identity.
    #[error("a name for a TLS identity has 1 to 223 bytes and neither space nor NUL")]
    Name,
    /// The standard derivation has one byte for the length of a version 0 identity.
    #[error(
        "the two names are too long together for a version 0 TLS identity (255 bytes with its \
         prefix); use shorter names or version 1"
    )]
    IdentityTooLong,
}

/// The key of one host: what is kept, and what TLS keys are derived from.
#[derive(Clone, PartialEq, Eq)]
pub struct RetainedKey {
    secret: Secret,
    suite: Suite,
    derivation: Derivation,
    is_generated: bool,
}

impl RetainedKey {
    /// The key that `configured` gives for the host `hostnqn`.
    ///
    /// "If the hash is 0, the retained PSK is the configured one"; then the way of derivation makes
    /// no difference yet.
    pub fn new(
        configured: &TlsKey,
        hostnqn: &str,
        derivation: Derivation,
    ) -> Result<RetainedKey, PskError> {
        check_name(hostnqn)?;
        let key = configured.secret();
        let len = key.expose().len();
        let suite = Suite::from_key_len(len).expect("a TLS key has 32 or 48 bytes");
        let hash = match configured.hash() {
            KeyHash::Sha256 => Some(Hash::Sha256),
            KeyHash::Sha384 => Some(Hash::Sha384),
            KeyHash::None | KeyHash::Sha512 => None,
        };
        let secret = match hash {
            None => key.clone(),
            Some(hash) => {
                let prk = hash.extract(key.expose());
                label(hash, &prk, derivation, "HostNQN", &[hostnqn.as_bytes()], len)
                    .ok_or(PskError::Name)?
            }
        };
        Ok(RetainedKey { secret, suite, derivation, is_generated: false })
    }

    /// The key that an authentication with secure channel concatenation generated; `None` if its
    /// length is no suite's.
    pub(crate) fn generated(secret: Secret) -> Option<RetainedKey> {
        let suite = Suite::from_key_len(secret.expose().len())?;
        Some(RetainedKey { secret, suite, derivation: Derivation::Rfc8446, is_generated: true })
    }

    /// The cipher suite it is for.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// How it was, and what follows from it will be, derived.
    pub fn derivation(&self) -> Derivation {
        self.derivation
    }

    /// The bytes; what a keyring stores.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Identity and TLS PSK for this host at a subsystem.
    pub fn psk(
        &self,
        version: IdentityVersion,
        hostnqn: &str,
        subnqn: &str,
    ) -> Result<Psk, PskError> {
        check_name(hostnqn)?;
        check_name(subnqn)?;
        let (hash, code) = (self.suite.hash(), self.suite.code());
        let kind = if self.is_generated { 'G' } else { 'R' };
        let mut identity = format!("NVMe{}{kind}{code} {hostnqn} {subnqn}", version.digit());
        let mut digest = String::new();
        if version == IdentityVersion::V1 {
            let names: [&[u8]; 5] = [hostnqn.as_bytes(), b" ", subnqn.as_bytes(), b" ", PROTOCOL];
            base64::encode(hash.hmac(self.secret.expose(), &names).expose(), &mut digest);
            identity.push(' ');
            identity.push_str(&digest);
        }
        let prk = hash.extract(self.secret.expose());
        let context: [&[u8]; 3] = match version {
            IdentityVersion::V0 => [identity.as_bytes(), b"", b""],
            IdentityVersion::V1 => [code.as_bytes(), b" ", digest.as_bytes()],
        };
        let secret = label(hash, &prk, self.derivation, "nvme-tls-psk", &context, hash.len_bytes())
            .ok_or(PskError::IdentityTooLong)?;
        Ok(Psk { identity, secret, suite: self.suite, derivation: self.derivation })
    }
}

fn label(
    hash: Hash,
    key: &Secret,
    derivation: Derivation,
    label: &str,
    context: &[&[u8]],
    len: usize,
) -> Option<Secret> {
    match derivation {
        Derivation::Rfc8446 => hash.expand_label(key, label, context, len),
        Derivation::Libnvme => {
            let len_bytes = u16::try_from(len).ok()?.to_le_bytes();
            let mut info: Vec<&[u8]> = vec![&len_bytes, LABEL_PREFIX, label.as_bytes()];
            info.extend_from_slice(context);
            Some(hash.expand(key, &info, len))
        }
    }
}

/// A name with a space would let one identity mean two pairs of names.
fn check_name(name: &str) -> Result<(), PskError> {
    let is_name = !name.is_empty()
        && name.len() <= NQN_BYTES_MAX
        && !name.bytes().any(|c| c == b' ' || c == 0);
    if is_name { Ok(()) } else { Err(PskError::Name) }
}

/// A pre-shared key of TLS 1.3, with the identity that names it.
#[derive(Clone, PartialEq, Eq)]
pub struct Psk {
    identity: String,
    secret: Secret,
    suite: Suite,
    derivation: Derivation,
}

impl Psk {
    /// The name under which it is offered.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The key.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The only cipher suite it may be used with.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// How it was derived.
    pub fn derivation(&self) -> Derivation {
        self.derivation
    }
}

/// What an identity says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity<'a> {
    /// Its form.
    pub version: IdentityVersion,
    /// Generated by an authentication, not configured.
    pub is_generated: bool,
    /// The suite of its key.
    pub suite: Suite,
    /// The host.
    pub hostnqn: &'a str,
    /// The subsystem.
    pub subnqn: &'a str,
    /// The digest of a version 1 identity, in base64.
    pub digest: Option<&'a str>,
}

impl<'a> Identity<'a> {
    /// Reads an identity as a peer sent it; `None` if it is none of NVMe/TCP.
    ///
    /// A final NUL is taken for an end, as some send it.
    pub fn parse(bytes: &'a [u8]) -> Option<Identity<'a>> {
        let text = std::str::from_utf8(bytes.strip_suffix(b"\0").unwrap_or(bytes)).ok()?;
        let mut parts = text.split(' ');
        let head = parts.next()?.strip_prefix("NVMe")?.as_bytes();
        let &[version, kind, b'0', suite] = head else { return None };
        let version = match version {
            b'0' => IdentityVersion::V0,
            b'1' => IdentityVersion::V1,
            _ => return None,
        };
        let is_generated = match kind {
            b'R' => false,
            b'G' => true,
            _ => return None,
        };
        let suite = match suite {
            b'1' => Suite::Aes128GcmSha256,
            b'2' => Suite::Aes256GcmSha384,
            _ => return None,
        };
        let (hostnqn, subnqn) = (parts.next()?, parts.next()?);
        check_name(hostnqn).ok()?;
        check_name(subnqn).ok()?;
        let digest = match version {
            IdentityVersion::V0 => None,
            IdentityVersion::V1 => Some(parts.next().filter(|d| !d.is_empty() && d.len() <= 88)?),
        };
        match parts.next() {
            None => Some(Identity { version, is_generated, suite, hostnqn, subnqn, digest }),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
