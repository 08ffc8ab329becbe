//! Fused operations (NVMe Base 2.0, "Fused Operation"): Compare and Write, sent next to each other
//! on one queue, carried out as one.

use super::IoCommand;
use crate::spec::{NvmOpcode, Sqe, Status};
use crate::subsys::{COMPARE_AND_WRITE_BLOCKS_MAX, NamespaceInfo, SubsystemInfo};

/// FUSE field of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fuse {
    /// Normal operation.
    None,
    /// First command of a fused operation: a Compare.
    First,
    /// Second command of a fused operation: a Write.
    Second,
}

impl Fuse {
    /// FUSE of a command. The reserved value, which [`decode`](super::decode) refuses, makes no
    /// fused command.
    #[must_use]
    #[inline]
    pub fn of(sqe: &Sqe) -> Fuse {
        match sqe.fuse() {
            1 => Fuse::First,
            2 => Fuse::Second,
            _ => Fuse::None,
        }
    }
}

/// Whether a command to the namespace may have its FUSE field, which is not 0.
#[cold]
pub(super) fn check(sqe: &Sqe, ns: &NamespaceInfo) -> Result<(), Status> {
    match (Fuse::of(sqe), NvmOpcode(sqe.opcode)) {
        (Fuse::First, NvmOpcode::COMPARE) | (Fuse::Second, NvmOpcode::WRITE)
            if ns.compare_and_write =>
        {
            Ok(())
        }
        _ => Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
    }
}

/// What becomes of a command that [`FusedPairing::accept`] was told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paired {
    /// An ordinary command: carry it out.
    Alone,
    /// First of a pair, held: its data may be fetched, but it waits for the second.
    Held,
    /// Second of a pair: carry both out as one, once the data of both is there. If the Compare
    /// fails, the Write is completed with Command Aborted due to Failed Fused Command.
    Both {
        /// The held Compare.
        first: u16,
    },
    /// Complete this command with the status.
    Refused(Status),
    /// Complete the held command and this one with these statuses.
    BothRefused {
        /// The held command.
        first: u16,
        /// Its status.
        first_status: Status,
        /// The status of this one.
        status: Status,
    },
}

/// What [`FusedPairing::accept`] decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pairing {
    /// A command held before, whose second never came: complete it with this status.
    pub orphan: Option<(u16, Status)>,
    /// This command.
    pub command: Paired,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    /// No pair is open.
    #[default]
    Idle,
    /// The Compare in this slot was decoded and waits for the Write.
    Held { slot: u16, nsid: u32, offset: u64, len: u32 },
    /// A first command was refused; its second, if it comes, is aborted.
    Failed,
}

/// Pairs the fused commands of one I/O queue. Tell it of every command of the queue, in the order
/// of the queue: the two of a pair are adjacent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FusedPairing {
    state: State,
}

impl FusedPairing {
    /// No pair is open.
    #[must_use]
    pub const fn new() -> FusedPairing {
        FusedPairing { state: State::Idle }
    }

    /// Whether a command with this FUSE field needs no [`FusedPairing::accept`]: nearly all.
    #[must_use]
    #[inline]
    pub fn is_idle(&self, fuse: Fuse) -> bool {
        matches!((self.state, fuse), (State::Idle, Fuse::None))
    }

    /// The next command of the queue: its slot, FUSE field and what `decode` made of it.
    pub fn accept(
        &mut self,
        slot: u16,
        fuse: Fuse,
        command: Result<IoCommand, Status>,
        subsys: &SubsystemInfo,
    ) -> Pairing {
        let before = core::mem::take(&mut self.state);
        let mut orphan = None;
        let verdict = match (fuse, before) {
            (Fuse::Second, State::Held { slot: first, nsid, offset, len }) => {
                let (first_status, status) = match command {
                    Ok(second) => match pair(nsid, offset, len, second, subsys) {
                        Ok(()) => return Pairing { orphan, command: Paired::Both { first } },
                        Err(status) => (status, status),
                    },
                    // The other one's fault is not to be repeated as it is, either.
                    Err(status) => (Status::ABORTED_FAILED_FUSED.dnr(), status),
                };
                Paired::BothRefused { first, first_status, status }
            }
            (Fuse::Second, State::Failed) => Paired::Refused(Status::ABORTED_FAILED_FUSED.dnr()),
            (Fuse::Second, State::Idle) => Paired::Refused(Status::ABORTED_MISSING_FUSED.dnr()),
            (Fuse::None | Fuse::First, before) => {
                if let State::Held { slot, .. } = before {
                    orphan = Some((slot, Status::ABORTED_MISSING_FUSED.dnr()));
                }
                match (fuse, command) {
                    (Fuse::First, Ok(IoCommand::Compare { nsid, offset, len, .. })) => {
                        self.state = State::Held { slot, nsid, offset, len };
                        Paired::Held
                    }
                    (Fuse::First, refused) => {
                        self.state = State::Failed;
                        let never = Status::INVALID_FIELD_IN_COMMAND.dnr();
                        Paired::Refused(refused.err().unwrap_or(never))
                    }
                    (_, Ok(_)) => Paired::Alone,
                    (_, Err(status)) => Paired::Refused(status),
                }
            }
        };
        Pairing { orphan, command: verdict }
    }

    /// The held command, if there is one, is aborted or its queue ends: its second, should it
    /// come, is aborted, too. Returns its slot.
    pub fn abandon(&mut self) -> Option<u16> {
        match self.state {
            State::Held { slot, .. } => {
                self.state = State::Failed;
                Some(slot)
            }
            State::Idle | State::Failed => None,
        }
    }
}

/// Whether a held Compare and this command are a Compare and Write.
fn pair(
    nsid: u32,
    offset: u64,
    len: u32,
    second: IoCommand,
    subsys: &SubsystemInfo,
) -> Result<(), Status> {
    // The two commands are about the same blocks.
    if !matches!(second, IoCommand::Write { nsid: n, offset: o, len: l, .. }
        if (n, o, l) == (nsid, offset, len))
    {
        return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    }
    let block_bytes = subsys.namespace(nsid).map_or(0, |ns| ns.block_bytes);
    if u64::from(len) > u64::from(block_bytes) * u64::from(COMPARE_AND_WRITE_BLOCKS_MAX) {
        return Err(Status::ATOMIC_WRITE_UNIT_EXCEEDED.dnr());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subsys::tests::sample;

    const FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
    const MISSING: Status = Status::ABORTED_MISSING_FUSED.dnr();
    const FAILED: Status = Status::ABORTED_FAILED_FUSED.dnr();

    fn compare(nsid: u32, offset: u64, len: u32) -> Result<IoCommand, Status> {
        Ok(IoCommand::Compare { nsid, offset, len, fua: false })
    }

    fn write(nsid: u32, offset: u64, len: u32) -> Result<IoCommand, Status> {
        Ok(IoCommand::Write { nsid, offset, len, fua: true })
    }

    struct Queue {
        pairing: FusedPairing,
        slot: u16,
    }

    impl Queue {
        fn new() -> Queue {
            Queue { pairing: FusedPairing::new(), slot: 0 }
        }

        /// The next command; slots count from 1.
        fn next(&mut self, fuse: Fuse, command: Result<IoCommand, Status>) -> Pairing {
            self.slot += 1;
            self.pairing.accept(self.slot, fuse, command, &sample())
        }
    }

    fn alone(command: Paired) -> Pairing {
        Pairing { orphan: None, command }
    }

    #[test]
    fn a_pair() {
        let mut queue = Queue::new();
        assert!(queue.pairing.is_idle(Fuse::None) && !queue.pairing.is_idle(Fuse::First));
        assert_eq!(queue.next(Fuse::None, write(1, 0, 4096)), alone(Paired::Alone));
        assert_eq!(queue.next(Fuse::First, compare(1, 512, 512)), alone(Paired::Held));
        assert!(!queue.pairing.is_idle(Fuse::None));
        let second = queue.next(Fuse::Second, write(1, 512, 512));
        assert_eq!(second, alone(Paired::Both { first: 2 }));
        assert!(queue.pairing.is_idle(Fuse::None));
        // On a namespace of 4096-byte blocks one block is more bytes.
        queue.next(Fuse::First, compare(3, 0, 4096));
        let second = queue.next(Fuse::Second, write(3, 0, 4096));
        assert_eq!(second, alone(Paired::Both { first: 4 }));
    }

    #[test]
    fn halves_are_aborted() {
        let mut queue = Queue::new();
        let second = queue.next(Fuse::Second, write(1, 0, 512));
        assert_eq!(second, alone(Paired::Refused(MISSING)));
        // A first, then something else.
        queue.next(Fuse::First, compare(1, 0, 512));
        let other = queue.next(Fuse::None, write(1, 0, 512));
        assert_eq!(other, Pairing { orphan: Some((2, MISSING)), command: Paired::Alone });
        // A first, then a first.
        queue.next(Fuse::First, compare(1, 0, 512));
        let again = queue.next(Fuse::First, compare(1, 0, 512));
        assert_eq!(again, Pairing { orphan: Some((4, MISSING)), command: Paired::Held });
        let second = queue.next(Fuse::Second, write(1, 0, 512));
        assert_eq!(second, alone(Paired::Both { first: 5 }));
        // A refused command in between is one, too.
        queue.next(Fuse::First, compare(1, 0, 512));
        let refused = queue.next(Fuse::None, Err(FIELD));
        assert_eq!(
            refused,
            Pairing { orphan: Some((7, MISSING)), command: Paired::Refused(FIELD) }
        );
        assert_eq!(
            queue.next(Fuse::Second, write(1, 0, 512)),
            alone(Paired::Refused(MISSING)),
            "its pair was broken"
        );
    }

    #[test]
    fn a_failed_half_fails_the_other() {
        let mut queue = Queue::new();
        let range = Status::LBA_OUT_OF_RANGE.dnr();
        assert_eq!(queue.next(Fuse::First, Err(range)), alone(Paired::Refused(range)));
        let second = queue.next(Fuse::Second, write(1, 0, 512));
        assert_eq!(second, alone(Paired::Refused(FAILED)));
        // And nothing is left of it.
        queue.next(Fuse::First, Err(range));
        assert_eq!(queue.next(Fuse::None, write(1, 0, 512)), alone(Paired::Alone));
        let second = queue.next(Fuse::Second, write(1, 0, 512));
        assert_eq!(second, alone(Paired::Refused(MISSING)));

        queue.next(Fuse::First, compare(1, 0, 512));
        let second = queue.next(Fuse::Second, Err(range));
        let first = queue.slot - 1;
        assert_eq!(
            second,
            alone(Paired::BothRefused { first, first_status: FAILED, status: range })
        );
    }

    #[test]
    fn pairs_that_do_not_fit() {
        let mut queue = Queue::new();
        let unit = Status::ATOMIC_WRITE_UNIT_EXCEEDED.dnr();
        for (first, second, status) in [
            (compare(1, 0, 512), write(1, 512, 512), FIELD),
            (compare(1, 0, 512), write(9, 0, 512), FIELD),
            (compare(1, 0, 512), write(1, 0, 1024), FIELD),
            (compare(1, 0, 512), compare(1, 0, 512), FIELD),
            (compare(1, 0, 1024), write(1, 0, 1024), unit),
        ] {
            queue.next(Fuse::First, first);
            let second = queue.next(Fuse::Second, second);
            let first = queue.slot - 1;
            assert_eq!(second, alone(Paired::BothRefused { first, first_status: status, status }));
        }
        // Nothing but a Compare is a first, whatever the caller says.
        assert_eq!(queue.next(Fuse::First, write(1, 0, 512)), alone(Paired::Refused(FIELD)));
    }

    #[test]
    fn an_aborted_first_aborts_its_second() {
        let mut queue = Queue::new();
        assert_eq!(queue.pairing.abandon(), None);
        queue.next(Fuse::First, compare(1, 0, 512));
        assert_eq!(queue.pairing.abandon(), Some(1));
        assert_eq!(queue.pairing.abandon(), None);
        let second = queue.next(Fuse::Second, write(1, 0, 512));
        assert_eq!(second, alone(Paired::Refused(FAILED)));
    }
}
