//! vfio-user messages on the wire (vfio-user, "Protocol Specification"): a decoder that takes the
//! byte stream in any pieces, and the structures of payloads.
//!
//! Fields are in the byte order of the machine: both ends share memory, so they share it too.

use std::fmt;
use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of a message header.
pub const HEADER_BYTES: usize = 16;
/// Most data bytes of one access or piece of migration data, our `max_data_xfer_size`. No register
/// needs more than 8; what is larger is configuration space as a whole and migration data.
pub const DATA_BYTES_MAX: usize = 64 << 10;
/// Longest payload taken: data and the longest header in front of it.
pub const PAYLOAD_BYTES_MAX: usize = DATA_BYTES_MAX + 32;
/// Most file descriptors with one message, our `max_msg_fds`. QEMU refuses more than 16.
pub const FDS_MAX: usize = 16;

/// What a message asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Command(pub u16);

macro_rules! commands {
    ($($name:ident = $value:literal,)*) => {
        impl Command {
            $(#[doc = concat!("VFIO_USER_", stringify!($name), ".")]
            pub const $name: Command = Command($value);)*

            fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

commands! {
    VERSION = 1,
    DMA_MAP = 2,
    DMA_UNMAP = 3,
    DEVICE_GET_INFO = 4,
    DEVICE_GET_REGION_INFO = 5,
    DEVICE_GET_REGION_IO_FDS = 6,
    DEVICE_GET_IRQ_INFO = 7,
    DEVICE_SET_IRQS = 8,
    REGION_READ = 9,
    REGION_WRITE = 10,
    DMA_READ = 11,
    DMA_WRITE = 12,
    DEVICE_RESET = 13,
    REGION_WRITE_MULTI = 15,
    DEVICE_FEATURE = 16,
    MIG_DATA_READ = 17,
    MIG_DATA_WRITE = 18,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "command {}", self.0),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

const TYPE_MASK: u32 = 0xF;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// The header of every message (vfio-user, "Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The sender's; echoed in the reply. "The receiver must not make any assumptions about their
    /// uniqueness."
    pub id: u16,
    /// [`Command`].
    pub command: u16,
    /// Of the whole message, this header included.
    pub size: u32,
    /// Type in bits 3:0, no reply wanted, error.
    pub flags: u32,
    /// An errno, in a reply with the error bit.
    pub error: u32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

macro_rules! payload {
    ($(#[$doc:meta])* $name:ident, $bytes:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

payload! {
    /// What VERSION begins with, in both directions.
    Version, 4 {
        /// Incompatible changes.
        major: u16,
        /// Compatible changes.
        minor: u16,
    }
}

payload! {
    /// DMA_MAP.
    DmaMap, 32 {
        /// Size of this structure.
        argsz: u32,
        /// [`DmaMap::READ`], [`DmaMap::WRITE`].
        flags: u32,
        /// Where in the file.
        offset: u64,
        /// First guest address.
        address: u64,
        /// Bytes.
        size: u64,
    }
}

impl DmaMap {
    /// The device may read it.
    pub const READ: u32 = 1 << 0;
    /// The device may write it.
    pub const WRITE: u32 = 1 << 1;
}

payload! {
    /// DMA_UNMAP, and its reply.
    DmaUnmap, 24 {
        /// Most bytes of the reply.
        argsz: u32,
        /// [`DmaUnmap::ALL`]; 0 in the vfio-user document, but its reference implementation knows
        /// those of `struct vfio_iommu_type1_dma_unmap`.
        flags: u32,
        /// First guest address.
        address: u64,
        /// Bytes.
        size: u64,
    }
}

impl DmaUnmap {
    /// Unmap everything; address and size are 0.
    pub const ALL: u32 = 1 << 1;
}

payload! {
    /// DEVICE_GET_INFO, and its reply.
    DeviceInfo, 16 {
        /// Most bytes of the reply; in the reply, how many it takes.
        argsz: u32,
        /// `VFIO_DEVICE_FLAGS_*`.
        flags: u32,
        /// Number of regions.
        num_regions: u32,
        /// Number of kinds of interrupts.
        num_irqs: u32,
    }
}

payload! {
    /// DEVICE_GET_REGION_INFO, and the first part of its reply.
    RegionInfo, 32 {
        /// Most bytes of the reply; in the reply, how many it takes.
        argsz: u32,
        /// `VFIO_REGION_INFO_FLAG_*`.
        flags: u32,
        /// Which region.
        index: u32,
        /// Where the capabilities are in the reply.
        cap_offset: u32,
        /// Bytes in the region.
        size: u64,
        /// Where the region is in its file.
        offset: u64,
    }
}

payload! {
    /// The capability that tells which areas of a region can be mapped, followed by those areas
    /// (`struct vfio_region_info_cap_sparse_mmap`).
    SparseMmap, 16 {
        /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
        id: u16,
        /// 1.
        version: u16,
        /// Where the next capability is; 0: there is none.
        next: u32,
        /// Number of areas.
        nr_areas: u32,
        /// 0.
        reserved: u32,
    }
}

payload! {
    /// DEVICE_GET_REGION_IO_FDS, and the first part of its reply.
    RegionIoFds, 16 {
        /// Most bytes of the reply; in the reply, how many it takes.
        argsz: u32,
        /// 0.
        flags: u32,
        /// Which region.
        index: u32,
        /// Number of sub-regions that follow.
        count: u32,
    }
}

payload! {
    /// DEVICE_GET_IRQ_INFO, and its reply.
    IrqInfo, 16 {
        /// Most bytes of the reply; in the reply, how many it takes.
        argsz: u32,
        /// `VFIO_IRQ_INFO_*`.
        flags: u32,
        /// Which kind.
        index: u32,
        /// Number of vectors.
        count: u32,
    }
}

payload! {
    /// DEVICE_SET_IRQS, perhaps followed by booleans of a byte each.
    IrqSet, 20 {
        /// Size of this structure and what follows it.
        argsz: u32,
        /// `VFIO_IRQ_SET_*`.
        flags: u32,
        /// Which kind.
        index: u32,
        /// First vector.
        start: u32,
        /// Number of vectors.
        count: u32,
    }
}

payload! {
    /// REGION_READ and REGION_WRITE, and their replies; data may follow. Also what each write of
    /// REGION_WRITE_MULTI begins with.
    RegionAccess, 16 {
        /// First byte in the region.
        offset: u64,
        /// Which region.
        region: u32,
        /// Bytes of data.
        count: u32,
    }
}

/// Bytes of one write of REGION_WRITE_MULTI: a [`RegionAccess`] and 8 bytes of data.
pub const MULTI_WRITE_BYTES: usize = 24;

payload! {
    /// What DEVICE_FEATURE begins with, in both directions.
    DeviceFeature, 8 {
        /// Most bytes of the reply; in the reply, how many it takes.
        argsz: u32,
        /// Index of the feature and `VFIO_DEVICE_FEATURE_*`.
        flags: u32,
    }
}

payload! {
    /// Data of the feature MIG_DEVICE_STATE.
    MigState, 8 {
        /// `VFIO_DEVICE_STATE_*`.
        device_state: u32,
        /// Not used.
        data_fd: u32,
    }
}

payload! {
    /// Data of the feature DMA_LOGGING_START, followed by ranges.
    LoggingControl, 16 {
        /// Wanted bytes in a page; in the reply, those taken.
        page_size: u64,
        /// Number of ranges that follow.
        num_ranges: u32,
        /// 0.
        reserved: u32,
    }
}

payload! {
    /// One range of DMA_LOGGING_START.
    LoggingRange, 16 {
        /// First guest address.
        iova: u64,
        /// Bytes.
        length: u64,
    }
}

payload! {
    /// Data of the feature DMA_LOGGING_REPORT; a bitmap follows in the reply.
    LoggingReport, 24 {
        /// First guest address.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes per bit.
        page_size: u64,
    }
}

payload! {
    /// What MIG_DATA_READ and MIG_DATA_WRITE begin with.
    MigData, 8 {
        /// Most bytes of the reply, or its size.
        argsz: u32,
        /// Bytes of data.
        size: u32,
    }
}

/// A whole message of the client.
#[derive(Debug)]
pub struct Message {
    /// To be echoed.
    pub id: u16,
    /// What it asks for.
    pub command: Command,
    /// The client does not want an answer, be it good or bad.
    pub no_reply: bool,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// The stream cannot be understood any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireFault {
    /// Shorter than its header, or longer than can be taken.
    #[error("a message of {0} bytes")]
    Size(u32),
    /// Neither command nor anything we could have asked for.
    #[error("message flags {0:#x}: not a command")]
    Flags(u32),
    /// More than were allowed.
    #[error("more than {FDS_MAX} file descriptors with a message")]
    Fds,
    /// The peer has closed too early.
    #[error("the connection ended in the middle of a message")]
    Truncated,
}

/// Cuts the byte stream into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER_BYTES],
    /// Bytes of the header that are here.
    header_len: usize,
    /// Bytes of the payload that are missing.
    missing: usize,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Decoder {
    /// At the beginning of a stream.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Bytes that the message at hand still needs before it can say more; never 0. Who reads no
    /// more than that at once knows which message file descriptors belong to.
    pub fn wanted(&self) -> usize {
        if self.header_len < HEADER_BYTES { HEADER_BYTES - self.header_len } else { self.missing }
    }

    /// Nothing of a message is here.
    pub fn is_between(&self) -> bool {
        self.header_len == 0 && self.fds.is_empty()
    }

    /// File descriptors came with the bytes that will be pushed next.
    pub fn push_fds(&mut self, fds: impl IntoIterator<Item = OwnedFd>) -> Result<(), WireFault> {
        for fd in fds {
            if self.fds.len() == FDS_MAX {
                return Err(WireFault::Fds);
            }
            self.fds.push(fd);
        }
        Ok(())
    }

    /// Bytes came. Takes what belongs to the message at hand off the front of `input`; gives the
    /// message when it is whole.
    pub fn push(&mut self, input: &mut &[u8]) -> Result<Option<Message>, WireFault> {
        if self.header_len < HEADER_BYTES {
            let (taken, rest) = input.split_at(input.len().min(HEADER_BYTES - self.header_len));
            self.header[self.header_len..self.header_len + taken.len()].copy_from_slice(taken);
            self.header_len += taken.len();
            *input = rest;
            if self.header_len < HEADER_BYTES {
                return Ok(None);
            }
            let header: Header = zerocopy::transmute!(self.header);
            let len = (header.size as usize).checked_sub(HEADER_BYTES);
            self.missing = match len {
                Some(len) if len <= PAYLOAD_BYTES_MAX => len,
                _ => return Err(WireFault::Size(header.size)),
            };
            // We never ask the client for anything, so a reply answers nothing.
            if header.flags & TYPE_MASK != TYPE_COMMAND {
                return Err(WireFault::Flags(header.flags));
            }
            self.payload.reserve_exact(self.missing);
        }
        let (taken, rest) = input.split_at(input.len().min(self.missing));
        self.payload.extend_from_slice(taken);
        self.missing -= taken.len();
        *input = rest;
        if self.missing > 0 {
            return Ok(None);
        }
        let header: Header = zerocopy::transmute!(self.header);
        self.header_len = 0;
        Ok(Some(Message {
            id: header.id,
            command: Command(header.command),
            no_reply: header.flags & FLAG_NO_REPLY != 0,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// The stream has ended.
    pub fn end(&self) -> Result<(), WireFault> {
        if self.is_between() { Ok(()) } else { Err(WireFault::Truncated) }
    }
}

/// A command, as a client sends it.
pub fn command(id: u16, command: Command, no_reply: bool, payload: &[&[u8]]) -> Vec<u8> {
    let flags = TYPE_COMMAND | if no_reply { FLAG_NO_REPLY } else { 0 };
    message(Header { id, command: command.0, size: 0, flags, error: 0 }, payload)
}

/// A reply to the message `id`.
pub fn reply(id: u16, command: Command, payload: &[&[u8]]) -> Vec<u8> {
    message(Header { id, command: command.0, size: 0, flags: TYPE_REPLY, error: 0 }, payload)
}

/// A reply that says why not. "If an error occurs, the reply message must only include the reply
/// header."
pub fn error_reply(id: u16, command: Command, errno: i32) -> Vec<u8> {
    let flags = TYPE_REPLY | FLAG_ERROR;
    let error = errno.unsigned_abs();
    message(Header { id, command: command.0, size: 0, flags, error }, &[])
}

/// Whether a header is that of a reply, and the errno if it is one that says why not.
pub fn reply_outcome(header: &Header) -> Option<Result<(), i32>> {
    (header.flags & TYPE_MASK == TYPE_REPLY).then(|| match header.flags & FLAG_ERROR {
        0 => Ok(()),
        _ => Err(header.error.cast_signed()),
    })
}

fn message(mut header: Header, payload: &[&[u8]]) -> Vec<u8> {
    let len = HEADER_BYTES + payload.iter().map(|part| part.len()).sum::<usize>();
    header.size = u32::try_from(len).expect("replies are bounded");
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(header.as_bytes());
    for part in payload {
        bytes.extend_from_slice(part);
    }
    bytes
}

#[cfg(test)]
mod tests;
