//! The engines of the emulated devices on rings in memory, in front of a volume that does nothing.

use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{Busy, Channel, Geometry, Identity, Io};
use iobuf::{GuestMemory, GuestRegion};
use nvme::ctrl::Coalescing;
use nvme::spec::{AsciiField, Nqn, NvmOpcode};
use nvme::subsys::{Limits, NamespaceInfo, SubsystemInfo};
use nvme::xfer::Transport;
use nvme_pci::engine::Engine as NvmeEngine;
use nvme_pci::msix::{Interrupts, Vectors};
use nvme_pci::record::{CqRecord, Record, SqRecord};
use nvme_pci::testing::{memfd, transfer};
use virtio_blk::Features;
use virtio_blk::device::{Device, DeviceOptions};
use virtio_blk::engine::{Engine, EngineConfig};
use virtio_blk::queue::ring::Ring;
use virtio_blk::queue::split::RingConfig;
use virtio_blk::testing::{Buffer, TestMemory, TestQueue};

const BLOCKS: u64 = 1 << 20;

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
        for mut io in self.0.drain(..) {
            io.result = Ok(());
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.0.len()
    }
}

/// 4 KiB reads through a split virtqueue, `depth` at a time.
pub(crate) fn virtio(count: u64, depth: u64) {
    const SIZE: u16 = 256;
    let memory = TestMemory::new(4 << 20);
    let base = memory.base();
    let mut driver = TestQueue::new(memory.view(), base, SIZE, true);
    let geometry = Geometry { io_bytes_max: 1 << 20, ..Geometry::new(512, BLOCKS) };
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
    let mut done = 0;
    while done < count {
        let batch = depth.min(count - done);
        for i in 0..batch {
            let at = base + (1 << 20) + i * 0x4000;
            let mut header = [0; 16];
            header[8..].copy_from_slice(&((done + i) % 1000 * 8).to_le_bytes());
            memory.write(at, &header);
            driver
                .add(&[
                    Buffer::readable(at, 16),
                    Buffer::writable(at + 0x1000, 4096),
                    Buffer::writable(at + 0x3000, 1),
                ])
                .expect("room in the ring");
        }
        driver.publish();
        crate::counted(|| while engine.poll(&mut channel).has_worked {});
        for _ in 0..batch {
            driver.pop_used().expect("each request is answered");
        }
        done += batch;
    }
}

const MEMORY: u64 = 4 << 20;
const CQ: u64 = 0x1_0000;
const SQ: u64 = 0x2_0000;
const DATA: u64 = 1 << 20;
const ENTRIES: u16 = 64;

fn subsystem() -> SubsystemInfo {
    let limits = Limits {
        queue_entries_max: 1024,
        mdts_bytes: 1 << 16,
        transport: Transport::Pcie,
        ..Limits::default()
    };
    let text = "a fixed text";
    SubsystemInfo::new(
        Nqn::new("nqn.2024-01.io.penstock:gate").expect(text),
        AsciiField::new("GATE").expect(text),
        AsciiField::new("Penstock").expect(text),
        AsciiField::new("0").expect(text),
        vec![NamespaceInfo::new(1, 512, BLOCKS)],
        limits,
    )
    .expect("a subsystem that can be")
}

/// 4 KiB reads through a pair of NVMe queues, `depth` at a time.
pub(crate) fn nvme(count: u64, depth: u64) {
    let region = GuestRegion::map(memfd(MEMORY).as_fd(), 0, MEMORY, 0, 0).expect("memory");
    let memory = GuestMemory::new(vec![region]).expect("one region");
    let view = memory.view();
    let record = Record::new().expect("files in memory");
    let doorbells = record.view();
    let subsys = Arc::new(subsystem());
    let interrupts = Interrupts::new(Arc::new(Vectors::default()));
    let nothing = Arc::new(subsys.restricted(|_| false));
    let mut engine = NvmeEngine::new(memory.view(), record.view(), nothing, interrupts);
    let open = |_| Some(Box::new(Nothing::default()) as Box<dyn Channel>);
    engine.set_namespaces(Arc::clone(&subsys), open);
    let (entries, is_contiguous) = (ENTRIES, true);
    let cq = CqRecord { address: CQ, entries, is_contiguous, vector: Some(1), tail: 0 };
    let sq = SqRecord { address: SQ, entries, is_contiguous, cqid: 1, fetched: 0 };
    engine.create_cq(1, &cq, Coalescing::default(), false).expect("a queue in memory");
    engine.create_sq(1, &sq, false).expect("a queue in memory");
    let (mut done, mut now) = (0, Duration::ZERO);
    while done < count {
        let batch = depth.min(count - done);
        for i in 0..batch {
            let mut sqe = transfer(NvmOpcode::READ, 1, (done + i) % 1000 * 8, 8, DATA + i * 0x2000);
            sqe.cid.set(i as u16);
            let at = SQ + (done + i) % u64::from(ENTRIES) * 64;
            view.write(at, &sqe.to_bytes()).expect("inside");
        }
        done += batch;
        doorbells.ring(1, false, (done % u64::from(ENTRIES)) as u32);
        crate::counted(|| {
            while {
                now += Duration::from_micros(1);
                engine.poll(now)
            } {}
        });
        // The last completion is there, and the host takes all of them.
        let mut cqe = [0; 16];
        let last = done - 1;
        view.read(CQ + last % u64::from(ENTRIES) * 16, &mut cqe).expect("inside");
        let phase = (last / u64::from(ENTRIES) + 1) & 1;
        assert_eq!(u16::from_le_bytes([cqe[14], cqe[15]]), phase as u16, "a good completion");
        doorbells.ring(1, true, (done % u64::from(ENTRIES)) as u32);
    }
}
