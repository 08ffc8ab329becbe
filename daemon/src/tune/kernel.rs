//! The kernel: its version, io_uring, limits of a process, memory.

use super::tree::{Tree, chosen};
use super::{Finding, Level, Write};

/// The oldest kernel the ring needs.
const OLDEST: (u32, u32) = (6, 1);

/// What newer kernels give: used where it is there.
const NEWER: &[((u32, u32), &str)] = &[
    ((6, 6), "rings without an index array (6.6)"),
    ((6, 12), "receive buffers used up piece by piece, for many connections (6.12)"),
];

/// What four cores of a target lock: 16 MiB of pool each, and rings.
const MEMLOCK_BYTES: u64 = 128 << 20;

/// Connections that a target takes, 4,096, two times over: sockets, files of volumes, the rest.
const NOFILE: u64 = 8192;

const CAP_IPC_LOCK: u64 = 1 << 14;

pub(super) fn look(tree: &Tree, findings: &mut Vec<Finding>) {
    findings.push(version(tree));
    findings.push(io_uring(tree));
    findings.extend(seccomp(tree));
    let limits = tree.raw("proc/self/limits").unwrap_or_default();
    findings.push(memlock(tree, &limits));
    findings.push(nofile(&limits));
    findings.push(hugepages(tree));
    findings.extend(defrag(tree));
}

/// Major and minor number of a release such as `6.18.44-cloud`.
fn numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn version(tree: &Tree) -> Finding {
    let release = tree.text("proc/sys/kernel/osrelease");
    let Some((release, found)) = release.and_then(|text| Some((text.clone(), numbers(&text)?)))
    else {
        return Finding::new("kernel", Level::Absent, "no release could be read");
    };
    if found < OLDEST {
        return Finding::new("kernel", Level::Change, release)
            .wanted("6.1 or later")
            .because("the data path's ring needs flags of Linux 6.1: nothing starts without them");
    }
    let missing: Vec<&str> =
        NEWER.iter().filter(|(since, _)| found < *since).map(|(_, what)| *what).collect();
    if missing.is_empty() {
        return Finding::new("kernel", Level::Good, release);
    }
    Finding::new("kernel", Level::Consider, release).wanted("6.12 or later").because(format!(
        "a newer kernel has what is used where it is there: {}",
        missing.join(", ")
    ))
}

fn io_uring(tree: &Tree) -> Finding {
    let path = "proc/sys/kernel/io_uring_disabled".to_owned();
    let about = "kernel.io_uring_disabled";
    match tree.number(&path) {
        // Before 6.6 there is no such switch.
        None => Finding::new(about, Level::Absent, "no such switch").because("io_uring is allowed"),
        Some(0) => Finding::new(about, Level::Good, "0, everyone may use io_uring"),
        Some(now) => {
            let who = if now == 1 { "1, root and one group only" } else { "nobody may use it" };
            Finding::new(about, Level::Change, who)
                .wanted("0")
                .because(
                    "all network and file I/O goes through io_uring; where another service's \
                     safety asks for it keep 1 and put Penstock's group into kernel.io_uring_group",
                )
                .writes(vec![Write { path, old: now.to_string(), new: "0".into() }])
        }
    }
}

/// Value of a line `Name:\tvalue` of `/proc/self/status`.
fn status(tree: &Tree, name: &str) -> Option<String> {
    let text = tree.raw("proc/self/status")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

fn seccomp(tree: &Tree) -> Option<Finding> {
    let mode = status(tree, "Seccomp")?;
    if mode != "2" {
        return Some(Finding::new("system call filter", Level::Good, "none"));
    }
    Some(
        Finding::new("system call filter", Level::Consider, "this process is under one")
            .wanted("one that allows io_uring_setup, io_uring_enter and io_uring_register")
            .because(
                "usual filters of containers forbid io_uring; `penstock bench null:1MiB --runtime \
                 1` tells at once whether this one does",
            )
            .command("docker run --security-opt seccomp=PROFILE.json ..."),
    )
}

/// Soft limit of a line of `/proc/self/limits`; `None` inside is no limit.
fn soft(limits: &str, name: &str) -> Option<Option<u64>> {
    let word =
        limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    if word == "unlimited" { Some(None) } else { word.parse().ok().map(Some) }
}

fn memlock(tree: &Tree, limits: &str) -> Finding {
    let about = "limit on locked memory";
    let capabilities = status(tree, "CapEff")
        .and_then(|text| u64::from_str_radix(&text, 16).ok())
        .unwrap_or_default();
    match soft(limits, "Max locked memory") {
        None => Finding::new(about, Level::Absent, "could not be read"),
        Some(None) => Finding::new(about, Level::Good, "none"),
        Some(Some(bytes)) if bytes >= MEMLOCK_BYTES => {
            Finding::new(about, Level::Good, format!("{} MiB", bytes >> 20))
        }
        Some(Some(bytes)) if capabilities & CAP_IPC_LOCK != 0 => {
            Finding::new(about, Level::Good, format!("{} MiB", bytes >> 20))
                .because("it does not bind this user (CAP_IPC_LOCK)")
        }
        Some(Some(bytes)) => Finding::new(about, Level::Change, format!("{} MiB", bytes >> 20))
            .wanted(format!("{} MiB or more", MEMLOCK_BYTES >> 20))
            .because(
                "a core locks its ring and 16 MiB of its buffers, which saves a page lookup \
                     per file I/O; without them it is slower, without the ring it does not start",
            )
            .command("ulimit -l unlimited        (in a service: LimitMEMLOCK=infinity)"),
    }
}

fn nofile(limits: &str) -> Finding {
    let about = "limit on open files";
    match soft(limits, "Max open files") {
        None => Finding::new(about, Level::Absent, "could not be read"),
        Some(None) => Finding::new(about, Level::Good, "none"),
        Some(Some(count)) if count >= NOFILE => Finding::new(about, Level::Good, count.to_string()),
        Some(Some(count)) => Finding::new(about, Level::Change, count.to_string())
            .wanted(format!("{NOFILE} or more"))
            .because(
                "each connection is an open file, and a target takes 4,096 of them: a host opens \
                 one for each of its processors",
            )
            .command(format!("ulimit -n {NOFILE}        (in a service: LimitNOFILE={NOFILE})")),
    }
}

const THP: &str = "sys/kernel/mm/transparent_hugepage";

fn hugepages(tree: &Tree) -> Finding {
    let about = "transparent hugepages";
    let Some(text) = tree.text(&format!("{THP}/enabled")) else {
        return Finding::new(about, Level::Absent, "none in this kernel");
    };
    match chosen(&text) {
        Some("never") => Finding::new(about, Level::Consider, "never").wanted("madvise").because(
            "Penstock asks for none, but the memory of a guest beside it (QEMU) is faster to reach \
             with them",
        )
        .command(format!("echo madvise > /{THP}/enabled")),
        Some(now) => Finding::new(about, Level::Good, now),
        None => Finding::new(about, Level::Absent, "could not be read"),
    }
}

/// What a page fault does to find a huge page.
fn defrag(tree: &Tree) -> Option<Finding> {
    let path = format!("{THP}/defrag");
    let text = tree.text(&path)?;
    let now = chosen(&text)?;
    if now != "always" {
        return Some(Finding::new("transparent hugepages, defrag", Level::Good, now));
    }
    Some(
        Finding::new("transparent hugepages, defrag", Level::Change, now)
            .wanted("madvise")
            .because(
                "the first touch of memory may wait for the kernel to move other memory out of \
                 the way: milliseconds within a request",
            )
            .writes(vec![Write { path, old: now.to_owned(), new: "madvise".into() }]),
    )
}
