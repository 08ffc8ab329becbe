//! What a request costs the device: ring, parsing and completion, without a socket or a sleep.
//!
//! ```text
//! cargo bench -p virtio-blk --features testing
//! ```
//!
//! The driver's half of the ring runs on the same thread between the measured turns. Printed is
//! the best and the median of many batches, per request: the best is what the code costs, the
//! distance between the two is the noise of the machine.

use std::rc::Rc;
use std::time::Instant;

use block::{Busy, Channel, Geometry, Identity, Io};
use virtio_blk::Features;
use virtio_blk::device::{Device, DeviceOptions};
use virtio_blk::engine::{Engine, EngineConfig};
use virtio_blk::queue::ring::Ring;
use virtio_blk::queue::split::RingConfig;
use virtio_blk::testing::{Buffer, TestMemory, TestQueue};

/// Completes everything at the next poll and moves no data.
#[derive(Default)]
#[expect(clippy::vec_box, reason = "the boxes move")]
struct Nothing(Vec<Box<Io>>);

impl Channel for Nothing {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        self.0.push(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        self.0.drain(..).for_each(done);
    }

    fn in_flight(&self) -> usize {
        self.0.len()
    }
}

fn main() {
    println!("nanoseconds per request, best / median");
    for indirect in [false, true] {
        for depth in [1usize, 32, 128] {
            let (best, median) = measure(indirect, depth);
            let layout = if indirect { "indirect" } else { "direct" };
            println!("{layout:9} depth {depth:3}: {best:6.1} / {median:6.1}");
        }
    }
}

fn measure(indirect: bool, depth: usize) -> (f64, f64) {
    const SIZE: u16 = 512;
    let memory = TestMemory::new(16 << 20);
    let base = memory.base();
    let mut driver = TestQueue::new(memory.view(), base, SIZE, true);
    let geometry = Geometry {
        physical_block_bytes: 4096,
        io_bytes_max: 1 << 20,
        read_only: false,
        write_cache: true,
        deallocate: true,
        write_zeroes: true,
        deallocate_granularity_bytes: 4096,
        deallocated_reads_zero: true,
        ..Geometry::new(512, 1 << 20)
    };
    let options = DeviceOptions { queues: 1, serial: String::new(), read_only: false };
    let device = Device::new(&geometry, &Identity::from_uuid([1; 16]), &options);
    let config = RingConfig {
        size: SIZE,
        address: driver.address(),
        base: 0,
        event_idx: true,
        indirect: true,
        packed: false,
    };
    let ring = Ring::new(memory.view(), &config, None).expect("a good ring");
    let features = Features::EVENT_IDX | Features::INDIRECT_DESC;
    let config = EngineConfig { limits: *device.limits(), features, write_through: false };
    let mut engine = Engine::new(ring, Rc::clone(memory.view()), config);
    engine.set_enabled(true);
    let mut channel = Nothing::default();

    let mut best = f64::MAX;
    let mut all = Vec::new();
    for round in 0..(400_000 / depth) {
        for i in 0..depth as u64 {
            let at = base + (1 << 20) + i * 0x4000;
            let mut header = [0; 16];
            header[8..].copy_from_slice(&(round as u64 % 1000 * 8).to_le_bytes());
            memory.write(at, &header);
            let buffers = [
                Buffer::readable(at, 16),
                Buffer::writable(at + 0x1000, 4096),
                Buffer::writable(at + 0x3000, 1),
            ];
            let added = match indirect {
                true => driver.add_indirect(memory.view(), at + 0x3800, &buffers),
                false => driver.add(&buffers),
            };
            added.expect("room in the ring");
        }
        driver.publish();
        let begun = Instant::now();
        engine.poll(&mut channel);
        let ns = begun.elapsed().as_nanos() as f64 / depth as f64;
        best = best.min(ns);
        all.push(ns);
        while driver.pop_used().is_some() {}
    }
    all.sort_by(f64::total_cmp);
    (best, all[all.len() / 2])
}
