//! What there is: the bodies of answers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where an object comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The configuration file or a flag.
    Configuration,
    /// Made at run time.
    Runtime,
    /// Said by a newer version.
    #[serde(other)]
    Unknown,
}

/// State of an ANA group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnaState {
    /// Served, the best way.
    Optimized,
    /// Served, there may be a better way.
    NonOptimized,
    /// Not served here for now.
    Inaccessible,
    /// Not served here any more.
    PersistentLoss,
    /// About to change; hosts wait.
    Change,
    /// Said by a newer version.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for AnaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AnaState::Optimized => "optimized",
            AnaState::NonOptimized => "non-optimized",
            AnaState::Inaccessible => "inaccessible",
            AnaState::PersistentLoss => "persistent-loss",
            AnaState::Change => "change",
            AnaState::Unknown => "unknown",
        })
    }
}

/// Which controllers a port leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortKind {
    /// I/O controllers, and the discovery controller.
    Io,
    /// The discovery controller alone.
    Discovery,
    /// Said by a newer version.
    #[serde(other)]
    Unknown,
}

/// Everything: `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub program: String,
    /// Version of the API.
    pub api: u32,
    /// Seconds since the target was started.
    pub uptime_s: u64,
    /// Whether run-time changes survive a restart: there is a data directory.
    pub kept: bool,
    /// Unique NQN of the discovery subsystem.
    pub discovery_nqn: String,
    /// Listeners.
    pub ports: Vec<Port>,
    /// Subsystems.
    pub subsystems: Vec<Subsystem>,
    /// Volumes, also those that are detached for now.
    pub volumes: Vec<Volume>,
    /// Associations: one per controller.
    pub associations: Vec<Association>,
    /// Other discovery controllers that hosts are sent to.
    pub referrals: Vec<Referral>,
    /// Bounds, how much of each is used, and how often it was hit.
    pub limits: Vec<Limit>,
    /// What the SMART log says about power.
    pub power: Power,
    /// Hosts that were refused for want of the right key: the last ones, the newest last.
    #[serde(default)]
    pub refusals: Vec<Refusal>,
    /// How many there were since the start.
    #[serde(default)]
    pub refusals_total: u64,
}

/// A host that was refused for want of the right key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// Where it came from.
    pub peer: String,
    /// Port ID it came through.
    pub port: u16,
    /// What is wrong and what to do, in one line.
    pub why: String,
}

/// A listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Port ID, stable over restarts.
    pub portid: u16,
    /// What it leads to.
    pub kind: PortKind,
    /// Where it listens.
    pub listen: String,
    /// The address hosts are told.
    pub advertise: String,
    /// Whether connections are encrypted: `off`, `allowed` or `required`.
    #[serde(default)]
    pub tls: String,
}

/// A subsystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subsystem {
    /// Its name here.
    pub name: String,
    /// Its NQN.
    pub nqn: String,
    /// Its serial number.
    pub serial: String,
    /// Where it comes from.
    pub origin: Origin,
    /// Host NQNs that may connect; `null`: every host.
    pub hosts: Option<Vec<String>>,
    /// ANA states, by port and group.
    pub ana: Vec<AnaEntry>,
    /// I/O since the target was started.
    pub counters: Counters,
}

/// The state of one ANA group through one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnaEntry {
    /// Port ID.
    pub port: u16,
    /// Group.
    pub group: u32,
    /// State.
    pub state: AnaState,
}

/// A volume and its namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// What is behind it.
    pub spec: String,
    /// Where it comes from.
    pub origin: Origin,
    /// Whether it is served at this moment.
    pub attached: bool,
    /// Name of its subsystem.
    pub subsystem: String,
    /// Namespace ID.
    pub nsid: u32,
    /// UUID.
    pub uuid: String,
    /// Namespace globally unique identifier, 32 hexadecimal digits.
    pub nguid: String,
    /// Size in bytes; 0 while it is not attached.
    pub size_bytes: u64,
    /// Logical block size in bytes; 0 while it is not attached.
    pub block_bytes: u32,
    /// ANA group.
    pub ana_group: u32,
    /// Host NQNs that see it; `null`: every host of the subsystem.
    pub hosts: Option<Vec<String>>,
    /// The backing object refuses writes.
    pub read_only: bool,
    /// Writes are refused until that is taken back.
    pub write_protected: bool,
}

/// A host and its controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Association {
    /// Subsystem NQN; a discovery one too.
    pub subnqn: String,
    /// Host NQN.
    pub hostnqn: String,
    /// Host identifier, a UUID.
    pub hostid: String,
    /// Controller ID.
    pub cntlid: u16,
    /// Port ID it came through.
    pub port: u16,
    /// Where the host connects from, if known.
    pub peer: Option<String>,
    /// I/O queues.
    pub io_queues: u16,
    /// Cipher suite and group of its connections, where they are encrypted.
    #[serde(default)]
    pub tls: Option<String>,
    /// How the host has proven itself in band, if it has.
    #[serde(default)]
    pub authenticated: Option<String>,
    /// It has ended, and I/O of it is still at a volume.
    #[serde(default)]
    pub draining: bool,
}

/// Another discovery controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Referral {
    /// `ADDR:PORT`.
    pub addr: String,
    /// Its NQN.
    pub nqn: String,
}

/// A bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Its name, as in `[limits]` of the configuration.
    pub name: String,
    /// The bound.
    pub limit: u64,
    /// Used at this moment, where that is a number.
    #[serde(default)]
    pub used: Option<u64>,
    /// How often something was refused because of it.
    pub hit_total: u64,
}

/// I/O since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Read commands.
    pub reads_total: u64,
    /// Write commands.
    pub writes_total: u64,
    /// Bytes read.
    pub read_bytes_total: u64,
    /// Bytes written.
    pub written_bytes_total: u64,
    /// Commands failed by the medium.
    pub media_errors_total: u64,
}

/// What the SMART log says about power.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Power {
    /// Starts, this one included.
    pub power_cycles: u64,
    /// Seconds of running, this start included.
    pub power_on_s: u64,
    /// Starts after which there was no orderly stop.
    pub unsafe_shutdowns: u64,
}
