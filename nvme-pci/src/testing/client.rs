//! A vfio-user client.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use vfio_bindings::bindings::vfio;
use zerocopy::{FromBytes, IntoBytes};

use crate::function::Region;
use crate::vfio_user::wire::{self, Command, HEADER_BYTES, Header};

/// A reply: its payload, and what came with it; or an errno.
pub type Answer = Result<(Vec<u8>, Vec<OwnedFd>), i32>;

/// A client's connection. Errors of the connection are panics, except where a method says.
pub struct TestClient {
    stream: UnixStream,
    next_id: std::cell::Cell<u16>,
}

/// A file of zeros in memory, as guests have.
pub fn memfd(size_bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, size_bytes).expect("room for it");
    fd
}

impl TestClient {
    /// Connect to a device's socket, without a word.
    pub fn connect(path: &Path) -> TestClient {
        TestClient::over(UnixStream::connect(path).expect("device listens"))
    }

    /// Use a connection.
    pub fn over(stream: UnixStream) -> TestClient {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
        TestClient { stream, next_id: std::cell::Cell::new(1) }
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Send any bytes with file descriptors.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "at most 64");
        }
        let slices = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent.expect("device reads"), bytes.len());
    }

    /// Send a command; gives its id.
    pub fn send(
        &self,
        command: Command,
        no_reply: bool,
        payload: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> u16 {
        let id = self.next_id.replace(self.next_id.get().wrapping_add(1));
        self.send_raw(&wire::command(id, command, no_reply, payload), fds);
        id
    }

    /// The next reply, which must be to this command. None: the device has closed the connection.
    pub fn try_reply(&self, id: u16, command: Command) -> Option<Answer> {
        let mut header = [0; HEADER_BYTES];
        let fds = self.receive(&mut header)?;
        let header: Header = zerocopy::transmute!(header);
        assert_eq!((header.id, Command(header.command)), (id, command), "reply to another message");
        let outcome = wire::reply_outcome(&header).expect("a reply");
        let mut payload = vec![0; header.size as usize - HEADER_BYTES];
        if !payload.is_empty() {
            assert!(self.receive(&mut payload)?.is_empty(), "files come with the header");
        }
        if outcome.is_err() {
            assert!(payload.is_empty(), "an error has a header only");
        }
        Some(outcome.map(|()| (payload, fds)))
    }

    /// Exactly these many bytes. None: the connection has ended.
    fn receive(&self, bytes: &mut [u8]) -> Option<Vec<OwnedFd>> {
        let (mut fds, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let mut slices = [IoSliceMut::new(&mut bytes[at..])];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&self.stream, &mut slices, &mut control, flags);
            let received = match received {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::CONNRESET) => return None,
                Err(error) => panic!("no reply: {error}"),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    fds.extend(more);
                }
            }
            if received == 0 {
                return None;
            }
            at += received;
        }
        Some(fds)
    }

    /// Send a command and wait for its reply.
    pub fn ask(&self, command: Command, payload: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Answer {
        let id = self.send(command, false, payload, fds);
        self.try_reply(id, command).expect("a connection")
    }

    /// Negotiate a version, as QEMU does.
    pub fn negotiate(&self) {
        let version = wire::Version::default();
        let json = concat!(
            r#"{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "#,
            r#""pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#,
            "\0"
        );
        self.ask(Command::VERSION, &[version.as_bytes(), json.as_bytes()], &[])
            .expect("a version of the protocol");
    }

    /// Map guest memory.
    pub fn map(&self, fd: BorrowedFd<'_>, offset: u64, address: u64, size: u64) {
        let request = wire::DmaMap {
            argsz: 32,
            flags: wire::DmaMap::READ | wire::DmaMap::WRITE,
            offset,
            address,
            size,
        };
        self.ask(Command::DMA_MAP, &[request.as_bytes()], &[fd]).expect("memory can be mapped");
    }

    /// Unmap guest memory.
    pub fn unmap(&self, address: u64, size: u64) {
        let request = wire::DmaUnmap { argsz: 24, flags: 0, address, size };
        let (reply, _) = self
            .ask(Command::DMA_UNMAP, &[request.as_bytes()], &[])
            .expect("memory that was mapped");
        assert_eq!(reply, request.as_bytes());
    }

    /// Read a region.
    pub fn read<const N: usize>(&self, region: Region, offset: u64) -> [u8; N] {
        let request = wire::RegionAccess { offset, region: region.0, count: N as u32 };
        let (reply, _) = self
            .ask(Command::REGION_READ, &[request.as_bytes()], &[])
            .expect("an access inside the region");
        let (answer, data) = wire::RegionAccess::read_from_prefix(&reply).expect("its size");
        assert_eq!(answer, request);
        data.try_into().expect("as much as was asked for")
    }

    /// Write a region and wait until it is done.
    pub fn write(&self, region: Region, offset: u64, data: &[u8]) {
        let request = wire::RegionAccess { offset, region: region.0, count: data.len() as u32 };
        let (reply, _) = self
            .ask(Command::REGION_WRITE, &[request.as_bytes(), data], &[])
            .expect("an access inside the region");
        assert_eq!(reply, request.as_bytes());
    }

    /// Write a region and do not wait, as QEMU does.
    pub fn post(&self, region: Region, offset: u64, data: &[u8]) {
        let request = wire::RegionAccess { offset, region: region.0, count: data.len() as u32 };
        self.send(Command::REGION_WRITE, true, &[request.as_bytes(), data], &[]);
    }

    /// The file behind a region, and the areas of it that can be mapped.
    pub fn region_file(&self, region: Region) -> (OwnedFd, Vec<(u64, u64)>) {
        let request =
            wire::RegionInfo { argsz: 4096, index: region.0, ..wire::RegionInfo::default() };
        let (reply, fds) = self
            .ask(Command::DEVICE_GET_REGION_INFO, &[request.as_bytes()], &[])
            .expect("a region");
        let (info, _) = wire::RegionInfo::read_from_prefix(&reply).expect("its size");
        let sparse = &reply[info.cap_offset as usize..];
        let (sparse, areas) = wire::SparseMmap::read_from_prefix(sparse).expect("its size");
        assert_eq!(u32::from(sparse.id), vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP);
        let (areas, _) = <[[u64; 2]]>::ref_from_prefix_with_elems(areas, sparse.nr_areas as usize)
            .expect("as many areas as it says");
        let fd = fds.into_iter().next().expect("a region that can be mapped");
        (fd, areas.iter().map(|area| (area[0], area[1])).collect())
    }

    /// Have an eventfd signalled for each of the MSI-X vectors from `start`.
    pub fn set_msix(&self, start: u32, eventfds: &[OwnedFd]) {
        for (batch, eventfds) in eventfds.chunks(wire::FDS_MAX).enumerate() {
            let request = wire::IrqSet {
                argsz: 20,
                flags: vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER,
                index: vfio::VFIO_PCI_MSIX_IRQ_INDEX,
                start: start + (batch * wire::FDS_MAX) as u32,
                count: eventfds.len() as u32,
            };
            let fds: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
            self.ask(Command::DEVICE_SET_IRQS, &[request.as_bytes()], &fds)
                .expect("vectors that exist");
        }
    }

    /// An eventfd that blocks, as a client may pass it.
    pub fn eventfd() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")
    }

    /// Reset the device.
    pub fn reset(&self) {
        self.ask(Command::DEVICE_RESET, &[], &[]).expect("every device can be reset");
    }
}
