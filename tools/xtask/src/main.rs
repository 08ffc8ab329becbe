//! `cargo xtask`: what a developer and the continuous integration run.
//!
//! ```text
//!  check   format, lints, docs, dependency direction, house rules      (check/)
//!  test    installs what is missing, then check, tests, fuzz smoke,
//!          release build and every lab scenario                        (test.rs)
//!  fuzz    the fuzz smoke alone, or random inputs for a time           (fuzz.rs)
//!  lab     one scenario in a guest with a stock Linux kernel           (lab/)
//!  bench   one comparison: the target with a bare loop, this tree with
//!          a revision before, fio's engines with each other            (bench.rs)
//! ```
//!
//! Every run ends with a table of its steps and a line `N passed, N failed, N skipped`. A step that
//! could not run says why and counts as skipped, never as passed.
#![forbid(unsafe_code)]

mod bench;
mod check;
mod exec;
mod fuzz;
mod install;
mod lab;
mod report;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Developer tasks of Penstock")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check format, lints, docs, dependency direction and house rules.
    Check,
    /// Install what is missing, then run every check, test and lab scenario.
    Test {
        /// Leave the guest lab out.
        #[arg(long)]
        no_lab: bool,
    },
    /// Run fuzz targets: the same inputs each time, or random ones for a while.
    Fuzz(fuzz::Args),
    /// Run scenarios of the guest lab.
    Lab(lab::Args),
    /// Run a comparison.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Check => check::task(),
        Task::Test { no_lab } => test::task(no_lab),
        Task::Fuzz(args) => fuzz::task(&args),
        Task::Lab(args) => lab::task(&args),
        Task::Bench(args) => bench::task(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
