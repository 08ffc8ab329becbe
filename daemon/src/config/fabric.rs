//! Checks of what hosts see of the target besides volumes: ports, subsystems, ANA, referrals, limits.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crypto::Hash;
use crypto::dhchap::DhGroup;
use nvme::spec::Nqn;
use nvmf_target::{AuthDemand, AuthPolicy, Tls};

use super::check::{address, name, nqn, number, own_nqn};
use super::{AnaDraft, ConfigError, Listen, ReferralDraft, Setting, SubsystemDraft, VolumeConfig};

/// Name of the subsystem that volumes are in where nothing else is said.
pub(crate) const DEFAULT_SUBSYSTEM: &str = "default";

/// Subsystems of one target; each has a line per port in the discovery log.
pub(crate) const SUBSYSTEMS_MAX: usize = 1024;
/// ANA groups (ANAGRPMAX).
pub(crate) const ANA_GROUP_MAX: u64 = 128;
/// Host NQNs of one list.
pub(crate) const HOSTS_MAX: usize = 1024;
/// Listeners and referrals of one target.
pub(super) const PORTS_MAX: usize = 64;

const ANA_STATES: [(&str, AnaSetting); 5] = [
    ("optimized", AnaSetting::Optimized),
    ("non-optimized", AnaSetting::NonOptimized),
    ("inaccessible", AnaSetting::Inaccessible),
    ("persistent-loss", AnaSetting::PersistentLoss),
    ("change", AnaSetting::Change),
];

/// A subsystem to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsystemConfig {
    /// Unique name; identities are kept or derived by it.
    pub name: String,
    /// NQN, if the operator chose one.
    pub nqn: Option<Nqn>,
    /// Hosts that may connect; `None`: every host.
    pub hosts: Option<Vec<Nqn>>,
}

/// State of an ANA group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnaSetting {
    /// Served, the best way.
    Optimized,
    /// Served, there may be a better way.
    NonOptimized,
    /// Not served for now.
    Inaccessible,
    /// Not served any more.
    PersistentLoss,
    /// About to change.
    Change,
}

impl AnaSetting {
    /// From its name.
    pub fn from_name(text: &str) -> Option<AnaSetting> {
        ANA_STATES.iter().find(|(name, _)| *name == text).map(|(_, state)| *state)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        ANA_STATES.iter().find(|(_, state)| *state == self).map_or("", |(name, _)| name)
    }
}

/// The state of an ANA group at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnaConfig {
    /// Port ID of an I/O listener; `None`: each of them.
    pub port: Option<u16>,
    /// The group.
    pub group: u32,
    /// Its state.
    pub state: AnaSetting,
}

/// Another discovery controller that hosts are sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferralConfig {
    /// Where it is.
    pub addr: SocketAddr,
    /// Its NQN.
    pub nqn: Nqn,
}

/// Bounds where the operator chose some; the target has a default for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Connections (queues) of all hosts together.
    pub connections: Option<u32>,
    /// Connections (queues) of one host.
    pub connections_per_host: Option<u32>,
    /// Connections of one address that have not come to a Connect command yet.
    pub handshakes_per_peer: Option<u32>,
    /// Controllers of all hosts together.
    pub controllers: Option<u32>,
    /// Controllers of one host.
    pub controllers_per_host: Option<u32>,
    /// Admin commands that one host may send in a second on average.
    pub admin_commands_per_second: Option<u32>,
    /// Namespaces of one subsystem, and the largest namespace ID.
    pub namespaces_max: Option<u32>,
    /// Write payload taken along with a command, in bytes.
    pub in_capsule_bytes: Option<u32>,
    /// Largest transfer of one command, in bytes.
    pub transfer_bytes: Option<u32>,
    /// Longest keep alive timeout a host may ask for, in seconds.
    pub kato_max_s: Option<u32>,
}

/// A test and what it asks for.
type Also = (fn(u64) -> bool, &'static str);

struct LimitRule {
    key: &'static str,
    min: u64,
    max: u64,
    /// What else the value has to be.
    also: Option<Also>,
}

/// Every bound has a bound: connections take a descriptor and two ring entries each, controllers a
/// 16-bit ID, and what is in flight takes memory.
const LIMITS: [LimitRule; 10] = [
    LimitRule { key: "connections", min: 2, max: 16_384, also: None },
    LimitRule { key: "connections_per_host", min: 2, max: 16_384, also: None },
    LimitRule { key: "handshakes_per_peer", min: 1, max: 16_384, also: None },
    LimitRule { key: "admin_commands_per_second", min: 10, max: 1_000_000, also: None },
    LimitRule { key: "controllers", min: 1, max: 65_519, also: None },
    LimitRule { key: "controllers_per_host", min: 1, max: 65_519, also: None },
    LimitRule { key: "namespaces_max", min: 1, max: 65_536, also: None },
    LimitRule {
        key: "in_capsule_bytes",
        min: 0,
        max: 256 << 10,
        also: Some((|value| value.is_multiple_of(16), "a multiple of 16")),
    },
    LimitRule {
        key: "transfer_bytes",
        min: 4096,
        max: 32 << 20,
        also: Some((u64::is_power_of_two, "a power of two")),
    },
    LimitRule { key: "kato_max_s", min: 1, max: 86_400, also: None },
];

pub(super) fn is_limit(key: &str) -> bool {
    LIMITS.iter().any(|rule| rule.key == key)
}

pub(super) fn limit_keys() -> String {
    LIMITS.map(|rule| rule.key).join(", ")
}

pub(super) fn check_limits(
    settings: &BTreeMap<String, Setting>,
) -> Result<LimitsConfig, ConfigError> {
    let mut limits = LimitsConfig::default();
    for rule in &LIMITS {
        let Some(setting) = settings.get(rule.key) else { continue };
        let value = match rule.also {
            None => number(setting, rule.min..=rule.max)?,
            Some((fits, what)) => {
                let value = setting.text.parse::<u64>().ok();
                let value = value.filter(|value| (rule.min..=rule.max).contains(value));
                value.filter(|value| fits(*value)).ok_or_else(|| {
                    setting.refuse(format!("allowed: {what}, from {} to {}", rule.min, rule.max))
                })?
            }
        };
        // Every rule's maximum fits.
        let value = Some(value as u32);
        match rule.key {
            "connections" => limits.connections = value,
            "connections_per_host" => limits.connections_per_host = value,
            "handshakes_per_peer" => limits.handshakes_per_peer = value,
            "admin_commands_per_second" => limits.admin_commands_per_second = value,
            "controllers" => limits.controllers = value,
            "controllers_per_host" => limits.controllers_per_host = value,
            "namespaces_max" => limits.namespaces_max = value,
            "in_capsule_bytes" => limits.in_capsule_bytes = value,
            "transfer_bytes" => limits.transfer_bytes = value,
            _ => limits.kato_max_s = value,
        }
    }
    Ok(limits)
}

/// Subsystems as configured; the default one comes first, if it is used.
pub(super) fn check_subsystems(
    drafts: &[SubsystemDraft],
    subnqn: Option<&Setting>,
    volumes: &[VolumeConfig],
) -> Result<Vec<SubsystemConfig>, ConfigError> {
    let mut found: Vec<SubsystemConfig> = Vec::with_capacity(drafts.len() + 1);
    let mut nqn_of_default = subnqn.map(|setting| own_nqn(setting).map(|nqn| (nqn, setting)));
    for draft in drafts {
        if found.len() == SUBSYSTEMS_MAX {
            return Err(draft.name.refuse(format!("allowed: at most {SUBSYSTEMS_MAX} subsystems")));
        }
        let name = name(&draft.name)?;
        if found.iter().any(|other| other.name == name) {
            return Err(draft
                .name
                .refuse("is the name of another subsystem; allowed: unique names"));
        }
        let mut nqn = draft.nqn.as_ref().map(own_nqn).transpose()?;
        if name == DEFAULT_SUBSYSTEM
            && let Some(chosen) = nqn_of_default.take()
        {
            let (chosen, setting) = chosen?;
            if let Some(other) = &draft.nqn {
                return Err(other.refuse(format!(
                    "the default subsystem has its NQN from {} as well; allowed: one of the two",
                    setting.place
                )));
            }
            nqn = Some(chosen);
        }
        let twin = found.iter().find(|other| nqn.is_some() && other.nqn == nqn);
        if let (Some(twin), Some(setting)) = (twin, &draft.nqn) {
            return Err(setting.refuse(format!(
                "is the NQN of subsystem {:?}; allowed: an NQN for each",
                twin.name
            )));
        }
        found.push(SubsystemConfig { name, nqn, hosts: hosts(draft.hosts.as_deref())? });
    }
    let is_used = volumes.iter().any(|volume| volume.subsystem == DEFAULT_SUBSYSTEM);
    let is_there = found.iter().any(|subsystem| subsystem.name == DEFAULT_SUBSYSTEM);
    if !is_there && (is_used || nqn_of_default.is_some() || found.is_empty()) {
        let nqn = match nqn_of_default {
            Some(chosen) => {
                let (nqn, setting) = chosen?;
                if let Some(twin) = found.iter().find(|other| other.nqn.as_ref() == Some(&nqn)) {
                    return Err(setting.refuse(format!(
                        "is the NQN of subsystem {:?}; allowed: an NQN for each",
                        twin.name
                    )));
                }
                Some(nqn)
            }
            None => None,
        };
        let name = DEFAULT_SUBSYSTEM.to_owned();
        found.insert(0, SubsystemConfig { name, nqn, hosts: None });
    }
    Ok(found)
}

/// A list of host NQNs.
pub(super) fn hosts(settings: Option<&[Setting]>) -> Result<Option<Vec<Nqn>>, ConfigError> {
    let Some(settings) = settings else { return Ok(None) };
    let mut hosts = Vec::with_capacity(settings.len());
    for setting in settings {
        if hosts.len() == HOSTS_MAX {
            return Err(setting.refuse(format!("allowed: at most {HOSTS_MAX} hosts")));
        }
        let host = nqn(setting)?;
        if host.is_discovery() {
            return Err(setting.refuse(
                "is the discovery subsystem's; allowed: the NQN of a host, as in its \
                 /etc/nvme/hostnqn",
            ));
        }
        if hosts.contains(&host) {
            return Err(setting.refuse("is given twice; allowed: each host once"));
        }
        hosts.push(host);
    }
    Ok(Some(hosts))
}

/// The same for a list that a caller of the management API gives. `Err`: what is wrong, allowed.
pub(crate) fn hosts_of(texts: Option<&[String]>) -> Result<Option<Vec<Nqn>>, ConfigError> {
    let settings: Option<Vec<Setting>> =
        texts.map(|texts| texts.iter().map(|text| Setting::flag("hosts", text)).collect());
    hosts(settings.as_deref())
}

pub(super) fn check_ana(
    drafts: &[AnaDraft],
    listen: &[Listen],
) -> Result<Vec<AnaConfig>, ConfigError> {
    let mut found: Vec<AnaConfig> = Vec::with_capacity(drafts.len());
    for draft in drafts {
        let port = match &draft.port {
            None => None,
            Some(setting) => {
                let port = number(setting, 1..=u64::from(PORTID_MAX))? as u16;
                if !listen.iter().any(|listen| listen.portid == Some(port)) {
                    return Err(setting.refuse(
                        "is the port ID of no I/O listener; allowed: N of a listener with \
                         ,portid=N",
                    ));
                }
                Some(port)
            }
        };
        let group = number(&draft.group, 1..=ANA_GROUP_MAX)? as u32;
        let Some(state) = AnaSetting::from_name(&draft.state.text) else {
            return Err(draft.state.refuse(format!(
                "is no ANA state; allowed: {}",
                ANA_STATES.map(|(name, _)| name).join(", ")
            )));
        };
        if found.iter().any(|other| (other.port, other.group) == (port, group)) {
            return Err(draft
                .group
                .refuse("has a state already; allowed: one for each port and group"));
        }
        found.push(AnaConfig { port, group, state });
    }
    // What is said of one port goes before what is said of all.
    found.sort_by_key(|ana| ana.port.is_some());
    Ok(found)
}

pub(super) fn check_referrals(
    drafts: &[ReferralDraft],
) -> Result<Vec<ReferralConfig>, ConfigError> {
    let mut found: Vec<ReferralConfig> = Vec::with_capacity(drafts.len());
    for draft in drafts {
        if found.len() == PORTS_MAX {
            return Err(draft.addr.refuse(format!("allowed: at most {PORTS_MAX} referrals")));
        }
        let referral = referral(draft)?;
        if found.iter().any(|other| other.addr == referral.addr) {
            return Err(draft.addr.refuse("is given twice; allowed: each address once"));
        }
        found.push(referral);
    }
    Ok(found)
}

fn referral(draft: &ReferralDraft) -> Result<ReferralConfig, ConfigError> {
    let addr = address(&draft.addr, &draft.addr.text)?;
    if addr.ip().is_unspecified() || addr.port() == 0 {
        return Err(draft.addr.refuse(
            "hosts cannot connect to it; allowed: ADDR:PORT of another discovery controller, such \
             as 192.0.2.8:8009",
        ));
    }
    let nqn = draft.nqn.as_ref().map(nqn).transpose()?.unwrap_or_else(Nqn::discovery);
    Ok(ReferralConfig { addr, nqn })
}

/// A referral that a caller of the management API gives.
pub(crate) fn parse_referral(addr: &str, nqn: Option<&str>) -> Result<ReferralConfig, ConfigError> {
    referral(&ReferralDraft {
        addr: Setting::flag("addr", addr),
        nqn: nqn.map(|nqn| Setting::flag("nqn", nqn)),
    })
}

/// Port IDs that an operator may choose; those above are left to listeners without one.
pub(super) const PORTID_MAX: u16 = 0x7FFF;

/// Listeners of both kinds, none at the address of another.
pub(super) fn check_listeners(
    io: &[Setting],
    discovery: &[Setting],
) -> Result<(Vec<Listen>, Vec<Listen>), ConfigError> {
    let mut seen: Vec<(Listen, &Setting, bool)> = Vec::new();
    for (settings, is_io) in [(io, true), (discovery, false)] {
        for setting in settings {
            if seen.len() == PORTS_MAX {
                return Err(setting.refuse(format!("allowed: at most {PORTS_MAX} listeners")));
            }
            let listen = listener(setting)?;
            for (other, place, other_is_io) in &seen {
                if other.portid.is_some() && other.portid == listen.portid {
                    return Err(setting.refuse(format!(
                        "has the port ID of {:?} ({}); allowed: an ID for each listener",
                        place.text, place.place
                    )));
                }
                if !overlap(other.addr, listen.addr) {
                    continue;
                }
                let problem = if other.addr != listen.addr {
                    format!("takes in {:?} ({})", place.text, place.place)
                } else if is_io == *other_is_io {
                    "is given twice".to_owned()
                } else {
                    format!("is also an I/O listener ({})", place.place)
                };
                let allowed = match (is_io, other_is_io) {
                    (false, true) => "another port, such as 8009, for discovery",
                    _ => "each address once",
                };
                return Err(setting.refuse(format!("{problem}; allowed: {allowed}")));
            }
            seen.push((listen, setting, is_io));
        }
    }
    let of = |kind: bool| seen.iter().filter(|(.., io)| *io == kind).map(|(l, ..)| *l).collect();
    Ok((of(true), of(false)))
}

/// Whether a listener that is given would take connections of another address.
pub(super) fn overlaps(listen: &Setting, addr: SocketAddr) -> bool {
    // One that makes no sense is refused elsewhere.
    listener(listen).is_ok_and(|listen| overlap(listen.addr, addr))
}

/// Whether one listener would take the other's connections. Port 0 is another port each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let takes_in = |wide: IpAddr, other: IpAddr| match wide {
        IpAddr::V4(ip) => ip.is_unspecified() && other.is_ipv4(),
        // A listener on [::] takes IPv4 as well.
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    a.port() != 0
        && a.port() == b.port()
        && (a == b || takes_in(a.ip(), b.ip()) || takes_in(b.ip(), a.ip()))
}

/// `ADDR:PORT[,advertise=ADDR:PORT][,portid=N][,tls=off|allowed|required][,auth=registered|required]`.
fn listener(setting: &Setting) -> Result<Listen, ConfigError> {
    const FORM: &str = "allowed: ADDR:PORT[,advertise=ADDR:PORT][,portid=N]\
                        [,tls=off|allowed|required][,auth=registered|required], such as 0.0.0.0:4420,advertise=192.0.2.7:4420";
    let mut parts = setting.text.split(',');
    let addr = address(setting, parts.next().unwrap_or(""))?;
    let mut advertise = None;
    let mut portid = None;
    let mut tls = None;
    let mut auth = None;
    for part in parts {
        if let Some(value) = part.strip_prefix("auth=") {
            if auth.is_some() {
                return Err(setting.refuse(format!("auth is given twice; {FORM}")));
            }
            auth = Some(match value {
                "registered" => AuthDemand::Registered,
                "required" => AuthDemand::Required,
                _ => return Err(setting.refuse("auth: allowed: registered or required")),
            });
            continue;
        }
        if let Some(value) = part.strip_prefix("tls=") {
            if tls.is_some() {
                return Err(setting.refuse(format!("tls is given twice; {FORM}")));
            }
            tls = Some(match value {
                "off" => Tls::Off,
                "allowed" => Tls::Allowed,
                "required" => Tls::Required,
                _ => return Err(setting.refuse("tls: allowed: off, allowed or required")),
            });
            continue;
        }
        if let Some(value) = part.strip_prefix("portid=") {
            if portid.is_some() {
                return Err(setting.refuse(format!("portid is given twice; {FORM}")));
            }
            let value = value.parse().ok().filter(|id| (1..=PORTID_MAX).contains(id));
            portid = Some(value.ok_or_else(|| {
                setting.refuse(format!("portid: allowed: a whole number from 1 to {PORTID_MAX}"))
            })?);
            continue;
        }
        let Some(value) = part.strip_prefix("advertise=") else {
            return Err(setting.refuse(format!("{part:?} is no option of a listener; {FORM}")));
        };
        if advertise.is_some() {
            return Err(setting.refuse(format!("advertise is given twice; {FORM}")));
        }
        let value = address(setting, value)?;
        if value.ip().is_unspecified() || value.port() == 0 {
            return Err(setting.refuse(
                "hosts cannot connect to the advertised address; allowed: a real ADDR:PORT",
            ));
        }
        advertise = Some(value);
    }
    let (tls, auth) = (tls.unwrap_or_default(), auth.unwrap_or_default());
    Ok(Listen { addr, advertise, portid, tls, auth, hidden: false })
}

const HASHES: [(&str, Hash); 3] =
    [("sha256", Hash::Sha256), ("sha384", Hash::Sha384), ("sha512", Hash::Sha512)];

const GROUPS: [(&str, DhGroup); 6] = [
    ("null", DhGroup::Null),
    ("ffdhe2048", DhGroup::Ffdhe2048),
    ("ffdhe3072", DhGroup::Ffdhe3072),
    ("ffdhe4096", DhGroup::Ffdhe4096),
    ("ffdhe6144", DhGroup::Ffdhe6144),
    ("ffdhe8192", DhGroup::Ffdhe8192),
];

/// Hashes and groups of authentication, the preferred first; all of them where none is given.
pub(super) fn check_auth(
    hashes: &[Setting],
    groups: &[Setting],
) -> Result<AuthPolicy, ConfigError> {
    fn chosen<T: Copy + PartialEq>(
        settings: &[Setting],
        known: &[(&str, T)],
    ) -> Result<Vec<T>, ConfigError> {
        let mut found = Vec::with_capacity(settings.len());
        for setting in settings {
            let Some((_, value)) = known.iter().find(|(name, _)| *name == setting.text) else {
                let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
                return Err(setting.refuse(format!("allowed: {}", names.join(", "))));
            };
            if found.contains(value) {
                return Err(setting.refuse("is given twice; allowed: each once"));
            }
            found.push(*value);
        }
        Ok(found)
    }
    let mut policy = AuthPolicy::default();
    if !hashes.is_empty() {
        policy.hashes = chosen(hashes, &HASHES)?;
    }
    if !groups.is_empty() {
        policy.groups = chosen(groups, &GROUPS)?;
    }
    Ok(policy)
}
