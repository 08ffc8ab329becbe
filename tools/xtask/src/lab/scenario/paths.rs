//! A disk with two paths to its target, each through a relay, while fio verifies: no I/O fails, no
//! block is another one than was written, and `device show` says what is going on.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::super::Scene;
use super::super::guest::{Guest, Job};
use super::super::service::{Service, free_ports, is_listening};
use super::super::tree::Kernel;
use super::kill_target::{SCRIPT, all, last};
use super::manage::request;
use super::relay::Relay;
use super::{READY_LIMIT, SUBNQN, file_volume, fio_verified};
use crate::report::Outcome;

const SIZE_MIB: u64 = 128;
/// What fio writes: with room for all of the below.
const WRITTEN: &str = "48M";
/// Finished I/Os between one trouble and the next.
const IOS: u64 = 150;
/// Of a slow path, for each 32 KiB one way.
const DELAY: Duration = Duration::from_millis(40);
/// For a path to be lost or to come back: some times the keep alive time-out and the longest pause
/// between attempts.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a device is asked how it is.
const POLL: Duration = Duration::from_millis(50);

pub(super) fn virtio(scene: &Scene<'_>) -> Result<Outcome> {
    let job = |socket: &Path| Job::new(SCRIPT).args(&["virtio", WRITTEN]).vhost_user_blk(socket);
    run(scene, "virtio-blk", "numa", Told::Configured, job)
}

pub(super) fn nvme(scene: &Scene<'_>) -> Result<Outcome> {
    let job = |socket: &Path| Job::new(SCRIPT).args(&["pci", WRITTEN]).vfio_user(socket);
    run(scene, "nvme", "round-robin", Told::Discovered, job)
}

/// How the emulator knows of the paths.
#[derive(PartialEq, Eq)]
enum Told {
    Configured,
    Discovered,
}

fn run<'a>(
    scene: &Scene<'_>,
    kind: &str,
    policy: &str,
    told: Told,
    job: impl Fn(&Path) -> Job<'a>,
) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    let ports = free_ports::<3>()?;
    let [first, second, discovery] = ports;
    let (mut one, mut two) = (Relay::start(first)?, Relay::start(second)?);
    let mut command = scene.penstock();
    command.args(["target", "--volume", &volume, "--subnqn", SUBNQN]);
    for (port, relay) in [(first, &one), (second, &two)] {
        command.args(["--listen", &format!("127.0.0.1:{port},advertise=127.0.0.1:{}", relay.port)]);
    }
    command.args(["--discovery", &format!("127.0.0.1:{discovery}")]);
    let mut target = Service::start("penstock target", &command, &scene.path("target.log"))?;
    target.wait_until("listening ports", READY_LIMIT, |_| {
        ports.iter().all(|port| is_listening(*port))
    })?;

    let (socket, api) = (scene.socket("disk.sock"), scene.socket("emulate.sock"));
    let mut command = scene.penstock();
    let ways = match told {
        Told::Configured => format!("connect=127.0.0.1:{}+127.0.0.1:{}", one.port, two.port),
        // With both relays' ports, and no others, to connect to.
        Told::Discovered => {
            format!("discover=127.0.0.1:{discovery},ports={}+{}", one.port, two.port)
        }
    };
    command.args(["emulate", "--api"]).arg(&api).arg("--device").arg(format!(
        "disk={kind},socket={},tls=off,{ways},subnqn={SUBNQN},nsid=1,iopolicy={policy}",
        socket.display(),
    ));
    let mut service = Service::start("penstock emulate", &command, &scene.path("emulate.log"))?;
    service.wait_until("device ready", READY_LIMIT, |s| s.text().contains("device ready"))?;
    let guest = scene.boot("guest", Kernel::Stable, &job(&socket))?;
    let mut bed = Bed { guest, api, service };

    bed.goes_on("the first I/O")?;
    bed.until(["live", "live"])?;
    let device = request(&bed.api, "GET", "/v1/devices/disk", &Value::Null)?;
    let connected = device["discovery"][0]["state"] == "connected";
    ensure!(connected == (told == Told::Discovered), "discovery: {}", device["discovery"]);
    // One of two is cut.
    one.cut()?;
    bed.until(["connecting", "live"])?;
    bed.goes_on("one path is cut")?;
    one.restore()?;
    bed.until(["live", "live"])?;
    bed.goes_on("the path is back")?;
    // Both are.
    two.cut()?;
    one.cut()?;
    bed.until(["connecting", "connecting"])?;
    bed.stands_still()?;
    two.restore()?;
    bed.until(["connecting", "live"])?;
    bed.goes_on("the second path is back")?;
    one.restore()?;
    bed.until(["live", "live"])?;
    // One is slow, and no worse than that.
    one.slow(DELAY)?;
    bed.goes_on("a path is slow")?;
    one.open()?;
    ensure!(bed.losses()? == [2, 1], "lost paths: {:?}", bed.losses()?);
    // One says nothing any more; what was sent on it before comes through much later.
    one.silence()?;
    bed.until(["connecting", "live"])?;
    bed.goes_on("a path is silent")?;
    one.open()?;
    bed.until(["live", "live"])?;
    bed.goes_on("the path speaks again")?;
    ensure!(!bed.guest.console().contains("fio is done"), "fio ended before the end");
    ensure!(bed.losses()? == [3, 1], "lost paths: {:?}", bed.losses()?);

    let Bed { guest, mut service, .. } = bed;
    let results = guest.finish()?;
    fio_verified(&results, 1)?;
    service.must_run()?;
    target.must_run()?;
    drop((service, target));
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// A guest, and the emulator that has its disk.
struct Bed {
    guest: Guest,
    api: std::path::PathBuf,
    service: Service,
}

impl Bed {
    /// The two paths of the only namespace, as `penstock device show` has them.
    fn paths(&self) -> Result<[Value; 2]> {
        let device = request(&self.api, "GET", "/v1/devices/disk", &Value::Null)?;
        let paths = device["namespaces"][0]["paths"].as_array().context("no paths")?;
        let [one, two] = paths.as_slice() else { bail!("{} paths", paths.len()) };
        Ok([one.clone(), two.clone()])
    }

    fn losses(&self) -> Result<[u64; 2]> {
        Ok(self.paths()?.map(|path| path["losses"].as_u64().unwrap_or(u64::MAX)))
    }

    /// Waits until the paths are in these states.
    fn until(&mut self, states: [&str; 2]) -> Result<()> {
        let begin = Instant::now();
        loop {
            let paths = self.paths()?;
            if paths.iter().zip(states).all(|(path, state)| path["state"] == state) {
                return Ok(());
            }
            self.service.must_run()?;
            ensure!(begin.elapsed() < LIMIT, "the paths do not become {states:?}: {paths:?}");
            sleep(POLL);
        }
    }

    /// Waits until the guest has had more I/O done.
    fn goes_on(&mut self, when: &str) -> Result<()> {
        let goal = last(&self.guest.console()).map_or(0, |progress| progress.ios) + IOS;
        println!("{when}: {} I/Os", goal - IOS);
        self.guest.wait_until(&format!("I/O after {when}"), |console| {
            last(console).is_some_and(|progress| progress.ios >= goal)
        })
    }

    /// Waits until the guest's I/O stands still.
    fn stands_still(&mut self) -> Result<()> {
        let seen = all(&self.guest.console()).len();
        self.guest.wait_until("standstill", |console| {
            // A line may have been under way: count from the one after it.
            matches!(all(console).get(seen + 1..), Some([.., before, now]) if before.ios == now.ios)
        })
    }
}
