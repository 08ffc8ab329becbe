//! Both ends with each other: handshakes, refusals, records, and what a third party may do to them.

mod adversary;
mod handshake;
mod place;
mod record;
mod support;
