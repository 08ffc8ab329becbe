//! One client's session: a state machine from messages to calls of the function and replies.
//!
//! The session knows what the client has set up and decides what follows from a message; it moves
//! no byte. [`Session::on_message`] calls the [`Function`] and gives the reply, or says that the
//! function has something to bring to rest first. Then no further message is taken until the
//! function is done and [`Session::on_done`] has given the reply: a reply always tells the truth.
//! In particular unmapped memory is not touched any more when the unmap is answered.
//!
//! Nothing a client says ends the session. What cannot be done is answered with an errno, and what
//! is not known with `ENOTSUP`.
//!
//! # Going on in another process
//!
//! A client does not reconnect, so a successor of this process has to go on with the same
//! connection. [`Session::export`] gives all of a session as plain bytes and file descriptors that
//! the bytes name by key; [`Session::import`] makes it again and tells the function of it. What the
//! function itself knows is its own to keep. Contract:
//!
//! - The bytes are for the same version of this crate on the same machine. Anything else is
//!   refused by [`BadExport`].
//! - Keys are unique over the life of a connection, so a keeper of file descriptors need never
//!   replace one: it keeps what is new and drops what is no longer named.
//! - An export names the state between two messages. If the message that the process died over is
//!   given to the successor again, as [`Session::on_message_again`], everything that had been done
//!   of it is done once in effect: a map that is there and an unmap that is gone are no errors.
//! - The dirty log does not survive; the successor begins with one in which every page is dirty.
//!   Neither does a half-done migration: it continues in the state ERROR, which the client leaves
//!   by a reset.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use reactor::unix::{adopt_eventfd, signal};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::capabilities::Capabilities;
use super::dma::{self, File, Map, Table};
use super::migration::{self, State};
use super::wire::{self, Command, Message};
use crate::dirty::DirtyLog;
use crate::function::{Function, Irq, Region, RegionInfo, Reset, Step};

/// Major version of the protocol.
pub const MAJOR: u16 = 0;
/// Highest minor version that is known.
pub const MINOR: u16 = 1;
/// Longest bitmap in one report of dirty pages: 32 GiB in pages of 4 KiB.
pub const REPORT_BYTES_MAX: u64 = 1 << 20;

/// Kinds of interrupts, `VFIO_PCI_*_IRQ_INDEX`.
const INTX: u32 = vfio::VFIO_PCI_INTX_IRQ_INDEX;
const MSIX: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;
const ERR: u32 = vfio::VFIO_PCI_ERR_IRQ_INDEX;
const REQ: u32 = vfio::VFIO_PCI_REQ_IRQ_INDEX;
const IRQS: u32 = 5;

/// A reply to send.
#[derive(Debug)]
pub struct Reply {
    /// All of the message.
    pub bytes: Vec<u8>,
    /// Goes with it.
    pub fd: Option<OwnedFd>,
}

/// What follows from a message.
#[derive(Debug)]
#[must_use]
pub enum Outcome {
    /// To be sent.
    Reply(Reply),
    /// The client wants no reply.
    Silent,
    /// The function is at work; [`Session::on_done`] gives the outcome.
    Pending,
}

/// An eventfd of the client.
#[derive(Debug)]
struct Trigger {
    key: u64,
    fd: Arc<OwnedFd>,
}

/// What is left to do for a message when the function is done with a call.
#[derive(Debug)]
enum Work {
    /// Nothing but the reply.
    Answer(Vec<u8>),
    /// More writes of REGION_WRITE_MULTI.
    Writes { payload: Vec<u8>, next: usize },
    /// More arcs of a migration state change. The arc to `to` is under way.
    Migrate { to: State, target: State, payload: Vec<u8> },
    /// Go on running after a reset.
    Restart,
    /// Take up what a predecessor left.
    Import(ImportStage),
}

#[derive(Clone, Copy, Debug)]
enum ImportStage {
    DirtyLog,
    Running,
    Done,
}

#[derive(Debug)]
struct Pending {
    id: u16,
    command: Command,
    no_reply: bool,
    work: Work,
    /// Unmapped, and held until the function has let go.
    released: Vec<Map>,
}

/// Payload of a reply.
#[derive(Debug, Default)]
struct Answer {
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
}

enum Next {
    Answer(Answer),
    /// The function has been called and is not done.
    Wait(Work),
}

/// A client's session.
#[derive(Debug)]
pub struct Session {
    regions: Vec<RegionInfo>,
    msix_vectors: u32,
    intx_vectors: u32,
    /// None until VERSION.
    client: Option<Capabilities>,
    table: Table,
    /// By kind and vector.
    triggers: BTreeMap<(u32, u32), Trigger>,
    /// Signalled by the client's kernel when the guest has taken an INTx.
    unmask: Option<Trigger>,
    migration: State,
    /// State to be read by the client, and how much of it has been.
    outgoing: Vec<u8>,
    outgoing_read: usize,
    incoming: Vec<u8>,
    log: Option<Arc<DirtyLog>>,
    /// What `log` was made of.
    log_ranges: Vec<(u64, u64)>,
    pending: Option<Pending>,
    next_key: u64,
    /// The message at hand may have been carried out, all or in part, by a predecessor.
    is_again: bool,
    /// Maps that the message at hand takes away.
    released: Vec<Map>,
}

impl Session {
    /// A client has connected.
    pub fn new(function: &dyn Function) -> Session {
        Session {
            regions: (0..Region::COUNT).map(|index| function.region(Region(index))).collect(),
            msix_vectors: function.vectors(Irq::Msix),
            intx_vectors: function.vectors(Irq::Intx).min(1),
            client: None,
            table: Table::default(),
            triggers: BTreeMap::new(),
            unmask: None,
            migration: State::RUNNING,
            outgoing: Vec::new(),
            outgoing_read: 0,
            incoming: Vec::new(),
            log: None,
            log_ranges: Vec::new(),
            pending: None,
            next_key: 1,
            is_again: false,
            released: Vec::new(),
        }
    }

    /// The client has negotiated a version.
    pub fn is_negotiated(&self) -> bool {
        self.client.is_some()
    }

    /// Number of maps of client memory.
    pub fn maps(&self) -> usize {
        self.table.len()
    }

    /// The function is at work, and no message can be taken.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// An eventfd that says, when it becomes readable, that INTx is to be unmasked. Whoever reads
    /// it then calls [`Session::on_unmask`].
    pub fn unmask_eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.unmask.as_ref().map(|trigger| trigger.fd.as_fd())
    }

    /// INTx is to be unmasked.
    pub fn on_unmask(&mut self, function: &mut dyn Function) {
        if self.intx_vectors > 0 {
            function.set_masked(Irq::Intx, 0, false);
        }
    }

    /// The function has failed by itself: tell the client. False if it does not listen.
    pub fn on_failed(&mut self) -> bool {
        self.notify(ERR)
    }

    /// Ask the client to unplug the device. False if it does not listen.
    pub fn request_unplug(&mut self) -> bool {
        self.notify(REQ)
    }

    fn notify(&self, kind: u32) -> bool {
        let trigger = self.triggers.get(&(kind, 0));
        if let Some(trigger) = trigger {
            signal(&*trigger.fd);
        }
        trigger.is_some()
    }

    /// A message came.
    ///
    /// # Panics
    ///
    /// If the last one is not answered yet.
    pub fn on_message(&mut self, message: Message, function: &mut dyn Function) -> Outcome {
        assert!(self.pending.is_none(), "a message while another is being carried out");
        let Message { id, command, no_reply, payload, fds } = message;
        let next = self.carry_out(command, payload, fds, function);
        self.conclude(id, command, no_reply, next)
    }

    /// A message that a predecessor had taken, and that it may or may not have carried out.
    ///
    /// # Panics
    ///
    /// If the last one is not answered yet.
    pub fn on_message_again(&mut self, message: Message, function: &mut dyn Function) -> Outcome {
        self.is_again = true;
        let outcome = self.on_message(message, function);
        self.is_again = false;
        outcome
    }

    /// The function has done what it was called for.
    ///
    /// # Panics
    ///
    /// If it was not called for anything.
    pub fn on_done(&mut self, function: &mut dyn Function) -> Outcome {
        let pending = self.pending.take().expect("the function was at work");
        // Whatever was unmapped is free now, and its files are closed.
        drop(pending.released);
        let next = match pending.work {
            Work::Answer(payload) => Ok(Next::Answer(Answer { payload, fd: None })),
            Work::Writes { payload, next } => self.write_multi(payload, next, function),
            Work::Migrate { to, target, payload } => {
                self.migration = to;
                self.migrate(target, payload, function)
            }
            Work::Restart => self.restart(function),
            Work::Import(stage) => self.import_next(stage, function),
        };
        self.conclude(pending.id, pending.command, pending.no_reply, next)
    }

    fn conclude(
        &mut self,
        id: u16,
        command: Command,
        no_reply: bool,
        next: Result<Next, Errno>,
    ) -> Outcome {
        let released = std::mem::take(&mut self.released);
        let reply = match next {
            Ok(Next::Wait(work)) => {
                self.pending = Some(Pending { id, command, no_reply, work, released });
                return Outcome::Pending;
            }
            _ if no_reply => return Outcome::Silent,
            Ok(Next::Answer(Answer { payload, fd })) => {
                Reply { bytes: wire::reply(id, command, &[&payload]), fd }
            }
            Err(errno) => {
                Reply { bytes: wire::error_reply(id, command, errno.raw_os_error()), fd: None }
            }
        };
        Outcome::Reply(reply)
    }

    fn carry_out(
        &mut self,
        command: Command,
        payload: Vec<u8>,
        fds: Vec<OwnedFd>,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        if self.client.is_none() != (command == Command::VERSION) && !self.is_again {
            // "This is the initial message sent by the client."
            return Err(Errno::INVAL);
        }
        match command {
            Command::VERSION => self.version(&payload),
            Command::DMA_MAP => self.dma_map(&payload, fds, function),
            Command::DMA_UNMAP => self.dma_unmap(payload, function),
            Command::DEVICE_GET_INFO => device_info(&payload),
            Command::DEVICE_GET_REGION_INFO => self.region_info(&payload, function),
            Command::DEVICE_GET_REGION_IO_FDS => self.region_io_fds(&payload),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(&payload),
            Command::DEVICE_SET_IRQS => self.set_irqs(&payload, fds, function),
            Command::REGION_READ => self.region_read(&payload, function),
            Command::REGION_WRITE => self.region_write(&payload, function),
            Command::REGION_WRITE_MULTI => self.write_multi(payload, 0, function),
            Command::DEVICE_RESET => match function.reset(Reset::Conventional) {
                Step::Done => self.restart(function),
                Step::Pending => Ok(Next::Wait(Work::Restart)),
            },
            Command::DEVICE_FEATURE => self.feature(payload, function),
            Command::MIG_DATA_READ => self.mig_data_read(&payload),
            Command::MIG_DATA_WRITE => self.mig_data_write(&payload),
            // DMA_READ and DMA_WRITE are ours to send, and we never do.
            _ => Err(Errno::NOTSUP),
        }
    }

    fn version(&mut self, payload: &[u8]) -> Result<Next, Errno> {
        let (version, data) = parse::<wire::Version>(payload)?;
        // "The major version in the reply must be the same as proposed."
        if version.major != MAJOR {
            return Err(Errno::NOTSUP);
        }
        let client = match data {
            [] => Capabilities::default(),
            [json @ .., 0] => Capabilities::parse(json).map_err(|_| Errno::INVAL)?,
            _ => return Err(Errno::INVAL),
        };
        let answer = wire::Version { major: MAJOR, minor: version.minor.min(MINOR) };
        let json = client.answer(wire::FDS_MAX, wire::DATA_BYTES_MAX, dma::MAPS_MAX);
        self.client = Some(client);
        answered(&[answer.as_bytes(), &json])
    }

    fn dma_map(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::DmaMap>(payload)?;
        let mut fds = fds.into_iter();
        let fd = fds.next();
        if fds.next().is_some() {
            return Err(Errno::INVAL);
        }
        if self.is_again && self.table.has(&request) {
            return self.set_memory(false, Vec::new(), function);
        }
        let file = fd.map(|fd| File { key: self.key(), fd: Arc::new(fd) });
        match self.table.map(request, file)? {
            true => self.set_memory(false, Vec::new(), function),
            false => answered(&[]),
        }
    }

    fn dma_unmap(&mut self, payload: Vec<u8>, function: &mut dyn Function) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::DmaUnmap>(&payload)?;
        let has_changed = match request.flags {
            0 => match self.table.unmap(request.address, request.size) {
                Ok((map, has_changed)) => {
                    self.released.push(map);
                    has_changed
                }
                // Gone already, but perhaps not yet for the function.
                Err(_) if self.is_again => true,
                Err(errno) => return Err(errno),
            },
            wire::DmaUnmap::ALL if request.address == 0 && request.size == 0 => {
                let (maps, has_changed) = self.table.clear();
                self.released = maps;
                has_changed || self.is_again
            }
            _ => return Err(Errno::INVAL),
        };
        // "The server responds with the original DMA entry in the request."
        let answer = request.as_bytes().to_vec();
        match has_changed {
            true => self.set_memory(true, answer, function),
            false => Ok(Next::Answer(Answer { payload: answer, fd: None })),
        }
    }

    fn set_memory(
        &mut self,
        has_removed: bool,
        payload: Vec<u8>,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        after(function.set_memory(&self.table.memory(), has_removed), payload)
    }

    fn region(&self, index: u32) -> Result<&RegionInfo, Errno> {
        self.regions.get(index as usize).ok_or(Errno::INVAL)
    }

    fn region_info(&self, payload: &[u8], function: &dyn Function) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::RegionInfo>(payload)?;
        let region = self.region(request.index)?;
        let fixed = size_of::<wire::RegionInfo>();
        if (request.argsz as usize) < fixed {
            return Err(Errno::INVAL);
        }
        let mut info = wire::RegionInfo {
            argsz: fixed as u32,
            index: request.index,
            size: region.size_bytes,
            ..wire::RegionInfo::default()
        };
        let set = |flag, is_set| if is_set { flag } else { 0 };
        info.flags = set(vfio::VFIO_REGION_INFO_FLAG_READ, region.is_readable)
            | set(vfio::VFIO_REGION_INFO_FLAG_WRITE, region.is_writable);
        let takes_fds = self.client.is_some_and(|client| client.max_msg_fds > 0);
        let fd = function.region_fd(Region(request.index));
        let (Some(fd), false, true) = (fd, region.mappable.is_empty(), takes_fds) else {
            return answered(&[info.as_bytes()]);
        };
        let areas: Vec<u8> = region
            .mappable
            .iter()
            .flat_map(|area| [area.offset, area.len_bytes])
            .flat_map(u64::to_ne_bytes)
            .collect();
        let sparse = wire::SparseMmap {
            id: vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16,
            version: 1,
            nr_areas: region.mappable.len() as u32,
            ..wire::SparseMmap::default()
        };
        info.flags |= vfio::VFIO_REGION_INFO_FLAG_MMAP | vfio::VFIO_REGION_INFO_FLAG_CAPS;
        info.argsz = (fixed + size_of::<wire::SparseMmap>() + areas.len()) as u32;
        if request.argsz < info.argsz {
            // "The full payload is not included in the reply, but the argsz field in the reply
            // indicates the needed size." The file comes with the full one only, so that a client
            // does not have to close it.
            return answered(&[info.as_bytes()]);
        }
        info.cap_offset = fixed as u32;
        let fd = fd.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        let payload = [info.as_bytes(), sparse.as_bytes(), &areas].concat();
        Ok(Next::Answer(Answer { payload, fd: Some(fd) }))
    }

    /// There are none: a doorbell is either mapped or written by message.
    fn region_io_fds(&self, payload: &[u8]) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::RegionIoFds>(payload)?;
        let size = size_of::<wire::RegionIoFds>() as u32;
        if self.region(request.index)?.size_bytes == 0 || request.argsz < size || request.flags != 0
        {
            return Err(Errno::INVAL);
        }
        let answer = wire::RegionIoFds { argsz: size, index: request.index, ..Default::default() };
        answered(&[answer.as_bytes()])
    }

    fn vectors(&self, kind: u32) -> u32 {
        match kind {
            INTX => self.intx_vectors,
            MSIX => self.msix_vectors,
            ERR | REQ => 1,
            _ => 0,
        }
    }

    fn irq_info(&self, payload: &[u8]) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::IrqInfo>(payload)?;
        let size = size_of::<wire::IrqInfo>() as u32;
        if request.index >= IRQS || request.argsz < size {
            return Err(Errno::INVAL);
        }
        let flags = vfio::VFIO_IRQ_INFO_EVENTFD
            | match request.index {
                INTX => vfio::VFIO_IRQ_INFO_MASKABLE | vfio::VFIO_IRQ_INFO_AUTOMASKED,
                _ => 0,
            };
        let count = self.vectors(request.index);
        let answer = wire::IrqInfo { argsz: size, flags, index: request.index, count };
        answered(&[answer.as_bytes()])
    }

    fn set_irqs(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        let (request, bools) = parse::<wire::IrqSet>(payload)?;
        let wire::IrqSet { flags, index, start, count, .. } = request;
        let data = flags & vfio::VFIO_IRQ_SET_DATA_TYPE_MASK;
        let action = flags & vfio::VFIO_IRQ_SET_ACTION_TYPE_MASK;
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        if flags & !(vfio::VFIO_IRQ_SET_DATA_TYPE_MASK | vfio::VFIO_IRQ_SET_ACTION_TYPE_MASK) != 0
            || index >= IRQS
            || end > self.vectors(index)
        {
            return Err(Errno::INVAL);
        }
        // "As a special case, a count (and start) of 0, with data flags of VFIO_IRQ_SET_DATA_NONE
        // disables all interrupts of the index."
        let disables_all = data == vfio::VFIO_IRQ_SET_DATA_NONE
            && action == vfio::VFIO_IRQ_SET_ACTION_TRIGGER
            && count == 0
            && start == 0;
        if count == 0 && !disables_all {
            return Err(Errno::INVAL);
        }
        match data {
            vfio::VFIO_IRQ_SET_DATA_NONE if disables_all => {
                for vector in 0..self.vectors(index) {
                    self.set_trigger(index, vector, None, function);
                }
                if index == INTX {
                    self.unmask = None;
                }
            }
            vfio::VFIO_IRQ_SET_DATA_NONE => {
                check_action(action, index)?;
                for vector in start..end {
                    self.act(action, index, vector, function);
                }
            }
            vfio::VFIO_IRQ_SET_DATA_BOOL => {
                check_action(action, index)?;
                let bools = bools.get(..count as usize).ok_or(Errno::INVAL)?;
                for (vector, _) in (start..end).zip(bools).filter(|(_, is_meant)| **is_meant != 0) {
                    self.act(action, index, vector, function);
                }
            }
            vfio::VFIO_IRQ_SET_DATA_EVENTFD => {
                // "If no file descriptors are provided, this de-assigns the specified previously
                // configured interrupts."
                if !fds.is_empty() && fds.len() != count as usize {
                    return Err(Errno::INVAL);
                }
                // All or none.
                let mut eventfds = Vec::with_capacity(fds.len());
                for fd in fds {
                    eventfds.push(adopt_eventfd(fd).map_err(|_| Errno::INVAL)?);
                }
                let mut eventfds = eventfds.into_iter();
                match action {
                    vfio::VFIO_IRQ_SET_ACTION_TRIGGER => {
                        for vector in start..end {
                            self.set_trigger(index, vector, eventfds.next(), function);
                        }
                    }
                    vfio::VFIO_IRQ_SET_ACTION_UNMASK if index == INTX => {
                        self.unmask = eventfds.next().map(|fd| self.trigger(fd));
                    }
                    // Nobody masks but the client itself.
                    _ => return Err(Errno::NOTSUP),
                }
            }
            _ => return Err(Errno::INVAL),
        }
        answered(&[])
    }

    /// A checked action on one vector.
    fn act(&mut self, action: u32, index: u32, vector: u32, function: &mut dyn Function) {
        match (kind(index), action) {
            (Some(irq), vfio::VFIO_IRQ_SET_ACTION_TRIGGER) => function.trigger(irq, vector),
            (Some(irq), vfio::VFIO_IRQ_SET_ACTION_MASK) => function.set_masked(irq, vector, true),
            (Some(irq), _) => function.set_masked(irq, vector, false),
            (None, _) => {
                self.notify(index);
            }
        }
    }

    fn set_trigger(
        &mut self,
        index: u32,
        vector: u32,
        eventfd: Option<OwnedFd>,
        function: &mut dyn Function,
    ) {
        let trigger = eventfd.map(|fd| self.trigger(fd));
        if let Some(irq) = kind(index) {
            let fd = trigger.as_ref().map(|trigger| Arc::clone(&trigger.fd));
            function.set_trigger(irq, vector, fd);
        }
        match trigger {
            Some(trigger) => self.triggers.insert((index, vector), trigger),
            None => self.triggers.remove(&(index, vector)),
        };
    }

    fn trigger(&mut self, fd: OwnedFd) -> Trigger {
        Trigger { key: self.key(), fd: Arc::new(fd) }
    }

    fn key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key - 1
    }

    /// Checks that an access lies within its region.
    fn access(&self, access: &wire::RegionAccess) -> Result<&RegionInfo, Errno> {
        let region = self.region(access.region)?;
        match access.offset.checked_add(u64::from(access.count)) {
            Some(end) if end <= region.size_bytes => Ok(region),
            _ => Err(Errno::INVAL),
        }
    }

    fn region_read(&self, payload: &[u8], function: &mut dyn Function) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::RegionAccess>(payload)?;
        if !self.access(&request)?.is_readable || request.count as usize > self.data_bytes_max() {
            return Err(Errno::INVAL);
        }
        let mut data = vec![0; request.count as usize];
        function.read(Region(request.region), request.offset, &mut data);
        answered(&[request.as_bytes(), &data])
    }

    /// Most data bytes of a reply.
    fn data_bytes_max(&self) -> usize {
        let theirs = self.client.map_or(0, |client| client.max_data_xfer_size);
        usize::try_from(theirs).unwrap_or(usize::MAX).min(wire::DATA_BYTES_MAX)
    }

    fn region_write(&self, payload: &[u8], function: &mut dyn Function) -> Result<Next, Errno> {
        let (request, data) = parse::<wire::RegionAccess>(payload)?;
        if !self.access(&request)?.is_writable || data.len() != request.count as usize {
            return Err(Errno::INVAL);
        }
        let step = function.write(Region(request.region), request.offset, data);
        after(step, request.as_bytes().to_vec())
    }

    /// Carries out the writes from number `next` on. The first that is not possible ends it, and
    /// the reply tells how many there were.
    fn write_multi(
        &self,
        payload: Vec<u8>,
        mut next: usize,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        let (total, writes) = parse::<u64>(&payload)?;
        let (writes, rest) = writes.as_chunks::<{ wire::MULTI_WRITE_BYTES }>();
        if total != writes.len() as u64 || !rest.is_empty() {
            return Err(Errno::INVAL);
        }
        while let Some(write) = writes.get(next) {
            let (access, data) = parse::<wire::RegionAccess>(write)?;
            let data = data.get(..access.count as usize);
            let is_possible = self.access(&access).is_ok_and(|region| region.is_writable);
            let Some(data) = data.filter(|_| is_possible) else { break };
            next += 1;
            if function.write(Region(access.region), access.offset, data) == Step::Pending {
                return Ok(Next::Wait(Work::Writes { payload, next }));
            }
        }
        if next == 0 && total > 0 {
            return Err(Errno::INVAL);
        }
        answered(&[(next as u64).as_bytes()])
    }

    /// After a reset the device runs, whatever state of migration it was in.
    fn restart(&mut self, function: &mut dyn Function) -> Result<Next, Errno> {
        let was_running = self.migration == State::RUNNING;
        self.migration = State::RUNNING;
        self.end_transfer();
        match was_running {
            true => answered(&[]),
            false => after(function.set_running(true), Vec::new()),
        }
    }

    fn end_transfer(&mut self) {
        self.outgoing = Vec::new();
        self.outgoing_read = 0;
        self.incoming = Vec::new();
    }

    fn feature(&mut self, payload: Vec<u8>, function: &mut dyn Function) -> Result<Next, Errno> {
        const GET: u32 = vfio::VFIO_DEVICE_FEATURE_GET;
        const SET: u32 = vfio::VFIO_DEVICE_FEATURE_SET;
        const PROBE: u32 = vfio::VFIO_DEVICE_FEATURE_PROBE;
        let (header, data) = parse::<wire::DeviceFeature>(&payload)?;
        if header.flags & !(vfio::VFIO_DEVICE_FEATURE_MASK | GET | SET | PROBE) != 0 {
            return Err(Errno::INVAL);
        }
        let feature = header.flags & vfio::VFIO_DEVICE_FEATURE_MASK;
        let methods = header.flags & (GET | SET);
        let possible = match feature {
            vfio::VFIO_DEVICE_FEATURE_MIGRATION | vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT => {
                GET
            }
            vfio::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => GET | SET,
            vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_START
            | vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP => SET,
            // As the ioctl of this name does.
            _ => return Err(Errno::NOTTY),
        };
        if methods & !possible != 0 {
            return Err(Errno::NOTTY);
        }
        if header.flags & PROBE != 0 {
            // "The reply payload must be the same as the request payload."
            return Ok(Next::Answer(Answer { payload, fd: None }));
        }
        match (feature, methods) {
            (vfio::VFIO_DEVICE_FEATURE_MIGRATION, GET) => {
                let flags = u64::from(vfio::VFIO_MIGRATION_STOP_COPY);
                feature_answer(header, &[flags.as_bytes()])
            }
            (vfio::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET) => {
                let state = wire::MigState { device_state: self.migration.0, data_fd: u32::MAX };
                feature_answer(header, &[state.as_bytes()])
            }
            (vfio::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET) => {
                let (state, _) = parse::<wire::MigState>(data)?;
                let target = State(state.device_state);
                if self.migration != target && self.migration.next(target).is_none() {
                    return Err(Errno::INVAL);
                }
                self.migrate(target, payload, function)
            }
            (vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_START, SET) => {
                self.start_logging(header, data, function)
            }
            (vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, SET) => {
                if self.log.take().is_none() && !self.is_again {
                    return Err(Errno::INVAL);
                }
                self.log_ranges = Vec::new();
                after(function.set_dirty_log(None), payload)
            }
            (vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, GET) => self.report(header, data),
            _ => Err(Errno::INVAL),
        }
    }

    /// Take arcs up to `target`, until one of them takes time.
    fn migrate(
        &mut self,
        target: State,
        payload: Vec<u8>,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        while let Some(to) = self.migration.next(target) {
            let step = match (self.migration, to) {
                (State::RUNNING, State::STOP) => function.set_running(false),
                (State::STOP, State::RUNNING) => function.set_running(true),
                (State::STOP, State::STOP_COPY) => {
                    self.outgoing = migration::seal(&function.save());
                    self.outgoing_read = 0;
                    Step::Done
                }
                (State::RESUMING, State::STOP) => {
                    let stream = std::mem::take(&mut self.incoming);
                    let state = migration::open(&stream);
                    if state.is_none_or(|state| function.restore(state).is_err()) {
                        self.migration = State::ERROR;
                        return Err(Errno::INVAL);
                    }
                    Step::Done
                }
                // To RESUMING and from STOP_COPY: nothing but the stream begins or ends.
                _ => {
                    self.end_transfer();
                    Step::Done
                }
            };
            if step == Step::Pending {
                return Ok(Next::Wait(Work::Migrate { to, target, payload }));
            }
            self.migration = to;
        }
        Ok(Next::Answer(Answer { payload, fd: None }))
    }

    fn mig_data_read(&mut self, payload: &[u8]) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::MigData>(payload)?;
        let header_bytes = size_of::<wire::MigData>();
        let size = request.size as usize;
        if self.migration != State::STOP_COPY
            || size > self.data_bytes_max()
            || (request.argsz as usize) < header_bytes + size
        {
            return Err(Errno::INVAL);
        }
        let left = &self.outgoing[self.outgoing_read..];
        // "If this is less than the requested size, there is no more migration data to read."
        let part = &left[..size.min(left.len())];
        let answer =
            wire::MigData { argsz: (header_bytes + part.len()) as u32, size: part.len() as u32 };
        let next = answered(&[answer.as_bytes(), part]);
        self.outgoing_read += part.len();
        next
    }

    fn mig_data_write(&mut self, payload: &[u8]) -> Result<Next, Errno> {
        let (request, data) = parse::<wire::MigData>(payload)?;
        if self.migration != State::RESUMING || data.len() != request.size as usize {
            return Err(Errno::INVAL);
        }
        if self.incoming.len() + data.len() > migration::STATE_BYTES_MAX {
            return Err(Errno::NOSPC);
        }
        self.incoming.extend_from_slice(data);
        answered(&[])
    }

    fn start_logging(
        &mut self,
        header: wire::DeviceFeature,
        data: &[u8],
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        let (mut control, ranges) = parse::<wire::LoggingControl>(data)?;
        if self.log.is_some() && !self.is_again {
            return Err(Errno::BUSY);
        }
        let (ranges, _) =
            <[wire::LoggingRange]>::ref_from_prefix_with_elems(ranges, control.num_ranges as usize)
                .map_err(|_| Errno::INVAL)?;
        let mut wanted: Vec<(u64, u64)> =
            ranges.iter().map(|range| (range.iova, range.length)).collect();
        if wanted.is_empty() {
            // "A value of zero indicates that all writes should be logged." That is memory that is
            // mapped now, or later up to twice as high.
            let last = self.table.iter().last().map(|map| &map.request);
            let end = last.map_or(0, |map| map.address.saturating_add(map.size));
            wanted.push((0, end.saturating_mul(2).max(1 << 36)));
        }
        let log = DirtyLog::new(control.page_size, &wanted).map_err(|_| Errno::INVAL)?;
        control.page_size = log.page_bytes();
        let log = Arc::new(log);
        self.log = Some(Arc::clone(&log));
        self.log_ranges = wanted;
        let payload = [header.as_bytes(), control.as_bytes(), ranges.as_bytes()].concat();
        after(function.set_dirty_log(Some(log)), payload)
    }

    fn report(&self, header: wire::DeviceFeature, data: &[u8]) -> Result<Next, Errno> {
        let (request, _) = parse::<wire::LoggingReport>(data)?;
        let log = self.log.as_ref().ok_or(Errno::INVAL)?;
        let wire::LoggingReport { iova, length, page_size } = request;
        let last = length.checked_sub(1).and_then(|more| iova.checked_add(more));
        let last = last.ok_or(Errno::INVAL)?;
        if !page_size.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        let words = (length - 1) / page_size / 64 + 1;
        let fixed = size_of::<wire::DeviceFeature>() + size_of::<wire::LoggingReport>();
        if words > REPORT_BYTES_MAX / 8 || u64::from(header.argsz) < fixed as u64 + words * 8 {
            return Err(Errno::INVAL);
        }
        let mut bitmap = vec![0u64; words as usize];
        let mut half_asked = Vec::new();
        log.take(iova, length, |start, len_bytes| {
            let end = start + (len_bytes - 1);
            if start < iova || end > last {
                half_asked.push(start);
            }
            let first = (start.max(iova) - iova) / page_size;
            for bit in first..=(end.min(last) - iova) / page_size {
                bitmap[(bit / 64) as usize] |= 1 << (bit % 64);
            }
        });
        // The rest of such a page has not been told, so it stays marked.
        for start in half_asked {
            log.mark(start, 1);
        }
        feature_answer(header, &[request.as_bytes(), bitmap.as_bytes()])
    }
}

/// A fixed structure at the front of a payload, and the rest.
fn parse<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::INVAL)
}

fn answered(parts: &[&[u8]]) -> Result<Next, Errno> {
    Ok(Next::Answer(Answer { payload: parts.concat(), fd: None }))
}

/// A reply to the GET of a feature, with the size it takes.
fn feature_answer(mut header: wire::DeviceFeature, parts: &[&[u8]]) -> Result<Next, Errno> {
    let data = parts.concat();
    header.argsz = (size_of::<wire::DeviceFeature>() + data.len()) as u32;
    answered(&[header.as_bytes(), &data])
}

/// Answer with `payload` when the call is done.
fn after(step: Step, payload: Vec<u8>) -> Result<Next, Errno> {
    Ok(match step {
        Step::Done => Next::Answer(Answer { payload, fd: None }),
        Step::Pending => Next::Wait(Work::Answer(payload)),
    })
}

fn device_info(payload: &[u8]) -> Result<Next, Errno> {
    let (request, _) = parse::<wire::DeviceInfo>(payload)?;
    let size = size_of::<wire::DeviceInfo>() as u32;
    if request.argsz < size {
        return Err(Errno::INVAL);
    }
    let answer = wire::DeviceInfo {
        argsz: size,
        flags: vfio::VFIO_DEVICE_FLAGS_RESET | vfio::VFIO_DEVICE_FLAGS_PCI,
        num_regions: Region::COUNT,
        num_irqs: IRQS,
    };
    answered(&[answer.as_bytes()])
}

fn kind(index: u32) -> Option<Irq> {
    match index {
        INTX => Some(Irq::Intx),
        MSIX => Some(Irq::Msix),
        _ => None,
    }
}

/// Whether vectors of this kind know the action, with the data NONE or BOOL.
fn check_action(action: u32, index: u32) -> Result<(), Errno> {
    match action {
        vfio::VFIO_IRQ_SET_ACTION_TRIGGER => Ok(()),
        vfio::VFIO_IRQ_SET_ACTION_MASK | vfio::VFIO_IRQ_SET_ACTION_UNMASK => {
            kind(index).map(|_| ()).ok_or(Errno::NOTSUP)
        }
        _ => Err(Errno::INVAL),
    }
}

mod export;

pub use export::{BadExport, Exported};

#[cfg(test)]
mod tests;
