//! The binary as a user meets it: exit codes, one-line errors, signals, JSON.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

fn penstock(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_penstock"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .output()
        .expect("the binary was built with this test")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The one line of a refusal.
#[track_caller]
fn refusal(arguments: &[&str], code: i32) -> String {
    let output = penstock(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.starts_with("penstock: "), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    text
}

/// A running target that is ended by its own signal handler, or killed if the test fails.
struct Target {
    child: Child,
    addresses: Vec<String>,
}

impl Target {
    /// Starts and waits until it has said where it listens.
    fn start(arguments: &[&str], listeners: usize) -> Target {
        let mut child = Command::new(env!("CARGO_BIN_EXE_penstock"))
            .args(["--log", "info", "target"])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut addresses = Vec::new();
        while addresses.len() < listeners {
            let line = lines.next().expect("the target says where it listens").unwrap();
            if line.contains("listening") {
                addresses.push(line.rsplit("addr=").next().unwrap().to_owned());
            }
        }
        // Keeps the pipe from filling up.
        std::thread::spawn(move || lines.for_each(drop));
        Target { child, addresses }
    }

    fn end(mut self, signal: Signal) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Ended already unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn help_is_there_for_every_command() {
    for command in ["up", "target", "emulate", "discover", "bench", "tune"] {
        let output = penstock(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0));
        let text = stdout(&output);
        assert!(text.contains(&format!("Usage: penstock {command}")), "{text}");
    }
    assert_eq!(penstock(&["--help"]).status.code(), Some(0));
    assert_eq!(penstock(&[]).status.code(), Some(2));
    assert_eq!(penstock(&["bench", "null:1M", "--iodepth", "0"]).status.code(), Some(2));
}

#[test]
fn refusals_are_one_line_with_their_exit_code() {
    let scratch = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = refusal(&["target", "--volume", "a=null:1M", "--listen", &address], 1);
    assert!(text.contains(&format!("cannot listen on {address}")), "{text}");

    let text = refusal(&["target", "--volume", "a=tape:1", "--listen", "127.0.0.1:0"], 2);
    assert!(text.contains("--volume \"tape:1\""), "{text}");

    // Both would end with 1, and not run, if the value were not looked at.
    let nowhere = scratch.path().join("nowhere");
    let volume = format!("a=file:{}", nowhere.display());
    let device = format!("d=virtio-blk,socket={}/d.sock,volume=null:1M", nowhere.display());
    for role in [
        &["target", "--volume", &volume, "--listen", "127.0.0.1:0"][..],
        &["emulate", "--device", &device],
    ] {
        let text = refusal(&[role, &["--busy-poll-us", "10001"]].concat(), 2);
        assert!(
            text.contains("--busy-poll-us \"10001\": allowed: a whole number from 0"),
            "{text}"
        );
    }

    let file = scratch.path().join("penstock.toml");
    std::fs::write(&file, "[target]\nlisten = [\"127.0.0.1:0\"]\ncolour = 1\n").unwrap();
    let text = refusal(&["target", "--config", file.to_str().unwrap()], 2);
    assert!(text.contains("penstock.toml:3: in `colour = 1`: unknown field"), "{text}");

    let missing = scratch.path().join("missing.img");
    let spec = format!("a=file:{}", missing.display());
    let text = refusal(&["target", "--volume", &spec, "--listen", "127.0.0.1:0"], 1);
    assert!(text.contains("opening volume \"a\"") && text.contains("missing.img"), "{text}");

    let text = refusal(&["--log", "=?", "discover", "-a", "127.0.0.1"], 2);
    assert!(text.contains("--log \"=?\""), "{text}");
    let text = refusal(&["bench", "ram:1MiB", "--bs", "1000"], 1);
    assert!(text.contains("--bs 1000: allowed: a multiple of the block size"), "{text}");
    let text = refusal(&["discover", "-a", "127.0.0.1", "-s", &free_port()], 1);
    assert!(text.contains("connecting to 127.0.0.1:"), "{text}");
}

/// A port where nobody listens: it was free a moment ago.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

#[test]
fn a_target_is_found_loaded_and_stopped() {
    let nqn = "nqn.2014-08.com.example:binary";
    let target = Target::start(
        &[
            "--volume",
            "a=ram:4MiB",
            "--listen",
            "127.0.0.1:0",
            "--discovery",
            "127.0.0.1:0",
            "--subnqn",
            nqn,
            "--cores",
            "1",
        ],
        2,
    );
    let io = target.addresses[0].clone();
    let (_, io_port) = io.rsplit_once(':').unwrap();
    let (_, discovery_port) = target.addresses[1].rsplit_once(':').unwrap();

    let output = penstock(&["discover", "-a", "127.0.0.1", "-s", discovery_port, "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The discovery subsystem itself comes first.
    assert_eq!(found["records"][0]["trsvcid"], discovery_port);
    assert_eq!(found["records"][1]["subnqn"], nqn);
    assert_eq!(found["records"][1]["trsvcid"], io_port);
    let output = penstock(&["discover", "-a", "127.0.0.1", "-s", discovery_port]);
    assert!(stdout(&output).contains(nqn));

    let bench = |more: &[&str]| {
        let base = ["bench", "--connect", &io, "--subnqn", nqn, "--nsid", "1", "--runtime", "1"];
        penstock(&[&base[..], more].concat())
    };
    let output = bench(&["--rw", "randrw", "--verify", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["read"]["ios"].as_u64().unwrap() > 0);
    assert!(report["write"]["latency_us"]["p99.9"].as_f64().unwrap() > 0.0);
    assert_eq!(report["verify"]["mismatches"], 0);
    // Another seed: none of these blocks are ours.
    let output = bench(&["--rw", "read", "--verify", "--seed", "2"]);
    assert_eq!(output.status.code(), Some(3), "{}", stdout(&output));

    assert_eq!(target.end(Signal::TERM), Some(0));
}

#[test]
fn a_breakdown_tells_where_the_time_goes() {
    let stages = |output: &Output, side: &str| {
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let way = &report["breakdown"][side];
        assert!(way["requests"].as_u64().unwrap() > 0, "{report}");
        let stages = way["stages"].as_array().unwrap();
        let sum: f64 = stages.iter().map(|stage| stage["mean_us"].as_f64().unwrap()).sum();
        assert_eq!(stages.len(), 9, "{report}");
        assert!(sum > 0.0, "{report}");
    };
    let own = penstock(&["bench", "ram:4MiB", "--runtime", "1", "--breakdown", "--json"]);
    stages(&own, "read");

    let scratch = tempfile::tempdir().unwrap();
    let api = scratch.path().join("api.sock");
    let api = api.to_str().unwrap();
    let nqn = "nqn.2014-08.com.example:breakdown";
    let target = Target::start(
        &["--volume", "a=ram:4MiB", "--listen", "127.0.0.1:0", "--subnqn", nqn, "--api", api],
        1,
    );
    let bench = |more: &[&str]| {
        let base = ["bench", "--connect", &target.addresses[0], "--subnqn", nqn, "--nsid", "1"];
        penstock(&[&base[..], &["--runtime", "1", "--rw", "randwrite", "--json"], more].concat())
    };
    stages(&bench(&["--breakdown", "--api", api]), "write");
    let plain = bench(&[]);
    let report: serde_json::Value = serde_json::from_slice(&plain.stdout).unwrap();
    assert!(report["breakdown"].is_null(), "nobody asked: {report}");
    let refused = bench(&["--breakdown"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("--api"), "{text}");
    assert_eq!(target.end(Signal::TERM), Some(0));
}

#[test]
fn up_proves_itself_twice() {
    let scratch = tempfile::tempdir().unwrap();
    let data = scratch.path().join("penstock-data");
    let up = |data: &Path| {
        let data = data.to_str().unwrap();
        let ports = ["--listen", "127.0.0.1:0", "--discovery", "127.0.0.1:0"];
        penstock(&[&["up", "--data", data, "--size", "16MiB", "--check-only"][..], &ports].concat())
    };
    let first = up(&data);
    let text = stdout(&first);
    assert_eq!(first.status.code(), Some(0), "{text}");
    for part in [
        "vol0: 16 MiB, created",
        "every byte right",
        "nvme connect-all -t tcp -a 127.0.0.1",
        "vhost-user-blk-pci",
        "--libblkio_path=",
    ] {
        assert!(text.contains(part), "{part:?} not in\n{text}");
    }
    let second = up(&data);
    let text = stdout(&second);
    assert_eq!(second.status.code(), Some(0), "{text}");
    assert!(text.contains("vol0: 16 MiB, found again"), "{text}");
    assert!(text.contains("what the last start wrote was found again"), "{text}");
}
