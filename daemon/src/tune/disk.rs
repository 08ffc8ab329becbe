//! Block devices that may hold volumes: scheduler, polled queues, throttling.

use super::tree::{Tree, chosen, is_plain};
use super::{Finding, Level, Write};

const BLOCKS: &str = "sys/block";

/// Devices that are looked at; the others are named by their number.
const DEVICES_MAX: usize = 64;

pub(super) fn look(tree: &Tree, findings: &mut Vec<Finding>) {
    // Loop, RAM and device mapper devices have no hardware of their own.
    let mut devices = tree.names(BLOCKS);
    devices.retain(|name| tree.exists(&format!("{BLOCKS}/{name}/device")));
    if devices.is_empty() {
        findings.push(Finding::new("block devices", Level::Absent, "none"));
    }
    for name in devices.iter().take(DEVICES_MAX) {
        findings.extend(scheduler(tree, name));
        findings.extend(polled(tree, name));
        findings.extend(throttle(tree, name));
    }
    if devices.len() > DEVICES_MAX {
        let current = format!("{} more were not looked at", devices.len() - DEVICES_MAX);
        findings.push(Finding::new("block devices", Level::Absent, current));
    }
}

fn scheduler(tree: &Tree, name: &str) -> Option<Finding> {
    let queue = format!("{BLOCKS}/{name}/queue");
    let path = format!("{queue}/scheduler");
    let text = tree.text(&path)?;
    let about = format!("{name} scheduler");
    // A device without a choice shows a bare `none`.
    let Some(now) = chosen(&text) else {
        return (text == "none").then(|| Finding::new(about, Level::Good, "none"));
    };
    if tree.number(&format!("{queue}/rotational")) != Some(0) || now == "none" {
        return Some(Finding::new(about, Level::Good, now));
    }
    let offers_none = text.split_whitespace().any(|word| word == "none");
    if !offers_none || !is_plain(now) {
        return None;
    }
    Some(
        Finding::new(about, Level::Change, now)
            .wanted("none")
            .because(
                "the device has no head to move: sorting requests costs a lock and time on every \
                 one, and saves nothing",
            )
            .writes(vec![Write { path, old: now.to_owned(), new: "none".into() }]),
    )
}

fn polled(tree: &Tree, name: &str) -> Option<Finding> {
    let about = format!("{name} polled queues");
    match tree.number(&format!("{BLOCKS}/{name}/queue/io_poll"))? {
        0 if name.starts_with("nvme") => Some(
            Finding::new(about, Level::Consider, "none")
                .wanted("one for each core of the target")
                .because(
                    "a volume with `,poll` asks the device instead of waiting for its interrupt, \
                     which saves some microseconds per request and costs a busy core; without \
                     polled queues it falls back. Other devices than NVMe rarely have them",
                )
                .command(
                    "echo options nvme poll_queues=4 > /etc/modprobe.d/nvme-poll.conf        (takes \
                     effect when the driver is loaded again, mostly at the next boot)",
                ),
        ),
        0 => Some(
            Finding::new(about, Level::Absent, "none")
                .because("its driver has none; volumes with `,poll` wait for interrupts"),
        ),
        _ => Some(Finding::new(about, Level::Good, "there are some")),
    }
}

/// Writeback throttling holds writes back when reads get slow.
fn throttle(tree: &Tree, name: &str) -> Option<Finding> {
    let path = format!("{BLOCKS}/{name}/queue/wbt_lat_usec");
    let now = tree.number(&path)?;
    (now > 0).then(|| {
        Finding::new(format!("{name} write throttling"), Level::Consider, format!("{now} us"))
            .wanted("0 where volumes lie on this device alone")
            .because(
                "holds buffered writes back while reads take longer than this. Volumes are written \
                 past the page cache and are not held back themselves, but their reads are what is \
                 measured against it",
            )
            .command(format!("echo 0 > /{path}"))
    })
}
