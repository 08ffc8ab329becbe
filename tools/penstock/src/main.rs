//! `penstock`: the one user-facing binary.
//!
//! ```text
//!  cli (clap) ──► up, serve (target, emulate), discover, bench, tune ──► daemon (library)
//!            └──► manage (status, volume, ...) ──► a running target's management API
//!                        │
//!                        └─► text for people, JSON for programs, one line for errors
//! ```
//!
//! It parses, prints and waits for signals; all work is in the `daemon` library.

#![forbid(unsafe_code)]

mod bench;
mod cli;
mod discover;
mod manage;
mod serve;
mod signals;
mod tune;
mod up;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};

/// Failed.
const FAILED: u8 = 1;
/// Wrong use: flags or configuration.
const WRONG_USE: u8 = 2;
/// Data was not what had been written.
const WRONG_DATA: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(problem) = start_log(&cli) {
        eprintln!("penstock: {problem}");
        return ExitCode::from(WRONG_USE);
    }
    let result = match cli.command {
        Command::Up(args) => up::run(&args),
        Command::Target(args) => serve::target(&args),
        Command::Emulate(args) => serve::emulate(&args),
        Command::Status(args) => manage::status(&args),
        Command::Volume(args) => manage::volume(&args),
        Command::Device(args) => manage::device(&args),
        Command::Subsystem(args) => manage::subsystem(&args),
        Command::Ana(args) => manage::ana(&args),
        Command::Host(args) => manage::host(&args),
        Command::Referral(args) => manage::referral(&args),
        Command::Key(args) => manage::key(&args),
        Command::Discover(args) => discover::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Tune(args) => tune::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("penstock: {}", one_line(&error));
            let wrong_use = error.downcast_ref::<daemon::ConfigError>().is_some();
            ExitCode::from(if wrong_use { WRONG_USE } else { FAILED })
        }
    }
}

/// The error with its causes, in one line.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}

fn start_log(cli: &Cli) -> Result<(), String> {
    let default = match cli.command {
        Command::Target(_) | Command::Emulate(_) => "info",
        _ => "warn",
    };
    let text = match &cli.log {
        Some(text) => text.clone(),
        None => std::env::var("RUST_LOG").unwrap_or_else(|_| default.to_owned()),
    };
    let filter = EnvFilter::try_new(&text).map_err(|error| {
        format!(
            "--log {text:?}: {error}; allowed: error, warn, info, debug, trace, or a filter such \
             as info,nvmf_target=debug"
        )
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}
