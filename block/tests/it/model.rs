//! Random I/O against an array of bytes.

use std::ops::Range;

use block::{Busy, Extent, Io, IoError, Op, Volume};
use iobuf::SgList;

use crate::harness::Bench;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What a run may meet.
pub(crate) struct Options {
    pub(crate) seed: u64,
    pub(crate) ios: usize,
    pub(crate) depth: usize,
    /// Longest range in bytes.
    pub(crate) len_max: u64,
    /// Memory at odd addresses and in odd pieces now and then.
    pub(crate) odd_memory: bool,
    /// I/O may fail with this, and then a change may have happened or not, even in part.
    pub(crate) may_fail: Option<IoError>,
}

impl Options {
    pub(crate) fn new(seed: u64, ios: usize) -> Options {
        Options { seed, ios, depth: 16, len_max: 300_000, odd_memory: true, may_fail: None }
    }
}

/// What a volume should contain; `None` after a failed change.
struct Model {
    block: usize,
    bytes: Vec<u8>,
    known: Vec<bool>,
}

impl Model {
    fn blocks(&self, range: &Range<usize>) -> Range<usize> {
        range.start / self.block..range.end / self.block
    }

    fn set(&mut self, range: Range<usize>, bytes: &[u8]) {
        let blocks = self.blocks(&range);
        self.known[blocks].fill(true);
        self.bytes[range].copy_from_slice(bytes);
    }

    /// Compares, and learns what is not known.
    fn compare(&mut self, range: Range<usize>, seen: &[u8], what: &str) {
        for (i, block) in self.blocks(&range).enumerate() {
            let seen = &seen[i * self.block..][..self.block];
            let known = &mut self.bytes[block * self.block..][..self.block];
            if self.known[block] {
                assert!(seen == known, "{what}: wrong data in block {block}");
            } else {
                known.copy_from_slice(seen);
                self.known[block] = true;
            }
        }
    }
}

/// An I/O in flight: its range, the memory that its data lies in, and where in there it does.
struct Flight {
    tag: u64,
    op: Op,
    range: Range<usize>,
    /// What a copy reads.
    source: Range<usize>,
    whole: SgList,
    parts: Vec<Range<usize>>,
}

/// Fills the volume with `ios` random I/Os, many at a time, and compares every read with an array
/// of bytes; I/Os in flight at the same time do not overlap unless they only read. `start` is what
/// the volume contains. Returns what it contains in the end.
pub(crate) fn run(
    bench: &mut Bench,
    volume: &dyn Volume,
    start: Vec<u8>,
    options: &Options,
) -> Vec<u8> {
    let geometry = volume.geometry();
    let block = geometry.block_bytes as usize;
    assert_eq!(start.len() as u64, geometry.bytes());
    let blocks = start.len() / block;
    let mut model = Model { block, bytes: start, known: vec![true; blocks] };
    let mut random = Random(options.seed);
    let mut flights: Vec<Flight> = Vec::new();
    let mut failures = 0;
    for tag in 0..options.ios as u64 {
        let op = match random.below(25) {
            0..8 => Op::Read,
            8..15 => Op::Write,
            15 => Op::Flush,
            16..18 => Op::WriteZeroes,
            18..20 if geometry.deallocate => Op::Deallocate,
            20..22 => Op::Compare,
            22 => Op::Verify,
            23 if geometry.copy.ranges_max > 0 => Op::Copy,
            24 if geometry.compare_and_write => Op::CompareAndWrite,
            _ => Op::Read,
        };
        let first = random.below(blocks as u64) as usize;
        let longest = (options.len_max as usize / block).min(blocks - first).max(1);
        // Mostly short, as hosts do.
        let longest = if random.below(4) == 0 { longest } else { longest.min(16) };
        let count = match op {
            Op::CompareAndWrite => 1,
            _ => 1 + random.below(longest as u64) as usize,
        };
        let range = first * block..(first + count) * block;
        let mut op = op;
        let source = (random.below((blocks + 1 - count) as u64) as usize) * block;
        let mut source = source..source + range.len();
        if op == Op::Copy && overlap(&source, &range) {
            op = Op::Read;
        }
        if op != Op::Copy {
            source = 0..0;
        }
        let conflicts = |f: &Flight| {
            f.op != Op::Flush
                && (op.is_change() && (overlap(&f.range, &range) || overlap(&f.source, &range))
                    || f.op.is_change()
                        && (overlap(&f.range, &range) || overlap(&f.range, &source)))
        };
        while flights.len() == options.depth || (op != Op::Flush && flights.iter().any(conflicts)) {
            failures += collect(bench, &mut flights, &mut model, options);
        }
        let compares = matches!(op, Op::Compare | Op::CompareAndWrite);
        if compares && !model.known[model.blocks(&range)].iter().all(|known| *known) {
            op = Op::Read;
        }
        let len = match op {
            Op::CompareAndWrite => 2 * range.len(),
            _ if op.has_data() => range.len(),
            _ => 0,
        };
        let (whole, parts) = memory(bench, &mut random, len, options.odd_memory);
        let mut io = Box::new(Io::new(op, range.start as u64, range.len() as u64));
        io.tag = tag;
        for part in &parts {
            io.data.append_range(&whole, part.start, part.len()).unwrap();
        }
        io.fua = op.is_change() && random.below(8) == 0;
        io.no_unmap = op == Op::WriteZeroes && random.below(2) == 0;
        if matches!(op, Op::Write | Op::CompareAndWrite) {
            let fresh: Vec<u8> =
                (0..len).map(|i| (tag as usize * 131 + i * 7 + i / 256) as u8).collect();
            io.data.copy_from_slice(0, &fresh).unwrap();
        }
        if matches!(op, Op::Compare | Op::CompareAndWrite) {
            let mut bytes = model.bytes[range.clone()].to_vec();
            if random.below(2) == 0 {
                bytes[random.below(range.len() as u64) as usize] ^= 0x10;
                io.tag |= WRONG;
            }
            io.data.copy_from_slice(0, &bytes).unwrap();
        }
        if op == Op::Copy {
            // In two sources, where there are two blocks.
            let half = source.len() / block / 2 * block;
            for (at, len) in [(source.start, half), (source.start + half, source.len() - half)] {
                if len > 0 {
                    io.sources.push(Extent { offset: at as u64, len: len as u64 });
                }
            }
        }
        let tag = io.tag;
        while let Err(Busy(back)) = bench.submit(io) {
            io = back;
            failures += collect(bench, &mut flights, &mut model, options);
        }
        flights.push(Flight { tag, op, range, source, whole, parts });
    }
    while !flights.is_empty() {
        failures += collect(bench, &mut flights, &mut model, options);
    }
    assert_eq!(bench.in_flight(), 0);
    if options.may_fail.is_some() {
        assert!(failures > 0, "no I/O failed: the test shows less than it says");
    }
    // Everything once more, also what only the model has touched.
    let mut at = 0;
    while at < model.bytes.len() {
        let len = (128 << 10).min(model.bytes.len() - at);
        match bench.read(at as u64, len) {
            Ok(seen) => model.compare(at..at + len, &seen, "the last look"),
            Err(e) => {
                assert_eq!(Some(e), options.may_fail);
                continue;
            }
        }
        at += len;
    }
    model.bytes
}

/// Waits for one I/O and checks it; 1 if it failed.
fn collect(
    bench: &mut Bench,
    flights: &mut Vec<Flight>,
    model: &mut Model,
    options: &Options,
) -> usize {
    let io = bench.wait();
    let at = flights.iter().position(|f| f.tag == io.tag).expect("an I/O came back twice");
    let flight = flights.swap_remove(at);
    let what = format!("seed {}: I/O {} {:?} {:?}", options.seed, io.tag, io.op, flight.range);
    let seen = crate::harness::bytes(&io.data);
    let mut around = crate::harness::bytes(&flight.whole);
    for part in flight.parts {
        around[part].fill(AROUND);
    }
    assert!(around.iter().all(|b| *b == AROUND), "{what}: bytes around the data changed");
    if io.tag & WRONG != 0 {
        let is_failure =
            options.may_fail.is_some() && io.result == options.may_fail.map_or(Ok(()), Err);
        if !is_failure {
            assert_eq!(io.result, Err(IoError::CompareFailed), "{what}");
        }
        return usize::from(is_failure);
    }
    if let Err(e) = io.result {
        assert_eq!(Some(e), options.may_fail, "{what}");
        if io.op.is_change() {
            let blocks = model.blocks(&flight.range);
            model.known[blocks].fill(false);
        }
        return 1;
    }
    match io.op {
        Op::Read => model.compare(flight.range, &seen, &what),
        Op::Write => model.set(flight.range, &seen),
        Op::CompareAndWrite => {
            let stored = &seen[flight.range.len()..];
            model.set(flight.range, stored);
        }
        Op::Flush | Op::Verify | Op::Compare => {}
        Op::Copy => {
            let (from, to) = (model.blocks(&flight.source), model.blocks(&flight.range));
            model.bytes.copy_within(flight.source, flight.range.start);
            model.known.copy_within(from, to.start);
        }
        Op::WriteZeroes | Op::Deallocate => {
            let zeros = vec![0; flight.range.len()];
            model.set(flight.range, &zeros);
        }
        other => panic!("{other:?} was not asked for"),
    }
    0
}

const AROUND: u8 = 0xA5;
/// In the tag of a compare with a wrong byte.
const WRONG: u64 = 1 << 63;

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Memory for `len` bytes, and the parts of it to use: page-aligned, or at odd addresses and cut
/// into odd pieces.
fn memory(
    bench: &Bench,
    random: &mut Random,
    len: usize,
    odd: bool,
) -> (SgList, Vec<Range<usize>>) {
    let mut whole = SgList::default();
    if len == 0 {
        return (whole, Vec::new());
    }
    let slack = 8192;
    bench.local().pool().alloc(len + slack, &mut whole).unwrap();
    whole.fill(0, len + slack, AROUND).unwrap();
    if odd && len > 200_000 && random.below(2) == 0 {
        // An odd head, longer than what is copied at a time, and a tail that needs no copy.
        let head = 36 * 4096;
        return (whole, vec![36..36 + head, head + 4096..len + 4096]);
    }
    let (start, piece) = match random.below(6) {
        0 if odd => (random.below(4096) as usize, 1 + random.below(9000) as usize),
        1 if odd => (random.below(8) as usize * 512, 512 * (1 + random.below(9) as usize)),
        2 if odd => (4, len),
        _ => (0, len),
    };
    let cut = |at: usize| start + at..start + len.min(at + piece);
    (whole, (0..len).step_by(piece).map(cut).collect())
}
