//! A guest that does anything at any time, and what must be true all the same. What it does is read
//! off bytes, so that a property test and a fuzz target are one.

use std::collections::BTreeSet;
use std::sync::Arc;

use block::Volume;
use iobuf::{GuestMemory, GuestRegion};
use nvme::spec::{AdminOpcode, Cc, Csts, NSSR_RESET, NvmOpcode, Sqe};
use reactor::CoreHandle;
use std::os::fd::AsFd;
use std::time::Duration;

use super::direct::Direct;
use super::host::{Bus, TestHost, transfer};
use super::volume::TestVolume;
use crate::function::{Function, Irq, Region, Reset};
use crate::{DeviceConfig, Doorbells, build};

const MEMORY_BYTES: u64 = 4 << 20;
/// Lists of pages that queues in pieces are in.
const LIST: u64 = 0x7000;
const SHADOW: u64 = 0x4000;
const DATA: u64 = 0x20_0000;
/// Where [`TestHost`] has its admin queue, and queues of each identifier behind it.
const QUEUES: u64 = 0x10_0000;
const QUEUE_BYTES: u64 = 0x2_0000;
const ADMIN_ENTRIES: u32 = 128;
/// What can be under way at a time: the slots of the admin queue, and a few that nobody waits for.
const OUTSTANDING_MAX: usize = 100;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// One of these.
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }
}

struct Guest {
    host: TestHost<Direct>,
    volumes: [Arc<TestVolume>; 2],
    cores: Vec<CoreHandle>,
    admin_tail: u32,
    is_running: bool,
}

/// A device on these cores, in the hands of a guest that does what `bytes` say.
///
/// # Panics
/// If the device panics, has more under way than it may, has other queues than the guest was told
/// of, does not come to rest, or cannot be used after an orderly reset.
pub fn wild(cores: &[CoreHandle], bytes: &[u8]) {
    let mut input = Input(bytes);
    let doorbells = input.of(&[Doorbells::Trapped, Doorbells::Trapped, Doorbells::Mapped]);
    let config = DeviceConfig {
        doorbells,
        queues: 4,
        drain_grace: Duration::from_millis(1),
        ..DeviceConfig::new("wild", "")
    };
    let volumes = [TestVolume::new(1, 1, false), TestVolume::new(1, 2, false)];
    let first: Arc<dyn Volume> = volumes[0].clone();
    let (device, _) = build(&config, vec![(1, first)], cores, None).expect("a device");
    let host = TestHost::new(Direct::new(device), MEMORY_BYTES, 4);
    let mut guest = Guest { host, volumes, cores: cores.to_vec(), admin_tail: 0, is_running: true };
    guest.host.plug_in();
    guest.enable();
    let mut steps = 0;
    while !input.0.is_empty() {
        guest.step(&mut input);
        guest.host.bus.pump();
        let outstanding = guest.host.bus.device.outstanding();
        assert!(outstanding <= OUTSTANDING_MAX, "{outstanding} under way");
        steps += 1;
        if steps % 16 == 0 {
            guest.check();
        }
    }
    guest.end();
}

impl Guest {
    fn register(&mut self, offset: u64, value: u32) {
        self.host.set_register(offset, value);
    }

    /// As a driver does, but without waiting.
    fn enable(&mut self) {
        self.host.write(QUEUES, &[0; QUEUE_BYTES as usize]);
        self.admin_tail = 0;
        let size = ADMIN_ENTRIES - 1;
        for (offset, value) in [
            (0x24, size << 16 | size),
            (0x28, QUEUES as u32),
            (0x2c, 0),
            (0x30, QUEUES as u32 + 0x1_0000),
            (0x34, 0),
            (0x14, Cc::ENABLE.0),
        ] {
            self.register(offset, value);
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 24 {
            0 => self.enable(),
            1 => self.register(0x14, Cc::ENABLE.0 & !1),
            2 => self.register(0x20, NSSR_RESET),
            3 => {
                let offset = input.of(&[0x14u64, 0x24, 0x28, 0x30, 0x0c, 0x10, 0x1c, 0x20, 0xffc]);
                let value = match input.byte() & 1 {
                    0 => input.word(),
                    _ => input.of(&[Cc::ENABLE.with_shn(1).0, Cc::ENABLE.0, 0, Csts::NSSRO, 1]),
                };
                self.register(offset, value);
            }
            4 => {
                let offset = u64::from(input.byte());
                let word = input.word().to_le_bytes();
                let len = usize::from(input.of(&[1u8, 2, 4]));
                self.host.bus.write(Region::CONFIG, offset, &word[..len]);
            }
            5 => {
                let command = input.of(&[6, 6, 2, 0]);
                self.host.bus.write(Region::CONFIG, 4, &[command, 0]);
            }
            6 => {
                let state = input.of(&[0, 0, 3]);
                self.host.bus.write(Region::CONFIG, 0x44, &[state]);
            }
            7 => self.host.bus.write(Region::CONFIG, 0x69, &[0x80]),
            8 => {
                let step = self.host.bus.device.reset(Reset::Conventional);
                self.host.bus.finish(step);
            }
            9 => {
                let (qid, value) = (u64::from(input.byte() % 8), u32::from(input.byte()));
                let value = if value == 255 { input.word() } else { value };
                self.register(0x1000 + qid * 4, value);
            }
            10 => self.map(input.byte()),
            11 => {
                let is_held = input.byte() & 1 == 1;
                self.hold(is_held);
            }
            12 => {
                self.run(input.byte() & 3 == 0);
            }
            13 => {
                // What a migration does to a device that it should leave alone.
                self.run(false);
                let state = self.host.bus.device.save();
                let _ = self.host.bus.device.restore(&state);
                self.run(true);
            }
            14 => {
                if input.byte() & 1 == 0 {
                    let volume: Arc<dyn Volume> = self.volumes[1].clone();
                    let _ = self.host.bus.attach(2, volume);
                } else {
                    self.host.bus.detach(2);
                }
            }
            15 => {
                let (vector, is_masked) = (u32::from(input.byte() % 4), input.byte() & 1 == 1);
                self.host.bus.device.set_masked(Irq::Msix, vector, is_masked);
            }
            16 | 17 => self.io(input),
            _ => self.admin(input),
        }
    }

    fn hold(&self, is_held: bool) {
        self.volumes.iter().for_each(|volume| volume.hold(is_held));
        self.cores.iter().for_each(CoreHandle::wake);
    }

    fn run(&mut self, is_running: bool) {
        if self.is_running != is_running {
            self.is_running = is_running;
            let step = self.host.bus.device.set_running(is_running);
            self.host.bus.finish(step);
        }
    }

    /// All memory, none of it, or the lower half, which has all queues and no data.
    fn map(&mut self, kind: u8) {
        let memory = match kind % 4 {
            0 => GuestMemory::default(),
            1 => {
                let half = GuestRegion::map(self.host.file.as_fd(), 0, DATA, 0, 0).expect("memory");
                GuestMemory::new(vec![half]).expect("one region")
            }
            _ => self.host.memory.clone(),
        };
        let step = self.host.bus.device.set_memory(&memory, true);
        self.host.bus.finish(step);
    }

    /// Several commands behind one ring, most of them about few queues.
    fn admin(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        for _ in 0..=kind % 12 {
            let sqe = admin_sqe(input);
            self.host.write(QUEUES + u64::from(self.admin_tail) * 64, &sqe.to_bytes());
            self.admin_tail = (self.admin_tail + 1) % ADMIN_ENTRIES;
        }
        let tail = self.admin_tail;
        self.register(0x1000, tail);
        // The host takes what is there, or does not.
        if kind & 0x80 == 0 {
            let head = u32::from(input.byte()) % ADMIN_ENTRIES;
            self.register(0x1004, head);
        }
    }

    /// Commands of a queue, and its doorbells.
    fn io(&mut self, input: &mut Input<'_>) {
        let qid = 1 + u64::from(input.byte() % 4);
        let count = u64::from(input.byte() % 40);
        for at in 0..count {
            let opcode = input.of(&[
                NvmOpcode::READ,
                NvmOpcode::WRITE,
                NvmOpcode::FLUSH,
                NvmOpcode::COMPARE,
                NvmOpcode::DATASET_MANAGEMENT,
                NvmOpcode(0x7d),
            ]);
            let what = input.byte();
            let address = if what & 3 == 3 { u64::from(what) << 36 } else { DATA };
            let nsid = u32::from(what >> 2 & 3);
            let mut sqe =
                transfer(opcode, nsid, u64::from(what), 1 + u32::from(what >> 4), address);
            sqe.cid.set(at as u16);
            sqe.flags = if what == 0x55 { 1 } else { 0 };
            self.host.write(QUEUES + qid * QUEUE_BYTES + at * 64, &sqe.to_bytes());
        }
        let mut head = [0; 4];
        head[0] = input.byte() & 0x3f;
        self.host.write(SHADOW + qid * 8, &(count as u32).to_le_bytes());
        self.host.write(SHADOW + qid * 8 + 4, &head);
        self.register(0x1000 + qid * 8, count as u32);
        self.register(0x1004 + qid * 8, u32::from_le_bytes(head));
    }

    /// The cores have the queues that the guest was told of, and each once.
    fn check(&mut self) {
        let before = self.host.bus.device.settled_queues();
        let state = self.host.bus.state();
        let mut sqs: Vec<u16> = state.queues.iter().map(|queue| queue.qid).collect();
        let mut cqs = state.completion_queues;
        sqs.sort_unstable();
        cqs.sort_unstable();
        for qids in [&sqs, &cqs] {
            let unique: BTreeSet<u16> = qids.iter().copied().collect();
            assert_eq!(unique.len(), qids.len(), "an identifier twice: {sqs:?} {cqs:?}");
        }
        let after = self.host.bus.device.settled_queues();
        if let Some(told) = before.filter(|before| after.as_ref() == Some(before)) {
            assert_eq!((sqs, cqs), told, "queues of the cores, and of the controller");
        }
    }

    /// An orderly reset, and use as if nothing had been.
    fn end(mut self) {
        self.hold(false);
        self.run(true);
        self.map(2);
        let step = self.host.bus.device.reset(Reset::Conventional);
        self.host.bus.finish(step);
        self.host.wait("rest", |host| host.bus.device.outstanding() == 0);
        assert!(self.host.bus.state().queues.is_empty());
        self.host.enable_function();
        for vector in 0..4 {
            self.host.bus.device.set_masked(Irq::Msix, vector, false);
        }
        self.host.enable(16);
        for qid in 1..=2 {
            self.host.create_queues(qid, 16);
            let read = transfer(NvmOpcode::READ, 1, 0, 8, DATA);
            assert!(self.host.run(qid, &read).status().is_success());
        }
        self.check();
    }
}

fn admin_sqe(input: &mut Input<'_>) -> Sqe {
    use AdminOpcode as Op;
    let opcode = input.of(&[
        Op::CREATE_IO_SQ,
        Op::CREATE_IO_SQ,
        Op::CREATE_IO_CQ,
        Op::CREATE_IO_CQ,
        Op::CREATE_IO_CQ,
        Op::DELETE_IO_SQ,
        Op::DELETE_IO_CQ,
        Op::DOORBELL_BUFFER_CONFIG,
        Op::SET_FEATURES,
        Op::GET_LOG_PAGE,
        Op::ASYNC_EVENT_REQUEST,
        Op::ABORT,
        Op::IDENTIFY,
        Op(0x99),
    ]);
    let (qid, kind) = (1 + u32::from(input.byte() % 5), input.byte());
    let entries = [2, 4, 64, 1024][usize::from(kind & 3)];
    let base = QUEUES + u64::from(qid) * QUEUE_BYTES;
    let is_in_pieces = kind & 0x30 == 0x30;
    let mut sqe = Sqe { opcode: opcode.0, ..Sqe::default() };
    let at = match opcode {
        Op::CREATE_IO_SQ if !is_in_pieces => base,
        Op::CREATE_IO_CQ if !is_in_pieces => base + 0x1_0000,
        Op::CREATE_IO_SQ | Op::CREATE_IO_CQ => LIST,
        Op::DOORBELL_BUFFER_CONFIG => SHADOW,
        _ => 0x8000,
    };
    // Now and then there is nothing.
    let at = if kind & 0xc0 == 0xc0 { 1 << 40 } else { at };
    sqe.set_prps(at, if opcode == Op::DOORBELL_BUFFER_CONFIG { at + 0x1000 } else { 0 });
    let cqid = 1 + u32::from(kind >> 2 & 3);
    let (cdw10, cdw11) = match opcode {
        Op::CREATE_IO_SQ => (qid | (entries - 1) << 16, u32::from(!is_in_pieces) | cqid << 16),
        Op::CREATE_IO_CQ => (qid | (entries - 1) << 16, u32::from(!is_in_pieces) | 2 | qid << 16),
        Op::SET_FEATURES => (u32::from(input.of(&[7u8, 8, 9, 11, 1])), u32::from(input.byte())),
        Op::GET_LOG_PAGE => (u32::from(input.of(&[1u8, 2, 3, 4])) | 127 << 16, 0),
        Op::ABORT => (qid | u32::from(kind) << 16, 0),
        _ => (qid, 0),
    };
    sqe.cdw10.set(cdw10);
    sqe.cdw11.set(cdw11);
    sqe
}
