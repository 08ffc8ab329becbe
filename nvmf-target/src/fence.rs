//! Fences: how somebody learns that no I/O of an old state can land any more.
//!
//! What is submitted to a volume is checked against the present state at the moment it is submitted.
//! A change therefore publishes the new state first and raises a fence then: every core takes the
//! new state up, counts what it has at volumes within the fence's scope, and reports when all of it
//! is back. What is submitted later is of the new state and not counted.
//!
//! ```text
//!   change: publish ─► Board::raise ─► wake all cores ─────────────────► all have reported: done
//!   core:   begin of a turn: count, then new table ─► I/O back: count down ─► report at zero
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Which I/O at volumes a fence waits for. Volumes are named by [`VolumeState::index`].
///
/// [`VolumeState::index`]: crate::volume::VolumeState::index
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// None: every core has taken up the present table.
    Table,
    /// All of a volume.
    Volume(u32),
    /// Some volumes' channels: every core has dropped its own, so nothing is left in them.
    Retire(Vec<u32>),
    /// What overlaps a part of a volume, in bytes.
    Range { volume: u32, offset: u64, len: u64 },
    /// What was sent to some volumes through a port; the volumes are sorted.
    Path { port: u16, volumes: Vec<u32> },
}

/// An I/O at a volume, as far as fences tell them apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) volume: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// [`CoreFences::stamp`] when it was submitted.
    pub(crate) stamp: u64,
}

impl Scope {
    /// Whether it covers an I/O of a queue on `port`.
    pub(crate) fn covers(&self, place: &Place, port: u16) -> bool {
        match self {
            Scope::Table | Scope::Retire(_) => false,
            Scope::Volume(volume) => place.volume == *volume,
            Scope::Range { volume, offset, len } => {
                place.volume == *volume
                    && place.offset < offset.saturating_add(*len)
                    && *offset < place.offset.saturating_add(place.len)
            }
            Scope::Path { port: through, volumes } => {
                *through == port && volumes.binary_search(&place.volume).is_ok()
            }
        }
    }
}

/// What is to happen when a fence is done, on the thread that reports last.
type Then = Box<dyn FnOnce() + Send>;

/// One fence; done for good once it is done.
pub(crate) struct Fence {
    pub(crate) scope: Scope,
    /// Cores that have not reported.
    open: AtomicUsize,
    then: Mutex<Option<Then>>,
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fence")
            .field("scope", &self.scope)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl Fence {
    /// Whether no I/O that it waits for can land any more.
    pub(crate) fn is_done(&self) -> bool {
        // Acquire: what the cores' I/O did is visible to who sees this.
        self.open.load(Ordering::Acquire) == 0
    }

    /// One core less; `true`: it was the last.
    fn report(&self) -> bool {
        if self.open.fetch_sub(1, Ordering::AcqRel) != 1 {
            return false;
        }
        let then = self.then.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(then) = then {
            then();
        }
        true
    }
}

#[derive(Debug)]
struct Raised {
    /// The last of them, by number; older ones that every core knows are dropped.
    fences: Vec<(u64, Arc<Fence>)>,
    /// Per core: runs its task, and the number of the last fence that it knows.
    cores: Vec<Option<u64>>,
}

/// Where fences are raised; shared by all cores.
#[derive(Debug)]
pub(crate) struct Board {
    /// Number of the last fence: cores look at it once per turn.
    raised: AtomicU64,
    state: Mutex<Raised>,
    /// Something that [`Board::wait`] waits for may have happened.
    happened: Condvar,
    /// Somebody waits: otherwise there is nobody to notify.
    has_waiters: AtomicBool,
}

impl Board {
    pub(crate) fn new(cores: usize) -> Board {
        let state = Raised { fences: Vec::new(), cores: vec![None; cores] };
        Board {
            raised: AtomicU64::new(0),
            state: Mutex::new(state),
            happened: Condvar::new(),
            has_waiters: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, Raised> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises a fence; the caller wakes the cores. A core that does not run its task has no I/O.
    pub(crate) fn raise(&self, scope: Scope, then: Option<Then>) -> Arc<Fence> {
        let mut state = self.state();
        let open = state.cores.iter().flatten().count();
        let fence = Arc::new(Fence {
            scope,
            // One more, reported below: `then` runs also when no core runs.
            open: AtomicUsize::new(open + 1),
            then: Mutex::new(then),
        });
        if open > 0 {
            let number = self.raised.load(Ordering::Relaxed) + 1;
            state.fences.push((number, Arc::clone(&fence)));
            // Release, together with the lock: whoever sees it sees what was published before.
            self.raised.store(number, Ordering::Release);
        }
        drop(state);
        fence.report();
        fence
    }

    /// The core's task begins to run.
    fn join(&self, core: usize) -> u64 {
        let mut state = self.state();
        let last = self.raised.load(Ordering::Relaxed);
        state.cores[core] = Some(last);
        last
    }

    /// Fences raised after number `known`; returns the number of the last.
    fn take(&self, core: usize, known: u64, into: &mut Vec<Arc<Fence>>) -> u64 {
        let mut state = self.state();
        into.extend(state.fences.iter().filter(|(n, _)| *n > known).map(|(_, f)| Arc::clone(f)));
        let last = self.raised.load(Ordering::Relaxed);
        state.cores[core] = Some(last);
        let all_know = state.cores.iter().flatten().copied().min().unwrap_or(last);
        state.fences.retain(|(number, _)| *number > all_know);
        last
    }

    /// The core's task ends: it reports what it has not taken, and is not asked again.
    fn leave(&self, core: usize, known: u64) {
        let mut left = Vec::new();
        {
            let mut state = self.state();
            state.cores[core] = None;
            left.extend(state.fences.iter().filter(|(n, _)| *n > known).map(|(_, f)| f.clone()));
        }
        for fence in left {
            fence.report();
        }
        self.notify();
    }

    /// Lets whoever waits look again.
    pub(crate) fn notify(&self) {
        if self.has_waiters.load(Ordering::SeqCst) {
            // The lock: a waiter between its look and its sleep is not missed.
            drop(self.state());
            self.happened.notify_all();
        }
    }

    /// Blocks until `is_done`, for at most `limit`. For threads that are no core.
    pub(crate) fn wait(&self, limit: Duration, is_done: &dyn Fn() -> bool) -> bool {
        let begun = Instant::now();
        self.has_waiters.store(true, Ordering::SeqCst);
        loop {
            if is_done() {
                return true;
            }
            let state = self.state();
            if is_done() {
                return true;
            }
            let Some(left) = limit.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())
            else {
                return false;
            };
            drop(self.happened.wait_timeout(state, left));
        }
    }
}

#[derive(Debug)]
struct Pending {
    fence: Arc<Fence>,
    stamp: u64,
    /// I/Os not back yet.
    left: usize,
}

/// A core's side of the fences.
#[derive(Debug)]
pub(crate) struct CoreFences {
    core: usize,
    known: u64,
    /// Grows with every fence that the core takes up: I/O submitted later has a larger one.
    pub(crate) stamp: u64,
    pending: Vec<Pending>,
    /// Fences on channels to drop, reported when they are.
    retiring: Vec<(Vec<u32>, Arc<Fence>)>,
    taken: Vec<Arc<Fence>>,
}

impl CoreFences {
    /// Registers the core.
    pub(crate) fn new(core: usize, board: &Board) -> CoreFences {
        CoreFences {
            core,
            known: board.join(core),
            stamp: 0,
            pending: Vec::new(),
            retiring: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Whether fences were raised that the core has not taken up: one load.
    pub(crate) fn has_news(&self, board: &Board) -> bool {
        board.raised.load(Ordering::Acquire) != self.known
    }

    /// Takes new fences up. `count` tells how many I/Os at volumes a scope covers now. The table is
    /// to be looked at afterwards and before anything is submitted: a fence's change was published
    /// before the fence, so that the table found then has it.
    pub(crate) fn take(&mut self, board: &Board, count: &mut dyn FnMut(&Scope) -> usize) {
        let mut taken = std::mem::take(&mut self.taken);
        self.known = board.take(self.core, self.known, &mut taken);
        self.stamp += 1;
        let mut done = false;
        for fence in taken.drain(..) {
            if let Scope::Retire(volumes) = &fence.scope {
                self.retiring.push((volumes.clone(), fence));
                continue;
            }
            match count(&fence.scope) {
                0 => done |= fence.report(),
                left => self.pending.push(Pending { fence, stamp: self.stamp, left }),
            }
        }
        self.taken = taken;
        if done {
            board.notify();
        }
    }

    /// Whether I/O that comes back is to be told to [`CoreFences::back`].
    #[inline]
    pub(crate) fn is_counting(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether channels are to be dropped.
    #[inline]
    pub(crate) fn is_retiring(&self) -> bool {
        !self.retiring.is_empty()
    }

    /// An I/O is back. `true`: a fence is done.
    #[cold]
    pub(crate) fn back(&mut self, place: &Place, port: u16) -> bool {
        let mut done = false;
        self.pending.retain_mut(|pending| {
            if place.stamp < pending.stamp && pending.fence.scope.covers(place, port) {
                pending.left -= 1;
            }
            if pending.left == 0 {
                done |= pending.fence.report();
            }
            pending.left > 0
        });
        done
    }

    /// Drops channels that fences wait for: `try_drop` does if nothing is in them. `true`: a fence
    /// is done.
    pub(crate) fn retire(&mut self, try_drop: &mut dyn FnMut(u32) -> bool) -> bool {
        let mut done = false;
        self.retiring.retain_mut(|(volumes, fence)| {
            volumes.retain(|volume| !try_drop(*volume));
            if volumes.is_empty() {
                done |= fence.report();
            }
            !volumes.is_empty()
        });
        done
    }

    /// The core's task ends: all its I/O is back.
    pub(crate) fn leave(&mut self, board: &Board) {
        for pending in self.pending.drain(..) {
            pending.fence.report();
        }
        for (_, fence) in self.retiring.drain(..) {
            fence.report();
        }
        board.leave(self.core, self.known);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn counted(done: &Arc<AtomicU32>) -> Option<Then> {
        let done = Arc::clone(done);
        Some(Box::new(move || {
            done.fetch_add(1, Ordering::Relaxed);
        }))
    }

    #[test]
    fn fence_is_done_when_every_running_core_has_nothing_left() {
        let board = Board::new(3);
        let done = Arc::new(AtomicU32::new(0));
        assert!(board.raise(Scope::Table, counted(&done)).is_done(), "no core runs");
        assert_eq!(done.load(Ordering::Relaxed), 1);

        let mut a = CoreFences::new(0, &board);
        let mut b = CoreFences::new(2, &board);
        let fence = board.raise(Scope::Volume(7), counted(&done));
        assert!(a.has_news(&board) && b.has_news(&board) && !fence.is_done());
        a.take(&board, &mut |scope| {
            assert_eq!(*scope, Scope::Volume(7));
            0
        });
        assert!(!a.has_news(&board) && !a.is_counting());
        b.take(&board, &mut |_| 2);
        assert!(b.is_counting() && !fence.is_done());
        b.leave(&board);
        assert!(fence.is_done(), "a core that ends has nothing left");
        assert_eq!(done.load(Ordering::Relaxed), 2, "once per fence");

        // The core that has left is not waited for any more.
        let fence = board.raise(Scope::Table, counted(&done));
        a.take(&board, &mut |_| 0);
        assert!(fence.is_done());
        assert!(board.state().fences.is_empty(), "nothing is kept that all know");
    }

    #[test]
    fn core_that_begins_later_is_not_asked_about_the_past() {
        let board = Board::new(2);
        let mut a = CoreFences::new(0, &board);
        let fence = board.raise(Scope::Table, None);
        let mut b = CoreFences::new(1, &board);
        assert!(!b.has_news(&board));
        a.take(&board, &mut |_| 0);
        assert!(fence.is_done());
        b.leave(&board);
        a.leave(&board);
        assert!(board.raise(Scope::Table, None).is_done());
    }

    #[test]
    fn channels_are_reported_when_all_of_them_are_dropped() {
        let board = Board::new(1);
        let mut core = CoreFences::new(0, &board);
        let fence = board.raise(Scope::Retire(vec![3, 5]), None);
        core.take(&board, &mut |_| unreachable!("channels are not counted"));
        assert!(core.is_retiring());
        assert!(!core.retire(&mut |volume| volume == 3));
        assert!(!fence.is_done());
        assert!(core.retire(&mut |volume| {
            assert_eq!(volume, 5, "the other is dropped already");
            true
        }));
        assert!(fence.is_done() && !core.is_retiring());
    }

    #[test]
    fn waiter_is_woken_by_what_it_waits_for_or_by_the_clock() {
        let board = Arc::new(Board::new(1));
        let mut core = CoreFences::new(0, &board);
        let fence = board.raise(Scope::Table, None);
        assert!(!board.wait(Duration::from_millis(1), &|| fence.is_done()));
        let waiter = std::thread::spawn({
            let (board, fence) = (Arc::clone(&board), Arc::clone(&fence));
            move || board.wait(Duration::from_secs(60), &|| fence.is_done())
        });
        core.take(&board, &mut |_| 0);
        assert!(waiter.join().expect("no panic"));
    }
}
