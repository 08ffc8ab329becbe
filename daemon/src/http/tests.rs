//! Every endpoint over a real socket, and requests that make no sense.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::config::Draft;
use crate::run::Daemon;

struct Rig {
    daemon: Option<Daemon>,
    runtime: tokio::runtime::Runtime,
    scratch: TempDir,
}

impl Rig {
    fn new() -> Rig {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let mut rig = Rig { daemon: None, runtime, scratch: tempfile::tempdir().unwrap() };
        rig.start();
        rig
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("api.sock")
    }

    fn start(&mut self) {
        let dir = self.scratch.path();
        let text = format!(
            "[data]\ndir = {data:?}\n[api]\nsocket = {socket:?}\n[[volume]]\nname = \"a\"\nspec = \
             \"ram:1M\"\n[target]\nlisten = [\"127.0.0.1:0\"]\ndiscovery = [\"127.0.0.1:0\"]\ncores \
             = 1\n",
            data = dir.join("data"),
            socket = self.path(),
        );
        let config = Draft::from_toml(Path::new("test.toml"), &text).unwrap().check().unwrap();
        let _inside = self.runtime.enter();
        self.daemon = Some(Daemon::start(config).unwrap());
    }

    fn stop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.stop().unwrap();
        }
    }

    fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Sends bytes and reads until the server closes.
    fn raw(&self, request: &[u8]) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // A server that has heard enough stops reading, and may reset the connection behind its
        // answer.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8(answer).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: penstock\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.raw(request.as_bytes())
    }

    #[track_caller]
    fn must(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.ask(method, path, body);
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer
    }

    #[track_caller]
    fn refused(&self, method: &str, path: &str, body: Option<Value>, status: u16, error: &str) {
        let (found, answer) = self.ask(method, path, body);
        assert_eq!((found, answer["error"].as_str()), (status, Some(error)), "{path}: {answer}");
        assert!(!answer["what"].as_str().unwrap().is_empty());
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.stop();
        }
    }
}

#[test]
fn every_endpoint_does_what_it_says() {
    let rig = Rig::new();
    let mode = std::fs::metadata(rig.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "for its owner alone");

    let status = rig.must("GET", "/v1/status", None);
    assert_eq!(status["api"], 1);
    assert_eq!(status["kept"], true);
    assert_eq!(status["volumes"][0]["name"], "a");
    assert_eq!(status["ports"].as_array().unwrap().len(), 2);
    assert_eq!(status["power"]["power_cycles"], 1);
    let port = status["ports"][0]["portid"].as_u64().unwrap();

    let file = rig.scratch.path().join("b.img");
    let spec = format!("file:{},size=1MiB", file.display());
    let done = rig.must("POST", "/v1/volumes", Some(json!({"name": "b", "spec": spec})));
    assert_eq!(done["kept"], true);
    assert_eq!(done["volume"]["size_bytes"], 1 << 20);
    assert_eq!(rig.must("GET", "/v1/volumes", None).as_array().unwrap().len(), 2);
    let done = rig.must("POST", "/v1/volumes/b/resize", Some(json!({"size_bytes": 2 << 20})));
    assert_eq!(done["volume"]["size_bytes"], 2 << 20);
    let host = "nqn.2014-08.com.example:host-a";
    let done = rig.must("PUT", "/v1/volumes/b/hosts", Some(json!({"hosts": [host]})));
    assert_eq!(done["volume"]["hosts"], json!([host]));
    let done = rig.must("PUT", "/v1/volumes/b/ana-group", Some(json!({"ana_group": 2})));
    assert_eq!(done["volume"]["ana_group"], 2);
    let done = rig.must("PUT", "/v1/volumes/b/write-protect", Some(json!({"enabled": true})));
    assert_eq!(done["volume"]["write_protected"], true);

    let done = rig.must("POST", "/v1/subsystems", Some(json!({"name": "second"})));
    let nqn = done["subsystem"]["nqn"].as_str().unwrap().to_owned();
    assert!(nqn.starts_with("nqn."), "{nqn}");
    rig.must("PUT", "/v1/subsystems/second/hosts", Some(json!({"hosts": []})));
    assert_eq!(rig.must("GET", "/v1/subsystems/second", None)["hosts"], json!([]));
    rig.must("PUT", "/v1/ana", Some(json!({"port": port, "group": 1, "state": "inaccessible"})));
    let subsystems = rig.must("GET", "/v1/subsystems", None);
    let is_told = |subsystem: &Value| {
        subsystem["ana"].as_array().unwrap().iter().any(|entry| {
            entry["port"] == port && entry["group"] == 1 && entry["state"] == "inaccessible"
        })
    };
    assert!(subsystems.as_array().unwrap().iter().any(is_told), "{subsystems}");
    assert_eq!(
        rig.must("POST", "/v1/hosts/disconnect", Some(json!({"hostnqn": host})))["ended"],
        0
    );

    let asked = rig.must("PUT", "/v1/breakdown", Some(json!({"every": 7})));
    assert_eq!((&asked["every"], &asked["reads"]["requests"]), (&json!(7), &json!(0)));
    let found = rig.must("GET", "/v1/breakdown", None);
    assert_eq!(
        (&found["every"], &found["others"]["stages"][0]["stage"]),
        (&json!(7), &json!("receive"))
    );
    rig.refused("PUT", "/v1/breakdown", Some(json!({"often": 7})), 400, "invalid");

    rig.must("POST", "/v1/referrals", Some(json!({"addr": "192.0.2.9:8009"})));
    assert_eq!(rig.must("GET", "/v1/referrals", None)[0]["addr"], "192.0.2.9:8009");
    rig.must("DELETE", "/v1/referrals?addr=192.0.2.9:8009", None);
    assert_eq!(rig.must("GET", "/v1/referrals", None), json!([]));
    rig.must(
        "PUT",
        "/v1/referrals",
        Some(json!({"referrals": [{"addr": "192.0.2.8:8009"}, {"addr": "[2001:db8::1]:8009"}]})),
    );
    assert_eq!(rig.must("GET", "/v1/referrals", None).as_array().unwrap().len(), 2);

    rig.must("DELETE", "/v1/subsystems/second", None);
    rig.must("DELETE", "/v1/volumes/b", None);
    assert!(file.exists(), "what is on the disk stays");
    // The lock of the file is free as soon as the answer is there.
    rig.must("POST", "/v1/volumes", Some(json!({"name": "b", "spec": spec})));
}

#[test]
fn run_time_changes_survive_a_restart() {
    let mut rig = Rig::new();
    let spec = format!("file:{},size=1MiB", rig.scratch.path().join("b.img").display());
    let b = rig.must("POST", "/v1/volumes", Some(json!({"name": "b", "spec": spec, "nsid": 7})));
    rig.must("POST", "/v1/subsystems", Some(json!({"name": "second"})));
    rig.must("PUT", "/v1/volumes/a/write-protect", Some(json!({"enabled": true})));
    rig.must("POST", "/v1/referrals", Some(json!({"addr": "192.0.2.9:8009"})));
    rig.must("PUT", "/v1/ana", Some(json!({"group": 3, "state": "non-optimized"})));
    let before = rig.must("GET", "/v1/status", None);
    rig.restart();
    let after = rig.must("GET", "/v1/status", None);
    for what in ["discovery_nqn", "volumes", "referrals"] {
        assert_eq!(before[what], after[what], "{what}");
    }
    let names = |status: &Value| -> Vec<(Value, Value, Value, Value)> {
        let subsystems = status["subsystems"].as_array().unwrap().iter();
        subsystems
            .map(|s| (s["name"].clone(), s["nqn"].clone(), s["serial"].clone(), s["ana"].clone()))
            .collect()
    };
    assert_eq!(names(&before), names(&after));
    assert_eq!(after["power"]["power_cycles"], 2);
    assert_eq!(after["power"]["unsafe_shutdowns"], 0);
    rig.must("DELETE", "/v1/volumes/b", None);
    rig.restart();
    let (status, _) = rig.ask("GET", "/v1/volumes/b", None);
    assert_eq!(status, 404, "detached is detached");
    let again = rig.must("POST", "/v1/volumes", Some(json!({"name": "b", "spec": spec})));
    assert_eq!(again["volume"]["uuid"], b["volume"]["uuid"], "the same disk to every host");
    assert_eq!(again["volume"]["nsid"], 7);
}

#[test]
fn what_makes_no_sense_is_refused_in_json() {
    let rig = Rig::new();
    rig.refused("GET", "/", None, 404, "not_found");
    rig.refused("GET", "/v2/status", None, 404, "not_found");
    rig.refused("DELETE", "/v1/status", None, 405, "method");
    rig.refused("GET", "/v1/volumes/nope", None, 404, "not_found");
    rig.refused("DELETE", "/v1/volumes/nope", None, 404, "not_found");
    rig.refused(
        "POST",
        "/v1/volumes",
        Some(json!({"name": "../x", "spec": "ram:1M"})),
        400,
        "invalid",
    );
    rig.refused(
        "POST",
        "/v1/volumes",
        Some(json!({"name": "x", "spec": "ram:-1"})),
        400,
        "invalid",
    );
    rig.refused(
        "POST",
        "/v1/volumes",
        Some(json!({"name": "x", "spec": "ram:1M", "no": 1})),
        400,
        "invalid",
    );
    rig.refused(
        "POST",
        "/v1/volumes",
        Some(json!({"name": "x", "spec": "ram:1M", "nsid": 1})),
        409,
        "conflict",
    );
    rig.refused(
        "POST",
        "/v1/volumes",
        Some(json!({"name": "a", "spec": "ram:1M"})),
        409,
        "conflict",
    );
    rig.refused("PUT", "/v1/volumes/a/hosts", Some(json!({"hosts": ["no nqn"]})), 400, "invalid");
    rig.refused("PUT", "/v1/volumes/a/hosts", Some(json!({})), 400, "invalid");
    rig.refused("PUT", "/v1/volumes/a/ana-group", Some(json!({"ana_group": 0})), 400, "invalid");
    rig.refused(
        "PUT",
        "/v1/ana",
        Some(json!({"port": 999, "group": 1, "state": "change"})),
        404,
        "not_found",
    );
    rig.refused("PUT", "/v1/ana", Some(json!({"group": 1, "state": "sleepy"})), 400, "invalid");
    rig.refused("POST", "/v1/volumes?timeout=0", Some(json!({"name": "x"})), 400, "invalid");
    rig.refused("POST", "/v1/volumes?colour=red", Some(json!({"name": "x"})), 400, "invalid");
    let long = "x".repeat(api::BODY_BYTES_MAX + 1);
    rig.refused("POST", "/v1/volumes", Some(json!({"name": long})), 413, "too_large");
    for junk in [
        &b"\0\0\0\0\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n{{{{{",
        b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let (status, _) = rig.raw(junk);
        assert!((400..500).contains(&status), "{status} to {junk:?}");
    }
    assert_eq!(rig.must("GET", "/v1/volumes", None).as_array().unwrap().len(), 1, "nothing came");
}

#[test]
fn a_path_that_is_taken_is_left_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    let error = format!("{:#}", bind(&path).unwrap_err());
    assert!(error.contains("no socket") && error.contains("--api"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let path = scratch.path().join("socket");
    let first = bind(&path).unwrap();
    let error = format!("{:#}", bind(&path).unwrap_err());
    assert!(error.contains("another process listens"), "{error}");
    drop(first);
    // A socket file without a listener is what a killed process leaves.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(bind(&path).unwrap());
    assert!(!path.exists());
}
