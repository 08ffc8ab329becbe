//! What tests, fuzz targets and benches of this crate and of others share: a vfio-user client, a
//! host with an NVMe driver, cores, and a function that is no NVMe controller. Failures are panics.

mod client;
mod cores;
#[cfg(test)]
mod counting;
mod direct;
mod host;
mod model;
mod volume;
mod wild;

pub use client::{Answer, TestClient, memfd};
pub use cores::Cores;
#[cfg(test)]
pub(crate) use counting::allocations;
pub use direct::Direct;
pub use host::{Bus, HostQueue, TestHost, transfer};
pub use model::{Call, ModelFunction};
pub use volume::TestVolume;
pub use wild::wild;
