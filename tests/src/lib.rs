//! Integration tests and benchmarks of Penstock: their harness.
//!
//! The tests themselves are one binary, `tests/it/main.rs`. What stands here is shared by them and
//! by the benchmark programs in `src/bin`.
#![forbid(unsafe_code)]

pub mod bare;
pub mod bench;
pub mod faults;
pub mod guest;
pub mod link;
pub mod load;
pub mod process;
pub mod rig;
pub mod secure;
pub mod turns;
pub mod wire;
