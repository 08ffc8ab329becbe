//! The host's side of an association, pure: what to send next, and what an answer means.
//!
//! ```text
//!   Session            admin queue of an I/O controller: bring-up, keep alive, events, shutdown
//!   discovery::Client  admin queue of a discovery controller: the log page
//!   io_connect         Connect of an I/O queue          io::*     SQEs of I/O commands
//!   Backoff            when to try again
//! ```
//!
//! Both machines are driven alike: send what `next_command` gives until it gives nothing, hand
//! every completion to `on_completion`, call again at `deadline`. Everything a controller answers
//! is checked; one that contradicts itself ends in a [`SessionError`], never in a panic.

mod backoff;
mod bring_up;
pub mod discovery;
pub mod io;
mod session;
#[cfg(test)]
mod tests;

use core::time::Duration;

pub use self::backoff::Backoff;
pub use self::bring_up::{AnaInfo, ControllerInfo};
pub use self::session::{
    CopyLimits, OldController, ReadyInfo, RemoteNamespace, Session, SessionConfig, SessionState,
    Wear,
};
use crate::fabrics::ConnectRequest;
use crate::spec::fabrics::CONNECT_DATA_LEN;
use crate::spec::{FabricsType, Nqn, SglDescriptor, Sqe, Status};

/// Who connects to what: the same in every Connect of an association.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectNames {
    /// Host NQN.
    pub hostnqn: Nqn,
    /// Host Identifier, not zero.
    pub hostid: [u8; 16],
    /// Subsystem NQN.
    pub subnqn: Nqn,
}

/// Whether the host authenticates on its admin queue, right after Connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Authenticate {
    /// It cannot: a controller that asks for it is not used.
    #[default]
    Never,
    /// If the controller asks for it.
    WhenAsked,
    /// Whether the controller asks for it or not, since it has to prove itself as well, or a key for
    /// TLS is to come of it.
    Always,
}

/// What a controller asks for in its answer to Connect (NVMe Base 2.1, "Connect Response", AUTHREQ).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Authentication {
    /// ATR: an authentication has to come before any other command.
    pub is_required: bool,
    /// ASCR: it has to make a key for TLS ("secure channel concatenation").
    pub is_concatenation_required: bool,
}

impl Authentication {
    /// From dword 0 of the answer.
    #[must_use]
    pub fn asked(dw0: u32) -> Authentication {
        Authentication {
            is_required: dw0 & 1 << 17 != 0,
            is_concatenation_required: dw0 & 1 << 18 != 0,
        }
    }
}

/// Authentication Send with a message of `len` bytes, which goes in the capsule (NVMe Base 2.1,
/// "Authentication Send Command").
#[must_use]
pub fn authentication_send(len: u32) -> [u8; 64] {
    let mut sqe = authentication(FabricsType::AUTHENTICATION_SEND, len);
    sqe.dptr = SglDescriptor::in_capsule(0, len);
    sqe.to_bytes()
}

/// Authentication Receive into a buffer of `len` bytes, all of which are transferred.
#[must_use]
pub fn authentication_receive(len: u32) -> [u8; 64] {
    let mut sqe = authentication(FabricsType::AUTHENTICATION_RECEIVE, len);
    sqe.dptr = SglDescriptor::transport(len);
    sqe.to_bytes()
}

/// SECP E9h, SPSP 0101h: the protocols of NVMe (NVMe Base 2.1, "Authentication Send Command").
fn authentication(fctype: FabricsType, len: u32) -> Sqe {
    let mut sqe = Sqe::fabrics(fctype);
    sqe.cdw10.set(0xe901_0100);
    sqe.cdw11.set(len);
    sqe
}

/// A command for the admin queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AdminCommand {
    /// Names the command in `on_completion`; also its cid in `sqe`. Below [`TAGS`].
    pub tag: u16,
    /// The SQE.
    pub sqe: [u8; 64],
    /// Host-to-controller data, to be sent in the capsule (it fits: at most 1024 bytes).
    pub write: Option<Vec<u8>>,
    /// Controller-to-host data to expect, bytes.
    pub read_len: u32,
}

/// Admin commands a [`Session`] or [`discovery::Client`] has outstanding at most; tags are below
/// it: one step at a time, one Keep Alive, one Asynchronous Event Request.
pub const TAGS: u16 = 3;

/// Entries an admin queue needs, one-based. What hosts in the field ask for, and every
/// controller must support (ASQSZ is at least 32).
pub const ADMIN_QUEUE_ENTRIES: u16 = 32;

/// Why an association failed or could not be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SessionError {
    /// The controller refused Connect.
    #[error("{}", describe_refusal(*.status, *.dw0))]
    Refused {
        /// Status.
        status: Status,
        /// Dword 0: which parameter is invalid.
        dw0: u32,
    },
    /// A command the association cannot do without failed.
    #[error("{what} failed: {status}")]
    Command {
        /// The command.
        what: &'static str,
        /// Its status.
        status: Status,
    },
    /// The controller answered something that cannot be.
    #[error("the controller reports {what} of {value}, which is not possible or not supported")]
    Invalid {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The controller transferred fewer or more bytes than asked for.
    #[error("{what} transferred {len} bytes, not {expected}")]
    Length {
        /// The command.
        what: &'static str,
        /// Received.
        len: usize,
        /// Asked for.
        expected: u32,
    },
    /// No answer in time.
    #[error("no answer to {what} within {} ms", .after.as_millis())]
    Timeout {
        /// The command.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// CSTS.CFS: the controller has failed.
    #[error("the controller reports a fatal error (CSTS.CFS)")]
    Fatal,
    /// The subsystem has no such namespace, or it is not active.
    #[error("the subsystem has no active namespace {0}")]
    NoNamespace(u32),
    /// A completion for a command that is not outstanding.
    #[error("completion for tag {0}, which is not outstanding")]
    UnknownTag(u16),
    /// The discovery log kept changing while it was read.
    #[error("the discovery log changed {0} times while it was read")]
    Unstable(u32),
    /// The discovery log's header is unusable.
    #[error(transparent)]
    Header(#[from] crate::subsys::discovery::InvalidHeader),
}

impl SessionError {
    /// Whether trying again cannot help: the controller said Do Not Retry, or contradicts itself.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            SessionError::Refused { status, .. } | SessionError::Command { status, .. } => {
                status.is_dnr()
            }
            SessionError::Invalid { .. }
            | SessionError::Length { .. }
            | SessionError::UnknownTag(_)
            | SessionError::Header(_) => true,
            SessionError::Timeout { .. }
            | SessionError::Fatal
            | SessionError::NoNamespace(_)
            | SessionError::Unstable(_) => false,
        }
    }
}

/// What a refused Connect means, in words an operator can use.
fn describe_refusal(status: Status, dw0: u32) -> String {
    let reason = if status.is(Status::CONNECT_INVALID_PARAMETERS) {
        let in_data = dw0 >> 16 & 1 != 0;
        match (in_data, dw0 & 0xffff) {
            (true, 0) => "host identifier not accepted",
            (true, 16) => "controller ID not known",
            (true, 256) => "no such subsystem",
            (true, 512) => "host NQN not accepted",
            (false, 42) => "queue ID out of range",
            (false, 44) => "queue size not supported",
            (false, 48) => "keep alive timeout not supported",
            _ => "invalid parameter",
        }
    } else if status.is(Status::CONNECT_INVALID_HOST) {
        "this host may not use the subsystem"
    } else if status.is(Status::CONNECT_CONTROLLER_BUSY) {
        "no controller is free"
    } else if status.is(Status::AUTHENTICATION_REQUIRED) {
        "authentication is required"
    } else {
        "the controller refused"
    };
    format!("Connect: {reason}: {status}, dword 0 {dw0:#x}")
}

/// SQE (cid 0; the driver sets its own) and data of the Connect of an I/O queue. The data goes in
/// the capsule. `queue_entries` is one-based.
#[must_use]
pub fn io_connect(
    names: &ConnectNames,
    cntlid: u16,
    qid: u16,
    queue_entries: u16,
) -> ([u8; 64], [u8; CONNECT_DATA_LEN]) {
    let (sqe, data) = connect(names, cntlid, qid, queue_entries, Duration::ZERO).encode();
    (sqe.to_bytes(), data)
}

/// Submission queue flow control is disabled: no more commands are outstanding than the queue has
/// entries, so SQHD says nothing.
fn connect(
    names: &ConnectNames,
    cntlid: u16,
    qid: u16,
    queue_entries: u16,
    kato: Duration,
) -> ConnectRequest {
    ConnectRequest {
        qid,
        queue_entries: u32::from(queue_entries),
        kato,
        sq_flow_disabled: true,
        hostid: names.hostid,
        cntlid,
        subnqn: names.subnqn.clone(),
        hostnqn: names.hostnqn.clone(),
    }
}
