//! The command line of the management commands.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// Where the management API is, and how answers are printed.
#[derive(Debug, Args)]
pub(crate) struct Connection {
    /// Where the running target is: what it was given as --api PATH, or https://HOST:PORT of its
    /// --api-listen
    #[arg(
        long,
        value_name = "PATH|URL",
        env = "PENSTOCK_API",
        default_value = "./penstock-api.sock"
    )]
    pub(crate) api: String,
    /// With https: certificate of this client, with those between it and its authority (PEM)
    #[arg(long, value_name = "FILE", env = "PENSTOCK_API_CERT")]
    pub(crate) api_cert: Option<PathBuf>,
    /// With https: private key of that certificate (PEM); mode 0600
    #[arg(long, value_name = "FILE", env = "PENSTOCK_API_KEY")]
    pub(crate) api_key: Option<PathBuf>,
    /// With https: authority of the target's certificate (PEM)
    #[arg(long, value_name = "FILE", env = "PENSTOCK_API_CA")]
    pub(crate) api_ca: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Wait this many seconds for I/O admitted before a change to end
    #[arg(long, value_name = "SECONDS", default_value_t = api::TIMEOUT_S,
          value_parser = clap::value_parser!(u64).range(1..=api::TIMEOUT_S_MAX))]
    pub(crate) timeout: u64,
}

/// Who may use something.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Who {
    /// Only this host; may be given more than once
    #[arg(long, value_name = "NQN")]
    pub(crate) host: Vec<String>,
    /// Every host
    #[arg(long)]
    pub(crate) all: bool,
    /// No host
    #[arg(long)]
    pub(crate) none: bool,
}

impl Who {
    /// As the API has it: `None` is every host.
    pub(crate) fn hosts(&self) -> Option<Vec<String>> {
        (!self.all).then(|| self.host.clone())
    }
}

pub(crate) const STATUS_AFTER: &str = "Examples:
  penstock status --api /run/penstock.sock
  penstock status --json
  penstock status --api https://storage-1.example.com:8443 --api-cert me.pem --api-key me.key \\
      --api-ca authority.pem";

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

pub(crate) const DEVICE_AFTER: &str = "Examples:
  penstock device list --api /run/emulate.sock
  penstock device show db0 --api /run/emulate.sock --json
  penstock device attach nvme0 --nsid 3 --api /run/emulate.sock
  penstock device detach nvme0 --nsid 3 --api /run/emulate.sock";

#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    #[command(subcommand)]
    pub(crate) action: DeviceAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceAction {
    /// List the devices of an emulator
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Show one device in full
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Give a device other keys, for its next connections; those that exist stay, and their I/O
    #[command(after_help = REKEY_AFTER)]
    Rekey {
        /// Its name
        name: String,
        /// Keys for TLS, in a file that nobody else can read
        #[arg(long, value_name = "FILE", required_unless_present_any = ["dhchap", "dhchap_ctrl", "data"])]
        psk: Option<PathBuf>,
        /// Secret of the host for DH-HMAC-CHAP, in such a file
        #[arg(long, value_name = "FILE")]
        dhchap: Option<PathBuf>,
        /// Secret that the controller has to prove itself with, in such a file
        #[arg(long, value_name = "FILE")]
        dhchap_ctrl: Option<PathBuf>,
        /// Data directory of the emulator (its --data), for what no file is given for
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// Authenticate again at once on the connections that exist; what the target does not let go
        /// on is lost, and made anew
        #[arg(long)]
        reauthenticate: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Attach a namespace of its target to an nvme device; its machine is told
    ///
    /// Ends when the machine can use it. What is attached so lasts as long as the emulator.
    Attach {
        /// The device's name
        name: String,
        /// Namespace ID at the target, and at the device: 1 to 256
        #[arg(long, value_name = "N")]
        nsid: u32,
        #[command(flatten)]
        connection: Connection,
    },
    /// Take a namespace from an nvme device; its machine is told
    ///
    /// I/O that waits for it ends with an error. A device with nsid=all does not take it back before
    /// it is attached again so, or the emulator starts anew.
    Detach {
        /// The device's name
        name: String,
        /// Namespace ID
        #[arg(long, value_name = "N")]
        nsid: u32,
        #[command(flatten)]
        connection: Connection,
    },
}

const REKEY_AFTER: &str =
    "The emulator keeps the keys in memory alone: it cannot open files. At its \
next start it reads its own (psk=, dhchap=, dhchap_ctrl=, --data), so change these first and name them here.

Examples:
  penstock device rekey db0 --psk /etc/penstock/db0.psk --api /run/penstock/emulate.sock
  penstock device rekey db0 --dhchap /etc/penstock/db0.dhchap --reauthenticate
  penstock key import --data /var/lib/penstock --host NQN <new.psk
  penstock device rekey db0 --data /var/lib/penstock";

pub(crate) const VOLUME_AFTER: &str = "A change has happened when the command ends: no I/O of \
before can land any more.

Examples:
  penstock volume list
  penstock volume attach db1 --spec file:/srv/db1.img,size=10GiB
  penstock volume resize db1 --size 20GiB
  penstock volume hosts db1 --host nqn.2014-08.com.example:host-a
  penstock volume detach db1";

#[derive(Debug, Args)]
pub(crate) struct VolumeArgs {
    #[command(subcommand)]
    pub(crate) action: VolumeAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeAction {
    /// List the volumes
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Serve a volume
    Attach {
        /// Its name; its identity is kept by it
        name: String,
        /// What is behind it, as for `penstock target --volume`; may be left out for a volume of
        /// the configuration that was detached
        #[arg(long, value_name = "SPEC")]
        spec: Option<String>,
        /// Name of its subsystem [default: the first]
        #[arg(long, value_name = "NAME")]
        subsystem: Option<String>,
        /// Namespace ID [default: the one it had, or the next free one]
        #[arg(long, value_name = "N")]
        nsid: Option<u32>,
        /// ANA group [default: 1]
        #[arg(long, value_name = "N")]
        ana_group: Option<u32>,
        /// Only this host sees it; may be given more than once [default: every host]
        #[arg(long, value_name = "NQN")]
        host: Vec<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Serve a volume no longer; what is stored in it stays
    Detach {
        /// Its name
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Look at the size of the file or device again, or grow a file
    Resize {
        /// Its name
        name: String,
        /// New size of a file: bytes, or with K, M, G, T, P (powers of 1024)
        #[arg(long, value_name = "SIZE")]
        size: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Say which hosts see a volume
    Hosts {
        /// Its name
        name: String,
        #[command(flatten)]
        who: Who,
        #[command(flatten)]
        connection: Connection,
    },
    /// Refuse writes
    Protect {
        /// Its name
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Take writes again
    Unprotect {
        /// Its name
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Move a volume to another ANA group
    Move {
        /// Its name
        name: String,
        /// The group, 1 to 128
        #[arg(long, value_name = "N")]
        ana_group: u32,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(crate) const SUBSYSTEM_AFTER: &str = "Examples:
  penstock subsystem list
  penstock subsystem add tenant-a --host nqn.2014-08.com.example:host-a
  penstock subsystem hosts tenant-a --all
  penstock subsystem remove tenant-a";

#[derive(Debug, Args)]
pub(crate) struct SubsystemArgs {
    #[command(subcommand)]
    pub(crate) action: SubsystemAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SubsystemAction {
    /// List the subsystems
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Make a subsystem
    Add {
        /// Its name here
        name: String,
        /// Its NQN [default: one is made and kept]
        #[arg(long, value_name = "NQN")]
        nqn: Option<String>,
        /// Only this host may connect; may be given more than once [default: every host]
        #[arg(long, value_name = "NQN")]
        host: Vec<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Remove a subsystem
    Remove {
        /// Its name
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Say which hosts may connect
    Hosts {
        /// Its name
        name: String,
        #[command(flatten)]
        who: Who,
        #[command(flatten)]
        connection: Connection,
    },
}

/// State of an ANA group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum State {
    /// Served, the best way
    Optimized,
    /// Served, there may be a better way
    NonOptimized,
    /// Not served here for now
    Inaccessible,
    /// Not served here any more; there is no way back for hosts that are connected
    PersistentLoss,
    /// About to change; hosts wait
    Change,
}

pub(crate) const ANA_AFTER: &str = "Examples:
  penstock ana set inaccessible --port 1 --group 1
  penstock ana set optimized --group 1";

#[derive(Debug, Args)]
pub(crate) struct AnaArgs {
    #[command(subcommand)]
    pub(crate) action: AnaAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AnaAction {
    /// Set the state of a group
    Set {
        /// The state
        state: State,
        /// The group, 1 to 128
        #[arg(long, value_name = "N")]
        group: u32,
        /// Port ID, as `penstock status` shows it [default: every I/O port]
        #[arg(long, value_name = "N")]
        port: Option<u16>,
        /// Name of the subsystem [default: every one]
        #[arg(long, value_name = "NAME")]
        subsystem: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(crate) const HOST_AFTER: &str = "Examples:
  penstock host list
  penstock host disconnect nqn.2014-08.com.example:host-a";

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    #[command(subcommand)]
    pub(crate) action: HostAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostAction {
    /// List the hosts that are connected
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// End the associations of a host, which may connect again
    Disconnect {
        /// Host NQN
        hostnqn: String,
        /// Name of the subsystem [default: every one]
        #[arg(long, value_name = "NAME")]
        subsystem: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(crate) const REFERRAL_AFTER: &str = "Examples:
  penstock referral add 192.0.2.9:8009
  penstock referral remove 192.0.2.9:8009";

#[derive(Debug, Args)]
pub(crate) struct ReferralArgs {
    #[command(subcommand)]
    pub(crate) action: ReferralAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReferralAction {
    /// List the referrals
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Send hosts to another discovery controller, too
    Add {
        /// ADDR:PORT of the discovery controller
        addr: String,
        /// Its NQN [default: the well-known one]
        #[arg(long, value_name = "NQN")]
        nqn: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Send hosts there no longer
    Remove {
        /// ADDR:PORT of the discovery controller
        addr: String,
        #[command(flatten)]
        connection: Connection,
    },
}
