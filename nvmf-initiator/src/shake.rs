//! TLS before a connection's first PDU, and below all others.
//!
//! ```text
//!   TCP connect ─► ClientHello ─► the target's answer ─► our Finished leaves ─► record layer ─► ICReq
//!                      ▲                 │ refused
//!                      └── next offer ◄──┘
//! ```
//!
//! A handshake runs on the connection's core, one step in a turn of it: about 0.1 ms.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use crypto::tls::{self, Cause, Established, Failure, Progress, RecordError, Session};
use iobuf::SgList;
use reactor::net::{
    Gather, HEAD_BYTES_MAX, Layer, LayerError, Placed, Plain, Rx, SendPending, Stream,
};
use reactor::{Errno, Local};

use crate::security::Offers;

/// Entries of a send queue that the handshake's messages take at most: a ClientHello with a hybrid
/// key share and long names.
pub(crate) const ENTRIES: usize = 32;
const _: () = assert!(ENTRIES * HEAD_BYTES_MAX >= 6 << 10);

/// What a step of a handshake came to.
pub(crate) enum Shaken {
    /// Nothing to do before the target says something.
    Waits,
    /// There was a step.
    Went,
    /// The record layer is in force.
    Done,
    /// The target did not take this key, and there is another to offer on a new connection.
    Next,
    /// It failed for good. `true`: the target is being told why.
    Failed(String, bool),
}

/// The handshake of one connection, over as many attempts as there are keys to offer.
pub(crate) struct Shake {
    offers: Arc<Offers>,
    /// The one that is offered first.
    first: usize,
    /// Keys that the target did not take.
    refused: usize,
    /// How it refused the first of them.
    first_refusal: Option<String>,
    stage: Stage,
}

enum Stage {
    /// Nothing has been sent. Moved on by the next turn that has time.
    Begin,
    /// Moved on by what the target sends.
    Running(usize, Box<tls::Client>),
    /// Moved on when everything has left.
    Switch(Box<dyn Layer>, Vec<u8>),
    Over,
}

impl Shake {
    pub(crate) fn new(offers: Arc<Offers>) -> Shake {
        let first = offers.best();
        Shake { offers, first, refused: 0, first_refusal: None, stage: Stage::Begin }
    }

    /// Whether something can be done although nothing happens on the stream.
    pub(crate) fn is_due(&self, stream: &Stream) -> bool {
        matches!(self.stage, Stage::Begin) || stream.wants_turn()
    }

    /// Goes on with the handshake on the connection `stream`.
    pub(crate) fn step(
        &mut self,
        stream: &mut Stream,
        local: &Local,
        error: &Rc<Cell<Option<RecordError>>>,
    ) -> Shaken {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Over => Shaken::Waits,
            Stage::Switch(layer, leftover) => match stream.set_layer(layer, &leftover) {
                Ok(()) => Shaken::Done,
                Err(SendPending(layer)) => {
                    self.stage = Stage::Switch(layer, leftover);
                    match stream.failed() {
                        Some(errno) => self.refuse(format!("the connection failed: {errno}")),
                        None => Shaken::Waits,
                    }
                }
            },
            // Only bytes that were not looked at yet can wait for another turn.
            stage if !local.has_long_step() => {
                self.stage = stage;
                Shaken::Waits
            }
            Stage::Begin => {
                let Some((index, psk)) = self.offers.get(self.first, self.refused) else {
                    return Shaken::Failed("there is no key to offer".to_owned(), false);
                };
                local.take_long_step();
                match tls::Client::new(psk) {
                    Ok(mut client) => {
                        if !send(stream, &client.take()) {
                            return self.refuse("the connection failed".to_owned());
                        }
                        self.stage = Stage::Running(index, Box::new(client));
                        Shaken::Went
                    }
                    Err(failure) => Shaken::Failed(failure.to_string(), false),
                }
            }
            Stage::Running(index, client) => self.run(index, client, stream, local, error),
        }
    }

    fn run(
        &mut self,
        index: usize,
        mut client: Box<tls::Client>,
        stream: &mut Stream,
        local: &Local,
        error: &Rc<Cell<Option<RecordError>>>,
    ) -> Shaken {
        let chunk = match stream.recv() {
            Rx::Data(chunk) => chunk,
            Rx::Empty => match stream.failed() {
                None => {
                    self.stage = Stage::Running(index, client);
                    return Shaken::Waits;
                }
                Some(errno) => return self.refuse(closed(Some(errno))),
            },
            Rx::Eof => return self.refuse(closed(None)),
            Rx::Failed(errno) => return self.refuse(closed(Some(errno))),
        };
        local.take_long_step();
        let result = client.feed(&chunk);
        let answer = client.take();
        let is_sent = send(stream, &answer);
        match result {
            Ok(_) if !is_sent => self.refuse("the connection failed".to_owned()),
            Ok(Progress::Running) => {
                self.stage = Stage::Running(index, client);
                Shaken::Went
            }
            Ok(Progress::Done) => match client.finish() {
                Some(established) => {
                    self.established(index, &established, error);
                    self.stage =
                        Stage::Switch(self.layer(&established, error), established.leftover);
                    Shaken::Went
                }
                None => Shaken::Failed("the handshake came to nothing".to_owned(), false),
            },
            Err(failure) => self.on_failure(&failure, is_sent && !answer.is_empty()),
        }
    }

    fn established(
        &mut self,
        index: usize,
        established: &Established,
        error: &Rc<Cell<Option<RecordError>>>,
    ) {
        error.set(None);
        self.offers.took(index);
        tracing::debug!(
            identity = established.identity,
            suite = %established.suite,
            group = established.group,
            derivation = %established.derivation,
            "TLS established"
        );
    }

    fn layer(
        &self,
        established: &Established,
        error: &Rc<Cell<Option<RecordError>>>,
    ) -> Box<dyn Layer> {
        let session = Session::new(established, self.offers.updates);
        Box::new(TlsLayer { session, error: Rc::clone(error) })
    }

    fn on_failure(&mut self, failure: &Failure, is_told: bool) -> Shaken {
        match failure.cause {
            Cause::Alert { .. } | Cause::Protocol { .. } => self.refuse(failure.to_string()),
            _ => Shaken::Failed(failure.to_string(), is_told),
        }
    }

    /// The target does not take the key that was offered, whatever it says.
    fn refuse(&mut self, why: String) -> Shaken {
        self.refused += 1;
        let first = self.first_refusal.get_or_insert(why);
        if self.refused < self.offers.len() {
            self.stage = Stage::Begin;
            return Shaken::Next;
        }
        Shaken::Failed(self.offers.explain(first), false)
    }
}

fn closed(errno: Option<Errno>) -> String {
    match errno {
        None => "the target closed the connection during the handshake".to_owned(),
        Some(errno) => format!("the connection failed during the handshake: {errno}"),
    }
}

/// Queues and sends. `false`: there was no room.
fn send(stream: &mut Stream, bytes: &[u8]) -> bool {
    for part in bytes.chunks(HEAD_BYTES_MAX) {
        if stream.push(part, None, None, None).is_err() {
            return false;
        }
    }
    stream.flush();
    true
}

/// The record layer of a stream.
struct TlsLayer {
    session: Session,
    /// For whoever has to say why the stream failed.
    error: Rc<Cell<Option<RecordError>>>,
}

impl TlsLayer {
    fn refuse(&mut self, error: RecordError) -> LayerError {
        self.error.set(Some(error));
        LayerError("a TLS record was refused")
    }
}

impl Layer for TlsLayer {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        self.session.seal(plain, out).map_err(|error| {
            self.error.set(Some(error));
            LayerError("TLS cannot go on")
        })
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        let opened = self.session.open(wire, &mut |plain| match plain {
            tls::Plain::InPlace(range, _) => sink(Plain::InPlace(range)),
            tls::Plain::Copied(bytes) => sink(Plain::Copied(bytes)),
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
        self.session
            .open_to(wire, to, offset, len)
            .map(|(taken, placed)| Placed { taken, placed })
            .map_err(|error| self.refuse(error))
    }

    fn farewell(&mut self, out: &mut Vec<u8>) {
        if let Some(error) = self.error.get() {
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
