//! The network: what TCP may use, and the interfaces with hardware behind them.

use std::collections::BTreeSet;

use super::tree::{Tree, list};
use super::{Finding, Level, Machine, Write, counted, cpu};

const NICS: &str = "sys/class/net";

/// Interfaces that are looked at.
const NICS_MAX: usize = 32;

/// Interrupts of an interface that are looked at.
const IRQS_MAX: usize = 1024;

/// Rate that buffers are to bear if no interface tells its own, in Mbit/s.
const SPEED_DEFAULT_MBPS: u64 = 10_000;

/// Round trip that buffers are to bear at that rate: a data centre's with queues on the way.
const ROUND_TRIP_US: u64 = 500;

/// What the kernel itself takes on a machine with memory: never ask for less.
const RMEM_MIN_BYTES: u64 = 6 << 20;
const WMEM_MIN_BYTES: u64 = 4 << 20;

/// From this rate on, the cost of a packet is felt.
const JUMBO_MBPS: u64 = 10_000;

/// Threads that serve connections, unless told otherwise.
const CORES_DEFAULT_MAX: usize = 4;

struct Nic {
    name: String,
    /// In Mbit/s, where the driver tells.
    speed: Option<u64>,
    node: Option<usize>,
}

pub(super) fn look(tree: &Tree, machine: &Machine, findings: &mut Vec<Finding>) {
    let nics = nics(tree);
    let fastest = nics.iter().filter_map(|nic| nic.speed).max().unwrap_or(SPEED_DEFAULT_MBPS);
    findings.push(buffer(tree, "rmem", RMEM_MIN_BYTES, fastest));
    findings.push(buffer(tree, "wmem", WMEM_MIN_BYTES, fastest));
    findings.push(core_max(tree));
    for (name, wanted, reason) in SWITCHES {
        findings.extend(switch(tree, name, *wanted, reason));
    }
    if nics.is_empty() {
        findings.push(
            Finding::new("network interfaces", Level::Absent, "none that is up has hardware")
                .because("loopback and virtual ones have nothing to set"),
        );
    }
    let nodes = cpu::nodes(tree);
    for nic in &nics {
        findings.push(speed(nic));
        findings.push(mtu(tree, nic));
        findings.push(queues(tree, machine, nic));
        findings.extend(spread(tree, machine, nic));
        findings.extend(interrupts(tree, machine, nic, &nodes));
        findings.extend(node(nic, &nodes));
    }
}

fn nics(tree: &Tree) -> Vec<Nic> {
    tree.names(NICS)
        .into_iter()
        .filter(|name| tree.exists(&format!("{NICS}/{name}/device")))
        .filter(|name| tree.text(&format!("{NICS}/{name}/operstate")).is_none_or(|s| s == "up"))
        .take(NICS_MAX)
        .map(|name| {
            let read = |file: &str| tree.number(&format!("{NICS}/{name}/{file}"));
            // -1 is unknown.
            let speed = read("speed").and_then(|mbps| u64::try_from(mbps).ok()).filter(|s| *s > 0);
            let node = read("device/numa_node").and_then(|node| usize::try_from(node).ok());
            Nic { speed, node, name }
        })
        .collect()
}

fn buffer(tree: &Tree, which: &str, least: u64, mbps: u64) -> Finding {
    let path = format!("proc/sys/net/ipv4/tcp_{which}");
    let about = format!("net.ipv4.tcp_{which}");
    let Some(text) = tree.text(&path) else {
        return Finding::new(about, Level::Absent, "could not be read");
    };
    let numbers: Vec<u64> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
    let &[min, default, max] = numbers.as_slice() else {
        return Finding::new(about, Level::Absent, format!("not three numbers: {text}"));
    };
    // Mbit/s times microseconds is bits; twice, since half of a buffer is bookkeeping.
    let in_flight = mbps.saturating_mul(ROUND_TRIP_US) / 8;
    let wanted = (2 * in_flight).max(least).next_power_of_two().min(256 << 20);
    // A power of two is a choice, the need is below it.
    if max >= (2 * in_flight).min(256 << 20).max(least) {
        return Finding::new(about, Level::Good, text);
    }
    Finding::new(about, Level::Change, text.clone())
        .wanted(format!("{min} {default} {wanted}"))
        .because(format!(
            "the kernel grows a connection's buffer up to the third number; {mbps} Mbit/s and \
             {ROUND_TRIP_US} us there and back need {} KiB in flight, and as much again for the \
             kernel's bookkeeping",
            in_flight >> 10
        ))
        .writes(vec![Write { path, old: text, new: format!("{min} {default} {wanted}") }])
}

/// The other pair of limits, which many guides raise.
fn core_max(tree: &Tree) -> Finding {
    let read = |name: &str| tree.text(&format!("proc/sys/net/core/{name}"));
    let about = "net.core.rmem_max, wmem_max";
    match (read("rmem_max"), read("wmem_max")) {
        (Some(receive), Some(send)) => {
            Finding::new(about, Level::Good, format!("{receive}, {send}")).because(
                "without effect on Penstock and the kernel's host: they leave the size of their \
                 buffers to the kernel",
            )
        }
        _ => Finding::new(about, Level::Absent, "could not be read"),
    }
}

/// Switches of TCP: name, wanted value, why.
const SWITCHES: &[(&str, i64, &str)] = &[
    (
        "tcp_slow_start_after_idle",
        0,
        "a connection that was idle for a fifth of a second starts slowly again; the load of \
         disks comes in bursts",
    ),
    (
        "tcp_window_scaling",
        1,
        "without it at most 64 KiB are under way on a connection, half of one large request",
    ),
    ("tcp_sack", 1, "without it one lost packet costs the retransmission of all that followed it"),
    (
        "tcp_timestamps",
        1,
        "without them the round trip is measured seldom, and sequence numbers of a fast connection \
         wrap around within seconds",
    ),
];

fn switch(tree: &Tree, name: &str, wanted: i64, reason: &str) -> Option<Finding> {
    let path = format!("proc/sys/net/ipv4/{name}");
    let now = tree.number(&path)?;
    let about = format!("net.ipv4.{name}");
    let is_right = now == wanted || (wanted == 1 && now > 1);
    if is_right {
        return Some(Finding::new(about, Level::Good, now.to_string()));
    }
    let write = Write { path, old: now.to_string(), new: wanted.to_string() };
    Some(
        Finding::new(about, Level::Change, now.to_string())
            .wanted(wanted.to_string())
            .because(reason)
            .writes(vec![write]),
    )
}

fn speed(nic: &Nic) -> Finding {
    let about = format!("{} speed", nic.name);
    match nic.speed {
        None => Finding::new(about, Level::Absent, "unknown")
            .because("the driver does not tell, as those of virtual machines do"),
        Some(mbps) => {
            // 4 KiB, 24 bytes of PDU header, and 3 packets' headers and gaps of 78 bytes.
            let iops = mbps * 1_000_000 / 8 / (4096 + 24 + 3 * 78);
            let current = format!("{mbps} Mbit/s");
            let reason = format!(
                "at most {:.1} MB/s or {} thousand 4 KiB requests a second each way",
                mbps as f64 / 8.0 * 0.95,
                iops / 1000
            );
            let level = if mbps < JUMBO_MBPS { Level::Consider } else { Level::Good };
            let finding = Finding::new(about, level, current).because(reason);
            if level == Level::Good { finding } else { finding.wanted("10 Gbit/s or more") }
        }
    }
}

fn mtu(tree: &Tree, nic: &Nic) -> Finding {
    let about = format!("{} MTU", nic.name);
    let Some(now) = tree.number(&format!("{NICS}/{}/mtu", nic.name)) else {
        return Finding::new(about, Level::Absent, "could not be read");
    };
    if now >= 4500 || nic.speed.is_none_or(|mbps| mbps < JUMBO_MBPS) {
        return Finding::new(about, Level::Good, now.to_string()).because(if now >= 4500 {
            "a block of 4 KiB and its header fit into one packet"
        } else {
            "larger packets pay from 10 Gbit/s on"
        });
    }
    Finding::new(about, Level::Consider, now.to_string())
        .wanted("9000")
        .because(
            "4 KiB takes three packets instead of one. Everything on the way, switches and the \
             other ends, has to be set to it first, or connections stall: not done by --apply",
        )
        .command(format!("ip link set dev {} mtu 9000", nic.name))
}

fn queue_count(tree: &Tree, nic: &Nic, prefix: &str) -> usize {
    tree.numbered(&format!("{NICS}/{}/queues", nic.name), prefix).len()
}

fn queues(tree: &Tree, machine: &Machine, nic: &Nic) -> Finding {
    let (receive, send) = (queue_count(tree, nic, "rx-"), queue_count(tree, nic, "tx-"));
    let about = format!("{} queues", nic.name);
    let current = format!("{receive} to receive, {send} to send");
    if receive == 0 {
        return Finding::new(about, Level::Absent, "could not be read");
    }
    let wanted = machine.cpus.clamp(1, CORES_DEFAULT_MAX);
    if receive >= wanted && send >= wanted {
        return Finding::new(about, Level::Good, current);
    }
    Finding::new(about, Level::Consider, current)
        .wanted(format!("{wanted} or more of each"))
        .because(format!(
            "each queue's packets are handled on one processor; {} serve connections. `ethtool -l \
             {}` tells what the device has; in a virtual machine the hypervisor gives queues",
            counted(wanted, "thread"),
            nic.name
        ))
        .command(format!("ethtool -L {} combined {wanted}", nic.name))
}

/// One receive queue: packets can be spread over processors by software.
fn spread(tree: &Tree, machine: &Machine, nic: &Nic) -> Option<Finding> {
    if machine.cpus < 3 || queue_count(tree, nic, "rx-") != 1 {
        return None;
    }
    let path = format!("{NICS}/{}/queues/rx-0/rps_cpus", nic.name);
    let now = tree.text(&path)?;
    if now.chars().any(|c| !"0,".contains(c)) {
        return Some(Finding::new(format!("{} RPS", nic.name), Level::Good, now));
    }
    let mask = mask(&cpu::online(tree));
    Some(
        Finding::new(format!("{} RPS", nic.name), Level::Consider, "off")
            .wanted(mask.clone())
            .because(
                "all packets are handled on the processor of the one receive queue's interrupt; \
                 Receive Packet Steering spreads connections over the others. Costs an interrupt \
                 between processors per burst: pays with several connections",
            )
            .command(format!("echo {mask} > /{path}")),
    )
}

/// A mask of processors as the kernel writes it: words of 32, the highest first.
fn mask(cpus: &[usize]) -> String {
    let words = cpus.iter().max().map_or(1, |last| last / 32 + 1);
    let mut mask = vec![0_u32; words];
    for cpu in cpus {
        mask[cpu / 32] |= 1 << (cpu % 32);
    }
    let (first, rest) = (mask[words - 1], mask[..words - 1].iter().rev());
    let mut text = format!("{first:x}");
    rest.for_each(|word| text.push_str(&format!(",{word:08x}")));
    text
}

/// Where the interrupts of a device with several queues go.
fn interrupts(
    tree: &Tree,
    machine: &Machine,
    nic: &Nic,
    nodes: &[(usize, Vec<usize>)],
) -> Option<Finding> {
    // A virtio device's interrupts are those of the PCI function it is on.
    let folders = ["device/msi_irqs", "device/../msi_irqs"];
    let mut numbers: Vec<String> = folders
        .iter()
        .map(|folder| tree.names(&format!("{NICS}/{}/{folder}", nic.name)))
        .find(|names| !names.is_empty())?;
    numbers.retain(|name| name.chars().all(|c| c.is_ascii_digit()));
    numbers.truncate(IRQS_MAX);
    let near = |cpu: &usize| {
        let own = nodes.iter().find(|(number, _)| Some(*number) == nic.node);
        own.is_none_or(|(_, cpus)| cpus.contains(cpu))
    };
    let targets: Vec<(String, usize)> = numbers
        .into_iter()
        .filter_map(|irq| {
            let read = |file: &str| tree.raw(&format!("proc/irq/{irq}/{file}"));
            let text = read("effective_affinity_list").filter(|text| !text.trim().is_empty());
            let cpu = *list(&text.or_else(|| read("smp_affinity_list"))?).first()?;
            Some((irq, cpu))
        })
        .collect();
    let receive = queue_count(tree, nic, "rx-");
    if receive < 2 || machine.cpus < 2 || targets.len() < 2 {
        return None;
    }
    let about = format!("{} interrupts", nic.name);
    let hit: BTreeSet<usize> = targets.iter().map(|(_, cpu)| *cpu).collect();
    let far = hit.iter().filter(|cpu| !near(cpu)).count();
    let current = format!("{} on {}", targets.len(), counted(hit.len(), "processor"));
    let candidates: Vec<usize> = cpu::online(tree).into_iter().filter(near).collect();
    let enough = receive.min(candidates.len()).min(CORES_DEFAULT_MAX);
    if (hit.len() >= enough && far == 0) || candidates.is_empty() {
        return Some(Finding::new(about, Level::Good, current));
    }
    let writes: Vec<Write> = targets
        .iter()
        .zip(candidates.iter().cycle())
        .filter_map(|((irq, _), cpu)| {
            let path = format!("proc/irq/{irq}/smp_affinity_list");
            let old = tree.text(&path)?;
            let new = cpu.to_string();
            (old != new).then_some(Write { path, old, new })
        })
        .collect();
    let place = if far == 0 { "" } else { ", some of another NUMA node than the device" };
    Some(
        Finding::new(about, Level::Change, format!("{current}{place}"))
            .wanted(format!("one processor after the other of {}", shown(&candidates)))
            .because(
                "packets are handled where their queue's interrupt goes; several queues on one \
                 processor are no better than one queue. A running irqbalance sets them anew",
            )
            .writes(writes),
    )
}

/// A short form of a list of processors.
fn shown(cpus: &[usize]) -> String {
    match cpus {
        [] => "none".into(),
        [first, .., last] if last - first + 1 == cpus.len() => format!("{first}-{last}"),
        _ => cpus.iter().take(16).map(ToString::to_string).collect::<Vec<_>>().join(","),
    }
}

fn node(nic: &Nic, nodes: &[(usize, Vec<usize>)]) -> Option<Finding> {
    if nodes.len() < 2 {
        return None;
    }
    let about = format!("{} NUMA node", nic.name);
    Some(match nic.node {
        None => Finding::new(about, Level::Absent, "unknown"),
        Some(number) => Finding::new(about, Level::Consider, number.to_string())
            .wanted(format!("the data path on node {number}"))
            .because(
                "memory and packets cross the link between sockets otherwise: up to a third of the \
                 bandwidth. Of several interfaces take the one that hosts come through",
            )
            .command(format!(
                "numactl --cpunodebind={number} --membind={number} penstock target ..."
            )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_written_as_the_kernel_does() {
        assert_eq!(mask(&[0, 1, 3]), "b");
        assert_eq!(mask(&[0, 33]), "2,00000001");
        assert_eq!(mask(&[]), "0");
        assert_eq!(mask(&[64, 31]), "1,00000000,80000000");
    }

    #[test]
    fn processors_are_shown_short() {
        assert_eq!(shown(&[0, 1, 2, 3]), "0-3");
        assert_eq!(shown(&[0, 2]), "0,2");
        assert_eq!(shown(&[5]), "5");
    }
}
