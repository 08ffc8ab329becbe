//! A running guest moves between two machines, each with an emulator of its own, and back.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::super::Scene;
use super::super::guest::{Guest, Job};
use super::super::tree::Kernel;
use super::kill_target::last;
use super::manage::{Managed, missing};
use super::{emulator_named, file_volume, fio_verified};
use crate::exec;
use crate::report::Outcome;

const SIZE_MIB: u64 = 128;
/// Finished I/Os before the guest moves, each time.
const MOVE_AFTER_IOS: u64 = 300;
/// The whole memory, written all the time, from one emulated machine to another.
const MOVE_LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

pub(super) fn virtio(scene: &Scene<'_>) -> Result<Outcome> {
    if let Some(skipped) = missing(scene)? {
        return Ok(skipped);
    }
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    let mut target = Managed::start::<1>(scene, &[volume])?;
    let [here, there] = ["here", "there"].map(|name| scene.socket(name));
    let mut devices = Vec::new();
    for (name, socket) in [("here", &here), ("there", &there)] {
        devices.push(emulator_named(scene, name, socket, target.ports[0], 1, &[])?);
    }
    let job = |socket: &Path| Job::new("migrate.sh").vhost_user_blk(socket);

    let mut guest = scene.boot("guest", Kernel::Stable, &job(&here))?;
    let mut goal = MOVE_AFTER_IOS;
    for (name, socket) in [("away", &there), ("back", &here)] {
        guest.wait_until(&format!("I/O before it moves {name}"), |console| {
            last(console).is_some_and(|progress| progress.ios >= goal)
        })?;
        // In the folder of sockets, because its path is as bounded as theirs.
        let stream = scene.socket(&format!("{name}.stream"));
        let incoming = ["-incoming".to_owned(), format!("unix:{}", stream.display())];
        let mut next = scene.boot(name, Kernel::Stable, &job(socket).devices(incoming))?;
        next.qmp()?;
        goal = last(&guest.console()).map_or(goal, |progress| progress.ios) + MOVE_AFTER_IOS;
        send(&mut guest, &stream).with_context(|| format!("the guest moves {name}"))?;
        guest.kill()?;
        guest = next;
    }
    guest.wait_until("I/O where it came from", |console| {
        last(console).is_some_and(|progress| progress.ios >= goal)
    })?;
    // Its word to come to an end, and a change of the device that the second one has to tell of.
    let size = format!("{}M", SIZE_MIB + 64);
    exec::run(target.client(scene).args(["volume", "resize", "disk", "--size", &size]))?;
    let results = guest.finish()?;
    fio_verified(&results, 2)?;
    for device in &mut devices {
        device.must_run()?;
    }
    target.service.must_run()?;
    drop((devices, target));
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// Has QEMU send its guest to another one, and waits until that one has it.
fn send(guest: &mut Guest, stream: &Path) -> Result<()> {
    let mut qemu = guest.qmp()?;
    let start = Instant::now();
    qemu.execute("migrate", &json!({"uri": format!("unix:{}", stream.display())}))?;
    loop {
        let state = qemu.execute("query-migrate", &Value::Null)?;
        match state["status"].as_str() {
            Some("completed") => {
                println!(
                    "moved in {} ms, {} ms of them at a standstill, {} bytes of memory",
                    state["total-time"], state["downtime"], state["ram"]["transferred"]
                );
                return Ok(());
            }
            Some("failed" | "cancelled") => bail!("QEMU gives up: {state}"),
            _ if start.elapsed() > MOVE_LIMIT => bail!("not moved in time: {state}"),
            _ => std::thread::sleep(POLL),
        }
    }
}
