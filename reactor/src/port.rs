//! A task's share of the ring.

use std::net::SocketAddr;
use std::time::Duration;

use iobuf::SgList;

use crate::error::{Busy, Errno};
use crate::fd::{Fd, Socket};

/// What an operation that succeeded gave.
#[derive(Debug)]
pub enum Outcome {
    /// Bytes moved by a read or write; may be fewer than asked for.
    Bytes(u32),
    /// Done; nothing more to say.
    Done,
    /// The value drained from a watched event descriptor.
    Signal(u64),
    /// A connected socket.
    Socket(Socket),
}

/// The end of an operation (or one signal of a watched descriptor).
#[derive(Debug)]
pub struct Completion {
    /// The token given at submission.
    pub token: u64,
    /// What came of it.
    pub result: Result<Outcome, Errno>,
}

/// A task's share of the ring.
///
/// Every call is safe whatever the caller does next: the segments of a list are copied and its hold keeps their memory
/// until the kernel is done, even if list, descriptor and port are dropped at once. Each accepted operation gives exactly one
/// [`Completion`] through [`Port::next`] ([`Port::watch`]: one per signal), unless the port is dropped, which cancels.
///
/// `Busy` means that no operation slot is free: take completions and try again.
pub struct Port {}

impl Port {
    /// Reads at byte `offset` of `file` into `sg`.
    pub fn readv(&mut self, file: &Fd, offset: u64, sg: &SgList, token: u64) -> Result<(), Busy> {
        let _ = (file, offset, sg, token);
        todo!()
    }

    /// Writes `sg` at byte `offset` of `file`; with `dsync` the data is on stable media when it completes (`RWF_DSYNC`).
    pub fn writev(
        &mut self,
        file: &Fd,
        offset: u64,
        sg: &SgList,
        dsync: bool,
        token: u64,
    ) -> Result<(), Busy> {
        let _ = (file, offset, sg, dsync, token);
        todo!()
    }

    /// Makes completed writes stable; `data_only` leaves out metadata not needed to read them back (`fdatasync`).
    pub fn fsync(&mut self, file: &Fd, data_only: bool, token: u64) -> Result<(), Busy> {
        let _ = (file, data_only, token);
        todo!()
    }

    /// `fallocate(2)`: `mode` as there, range in bytes.
    pub fn fallocate(
        &mut self,
        file: &Fd,
        mode: i32,
        offset: u64,
        len: u64,
        token: u64,
    ) -> Result<(), Busy> {
        let _ = (file, mode, offset, len, token);
        todo!()
    }

    /// Waits for signals of an event descriptor: each gives [`Outcome::Signal`] with the drained value, and the watch stays.
    pub fn watch(&mut self, eventfd: &Fd, token: u64) -> Result<(), Busy> {
        let _ = (eventfd, token);
        todo!()
    }

    /// Connects over TCP; [`Errno::TIMED_OUT`] after `timeout`.
    pub fn connect(&mut self, addr: SocketAddr, timeout: Duration, token: u64) -> Result<(), Busy> {
        let _ = (addr, timeout, token);
        todo!()
    }

    /// Cancels everything in flight; each operation still completes, as cancelled or not.
    pub fn cancel_all(&mut self) {
        todo!()
    }

    /// Operations not completed yet (watches included).
    pub fn in_flight(&self) -> usize {
        todo!()
    }

    /// The oldest recorded completion.
    #[expect(
        clippy::should_implement_trait,
        reason = "a port is not an iterator: it may have more later"
    )]
    pub fn next(&mut self) -> Option<Completion> {
        todo!()
    }
}
