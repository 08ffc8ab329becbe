//! The simulated kernel: the same tasks, ports and streams, replayed from a seed.

#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use reactor::net::{Gather, Layer, LayerError, Plain, Rx, Stream, StreamConfig};
use reactor::sim::{FileFaults, NetFaults, World};
use reactor::{
    Completion, Core, CoreConfig, Errno, Fd, Outcome, Port, Progress, Socket, Task, channel,
};
use support::xor::Xor;
use support::{bytes, content, errno, list, pattern};

const HOUR: Duration = Duration::from_secs(3600);

fn addr() -> SocketAddr {
    "10.0.0.1:4420".parse().unwrap()
}

/// Steps until a completion is there.
fn next(world: &World, cores: &mut [Core], port: &mut Port) -> Completion {
    loop {
        if let Some(completion) = port.next() {
            return completion;
        }
        assert!(world.step(cores), "nothing will happen any more");
    }
}

/// Sends a known pattern as PDUs, then shuts down.
struct Sender {
    stream: Stream,
    pushed: u32,
    pdus: u32,
    log: Rc<Log>,
}

struct Receiver {
    stream: Stream,
    log: Rc<Log>,
}

#[derive(Default)]
struct Log {
    expected: RefCell<Vec<u8>>,
    received: RefCell<Vec<u8>>,
    tokens: Cell<u32>,
    sender_end: Cell<Option<Result<(), Errno>>>,
    receiver_end: Cell<Option<Result<(), Errno>>>,
}

impl Task for Sender {
    fn poll(&mut self, now: Duration) -> Progress {
        let mut progressed = self.stream.poll();
        while self.log.sender_end.get().is_none()
            && self.pushed < self.pdus
            && self.stream.room() > 0
        {
            let payload = pattern(now.subsec_micros() as usize * 13 % 20_000, self.pushed.into());
            let head = self.pushed.to_le_bytes();
            self.stream_push(&head, &payload);
            self.pushed += 1;
            progressed = true;
        }
        self.stream.flush();
        while let Some(token) = self.stream.sent() {
            // Tokens come in order, except that what was never taken comes before what was.
            assert!(token < self.pushed);
            self.log.tokens.set(self.log.tokens.get() + 1);
            progressed = true;
        }
        if self.log.sender_end.get().is_none() {
            // Tokens say that memory is free: sealed bytes may still have to be sent.
            let is_done = self.log.tokens.get() == self.pdus && !self.stream.is_sending();
            let end = self.stream.failed().map(Err).or(is_done.then_some(Ok(())));
            if end.is_some() {
                self.log.sender_end.set(end);
                self.stream.shutdown();
                progressed = true;
            }
        } else if self.stream.is_quiet() {
            return Progress::Done;
        }
        if progressed { Progress::Worked } else { Progress::Idle }
    }
}

impl Sender {
    fn stream_push(&mut self, head: &[u8], payload: &[u8]) {
        let sg = LOCAL.with_borrow(|local| list(local.as_ref().unwrap(), payload));
        self.stream.push(head, Some((&sg, 0, sg.len())), None, Some(self.pushed)).unwrap();
        let mut expected = self.log.expected.borrow_mut();
        expected.extend_from_slice(head);
        expected.extend_from_slice(payload);
    }
}

impl Task for Receiver {
    fn poll(&mut self, _: Duration) -> Progress {
        if self.log.receiver_end.get().is_some() {
            self.stream.poll();
            return if self.stream.is_quiet() { Progress::Done } else { Progress::Idle };
        }
        match self.stream.recv() {
            Rx::Empty => return Progress::Idle,
            Rx::Data(chunk) => self.log.received.borrow_mut().extend_from_slice(&chunk),
            Rx::Eof => self.log.receiver_end.set(Some(Ok(()))),
            Rx::Failed(errno) => self.log.receiver_end.set(Some(Err(errno))),
        }
        if self.log.receiver_end.get().is_some() {
            self.stream.shutdown();
        }
        Progress::Worked
    }
}

thread_local! {
    /// The sender's core.
    static LOCAL: RefCell<Option<reactor::Local>> = const { RefCell::new(None) };
}

/// One transfer between two cores; returns what happened and the world's fingerprint.
fn transfer(seed: u64, faults: NetFaults, layers: bool, pdus: u32) -> (Rc<Log>, u64) {
    let world = World::new(seed);
    world.set_faults(faults);
    let config =
        CoreConfig { entries: 16, rx_buffers: 2, rx_buffer_bytes: 8192, ..CoreConfig::default() };
    let mut cores = [world.core_with(config.clone()), world.core_with(config)];
    let log = Rc::new(Log::default());
    let (near, far) = world.socket_pair();
    let stream = |core: &Core, socket: Socket| {
        let layer = layers.then(|| Box::new(Xor::default()) as Box<dyn Layer>);
        let config = StreamConfig { tx_entries_max: 8, tx_batch_bytes: 16 << 10, layer };
        Stream::new(&core.local(), socket, config).unwrap()
    };
    let sender = Sender { stream: stream(&cores[0], near), pushed: 0, pdus, log: log.clone() };
    let receiver = Receiver { stream: stream(&cores[1], far), log: log.clone() };
    let pool = cores[0].local();
    LOCAL.set(Some(cores[0].local()));
    cores[0].spawn(Box::new(sender));
    cores[1].spawn(Box::new(receiver));
    while world.step(&mut cores) {}
    assert_eq!((cores[0].tasks(), cores[1].tasks()), (0, 0), "seed {seed}: deadlock");
    assert_eq!(pool.pool().available(), pool.pool().capacity(), "seed {seed}: memory leaks");
    LOCAL.set(None);
    (log, world.fingerprint())
}

fn slow_and_split() -> NetFaults {
    NetFaults { split: true, delay_max: Duration::from_millis(3), ..NetFaults::default() }
}

#[test]
fn every_byte_arrives_however_it_is_split_and_delayed() {
    for seed in 0..60 {
        let (log, _) = transfer(seed, slow_and_split(), seed % 2 == 1, 40);
        assert!(*log.received.borrow() == *log.expected.borrow(), "seed {seed}: bytes differ");
        assert_eq!(log.sender_end.get(), Some(Ok(())), "seed {seed}");
        assert_eq!(log.receiver_end.get(), Some(Ok(())), "seed {seed}");
    }
}

#[test]
fn the_same_seed_replays_and_another_does_not() {
    let faults = NetFaults { cut_per_million: 2_000, ..slow_and_split() };
    let run = |seed| {
        let (log, fingerprint) = transfer(seed, faults, false, 30);
        (fingerprint, log.received.take(), log.receiver_end.get())
    };
    let mut fingerprints = BTreeSet::new();
    for seed in 0..20 {
        let first = run(seed);
        assert!(run(seed) == first, "seed {seed} does not replay");
        fingerprints.insert(first.0);
    }
    assert_eq!(fingerprints.len(), 20);
}

#[test]
fn a_cut_loses_the_rear_and_both_ends_learn_of_it() {
    let mut ends = BTreeSet::new();
    let (mut cuts, mut lost_sent_bytes) = (0, 0);
    for seed in 0..300 {
        let faults = NetFaults { cut_per_million: 20_000, ..slow_and_split() };
        let (log, _) = transfer(seed, faults, false, 20);
        let (received, expected) = (log.received.borrow(), log.expected.borrow());
        assert!(expected.starts_with(&received), "seed {seed}: not a prefix");
        // All tokens of what was pushed come back, whatever happened.
        let pushed = log.tokens.get();
        assert!(pushed <= 20);
        if received.len() < expected.len() {
            cuts += 1;
            let end = log.receiver_end.get().unwrap();
            ends.insert(end.err().map(|errno| errno.0));
            lost_sent_bytes += u32::from(log.sender_end.get() == Some(Ok(())));
        }
    }
    assert!(cuts > 100, "{cuts}");
    assert!(lost_sent_bytes > 0, "what was sent may be lost without the sender knowing");
    assert_eq!(ends, BTreeSet::from([None, Some(libc::ECONNRESET)]));
}

#[test]
fn connects_reach_the_listener_or_fail_as_they_should() {
    let world = World::new(3);
    let mut cores = [world.core()];
    let local = cores[0].local();
    let mut port = local.port();
    port.connect(addr(), HOUR, 1).unwrap();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (1, Errno::CONNECTION_REFUSED));

    let accepted = Rc::new(RefCell::new(Vec::new()));
    let into = Rc::clone(&accepted);
    world.listen(addr(), Box::new(move |socket| into.borrow_mut().push(socket)));
    port.connect(addr(), HOUR, 2).unwrap();
    let done = next(&world, &mut cores, &mut port);
    let Ok(Outcome::Socket(socket)) = done.result else { panic!("{done:?}") };
    assert_eq!(socket.peer(), addr().to_string());
    while world.step(&mut cores) {}
    let far = accepted.borrow_mut().pop().unwrap();
    assert!(far.peer().starts_with("127.0.0.1:"));

    // The two ends talk.
    let [mut near, mut far] =
        [socket, far].map(|end| Stream::new(&local, end, StreamConfig::default()).unwrap());
    near.push(b"hello", None, None, None).unwrap();
    near.flush();
    let mut got = Vec::new();
    assert!(world.run_until(&mut cores, HOUR, &mut || {
        near.poll();
        if let Rx::Data(chunk) = far.recv() {
            got.extend_from_slice(&chunk);
        }
        got == b"hello"
    }));

    let faults = NetFaults { lost_per_million: 1_000_000, ..NetFaults::default() };
    world.set_faults(faults);
    let start = world.now();
    port.connect(addr(), Duration::from_secs(5), 3).unwrap();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (3, Errno::TIMED_OUT));
    assert!(world.now() >= start + Duration::from_secs(5));

    world.set_faults(NetFaults { refuse_per_million: 1_000_000, ..NetFaults::default() });
    port.connect(addr(), HOUR, 4).unwrap();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (4, Errno::CONNECTION_REFUSED));

    world.set_faults(NetFaults::default());
    world.unlisten(addr());
    port.connect(addr(), HOUR, 5).unwrap();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (5, Errno::CONNECTION_REFUSED));

    world.cut_all();
    assert!(world.run_until(&mut cores, HOUR, &mut || {
        matches!(near.recv(), Rx::Failed(_) | Rx::Eof)
            && matches!(far.recv(), Rx::Failed(_) | Rx::Eof)
    }));
}

#[test]
fn a_socket_that_resets_on_close_takes_back_what_is_not_on_its_way() {
    let mut lengths = BTreeSet::new();
    for resets in [false, true] {
        for seed in 0..20 {
            let world = World::new(seed);
            let delay_max = Duration::from_millis(5);
            world.set_faults(NetFaults { delay_max, ..NetFaults::default() });
            let mut cores = [world.core()];
            let local = cores[0].local();
            let (near, far) = world.socket_pair();
            if resets {
                near.set_reset_on_close().unwrap();
            }
            let [mut near, mut far] =
                [near, far].map(|end| Stream::new(&local, end, StreamConfig::default()).unwrap());
            near.push(&[1; 100], None, None, Some(1)).unwrap();
            near.flush();
            assert!(world.run_until(&mut cores, HOUR, &mut || {
                near.poll();
                near.sent().is_some()
            }));
            drop(near);
            let (mut len, mut end) = (0, None);
            assert!(world.run_until(&mut cores, HOUR, &mut || {
                match far.recv() {
                    Rx::Data(chunk) => len += chunk.len(),
                    Rx::Empty => {}
                    Rx::Eof => end = Some(false),
                    Rx::Failed(_) => end = Some(true),
                }
                end.is_some()
            }));
            assert_eq!(end, Some(resets));
            assert!(resets || len == 100);
            lengths.insert(len);
        }
    }
    assert!(lengths.len() > 5, "a random part arrives");
}

#[test]
fn a_receiver_that_waits_for_ever_is_a_deadlock_and_is_told() {
    struct Waits(Port);
    impl Task for Waits {
        fn poll(&mut self, _: Duration) -> Progress {
            if self.0.next().is_some() { Progress::Done } else { Progress::Idle }
        }
    }
    let world = World::new(1);
    let mut cores = [world.core()];
    let event = world.event();
    let mut port = cores[0].local().port();
    port.watch(&Fd::from(event.clone()), 1).unwrap();
    cores[0].spawn(Box::new(Waits(port)));
    let mut steps = 0;
    while world.step(&mut cores) {
        steps += 1;
        assert!(steps < 100);
    }
    assert_eq!(cores[0].tasks(), 1);
    event.signal();
    while world.step(&mut cores) {}
    assert_eq!(cores[0].tasks(), 0);
}

#[test]
fn time_moves_to_the_next_deadline() {
    struct Alarm(Duration, Rc<Cell<u32>>);
    impl Task for Alarm {
        fn poll(&mut self, now: Duration) -> Progress {
            if now < self.0 {
                return Progress::Idle;
            }
            self.0 = now + HOUR;
            self.1.set(self.1.get() + 1);
            Progress::Worked
        }
        fn deadline(&self) -> Option<Duration> {
            Some(self.0)
        }
    }
    let world = World::new(1);
    let mut cores = [world.core()];
    let rings = Rc::new(Cell::new(0));
    let start = world.now();
    cores[0].spawn(Box::new(Alarm(start + HOUR, Rc::clone(&rings))));
    assert!(world.run_until(&mut cores, 100 * HOUR, &mut || rings.get() == 24));
    let day = world.now() - start;
    assert!(day >= 24 * HOUR && day < 24 * HOUR + Duration::from_secs(1), "{day:?}");
    assert!(!world.run_until(&mut cores, HOUR / 2, &mut || rings.get() == 25), "limited");
}

#[test]
fn messages_and_channels_cross_cores() {
    struct Adder(reactor::Receiver<u32>, Rc<Cell<u32>>);
    impl Task for Adder {
        fn poll(&mut self, _: Duration) -> Progress {
            match self.0.try_recv() {
                Some(value) => {
                    self.1.set(self.1.get() + value);
                    Progress::Worked
                }
                None if self.0.is_disconnected() => Progress::Done,
                None => Progress::Idle,
            }
        }
    }
    let world = World::new(1);
    let mut cores = [world.core(), world.core()];
    let sum = Rc::new(Cell::new(0));
    let (sender, receiver) = channel(&cores[1].handle(), 8);
    cores[1].spawn(Box::new(Adder(receiver, Rc::clone(&sum))));
    let mut count = 0;
    cores[0]
        .handle()
        .post(Box::new(move |spawner| {
            spawner.spawn(Box::new(Poller(move |_| {
                count += 1;
                sender.send(count).unwrap();
                if count == 5 { Progress::Done } else { Progress::Worked }
            })));
        }))
        .unwrap();
    while world.step(&mut cores) {}
    assert_eq!((sum.get(), cores[0].tasks(), cores[1].tasks()), (15, 0, 0));
}

struct Poller<F>(F);

impl<F: FnMut(Duration) -> Progress> Task for Poller<F> {
    fn poll(&mut self, now: Duration) -> Progress {
        self.0(now)
    }
}

#[test]
fn file_operations_complete_in_any_order_and_keep_their_data() {
    let mut orders = BTreeSet::new();
    for seed in 0..20 {
        let world = World::new(seed);
        let delay_max = Duration::from_millis(5);
        world.set_file_faults(FileFaults { delay_max, ..FileFaults::default() });
        let mut cores = [world.core()];
        let local = cores[0].local();
        let mut port = local.port();
        let file = world.file("disk", 1 << 20);
        let data: Vec<_> = (0..8).map(|i| list(&local, &pattern(5000, i))).collect();
        for (i, sg) in data.iter().enumerate() {
            port.writev(&file, i as u64 * 8192, sg, false, i as u64).unwrap();
        }
        let order: Vec<u64> =
            (0..8).map(|_| bytes(next(&world, &mut cores, &mut port)).0).collect();
        orders.insert(order);
        for i in 0..8 {
            let back = list(&local, &[0; 5000]);
            port.readv(&file, i * 8192, &back, i).unwrap();
            assert_eq!(bytes(next(&world, &mut cores, &mut port)), (i, 5000));
            assert_eq!(content(&back), pattern(5000, i));
        }
        assert_eq!(world.peek("disk", 8192, 5000), pattern(5000, 1));
    }
    assert!(orders.len() > 10);
}

#[test]
fn holes_zero_ranges_and_unknown_modes() {
    let world = World::new(1);
    let mut cores = [world.core()];
    let local = cores[0].local();
    let mut port = local.port();
    let file = world.file("disk", 0);
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    let mut allocate = |cores: &mut [Core], mode, offset, len| {
        port.fallocate(&file, mode, offset, len, 0).unwrap();
        next(&world, cores, &mut port).result.map(drop)
    };
    assert_eq!(allocate(&mut cores, 0, 0, 8192), Ok(()));
    assert_eq!(world.file_size("disk"), 8192);
    let mut writer = local.port();
    writer.writev(&world.file("disk", 0), 0, &list(&local, &[7; 8192]), true, 1).unwrap();
    assert_eq!(bytes(next(&world, &mut cores, &mut writer)).1, 8192);
    assert_eq!(allocate(&mut cores, libc::FALLOC_FL_PUNCH_HOLE | keep, 100, 50), Ok(()));
    assert_eq!(allocate(&mut cores, libc::FALLOC_FL_ZERO_RANGE | keep, 8000, 1000), Ok(()));
    assert_eq!(
        allocate(&mut cores, libc::FALLOC_FL_COLLAPSE_RANGE, 0, 512),
        Err(Errno::NOT_SUPPORTED)
    );
    let now = world.peek("disk", 0, 9000);
    assert_eq!(now.len(), 8192);
    let zeros = |i: &usize| (100..150).contains(i) || (8000..8192).contains(i);
    assert!(now.iter().enumerate().all(|(i, byte)| *byte == if zeros(&i) { 0 } else { 7 }));
}

#[test]
fn errors_and_short_transfers_on_demand() {
    let world = World::new(1);
    let mut cores = [world.core()];
    let local = cores[0].local();
    let mut port = local.port();
    let file = world.file("disk", 1 << 20);
    let sg = list(&local, &[7; 16384]);
    world.set_file_faults(FileFaults { error_per_million: 1_000_000, ..FileFaults::default() });
    port.writev(&file, 0, &sg, false, 1).unwrap();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (1, Errno::IO));
    let torn = world.peek("disk", 0, 16384);
    assert!(torn.contains(&0) && torn.contains(&7), "a failed write leaves something behind");
    world.set_file_faults(FileFaults { short_per_million: 1_000_000, ..FileFaults::default() });
    port.readv(&file, 0, &sg, 2).unwrap();
    let (_, n) = bytes(next(&world, &mut cores, &mut port));
    assert!(n > 0 && n < 16384 && n % 512 == 0, "{n}");
}

#[test]
fn a_power_cut_spares_what_was_synced_and_may_take_the_rest() {
    let mut outcomes = BTreeSet::new();
    for seed in 0..60 {
        let world = World::new(seed);
        let mut cores = vec![world.core()];
        let local = cores[0].local();
        let mut port = local.port();
        let file = world.file("disk", 1 << 20);
        let write = |cores: &mut [Core], port: &mut Port, offset, byte, dsync| {
            port.writev(&file, offset, &list(&local, &[byte; 2048]), dsync, 0).unwrap();
            assert_eq!(bytes(next(&world, cores, port)).1, 2048);
        };
        write(&mut cores, &mut port, 0, 1, false);
        port.fsync(&file, true, 0).unwrap();
        next(&world, &mut cores, &mut port);
        write(&mut cores, &mut port, 4096, 2, true);
        write(&mut cores, &mut port, 8192, 3, false);
        // One more is on its way when the machine goes down.
        port.writev(&file, 12_288, &list(&local, &[4; 2048]), false, 0).unwrap();
        world.step(&mut cores);
        drop(port);
        cores.clear();
        world.power_cut();
        assert_eq!(world.peek("disk", 0, 2048), [1; 2048], "seed {seed}");
        assert_eq!(world.peek("disk", 4096, 2048), [2; 2048], "seed {seed}");
        let sectors = |at| {
            let bytes = world.peek("disk", at, 2048);
            bytes.chunks(512).map(|sector| sector[0]).collect::<Vec<_>>()
        };
        outcomes.insert(sectors(8192));
        outcomes.insert(sectors(12_288));
    }
    assert!(outcomes.contains(&vec![0; 4]) && outcomes.contains(&vec![3; 4]), "{outcomes:?}");
    assert!(outcomes.iter().any(|sectors| sectors.contains(&0) && sectors.contains(&3)));
    assert!(outcomes.iter().any(|sectors| sectors.contains(&4)));
}

#[test]
fn operations_from_before_a_power_cut_fail() {
    let world = World::new(1);
    let mut cores = [world.core()];
    let local = cores[0].local();
    let mut port = local.port();
    port.writev(&world.file("disk", 4096), 0, &list(&local, &[1; 512]), true, 1).unwrap();
    world.power_cut();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (1, Errno::IO));
    assert_eq!(world.peek("disk", 0, 512), [0; 512]);
}

#[test]
fn objects_of_the_other_world_are_refused() {
    let world = World::new(1);
    let mut cores = [world.core()];
    let local = cores[0].local();
    let mut port = local.port();
    let real = Fd::from(std::os::fd::OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    port.fsync(&real, true, 1).unwrap();
    assert_eq!(errno(next(&world, &mut cores, &mut port)), (1, Errno::BAD_DESCRIPTOR));
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(Stream::new(&local, socket.into(), StreamConfig::default()).is_err());

    let mut real_core = support::core();
    let mut port = real_core.local().port();
    port.fsync(&world.file("disk", 512), true, 2).unwrap();
    assert_eq!(errno(support::next(&mut real_core, &mut port)), (2, Errno::BAD_DESCRIPTOR));
    let (near, _far) = world.socket_pair();
    assert!(Stream::new(&real_core.local(), near, StreamConfig::default()).is_err());
}

#[test]
fn random_numbers_come_from_the_seed() {
    let draw = |seed| World::new(seed).core().local().random_u64();
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let real = support::core().local();
    assert_ne!(real.random_u64(), real.random_u64());
}

/// A layer that changes nothing and has a last word.
struct Polite;

impl Layer for Polite {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        plain.append_to(0, plain.len(), out).map_err(|_| LayerError("short"))
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        sink(Plain::InPlace(0..wire.len()));
        Ok(())
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        out.push(b'.');
    }
}

/// A peer that has room for everything but the last word, and does not read: the word is waited for
/// until the owner gives it up.
#[test]
fn a_last_word_without_room_is_given_up_when_its_owner_says_so() {
    /// Bytes that one direction of the simulated network holds.
    const WINDOW_BYTES: usize = 256 << 10;

    let world = World::new(1);
    let mut cores = [world.core()];
    let local = cores[0].local();
    let (near, far) = world.socket_pair();
    let layer = Some(Box::new(Polite) as Box<dyn Layer>);
    let mut stream =
        Stream::new(&local, near, StreamConfig { layer, ..StreamConfig::default() }).unwrap();
    let sg = list(&local, &vec![1; WINDOW_BYTES]);
    stream.push(&[], Some((&sg, 0, sg.len())), None, None).unwrap();
    stream.flush();
    let mut steps = 0;
    while stream.is_sending() {
        steps += 1;
        assert!(steps < 1000, "the window has room for all of it");
        world.step(&mut cores);
        stream.poll();
    }
    stream.shutdown();
    for _ in 0..100 {
        world.step(&mut cores);
        stream.poll();
    }
    assert!(!stream.is_quiet(), "it waits for room");
    stream.shutdown();
    steps = 0;
    while !stream.is_quiet() {
        steps += 1;
        assert!(steps < 1000, "it is given up");
        world.step(&mut cores);
        stream.poll();
    }
    drop(far);
}
