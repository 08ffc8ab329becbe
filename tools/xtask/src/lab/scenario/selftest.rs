//! The lab on itself: neither end of what is tested here is ours.

use std::process::Command;

use anyhow::{Result, ensure};

use super::super::Scene;
use super::super::guest::{Job, quoted};
use super::super::service::Service;
use super::super::tree::Kernel;
use super::{READY_LIMIT, fio_jobs, fio_verified, kernel_host, word};
use crate::exec;
use crate::report::Outcome;

const SIZE_MIB: u64 = 128;
const FIO_RUNS: usize = 4 * 3;
const NVMET_SUBNQN: &str = "nqn.2026-11.example.lab:kernel";
/// Fewer block sizes than elsewhere, and one run after the reset.
const NVMET_FIO_RUNS: usize = 2 * 3 + 1;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    for kernel in Kernel::ALL {
        let guest =
            scene.boot(&format!("nvmet-{}", kernel.name()), kernel, &Job::new("nvmet.sh"))?;
        kernel_host::check(&guest.finish()?, NVMET_SUBNQN, SIZE_MIB, NVMET_FIO_RUNS)?;
    }

    let image = scene.path("disk.img");
    std::fs::File::create(&image)?.set_len(SIZE_MIB << 20)?;
    let socket = scene.socket("disk.sock");
    let mut server = scene.tree().program("usr/bin/qemu-storage-daemon");
    server
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f0,filename={},discard=unmap", quoted(&image)));
    server.arg("--export").arg(format!(
        "type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={},writable=on,num-queues=2",
        quoted(&socket)
    ));
    let mut server = Service::start("qemu-storage-daemon", &server, &scene.path("storage.log"))?;
    server.wait_until("disk socket", READY_LIMIT, |_| socket.exists())?;
    let job = Job::new("virtio-disk.sh").vhost_user_blk(&socket);
    let results = scene.boot("virtio", Kernel::Stable, &job)?.finish()?;
    fio_verified(&results, FIO_RUNS)?;
    let in_guest = word(&results, "device.sha256")?;
    let on_disk = exec::output(Command::new("sha256sum").arg(&image))?;
    ensure!(on_disk.starts_with(&in_guest), "guest saw {in_guest}, the file holds {on_disk}");
    if scene.tree().fio_blkio().is_ok() {
        let job = scene.lab.checkout.join("fio-jobs/randrw-verify-qd16.fio");
        fio_jobs::native(scene, &job, &socket)?;
    }
    drop(server);
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}
