//! vhost-user: how a frontend (QEMU, Cloud Hypervisor, libblkio) sets the device up.
//!
//! `wire` cuts the byte stream into messages, `session` decides what follows from them, `socket`
//! moves bytes and file descriptors, `server` is the thread that ties them to the cores.

pub(crate) mod server;
pub mod session;
pub(crate) mod socket;
pub mod wire;

pub use reactor::unix::ListenError;
