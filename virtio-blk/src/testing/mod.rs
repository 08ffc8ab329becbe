//! The other side, for tests and fuzz targets: guest memory in a memfd, a driver's half of a virtqueue
//! of either kind, and a vhost-user frontend. Panics when something does not go as it should.

#[cfg(test)]
pub(crate) mod counting;
mod disk;
mod driver;
mod frontend;
mod judge;
mod packed;
mod ring;

pub use disk::{Completed, DATA_MAX, DiskOptions, DiskQueue, TestDisk};
pub use driver::{Buffer, TestMemory, TestQueue};
pub use frontend::TestFrontend;
pub use judge::Judge;
pub use packed::TestPackedQueue;
pub use ring::TestRing;
