//! `penstock bench`: a load, and what it found.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{anyhow, bail};
use daemon::bench::{Access, Breakdown, Load, OwnTarget, Report, SAMPLE_EVERY, Workload};
use daemon::size;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{BenchArgs, Rw};
use crate::manage;
use crate::manage::cli::Connection;
use crate::signals::{self, Signals};
use crate::{FAILED, WRONG_DATA};

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let workload = workload(args)?;
    let watched = Watched::begin(args)?;
    // Whatever becomes of the run, the target is asked, and left as it was.
    let report = drive(args, &workload);
    let breakdown = watched.map(Watched::end).transpose()?;
    let mut report = report?;
    report.breakdown = breakdown.or(report.breakdown);
    print(&report, args.json)?;
    Ok(verdict(&report))
}

/// A target whose requests are followed during a run.
struct Watched {
    connection: Connection,
    before: api::Breakdown,
    /// Nobody else had asked for it.
    is_ours: bool,
}

impl Watched {
    fn begin(args: &BenchArgs) -> anyhow::Result<Option<Watched>> {
        if !args.breakdown || args.connect.is_none() {
            return Ok(None);
        }
        let Some(api) = args.api.clone() else {
            bail!(
                "--breakdown asks the target: give its management API with --api (see `penstock \
                 target --api`)"
            );
        };
        let connection = Connection {
            api,
            api_cert: args.api_cert.clone(),
            api_key: args.api_key.clone(),
            api_ca: args.api_ca.clone(),
            json: false,
            timeout: api::TIMEOUT_S,
        };
        let mut before = manage::breakdown(&connection)?;
        let is_ours = before.every == 0;
        if is_ours {
            before = manage::set_sampling(&connection, SAMPLE_EVERY)?;
        }
        Ok(Some(Watched { connection, before, is_ours }))
    }

    fn end(self) -> anyhow::Result<Breakdown> {
        let after = match self.is_ours {
            true => manage::set_sampling(&self.connection, 0)?,
            false => manage::breakdown(&self.connection)?,
        };
        Ok(Breakdown::between(self.before.every, &self.before, &after))
    }
}

fn drive(args: &BenchArgs, workload: &Workload) -> anyhow::Result<Report> {
    let stop = Arc::new(AtomicBool::new(false));
    signals::runtime()?.block_on(async {
        let own = match &args.spec {
            Some(spec) if args.breakdown => Some(OwnTarget::start(spec)?),
            _ => None,
        };
        let load = match &own {
            Some(own) => Load::of(own)?,
            None => load(args)?,
        };
        if let Some(own) = &own {
            own.set_sampling(SAMPLE_EVERY);
        }
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
        let mut report = loop {
            tokio::select! {
                report = &mut run => break report??,
                (_, code) = signals.next() => {
                    if stop.swap(true, Ordering::Relaxed) {
                        std::process::exit(i32::from(code));
                    }
                }
            }
        };
        if let Some(own) = own {
            let (nothing, found) = (api::Breakdown::default(), own.breakdown());
            report.breakdown = Some(Breakdown::between(SAMPLE_EVERY, &nothing, &found));
            own.stop()?;
        }
        Ok(report)
    })
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
            let credentials = args.credentials.config();
            let hostnqn = args.hostnqn.as_deref();
            Load::remote(addr, subnqn, nsid, args.digests, hostnqn, &credentials)
        }
        _ => Err(anyhow!("give SPEC, or --connect with --subnqn and --nsid")),
    }
}
