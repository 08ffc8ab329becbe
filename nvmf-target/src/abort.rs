//! Abort commands on their way from an admin queue to the I/O queue that they name, which may be on
//! another core.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme::spec::Status;

use crate::conn::{Conn, Phase};
use crate::core::Env;

/// How an Abort ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The command has completed with Command Abort Requested.
    Aborted,
    /// There is no such command, or it runs to its own end.
    NotAborted,
}

/// One Abort command.
#[derive(Debug)]
pub(crate) struct Abort {
    sqid: u16,
    cid: u16,
    /// 0: open, 1: aborted, 2: not aborted.
    answer: AtomicU8,
}

impl Abort {
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        // Release and Acquire: who sees the answer may tell that the command has completed.
        match self.answer.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Outcome::Aborted),
            _ => Some(Outcome::NotAborted),
        }
    }

    fn answer(&self, outcome: Outcome) {
        let answer = if outcome == Outcome::Aborted { 1 } else { 2 };
        self.answer.store(answer, Ordering::Release);
    }
}

/// Aborts that an association's I/O queues have not answered; at most as many as a host may have
/// outstanding.
#[derive(Debug, Default)]
pub(crate) struct Aborts {
    /// Whether there may be some: all that queues look at otherwise. Relaxed: the lock orders.
    any: AtomicBool,
    list: Mutex<Vec<Arc<Abort>>>,
}

impl Aborts {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Abort>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks queue `sqid` to abort command `cid`; the caller wakes the cores.
    pub(crate) fn ask(&self, sqid: u16, cid: u16) -> Arc<Abort> {
        let abort = Arc::new(Abort { sqid, cid, answer: AtomicU8::new(0) });
        self.list().push(Arc::clone(&abort));
        self.any.store(true, Ordering::Relaxed);
        abort
    }

    /// Whether a queue should look.
    #[inline]
    pub(crate) fn is_asked(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Takes those for queue `qid`; `None`: for all queues.
    fn take(&self, qid: Option<u16>) -> Vec<Arc<Abort>> {
        let mut list = self.list();
        let (taken, left) = list.drain(..).partition(|abort| qid.is_none_or(|q| q == abort.sqid));
        *list = left;
        self.any.store(!list.is_empty(), Ordering::Relaxed);
        taken
    }

    /// The queue is gone, with all its commands; `None`: all queues are.
    pub(crate) fn give_up(&self, qid: Option<u16>) {
        for abort in self.take(qid) {
            abort.answer(Outcome::NotAborted);
        }
    }
}

impl Conn {
    /// Answers the Aborts that name this queue. What is not at a volume yet, and needs nothing more
    /// from the host, is aborted; the rest ends by itself.
    #[cold]
    pub(crate) fn abort_commands(&mut self, env: &mut Env<'_>) {
        let Some(association) = self.association.clone() else { return };
        for abort in association.aborts.take(Some(self.qid)) {
            let found = (0..self.slots.len() as u16).find(|slot| {
                let entry = &self.slots[*slot as usize];
                let waits = match entry.phase {
                    Phase::WaitFetch | Phase::WaitSubmit => true,
                    // A fused command whose other half is not there.
                    Phase::Awaiting => entry.turn.is_paired(),
                    _ => false,
                };
                waits && self.cid(*slot) == abort.cid
            });
            match found {
                Some(slot) => {
                    self.end(slot, Status::COMMAND_ABORT_REQUESTED, 0, env);
                    abort.answer(Outcome::Aborted);
                }
                None => abort.answer(Outcome::NotAborted),
            }
            env.shared.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_queue_takes_its_own_and_a_queue_that_goes_answers_for_its_commands() {
        let aborts = Aborts::default();
        assert!(!aborts.is_asked());
        let (a, b, c) = (aborts.ask(1, 7), aborts.ask(2, 7), aborts.ask(2, 8));
        assert!(aborts.is_asked());
        let taken = aborts.take(Some(1));
        assert!(taken.len() == 1 && Arc::ptr_eq(&taken[0], &a));
        taken[0].answer(Outcome::Aborted);
        assert_eq!(a.outcome(), Some(Outcome::Aborted));
        assert!(aborts.is_asked() && b.outcome().is_none());
        aborts.give_up(Some(2));
        assert_eq!([&b, &c].map(|x| x.outcome()), [Some(Outcome::NotAborted); 2]);
        assert!(!aborts.is_asked());
    }
}
