//! The bare request/response loop: the yardstick of the target benchmark.
//!
//! It answers requests of the sizes that NVMe/TCP has on the wire (72-byte command capsules with or
//! without payload; 24-byte data headers with payload, or 24-byte responses) and does nothing else:
//! no validation, no queues, no backend. It receives without blocking, copies each payload once
//! (which a target must, to take it out of the receive buffer) and coalesces its sends, so that it is
//! what the sockets of this machine allow to one core.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

/// Length of a command capsule's header: common header (8) and submission queue entry (64).
pub const CAPSULE_BYTES: usize = 72;
/// Length of a C2HData header, and of a response capsule.
pub const RESPONSE_BYTES: usize = 24;

/// Bytes handed to one send call at most; larger batches were measured to be slower.
const SEND_BATCH_BYTES: usize = 128 * 1024;
const RECEIVE_BYTES: usize = 256 * 1024;
/// Payload buffers in use in turn, so that the copies stay within the cache as a pool's do.
const PAYLOAD_BUFFERS: usize = 8;

/// Serves `stream` until the peer closes it or `stop` is set. Writes (opcode 01h) carry
/// `block_bytes` of payload behind the capsule; reads (02h) are answered with as many.
///
/// # Errors
/// Socket errors other than the peer's going away.
pub fn serve(stream: TcpStream, block_bytes: usize, stop: &AtomicBool) -> io::Result<()> {
    serve_all(vec![stream], block_bytes, stop)
}

/// The same for many streams, which are asked one after the other: with all of them busy that
/// measured better than having the kernel tell which have something. Ends with the last of them.
///
/// # Errors
/// As for [`serve`].
pub fn serve_all(streams: Vec<TcpStream>, block_bytes: usize, stop: &AtomicBool) -> io::Result<()> {
    let mut lanes = Vec::with_capacity(streams.len());
    for stream in streams {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let out = Outgoing { block_bytes, ..Outgoing::default() };
        let parser = Parser { block_bytes, ..Parser::default() };
        lanes.push(Lane { stream, out, parser });
    }
    let mut input = vec![0u8; RECEIVE_BYTES];
    let payloads: Vec<Vec<u8>> = (0..PAYLOAD_BUFFERS).map(|i| vec![i as u8; block_bytes]).collect();
    let mut sink = vec![0u8; block_bytes * PAYLOAD_BUFFERS];
    while !lanes.is_empty() && !stop.load(Ordering::Relaxed) {
        let mut at = 0;
        while let Some(lane) = lanes.get_mut(at) {
            if lane.turn(&mut input, &mut sink, &payloads)? {
                at += 1;
            } else {
                lanes.swap_remove(at);
            }
        }
    }
    Ok(())
}

/// One connection.
struct Lane {
    stream: TcpStream,
    out: Outgoing,
    parser: Parser,
}

impl Lane {
    /// Takes what has come and answers it; `false`: the peer has gone.
    fn turn(
        &mut self,
        input: &mut [u8],
        sink: &mut [u8],
        payloads: &[Vec<u8>],
    ) -> io::Result<bool> {
        let Lane { stream, out, parser } = self;
        match stream.read(input) {
            Ok(0) => return Ok(false),
            Ok(n) => parser.feed(&input[..n], sink, |opcode, cid| out.queue(opcode, cid)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(e) => return Err(e),
        }
        out.flush(stream, payloads)?;
        Ok(true)
    }
}

/// Cuts the stream into requests; all state is a partial header and the payload still to come.
#[derive(Default)]
struct Parser {
    block_bytes: usize,
    partial: Vec<u8>,
    payload_left: usize,
    current: (u8, u16),
    buffer: usize,
}

impl Parser {
    fn feed(&mut self, mut bytes: &[u8], sink: &mut [u8], mut done: impl FnMut(u8, u16)) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let n = self.payload_left.min(bytes.len());
                let at = self.buffer * self.block_bytes + self.block_bytes - self.payload_left;
                sink[at..at + n].copy_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                self.payload_left -= n;
                if self.payload_left == 0 {
                    self.buffer = (self.buffer + 1) % PAYLOAD_BUFFERS;
                    done(self.current.0, self.current.1);
                }
                continue;
            }
            let head: [u8; 12] = if self.partial.is_empty() && bytes.len() >= CAPSULE_BYTES {
                let (head, rest) = bytes.split_at(CAPSULE_BYTES);
                bytes = rest;
                head[..12].try_into().expect("12 bytes of 72")
            } else {
                let n = (CAPSULE_BYTES - self.partial.len()).min(bytes.len());
                self.partial.extend_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                if self.partial.len() < CAPSULE_BYTES {
                    return;
                }
                let head = self.partial[..12].try_into().expect("12 bytes of 72");
                self.partial.clear();
                head
            };
            let (opcode, cid) = (head[8], u16::from_le_bytes([head[10], head[11]]));
            if opcode == 1 {
                self.current = (opcode, cid);
                self.payload_left = self.block_bytes;
            } else {
                done(opcode, cid);
            }
        }
    }
}

/// Responses that wait to be sent, and how much of the first is sent already.
#[derive(Default)]
struct Outgoing {
    heads: std::collections::VecDeque<([u8; RESPONSE_BYTES], bool)>,
    sent_of_first: usize,
    buffer: usize,
    block_bytes: usize,
}

impl Outgoing {
    fn queue(&mut self, opcode: u8, cid: u16) {
        let mut head = [0u8; RESPONSE_BYTES];
        // Only what the load generator looks at: type, flags (LAST and SUCCESS), lengths, and the
        // command's identifier.
        let (kind, flags, payload, cid_at) =
            if opcode == 2 { (7, 0x0c, self.block_bytes, 8) } else { (5, 0, 0, 20) };
        head[..4].copy_from_slice(&[kind, flags, RESPONSE_BYTES as u8, RESPONSE_BYTES as u8]);
        head[4..8].copy_from_slice(&((RESPONSE_BYTES + payload) as u32).to_le_bytes());
        head[cid_at..cid_at + 2].copy_from_slice(&cid.to_le_bytes());
        if payload > 0 {
            head[16..20].copy_from_slice(&(payload as u32).to_le_bytes());
        }
        self.heads.push_back((head, opcode == 2));
    }

    fn flush(&mut self, stream: &mut TcpStream, payloads: &[Vec<u8>]) -> io::Result<()> {
        while !self.heads.is_empty() {
            let mut slices = [IoSlice::new(&[]); 256];
            let (mut count, mut total, mut skip) = (0, 0, self.sent_of_first);
            for (i, (head, with_payload)) in self.heads.iter().enumerate() {
                if count + 2 > slices.len() || (i > 0 && total >= SEND_BATCH_BYTES) {
                    break;
                }
                let payload: &[u8] = if *with_payload {
                    &payloads[(self.buffer + i) % PAYLOAD_BUFFERS]
                } else {
                    &[]
                };
                for part in [&head[..], payload] {
                    let part = &part[skip.min(part.len())..];
                    skip = if part.is_empty() { skip.saturating_sub(RESPONSE_BYTES) } else { 0 };
                    if !part.is_empty() {
                        slices[count] = IoSlice::new(part);
                        count += 1;
                        total += part.len();
                    }
                }
            }
            match stream.write_vectored(&slices[..count]) {
                Ok(n) => self.advance(n, payloads),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn advance(&mut self, mut n: usize, payloads: &[Vec<u8>]) {
        n += self.sent_of_first;
        while let Some((_, with_payload)) = self.heads.front() {
            let size = RESPONSE_BYTES + if *with_payload { payloads[0].len() } else { 0 };
            if n < size {
                break;
            }
            n -= size;
            self.heads.pop_front();
            self.buffer = (self.buffer + 1) % PAYLOAD_BUFFERS;
        }
        self.sent_of_first = n;
    }
}
