//! The control thread over a real socket, with a client that is not QEMU and a function that is no
//! NVMe controller; and the same killed at every step.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use iobuf::GuestMemory;
use zerocopy::IntoBytes;

use super::*;
use crate::dirty::DirtyLog;
use crate::function::{BadState, Irq, Region, RegionInfo, Reset};
use crate::testing::{Call, ModelFunction, TestClient, memfd};
use crate::vfio_user::journal::FdKeeper;
use crate::vfio_user::wire;

const PAGE: u64 = 4096;

/// A function that a test looks into, and that outlives the process it is called from.
#[derive(Clone)]
struct Shared {
    model: Arc<Mutex<ModelFunction>>,
    doorbells: Arc<OwnedFd>,
    /// The process has been killed: what it still does is not done.
    is_dead: Arc<AtomicBool>,
}

impl Shared {
    fn new() -> Shared {
        let model = ModelFunction::default();
        let doorbells = model.region_fd(Region::BAR0).unwrap().try_clone_to_owned().unwrap();
        Shared {
            model: Arc::new(Mutex::new(model)),
            doorbells: Arc::new(doorbells),
            is_dead: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ModelFunction> {
        self.model.lock().unwrap()
    }

    fn step(&self, f: impl FnOnce(&mut ModelFunction) -> Step) -> Step {
        if self.is_dead.load(Ordering::Relaxed) { Step::Done } else { f(&mut self.lock()) }
    }
}

impl Function for Shared {
    fn region(&self, region: Region) -> RegionInfo {
        self.lock().region(region)
    }
    fn region_fd(&self, region: Region) -> Option<BorrowedFd<'_>> {
        (region == Region::BAR0).then(|| self.doorbells.as_fd())
    }
    fn vectors(&self, irq: Irq) -> u32 {
        self.lock().vectors(irq)
    }
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        self.lock().read(region, offset, data);
    }
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> Step {
        self.step(|model| model.write(region, offset, data))
    }
    fn reset(&mut self, reset: Reset) -> Step {
        self.step(|model| model.reset(reset))
    }
    fn set_memory(&mut self, memory: &GuestMemory, has_removed: bool) -> Step {
        self.step(|model| model.set_memory(memory, has_removed))
    }
    fn set_trigger(&mut self, irq: Irq, vector: u32, eventfd: Option<Arc<OwnedFd>>) {
        self.lock().set_trigger(irq, vector, eventfd);
    }
    fn set_masked(&mut self, irq: Irq, vector: u32, is_masked: bool) {
        self.lock().set_masked(irq, vector, is_masked);
    }
    fn trigger(&mut self, irq: Irq, vector: u32) {
        self.lock().trigger(irq, vector);
    }
    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) -> Step {
        self.step(|model| model.set_dirty_log(log))
    }
    fn set_running(&mut self, is_running: bool) -> Step {
        self.step(|model| model.set_running(is_running))
    }
    fn save(&mut self) -> Vec<u8> {
        self.lock().save()
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), BadState> {
        self.lock().restore(state)
    }
    fn detach(&mut self) -> Step {
        self.step(|model| model.detach())
    }
    fn poll(&mut self) -> Option<Event> {
        self.lock().poll()
    }
}

/// A device being served.
struct Rig {
    function: Shared,
    path: PathBuf,
    requests: mpsc::Sender<Request<Shared>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvme.sock");
        let listener = Listener::new(&path, 0o600).unwrap();
        let (requests, receiver) = mpsc::channel();
        let (function, waker) = (Shared::new(), Waker::new().unwrap());
        let name = "test".to_owned();
        let server = Server::new(name, function.clone(), listener, waker.clone(), receiver, None);
        let thread = Some(std::thread::spawn(move || drop(server.run())));
        Rig { function, path, requests, waker, thread, _folder: folder }
    }

    fn client(&self) -> TestClient {
        let client = TestClient::connect(&self.path);
        client.negotiate();
        client
    }

    fn request(&self, request: Request<Shared>) {
        self.requests.send(request).unwrap();
        self.waker.wake();
    }

    fn state(&self) -> ClientState {
        let (sender, receiver) = mpsc::channel();
        self.request(Request::Ask(Box::new(move |_, state| sender.send(state).unwrap())));
        receiver.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    fn wait_for(&self, what: impl Fn(&Rig) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !what(self) {
            assert!(Instant::now() < end, "it never came");
            std::thread::yield_now();
        }
    }

    fn let_finish(&self) {
        self.function.lock().can_finish = true;
        self.waker.wake();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.function.lock().can_finish = true;
        self.request(Request::Stop);
        let result = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            result.unwrap();
            assert!(!self.path.exists());
        }
    }
}

#[test]
fn a_client_is_served_and_so_is_the_next() {
    let rig = Rig::new();
    for round in 0..3 {
        let client = rig.client();
        let file = memfd(4 * PAGE);
        client.map(file.as_fd(), 0, 0x1000, 4 * PAGE);
        client.write(Region::BAR0, 0x14, &[1, 2, 3, 4]);
        client.post(Region::BAR0, 0x18, &[5, 6]);
        assert_eq!(client.read::<6>(Region::BAR0, 0x14), [1, 2, 3, 4, 5, 6]);
        assert_eq!(client.read::<4>(Region::CONFIG, 0), [1, 0, 2, 0]);
        let (_, areas) = client.region_file(Region::BAR0);
        assert_eq!(areas, [(0x1000, 0x1000)]);
        client.unmap(0x1000, 4 * PAGE);
        client.map(file.as_fd(), 0, 0x1000, PAGE);
        let state = ClientState { is_connected: true, is_negotiated: true, maps: 1 };
        assert_eq!(rig.state(), state);
        // It is killed.
        drop(client);
        rig.wait_for(|rig| !rig.state().is_connected);
        let mut model = rig.function.lock();
        assert_eq!(model.calls.pop(), Some(Call::Detach), "round {round}");
        assert!(model.memory.regions().is_empty());
    }
}

#[test]
fn the_next_client_waits_until_the_function_has_let_go_of_the_last() {
    let rig = Rig::new();
    let client = rig.client();
    rig.function.lock().is_slow = true;
    drop(client);
    rig.wait_for(|rig| rig.function.lock().calls.contains(&Call::Detach));
    let next = TestClient::connect(&rig.path);
    let id = next.send(Command::VERSION, false, &[&[0; 4]], &[]);
    assert!(!rig.state().is_connected);
    rig.let_finish();
    assert!(next.try_reply(id, Command::VERSION).unwrap().is_ok());
}

#[test]
fn a_call_that_takes_time_holds_up_its_client_and_nobody_else() {
    let rig = Rig::new();
    let client = rig.client();
    let file = memfd(PAGE);
    client.map(file.as_fd(), 0, 0, PAGE);
    rig.function.lock().is_slow = true;
    let unmap = wire::DmaUnmap { argsz: 24, flags: 0, address: 0, size: PAGE };
    let access = wire::RegionAccess { offset: 0, region: 0, count: 4 };
    let first = client.send(Command::DMA_UNMAP, false, &[unmap.as_bytes()], &[]);
    let second = client.send(Command::REGION_READ, false, &[access.as_bytes()], &[]);
    rig.wait_for(|rig| rig.function.lock().is_pending());
    // The owner's questions are answered meanwhile.
    assert_eq!(rig.state().maps, 0);
    rig.function.lock().is_slow = false;
    rig.let_finish();
    assert!(client.try_reply(first, Command::DMA_UNMAP).unwrap().is_ok());
    assert!(client.try_reply(second, Command::REGION_READ).unwrap().is_ok());
}

#[test]
fn messages_in_pieces_and_in_heaps_are_answered_in_order() {
    let rig = Rig::new();
    let client = TestClient::connect(&rig.path);
    let access = wire::RegionAccess { offset: 0, region: 0, count: 1 };
    let mut stream = wire::command(1, Command::VERSION, false, &[&[0; 4]]);
    let posted = wire::command(2, Command::REGION_WRITE, true, &[access.as_bytes(), &[42]]);
    stream.extend(posted);
    stream.extend(wire::command(3, Command::REGION_READ, false, &[access.as_bytes()]));
    stream.extend(wire::command(4, Command(99), false, &[]));
    stream.extend(wire::command(5, Command(99), true, &[]));
    stream.extend(wire::command(6, Command::REGION_READ, false, &[access.as_bytes()]));
    for piece in [1, 7, stream.len()] {
        for piece in stream.chunks(piece) {
            client.send_raw(piece, &[]);
        }
        client.try_reply(1, Command::VERSION).unwrap().ok();
        for id in [3, 6] {
            let (data, _) = client.try_reply(id, Command::REGION_READ).unwrap().unwrap();
            assert_eq!(data[16], 42);
            if id == 3 {
                assert_eq!(client.try_reply(4, Command(99)).unwrap().unwrap_err(), 95);
            }
        }
    }
}

#[test]
fn a_stream_that_cannot_be_followed_ends_the_connection_and_no_other() {
    let rig = Rig::new();
    let header = |size: u32, flags: u32| {
        wire::Header { id: 1, command: 1, size, flags, error: 0 }.as_bytes().to_vec()
    };
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    for bytes in [header(15, 0), header(u32::MAX, 0), header(16, 1)] {
        let client = TestClient::connect(&rig.path);
        client.send_raw(&bytes, &[writer.as_fd()]);
        assert!(client.try_reply(1, Command::VERSION).is_none());
    }
    // More files than a message may have.
    for count in [17, 40] {
        let client = TestClient::connect(&rig.path);
        let bytes = wire::command(1, Command::VERSION, false, &[&[0; 4]]);
        client.send_raw(&bytes, &vec![writer.as_fd(); count]);
        assert!(client.try_reply(1, Command::VERSION).is_none());
    }
    // Half a message, and files that nobody wants.
    let client = rig.client();
    client.ask(Command::DEVICE_RESET, &[], &[writer.as_fd()]).unwrap();
    client.send_raw(&header(100, 0), &[writer.as_fd()]);
    drop((client, writer));
    rig.client();
    assert_eq!(rustix::io::read(&reader, &mut [0]), Ok(0), "some are still open");
}

#[test]
fn a_client_that_does_not_read_is_waited_for() {
    let rig = Rig::new();
    let client = rig.client();
    let access = wire::RegionAccess { offset: 0, region: 0, count: 0x4000 };
    // More than the socket's buffers hold.
    let ids: Vec<u16> = (0..200)
        .map(|_| client.send(Command::REGION_READ, false, &[access.as_bytes()], &[]))
        .collect();
    assert!(rig.state().is_connected);
    for id in ids {
        let (data, _) = client.try_reply(id, Command::REGION_READ).unwrap().unwrap();
        assert_eq!(data.len(), 16 + 0x4000);
    }
}

#[test]
fn notices_reach_the_client_and_unmasks_the_function() {
    let rig = Rig::new();
    let client = rig.client();
    let unplug = || {
        let (sender, receiver) = mpsc::channel();
        rig.request(Request::Unplug(sender));
        receiver.recv_timeout(Duration::from_secs(20)).unwrap()
    };
    assert!(!unplug());
    let eventfd = TestClient::eventfd();
    let set = |flags, index| {
        let request = wire::IrqSet { argsz: 20, flags, index, start: 0, count: 1 };
        let fds = [eventfd.as_fd()];
        client.ask(Command::DEVICE_SET_IRQS, &[request.as_bytes()], &fds).unwrap();
    };
    set(0x24, 4);
    assert!(unplug());
    rustix::io::read(&eventfd, &mut [0; 8]).unwrap();
    set(0x24, 3);
    rig.function.lock().has_failed = true;
    rig.waker.wake();
    rig.wait_for(|_| rustix::io::read(&eventfd, &mut [0; 8]).is_ok());
    set(0x14, 0);
    reactor::unix::signal(&eventfd);
    let unmasked = Call::SetMasked(Irq::Intx, 0, false);
    rig.wait_for(|rig| rig.function.lock().calls.contains(&unmasked));
}

/// What a supervisor keeps.
#[derive(Clone, Default)]
struct Keeper {
    fds: Arc<Mutex<BTreeMap<u64, OwnedFd>>>,
}

impl FdKeeper for Keeper {
    fn keep(&mut self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let before = self.fds.lock().unwrap().insert(key, fd.try_clone_to_owned()?);
        assert!(before.is_none(), "key {key:#x} is in use");
        Ok(())
    }

    fn release(&mut self, key: u64) {
        assert!(self.fds.lock().unwrap().remove(&key).is_some(), "key {key:#x}");
    }
}

/// A supervisor, and one process after the other under it.
struct Supervised {
    function: Shared,
    keeper: Keeper,
    state: OwnedFd,
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Supervised {
    fn new() -> Supervised {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvme.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        Supervised {
            function: Shared::new(),
            keeper: Keeper::default(),
            state: memfd(0),
            listener,
            path,
            _folder: folder,
        }
    }

    /// Run one process until it is killed before step number `kill_at`, or leaves.
    fn run(&self, kill_at: usize, steps: &Arc<AtomicUsize>) -> Process {
        let fds = self.keeper.fds.lock().unwrap();
        let kept = fds.iter().map(|(key, fd)| (*key, fd.try_clone().unwrap())).collect();
        drop(fds);
        let state = self.state.try_clone().unwrap();
        let mut journal = Journal::new(state, Box::new(self.keeper.clone()), kept).unwrap();
        let (requests, receiver) = mpsc::channel();
        let waker = Waker::new().unwrap();
        let function = Shared { is_dead: Arc::default(), ..self.function.clone() };
        let is_dead = Arc::clone(&function.is_dead);
        let (kill, steps) = ((requests.clone(), waker.clone()), Arc::clone(steps));
        // Dead, it does no further step. What it does without one leaves nothing behind.
        journal.set_hook(Box::new(move |_| {
            if steps.fetch_add(1, Ordering::Relaxed) + 1 == kill_at {
                is_dead.store(true, Ordering::Relaxed);
                kill.0.send(Request::Leave).unwrap();
                kill.1.wake();
            }
            if is_dead.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(())
        }));
        let listener = Listener::adopt(self.listener.try_clone().unwrap().into()).unwrap();
        let name = "test".to_owned();
        let server = Server::new(name, function, listener, waker.clone(), receiver, Some(journal));
        Process { thread: std::thread::spawn(move || drop(server.run())), requests, waker }
    }
}

struct Process {
    thread: JoinHandle<()>,
    requests: mpsc::Sender<Request<Shared>>,
    waker: Waker,
}

/// A client's life, with everything that leaves something behind. Every reply is checked to be the
/// one that is due, so that one too many or too few is noticed at once.
fn live(client: &TestClient, eventfds: &[OwnedFd], file: &OwnedFd) {
    client.map(file.as_fd(), 0, 0x1000, PAGE);
    client.map(file.as_fd(), PAGE, 0x10_0000, PAGE);
    client.set_msix(0, eventfds);
    client.write(Region::BAR0, 0x14, &[1, 2, 3, 4]);
    client.post(Region::BAR0, 0x18, &[5, 6, 7, 8]);
    assert_eq!(client.read::<8>(Region::BAR0, 0x14), [1, 2, 3, 4, 5, 6, 7, 8]);
    client.unmap(0x1000, PAGE);
    // A message in pieces; the file comes with the first.
    let map = wire::DmaMap { argsz: 32, flags: 3, offset: 0, address: 0x2000, size: PAGE };
    let bytes = wire::command(900, Command::DMA_MAP, false, &[map.as_bytes()]);
    client.send_raw(&bytes[..20], &[file.as_fd()]);
    client.send_raw(&bytes[20..], &[]);
    client.try_reply(900, Command::DMA_MAP).unwrap().unwrap();
    // Longer than what goes through the pipe at once.
    assert_eq!(client.read::<{ 3 * 4096 }>(Region::BAR0, 0x100), [0; 3 * 4096]);
    // Refused, also if the first try was in another process.
    let request = wire::DmaMap { address: 0x2800, ..map };
    let refused = client.ask(Command::DMA_MAP, &[request.as_bytes()], &[file.as_fd()]);
    assert_eq!(refused.unwrap_err(), 17);
    assert_eq!(client.read::<1>(Region::BAR0, 0x14), [1]);
}

/// Connects and negotiates; again, if the process was killed before it had kept the connection.
fn connect(path: &std::path::Path) -> TestClient {
    loop {
        let client = TestClient::connect(path);
        let version = wire::command(0, Command::VERSION, false, &[&[0; 4]]);
        let flags = rustix::net::SendFlags::NOSIGNAL;
        let is_sent = rustix::net::send(client.stream(), &version, flags).is_ok();
        if is_sent && let Some(answer) = client.try_reply(0, Command::VERSION) {
            answer.unwrap();
            return client;
        }
    }
}

#[test]
fn files_of_the_next_message_are_not_taken_for_this_ones() {
    let supervised = Supervised::new();
    let file = memfd(PAGE);
    let client = TestClient::connect(&supervised.path);
    let version = client.send(Command::VERSION, false, &[&[0; 4]], &[]);
    // All are in the socket before anybody reads, as QEMU has them there: a peek then tells of the
    // files of messages behind.
    let maps = [(0x1000, true), (0x8000, false), (0x2000, true), (0x9000, false), (0x3000, true)];
    let ids = maps.map(|(address, has_file)| {
        let map = wire::DmaMap { argsz: 32, flags: 3, offset: 0, address, size: PAGE };
        let files = [file.as_fd()];
        let files = if has_file { &files[..] } else { &[] };
        client.send(Command::DMA_MAP, false, &[map.as_bytes()], files)
    });
    let process = supervised.run(usize::MAX, &Arc::default());
    client.try_reply(version, Command::VERSION).unwrap().unwrap();
    for (id, (address, _)) in ids.into_iter().zip(maps) {
        let answer = client.try_reply(id, Command::DMA_MAP).unwrap();
        assert!(answer.is_ok(), "map at {address:#x}: {answer:?}");
    }
    {
        let model = supervised.function.lock();
        let regions: Vec<u64> = model.memory.regions().iter().map(|r| r.guest_addr()).collect();
        assert_eq!(regions, [0x1000, 0x2000, 0x3000]);
    }
    process.requests.send(Request::Stop).unwrap();
    process.waker.wake();
    process.thread.join().unwrap();
}

#[test]
fn a_connection_outlives_a_process_that_is_killed_at_any_step() {
    let mut kill_at = 1;
    loop {
        let supervised = Supervised::new();
        let steps = Arc::new(AtomicUsize::new(0));
        let eventfds: Vec<OwnedFd> = (0..3).map(|_| TestClient::eventfd()).collect();
        let file = memfd(2 * PAGE);
        let (path, passed) = (supervised.path.clone(), file.try_clone().unwrap());
        let theirs: Vec<OwnedFd> = eventfds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let mut process = supervised.run(kill_at, &steps);
        let mut is_killed = false;
        // What a supervisor does, until the condition holds.
        let mut supervise = |until: &mut dyn FnMut() -> bool| {
            let end = Instant::now() + Duration::from_secs(20);
            while !until() {
                assert!(Instant::now() < end, "killed at step {kill_at}");
                if process.thread.is_finished() {
                    let successor = supervised.run(usize::MAX, &steps);
                    std::mem::replace(&mut process, successor).thread.join().unwrap();
                    is_killed = true;
                }
                std::thread::yield_now();
            }
        };
        let client = std::thread::spawn(move || {
            let client = connect(&path);
            live(&client, &theirs, &passed);
            client
        });
        supervise(&mut || client.is_finished());
        let client = client.join().unwrap();
        // What is kept is what is needed: the socket, a pipe, three eventfds and two files. The
        // last reply is here before the last release.
        let kept = || supervised.keeper.fds.lock().unwrap().len();
        supervise(&mut || kept() == 8);
        {
            let model = supervised.function.lock();
            let regions: Vec<(u64, u64)> =
                model.memory.regions().iter().map(|r| (r.guest_addr(), r.len())).collect();
            assert_eq!(regions, [(0x2000, PAGE), (0x10_0000, PAGE)], "killed at step {kill_at}");
            for (vector, eventfd) in eventfds.iter().enumerate() {
                model.raise(Irq::Msix, vector as u32);
                rustix::io::read(eventfd, &mut [0; 8]).unwrap();
            }
        }
        drop(client);
        supervise(&mut || kept() == 0);
        process.requests.send(Request::Stop).unwrap();
        process.waker.wake();
        process.thread.join().unwrap();
        if !is_killed {
            assert!(kill_at > 80, "{kill_at} steps are too few");
            break;
        }
        kill_at += 1;
    }
}

#[test]
fn a_state_file_that_is_not_ours_is_refused() {
    let state = memfd(PAGE);
    rustix::io::pwrite(&state, b"something else", 0).unwrap();
    let error = Journal::new(state, Box::new(Keeper::default()), BTreeMap::new()).unwrap_err();
    assert!(error.to_string().contains("not that of a vfio-user journal"), "{error}");
}
