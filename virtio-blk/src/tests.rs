//! The whole device: a real socket, real cores, real eventfds, and a frontend that is not QEMU.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use block::fault::{FaultHandle, FaultVolume};
use block::ram::RamVolume;
use block::{Identity, Op};
use reactor::{Core, CoreConfig};
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::IntoBytes;

use super::*;
use crate::testing::counting::allocations;
use crate::testing::{Completed, DATA_MAX, DiskOptions, TestDisk, TestFrontend, TestMemory};
use crate::vhost_user::wire::{self, LogDescription, Request, VringState};

const VOLUME_BYTES: u64 = 8 << 20;
const SECTORS: u64 = VOLUME_BYTES / 512;

/// Cores that run until they are dropped.
struct Cores {
    handles: Vec<CoreHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Cores {
    fn start(count: usize) -> Cores {
        let mut cores = Cores { handles: Vec::new(), threads: Vec::new() };
        for _ in 0..count {
            let (sender, receiver) = mpsc::channel();
            cores.threads.push(thread::spawn(move || {
                let config =
                    CoreConfig { pool_bytes: 4 << 20, spin: Duration::ZERO, ..Default::default() };
                // The error says what this machine lacks.
                let mut core = Core::new(config).unwrap_or_else(|error| panic!("{error}"));
                sender.send(core.handle()).unwrap();
                core.run();
            }));
            cores.handles.push(receiver.recv().expect("the core has started"));
        }
        cores
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.handles.iter().for_each(CoreHandle::stop);
        for thread in self.threads.drain(..) {
            let result = thread.join();
            assert!(result.is_ok() || thread::panicking(), "a core has panicked");
        }
    }
}

/// A device over a volume in memory that can be held up.
struct Rig {
    device: Option<DeviceHandle>,
    fault: FaultHandle,
    path: PathBuf,
    volume: Arc<dyn Volume>,
    // Dropped last: the device's tasks end first.
    cores: Cores,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new(cores: usize, queues: u16) -> Rig {
        Rig::with_grace(cores, queues, Duration::from_millis(50))
    }

    fn with_grace(cores: usize, queues: u16, drain_grace: Duration) -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.sock");
        let ram = RamVolume::new(Identity::from_uuid([7; 16]), VOLUME_BYTES, 512).unwrap();
        let (volume, fault) = FaultVolume::new(Arc::new(ram), 1);
        let volume: Arc<dyn Volume> = Arc::new(volume);
        let cores = Cores::start(cores);
        let config = DeviceConfig { queues, drain_grace, ..DeviceConfig::new("disk", &path) };
        let device = serve(config, Arc::clone(&volume), cores.handles.clone()).unwrap();
        Rig { device: Some(device), fault, path, volume, cores, _folder: folder }
    }

    fn state(&self) -> DeviceState {
        self.device.as_ref().unwrap().state().unwrap()
    }

    /// Until the state is as wanted; states change when the other side gets to it.
    fn until(&self, what: &str, is_reached: impl Fn(&DeviceState) -> bool) -> DeviceState {
        let begun = Instant::now();
        loop {
            let state = self.state();
            if is_reached(&state) {
                return state;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "not {what}: {state:?}");
            thread::yield_now();
        }
    }

    fn connect(&self, options: DiskOptions) -> TestDisk {
        TestDisk::connect(&self.path, &options)
    }
}

fn options() -> DiskOptions {
    DiskOptions::new()
}

/// A small generator: tests must repeat.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % end
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(len + 4);
    while bytes.len() < len {
        bytes.extend((random.below(1 << 31) as u32).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Random reads, writes, discards and flushes on all queues at once, every byte that comes back
/// compared. Requests in flight at the same time do not overlap.
fn verify(disk: &mut TestDisk, model: &mut [u8], requests: u64, seed: u64) {
    const SLICES: u64 = 64;
    let slice_sectors = SECTORS / SLICES;
    let mut random = Random(seed);
    let mut owner: Vec<Option<u64>> = vec![None; SLICES as usize];
    let mut expected: HashMap<u64, (usize, Option<Vec<u8>>)> = HashMap::new();
    let (mut sent, mut done) = (0, 0);
    while done < requests {
        let depth = 1 + random.below(48) as usize;
        while sent < requests && expected.len() < depth {
            let slice = random.below(SLICES);
            if owner[slice as usize].is_some() {
                break;
            }
            let sectors = 1 + random.below((DATA_MAX / 512) as u64 - 1);
            let sector = slice * slice_sectors + random.below(slice_sectors - sectors);
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            let queue = random.below(disk.queues.len() as u64) as usize;
            let (kind, out, room, expect) = match random.below(10) {
                0..=4 => (0, vec![], range.len(), Some(model[range].to_vec())),
                5..=7 => {
                    let data = pattern(range.len(), seed + sent);
                    model[range].copy_from_slice(&data);
                    (1, data, 0, None)
                }
                8 => {
                    let mut zero = sector.to_le_bytes().to_vec();
                    zero.extend((sectors as u32).to_le_bytes());
                    zero.extend([0; 4]);
                    model[range].fill(0);
                    (13, zero, 0, None)
                }
                _ => (4, vec![], 0, None),
            };
            let sector = if kind < 2 { sector } else { 0 };
            if !disk.submit(queue, sent, kind, sector, &out, room) {
                panic!("the ring is larger than the depth");
            }
            owner[slice as usize] = Some(sent);
            expected.insert(sent, (slice as usize, expect));
            sent += 1;
        }
        for Completed { token, status, data, .. } in disk.wait() {
            let (slice, expect) = expected.remove(&token).expect("it was sent");
            assert_eq!(status, 0);
            assert_eq!(owner[slice].take(), Some(token));
            if let Some(expect) = expect {
                assert!(data == expect, "request {token} read something else");
            }
            done += 1;
        }
    }
}

#[test]
fn verified_io_on_two_queues_and_two_cores() {
    let rig = Rig::new(2, 2);
    let mut model = vec![0; VOLUME_BYTES as usize];
    let both = Features::EVENT_IDX | Features::INDIRECT_DESC;
    let features = [
        Features::RING_PACKED,
        Features::RING_PACKED | Features::EVENT_IDX,
        Features::RING_PACKED | both,
        Features::default(),
        Features::EVENT_IDX,
        both,
    ];
    for (without, seed) in features.into_iter().zip(1..) {
        let mut disk = rig.connect(DiskOptions { queues: 2, size: 256, without, ..options() });
        verify(&mut disk, &mut model, 2000, seed);
        let kicks: u64 = disk.queues.iter().map(|queue| queue.kicks).sum();
        let waits: u64 = disk.queues.iter().map(|queue| queue.waits).sum();
        assert!(kicks > 0 && waits > 0, "both sides slept and were woken");
        let state = rig.state();
        assert!(state.client_connected);
        assert_eq!(state.features, Some(disk.frontend.features.for_driver()));
        assert_eq!((state.queues[0].core, state.queues[1].core), (0, 1));
        for queue in &state.queues {
            assert!(queue.is_running && queue.is_enabled && queue.in_flight == 0);
            assert!(queue.counters.reads > 0 && queue.counters.errors == 0);
        }
    }
    // All three clients together.
    let state = rig.until("idle", |state| state.queues.iter().all(|queue| !queue.is_running));
    let done = |q: &QueueState| {
        let c = q.counters;
        c.reads + c.writes + c.flushes + c.write_zeroes
    };
    assert_eq!(state.queues.iter().map(done).sum::<u64>(), 12_000);
    assert!(!state.client_connected);
}

#[test]
fn a_polled_queue_needs_no_kicks() {
    let rig = Rig::new(1, 1);
    let mut model = vec![0; VOLUME_BYTES as usize];
    for without in [Features::RING_PACKED, Features::default()] {
        let mut disk = rig.connect(DiskOptions { polled: true, without, ..options() });
        verify(&mut disk, &mut model, 500, 9);
        let state = rig.state();
        assert_eq!((state.queues[0].counters.kicks, disk.queues[0].kicks), (0, 0));
    }
}

/// So that a thread that fails does not leave a core asleep that waits for it.
struct WakeOnDrop(CoreHandle);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// From the first request on a warm queue to the last: the core's thread allocates nothing.
#[test]
fn a_steady_state_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.sock");
    let ram = RamVolume::new(Identity::from_uuid([7; 16]), VOLUME_BYTES, 512).unwrap();
    let config = CoreConfig { pool_bytes: 4 << 20, spin: Duration::ZERO, ..Default::default() };
    let mut core = Core::new(config).unwrap_or_else(|error| panic!("{error}"));
    let device =
        serve(DeviceConfig::new("disk", &path), Arc::new(ram), vec![core.handle()]).unwrap();

    // The driver says when the queue is warm and when it is done, the core that it has counted.
    let (tell, told) = mpsc::channel();
    let (counted, go_on) = mpsc::channel();
    let handle = core.handle();
    let driver = thread::spawn(move || {
        let waker = WakeOnDrop(handle.clone());
        // Dropped first, also by a panic: the core finds it gone when it is woken.
        let tell = tell;
        let mut disk = TestDisk::connect(&path, &options());
        let mut zero = 0u64.to_le_bytes().to_vec();
        zero.extend([8, 0, 0, 0, 0, 0, 0, 0]);
        let mut rounds = |count| {
            for i in 0..count {
                for (kind, sent, room) in
                    [(1, &[5; 4096][..], 0), (0, &[], 4096), (13, &zero, 0), (11, &zero, 0)]
                {
                    assert!(disk.submit(0, i, kind, 0, sent, room));
                }
                assert!(disk.submit(0, i, 4, 0, &[], 0) && disk.submit(0, i, 8, 0, &[], 20));
                let mut done = 0;
                while done < 6 {
                    let completed = disk.wait();
                    assert!(completed.iter().all(|request| request.status == 0));
                    done += completed.len();
                }
            }
        };
        rounds(300);
        tell.send(()).unwrap();
        handle.wake();
        go_on.recv().unwrap();
        rounds(1000);
        tell.send(()).unwrap();
        drop((tell, waker));
    });
    let turn_until_told = |core: &mut Core| {
        while told.try_recv() == Err(mpsc::TryRecvError::Empty) {
            core.turn(true);
        }
        allocations()
    };
    let before = turn_until_told(&mut core);
    counted.send(()).unwrap();
    let after = turn_until_told(&mut core);
    device.request(super::Request::Stop);
    core.handle().stop();
    core.run();
    driver.join().unwrap();
    device.stop();
    // The driver may have left already, and a few are fair for that.
    assert!(after - before < 100, "{} allocations", after - before);
}

#[test]
fn what_a_driver_finds() {
    let rig = Rig::new(1, 3);
    let mut disk = rig.connect(options());
    assert_eq!(disk.frontend.ask(Request::GET_QUEUE_NUM), 3);
    let mut config = vec![0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0];
    config.extend([0; 60]);
    disk.frontend.send(Request::GET_CONFIG, false, &config, &[]);
    let config = disk.frontend.reply(Request::GET_CONFIG);
    assert_eq!(config[12..20], SECTORS.to_le_bytes());
    let id = disk.run(0, 8, 0, &[], 20);
    assert_eq!((id.status, &id.data[..]), (0, &b"07070707070707070707"[..]));
    assert_eq!(disk.run(0, 0, SECTORS, &[], 512).status, 1);
    assert_eq!(disk.run(0, 42, 0, &[], 0).status, 2);
}

#[test]
fn the_next_client_is_served_when_the_first_has_left() {
    let rig = Rig::new(1, 1);
    // Twice, as fio with libblkio does: the first connection does no I/O.
    let mut first = TestFrontend::connect(&rig.path);
    first.negotiate(Features::default());
    drop(first);
    let mut disk = rig.connect(options());
    disk.write(0, 5, &pattern(4096, 5));

    // One that waits, and some that say nothing of sense.
    let waiting = TestFrontend::connect(&rig.path);
    waiting.send(Request::GET_QUEUE_NUM, false, &[], &[]);
    for junk in [&[0xff; 64][..], &[0; 12], b"GET / HTTP/1.1\r\n\r\n"] {
        // The connection may be closed before all of it is written.
        let _ = UnixStream::connect(&rig.path).unwrap().write(junk);
    }
    assert_eq!(disk.read(0, 5, 4096), pattern(4096, 5));
    assert!(rig.state().client_connected);
    drop(disk);
    assert_eq!(waiting.reply(Request::GET_QUEUE_NUM), 1u64.to_ne_bytes());
    drop(waiting);
    let mut disk = rig.connect(options());
    assert_eq!(disk.read(0, 5, 4096), pattern(4096, 5));
}

#[test]
fn clients_that_break_the_protocol_are_disconnected() {
    let rig = Rig::new(1, 1);
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let mut random = Random(77);
    for round in 0..200u64 {
        let frontend = TestFrontend::connect(&rig.path);
        match round % 5 {
            0 => frontend.send_raw(&pattern(100, round), &[]),
            1 => frontend.send_raw(&pattern(7, round), &[event.as_fd(); 3]),
            2 => frontend.send(Request::SET_VRING_NUM, false, &[9; 8], &[]),
            3 => frontend.send(Request::SET_MEM_TABLE, false, &[0xff; 264], &[event.as_fd(); 8]),
            _ => {
                let kind = Request(random.below(45) as u32);
                frontend.send(kind, false, &pattern(random.below(90) as usize, round), &[]);
            }
        }
        // It is dropped at once, or after it was told off.
        if round % 3 == 0 {
            frontend.stream().shutdown(std::net::Shutdown::Write).unwrap();
            let _ = frontend.try_reply(Request::GET_FEATURES);
        }
    }
    let mut disk = rig.connect(options());
    disk.write(0, 0, &pattern(512, 1));
    assert_eq!(disk.read(0, 0, 512), pattern(512, 1));
}

#[test]
fn stopping_a_ring_waits_for_its_requests() {
    let rig = Rig::with_grace(1, 2, Duration::from_secs(20));
    let mut disk = rig.connect(DiskOptions { queues: 2, ..options() });
    rig.fault.hold();
    for i in 0..10 {
        assert!(disk.submit(0, i, 0, i, &[], 512));
    }
    disk.kick();
    rig.until("taken", |state| state.queues[0].in_flight == 10);
    let state = VringState { index: 0, num: 0 };
    disk.frontend.send(Request::GET_VRING_BASE, false, state.as_bytes(), &[]);
    rig.until("stopping", |state| state.queues[0].is_stopping);
    assert!(disk.completed().is_empty());
    rig.fault.release();
    let base = disk.frontend.reply(Request::GET_VRING_BASE);
    assert_eq!(base, [0, 0, 0, 0, 10, 0, 0, 0]);
    let completed = disk.completed();
    assert!(completed.len() == 10 && completed.iter().all(|request| request.status == 0));
    assert!(!rig.state().queues[0].is_running && rig.state().queues[1].is_running);
    disk.submit(0, 99, 0, 0, &[], 512);
    disk.write(1, 3, &[3; 512]);
    assert!(disk.completed().is_empty(), "the stopped ring is left alone");
    disk.start(0, 10);
    assert_eq!(disk.wait()[0].token, 99);
}

#[test]
fn a_lost_path_does_not_hang_the_frontend() {
    let rig = Rig::new(1, 2);
    let mut disk = rig.connect(DiskOptions { queues: 2, ..options() });
    rig.fault.hold();
    for i in 0..3 {
        assert!(disk.submit(0, i, 1, i, &[1; 512], 0));
    }
    disk.kick();
    rig.until("taken", |state| state.queues[0].in_flight == 3);
    // The grace is over, the requests are aborted and the guest is told.
    assert_eq!(disk.frontend.stop_ring(0), 3);
    let completed = disk.completed();
    assert_eq!(completed.len(), 3);
    assert!(completed.iter().all(|request| request.status == 1));
    rig.fault.release();
    disk.write(1, 0, &[1; 512]);
    disk.start(0, 3);
    disk.write(0, 0, &[2; 512]);
    assert_eq!(disk.read(1, 0, 512), [2; 512]);
}

#[test]
fn a_client_that_vanishes_in_mid_io_hurts_nobody() {
    let rig = Rig::new(2, 2);
    for round in 0..5 {
        let mut disk = rig.connect(DiskOptions { queues: 2, ..options() });
        rig.fault.hold();
        for i in 0..20 {
            assert!(disk.submit(i as usize % 2, i, 1, i, &[round; 512], 0));
        }
        disk.kick();
        rig.until("taken", |state| state.queues.iter().map(|q| q.in_flight).sum::<usize>() == 20);
        if round == 4 {
            // While it waits for an answer.
            let state = VringState { index: 0, num: 0 };
            disk.frontend.send(Request::GET_VRING_BASE, false, state.as_bytes(), &[]);
        }
        drop(disk);
        if round % 2 == 0 {
            rig.fault.release();
        }
        rig.until("stopped", |state| state.queues.iter().all(|queue| !queue.is_running));
        rig.fault.release();
        let counters = rig.fault.counters();
        assert_eq!(
            counters.submitted[Op::Write.index()],
            counters.completed[Op::Write.index()],
            "nothing of it is left in the channel"
        );
        let mut disk = rig.connect(options());
        disk.write(0, 100, &[round; 512]);
        assert_eq!(disk.read(0, 100, 512), [round; 512]);
    }
}

/// A device that stops while its path to storage is lost answers nothing: the next one finishes
/// what it had, once, and the driver sees no error.
#[test]
fn requests_of_a_stopped_device_are_done_by_the_next() {
    for without in [Features::RING_PACKED, Features::default()] {
        stops_with_requests_in_flight(DiskOptions {
            queues: 2,
            inflight: true,
            without,
            ..options()
        });
    }
}

fn stops_with_requests_in_flight(options: DiskOptions) {
    let mut rig = Rig::new(2, 2);
    let mut disk = rig.connect(options);
    disk.write(0, 8, &pattern(4096, 1));
    for round in 0..3u64 {
        rig.fault.hold();
        let first = pattern(4096, 2 + round);
        for i in 0..20u64 {
            assert!(disk.submit(i as usize % 2, i, 1, 100 + i * 8, &first, 0));
            assert!(disk.submit(i as usize % 2, 100 + i, 0, 8, &[], 4096));
        }
        disk.kick();
        rig.until("taken", |state| state.queues.iter().map(|q| q.in_flight).sum::<usize>() == 40);
        rig.device.take().unwrap().stop();
        assert!(disk.completed().is_empty(), "nothing is answered with an error");

        rig.fault.release();
        let config = DeviceConfig { queues: 2, ..DeviceConfig::new("next", &rig.path) };
        let next = serve(config, Arc::clone(&rig.volume), rig.cores.handles.clone()).unwrap();
        rig.device = Some(next);
        disk.reconnect(&rig.path);
        let mut tokens = std::collections::HashSet::new();
        while tokens.len() < 40 {
            for Completed { token, status, data, .. } in disk.wait() {
                assert_eq!(status, 0);
                assert!(tokens.insert(token), "request {token} came twice");
                assert!(token < 100 || data == pattern(4096, 1));
            }
        }
        assert!(disk.completed().is_empty());
        for i in 0..20 {
            assert!(disk.read(0, 100 + i * 8, 4096) == first);
        }
    }
}

/// A machine that is paused while the path to storage is lost, and goes on later: its driver sees
/// no error, and each request is done once.
#[test]
fn requests_of_a_paused_machine_are_done_when_it_goes_on() {
    for without in [Features::RING_PACKED, Features::default()] {
        let rig = Rig::new(2, 2);
        let mut disk = rig.connect(DiskOptions { queues: 2, inflight: true, without, ..options() });
        disk.write(0, 8, &pattern(4096, 1));
        for round in 0..3u64 {
            rig.fault.hold();
            let first = pattern(4096, 2 + round);
            for i in 0..20u64 {
                assert!(disk.submit(i as usize % 2, i, 1, 100 + i * 8, &first, 0));
                assert!(disk.submit(i as usize % 2, 100 + i, 0, 8, &[], 4096));
            }
            disk.kick();
            let in_flight =
                |state: &DeviceState| state.queues.iter().map(|q| q.in_flight).sum::<usize>();
            rig.until("taken", |state| in_flight(state) == 40);
            let bases = [disk.frontend.stop_ring(0), disk.frontend.stop_ring(1)];
            assert!(disk.completed().is_empty(), "nothing is answered with an error");
            assert_eq!(in_flight(&rig.state()), 0);

            // What is left is done when the machine goes on, not before.
            rig.fault.release();
            let writes = rig.fault.counters().submitted[Op::Write.index()];
            assert_eq!(writes, rig.fault.counters().completed[Op::Write.index()]);
            disk.resume(&bases);
            let mut tokens = std::collections::HashSet::new();
            while tokens.len() < 40 {
                for Completed { token, status, data, .. } in disk.wait() {
                    assert_eq!(status, 0);
                    assert!(tokens.insert(token), "request {token} came twice");
                    assert!(token < 100 || data == pattern(4096, 1));
                }
            }
            assert!(disk.completed().is_empty());
            assert_eq!(rig.fault.counters().submitted[Op::Write.index()], writes + 20);
            for i in 0..20 {
                assert!(disk.read(0, 100 + i * 8, 4096) == first);
            }
        }
    }
}

/// A machine that moves leaves the record behind, and one whose driver has reset the device has
/// forgotten its requests: nothing may stay there.
#[test]
fn requests_of_a_machine_that_moves_or_resets_are_answered() {
    for without in [Features::RING_PACKED, Features::default()] {
        for is_reset in [false, true] {
            let rig = Rig::new(1, 1);
            let without = without | Features::LOG_ALL;
            let mut disk = rig.connect(DiskOptions { inflight: true, without, ..options() });
            rig.fault.hold();
            for i in 0..3 {
                assert!(disk.submit(0, i, 1, i, &[1; 512], 0));
            }
            disk.kick();
            rig.until("taken", |state| state.queues[0].in_flight == 3);
            if is_reset {
                disk.frontend.tell(Request::RESET_DEVICE, &[], &[]);
            } else {
                let bitmap = TestMemory::new(1 << 20);
                let base = LogDescription { mmap_size: bitmap.len(), mmap_offset: 0 };
                let fd = bitmap.fd().as_fd();
                disk.frontend.send(Request::SET_LOG_BASE, false, base.as_bytes(), &[fd]);
                disk.frontend.reply(Request::SET_LOG_BASE);
                let features = disk.frontend.features | Features::LOG_ALL;
                disk.frontend.tell(Request::SET_FEATURES, features.0.as_bytes(), &[]);
                disk.frontend.stop_ring(0);
            }
            let completed = disk.completed();
            assert_eq!(completed.len(), 3);
            assert!(completed.iter().all(|request| request.status == 1));
            rig.fault.release();
        }
    }
}

/// Not a test by itself: serves a file until it is killed.
#[test]
#[ignore = "run in a child process by the test below"]
fn child_that_serves() {
    let path =
        PathBuf::from(std::env::var_os("PENSTOCK_TEST_FOLDER").expect("the parent's folder"));
    let spec = format!("file:{}", path.join("volume").display());
    let volume = spec.parse::<block::VolumeSpec>().unwrap();
    let volume = volume.open(Identity::from_uuid([7; 16])).unwrap();
    let cores = Cores::start(2);
    let config = DeviceConfig { queues: 2, ..DeviceConfig::new("child", path.join("disk.sock")) };
    let _device = serve(config, volume, cores.handles.clone()).unwrap();
    loop {
        thread::park();
    }
}

struct Child(std::process::Child);

impl Child {
    fn start(folder: &std::path::Path) -> Child {
        let path = folder.join("disk.sock");
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::child_that_serves", "--ignored", "--nocapture"])
            .env("PENSTOCK_TEST_FOLDER", folder)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let child = Child(child);
        let begun = Instant::now();
        while UnixStream::connect(&path).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the child does not serve");
            thread::yield_now();
        }
        child
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// SIGKILL in the middle of random I/O, again and again: no error, no request lost or done twice,
/// no byte that differs.
fn survives_being_killed(options: DiskOptions, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(folder.path().join("volume")).unwrap();
    file.set_len(VOLUME_BYTES).unwrap();
    let path = folder.path().join("disk.sock");
    let mut child = Child::start(folder.path());
    let mut disk = TestDisk::connect(&path, &options);
    let mut model = vec![0; VOLUME_BYTES as usize];
    let mut random = Random(seed);
    let mut resubmitted = 0;
    for round in 0..8 {
        // Some requests go through, and then it dies with more of them under way.
        verify(&mut disk, &mut model, 50 + random.below(100), seed + 1000 * round);
        let lanes = VOLUME_BYTES as usize / 512 / 64;
        let mut pending = HashMap::new();
        for i in 0..40usize {
            let (sector, queue) = (i * lanes, i % disk.queues.len());
            let range = sector * 512..sector * 512 + 8192;
            let data = pattern(8192, seed + round * 77 + i as u64);
            let is_read = i % 3 == 0;
            let sent: &[u8] = if is_read { &[] } else { &data };
            let room = if is_read { 8192 } else { 0 };
            assert!(disk.submit(queue, i as u64, u32::from(!is_read), sector as u64, sent, room));
            if !is_read {
                model[range.clone()].copy_from_slice(&data);
            }
            pending.insert(i as u64, is_read.then(|| model[range].to_vec()));
            if i % 7 == 0 {
                disk.kick();
            }
        }
        disk.kick();
        let take = |completed: Vec<Completed>, pending: &mut HashMap<u64, Option<Vec<u8>>>| {
            for Completed { token, status, data, .. } in completed {
                assert_eq!(status, 0);
                let expected = pending.remove(&token).expect("answered once");
                assert!(expected.is_none_or(|expected| expected == data));
            }
        };
        if random.below(2) == 0 {
            let completed = disk.wait();
            take(completed, &mut pending);
        }
        child.kill();
        let completed = disk.completed();
        take(completed, &mut pending);
        resubmitted += pending.len();
        child = Child::start(folder.path());
        disk.reconnect(&path);
        while !pending.is_empty() {
            let completed = disk.wait();
            take(completed, &mut pending);
        }
    }
    assert!(resubmitted > 0, "it was never killed with work to do");
    verify(&mut disk, &mut model, 200, seed);
    drop(disk);
    child.kill();
    assert!(std::fs::read(folder.path().join("volume")).unwrap() == model);
}

#[test]
fn a_killed_device_is_replaced_without_an_error() {
    let options = DiskOptions { queues: 2, inflight: true, ..options() };
    survives_being_killed(options, 5);
    let without = Features::RING_PACKED | Features::EVENT_IDX;
    survives_being_killed(DiskOptions { without, ..options }, 6);
}

#[test]
fn a_killed_device_with_packed_rings_is_replaced_without_an_error() {
    let options = DiskOptions { queues: 2, inflight: true, ..options() };
    survives_being_killed(DiskOptions { without: Features::default(), ..options }, 7);
    let without = Features::EVENT_IDX | Features::INDIRECT_DESC;
    survives_being_killed(DiskOptions { without, size: 256, ..options }, 8);
}

/// Whatever the device writes while pages are marked, is marked; also what it began before.
#[test]
fn dirty_pages_are_marked() {
    for without in [Features::RING_PACKED, Features::default()] {
        marks_dirty_pages(without);
    }
}

fn marks_dirty_pages(without: Features) {
    let rig = Rig::new(1, 1);
    let without = without | Features::LOG_ALL;
    let mut disk = rig.connect(DiskOptions { without, ..options() });
    disk.write(0, 0, &pattern(32768, 3));
    let bitmap = TestMemory::new(1 << 20);
    let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();

    rig.fault.hold();
    for i in 0..8 {
        assert!(disk.submit(0, i, 0, 8 * i, &[], 4096 + 512 * i as usize));
        assert!(disk.submit(0, 100 + i, 1, 200 + 16 * i, &pattern(8192, i), 0));
    }
    disk.kick();
    rig.until("taken", |state| state.queues[0].in_flight == 16);
    // GET_ID is answered at once, and so not before pages are marked.
    let start = disk.memory.read(disk.memory.base(), disk.memory.len() as usize);

    let base = LogDescription { mmap_size: bitmap.len(), mmap_offset: 0 };
    let fd = bitmap.fd().as_fd();
    disk.frontend.send(Request::SET_LOG_BASE, false, base.as_bytes(), &[fd]);
    assert_eq!(disk.frontend.reply(Request::SET_LOG_BASE), 0u64.to_ne_bytes());
    disk.frontend.tell(Request::SET_LOG_FD, &[], &[told.as_fd()]);
    let features = disk.frontend.features | Features::LOG_ALL;
    disk.frontend.tell(Request::SET_FEATURES, features.0.as_bytes(), &[]);
    disk.log_ring(0, true);
    assert_eq!(rig.state().features.unwrap().0 & Features::LOG_ALL.0, 0, "no driver's feature");
    assert!(disk.submit(0, 300, 8, 0, &[], 20));
    disk.kick();
    rig.fault.release();
    let mut done = 0;
    while done < 17 {
        done += disk.wait().len();
    }
    // The last mark and the word on it follow the used entry that this side has seen already.
    rig.until("done", |state| state.queues[0].in_flight == 0);
    rustix::io::read(&told, &mut [0; 8]).expect("it was told of");

    let end = disk.memory.read(disk.memory.base(), disk.memory.len() as usize);
    let is_marked = |addr: u64| {
        let page = addr / 4096;
        bitmap.read(bitmap.base() + page / 8, 1)[0] >> (page % 8) & 1 == 1
    };
    let (mut dirty, mut marked) = (0, 0);
    for (page, (before, after)) in start.chunks(4096).zip(end.chunks(4096)).enumerate() {
        let addr = disk.memory.base() + page as u64 * 4096;
        dirty += usize::from(before != after);
        marked += usize::from(is_marked(addr));
        // The last request was written by the driver after the start: its header is no mark's
        // business.
        let is_headers = after.starts_with(&8u32.to_le_bytes());
        assert!(before == after || is_marked(addr) || is_headers, "page {page} is not marked");
    }
    // Eight reads of up to 8 KiB, 17 status bytes, an ID and the ring.
    assert!((30..=40).contains(&dirty), "{dirty} pages were written");
    assert!(marked <= dirty + 8, "{marked} pages are marked and {dirty} were written");

    // No longer.
    disk.frontend.tell(Request::SET_FEATURES, disk.frontend.features.0.as_bytes(), &[]);
    disk.log_ring(0, false);
    bitmap.write(bitmap.base(), &vec![0; 1 << 20]);
    disk.read(0, 0, 4096);
    assert!(bitmap.read(bitmap.base(), 1 << 20).iter().all(|byte| *byte == 0));
}

/// A volume that grows is told of, and used at once.
#[test]
fn a_driver_learns_of_a_new_size() {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(folder.path().join("volume")).unwrap();
    file.set_len(1 << 20).unwrap();
    let spec = format!("file:{}", folder.path().join("volume").display());
    let volume = spec.parse::<block::VolumeSpec>().unwrap();
    let volume = volume.open(Identity::from_uuid([7; 16])).unwrap();
    let cores = Cores::start(2);
    let path = folder.path().join("disk.sock");
    let config = DeviceConfig { queues: 2, ..DeviceConfig::new("disk", &path) };
    let device = serve(config, Arc::clone(&volume), cores.handles.clone()).unwrap();
    let mut disk = TestDisk::connect(&path, &DiskOptions { queues: 2, ..options() });
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    disk.frontend.tell(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    let capacity = |disk: &TestDisk| {
        let config = [&[0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8]].concat();
        disk.frontend.send(Request::GET_CONFIG, false, &config, &[]);
        u64::from_le_bytes(disk.frontend.reply(Request::GET_CONFIG)[12..].try_into().unwrap())
    };
    assert_eq!(capacity(&disk), 2048);
    assert_eq!(disk.run(0, 1, 3000, &[1; 512], 0).status, 1);

    for (mib, by_hand) in [(3, true), (5, false), (2, true)] {
        file.set_len(mib << 20).unwrap();
        volume.refresh().unwrap();
        if by_hand {
            device.volume_changed();
        }
        let mut notice = [0; 12];
        (&ours).read_exact(&mut notice).expect("a notice");
        assert_eq!(notice, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let sectors = mib * 2048;
        assert_eq!(capacity(&disk), sectors);
        for queue in 0..2 {
            disk.write(queue, sectors - 8, &pattern(4096, mib));
            assert_eq!(disk.run(queue, 0, sectors, &[], 512).status, 1);
        }
    }
    device.stop();
}

#[test]
fn memory_regions_come_and_go_while_rings_run() {
    let rig = Rig::new(1, 1);
    let mut disk = rig.connect(options());
    let other = TestMemory::new(1 << 16);
    let region = |memory: &TestMemory, at: u64| {
        let mut region = memory.region();
        region.guest_addr += at;
        region.user_addr += at;
        let mut payload = vec![0; 8];
        payload.extend(region.as_bytes());
        payload
    };
    let (far, own) = (region(&other, 1 << 32), region(&disk.memory, 0));
    for round in 0..20u8 {
        assert!(disk.submit(0, 1, 1, 0, &[round; 512], 0));
        disk.kick();
        disk.frontend.tell(Request::ADD_MEM_REG, &far, &[other.fd().as_fd()]);
        disk.frontend.tell(Request::REM_MEM_REG, &far, &[]);
        assert_eq!(disk.wait()[0].status, 0);
        assert_eq!(disk.read(0, 0, 512), [round; 512]);
    }
    // The rings themselves go away for a moment, with a request in them.
    disk.frontend.tell(Request::REM_MEM_REG, &own, &[]);
    assert!(disk.submit(0, 2, 0, 0, &[], 512));
    disk.kick();
    assert!(disk.completed().is_empty());
    let fd = disk.memory.fd().try_clone().unwrap();
    disk.frontend.tell(Request::ADD_MEM_REG, &own, &[fd.as_fd()]);
    let completed = disk.wait();
    assert_eq!((completed[0].token, completed[0].status), (2, 0));
    assert_eq!(completed[0].data, [19; 512]);
}

#[test]
fn a_removed_region_waits_for_its_requests_but_not_for_ever() {
    let rig = Rig::new(1, 1);
    let mut disk = rig.connect(options());
    let mut own = vec![0; 8];
    own.extend(disk.memory.region().as_bytes());
    rig.fault.hold();
    assert!(disk.submit(0, 1, 0, 0, &[], 512));
    disk.kick();
    rig.until("taken", |state| state.queues[0].in_flight == 1);
    let begun = Instant::now();
    disk.frontend.tell(Request::REM_MEM_REG, &own, &[]);
    assert!(begun.elapsed() >= Duration::from_millis(50));
    assert_eq!(rig.state().queues[0].in_flight, 1);
    let fd = disk.memory.fd().try_clone().unwrap();
    disk.frontend.tell(Request::ADD_MEM_REG, &own, &[fd.as_fd()]);
    rig.fault.release();
    assert_eq!(disk.wait()[0].status, 0);
}

#[test]
fn a_broken_ring_is_told_and_can_be_set_up_again() {
    let rig = Rig::new(1, 2);
    let mut disk = rig.connect(DiskOptions { queues: 2, ..options() });
    let err = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    disk.frontend.tell(Request::SET_VRING_ERR, 0u64.as_bytes(), &[err.as_fd()]);
    disk.queues[0].ring.split().push_head(64);
    disk.queues[0].ring.publish();
    assert!(disk.submit(0, 1, 0, 0, &[], 512));
    disk.kick();
    let state = rig.until("broken", |state| state.queues[0].broken.is_some());
    rustix::io::read(&err, &mut [0; 8]).unwrap();
    assert_eq!(state.queues[0].broken, Some(Broken::Head));
    disk.write(1, 0, &[7; 512]);
    assert_eq!(disk.frontend.stop_ring(0), 0);
    disk.start(0, 1);
    assert_eq!(disk.wait()[0].data, [7; 512]);
    assert_eq!(rig.state().queues[0].broken, None);
}

#[test]
fn rings_outside_of_memory_are_refused() {
    let rig = Rig::new(1, 1);
    let disk = rig.connect(options());
    disk.frontend.stop_ring(0);
    let region = disk.memory.region();
    let address = wire::VringAddr {
        index: 0,
        flags: 0,
        descriptor: region.user_addr + region.size - 16,
        used: region.user_addr,
        available: region.user_addr,
        log: 0,
    };
    disk.frontend.tell(Request::SET_VRING_ADDR, address.as_bytes(), &[]);
    let polled = 0x100u64;
    assert_eq!(disk.frontend.acked(Request::SET_VRING_KICK, polled.as_bytes(), &[]), 1);
    let state = rig.state();
    assert!(state.client_connected && !state.queues[0].is_running);
}

#[test]
fn memory_cut_off_under_a_running_ring() {
    let rig = Rig::new(1, 1);
    let mut disk = rig.connect(options());
    disk.write(0, 0, &[1; 512]);
    assert!(disk.submit(0, 1, 0, 0, &[], 512));
    rustix::fs::ftruncate(disk.memory.fd(), 0).unwrap();
    disk.kick();
    // The device reads zeros there now, or whatever: it goes on for the next client.
    drop(disk);
    let mut disk = rig.connect(options());
    assert_eq!(disk.read(0, 0, 512), [1; 512]);
}

#[test]
fn stop_disconnects_and_removes_the_socket() {
    let mut rig = Rig::new(2, 2);
    let mut disk = rig.connect(DiskOptions { queues: 2, ..options() });
    disk.write(0, 0, &[1; 512]);
    rig.fault.hold();
    assert!(disk.submit(1, 1, 0, 0, &[], 512));
    disk.kick();
    rig.until("taken", |state| state.queues[1].in_flight == 1);
    rig.device.take().unwrap().stop();
    assert!(!rig.path.exists());
    assert_eq!(disk.frontend.try_reply(Request::GET_FEATURES), None, "the connection is closed");
    assert_eq!(rig.cores.handles.len(), 2);

    // The same cores serve another one.
    rig.fault.release();
    let config = DeviceConfig::new("again", &rig.path);
    let again = serve(config, Arc::clone(&rig.volume), rig.cores.handles.clone()).unwrap();
    let mut disk = rig.connect(options());
    assert_eq!(disk.read(0, 0, 512), [1; 512]);
    drop(disk);
    drop(again);
}

#[test]
fn cores_that_stop_take_the_client_with_them() {
    let rig = Rig::new(1, 1);
    let mut disk = rig.connect(options());
    disk.write(0, 0, &[1; 512]);
    rig.cores.handles[0].stop();
    rig.until("gone", |state| state.queues.is_empty());
    let state = VringState { index: 0, num: 0 };
    disk.frontend.send(Request::GET_VRING_BASE, false, state.as_bytes(), &[]);
    assert_eq!(disk.frontend.try_reply(Request::GET_VRING_BASE), None);
}

#[test]
fn bad_configuration_is_refused() {
    let cores = Cores::start(1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.sock");
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([1; 16]), 1 << 20, 512).unwrap());
    let good = DeviceConfig::new("disk", &path);
    let error = |config: DeviceConfig, cores: &[CoreHandle]| {
        serve(config, Arc::clone(&volume), cores.to_vec()).unwrap_err().to_string()
    };
    let one = &cores.handles;
    assert!(error(DeviceConfig { queues: 0, ..good.clone() }, one).starts_with("0 queues"));
    assert!(error(DeviceConfig { queues: 257, ..good.clone() }, one).starts_with("257 queues"));
    let size = DeviceConfig { queue_size_max: 100, ..good.clone() };
    assert!(error(size, one).starts_with("queue size 100"));
    let serial = DeviceConfig { serial: "x".repeat(21), ..good.clone() };
    assert!(error(serial, one).contains("up to 20"));
    let mode = DeviceConfig { socket_mode: 0o1777, ..good.clone() };
    assert!(error(mode, one).contains("1777"));
    assert!(error(good.clone(), &[]).contains("needs a core"));
    let _first = serve(good.clone(), Arc::clone(&volume), one.clone()).unwrap();
    assert!(error(good, one).contains("is in use"));
}
