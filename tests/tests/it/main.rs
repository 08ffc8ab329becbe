//! The one integration test binary.

mod allocation;
mod change;
mod counting;
mod faults;
mod ipv6;
mod junk;
mod scale;
mod sim;
mod transport;
mod yardstick;
