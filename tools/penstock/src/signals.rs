//! SIGINT and SIGTERM: the first ends in order, the second at once.

use std::io;
use std::process::ExitCode;

use daemon::Daemon;
use daemon::supervise::Link;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for the two signals.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    supervisor: Option<Link>,
}

impl Signals {
    /// Must be called inside a tokio runtime.
    pub(crate) fn new() -> io::Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            supervisor: None,
        })
    }

    /// The end of the supervisor counts as a signal from now on.
    pub(crate) fn watch(&mut self, supervisor: Link) {
        self.supervisor = Some(supervisor);
    }

    /// The next signal: its name and the exit code of a process that it ends.
    pub(crate) async fn next(&mut self) -> (&'static str, u8) {
        tokio::select! {
            _ = self.interrupt.recv() => ("SIGINT", 130),
            _ = self.terminate.recv() => ("SIGTERM", 143),
            () = ended(self.supervisor.take()) => ("end of the supervisor", 1),
        }
    }
}

async fn ended(supervisor: Option<Link>) {
    match supervisor {
        Some(supervisor) => supervisor.ended().await,
        None => std::future::pending().await,
    }
}

/// Stays until a signal or a failure, then stops in order; a second signal ends the process.
pub(crate) async fn stay(
    mut daemon: Daemon,
    signals: &mut Signals,
    say: impl Fn(&str),
) -> anyhow::Result<ExitCode> {
    let failure = tokio::select! {
        (name, _) = signals.next() => {
            say(&format!("{name}: stopping in order; once more to stop at once"));
            None
        }
        problem = daemon.failure() => Some(problem),
    };
    let stop = tokio::task::spawn_blocking(move || daemon.stop());
    tokio::select! {
        stopped = stop => stopped??,
        (_, code) = signals.next() => {
            say("stopped at once");
            std::process::exit(i32::from(code));
        }
    }
    match failure {
        None => Ok(ExitCode::SUCCESS),
        Some(problem) => anyhow::bail!("{problem}"),
    }
}

/// A runtime for the control plane: one thread, this one.
pub(crate) fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
