//! One thread per core, one ring, one loop.
//!
//! ```text
//!             ┌────────────────────────── Core::turn ──────────────────────────┐
//!  CoreHandle │ mailbox → tasks.poll(now) → one io_uring_enter → reap → timers │→ spin → arm → sleep
//!   ::post ───┤                │   ▲                            │             │
//!             └────────────────┼───┼────────────────────────────┼─────────────┘
//!                       Port / net::Stream                CQEs are recorded only,
//!                       submit       next/poll ◄───────── per port
//! ```
//!
//! - [`Core`] runs [`Task`]s. A task does a bounded slice of work in `poll` and says whether it
//!   progressed.
//! - [`Port`] is a task's share of the ring: file operations, event descriptors, connects.
//! - [`net::Stream`] is a connected byte stream: coalescing send queue, receive into buffers the
//!   core provides.
//! - [`CoreHandle`] posts messages from other threads and wakes a sleeping core; [`channel`] feeds
//!   one task.
//! - [`sim`] puts a seeded, simulated kernel behind the very same types, with virtual time.
//!
//! # Rules
//!
//! - A completion runs no user code: it is recorded, and the task that owns the port finds it at
//!   its next `poll`.
//! - Everything is bounded: operations per core ([`CoreConfig::entries`]), messages
//!   ([`CoreConfig::mailbox_depth`]), received bytes ([`CoreConfig::rx_buffers`]), queued sends
//!   ([`net::StreamConfig::tx_entries_max`]).
//! - A turn's submissions go to the kernel in one enter, but for reads and writes of files: several of
//!   a turn go in groups that double, so that the device begins with the first.
//! - Streams receive by the ring, but for one that is busy alone: a core that is awake calls the kernel for
//!   it in each turn, which is cheaper, and gives it back to the ring before it sleeps.
//! - Time is a [`Duration`](std::time::Duration) since an arbitrary monotonic origin, the same for
//!   all cores, read once a turn.
//! - Dropping a [`Port`] or a [`net::Stream`] with work in flight is safe: the core keeps the
//!   memory until the kernel has let go of it.
//!
//! # What this crate does not do
//!
//! No protocol, no listener on a core (the control plane accepts and hands sockets over; [`unix`] is
//! for the control threads of devices), no buffered file writes through the ring. The ring needs Linux 6.1; [`SetupError`] says what to do where it is
//! missing.
//!
//! Start reading at [`Core`], then [`Port`], then [`net`].

mod core;
mod error;
mod fd;
mod kernel;
mod look;
mod mailbox;
pub mod net;
mod ops;
mod port;
mod ready;
mod registered;
mod rx;
pub mod sim;
mod spin;
mod sys;
pub mod unix;
mod uring;
mod wake;

use std::sync::atomic;

pub use crate::core::{Core, CoreConfig, Local, Progress, Spawner, Task};
pub use crate::error::{Busy, Errno, Full, SetupError};
pub use crate::fd::{Fd, SharedFd, Socket};
pub use crate::mailbox::{CoreHandle, Message, Receiver, Sender, channel};
pub use crate::port::{Completion, Outcome, Port};
pub use crate::ready::Ready;
