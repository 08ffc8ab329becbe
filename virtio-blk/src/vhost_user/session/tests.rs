use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::pipe::pipe;
use zerocopy::IntoBytes;

use super::*;
use crate::device::tests::{geometry, identity, options};
use crate::testing::{Judge, TestMemory};
use crate::vhost_user::wire::{Decoder, VringState};

fn session() -> Session {
    let device = Device::new(&geometry(), &identity(), &options());
    Session::new(Arc::new(device), 256)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn message(kind: Request, need_reply: bool, payload: &[u8], fds: Vec<OwnedFd>) -> Message {
    let mut decoder = Decoder::new();
    decoder.push_fds(fds).unwrap();
    let bytes = wire::request(kind, need_reply, payload);
    decoder.push(&mut bytes.as_slice()).unwrap().unwrap()
}

/// A session and what a frontend would keep.
struct Rig {
    session: Session,
    memory: TestMemory,
}

impl Rig {
    fn new() -> Rig {
        Rig { session: session(), memory: TestMemory::new(1 << 20) }
    }

    fn ready() -> Rig {
        let mut rig = Rig::new();
        rig.tell(Request::SET_PROTOCOL_FEATURES, ProtocolFeatures::OFFERED.0.as_bytes());
        let features = rig.session.device.features();
        rig.tell(Request::SET_FEATURES, features.0.as_bytes());
        assert_eq!(rig.add_memory(), (0, 0));
        rig
    }

    fn send(&mut self, kind: Request, ack: bool, payload: &[u8], fds: Vec<OwnedFd>) -> Step {
        self.session.on_message(message(kind, ack, payload, fds)).unwrap()
    }

    /// Without an acknowledgement; no reply and no action.
    fn tell(&mut self, kind: Request, payload: &[u8]) {
        let step = self.send(kind, false, payload, vec![]);
        assert!(step.actions.is_empty() && step.reply.is_none(), "{kind}");
    }

    /// The acknowledgement's value and the number of actions, which are carried out.
    fn acked(&mut self, kind: Request, payload: &[u8], fds: Vec<OwnedFd>) -> (u64, usize) {
        let step = self.send(kind, true, payload, fds);
        let reply = match step.actions.is_empty() {
            true => step.reply,
            false => {
                assert!(step.reply.is_none() && self.session.is_pending());
                self.session.on_done(Ok(None)).unwrap()
            }
        };
        let reply = reply.expect("an acknowledgement");
        assert_eq!(reply[..4], kind.0.to_ne_bytes());
        (u64::from_ne_bytes(reply[12..].try_into().unwrap()), step.actions.len())
    }

    fn ask(&mut self, kind: Request, payload: &[u8]) -> Vec<u8> {
        let step = self.send(kind, false, payload, vec![]);
        assert!(step.actions.is_empty());
        step.reply.expect("a reply")[12..].to_vec()
    }

    fn region(&self) -> Vec<u8> {
        let mut payload = vec![0; 8];
        payload.extend(self.memory.region().as_bytes());
        payload
    }

    fn add_memory(&mut self) -> (u64, usize) {
        let fd = self.memory.fd().try_clone().unwrap();
        self.acked(Request::ADD_MEM_REG, &self.region(), vec![fd])
    }

    fn address(&self, index: u32) -> VringAddr {
        ring_at(index, self.memory.region().user_addr + u64::from(index) * 0x10000)
    }

    /// Everything but what starts it.
    fn prepare_ring(&mut self, index: u32) {
        self.tell(Request::SET_VRING_NUM, VringState { index, num: 128 }.as_bytes());
        self.tell(Request::SET_VRING_ADDR, self.address(index).as_bytes());
        self.tell(Request::SET_VRING_BASE, VringState { index, num: 7 }.as_bytes());
        let call = (Request::SET_VRING_CALL, u64::from(index));
        let step = self.send(call.0, false, call.1.as_bytes(), vec![event()]);
        assert!(step.actions.is_empty());
        let step = self.send(Request::SET_VRING_KICK, false, call.1.as_bytes(), vec![event()]);
        assert!(step.actions.is_empty());
    }

    fn start_ring(&mut self, index: u32) {
        self.prepare_ring(index);
        let enable = VringState { index, num: 1 };
        assert_eq!(self.acked(Request::SET_VRING_ENABLE, enable.as_bytes(), vec![]), (0, 1));
    }

    fn error(&mut self, kind: Request, payload: &[u8], fds: Vec<OwnedFd>) -> String {
        let error = self.session.on_message(message(kind, false, payload, fds));
        error.expect_err("the connection ends").to_string()
    }
}

#[test]
fn negotiation() {
    let mut rig = Rig::new();
    let features = rig.ask(Request::GET_FEATURES, &[]);
    assert_eq!(features, rig.session.device.features().0.as_bytes());
    assert_eq!(rig.ask(Request::GET_PROTOCOL_FEATURES, &[]), 0x1_b22bu64.as_bytes());
    assert_eq!(rig.ask(Request::GET_QUEUE_NUM, &[]), 4u64.as_bytes());
    rig.tell(Request::SET_OWNER, &[]);
    rig.tell(Request::RESET_OWNER, &[]);

    // Nothing is acknowledged before that is negotiated.
    let step = rig.send(Request::SET_OWNER, true, &[], vec![]);
    assert!(step.reply.is_none());
    rig.tell(Request::SET_PROTOCOL_FEATURES, 0x1_b22bu64.as_bytes());
    assert_eq!(rig.acked(Request::SET_OWNER, &[], vec![]), (0, 0));
    assert_eq!(rig.ask(Request::GET_MAX_MEM_SLOTS, &[]), 256u64.as_bytes());

    assert_eq!(rig.acked(Request::SET_FEATURES, (1u64 << 27).as_bytes(), vec![]).0, 1);
    assert_eq!(rig.acked(Request::SET_PROTOCOL_FEATURES, (1u64 << 2).as_bytes(), vec![]).0, 1);
    assert_eq!(rig.session.features(), None);
    let all = rig.session.device.features();
    assert_eq!(rig.acked(Request::SET_FEATURES, all.0.as_bytes(), vec![]).0, 0);
    assert_eq!(rig.session.features(), Some(all.for_driver()));
}

#[test]
fn a_ring_starts_when_it_is_complete() {
    let mut rig = Rig::ready();
    rig.prepare_ring(2);
    let enable = VringState { index: 2, num: 1 };
    let step = rig.send(Request::SET_VRING_ENABLE, true, enable.as_bytes(), vec![]);
    assert!(step.reply.is_none(), "not before it has started");
    let [Action::Start(start)] = &step.actions[..] else { panic!("{:?}", step.actions) };
    assert_eq!((start.index, start.size, start.base), (2, 128, 7));
    assert_eq!(start.address, rig.address(2));
    assert!(start.kick.is_some() && start.call.is_some() && start.err.is_none());
    assert!(!start.features.has(Features::PROTOCOL_FEATURES));
    assert!(start.features.has(Features::EVENT_IDX) && !start.write_through);
    let reply = rig.session.on_done(Ok(None)).unwrap().unwrap();
    assert_eq!(reply[12..], 0u64.to_ne_bytes());

    // Stopping it tells where it was; it starts again with a new kick eventfd only.
    let state = VringState { index: 2, num: 0 };
    let step = rig.send(Request::GET_VRING_BASE, false, state.as_bytes(), vec![]);
    assert!(matches!(step.actions[..], [Action::Stop { index: 2, .. }]) && step.reply.is_none());
    let reply = rig.session.on_done(Ok(Some(4711))).unwrap().unwrap();
    assert_eq!(reply[12..], [2, 0, 0, 0, 0x67, 0x12, 0, 0]);
    assert_eq!(rig.ask(Request::GET_VRING_BASE, state.as_bytes())[4..6], [0x67, 0x12]);
    assert_eq!(rig.acked(Request::SET_VRING_ENABLE, enable.as_bytes(), vec![]), (0, 0));
    let step = rig.send(Request::SET_VRING_KICK, true, 0x102u64.as_bytes(), vec![]);
    let [Action::Start(start)] = &step.actions[..] else { panic!("{:?}", step.actions) };
    assert_eq!(start.base, 4711);
    assert!(start.kick.is_none(), "it polls");
    assert!(start.call.is_some(), "the eventfd is still there");
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let mut rig = Rig::new();
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    table.extend(rig.memory.region().as_bytes());
    let fd = rig.memory.fd().try_clone().unwrap();
    assert!(rig.send(Request::SET_MEM_TABLE, false, &table, vec![fd]).actions.is_empty());
    rig.prepare_ring(0);
    rig.prepare_ring(1);
    let features = Features::VERSION_1;
    let step = rig.send(Request::SET_FEATURES, false, features.0.as_bytes(), vec![]);
    assert!(matches!(&step.actions[..], [Action::Start(a), Action::Start(b)]
        if a.index == 0 && b.index == 1 && a.write_through));
    // Two rings were to start and something failed: no telling what has.
    assert!(rig.session.on_done(Err("no".into())).is_err());
}

#[test]
fn a_ring_that_cannot_start_is_refused_once() {
    let mut rig = Rig::ready();
    rig.prepare_ring(0);
    let enable = VringState { index: 0, num: 1 };
    let step = rig.send(Request::SET_VRING_ENABLE, true, enable.as_bytes(), vec![]);
    assert_eq!(step.actions.len(), 1);
    let reply = rig.session.on_done(Err("nowhere".into())).unwrap().unwrap();
    assert_eq!(reply[12..], 1u64.to_ne_bytes());
    // The ring is stopped and can be set up anew.
    assert_eq!(rig.acked(Request::SET_VRING_ENABLE, enable.as_bytes(), vec![]), (0, 0));
    rig.tell(Request::SET_VRING_NUM, VringState { index: 0, num: 4 }.as_bytes());
    let step = rig.send(Request::SET_VRING_KICK, false, 0u64.as_bytes(), vec![event()]);
    assert_eq!(step.actions.len(), 1);
    assert_eq!(rig.session.on_done(Err("nowhere".into())).unwrap_err().to_string(), "nowhere");
}

#[test]
fn a_running_ring_takes_other_eventfds_and_pauses() {
    let mut rig = Rig::ready();
    rig.start_ring(1);
    let one = |rig: &mut Rig, kind, payload: &[u8], fds| {
        let mut step = rig.send(kind, false, payload, fds);
        assert_eq!(step.actions.len(), 1, "{kind}");
        assert!(rig.session.on_done(Ok(None)).unwrap().is_none());
        step.actions.pop().unwrap()
    };
    let index = 1u64.as_bytes();
    assert!(matches!(
        one(&mut rig, Request::SET_VRING_KICK, index, vec![event()]),
        Action::SetKick { index: 1, kick: Some(_) }
    ));
    let none = 0x101u64.as_bytes();
    assert!(matches!(
        one(&mut rig, Request::SET_VRING_KICK, none, vec![]),
        Action::SetKick { index: 1, kick: None }
    ));
    assert!(matches!(
        one(&mut rig, Request::SET_VRING_CALL, none, vec![]),
        Action::SetCall { index: 1, call: None }
    ));
    assert!(matches!(
        one(&mut rig, Request::SET_VRING_ERR, index, vec![event()]),
        Action::SetErr { index: 1, err: Some(_) }
    ));
    let pause = VringState { index: 1, num: 0 };
    assert!(matches!(
        one(&mut rig, Request::SET_VRING_ENABLE, pause.as_bytes(), vec![]),
        Action::SetEnabled { index: 1, is_enabled: false }
    ));
    // What would move it is refused; the same place again is not.
    let num = VringState { index: 1, num: 4 };
    assert_eq!(rig.acked(Request::SET_VRING_NUM, num.as_bytes(), vec![]), (1, 0));
    assert_eq!(rig.acked(Request::SET_VRING_BASE, num.as_bytes(), vec![]), (1, 0));
    let mut address = rig.address(1);
    assert_eq!(rig.acked(Request::SET_VRING_ADDR, address.as_bytes(), vec![]), (0, 0));
    address.used += 4;
    assert_eq!(rig.acked(Request::SET_VRING_ADDR, address.as_bytes(), vec![]), (1, 0));
    let features = rig.session.device.features();
    assert_eq!(rig.acked(Request::SET_FEATURES, features.0.as_bytes(), vec![]), (0, 0));
    assert_eq!(rig.acked(Request::SET_FEATURES, 0u64.as_bytes(), vec![]), (1, 0));
}

#[test]
fn memory_comes_and_goes() {
    let mut rig = Rig::ready();
    assert_eq!(rig.add_memory().0, 1, "it overlaps itself");
    rig.start_ring(0);
    let removed = rig.region();
    let mut other = rig.region();
    other[8] ^= 1;
    assert_eq!(rig.acked(Request::REM_MEM_REG, &other, vec![]), (1, 0));
    let step = rig.send(Request::REM_MEM_REG, true, &removed, vec![]);
    let [Action::SetMemory { memory, has_removed: true }] = &step.actions[..] else { panic!() };
    assert!(memory.regions().is_empty());
    rig.session.on_done(Ok(None)).unwrap();
    assert_eq!(rig.acked(Request::REM_MEM_REG, &removed, vec![]), (1, 0));

    let fd = rig.memory.fd().try_clone().unwrap();
    let step = rig.send(Request::ADD_MEM_REG, true, &removed, vec![fd]);
    let [Action::SetMemory { memory, has_removed: false }] = &step.actions[..] else { panic!() };
    assert_eq!(memory.regions().len(), 1);
    rig.session.on_done(Ok(None)).unwrap();
}

#[test]
fn memory_that_is_not_there() {
    let mut rig = Rig::ready();
    let region = MemoryRegion { guest_addr: 0, size: 4096, user_addr: 0x1000, mmap_offset: 0 };
    let refused = |rig: &mut Rig, region: MemoryRegion| {
        let mut payload = vec![0; 8];
        payload.extend(region.as_bytes());
        let fd = rig.memory.fd().try_clone().unwrap();
        assert_eq!(rig.acked(Request::ADD_MEM_REG, &payload, vec![fd]), (1, 0), "{region:?}");
    };
    refused(&mut rig, MemoryRegion { size: 0, ..region });
    refused(&mut rig, MemoryRegion { size: (1 << 20) + 1, ..region });
    refused(&mut rig, MemoryRegion { mmap_offset: 1 << 20, ..region });
    refused(&mut rig, MemoryRegion { mmap_offset: u64::MAX - 4095, ..region });
    refused(&mut rig, MemoryRegion { size: u64::MAX, ..region });
    refused(&mut rig, MemoryRegion { guest_addr: u64::MAX - 4094, ..region });
    refused(&mut rig, MemoryRegion { user_addr: u64::MAX - 4094, ..region });
    let mut payload = vec![0; 8];
    payload.extend(region.as_bytes());
    assert_eq!(rig.acked(Request::ADD_MEM_REG, &payload, vec![event()]), (1, 0), "no file");

    // As many regions as there are slots, and no more.
    let page = |slot: u64| {
        let at = slot * 4096;
        let region = MemoryRegion { guest_addr: at, size: 4096, user_addr: at, mmap_offset: 0 };
        let mut payload = vec![0; 8];
        payload.extend(region.as_bytes());
        payload
    };
    for slot in 0..MEM_SLOTS_MAX as u64 - 1 {
        let fd = rig.memory.fd().try_clone().unwrap();
        assert_eq!(rig.acked(Request::ADD_MEM_REG, &page(slot), vec![fd]), (0, 0));
    }
    let fd = rig.memory.fd().try_clone().unwrap();
    assert_eq!(rig.acked(Request::ADD_MEM_REG, &page(9999), vec![fd]), (1, 0));
}

#[test]
fn the_record_of_requests_in_flight() {
    let mut rig = Rig::ready();
    let asked = InflightDescription { queues: 4, queue_size: 128, ..Default::default() };
    // All features are negotiated: a packed ring's header of 32 bytes and 128 entries of 32.
    let step = rig.send(Request::GET_INFLIGHT_FD, false, asked.as_bytes(), vec![]);
    assert_eq!(step.reply.unwrap()[12..20], (4 * 4160u64).to_ne_bytes());
    let split = rig.session.device.features().without(Features::RING_PACKED);
    rig.tell(Request::SET_FEATURES, split.0.as_bytes());
    for len in [20, 24] {
        let payload = &asked.as_bytes()[..len];
        let step = rig.send(Request::GET_INFLIGHT_FD, false, payload, vec![]);
        let reply = step.reply.unwrap();
        assert_eq!(reply.len(), 12 + len, "as long as the question");
        // Four times a header of 16 bytes and 128 entries of 16, in multiples of 64.
        assert_eq!(reply[12..20], (4 * 2112u64).to_ne_bytes());
        assert_eq!(reply[20..32], [0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 128, 0]);
        let fd = step.fd.unwrap();
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 4 * 2112);
        assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "it cannot be cut off");
    }
    let description = InflightDescription { mmap_size: 4 * 2112, ..asked };
    let file = |bytes: u64| inflight_file(bytes).unwrap();
    let set = |rig: &mut Rig, description: InflightDescription, fd| {
        rig.acked(Request::SET_INFLIGHT_FD, description.as_bytes(), vec![fd]).0
    };
    let short = InflightDescription { mmap_size: 4 * 2112 - 1, ..description };
    assert_eq!(set(&mut rig, short, file(4 * 2112)), 1);
    assert_eq!(set(&mut rig, description, file(4 * 2112 - 1)), 1, "beyond the end of the file");
    assert_eq!(set(&mut rig, description, event()), 1, "no file");
    let many = InflightDescription { queues: 5, ..description };
    assert_eq!(set(&mut rig, many, file(1 << 20)), 1);
    let long = InflightDescription { queue_size: 1025, ..description };
    assert_eq!(set(&mut rig, long, file(1 << 20)), 1);
    assert_eq!(set(&mut rig, description, file(4 * 2112)), 0);

    rig.prepare_ring(3);
    let enable = VringState { index: 3, num: 1 };
    let step = rig.send(Request::SET_VRING_ENABLE, true, enable.as_bytes(), vec![]);
    let [Action::Start(start)] = &step.actions[..] else { panic!() };
    let record = start.inflight.as_ref().unwrap();
    assert_eq!(record.queue(3, start.features).unwrap().len(), 2064);
    assert!(record.queue(4, start.features).is_none());
    rig.session.on_done(Ok(None)).unwrap();
    assert_eq!(set(&mut rig, description, file(4 * 2112)), 1, "while a ring runs");
}

#[test]
fn dirty_pages_are_logged_when_asked_for() {
    let mut rig = Rig::ready();
    let all = rig.session.device.features();
    let plain = all.without(Features::LOG_ALL);
    rig.tell(Request::SET_FEATURES, plain.0.as_bytes());
    rig.start_ring(0);
    rig.start_ring(1);
    type Logged = (u16, Option<(bool, Option<u64>)>);
    let logging = |step: &Step| -> Vec<Logged> {
        let each = step.actions.iter().map(|action| match action {
            Action::SetLogging { index, logging } => {
                (*index, logging.as_ref().map(|logging| (logging.data, logging.used)))
            }
            action => panic!("{action:?}"),
        });
        each.collect()
    };
    let log = LogDescription { mmap_size: 64, mmap_offset: 4096 };
    let fd = rig.memory.fd().try_clone().unwrap();
    let step = rig.send(Request::SET_LOG_BASE, false, log.as_bytes(), vec![fd]);
    assert_eq!(logging(&step), [(0, None), (1, None)]);
    let reply = rig.session.on_done(Ok(None)).unwrap().expect("it is always answered");
    assert_eq!(reply[12..], 0u64.to_ne_bytes());

    let step = rig.send(Request::SET_FEATURES, true, all.0.as_bytes(), vec![]);
    assert_eq!(logging(&step), [(0, Some((true, None))), (1, Some((true, None)))]);
    rig.session.on_done(Ok(None)).unwrap();
    assert_eq!(rig.session.features(), Some(all.for_driver()));
    let address = VringAddr { flags: wire::VRING_LOG, log: 0x77, ..rig.address(1) };
    let step = rig.send(Request::SET_VRING_ADDR, true, address.as_bytes(), vec![]);
    assert_eq!(logging(&step), [(1, Some((true, Some(0x77))))]);
    rig.session.on_done(Ok(None)).unwrap();
    // A ring that starts later knows as well.
    rig.prepare_ring(2);
    let enable = VringState { index: 2, num: 1 };
    let step = rig.send(Request::SET_VRING_ENABLE, true, enable.as_bytes(), vec![]);
    let [Action::Start(start)] = &step.actions[..] else { panic!() };
    assert!(start.logging.as_ref().is_some_and(|logging| logging.bitmap().unwrap().len() == 64));
    rig.session.on_done(Ok(None)).unwrap();
    let step = rig.send(Request::SET_FEATURES, true, plain.0.as_bytes(), vec![]);
    assert_eq!(logging(&step), [(0, None), (1, Some((false, Some(0x77)))), (2, None)]);
    rig.session.on_done(Ok(None)).unwrap();
    // Whatever else changes, it is not while rings run.
    let other = plain.without(Features::EVENT_IDX);
    assert_eq!(rig.acked(Request::SET_FEATURES, other.0.as_bytes(), vec![]), (1, 0));
    assert_eq!(rig.session.features(), Some(plain.for_driver()));

    // A log that cannot be used ends the connection: QEMU does not look at the answer.
    let error = rig.error(Request::SET_LOG_BASE, log.as_bytes(), vec![event()]);
    assert!(error.contains("log of dirty pages of 64 bytes"), "{error}");
}

#[test]
fn device_status() {
    let mut rig = Rig::ready();
    assert_eq!(rig.ask(Request::GET_STATUS, &[]), 0u64.as_bytes());
    assert_eq!(rig.acked(Request::SET_STATUS, 15u64.as_bytes(), vec![]), (0, 0));
    assert_eq!(rig.ask(Request::GET_STATUS, &[]), 15u64.as_bytes());
    assert_eq!(rig.acked(Request::SET_STATUS, 256u64.as_bytes(), vec![]), (1, 0));
    rig.start_ring(1);
    let step = rig.send(Request::SET_STATUS, true, 0u64.as_bytes(), vec![]);
    assert!(matches!(step.actions[..], [Action::Stop { index: 1, .. }]));
    rig.session.on_done(Ok(Some(3))).unwrap();
    assert!(rig.session.features().is_some(), "only RESET_DEVICE forgets what a driver chose");
    assert_eq!(rig.acked(Request::SET_STATUS, 4u64.as_bytes(), vec![]), (0, 0));
    assert_eq!(rig.acked(Request::RESET_DEVICE, &[], vec![]), (0, 0));
    assert_eq!(rig.ask(Request::GET_STATUS, &[]), 0u64.as_bytes());
}

#[test]
fn configuration_space() {
    let mut rig = Rig::new();
    let get = |offset: u32, size: u32| {
        let mut payload = offset.to_ne_bytes().to_vec();
        payload.extend(size.to_ne_bytes());
        payload.extend([0; 4]);
        payload.resize(12 + size as usize, 0);
        payload
    };
    let set = |offset: u32, bytes: &[u8]| {
        let mut payload = get(offset, bytes.len() as u32);
        payload[12..].copy_from_slice(bytes);
        payload
    };
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(0, 60)), [], "not negotiated");
    rig.tell(Request::SET_PROTOCOL_FEATURES, ProtocolFeatures::OFFERED.0.as_bytes());
    for size in [57, 60, 256] {
        let reply = rig.ask(Request::GET_CONFIG, &get(0, size));
        assert_eq!(reply.len(), 12 + size as usize);
        assert_eq!(reply[4..8], size.to_ne_bytes());
        assert_eq!(reply[12..15], [0x45, 0x23, 1]);
        assert_eq!(reply[12 + 32], 1);
    }
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(1, 256)), []);
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(u32::MAX, 4)), []);

    // `writeback` can be written once the driver knows of it.
    assert_eq!(rig.acked(Request::SET_CONFIG, &set(32, &[0]), vec![]), (1, 0));
    let features = rig.session.device.features();
    rig.tell(Request::SET_FEATURES, features.0.as_bytes());
    assert_eq!(rig.acked(Request::SET_CONFIG, &set(32, &[0]), vec![]), (0, 0));
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(32, 1))[12..], [0]);
    assert_eq!(rig.acked(Request::SET_CONFIG, &set(32, &[2]), vec![]), (1, 0));
    assert_eq!(rig.acked(Request::SET_CONFIG, &set(0, &[0]), vec![]), (1, 0));
    assert_eq!(rig.acked(Request::SET_CONFIG, &set(32, &[1, 0]), vec![]), (1, 0));
    // After a migration all of it comes; the driver's part of it counts.
    let mut whole = set(0, &[9; 60]);
    (whole[8], whole[12 + 32]) = (1, 1);
    assert_eq!(rig.acked(Request::SET_CONFIG, &whole, vec![]), (0, 0));
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(32, 1))[12..], [1]);
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(0, 3))[12..], [0x45, 0x23, 1]);
    assert_eq!(rig.add_memory(), (0, 0));
    rig.start_ring(0);
    let step = rig.send(Request::SET_CONFIG, true, &set(32, &[1]), vec![]);
    assert!(matches!(step.actions[..], [Action::SetWriteThrough(false)]));
    rig.session.on_done(Ok(None)).unwrap();
    assert_eq!(rig.ask(Request::GET_CONFIG, &get(32, 1))[12..], [1]);
}

#[test]
fn when_writes_must_be_durable() {
    let through = |without: u64, write_cache| {
        let geometry = block::Geometry { write_cache, ..geometry() };
        let device = Arc::new(Device::new(&geometry, &identity(), &options()));
        let features = device.features().without(Features(without));
        let mut session = Session::new(device, 256);
        session.set_features(features, &mut Vec::new()).unwrap();
        (session.write_through(), session.writeback())
    };
    let (wce, flush) = (Features::CONFIG_WCE.0, Features::FLUSH.0);
    assert_eq!(through(0, true), (false, true));
    assert_eq!(through(wce, true), (false, true));
    assert_eq!(through(flush, true), (true, false), "the driver knows writeback and reads 0");
    assert_eq!(through(wce | flush, true), (true, false));
    assert_eq!(through(wce | flush, false), (false, false), "there is no cache");
}

#[test]
fn reset_forgets_the_driver_but_not_the_frontend() {
    let mut rig = Rig::ready();
    rig.start_ring(0);
    rig.start_ring(3);
    let step = rig.send(Request::RESET_DEVICE, true, &[], vec![]);
    assert!(matches!(
        step.actions[..],
        [Action::Stop { index: 0, .. }, Action::Stop { index: 3, .. }]
    ));
    assert!(rig.session.on_done(Ok(Some(9))).unwrap().is_some());
    assert_eq!(rig.session.features(), None);
    // Memory and call eventfds are still there; all else has to be set again.
    let enable = VringState { index: 0, num: 1 };
    assert_eq!(rig.acked(Request::SET_VRING_ENABLE, enable.as_bytes(), vec![]), (0, 0));
    let features = rig.session.device.features();
    rig.tell(Request::SET_FEATURES, features.0.as_bytes());
    rig.tell(Request::SET_VRING_NUM, VringState { index: 0, num: 64 }.as_bytes());
    rig.tell(Request::SET_VRING_ADDR, rig.address(0).as_bytes());
    let step = rig.send(Request::SET_VRING_KICK, false, 0u64.as_bytes(), vec![event()]);
    let [Action::Start(start)] = &step.actions[..] else { panic!() };
    assert!(start.call.is_some() && start.base == 0);
    assert_eq!(start.memory.regions().len(), 1);
}

#[test]
fn refusals_say_what_is_wrong() {
    let mut rig = Rig::ready();
    let split = rig.session.device.features().without(Features::RING_PACKED);
    rig.tell(Request::SET_FEATURES, split.0.as_bytes());
    let state = |index, num| VringState { index, num };
    let cases: [(Request, Vec<u8>, Vec<OwnedFd>, &str); 15] = [
        (Request::SET_VRING_NUM, state(4, 1).as_bytes().into(), vec![], "ring 4 does not exist"),
        (Request::SET_VRING_NUM, state(0, 0).as_bytes().into(), vec![], "ring size 0"),
        (Request::SET_VRING_NUM, state(0, 48).as_bytes().into(), vec![], "ring size 48"),
        (Request::SET_VRING_NUM, state(0, 512).as_bytes().into(), vec![], "ring size 512"),
        (Request::SET_VRING_BASE, state(0, 65536).as_bytes().into(), vec![], "65536"),
        (Request::SET_VRING_ENABLE, state(0, 2).as_bytes().into(), vec![], "SET_VRING_ENABLE to 2"),
        (Request::GET_VRING_BASE, state(9, 0).as_bytes().into(), vec![], "ring 9"),
        (Request::SET_VRING_CALL, 255u64.as_bytes().into(), vec![event()], "ring 255"),
        (Request::SET_VRING_KICK, 0u64.as_bytes().into(), vec![], "0 file descriptors"),
        (Request::SET_LOG_BASE, vec![0; 16], vec![], "0 file descriptors"),
        (Request::GET_INFLIGHT_FD, vec![0; 16], vec![], "GET_INFLIGHT_FD has 16 bytes"),
        (Request::GET_INFLIGHT_FD, vec![0; 20], vec![], "0 queues of 0 descriptors"),
        (Request(1000), vec![], vec![], "message type 1000 is not supported"),
        (Request::SET_FEATURES, vec![0; 4], vec![], "SET_FEATURES has 4 bytes of payload"),
        (Request::SET_MEM_TABLE, vec![1, 0, 0, 0, 0, 0, 0, 0], vec![], "8 bytes of payload"),
    ];
    for (kind, payload, fds, text) in cases {
        let error = rig.error(kind, &payload, fds);
        assert!(error.contains(text), "{error:?} does not say {text:?}");
    }
    let memory = rig.memory.fd().try_clone().unwrap();
    let error = rig.error(Request::SET_VRING_KICK, 0u64.as_bytes(), vec![memory]);
    assert!(error.contains("instead of an eventfd"), "{error}");
}

#[test]
fn slots_and_reset_need_their_features() {
    let mut rig = Rig::new();
    let region = rig.region();
    let fd = rig.memory.fd().try_clone().unwrap();
    for (kind, payload, fds) in [
        (Request::GET_MAX_MEM_SLOTS, &[][..], vec![]),
        (Request::ADD_MEM_REG, &region, vec![fd]),
        (Request::REM_MEM_REG, &region, vec![]),
        (Request::RESET_DEVICE, &[], vec![]),
    ] {
        assert!(rig.error(kind, payload, fds).contains("was not negotiated"), "{kind}");
    }
}

#[test]
fn call_eventfds_cannot_block_us() {
    let mut rig = Rig::ready();
    let call = event();
    let fds = vec![call.try_clone().unwrap()];
    rig.acked(Request::SET_VRING_CALL, 0u64.as_bytes(), fds);
    assert!(rustix::fs::fcntl_getfl(&call).unwrap().contains(OFlags::NONBLOCK));
}

/// File descriptors that do not belong to a message, or came with a bad one, are closed.
#[test]
fn descriptors_of_refused_messages_are_closed() {
    let mut rig = Rig::ready();
    for (kind, payload) in [
        (Request::GET_FEATURES, vec![]),
        (Request::SET_VRING_KICK, 0u64.as_bytes().to_vec()),
        (Request::SET_VRING_CALL, 3u64.as_bytes().to_vec()),
        (Request::SET_VRING_CALL, 99u64.as_bytes().to_vec()),
        (Request::ADD_MEM_REG, rig.region()),
        (Request::SET_MEM_TABLE, vec![0; 8]),
        (Request(77), vec![]),
    ] {
        let (reader, writer) = pipe().unwrap();
        rig.error(kind, &payload, vec![writer]);
        let mut byte = [0];
        assert_eq!(rustix::io::read(&reader, &mut byte), Ok(0), "{kind}: still open");
    }
    let removed = rig.region();
    let (reader, writer) = pipe().unwrap();
    rig.acked(Request::REM_MEM_REG, &removed, vec![writer]);
    assert_eq!(rustix::io::read(&reader, &mut [0]), Ok(0));
}

fn any_message() -> impl Strategy<Value = (Request, bool, Vec<u8>, u8)> {
    let index = || prop_oneof![6 => 0u32..3, 1 => any::<u32>()];
    let small = || prop_oneof![Just(0u32), Just(1), Just(2), Just(64), Just(256), any::<u32>()];
    let base = 0x7f12_0000_0000u64;
    let state = (
        prop_oneof![
            1 => Just(Request::SET_VRING_NUM),
            1 => Just(Request::SET_VRING_BASE),
            3 => Just(Request::SET_VRING_ENABLE),
            3 => Just(Request::GET_VRING_BASE),
        ],
        index(),
        small(),
    )
        .prop_map(|(kind, index, num)| (kind, VringState { index, num }.as_bytes().to_vec()));
    let address = (index(), 0..20u64).prop_map(move |(index, at)| {
        (Request::SET_VRING_ADDR, ring_at(index, base + at * 0x1000).as_bytes().to_vec())
    });
    let vring_fd = (
        prop_oneof![
            3 => Just(Request::SET_VRING_KICK),
            1 => Just(Request::SET_VRING_CALL),
            1 => Just(Request::SET_VRING_ERR),
        ],
        0u64..3,
        prop_oneof![3 => Just(0u64), 1 => Just(0x100u64)],
    )
        .prop_map(|(kind, index, none)| (kind, (index | none).as_bytes().to_vec()));
    let number = (
        prop_oneof![Just(Request::SET_FEATURES), Just(Request::SET_PROTOCOL_FEATURES)],
        prop_oneof![
            Just(u64::MAX),
            Just(0x1_b22bu64),
            Just(1 << 32),
            Just(0x1_7000_0000),
            any::<u64>()
        ],
    )
        .prop_map(|(kind, value)| (kind, value.as_bytes().to_vec()));
    let region = (
        prop_oneof![Just(Request::ADD_MEM_REG), Just(Request::REM_MEM_REG)],
        0..4u64,
        prop_oneof![Just(0x1_0000u64), 0..0x20_0000u64],
    )
        .prop_map(move |(kind, at, size)| {
            let at = at * 0x1_0000;
            let user_addr = base + at;
            let region = MemoryRegion { guest_addr: at, size, user_addr, mmap_offset: at };
            let mut payload = vec![0; 8];
            payload.extend(region.as_bytes());
            (kind, payload)
        });
    let junk = (0u32..50, prop::collection::vec(any::<u8>(), 0..80))
        .prop_map(|(kind, payload)| (Request(kind), payload));
    let message =
        prop_oneof![4 => state, 2 => address, 4 => vring_fd, 2 => number, 3 => region, 1 => junk];
    (message, any::<bool>(), 0u8..20)
        .prop_map(|((kind, payload), ack, fds)| (kind, ack, payload, fds))
}

proptest! {
    /// Any frontend: no panic, and what `Judge` demands.
    #[test]
    fn any_frontend_is_survived(
        messages in prop::collection::vec((any_message(), prop::bool::weighted(0.1)), 1..60),
    ) {
        let memory = TestMemory::new(1 << 20);
        let device = Device::new(&geometry(), &identity(), &options());
        let features = device.features();
        let mut judge = Judge::new(device, 256);
        let mut tell = |kind, payload: &[u8], fds| {
            judge.message(message(kind, false, payload, fds), false).unwrap();
        };
        let offered = ProtocolFeatures::OFFERED;
        tell(Request::SET_PROTOCOL_FEATURES, offered.0.as_bytes(), vec![]);
        tell(Request::SET_FEATURES, features.0.as_bytes(), vec![]);
        for index in 0..3 {
            tell(Request::SET_VRING_NUM, VringState { index, num: 64 }.as_bytes(), vec![]);
            let user = memory.region().user_addr + u64::from(index) * 0x10000;
            tell(Request::SET_VRING_ADDR, ring_at(index, user).as_bytes(), vec![]);
        }
        for ((kind, ack, payload, fds), fails) in messages {
            let takes_event = matches!(
                kind,
                Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR
            );
            let none = payload.get(1) == Some(&1);
            let fd = |fd: BorrowedFd<'_>| vec![fd.try_clone_to_owned().unwrap()];
            // Mostly as many as there should be.
            let fds = match fds {
                0 => fd(memory.fd().as_fd()),
                1 => vec![],
                _ if takes_event && !none => vec![event()],
                _ if kind == Request::ADD_MEM_REG => fd(memory.fd().as_fd()),
                _ => vec![],
            };
            // An error would end the connection; the state has to stay usable all the same.
            let _ = judge.message(message(kind, ack, &payload, fds), fails);
        }
        STARTS.fetch_add(judge.starts(), Ordering::Relaxed);
    }
}

/// Rings that were started by the cases above.
static STARTS: AtomicU64 = AtomicU64::new(0);

/// The cases above reach what they are about.
#[test]
fn random_frontends_do_start_rings() {
    any_frontend_is_survived();
    assert!(STARTS.load(Ordering::Relaxed) > 50);
}

fn ring_at(index: u32, user: u64) -> VringAddr {
    let (available, used) = (user + 0x1000, user + 0x2000);
    VringAddr { index, flags: 0, descriptor: user, available, used, log: 0 }
}
