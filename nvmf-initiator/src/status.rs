//! What a completion status means for the I/O: the one place where NVMe statuses become
//! [`IoError`]s.

use block::IoError;
use nvme::spec::{SCT_GENERIC, SCT_PATH, Status};

/// What is to become of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It was done.
    Done,
    /// It may be sent again after a while; if that has been tried often enough, this is its error.
    Retry(IoError),
    /// It failed for good, or because the namespace is detached, of which nobody here knows yet: it
    /// may be sent again for as long as it takes to find that out.
    Doubt(IoError),
    /// It failed for good.
    Fail(IoError),
}

impl Verdict {
    /// The worse of two.
    pub(crate) fn max(self, other: Verdict) -> Verdict {
        if self.rank() >= other.rank() { self } else { other }
    }

    fn rank(self) -> u8 {
        match self {
            Verdict::Done => 0,
            Verdict::Retry(_) => 1,
            Verdict::Doubt(_) => 2,
            Verdict::Fail(_) => 3,
        }
    }
}

/// Judges the status of a completed I/O command.
///
/// Sent again, if the controller does not forbid it (DNR), is what another attempt may cure:
/// everything about the path (SCT 3), a controller or namespace that is busy or becoming ready, a
/// command that was aborted on the way, damaged data. A bad medium stays as it is, and is reported at
/// once; a wrong field after it is clear that the namespace is not detached.
pub(crate) fn judge(status: Status) -> Verdict {
    if status.is_success() {
        return Verdict::Done;
    }
    let error = error_of(status);
    if status.is(Status::AUTHENTICATION_REQUIRED) {
        // The queue authenticates, or the association ends; the command itself is good.
        return Verdict::Retry(error);
    }
    // What commands to a namespace that is not attached are answered with (NVMe Base 2.0, "NSID and
    // Namespace Usage"), Do Not Retry or not; others mean the first by other things as well.
    if status.is(Status::INVALID_FIELD_IN_COMMAND) || status.is(Status::INVALID_NAMESPACE_OR_FORMAT)
    {
        return Verdict::Doubt(error);
    }
    if !status.is_dnr() && is_curable(status) {
        Verdict::Retry(error)
    } else {
        Verdict::Fail(error)
    }
}

/// Judges the statuses of a fused Compare and Write, of which both commands are answered.
///
/// It may be sent again only if the Compare says that the Write was not carried out: once that may
/// have been done, the blocks may differ from what they are compared with for that very reason.
#[cold]
pub(crate) fn judge_pair(compare: Status, write: Status) -> Verdict {
    let is_not_its_fault = |status: Status| {
        status.is(Status::ABORTED_FAILED_FUSED) || status.is(Status::ABORTED_MISSING_FUSED)
    };
    match (judge(compare), judge(write)) {
        (Verdict::Done, Verdict::Done) => Verdict::Done,
        // Equal, and the Write failed or was given up, who knows when.
        (Verdict::Done, Verdict::Retry(_) | Verdict::Doubt(_)) => Verdict::Fail(IoError::Aborted),
        // A Write compares nothing.
        (Verdict::Done, Verdict::Fail(IoError::CompareFailed)) => Verdict::Fail(IoError::Medium),
        (Verdict::Done, failed) => failed,
        // A controller that contradicts itself.
        (_, Verdict::Done) => Verdict::Fail(IoError::Aborted),
        // Neither was carried out: the Write is why.
        (_, failed) if is_not_its_fault(compare) => failed,
        (failed, _) => failed,
    }
}

fn is_curable(status: Status) -> bool {
    const TRANSIENT: [Status; 10] = [
        Status::DATA_TRANSFER_ERROR,
        Status::ABORTED_POWER_LOSS,
        Status::INTERNAL_ERROR,
        Status::COMMAND_ABORT_REQUESTED,
        Status::ABORTED_SQ_DELETION,
        Status::KEEP_ALIVE_TIMER_EXPIRED,
        Status::ABORTED_PREEMPT,
        Status::COMMAND_INTERRUPTED,
        Status::TRANSIENT_TRANSPORT_ERROR,
        Status::NAMESPACE_NOT_READY,
    ];
    match status.sct() {
        SCT_GENERIC => TRANSIENT.iter().any(|transient| status.is(*transient)),
        SCT_PATH => true,
        // Vendor specific: nothing is known but that the controller leaves DNR clear.
        7 => true,
        _ => false,
    }
}

fn error_of(status: Status) -> IoError {
    let is_any = |list: &[Status]| list.iter().any(|one| status.is(*one));
    if status.is(Status::LBA_OUT_OF_RANGE) {
        IoError::OutOfRange
    } else if is_any(&[Status::CAPACITY_EXCEEDED]) {
        IoError::NoSpace
    } else if is_any(&[Status::NAMESPACE_IS_WRITE_PROTECTED, Status::WRITE_TO_READ_ONLY_RANGE]) {
        IoError::ReadOnly
    } else if is_any(&[Status::INVALID_COMMAND_OPCODE]) {
        IoError::NotSupported
    } else if status.is(Status::COMPARE_FAILURE) {
        IoError::CompareFailed
    } else if status.is(Status::RESERVATION_CONFLICT) {
        IoError::ReservationConflict
    } else if status.is(Status::OVERLAPPING_IO_RANGE) {
        IoError::Overlapping
    } else if is_any(&[Status::COMMAND_SIZE_LIMIT_EXCEEDED]) {
        IoError::TooLarge
    } else if is_any(&[Status::INVALID_NAMESPACE_OR_FORMAT, Status::ANA_PERSISTENT_LOSS]) {
        IoError::Gone
    } else {
        IoError::Medium
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme::spec::SCT_MEDIA;

    #[test]
    fn every_status_has_one_verdict_and_dnr_is_final() {
        for raw in 0..=0x7ffu16 {
            let status = Status(raw);
            if status.is(Status::AUTHENTICATION_REQUIRED) {
                assert_eq!(judge(status.dnr()), Verdict::Retry(IoError::Medium));
                continue;
            }
            match judge(status) {
                Verdict::Done => assert!(status.is_success()),
                Verdict::Doubt(_) => assert_eq!(judge(status.dnr()), judge(status)),
                Verdict::Retry(error) => assert_eq!(judge(status.dnr()), Verdict::Fail(error)),
                Verdict::Fail(error) => assert_eq!(judge(status.dnr()), Verdict::Fail(error)),
            }
            if status.sct() == SCT_MEDIA || status.sct() == 1 {
                assert!(matches!(judge(status), Verdict::Fail(_)), "{status}");
            }
        }
    }

    #[test]
    fn known_statuses() {
        use IoError::*;
        use Verdict::*;
        for (status, want) in [
            (Status::SUCCESS, Done),
            (Status::SUCCESS.more(), Done),
            (Status::NAMESPACE_NOT_READY, Retry(Medium)),
            (Status::COMMAND_INTERRUPTED, Retry(Medium)),
            (Status::TRANSIENT_TRANSPORT_ERROR, Retry(Medium)),
            (Status::INTERNAL_ERROR, Retry(Medium)),
            (Status::INTERNAL_ERROR.dnr(), Fail(Medium)),
            (Status::ANA_INACCESSIBLE, Retry(Medium)),
            (Status::ANA_PERSISTENT_LOSS, Retry(Gone)),
            (Status::LBA_OUT_OF_RANGE, Fail(OutOfRange)),
            (Status::CAPACITY_EXCEEDED, Fail(NoSpace)),
            (Status::NAMESPACE_IS_WRITE_PROTECTED.dnr(), Fail(ReadOnly)),
            (Status::INVALID_COMMAND_OPCODE.dnr(), Fail(NotSupported)),
            (Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), Doubt(Gone)),
            (Status::INVALID_FIELD_IN_COMMAND, Doubt(Medium)),
            (Status::UNRECOVERED_READ_ERROR, Fail(Medium)),
            (Status::COMPARE_FAILURE, Fail(CompareFailed)),
            (Status::RESERVATION_CONFLICT.dnr(), Fail(ReservationConflict)),
            (Status::RESERVATION_CONFLICT, Fail(ReservationConflict)),
            (Status::OVERLAPPING_IO_RANGE, Fail(Overlapping)),
            (Status::WRITE_FAULT, Fail(Medium)),
        ] {
            assert_eq!(judge(status), want, "{status}");
        }
    }

    #[test]
    fn a_pair_is_sent_again_only_if_it_was_not_done() {
        use IoError::*;
        use Verdict::*;
        const OK: Status = Status::SUCCESS;
        const FAILED: Status = Status::ABORTED_FAILED_FUSED.dnr();
        const MISSING: Status = Status::ABORTED_MISSING_FUSED.dnr();
        const AUTH: Status = Status::AUTHENTICATION_REQUIRED.dnr();
        for (compare, write, want) in [
            (OK, OK, Done),
            (Status::COMPARE_FAILURE.dnr(), FAILED, Fail(CompareFailed)),
            (Status::NAMESPACE_NOT_READY, FAILED, Retry(Medium)),
            (Status::ANA_INACCESSIBLE, Status::ANA_INACCESSIBLE, Retry(Medium)),
            (FAILED, Status::ANA_TRANSITION, Retry(Medium)),
            (FAILED, Status::RESERVATION_CONFLICT.dnr(), Fail(ReservationConflict)),
            (Status::INVALID_FIELD_IN_COMMAND.dnr(), FAILED, Doubt(Medium)),
            (Status::UNRECOVERED_READ_ERROR, FAILED, Fail(Medium)),
            (AUTH, MISSING, Retry(Medium)),
            (MISSING, AUTH, Retry(Medium)),
            (OK, Status::WRITE_FAULT, Fail(Medium)),
            (OK, Status::CAPACITY_EXCEEDED, Fail(NoSpace)),
            (OK, Status::INTERNAL_ERROR, Fail(Aborted)),
            (OK, Status::ANA_INACCESSIBLE, Fail(Aborted)),
            (OK, AUTH, Fail(Aborted)),
            // What no controller should say is not success.
            (OK, FAILED, Fail(Medium)),
            (FAILED, FAILED, Fail(Medium)),
            (Status::COMPARE_FAILURE, OK, Fail(Aborted)),
            (Status::NAMESPACE_NOT_READY, OK, Fail(Aborted)),
        ] {
            assert_eq!(judge_pair(compare, write), want, "{compare} {write}");
        }
        for raw in 1..=0x7ff {
            for (compare, write) in [(OK, Status(raw)), (Status(raw), OK)] {
                let verdict = judge_pair(compare, write);
                assert!(matches!(verdict, Fail(_)), "{compare} {write}: {verdict:?}");
                assert_ne!(verdict, Fail(CompareFailed), "{compare} {write}: it may be done");
            }
        }
    }

    #[test]
    fn the_worse_verdict_wins_in_any_order() {
        let (retry, fail) = (Verdict::Retry(IoError::Medium), Verdict::Fail(IoError::Gone));
        for other in [Verdict::Done, retry, fail] {
            assert_eq!(fail.max(other), fail);
            assert_eq!(other.max(fail), fail);
            assert_eq!(Verdict::Done.max(other), other);
        }
        assert_eq!(retry.max(Verdict::Done), retry);
    }
}
