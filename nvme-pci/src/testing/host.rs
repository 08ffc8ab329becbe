//! A host with an NVMe driver: as much as it takes to use the controller the way a guest does.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use iobuf::{GuestMemory, GuestRegion, GuestSlice, GuestView};
use nvme::spec::{AdminOpcode, Cc, Cqe, Csts, NvmOpcode, Sqe, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::client::{TestClient, memfd};
use crate::function::Region;

/// How a host reaches the function.
pub trait Bus {
    /// Reads a register or configuration space.
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]);
    /// Writes.
    fn write(&mut self, region: Region, offset: u64, data: &[u8]);
    /// Gives whatever runs the function on this thread a chance.
    fn idle(&mut self) {}
}

impl Bus for TestClient {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        let bytes: [u8; 4] = TestClient::read(self, region, offset);
        data.copy_from_slice(&bytes[..data.len()]);
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        self.post(region, offset, data);
    }
}

/// How long anything may take. Far above what it takes: the machine may be busy.
const LIMIT: Duration = Duration::from_secs(30);
/// Where queues are: each has 64 KiB for its submission and 16 KiB for its completion queue.
const QUEUES: u64 = 0x10_0000;
const QUEUE_BYTES: u64 = 0x2_0000;
/// Where pages for admin data and lists are.
const ADMIN_DATA: u64 = 0x8000;

/// A queue pair, as the host sees it.
#[derive(Debug, Clone)]
pub struct HostQueue {
    /// Identifier.
    pub qid: u16,
    /// Entries of each.
    pub entries: u32,
    tail: u32,
    head: u64,
}

/// A host: its memory, and queue pairs in it.
pub struct TestHost<B> {
    /// How it reaches the function.
    pub bus: B,
    /// Its memory, from guest address 0.
    pub memory: GuestMemory,
    /// The file behind it.
    pub file: OwnedFd,
    /// Eventfds of the vectors.
    pub vectors: Vec<OwnedFd>,
    view: Rc<GuestView>,
    doorbells: Option<GuestSlice>,
    shadow: Option<(u64, u64)>,
    queues: Vec<HostQueue>,
    next_cid: u16,
}

impl TestHost<TestClient> {
    /// Connects to a device, gives it memory and eventfds, and maps its doorbells if it may.
    pub fn connect(path: &std::path::Path, memory_bytes: u64, vectors: usize) -> Self {
        let client = TestClient::connect(path);
        client.negotiate();
        let mut host = TestHost::new(client, memory_bytes, vectors);
        host.bus.map(host.file.as_fd(), 0, 0, memory_bytes);
        host.bus.set_msix(0, &host.vectors);
        host.enable_function();
        host
    }

    /// Maps the doorbells, which the device must offer.
    pub fn map_doorbells(&mut self) {
        let (file, areas) = self.bus.region_file(Region::BAR0);
        let &[(offset, len)] = &areas[..] else { panic!("one area, not {areas:?}") };
        let region = GuestRegion::map(file.as_fd(), offset, len, 0, 0).expect("a file");
        let memory = GuestMemory::new(vec![region]).expect("one region");
        self.doorbells = Some(memory.view().slice(0, len).expect("as long as it said"));
    }
}

impl<B: Bus> TestHost<B> {
    /// A host that has not told the device of its memory.
    pub fn new(bus: B, memory_bytes: u64, vectors: usize) -> Self {
        let file = memfd(memory_bytes);
        let region = GuestRegion::map(file.as_fd(), 0, memory_bytes, 0, 0).expect("a file");
        let memory = GuestMemory::new(vec![region]).expect("one region");
        TestHost {
            bus,
            view: memory.view(),
            memory,
            file,
            vectors: (0..vectors).map(|_| TestClient::eventfd()).collect(),
            doorbells: None,
            shadow: None,
            queues: Vec::new(),
            next_cid: 0,
        }
    }

    /// Memory decoding and bus mastering on, MSI-X enabled.
    pub fn enable_function(&mut self) {
        self.bus.write(Region::CONFIG, 4, &[6, 0]);
        let mut at = [0];
        self.bus.read(Region::CONFIG, 0x34, &mut at);
        loop {
            let mut header = [0; 2];
            self.bus.read(Region::CONFIG, u64::from(at[0]), &mut header);
            if header[0] == 0x11 {
                break;
            }
            assert_ne!(header[1], 0, "a function with MSI-X");
            at[0] = header[1];
        }
        self.bus.write(Region::CONFIG, u64::from(at[0]) + 2, &[0, 0x80]);
    }

    /// A register.
    pub fn register(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.bus.read(Region::BAR0, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a register.
    pub fn set_register(&mut self, offset: u64, value: u32) {
        self.bus.write(Region::BAR0, offset, &value.to_le_bytes());
    }

    /// Waits until it is true.
    pub fn wait(&mut self, what: &str, mut is_true: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + LIMIT;
        while !is_true(self) {
            assert!(Instant::now() < end, "no {what}");
            self.bus.idle();
            std::thread::yield_now();
        }
    }

    /// Waits for CSTS.
    pub fn wait_status(&mut self, bits: u32) {
        self.wait("CSTS", |host| host.register(0x1c) & !Csts::NSSRO == bits);
    }

    /// Enables the controller with an admin queue of so many entries.
    pub fn enable(&mut self, entries: u32) {
        self.queues = vec![HostQueue { qid: 0, entries, tail: 0, head: 0 }];
        self.shadow = None;
        let zeros = vec![0; QUEUE_BYTES as usize];
        self.write(QUEUES, &zeros);
        self.set_register(0x24, (entries - 1) << 16 | (entries - 1));
        self.set_register(0x28, QUEUES as u32);
        self.set_register(0x2c, 0);
        self.set_register(0x30, QUEUES as u32 + 0x1_0000);
        self.set_register(0x34, 0);
        self.set_register(0x14, Cc::ENABLE.0);
        self.wait_status(Csts::RDY);
    }

    /// Disables it and waits until that is done.
    pub fn disable(&mut self) {
        self.set_register(0x14, Cc::ENABLE.0 & !1);
        self.wait_status(0);
        self.queues.clear();
    }

    /// Copies into memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.view.write(addr, bytes).expect("the host's own memory");
    }

    /// Copies out of memory.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.view.read(addr, &mut bytes).expect("the host's own memory");
        bytes
    }

    fn queue(&mut self, qid: u16) -> &mut HostQueue {
        self.queues.iter_mut().find(|queue| queue.qid == qid).expect("a queue of the host's")
    }

    /// Rings a doorbell.
    pub fn ring(&mut self, qid: u16, is_cq: bool, value: u32) {
        let offset = 8 * u64::from(qid) + if is_cq { 4 } else { 0 };
        if let (Some((shadow, event_idx)), true) = (self.shadow, qid > 0) {
            let word = |at: u64| self.view.slice(at + offset, 4).expect("the host's own memory");
            let doorbell = word(shadow);
            let old = doorbell.load_u32(0, Acquire).unwrap_or(0) as u16;
            let _ = doorbell.store_u32(0, value, Release);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let index = word(event_idx).load_u32(0, Acquire).unwrap_or(0) as u16;
            let new = value as u16;
            if new.wrapping_sub(index).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        match &self.doorbells {
            Some(doorbells) => {
                let _ = doorbells.store_u32(offset as usize, value, Release);
            }
            None => self.bus.write(Region::BAR0, 0x1000 + offset, &value.to_le_bytes()),
        }
    }

    fn base(qid: u16) -> u64 {
        QUEUES + u64::from(qid) * QUEUE_BYTES
    }

    /// Puts a command into a queue without ringing. Returns its identifier.
    pub fn push(&mut self, qid: u16, sqe: &Sqe) -> u16 {
        let cid = self.next_cid;
        self.next_cid = self.next_cid.wrapping_add(1);
        let mut sqe = *sqe;
        sqe.cid.set(cid);
        let queue = self.queue(qid);
        let at = Self::base(qid) + u64::from(queue.tail) * 64;
        queue.tail = (queue.tail + 1) % queue.entries;
        self.write(at, &sqe.to_bytes());
        cid
    }

    /// Rings the doorbell of a submission queue with its tail.
    pub fn kick(&mut self, qid: u16) {
        let tail = self.queue(qid).tail;
        self.ring(qid, false, tail);
    }

    /// The next completion, if it is there.
    pub fn pop(&mut self, qid: u16) -> Option<Cqe> {
        let queue = self.queue(qid);
        let entries = u64::from(queue.entries);
        let (index, phase) = (queue.head % entries, (queue.head / entries + 1) & 1);
        let at = Self::base(qid) + 0x1_0000 + index * 16;
        let entry = self.view.slice(at, 16).expect("the host's own memory");
        let last = entry.load_u32(12, Acquire).expect("aligned");
        if u64::from(last >> 16 & 1) != phase {
            return None;
        }
        let bytes = entry.read::<16>(0).expect("inside");
        self.queue(qid).head += 1;
        Some(Cqe::from_bytes(&bytes))
    }

    /// Tells the device what was taken.
    pub fn release(&mut self, qid: u16) {
        let queue = self.queue(qid);
        let head = (queue.head % u64::from(queue.entries)) as u32;
        self.ring(qid, true, head);
    }

    /// Waits for a completion.
    pub fn complete(&mut self, qid: u16) -> Cqe {
        let mut found = None;
        self.wait("completion", |host| {
            found = host.pop(qid);
            found.is_some()
        });
        self.release(qid);
        found.expect("just found")
    }

    /// Runs a command on a queue.
    pub fn run(&mut self, qid: u16, sqe: &Sqe) -> Cqe {
        let cid = self.push(qid, sqe);
        self.kick(qid);
        let cqe = self.complete(qid);
        assert_eq!(cqe.cid.get(), cid);
        cqe
    }

    /// An admin command with a page for its data.
    pub fn admin_sqe(opcode: AdminOpcode, cdw10: u32, cdw11: u32) -> Sqe {
        let mut sqe = Sqe { opcode: opcode.0, ..Sqe::default() };
        sqe.set_prps(ADMIN_DATA, 0);
        sqe.cdw10.set(cdw10);
        sqe.cdw11.set(cdw11);
        sqe
    }

    /// Runs an admin command that must succeed.
    pub fn admin(&mut self, sqe: &Sqe) -> u32 {
        let cqe = self.run(0, sqe);
        assert_eq!(cqe.status(), Status::SUCCESS, "{sqe:?}");
        cqe.dw0()
    }

    /// The page of an admin command's data.
    pub fn admin_data(&self) -> Vec<u8> {
        self.read(ADMIN_DATA, 4096)
    }

    /// Creates a queue pair.
    pub fn create_queues(&mut self, qid: u16, entries: u32) {
        let base = Self::base(qid);
        let zeros = vec![0; QUEUE_BYTES as usize];
        self.write(base, &zeros);
        let size = u32::from(qid) | (entries - 1) << 16;
        let mut cq = Self::admin_sqe(AdminOpcode::CREATE_IO_CQ, size, 3 | u32::from(qid) << 16);
        cq.set_prps(base + 0x1_0000, 0);
        self.admin(&cq);
        let mut sq = Self::admin_sqe(AdminOpcode::CREATE_IO_SQ, size, 1 | u32::from(qid) << 16);
        sq.set_prps(base, 0);
        self.admin(&sq);
        self.queues.push(HostQueue { qid, entries, tail: 0, head: 0 });
    }

    /// Uses shadow doorbells from now on.
    pub fn use_shadow_doorbells(&mut self) {
        let (shadow, event_idx) = (0x1_0000, 0x1_1000);
        self.write(shadow, &[0; 8192]);
        let mut sqe = Self::admin_sqe(AdminOpcode::DOORBELL_BUFFER_CONFIG, 0, 0);
        sqe.set_prps(shadow, event_idx);
        self.admin(&sqe);
        self.shadow = Some((shadow, event_idx));
    }

    /// Waits until a vector is raised.
    pub fn interrupted(&mut self, vector: usize) {
        let end = Instant::now() + LIMIT;
        loop {
            let mut fds = [PollFd::new(&self.vectors[vector], PollFlags::IN)];
            let soon = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            if poll(&mut fds, Some(&soon)).is_ok_and(|ready| ready > 0) {
                break;
            }
            assert!(Instant::now() < end, "no interrupt {vector}");
            self.bus.idle();
        }
        let mut count = [0; 8];
        rustix::io::read(&self.vectors[vector], &mut count).expect("an eventfd");
    }
}

/// A read or write of whole blocks.
pub fn transfer(opcode: NvmOpcode, nsid: u32, slba: u64, blocks: u32, addr: u64) -> Sqe {
    let mut sqe = Sqe { opcode: opcode.0, ..Sqe::default() };
    sqe.nsid.set(nsid);
    sqe.cdw10.set(slba as u32);
    sqe.cdw11.set((slba >> 32) as u32);
    sqe.cdw12.set(blocks.wrapping_sub(1) & 0xffff);
    sqe.set_prps(addr, (addr & !0xfff) + 4096);
    sqe
}
