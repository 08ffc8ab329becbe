//! What comes before a connection's first PDU: TLS, where the listener has it.
//!
//! ```text
//!   first byte ─► plain NVMe/TCP (if allowed)
//!        └──────► ClientHello, collected ─► handshake ─► what is being sent leaves ─► record layer
//! ```
//!
//! A handshake runs on the connection's core: about 0.1 ms, one step in a turn, so that the I/O of
//! others goes on in between. What a stranger can hold is bounded: before its ClientHello is whole,
//! that many bytes; afterwards it has proven to have a key, or is closed.

use crypto::psk::{Identity, Suite};
use crypto::tls::{self, Established, KeyUpdates, Progress, RecordError, Session};
use reactor::net::{Gather, HEAD_BYTES_MAX, Layer, LayerError, Plain, SendPending};

use crate::config::Tls;
use crate::conn::Conn;
use crate::core::Env;
use crate::limits::count;

/// Handshakes that one core has under way at once, 30 KiB each: their peers have proven a key, or
/// repeat what one sent that has.
pub(crate) const HANDSHAKES_MAX: usize = 512;

/// How far the begin of a connection is.
pub(crate) enum Opening {
    /// Nothing has come.
    Begin,
    /// Waits for the rest of the first record.
    Hello(Vec<u8>),
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
            Opening::Begin if !tls::looks_like_tls(*first) && self.port().tls == Tls::Allowed => {
                // Plain NVMe/TCP.
                return bytes.len();
            }
            Opening::Begin => self.hello(Vec::new(), bytes, env),
            Opening::Hello(received) => self.hello(received, bytes, env),
            Opening::Handshake(server) => self.shake(server, bytes, env),
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
            Some(Opening::Switch(..)) => true,
            Some(_) => env.handshake_steps == 0,
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
        if *env.handshakes >= HANDSHAKES_MAX {
            count(&env.shared.hits.handshakes);
            self.close("too many handshakes");
            return;
        }
        match tls::Server::new(env.shared.keys.clone()) {
            Ok(server) => {
                *env.handshakes += 1;
                self.is_shaking = true;
                self.shake(Box::new(server), &received, env);
            }
            Err(failure) => {
                tracing::error!(%failure, "no TLS handshake is possible");
                self.close("no TLS handshake is possible");
            }
        }
    }

    fn shake(&mut self, mut server: Box<tls::Server>, bytes: &[u8], env: &mut Env<'_>) {
        env.handshake_steps = env.handshake_steps.saturating_sub(1);
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
                    Some(established) => self.established(established),
                    None => self.close("the TLS handshake came to nothing"),
                }
            }
            Err(failure) => {
                self.end_handshake(env);
                let (peer, port) = (self.peer().to_owned(), self.port().id);
                env.shared.refusals.note(&peer, port, failure.to_string(), env.now);
                self.part_after(&answer, failure.close_after, env.now);
            }
        }
    }

    /// The handshake is over, however it ended.
    pub(crate) fn end_handshake(&mut self, env: &mut Env<'_>) {
        if std::mem::take(&mut self.is_shaking) {
            *env.handshakes -= 1;
        }
    }

    fn established(&mut self, established: Established) {
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
        // A Linux host could not follow a change of keys when this was written.
        let session = Session::new(&established, KeyUpdates::Never);
        let layer = Box::new(TlsLayer { session, error: None });
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
}

impl Layer for TlsLayer {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let mut is_short = false;
        let sealed = self.session.seal(plain.len(), out, &mut |offset, dst| {
            is_short |= plain.copy_to_slice(offset, dst).is_err();
        });
        if is_short {
            return Err(LayerError("a message is shorter than it says"));
        }
        sealed.map_err(|error| {
            tracing::info!(%error, "TLS cannot go on");
            LayerError("TLS cannot go on")
        })
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        let opened = self.session.open(wire, &mut |plain| match plain {
            tls::Plain::InPlace(range, _) => sink(Plain::InPlace(range)),
            tls::Plain::Copied(bytes) => sink(Plain::Copied(bytes)),
        });
        opened.map_err(|error| {
            tracing::debug!(%error, "a TLS record was refused");
            self.error = Some(error);
            LayerError("a TLS record was refused")
        })
    }

    fn farewell(&mut self, out: &mut Vec<u8>) {
        if let Some(error) = self.error {
            self.session.farewell(error, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_the_first_record_is_known_after_five_bytes() {
        assert_eq!(first_record(&[22, 3, 1, 2]), None);
        assert_eq!(first_record(&[22, 3, 1, 2, 0]), Some(517));
    }
}
