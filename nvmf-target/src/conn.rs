//! One qpair: its stream, its protocol machine and the commands it has outstanding.

use std::sync::Arc;
use std::time::Duration;

use block::Io;
use iobuf::SgList;
use nvme::ctrl::Instance;
use nvme::ctrl::io::{Fuse, FusedPairing, IoCommand};
use nvme::fabrics::ConnectRequest;
use nvme::spec::{Cqe, Direction, FabricsType, Sqe, Status};
use nvme::subsys::SubsystemInfo;
use nvme::subsys::reservation::Rights;
use nvme::tcp::{self, TargetEvent};
use nvme::xfer::{self, DataPtr};
use reactor::net::{HEAD_BYTES_MAX, Rx, RxChunk, Stream};

use crate::admin::{Admin, health};
use crate::auth::{self, Auth};
use crate::config::{Limits, Port};
use crate::core::Env;
use crate::counters::Counters;
use crate::fence::Place;
use crate::limits::{Account, Pass, count};
use crate::pieces::{self, Pieces};
use crate::registry::Association;
use crate::sample::{self, Stage};
use crate::secure::{Opening, Proven};
use crate::table::View;
use crate::turn::Turn;
use crate::wait::{Need, Waits};

/// Received chunks looked at per turn and connection, so that one host cannot hold up the others: so
/// many, and if they are small (with TLS each is a record) more, up to so many bytes or chunks.
const CHUNKS_PER_TURN: usize = 4;
const BYTES_PER_TURN: usize = 256 << 10;
const SMALL_CHUNKS_PER_TURN: usize = 64;

/// What the connection is.
pub(crate) enum Role {
    /// Connect has not succeeded yet.
    Fresh,
    Admin(Box<Admin>),
    Io {
        epoch: u32,
    },
}

/// What a slot's command is to do once its data is there.
#[derive(Clone, Copy)]
pub(crate) enum Work {
    Nothing,
    Connect,
    Admin,
    /// Authentication Send or Receive.
    Auth,
    Io(IoCommand),
    /// The host ends this I/O queue.
    Disconnect,
    /// Refused; only its in-capsule data must still be taken off the stream.
    Refuse(Status),
}

/// Where a command stands, and who moves it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Free,
    /// Data is arriving behind the capsule: the host.
    Capsule,
    /// Wants a buffer for data to be fetched by R2T: the pool.
    WaitFetch,
    /// R2T sent: the host.
    Fetching,
    /// Wants a buffer or room in the channel: pool or channel.
    WaitSubmit,
    /// Waits for its turn, see `turn.rs`: its partner, a volume, or the control thread.
    Awaiting,
    /// At the volume: the channel.
    Submitted,
    /// Response queued, payload still referenced by the stream: the socket.
    Sending,
    /// Held: an AER until an event, a Connect until the fence is down, a reset until queues are gone.
    Held,
}

pub(crate) struct Slot {
    pub(crate) phase: Phase,
    pub(crate) work: Work,
    pub(crate) sqe: Sqe,
    pub(crate) io: Option<Box<Io>>,
    /// Bytes that the command moves between host and controller.
    pub(crate) len: u32,
    /// In-capsule data begins this far into the capsule's data.
    pub(crate) skip: u32,
    /// Pool bytes that it holds, and those of them that are with the stream.
    pub(crate) held: u32,
    /// It counts among the commands that have memory for data in the capsule.
    pub(crate) is_capsule: bool,
    pub(crate) unsent: u32,
    /// Next range of a deallocate or copy, or next namespace of a flush to all.
    pub(crate) step: u32,
    /// What a command of several pieces needs beside that.
    pub(crate) pieces: Pieces,
    /// What it waits for beside memory and room.
    pub(crate) turn: Turn,
    /// [`View::generation`] when the command was decoded.
    pub(crate) decoded: u64,
    /// Where its I/O is, while it is at a volume.
    pub(crate) place: Place,
}

impl Slot {
    fn free() -> Slot {
        Slot {
            phase: Phase::Free,
            work: Work::Nothing,
            sqe: Sqe::default(),
            io: None,
            len: 0,
            skip: 0,
            held: 0,
            is_capsule: false,
            unsent: 0,
            step: 0,
            pieces: Pieces::default(),
            turn: Turn::default(),
            decoded: 0,
            place: Place { volume: 0, offset: 0, len: 0, stamp: 0 },
        }
    }
}

/// How far the connection is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Open,
    /// A last PDU is on its way; past the deadline it is given up.
    Terminating(Duration),
    /// Shut down; waits for the volume and the socket to give everything back.
    Draining,
}

/// See the module's documentation.
pub(crate) struct Conn {
    pub(crate) index: u32,
    pub(crate) stream: Stream,
    /// What comes before the first PDU; `None`: nothing, or nothing any more.
    pub(crate) opening: Option<Opening>,
    /// It counts among the core's handshakes.
    pub(crate) is_shaking: bool,
    /// Who the host is, by the TLS key that it has.
    pub(crate) proven: Option<Proven>,
    /// In-band authentication.
    pub(crate) auth: Auth,
    /// Subsystem NQN as the host connected to.
    pub(crate) subnqn: String,
    machine: tcp::Target,
    port: Port,
    /// Address of the host's end.
    peer: String,
    /// Its place among the connections, and before Connect among the handshakes.
    pass: Pass,
    /// What the controller sees of its subsystem; of queues of subsystems alone.
    pub(crate) view: Option<Arc<View>>,
    /// What an I/O queue has done.
    pub(crate) counters: Option<Arc<Counters>>,
    pub(crate) role: Role,
    pub(crate) association: Option<Arc<Association>>,
    /// Whose memory its commands hold; `None` before Connect.
    pub(crate) account: Option<Arc<Account>>,
    /// It counts among the queues of its host, which is proven or is believed.
    is_counted: bool,
    pub(crate) qid: u16,
    pub(crate) slots: Vec<Slot>,
    sq_head: u16,
    sq_entries: u16,
    /// Submission queue flow control is off: reads may end with their data.
    no_flow_control: bool,
    pub(crate) at_volume: usize,
    /// Commands whose response is not with the stream yet.
    unanswered: u32,
    pub(crate) waits: Waits,
    /// Received bytes that could not be processed for want of a buffer, and the slot that wants it.
    backlog: Vec<u8>,
    stalled: Option<u16>,
    pub(crate) life: Life,
    /// By then Connect must have succeeded.
    handshake_deadline: Option<Duration>,
    pub(crate) held: Option<Held>,
    /// The subsystem's clock counts this queue as busy.
    is_busy: bool,
    /// Ended, and what it has at volumes stands in their lines.
    is_guarded: bool,
    /// Fused commands of the queue.
    pub(crate) pairing: FusedPairing,
    /// What the host may do, as last asked: serial of the volume and word of its home then.
    pub(crate) rights: Option<(u64, u64, Rights)>,
}

/// A command that waits for something other than the host or a volume; one at a time.
#[derive(Clone, Copy)]
pub(crate) enum Held {
    /// Until the host's old controller can write no more.
    Connect(u16),
    /// Until another controller of the host can write no more.
    CrossReset { slot: u16, cntlid: u16, instance: Instance },
    /// Until the I/O queues are gone and the volumes flushed.
    Shutdown,
    /// Until the volume of the namespace with this identifier is flushed.
    Flushing(u32),
    /// Until the I/O queues are gone.
    Reset,
}

/// An I/O command, and where the data is that the host sends for it.
#[inline]
fn decode(
    sqe: &Sqe,
    in_capsule_len: u32,
    subsys: &SubsystemInfo,
) -> Result<(IoCommand, DataPtr), Status> {
    let command = nvme::ctrl::io::decode(sqe, subsys)?;
    if !command.takes_data() {
        return Ok((command, DataPtr::None));
    }
    let data = xfer::parse_data(sqe, in_capsule_len)?;
    // Data in the capsule, and a descriptor that says it is elsewhere.
    if in_capsule_len > 0 && matches!(data, DataPtr::Transport { .. }) {
        return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    }
    Ok((command, data))
}

/// The data digest of the first `len` bytes of a buffer.
fn digest_of(data: &SgList, len: usize) -> [u8; 4] {
    let mut whole = None;
    let mut running: Option<tcp::Crc32c> = None;
    let read = data.for_each_piece(0, len, &mut |bytes| {
        if bytes.len() == len {
            // All in one piece, as small reads are: making a running digest costs as much as this.
            whole = Some(tcp::Crc32c::of(bytes));
        } else {
            running.get_or_insert_default().update(bytes);
        }
    });
    debug_assert!(read.is_ok(), "the buffer has the command's length");
    whole.unwrap_or_else(|| running.unwrap_or_default().finish())
}

/// Token of the last PDU of a connection; slots are fewer.
const TERMINATION: u32 = u32::MAX;
/// Token of an answer without data whose command is followed.
const FOLLOWED: u32 = u32::MAX - 1;
const TERMINATION_LIMIT: Duration = Duration::from_secs(1);

/// Slots until Connect tells the queue's size: the Connect itself.
const FRESH_SLOTS: u16 = 2;

/// In-capsule data of the admin queue (NVMe/TCP: 8,192 bytes).
const ADMIN_IN_CAPSULE: u32 = 8192;

/// More commands than the queue has entries are given slack: a host may reuse an entry as soon as it
/// has the response, which is before the socket has told us that the response is sent.
fn slots_of(entries: u16) -> u16 {
    entries.saturating_mul(2).saturating_add(8)
}

impl Conn {
    /// PDUs that a connection may have queued: an R2T, or data and a response, for each slot of the
    /// largest queue, the reply to ICReq and a termination.
    pub(crate) fn tx_entries_max(limits: &Limits) -> usize {
        2 * usize::from(slots_of(limits.queue_entries)) + 2
    }

    pub(crate) fn new(
        index: u32,
        stream: Stream,
        port: Port,
        peer: String,
        pass: Pass,
        limits: &Limits,
        now: Duration,
    ) -> Conn {
        let machine = tcp::Target::new(tcp::TargetConfig {
            max_h2c_data: limits.h2c_data_bytes,
            in_capsule_max: ADMIN_IN_CAPSULE,
            slots: FRESH_SLOTS,
            ..tcp::TargetConfig::default()
        });
        Conn {
            index,
            stream,
            opening: Some(Opening::Begin),
            is_shaking: false,
            proven: None,
            auth: Auth::default(),
            subnqn: String::new(),
            machine,
            port,
            peer,
            pass,
            view: None,
            counters: None,
            role: Role::Fresh,
            association: None,
            account: None,
            is_counted: false,
            qid: 0,
            slots: (0..FRESH_SLOTS).map(|_| Slot::free()).collect(),
            sq_head: 0,
            sq_entries: FRESH_SLOTS,
            no_flow_control: false,
            at_volume: 0,
            unanswered: 0,
            waits: Waits::default(),
            backlog: Vec::new(),
            stalled: None,
            life: Life::Open,
            handshake_deadline: Some(now + limits.handshake),
            held: None,
            is_busy: false,
            is_guarded: false,
            pairing: FusedPairing::new(),
            rights: None,
        }
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    pub(crate) fn port(&self) -> &Port {
        &self.port
    }

    pub(crate) fn held(&self) -> Option<Held> {
        self.held
    }

    pub(crate) fn hold(&mut self, held: Held) {
        self.held = Some(held);
    }

    pub(crate) fn hold_nothing(&mut self) {
        self.held = None;
    }

    /// Keeps a command without moving it on.
    pub(crate) fn keep(&mut self, slot: u16) {
        self.slots[slot as usize].phase = Phase::Held;
    }

    pub(crate) fn slot_sqe(&self, slot: u16) -> &Sqe {
        &self.slots[slot as usize].sqe
    }

    pub(crate) fn slot_len(&self, slot: u16) -> usize {
        self.slots[slot as usize].len as usize
    }

    /// Copies what the host sent for a command; returns how much that was.
    pub(crate) fn slot_data(&self, slot: u16, to: &mut [u8]) -> usize {
        let entry = &self.slots[slot as usize];
        let len = (entry.len as usize).min(to.len());
        match &entry.io {
            Some(io) if io.data.copy_to_slice(0, &mut to[..len]).is_ok() => len,
            _ => 0,
        }
    }

    /// Connect succeeded: the connection is a queue from now on.
    pub(crate) fn become_queue(
        &mut self,
        role: Role,
        association: Arc<Association>,
        view: Option<Arc<View>>,
        request: &ConnectRequest,
        io_in_capsule: Option<u32>,
    ) {
        self.view = view;
        self.counters = (request.qid != 0).then(|| association.counters.join());
        let entries = u16::try_from(request.queue_entries).unwrap_or(u16::MAX);
        let slots = slots_of(entries);
        self.machine.set_limits(slots, io_in_capsule.unwrap_or(ADMIN_IN_CAPSULE));
        self.sq_entries = entries;
        // The Connect command itself took the first entry.
        self.sq_head = 1 % entries;
        self.no_flow_control = request.sq_flow_disabled;
        self.qid = request.qid;
        self.subnqn = request.subnqn.as_str().to_owned();
        self.role = role;
        self.association = Some(association);
        // What follows has times of its own.
        self.handshake_deadline = None;
    }

    /// The queue counts among those of its host from now on.
    pub(crate) fn count_in(&mut self, env: &Env<'_>) {
        let Some(association) = self.association.clone() else { return };
        let Some(account) = association.account() else { return };
        self.is_counted = true;
        self.pass.connected();
        self.charge(Arc::clone(account), env);
        if matches!(self.role, Role::Admin(_)) {
            tracing::info!(
                peer = self.peer,
                hostnqn = association.host.hostnqn,
                subnqn = self.subnqn,
                cntlid = association.cntlid,
                "association created"
            );
        }
    }

    /// The connection's Connect command waits for us: it is not idle.
    pub(crate) fn keep_handshake(&self) {
        self.pass.keep();
    }

    /// Takes what the socket has, as far as this turn goes.
    pub(crate) fn receive(&mut self, env: &mut Env<'_>) -> bool {
        env.sampler.look();
        let mut worked = self.stream.poll();
        while let Some(token) = self.stream.sent() {
            worked = true;
            self.sent(token, env);
        }
        if self.life != Life::Open {
            return worked;
        }
        if let Some(slot) = self.stalled {
            if !self.take_buffer(slot, env) {
                return worked;
            }
            self.stalled = None;
            worked = true;
            let backlog = std::mem::take(&mut self.backlog);
            let left = self.process(&backlog, env);
            if self.stalled.is_some() {
                self.backlog = backlog[backlog.len() - left..].to_vec();
                return worked;
            }
            self.stream.resume();
        }
        worked |= self.switch();
        let (mut chunks, mut bytes) = (0, 0);
        while chunks < CHUNKS_PER_TURN || chunks < SMALL_CHUNKS_PER_TURN && bytes < BYTES_PER_TURN {
            if self.life != Life::Open || self.waits_for_handshakes(env) {
                break;
            }
            chunks += 1;
            let placed = self.receive_into_place();
            if placed > 0 {
                (worked, bytes) = (true, bytes + placed);
                env.sampler.got();
                self.process(&[], env);
                env.sampler.look();
                continue;
            }
            match self.stream.recv() {
                Rx::Empty => break,
                Rx::Data(chunk) => {
                    (worked, bytes) = (true, bytes + chunk.len());
                    env.sampler.got();
                    self.take_chunk(&chunk, env);
                    env.sampler.look();
                    if self.stalled.is_some() {
                        break;
                    }
                }
                Rx::Eof => {
                    self.note_unfinished("closed the connection", env);
                    self.note_unproven("but closed the connection", env);
                    // A host that says so in TLS is told apart from one that is cut off.
                    let is_cut = self.proven.is_some() && !self.stream.is_ended_in_layer();
                    self.close(match is_cut {
                        true => "the connection was cut off without the end of TLS",
                        false => "the host closed the connection",
                    });
                    worked = true;
                }
                Rx::Failed(errno) => {
                    tracing::debug!(peer = self.peer, qid = self.qid, %errno, "socket failed");
                    self.note_unfinished("closed the connection", env);
                    self.note_unproven("but closed the connection", env);
                    self.close("the socket failed");
                    worked = true;
                }
            }
        }
        worked
    }

    /// Has data that comes next opened straight into its command's memory, where the stream's record
    /// layer can do that. Returns how many bytes it was.
    fn receive_into_place(&mut self) -> usize {
        let Some((slot, offset, len)) = self.machine.incoming() else { return 0 };
        let entry = &self.slots[slot as usize];
        let Some(io) = &entry.io else { return 0 };
        // In-capsule data that is not all of the capsule's is copied.
        if entry.skip > 0 || offset.checked_add(len).is_none_or(|end| end > entry.len) {
            return 0;
        }
        let placed = self.stream.recv_to(&io.data, offset as usize, len as usize);
        if placed > 0 {
            if let Some(association) = &self.association {
                association.touch();
            }
            self.machine.placed(placed as u32); // at most `len`
        }
        placed
    }

    fn take_chunk(&mut self, chunk: &RxChunk, env: &mut Env<'_>) {
        if let Some(association) = &self.association
            && self.is_counted
        {
            association.touch();
        }
        let left = self.open_with(chunk, env);
        let left = self.process(&chunk[chunk.len() - left..], env);
        if self.stalled.is_some() {
            // The buffer belongs to the core and goes back: what is left waits in memory of the
            // connection's own, one buffer's worth at the most, since receiving stops here.
            self.stream.pause();
            self.backlog = chunk[chunk.len() - left..].to_vec();
        }
    }

    /// Runs the machine over `bytes`; returns how many are left when it had to stop.
    fn process(&mut self, bytes: &[u8], env: &mut Env<'_>) -> usize {
        let mut input = bytes;
        while self.stalled.is_none() && self.life == Life::Open {
            match self.machine.next(&mut input) {
                Ok(None) => break,
                Ok(Some(event)) => self.on_event(event, env),
                Err(fault) => {
                    tracing::debug!(
                        peer = self.peer,
                        qid = self.qid,
                        fes = fault.fes.get(),
                        fei = fault.fei,
                        "connection terminated: {}",
                        fault.what
                    );
                    self.terminate(&fault, env.now);
                }
            }
        }
        input.len()
    }

    fn on_event(&mut self, event: TargetEvent<'_>, env: &mut Env<'_>) {
        match event {
            TargetEvent::Initialized { reply } => self.push(reply.as_ref(), None),
            TargetEvent::Command { slot, sqe, in_capsule_len } => {
                self.on_command(slot, Sqe::from_bytes(&sqe), in_capsule_len, env);
            }
            TargetEvent::Data { slot, offset, bytes } => self.on_data(slot, offset, bytes),
            TargetEvent::DataEnd { slot } => self.on_data_end(slot, env),
            TargetEvent::DataDigestError { slot } => {
                self.end(slot, Status::TRANSIENT_TRANSPORT_ERROR, 0, env);
            }
            TargetEvent::Terminated { fes } => {
                tracing::debug!(peer = self.peer, qid = self.qid, fes, "host terminated");
                self.note_unproven("but ended the connection", env);
                self.close("the host terminated the connection");
            }
        }
    }

    fn on_command(&mut self, slot: u16, sqe: Sqe, in_capsule_len: u32, env: &mut Env<'_>) {
        self.sq_head = if self.sq_head + 1 >= self.sq_entries { 0 } else { self.sq_head + 1 };
        // As many as the host has ever used at once: an idle queue takes little memory.
        if self.slots.len() <= usize::from(slot) {
            self.slots.resize_with(usize::from(slot) + 1, Slot::free);
        }
        let (work, data) = match self.classify(slot, &sqe, in_capsule_len, env) {
            // Data in the capsule, and a descriptor that says it is elsewhere.
            Ok((Work::Admin | Work::Auth | Work::Connect, DataPtr::Transport { .. }))
                if in_capsule_len > 0 =>
            {
                (Work::Refuse(Status::INVALID_FIELD_IN_COMMAND.dnr()), DataPtr::None)
            }
            Ok(found) => found,
            Err(status) => (Work::Refuse(status), DataPtr::None),
        };
        let (len, skip) = match data {
            DataPtr::InCapsule { offset, len } => (len, offset),
            data => (data.len(), 0),
        };
        self.unanswered += 1;
        if self.unanswered > self.sq_entries.into() {
            self.overrun(env);
        }
        let entry = &mut self.slots[slot as usize];
        debug_assert_eq!(entry.phase, Phase::Free, "the machine hands out free slots only");
        (entry.work, entry.sqe, entry.len, entry.skip, entry.step) = (work, sqe, len, skip, 0);
        entry.decoded = self.view.as_ref().map_or(0, |view| view.generation);
        if let Work::Io(command) = &work {
            let is_read = matches!(command, IoCommand::Read { .. });
            env.sampler.command(sample::tag(self.index, slot), is_read);
        }
        if in_capsule_len > 0 {
            // Data that nobody asked for is taken off the stream and dropped.
            entry.phase = Phase::Capsule;
            if matches!(data, DataPtr::InCapsule { .. }) && !self.take_buffer(slot, env) {
                self.stalled = Some(slot);
            }
        } else if matches!(data, DataPtr::Transport { .. }) {
            self.fetch(slot, env);
        } else {
            self.execute(slot, env);
        }
    }

    /// The host has more commands outstanding than its queue has entries.
    #[cold]
    fn overrun(&self, env: &Env<'_>) {
        count(&env.shared.hits.queue_overruns);
        if let Some(account) = &self.account {
            count(&account.overruns);
        }
    }

    /// What the command is, and where the data is that the host sends for it.
    fn classify(
        &mut self,
        slot: u16,
        sqe: &Sqe,
        in_capsule_len: u32,
        env: &mut Env<'_>,
    ) -> Result<(Work, DataPtr), Status> {
        if sqe.is_fabrics() && !self.pairing.is_idle(Fuse::None) {
            self.part_pair(slot, env);
        }
        let (work, takes_data) = match &mut self.role {
            Role::Fresh if sqe.is_fabrics() && sqe.fctype() == FabricsType::CONNECT => {
                (Work::Connect, true)
            }
            Role::Fresh => return Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            _ if auth::is_auth(sqe) => {
                (Work::Auth, sqe.fctype() == FabricsType::AUTHENTICATION_SEND)
            }
            _ if self.auth.is_due() => {
                self.note_unproven("but sent another command", env);
                return Err(Status::AUTHENTICATION_REQUIRED.dnr());
            }
            Role::Admin(_) => (Work::Admin, sqe.direction() == Direction::ToController),
            Role::Io { .. } if sqe.is_fabrics() => {
                nvme::ctrl::io_queue_fabrics(sqe)?;
                return Ok((Work::Disconnect, DataPtr::None));
            }
            Role::Io { .. } => {
                let Some(view) = &self.view else {
                    return Err(Status::INTERNAL_ERROR);
                };
                let decoded = decode(sqe, in_capsule_len, &view.info);
                let fuse = Fuse::of(sqe);
                if self.pairing.is_idle(fuse) {
                    return decoded.map(|(command, data)| (Work::Io(command), data));
                }
                let command = self.pair(slot, fuse, decoded.map(|(command, _)| command), env)?;
                return Ok((Work::Io(command), decoded?.1));
            }
        };
        let data = if takes_data { xfer::parse_data(sqe, in_capsule_len)? } else { DataPtr::None };
        if data.len() > ADMIN_IN_CAPSULE {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        Ok((work, data))
    }

    /// Gives a slot whose data follows its capsule the memory for it.
    fn take_buffer(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        let entry = &self.slots[slot as usize];
        let need = if entry.phase == Phase::Capsule { Need::Capsule } else { Need::Fetch };
        let store_len = match &entry.work {
            Work::Io(command) => pieces::store_len(command),
            _ => 0,
        };
        let len = entry.len as usize + store_len as usize;
        if !self.may_take(len, need, env) {
            return false;
        }
        let entry = &mut self.slots[slot as usize];
        let mut io = entry.io.take().unwrap_or_else(|| env.ios.take());
        let mut got = env.pool.alloc(entry.len as usize, &mut io.data).is_ok();
        if got {
            // All at once: who has one buffer and waits for another holds up others for nothing.
            got = entry.pieces.take_store(store_len, env);
            if !got {
                io.data.clear();
            }
        }
        entry.io = Some(io);
        self.taken(slot, len, got, env)
    }

    /// Nothing is received until a command gets its memory.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// Asks the host for a command's data, as soon as there is memory for it.
    pub(crate) fn fetch(&mut self, slot: u16, env: &mut Env<'_>) -> bool {
        if let Work::Refuse(status) = self.slots[slot as usize].work {
            // Refused while it waited: its data is not wanted any more.
            self.respond(slot, status, 0, env);
            return true;
        }
        if !self.take_buffer(slot, env) {
            return self.wait_in(Phase::WaitFetch, slot, env);
        }
        let entry = &mut self.slots[slot as usize];
        entry.phase = Phase::Fetching;
        env.sampler.mark(sample::tag(self.index, slot), Stage::Queue);
        let r2t = self.machine.r2t(slot, 0, entry.len);
        self.push(r2t.as_ref(), None);
        true
    }

    fn on_data(&mut self, slot: u16, offset: u32, bytes: &[u8]) {
        let entry = &self.slots[slot as usize];
        let Some(io) = &entry.io else { return };
        // In-capsule data may begin behind an offset and end before the capsule does.
        let skip = entry.skip.saturating_sub(offset).min(bytes.len() as u32) as usize;
        let at = (offset + skip as u32 - entry.skip.min(offset + skip as u32)) as usize;
        let room = (entry.len as usize).saturating_sub(at);
        let bytes = &bytes[skip..];
        let bytes = &bytes[..bytes.len().min(room)];
        if !bytes.is_empty() && io.data.copy_from_slice(at, bytes).is_err() {
            debug_assert!(false, "the buffer has the command's length");
        }
    }

    fn on_data_end(&mut self, slot: u16, env: &mut Env<'_>) {
        env.sampler.mark(sample::tag(self.index, slot), Stage::Data);
        match self.slots[slot as usize].phase {
            Phase::Capsule | Phase::Fetching => self.execute(slot, env),
            phase => debug_assert!(false, "data ended for a command in {phase:?}"),
        }
    }

    /// All that the command needs from the host is here.
    fn execute(&mut self, slot: u16, env: &mut Env<'_>) {
        match self.slots[slot as usize].work {
            Work::Nothing => debug_assert!(false, "a free slot has nothing to execute"),
            Work::Refuse(status) => self.respond(slot, status, 0, env),
            Work::Connect => self.connect(slot, env),
            Work::Admin => self.admit_admin(slot, env),
            Work::Auth => self.authenticate(slot, env),
            Work::Disconnect => self.respond_and_part(slot, Status::SUCCESS, 0, env),
            Work::Io(_) if self.slots[slot as usize].turn.is_paired() => self.pair_ready(slot, env),
            Work::Io(_) => {
                self.submit(slot, env);
            }
        }
    }

    fn cqe(&self, slot: u16, status: Status, result: u64) -> [u8; 16] {
        let sqhd = if self.no_flow_control { 0 } else { self.sq_head };
        let mut cqe = Cqe::new(self.machine.cid(slot), status, result);
        cqe.sqhd.set(sqhd);
        cqe.to_bytes()
    }

    /// Ends the Connect command that made this connection a queue.
    pub(crate) fn respond_connected(
        &mut self,
        slot: u16,
        cntlid: u16,
        authreq: u32,
        env: &mut Env<'_>,
    ) {
        let result = u64::from(cntlid) | u64::from(authreq);
        let mut cqe = Cqe::new(self.machine.cid(slot), Status::SUCCESS, result);
        // FFFFh is how a host learns that submission queue flow control is off (NVMe Base 2.0,
        // Connect Response); hosts that did not ask see the head.
        cqe.sqhd.set(if self.no_flow_control { u16::MAX } else { self.sq_head });
        let response = self.machine.response(slot, &cqe.to_bytes());
        self.push(response.as_ref(), None);
        self.free(slot, env);
    }

    pub(crate) fn cid(&self, slot: u16) -> u16 {
        self.machine.cid(slot)
    }

    /// Ends a command without data.
    pub(crate) fn respond(&mut self, slot: u16, status: Status, result: u64, env: &mut Env<'_>) {
        let cqe = self.cqe(slot, status, result);
        let response = self.machine.response(slot, &cqe);
        let tag = sample::tag(self.index, slot);
        env.sampler.mark(tag, Stage::Respond);
        let token = env.sampler.is_answered(tag).then_some(FOLLOWED);
        self.push(response.as_ref(), token);
        self.free(slot, env);
    }

    /// Ends the connection's last command: the connection closes when the answer is out.
    pub(crate) fn respond_and_part(
        &mut self,
        slot: u16,
        status: Status,
        result: u64,
        env: &mut Env<'_>,
    ) {
        let cqe = self.cqe(slot, status, result);
        let response = self.machine.response(slot, &cqe);
        self.free(slot, env);
        self.part(response.as_ref(), env.now);
    }

    /// Ends a command with the first `len` bytes of its buffer.
    pub(crate) fn respond_data(&mut self, slot: u16, len: u32, result: u64) {
        // The data's last PDU may stand for the response only where the host does not want to see
        // the queue's head, and where there is nothing else to say (NVMe/TCP, C2HData SUCCESS).
        let success = self.no_flow_control && result == 0;
        let head = self.machine.c2h_data(slot, 0, len, true, success);
        self.unanswered -= 1;
        self.sending(slot, len);
        let entry = &mut self.slots[slot as usize];
        entry.phase = Phase::Sending;
        let Some(io) = &entry.io else {
            debug_assert!(false, "data comes from a buffer");
            return;
        };
        let tail = self.machine.data_digest().then(|| digest_of(&io.data, len as usize));
        let pushed = self.stream.push(
            head.as_ref(),
            Some((&io.data, 0, len as usize)),
            tail,
            Some(slot.into()),
        );
        if pushed.is_err() {
            self.push_failed();
            return;
        }
        if !success {
            let cqe = self.cqe(slot, Status::SUCCESS, result);
            let response = self.machine.response(slot, &cqe);
            self.push(response.as_ref(), None);
        }
    }

    /// Ends an admin command with the bytes that the controller wrote.
    pub(crate) fn respond_bytes(
        &mut self,
        slot: u16,
        bytes: &[u8],
        result: u64,
        env: &mut Env<'_>,
    ) {
        let entry = &mut self.slots[slot as usize];
        let mut io = entry.io.take().unwrap_or_else(|| env.ios.take());
        io.data.clear();
        let placed = env.pool.alloc(bytes.len(), &mut io.data).is_ok()
            && io.data.copy_from_slice(0, bytes).is_ok();
        entry.io = Some(io);
        if !placed {
            // A host that is out of luck with memory asks again.
            self.respond(slot, Status::INTERNAL_ERROR, 0, env);
            return;
        }
        self.taken(slot, bytes.len(), true, env);
        self.respond_data(slot, bytes.len() as u32, result);
    }

    /// The stream no longer needs the payload of `token`.
    fn sent(&mut self, token: u32, env: &mut Env<'_>) {
        if token == TERMINATION {
            self.close("terminated");
            return;
        }
        if token == FOLLOWED {
            env.sampler.sent(self.index, &env.shared.sampling, env.core);
            return;
        }
        let slot = token as u16;
        if self.slots[slot as usize].phase == Phase::Sending {
            if env.sampler.is_answered(sample::tag(self.index, slot)) {
                env.sampler.sent(self.index, &env.shared.sampling, env.core);
            }
            self.free(slot, env);
        }
    }

    pub(crate) fn free(&mut self, slot: u16, env: &mut Env<'_>) {
        self.given_back(slot, env);
        let entry = &mut self.slots[slot as usize];
        if std::mem::replace(&mut entry.phase, Phase::Free) != Phase::Sending {
            self.unanswered -= 1;
        }
        entry.work = Work::Nothing;
        if let Some(io) = entry.io.take() {
            env.ios.give(io);
        }
        entry.pieces.clear(env);
        entry.turn.clear(env);
        self.machine.release(slot);
    }

    pub(crate) fn push(&mut self, head: &[u8], token: Option<u32>) {
        if self.stream.push(head, None, None, token).is_err() {
            self.push_failed();
        }
    }

    fn push_failed(&mut self) {
        debug_assert!(self.stream.failed().is_some(), "the send queue has room for every slot");
        self.close("the socket failed");
    }

    /// The host broke the protocol: say so, then go.
    fn terminate(&mut self, fault: &tcp::Fault, now: Duration) {
        let pdu = self.machine.term_req(fault);
        self.part(pdu.as_ref(), now);
    }

    /// Sends a last PDU; the connection closes when it is out, or cannot be sent in time.
    fn part(&mut self, pdu: &[u8], now: Duration) {
        self.life = Life::Terminating(now + TERMINATION_LIMIT);
        self.push(pdu, Some(TERMINATION));
        self.stream.pause();
    }

    /// Sends the last bytes of a handshake that failed, and closes the connection: when they are out,
    /// or when `wait` is over if there is one.
    pub(crate) fn part_after(&mut self, last: &[u8], wait: Duration, now: Duration) {
        if last.is_empty() && wait.is_zero() {
            return self.close("the TLS handshake failed");
        }
        let parts = last.len().div_ceil(HEAD_BYTES_MAX);
        for (n, part) in last.chunks(HEAD_BYTES_MAX).enumerate() {
            let is_end = wait.is_zero() && n + 1 == parts;
            self.push(part, is_end.then_some(TERMINATION));
        }
        if self.life == Life::Open {
            let limit = if wait.is_zero() { TERMINATION_LIMIT } else { wait };
            self.life = Life::Terminating(now + limit);
            self.stream.pause();
        }
    }

    /// Nothing more is received or sent; what the volume holds is waited for.
    pub(crate) fn close(&mut self, reason: &'static str) {
        if self.life == Life::Draining {
            return;
        }
        tracing::debug!(peer = self.peer, qid = self.qid, reason, "connection closed");
        self.life = Life::Draining;
        self.stream.shutdown();
    }

    /// Time-outs.
    pub(crate) fn tick(&mut self, env: &mut Env<'_>) {
        if self.life == Life::Draining {
            // The peer has not taken the end of TLS.
            self.stream.shutdown();
        }
        if self.life == Life::Open && self.handshake_deadline.is_some_and(|at| env.now >= at) {
            let limit = env.shared.limits.handshake.as_secs();
            self.note_unfinished(&format!("did not go on within {limit} s"), env);
            self.close("no Connect in time");
        }
        self.tick_auth(env);
        if let Life::Terminating(deadline) = self.life
            && env.now >= deadline
        {
            self.close("the termination was not taken");
        }
        if let (Role::Admin(admin), Some(association)) = (&mut self.role, &self.association) {
            // While we do not read, silence says nothing.
            if association.take_touched() || self.stalled.is_some() {
                admin.controller.touch(env.now);
            }
            if admin.controller.has_health_events() {
                let health = health(self.view.as_deref(), env.shared, env.now);
                admin.controller.set_health(health);
            }
            if self.life == Life::Open && admin.controller.is_expired(env.now) {
                tracing::info!(
                    hostnqn = association.host.hostnqn,
                    cntlid = association.cntlid,
                    "keep alive timeout: the association ends"
                );
                self.close("keep alive timeout");
            }
        }
    }

    /// Tells the subsystem's clock when an I/O queue becomes busy or idle.
    fn note_busy(&mut self, is_busy: bool, now: Duration) {
        let (Role::Io { .. }, Some(view)) = (&self.role, &self.view) else { return };
        if is_busy == self.is_busy {
            return;
        }
        self.is_busy = is_busy;
        if is_busy {
            view.subsystem.busy.begin(now);
        } else {
            view.subsystem.busy.end(now);
        }
    }

    /// Held commands, the association's state, and the flush that sends all responses of the turn.
    pub(crate) fn finish_turn(&mut self, env: &mut Env<'_>) -> bool {
        let mut worked = false;
        self.note_busy(self.machine.outstanding() > 0, env.now);
        if self.pass.is_revoked() && self.life != Life::Draining {
            self.close("newer connections need the room");
            worked = true;
        }
        if self.life == Life::Open {
            worked |= self.follow_association(env);
        }
        // Nothing can be answered on a connection that has just been closed.
        if self.life == Life::Open {
            worked |= self.poll_held(env);
            worked |= self.poll_auth(env);
            worked |= self.poll_delayed(env);
        }
        if self.life != Life::Open && !std::mem::replace(&mut self.is_guarded, true) {
            self.guard_late_changes();
        }
        if self.life == Life::Draining {
            if matches!(self.role, Role::Admin(_))
                && let Some(association) = &self.association
                && !association.is_dead()
            {
                // The controller lives as long as its admin queue.
                association.kill();
                env.shared.wake_all();
            }
        } else {
            self.stream.flush();
            // Most of it has left already: its memory serves the next commands while it is warm.
            while let Some(token) = self.stream.sent() {
                self.sent(token, env);
            }
        }
        worked
    }

    /// Whether the association wants this queue gone.
    fn follow_association(&mut self, env: &mut Env<'_>) -> bool {
        let Some(association) = &self.association else { return false };
        if association.is_dead() {
            self.close("the association ended");
            return true;
        }
        if let Role::Io { epoch, .. } = self.role
            && association.io_epoch() != epoch
        {
            self.close("the controller was reset");
            return true;
        }
        if self.is_counted && association.aborts.is_asked() && self.qid != 0 {
            self.abort_commands(env);
            return true;
        }
        false
    }

    /// Whether the next turn has to look at the connection although nothing comes for it.
    pub(crate) fn wants_turn(&self) -> bool {
        self.life != Life::Open
            || self.held.is_some()
            || self.stalled.is_some()
            || matches!(self.opening, Some(Opening::Switch(..)))
            || matches!(&self.role, Role::Admin(admin) if admin.awaits())
            || self.stream.wants_turn()
    }

    /// Nothing of the connection is in use any more, by anybody.
    pub(crate) fn is_gone(&self) -> bool {
        self.life == Life::Draining && self.at_volume == 0 && self.stream.is_quiet()
    }

    /// Last call before the connection is dropped.
    pub(crate) fn leave(&mut self, env: &mut Env<'_>) {
        env.sampler.forget(self.index);
        self.end_handshake(env);
        self.note_busy(false, env.now);
        self.leave_rota(env);
        for slot in 0..self.slots.len() {
            self.given_back(slot as u16, env);
            if let Some(io) = self.slots[slot].io.take() {
                env.ios.give(io);
            }
            self.slots[slot].pieces.clear(env);
            self.slots[slot].turn.clear(env);
        }
        if let Some(association) = self.association.take() {
            if let Some(counters) = self.counters.take() {
                association.counters.leave(&counters);
            }
            match self.is_counted {
                true => env.shared.registry.leave(&association, self.qid),
                false => env.shared.registry.leave_unproven(&association, self.qid),
            }
            env.shared.settled();
        }
    }
}
