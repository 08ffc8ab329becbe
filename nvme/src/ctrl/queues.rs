//! What only a PCI function has: registers in a BAR, queues that commands create and delete, and a
//! state that outlives the process.
//!
//! ```text
//!   BAR0 write ─► register_write ─► RegisterEffect ─► the driver sets up or closes queues
//!   Create, Delete ─► AdminOutcome::Queue(change) ─► driver ─► queue_changed, or queue_unchanged
//! ```
//!
//! A driver takes time, and a host need not wait for it. So a queue is in the list as soon as its
//! Create is given to the driver, and until its Delete is done: what is on its way counts for every
//! command that comes meanwhile.

use core::time::Duration;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::admin::{AdminOutcome, Reply};
use super::enable::{CcEffect, Ending, SavedRegisters};
use super::features::SavedFeatures;
use super::{Controller, aer};
use crate::spec::{AdminOpcode, Feature, Property, Sqe, Status};
use crate::xfer::{MEMORY_PAGE_BYTES, Transport};

const INVALID_QUEUE: Status = Status::INVALID_QUEUE_IDENTIFIER.dnr();

/// Where the admin queues are: AQA, ASQ and ACQ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdminQueues {
    /// Address of the submission queue, page aligned.
    pub sq_address: u64,
    /// Its entries, 2..=4096.
    pub sq_entries: u32,
    /// Address of the completion queue, page aligned.
    pub cq_address: u64,
    /// Its entries, 2..=4096.
    pub cq_entries: u32,
}

/// A completion queue that a host wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CqConfig {
    /// Identifier, not 0.
    pub qid: u16,
    /// Entries, at least 2.
    pub entries: u32,
    /// Where it is, or where the PRP list of its pages is; page aligned.
    pub address: u64,
    /// `address` is that of the queue itself.
    pub is_contiguous: bool,
    /// Interrupt vector; `None`: no interrupts.
    pub vector: Option<u16>,
}

/// A submission queue that a host wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SqConfig {
    /// Identifier, not 0.
    pub qid: u16,
    /// Entries, at least 2.
    pub entries: u32,
    /// Where it is, or where the PRP list of its pages is; page aligned.
    pub address: u64,
    /// `address` is that of the queue itself.
    pub is_contiguous: bool,
    /// The completion queue, which exists.
    pub cqid: u16,
}

/// What becomes of the queues of a PCI function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueueChange {
    /// Create a completion queue.
    CreateCq(CqConfig),
    /// Create a submission queue.
    CreateSq(SqConfig),
    /// Delete a completion queue that no submission queue uses.
    DeleteCq(u16),
    /// Delete a submission queue: its commands have completed, as done or aborted, before.
    DeleteSq(u16),
}

/// What a write to a register asks of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum RegisterEffect {
    /// Nothing.
    None,
    /// The controller is enabled: take commands of these queues, or call
    /// [`Controller::enable_failed`].
    Enabled(AdminQueues),
    /// Complete nothing more, close all queues, the admin queue too if `shutdown` is false, let
    /// what they admitted finish, then call [`Controller::queues_closed`].
    ResetQueues {
        /// Shutdown and not reset: what is in flight completes, and volatile caches are flushed
        /// before `queues_closed`.
        shutdown: bool,
    },
    /// NVM Subsystem Reset: end everything, then call [`Controller::function_reset`] and
    /// [`Controller::note_subsystem_reset`].
    SubsystemReset,
    /// The interrupt mask changed.
    InterruptMask,
}

/// Where a queue is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// The driver has been told to create it. The identifier is taken.
    Coming,
    /// It exists.
    There,
    /// The driver has been told to delete it. The identifier is still taken.
    Going,
}

#[derive(Clone, Copy, Debug)]
struct Sq {
    qid: u16,
    cqid: u16,
    life: Life,
}

#[derive(Clone, Copy, Debug)]
struct Cq {
    qid: u16,
    life: Life,
}

/// Queues that exist or are on their way, and settings of interrupts.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    sqs: Vec<Sq>,
    cqs: Vec<Cq>,
    /// Vectors whose interrupts are not coalesced (Interrupt Vector Configuration, CD).
    pub(crate) not_coalesced: Vec<u16>,
    /// Interrupt Coalescing: TIME 15:8 in units of 100 us, THR 7:0 zero-based.
    pub(crate) coalescing: u32,
}

impl Queues {
    pub(crate) fn is_empty(&self) -> bool {
        self.sqs.is_empty() && self.cqs.is_empty()
    }

    fn sq(&mut self, qid: u16) -> Option<&mut Sq> {
        self.sqs.iter_mut().find(|sq| sq.qid == qid)
    }

    fn cq(&mut self, qid: u16) -> Option<&mut Cq> {
        self.cqs.iter_mut().find(|cq| cq.qid == qid)
    }

    /// The driver is told of a change, which a command may ask for.
    fn begin(&mut self, change: &QueueChange) {
        match *change {
            QueueChange::CreateCq(cq) => self.cqs.push(Cq { qid: cq.qid, life: Life::Coming }),
            QueueChange::CreateSq(sq) => {
                self.sqs.push(Sq { qid: sq.qid, cqid: sq.cqid, life: Life::Coming });
            }
            QueueChange::DeleteCq(qid) => {
                self.cq(qid).into_iter().for_each(|cq| cq.life = Life::Going);
            }
            QueueChange::DeleteSq(qid) => {
                self.sq(qid).into_iter().for_each(|sq| sq.life = Life::Going);
            }
        }
    }
}

/// When to tell of completions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Coalescing {
    /// Completions to gather at most; at least 1.
    pub entries: u32,
    /// How long to wait for them; zero: not at all.
    pub time: Duration,
}

impl Controller {
    pub(crate) fn is_pcie(&self) -> bool {
        self.subsys.limits().transport == Transport::Pcie
    }

    /// The dword of a PCI function's registers at `offset`, of which the two low bits are ignored.
    #[must_use]
    pub fn register_read(&self, offset: u32) -> u32 {
        self.registers.read_dword(offset & !3)
    }

    /// A write of a dword to a PCI function's register: the same event as a Property Set.
    pub fn register_write(&mut self, offset: u32, value: u32) -> RegisterEffect {
        let property = Property(offset & !3);
        match self.registers.write_dword(property.0, value) {
            CcEffect::None if matches!(property, Property::INTMS | Property::INTMC) => {
                RegisterEffect::InterruptMask
            }
            CcEffect::None => RegisterEffect::None,
            CcEffect::Enabled => match self.registers.enabled_queues() {
                Some(queues) => RegisterEffect::Enabled(queues),
                None => RegisterEffect::None,
            },
            CcEffect::CloseQueues(ending) => {
                RegisterEffect::ResetQueues { shutdown: ending == Ending::Shutdown }
            }
            CcEffect::SubsystemReset => RegisterEffect::SubsystemReset,
        }
    }

    /// Bits of INTMS: pins or messages that are masked.
    #[must_use]
    pub fn interrupt_mask(&self) -> u32 {
        self.registers.interrupt_mask()
    }

    /// The admin queues, while the controller is enabled.
    #[must_use]
    pub fn admin_queues(&self) -> Option<AdminQueues> {
        self.registers.enabled_queues()
    }

    /// The queues that the controller was enabled with are not in the host's memory: Controller
    /// Fatal Status.
    pub fn enable_failed(&mut self) {
        self.registers.enable_failed();
    }

    /// Something keeps the controller from going on: Controller Fatal Status, and no commands, until
    /// the host resets it. Its queues are there till then.
    pub fn fail(&mut self) {
        self.registers.fail();
    }

    /// A reset of the PCI function, or NVM Subsystem Reset: everything is as when it was made, but
    /// for the identifier of the host, the time of day, health and the error log. Its queues are
    /// closed.
    pub fn function_reset(&mut self, now: Duration) {
        self.registers = super::enable::Registers::new(
            self.subsys.limits().queue_entries_max,
            self.is_discovery(),
            self.subsys.limits().transport,
        );
        self.reset_features(now);
    }

    /// When to tell of completions on a vector.
    #[must_use]
    pub fn coalescing(&self, vector: u16) -> Coalescing {
        let value = self.pcie.coalescing;
        if value == 0 || self.pcie.not_coalesced.contains(&vector) {
            return Coalescing { entries: 1, time: Duration::ZERO };
        }
        Coalescing {
            entries: (value & 0xff) + 1,
            time: Duration::from_micros(u64::from(value >> 8 & 0xff) * 100),
        }
    }

    /// A host wrote a value to a doorbell that its queue does not have (`is_register` false), or to
    /// the doorbell of a queue that does not exist: an error event, which hosts cannot disable.
    pub fn doorbell_error(&mut self, is_register: bool) {
        let kind = if is_register { aer::Kind::DoorbellRegister } else { aer::Kind::DoorbellValue };
        self.aer.raise(kind);
    }

    /// An [`AdminOutcome::Queue`] was carried out; or the driver has queues of a predecessor.
    pub fn queue_changed(&mut self, change: &QueueChange) {
        let queues = &mut self.pcie;
        match *change {
            QueueChange::CreateCq(cq) => match queues.cq(cq.qid) {
                Some(known) => known.life = Life::There,
                None => queues.cqs.push(Cq { qid: cq.qid, life: Life::There }),
            },
            QueueChange::CreateSq(sq) => match queues.sq(sq.qid) {
                Some(known) => known.life = Life::There,
                None => queues.sqs.push(Sq { qid: sq.qid, cqid: sq.cqid, life: Life::There }),
            },
            QueueChange::DeleteCq(qid) => queues.cqs.retain(|cq| cq.qid != qid),
            QueueChange::DeleteSq(qid) => queues.sqs.retain(|sq| sq.qid != qid),
        }
    }

    /// An [`AdminOutcome::Queue`] was not carried out: everything is as before its command.
    pub fn queue_unchanged(&mut self, change: &QueueChange) {
        let queues = &mut self.pcie;
        match *change {
            QueueChange::CreateCq(cq) => queues.cqs.retain(|known| known.qid != cq.qid),
            QueueChange::CreateSq(sq) => queues.sqs.retain(|known| known.qid != sq.qid),
            QueueChange::DeleteCq(qid) => {
                queues.cq(qid).into_iter().for_each(|cq| cq.life = Life::There);
            }
            QueueChange::DeleteSq(qid) => {
                queues.sq(qid).into_iter().for_each(|sq| sq.life = Life::There);
            }
        }
    }

    /// Identifiers of the submission and of the completion queues, those on their way included, in
    /// ascending order.
    #[must_use]
    pub fn queue_ids(&self) -> (Vec<u16>, Vec<u16>) {
        let mut sqs: Vec<u16> = self.pcie.sqs.iter().map(|sq| sq.qid).collect();
        let mut cqs: Vec<u16> = self.pcie.cqs.iter().map(|cq| cq.qid).collect();
        sqs.sort_unstable();
        cqs.sort_unstable();
        (sqs, cqs)
    }

    /// Create and Delete of queues, and Doorbell Buffer Config.
    pub(crate) fn queue_command(&mut self, sqe: &Sqe) -> Result<Reply, Status> {
        let change = match AdminOpcode(sqe.opcode) {
            AdminOpcode::CREATE_IO_CQ => QueueChange::CreateCq(self.create_cq(sqe)?),
            AdminOpcode::CREATE_IO_SQ => QueueChange::CreateSq(self.create_sq(sqe)?),
            AdminOpcode::DELETE_IO_CQ => QueueChange::DeleteCq(self.delete_cq(sqe)?),
            AdminOpcode::DELETE_IO_SQ => {
                let qid = sqe.cdw10.get() as u16;
                if self.pcie.sq(qid).is_none_or(|sq| sq.life != Life::There) {
                    return Err(INVALID_QUEUE);
                }
                QueueChange::DeleteSq(qid)
            }
            _ => {
                let (shadow, event_idx) = sqe.prps();
                // "If not page aligned, Invalid Field in Command" (Doorbell Buffer Config).
                if (shadow | event_idx) & (MEMORY_PAGE_BYTES - 1) != 0 {
                    return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
                }
                return Ok(Reply::Driver(AdminOutcome::DoorbellBuffer { shadow, event_idx }));
            }
        };
        self.pcie.begin(&change);
        Ok(Reply::Driver(AdminOutcome::Queue(change)))
    }

    /// Identifier, entries and address of a queue to be created.
    fn new_queue(
        &self,
        sqe: &Sqe,
        exists: impl Fn(u16) -> bool,
    ) -> Result<(u16, u32, u64), Status> {
        let cdw10 = sqe.cdw10.get();
        let (qid, entries) = (cdw10 as u16, (cdw10 >> 16) + 1);
        if qid == 0 || qid > self.io_queues_granted() || exists(qid) {
            return Err(INVALID_QUEUE);
        }
        let max = u32::from(self.subsys.limits().queue_entries_max);
        if entries < 2 || entries > max || !self.registers.has_entry_sizes() {
            return Err(Status::INVALID_QUEUE_SIZE.dnr());
        }
        let (address, _) = sqe.prps();
        if sqe.psdt() != 0 {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        if address & (MEMORY_PAGE_BYTES - 1) != 0 {
            return Err(Status::PRP_OFFSET_INVALID.dnr());
        }
        Ok((qid, entries, address))
    }

    fn create_cq(&self, sqe: &Sqe) -> Result<CqConfig, Status> {
        let (qid, entries, address) =
            self.new_queue(sqe, |qid| self.pcie.cqs.iter().any(|cq| cq.qid == qid))?;
        let cdw11 = sqe.cdw11.get();
        let vector = (cdw11 & 2 != 0).then_some((cdw11 >> 16) as u16);
        if vector.is_some_and(|vector| vector > self.io_queues_max()) {
            return Err(Status::INVALID_INTERRUPT_VECTOR.dnr());
        }
        Ok(CqConfig { qid, entries, address, is_contiguous: cdw11 & 1 != 0, vector })
    }

    fn create_sq(&self, sqe: &Sqe) -> Result<SqConfig, Status> {
        let (qid, entries, address) =
            self.new_queue(sqe, |qid| self.pcie.sqs.iter().any(|sq| sq.qid == qid))?;
        let cdw11 = sqe.cdw11.get();
        let cqid = (cdw11 >> 16) as u16;
        if cqid == 0 || cqid > self.io_queues_granted() {
            return Err(INVALID_QUEUE);
        }
        // One that is still to be created does not exist until its command has completed.
        if !self.has_cq(cqid) {
            return Err(Status::COMPLETION_QUEUE_INVALID.dnr());
        }
        // QPRIO is for weighted round robin, which CAP.AMS does not offer.
        Ok(SqConfig { qid, entries, address, is_contiguous: cdw11 & 1 != 0, cqid })
    }

    fn delete_cq(&self, sqe: &Sqe) -> Result<u16, Status> {
        let qid = sqe.cdw10.get() as u16;
        if !self.has_cq(qid) {
            return Err(INVALID_QUEUE);
        }
        if self.pcie.sqs.iter().any(|sq| sq.cqid == qid) {
            return Err(Status::INVALID_QUEUE_DELETION.dnr());
        }
        Ok(qid)
    }

    fn has_cq(&self, qid: u16) -> bool {
        self.pcie.cqs.iter().any(|cq| cq.qid == qid && cq.life == Life::There)
    }

    /// Most I/O queues, and so the number of the last interrupt vector: the admin queue has one.
    pub(crate) fn io_queues_max(&self) -> u16 {
        (self.queues.len() - 1) as u16
    }

    /// A value of Interrupt Coalescing or Interrupt Vector Configuration.
    pub(crate) fn interrupt_feature(&self, fid: Feature, cdw11: u32) -> Result<u32, Status> {
        if fid == Feature::INTERRUPT_COALESCING {
            return Ok(self.pcie.coalescing);
        }
        let vector = cdw11 as u16;
        if vector > self.io_queues_max() {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        let is_off = self.pcie.not_coalesced.contains(&vector);
        Ok(u32::from(vector) | u32::from(is_off) << 16)
    }

    pub(crate) fn set_interrupt_feature(&mut self, fid: Feature, cdw11: u32) -> Result<(), Status> {
        if fid == Feature::INTERRUPT_COALESCING {
            self.pcie.coalescing = cdw11 & 0xffff;
            return Ok(());
        }
        let vector = cdw11 as u16;
        if vector > self.io_queues_max() {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        self.pcie.not_coalesced.retain(|other| *other != vector);
        if cdw11 & 1 << 16 != 0 {
            self.pcie.not_coalesced.push(vector);
        }
        Ok(())
    }

    /// What a successor needs to go on as this controller. Which queues there are is not in it:
    /// the driver knows, and tells by [`Controller::queue_changed`]. Nor are held event requests
    /// and notices: the driver gives the requests again.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let (features, namespaces) = self.features.save();
        let mut not_coalesced = [U16::ZERO; SAVED_VECTORS];
        let vectors = self.pcie.not_coalesced.iter().take(SAVED_VECTORS);
        let vectors_len = vectors.len();
        for (to, from) in not_coalesced.iter_mut().zip(vectors) {
            *to = U16::new(*from);
        }
        let head = Saved {
            magic: SAVED_MAGIC,
            registers: self.registers.save(),
            features,
            hostid: self.hostid,
            aer: self.aer.save(),
            coalescing: U32::new(self.pcie.coalescing),
            not_coalesced_len: U32::new(vectors_len as u32),
            not_coalesced,
            namespaces_len: U32::new(namespaces.len() as u32),
        };
        let mut bytes = head.as_bytes().to_vec();
        for (nsid, error_recovery, notice_mask) in namespaces {
            let saved = SavedNamespace {
                nsid: U32::new(nsid),
                has_error_recovery: u8::from(error_recovery.is_some()),
                notice_mask,
                reserved: [0; 2],
                error_recovery: U32::new(error_recovery.unwrap_or(0)),
            };
            bytes.extend_from_slice(saved.as_bytes());
        }
        bytes
    }

    /// Takes up what [`Controller::save`] gave; `None` if it did not.
    #[must_use]
    pub fn restore(&mut self, bytes: &[u8], now: Duration) -> Option<()> {
        let (saved, rest) = Saved::read_from_prefix(bytes).ok()?;
        let count = saved.namespaces_len.get() as usize;
        if saved.magic != SAVED_MAGIC || rest.len() != count.checked_mul(SAVED_NAMESPACE_LEN)? {
            return None;
        }
        self.registers.restore(&saved.registers)?;
        let mut namespaces = Vec::new();
        for bytes in rest.chunks_exact(SAVED_NAMESPACE_LEN) {
            let ns = SavedNamespace::read_from_bytes(bytes).ok()?;
            let own = (ns.has_error_recovery != 0).then_some(ns.error_recovery.get());
            if self.subsys.namespace(ns.nsid.get()).is_some() {
                namespaces.push((ns.nsid.get(), own, ns.notice_mask));
            }
        }
        self.features.restore(&saved.features, &namespaces, now);
        self.hostid = saved.hostid;
        self.aer.restore(saved.aer);
        let vectors = (saved.not_coalesced_len.get() as usize).min(SAVED_VECTORS);
        self.pcie = Queues {
            not_coalesced: saved.not_coalesced[..vectors].iter().map(|v| v.get()).collect(),
            coalescing: saved.coalescing.get() & 0xffff,
            ..Queues::default()
        };
        Some(())
    }
}

const SAVED_MAGIC: [u8; 8] = *b"nvmectl1";
/// Vectors of which it is saved that they are not coalesced: one for each queue that there may be.
const SAVED_VECTORS: usize = 65;
const SAVED_NAMESPACE_LEN: usize = size_of::<SavedNamespace>();

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Saved {
    magic: [u8; 8],
    registers: SavedRegisters,
    features: SavedFeatures,
    hostid: [u8; 16],
    aer: aer::SavedEvents,
    coalescing: U32,
    not_coalesced_len: U32,
    not_coalesced: [U16; SAVED_VECTORS],
    namespaces_len: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SavedNamespace {
    nsid: U32,
    has_error_recovery: u8,
    notice_mask: u8,
    reserved: [u8; 2],
    error_recovery: U32,
}

#[cfg(test)]
mod tests;
