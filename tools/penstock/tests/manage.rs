//! The management commands against a running target, as an operator uses them.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

fn penstock() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    command.env_remove("RUST_LOG").env_remove("PENSTOCK_API");
    command
}

struct Target {
    child: Child,
    scratch: TempDir,
}

impl Target {
    /// Starts one and waits until it listens.
    fn start() -> Target {
        let scratch = tempfile::tempdir().unwrap();
        let mut child = penstock()
            .args(["--log", "info", "target", "--volume", "a=ram:1MiB", "--cores", "1"])
            .args(["--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0"])
            .args(["--discovery", "127.0.0.1:0", "--api"])
            .arg(scratch.path().join("api"))
            .arg("--data")
            .arg(scratch.path().join("data"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        while !lines.next().expect("it says that it listens").unwrap().contains("discovery") {}
        // Keeps the pipe from filling up.
        std::thread::spawn(move || lines.for_each(drop));
        Target { child, scratch }
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path().join("api")
    }

    fn run(&self, line: &str) -> Output {
        penstock().args(line.split(' ')).env("PENSTOCK_API", self.socket()).output().unwrap()
    }

    #[track_caller]
    fn text(&self, line: &str) -> String {
        let output = self.run(line);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        text
    }

    #[track_caller]
    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{line} --json"))).unwrap()
    }

    #[track_caller]
    fn refused(&self, line: &str) -> String {
        let output = self.run(line);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{line}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        text
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Ended by its signal handler; the test does not depend on how.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

fn grow(path: &Path, bytes: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn an_operators_day() {
    let target = Target::start();
    let status = target.text("status");
    for part in ["changes survive a restart", "VOLUME", "ram:1M", "1 MiB", "LISTENS AT"] {
        assert!(status.contains(part), "{part} in\n{status}");
    }
    let status = target.json("status");
    let port = status["ports"][1]["portid"].as_u64().unwrap();

    let file = target.scratch.path().join("b.img");
    target.text(&format!("volume attach b --spec file:{},size=1MiB --nsid 9", file.display()));
    let volume = |name: &str| {
        let volumes = target.json("volume list");
        volumes.as_array().unwrap().iter().find(|v| v["name"] == name).cloned().unwrap()
    };
    assert_eq!((&volume("b")["nsid"], &volume("b")["attached"]), (&9.into(), &true.into()));
    target.text("volume resize b --size 2MiB");
    assert_eq!(volume("b")["size_bytes"], 2 << 20);
    grow(&file, 3 << 20);
    target.text("volume resize b");
    assert_eq!(volume("b")["size_bytes"], 3 << 20);
    let host = "nqn.2014-08.com.example:host-a";
    target.text(&format!("volume hosts b --host {host}"));
    assert_eq!(volume("b")["hosts"], serde_json::json!([host]));
    target.text("volume hosts b --none");
    assert_eq!(volume("b")["hosts"], serde_json::json!([]));
    target.text("volume hosts b --all");
    assert_eq!(volume("b")["hosts"], Value::Null);
    target.text("volume protect b");
    assert!(target.text("volume list").contains("protected"));
    target.text("volume unprotect b");
    target.text("volume move b --ana-group 5");
    assert_eq!(volume("b")["ana_group"], 5);

    target.text(&format!("ana set inaccessible --port {port} --group 5"));
    let subsystems = target.text("subsystem list");
    assert!(subsystems.contains(&format!("{port}/5=inaccessible")), "{subsystems}");
    target.text("ana set optimized --group 5");

    target.text(&format!("subsystem add tenant --host {host}"));
    assert!(target.text("subsystem list").contains("tenant"));
    target.text("subsystem hosts tenant --all");
    target.text("subsystem remove tenant");
    assert_eq!(target.text("host list").lines().count(), 1, "nobody is connected");
    assert!(target.text(&format!("host disconnect {host}")).contains("0 associations"));

    target.text("referral add [::1]:8009");
    assert!(target.text("referral list").contains("[::1]:8009"));
    target.text("referral remove [::1]:8009");

    target.text("volume detach b");
    assert!(file.exists());
}

#[test]
fn refusals_are_one_line_with_what_is_allowed() {
    let target = Target::start();
    assert!(target.refused("volume detach nope").contains("nope"));
    assert!(target.refused("volume attach b --spec disk:1").contains("allowed"));
    assert!(target.refused("volume attach a --spec ram:1M").contains('a'));
    assert!(target.refused("volume resize a --size much").contains("--size"));
    assert!(target.refused("ana set change --group 500").contains("500"));
    assert!(target.refused("subsystem add x --nqn nonsense").contains("nonsense"));
    assert!(target.refused("referral remove 192.0.2.1:1").contains("192.0.2.1:1"));
    let missing = penstock().args(["status", "--api", "/nonexistent/x"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    let text = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(text.contains("penstock target --api"), "{text}");
}
