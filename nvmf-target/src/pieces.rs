//! Commands that the target carries out itself, piece by piece: Compare, Verify and Copy.
//!
//! Each moves through one buffer of [`PIECE_BYTES`] at the most, however much the command is about.
//! The buffer is taken together with the memory for the host's data, before the data comes: no
//! command waits for memory while it holds some.

use block::{Io, Op};
use nvme::ctrl::io::{COPY_RANGE_LEN, IoCommand, copy_check, copy_range};
use nvme::spec::Status;

use crate::conn::Conn;
use crate::core::Env;
use crate::wait::Need;

/// Bytes read or written at a time.
pub(crate) const PIECE_BYTES: u32 = 128 << 10;

/// What a slot has for a command of several pieces.
#[derive(Default)]
pub(crate) struct Pieces {
    /// The I/O of a piece, when it is not at the volume.
    pub(crate) io: Option<Box<Io>>,
    /// Its `data` is the buffer that all pieces go through.
    store: Option<Box<Io>>,
    /// Bytes done of the command, or of a copy's source range number `step`.
    done: u64,
    /// Bytes written by a copy.
    moved: u64,
    /// Bytes of the command, or of the source range, from the last piece on.
    left: u64,
    /// A copy's piece is read and is to be written.
    is_read: bool,
}

impl Pieces {
    /// Takes the buffer, unless it is there or none is needed; `false`: there is no memory.
    pub(crate) fn take_store(&mut self, len: u32, env: &mut Env<'_>) -> bool {
        if len == 0 || self.store.is_some() {
            return true;
        }
        let mut store = env.ios.take();
        if env.pool.alloc(len as usize, &mut store.data).is_err() {
            env.ios.give(store);
            return false;
        }
        self.store = Some(store);
        true
    }

    /// Gives everything back.
    pub(crate) fn clear(&mut self, env: &mut Env<'_>) {
        for io in [self.io.take(), self.store.take()].into_iter().flatten() {
            env.ios.give(io);
        }
        (self.done, self.moved, self.left, self.is_read) = (0, 0, 0, false);
    }
}

/// Whether a command's I/O is made of pieces.
pub(crate) const fn is_piecewise(command: &IoCommand) -> bool {
    matches!(command, IoCommand::Compare { .. } | IoCommand::Verify { .. } | IoCommand::Copy { .. })
}

/// Bytes of memory that a command needs beside the host's data.
pub(crate) fn store_len(command: &IoCommand) -> u32 {
    match *command {
        IoCommand::Compare { len, .. } => len.min(PIECE_BYTES),
        IoCommand::Verify { len, .. } => len.min(PIECE_BYTES.into()) as u32,
        IoCommand::Copy { .. } => PIECE_BYTES,
        _ => 0,
    }
}

impl Conn {
    /// Submits the next piece; `false`: the command waits.
    pub(crate) fn submit_piece(
        &mut self,
        slot: u16,
        command: IoCommand,
        env: &mut Env<'_>,
    ) -> bool {
        if !self.take_store(slot, store_len(&command), env) {
            // Only a Verify comes here without a buffer, and it has nothing else.
            return self.wait(slot, env);
        }
        let done = self.slots[slot as usize].pieces.done;
        let (op, offset, left, is_fua) = match command {
            IoCommand::Compare { offset, len, fua, .. } => {
                (Op::Read, offset + done, u64::from(len) - done, fua)
            }
            IoCommand::Verify { offset, len, fua, .. } => {
                (Op::Read, offset + done, len - done, fua)
            }
            IoCommand::Copy { nsid, offset, ranges, fua } => {
                match self.copy_step(slot, nsid, offset, ranges) {
                    Ok((Op::Write, at, left)) => (Op::Write, at, left, fua),
                    Ok((op, at, left)) => (op, at, left, false),
                    Err(status) => {
                        let step = self.slots[slot as usize].step;
                        self.respond(slot, status, step.into(), env);
                        return true;
                    }
                }
            }
            _ => {
                debug_assert!(false, "{command:?} is done in one");
                return true;
            }
        };
        let Some(volume) = self.volume(command.nsid(), 0) else {
            self.end(slot, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, env);
            return true;
        };
        let len = left.min(PIECE_BYTES.into());
        let pieces = &mut self.slots[slot as usize].pieces;
        pieces.left = left;
        let mut io = pieces.io.take().unwrap_or_else(|| env.ios.take());
        (io.op, io.offset, io.len, io.fua, io.no_unmap) = (op, offset, len, is_fua, false);
        io.data.clear();
        let shared = match &pieces.store {
            Some(store) => io.data.append_range(&store.data, 0, len as usize).is_ok(),
            None => false,
        };
        debug_assert!(shared, "the buffer was taken above and no piece is longer");
        self.launch(slot, volume, io, env)
    }

    fn take_store(&mut self, slot: u16, len: u32, env: &mut Env<'_>) -> bool {
        if len == 0 || self.slots[slot as usize].pieces.store.is_some() {
            return true;
        }
        if !self.may_take(len as usize, Need::Own, env) {
            return false;
        }
        let got = self.slots[slot as usize].pieces.take_store(len, env);
        self.taken(slot, len as usize, got, env)
    }

    /// What a copy does next: read from a source range, or write what was read.
    fn copy_step(
        &self,
        slot: u16,
        nsid: u32,
        offset: u64,
        ranges: u16,
    ) -> Result<(Op, u64, u64), Status> {
        let entry = &self.slots[slot as usize];
        let ns = self.namespace(nsid).ok_or(Status::INVALID_NAMESPACE_OR_FORMAT.dnr())?;
        let range_at = |index: u32| {
            let mut bytes = [0; COPY_RANGE_LEN as usize];
            let at = index as usize * bytes.len();
            entry.io.as_ref()?.data.copy_to_slice(at, &mut bytes).ok()?;
            Some(bytes)
        };
        let Pieces { done, moved, is_read, .. } = entry.pieces;
        if moved == 0 && done == 0 && !is_read {
            copy_check(offset, ranges, ns, |index| range_at(index.into()))?;
        }
        let range = range_at(entry.step).ok_or(Status::DATA_SGL_LENGTH_INVALID.dnr())?;
        let (source, len) = copy_range(&range, ns)?;
        let left = len.checked_sub(done).ok_or(Status::LBA_OUT_OF_RANGE.dnr())?;
        Ok(if is_read {
            (Op::Write, offset + moved, left)
        } else {
            (Op::Read, source + done, left)
        })
    }

    /// A piece is done: what it was for, and then the next or the answer.
    pub(crate) fn piece_done(&mut self, slot: u16, command: IoCommand, env: &mut Env<'_>) {
        let entry = &mut self.slots[slot as usize];
        let pieces = &mut entry.pieces;
        let Some(io) = &pieces.io else {
            debug_assert!(false, "the piece's I/O is back");
            return;
        };
        let len = io.len;
        let total = match command {
            IoCommand::Compare { len: total, .. } => {
                let same = entry.io.as_ref().is_some_and(|host| {
                    host.data.is_equal(pieces.done as usize, &io.data, 0, len as usize) == Ok(true)
                });
                if !same {
                    self.tally(env, |counters| counters.compare(total.into()));
                    // The same data compared again would differ again.
                    self.end(slot, Status::COMPARE_FAILURE.dnr(), 0, env);
                    return;
                }
                u64::from(total)
            }
            IoCommand::Verify { len: total, .. } => total,
            IoCommand::Copy { ranges, .. } => {
                self.copy_piece_done(slot, ranges, len, env);
                return;
            }
            _ => {
                debug_assert!(false, "{command:?} is done in one");
                return;
            }
        };
        pieces.done += len;
        if pieces.done < total {
            self.submit(slot, env);
            return;
        }
        if let IoCommand::Compare { .. } = command {
            self.tally(env, |counters| counters.compare(total));
            self.compared(slot, env);
        } else {
            self.tally(env, |counters| counters.verify(total));
            self.respond(slot, Status::SUCCESS, 0, env);
        }
    }

    fn copy_piece_done(&mut self, slot: u16, ranges: u16, len: u64, env: &mut Env<'_>) {
        let entry = &mut self.slots[slot as usize];
        let pieces = &mut entry.pieces;
        pieces.is_read = !pieces.is_read;
        if !pieces.is_read {
            (pieces.done, pieces.moved) = (pieces.done + len, pieces.moved + len);
            if pieces.left == len {
                (entry.step, pieces.done) = (entry.step + 1, 0);
            }
            if entry.step == ranges.into() {
                self.respond(slot, Status::SUCCESS, 0, env);
                return;
            }
        }
        self.submit(slot, env);
    }
}
