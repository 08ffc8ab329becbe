//! I/O commands of a qpair: from a decoded command to the volume and back.

use block::{Io, IoError, Op};
use nvme::ctrl::io::IoCommand;
use nvme::spec::{NSID_ALL, Status};

use crate::conn::{Conn, Held, Life, Phase, Role, Work};
use crate::core::{Env, Refused};
use crate::status;

/// Slot number of I/O that belongs to no command.
const OWN_SLOT: u16 = u16::MAX;

/// Whether this target carries the command out; it refuses the others as unknown.
pub(crate) const fn executes(command: &IoCommand) -> bool {
    matches!(
        command,
        IoCommand::Read { .. }
            | IoCommand::Write { .. }
            | IoCommand::Flush { .. }
            | IoCommand::WriteZeroes { .. }
            | IoCommand::Deallocate { .. }
            | IoCommand::Advisory { .. }
    )
}

impl Conn {
    /// Hands an I/O command (or its next piece) to the volume; `false`: it waits.
    pub(crate) fn submit(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        let Role::Io { subsystem, .. } = self.role else {
            debug_assert!(false, "I/O commands come on I/O queues");
            return true;
        };
        let served = &env.shared.subsystems[subsystem];
        let entry = &mut self.slots[slot as usize];
        let Work::Io(command) = entry.work else { return true };
        let mut io = entry.io.take().unwrap_or_else(|| env.ios.take());
        io.fua = false;
        io.no_unmap = false;
        let nsid = match command {
            IoCommand::Read { nsid, offset, len, fua } => {
                if io.data.is_empty() && env.pool.alloc(len as usize, &mut io.data).is_err() {
                    entry.io = Some(io);
                    entry.phase = Phase::WaitSubmit;
                    env.waiting.push_back((self.index, slot));
                    return false;
                }
                (io.op, io.offset, io.len, io.fua) = (Op::Read, offset, u64::from(len), fua);
                nsid
            }
            IoCommand::Write { nsid, offset, len, fua } => {
                (io.op, io.offset, io.len, io.fua) = (Op::Write, offset, u64::from(len), fua);
                nsid
            }
            IoCommand::WriteZeroes { nsid, offset, len, no_unmap, fua } => {
                (io.op, io.offset, io.len, io.fua) = (Op::WriteZeroes, offset, len, fua);
                io.no_unmap = no_unmap;
                nsid
            }
            IoCommand::Flush { nsid } => {
                (io.op, io.offset, io.len) = (Op::Flush, 0, 0);
                nsid
            }
            IoCommand::Deallocate { nsid, .. } => {
                let mut range = [0; 16];
                let copied = io.data.copy_to_slice(entry.step as usize * 16, &mut range);
                let info = served.info.namespace(nsid);
                let range = match (copied, info) {
                    (Ok(()), Some(info)) => nvme::ctrl::io::dsm_range(&range, info),
                    _ => Err(Status::DATA_SGL_LENGTH_INVALID.dnr()),
                };
                match range {
                    Ok((offset, len)) => (io.op, io.offset, io.len) = (Op::Deallocate, offset, len),
                    Err(status) => {
                        entry.io = Some(io);
                        self.respond(slot, status, 0, env);
                        return true;
                    }
                }
                nsid
            }
            IoCommand::Advisory { .. } => {
                entry.io = Some(io);
                self.respond(slot, Status::SUCCESS, 0, env);
                return true;
            }
            IoCommand::Compare { .. }
            | IoCommand::Verify { .. }
            | IoCommand::Copy { .. }
            | IoCommand::WriteUncorrectable { .. }
            | IoCommand::ReservationRegister { .. }
            | IoCommand::ReservationAcquire { .. }
            | IoCommand::ReservationRelease { .. }
            | IoCommand::ReservationReport { .. } => {
                debug_assert!(!executes(&command));
                entry.io = Some(io);
                self.respond(slot, Status::INVALID_COMMAND_OPCODE.dnr(), 0, env);
                return true;
            }
        };
        let namespace = if nsid == NSID_ALL {
            entry.step as usize
        } else {
            served.info.namespace_index(nsid).unwrap_or(usize::MAX)
        };
        if io.op == Op::Deallocate && io.len == 0 {
            // A range of no blocks: done, without a word to the volume.
            entry.io = Some(io);
            return self.step_done(slot, env);
        }
        let Some(volume) = served.volumes.get(namespace) else {
            // A flush of all namespaces where there are none.
            entry.io = Some(io);
            self.respond(slot, Status::SUCCESS, 0, env);
            return true;
        };
        io.tag = u64::from(self.index) << 16 | u64::from(slot);
        match env.volumes.submit(env.shared, *volume, io) {
            Ok(()) => {
                entry.phase = Phase::Submitted;
                self.at_volume += 1;
                true
            }
            Err(Refused::Busy(io)) => {
                entry.io = Some(io);
                entry.phase = Phase::WaitSubmit;
                env.waiting.push_back((self.index, slot));
                false
            }
            Err(Refused::Failed(io)) => {
                let error = io.result.err().unwrap_or(IoError::Gone);
                let op = io.op;
                entry.io = Some(io);
                self.respond(slot, status::of(error, op), 0, env);
                true
            }
        }
    }

    /// Tries a waiting command again; `false`: it was queued anew.
    pub(crate) fn retry(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        if self.life != Life::Open {
            return true;
        }
        match self.slots[slot as usize].phase {
            Phase::WaitFetch => self.fetch(slot, env),
            Phase::WaitSubmit => self.submit(slot, env),
            _ => true,
        }
    }

    /// A volume gave an I/O back.
    pub(crate) fn complete(&mut self, slot: u16, io: Box<Io>, env: &mut Env<'_>) {
        self.at_volume -= 1;
        if slot == OWN_SLOT {
            self.own_done(io, env);
            return;
        }
        let entry = &mut self.slots[slot as usize];
        let (op, len, result) = (io.op, io.len, io.result);
        entry.io = Some(io);
        if self.life != Life::Open {
            self.free(slot, env);
            return;
        }
        if let Role::Io { subsystem, .. } = self.role {
            let counters = &env.shared.subsystems[subsystem].counters[env.core];
            match (op, result) {
                (Op::Read, Ok(())) => counters.read(len),
                (Op::Write, Ok(())) => counters.write(len),
                (_, Err(IoError::Medium)) => counters.media_error(),
                _ => {}
            }
        }
        match result {
            Ok(()) if op == Op::Read => self.respond_data(slot, len as u32, 0),
            Ok(()) => {
                self.step_done(slot, env);
            }
            Err(error) => self.respond(slot, status::of(error, op), 0, env),
        }
    }

    /// One piece of a command is done; the next is submitted, or the command ends.
    fn step_done(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        let entry = &mut self.slots[slot as usize];
        entry.step += 1;
        let pieces = match (entry.work, &self.role) {
            (Work::Io(IoCommand::Deallocate { ranges, .. }), _) => u32::from(ranges),
            (Work::Io(IoCommand::Flush { nsid: NSID_ALL }), Role::Io { subsystem, .. }) => {
                env.shared.subsystems[*subsystem].volumes.len() as u32
            }
            _ => 1,
        };
        if entry.step < pieces {
            return self.submit(slot, env);
        }
        self.respond(slot, Status::SUCCESS, 0, env);
        true
    }

    /// Submits an I/O that no command asked for; `false`: the volume has no room now.
    pub(crate) fn submit_own(&mut self, volume: usize, mut io: Box<Io>, env: &mut Env<'_>) -> bool {
        io.tag = u64::from(self.index) << 16 | u64::from(OWN_SLOT);
        match env.volumes.submit(env.shared, volume, io) {
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
        if let Err(error) = io.result {
            tracing::error!(?error, "flushing a volume at shutdown failed");
        }
        env.ios.give(io);
        if self.life == Life::Open
            && let Some(Held::Flushing(index)) = self.held
        {
            self.flush_volume(index + 1, env);
        }
    }
}
