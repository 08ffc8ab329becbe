//! The composition root: configuration in, running cores out.
//!
//! ```text
//!  flags, penstock.toml ─► config ─► run::Daemon ─┬─► listen (tokio) ──► Target ──► target cores
//!  data directory ───────► state  ─► identity ────┘─► devices ─────────► RemoteVolume, virtio-blk
//!                                                                        on emulator cores
//!  tune = a survey of /proc and /sys
//!  up = provisioning + Daemon + selfcheck         bench = Plan + Job over any block::Volume
//! ```
//!
//! Everything here is control plane: it may block, allocate and use tokio. Nothing here is on the
//! way of an I/O, except the load generator, which is a task on a core like any other user.
//!
//! What it does not do: parse the command line and print for people (that is `tools/penstock`),
//! speak NVMe or virtio (apart from the few messages of the self-check's own front end).
//!
//! Start reading at [`Config`], then [`Daemon`], then [`up`].

#![forbid(unsafe_code)]

pub mod bench;
mod caretaker;
pub mod config;
mod contain;
pub mod cores;
pub mod credentials;
mod devices;
pub mod discover;
mod flush;
mod http;
pub mod identity;
mod keys;
mod listen;
mod manage;
pub mod mdns;
pub mod pem;
pub mod private;
mod reservations;
mod run;
pub mod selfcheck;
mod serve;
mod shell;
pub mod size;
pub mod state;
pub mod supervise;
pub mod tune;
pub mod up;
mod user;

pub use config::{Config, ConfigError, Containment, Draft, Supervise};
pub use contain::probe::Attempt;
pub use keys::OfflineKeys;
pub use run::{Daemon, Served};
