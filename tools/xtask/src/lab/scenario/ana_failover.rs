//! Two ports to one namespace: the guest's I/O follows the ANA states, and survives a lost path.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::super::Scene;
use super::super::guest::{Guest, Job};
use super::super::tree::Kernel;
use super::manage::{Managed, StopPort, last_line, missing};
use super::relay::Relay;
use super::{HOST_ADDRESS, SUBNQN, file_volume, fio_verified};
use crate::report::Outcome;

/// Times that the states of the ports are swapped: there and back, twenty times.
const SWAPS: usize = 40;
/// I/Os that the guest's fio has under way at a time.
const DEPTH: u64 = 8;
/// I/Os that have to end by the path that is to be used, before the next change.
const IOS: u64 = 5;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    if let Some(skipped) = missing(scene)? {
        return Ok(skipped);
    }
    let (volume, image) = file_volume(scene, "disk", 64);
    let mut target = Managed::start::<2>(scene, &[volume])?;
    let stop = StopPort::new()?;
    let mut relay = Relay::start(target.ports[1])?;
    let [one, two] = [target.ports[0], relay.port].map(|port| port.to_string());
    let job = Job::new("ana-failover.sh").network().args(&[
        HOST_ADDRESS,
        &one,
        &two,
        &stop.name(),
        SUBNQN,
    ]);
    let mut guest = scene.boot("guest", Kernel::Backports, &job)?;
    guest.wait_until("I/O", |console| paths(console).is_some_and(|p| p.ios[0] + p.ios[1] > 0))?;

    for swap in 0..SWAPS {
        let (to, from) = if swap % 2 == 0 { (1, 0) } else { (0, 1) };
        // Now and then the old path is only the worse one, and now and then it is lost for good.
        let left = ["inaccessible", "non-optimized", "inaccessible", "change"][swap / 2 % 4];
        set(&target, to, "optimized")?;
        set(&target, from, left)?;
        moves(&mut guest, to, from, &format!("swap {swap} to {left}"))?;
    }
    // Both ports serve from here on; then one is cut.
    set(&target, 0, "optimized")?;
    set(&target, 1, "optimized")?;
    guest.wait_until("both paths optimized", |console| {
        paths(console).is_some_and(|p| p.states == ["optimized", "optimized"])
    })?;
    set(&target, 0, "inaccessible")?;
    moves(&mut guest, 1, 0, "all by the second port")?;
    set(&target, 0, "optimized")?;
    relay.cut()?;
    let cut = paths(&guest.console()).context("no line about the paths")?;
    guest.wait_until("I/O by the port that is left", |console| {
        paths(console).is_some_and(|now| now.ios[0] >= cut.ios[0] + IOS)
    })?;
    relay.restore()?;
    set(&target, 0, "inaccessible")?;
    let restored = paths(&guest.console()).context("no line about the paths")?;
    guest.wait_until("I/O by the port that is back", |console| {
        paths(console).is_some_and(|now| now.ios[1] >= restored.ios[1] + IOS)
    })?;
    target.service.must_run()?;

    stop.open()?;
    let results = guest.finish()?;
    fio_verified(&results, 1)?;
    target.service.must_run()?;
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

/// Sets what the only group is through a port.
fn set(target: &Managed, port: usize, state: &str) -> Result<()> {
    let body = json!({"port": port + 1, "group": 1, "state": state});
    target.call("PUT", "/v1/ana", &body).map(drop)
}

/// Waits until the I/O has moved to a path and the kernel has noticed the change of the other.
fn moves(guest: &mut Guest, to: usize, from: usize, what: &str) -> Result<()> {
    let before = paths(&guest.console()).context("no line about the paths")?;
    guest.wait_until(what, |console| {
        paths(console).is_some_and(|now| {
            now.states[to] == "optimized"
                && now.states[from] != "optimized"
                && now.ios[to] >= before.ios[to] + IOS
        })
    })?;
    // Nothing goes the old way any more, while more ends by the new one.
    let moved = paths(&guest.console()).context("no line about the paths")?;
    guest.wait_until(what, |console| {
        paths(console).is_some_and(|now| now.ios[to] >= moved.ios[to] + IOS)
    })?;
    let after = paths(&guest.console()).context("no line about the paths")?;
    // What was under way when the states changed may end there: no more than fio's depth.
    let stray = after.ios[from].saturating_sub(moved.ios[from]);
    ensure!(stray <= DEPTH, "{what}: {stray} I/Os still by the old path");
    Ok(())
}

/// Finished I/Os by each path, and its state as the guest's kernel knows it.
#[derive(Debug, PartialEq, Eq)]
struct Paths {
    ios: [u64; 2],
    states: [String; 2],
}

fn paths(console: &str) -> Option<Paths> {
    let words = last_line(console, "paths: ")?;
    let [one, two, first, second] = words.as_slice() else { return None };
    Some(Paths {
        ios: [one.parse().ok()?, two.parse().ok()?],
        states: [(*first).to_owned(), (*second).to_owned()],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_the_paths_are_read() {
        let found = paths("paths: 10 0 optimized inaccessible\r\npaths: 1").unwrap();
        assert_eq!(found.ios, [10, 0]);
        assert_eq!(found.states, ["optimized", "inaccessible"]);
        assert_eq!(paths("paths: 10 x optimized gone\r\n"), None);
        assert_eq!(paths("paths: 10 0 optimized\r\n"), None);
    }
}
