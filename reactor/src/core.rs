//! The loop of one core.

use std::rc::Rc;
use std::time::Duration;

use iobuf::Pool;

use crate::error::SetupError;
use crate::mailbox::CoreHandle;
use crate::port::Port;

/// Sizes and habits of one core. Build it with `..CoreConfig::default()`.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Operations that may be in flight at once (ring entries). 1 to 16384.
    pub entries: u32,
    /// How long the core looks for work in user space before it sleeps. Zero on a processor it shares with other busy threads.
    pub spin: Duration,
    /// Receive buffers shared by all streams of the core: a power of two, 1 to 32768.
    pub rx_buffers: u16,
    /// Size of each receive buffer, in bytes.
    pub rx_buffer_bytes: u32,
    /// Bound of the core's buffer pool, in bytes. Memory is taken when first used.
    pub pool_bytes: usize,
    /// Processor to bind the calling thread to.
    pub pin_to: Option<usize>,
    /// Messages that may wait in the mailbox.
    pub mailbox_depth: usize,
}

impl Default for CoreConfig {
    fn default() -> Self {
        CoreConfig {
            entries: 1024,
            spin: Duration::from_micros(50),
            rx_buffers: 8,
            rx_buffer_bytes: 256 << 10,
            pool_bytes: 64 << 20,
            pin_to: None,
            mailbox_depth: 1024,
        }
    }
}

/// What a task's `poll` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do.
    Idle,
    /// Something was done; poll again before sleeping.
    Worked,
    /// The task is finished and may be dropped.
    Done,
}

/// A piece of the data path that lives on one core.
pub trait Task {
    /// Does a bounded slice of work. Called every turn; must be cheap when there is nothing to do.
    fn poll(&mut self, now: Duration) -> Progress;

    /// The core is about to sleep: enable notifications (shared-memory doorbells) and check once more. `true`: there is
    /// work, do not sleep.
    fn arm(&mut self) -> bool {
        false
    }

    /// The core is awake again (called once after each `arm`): notifications are no longer needed.
    fn disarm(&mut self) {}

    /// When `poll` wants to run although nothing happened. A deadline in the past keeps the core awake.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// One core: a ring and the tasks on it. Built on the thread that runs it.
pub struct Core {
    local: Local,
}

impl Core {
    /// Sets up the ring, the receive buffers and the pool; binds the thread if asked to.
    pub fn new(config: CoreConfig) -> Result<Core, SetupError> {
        let _ = config;
        todo!()
    }

    /// The services of this core.
    pub fn local(&self) -> Local {
        self.local.clone()
    }

    /// The handle for other threads.
    pub fn handle(&self) -> CoreHandle {
        self.local.handle()
    }

    /// Adds a task.
    pub fn spawn(&mut self, task: Box<dyn Task>) {
        let _ = task;
        todo!()
    }

    /// Runs until [`CoreHandle::stop`] was called and all tasks are done.
    pub fn run(&mut self) {
        todo!()
    }

    /// One turn of the loop. `true` if anything progressed.
    pub fn turn(&mut self, may_sleep: bool) -> bool {
        let _ = may_sleep;
        todo!()
    }
}

/// What a message may do on the core.
pub struct Spawner<'a> {
    local: &'a Local,
    tasks: &'a mut Vec<Box<dyn Task>>,
}

impl Spawner<'_> {
    /// The services of the core.
    pub fn local(&self) -> &Local {
        self.local
    }

    /// Adds a task to the core.
    pub fn spawn(&mut self, task: Box<dyn Task>) {
        self.tasks.push(task);
    }
}

pub(crate) struct Shared {
    pool: Pool,
    handle: CoreHandle,
}

/// Services of a core for the tasks on it. Cheap to clone, not `Send`.
#[derive(Clone)]
pub struct Local(pub(crate) Rc<Shared>);

impl Local {
    /// Time of this turn since an arbitrary origin common to all cores of the process (or of the simulated world).
    pub fn now(&self) -> Duration {
        todo!()
    }

    /// The core's buffer pool.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// A new share of the ring.
    pub fn port(&self) -> Port {
        todo!()
    }

    /// The handle for other threads.
    pub fn handle(&self) -> CoreHandle {
        self.0.handle.clone()
    }

    /// Random bits: from the system, or from the seed of the simulated world.
    pub fn random_u64(&self) -> u64 {
        todo!()
    }

    /// Whether [`CoreHandle::stop`] was called: finish up and say [`Progress::Done`].
    pub fn is_stopping(&self) -> bool {
        self.0.handle.0.is_stopping()
    }
}
