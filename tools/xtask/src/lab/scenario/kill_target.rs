//! Something dies without a word while fio verifies, and comes back: no host notices.
//!
//! The target, twice, under a kernel host, under a virtio disk and under an NVMe disk; the emulator,
//! twice, under a virtio disk with either kind of ring; the guest itself, whose disk the next one
//! has. And a machine is paused while the target is dead.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::Scene;
use super::super::guest::{Guest, Job};
use super::super::service::Service;
use super::super::tree::Kernel;
use super::{
    HOST_ADDRESS, SUBNQN, Target, emulator, emulator_with, file_volume, fio_verified, nvme_emulator,
};
use crate::exec;
use crate::report::Outcome;

const SIZE_MIB: u64 = 128;
/// The last block of a volume.
const END: u64 = (SIZE_MIB << 20) - 512;
pub(super) const SCRIPT: &str = "verify-outage.sh";
/// The round in which a worker is replaced and not killed.
const LAST: &str = "third";
/// Time for a supervisor to start another worker, after its longest pause.
const LIMIT: Duration = Duration::from_secs(60);
/// Finished I/Os at which the target is killed for the first time, and more until the second.
const KILL_AFTER_IOS: u64 = 400;

pub(super) fn kernel(scene: &Scene<'_>) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    let target = Target::new(scene, &[volume])?.asking_for_data();
    let service = target.start(scene)?;
    let port = target.port.to_string();
    let job = Job::new(SCRIPT).network().args(&["nvme", HOST_ADDRESS, &port, SUBNQN]);
    let guest = scene.boot("guest", Kernel::Backports, &job)?;
    outages(service, || target.start(scene), guest, |progress| progress.state != "live")?;
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

pub(super) fn virtio(scene: &Scene<'_>) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    let target = Target::new(scene, &[volume])?;
    let service = target.start(scene)?;
    let socket = scene.socket("disk.sock");
    let mut device = emulator(scene, &socket, &target, 1)?;
    let job = Job::new(SCRIPT).args(&["virtio"]).vhost_user_blk(&socket);
    let guest = scene.boot("guest", Kernel::Stable, &job)?;
    // The guest's disk has no state that would tell; that its I/O stands still has to do.
    outages(service, || target.start(scene), guest, |_| true)?;
    device.must_run()?;
    drop(device);
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// The machine is paused while the target is away, and goes on when it is back: QEMU keeps what was in
/// flight, and the guest sees no error.
pub(super) fn paused(scene: &Scene<'_>) -> Result<Outcome> {
    for (name, more) in [("split", ""), ("packed", ",packed=on")] {
        let (volume, image) = file_volume(scene, name, SIZE_MIB);
        let target = Target::new(scene, &[volume])?;
        let mut service = target.start(scene)?;
        let socket = scene.socket(name);
        let mut device = emulator(scene, &socket, &target, 1)?;
        let job = Job::new(SCRIPT).args(&["virtio"]).vhost_user_blk_with(&socket, more);
        let mut guest = scene.boot(name, Kernel::Stable, &job)?;
        let mut goal = KILL_AFTER_IOS;
        for round in ["first", "second"] {
            guest.wait_until(&format!("I/O before the {round} outage"), |console| {
                last(console).is_some_and(|progress| progress.ios >= goal)
            })?;
            service.kill()?;
            let seen = all(&guest.console()).len();
            guest.wait_until(&format!("standstill in the {round} outage"), |console| {
                let lines = all(console);
                matches!(lines.get(seen + 1..), Some([.., before, now]) if before.ios == now.ios)
            })?;
            let mut qemu = guest.qmp()?;
            let start = Instant::now();
            qemu.execute("stop", &Value::Null)?;
            println!("paused in {} ms", start.elapsed().as_millis());
            service = target.start(scene)?;
            qemu.execute("cont", &Value::Null)?;
            goal = last(&guest.console()).map_or(goal, |progress| progress.ios) + KILL_AFTER_IOS;
        }
        let results = guest.finish()?;
        fio_verified(&results, 1)?;
        device.must_run()?;
        service.must_run()?;
        drop((device, service));
        std::fs::remove_file(image)?;
    }
    Ok(Outcome::Passed)
}

/// The guest's NVMe controller says nothing of it: its commands take as long as the outage does.
pub(super) fn nvme(scene: &Scene<'_>) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    let target = Target::new(scene, &[volume])?;
    let service = target.start(scene)?;
    let socket = scene.socket("disk.sock");
    let mut device = nvme_emulator(scene, &socket, &target, "1", &[])?;
    let job = Job::new(SCRIPT).args(&["pci"]).vfio_user(&socket);
    let guest = scene.boot("guest", Kernel::Stable, &job)?;
    outages(service, || target.start(scene), guest, |_| true)?;
    device.must_run()?;
    drop(device);
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// The emulator dies: what was in flight is in the guest's memory, and its successor goes on.
pub(super) fn emulator_dies(scene: &Scene<'_>) -> Result<Outcome> {
    for (name, more) in [("split", ""), ("packed", ",packed=on")] {
        let (volume, image) = file_volume(scene, name, SIZE_MIB);
        let target = Target::new(scene, &[volume])?;
        let mut service = target.start(scene)?;
        let socket = scene.socket(name);
        let device = emulator(scene, &socket, &target, 1)?;
        let job = Job::new(SCRIPT).args(&["virtio"]).vhost_user_blk_with(&socket, more);
        let guest = scene.boot(name, Kernel::Stable, &job)?;
        outages(device, || emulator(scene, &socket, &target, 1), guest, |_| true)?;
        service.must_run()?;
        drop(service);
        std::fs::remove_file(image)?;
    }
    Ok(Outcome::Passed)
}

/// The worker of a supervised emulator dies: nobody has to start it again.
pub(super) fn worker_dies(scene: &Scene<'_>) -> Result<Outcome> {
    let start =
        |target: &Target, socket: &Path| emulator_with(scene, socket, target, 1, &["--supervise"]);
    let job = |socket: &Path| Job::new(SCRIPT).args(&["virtio"]).vhost_user_blk(socket);
    workers_die(scene, 1, start, || Ok(()), job)
}

/// The same with an NVMe controller. Its guest's QEMU does not connect again: the connection stays.
/// So does what was attached and detached by hand; what is detached is the namespace that the
/// controller has its serial number from.
pub(super) fn nvme_worker_dies(scene: &Scene<'_>) -> Result<Outcome> {
    let api = scene.socket("api");
    let path = api.to_string_lossy();
    let start = |target: &Target, socket: &Path| {
        nvme_emulator(scene, socket, target, "3+1", &["--supervise=auto", "--api", &path])
    };
    let change = || {
        for (what, nsid) in [("detach", "3"), ("attach", "2")] {
            let mut by_hand = scene.penstock();
            by_hand.args(["device", what, "nvme0", "--nsid", nsid, "--api", &path]);
            exec::run(&mut by_hand)?;
        }
        Ok(())
    };
    let job = |socket: &Path| Job::new(SCRIPT).args(&["pci", "32M", "1,2"]).vfio_user(socket);
    workers_die(scene, 3, start, change, job)
}

/// Three times: the worker is killed twice, and replaced at the supervisor's order. Before that
/// something is changed.
fn workers_die<'a>(
    scene: &Scene<'_>,
    volumes: usize,
    start: impl Fn(&Target, &Path) -> Result<Service>,
    change: impl Fn() -> Result<()>,
    job: impl Fn(&Path) -> Job<'a>,
) -> Result<Outcome> {
    let (volumes, images): (Vec<String>, Vec<_>) =
        (1..=volumes).map(|n| file_volume(scene, &format!("disk{n}"), SIZE_MIB)).unzip();
    let target = Target::new(scene, &volumes)?;
    let mut service = target.start(scene)?;
    let socket = scene.socket("disk.sock");
    let mut device = start(&target, &socket)?;
    let job = job(&socket);
    let mut guest = scene.boot("guest", Kernel::Stable, &job)?;
    let mut goal = KILL_AFTER_IOS;
    for round in ["first", "second", LAST] {
        guest.wait_until(&format!("I/O before the {round} death"), |console| {
            last(console).is_some_and(|progress| progress.ios >= goal)
        })?;
        if round == "first" {
            change()?;
        }
        let worker = device.only_child().context("the supervisor has no worker")?;
        if round == LAST {
            // As after an update of the program.
            device.hang_up()?;
        } else {
            let pid = worker.to_string();
            exec::run(Command::new("sh").args(["-c", "kill -KILL \"$1\"", "sh", &pid]))?;
        }
        device.wait_until("another worker", LIMIT, |device| {
            device.only_child().is_some_and(|now| now != worker)
        })?;
        goal = last(&guest.console()).map_or(goal, |progress| progress.ios) + KILL_AFTER_IOS;
    }
    let results = guest.finish()?;
    fio_verified(&results, 1)?;
    device.must_run()?;
    service.must_run()?;
    drop((device, service));
    for image in images {
        std::fs::remove_file(image)?;
    }
    Ok(Outcome::Passed)
}

/// The guest resets itself in mid-I/O, then one dies in mid-I/O: both kinds of disk serve the next
/// driver.
pub(super) fn guest_dies(scene: &Scene<'_>) -> Result<Outcome> {
    let (first, first_image) = file_volume(scene, "first", SIZE_MIB);
    let (second, second_image) = file_volume(scene, "second", SIZE_MIB);
    let target = Target::new(scene, &[first, second])?;
    let mut service = target.start(scene)?;
    let [virtio, nvme] = ["virtio", "nvme"].map(|name| scene.socket(name));
    let mut devices =
        [emulator(scene, &virtio, &target, 1)?, nvme_emulator(scene, &nvme, &target, "2", &[])?];
    let job = |how: &str| {
        Job::new("guest-reset.sh").args(&[how]).vhost_user_blk(&virtio).vfio_user(&nvme)
    };
    let results = scene.boot("reset", Kernel::Stable, &job("reset").resets())?.finish()?;
    fio_verified(&results, 2)?;

    // As if nobody had written to them.
    for image in [&first_image, &second_image] {
        std::fs::File::options().write(true).open(image)?.write_all_at(&[0; 512], END)?;
    }
    let mut guest = scene.boot("killed", Kernel::Stable, &job("die"))?;
    guest.wait_for("please: kill")?;
    guest.kill()?;
    let results = scene.boot("next", Kernel::Stable, &job("next"))?.finish()?;
    fio_verified(&results, 2)?;
    for device in &mut devices {
        device.must_run()?;
    }
    service.must_run()?;
    drop((devices, service));
    std::fs::remove_file(first_image)?;
    std::fs::remove_file(second_image)?;
    Ok(Outcome::Passed)
}

/// Kills and restarts a service twice, each time when the guest's I/O is under way, and each time
/// not before the guest's I/O stands still and `is_cut` says that the guest knows.
fn outages(
    mut service: Service,
    start: impl Fn() -> Result<Service>,
    mut guest: Guest,
    is_cut: impl Fn(&Progress) -> bool,
) -> Result<()> {
    let mut goal = KILL_AFTER_IOS;
    for round in ["first", "second"] {
        guest.wait_until(&format!("I/O before the {round} outage"), |console| {
            last(console).is_some_and(|progress| progress.ios >= goal)
        })?;
        service.kill()?;
        let seen = all(&guest.console()).len();
        println!("{round} outage at {} I/Os", last(&guest.console()).map_or(0, |p| p.ios));
        guest.wait_until(&format!("standstill in the {round} outage"), |console| {
            // A line may have been under way when the service died: count from the one after it.
            let lines = all(console);
            match lines.get(seen + 1..) {
                Some([.., before, now]) => before.ios == now.ios && is_cut(now),
                _ => false,
            }
        })?;
        ensure!(!guest.console().contains("fio is done"), "fio ended in the {round} outage");
        service = start()?;
        let standstill = last(&guest.console()).context("no progress line")?.ios;
        goal = standstill + KILL_AFTER_IOS;
    }
    let results = guest.finish()?;
    service.must_run()?;
    fio_verified(&results, 1)
}

/// A line of the guest's script: finished I/Os and the state of the path.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) ios: u64,
    state: String,
}

pub(super) fn all(console: &str) -> Vec<Progress> {
    console
        .lines()
        .filter_map(|line| {
            let mut words = line.trim().strip_prefix("progress: ")?.split(' ');
            let reads: u64 = words.next()?.parse().ok()?;
            let writes: u64 = words.next()?.parse().ok()?;
            Some(Progress { ios: reads + writes, state: words.next()?.to_owned() })
        })
        .collect()
}

/// The last of them.
pub(super) fn last(console: &str) -> Option<Progress> {
    all(console).pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_lines_are_read_among_others() {
        let console =
            "boot\r\nprogress: 3 40 live\r\nnoise\r\nprogress: 5 41 connecting\r\nprogress: 7";
        let lines = all(console);
        assert_eq!(lines.len(), 2);
        assert_eq!(last(console), Some(Progress { ios: 46, state: "connecting".to_owned() }));
    }
}
