//! What the benchmark programs share: the target as a process of its own, keys of its hosts, and
//! medians.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use crypto::TlsKey;
use crypto::psk::{Derivation, IdentityVersion, RetainedKey, Suite};

use crate::link::Protection;
use crate::load::Figures;
use crate::process;

/// The subsystem of the target under test.
pub const SUBNQN: &str = "nqn.2026-11.io.penstock:bench";

/// The NQN of host number `n`.
pub fn hostnqn(n: usize) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{n:012}")
}

/// Median, lowest and highest of several rounds, by IOPS.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// The median round.
    pub median: Figures,
    /// IOPS of the slowest round.
    pub low: f64,
    /// IOPS of the fastest round.
    pub high: f64,
}

impl Summary {
    /// Of at least one round. The median of an even number is between the two in the middle.
    pub fn of(mut rounds: Vec<Figures>) -> Summary {
        rounds.sort_by(|a, b| a.iops.total_cmp(&b.iops));
        let (first, last) = (rounds[0].iops, rounds[rounds.len() - 1].iops);
        let (below, above) = (rounds[(rounds.len() - 1) / 2], rounds[rounds.len() / 2]);
        let median = Figures {
            iops: (below.iops + above.iops) / 2.0,
            p50_us: (below.p50_us + above.p50_us) / 2.0,
            p99_us: (below.p99_us + above.p99_us) / 2.0,
        };
        Summary { median, low: first, high: last }
    }

    /// For `--json`.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({ "iops": self.median.iops, "low": self.low, "high": self.high,
            "p50_us": self.median.p50_us, "p99_us": self.median.p99_us })
    }
}

/// The binary under test: the one asked for, or the one built beside this program.
///
/// # Errors
/// It is not there.
pub fn binary(asked: Option<&Path>) -> Result<PathBuf> {
    let binary = match asked {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name("penstock"),
    };
    let hint = "run `cargo build --release` first";
    ensure!(binary.exists(), "{} is missing: {hint}", binary.display());
    Ok(binary)
}

/// A host with a TLS key that the target knows.
pub struct KeyedHost {
    /// Its NQN.
    pub nqn: String,
    /// Its key, for the one subsystem.
    pub protection: Protection,
}

impl KeyedHost {
    /// A host that has this key for one subsystem.
    ///
    /// # Errors
    /// A name is none.
    pub fn new(
        nqn: String,
        key: &TlsKey,
        version: IdentityVersion,
        subnqn: &str,
    ) -> Result<KeyedHost> {
        let retained = RetainedKey::new(key, &nqn, Derivation::Rfc8446)?;
        let psk = retained.psk(version, &nqn, subnqn)?;
        Ok(KeyedHost { nqn, protection: Protection::Tls(psk) })
    }
}

/// The target under test, a process of its own on core 0.
pub struct Target {
    child: Child,
    /// The listener without TLS.
    pub plain: SocketAddr,
    /// The listener with TLS.
    pub tls: SocketAddr,
    /// What was started.
    pub command: String,
    /// From the start of the process to its first answer on a listener.
    pub start_time: Duration,
    data: PathBuf,
    binary: PathBuf,
}

impl Target {
    /// Starts `penstock target` with `volumes` (`NAME=SPEC`) and waits until it listens. Its state is
    /// in a directory of its own that goes with it.
    ///
    /// # Errors
    /// The process cannot be started, or ends.
    pub fn start(binary: &Path, volumes: &[String], queue_entries: u16) -> Result<Target> {
        Target::start_with(binary, volumes, queue_entries, &[])
    }

    /// The same with more arguments of `penstock target`.
    ///
    /// # Errors
    /// As for [`Target::start`].
    pub fn start_with(
        binary: &Path,
        volumes: &[String],
        queue_entries: u16,
        more: &[String],
    ) -> Result<Target> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let name = (std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        let data = std::env::temp_dir().join(format!("penstock-bench-{}-{}", name.0, name.1));
        std::fs::create_dir_all(&data)?;
        let (plain, tls) = (process::free_addr()?, process::free_addr()?);
        let mut command = Command::new("taskset");
        command.args(["-c", "0"]).arg(binary).args(["target", "--subnqn", SUBNQN, "--cores", "1"]);
        command.arg("--data").arg(&data).arg("--api").arg(data.join("api"));
        command.args(["--listen", &plain.to_string()]);
        command.args(["--listen", &format!("{tls},tls=required")]);
        command.args(["--queue-entries-max", &queue_entries.to_string()]);
        for volume in volumes {
            command.args(["--volume", volume]);
        }
        command.args(more);
        let text = format!("{command:?}").replace('"', "");
        let start = Instant::now();
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
        let binary = binary.to_owned();
        let start_time = Duration::ZERO;
        let mut target = Target { child, plain, tls, command: text, start_time, data, binary };
        let limit = Duration::from_secs(20);
        while std::net::TcpStream::connect(plain).is_err() {
            if let Ok(Some(status)) = target.child.try_wait() {
                bail!("the target ended at start with {status}");
            }
            ensure!(start.elapsed() < limit, "the target did not listen within {limit:?}");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        target.start_time = start.elapsed();
        Ok(target)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes a key for host number `n` and gives it to the target.
    ///
    /// # Errors
    /// The target does not take the key.
    pub fn add_host(&self, n: usize, suite: Suite) -> Result<KeyedHost> {
        let nqn = hostnqn(n);
        // Anything but secret: it protects a benchmark.
        let key = TlsKey::generate(suite, &[n as u8; 48]);
        let mut import = Command::new(&self.binary)
            .args(["key", "import", "--host", &nqn, "--api"])
            .arg(self.data.join("api"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("starting penstock key import")?;
        let mut stdin = import.stdin.take().context("stdin of penstock key import")?;
        stdin.write_all(key.to_text().expose().as_bytes())?;
        drop(stdin);
        ensure!(import.wait()?.success(), "penstock key import failed");
        KeyedHost::new(nqn, &key, IdentityVersion::V1, SUBNQN)
    }

    /// Has the target follow one request in `every` from now on; 0: none.
    ///
    /// # Errors
    /// The target does not do it.
    pub fn set_sampling(&self, every: u32) -> Result<()> {
        let mut api = UnixStream::connect(self.data.join("api")).context("the target's API")?;
        let body = format!("{{\"every\":{every}}}");
        write!(
            api,
            "PUT /v1/breakdown HTTP/1.1\r\nHost: penstock\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        api.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "the target's API: {answer}");
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // All fail only when there is nothing left to end or to remove.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle_of_even_counts_too() {
        let of = |iops: &[f64]| {
            let figures = |iops: &f64| Figures { iops: *iops, p50_us: 1e3 / iops, p99_us: 9.0 };
            Summary::of(iops.iter().map(figures).collect())
        };
        assert_eq!(of(&[5.0]).median.iops, 5.0);
        let odd = of(&[30.0, 10.0, 20.0]);
        assert_eq!((odd.low, odd.median.iops, odd.high), (10.0, 20.0, 30.0));
        let even = of(&[40.0, 10.0, 20.0, 10.0]).median;
        assert_eq!((even.iops, even.p50_us, even.p99_us), (15.0, 75.0, 9.0));
    }
}
