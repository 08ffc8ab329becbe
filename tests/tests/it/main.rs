//! The one integration test binary.

mod allocation;
mod change;
mod counting;
mod faults;
mod ipv6;
mod junk;
mod scale;
mod sim;
mod sim_paths;
mod transport;
mod yardstick;
