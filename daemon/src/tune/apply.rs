//! Carrying out what a survey found.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use serde::Serialize;

use super::tree::Tree;
use super::{Finding, Survey};

/// One write that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// What it was for.
    pub about: String,
    /// The file.
    pub path: String,
    /// What it said.
    pub old: String,
    /// What it was to say.
    pub new: String,
    /// The command that puts it back.
    pub undo: String,
    /// Why it was refused; `None`: done.
    pub error: Option<String>,
}

impl Survey {
    /// Carries out the writes of every finding that [is applicable](Finding::is_applicable) in the
    /// machine below `root`, the one the survey was made of, and tells of each. One that is refused
    /// does not keep the others from being tried. No file is made.
    pub fn apply(&self, root: &Path) -> Vec<Applied> {
        let tree = Tree::new(root);
        let open = self.findings.iter().filter(|finding| finding.is_applicable());
        open.flat_map(|finding| finding.writes.iter().map(move |write| (finding, write)))
            .map(|(finding, write): (&Finding, _)| Applied {
                about: finding.about.clone(),
                path: format!("/{}", write.path),
                old: write.old.clone(),
                new: write.new.clone(),
                undo: write.command(&write.old),
                error: put(&tree.path(&write.path), &write.new).err().map(|e| e.to_string()),
            })
            .collect()
    }
}

/// The kernel takes a value from one write.
fn put(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(value.as_bytes())
}
