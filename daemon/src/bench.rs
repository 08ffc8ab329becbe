//! Load generator over [`block::Volume`]: what `penstock bench` runs.
//!
//! ```text
//!  Workload ──► Plan (pure: next offset and direction) ─┐
//!                                                       ├─► Job (one task per core) ─► Channel
//!               pattern (pure: fill and check blocks) ──┘        │
//!                                              histograms, counts ▼
//!                                                             Report
//! ```
//!
//! Every job has a core, a channel and a part of the volume of its own. Each I/O object and its
//! buffer is made before the clock starts and only moved afterwards; a turn allocates nothing.
//! Latency runs from the submission to the poll that brings the I/O back.

mod breakdown;
mod job;
pub(crate) mod pattern;
mod plan;
mod report;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use block::{Geometry, Volume, VolumeSpec};
use nvme::spec::Nqn;
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use reactor::{CoreConfig, CoreHandle};

use crate::cores::{self, Cores, CoresError};
use crate::credentials::CredentialsConfig;
use crate::identity;

pub use breakdown::{Breakdown, OwnTarget, SAMPLE_EVERY, Share as StageShare, Way};
pub use pattern::Mismatch;
pub use report::{Latency, Report, Side, VerifyReport};

/// Places with a generation each that a `--verify` run keeps in memory: 4 bytes apiece.
const TRACKED_PLACES_MAX: u64 = 1 << 26;

/// Direction and order of the I/Os.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Random or sequential offsets.
    pub random: bool,
    /// Percentage of reads: 100 reads only, 0 writes only.
    pub read_percent: u8,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Direction and order.
    pub access: Access,
    /// Bytes of one I/O.
    pub io_bytes: u64,
    /// I/Os in flight of each job.
    pub depth: u32,
    /// Jobs; each needs a core.
    pub jobs: u16,
    /// How long new I/Os are started.
    pub runtime: Duration,
    /// Bytes from the beginning of the volume to use; all of it if `None`.
    pub size_bytes: Option<u64>,
    /// Write a pattern, check what is read, read back at the end.
    pub verify: bool,
    /// Seed of offsets and pattern.
    pub seed: u64,
}

/// Why a run could not be made, or ended early.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A setting does not fit the volume.
    #[error("{0}")]
    Setting(String),
    /// The cores could not be used.
    #[error(transparent)]
    Cores(#[from] CoresError),
    /// A channel could not be opened or memory not be had.
    #[error("cannot begin: {0}")]
    Begin(std::io::Error),
    /// A job ended without a result.
    #[error("a job ended without a result")]
    Lost,
}

/// The part of the volume and the numbers one job works with.
#[derive(Debug, Clone)]
struct Share {
    first: u64,
    count: u64,
}

impl Workload {
    /// The bytes of pool memory one core needs for a job.
    pub fn pool_bytes(&self) -> usize {
        // Twice the buffers: size classes round up, and a remote volume keeps a few for itself.
        (self.io_bytes.max(4096) as usize).saturating_mul(self.depth as usize * 2) + (16 << 20)
    }

    /// Splits the volume among the jobs.
    fn shares(&self, geometry: &Geometry) -> Result<Vec<Share>, BenchError> {
        let setting = |message: String| Err(BenchError::Setting(message));
        let block = u64::from(geometry.block_bytes);
        let io_max = u64::from(geometry.io_bytes_max);
        if self.io_bytes == 0 || !self.io_bytes.is_multiple_of(block) || self.io_bytes > io_max {
            return setting(format!(
                "--bs {}: allowed: a multiple of the block size {block}, at most {io_max} bytes",
                self.io_bytes
            ));
        }
        let capacity = geometry.blocks.saturating_mul(block);
        let size = self.size_bytes.unwrap_or(capacity);
        if size > capacity || size < self.io_bytes {
            return setting(format!(
                "--size {size}: allowed: from --bs ({}) to the size of the volume ({capacity}), in \
                 bytes",
                self.io_bytes
            ));
        }
        if geometry.read_only && self.access.read_percent != 100 {
            return setting("the volume is read-only; allowed: --rw read or randread".to_owned());
        }
        let places = size / self.io_bytes;
        let jobs = u64::from(self.jobs);
        if places < jobs {
            return setting(format!(
                "--jobs {jobs}: allowed: at most one for each of the {places} I/Os that fit --size"
            ));
        }
        if self.verify && self.access.read_percent != 100 && places > TRACKED_PLACES_MAX {
            return setting(format!(
                "--verify keeps 4 bytes for each place: allowed: --size of at most {} bytes with \
                 this --bs",
                TRACKED_PLACES_MAX.saturating_mul(self.io_bytes)
            ));
        }
        let each = places / jobs;
        // Random jobs may overlap unless places are tracked; then each has its own part.
        let apart = !self.access.random || self.verify;
        Ok((0..jobs)
            .map(|job| match apart {
                true => Share { first: job * each, count: each },
                false => Share { first: 0, count: places },
            })
            .collect())
    }
}

/// What to load.
#[derive(Debug, Clone)]
pub struct Load {
    name: String,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Local(VolumeSpec),
    Remote(Box<RemoteConfig>),
}

/// A target that is away for longer than this fails the run instead of holding it.
const TARGET_PATIENCE: Duration = Duration::from_secs(15);

impl Load {
    /// A volume opened by this process.
    pub fn local(spec: &str) -> anyhow::Result<Load> {
        let spec: VolumeSpec = spec.parse()?;
        Ok(Load { name: spec.to_string(), source: Source::Local(spec) })
    }

    /// A namespace of a target.
    pub fn remote(
        addr: SocketAddr,
        subnqn: &str,
        nsid: u32,
        digests: bool,
        hostnqn: Option<&str>,
        credentials: &CredentialsConfig,
    ) -> anyhow::Result<Load> {
        let subnqn: Nqn =
            subnqn.parse().map_err(|problem| anyhow::anyhow!("--subnqn {subnqn:?}: {problem}"))?;
        let mut host = identity::derive_host();
        if let Some(text) = hostnqn {
            host.nqn =
                text.parse().map_err(|problem| anyhow::anyhow!("--hostnqn {text:?}: {problem}"))?;
        }
        let security = credentials.load(&host.nqn, &subnqn, None)?;
        let config = RemoteConfig {
            header_digest: digests,
            data_digest: digests,
            ctrl_loss_timeout: Some(TARGET_PATIENCE),
            security,
            ..RemoteConfig::new(addr, subnqn.clone(), nsid, (host.nqn, host.id))
        };
        config.check()?;
        let name = format!("namespace {nsid} of {subnqn} at {addr}");
        Ok(Load { name, source: Source::Remote(Box::new(config)) })
    }

    /// The volume of a target in this process, through the network.
    pub fn of(target: &OwnTarget) -> anyhow::Result<Load> {
        let subnqn: Nqn = target.subnqn().parse()?;
        let host = identity::derive_host();
        let config = RemoteConfig {
            ctrl_loss_timeout: Some(TARGET_PATIENCE),
            ..RemoteConfig::new(target.address()?, subnqn, 1, (host.nqn, host.id))
        };
        config.check()?;
        let name = format!("{}, by a target in this process", target.spec());
        Ok(Load { name, source: Source::Remote(Box::new(config)) })
    }

    /// Opens the volume, runs `workload` on cores of its own, and closes it again. Blocks;
    /// `progress` is as for [`run`].
    pub fn run(
        &self,
        workload: &Workload,
        progress: &mut dyn FnMut(f64) -> bool,
    ) -> anyhow::Result<Report> {
        let config = CoreConfig { pool_bytes: workload.pool_bytes(), ..cores::core_config() };
        let cores = Cores::start("bench", workload.jobs, &config, |_| {})?;
        let mut report = match &self.source {
            Source::Local(spec) => {
                let volume = spec.open(identity::derive_volume(&Nqn::discovery(), &self.name))?;
                run(&volume, workload, &cores, progress)?
            }
            Source::Remote(config) => {
                let config = RemoteConfig {
                    queues: workload.jobs,
                    queue_depth: workload.depth.min(1023) as u16,
                    ..RemoteConfig::clone(config)
                };
                let remote = cores.on(0, move |spawner| {
                    let (volume, task) = RemoteVolume::start(config, spawner.local())?;
                    spawner.spawn(task);
                    anyhow::Ok(volume)
                })??;
                remote.wait_ready(TARGET_PATIENCE)?;
                let volume: Arc<dyn Volume> = remote.clone();
                let report = run(&volume, workload, &cores, progress);
                remote.shutdown();
                remote.wait_stopped(Duration::from_secs(2));
                report?
            }
        };
        anyhow::ensure!(cores.stop(), "a core panicked");
        report.volume.clone_from(&self.name);
        Ok(report)
    }
}

/// Runs `workload` on `volume`, job *n* on core *n*. `progress` is called about ten times a second
/// with the part of the runtime that has passed (0 to 1); `false` from it ends the run early.
pub fn run(
    volume: &Arc<dyn Volume>,
    workload: &Workload,
    cores: &Cores,
    progress: &mut dyn FnMut(f64) -> bool,
) -> Result<Report, BenchError> {
    let geometry = volume.geometry();
    let shares = workload.shares(&geometry)?;
    if shares.len() > cores.handles().len() {
        return Err(BenchError::Setting("each job needs a core".to_owned()));
    }

    // All buffers and channels first, so that no job runs while another still sets up.
    let (events, inbox) = mpsc::channel();
    let signal = job::Signal::default();
    // Tells this run's blocks from those of an earlier one with the same seed.
    let run_id = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |since| since.as_millis() as u32);
    for (index, share) in shares.iter().enumerate() {
        let settings = job::Settings {
            workload: workload.clone(),
            share: share.clone(),
            run_id,
            geometry,
            signal: signal.clone(),
        };
        let volume = volume.clone();
        let events = events.clone();
        cores
            .on(index, move |spawner| {
                let job = job::Job::new(settings, &*volume, spawner.local(), events)?;
                spawner.spawn(Box::new(job));
                Ok(())
            })?
            .map_err(BenchError::Begin)?;
    }
    drop(events);

    let wake = || cores.handles().iter().for_each(CoreHandle::wake);
    let cpu_before = process_cpu();
    let begun = Instant::now();
    signal.go();
    wake();
    let mut cpu = Duration::ZERO;
    let mut measured = 0;
    let mut ended = Vec::with_capacity(shares.len());
    while ended.len() < shares.len() {
        match inbox.recv_timeout(Duration::from_millis(100)) {
            Ok(job::Event::Measured) => {
                measured += 1;
                if measured == shares.len() {
                    cpu = process_cpu().saturating_sub(cpu_before);
                }
            }
            Ok(job::Event::Ended(outcome)) => ended.push(*outcome),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(BenchError::Lost),
        }
        let passed = begun.elapsed().as_secs_f64() / workload.runtime.as_secs_f64();
        if !progress(passed.min(1.0)) {
            signal.stop();
            wake();
        }
    }
    Ok(report::combine(workload, &geometry, &ended, cpu))
}

/// Processor time of this process, all threads, user and system.
fn process_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            access: Access { random: true, read_percent: 50 },
            io_bytes: 4096,
            depth: 8,
            jobs: 2,
            runtime: Duration::from_millis(50),
            size_bytes: None,
            verify: true,
            seed: 1,
        }
    }

    fn run(spec: &str, workload: &Workload) -> anyhow::Result<Report> {
        Load::local(spec)?.run(workload, &mut |_| true)
    }

    #[test]
    fn a_good_volume_verifies() {
        let report = run("ram:4MiB", &workload()).unwrap();
        assert!(report.is_good(), "{report}");
        assert!(report.read.ios > 0 && report.write.ios > 0, "{report}");
        // Everything written was read back at the end.
        assert!(report.verify.unwrap().checked_ios > 0);
        let latency = report.write.latency_us.unwrap();
        assert!(latency.min <= latency.p50 && latency.p50 <= latency.p99);
        assert!(latency.p99 <= latency.p99_9 && latency.p99_9 <= latency.max);
    }

    #[test]
    fn a_volume_that_loses_writes_is_caught() {
        let report = run("null:4MiB", &workload()).unwrap();
        let verify = report.verify.clone().unwrap();
        assert!(!report.is_good() && verify.mismatches > 0, "{report}");
        assert!(report.to_string().contains("zeros, where the pattern should be"), "{report}");
    }

    #[test]
    fn a_run_ends_early_when_told() {
        let workload = Workload { runtime: Duration::from_secs(600), ..workload() };
        let report = Load::local("ram:4MiB").unwrap().run(&workload, &mut |_| false).unwrap();
        assert!(report.is_good() && report.elapsed_s < 60.0, "{report}");
    }

    #[test]
    fn settings_that_do_not_fit_are_named() {
        let good = workload();
        for (wrong, expected) in [
            (
                Workload { io_bytes: 1000, ..good.clone() },
                "--bs 1000: allowed: a multiple of the block size 512",
            ),
            (Workload { io_bytes: 0, ..good.clone() }, "--bs 0"),
            (
                Workload { size_bytes: Some(5 << 20), ..good.clone() },
                "--size 5242880: allowed: from --bs (4096) to the size of the volume (4194304)",
            ),
            (Workload { size_bytes: Some(4096), ..good.clone() }, "--jobs 2: allowed: at most one"),
        ] {
            let error = run("ram:4MiB", &wrong).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let huge = Workload { io_bytes: 512, ..good };
        let error = run("null:1TiB", &huge).unwrap_err().to_string();
        assert!(error.contains("--verify keeps 4 bytes for each place"), "{error}");
    }
}
