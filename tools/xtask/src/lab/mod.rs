//! The guest lab: a stock Debian kernel in an emulated machine judges what we built.
//!
//! ```text
//!  cache folder (outside the checkout, shared)        checkout
//!   tree-*    Debian 13: QEMU, nvme-cli, fio, kernels   tests/lab/   what the guest runs
//!   image-*   the guest's programs, per kernel          target/lab/  logs of each scenario
//! ```
//!
//! A scenario starts our programs on this machine, boots guests against them, checks what the
//! guests saw, and ends everything it started. `selftest` does the same against the kernel's own
//! target and QEMU's own disk server: if it passes and another scenario fails, the fault is ours.

mod boot_disk;
mod cpio;
mod guest;
mod initramfs;
mod mirror;
mod qmp;
mod scenario;
mod service;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use self::guest::{Guest, Job};
use self::scenario::{SCENARIOS, Scenario};
use self::tree::{Kernel, Tree};
use crate::report::{Outcome, Report};
use crate::{exec, workspace};

/// Names the folder that keeps the Debian tree.
const CACHE_VARIABLE: &str = "PENSTOCK_LAB_DIR";

/// Which scenarios to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Scenarios to run, or `all`.
    #[arg(value_name = "NAME", required_unless_present_any = ["list", "setup"])]
    names: Vec<String>,
    /// Print the scenarios and what each shows.
    #[arg(long)]
    list: bool,
    /// Make the Debian tree and the guest images, run nothing.
    #[arg(long)]
    setup: bool,
    /// Take the release binary as it is.
    #[arg(long)]
    no_build: bool,
}

pub(crate) fn task(args: &Args) -> Result<bool> {
    if args.list {
        for scenario in SCENARIOS {
            println!("{:20} {}", scenario.name, scenario.shows);
        }
        return Ok(true);
    }
    let chosen = if args.names.iter().any(|name| name == "all") {
        SCENARIOS.iter().collect()
    } else {
        args.names.iter().map(|name| by_name(name)).collect::<Result<Vec<_>>>()?
    };
    let mut report = Report::default();
    let mut is_built = true;
    if !args.no_build && chosen.iter().any(|scenario| scenario.needs_penstock) {
        is_built = report.step("release build", || {
            exec::run(workspace::cargo().args(["build", "--release", "-p", "penstock"]))?;
            Ok(Outcome::Passed)
        });
    }
    run(&mut report, &chosen, is_built);
    Ok(report.finish())
}

/// Runs every scenario as a step of its own. `is_built` says whether the release build succeeded.
pub(crate) fn add_steps(report: &mut Report, is_built: bool) {
    run(report, &SCENARIOS.iter().collect::<Vec<_>>(), is_built);
}

/// The comparison of fio's engines, which needs the lab's programs.
pub(crate) fn bench_fio(rest: &[String]) -> Result<bool> {
    scenario::fio_bench::task(rest)
}

fn by_name(name: &str) -> Result<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name).with_context(|| {
        let known: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        format!("no lab scenario {name:?}; there are: {}", known.join(", "))
    })
}

fn run(report: &mut Report, scenarios: &[&Scenario], is_built: bool) {
    let mut lab = None;
    let mut reason = "the lab's set-up failed".to_owned();
    report.step("lab set-up", || match Lab::open()? {
        Ok(opened) => {
            lab = Some(opened);
            Ok(Outcome::Passed)
        }
        Err(why) => {
            reason.clone_from(&why);
            Ok(Outcome::Skipped(why))
        }
    });
    for scenario in scenarios {
        let name = format!("lab {}", scenario.name);
        match &lab {
            None => report.skip(&name, &reason),
            Some(_) if scenario.needs_penstock && !is_built => {
                report.skip(&name, "there is no release build");
            }
            Some(lab) => {
                report.step(&name, || (scenario.run)(&lab.scene(scenario.name)?));
            }
        }
    }
}

/// What every scenario uses.
struct Lab {
    cache: PathBuf,
    tree: Tree,
    checkout: PathBuf,
    target: PathBuf,
}

impl Lab {
    /// Opens the lab, setting it up first if need be. `Err` inside says why there is none here.
    fn open() -> Result<Result<Self, String>> {
        let cache = cache_folder()?;
        let tree = match Tree::open(&cache)? {
            Ok(tree) => tree,
            Err(why) => return Ok(Err(why)),
        };
        for kernel in Kernel::ALL {
            initramfs::open(&cache, &tree, kernel)?;
        }
        let (checkout, target) = (workspace::root()?, workspace::target_dir()?);
        Ok(Ok(Self { cache, tree, checkout, target }))
    }

    fn scene(&self, name: &str) -> Result<Scene<'_>> {
        let folder = self.target.join("lab").join(name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        // A Unix socket's path may have 107 bytes, so it cannot lie in a deep checkout.
        let sockets = tempfile::Builder::new().prefix("penstock-lab-").tempdir()?;
        Ok(Scene { lab: self, folder, sockets })
    }
}

/// Programs that devices are compared with, each with the flag of the comparison that takes it; or
/// why there is no tree.
pub(crate) fn peers() -> Result<Result<Vec<(&'static str, Command)>, String>> {
    let tree = match Tree::open(&cache_folder()?)? {
        Ok(tree) => tree,
        Err(why) => return Ok(Err(why)),
    };
    let mut peers = vec![("--qsd", tree.program("usr/bin/qemu-storage-daemon"))];
    match tree.fio_blkio() {
        Ok(fio) => peers.push(("--fio", fio)),
        Err(why) => println!("{why}"),
    }
    Ok(Ok(peers))
}

/// The tree's fio, or why there is none.
pub(crate) fn fio() -> Result<Result<Command, String>> {
    Ok(Tree::open(&cache_folder()?)?.map(|tree| tree.program("usr/bin/fio")))
}

fn cache_folder() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let folder = match (variable(CACHE_VARIABLE), variable("XDG_CACHE_HOME"), variable("HOME")) {
        (Some(folder), ..) => PathBuf::from(folder),
        (None, Some(cache), _) => Path::new(&cache).join("penstock-lab"),
        (None, None, Some(home)) => Path::new(&home).join(".cache/penstock-lab"),
        (None, None, None) => bail!("set {CACHE_VARIABLE} to a folder for the lab's Debian tree"),
    };
    std::path::absolute(&folder).with_context(|| format!("bad folder {}", folder.display()))
}

/// One scenario at work: its folder for logs and volumes, and the means to start things.
struct Scene<'a> {
    lab: &'a Lab,
    folder: PathBuf,
    sockets: tempfile::TempDir,
}

impl Scene<'_> {
    fn tree(&self) -> &Tree {
        &self.lab.tree
    }

    /// A file among the scenario's logs.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A place for a Unix socket.
    fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// Our release binary.
    fn penstock(&self) -> Command {
        Command::new(self.lab.target.join("release/penstock"))
    }

    /// Boots a guest; `name` is that of its folder among the logs.
    fn boot(&self, name: &str, kernel: Kernel, job: &Job<'_>) -> Result<Guest> {
        let image = initramfs::open(&self.lab.cache, &self.lab.tree, kernel)?;
        let scripts = self.lab.checkout.join("tests/lab");
        let places = (&*self.folder.join(name), &*self.socket(&format!("{name}.qmp")));
        Guest::start(&self.lab.tree, &image, &scripts, places, job)
    }
}
