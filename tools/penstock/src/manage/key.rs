//! `penstock key`: keys of hosts, at a running target or in a data directory that none uses.

use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use api::{AddKey, ExportKeys, Exported, Key, KeyKind, RotateKey, SecretString};
use clap::{Args, Subcommand, ValueEnum};
use daemon::OfflineKeys;
use hyper::Method;

use super::cli::Connection;
use super::client::{self, Ask, refusal, segment};
use super::text;

/// A file with one key is not longer.
const KEY_FILE_BYTES_MAX: u64 = 4096;

pub(crate) const KEY_AFTER: &str = "A key is in force for the next connection when the command \
ends; connections that exist stay. Rotate: `rotate` makes a new key beside the old one, give it to \
the host with `export`, and the old one ends by itself.

Examples:
  penstock key generate --host nqn.2014-08.com.example:host-a
  nvme gen-dhchap-key --hmac=1 | penstock key import --host nqn.2014-08.com.example:host-a \\
    --kind dhchap
  penstock key export --host nqn.2014-08.com.example:host-a --nvme-cli 2.13 \\
    --subsystem nqn.2014-08.com.example:db --address 192.0.2.7:4420
  penstock key export --host nqn.2014-08.com.example:host-b --emulator \\
    --subsystem nqn.2014-08.com.example:db --address 192.0.2.7:4420
  penstock key rotate 1f00a2c4 --overlap 86400
  penstock key list --data /var/lib/penstock";

#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    action: KeyAction,
}

/// Where the keys are.
#[derive(Debug, Args)]
struct Place {
    #[command(flatten)]
    connection: Connection,
    /// Data directory of a target that does not run, or of an emulator; instead of --api
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// TLS
    Tls,
    /// DH-HMAC-CHAP: the host proves itself
    Dhchap,
    /// DH-HMAC-CHAP: the controller proves itself to the host
    DhchapController,
}

impl From<Kind> for KeyKind {
    fn from(kind: Kind) -> KeyKind {
        match kind {
            Kind::Tls => KeyKind::Tls,
            Kind::Dhchap => KeyKind::Dhchap,
            Kind::DhchapController => KeyKind::DhchapController,
        }
    }
}

/// Whose key it is and for how long.
#[derive(Debug, Args)]
struct Whose {
    /// Host NQN
    #[arg(long, value_name = "NQN")]
    host: String,
    /// What it is for
    #[arg(long, value_enum, default_value = "tls")]
    kind: Kind,
    /// The only subsystem it is good for, by NQN; TLS alone [default: every one]
    #[arg(long, value_name = "NQN")]
    subsystem: Option<String>,
    /// Seconds until it ceases to be taken [default: never]
    #[arg(long, value_name = "SECONDS")]
    expires_in: Option<u64>,
}

#[derive(Debug, Subcommand)]
enum KeyAction {
    /// Make a new key for a host; `export` shows it
    Generate {
        #[command(flatten)]
        whose: Whose,
        /// Length in bits: 256, 384, or 512 for DH-HMAC-CHAP [default: 256]
        #[arg(long, value_name = "N")]
        bits: Option<u32>,
        #[command(flatten)]
        place: Place,
    },
    /// Take a key that nvme-cli has made, from a file or standard input
    Import {
        #[command(flatten)]
        whose: Whose,
        /// File with the key, which nobody else may read [default: standard input]
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        #[command(flatten)]
        place: Place,
    },
    /// List the keys, without their secrets
    List {
        /// Of this host alone
        #[arg(long, value_name = "NQN")]
        host: Option<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Make a new key beside an old one, which ends after a time
    Rotate {
        /// The old key, as `list` names it
        id: String,
        /// Seconds for which the old one is taken yet
        #[arg(long, value_name = "SECONDS", default_value_t = 86_400)]
        overlap: u64,
        #[command(flatten)]
        place: Place,
    },
    /// Take a key away; connections that were made with it stay
    Remove {
        /// The key, as `list` names it
        id: String,
        #[command(flatten)]
        place: Place,
    },
    /// Print the lines that a host has to run; they contain the keys
    Export {
        /// Host NQN
        #[arg(long, value_name = "NQN")]
        host: String,
        /// Subsystem NQN that the host connects to
        #[arg(long, value_name = "NQN")]
        subsystem: String,
        /// The target as the host sees it
        #[arg(long, value_name = "ADDR:PORT")]
        address: String,
        /// Version of the host's nvme-cli (`nvme version`): they derive keys in two ways
        #[arg(long, value_name = "VERSION", required_unless_present = "emulator")]
        nvme_cli: Option<String>,
        /// The host is no kernel but a `penstock emulate`: print what makes its key files
        #[arg(long, conflicts_with_all = ["nvme_cli", "identity"])]
        emulator: bool,
        /// Version of the TLS identity: 1 gives the key at connect, 0 puts it in the keyring
        #[arg(long, value_name = "0|1", default_value_t = 1)]
        identity: u8,
        /// TLS with a key that authentication makes (Linux 6.15 and later)
        #[arg(long)]
        concat: bool,
        #[command(flatten)]
        place: Place,
    },
}

impl Place {
    /// Asks the running target, or does it in the data directory.
    fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: Option<&impl serde::Serialize>,
        offline: impl FnOnce(&mut OfflineKeys) -> Result<T, api::Problem>,
    ) -> anyhow::Result<T> {
        if let Some(dir) = &self.data {
            let mut keys = OfflineKeys::open(dir)?;
            return offline(&mut keys).map_err(|problem| refusal(&problem));
        }
        let body = body.map(serde_json::to_string).transpose()?;
        let patience = Duration::from_secs(self.connection.timeout);
        client::send(&self.connection, patience, Ask { method, path, body })
    }

    fn print(&self, keys: &[Key]) -> anyhow::Result<ExitCode> {
        if self.connection.json {
            println!("{}", serde_json::to_string_pretty(keys)?);
        } else {
            print!("{}", text::keys(keys));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The text of a key. An argument would show it to everybody on this machine.
fn read_key(file: Option<&Path>) -> anyhow::Result<SecretString> {
    let mut text = String::with_capacity(KEY_FILE_BYTES_MAX as usize + 1);
    let read = match file {
        None => {
            if std::io::stdin().is_terminal() {
                eprintln!("penstock: reading the key from standard input; end with Ctrl-D");
            }
            std::io::stdin().take(KEY_FILE_BYTES_MAX + 1).read_to_string(&mut text)
        }
        Some(path) => {
            let read = daemon::private::read(path, KEY_FILE_BYTES_MAX)?;
            text.push_str(&read);
            Ok(text.len())
        }
    };
    let text = SecretString::new(text);
    if read.context("reading the key")? as u64 > KEY_FILE_BYTES_MAX {
        bail!("that is no key: it is longer than {KEY_FILE_BYTES_MAX} bytes");
    }
    Ok(text)
}

/// What it means that a host has no secret any more.
fn last_secret(host: &str) -> String {
    format!(
        "{host} has no secret for DH-HMAC-CHAP any more: whoever says to be this host is believed \
         without proof where a listener does not say auth=required, and refused where it does"
    )
}

pub(crate) fn run(args: &KeyArgs) -> anyhow::Result<ExitCode> {
    const NOTHING: Option<&()> = None;
    let add = |whose: &Whose, key: Option<SecretString>, bits: Option<u32>, place: &Place| {
        let body = AddKey {
            kind: whose.kind.into(),
            host: whose.host.clone(),
            subsystem: whose.subsystem.clone(),
            expires_in_s: whose.expires_in,
            key,
            bits,
        };
        let path = api::path::KEYS.to_owned();
        let key = place.ask(Method::POST, path, Some(&body), |keys| keys.add(&body))?;
        place.print(&[key])
    };
    match &args.action {
        KeyAction::Generate { whose, bits, place } => add(whose, None, *bits, place),
        KeyAction::Import { whose, file, place } => {
            add(whose, Some(read_key(file.as_deref())?), None, place)
        }
        KeyAction::List { host, place } => {
            let path = match host {
                Some(host) => format!("{}?host={}", api::path::KEYS, segment(host)),
                None => api::path::KEYS.to_owned(),
            };
            let keys: Vec<Key> =
                place.ask(Method::GET, path, NOTHING, |keys| Ok(keys.list(host.as_deref())))?;
            place.print(&keys)
        }
        KeyAction::Rotate { id, overlap, place } => {
            let body = RotateKey { overlap_s: *overlap };
            let path = format!("{}/{}/rotate", api::path::KEYS, segment(id));
            let key = place.ask(Method::POST, path, Some(&body), |keys| keys.rotate(id, &body))?;
            place.print(&[key])
        }
        KeyAction::Remove { id, place } => {
            let path = format!("{}/{}", api::path::KEYS, segment(id));
            let key = place.ask(Method::DELETE, path, NOTHING, |keys| keys.remove(id))?;
            if key.kind == KeyKind::Dhchap {
                let path = format!("{}?host={}", api::path::KEYS, segment(&key.host));
                let list = |keys: &mut OfflineKeys| Ok(keys.list(Some(&key.host)));
                let left: Vec<Key> = place.ask(Method::GET, path, NOTHING, list)?;
                if left.iter().all(|left| left.kind != KeyKind::Dhchap) {
                    eprintln!("penstock: warning: {}", last_secret(&key.host));
                }
            }
            place.print(&[key])
        }
        KeyAction::Export {
            host,
            subsystem,
            address,
            nvme_cli,
            emulator,
            identity,
            concat,
            place,
        } => {
            let body = ExportKeys {
                host: host.clone(),
                subsystem: subsystem.clone(),
                address: address.clone(),
                nvme_cli: nvme_cli.clone().unwrap_or_default(),
                identity: *identity,
                concat: *concat,
                emulator: *emulator,
            };
            let path = api::path::EXPORT_KEYS.to_owned();
            let exported: Exported =
                place.ask(Method::POST, path, Some(&body), |keys| keys.export(&body))?;
            print!("{}", exported.lines.expose());
            Ok(ExitCode::SUCCESS)
        }
    }
}
