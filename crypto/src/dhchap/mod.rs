//! In-band authentication: DH-HMAC-CHAP (NVMe Base Specification, "NVMe In-band Authentication").
//!
//! ```text
//!   Host                                    Controller
//!    start ──────── Negotiate ─────────────► on_message   picks hash and group, [computes g^x]
//!    on_message ◄── Challenge ────────────── next_message
//!    [computes g^y, g^xy]
//!    next_message ─ Reply ─────────────────► on_message   [computes g^xy], host is proven
//!    on_message ◄── Success1 ─────────────── next_message
//!    next_message ─ Success2 ──────────────► on_message   only if the controller proved itself too
//! ```
//!
//! A host's messages go in Authentication Send commands, a controller's in Authentication Receive
//! ones. [`Host`] and [`Controller`] are given messages, and asked for the next. A step in brackets
//! takes milliseconds: it is given out as a [`DhTask`], which runs on any thread, and its result is
//! given back. One machine is one transaction; to authenticate again, make a new one.
//!
//! With *secure channel concatenation* both ends take a key for TLS out of it, see
//! [`Outcome::generated`].

mod ffdhe;
mod machine;
mod message;

pub use ffdhe::{DhDone, DhGroup, DhTask};
pub use machine::{
    Concatenation, Controller, ControllerConfig, ENTROPY_LEN, Expired, Failure, Host, HostConfig,
    Outcome, Status,
};
pub use message::{MESSAGE_BYTES_MAX, Reason};

#[cfg(test)]
mod tests;
