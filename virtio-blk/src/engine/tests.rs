use std::collections::VecDeque;

use block::check;
use proptest::prelude::*;

use super::*;
use crate::device::tests::{geometry, identity, options};
use crate::device::{Device, DeviceOptions};
use crate::queue::ring::Ring;
use crate::queue::split::RingConfig;
use crate::testing::{Buffer, TestMemory, TestRing};

const BLOCKS: u64 = 256;
const BYTES: usize = BLOCKS as usize * 512;

/// A disk in memory whose I/Os complete when the test says so.
struct Disk {
    geometry: block::Geometry,
    bytes: Vec<u8>,
    accepted: VecDeque<Box<Io>>,
    /// I/Os taken at most at a time.
    depth: usize,
    /// I/Os that may complete. None: all.
    allowed: Option<usize>,
    /// Complete the newest first.
    newest_first: bool,
    fail: Option<IoError>,
    polls: usize,
    log: Vec<(Op, u64, u64, bool, bool)>,
}

impl Disk {
    fn new(io_bytes_max: u32) -> Disk {
        let geometry = block::Geometry { blocks: BLOCKS, io_bytes_max, ..geometry() };
        Disk {
            geometry,
            bytes: (0..BYTES).map(|i| (i / 512 * 31 + i % 251) as u8).collect(),
            accepted: VecDeque::new(),
            depth: usize::MAX,
            allowed: None,
            newest_first: false,
            fail: None,
            polls: 0,
            log: Vec::new(),
        }
    }

    fn execute(&mut self, io: &mut Io) {
        io.result = check(&self.geometry, io);
        if let Some(error) = self.fail {
            io.result = Err(error);
        }
        self.log.push((io.op, io.offset, io.len, io.fua, io.no_unmap));
        if io.result.is_err() {
            return;
        }
        let range = io.offset as usize..(io.offset + io.len) as usize;
        match io.op {
            Op::Read => io.data.copy_from_slice(0, &self.bytes[range]).unwrap(),
            Op::Write => io.data.copy_to_slice(0, &mut self.bytes[range]).unwrap(),
            Op::WriteZeroes | Op::Deallocate => self.bytes[range].fill(0),
            Op::Flush => {}
            other => panic!("no request is {other:?}"),
        }
    }
}

impl Channel for Disk {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        if self.accepted.len() >= self.depth {
            return Err(Busy(io));
        }
        self.accepted.push_back(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        self.polls += 1;
        let allowed = self.allowed.unwrap_or(usize::MAX);
        for _ in 0..allowed.min(self.accepted.len()) {
            let io = match self.newest_first {
                true => self.accepted.pop_back(),
                false => self.accepted.pop_front(),
            };
            let mut io = io.unwrap();
            self.execute(&mut io);
            done(io);
        }
        if let Some(allowed) = &mut self.allowed {
            *allowed = 0;
        }
    }

    fn in_flight(&self) -> usize {
        self.accepted.len()
    }
}

/// A driver, the device and the disk.
struct Rig {
    memory: TestMemory,
    driver: TestRing,
    engine: Engine,
    disk: Disk,
    /// Where the next request goes.
    at: u64,
}

const ALL: Features = Features(
    Features::DISCARD.0
        | Features::WRITE_ZEROES.0
        | Features::FLUSH.0
        | Features::EVENT_IDX.0
        | Features::INDIRECT_DESC.0,
);

struct Sent {
    head: u16,
    status: u64,
    data: u64,
}

impl Rig {
    fn new(size: u16) -> Rig {
        Rig::with(size, 1 << 20, options())
    }

    fn with(size: u16, io_bytes_max: u32, options: DeviceOptions) -> Rig {
        Rig::of(size, io_bytes_max, options, false)
    }

    fn of(size: u16, io_bytes_max: u32, options: DeviceOptions, packed: bool) -> Rig {
        let memory = TestMemory::new(4 << 20);
        let driver = TestRing::new(memory.view(), memory.base(), size, true, packed);
        let disk = Disk::new(io_bytes_max);
        let device = Device::new(&disk.geometry, &identity(), &options);
        let config = RingConfig {
            size,
            address: driver.address(),
            base: driver.base_at_start(),
            event_idx: true,
            indirect: true,
            packed,
        };
        let ring = Ring::new(memory.view(), &config, None).unwrap();
        let config = EngineConfig { limits: *device.limits(), features: ALL, write_through: false };
        let mut engine = Engine::new(ring, Rc::clone(memory.view()), config);
        engine.set_enabled(true);
        let at = memory.base() + (64 << 10);
        Rig { memory, driver, engine, disk, at }
    }

    /// Another engine takes the ring over, at that base.
    fn restart(&mut self, base: u32, record: Option<&TestMemory>) {
        let ring = RingConfig {
            size: self.engine.ring.size(),
            address: self.driver.address(),
            base,
            event_idx: true,
            indirect: true,
            packed: self.driver.is_packed(),
        };
        let record = record.map(|memory| memory.view().slice(memory.base(), memory.len()).unwrap());
        let ring = Ring::new(self.memory.view(), &ring, record).unwrap();
        self.engine = Engine::new(ring, Rc::clone(self.memory.view()), self.engine.config);
        self.engine.set_enabled(true);
    }

    fn room(&mut self, len: u64) -> u64 {
        if self.at + len > self.memory.base() + (4 << 20) {
            self.at = self.memory.base() + (64 << 10);
        }
        let at = self.at;
        self.at += len;
        at
    }

    /// A request with `sent` behind the header and `room` bytes for data.
    fn add(&mut self, kind: u32, sector: u64, sent: &[u8], room: u32) -> Option<Sent> {
        let at = self.room(16 + sent.len() as u64);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write(at, &header);
        self.memory.write(at + 16, sent);
        let data = self.room(u64::from(room) + 1);
        let status = data + u64::from(room);
        self.memory.write(status, &[0xff]);
        let mut buffers = vec![Buffer::readable(at, 16)];
        if !sent.is_empty() {
            buffers.push(Buffer::readable(at + 16, sent.len() as u32));
        }
        if room > 0 {
            buffers.push(Buffer::writable(data, room));
        }
        buffers.push(Buffer::writable(status, 1));
        let head = self.driver.add(&buffers)?;
        self.driver.publish();
        Some(Sent { head, status, data })
    }

    fn turn(&mut self) -> Turn {
        self.engine.poll(&mut self.disk)
    }

    fn status(&self, sent: &Sent) -> u8 {
        self.memory.read(sent.status, 1)[0]
    }

    /// A request, done at once: its status byte and used length.
    fn run(&mut self, kind: u32, sector: u64, sent: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        let sent = self.add(kind, sector, sent, room).unwrap();
        for _ in 0..40 {
            self.turn();
        }
        let (head, written) = self.driver.pop_used().expect("it is done");
        assert_eq!(head, sent.head);
        (self.status(&sent), written, self.memory.read(sent.data, room as usize))
    }
}

/// It may have connections to set up and to keep.
#[test]
fn a_channel_is_polled_without_any_request() {
    let mut rig = Rig::new(8);
    for polls in 1..3 {
        rig.turn();
        assert_eq!(rig.disk.polls, polls);
    }
}

#[test]
fn reads_writes_and_flushes() {
    let mut rig = Rig::new(16);
    let before = rig.disk.bytes[1024..3072].to_vec();
    assert_eq!(rig.run(0, 2, &[], 2048), (0, 2049, before));
    let new = vec![0x5a; 1536];
    assert_eq!(rig.run(1, 4, &new, 0), (0, 1, vec![]));
    assert_eq!(rig.disk.bytes[2048..3584], new);
    assert_eq!(rig.run(4, 0, &[], 0), (0, 1, vec![]));
    assert_eq!(rig.disk.log[2], (Op::Flush, 0, 0, false, false));

    assert_eq!(rig.run(8, 0, &[], 20).2, b"PENSTOCK-1\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.run(0, BLOCKS, &[], 512).0, 1);
    assert_eq!(rig.run(1, BLOCKS - 1, &[0; 1024], 0).0, 1);
    assert_eq!(rig.run(99, 0, &[], 0).0, 2);
    let counters = *rig.engine.counters();
    assert_eq!((counters.reads, counters.writes, counters.flushes), (1, 1, 1));
    assert_eq!((counters.read_bytes, counters.written_bytes), (2048, 1536));
    assert_eq!((counters.others, counters.errors), (4, 3));
}

#[test]
fn a_failed_io_is_a_failed_request() {
    let mut rig = Rig::new(16);
    for (error, status) in [(IoError::Medium, 1), (IoError::NotSupported, 2)] {
        rig.disk.fail = Some(error);
        assert_eq!(rig.run(1, 0, &[1; 512], 0), (status, 1, vec![]));
        let (read, written, _) = rig.run(0, 0, &[], 512);
        assert_eq!((read, written), (status, 0), "no byte of data is promised");
    }
    assert_eq!(rig.engine.counters().read_bytes, 0);
    assert_eq!(rig.engine.in_flight(), 0);
}

#[test]
fn long_requests_are_cut() {
    let mut rig = Rig::with(4, 4096, options());
    let before = rig.disk.bytes[512..512 + 40_960].to_vec();
    assert_eq!(rig.run(0, 1, &[], 40_960), (0, 40_961, before));
    assert_eq!(rig.disk.log.len(), 10);
    assert!(rig.disk.log.iter().all(|(op, _, len, ..)| (*op, *len) == (Op::Read, 4096)));
    let new: Vec<u8> = (0..9000u32 / 512 * 512).map(|i| (i % 253) as u8).collect();
    assert_eq!(rig.run(1, 3, &new, 0).0, 0);
    assert_eq!(rig.disk.bytes[1536..1536 + new.len()], new);

    // One part fails: the request fails, once.
    rig.disk.log.clear();
    let sent = rig.add(0, 0, &[], 16_384).unwrap();
    rig.disk.allowed = Some(1);
    rig.turn();
    rig.disk.fail = Some(IoError::Medium);
    rig.disk.allowed = Some(1);
    rig.turn();
    rig.disk.fail = None;
    rig.disk.allowed = None;
    assert_eq!(rig.driver.pop_used(), None);
    rig.turn();
    assert_eq!(rig.driver.pop_used(), Some((sent.head, 0)));
    assert_eq!(rig.status(&sent), 1);
    assert_eq!(rig.disk.log.len(), 4);
}

#[test]
fn queues_of_a_device_share_what_a_turn_may_take() {
    let mut greedy = Rig::new(64);
    let mut modest = Rig::new(64);
    // A reader of 32 KiB at a time keeps the device full; 512 KiB are 16 of them.
    for turn in 0..5 {
        while greedy.add(0, 0, &[], 32 << 10).is_some() {}
        let mut budget = Budget::default();
        greedy.disk.log.clear();
        greedy.engine.poll_within(&mut greedy.disk, Duration::ZERO, &mut budget);
        assert_eq!(greedy.disk.log.len(), 16, "turn {turn}");
        assert!(budget.is_spent());
        // Another queue of the same device gets nothing in this turn, that of another device does.
        let sent = modest.add(0, 0, &[], 512).unwrap();
        modest.engine.poll_within(&mut modest.disk, Duration::ZERO, &mut budget);
        assert_eq!(modest.driver.pop_used(), None);
        modest.turn();
        assert_eq!(modest.driver.pop_used().unwrap().0, sent.head);
        while greedy.driver.pop_used().is_some() {}
    }
    // By number of requests as well; what needs no I/O counts, too.
    let mut small = Rig::new(512);
    for _ in 0..150 {
        small.add(4, 0, &[], 0).unwrap();
    }
    small.turn();
    let done = std::iter::from_fn(|| small.driver.pop_used()).count();
    assert_eq!(done, 128);
}

/// A guest's other processor may add requests while a turn takes them, so a kind that costs nothing
/// would keep the core for ever.
#[test]
fn every_kind_of_request_counts_in_a_turn() {
    for packed in [false, true] {
        let kinds: [(&str, u32, Vec<u8>, u32); 9] = [
            ("a range of nothing to discard", 11, ranges(&[(0, 0, 0)]), 0),
            ("ranges of nothing to zero", 13, ranges(&[(0, 0, 0), (1, 0, 1)]), 0),
            ("a read of more parts than there may be", 0, vec![], 129 * 512),
            ("a write of as many", 1, vec![0; 129 * 512], 0),
            ("a read of nothing", 0, vec![], 0),
            ("an ID", 8, vec![], 20),
            ("what is not known", 99, vec![], 0),
            ("a read of no whole sectors", 0, vec![], 9),
            ("a range that is cut off", 11, vec![0; 9], 0),
        ];
        for (what, kind, sent, room) in kinds {
            // 512 bytes in a part, so that the volume takes no transfer of 129 sectors.
            let mut rig = Rig::of(1024, 512, options(), packed);
            let added = (0..200).filter(|_| rig.add(kind, 0, &sent, room).is_some()).count();
            assert_eq!(added, 200, "{what}");
            let mut budget = Budget::default();
            rig.engine.poll_within(&mut rig.disk, Duration::ZERO, &mut budget);
            assert!(budget.is_spent(), "{what}");
            assert_eq!(rig.engine.counters().others, 128, "{what}");
            rig.turn();
            assert_eq!(rig.engine.counters().others, 200, "{what}");
        }
        // A read into memory that is not there.
        let mut rig = Rig::of(1024, 512, options(), packed);
        let (header, status) = (rig.room(16), rig.room(1));
        rig.memory.write(header, &[0; 16]);
        for _ in 0..200 {
            let nowhere = Buffer::writable(1 << 40, 512);
            let buffers = [Buffer::readable(header, 16), nowhere, Buffer::writable(status, 1)];
            rig.driver.add(&buffers).unwrap();
        }
        rig.driver.publish();
        rig.turn();
        assert_eq!((rig.engine.counters().others, rig.engine.broken()), (128, None));
    }
}

#[test]
fn one_request_in_a_while_is_measured_and_the_longest_is_known() {
    let us = Duration::from_micros;
    let mut rig = Rig::new(16);
    let at = |rig: &mut Rig, now: Duration| {
        rig.engine.poll_within(&mut rig.disk, now, &mut Budget::default());
        rig.engine.counters().latency
    };
    rig.disk.allowed = Some(0);
    rig.add(0, 0, &[], 512).unwrap();
    rig.add(0, 1, &[], 512).unwrap();
    assert_eq!(at(&mut rig, us(100)).count(), 0);
    rig.disk.allowed = None;
    let latency = at(&mut rig, us(1_100));
    assert_eq!((latency.count(), latency.max()), (1, Some(us(1_000))), "both, and one measured");
    for (now, measured) in [(1_110, 2), (1_115, 2), (1_131, 3)] {
        rig.add(0, 0, &[], 512).unwrap();
        assert_eq!(at(&mut rig, us(now)).count(), measured, "at {now} us");
    }
}

#[test]
fn requests_wait_for_parts_of_others() {
    // 128 I/Os there are, and each request takes 60.
    let mut rig = Rig::with(16, 512, options());
    rig.disk.allowed = Some(0);
    let sent: Vec<_> = (0..3).map(|i| rig.add(0, i, &[], 60 * 512).unwrap()).collect();
    rig.turn();
    assert_eq!((rig.engine.in_flight(), rig.disk.accepted.len()), (2, 120));
    assert!(!rig.engine.arm(), "nothing can be taken, so nobody needs to notify");
    rig.disk.allowed = None;
    rig.turn();
    rig.turn();
    for sent in sent {
        assert_eq!(rig.driver.pop_used(), Some((sent.head, 60 * 512 + 1)));
        assert_eq!(rig.status(&sent), 0);
    }
    // More parts than there can ever be.
    assert_eq!(rig.run(0, 0, &[], 129 * 512).0, 1);
    assert_eq!(rig.run(0, 0, &[], 128 * 512).0, 0);
}

fn ranges(parts: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in parts {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

#[test]
fn ranges_are_done_one_after_the_other() {
    let mut rig = Rig::new(16);
    let parts = ranges(&[(1, 2, 0), (9, 0, 0), (7, 1, 0)]);
    assert_eq!(rig.run(11, 0, &parts, 0), (0, 1, vec![]));
    let parts = ranges(&[(20, 1, 1), (30, 1, 0)]);
    assert_eq!(rig.run(13, 0, &parts, 0), (0, 1, vec![]));
    assert_eq!(
        rig.disk.log,
        [
            (Op::Deallocate, 512, 1024, false, true),
            (Op::Deallocate, 7 * 512, 512, false, true),
            (Op::WriteZeroes, 20 * 512, 512, false, false),
            (Op::WriteZeroes, 30 * 512, 512, false, true),
        ]
    );
    assert_eq!(rig.disk.bytes[30 * 512..31 * 512], [0; 512]);
    // Nothing to do is done.
    assert_eq!(rig.run(11, 0, &ranges(&[(3, 0, 0)]), 0).0, 0);
    // The first failure ends it.
    rig.disk.log.clear();
    rig.disk.fail = Some(IoError::Medium);
    assert_eq!(rig.run(11, 0, &ranges(&[(1, 1, 0), (2, 1, 0)]), 0).0, 1);
    assert_eq!(rig.disk.log.len(), 1);
    rig.disk.fail = None;
    assert_eq!(rig.run(1, 0, &[9; 512], 0).0, 0, "nothing is left over in the slot");
    assert_eq!(rig.disk.log.len(), 2);
}

#[test]
fn write_through_makes_writes_durable() {
    let mut rig = Rig::new(16);
    rig.engine.set_write_through(true);
    rig.run(1, 0, &[1; 512], 0);
    rig.run(13, 0, &ranges(&[(0, 1, 0), (1, 1, 0)]), 0);
    rig.run(0, 0, &[], 512);
    rig.engine.set_write_through(false);
    rig.run(1, 0, &[1; 512], 0);
    let fua: Vec<bool> = rig.disk.log.iter().map(|io| io.3).collect();
    assert_eq!(fua, [true, true, true, false, false]);
}

#[test]
fn a_busy_channel_gets_it_later_in_order() {
    let mut rig = Rig::new(16);
    rig.disk.depth = 2;
    rig.disk.allowed = Some(0);
    let sent: Vec<_> = (0..4u64).map(|i| rig.add(0, i, &[], 512).unwrap()).collect();
    rig.turn();
    assert_eq!(rig.engine.in_flight(), 3, "the third was refused, the fourth not looked at");
    assert_eq!((rig.engine.waiting(), rig.engine.counters().busy), (1, 1));
    assert!(!rig.engine.arm());
    rig.disk.allowed = None;
    while rig.turn().has_worked {}
    for sent in sent {
        assert_eq!(rig.driver.pop_used(), Some((sent.head, 513)));
    }
    let sectors: Vec<u64> = rig.disk.log.iter().map(|io| io.1 / 512).collect();
    assert_eq!(sectors, [0, 1, 2, 3]);
}

#[test]
fn one_call_for_a_batch() {
    let mut rig = Rig::new(64);
    for i in 0..16 {
        rig.add(0, i, &[], 512).unwrap();
    }
    let turn = rig.turn();
    assert!(turn.has_worked && turn.wants_call);
    assert_eq!(rig.turn(), Turn::default());
    let mut done = 0;
    while rig.driver.pop_used().is_some() {
        done += 1;
    }
    assert_eq!(done, 16);
    // The driver polls from here on.
    rig.add(0, 0, &[], 512).unwrap();
    assert!(!rig.turn().wants_call);
    rig.driver.pop_used().unwrap();
    rig.driver.arm();
    rig.add(0, 0, &[], 512).unwrap();
    assert!(rig.turn().wants_call);
}

#[test]
fn a_paused_queue_takes_nothing_and_finishes_the_rest() {
    let mut rig = Rig::new(16);
    rig.disk.allowed = Some(0);
    let first = rig.add(0, 0, &[], 512).unwrap();
    rig.turn();
    let second = rig.add(0, 0, &[], 512).unwrap();
    rig.engine.set_enabled(false);
    rig.disk.allowed = None;
    rig.turn();
    rig.turn();
    assert_eq!(rig.driver.pop_used(), Some((first.head, 513)));
    assert_eq!((rig.driver.pop_used(), rig.engine.in_flight()), (None, 0));
    assert_eq!(rig.engine.base(), 1);
    assert!(!rig.engine.arm());
    rig.engine.set_enabled(true);
    assert!(rig.engine.arm());
    rig.turn();
    assert_eq!(rig.driver.pop_used(), Some((second.head, 513)));
}

#[test]
fn what_never_reached_the_channel_is_aborted() {
    let mut rig = Rig::new(16);
    rig.disk.depth = 0;
    let sent = rig.add(1, 0, &[1; 512], 0).unwrap();
    rig.turn();
    assert_eq!(rig.engine.waiting(), 1);
    rig.engine.abort_waiting();
    rig.turn();
    assert_eq!(rig.driver.pop_used(), Some((sent.head, 1)));
    assert_eq!((rig.status(&sent), rig.engine.in_flight()), (1, 0));
}

/// What was left in a record is done by who has the record. Who has not knows only where to go on: it
/// must not take what the driver has back, and serves what comes.
#[test]
fn a_ring_goes_on_with_its_record_or_without() {
    #[derive(PartialEq, Debug)]
    enum Record {
        Kept,
        Lost,
        None,
    }
    for (packed, then) in [false, true]
        .into_iter()
        .flat_map(|packed| [Record::Kept, Record::Lost, Record::None].map(|then| (packed, then)))
    {
        let layout = crate::queue::inflight::InflightLayout { queues: 1, queue_size: 16 };
        let records = [(); 2].map(|()| TestMemory::new(layout.bytes(packed)));
        let mut rig = Rig::of(16, 1 << 20, options(), packed);
        rig.restart(rig.driver.base_at_start(), Some(&records[0]));
        rig.disk.allowed = Some(0);
        let left = rig.add(1, 0, &[1; 512], 0).unwrap();
        let done = rig.add(1, 1, &[2; 512], 0).unwrap();
        rig.turn();
        // The newer one is done, the older one is given up.
        (rig.disk.newest_first, rig.disk.allowed) = (true, Some(1));
        rig.turn();
        assert_eq!(rig.driver.pop_used().map(|(head, _)| head), Some(done.head));
        rig.engine.set_enabled(false);
        rig.engine.leave_aborted();
        (rig.disk.fail, rig.disk.allowed) = (Some(IoError::Aborted), None);
        rig.turn();
        assert_eq!((rig.engine.in_flight(), rig.driver.pop_used()), (0, None));
        assert_eq!(rig.status(&left), 0xff, "nobody has answered it");

        rig.disk.fail = None;
        rig.disk.log.clear();
        let base = rig.engine.base();
        rig.restart(
            base,
            match then {
                Record::Kept => Some(&records[0]),
                Record::Lost => Some(&records[1]),
                Record::None => None,
            },
        );
        rig.turn();
        let is_kept = then == Record::Kept;
        let expected = is_kept.then_some((left.head, 1));
        assert_eq!(rig.driver.pop_used(), expected, "{packed} {then:?}");
        assert_eq!(rig.disk.log.len(), usize::from(is_kept), "{packed} {then:?}");
        assert_eq!(rig.disk.bytes[..512] == [1; 512], is_kept);
        // More than fit into the ring once.
        for round in 0..20 {
            let (status, _, data) = rig.run(0, 1, &[], 512);
            assert_eq!((status, data), (0, vec![2; 512]), "{packed} {then:?} {round}");
        }
        assert_eq!(rig.engine.broken(), None);
    }
}

#[test]
fn memory_may_change_under_a_running_queue() {
    use std::os::fd::AsFd;
    let mut rig = Rig::new(16);
    rig.disk.allowed = Some(0);
    let first = rig.add(0, 0, &[], 512).unwrap();
    rig.turn();
    let ring = rig.driver.address();

    // The ring is not in the table for a while: nothing new is taken, the old one completes into
    // the memory it was given.
    let other = TestMemory::new(0x100);
    rig.engine.set_memory(iobuf::GuestMemory::default().view(), None);
    assert_eq!(rig.engine.in_flight_old(), 1);
    let second = rig.add(0, 1, &[], 512).unwrap();
    rig.disk.allowed = None;
    rig.turn();
    assert_eq!(rig.engine.in_flight_old(), 0);
    assert_eq!(rig.driver.pop_used(), Some((first.head, 513)));
    assert_eq!(rig.driver.pop_used(), None);
    assert!(!rig.engine.arm());
    rig.engine.set_memory(Rc::clone(other.view()), Some(ring));
    rig.turn();
    assert_eq!(rig.driver.pop_used(), None, "the ring does not fit into that one");

    let size = 4 << 20;
    let fd = rig.memory.fd().as_fd();
    let region = iobuf::GuestRegion::map(fd, 0, size, rig.memory.base(), 0).unwrap();
    let again = iobuf::GuestMemory::new(vec![region]).unwrap();
    rig.engine.set_memory(again.view(), Some(ring));
    rig.turn();
    assert_eq!(rig.driver.pop_used(), Some((second.head, 513)));
    assert_eq!(rig.memory.read(second.data, 512), rig.disk.bytes[512..1024]);
}

#[test]
fn a_broken_queue_stops_and_finishes_the_rest() {
    let mut rig = Rig::new(16);
    rig.disk.allowed = Some(0);
    let good = rig.add(0, 0, &[], 512).unwrap();
    rig.driver.split().push_head(16);
    rig.driver.publish();
    rig.turn();
    assert_eq!(rig.engine.broken(), Some(Broken::Head));
    rig.disk.allowed = None;
    rig.turn();
    assert_eq!(rig.driver.pop_used(), Some((good.head, 513)));
    rig.add(0, 0, &[], 512).unwrap();
    assert_eq!(rig.turn(), Turn::default());
    assert!(!rig.engine.arm());
}

#[test]
fn segments_have_a_bound() {
    let mut rig = Rig::new(512);
    let at = rig.room(0x20000);
    rig.memory.write(at, &[0; 16]);
    let status = at + 0x1ffff;
    for (count, expected) in [(252u64, 0), (256, 1)] {
        let mut buffers = vec![Buffer::readable(at, 16)];
        buffers.extend((0..count).map(|i| Buffer::writable(at + 0x1000 + 256 * i, 128)));
        buffers.push(Buffer::writable(status, 1));
        rig.driver.add(&buffers).unwrap();
        rig.driver.publish();
        rig.turn();
        rig.driver.pop_used().unwrap();
        assert_eq!(rig.memory.read(status, 1), [expected], "{count}");
    }
}

/// One step of a driver.
#[derive(Debug, Clone)]
enum Step {
    Read { sector: u64, sectors: u64 },
    Write { sector: u64, sectors: u64, byte: u8 },
    Zero { ranges: Vec<(u64, u32)>, discard: bool },
    Flush,
    Unknown,
    Complete { count: usize, newest_first: bool },
    Depth(usize),
}

fn step() -> impl Strategy<Value = Step> {
    // Some of it beyond the end.
    let sector = || 0..BLOCKS + 4;
    prop_oneof![
        3 => (sector(), 0..20u64).prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        3 => (sector(), 0..20u64, any::<u8>())
            .prop_map(|(sector, sectors, byte)| Step::Write { sector, sectors, byte }),
        1 => (prop::collection::vec((sector(), 0..9u32), 1..5), any::<bool>())
            .prop_map(|(ranges, discard)| Step::Zero { ranges, discard }),
        1 => Just(Step::Flush),
        1 => Just(Step::Unknown),
        4 => (0..9usize, any::<bool>())
            .prop_map(|(count, newest_first)| Step::Complete { count, newest_first }),
        1 => (1..9usize).prop_map(Step::Depth),
    ]
}

proptest! {
    /// A queue in front of a disk does what a disk does. Writes in flight at the same time do not
    /// overlap, as their order is not defined.
    #[test]
    fn matches_a_model_disk(
        steps in prop::collection::vec(step(), 1..60),
        io_bytes_max in prop_oneof![Just(512u32), Just(2048), Just(1 << 20)],
        packed: bool,
    ) {
        let mut rig = Rig::of(8, io_bytes_max, options(), packed);
        let mut model = rig.disk.bytes.clone();
        rig.disk.allowed = Some(0);
        // What each request has to give: head, where its status is, status, data expected.
        type Expected = (Sent, u8, Option<Vec<u8>>);
        let mut pending: Vec<Expected> = Vec::new();
        for step in steps.into_iter().chain([Step::Complete { count: 0, newest_first: false }]) {
            let inside = |sector: u64, sectors: u64| sector + sectors <= BLOCKS;
            let bytes = |sector: u64, sectors: u64| {
                sector as usize * 512..(sector + sectors) as usize * 512
            };
            match step {
                Step::Read { sector, sectors } => {
                    if let Some(sent) = rig.add(0, sector, &[], sectors as u32 * 512) {
                        let data = inside(sector, sectors)
                            .then(|| model[bytes(sector, sectors)].to_vec());
                        pending.push((sent, u8::from(data.is_none()), data));
                    }
                }
                // What changes the disk runs alone.
                Step::Write { sector, sectors, byte } => {
                    finish(&mut rig, &mut pending)?;
                    let data: Vec<u8> =
                        (0..sectors as usize * 512).map(|i| byte.wrapping_add(i as u8)).collect();
                    let (status, ..) = rig.run_freely(1, sector, &data);
                    prop_assert_eq!(status, u8::from(!inside(sector, sectors)));
                    if status == 0 {
                        model[bytes(sector, sectors)].copy_from_slice(&data);
                    }
                }
                Step::Zero { ranges: parts, discard } => {
                    finish(&mut rig, &mut pending)?;
                    let raw: Vec<_> = parts.iter().map(|(at, n)| (*at, *n, 0)).collect();
                    let kind = if discard { 11 } else { 13 };
                    let (status, ..) = rig.run_freely(kind, 0, &ranges(&raw));
                    let all = parts.iter().all(|(at, n)| inside(*at, u64::from(*n)));
                    prop_assert_eq!(status, u8::from(!all));
                    for (at, n) in parts.iter().filter(|_| all) {
                        model[bytes(*at, u64::from(*n))].fill(0);
                    }
                }
                Step::Flush => {
                    if let Some(sent) = rig.add(4, 0, &[], 0) {
                        pending.push((sent, 0, None));
                    }
                }
                Step::Unknown => {
                    if let Some(sent) = rig.add(77, 0, &[], 0) {
                        pending.push((sent, 2, None));
                    }
                }
                Step::Complete { count, newest_first } => {
                    rig.disk.allowed = Some(count);
                    rig.disk.newest_first = newest_first;
                    rig.turn();
                    collect(&mut rig, &mut pending)?;
                }
                Step::Depth(depth) => rig.disk.depth = depth,
            }
        }
        finish(&mut rig, &mut pending)?;
        prop_assert_eq!(&rig.disk.bytes, &model);
        prop_assert_eq!(rig.engine.in_flight(), 0);
        prop_assert_eq!(rig.driver.outstanding(), 0);
        prop_assert_eq!(rig.engine.broken(), None);
    }

    /// Whatever a driver writes into its rings, the device stays within bounds: no panic, at most
    /// as many requests as the queue has entries, and every I/O inside the disk.
    #[test]
    fn any_ring_is_survived(
        descriptors in prop::collection::vec(
            (0u64..0x60, 0u32..0x900, 0u16..8, 0u16..20, any::<u8>()), 16),
        headers in prop::collection::vec((0u32..15, 0u64..BLOCKS + 9), 8),
        heads in prop::collection::vec(0u16..17, 1..40),
    ) {
        let mut rig = Rig::new(16);
        let base = rig.memory.base() + (64 << 10);
        for (at, (kind, sector)) in (0..).zip(&headers) {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(sector.to_le_bytes());
            rig.memory.write(base + 64 * at, &bytes);
        }
        for (index, (addr, len, flags, next, wild)) in (0u16..).zip(&descriptors) {
            let addr = match wild {
                0..8 => u64::MAX - addr,
                8..16 => addr * 0x1000,
                _ => base + addr * 64,
            };
            // Often enough a header.
            let len = if wild % 2 == 0 { 16 } else { *len };
            rig.driver.split().set_desc(index, addr, len, *flags, *next);
        }
        for heads in heads.chunks(8) {
            for head in heads {
                rig.driver.split().push_head(*head);
            }
            rig.driver.publish();
            rig.turn();
            prop_assert!(rig.engine.in_flight() <= 16);
        }
        while rig.turn().has_worked {}
        prop_assert_eq!(rig.engine.in_flight(), 0);
        for (_, offset, len, ..) in &rig.disk.log {
            prop_assert!(offset + len <= BYTES as u64);
        }
    }
}

impl Rig {
    /// Run one request to its end, whatever the disk allowed.
    fn run_freely(&mut self, kind: u32, sector: u64, sent: &[u8]) -> (u8, u32, Vec<u8>) {
        self.disk.allowed = None;
        let result = self.run(kind, sector, sent, 0);
        self.disk.allowed = Some(0);
        result
    }
}

fn collect(
    rig: &mut Rig,
    pending: &mut Vec<(Sent, u8, Option<Vec<u8>>)>,
) -> Result<(), TestCaseError> {
    while let Some((head, written)) = rig.driver.pop_used() {
        let at = pending.iter().position(|(sent, ..)| sent.head == head);
        let (sent, status, data) = pending.remove(at.expect("it was asked for"));
        prop_assert_eq!(rig.status(&sent), status);
        if let Some(data) = data {
            prop_assert_eq!(written as usize, data.len() + 1);
            prop_assert_eq!(rig.memory.read(sent.data, data.len()), data);
        }
    }
    Ok(())
}

fn finish(
    rig: &mut Rig,
    pending: &mut Vec<(Sent, u8, Option<Vec<u8>>)>,
) -> Result<(), TestCaseError> {
    rig.disk.allowed = None;
    while rig.turn().has_worked {}
    rig.disk.allowed = Some(0);
    collect(rig, pending)?;
    prop_assert!(pending.is_empty());
    Ok(())
}
