//! The kernel below a core: the real ring, or the simulated one. Both take a slot and answer with
//! completions, so everything above is the same code in production and in simulation.

// UNSAFETY: a send names memory by address.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use iobuf::Pool;

use crate::error::Errno;
use crate::fd::{Fd, SharedFd, Socket, Source};
use crate::look::Look;
use crate::net::Tx;
use crate::ops::Slot;
use crate::rx::{SPARE_BYTES, Spare};
use crate::sim::SimKernel;
use crate::sys;
use crate::uring::Uring;

/// One completion, as the ring reports it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) res: i32,
    pub(crate) flags: u32,
}

impl Cqe {
    /// More completions of the same operation will follow.
    pub(crate) fn more(self) -> bool {
        io_uring::cqueue::more(self.flags)
    }

    /// The provided buffer that was used.
    pub(crate) fn buffer(self) -> Option<u16> {
        io_uring::cqueue::buffer_select(self.flags)
    }

    /// The kernel goes on to use that buffer.
    pub(crate) fn buffer_more(self) -> bool {
        io_uring::cqueue::buffer_more(self.flags)
    }
}

/// Why the kernel did not take an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PushError {
    /// The submission queue is full.
    NoRoom,
    /// The descriptor belongs to the other kind of kernel.
    Unfit,
}

pub(crate) enum Kernel {
    Uring(Box<Uring>),
    Sim(Box<SimKernel>),
}

impl Kernel {
    /// Gives the slot's request to the kernel. `value`: where a watch stores what it drained.
    ///
    /// The slot keeps what the request names alive until its last completion.
    pub(crate) fn push(
        &mut self,
        user_data: u64,
        slot: &mut Slot,
        value: *mut u64,
    ) -> Result<(), PushError> {
        match self {
            Kernel::Uring(ring) => ring.push(user_data, slot, value),
            Kernel::Sim(sim) => sim.push(user_data, slot, value),
        }
    }

    /// Sets up what polled reads and writes need, once.
    pub(crate) fn enable_polling(&mut self) -> io::Result<()> {
        match self {
            Kernel::Uring(ring) => ring.enable_polling(),
            // Simulated devices complete by themselves.
            Kernel::Sim(_) => Ok(()),
        }
    }

    /// Makes a descriptor that is cheaper to use, if the kernel has a place for it.
    pub(crate) fn register(&mut self, file: SharedFd) -> Fd {
        match self {
            Kernel::Uring(ring) => ring.register(file),
            Kernel::Sim(_) => Fd::from(file),
        }
    }

    /// Makes the first bytes of the pool cheaper to use, if the process may lock as many.
    pub(crate) fn register_pool(&mut self, pool: &Pool, bytes: usize) {
        if let Kernel::Uring(ring) = self {
            ring.register_pool(pool, bytes);
        }
    }

    /// Whether the core has to stay awake: a device is polled, or a registered file is to be let
    /// go.
    pub(crate) fn must_stay(&self) -> bool {
        match self {
            Kernel::Uring(ring) => ring.must_stay(),
            Kernel::Sim(_) => false,
        }
    }

    /// Sends of a prepared message what the socket takes without waiting; `EAGAIN`: nothing now.
    pub(crate) fn send_now(&mut self, fd: &Fd, tx: &Tx) -> Result<usize, Errno> {
        match (self, fd.source()) {
            (Kernel::Uring(_), Source::Os(fd)) => {
                // SAFETY: the caller has the queue, which keeps its message and what that names.
                let sent = unsafe { sys::send_now(fd.as_fd(), tx.message()) };
                sent.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
            }
            (Kernel::Sim(sim), Source::Socket(socket)) => sim.send_now(socket.end(), tx),
            // The ring says what is wrong with such a descriptor.
            _ => Err(Errno(libc::EAGAIN)),
        }
    }

    /// Receives into a spare buffer what the socket has, without waiting; `EAGAIN`: nothing now.
    pub(crate) fn recv_now(&mut self, fd: &Fd, spare: &Spare) -> Result<usize, Errno> {
        match (self, fd.source()) {
            (Kernel::Uring(_), Source::Os(fd)) => {
                // SAFETY: the buffer has that many bytes, and is nobody else's until it is lent.
                let received = unsafe { sys::recv_now(fd.as_fd(), spare.as_ptr(), SPARE_BYTES) };
                received.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
            }
            (Kernel::Sim(sim), Source::Socket(socket)) => sim.recv_now(socket.end(), spare),
            // The ring says what is wrong with such a descriptor.
            _ => Err(Errno(libc::EAGAIN)),
        }
    }

    /// What decides when the core receives by itself. Simulated ones do it soon and often.
    pub(crate) fn look(&self) -> Look {
        match self {
            Kernel::Uring(_) => Look::real(),
            Kernel::Sim(_) => Look::new(3),
        }
    }

    /// Asks for the end of an operation.
    pub(crate) fn cancel(&mut self, user_data: u64) -> Result<(), PushError> {
        match self {
            Kernel::Uring(ring) => ring.cancel(user_data),
            Kernel::Sim(sim) => {
                sim.cancel(user_data);
                Ok(())
            }
        }
    }

    /// Enters the kernel if there is a reason to, without waiting.
    pub(crate) fn enter(&mut self) {
        match self {
            Kernel::Uring(ring) => ring.enter(),
            Kernel::Sim(sim) => sim.enter(),
        }
    }

    /// Sleeps until something completes, the core is woken, or `timeout` passed. A simulated core
    /// does not sleep: its world moves the time.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) {
        match self {
            Kernel::Uring(ring) => ring.sleep(timeout),
            Kernel::Sim(_) => {}
        }
    }

    /// Moves the completions to `into`. Returns whether there was anything, wake-ups included.
    pub(crate) fn reap(&mut self, into: &mut Vec<Cqe>) -> bool {
        match self {
            Kernel::Uring(ring) => ring.reap(into),
            Kernel::Sim(sim) => sim.reap(into),
        }
    }

    /// The core goes away. The real kernel has been told by cancels; simulated time stands still,
    /// so there everything ends now.
    pub(crate) fn abandon(&mut self) {
        if let Kernel::Sim(sim) = self {
            sim.abandon();
        }
    }

    /// Takes back what the kernel itself has in flight besides the operations. `false`: not yet.
    pub(crate) fn quiesce(&mut self) -> bool {
        match self {
            Kernel::Uring(ring) => ring.disarm_wake(),
            Kernel::Sim(_) => true,
        }
    }

    /// When the simulated kernel has something to do.
    pub(crate) fn next_event(&self) -> Option<Duration> {
        match self {
            Kernel::Uring(_) => None,
            Kernel::Sim(sim) => sim.next_event(),
        }
    }

    /// The socket of a connect that just completed on a simulated kernel.
    pub(crate) fn take_connected(&mut self, user_data: u64) -> Option<Socket> {
        match self {
            Kernel::Uring(_) => None,
            Kernel::Sim(sim) => sim.take_connected(user_data),
        }
    }
}
