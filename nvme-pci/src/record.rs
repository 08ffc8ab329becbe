//! What outlives the process: the doorbells, and a record of queues and commands in flight.
//!
//! Both are files in memory that a supervisor can keep open. A successor that opens them goes on
//! where a process stopped, at whatever instruction it was killed. For that the record is written
//! in a fixed order, each word atomically; nobody but the owner of a queue writes to the queue's
//! part.
//!
//! ```text
//!   take a command:   slot.sqe ─► slot.post = 0 ─► slot.seq = n + 1 ─► sq.fetched = n + 1
//!   complete one:     slot.cqe ─► slot.post = t + 1 ─► CQE in guest memory, its phase last
//!                              ─► cq.tail = t + 1 ─► slot.seq = 0
//!   create a queue:   slots free, address, position ─► flags with VALID
//!   delete a queue:   flags = 0
//!   the controller:   the half that is not in use ─► header.active = other half
//!   its counters:     a part for each core, which the core writes now and then
//! ```
//!
//! Read back, that says:
//!
//! - `seq` not 0: the command was taken and may not be taken again. The queue's head is the largest
//!   of `fetched` and all `seq`.
//! - `post` 0: it was not completed. It is carried out again, from the copy in the slot: its entry
//!   in the ring may be another command by now.
//! - `post` not 0: its result is known. If `cq.tail` is beyond that position, or the entry there has
//!   the phase of this lap, the host has it; else it is posted from the copy in the slot. No other
//!   slot can have been posted at the same position: a queue posts one at a time.
//!
//! So each command completes exactly once. It may be *carried out* twice, which is what NVMe lets
//! any host see of a controller that was reset: reads and writes of the same data. Fused pairs are
//! not: done twice, the blocks would differ from what they are compared with. A pair that was not
//! completed is aborted; a first command whose second was not taken yet goes on waiting for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use iobuf::{GuestMemory, GuestRegion, GuestSlice};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::engine::Counters;

/// Queues of each kind, the admin queue included.
pub const QUEUES_MAX: u16 = 65;
/// Most entries of an I/O queue, and slots of any queue.
pub const ENTRIES_MAX: u16 = 1024;

/// Offset of the doorbells in their file, as in the region that the file is mapped for.
pub const DOORBELLS_AT: u64 = 0x1000;
/// Bytes of doorbells: a page, of which 520 are used.
pub const DOORBELLS_BYTES: u64 = 0x1000;

const MAGIC: u64 = u64::from_le_bytes(*b"pstkrec1");
const HALF_AT: [usize; 2] = [0x1000, 0x5000];
/// Most bytes of a saved controller.
pub const CONTROLLER_BYTES_MAX: usize = 0x4000 - 8;
const SQ_AT: usize = 0x9000;
const CQ_AT: usize = 0xb000;
const QUEUE_BYTES: usize = 64;
/// Counters of predecessors, and of each core behind them.
const COUNTERS_AT: usize = 0xc100;
const COUNTERS_BYTES: usize = 64;
/// Cores whose counters a successor finds.
const COUNTED_CORES_MAX: usize = 128;
/// When the device began: seconds since the epoch.
const STARTED_AT: usize = 40;
const SLOTS_AT: usize = 0x1_0000;
const SLOT_BYTES: usize = 128;
const RECORD_BYTES: usize = SLOTS_AT + QUEUES_MAX as usize * ENTRIES_MAX as usize * SLOT_BYTES;

const _: () = assert!(SQ_AT + QUEUES_MAX as usize * QUEUE_BYTES <= CQ_AT);
const _: () = assert!(CQ_AT + QUEUES_MAX as usize * QUEUE_BYTES <= COUNTERS_AT);
const _: () = assert!(COUNTERS_AT + (COUNTED_CORES_MAX + 1) * COUNTERS_BYTES <= SLOTS_AT);

const VALID: u64 = 1;
const CONTIGUOUS: u64 = 2;
const INTERRUPTS: u64 = 4;

/// The two files.
#[derive(Clone, Debug)]
pub struct Record {
    doorbells: Arc<OwnedFd>,
    record: Arc<OwnedFd>,
    doorbell_memory: GuestMemory,
    record_memory: GuestMemory,
}

/// A submission queue of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqRecord {
    /// Address, or that of its PRP list.
    pub address: u64,
    /// Entries.
    pub entries: u16,
    /// One piece.
    pub is_contiguous: bool,
    /// Its completion queue.
    pub cqid: u16,
    /// Commands taken.
    pub fetched: u64,
}

/// A completion queue of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CqRecord {
    /// Address, or that of its PRP list.
    pub address: u64,
    /// Entries.
    pub entries: u16,
    /// One piece.
    pub is_contiguous: bool,
    /// Interrupt vector, if it interrupts.
    pub vector: Option<u16>,
    /// Entries posted.
    pub tail: u64,
}

/// A command of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRecord {
    /// The command.
    pub sqe: [u8; 64],
    /// Its completion, if `post` is not 0.
    pub cqe: [u8; 16],
    /// Commands taken, this one included; 0: the slot is free.
    pub seq: u64,
    /// Entries posted, this one included, once it is; 0: it was not completed.
    pub post: u64,
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn memfd(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    let fd = OwnedFd::from(file);
    // A client gets the doorbells: it must not be able to take the pages away.
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

fn map(fd: &OwnedFd, bytes: u64) -> io::Result<GuestMemory> {
    let region = GuestRegion::map(fd.as_fd(), 0, bytes, 0, 0)?;
    GuestMemory::new(vec![region]).map_err(|error| io::Error::other(error.to_string()))
}

impl Record {
    /// New files, of a device without queues.
    pub fn new() -> io::Result<Record> {
        let doorbells = memfd("penstock-doorbells", DOORBELLS_AT + DOORBELLS_BYTES)?;
        let record = memfd("penstock-queues", RECORD_BYTES as u64)?;
        let record = Record::map(doorbells, record)?;
        let view = record.view();
        view.set(STARTED_AT, since_epoch().as_secs());
        view.set(0, MAGIC);
        Ok(record)
    }

    /// The files of a predecessor.
    ///
    /// # Errors
    /// If they are not, or of another version.
    pub fn open(doorbells: OwnedFd, record: OwnedFd) -> io::Result<Record> {
        let record = Record::map(doorbells, record)?;
        if record.view().get(0) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a record of NVMe queues"));
        }
        Ok(record)
    }

    fn map(doorbells: OwnedFd, record: OwnedFd) -> io::Result<Record> {
        let doorbell_memory = map(&doorbells, DOORBELLS_AT + DOORBELLS_BYTES)?;
        let record_memory = map(&record, RECORD_BYTES as u64)?;
        Ok(Record {
            doorbells: Arc::new(doorbells),
            record: Arc::new(record),
            doorbell_memory,
            record_memory,
        })
    }

    /// The file with the doorbells, for clients and a successor.
    pub fn doorbells(&self) -> BorrowedFd<'_> {
        self.doorbells.as_fd()
    }

    /// The file with the queues, for a successor.
    pub fn queues(&self) -> BorrowedFd<'_> {
        self.record.as_fd()
    }

    /// Access for the calling core.
    pub fn view(&self) -> RecordView {
        const INSIDE: &str = "the files were made or checked to be that long";
        let doorbells = self.doorbell_memory.view().slice(DOORBELLS_AT, DOORBELLS_BYTES);
        let record = self.record_memory.view().slice(0, RECORD_BYTES as u64);
        RecordView { doorbells: doorbells.expect(INSIDE), record: record.expect(INSIDE) }
    }
}

/// One core's access to the files.
#[derive(Debug)]
pub struct RecordView {
    doorbells: GuestSlice,
    record: GuestSlice,
}

/// A doorbell: of the tail of a submission queue, or the head of a completion queue. CAP.DSTRD
/// is 0.
#[inline]
fn doorbell_at(qid: u16, is_cq: bool) -> usize {
    8 * usize::from(qid) + if is_cq { 4 } else { 0 }
}

fn slot_at(qid: u16, slot: u16) -> usize {
    debug_assert!(qid < QUEUES_MAX && slot < ENTRIES_MAX);
    SLOTS_AT + (usize::from(qid) * usize::from(ENTRIES_MAX) + usize::from(slot)) * SLOT_BYTES
}

fn sq_at(qid: u16) -> usize {
    SQ_AT + usize::from(qid) * QUEUE_BYTES
}

fn cq_at(qid: u16) -> usize {
    CQ_AT + usize::from(qid) * QUEUE_BYTES
}

impl RecordView {
    #[inline]
    fn get(&self, at: usize) -> u64 {
        self.record.load_u64(at, Acquire).unwrap_or(0)
    }

    #[inline]
    fn set(&self, at: usize, value: u64) {
        step();
        let stored = self.record.store_u64(at, value, Release);
        debug_assert!(stored.is_ok(), "offsets are inside the record");
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        step();
        let stored = self.record.write(at, bytes);
        debug_assert!(stored.is_ok(), "offsets are inside the record");
    }

    /// A doorbell as the host rang it last.
    #[inline]
    pub fn doorbell(&self, qid: u16, is_cq: bool) -> u32 {
        self.doorbells.load_u32(doorbell_at(qid, is_cq), Acquire).unwrap_or(0)
    }

    /// Rings a doorbell for a host that cannot reach it.
    pub fn ring(&self, qid: u16, is_cq: bool, value: u32) {
        let _ = self.doorbells.store_u32(doorbell_at(qid, is_cq), value, Release);
    }

    /// The saved controller; `None`: there is none.
    pub fn controller(&self) -> Option<Vec<u8>> {
        let active = self.get(8);
        let at = *HALF_AT.get((active.checked_sub(1)? & 1) as usize)?;
        let len = (self.get(at) as usize).min(CONTROLLER_BYTES_MAX);
        let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
        for offset in (0..len).step_by(8) {
            bytes.extend(self.record.read::<8>(at + 8 + offset).ok()?);
        }
        bytes.truncate(len);
        Some(bytes)
    }

    /// Saves a controller: the one of before, or this one, is found again, never a mixture. False if
    /// it does not fit.
    pub fn set_controller(&self, bytes: &[u8]) -> bool {
        if bytes.len() > CONTROLLER_BYTES_MAX {
            return false;
        }
        let active = self.get(8);
        // `active` is 0, or 1 plus a count whose low bit says which half.
        let next = if active == 0 { 1 } else { active + 1 };
        let at = HALF_AT[((next - 1) & 1) as usize];
        self.set(at, bytes.len() as u64);
        self.put(at + 8, bytes);
        self.set(8, next);
        true
    }

    /// How long ago the first of the processes that served the device began, by the system's clock.
    pub fn age(&self) -> Duration {
        let started = Duration::from_secs(self.get(STARTED_AT));
        // Written by a process that knew nothing of it.
        if started.is_zero() { started } else { since_epoch().saturating_sub(started) }
    }

    /// What a core has counted so far, for a successor.
    pub fn set_counters(&self, core: usize, counters: &Counters) {
        if core < COUNTED_CORES_MAX {
            self.put_counters(core + 1, counters);
        }
    }

    /// Takes the counters of a predecessor's cores together with those of its own predecessors.
    /// Who is killed in the middle of it leaves some to be counted twice, never fewer.
    pub fn inherit_counters(&self) -> Counters {
        let mut sum = Counters::default();
        for part in 0..=COUNTED_CORES_MAX {
            sum.add(&self.counters(part));
        }
        self.put_counters(0, &sum);
        for part in 1..=COUNTED_CORES_MAX {
            if self.counters(part) != Counters::default() {
                self.put_counters(part, &Counters::default());
            }
        }
        sum
    }

    fn put_counters(&self, part: usize, counters: &Counters) {
        let Counters { reads, writes, read_bytes, written_bytes, media_errors, busy_time, .. } =
            *counters;
        let busy = busy_time.as_micros() as u64;
        let values = [reads, writes, read_bytes, written_bytes, media_errors, busy];
        for (at, value) in values.into_iter().enumerate() {
            self.set(COUNTERS_AT + part * COUNTERS_BYTES + at * 8, value);
        }
    }

    fn counters(&self, part: usize) -> Counters {
        let value = |at: usize| self.get(COUNTERS_AT + part * COUNTERS_BYTES + at * 8);
        Counters {
            reads: value(0),
            writes: value(1),
            read_bytes: value(2),
            written_bytes: value(3),
            media_errors: value(4),
            busy_time: Duration::from_micros(value(5)),
            ..Counters::default()
        }
    }

    /// Addresses of the shadow doorbells and event indexes.
    pub fn shadow(&self) -> Option<(u64, u64)> {
        (self.get(16) != 0).then(|| (self.get(24), self.get(32)))
    }

    /// Sets them.
    pub fn set_shadow(&self, shadow: Option<(u64, u64)>) {
        self.set(16, 0);
        if let Some((shadow, event_idx)) = shadow {
            self.set(24, shadow);
            self.set(32, event_idx);
            self.set(16, 1);
        }
    }

    /// A submission queue, if there is one.
    pub fn sq(&self, qid: u16) -> Option<SqRecord> {
        let at = sq_at(qid);
        let flags = self.get(at);
        (flags & VALID != 0).then(|| SqRecord {
            address: self.get(at + 8),
            entries: (flags >> 32) as u16,
            is_contiguous: flags & CONTIGUOUS != 0,
            cqid: (flags >> 16) as u16,
            fetched: self.get(at + 16),
        })
    }

    /// Sets or removes one. All its slots are free afterwards.
    pub fn set_sq(&self, qid: u16, sq: Option<&SqRecord>) {
        let at = sq_at(qid);
        self.set(at, 0);
        for slot in 0..ENTRIES_MAX {
            let at = slot_at(qid, slot) + 80;
            if self.get(at) != 0 {
                self.set(at, 0);
            }
        }
        let Some(sq) = sq else { return };
        self.set(at + 8, sq.address);
        self.set(at + 16, sq.fetched);
        let contiguous = if sq.is_contiguous { CONTIGUOUS } else { 0 };
        let (entries, cqid) = (u64::from(sq.entries), u64::from(sq.cqid));
        self.set(at, VALID | contiguous | cqid << 16 | entries << 32);
    }

    /// A completion queue, if there is one.
    pub fn cq(&self, qid: u16) -> Option<CqRecord> {
        let at = cq_at(qid);
        let flags = self.get(at);
        (flags & VALID != 0).then(|| CqRecord {
            address: self.get(at + 8),
            entries: (flags >> 32) as u16,
            is_contiguous: flags & CONTIGUOUS != 0,
            vector: (flags & INTERRUPTS != 0).then_some((flags >> 16) as u16),
            tail: self.get(at + 16),
        })
    }

    /// Sets or removes one.
    pub fn set_cq(&self, qid: u16, cq: Option<&CqRecord>) {
        let at = cq_at(qid);
        self.set(at, 0);
        let Some(cq) = cq else { return };
        self.set(at + 8, cq.address);
        self.set(at + 16, cq.tail);
        let contiguous = if cq.is_contiguous { CONTIGUOUS } else { 0 };
        let vector = cq.vector.map_or(0, |vector| INTERRUPTS | u64::from(vector) << 16);
        self.set(at, VALID | contiguous | vector | u64::from(cq.entries) << 32);
    }

    /// Entries posted to a completion queue: before the slot of the last one is freed.
    #[inline]
    pub fn set_tail(&self, qid: u16, tail: u64) {
        self.set(cq_at(qid) + 16, tail);
    }

    /// A command is taken into a free slot.
    #[inline]
    pub fn take(&self, qid: u16, slot: u16, sqe: &[u8; 64], seq: u64) {
        let at = slot_at(qid, slot);
        self.put(at, sqe);
        step();
        let _ = self.record.store_u64(at + 88, 0, Relaxed);
        self.set(at + 80, seq);
        self.set(sq_at(qid) + 16, seq);
    }

    /// Commands taken from a queue.
    pub fn set_fetched(&self, qid: u16, fetched: u64) {
        self.set(sq_at(qid) + 16, fetched);
    }

    /// A command's completion is about to be posted.
    #[inline]
    pub fn completing(&self, qid: u16, slot: u16, cqe: &[u8; 16], post: u64) {
        let at = slot_at(qid, slot);
        self.put(at + 64, cqe);
        self.set(at + 88, post);
    }

    /// A slot is free again.
    #[inline]
    pub fn free(&self, qid: u16, slot: u16) {
        self.set(slot_at(qid, slot) + 80, 0);
    }

    /// A slot; `None` if it is free.
    pub fn slot(&self, qid: u16, slot: u16) -> Option<SlotRecord> {
        let at = slot_at(qid, slot);
        let seq = self.get(at + 80);
        if seq == 0 {
            return None;
        }
        Some(SlotRecord {
            sqe: self.record.read(at).ok()?,
            cqe: self.record.read(at + 64).ok()?,
            seq,
            post: self.get(at + 88),
        })
    }

    /// No queues, no doorbells rung, no shadow doorbells.
    pub fn clear_queues(&self) {
        for qid in 0..QUEUES_MAX {
            if self.sq(qid).is_some() {
                self.set_sq(qid, None);
            }
            self.set_cq(qid, None);
            self.ring(qid, false, 0);
            self.ring(qid, true, 0);
        }
        self.set_shadow(None);
    }
}

/// Before each change of what a successor sees. In tests the process can be made to end there.
#[inline]
pub(crate) fn step() {
    #[cfg(test)]
    crash::step();
}

/// The end of a process at any step.
#[cfg(test)]
pub(crate) mod crash {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// What a process that was ended panics with.
    pub(crate) struct Killed;

    /// Ends the process (panics with [`Killed`]) at the step after so many; `None`: never.
    pub(crate) fn after(steps: Option<u64>) {
        LEFT.set(steps);
    }

    pub(crate) fn step() {
        match LEFT.get() {
            Some(0) => std::panic::resume_unwind(Box::new(Killed)),
            Some(left) => LEFT.set(Some(left - 1)),
            None => {}
        }
    }
}
