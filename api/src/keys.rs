//! Keys of hosts.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// A text with key material: without `Display`, its `Debug` says nothing, wiped when dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretString(String);

impl SecretString {
    /// Takes a text.
    pub fn new(text: String) -> SecretString {
        SecretString(text)
    }

    /// The text. Keep it out of logs and copies.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for SecretString {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for SecretString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyKind {
    /// TLS: a pre-shared key.
    Tls,
    /// DH-HMAC-CHAP: the host proves itself with it.
    Dhchap,
    /// DH-HMAC-CHAP: the controller proves itself to the host with it.
    DhchapController,
}

/// A key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Its name here.
    pub id: String,
    /// What it is for.
    pub kind: KeyKind,
    /// Host NQN.
    pub host: String,
    /// The only subsystem it is good for, by NQN; `null`: every one.
    pub subsystem: Option<String>,
    /// Length of the secret in bits.
    pub bits: u32,
    /// When it was made or imported, in seconds since 1970.
    pub created_s: u64,
    /// When it ceases to be taken, in seconds since 1970.
    pub expires_s: Option<u64>,
    /// Whether that is over.
    pub expired: bool,
}

/// Makes or imports a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddKey {
    /// What it is for.
    pub kind: KeyKind,
    /// Host NQN.
    pub host: String,
    /// The only subsystem it is good for, by NQN. For TLS alone.
    #[serde(default)]
    pub subsystem: Option<String>,
    /// Seconds until it ceases to be taken.
    #[serde(default)]
    pub expires_in_s: Option<u64>,
    /// The key, as nvme-cli prints it; a new one is made where none is given.
    #[serde(default)]
    pub key: Option<SecretString>,
    /// Length of a new key: 256 or 384 bits, for DH-HMAC-CHAP also 512.
    #[serde(default)]
    pub bits: Option<u32>,
}

/// Makes a new key beside an old one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotateKey {
    /// Seconds for which the old one is taken beside the new one.
    pub overlap_s: u64,
}

/// Asks for what a host has to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportKeys {
    /// Host NQN.
    pub host: String,
    /// Subsystem NQN that the host connects to.
    pub subsystem: String,
    /// `ADDR:PORT` of the target as the host sees it.
    pub address: String,
    /// Version of the host's nvme-cli, such as `2.13`; not needed with `emulator`.
    #[serde(default)]
    pub nvme_cli: String,
    /// Version of the TLS identity: 0 or 1.
    pub identity: u8,
    /// TLS with a key that authentication makes, instead of a configured one.
    #[serde(default)]
    pub concat: bool,
    /// The host is a `penstock emulate`.
    #[serde(default)]
    pub emulator: bool,
}

/// What a host has to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Lines for a shell; they contain the keys.
    pub lines: SecretString,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown() {
        let secret = SecretString::new("NVMeTLSkey-1:01:secret:".to_owned());
        assert!(!format!("{secret:?}").contains("NVMe"));
        let text = serde_json::to_string(&secret).unwrap();
        assert_eq!(serde_json::from_str::<SecretString>(&text).unwrap(), secret);
        assert_eq!(
            serde_json::to_string(&KeyKind::DhchapController).unwrap(),
            "\"dhchap-controller\""
        );
    }
}
