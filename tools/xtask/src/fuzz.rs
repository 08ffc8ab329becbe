//! Runs of the fuzz targets: the smoke, which gives the same verdict for the same tree, and random
//! ones for as long as one likes.
//!
//! ```text
//!              seeds/TARGET.hex ─┐
//!   smoke      fixed seed, fixed number of runs, a corpus of the seeds alone
//!   --seconds  a random seed, all the time given, a corpus that is kept in fuzz/corpus/
//! ```

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::report::{Outcome, Report};
use crate::{exec, install, workspace};

/// Inputs that each target is given in the smoke: a few seconds of most.
const SMOKE_RUNS: u32 = 20_000;
/// Fewer where an input costs milliseconds: exponentiations of up to 8,192 bits, and cores that are
/// threads.
const SMOKE_RUNS_SLOW: &[(&str, u32)] = &[("dhchap", 4_000), ("nvme_device", 1_000)];
/// What picks them.
const SMOKE_SEED: u32 = 20_261_128;
/// Time of one target in the smoke, many times what it needs. A machine so slow that it is hit is
/// told of: the rest of the inputs was not tried.
const SMOKE_SECONDS_MAX: u32 = 120;
/// Memory a target may hold before the run counts as failed; the sanitizer itself takes much of it.
const RSS_LIMIT_MIB: usize = 2048;
/// Bytes of an input to show: a line of a seed file.
const SHOWN_BYTES_MAX: usize = 4096;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Try random inputs for this long per target, instead of the same ones each time.
    #[arg(long, value_name = "N")]
    seconds: Option<u32>,
    /// Only these targets.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

pub(crate) fn task(args: &Args) -> Result<bool> {
    let mut report = Report::default();
    let name = if args.seconds.is_some() { "fuzz" } else { "fuzz smoke" };
    report.step(name, || run(args));
    Ok(report.finish())
}

/// The smoke of all targets.
pub(crate) fn smoke() -> Result<Outcome> {
    run(&Args { seconds: None, targets: Vec::new() })
}

fn run(args: &Args) -> Result<Outcome> {
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
    let known: Vec<&str> = list.split_whitespace().collect();
    if let Some(unknown) = args.targets.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no fuzz target {unknown}; there are: {}", known.join(" "));
    }
    let is_meant = |name: &&str| args.targets.is_empty() || args.targets.iter().any(|t| t == name);
    let targets: Vec<&str> = known.into_iter().filter(is_meant).collect();
    if targets.is_empty() {
        bail!("fuzz/ has no targets");
    }
    // All are linked only where all may be meant.
    match &args.targets[..] {
        [one] => exec::run(fuzz(&folder).args(["build", one]))?,
        _ => exec::run(fuzz(&folder).arg("build"))?,
    }
    let mut failed = Vec::new();
    for target in targets {
        // A crash in one hides nothing that another finds.
        if let Err(error) = run_target(&folder, target, args.seconds) {
            println!("{target}: FAILED: {error:#}");
            failed.push(target);
        }
    }
    if failed.is_empty() {
        Ok(Outcome::Passed)
    } else {
        bail!("failed: {}; each one's input and the end of its log are above", failed.join(" "))
    }
}

fn run_target(folder: &Path, target: &str, seconds: Option<u32>) -> Result<()> {
    let work = workspace::target_dir()?.join("fuzz").join(target);
    match std::fs::remove_dir_all(&work) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let (log, artifacts) = (work.join("log"), work.join("artifacts"));
    std::fs::create_dir_all(&artifacts)?;
    let corpus =
        if seconds.is_some() { folder.join("corpus").join(target) } else { work.join("corpus") };
    unpack_seeds(&folder.join("seeds").join(format!("{target}.hex")), &corpus)?;
    let mut command = fuzz(folder);
    command.args(["run", target]).arg(&corpus).arg("--");
    command.arg(format!("-rss_limit_mb={RSS_LIMIT_MIB}"));
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.args(match seconds {
        Some(seconds) => vec![format!("-max_total_time={seconds}")],
        None => vec![
            format!("-seed={SMOKE_SEED}"),
            format!("-runs={}", smoke_runs(target)),
            format!("-max_total_time={SMOKE_SECONDS_MAX}"),
        ],
    });
    if let Err(error) = exec::run_logged(&mut command, &log) {
        print!("{}{}", said_of_failure(&std::fs::read_to_string(&log)?), inputs_found(&artifacts));
        return Err(error);
    }
    let text = std::fs::read_to_string(&log)?;
    // The fuzzer's own account; without it the target did not run.
    let done = text
        .lines()
        .find_map(runs_done)
        .with_context(|| format!("no result in {}:\n{}", log.display(), exec::tail(&log, 10)))?;
    let meant = smoke_runs(target);
    match seconds {
        None if done < meant => println!("{target}: {done} of {meant} inputs: out of time"),
        _ => println!("{target}: {done} inputs"),
    }
    Ok(())
}

/// Inputs that a target is given in the smoke.
fn smoke_runs(target: &str) -> u32 {
    let slow = SMOKE_RUNS_SLOW.iter().find(|(name, _)| *name == target);
    slow.map_or(SMOKE_RUNS, |(_, runs)| *runs)
}

/// The number in "Done 20000 runs in 3 second(s)".
fn runs_done(line: &str) -> Option<u32> {
    line.strip_prefix("Done ")?.split_once(' ')?.0.parse().ok()
}

/// What a log says first about a failure; the stacks after it are often longer than what is shown
/// of a log's end.
fn said_of_failure(log: &str) -> String {
    let is_of_it = |line: &&str| {
        ["panicked at ", "ERROR: ", "SUMMARY: "].iter().any(|word| line.contains(word))
    };
    let mut lines = log.lines();
    let mut text = String::new();
    while let Some(line) = lines.find(is_of_it) {
        let message = if line.contains("panicked at ") { lines.next() } else { None };
        for line in std::iter::once(line).chain(message) {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

/// Inputs that a target failed with, so that the log of a run suffices to repeat it.
fn inputs_found(artifacts: &Path) -> String {
    let mut text = String::new();
    for file in std::fs::read_dir(artifacts).into_iter().flatten().flatten() {
        let name = file.file_name();
        match std::fs::read(file.path()) {
            Ok(bytes) => {
                let shown = &bytes[..bytes.len().min(SHOWN_BYTES_MAX)];
                let _ = write!(text, "input {} ({} bytes): ", name.display(), bytes.len());
                text.extend(shown.iter().map(|byte| format!("{byte:02x}")));
                text.push_str(if shown.len() < bytes.len() { "..\n" } else { "\n" });
            }
            Err(error) => {
                let _ = writeln!(text, "input {}: {error}", name.display());
            }
        }
    }
    text
}

/// Writes the inputs of a seed file, if there is one, to files of a corpus.
fn unpack_seeds(seeds: &Path, corpus: &PathBuf) -> Result<()> {
    std::fs::create_dir_all(corpus)?;
    let text = match std::fs::read_to_string(seeds) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", seeds.display())),
    };
    let inputs = parse_seeds(&text).with_context(|| format!("in {}", seeds.display()))?;
    for (index, bytes) in inputs.iter().enumerate() {
        std::fs::write(corpus.join(format!("seed-{index:03}")), bytes)?;
    }
    Ok(())
}

/// One input per line, in hexadecimal digits; `#` begins a comment.
fn parse_seeds(text: &str) -> Result<Vec<Vec<u8>>> {
    let mut inputs = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let digits: Vec<u8> = line
            .split('#')
            .next()
            .unwrap_or("")
            .bytes()
            .filter(|b| !b.is_ascii_whitespace())
            .collect();
        if digits.is_empty() {
            continue;
        }
        let (pairs, rest) = digits.as_chunks::<2>();
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let bytes: Option<Vec<u8>> = pairs
            .iter()
            .map(|[high, low]| Some((digit(*high)? << 4 | digit(*low)?) as u8))
            .collect();
        match bytes {
            Some(bytes) if rest.is_empty() => inputs.push(bytes),
            _ => bail!("line {}: not pairs of hexadecimal digits", index + 1),
        }
    }
    Ok(inputs)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_lines_of_digits_with_comments() {
        let text = "# what it is\n00ff 10 # why\n\n  Ab\n";
        assert_eq!(parse_seeds(text).unwrap(), [vec![0, 0xff, 0x10], vec![0xab]]);
        for bad in ["0", "0g", "00\n1", "+1"] {
            assert!(parse_seeds(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_a_target_failed_with_can_be_a_seed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("crash-1"), [0, 0x7f, 0xff]).unwrap();
        let text = inputs_found(folder.path());
        assert_eq!(text, "input crash-1 (3 bytes): 007fff\n");
        let digits = text.trim_end().rsplit(' ').next().unwrap();
        assert_eq!(parse_seeds(digits).unwrap(), [[0, 0x7f, 0xff]]);
        assert_eq!(inputs_found(&folder.path().join("nothing")), "");
    }

    #[test]
    fn the_reason_is_found_in_a_log() {
        let log = "#3 NEW\n\nthread 'x' panicked at sqe.rs:34:47:\nonly active\nstack\n   0: a\n\
                   SUMMARY: libFuzzer: deadly signal\n";
        let text = "thread 'x' panicked at sqe.rs:34:47:\nonly active\n\
                    SUMMARY: libFuzzer: deadly signal\n";
        assert_eq!(said_of_failure(log), text);
        assert_eq!(said_of_failure("Done 3 runs\n"), "");
    }

    #[test]
    fn the_fuzzers_own_account_is_read() {
        assert_eq!(runs_done("Done 20000 runs in 3 second(s)"), Some(20_000));
        assert_eq!(runs_done("#20000\tDONE   cov: 3"), None);
    }

    #[test]
    fn seeds_of_the_repository_are_sound_and_belong_to_targets() {
        let folder = workspace::root().unwrap().join("fuzz");
        for entry in std::fs::read_dir(folder.join("seeds")).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!parse_seeds(&text).unwrap().is_empty(), "{}", path.display());
            let target = path.file_stem().unwrap().to_str().unwrap();
            assert!(folder.join(format!("fuzz_targets/{target}.rs")).exists(), "{target}");
        }
    }
}
