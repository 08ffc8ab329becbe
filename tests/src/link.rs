//! A host's end of one connection for the load generator: plain, with digests, or with TLS.
//!
//! Handshake, initialisation and Connect are done one message at a time, blocking; what follows is
//! [`load`](crate::load)'s. The record layer is the product's own (`crypto`), as a host of this
//! program would use it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crypto::psk::Psk;
use crypto::tls::{Client, KeyUpdates, Progress, Session};
use nvme::tcp::Crc32c;

use crate::bare::{CAPSULE_BYTES, RESPONSE_BYTES};

/// Length of a digest.
pub const DIGEST_BYTES: usize = 4;

/// How a connection is protected.
#[derive(Clone, Default)]
pub enum Protection {
    /// Not at all.
    #[default]
    None,
    /// Header and data digests, made and checked.
    Digests,
    /// TLS 1.3 with this key.
    Tls(Psk),
}

/// A connected socket and what protects it.
pub struct Link {
    pub(crate) stream: TcpStream,
    pub(crate) session: Option<Box<Session>>,
    pub(crate) digests: bool,
    /// Plaintext that nobody has taken yet, before [`load::run`](crate::load::run).
    received: Vec<u8>,
}

pub(crate) fn protocol(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn refused(what: impl std::fmt::Display) -> io::Error {
    protocol(what.to_string())
}

/// A controller's queues.
pub struct Association {
    /// Kept open: the controller lives as long as its admin queue.
    pub admin: Link,
    /// The I/O queues, ready for commands.
    pub io: Vec<Link>,
}

/// Connects a controller and `queues` I/O queues of `entries` entries.
///
/// # Errors
/// Socket errors, or `InvalidData` that names the command refused and its status.
pub fn associate(
    addr: SocketAddr,
    names: (&str, &str),
    entries: u16,
    queues: u16,
    protection: &Protection,
) -> io::Result<Association> {
    let mut admin = Link::open(addr, protection)?;
    let cntlid = admin.connect(0, 31, 0xffff, names)?;
    // CC: enable, 64-byte submission and 16-byte completion entries, 4 KiB pages.
    admin.property_set(0x14, 0x0046_0001)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while admin.property_get(0x1c)? & 1 == 0 {
        if Instant::now() > deadline {
            return Err(protocol("CSTS.RDY did not become 1 within 10 s"));
        }
    }
    // Set Features, Number of Queues, zero-based.
    let mut sqe = [0u8; 64];
    sqe[0] = 0x09;
    sqe[40] = 0x07;
    sqe[44..46].copy_from_slice(&(queues - 1).to_le_bytes());
    sqe[46..48].copy_from_slice(&(queues - 1).to_le_bytes());
    admin.command(sqe, &[])?;
    let io = (1..=queues)
        .map(|qid| {
            let mut link = Link::open(addr, protection)?;
            link.connect(qid, entries - 1, cntlid, names)?;
            Ok(link)
        })
        .collect::<io::Result<Vec<_>>>()?;
    Ok(Association { admin, io })
}

impl Link {
    /// A connection to a peer that speaks no NVMe/TCP beyond capsules, as the bare loop.
    ///
    /// # Errors
    /// Socket errors.
    pub fn bare(addr: SocketAddr) -> io::Result<Link> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        Ok(Link { stream, session: None, digests: false, received: Vec::new() })
    }

    /// The socket, as it is.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Connects, makes the TLS handshake if there is to be one, and initialises the connection.
    fn open(addr: SocketAddr, protection: &Protection) -> io::Result<Link> {
        let mut link = Link::bare(addr)?;
        if let Protection::Tls(psk) = protection {
            link.shake(psk)?;
        }
        let wants_digests = matches!(protection, Protection::Digests);
        let mut icreq = [0u8; 128];
        icreq[2] = 128;
        icreq[4] = 128;
        icreq[11] = if wants_digests { 0x03 } else { 0 };
        link.send(&icreq)?;
        let mut icresp = [0u8; 128];
        link.recv_exact(&mut icresp)?;
        if icresp[0] != 1 {
            return Err(protocol(format!("PDU type {:#x} instead of ICResp", icresp[0])));
        }
        if icresp[11] != icreq[11] {
            return Err(protocol("the target does not grant the digests asked for"));
        }
        link.digests = wants_digests;
        Ok(link)
    }

    fn shake(&mut self, psk: &Psk) -> io::Result<()> {
        let mut client = Client::new(psk).map_err(refused)?;
        let mut input = [0u8; 8192];
        loop {
            self.stream.write_all(&client.take())?;
            let n = self.stream.read(&mut input)?;
            if n == 0 {
                return Err(protocol("the target closed the connection during the TLS handshake"));
            }
            if client.feed(&input[..n]).map_err(refused)? == Progress::Done {
                break;
            }
        }
        self.stream.write_all(&client.take())?;
        let established =
            client.finish().ok_or_else(|| protocol("the TLS handshake came to nothing"))?;
        self.session = Some(Box::new(Session::new(&established, KeyUpdates::Auto)));
        let mut leftover = established.leftover;
        self.take_wire(&mut leftover)
    }

    fn take_wire(&mut self, wire: &mut [u8]) -> io::Result<()> {
        let Link { session, received, .. } = self;
        match session {
            None => received.extend_from_slice(wire),
            Some(session) => session
                .open(wire, &mut |plain| received.extend_from_slice(plain.bytes()))
                .map_err(refused)?,
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(session) = &mut self.session else { return self.stream.write_all(bytes) };
        let mut sealed = Vec::new();
        session.seal_slices(&[bytes], &mut sealed).map_err(refused)?;
        self.stream.write_all(&sealed)
    }

    fn recv_exact(&mut self, to: &mut [u8]) -> io::Result<()> {
        let mut input = [0u8; 8192];
        while self.received.len() < to.len() {
            let n = self.stream.read(&mut input)?;
            if n == 0 {
                return Err(protocol("the target closed the connection"));
            }
            self.take_wire(&mut input[..n])?;
        }
        to.copy_from_slice(&self.received[..to.len()]);
        self.received.drain(..to.len());
        Ok(())
    }

    /// Switches to what `load` needs: no blocking, and nothing received that it does not see.
    pub(crate) fn begin(&mut self) -> io::Result<()> {
        if !self.received.is_empty() {
            return Err(protocol("bytes that nobody asked for"));
        }
        self.stream.set_nonblocking(true)
    }

    /// Sends `sqe` with in-capsule `data` and returns the response's first eight bytes.
    fn command(&mut self, mut sqe: [u8; 64], data: &[u8]) -> io::Result<u64> {
        sqe[1] = 0x40;
        if !data.is_empty() {
            sqe[32..36].copy_from_slice(&(data.len() as u32).to_le_bytes());
            sqe[39] = 0x01;
        }
        let digest = if self.digests { DIGEST_BYTES } else { 0 };
        let pdo = if data.is_empty() { 0 } else { CAPSULE_BYTES + digest };
        let tail = if data.is_empty() { 0 } else { digest };
        let mut pdu =
            vec![4, flags(self.digests, !data.is_empty()), CAPSULE_BYTES as u8, pdo as u8];
        let len = CAPSULE_BYTES + digest + data.len() + tail;
        pdu.extend_from_slice(&(len as u32).to_le_bytes());
        pdu.extend_from_slice(&sqe);
        if self.digests {
            pdu.extend_from_slice(&Crc32c::of(&pdu));
        }
        pdu.extend_from_slice(data);
        if tail > 0 {
            pdu.extend_from_slice(&Crc32c::of(data));
        }
        self.send(&pdu)?;
        let mut response = [0u8; RESPONSE_BYTES + DIGEST_BYTES];
        let response = &mut response[..RESPONSE_BYTES + digest];
        self.recv_exact(response)?;
        if response[0] != 5 {
            return Err(protocol(format!("PDU type {:#x} instead of a response", response[0])));
        }
        let status = u16::from_le_bytes([response[22], response[23]]) >> 1;
        if status != 0 {
            let opcode = sqe[0];
            return Err(protocol(format!(
                "opcode {opcode:#x} was refused with status {status:#x}"
            )));
        }
        Ok(u64::from_le_bytes(response[8..16].try_into().expect("8 bytes")))
    }

    fn connect(
        &mut self,
        qid: u16,
        sqsize_z: u16,
        cntlid: u16,
        (subnqn, hostnqn): (&str, &str),
    ) -> io::Result<u16> {
        let mut sqe = [0u8; 64];
        sqe[0] = 0x7f;
        sqe[4] = 0x01;
        sqe[42..44].copy_from_slice(&qid.to_le_bytes());
        sqe[44..46].copy_from_slice(&sqsize_z.to_le_bytes());
        sqe[46] = 0x04; // no submission queue flow control: reads end with their data
        let mut data = vec![0u8; 1024];
        // One host identifier per host NQN: its last bytes.
        let id = &hostnqn.as_bytes()[hostnqn.len().saturating_sub(16)..];
        data[..id.len()].copy_from_slice(id);
        data[16..18].copy_from_slice(&cntlid.to_le_bytes());
        data[256..256 + subnqn.len()].copy_from_slice(subnqn.as_bytes());
        data[512..512 + hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
        self.command(sqe, &data).map(|result| result as u16)
    }

    fn property_set(&mut self, offset: u32, value: u64) -> io::Result<()> {
        let mut sqe = [0u8; 64];
        sqe[0] = 0x7f;
        sqe[44..48].copy_from_slice(&offset.to_le_bytes());
        sqe[48..56].copy_from_slice(&value.to_le_bytes());
        self.command(sqe, &[]).map(drop)
    }

    fn property_get(&mut self, offset: u32) -> io::Result<u64> {
        let mut sqe = [0u8; 64];
        sqe[0] = 0x7f;
        sqe[4] = 0x04;
        sqe[44..48].copy_from_slice(&offset.to_le_bytes());
        self.command(sqe, &[])
    }
}

/// HDGSTF and DDGSTF of a PDU.
pub(crate) fn flags(digests: bool, with_data: bool) -> u8 {
    if digests { 1 | u8::from(with_data) << 1 } else { 0 }
}
