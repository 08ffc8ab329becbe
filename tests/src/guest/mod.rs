//! Guests of emulated disks, as far as a measurement needs them: drivers that put requests into
//! rings in memory of their own and look for completions, without interrupts.
//!
//! ```text
//!  Run (how deep, how long, what was measured) ──► Driver ──► virtio: split ring, vhost-user
//!                                                         ──► nvme: queue pair, vfio-user
//!                                                         ──► channel: no guest, a block::Channel
//! ```
//!
//! They share no protocol code with the product, so that they are a second opinion on it, and a
//! device of another make is driven by the very same code. A driver that cannot go on says why; it
//! never panics on what a device does.

pub mod channel;
pub mod inside;
pub mod nvme;
pub mod virtio;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use iobuf::{GuestMemory, GuestRegion, GuestSlice, GuestView};
use rustix::fs::MemfdFlags;

use crate::load::Figures;

/// Bytes of one request.
pub const IO_BYTES: u64 = 4096;
/// Most requests in flight.
pub const DEPTH_MAX: u16 = 128;
/// Bytes of a sector, and of a logical block of the disks measured.
const SECTOR_BYTES: u64 = 512;
/// Looks for a completion between two looks at the clock.
const LOOKS: u32 = 64;

/// What a disk's guest does with requests of [`IO_BYTES`]. Slots are below [`DEPTH_MAX`].
pub trait Driver {
    /// Puts a request into the ring. Its slot is free.
    ///
    /// # Errors
    /// The disk does not go on.
    fn issue(&mut self, slot: u16, offset: u64, write: bool) -> io::Result<()>;

    /// Shows the device what was put in, and notifies it if it wants that.
    ///
    /// # Errors
    /// As for [`Driver::issue`].
    fn publish(&mut self) -> io::Result<()>;

    /// Adds the slots of requests that have succeeded since.
    ///
    /// # Errors
    /// A request has failed, or the device breaks the rules.
    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()>;
}

/// What to do with a disk.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Writes instead of reads.
    pub write: bool,
    /// Requests in flight, up to [`DEPTH_MAX`].
    pub depth: u16,
    /// Size of the disk in bytes; offsets are random in it.
    pub span_bytes: u64,
    /// Wait so long between the end of a batch of `depth` requests and the next, instead of
    /// replacing each request at once.
    pub pause: Duration,
}

/// One measurement in progress.
pub struct Run<D> {
    /// The disk.
    pub driver: D,
    work: Work,
    time: Duration,
    free: Vec<u16>,
    done: Vec<u16>,
    issued: Vec<Instant>,
    latencies_ns: Vec<u32>,
    random: u64,
    start: Instant,
    now: Instant,
    next_batch: Instant,
    looks: u32,
}

impl<D: Driver> Run<D> {
    /// Begins now.
    pub fn new(driver: D, work: Work, time: Duration) -> Run<D> {
        let (depth, now) = (work.depth.min(DEPTH_MAX), Instant::now());
        Run {
            driver,
            work: Work { depth, ..work },
            time,
            free: (0..depth).rev().collect(),
            done: Vec::with_capacity(usize::from(depth)),
            issued: vec![now; usize::from(depth)],
            latencies_ns: Vec::with_capacity(4 << 20),
            random: 0x9e37_79b9_7f4a_7c15,
            start: now,
            now,
            next_batch: now,
            looks: 0,
        }
    }

    /// Looks for completions and replaces them. The figures, when time is over and nothing is in
    /// flight any more.
    ///
    /// # Errors
    /// The disk's.
    pub fn step(&mut self) -> io::Result<Option<Figures>> {
        self.driver.reap(&mut self.done)?;
        self.looks += 1;
        if self.done.is_empty() && self.looks < LOOKS && self.free.is_empty() {
            std::hint::spin_loop();
            return Ok(None);
        }
        self.looks = 0;
        self.now = Instant::now();
        for slot in self.done.drain(..) {
            let took = self.now - self.issued[usize::from(slot)];
            self.latencies_ns.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
            self.free.push(slot);
        }
        let is_idle = self.free.len() == usize::from(self.work.depth);
        if self.now - self.start >= self.time {
            return Ok(is_idle.then(|| self.figures()));
        }
        if !self.work.pause.is_zero() {
            if !is_idle || self.now < self.next_batch {
                return Ok(None);
            }
            self.next_batch = self.now + self.work.pause;
        }
        if self.free.is_empty() {
            return Ok(None);
        }
        while let Some(slot) = self.free.pop() {
            // The constants of Knuth's MMIX.
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let block = (self.random >> 24) % (self.work.span_bytes / IO_BYTES);
            self.issued[usize::from(slot)] = self.now;
            self.driver.issue(slot, block * IO_BYTES, self.work.write)?;
        }
        self.driver.publish()?;
        Ok(None)
    }

    fn figures(&mut self) -> Figures {
        let elapsed = (self.now - self.start).as_secs_f64();
        let mut at = |share: f64| {
            let latencies = &mut self.latencies_ns;
            let last = latencies.len().checked_sub(1)?;
            let (_, value, _) = latencies.select_nth_unstable((last as f64 * share) as usize);
            Some(f64::from(*value) / 1e3)
        };
        let (p50_us, p99_us) = (at(0.50).unwrap_or(0.0), at(0.99).unwrap_or(0.0));
        Figures { iops: self.latencies_ns.len() as f64 / elapsed, p50_us, p99_us }
    }
}

/// Runs to the end on this thread, which does nothing else. `driver` may be used again.
///
/// # Errors
/// The disk's; a disk that answers nothing for ten seconds.
pub fn run(driver: &mut dyn Driver, work: Work, time: Duration) -> io::Result<Figures> {
    let mut run = Run::new(driver, work, time);
    loop {
        if let Some(figures) = run.step()? {
            return Ok(figures);
        }
        if run.now - run.start > time + Duration::from_secs(10) {
            return Err(broken("requests have not come back"));
        }
    }
}

impl<D: Driver + ?Sized> Driver for Box<D> {
    fn issue(&mut self, slot: u16, offset: u64, write: bool) -> io::Result<()> {
        (**self).issue(slot, offset, write)
    }

    fn publish(&mut self) -> io::Result<()> {
        (**self).publish()
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        (**self).reap(done)
    }
}

impl<D: Driver + ?Sized> Driver for &mut D {
    fn issue(&mut self, slot: u16, offset: u64, write: bool) -> io::Result<()> {
        (**self).issue(slot, offset, write)
    }

    fn publish(&mut self) -> io::Result<()> {
        (**self).publish()
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        (**self).reap(done)
    }
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Memory of a guest: a file that its devices map as well. Address 0 is not in it.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    bytes: u64,
}

/// First guest address. The same in the front end's addresses.
const BASE: u64 = 0x4000_0000;

impl Memory {
    /// So many bytes of zeros.
    ///
    /// # Errors
    /// No memory.
    pub fn new(bytes: u64) -> io::Result<Memory> {
        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, bytes)?;
        Ok(Memory { file, bytes })
    }

    /// Access to it, for one thread.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn view(&self) -> io::Result<Rc<GuestView>> {
        let region = GuestRegion::map(self.file.as_fd(), 0, self.bytes, BASE, BASE)?;
        let memory = GuestMemory::new(vec![region]).map_err(|error| broken(error.to_string()))?;
        Ok(memory.view())
    }
}

fn slice(view: &Rc<GuestView>, at: u64, bytes: u64) -> io::Result<GuestSlice> {
    view.slice(BASE + at, bytes).map_err(|error| broken(error.to_string()))
}

/// All that a driver touches was laid out by itself.
fn own<T>(result: Result<T, iobuf::OutOfBounds>) -> io::Result<T> {
    result.map_err(|_| broken("the driver has left its own memory"))
}
