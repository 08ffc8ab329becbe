//! What is looked after while a target runs: growth of backing objects, time in service.
//!
//! A thread of its own: looking at a file may block for as long as its disk does.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::manage::Manager;

/// How soon growth of a file or device is noticed.
const LOOK: Duration = Duration::from_secs(5);
/// Time in service that a crash may take out of the count.
const POWER: Duration = Duration::from_secs(300);

enum Order {
    /// Look at everything again, now.
    Refresh,
}

/// The thread.
pub(crate) struct Caretaker {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Caretaker {
    pub(crate) fn start(manager: Arc<Manager>) -> io::Result<Caretaker> {
        let (orders, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new().name("caretaker".to_owned()).spawn(move || {
            let mut sizes = Vec::new();
            let mut power_kept = Instant::now();
            loop {
                let all = match inbox.recv_timeout(LOOK) {
                    Ok(Order::Refresh) => true,
                    Err(RecvTimeoutError::Timeout) => false,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                manager.refresh_grown(&mut sizes, all);
                manager.keep_what_hosts_set();
                if power_kept.elapsed() >= POWER {
                    power_kept = Instant::now();
                    if let Err(error) = manager.keep_power(false) {
                        tracing::warn!(%error, "cannot note the time in service");
                    }
                }
            }
        })?;
        Ok(Caretaker { orders: Some(orders), thread: Some(thread) })
    }

    /// Looks at every backing object, soon.
    pub(crate) fn refresh(&self) {
        if let Some(orders) = &self.orders {
            // The thread ends only with this sender.
            let _ = orders.send(Order::Refresh);
        }
    }

    /// Ends it. Blocks until what it is doing is done.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Caretaker {
    fn drop(&mut self) {
        self.end();
    }
}
