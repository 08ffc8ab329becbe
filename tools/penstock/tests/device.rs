//! `penstock device` against a contained emulator whose target comes late.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

const NQN: &str = "nqn.2014-08.com.example:device";
const LIMIT: Duration = Duration::from_secs(60);

struct Running(Child);

impl Running {
    fn start(arguments: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        Running(command.args(["--log", "error"]).args(arguments).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn device(api: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    command.arg("device").args(arguments).arg("--api").arg(api).output().unwrap()
}

fn list(api: &Path) -> Option<Value> {
    let output = device(api, &["list", "--json"]);
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

/// Asks until the one device satisfies `is_true`.
fn wait(api: &Path, is_true: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        if let Some(list) = list(api)
            && is_true(&list[0])
        {
            return list[0].clone();
        }
        assert!(start.elapsed() < LIMIT, "the device does not come: {:?}", list(api));
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_device_is_told_of_from_before_its_target_to_its_service() {
    let dir = tempfile::tempdir().unwrap();
    let (api, socket) = (dir.path().join("api.sock"), dir.path().join("disk.sock"));
    // Free a moment ago; nobody on this machine is told to take it.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "disk=virtio-blk,socket={},connect=127.0.0.1:{port},subnqn={NQN},nsid=1,\
         hostnqn=nqn.2014-08.com.example:dpu,hostid=5f0e8a52-1c7b-4b0f-9d3b-0d5cbb6a4f22",
        socket.display()
    );
    let path = api.to_str().unwrap();
    let _emulator = Running::start(&["emulate", "--cores", "1", "--device", &text, "--api", path]);
    let early = wait(&api, |device| device["kind"] == "virtio-blk");
    assert_eq!((&early["is_served"], &early["guest_attached"]), (&false.into(), &false.into()));
    assert_eq!(early["namespaces"][0]["paths"][0]["state"], "connecting");

    let listen = format!("127.0.0.1:{port}");
    let volume = ["--volume", "a=ram:4MiB", "--listen", &listen, "--subnqn", NQN, "--cores", "1"];
    let only = ["--subsystem", "default,host=nqn.2014-08.com.example:dpu"];
    let _target = Running::start(&[&["target"][..], &volume, &only].concat());
    let served = wait(&api, |device| device["is_served"] == true);
    let namespace = &served["namespaces"][0];
    assert_eq!((&namespace["size_bytes"], &namespace["nsid"]), (&(4 << 20).into(), &1.into()));
    assert_eq!(namespace["paths"][0]["state"], "live");
    assert_ne!(namespace["uuid"], "00000000-0000-0000-0000-000000000000");

    let shown = device(&api, &["show", "disk"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("disk: virtio-blk, ready") && shown.contains("4 MiB"), "{shown}");
    let missing = device(&api, &["show", "other"]);
    assert_eq!(missing.status.code(), Some(1));
    let text = String::from_utf8(missing.stderr).unwrap();
    assert!(text.contains("there is no device \"other\""), "{text}");
}
