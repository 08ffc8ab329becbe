//! Get Features and Set Features. None is saveable: a controller lives as long as its
//! association.

use core::time::Duration;

use super::{Controller, keep_alive};
use crate::spec::{Feature, IdentifyController, NSID_ALL, Select, Sqe, Status};

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();

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
    error_recovery: u32,
    write_atomicity: u32,
    async_events: u32,
    /// Composite temperature thresholds, kelvin: over, under.
    thresholds: [u16; 2],
    /// ACRE: Advanced Command Retry Enable.
    acre: bool,
    io_queues_max: u16,
    io_queues_granted: u16,
    /// Milliseconds, when they were so, and whether a host said so.
    timestamp: (u64, Duration, bool),
}

impl Features {
    pub(crate) fn new(io_queues_max: u16, now: Duration) -> Features {
        Features {
            arbitration: 0,
            error_recovery: 0,
            write_atomicity: 0,
            async_events: 0,
            thresholds: [OVER_TEMPERATURE_DEFAULT, 0],
            acre: false,
            io_queues_max,
            io_queues_granted: io_queues_max,
            timestamp: (0, now, false),
        }
    }

    /// Defaults, but for the time of day: "a Controller Level Reset preserves the timestamp" is
    /// reported in the Synch and Origin bits.
    pub(crate) fn reset(&mut self, io_queues_max: u16, now: Duration) {
        let timestamp = self.timestamp;
        *self = Features { timestamp, ..Features::new(io_queues_max, now) };
    }

    pub(crate) fn io_queues_granted(&self) -> u16 {
        self.io_queues_granted
    }

    pub(crate) fn async_events(&self) -> u32 {
        self.async_events
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

impl Controller {
    fn has_feature(&self, fid: Feature) -> bool {
        match fid {
            Feature::ASYNC_EVENT_CONFIGURATION | Feature::KEEP_ALIVE_TIMER => true,
            Feature::ARBITRATION
            | Feature::POWER_MANAGEMENT
            | Feature::TEMPERATURE_THRESHOLD
            | Feature::ERROR_RECOVERY
            | Feature::VOLATILE_WRITE_CACHE
            | Feature::NUMBER_OF_QUEUES
            | Feature::WRITE_ATOMICITY
            | Feature::TIMESTAMP
            | Feature::HOST_BEHAVIOR
            | Feature::HOST_IDENTIFIER => !self.is_discovery(),
            _ => false,
        }
    }

    /// Feature identifiers supported, for log page 12h.
    pub(crate) fn feature_ids(&self) -> impl Iterator<Item = Feature> + '_ {
        (0..=u8::MAX).map(Feature).filter(|&fid| self.has_feature(fid))
    }

    /// Host-to-controller data length of a Set Features command.
    pub(crate) fn set_features_data_len(sqe: &Sqe) -> u32 {
        match Feature(sqe.cdw10.get() as u8) {
            Feature::TIMESTAMP => TIMESTAMP_LEN as u32,
            Feature::HOST_BEHAVIOR => HOST_BEHAVIOR_LEN as u32,
            Feature::HOST_IDENTIFIER => HOST_ID_LEN as u32,
            _ => 0,
        }
    }

    /// Get Features. Returns dword 0; data goes to `out`.
    pub(crate) fn get_features(
        &self,
        sqe: &Sqe,
        out: &mut Vec<u8>,
        now: Duration,
    ) -> Result<u32, Status> {
        let fid = Feature(sqe.cdw10.get() as u8);
        let select = Select((sqe.cdw10.get() >> 8 & 7) as u8);
        if !self.has_feature(fid) {
            return Err(INVALID_FIELD);
        }
        let cdw11 = sqe.cdw11.get();
        match select {
            Select::CURRENT => self.feature_value(fid, cdw11, &self.features, out, now),
            // Nothing is saved, so the saved value is the default one.
            Select::DEFAULT | Select::SAVED => {
                let defaults = Features::new(self.features.io_queues_max, now);
                self.feature_value(fid, cdw11, &defaults, out, now)
            }
            Select::CAPABILITIES => {
                const CHANGEABLE: u32 = 1 << 2;
                let fixed = matches!(fid, Feature::VOLATILE_WRITE_CACHE | Feature::HOST_IDENTIFIER);
                Ok(if fixed { 0 } else { CHANGEABLE })
            }
            _ => Err(INVALID_FIELD),
        }
    }

    fn feature_value(
        &self,
        fid: Feature,
        cdw11: u32,
        features: &Features,
        out: &mut Vec<u8>,
        now: Duration,
    ) -> Result<u32, Status> {
        Ok(match fid {
            Feature::ARBITRATION => features.arbitration,
            // One power state, no workload hint.
            Feature::POWER_MANAGEMENT => 0,
            Feature::TEMPERATURE_THRESHOLD => {
                u32::from(features.thresholds[threshold_index(cdw11)?])
            }
            Feature::ERROR_RECOVERY => features.error_recovery,
            Feature::VOLATILE_WRITE_CACHE => 1,
            Feature::NUMBER_OF_QUEUES => number_of_queues(features.io_queues_granted),
            Feature::WRITE_ATOMICITY => features.write_atomicity,
            Feature::ASYNC_EVENT_CONFIGURATION => features.async_events,
            Feature::TIMESTAMP => {
                out.extend_from_slice(&features.timestamp_data(now));
                0
            }
            Feature::KEEP_ALIVE_TIMER => self.keep_alive.kato().as_millis() as u32,
            Feature::HOST_BEHAVIOR => {
                out.resize(HOST_BEHAVIOR_LEN, 0);
                out[0] = u8::from(features.acre);
                0
            }
            Feature::HOST_IDENTIFIER => {
                // Fabrics use the extended identifier only.
                if cdw11 & 1 == 0 {
                    return Err(INVALID_FIELD);
                }
                out.extend_from_slice(&self.hostid);
                1
            }
            _ => return Err(INVALID_FIELD),
        })
    }

    /// Set Features. Returns dword 0.
    pub(crate) fn set_features(
        &mut self,
        sqe: &Sqe,
        data: &[u8],
        now: Duration,
    ) -> Result<u32, Status> {
        let cdw10 = sqe.cdw10.get();
        let cdw11 = sqe.cdw11.get();
        let fid = Feature(cdw10 as u8);
        if !self.has_feature(fid) {
            return Err(INVALID_FIELD);
        }
        if cdw10 & 1 << 31 != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE.dnr());
        }
        if !matches!(sqe.nsid.get(), 0 | NSID_ALL) {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC.dnr());
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
            }
            Feature::ERROR_RECOVERY => {
                // DULBE needs NSFEAT support that no namespace has.
                if cdw11 & 1 << 16 != 0 {
                    return Err(INVALID_FIELD);
                }
                self.features.error_recovery = cdw11;
            }
            Feature::VOLATILE_WRITE_CACHE => {
                if cdw11 & 1 == 0 {
                    return Err(Status::FEATURE_NOT_CHANGEABLE.dnr());
                }
            }
            Feature::NUMBER_OF_QUEUES => return self.set_number_of_queues(cdw11),
            Feature::WRITE_ATOMICITY => self.features.write_atomicity = cdw11 & 1,
            Feature::ASYNC_EVENT_CONFIGURATION => {
                const SMART_WARNINGS: u32 = 0xff;
                if cdw11 & !(SMART_WARNINGS | self.optional_async_events()) != 0 {
                    return Err(INVALID_FIELD);
                }
                self.features.async_events = cdw11;
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
                self.keep_alive = keep_alive::KeepAlive::new(kato, now);
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
            Feature::HOST_IDENTIFIER => return Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            _ => return Err(INVALID_FIELD),
        }
        Ok(0)
    }

    /// NCQR in 31:16 and NSQR in 15:0, zero-based; the answer likewise. Fabrics queues are pairs.
    fn set_number_of_queues(&mut self, cdw11: u32) -> Result<u32, Status> {
        let (sq_z, cq_z) = (cdw11 & 0xffff, cdw11 >> 16);
        if sq_z == 0xffff || cq_z == 0xffff {
            return Err(INVALID_FIELD);
        }
        if self.io_queues_connected() != 0 {
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
        } else {
            IdentifyController::OAES_NAMESPACE_ATTRIBUTE
        }
    }
}

/// Which threshold: THSEL in 21:20 (0 over, 1 under), TMPSEL in 19:16 (0 composite; no sensors).
fn threshold_index(cdw11: u32) -> Result<usize, Status> {
    match (cdw11 >> 20 & 3, cdw11 >> 16 & 0xf) {
        (0, 0) => Ok(0),
        (1, 0) => Ok(1),
        _ => Err(INVALID_FIELD),
    }
}
