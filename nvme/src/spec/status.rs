//! Completion status (NVMe Base 2.0, "Status Field Definition").

use core::fmt;

/// Status field of a completion: bits 14:0 of the upper half of dword 3, without the phase tag.
///
/// Layout: SC 7:0, SCT 10:8, CRD 12:11, M 13, DNR 14. A value is peer-controlled, so this is an
/// open newtype; [`Status::name`] knows the constants below and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Status(pub u16);

/// Do Not Retry: the same command would fail again.
const DNR: u16 = 1 << 14;
/// More: the Error Information log has an entry for this command.
const MORE: u16 = 1 << 13;

/// Status Code Type: Generic Command Status.
pub const SCT_GENERIC: u8 = 0;
/// Status Code Type: Command Specific Status.
pub const SCT_COMMAND_SPECIFIC: u8 = 1;
/// Status Code Type: Media and Data Integrity Errors.
pub const SCT_MEDIA: u8 = 2;
/// Status Code Type: Path Related Status.
pub const SCT_PATH: u8 = 3;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $sct:literal, $sc:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status(($sct << 8) | $sc);)*

            /// The specification's name of the code, if it is one this crate knows. Where command
            /// sets share a number (the fabrics and NVM sets do), the first constant is named.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                const NAMES: &[(u16, &str)] = &[$((($sct << 8) | $sc, stringify!($name)),)*];
                let code = self.code();
                NAMES.iter().find(|(value, _)| *value == code).map(|(_, name)| *name)
            }
        }
    };
}

statuses! {
    /// Successful Completion.
    SUCCESS = 0, 0x00;
    /// Invalid Command Opcode.
    INVALID_COMMAND_OPCODE = 0, 0x01;
    /// Invalid Field in Command.
    INVALID_FIELD_IN_COMMAND = 0, 0x02;
    /// Command ID Conflict.
    COMMAND_ID_CONFLICT = 0, 0x03;
    /// Data Transfer Error.
    DATA_TRANSFER_ERROR = 0, 0x04;
    /// Commands Aborted due to Power Loss Notification.
    ABORTED_POWER_LOSS = 0, 0x05;
    /// Internal Error.
    INTERNAL_ERROR = 0, 0x06;
    /// Command Abort Requested.
    COMMAND_ABORT_REQUESTED = 0, 0x07;
    /// Command Aborted due to SQ Deletion.
    ABORTED_SQ_DELETION = 0, 0x08;
    /// Command Aborted due to Failed Fused Command.
    ABORTED_FAILED_FUSED = 0, 0x09;
    /// Command Aborted due to Missing Fused Command.
    ABORTED_MISSING_FUSED = 0, 0x0a;
    /// Invalid Namespace or Format.
    INVALID_NAMESPACE_OR_FORMAT = 0, 0x0b;
    /// Command Sequence Error.
    COMMAND_SEQUENCE_ERROR = 0, 0x0c;
    /// Invalid SGL Segment Descriptor.
    INVALID_SGL_SEGMENT_DESCRIPTOR = 0, 0x0d;
    /// Invalid Number of SGL Descriptors.
    INVALID_NUMBER_OF_SGL_DESCRIPTORS = 0, 0x0e;
    /// Data SGL Length Invalid.
    DATA_SGL_LENGTH_INVALID = 0, 0x0f;
    /// Metadata SGL Length Invalid.
    METADATA_SGL_LENGTH_INVALID = 0, 0x10;
    /// SGL Descriptor Type Invalid.
    SGL_DESCRIPTOR_TYPE_INVALID = 0, 0x11;
    /// PRP Offset Invalid.
    PRP_OFFSET_INVALID = 0, 0x13;
    /// Atomic Write Unit Exceeded.
    ATOMIC_WRITE_UNIT_EXCEEDED = 0, 0x14;
    /// Operation Denied.
    OPERATION_DENIED = 0, 0x15;
    /// SGL Offset Invalid.
    SGL_OFFSET_INVALID = 0, 0x16;
    /// Host Identifier Inconsistent Format.
    HOST_IDENTIFIER_INCONSISTENT_FORMAT = 0, 0x18;
    /// Keep Alive Timer Expired.
    KEEP_ALIVE_TIMER_EXPIRED = 0, 0x19;
    /// Keep Alive Timeout Invalid.
    KEEP_ALIVE_TIMEOUT_INVALID = 0, 0x1a;
    /// Command Aborted due to Preempt and Abort.
    ABORTED_PREEMPT = 0, 0x1b;
    /// SGL Data Block Granularity Invalid.
    SGL_DATA_BLOCK_GRANULARITY_INVALID = 0, 0x1e;
    /// Namespace is Write Protected.
    NAMESPACE_IS_WRITE_PROTECTED = 0, 0x20;
    /// Command Interrupted: retry later.
    COMMAND_INTERRUPTED = 0, 0x21;
    /// Transient Transport Error: for example a bad data digest; retry.
    TRANSIENT_TRANSPORT_ERROR = 0, 0x22;
    /// LBA Out of Range (NVM Command Set).
    LBA_OUT_OF_RANGE = 0, 0x80;
    /// Capacity Exceeded (NVM Command Set).
    CAPACITY_EXCEEDED = 0, 0x81;
    /// Namespace Not Ready.
    NAMESPACE_NOT_READY = 0, 0x82;
    /// Reservation Conflict.
    RESERVATION_CONFLICT = 0, 0x83;

    /// Completion Queue Invalid: the completion queue does not exist.
    COMPLETION_QUEUE_INVALID = 1, 0x00;
    /// Invalid Queue Identifier.
    INVALID_QUEUE_IDENTIFIER = 1, 0x01;
    /// Invalid Queue Size.
    INVALID_QUEUE_SIZE = 1, 0x02;
    /// Abort Command Limit Exceeded.
    ABORT_COMMAND_LIMIT_EXCEEDED = 1, 0x03;
    /// Asynchronous Event Request Limit Exceeded.
    ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED = 1, 0x05;
    /// Invalid Interrupt Vector.
    INVALID_INTERRUPT_VECTOR = 1, 0x08;
    /// Invalid Log Page.
    INVALID_LOG_PAGE = 1, 0x09;
    /// Invalid Queue Deletion: a completion queue that submission queues still use.
    INVALID_QUEUE_DELETION = 1, 0x0c;
    /// Feature Identifier Not Saveable.
    FEATURE_NOT_SAVEABLE = 1, 0x0d;
    /// Feature Not Changeable.
    FEATURE_NOT_CHANGEABLE = 1, 0x0e;
    /// Feature Not Namespace Specific.
    FEATURE_NOT_NAMESPACE_SPECIFIC = 1, 0x0f;
    /// Invalid Controller Identifier.
    INVALID_CONTROLLER_IDENTIFIER = 1, 0x1f;
    /// I/O Command Set Not Supported.
    IO_COMMAND_SET_NOT_SUPPORTED = 1, 0x29;

    /// Connect Incompatible Format (fabrics).
    CONNECT_INCOMPATIBLE_FORMAT = 1, 0x80;
    /// Connect Controller Busy (fabrics): retry later.
    CONNECT_CONTROLLER_BUSY = 1, 0x81;
    /// Connect Invalid Parameters (fabrics); dword 0 says which one.
    CONNECT_INVALID_PARAMETERS = 1, 0x82;
    /// Connect Restart Discovery (fabrics).
    CONNECT_RESTART_DISCOVERY = 1, 0x83;
    /// Connect Invalid Host (fabrics).
    CONNECT_INVALID_HOST = 1, 0x84;
    /// Invalid Queue Type (fabrics, Disconnect).
    INVALID_QUEUE_TYPE = 1, 0x85;
    /// Discover Restart (fabrics).
    DISCOVER_RESTART = 1, 0x90;
    /// Authentication Required (fabrics).
    AUTHENTICATION_REQUIRED = 1, 0x91;

    /// Conflicting Attributes (NVM Command Set).
    CONFLICTING_ATTRIBUTES = 1, 0x80;
    /// Invalid Protection Information (NVM Command Set).
    INVALID_PROTECTION_INFORMATION = 1, 0x81;
    /// Attempted Write to Read Only Range (NVM Command Set).
    WRITE_TO_READ_ONLY_RANGE = 1, 0x82;
    /// Command Size Limit Exceeded (NVM Command Set).
    COMMAND_SIZE_LIMIT_EXCEEDED = 1, 0x83;
    /// Overlapping I/O Range (NVM Command Set): a source of a Copy overlaps its destination.
    OVERLAPPING_IO_RANGE = 1, 0x87;

    /// Write Fault.
    WRITE_FAULT = 2, 0x80;
    /// Unrecovered Read Error.
    UNRECOVERED_READ_ERROR = 2, 0x81;
    /// Compare Failure.
    COMPARE_FAILURE = 2, 0x85;
    /// Access Denied.
    ACCESS_DENIED = 2, 0x86;
    /// Deallocated or Unwritten Logical Block.
    DEALLOCATED_OR_UNWRITTEN_BLOCK = 2, 0x87;

    /// Internal Path Error.
    INTERNAL_PATH_ERROR = 3, 0x00;
    /// Asymmetric Access Persistent Loss.
    ANA_PERSISTENT_LOSS = 3, 0x01;
    /// Asymmetric Access Inaccessible.
    ANA_INACCESSIBLE = 3, 0x02;
    /// Asymmetric Access Transition.
    ANA_TRANSITION = 3, 0x03;
    /// Controller Pathing Error.
    CONTROLLER_PATHING_ERROR = 3, 0x60;
    /// Host Pathing Error.
    HOST_PATHING_ERROR = 3, 0x70;
    /// Command Aborted By Host.
    COMMAND_ABORTED_BY_HOST = 3, 0x71;
}

impl Status {
    /// The same status with Do Not Retry set.
    #[must_use]
    pub const fn dnr(self) -> Status {
        Status(self.0 | DNR)
    }

    /// The same status with More set: the Error Information log has an entry for it.
    #[must_use]
    pub const fn more(self) -> Status {
        Status(self.0 | MORE)
    }

    /// Whether Do Not Retry is set.
    #[must_use]
    pub const fn is_dnr(self) -> bool {
        self.0 & DNR != 0
    }

    /// Successful Completion, whatever the flags say.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.code() == 0
    }

    /// Status Code Type and Status Code without CRD, More and DNR: what constants compare with.
    #[must_use]
    pub const fn code(self) -> u16 {
        self.0 & 0x07ff
    }

    /// Whether it is the same status as `other`, flags aside.
    #[must_use]
    pub const fn is(self, other: Status) -> bool {
        self.code() == other.code()
    }

    /// Status Code Type.
    #[must_use]
    pub const fn sct(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    /// Status Code.
    #[must_use]
    pub const fn sc(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// The upper 16 bits of completion dword 3 with a phase tag of 0, as fabrics send it.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        self.0 << 1
    }

    /// From the upper 16 bits of completion dword 3; the phase tag is dropped.
    #[must_use]
    pub const fn from_wire(raw: u16) -> Status {
        Status(raw >> 1)
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name)?,
            None => f.write_str("status")?,
        }
        write!(
            f,
            " (SCT {:x}h SC {:02x}h{})",
            self.sct(),
            self.sc(),
            if self.is_dnr() { " DNR" } else { "" }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let status = Status::CONNECT_INVALID_PARAMETERS.dnr();
        assert_eq!(status.0, 0x4182);
        assert_eq!((status.sct(), status.sc()), (1, 0x82));
        assert_eq!(status.to_wire(), 0x8304);
        assert_eq!(Status::from_wire(0x8305), status);
        assert!(status.is(Status::CONNECT_INVALID_PARAMETERS) && status.is_dnr());
        assert!(!status.is_success() && Status::SUCCESS.dnr().is_success());
        assert_eq!(Status::SUCCESS.more().0, 0x2000);
    }

    #[test]
    fn display_names_known_codes_and_prints_unknown_ones() {
        assert_eq!(
            Status::LBA_OUT_OF_RANGE.dnr().to_string(),
            "LBA_OUT_OF_RANGE (SCT 0h SC 80h DNR)"
        );
        assert_eq!(Status(0x7ff).to_string(), "status (SCT 7h SC ffh)");
    }
}
