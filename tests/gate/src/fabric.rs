//! NVMe/TCP: the protocol machines alone, and the whole path on the simulated kernel.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::null::NullVolume;
use block::{Channel, Identity, Io, Op, Volume};
use nvme::host::io;
use nvme::spec::Nqn;
use nvme::tcp::{Crc32c, Host, HostConfig, HostEvent, Target, TargetConfig, TargetEvent, Transfer};
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use nvmf_target::{AuthDemand, Limits, ListenerKind, NamespaceConfig, Port, SubsystemConfig, Tls};
use reactor::sim::World;
use reactor::{CoreConfig, Local, Progress, Task};

const BLOCK_BYTES: usize = 4096;
/// Requests in one stretch of the stream.
const BATCH: u64 = 32;

/// 4 KiB requests through both machines of a qpair, in stretches of 32.
pub(crate) fn machines(count: u64, write: bool, digests: bool) {
    let mut host = Host::new(HostConfig {
        header_digest: digests,
        data_digest: digests,
        ..HostConfig::default()
    });
    let mut target = Target::new(TargetConfig { slots: 256, ..TargetConfig::default() });
    let icreq = host.icreq();
    let Ok(Some(TargetEvent::Initialized { reply })) = target.next(&mut &icreq[..]) else {
        panic!("ICReq is answered");
    };
    assert_eq!(host.next(&mut &reply[..]), Ok(Some(HostEvent::Initialized)));

    let data = vec![0xa5; BLOCK_BYTES];
    let digest = Crc32c::of(&data);
    let mut place = vec![0; BLOCK_BYTES];
    let (mut to_target, mut to_host) = (Vec::new(), Vec::new());
    let mut ready = Vec::new();
    let mut done = 0;
    crate::counted(|| {
        while done < count {
            let batch = BATCH.min(count - done);
            for cid in 0..batch as u16 {
                let slba = (done + u64::from(cid)) % 1000 * 8;
                let len = BLOCK_BYTES as u32;
                let (sqe, transfer) = match write {
                    true => (
                        io::write(1, slba, 8, len, true, false),
                        Transfer::Write { len, in_capsule: true },
                    ),
                    false => (io::read(1, slba, 8, len, false), Transfer::Read { len }),
                };
                to_target.extend_from_slice(&host.command(cid, &sqe, transfer));
                if write {
                    to_target.extend_from_slice(&data);
                    to_target.extend_from_slice(if digests { &digest } else { &[] });
                }
            }
            let mut input = &to_target[..];
            while let Some(event) = target.next(&mut input).expect("a good stream") {
                match event {
                    TargetEvent::Command { slot, in_capsule_len: 0, .. } => ready.push(slot),
                    TargetEvent::Data { offset, bytes, .. } => {
                        place[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                    TargetEvent::DataEnd { slot } => ready.push(slot),
                    TargetEvent::Command { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
            for slot in ready.drain(..) {
                if write {
                    to_host.extend_from_slice(&target.response(slot, &[0; 16]));
                } else {
                    let head = target.c2h_data(slot, 0, BLOCK_BYTES as u32, true, true);
                    to_host.extend_from_slice(&head);
                    to_host.extend_from_slice(&data);
                    to_host.extend_from_slice(if digests { &digest } else { &[] });
                }
                target.release(slot);
            }
            let mut input = &to_host[..];
            let before = done;
            while let Some(event) = host.next(&mut input).expect("a good stream") {
                match event {
                    HostEvent::Data { offset, bytes, .. } => {
                        place[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                    HostEvent::Complete { .. } => done += 1,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(done - before, batch, "each request is answered");
            to_target.clear();
            to_host.clear();
        }
    });
}

/// What a load asks for.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) write: bool,
    pub(crate) bytes: usize,
    pub(crate) depth: usize,
}

const SUBNQN: &str = "nqn.2026-11.io.penstock:gate";
const HOSTNQN: &str = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000005";
const VOLUME_BYTES: u64 = 1 << 30;

/// A task whose turns are counted: what the simulated kernel does between them is not.
struct Counted(Box<dyn Task>);

impl Task for Counted {
    fn poll(&mut self, now: Duration) -> Progress {
        crate::counted(|| self.0.poll(now))
    }

    fn arm(&mut self) -> bool {
        crate::counted(|| self.0.arm())
    }

    fn disarm(&mut self) {
        crate::counted(|| self.0.disarm());
    }

    fn deadline(&self) -> Option<Duration> {
        self.0.deadline()
    }
}

/// Keeps so many requests in flight until all are done.
struct Load {
    channel: Box<dyn Channel>,
    #[expect(clippy::vec_box, reason = "the boxes move")]
    idle: Vec<Box<Io>>,
    shape: Shape,
    sent: u64,
    count: u64,
    done: Rc<Cell<u64>>,
}

impl Load {
    fn new(channel: Box<dyn Channel>, local: &Local, shape: Shape, count: u64) -> Load {
        let idle = (0..shape.depth)
            .map(|_| {
                let mut io = Box::new(Io::with_capacity(64));
                local.pool().alloc(shape.bytes, &mut io.data).expect("room for the depth");
                io
            })
            .collect();
        Load { channel, idle, shape, sent: 0, count, done: Rc::default() }
    }
}

impl Task for Load {
    fn poll(&mut self, _now: Duration) -> Progress {
        let (idle, done) = (&mut self.idle, &self.done);
        let before = done.get();
        self.channel.poll(&mut |io| {
            assert_eq!(io.result, Ok(()));
            done.set(done.get() + 1);
            idle.push(io);
        });
        let mut has_worked = done.get() > before;
        while self.sent < self.count
            && let Some(mut io) = self.idle.pop()
        {
            io.op = if self.shape.write { Op::Write } else { Op::Read };
            io.len = self.shape.bytes as u64;
            io.offset = self.sent * io.len % VOLUME_BYTES;
            // Not connected yet, or the queue is full.
            if let Err(block::Busy(io)) = self.channel.submit(io) {
                self.idle.push(io);
                break;
            }
            self.sent += 1;
            has_worked = true;
        }
        if has_worked { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        self.channel.deadline()
    }
}

/// Requests through initiator, target and a null volume, on cores that take turns in one thread.
pub(crate) fn path(count: u64, shape: Shape) {
    let world = World::new(1);
    let config = CoreConfig { pool_bytes: 32 << 20, ..CoreConfig::default() };
    let mut cores = vec![world.core_with(config.clone()), world.core_with(config)];
    let volume: Arc<dyn Volume> =
        Arc::new(NullVolume::new(Identity::from_uuid([1; 16]), VOLUME_BYTES, 512));
    let addr = ([10, 0, 0, 1], 4420).into();
    let config = nvmf_target::TargetConfig {
        subsystems: vec![SubsystemConfig {
            namespaces: vec![NamespaceConfig::new(1, volume)],
            ..SubsystemConfig::new(SUBNQN, "GATE")
        }],
        ports: vec![Port {
            id: 1,
            kind: ListenerKind::Io,
            addr,
            tls: Tls::Off,
            auth: AuthDemand::default(),
            hidden: false,
        }],
        limits: Limits::default(),
        ..nvmf_target::TargetConfig::default()
    };
    let target = nvmf_target::Target::new(config, vec![cores[0].handle()]).expect("a target");
    let task = target.core_task(0, &cores[0].local()).expect("the core's first task");
    cores[0].spawn(Box::new(Counted(task)));
    let accept = Arc::clone(&target);
    world.listen(addr, Box::new(move |socket| accept.add_connection(socket, 1)));

    let nqn = |text| Nqn::new(text).expect("well formed");
    let config = RemoteConfig::new(addr, nqn(SUBNQN), 1, (nqn(HOSTNQN), [5; 16]));
    let local = cores[1].local();
    let (remote, session) = RemoteVolume::start(config, &local).expect("an initiator");
    cores[1].spawn(Box::new(Counted(session)));
    let channel = remote.open(&local, shape.depth as u32).expect("a channel");
    let load = Load::new(channel, &local, shape, count);
    let done = Rc::clone(&load.done);
    cores[1].spawn(Box::new(Counted(Box::new(load))));
    let limit = Duration::from_secs(3600);
    let ended = world.run_until(&mut cores, limit, &mut || done.get() == count);
    assert!(ended, "stuck after {} of {count}", done.get());
}
