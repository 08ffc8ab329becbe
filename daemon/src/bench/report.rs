//! What a run found: numbers for people and for programs.

use std::fmt;
use std::time::Duration;

use block::Geometry;
use hdrhistogram::Histogram;
use serde::Serialize;

use super::job::{Counts, Outcome};
use super::{Breakdown, Workload};

/// The result of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was loaded, as the operator named it.
    pub volume: String,
    /// `read`, `write`, `randread`, `randwrite`, `rw` or `randrw`.
    pub rw: &'static str,
    /// Percentage of reads asked for.
    pub read_percent: u8,
    /// Bytes of one I/O.
    pub io_bytes: u64,
    /// I/Os in flight of each job.
    pub iodepth: u32,
    /// Jobs.
    pub jobs: u16,
    /// Bytes of the volume that were used.
    pub size_bytes: u64,
    /// From the first submission to the last completion, in seconds.
    pub elapsed_s: f64,
    /// Reads.
    pub read: Side,
    /// Writes.
    pub write: Side,
    /// I/Os a second, both directions.
    pub iops: f64,
    /// Bytes a second, both directions.
    pub bandwidth_bytes_per_s: f64,
    /// Processor time of this process for each I/O, in microseconds.
    pub cpu_us_per_io: f64,
    /// Processor time of this process in percent of one processor.
    pub cpu_percent: f64,
    /// I/Os that failed.
    pub errors: u64,
    /// The first failure, if any.
    pub first_error: Option<String>,
    /// What `--verify` found, if asked for.
    pub verify: Option<VerifyReport>,
    /// Where the time went at the target, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breakdown: Option<Breakdown>,
}

/// One direction.
#[derive(Debug, Clone, Serialize)]
pub struct Side {
    /// I/Os done.
    pub ios: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// I/Os a second.
    pub iops: f64,
    /// Bytes a second.
    pub bandwidth_bytes_per_s: f64,
    /// Latency, if there was an I/O.
    pub latency_us: Option<Latency>,
}

/// Latency from submission to completion, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    /// Smallest.
    pub min: f64,
    /// Mean.
    pub mean: f64,
    /// Half of the I/Os took no longer.
    pub p50: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
    /// 999 of 1,000 took no longer.
    #[serde(rename = "p99.9")]
    pub p99_9: f64,
    /// Largest.
    pub max: f64,
}

/// What checking blocks found.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    /// Reads whose content was checked, the read-back included.
    pub checked_ios: u64,
    /// Reads that brought something else than was written.
    pub mismatches: u64,
    /// The first of them, if any.
    pub first_mismatch: Option<String>,
}

impl Report {
    /// Whether everything succeeded and every block checked was right.
    pub fn is_good(&self) -> bool {
        self.errors == 0 && self.verify.as_ref().is_none_or(|verify| verify.mismatches == 0)
    }
}

pub(super) fn combine(
    workload: &Workload,
    geometry: &Geometry,
    outcomes: &[Outcome],
    cpu: Duration,
) -> Report {
    let elapsed =
        outcomes.iter().map(|outcome| outcome.elapsed).max().unwrap_or_default().as_secs_f64();
    let mut reads = Counts::new();
    let mut writes = Counts::new();
    for outcome in outcomes {
        for (sum, part) in [(&mut reads, &outcome.reads), (&mut writes, &outcome.writes)] {
            sum.ios += part.ios;
            // Same bounds: adding cannot be out of range.
            let _ = sum.latency.add(&part.latency);
        }
    }
    let read = side(&reads, workload.io_bytes, elapsed);
    let write = side(&writes, workload.io_bytes, elapsed);
    let ios = reads.ios + writes.ios;
    let first_error = outcomes.iter().find_map(|outcome| outcome.first_error);
    let capacity = geometry.blocks.saturating_mul(u64::from(geometry.block_bytes));
    Report {
        volume: String::new(),
        rw: match (workload.access.random, workload.access.read_percent) {
            (false, 100) => "read",
            (false, 0) => "write",
            (false, _) => "rw",
            (true, 100) => "randread",
            (true, 0) => "randwrite",
            (true, _) => "randrw",
        },
        read_percent: workload.access.read_percent,
        io_bytes: workload.io_bytes,
        iodepth: workload.depth,
        jobs: workload.jobs,
        size_bytes: workload.size_bytes.unwrap_or(capacity),
        elapsed_s: elapsed,
        iops: read.iops + write.iops,
        bandwidth_bytes_per_s: read.bandwidth_bytes_per_s + write.bandwidth_bytes_per_s,
        read,
        write,
        cpu_us_per_io: ratio(cpu.as_secs_f64() * 1e6, ios as f64),
        cpu_percent: ratio(cpu.as_secs_f64() * 100.0, elapsed),
        errors: outcomes.iter().map(|outcome| outcome.errors).sum(),
        first_error: first_error.map(|(offset, error)| format!("at byte {offset}: {error}")),
        verify: workload.verify.then(|| VerifyReport {
            checked_ios: outcomes.iter().map(|outcome| outcome.checked).sum(),
            mismatches: outcomes.iter().map(|outcome| outcome.mismatches).sum(),
            first_mismatch: outcomes
                .iter()
                .find_map(|outcome| outcome.first_mismatch.as_ref())
                .map(ToString::to_string),
        }),
        breakdown: None,
    }
}

fn side(counts: &Counts, io_bytes: u64, elapsed: f64) -> Side {
    let bytes = counts.ios.saturating_mul(io_bytes);
    Side {
        ios: counts.ios,
        bytes,
        iops: ratio(counts.ios as f64, elapsed),
        bandwidth_bytes_per_s: ratio(bytes as f64, elapsed),
        latency_us: (counts.ios != 0).then(|| latency(&counts.latency)),
    }
}

fn latency(histogram: &Histogram<u64>) -> Latency {
    let us = |ns: u64| ns as f64 / 1e3;
    Latency {
        min: us(histogram.min()),
        mean: histogram.mean() / 1e3,
        p50: us(histogram.value_at_quantile(0.5)),
        p99: us(histogram.value_at_quantile(0.99)),
        p99_9: us(histogram.value_at_quantile(0.999)),
        max: us(histogram.max()),
    }
}

/// JSON has no infinity: nothing over nothing is nothing.
fn ratio(value: f64, by: f64) -> f64 {
    if by > 0.0 { value / by } else { 0.0 }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} {} bytes, depth {}, {} job{}, {:.1} s on {}",
            self.rw,
            self.io_bytes,
            self.iodepth,
            self.jobs,
            if self.jobs == 1 { "" } else { "s" },
            self.elapsed_s,
            self.volume
        )?;
        for (name, side) in [("read", &self.read), ("write", &self.write)] {
            let Some(latency) = side.latency_us else { continue };
            writeln!(
                f,
                "{name:>6}: {:.0} IOPS, {:.1} MB/s ({:.1} MiB/s), {} I/Os",
                side.iops,
                side.bandwidth_bytes_per_s / 1e6,
                side.bandwidth_bytes_per_s / f64::from(1 << 20),
                side.ios
            )?;
            writeln!(
                f,
                "        latency us: min {:.1}, mean {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, \
                 max {:.1}",
                latency.min, latency.mean, latency.p50, latency.p99, latency.p99_9, latency.max
            )?;
        }
        write!(f, "   cpu: {:.2} us per I/O, {:.0} %", self.cpu_us_per_io, self.cpu_percent)?;
        if let Some(breakdown) = &self.breakdown {
            write!(f, "\n{breakdown}")?;
            let sides =
                [("read", &self.read, &breakdown.read), ("write", &self.write, &breakdown.write)];
            for (name, side, way) in sides {
                let (Some(latency), Some(way)) = (side.latency_us, way) else { continue };
                let rest = (latency.mean - way.total_us).max(0.0);
                write!(f, "\na {name} was {rest:.2} us elsewhere: network, sockets, this end")?;
            }
        }
        if let Some(verify) = &self.verify {
            write!(
                f,
                "\nverify: {} I/Os checked, {} wrong",
                verify.checked_ios, verify.mismatches
            )?;
            if let Some(first) = &verify.first_mismatch {
                write!(f, "; first {first}")?;
            }
        }
        if self.errors != 0 {
            write!(f, "\nerrors: {}", self.errors)?;
            if let Some(first) = &self.first_error {
                write!(f, "; first {first}")?;
            }
        }
        Ok(())
    }
}
