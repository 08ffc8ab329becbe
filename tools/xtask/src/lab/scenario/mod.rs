//! The scenarios, and what they share: starting our target and our emulator.

mod ana_failover;
mod boot;
mod both_disks;
pub(super) mod fio_bench;
mod fio_jobs;
mod hot_disks;
mod kernel_host;
mod kill_target;
mod manage;
mod migrate;
mod namespaces;
mod nvme_cli;
mod paths;
mod relay;
mod resv;
mod secure_host;
mod secure_target;
mod selftest;
mod up;
mod virtio_disk;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Scene;
use super::guest::Results;
use super::service::{Service, free_ports, is_listening};
use crate::report::Outcome;

/// Something to show with guests.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) shows: &'static str,
    /// Whether it runs our release binary.
    pub(super) needs_penstock: bool,
    pub(super) run: fn(&Scene<'_>) -> Result<Outcome>,
}

/// Every scenario, in the order a full run takes them.
pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "selftest",
        shows: "the lab itself: kernel host with the kernel's target, guest disk of QEMU's server",
        needs_penstock: false,
        run: selftest::run,
    },
    Scenario {
        name: "kernel-host",
        shows: "newest backports kernel: discover, connect-all, file system, fio verify, reset",
        needs_penstock: true,
        run: kernel_host::backports,
    },
    Scenario {
        name: "kernel-host-6.12",
        shows: "the same with Debian 13's own kernel",
        needs_penstock: true,
        run: kernel_host::stable,
    },
    Scenario {
        name: "nvme-cli",
        shows: "every command of nvme-cli that asks a target something, each answer checked",
        needs_penstock: true,
        run: nvme_cli::run,
    },
    Scenario {
        name: "resv",
        shows: "two hosts contend for a namespace with reservations",
        needs_penstock: true,
        run: resv::run,
    },
    Scenario {
        name: "secure-host",
        shows: "newest kernel host with TLS, DH-HMAC-CHAP, both and concatenation; refusals; rotation",
        needs_penstock: true,
        run: secure_host::backports,
    },
    Scenario {
        name: "secure-host-6.12",
        shows: "the same with Debian 13's own kernel, which has no concatenation",
        needs_penstock: true,
        run: secure_host::stable,
    },
    Scenario {
        name: "secure-target",
        shows: "our initiator and emulated disks with TLS and DH-HMAC-CHAP against the newest kernel's target",
        needs_penstock: true,
        run: secure_target::backports,
    },
    Scenario {
        name: "secure-target-6.12",
        shows: "the same with Debian 13's own kernel",
        needs_penstock: true,
        run: secure_target::stable,
    },
    Scenario {
        name: "ana-failover",
        shows: "I/O follows the ANA states of two ports, 20 times, and survives a cut path",
        needs_penstock: true,
        run: ana_failover::run,
    },
    Scenario {
        name: "namespaces",
        shows: "namespaces grow, come and go under load; the guest hears of it by events",
        needs_penstock: true,
        run: namespaces::run,
    },
    Scenario {
        name: "virtio-disk",
        shows: "a guest's virtio disk is a remote volume; a kernel host reads the same bytes",
        needs_penstock: true,
        run: virtio_disk::run,
    },
    Scenario {
        name: "boot-virtio",
        shows: "a system on a volume boots from the virtio disk, by SeaBIOS and by OVMF",
        needs_penstock: true,
        run: boot::virtio,
    },
    Scenario {
        name: "boot-nvme",
        shows: "the same system boots from the emulated NVMe disk, then from the virtio disk",
        needs_penstock: true,
        run: boot::nvme,
    },
    Scenario {
        name: "both-disks",
        shows: "one volume by NVMe and another by virtio in one guest: nvme-cli, identity, fio verify",
        needs_penstock: true,
        run: both_disks::run,
    },
    Scenario {
        name: "hot-disks",
        shows: "disks with 1 to 4 queues grow, are reset and unplugged under load; one has three faces; a controller follows its subsystem",
        needs_penstock: true,
        run: hot_disks::run,
    },
    Scenario {
        name: "kill-target-kernel",
        shows: "the target is killed twice during fio verify on a kernel host",
        needs_penstock: true,
        run: kill_target::kernel,
    },
    Scenario {
        name: "kill-target-virtio",
        shows: "the target is killed twice during fio verify on a virtio disk",
        needs_penstock: true,
        run: kill_target::virtio,
    },
    Scenario {
        name: "kill-target-nvme",
        shows: "the target is killed twice during fio verify on an emulated NVMe disk",
        needs_penstock: true,
        run: kill_target::nvme,
    },
    Scenario {
        name: "pause-virtio",
        shows: "a guest is paused while the target is dead, and goes on, with split and with packed rings",
        needs_penstock: true,
        run: kill_target::paused,
    },
    Scenario {
        name: "kill-emulator",
        shows: "the emulator is killed twice during fio verify, with split and with packed rings",
        needs_penstock: true,
        run: kill_target::emulator_dies,
    },
    Scenario {
        name: "kill-worker",
        shows: "the worker of a supervised emulator is killed twice and replaced during fio verify",
        needs_penstock: true,
        run: kill_target::worker_dies,
    },
    Scenario {
        name: "kill-worker-nvme",
        shows: "the same under an NVMe disk, whose guest stays connected and keeps what was changed by hand",
        needs_penstock: true,
        run: kill_target::nvme_worker_dies,
    },
    Scenario {
        name: "kill-guest",
        shows: "a guest resets in mid-I/O, another one dies: both kinds of disk serve the next",
        needs_penstock: true,
        run: kill_target::guest_dies,
    },
    Scenario {
        name: "migrate",
        shows: "a guest with a virtio disk moves to another QEMU and emulator during fio verify, and back",
        needs_penstock: true,
        run: migrate::virtio,
    },
    Scenario {
        name: "paths-virtio",
        shows: "two paths of a virtio disk: one cut, both cut, one slow, one silent, under fio verify",
        needs_penstock: true,
        run: paths::virtio,
    },
    Scenario {
        name: "paths-nvme",
        shows: "the same with an emulated NVMe disk that finds both by discovery, and takes turns",
        needs_penstock: true,
        run: paths::nvme,
    },
    Scenario {
        name: "fio-jobs",
        shows: "fio-jobs/ on both disks of a guest, and natively through libblkio",
        needs_penstock: true,
        run: fio_jobs::run,
    },
    Scenario {
        name: "up",
        shows: "`penstock up`: proves itself, its lines work, a second start finds the data",
        needs_penstock: true,
        run: up::run,
    },
];

/// The subsystem that our target is told to serve.
const SUBNQN: &str = "nqn.2026-11.io.penstock:default";
/// How the guest names this machine's 127.0.0.1.
const HOST_ADDRESS: &str = "10.0.2.2";
/// Time for one of our programs to be ready. Far above what it takes: the machine may be busy.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// The target's command line and ports, so that it can be started more than once.
struct Target {
    volumes: Vec<String>,
    port: u16,
    discovery_port: u16,
    log: PathBuf,
    more: Vec<String>,
}

impl Target {
    /// A target whose namespaces are `volumes`, in the order of their identifiers, on free ports.
    fn new(scene: &Scene<'_>, volumes: &[String]) -> Result<Self> {
        let [port, discovery_port] = free_ports()?;
        Ok(Self {
            volumes: volumes.to_vec(),
            port,
            discovery_port,
            log: scene.path("target.log"),
            more: Vec::new(),
        })
    }

    /// The same target, which asks for the data of most writes. By default it takes those of up to
    /// 128 KiB along with their commands.
    fn asking_for_data(mut self) -> Self {
        self.more.extend(["--limit".to_owned(), "in_capsule_bytes=8192".to_owned()]);
        self
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Service> {
        let mut command = scene.penstock();
        command.arg("target").args(&self.more);
        for volume in &self.volumes {
            command.args(["--volume", volume]);
        }
        let [io, discovery] = [self.port, self.discovery_port]
            .map(|port| format!("127.0.0.1:{port},advertise={HOST_ADDRESS}:{port}"));
        command.args(["--listen", &io, "--discovery", &discovery, "--subnqn", SUBNQN]);
        let mut service = Service::start("penstock target", &command, &self.log)?;
        let ports = [self.port, self.discovery_port];
        service.wait_until("listening ports", READY_LIMIT, |_| {
            ports.iter().all(|p| is_listening(*p))
        })?;
        Ok(service)
    }
}

/// Starts an emulator with one NVMe controller whose namespaces are those of the target.
fn nvme_emulator(
    scene: &Scene<'_>,
    socket: &Path,
    target: &Target,
    nsids: &str,
    more: &[&str],
) -> Result<Service> {
    let mut command = scene.penstock();
    command.arg("emulate").args(more).arg("--device").arg(format!(
        "nvme0=nvme,socket={},tls=off,connect=127.0.0.1:{},subnqn={SUBNQN},nsid={nsids},queues=4",
        socket.display(),
        target.port,
    ));
    let mut service =
        Service::start("penstock emulate", &command, &scene.path("emulate-nvme.log"))?;
    service.wait_until("device ready", READY_LIMIT, |s| s.text().contains("device ready"))?;
    Ok(service)
}

/// Starts an emulator with one virtio-blk disk that is the namespace `nsid` of the target.
fn emulator(scene: &Scene<'_>, socket: &Path, target: &Target, nsid: u32) -> Result<Service> {
    emulator_with(scene, socket, target, nsid, &[])
}

/// The same with more arguments.
fn emulator_with(
    scene: &Scene<'_>,
    socket: &Path,
    target: &Target,
    nsid: u32,
    more: &[&str],
) -> Result<Service> {
    emulator_named(scene, &nsid.to_string(), socket, target.port, nsid, more)
}

/// The same with a log of that name.
fn emulator_named(
    scene: &Scene<'_>,
    name: &str,
    socket: &Path,
    port: u16,
    nsid: u32,
    more: &[&str],
) -> Result<Service> {
    let mut command = scene.penstock();
    command.arg("emulate").args(more).arg("--device").arg(format!(
        "disk{nsid}=virtio-blk,socket={},tls=off,connect=127.0.0.1:{port},subnqn={SUBNQN},nsid={nsid},queues=2",
        socket.display(),
    ));
    let log = scene.path(&format!("emulate-{name}.log"));
    let mut service = Service::start("penstock emulate", &command, &log)?;
    service.wait_until("device socket", READY_LIMIT, |_| socket.exists())?;
    Ok(service)
}

/// A file volume of the scenario; `name` is also that of the file.
fn file_volume(scene: &Scene<'_>, name: &str, mib: u64) -> (String, PathBuf) {
    let path = scene.path(&format!("{name}.img"));
    (format!("{name}=file:{},size={mib}M", path.display()), path)
}

/// The first element of a JSON array, or the value itself.
fn first(value: &Value) -> &Value {
    value.get(0).unwrap_or(value)
}

/// Checks that fio's JSON result tells of I/O without an error, and returns bytes read and written.
fn fio_result(results: &Value, name: &str) -> Result<(u64, u64)> {
    let jobs = results["jobs"].as_array().with_context(|| format!("{name}: no jobs"))?;
    ensure!(!jobs.is_empty(), "{name}: no jobs");
    let (mut read, mut written) = (0, 0);
    for job in jobs {
        ensure!(job["error"].as_i64() == Some(0), "{name}: fio reports error {}", job["error"]);
        read += job["read"]["io_bytes"].as_u64().unwrap_or(0);
        written += job["write"]["io_bytes"].as_u64().unwrap_or(0);
    }
    ensure!(read + written > 0, "{name}: fio did no I/O");
    Ok((read, written))
}

/// Checks every `fio-*.json` of a guest that verified what it wrote.
fn fio_verified(results: &Results, count_min: usize) -> Result<()> {
    let names: Vec<String> =
        results.names(".json")?.into_iter().filter(|name| name.starts_with("fio-")).collect();
    ensure!(names.len() >= count_min, "only {} fio results, expected {count_min}", names.len());
    for name in &names {
        let (read, written) = fio_result(&results.json(name)?, name)?;
        ensure!(read > 0 && written > 0, "{name}: {written} bytes written, {read} read back");
    }
    Ok(())
}

/// The word of a guest's one-line result, for instance a checksum.
fn word(results: &Results, name: &str) -> Result<String> {
    let text = results.text(name)?;
    Ok(text.split_whitespace().next().with_context(|| format!("{name} is empty"))?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_results_with_an_error_or_without_io_are_refused() {
        let result = |error: i64, bytes: u64| {
            serde_json::json!({"jobs": [{"error": error, "read": {"io_bytes": bytes},
                "write": {"io_bytes": bytes}}]})
        };
        assert_eq!(fio_result(&result(0, 5), "x").unwrap(), (5, 5));
        assert!(fio_result(&result(84, 5), "x").unwrap_err().to_string().contains("84"));
        assert!(fio_result(&result(0, 0), "x").is_err());
        assert!(fio_result(&serde_json::json!({"jobs": []}), "x").is_err());
    }

    #[test]
    fn scenarios_have_names_of_their_own() {
        let names: std::collections::BTreeSet<_> = SCENARIOS.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), SCENARIOS.len());
    }
}
