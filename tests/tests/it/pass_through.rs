//! What a remote namespace can do beside reading and writing, from a channel to the target's volume
//! and back: simulated, with two hosts that share the namespace.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::ram::RamVolume;
use block::{
    AcquireAction, Channel, Extent, Identity, Io, IoError, Op, RegisterAction, ReservationType,
    Reserve, Volume,
};
use nvme::spec::Nqn;
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use reactor::sim::World;
use reactor::{Core, Local, Progress, Task};

use crate::sim::{SUBNQN, addr, start_target};

type Done = Rc<RefCell<Vec<Box<Io>>>>;

struct Poller {
    channel: Rc<RefCell<Box<dyn Channel>>>,
    done: Done,
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

struct Host {
    local: Local,
    channel: Rc<RefCell<Box<dyn Channel>>>,
    done: Done,
    remote: Arc<RemoteVolume>,
}

struct Bench {
    world: World,
    cores: Vec<Core>,
    hosts: Vec<Host>,
}

impl Bench {
    fn new() -> Bench {
        let world = World::new(1);
        let mut cores = vec![world.core(), world.core()];
        let identity = Identity::from_uuid([1; 16]);
        let ram: Arc<dyn Volume> = Arc::new(RamVolume::new(identity, 1 << 20, 512).expect("ram"));
        let _target = start_target(&world, &mut cores[0], &ram, 1);
        let local = cores[1].local();
        let mut hosts = Vec::new();
        for n in 1..=2u8 {
            let nqn = |text: &str| Nqn::new(text).expect("well formed");
            let host = nqn(&format!("nqn.2026-11.io.penstock:host{n}"));
            let config = RemoteConfig::new(addr(1), nqn(SUBNQN), 1, (host, [n; 16]));
            let (remote, task) = RemoteVolume::start(config, &local).expect("sound");
            cores[1].spawn(task);
            let channel = Rc::new(RefCell::new(remote.open(&local, 4).expect("a channel")));
            let done = Done::default();
            let poller = Poller { channel: Rc::clone(&channel), done: Rc::clone(&done) };
            cores[1].spawn(Box::new(poller));
            hosts.push(Host { local: local.clone(), channel, done, remote });
        }
        Bench { world, cores, hosts }
    }

    fn run(&mut self, host: usize, io: Io) -> Box<Io> {
        self.hosts[host].channel.borrow_mut().submit(Box::new(io)).expect("room");
        self.cores[1].handle().wake();
        let done = Rc::clone(&self.hosts[host].done);
        let limit = Duration::from_secs(60);
        let mut is_back = || !done.borrow().is_empty();
        assert!(self.world.run_until(&mut self.cores, limit, &mut is_back), "no answer");
        done.borrow_mut().pop().expect("it is back")
    }

    fn with_data(&mut self, host: usize, op: Op, offset: u64, bytes: &[u8]) -> Box<Io> {
        let mut io = Io::new(op, offset, bytes.len() as u64);
        let pool = self.hosts[host].local.pool().clone();
        pool.alloc(bytes.len(), &mut io.data).expect("memory");
        io.data.copy_from_slice(0, bytes).expect("its length");
        self.run(host, io)
    }

    fn reserve(&mut self, host: usize, reserve: Reserve) -> Result<(), IoError> {
        self.run(host, Io { reserve, ..Io::new(Op::Reserve, 0, 0) }).result
    }

    fn report(&mut self, host: usize) -> Vec<u8> {
        let io = self.with_data(host, Op::ReservationReport, 0, &[0xee; 256]);
        assert_eq!(io.result, Ok(()));
        bytes(&io)
    }
}

fn bytes(io: &Io) -> Vec<u8> {
    let mut bytes = vec![0; io.data.len()];
    io.data.copy_to_slice(0, &mut bytes).expect("its length");
    bytes
}

#[test]
fn compare_verify_and_copy_reach_the_remote_namespace() {
    let mut bench = Bench::new();
    let blocks: Vec<u8> = (0..256 << 10).map(|i: u32| (i * 7 + i / 512) as u8).collect();
    assert_eq!(bench.with_data(0, Op::Write, 0, &blocks).result, Ok(()));
    let geometry = bench.hosts[0].remote.geometry();
    assert!(geometry.compare && geometry.verify && geometry.copy.ranges_max == 128);
    assert_eq!(bench.with_data(0, Op::Compare, 0, &blocks).result, Ok(()));
    for at in [0, 4095, 200_000] {
        let mut other = blocks.clone();
        other[at] ^= 1;
        let result = bench.with_data(0, Op::Compare, 0, &other).result;
        assert_eq!(result, Err(IoError::CompareFailed), "byte {at}");
    }
    assert_eq!(bench.run(0, Io::new(Op::Verify, 0, 1 << 20)).result, Ok(()));
    // In as many source ranges as there can be: too many for a capsule, and for one block.
    for ranges in [1u64, 2, 128] {
        let len = 1024;
        let source = |n| Extent { offset: (ranges - 1 - n) * len, len };
        let sources: Vec<Extent> = (0..ranges).map(source).collect();
        let to = 512 << 10;
        let io = Io { sources, ..Io::new(Op::Copy, to, ranges * len) };
        assert_eq!(bench.run(0, io).result, Ok(()));
        let want: Vec<u8> = (0..ranges)
            .flat_map(|n| blocks[source(n).offset as usize..][..len as usize].to_vec())
            .collect();
        let zeros = vec![0; want.len()];
        let io = bench.with_data(0, Op::Read, to, &zeros);
        assert!(io.result == Ok(()) && bytes(&io) == want, "{ranges} ranges");
    }
    let sources = vec![Extent { offset: 0, len: 8192 }];
    let io = Io { sources, ..Io::new(Op::Copy, 4096, 8192) };
    assert_eq!(bench.run(0, io).result, Err(IoError::Overlapping));
}

#[test]
fn hosts_that_compare_and_write_one_block_take_turns() {
    let mut bench = Bench::new();
    let block = |n: u8| vec![n; 512];
    assert_eq!(bench.with_data(0, Op::Write, 4096, &block(0)).result, Ok(()));
    for n in 0..20 {
        // Both believe what the block holds; the first one is right.
        let data = [block(n), block(n + 1)].concat();
        let first = usize::from(n % 2);
        for (host, want) in [(first, Ok(())), (1 - first, Err(IoError::CompareFailed))] {
            let mut io = Io::new(Op::CompareAndWrite, 4096, 512);
            let pool = bench.hosts[host].local.pool().clone();
            pool.alloc(1024, &mut io.data).expect("memory");
            io.data.copy_from_slice(0, &data).expect("its length");
            assert_eq!(bench.run(host, io).result, want, "host {host} at {n}");
        }
        let io = bench.with_data(first, Op::Read, 4096, &block(0));
        assert!(bytes(&io) == block(n + 1), "the block after {n}");
    }
    assert!(bench.hosts.iter().all(|host| host.remote.geometry().compare_and_write));
}

#[test]
fn reservations_keep_the_other_host_out() {
    let mut bench = Bench::new();
    let block = [5; 512];
    assert_eq!(bench.with_data(0, Op::Write, 0, &block).result, Ok(()));
    assert_ne!(bench.hosts[0].remote.geometry().rescap, 0);
    let register = |nrkey| Reserve::Register {
        action: RegisterAction::Register,
        iekey: false,
        persist: None,
        crkey: 0,
        nrkey,
    };
    let acquire = |action, crkey, prkey| Reserve::Acquire {
        action,
        rtype: ReservationType::ExclusiveAccess,
        crkey,
        prkey,
    };
    let conflict = Err(IoError::ReservationConflict);
    assert_eq!(bench.reserve(0, acquire(AcquireAction::Acquire, 0xa, 0)), conflict);
    assert_eq!(bench.reserve(0, register(0xa)), Ok(()));
    assert_eq!(bench.reserve(0, acquire(AcquireAction::Acquire, 0xa, 0)), Ok(()));
    for op in [Op::Read, Op::Write, Op::Compare] {
        assert_eq!(bench.with_data(1, op, 0, &block).result, conflict, "{op:?}");
        assert_eq!(bench.with_data(0, op, 0, &block).result, Ok(()), "{op:?}");
    }
    assert_eq!(bench.run(1, Io::new(Op::Verify, 0, 512)).result, conflict);
    let report = bench.report(1);
    // RTYPE, REGCTL; then the first registrant, which holds it (RCSTS), with its identifier and key.
    assert_eq!((report[4], report[5], report[64 + 2] & 1), (2, 1, 1));
    assert_eq!(report[64 + 8..64 + 16], 0xa_u64.to_le_bytes());
    assert_eq!(report[64 + 16..64 + 32], [1; 16]);
    // The other takes it.
    assert_eq!(bench.reserve(1, register(0xb)), Ok(()));
    assert_eq!(bench.reserve(1, acquire(AcquireAction::PreemptAndAbort, 0xb, 0xa)), Ok(()));
    assert_eq!(bench.with_data(0, Op::Write, 0, &block).result, conflict);
    assert_eq!(bench.with_data(1, Op::Write, 0, &block).result, Ok(()));
    let rtype = ReservationType::ExclusiveAccess;
    assert_eq!(bench.reserve(1, Reserve::Release { rtype, crkey: 0xb }), Ok(()));
    assert_eq!(bench.with_data(0, Op::Write, 0, &block).result, Ok(()));
    assert_eq!(bench.reserve(1, Reserve::Clear { crkey: 0xb }), Ok(()));
    assert_eq!(bench.report(0)[5], 0, "nobody is registered any more");
}
