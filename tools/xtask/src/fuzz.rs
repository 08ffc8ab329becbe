//! A short run of every fuzz target: it finds what breaks at once, not what takes a night.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::report::{Outcome, Report};
use crate::{exec, install, workspace};

/// Time of all targets together.
const BUDGET_S: usize = 60;
/// Memory a target may hold before the run counts as failed; the sanitizer itself takes much of it.
const RSS_LIMIT_MIB: usize = 2048;

pub(crate) fn task() -> Result<bool> {
    let mut report = Report::default();
    report.step("fuzz smoke", smoke);
    Ok(report.finish())
}

pub(crate) fn smoke() -> Result<Outcome> {
    let folder = workspace::root()?.join("fuzz");
    if !folder.join("Cargo.toml").exists() {
        return Ok(Outcome::Skipped("there is no folder fuzz/".to_owned()));
    }
    if !exec::succeeds(Command::new("cargo").args(["+nightly", "--version"])) {
        let why =
            "no nightly toolchain, which the sanitizers need (`rustup toolchain install nightly`)";
        return Ok(Outcome::Skipped(why.to_owned()));
    }
    if let Err(error) = install::cargo_tool("fuzz", "cargo-fuzz") {
        return Ok(Outcome::Skipped(format!("no cargo-fuzz: {error:#}")));
    }
    let list = exec::output(fuzz(&folder).arg("list"))?;
    let targets: Vec<&str> = list.split_whitespace().collect();
    if targets.is_empty() {
        bail!("fuzz/ has no targets");
    }
    exec::run(fuzz(&folder).arg("build"))?;
    let seconds = (BUDGET_S / targets.len()).max(1);
    let logs = workspace::target_dir()?.join("fuzz");
    std::fs::create_dir_all(&logs)?;
    for target in &targets {
        let log = logs.join(format!("{target}.log"));
        let _ = std::fs::remove_file(&log);
        let mut run = fuzz(&folder);
        run.args(["run", target, "--"]);
        run.args([format!("-max_total_time={seconds}"), format!("-rss_limit_mb={RSS_LIMIT_MIB}")]);
        exec::run_logged(&mut run, &log)?;
        // The fuzzer's own account; without it the target did not run.
        let text = std::fs::read_to_string(&log)?;
        let done = text.lines().find(|line| line.starts_with("Done "));
        println!("{target}: {}", done.with_context(|| format!("no result in {}", log.display()))?);
    }
    Ok(Outcome::Passed)
}

fn fuzz(folder: &Path) -> Command {
    let mut command = Command::new("cargo");
    // The cargo that runs us names its own toolchain in the environment.
    for name in ["CARGO", "RUSTUP_TOOLCHAIN", "CARGO_TARGET_DIR"] {
        command.env_remove(name);
    }
    command.args(["+nightly", "fuzz"]).current_dir(folder);
    command
}
