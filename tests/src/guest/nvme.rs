//! An NVMe driver with one queue pair over vfio-user, as Linux has it: shadow doorbells, a doorbell
//! message only when the event index asks for one. Completions are looked for; the queue raises no
//! interrupts. (vfio-user, "Protocol Specification"; NVM Express Base 2.0, section 3.)

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use iobuf::GuestSlice;

use super::virtio::send;
use super::{BASE, DEPTH_MAX, Driver, IO_BYTES, Memory, SECTOR_BYTES, broken, own, slice};

const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const NO_REPLY: u32 = 1 << 4;
const HEADER_BYTES: usize = 16;
const BAR0: u32 = 0;
const CONFIG: u32 = 7;

const ENTRIES: u32 = 256;
const _: () = assert!((DEPTH_MAX as u32) < ENTRIES);
const ADMIN_ENTRIES: u32 = 16;
const ADMIN_SQ_AT: u64 = 0x1000;
const ADMIN_CQ_AT: u64 = 0x2000;
const SHADOW_AT: u64 = 0x3000;
const EVENTS_AT: u64 = 0x4000;
const SQ_AT: u64 = 0x1_0000;
const CQ_AT: u64 = 0x2_0000;
const DATA_AT: u64 = 0x3_0000;
const MEMORY_BYTES: u64 = DATA_AT + DEPTH_MAX as u64 * IO_BYTES;

const READ: u32 = 2;
const WRITE: u32 = 1;
const PATIENCE: Duration = Duration::from_secs(10);

/// A controller that has the queues. Can be given to another thread.
#[derive(Debug)]
pub struct NvmeDisk {
    stream: UnixStream,
    memory: Memory,
}

impl NvmeDisk {
    /// Attaches the device behind `socket` and creates a queue pair.
    ///
    /// # Errors
    /// Of the socket; the device refuses something.
    pub fn attach(socket: &Path) -> io::Result<NvmeDisk> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let disk = NvmeDisk { stream, memory: Memory::new(MEMORY_BYTES)? };
        let version = concat!(
            "\0\0\0\0",
            r#"{"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 65536, "pgsizes": 4096}}"#,
            "\0"
        );
        disk.ask(VERSION, version.as_bytes(), None)?;
        let mut map = Vec::from(32u32.to_le_bytes());
        map.extend(3u32.to_le_bytes());
        map.extend([0, BASE, MEMORY_BYTES].iter().flat_map(|word: &u64| word.to_le_bytes()));
        disk.ask(DMA_MAP, &map, Some(disk.memory.file.as_fd()))?;
        // Memory space and bus master.
        disk.write(CONFIG, 4, &6u16.to_le_bytes())?;

        let aqa = (ADMIN_ENTRIES - 1) << 16 | (ADMIN_ENTRIES - 1);
        disk.write(BAR0, 0x24, &aqa.to_le_bytes())?;
        for (register, at) in [(0x28, ADMIN_SQ_AT), (0x30, ADMIN_CQ_AT)] {
            disk.write(BAR0, register, &((BASE + at) as u32).to_le_bytes())?;
            disk.write(BAR0, register + 4, &0u32.to_le_bytes())?;
        }
        // Entries of 64 and 16 bytes, enable.
        disk.write(BAR0, 0x14, &0x0046_0001u32.to_le_bytes())?;
        let begun = Instant::now();
        while disk.read_u32(BAR0, 0x1c)? & 1 == 0 {
            if begun.elapsed() > PATIENCE {
                return Err(broken("the controller does not become ready"));
            }
        }
        let size = (ENTRIES - 1) << 16 | 1;
        let commands = [
            // Set Features, Number of Queues: one of each.
            (0x09, [0x07, 0, 0], [0, 0]),
            // Create I/O Completion Queue: in one piece, no interrupts.
            (0x05, [size, 1, 0], [BASE + CQ_AT, 0]),
            (0x01, [size, 1 << 16 | 1, 0], [BASE + SQ_AT, 0]),
            // Doorbell Buffer Config.
            (0x7c, [0, 0, 0], [BASE + SHADOW_AT, BASE + EVENTS_AT]),
        ];
        for (index, (opcode, dwords, pointers)) in (0..).zip(commands) {
            disk.admin(index, opcode, dwords, pointers)?;
        }
        Ok(disk)
    }

    /// The driver, which uses the disk for as long as it lives.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn driver(self) -> io::Result<NvmeDriver> {
        let view = self.memory.view()?;
        Ok(NvmeDriver {
            sq: slice(&view, SQ_AT, 64 * u64::from(ENTRIES))?,
            cq: slice(&view, CQ_AT, 16 * u64::from(ENTRIES))?,
            shadow: slice(&view, SHADOW_AT, 16)?,
            events: slice(&view, EVENTS_AT, 16)?,
            tail: 0,
            head: 0,
            phase: 1,
            disk: self,
        })
    }

    /// Runs the admin command with this number, counted from 0.
    fn admin(
        &self,
        index: u32,
        opcode: u32,
        dwords: [u32; 3],
        pointers: [u64; 2],
    ) -> io::Result<()> {
        let view = self.memory.view()?;
        let entry = slice(&view, ADMIN_SQ_AT + 64 * u64::from(index), 64)?;
        own(entry.write(0, &command(opcode, index as u16, 0, pointers, dwords)))?;
        self.write(BAR0, 0x1000, &(index + 1).to_le_bytes())?;
        let entry = slice(&view, ADMIN_CQ_AT + 16 * u64::from(index), 16)?;
        let begun = Instant::now();
        let last = loop {
            let last = own(entry.load_u32(12, Acquire))?;
            if last >> 16 & 1 == 1 {
                break last;
            }
            if begun.elapsed() > PATIENCE {
                return Err(broken(format!("no answer to admin command {opcode:#x}")));
            }
            std::thread::yield_now();
        };
        self.write(BAR0, 0x1004, &(index + 1).to_le_bytes())?;
        match last >> 17 {
            0 => Ok(()),
            status => Err(broken(format!("admin command {opcode:#x}: status {status:#x}"))),
        }
    }

    fn read_u32(&self, region: u32, offset: u64) -> io::Result<u32> {
        let reply = self.ask(REGION_READ, &access(region, offset, 4), None)?;
        let bytes = reply.last_chunk().ok_or_else(|| broken("a register without a value"))?;
        Ok(u32::from_le_bytes(*bytes))
    }

    /// Writes a register and does not wait, as QEMU does.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut payload = access(region, offset, data.len() as u32);
        payload.extend_from_slice(data);
        self.send(REGION_WRITE, NO_REPLY, &payload, None)
    }

    fn ask(&self, command: u16, payload: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<Vec<u8>> {
        self.send(command, 0, payload, fd)?;
        let mut header = [0; HEADER_BYTES];
        (&self.stream).read_exact(&mut header)?;
        let word =
            |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let (is_same, size, error) = (header[2..4] == command.to_le_bytes(), word(4), word(12));
        let rest = (size as usize).checked_sub(HEADER_BYTES).filter(|rest| *rest <= 65_536);
        let (true, Some(rest)) = (is_same, rest) else {
            return Err(broken(format!("a strange answer to command {command}: {header:x?}")));
        };
        let mut reply = vec![0; rest];
        (&self.stream).read_exact(&mut reply)?;
        match error {
            0 => Ok(reply),
            error => Err(broken(format!("command {command} was refused with errno {error}"))),
        }
    }

    fn send(
        &self,
        command: u16,
        flags: u32,
        payload: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
        message.extend_from_slice(&0u16.to_le_bytes());
        message.extend_from_slice(&command.to_le_bytes());
        for word in [(HEADER_BYTES + payload.len()) as u32, flags, 0] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(payload);
        send(&self.stream, &message, fd)
    }
}

fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let mut bytes = Vec::from(offset.to_le_bytes());
    bytes.extend(region.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes
}

/// A submission queue entry.
fn command(opcode: u32, cid: u16, nsid: u32, pointers: [u64; 2], dwords: [u32; 3]) -> [u8; 64] {
    let mut sqe = [0; 64];
    sqe[..4].copy_from_slice(&(opcode | u32::from(cid) << 16).to_le_bytes());
    sqe[4..8].copy_from_slice(&nsid.to_le_bytes());
    for (bytes, pointer) in sqe[24..40].chunks_exact_mut(8).zip(pointers) {
        bytes.copy_from_slice(&pointer.to_le_bytes());
    }
    for (bytes, dword) in sqe[40..52].chunks_exact_mut(4).zip(dwords) {
        bytes.copy_from_slice(&dword.to_le_bytes());
    }
    sqe
}

/// See [`NvmeDisk::driver`].
pub struct NvmeDriver {
    disk: NvmeDisk,
    sq: GuestSlice,
    cq: GuestSlice,
    shadow: GuestSlice,
    events: GuestSlice,
    tail: u32,
    head: u32,
    phase: u32,
}

impl NvmeDriver {
    /// Rings a doorbell: in memory, and by a message if its event index was passed.
    fn ring(&self, is_cq: bool, value: u32) -> io::Result<()> {
        let at = 8 + if is_cq { 4 } else { 0 };
        let old = own(self.shadow.load_u32(at, Relaxed))? as u16;
        own(self.shadow.store_u32(at, value, Release))?;
        fence(SeqCst);
        let (event, new) = (own(self.events.load_u32(at, Relaxed))? as u16, value as u16);
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.disk.write(BAR0, 0x1000 + at as u64, &value.to_le_bytes())?;
        }
        Ok(())
    }
}

impl Driver for NvmeDriver {
    fn issue(&mut self, slot: u16, offset: u64, write: bool) -> io::Result<()> {
        let opcode = if write { WRITE } else { READ };
        let data = BASE + DATA_AT + u64::from(slot) * IO_BYTES;
        let lba = offset / SECTOR_BYTES;
        let dwords = [lba as u32, (lba >> 32) as u32, (IO_BYTES / SECTOR_BYTES - 1) as u32];
        own(self.sq.write(self.tail as usize * 64, &command(opcode, slot, 1, [data, 0], dwords)))?;
        self.tail = (self.tail + 1) % ENTRIES;
        Ok(())
    }

    fn publish(&mut self) -> io::Result<()> {
        self.ring(false, self.tail)
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        let before = self.head;
        loop {
            let last = own(self.cq.load_u32(self.head as usize * 16 + 12, Acquire))?;
            if last >> 16 & 1 != self.phase {
                break;
            }
            let (slot, status) = (last as u16, last >> 17);
            if status != 0 || slot >= DEPTH_MAX {
                return Err(broken(format!("command {slot} ended with status {status:#x}")));
            }
            done.push(slot);
            self.head = (self.head + 1) % ENTRIES;
            self.phase ^= u32::from(self.head == 0);
        }
        if self.head == before { Ok(()) } else { self.ring(true, self.head) }
    }
}
