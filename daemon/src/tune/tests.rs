//! Surveys of made-up machines.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;

/// A machine that is made up file by file.
struct Made {
    folder: tempfile::TempDir,
}

impl Made {
    fn new() -> Made {
        Made { folder: tempfile::tempdir().unwrap() }
    }

    fn root(&self) -> &Path {
        self.folder.path()
    }

    fn file(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    fn put(&self, path: &str, content: impl AsRef<[u8]>) -> &Made {
        let path = self.file(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }

    fn dir(&self, path: &str) -> &Made {
        fs::create_dir_all(self.file(path)).unwrap();
        self
    }

    fn survey(&self) -> Survey {
        Survey::of(self.root())
    }

    fn finding(&self, about: &str) -> Finding {
        let survey = self.survey();
        let found = survey.findings.iter().find(|finding| finding.about == about);
        found.unwrap_or_else(|| panic!("no finding {about:?} in\n{survey}")).clone()
    }

    fn says(&self, path: &str) -> String {
        fs::read_to_string(self.file(path)).unwrap()
    }
}

/// A server with two sockets of two cores with two threads each, a NIC and an NVMe disk, all set
/// badly.
fn server() -> Made {
    let made = Made::new();
    made.put("proc/sys/kernel/osrelease", "6.8.0-31-generic\n")
        .put("proc/sys/kernel/io_uring_disabled", "2\n")
        .put("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\nSeccomp:\t2\n")
        .put(
            "proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max open files            1024                 1048576              files     \n\
             Max locked memory         8388608              8388608              bytes     \n",
        )
        .put("proc/self/cgroup", "0::/a.slice/b.service\n")
        .put("sys/fs/cgroup/a.slice/cpu.max", "150000 100000\n")
        .put("sys/fs/cgroup/a.slice/b.service/cpu.max", "max 100000\n")
        .put("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456\n")
        .put("proc/sys/net/ipv4/tcp_wmem", "4096\t16384\t4194304\n")
        .put("proc/sys/net/core/rmem_max", "212992\n")
        .put("proc/sys/net/core/wmem_max", "212992\n")
        .put("proc/sys/net/ipv4/tcp_slow_start_after_idle", "1\n")
        .put("proc/sys/net/ipv4/tcp_sack", "1\n")
        .put("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
        .put("sys/kernel/mm/transparent_hugepage/defrag", "[always] defer madvise never\n")
        .put("sys/devices/system/cpu/online", "0-7\n")
        .put("sys/devices/system/node/node0/cpulist", "0-1,4-5\n")
        .put("sys/devices/system/node/node1/cpulist", "2-3,6-7\n");
    for cpu in 0..8 {
        let folder = format!("sys/devices/system/cpu/cpu{cpu}");
        let first = cpu % 4;
        made.put(
            &format!("{folder}/topology/thread_siblings_list"),
            format!("{first},{}\n", first + 4),
        )
        .put(&format!("{folder}/cpufreq/scaling_governor"), "powersave\n")
        .put(&format!("{folder}/cpufreq/scaling_available_governors"), "performance powersave\n");
        for (state, name, exit) in [(0, "POLL", 0), (1, "C1", 2), (2, "C6", 133)] {
            let folder = format!("{folder}/cpuidle/state{state}");
            made.put(&format!("{folder}/name"), name)
                .put(&format!("{folder}/latency"), exit.to_string())
                .put(&format!("{folder}/disable"), "0\n");
        }
    }
    let clock = "sys/devices/system/clocksource/clocksource0";
    made.put(&format!("{clock}/current_clocksource"), "hpet\n")
        .put(&format!("{clock}/available_clocksource"), "tsc hpet acpi_pm \n");
    let nic = "sys/class/net/ens1";
    made.put(&format!("{nic}/operstate"), "up\n")
        .put(&format!("{nic}/speed"), "100000\n")
        .put(&format!("{nic}/mtu"), "1500\n")
        .put(&format!("{nic}/device/numa_node"), "1\n");
    for queue in 0..4 {
        made.dir(&format!("{nic}/queues/rx-{queue}")).dir(&format!("{nic}/queues/tx-{queue}"));
        let irq = 40 + queue;
        made.put(&format!("{nic}/device/msi_irqs/{irq}"), "msix\n")
            .put(&format!("proc/irq/{irq}/effective_affinity_list"), "0\n")
            .put(&format!("proc/irq/{irq}/smp_affinity_list"), "0-7\n");
    }
    let disk = "sys/block/nvme0n1";
    made.dir(&format!("{disk}/device"))
        .put(&format!("{disk}/queue/scheduler"), "none [mq-deadline]\n")
        .put(&format!("{disk}/queue/rotational"), "0\n")
        .put(&format!("{disk}/queue/io_poll"), "0\n")
        .put(&format!("{disk}/queue/wbt_lat_usec"), "2000\n")
        .dir("sys/block/loop0/queue");
    made
}

#[test]
fn a_badly_set_server_is_told_all_of_it() {
    let made = server();
    let survey = made.survey();
    let machine = &survey.machine;
    assert_eq!((machine.cpus, machine.cores, machine.nodes), (8, 4, 2));
    assert!(!machine.is_virtual && machine.can_apply);
    let of = |level: Level| -> Vec<String> {
        survey.with(level).map(|finding| finding.about.clone()).collect()
    };
    assert_eq!(
        of(Level::Change),
        [
            "kernel.io_uring_disabled",
            "limit on locked memory",
            "limit on open files",
            "transparent hugepages, defrag",
            "CPU governor",
            "CPU idle states",
            "clock source",
            "net.ipv4.tcp_rmem",
            "net.ipv4.tcp_wmem",
            "net.ipv4.tcp_slow_start_after_idle",
            "ens1 interrupts",
            "nvme0n1 scheduler",
        ]
    );
    assert_eq!(
        of(Level::Consider),
        [
            "kernel",
            "system call filter",
            "transparent hugepages",
            "processor time of the control group",
            "ens1 MTU",
            "ens1 NUMA node",
            "nvme0n1 polled queues",
            "nvme0n1 write throttling",
        ]
    );
    for finding in survey.findings.iter().filter(|finding| finding.level <= Level::Consider) {
        assert!(!finding.reason.is_empty() && finding.wanted.is_some(), "{finding:?}");
    }
    for finding in survey.with(Level::Change) {
        assert!(finding.command.is_some(), "{finding:?}");
    }
    let text = survey.to_string();
    assert!(
        text.starts_with("Linux 6.8.0-31-generic, 8 CPUs on 4 cores, 2 NUMA nodes\n"),
        "{text}"
    );
    assert!(text.contains("    # sysctl -w net.ipv4.tcp_slow_start_after_idle='0'\n"), "{text}");
    assert!(
        text.ends_with(
            "12 to change, of which `penstock tune --apply` does 10 until the next boot."
        )
    );
}

#[test]
fn what_is_wanted_is_worked_out_from_what_is_there() {
    let made = server();
    // 100 Gbit/s * 500 us = 6.25 MB, twice that, up to a power of two.
    let finding = made.finding("net.ipv4.tcp_rmem");
    assert_eq!(finding.wanted.as_deref(), Some("4096 131072 16777216"));
    assert_eq!(
        finding.command.as_deref(),
        Some("sysctl -w net.ipv4.tcp_rmem='4096 131072 16777216'")
    );
    let interrupts = made.finding("ens1 interrupts");
    assert_eq!(interrupts.current, "4 on 1 processor, some of another NUMA node than the device");
    let cpus: Vec<&str> = interrupts.writes.iter().map(|write| write.new.as_str()).collect();
    assert_eq!(cpus, ["2", "3", "6", "7"]);
    let idle = made.finding("CPU idle states");
    assert_eq!(idle.current, "in use: C6 (133 us) on 8");
    assert_eq!(idle.writes.len(), 8);
    assert_eq!(made.finding("processor time of the control group").current, "150000 100000");
}

#[test]
fn applying_does_what_is_to_change_and_nothing_else_and_can_be_undone() {
    let made = server();
    let before = made.survey();
    let applied = before.apply(made.root());
    assert!(applied.iter().all(|write| write.error.is_none()), "{applied:?}");
    for (path, value) in [
        ("proc/sys/kernel/io_uring_disabled", "0"),
        ("proc/sys/net/ipv4/tcp_wmem", "4096 16384 16777216"),
        ("sys/devices/system/cpu/cpu7/cpufreq/scaling_governor", "performance"),
        ("sys/devices/system/cpu/cpu7/cpuidle/state2/disable", "1"),
        ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc"),
        ("sys/block/nvme0n1/queue/scheduler", "none"),
        ("proc/irq/41/smp_affinity_list", "3"),
        // Left alone.
        ("sys/class/net/ens1/mtu", "1500\n"),
        ("sys/block/nvme0n1/queue/wbt_lat_usec", "2000\n"),
        ("sys/devices/system/cpu/cpu7/cpuidle/state1/disable", "0\n"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
    ] {
        assert_eq!(made.says(path), value, "{path}");
    }
    let undo = |path: &str| applied.iter().find(|write| write.path == path).unwrap().undo.clone();
    assert_eq!(
        undo("/proc/sys/net/ipv4/tcp_wmem"),
        "sysctl -w net.ipv4.tcp_wmem='4096 16384 4194304'"
    );
    assert_eq!(
        undo("/sys/block/nvme0n1/queue/scheduler"),
        "echo mq-deadline > /sys/block/nvme0n1/queue/scheduler"
    );
    // The kernel would show the choices again, and move the interrupts.
    made.put("sys/block/nvme0n1/queue/scheduler", "[none] mq-deadline\n");
    made.put("sys/kernel/mm/transparent_hugepage/defrag", "always [madvise] never\n");
    for (irq, cpu) in [(40, 2), (41, 3), (42, 6), (43, 7)] {
        made.put(&format!("proc/irq/{irq}/effective_affinity_list"), cpu.to_string());
    }
    let after = made.survey();
    let open: Vec<&str> = after.with(Level::Change).map(|f| f.about.as_str()).collect();
    assert_eq!(open, ["limit on locked memory", "limit on open files"]);
    assert!(!after.machine.can_apply);
    assert_eq!(after.apply(made.root()), []);
}

#[test]
fn a_refused_write_is_told_and_the_others_are_done() {
    let made = server();
    let survey = made.survey();
    fs::remove_file(made.file("proc/sys/kernel/io_uring_disabled")).unwrap();
    let applied = survey.apply(made.root());
    let failed: Vec<&str> = applied
        .iter()
        .filter(|write| write.error.is_some())
        .map(|write| write.path.as_str())
        .collect();
    assert_eq!(failed, ["/proc/sys/kernel/io_uring_disabled"]);
    // And no file was made.
    assert!(!made.file("proc/sys/kernel/io_uring_disabled").exists());
    assert_eq!(made.says("sys/block/nvme0n1/queue/scheduler"), "none");
}

#[test]
fn a_virtual_machine_says_what_it_does_not_have() {
    let made = Made::new();
    made.put("proc/sys/kernel/osrelease", "6.18.1\n")
        .put("proc/cpuinfo", "processor : 0\nflags : fpu hypervisor tsc\n")
        .put("sys/devices/system/cpu/online", "0-1\n")
        .put("sys/class/net/eth0/operstate", "up\n")
        .put("sys/class/net/eth0/speed", "-1\n")
        .put("sys/class/net/eth0/mtu", "1400\n")
        .dir("sys/class/net/eth0/device")
        .dir("sys/class/net/eth0/queues/rx-0")
        .dir("sys/class/net/eth0/queues/tx-0")
        .put("sys/class/net/lo/mtu", "65536\n");
    assert!(made.survey().machine.is_virtual);
    let governor = made.finding("CPU governor");
    assert_eq!((governor.level, governor.current.as_str()), (Level::Absent, "none"));
    assert!(governor.reason.contains("hypervisor"), "{governor:?}");
    assert_eq!(made.finding("CPU idle states").level, Level::Absent);
    assert_eq!(made.finding("eth0 speed").current, "unknown");
    assert_eq!(made.finding("eth0 MTU").level, Level::Good);
    let queues = made.finding("eth0 queues");
    assert_eq!(queues.command.as_deref(), Some("ethtool -L eth0 combined 2"));
    assert!(!made.survey().to_string().contains("lo "), "loopback has no hardware");
}

#[test]
fn threads_of_one_core_are_not_taken_for_cores() {
    let made = Made::new();
    made.put("sys/devices/system/cpu/online", "0-1");
    for cpu in 0..2 {
        made.put(&format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), "0-1");
    }
    let finding = made.finding("processors");
    assert_eq!(finding.wanted.as_deref(), Some("a data path thread for each core: --cores 1"));
}

#[test]
fn an_empty_machine_gives_a_survey_without_changes() {
    let survey = Made::new().survey();
    assert_eq!(survey.with(Level::Change).count(), 0, "{survey}");
    assert!(!survey.machine.can_apply);
    assert!(survey.to_string().ends_with("Nothing has to change."));
}

/// Every file in turn says something else than it should: there is a survey all the same, whose
/// text has no control characters, and whose writes stay within what was read.
#[test]
fn odd_contents_are_survived() {
    let odd: [&[u8]; 9] = [
        b"",
        b"\n\n\n",
        b"\xff\xfe\x00\x01",
        b"-9223372036854775808",
        b"99999999999999999999999999999",
        b"\x1b[2J; rm -rf / $(reboot)",
        b"[] [ ] [[none]]",
        b"0-18446744073709551615,4-2",
        &[b'7'; 200_000],
    ];
    let files = {
        let made = server();
        let mut files = Vec::new();
        let mut folders = vec![made.root().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files
                        .push(path.strip_prefix(made.root()).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        files
    };
    assert!(files.len() > 100);
    let made = server();
    for path in &files {
        let sound = fs::read(made.file(path)).unwrap();
        for content in odd {
            made.put(path, content);
            let survey = made.survey();
            let text = survey.to_string();
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{path}: {text:?}");
            assert!(serde_json::to_string(&survey).is_ok());
            for write in survey.findings.iter().flat_map(|finding| &finding.writes) {
                assert!(files.contains(&write.path), "{path} led to a write to {}", write.path);
            }
        }
        // A folder, or nothing at all, instead of the file.
        fs::remove_file(made.file(path)).unwrap();
        let _ = made.survey().to_string();
        made.dir(path);
        let _ = made.survey().to_string();
        fs::remove_dir(made.file(path)).unwrap();
        made.put(path, sound);
    }
}

#[test]
fn the_machine_this_runs_on_gives_a_survey() {
    let survey = Survey::of(Path::new("/"));
    assert!(survey.machine.cpus > 0 && survey.machine.cores > 0, "{survey}");
    assert!(survey.findings.iter().any(|finding| finding.about == "kernel"));
}
