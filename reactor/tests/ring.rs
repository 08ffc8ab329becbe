//! Ports on a real ring: files, event descriptors, connects, cancellation, drops in flight.

#![expect(unsafe_code, reason = "event descriptors are made by hand")]
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod support;

use std::cell::RefCell;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use iobuf::{Hold, Segment, SgList};
use reactor::{Busy, Core, CoreConfig, Errno, Fd, Outcome, Progress, SetupError, Task, channel};
use support::{LIMIT, bytes, content, core, core_with, errno, list, next, pattern, small, until};

fn eventfd(flags: i32) -> OwnedFd {
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::eventfd(0, flags | libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just created, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn signal(fd: &OwnedFd, count: u64) {
    // SAFETY: the buffer has 8 bytes.
    let n = unsafe { libc::write(fd.as_raw_fd(), (&raw const count).cast(), 8) };
    assert_eq!(n, 8);
}

fn file() -> (File, Fd) {
    let file = tempfile::tempfile().unwrap();
    let fd = Fd::from(OwnedFd::from(file.try_clone().unwrap()));
    (file, fd)
}

#[test]
fn files_are_written_and_read_back_in_one_and_many_segments() {
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    let (_file, fd) = file();
    for len in [1, 512, 4096, 128 << 10, 300_000] {
        let data = pattern(len, len as u64);
        let out = list(&local, &data);
        for (token, dsync) in [(1, false), (2, true)] {
            port.writev(&fd, 4096, &out, dsync, token).unwrap();
            assert_eq!(bytes(next(&mut core, &mut port)), (token, len as u32));
        }
        let back = list(&local, &vec![0; len]);
        port.readv(&fd, 4096, &back, 3).unwrap();
        assert_eq!(bytes(next(&mut core, &mut port)), (3, len as u32));
        assert_eq!(content(&back), data);
    }
    assert_eq!(port.in_flight(), 0);
    assert_eq!(local.pool().available(), local.pool().capacity());
}

#[test]
fn reads_end_at_the_end_of_the_file() {
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    let (file, fd) = file();
    file.set_len(1000).unwrap();
    let sg = list(&local, &[9; 4096]);
    port.readv(&fd, 0, &sg, 1).unwrap();
    assert_eq!(bytes(next(&mut core, &mut port)), (1, 1000));
    port.readv(&fd, 1000, &sg, 2).unwrap();
    assert_eq!(bytes(next(&mut core, &mut port)), (2, 0));
}

#[test]
fn fsync_and_fallocate_do_what_they_say() {
    let mut core = core();
    let mut port = core.local().port();
    let (file, fd) = file();
    port.fallocate(&fd, 0, 0, 1 << 20, 1).unwrap();
    let done = next(&mut core, &mut port);
    assert!(matches!(done.result, Ok(Outcome::Done)), "{done:?}");
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    for (token, data_only) in [(2, false), (3, true)] {
        port.fsync(&fd, data_only, token).unwrap();
        let done = next(&mut core, &mut port);
        assert!(matches!(done.result, Ok(Outcome::Done)), "{done:?}");
        assert_eq!(done.token, token);
    }
    port.fallocate(&fd, -1, 0, 4096, 4).unwrap();
    assert_eq!(errno(next(&mut core, &mut port)), (4, Errno::NOT_SUPPORTED));
}

#[test]
fn errors_name_the_operation() {
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    let read_only = Fd::from(OwnedFd::from(File::open("/dev/null").unwrap()));
    let sg = list(&local, b"x");
    port.writev(&read_only, 0, &sg, false, 7).unwrap();
    assert_eq!(errno(next(&mut core, &mut port)), (7, Errno::BAD_DESCRIPTOR));
}

#[test]
fn a_watch_reports_each_signal_and_stays() {
    let mut core = core();
    for flags in [0, libc::EFD_NONBLOCK] {
        let mut port = core.local().port();
        let raw = eventfd(flags);
        let fd = Fd::from(raw.try_clone().unwrap());
        port.watch(&fd, 5).unwrap();
        for count in [1, 3, 70_000] {
            signal(&raw, count);
            let done = next(&mut core, &mut port);
            assert!(matches!(done.result, Ok(Outcome::Signal(n)) if n == count), "{done:?}");
            assert_eq!((done.token, port.in_flight()), (5, 1));
        }
        // Signals that nobody takes add up in the kernel, they are not queued here.
        signal(&raw, 1);
        let first = next(&mut core, &mut port);
        assert!(matches!(first.result, Ok(Outcome::Signal(1))));
        port.cancel_all();
        assert_eq!(errno(next(&mut core, &mut port)), (5, Errno::CANCELED));
        assert_eq!(port.in_flight(), 0);
    }
}

#[test]
fn a_watch_of_something_else_ends() {
    let mut core = core();
    let mut port = core.local().port();
    let (file, fd) = file();
    file.set_len(3).unwrap();
    port.watch(&fd, 1).unwrap();
    assert_eq!(errno(next(&mut core, &mut port)), (1, Errno::BAD_DESCRIPTOR));
}

#[test]
fn connects_and_is_refused() {
    let mut core = core();
    let mut port = core.local().port();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    port.connect(addr, LIMIT, 1).unwrap();
    let done = next(&mut core, &mut port);
    let Ok(Outcome::Socket(socket)) = done.result else { panic!("{done:?}") };
    assert_eq!(socket.peer(), addr.to_string());
    let (_accepted, _) = listener.accept().unwrap();
    drop(listener);
    port.connect(addr, LIMIT, 2).unwrap();
    assert_eq!(errno(next(&mut core, &mut port)), (2, Errno::CONNECTION_REFUSED));
}

#[test]
fn a_restricted_core_serves_what_it_has() {
    let mut core = core_with(CoreConfig { restricted: true, ..small() });
    let local = core.local();
    let mut port = local.port();
    let (_file, fd) = file();
    let data = pattern(70_000, 9);
    port.writev(&fd, 0, &list(&local, &data), true, 1).unwrap();
    assert_eq!(bytes(next(&mut core, &mut port)), (1, 70_000));
    let back = list(&local, &vec![0; data.len()]);
    port.readv(&fd, 0, &back, 2).unwrap();
    assert_eq!(bytes(next(&mut core, &mut port)), (2, 70_000));
    assert_eq!(content(&back), data);

    let raw = eventfd(0);
    port.watch(&Fd::from(raw.try_clone().unwrap()), 3).unwrap();
    signal(&raw, 4);
    assert!(matches!(next(&mut core, &mut port).result, Ok(Outcome::Signal(4))));
    port.cancel_all();
    assert_eq!(errno(next(&mut core, &mut port)), (3, Errno::CANCELED));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    port.connect(listener.local_addr().unwrap(), LIMIT, 4).unwrap();
    let done = next(&mut core, &mut port);
    assert!(matches!(done.result, Ok(Outcome::Socket(_))), "{done:?}");
}

/// A listener whose accept queue has no room.
fn full_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

#[test]
fn a_connect_that_nobody_answers_times_out() {
    let mut core = core();
    let mut port = core.local().port();
    // A full accept queue: the kernel drops further handshakes.
    let (_listener, addr) = full_listener();
    let timeout = Duration::from_millis(100);
    let mut timed_out = false;
    let mut sockets = Vec::new();
    for token in 0..8 {
        port.connect(addr, timeout, token).unwrap();
        match next(&mut core, &mut port).result {
            Ok(Outcome::Socket(socket)) => sockets.push(socket),
            Err(Errno::TIMED_OUT) => timed_out = true,
            other => panic!("{other:?}"),
        }
    }
    assert!(timed_out);
}

/// Reads of a turn are submitted in groups; a connect and its time limit among them stay together.
#[test]
fn a_connect_keeps_its_time_limit_among_reads() {
    const CONNECT: u64 = 100;
    const READS: u64 = 4;
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    let (file, fd) = file();
    file.set_len(4096).unwrap();
    let back = list(&local, &[0; 512]);
    let (_listener, addr) = full_listener();
    let timeout = Duration::from_millis(50);
    let (mut sockets, mut timed_out) = (Vec::new(), 0);
    for before in (0..READS).cycle().take(12) {
        for token in 0..before {
            port.readv(&fd, 0, &back, token).unwrap();
        }
        port.connect(addr, timeout, CONNECT).unwrap();
        for token in before..READS {
            port.readv(&fd, 0, &back, token).unwrap();
        }
        for _ in 0..=READS {
            match next(&mut core, &mut port) {
                done if done.token != CONNECT => assert_eq!(bytes(done).1, 512),
                done => match done.result {
                    Ok(Outcome::Socket(socket)) => sockets.push(socket),
                    Err(Errno::TIMED_OUT) => timed_out += 1,
                    other => panic!("{before} reads before: {other:?}"),
                },
            }
        }
    }
    assert!(timed_out >= READS, "{timed_out}");
}

#[test]
fn slots_are_bounded_and_come_back() {
    let mut core = core_with(CoreConfig { entries: 4, ..small() });
    let mut ports = [core.local().port(), core.local().port()];
    let raw = eventfd(0);
    let fd = Fd::from(raw);
    for port in &mut ports {
        port.watch(&fd, 1).unwrap();
        port.watch(&fd, 2).unwrap();
    }
    assert_eq!(ports[0].watch(&fd, 3), Err(Busy));
    ports[1].cancel_all();
    for _ in 0..2 {
        assert_eq!(errno(next(&mut core, &mut ports[1])).1, Errno::CANCELED);
    }
    ports[0].watch(&fd, 3).unwrap();
    assert_eq!(ports[0].in_flight(), 3);
}

#[test]
fn completions_that_nobody_takes_are_bounded() {
    let mut core = core_with(CoreConfig { entries: 4, ..small() });
    let mut port = core.local().port();
    let (_file, fd) = file();
    for token in 0..4 {
        port.fsync(&fd, true, token).unwrap();
        until(&mut core, || (port.in_flight() == 0).then_some(()));
    }
    assert_eq!(port.fsync(&fd, true, 9), Err(Busy));
    for token in 0..4 {
        assert_eq!(next(&mut core, &mut port).token, token);
    }
    port.fsync(&fd, true, 9).unwrap();
    assert_eq!(next(&mut core, &mut port).token, 9);
}

#[test]
fn more_operations_than_the_submission_queue_holds() {
    let mut core = core_with(CoreConfig { entries: 16384, ..small() });
    let mut port = core.local().port();
    let (_file, fd) = file();
    let sg = list(&core.local(), &[1; 64]);
    for token in 0..16384 {
        port.writev(&fd, token * 64, &sg, false, token).unwrap();
    }
    let mut seen = vec![false; 16384];
    for _ in 0..16384 {
        let (token, n) = bytes(next(&mut core, &mut port));
        assert_eq!(n, 64);
        assert!(!std::mem::replace(&mut seen[token as usize], true), "token {token} twice");
    }
}

/// Counts who uses its memory, and records when it is let go.
struct Memory {
    bytes: RefCell<Box<[u8]>>,
    uses: RefCell<i32>,
    dropped: Arc<AtomicBool>,
}

impl Hold for Memory {
    fn retain(&self, segments: &[Segment]) {
        *self.uses.borrow_mut() += segments.len() as i32;
    }

    fn release(&self, segments: &[Segment]) {
        *self.uses.borrow_mut() -= segments.len() as i32;
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        assert_eq!(*self.uses.borrow(), 0);
        self.dropped.store(true, Ordering::Relaxed);
    }
}

fn memory() -> (SgList, Arc<AtomicBool>) {
    let dropped = Arc::new(AtomicBool::new(false));
    let memory = Rc::new(Memory {
        bytes: RefCell::new(vec![0; 64].into()),
        uses: RefCell::new(1),
        dropped: Arc::clone(&dropped),
    });
    let segment = Segment::new(memory.bytes.borrow_mut().as_mut_ptr(), 64);
    let mut sg = SgList::default();
    // SAFETY: the bytes live as long as the hold, and one use was counted for the list.
    unsafe { sg.append(&memory, segment) };
    (sg, dropped)
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader.into(), writer.into())
}

#[test]
fn memory_stays_until_the_kernel_is_done_although_everything_is_dropped() {
    let mut core = core();
    let (reader, _writer) = pipe();
    let (sg, dropped) = memory();
    let mut port = core.local().port();
    let fd = Fd::from(reader);
    // A read of an empty pipe waits in the kernel.
    port.readv(&fd, 0, &sg, 1).unwrap();
    core.turn(false);
    drop((sg, fd));
    assert!(!dropped.load(Ordering::Relaxed), "the kernel may still write");
    drop(port);
    assert!(!dropped.load(Ordering::Relaxed), "not before the cancellation completed");
    until(&mut core, || dropped.load(Ordering::Relaxed).then_some(()));
}

#[test]
fn dropping_the_core_waits_for_the_kernel() {
    let (reader, _writer) = pipe();
    let (sg, dropped) = memory();
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    port.readv(&Fd::from(reader), 0, &sg, 1).unwrap();
    core.turn(false);
    drop(sg);
    drop(core);
    assert!(dropped.load(Ordering::Relaxed));
    // The port outlives its core: it reports, and refuses.
    assert_eq!(port.next().map(|done| errno(done).1), Some(Errno::CANCELED));
    let (_file, fd) = file();
    assert_eq!(port.fsync(&fd, true, 2), Err(Busy));
}

#[test]
fn a_hold_may_use_the_reactor_when_it_is_released() {
    struct Nosy(RefCell<Option<reactor::Port>>, Fd);
    impl Hold for Nosy {
        fn retain(&self, _: &[Segment]) {}
        fn release(&self, _: &[Segment]) {
            if let Some(port) = self.0.borrow_mut().as_mut() {
                port.fsync(&self.1, true, 99).unwrap();
            }
        }
    }
    let mut core = core();
    let mut port = core.local().port();
    let (_file, fd) = file();
    static BYTES: [AtomicU8; 16] = [const { AtomicU8::new(0) }; 16];
    let nosy = Rc::new(Nosy(RefCell::new(Some(core.local().port())), fd.clone()));
    let mut sg = SgList::default();
    // SAFETY: static memory is mapped for ever.
    unsafe { sg.append(&nosy, Segment::new(BYTES[0].as_ptr(), BYTES.len())) };
    port.readv(&fd, 0, &sg, 1).unwrap();
    assert_eq!(bytes(next(&mut core, &mut port)), (1, 0));
    let done = until(&mut core, || nosy.0.borrow_mut().as_mut().and_then(|port| port.next()));
    assert_eq!(done.token, 99);
    nosy.0.borrow_mut().take();
}

#[test]
fn a_message_wakes_a_sleeping_core() {
    let (ready, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut core = Core::new(small()).unwrap();
        ready.send(core.handle()).unwrap();
        core.run();
    });
    let handle = wait.recv().unwrap();
    let (answer, answers) = std::sync::mpsc::channel();
    for round in 0..200 {
        let answer = answer.clone();
        handle.post(Box::new(move |_| answer.send(round).unwrap())).unwrap();
        assert_eq!(answers.recv_timeout(LIMIT), Ok(round));
    }
    handle.stop();
    thread.join().unwrap();
    assert!(handle.post(Box::new(|_| {})).is_err(), "the core is gone");
}

#[test]
fn a_channel_wakes_the_task_behind_it() {
    struct Echo(reactor::Receiver<u32>, std::sync::mpsc::Sender<u32>);
    impl Task for Echo {
        fn poll(&mut self, _: Duration) -> Progress {
            match self.0.try_recv() {
                Some(value) => {
                    self.1.send(value).unwrap();
                    Progress::Worked
                }
                None if self.0.is_disconnected() => Progress::Done,
                None => Progress::Idle,
            }
        }
    }
    let (ready, wait) = std::sync::mpsc::channel();
    let (back, echoes) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut core = Core::new(small()).unwrap();
        let (sender, receiver) = channel(&core.handle(), 4);
        core.spawn(Box::new(Echo(receiver, back)));
        ready.send((core.handle(), sender)).unwrap();
        core.run();
        assert_eq!(core.tasks(), 0);
    });
    let (handle, sender) = wait.recv().unwrap();
    for value in 0..1000 {
        sender.send(value).unwrap();
        assert_eq!(echoes.recv_timeout(LIMIT), Ok(value));
    }
    handle.stop();
    drop(sender);
    thread.join().unwrap();
}

#[test]
fn an_idle_core_uses_no_processor_time() {
    /// Wakes a few times and then is done; in between the core has nothing to do.
    struct Sleepy {
        naps: u32,
        next: Duration,
        armed: i32,
    }
    impl Task for Sleepy {
        fn poll(&mut self, now: Duration) -> Progress {
            assert_eq!(self.armed, 0, "polled while armed");
            if now < self.next {
                return Progress::Idle;
            }
            self.next = now + Duration::from_millis(50);
            match self.naps {
                0 => Progress::Done,
                _ => {
                    self.naps -= 1;
                    Progress::Worked
                }
            }
        }
        fn arm(&mut self) -> bool {
            self.armed += 1;
            false
        }
        fn disarm(&mut self) {
            self.armed -= 1;
        }
        fn deadline(&self) -> Option<Duration> {
            Some(self.next)
        }
    }
    let mut core = Core::new(CoreConfig { spin: Duration::from_micros(50), ..small() }).unwrap();
    core.spawn(Box::new(Sleepy { naps: 10, next: Duration::ZERO, armed: 0 }));
    let (cpu, wall) = (support::thread_cpu_time(), Instant::now());
    core.handle().stop();
    core.run();
    let (cpu, wall) = (support::thread_cpu_time() - cpu, wall.elapsed());
    assert!(wall >= Duration::from_millis(500), "ten naps of 50 ms took {wall:?}");
    assert!(cpu < wall / 50, "{cpu:?} of {wall:?}");
}

#[test]
fn work_found_while_arming_keeps_the_core_awake() {
    struct Doorbell {
        armed: u32,
        polls: Rc<RefCell<u32>>,
    }
    impl Task for Doorbell {
        fn poll(&mut self, _: Duration) -> Progress {
            *self.polls.borrow_mut() += 1;
            Progress::Idle
        }
        fn arm(&mut self) -> bool {
            self.armed += 1;
            self.armed < 4
        }
    }
    let mut core = core();
    let polls = Rc::new(RefCell::new(0));
    core.spawn(Box::new(Doorbell { armed: 0, polls: Rc::clone(&polls) }));
    until(&mut core, || (*polls.borrow() >= 5).then_some(()));
}

#[test]
fn bad_settings_are_named() {
    let bad = [
        (CoreConfig { entries: 0, ..small() }, "entries = 0"),
        (CoreConfig { entries: 99_999, ..small() }, "entries = 99999"),
        (CoreConfig { rx_buffers: 3, ..small() }, "rx_buffers = 3"),
        (CoreConfig { rx_buffer_bytes: 1, ..small() }, "rx_buffer_bytes = 1"),
        (CoreConfig { mailbox_depth: 0, ..small() }, "mailbox_depth = 0"),
        (CoreConfig { pin_to: Some(1 << 20), ..small() }, "processor 1048576"),
    ];
    for (config, text) in bad {
        let error = Core::new(config).err().unwrap();
        assert!(error.to_string().contains(text), "{error}");
        assert!(!matches!(error, SetupError::Missing));
    }
}

/// Makes `io_uring_setup` fail with `errno` on the calling thread.
fn forbid_io_uring(errno: i32) {
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        // Load the number of the system call; if it is io_uring_setup, fail, else allow.
        instruction((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        instruction(
            (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        instruction((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0x0005_0000 | errno as u32),
        instruction((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0x7fff_0000),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the pointer names a program, which names its filter; both live until the call ends.
    let result =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_kernel_that_refuses_is_told_apart() {
    let setup = |errno| {
        let thread = std::thread::spawn(move || {
            forbid_io_uring(errno);
            Core::new(small()).err()
        });
        thread.join().unwrap().unwrap()
    };
    assert!(matches!(setup(libc::ENOSYS), SetupError::Missing));
    assert!(matches!(setup(libc::EPERM), SetupError::Forbidden));
    assert!(matches!(setup(libc::EINVAL), SetupError::TooOld { .. }));
    assert!(matches!(setup(libc::ENOMEM), SetupError::Memory { .. }));
    assert!(matches!(setup(libc::EMFILE), SetupError::Other { .. }));
}

#[test]
fn a_core_can_be_bound_to_its_processor() {
    std::thread::spawn(|| {
        Core::new(CoreConfig { pin_to: Some(0), ..small() }).unwrap();
        // SAFETY: takes no pointer.
        assert_eq!(unsafe { libc::sched_getcpu() }, 0);
    })
    .join()
    .unwrap();
}

#[test]
fn registered_files_work_like_others_and_are_let_go() {
    let mut core = core();
    let local = core.local();
    let mut port = local.port();
    let (file, plain) = file();
    let out = list(&local, &pattern(8192, 1));
    // More users, one after the other and at a time, than there are places.
    let many: Vec<Fd> = (0..300).map(|_| local.register(plain.share())).collect();
    for (i, fd) in many.iter().enumerate() {
        port.writev(fd, 8192 * i as u64, &out, true, 1).unwrap();
        assert_eq!(bytes(next(&mut core, &mut port)), (1, 8192));
    }
    assert_eq!(file.metadata().unwrap().len(), 300 * 8192);
    port.fsync(&many[0], true, 2).unwrap();
    assert_eq!(next(&mut core, &mut port).token, 2);

    file.try_lock().unwrap();
    let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let rival = File::open(path).unwrap();
    assert!(rival.try_lock().is_err());
    drop((many, plain, file));
    // The turn in which nobody has the file any more closes it.
    core.turn(false);
    rival.try_lock().unwrap();
}

#[test]
fn a_core_that_ends_lets_go_of_registered_files() {
    let (file, plain) = file();
    file.try_lock().unwrap();
    let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let rival = File::open(path).unwrap();
    let core = core();
    let kept = core.local().register(plain.share());
    drop((plain, file));
    assert!(rival.try_lock().is_err());
    drop(core);
    drop(kept);
    rival.try_lock().unwrap();
}

/// Most file systems have no device to poll: then it is refused, not lost.
#[test]
fn a_polled_port_does_or_refuses_everything() {
    let mut core = core();
    let local = core.local();
    let mut port = local.polled_port().unwrap();
    let (_file, fd) = file();
    let fd = local.register(fd.share());
    let out = list(&local, &pattern(4096, 1));
    for token in 0..20 {
        port.writev(&fd, 4096 * token, &out, false, token).unwrap();
    }
    port.fsync(&fd, true, 20).unwrap();
    let mut seen: Vec<u64> = Vec::new();
    while seen.len() < 21 {
        let completion = next(&mut core, &mut port);
        match (completion.token, completion.result) {
            // Not opened for direct I/O.
            (0..20, result) => assert_eq!(result.unwrap_err(), Errno::NOT_SUPPORTED),
            (_, result) => assert!(result.is_ok(), "everything else goes the usual way"),
        }
        seen.push(completion.token);
    }
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..21));
    let before = Instant::now();
    core.local().handle().wake();
    core.turn(true);
    assert!(before.elapsed() < LIMIT);
}

#[test]
fn a_registered_pool_is_used_where_memory_lies_in_it() {
    let mut core = core_with(CoreConfig { pool_registered_bytes: 256 << 10, ..small() });
    let local = core.local();
    let other = core_with(small());
    let theirs = other.local();
    let mut port = local.port();
    let (_file, fd) = file();
    let registered = local.register(fd.share());
    let mut offset = 0;
    // One segment, several, and memory of somebody else's pool.
    for (len, foreign) in [(512, false), (131_072, false), (900_000, false), (4096, true)] {
        let data = pattern(len, len as u64);
        let memory = |bytes: &[u8]| list(if foreign { &theirs } else { &local }, bytes);
        for fd in [&fd, &registered] {
            for dsync in [false, true] {
                port.writev(fd, offset, &memory(&data), dsync, 1).unwrap();
                assert_eq!(bytes(next(&mut core, &mut port)), (1, len as u32));
                let back = memory(&vec![0; len]);
                port.readv(fd, offset, &back, 2).unwrap();
                assert_eq!(bytes(next(&mut core, &mut port)), (2, len as u32));
                assert_eq!(content(&back), data);
                offset += len as u64;
            }
        }
    }
    // A part of a segment is in it, too.
    let whole = list(&local, &pattern(8192, 9));
    let mut part = SgList::default();
    part.append_range(&whole, 100, 1000).unwrap();
    port.writev(&fd, 0, &part, false, 3).unwrap();
    drop((whole, part));
    assert_eq!(bytes(next(&mut core, &mut port)), (3, 1000));
    let back = list(&local, &[0; 1000]);
    port.readv(&fd, 0, &back, 4).unwrap();
    assert_eq!(bytes(next(&mut core, &mut port)), (4, 1000));
    assert_eq!(content(&back), pattern(8192, 9)[100..1100]);
}
