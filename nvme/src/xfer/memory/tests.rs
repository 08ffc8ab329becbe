use std::collections::HashMap;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::*;
use crate::spec::{NvmOpcode, SglDescriptor};

/// Host memory that is nothing but lists.
#[derive(Default)]
struct Memory {
    bytes: HashMap<u64, u8>,
    pieces: Vec<(u64, u64)>,
    /// Bytes read of lists.
    read: usize,
    /// Bytes may be left out; they are pieces at the end of the address space.
    can_discard: bool,
}

impl Memory {
    fn write(&mut self, addr: u64, bytes: &[u8]) {
        self.bytes.extend((addr..).zip(bytes.iter().copied()));
    }

    fn write_entries(&mut self, addr: u64, entries: &[u64]) {
        for (at, entry) in (addr..).step_by(8).zip(entries) {
            self.write(at, &entry.to_le_bytes());
        }
    }

    fn write_sgl(&mut self, addr: u64, list: &[(u8, u64, u32)]) {
        for (at, entry) in (addr..).step_by(16).zip(list) {
            self.write(at, descriptor(*entry).as_bytes());
        }
    }
}

impl HostMemory for Memory {
    fn read(&mut self, addr: u64, dst: &mut [u8]) -> Result<(), Status> {
        self.read += dst.len();
        for (at, byte) in (addr..).zip(dst) {
            *byte = *self.bytes.get(&at).ok_or(Status::DATA_TRANSFER_ERROR)?;
        }
        Ok(())
    }

    fn piece(&mut self, addr: u64, len: u64) -> Result<(), Status> {
        assert_ne!(len, 0);
        self.pieces.push((addr, len));
        Ok(())
    }

    fn discard(&mut self, len: u64) -> Result<(), Status> {
        assert_ne!(len, 0);
        if !self.can_discard {
            return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr());
        }
        self.pieces.push((u64::MAX, len));
        Ok(())
    }
}

fn descriptor((identifier, address, length): (u8, u64, u32)) -> SglDescriptor {
    SglDescriptor {
        address: U64::new(address),
        length: U32::new(length),
        reserved: [0; 3],
        identifier,
    }
}

fn prps(prp1: u64, prp2: u64) -> Sqe {
    let mut sqe = Sqe::default();
    sqe.set_prps(prp1, prp2);
    sqe
}

fn run(memory: &mut Memory, sqe: &Sqe, len: u32) -> Result<Vec<(u64, u64)>, Status> {
    memory.pieces.clear();
    walk(sqe, len, true, memory).map(|()| memory.pieces.clone())
}

#[test]
fn one_and_two_pages() {
    let mut memory = Memory::default();
    for (prp1, prp2, len, want) in [
        (0x1000, 0xdead, 4096, Ok(vec![(0x1000, 4096)])),
        (0x1004, 0x2000, 4092, Ok(vec![(0x1004, 4092)])),
        (0x1004, 0x9000, 4096, Ok(vec![(0x1004, 4092), (0x9000, 4)])),
        (0x1000, 0x9000, 8192, Ok(vec![(0x1000, 4096), (0x9000, 4096)])),
        (0x1ffc, 0x9000, 512, Ok(vec![(0x1ffc, 4), (0x9000, 508)])),
        (0x1002, 0x9000, 512, Err(PRP_OFFSET)),
        (0x1000, 0x9008, 4608, Err(PRP_OFFSET)),
        // A list, at an odd address.
        (0x1000, 0x9004, 12288, Err(PRP_OFFSET)),
        (0x1000, 0x9000, 0, Ok(vec![])),
    ] {
        let got = run(&mut memory, &prps(prp1, prp2), len);
        assert_eq!(got, want, "{prp1:x} {prp2:x} {len}");
    }
    assert_eq!(memory.read, 0);
}

#[test]
fn lists() {
    let mut memory = Memory::default();
    memory.write_entries(0x5ff0, &[0x10000, 0x20000]);
    let want = vec![(0x1000, 4096), (0x10000, 4096), (0x20000, 4096)];
    assert_eq!(run(&mut memory, &prps(0x1000, 0x5ff0), 12288), Ok(want));
    // One page more: the last entry is now a list.
    memory.write_entries(0x20000, &[0x30000, 0x40000]);
    let want = vec![(0x1000, 4096), (0x10000, 4096), (0x30000, 4096), (0x40000, 512)];
    assert_eq!(run(&mut memory, &prps(0x1000, 0x5ff0), 12288 + 512), Ok(want));
    // The list begins with its last entry.
    memory.write_entries(0x6ff8, &[0x20000]);
    let want = vec![(0x1000, 4096), (0x30000, 4096), (0x40000, 4096)];
    assert_eq!(run(&mut memory, &prps(0x1000, 0x6ff8), 12288), Ok(want));
    // A list that is not there, and offsets in lists.
    assert_eq!(run(&mut memory, &prps(0x1000, 0x8000), 12288), Err(Status::DATA_TRANSFER_ERROR));
    memory.write_entries(0x7000, &[0x10000, 0x20008]);
    assert_eq!(run(&mut memory, &prps(0x1000, 0x7000), 12288), Err(PRP_OFFSET));
    memory.write_entries(0x6ff8, &[0x5ff0]);
    assert_eq!(run(&mut memory, &prps(0x1000, 0x6ff8), 12288), Err(PRP_OFFSET));
}

/// A list that leads to itself ends with the data.
#[test]
fn a_list_that_leads_to_itself_is_bounded() {
    let mut memory = Memory::default();
    memory.write_entries(0x8000, &[0x8000; 512]);
    let pieces = run(&mut memory, &prps(0x1000, 0x8000), 32 << 20).unwrap();
    assert_eq!(pieces.len(), 8192);
    assert!(memory.read < 9000 * 8);
}

#[test]
fn sgls() {
    const DATA: u8 = SglDescriptor::DATA_BLOCK;
    const SEG: u8 = SglDescriptor::SEGMENT;
    const LAST: u8 = SglDescriptor::LAST_SEGMENT;
    let mut memory = Memory::default();
    memory.write_sgl(0x100, &[(DATA, 0x3001, 100), (DATA, 9, 0), (SEG, 0x200, 32)]);
    memory.write_sgl(0x200, &[(DATA, 0x4000, 12), (LAST, 0x300, 16)]);
    memory.write_sgl(0x300, &[(DATA, 0x5000, 4096)]);
    memory.write_sgl(0x400, &[(SEG, 0x200, 32), (DATA, 0x4000, 12)]);
    let length = Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    let kind = Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr());
    let all = vec![(0x3001, 100), (0x4000, 12), (0x5000, 400)];
    for (sgl, len, want) in [
        ((DATA, 0x3001, 512), 512, Ok(vec![(0x3001, 512)])),
        ((DATA, 0x3001, 1024), 512, Ok(vec![(0x3001, 512)])),
        ((DATA, 0x3001, 511), 512, length.clone()),
        ((SEG, 0x100, 48), 512, Ok(all)),
        // Ends in the middle: what follows is looked at, not used.
        ((SEG, 0x100, 48), 50, Ok(vec![(0x3001, 50)])),
        ((SEG, 0x100, 48), 4209, length),
        // A segment in a last segment, in the middle of one, and none at the end of one.
        ((LAST, 0x100, 48), 512, Err(SEGMENT)),
        ((SEG, 0x400, 32), 512, Err(SEGMENT)),
        ((SEG, 0x300, 16), 512, Err(SEGMENT)),
        ((LAST, 0x300, 0), 512, Err(SEGMENT)),
        ((LAST, 0x300, 17), 512, Err(SEGMENT)),
        ((LAST, u64::MAX - 15, 32), 512, Err(SEGMENT)),
        // As the only descriptor it is none that SGL1 can be.
        ((SglDescriptor::BIT_BUCKET, 0, 512), 512, kind.clone()),
        ((SglDescriptor::TRANSPORT_DATA_BLOCK, 0, 512), 512, kind.clone()),
        ((SglDescriptor::DATA_BLOCK_OFFSET, 0, 512), 512, kind),
        (
            (LAST, 0x300, 16 * (SGL_DESCRIPTORS_MAX + 1)),
            512,
            Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS.dnr()),
        ),
    ] {
        let sqe = Sqe { flags: 0x40, dptr: descriptor(sgl), ..Sqe::default() };
        assert_eq!(run(&mut memory, &sqe, len), want, "{sgl:x?} {len}");
    }
    // A segment that leads to itself.
    memory.write_sgl(0x600, &[(SEG, 0x600, 16)]);
    let sqe = Sqe { flags: 0x40, dptr: descriptor((SEG, 0x600, 16)), ..Sqe::default() };
    let endless = Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS.dnr());
    assert_eq!(run(&mut memory, &sqe, 512), endless);
}

/// A host that reads some blocks of many says what it does not want; one that writes cannot.
#[test]
fn bit_buckets() {
    const DATA: u8 = SglDescriptor::DATA_BLOCK;
    const BUCKET: u8 = SglDescriptor::BIT_BUCKET;
    const LAST: u8 = SglDescriptor::LAST_SEGMENT;
    let (read, write) = (NvmOpcode::READ.0, NvmOpcode::WRITE.0);
    let length = Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    let out = u64::MAX;
    let list = [(BUCKET, 7, 512), (DATA, 0x3000, 100), (BUCKET, 0, 0), (BUCKET, 0, 400)];
    let mut memory = Memory { can_discard: true, ..Memory::default() };
    memory.write_sgl(0x100, &list);
    memory.write_sgl(0x200, &[(BUCKET, 0, u32::MAX), (DATA, 0x3000, 100)]);
    for (opcode, at, descriptors, len, want) in [
        (read, 0x100, 4, 1012, Ok(vec![(out, 512), (0x3000, 100), (out, 400)])),
        (read, 0x100, 4, 600, Ok(vec![(out, 512), (0x3000, 88)])),
        (read, 0x100, 4, 1013, length.clone()),
        (read, 0x200, 2, 512, Ok(vec![(out, 512)])),
        (write, 0x100, 4, 100, Ok(vec![(0x3000, 100)])),
        (write, 0x100, 4, 101, length.clone()),
        (write, 0x200, 2, 100, Ok(vec![(0x3000, 100)])),
    ] {
        let dptr = descriptor((LAST, at, 16 * descriptors));
        let sqe = Sqe { flags: 0x40, dptr, ..Sqe::new(opcode) };
        assert_eq!(run(&mut memory, &sqe, len), want, "opcode {opcode} {at:x} {len}");
    }
    memory.can_discard = false;
    let sqe = Sqe { flags: 0x40, dptr: descriptor((LAST, 0x100, 64)), ..Sqe::new(read) };
    let kind = Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr());
    assert_eq!(run(&mut memory, &sqe, 1012), kind, "where nothing can be left out");
}

#[test]
fn sgls_are_for_io_commands_and_psdt_3_for_none() {
    let mut memory = Memory::default();
    let data = descriptor((0, 0x3000, 512));
    let invalid = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    for (flags, may_be_sgl, want) in
        [(0x40, true, Ok(())), (0x80, true, Ok(())), (0x40, false, invalid), (0xc0, true, invalid)]
    {
        let sqe = Sqe { flags, dptr: data, ..Sqe::default() };
        assert_eq!(walk(&sqe, 512, may_be_sgl, &mut memory), want, "{flags:x}");
    }
}
