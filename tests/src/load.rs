//! A load generator that speaks just enough NVMe/TCP to keep queues at a given depth.
//!
//! It shares no protocol code with the product, so that it is a second opinion on the wire format
//! (the TLS record layer and the CRC are the product's), and it is the same for the target under
//! test and for the [bare loop](crate::bare): it spins, sends all commands of a pass in one call and
//! copies what it receives once.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use crypto::tls::{RECORD_PLAIN_MAX, Session};
use nvme::tcp::Crc32c;

use crate::bare::{CAPSULE_BYTES, RESPONSE_BYTES};
use crate::link::{DIGEST_BYTES, Link, flags, protocol};

/// What to ask for.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Writes instead of reads.
    pub write: bool,
    /// Bytes per command, a multiple of 512.
    pub block_bytes: usize,
    /// Commands kept outstanding on each queue.
    pub depth: usize,
    /// Write payload travels behind the command; otherwise the peer asks for it by R2T.
    pub in_capsule: bool,
    /// Size of the namespace in bytes; offsets walk over it.
    pub span_bytes: u64,
    /// Bytes per logical block.
    pub lba_bytes: u64,
    /// Namespaces asked in turn, from 1 on.
    pub namespaces: u32,
    /// From burst to burst: the next commands are sent so much after the last ones, and all together.
    /// Zero: each is sent as soon as there is room for it.
    pub interval: Duration,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Commands completed per second.
    pub iops: f64,
    /// Median latency, from the command's send to its completion's parse, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the same.
    pub p99_us: f64,
}

/// Plaintext sealed into records at once: what stays in the cache between cipher and socket.
const SEAL_BATCH_BYTES: usize = 128 << 10;
/// The same for what leaves first of a large payload: what one buffer of the loopback socket holds.
const SEAL_FIRST_BYTES: usize = 64_000;
/// Pieces of one send.
const SLICES: usize = 256;

/// Runs `work` over each of `links` for `time` and measures.
///
/// # Errors
/// Socket errors; `InvalidData` for a failed command, a record or digest that is wrong, or a PDU that
/// makes no sense.
pub fn run(links: &mut [Link], work: &Workload, time: Duration) -> io::Result<Figures> {
    let payload: Vec<u8> = (0..work.block_bytes).map(|i| (i % 251) as u8).collect();
    let payload = Payload { digest: Crc32c::of(&payload), bytes: payload };
    let mut input = vec![0u8; 256 * 1024];
    let start = Instant::now();
    let mut lanes = Vec::with_capacity(links.len());
    for link in links {
        link.begin()?;
        lanes.push(Lane::new(link, work, start));
    }
    let mut tally = Tally { now: start, latencies: Vec::with_capacity(4 << 20), completed: 0 };
    let mut place = Place { slba: 0, nsid: 1 };
    let mut stopping = false;
    let mut next_burst = start;
    loop {
        let mut is_done = stopping;
        let mut received = false;
        let mut issues = !stopping;
        if issues && !work.interval.is_zero() {
            let now = Instant::now();
            issues = now >= next_burst && lanes.iter().all(|lane| lane.state.outstanding == 0);
            if issues {
                (tally.now, next_burst) = (now, now.max(next_burst + work.interval));
            }
        }
        for lane in &mut lanes {
            if issues {
                lane.issue(work, &mut place, tally.now);
            }
            lane.out.flush(lane.link, &payload)?;
            received |= lane.receive(&mut input, &mut tally)?;
            is_done &= lane.state.outstanding == 0;
        }
        if is_done {
            break;
        }
        if received {
            stopping |= tally.now - start >= time;
        } else {
            std::hint::spin_loop();
            if tally.now.elapsed() > Duration::from_secs(10) {
                let outstanding: usize = lanes.iter().map(|lane| lane.state.outstanding).sum();
                return Err(protocol(format!("no answer for 10 s, {outstanding} outstanding")));
            }
        }
    }
    let seconds = (tally.now - start).as_secs_f64();
    let latencies = &mut tally.latencies;
    latencies.sort_unstable();
    let at = |q: f64| f64::from(latencies[((latencies.len() - 1) as f64 * q) as usize]) / 1e3;
    Ok(Figures { iops: tally.completed as f64 / seconds, p50_us: at(0.5), p99_us: at(0.99) })
}

struct Payload {
    bytes: Vec<u8>,
    /// Of all of them.
    digest: [u8; DIGEST_BYTES],
}

struct Tally {
    now: Instant,
    latencies: Vec<u32>,
    completed: u64,
}

/// Where the next command goes.
struct Place {
    slba: u64,
    nsid: u32,
}

/// One queue.
struct Lane<'a> {
    link: &'a mut Link,
    out: Outgoing,
    incoming: Incoming,
    state: State,
}

struct State {
    block_bytes: usize,
    issued: Vec<Instant>,
    ready: Vec<u16>,
    r2ts: Vec<(u16, u16, u32, u32)>,
    outstanding: usize,
}

impl<'a> Lane<'a> {
    fn new(link: &'a mut Link, work: &Workload, now: Instant) -> Lane<'a> {
        let digests = link.digests;
        Lane {
            link,
            out: Outgoing { digests, ..Outgoing::default() },
            incoming: Incoming { digests, ..Incoming::default() },
            state: State {
                block_bytes: work.block_bytes,
                issued: vec![now; work.depth],
                ready: (0..work.depth as u16).collect(),
                r2ts: Vec::new(),
                outstanding: 0,
            },
        }
    }

    /// A command for each place that is free.
    fn issue(&mut self, work: &Workload, place: &mut Place, now: Instant) {
        let blocks = (work.block_bytes as u64) / work.lba_bytes;
        for cid in self.state.ready.drain(..) {
            if (place.slba + blocks) * work.lba_bytes > work.span_bytes {
                place.slba = 0;
            }
            self.out.command(work, cid, place, blocks);
            place.slba += blocks;
            place.nsid = if place.nsid >= work.namespaces { 1 } else { place.nsid + 1 };
            self.state.issued[cid as usize] = now;
            self.state.outstanding += 1;
        }
    }

    /// Takes what has come; `false`: nothing.
    fn receive(&mut self, input: &mut [u8], tally: &mut Tally) -> io::Result<bool> {
        let n = match self.link.stream.read(input) {
            Ok(0) => return Err(protocol("the peer closed the connection")),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        };
        tally.now = Instant::now();
        let Lane { link, out, incoming, state } = self;
        match &mut link.session {
            None => incoming.feed(&input[..n], |pdu| state.on(&pdu, tally))?,
            Some(session) => {
                let mut result = Ok(());
                let opened = session.open(&mut input[..n], &mut |plain| {
                    if result.is_ok() {
                        result = incoming.feed(plain.bytes(), |pdu| state.on(&pdu, tally));
                    }
                });
                opened.map_err(|error| protocol(error.to_string()))?;
                result?;
            }
        }
        for (cid, ttag, offset, len) in state.r2ts.drain(..) {
            if out.digests && len as usize != state.block_bytes {
                return Err(protocol("the target asks for a part of a command's data"));
            }
            out.h2c_data(cid, ttag, offset, len);
        }
        Ok(true)
    }
}

impl State {
    fn on(&mut self, pdu: &Pdu, tally: &mut Tally) -> io::Result<()> {
        match *pdu {
            Pdu::Done(cid) => {
                let Some(issued) = self.issued.get(cid as usize) else {
                    return Err(protocol(format!("completion for cid {cid}")));
                };
                if tally.latencies.len() < tally.latencies.capacity() {
                    tally.latencies.push((tally.now - *issued).as_nanos() as u32);
                }
                tally.completed += 1;
                self.outstanding -= 1;
                self.ready.push(cid);
            }
            Pdu::R2t(cid, ttag, offset, len) => self.r2ts.push((cid, ttag, offset, len)),
        }
        Ok(())
    }
}

/// What is still to be sent.
#[derive(Default)]
struct Outgoing {
    heads: Vec<Head>,
    first: usize,
    sent_of_first: usize,
    digests: bool,
    /// Records that are not sent, and how much of them is.
    sealed: Vec<u8>,
    sealed_sent: usize,
    /// Bytes of the first head's payload that are sealed.
    first_sealed: usize,
}

/// A PDU's header, and how much payload follows.
struct Head {
    bytes: [u8; CAPSULE_BYTES + DIGEST_BYTES],
    len: usize,
    payload_len: usize,
    /// The payload is a whole command's, and its digest follows.
    has_digest: bool,
}

impl Head {
    fn parts<'a>(&'a self, payload: &'a Payload) -> [&'a [u8]; 3] {
        let digest: &[u8] = if self.has_digest { &payload.digest } else { &[] };
        [&self.bytes[..self.len], &payload.bytes[..self.payload_len], digest]
    }

    /// Its payload fills a record or more.
    fn is_large(&self) -> bool {
        self.payload_len >= RECORD_PLAIN_MAX
    }

    fn total(&self) -> usize {
        self.len + self.payload_len + if self.has_digest { DIGEST_BYTES } else { 0 }
    }
}

impl Outgoing {
    fn command(&mut self, work: &Workload, cid: u16, place: &Place, blocks: u64) {
        let mut head = [0u8; CAPSULE_BYTES];
        let sqe = &mut head[8..];
        sqe[0] = if work.write { 1 } else { 2 };
        sqe[1] = 0x40;
        sqe[2..4].copy_from_slice(&cid.to_le_bytes());
        sqe[4..8].copy_from_slice(&place.nsid.to_le_bytes());
        sqe[32..36].copy_from_slice(&(work.block_bytes as u32).to_le_bytes());
        sqe[39] = if work.write && work.in_capsule { 0x01 } else { 0x5a };
        sqe[40..48].copy_from_slice(&place.slba.to_le_bytes());
        sqe[48..50].copy_from_slice(&((blocks - 1) as u16).to_le_bytes());
        head[0] = 4;
        let in_capsule = if work.write && work.in_capsule { work.block_bytes } else { 0 };
        self.pdu(&mut head, 0, in_capsule);
    }

    fn h2c_data(&mut self, cid: u16, ttag: u16, offset: u32, len: u32) {
        let mut head = [0u8; RESPONSE_BYTES];
        head[0] = 6;
        head[8..10].copy_from_slice(&cid.to_le_bytes());
        head[10..12].copy_from_slice(&ttag.to_le_bytes());
        head[12..16].copy_from_slice(&offset.to_le_bytes());
        head[16..20].copy_from_slice(&len.to_le_bytes());
        self.pdu(&mut head, 0x04, len as usize); // the last of its R2T
    }

    /// Queues a PDU: fills in flags and lengths, and adds its digests.
    fn pdu(&mut self, head: &mut [u8], more_flags: u8, payload_len: usize) {
        let digest = if self.digests { DIGEST_BYTES } else { 0 };
        let with_data = payload_len > 0;
        let len = head.len() + digest;
        let total = len + if with_data { payload_len + digest } else { 0 };
        head[1] = more_flags | flags(self.digests, with_data);
        head[2] = head.len() as u8;
        head[3] = if with_data { len as u8 } else { 0 };
        head[4..8].copy_from_slice(&(total as u32).to_le_bytes());
        let mut bytes = [0; CAPSULE_BYTES + DIGEST_BYTES];
        bytes[..head.len()].copy_from_slice(head);
        if self.digests {
            bytes[head.len()..len].copy_from_slice(&Crc32c::of(head));
        }
        self.heads.push(Head { bytes, len, payload_len, has_digest: self.digests && with_data });
    }

    /// Seals what leaves next: small PDUs together, or a large payload in records of its own. The first
    /// part of several is short, so that the other end is at work on it while the next is sealed. So
    /// does the product.
    fn seal_next(
        &mut self,
        session: &mut Session,
        payload: &Payload,
        is_first: bool,
    ) -> io::Result<()> {
        let limit =
            if is_first { SEAL_FIRST_BYTES } else { SEAL_BATCH_BYTES + 2 * RECORD_PLAIN_MAX };
        let mut seal = |parts: &[&[u8]], sealed: &mut Vec<u8>| {
            session.seal_slices(parts, sealed).map_err(|error| protocol(error.to_string()))
        };
        let head = &self.heads[self.first];
        if head.is_large() {
            let [bytes, data, digest] = head.parts(payload);
            if self.first_sealed == 0 {
                seal(&[bytes], &mut self.sealed)?;
            }
            while self.first_sealed < data.len() && self.sealed.len() + RECORD_PLAIN_MAX < limit {
                let rest = &data[self.first_sealed..];
                let part = &rest[..rest.len().min(RECORD_PLAIN_MAX)];
                seal(&[part], &mut self.sealed)?;
                self.first_sealed += part.len();
            }
            if self.first_sealed == data.len() {
                seal(&[digest], &mut self.sealed)?;
                (self.first, self.first_sealed) = (self.first + 1, 0);
            }
            return Ok(());
        }
        let mut parts = [&[][..]; SLICES];
        let (mut count, mut bytes) = (0, 0);
        let from = self.first;
        for head in self.heads[from..].iter().take_while(|head| !head.is_large()) {
            let is_full = count > 0 && bytes + head.total() > SEAL_BATCH_BYTES;
            if is_full || count + 3 > SLICES {
                break;
            }
            for part in head.parts(payload) {
                parts[count] = part;
                count += 1;
            }
            bytes += head.total();
            self.first += 1;
        }
        seal(&parts[..count], &mut self.sealed)
    }

    fn flush(&mut self, link: &mut Link, payload: &Payload) -> io::Result<()> {
        let Link { stream, session, .. } = link;
        let mut is_first = true;
        loop {
            let sent = match session {
                None if self.first == self.heads.len() => break,
                None => {
                    let mut slices = [IoSlice::new(&[]); SLICES];
                    let mut count = 0;
                    let mut skip = self.sent_of_first;
                    for head in &self.heads[self.first..] {
                        if count + 3 > SLICES {
                            break;
                        }
                        for part in head.parts(payload) {
                            let skipped = skip.min(part.len());
                            skip -= skipped;
                            if skipped < part.len() {
                                slices[count] = IoSlice::new(&part[skipped..]);
                                count += 1;
                            }
                        }
                    }
                    stream.write_vectored(&slices[..count])
                }
                Some(session) => {
                    if self.sealed_sent == self.sealed.len() {
                        if self.first == self.heads.len() {
                            break;
                        }
                        self.sealed.clear();
                        self.sealed_sent = 0;
                        self.seal_next(session, payload, is_first)?;
                        is_first = false;
                    }
                    stream.write(&self.sealed[self.sealed_sent..])
                }
            };
            match sent {
                Ok(n) if session.is_some() => self.sealed_sent += n,
                Ok(n) => {
                    let mut n = n + self.sent_of_first;
                    while let Some(head) = self.heads.get(self.first) {
                        if n < head.total() {
                            break;
                        }
                        n -= head.total();
                        self.first += 1;
                    }
                    self.sent_of_first = n;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        self.heads.clear();
        self.first = 0;
        Ok(())
    }
}

enum Pdu {
    Done(u16),
    R2t(u16, u16, u32, u32),
}

/// Cuts the stream into PDUs.
#[derive(Default)]
struct Incoming {
    digests: bool,
    /// A header, or the digest behind a payload, that has not come in full.
    partial: Vec<u8>,
    payload_left: usize,
    /// The payload's digest comes next.
    is_digest_next: bool,
    crc: Crc32c,
    done_after: Option<u16>,
}

impl Incoming {
    fn feed(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(Pdu) -> io::Result<()>,
    ) -> io::Result<()> {
        const WHOLE_MAX: usize = RESPONSE_BYTES + DIGEST_BYTES;

        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let n = self.payload_left.min(bytes.len());
                if self.digests {
                    self.crc.update(&bytes[..n]);
                }
                bytes = &bytes[n..];
                self.payload_left -= n;
                if self.payload_left == 0 {
                    self.is_digest_next = self.digests;
                    if !self.digests
                        && let Some(cid) = self.done_after.take()
                    {
                        event(Pdu::Done(cid))?;
                    }
                }
                continue;
            }
            let want = match (self.is_digest_next, self.digests) {
                (true, _) => DIGEST_BYTES,
                (false, true) => WHOLE_MAX,
                (false, false) => RESPONSE_BYTES,
            };
            let mut whole = [0; WHOLE_MAX];
            if self.partial.is_empty() && bytes.len() >= want {
                whole[..want].copy_from_slice(&bytes[..want]);
                bytes = &bytes[want..];
            } else {
                let n = (want - self.partial.len()).min(bytes.len());
                self.partial.extend_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                if self.partial.len() < want {
                    return Ok(());
                }
                whole[..want].copy_from_slice(&self.partial);
                self.partial.clear();
            }
            if self.is_digest_next {
                self.is_digest_next = false;
                if whole[..DIGEST_BYTES] != self.crc.finish() {
                    return Err(protocol("a data digest does not match"));
                }
                self.crc.reset();
                if let Some(cid) = self.done_after.take() {
                    event(Pdu::Done(cid))?;
                }
                continue;
            }
            let (head, digest) = whole.split_at(RESPONSE_BYTES);
            if self.digests && digest != Crc32c::of(head) {
                return Err(protocol("a header digest does not match"));
            }
            let short = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
            let word =
                |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
            match head[0] {
                5 => {
                    let status = short(22) >> 1;
                    if status != 0 {
                        return Err(protocol(format!("a command failed with status {status:#x}")));
                    }
                    event(Pdu::Done(short(20)))?;
                }
                7 => {
                    self.payload_left = word(16) as usize;
                    if head[1] & 0x08 != 0 {
                        self.done_after = Some(short(8));
                    }
                }
                9 => event(Pdu::R2t(short(8), short(10), word(12), word(16)))?,
                other => return Err(protocol(format!("PDU type {other:#x}"))),
            }
        }
        Ok(())
    }
}
