//! A vfio-user client sends hostile bytes and file descriptors.
//!
//! Invariants checked: no panic; messages are the same however the stream is cut; every message that
//! wants a reply has exactly one, with its id and command, and an error has nothing but a header; the
//! function is never called outside its regions and vectors, nor while it is at work (it checks that
//! itself); the memory it is given is what is mapped; and the session goes on the same from its own
//! export.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use libfuzzer_sys::fuzz_target;
use nvme_pci::function::Function;
use nvme_pci::testing::{ModelFunction, TestClient, memfd};
use nvme_pci::vfio_user::session::{Outcome, Session};
use nvme_pci::vfio_user::wire::{self, Command, Decoder, Header, Message, WireFault};
use penstock_fuzz::{Input, cut};
use zerocopy::FromBytes;

/// What a client would pass: made once, as it is not what is tested.
struct Files {
    memory: OwnedFd,
    event: OwnedFd,
}

thread_local! {
    static FILES: RefCell<Option<Files>> = const { RefCell::new(None) };
}

fn file(is_event: bool) -> Option<OwnedFd> {
    FILES.with_borrow_mut(|files| {
        let files = files.get_or_insert_with(|| Files {
            memory: memfd(1 << 16),
            event: TestClient::eventfd(),
        });
        if is_event { files.event.try_clone().ok() } else { files.memory.try_clone().ok() }
    })
}

/// The stream as messages, and where it ends.
type Decoded = (Vec<(u16, u16, bool, Vec<u8>)>, Option<WireFault>);

fn decode(stream: &[u8], seed: u64, piece_max: usize) -> Decoded {
    let (mut decoder, mut messages, mut fault) = (Decoder::new(), Vec::new(), None);
    cut(stream, seed, piece_max, |mut piece| {
        while !piece.is_empty() {
            assert!(decoder.wanted() > 0);
            match decoder.push(&mut piece) {
                Ok(Some(Message { id, command, no_reply, payload, .. })) => {
                    messages.push((id, command.0, no_reply, payload));
                }
                Ok(None) => assert!(piece.is_empty()),
                Err(error) => {
                    fault = Some(error);
                    return false;
                }
            }
        }
        true
    });
    (messages, fault)
}

/// Bytes of a client that mostly keeps to the protocol.
fn plausible(input: &mut Input<'_>) -> Vec<u8> {
    let command = Command(u16::from(input.byte()) % 20);
    let shape = input.byte();
    let small = |input: &mut Input<'_>| u32::from(input.byte() % 16).to_ne_bytes();
    let mut payload = match command {
        Command::VERSION => {
            let json: &[u8] = match shape % 3 {
                0 => b"",
                1 => b"{\"capabilities\":{\"max_msg_fds\":16,\"write_multiple\":true}}\0",
                _ => b"{\"capabilities\":{\"max_data_xfer_size\":100}}\0",
            };
            [&[0; 4], json].concat()
        }
        Command::DMA_MAP | Command::DMA_UNMAP => {
            let mut payload = vec![0; if command == Command::DMA_MAP { 32 } else { 24 }];
            let at = payload.len() - 16;
            payload[4] = input.byte() & 3;
            // A few pages, so that maps meet.
            payload[at + 1] = input.byte() & 0xF0;
            payload[at + 9] = input.byte() & 0xF0;
            payload
        }
        Command::DEVICE_SET_IRQS => {
            let flags = 1u32 << (shape % 4) | 8 << (shape >> 4 & 3);
            let mut payload = [[20, 0, 0, 0], flags.to_ne_bytes()].concat();
            for _ in 0..3 {
                payload.extend(small(input));
            }
            payload.extend(input.take(usize::from(shape % 16)));
            payload
        }
        Command::REGION_READ | Command::REGION_WRITE => {
            let mut payload = vec![0; 8];
            payload[0] = input.byte();
            payload[1] = input.byte();
            payload.extend(small(input));
            let count = input.byte() % 9;
            payload.extend(u32::from(count).to_ne_bytes());
            if command == Command::REGION_WRITE {
                payload.extend(vec![shape; usize::from(count)]);
            }
            payload
        }
        Command::REGION_WRITE_MULTI => {
            let count = shape % 4;
            let mut payload = u64::from(count).to_ne_bytes().to_vec();
            for _ in 0..count {
                payload.extend([input.byte(), input.byte(), 0, 0, 0, 0, 0, 0]);
                payload.extend(small(input));
                payload.extend(small(input));
                payload.extend([shape; 8]);
            }
            payload
        }
        Command::DEVICE_FEATURE => {
            let flags = u32::from(shape % 10) | 1 << (16 + input.byte() % 3);
            let mut payload = [[0, 0, 1, 0], flags.to_ne_bytes()].concat();
            match shape % 10 {
                2 => payload.extend([small(input), [0; 4]].concat()),
                6 => {
                    payload.extend(4096u64.to_ne_bytes());
                    payload.extend([[1, 0, 0, 0], [0; 4]].concat());
                    payload.extend([0u64, 1 << 20].map(u64::to_ne_bytes).concat());
                }
                _ => payload.extend([0u64, 1 << 20, 4096].map(u64::to_ne_bytes).concat()),
            }
            payload
        }
        Command::MIG_DATA_READ => [[0, 1, 0, 0], small(input)].concat(),
        Command::MIG_DATA_WRITE => {
            let data = input.take(usize::from(shape % 32));
            let len = (data.len() as u32).to_ne_bytes();
            [&[0; 4], &len[..], data].concat()
        }
        Command::DEVICE_RESET => vec![],
        _ => {
            let mut payload = vec![0; 32];
            payload[0] = 64;
            payload[8] = shape % 10;
            payload
        }
    };
    // A few bytes of it are the fuzzer's.
    for _ in 0..input.byte() % 3 {
        let (at, byte) = (usize::from(input.byte()), input.byte());
        if let Some(to) = payload.get_mut(at) {
            *to = byte;
        }
    }
    wire::command(u16::from(shape), command, shape & 0x40 != 0, &[&payload])
}

struct Judge {
    session: Session,
    function: ModelFunction,
}

impl Judge {
    fn finish(&mut self, mut outcome: Outcome) -> Outcome {
        while matches!(outcome, Outcome::Pending) {
            assert!(self.session.is_pending() && self.function.poll().is_none());
            self.function.can_finish = true;
            assert!(self.function.poll().is_some());
            self.function.can_finish = false;
            outcome = self.session.on_done(&mut self.function);
        }
        outcome
    }

    fn message(&mut self, message: Message) {
        let (id, command, no_reply) = (message.id, message.command, message.no_reply);
        let outcome = self.session.on_message(message, &mut self.function);
        match self.finish(outcome) {
            Outcome::Reply(reply) => {
                assert!(!no_reply);
                let (header, _) = Header::read_from_prefix(&reply.bytes).expect("a header");
                assert_eq!((header.id, header.command), (id, command.0));
                assert_eq!(header.size as usize, reply.bytes.len());
                let outcome = wire::reply_outcome(&header).expect("a reply");
                assert!(outcome.is_ok() || reply.bytes.len() == wire::HEADER_BYTES);
            }
            Outcome::Silent => assert!(no_reply),
            Outcome::Pending => unreachable!("it was finished"),
        }
        assert!(self.function.memory.regions().len() <= self.session.maps());
        self.function.calls.clear();
    }

    /// As another process would go on.
    fn move_on(&mut self) {
        let exported = self.session.export();
        let mut fds = BTreeMap::new();
        for (key, fd) in &exported.fds {
            let Ok(fd) = fd.try_clone_to_owned() else { return };
            assert!(fds.insert(*key, fd).is_none(), "a key for each");
        }
        let bytes = exported.bytes;
        let mut function = ModelFunction::default();
        function.is_slow = self.function.is_slow;
        let imported = Session::import(&bytes, &mut fds, &mut function);
        let (session, outcome) = imported.expect("our own export");
        assert!(fds.is_empty());
        (self.session, self.function) = (session, function);
        let outcome = self.finish(outcome);
        assert!(matches!(outcome, Outcome::Silent));
        self.function.calls.clear();
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let seed = u64::from(input.byte());
    let shape = input.byte();
    let mut function = ModelFunction::default();
    function.is_slow = shape & 8 != 0;
    let mut judge = Judge { session: Session::new(&function), function };
    let mut decoder = Decoder::new();
    let mut stream = Vec::new();
    if shape & 16 == 0 {
        stream = wire::command(0, Command::VERSION, false, &[&[0; 4]]);
        let message = decoder.push(&mut stream.as_slice()).expect("a version").expect("all of it");
        judge.message(message);
    }
    while !input.is_empty() {
        let bytes =
            if shape & 7 == 0 { input.take(64).to_vec() } else { plausible(&mut input) };
        stream.extend_from_slice(&bytes);
        let fds = input.byte();
        for i in 0..(fds & 3).min(fds >> 4) {
            let Some(fd) = file(fds >> 2 & 1 == i & 1) else { return };
            if decoder.push_fds([fd]).is_err() {
                return;
            }
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match decoder.push(&mut rest) {
                Ok(Some(message)) => judge.message(message),
                Ok(None) => {}
                // An error would end the connection.
                Err(_) => {
                    assert_eq!(decode(&stream, seed, 5), decode(&stream, 0, usize::MAX));
                    return;
                }
            }
        }
        if fds & 8 != 0 {
            judge.move_on();
        }
    }
    assert_eq!(decode(&stream, seed, 5), decode(&stream, 0, usize::MAX));
});
