//! A driver writes anything into its rings and buffers, split or packed, and into the record of
//! requests in flight; the device is replaced by another one now and then, and marks dirty pages.
//!
//! Invariants checked: no panic; no more requests in flight than the queue has entries; every I/O
//! is inside the volume and no longer than it takes; and all of them come back, but for those of a
//! device that died.
#![no_main]

use std::rc::Rc;

use block::{Busy, Channel, Geometry, Identity, Io, IoError, Op, check};
use libfuzzer_sys::fuzz_target;
use penstock_fuzz::Input;
use virtio_blk::Broken;
use virtio_blk::Features;
use virtio_blk::device::{Device, DeviceOptions};
use virtio_blk::engine::{Engine, EngineConfig};
use virtio_blk::queue::inflight::InflightLayout;
use virtio_blk::queue::ring::Ring;
use virtio_blk::queue::shared::DirtyLog;
use virtio_blk::queue::split::RingConfig;
use virtio_blk::testing::{TestMemory, TestPackedQueue, TestRing};

const SIZE: u16 = 16;
/// Behind the rings: what descriptors point to.
const DATA_AT: u64 = 0x1000;
const MEMORY_BYTES: u64 = 0x10000;

const GEOMETRY: Geometry = Geometry {
    physical_block_bytes: 512,
    io_bytes_max: 2048,
    read_only: false,
    write_cache: true,
    deallocate: true,
    write_zeroes: true,
    deallocate_granularity_bytes: 512,
    deallocated_reads_zero: true,
    ..Geometry::new(512, 64)
};

/// A volume that looks at what it is asked and completes when told.
#[derive(Default)]
struct Volume {
    held: Vec<Box<Io>>,
    depth: usize,
    may_complete: usize,
    fails: bool,
}

impl Channel for Volume {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        if self.held.len() >= self.depth {
            return Err(Busy(io));
        }
        assert_eq!(check(&GEOMETRY, &io), Ok(()), "the device lets a bad I/O through: {io:?}");
        self.held.push(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        for _ in 0..self.may_complete.min(self.held.len()) {
            // The newest first: the order is the volume's.
            let Some(mut io) = self.held.pop() else { break };
            io.result = if self.fails { Err(IoError::Medium) } else { Ok(()) };
            if io.op == Op::Read {
                io.data.fill(0, io.data.len(), 0x11).expect("inside");
            }
            done(io);
        }
        self.may_complete = 0;
    }

    fn in_flight(&self) -> usize {
        self.held.len()
    }
}

thread_local! {
    /// Mapped once, zeroed for each input: guest memory, the record of requests in flight, and the
    /// log of dirty pages, which covers half of the guest's memory.
    static MEMORY: [TestMemory; 3] = [
        TestMemory::new(MEMORY_BYTES),
        TestMemory::new(RECORD_BYTES),
        TestMemory::new(LOG_BYTES),
    ];
}

const LAYOUT: InflightLayout = InflightLayout { queues: 1, queue_size: SIZE };
/// Room for either kind.
const RECORD_BYTES: u64 = 32 + 32 * SIZE as u64;
const LOG_BYTES: u64 = 0x4000_0000 / 4096 / 8 + 1;

fuzz_target!(|data: &[u8]| MEMORY.with(|memory| run(memory, data)));

fn run([memory, record, log]: &[TestMemory; 3], data: &[u8]) {
    let mut input = Input(data);
    memory.write(memory.base(), &[0; MEMORY_BYTES as usize]);
    record.write(record.base(), &[0; RECORD_BYTES as usize]);
    let base = memory.base();
    let flags = input.byte();
    let (event_idx, is_packed, is_recorded) = (flags & 1 == 0, flags & 2 != 0, flags & 4 != 0);
    let mut driver = TestRing::new(memory.view(), base, SIZE, event_idx, is_packed);
    let options = DeviceOptions { queues: 1, serial: "fuzz".into(), read_only: false };
    let device = Device::new(&GEOMETRY, &Identity::from_uuid([1; 16]), &options);
    let features = Features::DISCARD | Features::WRITE_ZEROES | Features::FLUSH;
    let engine_config = EngineConfig { limits: *device.limits(), features, write_through: false };
    let bitmap = || log.view().slice(log.base(), LOG_BYTES).expect("all of it");
    // None: there is no such ring or record.
    let start = |driver: &TestRing, number: u32| {
        let config = RingConfig {
            size: SIZE,
            address: driver.address(),
            base: number,
            event_idx,
            indirect: true,
            packed: is_packed,
        };
        let bytes = LAYOUT.record_bytes(is_packed);
        let slice = is_recorded.then(|| record.view().slice(record.base(), bytes).expect("room"));
        let ring = Ring::new(memory.view(), &config, slice).ok()?;
        let mut engine = Engine::new(ring, Rc::clone(memory.view()), engine_config);
        engine.set_enabled(true);
        if flags & 8 != 0 {
            let log = DirtyLog::new(bitmap());
            engine.set_log(Some(log.clone()), Some((log, driver.address().used)));
        }
        Some(engine)
    };
    let mut engine = start(&driver, driver.base_at_start()).expect("a good ring");
    let mut volume = Volume { depth: 1 + usize::from(input.byte() % 64), ..Volume::default() };

    while !input.is_empty() {
        match input.byte() % 10 {
            // A descriptor.
            0 | 1 => {
                let index = u16::from(input.byte());
                let place = input.byte();
                let addr = match place {
                    0xff => u64::MAX - u64::from(input.byte()),
                    0xfe => base + MEMORY_BYTES - u64::from(input.byte()),
                    0xfd => 0,
                    place => base + DATA_AT + u64::from(place) * 64,
                };
                let len = match input.byte() {
                    0xff => u32::MAX - u32::from(input.byte()),
                    len => u32::from(len) * 16 + u32::from(input.byte() & 1),
                };
                let (flags, next) = (u16::from(input.byte() & 7), u16::from(input.byte() % 18));
                match &mut driver {
                    TestRing::Split(driver) => {
                        driver.set_desc(index % SIZE, addr, len, flags, next);
                    }
                    // Where the device looks next, or anywhere.
                    TestRing::Packed(driver) if index & 0x80 == 0 => put(driver, addr, len, flags),
                    TestRing::Packed(driver) => {
                        let flags = flags & 7 | (next & 1) << 7 | (next & 2) << 14;
                        driver.set_desc(index % SIZE, addr, len, next, flags);
                    }
                }
            }
            // A header, or an indirect table, or the ranges of a discard.
            2 | 3 => {
                let at = base + DATA_AT + u64::from(input.byte()) * 64;
                let bytes = input.take(16);
                if at + 16 <= base + MEMORY_BYTES {
                    memory.write(at, bytes);
                }
            }
            4 => {
                let at = base + DATA_AT + u64::from(input.byte()) * 64;
                let (kind, sector) = (u32::from(input.byte() % 16), u64::from(input.byte() % 72));
                let mut header = kind.to_le_bytes().to_vec();
                header.extend([0; 4]);
                header.extend(sector.to_le_bytes());
                memory.write(at, &header);
            }
            5 => {
                let number = u16::from(input.byte() % 17);
                match &mut driver {
                    TestRing::Split(driver) => {
                        driver.push_head(number);
                        driver.publish();
                    }
                    // One that is good, as far as it goes.
                    TestRing::Packed(driver) => {
                        let at = base + DATA_AT + u64::from(number) * 64;
                        put(driver, at, 16, 1);
                        put(driver, at + 64, 512, u16::from(input.byte() & 3));
                        put(driver, at + 640, 1, 2);
                    }
                }
            }
            6 => {
                volume.may_complete = usize::from(input.byte() % 8);
                volume.fails = input.byte() & 3 == 0;
                engine.poll(&mut volume);
                engine.arm();
            }
            // The record is the frontend's to write.
            7 => {
                let at = u64::from(input.byte()) % RECORD_BYTES;
                record.write(record.base() + at, &[input.byte()]);
            }
            // The device dies and another one begins; what was under way happens or not.
            8 => {
                volume.held.clear();
                let number = u32::from(input.byte()) | u32::from(input.byte()) << 15;
                match start(&driver, number) {
                    Some(next) => engine = next,
                    None => return,
                }
            }
            _ => match input.byte() & 3 {
                0 => engine.set_memory(Rc::clone(memory.view()), Some(driver.address())),
                1 => engine.set_memory(Rc::clone(memory.view()), None),
                2 => match &mut driver {
                    TestRing::Split(driver) => driver.publish_index(u16::from(input.byte())),
                    TestRing::Packed(_) => engine.break_down(Broken::Kick),
                },
                _ => engine.set_enabled(input.byte() & 1 == 0),
            },
        }
        assert!(engine.in_flight() <= usize::from(SIZE));
        assert!(engine.in_flight_old() <= engine.in_flight());
    }
    engine.set_enabled(false);
    while engine.in_flight() > 0 {
        let before = (volume.in_flight(), engine.waiting());
        volume.may_complete = usize::MAX;
        engine.poll(&mut volume);
        assert!(engine.in_flight() == 0 || before != (0, 0), "a request is lost");
    }
}

/// Make a descriptor available where the device looks next.
fn put(driver: &mut TestPackedQueue, addr: u64, len: u32, flags: u16) {
    let (index, avail) = driver.next_flags();
    driver.set_desc(index, addr, len, index, flags & 7 | avail);
}
