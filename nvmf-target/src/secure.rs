//! What comes before a connection's first PDU: TLS, where the listener has it.
//!
//! ```text
//!   first byte ─► plain NVMe/TCP (if allowed)
//!        └──────► ClientHello, collected ─► its turn comes ─► handshake ─► what is being sent leaves
//!                                                                             └─► record layer
//! ```
//!
//! A handshake runs on the connection's core: about 0.1 ms, one step in a turn, so that the I/O of
//! others goes on in between. What a stranger can hold is bounded: before its ClientHello is whole,
//! that many bytes; afterwards it has proven to have a key, or is closed. A ClientHello that was heard
//! can be repeated, though: when too many of them are answered, the oldest goes for a new one once it has
//! had time for a round trip, and those that come meanwhile wait for their turn in order.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use std::rc::Rc;

use crypto::psk::{Identity, Suite};
use crypto::tls::{self, Cause, Established, KeyUpdates, Progress, RecordError, Role, Session};
use iobuf::SgList;
use reactor::net::{Gather, HEAD_BYTES_MAX, Layer, LayerError, Placed, Plain, SendPending};

use crate::config::Tls;
use crate::conn::{Conn, Life};
use crate::core::Env;
use crate::limits::count;
use crate::sample::CipherTime;

/// Handshakes that one core has under way at once, 30 KiB each: their peers have proven a key, or
/// repeat what one sent that has.
const HANDSHAKES_MAX: usize = 512;

/// For how long a handshake that was answered does not make room: a round trip, and what a busy host
/// needs. With all places taken, 2,560 handshakes begin in a second.
const ROUND_TRIP: Duration = Duration::from_millis(200);

/// Handshakes that may begin in a turn, and others that may go on. A step takes about 0.1 ms, and the
/// I/O of others waits for it.
const STEPS: u32 = 1;

/// TLS handshakes of a core, by connection.
#[derive(Debug, Default)]
pub(crate) struct Handshakes {
    /// Those whose ClientHello is there and has to be answered, by ticket.
    waiting: BTreeMap<u64, u32>,
    next_ticket: u64,
    /// Those that were answered and wait for their peer, and since when: the oldest first.
    running: VecDeque<(u32, Duration)>,
    /// Those that have to make room.
    leaving: Vec<u32>,
    /// Steps of this turn.
    begun: u32,
    continued: u32,
}

impl Handshakes {
    pub(crate) fn begin_turn(&mut self) {
        (self.begun, self.continued) = (0, 0);
    }

    fn queue(&mut self, index: u32) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.insert(ticket, index);
        ticket
    }

    /// The connection whose ClientHello is answered now.
    pub(crate) fn next_to_begin(&mut self, now: Duration) -> Option<u32> {
        if self.begun == STEPS || now < self.due()? {
            return None;
        }
        self.begun += 1;
        self.waiting.pop_first().map(|(_, index)| index)
    }

    /// When there is something to do without anything having come.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.waiting.first_key_value()?;
        match self.running.front() {
            Some((_, since)) if self.running.len() == HANDSHAKES_MAX => Some(*since + ROUND_TRIP),
            _ => Some(Duration::ZERO),
        }
    }

    /// A connection that has to make room for newer ones.
    pub(crate) fn next_leaving(&mut self) -> Option<u32> {
        self.leaving.pop()
    }

    fn begin(&mut self, index: u32, now: Duration) {
        if self.running.len() == HANDSHAKES_MAX {
            self.leaving.extend(self.running.pop_front().map(|(index, _)| index));
        }
        self.running.push_back((index, now));
    }

    fn end(&mut self, index: u32) {
        self.running.retain(|(other, _)| *other != index);
        self.leaving.retain(|other| *other != index);
    }
}

/// How far the begin of a connection is.
pub(crate) enum Opening {
    /// Nothing has come.
    Begin,
    /// Waits for the rest of the first record.
    Hello(Vec<u8>),
    /// Waits for its turn, by its ticket; what comes meanwhile stays with the stream.
    Whole(Vec<u8>, u64),
    /// Waits for the peer's next message.
    Handshake(Box<tls::Server>),
    /// Waits for the end of what is being sent.
    Switch(Box<dyn Layer>, Vec<u8>),
}

/// Who the peer has proven to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proven {
    pub(crate) hostnqn: String,
    pub(crate) subnqn: String,
    /// By a key that an authentication has made.
    pub(crate) is_generated: bool,
    /// For the operator.
    pub(crate) text: String,
}

/// Header of a record: type, version, length.
const RECORD_HEADER: usize = 5;

/// Length of the first record with its header, once it is known.
fn first_record(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<RECORD_HEADER>()?;
    Some(RECORD_HEADER + usize::from(u16::from_be_bytes([header[3], header[4]])))
}

impl Conn {
    /// Takes the bytes that come before the first PDU. Returns how many of them are not its own.
    pub(crate) fn open_with(&mut self, bytes: &[u8], env: &mut Env<'_>) -> usize {
        let Some(opening) = self.opening.take() else { return bytes.len() };
        let Some(first) = bytes.first() else {
            self.opening = Some(opening);
            return 0;
        };
        match opening {
            Opening::Begin if self.port().tls == Tls::Off => {
                if tls::looks_like_tls(*first) {
                    // Its bytes are no PDU, and it is told that as far as the protocol has it.
                    let why = "the host speaks TLS, and this listener does not (tls=off): connect \
                               without `--tls`, or to a listener with tls=allowed or tls=required";
                    self.note_refusal(why.to_owned(), env);
                }
                return bytes.len();
            }
            Opening::Begin if !tls::looks_like_tls(*first) && self.port().tls == Tls::Allowed => {
                // Plain NVMe/TCP.
                return bytes.len();
            }
            Opening::Begin => self.hello(Vec::new(), bytes, env),
            Opening::Hello(received) => self.hello(received, bytes, env),
            Opening::Handshake(server) => {
                env.handshakes.continued += 1;
                self.shake(server, bytes, env);
            }
            Opening::Whole(mut received, ticket) => {
                received.extend_from_slice(bytes);
                self.opening = Some(Opening::Whole(received, ticket));
            }
            Opening::Switch(layer, mut leftover) => {
                leftover.extend_from_slice(bytes);
                self.opening = Some(Opening::Switch(layer, leftover));
            }
        }
        0
    }

    /// Whether the next bytes may cost a handshake's step and this turn has had its.
    pub(crate) fn waits_for_handshakes(&self, env: &Env<'_>) -> bool {
        match &self.opening {
            None => false,
            // Received bytes stay with the stream, which gives them to the layer.
            Some(Opening::Switch(..) | Opening::Whole(..)) => true,
            Some(Opening::Handshake(_)) => env.handshakes.continued == STEPS,
            Some(Opening::Begin | Opening::Hello(_)) => false,
        }
    }

    /// Collects the first record. A library's connection is made only for one that is whole.
    fn hello(&mut self, mut received: Vec<u8>, bytes: &[u8], env: &mut Env<'_>) {
        received.extend_from_slice(bytes);
        let is_tls = received.first().is_some_and(|first| tls::looks_like_tls(*first));
        let len = first_record(&received);
        let is_whole = len.is_some_and(|len| received.len() >= len);
        if is_tls && !is_whole && len.is_none_or(|len| len <= tls::HANDSHAKE_BYTES_MAX) {
            self.opening = Some(Opening::Hello(received));
            return;
        }
        if let Some(first) = received.first().copied().filter(|_| !is_tls) {
            // The library would say the same for the price of a handshake.
            let cause = Cause::Plaintext { first, role: Role::Server };
            self.note_refusal(cause.to_string(), env);
            return self.close("the host does not speak TLS");
        }
        let ticket = env.handshakes.queue(self.index);
        self.opening = Some(Opening::Whole(received, ticket));
    }

    /// Its turn has come.
    pub(crate) fn answer_hello(&mut self, env: &mut Env<'_>) {
        match self.opening.take() {
            Some(Opening::Whole(received, _)) if self.life == Life::Open => {
                self.begin_handshake(&received, env);
            }
            opening => self.opening = opening,
        }
    }

    fn begin_handshake(&mut self, received: &[u8], env: &mut Env<'_>) {
        match tls::Server::new(env.shared.keys.clone()) {
            Ok(server) => {
                env.handshakes.begin(self.index, env.now);
                self.is_shaking = true;
                self.shake(Box::new(server), received, env);
            }
            Err(failure) => {
                tracing::error!(%failure, "no TLS handshake is possible");
                self.close("no TLS handshake is possible");
            }
        }
    }

    fn shake(&mut self, mut server: Box<tls::Server>, bytes: &[u8], env: &mut Env<'_>) {
        let result = server.feed(bytes);
        let answer = server.take();
        match result {
            Ok(progress) => {
                for part in answer.chunks(HEAD_BYTES_MAX) {
                    self.push(part, None);
                }
                if progress == Progress::Running {
                    self.opening = Some(Opening::Handshake(server));
                    return;
                }
                self.end_handshake(env);
                match server.finish() {
                    Some(established) => self.established(established, env),
                    None => self.close("the TLS handshake came to nothing"),
                }
            }
            Err(failure) => {
                self.end_handshake(env);
                self.note_refusal(failure.to_string(), env);
                self.part_after(&answer, failure.close_after, env.now);
            }
        }
    }

    fn note_refusal(&self, why: String, env: &Env<'_>) {
        env.shared.refusals.note(self.peer(), self.port().id, why, env.now);
    }

    /// Tells the operator of a peer that has begun with TLS and `did` something else than go on.
    pub(crate) fn note_unfinished(&self, did: &str, env: &Env<'_>) {
        if let Some(Opening::Hello(_) | Opening::Handshake(_)) = &self.opening {
            let why = format!(
                "the host {did} in the middle of the TLS handshake, without a word; `journalctl -u \
                 tlshd` there says more, and on the host run what `penstock key export` prints for it"
            );
            self.note_refusal(why, env);
        }
    }

    /// The handshake is over, however it ended.
    pub(crate) fn end_handshake(&mut self, env: &mut Env<'_>) {
        if std::mem::take(&mut self.is_shaking) {
            env.handshakes.end(self.index);
        }
        if let Some(Opening::Whole(_, ticket)) = &self.opening {
            env.handshakes.waiting.remove(ticket);
        }
    }

    /// Ends the handshake for newer ones.
    pub(crate) fn give_way(&mut self, env: &mut Env<'_>) {
        self.end_handshake(env);
        // The library's part of the memory goes now.
        self.opening = None;
        count(&env.shared.hits.handshakes_dropped);
        self.close("others begin TLS handshakes");
    }

    fn established(&mut self, established: Established, env: &Env<'_>) {
        let Some(identity) = Identity::parse(established.identity.as_bytes()) else {
            self.close("the TLS identity is none of NVMe/TCP");
            return;
        };
        tracing::debug!(
            peer = self.peer(),
            identity = established.identity,
            suite = %established.suite,
            group = established.group,
            derivation = %established.derivation,
            "TLS established"
        );
        self.proven = Some(Proven {
            hostnqn: identity.hostnqn.to_owned(),
            subnqn: identity.subnqn.to_owned(),
            is_generated: identity.is_generated,
            text: describe(established.suite, &established.group),
        });
        // A Linux host could not follow a change of keys when this was written. Hosts that can, ours
        // among them, ask for one in time.
        let session = Session::new(&established, KeyUpdates::Never);
        let layer =
            Box::new(TlsLayer { session, error: None, cipher: Rc::clone(env.sampler.cipher()) });
        self.opening = Some(Opening::Switch(layer, established.leftover));
        self.switch();
    }

    /// Puts the record layer in force when nothing is being sent any more.
    pub(crate) fn switch(&mut self) -> bool {
        match self.opening.take() {
            Some(Opening::Switch(layer, leftover)) => {
                if let Err(SendPending(layer)) = self.stream.set_layer(layer, &leftover) {
                    self.opening = Some(Opening::Switch(layer, leftover));
                    return false;
                }
                true
            }
            opening => {
                self.opening = opening;
                false
            }
        }
    }
}

fn describe(suite: Suite, group: &str) -> String {
    format!("{suite}, {group}")
}

/// The record layer of a stream.
struct TlsLayer {
    session: Session,
    error: Option<RecordError>,
    /// What it takes, while somebody wants to know.
    cipher: Rc<CipherTime>,
}

impl TlsLayer {
    fn refuse(&mut self, error: RecordError) -> LayerError {
        tracing::debug!(%error, "a TLS record was refused");
        self.error = Some(error);
        LayerError("a TLS record was refused")
    }
}

impl Layer for TlsLayer {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let sealed = self.cipher.sealing(|| self.session.seal(plain, out));
        sealed.map_err(|error| {
            tracing::info!(%error, "TLS cannot go on");
            self.error = Some(error);
            LayerError("TLS cannot go on")
        })
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        let opened = self.cipher.opening(|| {
            self.session.open(wire, &mut |plain| match plain {
                tls::Plain::InPlace(range, _) => sink(Plain::InPlace(range)),
                tls::Plain::Copied(bytes) => sink(Plain::Copied(bytes)),
            })
        });
        opened.map_err(|error| self.refuse(error))
    }

    fn first_len(&self, wire: &[u8]) -> usize {
        self.session.first_len(wire)
    }

    fn open_to(
        &mut self,
        wire: &mut [u8],
        to: &SgList,
        offset: usize,
        len: usize,
    ) -> Result<Placed, LayerError> {
        let opened = self.cipher.opening(|| self.session.open_to(wire, to, offset, len));
        opened.map(|(taken, placed)| Placed { taken, placed }).map_err(|error| self.refuse(error))
    }

    fn farewell(&mut self, out: &mut Vec<u8>) {
        if let Some(error) = self.error {
            self.session.farewell(error, out);
        }
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        self.session.close(out);
    }

    fn is_ended(&self) -> bool {
        self.session.is_peer_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_handshakes_make_room() {
        let mut handshakes = Handshakes::default();
        let (most, now) = (HANDSHAKES_MAX as u32, Duration::from_secs(9));
        (0..most).for_each(|index| handshakes.begin(index, now));
        assert_eq!(handshakes.next_leaving(), None);
        handshakes.end(0);
        handshakes.begin(most, now);
        assert_eq!(handshakes.next_leaving(), None, "one had come to its end");
        handshakes.begin(most + 1, now);
        assert_eq!(handshakes.next_leaving(), Some(1));
        handshakes.begin(most + 2, now);
        handshakes.end(2);
        assert_eq!(handshakes.next_leaving(), None, "it has gone by itself");
        assert_eq!(handshakes.running.len(), HANDSHAKES_MAX);
    }

    #[test]
    fn new_handshakes_wait_until_the_oldest_had_its_time() {
        let mut handshakes = Handshakes::default();
        let now = Duration::from_secs(9);
        assert_eq!((handshakes.due(), handshakes.next_to_begin(now)), (None, None));
        handshakes.queue(7);
        let ticket = handshakes.queue(8);
        handshakes.queue(9);
        handshakes.waiting.remove(&ticket);
        assert_eq!(handshakes.next_to_begin(now), Some(7));
        assert_eq!(handshakes.next_to_begin(now), None, "one in a turn");
        handshakes.begin_turn();
        (0..HANDSHAKES_MAX as u32).for_each(|index| handshakes.begin(index, now));
        assert_eq!(handshakes.due(), Some(now + ROUND_TRIP));
        assert_eq!(handshakes.next_to_begin(now), None);
        assert_eq!(handshakes.next_to_begin(now + ROUND_TRIP), Some(9));
    }

    #[test]
    fn the_length_of_the_first_record_is_known_after_five_bytes() {
        assert_eq!(first_record(&[22, 3, 1, 2]), None);
        assert_eq!(first_record(&[22, 3, 1, 2, 0]), Some(517));
    }
}
