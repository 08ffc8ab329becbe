//! Volumes and channels on a running core: real where a kernel is needed, else simulated.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]
#![expect(clippy::vec_box, reason = "the boxes are what is recycled")]

mod allocations;
mod device;
mod durable;
mod fault;
mod file;
mod harness;
mod model;
mod refusals;
mod simulated;
