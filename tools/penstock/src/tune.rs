//! `penstock tune`: what of this machine to change, and changing it.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use daemon::tune::{Applied, Survey};
use serde::Serialize;

use crate::FAILED;
use crate::cli::TuneArgs;

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    survey: &'a Survey,
    #[serde(skip_serializing_if = "Option::is_none")]
    applied: Option<&'a [Applied]>,
}

pub(crate) fn run(args: &TuneArgs) -> anyhow::Result<ExitCode> {
    let root = Path::new("/");
    if args.apply && !daemon::tune::is_root() {
        bail!(
            "tune --apply writes to /proc/sys and /sys, which only root may: run it as root, or \
             run `penstock tune` and do what it prints"
        );
    }
    let survey = Survey::of(root);
    if !args.apply {
        show(&survey, None, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let applied = survey.apply(root);
    // What took shows in a second look; what did not is still to be changed there.
    let after = Survey::of(root);
    show(&after, Some(&applied), args.json)?;
    let is_done = applied.iter().all(|write| write.error.is_none()) && !after.machine.can_apply;
    Ok(if is_done { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn show(survey: &Survey, applied: Option<&[Applied]>, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(&Answer { survey, applied })?);
        return Ok(());
    }
    if let Some(applied) = applied {
        if applied.is_empty() {
            println!("Nothing to apply.\n");
        }
        for write in applied {
            match &write.error {
                None => println!("{}: {}: {} -> {}", write.about, write.path, write.old, write.new),
                Some(error) => println!("{}: {}: NOT DONE: {error}", write.about, write.path),
            }
        }
        let done: Vec<&Applied> = applied.iter().filter(|write| write.error.is_none()).collect();
        if !done.is_empty() {
            println!("\nUntil the next boot. To undo:");
            done.iter().for_each(|write| println!("    # {}", write.undo));
            println!();
        }
    }
    println!("{survey}");
    Ok(())
}
