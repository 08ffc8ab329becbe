//! The one integration test binary.

mod allocation;
mod counting;
mod faults;
mod junk;
mod scale;
mod sim;
mod transport;
mod yardstick;
