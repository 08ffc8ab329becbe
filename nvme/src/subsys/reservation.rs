//! Reservations (NVMe Base 2.0, "Reservations"): which hosts are registered with a namespace, who
//! holds a reservation of it, and who may therefore read and write.
//!
//! [`Reservations`] is the state of one namespace and changes by [`Reservations::apply`] only. A
//! host is known by its 128-bit identifier: it is one registrant, however many controllers and
//! queues it has. Not here: who is told when (the driver sends notices and aborts commands as
//! [`ReservationEffect`] says), and where the state is kept.

#[cfg(test)]
mod tests;

use crate::ctrl::io::IoCommand;
use crate::spec::Status;

/// Registrants that one namespace can have. A registration beyond is refused with Internal Error,
/// for want of a status that says it.
pub const REGISTRANTS_MAX: usize = 128;

/// Controller identifier reported for a registrant that has no controller now.
const CNTLID_NONE: u16 = 0xffff;

const CONFLICT: Status = Status::RESERVATION_CONFLICT.dnr();
const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();

/// Host identifier (HOSTID).
pub type HostId = [u8; 16];

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

    /// Whether every registrant is a holder.
    #[must_use]
    pub const fn is_all_registrants(self) -> bool {
        matches!(
            self,
            ReservationType::WriteExclusiveAllRegistrants
                | ReservationType::ExclusiveAccessAllRegistrants
        )
    }

    /// Whether it is for the holder alone: neither Registrants Only nor All Registrants.
    const fn is_single(self) -> bool {
        matches!(self, ReservationType::WriteExclusive | ReservationType::ExclusiveAccess)
    }

    /// Whether hosts without access may not even read.
    const fn excludes_reads(self) -> bool {
        matches!(
            self,
            ReservationType::ExclusiveAccess
                | ReservationType::ExclusiveAccessRegistrantsOnly
                | ReservationType::ExclusiveAccessAllRegistrants
        )
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

/// What a host may do to a namespace while nothing about reservations changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights {
    /// Commands of the read group.
    pub read: bool,
    /// Commands of the write group.
    pub write: bool,
}

impl Rights {
    /// Whether a command of this group may run.
    #[must_use]
    #[inline]
    pub const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
            Access::Other => true,
        }
    }
}

/// What a successful reservation command did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReservationEffect {
    /// Registrants, reservation, generation or the power loss state are not what they were: to be
    /// made durable (if the state says PTPL now or said so before) before the command completes.
    pub changed: bool,
    /// Hosts that lost their registration to another's Preempt or Clear.
    pub preempted: Vec<HostId>,
    /// Whom to tell what: every controller of the host.
    pub notices: Vec<(HostId, NoticeKind)>,
    /// Preempt and Abort: commands of `preempted` hosts to the namespace that have not reached it
    /// are to be aborted, and this command completes when those that have are done.
    pub abort_preempted: bool,
}

/// A registrant as it is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registrant {
    /// Host identifier.
    pub host: HostId,
    /// Its reservation key, not 0.
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
    pub holder: Option<HostId>,
}

/// A [`ReservationState`] that no sequence of commands leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidReservations {
    /// More than [`REGISTRANTS_MAX`].
    #[error("{0} registrants are more than a namespace can have")]
    TooMany(usize),
    /// A registrant with key 0.
    #[error("a registrant has the reservation key 0")]
    ZeroKey,
    /// A host that is registered twice.
    #[error("a host is registered twice")]
    Twice,
    /// The holder is missing, not registered, or named where there is none.
    #[error("the reservation holder does not fit the reservation")]
    Holder,
}

/// Registrants and reservation of one namespace. See the module documentation.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reservations {
    /// Invariants, as [`Reservations::check`] has them.
    state: ReservationState,
}

impl Reservations {
    /// No registrant, no reservation.
    #[must_use]
    pub fn new() -> Reservations {
        Reservations::default()
    }

    /// From what was kept, after a restart: without PTPL everything is gone.
    ///
    /// # Errors
    /// [`InvalidReservations`] says what cannot be.
    pub fn from_state(state: ReservationState) -> Result<Reservations, InvalidReservations> {
        Self::check(&state)?;
        Ok(if state.ptpl { Reservations { state } } else { Reservations::default() })
    }

    /// What is to be kept.
    #[must_use]
    pub fn to_state(&self) -> ReservationState {
        self.state.clone()
    }

    /// Registrants and reservation as they are.
    #[must_use]
    pub fn state(&self) -> &ReservationState {
        &self.state
    }

    /// Whether there is a reservation. Without one, every host may do everything.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.state.rtype.is_some()
    }

    fn check(state: &ReservationState) -> Result<(), InvalidReservations> {
        let registrants = &state.registrants;
        if registrants.len() > REGISTRANTS_MAX {
            return Err(InvalidReservations::TooMany(registrants.len()));
        }
        if registrants.iter().any(|r| r.key == 0) {
            return Err(InvalidReservations::ZeroKey);
        }
        for (at, registrant) in registrants.iter().enumerate() {
            if registrants[..at].iter().any(|r| r.host == registrant.host) {
                return Err(InvalidReservations::Twice);
            }
        }
        let fits = match (state.rtype, state.holder) {
            (None, None) => true,
            (Some(rtype), None) => rtype.is_all_registrants() && !registrants.is_empty(),
            (Some(rtype), Some(host)) => {
                !rtype.is_all_registrants() && registrants.iter().any(|r| r.host == host)
            }
            (None, Some(_)) => false,
        };
        if fits { Ok(()) } else { Err(InvalidReservations::Holder) }
    }

    /// Carries a reservation command of `host` out. Commands of one namespace one after the other.
    ///
    /// # Errors
    /// The status to complete the command with; nothing has changed then.
    pub fn apply(
        &mut self,
        host: &HostId,
        request: &ReservationRequest,
    ) -> Result<ReservationEffect, Status> {
        let effect = match *request {
            ReservationRequest::Register { action, iekey, persist, crkey, nrkey } => {
                self.register(host, action, iekey, persist, crkey, nrkey)
            }
            ReservationRequest::Acquire { action, rtype, crkey, prkey } => {
                self.must_be_registered(host, crkey)?;
                match action {
                    AcquireAction::Acquire => self.acquire(host, rtype),
                    AcquireAction::Preempt => self.preempt(host, rtype, prkey),
                    AcquireAction::PreemptAndAbort => {
                        self.preempt(host, rtype, prkey).map(|effect| ReservationEffect {
                            abort_preempted: !effect.preempted.is_empty(),
                            ..effect
                        })
                    }
                }
            }
            ReservationRequest::Release { action, crkey } => {
                self.must_be_registered(host, crkey)?;
                match action {
                    ReleaseAction::Release(rtype) => self.release(host, rtype),
                    ReleaseAction::Clear => Ok(self.clear(host)),
                }
            }
        };
        debug_assert_eq!(Self::check(&self.state), Ok(()));
        effect
    }

    /// What a host may do (NVMe Base 2.0, "Command Behavior in the Presence of a Reservation").
    #[must_use]
    pub fn rights(&self, host: &HostId) -> Rights {
        let all = Rights { read: true, write: true };
        let Some(rtype) = self.state.rtype else { return all };
        let is_privileged = if rtype.is_single() {
            self.state.holder.as_ref() == Some(host)
        } else {
            self.key_of(host).is_some()
        };
        if is_privileged { all } else { Rights { read: !rtype.excludes_reads(), write: false } }
    }

    /// Whether a command of this group of a host may run; otherwise it fails with Reservation
    /// Conflict.
    #[must_use]
    pub fn allows(&self, host: &HostId, access: Access) -> bool {
        self.rights(host).allows(access)
    }

    /// Reservation Status data structure, with an entry for every controller of a registrant, of
    /// which `controllers` are the subsystem's, and one for a registrant that has none. Extended:
    /// with 128-bit host identifiers; otherwise the caller vouches that the hosts' have 64 bits.
    #[must_use]
    pub fn report(&self, extended: bool, controllers: &[(u16, HostId)]) -> Vec<u8> {
        let mut by_host: Vec<(HostId, u16)> =
            controllers.iter().map(|&(cntlid, host)| (host, cntlid)).collect();
        by_host.sort_unstable();
        let mut out = vec![0; if extended { 64 } else { 24 }];
        let mut count = 0_u16;
        'all: for registrant in &self.state.registrants {
            let from = by_host.partition_point(|(host, _)| *host < registrant.host);
            let own = by_host[from..].iter().take_while(|(host, _)| *host == registrant.host);
            let mut entry = |cntlid: u16| {
                let is_holder = self.is_holder(&registrant.host);
                out.extend_from_slice(&cntlid.to_le_bytes());
                out.extend_from_slice(&[u8::from(is_holder), 0, 0, 0, 0, 0]);
                if extended {
                    out.extend_from_slice(&registrant.key.to_le_bytes());
                    out.extend_from_slice(&registrant.host);
                    out.extend_from_slice(&[0; 32]);
                } else {
                    out.extend_from_slice(&registrant.host[..8]);
                    out.extend_from_slice(&registrant.key.to_le_bytes());
                }
            };
            let mut has_controller = false;
            for &(_, cntlid) in own {
                has_controller = true;
                if count == u16::MAX {
                    break 'all;
                }
                entry(cntlid);
                count += 1;
            }
            if !has_controller && count < u16::MAX {
                entry(CNTLID_NONE);
                count += 1;
            }
        }
        out[0..4].copy_from_slice(&self.state.generation.to_le_bytes());
        out[4] = self.state.rtype.map_or(0, ReservationType::to_wire);
        out[5..7].copy_from_slice(&count.to_le_bytes());
        out[9] = u8::from(self.state.ptpl);
        out
    }

    fn key_of(&self, host: &HostId) -> Option<u64> {
        self.state.registrants.iter().find(|r| r.host == *host).map(|r| r.key)
    }

    fn is_holder(&self, host: &HostId) -> bool {
        match self.state.rtype {
            None => false,
            Some(rtype) if rtype.is_all_registrants() => self.key_of(host).is_some(),
            Some(_) => self.state.holder.as_ref() == Some(host),
        }
    }

    /// Acquire and Release are for registrants that know their key.
    fn must_be_registered(&self, host: &HostId, crkey: u64) -> Result<(), Status> {
        if self.key_of(host) == Some(crkey) { Ok(()) } else { Err(CONFLICT) }
    }

    fn register(
        &mut self,
        host: &HostId,
        action: RegisterAction,
        iekey: bool,
        persist: PersistChange,
        crkey: u64,
        nrkey: u64,
    ) -> Result<ReservationEffect, Status> {
        let mut effect = ReservationEffect { changed: true, ..ReservationEffect::default() };
        let key = self.key_of(host);
        // 0 says "no key" in Preempt, so that it can be no host's.
        if nrkey == 0 && action != RegisterAction::Unregister {
            return Err(INVALID_FIELD);
        }
        match (action, key) {
            (RegisterAction::Register, None) => self.add(host, nrkey)?,
            // The key it has, again, is no error; another one takes Replace.
            (RegisterAction::Register, Some(key)) if key == nrkey => {}
            (RegisterAction::Register, Some(_)) => return Err(CONFLICT),
            (RegisterAction::Replace, None) if iekey => self.add(host, nrkey)?,
            (RegisterAction::Replace | RegisterAction::Unregister, Some(key))
                if iekey || key == crkey =>
            {
                if action == RegisterAction::Replace {
                    for registrant in &mut self.state.registrants {
                        if registrant.host == *host {
                            registrant.key = nrkey;
                        }
                    }
                } else {
                    let before = self.state.rtype;
                    self.remove(host);
                    // The holder of a Registrants Only reservation leaves: the others are told.
                    if before != self.state.rtype {
                        self.tell_released(before, host, &mut effect);
                    }
                }
            }
            (RegisterAction::Replace | RegisterAction::Unregister, _) => return Err(CONFLICT),
        }
        match persist {
            PersistChange::Keep => {}
            PersistChange::Clear => self.state.ptpl = false,
            PersistChange::Set => self.state.ptpl = true,
        }
        self.next_generation();
        Ok(effect)
    }

    fn acquire(
        &mut self,
        host: &HostId,
        rtype: ReservationType,
    ) -> Result<ReservationEffect, Status> {
        let changed = match self.state.rtype {
            None => {
                self.reserve(host, rtype);
                true
            }
            // The holder may say it again.
            Some(held) if held == rtype && self.is_holder(host) => false,
            Some(_) => return Err(CONFLICT),
        };
        Ok(ReservationEffect { changed, ..ReservationEffect::default() })
    }

    /// Preempt (NVMe Base 2.0, "Preempting a Reservation or Registration").
    fn preempt(
        &mut self,
        host: &HostId,
        rtype: ReservationType,
        prkey: u64,
    ) -> Result<ReservationEffect, Status> {
        let mut effect = ReservationEffect { changed: true, ..ReservationEffect::default() };
        let held = self.state.rtype;
        let holder_key = self.state.holder.and_then(|holder| self.key_of(&holder));
        let takes_reservation = match held {
            None => false,
            Some(held) if held.is_all_registrants() => prkey == 0,
            Some(_) if prkey == 0 => return Err(INVALID_FIELD),
            Some(_) => holder_key == Some(prkey),
        };
        // Who takes the reservation stays registered, even with the key named.
        let is_target = |r: &Registrant| {
            (prkey == 0 || r.key == prkey) && !(takes_reservation && r.host == *host)
        };
        let targets: Vec<HostId> =
            self.state.registrants.iter().filter(|r| is_target(r)).map(|r| r.host).collect();
        // Without All Registrants, 0 is a key that no host has.
        let none_named = targets.is_empty() || prkey == 0;
        if !takes_reservation && none_named {
            return Err(CONFLICT);
        }
        for target in &targets {
            self.remove(target);
            if target != host {
                effect.preempted.push(*target);
                effect.notices.push((*target, NoticeKind::RegistrationPreempted));
            }
        }
        if takes_reservation {
            self.reserve(host, rtype);
            if held != Some(rtype) {
                self.tell_others(host, NoticeKind::ReservationReleased, &mut effect);
            }
        }
        self.next_generation();
        Ok(effect)
    }

    fn release(
        &mut self,
        host: &HostId,
        rtype: Option<ReservationType>,
    ) -> Result<ReservationEffect, Status> {
        let mut effect = ReservationEffect::default();
        // Nothing to release for this host, which is no error.
        if !self.is_holder(host) {
            return Ok(effect);
        }
        let held = self.state.rtype;
        if rtype != held {
            return Err(INVALID_FIELD);
        }
        effect.changed = true;
        (self.state.rtype, self.state.holder) = (None, None);
        self.tell_released(held, host, &mut effect);
        Ok(effect)
    }

    fn clear(&mut self, host: &HostId) -> ReservationEffect {
        let mut effect = ReservationEffect { changed: true, ..ReservationEffect::default() };
        self.tell_others(host, NoticeKind::ReservationPreempted, &mut effect);
        effect.preempted = effect.notices.iter().map(|(host, _)| *host).collect();
        (self.state.rtype, self.state.holder) = (None, None);
        self.state.registrants.clear();
        self.next_generation();
        effect
    }

    fn add(&mut self, host: &HostId, key: u64) -> Result<(), Status> {
        if self.state.registrants.len() >= REGISTRANTS_MAX {
            return Err(Status::INTERNAL_ERROR.dnr());
        }
        self.state.registrants.push(Registrant { host: *host, key });
        Ok(())
    }

    /// Unregisters a host. A reservation that nobody holds any more is released.
    fn remove(&mut self, host: &HostId) {
        self.state.registrants.retain(|r| r.host != *host);
        if self.state.holder == Some(*host) || self.state.registrants.is_empty() {
            (self.state.rtype, self.state.holder) = (None, None);
        }
    }

    fn reserve(&mut self, host: &HostId, rtype: ReservationType) {
        self.state.rtype = Some(rtype);
        self.state.holder = if rtype.is_all_registrants() { None } else { Some(*host) };
    }

    /// The generation counts each Register, Clear, Preempt and Preempt and Abort that succeeds.
    fn next_generation(&mut self) {
        self.state.generation = self.state.generation.wrapping_add(1);
    }

    /// A reservation of a type that lets registrants in was released: they are told.
    fn tell_released(
        &self,
        held: Option<ReservationType>,
        host: &HostId,
        effect: &mut ReservationEffect,
    ) {
        if held.is_some_and(|rtype| !rtype.is_single()) {
            self.tell_others(host, NoticeKind::ReservationReleased, effect);
        }
    }

    /// A notice for every registrant but `host`.
    fn tell_others(&self, host: &HostId, kind: NoticeKind, effect: &mut ReservationEffect) {
        let others = self.state.registrants.iter().filter(|r| r.host != *host);
        effect.notices.extend(others.map(|r| (r.host, kind)));
    }
}
