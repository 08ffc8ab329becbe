//! `cargo xtask bench NAME`: comparisons of our programs with a yardstick on the same machine.

use anyhow::Result;
use clap::ValueEnum;

use crate::{exec, workspace};

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
enum Comparison {
    /// The target with a null volume against a bare request/response loop.
    Target,
}

pub(crate) fn task(args: &Args) -> Result<bool> {
    let binary = match args.name {
        Comparison::Target => "bench-target",
    };
    // The binary under test is started by the comparison.
    let mut build = workspace::cargo();
    exec::run(build.args(["build", "--release", "-p", "penstock"]))?;
    let mut run = workspace::cargo();
    run.args(["run", "--release", "-p", "it", "--bin", binary, "--"]).args(&args.rest);
    exec::run(&mut run)?;
    Ok(true)
}
