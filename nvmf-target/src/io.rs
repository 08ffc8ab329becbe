//! I/O commands of a qpair: from a decoded command to the volume and back.

use block::{Io, IoError, Op};
use nvme::ctrl::ErrorRecord;
use nvme::ctrl::io::IoCommand;
use nvme::spec::{NSID_ALL, Status};
use nvme::subsys::NamespaceInfo;
use nvme::subsys::reservation::Access;

use crate::conn::{Conn, Held, Life, Phase, Slot, Work};
use crate::core::{Env, Refused};
use crate::counters::Counters;
use crate::fence::{Place, Scope};
use crate::pieces;
use crate::sample::{self, Stage};
use crate::status;

/// Slot number of I/O that belongs to no command.
const OWN_SLOT: u16 = u16::MAX;
/// Stands for the flush of a volume whose namespace a host has protected.
const PROTECT_SLOT: u16 = u16::MAX - 1;

/// What is to be known of an I/O that failed.
#[derive(Clone, Copy)]
pub(crate) struct Failed {
    pub(crate) error: IoError,
    pub(crate) op: Op,
    /// First byte of the range.
    pub(crate) offset: u64,
}

impl Failed {
    fn of(io: &Io) -> Failed {
        let error = io.result.err().unwrap_or(IoError::Gone);
        Failed { error, op: io.op, offset: io.offset }
    }
}

/// Status of a command that a reservation does not allow. The same command would fail again until
/// the host does something about the reservation.
const CONFLICT: Status = Status::RESERVATION_CONFLICT.dnr();

impl Conn {
    /// Hands an I/O command (or its next piece) to the volume; `false`: it waits.
    pub(crate) fn submit(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        let is_current = self
            .view
            .as_ref()
            .is_some_and(|view| view.generation == self.slots[slot as usize].decoded);
        if !is_current && let Err(status) = self.decode_again(slot) {
            self.end(slot, status, 0, env);
            return true;
        }
        let Work::Io(command) = self.slots[slot as usize].work else { return true };
        match command {
            IoCommand::Read { .. }
            | IoCommand::Write { .. }
            | IoCommand::WriteZeroes { .. }
            | IoCommand::Flush { .. }
            | IoCommand::Deallocate { .. } => self.submit_plain(slot, command, env),
            IoCommand::Compare { .. } | IoCommand::Verify { .. } | IoCommand::Copy { .. } => {
                self.submit_piece(slot, command, env)
            }
            IoCommand::Advisory { nsid } => {
                let is_kept_out =
                    self.volume(nsid, 0).is_some_and(|v| self.conflicts(v, command.access()));
                let status = if is_kept_out { CONFLICT } else { Status::SUCCESS };
                self.respond(slot, status, 0, env);
                true
            }
            IoCommand::ReservationRegister { .. }
            | IoCommand::ReservationAcquire { .. }
            | IoCommand::ReservationRelease { .. } => {
                self.reserve(slot, command, env);
                true
            }
            IoCommand::ReservationReport { nsid, len } => {
                self.report(slot, nsid, len, env);
                true
            }
            // No namespace says that it can do this, so that `decode` refuses it.
            IoCommand::WriteUncorrectable { .. } => {
                self.respond(slot, Status::INVALID_COMMAND_OPCODE.dnr(), 0, env);
                true
            }
        }
    }

    /// A command whose data, if it has any, is the volume's as it is the host's.
    fn submit_plain(&mut self, slot: u16, command: IoCommand, env: &mut Env<'_>) -> bool {
        if let IoCommand::Read { nsid, offset, len, .. } = command
            && self.slots[slot as usize].held == 0
            && !self.take_read_buffer(slot, (nsid, offset, len), env)
        {
            return self.wait(slot, env);
        }
        let entry = &mut self.slots[slot as usize];
        let mut io = entry.io.take().unwrap_or_else(|| env.ios.take());
        io.fua = false;
        io.no_unmap = false;
        match command {
            IoCommand::Read { offset, len, fua, .. } => {
                (io.op, io.offset, io.len, io.fua) = (Op::Read, offset, u64::from(len), fua);
            }
            IoCommand::Write { offset, len, fua, .. } => {
                (io.op, io.offset, io.len, io.fua) = (Op::Write, offset, u64::from(len), fua);
            }
            IoCommand::WriteZeroes { offset, len, no_unmap, fua, .. } => {
                (io.op, io.offset, io.len, io.fua) = (Op::WriteZeroes, offset, len, fua);
                io.no_unmap = no_unmap;
            }
            IoCommand::Deallocate { nsid, .. } => {
                let mut range = [0; 16];
                let copied = io.data.copy_to_slice(entry.step as usize * 16, &mut range);
                let range = match (copied, self.namespace(nsid)) {
                    (Ok(()), Some(ns)) => nvme::ctrl::io::dsm_range(&range, ns),
                    _ => Err(Status::DATA_SGL_LENGTH_INVALID.dnr()),
                };
                match range {
                    Ok((offset, len)) => (io.op, io.offset, io.len) = (Op::Deallocate, offset, len),
                    Err(status) => {
                        self.slots[slot as usize].io = Some(io);
                        self.respond(slot, status, 0, env);
                        return true;
                    }
                }
                if io.len == 0 {
                    // A range of no blocks: done, without a word to the volume.
                    self.slots[slot as usize].io = Some(io);
                    return self.step_done(slot, env);
                }
            }
            _ => (io.op, io.offset, io.len) = (Op::Flush, 0, 0),
        }
        let nsid = command.nsid();
        let step = self.slots[slot as usize].step;
        let Some(volume) = self.volume(nsid, step) else {
            // A flush of all namespaces where there are none.
            self.slots[slot as usize].io = Some(io);
            self.respond(slot, Status::SUCCESS, 0, env);
            return true;
        };
        self.launch(slot, volume, io, env)
    }

    /// The subsystem is not what it was when the command was decoded: what is not at the volume
    /// yet is judged by what it is now.
    #[cold]
    fn decode_again(&mut self, slot: u16) -> Result<(), Status> {
        let view = self.view.as_ref().ok_or(Status::INTERNAL_ERROR)?;
        let entry = &mut self.slots[slot as usize];
        let command = nvme::ctrl::io::decode(&entry.sqe, &view.info)?;
        let is_other = view
            .info
            .namespace_index(command.nsid())
            .is_some_and(|index| view.volumes[index].attached > entry.decoded);
        if is_other {
            // Another volume is behind the identifier: the host has not seen it yet.
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
        }
        (entry.work, entry.decoded) = (Work::Io(command), view.generation);
        Ok(())
    }

    /// The description of a namespace.
    pub(crate) fn namespace(&self, nsid: u32) -> Option<&NamespaceInfo> {
        self.view.as_ref()?.info.namespace(nsid)
    }

    /// The place of a namespace in the view; if all are meant, of the first after `done`.
    pub(crate) fn volume(&self, nsid: u32, done: u32) -> Option<usize> {
        let view = self.view.as_ref()?;
        if nsid != NSID_ALL {
            return view.info.namespace_index(nsid);
        }
        let index = view.info.namespaces().partition_point(|ns| ns.nsid <= done);
        (index < view.volumes.len()).then_some(index)
    }

    /// Queues the command for memory or room in a channel.
    pub(crate) fn wait(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        self.wait_in(Phase::WaitSubmit, slot, env)
    }

    /// Submits an I/O of a command to number `volume` of the view; `false`: it waits.
    pub(crate) fn launch(
        &mut self,
        slot: u16,
        volume: usize,
        mut io: Box<Io>,
        env: &mut Env<'_>,
    ) -> bool {
        let access = match &self.slots[slot as usize].work {
            Work::Io(command) => command.access(),
            _ => Access::Other,
        };
        if self.conflicts(volume, access) {
            self.keep_io(slot, io);
            let result = self.failed_at(slot);
            self.end(slot, CONFLICT, result, env);
            return true;
        }
        let Some(view) = &self.view else {
            debug_assert!(false, "I/O queues have a view");
            return true;
        };
        let may_go = self.slots[slot as usize].turn.may_go();
        if !may_go && io.op.is_change() && view.volumes[volume].home.locks.blocks(io.offset, io.len)
        {
            let range = (io.offset, io.len);
            self.keep_io(slot, io);
            self.wait_in_line(slot, volume, range, env);
            return true;
        }
        io.tag = u64::from(self.index) << 16 | u64::from(slot);
        let state = &view.volumes[volume];
        let (volume_index, stamp) = (state.index, env.fences.stamp);
        let place = Place { volume: volume_index, offset: io.offset, len: io.len, stamp };
        match env.volumes.submit(state, io) {
            Ok(()) => {
                let entry = &mut self.slots[slot as usize];
                (entry.phase, entry.place) = (Phase::Submitted, place);
                env.sampler.mark(sample::tag(self.index, slot), Stage::Queue);
                if let Work::Io(IoCommand::Flush { nsid: NSID_ALL }) = entry.work {
                    entry.step = view.info.namespaces()[volume].nsid;
                }
                self.at_volume += 1;
                if may_go {
                    self.went(slot, env);
                }
                true
            }
            Err(Refused::Busy(io)) => {
                self.keep_io(slot, io);
                if may_go {
                    self.wait_for_room(slot, env);
                    return true;
                }
                self.wait(slot, env)
            }
            Err(Refused::Failed(io)) => {
                let failed = Failed::of(&io);
                self.keep_io(slot, io);
                self.fail(slot, failed, env);
                true
            }
        }
    }

    /// Puts an I/O back where its command keeps it.
    fn keep_io(&mut self, slot: u16, io: Box<Io>) {
        let entry = &mut self.slots[slot as usize];
        match &entry.work {
            Work::Io(command) if pieces::is_piecewise(command) => entry.pieces.io = Some(io),
            _ => entry.io = Some(io),
        }
    }

    /// Ends a command that the volume failed.
    pub(crate) fn fail(&mut self, slot: u16, failed: Failed, env: &mut Env<'_>) {
        let status = status::of(failed.error, failed.op);
        let result = self.failed_at(slot);
        if failed.error == IoError::Medium {
            self.tally(env, Counters::media_error);
        }
        if matches!(failed.error, IoError::Medium | IoError::Gone | IoError::NoSpace) {
            self.record_error(slot, status, failed.offset);
        }
        self.end(slot, status, result, env);
    }

    /// Dword 0 of a command's completion if it fails now.
    fn failed_at(&self, slot: u16) -> u64 {
        let entry = &self.slots[slot as usize];
        match entry.work {
            // "Dword 0 contains the number of the lowest numbered source range that was not
            // successfully copied" (NVM Command Set 1.0, "Copy command").
            Work::Io(IoCommand::Copy { .. }) => u64::from(entry.step),
            _ => 0,
        }
    }

    /// Puts a failed command into the controller's error log.
    #[cold]
    fn record_error(&self, slot: u16, status: Status, offset: u64) {
        let Some(association) = &self.association else { return };
        let sqe = &self.slots[slot as usize].sqe;
        let nsid = sqe.nsid.get();
        let block_bytes = self.namespace(nsid).map_or(1, |ns| ns.block_bytes);
        association.letters.post_error(ErrorRecord {
            sqid: self.qid,
            cid: self.cid(slot),
            status,
            opcode: sqe.opcode,
            nsid,
            lba: offset / u64::from(block_bytes),
        });
    }

    /// A volume gave an I/O back.
    pub(crate) fn complete(&mut self, slot: u16, io: Box<Io>, env: &mut Env<'_>) {
        self.at_volume -= 1;
        if slot >= PROTECT_SLOT {
            self.own_done(io, env);
            return;
        }
        if env.fences.is_counting() {
            self.count_back(slot, env);
        }
        let tag = sample::tag(self.index, slot);
        env.sampler.mark(tag, Stage::Backend);
        let (op, len, result) = (io.op, io.len, io.result);
        let failed = Failed::of(&io);
        self.keep_io(slot, io);
        if self.life != Life::Open {
            self.drop_pair(slot, env);
            return;
        }
        if result.is_err() {
            self.fail(slot, failed, env);
            return;
        }
        let Work::Io(command) = self.slots[slot as usize].work else {
            debug_assert!(false, "only I/O commands have I/O");
            return;
        };
        if pieces::is_piecewise(&command) {
            self.piece_done(slot, command, env);
            return;
        }
        match op {
            Op::Read => {
                self.tally(env, |counters| counters.read(len));
                self.respond_data(slot, len as u32, 0);
                env.sampler.mark(tag, Stage::Respond);
            }
            _ => {
                if op == Op::Write {
                    self.tally(env, |counters| counters.write(len));
                }
                self.step_done(slot, env);
            }
        }
    }

    /// Tells fences of an I/O that is back.
    #[cold]
    fn count_back(&mut self, slot: u16, env: &mut Env<'_>) {
        let place = self.slots[slot as usize].place;
        if env.fences.back(&place, self.port().id) {
            env.shared.settled();
        }
    }

    /// I/Os at volumes that a scope covers.
    pub(crate) fn count(&self, scope: &Scope) -> usize {
        let port = self.port().id;
        let covers =
            |slot: &&Slot| slot.phase == Phase::Submitted && scope.covers(&slot.place, port);
        if self.at_volume == 0 { 0 } else { self.slots.iter().filter(covers).count() }
    }

    /// Adds to the subsystem's counters of this core, and to the queue's own.
    pub(crate) fn tally(&self, env: &Env<'_>, add: impl Fn(&Counters)) {
        if let (Some(view), Some(counters)) = (&self.view, &self.counters) {
            add(&view.subsystem.counters[env.core]);
            add(counters);
        }
    }

    /// One piece of a command is done; the next is submitted, or the command ends.
    fn step_done(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        let entry = &mut self.slots[slot as usize];
        match entry.work {
            Work::Io(IoCommand::Deallocate { ranges, .. }) => {
                entry.step += 1;
                if entry.step < u32::from(ranges) {
                    return self.submit(slot, env);
                }
            }
            // Answers when there is no namespace left.
            Work::Io(IoCommand::Flush { nsid: NSID_ALL }) => return self.submit(slot, env),
            _ => {}
        }
        self.end(slot, Status::SUCCESS, 0, env);
        true
    }

    /// Submits an I/O that no command asked for; `false`: the volume has no room now.
    pub(crate) fn submit_own(&mut self, volume: usize, io: Box<Io>, env: &mut Env<'_>) -> bool {
        self.submit_as(OWN_SLOT, volume, io, env)
    }

    /// The same for the flush that answers a host's protection of a namespace.
    pub(crate) fn submit_protecting(
        &mut self,
        volume: usize,
        io: Box<Io>,
        env: &mut Env<'_>,
    ) -> bool {
        self.submit_as(PROTECT_SLOT, volume, io, env)
    }

    fn submit_as(&mut self, slot: u16, volume: usize, mut io: Box<Io>, env: &mut Env<'_>) -> bool {
        let Some(view) = &self.view else {
            env.ios.give(io);
            return false;
        };
        io.tag = u64::from(self.index) << 16 | u64::from(slot);
        match env.volumes.submit(&view.volumes[volume], io) {
            Ok(()) => {
                self.at_volume += 1;
                true
            }
            Err(Refused::Busy(io)) => {
                env.ios.give(io);
                false
            }
            Err(Refused::Failed(io)) => {
                self.own_done(io, env);
                true
            }
        }
    }

    fn own_done(&mut self, io: Box<Io>, env: &mut Env<'_>) {
        if io.tag as u16 == PROTECT_SLOT {
            let result = io.result.map(|_| ()).map_err(|error| status::of(error, io.op));
            env.ios.give(io);
            self.protected(result, env);
            return;
        }
        if let Err(error) = io.result {
            tracing::error!(?error, "flushing a volume at shutdown failed");
        }
        env.ios.give(io);
        if self.life == Life::Open
            && let Some(Held::Flushing(nsid)) = self.held
        {
            self.flush_volume(nsid, env);
        }
    }
}
