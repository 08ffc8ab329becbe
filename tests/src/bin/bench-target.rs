//! `cargo xtask bench target`: the target with a null volume beside the bare loop, one run.
//!
//! Both serve the same client over loopback on the same two cores, taking turns round by round, so
//! that whatever else the machine does hits both alike. Printed are medians, the spread (lowest to
//! highest round) and the ratio of the medians.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use it::load::{self, Figures, Workload};
use it::{bare, process};

const SUBNQN: &str = "nqn.2026-11.io.penstock:bench";
const SPAN_BYTES: u64 = 64 << 30;

#[derive(Parser)]
#[command(about = "Compare the target (null volume) with a bare request/response loop")]
struct Args {
    /// Rounds per point; each runs the bare loop and the target once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of one measurement in milliseconds.
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// Fail when a point's ratio of medians is below this.
    #[arg(long, default_value_t = 0.60)]
    at_least: f64,
    /// How often a point below the goal gets as many rounds again before it counts.
    #[arg(long, default_value_t = 4)]
    again: usize,
    /// The `penstock` binary; default: the one built beside this program.
    #[arg(long)]
    penstock: Option<PathBuf>,
    /// Write the table as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only points whose name contains this, such as `read-4k`.
    #[arg(long, default_value = "")]
    only: String,
}

struct Point {
    name: &'static str,
    write: bool,
    block_bytes: usize,
    depth: usize,
}

const POINTS: [Point; 8] = [
    Point { name: "read-4k-qd1", write: false, block_bytes: 4096, depth: 1 },
    Point { name: "read-4k-qd32", write: false, block_bytes: 4096, depth: 32 },
    Point { name: "read-4k-qd128", write: false, block_bytes: 4096, depth: 128 },
    Point { name: "write-4k-qd1", write: true, block_bytes: 4096, depth: 1 },
    Point { name: "write-4k-qd32", write: true, block_bytes: 4096, depth: 32 },
    Point { name: "write-4k-qd128", write: true, block_bytes: 4096, depth: 128 },
    Point { name: "read-128k-qd32", write: false, block_bytes: 131_072, depth: 32 },
    Point { name: "write-128k-qd32", write: true, block_bytes: 131_072, depth: 32 },
];

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
    let binary = match &args.penstock {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("penstock"),
    };
    let target = Target::start(&binary)?;
    process::pin_to(1).context("pinning the client to core 1")?;
    println!("target: {}", target.command);
    println!(
        "{:<16} {:>12} {:>23} {:>12} {:>23} {:>6}  {:>15} {:>15}",
        "point", "bare", "spread", "penstock", "spread", "ratio", "bare p50/p99", "penstock"
    );
    let mut good = true;
    let mut rows = Vec::new();
    for point in POINTS.iter().filter(|p| p.name.contains(&args.only)) {
        let mut sides = [Vec::new(), Vec::new()];
        measure(point, &target, args, &mut sides)?;
        // Machines are noisy: what is below the goal is measured longer, all rounds counting.
        for _ in 0..args.again {
            let [bare, ours] = sides.clone().map(Summary::of);
            if ours.median.iops >= bare.median.iops * args.at_least {
                break;
            }
            measure(point, &target, args, &mut sides)?;
        }
        let [bare, ours] = sides.map(Summary::of);
        let ratio = ours.median.iops / bare.median.iops;
        let verdict = if ratio >= args.at_least { "" } else { "  BELOW THE GOAL" };
        good &= ratio >= args.at_least;
        println!(
            "{:<16} {:>12.0} {:>11.0}-{:<11.0} {:>12.0} {:>11.0}-{:<11.0} {:>6.2}  {:>7.1}/{:<7.1} {:>7.1}/{:<7.1}{verdict}",
            point.name,
            bare.median.iops,
            bare.low,
            bare.high,
            ours.median.iops,
            ours.low,
            ours.high,
            ratio,
            bare.median.p50_us,
            bare.median.p99_us,
            ours.median.p50_us,
            ours.median.p99_us,
        );
        rows.push(serde_json::json!({
            "point": point.name, "ratio": ratio,
            "bare": bare.json(), "penstock": ours.json(),
        }));
    }
    good &= target.check_idle()?;
    good &= target.check_memory()?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(good)
}

/// Adds `args.rounds` rounds to both sides, which take turns.
fn measure(
    point: &Point,
    target: &Target,
    args: &Args,
    sides: &mut [Vec<Figures>; 2],
) -> Result<()> {
    // One discarded round warms caches, socket buffers and the pool.
    for round in 0..=args.rounds {
        let time = Duration::from_millis(if round == 0 { 200 } else { args.millis });
        let measured = [measure_bare(point, time)?, measure_target(point, target, time)?];
        if round > 0 {
            sides.iter_mut().zip(measured).for_each(|(side, figures)| side.push(figures));
        }
    }
    Ok(())
}

struct Summary {
    median: Figures,
    low: f64,
    high: f64,
}

impl Summary {
    fn of(mut rounds: Vec<Figures>) -> Summary {
        rounds.sort_by(|a, b| a.iops.total_cmp(&b.iops));
        let (first, last) = (rounds[0].iops, rounds[rounds.len() - 1].iops);
        Summary { median: rounds[rounds.len() / 2], low: first, high: last }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "iops": self.median.iops, "low": self.low, "high": self.high,
            "p50_us": self.median.p50_us, "p99_us": self.median.p99_us })
    }
}

fn workload(point: &Point, bare: bool) -> Workload {
    Workload {
        write: point.write,
        block_bytes: point.block_bytes,
        depth: point.depth,
        // Large writes wait for the target's R2T; the bare loop has no such thing.
        in_capsule: bare || point.block_bytes <= 8192,
        span_bytes: SPAN_BYTES,
        lba_bytes: 512,
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
    let mut stream = std::net::TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    let figures = load::run(&mut stream, &workload(point, true), time);
    stop.store(true, Ordering::Relaxed);
    drop(stream);
    server.join().map_err(|_| anyhow::anyhow!("the bare loop panicked"))??;
    figures.with_context(|| format!("{} on the bare loop", point.name))
}

fn measure_target(point: &Point, target: &Target, time: Duration) -> Result<Figures> {
    let mut association = load::associate(target.addr, SUBNQN, &hostnqn(0), 127)
        .with_context(|| format!("connecting to the target at {}", target.addr))?;
    load::run(&mut association.io, &workload(point, false), time)
        .with_context(|| format!("{} on the target", point.name))
}

fn hostnqn(n: usize) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{n:012}")
}

/// The target under test, a process of its own on core 0.
struct Target {
    child: Child,
    addr: SocketAddr,
    command: String,
}

impl Target {
    fn start(binary: &Path) -> Result<Target> {
        ensure!(
            binary.exists(),
            "{} is missing: run `cargo build --release` first",
            binary.display()
        );
        let (listen, discovery) = (process::free_addr()?, process::free_addr()?);
        let mut command = Command::new("taskset");
        command.args(["-c", "0"]).arg(binary).args([
            "target",
            "--volume",
            "bench=null:64GiB",
            "--listen",
            &listen.to_string(),
            "--discovery",
            &discovery.to_string(),
            "--subnqn",
            SUBNQN,
            "--cores",
            "1",
        ]);
        let text = format!("{command:?}").replace('"', "");
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the target with taskset (package util-linux)")?;
        let stderr = child.stderr.take().context("stderr of the target")?;
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("WARN") || line.contains("ERROR") || line.contains("panicked") {
                    eprintln!("target: {line}");
                }
            }
        });
        let mut target = Target { child, addr: listen, command: text };
        process::wait_for(Duration::from_secs(20), || {
            if let Ok(Some(status)) = target.child.try_wait() {
                bail!("the target ended at start with {status}");
            }
            Ok(std::net::TcpStream::connect(listen).is_ok())
        })
        .context("waiting for the target to listen")?;
        Ok(target)
    }

    /// Ten hosts connected and silent: under 1 % of a core.
    fn check_idle(&self) -> Result<bool> {
        let hosts = (1..=10)
            .map(|n| load::associate(self.addr, SUBNQN, &hostnqn(n), 127))
            .collect::<std::io::Result<Vec<_>>>()?;
        let pid = self.child.id();
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

    fn check_memory(&self) -> Result<bool> {
        let mib = process::resident_bytes(self.child.id())? as f64 / (1 << 20) as f64;
        println!("resident memory after the runs: {mib:.1} MiB");
        Ok(mib < 64.0)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Both fail only when the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
