//! Namespaces that grow, come and go under load; the guest hears of it by events alone.

use anyhow::Result;
use serde_json::{Value, json};

use super::super::Scene;
use super::super::guest::Job;
use super::super::tree::Kernel;
use super::manage::{Managed, StopPort, last_line, missing, resize};
use super::{HOST_ADDRESS, SUBNQN, file_volume, fio_verified};
use crate::report::Outcome;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    if let Some(skipped) = missing(scene)? {
        return Ok(skipped);
    }
    let (disk, image) = file_volume(scene, "disk", 64);
    let (spare, spare_image) = file_volume(scene, "spare", 16);
    let mut target = Managed::start::<1>(scene, &[disk, spare])?;
    let stop = StopPort::new()?;
    let port = target.ports[0].to_string();
    let job =
        Job::new("namespaces.sh").network().args(&[HOST_ADDRESS, &port, &stop.name(), SUBNQN]);
    let mut guest = scene.boot("guest", Kernel::Backports, &job)?;
    let mut sees = |what: &str, one: u64, two: Option<u64>| {
        let want =
            [Some(one), two].map(|mib| mib.map_or("-".to_owned(), |m| (m * 2048).to_string()));
        guest.wait_until(what, |console| {
            last_line(console, "sectors: ").is_some_and(|words| words == want)
        })
    };
    let none = &Value::Null;

    sees("both namespaces", 64, Some(16))?;
    target.call("POST", "/v1/volumes/disk/resize", &json!({"size_bytes": 96 << 20}))?;
    sees("growth by us", 96, Some(16))?;
    resize(&image, 128)?;
    target.call("POST", "/v1/volumes/disk/resize", &json!({}))?;
    sees("growth behind our back", 128, Some(16))?;
    target.call("PUT", "/v1/volumes/spare/hosts", &json!({"hosts": []}))?;
    sees("a masked namespace", 128, None)?;
    target.call("PUT", "/v1/volumes/spare/hosts", &json!({"hosts": null}))?;
    sees("an unmasked namespace", 128, Some(16))?;
    for round in 0..3 {
        target.call("DELETE", "/v1/volumes/spare", none)?;
        sees(&format!("detached namespace, round {round}"), 128, None)?;
        // Nobody has it open any more, so it may be changed, and comes back as it is now.
        let mib = 32 + 16 * round;
        resize(&spare_image, mib)?;
        let body = json!({"name": "spare"});
        target.call("POST", "/v1/volumes", &body)?;
        sees(&format!("attached namespace, round {round}"), 128, Some(mib))?;
    }

    stop.open()?;
    let results = guest.finish()?;
    fio_verified(&results, 1)?;
    target.service.must_run()?;
    std::fs::remove_file(image)?;
    std::fs::remove_file(spare_image)?;
    Ok(Outcome::Passed)
}
