//! A host core with a remote volume and its channels, a target core, and virtual time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{Busy, Channel, Io, IoError, Op, Volume};
use nvme::spec::Nqn;
use nvme::subsys::{Limits, SubsystemInfo};
use nvmf_initiator::{Phase, RemoteConfig, RemoteState, RemoteVolume};
use reactor::sim::World;
use reactor::{Core, CoreHandle, Local, Progress, Task};

use crate::allocations::Allocations;
use crate::fake::{self, Fake, HOSTNQN, SUBNQN, Script, Tls};

/// Virtual time that nothing here takes.
pub const LIMIT: Duration = Duration::from_secs(600);
/// Index of the target's core in [`Rig::cores`]; hosts come after it.
pub const TARGET: usize = 0;

#[derive(Default)]
pub struct Mailbox {
    submit: VecDeque<Box<Io>>,
    done: Vec<Box<Io>>,
    /// Given back by `submit`.
    busy: u64,
    abort: bool,
    close: bool,
    /// In the channel's `submit` and `poll`.
    allocations: Allocations,
    /// What must be free in the pool when the memory of all I/O just done is.
    free: Option<usize>,
}

/// Owns a channel, as a device would: submits, then polls, each turn.
struct Owner {
    channel: Option<Box<dyn Channel>>,
    mailbox: Rc<RefCell<Mailbox>>,
    local: Local,
}

impl Task for Owner {
    fn poll(&mut self, _now: Duration) -> Progress {
        let mailbox = &mut *self.mailbox.borrow_mut();
        let Some(channel) = &mut self.channel else { return Progress::Done };
        let mut progressed = false;
        if std::mem::take(&mut mailbox.abort) {
            channel.abort();
            progressed = true;
        }
        while let Some(io) = mailbox.submit.pop_front() {
            progressed = true;
            let submitted = mailbox.allocations.watch(|| channel.submit(io));
            if let Err(Busy(io)) = submitted {
                mailbox.submit.push_front(io);
                mailbox.busy += 1;
                break;
            }
        }
        let before = mailbox.done.len();
        let in_flight = channel.in_flight();
        mailbox.done.reserve(in_flight);
        let done_list = &mut mailbox.done;
        mailbox.allocations.watch(|| channel.poll(&mut |io| done_list.push(io)));
        let done = mailbox.done.len() - before;
        assert_eq!(channel.in_flight() + done, in_flight, "an I/O was lost or made up");
        if let Some(free) = mailbox.free
            && done > 0
        {
            mailbox.done.iter_mut().for_each(|io| io.data.clear());
            assert_eq!(self.local.pool().available(), free, "given back while it is in use");
        }
        if mailbox.close {
            self.channel = None;
        }
        // Busy I/O waits for others to end, not for another turn.
        if done > 0 || progressed && mailbox.submit.is_empty() {
            Progress::Worked
        } else {
            Progress::Idle
        }
    }

    fn deadline(&self) -> Option<Duration> {
        self.channel.as_ref().and_then(|channel| channel.deadline())
    }
}

/// One channel, from the test's side.
#[derive(Clone)]
pub struct Disk {
    mailbox: Rc<RefCell<Mailbox>>,
    local: Local,
    core: CoreHandle,
}

impl Disk {
    pub fn submit(&self, io: Box<Io>) {
        self.mailbox.borrow_mut().submit.push_back(io);
        self.core.wake();
    }

    pub fn write(&self, tag: u64, offset: u64, bytes: &[u8]) {
        let mut io = Box::new(Io { tag, ..Io::new(Op::Write, offset, bytes.len() as u64) });
        self.local.pool().alloc(bytes.len(), &mut io.data).unwrap();
        io.data.copy_from_slice(0, bytes).unwrap();
        self.submit(io);
    }

    pub fn read(&self, tag: u64, offset: u64, len: usize) {
        let mut io = Box::new(Io { tag, ..Io::new(Op::Read, offset, len as u64) });
        self.local.pool().alloc(len, &mut io.data).unwrap();
        io.data.fill(0, len, 0xee).unwrap();
        self.submit(io);
    }

    pub fn compare(&self, tag: u64, offset: u64, bytes: &[u8]) {
        let mut io = Box::new(Io { tag, ..Io::new(Op::Compare, offset, bytes.len() as u64) });
        self.local.pool().alloc(bytes.len(), &mut io.data).unwrap();
        io.data.copy_from_slice(0, bytes).unwrap();
        self.submit(io);
    }

    pub fn compare_and_write(&self, tag: u64, offset: u64, old: &[u8], new: &[u8]) {
        let len = old.len() as u64;
        let mut io = Box::new(Io { tag, ..Io::new(Op::CompareAndWrite, offset, len) });
        self.local.pool().alloc(2 * old.len(), &mut io.data).unwrap();
        io.data.copy_from_slice(0, old).unwrap();
        io.data.copy_from_slice(old.len(), new).unwrap();
        self.submit(io);
    }

    pub fn op(&self, tag: u64, op: Op, offset: u64, len: u64) {
        self.submit(Box::new(Io { tag, ..Io::new(op, offset, len) }));
    }

    pub fn abort(&self) {
        self.mailbox.borrow_mut().abort = true;
        self.core.wake();
    }

    pub fn close(&self) {
        self.mailbox.borrow_mut().close = true;
        self.core.wake();
    }

    pub fn take_done(&self) -> Vec<Box<Io>> {
        std::mem::take(&mut self.mailbox.borrow_mut().done)
    }

    pub fn done(&self) -> usize {
        self.mailbox.borrow().done.len()
    }

    /// From now on checks, at the moment when I/O comes back, that nobody else still refers to its
    /// memory.
    pub fn expect_free(&self, bytes: usize) {
        self.mailbox.borrow_mut().free = Some(bytes);
    }

    /// Heap allocations made inside the channel's `submit` and `poll` so far.
    pub fn allocations(&self) -> u64 {
        self.mailbox.borrow().allocations.count
    }

    pub fn busy(&self) -> u64 {
        self.mailbox.borrow().busy
    }
}

pub fn bytes_of(io: &Io) -> Vec<u8> {
    let mut bytes = vec![0; io.data.len()];
    io.data.copy_to_slice(0, &mut bytes).unwrap();
    bytes
}

/// Bytes that say where they belong, so that misplaced ones are noticed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let word = |i: usize| (seed ^ (i as u64 / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    (0..len).map(|i| word(i)[i % 8] ^ seed as u8).collect()
}

pub struct Rig {
    pub world: World,
    pub cores: Vec<Core>,
    pub fake: Rc<Fake>,
    pub volume: Arc<RemoteVolume>,
}

/// Sizes and habits of a [`Rig`].
pub struct Setup {
    pub seed: u64,
    pub blocks: u64,
    pub limits: Limits,
    pub script: Script,
    pub hosts: usize,
    pub tls: Option<Rc<Tls>>,
    /// Changes to the defaults of the volume.
    pub config: Box<dyn Fn(RemoteConfig) -> RemoteConfig>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            seed: 1,
            blocks: 16 << 10, // 8 MiB
            limits: Limits::default(),
            script: Script::default(),
            hosts: 1,
            tls: None,
            config: Box::new(|config| config),
        }
    }
}

pub fn nqn(text: &str) -> Nqn {
    Nqn::new(text).unwrap()
}

impl Setup {
    pub fn subsystem(&self) -> Arc<SubsystemInfo> {
        fake::subsystem(fake::namespace(self.blocks), self.limits)
    }

    /// Everything started, nothing run.
    pub fn start(self) -> Rig {
        let world = World::new(self.seed);
        let subsys = self.subsystem();
        let (fake, target) = Fake::start(&world, subsys, self.script);
        let mut cores = vec![target];
        cores.extend((0..self.hosts).map(|_| world.core()));
        let host = (nqn(HOSTNQN), [7; 16]);
        *fake.tls.borrow_mut() = self.tls;
        let config = RemoteConfig::new(fake.addr, nqn(SUBNQN), 1, host);
        let local = cores[1].local();
        let (volume, task) = RemoteVolume::start((self.config)(config), &local).unwrap();
        cores[1].spawn(task);
        Rig { world, cores, fake, volume }
    }
}

impl Rig {
    /// A channel on host core 1, 2, ..
    pub fn disk(&mut self, core: usize, depth: u32) -> Disk {
        let local = self.cores[core].local();
        let channel = self.volume.open(&local, depth).unwrap();
        let mailbox = Rc::<RefCell<Mailbox>>::default();
        let owner =
            Owner { channel: Some(channel), mailbox: Rc::clone(&mailbox), local: local.clone() };
        self.cores[core].spawn(Box::new(owner));
        let core = self.cores[core].handle();
        core.wake();
        Disk { mailbox, local, core }
    }

    pub fn state(&self) -> Arc<RemoteState> {
        self.volume.state()
    }

    /// Runs until `condition`; panics if it does not come.
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&RemoteVolume) -> bool) {
        let volume = Arc::clone(&self.volume);
        let met = self.world.run_until(&mut self.cores, LIMIT, &mut || condition(&volume));
        assert!(met, "{what} never happens; {:?}; {:?}", self.state(), self.fake.seen.get());
    }

    pub fn until_live(&mut self) {
        self.until("ready", |volume| volume.state().phase == Phase::Live);
    }

    /// Runs for a while, whatever happens.
    pub fn run_for(&mut self, time: Duration) {
        let end = self.world.now() + time;
        let world = self.world.clone();
        self.world.run_until(&mut self.cores, time, &mut || world.now() >= end);
    }

    /// Runs until `count` I/Os are back, and gives them in the order of their tags.
    pub fn wait(&mut self, disk: &Disk, count: usize) -> Vec<Box<Io>> {
        self.until("the end of the I/O", |_| disk.done() >= count);
        let mut done = disk.take_done();
        assert_eq!(done.len(), count);
        done.sort_by_key(|io| io.tag);
        done
    }

    /// As `wait`, and all of them succeeded.
    pub fn wait_ok(&mut self, disk: &Disk, count: usize) -> Vec<Box<Io>> {
        let done = self.wait(disk, count);
        for io in &done {
            assert_eq!(io.result, Ok(()), "{io:?}");
        }
        done
    }

    pub fn wait_errors(&mut self, disk: &Disk, count: usize, error: IoError) {
        for io in self.wait(disk, count) {
            assert_eq!(io.result, Err(error), "{io:?}");
        }
    }

    /// Closes all paths in order.
    pub fn finish_all(mut self) {
        self.until("all paths", |volume| volume.state().paths.iter().all(|path| path.is_live));
        let shutdowns = self.fake.seen.get().shutdowns;
        self.volume.shutdown();
        self.until("the end", |volume| volume.wait_stopped(Duration::ZERO));
        let paths = self.state().paths.len() as u64;
        assert_eq!(self.fake.seen.get().shutdowns, shutdowns + paths);
    }

    /// Closes everything in order: nothing is left over and the controller was shut down.
    pub fn finish(mut self) {
        self.until_live();
        let shutdowns = self.fake.seen.get().shutdowns;
        self.volume.shutdown();
        self.until("the end", |volume| volume.wait_stopped(Duration::ZERO));
        assert_eq!(self.fake.seen.get().shutdowns, shutdowns + 1);
    }
}
