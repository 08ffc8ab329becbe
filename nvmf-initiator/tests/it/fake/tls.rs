//! TLS of the fake target: with keys of its host, and somebody who meddles with what it sends.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use crypto::TlsKey;
use crypto::psk::{Identity, Psk};
use crypto::tls::{self, KeyUpdates, Progress, PskLookup, Server, Session, Unknown, candidates};
use reactor::net::{Gather, HEAD_BYTES_MAX, Layer, LayerError, Plain, Rx, Stream};

/// What TLS makes of what the target sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealed {
    Handshake,
    /// Records of an admin queue, or of a queue that is not connected.
    Admin,
    /// Records of an I/O queue.
    Io,
}

/// Somebody on the way who changes what the target sends. Where there is a session, records can be
/// sealed with it that the host takes for the target's.
pub type Meddler = Box<dyn FnMut(Sealed, Option<&mut Session>, &mut Vec<u8>)>;

/// What connections of the target have of TLS.
pub struct Tls {
    keys: Arc<Keys>,
    pub meddler: RefCell<Option<Meddler>>,
}

struct Keys(Vec<TlsKey>);

impl PskLookup for Keys {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        Ok(candidates(&self.0, identity))
    }
}

impl Tls {
    pub fn new(keys: Vec<TlsKey>) -> Rc<Tls> {
        Rc::new(Tls { keys: Arc::new(Keys(keys)), meddler: RefCell::default() })
    }

    fn meddle(&self, what: Sealed, session: Option<&mut Session>, bytes: &mut Vec<u8>) {
        if let Some(meddler) = &mut *self.meddler.borrow_mut() {
            meddler(what, session, bytes);
        }
    }
}

/// What a step of a handshake came to.
pub enum Step {
    Waits,
    Done,
    Failed,
}

/// The handshake of a connection.
pub struct Shaking {
    tls: Rc<Tls>,
    is_io: Rc<Cell<bool>>,
    server: Option<Server>,
    /// Waits for the last message to leave.
    layer: Option<(Box<dyn Layer>, Vec<u8>)>,
}

impl Shaking {
    pub fn new(tls: Rc<Tls>, is_io: &Rc<Cell<bool>>) -> Shaking {
        let server = Server::new(tls.keys.clone()).ok();
        Shaking { tls, is_io: Rc::clone(is_io), server, layer: None }
    }

    pub fn step(&mut self, stream: &mut Stream) -> Step {
        if let Some(mut server) = self.server.take() {
            let result = match stream.recv() {
                Rx::Empty => {
                    self.server = Some(server);
                    return Step::Waits;
                }
                Rx::Data(chunk) => server.feed(&chunk),
                Rx::Eof | Rx::Failed(_) => return Step::Failed,
            };
            let mut flight = server.take();
            if !flight.is_empty() {
                self.tls.meddle(Sealed::Handshake, None, &mut flight);
            }
            for part in flight.chunks(HEAD_BYTES_MAX) {
                stream.push(part, None, None, None).unwrap();
            }
            stream.flush();
            match result {
                Ok(Progress::Running) => {
                    self.server = Some(server);
                    return self.step(stream);
                }
                Ok(Progress::Done) => {
                    let mut established = server.finish().unwrap();
                    let leftover = std::mem::take(&mut established.leftover);
                    let session = Session::new(&established, KeyUpdates::Never);
                    let (tls, is_io) = (Rc::clone(&self.tls), Rc::clone(&self.is_io));
                    self.layer = Some((Box::new(TlsLayer { session, tls, is_io }), leftover));
                }
                // Whoever has meddled gets what is due.
                Err(_) => return Step::Failed,
            }
        }
        let Some((layer, leftover)) = self.layer.take() else { return Step::Failed };
        match stream.set_layer(layer, &leftover) {
            Ok(()) => Step::Done,
            Err(pending) => {
                self.layer = Some((pending.0, leftover));
                Step::Waits
            }
        }
    }
}

struct TlsLayer {
    session: Session,
    tls: Rc<Tls>,
    is_io: Rc<Cell<bool>>,
}

impl Layer for TlsLayer {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let from = out.len();
        self.session.seal(plain, out).map_err(|_| LayerError("seal"))?;
        let mut sealed = out.split_off(from);
        let what = if self.is_io.get() { Sealed::Io } else { Sealed::Admin };
        self.tls.meddle(what, Some(&mut self.session), &mut sealed);
        out.append(&mut sealed);
        Ok(())
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        let opened = self.session.open(wire, &mut |plain| match plain {
            tls::Plain::InPlace(range, _) => sink(Plain::InPlace(range)),
            tls::Plain::Copied(bytes) => sink(Plain::Copied(bytes)),
        });
        opened.map_err(|_| LayerError("open"))
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        self.session.close(out);
    }

    fn is_ended(&self) -> bool {
        self.session.is_peer_closed()
    }
}
