//! `cargo xtask bench NAME`: comparisons of our programs with a yardstick on the same machine.

mod chart;
mod gate;

use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{exec, lab, workspace};

/// What to compare, and arguments for the program that does it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The comparison.
    name: Comparison,
    /// Arguments passed on.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Comparison {
    /// The target with a null volume against a bare request/response loop: plain, digests, TLS.
    Target,
    /// The same, TLS against plain and the bare loop.
    Tls,
    /// Many connections, many volumes, memory, start, followed requests; the file backend beside fio.
    Scale,
    /// The working tree against a base revision: counted instructions, and targets in turns.
    Gate,
    /// fio's jobs on every engine that this machine can run.
    Fio,
    /// A picture of what the comparison of the target found, to be kept in docs/.
    Chart,
    /// Emulated disks against qemu-storage-daemon, and through the fabric against the initiator.
    Device,
}

pub(crate) fn task(args: &Args) -> Result<bool> {
    match args.name {
        Comparison::Gate => gate::task(&args.rest),
        Comparison::Fio => lab::bench_fio(&args.rest),
        Comparison::Chart => chart::task(&args.rest),
        name => run(name, &args.rest).map(|()| true),
    }
}

/// Builds the binary under test and the programs that compare it, together: one set of features.
pub(crate) fn build() -> Result<()> {
    let mut build = workspace::cargo();
    exec::run(build.args(["build", "--release", "-p", "penstock", "-p", "it"]))
}

/// Builds both sides and compares them; an error when a goal is missed.
pub(crate) fn run(name: Comparison, rest: &[String]) -> Result<()> {
    let (binary, first): (_, &[&str]) = match name {
        Comparison::Target => ("bench-target", &[]),
        Comparison::Scale => ("bench-scale", &[]),
        Comparison::Tls => ("bench-target", &["--sides", "plain,tls128,tls256"]),
        Comparison::Device => ("bench-device", &[]),
        Comparison::Gate | Comparison::Fio | Comparison::Chart => {
            bail!("this comparison has no program of its own")
        }
    };
    build()?;
    let program = workspace::target_dir()?.join("release").join(binary);
    let mut command = Command::new(program);
    if let Comparison::Device = name {
        match lab::peers()? {
            Ok(peers) => {
                for (flag, peer) in peers {
                    let words = std::iter::once(peer.get_program()).chain(peer.get_args());
                    words.for_each(|word| {
                        command.arg(flag).arg(word);
                    });
                }
            }
            Err(why) => println!("without programs of others: {why}"),
        }
    }
    if matches!(name, Comparison::Scale) && rest.iter().any(|word| word.starts_with("--files")) {
        match lab::fio()? {
            Ok(fio) => {
                for word in std::iter::once(fio.get_program()).chain(fio.get_args()) {
                    command.arg("--fio").arg(word);
                }
            }
            Err(why) => println!("without the lab's fio: {why}"),
        }
    }
    exec::run(command.args(first).args(rest))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn job_files(folder: &Path) -> BTreeMap<String, String> {
        let mut files = BTreeMap::new();
        for engine in ["kernel-nvme-tcp", "emulated-nvme", "virtio-blk", "libblkio"] {
            for entry in std::fs::read_dir(folder.join(engine)).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                files.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
        files
    }

    #[test]
    fn the_job_files_of_each_engine_are_what_their_parts_say() {
        let folder = workspace::root().unwrap().join("fio-jobs");
        let made = tempfile::tempdir().unwrap();
        exec::output(Command::new("sh").arg(folder.join("make.sh")).arg(made.path())).unwrap();
        let (there, made) = (job_files(&folder), job_files(made.path()));
        assert!(made.len() >= 40, "{}", made.len());
        assert_eq!(there, made, "run `sh fio-jobs/make.sh`");
    }
}
