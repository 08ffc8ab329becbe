//! The one place where a volume's error becomes an NVMe status, and where DNR is decided.

use block::{IoError, Op};
use nvme::spec::Status;

/// The status for `error` of an I/O of kind `op`. "Do not retry" is set where the same command
/// would fail again.
pub(crate) fn of(error: IoError, op: Op) -> Status {
    match error {
        IoError::OutOfRange => Status::LBA_OUT_OF_RANGE.dnr(),
        // As if FUSES were 0.
        IoError::NotSupported if op == Op::CompareAndWrite => {
            Status::INVALID_FIELD_IN_COMMAND.dnr()
        }
        IoError::NotSupported => Status::INVALID_COMMAND_OPCODE.dnr(),
        IoError::TooLarge if op == Op::Copy => Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr(),
        IoError::Misaligned | IoError::TooLarge => Status::INVALID_FIELD_IN_COMMAND.dnr(),
        IoError::ReadOnly => Status::NAMESPACE_IS_WRITE_PROTECTED.dnr(),
        IoError::NoSpace => Status::CAPACITY_EXCEEDED.dnr(),
        IoError::Medium if matches!(op, Op::Read | Op::Compare | Op::Verify) => {
            Status::UNRECOVERED_READ_ERROR.dnr()
        }
        IoError::Medium => Status::WRITE_FAULT.dnr(),
        IoError::Gone => Status::INTERNAL_ERROR,
        IoError::Overlapping => Status::OVERLAPPING_IO_RANGE.dnr(),
        IoError::CompareFailed => Status::COMPARE_FAILURE.dnr(),
        IoError::ReservationConflict => Status::RESERVATION_CONFLICT.dnr(),
        IoError::Aborted => Status::COMMAND_ABORT_REQUESTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_fail_again_is_not_retried() {
        for error in IoError::ALL {
            let may_heal = matches!(error, IoError::Gone | IoError::Aborted);
            for op in Op::ALL {
                assert_ne!(of(error, op).is_dnr(), may_heal, "{error:?} of {op:?}");
            }
        }
    }
}
