//! Answers of the management API, for people.

use std::fmt::Write;

use api::{Association, Device, Done, Key, KeyKind, Referral, Refusal, Status, Subsystem, Volume};

/// Columns under their headings, as wide as what is in them.
fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for (cell, width) in cells.zip(&widths) {
            // Writing to a string does not fail.
            _ = write!(out, "{cell:width$}  ");
        }
        text.push_str(out.trim_end());
        text.push('\n');
    };
    line(&mut headings.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

fn hosts_of(hosts: &Option<Vec<String>>) -> String {
    match hosts {
        None => "all".to_owned(),
        Some(hosts) if hosts.is_empty() => "none".to_owned(),
        Some(hosts) => hosts.join(","),
    }
}

pub(super) fn volumes(volumes: &[Volume]) -> String {
    let row = |volume: &Volume| {
        let state = match volume {
            Volume { attached: false, .. } => "detached",
            Volume { read_only: true, .. } => "read-only",
            Volume { write_protected: true, .. } => "protected",
            _ => "served",
        };
        vec![
            volume.name.clone(),
            volume.subsystem.clone(),
            volume.nsid.to_string(),
            daemon::size::show(volume.size_bytes),
            volume.block_bytes.to_string(),
            state.to_owned(),
            volume.ana_group.to_string(),
            hosts_of(&volume.hosts),
            volume.spec.clone(),
        ]
    };
    let headings =
        ["VOLUME", "SUBSYSTEM", "NSID", "SIZE", "BLOCK", "STATE", "ANA GROUP", "HOSTS", "SPEC"];
    table(&headings, &volumes.iter().map(row).collect::<Vec<_>>())
}

fn device_state(device: &Device) -> &'static str {
    match device {
        Device { problem: Some(_), .. } => "failed",
        Device { is_served: false, .. } => "waits for its target",
        Device { guest_attached: true, .. } => "attached",
        _ => "ready",
    }
}

pub(super) fn devices(devices: &[Device]) -> String {
    let row = |device: &Device| {
        let nsids = device.namespaces.iter().map(|ns| ns.nsid.to_string()).collect::<Vec<_>>();
        let bytes = device.namespaces.iter().map(|ns| ns.size_bytes).sum();
        let paths = || device.namespaces.iter().flat_map(|ns| &ns.paths);
        let live = paths().filter(|path| path.state == "live").count();
        vec![
            device.name.clone(),
            device.kind.clone(),
            device_state(device).to_owned(),
            daemon::size::show(bytes),
            nsids.join(","),
            format!("{live} of {}", paths().count()),
            device.queues.len().to_string(),
            device.in_flight.to_string(),
            device.counters.reads_total.to_string(),
            device.counters.writes_total.to_string(),
            device.counters.errors_total.to_string(),
            device.socket.clone(),
        ]
    };
    let headings = [
        "DEVICE",
        "TYPE",
        "STATE",
        "SIZE",
        "NSID",
        "PATHS",
        "QUEUES",
        "IN FLIGHT",
        "READS",
        "WRITES",
        "ERRORS",
        "SOCKET",
    ];
    table(&headings, &devices.iter().map(row).collect::<Vec<_>>())
}

pub(super) fn device(device: &Device) -> String {
    let mut text = String::new();
    let mut line = |key: &str, value: String| text.push_str(&format!("{key:<11}{value}\n"));
    line("device", format!("{}: {}, {}", device.name, device.kind, device_state(device)));
    line("socket", device.socket.clone());
    if let Some(problem) = &device.problem {
        line("problem", problem.clone());
    }
    for ns in &device.namespaces {
        let size = daemon::size::show(ns.size_bytes);
        let of = ns.volume.as_deref().unwrap_or(&ns.subnqn);
        let shown = if ns.is_shown { "" } else { ", not shown yet" };
        line(
            "namespace",
            format!("{} of {of}: {size}, UUID {}, serial {}{shown}", ns.nsid, ns.uuid, ns.serial),
        );
        for path in &ns.paths {
            let error = path.last_error.as_deref().map(|e| format!(": {e}")).unwrap_or_default();
            let (addr, state, losses) = (&path.addr, &path.state, path.losses);
            line("path", format!("{addr}: {state}, lost {losses} times{error}"));
        }
    }
    if device.follows {
        let withheld: Vec<String> = device.withheld.iter().map(u32::to_string).collect();
        let but = if withheld.is_empty() {
            String::new()
        } else {
            format!(", but {}", withheld.join(","))
        };
        line("follows", format!("namespaces of the subsystem{but}"));
    }
    for node in &device.discovery {
        let by = node.referred_by.as_deref().map(|by| format!(", by {by}")).unwrap_or_default();
        let error = node.last_error.as_deref().map(|e| format!(": {e}")).unwrap_or_default();
        let (addr, state, paths) = (&node.addr, &node.state, node.paths.len());
        line(
            "discovery",
            format!("{addr}{by}: {state}, entries {}, paths {paths}{error}", node.entries),
        );
        for left_out in &node.left_out {
            line("", format!("left out: {left_out}"));
        }
    }
    for queue in &device.queues {
        let broken = queue.broken.as_deref().map(|b| format!(", broken: {b}")).unwrap_or_default();
        let (core, entries, flying) = (queue.core, queue.entries, queue.in_flight);
        line(
            "queue",
            format!("{}: {entries} entries, core {core}, {flying} in flight{broken}", queue.index),
        );
    }
    let sum = &device.counters;
    line("reads", format!("{}, {}", sum.reads_total, daemon::size::show(sum.read_bytes_total)));
    line(
        "writes",
        format!("{}, {}", sum.writes_total, daemon::size::show(sum.written_bytes_total)),
    );
    line("others", sum.others_total.to_string());
    line("errors", sum.errors_total.to_string());
    line("interrupts", sum.interrupts_total.to_string());
    let us = |ns: Option<u64>| ns.map_or("-".to_owned(), |ns| format!("{:.1}", ns as f64 / 1e3));
    if sum.latency_mean_ns.is_some() {
        line(
            "latency",
            format!(
                "{} us mean, {} half, {} of 99 %, {} of 99.9 %, {} the longest",
                us(sum.latency_mean_ns),
                us(sum.latency_p50_ns),
                us(sum.latency_p99_ns),
                us(sum.latency_p999_ns),
                us(sum.latency_max_ns)
            ),
        );
    }
    text
}

pub(super) fn subsystems(subsystems: &[Subsystem]) -> String {
    let row = |subsystem: &Subsystem| {
        let ana = subsystem.ana.iter();
        let ana: Vec<_> = ana.map(|a| format!("{}/{}={}", a.port, a.group, a.state)).collect();
        vec![
            subsystem.name.clone(),
            subsystem.nqn.clone(),
            subsystem.serial.clone(),
            hosts_of(&subsystem.hosts),
            subsystem.counters.reads_total.to_string(),
            subsystem.counters.writes_total.to_string(),
            ana.join(" "),
        ]
    };
    let headings =
        ["SUBSYSTEM", "NQN", "SERIAL", "HOSTS", "READS", "WRITES", "ANA (PORT/GROUP=STATE)"];
    table(&headings, &subsystems.iter().map(row).collect::<Vec<_>>())
}

pub(super) fn hosts(associations: &[Association]) -> String {
    let row = |association: &Association| {
        vec![
            association.hostnqn.clone(),
            association.subnqn.clone(),
            association.cntlid.to_string(),
            association.port.to_string(),
            association.io_queues.to_string(),
            association.peer.clone().unwrap_or_else(|| "-".to_owned()),
            association.tls.clone().unwrap_or_else(|| "off".to_owned()),
            association.authenticated.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    };
    let headings =
        ["HOST", "SUBSYSTEM NQN", "CNTLID", "PORT", "I/O QUEUES", "FROM", "TLS", "AUTHENTICATED"];
    table(&headings, &associations.iter().map(row).collect::<Vec<_>>())
}

pub(super) fn keys(keys: &[Key]) -> String {
    let row = |key: &Key| {
        let kind = match key.kind {
            KeyKind::Tls => "tls",
            KeyKind::Dhchap => "dhchap",
            KeyKind::DhchapController => "dhchap-controller",
        };
        let end = match (key.expired, key.expires_s) {
            (true, _) => "expired".to_owned(),
            (false, None) => "never".to_owned(),
            (false, Some(at)) => format!("in {} s", at.saturating_sub(now_s())),
        };
        vec![
            key.id.clone(),
            kind.to_owned(),
            key.bits.to_string(),
            key.host.clone(),
            key.subsystem.clone().unwrap_or_else(|| "all".to_owned()),
            end,
        ]
    };
    let headings = ["KEY", "KIND", "BITS", "HOST", "SUBSYSTEM", "ENDS"];
    table(&headings, &keys.iter().map(row).collect::<Vec<_>>())
}

fn now_s() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn refusals(refusals: &[Refusal], total: u64) -> String {
    let row = |refusal: &Refusal| {
        vec![
            format!("{} s ago", now_s().saturating_sub(refusal.at_s)),
            refusal.peer.clone(),
            refusal.port.to_string(),
            refusal.why.clone(),
        ]
    };
    let rows: Vec<_> = refusals.iter().rev().take(REFUSALS_SHOWN).map(row).collect();
    let shown =
        if total > rows.len() as u64 { format!(" (the last of {total})") } else { String::new() };
    table(&["REFUSED", "FROM", "PORT", &format!("WHY{shown}")], &rows)
}

/// Refusals in the status for people; the JSON has more.
const REFUSALS_SHOWN: usize = 10;

pub(super) fn referrals(referrals: &[Referral]) -> String {
    let row = |referral: &Referral| vec![referral.addr.clone(), referral.nqn.clone()];
    table(&["REFERRAL", "NQN"], &referrals.iter().map(row).collect::<Vec<_>>())
}

pub(super) fn status(status: &Status) -> String {
    let mut text = format!(
        "penstock {}, up {} s, start {} ({} without an orderly stop before it); changes {}\n\
         discovery subsystem {}\n\n",
        status.program,
        status.uptime_s,
        status.power.power_cycles,
        status.power.unsafe_shutdowns,
        if status.kept { "survive a restart" } else { "are lost at a restart: no --data" },
        status.discovery_nqn,
    );
    let ports = status.ports.iter().map(|port| {
        let kind = match port.kind {
            api::PortKind::Io => "io",
            api::PortKind::Discovery => "discovery",
            api::PortKind::Unknown => "unknown",
        };
        vec![
            port.portid.to_string(),
            kind.to_owned(),
            port.listen.clone(),
            port.advertise.clone(),
            port.tls.clone(),
        ]
    });
    text += &table(
        &["PORT", "KIND", "LISTENS AT", "HOSTS ARE TOLD", "TLS"],
        &ports.collect::<Vec<_>>(),
    );
    text.push('\n');
    text += &subsystems(&status.subsystems);
    text.push('\n');
    text += &volumes(&status.volumes);
    text.push('\n');
    text += &hosts(&status.associations);
    if !status.referrals.is_empty() {
        text.push('\n');
        text += &referrals(&status.referrals);
    }
    if status.refusals_total != 0 {
        text.push('\n');
        text += &refusals(&status.refusals, status.refusals_total);
    }
    let hit = status.limits.iter().filter(|limit| limit.hit_total != 0).map(|limit| {
        let used = limit.used.map_or_else(|| "-".to_owned(), |used| used.to_string());
        vec![limit.name.clone(), limit.limit.to_string(), used, limit.hit_total.to_string()]
    });
    let hit: Vec<_> = hit.collect();
    if !hit.is_empty() {
        text.push('\n');
        text += &table(&["LIMIT THAT WAS HIT", "BOUND", "IN USE", "TIMES"], &hit);
    }
    text
}

pub(super) fn done(done: &Done) -> String {
    let mut text = String::new();
    if let Some(volume) = &done.volume {
        text += &volumes(std::slice::from_ref(volume));
    }
    if let Some(subsystem) = &done.subsystem {
        text += &subsystems(std::slice::from_ref(subsystem));
    }
    if let Some(ended) = done.ended {
        _ = writeln!(text, "{ended} associations ended");
    }
    if text.is_empty() {
        text.push_str("done\n");
    }
    for notice in &done.notices {
        _ = writeln!(text, "{notice}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".to_owned(), "1".to_owned(), "x".to_owned()],
            vec!["long".to_owned(), "22".to_owned(), String::new()],
        ];
        assert_eq!(table(&["N", "V", "W"], &rows), "N     V   W\na     1   x\nlong  22\n");
    }

    #[test]
    fn nobody_and_everybody_look_different() {
        assert_eq!(hosts_of(&None), "all");
        assert_eq!(hosts_of(&Some(Vec::new())), "none");
        assert_eq!(hosts_of(&Some(vec!["a".to_owned(), "b".to_owned()])), "a,b");
    }
}
