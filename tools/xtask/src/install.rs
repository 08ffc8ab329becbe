//! What the tasks need from the machine: present, or installed with a word about it.

use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{exec, workspace};

/// Whether we may do what only the superuser may.
pub(crate) fn is_root() -> bool {
    // The owner of our own /proc entry is our effective user.
    std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

/// The program of that name in `PATH` or in the folders that hold the superuser's tools.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| {
            std::fs::metadata(file)
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

/// Makes each program present, installing the Debian package that holds it where it is missing.
pub(crate) fn debian_packages(wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(name, _)| program(name).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    println!("missing, installing with apt-get: {list}");
    if program("apt-get").is_none() {
        bail!("missing {list}, and there is no apt-get to install them with");
    }
    if !is_root() && !exec::succeeds(Command::new("sudo").args(["-n", "true"])) {
        bail!("missing {list}: run `apt-get install {list}` as root");
    }
    // The package lists of a fresh machine are often empty.
    exec::run(apt_get().args(["-q", "update"]))?;
    exec::run(apt_get().args(["-q", "-y", "--no-install-recommends", "install"]).args(missing))
}

fn apt_get() -> Command {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "apt-get"]);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Makes `cargo SUBCOMMAND` present, building it from the crate registry where it is missing.
pub(crate) fn cargo_tool(subcommand: &str, package: &str) -> Result<()> {
    if exec::succeeds(workspace::cargo().args([subcommand, "--version"])) {
        return Ok(());
    }
    println!("missing, installing with cargo (some minutes): {package}");
    exec::run(workspace::cargo().args(["install", "--locked", package]))
}

/// Makes a component of the Rust toolchain present.
pub(crate) fn rust_component(name: &str) -> Result<()> {
    let (tool, component) = match name {
        "rustfmt" => ("cargo-fmt", "rustfmt"),
        other => ("cargo-clippy", other),
    };
    if exec::succeeds(Command::new(tool).arg("--version")) {
        return Ok(());
    }
    println!("missing, installing with rustup: {component}");
    exec::run(Command::new("rustup").args([OsStr::new("component"), "add".as_ref()]).arg(component))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_by_name_and_a_missing_one_is_not() {
        assert!(program("sh").is_some_and(|path| path.is_absolute()));
        assert_eq!(program("no-such-program-here"), None);
    }

    #[test]
    fn nothing_is_installed_when_everything_is_there() {
        debian_packages(&[("sh", "no-such-package-here")]).unwrap();
    }
}
