//! Processors: how many, whose threads, how they are clocked and how deep they sleep.

use std::collections::{BTreeMap, BTreeSet};

use super::tree::{Tree, list};
use super::{Finding, Level, Machine, Write};

const CPUS: &str = "sys/devices/system/cpu";
const NODES: &str = "sys/devices/system/node";

/// Idle states that take longer to leave than this are felt: a request at depth 1 takes 8 to 30 us.
const EXIT_US_MAX: i64 = 20;

/// Most cores that a role takes by itself (see [`crate::cores::default_count`]).
const CORES_DEFAULT_MAX: usize = 4;

/// Processors that are online.
pub(super) fn online(tree: &Tree) -> Vec<usize> {
    match tree.raw(&format!("{CPUS}/online")).map(|text| list(&text)) {
        Some(cpus) if !cpus.is_empty() => cpus,
        _ => tree.numbered(CPUS, "cpu").into_iter().map(|(_, number)| number).collect(),
    }
}

/// Cores the processors are threads of.
pub(super) fn cores(tree: &Tree) -> usize {
    let firsts: BTreeSet<usize> = online(tree)
        .into_iter()
        .map(|cpu| {
            let siblings = tree.raw(&format!("{CPUS}/cpu{cpu}/topology/thread_siblings_list"));
            siblings.and_then(|text| list(&text).first().copied()).unwrap_or(cpu)
        })
        .collect();
    firsts.len()
}

/// Nodes that have processors, with these.
pub(super) fn nodes(tree: &Tree) -> Vec<(usize, Vec<usize>)> {
    tree.numbered(NODES, "node")
        .into_iter()
        .filter_map(|(name, number)| {
            let cpus = list(&tree.raw(&format!("{NODES}/{name}/cpulist"))?);
            (!cpus.is_empty()).then_some((number, cpus))
        })
        .collect()
}

/// Whether there is a hypervisor that does not hide.
pub(super) fn is_virtual(tree: &Tree) -> bool {
    let info = tree.raw("proc/cpuinfo").unwrap_or_default();
    tree.exists("sys/hypervisor/type")
        || info
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|flag| flag == "hypervisor"))
}

pub(super) fn look(tree: &Tree, machine: &Machine, findings: &mut Vec<Finding>) {
    findings.push(count(machine));
    findings.extend(quota(tree));
    findings.push(governor(tree, machine));
    findings.push(idle(tree, machine));
    findings.push(clocksource(tree));
}

fn count(machine: &Machine) -> Finding {
    let Machine { cpus, cores, .. } = *machine;
    let current = format!("{cpus} on {cores} cores");
    if cpus == 0 {
        return Finding::new("processors", Level::Absent, "none could be read");
    }
    if cpus == 1 {
        return Finding::new("processors", Level::Consider, "1").wanted("2 or more").because(
            "the data path polls for some microseconds before it sleeps; with one processor it \
             takes them from everything else, the other end of a loopback connection above all",
        );
    }
    // Two polling threads on one core take turns in its units.
    if cores < cpus && cores < CORES_DEFAULT_MAX.min(cpus) {
        return Finding::new("processors", Level::Consider, current)
            .wanted(format!("a data path thread for each core: --cores {cores}"))
            .because(format!(
                "without --cores there is one for each processor up to {CORES_DEFAULT_MAX}, and \
                 two threads of one core that both poll slow each other down"
            ))
            .command(format!("penstock target --cores {cores} ..."));
    }
    Finding::new("processors", Level::Good, current)
}

/// A container's share of processor time, in its own and all folders above it.
fn quota(tree: &Tree) -> Option<Finding> {
    let groups = tree.raw("proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut parts: Vec<&str> = own.split('/').filter(|part| !part.is_empty()).collect();
    if parts.contains(&"..") {
        return None;
    }
    loop {
        let folder = [&["sys/fs/cgroup"][..], &parts].concat().join("/");
        let text = tree.text(&format!("{folder}/cpu.max"));
        let limited = text.filter(|text| text.split(' ').next().is_some_and(|max| max != "max"));
        if let Some(text) = limited {
            return Some(
                Finding::new("processor time of the control group", Level::Consider, text)
                    .wanted("max")
                    .because(
                        "a thread that has used up its share stands still until the period ends \
                         (cpu.max: microseconds per period); polling uses it up sooner",
                    )
                    .command(
                        "penstock: CPUQuota= empty in the service, --cpus left out for a container",
                    ),
            );
        }
        parts.pop()?;
    }
}

fn governor(tree: &Tree, machine: &Machine) -> Finding {
    let mut by_value: BTreeMap<String, usize> = BTreeMap::new();
    let mut writes = Vec::new();
    let mut is_offered = true;
    for cpu in online(tree) {
        let folder = format!("{CPUS}/cpu{cpu}/cpufreq");
        let path = format!("{folder}/scaling_governor");
        let Some(value) = tree.text(&path) else { continue };
        let offered = tree.text(&format!("{folder}/scaling_available_governors"));
        is_offered &= offered.is_none_or(|all| all.split(' ').any(|name| name == "performance"));
        if value != "performance" {
            writes.push(Write { path, old: value.clone(), new: "performance".into() });
        }
        *by_value.entry(value).or_default() += 1;
    }
    if by_value.is_empty() {
        return Finding::new("CPU governor", Level::Absent, "none").because(
            if machine.is_virtual {
                "the hypervisor sets the clock: look there"
            } else {
                "firmware sets the clock: choose its performance profile"
            },
        );
    }
    let current = summary(&by_value);
    if writes.is_empty() {
        return Finding::new("CPU governor", Level::Good, current);
    }
    let reason = "a core that has slept between requests starts at a low clock, and a request at \
                  depth 1 is over before the governor has raised it";
    let finding = Finding::new("CPU governor", Level::Change, current)
        .wanted("performance")
        .because(reason)
        .command(format!("echo performance | tee /{CPUS}/cpu*/cpufreq/scaling_governor"));
    if is_offered {
        finding.writes(writes)
    } else {
        Finding { level: Level::Consider, command: None, ..finding }
            .because(format!("{reason}; this driver does not offer the performance governor"))
    }
}

fn idle(tree: &Tree, machine: &Machine) -> Finding {
    let mut deep: BTreeMap<String, usize> = BTreeMap::new();
    let mut writes = Vec::new();
    let mut seen = 0;
    for cpu in online(tree) {
        let folder = format!("{CPUS}/cpu{cpu}/cpuidle");
        for (state, _) in tree.numbered(&folder, "state") {
            let Some(exit_us) = tree.number(&format!("{folder}/{state}/latency")) else { continue };
            seen += 1;
            let path = format!("{folder}/{state}/disable");
            if exit_us <= EXIT_US_MAX || tree.number(&path) != Some(0) {
                continue;
            }
            let name = tree.text(&format!("{folder}/{state}/name")).unwrap_or(state);
            *deep.entry(format!("{name} ({exit_us} us)")).or_default() += 1;
            writes.push(Write { path, old: "0".into(), new: "1".into() });
        }
    }
    if seen == 0 {
        return Finding::new("CPU idle states", Level::Absent, "none").because(
            if machine.is_virtual { "the hypervisor decides how a processor sleeps" } else { "" },
        );
    }
    if deep.is_empty() {
        return Finding::new(
            "CPU idle states",
            Level::Good,
            format!("none in use takes longer than {EXIT_US_MAX} us to leave"),
        );
    }
    // It costs power on all the machine: the operator says so.
    Finding::new("CPU idle states", Level::Change, format!("in use: {}", summary(&deep)))
        .wanted(format!("none that takes longer than {EXIT_US_MAX} us to leave"))
        .because(
            "a core without work sleeps after some microseconds of polling; what it takes to wake \
             is added to the next request. Costs power: a core without work draws more",
        )
        .command(format!(
            "for s in /{CPUS}/cpu*/cpuidle/state*; do [ $(cat $s/latency) -le {EXIT_US_MAX} ] || \
             echo 1 > $s/disable; done"
        ))
        .writes(writes)
}

fn clocksource(tree: &Tree) -> Finding {
    const FOLDER: &str = "sys/devices/system/clocksource/clocksource0";
    let path = format!("{FOLDER}/current_clocksource");
    let Some(current) = tree.text(&path) else {
        return Finding::new("clock source", Level::Absent, "none could be read");
    };
    let slow = ["hpet", "acpi_pm", "pit", "refined-jiffies", "jiffies", "xen"];
    if !slow.contains(&current.as_str()) {
        return Finding::new("clock source", Level::Good, current);
    }
    let offered = tree.text(&format!("{FOLDER}/available_clocksource")).unwrap_or_default();
    let reason = "each turn of a core and each measurement reads the clock; this one is a system \
                  call or a device access of a microsecond or more, the processor's own 25 ns";
    let finding =
        Finding::new("clock source", Level::Change, current.clone()).wanted("tsc").because(reason);
    if offered.split(' ').any(|name| name == "tsc") {
        finding.writes(vec![Write { path, old: current, new: "tsc".into() }])
    } else {
        Finding { level: Level::Consider, ..finding }.because(format!(
            "{reason}; the kernel does not offer tsc: `dmesg | grep -i tsc` tells why it was given \
             up"
        ))
    }
}

/// `powersave on 4, performance on 2`.
fn summary(by_value: &BTreeMap<String, usize>) -> String {
    let parts: Vec<String> =
        by_value.iter().map(|(value, count)| format!("{value} on {count}")).collect();
    parts.join(", ")
}
