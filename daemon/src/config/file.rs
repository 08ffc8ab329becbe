//! The configuration file: TOML in, [`Draft`] out.
//!
//! Serde checks the shape (unknown keys, types); values stay text with their line until
//! [`Draft::check`] judges them together with the flags.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;

use super::{
    AnaDraft, ConfigError, DeviceDraft, Draft, Place, ReferralDraft, Setting, SubsystemDraft,
    VolumeDraft,
};

/// Larger files are refused: a configuration is written by people.
const FILE_BYTES_MAX: u64 = 4 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    data: Option<RawData>,
    target: Option<RawTarget>,
    emulator: Option<RawEmulator>,
    api: Option<RawApi>,
    discovery: Option<RawDiscovery>,
    limits: Option<RawLimits>,
    auth: Option<RawAuth>,
    #[serde(default)]
    subsystem: Vec<Spanned<RawSubsystem>>,
    #[serde(default)]
    ana: Vec<Spanned<RawAna>>,
    #[serde(default)]
    referral: Vec<Spanned<RawReferral>>,
    #[serde(default)]
    volume: Vec<Spanned<RawVolume>>,
    #[serde(default)]
    device: Vec<Spanned<RawDevice>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawData {
    dir: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTarget {
    #[serde(default)]
    listen: Vec<Spanned<String>>,
    #[serde(default)]
    discovery: Vec<Spanned<String>>,
    subnqn: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
    cores: Option<Spanned<i64>>,
    busy_poll_us: Option<Spanned<i64>>,
    queue_entries_max: Option<Spanned<i64>>,
    io_queues_max: Option<Spanned<i64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEmulator {
    cores: Option<Spanned<i64>>,
    busy_poll_us: Option<Spanned<i64>>,
    containment: Option<Spanned<String>>,
    supervise: Option<Spanned<String>>,
    user: Option<Spanned<String>>,
    api: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawApi {
    socket: Option<Spanned<String>>,
    listen: Option<Spanned<String>>,
    cert: Option<Spanned<String>>,
    key: Option<Spanned<String>>,
    client_ca: Option<Spanned<String>>,
    client_crl: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDiscovery {
    nqn: Option<Spanned<String>>,
    #[serde(default)]
    mdns: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAuth {
    #[serde(default)]
    hashes: Vec<Spanned<String>>,
    #[serde(default)]
    groups: Vec<Spanned<String>>,
}

/// Each bound of the target has a key of its name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    connections: Option<Spanned<i64>>,
    connections_per_host: Option<Spanned<i64>>,
    handshakes_per_peer: Option<Spanned<i64>>,
    admin_commands_per_second: Option<Spanned<i64>>,
    controllers: Option<Spanned<i64>>,
    controllers_per_host: Option<Spanned<i64>>,
    namespaces_max: Option<Spanned<i64>>,
    in_capsule_bytes: Option<Spanned<i64>>,
    transfer_bytes: Option<Spanned<i64>>,
    kato_max_s: Option<Spanned<i64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSubsystem {
    name: Spanned<String>,
    nqn: Option<Spanned<String>>,
    hosts: Option<Vec<Spanned<String>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAna {
    port: Option<Spanned<i64>>,
    group: Spanned<i64>,
    state: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReferral {
    addr: Spanned<String>,
    nqn: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolume {
    name: Spanned<String>,
    spec: Spanned<String>,
    nsid: Option<Spanned<i64>>,
    subsystem: Option<Spanned<String>>,
    ana_group: Option<Spanned<i64>>,
    hosts: Option<Vec<Spanned<String>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDevice {
    name: Spanned<String>,
    r#type: Option<Spanned<String>>,
    socket: Option<Spanned<String>>,
    connect: Option<Spanned<String>>,
    discover: Option<Spanned<String>>,
    discover_tls: Option<Spanned<String>>,
    ports: Option<Spanned<NumberOrList>>,
    subnqn: Option<Spanned<String>>,
    nsid: Option<Spanned<NumberOrList>>,
    queues: Option<Spanned<i64>>,
    read_only: Option<Spanned<bool>>,
    doorbells: Option<Spanned<String>>,
    hostnqn: Option<Spanned<String>>,
    hostid: Option<Spanned<String>>,
    ctrl_loss_tmo: Option<Spanned<String>>,
    iopolicy: Option<Spanned<String>>,
    volume: Option<Spanned<String>>,
    tls: Option<Spanned<String>>,
    psk: Option<Spanned<String>>,
    dhchap: Option<Spanned<String>>,
    dhchap_ctrl: Option<Spanned<String>>,
}

/// One number, or several as in the flag: `"1+2"`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or numbers such as \"1+2\"")]
enum NumberOrList {
    Number(i64),
    List(String),
}

impl std::fmt::Display for NumberOrList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NumberOrList::Number(number) => write!(f, "{number}"),
            NumberOrList::List(text) => f.write_str(text),
        }
    }
}

/// Turns byte ranges of the file into places.
struct Source<'a> {
    path: Arc<Path>,
    text: &'a str,
}

impl Source<'_> {
    fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or(self.text.as_bytes());
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn setting<T: ToString>(&self, key: &str, value: &Spanned<T>) -> Setting {
        Setting {
            text: value.get_ref().to_string(),
            place: Place::File {
                path: self.path.clone(),
                line: self.line(&value.span()),
                key: key.to_owned(),
            },
        }
    }

    fn list(&self, key: &str, values: &Option<Vec<Spanned<String>>>) -> Option<Vec<Setting>> {
        let values = values.as_ref()?;
        Some(values.iter().map(|value| self.setting(key, value)).collect())
    }

    fn optional<T: ToString>(&self, key: &str, value: &Option<Spanned<T>>) -> Option<Setting> {
        value.as_ref().map(|value| self.setting(key, value))
    }
}

pub(super) fn read(path: &Path) -> Result<Draft, ConfigError> {
    let unreadable = |problem: String| ConfigError::Unreadable { path: path.to_owned(), problem };
    let size = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(unreadable(format!("{size} bytes; allowed: at most {FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    parse(path, &text)
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Draft, ConfigError> {
    let source = Source { path: Arc::from(path), text };
    let raw: RawFile = toml::from_str(text).map_err(|error| shape_error(&source, &error))?;

    let mut draft = Draft {
        data_dir: raw.data.map(|data| source.setting("data.dir", &data.dir)),
        ..Draft::default()
    };
    if let Some(emulator) = raw.emulator {
        draft.emulator_cores = source.optional("emulator.cores", &emulator.cores);
        draft.emulator_busy_poll_us =
            source.optional("emulator.busy_poll_us", &emulator.busy_poll_us);
        draft.containment = source.optional("emulator.containment", &emulator.containment);
        draft.emulator_user = source.optional("emulator.user", &emulator.user);
        draft.supervise = source.optional("emulator.supervise", &emulator.supervise);
        draft.emulator_api = source.optional("emulator.api", &emulator.api);
    }
    if let Some(target) = raw.target {
        draft.has_target = true;
        draft.listen =
            target.listen.iter().map(|text| source.setting("target.listen", text)).collect();
        draft.discovery =
            target.discovery.iter().map(|text| source.setting("target.discovery", text)).collect();
        draft.subnqn = source.optional("target.subnqn", &target.subnqn);
        draft.user = source.optional("target.user", &target.user);
        draft.cores = source.optional("target.cores", &target.cores);
        draft.busy_poll_us = source.optional("target.busy_poll_us", &target.busy_poll_us);
        draft.queue_entries_max =
            source.optional("target.queue_entries_max", &target.queue_entries_max);
        draft.io_queues_max = source.optional("target.io_queues_max", &target.io_queues_max);
    }
    if let Some(api) = raw.api {
        draft.api = source.optional("api.socket", &api.socket);
        draft.api_listen = source.optional("api.listen", &api.listen);
        draft.api_cert = source.optional("api.cert", &api.cert);
        draft.api_key = source.optional("api.key", &api.key);
        draft.api_client_ca = source.optional("api.client_ca", &api.client_ca);
        draft.api_client_crl = source.optional("api.client_crl", &api.client_crl);
    }
    if let Some(discovery) = raw.discovery {
        draft.discovery_nqn = source.optional("discovery.nqn", &discovery.nqn);
        draft.mdns = discovery.mdns;
    }
    if let Some(auth) = raw.auth {
        let settings = |key: &str, values: &[Spanned<String>]| -> Vec<Setting> {
            values.iter().map(|value| source.setting(key, value)).collect()
        };
        draft.auth_hashes = settings("auth.hashes", &auth.hashes);
        draft.auth_groups = settings("auth.groups", &auth.groups);
    }
    if let Some(limits) = raw.limits {
        for (key, value) in [
            ("connections", &limits.connections),
            ("connections_per_host", &limits.connections_per_host),
            ("handshakes_per_peer", &limits.handshakes_per_peer),
            ("admin_commands_per_second", &limits.admin_commands_per_second),
            ("controllers", &limits.controllers),
            ("controllers_per_host", &limits.controllers_per_host),
            ("namespaces_max", &limits.namespaces_max),
            ("in_capsule_bytes", &limits.in_capsule_bytes),
            ("transfer_bytes", &limits.transfer_bytes),
            ("kato_max_s", &limits.kato_max_s),
        ] {
            if let Some(setting) = source.optional(&format!("limits.{key}"), value) {
                draft.limits.insert(key.to_owned(), setting);
            }
        }
    }
    for subsystem in raw.subsystem {
        let subsystem = subsystem.into_inner();
        draft.subsystems.push(SubsystemDraft {
            name: source.setting("subsystem.name", &subsystem.name),
            nqn: source.optional("subsystem.nqn", &subsystem.nqn),
            hosts: source.list("subsystem.hosts", &subsystem.hosts),
        });
    }
    for ana in raw.ana {
        let ana = ana.into_inner();
        draft.ana.push(AnaDraft {
            port: source.optional("ana.port", &ana.port),
            group: source.setting("ana.group", &ana.group),
            state: source.setting("ana.state", &ana.state),
        });
    }
    for referral in raw.referral {
        let referral = referral.into_inner();
        draft.referrals.push(ReferralDraft {
            addr: source.setting("referral.addr", &referral.addr),
            nqn: source.optional("referral.nqn", &referral.nqn),
        });
    }
    for volume in raw.volume {
        let volume = volume.into_inner();
        draft.volumes.push(VolumeDraft {
            name: source.setting("volume.name", &volume.name),
            spec: source.setting("volume.spec", &volume.spec),
            nsid: source.optional("volume.nsid", &volume.nsid),
            subsystem: source.optional("volume.subsystem", &volume.subsystem),
            ana_group: source.optional("volume.ana_group", &volume.ana_group),
            hosts: source.list("volume.hosts", &volume.hosts),
        });
    }
    for device in raw.device {
        let device = device.into_inner();
        let mut keys = BTreeMap::new();
        let mut add = |key: &'static str, setting: Option<Setting>| {
            if let Some(setting) = setting {
                keys.insert(key, setting);
            }
        };
        add("type", source.optional("device.type", &device.r#type));
        add("socket", source.optional("device.socket", &device.socket));
        add("connect", source.optional("device.connect", &device.connect));
        add("discover", source.optional("device.discover", &device.discover));
        add("discover_tls", source.optional("device.discover_tls", &device.discover_tls));
        add("ports", source.optional("device.ports", &device.ports));
        add("subnqn", source.optional("device.subnqn", &device.subnqn));
        add("nsid", source.optional("device.nsid", &device.nsid));
        add("queues", source.optional("device.queues", &device.queues));
        add("read_only", source.optional("device.read_only", &device.read_only));
        add("doorbells", source.optional("device.doorbells", &device.doorbells));
        add("iopolicy", source.optional("device.iopolicy", &device.iopolicy));
        add("volume", source.optional("device.volume", &device.volume));
        add("hostnqn", source.optional("device.hostnqn", &device.hostnqn));
        add("hostid", source.optional("device.hostid", &device.hostid));
        add("ctrl_loss_tmo", source.optional("device.ctrl_loss_tmo", &device.ctrl_loss_tmo));
        add("tls", source.optional("device.tls", &device.tls));
        add("psk", source.optional("device.psk", &device.psk));
        add("dhchap", source.optional("device.dhchap", &device.dhchap));
        add("dhchap_ctrl", source.optional("device.dhchap_ctrl", &device.dhchap_ctrl));
        draft.devices.push(DeviceDraft { name: source.setting("device.name", &device.name), keys });
    }
    Ok(draft)
}

/// One line from the parser's error: the line of the file it is about, and what was expected.
fn shape_error(source: &Source<'_>, error: &toml::de::Error) -> ConfigError {
    let span = error.span().unwrap_or(0..0);
    let line = source.line(&span);
    let shown = source.text.lines().nth(line - 1).unwrap_or("").trim();
    let message = error.message().replace('\n', ", ");
    let problem = if shown.is_empty() { message } else { format!("in `{shown}`: {message}") };
    ConfigError::Shape { path: source.path.to_path_buf(), line, problem }
}
