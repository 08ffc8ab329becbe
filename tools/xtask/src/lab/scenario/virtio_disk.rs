//! A guest's virtio disk is a volume of the target, over the emulator.

use std::process::Command;

use anyhow::{Result, ensure};

use super::super::Scene;
use super::super::guest::Job;
use super::super::tree::Kernel;
use super::{HOST_ADDRESS, SUBNQN, Target, emulator, file_volume, fio_verified, word};
use crate::exec;
use crate::report::Outcome;

const SIZE_MIB: u64 = 128;
const FIO_RUNS: usize = 4 * 3;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    // The second namespace, so that a mix-up of namespaces shows.
    let target = Target::new(scene, &["spare=ram:16M".to_owned(), volume])?;
    let mut service = target.start(scene)?;
    let socket = scene.socket("disk.sock");
    let mut device = emulator(scene, &socket, &target, 2)?;
    let job = Job::new("virtio-disk.sh").vhost_user_blk(&socket);
    let written = scene.boot("virtio", Kernel::Stable, &job)?.finish()?;
    fio_verified(&written, FIO_RUNS)?;
    let sectors: u64 = word(&written, "sectors")?.parse()?;
    ensure!(sectors * 512 == SIZE_MIB << 20, "the disk has {sectors} sectors");
    ensure!(word(&written, "queue-count")? == "2", "the disk has not 2 queues");
    device.must_run()?;

    let port = target.port.to_string();
    let job = Job::new("read-back.sh")
        .network()
        .args(&[HOST_ADDRESS, &port, SUBNQN, "2"])
        .file("files.sha256", written.text("files.sha256")?);
    let read = scene.boot("kernel-host", Kernel::Backports, &job)?.finish()?;
    let in_guest = word(&written, "device.sha256")?;
    let by_host = word(&read, "device.sha256")?;
    ensure!(in_guest == by_host, "the guest's disk is {in_guest}, a kernel host reads {by_host}");
    let on_disk = exec::output(Command::new("sha256sum").arg(&image))?;
    ensure!(on_disk.starts_with(&in_guest), "the volume's file is {on_disk}");
    service.must_run()?;
    drop((device, service));
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}
