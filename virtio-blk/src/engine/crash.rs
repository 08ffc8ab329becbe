//! The device dies at every point of handling requests, and another one goes on from the record of
//! requests in flight.
//!
//! Each write to shared memory and each I/O that reaches the volume is a step after which the
//! device may die ([`cut`]). The model: every request comes back to the driver exactly once and
//! succeeds; a read gives what the last completed write of the place wrote; and nothing of a
//! request happens after the driver has it back.

use std::cell::RefCell;
use std::collections::HashMap;

use super::*;
use crate::device::tests::{geometry, identity, options};
use crate::device::{Device, Features};
use crate::queue::inflight::InflightLayout;
use crate::queue::shared::cut;
use crate::queue::split::RingConfig;
use crate::testing::{Buffer, TestMemory, TestRing};

const SIZE: u16 = 8;
/// Places on the volume, each for one request at a time.
const LANES: usize = 24;
const LANE_BYTES: usize = 1024;
/// Requests of one run.
const REQUESTS: u64 = 30;

type Bytes = Rc<RefCell<Vec<u8>>>;

/// A volume that completes when told, and does nothing for a dead device.
struct Volume {
    bytes: Bytes,
    accepted: VecDeque<Box<Io>>,
    allowed: usize,
    newest_first: bool,
}

impl Volume {
    fn execute(&mut self, io: &mut Io) {
        let range = io.offset as usize..(io.offset + io.len) as usize;
        match io.op {
            Op::Read => io.data.copy_from_slice(0, &self.bytes.borrow()[range]).unwrap(),
            Op::Write => io.data.copy_to_slice(0, &mut self.bytes.borrow_mut()[range]).unwrap(),
            _ => {}
        }
    }
}

impl Channel for Volume {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        if self.accepted.len() >= 6 {
            return Err(Busy(io));
        }
        self.accepted.push_back(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        for _ in 0..self.allowed.min(self.accepted.len()) {
            let io = match self.newest_first {
                true => self.accepted.pop_back(),
                false => self.accepted.pop_front(),
            };
            let mut io = io.unwrap();
            if cut::step() {
                self.execute(&mut io);
            }
            done(io);
        }
        self.allowed = 0;
    }

    fn in_flight(&self) -> usize {
        self.accepted.len()
    }
}

#[derive(Clone, Debug)]
struct Pending {
    lane: usize,
    status: u64,
    /// A read, with what it has to find.
    expected: Option<Vec<u8>>,
    data: u64,
}

struct Run {
    memory: TestMemory,
    record: TestMemory,
    driver: TestRing,
    bytes: Bytes,
    /// What each lane holds for the driver.
    model: Vec<Vec<u8>>,
    pending: HashMap<u16, Pending>,
    places: Vec<u64>,
    sent: u64,
    done: u64,
    random: u64,
    indirect: bool,
}

impl Run {
    fn new(seed: u64, packed: bool) -> Run {
        let memory = TestMemory::new(1 << 20);
        let layout = InflightLayout { queues: 1, queue_size: SIZE };
        let record = TestMemory::new(layout.bytes(packed));
        let event_idx = seed.is_multiple_of(2);
        let driver = TestRing::new(memory.view(), memory.base(), SIZE, event_idx, packed);
        let first = memory.base() + 0x4000;
        Run {
            driver,
            bytes: Rc::new(RefCell::new(vec![0; LANES * LANE_BYTES])),
            model: vec![vec![0; LANE_BYTES]; LANES],
            pending: HashMap::new(),
            places: (0..u64::from(SIZE)).map(|place| first + place * 0x4000).collect(),
            sent: 0,
            done: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1,
            indirect: (seed / 2).is_multiple_of(2),
            memory,
            record,
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % end
    }

    /// The next device. None: it died before it had begun, so nobody sees what it made of it.
    fn device(&self) -> Option<(Engine, Volume)> {
        let geometry = block::Geometry {
            blocks: (LANES * LANE_BYTES / 512) as u64,
            io_bytes_max: 512,
            ..geometry()
        };
        let device = Device::new(&geometry, &identity(), &options());
        // As QEMU says it after a crash.
        let config = RingConfig {
            size: SIZE,
            address: self.driver.address(),
            base: self.driver.base_after_crash(),
            event_idx: self.driver.has_event_idx(),
            indirect: true,
            packed: self.driver.is_packed(),
        };
        let record = self.record.view().slice(self.record.base(), self.record.len()).unwrap();
        let ring = Ring::new(self.memory.view(), &config, Some(record));
        if cut::is_dead() {
            return None;
        }
        let ring = ring.unwrap();
        let features = Features::FLUSH | Features::INDIRECT_DESC;
        let config = EngineConfig { limits: *device.limits(), features, write_through: false };
        let mut engine = Engine::new(ring, Rc::clone(self.memory.view()), config);
        engine.set_enabled(true);
        let bytes = Rc::clone(&self.bytes);
        let volume = Volume { bytes, accepted: VecDeque::new(), allowed: 0, newest_first: false };
        Some((engine, volume))
    }

    /// The driver sends a request, if there is room.
    fn send(&mut self) {
        let lane = self.below(LANES as u64) as usize;
        if self.sent == REQUESTS || self.pending.values().any(|other| other.lane == lane) {
            return;
        }
        let Some(at) = self.places.pop() else { return };
        let (data, status, table) = (at + 0x1000, at + 0x2000, at + 0x3000);
        let kind = [0u32, 1, 1, 4][self.below(4) as usize];
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend((lane as u64 * (LANE_BYTES / 512) as u64).to_le_bytes());
        self.memory.write(at, &header);
        self.memory.write(status, &[0xff]);
        let mut buffers = vec![Buffer::readable(at, 16)];
        let mut expected = None;
        match kind {
            0 => {
                self.memory.write(data, &[0xee; LANE_BYTES]);
                buffers.push(Buffer::writable(data, LANE_BYTES as u32));
                expected = Some(self.model[lane].clone());
            }
            1 => {
                let bytes: Vec<u8> =
                    (0..LANE_BYTES).map(|i| (self.sent as usize * 7 + i / 16) as u8).collect();
                self.memory.write(data, &bytes);
                buffers.push(Buffer::readable(data, LANE_BYTES as u32));
                self.model[lane] = bytes;
            }
            _ => {}
        }
        buffers.push(Buffer::writable(status, 1));
        let added = match self.indirect {
            true => self.driver.add_indirect(self.memory.view(), table, &buffers),
            false => self.driver.add(&buffers),
        };
        let Some(id) = added else {
            self.places.push(at);
            if kind == 1 {
                // Not sent after all: the lane holds what it held.
                let range = lane * LANE_BYTES..(lane + 1) * LANE_BYTES;
                self.model[lane] = self.bytes.borrow()[range].to_vec();
            }
            return;
        };
        self.driver.publish();
        self.sent += 1;
        let pending = Pending { lane, status, expected, data };
        assert!(self.pending.insert(id, pending).is_none());
    }

    /// The driver takes what has come back.
    fn collect(&mut self) {
        while let Some((id, _)) = self.driver.pop_used() {
            let pending = self.pending.remove(&id).expect("it was asked for and not answered yet");
            assert_eq!(self.memory.read(pending.status, 1), [0], "an error for the driver");
            if let Some(expected) = pending.expected {
                assert!(self.memory.read(pending.data, LANE_BYTES) == expected, "another read");
            }
            self.places.push(pending.status - 0x2000);
            self.done += 1;
        }
    }

    /// Until the device dies or everything is done.
    fn live(&mut self, engine: &mut Engine, volume: &mut Volume) {
        let mut idle = 0;
        while !cut::is_dead() && self.done < REQUESTS {
            for _ in 0..self.below(4) {
                self.send();
            }
            volume.allowed = self.below(4) as usize;
            volume.newest_first = self.below(2) == 0;
            engine.poll(volume);
            let before = self.done;
            if !cut::is_dead() && self.below(3) > 0 {
                self.collect();
            }
            idle = if self.done > before { 0 } else { idle + 1 };
            assert!(idle < 1000, "a request is lost: {:?}", self.pending);
        }
    }

    /// What a dead device had under way happens or not.
    fn die(&mut self, mut volume: Volume) {
        cut::never();
        for mut io in std::mem::take(&mut volume.accepted) {
            if self.below(2) == 0 {
                volume.execute(&mut io);
            }
        }
        // The driver goes on meanwhile, or not.
        if self.below(2) == 0 {
            self.collect();
            self.send();
        }
    }

    fn finish(mut self) {
        self.collect();
        assert_eq!((self.done, self.pending.len()), (REQUESTS, 0));
        for (lane, expected) in self.model.iter().enumerate() {
            let range = lane * LANE_BYTES..(lane + 1) * LANE_BYTES;
            assert!(self.bytes.borrow()[range] == expected[..], "lane {lane}");
        }
    }
}

/// Devices that live for so many steps each, then one that lives on.
fn run(seed: u64, packed: bool, lives: &[u64]) -> u64 {
    let mut run = Run::new(seed, packed);
    let mut steps = 0;
    for life in lives {
        cut::after(*life);
        if let Some((mut engine, mut volume)) = run.device() {
            run.live(&mut engine, &mut volume);
            steps = cut::left();
            run.die(volume);
        }
        cut::never();
    }
    let (mut engine, mut volume) = run.device().expect("it lives");
    run.live(&mut engine, &mut volume);
    run.finish();
    steps
}

fn dies_anywhere(packed: bool) {
    const LONG: u64 = 1 << 40;
    let mut deaths = 0;
    for seed in 0..8 {
        let steps = LONG - run(seed, packed, &[LONG]);
        assert!(steps > 200, "{steps} steps");
        for life in 0..=steps {
            run(seed, packed, &[life]);
            deaths += 1;
        }
    }
    assert!(deaths > 2000);
}

#[test]
fn every_request_completes_once_wherever_the_device_dies() {
    dies_anywhere(false);
}

#[test]
fn every_request_completes_once_wherever_the_device_dies_packed() {
    dies_anywhere(true);
}

/// The device that recovers dies as well, at each of its first steps.
#[test]
fn every_request_completes_once_if_recovery_dies_too() {
    for packed in [false, true] {
        for seed in 0..6 {
            for first in [37, 90, 151] {
                for second in 0..60 {
                    run(seed, packed, &[first, second, (second * 7 + first) % 50]);
                }
            }
        }
    }
}
