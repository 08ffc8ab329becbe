//! `cargo xtask bench scale`: what many connections, many volumes, a start and following requests cost
//! the target, and what the file backend reaches of fio.
//!
//! Each comparison measures its sides in turn, round by round, on the same process (or on two that
//! stand side by side), and prints medians and their ratio.
//!
//! Many connections cost the kernel's sockets and the client something whoever serves them: smaller
//! batches, more data under way than the caches hold. So the bare loop serves the same numbers of
//! connections in the same rounds, and what it loses is not held against the target.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use crypto::psk::Suite;
use it::bench::{self, KeyedHost, SUBNQN, Summary, Target, hostnqn};
use it::link::{Association, Link, Protection, associate};
use it::load::{self, Figures, Workload};
use it::turns::{self, Ratio};
use it::{bare, process};

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
    /// Another `penstock`, such as one built before a change, that serves many connections in the same
    /// rounds; what it does is printed and not judged.
    #[arg(long, value_name = "PATH")]
    beside: Option<PathBuf>,
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
        let volume = ["bench=null:1GiB".to_owned()];
        let target = Target::start(&binary, &volume, ENTRIES)?;
        let mut host = connect(&target, 0, 1)?;
        load::run(&mut host.io, &work(1, 1), Duration::ZERO)?;
        let first_io = start.elapsed().as_secs_f64() * 1e3;
        if has(Part::Start) {
            report.at_most("start to first I/O, ms", first_io, 100.0);
        }
        drop(host);
        let mut targets = vec![target];
        if has(Part::Connections) {
            if let Some(beside) = &args.beside {
                targets.push(Target::start(beside, &volume, ENTRIES)?);
            }
            connections(&binary, &targets, args, &mut report)?;
        }
        if has(Part::Following) {
            following(&targets[0], args, &mut report)?;
        }
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
        interval: Duration::ZERO,
    }
}

type Side<'a> = (String, Box<dyn FnMut(Duration) -> Result<Figures> + 'a>);

fn side<'a>(name: &str, run: impl FnMut(Duration) -> Result<Figures> + 'a) -> Side<'a> {
    (name.to_owned(), Box::new(run))
}

/// Measures sides in turn; returns the IOPS of their medians.
fn measure(args: &Args, mut sides: Vec<Side<'_>>) -> Result<Vec<f64>> {
    let count = sides.len();
    let mut rounds = vec![Vec::new(); count];
    for round in 0..=args.rounds {
        let time = Duration::from_millis(if round == 0 { 100 } else { args.millis });
        // Each round begins with another side, so that none always follows the same one.
        for at in (0..count).map(|turn| (round + turn) % count) {
            let figures = (sides[at].1)(time)?;
            if round > 0 {
                rounds[at].push(figures);
            }
        }
    }
    let summaries = rounds.into_iter().map(Summary::of);
    let show = |((name, _), summary): (&Side<'_>, Summary)| {
        print_side(name, &summary);
        summary.median.iops
    };
    Ok(sides.iter().zip(summaries).map(show).collect())
}

fn print_side(name: &str, Summary { median, low, high }: &Summary) {
    let p50 = median.p50_us;
    println!("  {name:<40} {:>9.0} ({low:.0}-{high:.0})  p50 {p50:.1} us", median.iops);
}

/// Measures two sides in turn; returns the second's share of the first.
fn compare(args: &Args, first: Side<'_>, second: Side<'_>) -> Result<f64> {
    let iops = measure(args, vec![first, second])?;
    Ok(iops[1] / iops[0])
}

/// The bare loop with some connections, on core 0.
struct Bare {
    links: Vec<Link>,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<Result<()>>>,
}

impl Bare {
    fn start(connections: usize) -> Result<Bare> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        let mut streams: Vec<TcpStream> = Vec::new();
        let mut links = Vec::new();
        for _ in 0..connections {
            links.push(Link::bare(addr)?);
            streams.push(listener.accept()?.0);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let server_stop = Arc::clone(&stop);
        let server = std::thread::spawn(move || -> Result<()> {
            process::pin_to(0)?;
            Ok(bare::serve_all(streams, work(1, 1).block_bytes, &server_stop)?)
        });
        Ok(Bare { links, stop, server: Some(server) })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            // Whatever it failed with, the measurement has failed with before.
            let _ = server.join();
        }
    }
}

/// So many connections, and the commands that each has under way.
type Shape = (u16, usize);

fn run_shape(links: &mut [Link], (_, depth): Shape, time: Duration) -> Result<Figures> {
    Ok(load::run(links, &work(depth, 1), time)?)
}

/// A bare loop spins for as long as it lives: it has the target's core for its turn only.
fn run_bare(shape: Shape, time: Duration) -> Result<Figures> {
    let mut bare = Bare::start(shape.0.into())?;
    // The target's connections have their windows open by the time that counts.
    run_shape(&mut bare.links, shape, Duration::from_millis(50))?;
    run_shape(&mut bare.links, shape, time)
}

/// Compares two shapes of 4 KiB reads, of the target and of the bare loop; judges what the target
/// loses from the first to the second beyond what the bare loop does.
fn shapes(targets: &[Target], args: &Args, report: &mut Report, two: [Shape; 2]) -> Result<()> {
    let name = |(connections, depth): Shape| {
        let plural = if connections == 1 { "" } else { "s" };
        format!("{connections} connection{plural}, depth {depth}")
    };
    // The controllers live as long as their admin queues.
    let mut hosts = Vec::new();
    let mut sides = Vec::new();
    for (build, target) in targets.iter().enumerate() {
        for shape in two {
            let mut links = Vec::new();
            while links.len() < usize::from(shape.0) {
                let queues = (usize::from(shape.0) - links.len()).min(QUEUES.into()) as u16;
                let mut host = connect(target, 100 + hosts.len(), queues)?;
                links.append(&mut host.io);
                hosts.push(host);
            }
            let words = if build == 0 { name(shape) } else { format!("beside, {}", name(shape)) };
            sides.push(side(&words, move |time| run_shape(&mut links, shape, time)));
        }
    }
    for shape in two {
        let words = format!("bare loop, {}", name(shape));
        sides.push(side(&words, move |time| run_bare(shape, time)));
    }
    let iops = measure(args, sides)?;
    let [.., bare_first, bare_second] = iops[..] else { unreachable!("two sides were pushed") };
    for pair in iops.chunks(2).take(targets.len()) {
        println!(
            "  second, of the first: {:.2}; of the bare loop: {:.2}, {:.2}",
            pair[1] / pair[0],
            pair[0] / bare_first,
            pair[1] / bare_second
        );
    }
    let (ours, bares) = (iops[1] / iops[0], bare_second / bare_first);
    println!("  second, of the first, of the bare loop: {bares:.2}");
    let what = format!("{}, of {}, to the bare loop's", name(two[1]), name(two[0]));
    let judged = ours / bares.min(1.0);
    let words =
        format!("judged {judged:.2} (goal 0.9), plain {ours:.2}, of the bare loop {bares:.2}");
    report.judge(&what, judged / 0.90, &words);
    Ok(())
}

fn connections(binary: &Path, targets: &[Target], args: &Args, report: &mut Report) -> Result<()> {
    shapes(targets, args, report, [(1, 160), (10, 16)])?;

    let target = &targets[0];
    let resident = || process::resident_bytes(target.pid());
    let mut one = connect(target, 1, 1)?;
    let before = resident()?;
    let connect_all = || {
        (0..HOSTS).map(|n| connect(target, 10 + n, QUEUES)).collect::<Result<Vec<Association>>>()
    };
    let mut idle = connect_all()?;
    let count = (HOSTS * (usize::from(QUEUES) + 1)) as f64;
    let each = (resident()?.saturating_sub(before)) as f64 / count / 1024.0;
    report.at_most(&format!("memory of each of {count} idle connections, KiB"), each, 128.0);
    let tls = tls_memory(binary)?;
    println!(
        "memory of each of {count} idle connections with TLS, KiB: {tls:.1} ({each:.1} plain)"
    );

    // The same host with and without all the others connected.
    let mut rounds = [Vec::new(), Vec::new()];
    for _ in 0..args.rounds {
        for rounds in &mut rounds {
            // What ended or began is over before the clock starts.
            load::run(&mut one.io, &work(32, 1), Duration::from_millis(100))?;
            rounds.push(load::run(&mut one.io, &work(32, 1), Duration::from_millis(args.millis))?);
            idle = if idle.is_empty() { connect_all()? } else { Vec::new() };
        }
    }
    drop(idle);
    let [beside, alone] = rounds.map(Summary::of);
    print_side("alone", &alone);
    print_side("beside idle connections", &beside);
    let ratio = beside.median.iops / alone.median.iops;
    report.at_least("one busy connection beside 210 idle ones, of alone", ratio, 0.90);
    drop(one);

    // From one to hundreds: with as much under way each, and with as much under way in all.
    shapes(targets, args, report, [(QUEUES, 16), (QUEUES * HOSTS as u16, 16)])?;
    shapes(targets, args, report, [(1, 200), (200, 1)])
}

/// Memory of each of as many idle connections with TLS, in KiB, of a process that had none before.
fn tls_memory(binary: &Path) -> Result<f64> {
    let target = Target::start(binary, &["bench=null:1GiB".to_owned()], ENTRIES)?;
    let connect = |host: &KeyedHost, queues| {
        associate(target.tls, (SUBNQN, &host.nqn), ENTRIES, queues, &host.protection)
            .with_context(|| format!("connecting to {} with TLS", target.tls))
    };
    let keyed = (0..=HOSTS)
        .map(|n| target.add_host(200 + n, Suite::Aes128GcmSha256))
        .collect::<Result<Vec<_>>>()?;
    let (first, others) = keyed.split_first().context("hosts with keys")?;
    let _one = connect(first, 1)?;
    let before = process::resident_bytes(target.pid())?;
    let _idle =
        others.iter().map(|host| connect(host, QUEUES)).collect::<Result<Vec<Association>>>()?;
    let used = process::resident_bytes(target.pid())?.saturating_sub(before);
    Ok(used as f64 / (HOSTS * (usize::from(QUEUES) + 1)) as f64 / 1024.0)
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
        side("1 of 1,000 volumes", |time| run(1, time)),
        side("all of 1,000 volumes in turn", |time| run(VOLUMES, time)),
    )?;
    report.at_least("1,000 volumes, of one", ratio, 0.90);
    Ok(())
}

/// What it costs to follow one request in so many, in many short turns: the goal is below what
/// single rounds differ by. Where the noise is larger than what is judged, nothing is: then more
/// rounds or a quieter machine are needed.
fn following(target: &Target, args: &Args, report: &mut Report) -> Result<()> {
    const ROUNDS: usize = 120;
    const GOAL: f64 = 0.98;
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
        let what = format!("4 KiB {kind} at depth {depth}, 1 in {FOLLOW_EVERY} followed, of none");
        let words = format!("{:.3} (goal {GOAL}), noise {:.3}", ratio.value, ratio.noise);
        if ratio.is_decided(GOAL, 1.0 - GOAL) {
            report.judge(&what, ratio.value / GOAL, &words);
        } else {
            println!("{what}: {words}  UNDECIDED, the noise is larger than what is judged");
        }
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
                side("fio, io_uring, O_DIRECT", |time| fio.run(rw, depth, time)),
                side("the file backend", |time| alone(binary, &fio.file, rw, depth, time)),
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
            side("fio, io_uring, O_DIRECT", |time| fio.run("read", depth, time)),
            side("the target, through the fabric", |time| {
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
