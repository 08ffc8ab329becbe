//! A core with one channel on it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use block::{Busy, Channel, Identity, Io, IoError, Op, Volume};
use iobuf::SgList;
use reactor::sim::World;
use reactor::{Core, CoreConfig, Local, Progress, Task};

pub(crate) fn identity() -> Identity {
    Identity::from_uuid(*b"penstock-tests-0")
}

type Shared<T> = Rc<RefCell<T>>;

/// Polls the channel once per turn, as a device does.
struct Poller {
    channel: Shared<Box<dyn Channel>>,
    done: Shared<Vec<Box<Io>>>,
}

impl Task for Poller {
    fn poll(&mut self, _: Duration) -> Progress {
        let mut done = self.done.borrow_mut();
        let before = done.len();
        self.channel.borrow_mut().poll(&mut |io| done.push(io));
        if done.len() > before { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        self.channel.borrow().deadline()
    }
}

/// A machine of one core, with one channel to one volume.
pub(crate) struct Bench {
    // Before the core, so that nothing outlives what it runs on.
    channel: Shared<Box<dyn Channel>>,
    done: Shared<Vec<Box<Io>>>,
    cores: Vec<Core>,
    world: Option<World>,
}

impl Bench {
    /// On a simulated kernel.
    pub(crate) fn simulated(world: &World, volume: &dyn Volume, depth: u32) -> Bench {
        Bench::on(world.core(), Some(world.clone()), volume, depth)
    }

    /// On the kernel of this machine.
    pub(crate) fn real(volume: &dyn Volume, depth: u32) -> Bench {
        Bench::on(real_core(CoreConfig::default()), None, volume, depth)
    }

    pub(crate) fn on(
        mut core: Core,
        world: Option<World>,
        volume: &dyn Volume,
        depth: u32,
    ) -> Bench {
        let channel = volume.open(&core.local(), depth).unwrap();
        let channel = Rc::new(RefCell::new(channel));
        let done = Rc::new(RefCell::new(Vec::with_capacity(depth as usize)));
        let poller = Poller { channel: Rc::clone(&channel), done: Rc::clone(&done) };
        core.spawn(Box::new(poller));
        Bench { channel, done, cores: vec![core], world }
    }

    pub(crate) fn local(&self) -> Local {
        self.cores[0].local()
    }

    pub(crate) fn submit(&self, io: Box<Io>) -> Result<(), Busy> {
        self.channel.borrow_mut().submit(io)
    }

    pub(crate) fn abort(&self) {
        self.channel.borrow_mut().abort();
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.channel.borrow().in_flight()
    }

    /// Lets the core run on; false if nothing would ever happen again.
    pub(crate) fn turn(&mut self) -> bool {
        match &self.world {
            Some(world) => world.step(&mut self.cores),
            None => {
                self.cores[0].turn(true);
                true
            }
        }
    }

    /// An I/O that has come back.
    pub(crate) fn take(&self) -> Option<Box<Io>> {
        self.done.borrow_mut().pop()
    }

    /// Waits for an I/O to come back.
    pub(crate) fn wait(&mut self) -> Box<Io> {
        loop {
            if let Some(io) = self.take() {
                return io;
            }
            assert!(self.in_flight() > 0, "nothing in flight to wait for");
            assert!(self.turn(), "an I/O was lost");
        }
    }

    /// Does one I/O and waits for it.
    pub(crate) fn run(&mut self, io: Io) -> Box<Io> {
        self.submit(Box::new(io)).unwrap();
        self.wait()
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8], fua: bool) -> Result<(), IoError> {
        let mut io = Io { fua, ..Io::new(Op::Write, offset, bytes.len() as u64) };
        self.local().pool().alloc(bytes.len(), &mut io.data).unwrap();
        io.data.copy_from_slice(0, bytes).unwrap();
        self.run(io).result
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
        let mut io = Io::new(Op::Read, offset, len as u64);
        self.local().pool().alloc(len, &mut io.data).unwrap();
        io.data.fill(0, len, 0xA5).unwrap();
        let io = self.run(io);
        io.result.map(|()| bytes(&io.data))
    }

    pub(crate) fn range(
        &mut self,
        op: Op,
        offset: u64,
        len: u64,
        fua: bool,
    ) -> Result<(), IoError> {
        self.run(Io { fua, ..Io::new(op, offset, len) }).result
    }
}

pub(crate) fn real_core(config: CoreConfig) -> Core {
    Core::new(config).expect("these tests need io_uring")
}

pub(crate) fn bytes(data: &SgList) -> Vec<u8> {
    let mut all = vec![0; data.len()];
    data.copy_to_slice(0, &mut all).unwrap();
    all
}
