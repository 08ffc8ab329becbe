//! The one integration test binary.

mod allocation;
mod change;
mod counting;
mod fairness;
mod faults;
mod fused;
mod ipv6;
mod junk;
mod pass_through;
mod scale;
mod scale_tls;
mod secure;
mod sim;
mod sim_paths;
mod transport;
mod yardstick;
