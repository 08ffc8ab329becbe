//! A virtio-blk driver with one split ring over vhost-user, as libblkio has it: direct descriptors,
//! no event index, three descriptors for each request that stay where they are.
//! (Virtual I/O Device 1.2, sections 2.7 and 5.2; QEMU: "Vhost-user Protocol".)

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::Duration;

use iobuf::GuestSlice;
use rustix::event::EventfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{BASE, DEPTH_MAX, Driver, IO_BYTES, Memory, SECTOR_BYTES, broken, own, slice};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const VERSION: u32 = 1;
const FEATURE_VERSION_1: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const REQUEST_READ: u64 = 0;
const REQUEST_WRITE: u64 = 1;

const ENTRIES: u16 = 512;
const _: () = assert!(3 * DEPTH_MAX <= ENTRIES);
const AVAIL_AT: u64 = 0x2000;
const USED_AT: u64 = 0x3000;
/// A line for each slot: header, then status byte.
const HEADERS_AT: u64 = 0x5000;
const LINE_BYTES: u64 = 64;
const DATA_AT: u64 = 0x8000;
const _: () = assert!(HEADERS_AT + LINE_BYTES * DEPTH_MAX as u64 <= DATA_AT);
const STATUS: u64 = 16;

/// A device that has the ring. Can be given to another thread.
#[derive(Debug)]
pub struct VirtioDisk {
    stream: UnixStream,
    memory: Memory,
    io_bytes: u64,
    kick: OwnedFd,
    /// Nobody reads it: the ring says that no interrupts are wanted.
    _call: OwnedFd,
}

impl VirtioDisk {
    /// Attaches the device behind `socket`, with one ring, for requests of [`IO_BYTES`].
    ///
    /// # Errors
    /// Of the socket; what the device offers or answers is not enough.
    pub fn attach(socket: &Path) -> io::Result<VirtioDisk> {
        VirtioDisk::attach_for(socket, IO_BYTES as u32)
    }

    /// The same for requests of `io_bytes`, whole sectors.
    ///
    /// # Errors
    /// As for [`VirtioDisk::attach`].
    pub fn attach_for(socket: &Path, io_bytes: u32) -> io::Result<VirtioDisk> {
        let io_bytes = u64::from(io_bytes);
        let memory_bytes = DATA_AT + u64::from(DEPTH_MAX) * io_bytes;
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (kick, call) = (rustix::event::eventfd(0, flags)?, rustix::event::eventfd(0, flags)?);
        let memory = Memory::new(memory_bytes)?;
        let disk = VirtioDisk { stream, memory, io_bytes, kick, _call: call };
        disk.lay_out()?;

        if disk.ask(GET_FEATURES, &[])? & FEATURE_VERSION_1 == 0 {
            return Err(broken("the device does not offer VIRTIO_F_VERSION_1"));
        }
        disk.send(SET_OWNER, &[], None)?;
        // Without protocol features a ring runs as soon as it has its kick.
        disk.send(SET_FEATURES, &[FEATURE_VERSION_1], None)?;
        let table = [1, BASE, memory_bytes, BASE, 0];
        disk.send(SET_MEM_TABLE, &table, Some(disk.memory.file.as_fd()))?;
        // Ring 0, and a number of 32 bits above it.
        disk.send(SET_VRING_NUM, &[u64::from(ENTRIES) << 32], None)?;
        disk.send(SET_VRING_BASE, &[0], None)?;
        let places = [0, BASE, BASE + USED_AT, BASE + AVAIL_AT, 0];
        disk.send(SET_VRING_ADDR, &places, None)?;
        disk.send(SET_VRING_CALL, &[0], Some(disk._call.as_fd()))?;
        disk.send(SET_VRING_KICK, &[0], Some(disk.kick.as_fd()))?;
        // Messages are done in order: with this answer all of them have been.
        disk.ask(GET_FEATURES, &[])?;
        Ok(disk)
    }

    fn lay_out(&self) -> io::Result<()> {
        let view = self.memory.view()?;
        for slot in 0..u64::from(DEPTH_MAX) {
            let header = BASE + HEADERS_AT + slot * LINE_BYTES;
            let pieces = [
                (header, STATUS, NEXT),
                (BASE + DATA_AT + slot * self.io_bytes, self.io_bytes, NEXT | WRITE),
                (header + STATUS, 1, WRITE),
            ];
            for (index, (addr, len, flags)) in (slot * 3..).zip(pieces) {
                let mut desc = [0; 16];
                desc[..8].copy_from_slice(&addr.to_le_bytes());
                desc[8..12].copy_from_slice(&(len as u32).to_le_bytes());
                desc[12..14].copy_from_slice(&flags.to_le_bytes());
                desc[14..].copy_from_slice(&(index as u16 + 1).to_le_bytes());
                own(slice(&view, index * 16, 16)?.write(0, &desc))?;
            }
        }
        own(slice(&view, AVAIL_AT, 2)?.store_u16(0, NO_INTERRUPT, Relaxed))
    }

    /// The driver, which uses the disk for as long as it lives.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn driver(self) -> io::Result<VirtioDriver> {
        let view = self.memory.view()?;
        Ok(VirtioDriver {
            descriptors: slice(&view, 0, 16 * u64::from(ENTRIES))?,
            avail: slice(&view, AVAIL_AT, 6 + 2 * u64::from(ENTRIES))?,
            used: slice(&view, USED_AT, 6 + 8 * u64::from(ENTRIES))?,
            headers: slice(&view, HEADERS_AT, LINE_BYTES * u64::from(DEPTH_MAX))?,
            avail_index: 0,
            used_index: 0,
            is_write: [false; DEPTH_MAX as usize],
            disk: self,
        })
    }

    fn ask(&self, request: u32, words: &[u64]) -> io::Result<u64> {
        self.send(request, words, None)?;
        let mut reply = [0; 20];
        (&self.stream).read_exact(&mut reply)?;
        let (header, value) = reply.split_at(12);
        if header[..4] != request.to_le_bytes() || header[8..] != 8u32.to_le_bytes() {
            return Err(broken(format!("a strange answer to request {request}: {header:x?}")));
        }
        Ok(value.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    fn send(&self, request: u32, words: &[u64], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut message = Vec::with_capacity(12 + 8 * words.len());
        for word in [request, VERSION, 8 * words.len() as u32] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        send(&self.stream, &message, fd)
    }
}

impl Drop for VirtioDisk {
    /// Takes the ring back, so that the device is done with the memory.
    fn drop(&mut self) {
        let _ = self.ask(GET_VRING_BASE, &[0]);
    }
}

/// Sends a message that a file may come with.
pub(super) fn send(
    stream: &UnixStream,
    message: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(fd) = &fd
        && !control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)))
    {
        return Err(broken("no room for a file descriptor"));
    }
    let sent =
        rustix::net::sendmsg(stream, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == message.len() { Ok(()) } else { Err(broken("the socket took a part of a message")) }
}

/// See [`VirtioDisk::driver`].
pub struct VirtioDriver {
    disk: VirtioDisk,
    descriptors: GuestSlice,
    avail: GuestSlice,
    used: GuestSlice,
    headers: GuestSlice,
    avail_index: u16,
    used_index: u16,
    /// Which way the data descriptor of each slot goes.
    is_write: [bool; DEPTH_MAX as usize],
}

impl Driver for VirtioDriver {
    fn issue(&mut self, slot: u16, offset: u64, write: bool) -> io::Result<()> {
        let index = usize::from(slot);
        if self.is_write[index] != write {
            self.is_write[index] = write;
            let flags = if write { NEXT } else { NEXT | WRITE };
            own(self.descriptors.store_u16((3 * index + 1) * 16 + 12, flags, Relaxed))?;
        }
        let at = index * LINE_BYTES as usize;
        let kind = if write { REQUEST_WRITE } else { REQUEST_READ };
        own(self.headers.store_u64(at, kind, Relaxed))?;
        own(self.headers.store_u64(at + 8, offset / SECTOR_BYTES, Relaxed))?;
        own(self.headers.store_u32(at + STATUS as usize, 0xff, Relaxed))?;
        let entry = usize::from(self.avail_index % ENTRIES);
        self.avail_index = self.avail_index.wrapping_add(1);
        own(self.avail.store_u16(4 + 2 * entry, 3 * slot, Relaxed))
    }

    fn publish(&mut self) -> io::Result<()> {
        own(self.avail.store_u16(2, self.avail_index, Release))?;
        fence(SeqCst);
        if own(self.used.load_u16(0, Relaxed))? & NO_NOTIFY == 0 {
            rustix::io::write(&self.disk.kick, &1u64.to_ne_bytes())?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        let index = own(self.used.load_u16(2, Acquire))?;
        while self.used_index != index {
            let at = 4 + 8 * usize::from(self.used_index % ENTRIES);
            let head = own(self.used.load_u32(at, Relaxed))?;
            let slot = head as u16 / 3;
            if head >= 3 * u32::from(DEPTH_MAX) {
                return Err(broken(format!("the device gives back descriptor {head}")));
            }
            let line = usize::from(slot) * LINE_BYTES as usize;
            let status = own(self.headers.load_u32(line + STATUS as usize, Relaxed))? as u8;
            if status != 0 {
                return Err(broken(format!("a request ended with status {status}")));
            }
            self.used_index = self.used_index.wrapping_add(1);
            done.push(slot);
        }
        Ok(())
    }
}
