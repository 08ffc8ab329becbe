//! Data pointers into the host's memory: PRPs and SGLs of a PCI function's commands.
//!
//! ```text
//!   PRP1 ─► first page, from any dword on
//!   PRP2 ─► second page  │  list ─► page, page, .., list ─► page, ..
//!   SGL1 ─► data block   │  segment ─► data block, bit bucket, .., segment ─► .., last segment
//! ```
//!
//! Lists are read through [`HostMemory`], each entry once, so that what was checked is what is used
//! however the host changes it meanwhile. Work is bounded by the length of the data (PRP) or by
//! [`SGL_DESCRIPTORS_MAX`].

use crate::spec::{Direction, SglDescriptor, Sqe, Status};

/// Memory page: the one size that CC.MPS can select (CAP.MPSMIN and MPSMAX are 0).
pub const MEMORY_PAGE_BYTES: u64 = 4096;
const PAGE_MASK: u64 = MEMORY_PAGE_BYTES - 1;

/// Most SGL descriptors of one command, segment descriptors included. A host that describes the
/// largest transfer page by page needs a quarter of it.
pub const SGL_DESCRIPTORS_MAX: u32 = 1024;

/// Entries read at a time: what most lists have, and little to keep on the stack.
const CHUNK: usize = 32;

const PRP_OFFSET: Status = Status::PRP_OFFSET_INVALID.dnr();
const SEGMENT: Status = Status::INVALID_SGL_SEGMENT_DESCRIPTOR.dnr();

/// What a walk needs of the host's memory.
pub trait HostMemory {
    /// Copies `dst.len()` bytes at `addr` out of it.
    ///
    /// # Errors
    /// Data Transfer Error where there is no memory.
    fn read(&mut self, addr: u64, dst: &mut [u8]) -> Result<(), Status>;

    /// The next piece of the data: `len` bytes at `addr`, not 0.
    ///
    /// # Errors
    /// Data Transfer Error where there is no memory, or what else the piece is refused with.
    fn piece(&mut self, addr: u64, len: u64) -> Result<(), Status>;

    /// The next `len` bytes of the data, not 0, are for the host and not wanted by it.
    ///
    /// # Errors
    /// SGL Descriptor Type Invalid: a command that no bytes can be left out of.
    fn discard(&mut self, len: u64) -> Result<(), Status> {
        let _ = len;
        Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr())
    }
}

/// A [`HostMemory`] made of two functions.
pub struct Copying<R, P> {
    /// For [`HostMemory::read`].
    pub read: R,
    /// For [`HostMemory::piece`].
    pub piece: P,
}

impl<R, P> HostMemory for Copying<R, P>
where
    R: FnMut(u64, &mut [u8]) -> Result<(), Status>,
    P: FnMut(u64, u64) -> Result<(), Status>,
{
    fn read(&mut self, addr: u64, dst: &mut [u8]) -> Result<(), Status> {
        (self.read)(addr, dst)
    }

    fn piece(&mut self, addr: u64, len: u64) -> Result<(), Status> {
        (self.piece)(addr, len)
    }
}

/// [`Copying`] that can leave bytes out.
pub struct Discarding<R, P, D> {
    /// For [`HostMemory::read`].
    pub read: R,
    /// For [`HostMemory::piece`].
    pub piece: P,
    /// For [`HostMemory::discard`].
    pub discard: D,
}

impl<R, P, D> HostMemory for Discarding<R, P, D>
where
    R: FnMut(u64, &mut [u8]) -> Result<(), Status>,
    P: FnMut(u64, u64) -> Result<(), Status>,
    D: FnMut(u64) -> Result<(), Status>,
{
    fn read(&mut self, addr: u64, dst: &mut [u8]) -> Result<(), Status> {
        (self.read)(addr, dst)
    }

    fn piece(&mut self, addr: u64, len: u64) -> Result<(), Status> {
        (self.piece)(addr, len)
    }

    fn discard(&mut self, len: u64) -> Result<(), Status> {
        (self.discard)(len)
    }
}

/// Finds the first `len` bytes that a command's data pointer describes. `may_be_sgl` is false for
/// admin commands: "SGLs shall not be used for Admin commands in NVMe over PCIe implementations"
/// (NVMe Base 2.0, "PRP or SGL for Data Transfer").
///
/// # Errors
/// What the command is to be completed with: PRP Offset Invalid, the errors of SGLs, Invalid Field
/// in Command (a PSDT that is not possible), or what `memory` says.
#[inline]
pub fn walk(
    sqe: &Sqe,
    len: u32,
    may_be_sgl: bool,
    memory: &mut impl HostMemory,
) -> Result<(), Status> {
    if len == 0 {
        return Ok(());
    }
    match sqe.psdt() {
        0b00 => {
            let (prp1, prp2) = sqe.prps();
            walk_prps(prp1, prp2, u64::from(len), memory)
        }
        0b01 | 0b10 if may_be_sgl => {
            let is_to_host = sqe.direction() == Direction::ToHost;
            walk_sgl(&sqe.dptr, u64::from(len), is_to_host, memory)
        }
        _ => Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
    }
}

#[inline]
fn walk_prps(prp1: u64, prp2: u64, len: u64, memory: &mut impl HostMemory) -> Result<(), Status> {
    // "The offset shall be dword aligned, indicated by bits 1:0 being cleared" (PRP Entry 1).
    if prp1 & 3 != 0 {
        return Err(PRP_OFFSET);
    }
    let first = len.min(MEMORY_PAGE_BYTES - (prp1 & PAGE_MASK));
    memory.piece(prp1, first)?;
    let left = len - first;
    if left == 0 {
        return Ok(());
    }
    if left <= MEMORY_PAGE_BYTES {
        return page(prp2, left, memory);
    }
    walk_list(prp2, left, memory)
}

/// A PRP entry that is not the first: a whole page, of which `len` bytes are used.
#[inline]
fn page(entry: u64, len: u64, memory: &mut impl HostMemory) -> Result<(), Status> {
    if entry & PAGE_MASK != 0 {
        return Err(PRP_OFFSET);
    }
    memory.piece(entry, len)
}

/// A PRP list: "if there is more than one memory page of data remaining, the last entry within a
/// memory page is a pointer to the next list". The first list may begin anywhere in its page, at a
/// qword; the others begin a page.
fn walk_list(mut at: u64, mut left: u64, memory: &mut impl HostMemory) -> Result<(), Status> {
    if at & 7 != 0 {
        return Err(PRP_OFFSET);
    }
    let mut bytes = [[0; 8]; CHUNK];
    loop {
        let room = (MEMORY_PAGE_BYTES - (at & PAGE_MASK)) / 8;
        let pages = left.div_ceil(MEMORY_PAGE_BYTES);
        let is_chained = pages > room;
        let mut entries = if is_chained { room - 1 } else { pages };
        while entries > 0 {
            let count = entries.min(CHUNK as u64);
            let chunk = &mut bytes[..count as usize];
            memory.read(at, chunk.as_flattened_mut())?;
            for entry in chunk {
                let part = left.min(MEMORY_PAGE_BYTES);
                page(u64::from_le_bytes(*entry), part, memory)?;
                left -= part;
            }
            entries -= count;
            // Entries are inside one page, which does not end beyond the last address.
            at = at.wrapping_add(8 * count);
        }
        if !is_chained {
            return Ok(());
        }
        let mut next = [0; 8];
        memory.read(at, &mut next)?;
        at = u64::from_le_bytes(next);
        if at & PAGE_MASK != 0 {
            return Err(PRP_OFFSET);
        }
    }
}

/// Pages of a queue that is not physically contiguous (CDW11.PC cleared): `prp1` leads to a PRP
/// list of `len` bytes of whole pages.
///
/// # Errors
/// PRP Offset Invalid, or what `memory` says.
pub fn walk_queue(prp1: u64, len: u64, memory: &mut impl HostMemory) -> Result<(), Status> {
    walk_list(prp1, len, memory)
}

fn walk_sgl(
    first: &SglDescriptor,
    len: u64,
    is_to_host: bool,
    memory: &mut impl HostMemory,
) -> Result<(), Status> {
    let mut left = len;
    let mut segment = *first;
    if segment.identifier == SglDescriptor::DATA_BLOCK {
        block(&segment, &mut left, memory)?;
        return if left == 0 { Ok(()) } else { Err(Status::DATA_SGL_LENGTH_INVALID.dnr()) };
    }
    let mut budget = SGL_DESCRIPTORS_MAX;
    loop {
        let is_last = match segment.identifier {
            SglDescriptor::SEGMENT => false,
            SglDescriptor::LAST_SEGMENT => true,
            _ => return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr()),
        };
        let (mut at, bytes) = (segment.address.get(), segment.length.get());
        if bytes == 0 || bytes % 16 != 0 || at.checked_add(u64::from(bytes)).is_none() {
            return Err(SEGMENT);
        }
        let mut entries = bytes / 16;
        budget =
            budget.checked_sub(entries).ok_or(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS.dnr())?;
        let mut chunk = [[0; 16]; CHUNK];
        let mut next = None;
        while entries > 0 {
            let count = entries.min(CHUNK as u32);
            let chunk = &mut chunk[..count as usize];
            memory.read(at, chunk.as_flattened_mut())?;
            at += u64::from(16 * count);
            entries -= count;
            for (index, bytes) in (1..).zip(chunk) {
                let descriptor: SglDescriptor = zerocopy::transmute!(*bytes);
                match descriptor.identifier {
                    SglDescriptor::DATA_BLOCK => block(&descriptor, &mut left, memory)?,
                    // "The length in a destination data buffer is included in the Number of
                    // Logical Blocks, the length in a source data buffer is not" (NVMe Base 2.1,
                    // "SGL Bit Bucket descriptor").
                    SglDescriptor::BIT_BUCKET if is_to_host => {
                        let part = u64::from(descriptor.length.get()).min(left);
                        left -= part;
                        if part > 0 {
                            memory.discard(part)?;
                        }
                    }
                    SglDescriptor::BIT_BUCKET => {}
                    // "The last descriptor of a segment that is not the last one", and no other.
                    SglDescriptor::SEGMENT | SglDescriptor::LAST_SEGMENT
                        if !is_last && entries == 0 && index == count =>
                    {
                        next = Some(descriptor);
                    }
                    SglDescriptor::SEGMENT | SglDescriptor::LAST_SEGMENT => return Err(SEGMENT),
                    _ => return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.dnr()),
                }
            }
        }
        match next {
            Some(next) => segment = next,
            None if !is_last => return Err(SEGMENT),
            None if left > 0 => return Err(Status::DATA_SGL_LENGTH_INVALID.dnr()),
            None => return Ok(()),
        }
    }
}

/// A data block: as much of it as is still needed. What is longer than the data is not touched.
fn block(
    descriptor: &SglDescriptor,
    left: &mut u64,
    memory: &mut impl HostMemory,
) -> Result<(), Status> {
    let part = u64::from(descriptor.length.get()).min(*left);
    if part == 0 {
        return Ok(());
    }
    *left -= part;
    memory.piece(descriptor.address.get(), part)
}

#[cfg(test)]
mod tests;
