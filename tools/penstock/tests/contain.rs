//! A contained emulator, seen from outside and tried from inside.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn device(dir: &Path) -> String {
    // Nobody listens there: a device is there before its target is.
    format!(
        "disk=virtio-blk,socket={},tls=off,connect=127.0.0.1:4,subnqn=nqn.2014-08.com.example:a,nsid=1",
        dir.join("disk.sock").display()
    )
}

fn emulate(more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    command.args(["emulate", "--cores", "1"]).args(more).env_remove("RUST_LOG");
    command
}

/// Why nothing can be shown here, if so.
fn lacking(output: &Output) -> bool {
    let text = String::from_utf8_lossy(&output.stderr);
    let is_lacking = text.contains("containment is required and not to be had");
    if is_lacking {
        eprintln!("skipped: {}", text.trim());
    }
    is_lacking
}

#[test]
fn every_way_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let check = ["--device", &device, "--check-containment", "--containment"];
    let contained = emulate(&check).arg("require").output().unwrap();
    if lacking(&contained) {
        return;
    }
    let text = String::from_utf8_lossy(&contained.stdout).into_owned();
    let log = String::from_utf8_lossy(&contained.stderr).into_owned();
    assert_eq!(contained.status.code(), Some(0), "{text}{log}");
    assert!(text.lines().count() > 10 && !text.contains("GRANTED"), "{text}");
    // It took its socket away, and left nothing else.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    // The attempts are no strawmen: without containment they succeed, up to becoming /bin/false.
    let open = emulate(&check).arg("off").output().unwrap();
    assert_eq!(open.status.code(), Some(1));
    assert!(dir.path().join("containment-check").exists());
}

#[test]
fn no_thread_keeps_its_rights() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--log", "info", "--device", &device(dir.path()), "--containment", "on"];
    let mut child = emulate(&arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.contains("contain")).unwrap();
    let threads = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let statuses: Vec<String> = threads
        .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap())
        .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    if line.contains("incomplete") {
        return eprintln!("skipped: {line}");
    }
    assert!(statuses.len() > 1);
    for status in statuses {
        for wanted in [
            "NoNewPrivs:\t1\n",
            "Seccomp:\t2\n",
            "CapEff:\t0000000000000000\n",
            "CapPrm:\t0000000000000000\n",
            "CapBnd:\t0000000000000000\n",
        ] {
            assert!(status.contains(wanted), "{wanted:?} not in {status}");
        }
    }
}
