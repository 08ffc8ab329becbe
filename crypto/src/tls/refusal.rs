//! Why a handshake failed, in one line for the operator: who offered and expected what, which key is
//! missing, and what to run.

use std::fmt;

use super::alert::AlertCode;
use super::handshake::{HANDSHAKE_BYTES_MAX, Unknown};
use super::record::Role;
use crate::psk::{Derivation, Identity, Suite};

/// Why a handshake failed. What a peer sent is shown with control characters escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The peer does not speak TLS.
    Plaintext {
        /// The first byte.
        first: u8,
        /// Who saw it.
        role: Role,
    },
    /// A client offered no pre-shared key.
    NoPsk,
    /// A client offered an identity that is none of NVMe/TCP.
    NotNvme {
        /// The identity.
        received: String,
    },
    /// There is no key for the offered identity.
    Unknown {
        /// The identity.
        received: String,
        /// Why.
        why: Unknown,
    },
    /// There are keys for the host and subsystem, but none of the offered identity.
    OtherIdentity {
        /// The identity.
        received: String,
        /// Ours, with how they were derived.
        expected: Vec<(String, Derivation)>,
    },
    /// There are keys of the offered identity, but the client has another.
    WrongKey {
        /// The identity.
        received: String,
        /// How the keys that were tried were derived.
        tried: Vec<Derivation>,
    },
    /// The peer gave up with this alert.
    Alert {
        /// The alert.
        code: AlertCode,
        /// Who heard it.
        role: Role,
        /// The key that was offered, or that was taken; `None`: none yet.
        used: Option<Used>,
    },
    /// The peer agreed to another suite than the key's.
    Suite {
        /// Its number.
        agreed: u16,
        /// Who noticed it.
        role: Role,
        /// The key.
        used: Used,
    },
    /// The peer sent more than a handshake needs.
    TooLong {
        /// Who noticed it.
        role: Role,
    },
    /// The handshake broke some other rule, in the words of the TLS library.
    Protocol {
        /// The words.
        what: String,
        /// Who noticed it.
        role: Role,
        /// The key that was offered, or that was taken; `None`: none yet.
        used: Option<Used>,
    },
    /// The TLS library could not go on by itself.
    Internal {
        /// Its words.
        what: String,
    },
}

/// The key of a handshake, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its identity.
    pub identity: String,
    /// The suite that it is for.
    pub suite: Suite,
    /// How it was derived.
    pub derivation: Derivation,
}

impl fmt::Display for Used {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` (as derived by {}, for {})", self.identity, self.derivation, self.suite)
    }
}

/// What to run on a host.
const EXPORT: &str = "on the host, run what `penstock key export` prints for it";

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Plaintext { first, role: Role::Server } => write!(
                f,
                "the host does not speak TLS (first byte {first:02x}h), and this listener requires \
                 it: connect with `nvme connect --tls`, and {EXPORT}"
            ),
            Cause::Plaintext { first, role: Role::Client } => write!(
                f,
                "the target does not speak TLS (first byte {first:02x}h): connect without TLS, or \
                 to a listener that has it"
            ),
            Cause::NoPsk => write!(
                f,
                "the host offered no pre-shared key, expected one of `NVMe1R01 HOSTNQN SUBNQN DIGEST` \
                 or its kind: {EXPORT}"
            ),
            Cause::NotNvme { received } => write!(
                f,
                "the host offered `{received}`, which is no identity of NVMe/TCP; expected \
                 `NVMe1R01 HOSTNQN SUBNQN DIGEST` or one of its kind: {EXPORT}"
            ),
            Cause::Unknown { received, why } => {
                write!(f, "the host offered the TLS identity `{received}`; {why}: ")?;
                // The name is escaped already.
                match Identity::parse(received.as_bytes()).map(|identity| identity.hostnqn) {
                    Some(host) => write!(
                        f,
                        "make a key by `penstock key generate --host {host}`, or take the host's by \
                         `penstock key import --host {host}`"
                    )?,
                    None => f.write_str("make or import a key with `penstock key`")?,
                }
                write!(f, "; {EXPORT}")
            }
            Cause::OtherIdentity { received, expected } => {
                write!(f, "the host offered the TLS identity `{received}`; expected ")?;
                list(f, expected.iter(), |f, (identity, way)| write!(f, "`{identity}` ({way})"))?;
                write!(f, ": its key is another; {EXPORT}")
            }
            Cause::WrongKey { received, tried } => {
                write!(
                    f,
                    "the host offered the TLS identity `{received}` with a key that is not "
                )?;
                write!(f, "ours; tried {} as derived by ", plural(tried.len()))?;
                let mut ways = tried.clone();
                ways.sort_by_key(|way| *way as usize);
                ways.dedup();
                list(f, ways.iter(), |f, way| write!(f, "{way}"))?;
                write!(f, ": {EXPORT}")
            }
            Cause::Alert { code, role: Role::Server, used } => {
                write!(f, "the host gave up with the alert {code:?}")?;
                if let Some(used) = used {
                    write!(f, ", although it has proven to have the key of {used}")?;
                }
                write!(f, ": {}; {EXPORT}", host_gave_up(*code))
            }
            Cause::Alert { code, role: Role::Client, used: Some(used) } => {
                write!(f, "the target refused {used} with the alert {code}")
            }
            Cause::Alert { code, role: Role::Client, used: None } => {
                write!(f, "the target gave up with the alert {code}")
            }
            Cause::Suite { agreed, role: Role::Server, used } => write!(
                f,
                "the host has the key of {used}, but agreed to cipher suite {agreed:04x}h: let its \
                 TLS (crypto policy, GnuTLS priorities) use {}, or give it a key of the other \
                 length by `penstock key generate --bits`; {EXPORT}",
                used.suite
            ),
            Cause::Suite { agreed, role: Role::Client, used } => write!(
                f,
                "the target took the key of {used}, but agreed to cipher suite {agreed:04x}h: let \
                 it use {}, or both ends a key of the other length (`penstock key generate --bits` \
                 at the target)",
                used.suite
            ),
            Cause::TooLong { role } => {
                write!(f, "the {} sent more than ", peer(*role))?;
                write!(f, "{HANDSHAKE_BYTES_MAX} bytes of handshake: {}", what_to_expect(*role))
            }
            Cause::Protocol { what, role, used } => {
                write!(f, "the TLS handshake with the {} failed", peer(*role))?;
                if let Some(used) = used {
                    write!(f, ", with the key of {used}")?;
                }
                write!(f, ": {what}: {}", what_to_expect(*role))
            }
            Cause::Internal { what } => write!(f, "the TLS library failed: {what}"),
        }
    }
}

fn peer(role: Role) -> &'static str {
    match role {
        Role::Server => "host",
        Role::Client => "target",
    }
}

/// What the other end has to be, and what to do about it.
fn what_to_expect(role: Role) -> String {
    match role {
        Role::Server => format!(
            "expected is TLS 1.3 with a pre-shared key, as of `nvme connect --tls`; what the host \
             has to say is in `journalctl -u tlshd` there; {EXPORT}"
        ),
        Role::Client => {
            "expected is a listener of NVMe/TCP with TLS 1.3 and pre-shared keys".to_owned()
        }
    }
}

/// Why a host ends a handshake that a target has agreed to.
fn host_gave_up(code: AlertCode) -> &'static str {
    match code.0 {
        // bad_record_mac, decode_error, decrypt_error, unknown_psk_identity
        20 | 50 | 51 | 115 => "its key has changed meanwhile, or somebody on the way meddles",
        // handshake_failure, illegal_parameter, protocol_version, insufficient_security and
        // missing or unsupported extensions
        40 | 47 | 70 | 71 | 109 | 110 => {
            "it does not take our cipher suite or key exchange; `journalctl -u tlshd` there says which"
        }
        // All about certificates.
        41..=46 | 48 | 116 => {
            "it wants a certificate, where NVMe/TCP has keys: connect with `nvme connect --tls`"
        }
        // close_notify, user_canceled
        0 | 90 => "it was told to, or its time was over; `journalctl -u tlshd` there says more",
        _ => "`journalctl -u tlshd` there says why",
    }
}

fn plural(count: usize) -> String {
    if count == 1 { "1 key".to_owned() } else { format!("{count} keys") }
}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    items: impl Iterator<Item = T>,
    mut show: impl FnMut(&mut fmt::Formatter<'_>, T) -> fmt::Result,
) -> fmt::Result {
    for (n, item) in items.enumerate() {
        if n > 0 {
            f.write_str(", ")?;
        }
        show(f, item)?;
    }
    Ok(())
}
