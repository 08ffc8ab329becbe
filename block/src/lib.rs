//! The storage boundary: what a device asks of a disk, and the disks there are.
//!
//! ```text
//!   device (NVMe, virtio-blk)             control plane
//!        │ Box<Io>   ▲ Box<Io>                 │ VolumeSpec::open
//!        ▼ submit    │ poll                    ▼
//!   ┌──────────── Channel ───────────┐      Volume ── open(core, depth) ──► Channel
//!   │ one core's way to one volume   │      shared by all cores
//!   └────────────────────────────────┘
//!   layers: fault            backends: uring (file, block device), ram, null
//! ```
//!
//! An [`Io`] is allocated when a queue is created and from then on only moved: device → channel →
//! device. A channel gives back every `Io` it accepted, exactly once, with a result.
//!
//! # Rules
//!
//! - A channel checks each `Io` itself ([`check`]): the caller's own check can be stale after a
//!   resize. A refused `Io` is accepted and comes back with the error.
//! - After warm-up nothing on the way of an `Io` allocates.
//! - Operations are done or refused, never pretended.
//! - `Io`s in flight at the same time are not ordered, also where they overlap.
//!
//! # What this crate does not do
//!
//! It knows no protocol and no status code: those who know the wire map [`IoError`] to it. It does
//! not log; what an operator should know about an opened volume is in [`Volume::notices`].
//!
//! Start reading at [`Channel`], then [`ram`], the simplest backend that stores something.

#![forbid(unsafe_code)]

mod io;
mod latency;
mod volume;

pub mod fault;
pub mod null;
pub mod ram;
mod spec;
pub mod uring;

pub use crate::io::{
    AcquireAction, Extent, Io, IoError, Op, RegisterAction, ReservationType, Reserve, check,
};
pub use crate::latency::Latency;
pub use crate::spec::{OpenError, SpecError, VolumeSpec};
pub use crate::volume::{Busy, Channel, CopyLimits, Geometry, Identity, Volume, Wear};
