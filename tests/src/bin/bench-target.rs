//! `cargo xtask bench target` and `bench tls`: the target with a null volume beside the bare loop.
//!
//! All sides serve the same client over loopback on the same two cores, taking turns round by round,
//! so that whatever else the machine does hits all alike. Printed are medians, the spread (lowest to
//! highest round), the ratios of the medians and what they are to reach.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use crypto::TlsKey;
use crypto::psk::{IdentityVersion, Suite};
use it::bench::{self, KeyedHost, SUBNQN, Summary, Target, hostnqn};
use it::link::{Link, Protection, associate};
use it::load::{self, Figures, Workload};
use it::{bare, process};

const SPAN_BYTES: u64 = 64 << 30;
const ENTRIES: u16 = 128;

#[derive(Parser)]
#[command(about = "Compare the target (null volume) with a bare request/response loop")]
struct Args {
    /// Rounds per point; each runs every side once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of one measurement in milliseconds.
    #[arg(long, default_value_t = 300)]
    millis: u64,
    /// What is compared with the bare loop.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "plain,digests,tls128,tls256")]
    sides: Vec<Side>,
    /// Fail when a figure is below this share of its goal.
    #[arg(long, default_value_t = 1.0)]
    at_least: f64,
    /// How often a point below that gets as many rounds again before it counts.
    #[arg(long, default_value_t = 2)]
    again: usize,
    /// The `penstock` binary; default: the one built beside this program.
    #[arg(long)]
    penstock: Option<PathBuf>,
    /// Another `penstock`, such as one built before a change, that is measured in the same rounds; its
    /// ratio to the first is printed and not judged. May be repeated.
    #[arg(long, value_name = "PATH")]
    beside: Vec<PathBuf>,
    /// Most bytes of a write that the targets take along with the command, and the host sends so. More
    /// than that waits until it is asked for, which takes a round trip more than the bare loop's.
    #[arg(long, value_name = "BYTES", default_value_t = 131_072)]
    in_capsule: usize,
    /// Write the table as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only points whose name contains this, such as `read-4k`.
    #[arg(long, default_value = "")]
    only: String,
    /// Another NVMe/TCP target, already running on core 0 with a namespace 1 of 64 GiB that holds
    /// nothing: takes turns with the others.
    #[arg(long, value_name = "ADDR:PORT", requires = "peer_subnqn", requires = "peer_pid")]
    peer: Option<SocketAddr>,
    /// The peer's subsystem, which lets the host
    /// `nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000000` in.
    #[arg(long, value_name = "NQN")]
    peer_subnqn: Option<String>,
    /// The peer's process: it is stopped (SIGSTOP) while it is not its turn, as a peer that spins
    /// takes the core from all others.
    #[arg(long, value_name = "PID")]
    peer_pid: Option<i32>,
    /// The peer's listener with TLS.
    #[arg(long, value_name = "ADDR:PORT", requires = "peer", requires = "peer_key")]
    peer_tls: Option<SocketAddr>,
    /// File with the key (`NVMeTLSkey-1:...`) that the peer has for the host
    /// `nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000103`.
    #[arg(long, value_name = "FILE")]
    peer_key: Option<PathBuf>,
}

/// Who answers, and how the connection is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Side {
    /// The bare loop.
    #[value(skip)]
    Bare,
    /// The target, without protection.
    Plain,
    /// With header and data digests.
    Digests,
    /// With TLS_AES_128_GCM_SHA256.
    Tls128,
    /// With TLS_AES_256_GCM_SHA384.
    Tls256,
    /// The other target, without protection.
    #[value(skip)]
    Peer,
    /// The other target with TLS.
    #[value(skip)]
    PeerTls,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Bare => "bare loop",
            Side::Plain => "plain",
            Side::Digests => "digests",
            Side::Tls128 => "TLS AES-128",
            Side::Tls256 => "TLS AES-256",
            Side::Peer => "peer",
            Side::PeerTls => "peer, TLS",
        }
    }
}

struct Point {
    write: bool,
    block_bytes: usize,
    depth: usize,
}

impl Point {
    fn all() -> impl Iterator<Item = Point> {
        let sizes = [4096, 131_072].into_iter();
        sizes.flat_map(|block_bytes| {
            [false, true].into_iter().flat_map(move |write| {
                [1, 32, 128].into_iter().map(move |depth| Point { write, block_bytes, depth })
            })
        })
    }

    fn name(&self) -> String {
        let kind = if self.write { "write" } else { "read" };
        format!("{kind}-{}k-qd{}", self.block_bytes >> 10, self.depth)
    }

    fn is_small(&self) -> bool {
        self.block_bytes <= 4096
    }

    /// What `side` is to reach at this point.
    fn goals(&self, side: Side) -> Vec<Goal> {
        let by_depth = |of: [f64; 3]| match self.depth {
            1 => of[0],
            2..=32 => of[1],
            _ => of[2],
        };
        let mut goals = Vec::new();
        let mut share = |of, at_least| goals.push(Goal::Share { of, at_least });
        match side {
            Side::Bare | Side::Peer | Side::PeerTls => {}
            Side::Plain if !self.is_small() => share(Side::Bare, 0.90),
            Side::Plain if self.write => share(Side::Bare, by_depth([0.90, 0.85, 0.75])),
            Side::Plain => share(Side::Bare, by_depth([0.90, 0.85, 0.80])),
            Side::Digests if self.is_small() => share(Side::Plain, 0.90),
            Side::Digests => {}
            Side::Tls128 | Side::Tls256 => {
                if !self.is_small() {
                    share(Side::Bare, by_depth([0.55, 0.50, 0.50]));
                    share(Side::Plain, 0.50);
                } else if side == Side::Tls128 {
                    share(Side::Bare, by_depth([0.70, 0.50, 0.50]));
                }
                if self.is_small() && self.depth == 128 {
                    share(Side::Plain, 0.60);
                }
                if self.is_small() && self.depth == 1 {
                    goals.push(Goal::Later { than: Side::Plain, at_most_us: 5.0 });
                }
            }
        }
        if side != Side::Bare && self.is_small() && self.depth == 1 {
            goals.push(Goal::Tail { at_most: 2.0 });
        }
        goals
    }
}

enum Goal {
    /// Of the other side's IOPS.
    Share { of: Side, at_least: f64 },
    /// Median latency beyond the other side's.
    Later { than: Side, at_most_us: f64 },
    /// 99th percentile of latency, in medians.
    Tail { at_most: f64 },
}

impl Goal {
    /// What was reached, in words, and which share of the goal that is. `None`: the other side was
    /// not measured.
    fn judge(
        &self,
        ours: &Figures,
        side: impl Fn(Side) -> Option<Figures>,
    ) -> Option<(String, f64)> {
        Some(match *self {
            Goal::Share { of, at_least } => {
                let ratio = ours.iops / side(of)?.iops;
                (format!("{ratio:.2} of {} (goal {at_least:.2})", of.name()), ratio / at_least)
            }
            Goal::Later { than, at_most_us } => {
                let later = ours.p50_us - side(than)?.p50_us;
                let words = format!("{later:+.1} us to {} (goal {at_most_us:.0})", than.name());
                (words, at_most_us / later.max(f64::MIN_POSITIVE))
            }
            Goal::Tail { at_most } => {
                let tail = ours.p99_us / ours.p50_us;
                (format!("p99 {tail:.1} x p50 (goal {at_most:.0})"), at_most / tail)
            }
        })
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench-target: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "two cores are needed, one for each side; this machine has {cores}");
    let bench = Bench::start(args)?;
    process::pin_to(1).context("pinning the client to core 1")?;
    println!("target: {}", bench.targets[0].command);
    let mut good = true;
    let mut rows = Vec::new();
    for point in Point::all().filter(|point| point.name().contains(&args.only)) {
        let mut rounds = vec![Vec::new(); bench.sides.len()];
        bench.measure(&point, args, &mut rounds)?;
        // Machines are noisy: what is below its goal is measured longer, all rounds counting.
        for _ in 0..args.again {
            if bench
                .judge(&point, &rounds)
                .iter()
                .flatten()
                .all(|(_, share)| *share >= args.at_least)
            {
                break;
            }
            bench.measure(&point, args, &mut rounds)?;
        }
        println!("{}", point.name());
        let judged = bench.judge(&point, &rounds);
        let medians: Vec<((usize, Side), Figures)> = std::iter::zip(&bench.sides, &rounds)
            .map(|(side, rounds)| (*side, Summary::of(rounds.clone()).median))
            .collect();
        for (((build, side), rounds), judged) in bench.sides.iter().zip(&rounds).zip(judged) {
            let Summary { median, low, high } = Summary::of(rounds.clone());
            let mut verdicts = Vec::new();
            verdicts.extend(beside_peer(*side, &median, &medians));
            for (words, share) in &judged {
                let mark = if *share < args.at_least { "BELOW: " } else { "" };
                good &= *share >= args.at_least;
                verdicts.push(format!("{mark}{words}"));
            }
            verdicts.extend(bench.beside((*build, *side), median.iops, &medians));
            println!(
                "  {:<12} {:>9.0} ({:.0}-{:.0})  p50 {:.1} p99 {:.1} us  {}",
                name_of(*build, *side),
                median.iops,
                low,
                high,
                median.p50_us,
                median.p99_us,
                verdicts.join(", ")
            );
            rows.push(serde_json::json!({
                "point": point.name(), "side": name_of(*build, *side), "figures": Summary::of(rounds.clone()).json(),
                "goals": judged.iter().map(|(words, share)| serde_json::json!({
                    "reached": words, "share_of_goal": share })).collect::<Vec<_>>(),
            }));
        }
    }
    good &= bench.check_idle()?;
    good &= bench.check_tenth(args)?;
    good &= bench.check_memory()?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(good)
}

/// The other target.
struct Peer {
    plain: SocketAddr,
    tls: Option<(SocketAddr, KeyedHost)>,
    subnqn: String,
    pid: rustix::process::Pid,
}

/// The host whose key the peer has.
const PEER_HOST: usize = 103;

impl Peer {
    fn new(args: &Args) -> Result<Option<Peer>> {
        let (Some(plain), Some(subnqn), Some(pid)) = (args.peer, &args.peer_subnqn, args.peer_pid)
        else {
            return Ok(None);
        };
        let tls = match (args.peer_tls, &args.peer_key) {
            (Some(addr), Some(file)) => {
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("reading {}", file.display()))?;
                let key = TlsKey::parse(text.trim()).context("the key in --peer-key")?;
                let nqn = hostnqn(PEER_HOST);
                Some((addr, KeyedHost::new(nqn, &key, IdentityVersion::V0, subnqn)?))
            }
            _ => None,
        };
        let pid = rustix::process::Pid::from_raw(pid).context("--peer-pid: not a process")?;
        let peer = Peer { plain, tls, subnqn: subnqn.clone(), pid };
        peer.signal(rustix::process::Signal::STOP)?;
        Ok(Some(peer))
    }

    fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        rustix::process::kill_process(self.pid, signal).context("the peer's process")
    }

    /// The peer's turn.
    fn measure(&self, side: Side, point: &Point, time: Duration) -> Result<Figures> {
        self.signal(rustix::process::Signal::CONT)?;
        let found = self.measure_running(side, point, time);
        self.signal(rustix::process::Signal::STOP)?;
        found
    }

    fn measure_running(&self, side: Side, point: &Point, time: Duration) -> Result<Figures> {
        let (addr, nqn, protection) = match &self.tls {
            Some((addr, host)) if side == Side::PeerTls => {
                (*addr, host.nqn.clone(), host.protection.clone())
            }
            _ => (self.plain, hostnqn(0), Protection::None),
        };
        let mut association = associate(addr, (&self.subnqn, &nqn), ENTRIES, 1, &protection)
            .with_context(|| format!("connecting to the peer at {addr}"))?;
        Ok(load::run(&mut association.io, &workload(point, 8192), time)?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.signal(rustix::process::Signal::CONT);
    }
}

/// How much of the peer's IOPS a side has, if there is a peer to compare it with.
fn beside_peer(side: Side, ours: &Figures, medians: &[((usize, Side), Figures)]) -> Option<String> {
    let of = match side {
        Side::Plain => Side::Peer,
        Side::Tls128 => Side::PeerTls,
        _ => return None,
    };
    let (_, theirs) = medians.iter().find(|((_, side), _)| *side == of)?;
    Some(format!("{:.2} of {}", ours.iops / theirs.iops, of.name()))
}

/// The name of a side of build number `build`.
fn name_of(build: usize, side: Side) -> String {
    if build == 0 { side.name().to_owned() } else { format!("{} #{build}", side.name()) }
}

struct Bench {
    /// The first is the one under test.
    targets: Vec<Target>,
    /// Each with the number of its target.
    sides: Vec<(usize, Side)>,
    hosts: Vec<(usize, Side, KeyedHost)>,
    in_capsule: usize,
    peer: Option<Peer>,
}

impl Bench {
    fn start(args: &Args) -> Result<Bench> {
        let volumes = [format!("bench=null:{}GiB", SPAN_BYTES >> 30)];
        let more = ["--limit".to_owned(), format!("in_capsule_bytes={}", args.in_capsule)];
        let mut targets = Vec::new();
        for binary in std::iter::once(args.penstock.as_deref())
            .chain(args.beside.iter().map(|binary| Some(binary.as_path())))
        {
            targets.push(Target::start_with(&bench::binary(binary)?, &volumes, ENTRIES, &more)?);
        }
        let mut hosts = Vec::new();
        let suites =
            [(Side::Tls128, Suite::Aes128GcmSha256), (Side::Tls256, Suite::Aes256GcmSha384)];
        for (build, target) in targets.iter().enumerate() {
            for (n, (side, suite)) in suites.into_iter().enumerate() {
                if args.sides.contains(&side) {
                    hosts.push((build, side, target.add_host(101 + n, suite)?));
                }
            }
        }
        let mut sides = vec![(0, Side::Bare)];
        for side in &args.sides {
            sides.extend((0..targets.len()).map(|build| (build, *side)));
        }
        let peer = Peer::new(args)?;
        if let Some(peer) = &peer {
            sides.push((0, Side::Peer));
            sides.extend(peer.tls.as_ref().map(|_| (0, Side::PeerTls)));
        }
        Ok(Bench { targets, sides, hosts, in_capsule: args.in_capsule, peer })
    }

    /// What another build reaches of the one under test.
    fn beside(
        &self,
        (build, side): (usize, Side),
        iops: f64,
        all: &[((usize, Side), Figures)],
    ) -> Option<String> {
        let (_, first) = all.iter().find(|(of, _)| build > 0 && *of == (0, side))?;
        Some(format!("{:.3} of {}", iops / first.iops, side.name()))
    }

    /// Adds `args.rounds` rounds to all sides, which take turns.
    fn measure(&self, point: &Point, args: &Args, rounds: &mut [Vec<Figures>]) -> Result<()> {
        // One discarded round warms caches, socket buffers and the pool. Each round begins with
        // another side, so that none always follows the same one.
        let count = self.sides.len();
        for round in 0..=args.rounds {
            let time = Duration::from_millis(if round == 0 { 100 } else { args.millis });
            for at in (0..count).map(|turn| (round + turn) % count) {
                let (build, side) = &self.sides[at];
                let figures = match side {
                    Side::Bare => measure_bare(point, time),
                    Side::Peer | Side::PeerTls => {
                        let peer = self.peer.as_ref().context("there is no peer")?;
                        peer.measure(*side, point, time)
                    }
                    _ => self.measure_target((*build, *side), point, time),
                };
                let figures =
                    figures.with_context(|| format!("{} ({})", point.name(), side.name()))?;
                if round > 0 {
                    rounds[at].push(figures);
                }
            }
        }
        Ok(())
    }

    /// What each side reached of its goals.
    fn judge(&self, point: &Point, rounds: &[Vec<Figures>]) -> Vec<Vec<(String, f64)>> {
        let medians: Vec<Figures> =
            rounds.iter().map(|rounds| Summary::of(rounds.clone()).median).collect();
        let of = |side| self.sides.iter().position(|s| *s == (0, side)).map(|at| medians[at]);
        let judge = |((build, side), ours): (&(usize, Side), &Figures)| {
            let goals = if *build == 0 { point.goals(*side) } else { Vec::new() };
            goals.iter().filter_map(|goal| goal.judge(ours, of)).collect()
        };
        self.sides.iter().zip(&medians).map(judge).collect()
    }

    fn measure_target(
        &self,
        (build, side): (usize, Side),
        point: &Point,
        time: Duration,
    ) -> Result<Figures> {
        let target = &self.targets[build];
        let host = self.hosts.iter().find(|(of, its, _)| (*of, *its) == (build, side));
        let (nqn, addr, protection) = match (side, host) {
            (_, Some((_, _, host))) => (host.nqn.clone(), target.tls, host.protection.clone()),
            (Side::Digests, _) => (hostnqn(0), target.plain, Protection::Digests),
            _ => (hostnqn(0), target.plain, Protection::None),
        };
        let mut association = associate(addr, (SUBNQN, &nqn), ENTRIES, 1, &protection)
            .with_context(|| format!("connecting to the target at {addr}"))?;
        Ok(load::run(&mut association.io, &workload(point, self.in_capsule), time)?)
    }

    /// Ten hosts connected and silent: under 1 % of a core.
    fn check_idle(&self) -> Result<bool> {
        let hosts = (1..=10)
            .map(|n| {
                let names = (SUBNQN, &*hostnqn(n));
                associate(self.targets[0].plain, names, ENTRIES, 1, &Protection::None)
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let pid = self.targets[0].pid();
        // The clock of the measurement is the condition here: let three seconds of idleness pass.
        let (start, busy) = (Instant::now(), process::cpu_time(pid)?);
        process::wait_for(
            Duration::from_secs(5),
            || Ok(start.elapsed() >= Duration::from_secs(3)),
        )?;
        let share = (process::cpu_time(pid)? - busy).as_secs_f64() / start.elapsed().as_secs_f64();
        println!("idle with {} hosts connected: {:.2} % of a core", hosts.len(), share * 100.0);
        Ok(share < 0.01)
    }

    /// Bursts at a tenth of the rate that they could have: at most 20 % of a core.
    fn check_tenth(&self, args: &Args) -> Result<bool> {
        let time = Duration::from_millis(args.millis);
        let (target, mut good) = (&self.targets[0], true);
        for depth in [32, 128] {
            let names = (SUBNQN, &*hostnqn(0));
            let mut association = associate(target.plain, names, ENTRIES, 1, &Protection::None)?;
            let point = Point { write: false, block_bytes: 4096, depth };
            let mut work = workload(&point, self.in_capsule);
            let full = load::run(&mut association.io, &work, time)?.iops;
            work.interval = Duration::from_secs_f64(10.0 * depth as f64 / full);
            // Long enough for a clock that ticks every 10 ms.
            let (start, busy) = (Instant::now(), process::cpu_time(target.pid())?);
            let rate = load::run(&mut association.io, &work, Duration::from_secs(2))?.iops;
            let used = process::cpu_time(target.pid())? - busy;
            let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
            println!(
                "bursts of {depth}, {:.0} of {:.0} kIOPS: {:.1} % of a core (goal 20)",
                rate / 1e3,
                full / 1e3,
                share * 100.0
            );
            good &= share * args.at_least < 0.20;
        }
        Ok(good)
    }

    fn check_memory(&self) -> Result<bool> {
        let mib = process::resident_bytes(self.targets[0].pid())? as f64 / (1 << 20) as f64;
        println!("resident memory after the runs: {mib:.1} MiB");
        Ok(mib < 64.0)
    }
}

fn workload(point: &Point, in_capsule: usize) -> Workload {
    Workload {
        write: point.write,
        block_bytes: point.block_bytes,
        depth: point.depth,
        in_capsule: point.block_bytes <= in_capsule,
        span_bytes: SPAN_BYTES,
        lba_bytes: 512,
        namespaces: 1,
        interval: Duration::ZERO,
    }
}

fn measure_bare(point: &Point, time: Duration) -> Result<Figures> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let (block_bytes, server_stop) = (point.block_bytes, Arc::clone(&stop));
    let server = std::thread::spawn(move || -> Result<()> {
        process::pin_to(0)?;
        let (stream, _) = listener.accept()?;
        bare::serve(stream, block_bytes, &server_stop)?;
        Ok(())
    });
    let mut links = [Link::bare(addr)?];
    let figures = load::run(&mut links, &workload(point, usize::MAX), time);
    stop.store(true, Ordering::Relaxed);
    drop(links);
    server.join().map_err(|_| anyhow::anyhow!("the bare loop panicked"))??;
    Ok(figures?)
}
