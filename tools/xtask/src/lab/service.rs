//! A program started for a scenario: it ends with it, whatever happens.

use std::fs::File;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::{exec, install};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);

/// A running program with its output in a file. Dropping it kills it and waits for its end.
pub(super) struct Service {
    name: String,
    child: Child,
    log: PathBuf,
    /// Where this run's output begins: a log may hold those of several.
    log_start: usize,
}

impl Service {
    /// Starts `command` with all its output appended to `log`.
    pub(super) fn start(name: &str, command: &Command, log: &Path) -> Result<Self> {
        let mut file = File::options().create(true).append(true).open(log)?;
        println!("starting {name}, its log is {}", log.display());
        writeln!(file, "$ {}", exec::shown(command))?;
        let log_start = usize::try_from(file.metadata()?.len())?;
        // Even if we are killed, nothing we started stays behind. And Ctrl-C has to mean what it
        // means on a terminal, though a shell that started us in the background had it ignored.
        let mut bound = match install::program("setpriv") {
            Some(setpriv) => {
                let mut bound = Command::new(setpriv);
                bound.args(["--pdeathsig", "KILL", "env", "--default-signal=INT"]);
                bound.arg(command.get_program());
                bound
            }
            None => Command::new(command.get_program()),
        };
        bound.args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => bound.env(key, value),
                None => bound.env_remove(key),
            };
        }
        let child = bound
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), log_start })
    }

    /// What the program has written so far.
    pub(super) fn text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.log_start..).unwrap_or_default()).into_owned()
    }

    /// Waits until `is_true`; the program's end or `limit` first is an error.
    pub(super) fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut is_true: impl FnMut(&Self) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let ended = self.child.try_wait()?;
            if is_true(self) {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!(
                    "{} ended ({status}) before {what}:\n{}",
                    self.name,
                    exec::tail(&self.log, 15)
                );
            }
            if start.elapsed() > limit {
                bail!(
                    "{}: no {what} within {} s:\n{}",
                    self.name,
                    limit.as_secs(),
                    exec::tail(&self.log, 15)
                );
            }
            sleep(POLL);
        }
    }

    /// Waits for the program's own end.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!("{} still runs after {} s", self.name, limit.as_secs());
            }
            sleep(POLL);
        }
    }

    /// SIGKILL, as a crash would look from outside.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The one process that this one has started, if it has.
    pub(super) fn only_child(&self) -> Option<u32> {
        let pid = self.child.id();
        let path = format!("/proc/{pid}/task/{pid}/children");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// SIGINT, as Ctrl-C on a terminal.
    pub(super) fn interrupt(&mut self) -> Result<()> {
        self.signal("INT")
    }

    /// SIGHUP, by which a supervisor is told to replace its worker.
    pub(super) fn hang_up(&mut self) -> Result<()> {
        self.signal("HUP")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let pid = self.child.id().to_string();
        exec::run(Command::new("sh").args(["-c", "kill -s \"$1\" \"$2\"", "sh", name, &pid]))
    }

    /// Fails if the program ended although it has to run on.
    pub(super) fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                bail!("{} ended ({status}):\n{}", self.name, exec::tail(&self.log, 15))
            }
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// TCP ports that are free now, all different.
pub(super) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut listeners = Vec::with_capacity(N);
    for _ in 0..N {
        listeners.push(TcpListener::bind(("127.0.0.1", 0))?);
    }
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// Whether something accepts connections on a port of this machine.
pub(super) fn is_listening(port: u16) -> bool {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, folder: &Path) -> Service {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Service::start("shell", &command, &folder.join("log")).unwrap()
    }

    #[test]
    fn output_is_seen_and_the_end_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let mut service = shell("echo ready; read -r x; exit 3", folder.path());
        let limit = Duration::from_secs(20);
        service.wait_until("a word", limit, |s| s.text().contains("ready")).unwrap();
        assert_eq!(service.wait(limit).unwrap().code(), Some(3));
        let error = service.wait_until("more", limit, |_| false).unwrap_err();
        assert!(error.to_string().contains("shell ended (exit status: 3) before more"), "{error}");
    }

    #[test]
    fn an_interrupt_reaches_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done";
        let mut service = shell(script, folder.path());
        let limit = Duration::from_secs(20);
        service.wait_until("a word", limit, |s| s.text().contains("ready")).unwrap();
        service.must_run().unwrap();
        service.interrupt().unwrap();
        assert_eq!(service.wait(limit).unwrap().code(), Some(5));
        assert!(service.must_run().unwrap_err().to_string().contains("caught"));
    }

    #[test]
    fn free_ports_differ() {
        let [a, b] = free_ports::<2>().unwrap();
        assert_ne!(a, b);
        assert!(!is_listening(a));
    }
}
