//! `cargo xtask bench gate`: has the working tree become slower than a base revision?
//!
//! ```text
//!  base revision ─┐ git archive         ┌─ base program ─┐  callgrind, base - tree - base
//!                 ├─► gate/source ─► cargo               ├─► instructions of a request ─► table
//!  working tree ──┘ git ls-files        └─ tree program ─┘
//! ```
//!
//! Both are built from the same folder into the same build output, one after the other, so that
//! they differ in what their sources differ in and in nothing else. The workloads are those of
//! `tests/gate` as they are in the working tree, for both; where they do not build against the base
//! each has its own.
//!
//! Instructions are counted by callgrind, which says the same whatever else the machine does. What
//! it does vary by is measured: the base runs twice. A loss counts from there on, and from
//! [`LEAST_PERCENT`] on.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;

use crate::{exec, install, workspace};

/// Losses below this are let pass even if the count never varies: moving a function about costs as
/// much.
const LEAST_PERCENT: f64 = 0.5;

/// Requests of the two runs whose difference is taken.
const COUNTS: [u64; 2] = [128, 640];

/// What the workloads call all that is to be counted.
const COUNTED: &str = "*gate*counted*";

/// The workloads, in the checkout.
const WORKLOADS: &str = "tests/gate/src";

#[derive(Parser)]
#[command(no_binary_name = true, name = "cargo xtask bench gate")]
struct Args {
    /// Revision to compare with [default: where this branch left main; on main the commit before,
    /// or the last commit if something is not committed]
    #[arg(long, value_name = "REV")]
    base: Option<String>,
    /// Only workloads whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Losses from this on count, in percent, even if the noise is lower.
    #[arg(long, value_name = "PERCENT", default_value_t = LEAST_PERCENT)]
    at_least: f64,
    /// Write the table as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Counts of a workload, in instructions per request.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    base: f64,
    base_again: f64,
    tree: f64,
}

impl Row {
    fn base_mean(&self) -> f64 {
        (self.base + self.base_again) / 2.0
    }

    /// Of the base against itself, in percent.
    fn noise(&self) -> f64 {
        (self.base - self.base_again).abs() / self.base_mean() * 100.0
    }

    /// Positive: the tree takes more.
    fn loss(&self) -> f64 {
        (self.tree / self.base_mean() - 1.0) * 100.0
    }

    fn is_lost(&self, least: f64) -> bool {
        self.loss() > self.noise().max(least)
    }
}

/// Compares; `false`: something takes longer than it did.
pub(super) fn task(rest: &[String]) -> Result<bool> {
    let args = Args::try_parse_from(rest).unwrap_or_else(|error| error.exit());
    install::debian_packages(&[("valgrind", "valgrind"), ("git", "git"), ("tar", "tar")])?;
    let root = workspace::root()?;
    let place = Place::new(workspace::target_dir()?.join("gate"))?;
    let base = base(&root, args.base.as_deref())?;
    println!("base: {}", git(&root, &["log", "-1", "--format=%h %s", &base])?.trim());
    let base = place.base(&root, &base)?;
    let tree = place.tree(&root)?;

    let known = |program: &Path| -> Result<BTreeSet<String>> {
        Ok(exec::output(&mut Command::new(program))?.lines().map(str::to_owned).collect())
    };
    let (of_base, of_tree) = (known(&base)?, known(&tree)?);
    for name in of_tree.symmetric_difference(&of_base) {
        println!("{name}: not in both, left out");
    }
    let mut names = exec::output(&mut Command::new(&tree))?;
    names.retain(|c| c != '\r');
    let names: Vec<&str> =
        names.lines().filter(|name| of_base.contains(*name) && name.contains(&args.only)).collect();
    ensure!(!names.is_empty(), "no workload is left to compare");
    let rows = measure(&names, &base, &tree)?;
    let lost = print(&names, &rows, args.at_least);
    if let Some(path) = &args.json {
        let rows: Vec<_> = names
            .iter()
            .zip(&rows)
            .map(|(name, row)| {
                serde_json::json!({ "workload": name, "base": row.base_mean(), "tree": row.tree,
                    "loss_percent": row.loss(), "noise_percent": row.noise() })
            })
            .collect();
        fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(lost == 0)
}

/// Prints the table; says how many are lost.
fn print(names: &[&str], rows: &[Row], least: f64) -> usize {
    println!(
        "{:<24} {:>12} {:>12} {:>9} {:>8}   instructions of a request",
        "workload", "base", "tree", "change", "noise"
    );
    let mut lost = 0;
    for (name, row) in names.iter().zip(rows) {
        let is_lost = row.is_lost(least);
        lost += usize::from(is_lost);
        println!(
            "{name:<24} {:>12.0} {:>12.0} {:>+8.2}% {:>7.2}%{}",
            row.base_mean(),
            row.tree,
            row.loss(),
            row.noise(),
            if is_lost { "   LOST" } else { "" }
        );
    }
    println!("{} workloads, {lost} lost more than the noise and {least} %", rows.len());
    lost
}

/// The revision to compare with, as a full commit ID.
fn base(root: &Path, asked: Option<&str>) -> Result<String> {
    let commit = |rev: &str| {
        git(root, &["rev-parse", "--verify", "--quiet", &format!("{rev}^{{commit}}")])
            .map(|text| text.trim().to_owned())
    };
    if let Some(rev) = asked {
        return commit(rev).with_context(|| format!("--base {rev}: no such revision"));
    }
    let head = commit("HEAD").context("no commit to compare with")?;
    let main = ["main", "origin/main", "master", "origin/master"]
        .into_iter()
        .find_map(|name| git(root, &["merge-base", name, "HEAD"]).ok())
        .map_or_else(|| head.clone(), |text| text.trim().to_owned());
    if main != head {
        return Ok(main);
    }
    let is_clean = git(root, &["status", "--porcelain"])?.trim().is_empty();
    if is_clean {
        return commit("HEAD~1").context("HEAD is the first commit: give --base");
    }
    Ok(head)
}

fn git(root: &Path, args: &[&str]) -> Result<String> {
    exec::output(Command::new("git").arg("-C").arg(root).args(args))
}

/// Where sources are put together and built.
struct Place {
    folder: PathBuf,
}

impl Place {
    fn new(folder: PathBuf) -> Result<Place> {
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Place { folder })
    }

    fn source(&self) -> PathBuf {
        self.folder.join("source")
    }

    /// The program of the base, with the tree's workloads if they build there.
    fn base(&self, root: &Path, commit: &str) -> Result<PathBuf> {
        let unpacked = self.folder.join("base");
        if unpacked.exists() {
            fs::remove_dir_all(&unpacked)?;
        }
        fs::create_dir_all(&unpacked)?;
        let archive = self.folder.join("base.tar");
        let output = format!("--output={}", archive.display());
        git(root, &["archive", "--format=tar", &output, commit])?;
        exec::output(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&unpacked))?;
        fs::remove_file(&archive)?;
        ensure!(
            unpacked.join(WORKLOADS).is_dir(),
            "the base {commit} has no {WORKLOADS}: it is older than the gate"
        );

        let compiler = exec::output(Command::new("rustc").arg("-vV"))?;
        let own = stamp(&[compiler.as_bytes(), b"own"]);
        let mut parts = vec![compiler.into_bytes()];
        for file in below(&root.join(WORKLOADS))? {
            parts.push(file.as_os_str().as_encoded_bytes().to_vec());
            parts.push(fs::read(root.join(WORKLOADS).join(&file))?);
        }
        let ours = stamp(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let program = |stamp: &str| self.folder.join(format!("base-{}-{stamp}", &commit[..12]));
        for stamp in [&ours, &own] {
            if program(stamp).exists() {
                return Ok(program(stamp));
            }
        }
        let list = below(&unpacked)?;
        mirror(&unpacked, &list, &self.source())?;
        let workloads = self.source().join(WORKLOADS);
        mirror(&root.join(WORKLOADS), &below(&root.join(WORKLOADS))?, &workloads)?;
        match self.build(&program(&ours)) {
            Ok(()) => Ok(program(&ours)),
            Err(error) => {
                println!(
                    "the tree's workloads do not build there ({error:#}): the base has its own"
                );
                mirror(&unpacked, &list, &self.source())?;
                self.build(&program(&own))?;
                Ok(program(&own))
            }
        }
    }

    /// The program of the working tree, whatever of it is committed.
    fn tree(&self, root: &Path) -> Result<PathBuf> {
        let list = git(root, &["ls-files", "-z", "--cached", "--others", "--exclude-standard"])?;
        let list: BTreeSet<PathBuf> = list
            .split('\0')
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
            // What is deleted and not yet committed is still listed.
            .filter(|path| root.join(path).is_file())
            .collect();
        mirror(root, &list, &self.source())?;
        let program = self.folder.join("tree");
        self.build(&program)?;
        Ok(program)
    }

    fn build(&self, program: &Path) -> Result<()> {
        let output = self.folder.join("build");
        let mut cargo = workspace::cargo();
        cargo.current_dir(self.source()).env("CARGO_TARGET_DIR", &output);
        exec::run(cargo.args(["build", "--release", "--locked", "-p", "gate"]))?;
        fs::copy(output.join("release/gate"), program)
            .with_context(|| format!("keeping {}", program.display()))?;
        Ok(())
    }
}

/// A short name for contents. The same as long as the compiler of this program is.
fn stamp(parts: &[&[u8]]) -> String {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Every file below a folder, relative to it.
fn below(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(at) = open.pop() {
        let path = folder.join(&at);
        let entries = fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = at.join(entry.file_name());
            match entry.file_type()?.is_dir() {
                true => open.push(name),
                false => drop(files.insert(name)),
            }
        }
    }
    Ok(files)
}

/// Makes `to` hold the files of the list, and no others. What is the same already is not touched, so
/// that cargo sees what differs.
fn mirror(from: &Path, list: &BTreeSet<PathBuf>, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for old in below(to)?.difference(list) {
        fs::remove_file(to.join(old))?;
    }
    for path in list {
        let (from, to) = (from.join(path), to.join(path));
        let bytes = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
        if fs::read(&to).is_ok_and(|old| old == bytes) {
            continue;
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&to, bytes).with_context(|| format!("writing {}", to.display()))?;
    }
    Ok(())
}

/// Counts all workloads, as many at a time as there are processors: that changes no count.
fn measure(names: &[&str], base: &Path, tree: &Path) -> Result<Vec<Row>> {
    let next = AtomicUsize::new(0);
    let rows: Mutex<Vec<Option<Result<Row>>>> = Mutex::new(names.iter().map(|_| None).collect());
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..threads.min(names.len()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(name) = names.get(at) else { return };
                    let row = row(name, base, tree);
                    if let Ok(mut rows) = rows.lock() {
                        rows[at] = Some(row);
                    }
                }
            });
        }
    });
    let rows = rows.into_inner().ok().context("a thread that counts panicked")?;
    rows.into_iter().map(|row| row.context("a workload was not counted")?).collect()
}

fn row(name: &str, base: &Path, tree: &Path) -> Result<Row> {
    Ok(Row {
        base: per_request(base, name)?,
        tree: per_request(tree, name)?,
        base_again: per_request(base, name)?,
    })
}

fn per_request(program: &Path, name: &str) -> Result<f64> {
    let [few, many] = COUNTS;
    let (less, more) = (instructions(program, name, few)?, instructions(program, name, many)?);
    ensure!(more > less, "{name}: {many} requests took no more than {few}");
    Ok((more - less) as f64 / (many - few) as f64)
}

fn instructions(program: &Path, name: &str, count: u64) -> Result<u64> {
    let valgrind = install::program("valgrind").context("valgrind is missing")?;
    let mut command = Command::new(valgrind);
    // Nothing of the environment, whose length moves the stack.
    command.env_clear().env("PATH", "/usr/bin:/bin");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(format!("--toggle-collect={COUNTED}"));
    command.arg(program).args([OsStr::new(name), OsStr::new(&count.to_string())]);
    let output = command.output().with_context(|| format!("running {}", exec::shown(&command)))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("`{}` ended with {}:\n{text}", exec::shown(&command), output.status);
    }
    collected(&text).with_context(|| format!("no count in what valgrind wrote:\n{text}"))
}

/// The count in `==123== Collected : 4567`.
fn collected(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.split_once("Collected :"))?;
    line.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_callgrind_writes() {
        let text = "==7== Events    : Ir\n==7== Collected : 123456\n==7== \n";
        assert_eq!(collected(text), Some(123_456));
        assert_eq!(collected("==7== Collected : none"), None);
        assert_eq!(collected(""), None);
    }

    #[test]
    fn a_loss_counts_above_the_noise_and_above_the_least() {
        let row = |base, base_again, tree| Row { base, base_again, tree };
        assert!(!row(1000.0, 1000.0, 1004.0).is_lost(0.5));
        assert!(row(1000.0, 1000.0, 1006.0).is_lost(0.5));
        // The base differs from itself by 2 %.
        assert!(!row(990.0, 1010.0, 1015.0).is_lost(0.5));
        assert!(row(990.0, 1010.0, 1025.0).is_lost(0.5));
        // A gain is none.
        assert!(!row(1000.0, 1000.0, 900.0).is_lost(0.5));
    }

    #[test]
    fn a_mirror_has_what_is_listed_and_leaves_alone_what_is_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        fs::create_dir_all(from.join("a")).unwrap();
        fs::write(from.join("a/same"), "1").unwrap();
        fs::write(from.join("changes"), "1").unwrap();
        fs::write(from.join("goes"), "1").unwrap();
        fs::write(from.join("not-listed"), "1").unwrap();
        let list = |names: &[&str]| names.iter().map(PathBuf::from).collect::<BTreeSet<_>>();
        mirror(&from, &list(&["a/same", "changes", "goes"]), &to).unwrap();
        let modified = |name: &str| fs::metadata(to.join(name)).unwrap().modified().unwrap();
        let before = modified("a/same");
        fs::write(from.join("changes"), "2").unwrap();
        mirror(&from, &list(&["a/same", "changes"]), &to).unwrap();
        assert_eq!(below(&to).unwrap(), list(&["a/same", "changes"]));
        assert_eq!(fs::read_to_string(to.join("changes")).unwrap(), "2");
        assert_eq!(modified("a/same"), before);
    }

    #[test]
    fn the_base_is_where_the_branch_left_main() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        let run = |args: &[&str]| {
            let who = ["-c", "user.name=a", "-c", "user.email=a@example.com"];
            git(root, &[&who[..], args].concat()).unwrap().trim().to_owned()
        };
        run(&["init", "-q", "-b", "main"]);
        let commit = |text: &str| {
            fs::write(root.join("file"), text).unwrap();
            run(&["add", "file"]);
            run(&["commit", "-q", "-m", text]);
            run(&["rev-parse", "HEAD"])
        };
        let first = commit("one");
        assert!(base(root, None).is_err(), "nothing to compare with");
        let second = commit("two");
        assert_eq!(base(root, None).unwrap(), first, "on main: the commit before");
        fs::write(root.join("file"), "three").unwrap();
        assert_eq!(base(root, None).unwrap(), second, "on main, not committed: the last commit");
        run(&["checkout", "-q", "-b", "work"]);
        commit("three");
        commit("four");
        assert_eq!(base(root, None).unwrap(), second);
        assert_eq!(base(root, Some("HEAD~1")).unwrap(), run(&["rev-parse", "HEAD~1"]));
        let error = base(root, Some("nowhere")).unwrap_err();
        assert!(format!("{error:#}").contains("nowhere"));
    }
}
