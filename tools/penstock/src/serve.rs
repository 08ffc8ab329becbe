//! `penstock target` and `penstock emulate`: run until a signal.

use std::path::PathBuf;
use std::process::ExitCode;

use daemon::{Config, Daemon, Draft, supervise};

use crate::cli::{EmulateArgs, TargetArgs};
use crate::signals::{self, Signals};

pub(crate) fn target(args: &TargetArgs) -> anyhow::Result<ExitCode> {
    let mut draft = draft(&args.config)?;
    for volume in &args.volume {
        draft.add_volume(volume)?;
    }
    draft.set_listen(&args.listen);
    draft.set_discovery(&args.discovery);
    if let Some(subnqn) = &args.subnqn {
        draft.set_subnqn(subnqn);
    }
    if let Some(data) = &args.data {
        draft.set_data_dir(data);
    }
    if let Some(cores) = &args.cores {
        draft.set_target_cores(cores);
    }
    if let Some(micros) = &args.busy_poll_us {
        draft.set_target_busy_poll_us(micros);
    }
    if let Some(entries) = &args.queue_entries_max {
        draft.set_queue_entries_max(entries);
    }
    if let Some(queues) = &args.io_queues_max {
        draft.set_io_queues_max(queues);
    }
    for namespace in &args.namespace {
        draft.set_namespace(namespace)?;
    }
    for subsystem in &args.subsystem {
        draft.add_subsystem(subsystem)?;
    }
    for ana in &args.ana {
        draft.add_ana(ana)?;
    }
    for referral in &args.referral {
        draft.add_referral(referral)?;
    }
    for limit in &args.limit {
        draft.add_limit(limit)?;
    }
    if let Some(nqn) = &args.discovery_nqn {
        draft.set_discovery_nqn(nqn);
    }
    draft.set_auth_hashes(&args.auth_hash);
    draft.set_auth_groups(&args.auth_group);
    if args.mdns {
        draft.set_mdns();
    }
    if let Some(user) = &args.user {
        draft.set_user(user);
    }
    if let Some(api) = &args.api {
        draft.set_api(api);
    }
    if let Some(addr) = &args.api_listen {
        draft.set_api_listen(addr);
    }
    if let Some(path) = &args.api_cert {
        draft.set_api_cert(path);
    }
    if let Some(path) = &args.api_key {
        draft.set_api_key(path);
    }
    if let Some(path) = &args.api_client_ca {
        draft.set_api_client_ca(path);
    }
    if let Some(path) = &args.api_client_crl {
        draft.set_api_client_crl(path);
    }
    let left_out = draft.keep_target();
    if left_out != 0 {
        tracing::info!(devices = left_out, "devices in the file are for `penstock emulate`");
    }
    run(draft.check()?)
}

pub(crate) fn emulate(args: &EmulateArgs) -> anyhow::Result<ExitCode> {
    let mut draft = draft(&args.config)?;
    for device in &args.device {
        draft.add_device(device)?;
    }
    if let Some(data) = &args.data {
        draft.set_data_dir(data);
    }
    if let Some(cores) = &args.cores {
        draft.set_emulator_cores(cores);
    }
    if let Some(micros) = &args.busy_poll_us {
        draft.set_emulator_busy_poll_us(micros);
    }
    if let Some(mode) = &args.containment {
        draft.set_containment(mode);
    }
    if let Some(user) = &args.user {
        draft.set_emulator_user(user);
    }
    if let Some(when) = &args.supervise {
        draft.set_supervise(when);
    }
    if let Some(api) = &args.api {
        draft.set_emulator_api(api);
    }
    let left_out = draft.keep_devices();
    if left_out != 0 {
        tracing::info!(volumes = left_out, "volumes in the file are for `penstock target`");
    }
    let config = draft.check()?;
    if args.check_containment {
        return check_containment(config);
    }
    match (args.worker, config.is_supervised()) {
        (true, _) => work(config),
        (false, true) => supervise(&config),
        (false, false) => run(config),
    }
}

/// Starts this program again as the worker, with the same arguments.
fn supervise(config: &Config) -> anyhow::Result<ExitCode> {
    // By its path, so that a newer program is what a restart takes.
    let program = std::env::current_exe()?;
    let worker = || {
        let mut command = std::process::Command::new(&program);
        command.args(std::env::args_os().skip(1)).arg("--worker");
        command
    };
    let code = signals::runtime()?.block_on(supervise::run(config, worker))?;
    Ok(ExitCode::from(code))
}

fn work(config: Config) -> anyhow::Result<ExitCode> {
    signals::runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let inherited = supervise::Inherited::receive()?;
        let link = inherited.link();
        let daemon = Daemon::start_supervised(config, inherited)?;
        daemon.announce();
        link.ready()?;
        signals.watch(link);
        signals::stay(daemon, &mut signals, |text| tracing::info!("{text}")).await
    })
}

fn check_containment(config: Config) -> anyhow::Result<ExitCode> {
    signals::runtime()?.block_on(async {
        let daemon = Daemon::start(config)?;
        let attempts = daemon.try_to_break_out();
        for attempt in &attempts {
            match &attempt.refused {
                Some(reason) => println!("refused  {}: {reason}", attempt.what),
                None => println!("GRANTED  {}", attempt.what),
            }
        }
        let is_contained = attempts.iter().all(|attempt| attempt.refused.is_some());
        daemon.stop()?;
        Ok(if is_contained { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

fn draft(config: &Option<PathBuf>) -> anyhow::Result<Draft> {
    Ok(match config {
        Some(path) => Draft::from_file(path)?,
        None => Draft::new(),
    })
}

fn run(config: Config) -> anyhow::Result<ExitCode> {
    signals::runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let daemon = Daemon::start(config)?;
        daemon.announce();
        signals::stay(daemon, &mut signals, |text| tracing::info!("{text}")).await
    })
}
