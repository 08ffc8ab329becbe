//! Containment: what a guest that took the emulator over could still reach.
//!
//! ```text
//!  configuration, identities, sockets bound          everything that needs rights
//!  ─────────────── enter() ───────────────────────── one thread; all later threads inherit:
//!    no new privileges, no capabilities, landlock      no file but taking the sockets away,
//!                                                      no TCP port but those configured
//!  cores, devices
//!  ─────────────── close() ───────────────────────── all threads: seccomp
//!    an allow list of system calls                     no program, no process, no debugger,
//!                                                      no socket but TCP, no new ring
//! ```
//!
//! Operations on a ring pass seccomp by. So the cores' rings are restricted as well
//! ([`reactor::CoreConfig::restricted`]), and what is left is judged by landlock, which sees them.
//!
//! One process is one domain: a guest that takes it over has what all devices of the process have,
//! their volumes and keys. Guests that must not reach each other get a process each.

pub(crate) mod probe;
mod seccomp;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, NetPort,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::config::Containment;

/// The newest version of landlock whose rights are asked for; an older kernel has a part of them.
const NEWEST: ABI = ABI::V10;
/// The oldest version that bounds connections, without which `require` refuses.
const NEEDED: ABI = ABI::V4;

/// What an emulator may still do.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    /// Directories of sockets, to take them away at the end.
    pub(crate) socket_dirs: BTreeSet<PathBuf>,
    /// TCP ports that may be connected to: those of the configuration, and those that discovery may
    /// lead to; `None`: all.
    pub(crate) connect_ports: Option<BTreeSet<u16>>,
}

impl Needs {
    /// Notes the directory of a socket.
    pub(crate) fn socket(&mut self, path: &Path) {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        self.socket_dirs.insert(dir.unwrap_or(Path::new(".")).to_path_buf());
    }
}

/// A process that has given up what it does not need; [`close`](Contained::close) ends its start.
#[derive(Debug)]
pub(crate) struct Contained {
    mode: Containment,
}

/// Gives up files, ports, capabilities and new privileges. To be called while the process has one
/// thread: the kernel restricts the calling one and those it starts.
pub(crate) fn enter(mode: Containment, needs: &Needs) -> anyhow::Result<Option<Contained>> {
    if mode == Containment::Off {
        tracing::warn!(
            "containment is off: a guest that breaks out has the rights of this process"
        );
        return Ok(None);
    }
    let mut lacking = Vec::new();
    match threads() {
        Some(1) => {}
        count => lacking.push(format!(
            "the process has {} threads, and those that run already keep their rights",
            count.map_or("an unknown number of".to_owned(), |count| count.to_string())
        )),
    }
    if let Err(error) = drop_capabilities() {
        lacking.push(format!("capabilities stay: {error}"));
    }
    match restrict(needs).context("landlock")? {
        (RulesetStatus::FullyEnforced, _) => {}
        (_, LandlockStatus::Available { effective_abi, .. }) if effective_abi >= NEEDED => {
            // What newer kernels add is closed by seccomp or by the rings' restrictions.
            tracing::debug!(abi = ?effective_abi, "landlock of an older kernel");
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => lacking.push(format!(
            "landlock of this kernel ({effective_abi:?}) does not bound connections; Linux 6.7 does"
        )),
        (_, LandlockStatus::NotEnabled) => {
            lacking.push("landlock is not enabled: add it to the kernel's lsm= list".to_owned());
        }
        (_, LandlockStatus::NotImplemented) => {
            lacking.push("this kernel has no landlock (CONFIG_SECURITY_LANDLOCK)".to_owned());
        }
    }
    judge(mode, &lacking)?;
    Ok(Some(Contained { mode }))
}

impl Contained {
    /// Takes away the system calls that only a start needs, from all threads.
    pub(crate) fn close(self) -> anyhow::Result<()> {
        let lacking = match seccomp::apply() {
            Ok(()) => Vec::new(),
            Err(error) => vec![format!("no seccomp filter: {error}")],
        };
        judge(self.mode, &lacking)?;
        tracing::info!("contained: no files, no programs, no sockets but those of the devices");
        Ok(())
    }
}

fn judge(mode: Containment, lacking: &[String]) -> anyhow::Result<()> {
    if lacking.is_empty() {
        return Ok(());
    }
    let text = lacking.join("; ");
    if mode == Containment::Require {
        bail!("containment is required and not to be had: {text}");
    }
    tracing::warn!("containment is incomplete: {text}");
    Ok(())
}

fn restrict(needs: &Needs) -> anyhow::Result<(RulesetStatus, LandlockStatus)> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(NEWEST))?;
    if needs.connect_ports.is_some() {
        ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut ruleset = ruleset.create()?;
    for dir in &needs.socket_dirs {
        let opened = match PathFd::new(dir) {
            Ok(opened) => opened,
            Err(error) if is_closed(dir) => {
                // Of a user who has become another one meanwhile.
                tracing::debug!(dir = %dir.display(), %error, "sockets that stay behind");
                continue;
            }
            Err(error) => return Err(error).with_context(|| format!("{}", dir.display())),
        };
        ruleset = ruleset.add_rule(PathBeneath::new(opened, AccessFs::RemoveFile))?;
    }
    for port in needs.connect_ports.iter().flatten() {
        ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    let status = ruleset.restrict_self()?;
    Ok((status.ruleset, status.landlock))
}

/// Whether this process may not even look at a directory.
fn is_closed(dir: &Path) -> bool {
    dir.metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

/// Nothing of the superuser's is left, not even by running a program that has it.
fn drop_capabilities() -> std::io::Result<()> {
    let before = rustix::thread::capabilities(None)?;
    if before.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().iter() {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // A capability that this kernel does not know.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    Ok(rustix::thread::set_capabilities(None, none)?)
}

/// Threads of this process; `None`: /proc does not say.
pub(crate) fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_bare_name_is_the_current_one() {
        let mut needs = Needs::default();
        needs.socket(Path::new("disk.sock"));
        needs.socket(Path::new("/run/a/disk.sock"));
        needs.socket(Path::new("/run/a/other.sock"));
        let dirs: Vec<_> = needs.socket_dirs.iter().collect();
        assert_eq!(dirs, [Path::new("/run/a"), Path::new(".")]);
    }

    #[test]
    fn what_is_lacking_is_an_error_only_where_it_is_required() {
        let lacking = ["no landlock".to_owned()];
        judge(Containment::On, &lacking).unwrap();
        judge(Containment::Require, &[]).unwrap();
        let error = judge(Containment::Require, &lacking).unwrap_err().to_string();
        assert!(error.contains("no landlock"), "{error}");
    }
}
