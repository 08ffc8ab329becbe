//! `penstock bench`: a load, and what it found.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use daemon::bench::{Access, Load, Report, Workload};
use daemon::size;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{BenchArgs, Rw};
use crate::signals::{self, Signals};
use crate::{FAILED, WRONG_DATA};

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let workload = workload(args)?;
    let load = load(args)?;
    let stop = Arc::new(AtomicBool::new(false));
    let report = signals::runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let mut run = tokio::task::spawn_blocking({
            let stop = stop.clone();
            let workload = workload.clone();
            move || {
                let bar = progress_bar();
                let report = load.run(&workload, &mut |passed| {
                    bar.set_position((passed * 1000.0) as u64);
                    !stop.load(Ordering::Relaxed)
                });
                bar.finish_and_clear();
                report
            }
        });
        loop {
            tokio::select! {
                report = &mut run => return report?,
                (_, code) = signals.next() => {
                    if stop.swap(true, Ordering::Relaxed) {
                        std::process::exit(i32::from(code));
                    }
                }
            }
        }
    })?;
    print(&report, args.json)?;
    Ok(verdict(&report))
}

fn verdict(report: &Report) -> ExitCode {
    if report.errors != 0 {
        ExitCode::from(FAILED)
    } else if !report.is_good() {
        ExitCode::from(WRONG_DATA)
    } else {
        ExitCode::SUCCESS
    }
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1000);
    if let Ok(style) = ProgressStyle::with_template("[{bar:40}] {percent} %") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn workload(args: &BenchArgs) -> anyhow::Result<Workload> {
    let bytes = |flag: &str, text: &str| {
        size::parse(text).map_err(|allowed| anyhow!("{flag} {text:?}: {allowed}"))
    };
    let (random, read_percent) = match args.rw {
        Rw::Read => (false, 100),
        Rw::Write => (false, 0),
        Rw::RandRead => (true, 100),
        Rw::RandWrite => (true, 0),
        Rw::Mixed => (false, args.mix),
        Rw::RandMixed => (true, args.mix),
    };
    Ok(Workload {
        access: Access { random, read_percent },
        io_bytes: bytes("--bs", &args.bs)?,
        depth: args.iodepth,
        jobs: args.jobs,
        runtime: Duration::from_secs(args.runtime),
        size_bytes: args.size.as_deref().map(|text| bytes("--size", text)).transpose()?,
        verify: args.verify,
        seed: args.seed,
    })
}

fn load(args: &BenchArgs) -> anyhow::Result<Load> {
    match (&args.spec, args.connect, &args.subnqn, args.nsid) {
        (Some(spec), ..) => Load::local(spec),
        (None, Some(addr), Some(subnqn), Some(nsid)) => {
            Load::remote(addr, subnqn, nsid, args.digests)
        }
        _ => Err(anyhow!("give SPEC, or --connect with --subnqn and --nsid")),
    }
}
