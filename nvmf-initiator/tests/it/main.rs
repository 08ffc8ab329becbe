//! The initiator against a scripted target in a simulated world.
//!
//! `io` is what works, `loss` is lost paths and what is held, `hostile` a target that breaks the
//! protocol, `tamper` one that meddles with TLS, `secure` the end of TLS and authentication, `model`
//! random histories against a model of the disk, `pairs` Compare and Write, `watch` paths by discovery, `subsystem` what there
//! is, `allocations` counts.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![allow(unreachable_pub, reason = "nobody imports a test binary")]
#![allow(clippy::vec_box, reason = "I/Os stay in the boxes they travel in")]

mod allocations;
mod fake;
mod hostile;
mod io;
mod loss;
mod model;
mod pairs;
mod paths;
mod rig;
mod secure;
mod subsystem;
mod tamper;
mod watch;
