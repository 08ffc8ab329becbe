//! The I/Os a channel has accepted, and where each of them stands.
//!
//! ```text
//!  accept ─► Pending ──issue──► Sent ──all commands settled──► Finished ─► take_finished
//!               ▲                │ │ may be sent again
//!               │  path lost     │ └──────► Delayed ─┐ wake
//!               └────────────────┴───────────────────┘
//! ```
//!
//! No clock, no socket: time comes in as a parameter, and commands are only counted here.

use std::collections::VecDeque;
use std::time::Duration;

use block::{Io, IoError};

use crate::status::Verdict;

/// First delay before a request is sent again after a status that allows it; doubles each time.
const RETRY_DELAY: Duration = Duration::from_millis(20);
/// Longest such delay.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    /// In `pending`. Only the one in front may have been sent in part.
    Pending,
    /// All commands of it are sent, or one failed and no more are wanted.
    Sent,
    /// In `delayed`, until `not_before`.
    Delayed,
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
    /// A command of it went down with the path.
    is_lost: bool,
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
}

impl Table {
    pub(crate) fn new(depth: u16, retries_max: u8) -> Table {
        let request = |_| Request {
            place: Place::Free,
            io: None,
            seq: 0,
            issued: 0,
            commands: 0,
            is_lost: false,
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
            verdict: Verdict::Done,
            retries: 0,
            not_before: Duration::ZERO,
        };
        self.next_seq += 1;
        self.pending.push_back(id);
        Ok(())
    }

    /// The request to be sent next, and how many bytes of it have been sent already.
    pub(crate) fn front(&self) -> Option<(u16, u64, &Io)> {
        let id = *self.pending.front()?;
        let request = &self.requests[usize::from(id)];
        Some((id, request.issued, request.io.as_deref()?))
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
        if verdict != Verdict::Done && request.place == Place::Pending {
            // The rest would be in vain. It has commands out, so it is the front.
            request.place = Place::Sent;
            self.pending.pop_front();
        }
    }

    /// A command that was answered is not referred to any more.
    pub(crate) fn on_settled(&mut self, id: u16, now: Duration) -> Settled {
        let request = &mut self.requests[usize::from(id)];
        request.commands -= 1;
        if request.commands > 0 || request.is_lost || request.place != Place::Sent {
            return Settled::Not;
        }
        match request.verdict {
            Verdict::Done => self.finish(id, Ok(())),
            Verdict::Fail(error) => self.finish(id, Err(error)),
            Verdict::Retry(error) if request.retries >= self.retries_max => {
                self.finish(id, Err(error));
            }
            Verdict::Retry(_) if request.seq < self.abort_below => {
                self.finish(id, Err(IoError::Aborted));
            }
            Verdict::Retry(_) => {
                let factor = 1u32 << request.retries.min(16);
                request.not_before = now + (RETRY_DELAY * factor).min(RETRY_DELAY_MAX);
                request.retries += 1;
                request.start_again(Place::Delayed);
                self.delayed.push(id);
                return Settled::Retry;
            }
        }
        Settled::Finished
    }

    /// A command of the request went down with the path: there will be no answer.
    pub(crate) fn on_lost(&mut self, id: u16) {
        let request = &mut self.requests[usize::from(id)];
        request.commands -= 1;
        request.is_lost = true;
    }

    /// The old connection is quiet and each of its commands was reported settled or lost: holds
    /// everything not finished, in the order of acceptance. Gives the number of requests that had
    /// been sent.
    pub(crate) fn hold_again(&mut self) -> u64 {
        let mut resends = 0;
        for id in 0..self.requests.len() as u16 {
            let request = &mut self.requests[usize::from(id)];
            debug_assert!(request.commands == 0, "a command was forgotten");
            if !request.is_lost && request.place != Place::Pending {
                continue;
            }
            if let Verdict::Fail(error) = request.verdict {
                // One part failed for good, so what became of the others does not matter.
                self.finish(id, Err(error));
                continue;
            }
            if request.issued > 0 || request.place == Place::Sent {
                resends += 1;
            }
            if request.place == Place::Sent {
                self.pending.push_back(id);
            }
            request.start_again(Place::Pending);
        }
        let requests = &self.requests;
        self.pending.retain(|id| requests[usize::from(*id)].place == Place::Pending);
        self.pending.make_contiguous().sort_unstable_by_key(|id| requests[usize::from(*id)].seq);
        self.fail_held(IoError::Aborted, self.abort_below);
        resends
    }

    /// Finishes the front, none of which has been sent, without sending it.
    pub(crate) fn finish_front(&mut self, result: Result<(), IoError>) {
        if let Some(id) = self.pending.pop_front() {
            debug_assert_eq!(self.requests[usize::from(id)].commands, 0);
            self.finish(id, result);
        }
    }

    /// Fails what is held, so has no command out, and was accepted before number `below`.
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
            self.pending.push_back(id);
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
        let mut table = Table::new(4, 2);
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
        table.on_settled(id, NOW)
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
        table.on_lost(first);
        table.on_settled(second, NOW);
        table.on_lost(third);
        assert_eq!(table.hold_again(), 2);
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
        let mut table = Table::new(1, 2);
        table.accept(io(0)).unwrap();
        let mut now = NOW;
        for retry in 0..2 {
            let id = send(&mut table);
            table.on_answered(id, Verdict::Retry(IoError::Medium));
            assert_eq!(table.on_settled(id, now), Settled::Retry);
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
    fn abort_gives_back_what_is_held_now_or_later() {
        let mut table = table();
        let sent = send(&mut table);
        table.abort();
        let aborted = Err(IoError::Aborted);
        assert_eq!(finished(&mut table), [(1, aborted), (2, aborted), (3, aborted)]);
        table.accept(io(9)).unwrap();
        table.on_lost(sent);
        table.hold_again();
        assert_eq!(finished(&mut table), [(0, aborted)]);
        // What came after the abort stays.
        assert_eq!(table.front().unwrap().2.tag, 9);
        table.fail_all_held(IoError::Gone);
        assert_eq!(finished(&mut table), [(9, Err(IoError::Gone))]);
        assert_eq!(table.len(), 0);
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
            let mut table = Table::new(8, 3);
            // Commands out: request, and whether it was answered.
            let mut commands: Vec<(u16, bool)> = Vec::new();
            let (mut accepted, mut returned) = (0u64, Vec::new());
            let mut now = NOW;
            for _ in 0..400 {
                now += Duration::from_millis(next(30));
                table.wake(now);
                match next(9) {
                    0 | 1 => accepted += u64::from(table.accept(io(accepted)).is_ok()),
                    2 | 3 => {
                        if let Some((id, issued, io)) = table.front() {
                            let len = if next(2) == 0 { 512 } else { io.len - issued };
                            let is_whole = issued + len == io.len;
                            table.on_issued(id, len, is_whole);
                            commands.push((id, false));
                        }
                    }
                    4 | 5 if !commands.is_empty() => {
                        let at = next(commands.len() as u64) as usize;
                        if !commands[at].1 {
                            let verdicts = [
                                Verdict::Done,
                                Verdict::Done,
                                Verdict::Retry(IoError::Medium),
                                Verdict::Fail(IoError::NoSpace),
                            ];
                            table.on_answered(commands[at].0, verdicts[next(4) as usize]);
                            commands[at].1 = true;
                        }
                    }
                    6 => {
                        if let Some(at) = commands.iter().position(|(_, answered)| *answered) {
                            let (id, _) = commands.remove(at);
                            table.on_settled(id, now);
                        }
                    }
                    7 if next(4) == 0 => {
                        for (id, is_answered) in commands.drain(..) {
                            if is_answered {
                                table.on_settled(id, now);
                            } else {
                                table.on_lost(id);
                            }
                        }
                        table.hold_again();
                    }
                    8 if next(6) == 0 => table.abort(),
                    _ => {}
                }
                returned.extend(std::iter::from_fn(|| table.take_finished()).map(|io| io.tag));
                assert_eq!(table.len() as u64, accepted - returned.len() as u64, "seed {seed}");
            }
            for (id, _) in commands.drain(..) {
                table.on_lost(id);
            }
            table.hold_again();
            table.fail_all_held(IoError::Gone);
            returned.extend(std::iter::from_fn(|| table.take_finished()).map(|io| io.tag));
            returned.sort_unstable();
            assert_eq!(returned, (0..accepted).collect::<Vec<_>>(), "seed {seed}");
        }
    }
}
