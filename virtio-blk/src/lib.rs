//! virtio-blk

#![forbid(unsafe_code)]

pub mod device;
pub mod engine;
pub mod queue;
pub mod request;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vhost_user;
