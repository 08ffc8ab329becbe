//! Wire structures.
pub mod pdu;
