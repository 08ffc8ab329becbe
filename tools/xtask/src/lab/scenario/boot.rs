//! An operating system on a volume of the target starts from an emulated disk, by both firmwares.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::super::guest::{self, Firmware, Guest};
use super::super::tree::Kernel;
use super::super::{Scene, boot_disk};
use super::{Target, emulator, nvme_emulator};
use crate::report::Outcome;

/// Firmware, boot loader and kernel, all in an emulated processor that shares a busy machine.
const LIMIT: Duration = Duration::from_secs(240);
const OK: &str = "boot-ok: ";

pub(super) fn virtio(scene: &Scene<'_>) -> Result<Outcome> {
    let image = scene.path("system.img");
    boot_disk::make(scene, &image, Kernel::Stable, &scene.path("work"))?;
    let volume = format!("system=file:{}", image.display());
    let target = Target::new(scene, &[volume])?;
    let mut service = target.start(scene)?;
    let socket = scene.socket("system.sock");
    let mut device = emulator(scene, &socket, &target, 1)?;
    let disk = guest::vhost_user_blk("disk", &socket, ",bootindex=1");
    // The count shows that it is the same disk each time, and that writes stay.
    let starts = [(Firmware::SeaBios, "bios"), (Firmware::Ovmf, "uefi")];
    for (start, (firmware, name)) in (1..).zip(starts) {
        let folder = scene.path(name);
        let guest = Guest::from_disk(scene.tree(), &folder, firmware, &disk, LIMIT)?;
        started(&guest.off()?, start, name, "vda")?;
        device.must_run()?;
    }
    service.must_run()?;
    drop((device, service));
    std::fs::remove_dir_all(scene.path("work"))?;
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// The NVMe face of the same kind of disk, and then its virtio face: it is one volume.
pub(super) fn nvme(scene: &Scene<'_>) -> Result<Outcome> {
    let image = scene.path("system.img");
    boot_disk::make(scene, &image, Kernel::Stable, &scene.path("work"))?;
    let volume = format!("system=file:{}", image.display());
    let target = Target::new(scene, &[volume])?;
    let mut service = target.start(scene)?;
    let socket = scene.socket("nvme.sock");
    let mut device = nvme_emulator(scene, &socket, &target, "1", &[])?;
    let disk = guest::vfio_user(&socket, Some(1));
    let starts = [(Firmware::SeaBios, "bios"), (Firmware::Ovmf, "uefi")];
    for (start, (firmware, name)) in (1..).zip(starts) {
        let guest = Guest::from_disk(scene.tree(), &scene.path(name), firmware, &disk, LIMIT)?;
        started(&guest.off()?, start, name, "nvme0n1")?;
        device.must_run()?;
    }
    drop(device);
    let socket = scene.socket("virtio.sock");
    let mut device = emulator(scene, &socket, &target, 1)?;
    let disk = guest::vhost_user_blk("disk", &socket, ",bootindex=1");
    let folder = scene.path("virtio");
    let guest = Guest::from_disk(scene.tree(), &folder, Firmware::SeaBios, &disk, LIMIT)?;
    started(&guest.off()?, 3, "bios", "vda")?;
    device.must_run()?;
    service.must_run()?;
    drop((device, service));
    std::fs::remove_dir_all(scene.path("work"))?;
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// Checks what the system on the disk said of itself.
fn started(console: &str, start: u32, firmware: &str, disk: &str) -> Result<()> {
    let complaint = console.lines().find(|line| line.contains("boot-failed: "));
    ensure!(complaint.is_none(), "{}", complaint.unwrap_or_default());
    let line = console
        .lines()
        .find_map(|line| Some(line.split_once(OK)?.1.trim()))
        .with_context(|| format!("no system came up; the console ends:\n{}", end(console)))?;
    println!("{line}");
    let expected = format!("start {start}, {firmware}, root on {disk}");
    ensure!(line.starts_with(&expected), "expected {expected:?}, the system says {line:?}");
    Ok(())
}

fn end(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_system_counts() {
        let console = "GRUB\r\nboot-ok: start 1, bios, root on vda2, up after 3 s\r\n";
        started(console, 1, "bios", "vda").unwrap();
        assert!(started(console, 2, "bios", "vda").is_err());
        assert!(started(console, 1, "uefi", "vda").is_err());
        assert!(started("Boot failed", 1, "bios", "vda").is_err());
        let failed = format!("boot-failed: the kernel complains\n{console}");
        assert!(started(&failed, 1, "bios", "vda").is_err());
    }
}
