use std::cell::RefCell;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use iobuf::{GuestMemory, GuestRegion};
use nvme::spec::{AsciiField, NvmOpcode, SglDescriptor};
use nvme::subsys::{Limits, NamespaceInfo};
use nvme::xfer::Transport;
use proptest::prelude::*;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::*;
use crate::msix::Vectors;
use crate::record::{Record, crash};
use crate::testing::{allocations, memfd};

mod fused;

const BLOCKS: u64 = 256;
const BYTES: usize = 512 * BLOCKS as usize;
const MEMORY: u64 = 4 << 20;
/// Queues and lists are below, data is above.
const DATA: u64 = 1 << 20;
const CQ: u64 = 0x1_0000;
const SQ: u64 = 0x2_0000;

/// What is on the disk, and what is in flight. Outlives the process that uses it.
#[derive(Default)]
struct Disk {
    bytes: Vec<u8>,
    #[expect(clippy::vec_box, reason = "the boxes move between here and the engine")]
    held: Vec<Box<Io>>,
    /// I/Os that may come back; `None`: all.
    allowed: Option<usize>,
    newest_first: bool,
    /// Given back by an abort.
    #[expect(clippy::vec_box, reason = "the boxes move between here and the engine")]
    aborted: Vec<Box<Io>>,
    depth: usize,
    fail: Option<IoError>,
    polls: usize,
}

struct TestChannel(Rc<RefCell<Disk>>);

impl Channel for TestChannel {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        let mut disk = self.0.borrow_mut();
        if disk.held.len() >= disk.depth {
            return Err(Busy(io));
        }
        disk.held.push(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        let mut disk = self.0.borrow_mut();
        disk.polls += 1;
        for mut io in std::mem::take(&mut disk.aborted) {
            io.result = Err(IoError::Aborted);
            done(io);
        }
        let count = disk.allowed.unwrap_or(usize::MAX).min(disk.held.len());
        for _ in 0..count {
            let at = if disk.newest_first { disk.held.len() - 1 } else { 0 };
            let mut io = disk.held.remove(at);
            disk.run(&mut io);
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        let disk = self.0.borrow();
        disk.held.len() + disk.aborted.len()
    }

    /// All but the first can be: that one is under way.
    fn abort(&mut self) {
        let disk = &mut *self.0.borrow_mut();
        let from = disk.held.len().min(1);
        disk.aborted.extend(disk.held.drain(from..));
    }
}

impl Disk {
    fn run(&mut self, io: &mut Io) {
        io.result = self.fail.map_or(Ok(()), Err);
        if self.fail.is_some() {
            return;
        }
        let range = io.offset as usize..(io.offset + io.len) as usize;
        match io.op {
            Op::Read => io.data.copy_from_slice(0, &self.bytes[range]).unwrap(),
            Op::Write => io.data.copy_to_slice(0, &mut self.bytes[range]).unwrap(),
            Op::WriteZeroes | Op::Deallocate => self.bytes[range].fill(0),
            Op::Compare => {
                let mut other = vec![0; io.len as usize];
                io.data.copy_to_slice(0, &mut other).unwrap();
                if self.bytes[range] != other {
                    io.result = Err(IoError::CompareFailed);
                }
            }
            Op::CompareAndWrite => {
                let len = io.len as usize;
                let mut data = vec![0; 2 * len];
                io.data.copy_to_slice(0, &mut data).unwrap();
                if self.bytes[range.clone()] == data[..len] {
                    self.bytes[range].copy_from_slice(&data[len..]);
                } else {
                    io.result = Err(IoError::CompareFailed);
                }
            }
            Op::Copy => {
                let mut at = io.offset as usize;
                for source in &io.sources {
                    let from = source.offset as usize..(source.offset + source.len) as usize;
                    self.bytes.copy_within(from, at);
                    at += source.len as usize;
                }
            }
            _ => {}
        }
    }
}

fn subsys() -> SubsystemInfo {
    let limits = Limits {
        queue_entries_max: 1024,
        mdts_bytes: 1 << 16,
        transport: Transport::Pcie,
        ..Limits::default()
    };
    let ns = NamespaceInfo {
        deallocate: true,
        write_zeroes: true,
        write_cache: true,
        ..NamespaceInfo::new(1, 512, BLOCKS)
    };
    SubsystemInfo::new(
        nvme::spec::Nqn::new("nqn.2024-01.io.penstock:test").unwrap(),
        AsciiField::new("SER").unwrap(),
        AsciiField::new("Penstock").unwrap(),
        AsciiField::new("0").unwrap(),
        vec![ns],
        limits,
    )
    .unwrap()
}

/// A guest with a device. The guest's side of a queue is as simple as it can be.
struct Rig {
    disk: Rc<RefCell<Disk>>,
    memory: GuestMemory,
    record: Record,
    engine: Engine,
    entries: u16,
    tail: u32,
    head: u64,
    now: Duration,
}

fn region(size: u64, at: u64) -> Arc<GuestRegion> {
    GuestRegion::map(memfd(size).as_fd(), 0, size, at, 0).unwrap()
}

fn engine(memory: &GuestMemory, record: &Record, disk: &Rc<RefCell<Disk>>) -> Engine {
    let interrupts = Interrupts::new(Arc::new(Vectors::default()));
    let nothing = Arc::new(subsys().restricted(|_| false));
    let mut engine = Engine::new(memory.view(), record.view(), nothing, interrupts);
    engine.set_namespaces(Arc::new(subsys()), |_| Some(Box::new(TestChannel(Rc::clone(disk)))));
    engine
}

fn cq_record(entries: u16) -> CqRecord {
    CqRecord { address: CQ, entries, is_contiguous: true, vector: Some(1), tail: 0 }
}

fn sq_record(entries: u16) -> SqRecord {
    SqRecord { address: SQ, entries, is_contiguous: true, cqid: 1, fetched: 0 }
}

impl Rig {
    fn new(entries: u16) -> Rig {
        let memory = GuestMemory::new(vec![region(MEMORY, 0)]).unwrap();
        let record = Record::new().unwrap();
        let disk = Disk {
            bytes: (0..BYTES).map(|i| (i / 512) as u8).collect(),
            depth: 1024,
            ..Disk::default()
        };
        let disk = Rc::new(RefCell::new(disk));
        let mut engine = engine(&memory, &record, &disk);
        engine.create_cq(1, &cq_record(entries), Coalescing::default(), false).unwrap();
        engine.create_sq(1, &sq_record(entries), false).unwrap();
        let now = Duration::ZERO;
        Rig { disk, memory, record, engine, entries, tail: 0, head: 0, now }
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.view().write(addr, bytes).unwrap();
    }

    fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.view().read(addr, &mut bytes).unwrap();
        bytes
    }

    fn push(&mut self, cid: u16, sqe: &Sqe) {
        let mut sqe = *sqe;
        sqe.cid.set(cid);
        self.write(SQ + u64::from(self.tail) * 64, &sqe.to_bytes());
        self.tail = (self.tail + 1) % u32::from(self.entries);
    }

    fn ring(&self) {
        self.record.view().ring(1, false, self.tail);
    }

    fn turn(&mut self) -> bool {
        self.now += Duration::from_micros(1);
        self.engine.poll(self.now)
    }

    fn settle(&mut self) {
        while self.turn() {}
    }

    /// Completions that are there, in order, and their place.
    fn pop(&mut self) -> Option<Cqe> {
        let entries = u64::from(self.entries);
        let bytes = self.read(CQ + self.head % entries * 16, 16);
        let cqe = Cqe::from_bytes(bytes[..].try_into().unwrap());
        let phase = (self.head / entries + 1) & 1;
        if u64::from(cqe.status_raw.get() & 1) != phase {
            return None;
        }
        self.head += 1;
        self.record.view().ring(1, true, (self.head % entries) as u32);
        Some(cqe)
    }

    fn run(&mut self, sqe: &Sqe) -> Status {
        self.push(7, sqe);
        self.ring();
        self.settle();
        let cqe = self.pop().expect("a completion");
        assert_eq!((cqe.cid.get(), cqe.sqid.get()), (7, 1));
        assert_eq!(u32::from(cqe.sqhd.get()), self.tail);
        assert_eq!(self.pop(), None);
        cqe.status()
    }
}

fn command(opcode: NvmOpcode, slba: u64, blocks: u32, prp1: u64, prp2: u64) -> Sqe {
    let mut sqe = Sqe { opcode: opcode.0, nsid: U32::new(1), ..Sqe::default() };
    sqe.cdw10.set(slba as u32);
    sqe.cdw11.set((slba >> 32) as u32);
    sqe.cdw12.set(blocks.wrapping_sub(1) & 0xffff);
    sqe.set_prps(prp1, prp2);
    sqe
}

/// It may have connections to set up and to keep.
#[test]
fn a_channel_is_polled_without_any_command() {
    let mut rig = Rig::new(8);
    for polls in 1..3 {
        rig.turn();
        assert_eq!(rig.disk.borrow().polls, polls);
    }
    // Nor does a guest that has stopped the controller stop it.
    rig.engine.set_running(false);
    rig.turn();
    assert_eq!(rig.disk.borrow().polls, 3);
}

#[test]
fn data_goes_where_the_pointers_say() {
    let mut rig = Rig::new(4);
    for lap in 0..9u64 {
        assert_eq!(rig.run(&command(NvmOpcode::READ, lap, 1, DATA, 0)), Status::SUCCESS);
        assert_eq!(rig.read(DATA, 512), vec![lap as u8; 512]);
    }
    // Two pages from the middle of the first, then a list.
    let prp1 = DATA + 0xe00;
    assert_eq!(rig.run(&command(NvmOpcode::READ, 10, 3, prp1, DATA + 0x5000)), Status::SUCCESS);
    assert_eq!(rig.read(prp1, 512), vec![10; 512]);
    assert_eq!(rig.read(DATA + 0x5000, 1024), [vec![11; 512], vec![12; 512]].concat());
    for page in 0..4u64 {
        rig.write(0x3000 + page * 8, &(DATA + 0x10000 + page * 0x2000).to_le_bytes());
    }
    let write: Vec<u8> = (0..4096u32).map(|i| i as u8).collect();
    rig.write(DATA + 0x12000, &write);
    assert_eq!(rig.run(&command(NvmOpcode::WRITE, 32, 32, DATA, 0x3000)), Status::SUCCESS);
    let disk = rig.disk.borrow();
    assert_eq!(disk.bytes[512 * 48..512 * 56], write, "the third page");
}

#[test]
fn every_kind_of_command() {
    let mut rig = Rig::new(8);
    rig.write(DATA, &[9; 1024]);
    assert_eq!(rig.run(&command(NvmOpcode::WRITE, 4, 2, DATA, 0)), Status::SUCCESS);
    assert_eq!(rig.run(&command(NvmOpcode::COMPARE, 4, 2, DATA, 0)), Status::SUCCESS);
    let differs = rig.run(&command(NvmOpcode::COMPARE, 5, 2, DATA, 0));
    assert_eq!(differs, Status::COMPARE_FAILURE.dnr());
    assert_eq!(rig.run(&command(NvmOpcode::VERIFY, 0, 200, 0, 0)), Status::SUCCESS);
    assert_eq!(rig.run(&command(NvmOpcode::WRITE_ZEROES, 4, 1, 0, 0)), Status::SUCCESS);
    assert_eq!(rig.disk.borrow().bytes[4 * 512..6 * 512], [vec![0; 512], vec![9; 512]].concat());
    let mut flush = command(NvmOpcode::FLUSH, 0, 1, 0, 0);
    assert_eq!(rig.run(&flush), Status::SUCCESS);
    flush.nsid.set(NSID_ALL);
    assert_eq!(rig.run(&flush), Status::SUCCESS);
    // Deallocate: two ranges and one of no blocks.
    for (at, (nlb, slba)) in [(2u32, 20u64), (0, 3), (1, 30)].into_iter().enumerate() {
        let at = DATA + 16 * at as u64;
        rig.write(at + 4, &nlb.to_le_bytes());
        rig.write(at + 8, &slba.to_le_bytes());
    }
    let mut trim = command(NvmOpcode::DATASET_MANAGEMENT, 2, 1, DATA, 0);
    trim.cdw11.set(4);
    trim.cdw12.set(0);
    assert_eq!(rig.run(&trim), Status::SUCCESS);
    let is_zero = |block: usize| rig.disk.borrow().bytes[block * 512] == 0;
    assert_eq!([19, 20, 21, 22, 30].map(is_zero), [false, true, true, false, true]);
    // Copy of one range.
    rig.write(DATA, &[0; 32]);
    rig.write(DATA + 8, &40u64.to_le_bytes());
    rig.write(DATA + 16, &1u16.to_le_bytes());
    let mut copy = command(NvmOpcode::COPY, 100, 1, DATA, 0);
    copy.cdw12.set(0);
    assert_eq!(rig.run(&copy), Status::SUCCESS);
    assert_eq!(
        rig.disk.borrow().bytes[100 * 512..102 * 512],
        [vec![40; 512], vec![41; 512]].concat()
    );
    assert_eq!(rig.engine.counters().errors, 1);
    assert_eq!(rig.engine.in_flight(), 0);
}

#[test]
fn what_is_no_memory_is_a_transfer_error() {
    let mut rig = Rig::new(8);
    let offset = Status::PRP_OFFSET_INVALID.dnr();
    for (prp1, prp2, blocks, want) in [
        (MEMORY, 0, 1, TRANSFER),
        (MEMORY - 512, 0, 1, Status::SUCCESS),
        (MEMORY - 512, MEMORY, 2, TRANSFER),
        (!0xfff, 0, 1, TRANSFER),
        (!3, 0, 1, TRANSFER),
        (DATA + 2, 0, 1, offset),
        (DATA, DATA + 8, 9, offset),
        (DATA, MEMORY, 32, TRANSFER),
        (DATA, MEMORY - 8, 32, offset),
    ] {
        rig.write(MEMORY - 8, &(DATA + 4).to_le_bytes());
        let status = rig.run(&command(NvmOpcode::READ, 0, blocks, prp1, prp2));
        assert_eq!(status, want, "{prp1:x} {prp2:x} {blocks}");
    }
    assert_eq!(rig.engine.at_volume(), 0);
    let beyond = rig.run(&command(NvmOpcode::READ, BLOCKS, 1, DATA, 0));
    assert_eq!(beyond, Status::LBA_OUT_OF_RANGE.dnr());
    rig.disk.borrow_mut().fail = Some(IoError::Medium);
    let failed = rig.run(&command(NvmOpcode::READ, 3, 1, DATA, 0));
    assert_eq!(failed, Status::UNRECOVERED_READ_ERROR.dnr());
    let notice = rig.engine.notice().expect("for the error log");
    assert!(matches!(notice, Notice::Failed(Failure { sqid: 1, cid: 7, offset: 1536, .. })));
}

#[test]
fn a_full_completion_queue_waits_for_its_host() {
    let mut rig = Rig::new(16);
    // Eleven commands, of which seven complete into a queue of eight.
    rig.engine.close_sq(1);
    assert!(rig.engine.remove_sq(1));
    rig.engine.remove_cq(1);
    rig.engine.create_cq(1, &cq_record(8), Coalescing::default(), false).unwrap();
    rig.engine.create_sq(1, &sq_record(16), false).unwrap();
    for cid in 0..11 {
        rig.push(cid, &command(NvmOpcode::READ, 0, 1, DATA, 0));
    }
    rig.ring();
    rig.settle();
    assert_eq!(rig.engine.in_flight(), 4);
    assert!(!rig.engine.has_work());
    let view = rig.record.view();
    // A head that is not there, and one beyond what was posted.
    for bad in [8, u32::MAX] {
        view.ring(1, true, bad);
        assert!(!rig.turn());
        assert_eq!(rig.engine.notice(), Some(Notice::BadDoorbell));
        assert!(!rig.turn());
        assert_eq!(rig.engine.notice(), None, "told once");
    }
    view.ring(1, true, 3);
    assert!(rig.engine.has_work());
    rig.settle();
    assert_eq!(rig.engine.in_flight(), 1);
    view.ring(1, true, 2);
    rig.settle();
    assert_eq!(rig.engine.in_flight(), 0);
}

#[test]
fn a_tail_that_is_not_there_is_told_once() {
    let mut rig = Rig::new(8);
    for bad in [8, 9, u32::MAX] {
        rig.record.view().ring(1, false, bad);
        assert!(!rig.turn());
        assert_eq!(rig.engine.notice(), Some(Notice::BadDoorbell), "{bad}");
        assert!(!rig.turn() && !rig.engine.has_work());
        assert_eq!(rig.engine.notice(), None);
    }
    assert_eq!(rig.run(&command(NvmOpcode::READ, 0, 1, DATA, 0)), Status::SUCCESS);
}

#[test]
fn queues_of_two_entries_and_queues_in_pieces() {
    let mut rig = Rig::new(2);
    for lap in 0..5 {
        let status = rig.run(&command(NvmOpcode::READ, lap, 1, DATA, 0));
        assert_eq!(status, Status::SUCCESS);
    }
    // 128 entries in two pages, in the wrong order.
    rig.engine.close_sq(1);
    assert!(rig.engine.remove_sq(1));
    for (at, page) in [(0, 0x51000u64), (8, 0x50000)] {
        rig.write(0x3000 + at, &page.to_le_bytes());
    }
    let sq = SqRecord { address: 0x3000, is_contiguous: false, ..sq_record(128) };
    rig.engine.create_sq(2, &sq, false).unwrap();
    let mut sqe = command(NvmOpcode::READ, 200, 1, DATA, 0);
    for index in 0..127u64 {
        sqe.cdw10.set(index as u32);
        let page = if index < 64 { 0x51000 } else { 0x50000 };
        rig.write(page + index % 64 * 64, &sqe.to_bytes());
        rig.record.view().ring(2, false, index as u32 + 1);
        rig.settle();
        let cqe = rig.pop().expect("a completion");
        assert_eq!((cqe.status(), cqe.sqid.get()), (Status::SUCCESS, 2));
        assert_eq!(rig.read(DATA, 1), [index as u8]);
    }
    let missing = SqRecord { address: MEMORY, ..sq_record(8) };
    assert_eq!(rig.engine.create_sq(3, &missing, false), Err(Refused(TRANSFER)));
    let orphan = SqRecord { cqid: 9, ..sq_record(8) };
    let refused = Refused(Status::COMPLETION_QUEUE_INVALID.dnr());
    assert_eq!(rig.engine.create_sq(3, &orphan, false), Err(refused));
}

#[test]
fn shadow_doorbells_replace_the_others_and_ask_for_a_ring_when_idle() {
    let (shadow, event_idx) = (0x8000, 0x9000);
    let mut rig = Rig::new(8);
    rig.run(&command(NvmOpcode::READ, 0, 1, DATA, 0));
    assert!(!rig.engine.set_shadow(Some((MEMORY, event_idx))));
    rig.record.view().set_shadow(Some((shadow, event_idx)));
    assert!(rig.engine.set_shadow(Some((shadow, event_idx))));
    let word = |rig: &Rig, at| u32::from_le_bytes(rig.read(at, 4)[..].try_into().unwrap());
    assert_eq!(word(&rig, shadow + 8), 1, "where the other doorbell was");
    // Linux: an event if the index is in [old, new).
    let needs_event = |index: u32, new: u16, old: u16| {
        new.wrapping_sub(index as u16).wrapping_sub(1) < new.wrapping_sub(old)
    };
    assert!(!needs_event(word(&rig, event_idx + 8), 2, 1), "busy");
    assert!(!rig.engine.arm());
    assert!(needs_event(word(&rig, event_idx + 8), 2, 1), "idle");
    rig.push(3, &command(NvmOpcode::READ, 1, 1, DATA, 0));
    rig.write(shadow + 8, &2u32.to_le_bytes());
    assert!(rig.engine.arm(), "there is work: it must not sleep");
    rig.engine.disarm();
    assert!(!needs_event(word(&rig, event_idx + 8), 2, 1));
    rig.settle();
    assert_eq!(rig.pop().unwrap().cid.get(), 3);

    // Their memory goes, that of the queues stays: the other doorbells are old news.
    let without = GuestMemory::new(vec![region(0x8000, 0), region(MEMORY - CQ, CQ)]).unwrap();
    rig.engine.set_memory(without.view());
    assert!(!rig.turn() && !rig.engine.has_work());
    rig.engine.set_memory(rig.memory.view());
    rig.push(4, &command(NvmOpcode::READ, 1, 1, DATA, 0));
    rig.write(shadow + 8, &3u32.to_le_bytes());
    rig.settle();
    assert_eq!(rig.pop().unwrap().cid.get(), 4);
}

#[test]
fn a_host_never_rings_while_the_device_is_awake() {
    let (shadow, event_idx) = (0x8000, 0x9000);
    for (entries, batch) in [(2u16, 1u32), (8, 5), (64, 40), (64, 1)] {
        let mut rig = Rig::new(entries);
        rig.record.view().set_shadow(Some((shadow, event_idx)));
        assert!(rig.engine.set_shadow(Some((shadow, event_idx))));
        let word = |rig: &Rig, at| u32::from_le_bytes(rig.read(at, 4)[..].try_into().unwrap());
        // As Linux does it: in 16 bits.
        let ring = |rig: &Rig, is_cq: u64, value: u32| {
            let old = word(rig, shadow + 8 + is_cq) as u16;
            rig.write(shadow + 8 + is_cq, &value.to_le_bytes());
            let (index, new) = (word(rig, event_idx + 8 + is_cq) as u16, value as u16);
            let is_wanted = new.wrapping_sub(index).wrapping_sub(1) < new.wrapping_sub(old);
            assert!(!is_wanted, "{entries} entries: from {old} to {new}, index {index}");
        };
        let mut taken = 0;
        for _ in 0..200 {
            for cid in 0..batch {
                rig.push(cid as u16, &command(NvmOpcode::READ, 0, 1, DATA, 0));
            }
            ring(&rig, 0, rig.tail);
            rig.settle();
            while rig.pop().is_some() {
                taken += 1;
            }
            ring(&rig, 4, (rig.head % u64::from(entries)) as u32);
        }
        assert_eq!(taken, 200 * batch);
    }
}

#[test]
fn memory_that_goes_is_held_until_its_io_is_back() {
    let mut rig = Rig::new(8);
    rig.disk.borrow_mut().allowed = Some(0);
    rig.push(1, &command(NvmOpcode::READ, 5, 1, DATA, 0));
    rig.ring();
    rig.turn();
    assert_eq!(rig.engine.at_volume(), 1);
    rig.engine.set_memory(GuestMemory::default().view());
    assert_eq!(rig.engine.in_flight_old(), 1);
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!(rig.engine.in_flight_old(), 0);
    assert_eq!(rig.read(DATA, 1), [5], "it went where it was asked to");
    assert_eq!(rig.pop(), None, "its queue is not there");
    rig.engine.set_memory(rig.memory.view());
    rig.settle();
    assert_eq!(rig.pop().unwrap().cid.get(), 1);
}

#[test]
fn a_reset_drops_what_is_in_flight() {
    let mut rig = Rig::new(8);
    rig.disk.borrow_mut().allowed = Some(0);
    for cid in 0..3 {
        rig.push(cid, &command(NvmOpcode::READ, 5, 1, DATA, 0));
    }
    rig.ring();
    rig.turn();
    rig.engine.reset();
    rig.push(3, &command(NvmOpcode::READ, 5, 1, DATA, 0));
    rig.ring();
    rig.turn();
    assert_eq!((rig.engine.at_volume(), rig.engine.has_work()), (3, false));
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!((rig.engine.at_volume(), rig.pop()), (0, None));
    rig.engine.clear();
    assert_eq!(rig.engine.queues(), (0, 0));
}

#[test]
fn a_busy_volume_gets_it_later() {
    let mut rig = Rig::new(32);
    rig.disk.borrow_mut().depth = 2;
    for cid in 0..9 {
        rig.push(cid, &command(NvmOpcode::READ, 0, 1, DATA, 0));
    }
    rig.ring();
    rig.settle();
    let cids: Vec<u16> = std::iter::from_fn(|| rig.pop()).map(|cqe| cqe.cid.get()).collect();
    assert_eq!(cids, (0..9).collect::<Vec<_>>());
    assert!(rig.engine.counters().busy > 0);
    // What waits is aborted.
    rig.disk.borrow_mut().depth = 0;
    rig.push(9, &command(NvmOpcode::READ, 0, 1, DATA, 0));
    rig.ring();
    rig.turn();
    rig.engine.abort();
    rig.settle();
    assert_eq!(rig.pop().unwrap().status(), Status::COMMAND_ABORT_REQUESTED);
}

#[test]
fn queues_share_what_a_turn_may_take() {
    let mut rig = Rig::new(512);
    let push = |rig: &mut Rig, count: u16, blocks: u32| {
        for cid in 0..count {
            rig.push(cid, &command(NvmOpcode::READ, 0, blocks, DATA, DATA + 0x1000));
        }
        rig.ring();
    };
    let done = |rig: &mut Rig| std::iter::from_fn(|| rig.pop()).count();
    // By number, of one queue.
    push(&mut rig, 200, 8);
    rig.turn();
    assert_eq!(done(&mut rig), 64);
    rig.settle();
    assert_eq!(done(&mut rig), 136);
    // By bytes: 8 KiB at a time, so that 64 commands of a queue are 512 KiB.
    rig.engine.turn_bytes = 0;
    push(&mut rig, 3, 16);
    assert!(!rig.engine.take(0), "nothing is left of the turn");
    (rig.engine.turn_commands, rig.engine.turn_bytes) = (TURN_COMMANDS, 12 << 10);
    assert!(rig.engine.take(0));
    assert_eq!(rig.engine.in_flight(), 2, "the second is begun, as something is left");
    rig.settle();
    assert_eq!(done(&mut rig), 3);
}

#[test]
fn a_device_that_is_no_bus_master_leaves_memory_alone() {
    let mut rig = Rig::new(16);
    rig.disk.borrow_mut().allowed = Some(0);
    rig.push(1, &command(NvmOpcode::READ, 1, 1, DATA, 0));
    rig.ring();
    rig.turn();
    rig.engine.set_master(false);
    rig.disk.borrow_mut().allowed = None;
    rig.push(2, &command(NvmOpcode::READ, 2, 1, DATA, 0));
    rig.ring();
    rig.settle();
    assert!(rig.pop().is_none() && !rig.engine.has_work() && rig.engine.is_quiet());
    assert_eq!(rig.engine.in_flight(), 1, "the second stays in its queue");
    rig.engine.set_master(true);
    assert!(rig.engine.has_work());
    rig.settle();
    assert_eq!([1, 2].map(|_| rig.pop().unwrap().cid.get()), [1, 2]);
}

#[test]
fn an_abort_ends_what_no_volume_has_yet() {
    let mut rig = Rig::new(16);
    (rig.disk.borrow_mut().depth, rig.disk.borrow_mut().allowed) = (1, Some(0));
    for cid in 1..=3 {
        rig.push(cid, &command(NvmOpcode::READ, u64::from(cid), 1, DATA, 0));
    }
    rig.ring();
    rig.turn();
    assert!(!rig.engine.abort_command(1, 1), "it is at the volume");
    assert!(!rig.engine.abort_command(1, 9) && !rig.engine.abort_command(7, 2), "there is none");
    assert!(rig.engine.abort_command(1, 2));
    let cqe = rig.pop().expect("posted before the abort is done");
    assert_eq!((cqe.cid.get(), cqe.status()), (2, Status::COMMAND_ABORT_REQUESTED));
    assert!(!rig.engine.abort_command(1, 2), "once");
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert_eq!([1, 3].map(|_| rig.pop().unwrap().cid.get()), [1, 3]);
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume()), (0, 0));
}

#[test]
fn commands_to_a_namespace_that_is_detached_end() {
    let mut rig = Rig::new(16);
    (rig.disk.borrow_mut().depth, rig.disk.borrow_mut().allowed) = (3, Some(0));
    rig.write(DATA, &[0x77; 512]);
    rig.push(1, &command(NvmOpcode::WRITE, 9, 1, DATA, 0));
    rig.push(2, &command(NvmOpcode::READ, 2, 1, DATA, 0));
    let flush = |nsid| Sqe { opcode: NvmOpcode::FLUSH.0, nsid: U32::new(nsid), ..Sqe::default() };
    rig.push(3, &flush(NSID_ALL));
    rig.push(4, &command(NvmOpcode::READ, 4, 1, DATA, 0));
    rig.ring();
    rig.turn();
    let nothing = Arc::new(subsys().restricted(|_| false));
    rig.engine.set_namespaces(Arc::clone(&nothing), |_| None);
    rig.push(5, &command(NvmOpcode::READ, 5, 1, DATA, 0));
    rig.ring();
    rig.settle();
    let mut ended: Vec<_> = std::iter::from_fn(|| rig.pop()).collect();
    ended.sort_by_key(|cqe| cqe.cid.get());
    let ended: Vec<_> = ended.iter().map(|cqe| (cqe.cid.get(), cqe.status())).collect();
    let inactive = Status::INVALID_FIELD_IN_COMMAND.dnr();
    // Those that wait at the volume, before it, and in the queue. A flush of all namespaces is done.
    let want = [(2, inactive), (3, Status::SUCCESS), (4, inactive), (5, inactive)];
    assert_eq!(ended, want);

    // It comes back, by another channel, while the old one still has the write.
    let disk = Rc::clone(&rig.disk);
    let other = Rc::new(RefCell::new(Disk { bytes: vec![5; BYTES], depth: 9, ..Disk::default() }));
    let new = Rc::clone(&other);
    let open = |_| Some(Box::new(TestChannel(Rc::clone(&new))) as Box<dyn Channel>);
    rig.engine.set_namespaces(Arc::new(subsys()), open);
    assert_eq!(rig.run(&command(NvmOpcode::READ, 9, 1, DATA + 4096, 0)), Status::SUCCESS);
    assert_eq!(rig.read(DATA + 4096, 512), [5; 512]);
    disk.borrow_mut().allowed = None;
    rig.settle();
    let cqe = rig.pop().expect("what was under way has been done, and says so");
    assert_eq!((cqe.cid.get(), cqe.status()), (1, Status::SUCCESS));
    assert_eq!(disk.borrow().bytes[9 * 512..10 * 512], [0x77; 512]);
    assert_eq!((rig.engine.in_flight(), rig.engine.at_volume()), (0, 0));
    assert_eq!(Rc::strong_count(&disk), 2, "the old channel is closed: the rig's and this");
}

fn descriptor(identifier: u8, address: u64, length: u32) -> SglDescriptor {
    SglDescriptor {
        address: U64::new(address),
        length: U32::new(length),
        reserved: [0; 3],
        identifier,
    }
}

#[test]
fn reads_leave_out_what_the_host_does_not_want() {
    let bucket = |length| descriptor(SglDescriptor::BIT_BUCKET, 0, length);
    let block = |address, length| descriptor(SglDescriptor::DATA_BLOCK, address, length);
    let mut rig = Rig::new(16);
    let list = [bucket(600), block(DATA, 300), bucket(124), block(DATA + 5000, 512)];
    let list: Vec<u8> = list.iter().flat_map(|one| one.as_bytes().to_vec()).collect();
    rig.write(0x8000, &list);
    let sgl = |opcode, blocks| Sqe {
        flags: 0x40,
        dptr: descriptor(SglDescriptor::LAST_SEGMENT, 0x8000, 64),
        ..command(opcode, 10, blocks, 0, 0)
    };
    assert_eq!(rig.run(&sgl(NvmOpcode::READ, 3)), Status::INTERNAL_ERROR, "there is no memory");
    rig.engine.set_pool(Pool::new(1 << 20).unwrap());
    rig.write(DATA, &[0xee; 8192]);
    assert_eq!(rig.run(&sgl(NvmOpcode::READ, 3)), Status::SUCCESS);
    let mut want = vec![0xee; 8192];
    want[..300].fill(11);
    want[5000..5512].fill(12);
    assert_eq!(rig.read(DATA, 8192), want);
    // Of a write, only what is there counts: 300 and 512 bytes.
    let length = Status::DATA_SGL_LENGTH_INVALID.dnr();
    assert_eq!(rig.run(&sgl(NvmOpcode::WRITE, 2)), length);
    assert_eq!(rig.run(&sgl(NvmOpcode::WRITE, 1)), Status::SUCCESS);
    let mut want = [11; 512];
    want[300..].fill(12);
    assert_eq!(rig.disk.borrow().bytes[10 * 512..11 * 512], want);
    assert_eq!(rig.engine.at_volume(), 0);
}

#[test]
fn one_command_in_a_while_is_measured() {
    let mut rig = Rig::new(16);
    for (now, measured) in [(100, 1), (110, 1), (121, 2)] {
        rig.now = Duration::from_micros(now);
        assert!(rig.run(&command(NvmOpcode::READ, 0, 1, DATA, 0)).is_success());
        assert_eq!(rig.engine.counters().latency.count(), measured, "at {now} us");
    }
    rig.disk.borrow_mut().allowed = Some(0);
    rig.push(1, &command(NvmOpcode::READ, 0, 1, DATA, 0));
    rig.ring();
    rig.turn();
    rig.now += Duration::from_millis(5);
    rig.disk.borrow_mut().allowed = None;
    rig.settle();
    assert!(rig.engine.counters().latency.max() >= Some(Duration::from_millis(5)));
}

#[test]
fn no_allocation_per_io() {
    let mut rig = Rig::new(64);
    let round = |rig: &mut Rig| {
        for cid in 0..32 {
            let opcode = if cid % 2 == 0 { NvmOpcode::READ } else { NvmOpcode::WRITE };
            rig.push(cid, &command(opcode, u64::from(cid), 8, DATA, 0));
        }
        rig.ring();
        rig.settle();
        while rig.pop().is_some() {}
    };
    round(&mut rig);
    let mut count = 0;
    for _ in 0..8 {
        for cid in 0..32 {
            rig.push(cid, &command(NvmOpcode::READ, u64::from(cid), 16, DATA, DATA + 0x1000));
        }
        rig.ring();
        let before = allocations();
        rig.settle();
        count += allocations() - before;
        while rig.pop().is_some() {}
    }
    assert_eq!(count, 0, "of 256 commands");
}

/// The process ends at every step of taking and completing commands, once or twice, and a successor
/// goes on: each command completes once, and the disk is what the commands make of it.
#[test]
fn each_command_completes_once_wherever_the_process_ends() {
    let mut steps = 0;
    loop {
        let ended = one_life_and_another(steps, steps % 7);
        if !ended {
            break;
        }
        steps += 1;
    }
    assert!(steps > 100, "only {steps} steps");
}

/// Whether the first process ended early.
fn one_life_and_another(first: u64, second: u64) -> bool {
    const COMMANDS: u16 = 12;
    let mut rig = Rig::new(8);
    let mut sent = 0;
    let mut completed = vec![0; usize::from(COMMANDS)];
    let mut ended = 0;
    crash::after(Some(first));
    let mut turns = 0;
    while completed.iter().sum::<u32>() < u32::from(COMMANDS) || turns < 3 {
        turns += 1;
        assert!(turns < 200, "{completed:?} after {first} steps");
        // The host has at most five in flight, and writes a block of its own with each.
        let in_flight = sent - completed.iter().sum::<u32>() as u16;
        if sent < COMMANDS && in_flight < 5 {
            let at = DATA + u64::from(sent) * 512;
            rig.write(at, &[0x80 + sent as u8; 512]);
            let write = command(NvmOpcode::WRITE, u64::from(sent), 1, at, 0);
            rig.push(sent, &write);
            // Its entry in the ring is another's as soon as the head has passed it.
            sent += 1;
            rig.record.view().ring(1, false, rig.tail);
        }
        let newest_first = turns % 2 == 0;
        rig.disk.borrow_mut().newest_first = newest_first;
        rig.disk.borrow_mut().allowed = Some(turns % 3);
        let life = catch_unwind(AssertUnwindSafe(|| {
            rig.turn();
        }));
        if life.is_err() {
            ended += 1;
            crash::after((ended < 2).then_some(second));
            // What was in flight may have reached the disk or not: here every second did.
            let held: Vec<_> = rig.disk.borrow_mut().held.drain(..).collect();
            for mut io in held.into_iter().step_by(2) {
                rig.disk.borrow_mut().run(&mut io);
            }
            loop {
                let next = catch_unwind(AssertUnwindSafe(|| {
                    let mut engine = engine(&rig.memory, &rig.record, &rig.disk);
                    let view = rig.record.view();
                    let (cq, sq) = (view.cq(1).unwrap(), view.sq(1).unwrap());
                    engine.create_cq(1, &cq, Coalescing::default(), true).unwrap();
                    engine.create_sq(1, &sq, true).unwrap();
                    engine
                }));
                match next {
                    Ok(engine) => {
                        rig.engine = engine;
                        break;
                    }
                    Err(_) => {
                        ended += 1;
                        crash::after(None);
                        rig.disk.borrow_mut().held.clear();
                    }
                }
            }
        }
        while let Some(cqe) = rig.pop() {
            assert_eq!(cqe.status(), Status::SUCCESS);
            completed[usize::from(cqe.cid.get())] += 1;
        }
    }
    crash::after(None);
    assert_eq!(completed, vec![1; usize::from(COMMANDS)], "after {first} and {second} steps");
    for block in 0..usize::from(COMMANDS) {
        assert_eq!(rig.disk.borrow().bytes[block * 512], 0x80 + block as u8);
    }
    assert_eq!(rig.engine.in_flight(), 0);
    ended > 0
}

#[derive(Debug, Clone)]
enum Act {
    Sqe { index: u32, raw: [u8; 64] },
    Pair { index: u32, slba: u64, fuses: [u8; 2], prps: [u64; 2] },
    Tail(u32),
    Head(u32),
    List { at: u64, entries: Vec<u64> },
    Segment { at: u64, descriptors: Vec<SglDescriptor> },
    Turn { allowed: usize },
    Unmap,
    Map,
    Arm,
    Reset,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..MEMORY / 4096).prop_map(|page| page * 4096),
        2 => 0..MEMORY + 0x2000,
        1 => any::<u64>(),
        1 => Just(!0xfff),
    ]
}

/// Descriptors of all kinds that there are for memory, and of one that there is not; most are of
/// lengths that can be right.
fn sgl() -> impl Strategy<Value = SglDescriptor> {
    let kind = prop_oneof![
        4 => Just(SglDescriptor::DATA_BLOCK),
        4 => Just(SglDescriptor::BIT_BUCKET),
        2 => Just(SglDescriptor::SEGMENT),
        4 => Just(SglDescriptor::LAST_SEGMENT),
        1 => any::<u8>(),
    ];
    let length = prop_oneof![
        3 => (1u32..9).prop_map(|n| n * 16),
        3 => (1u32..5).prop_map(|n| n * 512),
        1 => any::<u32>(),
    ];
    let at = prop_oneof![1 => address(), 2 => segment()];
    (kind, at, length).prop_map(|(kind, at, length)| descriptor(kind, at, length))
}

/// Where segments are: few places, so that commands and other segments find them.
fn segment() -> impl Strategy<Value = u64> {
    (0u64..3).prop_map(|page| 0x8000 + page * 4096)
}

fn act() -> impl Strategy<Value = Act> {
    let raw = (prop::array::uniform32(any::<u8>()), prop::array::uniform32(any::<u8>()));
    let raw = raw.prop_map(|(a, b)| {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&a);
        bytes[32..].copy_from_slice(&b);
        bytes
    });
    let opcode = prop::sample::select(vec![0u8, 1, 2, 5, 8, 9, 12, 13, 14, 17, 21, 25]);
    let plausible = (opcode, 0u8..3, address(), address(), 0u64..300, 0u32..200).prop_map(
        |(opcode, psdt, prp1, prp2, slba, blocks)| {
            let mut sqe = command(NvmOpcode(opcode), slba, blocks + 1, prp1, prp2);
            if psdt == 2 {
                sqe.flags = 0x40;
            }
            sqe.to_bytes()
        },
    );
    let lists = (prop::sample::select(vec![1u8, 2, 5]), sgl(), 0u64..300, 0u32..4).prop_map(
        |(opcode, dptr, slba, blocks)| {
            let sqe = command(NvmOpcode(opcode), slba, blocks + 1, 0, 0);
            Sqe { flags: 0x40, dptr, ..sqe }.to_bytes()
        },
    );
    prop_oneof![
        6 => (0u32..8, prop_oneof![3 => plausible, 2 => lists])
            .prop_map(|(index, raw)| Act::Sqe { index, raw }),
        3 => (0u32..8, 0u64..3, (0u8..4, 0u8..4), (address(), address())).prop_map(
            |(index, slba, fuses, prps)| {
                // Mostly as they should be.
                let fuses = if fuses.0 < 3 { [1, 2] } else { [fuses.1, fuses.0] };
                Act::Pair { index, slba, fuses, prps: prps.into() }
            }
        ),
        2 => (0u32..8, raw).prop_map(|(index, raw)| Act::Sqe { index, raw }),
        4 => (0u32..10).prop_map(Act::Tail),
        3 => (0u32..10).prop_map(Act::Head),
        3 => (0..MEMORY / 8 - 64, prop::collection::vec(address(), 1..40))
            .prop_map(|(at, entries)| Act::List { at: at * 8, entries }),
        3 => (segment(), prop::collection::vec(sgl(), 1..9))
            .prop_map(|(at, descriptors)| Act::Segment { at, descriptors }),
        6 => (0usize..9).prop_map(|allowed| Act::Turn { allowed }),
        1 => Just(Act::Unmap),
        1 => Just(Act::Map),
        1 => Just(Act::Arm),
        1 => Just(Act::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever a guest writes into its queues, lists and doorbells, and whenever its memory comes
    /// and goes: no panic, no access outside its memory (the lists that reach the volume are checked
    /// by its memory), no more commands than entries, and everything that was taken ends.
    #[test]
    fn any_guest_is_survived(acts in prop::collection::vec(act(), 1..80)) {
        let mut rig = Rig::new(8);
        // What goes into bit buckets has to be somewhere.
        let pool = Pool::new(1 << 20).unwrap();
        rig.engine.set_pool(pool.clone());
        for act in acts {
            match act {
                Act::Sqe { index, raw } => rig.write(SQ + u64::from(index) * 64, &raw),
                Act::Pair { index, slba, fuses, prps } => {
                    let opcodes = [NvmOpcode::COMPARE, NvmOpcode::WRITE];
                    for (n, opcode) in opcodes.into_iter().enumerate() {
                        let mut sqe = command(opcode, slba, 1, prps[n] & !3, 0);
                        sqe.flags = fuses[n];
                        let index = u64::from(index + n as u32) % 8;
                        rig.write(SQ + index * 64, &sqe.to_bytes());
                    }
                }
                Act::Tail(value) => rig.record.view().ring(1, false, value),
                Act::Head(value) => rig.record.view().ring(1, true, value),
                Act::List { at, entries } => {
                    for (at, entry) in (at..).step_by(8).zip(entries) {
                        rig.write(at, &entry.to_le_bytes());
                    }
                }
                Act::Segment { at, descriptors } => {
                    for (at, descriptor) in (at..).step_by(16).zip(descriptors) {
                        rig.write(at, descriptor.as_bytes());
                    }
                }
                Act::Turn { allowed } => {
                    rig.disk.borrow_mut().allowed = Some(allowed);
                    rig.turn();
                }
                Act::Unmap => rig.engine.set_memory(GuestMemory::default().view()),
                Act::Map => rig.engine.set_memory(rig.memory.view()),
                Act::Arm => {
                    rig.engine.arm();
                    rig.engine.disarm();
                }
                Act::Reset => {
                    rig.engine.reset();
                    rig.disk.borrow_mut().allowed = None;
                    rig.settle();
                    prop_assert_eq!(rig.engine.at_volume(), 0);
                    rig.engine.clear();
                    rig.record.view().clear_queues();
                    rig.engine.set_memory(rig.memory.view());
                    let cq = rig.engine.create_cq(1, &cq_record(8), Coalescing::default(), false);
                    prop_assert!(cq.is_ok());
                    prop_assert!(rig.engine.create_sq(1, &sq_record(8), false).is_ok());
                }
            }
            prop_assert!(rig.engine.in_flight() <= 8);
            prop_assert!(rig.engine.at_volume() <= 8);
        }
        rig.disk.borrow_mut().allowed = None;
        rig.engine.set_memory(rig.memory.view());
        rig.engine.set_running(false);
        rig.settle();
        prop_assert_eq!(rig.engine.at_volume(), 0);
        prop_assert!(rig.engine.is_quiet());
        prop_assert_eq!(rig.engine.in_flight_old(), 0);
        prop_assert_eq!(pool.available(), pool.capacity());
    }
}
