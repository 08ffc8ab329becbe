//! What of this machine keeps Penstock slow, what to change, and the changing of what can be
//! changed while the machine runs.
//!
//! ```text
//!  /proc, /sys below a root folder ─► Tree ─► cpu, net, kernel, disk ─► Survey ─► people, JSON
//!                                                                         └─► apply: writes to
//!                                                                             /proc and /sys only
//! ```
//!
//! Nothing is measured and nothing is started: a survey reads files. A finding tells what there is,
//! what is wanted, why, and the command that does it. [`Survey::apply`] carries out exactly the
//! writes of the findings that are marked [`Level::Change`] and have any, and nothing else; what
//! depends on things this machine does not show (the network beyond it, the use of the machine by
//! others) is [`Level::Consider`] and left to the operator.
//!
//! The files of a tree are taken for what they are: text from outside, of any content and length.

mod apply;
mod cpu;
mod disk;
mod kernel;
mod net;
#[cfg(test)]
mod tests;
mod tree;

use std::fmt;
use std::path::Path;

use serde::Serialize;

pub use apply::Applied;
use tree::Tree;

/// What a finding asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Better changed: nothing speaks for what there is.
    Change,
    /// Better changed if what the reason names holds, which this machine does not show.
    Consider,
    /// As it should be.
    Good,
    /// There is nothing to set here, or it could not be read.
    Absent,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about, such as `eth0 MTU`.
    pub about: String,
    /// What it asks for.
    pub level: Level,
    /// What there is.
    pub current: String,
    /// What is wanted, where something is.
    pub wanted: Option<String>,
    /// Why.
    pub reason: String,
    /// The command that does it, for a root shell.
    pub command: Option<String>,
    /// The writes that do it while the machine runs. Empty: it cannot be done that way.
    #[serde(skip)]
    writes: Vec<Write>,
}

/// One write to a file of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    /// Below the root, without a slash at the beginning.
    path: String,
    /// What it says now.
    old: String,
    /// What it shall say.
    new: String,
}

/// What the machine is, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Release of the running kernel.
    pub kernel: String,
    /// Processors that are online.
    pub cpus: usize,
    /// Processor cores they are threads of.
    pub cores: usize,
    /// NUMA nodes that have processors.
    pub nodes: usize,
    /// Whether it runs on a hypervisor.
    pub is_virtual: bool,
    /// Whether `--apply` can do something here.
    pub can_apply: bool,
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// The machine.
    pub machine: Machine,
    /// What was looked at, what asks for most first.
    pub findings: Vec<Finding>,
}

impl Finding {
    fn new(about: impl Into<String>, level: Level, current: impl Into<String>) -> Finding {
        Finding {
            about: about.into(),
            level,
            current: current.into(),
            wanted: None,
            reason: String::new(),
            command: None,
            writes: Vec::new(),
        }
    }

    fn wanted(mut self, wanted: impl Into<String>) -> Finding {
        self.wanted = Some(wanted.into());
        self
    }

    fn because(mut self, reason: impl Into<String>) -> Finding {
        self.reason = reason.into();
        self
    }

    fn command(mut self, command: impl Into<String>) -> Finding {
        self.command = Some(command.into());
        self
    }

    /// The writes, and with them the command where none is given yet.
    fn writes(mut self, writes: Vec<Write>) -> Finding {
        if self.command.is_none() && !writes.is_empty() {
            let lines: Vec<String> = writes.iter().map(|write| write.command(&write.new)).collect();
            self.command = Some(lines.join("\n"));
        }
        self.writes = writes;
        self
    }

    /// Whether [`Survey::apply`] does it.
    pub fn is_applicable(&self) -> bool {
        self.level == Level::Change && !self.writes.is_empty()
    }
}

impl Write {
    /// The command that writes `value`.
    fn command(&self, value: &str) -> String {
        match self.path.strip_prefix("proc/sys/") {
            Some(name) => format!("sysctl -w {}='{value}'", name.replace('/', ".")),
            None => format!("echo {value} > /{}", self.path),
        }
    }
}

impl Survey {
    /// Reads the machine whose `/proc` and `/sys` are below `root`: `/`, or a made-up one.
    pub fn of(root: &Path) -> Survey {
        let tree = Tree::new(root);
        let machine = Machine {
            kernel: tree.text("proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
            cpus: cpu::online(&tree).len(),
            cores: cpu::cores(&tree),
            nodes: cpu::nodes(&tree).len(),
            is_virtual: cpu::is_virtual(&tree),
            can_apply: false,
        };
        let mut findings = Vec::new();
        kernel::look(&tree, &mut findings);
        cpu::look(&tree, &machine, &mut findings);
        net::look(&tree, &machine, &mut findings);
        disk::look(&tree, &mut findings);
        findings.sort_by_key(|finding| finding.level);
        let can_apply = findings.iter().any(Finding::is_applicable);
        Survey { machine: Machine { can_apply, ..machine }, findings }
    }

    fn with(&self, level: Level) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.level == level)
    }
}

impl fmt::Display for Survey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(
            f,
            "Linux {}, {} on {}, {}{}",
            machine.kernel,
            counted(machine.cpus, "CPU"),
            counted(machine.cores, "core"),
            counted(machine.nodes, "NUMA node"),
            if machine.is_virtual { ", a virtual machine" } else { "" }
        )?;
        for (level, title) in [(Level::Change, "To change"), (Level::Consider, "To consider")] {
            if self.with(level).next().is_none() {
                continue;
            }
            writeln!(f, "\n{title}")?;
            for finding in self.with(level) {
                write!(f, "  {}: {}", finding.about, finding.current)?;
                if let Some(wanted) = &finding.wanted {
                    write!(f, ", wanted: {wanted}")?;
                }
                writeln!(f, "\n      {}", finding.reason)?;
                for line in finding.command.iter().flat_map(|command| command.lines()) {
                    writeln!(f, "    # {line}")?;
                }
            }
        }
        for (level, title) in [(Level::Good, "As it should be"), (Level::Absent, "Not here")] {
            if self.with(level).next().is_none() {
                continue;
            }
            writeln!(f, "\n{title}")?;
            for finding in self.with(level) {
                write!(f, "  {}: {}", finding.about, finding.current)?;
                if !finding.reason.is_empty() {
                    write!(f, "; {}", finding.reason)?;
                }
                writeln!(f)?;
            }
        }
        let open = self.findings.iter().filter(|finding| finding.is_applicable()).count();
        match (self.with(Level::Change).count(), open) {
            (0, _) => write!(f, "\nNothing has to change."),
            (all, open) => write!(
                f,
                "\n{all} to change, of which `penstock tune --apply` does {open} until the next boot."
            ),
        }
    }
}

/// Whether this process may write to the kernel's files.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
