//! The I/Os a channel has accepted, and where each of them stands.
//!
//! ```text
//!  accept ─► Pending ──issue──► Sent ──all commands settled──► Finished ─► take_finished
//!             ▲  ▲               │ │ may be sent again
//!             │  │   path lost   │ └──────► Delayed ─┐ wake
//!             │  └───────────────┼───────────────────┘
//!             └── Quarantined ◄──┘ a change, and its path's controller may still do it
//! ```
//!
//! No clock, no socket: time comes in as a parameter, and commands are only counted here.
//!
//! # Changes on a lost path
//!
//! What was sent on a path that was lost may be done there at any time, until the controller at its
//! other end has ended. Where there are other paths, a change among that is *quarantined*: it is
//! neither sent again nor given back, because either would let the submitter write the same blocks
//! again and then lose to the old write. [`Table::on_fenced`] ends that. Where there can be no
//! other path, the next association comes after the end of the old controller anyway.
//!
//! A compare and write is quarantined in any case, and then given back as aborted instead of being
//! sent again: compared once more it would differ if it was done.

use std::collections::VecDeque;
use std::time::Duration;

use block::{Io, IoError, Op};

use crate::status::Verdict;

/// First delay before a request is sent again after a status that allows it; doubles each time.
const RETRY_DELAY: Duration = Duration::from_millis(20);
/// How often a request is sent again, on each path once and so often besides, while it is found out
/// whether its namespace is detached: a multiple of the time that takes.
const DOUBTS_MAX: u8 = 4;
/// Longest such delay.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    /// In `pending`; may have been sent in part.
    Pending,
    /// All commands of it are sent, or one failed and no more are wanted.
    Sent,
    /// In `delayed`, until `not_before`.
    Delayed,
    /// All commands of it are settled or lost; waits for `fences`.
    Quarantined,
    /// In `finished`, with its result.
    Finished,
}

#[derive(Debug)]
struct Request {
    place: Place,
    io: Option<Box<Io>>,
    /// Order of acceptance.
    seq: u64,
    /// Bytes for which commands have been sent.
    issued: u64,
    /// Commands not settled.
    commands: u32,
    /// A command of it went down with a path.
    is_lost: bool,
    /// Paths, one bit each, whose old controllers may still do what was lost.
    fences: u16,
    /// Paths, one bit each, that it was refused on and is not sent on while there are others.
    avoid: u16,
    /// The worst its commands came to.
    verdict: Verdict,
    retries: u8,
    not_before: Duration,
}

/// What a request became when its last command was settled or its path lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Commands are still out.
    Not,
    /// It can be given back.
    Finished,
    /// It will be sent again.
    Retry,
}

/// See the [module](self). Bounded by its depth; allocates only when made.
#[derive(Debug)]
pub(crate) struct Table {
    requests: Vec<Request>,
    free: Vec<u16>,
    pending: VecDeque<u16>,
    delayed: Vec<u16>,
    finished: VecDeque<u16>,
    next_seq: u64,
    /// Requests accepted before this one are not held any more.
    abort_below: u64,
    retries_max: u8,
    /// There can be no other path.
    is_single: bool,
    resends: u64,
}

impl Table {
    pub(crate) fn new(depth: u16, retries_max: u8, is_single: bool) -> Table {
        let request = |_| Request {
            place: Place::Free,
            io: None,
            seq: 0,
            issued: 0,
            commands: 0,
            is_lost: false,
            fences: 0,
            avoid: 0,
            verdict: Verdict::Done,
            retries: 0,
            not_before: Duration::ZERO,
        };
        let room = usize::from(depth);
        Table {
            requests: (0..depth).map(request).collect(),
            free: (0..depth).rev().collect(),
            pending: VecDeque::with_capacity(room),
            delayed: Vec::with_capacity(room),
            finished: VecDeque::with_capacity(room),
            next_seq: 0,
            abort_below: 0,
            retries_max,
            is_single,
            resends: 0,
        }
    }

    /// Accepted and not given back.
    pub(crate) fn len(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    pub(crate) fn accept(&mut self, io: Box<Io>) -> Result<(), Box<Io>> {
        let Some(id) = self.free.pop() else { return Err(io) };
        self.requests[usize::from(id)] = Request {
            place: Place::Pending,
            io: Some(io),
            seq: self.next_seq,
            issued: 0,
            commands: 0,
            is_lost: false,
            fences: 0,
            avoid: 0,
            verdict: Verdict::Done,
            retries: 0,
            not_before: Duration::ZERO,
        };
        self.next_seq += 1;
        self.pending.push_back(id);
        Ok(())
    }

    /// The request to be sent next, and how many bytes of it have been sent already.
    #[inline]
    pub(crate) fn front(&self) -> Option<(u16, u64, &Io)> {
        let id = *self.pending.front()?;
        let request = &self.requests[usize::from(id)];
        Some((id, request.issued, request.io.as_deref()?))
    }

    /// Paths that a request is not to be sent on while there are others.
    #[inline]
    pub(crate) fn avoid(&self, id: u16) -> u16 {
        self.requests[usize::from(id)].avoid
    }

    /// Requests sent again so far because a path was lost under them.
    pub(crate) fn resends(&self) -> u64 {
        self.resends
    }

    /// The I/O of a request that has commands out.
    pub(crate) fn io(&self, id: u16) -> Option<&Io> {
        self.requests.get(usize::from(id)).and_then(|request| request.io.as_deref())
    }

    /// A command for `len` more bytes of the front was sent; `is_whole`: it was the last one.
    pub(crate) fn on_issued(&mut self, id: u16, len: u64, is_whole: bool) {
        let request = &mut self.requests[usize::from(id)];
        debug_assert_eq!(request.place, Place::Pending);
        request.issued += len;
        request.commands += 1;
        if is_whole {
            request.place = Place::Sent;
            self.pending.pop_front();
        }
    }

    /// A command of the request was answered. Its memory may still be referred to.
    pub(crate) fn on_answered(&mut self, id: u16, verdict: Verdict) {
        let request = &mut self.requests[usize::from(id)];
        request.verdict = request.verdict.max(verdict);
        if verdict != Verdict::Done {
            self.stop_sending(id);
        }
    }

    /// The rest of the request would be in vain.
    fn stop_sending(&mut self, id: u16) {
        let request = &mut self.requests[usize::from(id)];
        if request.place == Place::Pending {
            request.place = Place::Sent;
            if let Some(at) = self.pending.iter().position(|other| *other == id) {
                self.pending.remove(at);
            }
        }
    }

    /// A command that was answered is not referred to any more. It was sent on path number `path`,
    /// beside which there are `others` that can be used, one bit each.
    pub(crate) fn on_settled(&mut self, id: u16, path: u8, others: u16, now: Duration) -> Settled {
        let request = &mut self.requests[usize::from(id)];
        request.commands -= 1;
        if matches!(request.verdict, Verdict::Retry(_) | Verdict::Doubt(_)) {
            request.avoid |= 1 << path;
        }
        if request.commands > 0 || request.place != Place::Sent {
            return Settled::Not;
        }
        if request.is_lost {
            self.conclude(id);
            return Settled::Not;
        }
        let retries_max = match request.verdict {
            Verdict::Doubt(_) => (DOUBTS_MAX + others.count_ones() as u8).min(self.retries_max),
            _ => self.retries_max,
        };
        match request.verdict {
            Verdict::Done => self.finish(id, Ok(())),
            Verdict::Fail(error) => self.finish(id, Err(error)),
            Verdict::Retry(error) | Verdict::Doubt(error) if request.retries >= retries_max => {
                self.finish(id, Err(error));
            }
            Verdict::Retry(_) | Verdict::Doubt(_) if request.seq < self.abort_below => {
                self.finish(id, Err(IoError::Aborted));
            }
            Verdict::Retry(_) | Verdict::Doubt(_) if others & !request.avoid != 0 => {
                request.retries += 1;
                request.start_again(Place::Pending);
                self.hold(id);
                return Settled::Retry;
            }
            Verdict::Retry(_) | Verdict::Doubt(_) => {
                self.delay(id, now);
                return Settled::Retry;
            }
        }
        Settled::Finished
    }

    /// A command of the request went down with path number `path`: there will be no answer.
    pub(crate) fn on_lost(&mut self, id: u16, path: u8) {
        let request = &mut self.requests[usize::from(id)];
        request.commands -= 1;
        request.is_lost = true;
        let op = request.io.as_ref().map(|io| io.op);
        // What is not sent again is given back, and then it must not be done any more.
        let is_kept = !self.is_single || op == Some(Op::CompareAndWrite);
        if is_kept && op.is_some_and(|op| op.is_change() || op == Op::Reserve) {
            request.fences |= 1 << path;
        }
        let has_more = request.commands > 0;
        self.stop_sending(id);
        if !has_more {
            self.conclude(id);
        }
    }

    /// The controllers that path number `path` has led to so far have ended.
    #[cold]
    pub(crate) fn on_fenced(&mut self, path: u8) {
        for id in 0..self.requests.len() as u16 {
            let request = &mut self.requests[usize::from(id)];
            request.fences &= !(1 << path);
            if request.place == Place::Quarantined && request.fences == 0 {
                self.conclude(id);
            }
        }
    }

    /// No association will be used before all old controllers have ended: what waits for that can
    /// as well be given back.
    #[cold]
    pub(crate) fn fail_quarantined(&mut self, error: IoError) {
        for id in 0..self.requests.len() as u16 {
            if self.requests[usize::from(id)].place == Place::Quarantined {
                self.finish(id, Err(error));
            }
        }
    }

    /// What becomes of a request with lost commands, none of which is out any more.
    #[cold]
    fn conclude(&mut self, id: u16) {
        let request = &mut self.requests[usize::from(id)];
        debug_assert!(request.commands == 0 && request.is_lost);
        if request.fences != 0 {
            request.place = Place::Quarantined;
            return;
        }
        let op = request.io.as_ref().map(|io| io.op);
        match request.verdict {
            // One part failed for good, so what became of the others does not matter.
            Verdict::Fail(error) => self.finish(id, Err(error)),
            _ if request.seq < self.abort_below => self.finish(id, Err(IoError::Aborted)),
            // It may have been done, and then done again would be refused for having been done.
            _ if matches!(op, Some(Op::Reserve | Op::CompareAndWrite)) => {
                self.finish(id, Err(IoError::Aborted));
            }
            _ => {
                self.resends += 1;
                request.start_again(Place::Pending);
                self.hold(id);
            }
        }
    }

    /// Puts a request that is to be sent again among the pending ones, by order of acceptance.
    fn hold(&mut self, id: u16) {
        let seq = self.requests[usize::from(id)].seq;
        let requests = &self.requests;
        let at = self.pending.partition_point(|other| requests[usize::from(*other)].seq < seq);
        self.pending.insert(at, id);
    }

    /// Finishes the front, none of which has been sent, without sending it.
    pub(crate) fn finish_front(&mut self, result: Result<(), IoError>) {
        if let Some(id) = self.pending.pop_front() {
            debug_assert_eq!(self.requests[usize::from(id)].commands, 0);
            self.finish(id, result);
        }
    }

    /// Tries the front, none of which has been sent, again later, as what was refused; fails it with
    /// `error` when that has been done often enough.
    pub(crate) fn delay_front(&mut self, now: Duration, error: IoError) {
        let Some(id) = self.pending.pop_front() else { return };
        let request = &self.requests[usize::from(id)];
        debug_assert_eq!(request.commands, 0);
        if request.retries >= self.retries_max {
            self.finish(id, Err(error));
        } else {
            self.delay(id, now);
        }
    }

    fn delay(&mut self, id: u16, now: Duration) {
        let request = &mut self.requests[usize::from(id)];
        let factor = 1u32 << request.retries.min(16);
        request.not_before = now + (RETRY_DELAY * factor).min(RETRY_DELAY_MAX);
        request.retries += 1;
        request.avoid = 0;
        request.start_again(Place::Delayed);
        self.delayed.push(id);
    }

    /// Fails what is held and not quarantined, so has no command out, and was accepted before number `below`.
    pub(crate) fn fail_held(&mut self, error: IoError, below: u64) {
        let is_doomed = |request: &Request| {
            let is_held = matches!(request.place, Place::Pending | Place::Delayed);
            is_held && request.commands == 0 && request.seq < below
        };
        if !self
            .pending
            .iter()
            .chain(&self.delayed)
            .any(|id| is_doomed(&self.requests[usize::from(*id)]))
        {
            return;
        }
        for id in 0..self.requests.len() as u16 {
            if is_doomed(&self.requests[usize::from(id)]) {
                self.finish(id, Err(error));
            }
        }
        let requests = &self.requests;
        self.pending.retain(|id| requests[usize::from(*id)].place == Place::Pending);
        self.delayed.retain(|id| requests[usize::from(*id)].place == Place::Delayed);
    }

    /// Everything accepted so far that is held, or will be, is given back as aborted.
    pub(crate) fn abort(&mut self) {
        self.abort_below = self.next_seq;
        self.fail_held(IoError::Aborted, self.abort_below);
    }

    /// Fails what is held, whoever submitted it.
    pub(crate) fn fail_all_held(&mut self, error: IoError) {
        self.fail_held(error, u64::MAX);
    }

    /// Requests whose delay is over may be sent again.
    pub(crate) fn wake(&mut self, now: Duration) {
        let mut at = 0;
        while let Some(&id) = self.delayed.get(at) {
            let request = &mut self.requests[usize::from(id)];
            if request.not_before > now {
                at += 1;
                continue;
            }
            request.place = Place::Pending;
            self.delayed.swap_remove(at);
            self.hold(id);
        }
    }

    /// When `wake` has something to do.
    pub(crate) fn next_wake(&self) -> Option<Duration> {
        self.delayed.iter().map(|id| self.requests[usize::from(*id)].not_before).min()
    }

    pub(crate) fn take_finished(&mut self) -> Option<Box<Io>> {
        loop {
            let id = self.finished.pop_front()?;
            let request = &mut self.requests[usize::from(id)];
            debug_assert_eq!(request.place, Place::Finished);
            request.place = Place::Free;
            let io = request.io.take();
            self.free.push(id);
            if io.is_some() {
                return io;
            }
        }
    }

    fn finish(&mut self, id: u16, result: Result<(), IoError>) {
        let request = &mut self.requests[usize::from(id)];
        debug_assert!(request.place != Place::Finished && request.place != Place::Free);
        request.place = Place::Finished;
        request.is_lost = false;
        if let Some(io) = &mut request.io {
            io.result = result;
        }
        self.finished.push_back(id);
    }
}

impl Request {
    /// From its first byte.
    fn start_again(&mut self, place: Place) {
        self.place = place;
        self.issued = 0;
        self.is_lost = false;
        self.verdict = Verdict::Done;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::Op;

    const NOW: Duration = Duration::from_secs(1);

    fn io(tag: u64) -> Box<Io> {
        Box::new(Io { tag, ..Io::new(Op::Write, 0, 4096) })
    }

    fn table() -> Table {
        let mut table = Table::new(4, 2, true);
        for tag in 0..4 {
            table.accept(io(tag)).unwrap();
        }
        table
    }

    fn finished(table: &mut Table) -> Vec<(u64, Result<(), IoError>)> {
        std::iter::from_fn(|| table.take_finished()).map(|io| (io.tag, io.result)).collect()
    }

    /// Sends the front as one command.
    fn send(table: &mut Table) -> u16 {
        let (id, issued, io) = table.front().unwrap();
        let len = io.len - issued;
        table.on_issued(id, len, true);
        id
    }

    fn answer(table: &mut Table, id: u16, verdict: Verdict) -> Settled {
        table.on_answered(id, verdict);
        table.on_settled(id, 0, 0, NOW)
    }

    #[test]
    fn more_than_the_depth_is_given_back() {
        let mut table = table();
        assert_eq!(table.accept(io(9)).unwrap_err().tag, 9);
        let id = send(&mut table);
        assert_eq!(answer(&mut table, id, Verdict::Done), Settled::Finished);
        assert!(table.accept(io(9)).is_err(), "finished, but not taken yet");
        assert_eq!(finished(&mut table), [(0, Ok(()))]);
        assert!(table.accept(io(9)).is_ok());
        assert_eq!(table.len(), 4);
    }

    #[test]
    fn a_lost_path_holds_what_is_not_finished_in_order() {
        let mut table = table();
        let first = send(&mut table);
        let second = send(&mut table);
        // The third is sent in part, the fourth not at all.
        let (third, ..) = table.front().unwrap();
        table.on_issued(third, 512, false);
        // The second is answered but still referred to when the path is lost, so it is done.
        table.on_answered(second, Verdict::Done);
        table.on_lost(first, 0);
        table.on_settled(second, 0, 0, NOW);
        table.on_lost(third, 0);
        assert_eq!(table.resends(), 2);
        assert_eq!(finished(&mut table), [(1, Ok(()))]);
        let order: Vec<(u64, u64)> = (0..3)
            .map(|_| {
                let (_, issued, io) = table.front().unwrap();
                let at = (io.tag, issued);
                send(&mut table);
                at
            })
            .collect();
        assert_eq!(order, [(0, 0), (2, 0), (3, 0)]);
    }

    #[test]
    fn one_failed_part_ends_the_request_when_the_others_are_settled() {
        let mut table = table();
        let (id, ..) = table.front().unwrap();
        table.on_issued(id, 512, false);
        table.on_issued(id, 512, false);
        assert_eq!(answer(&mut table, id, Verdict::Fail(IoError::NoSpace)), Settled::Not);
        // The rest of it is not sent any more.
        assert_eq!(table.front().unwrap().2.tag, 1);
        assert_eq!(answer(&mut table, id, Verdict::Retry(IoError::Medium)), Settled::Finished);
        assert_eq!(finished(&mut table), [(0, Err(IoError::NoSpace))]);
    }

    #[test]
    fn retries_are_delayed_and_bounded() {
        let mut table = Table::new(1, 2, true);
        table.accept(io(0)).unwrap();
        let mut now = NOW;
        for retry in 0..2 {
            let id = send(&mut table);
            table.on_answered(id, Verdict::Retry(IoError::Medium));
            assert_eq!(table.on_settled(id, 0, 0, now), Settled::Retry);
            assert!(table.front().is_none());
            let at = table.next_wake().unwrap();
            assert_eq!(at, now + RETRY_DELAY * (1 << retry));
            table.wake(at - Duration::from_nanos(1));
            assert!(table.front().is_none());
            table.wake(at);
            now = at;
        }
        let id = send(&mut table);
        assert_eq!(answer(&mut table, id, Verdict::Retry(IoError::Medium)), Settled::Finished);
        assert_eq!(finished(&mut table), [(0, Err(IoError::Medium))]);
    }

    #[test]
    fn what_cannot_be_sent_yet_is_delayed_behind_the_others_and_bounded() {
        let mut table = Table::new(2, 2, true);
        table.accept(io(0)).unwrap();
        table.accept(io(1)).unwrap();
        for retry in 0..2 {
            assert_eq!(table.front().unwrap().2.tag, 0);
            table.delay_front(NOW, IoError::Medium);
            assert_eq!(table.front().unwrap().2.tag, 1);
            assert_eq!(table.next_wake(), Some(NOW + RETRY_DELAY * (1 << retry)));
            table.wake(NOW + RETRY_DELAY_MAX);
        }
        table.delay_front(NOW, IoError::Medium);
        assert_eq!(finished(&mut table), [(0, Err(IoError::Medium))]);
        table.delay_front(NOW, IoError::Medium);
        table.abort();
        assert_eq!(finished(&mut table), [(1, Err(IoError::Aborted))]);
    }

    #[test]
    fn abort_gives_back_what_is_held_now_or_later() {
        let mut table = table();
        let sent = send(&mut table);
        table.abort();
        let aborted = Err(IoError::Aborted);
        assert_eq!(finished(&mut table), [(1, aborted), (2, aborted), (3, aborted)]);
        table.accept(io(9)).unwrap();
        table.on_lost(sent, 0);
        assert_eq!(finished(&mut table), [(0, aborted)]);
        // What came after the abort stays.
        assert_eq!(table.front().unwrap().2.tag, 9);
        table.fail_all_held(IoError::Gone);
        assert_eq!(finished(&mut table), [(9, Err(IoError::Gone))]);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_change_lost_with_one_of_several_paths_is_kept_until_its_controller_has_ended() {
        let mut table = Table::new(4, 2, false);
        table.accept(io(0)).unwrap();
        table.accept(Box::new(Io { tag: 1, ..Io::new(Op::Read, 0, 4096) })).unwrap();
        table.accept(io(2)).unwrap();
        let ids: Vec<u16> = (0..3).map(|_| send(&mut table)).collect();
        table.on_lost(ids[0], 3);
        table.on_lost(ids[1], 3);
        // The read goes on at once.
        assert_eq!(table.front().unwrap().2.tag, 1);
        send(&mut table);
        assert!(table.front().is_none());
        // Neither abort nor failure gives the write back.
        table.abort();
        table.fail_all_held(IoError::Gone);
        table.on_fenced(2);
        assert_eq!(finished(&mut table), []);
        table.on_fenced(3);
        assert_eq!(finished(&mut table), [(0, Err(IoError::Aborted))]);
        // A write that failed in one part and was lost in another has to wait as well.
        table.on_answered(ids[2], Verdict::Fail(IoError::NoSpace));
        let mut table = Table::new(4, 2, false);
        table.accept(io(5)).unwrap();
        let (id, ..) = table.front().unwrap();
        table.on_issued(id, 512, false);
        table.on_issued(id, 512, false);
        table.on_lost(id, 0);
        assert!(table.front().is_none(), "the rest is not sent in vain");
        table.on_answered(id, Verdict::Fail(IoError::NoSpace));
        table.on_settled(id, 1, 1, NOW);
        assert_eq!(finished(&mut table), []);
        table.on_fenced(0);
        assert_eq!(finished(&mut table), [(5, Err(IoError::NoSpace))]);
        // Where no path can be used before the old controllers have ended, nothing is kept.
        table.accept(io(6)).unwrap();
        let id = send(&mut table);
        table.on_lost(id, 0);
        table.fail_quarantined(IoError::Gone);
        assert_eq!(finished(&mut table), [(6, Err(IoError::Gone))]);
    }

    #[test]
    fn a_reservation_command_is_not_sent_twice() {
        let mut table = Table::new(4, 2, true);
        table.accept(Box::new(Io { tag: 7, ..Io::new(Op::Reserve, 0, 0) })).unwrap();
        let id = send(&mut table);
        table.on_lost(id, 0);
        assert_eq!(finished(&mut table), [(7, Err(IoError::Aborted))]);
    }

    #[test]
    fn a_compare_and_write_is_not_sent_twice_and_not_given_back_while_it_may_be_done() {
        for is_single in [false, true] {
            // Both lost, or one of them, answered or not.
            for answers in 0..4 {
                let mut table = Table::new(4, 2, is_single);
                let io = Io { tag: 7, ..Io::new(Op::CompareAndWrite, 0, 512) };
                table.accept(Box::new(io)).unwrap();
                let (id, ..) = table.front().unwrap();
                table.on_issued(id, 0, false);
                table.on_issued(id, 512, true);
                for command in 0..2 {
                    if answers & 1 << command == 0 {
                        table.on_lost(id, 0);
                        continue;
                    }
                    // Both answers are judged with the second of them.
                    let is_last = answers == 3 && command == 1;
                    let verdict = match is_last {
                        true => Verdict::Retry(IoError::Medium),
                        false => Verdict::Done,
                    };
                    table.on_answered(id, verdict);
                    table.on_settled(id, 0, 0, NOW);
                }
                if answers == 3 {
                    assert!(table.next_wake().is_some(), "it was not done, and is sent again");
                    continue;
                }
                table.abort();
                table.fail_all_held(IoError::Gone);
                assert_eq!(finished(&mut table), [], "{answers}: its controller lives");
                table.on_fenced(0);
                assert_eq!(finished(&mut table), [(7, Err(IoError::Aborted))], "{answers}");
            }
        }
    }

    #[test]
    fn a_refused_request_tries_each_path_before_it_waits() {
        let mut table = Table::new(1, 5, false);
        table.accept(io(0)).unwrap();
        let others = |path: u8| 0b111 & !(1 << path);
        for (path, avoid) in [(0u8, 0b001), (2, 0b101)] {
            let id = send(&mut table);
            table.on_answered(id, Verdict::Retry(IoError::Medium));
            assert_eq!(table.on_settled(id, path, others(path), NOW), Settled::Retry);
            assert_eq!(table.avoid(table.front().unwrap().0), avoid);
        }
        let id = send(&mut table);
        table.on_answered(id, Verdict::Retry(IoError::Medium));
        assert_eq!(table.on_settled(id, 1, others(1), NOW), Settled::Retry);
        assert!(table.front().is_none() && table.next_wake().is_some());
        assert_eq!(table.avoid(id), 0);
    }

    /// Whatever happens in whatever order, each request comes back exactly once.
    #[test]
    fn random_histories_give_each_request_back_once() {
        for seed in 1..200u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut next = move |n: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                (random >> 20) % n
            };
            let is_single = seed % 2 == 0;
            let paths = if is_single { 1 } else { 3 };
            let mut table = Table::new(8, 3, is_single);
            // Commands out: request, path, and whether it was answered.
            let mut commands: Vec<(u16, u8, bool)> = Vec::new();
            let (mut accepted, mut returned) = (0u64, Vec::new());
            let mut now = NOW;
            for _ in 0..400 {
                now += Duration::from_millis(next(30));
                table.wake(now);
                match next(10) {
                    0 | 1 => accepted += u64::from(table.accept(io(accepted)).is_ok()),
                    2 | 3 => {
                        if let Some((id, issued, io)) = table.front() {
                            let len = if next(2) == 0 { 512 } else { io.len - issued };
                            let is_whole = issued + len == io.len;
                            table.on_issued(id, len, is_whole);
                            commands.push((id, next(paths) as u8, false));
                        }
                    }
                    4 | 5 if !commands.is_empty() => {
                        let at = next(commands.len() as u64) as usize;
                        if !commands[at].2 {
                            let verdicts = [
                                Verdict::Done,
                                Verdict::Done,
                                Verdict::Retry(IoError::Medium),
                                Verdict::Fail(IoError::NoSpace),
                            ];
                            table.on_answered(commands[at].0, verdicts[next(4) as usize]);
                            commands[at].2 = true;
                        }
                    }
                    6 => {
                        if let Some(at) = commands.iter().position(|(.., answered)| *answered) {
                            let (id, path, _) = commands.remove(at);
                            table.on_settled(id, path, next(1 << paths) as u16, now);
                        }
                    }
                    7 if next(4) == 0 => {
                        let lost = next(paths) as u8;
                        let gone: Vec<_> =
                            commands.extract_if(.., |(_, path, _)| *path == lost).collect();
                        for (id, path, is_answered) in gone {
                            if is_answered {
                                table.on_settled(id, path, 0, now);
                            } else {
                                table.on_lost(id, path);
                            }
                        }
                    }
                    9 if next(4) == 0 => table.on_fenced(next(paths) as u8),
                    8 if next(6) == 0 => table.abort(),
                    _ => {}
                }
                returned.extend(std::iter::from_fn(|| table.take_finished()).map(|io| io.tag));
                assert_eq!(table.len() as u64, accepted - returned.len() as u64, "seed {seed}");
            }
            for (id, path, _) in commands.drain(..) {
                table.on_lost(id, path);
            }
            table.fail_quarantined(IoError::Gone);
            table.fail_all_held(IoError::Gone);
            returned.extend(std::iter::from_fn(|| table.take_finished()).map(|io| io.tag));
            returned.sort_unstable();
            assert_eq!(returned, (0..accepted).collect::<Vec<_>>(), "seed {seed}");
        }
    }
}
