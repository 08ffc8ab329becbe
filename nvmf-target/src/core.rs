//! The task that a core runs for the target: all of its qpairs, one channel per volume.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{Busy, Channel, Io, IoError};
use iobuf::{Pool, SgList};
use reactor::net::{Stream, StreamConfig};
use reactor::{Local, Progress, Ready, Receiver, Task};

use crate::conn::Conn;
use crate::fence::CoreFences;
use crate::sample::Sampler;
use crate::secure::Handshakes;
use crate::table::Table;
use crate::target::{Handover, Shared};
use crate::volume::VolumeState;
use crate::wait::Rota;

/// How often time-outs are looked at: keep alive, handshakes, terminations. They are seconds long.
const TICK: Duration = Duration::from_millis(500);

/// I/O that a channel of this target may have in flight; past it commands wait their turn.
const CHANNEL_DEPTH: u32 = 1024;

/// Segments that an I/O has room for from the start: the pool's largest pieces of a full transfer.
const SEGMENTS: usize = 16;

/// What a connection may use of its core while it is called.
pub(crate) struct Env<'a> {
    pub(crate) core: usize,
    pub(crate) shared: &'a Arc<Shared>,
    /// What is served, as this core knows it.
    pub(crate) table: &'a Table,
    pub(crate) fences: &'a mut CoreFences,
    pub(crate) local: &'a Local,
    pub(crate) pool: &'a Pool,
    pub(crate) volumes: &'a mut Volumes,
    pub(crate) ios: &'a mut IoCache,
    pub(crate) rota: &'a mut Rota,
    /// Number of the core's turn.
    pub(crate) lap: u64,
    /// Commands that wait for their turn, see `turn.rs`; each is looked at once per turn.
    pub(crate) awaiting: &'a mut Vec<(u32, u16)>,
    /// TLS handshakes under way on this core.
    pub(crate) handshakes: &'a mut Handshakes,
    /// Follows one request in many.
    pub(crate) sampler: &'a mut Sampler,
    pub(crate) now: Duration,
}

/// Recycled I/O objects: as many exist as were ever in use at once, which the slots bound.
#[derive(Default)]
pub(crate) struct IoCache {
    // The address of an I/O in flight must not change: they are boxed once and then only moved.
    #[expect(clippy::vec_box, reason = "the boxes themselves are what is recycled")]
    free: Vec<Box<Io>>,
}

impl IoCache {
    pub(crate) fn take(&mut self) -> Box<Io> {
        self.free.pop().unwrap_or_else(|| Box::new(Io::with_capacity(SEGMENTS)))
    }

    pub(crate) fn give(&mut self, mut io: Box<Io>) {
        io.data.clear();
        self.free.push(io);
    }
}

/// Why a volume did not take an I/O.
pub(crate) enum Refused {
    /// No room now.
    Busy(Box<Io>),
    /// The volume cannot be opened on this core; the result says so.
    Failed(Box<Io>),
}

/// A volume's channel on this core.
struct Open {
    /// The volume's: another one may get its number.
    serial: u64,
    channel: Box<dyn Channel>,
}

/// The core's channels, opened when first used, by [`VolumeState::index`].
pub(crate) struct Volumes {
    local: Local,
    channels: Vec<Option<Open>>,
    /// Volumes with I/O in flight, each once: only these are polled.
    active: Vec<usize>,
    is_active: Vec<bool>,
}

impl Volumes {
    fn new(local: Local) -> Volumes {
        Volumes { local, channels: Vec::new(), active: Vec::new(), is_active: Vec::new() }
    }

    pub(crate) fn submit(&mut self, volume: &VolumeState, io: Box<Io>) -> Result<(), Refused> {
        let index = volume.index as usize;
        match self.channels.get_mut(index) {
            Some(Some(open)) if open.serial == volume.serial => {
                open.channel.submit(io).map_err(|Busy(io)| Refused::Busy(io))?;
            }
            _ => self.open_and_submit(volume, io)?,
        }
        if !std::mem::replace(&mut self.is_active[index], true) {
            self.active.push(index);
        }
        Ok(())
    }

    /// See [`Channel::lend`]. A volume that is not open yet lends nothing.
    pub(crate) fn lend(
        &mut self,
        volume: &VolumeState,
        offset: u64,
        len: usize,
        into: &mut SgList,
    ) -> bool {
        match self.channels.get_mut(volume.index as usize) {
            Some(Some(open)) if open.serial == volume.serial => {
                open.channel.lend(offset, len, into)
            }
            _ => false,
        }
    }

    #[cold]
    fn open_and_submit(&mut self, volume: &VolumeState, mut io: Box<Io>) -> Result<(), Refused> {
        let index = volume.index as usize;
        if self.channels.len() <= index {
            self.channels.resize_with(index + 1, || None);
            self.is_active.resize(index + 1, false);
            self.active.reserve(index + 1 - self.active.len());
        }
        debug_assert!(
            self.channels[index].is_none(),
            "a number is free when all channels are gone"
        );
        match volume.volume.open(&self.local, CHANNEL_DEPTH) {
            Ok(channel) => {
                let open = Open { serial: volume.serial, channel };
                let open = self.channels[index].insert(open);
                open.channel.submit(io).map_err(|Busy(io)| Refused::Busy(io))
            }
            Err(error) => {
                tracing::error!(?volume, %error, "a volume cannot be opened");
                io.result = Err(IoError::Gone);
                Err(Refused::Failed(io))
            }
        }
    }

    /// Drops a channel if nothing is in it; `true`: there is none any more.
    fn try_drop(&mut self, volume: u32) -> bool {
        let Some(slot) = self.channels.get_mut(volume as usize) else { return true };
        if slot.as_ref().is_some_and(|open| open.channel.in_flight() > 0) {
            return false;
        }
        // Its number stays in `active` until the next poll, which finds it idle.
        *slot = None;
        true
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        let mut i = 0;
        while i < self.active.len() {
            let index = self.active[i];
            let idle = match &mut self.channels[index] {
                Some(Open { channel, .. }) => {
                    channel.poll(done);
                    channel.in_flight() == 0
                }
                None => true,
            };
            if idle {
                self.is_active[index] = false;
                self.active.swap_remove(i);
            } else {
                i += 1;
            }
        }
    }

    fn deadline(&self) -> Option<Duration> {
        self.active
            .iter()
            .filter_map(|index| self.channels[*index].as_ref().and_then(|o| o.channel.deadline()))
            .min()
    }
}

/// See the module's documentation.
pub(crate) struct CoreTask {
    core: usize,
    shared: Arc<Shared>,
    table: Arc<Table>,
    fences: CoreFences,
    local: Local,
    inbox: Receiver<Handover>,
    conns: Vec<Option<Box<Conn>>>,
    free: Vec<u32>,
    volumes: Volumes,
    ios: IoCache,
    /// Connections to be looked at in this turn, or in the next.
    ready: Rc<Ready>,
    /// [`Shared::calls`] when all connections were looked at last.
    calls: u64,
    rota: Rota,
    lap: u64,
    awaiting: Vec<(u32, u16)>,
    /// The other list, empty between turns.
    followed: Vec<(u32, u16)>,
    #[expect(clippy::vec_box, reason = "the channels hand over boxes")]
    done: Vec<Box<Io>>,
    next_tick: Option<Duration>,
    /// TLS handshakes under way.
    handshakes: Handshakes,
    sampler: Sampler,
}

impl CoreTask {
    pub(crate) fn new(
        core: usize,
        shared: Arc<Shared>,
        local: Local,
        inbox: Receiver<Handover>,
    ) -> CoreTask {
        let volumes = Volumes::new(local.clone());
        shared.vitals.start(local.now());
        // Registered first: a change from here on is seen in the first turn.
        let fences = CoreFences::new(core, &shared.board);
        CoreTask {
            core,
            table: shared.table(),
            fences,
            shared,
            local,
            inbox,
            conns: Vec::new(),
            free: Vec::new(),
            volumes,
            ios: IoCache::default(),
            ready: Rc::default(),
            calls: 0,
            rota: Rota::default(),
            lap: 0,
            awaiting: Vec::new(),
            followed: Vec::new(),
            done: Vec::new(),
            next_tick: None,
            handshakes: Handshakes::default(),
            sampler: Sampler::new(),
        }
    }

    fn accept(&mut self, handover: Handover, now: Duration) {
        let config = StreamConfig {
            tx_entries_max: Conn::tx_entries_max(&self.shared.limits),
            ..StreamConfig::default()
        };
        let peer = handover.socket.peer();
        let mut stream = match Stream::new(&self.local, handover.socket, config) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection was closed: no stream for it");
                return;
            }
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.conns.push(None);
            (self.conns.len() - 1) as u32
        });
        stream.mark_in(&self.ready, index);
        let Handover { port, pass, .. } = handover;
        let conn = Conn::new(index, stream, port, peer, pass, &self.shared.limits, now);
        self.conns[index as usize] = Some(Box::new(conn));
    }
}

/// What of a [`CoreTask`] stands beside its [`Env`] in a turn.
struct Rest<'a> {
    conns: &'a mut Vec<Option<Box<Conn>>>,
    free: &'a mut Vec<u32>,
    ready: &'a Ready,
    followed: &'a mut Vec<(u32, u16)>,
    #[expect(clippy::vec_box, reason = "the channels hand over boxes")]
    done: &'a mut Vec<Box<Io>>,
}

impl CoreTask {
    /// The connections, and what they may use while they are called.
    fn split(&mut self, now: Duration) -> (Env<'_>, Rest<'_>) {
        let env = Env {
            core: self.core,
            shared: &self.shared,
            table: &self.table,
            fences: &mut self.fences,
            local: &self.local,
            pool: self.local.pool(),
            volumes: &mut self.volumes,
            ios: &mut self.ios,
            rota: &mut self.rota,
            lap: self.lap,
            awaiting: &mut self.awaiting,
            handshakes: &mut self.handshakes,
            sampler: &mut self.sampler,
            now,
        };
        let CoreTask { conns, free, ready, followed, done, .. } = self;
        (env, Rest { conns, free, ready, followed, done })
    }

    /// Takes up what was changed, and fences that were raised for it. Cheap when nothing was.
    fn follow(&mut self, now: Duration) -> bool {
        // In this order: whoever raises a fence has published the table before, so that the table
        // found behind a fence is the fence's or a later one. The other way round, a fence raised
        // in between would be counted although this turn still submitted by the table before it.
        let has_news = self.fences.has_news(&self.shared.board);
        if has_news {
            let conns = &self.conns;
            self.fences.take(&self.shared.board, &mut |scope| {
                conns.iter().flatten().map(|conn| conn.count(scope)).sum()
            });
        }
        let is_new = self.shared.generation.load(Ordering::Acquire) != self.table.generation;
        if is_new {
            self.table = self.shared.table();
            let (mut env, Rest { conns, .. }) = self.split(now);
            for conn in conns.iter_mut().flatten() {
                conn.follow_table(&mut env);
            }
        }
        if has_news {
            // Cores may wait for it, too.
            self.shared.wake_all();
        }
        is_new || has_news
    }
}

impl Drop for CoreTask {
    fn drop(&mut self) {
        self.fences.leave(&self.shared.board);
    }
}

impl Task for CoreTask {
    fn poll(&mut self, now: Duration) -> Progress {
        // Before what it announces is looked at.
        let calls = self.shared.calls.load(Ordering::Acquire);
        let mut worked = self.follow(now);
        let is_new = worked;
        while let Some(handover) = self.inbox.try_recv() {
            self.accept(handover, now);
            worked = true;
        }
        let tick = self.next_tick.is_some_and(|at| now >= at);
        let stopping = self.local.is_stopping();
        // Whatever concerns connections that have nothing from their hosts comes with a call, a new
        // table or the clock; the others stay out of the way, however many they are.
        if is_new || tick || stopping || calls != self.calls {
            self.calls = calls;
            (0..self.conns.len() as u32).for_each(|index| self.ready.mark(index));
        }
        self.lap += 1;
        self.handshakes.begin_turn();
        self.sampler.follow_setting(&self.shared.sampling);
        let (mut env, Rest { conns, free, ready, followed, done }) = self.split(now);
        let (shared, lap) = (env.shared, env.lap);

        // Commands that waited go before new ones.
        for _ in 0..env.rota.begin(now) {
            let Some(index) = env.rota.next() else { break };
            ready.mark(index);
            if let Some(Some(conn)) = conns.get_mut(index as usize) {
                worked |= conn.serve(&mut env);
            }
        }
        env.rota.end();
        // Another connection is the first in each turn: none always finds memory before others.
        let first = (lap as usize).checked_rem(conns.len()).unwrap_or(0) as u32;
        for (start, end) in [(first, u32::MAX), (0, first)] {
            let mut from = start;
            while let Some(index) = ready.next_from(from).filter(|index| *index < end) {
                from = index + 1;
                if let Some(Some(conn)) = conns.get_mut(index as usize) {
                    worked |= conn.receive(&mut env);
                }
            }
        }
        while let Some(index) = env.handshakes.next_to_begin(now) {
            worked = true;
            ready.mark(index);
            if let Some(Some(conn)) = conns.get_mut(index as usize) {
                conn.answer_hello(&mut env);
            }
        }
        while let Some(index) = env.handshakes.next_leaving() {
            ready.mark(index);
            if let Some(Some(conn)) = conns.get_mut(index as usize) {
                conn.give_way(&mut env);
            }
        }
        env.volumes.poll(&mut |io| done.push(io));
        for io in done.drain(..) {
            worked = true;
            let (index, slot) = ((io.tag >> 16) as usize, io.tag as u16);
            ready.mark(index as u32);
            match conns.get_mut(index) {
                Some(Some(conn)) => conn.complete(slot, io, &mut env),
                // A connection goes only when its last I/O is back.
                _ => env.ios.give(io),
            }
        }
        if !env.awaiting.is_empty() {
            std::mem::swap(env.awaiting, followed);
            for (index, slot) in followed.drain(..) {
                ready.mark(index);
                if let Some(Some(conn)) = conns.get_mut(index as usize) {
                    worked |= conn.follow(slot, &mut env);
                }
            }
        }
        if env.fences.is_retiring() && env.fences.retire(&mut |v| env.volumes.try_drop(v)) {
            shared.settled();
        }
        let mut from = 0;
        while let Some(index) = ready.next_from(from) {
            from = index + 1;
            ready.clear(index);
            let Some(entry) = conns.get_mut(index as usize) else { continue };
            let Some(conn) = entry else { continue };
            if tick {
                conn.tick(&mut env);
            }
            if stopping {
                conn.close("the target stops");
            }
            worked |= conn.finish_turn(&mut env);
            if conn.is_gone() {
                conn.leave(&mut env);
                *entry = None;
                free.push(index);
                worked = true;
            } else if conn.wants_turn() {
                ready.mark(index);
            }
        }
        let alive = self.free.len() < self.conns.len();
        if !alive {
            if stopping {
                return Progress::Done;
            }
            self.next_tick = None;
        } else if tick || self.next_tick.is_none() {
            self.next_tick = Some(now + TICK);
        }
        if worked { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        let times =
            [self.next_tick, self.volumes.deadline(), self.rota.due(), self.handshakes.due()];
        times.into_iter().flatten().min()
    }
}
