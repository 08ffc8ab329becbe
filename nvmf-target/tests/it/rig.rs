//! A target on two simulated cores, hosts on a third, and memory volumes that can be made to fail.

use std::sync::Arc;
use std::time::Duration;

use block::fault::{FaultHandle, FaultVolume};
use block::ram::RamVolume;
use block::{Identity, Volume};
use crypto::psk::Psk;
use nvme::fabrics::ConnectRequest;
use nvme::spec::{AdminOpcode, Feature, Nqn, NvmOpcode, SglDescriptor, Sqe, Status};
use nvmf_target::{
    AuthDemand, Limits, ListenerKind, NamespaceConfig, Port, SubsystemConfig, Target, TargetConfig,
    Tls,
};
use reactor::sim::World;
use reactor::{Core, CoreConfig, Socket};

use crate::host::{DEPTH, Data, Done, Meddler, Queue};

pub(crate) const SUBNQN: &str = "nqn.2026-11.io.penstock:ops";
pub(crate) const BLOCK: usize = 512;
pub(crate) const BLOCKS: usize = 16 << 10;
/// Virtual time that nothing here takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);
const PORT: u16 = 1;
/// Cores of the target; the hosts' is behind them.
const CORES: usize = 2;

pub(crate) fn uuid(n: u8) -> [u8; 16] {
    [n; 16]
}

/// See the module's documentation.
pub(crate) struct Rig {
    pub(crate) world: World,
    pub(crate) cores: Vec<Core>,
    pub(crate) target: Arc<Target>,
    /// Namespace 1's volume.
    pub(crate) faults: FaultHandle,
    /// Port that connections come through, and keep alive timeout of controllers, from now on.
    pub(crate) port: u16,
    pub(crate) kato: Duration,
    /// The TLS key that hosts use from now on, if they do.
    pub(crate) psk: Option<Psk>,
    /// Who changes what TLS hosts send from now on, if somebody does.
    pub(crate) meddler: Option<Meddler>,
}

/// One association: admin queue and I/O queues.
pub(crate) struct Host {
    pub(crate) admin: Queue,
    pub(crate) io: Vec<Queue>,
}

impl Rig {
    pub(crate) fn new(seed: u64) -> Rig {
        Rig::with(seed, |_| {})
    }

    /// With a configuration that `change` may change.
    pub(crate) fn with(seed: u64, change: impl FnOnce(&mut TargetConfig)) -> Rig {
        let ram =
            RamVolume::new(Identity::from_uuid(uuid(1)), (BLOCKS * BLOCK) as u64, BLOCK as u32);
        Rig::over(seed, Arc::new(ram.expect("memory")), change)
    }

    /// Namespace 1 is `inner` behind a fault layer.
    pub(crate) fn over(
        seed: u64,
        inner: Arc<dyn Volume>,
        change: impl FnOnce(&mut TargetConfig),
    ) -> Rig {
        let world = World::new(seed);
        let with_pool =
            |bytes| world.core_with(CoreConfig { pool_bytes: bytes, ..CoreConfig::default() });
        let mut cores: Vec<Core> = (0..CORES).map(|_| with_pool(32 << 20)).collect();
        cores.push(with_pool(512 << 20));
        let (volume, faults) = FaultVolume::new(inner, seed);
        let mut subsystem = SubsystemConfig::new(SUBNQN, "OPS");
        subsystem.namespaces.push(NamespaceConfig::new(1, Arc::new(volume)));
        let mut config = TargetConfig {
            subsystems: vec![subsystem],
            ports: vec![Port {
                id: PORT,
                kind: ListenerKind::Io,
                addr: "10.0.0.1:4420".parse().expect("an address"),
                tls: Tls::Off,
                auth: AuthDemand::default(),
                hidden: false,
            }],
            limits: Limits { h2c_data_bytes: 16 << 10, ..Limits::default() },
            ..TargetConfig::default()
        };
        change(&mut config);
        let handles = cores[..CORES].iter().map(Core::handle).collect();
        let target = Target::new(config, handles).expect("a sound configuration");
        for (index, core) in cores[..CORES].iter_mut().enumerate() {
            let task = target.core_task(index, &core.local()).expect("the core's first task");
            core.spawn(task);
        }
        Rig {
            world,
            cores,
            target,
            faults,
            port: PORT,
            kato: Duration::ZERO,
            psk: None,
            meddler: None,
        }
    }

    /// Runs until `condition` holds.
    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        let ended = self.world.run_until(&mut self.cores, LIMIT, &mut condition);
        assert!(ended, "waited in vain for: {what}");
    }

    /// Runs for some virtual time, or until nothing moves any more.
    pub(crate) fn run_for(&mut self, time: Duration) {
        self.world.run_until(&mut self.cores, time, &mut || false);
    }

    pub(crate) fn connection(&mut self) -> Queue {
        let near = self.socket();
        let (psk, meddler) = (self.psk.as_ref(), self.meddler.clone());
        Queue::open_as(&mut self.cores[CORES], near, psk, meddler)
    }

    /// A host's end of a connection that the target has the other of.
    pub(crate) fn socket(&mut self) -> Socket {
        let (near, far) = self.world.socket_pair();
        self.target.add_connection(far, self.port);
        near
    }

    /// The core that hosts run on.
    pub(crate) fn host_core(&mut self) -> &mut Core {
        &mut self.cores[CORES]
    }

    /// Sends a command and waits for its end.
    #[track_caller]
    pub(crate) fn command(&mut self, queue: &Queue, sqe: Sqe, data: Data) -> Done {
        let id = queue.send(sqe, data);
        self.outcome(queue, id)
    }

    #[track_caller]
    pub(crate) fn outcome(&mut self, queue: &Queue, id: u64) -> Done {
        self.until("a command's end", || queue.is_done(id) || queue.is_over());
        queue.take(id).expect("the connection ended before the command")
    }

    /// One queue, by a Connect command whatever comes of it.
    pub(crate) fn connect(&mut self, n: u8, subnqn: &str, qid: u16, cntlid: u16) -> (Queue, Done) {
        let request = ConnectRequest {
            qid,
            queue_entries: u32::from(DEPTH) + 1,
            kato: if qid == 0 { self.kato } else { Duration::ZERO },
            sq_flow_disabled: false,
            hostid: [n; 16],
            cntlid,
            subnqn: Nqn::new(subnqn).expect("well formed"),
            hostnqn: Nqn::new(&hostnqn(n)).expect("well formed"),
        };
        let (sqe, data) = request.encode();
        let queue = self.connection();
        let done = self.command(&queue, sqe, Data::Capsule(data.to_vec()));
        (queue, done)
    }

    /// Host number `n` with `queues` I/O queues.
    #[track_caller]
    pub(crate) fn host(&mut self, n: u8, queues: u16) -> Host {
        self.host_of(n, SUBNQN, queues)
    }

    #[track_caller]
    pub(crate) fn host_of(&mut self, n: u8, subnqn: &str, queues: u16) -> Host {
        let (admin, done) = self.connect(n, subnqn, 0, 0xffff);
        assert!(done.cqe.status().is_success(), "connect: {}", done.cqe.status());
        let cntlid = done.cqe.dw0() as u16;
        self.enable(&admin);
        let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
        sqe.cdw10.set(Feature::NUMBER_OF_QUEUES.0.into());
        sqe.cdw11.set(u32::from(queues - 1) << 16 | u32::from(queues - 1));
        let done = self.command(&admin, sqe, Data::None);
        assert!(done.cqe.status().is_success(), "queues: {}", done.cqe.status());
        let io = (1..=queues)
            .map(|qid| {
                let (queue, done) = self.connect(n, subnqn, qid, cntlid);
                assert!(done.cqe.status().is_success(), "queue {qid}: {}", done.cqe.status());
                queue
            })
            .collect();
        Host { admin, io }
    }

    /// CC.EN with the entry sizes that fabrics wants.
    #[track_caller]
    pub(crate) fn enable(&mut self, admin: &Queue) {
        let done = self.command(admin, property_set(0x14, 0x0046_0001), Data::None);
        assert!(done.cqe.status().is_success(), "enable: {}", done.cqe.status());
    }

    /// Writes and insists on success.
    #[track_caller]
    pub(crate) fn write(&mut self, queue: &Queue, slba: u64, bytes: &[u8]) {
        let (sqe, data) = write(slba, bytes);
        let status = self.command(queue, sqe, data).cqe.status();
        assert!(status.is_success(), "write: {status}");
    }

    /// Reads and insists on success.
    #[track_caller]
    pub(crate) fn read(&mut self, queue: &Queue, slba: u64, len: usize) -> Vec<u8> {
        let done = self.command(queue, rw(NvmOpcode::READ, slba, len), Data::Reply(len));
        assert!(done.cqe.status().is_success(), "read: {}", done.cqe.status());
        done.reply
    }

    /// What log page `lid` says, `len` bytes of it.
    #[track_caller]
    pub(crate) fn log_page(&mut self, host: &Host, lid: u8, len: usize) -> Vec<u8> {
        let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
        sqe.nsid.set(u32::MAX);
        sqe.dptr = SglDescriptor::transport(len as u32);
        sqe.cdw10.set(u32::from(lid) | ((len / 4 - 1) as u32) << 16);
        let done = self.command(&host.admin, sqe, Data::Reply(len));
        assert!(done.cqe.status().is_success(), "log page {lid:#x}: {}", done.cqe.status());
        done.reply
    }
}

pub(crate) fn hostnqn(n: u8) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-0000000000{n:02x}")
}

/// Property Set of four bytes.
pub(crate) fn property_set(offset: u32, value: u32) -> Sqe {
    let mut bytes = [0; 64];
    (bytes[0], bytes[1]) = (0x7f, 0x40);
    bytes[44..48].copy_from_slice(&offset.to_le_bytes());
    bytes[48..52].copy_from_slice(&value.to_le_bytes());
    Sqe::from_bytes(&bytes)
}

/// Property Get of four bytes.
pub(crate) fn property_get(offset: u32) -> Sqe {
    let mut bytes = [0; 64];
    (bytes[0], bytes[1], bytes[4]) = (0x7f, 0x40, 4);
    bytes[44..48].copy_from_slice(&offset.to_le_bytes());
    Sqe::from_bytes(&bytes)
}

/// A command on namespace 1 with a range and a data pointer of `len` bytes.
pub(crate) fn rw(opcode: NvmOpcode, slba: u64, len: usize) -> Sqe {
    let mut sqe = ranged(opcode, slba, len / BLOCK);
    sqe.dptr = SglDescriptor::transport(len as u32);
    sqe
}

/// A command on namespace 1 with a range and no data.
pub(crate) fn ranged(opcode: NvmOpcode, slba: u64, blocks: usize) -> Sqe {
    let mut sqe = Sqe::new(opcode.0);
    sqe.nsid.set(1);
    sqe.cdw10.set(slba as u32);
    sqe.cdw11.set((slba >> 32) as u32);
    sqe.cdw12.set(blocks as u32 - 1);
    sqe
}

/// A command that sends a structure of these bytes.
pub(crate) fn structured(opcode: NvmOpcode, bytes: &[u8]) -> (Sqe, Data) {
    let mut sqe = Sqe::new(opcode.0);
    sqe.nsid.set(1);
    sqe.dptr = SglDescriptor::in_capsule(0, bytes.len() as u32);
    (sqe, Data::Capsule(bytes.to_vec()))
}

pub(crate) fn write(slba: u64, bytes: &[u8]) -> (Sqe, Data) {
    (rw(NvmOpcode::WRITE, slba, bytes.len()), Data::Fetched(bytes.to_vec()))
}

pub(crate) fn compare(slba: u64, bytes: &[u8]) -> (Sqe, Data) {
    (rw(NvmOpcode::COMPARE, slba, bytes.len()), Data::Fetched(bytes.to_vec()))
}

/// Bytes that differ from block to block and from one `stamp` to another.
pub(crate) fn pattern(stamp: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    let mut x = stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A success, or the status and nothing else.
pub(crate) fn status(done: &Done) -> Result<(), Status> {
    let status = done.cqe.status();
    if status.is_success() { Ok(()) } else { Err(status) }
}
