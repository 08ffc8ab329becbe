//! The management API of a running target, as any program of an operator uses it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::Scene;
use super::super::service::{Service, free_ports, is_listening};
use super::{HOST_ADDRESS, READY_LIMIT, SUBNQN};
use crate::report::Outcome;

/// A target with several I/O ports and a management socket.
pub(super) struct Managed {
    pub(super) service: Service,
    pub(super) ports: Vec<u16>,
    socket: PathBuf,
}

impl Managed {
    /// Serves `volumes` as namespaces, in their order, through `N` ports with IDs from 1.
    pub(super) fn start<const N: usize>(scene: &Scene<'_>, volumes: &[String]) -> Result<Managed> {
        let ports = free_ports::<N>()?;
        let socket = scene.socket("api.sock");
        let mut command = scene.penstock();
        command.arg("target");
        for volume in volumes {
            command.args(["--volume", volume]);
        }
        for port in ports {
            let listen = format!("127.0.0.1:{port},advertise={HOST_ADDRESS}:{port}");
            command.args(["--listen", &listen]);
        }
        command.args(["--subnqn", SUBNQN, "--api"]).arg(&socket);
        let mut service = Service::start("penstock target", &command, &scene.path("target.log"))?;
        service.wait_until("listening ports", READY_LIMIT, |_| {
            ports.iter().all(|port| is_listening(*port)) && socket.exists()
        })?;
        Ok(Managed { service, ports: ports.to_vec(), socket })
    }

    /// Our program, for a command on this target.
    pub(super) fn client(&self, scene: &Scene<'_>) -> Command {
        let mut command = scene.penstock();
        command.env("PENSTOCK_API", &self.socket);
        command
    }

    /// One request; anything but success is an error. An empty answer is `Null`.
    pub(super) fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let said = request(&self.socket, method, path, body);
        said.with_context(|| format!("{method} {path} {body}"))
    }
}

/// One request to a management socket.
pub(super) fn request(socket: &Path, method: &str, path: &str, body: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status.starts_with('2'), "refused: {}", answer.trim());
    if body.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(body)?) }
}

/// Why the release binary cannot be managed, if so.
pub(super) fn missing(scene: &Scene<'_>) -> Result<Option<Outcome>> {
    let help = crate::exec::output(scene.penstock().args(["target", "--help"]))?;
    let why = "this penstock has no management API (target --api)";
    Ok((!help.contains("--api")).then(|| Outcome::Skipped(why.to_owned())))
}

/// A port by which a guest's script is told to come to its end: it takes no connection before.
pub(super) struct StopPort(u16);

impl StopPort {
    pub(super) fn new() -> Result<StopPort> {
        let [port] = free_ports()?;
        Ok(StopPort(port))
    }

    pub(super) fn name(&self) -> String {
        self.0.to_string()
    }

    /// Takes connections from now on, until this process ends, and closes each at once: the guest's
    /// `nc` stays for as long as its connection does.
    pub(super) fn open(&self) -> Result<()> {
        let listener = TcpListener::bind(("127.0.0.1", self.0))?;
        std::thread::spawn(move || listener.incoming().for_each(drop));
        Ok(())
    }
}

/// Makes a file of the scenario longer or shorter behind the target's back.
pub(super) fn resize(path: &Path, mib: u64) -> Result<()> {
    Ok(File::options().write(true).open(path)?.set_len(mib << 20)?)
}

/// The words behind the last whole line of a console that begins with `key`.
pub(super) fn last_line<'a>(console: &'a str, key: &str) -> Option<Vec<&'a str>> {
    let whole = &console[..console.rfind('\n')?];
    let line = whole.lines().rev().find_map(|line| line.trim().strip_prefix(key))?;
    Some(line.split_whitespace().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_counts() {
        let console = "boot\r\npaths: 1 2\r\nnoise\r\npaths: 3 4\r\npaths: 5";
        assert_eq!(last_line(console, "paths: ").unwrap(), ["3", "4"]);
        assert_eq!(last_line(console, "sectors: "), None);
        assert_eq!(last_line("paths: 1", "paths: "), None);
    }
}
