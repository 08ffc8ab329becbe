//! In-band authentication of a queue: DH-HMAC-CHAP after Connect and before every other command.
//!
//! ```text
//!   Connect ─► AUTHREQ ─► Authentication Send / Receive ─► proven ─► all other commands
//!                               │      ▲
//!                     DhTask ───┘      └─── result            on a thread of its own: milliseconds
//! ```
//!
//! [`Auth`] is one transaction of one queue, without the queue: it says which command comes next and
//! is given the answers. [`Computing`] is an exponentiation under way.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use crypto::dhchap::{
    Concatenation, DhDone, DhTask, ENTROPY_LEN, Host, HostConfig, Outcome, Status as Stands,
};
use nvme::host::{Authentication, ConnectNames, authentication_receive, authentication_send};
use nvme::spec::Status;
use nvme::tcp::Transfer;
use reactor::{CoreHandle, Local};

use crate::link::Loss;
use crate::security::{Dhchap, Security, Tls};

/// Bytes of a buffer for a message of the controller: what Linux asks for.
pub(crate) const RECEIVE_BYTES: usize = 4096;

/// One command of a transaction.
pub(crate) struct AuthCommand {
    pub(crate) sqe: [u8; 64],
    /// What goes in the capsule; `None`: [`RECEIVE_BYTES`] are expected.
    pub(crate) message: Option<Vec<u8>>,
}

impl AuthCommand {
    pub(crate) fn transfer(&self) -> Transfer {
        match &self.message {
            Some(message) => Transfer::Write { len: message.len() as u32, in_capsule: true },
            None => Transfer::Read { len: RECEIVE_BYTES as u32 },
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// The next command, or the end.
    Ours,
    /// A message is on its way. Moved on by its completion.
    Sending,
    /// Moved on by the controller's message.
    Receiving,
    /// Moved on by the result of an exponentiation.
    Computing,
}

/// One transaction on one queue.
pub(crate) struct Auth {
    host: Host,
    turn: Turn,
    /// By then it has to be over.
    pub(crate) until: Duration,
}

/// What a queue is to do about the controller's answer to Connect, if anything.
pub(crate) fn wanted(
    security: &Security,
    asked: Authentication,
    is_tls: bool,
) -> Result<Option<Concatenation>, Loss> {
    let concatenation = match &security.tls {
        Tls::Concatenate if !is_tls => Concatenation::New,
        _ => Concatenation::No,
    };
    let is_asked = asked.is_required || asked.is_concatenation_required;
    if asked.is_concatenation_required && concatenation == Concatenation::No {
        return Err(Loss::Authentication(
            "the controller wants the key for TLS to come of the authentication: configure that \
             (secure channel concatenation), or no such demand there"
                .to_owned(),
        ));
    }
    let Some(dhchap) = &security.dhchap else {
        return match is_asked {
            false => Ok(None),
            true => Err(Loss::Authentication(
                "the controller asks this host to authenticate: give it the secret that the \
                 target has for it, or take the secret away there"
                    .to_owned(),
            )),
        };
    };
    // The key of the connection has proven both ends already.
    let is_proven = is_tls && matches!(security.tls, Tls::Concatenate);
    let has_to_prove_itself = dhchap.controller_key.is_some() && !is_proven;
    let is_wanted = is_asked || has_to_prove_itself || concatenation != Concatenation::No;
    Ok(is_wanted.then_some(concatenation))
}

impl Auth {
    pub(crate) fn new(
        dhchap: &Dhchap,
        names: &ConnectNames,
        concatenation: Concatenation,
        random: &mut dyn FnMut() -> u64,
        until: Duration,
    ) -> Auth {
        let mut entropy = zeroize::Zeroizing::new([0; ENTROPY_LEN]);
        for part in entropy.chunks_mut(8) {
            part.copy_from_slice(&random().to_le_bytes()[..part.len()]);
        }
        let config = HostConfig {
            hostnqn: names.hostnqn.as_str().to_owned(),
            subnqn: names.subnqn.as_str().to_owned(),
            host_key: dhchap.key.clone(),
            controller_key: dhchap.controller_key.clone(),
            hashes: dhchap.hashes.clone(),
            groups: dhchap.groups.clone(),
            concatenation,
            t_id: random() as u16,
        };
        Auth { host: Host::new(config, &entropy), turn: Turn::Ours, until }
    }

    /// The next command, if it is time for one.
    pub(crate) fn next_command(&mut self) -> Option<AuthCommand> {
        if self.turn != Turn::Ours {
            return None;
        }
        if let Some(message) = self.host.next_message() {
            self.turn = Turn::Sending;
            let sqe = authentication_send(message.len() as u32);
            return Some(AuthCommand { sqe, message: Some(message) });
        }
        if *self.host.status() != Stands::Running {
            return None;
        }
        self.turn = Turn::Receiving;
        let sqe = authentication_receive(RECEIVE_BYTES as u32);
        Some(AuthCommand { sqe, message: None })
    }

    /// The command has completed; `data` is what a Receive brought. A task is to be run.
    pub(crate) fn on_completion(
        &mut self,
        status: Status,
        data: &[u8],
    ) -> Result<Option<DhTask>, Loss> {
        let what = match self.turn {
            Turn::Sending => "Authentication Send",
            _ => "Authentication Receive",
        };
        if !status.is_success() {
            return Err(self.failed(&format!("{what} failed: {status}")));
        }
        let is_message = self.turn == Turn::Receiving;
        self.turn = Turn::Ours;
        if !is_message {
            return Ok(None);
        }
        let task = self.host.on_message(data);
        if task.is_some() {
            self.turn = Turn::Computing;
        }
        Ok(task)
    }

    /// The result of the task.
    pub(crate) fn on_computed(&mut self, done: DhDone) {
        self.turn = Turn::Ours;
        self.host.on_computed(done);
    }

    /// How it ended, once everything is said.
    pub(crate) fn outcome(&self) -> Result<Option<&Outcome>, Loss> {
        match self.host.status() {
            // The controller is told first.
            Stands::Done(_) | Stands::Failed(_) if self.turn == Turn::Sending => Ok(None),
            Stands::Running => Ok(None),
            Stands::Done(outcome) => Ok(Some(outcome)),
            Stands::Failed(failure) => Err(Loss::Authentication(failure.to_string())),
        }
    }

    /// A command of it failed: what the transaction itself says goes first.
    fn failed(&self, what: &str) -> Loss {
        match self.host.status() {
            Stands::Failed(failure) => Loss::Authentication(failure.to_string()),
            _ => Loss::Authentication(what.to_owned()),
        }
    }

    pub(crate) fn is_late(&self, now: Duration) -> Result<(), Loss> {
        if now < self.until {
            return Ok(());
        }
        Err(Loss::Authentication("the controller did not answer in time".to_owned()))
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread for exponentiations, there from the first one on. It ends when this is dropped.
#[derive(Default)]
pub(crate) struct Worker(Mutex<Option<mpsc::Sender<Job>>>);

impl Worker {
    /// `false`: there is no thread to be had. What waits is bounded by the queues of a volume, each
    /// of which has one task at most.
    fn run(&self, job: Job) -> bool {
        let mut sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.is_none() {
            let (to, jobs) = mpsc::channel::<Job>();
            let named = std::thread::Builder::new().name("dhchap".to_owned());
            let spawned = named.spawn(move || jobs.iter().for_each(|job| job()));
            if let Err(error) = spawned {
                tracing::error!(%error, "no thread for authentication");
                return false;
            }
            *sender = Some(to);
        }
        sender.as_ref().is_some_and(|sender| sender.send(job).is_ok())
    }
}

/// A task that a [`Worker`] runs.
pub(crate) struct Computing(Arc<Mutex<Option<DhDone>>>);

impl Computing {
    pub(crate) fn start(task: DhTask, worker: &Worker, local: &Local) -> Result<Computing, Loss> {
        let done = Arc::new(Mutex::new(None));
        let (result, core): (_, CoreHandle) = (Arc::clone(&done), local.handle());
        let is_taken = worker.run(Box::new(move || {
            let computed = task.run();
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(computed);
            core.wake();
        }));
        if is_taken {
            return Ok(Computing(done));
        }
        Err(Loss::Authentication("there is no thread for the computation".to_owned()))
    }

    /// The result, once.
    pub(crate) fn take(&self) -> Option<DhDone> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
