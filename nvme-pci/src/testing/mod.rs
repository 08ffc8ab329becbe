//! What tests, fuzz targets and benches of this crate and of others share: a vfio-user client, a
//! host with an NVMe driver, cores, and a function that is no NVMe controller. Failures are panics.

mod client;
mod cores;
#[cfg(test)]
mod counting;
mod host;
mod model;

pub use client::{Answer, TestClient, memfd};
pub use cores::Cores;
#[cfg(test)]
pub(crate) use counting::allocations;
pub use host::{Bus, HostQueue, TestHost, transfer};
pub use model::{Call, ModelFunction};
