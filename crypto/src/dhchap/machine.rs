//! The two ends of a transaction.

use std::fmt;

use zeroize::Zeroizing;

use super::ffdhe::{DhDone, DhGroup, DhTask, PRIVATE_LEN_MAX, is_public_value};
use super::message::{Message, Reason, choose_group, choose_hash, hash_from_id, hash_id};
use crate::kdf::{Hash, is_equal};
use crate::key::{DhchapKey, KeyHash};
use crate::psk::RetainedKey;
use crate::secret::Secret;

/// Identifier of DH-HMAC-CHAP in a Negotiate message.
const AUTHID: u8 = 0x01;
/// Longest challenge.
const CHALLENGE_MAX: usize = 64;
/// Random bytes that a machine takes.
pub const ENTROPY_LEN: usize = CHALLENGE_MAX + PRIVATE_LEN_MAX + 4;

/// Values of SC_C: whether a key for TLS is wanted, and for what.
const NO_SECURE_CHANNEL: u8 = 0;
const NEW_TLS_PSK: u8 = 2;
const REPLACE_TLS_PSK: u8 = 3;

/// Whether an authentication also yields a key for TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concatenation {
    /// It does not.
    No,
    /// On an admin queue without TLS: the connection is to be made anew with the key.
    New,
    /// On an admin queue with TLS that such a key was made for.
    Replace,
}

/// What a controller authenticates a host with.
#[derive(Clone)]
pub struct ControllerConfig {
    /// The host's name.
    pub hostnqn: String,
    /// The subsystem's name, as the host connected to.
    pub subnqn: String,
    /// The host's secrets, any of which will do: an old and a new one while they are changed.
    pub host_keys: Vec<DhchapKey>,
    /// What the controller proves itself with, if a host asks.
    pub controller_key: Option<DhchapKey>,
    /// What is missing in the two above since its time is over: for the operator alone.
    pub expired: Expired,
    /// Hashes, the preferred first.
    pub hashes: Vec<Hash>,
    /// Groups, the preferred first.
    pub groups: Vec<DhGroup>,
    /// What this queue allows: other than `No` only for an admin queue.
    pub concatenation: Concatenation,
}

/// Which secrets there were until their time was over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    /// One of the host's at least.
    pub host: bool,
    /// The controller's.
    pub controller: bool,
}

/// What a host authenticates with.
#[derive(Clone)]
pub struct HostConfig {
    /// The host's name.
    pub hostnqn: String,
    /// The subsystem's name.
    pub subnqn: String,
    /// What the host proves itself with.
    pub host_key: DhchapKey,
    /// The controller's secret, if it has to prove itself too.
    pub controller_key: Option<DhchapKey>,
    /// Hashes that are offered.
    pub hashes: Vec<Hash>,
    /// Groups that are offered.
    pub groups: Vec<DhGroup>,
    /// What is wanted.
    pub concatenation: Concatenation,
    /// The transaction's identifier.
    pub t_id: u16,
}

/// How a transaction stands.
#[derive(Clone, PartialEq, Eq)]
pub enum Status {
    /// It waits for a message, or for a result.
    Running,
    /// It has ended well.
    Done(Outcome),
    /// It has failed. There may be a message to send yet.
    Failed(Failure),
}

/// What a transaction came to.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The hash it used.
    pub hash: Hash,
    /// The group it used.
    pub group: DhGroup,
    /// Whether the controller has proven itself too.
    pub is_mutual: bool,
    /// Which of the host's keys it was, counted from 0.
    pub key_index: usize,
    /// The key for TLS, where one was wanted: its identity is of version 1 and says "generated".
    pub generated: Option<RetainedKey>,
}

/// Why a transaction failed. Its text is one line for the operator; the other end is told the
/// reason only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the other end is, or has been, told.
    pub reason: Reason,
    /// Whether it was the other end that gave up.
    pub is_peers: bool,
    what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_peers {
            write!(f, "the other end gave up: {}", self.reason)?;
        } else {
            write!(f, "{}", self.reason)?;
        }
        if self.what.is_empty() { Ok(()) } else { write!(f, ": {}", self.what) }
    }
}

impl std::error::Error for Failure {}

fn refuse<T>(reason: Reason, what: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { reason, is_peers: false, what: what.into() })
}

fn malformed(reason: Reason) -> Failure {
    Failure { reason, is_peers: false, what: "the message does not parse".to_owned() }
}

fn peers(reason: Reason, what: &str) -> Failure {
    Failure { reason, is_peers: true, what: what.to_owned() }
}

/// The random values of one transaction.
struct Entropy {
    challenge: [u8; CHALLENGE_MAX],
    private: Zeroizing<[u8; PRIVATE_LEN_MAX]>,
    seqnum: u32,
}

impl Entropy {
    fn new(random: &[u8; ENTROPY_LEN]) -> Entropy {
        let (challenge, rest) = random.split_first_chunk().expect("its length is the sum");
        let (private, seqnum) = rest.split_first_chunk().expect("its length is the sum");
        let seqnum = u32::from_le_bytes(seqnum.try_into().expect("its length is the sum"));
        // 0 means that no proof is wanted.
        let seqnum = seqnum.max(1);
        Entropy { challenge: *challenge, private: Zeroizing::new(*private), seqnum }
    }
}

/// The key itself, or bound to a name: "transformed".
fn transformed(key: &DhchapKey, nqn: &str) -> Secret {
    let hash = match key.hash() {
        KeyHash::None => return key.secret().clone(),
        KeyHash::Sha256 => Hash::Sha256,
        KeyHash::Sha384 => Hash::Sha384,
        KeyHash::Sha512 => Hash::Sha512,
    };
    hash.hmac(key.secret().expose(), &[nqn.as_bytes(), b"NVMe-over-Fabrics"])
}

/// What both proofs are made of.
struct Proof<'a> {
    hash: Hash,
    session: Option<&'a Secret>,
    t_id: u16,
}

impl Proof<'_> {
    fn make(
        &self,
        key: &Secret,
        challenge: &[u8],
        seqnum: u32,
        sc_c: u8,
        role: &str,
        names: [&str; 2],
    ) -> Secret {
        // With an exchange, the challenge is mixed with its result.
        let augmented = self.session.map(|session| self.hash.hmac(session.expose(), &[challenge]));
        let challenge = augmented.as_ref().map_or(challenge, Secret::expose);
        self.hash.hmac(
            key.expose(),
            &[
                challenge,
                &seqnum.to_le_bytes(),
                &self.t_id.to_le_bytes(),
                &[sc_c],
                role.as_bytes(),
                names[0].as_bytes(),
                &[0],
                names[1].as_bytes(),
            ],
        )
    }

    fn of_host(&self, key: &Secret, c1: &[u8], s1: u32, sc_c: u8, host: &str, sub: &str) -> Secret {
        self.make(key, c1, s1, sc_c, "HostHost", [host, sub])
    }

    /// Linux puts 0 in place of SC_C here, on both ends.
    fn of_controller(&self, key: &Secret, c2: &[u8], s2: u32, host: &str, sub: &str) -> Secret {
        self.make(key, c2, s2, 0, "Controller", [sub, host])
    }
}

/// The key for TLS: "HMAC(Ks, C1 || C2)".
fn generate(hash: Hash, session: &Secret, c1: &[u8], c2: &[u8]) -> Option<RetainedKey> {
    RetainedKey::generated(hash.hmac(session.expose(), &[c1, c2]))
}

/// The end of the controller.
pub struct Controller {
    config: ControllerConfig,
    entropy: Entropy,
    state: ControllerState,
    status: Status,
    to_send: Option<Vec<u8>>,
    t_id: u16,
}

enum ControllerState {
    /// Moved on by the host's Negotiate.
    Negotiate,
    /// Moved on by the value of the exchange.
    MakeValue(Agreed),
    /// Moved on by the host's Reply.
    Reply(Agreed),
    /// Moved on by the result of the exchange.
    Exchange(Agreed, Box<Received>),
    /// Moved on by the host's Success2.
    Success2(Outcome),
    End,
}

#[derive(Clone, Copy)]
struct Agreed {
    hash: Hash,
    group: DhGroup,
    sc_c: u8,
}

/// What a Reply said.
struct Received {
    response: Vec<u8>,
    challenge: Option<Vec<u8>>,
    seqnum: u32,
}

impl Controller {
    /// A transaction that the host begins. `random` is used once.
    pub fn new(config: ControllerConfig, random: &[u8; ENTROPY_LEN]) -> Controller {
        Controller {
            config,
            entropy: Entropy::new(random),
            state: ControllerState::Negotiate,
            status: Status::Running,
            to_send: None,
            t_id: 0,
        }
    }

    /// Takes the payload of an Authentication Send. A task is to be run, and its result given to
    /// [`on_computed`](Controller::on_computed).
    pub fn on_message(&mut self, bytes: &[u8]) -> Option<DhTask> {
        match self.message(bytes) {
            Ok(task) => task,
            Err(failure) => {
                self.fail(failure);
                None
            }
        }
    }

    /// Takes the result of a task.
    pub fn on_computed(&mut self, done: DhDone) {
        let state = std::mem::replace(&mut self.state, ControllerState::End);
        match state {
            ControllerState::MakeValue(agreed) => {
                self.challenge(agreed, done.public.as_deref().unwrap_or_default());
            }
            ControllerState::Exchange(agreed, received) => {
                if let Err(failure) = self.judge(agreed, &received, done.session.as_ref()) {
                    self.fail(failure);
                }
            }
            // The transaction failed meanwhile.
            other => self.state = other,
        }
    }

    /// The payload for an Authentication Receive, once; `None` if there is nothing to say yet, or
    /// any more.
    pub fn next_message(&mut self) -> Option<Vec<u8>> {
        self.to_send.take()
    }

    /// How it stands.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// The secret that the host has proven to have, when it has.
    pub fn host_key(&self) -> Option<&DhchapKey> {
        match &self.status {
            Status::Done(outcome) => self.config.host_keys.get(outcome.key_index),
            Status::Running | Status::Failed(_) => None,
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.state = ControllerState::End;
        if matches!(self.status, Status::Failed(_)) {
            return;
        }
        self.to_send = (!failure.is_peers)
            .then(|| Message::Failure1 { t_id: self.t_id, reason: failure.reason }.encode());
        self.status = Status::Failed(failure);
    }

    fn message(&mut self, bytes: &[u8]) -> Result<Option<DhTask>, Failure> {
        let message = Message::parse(bytes).map_err(malformed)?;
        let state = std::mem::replace(&mut self.state, ControllerState::End);
        match (state, message) {
            (_, Message::Failure2 { reason, .. }) => {
                let what = format!(
                    "the host `{}` does not accept this controller's proof or messages",
                    self.config.hostnqn
                );
                Err(peers(reason, &what))
            }
            (
                ControllerState::Negotiate,
                Message::Negotiate { t_id, sc_c, authid, hashes, groups },
            ) => {
                self.t_id = t_id;
                if authid != AUTHID {
                    return refuse(Reason::PROTOCOL_NOT_USABLE, "the host offers another protocol");
                }
                self.negotiate(sc_c, hashes, groups)
            }
            (
                ControllerState::Reply(agreed),
                Message::Reply { t_id, response, challenge, seqnum, public },
            ) => {
                self.check_t_id(t_id)?;
                self.reply(agreed, response, challenge, seqnum, public)
            }
            (ControllerState::Success2(outcome), Message::Success2 { t_id }) => {
                self.check_t_id(t_id)?;
                self.status = Status::Done(outcome);
                Ok(None)
            }
            _ => refuse(Reason::INCORRECT_MESSAGE, "the host sent a message out of order"),
        }
    }

    fn check_t_id(&self, t_id: u16) -> Result<(), Failure> {
        if t_id == self.t_id {
            return Ok(());
        }
        refuse(Reason::INCORRECT_PAYLOAD, "the host names another transaction")
    }

    fn negotiate(
        &mut self,
        sc_c: u8,
        hashes: &[u8],
        groups: &[u8],
    ) -> Result<Option<DhTask>, Failure> {
        let allowed = match self.config.concatenation {
            Concatenation::No => None,
            Concatenation::New => Some(NEW_TLS_PSK),
            Concatenation::Replace => Some(REPLACE_TLS_PSK),
        };
        let is_concatenated = sc_c != NO_SECURE_CHANNEL;
        if is_concatenated && Some(sc_c) != allowed {
            let what = format!(
                "the host asks for secure channel {sc_c}, not possible on this queue; on the \
                     host, `--concat` takes a listener with tls=allowed and no `--tls`"
            );
            return refuse(Reason::CONCATENATION_MISMATCH, what);
        }
        let mut ours = (self.config.hashes.clone(), self.config.groups.clone());
        if is_concatenated {
            // A key for TLS has the length of one of its suites, and comes from the exchange.
            ours.0.retain(|hash| *hash != Hash::Sha512);
            ours.1.retain(|group| *group != DhGroup::Null);
        }
        let Some(hash) = choose_hash(&ours.0, hashes) else {
            let what = format!(
                "the host offers {hashes:?}, allowed are {:?}: allow another with `--auth-hash`",
                ours.0
            );
            return refuse(Reason::HASH_NOT_USABLE, what);
        };
        let Some(group) = choose_group(&ours.1, groups) else {
            let what = format!(
                "the host offers {groups:?}, allowed are {:?}: allow another with `--auth-group`",
                ours.1
            );
            return refuse(Reason::GROUP_NOT_USABLE, what);
        };
        let agreed = Agreed { hash, group, sc_c };
        let task = DhTask::new(group, hash, &self.entropy.private, true, None);
        if task.is_some() {
            self.state = ControllerState::MakeValue(agreed);
        } else {
            self.challenge(agreed, &[]);
        }
        Ok(task)
    }

    fn challenge(&mut self, agreed: Agreed, public: &[u8]) {
        let message = Message::Challenge {
            t_id: self.t_id,
            hash: hash_id(agreed.hash),
            group: agreed.group.id(),
            seqnum: self.entropy.seqnum,
            challenge: &self.entropy.challenge[..agreed.hash.len_bytes()],
            public,
        };
        self.to_send = Some(message.encode());
        self.state = ControllerState::Reply(agreed);
    }

    fn reply(
        &mut self,
        agreed: Agreed,
        response: &[u8],
        challenge: Option<&[u8]>,
        seqnum: u32,
        public: &[u8],
    ) -> Result<Option<DhTask>, Failure> {
        let len = agreed.hash.len_bytes();
        if response.len() != len {
            return refuse(Reason::INCORRECT_PAYLOAD, "the response has not the hash's length");
        }
        if public.len() != agreed.group.public_len() {
            return refuse(Reason::INCORRECT_PAYLOAD, "the DH value has not the group's length");
        }
        if challenge == Some(&self.entropy.challenge[..len]) {
            return refuse(Reason::FAILED, "the host sent our own challenge back");
        }
        if agreed.sc_c != NO_SECURE_CHANNEL && challenge.is_none() {
            return refuse(Reason::INCORRECT_PAYLOAD, "a secure channel without a challenge");
        }
        let received = Received {
            response: response.to_vec(),
            challenge: challenge.map(<[u8]>::to_vec),
            seqnum,
        };
        if agreed.group == DhGroup::Null {
            return self.judge(agreed, &received, None).map(|()| None);
        }
        if !is_public_value(agreed.group, public) {
            return refuse(Reason::FAILED, "the host's DH value gives the secret away");
        }
        self.state = ControllerState::Exchange(agreed, Box::new(received));
        Ok(DhTask::new(agreed.group, agreed.hash, &self.entropy.private, false, Some(public)))
    }

    /// Judges the host's proof, and answers with our own where one is wanted.
    fn judge(
        &mut self,
        agreed: Agreed,
        received: &Received,
        session: Option<&Secret>,
    ) -> Result<(), Failure> {
        let Agreed { hash, group, sc_c } = agreed;
        if session.is_none() && group != DhGroup::Null {
            return refuse(Reason::FAILED, "the exchange has no result");
        }
        let (host, sub) = (&self.config.hostnqn, &self.config.subnqn);
        let proof = Proof { hash, session, t_id: self.t_id };
        let c1 = &self.entropy.challenge[..hash.len_bytes()];
        // All of them, so that the time does not tell which it was.
        let key_index = self.config.host_keys.iter().enumerate().fold(None, |found, (n, key)| {
            let key = transformed(key, host);
            let want = proof.of_host(&key, c1, self.entropy.seqnum, sc_c, host, sub);
            is_equal(want.expose(), &received.response).then_some(n).or(found)
        });
        let Some(key_index) = key_index else {
            let what = match (self.config.host_keys.len(), self.config.expired.host) {
                (0, true) => format!(
                    "the DH-HMAC-CHAP secret of host `{host}` has expired: make another by `penstock \
                     key generate`, and give the host what `penstock key export` prints"
                ),
                (0, false) => format!(
                    "host `{host}` has no DH-HMAC-CHAP secret: make one by `penstock key generate`"
                ),
                (n, has_expired) => format!(
                    "host `{host}` has another secret than ours ({n} tried{}); on the host, connect \
                     with the `--dhchap-secret` that `penstock key export` prints for it",
                    if has_expired { ", another has expired" } else { "" }
                ),
            };
            return refuse(Reason::FAILED, what);
        };
        let is_concatenated = sc_c != NO_SECURE_CHANNEL;
        // For the key of a secure channel a challenge comes without the wish for a proof, then with
        // sequence number 0.
        let wants_proof =
            received.challenge.is_some() && !(is_concatenated && received.seqnum == 0);
        let response = match (&received.challenge, &self.config.controller_key) {
            (Some(c2), Some(key)) if wants_proof => {
                let key = transformed(key, sub);
                Some(proof.of_controller(&key, c2, received.seqnum, host, sub))
            }
            (Some(_), None) if wants_proof => {
                let why = match self.config.expired.controller {
                    true => "whose secret has expired: make another",
                    false => "which has no secret: make one",
                };
                let what = format!(
                    "host `{host}` wants the controller to prove itself, {why} with `penstock key \
                     generate`, or connect without `--dhchap-ctrl-secret`"
                );
                return refuse(Reason::FAILED, what);
            }
            _ => None,
        };
        let generated = match (session, &received.challenge) {
            (Some(session), Some(c2)) if is_concatenated => generate(hash, session, c1, c2),
            _ => None,
        };
        let message = Message::Success1 {
            t_id: self.t_id,
            hash_len: hash_len(hash),
            response: response.as_ref().map(Secret::expose),
        };
        self.to_send = Some(message.encode());
        let outcome = Outcome { hash, group, is_mutual: response.is_some(), key_index, generated };
        if outcome.is_mutual {
            self.state = ControllerState::Success2(outcome);
        } else {
            self.status = Status::Done(outcome);
        }
        Ok(())
    }
}

fn hash_len(hash: Hash) -> u8 {
    u8::try_from(hash.len_bytes()).expect("at most 64")
}

/// The end of the host.
pub struct Host {
    config: HostConfig,
    entropy: Entropy,
    state: HostState,
    status: Status,
    to_send: Option<Vec<u8>>,
}

enum HostState {
    /// Moved on by the Challenge.
    Challenge,
    /// Moved on by value and result of the exchange.
    Exchange(Box<Challenged>),
    /// Moved on by Success1.
    Success1(Box<Challenged>, Option<Secret>),
    End,
}

/// What a Challenge said.
struct Challenged {
    hash: Hash,
    group: DhGroup,
    seqnum: u32,
    challenge: Vec<u8>,
}

impl Host {
    /// A transaction; its first message is there to take. `random` is used once.
    pub fn new(config: HostConfig, random: &[u8; ENTROPY_LEN]) -> Host {
        let hashes: Vec<u8> = config.hashes.iter().take(3).map(|hash| hash_id(*hash)).collect();
        let groups: Vec<u8> = config.groups.iter().take(6).map(|group| group.id()).collect();
        let negotiate = Message::Negotiate {
            t_id: config.t_id,
            sc_c: sc_c(config.concatenation),
            authid: AUTHID,
            hashes: &hashes,
            groups: &groups,
        };
        Host {
            to_send: Some(negotiate.encode()),
            entropy: Entropy::new(random),
            state: HostState::Challenge,
            status: Status::Running,
            config,
        }
    }

    /// Takes the payload of an Authentication Receive. A task is to be run, and its result given to
    /// [`on_computed`](Host::on_computed).
    pub fn on_message(&mut self, bytes: &[u8]) -> Option<DhTask> {
        match self.message(bytes) {
            Ok(task) => task,
            Err(failure) => {
                self.fail(failure);
                None
            }
        }
    }

    /// Takes the result of a task.
    pub fn on_computed(&mut self, done: DhDone) {
        match std::mem::replace(&mut self.state, HostState::End) {
            HostState::Exchange(challenged) => {
                let DhDone { public, session } = done;
                self.reply(challenged, public.as_deref().unwrap_or_default(), session);
            }
            other => self.state = other,
        }
    }

    /// The payload for an Authentication Send, once. After a message without one, an Authentication
    /// Receive asks the controller for its next, until the status is no longer running.
    pub fn next_message(&mut self) -> Option<Vec<u8>> {
        self.to_send.take()
    }

    /// How it stands.
    pub fn status(&self) -> &Status {
        &self.status
    }

    fn fail(&mut self, failure: Failure) {
        self.state = HostState::End;
        if matches!(self.status, Status::Failed(_)) {
            return;
        }
        self.to_send = (!failure.is_peers)
            .then(|| Message::Failure2 { t_id: self.config.t_id, reason: failure.reason }.encode());
        self.status = Status::Failed(failure);
    }

    fn message(&mut self, bytes: &[u8]) -> Result<Option<DhTask>, Failure> {
        let message = Message::parse(bytes).map_err(malformed)?;
        match (std::mem::replace(&mut self.state, HostState::End), message) {
            (_, Message::Failure1 { reason, .. }) => Err(peers(reason, self.hint(reason))),
            (
                HostState::Challenge,
                Message::Challenge { t_id, hash, group, seqnum, challenge, public },
            ) => {
                self.check_t_id(t_id)?;
                let hash = hash_from_id(hash).filter(|hash| self.config.hashes.contains(hash));
                let group = DhGroup::from_id(group).filter(|g| self.config.groups.contains(g));
                let Some(hash) = hash else {
                    return refuse(Reason::HASH_NOT_USABLE, "the controller chose one not offered");
                };
                let Some(group) = group else {
                    return refuse(
                        Reason::GROUP_NOT_USABLE,
                        "the controller chose one not offered",
                    );
                };
                self.on_challenge(
                    Challenged { hash, group, seqnum, challenge: challenge.to_vec() },
                    public,
                )
            }
            (
                HostState::Success1(challenged, session),
                Message::Success1 { t_id, hash_len, response },
            ) => {
                self.check_t_id(t_id)?;
                if usize::from(hash_len) != challenged.hash.len_bytes() {
                    return refuse(Reason::INCORRECT_PAYLOAD, "a response of another hash");
                }
                self.success(&challenged, session.as_ref(), response)?;
                Ok(None)
            }
            _ => refuse(Reason::INCORRECT_MESSAGE, "the controller sent a message out of order"),
        }
    }

    fn hint(&self, reason: Reason) -> &'static str {
        match reason {
            Reason::FAILED if self.config.controller_key.is_some() => {
                "the controller has another secret for this host, or none of its own: use what \
                 `penstock key export` prints at the target, for both"
            }
            Reason::FAILED => {
                "the controller has another secret for this host: use what `penstock key export` \
                 prints at the target"
            }
            Reason::CONCATENATION_MISMATCH => {
                "the controller makes no keys for TLS by authentication, or insists on it: connect \
                 to a listener with tls=allowed, or without concatenation"
            }
            Reason::HASH_NOT_USABLE => {
                "it allows none of the hashes offered: allow one with `--auth-hash` at the target"
            }
            Reason::GROUP_NOT_USABLE => {
                "it allows none of the groups offered: allow one with `--auth-group` at the target"
            }
            _ => "`penstock status` at the target says why",
        }
    }

    fn check_t_id(&self, t_id: u16) -> Result<(), Failure> {
        if t_id == self.config.t_id {
            return Ok(());
        }
        refuse(Reason::INCORRECT_PAYLOAD, "the controller names another transaction")
    }

    fn on_challenge(
        &mut self,
        challenged: Challenged,
        public: &[u8],
    ) -> Result<Option<DhTask>, Failure> {
        let Challenged { hash, group, .. } = challenged;
        let is_concatenated = self.config.concatenation != Concatenation::No;
        if is_concatenated && (group == DhGroup::Null || hash == Hash::Sha512) {
            return refuse(Reason::CONCATENATION_MISMATCH, "the choice cannot make a key for TLS");
        }
        if challenged.challenge.len() != hash.len_bytes() {
            return refuse(Reason::INCORRECT_PAYLOAD, "the challenge has not the hash's length");
        }
        if public.len() != group.public_len() {
            return refuse(Reason::INCORRECT_PAYLOAD, "the DH value has not the group's length");
        }
        if group == DhGroup::Null {
            self.reply(Box::new(challenged), &[], None);
            return Ok(None);
        }
        if !is_public_value(group, public) {
            return refuse(Reason::FAILED, "the controller's DH value gives the secret away");
        }
        self.state = HostState::Exchange(Box::new(challenged));
        Ok(DhTask::new(group, hash, &self.entropy.private, true, Some(public)))
    }

    /// Our challenge, sent if we want a proof or a key for TLS.
    fn c2(&self, hash: Hash) -> Option<&[u8]> {
        let wants =
            self.config.controller_key.is_some() || self.config.concatenation != Concatenation::No;
        wants.then(|| &self.entropy.challenge[..hash.len_bytes()])
    }

    fn s2(&self) -> u32 {
        if self.config.controller_key.is_some() { self.entropy.seqnum } else { 0 }
    }

    fn reply(&mut self, challenged: Box<Challenged>, public: &[u8], session: Option<Secret>) {
        let Challenged { hash, seqnum, challenge, .. } = &*challenged;
        let proof = Proof { hash: *hash, session: session.as_ref(), t_id: self.config.t_id };
        let (host, sub) = (&self.config.hostnqn, &self.config.subnqn);
        let key = transformed(&self.config.host_key, host);
        let sc_c = sc_c(self.config.concatenation);
        let response = proof.of_host(&key, challenge, *seqnum, sc_c, host, sub);
        let message = Message::Reply {
            t_id: self.config.t_id,
            response: response.expose(),
            challenge: self.c2(*hash),
            seqnum: self.s2(),
            public,
        };
        self.to_send = Some(message.encode());
        self.state = HostState::Success1(challenged, session);
    }

    fn success(
        &mut self,
        challenged: &Challenged,
        session: Option<&Secret>,
        response: Option<&[u8]>,
    ) -> Result<(), Failure> {
        let Challenged { hash, group, challenge: c1, .. } = challenged;
        let (host, sub) = (&self.config.hostnqn, &self.config.subnqn);
        if let Some(key) = &self.config.controller_key {
            let Some(response) = response else {
                let what = format!(
                    "`{sub}` did not prove itself, which it has to since this end has a secret of it: \
                     make its secret by `penstock key generate --kind dhchap-controller` at the target"
                );
                return refuse(Reason::FAILED, what);
            };
            let proof = Proof { hash: *hash, session, t_id: self.config.t_id };
            let c2 = &self.entropy.challenge[..hash.len_bytes()];
            let key = transformed(key, sub);
            let want = proof.of_controller(&key, c2, self.entropy.seqnum, host, sub);
            if !is_equal(want.expose(), response) {
                let what = format!(
                    "`{sub}` has another secret than this end has of it (`--dhchap-ctrl-secret`): \
                     use what `penstock key export` prints at the target"
                );
                return refuse(Reason::FAILED, what);
            }
            self.to_send = Some(Message::Success2 { t_id: self.config.t_id }.encode());
        }
        let generated = match (session, self.c2(*hash)) {
            (Some(session), Some(c2)) if self.config.concatenation != Concatenation::No => {
                generate(*hash, session, c1, c2)
            }
            _ => None,
        };
        self.status = Status::Done(Outcome {
            hash: *hash,
            group: *group,
            is_mutual: self.config.controller_key.is_some(),
            key_index: 0,
            generated,
        });
        Ok(())
    }
}

fn sc_c(concatenation: Concatenation) -> u8 {
    match concatenation {
        Concatenation::No => NO_SECURE_CHANNEL,
        Concatenation::New => NEW_TLS_PSK,
        Concatenation::Replace => REPLACE_TLS_PSK,
    }
}

#[cfg(test)]
pub(super) fn generate_for_test(
    hash: Hash,
    session: &Secret,
    c1: &[u8],
    c2: &[u8],
) -> Option<RetainedKey> {
    generate(hash, session, c1, c2)
}
