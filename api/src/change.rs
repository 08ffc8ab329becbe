//! Changes: the bodies of requests.

use serde::{Deserialize, Deserializer, Serialize};

use crate::AnaState;

/// A key that has to be there, be it with `null`.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

/// Serves a volume: `POST /v1/volumes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachVolume {
    /// Its name; its identity is kept by it.
    pub name: String,
    /// What is behind it, as in the configuration: `file:PATH[,size=SIZE]`, `blockdev:PATH`,
    /// `ram:SIZE`, `null:SIZE`. May be left out for a volume of the configuration file that was
    /// detached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<String>,
    /// Name of the subsystem; without it the default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// Namespace ID; without it the one it had, or the next free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nsid: Option<u32>,
    /// ANA group; without it 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ana_group: Option<u32>,
    /// Host NQNs that see it; `null` or left out: every host of the subsystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
}

/// Looks at the backing object again, and grows a file first: `POST /v1/volumes/{name}/resize`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// The new size of a `file:` volume in bytes, not smaller than the present one; left out: only
    /// look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
}

/// Who sees a volume or may connect to a subsystem: `PUT /v1/volumes/{name}/hosts`,
/// `PUT /v1/subsystems/{name}/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetHosts {
    /// Host NQNs; `null`: every host; `[]`: none.
    #[serde(deserialize_with = "present")]
    pub hosts: Option<Vec<String>>,
}

/// Moves a volume to another ANA group: `PUT /v1/volumes/{name}/ana-group`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveVolume {
    /// The group, 1 to 128.
    pub ana_group: u32,
}

/// Refuses writes to a volume, or takes them again: `PUT /v1/volumes/{name}/write-protect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetWriteProtect {
    /// Whether writes are refused.
    pub enabled: bool,
}

/// Makes a subsystem: `POST /v1/subsystems`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddSubsystem {
    /// Its name, for this API and the configuration.
    pub name: String,
    /// Its NQN; without it one is made and kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nqn: Option<String>,
    /// Host NQNs that may connect; `null` or left out: every host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
}

/// Sets the ANA state of a group as seen through a port: `PUT /v1/ana`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetAna {
    /// Name of the subsystem; without it every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// Port ID; without it every I/O port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The group.
    pub group: u32,
    /// Its state.
    pub state: AnaState,
}

/// Ends the associations of a host: `POST /v1/hosts/disconnect`. It may connect again at once;
/// take it out of `hosts` to keep it away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DisconnectHost {
    /// Host NQN.
    pub hostnqn: String,
    /// Name of the subsystem; without it every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
}

/// Adds one referral: `POST /v1/referrals`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddReferral {
    /// `ADDR:PORT` of another discovery controller.
    pub addr: String,
    /// Its NQN; without it the well-known one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nqn: Option<String>,
}

/// Replaces all referrals: `PUT /v1/referrals`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetReferrals {
    /// The referrals there shall be.
    pub referrals: Vec<AddReferral>,
}
