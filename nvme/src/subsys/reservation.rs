//! Reservations (NVMe Base 2.0, "Reservations"): which hosts are registered with a namespace, who
//! holds a reservation of it, and who may therefore read and write.

use crate::ctrl::io::IoCommand;
use crate::spec::Status;

/// Reservation Type (RTYPE).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum ReservationType {
    /// Write Exclusive: the holder writes, everyone reads.
    WriteExclusive = 1,
    /// Exclusive Access: the holder reads and writes.
    ExclusiveAccess = 2,
    /// Write Exclusive - Registrants Only: registrants write, everyone reads.
    WriteExclusiveRegistrantsOnly = 3,
    /// Exclusive Access - Registrants Only: registrants read and write.
    ExclusiveAccessRegistrantsOnly = 4,
    /// Write Exclusive - All Registrants: as above, and every registrant is a holder.
    WriteExclusiveAllRegistrants = 5,
    /// Exclusive Access - All Registrants: as above, and every registrant is a holder.
    ExclusiveAccessAllRegistrants = 6,
}

impl ReservationType {
    /// All six.
    pub const ALL: [ReservationType; 6] = [
        ReservationType::WriteExclusive,
        ReservationType::ExclusiveAccess,
        ReservationType::WriteExclusiveRegistrantsOnly,
        ReservationType::ExclusiveAccessRegistrantsOnly,
        ReservationType::WriteExclusiveAllRegistrants,
        ReservationType::ExclusiveAccessAllRegistrants,
    ];

    /// From the value on the wire; `None` for 0 and reserved values.
    #[must_use]
    pub fn from_wire(value: u8) -> Option<ReservationType> {
        Self::ALL.get(usize::from(value).wrapping_sub(1)).copied()
    }

    /// The value on the wire, 1..=6.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self as u8
    }
}

/// Reservation Register Action (RREGA).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegisterAction {
    /// Register Reservation Key.
    Register,
    /// Unregister Reservation Key.
    Unregister,
    /// Replace Reservation Key.
    Replace,
}

/// Change Persist Through Power Loss State (CPTPL).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PersistChange {
    /// No change.
    Keep,
    /// Reservations and registrants are gone after a power loss.
    Clear,
    /// Reservations and registrants are kept through a power loss.
    Set,
}

/// Reservation Acquire Action (RACQA).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AcquireAction {
    /// Acquire.
    Acquire,
    /// Preempt.
    Preempt,
    /// Preempt and Abort: commands of the preempted hosts are aborted, too.
    PreemptAndAbort,
}

/// Reservation Release Action (RRELA), with the type that Release must name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReleaseAction {
    /// Release the reservation of this type; `None`: a type that no reservation has.
    Release(Option<ReservationType>),
    /// Clear: release the reservation and unregister everyone.
    Clear,
}

/// A Reservation Register, Acquire or Release command with its data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReservationRequest {
    /// Reservation Register.
    Register {
        /// What to do.
        action: RegisterAction,
        /// Ignore Existing Key: CRKEY is not looked at.
        iekey: bool,
        /// What to do about power loss.
        persist: PersistChange,
        /// Current Reservation Key.
        crkey: u64,
        /// New Reservation Key.
        nrkey: u64,
    },
    /// Reservation Acquire.
    Acquire {
        /// What to do.
        action: AcquireAction,
        /// Type of the reservation.
        rtype: ReservationType,
        /// Current Reservation Key.
        crkey: u64,
        /// Preempt Reservation Key.
        prkey: u64,
    },
    /// Reservation Release.
    Release {
        /// What to do.
        action: ReleaseAction,
        /// Current Reservation Key.
        crkey: u64,
    },
}

impl ReservationRequest {
    /// A decoded reservation command with its data, of which what is behind
    /// [`IoCommand::host_data_len`] is ignored.
    ///
    /// # Errors
    /// Data SGL Length Invalid if there is less; Invalid Field in Command for another command.
    pub fn parse(command: &IoCommand, data: &[u8]) -> Result<ReservationRequest, Status> {
        let key = |index: usize| match data.as_chunks::<8>().0.get(index) {
            Some(bytes) => Ok(u64::from_le_bytes(*bytes)),
            None => Err(Status::DATA_SGL_LENGTH_INVALID.dnr()),
        };
        Ok(match *command {
            IoCommand::ReservationRegister { action, iekey, persist, .. } => {
                let (crkey, nrkey) = (key(0)?, key(1)?);
                ReservationRequest::Register { action, iekey, persist, crkey, nrkey }
            }
            IoCommand::ReservationAcquire { action, rtype, .. } => {
                let (crkey, prkey) = (key(0)?, key(1)?);
                ReservationRequest::Acquire { action, rtype, crkey, prkey }
            }
            IoCommand::ReservationRelease { action, .. } => {
                ReservationRequest::Release { action, crkey: key(0)? }
            }
            _ => return Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
        })
    }
}

/// What a command does to data, as far as reservations care (NVMe Base 2.0, "Command Behavior in
/// the Presence of a Reservation"). Reservation commands are judged by [`ReservationRequest`]s.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read command group.
    Read,
    /// Write command group.
    Write,
    /// Neither: never in conflict.
    Other,
}

/// Reservation notification (log page 80h, "Reservation Notification Log Page Type").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum NoticeKind {
    /// Registration Preempted: another host removed this host's registration.
    RegistrationPreempted = 1,
    /// Reservation Released: another host released a reservation that this host is registrant of.
    ReservationReleased = 2,
    /// Reservation Preempted: another host took this host's reservation.
    ReservationPreempted = 3,
}

/// What a successful reservation command did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReservationEffect {
    /// Registrants, reservation, generation or the power loss state are not what they were: to be
    /// made durable (if PTPL) before the command is completed.
    pub changed: bool,
    /// Hosts that lost their registration to another's Preempt or Clear.
    pub preempted: Vec<[u8; 16]>,
    /// Whom to tell what.
    pub notices: Vec<([u8; 16], NoticeKind)>,
    /// Commands of `preempted` hosts to the namespace are to be aborted before this one completes.
    pub abort_preempted: bool,
}

/// A registrant as it is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registrant {
    /// Host identifier.
    pub host: [u8; 16],
    /// Its reservation key.
    pub key: u64,
}

/// All that is known about the reservations of one namespace, as plain data: what is written to a
/// store and read back.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReservationState {
    /// Persist Through Power Loss State.
    pub ptpl: bool,
    /// Generation counter.
    pub generation: u32,
    /// Registrants, in the order in which they registered.
    pub registrants: Vec<Registrant>,
    /// Type of the reservation held; `None`: none is held.
    pub rtype: Option<ReservationType>,
    /// The host that holds it; `None` if none does or if all registrants do.
    pub holder: Option<[u8; 16]>,
}
