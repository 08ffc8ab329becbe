//! The command line: what clap parses. Values are judged where they are used, in `daemon`, so that
//! a flag and a key of the configuration file get the same message.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use daemon::credentials::{CredentialsConfig, TlsSetting};

use crate::manage::cli as manage;

const ABOUT: &str = "Virtual block storage over NVMe/TCP: a target that serves volumes, and an \
                     emulator that shows a machine a plain local disk.";

const AFTER: &str = "Examples:
  penstock up                                     everything on this machine, to try it
  penstock target --volume db0=file:/srv/db0.img,size=10GiB --listen 0.0.0.0:4420
  penstock emulate --device db0=virtio-blk,socket=/run/db0.sock,connect=192.0.2.7:4420,subnqn=NQN,nsid=1,tls=off
  penstock status --api /run/penstock.sock        what a running target serves, and to whom
  penstock volume attach db1 --spec file:/srv/db1.img,size=10GiB --api /run/penstock.sock
  penstock discover -a 192.0.2.7
  penstock bench --connect 192.0.2.7:4420 --subnqn NQN --nsid 1 --rw randread --iodepth 32

Exit codes: 0 done or stopped in order, 1 failed, 2 wrong use (flags, configuration), 3 data was \
not what was written, 130/143 stopped at once by a second Ctrl-C or SIGTERM.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "penstock", version, about = ABOUT, after_help = AFTER, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to log, to stderr: error, warn, info, debug, trace, or a filter such as
    /// info,nvmf_target=debug. [default: $RUST_LOG, else info; warn for up, discover and bench]
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start target and emulator on this machine with embedded storage, and show what to do next
    #[command(after_help = UP_AFTER)]
    Up(UpArgs),
    /// Serve volumes over NVMe/TCP
    #[command(after_help = TARGET_AFTER)]
    Target(Box<TargetArgs>),
    /// Show remote namespaces as local disks (vhost-user and vfio-user sockets)
    #[command(after_help = EMULATE_AFTER)]
    Emulate(EmulateArgs),
    /// Show what a running target serves, to whom, and which limits were hit
    #[command(after_help = manage::STATUS_AFTER)]
    Status(manage::StatusArgs),
    /// Attach, detach, resize, mask, protect and list volumes of a running target
    #[command(after_help = manage::VOLUME_AFTER)]
    Volume(manage::VolumeArgs),
    /// Show the devices of a running emulator (guests, queues, paths, I/O in flight), attach and
    /// detach namespaces of nvme devices
    #[command(after_help = manage::DEVICE_AFTER)]
    Device(manage::DeviceArgs),
    /// Add, remove, open and list subsystems of a running target
    #[command(after_help = manage::SUBSYSTEM_AFTER)]
    Subsystem(manage::SubsystemArgs),
    /// Set asymmetric namespace access states of a running target
    #[command(after_help = manage::ANA_AFTER)]
    Ana(manage::AnaArgs),
    /// List and disconnect hosts of a running target
    #[command(after_help = manage::HOST_AFTER)]
    Host(manage::HostArgs),
    /// Add, remove and list referrals of a running target
    #[command(after_help = manage::REFERRAL_AFTER)]
    Referral(manage::ReferralArgs),
    /// Make, import, list, rotate, remove and export keys of hosts (TLS, DH-HMAC-CHAP)
    #[command(after_help = crate::manage::KEY_AFTER)]
    Key(crate::manage::KeyArgs),
    /// List what a discovery controller offers
    #[command(after_help = DISCOVER_AFTER)]
    Discover(DiscoverArgs),
    /// Load a local volume or a remote namespace and report IOPS, bandwidth, latency and CPU
    #[command(after_help = BENCH_AFTER)]
    Bench(BenchArgs),
    /// Look at this machine and say what to change so that I/O is fast, and why
    #[command(after_help = TUNE_AFTER)]
    Tune(TuneArgs),
}

const UP_AFTER: &str = "Makes a sparse file for the first volume if there is none, serves it over \
NVMe/TCP and as a disk of either kind (vhost-user-blk and vfio-user sockets), proves the way from the device through the fabric to the \
file with a pattern in a scratch volume of its own (64 MiB, never your data), prints the lines to \
use next, and stays until Ctrl-C. The next start finds the data again.

Examples:
  penstock up
  penstock up --data /srv/penstock --size 20GiB --listen 0.0.0.0:4420 --discovery 0.0.0.0:8009";

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Directory for volumes, identities and the device socket
    #[arg(long, value_name = "DIR", default_value = "./penstock-data")]
    pub(crate) data: PathBuf,
    /// Where I/O controllers listen; may be given more than once
    #[arg(long, value_name = "ADDR:PORT[,advertise=ADDR:PORT]", default_value = "127.0.0.1:4420")]
    pub(crate) listen: Vec<String>,
    /// Where discovery controllers listen; may be given more than once
    #[arg(long, value_name = "ADDR:PORT[,advertise=ADDR:PORT]", default_value = "127.0.0.1:8009")]
    pub(crate) discovery: Vec<String>,
    /// Size of the first volume, where it is created: bytes, or with K, M, G, T (powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) size: String,
    /// Start without the self-check
    #[arg(long)]
    pub(crate) skip_self_check: bool,
    /// Print the lines to use next, and end after the self-check instead of staying
    #[arg(long, conflicts_with = "skip_self_check")]
    pub(crate) check_only: bool,
}

const TARGET_AFTER: &str = "SPEC is one of
  file:PATH[,size=SIZE]   a file; created or extended to SIZE if given
  blockdev:PATH           a block device
  ram:SIZE                memory, lost at the end
  null:SIZE               nothing: reads give zeros, writes are dropped (for measurements)
each with ,block=512|4096 for the logical block size (bytes); the first two with ,poll to
poll the device's queues instead of waiting for interrupts, and with ,ro to refuse
writes. SIZE: bytes, or with K, M, G, T, P (powers of 1024; KiB and so on are the same). A comma in
PATH is written twice.

advertise= is the address the discovery log tells hosts, where they reach the listener by another
one (NAT, containers).

Examples:
  penstock target --volume db0=file:/srv/db0.img,size=10GiB --listen 0.0.0.0:4420 \\
      --discovery 0.0.0.0:8009 --data /var/lib/penstock
  penstock target --volume t=null:1TiB --listen 127.0.0.1:4420 --cores 1
  penstock target --volume a=ram:1GiB --listen 127.0.0.1:4420 --api /run/penstock.sock
  penstock target --volume a=ram:1GiB --listen 127.0.0.1:4420 --api-listen 192.0.2.7:8443 \\
      --api-cert server.pem --api-key server.key --api-client-ca operators.pem
  penstock target --config /etc/penstock.toml";

#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// A volume to serve, as one namespace; may be given more than once
    #[arg(long, value_name = "NAME=SPEC")]
    pub(crate) volume: Vec<String>,
    /// Where I/O controllers listen; may be given more than once. With auth=required every host has to
    /// prove itself by DH-HMAC-CHAP, by default those that there is a secret for
    #[arg(
        long,
        value_name = "ADDR:PORT[,advertise=ADDR:PORT][,tls=off|allowed|required]\
                      [,auth=registered|required]"
    )]
    pub(crate) listen: Vec<String>,
    /// Where discovery controllers listen; may be given more than once [default: nowhere]
    #[arg(
        long,
        value_name = "ADDR:PORT[,advertise=ADDR:PORT][,tls=off|allowed|required]\
                      [,auth=registered|required]"
    )]
    pub(crate) discovery: Vec<String>,
    /// NQN of the subsystem [default: kept in --data, or derived from this machine and --listen]
    #[arg(long, value_name = "NQN")]
    pub(crate) subnqn: Option<String>,
    /// Directory to keep identities in [default: none, they are derived from names]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<String>,
    /// Threads that serve connections [default: one for each CPU, up to 4]
    #[arg(long, value_name = "N")]
    pub(crate) cores: Option<String>,
    /// How long these look for work before they sleep, at most: 0 to 10000. More answers requests
    /// that come one at a time sooner and takes more of a processor [default: 50]
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) busy_poll_us: Option<String>,
    /// Largest I/O queue a host may ask for, in entries [default: 128]
    #[arg(long, value_name = "N")]
    pub(crate) queue_entries_max: Option<String>,
    /// Most I/O queues of one association [default: 128]
    #[arg(long, value_name = "N")]
    pub(crate) io_queues_max: Option<String>,
    /// How a volume is shown to hosts; may be given more than once
    #[arg(long, value_name = "VOLUME[,subsystem=NAME][,nsid=N][,ana_group=N][,host=NQN]...")]
    pub(crate) namespace: Vec<String>,
    /// A subsystem besides the first one; may be given more than once
    #[arg(long, value_name = "NAME[,nqn=NQN][,host=NQN]...")]
    pub(crate) subsystem: Vec<String>,
    /// ANA state of a group to begin with; may be given more than once [default: optimized]
    #[arg(long, value_name = "group=N,state=STATE[,port=N]")]
    pub(crate) ana: Vec<String>,
    /// Another discovery controller to send hosts to; may be given more than once
    #[arg(long, value_name = "ADDR:PORT[,nqn=NQN]")]
    pub(crate) referral: Vec<String>,
    /// A bound of what hosts may use, such as connections_per_host=64; may be given more than once
    #[arg(long, value_name = "KEY=N")]
    pub(crate) limit: Vec<String>,
    /// Unique NQN of the discovery subsystem [default: kept in --data, or derived]
    #[arg(long, value_name = "NQN")]
    pub(crate) discovery_nqn: Option<String>,
    /// User to become when the listeners are bound: a name, a number, or UID:GID. Volumes and the
    /// data directory are opened as that user [default: stay who started it]
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Advertise the discovery listeners by multicast DNS
    #[arg(long)]
    pub(crate) mdns: bool,
    /// Hash of in-band authentication, the preferred first: sha256, sha384, sha512 [default: all]
    #[arg(long, value_name = "HASH")]
    pub(crate) auth_hash: Vec<String>,
    /// DH group of in-band authentication, the preferred first: null, ffdhe2048, ffdhe3072,
    /// ffdhe4096, ffdhe6144, ffdhe8192 [default: all]
    #[arg(long, value_name = "GROUP")]
    pub(crate) auth_group: Vec<String>,
    /// Socket of the management API, for `penstock status`, `volume` and so on [default: none]
    #[arg(long, value_name = "PATH")]
    pub(crate) api: Option<String>,
    /// The management API on TCP, too: TLS 1.3, for clients that have a certificate [default: none]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) api_listen: Option<String>,
    /// Certificate of the management API on TCP, with those between it and its authority (PEM)
    #[arg(long, value_name = "FILE")]
    pub(crate) api_cert: Option<String>,
    /// Private key of that certificate (PEM); mode 0600
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key: Option<String>,
    /// Authorities whose clients may use the management API on TCP, for everything (PEM)
    #[arg(long, value_name = "FILE")]
    pub(crate) api_client_ca: Option<String>,
    /// What these authorities have revoked: a list of each, that has not expired (PEM) [default: none]
    #[arg(long, value_name = "FILE")]
    pub(crate) api_client_crl: Option<String>,
    /// Configuration file (TOML); flags add volumes and replace single values
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

const EMULATE_AFTER: &str = "Keys of --device, separated by commas (a value with a comma in it \
needs the configuration file):
  socket=PATH         socket the machine connects to: vhost-user (virtio-blk) or vfio-user (nvme)
  connect=ADDR:PORT   the target; several ways to it are joined by +; @N behind one is its NUMA node
  discover=ADDR:PORT  discovery controllers that tell the ways, in place of connect or beside it
  discover_tls=off    ask them in plaintext [default: as tls= says, with the same keys]
  ports=N             TCP ports that they may lead to, joined by + [default: 4420+8009]
  iopolicy=POLICY     which way an I/O takes: numa, round-robin, queue-depth [default: numa]
  psk=FILE            key for TLS to the target, in a file that nobody else can read
  tls=MODE            required, concat (key by authentication), off [default: required]
  dhchap=FILE         secret of the host for DH-HMAC-CHAP, in such a file
  dhchap_ctrl=FILE    secret that the controller has to prove itself with, in such a file
  subnqn=NQN          the subsystem
  nsid=N              the namespace; those of an nvme device are joined by +, or all: those that the
                      subsystem has, as they come and go
  queues=N            request queues, 1 to 64 [default: 2]
  read_only=true      refuse writes [default: false]
  doorbells=MODE      of an nvme device: trapped (the machine sends each ring), mapped (it writes to
                      shared memory, which is looked at) [default: trapped]
  hostnqn=NQN         who the device is to the target [default: this machine]
  hostid=UUID         host identifier that goes with it [default: the UUID in hostnqn]
  ctrl_loss_tmo=S     fail I/O after S seconds without the target, 0: at once [default: off, it is
                      held]

Examples:
  penstock emulate --device db0=virtio-blk,socket=/run/db0.sock,connect=192.0.2.7:4420,\\
subnqn=nqn.2014-08.com.example:db,nsid=1,queues=4,psk=/etc/penstock/db0.psk
  penstock emulate --device nvme0=nvme,socket=/run/nvme0.sock,\
connect=192.0.2.7:4420+192.0.2.8:4420,subnqn=nqn.2014-08.com.example:db,nsid=1+2,tls=off
  penstock emulate --config /etc/penstock.toml";

#[derive(Debug, Args)]
pub(crate) struct EmulateArgs {
    /// A device to emulate; may be given more than once
    #[arg(
        long,
        value_name = "NAME=TYPE,socket=PATH,connect=ADDR:PORT,subnqn=NQN,nsid=N,psk=FILE[,queues=N]"
    )]
    pub(crate) device: Vec<String>,
    /// Directory to keep the host NQN in, and keys of `penstock key --data` for devices without
    /// psk= or dhchap= [default: none, the NQN is derived from this machine]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<String>,
    /// Threads the devices run on [default: one for each CPU, up to 4]
    #[arg(long, value_name = "N")]
    pub(crate) cores: Option<String>,
    /// How long these look for work before they sleep, at most: 0 to 10000. More answers requests
    /// that come one at a time sooner and takes more of a processor [default: 50]
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) busy_poll_us: Option<String>,
    /// What the process gives up after its start, so that a guest that breaks out of its device
    /// finds nothing: on (as far as the kernel has the means), require (or do not start), off
    /// [default: on]
    #[arg(long, value_name = "MODE")]
    pub(crate) containment: Option<String>,
    /// User to become when the sockets are made: a name, a number, or UID:GID. It then owns the
    /// sockets [default: stay who started it]
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Keep sockets in a process of their own, which starts the emulator again when it dies, and a
    /// new one on SIGHUP: auto (where there is an nvme device, whose guest would hang without), on,
    /// off [default: auto; without a value: on]
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true,
          default_missing_value = "on")]
    pub(crate) supervise: Option<String>,
    /// Be the emulator that a supervisor starts
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
    /// Socket of the management API, for `penstock device` [default: none]
    #[arg(long, value_name = "PATH")]
    pub(crate) api: Option<String>,
    /// Try from inside what a guest that broke out would try, say what was refused, and end
    #[arg(long)]
    pub(crate) check_containment: bool,
    /// Configuration file (TOML); flags add devices and replace single values
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

/// What a command that connects by itself proves itself with. Keys are in files, since every process
/// of the machine can read arguments.
#[derive(Debug, Args)]
pub(crate) struct Credentials {
    /// Connect with TLS, by the key in this file, which nobody else can read [default: in plaintext]
    #[arg(long, value_name = "FILE", conflicts_with = "concat")]
    psk: Option<PathBuf>,
    /// Authenticate with the secret in this file (DH-HMAC-CHAP), which nobody else can read
    #[arg(long, value_name = "FILE")]
    dhchap: Option<PathBuf>,
    /// The secret that the controller has to prove itself with, in such a file
    #[arg(long, value_name = "FILE", requires = "dhchap")]
    dhchap_ctrl: Option<PathBuf>,
    /// Connect with TLS, by a key that the authentication makes (secure channel concatenation)
    #[arg(long, requires = "dhchap")]
    concat: bool,
}

impl Credentials {
    pub(crate) fn config(&self) -> CredentialsConfig {
        CredentialsConfig {
            tls: match (self.concat, &self.psk) {
                (true, _) => TlsSetting::Concat,
                (false, Some(_)) => TlsSetting::Required,
                (false, None) => TlsSetting::Off,
            },
            psk: self.psk.clone(),
            dhchap: self.dhchap.clone(),
            dhchap_ctrl: self.dhchap_ctrl.clone(),
        }
    }
}

const DISCOVER_AFTER: &str = "Examples:
  penstock discover -a 127.0.0.1
  penstock discover -a 192.0.2.7 -s 8009 --json
  penstock discover -a 192.0.2.7 --hostnqn nqn.2014-08.com.example:host-a --psk host-a.psk";

#[derive(Debug, Args)]
pub(crate) struct DiscoverArgs {
    /// IP address of the discovery controller
    #[arg(short = 'a', long = "traddr", value_name = "ADDR")]
    pub(crate) addr: std::net::IpAddr,
    /// Its TCP port
    #[arg(short = 's', long = "trsvcid", value_name = "PORT", default_value_t = 8009,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: u16,
    /// Discovery subsystem to ask [default: the well-known nqn.2014-08.org.nvmexpress.discovery]
    #[arg(short = 'n', long, value_name = "NQN")]
    pub(crate) subnqn: Option<String>,
    /// Ask as this host: a target may show each host something else [default: this machine's]
    #[arg(short = 'q', long, value_name = "NQN")]
    pub(crate) hostnqn: Option<String>,
    #[command(flatten)]
    pub(crate) credentials: Credentials,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Give up after this many seconds without an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) timeout: u64,
}

const BENCH_AFTER: &str = "Writes overwrite what is on the volume. SPEC is as for `penstock target \
--volume`: file:PATH[,size=SIZE], blockdev:PATH, ram:SIZE, null:SIZE.

Examples:
  penstock bench null:1GiB --rw randread --bs 4k --iodepth 128
  penstock bench file:/srv/t.img,size=4GiB --rw randwrite --verify --runtime 30
  penstock bench --connect 127.0.0.1:4420 --subnqn NQN --nsid 1 --rw randrw --mix 70 --jobs 2 --json
  penstock bench null:1GiB --iodepth 1 --breakdown
  penstock bench --connect 127.0.0.1:4420 --subnqn NQN --nsid 1 --breakdown --api /run/penstock.sock";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub(crate) enum Rw {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Random reads
    RandRead,
    /// Random writes
    RandWrite,
    /// Sequential reads and writes
    #[value(name = "rw", alias = "readwrite")]
    Mixed,
    /// Random reads and writes
    #[value(name = "randrw")]
    RandMixed,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Local volume to load, instead of --connect
    #[arg(value_name = "SPEC", required_unless_present = "connect", conflicts_with = "connect")]
    pub(crate) spec: Option<String>,
    /// Target to load
    #[arg(long, value_name = "ADDR:PORT", requires = "subnqn", requires = "nsid")]
    pub(crate) connect: Option<std::net::SocketAddr>,
    /// Subsystem at the target
    #[arg(long, value_name = "NQN", requires = "connect")]
    pub(crate) subnqn: Option<String>,
    /// Namespace in the subsystem
    #[arg(long, value_name = "N", requires = "connect",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nsid: Option<u32>,
    /// Connect as this host [default: this machine's]
    #[arg(long, value_name = "NQN", requires = "connect")]
    pub(crate) hostnqn: Option<String>,
    #[command(flatten)]
    pub(crate) credentials: Credentials,
    /// Use CRC32C data and header digests on the way to the target
    #[arg(long, requires = "connect")]
    pub(crate) digests: bool,
    /// What to do
    #[arg(long, value_name = "WHAT", default_value = "randread")]
    pub(crate) rw: Rw,
    /// Bytes per I/O: a multiple of the volume's block size, with K or M if you like
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    pub(crate) bs: String,
    /// I/Os in flight, of each job
    #[arg(long, value_name = "N", default_value_t = 32,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) iodepth: u32,
    /// Jobs, each a thread with a queue of its own
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) jobs: u16,
    /// Seconds to run
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) runtime: u64,
    /// Bytes from the beginning of the volume to use [default: all of it]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<String>,
    /// Percentage of reads for rw and randrw
    #[arg(long, value_name = "PERCENT", default_value_t = 50,
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) mix: u8,
    /// Write blocks that name their place and generation, and check each block that is read;
    /// afterwards read back everything that was written
    #[arg(long)]
    pub(crate) verify: bool,
    /// Show where each microsecond of a request goes at the target: with SPEC at one in this
    /// process, with --connect at the one whose management API --api names
    #[arg(long)]
    pub(crate) breakdown: bool,
    /// With --breakdown: where the target's management API is, as for `penstock status`
    #[arg(long, value_name = "PATH|URL", env = "PENSTOCK_API")]
    pub(crate) api: Option<String>,
    /// With --breakdown and https: certificate of this client (PEM)
    #[arg(long, value_name = "FILE", env = "PENSTOCK_API_CERT")]
    pub(crate) api_cert: Option<PathBuf>,
    /// With --breakdown and https: private key of that certificate (PEM); mode 0600
    #[arg(long, value_name = "FILE", env = "PENSTOCK_API_KEY")]
    pub(crate) api_key: Option<PathBuf>,
    /// With --breakdown and https: authority of the target's certificate (PEM)
    #[arg(long, value_name = "FILE", env = "PENSTOCK_API_CA")]
    pub(crate) api_ca: Option<PathBuf>,
    /// Seed of the random offsets and of the pattern; a later --verify run needs the same
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

const TUNE_AFTER: &str =
    "Reads /proc and /sys: processors and how they are clocked and sleep, NUMA, \
network interfaces, TCP, io_uring, limits, block devices. Measures nothing and starts nothing.

--apply writes to /proc/sys, /proc/irq and /sys what stands under \"To change\" and can be written \
there, until the next boot, tells of each write and how to undo it, and leaves everything else \
alone. What stands under \"To consider\" depends on what the machine does not show: it is yours to \
do. Limits of processes are set where the service is started.

Examples:
  penstock tune
  penstock tune --json
  sudo penstock tune --apply";

#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    /// Do what can be done while the machine runs, and say how to undo it; needs root
    #[arg(long)]
    pub(crate) apply: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("penstock").chain(line.split_whitespace()))
    }

    fn refusal(line: &str) -> String {
        parse(line).unwrap_err().to_string()
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        let commands = [
            "",
            "up",
            "target",
            "emulate",
            "status",
            "volume",
            "subsystem",
            "ana",
            "host",
            "referral",
            "discover",
            "bench",
            "tune",
        ];
        for command in commands {
            let error = parse(&format!("{command} --help")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DisplayHelp);
            assert_eq!(error.exit_code(), 0);
            let text = error.to_string();
            assert!(text.contains("Examples:\n  penstock "), "{text}");
            let short = parse(&format!("{command} -h")).unwrap_err();
            assert_eq!(short.exit_code(), 0);
        }
        assert_eq!(parse("--version").unwrap_err().exit_code(), 0);
    }

    #[test]
    fn up_has_the_documented_defaults() {
        let Command::Up(up) = parse("up").unwrap().command else { panic!() };
        assert_eq!(up.data, PathBuf::from("./penstock-data"));
        assert_eq!(up.listen, ["127.0.0.1:4420"]);
        assert_eq!(up.discovery, ["127.0.0.1:8009"]);
        assert_eq!(up.size, "1GiB");
    }

    #[test]
    fn bench_takes_a_spec_or_a_target_and_not_both() {
        let text = refusal("bench");
        assert!(text.contains("SPEC"), "{text}");
        let text = refusal("bench null:1M --connect 127.0.0.1:4420 --subnqn a --nsid 1");
        assert!(text.contains("cannot be used with"), "{text}");
        let text = refusal("bench --connect 127.0.0.1:4420");
        assert!(text.contains("--subnqn") && text.contains("--nsid"), "{text}");
        let Command::Bench(bench) = parse("bench null:1M --rw randrw").unwrap().command else {
            panic!()
        };
        assert_eq!((bench.rw, bench.iodepth, bench.jobs), (Rw::RandMixed, 32, 1));
        assert_eq!((bench.runtime, bench.mix, bench.bs.as_str()), (10, 50, "4KiB"));
    }

    #[test]
    fn refusals_name_the_flag_the_value_and_what_is_allowed() {
        for (line, expected) in [
            ("bench null:1M --rw append", &["append", "--rw", "randread, randwrite"][..]),
            ("bench null:1M --iodepth 0", &["0", "--iodepth", "1..=1024"]),
            ("bench null:1M --jobs x", &["x", "--jobs"]),
            ("bench null:1M --mix 101", &["101", "--mix", "0..=100"]),
            ("discover", &["--traddr"]),
            ("discover -a localhost", &["localhost", "--traddr", "IP address"]),
            ("discover -a ::1 -s 0", &["0", "--trsvcid", "1..=65535"]),
            ("volume hosts a", &["--host", "--all", "--none"]),
            ("volume hosts a --all --none", &["--all", "--none"]),
            ("volume list --timeout 0", &["0", "--timeout", "1..="]),
            ("ana set sleepy --group 1", &["sleepy", "optimized, non-optimized"]),
            ("serve", &["serve", "subcommand"]),
            ("target --volumes a=ram:1M", &["--volumes", "--volume"]),
        ] {
            let text = refusal(line);
            for part in expected {
                assert!(text.contains(part), "{part:?} not in the answer to {line:?}:\n{text}");
            }
            assert_eq!(parse(line).unwrap_err().exit_code(), 2);
        }
    }
}
