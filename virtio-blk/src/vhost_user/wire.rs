//! vhost-user messages on the wire (vhost-user protocol, "Message Specification"): a decoder that
//! takes the byte stream in any pieces, and the one place where lengths and numbers of file
//! descriptors are checked.
//!
//! Fields are in the byte order of the machine: both ends share memory, so they share it too.

use std::fmt;
use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of a message header.
pub const HEADER_BYTES: usize = 12;
/// Longest payload taken. The longest that is defined is a configuration space of 256 bytes and
/// its header, or a memory table of 8 regions.
pub const PAYLOAD_BYTES_MAX: usize = 1024;
/// Most file descriptors with one message (a memory table of 8 regions).
pub const FDS_MAX: usize = 8;
/// Length of the header in front of configuration space bytes.
pub const CONFIG_HEADER_BYTES: usize = 12;

/// Message type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Request(pub u32);

macro_rules! requests {
    ($($name:ident = $value:literal,)*) => {
        impl Request {
            $(#[doc = concat!("VHOST_USER_", stringify!($name), ".")]
            pub const $name: Request = Request($value);)*

            fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

requests! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_LOG_FD = 7,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SEND_RARP = 19,
    NET_SET_MTU = 20,
    SET_BACKEND_REQ_FD = 21,
    IOTLB_MSG = 22,
    SET_VRING_ENDIAN = 23,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
    RESET_DEVICE = 34,
    VRING_KICK = 35,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
    SET_STATUS = 39,
    GET_STATUS = 40,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "message type {}", self.0),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// `struct vhost_vring_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// Ring number.
    pub index: u32,
    /// A size, an index or a switch.
    pub num: u32,
}

/// `struct vhost_vring_addr`: where a ring is, in addresses of the frontend's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddr {
    /// Ring number.
    pub index: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    /// Descriptor table.
    pub descriptor: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Guest address for logging.
    pub log: u64,
}

const _: () = assert!(size_of::<VringAddr>() == 40);

/// One region of the frontend's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryRegion {
    /// Address in guest physical memory.
    pub guest_addr: u64,
    /// Length.
    pub size: u64,
    /// Address in the frontend's process.
    pub user_addr: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
}

const _: () = assert!(size_of::<MemoryRegion>() == 32);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ConfigHeader {
    offset: u32,
    size: u32,
    flags: u32,
}

const _: () = assert!(size_of::<ConfigHeader>() == CONFIG_HEADER_BYTES);

/// `VHOST_VRING_F_LOG` in [`VringAddr::flags`].
pub const VRING_LOG: u32 = 1;

/// Where SET_LOG_BASE has the log of dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogDescription {
    /// Its length.
    pub mmap_size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
}

const _: () = assert!(size_of::<LogDescription>() == 16);

/// What GET_INFLIGHT_FD and SET_INFLIGHT_FD say of the memory that records requests in flight.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct InflightDescription {
    /// Its length.
    pub mmap_size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// Queues that are recorded in it.
    pub queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// The structure as compilers lay it out. The specification counts 20 bytes, QEMU sends and
    /// expects all 24: what is answered is as long as what was asked.
    pub padding: u32,
}

const _: () = assert!(size_of::<InflightDescription>() == 24);
const INFLIGHT_BYTES_SHORT: usize = 20;

/// The stream cannot be understood any more: the connection has to be closed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireFault {
    /// Another protocol version, or no vhost-user peer at all.
    #[error("message header has flags {0:#x}, protocol version 1 expected")]
    Version(u32),
    /// A reply although nothing was asked.
    #[error("{0} came as a reply, but nothing was asked")]
    Reply(Request),
    /// Longer than anything defined.
    #[error("{request} announces {size} bytes of payload, at most {PAYLOAD_BYTES_MAX} are allowed")]
    Size {
        /// Message type.
        request: Request,
        /// Announced length.
        size: u32,
    },
    /// More file descriptors than any message carries, or the kernel could not pass them all.
    #[error("more than {FDS_MAX} file descriptors came with one message")]
    Fds,
    /// The peer went away in the middle of a message.
    #[error("connection closed in the middle of a message")]
    Truncated,
}

/// One message as it came, its length and file descriptors not yet judged.
#[derive(Debug)]
pub struct Message {
    /// Message type.
    pub request: Request,
    /// The sender waits for an acknowledgement, if that is negotiated.
    pub need_reply: bool,
    /// Payload.
    pub payload: Vec<u8>,
    /// File descriptors that came with it. They are closed with the message.
    pub fds: Vec<OwnedFd>,
}

/// Cuts the byte stream into messages.
///
/// A reader never takes more bytes than [`Decoder::wanted`], so that file descriptors that come
/// with some bytes belong to the message of these bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER_BYTES],
    header_have: usize,
    payload: Vec<u8>,
    payload_have: usize,
    fds: Vec<OwnedFd>,
}

impl Decoder {
    /// Ready for the first byte of a message.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// How many bytes complete the part being read. Never 0.
    pub fn wanted(&self) -> usize {
        match self.header_have {
            HEADER_BYTES => self.payload.len() - self.payload_have,
            have => HEADER_BYTES - have,
        }
    }

    /// Whether a message has begun and is not complete.
    pub fn is_inside(&self) -> bool {
        self.header_have > 0
    }

    /// Take file descriptors that came with the bytes handed to the next [`Decoder::push`].
    pub fn push_fds(&mut self, fds: impl IntoIterator<Item = OwnedFd>) -> Result<(), WireFault> {
        for fd in fds {
            if self.fds.len() == FDS_MAX {
                return Err(WireFault::Fds);
            }
            self.fds.push(fd);
        }
        Ok(())
    }

    /// Take bytes from the front of `input`, up to the end of a message.
    pub fn push(&mut self, input: &mut &[u8]) -> Result<Option<Message>, WireFault> {
        if self.header_have < HEADER_BYTES {
            let n = take(input, &mut self.header[self.header_have..]);
            self.header_have += n;
            if self.header_have < HEADER_BYTES {
                return Ok(None);
            }
            let size = self.check_header()?;
            self.payload.resize(size, 0);
        }
        let n = take(input, &mut self.payload[self.payload_have..]);
        self.payload_have += n;
        if self.payload_have < self.payload.len() {
            return Ok(None);
        }
        let header = self.header();
        let message = Message {
            request: Request(header.request),
            need_reply: header.flags & FLAG_NEED_REPLY != 0,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        };
        (self.header_have, self.payload_have) = (0, 0);
        Ok(Some(message))
    }

    /// The peer closed the connection: between messages, or in the middle of one?
    pub fn end(&self) -> Result<(), WireFault> {
        match self.is_inside() {
            true => Err(WireFault::Truncated),
            false => Ok(()),
        }
    }

    fn header(&self) -> Header {
        zerocopy::transmute!(self.header)
    }

    fn check_header(&self) -> Result<usize, WireFault> {
        let header = self.header();
        let request = Request(header.request);
        if header.flags & VERSION_MASK != VERSION {
            return Err(WireFault::Version(header.flags));
        }
        if header.flags & FLAG_REPLY != 0 {
            return Err(WireFault::Reply(request));
        }
        match usize::try_from(header.size) {
            Ok(size) if size <= PAYLOAD_BYTES_MAX => Ok(size),
            _ => Err(WireFault::Size { request, size: header.size }),
        }
    }
}

fn take(input: &mut &[u8], to: &mut [u8]) -> usize {
    let n = input.len().min(to.len());
    let (now, rest) = input.split_at(n);
    to[..n].copy_from_slice(now);
    *input = rest;
    n
}

/// A message whose form is right; whether it makes sense now is for the session to say.
#[derive(Debug)]
pub enum Command {
    /// Ask for the offered feature bits.
    GetFeatures,
    /// Choose among them.
    SetFeatures(u64),
    /// Start of a session.
    SetOwner,
    /// Deprecated and without effect.
    ResetOwner,
    /// Replace all memory regions.
    SetMemTable(Vec<(MemoryRegion, OwnedFd)>),
    /// Mark dirty pages there.
    SetLogBase(LogDescription, OwnedFd),
    /// Eventfd to tell that pages were marked.
    SetLogFd(OwnedFd),
    /// Socket for requests of ours.
    SetBackendReqFd(OwnedFd),
    /// Virtio device status.
    SetStatus(u64),
    /// Ask for it.
    GetStatus,
    /// Size of a ring.
    SetVringNum(VringState),
    /// Place of a ring.
    SetVringAddr(VringAddr),
    /// Where to go on in the available ring.
    SetVringBase(VringState),
    /// Stop a ring and tell where it was.
    GetVringBase {
        /// Ring number.
        index: u32,
    },
    /// Eventfd of the driver's notifications.
    SetVringKick(VringFd),
    /// Eventfd for the device's notifications.
    SetVringCall(VringFd),
    /// Eventfd for a broken ring.
    SetVringErr(VringFd),
    /// Ask for the offered protocol feature bits.
    GetProtocolFeatures,
    /// Choose among them.
    SetProtocolFeatures(u64),
    /// Ask how many rings there can be.
    GetQueueNum,
    /// Let a ring be processed, or pause it.
    SetVringEnable(VringState),
    /// Read configuration space.
    GetConfig {
        /// First byte.
        offset: u32,
        /// Number of bytes.
        size: u32,
    },
    /// Write configuration space.
    SetConfig {
        /// First byte.
        offset: u32,
        /// 0: the driver wrote it; 1: it is restored after a migration.
        flags: u32,
        /// New contents.
        bytes: Vec<u8>,
    },
    /// Make memory to record requests in flight.
    GetInflightFd {
        /// For which queues.
        description: InflightDescription,
        /// Length of the description, and of the one in the answer.
        len: usize,
    },
    /// Record requests in flight there.
    SetInflightFd(InflightDescription, OwnedFd),
    /// Stop all rings and forget what a driver set.
    ResetDevice,
    /// Ask how many memory regions there can be.
    GetMaxMemSlots,
    /// Add one memory region.
    AddMemReg(MemoryRegion, OwnedFd),
    /// Remove one memory region.
    RemMemReg(MemoryRegion),
    /// A message that is not defined, or belongs to a feature that is not offered.
    Unknown(Request),
}

/// A ring's eventfd.
#[derive(Debug)]
pub struct VringFd {
    /// Ring number.
    pub index: u32,
    /// None: the peer says that there is none.
    pub fd: Option<OwnedFd>,
}

/// The form of a message is wrong, but the stream is intact.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Wrong payload length.
    #[error("{request} has {len} bytes of payload")]
    Length {
        /// Message type.
        request: Request,
        /// Length of its payload.
        len: usize,
    },
    /// File descriptors missing or too many.
    #[error("{request} came with {count} file descriptors")]
    Fds {
        /// Message type.
        request: Request,
        /// How many came.
        count: usize,
    },
}

/// The vring index of SET_VRING_{KICK,CALL,ERR}.
const VRING_FD_INDEX_MASK: u64 = 0xff;
/// "Bit 8 is the invalid FD flag. This flag is set when there is no file descriptor in the
/// ancillary data" (vhost-user protocol, VHOST_USER_SET_VRING_KICK).
const VRING_FD_NONE: u64 = 1 << 8;

impl Message {
    /// Check length and file descriptors and split the payload into its fields.
    pub fn parse(self) -> Result<Command, Malformed> {
        let Message { request, payload, mut fds, .. } = self;
        let payload = payload.as_slice();
        let count = fds.len();
        let length = Malformed::Length { request, len: payload.len() };
        let wrong_fds = Malformed::Fds { request, count };

        let fds_allowed = match request {
            Request::SET_MEM_TABLE => FDS_MAX,
            Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR => 1,
            Request::ADD_MEM_REG
            | Request::SET_INFLIGHT_FD
            | Request::SET_LOG_BASE
            | Request::SET_LOG_FD
            | Request::SET_BACKEND_REQ_FD => 1,
            // "The back-end SHOULD close the passed descriptor" (VHOST_USER_REM_MEM_REG).
            Request::REM_MEM_REG => 1,
            _ => 0,
        };
        if count > fds_allowed {
            return Err(wrong_fds);
        }

        match request {
            Request::GET_FEATURES => empty(request, payload, Command::GetFeatures),
            Request::SET_FEATURES => Ok(Command::SetFeatures(fixed(payload, length)?)),
            Request::SET_OWNER => empty(request, payload, Command::SetOwner),
            Request::RESET_OWNER => empty(request, payload, Command::ResetOwner),
            Request::SET_MEM_TABLE => {
                let regions = memory_table(payload).ok_or(length)?;
                if regions.len() != count {
                    return Err(wrong_fds);
                }
                Ok(Command::SetMemTable(regions.into_iter().zip(fds).collect()))
            }
            Request::SET_LOG_BASE => {
                let description = fixed(payload, length)?;
                Ok(Command::SetLogBase(description, fds.pop().ok_or(wrong_fds)?))
            }
            Request::SET_LOG_FD => {
                let fd = fds.pop().ok_or(wrong_fds)?;
                empty(request, payload, ()).map(|()| Command::SetLogFd(fd))
            }
            Request::SET_BACKEND_REQ_FD => {
                let fd = fds.pop().ok_or(wrong_fds)?;
                empty(request, payload, ()).map(|()| Command::SetBackendReqFd(fd))
            }
            Request::SET_STATUS => Ok(Command::SetStatus(fixed(payload, length)?)),
            Request::GET_STATUS => empty(request, payload, Command::GetStatus),
            Request::SET_VRING_NUM => Ok(Command::SetVringNum(fixed(payload, length)?)),
            Request::SET_VRING_ADDR => Ok(Command::SetVringAddr(fixed(payload, length)?)),
            Request::SET_VRING_BASE => Ok(Command::SetVringBase(fixed(payload, length)?)),
            Request::GET_VRING_BASE => {
                let state: VringState = fixed(payload, length)?;
                Ok(Command::GetVringBase { index: state.index })
            }
            Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR => {
                let value: u64 = fixed(payload, length)?;
                let fd = fds.pop();
                if fd.is_some() == (value & VRING_FD_NONE != 0) {
                    return Err(wrong_fds);
                }
                let index = (value & VRING_FD_INDEX_MASK) as u32;
                let vring = VringFd { index, fd };
                Ok(match request {
                    Request::SET_VRING_KICK => Command::SetVringKick(vring),
                    Request::SET_VRING_CALL => Command::SetVringCall(vring),
                    _ => Command::SetVringErr(vring),
                })
            }
            Request::GET_PROTOCOL_FEATURES => empty(request, payload, Command::GetProtocolFeatures),
            Request::SET_PROTOCOL_FEATURES => {
                Ok(Command::SetProtocolFeatures(fixed(payload, length)?))
            }
            Request::GET_QUEUE_NUM => empty(request, payload, Command::GetQueueNum),
            Request::SET_VRING_ENABLE => Ok(Command::SetVringEnable(fixed(payload, length)?)),
            Request::GET_CONFIG => {
                let (header, bytes) = config(payload).ok_or(length)?;
                let ConfigHeader { offset, size, .. } = header;
                debug_assert_eq!(bytes.len(), size as usize);
                Ok(Command::GetConfig { offset, size })
            }
            Request::SET_CONFIG => {
                let (header, bytes) = config(payload).ok_or(length)?;
                let ConfigHeader { offset, flags, .. } = header;
                Ok(Command::SetConfig { offset, flags, bytes: bytes.to_vec() })
            }
            Request::GET_INFLIGHT_FD => {
                let description = inflight(payload).ok_or(length)?;
                Ok(Command::GetInflightFd { description, len: payload.len() })
            }
            Request::SET_INFLIGHT_FD => {
                let description = inflight(payload).ok_or(length)?;
                Ok(Command::SetInflightFd(description, fds.pop().ok_or(wrong_fds)?))
            }
            Request::RESET_DEVICE => empty(request, payload, Command::ResetDevice),
            Request::GET_MAX_MEM_SLOTS => empty(request, payload, Command::GetMaxMemSlots),
            Request::ADD_MEM_REG => {
                let region = single_region(payload).ok_or(length)?;
                Ok(Command::AddMemReg(region, fds.pop().ok_or(wrong_fds)?))
            }
            Request::REM_MEM_REG => Ok(Command::RemMemReg(single_region(payload).ok_or(length)?)),
            _ => Ok(Command::Unknown(request)),
        }
    }
}

fn empty<T>(request: Request, payload: &[u8], command: T) -> Result<T, Malformed> {
    match payload.is_empty() {
        true => Ok(command),
        false => Err(Malformed::Length { request, len: payload.len() }),
    }
}

fn fixed<T: FromBytes>(payload: &[u8], length: Malformed) -> Result<T, Malformed> {
    T::read_from_bytes(payload).map_err(|_| length)
}

/// A count, padding, and that many regions.
fn memory_table(payload: &[u8]) -> Option<Vec<MemoryRegion>> {
    let (count, rest) = u32::read_from_prefix(payload).ok()?;
    let count = usize::try_from(count).ok().filter(|n| *n <= FDS_MAX)?;
    let (_padding, rest) = u32::read_from_prefix(rest).ok()?;
    if rest.len() != count * size_of::<MemoryRegion>() {
        return None;
    }
    let regions = rest.chunks_exact(size_of::<MemoryRegion>());
    regions.map(|bytes| MemoryRegion::read_from_bytes(bytes).ok()).collect()
}

/// Padding and one region.
fn single_region(payload: &[u8]) -> Option<MemoryRegion> {
    let (_padding, rest) = u64::read_from_prefix(payload).ok()?;
    MemoryRegion::read_from_bytes(rest).ok()
}

/// With or without the padding at its end.
fn inflight(payload: &[u8]) -> Option<InflightDescription> {
    let mut bytes = [0; size_of::<InflightDescription>()];
    if payload.len() != INFLIGHT_BYTES_SHORT && payload.len() != bytes.len() {
        return None;
    }
    bytes[..payload.len()].copy_from_slice(payload);
    Some(zerocopy::transmute!(bytes))
}

fn config(payload: &[u8]) -> Option<(ConfigHeader, &[u8])> {
    let (header, bytes) = ConfigHeader::read_from_prefix(payload).ok()?;
    (bytes.len() == usize::try_from(header.size).ok()?).then_some((header, bytes))
}

/// A reply of any payload.
pub fn reply(request: Request, payload: &[u8]) -> Vec<u8> {
    message(request, VERSION | FLAG_REPLY, payload)
}

/// A reply that carries one number: features, a count, or an acknowledgement (0: done).
pub fn reply_u64(request: Request, value: u64) -> Vec<u8> {
    reply(request, value.as_bytes())
}

/// The reply to GET_VRING_BASE.
pub fn reply_vring_base(index: u32, base: u32) -> Vec<u8> {
    let state = VringState { index, num: base };
    reply(Request::GET_VRING_BASE, state.as_bytes())
}

/// The reply to GET_CONFIG: exactly as many bytes as were asked for.
pub fn reply_config(offset: u32, bytes: &[u8]) -> Vec<u8> {
    let header = ConfigHeader { offset, size: bytes.len() as u32, flags: 0 };
    let mut payload = header.as_bytes().to_vec();
    payload.extend_from_slice(bytes);
    reply(Request::GET_CONFIG, &payload)
}

/// The reply to GET_INFLIGHT_FD, of the length that was asked with.
pub fn reply_inflight(description: &InflightDescription, len: usize) -> Vec<u8> {
    let bytes = description.as_bytes();
    reply(Request::GET_INFLIGHT_FD, &bytes[..len.min(bytes.len())])
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, a request of ours. No answer is asked for.
pub fn config_change() -> Vec<u8> {
    const CONFIG_CHANGE_MSG: Request = Request(2);
    message(CONFIG_CHANGE_MSG, VERSION, &[])
}

fn message(request: Request, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { request: request.0, flags, size: payload.len() as u32 };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A request as a frontend sends it. For tests and test clients.
pub fn request(request: Request, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = if need_reply { VERSION | FLAG_NEED_REPLY } else { VERSION };
    message(request, flags, payload)
}

#[cfg(test)]
mod tests;
