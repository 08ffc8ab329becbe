//! A disk as a driver sees it: a frontend, rings and requests in one.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use zerocopy::IntoBytes;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::driver::{Buffer, TestMemory};
use super::frontend::TestFrontend;
use super::ring::TestRing;
use crate::device::Features;
use crate::vhost_user::wire::{InflightDescription, Request};

/// Longest data of one request.
pub const DATA_MAX: usize = 64 << 10;
/// Header, data and status of one request.
const PLACE_BYTES: u64 = 4096 + DATA_MAX as u64 + 4096;

/// A request that has come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// Queue it was sent on.
    pub queue: usize,
    /// What [`TestDisk::submit`] was given.
    pub token: u64,
    /// Status byte.
    pub status: u8,
    /// Length from the used ring.
    pub written: u32,
    /// What the device had room to write.
    pub data: Vec<u8>,
}

struct Place {
    at: u64,
    token: u64,
    room: usize,
}

/// One queue of a [`TestDisk`].
pub struct DiskQueue {
    /// The driver's half of the ring.
    pub ring: TestRing,
    kick: Option<OwnedFd>,
    call: OwnedFd,
    free: Vec<u64>,
    busy: HashMap<u16, Place>,
    needs_kick: bool,
    /// Kicks that the device asked for.
    pub kicks: u64,
    /// Times that the driver slept until a call came.
    pub waits: u64,
}

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Number of queues to use.
    pub queues: usize,
    /// Descriptors of each.
    pub size: u16,
    /// Features not to acknowledge.
    pub without: Features,
    /// Give no kick eventfd: the device has to poll.
    pub polled: bool,
    /// Have requests in flight recorded.
    pub inflight: bool,
}

impl DiskOptions {
    /// One split queue of 64 descriptors, and all else that is offered but the record of requests in
    /// flight.
    pub fn new() -> DiskOptions {
        DiskOptions {
            queues: 1,
            size: 64,
            without: Features::RING_PACKED,
            polled: false,
            inflight: false,
        }
    }
}

impl Default for DiskOptions {
    fn default() -> DiskOptions {
        DiskOptions::new()
    }
}

/// A disk behind a vhost-user socket.
pub struct TestDisk {
    /// The connection.
    pub frontend: TestFrontend,
    /// Guest memory.
    pub memory: TestMemory,
    /// The queues.
    pub queues: Vec<DiskQueue>,
    options: DiskOptions,
    inflight: Option<(InflightDescription, OwnedFd)>,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

impl TestDisk {
    /// Connect, negotiate, share memory and start all queues.
    pub fn connect(path: &Path, options: &DiskOptions) -> TestDisk {
        let mut frontend = TestFrontend::connect(path);
        frontend.negotiate(options.without);
        let places = u64::from(options.size);
        let ring_bytes = TestRing::bytes(options.size).next_multiple_of(4096);
        let queue_bytes = ring_bytes + places * PLACE_BYTES;
        let memory = TestMemory::new(options.queues as u64 * queue_bytes);
        frontend.add_memory(&memory);
        let event_idx = frontend.features.has(Features::EVENT_IDX);
        let packed = frontend.features.has(Features::RING_PACKED);
        let queues = (0..options.queues as u64).map(|index| {
            let base = memory.base() + index * queue_bytes;
            DiskQueue {
                ring: TestRing::new(memory.view(), base, options.size, event_idx, packed),
                kick: (!options.polled).then(event),
                call: event(),
                free: (0..places).map(|place| base + ring_bytes + place * PLACE_BYTES).collect(),
                busy: HashMap::new(),
                needs_kick: false,
                kicks: 0,
                waits: 0,
            }
        });
        let inflight =
            options.inflight.then(|| frontend.new_inflight(options.queues as u16, options.size));
        if let Some((description, fd)) = &inflight {
            frontend.set_inflight(description, fd.as_fd());
        }
        let (queues, options) = (queues.collect(), *options);
        let mut disk = TestDisk { queues, frontend, memory, options, inflight };
        for index in 0..disk.queues.len() {
            disk.start(index, disk.queues[index].ring.base_at_start());
        }
        disk
    }

    /// The device has gone: connect to the next one and go on where the rings are, as QEMU does.
    pub fn reconnect(&mut self, path: &Path) {
        self.frontend = TestFrontend::connect(path);
        self.frontend.negotiate(self.options.without);
        self.frontend.add_memory(&self.memory);
        if let Some((description, fd)) = &self.inflight {
            self.frontend.set_inflight(description, fd.as_fd());
        }
        for index in 0..self.queues.len() {
            // All that QEMU knows after a crash.
            self.start(index, self.queues[index].ring.base_after_crash());
        }
    }

    /// The rings were stopped: go on with them, as QEMU does when a paused machine continues.
    pub fn resume(&mut self, bases: &[u32]) {
        if let Some((description, fd)) = &self.inflight {
            self.frontend.set_inflight(description, fd.as_fd());
        }
        for (index, base) in bases.iter().enumerate() {
            self.start(index, *base);
        }
    }

    /// Have writes to a queue's device area marked as dirty, or no longer.
    pub fn log_ring(&self, index: usize, is_logged: bool) {
        let ring = self.queues[index].ring.address();
        let log = is_logged.then_some(ring.used);
        let address = self.frontend.ring_address(index as u32, &self.memory, &ring, log);
        self.frontend.tell(Request::SET_VRING_ADDR, address.as_bytes(), &[]);
    }

    /// Start a queue from an available index on.
    pub fn start(&mut self, index: usize, base: u32) {
        let queue = &self.queues[index];
        let kick = queue.kick.as_ref().map(AsFd::as_fd);
        let (call, ring) = (queue.call.as_fd(), &queue.ring);
        self.frontend.start_ring(index as u32, &self.memory, ring, base, kick, call);
    }

    /// Put a request into a ring: `sent` behind the header, room for `room` bytes. False: the ring
    /// is full.
    pub fn submit(
        &mut self,
        index: usize,
        token: u64,
        kind: u32,
        sector: u64,
        sent: &[u8],
        room: usize,
    ) -> bool {
        assert!(sent.len() <= DATA_MAX && room <= DATA_MAX);
        let queue = &mut self.queues[index];
        let Some(at) = queue.free.pop() else { return false };
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write(at, &header);
        let (data, status) = (at + 4096, at + 4096 + DATA_MAX as u64);
        self.memory.write(data, sent);
        self.memory.write(status, &[0xff]);
        let mut buffers = vec![Buffer::readable(at, 16)];
        if !sent.is_empty() {
            buffers.push(Buffer::readable(data, sent.len() as u32));
        }
        if room > 0 {
            buffers.push(Buffer::writable(data, room as u32));
        }
        buffers.push(Buffer::writable(status, 1));
        let table = at + 2048;
        let added = match self.frontend.features.has(Features::INDIRECT_DESC) {
            true => queue.ring.add_indirect(self.memory.view(), table, &buffers),
            false => queue.ring.add(&buffers),
        };
        let Some(head) = added else {
            queue.free.push(at);
            return false;
        };
        queue.needs_kick |= queue.ring.publish();
        queue.busy.insert(head, Place { at, token, room });
        true
    }

    /// Notify the device where it asked for it.
    pub fn kick(&mut self) {
        for queue in &mut self.queues {
            if std::mem::take(&mut queue.needs_kick)
                && let Some(kick) = &queue.kick
            {
                queue.kicks += 1;
                rustix::io::write(kick, &1u64.to_ne_bytes()).expect("an eventfd");
            }
        }
    }

    /// What has come back. Does not wait.
    pub fn completed(&mut self) -> Vec<Completed> {
        let mut completed = Vec::new();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            while let Some((head, written)) = queue.ring.pop_used() {
                let place = queue.busy.remove(&head).expect("it was sent");
                let status = self.memory.read(place.at + 4096 + DATA_MAX as u64, 1)[0];
                let data = self.memory.read(place.at + 4096, place.room);
                queue.free.push(place.at);
                let token = place.token;
                completed.push(Completed { queue: index, token, status, written, data });
            }
        }
        completed
    }

    /// What has come back; sleeps until something has, as a guest does. Panics after 20 seconds.
    pub fn wait(&mut self) -> Vec<Completed> {
        let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
        self.wait_for(&timeout).expect("no call in 20 seconds")
    }

    /// As [`TestDisk::wait`], but for so long only.
    pub fn wait_for(&mut self, timeout: &Timespec) -> Option<Vec<Completed>> {
        self.kick();
        loop {
            let completed = self.completed();
            if !completed.is_empty() {
                self.queues.iter_mut().for_each(|queue| queue.ring.disarm());
                return Some(completed);
            }
            let mut has_more = false;
            for queue in &mut self.queues {
                has_more |= queue.ring.arm();
            }
            if has_more {
                continue;
            }
            let mut fds: Vec<PollFd<'_>> =
                self.queues.iter().map(|q| PollFd::new(&q.call, PollFlags::IN)).collect();
            if poll(&mut fds, Some(timeout)).expect("poll") == 0 {
                return None;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            for (queue, _) in self.queues.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
                queue.waits += 1;
                rustix::io::read(&queue.call, &mut [0; 8]).expect("an eventfd");
            }
        }
    }

    /// Run one request alone.
    pub fn run(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        sent: &[u8],
        room: usize,
    ) -> Completed {
        assert!(self.submit(queue, 0, kind, sector, sent, room), "ring full");
        let completed = self.wait();
        assert_eq!(completed.len(), 1);
        completed.into_iter().next().expect("one")
    }

    /// Read, which has to succeed.
    pub fn read(&mut self, queue: usize, sector: u64, len: usize) -> Vec<u8> {
        let completed = self.run(queue, 0, sector, &[], len);
        assert_eq!((completed.status, completed.written), (0, len as u32 + 1));
        completed.data
    }

    /// Write, which has to succeed.
    pub fn write(&mut self, queue: usize, sector: u64, data: &[u8]) {
        assert_eq!(self.run(queue, 1, sector, data, 0).status, 0);
    }
}
