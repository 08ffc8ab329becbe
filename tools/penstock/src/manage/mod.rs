//! `penstock status`, `volume`, `subsystem`, `ana`, `host`, `referral`, `key`: a running target's operator
//! speaks to its management API.

pub(crate) mod cli;
mod client;
mod key;
mod place;
mod text;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use api::{
    AddReferral, AddSubsystem, AnaState, AttachNamespace, AttachVolume, Breakdown, Device,
    DisconnectHost, Done, MoveVolume, Referral, ResizeVolume, SetAna, SetDeviceKeys, SetHosts,
    SetSampling, SetWriteProtect, Status, Subsystem, Volume,
};
use daemon::credentials::{device_keys, kept_device_keys};
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::cli::{
    AnaAction, AnaArgs, Connection, DeviceAction, DeviceArgs, HostAction, HostArgs, ReferralAction,
    ReferralArgs, State, StatusArgs, SubsystemAction, SubsystemArgs, VolumeAction, VolumeArgs,
};
use self::client::{Ask, segment};

pub(crate) use self::key::{KEY_AFTER, KeyArgs, run as key};

pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    show(&args.connection, api::path::STATUS, text::status)
}

pub(crate) fn device(args: &DeviceArgs) -> anyhow::Result<ExitCode> {
    match &args.action {
        DeviceAction::List { connection } => {
            show(connection, api::path::DEVICES, |devices: &Vec<Device>| text::devices(devices))
        }
        DeviceAction::Show { name, connection } => {
            let path = format!("{}/{}", api::path::DEVICES, segment(name));
            show(connection, &path, text::device)
        }
        DeviceAction::Rekey {
            name,
            psk,
            dhchap,
            dhchap_ctrl,
            data,
            reauthenticate,
            connection,
        } => {
            let (psk, dhchap) = (psk.as_deref(), dhchap.as_deref());
            let mut body = device_keys(psk, dhchap, dhchap_ctrl.as_deref())?;
            if let Some(dir) = data {
                let kept = kept_keys(connection, name, dir)?;
                if psk.is_none() {
                    (body.psk, body.discovery_psk) = (kept.psk, kept.discovery_psk);
                }
                body.dhchap = body.dhchap.or(kept.dhchap);
                body.dhchap_ctrl = body.dhchap_ctrl.or(kept.dhchap_ctrl);
            }
            body.reauthenticate = *reauthenticate;
            let ask = Ask {
                method: Method::PUT,
                path: format!("{}/{}/keys", api::path::DEVICES, segment(name)),
                body: Some(serde_json::to_string(&body)?),
            };
            let device: Device =
                client::send(connection, Duration::from_secs(connection.timeout), ask)?;
            if connection.json {
                println!("{}", serde_json::to_string_pretty(&device)?);
            } else {
                println!("{name}: the next connection uses the new keys");
            }
            Ok(ExitCode::SUCCESS)
        }
        DeviceAction::Attach { name, nsid, connection } => {
            let path = format!("{}/{}/namespaces", api::path::DEVICES, segment(name));
            change(connection, Method::POST, &path, Some(&AttachNamespace { nsid: *nsid }))
        }
        DeviceAction::Detach { name, nsid, connection } => {
            let path = format!("{}/{}/namespaces/{nsid}", api::path::DEVICES, segment(name));
            change(connection, Method::DELETE, &path, None::<&()>)
        }
    }
}

/// What a data directory has for a device, as who it is to its target.
fn kept_keys(connection: &Connection, name: &str, dir: &Path) -> anyhow::Result<SetDeviceKeys> {
    let device: Device = get(connection, &format!("{}/{}", api::path::DEVICES, segment(name)))?;
    let subnqn = device.namespaces.first().map_or("", |namespace| &namespace.subnqn);
    let (Ok(host), Ok(subnqn)) = (device.hostnqn.parse(), subnqn.parse()) else {
        anyhow::bail!("device {name:?} has no target, and no keys");
    };
    let kept = kept_device_keys(dir, &host, &subnqn)?;
    if kept.psk.is_empty() && kept.dhchap.is_none() && kept.dhchap_ctrl.is_none() {
        anyhow::bail!("data directory {}: no key of {host} for {subnqn}", dir.display());
    }
    Ok(kept)
}

pub(crate) fn volume(args: &VolumeArgs) -> anyhow::Result<ExitCode> {
    let of = |name: &str, what: &str| format!("{}/{}{what}", api::path::VOLUMES, segment(name));
    match &args.action {
        VolumeAction::List { connection } => {
            show(connection, api::path::VOLUMES, |volumes: &Vec<Volume>| text::volumes(volumes))
        }
        VolumeAction::Attach { name, spec, subsystem, nsid, ana_group, host, connection } => {
            let body = AttachVolume {
                name: name.clone(),
                spec: spec.clone(),
                subsystem: subsystem.clone(),
                nsid: *nsid,
                ana_group: *ana_group,
                hosts: (!host.is_empty()).then(|| host.clone()),
            };
            change(connection, Method::POST, api::path::VOLUMES, Some(&body))
        }
        VolumeAction::Detach { name, connection } => {
            change(connection, Method::DELETE, &of(name, ""), None::<&()>)
        }
        VolumeAction::Resize { name, size, connection } => {
            let size_bytes = size.as_deref().map(daemon::size::parse).transpose();
            let size_bytes = size_bytes.map_err(|error| anyhow::anyhow!("--size: {error}"))?;
            let body = ResizeVolume { size_bytes };
            change(connection, Method::POST, &of(name, "/resize"), Some(&body))
        }
        VolumeAction::Hosts { name, who, connection } => {
            let body = SetHosts { hosts: who.hosts() };
            change(connection, Method::PUT, &of(name, "/hosts"), Some(&body))
        }
        VolumeAction::Protect { name, connection } => {
            let body = SetWriteProtect { enabled: true };
            change(connection, Method::PUT, &of(name, "/write-protect"), Some(&body))
        }
        VolumeAction::Unprotect { name, connection } => {
            let body = SetWriteProtect { enabled: false };
            change(connection, Method::PUT, &of(name, "/write-protect"), Some(&body))
        }
        VolumeAction::Move { name, ana_group, connection } => {
            let body = MoveVolume { ana_group: *ana_group };
            change(connection, Method::PUT, &of(name, "/ana-group"), Some(&body))
        }
    }
}

pub(crate) fn subsystem(args: &SubsystemArgs) -> anyhow::Result<ExitCode> {
    let of = |name: &str, what: &str| format!("{}/{}{what}", api::path::SUBSYSTEMS, segment(name));
    match &args.action {
        SubsystemAction::List { connection } => {
            show(connection, api::path::SUBSYSTEMS, |list: &Vec<Subsystem>| text::subsystems(list))
        }
        SubsystemAction::Add { name, nqn, host, connection } => {
            let body = AddSubsystem {
                name: name.clone(),
                nqn: nqn.clone(),
                hosts: (!host.is_empty()).then(|| host.clone()),
            };
            change(connection, Method::POST, api::path::SUBSYSTEMS, Some(&body))
        }
        SubsystemAction::Remove { name, connection } => {
            change(connection, Method::DELETE, &of(name, ""), None::<&()>)
        }
        SubsystemAction::Hosts { name, who, connection } => {
            let body = SetHosts { hosts: who.hosts() };
            change(connection, Method::PUT, &of(name, "/hosts"), Some(&body))
        }
    }
}

pub(crate) fn ana(args: &AnaArgs) -> anyhow::Result<ExitCode> {
    let AnaAction::Set { state, group, port, subsystem, connection } = &args.action;
    let state = match state {
        State::Optimized => AnaState::Optimized,
        State::NonOptimized => AnaState::NonOptimized,
        State::Inaccessible => AnaState::Inaccessible,
        State::PersistentLoss => AnaState::PersistentLoss,
        State::Change => AnaState::Change,
    };
    let body = SetAna { subsystem: subsystem.clone(), port: *port, group: *group, state };
    change(connection, Method::PUT, api::path::ANA, Some(&body))
}

pub(crate) fn host(args: &HostArgs) -> anyhow::Result<ExitCode> {
    match &args.action {
        HostAction::List { connection } => {
            let status: Status = get(connection, api::path::STATUS)?;
            if connection.json {
                println!("{}", serde_json::to_string_pretty(&status.associations)?);
            } else {
                print!("{}", text::hosts(&status.associations));
            }
            Ok(ExitCode::SUCCESS)
        }
        HostAction::Disconnect { hostnqn, subsystem, connection } => {
            let body = DisconnectHost { hostnqn: hostnqn.clone(), subsystem: subsystem.clone() };
            change(connection, Method::POST, api::path::DISCONNECT, Some(&body))
        }
    }
}

pub(crate) fn referral(args: &ReferralArgs) -> anyhow::Result<ExitCode> {
    match &args.action {
        ReferralAction::List { connection } => {
            show(connection, api::path::REFERRALS, |list: &Vec<Referral>| text::referrals(list))
        }
        ReferralAction::Add { addr, nqn, connection } => {
            let body = AddReferral { addr: addr.clone(), nqn: nqn.clone() };
            change(connection, Method::POST, api::path::REFERRALS, Some(&body))
        }
        ReferralAction::Remove { addr, connection } => {
            let path = format!("{}?addr={}", api::path::REFERRALS, segment(addr));
            change(connection, Method::DELETE, &path, None::<&()>)
        }
    }
}

/// Where the time of followed commands went at a target.
pub(crate) fn breakdown(connection: &Connection) -> anyhow::Result<Breakdown> {
    get(connection, api::path::BREAKDOWN)
}

/// Has a target follow one command in `every`.
pub(crate) fn set_sampling(connection: &Connection, every: u32) -> anyhow::Result<Breakdown> {
    let body = Some(serde_json::to_string(&SetSampling { every })?);
    let ask = Ask { method: Method::PUT, path: api::path::BREAKDOWN.to_owned(), body };
    client::send(connection, Duration::from_secs(connection.timeout), ask)
}

fn get<T: DeserializeOwned>(connection: &Connection, path: &str) -> anyhow::Result<T> {
    let ask = Ask { method: Method::GET, path: path.to_owned(), body: None };
    client::send(connection, Duration::from_secs(connection.timeout), ask)
}

/// Prints what there is.
fn show<T: DeserializeOwned + Serialize>(
    connection: &Connection,
    path: &str,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<ExitCode> {
    let value: T = get(connection, path)?;
    if connection.json {
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print!("{}", text(&value));
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a change and says what came of it.
fn change(
    connection: &Connection,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<ExitCode> {
    let body = body.map(serde_json::to_string).transpose()?;
    let mark = if path.contains('?') { '&' } else { '?' };
    let path = format!("{path}{mark}timeout={}", connection.timeout);
    let patience = Duration::from_secs(connection.timeout);
    let done: Done = client::send(connection, patience, Ask { method, path, body })?;
    if connection.json {
        println!("{}", serde_json::to_string_pretty(&done)?);
    } else {
        print!("{}", text::done(&done));
    }
    Ok(ExitCode::SUCCESS)
}
