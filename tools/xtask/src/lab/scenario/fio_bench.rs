//! `cargo xtask bench fio`: the jobs of `fio-jobs/` on every engine this machine can run, one table.
//!
//! ```text
//!  engine          the way to the volume
//!  kernel          the kernel's NVMe/TCP host ─────────────────────────────► target
//!  libblkio        fio drives a vhost-user socket ──► emulator ────────────► target
//!  virtio-blk      a guest's disk ──► QEMU ──► vhost-user ──► emulator ────► target
//!  nvme            a guest's NVMe disk ──► QEMU ──► vfio-user ──► emulator ► target
//!  guest-kernel    a guest's NVMe/TCP host ──► QEMU's user network ────────► target
//! ```
//!
//! The volume is of no storage by default, so that the ways are compared and not a disk. The engines
//! on this machine take turns job by job and round by round; a guest runs all of its jobs in one
//! go. Guests need a processor's virtualisation that runs a stock kernel, which is tried: emulated,
//! they measure QEMU. The kernel's host runs in the guest where this machine's kernel has none. An
//! engine that cannot run here is named with the reason.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use serde_json::Value;

use super::super::guest::{Job, json};
use super::super::service::Service;
use super::super::tree::Kernel;
use super::super::{Lab, Scene};
use super::{HOST_ADDRESS, SUBNQN, Target, emulator, fio_result, first, nvme_emulator};
use crate::{exec, install};

/// QEMU arguments of a guest's machine and memory, which a device's server maps.
const MACHINE: &str = "-machine q35,memory-backend=mem,accel=ACCEL -m 1G \
                       -object memory-backend-memfd,id=mem,size=1G,share=on";

/// The kernel's host where it is not this machine's kernel.
const GUEST_KERNEL: &str = "guest-kernel";

/// How long a stock kernel may take to show a sign of life under KVM.
const KVM_LIMIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(no_binary_name = true, name = "cargo xtask bench fio")]
struct Args {
    /// Seconds of each job.
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    runtime: u32,
    /// Rounds; the table shows the median.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Only jobs whose name contains this, such as `randread-4k`.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// The volume.
    #[arg(long, value_name = "SPEC", default_value = "null:64GiB")]
    volume: String,
    /// Run guests on QEMU's emulated processor where there is no KVM: shows that they work; their
    /// figures say nothing.
    #[arg(long)]
    emulated: bool,
    /// Take the release binary as it is.
    #[arg(long)]
    no_build: bool,
    /// Write the table as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What fio found, reads and writes together.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Figures {
    iops: f64,
    bytes_per_s: f64,
    mean_us: f64,
    p99_us: f64,
}

/// Figures of each round, by the job's place among the jobs and the engine.
type Table = BTreeMap<(usize, &'static str), Vec<Figures>>;

/// Measures and prints; `false`: no engine could run.
pub(crate) fn task(rest: &[String]) -> Result<bool> {
    let args = Args::try_parse_from(rest).unwrap_or_else(|error| error.exit());
    ensure!(args.rounds > 0 && args.runtime > 0, "--rounds and --runtime: 1 or more");
    if !args.no_build {
        let mut build = crate::workspace::cargo();
        exec::run(build.args(["build", "--release", "-p", "penstock"]))?;
    }
    let lab = match Lab::open()? {
        Ok(lab) => lab,
        Err(why) => bail!("{why}"),
    };
    let scene = lab.scene("bench-fio")?;
    let jobs = jobs(&scene.lab.checkout.join("fio-jobs"), &args.only)?;
    let mut table = Table::new();
    let mut skipped = Vec::new();
    natively(&scene, &args, &jobs, &mut table, &mut skipped)?;
    let wants_kernel = !table.keys().any(|(_, engine)| *engine == "kernel");
    in_guests(&scene, &args, &jobs, wants_kernel, &mut table, &mut skipped)?;

    print(&jobs, &table);
    for (engine, why) in &skipped {
        println!("skipped: {engine}: {why}");
    }
    if let Some(path) = &args.json {
        let rows: Vec<Value> = table
            .iter()
            .map(|((job, engine), rounds)| {
                let m = median(rounds);
                serde_json::json!({ "job": jobs[*job], "engine": engine, "iops": m.iops,
                    "bytes_per_s": m.bytes_per_s, "mean_us": m.mean_us, "p99_us": m.p99_us })
            })
            .collect();
        fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(!table.is_empty())
}

fn print(jobs: &[String], table: &Table) {
    println!(
        "{:<24} {:<12} {:>10} {:>9} {:>10} {:>10}",
        "job", "engine", "IOPS", "MB/s", "mean us", "p99 us"
    );
    for ((job, engine), rounds) in table {
        let m = median(rounds);
        println!(
            "{:<24} {engine:<12} {:>10.0} {:>9.0} {:>10.1} {:>10.1}",
            jobs[*job],
            m.iops,
            m.bytes_per_s / 1e6,
            m.mean_us,
            m.p99_us
        );
    }
}

/// The round in the middle, by IOPS.
fn median(rounds: &[Figures]) -> Figures {
    let mut rounds = rounds.to_vec();
    rounds.sort_by(|a, b| a.iops.total_cmp(&b.iops));
    rounds[rounds.len() / 2]
}

/// Names of the jobs that measure something, in order of name and depth.
fn jobs(folder: &Path, only: &str) -> Result<Vec<String>> {
    let mut jobs = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(job) = name.strip_suffix(".fio")
            && !job.contains("verify")
            && job.contains(only)
        {
            jobs.push(job.to_owned());
        }
    }
    jobs.sort_by_cached_key(|job| {
        let (name, depth) = job.rsplit_once("-qd").unwrap_or((job, ""));
        (name.to_owned(), depth.parse::<u32>().unwrap_or(0))
    });
    ensure!(!jobs.is_empty(), "no job of {} contains {only:?}", folder.display());
    Ok(jobs)
}

/// The figures in fio's JSON.
fn figures(results: &Value, name: &str) -> Result<Figures> {
    fio_result(results, name)?;
    let job = first(&results["jobs"]);
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let mut sum = Figures { iops: 0.0, bytes_per_s: 0.0, mean_us: 0.0, p99_us: 0.0 };
    for side in [&job["read"], &job["write"]] {
        let iops = number(&side["iops"]);
        sum.iops += iops;
        sum.bytes_per_s += number(&side["bw_bytes"]);
        sum.mean_us += number(&side["lat_ns"]["mean"]) / 1e3 * iops;
        sum.p99_us = sum.p99_us.max(number(&side["clat_ns"]["percentile"]["99.000000"]) / 1e3);
    }
    ensure!(sum.iops > 0.0, "{name}: fio did no I/O");
    sum.mean_us /= sum.iops;
    Ok(sum)
}

/// A way to a volume that fio on this machine can take.
struct Engine {
    name: &'static str,
    /// The variables that the engine's file wants.
    variables: Vec<(&'static str, PathBuf)>,
    /// fio.
    program: Box<dyn Fn() -> Result<Command>>,
    file: &'static str,
    /// What has to stay for it to work.
    _held: Box<dyn std::any::Any>,
}

fn natively(
    scene: &Scene<'_>,
    args: &Args,
    jobs: &[String],
    table: &mut Table,
    skipped: &mut Vec<(&'static str, String)>,
) -> Result<()> {
    let target = Target::new(scene, &[format!("bench={}", args.volume)])?;
    let mut service = target.start(scene)?;
    let mut engines = Vec::new();
    for (name, engine) in
        [("kernel", kernel(scene, &target)), ("libblkio", libblkio(scene, &target))]
    {
        match engine? {
            Ok(engine) => engines.push(engine),
            Err(why) => skipped.push((name, why)),
        }
    }
    for (at, job) in jobs.iter().enumerate() {
        for round in 0..args.rounds {
            for engine in &engines {
                let found = fio(scene, engine, job, args.runtime)
                    .with_context(|| format!("{job} on {}, round {round}", engine.name))?;
                table.entry((at, engine.name)).or_default().push(found);
            }
        }
    }
    service.must_run()
}

fn fio(scene: &Scene<'_>, engine: &Engine, job: &str, runtime: u32) -> Result<Figures> {
    let folder = scene.lab.checkout.join("fio-jobs");
    // fio keeps what one file says of all jobs from the next file: the two have to be one.
    let both = scene.path(&format!("{}-{job}.fio", engine.name));
    let engine_file = fs::read(folder.join("engine").join(engine.file))?;
    fs::write(&both, [engine_file, fs::read(folder.join(format!("{job}.fio")))?].concat())?;
    let out = scene.path(&format!("{}-{job}.json", engine.name));
    let mut fio = (engine.program)()?;
    fio.args(["--eta=never", "--output-format=json", "--output"]).arg(&out).arg(&both);
    fio.env("RUNTIME", runtime.to_string()).current_dir(&scene.folder);
    fio.envs(engine.variables.iter().map(|(name, value)| (name, value)));
    exec::run(&mut fio)?;
    figures(&json(&fs::read_to_string(&out)?)?, job)
}

fn libblkio(scene: &Scene<'_>, target: &Target) -> Result<Result<Engine, String>> {
    if let Err(why) = scene.tree().fio_blkio() {
        return Ok(Err(why));
    }
    let socket = scene.socket("bench.sock");
    let device = emulator(scene, &socket, target, 1)?;
    // Where it is, to be run without the lab's borrow.
    let fio = scene.tree().fio_blkio().map_err(anyhow::Error::msg)?;
    Ok(Ok(Engine {
        name: "libblkio",
        variables: vec![("SOCKET", socket)],
        program: Box::new(move || Ok(again(&fio))),
        file: "libblkio.fio",
        _held: Box::new(device),
    }))
}

/// A command once more: the standard library's cannot be cloned.
fn again(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    copy.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    copy
}

/// A connection of the kernel's host; ends with this.
struct Connected {
    nvme: Command,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut end = again(&self.nvme);
        if let Err(error) = exec::output(end.args(["disconnect", "-n", SUBNQN])) {
            println!("the kernel's host stays connected: {error:#}");
        }
    }
}

fn kernel(scene: &Scene<'_>, target: &Target) -> Result<Result<Engine, String>> {
    let fabrics = Path::new("/dev/nvme-fabrics");
    if !install::is_root() {
        return Ok(Err("connecting the kernel's host needs root".to_owned()));
    }
    if !fabrics.exists() {
        let modprobe = install::program("modprobe").unwrap_or("modprobe".into());
        if !exec::succeeds(Command::new(modprobe).arg("nvme-tcp")) || !fabrics.exists() {
            return Ok(Err("this kernel has no NVMe/TCP host (nvme-tcp)".to_owned()));
        }
    }
    let nvme = scene.tree().program("usr/sbin/nvme");
    let port = target.port.to_string();
    let mut connect = again(&nvme);
    connect.args(["connect", "-t", "tcp", "-a", "127.0.0.1", "-s", &port, "-n", SUBNQN]);
    exec::run(&mut connect)?;
    let held = Connected { nvme };
    let device = namespace()?;
    let fio = scene.tree().program("usr/bin/fio");
    Ok(Ok(Engine {
        name: "kernel",
        variables: vec![("FILENAME", device)],
        program: Box::new(move || Ok(again(&fio))),
        file: "kernel.fio",
        _held: Box::new(held),
    }))
}

/// The block device of the first namespace of our subsystem. Never another one: jobs write.
fn namespace() -> Result<PathBuf> {
    let subsystems = Path::new("/sys/class/nvme-subsystem");
    let limit = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        for entry in fs::read_dir(subsystems)? {
            let folder = entry?.path();
            let nqn = fs::read_to_string(folder.join("subsysnqn")).unwrap_or_default();
            if nqn.trim() != SUBNQN {
                continue;
            }
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                let device = Path::new("/dev").join(entry.file_name());
                if entry.path().join("nsid").exists() && device.exists() {
                    return Ok(device);
                }
            }
        }
        ensure!(std::time::Instant::now() < limit, "the kernel's host shows no namespace");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn in_guests(
    scene: &Scene<'_>,
    args: &Args,
    jobs: &[String],
    wants_kernel: bool,
    table: &mut Table,
    skipped: &mut Vec<(&'static str, String)>,
) -> Result<()> {
    let accel = if args.emulated {
        "tcg"
    } else {
        match kvm(scene)? {
            Ok(()) => "kvm",
            Err(why) => {
                let engines =
                    ["virtio-blk", "nvme"].into_iter().chain(wants_kernel.then_some(GUEST_KERNEL));
                skipped.extend(engines.map(|engine| (engine, why.clone())));
                return Ok(());
            }
        }
    };
    let volumes = ["a", "b", "c"].map(|name| format!("{name}={}", args.volume));
    let target = Target::new(scene, &volumes)?;
    let mut service = target.start(scene)?;
    let [virtio, nvme] = ["guest-virtio.sock", "guest-nvme.sock"].map(|name| scene.socket(name));
    let mut devices: [Service; 2] =
        [emulator(scene, &virtio, &target, 1)?, nvme_emulator(scene, &nvme, &target, "2", &[])?];
    let (runtime, rounds) = (args.runtime.to_string(), args.rounds.to_string());
    let port = target.port.to_string();
    let mut words = vec![&*runtime, &rounds];
    if wants_kernel {
        words.extend([HOST_ADDRESS, &port, SUBNQN, "3"]);
    }
    let mut job = Job::new("fio-bench.sh")
        .network()
        .args(&words)
        .machine(MACHINE.replace("ACCEL", accel).split_whitespace().map(str::to_owned).collect())
        .vfio_user(&nvme)
        .vhost_user_blk(&virtio);
    let runs = (2 + usize::from(wants_kernel)) * jobs.len() * args.rounds;
    job.limit =
        Duration::from_secs(120) + Duration::from_secs(2 + u64::from(args.runtime)) * runs as u32;
    let folder = scene.lab.checkout.join("fio-jobs");
    for name in jobs {
        job = job.file(&format!("{name}.fio"), fs::read(folder.join(format!("{name}.fio")))?);
    }
    job = job.file("engine", fs::read(folder.join("engine/kernel.fio"))?);
    let results = scene.boot("guest", Kernel::Backports, &job)?.finish()?;
    for name in results.names(".json")? {
        // ENGINE_JOB_ROUND.json
        let mut parts = name.trim_end_matches(".json").split('_');
        let (Some(engine), Some(job)) = (parts.next(), parts.next()) else { continue };
        let engine = match engine {
            "nvme" => "nvme",
            "kernel" => GUEST_KERNEL,
            _ => "virtio-blk",
        };
        let at = jobs.iter().position(|known| known == job);
        let at = at.with_context(|| format!("the guest left {name}, which is of no job"))?;
        let found = figures(&results.json(&name)?, &name)?;
        table.entry((at, engine)).or_default().push(found);
    }
    for device in &mut devices {
        device.must_run()?;
    }
    service.must_run()
}

/// Whether a stock kernel comes up under KVM here; some hosts offer a KVM that runs only kernels
/// made for it.
fn kvm(scene: &Scene<'_>) -> Result<Result<(), String>> {
    let may = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = may {
        return Ok(Err(format!("/dev/kvm: {error}")));
    }
    let mut job = Job::new("true.sh")
        .machine(MACHINE.replace("ACCEL", "kvm").split_whitespace().map(str::to_owned).collect());
    job.limit = KVM_LIMIT;
    match scene.boot("kvm", Kernel::Backports, &job)?.finish() {
        Ok(_) => Ok(Ok(())),
        Err(_) => Ok(Err(format!(
            "a stock kernel does not come up under this machine's KVM within {} s",
            KVM_LIMIT.as_secs()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_added_and_weighed() {
        let side = |iops: f64, mean: f64, p99: f64| {
            serde_json::json!({ "io_bytes": 4096, "iops": iops, "bw_bytes": iops * 4096.0,
                "lat_ns": { "mean": mean }, "clat_ns": { "percentile": { "99.000000": p99 } } })
        };
        let results = serde_json::json!({ "jobs": [{ "error": 0,
            "read": side(300.0, 1000.0, 5000.0), "write": side(100.0, 5000.0, 9000.0) }] });
        let found = figures(&results, "x").unwrap();
        assert_eq!(
            found,
            Figures { iops: 400.0, bytes_per_s: 400.0 * 4096.0, mean_us: 2.0, p99_us: 9.0 }
        );
        // One direction alone; a direction without I/O has no percentiles.
        let results = serde_json::json!({ "jobs": [{ "error": 0,
            "read": side(300.0, 1000.0, 5000.0), "write": { "io_bytes": 0, "iops": 0.0 } }] });
        assert_eq!(figures(&results, "x").unwrap().mean_us, 1.0);
        let results = serde_json::json!({ "jobs": [{ "error": 5, "read": side(1.0, 1.0, 1.0) }] });
        assert!(figures(&results, "x").is_err());
    }

    #[test]
    fn the_median_round_is_shown() {
        let round = |iops| Figures { iops, bytes_per_s: 0.0, mean_us: 0.0, p99_us: 0.0 };
        assert_eq!(median(&[round(3.0), round(1.0), round(2.0)]).iops, 2.0);
        assert_eq!(median(&[round(7.0)]).iops, 7.0);
    }

    #[test]
    fn jobs_come_by_name_and_depth_without_those_that_measure_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b-qd128.fio", "b-qd32.fio", "b-qd1.fio", "a-qd1.fio", "c-verify-qd1.fio", "x"]
        {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(jobs(folder.path(), "").unwrap(), ["a-qd1", "b-qd1", "b-qd32", "b-qd128"]);
        assert_eq!(jobs(folder.path(), "b-").unwrap().len(), 3);
        assert!(jobs(folder.path(), "nothing").is_err());
    }
}
