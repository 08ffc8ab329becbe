//! What to run: checked configuration, from a TOML file, from flags, or from both.
//!
//! ```text
//!  penstock.toml ──► file::read ──┐
//!                                 ├──► Draft (text + where it came from) ──► Config (checked)
//!  --volume a=ram:1M ─────────────┘
//! ```
//!
//! Both sources give the same [`Draft`]: plain text with the [`Place`] each piece came from. There
//! is one set of checks behind it, [`Draft::check`], so a flag and a key are judged alike and each
//! message names the key or flag, the value and what is allowed, with file and line where there is
//! one. The rest of the daemon sees only [`Config`] and never an unchecked value.

mod check;
mod fabric;
mod file;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::VolumeSpec;
use nvme::spec::Nqn;
use nvme_pci::Doorbells;
use nvmf_initiator::{PathConfig, PathPolicy};
use nvmf_target::{AuthDemand, AuthPolicy, Tls};

use crate::credentials::CredentialsConfig;
use crate::identity::HostIdentity;

pub(crate) use check::{is_name, parse_nqn};
pub(crate) use fabric::{
    ANA_GROUP_MAX, DEFAULT_SUBSYSTEM, SUBSYSTEMS_MAX, hosts_of, parse_referral,
};
pub use fabric::{AnaConfig, AnaSetting, LimitsConfig, ReferralConfig, SubsystemConfig};

/// The largest number of request queues of one device.
pub const QUEUES_MAX: u64 = 64;
/// The largest number of I/O queues of one association.
pub const IO_QUEUES_MAX: u64 = 128;
/// Most namespaces, and most ways to the target, of one device.
pub const WAYS_MAX: usize = 16;
/// The default number of request queues of a virtio-blk device.
pub const DEVICE_QUEUES: u16 = 2;
/// The port of NVMe/TCP I/O controllers (IANA).
pub const IO_PORT: u16 = 4420;
/// The port of NVMe/TCP discovery controllers (IANA).
pub const DISCOVERY_PORT: u16 = 8009;

/// Everything a `penstock` process runs; every value in it has been checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where identities are kept. Without it they are derived from names (see [`crate::identity`]).
    pub data_dir: Option<PathBuf>,
    /// Volumes to serve, in the order given.
    pub volumes: Vec<VolumeConfig>,
    /// The NVMe/TCP target, if there is one.
    pub target: Option<TargetConfig>,
    /// Devices to emulate.
    pub devices: Vec<DeviceConfig>,
    /// Cores the emulated devices run on; `None` lets the daemon choose.
    pub emulator_cores: Option<u16>,
    /// How long these look for work before they sleep, at most, in microseconds; `None`: as long as
    /// is good for most.
    pub emulator_busy_poll_us: Option<u16>,
    /// Unix socket of the management API; `None`: there is none.
    pub api: Option<PathBuf>,
    /// The target's management API on TCP, if it is there, too.
    pub api_tls: Option<ApiTls>,
    /// What a process that only emulates devices gives up after its start.
    pub containment: Containment,
    /// Whom the process becomes after its start: a name, a number, or two; `None`: nobody else.
    pub user: Option<String>,
    /// Whether a process that only emulates devices has a supervisor.
    pub supervise: Supervise,
}

impl Config {
    /// Whether the process that starts is a supervisor, and another one emulates.
    pub fn is_supervised(&self) -> bool {
        match self.supervise {
            Supervise::On => true,
            Supervise::Off => false,
            // A volume in the process's memory would not come back with another worker.
            Supervise::Auto => self
                .devices
                .iter()
                .any(|device| device.kind == DeviceKind::Nvme && device.volume.is_none()),
        }
    }
}

/// Whether a supervisor keeps what belongs to an emulator's guests, and starts it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Supervise {
    /// Where there is a device whose guest would hang without: one of type `nvme` with a target.
    Auto,
    /// Always.
    On,
    /// Never.
    #[default]
    Off,
}

/// The management API on TCP: TLS 1.3, with certificates on both ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiTls {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Certificate of the server, followed by those between it and its authority (PEM).
    pub cert: PathBuf,
    /// Private key of the certificate (PEM), which nobody else may use.
    pub key: PathBuf,
    /// Certificates of the authorities whose clients may do everything (PEM).
    pub client_ca: PathBuf,
    /// Lists of these authorities of the certificates that they have revoked (PEM); `None`: nothing is
    /// known to be revoked.
    pub client_crl: Option<PathBuf>,
}

/// What an emulator gives up after its start, so that a guest that takes it over gains little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Containment {
    /// Nothing.
    #[default]
    Off,
    /// What the kernel has the means for; what it lacks is said in the log.
    On,
    /// Everything, or it does not start.
    Require,
}

/// One volume, served as one namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Unique name; identities are kept or derived by it.
    pub name: String,
    /// What is behind it.
    pub spec: VolumeSpec,
    /// The namespace ID, if the operator chose one.
    pub nsid: Option<u32>,
    /// Name of the subsystem it is in.
    pub subsystem: String,
    /// ANA group.
    pub ana_group: u32,
    /// Hosts that see it; `None`: every host of the subsystem.
    pub hosts: Option<Vec<Nqn>>,
}

/// The NVMe/TCP target.
#[derive(Debug, Clone)]
pub struct TargetConfig {
    /// Where I/O controllers listen.
    pub listen: Vec<Listen>,
    /// Where discovery controllers listen; may be empty.
    pub discovery: Vec<Listen>,
    /// What is served: the default subsystem, if it is used, first.
    pub subsystems: Vec<SubsystemConfig>,
    /// Cores that serve connections; `None` lets the daemon choose.
    pub cores: Option<u16>,
    /// As [`Config::emulator_busy_poll_us`].
    pub busy_poll_us: Option<u16>,
    /// Largest queue a host may ask for, in entries.
    pub queue_entries_max: Option<u16>,
    /// Most I/O queues one association may have.
    pub io_queues_max: Option<u16>,
    /// Bounds, where the operator chose some.
    pub limits: LimitsConfig,
    /// ANA states to begin with; what is not named is optimized.
    pub ana: Vec<AnaConfig>,
    /// Other discovery controllers.
    pub referrals: Vec<ReferralConfig>,
    /// Unique NQN of the discovery subsystem, if the operator chose one.
    pub discovery_nqn: Option<Nqn>,
    /// Whether the discovery listeners are advertised by multicast DNS.
    pub mdns: bool,
    /// Hashes and groups of in-band authentication.
    pub auth: AuthPolicy,
}

impl TargetConfig {
    /// The NQN the operator chose for the default subsystem.
    pub fn subnqn(&self) -> Option<&Nqn> {
        let default = self.subsystems.iter().find(|s| s.name == DEFAULT_SUBSYSTEM)?;
        default.nqn.as_ref()
    }
}

/// A listening address, and the address hosts are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Listen {
    /// What is bound.
    pub addr: SocketAddr,
    /// What the discovery log says instead, where hosts reach the listener by another address.
    pub advertise: Option<SocketAddr>,
    /// Port ID, if the operator chose one.
    pub portid: Option<u16>,
    /// Whether connections are encrypted.
    pub tls: Tls,
    /// Which hosts have to authenticate in band.
    pub auth: AuthDemand,
    /// The discovery log does not tell of it.
    pub hidden: bool,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.addr)?;
        if let Some(advertise) = self.advertise {
            write!(f, ",advertise={advertise}")?;
        }
        if let Some(portid) = self.portid {
            write!(f, ",portid={portid}")?;
        }
        match self.tls {
            Tls::Off => {}
            Tls::Allowed => f.write_str(",tls=allowed")?,
            Tls::Required => f.write_str(",tls=required")?,
        }
        match self.auth {
            AuthDemand::Registered => {}
            AuthDemand::Required => f.write_str(",auth=required")?,
        }
        Ok(())
    }
}

/// The kind of an emulated device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A virtio block device served over vhost-user.
    VirtioBlk,
    /// An NVMe controller served over vfio-user.
    Nvme,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceKind::VirtioBlk => f.write_str("virtio-blk"),
            DeviceKind::Nvme => f.write_str("nvme"),
        }
    }
}

/// One emulated device: a socket for the machine, a remote namespace behind it, or a volume of this
/// process's for measuring and trying.
#[derive(Debug, Clone)]
pub struct DeviceConfig {
    /// Unique name.
    pub name: String,
    /// What the machine sees.
    pub kind: DeviceKind,
    /// The socket the machine connects to: vhost-user of a virtio-blk device, vfio-user of an NVMe
    /// controller.
    pub socket: PathBuf,
    /// A volume in this process instead of a target; then `connect` and `discover` are empty.
    pub volume: Option<VolumeSpec>,
    /// The target, by one or several ways that are always used.
    pub connect: Vec<PathConfig>,
    /// Discovery controllers that tell more ways.
    pub discover: Vec<SocketAddr>,
    /// They are asked in plaintext, whatever `credentials` say of the target.
    pub discover_in_plaintext: bool,
    /// TCP ports of what they tell that may be connected to.
    pub ports: BTreeSet<u16>,
    /// Which of them an I/O takes.
    pub policy: PathPolicy,
    /// The subsystem the namespace is in; of a `volume`, where its identity comes from.
    pub subnqn: Nqn,
    /// The namespaces: one of a virtio-blk device.
    pub nsids: Vec<u32>,
    /// Those that the subsystem has, as they come and go; then `nsids` is empty.
    pub follows: bool,
    /// Who the device is to the target; `None`: this process's host.
    pub host: Option<HostIdentity>,
    /// How long I/O is held without a path to the target before it fails; `None`: for ever.
    pub ctrl_loss_timeout: Option<Duration>,
    /// Request queues of the device.
    pub queues: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How an NVMe device hears of its doorbells.
    pub doorbells: Doorbells,
    /// TLS and authentication towards the target, and its discovery controllers.
    pub credentials: CredentialsConfig,
}

/// Where a piece of configuration came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A command-line flag, with its dashes.
    Flag(&'static str),
    /// A key in a file.
    File {
        /// The file as the operator named it.
        path: Arc<Path>,
        /// Line, counted from 1.
        line: usize,
        /// The key with its table, such as `target.listen`.
        key: String,
    },
}

/// A value that was refused. Its message is complete: place, value, reason, what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A value that is not allowed.
    #[error("{}", ValueMessage { place, value, problem })]
    Value {
        /// Where it was given.
        place: Place,
        /// The value as given.
        value: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// Something needed was not given.
    #[error("{0}")]
    Missing(String),
    /// The file could not be read.
    #[error("{}: cannot read the configuration: {problem}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: String,
    },
    /// The file is no TOML of the right shape.
    #[error("{}:{line}: {problem}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong and what is allowed.
        problem: String,
    },
}

/// Where it is, without a value: how another message points at it.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Flag(flag) => f.write_str(flag),
            Place::File { path, line, key } => write!(f, "{}:{line}: {key}", path.display()),
        }
    }
}

struct ValueMessage<'a> {
    place: &'a Place,
    value: &'a str,
    problem: &'a str,
}

impl fmt::Display for ValueMessage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Flag(flag) => write!(f, "{flag} {:?}: {}", self.value, self.problem),
            Place::File { path, line, key } => {
                write!(f, "{}:{line}: {key} = {:?}: {}", path.display(), self.value, self.problem)
            }
        }
    }
}

/// A piece of text and where it was given.
#[derive(Debug, Clone)]
pub struct Setting {
    text: String,
    place: Place,
}

impl Setting {
    /// The argument of a flag.
    pub fn flag(flag: &'static str, text: impl Into<String>) -> Self {
        Setting { text: text.into(), place: Place::Flag(flag) }
    }

    fn refuse(&self, problem: impl Into<String>) -> ConfigError {
        ConfigError::Value {
            place: self.place.clone(),
            value: self.text.clone(),
            problem: problem.into(),
        }
    }
}

#[derive(Debug, Clone)]
struct VolumeDraft {
    name: Setting,
    spec: Setting,
    nsid: Option<Setting>,
    subsystem: Option<Setting>,
    ana_group: Option<Setting>,
    hosts: Option<Vec<Setting>>,
}

#[derive(Debug, Clone)]
struct SubsystemDraft {
    name: Setting,
    nqn: Option<Setting>,
    hosts: Option<Vec<Setting>>,
}

#[derive(Debug, Clone)]
struct AnaDraft {
    port: Option<Setting>,
    group: Setting,
    state: Setting,
}

#[derive(Debug, Clone)]
struct ReferralDraft {
    addr: Setting,
    nqn: Option<Setting>,
}

/// A device before it is checked: its keys by name.
#[derive(Debug, Clone)]
struct DeviceDraft {
    name: Setting,
    keys: BTreeMap<&'static str, Setting>,
}

/// The keys of a device besides its name, as the file and the flag know them.
const DEVICE_KEYS: [&str; 20] = [
    "type",
    "socket",
    "connect",
    "discover",
    "discover_tls",
    "ports",
    "subnqn",
    "nsid",
    "queues",
    "read_only",
    "doorbells",
    "hostnqn",
    "hostid",
    "ctrl_loss_tmo",
    "iopolicy",
    "volume",
    "tls",
    "psk",
    "dhchap",
    "dhchap_ctrl",
];

/// Configuration as given, not yet checked.
///
/// Flags are laid over a file: volumes, subsystems, ANA states, referrals and devices are added to
/// the file's, single values and listeners replace the file's.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    data_dir: Option<Setting>,
    volumes: Vec<VolumeDraft>,
    devices: Vec<DeviceDraft>,
    listen: Vec<Setting>,
    discovery: Vec<Setting>,
    subnqn: Option<Setting>,
    cores: Option<Setting>,
    emulator_cores: Option<Setting>,
    busy_poll_us: Option<Setting>,
    emulator_busy_poll_us: Option<Setting>,
    containment: Option<Setting>,
    supervise: Option<Setting>,
    /// Of the emulator; that of a target is `user`.
    emulator_user: Option<Setting>,
    user: Option<Setting>,
    emulator_api: Option<Setting>,
    queue_entries_max: Option<Setting>,
    io_queues_max: Option<Setting>,
    api: Option<Setting>,
    api_listen: Option<Setting>,
    api_cert: Option<Setting>,
    api_key: Option<Setting>,
    api_client_ca: Option<Setting>,
    api_client_crl: Option<Setting>,
    limits: BTreeMap<String, Setting>,
    subsystems: Vec<SubsystemDraft>,
    ana: Vec<AnaDraft>,
    referrals: Vec<ReferralDraft>,
    discovery_nqn: Option<Setting>,
    mdns: bool,
    auth_hashes: Vec<Setting>,
    auth_groups: Vec<Setting>,
    has_target: bool,
    /// Only devices are run: such a process is contained unless the operator says otherwise.
    is_emulator: bool,
}

/// Keys and their values.
type Pairs<'a> = Vec<(&'static str, &'a str)>;

/// The parts of `head,key=value,...`; a key may be given more than once where `allowed` says so.
fn parts<'a>(
    whole: &Setting,
    text: &'a str,
    allowed: &[&'static str],
    repeated: &str,
    form: &str,
) -> Result<(&'a str, Pairs<'a>), ConfigError> {
    let mut pieces = text.split(',');
    let head = pieces.next().unwrap_or("");
    let mut found: Pairs<'a> = Vec::new();
    for piece in pieces {
        let Some((key, value)) = piece.split_once('=') else {
            return Err(whole.refuse(format!("{piece:?} is not key=value; {form}")));
        };
        let Some(key) = allowed.iter().find(|known| **known == key) else {
            return Err(
                whole.refuse(format!("there is no key {key:?}; allowed: {}", allowed.join(", ")))
            );
        };
        if *key != repeated && found.iter().any(|(other, _)| other == key) {
            return Err(whole.refuse(format!("the key {key:?} is given twice")));
        }
        found.push((key, value));
    }
    Ok((head, found))
}

impl Draft {
    /// An empty draft, to be filled from flags.
    pub fn new() -> Self {
        Draft::default()
    }

    /// Reads a configuration file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        file::read(path)
    }

    /// Parses configuration text; `path` is only used in messages.
    pub fn from_toml(path: &Path, text: &str) -> Result<Self, ConfigError> {
        file::parse(path, text)
    }

    /// `--data DIR`.
    pub fn set_data_dir(&mut self, dir: impl Into<String>) {
        self.data_dir = Some(Setting::flag("--data", dir));
    }

    /// `--volume NAME=SPEC`.
    pub fn add_volume(&mut self, argument: &str) -> Result<(), ConfigError> {
        let whole = Setting::flag("--volume", argument);
        let Some((name, spec)) = argument.split_once('=') else {
            return Err(
                whole.refuse("allowed: NAME=SPEC, such as db0=file:/var/lib/db0.img,size=10GiB")
            );
        };
        self.volumes.push(VolumeDraft {
            name: Setting::flag("--volume", name),
            spec: Setting::flag("--volume", spec),
            nsid: None,
            subsystem: None,
            ana_group: None,
            hosts: None,
        });
        Ok(())
    }

    /// `--namespace VOLUME[,subsystem=NAME][,nsid=N][,ana_group=N][,host=NQN]...`: how a volume of
    /// the file or of an earlier `--volume` is shown to hosts.
    pub fn set_namespace(&mut self, argument: &str) -> Result<(), ConfigError> {
        const FLAG: &str = "--namespace";
        const FORM: &str = "allowed: VOLUME[,subsystem=NAME][,nsid=N][,ana_group=N][,host=NQN]...";
        let whole = Setting::flag(FLAG, argument);
        let keys = ["subsystem", "nsid", "ana_group", "host"];
        let (name, found) = parts(&whole, argument, &keys, "host", FORM)?;
        let Some(volume) = self.volumes.iter_mut().find(|volume| volume.name.text == name) else {
            return Err(whole.refuse(format!("there is no volume {name:?}; {FORM}")));
        };
        for (key, value) in found {
            let setting = Setting::flag(FLAG, value);
            match key {
                "subsystem" => volume.subsystem = Some(setting),
                "nsid" => volume.nsid = Some(setting),
                "ana_group" => volume.ana_group = Some(setting),
                _ => volume.hosts.get_or_insert_default().push(setting),
            }
        }
        Ok(())
    }

    /// `--subsystem NAME[,nqn=NQN][,host=NQN]...`.
    pub fn add_subsystem(&mut self, argument: &str) -> Result<(), ConfigError> {
        const FLAG: &str = "--subsystem";
        const FORM: &str = "allowed: NAME[,nqn=NQN][,host=NQN]...";
        let whole = Setting::flag(FLAG, argument);
        let (name, found) = parts(&whole, argument, &["nqn", "host"], "host", FORM)?;
        let mut draft = SubsystemDraft { name: Setting::flag(FLAG, name), nqn: None, hosts: None };
        for (key, value) in found {
            let setting = Setting::flag(FLAG, value);
            match key {
                "nqn" => draft.nqn = Some(setting),
                _ => draft.hosts.get_or_insert_default().push(setting),
            }
        }
        self.subsystems.push(draft);
        Ok(())
    }

    /// `--ana group=N,state=STATE[,port=N]`.
    pub fn add_ana(&mut self, argument: &str) -> Result<(), ConfigError> {
        const FLAG: &str = "--ana";
        const FORM: &str = "allowed: group=N,state=STATE[,port=N], such as \
                            group=2,state=inaccessible,port=1";
        let whole = Setting::flag(FLAG, argument);
        let list = format!(",{argument}");
        let (_, found) = parts(&whole, &list, &["port", "group", "state"], "", FORM)?;
        let value = |key: &str| {
            let (_, value) = found.iter().find(|(found, _)| *found == key)?;
            Some(Setting::flag(FLAG, *value))
        };
        let (Some(group), Some(state)) = (value("group"), value("state")) else {
            return Err(whole.refuse(FORM));
        };
        self.ana.push(AnaDraft { port: value("port"), group, state });
        Ok(())
    }

    /// `--referral ADDR:PORT[,nqn=NQN]`.
    pub fn add_referral(&mut self, argument: &str) -> Result<(), ConfigError> {
        const FLAG: &str = "--referral";
        let whole = Setting::flag(FLAG, argument);
        let form = "allowed: ADDR:PORT[,nqn=NQN]";
        let (addr, found) = parts(&whole, argument, &["nqn"], "", form)?;
        self.referrals.push(ReferralDraft {
            addr: Setting::flag(FLAG, addr),
            nqn: found.first().map(|(_, nqn)| Setting::flag(FLAG, *nqn)),
        });
        Ok(())
    }

    /// `--limit KEY=N`; replaces the file's value of that key.
    pub fn add_limit(&mut self, argument: &str) -> Result<(), ConfigError> {
        let whole = Setting::flag("--limit", argument);
        let Some((key, value)) = argument.split_once('=') else {
            return Err(
                whole.refuse(format!("allowed: KEY=N, KEY one of {}", fabric::limit_keys()))
            );
        };
        if !fabric::is_limit(key) {
            return Err(whole
                .refuse(format!("there is no limit {key:?}; allowed: {}", fabric::limit_keys())));
        }
        self.limits.insert(key.to_owned(), Setting::flag("--limit", value));
        Ok(())
    }

    /// `--discovery-nqn NQN`.
    pub fn set_discovery_nqn(&mut self, nqn: impl Into<String>) {
        self.discovery_nqn = Some(Setting::flag("--discovery-nqn", nqn));
    }

    /// `--auth-hash HASH`, as often as given; replaces the file's.
    pub fn set_auth_hashes(&mut self, hashes: &[String]) {
        if !hashes.is_empty() {
            self.auth_hashes =
                hashes.iter().map(|text| Setting::flag("--auth-hash", text)).collect();
        }
    }

    /// `--auth-group GROUP`, as often as given; replaces the file's.
    pub fn set_auth_groups(&mut self, groups: &[String]) {
        if !groups.is_empty() {
            self.auth_groups =
                groups.iter().map(|text| Setting::flag("--auth-group", text)).collect();
        }
    }

    /// `--mdns`.
    pub fn set_mdns(&mut self) {
        self.mdns = true;
    }

    /// `--api PATH`.
    pub fn set_api(&mut self, socket: impl Into<String>) {
        self.api = Some(Setting::flag("--api", socket));
    }

    /// `--api-listen ADDR:PORT`.
    pub fn set_api_listen(&mut self, addr: impl Into<String>) {
        self.api_listen = Some(Setting::flag("--api-listen", addr));
    }

    /// `--api-cert FILE`.
    pub fn set_api_cert(&mut self, path: impl Into<String>) {
        self.api_cert = Some(Setting::flag("--api-cert", path));
    }

    /// `--api-key FILE`.
    pub fn set_api_key(&mut self, path: impl Into<String>) {
        self.api_key = Some(Setting::flag("--api-key", path));
    }

    /// `--api-client-ca FILE`.
    pub fn set_api_client_ca(&mut self, path: impl Into<String>) {
        self.api_client_ca = Some(Setting::flag("--api-client-ca", path));
    }

    /// `--api-client-crl FILE`.
    pub fn set_api_client_crl(&mut self, path: impl Into<String>) {
        self.api_client_crl = Some(Setting::flag("--api-client-crl", path));
    }

    /// `--device NAME=TYPE,key=value,...`.
    pub fn add_device(&mut self, argument: &str) -> Result<(), ConfigError> {
        const FORM: &str = "allowed: NAME=virtio-blk,socket=PATH,connect=ADDR:PORT (or \
                            discover=ADDR:PORT),subnqn=NQN,nsid=N,psk=FILE[,queues=N]\
                            [,read_only=true], or tls=off in place of psk=FILE";
        let whole = Setting::flag("--device", argument);
        let Some((name, rest)) = argument.split_once('=') else {
            return Err(whole.refuse(FORM));
        };
        let mut keys = BTreeMap::new();
        for (index, part) in rest.split(',').enumerate() {
            let (key, value) = match part.split_once('=') {
                Some(pair) => pair,
                None if index == 0 => ("type", part),
                None => return Err(whole.refuse(format!("{part:?} is not key=value; {FORM}"))),
            };
            let Some(known) = DEVICE_KEYS.iter().find(|known| **known == key) else {
                return Err(whole.refuse(format!(
                    "there is no key {key:?}; allowed: {}",
                    DEVICE_KEYS.join(", ")
                )));
            };
            if keys.insert(*known, Setting::flag("--device", value)).is_some() {
                return Err(whole.refuse(format!("the key {key:?} is given twice")));
            }
        }
        self.devices.push(DeviceDraft { name: Setting::flag("--device", name), keys });
        Ok(())
    }

    /// `--listen ADDR:PORT[,advertise=ADDR:PORT]`, as often as given; replaces the file's.
    pub fn set_listen(&mut self, listen: &[String]) {
        if !listen.is_empty() {
            self.listen = listen.iter().map(|text| Setting::flag("--listen", text)).collect();
        }
    }

    /// `--discovery ADDR:PORT[,advertise=ADDR:PORT]`, as often as given; replaces the file's.
    pub fn set_discovery(&mut self, discovery: &[String]) {
        if !discovery.is_empty() {
            self.discovery =
                discovery.iter().map(|text| Setting::flag("--discovery", text)).collect();
        }
    }

    /// `--subnqn NQN`.
    pub fn set_subnqn(&mut self, subnqn: impl Into<String>) {
        self.subnqn = Some(Setting::flag("--subnqn", subnqn));
    }

    /// `--cores N` of the target.
    pub fn set_target_cores(&mut self, cores: impl Into<String>) {
        self.cores = Some(Setting::flag("--cores", cores));
    }

    /// `--cores N` of the emulator.
    pub fn set_emulator_cores(&mut self, cores: impl Into<String>) {
        self.emulator_cores = Some(Setting::flag("--cores", cores));
    }

    /// `--busy-poll-us N` of the target.
    pub fn set_target_busy_poll_us(&mut self, micros: impl Into<String>) {
        self.busy_poll_us = Some(Setting::flag("--busy-poll-us", micros));
    }

    /// `--busy-poll-us N` of the emulator.
    pub fn set_emulator_busy_poll_us(&mut self, micros: impl Into<String>) {
        self.emulator_busy_poll_us = Some(Setting::flag("--busy-poll-us", micros));
    }

    /// `--api PATH` of an emulator.
    pub fn set_emulator_api(&mut self, path: impl Into<String>) {
        self.emulator_api = Some(Setting::flag("--api", path));
    }

    /// `--containment off|on|require`.
    pub fn set_containment(&mut self, mode: impl Into<String>) {
        self.containment = Some(Setting::flag("--containment", mode));
    }

    /// `--user USER` of an emulator.
    pub fn set_emulator_user(&mut self, user: impl Into<String>) {
        self.emulator_user = Some(Setting::flag("--user", user));
    }

    /// `--user USER` of a target.
    pub fn set_user(&mut self, user: impl Into<String>) {
        self.user = Some(Setting::flag("--user", user));
    }

    /// `--supervise[=auto|on|off]`.
    pub fn set_supervise(&mut self, mode: impl Into<String>) {
        self.supervise = Some(Setting::flag("--supervise", mode));
    }

    /// `--queue-entries-max N`.
    pub fn set_queue_entries_max(&mut self, entries: impl Into<String>) {
        self.queue_entries_max = Some(Setting::flag("--queue-entries-max", entries));
    }

    /// `--io-queues-max N`.
    pub fn set_io_queues_max(&mut self, queues: impl Into<String>) {
        self.io_queues_max = Some(Setting::flag("--io-queues-max", queues));
    }

    /// Takes the emulator's part out: what `penstock target` runs. Returns how many devices were
    /// left out.
    pub fn keep_target(&mut self) -> usize {
        let left_out = self.devices.len();
        self.devices.clear();
        self.has_target = true;
        left_out
    }

    /// Takes the target's part out: what `penstock emulate` runs. Returns how many volumes were
    /// left out.
    pub fn keep_devices(&mut self) -> usize {
        let left_out = self.volumes.len();
        let devices = std::mem::take(&mut self.devices);
        *self = Draft {
            data_dir: self.data_dir.take(),
            emulator_cores: self.emulator_cores.take(),
            emulator_busy_poll_us: self.emulator_busy_poll_us.take(),
            containment: self.containment.take(),
            supervise: self.supervise.take(),
            user: self.emulator_user.take(),
            api: self.emulator_api.take(),
            is_emulator: true,
            devices,
            ..Draft::default()
        };
        left_out
    }
}
