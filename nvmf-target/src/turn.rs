//! Commands that wait for their turn: fused pairs, changes that meet one, reservation commands.
//!
//! ```text
//!   Compare, Write ─► Partner ─► Line ─► Fence ─► Go: compare ─► write ─► answers, leave the line
//!   other change where a pair is ──────► Line ─► Go: submit, leave the line
//!   reservation command ─► Job ─► Fence ─► answer
//!   change at a volume when its connection ends ─► in the line until it is back
//! ```
//!
//! What waits here stands in `Env::awaiting` and is looked at once per turn of the core. It does
//! not stand in `wait.rs`'s lists, where those wait who want memory: it has all the memory it needs,
//! and others may be waiting for that very memory.

use std::sync::{Arc, Mutex, PoisonError};

use nvme::ctrl::io::{Fuse, IoCommand, Paired};
use nvme::spec::Status;
use nvme::subsys::reservation::{Access, ReservationEffect};

use crate::conn::{Conn, Life, Phase, Work};
use crate::core::Env;
use crate::fence::{Fence, Scope};
use crate::home::Home;
use crate::locks::Ticket;
use crate::volume::VolumeState;

/// What a command waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Nothing of this module.
    #[default]
    None,
    /// The data of both commands of a pair, or the second command at all: the host.
    Partner,
    /// Those before it in the line of its volume: their volumes.
    Line,
    /// I/O of before: the volumes of all cores.
    Fence,
    /// It is its turn: room in the channel at the most.
    Go,
    /// The control thread.
    Job,
}

/// What came of a job.
#[derive(Debug, Default)]
pub(crate) struct Answer(Mutex<Option<Result<ReservationEffect, Status>>>);

impl Answer {
    pub(crate) fn set(&self, result: Result<ReservationEffect, Status>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    }

    fn take(&self) -> Option<Result<ReservationEffect, Status>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What a slot has of all this.
#[derive(Default)]
pub(crate) struct Turn {
    stage: Stage,
    /// The other command of its pair.
    partner: Option<u16>,
    /// Its place in the line of a volume; a pair's is its first command's.
    place: Option<(Arc<Home>, Ticket)>,
    fences: Vec<Arc<Fence>>,
    answer: Option<Arc<Answer>>,
}

impl Turn {
    /// Whether the command is one of a pair that has not begun.
    pub(crate) fn is_paired(&self) -> bool {
        self.stage == Stage::Partner
    }

    /// Whether it is the command's turn to change what is locked.
    pub(crate) fn may_go(&self) -> bool {
        self.stage == Stage::Go
    }

    fn leave_line(&mut self, env: &Env<'_>) {
        if let Some((home, ticket)) = self.place.take()
            && home.locks.leave(ticket)
        {
            env.shared.wake_all();
        }
    }

    /// Gives everything back.
    pub(crate) fn clear(&mut self, env: &Env<'_>) {
        self.leave_line(env);
        self.fences.clear();
        (self.stage, self.partner, self.answer) = (Stage::None, None, None);
    }
}

impl Conn {
    /// Takes a fused command in, or one that comes where a fused one should; returns what it is.
    #[cold]
    pub(crate) fn pair(
        &mut self,
        slot: u16,
        fuse: Fuse,
        command: Result<IoCommand, Status>,
        env: &mut Env<'_>,
    ) -> Result<IoCommand, Status> {
        let Some(view) = &self.view else { return command };
        let pairing = self.pairing.accept(slot, fuse, command, &view.info);
        if let Some((orphan, status)) = pairing.orphan {
            self.give_up(orphan, status, env);
        }
        match pairing.command {
            Paired::Alone => command,
            Paired::Held => {
                self.turn(slot).stage = Stage::Partner;
                command
            }
            Paired::Both { first } => {
                self.turn(first).partner = Some(slot);
                let turn = self.turn(slot);
                (turn.stage, turn.partner) = (Stage::Partner, Some(first));
                command
            }
            Paired::Refused(status) => Err(status),
            Paired::BothRefused { first, first_status, status } => {
                self.give_up(first, first_status, env);
                Err(status)
            }
        }
    }

    /// The command in this slot is none of the volume's, and came between the two of a pair.
    #[cold]
    pub(crate) fn part_pair(&mut self, slot: u16, env: &mut Env<'_>) {
        let none = Err(Status::INVALID_COMMAND_OPCODE);
        let verdict = self.pair(slot, Fuse::None, none, env);
        debug_assert_eq!(verdict, none, "it is not paired");
    }

    fn turn(&mut self, slot: u16) -> &mut Turn {
        &mut self.slots[slot as usize].turn
    }

    /// Ends a command of a pair that has not begun, as soon as its data is out of the way.
    fn give_up(&mut self, slot: u16, status: Status, env: &mut Env<'_>) {
        let entry = &mut self.slots[slot as usize];
        entry.turn.clear(env);
        match entry.phase {
            Phase::Capsule | Phase::WaitFetch | Phase::Fetching => {
                entry.work = Work::Refuse(status);
            }
            _ => self.respond(slot, status, 0, env),
        }
    }

    /// All data of a command of a pair is here.
    pub(crate) fn pair_ready(&mut self, slot: u16, env: &mut Env<'_>) {
        self.slots[slot as usize].phase = Phase::Awaiting;
        let Some(partner) = self.turn(slot).partner else { return };
        if self.slots[partner as usize].phase != Phase::Awaiting {
            return;
        }
        let first = if self.is_first(slot) { slot } else { partner };
        let Work::Io(IoCommand::Compare { nsid, offset, len, .. }) =
            self.slots[first as usize].work
        else {
            debug_assert!(false, "a pair begins with a Compare");
            return;
        };
        let Some(volume) = self.volume(nsid, 0) else {
            self.end(first, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, env);
            return;
        };
        self.enter_line(first, volume, (offset, len.into()));
        self.follow(first, env);
    }

    fn is_first(&self, slot: u16) -> bool {
        matches!(self.slots[slot as usize].work, Work::Io(IoCommand::Compare { .. }))
    }

    /// Takes a place in the line of number `volume` of the view.
    fn enter_line(&mut self, slot: u16, volume: usize, range: (u64, u64)) {
        let Some(view) = &self.view else { return };
        let home = Arc::clone(&view.volumes[volume].home);
        let is_pair = self.slots[slot as usize].turn.partner.is_some();
        let ticket = home.locks.enter(range.0, range.1, is_pair);
        let entry = &mut self.slots[slot as usize];
        entry.phase = Phase::Awaiting;
        (entry.turn.stage, entry.turn.place) = (Stage::Line, Some((home, ticket)));
    }

    /// The connection has ended, and its host may send the changes that are at volumes once more,
    /// by a path that it has already. What comes by that waits for them: they stand in the line like
    /// a pair whose turn it is, and leave it when the volume gives them back.
    #[cold]
    pub(crate) fn guard_late_changes(&mut self) {
        let Some(view) = self.view.as_ref().filter(|_| self.at_volume > 0) else { return };
        for slot in &mut self.slots {
            let is_late = slot.phase == Phase::Submitted
                && slot.turn.place.is_none()
                && matches!(&slot.work, Work::Io(command) if command.access() == Access::Write);
            // What is not in the view any more, a change of the target waits for.
            let is_its = |volume: &&Arc<VolumeState>| volume.index == slot.place.volume;
            if is_late && let Some(volume) = view.volumes.iter().find(is_its) {
                let ticket = volume.home.locks.enter(slot.place.offset, slot.place.len, true);
                slot.turn.place = Some((Arc::clone(&volume.home), ticket));
            }
        }
    }

    /// A change meets a pair: it goes when that is done.
    #[cold]
    pub(crate) fn wait_in_line(
        &mut self,
        slot: u16,
        volume: usize,
        range: (u64, u64),
        env: &mut Env<'_>,
    ) {
        self.enter_line(slot, volume, range);
        env.awaiting.push((self.index, slot));
    }

    /// It is the command's turn, but there is no room in the channel.
    #[cold]
    pub(crate) fn wait_for_room(&mut self, slot: u16, env: &mut Env<'_>) {
        self.slots[slot as usize].phase = Phase::Awaiting;
        env.awaiting.push((self.index, slot));
    }

    /// A command that had its turn is at the volume: a change leaves the line, as what comes
    /// behind waits for the volume from here on; a pair stays to its end.
    #[cold]
    pub(crate) fn went(&mut self, slot: u16, env: &mut Env<'_>) {
        let turn = &mut self.slots[slot as usize].turn;
        if turn.partner.is_none() {
            turn.clear(env);
        }
    }

    /// Looks after a command in `env.awaiting`. `true`: it has moved on.
    pub(crate) fn follow(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        // The connection that was meant may be gone, and another have its number.
        if self.slots.get(slot as usize).is_none_or(|entry| entry.phase != Phase::Awaiting) {
            return false;
        }
        if self.life != Life::Open {
            self.drop_pair(slot, env);
            return true;
        }
        let turn = &mut self.slots[slot as usize].turn;
        let may_move = match turn.stage {
            Stage::None | Stage::Partner => return false,
            Stage::Line => turn.place.as_ref().is_none_or(|(home, t)| home.locks.may_go(*t)),
            Stage::Fence => turn.fences.iter().all(|fence| fence.is_done()),
            Stage::Go => true,
            Stage::Job => return self.follow_job(slot, env),
        };
        if !may_move {
            env.awaiting.push((self.index, slot));
            return false;
        }
        let (stage, is_pair) = (turn.stage, turn.partner.is_some());
        let home = turn.place.as_ref().map(|(home, _)| Arc::clone(home));
        match (stage, home) {
            (Stage::Line, Some(home)) if is_pair => {
                let Work::Io(IoCommand::Compare { offset, len, .. }) =
                    self.slots[slot as usize].work
                else {
                    debug_assert!(false, "a pair begins with a Compare");
                    return false;
                };
                let scope = |volume| Scope::Range { volume, offset, len: len.into() };
                self.raise(slot, &home, scope, env);
            }
            (Stage::Fence, None) => {
                // A reservation command: nothing of those that lost access can land any more.
                self.respond(slot, Status::SUCCESS, 0, env);
            }
            _ => {
                let turn = self.turn(slot);
                turn.fences.clear();
                turn.stage = Stage::Go;
                self.submit(slot, env);
            }
        }
        true
    }

    /// Waits for fences on all volumes that are `home`'s.
    fn raise(&mut self, slot: u16, home: &Home, scope: impl Fn(u32) -> Scope, env: &mut Env<'_>) {
        let volumes = home.volumes().into_iter();
        let fences = volumes.map(|volume| env.shared.fence(scope(volume))).collect();
        let turn = self.turn(slot);
        (turn.stage, turn.fences) = (Stage::Fence, fences);
        env.awaiting.push((self.index, slot));
    }

    /// The Compare of a pair is done, and equal.
    pub(crate) fn compared(&mut self, slot: u16, env: &mut Env<'_>) {
        let Some(second) = self.turn(slot).partner else {
            self.respond(slot, Status::SUCCESS, 0, env);
            return;
        };
        self.slots[slot as usize].phase = Phase::Awaiting;
        self.turn(second).stage = Stage::Go;
        self.submit(second, env);
    }

    /// Ends a command; if it is one of a pair, both.
    ///
    /// If the first fails the second is not carried out (NVMe Base 2.0, "Fused Operation").
    pub(crate) fn end(&mut self, slot: u16, status: Status, result: u64, env: &mut Env<'_>) {
        let turn = self.turn(slot);
        let has_begun = !turn.is_paired();
        let Some(partner) = turn.partner else {
            if !has_begun {
                self.pairing.abandon();
            }
            self.respond(slot, status, result, env);
            return;
        };
        if self.is_first(slot) {
            self.turn(slot).clear(env);
            self.respond(slot, status, result, env);
            self.give_up(partner, Status::ABORTED_FAILED_FUSED.dnr(), env);
        } else if has_begun {
            self.turn(partner).clear(env);
            self.respond(partner, Status::SUCCESS, 0, env);
            self.respond(slot, status, result, env);
        } else {
            // The data of the second did not arrive: neither was carried out.
            self.give_up(partner, Status::ABORTED_FAILED_FUSED, env);
            self.respond(slot, status, result, env);
        }
    }

    /// Frees a command of a connection that has ended and, with it, the other of its pair.
    pub(crate) fn drop_pair(&mut self, slot: u16, env: &mut Env<'_>) {
        let partner = self.turn(slot).partner;
        self.free(slot, env);
        if let Some(partner) = partner {
            self.free(partner, env);
        }
    }

    /// Whether a reservation keeps this host from the volume.
    #[inline]
    pub(crate) fn conflicts(&mut self, volume: usize, access: Access) -> bool {
        let Some(view) = &self.view else { return false };
        let word = view.volumes[volume].home.word();
        word != 0 && !self.has_rights(volume, word, access)
    }

    #[cold]
    fn has_rights(&mut self, volume: usize, word: u64, access: Access) -> bool {
        let (Some(view), Some(association)) = (&self.view, &self.association) else { return true };
        let VolumeState { serial, home, .. } = &*view.volumes[volume];
        let known = match self.rights {
            Some((of, at, rights)) if of == *serial && at == word => rights,
            _ => {
                let (word, rights) = home.rights(&association.host.hostid);
                self.rights = Some((*serial, word, rights));
                rights
            }
        };
        known.allows(access)
    }

    /// Waits for a reservation command's answer.
    pub(crate) fn wait_for_job(&mut self, slot: u16, answer: Arc<Answer>, env: &mut Env<'_>) {
        let entry = &mut self.slots[slot as usize];
        entry.phase = Phase::Awaiting;
        (entry.turn.stage, entry.turn.answer) = (Stage::Job, Some(answer));
        self.follow(slot, env);
    }

    fn follow_job(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        let turn = self.turn(slot);
        let Some(result) = turn.answer.as_ref().and_then(|answer| answer.take()) else {
            env.awaiting.push((self.index, slot));
            return false;
        };
        turn.answer = None;
        match result {
            Ok(effect) => self.reserved(slot, &effect, env),
            Err(status) => self.respond(slot, status, 0, env),
        }
        true
    }

    /// Lets a reservation command wait until all that was at the volume before is back.
    pub(crate) fn wait_for_volume(&mut self, slot: u16, home: &Home, env: &mut Env<'_>) {
        self.slots[slot as usize].phase = Phase::Awaiting;
        self.raise(slot, home, Scope::Volume, env);
    }
}
