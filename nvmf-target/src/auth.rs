//! In-band authentication of a queue: DH-HMAC-CHAP between Connect and every other command, and again
//! whenever the host wants.
//!
//! ```text
//!   Connect ─► AUTHREQ ─► Authentication Send / Receive ─► proven ─► all other commands
//!                               │      ▲
//!                     DhTask ───┘      └─── result            on a thread of its own: milliseconds
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crypto::dhchap::{
    self, Concatenation, Controller, ControllerConfig, DhDone, DhTask, ENTROPY_LEN,
};
use crypto::psk::IdentityVersion;
use nvme::spec::{FabricsType, Sqe, Status};
use zeroize::Zeroizing;

use crate::admin::count_refusal;
use crate::config::{AuthDemand, Tls};
use crate::conn::{Conn, Life, Role};
use crate::core::Env;
use crate::limits::count;
use crate::registry::Association;

/// AUTHREQ in a Connect response: authentication is required before other commands (NVMe Base 2.1,
/// "Connect Response", ATR).
pub(crate) const AUTHREQ_ATR: u32 = 1 << 17;

/// SECP and SPSP of the commands (NVMe Base 2.1, "Authentication Send Command").
const SECP_NVME: u8 = 0xe9;
const SPSP: [u8; 2] = [1, 1];

/// Largest buffer of a host for a message; Linux has 4 KiB.
const MESSAGE_BUFFER_MAX: usize = 8192;

/// Transactions that a host may begin on a queue before one ends well: each may cost milliseconds.
const TRANSACTIONS_MAX: u32 = 4;
/// How long a queue whose authentication failed stays, so that the host can fetch the reason.
const FAILED_LIMIT: Duration = Duration::from_secs(1);

/// What a queue asks of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    /// Nothing: it is believed, or has proven itself by a key that came from an authentication.
    Nothing,
    /// Authentication, before anything else.
    Proof,
    /// The same, and it has no secret.
    Impossible,
}

/// What a queue has of this.
#[derive(Default)]
pub(crate) struct Auth {
    /// No other command is carried out before the host is proven.
    is_due: bool,
    /// By then the host has to have sent its next message, or the reason of a failure is given up.
    deadline: Option<Duration>,
    machine: Option<Controller>,
    computing: Option<Arc<Mutex<Option<DhDone>>>>,
    /// A Receive that waits for what is being computed.
    waiting: Option<u16>,
    transactions: u32,
    /// The outcome of the last transaction was acted on.
    is_settled: bool,
    /// The operator has been told that the host does not prove itself.
    is_told: bool,
}

impl Auth {
    /// The queue takes no other command before its host is proven.
    pub(crate) fn demand(deadline: Duration) -> Auth {
        Auth { is_due: true, deadline: Some(deadline), ..Auth::default() }
    }

    /// Whether other commands are refused.
    pub(crate) fn is_due(&self) -> bool {
        self.is_due
    }

    pub(crate) fn is_late(&self, now: Duration) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }
}

/// Whether this is one of the two commands, with its protocol and length as the host says.
pub(crate) fn is_auth(sqe: &Sqe) -> bool {
    sqe.is_fabrics()
        && [FabricsType::AUTHENTICATION_SEND, FabricsType::AUTHENTICATION_RECEIVE]
            .contains(&sqe.fctype())
}

/// Transfer or allocation length, if the protocol is ours.
fn length(sqe: &Sqe) -> Option<u32> {
    let cdw10 = sqe.cdw10.get().to_le_bytes();
    let is_ours = cdw10[3] == SECP_NVME && cdw10[1..3] == SPSP;
    is_ours.then(|| sqe.cdw11.get())
}

impl Conn {
    /// Whether the host, which is `hostnqn` as it says, has to authenticate on this queue, and whether
    /// it can.
    pub(crate) fn demand(&self, hostnqn: &str, env: &Env<'_>) -> Demand {
        let is_generated = self.proven.as_ref().is_some_and(|proven| proven.is_generated);
        let has_secret = env.shared.keys.get(hostnqn).is_some_and(|keys| !keys.dhchap.is_empty());
        match (has_secret, self.port().auth) {
            // A key that came from an authentication proves the same once more.
            _ if is_generated => Demand::Nothing,
            (true, _) => Demand::Proof,
            (false, AuthDemand::Registered) => Demand::Nothing,
            (false, AuthDemand::Required) => Demand::Impossible,
        }
    }

    /// Connect has made the connection a queue, whose host has to prove itself or not. Returns AUTHREQ
    /// of the response.
    pub(crate) fn begin_auth(&mut self, demand: Demand, env: &Env<'_>) -> u32 {
        if demand == Demand::Nothing {
            self.count_in(env);
            return 0;
        }
        self.charge(env.shared.registry.unproven(), env);
        self.auth = Auth::demand(env.now + env.shared.limits.handshake);
        AUTHREQ_ATR
    }

    /// An Authentication Send or Receive with all its data.
    pub(crate) fn authenticate(&mut self, slot: u16, env: &mut Env<'_>) {
        let sqe = *self.slot_sqe(slot);
        if self.auth.machine.is_none() && self.new_machine(env).is_none() {
            // Nothing is known of this host.
            return self.respond(slot, Status::INVALID_COMMAND_OPCODE.dnr(), 0, env);
        }
        let is_send = sqe.fctype() == FabricsType::AUTHENTICATION_SEND;
        let given = self.slot_len(slot);
        let len = length(&sqe).map_or(0, |len| len as usize);
        if len == 0 || len > MESSAGE_BUFFER_MAX || is_send && len != given {
            return self.respond(slot, Status::INVALID_FIELD_IN_COMMAND.dnr(), 0, env);
        }
        if is_send {
            self.auth_send(slot, len, env);
        } else if self.auth.computing.is_some() && self.auth.waiting.is_none() {
            self.auth.waiting = Some(slot);
            self.keep(slot);
        } else {
            self.auth_receive(slot, env);
        }
    }

    fn auth_send(&mut self, slot: u16, len: usize, env: &mut Env<'_>) {
        if len > dhchap::MESSAGE_BYTES_MAX {
            return self.respond(slot, Status::INVALID_FIELD_IN_COMMAND.dnr(), 0, env);
        }
        if self.auth.computing.is_some() {
            return self.respond(slot, Status::COMMAND_SEQUENCE_ERROR.dnr(), 0, env);
        }
        let mut bytes = [0; dhchap::MESSAGE_BYTES_MAX];
        let len = self.slot_data(slot, &mut bytes);
        let bytes = &bytes[..len];
        // A Negotiate message begins a new transaction.
        if bytes.starts_with(&[0, 0]) || self.auth.machine.is_none() {
            let Some(machine) = self.new_machine(env) else {
                return self.respond(slot, Status::INVALID_COMMAND_OPCODE.dnr(), 0, env);
            };
            self.auth.transactions += 1;
            if self.auth.transactions > TRANSACTIONS_MAX {
                self.close("too many attempts to authenticate");
                return;
            }
            (self.auth.machine, self.auth.is_settled) = (Some(machine), false);
        }
        if self.auth.is_due && !self.auth.is_settled {
            // For each step: the exchange of a large group takes a slow host seconds. The number of
            // steps is bounded.
            self.auth.deadline = Some(env.now + env.shared.limits.handshake);
        }
        let task = self.auth.machine.as_mut().and_then(|machine| machine.on_message(bytes));
        if let Some(task) = task
            && !self.compute(task, env)
        {
            count(&env.shared.hits.handshakes);
            self.auth.machine = None;
            // It passes: the host may begin again.
            return self.respond(slot, Status::INTERNAL_ERROR, 0, env);
        }
        self.respond(slot, Status::SUCCESS, 0, env);
        self.settle(env);
    }

    /// A transaction for this queue, with the keys as they are now.
    fn new_machine(&self, env: &Env<'_>) -> Option<Controller> {
        let association = self.association.as_ref()?;
        let hostnqn = &association.host.hostnqn;
        let keys = env.shared.keys.get(hostnqn)?;
        let (live, policy) = (env.shared.keys.live_secrets(&keys), env.shared.keys.policy());
        let concatenation = match (&self.role, &self.proven) {
            // The key would be of no use where no connection is encrypted.
            (Role::Admin(_), None) if self.port().tls != Tls::Off => Concatenation::New,
            (Role::Admin(_), Some(proven)) if proven.is_generated => Concatenation::Replace,
            _ => Concatenation::No,
        };
        let config = ControllerConfig {
            hostnqn: hostnqn.clone(),
            subnqn: self.subnqn.clone(),
            host_keys: live.host,
            controller_key: live.controller,
            expired: live.expired,
            hashes: policy.hashes,
            groups: policy.groups,
            concatenation,
        };
        let mut random = Zeroizing::new([0; ENTROPY_LEN]);
        for part in random.chunks_mut(8) {
            part.copy_from_slice(&env.local.random_u64().to_le_bytes()[..part.len()]);
        }
        Some(Controller::new(config, &random))
    }

    /// Has a task run elsewhere; `false`: too many wait.
    fn compute(&mut self, task: DhTask, env: &Env<'_>) -> bool {
        let done = Arc::new(Mutex::new(None));
        let (result, shared) = (Arc::clone(&done), Arc::downgrade(env.shared));
        let is_taken = env.shared.heavy.run(move || {
            let computed = task.run();
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(computed);
            if let Some(shared) = shared.upgrade() {
                shared.wake_all();
            }
        });
        if is_taken {
            self.auth.computing = Some(done);
        }
        is_taken
    }

    /// Takes up what was computed.
    pub(crate) fn poll_auth(&mut self, env: &mut Env<'_>) -> bool {
        let Some(computing) = &self.auth.computing else { return false };
        let done = computing.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(done) = done else { return false };
        self.auth.computing = None;
        if let Some(machine) = &mut self.auth.machine {
            machine.on_computed(done);
        }
        self.settle(env);
        if let Some(slot) = self.auth.waiting.take() {
            self.auth_receive(slot, env);
        }
        true
    }

    fn auth_receive(&mut self, slot: u16, env: &mut Env<'_>) {
        let message = self.auth.machine.as_mut().and_then(Controller::next_message);
        let Some(mut message) = message else {
            return self.respond(slot, Status::COMMAND_SEQUENCE_ERROR.dnr(), 0, env);
        };
        // Checked when the command came.
        let len = length(self.slot_sqe(slot)).map_or(0, |len| len as usize);
        if message.len() > len {
            return self.respond(slot, Status::INVALID_FIELD_IN_COMMAND.dnr(), 0, env);
        }
        // The host's buffer is filled whole: hosts in the field expect as much as they asked for.
        message.resize(len, 0);
        self.respond_bytes(slot, &message, 0, env);
    }

    /// Acts on the end of a transaction, once.
    fn settle(&mut self, env: &mut Env<'_>) {
        let Some(machine) = &self.auth.machine else { return };
        if self.auth.is_settled {
            return;
        }
        match machine.status().clone() {
            dhchap::Status::Running => {}
            dhchap::Status::Done(outcome) => {
                self.auth.is_settled = true;
                let is_first = std::mem::take(&mut self.auth.is_due);
                (self.auth.deadline, self.auth.transactions) = (None, 0);
                let Some(association) = self.association.clone() else { return };
                if is_first && !self.prove(&association, env) {
                    return;
                }
                let hostnqn = &association.host.hostnqn;
                tracing::debug!(
                    hostnqn,
                    qid = self.qid,
                    hash = ?outcome.hash,
                    group = ?outcome.group,
                    mutual = outcome.is_mutual,
                    "host authenticated"
                );
                association.set_authenticated(&format!(
                    "DH-HMAC-CHAP {:?} {:?}{}",
                    outcome.hash,
                    outcome.group,
                    if outcome.is_mutual { " mutual" } else { "" }
                ));
                let host_key = self.auth.machine.as_ref().and_then(Controller::host_key);
                let (Some(generated), Some(from)) = (outcome.generated, host_key) else { return };
                match generated.psk(IdentityVersion::V1, hostnqn, &self.subnqn) {
                    Ok(psk) => env.shared.keys.add_generated(hostnqn, psk, from),
                    Err(error) => tracing::warn!(hostnqn, %error, "no TLS key for this host"),
                }
            }
            dhchap::Status::Failed(failure) => {
                self.auth.is_settled = true;
                // The host may fetch the reason; then the connection goes. A queue that had a proven
                // host until now takes commands to the end: an error is worse than a new path.
                self.auth.deadline = Some(env.now + FAILED_LIMIT);
                let (peer, port) = (self.peer().to_owned(), self.port().id);
                env.shared.refusals.note(&peer, port, self.named(&failure.to_string()), env.now);
            }
        }
    }

    /// The host has proven to be who it says for the first time. `false`: it has as much as it may
    /// already, and the connection ends.
    fn prove(&mut self, association: &Association, env: &Env<'_>) -> bool {
        let epoch = match self.role {
            Role::Io { epoch } => epoch,
            Role::Fresh | Role::Admin(_) => 0,
        };
        match env.shared.registry.prove(association, self.qid, epoch) {
            Ok(()) => {
                self.count_in(env);
                true
            }
            Err(refusal) => {
                count_refusal(refusal, env);
                self.close("the host has what it may have");
                false
            }
        }
    }

    /// What is said of a host, with its name.
    fn named(&self, what: &str) -> String {
        match &self.association {
            Some(association) if !what.contains(&association.host.hostnqn) => {
                format!("host `{}`: {what}", association.host.hostnqn)
            }
            _ => what.to_owned(),
        }
    }

    /// The time for authentication is over.
    pub(crate) fn tick_auth(&mut self, env: &Env<'_>) {
        if self.life != Life::Open || !self.auth.is_late(env.now) {
            return;
        }
        let limit = env.shared.limits.handshake.as_secs();
        self.note_unproven(&format!("within {limit} s"), env);
        self.close("not authenticated in time");
    }

    /// Tells the operator, once, that a host that has to prove itself does not: `how` says what it did
    /// or did not do instead.
    pub(crate) fn note_unproven(&mut self, how: &str, env: &Env<'_>) {
        // A failure has been told already, and what follows is its end.
        let is_failed = self.auth.is_settled;
        if !self.auth.is_due || is_failed || std::mem::replace(&mut self.auth.is_told, true) {
            return;
        }
        let why = format!(
            "did not go on with DH-HMAC-CHAP {how}, which it has to since there is a secret for it; \
             on the host, connect with the `--dhchap-secret` that `penstock key export` prints for it"
        );
        env.shared.refusals.note(self.peer(), self.port().id, self.named(&why), env.now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_commands() {
        let mut bytes = [0; 64];
        bytes[..2].copy_from_slice(&[0x7f, 0x40]);
        bytes[4] = 5;
        bytes[41..44].copy_from_slice(&[1, 1, 0xe9]);
        bytes[44] = 72;
        let sqe = Sqe::from_bytes(&bytes);
        assert!(is_auth(&sqe));
        assert_eq!(length(&sqe), Some(72));
        bytes[43] = 0xea;
        assert_eq!(length(&Sqe::from_bytes(&bytes)), None);
        bytes[4] = 4;
        assert!(!is_auth(&Sqe::from_bytes(&bytes)));
    }
}
