//! Dispatch of admin-queue commands.

use core::time::Duration;

use super::enable::{CcEffect, Ending};
use super::{ABORT_MAX, ADMIN_DATA_MAX, Controller, Instance, QueueChange};
use crate::spec::{AdminOpcode, FabricsType, GetLogPage, Property, Sqe, Status, WriteProtectState};
use crate::xfer;

/// What to do with an admin command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum AdminOutcome {
    /// Send `out` (if any) and complete. The whole of `result` is for Property Get; other
    /// commands use the low 32 bits.
    Complete {
        /// Status.
        status: Status,
        /// Dwords 0 and 1 of the completion.
        result: u64,
    },
    /// An Asynchronous Event Request is held; [`Controller::poll_event`] completes its slot.
    Pending,
    /// Complete like [`AdminOutcome::Complete`] (now or later: the host polls CSTS), close every
    /// I/O queue, let what they admitted finish, then call [`Controller::queues_closed`].
    ResetQueues {
        /// Status.
        status: Status,
        /// Dwords 0 and 1 of the completion.
        result: u64,
        /// Shutdown and not reset: volatile caches are to be flushed before `queues_closed`.
        shutdown: bool,
    },
    /// End controller `cntlid` of this subsystem and host, if it is still this instance, and
    /// complete this command when none of its I/O can land any more: with
    /// [`CROSS_RESET_IMMEDIATE`] as the result, or with Invalid Controller Identifier if there is
    /// no such controller (which says the same about its I/O).
    CrossReset {
        /// The controller to end.
        cntlid: u16,
        /// Its instance.
        instance: Instance,
    },
    /// Try to end the command `cid` of queue `sqid` (a held event request has been looked for
    /// already). Complete with success: with result 0 if the command was ended (it completes with
    /// Command Abort Requested, before this one), with [`ABORT_NOT_DONE`] if not. Then call
    /// [`Controller::abort_done`].
    Abort {
        /// Queue of the command; may be one that does not exist.
        sqid: u16,
        /// Its command identifier.
        cid: u16,
    },
    /// NVM Subsystem Reset: complete like [`AdminOutcome::Complete`], then end every controller
    /// of the subsystem, this one included; call [`Controller::note_subsystem_reset`] for those
    /// that hosts connect later.
    SubsystemReset {
        /// Status.
        status: Status,
        /// Dwords 0 and 1 of the completion.
        result: u64,
    },
    /// Create or delete a queue of a PCI function. If it was done, call
    /// [`Controller::queue_changed`], else [`Controller::queue_unchanged`]; then complete: with
    /// success, or with what it failed of. Other commands may come before that.
    Queue(QueueChange),
    /// Doorbell Buffer Config: from now on the doorbells are in host memory, except those of the
    /// admin queues. Complete with success, or with Invalid Field in Command if there is no memory.
    DoorbellBuffer {
        /// Page with the shadow doorbells.
        shadow: u64,
        /// Page with the event indexes.
        event_idx: u64,
    },
    /// Namespace Write Protection Config: change the state for every controller, and complete
    /// (with success and result 0) when no write of before can land any more.
    SetWriteProtect {
        /// Active namespace.
        nsid: u32,
        /// State asked for; differs from the present one.
        state: WriteProtectState,
    },
    /// Reservation Persistence of a namespace with reservations that has the Persist Through Power
    /// Loss capability. Complete with success and, for `set: None`, whether PTPL is set (dword 0
    /// bit 0).
    ReservationPersistence {
        /// Active namespace, or FFFFFFFFh with `set`: all that have the capability.
        nsid: u32,
        /// The new state; `None`: tell the present one.
        set: Option<bool>,
    },
}

/// Dword 0 of an Abort whose command was not aborted.
pub const ABORT_NOT_DONE: u64 = 1;

impl AdminOutcome {
    fn done(status: Status) -> AdminOutcome {
        AdminOutcome::Complete { status, result: 0 }
    }
}

/// Dword 0 of a Cross-Controller Reset that is done when it completes (NVMe Base 2.3: Immediate
/// Reset Successful).
pub const CROSS_RESET_IMMEDIATE: u64 = 1;

/// In-capsule data limit of an admin queue: NVMe/TCP fixes it ("8,192 bytes of in-capsule data
/// for the Admin Queue and for Connect").
pub(crate) const ADMIN_IN_CAPSULE_BYTES: u32 = 8192;

/// Successful reply.
pub(crate) enum Reply {
    /// Dword 0 (and 1).
    Result(u64),
    /// An event request is held.
    Pending,
    /// Close the I/O queues.
    Close(Ending),
    /// Something for the driver.
    Driver(AdminOutcome),
}

impl Controller {
    /// Host-to-controller data this admin command needs before [`Controller::admin`] can run, in
    /// bytes: what the driver takes from the capsule or asks for by R2T. Never more than the
    /// command's data pointer says, and at most 4096; 0 for commands that are refused anyway.
    #[must_use]
    pub fn needs_host_data(sqe: &Sqe) -> u32 {
        let needed = match AdminOpcode(sqe.opcode) {
            AdminOpcode::SET_FEATURES => Self::set_features_data_len(sqe),
            AdminOpcode::FABRICS if sqe.fctype() == FabricsType::CONNECT => 1024,
            _ => 0,
        };
        let available = xfer::parse_data(sqe, ADMIN_IN_CAPSULE_BYTES).map_or(0, |data| data.len());
        needed.min(available).min(ADMIN_DATA_MAX)
    }

    /// [`Controller::needs_host_data`] of a PCI function's command, whose data pointer has no
    /// length.
    #[must_use]
    pub fn needs_host_memory(sqe: &Sqe) -> u32 {
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::SET_FEATURES => Self::set_features_data_len(sqe),
            _ => 0,
        }
    }

    /// Largest controller-to-host payload this admin command can produce, in bytes: what the
    /// driver must be able to hold before it calls [`Controller::admin`].
    #[must_use]
    pub fn host_data_max(&self, sqe: &Sqe) -> u32 {
        let max = match AdminOpcode(sqe.opcode) {
            AdminOpcode::GET_LOG_PAGE => {
                let mdts = u64::from(self.subsys.limits().mdts_bytes);
                GetLogPage::from_sqe(sqe).len.min(mdts) as u32
            }
            AdminOpcode::IDENTIFY | AdminOpcode::GET_FEATURES => ADMIN_DATA_MAX,
            _ => 0,
        };
        xfer::parse_data(sqe, ADMIN_IN_CAPSULE_BYTES).map_or(0, |data| data.len().min(max))
    }

    /// Runs one admin-queue command other than Connect.
    ///
    /// `data` is the host-to-controller payload ([`Controller::needs_host_data`] bytes). `out` is
    /// cleared, and filled with the controller-to-host payload on success: never longer than the
    /// command's data pointer says. `slot` names the command in [`Controller::poll_event`].
    pub fn admin(
        &mut self,
        slot: u16,
        sqe: &Sqe,
        data: &[u8],
        out: &mut Vec<u8>,
        now: Duration,
    ) -> AdminOutcome {
        out.clear();
        self.touch(now);
        let reply = if sqe.is_fabrics() && !self.is_pcie() {
            self.fabrics(sqe)
        } else {
            self.admin_command(slot, sqe, data, out, now)
        };
        match reply {
            Ok(Reply::Result(result)) => AdminOutcome::Complete { status: Status::SUCCESS, result },
            Ok(Reply::Pending) => AdminOutcome::Pending,
            Ok(Reply::Close(ending)) => AdminOutcome::ResetQueues {
                status: Status::SUCCESS,
                result: 0,
                shutdown: ending == Ending::Shutdown,
            },
            Ok(Reply::Driver(outcome)) => outcome,
            Err(status) => {
                out.clear();
                AdminOutcome::done(status)
            }
        }
    }

    fn admin_command(
        &mut self,
        slot: u16,
        sqe: &Sqe,
        data: &[u8],
        out: &mut Vec<u8>,
        now: Duration,
    ) -> Result<Reply, Status> {
        if sqe.fuse() != 0 {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        // Before CC.EN, and while resetting or shutting down, only fabrics commands are processed.
        if !self.is_ready() {
            return Err(Status::COMMAND_SEQUENCE_ERROR.dnr());
        }
        let transfer = self.admin_transfer(sqe)?;
        if !self.has_admin_command(AdminOpcode(sqe.opcode)) {
            return Err(Status::INVALID_COMMAND_OPCODE.dnr());
        }
        let nothing = Reply::Result(0);
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY => self.identify(sqe, transfer, out).map(|()| nothing),
            AdminOpcode::GET_LOG_PAGE => self.get_log_page(sqe, transfer, out).map(|()| nothing),
            AdminOpcode::GET_FEATURES => {
                let reply = self.get_features(sqe, out, now)?;
                if out.len() > transfer as usize {
                    return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
                }
                // The host gets as much as it asked for, so that a transfer is never short. A
                // feature without data (a host may pass a buffer all the same) moves none.
                if !out.is_empty() && !self.is_pcie() {
                    out.resize(transfer.min(ADMIN_DATA_MAX) as usize, 0);
                }
                Ok(reply)
            }
            AdminOpcode::SET_FEATURES => self.set_features(sqe, data, now),
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                self.aer.hold(slot, sqe.cid.get()).map(|()| Reply::Pending)
            }
            AdminOpcode::KEEP_ALIVE => Ok(nothing),
            AdminOpcode::CROSS_CONTROLLER_RESET => self.cross_reset(sqe),
            AdminOpcode::ABORT => self.abort(sqe),
            AdminOpcode::CREATE_IO_CQ
            | AdminOpcode::CREATE_IO_SQ
            | AdminOpcode::DELETE_IO_CQ
            | AdminOpcode::DELETE_IO_SQ
            | AdminOpcode::DOORBELL_BUFFER_CONFIG => self.queue_command(sqe),
            _ => Err(Status::INVALID_COMMAND_OPCODE.dnr()),
        }
    }

    /// Bytes that the data pointer of an admin command is about. A PRP has no length: it is what
    /// the command says, and a page where the command does not.
    fn admin_transfer(&self, sqe: &Sqe) -> Result<u32, Status> {
        if !self.is_pcie() {
            return xfer::parse_data(sqe, ADMIN_IN_CAPSULE_BYTES).map(xfer::DataPtr::len);
        }
        if sqe.psdt() != 0 {
            // "SGLs shall not be used for Admin commands in NVMe over PCIe implementations."
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        Ok(match AdminOpcode(sqe.opcode) {
            // Longer than MDTS is refused by the command itself.
            AdminOpcode::GET_LOG_PAGE => {
                u32::try_from(GetLogPage::from_sqe(sqe).len).unwrap_or(u32::MAX)
            }
            _ => ADMIN_DATA_MAX,
        })
    }

    /// Whether this opcode is supported, as the Commands Supported log page tells it.
    pub(crate) fn has_admin_command(&self, opcode: AdminOpcode) -> bool {
        match opcode {
            AdminOpcode::GET_LOG_PAGE
            | AdminOpcode::IDENTIFY
            | AdminOpcode::SET_FEATURES
            | AdminOpcode::GET_FEATURES
            | AdminOpcode::ASYNC_EVENT_REQUEST => true,
            AdminOpcode::KEEP_ALIVE | AdminOpcode::FABRICS => !self.is_pcie(),
            AdminOpcode::CREATE_IO_CQ
            | AdminOpcode::CREATE_IO_SQ
            | AdminOpcode::DELETE_IO_CQ
            | AdminOpcode::DELETE_IO_SQ
            | AdminOpcode::DOORBELL_BUFFER_CONFIG => self.is_pcie(),
            AdminOpcode::ABORT => !self.is_discovery(),
            AdminOpcode::CROSS_CONTROLLER_RESET => self.instance.is_some(),
            _ => false,
        }
    }

    /// Cross-Controller Reset: dword 10 has the controller (15:0) and its CIU (23:16), dwords 12
    /// and 13 its CIRN.
    fn cross_reset(&self, sqe: &Sqe) -> Result<Reply, Status> {
        let cdw10 = sqe.cdw10.get();
        let instance = Instance { ciu: (cdw10 >> 16) as u8, cirn: sqe.cdw12_13() };
        let cntlid = cdw10 as u16;
        if cntlid == self.cntlid {
            // A controller cannot end itself this way.
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        Ok(Reply::Driver(AdminOutcome::CrossReset { cntlid, instance }))
    }

    /// Abort: held event requests are ended here, everything else is the driver's to try.
    fn abort(&mut self, sqe: &Sqe) -> Result<Reply, Status> {
        let cdw10 = sqe.cdw10.get();
        let (sqid, cid) = (cdw10 as u16, (cdw10 >> 16) as u16);
        if sqid == 0 && self.aer.abort(cid) {
            return Ok(Reply::Result(0));
        }
        if self.aborts >= ABORT_MAX {
            return Err(Status::ABORT_COMMAND_LIMIT_EXCEEDED.dnr());
        }
        self.aborts += 1;
        Ok(Reply::Driver(AdminOutcome::Abort { sqid, cid }))
    }

    fn fabrics(&mut self, sqe: &Sqe) -> Result<Reply, Status> {
        match sqe.fctype() {
            FabricsType::PROPERTY_GET => {
                let (property, is_8_bytes) = property(sqe)?;
                self.registers.read(property, is_8_bytes).map(Reply::Result)
            }
            FabricsType::PROPERTY_SET => {
                let (property, is_8_bytes) = property(sqe)?;
                let value = sqe.cdw12_13();
                let value = if is_8_bytes { value } else { value & 0xffff_ffff };
                Ok(match self.registers.write(property, is_8_bytes, value)? {
                    CcEffect::None | CcEffect::Enabled => Reply::Result(0),
                    CcEffect::CloseQueues(ending) => Reply::Close(ending),
                    CcEffect::SubsystemReset => Reply::Driver(AdminOutcome::SubsystemReset {
                        status: Status::SUCCESS,
                        result: 0,
                    }),
                })
            }
            // The queue is connected already.
            FabricsType::CONNECT => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            // "Disconnect shall not be used on the Admin Queue."
            FabricsType::DISCONNECT => Err(Status::INVALID_QUEUE_TYPE.dnr()),
            _ => Err(Status::INVALID_COMMAND_OPCODE.dnr()),
        }
    }
}

/// Property offset, and whether the size is 8 bytes: ATTRIB (byte 40) bits 2:0 are 0 for 4 bytes
/// and 1 for 8.
fn property(sqe: &Sqe) -> Result<(Property, bool), Status> {
    let is_8_bytes = match sqe.cdw10.get() & 7 {
        0 => false,
        1 => true,
        _ => return Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
    };
    Ok((Property(sqe.cdw11.get()), is_8_bytes))
}

/// Checks a fabrics command that arrived on a connected I/O queue. `Ok` is a Disconnect: complete
/// it with success, then close the connection and call [`Controller::disconnect_io`].
///
/// # Errors
/// The status to complete the command with.
pub fn io_queue_fabrics(sqe: &Sqe) -> Result<(), Status> {
    match sqe.fctype() {
        // RECFMT is in the low half of dword 10.
        FabricsType::DISCONNECT if sqe.cdw10.get() & 0xffff == 0 => Ok(()),
        FabricsType::DISCONNECT => Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr()),
        FabricsType::CONNECT => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
        // Properties are for the admin queue.
        FabricsType::PROPERTY_GET | FabricsType::PROPERTY_SET => {
            Err(Status::INVALID_FIELD_IN_COMMAND.dnr())
        }
        _ => Err(Status::INVALID_COMMAND_OPCODE.dnr()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use zerocopy::FromBytes;
    use zerocopy::little_endian::U32;

    use super::super::{ControllerConfig, ControllerKind};
    use super::*;
    use crate::spec::{Cns, IdentifyController, Nqn, SglDescriptor};
    use crate::subsys::tests::sample;

    const INSTANCE: Instance = Instance { ciu: 9, cirn: 0x1122_3344_5566_7788 };

    fn enabled() -> Controller {
        let config = ControllerConfig {
            cntlid: 5,
            kind: ControllerKind::Io,
            hostnqn: Nqn::new("nqn.2014-08.org.example:host").unwrap(),
            hostid: [1; 16],
            kato: Duration::ZERO,
            subsys: Arc::new(sample()),
        };
        let mut controller = Controller::new(config, Duration::ZERO);
        let mut enable = Sqe::fabrics(FabricsType::PROPERTY_SET);
        enable.cdw11 = U32::new(Property::CC.0);
        enable.cdw12 = U32::new(0x0046_0001);
        assert_eq!(run(&mut controller, &enable).0, AdminOutcome::done(Status::SUCCESS));
        controller
    }

    fn run(controller: &mut Controller, sqe: &Sqe) -> (AdminOutcome, Vec<u8>) {
        let mut out = Vec::new();
        let outcome = controller.admin(0, sqe, &[], &mut out, Duration::ZERO);
        (outcome, out)
    }

    fn cross_reset(cntlid: u16) -> Sqe {
        let mut sqe = Sqe::new(AdminOpcode::CROSS_CONTROLLER_RESET.0);
        sqe.cdw10 = U32::new(u32::from(cntlid) | u32::from(INSTANCE.ciu) << 16);
        sqe.cdw12 = U32::new(INSTANCE.cirn as u32);
        sqe.cdw13 = U32::new((INSTANCE.cirn >> 32) as u32);
        sqe
    }

    #[test]
    fn cross_controller_reset_names_another_controller_and_its_instance() {
        let mut controller = enabled();
        let refused = AdminOutcome::done(Status::INVALID_COMMAND_OPCODE.dnr());
        assert_eq!(run(&mut controller, &cross_reset(6)).0, refused, "not supported yet");
        controller.set_instance(INSTANCE);
        let wanted = AdminOutcome::CrossReset { cntlid: 6, instance: INSTANCE };
        assert_eq!(run(&mut controller, &cross_reset(6)).0, wanted);
        let itself = AdminOutcome::done(Status::INVALID_FIELD_IN_COMMAND.dnr());
        assert_eq!(run(&mut controller, &cross_reset(5)).0, itself);
    }

    #[test]
    fn identify_tells_the_host_its_controllers_instance() {
        let mut controller = enabled();
        let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
        sqe.dptr = SglDescriptor::transport(4096);
        sqe.cdw10 = U32::new(u32::from(Cns::CONTROLLER.0));
        for instance in [None, Some(INSTANCE)] {
            if let Some(instance) = instance {
                controller.set_instance(instance);
            }
            let (outcome, out) = run(&mut controller, &sqe);
            assert_eq!(outcome, AdminOutcome::done(Status::SUCCESS));
            let id = IdentifyController::read_from_bytes(&out[..]).unwrap();
            let found = Instance { ciu: id.ciu, cirn: id.cirn.get() };
            assert_eq!(found, instance.unwrap_or(Instance { ciu: 0, cirn: 0 }));
            assert_eq!(id.ccrl != 0, instance.is_some());
        }
    }
}
