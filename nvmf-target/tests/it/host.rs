//! A host that sends what it is told to: one queue per connection, no opinion of its own.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use crypto::psk::Psk;
use crypto::tls::{self, Counters, KeyUpdates, Progress as Step, Session};
use iobuf::SgList;
use nvme::spec::{Cqe, Sqe};
use nvme::tcp::{self, HostEvent, Transfer};
use reactor::net::{Gather, HEAD_BYTES_MAX, Layer, LayerError, Plain, Rx, Stream, StreamConfig};
use reactor::{Core, CoreHandle, Local, Progress, Socket, Task};

/// Commands that one queue has outstanding at most.
pub(crate) const DEPTH: u16 = 32;

/// What TLS makes of what a host sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Messages of the handshake.
    Handshake,
    /// What follows it.
    Records,
}

/// Somebody on the way who changes the bytes that a host sends; something has to be left of them.
pub(crate) type Meddler = Rc<RefCell<dyn FnMut(Sent, &mut Vec<u8>)>>;

/// The data that goes with a command.
#[derive(Clone, Debug)]
pub(crate) enum Data {
    None,
    /// Sent in the capsule.
    Capsule(Vec<u8>),
    /// Sent when the controller asks for it.
    Fetched(Vec<u8>),
    /// So many bytes are received.
    Reply(usize),
}

/// A command that is over.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub(crate) cqe: Cqe,
    pub(crate) reply: Vec<u8>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Sqe, Data)>,
    done: BTreeMap<u64, Done>,
    next: u64,
    outstanding: usize,
    cut: bool,
    is_over: bool,
    /// Nothing is received.
    is_deaf: bool,
    /// A termination by the controller is no surprise; its status, once it is there.
    fault: Option<Option<u16>>,
    /// Why TLS came to nothing.
    refused: Option<String>,
    /// What TLS is to do, and what it did.
    control: Rc<Control>,
}

/// The record layer of a queue, from the test's side.
#[derive(Default)]
struct Control {
    /// Before the next data, take new keys on both ends.
    is_update_due: Cell<bool>,
    /// With the next data, say that nothing follows.
    is_close_due: Cell<bool>,
    counters: Cell<Counters>,
    /// The controller has said that nothing follows.
    is_peer_closed: Cell<bool>,
}

/// A queue, from the test's side.
#[derive(Clone)]
pub(crate) struct Queue {
    state: Rc<RefCell<State>>,
    core: CoreHandle,
}

impl Queue {
    /// Opens a connection, with TLS if there is a key; its first command is to be Connect.
    pub(crate) fn open_as(
        core: &mut Core,
        socket: Socket,
        psk: Option<&Psk>,
        meddler: Option<Meddler>,
    ) -> Queue {
        let local = core.local();
        // Each of the commands may be asked for all of its data in the smallest pieces.
        let config = StreamConfig { tx_entries_max: 8192, ..StreamConfig::default() };
        let stream = Stream::new(&local, socket, config).expect("a stream");
        let state = Rc::new(RefCell::new(State::default()));
        let machine =
            tcp::Host::new(tcp::HostConfig { queue_depth: DEPTH, ..tcp::HostConfig::default() });
        let mut driver = Driver {
            stream,
            machine,
            local,
            state: Rc::clone(&state),
            is_deaf: false,
            meddler,
            shaking: psk.map(|psk| Shaking::new(tls::Client::new(psk).expect("a sound key"))),
            commands: (0..DEPTH).map(|_| None).collect(),
        };
        if driver.shaking.is_none() {
            driver.begin();
        }
        core.spawn(Box::new(driver));
        Queue { state, core: core.handle() }
    }

    /// Sends a command as soon as there is a free identifier; returns what it is known by.
    pub(crate) fn send(&self, sqe: Sqe, data: Data) -> u64 {
        let mut state = self.state.borrow_mut();
        let id = state.next;
        state.next += 1;
        state.waiting.push_back((id, sqe, data));
        self.core.wake();
        id
    }

    /// The outcome of a command, once.
    pub(crate) fn take(&self, id: u64) -> Option<Done> {
        self.state.borrow_mut().done.remove(&id)
    }

    pub(crate) fn is_done(&self, id: u64) -> bool {
        self.state.borrow().done.contains_key(&id)
    }

    /// Breaks the connection.
    pub(crate) fn cut(&self) {
        self.state.borrow_mut().cut = true;
        self.core.wake();
    }

    /// Stops receiving, or goes on.
    pub(crate) fn set_deaf(&self, is_deaf: bool) {
        self.state.borrow_mut().is_deaf = is_deaf;
        self.core.wake();
    }

    /// The controller is going to terminate the connection.
    pub(crate) fn expect_fault(&self) {
        self.state.borrow_mut().fault = Some(None);
    }

    /// Fatal Error Status of an expected termination.
    pub(crate) fn fault(&self) -> Option<u16> {
        self.state.borrow().fault.flatten()
    }

    /// Why TLS came to nothing, as this end sees it.
    pub(crate) fn refused(&self) -> Option<String> {
        self.state.borrow().refused.clone()
    }

    /// Takes new keys with the next data and asks the controller for new ones.
    pub(crate) fn update_keys(&self) {
        self.state.borrow().control.is_update_due.set(true);
    }

    /// Says with the next data that nothing follows it, and leaves the connection as it is.
    pub(crate) fn say_close(&self) {
        self.state.borrow().control.is_close_due.set(true);
    }

    /// What TLS did until the last that came or went.
    pub(crate) fn tls_counters(&self) -> Counters {
        self.state.borrow().control.counters.get()
    }

    /// The controller has ended TLS in an orderly way.
    pub(crate) fn is_closed_in_order(&self) -> bool {
        self.state.borrow().control.is_peer_closed.get()
    }

    /// The connection has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.state.borrow().is_over
    }
}

struct Command {
    id: u64,
    data: SgList,
    reply: Vec<u8>,
}

struct Driver {
    stream: Stream,
    machine: tcp::Host,
    meddler: Option<Meddler>,
    /// A TLS handshake that has not ended.
    shaking: Option<Shaking>,
    local: Local,
    state: Rc<RefCell<State>>,
    is_deaf: bool,
    commands: Vec<Option<Command>>,
}

struct Shaking {
    client: Option<tls::Client>,
    /// Waits for the last message to leave.
    layer: Option<(Box<dyn Layer>, Vec<u8>)>,
}

impl Shaking {
    fn new(client: tls::Client) -> Shaking {
        Shaking { client: Some(client), layer: None }
    }
}

struct TlsLayer(Session, Option<Meddler>, Rc<Control>);

impl Layer for TlsLayer {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let from = out.len();
        if self.2.is_update_due.replace(false) {
            self.0.update_key(true, out);
        }
        self.0.seal(plain, out).map_err(|_| LayerError("seal"))?;
        if let Some(meddler) = &self.1 {
            let mut sealed = out.split_off(from);
            meddler.borrow_mut()(Sent::Records, &mut sealed);
            out.append(&mut sealed);
        }
        if self.2.is_close_due.replace(false) {
            self.0.close(out);
        }
        self.2.counters.set(self.0.counters());
        Ok(())
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        let opened = self.0.open(wire, &mut |plain| match plain {
            tls::Plain::InPlace(range, _) => sink(Plain::InPlace(range)),
            tls::Plain::Copied(bytes) => sink(Plain::Copied(bytes)),
        });
        self.2.counters.set(self.0.counters());
        self.2.is_peer_closed.set(self.0.is_peer_closed());
        opened.map_err(|_| LayerError("open"))
    }
}

impl Driver {
    fn begin(&mut self) {
        let hello = self.machine.icreq();
        self.stream.push(hello.as_ref(), None, None, None).expect("room for the first PDU");
        self.stream.flush();
    }

    /// Goes on with TLS; `true` when that is over.
    fn shake(&mut self) -> bool {
        let Some(shaking) = &mut self.shaking else { return true };
        if let Some(mut client) = shaking.client.take() {
            let mut step = Ok(Step::Running);
            if let Rx::Data(chunk) = self.stream.recv() {
                step = client.feed(&chunk);
            } else if self.stream.failed().is_some() || matches!(self.stream.recv(), Rx::Eof) {
                self.state.borrow_mut().cut = true;
            }
            let mut flight = client.take();
            if let (Some(meddler), false) = (&self.meddler, flight.is_empty()) {
                meddler.borrow_mut()(Sent::Handshake, &mut flight);
            }
            for part in flight.chunks(HEAD_BYTES_MAX) {
                self.stream.push(part, None, None, None).expect("room for the handshake");
            }
            self.stream.flush();
            match step {
                Ok(Step::Running) => shaking.client = Some(client),
                Ok(Step::Done) => {
                    let mut established = client.finish().expect("it is done");
                    let leftover = std::mem::take(&mut established.leftover);
                    let control = Rc::clone(&self.state.borrow().control);
                    let session = Session::new(&established, KeyUpdates::Never);
                    shaking.layer = Some((
                        Box::new(TlsLayer(session, self.meddler.clone(), control)),
                        leftover,
                    ));
                }
                Err(failure) => {
                    let mut state = self.state.borrow_mut();
                    (state.refused, state.cut) = (Some(failure.to_string()), true);
                }
            }
        }
        if let Some((layer, leftover)) = shaking.layer.take() {
            match self.stream.set_layer(layer, &leftover) {
                Ok(()) => {
                    self.shaking = None;
                    self.begin();
                    return true;
                }
                Err(pending) => shaking.layer = Some((pending.0, leftover)),
            }
        }
        false
    }

    fn start(&mut self, cid: u16, id: u64, sqe: &Sqe, data: Data) {
        let mut command = Command { id, data: SgList::default(), reply: Vec::new() };
        let mut fill = |bytes: &[u8]| {
            self.local.pool().alloc(bytes.len(), &mut command.data).expect("memory for a test");
            command.data.copy_from_slice(0, bytes).expect("as long as the bytes");
            bytes.len() as u32
        };
        let transfer = match data {
            Data::None => Transfer::None,
            Data::Capsule(bytes) => Transfer::Write { len: fill(&bytes), in_capsule: true },
            Data::Fetched(bytes) => Transfer::Write { len: fill(&bytes), in_capsule: false },
            Data::Reply(len) => {
                command.reply = vec![0; len];
                Transfer::Read { len: len as u32 }
            }
        };
        let head = self.machine.command(cid, &sqe.to_bytes(), transfer);
        let payload = match transfer {
            Transfer::Write { in_capsule: true, .. } => {
                Some((&command.data, 0, command.data.len()))
            }
            _ => None,
        };
        self.stream.push(head.as_ref(), payload, None, None).expect("room for a queue's PDUs");
        self.commands[cid as usize] = Some(command);
        self.state.borrow_mut().outstanding += 1;
    }

    fn on_event(&mut self, event: HostEvent<'_>) {
        let command = |commands: &mut Vec<Option<Command>>, cid: u16| {
            commands[cid as usize].take().expect("the machine knows its commands")
        };
        match event {
            HostEvent::Initialized => {}
            HostEvent::Data { cid, offset, bytes } => {
                let mut found = command(&mut self.commands, cid);
                found.reply[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
                self.commands[cid as usize] = Some(found);
            }
            HostEvent::R2t { cid, ttag, offset, len } => {
                let found = command(&mut self.commands, cid);
                let mut at = offset;
                while at < offset + len {
                    let part = (offset + len - at).min(self.machine.max_h2c_data());
                    let is_last = at + part == offset + len;
                    let head = self.machine.h2c_data(cid, ttag, at, part, is_last);
                    let payload = Some((&found.data, at as usize, part as usize));
                    self.stream.push(head.as_ref(), payload, None, None).expect("room");
                    at += part;
                }
                self.commands[cid as usize] = Some(found);
            }
            HostEvent::Complete { cid, cqe } => {
                let found = command(&mut self.commands, cid);
                let mut state = self.state.borrow_mut();
                state.outstanding -= 1;
                let done = Done { cqe: Cqe::from_bytes(&cqe), reply: found.reply };
                state.done.insert(found.id, done);
            }
            HostEvent::Terminated { fes } => {
                let mut state = self.state.borrow_mut();
                assert!(state.fault.is_some(), "the controller found a fault: {fes}");
                (state.fault, state.cut) = (Some(Some(fes)), true);
            }
        }
    }
}

impl Task for Driver {
    fn poll(&mut self, _now: Duration) -> Progress {
        if self.state.borrow().is_over {
            self.stream.poll();
            return if self.stream.is_quiet() { Progress::Done } else { Progress::Idle };
        }
        let mut worked = self.stream.poll();
        let is_deaf = self.state.borrow().is_deaf;
        if std::mem::replace(&mut self.is_deaf, is_deaf) != is_deaf {
            if is_deaf {
                self.stream.pause()
            } else {
                self.stream.resume()
            }
            worked = true;
        }
        let is_open = self.shake();
        loop {
            if self.is_deaf || !is_open {
                break;
            }
            match self.stream.recv() {
                Rx::Empty => break,
                Rx::Data(chunk) => {
                    worked = true;
                    let mut input: &[u8] = &chunk;
                    // The events borrow the input, the handler the driver: bytes are copied out.
                    while let Some(event) = self.machine.next(&mut input).expect("sound PDUs") {
                        let event = match event {
                            HostEvent::Data { cid, offset, bytes } => {
                                let bytes = bytes.to_vec();
                                self.on_event(HostEvent::Data { cid, offset, bytes: &bytes });
                                continue;
                            }
                            HostEvent::Initialized => HostEvent::Initialized,
                            HostEvent::R2t { cid, ttag, offset, len } => {
                                HostEvent::R2t { cid, ttag, offset, len }
                            }
                            HostEvent::Complete { cid, cqe } => HostEvent::Complete { cid, cqe },
                            HostEvent::Terminated { fes } => HostEvent::Terminated { fes },
                        };
                        self.on_event(event);
                    }
                }
                Rx::Eof | Rx::Failed(_) => self.state.borrow_mut().cut = true,
            }
            if self.state.borrow().cut {
                break;
            }
        }
        if self.state.borrow().cut {
            self.state.borrow_mut().is_over = true;
            self.stream.shutdown();
            return Progress::Worked;
        }
        while is_open && self.machine.is_initialized() {
            let free = (0..DEPTH).find(|cid| self.commands[*cid as usize].is_none());
            let Some(cid) = free else { break };
            let next = self.state.borrow_mut().waiting.pop_front();
            let Some((id, sqe, data)) = next else { break };
            self.start(cid, id, &sqe, data);
            worked = true;
        }
        self.stream.flush();
        while self.stream.sent().is_some() {}
        if worked { Progress::Worked } else { Progress::Idle }
    }
}
