//! What a target serves and what hosts may use up of it: plain data from the control plane.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use block::Volume;
use nvme::spec::Nqn;
use nvme::subsys::ana::AnaState;
use nvme::subsys::discovery::DiscoveryEntry;
use nvme::subsys::reservation::ReservationState;
use thiserror::Error;

use crate::keys::KeyStore;

/// Which controllers a port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// I/O controllers of every subsystem, and the discovery controller.
    Io,
    /// The discovery controller alone.
    Discovery,
}

/// Whether connections through a port are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Tls {
    /// They are not.
    #[default]
    Off,
    /// As the host wishes; the first byte tells.
    Allowed,
    /// They are, or they are closed.
    Required,
}

/// Which hosts have to prove themselves by DH-HMAC-CHAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AuthDemand {
    /// Those that there is a secret for. Others are believed.
    #[default]
    Registered,
    /// All: those without a secret are refused.
    Required,
}

/// A listening address, as hosts know it. The target does not listen itself: connections are
/// handed over with the identifier of the port that they came through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Port identifier in the discovery log, unique and stable over restarts.
    pub id: u16,
    /// What it leads to.
    pub kind: ListenerKind,
    /// The address that hosts are told.
    pub addr: SocketAddr,
    /// Whether connections are encrypted.
    pub tls: Tls,
    /// Which hosts have to authenticate in band.
    pub auth: AuthDemand,
    /// Hosts may connect, but the discovery log does not tell of it.
    pub hidden: bool,
}

/// One volume as a namespace.
#[derive(Clone)]
pub struct NamespaceConfig {
    /// Namespace identifier, 1 or more, unique in its subsystem.
    pub nsid: u32,
    /// Where its blocks are.
    pub volume: Arc<dyn Volume>,
    /// The ANA group that it belongs to, 1 to 128.
    pub ana_group: u32,
    /// The hosts that see it; `None`: all that may use the subsystem.
    pub hosts: Option<Vec<Nqn>>,
}

impl NamespaceConfig {
    /// A namespace of ANA group 1 that every host sees.
    pub fn new(nsid: u32, volume: Arc<dyn Volume>) -> NamespaceConfig {
        NamespaceConfig { nsid, volume, ana_group: 1, hosts: None }
    }
}

/// An NVM subsystem and its namespaces.
#[derive(Clone)]
pub struct SubsystemConfig {
    /// Subsystem NQN.
    pub nqn: String,
    /// Serial number: at most 20 ASCII characters.
    pub serial: String,
    /// Its namespaces.
    pub namespaces: Vec<NamespaceConfig>,
    /// The hosts that may connect; `None`: all.
    pub hosts: Option<Vec<Nqn>>,
    /// Hosts may connect, but the discovery log does not tell of it.
    pub hidden: bool,
}

impl SubsystemConfig {
    /// A subsystem without namespaces that every host may use.
    pub fn new(nqn: impl Into<String>, serial: impl Into<String>) -> SubsystemConfig {
        SubsystemConfig {
            nqn: nqn.into(),
            serial: serial.into(),
            namespaces: Vec::new(),
            hosts: None,
            hidden: false,
        }
    }
}

/// What hosts may use up.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections (queues) of all hosts together.
    pub connections: usize,
    /// Connections (queues) of one host NQN.
    pub connections_per_host: usize,
    /// Connections of one peer address that have not come to a Connect command yet, or whose host has
    /// not proven itself yet where it has to.
    pub handshakes_per_peer: usize,
    /// Controllers of all hosts together.
    pub controllers: usize,
    /// Controllers of one host NQN.
    pub controllers_per_host: usize,
    /// Admin commands that one host NQN may send in a second on average. Keep Alive and
    /// Asynchronous Event Request are not counted.
    pub admin_commands_per_second: u32,
    /// Admin commands that one host NQN may send at once before the average counts.
    pub admin_commands_burst: u32,
    /// I/O queues of one controller.
    pub io_queues: u16,
    /// Entries of one I/O queue.
    pub queue_entries: u16,
    /// Largest transfer of one command in bytes; a power of two of 4 KiB pages.
    pub transfer_bytes: u32,
    /// Write payload taken along with an I/O command, in bytes; a multiple of 16. What is longer
    /// waits until it is asked for, which takes a round trip more. What comes unasked while the
    /// host has its share of memory holds up the commands behind it.
    pub in_capsule_bytes: u32,
    /// Bytes that a host may send in one H2CData PDU; a multiple of 4, at least 4,096.
    pub h2c_data_bytes: u32,
    /// Buffer memory that the commands of one connection may hold, in bytes. One command is always
    /// allowed.
    pub buffer_bytes_per_connection: usize,
    /// Buffer memory that the commands of one host NQN may hold on one core, in bytes. No host gets
    /// more than is left for others on that core, but always enough for one command.
    pub buffer_bytes_per_host: usize,
    /// Largest namespace identifier of a subsystem, and most namespaces it may have.
    pub namespaces_max: u32,
    /// Longest keep alive timeout granted.
    pub kato_max: Duration,
    /// How long a connection may take from accept to Connect.
    pub handshake: Duration,
    /// How long a change of the configuration is waited for; see [`ChangeError::StillDraining`].
    pub change_wait: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 4096,
            connections_per_host: 2048,
            handshakes_per_peer: 512,
            controllers: 1024,
            controllers_per_host: 64,
            admin_commands_per_second: 20_000,
            admin_commands_burst: 65_536,
            io_queues: 128,
            queue_entries: 128,
            transfer_bytes: 1 << 20,
            in_capsule_bytes: 128 << 10,
            h2c_data_bytes: 1 << 20,
            buffer_bytes_per_connection: 8 << 20,
            buffer_bytes_per_host: 32 << 20,
            namespaces_max: 10_240,
            kato_max: Duration::from_secs(600),
            handshake: Duration::from_secs(10),
            change_wait: Duration::from_secs(30),
        }
    }
}

/// What was before this start, for the SMART / Health log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowerHistory {
    /// Starts, this one included.
    pub power_cycles: u64,
    /// Time in service before this start.
    pub power_on: Duration,
    /// Starts that did not end in order.
    pub unsafe_shutdowns: u64,
}

/// Keeps reservations through power loss, by volume.
///
/// Both calls may block; they come from a thread that is no core, one at a time per volume.
pub trait ReservationStore: Send + Sync {
    /// What was saved last for the volume with this UUID.
    ///
    /// # Errors
    /// It cannot be read. The volume is not served then.
    fn load(&self, uuid: &[u8; 16]) -> io::Result<Option<ReservationState>>;

    /// Replaces what is kept, all of it or nothing; it is durable when this returns.
    ///
    /// # Errors
    /// It could not be made durable. The command that asked for it fails.
    fn save(&self, uuid: &[u8; 16], state: &ReservationState) -> io::Result<()>;
}

/// All of a target's configuration.
#[derive(Clone, Default)]
pub struct TargetConfig {
    /// What is served.
    pub subsystems: Vec<SubsystemConfig>,
    /// Where hosts connect.
    pub ports: Vec<Port>,
    /// Entries of other discovery subsystems, as they stand in the discovery log.
    pub referrals: Vec<DiscoveryEntry>,
    /// The discovery subsystem's own NQN, beside the well-known one.
    pub discovery_nqn: Option<Nqn>,
    /// Generation counter of the first discovery log. Must be larger than every one told before the
    /// last restart; the clock is a good source.
    pub discovery_generation: u64,
    /// ANA states that are not optimized from the start: port, group, state.
    pub ana: Vec<(u16, u32, AnaState)>,
    /// Bounds.
    pub limits: Limits,
    /// The keys of hosts, for ports with TLS.
    pub keys: Arc<KeyStore>,
    /// Where reservations are kept through power loss; `None`: hosts are told that they are not.
    pub store: Option<Arc<dyn ReservationStore>>,
    /// What was before this start.
    pub power: PowerHistory,
}

/// Why a target cannot be made.
#[derive(Debug, Error)]
pub enum SetupError {
    /// No core was given.
    #[error("a target needs at least one core")]
    NoCore,
    /// A namespace identifier is 0, FFFFFFFFh or used twice.
    #[error(
        "subsystem {nqn}: namespace identifier {nsid} is not allowed: each must be 1 to {max}, once",
        max = u32::MAX - 1
    )]
    Nsid {
        /// The subsystem.
        nqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// The subsystem's own description was refused.
    #[error("subsystem {nqn}: {reason}")]
    Subsystem {
        /// The subsystem.
        nqn: String,
        /// Why.
        reason: String,
    },
    /// A port identifier is 0 or used twice.
    #[error("port identifier {0} is not allowed: each must be 1 or more, once")]
    Port(u16),
    /// An ANA state for what is not there.
    #[error("ANA group {group} on port {port}: no such I/O port, or the group is not 1 to 128")]
    Ana {
        /// The port.
        port: u16,
        /// The group.
        group: u32,
    },
}

/// Why a change of a running target was not made, or is not finished.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// No subsystem has this NQN.
    #[error("there is no such subsystem")]
    UnknownSubsystem,
    /// The subsystem has no such namespace.
    #[error("there is no such namespace")]
    UnknownNamespace,
    /// The NQN, namespace identifier or volume is taken.
    #[error("it is in use already")]
    InUse,
    /// What was asked for is not possible; nothing was changed.
    #[error("{0}")]
    Invalid(String),
    /// The change is in force and stays so, but I/O sent before it is still at a volume and may
    /// land.
    #[error("I/O of before the change is still on its way after {} s", waited.as_secs())]
    StillDraining {
        /// For how long was waited.
        waited: Duration,
    },
    /// The volume could not be asked.
    #[error("the volume cannot be read again")]
    Volume(#[source] io::Error),
    /// The reservations kept for the volume cannot be read, so that it cannot be known who may use
    /// it.
    #[error("the reservations kept for the volume cannot be read")]
    Reservations(#[source] io::Error),
}
