//! A disk with an operating system on it, small enough to start in an emulated machine.
//!
//! ```text
//!  sector 0     boot sector with partition table      │ read by SeaBIOS
//!  sector 1     GRUB's core for BIOS                   │
//!  1 MiB        EFI system partition (FAT)             EFI/BOOT/BOOTX64.EFI, kernel, initrd
//!  56 MiB       root file system (ext4, LABEL)         /sbin/init, a counter, a checked payload
//! ```
//!
//! A partition table of the old kind serves both: UEFI takes its type 0xEF, and the space before the
//! first partition holds what a BIOS needs. Both cores of GRUB are made by the tree's `grub-mkimage`
//! with the same configuration built in; no loop device, mount or superuser is needed.

use std::fs::{self, File};
use std::io::{Cursor, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use super::Scene;
use super::initramfs;
use super::tree::{Kernel, Tree};
use crate::exec;

/// Size of the whole disk.
pub(super) const SIZE_MIB: u64 = 96;
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const ESP: Partition = Partition { kind: 0xef, start_mib: 1, size_mib: 55, is_active: true };
const ROOT: Partition = Partition { kind: 0x83, start_mib: 56, size_mib: 40, is_active: false };
/// Where a boot sector ends and its partition table begins.
const TABLE_AT: usize = 446;
const PAYLOAD_BYTES: usize = 2 << 20;

struct Partition {
    kind: u8,
    start_mib: u64,
    size_mib: u64,
    is_active: bool,
}

/// Writes the disk to `image`. `work` is a folder for intermediate files.
pub(super) fn make(scene: &Scene<'_>, image: &Path, kernel: Kernel, work: &Path) -> Result<()> {
    let tree = scene.tree();
    let scripts = scene.lab.checkout.join("tests/lab/boot");
    fs::create_dir_all(work)?;
    let disk = File::options().create_new(true).read(true).write(true).open(image)?;
    disk.set_len(SIZE_MIB * MIB)?;

    let core = grub_core(tree, work, "i386-pc", "biosdisk")?;
    let efi = grub_core(tree, work, "x86_64-efi", "efi_gop")?;
    let mut sector = fs::read(tree.path("usr/lib/grub/i386-pc/boot.img"))?;
    ensure!(sector.len() == SECTOR as usize, "GRUB's boot sector has {} bytes", sector.len());
    ensure!(
        core.len() as u64 <= ESP.start_mib * MIB - SECTOR,
        "GRUB's core has {} bytes, which do not fit before the first partition",
        core.len()
    );
    partition_table(&mut sector, &[ESP, ROOT]);
    disk.write_all_at(&sector, 0)?;
    // GRUB's core says itself how long it is, and that it follows the boot sector.
    disk.write_all_at(&core, SECTOR)?;

    let init = fs::read(scripts.join("initramfs"))?;
    let vmlinuz = fs::read(initramfs::kernel_image(tree, kernel)?)?;
    let initrd = initramfs::boot_archive(tree, kernel, &init)?;
    let files = [("EFI/BOOT/BOOTX64.EFI", &efi), ("vmlinuz", &vmlinuz), ("initrd", &initrd)];
    let esp = fat(ESP.size_mib * MIB, &files).context("cannot make the EFI system partition")?;
    disk.write_all_at(&esp, ESP.start_mib * MIB)?;
    root(tree, image, &scripts, work).context("cannot make the root file system")?;
    disk.sync_all()?;
    Ok(())
}

/// GRUB for one kind of firmware, with everything it needs to start the kernel built in.
fn grub_core(tree: &Tree, work: &Path, platform: &str, disk_module: &str) -> Result<Vec<u8>> {
    let config = work.join("grub.cfg");
    fs::write(
        &config,
        "serial --unit=0 --speed=115200\n\
         terminal_output serial\n\
         search --file --set=root /vmlinuz\n\
         linux /vmlinuz console=ttyS0 quiet panic=-1\n\
         initrd /initrd\n\
         boot\n",
    )?;
    let out = work.join(platform);
    let mut command = tree.program("usr/bin/grub-mkimage");
    command.args(["-O", platform, "-p", "/grub", "-d"]);
    command.arg(tree.path(&format!("usr/lib/grub/{platform}")));
    command.arg("-c").arg(&config).arg("-o").arg(&out);
    command.args([disk_module, "part_msdos", "fat", "search", "search_fs_file", "serial"]);
    command.args(["terminal", "linux", "boot", "normal"]);
    exec::output(&mut command)?;
    Ok(fs::read(out)?)
}

fn partition_table(sector: &mut [u8], partitions: &[Partition]) {
    // GRUB keeps code for floppy disks where the table goes; an entry must not be made of it.
    sector[TABLE_AT..510].fill(0);
    for (entry, partition) in sector[TABLE_AT..].chunks_exact_mut(16).zip(partitions) {
        entry[0] = if partition.is_active { 0x80 } else { 0 };
        // Cylinders and heads mean nothing; this value says so.
        entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
        entry[4] = partition.kind;
        entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
        let sectors = |mib: u64| ((mib * MIB / SECTOR) as u32).to_le_bytes();
        entry[8..12].copy_from_slice(&sectors(partition.start_mib));
        entry[12..16].copy_from_slice(&sectors(partition.size_mib));
    }
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// A FAT file system with these files.
fn fat(size: u64, files: &[(&str, &Vec<u8>)]) -> Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0; usize::try_from(size)?]);
    fatfs::format_volume(
        &mut disk,
        fatfs::FormatVolumeOptions::new().volume_label(*b"PENSTOCKEFI"),
    )?;
    {
        let fs = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for (path, data) in files {
            let mut folder = fs.root_dir();
            let mut parts = path.split('/').peekable();
            while let Some(part) = parts.next() {
                if parts.peek().is_some() {
                    folder = folder.create_dir(part)?;
                    continue;
                }
                let mut file = folder.create_file(part)?;
                file.truncate()?;
                file.write_all(data)?;
                file.flush()?;
            }
        }
        fs.unmount()?;
    }
    Ok(disk.into_inner())
}

/// The root file system, written into its place on the disk.
fn root(tree: &Tree, image: &Path, scripts: &Path, work: &Path) -> Result<()> {
    let folder = work.join("root");
    for below in ["bin", "sbin", "dev", "proc", "sys"] {
        fs::create_dir_all(folder.join(below))?;
    }
    fs::copy(tree.path("usr/bin/busybox"), folder.join("bin/busybox"))?;
    let init = folder.join("sbin/init");
    fs::copy(scripts.join("os"), &init)?;
    exec::run(std::process::Command::new("chmod").arg("755").arg(&init))?;
    fs::write(folder.join("boots"), "0\n")?;
    let mut payload = vec![0; PAYLOAD_BYTES];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut payload)?;
    fs::write(folder.join("payload"), payload)?;
    let sum = exec::output(std::process::Command::new("sha256sum").arg(folder.join("payload")))?;
    let Some(sum) = sum.split_whitespace().next() else { bail!("sha256sum printed nothing") };
    fs::write(folder.join("payload.sha256"), format!("{sum}  /payload\n"))?;

    let mut mkfs = tree.program_as("usr/sbin/mkfs.ext4", "mkfs.ext4");
    mkfs.env("MKE2FS_CONFIG", tree.path("etc/mke2fs.conf"));
    mkfs.args(["-q", "-F", "-L", "penstock-os", "-d"]).arg(&folder);
    mkfs.args(["-E", &format!("offset={},root_owner=0:0", ROOT.start_mib * MIB)]);
    mkfs.arg(image).arg(format!("{}k", ROOT.size_mib * 1024));
    exec::output(&mut mkfs)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn partitions_follow_each_other_and_fit() {
        const { assert!(ESP.start_mib + ESP.size_mib <= ROOT.start_mib) };
        const { assert!(ROOT.start_mib + ROOT.size_mib <= SIZE_MIB) };
        let mut sector = vec![0x70; 512];
        partition_table(&mut sector, &[ESP, ROOT]);
        assert_eq!(sector[446], 0x80);
        assert_eq!(sector[446 + 4], 0xef);
        assert_eq!(sector[446 + 8..446 + 12], 2048_u32.to_le_bytes());
        assert_eq!(sector[462 + 4], 0x83);
        assert_eq!(sector[478..510], [0; 32]);
        assert_eq!(sector[510..], [0x55, 0xaa]);
    }

    #[test]
    fn files_of_the_efi_system_partition_are_found_again() {
        let data = vec![7; 100_000];
        let image = fat(8 << 20, &[("EFI/BOOT/BOOTX64.EFI", &data), ("vmlinuz", &data)]).unwrap();
        let fs = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()).unwrap();
        let mut read = Vec::new();
        fs.root_dir().open_file("efi/boot/bootx64.efi").unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(read, data);
    }
}
