//! Compare and Write from the guest of an emulated NVMe controller to the volume: of the emulator
//! itself, or of a target on a socket that two emulators share.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use block::ram::RamVolume;
use block::{Identity, Volume};
use it::rig::{Rig, SUBNQN};
use nvme::spec::{AdminOpcode, Cqe, Nqn, NvmOpcode, Status};
use nvme_pci::testing::{Cores, TestClient, TestHost, transfer};
use nvme_pci::{DeviceConfig, DeviceHandle};
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use nvmf_target::Limits;

const BLOCK: usize = 512;
const SLBA: u64 = 40;
/// Where the guest has a client's data: what it compares with, what it writes, and what it reads.
const DATA: u64 = 0x40_0000;
const CLIENT_BYTES: u64 = 0x4000;

/// The target's namespace for an emulator.
fn remote(rig: &Rig, cores: &Cores, number: u8) -> Arc<RemoteVolume> {
    let nqn = |text: &str| Nqn::new(text).expect("well formed");
    let host = (nqn(&format!("nqn.2014-08.org.example:emulator{number}")), [number; 16]);
    let config = RemoteConfig { queues: 8, ..RemoteConfig::new(rig.addr, nqn(SUBNQN), 1, host) };
    let (sender, receiver) = mpsc::channel();
    let begin = move |spawner: &mut reactor::Spawner<'_>| {
        let (remote, task) = RemoteVolume::start(config, spawner.local()).expect("sound");
        spawner.spawn(task);
        sender.send(remote).expect("the test waits");
    };
    cores.handles[0].post(Box::new(begin)).map_err(drop).expect("a core that runs");
    let remote = receiver.recv().expect("the volume");
    remote.wait_ready(Duration::from_secs(30)).expect("a target that answers");
    remote
}

/// A guest with two queues, each on a core of its own.
fn guest(
    folder: &Path,
    name: &str,
    volume: Arc<dyn Volume>,
    cores: &Cores,
) -> (DeviceHandle, TestHost<TestClient>) {
    let socket = folder.join(name);
    let config = DeviceConfig::new(name, &socket);
    let device = nvme_pci::serve(config, vec![(1, volume)], &cores.handles).expect("a device");
    let mut host = TestHost::connect(&socket, 16 << 20, 4);
    host.enable(32);
    host.admin(&TestHost::<TestClient>::admin_sqe(AdminOpcode::IDENTIFY, 1, 0));
    assert_eq!(host.admin_data()[522] & 1, 1, "FUSES says Compare and Write");
    for qid in 1..=2 {
        host.create_queues(qid, 16);
    }
    (device, host)
}

/// Every byte depends on the count, so that a torn block is seen.
fn counter(count: u64) -> Vec<u8> {
    let mut block = vec![(count % 251) as u8; BLOCK];
    block[..8].copy_from_slice(&count.to_le_bytes());
    block
}

fn count_in(block: &[u8]) -> u64 {
    let count = u64::from_le_bytes(block[..8].try_into().expect("8 bytes"));
    assert!(block == counter(count), "a torn block");
    count
}

/// Counts up in one block by a queue of a guest, with what it believes the count to be.
struct Client {
    host: usize,
    qid: u16,
    data: u64,
    believed: u64,
    left: u32,
    /// Completions of the commands that are out.
    want: usize,
    got: Vec<Cqe>,
    counted: u64,
    refused: u64,
}

impl Client {
    fn step(&mut self, hosts: &mut [TestHost<TestClient>]) -> bool {
        let host = &mut hosts[self.host];
        while let Some(cqe) = host.pop(self.qid) {
            host.release(self.qid);
            self.got.push(cqe);
        }
        if self.got.len() < self.want {
            return false;
        }
        let statuses: Vec<Status> = self.got.drain(..).map(|cqe| cqe.status()).collect();
        let has_read = self.want == 1;
        match statuses[..] {
            [] => {}
            [Status::SUCCESS] => {
                self.believed = count_in(&host.read(self.data + 0x2000, BLOCK));
            }
            [Status::SUCCESS, Status::SUCCESS] => {
                (self.counted, self.believed) = (self.counted + 1, self.believed + 1);
            }
            [first, second] => {
                assert_eq!(first, Status::COMPARE_FAILURE.dnr());
                assert_eq!(second, Status::ABORTED_FAILED_FUSED.dnr());
                self.refused += 1;
                let read = transfer(NvmOpcode::READ, 1, SLBA, 1, self.data + 0x2000);
                host.push(self.qid, &read);
                host.kick(self.qid);
                self.want = 1;
                return true;
            }
            ref other => panic!("a read failed: {other:?}"),
        }
        if !has_read && self.want > 0 {
            self.left -= 1;
        }
        self.want = 0;
        if self.left == 0 {
            return false;
        }
        host.write(self.data, &counter(self.believed));
        host.write(self.data + 0x1000, &counter(self.believed + 1));
        for (opcode, fuse, at) in [(NvmOpcode::COMPARE, 1, 0), (NvmOpcode::WRITE, 2, 0x1000)] {
            let mut sqe = transfer(opcode, 1, SLBA, 1, self.data + at);
            sqe.flags = fuse;
            host.push(self.qid, &sqe);
        }
        host.kick(self.qid);
        self.want = 2;
        true
    }
}

/// All queues of all guests count up in one block, and lose and double nothing.
fn count(mut hosts: Vec<TestHost<TestClient>>) {
    const ROUNDS: u32 = 400;
    let first = &mut hosts[0];
    first.write(DATA, &counter(0));
    assert!(first.run(1, &transfer(NvmOpcode::WRITE, 1, SLBA, 1, DATA)).status().is_success());
    let mut clients = Vec::new();
    for host in 0..hosts.len() {
        for qid in 1..=2u16 {
            clients.push(Client {
                host,
                qid,
                data: DATA + u64::from(qid) * CLIENT_BYTES,
                believed: 0,
                left: ROUNDS,
                want: 0,
                got: Vec::new(),
                counted: 0,
                refused: 0,
            });
        }
    }
    let end = Instant::now() + Duration::from_secs(120);
    while clients.iter().any(|client| client.left > 0) {
        let mut has_worked = false;
        for client in &mut clients {
            has_worked |= client.step(&mut hosts);
        }
        if !has_worked {
            assert!(Instant::now() < end, "no completion");
            std::thread::yield_now();
        }
    }
    let counted: u64 = clients.iter().map(|client| client.counted).sum();
    let refused: u64 = clients.iter().map(|client| client.refused).sum();
    println!("{counted} counted, {refused} refused");
    let first = &mut hosts[0];
    let read = transfer(NvmOpcode::READ, 1, SLBA, 1, DATA + 0x2000);
    assert!(first.run(1, &read).status().is_success());
    assert_eq!(count_in(&first.read(DATA + 0x2000, BLOCK)), counted, "lost or doubled");
    assert!(counted > u64::from(ROUNDS) / 4 && refused > 0, "{counted} counted, {refused} refused");
}

fn ram() -> RamVolume {
    RamVolume::new(Identity::from_uuid([7; 16]), 1 << 20, 512).expect("memory")
}

#[test]
fn guests_of_two_emulators_count_in_one_block_of_a_target() {
    let rig = Rig::start(vec![Arc::new(ram())], 2, Limits::default()).expect("a target");
    let folder = tempfile::tempdir().expect("a folder");
    let (mut parts, mut hosts) = (Vec::new(), Vec::new());
    for number in 1..=2u8 {
        let cores = Cores::start(2);
        let remote = remote(&rig, &cores, number);
        let name = format!("guest{number}");
        let (device, host) = guest(folder.path(), &name, remote.clone(), &cores);
        hosts.push(host);
        parts.push((cores, remote, device));
    }
    count(hosts);
    for (cores, remote, device) in parts {
        device.stop();
        remote.shutdown();
        assert!(remote.wait_stopped(Duration::from_secs(10)));
        cores.stop();
    }
}

#[test]
fn queues_on_two_cores_count_in_one_block_of_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let cores = Cores::start(2);
    let volume = Arc::new(ram().with_compare_and_write());
    let (device, host) = guest(folder.path(), "guest", volume, &cores);
    count(vec![host]);
    device.stop();
    cores.stop();
}
