//! A minimal vhost-user front end: what a virtual machine monitor says to attach a block device.
//!
//! Only what the self-check needs: one queue, one region, no inflight log, no migration. It is
//! written apart from the back end in `virtio-blk`, so that a shared mistake does not pass for a
//! proof. (QEMU: "Vhost-user Protocol".)

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;

const FLAGS_VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

const FEATURE_PROTOCOL: u64 = 1 << 30;
const FEATURE_VERSION_1: u64 = 1 << 32;
const FEATURE_BLK_FLUSH: u64 = 1 << 9;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_CONFIG: u64 = 1 << 9;

/// No answer we ask for is longer.
const REPLY_BYTES_MAX: u32 = 4096;

/// Where the parts of the one queue are, as offsets in the shared region.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingLayout {
    pub(super) entries: u16,
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// A connected front end.
#[derive(Debug)]
pub(super) struct FrontEnd {
    stream: UnixStream,
    has_ack: bool,
    has_flush: bool,
}

fn protocol(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

impl FrontEnd {
    /// Connects and agrees on features.
    pub(super) fn connect(socket: &Path, timeout: Duration) -> io::Result<FrontEnd> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut front = FrontEnd { stream, has_ack: false, has_flush: false };

        let offered = front.ask_u64(GET_FEATURES)?;
        for (bit, name) in
            [(FEATURE_PROTOCOL, "protocol features"), (FEATURE_VERSION_1, "VIRTIO_F_VERSION_1")]
        {
            if offered & bit == 0 {
                return Err(protocol(format!("the device does not offer {name}")));
            }
        }
        front.send_u64(SET_OWNER, None, &[])?;
        let protocol_offered = front.ask_u64(GET_PROTOCOL_FEATURES)?;
        let wanted = protocol_offered & (PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG);
        if wanted & PROTOCOL_CONFIG == 0 {
            return Err(protocol("the device does not offer its configuration space"));
        }
        front.send_u64(SET_PROTOCOL_FEATURES, Some(wanted), &[])?;
        front.has_ack = wanted & PROTOCOL_REPLY_ACK != 0;
        front.has_flush = offered & FEATURE_BLK_FLUSH != 0;
        let features = FEATURE_PROTOCOL | FEATURE_VERSION_1 | (offered & FEATURE_BLK_FLUSH);
        front.send_u64(SET_FEATURES, Some(features), &[])?;
        Ok(front)
    }

    /// Whether flushes are worth sending.
    pub(super) fn has_flush(&self) -> bool {
        self.has_flush
    }

    /// The capacity in 512-byte sectors: the first field of the configuration space.
    pub(super) fn capacity_sectors(&mut self) -> io::Result<u64> {
        const CONFIG_BYTES: u32 = 60;
        let mut ask = Vec::new();
        for word in [0u32, CONFIG_BYTES, 0] {
            ask.extend_from_slice(&word.to_le_bytes());
        }
        ask.resize(12 + CONFIG_BYTES as usize, 0);
        self.send(GET_CONFIG, FLAGS_VERSION, &ask, &[])?;
        let reply = self.receive(GET_CONFIG)?;
        match reply.get(12..20).and_then(|bytes| bytes.try_into().ok()) {
            Some(bytes) => Ok(u64::from_le_bytes(bytes)),
            None => Err(protocol("the device's configuration is too short")),
        }
    }

    /// Lends `memory` (one region, its offsets are the guest's addresses) and starts queue 0.
    pub(super) fn start(
        &mut self,
        memory: BorrowedFd<'_>,
        size: u64,
        ring: RingLayout,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut table = Vec::new();
        table.extend_from_slice(&1u32.to_le_bytes());
        table.extend_from_slice(&0u32.to_le_bytes());
        // Guest address, size, user address, offset in the file.
        for word in [0, size, 0, 0] {
            table.extend_from_slice(&word.to_le_bytes());
        }
        self.command(SET_MEM_TABLE, &table, &[memory])?;

        let state = |value: u32| {
            let mut body = 0u32.to_le_bytes().to_vec();
            body.extend_from_slice(&value.to_le_bytes());
            body
        };
        self.command(SET_VRING_NUM, &state(u32::from(ring.entries)), &[])?;
        self.command(SET_VRING_BASE, &state(0), &[])?;
        let mut addresses = state(0);
        for word in [ring.descriptors, ring.used, ring.avail, 0] {
            addresses.extend_from_slice(&word.to_le_bytes());
        }
        self.command(SET_VRING_ADDR, &addresses, &[])?;
        self.command(SET_VRING_CALL, &0u64.to_le_bytes(), &[call])?;
        self.command(SET_VRING_KICK, &0u64.to_le_bytes(), &[kick])?;
        self.command(SET_VRING_ENABLE, &state(1), &[])
    }

    /// Stops queue 0; the answer comes when the device is done with our memory.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.send(GET_VRING_BASE, FLAGS_VERSION, &[0; 8], &[])?;
        self.receive(GET_VRING_BASE).map(|_| ())
    }

    fn ask_u64(&mut self, request: u32) -> io::Result<u64> {
        self.send(request, FLAGS_VERSION, &[], &[])?;
        let reply = self.receive(request)?;
        let bytes = reply.try_into().map_err(|_| {
            protocol(format!("the answer to request {request} is not 8 bytes long"))
        })?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn send_u64(
        &mut self,
        request: u32,
        value: Option<u64>,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        match value {
            Some(value) => self.command(request, &value.to_le_bytes(), fds),
            None => self.command(request, &[], fds),
        }
    }

    /// Sends a request that has no answer of its own and, if agreed, waits for its acknowledgment.
    fn command(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let ack = if self.has_ack { FLAG_NEED_REPLY } else { 0 };
        self.send(request, FLAGS_VERSION | ack, body, fds)?;
        if !self.has_ack {
            return Ok(());
        }
        match self.receive(request)?.first_chunk() {
            Some(bytes) if u64::from_le_bytes(*bytes) == 0 => Ok(()),
            _ => Err(protocol(format!("the device refused request {request}"))),
        }
    }

    fn send(
        &mut self,
        request: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(12 + body.len());
        for word in [request, flags, body.len() as u32] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(body);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(protocol("too many file descriptors for one message"));
        }
        let sent = rustix::net::sendmsg(
            self.stream.as_fd(),
            &[IoSlice::new(&message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        if sent == message.len() {
            Ok(())
        } else {
            Err(protocol("the socket took only a part of a message"))
        }
    }

    fn receive(&mut self, request: u32) -> io::Result<Vec<u8>> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header)?;
        let word = |index: usize| {
            header[index * 4..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let (answered, flags, size) = (word(0), word(1), word(2));
        if answered != request || flags & FLAG_REPLY == 0 || size > REPLY_BYTES_MAX {
            return Err(protocol(format!(
                "asked request {request}, got message {answered} with flags {flags:#x} and \
                 {size} bytes"
            )));
        }
        let mut body = vec![0; size as usize];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }
}
