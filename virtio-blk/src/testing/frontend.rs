//! A vhost-user frontend.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use zerocopy::{FromBytes, IntoBytes};

use super::driver::TestMemory;
use super::ring::TestRing;
use crate::device::Features;
use crate::queue::split::RingAddress;
use crate::vhost_user::session::ProtocolFeatures;
use crate::vhost_user::wire::{
    self, HEADER_BYTES, InflightDescription, Request, VringAddr, VringState,
};

/// A frontend's connection. Errors of the connection are panics, except where a method says.
pub struct TestFrontend {
    stream: UnixStream,
    /// Features acknowledged by [`TestFrontend::negotiate`].
    pub features: Features,
}

impl TestFrontend {
    /// Connect to a device's socket.
    pub fn connect(path: &Path) -> TestFrontend {
        TestFrontend::over(UnixStream::connect(path).expect("device listens"))
    }

    /// Use a connection.
    pub fn over(stream: UnixStream) -> TestFrontend {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
        TestFrontend { stream, features: Features::default() }
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Send a message with file descriptors.
    pub fn send(&self, kind: Request, need_reply: bool, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_raw(&wire::request(kind, need_reply, payload), fds);
    }

    /// Send any bytes with file descriptors.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "at most 32");
        }
        let slices = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent.expect("device reads"), bytes.len());
    }

    /// Payload of the reply to `kind`. None: the device has closed the connection.
    pub fn try_reply(&self, kind: Request) -> Option<Vec<u8>> {
        let mut header = [0; HEADER_BYTES];
        (&self.stream).read_exact(&mut header).ok()?;
        let word =
            |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(word(0), kind.0, "reply to another message");
        assert_eq!(word(4), 5, "flags of a reply");
        let mut payload = vec![0; word(8) as usize];
        (&self.stream).read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// Payload of the reply to `kind`.
    pub fn reply(&self, kind: Request) -> Vec<u8> {
        self.try_reply(kind).expect("a reply")
    }

    /// A message that is answered by one number.
    pub fn ask(&self, kind: Request) -> u64 {
        self.send(kind, false, &[], &[]);
        u64::from_ne_bytes(self.reply(kind).try_into().expect("8 bytes"))
    }

    /// A message that is acknowledged. The answer is 0 if it was carried out.
    pub fn acked(&self, kind: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.send(kind, true, payload, fds);
        u64::from_ne_bytes(self.reply(kind).try_into().expect("8 bytes"))
    }

    /// As [`TestFrontend::acked`], and it has to be carried out.
    pub fn tell(&self, kind: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.acked(kind, payload, fds), 0, "{kind}");
    }

    /// Negotiate all that is offered without `without`.
    pub fn negotiate(&mut self, without: Features) {
        let offered = Features(self.ask(Request::GET_FEATURES));
        let protocol = self.ask(Request::GET_PROTOCOL_FEATURES);
        assert_eq!(protocol & ProtocolFeatures::OFFERED.0, protocol);
        self.send(Request::SET_PROTOCOL_FEATURES, false, protocol.as_bytes(), &[]);
        self.features = offered.without(without);
        self.tell(Request::SET_OWNER, &[], &[]);
        self.tell(Request::SET_FEATURES, self.features.0.as_bytes(), &[]);
    }

    /// Memory to record requests in flight, made by the device.
    pub fn new_inflight(&self, queues: u16, queue_size: u16) -> (InflightDescription, OwnedFd) {
        let asked = InflightDescription { queues, queue_size, ..Default::default() };
        self.send(Request::GET_INFLIGHT_FD, false, asked.as_bytes(), &[]);
        let mut bytes = [0; HEADER_BYTES + size_of::<InflightDescription>()];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.stream, &mut slices, &mut control, flags);
        assert_eq!(received.expect("device answers").bytes, bytes.len());
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let description =
            InflightDescription::read_from_bytes(&bytes[HEADER_BYTES..]).expect("the length");
        (description, fd.expect("a file"))
    }

    /// Record requests in flight there.
    pub fn set_inflight(&self, description: &InflightDescription, fd: BorrowedFd<'_>) {
        self.tell(Request::SET_INFLIGHT_FD, description.as_bytes(), &[fd]);
    }

    /// Share memory.
    pub fn add_memory(&self, memory: &TestMemory) {
        let mut payload = vec![0; 8];
        payload.extend(memory.region().as_bytes());
        self.tell(Request::ADD_MEM_REG, &payload, &[memory.fd().as_fd()]);
    }

    /// A ring's place in the frontend's addresses, and where its device area is in a log.
    pub fn ring_address(
        &self,
        index: u32,
        memory: &TestMemory,
        ring: &RingAddress,
        log: Option<u64>,
    ) -> VringAddr {
        let region = memory.region();
        let user = |addr: u64| addr - region.guest_addr + region.user_addr;
        VringAddr {
            index,
            flags: if log.is_some() { wire::VRING_LOG } else { 0 },
            descriptor: user(ring.descriptor),
            used: user(ring.used),
            available: user(ring.available),
            log: log.unwrap_or(0),
        }
    }

    /// Set up and enable a ring from available index `base` on. Without `kick` the device polls.
    pub fn start_ring(
        &self,
        index: u32,
        memory: &TestMemory,
        queue: &TestRing,
        base: u32,
        kick: Option<BorrowedFd<'_>>,
        call: BorrowedFd<'_>,
    ) {
        let state = |num: u32| VringState { index, num };
        let address = self.ring_address(index, memory, &queue.address(), None);
        self.tell(Request::SET_VRING_NUM, state(u32::from(queue.size())).as_bytes(), &[]);
        self.tell(Request::SET_VRING_ADDR, address.as_bytes(), &[]);
        self.tell(Request::SET_VRING_BASE, state(base).as_bytes(), &[]);
        let value = u64::from(index);
        self.tell(Request::SET_VRING_CALL, value.as_bytes(), &[call]);
        match kick {
            Some(kick) => self.tell(Request::SET_VRING_KICK, value.as_bytes(), &[kick]),
            None => self.tell(Request::SET_VRING_KICK, (value | 1 << 8).as_bytes(), &[]),
        }
        self.tell(Request::SET_VRING_ENABLE, state(1).as_bytes(), &[]);
    }

    /// Stop a ring; where to go on with it.
    pub fn stop_ring(&self, index: u32) -> u32 {
        let state = VringState { index, num: 0 };
        self.send(Request::GET_VRING_BASE, false, state.as_bytes(), &[]);
        let reply = self.reply(Request::GET_VRING_BASE);
        assert_eq!(reply[..4], index.to_ne_bytes());
        u32::from_ne_bytes(reply[4..].try_into().expect("8 bytes"))
    }
}
