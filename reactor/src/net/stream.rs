//! The stream: a connected socket, its send queue and its received chunks.

// UNSAFETY: the send queue must be told truthfully whether a send is in flight.
#![expect(unsafe_code)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use iobuf::SgList;

use crate::core::Local;
use crate::error::{Busy, Errno, Full};
use crate::fd::{Fd, Socket};
use crate::net::layer::{Layer, LayerError, Placed, Plain};
use crate::net::tx::Tx;
use crate::ops::{Event, OpId, Request};
use crate::port::Port;
use crate::ready::Ready;
use crate::rx::{RxChunk, RxPool};

/// Sizes of one stream. Build it with `..StreamConfig::default()`.
pub struct StreamConfig {
    /// PDUs that may wait or be in flight at once, tokens not yet taken included.
    pub tx_entries_max: usize,
    /// Bytes that one `sendmsg` takes, unless a single PDU is longer. 128 KiB lets large PDUs go
    /// one by one, which measured best, and small ones up to 32 together.
    pub tx_batch_bytes: usize,
    /// Record layer; `None` sends and receives as is.
    pub layer: Option<Box<dyn Layer>>,
}

impl Default for StreamConfig {
    fn default() -> Self {
        StreamConfig { tx_entries_max: 256, tx_batch_bytes: 128 << 10, layer: None }
    }
}

impl fmt::Debug for StreamConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamConfig")
            .field("tx_entries_max", &self.tx_entries_max)
            .field("tx_batch_bytes", &self.tx_batch_bytes)
            .field("layer", &self.layer.is_some())
            .finish()
    }
}

/// What [`Stream::recv`] found.
#[derive(Debug)]
pub enum Rx {
    /// Nothing yet.
    Empty,
    /// Received bytes.
    Data(RxChunk),
    /// The peer closed its side; nothing more will come. Sending may go on. Whether it did so in order
    /// where there is a record layer, [`Stream::is_ended_in_layer`] says.
    Eof,
    /// The connection failed.
    Failed(Errno),
}

/// The layer given to [`Stream::set_layer`], given back since something is being sent.
pub struct SendPending(pub Box<dyn Layer>);

impl fmt::Debug for SendPending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendPending").finish_non_exhaustive()
    }
}

/// The receiving side. Who moves it on stands behind each state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RxState {
    /// Not receiving: `resume`, or `poll` if it should be receiving.
    Off,
    /// Receiving: the peer, an error, or `pause`.
    On(OpId),
    /// Being cancelled: the kernel.
    Stopping,
    /// The peer has finished, or the connection failed: nobody.
    Ended,
}

/// The sending side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TxState {
    /// No message is prepared: `flush`.
    Idle,
    /// A message is prepared, but the core had no slot: `poll` tries again.
    Waiting,
    /// A send is with the kernel.
    Flying(OpId),
}

/// What a layer opened, in order.
enum Opened {
    InPlace(Range<usize>),
    Copied(RxChunk),
}

/// A connected stream socket with a coalescing send queue.
///
/// The owner calls, each turn: [`poll`](Stream::poll), [`recv`](Stream::recv) until empty,
/// [`push`](Stream::push) for each PDU, [`flush`](Stream::flush) once, [`sent`](Stream::sent) until
/// none. `flush` sends at once what the socket takes; the ring waits with the rest. Exactly one
/// message is in flight; whatever is pushed meanwhile goes with the next, which `poll` starts when
/// the first is done.
///
/// Dropping a stream is safe at any time, but a send may still be in the kernel then, and read its
/// payload later. Whoever needs to know calls [`shutdown`](Stream::shutdown), and drops it when it
/// [`is_quiet`](Stream::is_quiet).
pub struct Stream {
    port: Port,
    fd: Fd,
    peer: String,
    layer: Option<Box<dyn Layer>>,
    tx: Rc<Tx>,
    send: TxState,
    rx: RxState,
    rx_wanted: bool,
    rx_chunks: VecDeque<RxChunk>,
    /// Received bytes that the layer has not opened: it does so when they are asked for, record by
    /// record, so that each is used while it is in the cache, or opened to where it belongs.
    rx_wire: VecDeque<RxChunk>,
    rx_eof: bool,
    /// A spare buffer of this stream is out.
    rx_lent: Rc<Cell<bool>>,
    /// Reused by each opening of received bytes.
    rx_opened: Vec<Opened>,
    failed: Option<Errno>,
    closing: bool,
}

impl Stream {
    /// Takes over a connected socket and starts to receive. Switches Nagle's delay off.
    pub fn new(local: &Local, socket: Socket, config: StreamConfig) -> io::Result<Stream> {
        if socket.is_simulated() != local.0.is_simulated() {
            let text = "a simulated socket on a real core, or the reverse";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        socket.set_nodelay();
        let peer = socket.peer();
        let fd = socket.into_fd();
        let mut stream = Stream {
            port: local.port(),
            fd,
            peer,
            layer: config.layer,
            tx: Tx::new(config.tx_entries_max, config.tx_batch_bytes)?,
            send: TxState::Idle,
            rx: RxState::Off,
            rx_wanted: true,
            rx_chunks: VecDeque::with_capacity(16),
            rx_wire: VecDeque::new(),
            rx_eof: false,
            rx_lent: Rc::new(Cell::new(false)),
            rx_opened: Vec::new(),
            failed: None,
            closing: false,
        };
        stream.start_recv();
        Ok(stream)
    }

    /// The next received bytes. Data that arrived before a failure or the end comes first.
    pub fn recv(&mut self) -> Rx {
        if self.rx_chunks.is_empty() && self.rx_wire.is_empty() {
            self.poll();
        }
        loop {
            if let Some(chunk) = self.rx_chunks.pop_front() {
                return Rx::Data(chunk);
            }
            if !self.open_next() {
                break;
            }
        }
        match self.failed {
            Some(errno) => Rx::Failed(errno),
            None if self.rx_eof => Rx::Eof,
            None => Rx::Empty,
        }
    }

    /// Has the layer open received bytes straight into up to `len` bytes of `to` from `offset`, which
    /// is where the next bytes of the stream belong. Returns how many are there; 0 where there is no
    /// layer, or what has come is not for that alone: [`recv`](Stream::recv) has it, or more of it.
    ///
    /// More bytes of the range may be overwritten, by anything: who reads them before they were counted
    /// reads what anybody may have sent.
    ///
    /// # Panics
    ///
    /// If the range is not inside the list: a mistake of the caller, never of a peer.
    pub fn recv_to(&mut self, to: &SgList, offset: usize, len: usize) -> usize {
        let inside = offset.checked_add(len).is_some_and(|end| end <= to.len());
        assert!(inside, "{len} bytes to {offset} of a list of {}", to.len());
        let Some(layer) = &mut self.layer else { return 0 };
        if !self.rx_chunks.is_empty() {
            return 0;
        }
        let mut sum = 0;
        while sum < len
            && let Some(wire) = self.rx_wire.front_mut()
        {
            let Ok(Placed { taken, placed }) = layer.open_to(wire, to, offset + sum, len - sum)
            else {
                self.refuse();
                break;
            };
            wire.advance(taken);
            sum += placed;
            if !wire.is_empty() {
                break;
            }
            self.rx_wire.pop_front();
        }
        sum
    }

    /// Puts a record layer on a stream that has been sent and received as is so far, as a handshake
    /// does that came to its end. `leftover` are bytes that the owner took from [`Stream::recv`] and
    /// that are the layer's; what has arrived and was not taken yet goes through it, too.
    ///
    /// [`SendPending`] while something is being sent, which has to leave as it is: call it again when
    /// [`Stream::is_sending`] says no.
    ///
    /// # Panics
    ///
    /// If the stream has a layer already.
    pub fn set_layer(&mut self, layer: Box<dyn Layer>, leftover: &[u8]) -> Result<(), SendPending> {
        assert!(self.layer.is_none(), "a stream has one record layer at most");
        if self.is_sending() {
            return Err(SendPending(layer));
        }
        self.layer = Some(layer);
        let waiting = std::mem::take(&mut self.rx_chunks);
        let mut left = leftover;
        while !left.is_empty() {
            let (copy, len) = self.port.shared().rx.spare().copy_of(left);
            left = &left[len..];
            self.on_chunk(copy);
        }
        for chunk in waiting {
            self.on_chunk(chunk);
        }
        Ok(())
    }

    /// Stops receiving (back-pressure). What has arrived already still comes out of
    /// [`Stream::recv`]: take it, as it sits in buffers that other streams need.
    pub fn pause(&mut self) {
        self.rx_wanted = false;
        self.stop_recv();
    }

    /// Receives again.
    pub fn resume(&mut self) {
        self.rx_wanted = !self.closing;
        self.start_recv();
    }

    /// Queues one PDU: `head` (at most [`HEAD_BYTES_MAX`](crate::net::HEAD_BYTES_MAX)) and `tail`
    /// are copied, the payload (`len` bytes of a list from `offset`) is sent from where it is.
    /// `token` comes back from [`Stream::sent`] when its memory is no longer needed.
    ///
    /// [`Full`] if there is no [`room`](Stream::room), or the stream has failed or is shut down.
    ///
    /// # Panics
    ///
    /// If the head is too long, or the payload range is not inside the list: a mistake of the
    /// caller, never of a peer.
    pub fn push(
        &mut self,
        head: &[u8],
        payload: Option<(&SgList, usize, usize)>,
        tail: Option<[u8; 4]>,
        token: Option<u32>,
    ) -> Result<(), Full> {
        if self.closing || self.failed.is_some() {
            return Err(Full);
        }
        self.tx.push(head, payload, tail, token)
    }

    /// PDUs that can still be pushed.
    pub fn room(&self) -> usize {
        if self.closing || self.failed.is_some() { 0 } else { self.tx.room() }
    }

    /// Sends what is queued, if nothing is in flight: as much as the socket takes now, so that tokens
    /// may be there to be taken from [`Stream::sent`] when this returns. The connection may turn out
    /// to have [`failed`](Stream::failed).
    pub fn flush(&mut self) {
        if self.closing || self.failed.is_some() {
            return;
        }
        match self.send {
            TxState::Idle => self.start_send(true),
            TxState::Waiting => self.submit_send(),
            TxState::Flying(_) => {}
        }
    }

    /// Acts on recorded completions. `true` if there were any.
    pub fn poll(&mut self) -> bool {
        let mut progressed = false;
        while let Some(event) = self.port.next_event() {
            progressed = true;
            match event {
                Event::Chunk(chunk) => self.on_chunk(chunk),
                Event::RecvEnd(result) => self.on_recv_end(result),
                Event::Sent(result) => self.on_sent(result),
                // Not started by streams.
                Event::Done(_) | Event::Signal { .. } => {}
            }
        }
        if self.rx == RxState::Off && self.rx_wanted {
            self.start_recv();
        }
        if self.send == TxState::Waiting {
            self.flush();
        }
        progressed
    }

    /// Marks `index` in `ready` whenever the kernel has something for this stream, and now. An owner
    /// of many streams then looks at those that are marked, and at those that
    /// [`want`](Stream::wants_turn) it.
    pub fn mark_in(&mut self, ready: &Rc<Ready>, index: u32) {
        ready.mark(index);
        self.port.note_in(Rc::clone(ready), index);
    }

    /// Whether [`poll`](Stream::poll) or [`recv`](Stream::recv) has something to do although the
    /// kernel says nothing new: bytes, an end or tokens that were not taken, or an operation that the
    /// core had no slot for.
    pub fn wants_turn(&self) -> bool {
        let is_over = self.closing || self.failed.is_some();
        self.port.has_event()
            || !self.rx_chunks.is_empty()
            || !self.rx_wire.is_empty()
            || !self.closing && (self.rx_eof || self.failed.is_some())
            || !is_over && self.rx == RxState::Off && self.rx_wanted
            || !is_over && self.send == TxState::Waiting
            || self.tx.has_sent()
    }

    /// The next token whose PDU is sent, in the order of the pushes, or will never be, after a
    /// failure or shutdown.
    pub fn sent(&mut self) -> Option<u32> {
        self.tx.pop_sent()
    }

    /// Bytes or PDUs wait to be sent, or are being sent.
    pub fn is_sending(&self) -> bool {
        self.send != TxState::Idle || !self.tx.is_idle()
    }

    /// Why the connection failed, if it did.
    pub fn failed(&self) -> Option<Errno> {
        self.failed
    }

    /// Whether the peer has said inside the record layer that nothing follows. A stream with a layer
    /// that is at its [end](Rx::Eof) without it was cut off by somebody on the way, or by a peer that
    /// does not care.
    pub fn is_ended_in_layer(&self) -> bool {
        self.layer.as_ref().is_some_and(|layer| layer.is_ended())
    }

    /// As [`Socket::set_reset_on_close`], from now on: whoever ends in order lets the peer have the
    /// last bytes, also those that are lost on the way and sent again.
    pub fn set_reset_on_close(&self, resets: bool) -> io::Result<()> {
        self.fd.set_reset_on_close(resets)
    }

    /// Stops sending and receiving, and forgets what was received. Tokens still come back through
    /// [`Stream::sent`] as the kernel lets go; call [`Stream::poll`] until [`Stream::is_quiet`].
    ///
    /// What the record layer has to say at the end is sent yet, unless something else is being sent;
    /// a peer that does not take it holds the stream until this is called again.
    pub fn shutdown(&mut self) {
        let is_waiting = self.failed.is_none() && self.say_last(Layer::close);
        self.closing = true;
        self.rx_wanted = false;
        self.rx_chunks.clear();
        self.rx_wire.clear();
        self.stop_recv();
        if is_waiting {
            self.tx.abandon_waiting();
        } else {
            self.stop_send();
        }
    }

    /// Shut down or failed, and nothing is in flight: no byte of any payload will be touched after
    /// this. Bytes that the kernel has copied may still reach the peer, even after the stream is
    /// dropped, unless [`Socket::set_reset_on_close`] was called.
    pub fn is_quiet(&self) -> bool {
        let is_over = self.closing || self.failed.is_some();
        is_over && self.send == TxState::Idle && self.port.in_flight() == 0
    }

    /// The address of the peer, as text.
    pub fn peer(&self) -> String {
        self.peer.clone()
    }

    fn start_recv(&mut self) {
        if self.rx != RxState::Off || self.failed.is_some() || self.closing {
            return;
        }
        let request = Request::Recv { lent: Rc::clone(&self.rx_lent), spare: None };
        // Busy: `poll` tries again.
        if let Ok(op) = self.port.start_fd(request, &self.fd, 0) {
            self.rx = RxState::On(op);
        }
    }

    fn stop_recv(&mut self) {
        if let RxState::On(op) = self.rx {
            self.rx = RxState::Stopping;
            self.port.cancel(op);
        }
    }

    fn on_chunk(&mut self, chunk: RxChunk) {
        if self.closing {
            return;
        }
        if self.layer.is_none() {
            self.rx_chunks.push_back(chunk);
        } else if self.failed.is_none() && !self.rx_eof {
            // Otherwise the layer may be what failed, or has said that nothing follows.
            self.rx_wire.push_back(chunk);
        }
    }

    /// Opens the next record of the received bytes; `false`: there is none.
    fn open_next(&mut self) -> bool {
        let (Some(layer), Some(wire)) = (&mut self.layer, self.rx_wire.front_mut()) else {
            return false;
        };
        let len = layer.first_len(wire);
        let part =
            if len < wire.len() { Some(wire.split_to(len)) } else { self.rx_wire.pop_front() };
        let Some(part) = part else { return false };
        let pool = &self.port.shared().rx;
        let opened = open(&mut **layer, part, pool, &mut self.rx_opened, &mut self.rx_chunks);
        if opened.is_err() {
            self.refuse();
        } else if layer.is_ended() && !self.rx_eof {
            self.rx_wire.clear();
            self.rx_eof = true;
            self.pause();
        }
        true
    }

    /// The layer has refused what was received.
    fn refuse(&mut self) {
        self.rx_wire.clear();
        self.stop_recv();
        if self.failed.is_none() {
            self.fail(Errno::BAD_MESSAGE);
            self.say_last(Layer::farewell);
        }
    }

    /// Sends the last that the layer has to say, if there is something and nothing is under way that
    /// it would have to wait for. `true`: the ring waits for room for it.
    fn say_last(&mut self, words: fn(&mut (dyn Layer + 'static), &mut Vec<u8>)) -> bool {
        let Some(layer) = &mut self.layer else { return false };
        if self.send != TxState::Idle || self.closing {
            return false;
        }
        // SAFETY: no send is in flight: `send` is `Idle`.
        if unsafe { self.tx.prepare_last(&mut |out| words(&mut **layer, out)) } {
            match self.port.send_now(&self.tx, &self.fd) {
                // SAFETY: as above; what was sent here is over.
                Ok(bytes) if unsafe { self.tx.on_sent(bytes, true) } => return false,
                Ok(_) | Err(Errno(libc::EINTR | libc::EAGAIN)) => {}
                Err(_) => return false,
            }
            // Not tried again where the core has no slot: the connection is lost anyway.
            let request = Request::Send(Rc::clone(&self.tx));
            if let Ok(op) = self.port.start_fd(request, &self.fd, 0) {
                self.send = TxState::Flying(op);
                return true;
            }
        }
        false
    }

    fn on_recv_end(&mut self, result: Result<(), Errno>) {
        self.rx = RxState::Ended;
        match result {
            Ok(()) => self.rx_eof = true,
            Err(Errno::CANCELED) => self.rx = RxState::Off,
            Err(errno) => self.fail(errno),
        }
    }

    /// Sends what waits, message by message, until the socket takes no more.
    fn start_send(&mut self, is_first: bool) {
        let mut is_first = is_first;
        loop {
            let layer = self.layer.as_deref_mut().map(|layer| layer as &mut dyn Layer);
            // SAFETY: no send is in flight: all callers know that `send` is `Idle`, and what is sent
            // here is over when the call returns.
            match unsafe { self.tx.prepare(layer, is_first) } {
                Ok(true) => {}
                Ok(false) => return,
                Err(LayerError(_)) => {
                    self.fail(Errno::BAD_MESSAGE);
                    self.say_last(Layer::farewell);
                    return;
                }
            }
            is_first = false;
            match self.port.send_now(&self.tx, &self.fd) {
                // SAFETY: as above.
                Ok(bytes) if unsafe { self.tx.on_sent(bytes, self.layer.is_some()) } => {}
                Ok(_) | Err(Errno(libc::EINTR | libc::EAGAIN)) => return self.submit_send(),
                Err(errno) => return self.fail(errno),
            }
        }
    }

    /// Has the ring send what is left of the prepared message.
    fn submit_send(&mut self) {
        let request = Request::Send(Rc::clone(&self.tx));
        self.send = match self.port.start_fd(request, &self.fd, 0) {
            Ok(op) => TxState::Flying(op),
            Err(Busy) => TxState::Waiting,
        };
    }

    fn on_sent(&mut self, result: Result<usize, Errno>) {
        self.send = TxState::Idle;
        let result = match result {
            Ok(0) => Err(Errno(libc::EPIPE)),
            // SAFETY: the completion of the only send has just arrived.
            Ok(bytes) => Ok(unsafe { self.tx.on_sent(bytes, self.layer.is_some()) }),
            Err(Errno(libc::EINTR | libc::EAGAIN)) => Ok(false),
            Err(errno) => Err(errno),
        };
        if self.closing || self.failed.is_some() {
            self.tx.abandon();
            return;
        }
        match result {
            Ok(true) => self.start_send(false),
            Ok(false) => self.submit_send(),
            Err(errno) => self.fail(errno),
        }
    }

    fn stop_send(&mut self) {
        if let TxState::Flying(op) = self.send {
            self.tx.abandon_waiting();
            self.port.cancel(op);
        } else {
            self.send = TxState::Idle;
            self.tx.abandon();
        }
    }

    /// The connection is lost. The receiving side goes on until it ends by itself or by `shutdown`:
    /// the peer's last words may say why.
    fn fail(&mut self, errno: Errno) {
        if self.closing || self.failed.is_some() {
            return;
        }
        self.failed = Some(errno);
        if errno == Errno::BAD_MESSAGE {
            self.rx_wire.clear(); // the layer has failed, and is not called again
        }
        self.stop_send();
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("peer", &self.peer)
            .field("rx", &self.rx)
            .field("sending", &self.is_sending())
            .field("failed", &self.failed)
            .field("closing", &self.closing)
            .finish_non_exhaustive()
    }
}

/// Passes received bytes through the layer; plaintext goes to `into`.
fn open(
    layer: &mut dyn Layer,
    mut chunk: RxChunk,
    pool: &Rc<RxPool>,
    opened: &mut Vec<Opened>,
    into: &mut VecDeque<RxChunk>,
) -> Result<(), LayerError> {
    opened.clear();
    layer.open(&mut chunk, &mut |plain| match plain {
        Plain::InPlace(range) => opened.push(Opened::InPlace(range)),
        Plain::Copied(mut bytes) => {
            while !bytes.is_empty() {
                let (copy, len) = pool.spare().copy_of(bytes);
                opened.push(Opened::Copied(copy));
                bytes = &bytes[len..];
            }
        }
    })?;
    let mut consumed = 0;
    for piece in opened.drain(..) {
        match piece {
            Opened::Copied(copy) => into.push_back(copy),
            Opened::InPlace(range) => {
                let part = chunk.cut(range, &mut consumed);
                let part = part.ok_or(LayerError("plaintext outside of the received bytes"))?;
                if !part.is_empty() {
                    into.push_back(part);
                }
            }
        }
    }
    Ok(())
}
