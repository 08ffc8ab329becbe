//! QEMU's machine protocol: a JSON object on each line, both ways, over a Unix socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take for an answer. It gives them between the guest's instructions.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection to a QEMU that runs.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    /// What QEMU said without being asked and nobody has waited for yet, in order.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to the socket of a QEMU that has made it already.
    pub(super) fn connect(socket: &Path) -> Result<Qmp> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("no QEMU at {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Qmp { stream: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.line()?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU greets with {greeting}");
        }
        qmp.execute("qmp_capabilities", &Value::Null)?;
        Ok(qmp)
    }

    /// Executes a command, `Null` standing for no arguments, and returns what it gives.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut request = json!({"execute": command});
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        writeln!(self.stream.get_mut(), "{request}")?;
        loop {
            let mut answer = self.line().with_context(|| format!("{command} {arguments}"))?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command} {arguments}: {}", error["desc"]);
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for an event of this name, and returns its data.
    pub(super) fn event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let start = Instant::now();
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at)["data"].take());
            }
            let rest = limit.checked_sub(start.elapsed()).filter(|rest| !rest.is_zero());
            let rest = rest.with_context(|| format!("no {name} within {} s", limit.as_secs()))?;
            self.stream.get_ref().set_read_timeout(Some(rest))?;
            let line = self.line().with_context(|| format!("waiting for {name}"))?;
            self.stream.get_ref().set_read_timeout(Some(ANSWER_LIMIT))?;
            self.events.push(line);
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("QEMU says nothing")? == 0 {
            bail!("QEMU has closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU says {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn answers_are_told_from_events() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let said = [
            "{\"return\": {}}",
            "{\"event\": \"RESUME\", \"data\": {}}\n{\"return\": {\"status\": \"running\"}}",
            "{\"error\": {\"desc\": \"no such device\"}}\n\
             {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"disk\"}}",
        ];
        let qemu = std::thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            writeln!(stream.get_mut(), "{{\"QMP\": {{}}}}").unwrap();
            said.map(|said| {
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                writeln!(stream.get_mut(), "{said}").unwrap();
                serde_json::from_str::<Value>(&line).unwrap()
            })
        });
        let mut qmp = Qmp::connect(&socket).unwrap();
        assert_eq!(qmp.execute("query-status", &Value::Null).unwrap()["status"], "running");
        let refused = qmp.execute("device_del", &json!({"id": "disk"})).unwrap_err();
        assert!(refused.to_string().contains("no such device"), "{refused}");
        let limit = Duration::from_secs(20);
        assert_eq!(qmp.event("DEVICE_DELETED", limit).unwrap()["device"], "disk");
        assert_eq!(qmp.event("RESUME", limit).unwrap(), json!({}));
        let asked = qemu.join().unwrap();
        assert_eq!(asked[0], json!({"execute": "qmp_capabilities"}));
        assert_eq!(asked[2], json!({"execute": "device_del", "arguments": {"id": "disk"}}));
        assert!(qmp.event("STOP", limit).unwrap_err().to_string().contains("waiting for STOP"));
    }
}
