//! vfio-user: how a client (QEMU) drives the function.
//!
//! `wire` cuts the byte stream into messages, `session` decides what follows from them and calls
//! the function, `dma` is the client's memory, `migration` the states of save and restore,
//! `socket` moves bytes and file descriptors, `server` is the thread that ties them together.
//!
//! The protocol is that of "vfio-user Protocol Specification" as published with QEMU 11
//! (docs/interop/vfio-user.rst), called *vfio-user* in comments here, and `linux/vfio.h`.

pub mod capabilities;
pub mod dma;
pub mod journal;
pub mod migration;
pub mod server;
pub mod session;
pub(crate) mod socket;
pub mod wire;
