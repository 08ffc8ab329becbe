//! TLS 1.3 with pre-shared keys, as bytes in and bytes out.
//!
//! ```text
//!   bytes of the peer ──► Server / Client ──► bytes for the peer      the handshake (s2n-tls)
//!                              │ Established: suite, secrets, sequence numbers, identity, rest
//!                              ▼
//!   received bytes ─────► Session::open ────► plaintext               the record layer (aws-lc-rs)
//!   records to send ◄──── Session::seal ◄──── plaintext
//! ```
//!
//! The handshake is done by a library and thrown away; what it agreed on is taken out and carried
//! on by [`Session`], which seals straight into the buffer that is sent, and opens in place or straight
//! to where the bytes belong. Only
//! `psk_dhe_ke` with TLS_AES_128_GCM_SHA256 and TLS_AES_256_GCM_SHA384 is spoken, with the hybrid
//! group X25519MLKEM768, or ML-KEM-1024 with the larger suite, where the peer has it.
//!
//! A handshake costs about 100 us plus key derivations: drive it outside the data path, or accept
//! that pause. It holds about 50 KiB until it ends and reads at most [`HANDSHAKE_BYTES_MAX`]; time
//! is the caller's to bound.

mod aead;
mod alert;
mod client_hello;
mod ffi;
mod handshake;
mod record;
mod refusal;

pub use alert::AlertCode;
pub use handshake::{
    CANDIDATES_MAX, Client, Established, Failure, HANDSHAKE_BYTES_MAX, Progress, PskLookup, Server,
    TrafficSecret, Unknown, candidates, looks_like_tls, prepare,
};
pub use record::{
    Counters, KEY_RECORDS_MAX, KeyUpdates, Plain, RECORD_PLAIN_MAX, RecordError, Role, Session,
};
pub use refusal::{Cause, Used};

#[cfg(test)]
mod tests;
