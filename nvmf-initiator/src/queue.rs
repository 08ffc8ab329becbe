//! One I/O queue of a channel on one path.
//!
//! Cuts the requests it is given into *commands* of at most what the controller takes at once, each
//! under a cid of the queue. What is out when the path is lost is reported to the [`Table`] as soon
//! as the old connection is quiet.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{AcquireAction, Io, Op, RegisterAction, Reserve};
use crypto::dhchap::Concatenation;
use iobuf::SgList;
use nvme::ctrl::io::Fuse;
use nvme::host::{self, Authentication};
use nvme::spec::{CopyRange, Cqe, DsmRange, SCT_PATH, Status};
use nvme::subsys::reservation::{self, PersistChange, ReleaseAction, ReservationRequest};
use nvme::tcp::{HostConfig, HostEvent, Transfer};
use reactor::Local;

use crate::auth::{self, Auth, Computing, RECEIVE_BYTES};
use crate::link::{Link, Loss};
use crate::shared::{ChannelCounters, PathCounts, PathState, RemoteState, Shared};
use crate::status::{Verdict, judge, judge_pair};
use crate::table::{Settled, Table};

/// Bytes of the data of a Connect command (NVMe Base 2.0, Fabrics Connect command).
const CONNECT_BYTES: usize = 1024;
/// Most bytes of one read or write command, whatever the controller allows: longer ones only delay
/// others.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;
/// The Connect command of the queue goes under this cid, before any other.
const CONNECT_CID: u16 = 0;
/// Shortest time between two requests to look at the namespace again.
const RESCAN_INTERVAL: Duration = Duration::from_millis(50);
/// When to look again for memory, if nothing else happens.
const MEMORY_RETRY: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No connection, nothing sent. Moved on by a snapshot with an association not tried yet.
    Down,
    /// The link is opening. Moved on by ICResp.
    Opening,
    /// Connect is sent. Moved on by its completion.
    Connecting,
    /// The host, and maybe the controller, prove themselves. Moved on by the end of that.
    Authenticating,
    /// The queue takes commands. Ended by whatever ends the association.
    Ready,
    /// The link is closing. Moved on when nothing of it can be sent any more.
    Leaving,
}

/// A command sent and not settled: not answered, or its memory still referred to.
#[derive(Clone, Copy, Debug)]
struct Command {
    is_active: bool,
    is_answered: bool,
    request: u16,
    /// Queued PDUs whose payload the stream still refers to.
    payloads: u32,
    /// Where its data begins in the request's.
    start: u64,
    sent_at: Duration,
    /// What the controller has asked for and is not queued yet.
    ttag: u16,
    out_offset: u32,
    out_left: u32,
    /// It is half of a fused pair.
    pair: Option<Half>,
}

/// Half of a Compare and Write.
#[derive(Clone, Copy, Debug)]
struct Half {
    fuse: Fuse,
    /// Cid of the other half.
    other: u16,
    /// What the other half was answered with, if it was first.
    told: Option<Status>,
}

impl Command {
    const IDLE: Command = Command {
        is_active: false,
        is_answered: false,
        request: 0,
        payloads: 0,
        start: 0,
        sent_at: Duration::ZERO,
        ttag: 0,
        out_offset: 0,
        out_left: 0,
        pair: None,
    };
}

/// What this association allows.
#[derive(Clone, Copy, Debug, Default)]
struct Limits {
    block_bytes: u64,
    /// Bytes of one read or write command.
    transfer_bytes: u64,
    /// Bytes of data that may travel in the capsule of a command.
    in_capsule_bytes: u64,
    /// Bytes of one write zeroes command.
    write_zeroes_bytes: u64,
    /// Bytes of one deallocate command.
    deallocate_bytes: u64,
    /// Bytes of one verify command.
    verify_bytes: u64,
}

/// What queues of a channel share while they are driven.
pub(crate) struct Env<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) state: &'a RemoteState,
    pub(crate) table: &'a mut Table,
    pub(crate) counters: &'a ChannelCounters,
    /// Paths with a queue that takes commands and can be used for I/O, one bit each.
    pub(crate) usable: u16,
    pub(crate) now: Duration,
}

/// An authentication under way on the queue.
struct AuthRun {
    auth: Auth,
    /// Of the command that is out, or the next.
    cid: u16,
    is_out: bool,
    computing: Option<Computing>,
    /// What a Receive brings.
    data: Vec<u8>,
    received: usize,
    /// No I/O before its end.
    is_urgent: bool,
}

/// See the [module](self).
pub(crate) struct Queue {
    local: Local,
    /// Number of the path.
    path: u8,
    /// Seat at the volume; the queue ID is one more.
    index: u16,
    counters: Arc<PathCounts>,
    stage: Stage,
    /// Association that the link belongs to, or belonged to: each is tried once.
    generation: u64,
    /// Where the link leads.
    addr: SocketAddr,
    /// Changes went down with the association `generation`, and its controller may still do them.
    is_unfenced: bool,
    link: Link,
    /// To make another link with, when the path leads elsewhere.
    host_config: HostConfig,
    limits: Limits,
    commands: Vec<Command>,
    /// Commands out.
    in_flight: u16,
    /// Source ranges of copies that are out, by cid.
    lists: Vec<SgList>,
    /// Lowest on top, once the queue is connected.
    free_cids: Vec<u16>,
    /// Commands with data to queue, each once.
    out: VecDeque<u16>,
    connect_data: SgList,
    connect_by: Duration,
    /// When to look for overdue commands; none while no command is out.
    next_check: Option<Duration>,
    /// When the namespace may be asked to be looked at again.
    rescan_at: Duration,
    /// There was no memory for a command's data.
    is_starved: bool,
    auth: Option<Box<AuthRun>>,
    /// The host has authenticated on this connection.
    is_authenticated: bool,
    /// The controller wants it again, before I/O.
    is_auth_due: bool,
    /// [`RemoteState::auth_round`] when the last authentication began, or before.
    auth_round: u64,
}

impl Queue {
    /// All memory the queue needs for I/O is allocated here.
    pub(crate) fn new(
        shared: &Shared,
        local: &Local,
        path: usize,
        addr: SocketAddr,
        depth: u16,
        counters: Arc<PathCounts>,
    ) -> io::Result<Queue> {
        let config = &shared.config;
        // At least two, for a fused pair.
        let cids = depth.max(2).min(config.queue_depth);
        let mut connect_data = SgList::with_capacity(1);
        local
            .pool()
            .alloc(CONNECT_BYTES, &mut connect_data)
            .map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
        let host_config = HostConfig {
            queue_depth: cids,
            header_digest: config.header_digest,
            data_digest: config.data_digest,
            ..HostConfig::default()
        };
        let link = link_to(shared, local, addr, &host_config);
        Ok(Queue {
            local: local.clone(),
            path: path as u8,
            index: 0,
            counters,
            stage: Stage::Down,
            generation: 0,
            addr,
            is_unfenced: false,
            link,
            host_config,
            limits: Limits::default(),
            commands: vec![Command::IDLE; usize::from(cids)],
            in_flight: 0,
            lists: (0..cids).map(|_| SgList::with_capacity(1)).collect(),
            free_cids: Vec::with_capacity(usize::from(cids)),
            out: VecDeque::with_capacity(usize::from(cids)),
            connect_data,
            connect_by: Duration::ZERO,
            next_check: None,
            rescan_at: Duration::ZERO,
            is_starved: false,
            auth: None,
            is_authenticated: false,
            is_auth_due: false,
            auth_round: 0,
        })
    }

    /// The channel has this seat.
    pub(crate) fn sit(&mut self, index: u16) {
        self.index = index;
    }

    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    /// Commands out.
    #[inline]
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Whether so many commands can be queued now.
    #[inline]
    pub(crate) fn has_room(&self, count: usize) -> bool {
        self.free_cids.len() >= count
            && !self.is_starved
            && !self.is_auth_due
            && self.link.room() >= count
    }

    fn qid(&self) -> u16 {
        self.index + 1
    }

    fn state<'a>(&self, env: &Env<'a>) -> &'a PathState {
        &env.state.paths[usize::from(self.path)]
    }

    /// Acts on what is known of the path.
    fn look(&mut self, env: &mut Env<'_>) -> Result<(), Loss> {
        let path = self.state(env);
        if self.is_unfenced && self.stage == Stage::Down && path.fenced >= self.generation {
            self.is_unfenced = false;
            env.table.on_fenced(self.path);
        }
        let is_tried = path.generation == self.generation;
        match self.stage {
            Stage::Down if path.is_live && !is_tried => {
                debug_assert!(!self.is_unfenced, "an association before the last one has ended");
                self.generation = path.generation;
                // What is asked for from now on may be about what changes while it authenticates.
                self.auth_round = env.state.auth_round;
                self.stage = Stage::Opening;
                if path.addr != self.addr {
                    self.addr = path.addr;
                    self.link = link_to(env.shared, &self.local, path.addr, &self.host_config);
                }
                self.link.open(env.shared.offers(usize::from(self.path)))?;
            }
            Stage::Opening | Stage::Connecting | Stage::Authenticating | Stage::Ready
                if !path.is_live || !is_tried =>
            {
                self.leave(env, None);
            }
            Stage::Ready => self.authenticate_again(env)?,
            _ => {}
        }
        Ok(())
    }

    /// The connection broke: the whole association ends.
    #[cold]
    pub(crate) fn lose(&mut self, loss: &Loss, env: &mut Env<'_>) {
        if matches!(self.stage, Stage::Leaving | Stage::Down) {
            return;
        }
        let text = format!("I/O queue {}: {loss}", self.qid());
        env.shared.report_fault(usize::from(self.path), self.generation, &text);
        self.leave(env, Some(loss));
    }

    #[cold]
    fn leave(&mut self, env: &mut Env<'_>, loss: Option<&Loss>) {
        let is_at_rest = self.is_at_rest();
        self.stage = Stage::Leaving;
        self.next_check = None;
        self.out.clear();
        (self.auth, self.is_auth_due, self.is_authenticated) = (None, false, false);
        if loss.is_none() && is_at_rest {
            self.link.finish(env.now);
        } else {
            self.link.close(env.now, loss.and_then(Loss::fault));
        }
        if self.link.is_closed() {
            self.on_left(env);
        }
    }

    /// Whether everything that was sent is answered.
    fn is_at_rest(&self) -> bool {
        self.stage == Stage::Ready && self.in_flight == 0 && self.auth.is_none()
    }

    /// The link is closed: nothing of the old association can be sent any more from here.
    #[cold]
    fn on_left(&mut self, env: &mut Env<'_>) {
        self.stage = Stage::Down;
        self.is_unfenced = true;
        self.is_starved = false;
        self.in_flight = 0;
        self.free_cids.clear();
        for command in &mut self.commands {
            let command = std::mem::replace(command, Command::IDLE);
            if command.is_active && command.is_answered {
                env.table.on_settled(command.request, self.path, env.usable, env.now);
            } else if command.is_active {
                env.table.on_lost(command.request, self.path);
            }
        }
        self.lists.iter_mut().for_each(SgList::clear);
    }

    /// Moves the link on and receives all there is.
    pub(crate) fn drive(&mut self, env: &mut Env<'_>) -> Result<(), Loss> {
        self.link.poll(env.now)?;
        if self.stage == Stage::Leaving && self.link.is_closed() {
            self.on_left(env);
        }
        self.look(env)?;
        if matches!(self.stage, Stage::Down | Stage::Leaving) {
            return Ok(());
        }
        self.is_starved = false;
        while let Some(token) = self.link.sent() {
            self.on_sent(token, env);
        }
        loop {
            if self.receive_into_place(env) {
                while let Some(event) = self.link.next(&mut &[][..])? {
                    self.on_event(event, env)?;
                }
                continue;
            }
            let Some(chunk) = self.link.recv()? else { break };
            let mut input: &[u8] = &chunk;
            while let Some(event) = self.link.next(&mut input)? {
                self.on_event(event, env)?;
            }
        }
        if self.stage == Stage::Connecting && env.now >= self.connect_by {
            return Err(Loss::Command("no answer to Connect in time".to_owned()));
        }
        if self.next_check.is_some_and(|at| at <= env.now) {
            self.check_overdue(env)?;
        }
        self.run_auth(env)?;
        if self.stage == Stage::Ready {
            self.send_out(env)?;
        }
        Ok(())
    }

    /// Has data that comes next opened straight into the memory of its command, where there is TLS.
    fn receive_into_place(&mut self, env: &mut Env<'_>) -> bool {
        let Some((cid, offset, len)) = self.link.host.incoming() else { return false };
        if !self.link.is_tls() || self.is_auth_command(cid) {
            return false;
        }
        let command = &self.commands[usize::from(cid)];
        let io = env.table.io(command.request).filter(|_| command.is_active);
        let at = command.start + u64::from(offset);
        let Some((io, end)) = io.zip(at.checked_add(len.into())) else { return false };
        end <= io.data.len() as u64 && self.link.recv_to(&io.data, at as usize, len as usize) > 0
    }

    #[inline]
    fn on_event(&mut self, event: HostEvent<'_>, env: &mut Env<'_>) -> Result<(), Loss> {
        match event {
            HostEvent::Data { cid, offset, bytes } if self.is_auth_command(cid) => {
                self.on_auth_data(offset, bytes)?;
            }
            HostEvent::Complete { cid, cqe } if self.is_auth_command(cid) => {
                self.on_auth_complete(Cqe::from_bytes(&cqe).status(), env)?;
            }
            HostEvent::Data { cid, offset, bytes } => {
                let command = &self.commands[usize::from(cid)];
                let at = command.start + u64::from(offset);
                // The qpair machine lets no byte through that the command did not ask for.
                let io = env.table.io(command.request).filter(|_| command.is_active);
                let is_placed =
                    io.is_some_and(|io| io.data.copy_from_slice(at as usize, bytes).is_ok());
                if !is_placed {
                    return Err(Loss::Command("data for no buffer".to_owned()));
                }
            }
            HostEvent::R2t { cid, ttag, offset, len } => {
                let command = &mut self.commands[usize::from(cid)];
                *command = Command { ttag, out_offset: offset, out_left: len, ..*command };
                self.out.push_back(cid);
            }
            HostEvent::Complete { cid, cqe } => {
                let cqe = Cqe::from_bytes(&cqe);
                match self.stage {
                    Stage::Ready => self.on_complete(cid, cqe.status(), env)?,
                    _ => self.on_connected(&cqe, env)?,
                }
            }
            HostEvent::Initialized => self.send_connect(env)?,
            // The link makes a loss of it.
            HostEvent::Terminated { fes } => return Err(Loss::Terminated { fes }),
        }
        Ok(())
    }

    /// Connect for this queue (NVMe Base 2.0, Fabrics Connect command); its data always fits the
    /// capsule.
    fn send_connect(&mut self, env: &mut Env<'_>) -> Result<(), Loss> {
        let config = &env.shared.config;
        let entries = self.queue_entries(env);
        let (sqe, data) =
            host::io_connect(&config.names(), self.state(env).cntlid, self.qid(), entries);
        self.connect_data
            .copy_from_slice(0, &data)
            .map_err(|_| Loss::Command("no memory for Connect".to_owned()))?;
        let transfer = Transfer::Write { len: CONNECT_BYTES as u32, in_capsule: true };
        let head = self.link.host.command(CONNECT_CID, &sqe, transfer);
        self.link.push(&head, Some((&self.connect_data, 0, CONNECT_BYTES)), None)?;
        self.connect_by = env.now + config.connect_timeout;
        self.stage = Stage::Connecting;
        Ok(())
    }

    /// Entries of this queue: one more than commands can be out, and no more than the controller
    /// supports.
    fn queue_entries(&self, env: &Env<'_>) -> u16 {
        let wanted = self.commands.len() as u16 + 1;
        wanted.min(self.state(env).queue_entries).max(2)
    }

    fn on_connected(&mut self, cqe: &Cqe, env: &mut Env<'_>) -> Result<(), Loss> {
        let status = cqe.status();
        if !status.is_success() {
            return Err(Loss::Command(format!("Connect refused: {status}")));
        }
        let asked = Authentication::asked(cqe.dw0());
        match auth::wanted(&env.shared.security(), asked, self.link.is_tls())? {
            Some(concatenation) => {
                self.stage = Stage::Authenticating;
                self.begin_auth(concatenation, true, env)?;
            }
            None => self.on_ready(env),
        }
        Ok(())
    }

    /// The queue takes commands.
    fn on_ready(&mut self, env: &mut Env<'_>) {
        let state = self.state(env);
        let block_bytes = u64::from(env.state.geometry.block_bytes);
        let bytes = |blocks: u32| u64::from(blocks.max(1)) * block_bytes;
        let transfer = u64::from(state.transfer_bytes_max).min(TRANSFER_BYTES_MAX);
        let transfer = transfer.min(bytes(host::io::BLOCKS_MAX));
        self.limits = Limits {
            block_bytes,
            transfer_bytes: (transfer - transfer % block_bytes).max(block_bytes),
            in_capsule_bytes: u64::from(state.in_capsule_bytes),
            write_zeroes_bytes: bytes(state.write_zeroes_blocks_max),
            deallocate_bytes: bytes(state.deallocate_blocks_max),
            verify_bytes: bytes(state.verify_blocks_max),
        };
        self.free_cids.clear();
        self.free_cids.extend((0..self.queue_entries(env) - 1).rev());
        self.stage = Stage::Ready;
        env.shared.note_connected(usize::from(self.path), self.generation);
    }

    /// Begins the authentication that was asked for, unless one is under way.
    fn authenticate_again(&mut self, env: &Env<'_>) -> Result<(), Loss> {
        if self.stage != Stage::Ready
            || self.auth_round == env.state.auth_round
            || self.auth.is_some()
        {
            return Ok(());
        }
        self.auth_round = env.state.auth_round;
        match self.is_authenticated {
            true => self.begin_auth(Concatenation::No, false, env),
            false => Ok(()),
        }
    }

    /// Begins an authentication. An urgent one goes before all I/O.
    #[cold]
    fn begin_auth(
        &mut self,
        concatenation: Concatenation,
        is_urgent: bool,
        env: &Env<'_>,
    ) -> Result<(), Loss> {
        let config = &env.shared.config;
        let security = env.shared.security();
        let Some(dhchap) = &security.dhchap else {
            return Err(Loss::Authentication("the controller asks for it anew".to_owned()));
        };
        let until = env.now + config.command_timeout;
        let local = &self.local;
        let auth =
            Auth::new(dhchap, &config.names(), concatenation, &mut || local.random_u64(), until);
        self.auth = Some(Box::new(AuthRun {
            auth,
            cid: CONNECT_CID,
            is_out: false,
            computing: None,
            data: vec![0; RECEIVE_BYTES],
            received: 0,
            is_urgent,
        }));
        self.is_auth_due |= is_urgent;
        Ok(())
    }

    #[inline]
    fn is_auth_command(&self, cid: u16) -> bool {
        self.auth.as_ref().is_some_and(|run| run.is_out && run.cid == cid)
    }

    #[cold]
    fn on_auth_data(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Loss> {
        let Some(run) = &mut self.auth else { return Ok(()) };
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        // The qpair machine lets no byte through that the command did not ask for.
        let Some(place) = run.data.get_mut(start..end) else {
            return Err(Loss::Command("data for no buffer".to_owned()));
        };
        place.copy_from_slice(bytes);
        run.received = end;
        Ok(())
    }

    #[cold]
    fn on_auth_complete(&mut self, status: Status, env: &Env<'_>) -> Result<(), Loss> {
        let Some(run) = &mut self.auth else { return Ok(()) };
        run.is_out = false;
        if self.stage == Stage::Ready {
            self.free_cids.push(run.cid);
        }
        let task = run.auth.on_completion(status, &run.data[..run.received])?;
        if let Some(task) = task {
            run.computing = Some(Computing::start(task, &env.shared.worker, &self.local)?);
        }
        Ok(())
    }

    /// Goes on with an authentication, if there is one.
    #[inline]
    fn run_auth(&mut self, env: &mut Env<'_>) -> Result<(), Loss> {
        if self.auth.is_none() {
            return Ok(());
        }
        self.step_auth(env)
    }

    #[cold]
    fn step_auth(&mut self, env: &mut Env<'_>) -> Result<(), Loss> {
        let Some(run) = &mut self.auth else { return Ok(()) };
        run.auth.is_late(env.now)?;
        if let Some(done) = run.computing.as_ref().and_then(Computing::take) {
            run.computing = None;
            run.auth.on_computed(done);
        }
        if run.is_out || run.computing.is_some() || self.link.room() == 0 {
            return Ok(());
        }
        // A queue that is in use has to have an entry free; one before it has no other command.
        let cid = match self.stage {
            Stage::Ready => self.free_cids.last().copied(),
            _ => Some(CONNECT_CID),
        };
        let Some(cid) = cid else { return Ok(()) };
        if let Some(command) = run.auth.next_command() {
            (run.cid, run.is_out, run.received) = (cid, true, 0);
            let head = self.link.host.command(cid, &command.sqe, command.transfer());
            match &command.message {
                None => self.link.push(&head, None, None)?,
                Some(message) => {
                    let mut list = SgList::with_capacity(1);
                    self.local
                        .pool()
                        .alloc(message.len(), &mut list)
                        .ok()
                        .and_then(|()| list.copy_from_slice(0, message).ok())
                        .ok_or_else(|| Loss::Command("no memory for a message".to_owned()))?;
                    self.link.push(&head, Some((&list, 0, message.len())), None)?;
                }
            }
            if self.stage == Stage::Ready {
                self.free_cids.pop();
            }
            return Ok(());
        }
        if run.auth.outcome()?.is_some() {
            let is_urgent = run.is_urgent;
            self.auth = None;
            self.is_authenticated = true;
            if is_urgent {
                self.is_auth_due = false;
            }
            if self.stage == Stage::Authenticating {
                self.on_ready(env);
            }
            // What was asked for meanwhile may be about what has changed since it began.
            self.authenticate_again(env)?;
        }
        Ok(())
    }

    #[inline]
    fn on_complete(&mut self, cid: u16, status: Status, env: &mut Env<'_>) -> Result<(), Loss> {
        let command = &mut self.commands[usize::from(cid)];
        command.is_answered = true;
        command.out_left = 0;
        let (request, is_free) = (command.request, command.payloads == 0);
        let latency = env.now.saturating_sub(command.sent_at).as_nanos() as u64;
        ChannelCounters::add(&self.counters.commands, 1);
        ChannelCounters::add(&self.counters.latency_ns, latency);
        let half = command.pair;
        let verdict = judge(status);
        if status.sct() == SCT_PATH || matches!(verdict, Verdict::Doubt(_)) {
            self.on_path_status(env);
        }
        let verdict = match half {
            None => verdict,
            Some(half) => self.on_half(half, status),
        };
        env.table.on_answered(request, verdict);
        if is_free {
            self.settle(cid, env);
        }
        if status.is(Status::AUTHENTICATION_REQUIRED) {
            self.on_auth_required(env)?;
        }
        Ok(())
    }

    /// Half of a fused pair was answered: the pair is judged with the second answer.
    #[cold]
    fn on_half(&mut self, half: Half, status: Status) -> Verdict {
        match (half.fuse, half.told) {
            (Fuse::First, Some(write)) => judge_pair(status, write),
            (_, Some(compare)) => judge_pair(compare, status),
            (_, None) => {
                // It is still out, and its cid its own.
                if let Some(other) = &mut self.commands[usize::from(half.other)].pair {
                    other.told = Some(status);
                }
                Verdict::Done
            }
        }
    }

    /// The controller wants the host to prove itself again.
    #[cold]
    fn on_auth_required(&mut self, env: &Env<'_>) -> Result<(), Loss> {
        match &mut self.auth {
            Some(run) => (run.is_urgent, self.is_auth_due) = (true, true),
            None => self.begin_auth(Concatenation::No, true, env)?,
        }
        Ok(())
    }

    /// The namespace cannot be reached this way, as far as the controller knows: its ANA state is
    /// not what it is taken for, or it is detached.
    #[cold]
    fn on_path_status(&mut self, env: &mut Env<'_>) {
        if env.now >= self.rescan_at {
            self.rescan_at = env.now + RESCAN_INTERVAL;
            env.shared.ask_rescan(usize::from(self.path));
        }
    }

    #[inline]
    fn on_sent(&mut self, token: u32, env: &mut Env<'_>) {
        let Some(command) = self.commands.get_mut(token as usize) else { return };
        command.payloads = command.payloads.saturating_sub(1);
        if command.payloads == 0 && command.is_active && command.is_answered {
            self.settle(token as u16, env);
        }
    }

    /// The command is answered and its memory free: so is the cid.
    #[inline]
    fn settle(&mut self, cid: u16, env: &mut Env<'_>) {
        let command = std::mem::replace(&mut self.commands[usize::from(cid)], Command::IDLE);
        let list = &mut self.lists[usize::from(cid)];
        if !list.is_empty() {
            list.clear();
        }
        self.free_cids.push(cid);
        self.in_flight -= 1;
        let others = env.usable & !(1 << self.path);
        if env.table.on_settled(command.request, self.path, others, env.now) == Settled::Retry {
            ChannelCounters::add(&env.counters.retries, 1);
        }
    }

    /// Queues the data that the controller waits for.
    #[inline]
    fn send_out(&mut self, env: &mut Env<'_>) -> Result<(), Loss> {
        while let Some(&cid) = self.out.front() {
            if self.link.room() == 0 {
                return Ok(());
            }
            if self.send_data(cid, env)? {
                self.out.pop_front();
            }
        }
        Ok(())
    }

    /// One H2CData PDU for `cid`. `true`: the controller has all it asked for.
    fn send_data(&mut self, cid: u16, env: &mut Env<'_>) -> Result<bool, Loss> {
        let command = &mut self.commands[usize::from(cid)];
        if command.out_left == 0 {
            return Ok(true); // answered in the meantime
        }
        let len = command.out_left.min(self.link.host.max_h2c_data());
        let (offset, is_last) = (command.out_offset, len == command.out_left);
        command.out_offset += len;
        command.out_left -= len;
        let head = self.link.host.h2c_data(cid, command.ttag, offset, len, is_last);
        let Some(io) = env.table.io(command.request) else { return Ok(true) };
        let (offset, part) = (offset as usize, len as usize);
        if let Some(data) = inline_data(io, command.start, &self.limits) {
            // Made up, not in any memory: it travels with the head.
            let part = data.as_slice().get(offset..offset + part).unwrap_or(&[]);
            push_inline(&mut self.link, &head, part)?;
        } else {
            let (list, at) = match io.op {
                Op::Copy => (&self.lists[usize::from(cid)], offset),
                _ => (&io.data, command.start as usize + offset),
            };
            command.payloads += 1;
            self.link.push(&head, Some((list, at, part)), Some(u32::from(cid)))?;
        }
        Ok(is_last)
    }

    /// The next command of request `id`, of which `start` bytes have been sent. There must be room.
    /// `false`: there is no memory for it now.
    #[inline]
    pub(crate) fn send_command(
        &mut self,
        id: u16,
        start: u64,
        env: &mut Env<'_>,
    ) -> Result<bool, Loss> {
        let (Some(io), Some(&cid)) = (env.table.io(id), self.free_cids.last()) else {
            return Ok(false);
        };
        if io.op == Op::CompareAndWrite {
            return self.send_pair(id, env);
        }
        let limits = self.limits;
        let nsid = env.shared.config.nsid;
        let left = io.len - start;
        let slba = (io.offset + start) / limits.block_bytes;
        let blocks = |len: u64| (len / limits.block_bytes) as u32;
        let fits = |len: u64| len <= limits.in_capsule_bytes;
        let (sqe, len, transfer) = match io.op {
            Op::Read => {
                let len = left.min(limits.transfer_bytes);
                let sqe = host::io::read(nsid, slba, blocks(len), len as u32, io.fua);
                (sqe, len, Transfer::Read { len: len as u32 })
            }
            Op::Write | Op::Compare => {
                let len = left.min(limits.transfer_bytes);
                let in_capsule = fits(len);
                let build = if io.op == Op::Write { host::io::write } else { host::io::compare };
                let sqe = build(nsid, slba, blocks(len), len as u32, in_capsule, io.fua);
                (sqe, len, Transfer::Write { len: len as u32, in_capsule })
            }
            Op::WriteZeroes => {
                let len = left.min(limits.write_zeroes_bytes);
                let may_deallocate = !io.no_unmap;
                let sqe = host::io::write_zeroes(nsid, slba, blocks(len), may_deallocate, io.fua);
                (sqe, len, Transfer::None)
            }
            Op::Deallocate => {
                let len = left.min(limits.deallocate_bytes);
                let in_capsule = fits(DSM_RANGE_BYTES as u64);
                let sqe = host::io::deallocate(nsid, 1, in_capsule);
                (sqe, len, Transfer::Write { len: DSM_RANGE_BYTES as u32, in_capsule })
            }
            Op::Flush => (host::io::flush(nsid), 0, Transfer::None),
            Op::Verify => {
                let len = left.min(limits.verify_bytes);
                (host::io::verify(nsid, slba, blocks(len), io.fua), len, Transfer::None)
            }
            Op::Copy => {
                let ranges = io.sources.len();
                let len = ranges * COPY_RANGE_BYTES;
                let list = &mut self.lists[usize::from(cid)];
                if self.local.pool().alloc(len, list).is_err() {
                    self.is_starved = true;
                    return Ok(false);
                }
                copy_ranges(io, list, &limits)?;
                let in_capsule = fits(len as u64);
                let sqe = host::io::copy(nsid, slba, ranges as u16, in_capsule, io.fua);
                (sqe, left, Transfer::Write { len: len as u32, in_capsule })
            }
            Op::Reserve => {
                let request = request_of(&io.reserve);
                let len = host::io::reservation_len(&request);
                let in_capsule = fits(len.into());
                let (sqe, _) = host::io::reservation(nsid, &request, in_capsule);
                (sqe, 0, Transfer::Write { len, in_capsule })
            }
            Op::ReservationReport => {
                let sqe = host::io::reservation_report(nsid, io.len as u32);
                (sqe, io.len, Transfer::Read { len: io.len as u32 })
            }
            Op::CompareAndWrite => return Ok(false), // above
        };
        let is_whole = len == left || !io.op.has_range();
        let mut payloads = 0;
        let head = self.link.host.command(cid, &sqe, transfer);
        let token = Some(u32::from(cid));
        match transfer {
            Transfer::Write { len: bytes, in_capsule: true } => {
                match (io.op, inline_data(io, start, &limits)) {
                    (_, Some(data)) => push_inline(&mut self.link, &head, data.as_slice())?,
                    (Op::Copy, _) => {
                        payloads = 1;
                        let list = &self.lists[usize::from(cid)];
                        self.link.push(&head, Some((list, 0, bytes as usize)), token)?;
                    }
                    _ => {
                        payloads = 1;
                        let payload = Some((&io.data, start as usize, bytes as usize));
                        self.link.push(&head, payload, token)?;
                    }
                }
            }
            _ => self.link.push(&head, None, None)?,
        }
        self.issued(cid, Command { request: id, payloads, start, ..Command::IDLE }, env);
        env.table.on_issued(id, len, is_whole);
        Ok(true)
    }

    /// A command was queued under the next free cid.
    #[inline]
    fn issued(&mut self, cid: u16, command: Command, env: &Env<'_>) {
        self.free_cids.pop();
        self.in_flight += 1;
        self.commands[usize::from(cid)] = Command { is_active: true, sent_at: env.now, ..command };
        ChannelCounters::add(&env.counters.commands, 1);
        if self.next_check.is_none() {
            self.next_check = Some(env.now + env.shared.config.command_timeout);
        }
    }

    /// A Compare and Write: two fused commands, one directly after the other. There must be room for
    /// both.
    #[cold]
    fn send_pair(&mut self, id: u16, env: &mut Env<'_>) -> Result<bool, Loss> {
        let &[.., second, first] = &self.free_cids[..] else { return Ok(false) };
        for (cid, other, fuse) in [(first, second, Fuse::First), (second, first, Fuse::Second)] {
            let Some(io) = env.table.io(id) else { return Ok(false) };
            let (len, nsid) = (io.len as u32, env.shared.config.nsid);
            let slba = io.offset / self.limits.block_bytes;
            let blocks = (io.len / self.limits.block_bytes) as u32;
            let in_capsule = io.len <= self.limits.in_capsule_bytes;
            let (build, start): (fn(_, _, _, _, _, _) -> _, _) = match fuse {
                Fuse::First => (host::io::compare, 0),
                _ => (host::io::write, io.len),
            };
            let sqe = host::io::fused(build(nsid, slba, blocks, len, in_capsule, io.fua), fuse);
            let head = self.link.host.command(cid, &sqe, Transfer::Write { len, in_capsule });
            let payload = in_capsule.then_some((&io.data, start as usize, len as usize));
            self.link.push(&head, payload, in_capsule.then_some(u32::from(cid)))?;
            let pair = Some(Half { fuse, other, told: None });
            let payloads = u32::from(in_capsule);
            self.issued(cid, Command { request: id, payloads, start, pair, ..Command::IDLE }, env);
            let is_whole = fuse == Fuse::Second;
            env.table.on_issued(id, if is_whole { len.into() } else { 0 }, is_whole);
        }
        Ok(true)
    }

    /// Looks for overdue commands. Runs about once per time-out, so that a command costs no timer.
    #[cold]
    fn check_overdue(&mut self, env: &Env<'_>) -> Result<(), Loss> {
        let timeout = env.shared.config.command_timeout;
        let waiting = self.commands.iter().filter(|c| c.is_active && !c.is_answered);
        self.next_check = waiting.map(|command| command.sent_at + timeout).min();
        match self.next_check {
            Some(at) if at <= env.now => {
                Err(Loss::Command(format!("a command was not answered within {timeout:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Sends what was queued.
    #[inline]
    pub(crate) fn flush(&mut self) {
        self.link.flush();
        self.counters.in_flight.store(self.in_flight.into(), Ordering::Relaxed);
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        let connect = (self.stage == Stage::Connecting).then_some(self.connect_by);
        let auth = self.auth.as_ref().map(|run| run.auth.until);
        let memory = self.is_starved.then(|| self.local.now() + MEMORY_RETRY);
        [self.link.deadline(), connect, auth, memory, self.next_check].into_iter().flatten().min()
    }
}

impl Drop for Queue {
    /// The channel is closed while its association goes on.
    fn drop(&mut self) {
        if self.is_at_rest() {
            self.link.finish(self.local.now());
        }
    }
}

/// The connection of a queue to the listener at `addr`.
fn link_to(shared: &Shared, local: &Local, addr: SocketAddr, host_config: &HostConfig) -> Link {
    // A capsule and an H2CData PDU per command, and the ICReq; what does not fit waits for the
    // next poll.
    let tx_entries_max = usize::from(host_config.queue_depth) * 2 + 2;
    let timeout = shared.config.connect_timeout;
    Link::new(local, addr, host_config.clone(), tx_entries_max, timeout)
}

/// Bytes of a Dataset Management range (NVM Command Set 1.0, Dataset Management command).
const DSM_RANGE_BYTES: usize = size_of::<DsmRange>();
/// Bytes of a source range of a Copy command (NVM Command Set 1.0, Copy command).
const COPY_RANGE_BYTES: usize = size_of::<CopyRange>();

/// A few bytes of data that are in no I/O's memory.
struct Inline {
    bytes: [u8; 16],
    len: usize,
}

impl Inline {
    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The data of the command for the part of the request from `start`, if it is made up.
#[inline]
fn inline_data(io: &Io, start: u64, limits: &Limits) -> Option<Inline> {
    match io.op {
        Op::Deallocate => Some(dsm_range(io, start, limits)),
        Op::Reserve => {
            let request = request_of(&io.reserve);
            let (_, bytes) = host::io::reservation(0, &request, false);
            Some(Inline { bytes, len: host::io::reservation_len(&request) as usize })
        }
        _ => None,
    }
}

fn dsm_range(io: &Io, start: u64, limits: &Limits) -> Inline {
    let len = (io.len - start).min(limits.deallocate_bytes);
    let nlb = (len / limits.block_bytes) as u32;
    let slba = (io.offset + start) / limits.block_bytes;
    let mut bytes = [0; DSM_RANGE_BYTES];
    bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
    bytes[8..].copy_from_slice(&slba.to_le_bytes());
    Inline { bytes, len: DSM_RANGE_BYTES }
}

/// Writes the source ranges of a copy, which `check` has approved, into memory for them.
fn copy_ranges(io: &Io, list: &SgList, limits: &Limits) -> Result<(), Loss> {
    for (index, source) in io.sources.iter().enumerate() {
        let slba = source.offset / limits.block_bytes;
        let nlb_z = (source.len / limits.block_bytes).saturating_sub(1) as u16;
        let mut range = [0; COPY_RANGE_BYTES];
        range[8..16].copy_from_slice(&slba.to_le_bytes());
        range[16..18].copy_from_slice(&nlb_z.to_le_bytes());
        list.copy_from_slice(index * COPY_RANGE_BYTES, &range)
            .map_err(|_| Loss::Command("no memory for the source ranges".to_owned()))?;
    }
    Ok(())
}

/// In the words of the wire.
fn request_of(reserve: &Reserve) -> ReservationRequest {
    let rtype = |rtype: block::ReservationType| {
        // The same six, with the same numbers.
        reservation::ReservationType::from_wire(rtype.to_wire())
            .unwrap_or(reservation::ReservationType::WriteExclusive)
    };
    match *reserve {
        Reserve::Register { action, iekey, persist, crkey, nrkey } => {
            ReservationRequest::Register {
                action: match action {
                    RegisterAction::Register => reservation::RegisterAction::Register,
                    RegisterAction::Unregister => reservation::RegisterAction::Unregister,
                    RegisterAction::Replace => reservation::RegisterAction::Replace,
                },
                iekey,
                persist: match persist {
                    None => PersistChange::Keep,
                    Some(false) => PersistChange::Clear,
                    Some(true) => PersistChange::Set,
                },
                crkey,
                nrkey,
            }
        }
        Reserve::Acquire { action, rtype: kind, crkey, prkey } => ReservationRequest::Acquire {
            action: match action {
                AcquireAction::Acquire => reservation::AcquireAction::Acquire,
                AcquireAction::Preempt => reservation::AcquireAction::Preempt,
                AcquireAction::PreemptAndAbort => reservation::AcquireAction::PreemptAndAbort,
            },
            rtype: rtype(kind),
            crkey,
            prkey,
        },
        Reserve::Release { rtype: kind, crkey } => {
            let action = ReleaseAction::Release(Some(rtype(kind)));
            ReservationRequest::Release { action, crkey }
        }
        Reserve::Clear { crkey } => {
            ReservationRequest::Release { action: ReleaseAction::Clear, crkey }
        }
    }
}

/// Queues a PDU with a few bytes of data that are in no I/O's memory: they travel with the head.
fn push_inline(link: &mut Link, head: &[u8], data: &[u8]) -> Result<(), Loss> {
    let mut bytes = [0; INLINE_BYTES_MAX];
    let len = head.len() + data.len();
    let Some(whole) = bytes.get_mut(..len) else {
        return Err(Loss::Command("a PDU head too long".to_owned()));
    };
    whole[..head.len()].copy_from_slice(head);
    whole[head.len()..].copy_from_slice(data);
    link.push_inline(whole, data)
}

/// The longest head is 128 bytes, where PDO is at its largest (NVMe/TCP 1.0, CPDA).
const INLINE_BYTES_MAX: usize = 128 + DSM_RANGE_BYTES;
