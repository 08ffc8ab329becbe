//! One I/O queue of a remote namespace on one core.
//!
//! An accepted I/O waits in the [`Table`]. It is cut into *commands* of at most what the controller
//! takes at once, each under a cid of the queue, and is given back when all of them are answered
//! and the stream refers to none of its memory any more. When the path is lost, what is not
//! finished is held, in the order of acceptance, as soon as the old connection is quiet, and starts
//! again from its first byte on the next association.
//!
//! Everything that one poll queues leaves in one send: `submit` only files the I/O, `poll`
//! receives, then sends.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{Busy, Channel, Io, IoError, Op};
use iobuf::SgList;
use nvme::host;
use nvme::spec::{Cqe, DsmRange, Status};
use nvme::tcp::{HostConfig, HostEvent, Transfer};
use reactor::Local;

use crate::link::{Link, Loss};
use crate::shared::{ChannelCounters, Phase, RemoteState, Shared};
use crate::status::judge;
use crate::table::{Settled, Table};

/// Bytes of the data of a Connect command (NVMe Base 2.0, Fabrics Connect command).
const CONNECT_BYTES: usize = 1024;
/// Most bytes of one read or write command, whatever the controller allows: longer ones only delay
/// others.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;
/// The Connect command of the queue goes under this cid, before any other.
const CONNECT_CID: u16 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No connection, nothing sent. Moved on by a snapshot with an association not tried yet.
    Down,
    /// The link is opening. Moved on by ICResp.
    Opening,
    /// Connect is sent. Moved on by its completion.
    Connecting,
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
}

/// See the [module](self).
pub(crate) struct RemoteChannel {
    shared: Arc<Shared>,
    local: Local,
    /// Seat at the volume; the queue ID is one more.
    index: u16,
    counters: Arc<ChannelCounters>,
    /// Of the snapshot in `state`.
    epoch: u64,
    state: Arc<RemoteState>,
    stage: Stage,
    /// Association that the link belongs to, or belonged to: each is tried once.
    generation: u64,
    link: Link,
    limits: Limits,
    table: Table,
    commands: Vec<Command>,
    /// Lowest on top, once the queue is connected.
    free_cids: Vec<u16>,
    /// Commands with data to queue, each once.
    out: VecDeque<u16>,
    connect_data: SgList,
    connect_by: Duration,
    /// When to look for overdue commands; none while no command is out.
    next_check: Option<Duration>,
}

impl RemoteChannel {
    /// All memory the channel needs for I/O is allocated here.
    pub(crate) fn open(
        shared: Arc<Shared>,
        local: &Local,
        depth: u32,
    ) -> io::Result<RemoteChannel> {
        let depth = depth.clamp(1, u32::from(u16::MAX)) as u16;
        let config = &shared.config;
        let cids = depth.min(config.queue_depth);
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
        // A capsule and an H2CData PDU per command, and the ICReq; what does not fit waits for the
        // next poll.
        let tx_entries_max = usize::from(cids) * 2 + 2;
        let link =
            Link::new(local, config.addr, host_config, tx_entries_max, config.connect_timeout);
        let counters = Arc::new(ChannelCounters::default());
        let refuse = |text| io::Error::new(io::ErrorKind::ResourceBusy, text);
        let index = shared.take_seat(local.handle(), Arc::clone(&counters)).ok_or_else(|| {
            refuse(format!("all {} I/O queues of the remote volume are in use", config.queues))
        })?;
        let state = shared.state();
        if state.phase == Phase::Live && index >= state.queues {
            // The association would break under the other channels when this one asks for its
            // queue.
            shared.leave_seat(index);
            return Err(refuse(format!("the controller grants only {} I/O queues", state.queues)));
        }
        let retries_max = config.retries_max;
        Ok(RemoteChannel {
            epoch: 0, // never published, so that the first poll takes up the state
            state,
            shared,
            local: local.clone(),
            index,
            counters,
            stage: Stage::Down,
            generation: 0,
            link,
            limits: Limits::default(),
            table: Table::new(depth, retries_max),
            commands: vec![Command::IDLE; usize::from(cids)],
            free_cids: Vec::with_capacity(usize::from(cids)),
            out: VecDeque::with_capacity(usize::from(cids)),
            connect_data,
            connect_by: Duration::ZERO,
            next_check: None,
        })
    }

    fn qid(&self) -> u16 {
        self.index + 1
    }

    /// Acts on a new snapshot. Costs one atomic load when there is none.
    fn look(&mut self, now: Duration) -> Result<(), Loss> {
        let epoch = self.shared.epoch();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.state = self.shared.state();
        }
        let is_live = self.state.phase == Phase::Live;
        let is_tried = self.state.generation == self.generation;
        match self.stage {
            Stage::Down if is_live && !is_tried => {
                self.generation = self.state.generation;
                self.stage = Stage::Opening;
                self.link.open()?;
            }
            Stage::Opening | Stage::Connecting | Stage::Ready if !is_live || !is_tried => {
                self.leave(now, None);
            }
            _ => {}
        }
        Ok(())
    }

    /// The connection broke: the whole association ends.
    #[cold]
    fn lose(&mut self, now: Duration, loss: &Loss) {
        if matches!(self.stage, Stage::Leaving | Stage::Down) {
            return;
        }
        self.shared.report_fault(self.generation, &format!("I/O queue {}: {loss}", self.qid()));
        self.leave(now, Some(loss));
    }

    #[cold]
    fn leave(&mut self, now: Duration, loss: Option<&Loss>) {
        self.stage = Stage::Leaving;
        self.next_check = None;
        self.out.clear();
        self.link.close(now, loss.and_then(Loss::fault));
        if self.link.is_closed() {
            self.on_left(now);
        }
    }

    /// The link is closed: nothing of the old association can be sent any more from here.
    #[cold]
    fn on_left(&mut self, now: Duration) {
        self.stage = Stage::Down;
        self.free_cids.clear();
        for command in &mut self.commands {
            let command = std::mem::replace(command, Command::IDLE);
            if command.is_active && command.is_answered {
                self.table.on_settled(command.request, now);
            } else if command.is_active {
                self.table.on_lost(command.request);
            }
        }
        let resends = self.table.hold_again();
        ChannelCounters::add(&self.counters.resends, resends);
    }

    /// Moves link and queue on: receives all there is, then queues all there is room for.
    fn drive(&mut self, now: Duration) -> Result<(), Loss> {
        self.link.poll(now)?;
        if self.stage == Stage::Leaving && self.link.is_closed() {
            self.on_left(now);
        }
        self.look(now)?;
        if matches!(self.stage, Stage::Down | Stage::Leaving) {
            return Ok(());
        }
        while let Some(token) = self.link.sent() {
            self.on_sent(token, now);
        }
        while let Some(chunk) = self.link.recv()? {
            let mut input: &[u8] = &chunk;
            while let Some(event) = self.link.next(&mut input)? {
                self.on_event(event, now)?;
            }
        }
        match self.stage {
            Stage::Connecting if now >= self.connect_by => {
                Err(Loss::Command("no answer to Connect in time".to_owned()))
            }
            Stage::Ready => self.send(now),
            _ => Ok(()),
        }
    }

    #[inline]
    fn on_event(&mut self, event: HostEvent<'_>, now: Duration) -> Result<(), Loss> {
        match event {
            HostEvent::Data { cid, offset, bytes } => {
                let command = &self.commands[usize::from(cid)];
                let at = command.start + u64::from(offset);
                // The qpair machine lets no byte through that the command did not ask for.
                let io = self.table.io(command.request).filter(|_| command.is_active);
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
                let status = Cqe::from_bytes(&cqe).status();
                match self.stage {
                    Stage::Ready => self.on_complete(cid, status, now),
                    _ => self.on_connected(status)?,
                }
            }
            HostEvent::Initialized => self.send_connect(now)?,
            // The link makes a loss of it.
            HostEvent::Terminated { fes } => return Err(Loss::Terminated { fes }),
        }
        Ok(())
    }

    /// Connect for this queue (NVMe Base 2.0, Fabrics Connect command); its data always fits the
    /// capsule.
    fn send_connect(&mut self, now: Duration) -> Result<(), Loss> {
        let config = &self.shared.config;
        let entries = self.queue_entries();
        let (sqe, data) = host::io_connect(&config.names(), self.state.cntlid, self.qid(), entries);
        self.connect_data
            .copy_from_slice(0, &data)
            .map_err(|_| Loss::Command("no memory for Connect".to_owned()))?;
        let transfer = Transfer::Write { len: CONNECT_BYTES as u32, in_capsule: true };
        let head = self.link.host.command(CONNECT_CID, &sqe, transfer);
        self.link.push(&head, Some((&self.connect_data, 0, CONNECT_BYTES)), None)?;
        self.connect_by = now + config.connect_timeout;
        self.stage = Stage::Connecting;
        Ok(())
    }

    /// Entries of this queue: one more than commands can be out, and no more than the controller
    /// supports.
    fn queue_entries(&self) -> u16 {
        let wanted = self.commands.len() as u16 + 1;
        wanted.min(self.state.queue_entries).max(2)
    }

    fn on_connected(&mut self, status: Status) -> Result<(), Loss> {
        if !status.is_success() {
            return Err(Loss::Command(format!("Connect refused: {status}")));
        }
        let state = &self.state;
        let block_bytes = u64::from(state.geometry.block_bytes);
        let bytes = |blocks: u32| u64::from(blocks.max(1)) * block_bytes;
        let transfer = u64::from(state.transfer_bytes_max).min(TRANSFER_BYTES_MAX);
        let transfer = transfer.min(bytes(host::io::BLOCKS_MAX));
        self.limits = Limits {
            block_bytes,
            transfer_bytes: (transfer - transfer % block_bytes).max(block_bytes),
            in_capsule_bytes: u64::from(state.in_capsule_bytes),
            write_zeroes_bytes: bytes(state.write_zeroes_blocks_max),
            deallocate_bytes: bytes(state.deallocate_blocks_max),
        };
        self.free_cids.clear();
        self.free_cids.extend((0..self.queue_entries() - 1).rev());
        self.stage = Stage::Ready;
        self.shared.note_connected(self.generation);
        Ok(())
    }

    #[inline]
    fn on_complete(&mut self, cid: u16, status: Status, now: Duration) {
        let command = &mut self.commands[usize::from(cid)];
        command.is_answered = true;
        command.out_left = 0;
        let (request, is_free) = (command.request, command.payloads == 0);
        self.table.on_answered(request, judge(status));
        if is_free {
            self.settle(cid, now);
        }
    }

    #[inline]
    fn on_sent(&mut self, token: u32, now: Duration) {
        let Some(command) = self.commands.get_mut(token as usize) else { return };
        command.payloads = command.payloads.saturating_sub(1);
        if command.payloads == 0 && command.is_active && command.is_answered {
            self.settle(token as u16, now);
        }
    }

    /// The command is answered and its memory free: so is the cid.
    #[inline]
    fn settle(&mut self, cid: u16, now: Duration) {
        let command = std::mem::replace(&mut self.commands[usize::from(cid)], Command::IDLE);
        self.free_cids.push(cid);
        if self.table.on_settled(command.request, now) == Settled::Retry {
            ChannelCounters::add(&self.counters.retries, 1);
        }
    }

    /// Queues what can be queued: data the controller waits for, then new commands.
    #[inline]
    fn send(&mut self, now: Duration) -> Result<(), Loss> {
        self.table.wake(now);
        while let Some(&cid) = self.out.front() {
            if self.link.room() == 0 {
                return Ok(());
            }
            if self.send_data(cid)? {
                self.out.pop_front();
            }
        }
        while self.link.room() > 0 {
            let Some(&cid) = self.free_cids.last() else { break };
            let Some((id, start, io)) = self.table.front() else { break };
            if start == 0 {
                // Here, not in `submit`: the namespace may not have been known then, or have
                // changed since.
                let verdict = block::check(&self.state.geometry, io);
                if verdict.is_err() || io.op != Op::Flush && io.len == 0 {
                    self.table.finish_front(verdict);
                    continue;
                }
            }
            self.send_command(cid, id, start, now)?;
        }
        Ok(())
    }

    /// One H2CData PDU for `cid`. `true`: the controller has all it asked for.
    fn send_data(&mut self, cid: u16) -> Result<bool, Loss> {
        let command = &mut self.commands[usize::from(cid)];
        if command.out_left == 0 {
            return Ok(true); // answered in the meantime
        }
        let len = command.out_left.min(self.link.host.max_h2c_data());
        let (offset, is_last) = (command.out_offset, len == command.out_left);
        command.out_offset += len;
        command.out_left -= len;
        let head = self.link.host.h2c_data(cid, command.ttag, offset, len, is_last);
        let Some(io) = self.table.io(command.request) else { return Ok(true) };
        if io.op == Op::Deallocate {
            // The range is made up, not in any memory: it travels with the head.
            let range = dsm_range(io, command.start, &self.limits);
            let (offset, len) = (offset as usize, len as usize);
            let part = range.get(offset..offset + len).unwrap_or(&[]);
            push_inline(&mut self.link, &head, part)?;
        } else {
            let at = command.start as usize + offset as usize;
            command.payloads += 1;
            self.link.push(&head, Some((&io.data, at, len as usize)), Some(u32::from(cid)))?;
        }
        Ok(is_last)
    }

    /// The next command of the request in front, under a cid just found free.
    #[inline]
    fn send_command(&mut self, cid: u16, id: u16, start: u64, now: Duration) -> Result<(), Loss> {
        let Some(io) = self.table.io(id) else { return Ok(()) };
        let limits = self.limits;
        let nsid = self.shared.config.nsid;
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
            Op::Write => {
                let len = left.min(limits.transfer_bytes);
                let in_capsule = fits(len);
                let sqe = host::io::write(nsid, slba, blocks(len), len as u32, in_capsule, io.fua);
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
            Op::Compare | Op::Verify | Op::Copy | Op::Reserve | Op::ReservationReport => {
                // `check` refuses them, as long as the geometry does not offer them.
                return Err(Loss::Command("an operation that is not offered".to_owned()));
            }
        };
        let is_whole = io.op == Op::Flush || len == left;
        let mut payloads = 0;
        let head = self.link.host.command(cid, &sqe, transfer);
        match (io.op, transfer) {
            (Op::Write, Transfer::Write { in_capsule: true, .. }) => {
                payloads = 1;
                let payload = Some((&io.data, start as usize, len as usize));
                self.link.push(&head, payload, Some(u32::from(cid)))?;
            }
            (Op::Deallocate, Transfer::Write { in_capsule: true, .. }) => {
                push_inline(&mut self.link, &head, &dsm_range(io, start, &limits))?;
            }
            _ => self.link.push(&head, None, None)?,
        }
        self.free_cids.pop();
        self.commands[usize::from(cid)] = Command {
            is_active: true,
            request: id,
            payloads,
            start,
            sent_at: now,
            ..Command::IDLE
        };
        self.table.on_issued(id, len, is_whole);
        ChannelCounters::add(&self.counters.commands, 1);
        if self.next_check.is_none() {
            self.next_check = Some(now + self.shared.config.command_timeout);
        }
        Ok(())
    }

    /// Looks for overdue commands. Runs about once per time-out, so that a command costs no timer.
    #[cold]
    fn check_overdue(&mut self, now: Duration) -> Result<(), Loss> {
        let timeout = self.shared.config.command_timeout;
        let waiting = self.commands.iter().filter(|c| c.is_active && !c.is_answered);
        self.next_check = waiting.map(|command| command.sent_at + timeout).min();
        match self.next_check {
            Some(at) if at <= now => {
                Err(Loss::Command(format!("a command was not answered within {timeout:?}")))
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self, now: Duration) -> Result<(), Loss> {
        self.drive(now)?;
        if self.next_check.is_some_and(|at| at <= now) {
            self.check_overdue(now)?;
        }
        self.link.flush();
        Ok(())
    }

    fn count(&self, io: &Io) {
        match (io.op, io.result) {
            (_, Err(_)) => ChannelCounters::add(&self.counters.errors, 1),
            (Op::Read, _) => ChannelCounters::add(&self.counters.read_bytes, io.len),
            (Op::Write, _) => ChannelCounters::add(&self.counters.write_bytes, io.len),
            _ => {}
        }
    }
}

/// Bytes of a Dataset Management range (NVM Command Set 1.0, Dataset Management command).
const DSM_RANGE_BYTES: usize = size_of::<DsmRange>();

/// The range of the Dataset Management command for the part of the request from `start`.
fn dsm_range(io: &Io, start: u64, limits: &Limits) -> [u8; DSM_RANGE_BYTES] {
    let len = (io.len - start).min(limits.deallocate_bytes);
    let nlb = (len / limits.block_bytes) as u32;
    let slba = (io.offset + start) / limits.block_bytes;
    let mut bytes = [0; DSM_RANGE_BYTES];
    bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
    bytes[8..].copy_from_slice(&slba.to_le_bytes());
    bytes
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

impl Channel for RemoteChannel {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        self.table.accept(io).map_err(Busy)
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        let now = self.local.now();
        if let Err(loss) = self.step(now) {
            self.lose(now, &loss);
        }
        if matches!(self.state.phase, Phase::Gone | Phase::Stopped { .. }) {
            self.table.fail_all_held(IoError::Gone);
        }
        while let Some(io) = self.table.take_finished() {
            self.count(&io);
            done(io);
        }
        self.counters.in_flight.store(self.table.len() as u64, Ordering::Relaxed);
    }

    fn in_flight(&self) -> usize {
        self.table.len()
    }

    fn deadline(&self) -> Option<Duration> {
        let connect = (self.stage == Stage::Connecting).then_some(self.connect_by);
        let wake = (self.stage == Stage::Ready).then(|| self.table.next_wake()).flatten();
        [self.link.deadline(), connect, wake, self.next_check].into_iter().flatten().min()
    }

    fn abort(&mut self) {
        self.table.abort();
    }
}

impl Drop for RemoteChannel {
    fn drop(&mut self) {
        if self.table.len() > 0 {
            tracing::error!(
                queue = self.qid(),
                in_flight = self.table.len(),
                "channel of a remote volume dropped with I/O in flight"
            );
        }
        self.shared.leave_seat(self.index);
    }
}
