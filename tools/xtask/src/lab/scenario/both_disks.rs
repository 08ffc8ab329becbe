//! An NVMe controller with two namespaces and a virtio disk in one guest.

use anyhow::{Context as _, Result, ensure};

use super::super::Scene;
use super::super::guest::Job;
use super::super::tree::Kernel;
use super::{Target, emulator, file_volume, fio_verified, nvme_emulator, word};
use crate::report::Outcome;

const SIZE_MIB: u64 = 64;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    let (first, first_image) = file_volume(scene, "first", SIZE_MIB);
    let (second, second_image) = file_volume(scene, "second", SIZE_MIB);
    let (third, third_image) = file_volume(scene, "third", SIZE_MIB);
    let target = Target::new(scene, &[first, second, third])?;
    let mut service = target.start(scene)?;
    let [nvme, virtio] = ["nvme.sock", "virtio.sock"].map(|name| scene.socket(name));
    let mut devices =
        [nvme_emulator(scene, &nvme, &target, "1+2", &[])?, emulator(scene, &virtio, &target, 3)?];
    let job = Job::new("both-disks.sh").vfio_user(&nvme).vhost_user_blk(&virtio);
    let results = scene.boot("guest", Kernel::Stable, &job)?.finish()?;
    fio_verified(&results, 3)?;
    let id = results.json("id-ctrl.json")?;
    ensure!(id["nn"].as_u64().is_some_and(|nn| nn >= 2), "nn is {}", id["nn"]);
    let smart = results.json("smart-log.json")?;
    let written = smart["host_write_commands"]
        .as_u64()
        .or_else(|| smart["host_write_commands"].as_str().and_then(|text| text.parse().ok()));
    ensure!(written.is_some_and(|count| count > 0), "SMART tells of no writes: {smart}");
    // What comes from one subsystem has its serial number, whatever shows it.
    let (serial, sn) = (word(&results, "virtio-serial")?, id["sn"].as_str().unwrap_or_default());
    ensure!(serial == sn.trim(), "the virtio disk's serial is {serial:?}, the controller's {sn:?}");
    let uuid = word(&results, "uuid-1")?;
    ensure!(uuid != word(&results, "uuid-2")?, "both namespaces have UUID {uuid}");
    for device in &mut devices {
        device.must_run().context("after the guest")?;
    }
    service.must_run()?;
    drop((devices, service));
    for image in [first_image, second_image, third_image] {
        std::fs::remove_file(image)?;
    }
    Ok(Outcome::Passed)
}
