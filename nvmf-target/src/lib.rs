//! The NVMe/TCP target: drives the sans-IO code of `nvme` over the sockets and volumes of a core.
//!
//! ```text
//!  control plane                     each core: one task
//!  ┌────────┐ add_connection  ┌──────────────────────────────────────────────┐
//!  │ Target ├────────────────►│ Conn: Stream ◄─► tcp::Target ◄─► ctrl / io ──┼─► Channel (one per
//!  └───┬────┘                 │  …                                           │    volume and core)
//!      │ Registry: associations, shared by all cores, locked at connect only  │
//!      └──────────────────────┴──────────────────────────────────────────────┘
//! ```
//!
//! A turn of the task is one pass: receive from every connection, submit what is complete, poll the
//! channels, queue the responses, flush every connection once. Responses are so coalesced without a
//! timer. All queues of an association may lie on different cores; they meet in the registry.
//!
//! What is served may change at any time (`change.rs`): it is an immutable table (`table.rs`) that
//! cores take up at the begin of a turn, and a change is finished when a fence (`fence.rs`) says
//! that no I/O of before can land any more. Nothing is locked for it on the data path.
//!
//! What it does not do: listen (the daemon hands accepted sockets over), read a clock of its own, or
//! allocate per I/O: `Io` objects and slots are recycled.
//!
//! Start reading at [`Target`], then `core.rs` (the task), `conn.rs` (one qpair) and
//! `io.rs` (its I/O commands).
#![forbid(unsafe_code)]

mod abort;
mod admin;
mod auth;
mod busy;
mod change;
mod config;
mod conn;
mod core;
mod counters;
mod fence;
mod home;
mod io;
mod jobs;
mod keys;
mod letters;
mod limits;
mod locks;
mod pieces;
mod refusals;
mod registry;
mod reserve;
mod sample;
mod secure;
mod state;
mod status;
mod table;
mod target;
mod temperature;
mod turn;
mod vitals;
mod volume;
mod wait;

pub use change::{Change, Request};
pub use config::{
    AuthDemand, ChangeError, Limits, ListenerKind, NamespaceConfig, Port, PowerHistory,
    ReservationStore, SetupError, SubsystemConfig, TargetConfig, Tls,
};
pub use counters::Totals;
pub use keys::{
    AuthPolicy, Clock, DHCHAP_KEYS_MAX, HostDhchapKey, HostKeys, HostTlsKey, KeyStore, TLS_KEYS_MAX,
};
pub use nvme::subsys::ana::AnaState;
pub use sample::{Breakdown, Stage, Taken};
pub use state::{
    ControllerStatus, HostStatus, LimitsHit, NamespaceStatus, RefusalStatus, SubsystemStatus,
    TargetStatus,
};
pub use target::Target;
