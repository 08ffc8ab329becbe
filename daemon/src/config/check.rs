//! The one set of checks behind file and flags: [`Draft`] in, [`Config`] out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use block::VolumeSpec;
use nvme::spec::Nqn;
use nvme_pci::Doorbells;
use nvmf_initiator::{PathConfig, PathPolicy};
use uuid::Uuid;

use super::{
    ApiTls, Config, ConfigError, Containment, DEVICE_QUEUES, DeviceConfig, DeviceDraft, DeviceKind,
    Draft, IO_QUEUES_MAX, QUEUES_MAX, Setting, Supervise, TargetConfig, VolumeConfig, VolumeDraft,
    WAYS_MAX, fabric,
};
use crate::credentials::{CredentialsConfig, TlsSetting};
use crate::identity::{self, HostIdentity, UUID_NQN};

/// Names become file names, log fields and NQN suffixes.
const NAME_LEN_MAX: usize = 64;
/// More cores than this serve no block device we know.
const CORES_MAX: u64 = 256;
/// Looking for longer than 10 ms is never to sleep.
const BUSY_POLL_US: std::ops::RangeInclusive<u64> = 0..=10_000;
/// Smallest and largest queue: NVMe over Fabrics asks for two entries, CAP.MQES is 16 bits wide,
/// and memory per connection is reserved for what may be in flight.
const QUEUE_ENTRIES: std::ops::RangeInclusive<u64> = 2..=4096;
/// Namespace IDs above this are refused by hosts that size tables by NN.
const NSID_MAX: u64 = 65_536;
/// `sockaddr_un` holds 108 bytes with the terminating zero.
const SOCKET_PATH_MAX: usize = 107;
/// Discovery controllers of a device.
const CONTROLLERS_MAX: usize = 8;
/// TCP ports that discovery may lead a device to.
const PORTS_MAX: usize = 64;
/// Those that it may lead to where nothing is said: what NVMe/TCP and its discovery are assigned.
const DISCOVERED_PORTS: [u16; 2] = [4420, 8009];
/// A day: who waits for longer waits for ever.
const CTRL_LOSS_S_MAX: u64 = 86_400;
/// Volumes of one target; devices of one emulator.
const OBJECTS_MAX: usize = 4096;

const NAME_ALLOWED: &str =
    "allowed: 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash";

impl Draft {
    /// Checks every value. The first refusal ends it: one message, about one thing.
    pub fn check(self) -> Result<Config, ConfigError> {
        let volumes = check_volumes(&self.volumes)?;
        let devices = check_devices(&self.devices, self.data_dir.is_some())?;
        let api = match &self.api {
            Some(setting) => Some(socket_path(setting)?),
            None => None,
        };
        let api_tls = self.check_api_tls()?;
        let (listen, discovery) = fabric::check_listeners(&self.listen, &self.discovery)?;
        if !discovery.is_empty() {
            for (entry, listen) in self.listen.iter().zip(&listen) {
                if listen.addr.ip().is_unspecified() && listen.advertise.is_none() {
                    return Err(entry.refuse(
                        "listens everywhere, and the discovery log needs one address that hosts \
                         can reach; add ,advertise=ADDR:PORT",
                    ));
                }
            }
        }

        let has_target = self.has_target
            || !volumes.is_empty()
            || !self.listen.is_empty()
            || !self.discovery.is_empty()
            || !self.subsystems.is_empty();
        let target = if has_target {
            // Volumes may be attached at run time where there is a way to do it.
            if volumes.is_empty() && api.is_none() && api_tls.is_none() {
                return Err(ConfigError::Missing(
                    "no volume to serve: give --volume NAME=SPEC, or a [[volume]] table with name \
                     and spec; SPEC is file:PATH[,size=SIZE], blockdev:PATH, ram:SIZE or null:SIZE \
                     (or give --api PATH to attach volumes later)"
                        .to_owned(),
                ));
            }
            if listen.is_empty() {
                return Err(ConfigError::Missing(
                    "no address to listen on: give --listen ADDR:PORT, or target.listen in the \
                     file, such as 127.0.0.1:4420"
                        .to_owned(),
                ));
            }
            let subsystems =
                fabric::check_subsystems(&self.subsystems, self.subnqn.as_ref(), &volumes)?;
            for (draft, volume) in self.volumes.iter().zip(&volumes) {
                if !subsystems.iter().any(|subsystem| subsystem.name == volume.subsystem)
                    && let Some(setting) = &draft.subsystem
                {
                    let names: Vec<_> = subsystems.iter().map(|s| s.name.as_str()).collect();
                    return Err(setting.refuse(format!(
                        "is the name of no subsystem; allowed: {}",
                        names.join(", ")
                    )));
                }
            }
            let limits = fabric::check_limits(&self.limits)?;
            check_nsids(&self.volumes, &volumes, limits.namespaces_max)?;
            let discovery_nqn = match &self.discovery_nqn {
                Some(setting) => Some(own_nqn(setting)?),
                None => None,
            };
            if let (Some(setting), Some(nqn)) = (&self.discovery_nqn, &discovery_nqn)
                && let Some(twin) = subsystems.iter().find(|s| s.nqn.as_ref() == Some(nqn))
            {
                return Err(setting.refuse(format!(
                    "is the NQN of subsystem {:?}; allowed: an NQN of its own",
                    twin.name
                )));
            }
            if self.mdns && discovery.is_empty() {
                return Err(ConfigError::Missing(
                    "mDNS advertises discovery listeners and there is none: give --discovery \
                     ADDR:PORT, or target.discovery in the file"
                        .to_owned(),
                ));
            }
            let ana = fabric::check_ana(&self.ana, &listen)?;
            Some(TargetConfig {
                listen,
                discovery,
                subsystems,
                cores: optional(&self.cores, 1..=CORES_MAX)?,
                busy_poll_us: optional(&self.busy_poll_us, BUSY_POLL_US)?,
                queue_entries_max: optional(&self.queue_entries_max, QUEUE_ENTRIES)?,
                io_queues_max: optional(&self.io_queues_max, 1..=IO_QUEUES_MAX)?,
                limits,
                ana,
                referrals: fabric::check_referrals(&self.referrals)?,
                discovery_nqn,
                mdns: self.mdns,
                auth: fabric::check_auth(&self.auth_hashes, &self.auth_groups)?,
            })
        } else {
            None
        };
        if target.is_none() && devices.is_empty() {
            return Err(ConfigError::Missing(
                "nothing to run: give a target (--volume and --listen, or [[volume]] and [target]) \
                 or a device (--device, or [[device]])"
                    .to_owned(),
            ));
        }
        let data_dir = match &self.data_dir {
            Some(setting) if setting.text.is_empty() => {
                return Err(setting.refuse("is empty; allowed: the path of a directory"));
            }
            Some(setting) => Some(PathBuf::from(&setting.text)),
            None => None,
        };
        Ok(Config {
            data_dir,
            volumes,
            target,
            devices,
            emulator_cores: optional(&self.emulator_cores, 1..=CORES_MAX)?,
            emulator_busy_poll_us: optional(&self.emulator_busy_poll_us, BUSY_POLL_US)?,
            api,
            api_tls,
            containment: match (&self.containment, self.is_emulator) {
                (Some(setting), _) => containment(setting)?,
                (None, true) => Containment::On,
                (None, false) => Containment::Off,
            },
            user: match &self.user {
                Some(setting) if setting.text.is_empty() => {
                    return Err(setting.refuse("is empty; allowed: the name or number of a user"));
                }
                user => user.as_ref().map(|setting| setting.text.clone()),
            },
            supervise: match &self.supervise {
                Some(setting) => supervise(setting)?,
                None => Supervise::Auto,
            },
        })
    }
}

impl Draft {
    /// All of it or nothing, but for the revocation list: on TCP nobody is who they say they are without
    /// a certificate.
    fn check_api_tls(&self) -> Result<Option<ApiTls>, ConfigError> {
        let files = [
            (&self.api_cert, "--api-cert FILE", "api.cert"),
            (&self.api_key, "--api-key FILE", "api.key"),
            (&self.api_client_ca, "--api-client-ca FILE", "api.client_ca"),
        ];
        let Some(listen) = &self.api_listen else {
            let given = files.iter().find_map(|(setting, ..)| setting.as_ref());
            return match given.or(self.api_client_crl.as_ref()) {
                Some(setting) => Err(setting.refuse(
                    "is for the management API on TCP, and there is none; give --api-listen \
                     ADDR:PORT, or api.listen in the file, as well",
                )),
                None => Ok(None),
            };
        };
        let addr = address(listen, &listen.text)?;
        let mut paths = Vec::with_capacity(files.len());
        let path = |setting: &Setting| match setting.text.is_empty() {
            true => Err(setting.refuse("is empty; allowed: the path of a PEM file")),
            false => Ok(PathBuf::from(&setting.text)),
        };
        for (setting, flag, key) in files {
            match setting {
                Some(setting) => paths.push(path(setting)?),
                None => {
                    return Err(listen.refuse(format!(
                        "the management API is not served on TCP without TLS and client \
                         certificates; give {flag}, or {key} in the file, as well",
                    )));
                }
            }
        }
        let [cert, key, client_ca] =
            <[PathBuf; 3]>::try_from(paths).expect("each of three files has given a path");
        let io = self.listen.iter().chain(&self.discovery);
        for other in io {
            if fabric::overlaps(other, addr) {
                return Err(listen.refuse(format!(
                    "is also a listener of the target ({}); allowed: another port",
                    other.place
                )));
            }
        }
        let client_crl = self.api_client_crl.as_ref().map(path).transpose()?;
        Ok(Some(ApiTls { addr, cert, key, client_ca, client_crl }))
    }
}

fn containment(setting: &Setting) -> Result<Containment, ConfigError> {
    match setting.text.as_str() {
        "off" => Ok(Containment::Off),
        "on" => Ok(Containment::On),
        "require" => Ok(Containment::Require),
        _ => Err(setting.refuse("allowed: off, on or require")),
    }
}

fn supervise(setting: &Setting) -> Result<Supervise, ConfigError> {
    match setting.text.as_str() {
        "auto" => Ok(Supervise::Auto),
        "on" => Ok(Supervise::On),
        "off" => Ok(Supervise::Off),
        _ => Err(setting.refuse("allowed: auto, on or off")),
    }
}

fn check_volumes(drafts: &[VolumeDraft]) -> Result<Vec<VolumeConfig>, ConfigError> {
    let mut volumes = Vec::with_capacity(drafts.len());
    let mut names = BTreeMap::new();
    let mut nsids = BTreeMap::new();
    for draft in drafts {
        if volumes.len() == OBJECTS_MAX {
            return Err(draft.name.refuse(format!("allowed: at most {OBJECTS_MAX} volumes")));
        }
        let name = name(&draft.name)?;
        if names.insert(name.clone(), ()).is_some() {
            return Err(draft.name.refuse("is the name of another volume; allowed: unique names"));
        }
        let spec =
            draft.spec.text.parse().map_err(|error| draft.spec.refuse(format!("{error}")))?;
        let nsid = match &draft.nsid {
            Some(setting) => Some(number(setting, 1..=NSID_MAX)? as u32),
            None => None,
        };
        let subsystem = match &draft.subsystem {
            Some(setting) => self::name(setting)?,
            None => fabric::DEFAULT_SUBSYSTEM.to_owned(),
        };
        if let (Some(setting), Some(nsid)) = (&draft.nsid, nsid)
            && let Some(other) = nsids.insert((subsystem.clone(), nsid), name.clone())
        {
            return Err(setting
                .refuse(format!("is the namespace ID of volume {other:?}; allowed: unique IDs")));
        }
        let ana_group = match &draft.ana_group {
            Some(setting) => number(setting, 1..=fabric::ANA_GROUP_MAX)? as u32,
            None => 1,
        };
        let hosts = fabric::hosts(draft.hosts.as_deref())?;
        volumes.push(VolumeConfig { name, spec, nsid, subsystem, ana_group, hosts });
    }
    Ok(volumes)
}

/// The subsystem's bound goes for the IDs as well.
fn check_nsids(
    drafts: &[VolumeDraft],
    volumes: &[VolumeConfig],
    max: Option<u32>,
) -> Result<(), ConfigError> {
    let Some(max) = max else { return Ok(()) };
    for (draft, volume) in drafts.iter().zip(volumes) {
        if let (Some(setting), Some(nsid)) = (&draft.nsid, volume.nsid)
            && nsid > max
        {
            return Err(
                setting.refuse(format!("is above limits.namespaces_max; allowed: 1 to {max}"))
            );
        }
    }
    Ok(())
}

fn socket_path(socket: &Setting) -> Result<PathBuf, ConfigError> {
    if socket.text.is_empty() || socket.text.len() > SOCKET_PATH_MAX {
        return Err(socket.refuse(format!(
            "is {} bytes long; allowed: a path of 1 to {SOCKET_PATH_MAX} bytes (limit of Unix \
             sockets)",
            socket.text.len()
        )));
    }
    Ok(PathBuf::from(&socket.text))
}

fn check_devices(drafts: &[DeviceDraft], has_data: bool) -> Result<Vec<DeviceConfig>, ConfigError> {
    let mut devices: Vec<DeviceConfig> = Vec::with_capacity(drafts.len());
    for draft in drafts {
        if devices.len() == OBJECTS_MAX {
            return Err(draft.name.refuse(format!("allowed: at most {OBJECTS_MAX} devices")));
        }
        let device = device(draft, has_data)?;
        if devices.iter().any(|other| other.name == device.name) {
            return Err(draft.name.refuse("is the name of another device; allowed: unique names"));
        }
        if let Some(other) = devices.iter().find(|other| other.socket == device.socket) {
            let socket = &draft.keys["socket"];
            return Err(socket.refuse(format!(
                "is the socket of device {:?}; allowed: a socket for each device",
                other.name
            )));
        }
        devices.push(device);
    }
    Ok(devices)
}

fn device(draft: &DeviceDraft, has_data: bool) -> Result<DeviceConfig, ConfigError> {
    let name = name(&draft.name)?;
    let needed = |key: &'static str, form: &str| {
        draft.keys.get(key).ok_or_else(|| {
            draft.name.refuse(format!("this device has no {key}; needed: {key}={form}"))
        })
    };

    let kind = needed("type", "virtio-blk")?;
    let kind = match kind.text.as_str() {
        "virtio-blk" => DeviceKind::VirtioBlk,
        "nvme" => DeviceKind::Nvme,
        _ => return Err(kind.refuse("is no device type; allowed: virtio-blk, nvme")),
    };
    let socket = socket_path(needed("socket", "PATH")?)?;
    let queues = match draft.keys.get("queues") {
        Some(setting) => number(setting, 1..=QUEUES_MAX)? as u16,
        None => DEVICE_QUEUES,
    };
    let read_only = match draft.keys.get("read_only") {
        None => false,
        Some(setting) => match setting.text.as_str() {
            "true" => true,
            "false" => false,
            _ => return Err(setting.refuse("allowed: true or false")),
        },
    };
    let doorbells = match draft.keys.get("doorbells") {
        None => Doorbells::default(),
        Some(setting) if kind != DeviceKind::Nvme => {
            return Err(setting.refuse("is about nvme devices; leave it out"));
        }
        Some(setting) => match setting.text.as_str() {
            "trapped" => Doorbells::Trapped,
            "mapped" => Doorbells::Mapped,
            _ => return Err(setting.refuse("allowed: trapped or mapped")),
        },
    };
    if let Some(volume) = draft.keys.get("volume") {
        let spec = local_volume(draft, volume)?;
        return Ok(DeviceConfig {
            subnqn: identity::derive_local(&name),
            name,
            kind,
            socket,
            volume: Some(spec),
            connect: Vec::new(),
            discover: Vec::new(),
            discover_in_plaintext: false,
            ports: BTreeSet::new(),
            policy: PathPolicy::default(),
            nsids: vec![1],
            follows: false,
            host: None,
            ctrl_loss_timeout: None,
            queues,
            read_only,
            doorbells,
            credentials: CredentialsConfig::none(),
        });
    }
    let connect = match draft.keys.get("connect") {
        Some(setting) => ways(setting)?,
        None => Vec::new(),
    };
    let discover = match draft.keys.get("discover") {
        Some(setting) => controllers(setting)?,
        None if connect.is_empty() => {
            return Err(draft.name.refuse(
                "this device has no connect; needed: connect=ADDR:PORT or discover=ADDR:PORT",
            ));
        }
        None => Vec::new(),
    };
    let discover_in_plaintext = match draft.keys.get("discover_tls") {
        Some(setting) if discover.is_empty() => {
            return Err(setting.refuse("is about discovery controllers; add discover=ADDR:PORT"));
        }
        Some(setting) if setting.text != "off" => {
            return Err(setting.refuse(
                "allowed: off, for discovery controllers in plaintext; without it they are asked as \
                 tls= says",
            ));
        }
        setting => setting.is_some(),
    };
    let mut ports = match draft.keys.get("ports") {
        Some(setting) if discover.is_empty() => {
            return Err(setting.refuse("says what discovery may lead to; add discover=ADDR:PORT"));
        }
        Some(setting) => tcp_ports(setting)?,
        None => DISCOVERED_PORTS.into(),
    };
    // What is named is meant.
    ports.extend(connect.iter().map(|path| path.addr.port()));
    ports.extend(discover.iter().map(SocketAddr::port));
    let policy = match draft.keys.get("iopolicy") {
        Some(setting) => setting
            .text
            .parse()
            .map_err(|_| setting.refuse("allowed: numa, round-robin or queue-depth"))?,
        None => PathPolicy::default(),
    };
    let subnqn = own_nqn(needed("subnqn", "NQN")?)?;
    let nsids = nsids(needed("nsid", "N")?, kind)?;
    let host = host(draft)?;
    let ctrl_loss_timeout = match draft.keys.get("ctrl_loss_tmo") {
        Some(setting) if setting.text == "off" => None,
        Some(setting) => Some(Duration::from_secs(number(setting, 0..=CTRL_LOSS_S_MAX)?)),
        None => None,
    };
    let credentials = credentials(draft, has_data)?;
    Ok(DeviceConfig {
        name,
        kind,
        socket,
        volume: None,
        connect,
        discover,
        discover_in_plaintext,
        ports,
        policy,
        subnqn,
        follows: nsids.is_empty(),
        nsids,
        host,
        ctrl_loss_timeout,
        queues,
        read_only,
        doorbells,
        credentials,
    })
}

/// The keys of a device that may be beside `volume`.
const LOCAL_KEYS: [&str; 6] = ["type", "socket", "queues", "read_only", "doorbells", "volume"];

/// A volume in the emulator itself. Nothing of the system's: a contained process opens no files, and
/// what is worth keeping belongs behind a target.
fn local_volume(draft: &DeviceDraft, setting: &Setting) -> Result<VolumeSpec, ConfigError> {
    if let Some((key, other)) = draft.keys.iter().find(|(key, _)| !LOCAL_KEYS.contains(key)) {
        return Err(other.refuse(format!(
            "this device has a volume of its own, and {key} is about one at a target; allowed: \
             one of the two"
        )));
    }
    let spec: VolumeSpec = setting.text.parse().map_err(|e| setting.refuse(format!("{e}")))?;
    if !spec.is_ephemeral() {
        return Err(setting.refuse(
            "a device's own volume is for measuring and trying; allowed: ram:SIZE or null:SIZE, and \
             `penstock target` for files and block devices",
        ));
    }
    Ok(spec)
}

/// How a device proves itself. What the files and the data directory hold is looked at by who opens
/// them; that nothing can be there is said here.
fn credentials(draft: &DeviceDraft, has_data: bool) -> Result<CredentialsConfig, ConfigError> {
    let file = |key: &'static str| match draft.keys.get(key) {
        Some(setting) if setting.text.is_empty() => {
            Err(setting.refuse("is empty; allowed: the path of a file that nobody else can read"))
        }
        Some(setting) => Ok(Some(PathBuf::from(&setting.text))),
        None => Ok(None),
    };
    let (psk, dhchap) = (file("psk")?, file("dhchap")?);
    let dhchap_ctrl = file("dhchap_ctrl")?;
    let setting = draft.keys.get("tls");
    let tls = match setting.map(|setting| setting.text.as_str()) {
        None | Some("required") => TlsSetting::Required,
        Some("concat") => TlsSetting::Concat,
        Some("off") => TlsSetting::Off,
        Some(_) => {
            let setting = setting.unwrap_or(&draft.name);
            return Err(setting.refuse("allowed: required, concat or off"));
        }
    };
    if let (Some(psk), TlsSetting::Off | TlsSetting::Concat) = (draft.keys.get("psk"), tls) {
        return Err(psk.refuse("is not used with tls=off or tls=concat; leave one of them out"));
    }
    if let (Some(ctrl), None, false) = (draft.keys.get("dhchap_ctrl"), &dhchap, has_data) {
        return Err(ctrl.refuse(
            "a controller proves itself to a host that does; add dhchap=FILE with the host's secret",
        ));
    }
    match tls {
        TlsSetting::Required if psk.is_none() && !has_data => Err(draft.name.refuse(
            "this device has no key for TLS to its target; add psk=FILE, a file that nobody else can \
             read with the key that the target has for this host (`penstock key export --emulator` \
             there prints it), or tls=off to connect in plaintext",
        )),
        TlsSetting::Concat if dhchap.is_none() && !has_data => {
            Err(setting.unwrap_or(&draft.name).refuse(
                "takes the key for TLS from an authentication; add dhchap=FILE with the host's secret",
            ))
        }
        _ => Ok(CredentialsConfig { tls, psk, dhchap, dhchap_ctrl }),
    }
}

/// An address to connect to.
fn far_address(setting: &Setting, text: &str, example: &str) -> Result<SocketAddr, ConfigError> {
    let addr = address(setting, text)?;
    if addr.port() == 0 || addr.ip().is_unspecified() {
        return Err(
            setting.refuse(format!("is no address to connect to; allowed: ADDR:PORT of {example}"))
        );
    }
    Ok(addr)
}

/// The ways to the target, `192.0.2.7:4420+192.0.2.8:4420@1`: behind the `@` is the NUMA node of the
/// network interface.
fn ways(setting: &Setting) -> Result<Vec<PathConfig>, ConfigError> {
    let mut ways: Vec<PathConfig> = Vec::new();
    for text in setting.text.split('+') {
        let (text, node) = match text.split_once('@') {
            Some((text, node)) => match node.parse::<u16>() {
                Ok(node) => (text, Some(node.into())),
                Err(_) => {
                    return Err(setting.refuse(format!(
                        "names {node:?} as a NUMA node; allowed: ADDR:PORT@0 to ADDR:PORT@65535"
                    )));
                }
            },
            None => (text, None),
        };
        let addr = far_address(setting, text, "a target, such as 192.0.2.7:4420")?;
        if ways.iter().any(|way| way.addr == addr) {
            return Err(setting.refuse(format!("names {addr} twice; allowed: each address once")));
        }
        ways.push(PathConfig { addr, node });
    }
    if ways.len() > WAYS_MAX {
        return Err(setting.refuse(format!("allowed: at most {WAYS_MAX} addresses")));
    }
    Ok(ways)
}

/// The discovery controllers.
fn controllers(setting: &Setting) -> Result<Vec<SocketAddr>, ConfigError> {
    let mut addrs = Vec::new();
    for text in setting.text.split('+') {
        let example = "a discovery controller, such as 192.0.2.7:8009";
        let addr = far_address(setting, text, example)?;
        if addrs.contains(&addr) {
            return Err(setting.refuse(format!("names {addr} twice; allowed: each address once")));
        }
        addrs.push(addr);
    }
    if addrs.len() > CONTROLLERS_MAX {
        return Err(setting.refuse(format!("allowed: at most {CONTROLLERS_MAX} addresses")));
    }
    Ok(addrs)
}

/// TCP ports, `4420+8009`.
fn tcp_ports(setting: &Setting) -> Result<BTreeSet<u16>, ConfigError> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let ports: Option<BTreeSet<u16>> = setting.text.split('+').map(port).collect();
    match ports {
        Some(ports) if ports.len() <= PORTS_MAX => Ok(ports),
        Some(_) => Err(setting.refuse(format!("allowed: at most {PORTS_MAX} ports"))),
        None => Err(setting.refuse("allowed: TCP ports such as 4420+8009")),
    }
}

/// The namespaces, `1` or `1+2`; none for `all`. Those of an NVMe device keep their identifiers.
fn nsids(setting: &Setting, kind: DeviceKind) -> Result<Vec<u32>, ConfigError> {
    if setting.text == "all" {
        return match kind {
            DeviceKind::Nvme => Ok(Vec::new()),
            DeviceKind::VirtioBlk => {
                Err(setting.refuse("a virtio-blk device is one disk; allowed: one namespace"))
            }
        };
    }
    let mut nsids = Vec::new();
    for text in setting.text.split('+') {
        let one = Setting { text: text.to_owned(), place: setting.place.clone() };
        let nsid = number(&one, 1..=u64::from(u32::MAX) - 1)? as u32;
        if nsids.contains(&nsid) {
            return Err(setting.refuse(format!("names {nsid} twice")));
        }
        nsids.push(nsid);
    }
    match kind {
        DeviceKind::VirtioBlk if nsids.len() > 1 => {
            Err(setting.refuse("a virtio-blk device is one disk; allowed: one namespace"))
        }
        DeviceKind::Nvme if nsids.iter().any(|nsid| *nsid > nvme_pci::NAMESPACES_MAX) => {
            Err(setting.refuse(format!(
                "an NVMe device shows namespaces by the IDs they have; allowed: 1 to {}",
                nvme_pci::NAMESPACES_MAX
            )))
        }
        _ if nsids.len() > WAYS_MAX => {
            Err(setting.refuse(format!("allowed: at most {WAYS_MAX} namespaces")))
        }
        _ => Ok(nsids),
    }
}

/// Who the device is to the target, if it is somebody of its own.
fn host(draft: &DeviceDraft) -> Result<Option<HostIdentity>, ConfigError> {
    let (hostnqn, hostid) = (draft.keys.get("hostnqn"), draft.keys.get("hostid"));
    let Some(hostnqn) = hostnqn else {
        return match hostid {
            Some(setting) => Err(setting.refuse("belongs to a host NQN; add hostnqn=NQN")),
            None => Ok(None),
        };
    };
    let nqn = own_nqn(hostnqn)?;
    let id = match hostid {
        Some(setting) => {
            Uuid::try_parse(&setting.text).ok().filter(|id| !id.is_nil()).ok_or_else(|| {
                setting.refuse("allowed: a UUID that is not zero, such as the one in hostnqn")
            })?
        }
        // What the NQN form made of a UUID says itself.
        None => nqn
            .as_str()
            .strip_prefix(UUID_NQN)
            .and_then(|text| Uuid::try_parse(text).ok())
            .filter(|id| !id.is_nil())
            .ok_or_else(|| {
                hostnqn.refuse("holds no UUID to identify the host by; add hostid=UUID")
            })?,
    };
    Ok(Some(HostIdentity { nqn, id: *id.as_bytes() }))
}

pub(super) fn address(setting: &Setting, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| {
        let shown = if text == setting.text { String::new() } else { format!("in it, {text:?} ") };
        setting.refuse(format!(
            "{shown}is no ADDR:PORT; allowed: an IP address and a port, such as 127.0.0.1:4420 or \
             [::1]:4420"
        ))
    })
}

pub(super) fn name(setting: &Setting) -> Result<String, ConfigError> {
    let text = &setting.text;
    if is_name(text) {
        Ok(text.clone())
    } else {
        Err(setting.refuse(format!("is no name; {NAME_ALLOWED}")))
    }
}

/// Whether `text` may name a volume, subsystem or device.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !text.starts_with(['.', '-'])
}

/// An NQN that a caller of the management API gives, which is not the discovery subsystem's.
pub(crate) fn parse_nqn(key: &'static str, text: &str) -> Result<Nqn, ConfigError> {
    own_nqn(&Setting::flag(key, text))
}

pub(super) fn nqn(setting: &Setting) -> Result<Nqn, ConfigError> {
    setting.text.parse().map_err(|problem| setting.refuse(format!("{problem}")))
}

/// The NQN of a subsystem with volumes.
pub(super) fn own_nqn(setting: &Setting) -> Result<Nqn, ConfigError> {
    let nqn = nqn(setting)?;
    if nqn.is_discovery() {
        return Err(setting.refuse(
            "is the discovery subsystem's; allowed: an NQN of your own, such as \
             nqn.2014-08.com.example:disks",
        ));
    }
    Ok(nqn)
}

fn optional(
    setting: &Option<Setting>,
    allowed: std::ops::RangeInclusive<u64>,
) -> Result<Option<u16>, ConfigError> {
    setting.as_ref().map(|setting| number(setting, allowed).map(|value| value as u16)).transpose()
}

pub(super) fn number(
    setting: &Setting,
    allowed: std::ops::RangeInclusive<u64>,
) -> Result<u64, ConfigError> {
    match setting.text.parse::<u64>() {
        Ok(value) if allowed.contains(&value) => Ok(value),
        _ => {
            let (low, high) = allowed.into_inner();
            Err(setting.refuse(format!("allowed: a whole number from {low} to {high}")))
        }
    }
}
