//! Tries from the inside what a guest that took the process over would try.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use reactor::{CoreConfig, Outcome, Port, Progress, Task};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::cores::{self, Cores};

/// How long an attempt may take, which the kernel decides at once.
const LIMIT: Duration = Duration::from_secs(5);

/// One attempt and what came of it.
#[derive(Debug)]
pub struct Attempt {
    /// What was tried.
    pub what: &'static str,
    /// How it was refused; `None`: it was not.
    pub refused: Option<String>,
}

/// Makes every attempt. `core` is a running core of the emulator, `dir` a directory that the process
/// has a socket in.
pub(crate) fn attempts(core: &Cores, dir: &Path) -> Vec<Attempt> {
    let refused = |what, result: io::Result<()>| Attempt {
        what,
        refused: result.err().map(|error| error.to_string()),
    };
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let parent = rustix::process::getppid().unwrap_or(Pid::INIT);
    let program = || Command::new("/bin/false");
    vec![
        refused("open a file", std::fs::File::open("/etc/passwd").map(drop)),
        refused("read its own program", std::fs::File::open("/proc/self/exe").map(drop)),
        refused("list a directory", std::fs::read_dir("/").map(drop)),
        refused("create a file", std::fs::write(dir.join("containment-check"), "")),
        refused("create a directory", std::fs::create_dir(dir.join("containment-check"))),
        // Does not return where it is granted; the exit code of the program then says so.
        refused("become another program", Err(program().exec())),
        refused("start a program", program().stdin(Stdio::null()).spawn().map(drop)),
        refused("connect to a Unix socket", UnixStream::connect("/run/x").map(drop)),
        refused("make a UDP socket", UdpSocket::bind("127.0.0.1:0").map(drop)),
        refused("connect by a system call", connect_plainly(nowhere)),
        refused("connect to a port of nobody's on a core's ring", connect_on_ring(core, nowhere)),
        refused("make a ring", ring()),
        refused(
            "signal its parent",
            rustix::process::kill_process(parent, Signal::CONT).map_err(Into::into),
        ),
        refused(
            "hold another process",
            rustix::process::pidfd_open(parent, PidfdFlags::empty()).map(drop).map_err(Into::into),
        ),
    ]
}

/// Nobody listens there: being told so is being let through.
fn connect_plainly(addr: SocketAddr) -> io::Result<()> {
    through(TcpStream::connect_timeout(&addr, LIMIT).map(drop))
}

fn through(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        result => result,
    }
}

fn ring() -> io::Result<()> {
    let config = CoreConfig { entries: 8, pool_bytes: 1 << 20, ..cores::core_config() };
    Cores::start("containment-check", 1, &config, |_| {}).map(drop).map_err(io::Error::other)
}

fn connect_on_ring(core: &Cores, addr: SocketAddr) -> io::Result<()> {
    let (sender, result) = mpsc::channel();
    core.on(0, move |spawner| {
        let port = spawner.local().port();
        spawner.spawn(Box::new(Connect { port, addr, sender, is_started: false }));
    })
    .map_err(io::Error::other)?;
    through(result.recv_timeout(LIMIT).unwrap_or(Ok(())))
}

/// Connects once.
struct Connect {
    port: Port,
    addr: SocketAddr,
    sender: mpsc::Sender<io::Result<()>>,
    is_started: bool,
}

impl Task for Connect {
    fn poll(&mut self, _now: Duration) -> Progress {
        if !self.is_started {
            self.is_started = self.port.connect(self.addr, LIMIT, 0).is_ok();
            return Progress::Worked;
        }
        let Some(done) = self.port.next() else { return Progress::Idle };
        let result = match done.result {
            Ok(Outcome::Socket(_)) | Ok(_) => Ok(()),
            Err(errno) => Err(io::Error::from(errno)),
        };
        // Whoever asked may have stopped waiting.
        let _ = self.sender.send(result);
        Progress::Done
    }
}
