//! NVMe and NVMe over Fabrics protocol code, sans-IO.
//!
//! Everything here is plain data and state machines: bytes, time and results go in, bytes and
//! decisions come out. No clock, socket, thread, lock or log, and no unsafe code. The drivers
//! (`nvmf-target`, `nvmf-initiator`) own sockets and memory and move payload; this crate only
//! ever sees headers and control data.
//!
//! ```text
//!            host side                                controller side
//!   host::Session   host::io                 ctrl::Controller     ctrl::io::decode
//!   (bring-up, keep alive, AER)              (properties, admin,  (I/O SQE -> checked
//!        │            │                       logs, features)      byte range)
//!        │ SQE / CQE  │                           ▲  ▲                 ▲
//!        ▼            ▼                           │  └── fabrics, xfer ┤
//!      tcp::Host  ──── PDUs over any byte stream ────► tcp::Target ────┘
//!                                   spec: the wire structures of both
//!                                   subsys: what a subsystem offers (plain data)
//! ```
//!
//! - [`spec`]: submission and completion entries, status, Identify, logs, properties, NQNs.
//! - [`tcp`]: NVMe/TCP PDUs and the queue pair machine of each side.
//! - [`xfer`]: where a command's data is (SGL descriptor of a fabrics SQE).
//! - [`fabrics`]: the Connect command and its refusals.
//! - [`subsys`]: subsystem, namespaces and limits as plain data; ANA groups, reservations; the
//!   discovery log of both sides.
//! - [`ctrl`]: the controller behind a property set and an admin queue; I/O command decoding.
//! - [`host`]: bring-up of an association, I/O encoding, discovery, reconnect delays.
//!
//! Start reading at [`ctrl::Controller`] for the target and [`host::Session`] for the initiator.
#![forbid(unsafe_code)]

pub mod ctrl;
pub mod fabrics;
pub mod host;
pub mod spec;
pub mod subsys;
pub mod tcp;
pub mod xfer;
