//! A virtio-blk driver in a few lines: one split ring in shared memory, driven by this thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use iobuf::{GuestMemory, GuestRegion, GuestSlice, GuestView};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;

use super::vhost::{FrontEnd, RingLayout};

/// Requests in flight. Each takes a header, a data and a status descriptor: 96 of 128 entries.
pub(super) const SLOTS: u16 = 32;
const RING_ENTRIES: u16 = 128;
/// Largest request.
pub(super) const SLOT_BYTES: usize = 128 << 10;
pub(super) const SECTOR_BYTES: u64 = 512;

const REQUEST_READ: u32 = 0;
const REQUEST_WRITE: u32 = 1;
const REQUEST_FLUSH: u32 = 4;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;

// The shared region: ring, then one page of headers and status bytes, then data.
const DESCRIPTORS_AT: u64 = 0;
const AVAIL_AT: u64 = 4096;
const USED_AT: u64 = 8192;
const HEADERS_AT: u64 = 12_288;
const STATUS_AT: u64 = HEADERS_AT + 16 * SLOTS as u64;
const DATA_AT: u64 = 16_384;
const REGION_BYTES: u64 = DATA_AT + SLOTS as u64 * SLOT_BYTES as u64;
const _: () = assert!(STATUS_AT + SLOTS as u64 <= DATA_AT);
const _: () = assert!(SLOTS * 3 <= RING_ENTRIES);

/// What to do with one piece of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// A disk reached through its vhost-user socket, as a machine would.
pub(super) struct Disk {
    front: FrontEnd,
    view: Rc<GuestView>,
    ring: GuestSlice,
    kick: OwnedFd,
    call: OwnedFd,
    patience: Duration,
    avail_index: u16,
    used_index: u16,
    /// Per slot: the byte offset and length of the request in flight.
    flying: Vec<Option<(u64, usize)>>,
    scratch: Vec<u8>,
}

fn broken(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

impl Disk {
    /// Attaches the device behind `socket`. `patience` bounds every wait for it.
    pub(super) fn attach(socket: &Path, patience: Duration) -> io::Result<Disk> {
        let mut front = FrontEnd::connect(socket, patience)?;
        let memory = rustix::fs::memfd_create("penstock-self-check", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, REGION_BYTES)?;
        let region = GuestRegion::map(memory.as_fd(), 0, REGION_BYTES, 0, 0)?;
        let view =
            GuestMemory::new(vec![region]).map_err(|error| broken(error.to_string()))?.view();
        let ring = view.slice(0, DATA_AT).map_err(|error| broken(error.to_string()))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let kick = rustix::event::eventfd(0, flags)?;
        let call = rustix::event::eventfd(0, flags)?;
        let layout = RingLayout {
            entries: RING_ENTRIES,
            descriptors: DESCRIPTORS_AT,
            avail: AVAIL_AT,
            used: USED_AT,
        };
        front.start(memory.as_fd(), REGION_BYTES, layout, kick.as_fd(), call.as_fd())?;
        Ok(Disk {
            front,
            view,
            ring,
            kick,
            call,
            patience,
            avail_index: 0,
            used_index: 0,
            flying: vec![None; usize::from(SLOTS)],
            scratch: vec![0; SLOT_BYTES],
        })
    }

    /// The size the device reports.
    pub(super) fn capacity_bytes(&mut self) -> io::Result<u64> {
        self.front.capacity_sectors().map(|sectors| sectors.saturating_mul(SECTOR_BYTES))
    }

    /// Moves `len` bytes at each of `offsets`, up to `depth` requests at a time. `data` fills a
    /// buffer before it is written, or judges it after it was read.
    pub(super) fn transfer(
        &mut self,
        direction: Direction,
        offsets: &mut dyn Iterator<Item = u64>,
        len: usize,
        depth: u16,
        data: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<u64> {
        assert!(len <= SLOT_BYTES && (1..=SLOTS).contains(&depth), "bounds of the self-check");
        let mut requests = 0;
        let mut next = offsets.next();
        loop {
            let mut added = false;
            while let Some(offset) = next {
                let Some(slot) = self.flying[..usize::from(depth)].iter().position(Option::is_none)
                else {
                    break;
                };
                if direction == Direction::Write {
                    data(offset, &mut self.scratch[..len])?;
                    self.view
                        .write(data_at(slot), &self.scratch[..len])
                        .map_err(|error| broken(error.to_string()))?;
                }
                self.queue(slot, direction, offset, len)?;
                added = true;
                next = offsets.next();
            }
            if added {
                self.kick()?;
            }
            if self.flying.iter().all(Option::is_none) {
                return Ok(requests);
            }
            self.wait()?;
            while let Some((slot, offset, len)) = self.reap()? {
                if direction == Direction::Read && len != 0 {
                    self.view
                        .read(data_at(slot), &mut self.scratch[..len])
                        .map_err(|error| broken(error.to_string()))?;
                    data(offset, &mut self.scratch[..len])?;
                }
                requests += 1;
            }
        }
    }

    /// Makes everything written durable.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if !self.front.has_flush() {
            return Ok(());
        }
        self.request(0, REQUEST_FLUSH, 0, None)?;
        self.kick()?;
        while self.flying[0].is_some() {
            self.wait()?;
            self.reap()?;
        }
        Ok(())
    }

    /// Detaches: the device has let go of our memory when this returns.
    pub(super) fn detach(mut self) -> io::Result<()> {
        self.front.stop()
    }

    fn queue(
        &mut self,
        slot: usize,
        direction: Direction,
        offset: u64,
        len: usize,
    ) -> io::Result<()> {
        let (kind, flags) = match direction {
            Direction::Read => (REQUEST_READ, DESCRIPTOR_WRITE),
            Direction::Write => (REQUEST_WRITE, 0),
        };
        self.request(slot, kind, offset, Some((len, flags)))
    }

    /// Puts one request on the ring: header, data if there is any, status.
    fn request(
        &mut self,
        slot: usize,
        kind: u32,
        offset: u64,
        data: Option<(usize, u16)>,
    ) -> io::Result<()> {
        let header_at = HEADERS_AT + 16 * slot as u64;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(offset / SECTOR_BYTES).to_le_bytes());
        self.put(header_at, &header)?;
        self.put(STATUS_AT + slot as u64, &[0xff])?;

        let first = 3 * slot as u16;
        let status = first + 2;
        let second = if data.is_some() { first + 1 } else { status };
        self.descriptor(first, header_at, 16, DESCRIPTOR_NEXT, second)?;
        if let Some((len, flags)) = data {
            self.descriptor(second, data_at(slot), len as u32, flags | DESCRIPTOR_NEXT, status)?;
        }
        self.descriptor(status, STATUS_AT + slot as u64, 1, DESCRIPTOR_WRITE, 0)?;

        let entry = AVAIL_AT + 4 + 2 * u64::from(self.avail_index % RING_ENTRIES);
        self.put(entry, &first.to_le_bytes())?;
        self.avail_index = self.avail_index.wrapping_add(1);
        self.flying[slot] = Some((offset, data.map_or(0, |(len, _)| len)));
        // The entry is visible before the index that announces it (virtio 1.2, split virtqueues).
        self.ring
            .store_u16(AVAIL_AT as usize + 2, self.avail_index, Ordering::Release)
            .map_err(|error| broken(error.to_string()))
    }

    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) -> io::Result<()> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(DESCRIPTORS_AT + 16 * u64::from(index), &bytes)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.ring.write(at as usize, bytes).map_err(|error| broken(error.to_string()))
    }

    fn kick(&self) -> io::Result<()> {
        // The index is visible before the device may be found asleep.
        fence(Ordering::SeqCst);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// Waits until the device has signalled, or there is something to reap already.
    fn wait(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        loop {
            if self.used()? != self.used_index {
                return Ok(());
            }
            let Some(left) = self.patience.checked_sub(begun.elapsed()) else {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the device gave no answer for {} s", self.patience.as_secs()),
                ));
            };
            let timeout =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            let mut count = [0; 8];
            match rustix::io::read(&self.call, &mut count) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn used(&self) -> io::Result<u16> {
        self.ring
            .load_u16(USED_AT as usize + 2, Ordering::Acquire)
            .map_err(|error| broken(error.to_string()))
    }

    /// The next finished request: slot, offset, length.
    fn reap(&mut self) -> io::Result<Option<(usize, u64, usize)>> {
        if self.used()? == self.used_index {
            return Ok(None);
        }
        let entry = USED_AT + 4 + 8 * u64::from(self.used_index % RING_ENTRIES);
        let [a, b, c, d] =
            self.ring.read::<4>(entry as usize).map_err(|error| broken(error.to_string()))?;
        let head = u32::from_le_bytes([a, b, c, d]);
        self.used_index = self.used_index.wrapping_add(1);
        let slot = head as usize / 3;
        let flown = self.flying.get_mut(slot).and_then(Option::take);
        let Some((offset, len)) = flown.filter(|_| head % 3 == 0) else {
            return Err(broken(format!("the device finished request {head}, which is not its")));
        };
        let [status] = self
            .ring
            .read::<1>((STATUS_AT + slot as u64) as usize)
            .map_err(|error| broken(error.to_string()))?;
        match status {
            0 => Ok(Some((slot, offset, len))),
            1 => Err(io::Error::other(format!("the device reports an I/O error at byte {offset}"))),
            2 => Err(io::Error::other(format!("the device refuses the request at byte {offset}"))),
            other => Err(broken(format!("the device left status {other} at byte {offset}"))),
        }
    }
}

fn data_at(slot: usize) -> u64 {
    DATA_AT + slot as u64 * SLOT_BYTES as u64
}
