//! One frontend's session: a state machine from messages to replies and actions.
//!
//! The session knows what the frontend has set up and decides what follows from it; it moves no
//! byte and runs no ring. [`Session::on_message`] gives [`Action`]s for the cores that run the
//! queues. While any is outstanding the driver takes no further message; when all are done it
//! calls [`Session::on_done`], and only then the reply goes out. So a reply always tells the
//! truth: a stopped ring has stopped, a new memory table is in use.
//!
//! An error is answered if the frontend asked for an acknowledgement, and ends the connection if
//! it did not. It is never passed over, because some frontends would wait for ever.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use iobuf::{BadMemory, GuestMemory, GuestRegion, GuestSlice};
use rustix::fs::{MemfdFlags, OFlags, SealFlags};

use super::wire::{
    self, Command, InflightDescription, LogDescription, Malformed, MemoryRegion, Message, Request,
    VringAddr, VringFd,
};
use crate::device::{CONFIG_BYTES_MAX, CONFIG_WRITEBACK_OFFSET, Device, Features};
use crate::queue::QUEUE_SIZE_MAX;
use crate::queue::inflight::InflightLayout;

/// `VHOST_SET_CONFIG_TYPE_MIGRATION`: what is restored after a migration, not what a driver wrote.
const CONFIG_FLAG_MIGRATION: u32 = 1;

/// Most memory regions, the answer to GET_MAX_MEM_SLOTS.
pub const MEM_SLOTS_MAX: usize = 256;

/// Protocol feature bits (vhost-user protocol, "Protocol features").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProtocolFeatures(pub u64);

impl ProtocolFeatures {
    /// More than one ring.
    pub const MQ: ProtocolFeatures = ProtocolFeatures(1 << 0);
    /// Dirty pages are marked in shared memory.
    pub const LOG_SHMFD: ProtocolFeatures = ProtocolFeatures(1 << 1);
    /// Messages can be acknowledged.
    pub const REPLY_ACK: ProtocolFeatures = ProtocolFeatures(1 << 3);
    /// The backend can send requests of its own.
    pub const BACKEND_REQ: ProtocolFeatures = ProtocolFeatures(1 << 5);
    /// Configuration space is the backend's.
    pub const CONFIG: ProtocolFeatures = ProtocolFeatures(1 << 9);
    /// Requests in flight are recorded in memory that outlives the device.
    pub const INFLIGHT_SHMFD: ProtocolFeatures = ProtocolFeatures(1 << 12);
    /// The device can be reset.
    pub const RESET_DEVICE: ProtocolFeatures = ProtocolFeatures(1 << 13);
    /// Memory regions come and go one at a time.
    pub const CONFIGURE_MEM_SLOTS: ProtocolFeatures = ProtocolFeatures(1 << 15);
    /// The backend keeps the virtio device status.
    pub const STATUS: ProtocolFeatures = ProtocolFeatures(1 << 16);

    /// All that are offered.
    pub const OFFERED: ProtocolFeatures = ProtocolFeatures(
        ProtocolFeatures::MQ.0
            | ProtocolFeatures::LOG_SHMFD.0
            | ProtocolFeatures::BACKEND_REQ.0
            | ProtocolFeatures::STATUS.0
            | ProtocolFeatures::REPLY_ACK.0
            | ProtocolFeatures::CONFIG.0
            | ProtocolFeatures::INFLIGHT_SHMFD.0
            | ProtocolFeatures::RESET_DEVICE.0
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS.0,
    );

    const fn has(self, other: ProtocolFeatures) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What the cores have to do before a message is answered.
#[derive(Debug)]
pub enum Action {
    /// Serve a ring.
    Start(Box<RingStart>),
    /// Stop a ring. Done when its last request is back; the result is its next available index.
    Stop {
        /// Ring number.
        index: u16,
        /// Whoever serves the ring next has its record of requests in flight, if it has one: a
        /// request that does not come back may be left there. If not, it has to be answered.
        is_kept: bool,
    },
    /// Use another memory table for all running rings.
    SetMemory {
        /// The new table.
        memory: GuestMemory,
        /// Regions have gone, so requests admitted under the old table should come back first.
        has_removed: bool,
    },
    /// Take new requests, or leave them in the ring.
    SetEnabled {
        /// Ring number.
        index: u16,
        /// Take them.
        is_enabled: bool,
    },
    /// Another eventfd for the driver's notifications. None: poll.
    SetKick {
        /// Ring number.
        index: u16,
        /// Eventfd.
        kick: Option<OwnedFd>,
    },
    /// Another eventfd for the device's notifications. None: do not notify.
    SetCall {
        /// Ring number.
        index: u16,
        /// Eventfd.
        call: Option<Arc<OwnedFd>>,
    },
    /// Another eventfd to tell that the ring is broken.
    SetErr {
        /// Ring number.
        index: u16,
        /// Eventfd.
        err: Option<Arc<OwnedFd>>,
    },
    /// Every write must be durable before it completes, or need not.
    SetWriteThrough(bool),
    /// Mark dirty pages, or mark them elsewhere, or no longer.
    SetLogging {
        /// Ring number.
        index: u16,
        /// Where and what.
        logging: Option<Logging>,
    },
}

/// What of a ring's writes is marked as dirty, and where.
#[derive(Clone, Debug)]
pub struct Logging {
    /// The log.
    memory: GuestMemory,
    len: u64,
    /// Mark data and status bytes.
    pub data: bool,
    /// Mark writes to the device area, which begins at this address.
    pub used: Option<u64>,
    /// Eventfd to tell that something was marked.
    pub eventfd: Option<Arc<OwnedFd>>,
}

impl Logging {
    /// The bitmap, for the calling core.
    pub fn bitmap(&self) -> Option<GuestSlice> {
        self.memory.view().slice(0, self.len).ok()
    }
}

/// All about a ring that starts.
#[derive(Debug)]
pub struct RingStart {
    /// Ring number.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Where the ring is, in the frontend's addresses.
    pub address: VringAddr,
    /// Where to go on, as SET_VRING_BASE says it.
    pub base: u32,
    /// Where to record requests in flight.
    pub inflight: Option<Inflight>,
    /// Negotiated features.
    pub features: Features,
    /// Every write must be durable before it completes.
    pub write_through: bool,
    /// Dirty pages are to be marked.
    pub logging: Option<Logging>,
    /// Memory table.
    pub memory: GuestMemory,
    /// Eventfd of the driver's notifications; None: poll.
    pub kick: Option<OwnedFd>,
    /// Eventfd for the device's notifications.
    pub call: Option<Arc<OwnedFd>>,
    /// Eventfd for a broken ring.
    pub err: Option<Arc<OwnedFd>>,
}

/// Memory of the frontend's that records requests in flight.
#[derive(Clone, Debug)]
pub struct Inflight {
    memory: GuestMemory,
    layout: InflightLayout,
}

impl Inflight {
    /// A queue's part of it. None: nothing of this queue is recorded.
    pub fn queue(&self, index: u16, features: Features) -> Option<GuestSlice> {
        if index >= self.layout.queues {
            return None;
        }
        let is_packed = features.has(Features::RING_PACKED);
        let at = u64::from(index) * self.layout.queue_bytes(is_packed);
        self.memory.view().slice(at, self.layout.record_bytes(is_packed)).ok()
    }
}

/// Why a message was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Wrong length or number of file descriptors.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Not defined, not offered or not negotiated.
    #[error("{0} is not supported or was not negotiated")]
    Unsupported(Request),
    /// Feature bits that were not offered.
    #[error("feature bits {0:#x} were set but not offered")]
    Features(u64),
    /// No such ring.
    #[error("ring {index} does not exist, there are {queues}")]
    Index {
        /// Ring number.
        index: u32,
        /// Number of rings.
        queues: u16,
    },
    /// Cannot be changed now.
    #[error("{request} while ring {index} is running")]
    Running {
        /// Message type.
        request: Request,
        /// Ring number.
        index: u16,
    },
    /// Bad ring size.
    #[error("ring size {size} is not a power of two from 1 to {max}")]
    RingSize {
        /// Asked for.
        size: u32,
        /// Allowed.
        max: u16,
    },
    /// Bad ring index.
    #[error("available index {0} does not fit in 16 bits")]
    RingBase(u32),
    /// Ring pointers lead nowhere.
    #[error("ring {0} does not lie in the memory that was shared")]
    RingAddress(u16),
    /// No device status.
    #[error("device status {0:#x} has more than 8 bits")]
    Status(u64),
    /// Neither 0 nor 1.
    #[error("SET_VRING_ENABLE to {0}")]
    Enable(u32),
    /// A memory region could not be mapped.
    #[error("memory region of {size} bytes at guest address {guest_addr:#x}: {error}")]
    Map {
        /// Guest address.
        guest_addr: u64,
        /// Length.
        size: u64,
        /// What the kernel or the check said.
        #[source]
        error: io::Error,
    },
    /// Overlapping regions.
    #[error(transparent)]
    Memory(#[from] BadMemory),
    /// Too many regions.
    #[error("more than {MEM_SLOTS_MAX} memory regions")]
    MemSlots,
    /// No such region.
    #[error("no memory region of {size} bytes at guest address {guest_addr:#x}")]
    NoRegion {
        /// Guest address.
        guest_addr: u64,
        /// Length.
        size: u64,
    },
    /// Not an eventfd, so nothing to wait for or to signal.
    #[error("{request} for ring {index} came with {found} instead of an eventfd")]
    NotEventfd {
        /// Message type.
        request: Request,
        /// Ring number.
        index: u16,
        /// What it is.
        found: String,
    },
    /// Configuration space out of range or read-only.
    #[error("{request} of {size} bytes at offset {offset} is not possible")]
    Config {
        /// Message type.
        request: Request,
        /// First byte.
        offset: u32,
        /// Number of bytes.
        size: u32,
    },
    /// Memory for requests in flight that no ring could use.
    #[error("{queues} queues of {queue_size} descriptors cannot be recorded in {bytes} bytes")]
    Inflight {
        /// Queues asked for.
        queues: u16,
        /// Descriptors of each.
        queue_size: u16,
        /// Length of the memory.
        bytes: u64,
    },
    /// The log of dirty pages.
    #[error("log of dirty pages of {bytes} bytes: {error}")]
    Log {
        /// Length.
        bytes: u64,
        /// What the kernel or the check said.
        #[source]
        error: io::Error,
    },
    /// No memory for requests in flight.
    #[error("memory for requests in flight: {0}")]
    InflightMemory(#[source] io::Error),
    /// The core could not do what was asked.
    #[error("{0}")]
    Core(String),
}

/// What follows from a message.
#[derive(Debug, Default)]
pub struct Step {
    /// To be done by the cores, in this order. If there are any, [`Session::on_done`] gives the
    /// reply.
    pub actions: Vec<Action>,
    /// To be sent now.
    pub reply: Option<Vec<u8>>,
    /// To be sent with the reply.
    pub fd: Option<OwnedFd>,
}

#[derive(Debug, Default)]
enum Kick {
    #[default]
    Unset,
    Poll,
    Eventfd(OwnedFd),
}

#[derive(Debug, Default)]
struct Ring {
    /// 0: not set.
    size: u16,
    address: Option<VringAddr>,
    base: u32,
    kick: Kick,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    is_enabled: bool,
    is_running: bool,
}

/// How a message is answered when its actions are done.
#[derive(Debug)]
enum Finish {
    /// With an acknowledgement or not at all.
    Ack,
    /// In any case.
    Done,
    VringBase(u16),
}

#[derive(Debug)]
struct Pending {
    request: Request,
    ack: bool,
    finish: Finish,
    /// Rings that start with it.
    starting: Vec<u16>,
}

/// A frontend's session.
#[derive(Debug)]
pub struct Session {
    device: Arc<Device>,
    queue_size_max: u16,
    /// None until SET_FEATURES.
    features: Option<Features>,
    protocol: ProtocolFeatures,
    /// What the driver wrote to `writeback`.
    writeback: Option<bool>,
    regions: Vec<Arc<GuestRegion>>,
    memory: GuestMemory,
    inflight: Option<Inflight>,
    log: Option<(GuestMemory, u64)>,
    log_fd: Option<Arc<OwnedFd>>,
    /// Socket for requests of ours that the driver has not taken yet.
    backend: Option<OwnedFd>,
    /// Virtio device status.
    status: u8,
    rings: Vec<Ring>,
    pending: Option<Pending>,
}

/// What a message's handler decided.
enum Reply {
    /// An acknowledgement when everything is done, if one is wanted.
    Ack,
    /// The same, wanted or not.
    Done,
    /// The ring's index when everything is done.
    VringBase(u16),
    U64(u64),
    Bytes(Vec<u8>),
    BytesAndFd(Vec<u8>, OwnedFd),
}

impl Session {
    /// A frontend has connected.
    pub fn new(device: Arc<Device>, queue_size_max: u16) -> Session {
        let rings = (0..device.queues()).map(|_| Ring::default()).collect();
        Session {
            device,
            queue_size_max,
            features: None,
            protocol: ProtocolFeatures::default(),
            writeback: None,
            regions: Vec::new(),
            memory: GuestMemory::default(),
            inflight: None,
            log: None,
            log_fd: None,
            backend: None,
            status: 0,
            rings,
            pending: None,
        }
    }

    /// Negotiated features, without those of vhost-user itself. None before they are set.
    pub fn features(&self) -> Option<Features> {
        self.features.map(Features::for_driver)
    }

    /// Negotiated protocol features.
    pub fn protocol(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// The device has changed: its configuration space is another from now on. What was negotiated
    /// stays.
    pub fn set_device(&mut self, device: Arc<Device>) {
        self.device = device;
    }

    /// The socket for requests of ours, if another one has come.
    pub fn take_backend(&mut self) -> Option<OwnedFd> {
        self.backend.take()
    }

    /// Whether actions are outstanding.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// A message came. An error ends the connection.
    ///
    /// # Panics
    ///
    /// If actions of the last message are outstanding.
    pub fn on_message(&mut self, message: Message) -> Result<Step, Refusal> {
        assert!(self.pending.is_none(), "a message while another is being carried out");
        let request = message.request;
        let ack = message.need_reply && self.protocol.has(ProtocolFeatures::REPLY_ACK);
        let mut actions = Vec::new();
        let reply = match self.carry_out(message, &mut actions) {
            Ok(reply) => reply,
            Err(refusal) => {
                let reply = refuse(request, ack, refusal)?;
                return Ok(Step { reply: Some(reply), ..Step::default() });
            }
        };
        let finish = match reply {
            Reply::Ack => Finish::Ack,
            Reply::Done => Finish::Done,
            Reply::VringBase(index) => Finish::VringBase(index),
            Reply::U64(value) => {
                let reply = Some(wire::reply_u64(request, value));
                return Ok(Step { actions, reply, fd: None });
            }
            Reply::Bytes(bytes) => return Ok(Step { actions, reply: Some(bytes), fd: None }),
            Reply::BytesAndFd(bytes, fd) => {
                return Ok(Step { actions, reply: Some(bytes), fd: Some(fd) });
            }
        };
        let starting = self.start_rings(&mut actions);
        let pending = Pending { request, ack, finish, starting };
        if actions.is_empty() {
            return Ok(Step { actions, reply: self.finish(&pending), fd: None });
        }
        self.pending = Some(pending);
        Ok(Step { actions, ..Step::default() })
    }

    /// All actions of the last message are done, or the first that failed has failed. `base` is
    /// what [`Action::Stop`] gave. The answer is a reply to send; an error ends the connection.
    ///
    /// # Panics
    ///
    /// If no action is outstanding.
    pub fn on_done(
        &mut self,
        outcome: Result<Option<u32>, String>,
    ) -> Result<Option<Vec<u8>>, Refusal> {
        let pending = self.pending.take().expect("actions are outstanding");
        match outcome {
            Ok(base) => {
                if let (Finish::VringBase(index), Some(base)) = (&pending.finish, base) {
                    self.rings[usize::from(*index)].base = base;
                }
                Ok(self.finish(&pending))
            }
            Err(error) => {
                for index in &pending.starting {
                    self.rings[usize::from(*index)].is_running = false;
                }
                // Of several rings some may have started: too much to take back.
                let ack = pending.ack && pending.starting.len() <= 1;
                refuse(pending.request, ack, Refusal::Core(error)).map(Some)
            }
        }
    }

    fn finish(&self, pending: &Pending) -> Option<Vec<u8>> {
        match pending.finish {
            Finish::VringBase(index) => {
                let base = self.rings[usize::from(index)].base;
                Some(wire::reply_vring_base(u32::from(index), base))
            }
            Finish::Done => Some(wire::reply_u64(pending.request, 0)),
            Finish::Ack => pending.ack.then(|| wire::reply_u64(pending.request, 0)),
        }
    }

    fn carry_out(&mut self, message: Message, actions: &mut Vec<Action>) -> Result<Reply, Refusal> {
        let request = message.request;
        match message.parse()? {
            Command::GetFeatures => Ok(Reply::U64(self.device.features().0)),
            Command::SetFeatures(bits) => self.set_features(Features(bits), actions),
            // There is one owner anyway: who is connected.
            Command::SetOwner => Ok(Reply::Ack),
            // "It is recommended that back-ends either ignore this message, or use it to disable
            // all rings" (vhost-user protocol, VHOST_USER_RESET_OWNER).
            Command::ResetOwner => Ok(Reply::Ack),
            Command::GetProtocolFeatures => Ok(Reply::U64(ProtocolFeatures::OFFERED.0)),
            Command::SetProtocolFeatures(bits) => {
                let unknown = bits & !ProtocolFeatures::OFFERED.0;
                if unknown != 0 {
                    return Err(Refusal::Features(unknown));
                }
                self.protocol = ProtocolFeatures(bits);
                Ok(Reply::Ack)
            }
            Command::GetQueueNum => Ok(Reply::U64(u64::from(self.device.queues()))),

            Command::SetMemTable(regions) => {
                let mut mapped = Vec::with_capacity(regions.len());
                for (region, fd) in regions {
                    mapped.push(map(&region, fd)?);
                }
                self.set_regions(mapped, true, actions)
            }
            Command::GetMaxMemSlots => {
                self.require(ProtocolFeatures::CONFIGURE_MEM_SLOTS, request)?;
                Ok(Reply::U64(MEM_SLOTS_MAX as u64))
            }
            Command::AddMemReg(region, fd) => {
                self.require(ProtocolFeatures::CONFIGURE_MEM_SLOTS, request)?;
                if self.regions.len() >= MEM_SLOTS_MAX {
                    return Err(Refusal::MemSlots);
                }
                let mut regions = self.regions.clone();
                regions.push(map(&region, fd)?);
                self.set_regions(regions, false, actions)
            }
            Command::RemMemReg(region) => {
                self.require(ProtocolFeatures::CONFIGURE_MEM_SLOTS, request)?;
                let MemoryRegion { guest_addr, size, user_addr, .. } = region;
                let is_meant = |r: &Arc<GuestRegion>| {
                    (r.guest_addr(), r.len(), r.user_addr()) == (guest_addr, size, user_addr)
                };
                let mut regions = self.regions.clone();
                let at = regions.iter().position(is_meant);
                regions.remove(at.ok_or(Refusal::NoRegion { guest_addr, size })?);
                self.set_regions(regions, true, actions)
            }

            Command::SetLogBase(LogDescription { mmap_size, mmap_offset }, fd) => {
                self.require(ProtocolFeatures::LOG_SHMFD, request)?;
                let region = GuestRegion::map(fd.as_fd(), mmap_offset, mmap_size, 0, 0)
                    .map_err(|error| Refusal::Log { bytes: mmap_size, error })?;
                self.log = Some((GuestMemory::new(vec![region])?, mmap_size));
                self.update_logging(actions);
                Ok(Reply::Done)
            }
            Command::SetLogFd(fd) => {
                self.log_fd = signal_fd(Some(fd), request, 0)?;
                self.update_logging(actions);
                Ok(Reply::Ack)
            }
            Command::SetBackendReqFd(fd) => {
                self.require(ProtocolFeatures::BACKEND_REQ, request)?;
                self.backend = Some(fd);
                Ok(Reply::Ack)
            }
            Command::SetStatus(status) => {
                self.require(ProtocolFeatures::STATUS, request)?;
                self.status = u8::try_from(status).map_err(|_| Refusal::Status(status))?;
                if self.status == 0 {
                    // A frontend also says so when it only pauses, with rings that are stopped
                    // already; RESET_DEVICE tells of the driver's reset. So nothing that a driver
                    // chose is forgotten here.
                    for (index, ring) in (0..).zip(&mut self.rings) {
                        ring.kick = Kick::Unset;
                        if std::mem::take(&mut ring.is_running) {
                            actions.push(Action::Stop { index, is_kept: false });
                        }
                    }
                }
                Ok(Reply::Ack)
            }
            Command::GetStatus => {
                self.require(ProtocolFeatures::STATUS, request)?;
                Ok(Reply::U64(u64::from(self.status)))
            }

            Command::SetVringNum(state) => {
                let (size, max) = (state.num, self.queue_size_max);
                let ring = self.stopped_ring(state.index, request)?;
                match u16::try_from(size) {
                    Ok(num) if num.is_power_of_two() && num <= max => ring.size = num,
                    _ => return Err(Refusal::RingSize { size, max }),
                }
                Ok(Reply::Ack)
            }
            Command::SetVringAddr(address) => {
                let (index, ring) = self.ring(address.index)?;
                let is_same_place = |old: &VringAddr| {
                    VringAddr { flags: address.flags, log: address.log, ..*old } == address
                };
                if ring.is_running && ring.address.as_ref().is_some_and(is_same_place) {
                    let is_changed = ring.address.replace(address) != Some(address);
                    if is_changed {
                        let logging = self.logging(index);
                        actions.push(Action::SetLogging { index, logging });
                    }
                    return Ok(Reply::Ack);
                }
                self.stopped_ring(address.index, request)?.address = Some(address);
                Ok(Reply::Ack)
            }
            Command::SetVringBase(state) => {
                if state.num > u32::from(u16::MAX) && !self.is_packed() {
                    return Err(Refusal::RingBase(state.num));
                }
                self.stopped_ring(state.index, request)?.base = state.num;
                Ok(Reply::Ack)
            }
            Command::GetVringBase { index } => {
                // A machine that is paused goes on with the record, one that moves elsewhere leaves it
                // behind: while it moves, dirty pages are marked.
                let is_moving = self.log.is_some()
                    && self.features.is_some_and(|features| features.has(Features::LOG_ALL));
                let (index, ring) = self.ring(index)?;
                // It starts again with the next kick eventfd.
                ring.kick = Kick::Unset;
                if std::mem::take(&mut ring.is_running) {
                    actions.push(Action::Stop { index, is_kept: !is_moving });
                }
                Ok(Reply::VringBase(index))
            }
            Command::SetVringEnable(state) => {
                let is_enabled = match state.num {
                    0 => false,
                    1 => true,
                    other => return Err(Refusal::Enable(other)),
                };
                let (index, ring) = self.ring(state.index)?;
                ring.is_enabled = is_enabled;
                if ring.is_running {
                    actions.push(Action::SetEnabled { index, is_enabled });
                }
                Ok(Reply::Ack)
            }
            Command::SetVringKick(VringFd { index, fd }) => {
                let (index, ring) = self.ring(index)?;
                if let Some(fd) = &fd {
                    check_eventfd(fd, request, index)?;
                }
                if ring.is_running {
                    actions.push(Action::SetKick { index, kick: fd });
                } else {
                    ring.kick = fd.map_or(Kick::Poll, Kick::Eventfd);
                }
                Ok(Reply::Ack)
            }
            Command::SetVringCall(VringFd { index, fd }) => {
                let (index, ring) = self.ring(index)?;
                ring.call = signal_fd(fd, request, index)?;
                if ring.is_running {
                    actions.push(Action::SetCall { index, call: ring.call.clone() });
                }
                Ok(Reply::Ack)
            }
            Command::SetVringErr(VringFd { index, fd }) => {
                let (index, ring) = self.ring(index)?;
                ring.err = signal_fd(fd, request, index)?;
                if ring.is_running {
                    actions.push(Action::SetErr { index, err: ring.err.clone() });
                }
                Ok(Reply::Ack)
            }

            Command::GetConfig { offset, size } => {
                self.require(ProtocolFeatures::CONFIG, request)?;
                let refused = Refusal::Config { request, offset, size };
                let len = usize::try_from(size).ok().filter(|len| *len <= CONFIG_BYTES_MAX);
                let mut bytes = vec![0; len.ok_or(Refusal::Config { request, offset, size })?];
                match self.device.read_config(offset as usize, self.writeback(), &mut bytes) {
                    true => Ok(Reply::Bytes(wire::reply_config(offset, &bytes))),
                    false => Err(refused),
                }
            }
            Command::SetConfig { offset, flags, mut bytes } => {
                self.require(ProtocolFeatures::CONFIG, request)?;
                let mut offset = offset as usize;
                if flags == CONFIG_FLAG_MIGRATION {
                    // The whole space as it was at the source: what is not a driver's choice follows
                    // from the volume.
                    let at = CONFIG_WRITEBACK_OFFSET.checked_sub(offset);
                    let Some(byte) = at.and_then(|at| bytes.get(at).copied()) else {
                        return Ok(Reply::Ack);
                    };
                    (offset, bytes) = (CONFIG_WRITEBACK_OFFSET, vec![byte]);
                }
                let has_field =
                    self.features.is_some_and(|features| features.has(Features::CONFIG_WCE));
                let writeback = match bytes.as_slice() {
                    [0] => Some(false),
                    [1] => Some(true),
                    _ => None,
                };
                if !has_field || offset != CONFIG_WRITEBACK_OFFSET || writeback.is_none() {
                    let (offset, size) = (offset as u32, bytes.len() as u32);
                    return Err(Refusal::Config { request, offset, size });
                }
                self.writeback = writeback;
                if self.rings.iter().any(|ring| ring.is_running) {
                    actions.push(Action::SetWriteThrough(self.write_through()));
                }
                Ok(Reply::Ack)
            }
            Command::GetInflightFd { description, len } => {
                self.require(ProtocolFeatures::INFLIGHT_SHMFD, request)?;
                let layout = self.inflight_layout(&description)?;
                let (queues, queue_size) = (layout.queues, layout.queue_size);
                let mmap_size = layout.bytes(self.is_packed());
                let fd = inflight_file(mmap_size).map_err(Refusal::InflightMemory)?;
                let description = InflightDescription {
                    mmap_size,
                    mmap_offset: 0,
                    queues,
                    queue_size,
                    padding: 0,
                };
                Ok(Reply::BytesAndFd(wire::reply_inflight(&description, len), fd))
            }
            Command::SetInflightFd(description, fd) => {
                self.require(ProtocolFeatures::INFLIGHT_SHMFD, request)?;
                if let Some(index) = self.rings.iter().position(|ring| ring.is_running) {
                    return Err(Refusal::Running { request, index: index as u16 });
                }
                let layout = self.inflight_layout(&description)?;
                let InflightDescription { mmap_size, mmap_offset, queues, queue_size, .. } =
                    description;
                if mmap_size < layout.bytes(self.is_packed()) {
                    return Err(Refusal::Inflight { queues, queue_size, bytes: mmap_size });
                }
                let region = GuestRegion::map(fd.as_fd(), mmap_offset, mmap_size, 0, 0)
                    .map_err(Refusal::InflightMemory)?;
                let memory = GuestMemory::new(vec![region])?;
                self.inflight = Some(Inflight { memory, layout });
                Ok(Reply::Ack)
            }
            Command::ResetDevice => {
                self.require(ProtocolFeatures::RESET_DEVICE, request)?;
                self.features = None;
                self.writeback = None;
                self.status = 0;
                for (index, ring) in (0..).zip(&mut self.rings) {
                    if ring.is_running {
                        // The driver has forgotten its requests.
                        actions.push(Action::Stop { index, is_kept: false });
                    }
                    // The frontend goes on with the eventfds it gave, as with the memory table.
                    let (call, err) = (ring.call.take(), ring.err.take());
                    *ring = Ring { call, err, ..Ring::default() };
                }
                Ok(Reply::Ack)
            }
            Command::Unknown(request) => Err(Refusal::Unsupported(request)),
        }
    }

    fn require(&self, feature: ProtocolFeatures, request: Request) -> Result<(), Refusal> {
        self.protocol.has(feature).then_some(()).ok_or(Refusal::Unsupported(request))
    }

    /// Whether rings are packed, or may be for all that is known.
    fn is_packed(&self) -> bool {
        self.features.is_none_or(|features| features.has(Features::RING_PACKED))
    }

    fn inflight_layout(
        &self,
        description: &InflightDescription,
    ) -> Result<InflightLayout, Refusal> {
        let InflightDescription { mmap_size, queues, queue_size, .. } = *description;
        let is_good = (1..=self.device.queues()).contains(&queues)
            && (1..=QUEUE_SIZE_MAX).contains(&queue_size);
        match is_good {
            true => Ok(InflightLayout { queues, queue_size }),
            false => Err(Refusal::Inflight { queues, queue_size, bytes: mmap_size }),
        }
    }

    /// What is to be marked of a ring's writes, and where.
    fn logging(&self, index: u16) -> Option<Logging> {
        let (memory, len) = self.log.clone()?;
        let address = self.rings[usize::from(index)].address?;
        let data = self.features.is_some_and(|features| features.has(Features::LOG_ALL));
        let used = (address.flags & wire::VRING_LOG != 0).then_some(address.log);
        let eventfd = self.log_fd.clone();
        (data || used.is_some()).then_some(Logging { memory, len, data, used, eventfd })
    }

    fn update_logging(&self, actions: &mut Vec<Action>) {
        for index in (0..self.device.queues()).filter(|i| self.rings[usize::from(*i)].is_running) {
            actions.push(Action::SetLogging { index, logging: self.logging(index) });
        }
    }

    fn set_features(
        &mut self,
        features: Features,
        actions: &mut Vec<Action>,
    ) -> Result<Reply, Refusal> {
        let unknown = features.without(self.device.features());
        if unknown != Features::default() {
            return Err(Refusal::Features(unknown.0));
        }
        if self.features == Some(features) {
            return Ok(Reply::Ack);
        }
        let old = self.features.replace(features);
        if let Some(index) = self.rings.iter().position(|ring| ring.is_running) {
            // Marking begins and ends while rings run; nothing else does.
            if old.map(Features::for_driver) != Some(features.for_driver()) {
                self.features = old;
                let (request, index) = (Request::SET_FEATURES, index as u16);
                return Err(Refusal::Running { request, index });
            }
            self.update_logging(actions);
        }
        Ok(Reply::Ack)
    }

    fn set_regions(
        &mut self,
        regions: Vec<Arc<GuestRegion>>,
        has_removed: bool,
        actions: &mut Vec<Action>,
    ) -> Result<Reply, Refusal> {
        self.memory = GuestMemory::new(regions.clone())?;
        self.regions = regions;
        if self.rings.iter().any(|ring| ring.is_running) {
            actions.push(Action::SetMemory { memory: self.memory.clone(), has_removed });
        }
        Ok(Reply::Ack)
    }

    fn ring(&mut self, index: u32) -> Result<(u16, &mut Ring), Refusal> {
        let queues = self.device.queues();
        let refused = Refusal::Index { index, queues };
        let index = u16::try_from(index).ok().filter(|index| *index < queues).ok_or(refused)?;
        Ok((index, &mut self.rings[usize::from(index)]))
    }

    fn stopped_ring(&mut self, index: u32, request: Request) -> Result<&mut Ring, Refusal> {
        let (index, ring) = self.ring(index)?;
        match ring.is_running {
            true => Err(Refusal::Running { request, index }),
            false => Ok(ring),
        }
    }

    /// Start the rings that have become complete. A ring needs its size, its place, a kick eventfd
    /// (or the word that there is none), negotiated features, and to be enabled: "If
    /// VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the
    /// enabled state" (vhost-user protocol, "Ring states").
    ///
    /// The specification starts a ring with the first kick; to look into it earlier is harmless,
    /// as it lies in memory that is set up.
    fn start_rings(&mut self, actions: &mut Vec<Action>) -> Vec<u16> {
        let Some(features) = self.features else { return Vec::new() };
        let write_through = self.write_through();
        let all_enabled = !features.has(Features::PROTOCOL_FEATURES);
        let mut starting = Vec::new();
        for index in 0..self.device.queues() {
            let logging = self.logging(index);
            let ring = &mut self.rings[usize::from(index)];
            let (true, Some(address)) = (ring.size > 0, ring.address) else { continue };
            if ring.is_running || !(ring.is_enabled || all_enabled) {
                continue;
            }
            let kick = match std::mem::take(&mut ring.kick) {
                Kick::Unset => continue,
                Kick::Poll => None,
                Kick::Eventfd(fd) => Some(fd),
            };
            ring.is_running = true;
            starting.push(index);
            actions.push(Action::Start(Box::new(RingStart {
                index,
                size: ring.size,
                address,
                base: ring.base,
                inflight: self.inflight.clone(),
                features: features.for_driver(),
                write_through,
                logging,
                memory: self.memory.clone(),
                kick,
                call: ring.call.clone(),
                err: ring.err.clone(),
            })));
        }
        starting
    }

    /// Current value of the configuration field: as written, or else as it begins. "If
    /// VIRTIO_BLK_F_CONFIG_WCE is negotiated but VIRTIO_BLK_F_FLUSH is not, the device MUST
    /// initialize writeback to 0" (Virtual I/O Device 1.2, section 5.2.5.2).
    fn writeback(&self) -> bool {
        let no_flush = self.features.is_some_and(|f| !f.has(Features::FLUSH));
        self.writeback.unwrap_or(self.device.write_cache() && !no_flush)
    }

    /// Whether a write must be durable before it completes: the driver said so, or it knows of no
    /// cache that it could flush (section 5.2.6.2).
    fn write_through(&self) -> bool {
        let Some(features) = self.features else { return false };
        self.device.write_cache()
            && match features.has(Features::CONFIG_WCE) {
                true => !self.writeback(),
                false => !features.has(Features::FLUSH),
            }
    }
}

/// The answer to a message that was not carried out, if there can be one.
fn refuse(request: Request, ack: bool, refusal: Refusal) -> Result<Vec<u8>, Refusal> {
    tracing::debug!(%request, %refusal, "vhost-user message refused");
    match request {
        // "A zero-length payload indicates an error to the vhost-user front-end"
        // (vhost-user protocol, VHOST_USER_GET_CONFIG).
        Request::GET_CONFIG => Ok(wire::reply(request, &[])),
        Request::GET_FEATURES
        | Request::GET_PROTOCOL_FEATURES
        | Request::GET_QUEUE_NUM
        | Request::GET_VRING_BASE
        | Request::GET_MAX_MEM_SLOTS
        | Request::GET_INFLIGHT_FD
        | Request::GET_STATUS
        // Whatever is answered, QEMU takes it that pages are marked from now on.
        | Request::SET_LOG_BASE => Err(refusal),
        _ if ack => Ok(wire::reply_u64(request, 1)),
        _ => Err(refusal),
    }
}

fn map(region: &MemoryRegion, fd: OwnedFd) -> Result<Arc<GuestRegion>, Refusal> {
    let MemoryRegion { guest_addr, size, user_addr, mmap_offset } = *region;
    GuestRegion::map(fd.as_fd(), mmap_offset, size, guest_addr, user_addr)
        .map_err(|error| Refusal::Map { guest_addr, size, error })
}

/// Zeros that keep their length: memory that a frontend cuts off would be lost for both of us.
fn inflight_file(bytes: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("inflight", flags)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Another kind of file could block or wake us for ever, whatever its flags are.
fn check_eventfd(fd: &OwnedFd, request: Request, index: u16) -> Result<(), Refusal> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    match std::fs::read_link(link) {
        Ok(found) if found.as_os_str() == "anon_inode:[eventfd]" => Ok(()),
        Ok(found) => {
            let found = found.to_string_lossy().into_owned();
            Err(Refusal::NotEventfd { request, index, found })
        }
        // No /proc here: nothing to tell them apart by.
        Err(_) => Ok(()),
    }
}

/// An eventfd that we signal. It is not to block us when its counter is full; a hostile frontend can
/// see to it that it does, as [`reactor::unix::adopt_eventfd`] explains.
fn signal_fd(
    fd: Option<OwnedFd>,
    request: Request,
    index: u16,
) -> Result<Option<Arc<OwnedFd>>, Refusal> {
    let Some(fd) = fd else { return Ok(None) };
    check_eventfd(&fd, request, index)?;
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|error| Refusal::Core(error.to_string()))?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
            .map_err(|error| Refusal::Core(error.to_string()))?;
    }
    Ok(Some(Arc::new(fd)))
}

#[cfg(test)]
mod tests;
