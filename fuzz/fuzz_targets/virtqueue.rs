//! A driver writes anything into its rings and buffers.
//!
//! Invariants checked: no panic; no more requests in flight than the queue has entries; every I/O
//! is inside the volume and no longer than it takes; and all of them come back.
#![no_main]

use std::rc::Rc;

use block::{Busy, Channel, Geometry, Identity, Io, IoError, Op, check};
use libfuzzer_sys::fuzz_target;
use penstock_fuzz::Input;
use virtio_blk::Features;
use virtio_blk::device::{Device, DeviceOptions};
use virtio_blk::engine::{Engine, EngineConfig};
use virtio_blk::queue::ring::Ring;
use virtio_blk::queue::split::RingConfig;
use virtio_blk::testing::{TestMemory, TestQueue};

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
    /// Mapped once, zeroed for each input.
    static MEMORY: TestMemory = TestMemory::new(MEMORY_BYTES);
}

fuzz_target!(|data: &[u8]| MEMORY.with(|memory| run(memory, data)));

fn run(memory: &TestMemory, data: &[u8]) {
    let mut input = Input(data);
    memory.write(memory.base(), &[0; MEMORY_BYTES as usize]);
    let base = memory.base();
    let event_idx = input.byte() & 1 == 0;
    let mut driver = TestQueue::new(memory.view(), base, SIZE, event_idx);
    let options = DeviceOptions { queues: 1, serial: "fuzz".into(), read_only: false };
    let device = Device::new(&GEOMETRY, &Identity::from_uuid([1; 16]), &options);
    let config = RingConfig {
        size: SIZE,
        address: driver.address(),
        base: 0,
        event_idx,
        indirect: true,
        packed: false,
    };
    let ring = Ring::new(memory.view(), &config, None).expect("a good ring");
    let features = Features::DISCARD | Features::WRITE_ZEROES | Features::FLUSH;
    let config = EngineConfig { limits: *device.limits(), features, write_through: false };
    let mut engine = Engine::new(ring, Rc::clone(memory.view()), config);
    engine.set_enabled(true);
    let mut volume = Volume { depth: 1 + usize::from(input.byte() % 64), ..Volume::default() };

    while !input.is_empty() {
        match input.byte() % 8 {
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
                driver.set_desc(index % SIZE, addr, len, flags, next);
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
                driver.push_head(u16::from(input.byte() % 17));
                driver.publish();
            }
            6 => {
                volume.may_complete = usize::from(input.byte() % 8);
                volume.fails = input.byte() & 3 == 0;
                engine.poll(&mut volume);
                engine.arm();
            }
            _ => match input.byte() & 3 {
                0 => engine.set_memory(Rc::clone(memory.view()), Some(driver.address())),
                1 => engine.set_memory(Rc::clone(memory.view()), None),
                2 => driver.publish_index(u16::from(input.byte())),
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
