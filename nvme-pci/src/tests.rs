//! The whole device on real cores, seen by a host.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Volume, VolumeSpec, Wear};
use nvme::spec::{
    AdminOpcode, Csts, IdentifyController, LogPage, NSSR_RESET, NvmOpcode, SmartLog,
    critical_warning, event,
};
use zerocopy::FromBytes;

use super::function::{Function, Region};
use super::testing::{Bus, Cores, Direct, TestClient, TestHost, TestVolume, transfer};
use super::*;

mod guests;

const MEMORY: u64 = 16 << 20;
const DATA: u64 = 0x40_0000;

fn direct(cores: &Cores, volumes: Vec<(u32, Arc<dyn Volume>)>, files: Option<Files>) -> Direct {
    let config = DeviceConfig::new("test", "");
    let (device, _) = build(&config, volumes, &cores.handles, files).expect("a device");
    Direct::new(device)
}

fn ram(mib: u64, uuid: u8) -> Arc<dyn Volume> {
    let spec: VolumeSpec = format!("ram:{mib}M").parse().expect("a volume");
    spec.open(Identity::from_uuid([uuid; 16])).expect("memory for a volume")
}

type Host = TestHost<TestClient>;

fn served(cores: &Cores, doorbells: Doorbells) -> (DeviceHandle, Host, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("nvme.sock");
    let config = DeviceConfig { doorbells, ..DeviceConfig::new("test", &socket) };
    let device = serve(config, vec![(1, ram(8, 1))], &cores.handles).expect("a device");
    let host = Host::connect(&socket, MEMORY, 4);
    (device, host, folder)
}

/// Writes and reads back through every queue.
fn exchange<B: Bus>(host: &mut TestHost<B>, queues: u16, rounds: u64) {
    for round in 0..rounds {
        let qid = 1 + (round % u64::from(queues)) as u16;
        let bytes: Vec<u8> = (0..4096u64).map(|i| (i * 7 + round) as u8).collect();
        host.write(DATA, &bytes);
        let write = transfer(NvmOpcode::WRITE, 1, round * 8, 8, DATA);
        assert!(host.run(qid, &write).status().is_success());
        host.write(DATA, &[0; 4096]);
        let read = transfer(NvmOpcode::READ, 1, round * 8, 8, DATA);
        assert!(host.run(qid, &read).status().is_success());
        assert_eq!(host.read(DATA, 4096), bytes, "round {round} by queue {qid}");
    }
}

#[test]
fn a_host_over_vfio_user() {
    let cores = Cores::start(2);
    let (device, mut host, _folder) = served(&cores, Doorbells::Trapped);
    host.enable(4);
    host.admin(&Host::admin_sqe(AdminOpcode::IDENTIFY, 1, 0));
    let id = IdentifyController::read_from_bytes(&host.admin_data()[..]).expect("4096 bytes");
    assert_eq!(&id.sn, b"01010101010101010101");
    host.interrupted(0);
    for qid in 1..=3 {
        host.create_queues(qid, if qid == 1 { 2 } else { 64 });
    }
    exchange(&mut host, 3, 200);
    host.interrupted(2);
    host.use_shadow_doorbells();
    exchange(&mut host, 3, 300);

    let state = device.state().expect("an answer");
    assert!(state.client_connected && state.is_enabled);
    assert_eq!((state.queues.len(), state.counters.reads, state.counters.writes), (3, 500, 500));
    let on_cores: std::collections::BTreeSet<usize> =
        state.queues.iter().map(|queue| queue.core).collect();
    assert_eq!(on_cores.len(), 2, "queues on both cores");
    let smart = u32::from(LogPage::SMART.0) | 127 << 16;
    host.admin(&Host::admin_sqe(AdminOpcode::GET_LOG_PAGE, smart, 0));
    let log = SmartLog::read_from_prefix(&host.admin_data()).expect("a page").0;
    assert_eq!((log.host_reads.get(), log.host_writes.get()), (500, 500));

    for qid in 1..=3u32 {
        host.admin(&Host::admin_sqe(AdminOpcode::DELETE_IO_SQ, qid, 0));
        host.admin(&Host::admin_sqe(AdminOpcode::DELETE_IO_CQ, qid, 0));
    }
    assert!(device.state().expect("an answer").queues.is_empty());
    host.disable();

    // The next one is served as if there had been none.
    let path = host.bus.stream().peer_addr().expect("a socket");
    let path = path.as_pathname().expect("a path").to_owned();
    drop(host);
    let mut host = Host::connect(&path, MEMORY, 4);
    host.enable(32);
    host.create_queues(1, 1024);
    exchange(&mut host, 1, 20);
    device.stop();
    cores.stop();
}

#[test]
fn doorbells_that_the_host_maps() {
    let cores = Cores::start(1);
    let (device, mut host, _folder) = served(&cores, Doorbells::Mapped);
    host.map_doorbells();
    host.enable(32);
    host.create_queues(1, 64);
    exchange(&mut host, 1, 100);
    device.stop();
    cores.stop();
}

#[test]
fn namespaces_come_grow_and_go_while_it_runs() {
    let cores = Cores::start(2);
    let (device, mut host, _folder) = served(&cores, Doorbells::Trapped);
    host.enable(32);
    host.create_queues(1, 64);
    host.admin(&Host::admin_sqe(AdminOpcode::SET_FEATURES, 0x0b, 1 << 8));
    let read = transfer(NvmOpcode::READ, 2, 0, 1, DATA);
    assert!(!host.run(1, &read).status().is_success());
    let changed = event::dw0(event::TYPE_NOTICE, event::NOTICE_NAMESPACE_ATTRIBUTE, 4);
    let aer = Host::admin_sqe(AdminOpcode::ASYNC_EVENT_REQUEST, 0, 0);
    let list = u32::from(LogPage::CHANGED_NAMESPACES.0) | 1023 << 16;
    let list = Host::admin_sqe(AdminOpcode::GET_LOG_PAGE, list, 0);

    host.push(0, &aer);
    host.kick(0);
    device.attach(2, ram(4, 2)).expect("room");
    assert_eq!(host.complete(0).dw0(), changed);
    host.admin(&list);
    assert_eq!(host.admin_data()[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert!(host.run(1, &read).status().is_success());
    assert_eq!(device.attach(2, ram(4, 2)), Err(AttachError::InUse(2)));

    host.push(0, &aer);
    host.kick(0);
    device.detach(2).expect("it is there");
    assert_eq!(host.complete(0).dw0(), changed);
    assert!(!host.run(1, &read).status().is_success());
    assert_eq!(device.detach(2), Err(AttachError::NotAttached(2)));
    device.stop();
    cores.stop();
}

/// A volume that tells when it has grown.
struct Growing {
    inner: Arc<dyn Volume>,
    blocks: AtomicU64,
}

impl Volume for Growing {
    fn geometry(&self) -> Geometry {
        Geometry { blocks: self.blocks.load(Ordering::SeqCst), ..self.inner.geometry() }
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn open(&self, local: &reactor::Local, depth: u32) -> io::Result<Box<dyn block::Channel>> {
        self.inner.open(local, depth)
    }

    /// Its life is over when there are 5,000 blocks.
    fn wear(&self) -> Option<Wear> {
        let blocks = self.blocks.load(Ordering::SeqCst);
        (blocks > 4096).then_some(Wear {
            percentage_used: (blocks / 50) as u8,
            spare_percent: 9,
            spare_threshold_percent: 10,
            critical_warning: critical_warning::SPARE,
        })
    }

    fn generation(&self) -> u64 {
        self.blocks.load(Ordering::SeqCst)
    }
}

#[test]
fn wear_of_a_volume_is_told() {
    let cores = Cores::start(1);
    let volume = Arc::new(Growing { inner: ram(8, 1), blocks: AtomicU64::new(4096) });
    let volumes: Vec<(u32, Arc<dyn Volume>)> = vec![(1, volume.clone()), (2, ram(8, 2))];
    let mut host = TestHost::new(direct(&cores, volumes, None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    let spare = u32::from(critical_warning::SPARE);
    host.admin(&TestHost::<Direct>::admin_sqe(AdminOpcode::SET_FEATURES, 0x0b, spare));
    let page = u32::from(LogPage::SMART.0) | 127 << 16;
    let page = TestHost::<Direct>::admin_sqe(AdminOpcode::GET_LOG_PAGE, page, 0);
    host.admin(&page);
    let log = SmartLog::read_from_prefix(&host.admin_data()).expect("a page").0;
    let told = |log: &SmartLog| {
        (
            log.critical_warning,
            log.percentage_used,
            log.available_spare,
            log.available_spare_threshold,
        )
    };
    assert_eq!(told(&log), (0, 0, 100, 0), "nobody knows");
    host.push(0, &TestHost::<Direct>::admin_sqe(AdminOpcode::ASYNC_EVENT_REQUEST, 0, 0));
    host.kick(0);
    volume.blocks.store(5000, Ordering::SeqCst);
    let event = event::dw0(event::TYPE_SMART, event::SMART_SPARE, LogPage::SMART.0);
    assert_eq!(host.complete(0).dw0(), event);
    host.admin(&page);
    let log = SmartLog::read_from_prefix(&host.admin_data()).expect("a page").0;
    assert_eq!(told(&log), (critical_warning::SPARE, 100, 9, 10));
    drop(host);
    cores.stop();
}

#[test]
fn a_volume_that_grows_by_itself_is_told_of() {
    let cores = Cores::start(1);
    let volume = Arc::new(Growing { inner: ram(8, 1), blocks: AtomicU64::new(2048) });
    let volumes: Vec<(u32, Arc<dyn Volume>)> = vec![(1, volume.clone())];
    let mut host = TestHost::new(direct(&cores, volumes, None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    host.create_queues(1, 16);
    host.admin(&TestHost::<Direct>::admin_sqe(AdminOpcode::SET_FEATURES, 0x0b, 1 << 8));
    let last = transfer(NvmOpcode::READ, 1, 4095, 1, DATA);
    assert!(!host.run(1, &last).status().is_success());
    host.push(0, &TestHost::<Direct>::admin_sqe(AdminOpcode::ASYNC_EVENT_REQUEST, 0, 0));
    host.kick(0);
    volume.blocks.store(4096, Ordering::SeqCst);
    let changed = event::dw0(event::TYPE_NOTICE, event::NOTICE_NAMESPACE_ATTRIBUTE, 4);
    assert_eq!(host.complete(0).dw0(), changed);
    assert!(host.run(1, &last).status().is_success());
    drop(host);
    cores.stop();
}

#[test]
fn resets_of_every_kind() {
    let cores = Cores::start(2);
    let mut host = TestHost::new(direct(&cores, vec![(1, ram(8, 1))], None), MEMORY, 4);
    host.plug_in();
    for round in 0..12u32 {
        host.enable(32);
        host.create_queues(1, 64);
        exchange(&mut host, 1, 3);
        for _ in 0..round {
            host.push(1, &transfer(NvmOpcode::READ, 1, 0, 8, DATA));
        }
        host.kick(1);
        match round % 4 {
            0 => host.disable(),
            // Function-level reset, by the PCI Express capability.
            1 => {
                host.bus.write(Region::CONFIG, 0x69, &[0x80]);
                assert_eq!(host.register(0x1c), 0);
                host.enable_function();
            }
            2 => {
                host.set_register(0x20, NSSR_RESET);
                host.wait("subsystem reset", |host| host.register(0x1c) == Csts::NSSRO);
                host.set_register(0x1c, Csts::NSSRO);
                assert_eq!(host.register(0x1c), 0);
            }
            // Shutdown, and a reset without waiting for its end.
            _ => {
                host.set_register(0x14, nvme::spec::Cc::ENABLE.with_shn(1).0);
                if round > 4 {
                    host.wait_status(Csts::RDY | Csts::SHST_COMPLETE);
                }
                host.disable();
            }
        }
    }
    let step = host.bus.device.detach();
    host.bus.finish(step);
    assert_eq!(host.register(0x1c), 0);
    drop(host);
    cores.stop();
}

/// A device that is gone without a word, with commands in flight, and a successor on its files.
#[test]
fn a_successor_goes_on() {
    let cores = Cores::start(2);
    let volume = ram(8, 1);
    let mut host = TestHost::new(direct(&cores, vec![(1, Arc::clone(&volume))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    for qid in 1..=3 {
        host.create_queues(qid, 16);
    }
    host.use_shadow_doorbells();
    host.admin(&TestHost::<Direct>::admin_sqe(AdminOpcode::SET_FEATURES, 0x0b, 1 << 8));
    let aer = TestHost::<Direct>::admin_sqe(AdminOpcode::ASYNC_EVENT_REQUEST, 0, 0);
    host.push(0, &aer);
    host.kick(0);
    for _ in 0..5 {
        exchange(&mut host, 3, 40);
        let files = host.bus.device.record();
        let copy = |fd: BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().expect("an fd") };
        let files = Files { doorbells: copy(files.doorbells()), queues: copy(files.queues()) };
        // Some are taken before the end, some are not, some complete.
        let mut wanted = Vec::new();
        for at in 0..10u64 {
            wanted.push(host.push(2, &transfer(NvmOpcode::READ, 1, at * 8, 8, DATA)));
            host.kick(2);
        }
        host.bus = direct(&cores, vec![(1, Arc::clone(&volume))], Some(files));
        host.plug_in();
        let mut found: Vec<u16> = (0..10).map(|_| host.complete(2).cid.get()).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
        assert_eq!(host.pop(2), None);
    }
    exchange(&mut host, 3, 40);
    // The event request is still held.
    host.bus.device.attach_namespace(2, ram(4, 2)).expect("room");
    let changed = event::dw0(event::TYPE_NOTICE, event::NOTICE_NAMESPACE_ATTRIBUTE, 4);
    assert_eq!(host.complete(0).dw0(), changed);
    drop(host);
    cores.stop();
}

/// Counters of the SMART log are those of the device, whoever serves it.
#[test]
fn health_goes_on_in_a_successor() {
    let mut cores = Cores::start(2);
    let volume = ram(8, 1);
    let mut host = TestHost::new(direct(&cores, vec![(1, Arc::clone(&volume))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    for qid in 1..=2 {
        host.create_queues(qid, 16);
    }
    let page = u32::from(LogPage::SMART.0) | 127 << 16;
    let page = TestHost::<Direct>::admin_sqe(AdminOpcode::GET_LOG_PAGE, page, 0);
    for life in 1..=3u128 {
        exchange(&mut host, 2, 20);
        let record = host.bus.device.record().clone();
        let copy = |fd: BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().expect("an fd") };
        let files = Files { doorbells: copy(record.doorbells()), queues: copy(record.queues()) };
        // Nothing of the predecessor writes any more.
        std::mem::replace(&mut cores, Cores::start(2)).stop();
        host.bus = direct(&cores, vec![(1, Arc::clone(&volume))], Some(files));
        host.plug_in();
        host.admin(&page);
        let log = SmartLog::read_from_prefix(&host.admin_data()).expect("a page").0;
        assert_eq!((log.host_reads.get(), log.host_writes.get()), (20 * life, 20 * life));
    }
    drop(host);
    cores.stop();
}

/// The state of a stopped device, taken up by another one with a copy of the memory.
#[test]
fn a_saved_device_goes_on_elsewhere() {
    let cores = Cores::start(1);
    let volume = ram(8, 1);
    let mut host = TestHost::new(direct(&cores, vec![(1, Arc::clone(&volume))], None), MEMORY, 4);
    host.plug_in();
    host.enable(32);
    host.create_queues(1, 16);
    host.create_queues(2, 64);
    exchange(&mut host, 2, 30);
    let step = host.bus.device.set_running(false);
    host.bus.finish(step);
    // Rung while it stands.
    let cid = host.push(1, &transfer(NvmOpcode::READ, 1, 0, 8, DATA));
    host.kick(1);
    let state = host.bus.device.save();
    assert_eq!(host.pop(1), None, "it stands");

    let mut next = direct(&cores, vec![(1, Arc::clone(&volume))], None);
    let step = next.device.set_running(false);
    next.finish(step);
    assert_eq!(next.device.restore(&state[1..]), Err(function::BadState::Unknown));
    assert_eq!(next.device.restore(&state[..state.len() - 8]), Err(function::BadState::Damaged));
    next.device.restore(&state).expect("its own kind of state");
    assert_eq!(next.device.save(), state);
    host.bus = next;
    host.plug_in();
    let step = host.bus.device.set_running(true);
    host.bus.finish(step);
    assert_eq!(host.complete(1).cid.get(), cid);
    exchange(&mut host, 2, 30);
    drop(host);
    cores.stop();
}

#[test]
fn bad_configurations_are_refused() {
    let cores = Cores::start(1);
    let try_with = |config: DeviceConfig, cores: &[CoreHandle]| {
        build(&config, vec![(1, ram(1, 1))], cores, None).map(drop).unwrap_err().to_string()
    };
    let base = || DeviceConfig::new("x", "");
    let handles = &cores.handles;
    assert!(try_with(DeviceConfig { queues: 65, ..base() }, handles).contains("65 I/O queues"));
    let entries = DeviceConfig { queue_entries_max: 1, ..base() };
    assert!(try_with(entries, handles).contains("1 entries"));
    let serial = DeviceConfig { serial: "x".repeat(21), ..base() };
    assert!(try_with(serial, handles).contains("serial"));
    assert!(try_with(base(), &[]).contains("core"));
    cores.stop();
}

#[test]
fn bus_master_enable_is_obeyed() {
    let cores = Cores::start(1);
    let (device, mut host, _folder) = served(&cores, Doorbells::Trapped);
    host.enable(16);
    host.create_queues(1, 16);
    exchange(&mut host, 1, 2);
    // Memory space only.
    host.bus.write(Region::CONFIG, 4, &[2, 0]);
    let read = transfer(NvmOpcode::READ, 1, 0, 8, DATA);
    let identify = Host::admin_sqe(AdminOpcode::IDENTIFY, 1, 0);
    let (io, admin) = (host.push(1, &read), host.push(0, &identify));
    host.kick(1);
    host.kick(0);
    // The answer comes behind what the doorbells caused, and the core's state behind its turn.
    host.register(0x1c);
    for _ in 0..3 {
        device.state().expect("an answer");
    }
    assert!(host.pop(1).is_none() && host.pop(0).is_none());
    host.bus.write(Region::CONFIG, 4, &[6, 0]);
    assert_eq!(host.complete(1).cid.get(), io);
    assert_eq!(host.complete(0).cid.get(), admin);
    // None to abort.
    let mut abort = Host::admin_sqe(AdminOpcode::ABORT, 1 | 77 << 16, 0);
    assert_eq!(host.admin(&abort), 1);
    abort.cdw10.set(64);
    assert_eq!(host.admin(&abort), 1);
    device.stop();
    cores.stop();
}
