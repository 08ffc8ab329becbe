//! The one integration test binary.

mod allocation;
mod counting;
mod junk;
mod sim;
mod yardstick;
