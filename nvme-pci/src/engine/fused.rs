//! Fused commands: Compare and Write, one I/O of the volume.
//!
//! ```text
//!   Compare ─► Held ──Write──► First, Second: one CompareAndWrite ─► two completions
//!               │ anything else, the end of the queue, Abort
//!               └──► completed; a Write that comes then is, too
//!   taken by a predecessor ─► Lost: a flush, then both aborted
//! ```
//!
//! What a predecessor had taken may have been done, and then the blocks may differ from what they are
//! compared with for that very reason. So it is not carried out again: both commands end as aborted,
//! which says neither. They do so behind a flush, which the volume takes when nothing of the
//! predecessor can come any more.

use nvme::ctrl::io::Paired;

use super::command::segments_fit;
use super::*;

/// A command's part in a fused pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Pair {
    /// None.
    #[default]
    Alone,
    /// The first: it waits for its second, and has no memory of the guest's.
    Held,
    /// The first, at the volume by the I/O of the second in this slot.
    First { second: u16 },
    /// The second, whose I/O is that of the pair, and its first.
    Second { first: u16 },
    /// Of a predecessor's pair. It waits for the volume and ends as aborted.
    Lost,
}

impl Engine {
    /// A command where a pair begins, ends or is not complete.
    #[cold]
    pub(super) fn start_paired(
        &mut self,
        at: usize,
        slot: u16,
        sqe: &Sqe,
        fuse: Fuse,
        decoded: Result<IoCommand, Status>,
    ) -> Result<(), Status> {
        let subsys = Arc::clone(&self.subsys);
        let sq = &mut self.sqs[at];
        let pairing = sq.pairing.accept(slot, fuse, decoded, &subsys);
        if let Some((orphan, status)) = pairing.orphan {
            self.complete(at, orphan, status, 0);
        }
        let entry = &mut self.sqs[at].slots[usize::from(slot)];
        match pairing.command {
            Paired::Alone => self.carry_out(at, slot, sqe, decoded?),
            Paired::Held => {
                (entry.command, entry.pair) = (decoded.ok(), Pair::Held);
                Ok(())
            }
            Paired::Both { first } => {
                entry.command = decoded.ok();
                if let Err((first_status, status)) = self.compare_and_write(at, first, slot) {
                    self.complete(at, first, first_status, 0);
                    return Err(status);
                }
                Ok(())
            }
            Paired::Refused(status) => Err(status),
            Paired::BothRefused { first, first_status, status } => {
                self.complete(at, first, first_status, 0);
                Err(status)
            }
        }
    }

    /// Submits a pair. An error is what each of the two completes with.
    fn compare_and_write(
        &mut self,
        at: usize,
        first: u16,
        second: u16,
    ) -> Result<(), (Status, Status)> {
        const FAILED: Status = Status::ABORTED_FAILED_FUSED.dnr();
        let slots = &self.sqs[at].slots;
        let sqes = [first, second].map(|slot| slots[usize::from(slot)].sqe);
        let Some(IoCommand::Write { nsid, offset, len, fua }) = slots[usize::from(second)].command
        else {
            debug_assert!(false, "a pair ends with a Write");
            return Err((FAILED, Status::INTERNAL_ERROR));
        };
        let (space, mut io) =
            self.io(at, second, Op::CompareAndWrite, nsid).map_err(|status| (status, FAILED))?;
        (io.offset, io.len, io.fua) = (offset, u64::from(len), fua);
        self.turn_bytes = self.turn_bytes.saturating_sub(2 * u64::from(len));
        for (half, sqe) in sqes.iter().enumerate() {
            if let Err(status) = self.append_source(sqe, len, &mut io.data) {
                io.data.clear();
                self.ios.push(io);
                return Err(if half == 0 { (status, FAILED) } else { (FAILED, status) });
            }
        }
        let epoch = self.epoch;
        let slots = &mut self.sqs[at].slots;
        let entry = &mut slots[usize::from(first)];
        // Its memory is that of now.
        (entry.pair, entry.epoch) = (Pair::First { second }, epoch);
        slots[usize::from(second)].pair = Pair::Second { first };
        self.submit(space, io);
        Ok(())
    }

    /// Appends the guest's memory that a command's data comes from.
    fn append_source(&self, sqe: &Sqe, len: u32, data: &mut SgList) -> Result<(), Status> {
        let (view, from) = (&self.view, data.segments().len());
        walk(
            sqe,
            len,
            true,
            &mut Copying {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    view.append_source(data, addr, len).map_err(|_| TRANSFER)?;
                    segments_fit(data.segments().len() - from)
                },
            },
        )
    }

    /// The I/O of a command has ended, or that of a pair, which may have been done or not.
    #[inline]
    pub(super) fn end(&mut self, at: usize, slot: u16, status: Status, may_be_done: bool) {
        if let Pair::Second { first } = self.sqs[at].slots[usize::from(slot)].pair {
            self.end_pair(at, [first, slot], status, may_be_done);
        } else {
            self.complete(at, slot, status, 0);
        }
    }

    /// Where the pair was not done the first command says why, and the second is aborted for that
    /// (NVMe Base 2.0, "Fused Operation"). Where it may have been done, nothing is to say that it was
    /// not: both have the status.
    #[cold]
    fn end_pair(&mut self, at: usize, pair: [u16; 2], status: Status, may_be_done: bool) {
        let [first, second] = pair;
        self.complete(at, first, status, 0);
        let failed = Status::ABORTED_FAILED_FUSED.dnr();
        self.complete(at, second, if may_be_done { status } else { failed }, 0);
    }

    /// Ends a first command that waits for its second, if there is one.
    pub(super) fn give_up_held(&mut self, at: usize, status: Status) {
        if let Some(slot) = self.sqs[at].pairing.abandon() {
            self.complete(at, slot, status, 0);
        }
    }

    /// A fused command that a predecessor took, and may have carried out.
    #[cold]
    pub(super) fn begin_lost_half(&mut self, at: usize, slot: u16, sqe: Sqe) {
        self.fill(at, slot, sqe);
        self.sqs[at].slots[usize::from(slot)].pair = Pair::Lost;
        match self.io(at, slot, Op::Flush, sqe.nsid.get()) {
            Ok((space, io)) => self.submit(space, io),
            // Nothing of a namespace that is not there can come any more.
            Err(_) => self.complete(at, slot, Status::COMMAND_ABORT_REQUESTED, 0),
        }
    }
}
