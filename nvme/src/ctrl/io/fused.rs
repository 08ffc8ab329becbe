//! Fused operations (NVMe Base 2.0, "Fused Operation"): Compare and Write, sent next to each other
//! on one queue, carried out as one.

use super::IoCommand;
use crate::spec::{NvmOpcode, Sqe, Status};
use crate::subsys::{COMPARE_AND_WRITE_BLOCKS_MAX, SubsystemInfo};

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

/// Whether the command may have its FUSE field, which is not 0.
#[cold]
pub(super) fn check(sqe: &Sqe) -> Result<(), Status> {
    match (Fuse::of(sqe), NvmOpcode(sqe.opcode)) {
        (Fuse::First, NvmOpcode::COMPARE) | (Fuse::Second, NvmOpcode::WRITE) => Ok(()),
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
