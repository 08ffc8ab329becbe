//! The interleaved part of `cargo xtask bench gate`: is one build of the target slower than another?
//!
//! ```text
//!  core 0: base ─ base again ─ tree, each a process, one at work at a time
//!  core 1: this process, one client for all
//! ```
//!
//! The base runs twice, so that the run itself says what a difference is worth: see
//! [`it::turns::Ratio`]. A point that lost gets more rounds with new processes before it counts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use crypto::psk::Suite;
use it::bench::{SUBNQN, Summary, Target, hostnqn};
use it::link::{Association, Protection, associate};
use it::load::{self, Figures, Workload};
use it::process;
use it::turns::{self, Ratio, Side};

const SPAN_BYTES: u64 = 64 << 30;
const ENTRIES: u16 = 128;
/// The host with a key.
const HOST: usize = 101;

#[derive(Parser)]
#[command(about = "Compare two builds of the target with each other, in turns")]
struct Args {
    /// The `penstock` binary to compare with.
    #[arg(long)]
    base: PathBuf,
    /// The one that must not be slower.
    #[arg(long)]
    tree: PathBuf,
    /// Rounds per point; each runs the base twice and the tree once.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// Length of one turn in milliseconds.
    #[arg(long, default_value_t = 50)]
    millis: u64,
    /// How often points that lost get as many rounds again, with new processes, before they count.
    #[arg(long, default_value_t = 2)]
    again: usize,
    /// Losses below this are let pass even if the noise is lower, in percent.
    #[arg(long, default_value_t = 2.0)]
    at_least: f64,
    /// Only points whose name contains this, such as `read-4k`.
    #[arg(long, default_value = "")]
    only: String,
    /// Write the table as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
}

struct Point {
    name: &'static str,
    write: bool,
    block_bytes: usize,
    depth: usize,
    /// Writes take their data along, instead of waiting for the target's R2T.
    in_capsule: bool,
    tls: bool,
}

impl Point {
    const fn new(name: &'static str, write: bool, block_bytes: usize, depth: usize) -> Point {
        Point { name, write, block_bytes, depth, in_capsule: block_bytes <= 8192, tls: false }
    }

    const fn in_capsule(self) -> Point {
        Point { in_capsule: true, ..self }
    }

    const fn tls(self) -> Point {
        Point { tls: true, ..self }
    }

    fn work(&self) -> Workload {
        Workload {
            write: self.write,
            block_bytes: self.block_bytes,
            depth: self.depth,
            in_capsule: self.in_capsule,
            span_bytes: SPAN_BYTES,
            lba_bytes: 512,
            namespaces: 1,
            interval: Duration::ZERO,
        }
    }
}

const POINTS: [Point; 10] = [
    Point::new("read-4k-qd1", false, 4096, 1),
    Point::new("read-4k-qd32", false, 4096, 32),
    Point::new("read-4k-qd128", false, 4096, 128),
    Point::new("write-4k-qd1", true, 4096, 1),
    Point::new("write-4k-qd32", true, 4096, 32),
    Point::new("read-128k-qd32", false, 131_072, 32),
    Point::new("write-128k-qd32", true, 131_072, 32),
    Point::new("write-128k-qd32-in-capsule", true, 131_072, 32).in_capsule(),
    Point::new("tls-read-4k-qd32", false, 4096, 32).tls(),
    Point::new("tls-write-4k-qd32", true, 4096, 32).tls(),
];

/// The base, the base again, and the tree.
const SIDES: usize = 3;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench-gate: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// `false`: the tree is slower.
fn run(args: &Args) -> Result<bool> {
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "two cores are needed, one for each side; this machine has {cores}");
    ensure!(args.rounds > 0 && args.millis > 0, "--rounds and --millis: 1 or more");
    let points: Vec<&Point> = POINTS.iter().filter(|p| p.name.contains(&args.only)).collect();
    if points.is_empty() {
        println!("no point's name contains {:?}: no turns", args.only);
        return Ok(true);
    }
    process::pin_to(1).context("pinning the client to core 1")?;
    let least = args.at_least / 100.0;
    let mut found: Vec<[Vec<Figures>; SIDES]> = points.iter().map(|_| Default::default()).collect();
    let mut open: Vec<usize> = (0..points.len()).collect();
    for _ in 0..=args.again {
        measure(args, &points, &open, &mut found)?;
        open.retain(|&at| ratio(&found[at]).is_loss(least));
        if open.is_empty() {
            break;
        }
    }
    print(args, &points, &found, least)?;
    Ok(open.is_empty())
}

fn ratio([base, again, tree]: &[Vec<Figures>; SIDES]) -> Ratio {
    Ratio::of(tree, base, again)
}

/// Adds rounds of new processes to the points of `open`.
fn measure(
    args: &Args,
    points: &[&Point],
    open: &[usize],
    found: &mut [[Vec<Figures>; SIDES]],
) -> Result<()> {
    let binaries = [&args.base, &args.base, &args.tree];
    let mut peers = Vec::with_capacity(SIDES);
    for binary in binaries {
        peers.push(Peer::start(binary)?);
    }
    for &at in open {
        let point = points[at];
        let mut sides: Vec<Side<'_>> = Vec::with_capacity(SIDES);
        for peer in &mut peers {
            let association = if point.tls { &mut peer.tls } else { &mut peer.plain };
            sides.push(Box::new(move |time| {
                Ok(load::run(&mut association.io, &point.work(), time)?)
            }));
        }
        let time = Duration::from_millis(args.millis);
        turns::take(&mut sides, args.rounds, time, &mut found[at])
            .with_context(|| point.name.to_owned())?;
    }
    Ok(())
}

/// A build's process, and the client's connections to it.
struct Peer {
    plain: Association,
    tls: Association,
    /// Ends last.
    _target: Target,
}

impl Peer {
    fn start(binary: &Path) -> Result<Peer> {
        let volume = format!("bench=null:{}GiB", SPAN_BYTES >> 30);
        let target = Target::start(binary, &[volume], ENTRIES)
            .with_context(|| format!("starting {}", binary.display()))?;
        let host = target.add_host(HOST, Suite::Aes128GcmSha256)?;
        let connect = |addr, nqn: &str, protection: &Protection| {
            associate(addr, (SUBNQN, nqn), ENTRIES, 1, protection)
                .with_context(|| format!("connecting to {addr}"))
        };
        let plain = connect(target.plain, &hostnqn(0), &Protection::None)?;
        let tls = connect(target.tls, &host.nqn, &host.protection)?;
        Ok(Peer { plain, tls, _target: target })
    }
}

fn print(
    args: &Args,
    points: &[&Point],
    found: &[[Vec<Figures>; SIDES]],
    least: f64,
) -> Result<()> {
    println!(
        "{:<27} {:>22} {:>22} {:>9} {:>8}   kIOPS (lowest-highest turn)",
        "point", "base", "tree", "change", "noise"
    );
    let mut rows = Vec::new();
    let mut lost = 0;
    for (point, sides) in points.iter().zip(found) {
        let ratio = ratio(sides);
        let [base, again, tree] = sides;
        let both: Vec<Figures> = base.iter().chain(again).copied().collect();
        let (base, tree) = (Summary::of(both), Summary::of(tree.clone()));
        let text = |s: &Summary| {
            format!("{:.1} ({:.1}-{:.1})", s.median.iops / 1e3, s.low / 1e3, s.high / 1e3)
        };
        let is_loss = ratio.is_loss(least);
        lost += usize::from(is_loss);
        println!(
            "{:<27} {:>22} {:>22} {:>+8.2}% {:>7.2}%{}",
            point.name,
            text(&base),
            text(&tree),
            (ratio.value - 1.0) * 100.0,
            ratio.noise * 100.0,
            if is_loss { "   LOST" } else { "" }
        );
        rows.push(serde_json::json!({ "point": point.name, "base": base.json(),
            "tree": tree.json(), "ratio": ratio.value, "noise": ratio.noise,
            "rounds": sides[0].len(), "lost": is_loss }));
    }
    println!(
        "{} points, {lost} lost more than the noise and {} %; change: median of the rounds' ratios",
        rows.len(),
        args.at_least
    );
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
