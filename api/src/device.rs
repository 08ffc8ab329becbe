//! What an emulator's devices are doing.

use serde::{Deserialize, Serialize};

use crate::SecretString;

/// One emulated device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What the machine sees: `virtio-blk` or `nvme`.
    pub kind: String,
    /// Socket the machine connects to.
    pub socket: String,
    /// Who it is to its target; empty: it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostnqn: String,
    /// The target has answered, and whoever connects to the socket is served.
    pub is_served: bool,
    /// A machine is connected.
    pub guest_attached: bool,
    /// What is behind it, in the order of the namespaces.
    pub namespaces: Vec<DeviceNamespace>,
    /// The namespaces are those that its subsystem has, as they come and go.
    #[serde(default)]
    pub follows: bool,
    /// Namespaces that an operator has detached, of one that follows its subsystem otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withheld: Vec<u32>,
    /// Discovery controllers that tell it its ways, if it has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub discovery: Vec<DeviceDiscovery>,
    /// Queues that a driver has started.
    pub queues: Vec<DeviceQueue>,
    /// Requests taken and not answered.
    pub in_flight: u64,
    /// Since the device was started.
    pub counters: DeviceCounters,
    /// Why it cannot be served or is not ready, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Keys that a device uses from now on, in place of those of the same kind that it had. What is not
/// given stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetDeviceKeys {
    /// For TLS, as nvme-cli prints them, the preferred first; up to 8.
    #[serde(default)]
    pub psk: Vec<SecretString>,
    /// The same for discovery controllers; `null`: those in `psk`.
    #[serde(default)]
    pub discovery_psk: Option<Vec<SecretString>>,
    /// Secret of the host for DH-HMAC-CHAP.
    #[serde(default)]
    pub dhchap: Option<SecretString>,
    /// Secret that controllers have to prove themselves with.
    #[serde(default)]
    pub dhchap_ctrl: Option<SecretString>,
    /// Connections that were authenticated authenticate again now, while I/O goes on. One that the
    /// target does not let go on ends.
    #[serde(default)]
    pub reauthenticate: bool,
}

/// A remote namespace behind a device, or its own volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNamespace {
    /// Namespace ID at the target.
    pub nsid: u32,
    /// The machine has it; not before the target has answered.
    #[serde(default)]
    pub is_shown: bool,
    /// Its subsystem; empty: a volume of the device's own.
    pub subnqn: String,
    /// What the device's own volume is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// Who it is, on every face.
    pub uuid: String,
    /// Serial number.
    pub serial: String,
    /// Size, 0 before the target has answered.
    pub size_bytes: u64,
    /// Logical block size.
    pub block_bytes: u32,
    /// Ways to the target.
    pub paths: Vec<DevicePath>,
}

/// Attaches a namespace of its target to a device of type `nvme` (POST `/v1/devices/{name}/namespaces`;
/// DELETE `/v1/devices/{name}/namespaces/{nsid}` takes one away).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachNamespace {
    /// Namespace ID at the target, which is the one at the device as well.
    pub nsid: u32,
}

/// A way to the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePath {
    /// Where the target listens.
    pub addr: String,
    /// `live`; `detached`: the target answers, and has the namespace no more; `leaving`: it is not told of any more, and used until another one works; or what it
    /// waits for.
    pub state: String,
    /// ANA state of the namespace by it, where the target reports one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ana: Option<String>,
    /// Times that it was set up.
    pub associations: u64,
    /// Times that it was lost.
    pub losses: u64,
    /// Why it was lost, or could not be set up, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// A discovery controller that a device asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDiscovery {
    /// Where it listens.
    pub addr: String,
    /// The controller that refers to it; none, if it is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referred_by: Option<String>,
    /// `connected`, or `connecting`: what it said last still counts.
    pub state: String,
    /// Generation counter of its log, once that is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub genctr: Option<u64>,
    /// Entries of its log.
    pub entries: u64,
    /// Ways to the device's subsystem that it names.
    pub paths: Vec<String>,
    /// Entries that are not used, and why; the first few.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Why the connection was lost, or could not be made, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// A queue of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceQueue {
    /// Its number.
    pub index: u16,
    /// The core it is on.
    pub core: usize,
    /// Entries.
    pub entries: u32,
    /// Requests taken and not answered.
    pub in_flight: u64,
    /// Why it waits for a reset by its driver, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// What a device has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounters {
    /// Reads completed, errors included.
    pub reads_total: u64,
    /// Writes completed, errors included.
    pub writes_total: u64,
    /// Everything else that was completed.
    pub others_total: u64,
    /// Bytes of successful reads.
    pub read_bytes_total: u64,
    /// Bytes of successful writes.
    pub written_bytes_total: u64,
    /// Requests that did not succeed.
    pub errors_total: u64,
    /// Interrupts, or calls.
    pub interrupts_total: u64,
    /// Mean time of a request, in nanoseconds: from when the device took it until the machine could
    /// see it done. This and the next three are of a sample, one request in 20 us at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_mean_ns: Option<u64>,
    /// Half of the requests took no longer; a quarter too much at worst, as the next two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p50_ns: Option<u64>,
    /// 99 of 100 took no longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p99_ns: Option<u64>,
    /// 999 of 1,000 took no longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p999_ns: Option<u64>,
    /// The longest of all requests, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_max_ns: Option<u64>,
}
