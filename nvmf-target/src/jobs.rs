//! The control thread: what cores want done and may not wait for, such as writing a file.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Jobs that may wait. Each belongs to a command of some host; past this they are refused.
const JOBS_MAX: usize = 1024;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    is_closed: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    arrived: Condvar,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let job = {
                let mut state = self.state();
                loop {
                    if let Some(job) = state.jobs.pop_front() {
                        break job;
                    }
                    if state.is_closed {
                        return;
                    }
                    state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            job();
        }
    }
}

/// One thread that runs jobs in the order they come. Dropping it runs what is left.
#[derive(Default)]
pub(crate) struct Jobs {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

impl Jobs {
    /// Has `job` run, soon; `false`: too many wait, or there is no thread to be had.
    ///
    /// The job tells whoever asked for it, for instance by waking a core.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let inner = Arc::clone(&self.inner);
            let named = std::thread::Builder::new().name("control".to_owned());
            match named.spawn(move || inner.run()) {
                Ok(handle) => *thread = Some(handle),
                Err(error) => {
                    tracing::error!(%error, "no control thread");
                    return false;
                }
            }
        }
        drop(thread);
        let mut state = self.inner.state();
        if state.jobs.len() >= JOBS_MAX {
            return false;
        }
        state.jobs.push_back(Box::new(job));
        drop(state);
        self.inner.arrived.notify_one();
        true
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.inner.state().is_closed = true;
        self.inner.arrived.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A job may hold the last handle to what owns this: the thread cannot wait for itself.
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_in_order_and_to_the_last() {
        let jobs = Jobs::default();
        let (send, receive) = mpsc::channel();
        for n in 0..100 {
            let send = send.clone();
            assert!(jobs.run(move || send.send(n).expect("somebody listens")));
        }
        drop((jobs, send));
        assert!(receive.iter().eq(0..100));
    }

    #[test]
    fn jobs_that_wait_are_bounded() {
        let jobs = Jobs::default();
        let (go, wait) = mpsc::channel::<()>();
        let (begun, has_begun) = mpsc::channel();
        assert!(jobs.run(move || {
            begun.send(()).expect("somebody listens");
            assert!(wait.recv().is_err(), "it ends when the other end goes");
        }));
        has_begun.recv().expect("the first job runs");
        for _ in 0..JOBS_MAX {
            assert!(jobs.run(|| {}));
        }
        assert!(!jobs.run(|| {}), "one too many");
        drop(go);
    }
}
