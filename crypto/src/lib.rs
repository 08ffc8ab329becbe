//! Keys of NVMe over Fabrics, as people pass them on.
//!
//! - [`TlsKey`]: a pre-shared key for TLS, `NVMeTLSkey-1:hh:...:`.
//! - [`DhchapKey`]: a secret for in-band authentication, `DHHC-1:hh:...:`.
//! - [`Secret`]: the bytes of either. They have no `Debug` and no `Display`, are compared in
//!   constant
//!   time and wiped when dropped.
//!
//! ```
//! let text = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
//! let key = crypto::TlsKey::parse(text)?;
//! assert_eq!(key.secret().expose().len(), 32);
//! assert_eq!(key.to_text().expose(), text);
//! # Ok::<(), crypto::KeyError>(())
//! ```
//!
//! # What this crate does not do
//!
//! It derives no keys and speaks no protocol: no TLS, no DH-HMAC-CHAP. It does no I/O and draws no
//! random numbers; who makes a key passes the bytes in. Parsing a key takes time that depends on
//! its characters, as it happens once per configured key and not at a peer's request.
//!
//! Start reading at [`TlsKey`].

#![forbid(unsafe_code)]

mod base64;
mod key;
mod secret;

pub use key::{DhchapKey, KeyError, KeyHash, TlsKey};
pub use secret::{Secret, SecretText};
