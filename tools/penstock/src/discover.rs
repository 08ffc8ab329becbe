//! `penstock discover`: what a discovery controller offers.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use crate::cli::DiscoverArgs;

pub(crate) fn run(args: &DiscoverArgs) -> anyhow::Result<ExitCode> {
    let address = SocketAddr::new(args.addr, args.port);
    let timeout = Duration::from_secs(args.timeout);
    let found = daemon::discover::discover(
        address,
        args.subnqn.as_deref(),
        args.hostnqn.as_deref(),
        &args.credentials.config(),
        timeout,
    )?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("{found}");
    }
    Ok(ExitCode::SUCCESS)
}
