//! NVMe/TCP initiator: a namespace elsewhere as one more [`block::Volume`].
//!
//! ```text
//!  control plane          admin core                         I/O cores, a channel each
//!  RemoteVolume::start ─► AdminTask ── snapshot, one word ─► RemoteChannel: Table, Link
//!     state, wait_ready      │   ▲ ◄── "queue n broke" ──────────┘            │
//!                          Link  └─ nvme::host::Session                     Link
//!                            └───────────────── TCP ────── controller ────────┘
//!                            Link: nvme::tcp::Host over reactor::net::Stream
//! ```
//!
//! [`RemoteVolume`] starts a task for the admin queue and opens channels. A channel owns one I/O
//! queue and never talks to another core while it works: per poll it reads one atomic word, and per
//! I/O it allocates nothing, takes no lock and makes no system call of its own. Everything queued
//! in one poll leaves in one send. Payload of writes is sent from where the submitter has it;
//! payload of reads is copied once, from the receive buffer to where the submitter wants it.
//!
//! # When the path is lost
//!
//! Any error on any queue (the peer broke the protocol, closed, went silent, a command was not
//! answered in time, Keep Alive was not answered) ends the whole association, in one place. Then:
//!
//! - An I/O that has not been answered is **held**, in the order of acceptance, and sent again on
//!   the next association. It is reported done when the controller said so, once, and never
//!   otherwise.
//! - No old write can land behind a newer one. On this side, a channel uses a new connection only
//!   when its old one is *quiet*: the kernel refers to none of its memory, and the socket is reset
//!   instead of being left to send what it holds. On the far side, the session ends the old
//!   controller by Cross-Controller Reset before the new association is used; with a target that
//!   cannot do that it waits until the old controller's keep alive has run out (twice
//!   [`RemoteConfig::kato`] and 5 s), during which I/O is held.
//! - After [`RemoteConfig::ctrl_loss_timeout`] held and new I/O fails with [`block::IoError::Gone`]
//!   until there is an association again. By default it is held for ever: a guest waits, and goes
//!   on when the target is back.
//! - A namespace with other identifiers or another block size than at first is not used, whatever
//!   its NQN.
//!
//! # What flush means across a lost path
//!
//! A flush vouches for writes acknowledged before it. If the path is lost between such a write and
//! its flush, the flush is held like any I/O and done by the next association, and it is true if
//! the data survived the loss. Losing an association resets the controller; it does not cut its
//! power, and the NVMe base specification lets a volatile write cache lose its contents with the
//! power only. Our target keeps to that even when its process is killed: it writes with direct I/O,
//! so that acknowledged data is in the device (whose cache flush still reaches) and not in the
//! process. A storage node that really loses power between a write and its flush does lose data, as
//! a local disk would; but a local disk takes the host down with it, and a host that goes on would
//! never know. Such a node must report no write before it is stable: serve it without a volatile
//! write cache (then every write is stable when acknowledged). Keeping acknowledged writes here
//! until a flush would close the gap as well, at the price of a copy of each; failing the next
//! flush after every lost path would report damage that, with a target like ours, never happened.
//! Neither is done.
//!
//! # Statuses
//!
//! `status.rs` is the one place that turns an NVMe status into an [`block::IoError`] or into
//! another attempt; those are bounded by [`RemoteConfig::retries_max`], with growing delays.
//!
//! # What this crate does not do
//!
//! Multipath, TLS and authentication (the stream has the seam for a record layer); reservations,
//! compare, copy; Abort commands (an overdue command ends the association instead). A channel that
//! is closed closes its queue's connection without Disconnect.
//!
//! Start reading at [`RemoteVolume::start`], then `channel.rs`.
#![forbid(unsafe_code)]

mod admin;
mod channel;
mod config;
mod discover;
mod link;
mod shared;
mod status;
mod table;
mod volume;

pub use config::{ConfigError, RemoteConfig};
pub use discover::{DiscoverConfig, DiscoverError, discover};
pub use nvme::host::discovery::Discovered;
pub use shared::{Counters, Phase, RemoteState};
pub use volume::{NotReady, RemoteVolume};
