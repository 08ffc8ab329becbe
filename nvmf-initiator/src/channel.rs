//! One core's way to a remote namespace: a queue on each path. Queues come with the paths; one whose
//! path is gone is used again by the path that takes its place.
//!
//! An accepted I/O waits in the [`Table`], and is given back when all its commands are answered and
//! no stream refers to any of its memory. For each command the best path there is is chosen anew.
//! When a path is lost, what is not finished is held, in the order of acceptance, as soon as its
//! connection is quiet, and starts again from its first byte on a path that can be used; a change
//! waits until the lost controller can do it no more.
//!
//! Everything that one poll queues leaves in one send per path: `submit` only files the I/O, `poll`
//! receives, then sends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{Busy, Channel, Io, IoError, Op};
use reactor::Local;

use crate::config::PathPolicy;
use crate::link::Loss;
use crate::node::this_node;
use crate::queue::{Env, Queue, Stage};
use crate::shared::{ChannelCounters, PathCounts, Phase, RemoteState, Shared};
use crate::table::Table;

/// See the [module](self).
pub(crate) struct RemoteChannel {
    shared: Arc<Shared>,
    local: Local,
    /// Seat at the volume.
    index: u16,
    counters: Arc<ChannelCounters>,
    /// For each path there can be.
    counts: Vec<Arc<PathCounts>>,
    depth: u16,
    /// Of the snapshot in `state`.
    epoch: u64,
    state: Arc<RemoteState>,
    table: Table,
    /// One for each path.
    queues: Vec<Queue>,
    /// Where the core runs.
    node: Option<u32>,
    /// Number of the path after the one that was taken last.
    turn: usize,
}

impl RemoteChannel {
    /// All memory the channel needs for I/O is allocated here, but for that of paths to come.
    pub(crate) fn open(
        shared: Arc<Shared>,
        local: &Local,
        depth: u32,
    ) -> io::Result<RemoteChannel> {
        let depth = depth.clamp(1, u32::from(u16::MAX)) as u16;
        let config = &shared.config;
        let paths_max = config.paths_max();
        let counts: Vec<Arc<PathCounts>> = (0..paths_max).map(|_| Arc::default()).collect();
        let mut queues = Vec::with_capacity(paths_max);
        for ((path, state), counts) in shared.state().paths.iter().enumerate().zip(&counts) {
            let counts = Arc::clone(counts);
            queues.push(Queue::new(&shared, local, path, state.addr, depth, counts)?);
        }
        let counters = Arc::new(ChannelCounters::default());
        let refuse = |text| io::Error::new(io::ErrorKind::ResourceBusy, text);
        let seat = shared.take_seat(local.handle(), Arc::clone(&counters), counts.clone());
        let index = seat.ok_or_else(|| {
            refuse(format!("all {} I/O queues of the remote volume are in use", config.queues))
        })?;
        let state = shared.state();
        if let Some(path) = state.paths.iter().find(|path| path.is_live && index >= path.queues) {
            // The association would break under the other channels when this one asks for its
            // queue.
            shared.leave_seat(index);
            return Err(refuse(format!("the controller grants only {} I/O queues", path.queues)));
        }
        queues.iter_mut().for_each(|queue| queue.sit(index));
        let table = Table::new(depth, config.retries_max, paths_max == 1);
        let node = if paths_max > 1 { this_node() } else { None };
        Ok(RemoteChannel {
            epoch: 0, // never published, so that the first poll takes up the state
            state,
            shared,
            local: local.clone(),
            index,
            counters,
            counts,
            depth,
            table,
            queues,
            node,
            turn: 0,
        })
    }

    fn step(&mut self, now: Duration) {
        // Costs one atomic load when there is nothing new.
        let epoch = self.shared.epoch();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.state = self.shared.state();
            self.add_queues();
        }
        let usable = self.usable();
        let RemoteChannel { shared, state, table, counters, queues, .. } = self;
        let mut env = Env { shared, state, table, counters, usable, now };
        for queue in queues.iter_mut() {
            if let Err(loss) = queue.drive(&mut env) {
                queue.lose(&loss, &mut env);
            }
        }
        self.send(now);
        for queue in &mut self.queues {
            queue.flush();
        }
        let resends = self.table.resends();
        if resends != self.counters.resends.load(Ordering::Relaxed) {
            self.counters.resends.store(resends, Ordering::Relaxed);
        }
    }

    /// A queue for each path that has come since the channel was opened. Where there is no memory
    /// for one, the path is not used before something else is published.
    fn add_queues(&mut self) {
        while self.queues.len() < self.state.paths.len() {
            let path = self.queues.len();
            let Some(counts) = self.counts.get(path).map(Arc::clone) else { return };
            let addr = self.state.paths[path].addr;
            match Queue::new(&self.shared, &self.local, path, addr, self.depth, counts) {
                Ok(mut queue) => {
                    queue.sit(self.index);
                    self.queues.push(queue);
                }
                Err(error) => {
                    tracing::warn!(%addr, %error, "no queue on the path");
                    return;
                }
            }
        }
    }

    /// Paths that I/O can take now, one bit each.
    #[inline]
    fn usable(&self) -> u16 {
        if self.state.phase != Phase::Live {
            return 0;
        }
        let mut usable = 0;
        for (path, queue) in self.queues.iter().enumerate() {
            if queue.stage() == Stage::Ready && self.state.paths[path].rank().is_some() {
                usable |= 1 << path;
            }
        }
        usable
    }

    /// Queues what can be queued.
    #[inline]
    fn send(&mut self, now: Duration) {
        self.table.wake(now);
        let mut usable = self.usable();
        while usable != 0 {
            let Some((id, start, io)) = self.table.front() else { break };
            if start == 0 {
                // Here, not in `submit`: the namespace may not have been known then, or have
                // changed since.
                let verdict = block::check(&self.state.geometry, io);
                if verdict.is_err() || io.op.has_range() && io.len == 0 {
                    self.table.finish_front(verdict);
                    continue;
                }
            }
            // A fused pair is two commands, on a queue that has room for both.
            let (count, among) = match io.op {
                Op::CompareAndWrite => (2, usable & self.pairing()),
                _ => (1, usable),
            };
            if among == 0 {
                // By a path that is lost, as the geometry has it.
                self.table.delay_front(now, IoError::Aborted);
                continue;
            }
            let Some(path) = self.choose(among, self.table.avoid(id), count) else { break };
            self.turn = path + 1;
            let RemoteChannel { shared, state, table, counters, queues, .. } = self;
            let mut env = Env { shared, state, table, counters, usable, now };
            let sent: Result<bool, Loss> = queues[path].send_command(id, start, &mut env);
            if let Err(loss) = sent {
                queues[path].lose(&loss, &mut env);
                usable &= !(1 << path);
            }
        }
    }

    /// Paths that take fused pairs, one bit each.
    #[cold]
    fn pairing(&self) -> u16 {
        let takes_pairs = |path: &usize| self.state.paths[*path].compare_and_write;
        (0..self.queues.len()).filter(takes_pairs).fold(0, |set, path| set | 1 << path)
    }

    /// The path for the next `count` commands, out of `usable` ones; `None`: they have to wait for
    /// one of the best to have room.
    #[inline]
    fn choose(&self, usable: u16, avoid: u16, count: usize) -> Option<usize> {
        let has_room = |path: &usize| self.queues[*path].has_room(count);
        if self.queues.len() == 1 {
            return (usable & 1 != 0 && has_room(&0)).then_some(0);
        }
        let mut from = if usable & !avoid != 0 { usable & !avoid } else { usable };
        let paths = &self.state.paths;
        let each = |set: u16| (0..self.queues.len()).filter(move |path| set >> path & 1 != 0);
        let best = each(from).filter_map(|path| paths[path].rank()).min()?;
        for path in each(from) {
            if paths[path].rank() != Some(best) {
                from &= !(1 << path);
            }
        }
        let paths_count = self.queues.len();
        match self.shared.config.policy {
            PathPolicy::Numa => {
                let is_near = |path: &usize| self.node.is_some() && paths[*path].node == self.node;
                let path = each(from).find(is_near).or_else(|| each(from).next())?;
                has_room(&path).then_some(path)
            }
            PathPolicy::RoundRobin => (0..paths_count)
                .map(|step| (self.turn + step) % paths_count)
                .find(|path| from >> path & 1 != 0 && has_room(path)),
            PathPolicy::QueueDepth => {
                each(from).filter(has_room).min_by_key(|path| self.queues[*path].in_flight())
            }
        }
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

impl Channel for RemoteChannel {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        self.table.accept(io).map_err(Busy)
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        self.step(self.local.now());
        if matches!(self.state.phase, Phase::Gone | Phase::Stopped { .. }) {
            self.table.fail_quarantined(IoError::Gone);
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
        let wake = if self.usable() != 0 { self.table.next_wake() } else { None };
        self.queues.iter().filter_map(Queue::deadline).chain(wake).min()
    }

    fn abort(&mut self) {
        self.table.abort();
    }
}

impl Drop for RemoteChannel {
    fn drop(&mut self) {
        if self.table.len() > 0 {
            tracing::error!(
                queue = self.index + 1,
                in_flight = self.table.len(),
                "channel of a remote volume dropped with I/O in flight"
            );
        }
        self.shared.leave_seat(self.index);
    }
}
