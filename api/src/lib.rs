//! The management API's types: what `penstock` processes and their callers say to each other.
//!
//! ```text
//!  penstock status, volume, ... ─┐
//!  curl, your own tools ─────────┼─► HTTP/1.1 over a Unix socket ─► daemon ─► running target
//!                                │   JSON bodies made of these types
//! ```
//!
//! Serde types only: no checks, no transport. Every path begins with [`PREFIX`]; within one version
//! keys are added and never change their meaning, so a reader ignores keys it does not know. The
//! daemon refuses keys it does not know in a request: a typing error must not be taken for "not
//! given".
//!
//! Start reading at [`Status`] (what there is) and [`AttachVolume`] (a change). Every refusal is a
//! [`Problem`].

#![forbid(unsafe_code)]

mod breakdown;
mod change;
mod device;
mod keys;
mod status;

pub use breakdown::{Breakdown, SetSampling, StageTime, StageTimes};
pub use change::{
    AddReferral, AddSubsystem, AttachVolume, DisconnectHost, MoveVolume, ResizeVolume, SetAna,
    SetHosts, SetReferrals, SetWriteProtect,
};
pub use device::{
    AttachNamespace, Device, DeviceCounters, DeviceDiscovery, DeviceNamespace, DevicePath,
    DeviceQueue, SetDeviceKeys,
};
pub use keys::{AddKey, ExportKeys, Exported, Key, KeyKind, RotateKey, SecretString};
pub use status::{
    AnaEntry, AnaState, Association, Counters, Limit, Origin, Port, PortKind, Power, Referral,
    Refusal, Status, Subsystem, Volume,
};

use serde::{Deserialize, Serialize};

/// Version of this API.
pub const VERSION: u32 = 1;

/// What every path begins with.
pub const PREFIX: &str = "/v1";

/// Longest request body that is read, in bytes.
pub const BODY_BYTES_MAX: usize = 256 << 10;

/// Largest `timeout` of a change, in seconds.
pub const TIMEOUT_S_MAX: u64 = 60;

/// `timeout` of a change where none is given, in seconds.
pub const TIMEOUT_S: u64 = 30;

/// The paths, below [`PREFIX`]. `{name}` stands for one segment.
pub mod path {
    /// GET: [`Status`](crate::Status).
    pub const STATUS: &str = "/v1/status";
    /// GET: list of [`Volume`](crate::Volume). POST: [`AttachVolume`](crate::AttachVolume).
    pub const VOLUMES: &str = "/v1/volumes";
    /// GET: list of [`Subsystem`](crate::Subsystem). POST: [`AddSubsystem`](crate::AddSubsystem).
    pub const SUBSYSTEMS: &str = "/v1/subsystems";
    /// GET, of an emulator: list of [`Device`](crate::Device). `/v1/devices/{name}`: one of them. PUT
    /// `/v1/devices/{name}/keys` [`SetDeviceKeys`](crate::SetDeviceKeys): the device. POST
    /// `/v1/devices/{name}/namespaces`: [`AttachNamespace`](crate::AttachNamespace). DELETE
    /// `/v1/devices/{name}/namespaces/{nsid}`.
    pub const DEVICES: &str = "/v1/devices";
    /// PUT: [`SetAna`](crate::SetAna).
    pub const ANA: &str = "/v1/ana";
    /// POST: [`DisconnectHost`](crate::DisconnectHost).
    pub const DISCONNECT: &str = "/v1/hosts/disconnect";
    /// GET: list of [`Referral`](crate::Referral). PUT: [`SetReferrals`](crate::SetReferrals).
    /// POST: [`AddReferral`](crate::AddReferral). DELETE with `?addr=ADDR:PORT`.
    pub const REFERRALS: &str = "/v1/referrals";
    /// GET, with `?host=NQN` of that host: list of [`Key`](crate::Key). POST:
    /// [`AddKey`](crate::AddKey). DELETE `/v1/keys/{id}`. POST `/v1/keys/{id}/rotate`:
    /// [`RotateKey`](crate::RotateKey). All but GET answer with a [`Key`](crate::Key).
    pub const KEYS: &str = "/v1/keys";
    /// GET: [`Breakdown`](crate::Breakdown). PUT [`SetSampling`](crate::SetSampling): the same.
    pub const BREAKDOWN: &str = "/v1/breakdown";
    /// POST [`ExportKeys`](crate::ExportKeys): [`Exported`](crate::Exported).
    pub const EXPORT_KEYS: &str = "/v1/keys-export";
}

/// What went wrong, so that a program can tell. The names are those in the JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request, or a value in it, makes no sense (400).
    Invalid,
    /// There is no such path, volume, subsystem or port (404).
    NotFound,
    /// The path does not take this method (405).
    Method,
    /// The request contradicts what there is: a name or namespace ID is taken (409).
    Conflict,
    /// The request is too long (413).
    TooLarge,
    /// The request took too long to arrive (408).
    TooSlow,
    /// Another change is under way and did not end in time; nothing was changed (503).
    Busy,
    /// The change is still being prepared; whether it will be made is not known yet (504).
    Pending,
    /// **The change is in force**, and I/O admitted before it has not ended in time (504).
    Draining,
    /// The system or a disk refused (500).
    Failed,
    /// Said by a newer version.
    #[serde(other)]
    Unknown,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind.
    pub error: Code,
    /// What was refused and why, for people.
    pub what: String,
    /// What is allowed, or what to do about it. Empty where there is nothing to say.
    #[serde(default)]
    pub allowed: String,
}

/// The answer to a change that is done: in force, and no I/O of the old state can land any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Whether the change survives a restart: there is a data directory.
    pub kept: bool,
    /// What the caller should know, one sentence each.
    #[serde(default)]
    pub notices: Vec<String>,
    /// The volume as it is now, where the change was about one that is still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<Volume>,
    /// The subsystem as it is now, where the change was about one that is still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<Subsystem>,
    /// Associations ended, where the change was to end them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_a_typing_error_is_refused() {
        let error = serde_json::from_str::<AttachVolume>(r#"{"name":"a","host":[]}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `host`"), "{error}");
    }

    /// Leaving the key out must not open a volume to everybody.
    #[test]
    fn hosts_are_said_in_so_many_words() {
        assert!(serde_json::from_str::<SetHosts>("{}").is_err());
        assert_eq!(serde_json::from_str::<SetHosts>(r#"{"hosts":null}"#).unwrap().hosts, None);
        let none: SetHosts = serde_json::from_str(r#"{"hosts":[]}"#).unwrap();
        assert_eq!(none.hosts, Some(Vec::new()));
    }

    #[test]
    fn a_reader_copes_with_what_it_does_not_know() {
        let text = r#"{"error":"teapot","what":"short and stout","colour":3}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert_eq!((problem.error, problem.allowed.as_str()), (Code::Unknown, ""));
        let state: AnaState = serde_json::from_str("\"quantum\"").unwrap();
        assert_eq!(state, AnaState::Unknown);
    }

    /// These texts are what callers have in their scripts.
    #[test]
    fn names_are_frozen() {
        for (state, text) in [
            (AnaState::Optimized, "\"optimized\""),
            (AnaState::NonOptimized, "\"non-optimized\""),
            (AnaState::Inaccessible, "\"inaccessible\""),
            (AnaState::PersistentLoss, "\"persistent-loss\""),
            (AnaState::Change, "\"change\""),
        ] {
            assert_eq!(serde_json::to_string(&state).unwrap(), text);
            assert_eq!(format!("\"{state}\""), text);
            assert_eq!(serde_json::from_str::<AnaState>(text).unwrap(), state);
        }
        for (code, text) in [
            (Code::Invalid, "\"invalid\""),
            (Code::NotFound, "\"not_found\""),
            (Code::TooLarge, "\"too_large\""),
            (Code::Draining, "\"draining\""),
        ] {
            assert_eq!(serde_json::to_string(&code).unwrap(), text);
        }
    }
}
