//! What a remote volume needs to know.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nvme::host::ConnectNames;
use nvme::spec::Nqn;

use crate::security::{Offers, Security, Tls};

/// One way to the subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathConfig {
    /// Listener of the controller.
    pub addr: SocketAddr,
    /// NUMA node that the network interface towards it is on, if it matters.
    pub node: Option<u32>,
}

impl From<SocketAddr> for PathConfig {
    fn from(addr: SocketAddr) -> PathConfig {
        PathConfig { addr, node: None }
    }
}

/// Which of several paths an I/O takes. Only those in the best ANA state there is are looked at:
/// optimized ones, and non-optimized ones if there are no others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathPolicy {
    /// The one whose node is that of the core, else always the first.
    #[default]
    Numa,
    /// Each in turn.
    RoundRobin,
    /// The one with the fewest commands out.
    QueueDepth,
}

impl PathPolicy {
    /// The name that Linux gives it (`iopolicy`).
    pub const fn name(self) -> &'static str {
        match self {
            PathPolicy::Numa => "numa",
            PathPolicy::RoundRobin => "round-robin",
            PathPolicy::QueueDepth => "queue-depth",
        }
    }
}

impl std::str::FromStr for PathPolicy {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<PathPolicy, ConfigError> {
        [PathPolicy::Numa, PathPolicy::RoundRobin, PathPolicy::QueueDepth]
            .into_iter()
            .find(|policy| policy.name() == text)
            .ok_or_else(|| ConfigError {
                key: "policy",
                value: text.to_owned(),
                allowed: "numa, round-robin, queue-depth",
            })
    }
}

/// One remote namespace and how to reach it.
///
/// ```
/// use nvmf_initiator::RemoteConfig;
/// use nvme::spec::Nqn;
/// let host = (Nqn::new("nqn.2025-01.io.example:host7")?, [7; 16]);
/// let subnqn = Nqn::new("nqn.2025-01.io.example:db0")?;
/// let config = RemoteConfig {
///     queues: 4,
///     data_digest: true,
///     ..RemoteConfig::new("192.0.2.7:4420".parse()?, subnqn, 1, host)
/// };
/// config.check()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// Ways to the subsystem, 1 to 16, each at another address. None are needed to begin with
    /// where they change.
    pub paths: Vec<PathConfig>,
    /// Paths come and go while the volume is used ([`crate::RemoteVolume::set_paths`]).
    pub paths_change: bool,
    /// Which of them an I/O takes.
    pub policy: PathPolicy,
    /// NQN of the subsystem.
    pub subnqn: Nqn,
    /// Namespace ID in that subsystem; 1 to FFFFFFFEh.
    pub nsid: u32,
    /// NQN this host goes by.
    pub hostnqn: Nqn,
    /// Host Identifier that belongs to `hostnqn`; not zero.
    pub hostid: [u8; 16],
    /// Commands outstanding per I/O queue at most; less if the controller has smaller queues. 1 to
    /// 1,023: a queue has one entry more, as a full one cannot be told from an empty one.
    pub queue_depth: u16,
    /// I/O queues to ask for on each path, so channels that can be open at once. 1 to 1,024.
    pub queues: u16,
    /// Keep Alive Time-out. The association ends when the controller does not answer a Keep Alive
    /// for so long.
    pub kato: Duration,
    /// How long a TCP connect may take, and the ICResp after it.
    pub connect_timeout: Duration,
    /// How long the controller may take to answer a command. An overdue one ends the association.
    pub command_timeout: Duration,
    /// First delay before an attempt to set up a lost association; grows to `reconnect_delay_max`,
    /// with jitter.
    pub reconnect_delay: Duration,
    /// Longest delay between attempts.
    pub reconnect_delay_max: Duration,
    /// How long I/O is held without a path before it fails. `None`: for ever. Zero: not at all, once
    /// there has been a path. Attempts to set up an association go on after it.
    pub ctrl_loss_timeout: Option<Duration>,
    /// How often an I/O is sent again when the controller answers that it may be.
    pub retries_max: u8,
    /// Ask for digests over PDU headers. A controller that refuses is not used.
    pub header_digest: bool,
    /// Ask for digests over data. A controller that refuses is not used.
    pub data_digest: bool,
    /// TLS and authentication, until [`crate::RemoteVolume::set_security`] says otherwise.
    pub security: Security,
}

/// A [`RemoteConfig`] that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {value} is not allowed; {allowed}")]
pub struct ConfigError {
    /// Field of the configuration.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What is allowed.
    pub allowed: &'static str,
}

/// Largest `queue_depth`: a submission queue of 1,024 entries, as large as hosts commonly ask for.
const QUEUE_DEPTH_MAX: u16 = 1023;
/// Most paths: each is one bit in a mask per I/O.
pub(crate) const PATHS_MAX: usize = 16;
/// Largest `queues`; one per core of a big machine.
const QUEUES_MAX: u16 = 1024;

impl RemoteConfig {
    /// The defaults for a namespace: one path, one queue of depth 128, keep alive 5 s, commands 30 s,
    /// reconnects for ever between 0.2 and 5 s apart, no digests. `host` is the host's NQN and
    /// identifier.
    pub fn new(addr: SocketAddr, subnqn: Nqn, nsid: u32, host: (Nqn, [u8; 16])) -> RemoteConfig {
        let paths = vec![addr.into()];
        RemoteConfig { paths, paths_change: false, ..RemoteConfig::unplaced(subnqn, nsid, host) }
    }

    /// The same for a namespace whose paths are not known yet, and change.
    pub fn unplaced(subnqn: Nqn, nsid: u32, host: (Nqn, [u8; 16])) -> RemoteConfig {
        RemoteConfig {
            paths: Vec::new(),
            paths_change: true,
            policy: PathPolicy::default(),
            subnqn,
            nsid,
            hostnqn: host.0,
            hostid: host.1,
            queue_depth: 128,
            queues: 1,
            kato: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
            command_timeout: Duration::from_secs(30),
            reconnect_delay: Duration::from_millis(200),
            reconnect_delay_max: Duration::from_secs(5),
            ctrl_loss_timeout: None,
            retries_max: 10,
            header_digest: false,
            data_digest: false,
            security: Security::default(),
        }
    }

    /// Checks every field; the error names the first wrong one.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, value: &dyn std::fmt::Display, allowed| {
            Err(ConfigError { key, value: value.to_string(), allowed })
        };
        if self.hostid == [0; 16] {
            return wrong("hostid", &"zero", "any other 128-bit number");
        }
        check_paths(&self.paths)?;
        if self.paths.is_empty() && !self.paths_change {
            return wrong("paths", &0, "1 to 16");
        }
        if self.nsid == 0 || self.nsid == u32::MAX {
            return wrong("nsid", &self.nsid, "1 to 4294967294");
        }
        if self.queue_depth == 0 || self.queue_depth > QUEUE_DEPTH_MAX {
            return wrong("queue_depth", &self.queue_depth, "1 to 1023");
        }
        if self.queues == 0 || self.queues > QUEUES_MAX {
            return wrong("queues", &self.queues, "1 to 1024");
        }
        let second = Duration::from_secs(1);
        let day = 86_400 * second;
        let milli = Duration::from_millis(1);
        for (key, value, min, allowed) in [
            ("kato", self.kato, second, "1 second to 1 day"),
            ("connect_timeout", self.connect_timeout, milli, "1 millisecond to 1 day"),
            ("command_timeout", self.command_timeout, second, "1 second to 1 day"),
            ("reconnect_delay", self.reconnect_delay, milli, "1 millisecond to 1 day"),
            ("reconnect_delay_max", self.reconnect_delay_max, milli, "1 millisecond to 1 day"),
        ] {
            if value < min || value > day {
                return wrong(key, &format_args!("{value:?}"), allowed);
            }
        }
        if let Err((key, value, allowed)) = self.security.check() {
            return wrong(key, &value, allowed);
        }
        if self.ctrl_loss_timeout.is_some_and(|timeout| timeout > day) {
            let value = format_args!("{:?}", self.ctrl_loss_timeout);
            return wrong("ctrl_loss_timeout", &value, "at most 1 day, or none");
        }
        Ok(())
    }

    /// What connections of each path offer with `security`; `None`: plaintext, or no key yet.
    pub(crate) fn offers(
        &self,
        security: &Security,
    ) -> Result<Vec<Option<Arc<Offers>>>, ConfigError> {
        let Tls::Keys(tls) = &security.tls else { return Ok(vec![None; self.paths_max()]) };
        let offers = |_| {
            Offers::new(tls, self.hostnqn.as_str(), self.subnqn.as_str()).map_err(|error| {
                ConfigError {
                    key: "security.tls",
                    value: error.to_string(),
                    allowed: "names and versions that a TLS identity has room for",
                }
            })
        };
        (0..self.paths_max()).map(|path| offers(path).map(Some)).collect()
    }

    /// Paths that there can be at a time.
    pub(crate) fn paths_max(&self) -> usize {
        if self.paths_change { PATHS_MAX } else { self.paths.len() }
    }

    pub(crate) fn names(&self) -> ConnectNames {
        ConnectNames {
            hostnqn: self.hostnqn.clone(),
            hostid: self.hostid,
            subnqn: self.subnqn.clone(),
        }
    }
}

/// Whether these can be the paths of a volume.
pub(crate) fn check_paths(paths: &[PathConfig]) -> Result<(), ConfigError> {
    let wrong = |value: &dyn std::fmt::Display, allowed| {
        Err(ConfigError { key: "paths", value: value.to_string(), allowed })
    };
    for (at, path) in paths.iter().enumerate() {
        if paths[..at].iter().any(|other| other.addr == path.addr) {
            return wrong(&path.addr, "each address once");
        }
    }
    if paths.len() > PATHS_MAX {
        return wrong(&paths.len(), "at most 16");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RemoteConfig {
        let nqn = |text| Nqn::new(text).unwrap();
        let host = (nqn("nqn.2025-01.io.example:host"), [1; 16]);
        RemoteConfig::new(([192, 0, 2, 1], 4420).into(), nqn("nqn.2025-01.io.example:a"), 1, host)
    }

    #[test]
    fn defaults_are_allowed() {
        assert_eq!(config().check(), Ok(()));
    }

    #[test]
    fn errors_name_the_field_the_value_and_what_is_allowed() {
        let wrong = [
            RemoteConfig { paths: Vec::new(), ..config() },
            RemoteConfig { paths: vec![config().paths[0]; 2], ..config() },
            RemoteConfig { nsid: 0, ..config() },
            RemoteConfig { hostid: [0; 16], ..config() },
            RemoteConfig { queue_depth: 1024, ..config() },
            RemoteConfig { queues: 0, ..config() },
            RemoteConfig { kato: Duration::from_millis(10), ..config() },
            RemoteConfig { command_timeout: Duration::MAX, ..config() },
            RemoteConfig { ctrl_loss_timeout: Some(Duration::MAX), ..config() },
        ];
        let keys = [
            "paths",
            "paths",
            "nsid",
            "hostid",
            "queue_depth",
            "queues",
            "kato",
            "command_timeout",
            "ctrl_loss_timeout",
        ];
        for (config, key) in wrong.into_iter().zip(keys) {
            let error = config.check().expect_err(key);
            assert_eq!(error.key, key);
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(error.allowed), "{text}");
        }
    }

    #[test]
    fn policies_have_the_names_of_linux() {
        for policy in [PathPolicy::Numa, PathPolicy::RoundRobin, PathPolicy::QueueDepth] {
            assert_eq!(policy.name().parse(), Ok(policy));
        }
        assert_eq!("best".parse::<PathPolicy>().unwrap_err().key, "policy");
    }
}
