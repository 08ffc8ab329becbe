//! A guest writes anything into its NVMe queues, doorbells and lists, and its memory comes and goes.
//!
//! Invariants checked: no panic; no more commands in flight than the queue has entries; every I/O is
//! inside the volume, no longer than it takes, and all of them come back; and a successor takes up
//! the record of any moment.
#![no_main]

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{Busy, Channel, CopyLimits, Geometry, Io, IoError, check};
use iobuf::{GuestMemory, GuestRegion, Pool};
use libfuzzer_sys::fuzz_target;
use nvme::ctrl::Coalescing;
use nvme::spec::{AsciiField, Nqn, SglDescriptor, Sqe};
use nvme::subsys::{Limits, NamespaceInfo, SubsystemInfo};
use nvme::xfer::Transport;
use nvme_pci::engine::Engine;
use nvme_pci::msix::{Interrupts, Vectors};
use nvme_pci::record::{CqRecord, Record, SqRecord};
use nvme_pci::testing::memfd;
use penstock_fuzz::Input;
use zerocopy::IntoBytes as _;

const ENTRIES: u16 = 8;
const MEMORY_BYTES: u64 = 1 << 20;
const CQ_AT: u64 = 0x1000;
const SQ_AT: u64 = 0x2000;

const GEOMETRY: Geometry = Geometry {
    io_bytes_max: 16384,
    write_cache: true,
    deallocate: true,
    write_zeroes: true,
    compare: true,
    compare_and_write: true,
    verify: true,
    copy: CopyLimits { ranges_max: 128, range_bytes_max: 4 << 20, bytes_max: 32 << 20 },
    rescap: 0x7f,
    ..Geometry::new(512, 256)
};

#[derive(Default)]
struct Volume {
    held: Vec<Box<Io>>,
    depth: usize,
    may_complete: usize,
    fails: bool,
}

struct Opened(Rc<RefCell<Volume>>);

impl Channel for Opened {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        let mut volume = self.0.borrow_mut();
        if volume.held.len() >= volume.depth {
            return Err(Busy(io));
        }
        assert_eq!(check(&GEOMETRY, &io), Ok(()), "the device lets a bad I/O through: {io:?}");
        volume.held.push(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        let mut volume = self.0.borrow_mut();
        for _ in 0..volume.may_complete.min(volume.held.len()) {
            let Some(mut io) = volume.held.pop() else { break };
            io.result = if volume.fails { Err(IoError::Medium) } else { Ok(()) };
            if matches!(io.op, block::Op::Read | block::Op::ReservationReport) {
                io.data.fill(0, io.data.len(), 0x11).expect("inside");
            }
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.0.borrow().held.len()
    }
}

fn subsys() -> SubsystemInfo {
    let limits = Limits {
        queue_entries_max: 1024,
        mdts_bytes: 16384,
        transport: Transport::Pcie,
        ..Limits::default()
    };
    let ns = NamespaceInfo {
        deallocate: true,
        write_zeroes: true,
        write_cache: true,
        reservations: true,
        ptpl: true,
        ..NamespaceInfo::new(1, 512, 256)
    };
    let text = "a fixed text";
    SubsystemInfo::new(
        Nqn::new("nqn.2024-01.io.penstock:fuzz").expect(text),
        AsciiField::new("FUZZ").expect(text),
        AsciiField::new("Penstock").expect(text),
        AsciiField::new("0").expect(text),
        vec![ns],
        limits,
    )
    .expect("a subsystem that can be")
}

struct World {
    memory: GuestMemory,
    subsys: Arc<SubsystemInfo>,
    /// For what the guest does not want of a read.
    pool: Pool,
}

thread_local! {
    /// Mapped once, zeroed for each input.
    static WORLD: World = {
        let region = GuestRegion::map(memfd(MEMORY_BYTES).as_fd(), 0, MEMORY_BYTES, 0, 0);
        let memory = GuestMemory::new(vec![region.expect("memory")]).expect("one region");
        World { memory, subsys: Arc::new(subsys()), pool: Pool::new(1 << 20).expect("memory") }
    };
}

fuzz_target!(|data: &[u8]| WORLD.with(|world| run(world, data)));

fn engine(world: &World, record: &Record, volume: &Rc<RefCell<Volume>>) -> Engine {
    let interrupts = Interrupts::new(Arc::new(Vectors::default()));
    let nothing = Arc::new(world.subsys.restricted(|_| false));
    let mut engine = Engine::new(world.memory.view(), record.view(), nothing, interrupts);
    let open = |_| Some(Box::new(Opened(Rc::clone(volume))) as Box<dyn Channel>);
    engine.set_namespaces(Arc::clone(&world.subsys), open);
    engine.set_pool(world.pool.clone());
    engine
}

fn create(engine: &mut Engine, kind: u8) {
    let cq = CqRecord {
        address: CQ_AT,
        entries: if kind & 1 == 0 { ENTRIES } else { 2 },
        is_contiguous: kind & 2 == 0,
        vector: Some(1),
        tail: 0,
    };
    let sq = SqRecord {
        address: SQ_AT,
        entries: ENTRIES,
        is_contiguous: kind & 4 == 0,
        cqid: 1,
        fetched: 0,
    };
    // Pages of a list may be wrong: then there is no queue.
    if engine.create_cq(1, &cq, Coalescing::default(), false).is_ok() {
        let _ = engine.create_sq(1, &sq, false);
    }
}

fn address(input: &mut Input<'_>) -> u64 {
    let (kind, low) = (input.byte(), u64::from(input.byte()));
    match kind {
        0xff => u64::MAX - low,
        0xfe => MEMORY_BYTES - low * 64,
        0xf0..0xfe => u64::from(kind & 0xf) * 4096 + low,
        _ => u64::from(kind) * 4096,
    }
}

fn descriptor(input: &mut Input<'_>) -> SglDescriptor {
    let kinds = [
        SglDescriptor::DATA_BLOCK,
        SglDescriptor::BIT_BUCKET,
        SglDescriptor::SEGMENT,
        SglDescriptor::LAST_SEGMENT,
    ];
    let kind = input.byte();
    let mut descriptor = SglDescriptor {
        identifier: kinds.get(usize::from(kind % 16)).copied().unwrap_or(kind),
        ..SglDescriptor::default()
    };
    descriptor.address.set(address(input));
    descriptor.length.set(u32::from(input.byte()) * 16);
    descriptor
}

fn run(world: &World, data: &[u8]) {
    let mut input = Input(data);
    let view = world.memory.view();
    view.write(0, &[0; MEMORY_BYTES as usize]).expect("all of it");
    let record = Record::new().expect("files in memory");
    let doorbells = record.view();
    let volume = Volume { depth: 1 + usize::from(input.byte() % 16), ..Volume::default() };
    let volume = Rc::new(RefCell::new(volume));
    let mut engine = engine(world, &record, &volume);
    create(&mut engine, input.byte());
    let mut now = Duration::ZERO;

    while !input.is_empty() {
        match input.byte() % 10 {
            0 => {
                let index = u64::from(input.byte() % ENTRIES as u8);
                let mut bytes = [0; 64];
                let raw = input.take(64);
                bytes[..raw.len()].copy_from_slice(raw);
                let _ = view.write(SQ_AT + index * 64, &bytes);
            }
            1 | 2 => {
                let index = u64::from(input.byte() % ENTRIES as u8);
                let opcodes = [0, 1, 2, 5, 8, 9, 12, 13, 14, 17, 21, 25];
                let opcode = opcodes[usize::from(input.byte()) % opcodes.len()];
                let mut sqe = Sqe { opcode, ..Sqe::default() };
                sqe.nsid.set(1);
                sqe.cid.set(u16::from(input.byte()));
                sqe.cdw10.set(u32::from(input.byte()));
                sqe.cdw12.set(u32::from(input.byte()));
                let (prp1, prp2) = (address(&mut input), address(&mut input));
                sqe.set_prps(prp1, prp2);
                sqe.flags = input.byte() & 0xc3;
                if sqe.flags & 0xc0 == 0x40 {
                    sqe.dptr = descriptor(&mut input);
                }
                let _ = view.write(SQ_AT + index * 64, &sqe.to_bytes());
            }
            3 => doorbells.ring(1, false, u32::from(input.byte() % 10)),
            4 => doorbells.ring(1, true, u32::from(input.byte() % 10)),
            // Entries of a list, or descriptors of a segment.
            5 => {
                let at = address(&mut input);
                let (kind, count) = (input.byte(), u64::from(input.byte() % 16));
                for entry in 0..count {
                    let _ = if kind & 1 == 0 {
                        let value = address(&mut input);
                        view.write(at.wrapping_add(entry * 8), &value.to_le_bytes())
                    } else {
                        let value = descriptor(&mut input);
                        view.write(at.wrapping_add(entry * 16), value.as_bytes())
                    };
                }
            }
            6 | 7 => {
                {
                    let mut volume = volume.borrow_mut();
                    volume.may_complete = usize::from(input.byte() % 8);
                    volume.fails = input.byte() & 3 == 0;
                }
                now += Duration::from_micros(1);
                engine.poll(now);
                let _ = engine.arm();
                engine.disarm();
                while engine.notice().is_some() {}
            }
            8 => match input.byte() & 3 {
                0 => engine.set_memory(GuestMemory::default().view()),
                1 => engine.set_memory(world.memory.view()),
                2 => {
                    let (shadow, event_idx) = (address(&mut input), address(&mut input));
                    doorbells.set_shadow(Some((shadow, event_idx)));
                    engine.set_shadow(Some((shadow, event_idx)));
                }
                _ => engine.abort(),
            },
            // The process goes, and a successor comes.
            _ => {
                volume.borrow_mut().held.clear();
                engine = self::engine(world, &record, &volume);
                let (cq, sq) = (doorbells.cq(1), doorbells.sq(1));
                let is_there = cq.is_some_and(|cq| {
                    engine.create_cq(1, &cq, Coalescing::default(), true).is_ok()
                });
                if let (true, Some(sq)) = (is_there, sq) {
                    let _ = engine.create_sq(1, &sq, true);
                }
            }
        }
        assert!(engine.in_flight() <= usize::from(ENTRIES));
        assert!(engine.at_volume() <= usize::from(ENTRIES));
    }
    engine.set_running(false);
    volume.borrow_mut().may_complete = usize::MAX;
    volume.borrow_mut().depth = 1024;
    for _ in 0..300 {
        engine.poll(now);
    }
    assert_eq!(engine.at_volume(), 0, "every I/O comes back");
    assert_eq!(engine.in_flight_old(), 0);
    assert_eq!(world.pool.available(), world.pool.capacity(), "all memory comes back");
}
