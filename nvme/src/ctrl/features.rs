//! Get Features and Set Features. None is saveable: a controller lives as long as its
//! association, and what outlives it (write protection, persistence of reservations) is kept by
//! the driver without being asked to.

use core::time::Duration;
use std::collections::BTreeMap;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Controller;
use super::admin::{AdminOutcome, Reply};
use super::log::Thresholds;
use crate::spec::{
    Feature, IdentifyController, NSID_ALL, Select, Sqe, Status, WriteProtectState, effects,
};
use crate::subsys::NamespaceInfo;
use crate::subsys::reservation::NoticeKind;
use crate::xfer::Transport;

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT.dnr();

/// Reservation Notification Mask: REGPRE, RESREL and RESPRE, the bits of the notice kinds 1 to 3.
const NOTICE_MASK: u8 = 0b1110;

/// Length of the Host Behavior Support data.
const HOST_BEHAVIOR_LEN: usize = 512;
/// Length of the Timestamp data.
const TIMESTAMP_LEN: usize = 8;
/// Length of an extended (128-bit) Host Identifier.
const HOST_ID_LEN: usize = 16;

/// Composite over temperature threshold until the host sets one: never reached.
const OVER_TEMPERATURE_DEFAULT: u16 = 0xffff;

/// Values the host set; a controller reset restores the defaults.
#[derive(Debug)]
pub(crate) struct Features {
    arbitration: u32,
    /// Error Recovery of the namespaces that have no value of their own.
    error_recovery: u32,
    write_atomicity: u32,
    /// Values of single namespaces; only active ones are here.
    namespaces: BTreeMap<u32, PerNamespace>,
    /// Composite temperature thresholds, kelvin: over, under.
    thresholds: [u16; 2],
    /// ACRE: Advanced Command Retry Enable.
    acre: bool,
    io_queues_max: u16,
    io_queues_granted: u16,
    /// Milliseconds, when they were so, and whether a host said so.
    timestamp: (u64, Duration, bool),
    /// Keep alive timeout that Connect asked for.
    kato_default: Duration,
}

/// Features as they are saved.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SavedFeatures {
    arbitration: U32,
    error_recovery: U32,
    write_atomicity: U32,
    thresholds: [U16; 2],
    io_queues_granted: U16,
    acre: u8,
    has_timestamp: u8,
    timestamp_ms: U64,
}

#[derive(Clone, Copy, Debug, Default)]
struct PerNamespace {
    error_recovery: Option<u32>,
    notice_mask: u8,
}

impl Features {
    pub(crate) fn new(io_queues_max: u16, kato_default: Duration, now: Duration) -> Features {
        Features {
            arbitration: 0,
            error_recovery: 0,
            write_atomicity: 0,
            namespaces: BTreeMap::new(),
            thresholds: [OVER_TEMPERATURE_DEFAULT, 0],
            acre: false,
            io_queues_max,
            io_queues_granted: io_queues_max,
            timestamp: (0, now, false),
            kato_default,
        }
    }

    /// Defaults, but for the time of day: "a Controller Level Reset preserves the timestamp" is
    /// reported in the Synch and Origin bits.
    pub(crate) fn reset(&mut self, io_queues_max: u16, now: Duration) {
        let timestamp = self.timestamp;
        *self = Features { timestamp, ..Features::new(io_queues_max, self.kato_default, now) };
    }

    /// What outlives this process: the features, and those of single namespaces.
    pub(crate) fn save(&self) -> (SavedFeatures, Vec<(u32, Option<u32>, u8)>) {
        let features = SavedFeatures {
            arbitration: U32::new(self.arbitration),
            error_recovery: U32::new(self.error_recovery),
            write_atomicity: U32::new(self.write_atomicity),
            thresholds: self.thresholds.map(U16::new),
            io_queues_granted: U16::new(self.io_queues_granted),
            acre: u8::from(self.acre),
            has_timestamp: u8::from(self.timestamp.2),
            timestamp_ms: U64::new(self.timestamp.0),
        };
        let namespaces = self.namespaces.iter();
        let namespaces = namespaces.map(|(nsid, ns)| (*nsid, ns.error_recovery, ns.notice_mask));
        (features, namespaces.collect())
    }

    /// Takes up what [`Features::save`] gave. The time of day goes on from what the host set: how
    /// long nobody was there is not known.
    pub(crate) fn restore(
        &mut self,
        saved: &SavedFeatures,
        namespaces: &[(u32, Option<u32>, u8)],
        now: Duration,
    ) {
        let granted = saved.io_queues_granted.get().clamp(1, self.io_queues_max.max(1));
        *self = Features {
            arbitration: saved.arbitration.get(),
            error_recovery: saved.error_recovery.get(),
            write_atomicity: saved.write_atomicity.get(),
            thresholds: saved.thresholds.map(U16::get),
            io_queues_granted: granted,
            acre: saved.acre != 0,
            timestamp: (saved.timestamp_ms.get(), now, saved.has_timestamp != 0),
            namespaces: namespaces
                .iter()
                .map(|&(nsid, error_recovery, notice_mask)| {
                    (nsid, PerNamespace { error_recovery, notice_mask })
                })
                .collect(),
            ..Features::new(self.io_queues_max, self.kato_default, now)
        };
    }

    pub(crate) fn io_queues_granted(&self) -> u16 {
        self.io_queues_granted
    }

    /// Composite temperature thresholds.
    pub(crate) fn thresholds(&self) -> Thresholds {
        Thresholds { over: self.thresholds[0], under: self.thresholds[1] }
    }

    /// Whether the host does not want to hear of this.
    pub(crate) fn masks_notice(&self, nsid: u32, kind: NoticeKind) -> bool {
        self.namespaces.get(&nsid).is_some_and(|ns| ns.notice_mask >> kind as u8 & 1 != 0)
    }

    /// Forgets what was set for namespaces that are gone.
    pub(crate) fn retain_namespaces(&mut self, mut is_active: impl FnMut(u32) -> bool) {
        self.namespaces.retain(|&nsid, _| is_active(nsid));
    }

    /// Timestamp data: milliseconds in bits 47:0, Origin (bits 51:49) 001b once a host set it.
    fn timestamp_data(&self, now: Duration) -> [u8; TIMESTAMP_LEN] {
        let (base_ms, at, is_set) = self.timestamp;
        let elapsed_ms = now.saturating_sub(at).as_millis() as u64;
        let ms = base_ms.wrapping_add(elapsed_ms) & 0xffff_ffff_ffff;
        (ms | u64::from(is_set) << 49).to_le_bytes()
    }
}

/// Number of Queues result: NCQA in 31:16, NSQA in 15:0, zero-based.
fn number_of_queues(count: u16) -> u32 {
    let count_z = u32::from(count.max(1) - 1);
    count_z << 16 | count_z
}

/// Which namespace a namespace specific feature is about.
enum Target<'a> {
    One(&'a NamespaceInfo),
    /// FFFFFFFFh: all that are active.
    All,
}

/// Whether the feature is one of a namespace and not of the controller.
fn is_namespace_specific(fid: Feature) -> bool {
    matches!(
        fid,
        Feature::ERROR_RECOVERY
            | Feature::RESERVATION_NOTIFICATION_MASK
            | Feature::RESERVATION_PERSISTENCE
            | Feature::NAMESPACE_WRITE_PROTECTION
    )
}

impl Controller {
    fn has_feature(&self, fid: Feature) -> bool {
        match fid {
            Feature::ASYNC_EVENT_CONFIGURATION => true,
            Feature::KEEP_ALIVE_TIMER => !self.is_pcie(),
            Feature::INTERRUPT_COALESCING | Feature::INTERRUPT_VECTOR => self.is_pcie(),
            Feature::ARBITRATION
            | Feature::POWER_MANAGEMENT
            | Feature::TEMPERATURE_THRESHOLD
            | Feature::ERROR_RECOVERY
            | Feature::VOLATILE_WRITE_CACHE
            | Feature::NUMBER_OF_QUEUES
            | Feature::WRITE_ATOMICITY
            | Feature::TIMESTAMP
            | Feature::HOST_BEHAVIOR
            | Feature::HOST_IDENTIFIER
            | Feature::RESERVATION_NOTIFICATION_MASK
            | Feature::RESERVATION_PERSISTENCE => !self.is_discovery(),
            // A volume's own affair: a PCI function has no say in it.
            Feature::NAMESPACE_WRITE_PROTECTION => !self.is_discovery() && !self.is_pcie(),
            _ => false,
        }
    }

    /// Feature identifiers supported, for log page 12h.
    pub(crate) fn feature_ids(&self) -> impl Iterator<Item = Feature> + '_ {
        (0..=u8::MAX).map(Feature).filter(|&fid| self.has_feature(fid))
    }

    /// What log page 12h says of a supported feature.
    pub(crate) fn feature_effects(&self, fid: Feature) -> u32 {
        let scope = if is_namespace_specific(fid) {
            effects::SCOPE_NAMESPACE
        } else {
            effects::SCOPE_CONTROLLER
        };
        let change = match fid {
            Feature::NAMESPACE_WRITE_PROTECTION => effects::NAMESPACE_CAPABILITY_CHANGE,
            _ => 0,
        };
        effects::SUPPORTED | scope | change
    }

    /// Host-to-controller data length of a Set Features command.
    pub(crate) fn set_features_data_len(sqe: &Sqe) -> u32 {
        match Feature(sqe.cdw10.get() as u8) {
            Feature::TIMESTAMP => TIMESTAMP_LEN as u32,
            Feature::HOST_BEHAVIOR => HOST_BEHAVIOR_LEN as u32,
            // EXHID clear: a 64-bit identifier, which fabrics do not have.
            Feature::HOST_IDENTIFIER if sqe.psdt() == 0 && sqe.cdw11.get() & 1 == 0 => {
                HOST_ID_LEN as u32 / 2
            }
            Feature::HOST_IDENTIFIER => HOST_ID_LEN as u32,
            _ => 0,
        }
    }

    /// The namespace or namespaces that a command for a namespace specific feature is about.
    fn feature_target(&self, nsid: u32) -> Result<Target<'_>, Status> {
        if nsid == NSID_ALL {
            return Ok(Target::All);
        }
        if nsid == 0 || nsid > self.subsys.limits().namespaces_max {
            return Err(INVALID_NAMESPACE);
        }
        self.subsys.namespace(nsid).map(Target::One).ok_or(INVALID_FIELD)
    }

    /// The one namespace that a namespace specific feature is read of. For the features of
    /// reservations it is the field that is invalid when all are named, for others the namespace.
    fn feature_namespace(&self, fid: Feature, nsid: u32) -> Result<&NamespaceInfo, Status> {
        match self.feature_target(nsid)? {
            Target::One(ns) => Ok(ns),
            Target::All if fid == Feature::NAMESPACE_WRITE_PROTECTION => Err(INVALID_NAMESPACE),
            Target::All => Err(INVALID_FIELD),
        }
    }

    /// Whether a namespace specific feature is available in the ANA state of its namespace (NVMe Base
    /// 2.2, Figure 589; NVM Command Set, Figure 133): those of reservations and of I/O are not
    /// without access, and nothing can be set after a persistent loss. Without Do Not Retry: the
    /// host is to take another path.
    fn check_access(&self, fid: Feature, nsid: u32, is_set: bool) -> Result<(), Status> {
        if !is_namespace_specific(fid) {
            return Ok(());
        }
        // What is set for all namespaces is set for each; there is nothing to read of all.
        let is_broadcast = is_set && matches!(nsid, 0 | NSID_ALL);
        for ns in self.subsys.namespaces().iter().filter(|ns| is_broadcast || ns.nsid == nsid) {
            match self.subsys.ana_state(ns).refusal() {
                Some(Status::ANA_PERSISTENT_LOSS) if is_set => {
                    return Err(Status::ANA_PERSISTENT_LOSS);
                }
                Some(status) if fid != Feature::NAMESPACE_WRITE_PROTECTION => return Err(status),
                _ => {}
            }
        }
        Ok(())
    }

    /// Get Features; data goes to `out`.
    pub(crate) fn get_features(
        &self,
        sqe: &Sqe,
        out: &mut Vec<u8>,
        now: Duration,
    ) -> Result<Reply, Status> {
        let fid = Feature(sqe.cdw10.get() as u8);
        let select = Select((sqe.cdw10.get() >> 8 & 7) as u8);
        let nsid = sqe.nsid.get();
        if !self.has_feature(fid) {
            return Err(INVALID_FIELD);
        }
        let is_broadcast = matches!(nsid, 0 | NSID_ALL);
        if !is_broadcast && nsid > self.subsys.limits().namespaces_max {
            return Err(INVALID_NAMESPACE);
        }
        if select != Select::CAPABILITIES {
            self.check_access(fid, nsid, false)?;
        }
        let cdw11 = sqe.cdw11.get();
        let value = match select {
            Select::CURRENT => match self.driver_value(fid, nsid)? {
                Some(outcome) => return Ok(Reply::Driver(outcome)),
                None => self.feature_value(fid, nsid, cdw11, false, out, now)?,
            },
            // Nothing is saved, so the saved value is the default one.
            Select::DEFAULT | Select::SAVED => {
                self.feature_value(fid, nsid, cdw11, true, out, now)?
            }
            Select::CAPABILITIES => capabilities(fid, self.subsys.limits().transport),
            _ => return Err(INVALID_FIELD),
        };
        Ok(Reply::Result(u64::from(value)))
    }

    /// What the driver is to be asked for the current value.
    fn driver_value(&self, fid: Feature, nsid: u32) -> Result<Option<AdminOutcome>, Status> {
        if fid != Feature::RESERVATION_PERSISTENCE {
            return Ok(None);
        }
        let ns = self.feature_namespace(fid, nsid)?;
        if !ns.reservations {
            return Err(INVALID_FIELD);
        }
        // Without the capability it is never set.
        let ask = AdminOutcome::ReservationPersistence { nsid, set: None };
        Ok(ns.ptpl.then_some(ask))
    }

    fn feature_value(
        &self,
        fid: Feature,
        nsid: u32,
        cdw11: u32,
        is_default: bool,
        out: &mut Vec<u8>,
        now: Duration,
    ) -> Result<u32, Status> {
        let defaults;
        let features = if is_default {
            let own = &self.features;
            defaults = Features::new(own.io_queues_max, own.kato_default, now);
            &defaults
        } else {
            &self.features
        };
        Ok(match fid {
            Feature::ARBITRATION => features.arbitration,
            // One power state, no workload hint.
            Feature::POWER_MANAGEMENT => 0,
            Feature::TEMPERATURE_THRESHOLD => {
                u32::from(features.thresholds[threshold_index(cdw11)?])
            }
            Feature::ERROR_RECOVERY => {
                // Hosts that know no namespaces leave the NSID clear: what is set for all of them.
                if !matches!(nsid, 0 | NSID_ALL) {
                    self.feature_namespace(fid, nsid)?;
                }
                let own = features.namespaces.get(&nsid).and_then(|ns| ns.error_recovery);
                own.unwrap_or(features.error_recovery)
            }
            Feature::INTERRUPT_COALESCING if is_default => 0,
            Feature::INTERRUPT_VECTOR if is_default => cdw11 & 0xffff,
            Feature::INTERRUPT_COALESCING | Feature::INTERRUPT_VECTOR => {
                self.interrupt_feature(fid, cdw11)?
            }
            Feature::VOLATILE_WRITE_CACHE => 1,
            Feature::NUMBER_OF_QUEUES => number_of_queues(features.io_queues_granted),
            Feature::WRITE_ATOMICITY => features.write_atomicity,
            Feature::ASYNC_EVENT_CONFIGURATION if is_default => 0,
            Feature::ASYNC_EVENT_CONFIGURATION => self.aer.config(),
            Feature::TIMESTAMP => {
                out.extend_from_slice(&features.timestamp_data(now));
                0
            }
            Feature::KEEP_ALIVE_TIMER if is_default => features.kato_default.as_millis() as u32,
            Feature::KEEP_ALIVE_TIMER => self.keep_alive.kato().as_millis() as u32,
            Feature::HOST_BEHAVIOR => {
                out.resize(HOST_BEHAVIOR_LEN, 0);
                out[0] = u8::from(features.acre);
                0
            }
            Feature::HOST_IDENTIFIER => {
                // Fabrics use the extended identifier only.
                if cdw11 & 1 == 0 {
                    if !self.is_pcie() {
                        return Err(INVALID_FIELD);
                    }
                    out.extend_from_slice(&self.hostid[..8]);
                    return Ok(0);
                }
                out.extend_from_slice(&self.hostid);
                1
            }
            Feature::RESERVATION_NOTIFICATION_MASK => {
                let ns = self.feature_namespace(fid, nsid)?;
                if !ns.reservations {
                    return Err(INVALID_FIELD);
                }
                features.namespaces.get(&nsid).map_or(0, |ns| u32::from(ns.notice_mask))
            }
            Feature::RESERVATION_PERSISTENCE => {
                if !self.feature_namespace(fid, nsid)?.reservations {
                    return Err(INVALID_FIELD);
                }
                0
            }
            Feature::NAMESPACE_WRITE_PROTECTION => {
                let ns = self.feature_namespace(fid, nsid)?;
                u32::from(ns.write_protect && !is_default)
            }
            _ => return Err(INVALID_FIELD),
        })
    }

    /// Set Features.
    pub(crate) fn set_features(
        &mut self,
        sqe: &Sqe,
        data: &[u8],
        now: Duration,
    ) -> Result<Reply, Status> {
        let cdw10 = sqe.cdw10.get();
        let cdw11 = sqe.cdw11.get();
        let nsid = sqe.nsid.get();
        let fid = Feature(cdw10 as u8);
        if !self.has_feature(fid) {
            return Err(INVALID_FIELD);
        }
        if cdw10 & 1 << 31 != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE.dnr());
        }
        if is_namespace_specific(fid) {
            self.check_access(fid, nsid, true)?;
            return self.set_namespace_feature(fid, nsid, cdw11);
        }
        if !matches!(nsid, 0 | NSID_ALL) {
            let is_valid = nsid <= self.subsys.limits().namespaces_max && !self.is_discovery();
            return Err(if is_valid {
                Status::FEATURE_NOT_NAMESPACE_SPECIFIC.dnr()
            } else {
                INVALID_NAMESPACE
            });
        }
        if data.len() < Self::set_features_data_len(sqe) as usize {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        match fid {
            Feature::ARBITRATION => self.features.arbitration = cdw11,
            Feature::POWER_MANAGEMENT => {
                if cdw11 & 0x1f != 0 {
                    return Err(INVALID_FIELD);
                }
            }
            Feature::TEMPERATURE_THRESHOLD => {
                // TMPSEL Fh means every sensor there is: the composite temperature.
                let all_sensors = cdw11 >> 16 & 0xf == 0xf;
                let cdw11 = if all_sensors { cdw11 & !(0xf << 16) } else { cdw11 };
                self.features.thresholds[threshold_index(cdw11)?] = cdw11 as u16;
                self.check_health();
            }
            Feature::VOLATILE_WRITE_CACHE => {
                if cdw11 & 1 == 0 {
                    return Err(Status::FEATURE_NOT_CHANGEABLE.dnr());
                }
            }
            Feature::NUMBER_OF_QUEUES => {
                let granted = self.set_number_of_queues(cdw11)?;
                return Ok(Reply::Result(u64::from(granted)));
            }
            Feature::WRITE_ATOMICITY => self.features.write_atomicity = cdw11 & 1,
            Feature::ASYNC_EVENT_CONFIGURATION => {
                let smart_warnings = if self.is_discovery() { 0 } else { 0xff };
                if cdw11 & !(smart_warnings | self.optional_async_events()) != 0 {
                    return Err(INVALID_FIELD);
                }
                self.aer.configure(cdw11);
            }
            Feature::TIMESTAMP => {
                let mut ms = [0; TIMESTAMP_LEN];
                ms[..6].copy_from_slice(&data[..6]);
                self.features.timestamp = (u64::from_le_bytes(ms), now, true);
            }
            Feature::KEEP_ALIVE_TIMER => {
                let kato = Duration::from_millis(u64::from(cdw11));
                if kato > self.subsys.limits().kato_max {
                    return Err(Status::KEEP_ALIVE_TIMEOUT_INVALID.dnr());
                }
                self.keep_alive.set_kato(kato, now);
            }
            Feature::HOST_BEHAVIOR => {
                // ETDAS, LBAFEE and the rest enable what this controller does not have.
                if data[0] > 1 || data[1..HOST_BEHAVIOR_LEN].iter().any(|&b| b != 0) {
                    return Err(INVALID_FIELD);
                }
                self.features.acre = data[0] == 1;
            }
            // "In fabrics the Host Identifier is set by Connect; Set Features shall be aborted
            // with Command Sequence Error."
            Feature::HOST_IDENTIFIER if !self.is_pcie() => {
                return Err(Status::COMMAND_SEQUENCE_ERROR.dnr());
            }
            Feature::HOST_IDENTIFIER => {
                // EXHID: 16 bytes, or the 8 that are the low half.
                let len = if cdw11 & 1 != 0 { HOST_ID_LEN } else { HOST_ID_LEN / 2 };
                self.hostid = [0; HOST_ID_LEN];
                self.hostid[..len].copy_from_slice(&data[..len]);
            }
            Feature::INTERRUPT_COALESCING | Feature::INTERRUPT_VECTOR => {
                self.set_interrupt_feature(fid, cdw11)?;
            }
            _ => return Err(INVALID_FIELD),
        }
        Ok(Reply::Result(0))
    }

    /// Set Features of a namespace specific feature.
    fn set_namespace_feature(
        &mut self,
        fid: Feature,
        nsid: u32,
        cdw11: u32,
    ) -> Result<Reply, Status> {
        let done = Ok(Reply::Result(0));
        match fid {
            Feature::ERROR_RECOVERY => {
                // DULBE needs NSFEAT support that no namespace has.
                if cdw11 & 1 << 16 != 0 {
                    return Err(INVALID_FIELD);
                }
                if matches!(nsid, 0 | NSID_ALL) {
                    self.features.error_recovery = cdw11;
                    let namespaces = self.features.namespaces.values_mut();
                    namespaces.for_each(|ns| ns.error_recovery = None);
                } else {
                    let nsid = self.feature_namespace(fid, nsid)?.nsid;
                    let own = self.features.namespaces.entry(nsid).or_default();
                    own.error_recovery = Some(cdw11);
                }
                done
            }
            Feature::RESERVATION_NOTIFICATION_MASK => {
                let concerned: Vec<u32> = match self.feature_target(nsid)? {
                    Target::One(ns) if ns.reservations => vec![ns.nsid],
                    Target::One(_) => return Err(INVALID_FIELD),
                    Target::All => {
                        let all = self.subsys.namespaces().iter();
                        all.filter(|ns| ns.reservations).map(|ns| ns.nsid).collect()
                    }
                };
                for nsid in concerned {
                    let own = self.features.namespaces.entry(nsid).or_default();
                    own.notice_mask = cdw11 as u8 & NOTICE_MASK;
                }
                done
            }
            Feature::RESERVATION_PERSISTENCE => {
                let set = cdw11 & 1 != 0;
                match self.feature_target(nsid)? {
                    Target::One(ns) if !ns.reservations || (set && !ns.ptpl) => Err(INVALID_FIELD),
                    // Without the capability it is never set.
                    Target::One(ns) if !ns.ptpl => done,
                    _ => Ok(Reply::Driver(AdminOutcome::ReservationPersistence {
                        nsid,
                        set: Some(set),
                    })),
                }
            }
            Feature::NAMESPACE_WRITE_PROTECTION => {
                let state = match cdw11 & 7 {
                    0 => WriteProtectState::NoWriteProtect,
                    1 => WriteProtectState::WriteProtect,
                    // The other states are not supported (NWPC).
                    _ => return Err(INVALID_FIELD),
                };
                let ns = self.feature_namespace(fid, nsid)?;
                if ns.write_protect == (state == WriteProtectState::WriteProtect) {
                    return done;
                }
                Ok(Reply::Driver(AdminOutcome::SetWriteProtect { nsid, state }))
            }
            _ => Err(INVALID_FIELD),
        }
    }

    /// NCQR in 31:16 and NSQR in 15:0, zero-based; the answer likewise. Fabrics queues are pairs.
    fn set_number_of_queues(&mut self, cdw11: u32) -> Result<u32, Status> {
        let (sq_z, cq_z) = (cdw11 & 0xffff, cdw11 >> 16);
        if sq_z == 0xffff || cq_z == 0xffff {
            return Err(INVALID_FIELD);
        }
        if self.io_queues_connected() != 0 || !self.pcie.is_empty() {
            return Err(Status::COMMAND_SEQUENCE_ERROR.dnr());
        }
        let wanted = sq_z.min(cq_z) as u16 + 1;
        self.features.io_queues_granted = wanted.min(self.features.io_queues_max);
        Ok(number_of_queues(self.features.io_queues_granted))
    }

    /// OAES.
    pub(crate) fn optional_async_events(&self) -> u32 {
        if self.is_discovery() {
            IdentifyController::OAES_DISCOVERY_LOG
        } else if self.has_ana() {
            IdentifyController::OAES_NAMESPACE_ATTRIBUTE | IdentifyController::OAES_ANA
        } else {
            IdentifyController::OAES_NAMESPACE_ATTRIBUTE
        }
    }
}

/// Supported capabilities: bit 0 saveable, bit 1 namespace specific, bit 2 changeable.
fn capabilities(fid: Feature, transport: Transport) -> u32 {
    const NAMESPACE_SPECIFIC: u32 = 1 << 1;
    const CHANGEABLE: u32 = 1 << 2;
    let specific = if is_namespace_specific(fid) { NAMESPACE_SPECIFIC } else { 0 };
    // There is one power state; the write cache is what the namespaces have; the Host Identifier
    // is set by Connect, where there is one.
    let is_fixed = matches!(fid, Feature::POWER_MANAGEMENT | Feature::VOLATILE_WRITE_CACHE)
        || (fid == Feature::HOST_IDENTIFIER && transport == Transport::Fabrics);
    if is_fixed { specific } else { specific | CHANGEABLE }
}

/// Which threshold: THSEL in 21:20 (0 over, 1 under), TMPSEL in 19:16 (0 composite; no sensors).
fn threshold_index(cdw11: u32) -> Result<usize, Status> {
    match (cdw11 >> 20 & 3, cdw11 >> 16 & 0xf) {
        (0, 0) => Ok(0),
        (1, 0) => Ok(1),
        _ => Err(INVALID_FIELD),
    }
}
