//! The first half of every association: Connect, CAP, CC.EN, CSTS.RDY, VS, Identify Controller;
//! and its end: CC.SHN, CSTS.SHST. Shared by I/O and discovery sessions.

use core::time::Duration;

use zerocopy::FromBytes;

use super::{
    ADMIN_QUEUE_ENTRIES, Authenticate, Authentication, ConnectNames, SessionError, connect,
};
use crate::ctrl::Instance;
use crate::spec::fabrics::{CNTLID_DYNAMIC, CNTLID_MAX};
use crate::spec::{
    AdminOpcode, AsciiField, Cap, Cc, Cns, Cqe, Csts, FabricsType, IDENTIFY_LEN,
    IdentifyController, Nqn, Property, SglDescriptor, Sqe,
};

/// How often CSTS is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Shortest time a controller is given to become ready or shut down, whatever CAP.TO says.
const READY_TIMEOUT_MIN: Duration = Duration::from_secs(5);

/// A command to be sent, without tag.
pub(super) struct Request {
    pub(super) what: &'static str,
    pub(super) sqe: Sqe,
    pub(super) write: Option<Vec<u8>>,
    pub(super) read_len: u32,
}

impl Request {
    pub(super) fn plain(what: &'static str, sqe: Sqe) -> Request {
        Request { what, sqe, write: None, read_len: 0 }
    }

    pub(super) fn read(what: &'static str, mut sqe: Sqe, read_len: u32) -> Request {
        sqe.dptr = SglDescriptor::transport(read_len);
        Request { what, sqe, write: None, read_len }
    }

    pub(super) fn identify(what: &'static str, cns: Cns, nsid: u32) -> Request {
        let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
        sqe.nsid.set(nsid);
        sqe.cdw10.set(u32::from(cns.0));
        Request::read(what, sqe, IDENTIFY_LEN as u32)
    }

    fn property_get(what: &'static str, property: Property) -> Request {
        let mut sqe = Sqe::fabrics(FabricsType::PROPERTY_GET);
        sqe.cdw10.set(u32::from(property == Property::CAP));
        sqe.cdw11.set(property.0);
        Request::plain(what, sqe)
    }

    fn set_cc(what: &'static str, cc: Cc) -> Request {
        let mut sqe = Sqe::fabrics(FabricsType::PROPERTY_SET);
        sqe.cdw11.set(Property::CC.0);
        sqe.cdw12.set(cc.0);
        Request::plain(what, sqe)
    }
}

/// What Identify Controller said, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControllerInfo {
    /// Controller ID of the association.
    pub cntlid: u16,
    /// Version (VS).
    pub version: u32,
    /// Serial number.
    pub serial: AsciiField<20>,
    /// Model number.
    pub model: AsciiField<40>,
    /// Firmware revision.
    pub firmware: AsciiField<8>,
    /// NQN the subsystem goes by (may be its own name behind the well-known discovery NQN).
    pub subnqn: Nqn,
    /// Controller type.
    pub cntrltype: u8,
    /// What a later controller of this host can end this one by; `None`: not supported.
    pub instance: Option<Instance>,
    /// Optional asynchronous events.
    pub oaes: u32,
    /// Optional NVM commands.
    pub oncs: u16,
    /// Fused operations.
    pub fuses: u16,
    /// Copy Descriptor Formats Supported.
    pub cdfs: u16,
    /// A volatile write cache may be present.
    pub write_cache: bool,
    /// Keep alive is supported.
    pub has_keep_alive: bool,
    /// Any command counts as a Keep Alive (Traffic Based Keep Alive).
    pub traffic_keep_alive: bool,
    /// Bytes one command may transfer; `u32::MAX` if there is no limit.
    pub transfer_bytes_max: u32,
    /// In-capsule data of an I/O command, bytes.
    pub in_capsule_bytes: u32,
    /// Entries of a queue, one-based.
    pub queue_entries_max: u32,
    /// Smallest memory page, bytes: unit of size limits.
    pub page_bytes: u64,
    /// What it reports about Asymmetric Namespace Access; `None`: it does not.
    pub ana: Option<AnaInfo>,
}

/// Asymmetric Namespace Access as a controller reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AnaInfo {
    /// ANA Transition Time: the longest that a group is in the Change state.
    pub transition_time: Duration,
    /// ANA groups of the subsystem (NANAGRPID).
    pub groups: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Connect,
    /// The driver authenticates. Moved on by `authenticated`.
    Authenticate(Authentication),
    Capabilities,
    Enable,
    WaitReady {
        poll_at: Duration,
        until: Duration,
    },
    Version,
    Identify,
    Done,
}

#[derive(Debug)]
pub(super) struct BringUp {
    names: ConnectNames,
    kato: Duration,
    authenticate: Authenticate,
    stage: Stage,
    cntlid: u16,
    cap: Cap,
    version: u32,
}

impl BringUp {
    pub(super) fn new(names: ConnectNames, kato: Duration, authenticate: Authenticate) -> BringUp {
        let stage = Stage::Connect;
        BringUp { names, kato, authenticate, stage, cntlid: 0, cap: Cap(0), version: 0 }
    }

    /// What the driver has to do before anything else is sent.
    pub(super) fn authentication(&self) -> Option<Authentication> {
        match self.stage {
            Stage::Authenticate(wanted) => Some(wanted),
            _ => None,
        }
    }

    pub(super) fn authenticated(&mut self) {
        if let Stage::Authenticate(_) = self.stage {
            self.stage = Stage::Capabilities;
        }
    }

    /// Whether CC.EN was set, so that other commands than fabrics ones may be sent and a shutdown
    /// makes sense.
    pub(super) fn is_enabled(&self) -> bool {
        matches!(self.stage, Stage::Version | Stage::Identify | Stage::Done)
    }

    pub(super) fn poll_at(&self) -> Option<Duration> {
        match self.stage {
            Stage::WaitReady { poll_at, .. } => Some(poll_at),
            _ => None,
        }
    }

    pub(super) fn ready_timeout(&self) -> Duration {
        Duration::from_millis(self.cap.timeout_ms()).max(READY_TIMEOUT_MIN)
    }

    pub(super) fn request(&self, now: Duration) -> Option<Request> {
        Some(match self.stage {
            Stage::Connect => {
                let request =
                    connect(&self.names, CNTLID_DYNAMIC, 0, ADMIN_QUEUE_ENTRIES, self.kato);
                let (sqe, data) = request.encode();
                Request { what: "Connect", sqe, write: Some(data.to_vec()), read_len: 0 }
            }
            Stage::Capabilities => Request::property_get("Property Get CAP", Property::CAP),
            Stage::Enable => Request::set_cc("Property Set CC.EN", Cc::ENABLE),
            Stage::Authenticate(_) => return None,
            Stage::WaitReady { poll_at, .. } if now < poll_at => return None,
            Stage::WaitReady { .. } => Request::property_get("Property Get CSTS", Property::CSTS),
            Stage::Version => Request::property_get("Property Get VS", Property::VS),
            Stage::Identify => Request::identify("Identify Controller", Cns::CONTROLLER, 0),
            Stage::Done => return None,
        })
    }

    /// A completion of the request. `Ok(Some)` ends the bring-up.
    pub(super) fn on_reply(
        &mut self,
        what: &'static str,
        cqe: &Cqe,
        data: &[u8],
        now: Duration,
    ) -> Result<Option<ControllerInfo>, SessionError> {
        let status = cqe.status();
        if !status.is_success() {
            return Err(if self.stage == Stage::Connect {
                SessionError::Refused { status, dw0: cqe.dw0() }
            } else {
                SessionError::Command { what, status }
            });
        }
        match self.stage {
            Stage::Connect => {
                let dw0 = cqe.dw0();
                self.cntlid = dw0 as u16;
                if self.cntlid > CNTLID_MAX {
                    let value = u64::from(self.cntlid);
                    return Err(SessionError::Invalid { what: "controller ID", value });
                }
                let asked = Authentication::asked(dw0);
                let is_asked = asked != Authentication::default();
                self.stage = match self.authenticate {
                    Authenticate::Never if is_asked => {
                        let status = crate::spec::Status::AUTHENTICATION_REQUIRED;
                        return Err(SessionError::Refused { status, dw0 });
                    }
                    Authenticate::WhenAsked if is_asked => Stage::Authenticate(asked),
                    Authenticate::Always => Stage::Authenticate(asked),
                    Authenticate::Never | Authenticate::WhenAsked => Stage::Capabilities,
                };
            }
            Stage::Authenticate(_) => {}
            Stage::Capabilities => {
                self.cap = Cap(cqe.result.get());
                let value = self.cap.0;
                if !self.cap.has_nvm_command_set() || self.cap.page_bytes_min() != 4096 {
                    return Err(SessionError::Invalid { what: "capabilities (CAP)", value });
                }
                if self.cap.queue_entries_max() < 2 {
                    return Err(SessionError::Invalid { what: "queue size (CAP.MQES)", value });
                }
                self.stage = Stage::Enable;
            }
            Stage::Enable => {
                let until = now.saturating_add(self.ready_timeout());
                self.stage = Stage::WaitReady { poll_at: now, until };
            }
            Stage::WaitReady { until, .. } => {
                let csts = Csts(cqe.dw0());
                if csts.cfs() {
                    return Err(SessionError::Fatal);
                }
                if csts.rdy() {
                    self.stage = Stage::Version;
                } else if now >= until {
                    let after = self.ready_timeout();
                    return Err(SessionError::Timeout { what: "CSTS.RDY", after });
                } else {
                    self.stage = Stage::WaitReady { poll_at: now + POLL_INTERVAL, until };
                }
            }
            Stage::Version => {
                self.version = cqe.dw0();
                self.stage = Stage::Identify;
            }
            Stage::Identify => {
                let info = self.check_identify(what, data)?;
                self.stage = Stage::Done;
                return Ok(Some(info));
            }
            Stage::Done => {}
        }
        Ok(None)
    }

    fn check_identify(
        &self,
        what: &'static str,
        data: &[u8],
    ) -> Result<ControllerInfo, SessionError> {
        let id = identify_data::<IdentifyController>(what, data)?;
        let invalid = |what, value: u64| Err(SessionError::Invalid { what, value });
        if id.cntlid.get() != self.cntlid {
            return invalid("another controller ID than in Connect", u64::from(id.cntlid.get()));
        }
        let page_bytes = self.cap.page_bytes_min();
        let transfer_bytes_max = match id.mdts {
            0 => u32::MAX,
            mdts => 1u64
                .checked_shl(u32::from(mdts))
                .and_then(|pages| pages.checked_mul(page_bytes))
                .map_or(u32::MAX, |bytes| u32::try_from(bytes).unwrap_or(u32::MAX)),
        };
        // Reserved in discovery controllers of some targets, so only looked at where it matters.
        let is_io = id.cntrltype != IdentifyController::CNTRLTYPE_DISCOVERY;
        if is_io {
            if id.sgls.get() & 3 == 0 {
                return invalid("SGL support (SGLS)", u64::from(id.sgls.get()));
            }
            if id.ioccsz.get() < 4 || id.ioccsz.get() > (64 + (16 << 20)) / 16 {
                return invalid("I/O command capsule size (IOCCSZ)", u64::from(id.ioccsz.get()));
            }
            if id.iorcsz.get() < 1 {
                return invalid("I/O response capsule size (IORCSZ)", 0);
            }
            if id.icdoff.get() != 0 {
                return invalid("in-capsule data offset (ICDOFF)", u64::from(id.icdoff.get()));
            }
            if id.kas.get() == 0 && self.kato != Duration::ZERO {
                return invalid("keep alive support (KAS)", 0);
            }
        }
        let mut queue_entries_max = self.cap.queue_entries_max();
        if id.maxcmd.get() != 0 {
            // One entry of a queue stays empty, but with flow control off MAXCMD is what counts.
            queue_entries_max = queue_entries_max.min(u32::from(id.maxcmd.get()));
        }
        if is_io && queue_entries_max < 2 {
            return invalid("command limit (MAXCMD)", u64::from(id.maxcmd.get()));
        }
        let subnqn = match Nqn::from_field(&id.subnqn) {
            Ok(nqn) => nqn,
            Err(_) => self.names.subnqn.clone(),
        };
        Ok(ControllerInfo {
            cntlid: self.cntlid,
            version: self.version,
            serial: AsciiField::from_wire(id.sn),
            model: AsciiField::from_wire(id.mn),
            firmware: AsciiField::from_wire(id.fr),
            subnqn,
            cntrltype: id.cntrltype,
            instance: (id.ccrl != 0 && id.ciu != 0)
                .then(|| Instance { ciu: id.ciu, cirn: id.cirn.get() }),
            oaes: id.oaes.get(),
            oncs: id.oncs.get(),
            fuses: id.fuses.get(),
            cdfs: id.cdfs.get(),
            write_cache: id.vwc & IdentifyController::VWC_PRESENT != 0,
            has_keep_alive: id.kas.get() != 0,
            traffic_keep_alive: id.ctratt.get() & IdentifyController::CTRATT_TBKAS != 0,
            transfer_bytes_max,
            in_capsule_bytes: (id.ioccsz.get().max(4) - 4).saturating_mul(16),
            queue_entries_max,
            page_bytes,
            ana: (id.cmic & IdentifyController::CMIC_ANA != 0).then(|| AnaInfo {
                transition_time: Duration::from_secs(id.anatt.into()),
                groups: id.nanagrpid.get(),
            }),
        })
    }
}

/// A 4096-byte answer as its structure.
pub(super) fn identify_data<'a, T>(
    what: &'static str,
    data: &'a [u8],
) -> Result<&'a T, SessionError>
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    T::ref_from_bytes(data).map_err(|_| SessionError::Length {
        what,
        len: data.len(),
        expected: IDENTIFY_LEN as u32,
    })
}

/// Orderly end: CC.SHN, then CSTS.SHST.
#[derive(Debug)]
pub(super) struct Shutdown {
    notified: bool,
    poll_at: Duration,
    until: Duration,
}

impl Shutdown {
    pub(super) fn new(now: Duration, timeout: Duration) -> Shutdown {
        Shutdown { notified: false, poll_at: now, until: now.saturating_add(timeout) }
    }

    pub(super) fn poll_at(&self) -> Duration {
        self.poll_at
    }

    pub(super) fn request(&self, now: Duration) -> Option<Request> {
        if !self.notified {
            return Some(Request::set_cc("Property Set CC.SHN", Cc::ENABLE.with_shn(1)));
        }
        (now >= self.poll_at).then(|| Request::property_get("Property Get CSTS", Property::CSTS))
    }

    /// A completion of the request; true ends it.
    pub(super) fn on_reply(
        &mut self,
        what: &'static str,
        cqe: &Cqe,
        now: Duration,
    ) -> Result<bool, SessionError> {
        let status = cqe.status();
        if !status.is_success() {
            return Err(SessionError::Command { what, status });
        }
        if !self.notified {
            self.notified = true;
            self.poll_at = now;
            return Ok(false);
        }
        let csts = Csts(cqe.dw0());
        if csts.is_shutdown_complete() || csts.cfs() {
            return Ok(true);
        }
        if now >= self.until {
            let after = READY_TIMEOUT_MIN;
            return Err(SessionError::Timeout { what: "CSTS.SHST", after });
        }
        self.poll_at = now + POLL_INTERVAL;
        Ok(false)
    }
}
