//! What `state.toml` looks like: version 2, and version 1 as it was.

use std::path::Path;

use nvme::spec::Nqn;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::StateError;
use crate::config::DEFAULT_SUBSYSTEM;

/// The version written. Older ones are read, a later one is refused, not guessed at.
const VERSION: u32 = 2;

/// All that is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stored {
    pub(crate) version: u32,
    /// Unique NQN of the discovery subsystem.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "nqn_option")]
    pub(crate) discovery_nqn: Option<Nqn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<StoredHost>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) power: Option<StoredPower>,
    /// Referrals, where they were changed at run time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) referrals: Option<Change<Vec<StoredReferral>>>,
    #[serde(default, rename = "subsystem", skip_serializing_if = "Vec::is_empty")]
    pub(crate) subsystems: Vec<StoredSubsystem>,
    #[serde(default, rename = "volume", skip_serializing_if = "Vec::is_empty")]
    pub(crate) volumes: Vec<StoredVolume>,
    #[serde(default, rename = "port", skip_serializing_if = "Vec::is_empty")]
    pub(crate) ports: Vec<StoredPort>,
    /// ANA states changed at run time.
    #[serde(default, rename = "ana", skip_serializing_if = "Vec::is_empty")]
    pub(crate) ana: Vec<StoredAna>,
    /// The last table: a file cut off anywhere lacks it.
    end: End,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {}

/// A value changed at run time: it holds as long as the configuration says what it said then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Change<T> {
    pub(crate) to: T,
    /// What the configuration said.
    pub(crate) from: T,
}

impl<T: PartialEq + Clone> Change<T> {
    /// The value in force where the configuration says `configured`; forgets a change that the
    /// configuration has overtaken. The second value tells whether that happened.
    pub(crate) fn resolve(change: &mut Option<Change<T>>, configured: &T) -> (T, bool) {
        match change {
            Some(found) if found.from == *configured => (found.to.clone(), false),
            Some(_) => {
                *change = None;
                (configured.clone(), true)
            }
            None => (configured.clone(), false),
        }
    }

    /// Sets a value. Going back to what the configuration says is no change any more.
    pub(crate) fn set(change: &mut Option<Change<T>>, to: T, configured: &T) {
        *change = (to != *configured).then(|| Change { to, from: configured.clone() });
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredHost {
    #[serde(with = "nqn_text")]
    pub(crate) nqn: Nqn,
    pub(crate) id: Uuid,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredPower {
    /// Starts.
    pub(crate) cycles: u64,
    /// Time in service, in seconds.
    pub(crate) on_s: u64,
    /// Starts after which there was no orderly stop.
    pub(crate) unsafe_shutdowns: u64,
    /// There was a start and no orderly stop since.
    pub(crate) running: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredReferral {
    pub(crate) addr: String,
    pub(crate) nqn: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredSubsystem {
    pub(crate) name: String,
    #[serde(with = "nqn_text")]
    pub(crate) nqn: Nqn,
    pub(crate) serial: String,
    /// Made at run time.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) runtime: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hosts: Option<Change<Hosts>>,
}

/// A list of host NQNs, or every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Hosts {
    /// `true`: every host.
    Every(bool),
    /// These.
    These(Vec<String>),
}

impl Hosts {
    pub(crate) fn of(hosts: Option<&[Nqn]>) -> Hosts {
        match hosts {
            None => Hosts::Every(true),
            Some(hosts) => Hosts::These(hosts.iter().map(Nqn::to_string).collect()),
        }
    }

    /// `None`: what is stored is no list of NQNs.
    pub(crate) fn nqns(&self) -> Option<Option<Vec<Nqn>>> {
        match self {
            Hosts::Every(true) => Some(None),
            Hosts::Every(false) => None,
            Hosts::These(hosts) => {
                hosts.iter().map(|host| Nqn::new(host).ok()).collect::<Option<Vec<_>>>().map(Some)
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredVolume {
    pub(crate) name: String,
    #[serde(default = "default_subsystem", skip_serializing_if = "is_default_subsystem")]
    pub(crate) subsystem: String,
    pub(crate) nsid: u32,
    pub(crate) uuid: Uuid,
    pub(crate) nguid: Uuid,
    pub(crate) serial: String,
    /// Attached at run time: what is behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attached: Option<String>,
    /// Detached at run time, and what the configuration said was behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) detached: Option<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) write_protect: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ana_group: Option<Change<u32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hosts: Option<Change<Hosts>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredPort {
    pub(crate) id: u16,
    /// `io` or `discovery`, and the address as configured.
    pub(crate) listener: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredAna {
    pub(crate) subsystem: String,
    pub(crate) port: u16,
    pub(crate) group: u32,
    pub(crate) to: String,
    /// What the configuration said.
    pub(crate) from: String,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn default_subsystem() -> String {
    DEFAULT_SUBSYSTEM.to_owned()
}

fn is_default_subsystem(name: &String) -> bool {
    name == DEFAULT_SUBSYSTEM
}

/// An NQN is stored as its text, and checked when it is read.
mod nqn_text {
    use nvme::spec::Nqn;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(nqn: &Nqn, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(nqn.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Nqn, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

mod nqn_option {
    use nvme::spec::Nqn;
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(nqn: &Option<Nqn>, to: S) -> Result<S::Ok, S::Error> {
        match nqn {
            Some(nqn) => super::nqn_text::serialize(nqn, to),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Nqn>, D::Error> {
        super::nqn_text::deserialize(from).map(Some)
    }
}

/// Version 1: one subsystem, and volumes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredV1 {
    #[serde(rename = "version")]
    _version: u32,
    volume_count: usize,
    subsystem: Option<SubsystemV1>,
    host: Option<StoredHost>,
    #[serde(default, rename = "volume")]
    volumes: Vec<VolumeV1>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SubsystemV1 {
    #[serde(with = "nqn_text")]
    nqn: Nqn,
    serial: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VolumeV1 {
    name: String,
    nsid: u32,
    uuid: Uuid,
    nguid: Uuid,
    serial: String,
}

impl Stored {
    pub(crate) fn new() -> Stored {
        Stored {
            version: VERSION,
            discovery_nqn: None,
            host: None,
            power: None,
            referrals: None,
            subsystems: Vec::new(),
            volumes: Vec::new(),
            ports: Vec::new(),
            ana: Vec::new(),
            end: End {},
        }
    }
}

impl From<StoredV1> for Stored {
    fn from(old: StoredV1) -> Stored {
        let subsystem = old.subsystem.map(|old| StoredSubsystem {
            name: default_subsystem(),
            nqn: old.nqn,
            serial: old.serial,
            runtime: false,
            hosts: None,
        });
        let volumes = old.volumes.into_iter().map(|old| StoredVolume {
            name: old.name,
            subsystem: default_subsystem(),
            nsid: old.nsid,
            uuid: old.uuid,
            nguid: old.nguid,
            serial: old.serial,
            attached: None,
            detached: None,
            write_protect: false,
            ana_group: None,
            hosts: None,
        });
        Stored {
            host: old.host,
            subsystems: subsystem.into_iter().collect(),
            volumes: volumes.collect(),
            ..Stored::new()
        }
    }
}

/// Reads a file of any known version.
pub(super) fn parse(path: &Path, text: &str) -> Result<Stored, StateError> {
    let damaged = |problem: String| StateError::Damaged { path: path.to_owned(), problem };
    if text.trim().is_empty() {
        return Err(damaged("the file is empty".to_owned()));
    }

    // The version is looked at first: a newer file should say so, not complain about a key.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let describe = |error: toml::de::Error| {
        let line = error
            .span()
            .map(|span| text.as_bytes()[..span.start.min(text.len())].iter())
            .map(|bytes| bytes.filter(|byte| **byte == b'\n').count() + 1)
            .unwrap_or(1);
        damaged(format!("line {line}: {}", error.message().replace('\n', ", ")))
    };
    let Version { version } = toml::from_str(text).map_err(describe)?;
    let stored: Stored = match version {
        1 => {
            let old: StoredV1 = toml::from_str(text).map_err(describe)?;
            if old.volume_count != old.volumes.len() {
                return Err(damaged(format!(
                    "it says it holds {} volumes and holds {}: it was cut off or edited",
                    old.volume_count,
                    old.volumes.len()
                )));
            }
            old.into()
        }
        VERSION => toml::from_str(text).map_err(describe)?,
        _ => {
            return Err(damaged(format!(
                "written in format {version}, this penstock knows formats 1 to {VERSION} only"
            )));
        }
    };
    check(&stored).map_err(damaged)?;
    Ok(stored)
}

fn check(stored: &Stored) -> Result<(), String> {
    for (index, subsystem) in stored.subsystems.iter().enumerate() {
        if serial_bytes(&subsystem.serial).is_none() {
            return Err(format!(
                "subsystem {:?} has the serial number {:?}, which is not 1 to 20 ASCII characters",
                subsystem.name, subsystem.serial
            ));
        }
        let others = &stored.subsystems[..index];
        if let Some(twin) =
            others.iter().find(|other| other.name == subsystem.name || other.nqn == subsystem.nqn)
        {
            return Err(format!(
                "subsystems {:?} ({}) and {:?} ({}) share a name or NQN",
                twin.name, twin.nqn, subsystem.name, subsystem.nqn
            ));
        }
        check_hosts(&subsystem.hosts, "subsystem", &subsystem.name)?;
    }
    for (index, volume) in stored.volumes.iter().enumerate() {
        let others = &stored.volumes[..index];
        if volume.nsid == 0 || volume.nsid == u32::MAX {
            return Err(format!("volume {:?} has namespace ID {}", volume.name, volume.nsid));
        }
        if serial_bytes(&volume.serial).is_none() {
            return Err(format!(
                "volume {:?} has the serial number {:?}, which is not 1 to 20 ASCII characters",
                volume.name, volume.serial
            ));
        }
        let twin = others.iter().find(|other| {
            other.name == volume.name
                || (other.nsid == volume.nsid && other.subsystem == volume.subsystem)
                || other.uuid == volume.uuid
        });
        if let Some(twin) = twin {
            return Err(format!(
                "volumes {:?} (namespace {}) and {:?} (namespace {}) share a name, namespace ID \
                 or UUID",
                twin.name, twin.nsid, volume.name, volume.nsid
            ));
        }
        if volume.attached.is_some() && volume.detached.is_some() {
            return Err(format!("volume {:?} is both attached and detached", volume.name));
        }
        check_hosts(&volume.hosts, "volume", &volume.name)?;
    }
    for (index, port) in stored.ports.iter().enumerate() {
        let others = &stored.ports[..index];
        if port.id == 0
            || others.iter().any(|other| other.id == port.id || other.listener == port.listener)
        {
            return Err(format!("port {} ({}) is 0 or there twice", port.id, port.listener));
        }
    }
    Ok(())
}

fn check_hosts(change: &Option<Change<Hosts>>, what: &str, name: &str) -> Result<(), String> {
    let Some(change) = change else { return Ok(()) };
    // A list that cannot be read must not turn into "every host".
    match (change.to.nqns(), change.from.nqns()) {
        (Some(_), Some(_)) => Ok(()),
        _ => Err(format!("the hosts of {what} {name:?} are no list of NQNs")),
    }
}

/// A serial number as text.
pub(super) fn serial_text(serial: &[u8; 20]) -> String {
    String::from_utf8_lossy(serial).trim_end().to_owned()
}

/// A serial number from its text, if it is one.
pub(super) fn serial_bytes(text: &str) -> Option<[u8; 20]> {
    let good = (1..=20).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b));
    let mut serial = [b' '; 20];
    good.then(|| serial[..text.len()].copy_from_slice(text.as_bytes()))?;
    Some(serial)
}
