//! The Linux kernel's NVMe/TCP host and nvme-cli against our target.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::Scene;
use super::super::guest::{Job, Results};
use super::super::tree::Kernel;
use super::{HOST_ADDRESS, SUBNQN, Target, file_volume, fio_verified, first, word};
use crate::exec;
use crate::report::Outcome;

const SIZE_MIB: u64 = 128;
/// Block sizes times depths in the guest's script, and one run after the reset.
const FIO_RUNS: usize = 4 * 3 + 1;

pub(super) fn stable(scene: &Scene<'_>) -> Result<Outcome> {
    run(scene, Kernel::Stable)
}

pub(super) fn backports(scene: &Scene<'_>) -> Result<Outcome> {
    run(scene, Kernel::Backports)
}

fn run(scene: &Scene<'_>, kernel: Kernel) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    // A second volume shows that each is a namespace of its own.
    let mut target = Target::new(scene, &[volume, "spare=ram:16M".to_owned()])?;
    // The two ways that data of writes takes, one with each kernel.
    if matches!(kernel, Kernel::Stable) {
        target = target.asking_for_data();
    }
    let mut service = target.start(scene)?;
    let discovery = target.discovery_port.to_string();
    let job = Job::new("kernel-host.sh").network().args(&[HOST_ADDRESS, &discovery, SUBNQN]);
    let results = scene.boot("guest", kernel, &job)?.finish()?;
    check(&results, SUBNQN, SIZE_MIB, FIO_RUNS)?;

    let log = results.json("discover.json")?;
    let record = discovery_record(&log, SUBNQN)?;
    ensure!(record["traddr"] == HOST_ADDRESS, "advertised address: {record}");
    ensure!(record["trsvcid"] == target.port.to_string().as_str(), "advertised port: {record}");
    ensure!(record["trtype"] == "tcp", "transport: {record}");
    // Our own view of the same log.
    let mut discover = scene.penstock();
    discover.args(["discover", "-a", "127.0.0.1", "-s", &discovery, "--json"]);
    let ours = exec::output(&mut discover)?;
    ensure!(ours.contains(SUBNQN) && ours.contains(HOST_ADDRESS), "penstock discover: {ours}");

    let controller = results.json("id-ctrl.json")?;
    let model = controller["mn"].as_str().unwrap_or_default();
    ensure!(model.to_lowercase().contains("penstock"), "model {model:?}");
    ensure!(controller["nn"].as_u64().is_some_and(|nn| nn >= 2), "nn: {}", controller["nn"]);
    service.must_run()?;
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// What has to be true of any target whose namespace of `size_mib` the guest worked on.
pub(super) fn check(results: &Results, subnqn: &str, size_mib: u64, fio_runs: usize) -> Result<()> {
    let controller = results.json("id-ctrl.json")?;
    ensure!(controller["subnqn"] == subnqn, "subnqn: {}", controller["subnqn"]);
    for field in ["sn", "mn", "fr"] {
        let text = controller[field].as_str().unwrap_or_default().trim();
        ensure!(!text.is_empty(), "id-ctrl: {field} is blank");
        ensure!(text.is_ascii(), "id-ctrl: {field} is {text:?}");
    }
    let namespace = results.json("id-ns.json")?;
    let format = namespace["flbas"].as_u64().context("id-ns: no flbas")? & 0xf;
    let format = &namespace["lbafs"][usize::try_from(format)?];
    let block_len = 1_u64 << format["ds"].as_u64().context("id-ns: no block size")?;
    let block_count = namespace["nsze"].as_u64().context("id-ns: no nsze")?;
    let size = size_mib << 20;
    ensure!(block_count * block_len == size, "id-ns: {block_count} blocks of {block_len} bytes");
    ensure!(namespace["ncap"] == namespace["nsze"], "id-ns: ncap {}", namespace["ncap"]);
    let sectors: u64 = word(results, "sectors")?.parse()?;
    ensure!(sectors * 512 == size, "the block device has {sectors} sectors");
    let list = results.json("list.json")?;
    ensure!(first(&list["Devices"]).is_object(), "nvme list shows no device: {list}");
    // The admin queue and one per processor of the guest.
    let queues: u32 = word(results, "queue-count")?.parse()?;
    ensure!(queues == 3, "the controller has {queues} queues, 3 were asked for");
    discovery_record(&results.json("discover.json")?, subnqn)?;
    fio_verified(results, fio_runs)
}

fn discovery_record<'a>(log: &'a Value, subnqn: &str) -> Result<&'a Value> {
    let records = log["records"].as_array().context("discovery log without records")?;
    let found = records.iter().find(|record| record["subnqn"] == subnqn);
    found.with_context(|| format!("{subnqn} is not in the discovery log: {log}"))
}
