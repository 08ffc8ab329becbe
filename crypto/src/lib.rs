//! Keys of NVMe over Fabrics: as people pass them on, and what is derived from them.
//!
//! - [`TlsKey`]: a pre-shared key for TLS, `NVMeTLSkey-1:hh:...:`.
//! - [`DhchapKey`]: a secret for in-band authentication, `DHHC-1:hh:...:`.
//! - [`Secret`]: the bytes of either. They have no `Debug` and no `Display`, are compared in
//!   constant time and wiped when dropped.
//! - [`psk`]: retained keys, identities and pre-shared keys of TLS 1.3, in both derivations that
//!   are in the field.
//! - [`tls`]: handshake and record layer of TLS 1.3 as bytes in and out.
//! - [`dhchap`]: both ends of in-band authentication.
//! - [`nvme_cli`]: import of keys that nvme-cli made, and the lines that set a Linux host up.
//!
//! ```
//! use crypto::psk::{Derivation, IdentityVersion, RetainedKey};
//!
//! let text = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
//! let key = crypto::TlsKey::parse(text)?;
//! assert_eq!(key.to_text().expose(), text);
//!
//! let (host, subsystem) = ("nqn.2014-08.org.example:host", "nqn.2014-08.org.example:sub");
//! let retained = RetainedKey::new(&key, host, Derivation::Rfc8446)?;
//! let psk = retained.psk(IdentityVersion::V0, host, subsystem)?;
//! assert_eq!(psk.identity(), format!("NVMe0R01 {host} {subsystem}"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What this crate does not do
//!
//! It does no I/O, reads no clock and makes no keys on its own: who makes one passes the random
//! bytes in. (The library of the TLS handshake draws its own.) Parsing a key takes time that
//! depends on its characters, as it happens once per configured key and not at a peer's request.
//!
//! Start reading at [`TlsKey`], then [`psk`], [`tls`] and [`dhchap`].

mod base64;
pub mod dhchap;
mod kdf;
mod key;
pub mod nvme_cli;
pub mod psk;
mod secret;
#[cfg(test)]
mod testing;
pub mod tls;

pub use kdf::Hash;
pub use key::{DhchapKey, KeyError, KeyHash, TlsKey};
pub use secret::{Secret, SecretText};
