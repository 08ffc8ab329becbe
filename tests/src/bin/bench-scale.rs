//! `cargo xtask bench scale`: what many connections, many volumes, a start and following requests cost
//! the target, and what the file backend reaches of fio.
//!
//! Each comparison measures its sides in turn, round by round, on the same process (or on two that
//! stand side by side), and prints medians and their ratio.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use it::bench::{self, SUBNQN, Summary, Target, hostnqn};
use it::link::{Association, Protection, associate};
use it::load::{self, Figures, Workload};
use it::process;
use it::turns::{self, Ratio};

const ENTRIES: u16 = 256;
const VOLUMES: u32 = 1000;
const SPAN_BYTES: u64 = 1 << 30;
/// I/O queues of one host in the comparisons of many connections.
const QUEUES: u16 = 20;
const HOSTS: usize = 10;
/// What `penstock bench --breakdown` asks for.
const FOLLOW_EVERY: u32 = 127;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From the start of the process to its first I/O.
    Start,
    /// Connections: ten instead of one, hundreds, idle ones.
    Connections,
    /// A thousand volumes.
    Volumes,
    /// Following requests, as `penstock bench --breakdown` does.
    Following,
    /// The file backend, if there is `--files`.
    Files,
}

#[derive(Parser)]
#[command(about = "What many connections, many volumes and a start cost the target")]
struct Args {
    /// Rounds per comparison.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of one measurement in milliseconds.
    #[arg(long, default_value_t = 300)]
    millis: u64,
    /// Fail when a figure is below this share of its goal.
    #[arg(long, default_value_t = 1.0)]
    at_least: f64,
    /// The `penstock` binary; default: the one built beside this program.
    #[arg(long)]
    penstock: Option<PathBuf>,
    /// The parts to run.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "start,connections,volumes,following,files"
    )]
    parts: Vec<Part>,
    /// Directory for a file of 1 GiB, to compare the file backend with fio; without it that is left
    /// out.
    #[arg(long)]
    files: Option<PathBuf>,
    /// fio, with what runs it; each word by itself.
    #[arg(long, num_args = 1, allow_hyphen_values = true, default_value = "fio")]
    fio: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench-scale: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What was found so far.
struct Report {
    at_least: f64,
    good: bool,
}

impl Report {
    /// A figure that is to be at least `goal`.
    fn at_least(&mut self, what: &str, figure: f64, goal: f64) {
        self.judge(what, figure / goal, &format!("{figure:.2} (goal {goal})"));
    }

    /// A figure that is to be at most `goal`.
    fn at_most(&mut self, what: &str, figure: f64, goal: f64) {
        let share = if figure > 0.0 { goal / figure } else { f64::INFINITY };
        self.judge(what, share, &format!("{figure:.1} (goal at most {goal})"));
    }

    fn judge(&mut self, what: &str, share: f64, words: &str) {
        let is_good = share >= self.at_least;
        self.good &= is_good;
        println!("{what}: {words}{}", if is_good { "" } else { "  BELOW THE GOAL" });
    }
}

fn run(args: &Args) -> Result<bool> {
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "two cores are needed, one for each side; this machine has {cores}");
    process::pin_to(1).context("pinning the client to core 1")?;
    let binary = bench::binary(args.penstock.as_deref())?;
    let mut report = Report { at_least: args.at_least, good: true };
    let has = |part| args.parts.contains(&part);
    if has(Part::Start) || has(Part::Connections) || has(Part::Following) {
        let start = Instant::now();
        let target = Target::start(&binary, &["bench=null:1GiB".to_owned()], ENTRIES)?;
        let mut host = connect(&target, 0, 1)?;
        load::run(&mut host.io, &work(1, 1), Duration::ZERO)?;
        let first_io = start.elapsed().as_secs_f64() * 1e3;
        if has(Part::Start) {
            report.at_most("start to first I/O, ms", first_io, 100.0);
        }
        if has(Part::Connections) {
            connections(&target, args, &mut report)?;
        }
        if has(Part::Following) {
            following(&target, args, &mut report)?;
        }
        drop(host);
    }
    if has(Part::Volumes) {
        volumes(&binary, args, &mut report)?;
    }
    if let Some(folder) = args.files.as_ref().filter(|_| has(Part::Files)) {
        files(&binary, folder, args, &mut report)?;
    }
    Ok(report.good)
}

fn connect(target: &Target, host: usize, queues: u16) -> Result<Association> {
    associate(target.plain, (SUBNQN, &hostnqn(host)), ENTRIES, queues, &Protection::None)
        .with_context(|| format!("connecting host {host} to {}", target.plain))
}

/// 4 KiB reads.
fn work(depth: usize, namespaces: u32) -> Workload {
    Workload {
        write: false,
        block_bytes: 4096,
        depth,
        in_capsule: true,
        span_bytes: SPAN_BYTES,
        lba_bytes: 512,
        namespaces,
    }
}

type Side<'a> = (&'a str, &'a mut dyn FnMut(Duration) -> Result<Figures>);

/// Measures two sides in turn; returns the second's share of the first.
fn compare<'a>(args: &Args, first: Side<'a>, second: Side<'a>) -> Result<f64> {
    let mut rounds = [Vec::new(), Vec::new()];
    let names = [first.0, second.0];
    let mut sides = [first.1, second.1];
    for round in 0..=args.rounds {
        let time = Duration::from_millis(if round == 0 { 100 } else { args.millis });
        for (side, rounds) in sides.iter_mut().zip(&mut rounds) {
            let figures = side(time)?;
            if round > 0 {
                rounds.push(figures);
            }
        }
    }
    let summaries = rounds.map(Summary::of);
    for (name, Summary { median, low, high }) in names.iter().zip(&summaries) {
        println!("  {name:<40} {:>9.0} ({low:.0}-{high:.0})", median.iops);
    }
    let [first, second] = summaries;
    Ok(second.median.iops / first.median.iops)
}

fn connections(target: &Target, args: &Args, report: &mut Report) -> Result<()> {
    let (mut one, mut ten) = (connect(target, 1, 1)?, connect(target, 2, 10)?);
    let ratio = compare(
        args,
        ("1 connection, depth 160", &mut |time| Ok(load::run(&mut one.io, &work(160, 1), time)?)),
        ("10 connections, depth 16", &mut |time| Ok(load::run(&mut ten.io, &work(16, 1), time)?)),
    )?;
    report.at_least("10 connections at depth 16, of one at depth 160", ratio, 0.90);

    let resident = || process::resident_bytes(target.pid());
    let before = resident()?;
    let mut many = (0..HOSTS)
        .map(|n| connect(target, 10 + n, QUEUES))
        .collect::<Result<Vec<Association>>>()?;
    let count = (HOSTS * (usize::from(QUEUES) + 1)) as f64;
    let each = (resident()?.saturating_sub(before)) as f64 / count / 1024.0;
    report.at_most(&format!("memory of each of {count} idle connections, KiB"), each, 128.0);

    // The same host with and without all the others connected, and then all of them busy.
    let mut alone = Vec::new();
    let mut beside = Vec::new();
    for _ in 0..args.rounds {
        let time = Duration::from_millis(args.millis);
        beside.push(load::run(&mut one.io, &work(32, 1), time)?);
        many.clear();
        alone.push(load::run(&mut one.io, &work(32, 1), time)?);
        many = (0..HOSTS)
            .map(|n| connect(target, 10 + n, QUEUES))
            .collect::<Result<Vec<Association>>>()?;
    }
    let [alone, beside] = [alone, beside].map(Summary::of);
    println!("  {:<40} {:>9.0} ({:.0}-{:.0})", "alone", alone.median.iops, alone.low, alone.high);
    println!(
        "  {:<40} {:>9.0} ({:.0}-{:.0})",
        "beside idle connections", beside.median.iops, beside.low, beside.high
    );
    let ratio = beside.median.iops / alone.median.iops;
    report.at_least("one busy connection beside 210 idle ones, of alone", ratio, 0.90);

    let mut all: Vec<_> = many.iter_mut().flat_map(|host| std::mem::take(&mut host.io)).collect();
    let mut few = connect(target, 3, QUEUES)?;
    let ratio = compare(
        args,
        ("20 connections, depth 16", &mut |time| Ok(load::run(&mut few.io, &work(16, 1), time)?)),
        ("200 connections, depth 16", &mut |time| Ok(load::run(&mut all, &work(16, 1), time)?)),
    )?;
    report.at_least("200 busy connections, of 20", ratio, 0.90);
    Ok(())
}

fn volumes(binary: &Path, args: &Args, report: &mut Report) -> Result<()> {
    let specs: Vec<String> = (1..=VOLUMES).map(|n| format!("v{n}=null:1GiB")).collect();
    let target = Target::start(binary, &specs, ENTRIES)?;
    let mut host = connect(&target, 0, 1)?;
    let io = std::cell::RefCell::new(&mut host.io);
    let run = |namespaces, time| -> Result<Figures> {
        Ok(load::run(&mut io.borrow_mut()[..], &work(32, namespaces), time)?)
    };
    let ratio = compare(
        args,
        ("1 of 1,000 volumes", &mut |time| run(1, time)),
        ("all of 1,000 volumes in turn", &mut |time| run(VOLUMES, time)),
    )?;
    report.at_least("1,000 volumes, of one", ratio, 0.90);
    Ok(())
}

/// What it costs to follow one request in so many, in many short turns: the goal is below what
/// single rounds differ by.
fn following(target: &Target, args: &Args, report: &mut Report) -> Result<()> {
    const ROUNDS: usize = 40;
    const TURN: Duration = Duration::from_millis(60);
    let host = std::cell::RefCell::new(connect(target, 1, 1)?);
    for (write, depth) in [(false, 1), (false, 32), (false, 128), (true, 32)] {
        let work = Workload { write, ..work(depth, 1) };
        let side = |every| -> turns::Side<'_> {
            let host = &host;
            Box::new(move |time| {
                target.set_sampling(every)?;
                Ok(load::run(&mut host.borrow_mut().io, &work, time)?)
            })
        };
        let mut found = [const { Vec::new() }; 3];
        let rounds = ROUNDS.max(args.rounds);
        turns::take(&mut [side(0), side(0), side(FOLLOW_EVERY)], rounds, TURN, &mut found)?;
        let ratio = Ratio::of(&found[2], &found[0], &found[1]);
        let kind = if write { "writes" } else { "reads" };
        println!("  noise of the same without, of 1: {:.3}", ratio.noise);
        let what = format!("4 KiB {kind} at depth {depth}, 1 in {FOLLOW_EVERY} followed, of none");
        report.judge(&what, ratio.value / 0.98, &format!("{:.3} (goal 0.98)", ratio.value));
    }
    target.set_sampling(0)
}

/// The file backend against fio's io_uring engine on the same file, both on core 0; and for
/// comparison the same file through the fabric.
fn files(binary: &Path, folder: &Path, args: &Args, report: &mut Report) -> Result<()> {
    let fio = Fio { words: &args.fio, file: folder.join("penstock-bench-file") };
    if fio.command().arg("--version").output().is_err() {
        println!("file backend: SKIPPED, there is no fio");
        return Ok(());
    }
    let remove = removed_later(&fio.file);
    // Written once, so that all read blocks that exist.
    fio.fill()?;
    for rw in ["randread", "randwrite"] {
        for depth in [1, 32, 128] {
            println!("4 KiB {rw} of a file, depth {depth}");
            let ratio = compare(
                args,
                ("fio, io_uring, O_DIRECT", &mut |time| fio.run(rw, depth, time)),
                ("the file backend", &mut |time| alone(binary, &fio.file, rw, depth, time)),
            )?;
            report.at_least(&format!("file backend, {rw} at depth {depth}, of fio"), ratio, 0.95);
        }
    }
    let volume = format!("bench=file:{}", fio.file.display());
    let target = Target::start(binary, &[volume], ENTRIES)?;
    for depth in [1, 32, 128] {
        let mut host = connect(&target, depth, 1)?;
        let ratio = compare(
            args,
            ("fio, io_uring, O_DIRECT", &mut |time| fio.run("read", depth, time)),
            ("the target, through the fabric", &mut |time| {
                Ok(load::run(&mut host.io, &work(depth, 1), time)?)
            }),
        )?;
        println!(
            "the file through the fabric, reads in sequence at depth {depth}, of fio: {ratio:.2}"
        );
    }
    drop(remove);
    Ok(())
}

/// The file backend on core 0 under `penstock bench`, whose runs are whole seconds.
fn alone(binary: &Path, file: &Path, rw: &str, depth: usize, time: Duration) -> Result<Figures> {
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(binary).args(["bench", "--json", "--bs", "4KiB"]);
    command.arg(format!("file:{}", file.display())).arg("--iodepth").arg(depth.to_string());
    command.args(["--rw", rw]);
    command.arg("--runtime").arg(time.as_secs().max(1).to_string());
    let json = json_of(&mut command)?;
    let side = &json[direction(rw)];
    let latency = |name| figure(&side["latency_us"][name]);
    Ok(Figures { iops: figure(&side["iops"])?, p50_us: latency("p50")?, p99_us: latency("p99")? })
}

/// What fio and `penstock bench` call the side of their results.
fn direction(rw: &str) -> &'static str {
    if rw.ends_with("write") { "write" } else { "read" }
}

fn json_of(command: &mut Command) -> Result<serde_json::Value> {
    let text = format!("{command:?}").replace('"', "");
    let output = command.output().with_context(|| format!("running {text}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{text}: {stderr}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("the JSON of {text}"))
}

fn figure(value: &serde_json::Value) -> Result<f64> {
    value.as_f64().context("a figure is missing")
}

/// Removes the file in the end.
fn removed_later(file: &Path) -> impl Drop {
    struct Guard(PathBuf);
    impl Drop for Guard {
        fn drop(&mut self) {
            // It may never have been made.
            let _ = std::fs::remove_file(&self.0);
        }
    }
    Guard(file.to_owned())
}

/// fio on one file.
struct Fio<'a> {
    words: &'a [String],
    file: PathBuf,
}

impl Fio<'_> {
    /// fio on core 0.
    fn command(&self) -> Command {
        let mut command = Command::new("taskset");
        command.args(["-c", "0"]).args(self.words);
        command
    }

    fn job(&self) -> Command {
        let mut command = self.command();
        command.args(["--name=bench", "--direct=1", "--ioengine=io_uring", "--output-format=json"]);
        command.arg(format!("--filename={}", self.file.display()));
        command.arg(format!("--size={SPAN_BYTES}"));
        command
    }

    fn fill(&self) -> Result<()> {
        json_of(self.job().args(["--rw=write", "--bs=128k", "--iodepth=32"])).map(drop)
    }

    /// 4 KiB in fio's order `rw`.
    fn run(&self, rw: &str, depth: usize, time: Duration) -> Result<Figures> {
        let mut command = self.job();
        command.arg(format!("--rw={rw}"));
        command.args(["--bs=4k", "--norandommap", "--time_based"]);
        command.arg(format!("--iodepth={depth}"));
        command.arg(format!("--runtime={}ms", time.as_millis().max(1000)));
        let json = json_of(&mut command)?;
        let side = &json["jobs"][0][direction(rw)];
        let percentile =
            |name| Ok::<_, anyhow::Error>(figure(&side["clat_ns"]["percentile"][name])? / 1e3);
        Ok(Figures {
            iops: figure(&side["iops"])?,
            p50_us: percentile("50.000000")?,
            p99_us: percentile("99.000000")?,
        })
    }
}
