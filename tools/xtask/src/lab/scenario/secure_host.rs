//! The Linux kernel's host with TLS and in-band authentication against our target, by the lines that
//! `penstock key export` prints.
//!
//! GnuTLS in Debian 13 (3.8.9) cannot set up a pre-shared key for SHA-384, whatever the agent asks
//! it for: keys of 48 bytes are shown by the handshake tests of `crypto`, not here.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::super::Scene;
use super::super::guest::Job;
use super::super::service::{Service, free_ports, is_listening};
use super::super::tree::Kernel;
use super::{HOST_ADDRESS, READY_LIMIT, SUBNQN, file_volume, fio_result, manage};
use crate::exec;
use crate::report::Outcome;

/// nvme-cli of the tree.
const NVME_CLI: &str = "2.13";
/// Every hash, and the groups that an emulated host can compute within the ten seconds that a target
/// gives it to authenticate. `crypto` tests ffdhe6144 and ffdhe8192.
const AUTH: [(&str, &str); 4] =
    [("sha256", "null"), ("sha384", "ffdhe2048"), ("sha512", "ffdhe3072"), ("sha256", "ffdhe4096")];

pub(super) fn stable(scene: &Scene<'_>) -> Result<Outcome> {
    run(scene, Kernel::Stable, false)
}

pub(super) fn backports(scene: &Scene<'_>) -> Result<Outcome> {
    run(scene, Kernel::Backports, true)
}

fn host(n: u32) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{n:012}")
}

/// A target of its own with its management socket.
struct Served {
    service: Service,
    socket: std::path::PathBuf,
}

impl Served {
    fn start(
        scene: &Scene<'_>,
        name: &str,
        volume: &str,
        args: &[String],
        ports: &[u16],
    ) -> Result<Served> {
        let socket = scene.socket(&format!("{name}.sock"));
        let mut command = scene.penstock();
        command.args(["target", "--cores", "1", "--subnqn", SUBNQN, "--volume", volume, "--api"]);
        command.arg(&socket).args(args);
        let log = scene.path(&format!("{name}.log"));
        let mut service = Service::start(name, &command, &log)?;
        service.wait_until("listening ports", READY_LIMIT, |_| {
            ports.iter().all(|port| is_listening(*port)) && socket.exists()
        })?;
        Ok(Served { service, socket })
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        manage::request(&self.socket, method, path, body)
            .with_context(|| format!("{method} {path}"))
    }

    fn generate(&self, host: &str, kind: &str, more: &Value) -> Result<String> {
        let mut body = json!({"host": host, "kind": kind});
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let key = self.call("POST", "/v1/keys", &body)?;
        Ok(key["id"].as_str().context("no id")?.to_owned())
    }

    /// What the operator is told to run, by the command line.
    fn export(&self, scene: &Scene<'_>, host: &str, port: u16, more: &[&str]) -> Result<String> {
        let mut command = scene.penstock();
        command.args(["key", "export", "--host", host, "--subsystem", SUBNQN, "--nvme-cli"]);
        command.args([NVME_CLI, "--address", &format!("{HOST_ADDRESS}:{port}"), "--api"]);
        exec::output(command.arg(&self.socket).args(more).stdin(Stdio::null()))
    }
}

/// The line without the arguments that begin with these words.
fn without(lines: &str, words: &[&str]) -> String {
    let keep = |word: &&str| !words.iter().any(|prefix| word.starts_with(prefix));
    lines
        .lines()
        .map(|line| line.split(' ').filter(keep).collect::<Vec<_>>().join(" ") + "\n")
        .collect()
}

fn run(scene: &Scene<'_>, kernel: Kernel, concatenates: bool) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", 64);
    let [tls_port, any_port] = free_ports()?;
    let listen = |port: u16, tls: &str| {
        [
            "--listen".to_owned(),
            format!("127.0.0.1:{port},advertise={HOST_ADDRESS}:{port},tls={tls}"),
        ]
    };
    let args = [listen(tls_port, "required"), listen(any_port, "allowed")].concat();
    let mut main = Served::start(scene, "target", &volume, &args, &[tls_port, any_port])?;
    let none = Value::Null;
    let mut job = Job::new("secure-host.sh").network();
    job.limit = Duration::from_secs(900);
    let mut give = |name: &str, lines: String| {
        job.files.push((format!("lines.{name}"), lines.into_bytes()));
    };

    let tls = main.generate(&host(1), "tls", &none)?;
    let lines = main.export(scene, &host(1), tls_port, &[])?;
    give("tls-v1", lines.clone());
    give("tls-v0", main.export(scene, &host(1), tls_port, &["--identity", "0"])?);
    give("plain", without(&lines, &["--tls"]));
    give("stranger", lines.replace(&host(1), &host(8)));
    // Names of host 2, key of host 1.
    main.generate(&host(2), "tls", &none)?;
    give("wrong", lines.replace(&host(1), &host(2)));
    // The old key and the new one beside each other, until the old one is removed.
    let old = main.generate(&host(9), "tls", &none)?;
    give("overlap-old", main.export(scene, &host(9), tls_port, &[])?);
    main.call("POST", &format!("/v1/keys/{old}/rotate"), &json!({"overlap_s": 900}))?;
    give("overlap-new", main.export(scene, &host(9), tls_port, &[])?);
    main.generate(&host(3), "tls", &json!({"expires_in_s": 3}))?;
    give("expired", main.export(scene, &host(3), tls_port, &[])?);
    // Both at once, and the one made from the other.
    main.generate(&host(4), "tls", &none)?;
    main.generate(&host(4), "dhchap", &none)?;
    give("both", main.export(scene, &host(4), tls_port, &[])?);
    main.generate(&host(5), "dhchap", &none)?;
    if concatenates {
        give("concat", main.export(scene, &host(5), any_port, &["--concat"])?);
    }

    let mut others = Vec::new();
    let mut first_secret = String::new();
    let mut ports = Vec::new();
    for (n, (hash, group)) in (1..).zip(AUTH) {
        let [port] = free_ports()?;
        let args = [
            listen(port, "off").to_vec(),
            ["--auth-hash", hash, "--auth-group", group].map(str::to_owned).to_vec(),
        ]
        .concat();
        let served = Served::start(scene, &format!("auth-{n}"), "disk=ram:16M", &args, &[port])?;
        let bits = json!({"bits": hash[3..].parse::<u32>()?});
        let secret = served.generate(&host(6), "dhchap", &bits)?;
        let one_way = served.export(scene, &host(6), port, &[])?;
        served.generate(&host(6), "dhchap-controller", &bits)?;
        let mutual = served.export(scene, &host(6), port, &[])?;
        if n == 1 {
            served.generate(&host(7), "dhchap", &none)?;
            give("bad-secret", one_way.replace(&host(6), &host(7)));
            give("no-secret", without(&one_way, &["--dhchap"]));
            // For a host whose secret is changed while it is connected.
            let new = json!({"overlap_s": 900});
            served.call("POST", &format!("/v1/keys/{secret}/rotate"), &new)?;
            give("new-secret", served.export(scene, &host(6), port, &[])?);
            first_secret = secret;
        }
        give(&format!("one-way-{n}"), one_way);
        give(&format!("mutual-{n}"), mutual);
        ports.push(port.to_string());
        others.push(served);
    }
    let [tls_text, any_text] = [tls_port, any_port].map(|port| port.to_string());
    job = job.args(&[SUBNQN, &tls_text, &any_text]);
    job = job.args(&ports.iter().map(String::as_str).collect::<Vec<_>>());
    // Three seconds are over long before the guest asks.
    let mut guest = scene.boot("guest", kernel, &job)?;
    guest.wait_until("word of the rotation", |console| {
        manage::last_line(console, "rotate: ").is_some()
    })?;
    main.call("POST", &format!("/v1/keys/{tls}/rotate"), &json!({"overlap_s": 0}))?;
    guest.wait_until("word of the end of the overlap", |console| {
        manage::last_line(console, "overlap: ").is_some()
    })?;
    main.call("DELETE", &format!("/v1/keys/{old}"), &none)?;
    guest.wait_until("word of the new secret", |console| {
        manage::last_line(console, "secret: ").is_some()
    })?;
    others[0].call("DELETE", &format!("/v1/keys/{first_secret}"), &none)?;
    let results = guest.finish()?;

    let mut names = ["tls-v1", "tls-v0", "rotation", "both", "overlap-new", "overlap", "secret"]
        .map(str::to_owned)
        .to_vec();
    names.extend((1..=AUTH.len()).flat_map(|n| [format!("one-way-{n}"), format!("mutual-{n}")]));
    names.extend(concatenates.then(|| "concat".to_owned()));
    for name in names {
        fio_result(&results.json(&format!("fio-{name}.json"))?, &name)?;
    }
    // Each refusal is explained.
    let status = main.call("GET", "/v1/status", &none)?;
    let said = status["refusals"].to_string();
    for words in ["does not speak TLS", "not registered", "expected", "has expired"] {
        ensure!(said.contains(words), "no refusal says {words:?}: {said}");
    }
    let status = others[0].call("GET", "/v1/status", &none)?;
    let said = status["refusals"].to_string();
    for words in ["another secret than ours", "did not go on with DH-HMAC-CHAP but closed"] {
        ensure!(said.contains(words), "no refusal says {words:?}: {said}");
    }
    main.service.must_run()?;
    for other in &mut others {
        other.service.must_run()?;
    }
    std::fs::remove_file(image)?;
    Ok(Outcome::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_left_out() {
        let lines = "# c\nnvme connect --nqn=a --tls --tls-key=k\n";
        assert_eq!(without(lines, &["--tls"]), "# c\nnvme connect --nqn=a\n");
    }
}
