//! NVMe/TCP initiator: a namespace elsewhere as one more [`block::Volume`].
//!
//! ```text
//!  control plane          admin core                         I/O cores, a channel each
//!  RemoteVolume::start ─► AdminTask ── snapshot, one word ─► RemoteChannel: Table
//!     state, wait_ready      │   ▲ ◄── "queue n broke" ─────┐    │
//!                    a Path for each path                   └─ a Queue for each path
//!                    Link, nvme::host::Session                 Link
//!                            └───────────────── TCP ────── controllers ───┘
//!                            Link: nvme::tcp::Host over reactor::net::Stream
//! ```
//!
//! [`RemoteVolume`] starts a task for the admin queues and opens channels. A channel owns one I/O
//! queue on each path and never talks to another core while it works: per poll it reads one atomic
//! word, and per I/O it allocates nothing, takes no lock and makes no system call of its own.
//! Everything queued in one poll leaves in one send per path. Payload of writes is sent from where
//! the submitter has it; payload of reads is copied once, from the receive buffer to where the
//! submitter wants it.
//!
//! # Configuration
//!
//! [`RemoteConfig::new`] takes one address; more go into [`RemoteConfig::paths`], and
//! [`RemoteConfig::policy`] says which of them an I/O takes. Hold or fail: without
//! [`RemoteConfig::ctrl_loss_timeout`] I/O waits for ever for a path, with it I/O fails after so
//! long, until there is a path again. [`RemoteVolume::state`] and [`RemoteVolume::path_counters`]
//! tell of each path: association, ANA state, losses, attempts, last error; commands out, commands
//! done, latency. A geometry that changes shows in [`block::Volume::generation`].
//!
//! # TLS and authentication
//!
//! [`RemoteConfig::security`] says what the host proves itself with and what it asks of the target; it is
//! never given less. With [`Tls::Keys`] every queue begins with a TLS handshake (`shake.rs`), which offers
//! one key form after the other until the target takes one. A queue authenticates after Connect (`auth.rs`)
//! when the controller asks for it, or when it is itself to be proven, and again when
//! [`RemoteVolume::reauthenticate`] says so or a command is refused for want of it. With
//! [`Tls::Concatenate`] the first connection of an association only makes the key for those that
//! follow. A path that is set up again does all of it again, and what is held waits meanwhile.
//!
//! # Paths by discovery
//!
//! A volume whose paths change ([`RemoteConfig::paths_change`]) takes them from
//! [`RemoteVolume::set_paths`], or from a [`Watch`]: a task that stays connected to discovery
//! controllers and those that they refer to, and is told when their logs change. A path that a log
//! names no more is left as soon as another one works: no new I/O goes there, what is out is waited
//! for, and what is out nevertheless is treated as on a lost path. It stays as long as it is the
//! only one that works; and all of them stay when no discovery controller answers.
//!
//! # Which namespaces there are
//!
//! A [`RemoteSubsystem`] has an admin queue on each path and no I/O queue. It knows the namespaces that the
//! subsystem has attached to controllers of this host, follows the event that says that these have
//! changed, and is for who opens and closes volumes accordingly. What it knew last counts while no path works.
//!
//! # When a path is lost
//!
//! Any error on any queue of a path (the peer broke the protocol, closed, went silent, a command
//! was not answered in time, Keep Alive was not answered, the ANA state changed for longer than
//! ANATT) ends the whole association, in one place. Then:
//!
//! - An I/O that has not been answered goes to another path or is **held**, in the order of
//!   acceptance, until there is one. It is reported done when a controller said so, once, and never
//!   otherwise.
//! - No old write can land behind a newer one. On this side, a channel gives up a connection only
//!   when it is *quiet*: the kernel refers to none of its memory, and the socket is reset instead of
//!   being left to send what it holds. On the far side, a change that was sent on the lost path is
//!   neither sent again nor given back before the lost controller has ended (`table.rs`,
//!   "quarantined"): a session on another path ends it by Cross-Controller Reset; with a target that
//!   cannot do that, its keep alive must have run out (twice [`RemoteConfig::kato`] and 5 s). Reads,
//!   flushes and what had not been sent go on at once. With a single path nothing is sent before
//!   that anyway.
//! - After [`RemoteConfig::ctrl_loss_timeout`] without a path held and new I/O fails with
//!   [`block::IoError::Gone`]; then no path is used before all lost controllers have ended. By
//!   default it is held for ever: a guest waits, and goes on when the target is back.
//! - A path to a namespace with other identifiers or another block size than at first is not used,
//!   whatever its NQN.
//! - A reservation command whose path was lost under it comes back as aborted: done again it could
//!   be refused for having been done.
//! - A Compare and Write is two fused commands, next to each other on one queue. One whose path was
//!   lost under it, or whose Write was answered with an error, is not sent again: compared once more
//!   it would differ if it was done, and its submitter be told the opposite of what happened. It comes
//!   back as aborted, and not before the lost controller has ended. One whose Compare was refused was
//!   not done, and is sent again like any I/O. A path whose controller has no fused commands is not
//!   taken.
//!
//! # Which path
//!
//! Those whose ANA state is optimized, or non-optimized if there are no others; I/O waits while
//! there are neither. A controller that refuses an I/O for a reason that another may not have is
//! left out for that I/O, and asked for its ANA state anew.
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
//! Names of hosts (paths and discovery controllers are addresses); TLS and authentication towards
//! discovery controllers that a [`Watch`] asks; Abort commands (an overdue command ends the
//! association instead). A channel that is closed closes its queue's connection without Disconnect.
//!
//! Start reading at [`RemoteVolume::start`], then `channel.rs`.
#![forbid(unsafe_code)]

mod admin;
mod auth;
mod channel;
mod config;
mod discover;
mod link;
mod node;
mod queue;
mod security;
mod shake;
mod shared;
mod slots;
mod status;
mod subsystem;
mod table;
mod volume;
mod watch;

pub use config::{ConfigError, PathConfig, PathPolicy, RemoteConfig};
pub use discover::{DiscoverConfig, DiscoverError, discover};
pub use nvme::host::Wear;
pub use nvme::host::discovery::Discovered;
pub use nvme::subsys::ana::AnaState;
pub use security::{Dhchap, Security, Tls, TlsKeys};
pub use shared::{Counters, PathCounters, PathState, Phase, RemoteState};
pub use subsystem::RemoteSubsystem;
pub use volume::{NotReady, RemoteVolume};
pub use watch::{DiscoveryState, Watch, WatchConfig};
