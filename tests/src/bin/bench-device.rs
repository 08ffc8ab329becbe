//! `cargo xtask bench device`: the emulated disks beside a peer, beside each other and beside the bare
//! initiator, one run.
//!
//! ```text
//!  local     core 0: penstock emulate or qemu-storage-daemon, a null volume
//!            core 1: this process, one ring, 4 KiB, spinning
//!  fabric    core 0: penstock target, a null volume
//!            core 1: guest, device and initiator; or the initiator alone   (it::guest::inside)
//! ```
//!
//! The sides of a table take turns round by round, so that whatever else the machine does hits all
//! alike. Printed are medians, the spread (lowest to highest round), ratios of medians, and goals.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use it::bench::{self, SUBNQN, Summary, Target};
use it::guest::inside::{Face, Inside};
use it::guest::nvme::NvmeDisk;
use it::guest::virtio::VirtioDisk;
use it::guest::{self, Driver, Work};
use it::load::Figures;
use it::{process, turns};

const SPAN_BYTES: u64 = 64 << 30;
const START: Duration = Duration::from_secs(20);

#[derive(Parser)]
#[command(about = "Compare the emulated disks with qemu-storage-daemon and the bare initiator")]
struct Args {
    /// Rounds per point; each runs every side once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of one measurement in milliseconds.
    #[arg(long, default_value_t = 400)]
    millis: u64,
    /// The parts to run: local, fabric, fio, load.
    #[arg(long, value_delimiter = ',', default_value = "local,fabric,fio,load")]
    parts: Vec<String>,
    /// Only points whose name contains this, such as `read-4k-qd1`.
    #[arg(long, default_value = "")]
    only: String,
    /// Scale of the goals: 0 asks for nothing.
    #[arg(long, default_value_t = 1.0)]
    goals: f64,
    /// The `penstock` binary; default: the one built beside this program.
    #[arg(long)]
    penstock: Option<PathBuf>,
    /// qemu-storage-daemon, with what runs it; each word by itself.
    #[arg(long, num_args = 1, allow_hyphen_values = true)]
    qsd: Vec<String>,
    /// fio with its libblkio engine, in the same way.
    #[arg(long, num_args = 1, allow_hyphen_values = true)]
    fio: Vec<String>,
    /// Write the tables as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy)]
struct Point {
    name: &'static str,
    write: bool,
    depth: u16,
    /// Least ratio of our virtio-blk to the peer.
    peer: f64,
    /// Least IOPS of our virtio-blk, on a quiet machine of the kind the goals were set on.
    iops: f64,
}

const POINTS: [Point; 6] = [
    Point { name: "read-4k-qd1", write: false, depth: 1, peer: 9.0, iops: 0.5e6 },
    Point { name: "read-4k-qd32", write: false, depth: 32, peer: 1.2, iops: 1.6e6 },
    Point { name: "read-4k-qd128", write: false, depth: 128, peer: 1.2, iops: 1.7e6 },
    Point { name: "write-4k-qd1", write: true, depth: 1, peer: 9.0, iops: 0.5e6 },
    Point { name: "write-4k-qd32", write: true, depth: 32, peer: 1.2, iops: 1.6e6 },
    Point { name: "write-4k-qd128", write: true, depth: 128, peer: 1.2, iops: 1.7e6 },
];
const PEER: &str = "qemu-storage-daemon";
const PEER_POLLING: &str = "the same, iothread";
/// Least ratio of a disk through the fabric to the bare initiator.
const FABRIC: f64 = 0.80;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench-device: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "two cores are needed, one for each side; this machine has {cores}");
    let binary = bench::binary(args.penstock.as_deref())?;
    let dir = tempfile::tempdir()?;
    let bench = Bench { args, binary, dir: dir.path().to_path_buf() };
    let has = |part: &str| args.parts.iter().any(|one| one == part);
    let (mut good, mut rows) = (true, Vec::new());
    if has("fabric") {
        good &= bench.fabric(&mut rows)?;
    }
    if has("local") || has("fio") || has("load") {
        process::pin_to(1).context("pinning the guest to core 1")?;
    }
    if has("local") {
        good &= bench.local(&mut rows)?;
    }
    if has("fio") {
        bench.fio(&mut rows)?;
    }
    if has("load") {
        good &= bench.load(&mut rows)?;
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(good)
}

/// Thousands of I/Os a second with the spread, and microseconds at the median and at 99 %.
fn text(summary: &Summary) -> String {
    let Figures { iops, p50_us, p99_us } = summary.median;
    format!(
        "{:>6.0} ({:>4.0}-{:<4.0}) {p50_us:>6.1}/{p99_us:<6.1}",
        iops / 1e3,
        summary.low / 1e3,
        summary.high / 1e3
    )
}

/// Shares of a core, one a round.
#[derive(Default)]
struct Shares(Vec<f64>);

impl Shares {
    fn add(&mut self, share: f64) {
        self.0.push(share);
    }

    /// Median, lowest and highest.
    fn summary(&self) -> (f64, f64, f64) {
        let low = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.0.iter().copied().fold(0.0, f64::max);
        (turns::median(&self.0), low, high)
    }
}

/// A side of a table: its name, and what runs a piece of work.
type Side<'a> = (&'a str, Box<dyn FnMut(Work, Duration) -> Result<Figures> + 'a>);

struct Bench<'a> {
    args: &'a Args,
    binary: PathBuf,
    dir: PathBuf,
}

impl Bench<'_> {
    fn points(&self) -> impl Iterator<Item = &'static Point> + '_ {
        POINTS.iter().filter(|point| point.name.contains(&self.args.only))
    }

    /// Each side once per round, after a short one that warms caches. Each round begins with another
    /// side, so that none always follows the same one.
    fn measure(&self, point: &Point, sides: &mut [Side<'_>]) -> Result<Vec<Summary>> {
        let work = Work {
            write: point.write,
            depth: point.depth,
            span_bytes: SPAN_BYTES,
            pause: Duration::ZERO,
        };
        let count = sides.len();
        let mut rounds = vec![Vec::new(); count];
        for round in 0..=self.args.rounds {
            let time = Duration::from_millis(if round == 0 { 100 } else { self.args.millis });
            for at in (0..count).map(|turn| (round + turn) % count) {
                let (name, run) = &mut sides[at];
                let measured =
                    run(work, time).with_context(|| format!("{} on {name}", point.name))?;
                if round > 0 {
                    rounds[at].push(measured);
                }
            }
        }
        Ok(rounds.into_iter().map(Summary::of).collect())
    }

    fn heading(title: &str, sides: &[Side<'_>], rest: &str) {
        println!("\n{title}; kIOPS (lowest-highest) us p50/p99");
        let mut line = format!("{:<15}", "point");
        for (name, _) in sides {
            // Writing to a string does not fail.
            let _ = write!(line, " {name:^33}");
        }
        println!("{line} {rest}");
    }

    fn row(
        &self,
        part: &str,
        point: &Point,
        sides: &[Side<'_>],
        summaries: &[Summary],
        rest: &str,
        rows: &mut Vec<serde_json::Value>,
    ) {
        let mut line = format!("{:<15}", point.name);
        let mut row = serde_json::json!({ "part": part, "point": point.name });
        for ((name, _), summary) in sides.iter().zip(summaries) {
            let _ = write!(line, " {:<33}", text(summary));
            row[*name] = summary.json();
        }
        println!("{line} {rest}");
        rows.push(row);
    }

    /// Whether a ratio is as large as wanted, and the text for it.
    fn judge(&self, what: &str, ratio: f64, goal: f64, good: &mut bool) -> String {
        let is_good = ratio >= goal * self.args.goals;
        *good &= is_good;
        let verdict = if is_good { "" } else { " BELOW THE GOAL" };
        format!("{what} {ratio:.2} (goal {goal}){verdict}")
    }

    /// Devices with a null volume of their own, and the peer.
    fn local(&self, rows: &mut Vec<serde_json::Value>) -> Result<bool> {
        let (virtio, nvme) = (self.emulator("virtio-blk")?, self.emulator("nvme")?);
        println!("penstock: {}", virtio.command);
        let (peer, polling) = (self.peer(false)?, self.peer(true)?);
        let mut virtio_driver = attach(&virtio, VirtioDisk::attach)?.driver()?;
        let mut nvme_driver = attach(&nvme, NvmeDisk::attach)?.driver()?;
        let driver = |peer: &Option<Server>| -> Result<_> {
            let Some(peer) = peer else { return Ok(None) };
            Ok(Some(attach(peer, VirtioDisk::attach)?.driver()?))
        };
        let (mut peer_driver, mut polling_driver) = (driver(&peer)?, driver(&polling)?);
        let mut sides: Vec<Side<'_>> =
            vec![("virtio-blk", side(&mut virtio_driver)), ("nvme", side(&mut nvme_driver))];
        if let Some(driver) = &mut peer_driver {
            sides.push((PEER, side(driver)));
        }
        if let Some(driver) = &mut polling_driver {
            sides.push((PEER_POLLING, side(driver)));
        }
        Self::heading("local null volume", &sides, "ratios");
        let mut good = true;
        for point in self.points() {
            let summaries = self.measure(point, &mut sides)?;
            let iops = |at: usize| summaries.get(at).map(|summary| summary.median.iops);
            let (virtio, nvme) = (iops(0).unwrap_or(0.0), iops(1).unwrap_or(0.0));
            let mut rest = match iops(2) {
                Some(peer) => {
                    self.judge("virtio/peer", virtio / peer, point.peer, &mut good) + ", "
                }
                None => String::new(),
            };
            if let Some(polling) = iops(3) {
                let _ = write!(rest, "virtio/iothread {:.2}, ", virtio / polling);
            }
            let _ = write!(rest, "nvme/virtio {:.2}, ", nvme / virtio);
            rest += &self.judge("virtio, MIOPS", virtio / 1e6, point.iops / 1e6, &mut good);
            self.row("local", point, &sides, &summaries, &rest, rows);
        }
        Ok(good)
    }

    /// Devices whose volume is at a target, and the initiator without a device.
    fn fabric(&self, rows: &mut Vec<serde_json::Value>) -> Result<bool> {
        let target = Target::start(&self.binary, &["bench=null:64GiB".to_owned()], 256)?;
        println!("target: {}", target.command);
        let addr = target.plain;
        let bare = self.inside(Face::Bare, addr)?;
        let virtio = self.inside(Face::VirtioBlk, addr)?;
        let nvme = self.inside(Face::Nvme, addr)?;
        let mut sides: Vec<Side<'_>> = vec![
            ("bare initiator", Box::new(|work, time| bare.run(work, time))),
            ("virtio-blk", Box::new(|work, time| virtio.run(work, time))),
            ("nvme", Box::new(|work, time| nvme.run(work, time))),
        ];
        Self::heading("through the fabric, guest on the emulator's core", &sides, "ratios to bare");
        let mut good = true;
        for point in self.points() {
            let summaries = self.measure(point, &mut sides)?;
            let [bare, virtio, nvme] = &summaries[..] else { bail!("three sides") };
            let mut rest = String::new();
            for (name, side) in [("virtio", virtio), ("nvme", nvme)] {
                let ratio = side.median.iops / bare.median.iops;
                let _ = write!(rest, "{}, ", self.judge(name, ratio, FABRIC, &mut good));
                if point.depth == 1 {
                    let (p50, p99) = (
                        side.median.p50_us - bare.median.p50_us,
                        side.median.p99_us - bare.median.p99_us,
                    );
                    let _ = write!(rest, "adds {p50:+.2}/{p99:+.2} us, ");
                }
            }
            self.row("fabric", point, &sides, &summaries, rest.trim_end_matches(", "), rows);
        }
        Ok(good)
    }

    /// A second judge: fio's libblkio engine, on our virtio-blk and on the peer.
    fn fio(&self, rows: &mut Vec<serde_json::Value>) -> Result<()> {
        if self.args.fio.is_empty() {
            println!("\nfio: skipped, no fio with a libblkio engine was given (--fio)");
            return Ok(());
        }
        let virtio = self.emulator("virtio-blk")?;
        let (peer, polling) = (self.peer(false)?, self.peer(true)?);
        // Who is attached once is ready for the next.
        for server in [Some(&virtio), peer.as_ref(), polling.as_ref()].into_iter().flatten() {
            drop(attach(server, VirtioDisk::attach)?);
        }
        let fio = |server: &Server, work: Work, time| self.fio_once(&server.socket, work, time);
        let mut sides: Vec<Side<'_>> =
            vec![("virtio-blk", Box::new(|work, time| fio(&virtio, work, time)))];
        for (name, peer) in [(PEER, &peer), (PEER_POLLING, &polling)] {
            if let Some(peer) = peer {
                sides.push((name, Box::new(move |work, time| fio(peer, work, time))));
            }
        }
        Self::heading("local null volume, by fio's libblkio engine", &sides, "ratio");
        for point in self.points() {
            let summaries = self.measure(point, &mut sides)?;
            let rest = match &summaries[..] {
                [ours, peer, polling] => format!(
                    "virtio/peer {:.2}, virtio/iothread {:.2}",
                    ours.median.iops / peer.median.iops,
                    ours.median.iops / polling.median.iops
                ),
                _ => String::new(),
            };
            self.row("fio", point, &sides, &summaries, &rest, rows);
        }
        Ok(())
    }

    fn fio_once(&self, socket: &Path, work: Work, time: Duration) -> Result<Figures> {
        let words = &self.args.fio;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args([
            "--name=bench",
            "--ioengine=libblkio",
            "--libblkio_driver=virtio-blk-vhost-user",
            "--libblkio_wait_mode=loop",
            "--hipri=0",
            "--bs=4k",
            "--thread",
            "--time_based",
            "--norandommap",
            "--cpus_allowed=1",
            "--output-format=json",
        ]);
        command.arg(format!("--libblkio_path={}", socket.display()));
        command.arg(format!("--rw={}", if work.write { "randwrite" } else { "randread" }));
        command.arg(format!("--iodepth={}", work.depth));
        command.arg(format!("--runtime={}ms", time.as_millis().max(200)));
        let output = command.output().context("running fio")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let start = text.find('{').unwrap_or(0);
        let report: serde_json::Value = serde_json::from_str(&text[start..])
            .with_context(|| format!("fio: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
        let side = &report["jobs"][0][if work.write { "write" } else { "read" }];
        let us = |percentile: &str| {
            side["clat_ns"]["percentile"][percentile].as_f64().unwrap_or(0.0) / 1e3
        };
        let iops = side["iops"].as_f64().context("fio's report has no IOPS")?;
        Ok(Figures { iops, p50_us: us("50.000000"), p99_us: us("99.000000") })
    }

    /// What an emulator takes of its core when its guests are idle, and at a tenth of what it could:
    /// bursts of requests with pauses between them.
    fn load(&self, rows: &mut Vec<serde_json::Value>) -> Result<bool> {
        let mut good = true;
        println!("\nprocessor time of the emulator, % of a core: median (lowest-highest round)");
        for (name, kind, supervise) in [
            ("virtio-blk", "virtio-blk", "off"),
            ("nvme", "nvme", "off"),
            ("nvme, supervised", "nvme", "on"),
        ] {
            let server = self.emulator_with(kind, supervise)?;
            let mut driver: Box<dyn Driver> = match kind {
                "nvme" => Box::new(attach(&server, NvmeDisk::attach)?.driver()?),
                _ => Box::new(attach(&server, VirtioDisk::attach)?.driver()?),
            };
            let mut shares = Shares::default();
            for _ in 0..self.args.rounds {
                shares.add(server.share_of_core(|| {
                    // The clock of the measurement is the condition here.
                    let start = Instant::now();
                    process::wait_for(Duration::from_secs(5), || {
                        Ok(start.elapsed() >= Duration::from_secs(2))
                    })
                })?);
            }
            let verdict = self.judge_share(&shares, 0.01, &mut good);
            println!("{name:<17} idle: {verdict}");
            rows.push(serde_json::json!({ "part": "load", "side": name, "point": "idle",
                "shares": shares.0 }));
            for depth in [32, 128] {
                let mut work =
                    Work { write: false, depth, span_bytes: SPAN_BYTES, pause: Duration::ZERO };
                let (mut shares, mut full, mut rates, mut pauses) =
                    (Shares::default(), Vec::new(), Vec::new(), Vec::new());
                for _ in 0..self.args.rounds {
                    work.pause = Duration::ZERO;
                    let iops = guest::run(&mut driver, work, Duration::from_millis(300))?.iops;
                    work.pause = Duration::from_secs_f64(10.0 * f64::from(depth) / iops);
                    full.push(iops);
                    pauses.push(work.pause.as_secs_f64() * 1e6);
                    shares.add(server.share_of_core(|| {
                        // Long enough for a clock that ticks every 10 ms.
                        rates.push(guest::run(&mut driver, work, Duration::from_secs(1))?.iops);
                        Ok(())
                    })?);
                }
                let [rate, full, pause] = [&rates, &full, &pauses].map(|of| turns::median(of));
                let verdict = self.judge_share(&shares, 0.20, &mut good);
                println!(
                    "{name:<17} bursts of {depth} with pauses of {pause:.0} us, {:.0} of {:.0} kIOPS: \
                     {verdict}",
                    rate / 1e3,
                    full / 1e3,
                );
                rows.push(serde_json::json!({ "part": "load", "side": name, "point": depth,
                    "pause_us": pause, "iops": rate, "iops_full": full, "shares": shares.0 }));
            }
        }
        Ok(good)
    }

    /// Whether the median is below the goal, and the text for it, in percent.
    fn judge_share(&self, shares: &Shares, goal: f64, good: &mut bool) -> String {
        let (median, low, high) = shares.summary();
        let is_good = median * self.args.goals < goal;
        *good &= is_good;
        let verdict = if is_good { "" } else { " ABOVE THE GOAL" };
        let [median, low, high, goal] = [median, low, high, goal].map(|share| share * 100.0);
        format!("{median:.1} ({low:.1}-{high:.1}, goal below {goal:.0}){verdict}")
    }

    fn inside(&self, face: Face, addr: SocketAddr) -> Result<Inside> {
        Inside::start(face, addr, SUBNQN, 1, &self.dir.join(format!("inside-{}", face as u8)))
    }

    fn emulator(&self, kind: &str) -> Result<Server> {
        self.emulator_with(kind, "off")
    }

    fn emulator_with(&self, kind: &str, supervise: &str) -> Result<Server> {
        let socket = self.dir.join(format!("{kind}.sock"));
        let device = format!("d={kind},socket={},volume=null:64GiB,queues=1", socket.display());
        let mut command = Command::new(&self.binary);
        command.args(["emulate", "--cores", "1", "--device", &device]);
        command.arg(format!("--supervise={supervise}"));
        Server::start(&mut command, socket)
    }

    /// QEMU's, as it comes, or with a thread for I/O that polls for a while before it sleeps.
    fn peer(&self, polls: bool) -> Result<Option<Server>> {
        let Some((program, words)) = self.args.qsd.split_first() else {
            println!("peer: skipped, no qemu-storage-daemon was given (--qsd)");
            return Ok(None);
        };
        let socket = self.dir.join(if polls { "polling.sock" } else { "peer.sock" });
        let mut command = Command::new(program);
        command.args(words);
        let iothread = if polls { "iothread=io," } else { "" };
        if polls {
            command.args(["--object", "iothread,id=io"]);
        }
        let disk = format!("driver=null-co,node-name=disk,size={SPAN_BYTES},read-zeroes=on");
        command.args(["--blockdev", &disk, "--export"]);
        command.arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,{iothread}addr.type=unix,\
             addr.path={}",
            socket.display()
        ));
        let server = Server::start(&mut command, socket)?;
        println!("peer: {}", server.command);
        Ok(Some(server))
    }
}

fn side<'a>(driver: &'a mut dyn Driver) -> Box<dyn FnMut(Work, Duration) -> Result<Figures> + 'a> {
    Box::new(|work, time| Ok(guest::run(driver, work, time)?))
}

/// Attaches as soon as the server listens.
fn attach<T>(server: &Server, attach: impl Fn(&Path) -> std::io::Result<T>) -> Result<T> {
    process::wait_for(
        START,
        || Ok(std::os::unix::net::UnixStream::connect(&server.socket).is_ok()),
    )
    .with_context(|| format!("waiting for {}", server.command))?;
    attach(&server.socket).with_context(|| format!("attaching to {}", server.command))
}

/// A process under test, on core 0.
struct Server {
    child: Child,
    socket: PathBuf,
    command: String,
}

impl Server {
    fn start(program: &mut Command, socket: PathBuf) -> Result<Server> {
        let mut command = Command::new("taskset");
        command.args(["-c", "0"]).arg(program.get_program()).args(program.get_args());
        let text = format!("{command:?}").replace('"', "");
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting a server with taskset (package util-linux)")?;
        let stderr = child.stderr.take().context("stderr of a server")?;
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if ["WARN", "ERROR", "panicked", "error"].iter().any(|word| line.contains(word)) {
                    eprintln!("server: {line}");
                }
            }
        });
        Ok(Server { child, socket, command: text })
    }

    /// The share of a core that it and its worker use while `during` runs.
    fn share_of_core(&self, during: impl FnOnce() -> Result<()>) -> Result<f64> {
        let all = || -> Result<Duration> {
            let mut time = process::cpu_time(self.child.id())?;
            for child in process::children(self.child.id())? {
                time += process::cpu_time(child)?;
            }
            Ok(time)
        };
        let (start, before) = (Instant::now(), all()?);
        during()?;
        let used = all()?.saturating_sub(before);
        Ok(used.as_secs_f64() / start.elapsed().as_secs_f64())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A supervisor takes its worker along if it is asked to end. All of these fail only when the
        // process is gone already.
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ =
                process::wait_for(Duration::from_secs(5), || Ok(self.child.try_wait()?.is_some()));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
