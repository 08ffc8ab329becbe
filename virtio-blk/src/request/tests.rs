use proptest::prelude::*;

use super::*;
use crate::device::Device;
use crate::device::tests::{geometry, identity, options};
use crate::testing::TestMemory;

fn limits() -> Limits {
    *Device::new(&geometry(), &identity(), &options()).limits()
}

const ALL: Features = Features(Features::DISCARD.0 | Features::WRITE_ZEROES.0);

/// A chain over one memory: the readable bytes cut at will, then the writable ones.
struct Layout {
    memory: TestMemory,
    chain: Chain,
    at: u64,
}

impl Layout {
    fn new() -> Layout {
        let memory = TestMemory::new(0x40000);
        let at = memory.base();
        Layout { memory, chain: Chain::new(), at }
    }

    fn readable(mut self, bytes: &[u8]) -> Layout {
        self.memory.write(self.at, bytes);
        self.chain.readable.push(Piece { addr: self.at, len: bytes.len() as u32 });
        self.at += bytes.len() as u64 + 3;
        self
    }

    fn writable(mut self, len: u32) -> Layout {
        self.memory.write(self.at, &vec![0xee; len as usize]);
        self.chain.writable.push(Piece { addr: self.at, len });
        self.at += u64::from(len) + 3;
        self
    }

    fn parse_with(&self, limits: &Limits, features: Features) -> (Request, Vec<Range>) {
        let mut ranges = Vec::new();
        let request =
            Request::parse(&self.chain, self.memory.view(), limits, features, &mut ranges);
        (request.unwrap(), ranges)
    }

    fn action(&self) -> Action {
        self.parse_with(&limits(), ALL).0.action
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range_bytes(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

const IOERR: Action = Action::Done(Status::IOERR);
const UNSUPP: Action = Action::Done(Status::UNSUPP);

#[test]
fn read_and_write() {
    let read = Layout::new().readable(&header(0, 8)).writable(4096).writable(1);
    let (request, _) = read.parse_with(&limits(), ALL);
    assert_eq!(request.action, Action::Read { offset: 4096, len: 4096 });
    assert_eq!((request.written, request.written_failed), (4097, 0));
    request.status.write(0, &[7]).unwrap();
    assert_eq!(read.memory.read(read.chain.writable[1].addr, 1), [7]);

    let write = Layout::new().readable(&header(1, 1)).readable(&[5; 512]).writable(1);
    let (request, _) = write.parse_with(&limits(), ALL);
    assert_eq!(request.action, Action::Write { offset: 512, len: 512 });
    assert_eq!((request.written, request.written_failed), (1, 1));
}

#[test]
fn transfers_out_of_bounds() {
    let sectors = 0x12345;
    let read =
        |sector, len| Layout::new().readable(&header(0, sector)).writable(len).writable(1).action();
    assert_eq!(read(sectors - 1, 512), Action::Read { offset: (sectors - 1) * 512, len: 512 });
    assert_eq!(read(sectors - 1, 1024), IOERR);
    assert_eq!(read(sectors, 512), IOERR);
    assert_eq!(read(u64::MAX / 512, 512), IOERR);
    assert_eq!(read(u64::MAX, 512), IOERR);
    assert_eq!(read(0, 513), IOERR);
    assert_eq!(read(0, 511), IOERR);
    let empty = Layout::new().readable(&header(0, 0)).writable(1);
    assert_eq!(empty.action(), Action::Done(Status::OK));
    let empty = Layout::new().readable(&header(1, sectors)).writable(1);
    assert_eq!(empty.action(), Action::Done(Status::OK));
    let empty = Layout::new().readable(&header(1, sectors + 1)).writable(1);
    assert_eq!(empty.action(), IOERR);
}

#[test]
fn malformed_chains() {
    assert_eq!(Layout::new().readable(&[0; 15]).writable(1).action(), IOERR);
    assert_eq!(Layout::new().writable(513).action(), IOERR);
    let mut unordered = Layout::new().readable(&header(0, 0)).writable(513);
    unordered.chain.is_ordered = false;
    assert_eq!(unordered.action(), IOERR);

    // The header is nowhere, the status byte is fine.
    let mut lost = Layout::new().readable(&header(0, 0)).writable(513);
    lost.chain.readable[0].addr = 0;
    assert_eq!(lost.action(), IOERR);

    let parse = |layout: &Layout| {
        Request::parse(&layout.chain, layout.memory.view(), &limits(), ALL, &mut Vec::new())
            .map(|request| request.action)
    };
    let none = Layout::new().readable(&header(0, 0));
    assert_eq!(parse(&none), Err(Broken::NoStatus));
    let mut nowhere = Layout::new().readable(&header(0, 0)).writable(513);
    nowhere.chain.writable[0].addr = 0x4000_0000 + 0x40000 - 512;
    assert_eq!(parse(&nowhere), Err(Broken::StatusAddress));
    nowhere.chain.writable[0].addr = u64::MAX - 3;
    assert_eq!(parse(&nowhere), Err(Broken::StatusAddress));
}

#[test]
fn identity_is_20_bytes_or_less() {
    let layout = Layout::new().readable(&header(8, 0)).writable(7).writable(14);
    let (request, _) = layout.parse_with(&limits(), ALL);
    assert_eq!(request.action, Action::Done(Status::OK));
    assert_eq!(request.written, 21);
    let [first, second] = layout.chain.writable[..] else { panic!() };
    assert_eq!(layout.memory.read(first.addr, 7), b"PENSTOC");
    assert_eq!(layout.memory.read(second.addr, 14), b"K-1\0\0\0\0\0\0\0\0\0\0\xee");

    let short = Layout::new().readable(&header(8, 0)).writable(4);
    assert_eq!(short.parse_with(&limits(), ALL).0.written, 4);
    assert_eq!(short.memory.read(short.chain.writable[0].addr, 4), b"PEN\xee");
    let long = Layout::new().readable(&header(8, 0)).writable(100);
    assert_eq!(long.parse_with(&limits(), ALL).0.written, 20);
    assert_eq!(long.memory.read(long.chain.writable[0].addr + 20, 80), [0xee; 80]);
}

#[test]
fn flush_and_the_unknown() {
    assert_eq!(Layout::new().readable(&header(4, 0)).writable(1).action(), Action::Flush);
    for kind in [2, 3, 5, 10, 14, 16, u32::MAX] {
        assert_eq!(Layout::new().readable(&header(kind, 0)).writable(1).action(), UNSUPP, "{kind}");
    }
}

#[test]
fn discard_and_write_zeroes() {
    let ranges = |kind, parts: &[(u64, u32, u32)]| {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in parts {
            bytes.extend(range_bytes(*sector, *sectors, *flags));
        }
        Layout::new().readable(&header(kind, 0)).readable(&bytes).writable(1)
    };
    let two = ranges(11, &[(1, 2, 0), (100, 8, 0)]);
    let (request, parsed) = two.parse_with(&limits(), ALL);
    assert_eq!(request.action, Action::Discard);
    let range = |offset, len, unmap| Range { offset, len, unmap };
    assert_eq!(parsed, [range(512, 1024, false), range(51200, 4096, false)]);
    assert_eq!(two.parse_with(&limits(), Features::WRITE_ZEROES).0.action, UNSUPP);

    let zero = ranges(13, &[(0, 1, 1), (1, 1, 0)]);
    let (request, parsed) = zero.parse_with(&limits(), ALL);
    assert_eq!(request.action, Action::WriteZeroes);
    assert_eq!(parsed, [range(0, 512, true), range(512, 512, false)]);
    assert_eq!(zero.parse_with(&limits(), Features::DISCARD).0.action, UNSUPP);

    assert_eq!(ranges(11, &[(0, 1, 1)]).action(), UNSUPP, "discard with unmap");
    assert_eq!(ranges(13, &[(0, 1, 2)]).action(), UNSUPP, "an unknown flag");
    assert_eq!(ranges(11, &[(0, 1, 0), (0, 1, 4)]).action(), UNSUPP);
    assert_eq!(ranges(11, &[]).action(), IOERR);
    assert_eq!(ranges(11, &[(0x12345, 1, 0)]).action(), IOERR);
    assert_eq!(ranges(11, &[(u64::MAX, u32::MAX, 0)]).action(), IOERR);
    assert_eq!(ranges(13, &[(0, (1 << 16) + 1, 0)]).action(), IOERR, "longer than announced");
    assert_eq!(ranges(13, &[(0, 1 << 16, 0)]).action(), Action::WriteZeroes);
    assert_eq!(ranges(11, &[(0, 1, 0); 16]).action(), Action::Discard);
    assert_eq!(ranges(11, &[(0, 1, 0); 17]).action(), IOERR);
    let torn = Layout::new().readable(&header(11, 0)).readable(&[0; 20]).writable(1);
    assert_eq!(torn.action(), IOERR);
}

#[test]
fn a_read_only_device_changes_nothing() {
    let read_only = Limits { read_only: true, ..limits() };
    let write = Layout::new().readable(&header(1, 0)).readable(&[0; 512]).writable(1);
    assert_eq!(write.parse_with(&read_only, ALL).0.action, IOERR);
    for kind in [11, 13] {
        let range = range_bytes(0, 1, 0);
        let layout = Layout::new().readable(&header(kind, 0)).readable(&range).writable(1);
        assert_eq!(layout.parse_with(&read_only, ALL).0.action, IOERR);
    }
    let read = Layout::new().readable(&header(0, 0)).writable(513);
    assert_eq!(read.parse_with(&read_only, ALL).0.action, Action::Read { offset: 0, len: 512 });
}

#[test]
fn errors_have_a_status() {
    assert_eq!(Status::from(IoError::NotSupported), Status::UNSUPP);
    for error in [IoError::Medium, IoError::Gone, IoError::Aborted, IoError::OutOfRange] {
        assert_eq!(Status::from(error), Status::IOERR);
    }
}

/// Cut `total` bytes at `cuts`.
fn pieces(at: u64, total: u64, cuts: &[u64]) -> Vec<Piece> {
    let mut ends: Vec<u64> = cuts.iter().map(|cut| cut % total).chain([total]).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut pieces = Vec::new();
    let mut from = 0;
    for end in ends {
        if end > from {
            pieces.push(Piece { addr: at + from, len: (end - from) as u32 });
        }
        from = end;
    }
    pieces
}

proptest! {
    /// Wherever descriptors begin and end, the request is the same.
    #[test]
    fn any_layout_means_the_same(
        is_write in any::<bool>(),
        sectors in 1u64..5,
        reads in prop::collection::vec(any::<u64>(), 0..6),
        writes in prop::collection::vec(any::<u64>(), 0..6),
        skip in 0u64..512,
    ) {
        let memory = TestMemory::new(0x10000);
        let (out, into) = (memory.base(), memory.base() + 0x8000);
        memory.write(out, &header(u32::from(is_write), 3));
        let data = sectors * 512;
        let (sent, room) = if is_write { (16 + data, 1) } else { (16, data + 1) };
        let chain = Chain {
            readable: pieces(out, sent, &reads),
            writable: pieces(into, room, &writes),
            ..Chain::new()
        };
        let request =
            Request::parse(&chain, memory.view(), &limits(), ALL, &mut Vec::new()).unwrap();
        let expected = match is_write {
            true => Action::Write { offset: 1536, len: data },
            false => Action::Read { offset: 1536, len: data },
        };
        prop_assert_eq!(request.action, expected);
        request.status.write(0, &[9]).unwrap();
        prop_assert_eq!(memory.read(into + room - 1, 1), [9]);

        // Its data, from any offset on, is where it should be.
        let pattern: Vec<u8> = (0..data).map(|i| (i * 7 % 251) as u8).collect();
        let (pieces, before, at) = match is_write {
            true => (&chain.readable, 16, out + 16),
            false => (&chain.writable, 0, into),
        };
        memory.write(at, &pattern);
        let mut sg = SgList::default();
        append(memory.view(), pieces, before + skip, data - skip, &mut sg).unwrap();
        let mut back = vec![0; (data - skip) as usize];
        sg.copy_to_slice(0, &mut back).unwrap();
        prop_assert_eq!(&back, &pattern[skip as usize..]);
    }

    #[test]
    fn any_chain_is_an_answer(
        readable in prop::collection::vec((any::<u64>(), 1u32.., any::<bool>()), 0..6),
        writable in prop::collection::vec((any::<u64>(), 1u32.., any::<bool>()), 0..6),
        bytes in prop::collection::vec(any::<u8>(), 64),
        kind in 0u32..16,
    ) {
        let memory = TestMemory::new(0x10000);
        memory.write(memory.base(), &bytes);
        memory.write(memory.base(), &kind.to_le_bytes());
        let near = |(addr, len, is_near): (u64, u32, bool)| match is_near {
            true => Piece { addr: memory.base() + addr % 0x100, len: 1 + len % 0x400 },
            false => Piece { addr, len },
        };
        let chain = Chain {
            readable: readable.into_iter().map(near).collect(),
            writable: writable.into_iter().map(near).collect(),
            ..Chain::new()
        };
        let mut ranges = Vec::new();
        let parsed = Request::parse(&chain, memory.view(), &limits(), ALL, &mut ranges);
        if let Ok(request) = parsed {
            let capacity = limits().capacity_bytes;
            match request.action {
                Action::Read { offset, len } | Action::Write { offset, len } => {
                    prop_assert!(len > 0 && offset + len <= capacity);
                }
                Action::Discard | Action::WriteZeroes => {
                    prop_assert!((1..=16).contains(&ranges.len()));
                    prop_assert!(ranges.iter().all(|r| r.offset + r.len <= capacity));
                }
                Action::Flush | Action::Done(_) => {}
            }
        }
    }
}

#[test]
fn lifetime_is_told_by_volumes_that_know_it() {
    let ask = |len| Layout::new().readable(&header(10, 0)).writable(len).writable(1);
    let known = Limits { lifetime: Some([1, 0, 5, 0, 5, 0]), ..limits() };
    let asked = ask(6);
    let (request, _) = asked.parse_with(&known, Features::LIFETIME);
    assert_eq!((request.action, request.written), (Action::Done(Status::OK), 7));
    assert_eq!(asked.memory.read(asked.chain.writable[0].addr, 6), [1, 0, 5, 0, 5, 0]);
    for len in [5, 7, 512] {
        assert_eq!(ask(len).parse_with(&known, Features::LIFETIME).0.action, IOERR, "{len} bytes");
    }
    // It is offered and not known any more; it is not negotiated.
    assert_eq!(ask(6).parse_with(&limits(), Features::LIFETIME).0.action, IOERR);
    assert_eq!(ask(6).parse_with(&known, ALL).0.action, UNSUPP);
}
