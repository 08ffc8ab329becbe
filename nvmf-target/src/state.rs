//! What a running target tells of itself.

use std::time::SystemTime;

use nvme::spec::Nqn;
use nvme::subsys::ana::AnaState;

use crate::counters::Totals;

/// A target at one moment.
#[derive(Clone, Debug, Default)]
pub struct TargetStatus {
    /// What is served, by NQN.
    pub subsystems: Vec<SubsystemStatus>,
    /// Who is connected, by controller identifier.
    pub controllers: Vec<ControllerStatus>,
    /// Connections, those that have not come to a Connect command among them.
    pub connections: usize,
    /// Who uses how much, by host NQN.
    pub hosts: Vec<HostStatus>,
    /// How often hosts met a limit.
    pub limits: LimitsHit,
    /// Peers that were refused for want of the right key, the last ones, the newest last.
    pub refusals: Vec<RefusalStatus>,
    /// How many there were since the start.
    pub refusals_total: u64,
}

/// A peer that was refused for want of the right key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalStatus {
    /// When.
    pub at: SystemTime,
    /// Its address.
    pub peer: String,
    /// The port that it came through.
    pub port: u16,
    /// What is wrong and what to do, in one line.
    pub why: String,
}

/// What a host NQN uses at one moment, over all of its controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostStatus {
    /// Host NQN.
    pub hostnqn: String,
    /// Controllers.
    pub controllers: usize,
    /// Queues, admin queues among them.
    pub connections: usize,
    /// Commands beyond the size of their queue, since the host is known.
    pub queue_overruns: u64,
}

/// A subsystem at one moment.
#[derive(Clone, Debug)]
pub struct SubsystemStatus {
    /// Subsystem NQN.
    pub nqn: String,
    /// Its namespaces, by identifier.
    pub namespaces: Vec<NamespaceStatus>,
    /// The hosts that may connect; `None`: all.
    pub hosts: Option<Vec<Nqn>>,
    /// The discovery log does not tell of it.
    pub hidden: bool,
    /// ANA groups per port: port, group, state.
    pub ana: Vec<(u16, u32, AnaState)>,
    /// I/O of all its controllers, those of before among them.
    pub totals: Totals,
}

/// A namespace at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceStatus {
    /// Namespace identifier.
    pub nsid: u32,
    /// UUID, in the order it is written.
    pub uuid: [u8; 16],
    /// Size in logical blocks.
    pub blocks: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
    /// The backing object is read-only.
    pub read_only: bool,
    /// Writes are refused on somebody's request.
    pub write_protect: bool,
    /// ANA group.
    pub ana_group: u32,
    /// The hosts that see it; `None`: all that may use the subsystem.
    pub hosts: Option<Vec<Nqn>>,
}

/// A controller at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerStatus {
    /// Controller identifier.
    pub cntlid: u16,
    /// Subsystem NQN; that of the discovery subsystem for a discovery controller, empty when the
    /// subsystem is gone.
    pub subnqn: String,
    /// Host NQN.
    pub hostnqn: String,
    /// Host identifier.
    pub hostid: [u8; 16],
    /// Port of its admin queue.
    pub port: u16,
    /// Address of the host's end of the admin queue.
    pub peer: String,
    /// How its connections are encrypted, if they are.
    pub tls: Option<String>,
    /// How the host has proven itself in band, if it has.
    pub authenticated: Option<String>,
    /// I/O queues.
    pub io_queues: usize,
    /// I/O of its queues, those of before among them.
    pub totals: Totals,
    /// It has ended, and I/O of it is still at a volume.
    pub draining: bool,
}

/// How often hosts met a limit since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsHit {
    /// Connections closed at once: too many in all.
    pub connections: u64,
    /// Connections closed at once: too many of one peer before their Connect command.
    pub handshakes: u64,
    /// Connections closed before their Connect command to make room for newer ones, among all or
    /// among the TLS handshakes of a core.
    pub handshakes_dropped: u64,
    /// Queues refused: too many of one host.
    pub connections_of_host: u64,
    /// Controllers refused: too many in all.
    pub controllers: u64,
    /// Controllers refused: too many of one host.
    pub controllers_of_host: u64,
    /// Admin commands held back: too many of one host in a short time.
    pub admin_waits: u64,
    /// Admin commands answered with Command Interrupted: too many of one host in a short time.
    pub admin_commands: u64,
    /// Commands beyond the size of their queue, which were taken all the same.
    pub queue_overruns: u64,
    /// Commands that waited because their connection or host held its share of the buffers.
    pub buffers: u64,
}
