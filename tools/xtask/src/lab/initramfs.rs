//! The guest's first file system: busybox, the NVMe and fio programs and a few kernel modules.
//!
//! Made once per kernel from the tree and kept beside it. Archive and modules stay uncompressed,
//! because decompressing them is what takes time in an emulated machine. The first process and the
//! scripts are not in here: they travel with each job in a second archive (see [`super::guest`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::cpio::Archive;
use super::tree::{Kernel, Tree, stamp};
use crate::exec;

/// Raised when the image itself changes.
const IMAGE_VERSION: u32 = 2;
/// Programs of the tree that go into the guest, with the libraries they load.
const PROGRAMS: &[&str] = &[
    "usr/sbin/nvme",
    "usr/bin/fio",
    "usr/sbin/mkfs.ext4",
    "usr/sbin/e2fsck",
    "usr/sbin/blkdiscard",
    "usr/bin/lspci",
    "usr/sbin/tlshd",
    "usr/bin/keyctl",
];
/// Modules the scripts load, with what these depend on; built-in ones cost nothing.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "nvme",
    "nvme_tcp",
    "nvmet_tcp",
    "tls",
    "loop",
    "ext4",
];
/// What a guest that boots from a disk of ours needs to find it.
const MODULES_BOOT: &[&str] = &["virtio_pci", "virtio_blk", "nvme", "ext4"];
/// Loaded on demand by others, and not present in every kernel.
const MODULES_OPTIONAL: &[&str] = &[
    "crc32c_generic",
    "crc32c_intel",
    "crc32c_cryptoapi",
    // Of TLS and authentication.
    "nvme_keyring",
    "nvme_auth",
    "gcm",
    "ccm",
    "ghash_generic",
    "ghash_clmulni_intel",
    "aesni_intel",
    "ctr",
    "dh_generic",
    "ecdh_generic",
    "hmac",
    "sha256_generic",
    "sha512_generic",
];
const FOLDERS: &[&str] = &[
    "dev", "proc", "sys", "run", "tmp", "root", "mnt", "job", "out", "etc", "etc/nvme", "var",
    "usr", "usr/bin", "usr/lib",
];
/// Who the guest is to an NVMe subsystem.
const HOSTID: &str = "11111111-2222-4333-8444-555555555555";

/// What a guest is started from.
pub(super) struct Image {
    /// The kernel, as the machine's firmware takes it.
    pub(super) vmlinuz: PathBuf,
    /// The archive that holds the guest's programs.
    pub(super) archive: PathBuf,
}

/// The image of a kernel, made now if it is not there.
pub(super) fn open(cache: &Path, tree: &Tree, kernel: Kernel) -> Result<Image> {
    let lists = [PROGRAMS, MODULES, MODULES_OPTIONAL, FOLDERS].map(|list| list.join(" "));
    let stamp = stamp(&[tree.stamp(), &IMAGE_VERSION.to_string(), &lists.join(";")]);
    let archive = cache.join(format!("image-{stamp}-{}.cpio", kernel.name()));
    let unpacked = tree.kernel(kernel);
    if !archive.exists() {
        // Two runs may make the same image at once; the last rename wins and both are whole.
        let work = archive.with_extension(format!("tmp{}", std::process::id()));
        build(tree, &unpacked, &work)
            .with_context(|| format!("cannot make the guest image of kernel {}", kernel.name()))?;
        fs::rename(&work, &archive)?;
    }
    Ok(Image { vmlinuz: vmlinuz(&unpacked)?, archive })
}

fn build(tree: &Tree, kernel: &Path, out: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(out)?));
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    for (name, to) in [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib")] {
        archive.link(name, to.as_bytes())?;
    }
    archive.link("lib64", b"usr/lib")?;
    archive.link("usr/sbin", b"bin")?;

    let mut programs = BTreeSet::new();
    let mut libraries = BTreeMap::new();
    for program in PROGRAMS {
        let name = program.rsplit('/').next().unwrap_or(program);
        programs.insert(name.to_owned());
        archive.file(&format!("usr/bin/{name}"), 0o755, &read(&tree.path(program))?)?;
        for library in tree.libraries(program)? {
            libraries.insert(place_of(tree, &library)?, library);
        }
    }
    let mut folders = BTreeSet::new();
    for (place, library) in &libraries {
        for folder in Path::new(place).ancestors().skip(1).filter(|f| *f > Path::new("usr/lib")) {
            folders.insert(folder.to_string_lossy().into_owned());
        }
        // A folder has to come before what is in it.
        for folder in std::mem::take(&mut folders) {
            archive.folder(&folder)?;
        }
        archive.file(place, 0o755, &read(library)?)?;
    }
    archive.file("usr/bin/busybox", 0o755, &read(&tree.path("usr/bin/busybox"))?)?;
    // A static program: it needs no loader of the tree.
    let applets = exec::output(Command::new(tree.path("usr/bin/busybox")).arg("--list"))?;
    for applet in
        applets.lines().filter(|applet| !programs.contains(*applet) && *applet != "busybox")
    {
        archive.link(&format!("usr/bin/{applet}"), b"busybox")?;
    }
    modules(tree, kernel, MODULES, &mut archive)?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\n")?;
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost guest\n")?;
    let agent = b"[debug]\nloglevel=0\ntls=0\nnl=0\n[authenticate]\nkeyrings=.nvme\n";
    archive.file("etc/tlshd.conf", 0o644, agent)?;
    archive.file("etc/mke2fs.conf", 0o644, &read(&tree.path("etc/mke2fs.conf"))?)?;
    let hostnqn = format!("nqn.2014-08.org.nvmexpress:uuid:{HOSTID}\n");
    archive.file("etc/nvme/hostnqn", 0o644, hostnqn.as_bytes())?;
    archive.file("etc/nvme/hostid", 0o644, format!("{HOSTID}\n").as_bytes())?;
    archive.finish()?;
    Ok(())
}

/// Where a library of the tree lies in the guest: at the same place, links resolved on the way.
fn place_of(tree: &Tree, library: &Path) -> Result<String> {
    let root = tree.path("");
    let below =
        library.strip_prefix(&root).with_context(|| format!("{} is foreign", library.display()))?;
    let below = below.to_str().context("library name is not UTF-8")?;
    Ok(match below.strip_prefix("lib64/").or_else(|| below.strip_prefix("usr/lib64/")) {
        Some(loader) => format!("usr/lib/{loader}"),
        None if below.starts_with("lib/") => format!("usr/{below}"),
        None => below.to_owned(),
    })
}

/// Writes what a boot loader takes as a first file system: busybox, what finds the disk that
/// carries the next one, and `init`.
pub(super) fn boot_archive(tree: &Tree, kernel: Kernel, init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for folder in ["dev", "proc", "sys", "disk", "usr", "usr/bin", "usr/lib"] {
        archive.folder(folder)?;
    }
    for (name, to) in [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib")] {
        archive.link(name, to.as_bytes())?;
    }
    archive.link("usr/sbin", b"bin")?;
    archive.file("usr/bin/busybox", 0o755, &read(&tree.path("usr/bin/busybox"))?)?;
    archive.link("usr/bin/sh", b"busybox")?;
    archive.file("init", 0o755, init)?;
    modules(tree, &tree.kernel(kernel), MODULES_BOOT, &mut archive)?;
    Ok(archive.finish()?)
}

/// The kernel of the tree, as a boot loader takes it.
pub(super) fn kernel_image(tree: &Tree, kernel: Kernel) -> Result<PathBuf> {
    vmlinuz(&tree.kernel(kernel))
}

/// Adds the modules, with the tables that `modprobe` reads.
fn modules<W: std::io::Write>(
    tree: &Tree,
    kernel: &Path,
    wanted: &[&str],
    archive: &mut Archive<W>,
) -> Result<()> {
    let release = release(kernel)?;
    let base = kernel.join("usr");
    let mut files = BTreeSet::new();
    for module in wanted.iter().chain(MODULES_OPTIONAL) {
        let mut modprobe = tree.program_as("usr/bin/kmod", "modprobe");
        modprobe.arg("-d").arg(&base).args(["-S", &release, "-D", module]);
        match exec::output(&mut modprobe) {
            Ok(text) => files.extend(text.lines().filter_map(|line| {
                line.strip_prefix("insmod ")?.split_whitespace().next().map(PathBuf::from)
            })),
            Err(error) if wanted.contains(module) => return Err(error),
            Err(_) => {}
        }
    }
    // The guest's own tables name only the modules it has.
    let stage = tempfile::tempdir()?;
    let source = base.join("lib/modules").join(&release);
    let dest = stage.path().join("lib/modules").join(&release);
    fs::create_dir_all(&dest)?;
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(source.join(name), dest.join(name))?;
    }
    for file in &files {
        let below = file.strip_prefix(&source)?;
        let plain = below.to_string_lossy().trim_end_matches(".xz").to_owned();
        let place = dest.join(&plain);
        fs::create_dir_all(place.parent().context("module without a folder")?)?;
        if below.as_os_str().as_bytes().ends_with(b".xz") {
            let mut xz = tree.program("usr/bin/xz");
            let xz = xz.arg("-dc").arg(file).stderr(std::process::Stdio::inherit()).output()?;
            if !xz.status.success() {
                bail!("cannot unpack {}", file.display());
            }
            fs::write(&place, xz.stdout)?;
        } else {
            fs::copy(file, &place)?;
        }
    }
    let mut depmod = tree.program_as("usr/bin/kmod", "depmod");
    exec::output(depmod.arg("-b").arg(stage.path()).arg(&release))?;
    archive.tree(stage.path(), "usr")?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn release(kernel: &Path) -> Result<String> {
    let folder = kernel.join("usr/lib/modules");
    let entry = fs::read_dir(&folder)?.next().context("kernel without modules")??;
    entry.file_name().into_string().ok().context("kernel release is not UTF-8")
}

/// Older packages keep the kernel in `boot`, newer ones beside the modules.
fn vmlinuz(kernel: &Path) -> Result<PathBuf> {
    let release = release(kernel)?;
    let places = [
        kernel.join("boot").join(format!("vmlinuz-{release}")),
        kernel.join("usr/lib/modules").join(&release).join("vmlinuz"),
    ];
    places.into_iter().find(|place| place.exists()).context("the packages hold no kernel")
}
