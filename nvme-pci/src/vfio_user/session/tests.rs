use std::os::fd::AsRawFd;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::function::Event;
use crate::testing::{Call, ModelFunction, TestClient, memfd};

/// A session with its function, and no socket.
struct Rig {
    session: Session,
    function: ModelFunction,
}

const PAGE: u64 = 4096;

impl Rig {
    fn new() -> Rig {
        let function = ModelFunction::default();
        Rig { session: Session::new(&function), function }
    }

    fn negotiated() -> Rig {
        let mut rig = Rig::new();
        let json = b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":16,\"write_multiple\":true}}\0";
        rig.ask(Command::VERSION, json, vec![]).unwrap();
        rig
    }

    fn message(command: Command, payload: &[u8], fds: Vec<OwnedFd>) -> Message {
        Message { id: 77, command, no_reply: false, payload: payload.to_vec(), fds }
    }

    /// The reply's payload; what is pending is let finish.
    fn ask(&mut self, command: Command, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<u8>, i32> {
        self.ask_for(command, payload, fds).map(|reply| reply.0)
    }

    fn ask_for(
        &mut self,
        command: Command,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), i32> {
        let message = Rig::message(command, payload, fds);
        let outcome = self.session.on_message(message, &mut self.function);
        self.finish(command, outcome)
    }

    fn finish(
        &mut self,
        command: Command,
        mut outcome: Outcome,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), i32> {
        while matches!(outcome, Outcome::Pending) {
            assert!(self.session.is_pending());
            assert!(self.function.poll().is_none(), "it was not let");
            self.function.can_finish = true;
            assert_eq!(self.function.poll(), Some(Event::Done));
            self.function.can_finish = false;
            outcome = self.session.on_done(&mut self.function);
        }
        let Outcome::Reply(reply) = outcome else { panic!("{outcome:?}") };
        let (header, payload) = wire::Header::read_from_prefix(&reply.bytes).unwrap();
        assert_eq!((header.id, Command(header.command)), (77, command));
        assert_eq!(header.size as usize, reply.bytes.len());
        wire::reply_outcome(&header).unwrap().map(|()| (payload.to_vec(), reply.fd))
    }

    fn map(&mut self, address: u64, size: u64) -> Result<(), i32> {
        let request = wire::DmaMap { argsz: 32, flags: 3, offset: 0, address, size };
        self.ask(Command::DMA_MAP, request.as_bytes(), vec![memfd(size)]).map(drop)
    }

    fn unmap(&mut self, address: u64, size: u64) -> Result<(), i32> {
        let request = wire::DmaUnmap { argsz: 24, flags: 0, address, size };
        let reply = self.ask(Command::DMA_UNMAP, request.as_bytes(), vec![])?;
        assert_eq!(reply, request.as_bytes());
        Ok(())
    }

    fn irqs(
        &mut self,
        flags: u32,
        which: [u32; 3],
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), i32> {
        let [index, start, count] = which;
        let request = wire::IrqSet { argsz: 20, flags, index, start, count };
        let payload = [request.as_bytes(), data].concat();
        assert_eq!(self.ask(Command::DEVICE_SET_IRQS, &payload, fds)?, []);
        Ok(())
    }

    fn feature(&mut self, flags: u32, data: &[u8]) -> Result<Vec<u8>, i32> {
        let header = wire::DeviceFeature { argsz: 1 << 21, flags };
        self.ask(Command::DEVICE_FEATURE, &[header.as_bytes(), data].concat(), vec![])
    }

    fn migrate(&mut self, state: State) -> Result<(), i32> {
        let data = wire::MigState { device_state: state.0, data_fd: 0 };
        self.feature(SET | 2, data.as_bytes()).map(drop)
    }

    fn state(&mut self) -> State {
        let reply = self.feature(GET | 2, &[]).unwrap();
        State(u32::from_ne_bytes(reply[8..12].try_into().unwrap()))
    }

    fn calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.function.calls)
    }
}

const GET: u32 = vfio::VFIO_DEVICE_FEATURE_GET;
const SET: u32 = vfio::VFIO_DEVICE_FEATURE_SET;
const PROBE: u32 = vfio::VFIO_DEVICE_FEATURE_PROBE;
const INVAL: i32 = 22;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// Requests and replies as the structures of the vfio-user document and `linux/vfio.h` have them.
/// The sizes are those in QEMU 11.1.3's own trace: DEVICE_GET_REGION_INFO 30h, GET_IRQ_INFO 20h,
/// REGION_READ of four bytes 24h, REGION_WRITE 20h, SET_IRQS and DMA_MAP 10h, DMA_UNMAP 28h, with
/// the header of 10h bytes.
#[test]
fn every_command_has_its_golden_bytes() {
    let mut rig = Rig::negotiated();
    rig.function.bar0[..4].copy_from_slice(&[0xFF, 0x03, 0x01, 0x14]);
    let table = [
        // DEVICE_GET_INFO: flags reset and PCI, 9 regions, 5 interrupts.
        (4, "10000000 00000000 00000000 00000000", "10000000 03000000 09000000 05000000"),
        // DEVICE_GET_REGION_INFO of BAR0, without room for capabilities: it takes 40h bytes.
        (
            5,
            "20000000 00000000 00000000 00000000 0000000000000000 0000000000000000",
            "40000000 0F000000 00000000 00000000 0040000000000000 0000000000000000",
        ),
        // With room: the sparse area [1000h, 2000h).
        (
            5,
            "40000000 00000000 00000000 00000000 0000000000000000 0000000000000000",
            "40000000 0F000000 00000000 20000000 0040000000000000 0000000000000000
             0100 0100 00000000 01000000 00000000 0010000000000000 0010000000000000",
        ),
        // Configuration space, and a region that is not there.
        (
            5,
            "20000000 00000000 07000000 00000000 0000000000000000 0000000000000000",
            "20000000 03000000 07000000 00000000 0010000000000000 0000000000000000",
        ),
        (
            5,
            "20000000 00000000 01000000 00000000 0000000000000000 0000000000000000",
            "20000000 00000000 01000000 00000000 0000000000000000 0000000000000000",
        ),
        // DEVICE_GET_REGION_IO_FDS: none.
        (6, "00100000 00000000 00000000 00000000", "10000000 00000000 00000000 00000000"),
        // DEVICE_GET_IRQ_INFO: INTx can be masked and masks itself; 9 MSI-X vectors; ERR; no MSI.
        (7, "10000000 00000000 00000000 00000000", "10000000 07000000 00000000 01000000"),
        (7, "10000000 00000000 02000000 00000000", "10000000 01000000 02000000 09000000"),
        (7, "10000000 00000000 03000000 00000000", "10000000 01000000 03000000 01000000"),
        (7, "10000000 00000000 01000000 00000000", "10000000 01000000 01000000 00000000"),
        // DEVICE_SET_IRQS: all INTx off.
        (8, "14000000 21000000 00000000 00000000 00000000", ""),
        // REGION_READ of 4 bytes of BAR0.
        (9, "0000000000000000 00000000 04000000", "0000000000000000 00000000 04000000 FF030114"),
        // REGION_WRITE.
        (10, "1400000000000000 00000000 04000000 01004600", "1400000000000000 00000000 04000000"),
        // DMA_MAP without a file, and its end.
        (2, "20000000 01000000 0000000000000000 00000C0000000000 0000020000000000", ""),
        (
            3,
            "18000000 00000000 00000C0000000000 0000020000000000",
            "18000000 00000000 00000C0000000000 0000020000000000",
        ),
        (13, "", ""),
        // REGION_WRITE_MULTI: two writes.
        (
            15,
            "0200000000000000
             1400000000000000 00000000 04000000 0100000000000000
             0010000000000000 00000000 04000000 0200000000000000",
            "0200000000000000",
        ),
        // DEVICE_FEATURE: migration by stop and copy; the state is RUNNING.
        (16, "10000000 01000100", "10000000 01000100 0100000000000000"),
        (16, "10000000 02000100", "10000000 02000100 02000000 FFFFFFFF"),
        (16, "08000000 06000600", "08000000 06000600"),
    ];
    for (command, request, reply) in table {
        let command = Command(command);
        assert_eq!(
            rig.ask(command, &hex(request), vec![]),
            Ok(hex(reply)),
            "{command:?} {request}"
        );
    }
}

#[test]
fn the_version_comes_first_and_once() {
    let mut rig = Rig::new();
    for command in 0..20 {
        if command != 1 {
            assert_eq!(rig.ask(Command(command), &[0; 32], vec![]), Err(INVAL));
        }
    }
    for (bad, errno) in [
        (&b"\x01\0\0\0"[..], 95),
        (b"\0\0", INVAL),
        (b"\0\0\0\0{}", INVAL),
        (b"\0\0\0\0nonsense\0", INVAL),
    ] {
        assert_eq!(rig.ask(Command::VERSION, bad, vec![]), Err(errno));
        assert!(!rig.session.is_negotiated());
    }
    let reply = rig.ask(Command::VERSION, b"\0\0\x09\0", vec![]).unwrap();
    assert_eq!(reply[..4], [0, 0, MINOR as u8, 0]);
    assert!(reply.ends_with(b"\0"));
    assert_eq!(rig.ask(Command::VERSION, b"\0\0\0\0", vec![]), Err(INVAL));
    assert!(rig.session.is_negotiated());
}

#[test]
fn what_is_not_known_is_not_supported() {
    let mut rig = Rig::negotiated();
    for command in [0, 11, 12, 14, 19, 255, u16::MAX] {
        assert_eq!(rig.ask(Command(command), &[0; 64], vec![]), Err(95));
    }
    let message = Message { no_reply: true, ..Rig::message(Command(99), &[], vec![]) };
    let outcome = rig.session.on_message(message, &mut rig.function);
    assert!(matches!(outcome, Outcome::Silent), "an error on a posted message is not answered");
}

#[test]
fn memory_comes_and_goes_with_its_maps() {
    let mut rig = Rig::negotiated();
    rig.map(0x10_0000, 4 * PAGE).unwrap();
    rig.map(0, PAGE).unwrap();
    let both = vec![(0, PAGE), (0x10_0000, 4 * PAGE)];
    assert_eq!(rig.calls().pop(), Some(Call::SetMemory(both, false)));
    // Over it, in it, around it.
    for (address, size) in [(0x10_0000, PAGE), (0x10_3000, PAGE), (0, 1 << 40), (0x10_3FFF, 1)] {
        assert_eq!(rig.map(address, size), Err(17));
    }
    for (address, size) in [(0x20_0000, 0), (u64::MAX - 10, PAGE)] {
        assert_eq!(rig.map(address, size), Err(INVAL));
    }
    // An unmap must name a map.
    for (address, size) in [(0x10_0000, PAGE), (0x10_1000, PAGE), (0x30_0000, PAGE), (0, 1 << 40)] {
        assert_eq!(rig.unmap(address, size), Err(2));
    }
    assert_eq!(rig.calls(), []);
    rig.unmap(0x10_0000, 4 * PAGE).unwrap();
    assert_eq!(rig.calls(), [Call::SetMemory(vec![(0, PAGE)], true)]);
    rig.map(0x10_0000, PAGE).unwrap();
    let all = wire::DmaUnmap { argsz: 24, flags: wire::DmaUnmap::ALL, address: 0, size: 0 };
    rig.ask(Command::DMA_UNMAP, all.as_bytes(), vec![]).unwrap();
    assert_eq!(rig.calls().pop(), Some(Call::SetMemory(vec![], true)));
    assert_eq!(rig.session.maps(), 0);
}

#[test]
fn maps_that_lead_nowhere_are_refused_and_those_without_a_file_ignored() {
    let mut rig = Rig::negotiated();
    let request = |flags, offset, size| {
        wire::DmaMap { argsz: 32, flags, offset, address: 0xC_0000, size }.as_bytes().to_vec()
    };
    // Longer than its file, at an offset beyond it, no file at all, and two of them.
    for (request, fds) in [
        (request(3, 0, 2 * PAGE), vec![memfd(PAGE)]),
        (request(3, PAGE, 1), vec![memfd(PAGE)]),
        (request(3, u64::MAX, PAGE), vec![memfd(PAGE)]),
        (request(3, 0, PAGE), vec![TestClient::eventfd()]),
        (request(3, 0, PAGE), vec![memfd(PAGE), memfd(PAGE)]),
        (request(8, 0, PAGE), vec![memfd(PAGE)]),
    ] {
        assert_eq!(rig.ask(Command::DMA_MAP, &request, fds), Err(INVAL));
    }
    assert_eq!((rig.session.maps(), rig.calls()), (0, vec![]));
    for flags in [0, 1, 3] {
        rig.ask(Command::DMA_MAP, &request(flags, 0, PAGE), vec![]).unwrap();
        assert_eq!(rig.map(0xC_0000, PAGE), Err(17), "it is there all the same");
        rig.unmap(0xC_0000, PAGE).unwrap();
    }
    assert_eq!(rig.calls(), []);
    // A ROM can be read only.
    rig.ask(Command::DMA_MAP, &request(1, 0, PAGE), vec![memfd(PAGE)]).unwrap();
    let view = rig.function.memory.view();
    view.read(0xC_0000, &mut [0; 8]).unwrap();
    assert!(view.write(0xC_0000, &[0; 8]).is_err());
}

#[test]
fn the_number_of_maps_has_a_bound() {
    let mut rig = Rig::negotiated();
    for index in 0..dma::MAPS_MAX as u64 {
        let request =
            wire::DmaMap { flags: 3, address: index * PAGE, size: PAGE, ..Default::default() };
        rig.ask(Command::DMA_MAP, request.as_bytes(), vec![]).unwrap();
    }
    assert_eq!(rig.map(1 << 40, PAGE), Err(28));
    rig.unmap(0, PAGE).unwrap();
    rig.map(1 << 40, PAGE).unwrap();
}

#[test]
fn an_unmap_is_answered_when_the_function_has_let_go() {
    let mut rig = Rig::negotiated();
    let file = memfd(PAGE);
    let probe = format!("/proc/self/fd/{}", file.as_raw_fd());
    let inode = std::fs::read_link(&probe).unwrap();
    let request = wire::DmaMap { argsz: 32, flags: 3, offset: 0, address: 0, size: PAGE };
    rig.ask(Command::DMA_MAP, request.as_bytes(), vec![file]).unwrap();
    rig.function.is_slow = true;
    let request = wire::DmaUnmap { argsz: 24, flags: 0, address: 0, size: PAGE };
    let message = Rig::message(Command::DMA_UNMAP, request.as_bytes(), vec![]);
    let outcome = rig.session.on_message(message, &mut rig.function);
    assert!(matches!(outcome, Outcome::Pending) && rig.session.is_pending());
    assert_eq!(std::fs::read_link(&probe).unwrap(), inode, "still open");
    let (reply, _) = rig.finish(Command::DMA_UNMAP, outcome).unwrap();
    assert_eq!(reply, request.as_bytes());
    assert!(std::fs::read_link(&probe).map_or(true, |now| now != inode), "closed");
}

#[test]
fn accesses_outside_of_a_region_do_not_reach_the_function() {
    let mut rig = Rig::negotiated();
    let access = |offset, region, count| wire::RegionAccess { offset, region, count };
    for request in [
        access(0x4000, 0, 1),
        access(0x3FFD, 0, 4),
        access(u64::MAX, 0, 2),
        access(0, 0, u32::MAX),
        access(0, 1, 1),
        access(0, 1, 0x10_0000),
        access(0, 8, 1),
        access(0, 9, 1),
        access(0, u32::MAX, 1),
    ] {
        assert_eq!(rig.ask(Command::REGION_READ, request.as_bytes(), vec![]), Err(INVAL));
        let payload = [request.as_bytes(), &vec![0; (request.count as usize).min(8)]].concat();
        assert_eq!(rig.ask(Command::REGION_WRITE, &payload, vec![]), Err(INVAL));
    }
    // More or less data than it says.
    for len in [0, 3, 5] {
        let payload = [access(0, 0, 4).as_bytes(), &vec![0; len]].concat();
        assert_eq!(rig.ask(Command::REGION_WRITE, &payload, vec![]), Err(INVAL));
    }
    assert_eq!(rig.calls(), []);
    // Nothing at all, something odd, and all of it.
    for (offset, count) in [(0x4000, 0), (0x3FFF, 1), (1, 7), (0, 0x4000)] {
        let reply = rig.ask(Command::REGION_READ, access(offset, 0, count).as_bytes(), vec![]);
        assert_eq!(reply.unwrap().len(), 16 + count as usize);
    }
}

#[test]
fn a_client_is_not_given_more_than_it_takes() {
    let mut rig = Rig::new();
    let json = b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":0,\"max_data_xfer_size\":8}}\0";
    rig.ask(Command::VERSION, json, vec![]).unwrap();
    let access = |count| wire::RegionAccess { offset: 0, region: 0, count };
    assert!(rig.ask(Command::REGION_READ, access(8).as_bytes(), vec![]).is_ok());
    assert_eq!(rig.ask(Command::REGION_READ, access(9).as_bytes(), vec![]), Err(INVAL));
    // A region whose file it cannot take is not mappable for it.
    let request = wire::RegionInfo { argsz: 4096, ..Default::default() };
    let (reply, fd) =
        rig.ask_for(Command::DEVICE_GET_REGION_INFO, request.as_bytes(), vec![]).unwrap();
    assert_eq!((reply.len(), reply[4], fd.is_some()), (32, 3, false));
    let mut rig = Rig::negotiated();
    for (argsz, has_fd) in [(4096, true), (64, true), (63, false), (32, false)] {
        let request = wire::RegionInfo { argsz, ..Default::default() };
        let (_, fd) =
            rig.ask_for(Command::DEVICE_GET_REGION_INFO, request.as_bytes(), vec![]).unwrap();
        assert_eq!(fd.is_some(), has_fd);
    }
}

#[test]
fn writes_of_one_message_end_at_the_first_that_is_not_possible() {
    let mut rig = Rig::negotiated();
    rig.function.is_slow = true;
    let write = |offset: u64, region: u32, count: u32, data: u64| {
        let access = wire::RegionAccess { offset, region, count };
        [access.as_bytes(), &data.to_ne_bytes()].concat()
    };
    let multi =
        |writes: &[Vec<u8>]| [&(writes.len() as u64).to_ne_bytes()[..], &writes.concat()].concat();
    let good = [write(0, 0, 4, 0x0403_0201), write(0x10, 4, 8, 1), write(4, 0, 2, 0x0605)];
    let reply = rig.ask(Command::REGION_WRITE_MULTI, &multi(&good), vec![]);
    assert_eq!(reply, Ok(3u64.to_ne_bytes().to_vec()));
    assert_eq!(rig.function.bar0[..6], [1, 2, 3, 4, 5, 6]);
    assert_eq!(rig.calls().len(), 3);
    for bad in [write(0x4000, 0, 1, 0), write(0, 9, 1, 0), write(0, 0, 9, 0)] {
        let reply =
            rig.ask(Command::REGION_WRITE_MULTI, &multi(&[good[0].clone(), bad.clone()]), vec![]);
        assert_eq!(reply, Ok(1u64.to_ne_bytes().to_vec()));
        assert_eq!(rig.ask(Command::REGION_WRITE_MULTI, &multi(&[bad]), vec![]), Err(INVAL));
    }
    let mut short = multi(&good);
    short.pop();
    assert_eq!(rig.ask(Command::REGION_WRITE_MULTI, &short, vec![]), Err(INVAL));
    let mut more = multi(&good);
    more[0] = 4;
    assert_eq!(rig.ask(Command::REGION_WRITE_MULTI, &more, vec![]), Err(INVAL));
    more[..8].fill(0xFF);
    assert_eq!(rig.ask(Command::REGION_WRITE_MULTI, &more, vec![]), Err(INVAL));
}

#[test]
fn interrupts_are_set_masked_and_triggered_in_all_forms() {
    let mut rig = Rig::negotiated();
    let eventfds = |count| (0..count).map(|_| TestClient::eventfd()).collect::<Vec<_>>();
    let mine = TestClient::eventfd();
    let (none, bools, fds) = (1, 2, 4);
    let (mask, unmask, trigger) = (8, 16, 32);
    rig.irqs(fds | trigger, [2, 3, 1], &[], vec![mine.try_clone().unwrap()]).unwrap();
    rig.irqs(fds | trigger, [2, 7, 2], &[], eventfds(2)).unwrap();
    let set = |vector, is_set| Call::SetTrigger(Irq::Msix, vector, is_set);
    assert_eq!(rig.calls(), [set(3, true), set(7, true), set(8, true)]);
    rig.irqs(none | trigger, [2, 3, 2], &[], vec![]).unwrap();
    rig.irqs(bools | trigger, [2, 2, 3], &[0, 1, 0], vec![]).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&mine, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 2);
    let raised = |vector| Call::Trigger(Irq::Msix, vector);
    assert_eq!(rig.calls(), [raised(3), raised(4), raised(3)]);
    rig.irqs(none | mask, [0, 0, 1], &[], vec![]).unwrap();
    rig.irqs(bools | unmask, [0, 0, 1], &[1], vec![]).unwrap();
    let masked = |is_masked| Call::SetMasked(Irq::Intx, 0, is_masked);
    assert_eq!(rig.calls(), [masked(true), masked(false)]);
    // De-assigned: by no file, and all at once.
    rig.irqs(fds | trigger, [2, 7, 1], &[], vec![]).unwrap();
    assert_eq!(rig.calls(), [set(7, false)]);
    rig.irqs(none | trigger, [2, 0, 0], &[], vec![]).unwrap();
    assert_eq!(rig.calls().len(), 9);
    assert!(rig.function.triggers.is_empty());
    // A kernel that unmasks by itself.
    let resample = TestClient::eventfd();
    rig.irqs(fds | unmask, [0, 0, 1], &[], vec![resample]).unwrap();
    assert!(rig.session.unmask_eventfd().is_some());
    rig.session.on_unmask(&mut rig.function);
    assert_eq!(rig.calls(), [masked(false)]);
    rig.irqs(none | trigger, [0, 0, 0], &[], vec![]).unwrap();
    assert!(rig.session.unmask_eventfd().is_none());
    // The client's own: told of a failure, and asked to unplug.
    assert!(!rig.session.on_failed() && !rig.session.request_unplug());
    for index in [3, 4] {
        rig.irqs(fds | trigger, [index, 0, 1], &[], vec![mine.try_clone().unwrap()]).unwrap();
    }
    assert!(rig.session.on_failed() && rig.session.request_unplug());
    rig.irqs(none | trigger, [3, 0, 1], &[], vec![]).unwrap();
    rustix::io::read(&mine, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 3);
}

#[test]
fn interrupts_that_make_no_sense_are_refused_and_change_nothing() {
    let mut rig = Rig::negotiated();
    rig.calls();
    for (flags, which, data) in [
        (0x21, [2, 0, 10], 0),
        (0x21, [2, 9, 1], 0),
        (0x21, [2, u32::MAX, 2], 0),
        (0x21, [5, 0, 1], 0),
        (0x21, [1, 0, 1], 0),
        (0x21, [2, 1, 0], 0),
        (0x22, [2, 0, 0], 0),
        (0x24, [2, 0, 0], 0),
        (0x22, [2, 0, 3], 2),
        (0x20, [2, 0, 1], 0),
        (0x23, [2, 0, 1], 1),
        (0x01, [2, 0, 1], 0),
        (0x31, [2, 0, 1], 0),
        (0x61, [2, 0, 1], 0),
    ] {
        let result = rig.irqs(flags, which, &vec![1; data], vec![]);
        assert_eq!(result, Err(INVAL), "{flags:#x} {which:?}");
    }
    for (flags, index) in [(0x09, 3), (0x11, 4), (0x0C, 0), (0x14, 2)] {
        assert_eq!(rig.irqs(flags, [index, 0, 1], &[], vec![]), Err(95), "{flags:#x} {index}");
    }
    // Too few, too many, and not eventfds.
    for fds in [vec![TestClient::eventfd()], vec![memfd(1), memfd(1)]] {
        assert_eq!(rig.irqs(0x24, [2, 0, 2], &[], fds), Err(INVAL));
    }
    assert_eq!(rig.calls(), []);
    assert!(rig.function.triggers.is_empty());
}

#[test]
fn a_device_is_saved_and_restored() {
    for is_slow in [false, true] {
        let mut source = Rig::negotiated();
        source.function.is_slow = is_slow;
        for (at, byte) in source.function.bar0.iter_mut().enumerate() {
            *byte = at as u8;
        }
        let read = |rig: &mut Rig, size: u32| {
            let request = wire::MigData { argsz: 8 + size, size };
            rig.ask(Command::MIG_DATA_READ, request.as_bytes(), vec![])
        };
        assert_eq!(read(&mut source, 10), Err(INVAL), "not while it runs");
        source.migrate(State::STOP_COPY).unwrap();
        assert!(!source.function.is_running);
        assert_eq!(read(&mut source, wire::DATA_BYTES_MAX as u32 + 1), Err(INVAL));
        let mut stream = Vec::new();
        loop {
            let reply = read(&mut source, 5000).unwrap();
            let (header, data) = wire::MigData::read_from_prefix(&reply).unwrap();
            assert_eq!((header.size as usize, header.argsz as usize), (data.len(), reply.len()));
            stream.extend_from_slice(data);
            if data.len() < 5000 {
                break;
            }
        }
        let mut target = Rig::negotiated();
        target.function.is_slow = is_slow;
        let write = |rig: &mut Rig, data: &[u8]| {
            let request = wire::MigData { argsz: 8, size: data.len() as u32 };
            rig.ask(Command::MIG_DATA_WRITE, &[request.as_bytes(), data].concat(), vec![])
        };
        assert_eq!(write(&mut target, &stream), Err(INVAL), "not while it runs");
        target.migrate(State::RESUMING).unwrap();
        for part in stream.chunks(7000) {
            assert_eq!(write(&mut target, part), Ok(vec![]));
        }
        target.migrate(State::RUNNING).unwrap();
        assert!(target.function.is_running);
        assert_eq!(target.function.bar0, source.function.bar0);
        // The source goes on if the migration is given up.
        source.migrate(State::RUNNING).unwrap();
        assert!(source.function.is_running);
        assert_eq!(read(&mut source, 10), Err(INVAL));
        assert_eq!(source.state(), State::RUNNING);
    }
}

#[test]
fn a_state_that_is_not_whole_is_an_error_that_a_reset_ends() {
    let sealed = migration::seal(&vec![5; 0x4000]);
    let foreign = migration::seal(b"short");
    for stream in [&[][..], &sealed[..100], &foreign] {
        let mut rig = Rig::negotiated();
        rig.function.is_slow = true;
        rig.migrate(State::RESUMING).unwrap();
        let request = wire::MigData { argsz: 8, size: stream.len() as u32 };
        rig.ask(Command::MIG_DATA_WRITE, &[request.as_bytes(), stream].concat(), vec![]).unwrap();
        assert_eq!(rig.migrate(State::RUNNING), Err(INVAL));
        assert_eq!(rig.state(), State::ERROR);
        assert_eq!(rig.migrate(State::RUNNING), Err(INVAL));
        rig.ask(Command::DEVICE_RESET, &[], vec![]).unwrap();
        assert_eq!((rig.state(), rig.function.is_running), (State::RUNNING, true));
    }
    // And one without an end is not collected for ever.
    let mut rig = Rig::negotiated();
    rig.migrate(State::RESUMING).unwrap();
    let data = vec![0; wire::DATA_BYTES_MAX];
    let request = wire::MigData { argsz: 8, size: data.len() as u32 };
    let payload = [request.as_bytes(), &data].concat();
    let parts = migration::STATE_BYTES_MAX / data.len();
    for _ in 0..parts {
        rig.ask(Command::MIG_DATA_WRITE, &payload, vec![]).unwrap();
    }
    assert_eq!(rig.ask(Command::MIG_DATA_WRITE, &payload, vec![]), Err(28));
}

#[test]
fn features_are_probed_and_refused_truthfully() {
    let mut rig = Rig::negotiated();
    for (feature, methods) in
        [(1, GET), (2, GET), (2, SET), (2, GET | SET), (6, SET), (7, SET), (8, GET)]
    {
        assert!(rig.feature(PROBE | methods | feature, &[]).is_ok());
    }
    for (feature, methods) in [(0, GET), (1, SET), (6, GET), (7, GET), (8, SET), (9, GET), (99, 0)]
    {
        assert_eq!(rig.feature(PROBE | methods | feature, &[]), Err(25), "{feature}");
        assert_eq!(rig.feature(methods | feature, &[0; 64]), Err(25), "{feature}");
    }
    for flags in [GET | SET | 2, 2, 1, 1 << 19 | GET | 1] {
        assert_eq!(rig.feature(flags, &[0; 64]), Err(INVAL), "{flags:#x}");
    }
    for state in [0, 5, 6, 7, 8, u32::MAX] {
        assert_eq!(rig.migrate(State(state)), Err(INVAL));
    }
    assert_eq!(rig.feature(SET | 2, &[0; 7]), Err(INVAL));
    assert_eq!(rig.feature(SET | 7, &[]), Err(INVAL), "nothing is logged");
    assert_eq!(rig.calls(), []);
}

#[test]
fn pages_written_to_are_reported_once() {
    let mut rig = Rig::negotiated();
    rig.function.is_slow = true;
    rig.map(0x10_0000, 64 * PAGE).unwrap();
    let start = |page_size: u64, ranges: &[(u64, u64)]| {
        let control =
            wire::LoggingControl { page_size, num_ranges: ranges.len() as u32, reserved: 0 };
        let ranges: Vec<u8> = ranges
            .iter()
            .flat_map(|&(iova, length)| wire::LoggingRange { iova, length }.as_bytes().to_vec())
            .collect();
        [control.as_bytes(), &ranges].concat()
    };
    let report = |iova, length, page_size| {
        wire::LoggingReport { iova, length, page_size }.as_bytes().to_vec()
    };
    assert_eq!(rig.feature(GET | 8, &report(0, PAGE, PAGE)), Err(INVAL), "not yet");
    assert_eq!(rig.feature(SET | 6, &start(PAGE, &[(0, 0)])), Err(INVAL));
    assert_eq!(rig.feature(SET | 6, &start(PAGE, &[(0, 10), (5, 10)])), Err(INVAL));
    let reply = rig.feature(SET | 6, &start(512, &[(0x10_0000, 64 * PAGE)])).unwrap();
    assert_eq!(reply[8..16], PAGE.to_ne_bytes(), "the page size that was taken");
    assert_eq!(rig.feature(SET | 6, &start(PAGE, &[(0, PAGE)])), Err(16));
    let log = rig.function.log.clone().unwrap();
    log.mark(0x10_0000 + 3 * PAGE + 5, PAGE);
    log.mark(0x10_0000 + 63 * PAGE, 1);
    let bitmap = |reply: Vec<u8>| u64::from_ne_bytes(reply[32..40].try_into().unwrap());
    let all = report(0x10_0000, 64 * PAGE, PAGE);
    // Half of a page asked for is told, and stays marked.
    let half = rig.feature(GET | 8, &report(0x10_0000 + 3 * PAGE, 2048, 2048)).unwrap();
    assert_eq!(bitmap(half), 1);
    let reply = rig.feature(GET | 8, &all).unwrap();
    assert_eq!((reply.len(), bitmap(reply)), (40, 1 << 3 | 1 << 4 | 1 << 63));
    assert_eq!(bitmap(rig.feature(GET | 8, &all).unwrap()), 0);
    log.mark(0x10_0000 + 10 * PAGE, 1);
    let coarse = rig.feature(GET | 8, &report(0x10_0000, 64 * PAGE, 8 * PAGE)).unwrap();
    assert_eq!(bitmap(coarse), 1 << 1);
    for bad in
        [report(0, 0, PAGE), report(u64::MAX, 2, PAGE), report(0, PAGE, 0), report(0, PAGE, 3)]
    {
        assert_eq!(rig.feature(GET | 8, &bad), Err(INVAL));
    }
    assert_eq!(rig.feature(GET | 8, &report(0, u64::MAX, 1)), Err(INVAL), "too long a bitmap");
    let header = wire::DeviceFeature { argsz: 39, flags: GET | 8 };
    let payload = [header.as_bytes(), &all].concat();
    assert_eq!(rig.ask(Command::DEVICE_FEATURE, &payload, vec![]), Err(INVAL), "too little room");
    rig.feature(SET | 7, &[]).unwrap();
    assert!(rig.function.log.is_none());
    // Everything.
    rig.feature(SET | 6, &start(PAGE, &[])).unwrap();
    rig.function.log.clone().unwrap().mark(0x10_0000, 1);
    assert_eq!(bitmap(rig.feature(GET | 8, &all).unwrap()), 1);
}

/// The value after a word of a trace line.
fn value(line: &str, name: &str) -> u64 {
    let mut words = line.split(' ').skip_while(|word| *word != name);
    let text = words.nth(1).unwrap_or_else(|| panic!("{name} in {line}"));
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

/// From power-on of a guest to its power-off; where the lines are from stands in the file.
#[test]
fn what_qemu_did_in_a_guests_life_is_done() {
    const RAM_BYTES: u64 = 1 << 30;
    let mut rig = Rig::negotiated();
    rig.map(0, RAM_BYTES).unwrap();
    let ram = memfd(RAM_BYTES);
    let trace = include_str!("../../../testdata/qemu-11.1.3-trace.txt");
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        let index = || value(line, "index") as u32;
        let flags = value(line, "flags") as u32;
        match line.split(' ').next().unwrap() {
            "get_region_info" => {
                let request = wire::RegionInfo { argsz: 32, index: index(), ..Default::default() };
                let reply = rig.ask(Command::DEVICE_GET_REGION_INFO, request.as_bytes(), vec![]);
                assert!(reply.is_ok(), "{line}");
            }
            "get_irq_info" => {
                let request = wire::IrqInfo { argsz: 16, index: index(), ..Default::default() };
                let reply = rig.ask(Command::DEVICE_GET_IRQ_INFO, request.as_bytes(), vec![]);
                assert_eq!(reply.unwrap()[4] & 1, flags as u8, "eventfds: {line}");
            }
            "set_irqs" => {
                let count = value(line, "count") as u32;
                let which = [index(), value(line, "start") as u32, count];
                let eventfds = if flags & 4 == 0 { 0 } else { count };
                let fds = (0..eventfds).map(|_| TestClient::eventfd()).collect();
                assert_eq!(rig.irqs(flags, which, &[], fds), Ok(()), "{line}");
            }
            "dma_map" => {
                let (address, size) = (value(line, "iova"), value(line, "size"));
                let offset = value(line, "off");
                let request = wire::DmaMap { argsz: 32, flags, offset, address, size };
                // ROMs and the doorbell page come without a file.
                let is_ram = address < RAM_BYTES && (flags == 3 || offset > 0);
                let fds = if is_ram { vec![ram.try_clone().unwrap()] } else { vec![] };
                let reply = rig.ask(Command::DMA_MAP, request.as_bytes(), fds);
                assert_eq!(reply, Ok(vec![]), "{line}");
            }
            "dma_unmap" => {
                let result = rig.unmap(value(line, "iova"), value(line, "size"));
                assert_eq!(result, Ok(()), "{line}");
            }
            _ => panic!("{line}"),
        }
    }
    let maps: Vec<(u64, u64, bool)> = rig
        .session
        .table
        .iter()
        .map(|map| (map.request.address, map.request.size, map.file.is_some()))
        .collect();
    let expected = [
        (0, 0xC_3000, true),
        (0xC_3000, 0x2_5000, true),
        (0xE_8000, 0x8000, true),
        (0xF_0000, 0x1_0000, true),
        (0x10_0000, 0x3FF0_0000, true),
        (0xFEBF_1000, 0x1000, false),
    ];
    assert_eq!(maps, expected);
    assert_eq!(rig.function.triggers.keys().collect::<Vec<_>>(), [&(0, 0)]);
}

/// What is worth comparing of a session.
fn picture(rig: &Rig) -> (Vec<u8>, Vec<u64>) {
    let exported = rig.session.export();
    (exported.bytes, exported.fds.iter().map(|(key, _)| *key).collect())
}

fn dup_all(exported: &Exported<'_>) -> BTreeMap<u64, OwnedFd> {
    exported.fds.iter().map(|(key, fd)| (*key, fd.try_clone_to_owned().unwrap())).collect()
}

#[test]
fn a_session_goes_on_in_another_process() {
    for is_slow in [false, true] {
        let mut rig = Rig::negotiated();
        let file = memfd(4 * PAGE);
        let request =
            wire::DmaMap { argsz: 32, flags: 3, offset: PAGE, address: 0x8000, size: PAGE };
        rig.ask(Command::DMA_MAP, request.as_bytes(), vec![file.try_clone().unwrap()]).unwrap();
        let rom = wire::DmaMap { argsz: 32, flags: 1, offset: 0, address: 0xC_0000, size: PAGE };
        rig.ask(Command::DMA_MAP, rom.as_bytes(), vec![]).unwrap();
        let mine = TestClient::eventfd();
        rig.irqs(0x24, [2, 5, 1], &[], vec![mine.try_clone().unwrap()]).unwrap();
        rig.irqs(0x24, [3, 0, 1], &[], vec![mine.try_clone().unwrap()]).unwrap();
        rig.irqs(0x14, [0, 0, 1], &[], vec![mine.try_clone().unwrap()]).unwrap();
        let control = wire::LoggingControl { page_size: PAGE, num_ranges: 1, reserved: 0 };
        let range = wire::LoggingRange { iova: 0x8000, length: PAGE };
        rig.feature(SET | 6, &[control.as_bytes(), range.as_bytes()].concat()).unwrap();

        let exported = rig.session.export();
        let (bytes, mut fds) = (exported.bytes.clone(), dup_all(&exported));
        let mut function = ModelFunction::default();
        function.is_slow = is_slow;
        let (session, outcome) = Session::import(&bytes, &mut fds, &mut function).unwrap();
        assert!(fds.is_empty());
        let mut successor = Rig { session, function };
        assert_eq!(matches!(outcome, Outcome::Pending), is_slow);
        while successor.session.is_pending() {
            successor.function.can_finish = true;
            assert_eq!(successor.function.poll(), Some(Event::Done));
            let _ = successor.session.on_done(&mut successor.function);
        }
        successor.function.can_finish = false;
        assert_eq!(picture(&successor), picture(&rig));
        // Memory is the same, eventfds are the same, and every page counts as dirty.
        successor.function.memory.view().write(0x8000, b"here").unwrap();
        let mut text = [0; 4];
        rustix::io::pread(&file, &mut text, PAGE).unwrap();
        assert_eq!(&text, b"here");
        successor.function.raise(Irq::Msix, 5);
        assert!(successor.session.on_failed());
        let mut count = [0; 8];
        rustix::io::read(&mine, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
        let report = wire::LoggingReport { iova: 0x8000, length: PAGE, page_size: PAGE };
        let reply = successor.feature(GET | 8, report.as_bytes()).unwrap();
        assert_eq!(reply[32], 1);
        // New files get new keys.
        successor.map(0x10_0000, PAGE).unwrap();
        let keys = picture(&successor).1;
        assert_eq!(keys.iter().collect::<std::collections::BTreeSet<_>>().len(), keys.len());
    }
}

#[test]
fn a_migration_does_not_survive_and_says_so() {
    let mut rig = Rig::negotiated();
    rig.migrate(State::STOP_COPY).unwrap();
    let exported = rig.session.export();
    let mut fds = dup_all(&exported);
    let mut function = ModelFunction::default();
    let (session, _) = Session::import(&exported.bytes, &mut fds, &mut function).unwrap();
    let mut successor = Rig { session, function };
    assert!(!successor.function.is_running, "it stays stopped");
    assert_eq!(successor.state(), State::ERROR);
    successor.ask(Command::DEVICE_RESET, &[], vec![]).unwrap();
    assert!(successor.function.is_running);
}

#[test]
fn a_message_that_is_given_again_has_effect_once() {
    let mut rig = Rig::negotiated();
    let map = wire::DmaMap { argsz: 32, flags: 3, offset: 0, address: 0, size: PAGE };
    let unmap = wire::DmaUnmap { argsz: 24, flags: 0, address: 0, size: PAGE };
    for (command, payload, fds) in [
        (Command::DMA_MAP, map.as_bytes(), vec![memfd(PAGE)]),
        (Command::DMA_UNMAP, unmap.as_bytes(), vec![]),
        (Command::DEVICE_RESET, &[], vec![]),
    ] {
        let again = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let first = rig.ask(command, payload, fds).unwrap();
        let before = picture(&rig);
        let message = Rig::message(command, payload, again);
        let outcome = rig.session.on_message_again(message, &mut rig.function);
        assert_eq!(rig.finish(command, outcome).unwrap().0, first);
        assert_eq!(picture(&rig), before);
    }
    // Once only: the next of its kind is judged as any other.
    assert_eq!(rig.unmap(0, PAGE), Err(2));
}

proptest! {
    #[test]
    fn an_export_is_taken_up_whole_or_refused(cut in 0usize..400, flip in 0usize..400) {
        let mut rig = Rig::negotiated();
        rig.map(0x1000, PAGE).unwrap();
        rig.irqs(0x24, [2, 0, 1], &[], vec![TestClient::eventfd()]).unwrap();
        let exported = rig.session.export();
        let import = |bytes: &[u8]| {
            let mut fds = dup_all(&exported);
            Session::import(bytes, &mut fds, &mut ModelFunction::default()).map(drop)
        };
        prop_assert_eq!(import(&exported.bytes), Ok(()));
        if cut < exported.bytes.len() {
            prop_assert!(import(&exported.bytes[..cut]).is_err());
        }
        // Damage is not always noticed, but never a panic.
        let mut bytes = exported.bytes.clone();
        let at = flip % bytes.len();
        bytes[at] ^= 0x55;
        let _ = import(&bytes);
        prop_assert!(Session::import(&exported.bytes, &mut BTreeMap::new(), &mut ModelFunction::default()).is_err());
    }

    /// Against a model of a few lines: which maps there are.
    #[test]
    fn the_memory_is_what_was_mapped_and_not_unmapped(
        steps in vec((any::<bool>(), 0u64..12, 1u64..4, any::<bool>()), 1..60),
        is_slow: bool,
    ) {
        let mut rig = Rig::negotiated();
        rig.function.is_slow = is_slow;
        let mut model: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        for (is_map, page, pages, has_file) in steps {
            let (address, size) = (page * PAGE, pages * PAGE);
            if is_map {
                let request = wire::DmaMap { argsz: 32, flags: 3, offset: 0, address, size };
                let fds = if has_file { vec![memfd(size)] } else { vec![] };
                let result = rig.ask(Command::DMA_MAP, request.as_bytes(), fds).map(drop);
                let is_free = model.iter().all(|(at, (len, _))| at + len <= address || *at >= address + size);
                prop_assert_eq!(result, if is_free { Ok(()) } else { Err(17) });
                if is_free {
                    model.insert(address, (size, has_file));
                }
            } else {
                let is_there = model.get(&address).is_some_and(|map| map.0 == size);
                prop_assert_eq!(rig.unmap(address, size), if is_there { Ok(()) } else { Err(2) });
                if is_there {
                    model.remove(&address);
                }
            }
            let regions: Vec<(u64, u64)> =
                rig.function.memory.regions().iter().map(|r| (r.guest_addr(), r.len())).collect();
            let expected: Vec<(u64, u64)> =
                model.iter().filter(|map| map.1.1).map(|(at, map)| (*at, map.0)).collect();
            prop_assert_eq!(regions, expected);
            prop_assert_eq!(rig.session.maps(), model.len());
        }
    }

    #[test]
    fn any_payload_of_any_command_is_answered(
        messages in vec((0u16..20, vec(any::<u8>(), 0..80), 0usize..3, any::<bool>()), 0..40),
        is_slow: bool,
    ) {
        let mut rig = Rig::negotiated();
        rig.function.is_slow = is_slow;
        for (command, payload, fds, no_reply) in messages {
            let fds = (0..fds).map(|n| if n == 0 { memfd(PAGE) } else { TestClient::eventfd() }).collect();
            let message = Message { no_reply, ..Rig::message(Command(command), &payload, fds) };
            let mut outcome = rig.session.on_message(message, &mut rig.function);
            while matches!(outcome, Outcome::Pending) {
                rig.function.can_finish = true;
                prop_assert_eq!(rig.function.poll(), Some(Event::Done));
                rig.function.can_finish = false;
                outcome = rig.session.on_done(&mut rig.function);
            }
            prop_assert_eq!(matches!(outcome, Outcome::Silent), no_reply);
        }
    }
}
