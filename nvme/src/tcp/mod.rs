//! NVMe/TCP qpair machines: [`Target`] is the controller's side of one connection, [`Host`] the
//! host's side. Both read PDUs from a byte stream that may be cut anywhere, check every field of
//! them against what was negotiated and asked for, and build the headers of the PDUs to send.
//! Neither owns a socket, a buffer for payload or a clock.
//!
//! ```text
//!            bytes from the socket                     events
//!   ┌────────────────────────────────┐  next()  ┌───────────────────────────┐
//!   │ CH PSH │ PAD │ data … │ CH PSH │ ───────► │ Command, Data{&input[..]} │──► the driver
//!   └────────────────────────────────┘          └───────────────────────────┘        │
//!   ┌────────────────────────────────┐  PduHead + the driver's buffer + digest       │
//!   │ CH PSH │ PAD │ data …          │ ◄─────────────────────────────────────────────┘
//! ```
//!
//! # Receiving
//!
//! The driver hands each chunk that the socket brings to `next` until that returns `Ok(None)`,
//! which means that the chunk is used up (some events need no more bytes, so an empty input is not
//! a reason to stop). Payload is handed out as slices of the input: it is copied once, by the
//! driver, to where it belongs. Or `incoming` says where that is before, and the driver has the bytes
//! brought there (by a cipher, say) and reports them as `placed`. A header that is cut by the end of the input is kept inside; that
//! and one entry per slot is all the memory a machine has, all of it allocated at construction.
//!
//! A [`Fault`] is final: the driver sends the machine's `term_req` and closes. A data digest that
//! does not match concerns one command only and is an event.
//!
//! # Sending
//!
//! Each builder returns a [`PduHead`]. Where a PDU has data, the driver sends that behind the head
//! from where it is, and then the [`Crc32c`] of it if `data_digest()`.
//!
//! # What it does not do
//!
//! Look into commands, except for the cid and the opcode of Fabrics commands (whose in-capsule
//! data has its own limit); time out; send. TLS is below it, the controller above.
//!
//! Start reading at [`Target::next`]. Document: NVM Express TCP Transport Specification, Revision
//! 1.0, cited as NVMe/TCP 1.0.

mod digest;
mod fault;
mod framer;
mod head;
mod host;
mod target;

#[cfg(test)]
mod tests;

pub use digest::Crc32c;
pub use fault::Fault;
pub use head::PduHead;
pub use host::{Host, HostConfig, HostEvent, Transfer};
pub use target::{Target, TargetConfig, TargetEvent};

pub use crate::spec::pdu::FatalErrorStatus;

/// Alignment in bytes of an HPDA or CPDA: zero-based dwords (NVMe/TCP 1.0, Figures 20 and 21).
#[inline]
const fn align_bytes(pda_z: u8) -> u32 {
    (pda_z as u32 + 1) * 4
}
