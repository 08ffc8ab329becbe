//! A load generator that speaks just enough NVMe/TCP to keep a queue at a given depth.
//!
//! It shares no code with the product, so that it is a second opinion on the wire format, and it is
//! the same for the target under test and for the [bare loop](crate::bare): it spins, sends all
//! commands of a pass in one call and copies what it receives once.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::bare::{CAPSULE_BYTES, RESPONSE_BYTES};

/// What to ask for.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Writes instead of reads.
    pub write: bool,
    /// Bytes per command, a multiple of 512.
    pub block_bytes: usize,
    /// Commands kept outstanding.
    pub depth: usize,
    /// Write payload travels behind the command; otherwise the peer asks for it by R2T.
    pub in_capsule: bool,
    /// Size of the namespace in bytes; offsets walk over it.
    pub span_bytes: u64,
    /// Bytes per logical block.
    pub lba_bytes: u64,
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

fn protocol(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// An admin qpair and one I/O qpair of `depth` entries to subsystem `subnqn`.
#[derive(Debug)]
pub struct Association {
    /// Kept open: the controller lives as long as its admin queue.
    pub admin: TcpStream,
    /// The I/O queue, ready for commands.
    pub io: TcpStream,
}

/// Connects a controller and one I/O queue.
///
/// # Errors
/// Socket errors, or `InvalidData` that names the command refused and its status.
pub fn associate(
    addr: SocketAddr,
    subnqn: &str,
    hostnqn: &str,
    depth: u16,
) -> io::Result<Association> {
    let mut admin = initialize(addr)?;
    let cntlid = connect(&mut admin, 0, 31, 0xffff, subnqn, hostnqn)?;
    // CC: enable, 64-byte submission and 16-byte completion entries, 4 KiB pages.
    property_set(&mut admin, 0x14, 0x0046_0001)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while property_get(&mut admin, 0x1c)? & 1 == 0 {
        if Instant::now() > deadline {
            return Err(protocol("CSTS.RDY did not become 1 within 10 s"));
        }
    }
    // Set Features, Number of Queues: one of each.
    let mut sqe = [0u8; 64];
    sqe[0] = 0x09;
    sqe[40] = 0x07;
    command(&mut admin, sqe, &[])?;
    let mut io = initialize(addr)?;
    connect(&mut io, 1, depth, cntlid, subnqn, hostnqn)?;
    Ok(Association { admin, io })
}

fn initialize(addr: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    let mut icreq = [0u8; 128];
    icreq[2] = 128;
    icreq[4] = 128;
    stream.write_all(&icreq)?;
    let mut icresp = [0u8; 128];
    stream.read_exact(&mut icresp)?;
    if icresp[0] != 1 {
        return Err(protocol(format!("PDU type {:#x} instead of ICResp", icresp[0])));
    }
    Ok(stream)
}

/// Sends `sqe` with in-capsule `data` and returns the response's first eight bytes.
fn command(stream: &mut TcpStream, mut sqe: [u8; 64], data: &[u8]) -> io::Result<u64> {
    sqe[1] = 0x40;
    if !data.is_empty() {
        sqe[32..36].copy_from_slice(&(data.len() as u32).to_le_bytes());
        sqe[39] = 0x01;
    }
    let mut pdu = capsule(&sqe, data.len());
    pdu.extend_from_slice(data);
    stream.write_all(&pdu)?;
    let mut response = [0u8; RESPONSE_BYTES];
    stream.read_exact(&mut response)?;
    if response[0] != 5 {
        return Err(protocol(format!("PDU type {:#x} instead of a response", response[0])));
    }
    let status = u16::from_le_bytes([response[22], response[23]]) >> 1;
    if status != 0 {
        return Err(protocol(format!("opcode {:#x} was refused with status {status:#x}", sqe[0])));
    }
    Ok(u64::from_le_bytes(response[8..16].try_into().expect("8 bytes")))
}

fn capsule(sqe: &[u8; 64], in_capsule: usize) -> Vec<u8> {
    let mut pdu = Vec::with_capacity(CAPSULE_BYTES + in_capsule);
    let pdo = if in_capsule > 0 { CAPSULE_BYTES as u8 } else { 0 };
    pdu.extend_from_slice(&[4, 0, CAPSULE_BYTES as u8, pdo]);
    pdu.extend_from_slice(&((CAPSULE_BYTES + in_capsule) as u32).to_le_bytes());
    pdu.extend_from_slice(sqe);
    pdu
}

fn connect(
    stream: &mut TcpStream,
    qid: u16,
    sqsize_z: u16,
    cntlid: u16,
    subnqn: &str,
    hostnqn: &str,
) -> io::Result<u16> {
    let mut sqe = [0u8; 64];
    sqe[0] = 0x7f;
    sqe[4] = 0x01;
    sqe[42..44].copy_from_slice(&qid.to_le_bytes());
    sqe[44..46].copy_from_slice(&sqsize_z.to_le_bytes());
    sqe[46] = 0x04; // no submission queue flow control: reads end with their data
    let mut data = vec![0u8; 1024];
    data[..16].copy_from_slice(&[0x5a; 16]);
    data[16..18].copy_from_slice(&cntlid.to_le_bytes());
    data[256..256 + subnqn.len()].copy_from_slice(subnqn.as_bytes());
    data[512..512 + hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
    command(stream, sqe, &data).map(|result| result as u16)
}

fn property_set(stream: &mut TcpStream, offset: u32, value: u64) -> io::Result<()> {
    let mut sqe = [0u8; 64];
    sqe[0] = 0x7f;
    sqe[44..48].copy_from_slice(&offset.to_le_bytes());
    sqe[48..56].copy_from_slice(&value.to_le_bytes());
    command(stream, sqe, &[]).map(drop)
}

fn property_get(stream: &mut TcpStream, offset: u32) -> io::Result<u64> {
    let mut sqe = [0u8; 64];
    sqe[0] = 0x7f;
    sqe[4] = 0x04;
    sqe[44..48].copy_from_slice(&offset.to_le_bytes());
    command(stream, sqe, &[])
}

/// What is still to be sent of one pass.
struct Outgoing {
    /// Headers of the pass, each followed by a payload (or not).
    heads: Vec<([u8; CAPSULE_BYTES], usize, usize)>,
    first: usize,
    sent_of_first: usize,
}

/// Runs `work` over `stream` for `time` and measures.
///
/// # Errors
/// Socket errors; `InvalidData` for a failed command or a PDU that makes no sense.
pub fn run(stream: &mut TcpStream, work: &Workload, time: Duration) -> io::Result<Figures> {
    stream.set_nonblocking(true)?;
    let payload: Vec<u8> = (0..work.block_bytes).map(|i| (i % 251) as u8).collect();
    let mut input = vec![0u8; 256 * 1024];
    let mut issued = vec![Instant::now(); work.depth];
    let mut latencies: Vec<u32> = Vec::with_capacity(4 << 20);
    let mut out = Outgoing { heads: Vec::new(), first: 0, sent_of_first: 0 };
    let mut parser = Incoming::default();
    let mut slba = 0u64;
    let blocks = (work.block_bytes as u64) / work.lba_bytes;
    let start = Instant::now();
    let mut ready: Vec<u16> = (0..work.depth as u16).collect();
    let mut r2ts: Vec<(u16, u16, u32, u32)> = Vec::new();
    let (mut completed, mut outstanding) = (0u64, 0usize);
    let mut now = start;
    let mut stopping = false;
    loop {
        for cid in ready.drain(..) {
            if stopping {
                continue;
            }
            if (slba + blocks) * work.lba_bytes > work.span_bytes {
                slba = 0;
            }
            out.command(work, cid, slba, blocks);
            slba += blocks;
            issued[cid as usize] = now;
            outstanding += 1;
        }
        for (cid, ttag, offset, len) in r2ts.drain(..) {
            out.h2c_data(cid, ttag, offset, len);
        }
        out.flush(stream, &payload)?;
        match stream.read(&mut input) {
            Ok(0) => return Err(protocol("the peer closed the connection")),
            Ok(n) => {
                now = Instant::now();
                parser.feed(&input[..n], |pdu| {
                    match pdu {
                        Pdu::Done(cid) => {
                            let cid_index = cid as usize;
                            if cid_index >= work.depth {
                                return Err(protocol(format!("completion for cid {cid}")));
                            }
                            if latencies.len() < latencies.capacity() {
                                latencies.push((now - issued[cid_index]).as_nanos() as u32);
                            }
                            completed += 1;
                            outstanding -= 1;
                            ready.push(cid);
                        }
                        Pdu::R2t(cid, ttag, offset, len) => r2ts.push((cid, ttag, offset, len)),
                    }
                    Ok(())
                })?;
                if !stopping && now - start >= time {
                    stopping = true;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                std::hint::spin_loop();
                if Instant::now() - now > Duration::from_secs(10) {
                    return Err(protocol(format!("no answer for 10 s, {outstanding} outstanding")));
                }
            }
            Err(e) => return Err(e),
        }
        if stopping && outstanding == 0 {
            break;
        }
    }
    let seconds = (now - start).as_secs_f64();
    latencies.sort_unstable();
    let at = |q: f64| f64::from(latencies[((latencies.len() - 1) as f64 * q) as usize]) / 1e3;
    Ok(Figures { iops: completed as f64 / seconds, p50_us: at(0.5), p99_us: at(0.99) })
}

impl Outgoing {
    fn command(&mut self, work: &Workload, cid: u16, slba: u64, blocks: u64) {
        let mut sqe = [0u8; 64];
        sqe[0] = if work.write { 1 } else { 2 };
        sqe[1] = 0x40;
        sqe[2..4].copy_from_slice(&cid.to_le_bytes());
        sqe[4] = 1;
        sqe[32..36].copy_from_slice(&(work.block_bytes as u32).to_le_bytes());
        sqe[39] = if work.write && work.in_capsule { 0x01 } else { 0x5a };
        sqe[40..48].copy_from_slice(&slba.to_le_bytes());
        sqe[48..50].copy_from_slice(&((blocks - 1) as u16).to_le_bytes());
        let in_capsule = if work.write && work.in_capsule { work.block_bytes } else { 0 };
        let mut head = [0u8; CAPSULE_BYTES];
        head[0] = 4;
        head[2] = CAPSULE_BYTES as u8;
        head[3] = if in_capsule > 0 { CAPSULE_BYTES as u8 } else { 0 };
        head[4..8].copy_from_slice(&((CAPSULE_BYTES + in_capsule) as u32).to_le_bytes());
        head[8..].copy_from_slice(&sqe);
        self.heads.push((head, CAPSULE_BYTES, in_capsule));
    }

    fn h2c_data(&mut self, cid: u16, ttag: u16, offset: u32, len: u32) {
        let mut head = [0u8; CAPSULE_BYTES];
        head[0] = 6;
        head[1] = 0x04; // last
        head[2] = RESPONSE_BYTES as u8;
        head[3] = RESPONSE_BYTES as u8;
        head[4..8].copy_from_slice(&(RESPONSE_BYTES as u32 + len).to_le_bytes());
        head[8..10].copy_from_slice(&cid.to_le_bytes());
        head[10..12].copy_from_slice(&ttag.to_le_bytes());
        head[12..16].copy_from_slice(&offset.to_le_bytes());
        head[16..20].copy_from_slice(&len.to_le_bytes());
        self.heads.push((head, RESPONSE_BYTES, len as usize));
    }

    fn flush(&mut self, stream: &mut TcpStream, payload: &[u8]) -> io::Result<()> {
        while self.first < self.heads.len() {
            let mut slices = [IoSlice::new(&[]); 256];
            let (mut count, mut skip) = (0, self.sent_of_first);
            for (head, head_len, payload_len) in &self.heads[self.first..] {
                if count + 2 > slices.len() {
                    break;
                }
                for part in [&head[..*head_len], &payload[..*payload_len]] {
                    let skipped = skip.min(part.len());
                    skip -= skipped;
                    if skipped < part.len() {
                        slices[count] = IoSlice::new(&part[skipped..]);
                        count += 1;
                    }
                }
            }
            match stream.write_vectored(&slices[..count]) {
                Ok(n) => {
                    let mut n = n + self.sent_of_first;
                    while let Some((_, head_len, payload_len)) = self.heads.get(self.first) {
                        if n < head_len + payload_len {
                            break;
                        }
                        n -= head_len + payload_len;
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

#[derive(Default)]
struct Incoming {
    partial: Vec<u8>,
    payload_left: usize,
    done_after: Option<u16>,
}

impl Incoming {
    fn feed(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(Pdu) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let n = self.payload_left.min(bytes.len());
                bytes = &bytes[n..];
                self.payload_left -= n;
                if self.payload_left == 0
                    && let Some(cid) = self.done_after.take()
                {
                    event(Pdu::Done(cid))?;
                }
                continue;
            }
            let head: [u8; RESPONSE_BYTES] =
                if self.partial.is_empty() && bytes.len() >= RESPONSE_BYTES {
                    let (head, rest) = bytes.split_at(RESPONSE_BYTES);
                    bytes = rest;
                    head.try_into().expect("24 bytes")
                } else {
                    let n = (RESPONSE_BYTES - self.partial.len()).min(bytes.len());
                    self.partial.extend_from_slice(&bytes[..n]);
                    bytes = &bytes[n..];
                    if self.partial.len() < RESPONSE_BYTES {
                        return Ok(());
                    }
                    let head = self.partial[..].try_into().expect("24 bytes");
                    self.partial.clear();
                    head
                };
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
                    self.payload_left = (word(4) as usize).saturating_sub(RESPONSE_BYTES);
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
