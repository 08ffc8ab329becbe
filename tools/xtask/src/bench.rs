//! `cargo xtask bench NAME`: comparisons of our programs with a yardstick on the same machine.

use std::process::Command;

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
pub(crate) enum Comparison {
    /// The target with a null volume against a bare request/response loop.
    Target,
}

pub(crate) fn task(args: &Args) -> Result<bool> {
    run(args.name, &args.rest)?;
    Ok(true)
}

/// Builds the binary under test and the programs that compare it, together: one set of features.
pub(crate) fn build() -> Result<()> {
    let mut build = workspace::cargo();
    exec::run(build.args(["build", "--release", "-p", "penstock", "-p", "it"]))
}

/// Builds both sides and compares them; an error when a goal is missed.
pub(crate) fn run(name: Comparison, rest: &[String]) -> Result<()> {
    let binary = match name {
        Comparison::Target => "bench-target",
    };
    build()?;
    exec::run(Command::new(workspace::target_dir()?.join("release").join(binary)).args(rest))
}
