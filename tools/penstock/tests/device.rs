//! `penstock device` against a contained emulator whose target comes late.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
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
        "disk=virtio-blk,socket={},tls=off,connect=127.0.0.1:{port},subnqn={NQN},nsid=1,\
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

#[test]
fn a_contained_device_reaches_its_target_by_the_lines_that_export_prints() {
    const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:5f0e8a52-1c7b-4b0f-9d3b-0d5cbb6a4f22";
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("target");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (data, address) = (data.to_str().unwrap(), format!("127.0.0.1:{port}"));
    let key = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        let output = command.arg("key").args(arguments).args(["--data", data]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for kind in ["tls", "dhchap", "dhchap-controller"] {
        key(&["generate", "--host", HOST, "--kind", kind]);
    }
    let to = ["--host", HOST, "--subsystem", NQN, "--address", &address];
    let lines = key(&[&["export", "--emulator"], &to[..]].concat());
    let (files, line) = lines.trim_end().rsplit_once('\n').unwrap();
    let mut shell = Command::new("sh");
    let made = shell.args(["-ec", files]).current_dir(dir.path()).status().unwrap();
    assert!(made.success());

    let listen = format!("{address},tls=required");
    let volume = ["--volume", "a=ram:4MiB", "--listen", &listen, "--subnqn", NQN, "--cores", "1"];
    let _target = Running::start(&[&["target", "--data", data][..], &volume].concat());
    let text = line.strip_prefix("penstock emulate --device ").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    command
        .args(["--log", "error", "emulate", "--cores", "1", "--api", "api.sock", "--device", text]);
    let _emulator = Running(command.current_dir(dir.path()).spawn().unwrap());
    let served = wait(&dir.path().join("api.sock"), |device| device["is_served"] == true);
    assert_eq!(served["namespaces"][0]["paths"][0]["state"], "live");
}

#[test]
fn a_device_is_told_its_ways_by_discovery_over_tls() {
    const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:5f0e8a52-1c7b-4b0f-9d3b-0d5cbb6a4f33";
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("target");
    let data = data.to_str().unwrap();
    let free = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (io, discovery) = (free(), free());
    let [io, discovery] = [io, discovery].map(|socket| socket.local_addr().unwrap());
    let key = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        let output = command.arg("key").args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for kind in ["tls", "dhchap", "dhchap-controller"] {
        key(&["generate", "--host", HOST, "--kind", kind, "--data", data]);
    }
    let address = io.to_string();
    let to = ["--host", HOST, "--subsystem", NQN, "--address", &address, "--data", data];
    let lines = key(&[&["export", "--emulator"], &to[..]].concat());
    let (files, line) = lines.trim_end().rsplit_once('\n').unwrap();
    let mut shell = Command::new("sh");
    let made = shell.args(["-ec", files]).current_dir(dir.path()).status().unwrap();
    assert!(made.success());
    let text = line.strip_prefix("penstock emulate --device ").unwrap();
    let ways = format!("discover={discovery},ports={}", io.port());
    let text = text.replace(&format!("connect={address}"), &ways);

    let (listen, tell) = (format!("{io},tls=required"), format!("{discovery},tls=required"));
    let volume = ["--volume", "a=ram:4MiB", "--listen", &listen, "--subnqn", NQN, "--cores", "1"];
    let asked = ["target", "--data", data, "--discovery", &tell];
    let _target = Running::start(&[&asked[..], &volume].concat());
    let emulate = |api: &str, text: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        let device = ["--log", "error", "emulate", "--cores", "1", "--api", api, "--device", text];
        Running(command.args(device).current_dir(dir.path()).spawn().unwrap())
    };
    let _emulator = emulate("api.sock", &text);
    let served = wait(&dir.path().join("api.sock"), |device| device["is_served"] == true);
    assert_eq!(served["namespaces"][0]["paths"][0]["state"], "live");
    assert_eq!(served["discovery"][0]["state"], "connected");

    // In plaintext when it is told to, which this listener does not take.
    let text = text.replace("disk.sock", "plain.sock") + ",discover_tls=off";
    let _emulator = emulate("plain-api.sock", &text);
    let refused = wait(&dir.path().join("plain-api.sock"), |device| {
        device["discovery"][0]["last_error"].is_string()
    });
    let why = refused["discovery"][0]["last_error"].as_str().unwrap();
    assert!(why.contains("does the listener require TLS?"), "{why}");
    assert_eq!(refused["namespaces"][0]["paths"], serde_json::json!([]));

    // A key that is for the target's subsystem alone is none for discovery, and said so at the start.
    let own = dir.path().join("own");
    let own = own.to_str().unwrap();
    key(&["generate", "--host", HOST, "--subsystem", NQN, "--data", own]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    let text = format!(
        "disk=virtio-blk,socket=own.sock,discover={discovery},subnqn={NQN},nsid=1,hostnqn={HOST}"
    );
    command.args(["emulate", "--cores", "1", "--data", own, "--device", &text]);
    let output = command.current_dir(dir.path()).output().unwrap();
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && why.contains("discover_tls=off"), "{why}");
}

#[test]
fn a_contained_device_is_given_new_keys_while_it_runs() {
    const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:5f0e8a52-1c7b-4b0f-9d3b-0d5cbb6a4f44";
    let dir = tempfile::tempdir().unwrap();
    let (data, target_api) = (dir.path().join("target"), dir.path().join("target.sock"));
    let (data, target_api) = (data.to_str().unwrap(), target_api.to_str().unwrap());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        let output = command.args(arguments).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for kind in ["tls", "dhchap"] {
        run(&["key", "generate", "--host", HOST, "--kind", kind, "--data", data]);
    }
    // Makes the files, and gives what uses them.
    let export = |place: &[&str]| {
        let export = ["key", "export", "--emulator", "--host", HOST, "--subsystem", NQN];
        let lines = run(&[&export[..], &["--address", &address], place].concat());
        let (files, line) = lines.trim_end().rsplit_once('\n').unwrap();
        let mut shell = Command::new("sh");
        let made = shell.args(["-ec", files]).current_dir(dir.path()).status().unwrap();
        assert!(made.success());
        line.strip_prefix("penstock emulate --device ").unwrap().to_owned()
    };
    let text = export(&["--data", data]);
    let listen = format!("{address},tls=required");
    let volume = ["--volume", "a=ram:4MiB", "--listen", &listen, "--subnqn", NQN, "--cores", "1"];
    let managed = ["target", "--data", data, "--api", target_api];
    let _target = Running::start(&[&managed[..], &volume].concat());
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    let emulate = ["--log", "error", "emulate", "--cores", "1", "--data", "own"];
    command.args(emulate).args(["--api", "api.sock", "--device", &text]);
    let emulator = Running(command.current_dir(dir.path()).spawn().unwrap());
    let api = dir.path().join("api.sock");
    let path = |device: &Value| device["namespaces"][0]["paths"][0].clone();
    wait(&api, |device| device["is_served"] == true);

    let place = ["--api", target_api];
    let rotate = || {
        let listed = run(&[&["key", "list", "--json"][..], &place].concat());
        let listed: Value = serde_json::from_str(&listed).unwrap();
        for key in listed.as_array().unwrap().iter().filter(|key| key["expired"] == false) {
            let id = key["id"].as_str().unwrap();
            run(&[&["key", "rotate", id, "--overlap", "0"][..], &place].concat());
        }
        export(&place);
    };
    rotate();
    // The files are new, and the process cannot look at them: it is told.
    let files = ["--psk", "penstock.psk", "--dhchap", "penstock.dhchap", "--api", "api.sock"];
    let said = run(&[&["device", "rekey", "disk", "--reauthenticate"][..], &files].concat());
    assert!(said.contains("new keys"), "{said}");
    let before = path(&wait(&api, |_| true));
    assert_eq!((&before["losses"], &before["associations"]), (&0.into(), &1.into()));
    run(&[&["host", "disconnect", HOST][..], &place].concat());
    let is_back = |count: u64| {
        let after = wait(&api, |device| {
            path(device)["associations"] == count && path(device)["state"] == "live"
        });
        assert_eq!(path(&after)["losses"], count - 1);
    };
    is_back(2);
    // By way of the data directory, which is not locked while the emulator runs.
    rotate();
    for (kind, file) in [("tls", "penstock.psk"), ("dhchap", "penstock.dhchap")] {
        let import = ["key", "import", "--host", HOST, "--kind", kind, "--file", file];
        run(&[&import[..], &["--data", "own"]].concat());
    }
    run(&["device", "rekey", "disk", "--data", "own", "--api", "api.sock"]);
    run(&[&["host", "disconnect", HOST][..], &place].concat());
    is_back(3);

    let refused = device(
        &api,
        &["rekey", "other", "--psk", dir.path().join("penstock.psk").to_str().unwrap()],
    );
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && why.contains("there is no device \"other\""), "{why}");
    let refused = device(&api, &["rekey", "disk"]);
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && why.contains("--psk"), "{why}");
    drop(emulator);
}

#[test]
fn a_device_without_a_key_is_refused_and_told_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |more: &str, data: &[&str]| {
        let text = format!(
            "disk=virtio-blk,socket=disk.sock,connect=127.0.0.1:4,subnqn={NQN},nsid=1{more}"
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        command.args(["emulate", "--cores", "1", "--device", &text]).args(data);
        let output = command.current_dir(dir.path()).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let why = refused("", &[]);
    assert!(why.contains("psk=FILE") && why.contains("tls=off"), "{why}");
    let why = refused("", &["--data", "empty"]);
    assert!(why.contains("psk=FILE") && why.contains("tls=off"), "{why}");
    std::fs::write(dir.path().join("open"), "NVMeTLSkey-1:01:broken:").unwrap();
    let why = refused(",psk=open", &[]);
    assert!(why.contains("chmod 600") && !why.contains("broken"), "{why}");
    assert!(!dir.path().join("disk.sock").exists());
}

#[test]
fn a_device_with_a_volume_of_its_own_needs_no_target() {
    let dir = tempfile::tempdir().unwrap();
    let (api, socket) = (dir.path().join("api.sock"), dir.path().join("disk.sock"));
    let text = format!("disk=virtio-blk,socket={},volume=ram:4MiB", socket.display());
    let path = api.to_str().unwrap();
    let _emulator = Running::start(&["emulate", "--cores", "1", "--device", &text, "--api", path]);
    let served = wait(&api, |device| device["is_served"] == true);
    let namespace = &served["namespaces"][0];
    assert_eq!((&namespace["size_bytes"], &namespace["nsid"]), (&(4 << 20).into(), &1.into()));
    assert_eq!(namespace["volume"], "ram:4M");
    let shown = String::from_utf8(device(&api, &["show", "disk"]).stdout).unwrap();
    assert!(shown.contains("1 of ram:4M: 4 MiB"), "{shown}");
}

/// Numbers of the namespaces that the machine has.
fn shown(device: &Value) -> Vec<u64> {
    let spaces = device["namespaces"].as_array().unwrap().iter();
    let spaces = spaces.filter(|ns| ns["is_shown"] == true);
    spaces.map(|ns| ns["nsid"].as_u64().unwrap()).collect()
}

#[test]
fn an_nvme_device_follows_its_subsystem_and_its_operator() {
    let dir = tempfile::tempdir().unwrap();
    let (api, socket) = (dir.path().join("api.sock"), dir.path().join("nvme.sock"));
    let of_target = dir.path().join("target.sock");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let target_api = of_target.to_str().unwrap();
    let volume = ["--volume", "a=ram:4MiB", "--listen", &listen, "--subnqn", NQN, "--cores", "1"];
    let _target = Running::start(&[&["target", "--api", target_api][..], &volume].concat());
    let text = format!(
        "disk=nvme,socket={},tls=off,connect=127.0.0.1:{port},subnqn={NQN},nsid=all",
        socket.display()
    );
    let path = api.to_str().unwrap();
    let arguments = ["emulate", "--cores", "1", "--supervise", "--device", &text, "--api", path];
    let supervisor = Running::start(&arguments);
    let served = wait(&api, |device| device["is_served"] == true && shown(device) == [1]);
    assert_eq!((&served["follows"], &served["problem"]), (&true.into(), &Value::Null));
    let target = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
        let output =
            command.arg("volume").args(arguments).args(["--api", target_api]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let by_hand = |arguments: &[&str]| {
        let output = device(&api, arguments);
        let code = output.status.code().unwrap();
        (code, String::from_utf8(output.stderr).unwrap())
    };

    target(&["attach", "b", "--spec", "ram:8MiB"]);
    let two = wait(&api, |device| shown(device) == [1, 2]);
    assert_eq!(two["namespaces"][1]["size_bytes"], 8 << 20);
    target(&["detach", "a"]);
    wait(&api, |device| shown(device) == [2]);

    // What an operator takes away stays away, whatever the target says.
    assert_eq!(by_hand(&["detach", "disk", "--nsid", "2"]).0, 0);
    let none = list(&api).unwrap()[0].clone();
    assert_eq!((shown(&none), &none["withheld"][0]), (vec![], &2.into()));
    let text = String::from_utf8(device(&api, &["show", "disk"]).stdout).unwrap();
    assert!(text.contains("namespaces of the subsystem, but 2"), "{text}");
    target(&["attach", "a", "--spec", "ram:4MiB"]);
    wait(&api, |device| shown(device) == [1]);
    assert_eq!(by_hand(&["attach", "disk", "--nsid", "2"]).0, 0);
    assert_eq!(shown(&list(&api).unwrap()[0]), [1, 2]);
    for (arguments, why) in [
        (["attach", "disk", "--nsid", "2"], "has namespace 2"),
        (["attach", "disk", "--nsid", "257"], "1 to 256"),
        (["detach", "disk", "--nsid", "9"], "has no namespace 9"),
        (["attach", "other", "--nsid", "2"], "there is no device"),
    ] {
        let (code, text) = by_hand(&arguments);
        assert!(code == 1 && text.contains(why), "{arguments:?}: {text}");
    }
    let (code, text) = by_hand(&["attach", "disk", "--nsid", "9", "--timeout", "1"]);
    assert!(code == 1 && text.contains("no active namespace 9"), "{text}");
    assert_eq!(shown(&list(&api).unwrap()[0]), [1, 2]);

    // Whoever takes over shows the same.
    let before = worker(&supervisor).unwrap();
    kill_process(Pid::from_raw(i32::try_from(before).unwrap()).unwrap(), Signal::KILL).unwrap();
    let start = Instant::now();
    while worker(&supervisor).is_none_or(|now| now == before) {
        assert!(start.elapsed() < LIMIT, "no worker");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    wait(&api, |device| device["is_served"] == true && shown(device) == [1, 2]);
}

/// The process that the supervisor has started.
fn worker(supervisor: &Running) -> Option<u32> {
    let pid = supervisor.0.id();
    let path = format!("/proc/{pid}/task/{pid}/children");
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[test]
fn a_supervised_emulator_comes_back_and_its_socket_never_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (api, socket) = (dir.path().join("api.sock"), dir.path().join("disk.sock"));
    // Nobody listens there: the device waits, which is enough.
    let text = format!(
        "disk=virtio-blk,socket={},tls=off,connect=127.0.0.1:4,subnqn={NQN},nsid=1",
        socket.display()
    );
    let path = api.to_str().unwrap();
    let arguments = ["emulate", "--cores", "1", "--supervise", "--device", &text, "--api", path];
    let supervisor = Running::start(&arguments);
    wait(&api, |device| device["name"] == "disk");
    let inode = std::fs::metadata(&socket).unwrap().ino();
    // A client that waits is one whom the next worker has to serve.
    let client = UnixStream::connect(&socket).unwrap();
    for round in 1..=2 {
        let before = worker(&supervisor).unwrap();
        let pid = Pid::from_raw(i32::try_from(before).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        let start = Instant::now();
        while worker(&supervisor).is_none_or(|now| now == before) {
            assert!(start.elapsed() < LIMIT, "no worker in round {round}");
            std::thread::park_timeout(Duration::from_millis(20));
        }
        wait(&api, |device| device["name"] == "disk");
        assert_eq!(std::fs::metadata(&socket).unwrap().ino(), inode);
    }
    client.set_nonblocking(true).unwrap();
    let error = (&client).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "the client has been cut off");

    // An end in order takes the worker along, and the sockets away.
    let last = worker(&supervisor).unwrap();
    let mut supervisor = supervisor;
    kill_process(Pid::from_child(&supervisor.0), Signal::TERM).unwrap();
    assert_eq!(supervisor.0.wait().unwrap().code(), Some(0));
    assert!(!socket.exists() && !api.exists());
    assert!(!Path::new(&format!("/proc/{last}")).exists());
}

#[test]
fn a_worker_does_not_outlive_its_supervisor() {
    let dir = tempfile::tempdir().unwrap();
    let api = dir.path().join("api.sock");
    let socket = dir.path().join("disk.sock");
    let text = format!(
        "disk=nvme,socket={},tls=off,connect=127.0.0.1:4,subnqn={NQN},nsid=1",
        socket.display()
    );
    let path = api.to_str().unwrap();
    let arguments =
        ["emulate", "--cores", "1", "--supervise=auto", "--device", &text, "--api", path];
    let supervisor = Running::start(&arguments);
    wait(&api, |device| device["name"] == "disk");
    // An NVMe device is one that wants a supervisor.
    assert!(worker(&supervisor).is_some());
    drop(supervisor);
    // It ends in order, and takes the socket that is its own away.
    let start = Instant::now();
    while api.exists() {
        assert!(start.elapsed() < LIMIT, "the worker goes on");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// What /proc says of every thread of a process behind `key`.
fn status(pid: u32, key: &str) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let texts = threads.map(|entry| {
        let text = std::fs::read_to_string(entry.unwrap().path().join("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    });
    texts.collect()
}

#[test]
fn a_process_becomes_the_user_it_is_told_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let (api, socket) = (dir.path().join("api.sock"), dir.path().join("disk.sock"));
    let text = format!(
        "disk=virtio-blk,socket={},tls=off,connect=127.0.0.1:4,subnqn={NQN},nsid=1",
        socket.display()
    );
    let path = api.to_str().unwrap();
    let emulate = ["emulate", "--cores", "1", "--device", &text, "--api", path];
    let other = dir.path().join("target.sock");
    let volume = ["--volume", "a=ram:4MiB", "--listen", "127.0.0.1:0", "--cores", "1"];
    let target = [&["target"][..], &volume, &["--api", other.to_str().unwrap()]].concat();
    let user = ["--user", "4242:4243"];
    if !rustix::process::geteuid().is_root() {
        for arguments in [&emulate[..], &target] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
            let output = command.args(arguments).args(user).output().unwrap();
            let text = String::from_utf8(output.stderr).unwrap();
            assert!(text.contains("becoming user 4242 (start as root, or as that user)"), "{text}");
        }
        return;
    }
    let emulator = Running::start(&[&emulate[..], &user].concat());
    let target = Running::start(&[&target[..], &user].concat());
    wait(&api, |device| device["name"] == "disk");
    let start = Instant::now();
    while UnixStream::connect(&other).is_err() || status(target.0.id(), "Uid:").len() < 2 {
        assert!(start.elapsed() < LIMIT, "the target does not come");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    for process in [&emulator, &target] {
        let pid = process.0.id();
        for (key, expected) in [
            ("Uid:", "4242 4242 4242 4242"),
            ("Gid:", "4243 4243 4243 4243"),
            ("Groups:", ""),
            ("NoNewPrivs:", "1"),
            ("CapEff:", "0000000000000000"),
            ("CapPrm:", "0000000000000000"),
        ] {
            let threads = status(pid, key);
            assert!(threads.iter().all(|value| value == expected), "{key} {threads:?}");
        }
    }
    for path in [&socket, &api, &other] {
        let metadata = std::fs::metadata(path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (4242, 4243), "{}", path.display());
    }
}
