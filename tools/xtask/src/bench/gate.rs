//! `cargo xtask bench gate`: has the working tree become slower than a base revision?
//!
//! ```text
//!  base revision ─┐ git archive         ┌─ base ─┐  counts: callgrind, base - tree - base ─► table
//!                 ├─► gate/source ─► cargo       │
//!  working tree ──┘ git ls-files        └─ tree ─┘  ratios: targets in turns, one client ──► table
//! ```
//!
//! Both are built from the same folder into the same build output, one after the other, so that
//! they differ in what their sources differ in and in nothing else.
//!
//! *Counts*: the workloads are those of `tests/gate` as they are in the working tree, for both; where
//! they do not build against the base each has its own. Instructions are counted by callgrind, which
//! says the same whatever else the machine does. What it does vary by is measured: the base runs
//! twice. A loss counts from there on, and from [`LEAST_PERCENT`] on.
//!
//! *Ratios*: what a count does not see, such as cache misses, system calls and waiting. `penstock` of
//! both revisions serves the client of the working tree (`bench-gate`), which measures its noise in
//! the same turns.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};

use crate::{exec, install, workspace};

/// Losses below this are let pass even if the count never varies: moving a function about costs as
/// much.
const LEAST_PERCENT: f64 = 0.5;

/// Requests of the two runs whose difference is taken.
const COUNTS: [u64; 2] = [128, 640];

/// What the workloads call all that is to be counted.
const COUNTED: &str = "*gate*counted*";

/// What the target and its client are built from, together: one set of features.
const TARGET: [&str; 2] = ["penstock", "it"];

/// The workloads, in the checkout.
const WORKLOADS: &str = "tests/gate/src";

#[derive(Parser)]
#[command(no_binary_name = true, name = "cargo xtask bench gate")]
struct Args {
    /// Revision to compare with [default: where this branch left main; on main the commit before,
    /// or the last commit if something is not committed]
    #[arg(long, value_name = "REV")]
    base: Option<String>,
    /// What is compared.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "counts,ratios")]
    parts: Vec<Part>,
    /// Only workloads and points whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Losses of instructions from this on count, in percent, even if the noise is lower.
    #[arg(long, value_name = "PERCENT", default_value_t = LEAST_PERCENT)]
    at_least: f64,
    /// Rounds of turns for each point.
    #[arg(long, value_name = "N", default_value_t = 30)]
    rounds: usize,
    /// Write the tables as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Instructions of a request.
    Counts,
    /// IOPS of the target, base and tree in turns.
    Ratios,
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
    let has = |part| args.parts.contains(&part);
    install::debian_packages(&[("git", "git"), ("tar", "tar")])?;
    let root = workspace::root()?;
    let place = Place::new(workspace::target_dir()?.join("gate"))?;
    let base = base(&root, args.base.as_deref())?;
    println!("base: {}", git(&root, &["log", "-1", "--format=%h %s", &base])?.trim());
    let (base, tree) = place.programs(&root, &base, &args.parts)?;
    let mut tables = serde_json::Map::new();
    let (mut is_good, mut nothing) = (true, true);
    if let (Some(base), Some(tree)) = (&base.gate, &tree.gate) {
        install::debian_packages(&[("valgrind", "valgrind")])?;
        if let Some((rows, lost)) = counts(&args, base, tree)? {
            (is_good, nothing) = (lost == 0, false);
            tables.insert("counts".to_owned(), rows);
        }
    }
    if has(Part::Ratios) {
        let client = tree.client.as_deref().context("the client was not built")?;
        let [base, tree] = [&base, &tree].map(|side| side.penstock.as_deref());
        let (base, tree) = base.zip(tree).context("the targets were not built")?;
        let json = place.folder.join("ratios.json");
        is_good &= ratios(&args, client, (base, tree), &json)?;
        // Not there: no point has such a name.
        if let Ok(text) = fs::read(&json) {
            nothing = false;
            tables.insert("ratios".to_owned(), serde_json::from_slice(&text)?);
        }
    }
    ensure!(!nothing, "no workload and no point is left to compare");
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_string_pretty(&tables)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(is_good)
}

/// Counts instructions, prints the table, and says how many workloads are lost. `None`: there is none
/// to compare.
fn counts(args: &Args, base: &Path, tree: &Path) -> Result<Option<(serde_json::Value, usize)>> {
    let known = |program: &Path| -> Result<BTreeSet<String>> {
        Ok(exec::output(&mut Command::new(program))?.lines().map(str::to_owned).collect())
    };
    let (of_base, of_tree) = (known(base)?, known(tree)?);
    for name in of_tree.symmetric_difference(&of_base) {
        println!("{name}: not in both, left out");
    }
    let names = exec::output(&mut Command::new(tree))?;
    let names: Vec<&str> =
        names.lines().filter(|name| of_base.contains(*name) && name.contains(&args.only)).collect();
    if names.is_empty() {
        println!("no workload's name contains {:?}: no counts", args.only);
        return Ok(None);
    }
    let rows = measure(&names, base, tree)?;
    let lost = print(&names, &rows, args.at_least);
    let rows = names.iter().zip(&rows).map(|(name, row)| {
        serde_json::json!({ "workload": name, "base": row.base_mean(), "tree": row.tree,
            "loss_percent": row.loss(), "noise_percent": row.noise() })
    });
    Ok(Some((rows.collect(), lost)))
}

/// Lets the client compare the two targets; `false`: one point at least is lost.
fn ratios(args: &Args, client: &Path, targets: (&Path, &Path), json: &Path) -> Result<bool> {
    if json.exists() {
        fs::remove_file(json)?;
    }
    let mut command = Command::new(client);
    command.arg("--base").arg(targets.0).arg("--tree").arg(targets.1);
    command.args(["--only", &args.only, "--rounds", &args.rounds.to_string()]);
    command.arg("--json").arg(json);
    let text = exec::shown(&command);
    let status = command.status().with_context(|| format!("cannot run `{text}`"))?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("`{text}` ended with {status}"),
    }
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

/// A revision's programs; those that are wanted.
#[derive(Default)]
struct Side {
    /// What is counted.
    gate: Option<PathBuf>,
    /// The target.
    penstock: Option<PathBuf>,
    /// The client of both targets.
    client: Option<PathBuf>,
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

    /// What the parts need of the base and of the tree.
    fn programs(&self, root: &Path, commit: &str, parts: &[Part]) -> Result<(Side, Side)> {
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

        let mut base = Side::default();
        if parts.contains(&Part::Counts) {
            base.gate = Some(self.base_gate(root, commit, &unpacked)?);
        }
        if parts.contains(&Part::Ratios) {
            base.penstock = Some(self.base_penstock(commit, &unpacked)?);
        }
        let tree = self.tree(root, parts)?;
        Ok((base, tree))
    }

    /// A program of the base that is kept, by what it was made from.
    fn kept(&self, commit: &str, name: &str) -> PathBuf {
        self.folder.join(format!("base-{}-{name}", &commit[..12]))
    }

    /// What counts for the base, with the tree's workloads if they build there.
    fn base_gate(&self, root: &Path, commit: &str, unpacked: &Path) -> Result<PathBuf> {
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
        let program = |stamp: &str| self.kept(commit, stamp);
        for stamp in [&ours, &own] {
            if program(stamp).exists() {
                return Ok(program(stamp));
            }
        }
        let list = below(unpacked)?;
        mirror(unpacked, &list, &self.source())?;
        let workloads = self.source().join(WORKLOADS);
        mirror(&root.join(WORKLOADS), &below(&root.join(WORKLOADS))?, &workloads)?;
        match self.build(&["gate"], &[("gate", &program(&ours))]) {
            Ok(()) => Ok(program(&ours)),
            Err(error) => {
                println!(
                    "the tree's workloads do not build there ({error:#}): the base has its own"
                );
                mirror(unpacked, &list, &self.source())?;
                self.build(&["gate"], &[("gate", &program(&own))])?;
                Ok(program(&own))
            }
        }
    }

    fn base_penstock(&self, commit: &str, unpacked: &Path) -> Result<PathBuf> {
        let compiler = exec::output(Command::new("rustc").arg("-vV"))?;
        let stamp = stamp(&[compiler.as_bytes(), b"penstock"]);
        let program = self.kept(commit, &format!("penstock-{stamp}"));
        if !program.exists() {
            mirror(unpacked, &below(unpacked)?, &self.source())?;
            self.build(&TARGET, &[("penstock", &program)])?;
        }
        Ok(program)
    }

    /// The programs of the working tree, whatever of it is committed.
    fn tree(&self, root: &Path, parts: &[Part]) -> Result<Side> {
        let list = git(root, &["ls-files", "-z", "--cached", "--others", "--exclude-standard"])?;
        let list: BTreeSet<PathBuf> = list
            .split('\0')
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
            // What is deleted and not yet committed is still listed.
            .filter(|path| root.join(path).is_file())
            .collect();
        mirror(root, &list, &self.source())?;
        let at = |name: &str| self.folder.join(name);
        let mut tree = Side::default();
        if parts.contains(&Part::Counts) {
            self.build(&["gate"], &[("gate", &at("tree"))])?;
            tree.gate = Some(at("tree"));
        }
        if parts.contains(&Part::Ratios) {
            let (penstock, client) = (at("tree-penstock"), at("tree-client"));
            self.build(&TARGET, &[("penstock", &penstock), ("bench-gate", &client)])?;
            tree.penstock = Some(penstock);
            tree.client = Some(client);
        }
        Ok(tree)
    }

    /// Builds packages from the sources put together, and keeps programs of them.
    fn build(&self, packages: &[&str], programs: &[(&str, &Path)]) -> Result<()> {
        let output = self.folder.join("build");
        let mut cargo = workspace::cargo();
        cargo.current_dir(self.source()).env("CARGO_TARGET_DIR", &output);
        cargo.args(["build", "--release", "--locked"]);
        exec::run(cargo.args(packages.iter().flat_map(|package| ["-p", package])))?;
        for (name, kept) in programs {
            fs::copy(output.join("release").join(name), kept)
                .with_context(|| format!("keeping {}", kept.display()))?;
        }
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
