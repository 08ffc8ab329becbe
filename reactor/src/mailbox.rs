//! Messages from other threads: the core's mailbox, typed channels to one task, and waking a
//! sleeping core.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::core::Spawner;
use crate::error::Full;
use crate::sys;
use crate::wake::WakeFlag;

/// What [`CoreHandle::post`] sends: it runs once, on the core's thread, between two polls of the
/// tasks.
pub type Message = Box<dyn FnOnce(&mut Spawner<'_>) + Send>;

/// The half of a core that other threads see.
pub(crate) struct Mailbox {
    pub(crate) flag: WakeFlag,
    /// Signalled to wake the core; `None` on a simulated core, which never sleeps in a kernel.
    eventfd: Option<OwnedFd>,
    stop: AtomicBool,
    /// Length of `queue`, written under its lock: an empty mailbox costs the core one load.
    len: AtomicUsize,
    queue: Mutex<Queue>,
    depth: usize,
}

struct Queue {
    messages: VecDeque<Message>,
    closed: bool,
}

impl Mailbox {
    pub(crate) fn new(depth: usize, eventfd: Option<OwnedFd>) -> Arc<Mailbox> {
        Arc::new(Mailbox {
            flag: WakeFlag::default(),
            eventfd,
            stop: AtomicBool::new(false),
            len: AtomicUsize::new(0),
            queue: Mutex::new(Queue { messages: VecDeque::with_capacity(depth), closed: false }),
            depth,
        })
    }

    pub(crate) fn eventfd(&self) -> Option<&OwnedFd> {
        self.eventfd.as_ref()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Messages that wait now.
    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    pub(crate) fn pop(&self) -> Option<Message> {
        if self.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut queue = lock(&self.queue);
        let message = queue.messages.pop_front();
        self.len.store(queue.messages.len(), Ordering::Release);
        message
    }

    /// The core is gone: nothing can be posted any more. Messages that were not run are dropped.
    pub(crate) fn close(&self) {
        let left = {
            let mut queue = lock(&self.queue);
            queue.closed = true;
            self.len.store(0, Ordering::Release);
            std::mem::take(&mut queue.messages)
        };
        drop(left); // outside the lock: a message may own a handle to this very mailbox
    }

    fn wake(&self) {
        if self.flag.notify()
            && let Some(eventfd) = &self.eventfd
        {
            sys::eventfd_signal(eventfd);
        }
    }
}

/// A panic in a message's destructor cannot leave the queue half changed, so a poisoned lock is
/// used on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Talks to a core from any thread.
#[derive(Clone)]
pub struct CoreHandle(pub(crate) Arc<Mailbox>);

impl CoreHandle {
    /// Runs `message` on the core, soon: a sleeping core is woken.
    ///
    /// [`Full`] if [`CoreConfig::mailbox_depth`](crate::CoreConfig::mailbox_depth) messages wait,
    /// or the core is gone.
    pub fn post(&self, message: Message) -> Result<(), Full> {
        {
            let mut queue = lock(&self.0.queue);
            if queue.closed || queue.messages.len() >= self.0.depth {
                return Err(Full);
            }
            queue.messages.push_back(message);
            self.0.len.store(queue.messages.len(), Ordering::Release);
        }
        self.0.wake();
        Ok(())
    }

    /// Makes the core run at least one more turn.
    pub fn wake(&self) {
        self.0.wake();
    }

    /// Asks the core to end: [`Core::run`](crate::Core::run) returns when all tasks are done. Tasks
    /// see it in [`Local::is_stopping`](crate::Local::is_stopping).
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Release);
        self.0.wake();
    }
}

impl fmt::Debug for CoreHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreHandle")
            .field("stopping", &self.0.is_stopping())
            .finish_non_exhaustive()
    }
}

struct Shared<T> {
    /// Length of `queue`, written under its lock.
    len: AtomicUsize,
    queue: Mutex<VecDeque<T>>,
    bound: usize,
    senders: AtomicUsize,
    receiver_gone: AtomicBool,
}

/// A bounded queue from any thread to a task on `core`. Sending wakes the core.
///
/// ```
/// # let core = reactor::sim::World::new(1).core();
/// let (sender, receiver) = reactor::channel::<u32>(&core.handle(), 16);
/// sender.send(7).unwrap();
/// assert_eq!(receiver.try_recv(), Some(7));
/// assert_eq!(receiver.try_recv(), None);
/// ```
pub fn channel<T: Send>(core: &CoreHandle, bound: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        len: AtomicUsize::new(0),
        queue: Mutex::new(VecDeque::with_capacity(bound)),
        bound,
        senders: AtomicUsize::new(1),
        receiver_gone: AtomicBool::new(false),
    });
    (Sender { shared: Arc::clone(&shared), core: core.clone() }, Receiver { shared })
}

/// The sending half of [`channel`].
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
    core: CoreHandle,
}

impl<T: Send> Sender<T> {
    /// Queues `value` and wakes the core. Gives the value back if the queue is full or the receiver
    /// is gone.
    pub fn send(&self, value: T) -> Result<(), T> {
        {
            let mut queue = lock(&self.shared.queue);
            if queue.len() >= self.shared.bound || self.is_closed() {
                return Err(value);
            }
            queue.push_back(value);
            self.shared.len.store(queue.len(), Ordering::Release);
        }
        self.core.wake();
        Ok(())
    }

    /// Whether the receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.shared.receiver_gone.load(Ordering::Acquire)
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        // Relaxed: the count only has to be right, the clone came from a living sender.
        self.shared.senders.fetch_add(1, Ordering::Relaxed);
        Sender { shared: Arc::clone(&self.shared), core: self.core.clone() }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.shared.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The task wants to learn that nobody will send again.
            self.core.wake();
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("bound", &self.shared.bound).finish_non_exhaustive()
    }
}

/// The receiving half of [`channel`], owned by a task.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Receiver<T> {
    /// The oldest value, if any. One atomic load when there is none.
    pub fn try_recv(&self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        let mut queue = lock(&self.shared.queue);
        let value = queue.pop_front();
        self.shared.len.store(queue.len(), Ordering::Release);
        value
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.shared.len.load(Ordering::Acquire) == 0
    }

    /// Whether all senders are gone. Values sent before may still wait.
    pub fn is_disconnected(&self) -> bool {
        self.shared.senders.load(Ordering::Acquire) == 0
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.receiver_gone.store(true, Ordering::Release);
        let left = {
            let mut queue = lock(&self.shared.queue);
            self.shared.len.store(0, Ordering::Release);
            std::mem::take(&mut *queue)
        };
        drop(left);
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("bound", &self.shared.bound).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mailbox_is_bounded_and_closes() {
        let mailbox = Mailbox::new(2, None);
        let handle = CoreHandle(Arc::clone(&mailbox));
        handle.post(Box::new(|_| {})).unwrap();
        handle.post(Box::new(|_| {})).unwrap();
        assert_eq!(handle.post(Box::new(|_| {})), Err(Full));
        assert!(mailbox.pop().is_some());
        handle.post(Box::new(|_| {})).unwrap();
        mailbox.close();
        assert!(mailbox.pop().is_none());
        assert_eq!(handle.post(Box::new(|_| {})), Err(Full));
    }

    #[test]
    fn a_channel_gives_back_what_it_cannot_take() {
        let handle = CoreHandle(Mailbox::new(1, None));
        let (sender, receiver) = channel::<u32>(&handle, 2);
        sender.send(1).unwrap();
        sender.send(2).unwrap();
        assert_eq!(sender.send(3), Err(3));
        assert_eq!(receiver.try_recv(), Some(1));
        let second = sender.clone();
        drop(sender);
        assert!(!receiver.is_disconnected());
        assert_eq!(receiver.try_recv(), Some(2));
        assert_eq!(receiver.try_recv(), None);
        drop(receiver);
        assert!(second.is_closed());
        assert_eq!(second.send(4), Err(4));
    }

    #[test]
    fn the_last_sender_to_go_notifies_the_core() {
        let handle = CoreHandle(Mailbox::new(1, None));
        let (sender, receiver) = channel::<u32>(&handle, 2);
        assert!(!handle.0.flag.take());
        drop(sender);
        assert!(receiver.is_disconnected());
        assert!(handle.0.flag.take());
    }
}
