//! The Debian tree that holds every foreign program of the lab.
//!
//! A folder with Debian 13 and its backports, made once by `debootstrap` and kept outside the
//! checkout, so that all checkouts share it. Its name carries a stamp of the recipe: a changed
//! package list makes a new tree. It is built under a temporary name and renamed at the end, under
//! a lock, so that an interrupted set-up leaves nothing that looks finished.
//!
//! Only the set-up needs root. Afterwards programs of the tree are run where they are, by the
//! tree's own dynamic loader: they see this machine's files and need no mounts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::mirror;
use crate::{exec, install};

/// Raised when the set-up itself changes.
const RECIPE_VERSION: u32 = 2;
const SUITE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";
/// Newest QEMU: the older one lacks features that the device scenarios need.
const PACKAGES_BACKPORTS: &[&str] = &["qemu-system-x86", "qemu-utils"];
const PACKAGES: &[&str] = &[
    "nvme-cli",
    "fio",
    "e2fsprogs",
    "busybox-static",
    "kmod",
    "xz-utils",
    "pciutils",
    // Firmware and boot loader for guests that boot from a disk of ours.
    "ovmf",
    "grub-common",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    // Keys, handshakes and certificates of others.
    "ktls-utils",
    "keyutils",
    "gnutls-bin",
    "openssl",
];
/// To build fio with its libblkio engine, which Debian's binary leaves out.
const PACKAGES_BUILD: &[&str] = &[
    "gcc",
    "make",
    "pkg-config",
    "libc6-dev",
    "libaio-dev",
    "libblkio-dev",
    "zlib1g-dev",
    "dpkg-dev",
];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Folder of the tree that holds what is not installed by packages.
const LAB: &str = "srv/lab";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const MACHINE: &str = "x86_64";

/// A kernel of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// Debian 13's own.
    Stable,
    /// The newest of the backports.
    Backports,
}

impl Kernel {
    pub(super) const ALL: [Self; 2] = [Self::Stable, Self::Backports];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stable => "6.12",
            Self::Backports => "backports",
        }
    }
}

/// A finished tree.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    stamp: String,
}

impl Tree {
    /// The tree, made now if it is not there. `Err` inside says why it cannot be made here.
    pub(super) fn open(cache: &Path) -> Result<Result<Self, String>> {
        let stamp = recipe_stamp();
        let root = cache.join(format!("tree-{stamp}"));
        let tree = Self { root, stamp };
        if tree.root.exists() {
            return Ok(Ok(tree));
        }
        if std::env::consts::ARCH != MACHINE {
            return Ok(Err(format!("the guest lab is for {MACHINE} machines")));
        }
        if !install::is_root() {
            let why = "the guest lab's Debian tree is made by root: run `cargo xtask lab --setup` as root once";
            return Ok(Err(why.to_owned()));
        }
        fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("cannot lock the lab's folder")?;
        if !tree.root.exists() {
            Setup::new(cache, &tree)?.run()?;
        }
        Ok(Ok(tree))
    }

    /// What names this tree's content; images made from it carry it on.
    pub(super) fn stamp(&self) -> &str {
        &self.stamp
    }

    /// A file or folder of the tree, named from the tree's root without a leading slash.
    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// The folder of a kernel's unpacked packages.
    pub(super) fn kernel(&self, kernel: Kernel) -> PathBuf {
        self.root.join(LAB).join("kernels").join(kernel.name())
    }

    /// fio with its libblkio engine, or why there is none.
    pub(super) fn fio_blkio(&self) -> Result<Command, String> {
        let below = format!("{LAB}/fio");
        if self.path(&below).exists() {
            return Ok(self.program(&below));
        }
        Err("no fio with a libblkio engine: its source package could not be had at set-up"
            .to_owned())
    }

    /// A program of the tree, to be run on this machine's files.
    pub(super) fn program(&self, below: &str) -> Command {
        self.program_as(below, below)
    }

    /// The same for a program that does what its name says.
    pub(super) fn program_as(&self, below: &str, name: &str) -> Command {
        let mut command = Command::new(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        let libraries = self.path(LIBRARIES);
        // Debian keeps the libraries of Ceph, which fio needs, in a folder of their own.
        command.arg("--library-path");
        command.arg(format!("{0}:{0}/ceph", libraries.display()));
        command.args(["--argv0", name]).arg(self.path(below));
        command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
        command.env("LC_ALL", "C");
        command
    }

    /// The libraries a program of the tree loads, as files of the tree.
    pub(super) fn libraries(&self, below: &str) -> Result<Vec<PathBuf>> {
        let mut list = Command::new(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        let libraries = self.path(LIBRARIES);
        list.arg("--library-path").arg(format!("{0}:{0}/ceph", libraries.display()));
        let text = exec::output(list.arg("--list").arg(self.path(below)))?;
        let mut found = Vec::new();
        for line in text.lines() {
            let Some((name, rest)) = line.split_once("=>") else { continue };
            match rest.split_whitespace().next() {
                Some(path) if path.starts_with('/') => found.push(path.into()),
                _ => bail!("{below} needs {}, which the tree lacks", name.trim()),
            }
        }
        Ok(found)
    }
}

/// A tree being made.
struct Setup<'a> {
    tree: &'a Tree,
    work: PathBuf,
    log: PathBuf,
}

impl<'a> Setup<'a> {
    fn new(cache: &Path, tree: &'a Tree) -> Result<Self> {
        let work = tree.root.with_extension("tmp");
        if work.exists() {
            println!("removing what an interrupted set-up left in {}", work.display());
            fs::remove_dir_all(&work)?;
        }
        let log = cache.join(format!("setup-{}.log", tree.stamp));
        let _ = fs::remove_file(&log);
        Ok(Self { tree, work, log })
    }

    fn run(&self) -> Result<()> {
        println!("setting up the guest lab in {} (some minutes, once)", self.tree.root.display());
        println!("its log is {}", self.log.display());
        install::debian_packages(&[("debootstrap", "debootstrap")])?;
        self.base().context("cannot make the Debian tree")?;
        println!("installing QEMU, nvme-cli, fio and what they need");
        self.apt(&["-t", BACKPORTS, "install"], PACKAGES_BACKPORTS)?;
        self.apt(&["install"], PACKAGES)?;
        for kernel in Kernel::ALL {
            self.kernel(kernel).with_context(|| format!("cannot get kernel {}", kernel.name()))?;
        }
        println!("building fio with its libblkio engine");
        if let Err(error) = self.fio() {
            // Everything but the native fio runs works without it, and those say so.
            println!("no fio with a libblkio engine: {error:#}");
        }
        self.apt(&["clean"], &[])?;
        fs::rename(&self.work, &self.tree.root)?;
        Ok(())
    }

    fn base(&self) -> Result<()> {
        println!("making a Debian {SUITE} tree");
        let mut command = Command::new(install::program("debootstrap").context("no debootstrap")?);
        command.args(["--variant=minbase", "--include=ca-certificates"]);
        if Path::new(KEYRING).exists() {
            command.arg(format!("--keyring={KEYRING}"));
        }
        command.arg(SUITE).arg(&self.work).args(mirror::of_this_machine());
        exec::run_logged(&mut command, &self.log)?;

        let list = self.work.join("etc/apt/sources.list");
        let archive = mirror::one_line(&fs::read_to_string(&list)?)
            .context("debootstrap left no archive in sources.list")?;
        fs::remove_file(&list)?;
        self.write(
            "etc/apt/sources.list.d/lab.sources",
            &sources("deb deb-src", &archive, &format!("{SUITE} {SUITE}-updates {BACKPORTS}"), ""),
        )?;
        let proxy = exec::output(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let proxy: String =
            proxy.lines().filter(|line| line.contains("Proxy")).map(|l| format!("{l}\n")).collect();
        self.write(
            "etc/apt/apt.conf.d/90lab",
            &format!(
                "APT::Install-Recommends \"false\";\nAPT::Sandbox::User \"root\";\n\
                 Acquire::Languages \"none\";\nAcquire::Retries \"3\";\n{proxy}"
            ),
        )?;
        self.write(
            "etc/dpkg/dpkg.cfg.d/lab",
            "force-unsafe-io\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\n\
             path-exclude=/usr/share/locale/*\n",
        )?;
        // Packages must not start services.
        self.write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")?;
        exec::run(Command::new("chmod").arg("755").arg(self.work.join("usr/sbin/policy-rc.d")))?;
        fs::create_dir_all(self.work.join(LAB))?;
        self.apt(&["update"], &[])
    }

    /// Unpacks the newest kernel of a kind without installing it.
    fn kernel(&self, kernel: Kernel) -> Result<()> {
        let names = self.output(&[
            "apt-cache",
            "search",
            "--names-only",
            r"^linux-(image|binary|modules|base)-[0-9.]+\+deb13-cloud-amd64$",
        ])?;
        let names: Vec<&str> = names.lines().filter_map(|line| line.split(' ').next()).collect();
        let packages = kernel_packages(kernel, &names).context("the archive has none")?;
        println!("unpacking {}", packages.join(" "));
        let folder = format!("/{LAB}/kernels/{}", kernel.name());
        let script = r#"set -e
            mkdir -p "$1" /tmp/debs; cd /tmp/debs; folder=$1; shift
            apt-get -q download "$@"
            for deb in ./*.deb; do dpkg -x "$deb" "$folder"; done
            rm -r /tmp/debs
            depmod -b "$folder/usr" "$(ls "$folder/usr/lib/modules")""#;
        let mut command = self.inside("sh");
        command.args(["-c", script, "sh", &folder]).args(packages);
        exec::run_logged(&mut command, &self.log)
    }

    /// Builds fio from the source that Debian packages.
    fn fio(&self) -> Result<()> {
        self.apt(&["install"], PACKAGES_BUILD)?;
        if let Err(error) = self.fio_source("fio") {
            println!("no source in {SUITE} ({error:#}), trying unstable");
            let lab = fs::read_to_string(self.work.join("etc/apt/sources.list.d/lab.sources"))?;
            let archive = lab.lines().find_map(|line| line.strip_prefix("URIs: "));
            let archive = archive.context("no archive in lab.sources")?;
            // Signatures are checked as ever; only an archive copy's age is not.
            let more = sources("deb-src", archive, "sid", "Check-Valid-Until: no\n");
            self.write("etc/apt/sources.list.d/source.sources", &more)?;
            self.apt(&["update"], &[])?;
            let known = self.output(&["apt-cache", "showsrc", "fio"])?;
            let versions = known.lines().filter_map(|line| line.strip_prefix("Version: "));
            let mut versions: Vec<&str> = versions.collect();
            versions.sort_by_key(|version| std::cmp::Reverse(numbers(version)));
            versions
                .iter()
                .find(|version| self.fio_source(&format!("fio={version}")).is_ok())
                .context("no version's source could be had")?;
        }
        let script = format!(
            "set -e; cd /tmp/fio; tar -xf fio_*.orig.tar.*; cd fio-*/\n\
             ./configure --disable-native; make -j\"$(nproc)\" fio\n\
             ./fio --enghelp | grep -q libblkio; strip fio; cp fio /{LAB}/fio; rm -r /tmp/fio"
        );
        exec::run_logged(self.inside("sh").args(["-c", &script]), &self.log)
    }

    /// Gets the original source, which is all that is needed: Debian's changes are to its packaging.
    fn fio_source(&self, version: &str) -> Result<()> {
        let script = r#"set -e; rm -rf /tmp/fio; mkdir /tmp/fio; cd /tmp/fio
            apt-get -q source --tar-only --download-only "$1"; ls fio_*.orig.tar.*"#;
        exec::output(self.inside("sh").args(["-c", script, "sh", version])).map(drop)
    }

    fn apt(&self, action: &[&str], packages: &[&str]) -> Result<()> {
        let mut command = self.inside("apt-get");
        exec::run_logged(command.args(["-q", "-y"]).args(action).args(packages), &self.log)
    }

    fn output(&self, words: &[&str]) -> Result<String> {
        exec::output(self.inside(words[0]).args(&words[1..]))
    }

    /// A program of the tree, run inside it.
    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new(install::program("chroot").unwrap_or("chroot".into()));
        command.arg(&self.work).arg(program).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin").env("HOME", "/").env("LC_ALL", "C");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        for name in ["http_proxy", "https_proxy", "no_proxy"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        command
    }

    fn write(&self, below: &str, text: &str) -> Result<()> {
        let path = self.work.join(below);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn sources(types: &str, archive: &str, suites: &str, more: &str) -> String {
    format!(
        "Types: {types}\nURIs: {archive}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n{more}"
    )
}

/// The packages of the newest kernel of a kind among the names the archive has.
fn kernel_packages(kernel: Kernel, names: &[&str]) -> Option<Vec<String>> {
    let of = |prefix: &str| {
        let prefix = prefix.to_owned();
        names.iter().filter(move |name| name.starts_with(&prefix)).max_by_key(|name| numbers(name))
    };
    match kernel {
        Kernel::Stable => Some(vec![(*of("linux-image-6.12.")?).to_owned()]),
        // Since 7.2 image, modules and the list of what is built in come in packages of their own.
        Kernel::Backports => match of("linux-binary-") {
            Some(binary) => {
                let parts =
                    ["binary", "modules", "base"].map(|part| binary.replace("binary", part));
                Some(parts.into_iter().filter(|part| names.contains(&part.as_str())).collect())
            }
            None => Some(vec![(*of("linux-image-")?).to_owned()]),
        },
    }
}

/// The numbers of a version in order, so that 6.12.107 comes after 6.12.94.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn recipe_stamp() -> String {
    let lists = [PACKAGES_BACKPORTS, PACKAGES, PACKAGES_BUILD].map(|list| list.join(" "));
    stamp(&[&RECIPE_VERSION.to_string(), SUITE, &lists.join(";")])
}

/// A short name for a content: FNV-1a, which is the same in every release of the compiler.
pub(super) fn stamp(parts: &[&str]) -> String {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[&str] = &[
        "linux-image-6.12.94+deb13-cloud-amd64",
        "linux-image-6.12.107+deb13-cloud-amd64",
        "linux-image-7.3.4+deb13-cloud-amd64",
        "linux-binary-7.2.12+deb13-cloud-amd64",
        "linux-binary-7.3.4+deb13-cloud-amd64",
        "linux-modules-7.3.4+deb13-cloud-amd64",
        "linux-base-7.3.4+deb13-cloud-amd64",
    ];

    #[test]
    fn the_newest_kernel_is_taken_by_number() {
        let stable = kernel_packages(Kernel::Stable, NAMES).unwrap();
        assert_eq!(stable, ["linux-image-6.12.107+deb13-cloud-amd64"]);
        let backports = kernel_packages(Kernel::Backports, NAMES).unwrap();
        assert_eq!(
            backports,
            ["binary", "modules", "base"]
                .map(|part| format!("linux-{part}-7.3.4+deb13-cloud-amd64"))
        );
    }

    #[test]
    fn an_archive_with_single_packages_only_still_has_a_newest_kernel() {
        let backports = kernel_packages(Kernel::Backports, &NAMES[..3]).unwrap();
        assert_eq!(backports, ["linux-image-7.3.4+deb13-cloud-amd64"]);
        assert_eq!(kernel_packages(Kernel::Stable, &NAMES[3..]), None);
    }

    #[test]
    fn stamps_tell_lists_apart() {
        assert_eq!(stamp(&["a", "b"]), stamp(&["a", "b"]));
        assert_ne!(stamp(&["a", "b"]), stamp(&["ab"]));
        assert_eq!(stamp(&[]), "cbf29ce484222325");
    }
}
