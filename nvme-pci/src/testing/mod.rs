//! What tests, fuzz targets and benches of this crate and of others share: a vfio-user client, and
//! a function that is no NVMe controller. Failures are panics.

mod client;
mod model;

pub use client::{Answer, TestClient, memfd};
pub use model::{Call, ModelFunction};
