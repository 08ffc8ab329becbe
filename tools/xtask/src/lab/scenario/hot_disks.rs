//! Disks that change while a guest runs: they grow, are reset, plugged in and unplugged, come and go
//! with the namespaces of their target. And the number of queues that each of them has.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::super::Scene;
use super::super::guest::{Job, quoted};
use super::super::service::Service;
use super::super::tree::Kernel;
use super::manage::{Managed, missing};
use super::{HOST_ADDRESS, READY_LIMIT, SUBNQN, file_volume, fio_verified, word};
use crate::exec;
use crate::report::Outcome;

/// Each kind of disk is there once with each number of queues from 1 to this.
const QUEUES: u16 = 4;
const SIZE_MIB: u64 = 64;
/// Namespaces 1 and 2 are those of the controller that is plugged in, 3 and 4 those that grow; 3 is also
/// the first of the disks with a number of queues.
const HOT: &str = "1+2";
const FIRST_NSID: u16 = 3;
/// The subsystem that a controller follows, empty at first, and its NQN.
const FOLLOWED: &str = "more";
const FOLLOWED_NQN: &str = "nqn.2024-01.io.penstock:lab-more";
/// PCI slots of the guest: where the first NVMe controller and the first virtio disk are.
const SLOT_NVME: u16 = 0x10;
const SLOT_FOLLOWS: u16 = SLOT_NVME + QUEUES;
const SLOT_VIRTIO: u16 = 0x18;
/// Far above what an eject takes: the guest has to let go of the disk first.
const EJECT_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    if let Some(skipped) = missing(scene)? {
        return Ok(skipped);
    }
    let count = FIRST_NSID - 1 + 2 * QUEUES;
    let (volumes, images): (Vec<String>, Vec<_>) =
        (1..=count).map(|nsid| file_volume(scene, &format!("v{nsid}"), SIZE_MIB)).unzip();
    let mut target = Managed::start::<1>(scene, &volumes)?;
    exec::run(target.client(scene).args(["subsystem", "add", FOLLOWED, "--nqn", FOLLOWED_NQN]))?;
    let api = scene.socket("api");
    let mut emulate = scene.penstock();
    emulate.arg("--api").arg(&api);
    let mut device_of = |name: &str, kind: &str, subnqn: &str, nsids: &str, queues: u16| {
        let socket = scene.socket(name);
        emulate.arg("--device").arg(format!(
            "{name}={kind},socket={},tls=off,connect=127.0.0.1:{},subnqn={subnqn},nsid={nsids},queues={queues}",
            socket.display(),
            target.ports[0],
        ));
        socket
    };
    let follows = device_of("follows", "nvme", FOLLOWED_NQN, "all", 2);
    let mut device =
        |name: &str, kind: &str, nsids: &str, queues| device_of(name, kind, SUBNQN, nsids, queues);
    let mut words = Vec::new();
    for (port, slot) in [("root0", "0xe"), ("root1", "0xf")] {
        let chassis = &port[4..];
        words.push("-device".to_owned());
        words.push(format!("pcie-root-port,id={port},addr={slot},chassis={chassis}"));
    }
    let hot = device("hot", "nvme", HOT, 2);
    for queues in 1..=QUEUES {
        let (nvme, virtio) = (FIRST_NSID - 1 + queues, FIRST_NSID - 1 + QUEUES + queues);
        let socket = device(&format!("nvme{queues}"), "nvme", &nvme.to_string(), queues);
        let controller = json!({
            "driver": "vfio-user-pci",
            "addr": format!("{:#x}", SLOT_NVME + queues - 1),
            "socket": {"type": "unix", "path": socket},
        });
        words.extend(["-device".to_owned(), controller.to_string()]);
        let socket = device(&format!("disk{queues}"), "virtio-blk", &virtio.to_string(), queues);
        words.extend(disk(&socket, SLOT_VIRTIO + queues - 1, queues));
    }
    let controller = json!({
        "driver": "vfio-user-pci",
        "addr": format!("{SLOT_FOLLOWS:#x}"),
        "socket": {"type": "unix", "path": follows},
    });
    words.extend(["-device".to_owned(), controller.to_string()]);
    // The first namespace of that controller once more, by the other kind of disk.
    let socket = device("same", "virtio-blk", "1", 1);
    let [chardev, same] = same_disk(&socket);
    words.extend(["-chardev".to_owned(), format!("socket,id=same,path={}", quoted(&socket))]);
    words.extend(["-device".to_owned(), same.to_string()]);
    let mut command = scene.penstock();
    command.arg("emulate").args(emulate.get_args());
    let mut devices = Service::start("penstock emulate", &command, &scene.path("emulate.log"))?;
    devices.wait_until("devices ready", READY_LIMIT, |service| {
        service.text().matches("device ready").count() == usize::from(2 * QUEUES + 3)
    })?;

    let port = target.ports[0].to_string();
    let job = Job::new("hot-disks.sh")
        .cpus(QUEUES.into())
        .network()
        .kernel_words("nvme_core.io_timeout=3 iomem=relaxed")
        .args(&[HOST_ADDRESS, &port, SUBNQN])
        .devices(words);
    let mut guest = scene.boot("guest", Kernel::Stable, &job)?;

    guest.wait_for("please: grow")?;
    // The first NVMe disk and the first virtio disk.
    for nsid in [FIRST_NSID, FIRST_NSID + QUEUES] {
        let (name, size) = (format!("v{nsid}"), format!("{}M", 2 * SIZE_MIB));
        exec::run(target.client(scene).args(["volume", "resize", &name, "--size", &size]))?;
    }
    let mut qemu = guest.qmp()?;
    guest.wait_for("please: plug")?;
    // It stays: QEMU 11.1 fails an assertion when a vfio-user device with MSI-X is unplugged.
    let plug = json!({
        "driver": "vfio-user-pci",
        "bus": "root0",
        "socket": {"type": "unix", "path": hot},
    });
    qemu.execute("device_add", &plug)?;
    guest.wait_for("please: unplug")?;
    qemu.execute("device_del", &json!({"id": "same"}))?;
    while qemu.event("DEVICE_DELETED", EJECT_LIMIT)?["device"] != "same" {}
    qemu.execute("chardev-remove", &json!({"id": "same"}))?;
    guest.wait_for("please: plug again")?;
    qemu.execute("chardev-add", &chardev)?;
    qemu.execute("device_add", &same)?;
    guest.wait_for("please: add")?;
    let spec = format!("ram:{SIZE_MIB}MiB");
    let add = ["volume", "attach", "late", "--spec", &spec, "--subsystem", FOLLOWED];
    exec::run(target.client(scene).args(add))?;
    for what in ["detach", "attach"] {
        guest.wait_for(&format!("please: {what} by hand"))?;
        let mut by_hand = scene.penstock();
        by_hand.args(["device", what, "follows", "--nsid", "1", "--api"]).arg(&api);
        exec::run(&mut by_hand)?;
    }
    guest.wait_for("please: take")?;
    exec::run(target.client(scene).args(["volume", "detach", "late"]))?;
    let results = guest.finish().context("with every disk")?;

    fio_verified(&results, 8)?;
    let faces = ["nvme-pci", "virtio", "nvme-tcp"];
    for what in ["serial", "sectors"] {
        let seen = faces.map(|face| word(&results, &format!("{face}-{what}")));
        let [first, second, third] = seen;
        let (first, second, third) = (first?, second?, third?);
        ensure!(first == second && second == third, "{what}: {first:?}, {second:?}, {third:?}");
    }
    for what in ["uuid", "nguid"] {
        let pci = word(&results, &format!("nvme-pci-{what}"))?;
        let tcp = word(&results, &format!("nvme-tcp-{what}"))?;
        ensure!(pci == tcp, "{what}: {pci:?} by PCI, {tcp:?} by TCP");
    }
    devices.must_run()?;
    target.service.must_run()?;
    drop((devices, target));
    for image in images {
        std::fs::remove_file(image)?;
    }
    Ok(Outcome::Passed)
}

/// What QEMU's monitor takes for a virtio disk behind a root port: its socket and the disk.
fn same_disk(socket: &Path) -> [Value; 2] {
    let address = json!({"type": "unix", "data": {"path": socket}});
    let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
    [
        json!({"id": "same", "backend": backend}),
        json!({
            "driver": "vhost-user-blk-pci",
            "id": "same",
            "bus": "root1",
            "chardev": "same",
            "num-queues": 1,
        }),
    ]
}

/// QEMU arguments of a virtio disk that has its place.
fn disk(socket: &Path, slot: u16, queues: u16) -> [String; 4] {
    [
        "-chardev".to_owned(),
        format!("socket,id=disk{slot},path={}", quoted(socket)),
        "-device".to_owned(),
        format!("vhost-user-blk-pci,chardev=disk{slot},num-queues={queues},addr={slot:#x}"),
    ]
}
