//! Both machines back to back over a stream that is cut at random, against a model disk.
//!
//! Each driver below does only what follows from the events it has seen (and, when nothing moves
//! any more, what it has put off). So the two streams and the two lists of events must be the same
//! however the streams are cut, which is the property tested, along with every read being right.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// Commands outstanding at most; each cid has its own part of the disk, so that commands that are
/// outstanding together do not overlap and the model knows what a read must give.
const QUEUE_DEPTH: u16 = 4;
const PART_BYTES: usize = 12288;

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
/// Refused by the target as soon as it sees the command, whatever data is still to come.
const BAD: u8 = 0xee;
const STATUS_INVALID_OPCODE: u16 = 0x0001;

/// Small and seeded: decisions of the drivers and of the network.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        ((self.0 >> 33) as usize) % below.max(1)
    }

    /// Bytes of the next piece of `left`: a multiple of 4, or all.
    fn piece(&mut self, left: u32, max: u32) -> u32 {
        match self.next(3) {
            0 => left.min(max),
            _ => (4 * (1 + self.next(2000) as u32)).min(left).min(max & !3),
        }
    }
}

/// What both drivers keep of an event, without payload and slot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note(String);

/// The bytes on their way in one direction, and all that ever were.
#[derive(Default)]
struct Pipe {
    queued: VecDeque<u8>,
    all: Vec<u8>,
}

impl Pipe {
    fn send(&mut self, parts: &[&[u8]]) {
        for part in parts {
            self.queued.extend(*part);
            self.all.extend(*part);
        }
    }
}

fn digest_of(on: bool, data: &[u8]) -> Vec<u8> {
    if on { Crc32c::of(data).to_vec() } else { Vec::new() }
}

fn range(offset: u32, len: u32) -> std::ops::Range<usize> {
    offset as usize..(offset + len) as usize
}

/// A controller with a disk in memory.
struct Controller {
    target: Target,
    random: Random,
    disk: Vec<u8>,
    /// The command in each slot.
    commands: Vec<Served>,
    work: Vec<Work>,
    notes: Vec<Note>,
}

/// What the controller keeps of a command.
#[derive(Clone, Default)]
struct Served {
    /// Where its part of the disk starts.
    part: usize,
    data: Vec<u8>,
    /// Bytes of `data` that have been asked for by R2T, or that came in the capsule.
    asked: u32,
}

enum Work {
    Send { slot: u16, done: u32 },
    Ask { slot: u16 },
    Respond { slot: u16, status: u16 },
}

impl Controller {
    fn new(config: TargetConfig, seed: u64) -> Self {
        Self {
            commands: vec![Served::default(); usize::from(config.slots)],
            target: Target::new(config),
            random: Random(seed),
            disk: vec![0; PART_BYTES * usize::from(QUEUE_DEPTH)],
            work: Vec::new(),
            notes: Vec::new(),
        }
    }

    fn respond(&mut self, slot: u16, status: u16, out: &mut Pipe) {
        let mut cqe = [0; 16];
        cqe[14..].copy_from_slice(&(status << 1).to_le_bytes());
        out.send(&[&self.target.response(slot, &cqe)]);
        self.target.release(slot);
    }

    /// Reads all of `bytes`.
    fn receive(&mut self, mut bytes: &[u8], out: &mut Pipe) -> Result<(), Fault> {
        while let Some(event) = self.target.next(&mut bytes)? {
            match event {
                TargetEvent::Initialized { reply } => {
                    self.notes.push(Note("initialized".into()));
                    out.send(&[&reply]);
                }
                TargetEvent::Command { slot, sqe, in_capsule_len } => {
                    self.notes.push(Note(format!("command {slot} {in_capsule_len} {sqe:?}")));
                    self.on_command(slot, &sqe, in_capsule_len, out);
                }
                TargetEvent::Data { slot, offset, bytes } => {
                    let data = &mut self.commands[usize::from(slot)].data;
                    data[range(offset, bytes.len() as u32)].copy_from_slice(bytes);
                    continue;
                }
                TargetEvent::DataEnd { slot } => {
                    self.notes.push(Note(format!("end {slot}")));
                    self.on_data_end(slot);
                }
                TargetEvent::DataDigestError { slot } => {
                    self.notes.push(Note(format!("digest error {slot}")));
                    self.work.push(Work::Respond { slot, status: 0x22 });
                }
                TargetEvent::Terminated { fes } => {
                    self.notes.push(Note(format!("terminated {fes}")));
                }
            }
            for _ in 0..self.random.next(3) {
                self.step(out);
            }
        }
        assert!(bytes.is_empty());
        Ok(())
    }

    fn on_command(&mut self, slot: u16, sqe: &[u8; 64], in_capsule_len: u32, out: &mut Pipe) {
        let len = u32::from_le_bytes([sqe[32], sqe[33], sqe[34], sqe[35]]);
        let part = usize::from(sqe[40] % QUEUE_DEPTH as u8) * PART_BYTES;
        // Junk may ask for anything.
        let too_long = len.max(in_capsule_len) as usize > PART_BYTES;
        let capsule_wrong = in_capsule_len > 0 && (sqe[0] != WRITE || in_capsule_len != len);
        self.commands[usize::from(slot)] =
            Served { part, data: vec![0; len as usize % (PART_BYTES + 1)], asked: in_capsule_len };
        match sqe[0] {
            _ if too_long || capsule_wrong => self.respond(slot, STATUS_INVALID_OPCODE, out),
            FLUSH => self.work.push(Work::Respond { slot, status: 0 }),
            WRITE if in_capsule_len > 0 => {}
            WRITE if len > 0 => self.work.push(Work::Ask { slot }),
            READ if len > 0 => self.work.push(Work::Send { slot, done: 0 }),
            _ => self.respond(slot, STATUS_INVALID_OPCODE, out),
        }
    }

    fn on_data_end(&mut self, slot: u16) {
        let Served { part, data, asked } = &self.commands[usize::from(slot)];
        if (*asked as usize) < data.len() {
            self.work.push(Work::Ask { slot });
            return;
        }
        self.disk[*part..*part + data.len()].copy_from_slice(data);
        self.work.push(Work::Respond { slot, status: 0 });
    }

    /// One piece of the work put off, picked at random.
    fn step(&mut self, out: &mut Pipe) {
        if self.work.is_empty() {
            return;
        }
        let pick = self.random.next(self.work.len());
        match self.work.swap_remove(pick) {
            Work::Respond { slot, status } => self.respond(slot, status, out),
            Work::Ask { slot } => {
                let Served { data, asked, .. } = &mut self.commands[usize::from(slot)];
                let len = self.random.piece(data.len() as u32 - *asked, u32::MAX);
                out.send(&[&self.target.r2t(slot, *asked, len)]);
                *asked += len;
            }
            Work::Send { slot, done } => {
                let Served { part, data, .. } = &self.commands[usize::from(slot)];
                let len = self.random.piece(data.len() as u32 - done, u32::MAX);
                let last = done + len == data.len() as u32;
                let success = last && self.random.next(2) == 0;
                let head = self.target.c2h_data(slot, done, len, last, success);
                let piece = &self.disk[*part..][range(done, len)];
                out.send(&[&head, piece, &digest_of(self.target.data_digest(), piece)]);
                match (last, success) {
                    (false, _) => self.work.push(Work::Send { slot, done: done + len }),
                    (true, false) => self.work.push(Work::Respond { slot, status: 0 }),
                    (true, true) => self.target.release(slot),
                }
            }
        }
    }
}

/// One command of a scenario. Lengths are cut to what the operation allows.
#[derive(Clone, Debug)]
struct Wish {
    opcode: u8,
    len: u32,
    fill: u8,
    in_capsule: bool,
}

impl Wish {
    fn data(&self) -> Vec<u8> {
        (0..self.len).map(|i| self.fill.wrapping_add((i / 3) as u8)).collect()
    }
}

/// A host that works off a list of wishes and checks what it reads.
struct Initiator {
    host: Host,
    random: Random,
    in_capsule_max: u32,
    wishes: VecDeque<Wish>,
    free: Vec<u16>,
    running: Vec<Option<(Wish, Vec<u8>)>>,
    /// What the controller's disk must hold.
    model: Vec<u8>,
    /// R2Ts to answer: cid, ttag, next offset, end.
    asked: Vec<(u16, u16, u32, u32)>,
    notes: Vec<Note>,
    completed: usize,
    /// Whether what is read is compared with the model.
    strict: bool,
}

impl Initiator {
    fn new(config: HostConfig, in_capsule_max: u32, wishes: Vec<Wish>, seed: u64) -> Self {
        Self {
            host: Host::new(config),
            random: Random(seed),
            in_capsule_max,
            wishes: wishes.into(),
            free: (0..QUEUE_DEPTH).collect(),
            running: vec![None; usize::from(QUEUE_DEPTH)],
            model: vec![0; PART_BYTES * usize::from(QUEUE_DEPTH)],
            asked: Vec::new(),
            notes: Vec::new(),
            completed: 0,
            strict: true,
        }
    }

    fn receive(&mut self, mut bytes: &[u8], out: &mut Pipe) -> Result<(), Fault> {
        while let Some(event) = self.host.next(&mut bytes)? {
            if let HostEvent::Data { cid, offset, bytes } = event {
                let (_, data) = self.running[usize::from(cid)].as_mut().expect("outstanding");
                data[range(offset, bytes.len() as u32)].copy_from_slice(bytes);
                continue;
            }
            self.notes.push(Note(format!("{event:?}")));
            match event {
                HostEvent::R2t { cid, ttag, offset, len } => {
                    self.asked.push((cid, ttag, offset, offset + len));
                }
                HostEvent::Complete { cid, cqe } => self.on_complete(cid, &cqe),
                _ => {}
            }
            if self.host.is_initialized() {
                self.issue(out);
            }
            for _ in 0..self.random.next(3) {
                self.step(out);
            }
        }
        assert!(bytes.is_empty());
        Ok(())
    }

    fn issue(&mut self, out: &mut Pipe) {
        while let Some(cid) = self.free.last().copied()
            && let Some(wish) = self.wishes.pop_front()
        {
            self.free.pop();
            let in_capsule = wish.in_capsule && wish.len <= self.in_capsule_max;
            let data = wish.data();
            let (transfer, send) = match wish.opcode {
                READ => (Transfer::Read { len: wish.len }, false),
                FLUSH => (Transfer::None, false),
                BAD => (Transfer::Write { len: wish.len, in_capsule }, in_capsule),
                _ => (Transfer::Write { len: wish.len, in_capsule }, in_capsule),
            };
            let mut sqe = [0; 64];
            (sqe[0], sqe[40]) = (wish.opcode, cid as u8);
            if transfer != Transfer::None {
                sqe[32..36].copy_from_slice(&wish.len.to_le_bytes());
            }
            let head = self.host.command(cid, &sqe, transfer);
            out.send(&[&head]);
            if send {
                out.send(&[&data, &digest_of(self.host.data_digest(), &data)]);
            }
            let buffer = if wish.opcode == READ { vec![0; data.len()] } else { data };
            self.running[usize::from(cid)] = Some((wish, buffer));
        }
    }

    fn on_complete(&mut self, cid: u16, cqe: &[u8; 16]) {
        let (wish, data) = self.running[usize::from(cid)].take().expect("outstanding");
        let status = u16::from_le_bytes([cqe[14], cqe[15]]) >> 1;
        let part = &mut self.model[usize::from(cid) * PART_BYTES..][..data.len()];
        match (wish.opcode, status) {
            (WRITE, 0) => part.copy_from_slice(&data),
            (READ, 0) if self.strict => {
                assert!(part == data, "read of cid {cid} is not what was written")
            }
            _ => {}
        }
        self.asked.retain(|(asked, ..)| *asked != cid);
        self.completed += 1;
        self.free.push(cid);
    }

    /// One H2CData PDU, for an R2T picked at random.
    fn step(&mut self, out: &mut Pipe) {
        if self.asked.is_empty() {
            return;
        }
        let pick = self.random.next(self.asked.len());
        let (cid, ttag, offset, end) = self.asked[pick];
        let len = self.random.piece(end - offset, self.host.max_h2c_data());
        let last = offset + len == end;
        let head = self.host.h2c_data(cid, ttag, offset, len, last);
        let (_, data) = self.running[usize::from(cid)].as_ref().expect("outstanding");
        let piece = &data[range(offset, len)];
        out.send(&[&head, piece, &digest_of(self.host.data_digest(), piece)]);
        if last {
            self.asked.remove(pick);
        } else {
            self.asked[pick].2 = offset + len;
        }
    }
}

#[derive(Clone, Debug)]
struct Scenario {
    target: TargetConfig,
    host: HostConfig,
    wishes: Vec<Wish>,
    seed: u64,
}

/// Everything that must not depend on how the streams are cut.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    to_controller: Vec<u8>,
    to_host: Vec<u8>,
    controller_notes: Vec<Note>,
    host_notes: Vec<Note>,
    disk: Vec<u8>,
    /// Every command has completed.
    complete: bool,
}

/// What may damage a piece of a stream.
type Mangle<'a> = &'a mut dyn FnMut(&mut [u8]);

/// Runs a scenario; pieces of the streams have 1 to `piece_max` bytes. `mangle` may change a piece.
fn run(
    scenario: &Scenario,
    split_seed: u64,
    piece_max: usize,
    mut mangle: Option<Mangle<'_>>,
) -> Result<Outcome, Fault> {
    let Scenario { target, host, wishes, seed } = scenario.clone();
    let count = wishes.len();
    let in_capsule_max = target.in_capsule_max;
    let mut split = Random(split_seed);
    let mut controller = Controller::new(target, seed);
    let mut initiator = Initiator::new(host, in_capsule_max, wishes, seed ^ 1);
    initiator.strict = mangle.is_none();
    let (mut to_controller, mut to_host) = (Pipe::default(), Pipe::default());
    to_controller.send(&[&initiator.host.icreq()]);
    loop {
        while !to_controller.queued.is_empty() || !to_host.queued.is_empty() {
            let size = 1 + split.next(piece_max);
            if split.next(2) == 0 {
                let size = size.min(to_controller.queued.len());
                let mut piece: Vec<u8> = to_controller.queued.drain(..size).collect();
                if let Some(mangle) = &mut mangle {
                    mangle(&mut piece);
                }
                controller.receive(&piece, &mut to_host)?;
            } else {
                let size = size.min(to_host.queued.len());
                let mut piece: Vec<u8> = to_host.queued.drain(..size).collect();
                if let Some(mangle) = &mut mangle {
                    mangle(&mut piece);
                }
                initiator.receive(&piece, &mut to_controller)?;
            }
        }
        // Nothing moves: do what was put off.
        controller.step(&mut to_host);
        initiator.step(&mut to_controller);
        if to_controller.queued.is_empty() && to_host.queued.is_empty() {
            break;
        }
    }
    let complete = initiator.completed == count;
    if complete && initiator.strict {
        assert_eq!((controller.target.outstanding(), initiator.host.outstanding()), (0, 0));
        assert!(initiator.model == controller.disk, "model and disk differ");
    }
    Ok(Outcome {
        to_controller: to_controller.all,
        to_host: to_host.all,
        controller_notes: controller.notes,
        host_notes: initiator.notes,
        complete,
        disk: controller.disk,
    })
}

fn wish() -> impl Strategy<Value = Wish> {
    let len = prop_oneof![1..=64u32, (1..=PART_BYTES as u32 / 4).prop_map(|n| n * 4)];
    (prop_oneof![1 => Just(FLUSH), 4 => Just(WRITE), 4 => Just(READ), 1 => Just(BAD)], len)
        .prop_flat_map(|(opcode, len)| (Just(opcode), Just(len), any::<u8>(), any::<bool>()))
        .prop_map(|(opcode, len, fill, in_capsule)| Wish { opcode, len, fill, in_capsule })
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let target = (4096..20000u32, 0..9000u32, 0..=31u8, any::<(bool, bool)>()).prop_map(
        |(max_h2c_data, in_capsule_max, cpda, (header, data))| TargetConfig {
            max_h2c_data,
            in_capsule_max,
            cpda,
            slots: QUEUE_DEPTH + 2,
            allow_header_digest: header,
            allow_data_digest: data,
        },
    );
    (target, 0..=31u8, proptest::collection::vec(wish(), 1..12), any::<u64>()).prop_map(
        |(target, hpda, wishes, seed)| Scenario {
            host: HostConfig {
                queue_depth: QUEUE_DEPTH,
                header_digest: target.allow_header_digest,
                data_digest: target.allow_data_digest,
                max_r2t: 1,
                hpda,
            },
            target,
            wishes,
            seed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_gives_the_same_events(
        scenario in scenario(),
        first in any::<u64>(),
        second in any::<u64>(),
        small in 1..80usize,
    ) {
        let whole = run(&scenario, first, 1 << 20, None).expect("both keep to the protocol");
        prop_assert!(whole.complete, "every command completes");
        let cut = run(&scenario, second, small, None).expect("both keep to the protocol");
        prop_assert!(whole == cut, "{:?}\n{:?}", whole.host_notes, cut.host_notes);
    }

    /// Damage anywhere gives a fault, an error or wrong data, but never a panic of a machine.
    #[test]
    fn damage_never_panics(
        scenario in scenario(),
        seed in any::<u64>(),
        small in 1..4000usize,
        rate in 1..200usize,
    ) {
        let mut random = Random(seed);
        let _ = run(&scenario, seed, small, Some(&mut |piece| {
            if random.next(rate) == 0 && !piece.is_empty() {
                // Near the front, where the headers are.
                let at = random.next(piece.len().min(128));
                piece[at] ^= 1 << random.next(8);
            }
        }));
    }

    #[test]
    fn junk_never_panics(
        init in any::<bool>(),
        digests in any::<(bool, bool)>(),
        junk in proptest::collection::vec(junk_pdu(), 1..40),
        piece in 1..200usize,
    ) {
        let junk = junk.concat();
        let config = TargetConfig { slots: 4, ..TargetConfig::default() };
        let mut controller = Controller::new(config, 1);
        let host_config = HostConfig {
            queue_depth: QUEUE_DEPTH,
            header_digest: digests.0,
            data_digest: digests.1,
            ..HostConfig::default()
        };
        let mut host = Host::new(host_config);
        let mut out = Pipe::default();
        if init {
            controller.receive(&host.icreq(), &mut out).expect("valid");
            let mut reply = &out.all[..];
            host.next(&mut reply).expect("valid").expect("initialized");
            for cid in 0..3 {
                let transfer = match cid {
                    0 => Transfer::None,
                    1 => Transfer::Read { len: 4096 },
                    _ => Transfer::Write { len: 4096, in_capsule: false },
                };
                let _ = host.command(cid, &[0; 64], transfer);
            }
        }
        for piece in junk.chunks(piece) {
            if let Err(fault) = controller.receive(piece, &mut out) {
                let term = controller.target.term_req(&fault);
                prop_assert!((24..=152).contains(&term.len()));
            }
        }
        prop_assert!(controller.target.outstanding() <= 4);
        for mut piece in junk.chunks(piece) {
            while let Ok(Some(event)) = host.next(&mut piece) {
                if let HostEvent::Data { offset, bytes, .. } = event {
                    prop_assert!(offset as usize + bytes.len() <= 4096);
                }
            }
        }
        prop_assert!(host.outstanding() <= 3);
    }
}

/// Bytes that look like a PDU more often than chance would have it.
fn junk_pdu() -> impl Strategy<Value = Vec<u8>> {
    let hlen = prop_oneof![Just(24u8), Just(72), Just(128), any::<u8>()];
    let plen = prop_oneof![0..200u32, any::<u32>()];
    (0..10u8, 0..16u8, hlen, prop_oneof![Just(24u8), Just(72), any::<u8>()], plen)
        .prop_flat_map(|(pdu_type, flags, hlen, pdo, plen)| {
            let mut head = vec![pdu_type, flags, hlen, pdo];
            head.extend(plen.to_le_bytes());
            let rest = prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                proptest::collection::vec(0..2u8, 0..200),
            ];
            (Just(head), rest)
        })
        .prop_map(|(head, rest)| [head, rest].concat())
}
