//! The loop of one core.

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use iobuf::{Pool, Segment, SgList};

use crate::error::SetupError;
use crate::fd::{Fd, SharedFd};
use crate::kernel::{Cqe, Kernel};
use crate::mailbox::{CoreHandle, Mailbox};
use crate::ops::Ops;
use crate::port::Port;
use crate::rx::RxPool;
use crate::sim::SimCore;
use crate::spin::Spin;
use crate::sys;
use crate::uring::Uring;

/// How long a core that is dropped waits for the kernel to let go of its operations. A device that
/// hangs for longer costs memory: what the kernel may still touch is never freed.
const SHUTDOWN_MAX: Duration = Duration::from_secs(5);

/// Zeros that [`Local::zeros`] repeats: a segment for each 16 KiB of a read, and little of the cache.
const ZEROS_BYTES: usize = 16 << 10;

/// Sizes and habits of one core. Build it with `..CoreConfig::default()`.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Operations that may be in flight at once: 1 to 16384.
    pub entries: u32,
    /// How long the core looks for work in user space before it sleeps, at most. It looks for less
    /// long, or not at all, while pauses are longer than half of this, which should be about the
    /// 20 us of the wake-up that looking saves; the other half sees the answer of a peer that has to
    /// wake up first. Zero on a processor that it shares with other busy threads.
    pub spin: Duration,
    /// Receive buffers, shared by all streams of the core: a power of two, 1 to 32768.
    pub rx_buffers: u16,
    /// Size of each receive buffer, in bytes: 64 to 16 MiB.
    pub rx_buffer_bytes: u32,
    /// Use receive buffers up piece by piece (Linux 6.12; without effect before): many connections
    /// with little traffic each then share a buffer.
    pub rx_incremental: bool,
    /// Bound of the core's buffer pool, in bytes. Memory is taken when first used.
    pub pool_bytes: usize,
    /// Bytes of the pool to register with the kernel: reads into them and writes from them skip the
    /// walk over their pages. They take memory at once and for ever, out of what the process may
    /// lock; without the right to lock as much the core goes on unregistered. The pool hands out
    /// its first bytes first, so a part of it serves all but bursts.
    pub pool_registered_bytes: usize,
    /// The core's ring takes only what connections, event counters and open files need: nobody who
    /// takes the process over can have it open a file or make a socket. Devices cannot be polled.
    pub restricted: bool,
    /// Processor to bind the calling thread to.
    pub pin_to: Option<usize>,
    /// Messages that may wait in the mailbox: at least 1.
    pub mailbox_depth: usize,
}

impl Default for CoreConfig {
    fn default() -> Self {
        CoreConfig {
            entries: 1024,
            spin: Duration::from_micros(50),
            rx_buffers: 8,
            rx_buffer_bytes: 256 << 10,
            rx_incremental: false,
            pool_bytes: 64 << 20,
            pool_registered_bytes: 0,
            restricted: false,
            pin_to: None,
            mailbox_depth: 1024,
        }
    }
}

impl CoreConfig {
    fn check(&self) -> Result<(), SetupError> {
        let fail = |setting, value, allowed| Err(SetupError::Config { setting, value, allowed });
        if !(1..=16384).contains(&self.entries) {
            return fail("entries", self.entries.into(), "1 to 16384");
        }
        if !self.rx_buffers.is_power_of_two() || self.rx_buffers > 32768 {
            return fail("rx_buffers", self.rx_buffers.into(), "a power of two, 1 to 32768");
        }
        if !(64..=16 << 20).contains(&self.rx_buffer_bytes) {
            return fail("rx_buffer_bytes", self.rx_buffer_bytes.into(), "64 bytes to 16 MiB");
        }
        if self.mailbox_depth == 0 {
            return fail("mailbox_depth", 0, "at least 1");
        }
        Ok(())
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
    /// Does a bounded slice of work. Called every turn, also while the core spins: it must be cheap
    /// when there is nothing to do.
    fn poll(&mut self, now: Duration) -> Progress;

    /// The core is about to sleep: enable notifications (shared-memory doorbells) and check once
    /// more. `true`: there is work, do not sleep.
    fn arm(&mut self) -> bool {
        false
    }

    /// The core is awake again: notifications are no longer needed. Called once after each `arm`.
    fn disarm(&mut self) {}

    /// When `poll` wants to run although nothing happened. One in the past keeps the core awake.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// One core: a ring and the tasks on it. Built on the thread that runs it.
///
/// ```no_run
/// use std::time::Duration;
/// use reactor::{Core, CoreConfig, Progress, Task};
///
/// struct Hello;
/// impl Task for Hello {
///     fn poll(&mut self, now: Duration) -> Progress {
///         println!("hello at {now:?}");
///         Progress::Done
///     }
/// }
///
/// let mut core = Core::new(CoreConfig { spin: Duration::ZERO, ..CoreConfig::default() })?;
/// core.spawn(Box::new(Hello));
/// core.handle().stop();
/// core.run();
/// # Ok::<(), reactor::SetupError>(())
/// ```
pub struct Core {
    tasks: Vec<Box<dyn Task>>,
    local: Local,
    spin: Spin,
    /// Since when nothing progressed; `None` while something does.
    idle_since: Option<Duration>,
}

impl Core {
    /// Sets up the ring, the receive buffers and the pool; binds the thread if asked to.
    pub fn new(config: CoreConfig) -> Result<Core, SetupError> {
        config.check()?;
        if let Some(cpu) = config.pin_to {
            sys::pin_thread(cpu).map_err(|source| SetupError::Pin { cpu, source })?;
        }
        let eventfd = sys::eventfd().map_err(|e| SetupError::other("an event descriptor", e))?;
        let mailbox = Mailbox::new(config.mailbox_depth, Some(eventfd));
        let rx = RxPool::new(config.rx_buffers, config.rx_buffer_bytes, true)
            .map_err(|e| SetupError::other("receive buffers", e))?;
        let ring = Uring::new(&config, Rc::clone(&rx), Arc::clone(&mailbox))?;
        Core::build(&config, CoreHandle(mailbox), rx, Kernel::Uring(Box::new(ring)), None)
    }

    /// A core on the kernel of a simulated world.
    pub(crate) fn simulated(config: CoreConfig, sim: SimCore) -> Result<Core, SetupError> {
        config.check()?;
        let mailbox = Mailbox::new(config.mailbox_depth, None);
        let rx = RxPool::new(config.rx_buffers, config.rx_buffer_bytes, false)
            .map_err(|e| SetupError::other("receive buffers", e))?;
        let kernel = Kernel::Sim(Box::new(sim.kernel(Rc::clone(&rx))));
        Core::build(&config, CoreHandle(mailbox), rx, kernel, Some(sim))
    }

    fn build(
        config: &CoreConfig,
        handle: CoreHandle,
        rx: Rc<RxPool>,
        kernel: Kernel,
        sim: Option<SimCore>,
    ) -> Result<Core, SetupError> {
        let pool = Pool::new(config.pool_bytes)
            .map_err(|e| SetupError::other("the buffer pool of a core", e))?;
        let mut kernel = kernel;
        if config.pool_registered_bytes > 0 {
            kernel.register_pool(&pool, config.pool_registered_bytes);
        }
        let shared = Rc::new(Shared {
            ops: RefCell::new(Ops::new(kernel, config.entries)),
            rx,
            pool,
            zeros: OnceCell::new(),
            handle,
            sim,
            now: Cell::new(Duration::ZERO),
            is_long: Cell::new(false),
            cqes: Cell::new(Vec::with_capacity(2 * config.entries as usize)),
        });
        shared.read_clock();
        let spin = Spin::new(config.spin);
        Ok(Core { tasks: Vec::new(), local: Local(shared), spin, idle_since: None })
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
        self.tasks.push(task);
    }

    /// Tasks that are not done.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// Runs until [`CoreHandle::stop`] was called and all tasks are done. A simulated core also
    /// returns when nothing can happen any more without its world.
    pub fn run(&mut self) {
        while !(self.local.is_stopping() && self.tasks.is_empty()) {
            let progressed = self.turn(true);
            if !progressed && self.local.0.sim.is_some() {
                return;
            }
        }
    }

    /// One turn of the loop. `true` if anything progressed.
    ///
    /// With `may_sleep`, and after up to [`CoreConfig::spin`] without progress, the turn blocks until
    /// there is something to do.
    pub fn turn(&mut self, may_sleep: bool) -> bool {
        let now = self.local.0.read_clock();
        self.local.0.is_long.set(false);
        let mut progressed = self.local.0.handle.0.flag.take();
        progressed |= self.run_messages();
        progressed |= self.poll_tasks(now);
        progressed |= self.local.0.enter_and_reap();
        if progressed {
            if let Some(idle_since) = self.idle_since.take() {
                self.spin.on_found(now.saturating_sub(idle_since));
            }
            return true;
        }
        if !may_sleep {
            return false;
        }
        let idle_since = *self.idle_since.get_or_insert(now);
        if now.saturating_sub(idle_since) < self.spin.time() {
            std::hint::spin_loop();
            return false;
        }
        self.sleep(now)
    }

    /// Runs what is in the mailbox now; what messages post themselves waits for the next turn.
    fn run_messages(&mut self) -> bool {
        let mailbox = &self.local.0.handle.0;
        let count = mailbox.len();
        for _ in 0..count {
            let Some(message) = mailbox.pop() else { break };
            message(&mut Spawner { local: &self.local, tasks: &mut self.tasks });
        }
        count > 0
    }

    fn poll_tasks(&mut self, now: Duration) -> bool {
        let mut progressed = false;
        let mut index = 0;
        while let Some(task) = self.tasks.get_mut(index) {
            match task.poll(now) {
                Progress::Idle => index += 1,
                Progress::Worked => {
                    progressed = true;
                    index += 1;
                }
                Progress::Done => {
                    progressed = true;
                    drop(self.tasks.remove(index));
                }
            }
        }
        progressed
    }

    fn sleep(&mut self, now: Duration) -> bool {
        let must_stay = self.arm() || self.local.0.has_pending();
        let deadline = self.deadline();
        let is_due = deadline.is_some_and(|deadline| deadline <= now);
        let mailbox = &self.local.0.handle.0;
        if must_stay || is_due || !mailbox.flag.try_sleep() {
            self.disarm();
            return must_stay;
        }
        let timeout = deadline.map(|deadline| deadline.saturating_sub(now));
        self.local.0.ops.borrow_mut().kernel.sleep(timeout);
        mailbox.flag.woke();
        let idle_since = self.idle_since.unwrap_or(now);
        self.spin.on_slept(self.local.0.read_clock().saturating_sub(idle_since));
        self.disarm();
        // What woke the core may be the first of a burst: spin again before the next sleep.
        self.idle_since = None;
        self.local.0.reap()
    }

    /// Prepares for sleep: the ring makes all receives, and all tasks are armed. `true`: one of them
    /// has work.
    pub(crate) fn arm(&mut self) -> bool {
        self.local.0.ops.borrow_mut().give_up_look(true);
        let mut has_work = false;
        for task in &mut self.tasks {
            has_work |= task.arm();
        }
        has_work
    }

    pub(crate) fn disarm(&mut self) {
        for task in &mut self.tasks {
            task.disarm();
        }
    }

    /// The earliest deadline of the tasks.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.tasks.iter().filter_map(|task| task.deadline()).min()
    }

    /// Whether a notice waits that the next turn will act on.
    pub(crate) fn is_notified(&self) -> bool {
        self.local.0.handle.0.flag.is_notified()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.local.0
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.local.0.handle.0.close();
        // Tasks first: their ports and streams cancel what is in flight.
        self.tasks.clear();
        self.local.0.shutdown();
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("tasks", &self.tasks.len()).finish_non_exhaustive()
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

impl fmt::Debug for Spawner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spawner").finish_non_exhaustive()
    }
}

/// What all handles of one core share.
pub(crate) struct Shared {
    /// Never borrowed while foreign code runs (tasks, messages, holds).
    pub(crate) ops: RefCell<Ops>,
    pub(crate) rx: Rc<RxPool>,
    pool: Pool,
    /// See [`Local::zeros`]. Empty if the pool had no memory for it.
    zeros: OnceCell<SgList>,
    handle: CoreHandle,
    sim: Option<SimCore>,
    now: Cell<Duration>,
    /// Whether this turn has had its long step.
    is_long: Cell<bool>,
    /// Reused by each reap.
    cqes: Cell<Vec<Cqe>>,
}

impl Shared {
    /// The one reading of the clock in a turn.
    fn read_clock(&self) -> Duration {
        let now = match &self.sim {
            Some(sim) => sim.now(),
            None => monotonic_now(),
        };
        self.now.set(now);
        now
    }

    fn enter_and_reap(&self) -> bool {
        {
            let mut ops = self.ops.borrow_mut();
            ops.retry(&self.rx);
            ops.kernel.enter();
            ops.look(&self.rx);
        }
        self.reap()
    }

    /// Records what completed; frees what is finished.
    fn reap(&self) -> bool {
        let mut cqes = self.cqes.take();
        let progressed = {
            let mut ops = self.ops.borrow_mut();
            let woken = ops.kernel.reap(&mut cqes);
            for cqe in cqes.drain(..) {
                ops.on_cqe(cqe, &self.rx);
            }
            ops.take_recorded() | woken
        };
        self.cqes.set(cqes);
        self.retire();
        progressed
    }

    /// Whether an operation waits for room or a buffer that is there, or the kernel for us.
    fn has_pending(&self) -> bool {
        let ops = self.ops.borrow();
        ops.has_backlog() || ops.can_feed(&self.rx) || ops.kernel.must_stay()
    }

    /// Lets go of what finished operations held. Holds run foreign code, so `ops` is not borrowed
    /// meanwhile.
    fn retire(&self) {
        loop {
            let finished = self.ops.borrow_mut().take_finished();
            let Some(finished) = finished else { break };
            let (index, segments) = finished.release();
            self.ops.borrow_mut().recycle(index, segments);
        }
    }

    pub(crate) fn is_simulated(&self) -> bool {
        self.sim.is_some()
    }

    /// When the simulated kernel has something to do.
    pub(crate) fn next_event(&self) -> Option<Duration> {
        self.ops.borrow().kernel.next_event()
    }

    /// Cancels everything and waits until the kernel has let go.
    fn shutdown(self: &Rc<Self>) {
        {
            let mut ops = self.ops.borrow_mut();
            ops.close();
            ops.kernel.abandon();
        }
        let start = Instant::now();
        loop {
            self.enter_and_reap();
            {
                let mut ops = self.ops.borrow_mut();
                if ops.flying() == 0 && ops.kernel.quiesce() {
                    break;
                }
            }
            if start.elapsed() > SHUTDOWN_MAX {
                // The kernel may still write to memory of these operations, whenever the device
                // comes back: keep it all, for ever.
                std::mem::forget(Rc::clone(self));
                break;
            }
            let nap = Duration::from_millis(10);
            self.ops.borrow_mut().kernel.sleep(Some(nap));
        }
    }
}

/// Time since the first reading in this process, the same for all its threads.
fn monotonic_now() -> Duration {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    ORIGIN.get_or_init(Instant::now).elapsed()
}

/// Services of a core for the tasks on it. Cheap to clone, not `Send`.
#[derive(Clone)]
pub struct Local(pub(crate) Rc<Shared>);

impl Local {
    /// Time of this turn, since an arbitrary origin common to all cores of the process (or of the
    /// simulated world).
    pub fn now(&self) -> Duration {
        self.0.now.get()
    }

    /// Whether a step of some 100 us, such as one of a TLS handshake, may be done in this turn: one
    /// may, so that the I/O of others goes on in between. Whoever does it says
    /// [`take_long_step`](Local::take_long_step); whoever may not yet has a deadline that is due.
    pub fn has_long_step(&self) -> bool {
        !self.0.is_long.get()
    }

    /// This turn's long step is taken.
    pub fn take_long_step(&self) {
        self.0.is_long.set(true);
    }

    /// The core's buffer pool.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Fills `into` with `len` bytes of zeros, which all share one piece of memory of the core that
    /// nobody writes to: they are for sending and reading. `false`: the pool had no memory for that
    /// piece, and `into` is empty.
    pub fn zeros(&self, len: usize, into: &mut SgList) -> bool {
        into.clear();
        let zeros = self.shared_zeros();
        let mut left = len;
        while left > 0 && !zeros.is_empty() {
            let part = left.min(zeros.len());
            if into.append_range(zeros, 0, part).is_err() {
                break;
            }
            left -= part;
        }
        if left > 0 {
            into.clear();
        }
        left == 0
    }

    /// Whether `data` is what [`Local::zeros`] gave.
    pub fn is_zeros(&self, data: &SgList) -> bool {
        let Some(zeros) = self.0.zeros.get() else { return false };
        let start = |list: &SgList| list.segments().first().map(Segment::as_ptr);
        // One page of a pool is in one list alone, or in the copies that `zeros` makes.
        !data.is_empty() && start(zeros) == start(data)
    }

    fn shared_zeros(&self) -> &SgList {
        self.0.zeros.get_or_init(|| {
            let mut zeros = SgList::default();
            if self.pool().alloc(ZEROS_BYTES, &mut zeros).is_ok() {
                let filled = zeros.fill(0, ZEROS_BYTES, 0);
                debug_assert!(filled.is_ok(), "the list has this length");
            }
            zeros
        })
    }

    /// A new share of the ring.
    pub fn port(&self) -> Port {
        Port::new(self)
    }

    /// A new share of the ring whose reads and writes are polled: instead of an interrupt the core
    /// asks the device, again and again, and does not sleep until it has answered. Everything else
    /// of the port works as usual.
    ///
    /// Takes a system call for the first one of a core. Polled I/O works on files opened for direct
    /// I/O whose device has polled queues; elsewhere it fails with
    /// [`Errno::NOT_SUPPORTED`](crate::Errno::NOT_SUPPORTED). It is never cancelled.
    pub fn polled_port(&self) -> io::Result<Port> {
        self.0.ops.borrow_mut().kernel.enable_polling()?;
        Ok(Port::polled(self))
    }

    /// A descriptor that the kernel has looked up already: cheaper to use than `Fd::from`, which
    /// this falls back to when the core's table of files is full.
    ///
    /// The file stays open until the core's next turn after the last clone is gone. Takes a system
    /// call.
    pub fn register(&self, file: SharedFd) -> Fd {
        self.0.ops.borrow_mut().kernel.register(file)
    }

    /// The handle for other threads.
    pub fn handle(&self) -> CoreHandle {
        self.0.handle.clone()
    }

    /// Random bits: from the system, or from the seed of the simulated world.
    pub fn random_u64(&self) -> u64 {
        match &self.0.sim {
            Some(sim) => sim.random_u64(),
            None => sys::random_u64(),
        }
    }

    /// Whether [`CoreHandle::stop`] was called: finish up and say [`Progress::Done`].
    pub fn is_stopping(&self) -> bool {
        self.0.handle.0.is_stopping()
    }
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").field("now", &self.now()).finish_non_exhaustive()
    }
}
