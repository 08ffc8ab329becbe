//! The one integration test binary.

mod allocation;
mod counting;
mod faults;
mod junk;
mod sim;
mod yardstick;
