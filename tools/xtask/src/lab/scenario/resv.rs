//! Two hosts contend for a namespace with reservations.

use anyhow::{Result, ensure};

use super::super::Scene;
use super::super::guest::Job;
use super::super::tree::Kernel;
use super::{HOST_ADDRESS, SUBNQN, Target, file_volume};
use crate::report::Outcome;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", 64);
    let target = Target::new(scene, &[volume])?;
    let mut service = target.start(scene)?;
    let port = target.port.to_string();
    let job = Job::new("resv.sh").kernel_words("nvme_core.multipath=N").network().args(&[
        HOST_ADDRESS,
        &port,
        SUBNQN,
    ]);
    let results = scene.boot("guest", Kernel::Backports, &job)?.finish()?;
    if let Ok(why) = results.text("skipped") {
        return Ok(Outcome::Skipped(why.trim().to_owned()));
    }
    let reports = results.text("reports.txt")?;
    // The kernel gives its hosts 16 bytes of identity, so keys and hosts are in the report.
    for word in ["a1", "b1"] {
        ensure!(reports.contains(word), "key {word} is in no report:\n{reports}");
    }
    service.must_run()?;
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}
