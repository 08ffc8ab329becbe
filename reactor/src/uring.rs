//! The real kernel: one io_uring per core.

// UNSAFETY: the kernel reads and writes memory that submissions name by address. `ops` keeps it in
// place until the last completion; this module turns slots into submissions.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use io_uring::squeue::{self, Flags};
use io_uring::types::{FsyncFlags, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode, types};

use crate::core::CoreConfig;
use crate::error::SetupError;
use crate::fd::Source;
use crate::kernel::{Cqe, PushError};
use crate::mailbox::Mailbox;
use crate::ops::{Request, Slot};
use crate::rx::{RxPool, SPARE_BYTES};

/// The only buffer group.
const GROUP: u16 = 0;
/// User data of the read that wakes the core. No slot has the index `u32::MAX`.
const WAKE: u64 = u64::MAX;
/// User data of cancels and linked timeouts, whose results say nothing new.
const IGNORE: u64 = u64::MAX - 1;
/// `IOU_PBUF_RING_INC` (Linux 6.12): the kernel uses up a buffer piece by piece.
const PBUF_RING_INC: u16 = 2;
/// Submission queue entries at most; more operations than these just take more than one enter.
const SQ_ENTRIES_MAX: u32 = 4096;
/// Completions per operation that fit the queue. Receives give many each; what does not fit waits
/// in the kernel and is fetched by the next enter.
const CQ_PER_OP: u32 = 4;
const CQ_ENTRIES_MAX: u32 = 65536;

pub(crate) struct Uring {
    ring: IoUring,
    /// Dropped after the ring: the kernel reads its ring of buffers.
    _rx: Rc<RxPool>,
    mailbox: Arc<Mailbox>,
    /// The kernel stores here what it read from the mailbox's event descriptor.
    wake_value: Box<AtomicU64>,
    wake_armed: bool,
    closing: bool,
}

impl Uring {
    pub(crate) fn new(
        config: &CoreConfig,
        rx: Rc<RxPool>,
        mailbox: Arc<Mailbox>,
    ) -> Result<Uring, SetupError> {
        let build = |no_sqarray: bool| {
            let mut builder = IoUring::builder();
            builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all()
                .setup_cqsize((config.entries * CQ_PER_OP).next_power_of_two().min(CQ_ENTRIES_MAX));
            if no_sqarray {
                builder.setup_no_sqarray(); // Linux 6.6
            }
            builder.build(config.entries.min(SQ_ENTRIES_MAX))
        };
        let ring = match build(true) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => build(false),
            result => result,
        };
        let ring =
            ring.map_err(|e| SetupError::from_ring("an io_uring with deferred task work", e))?;
        let params = ring.params();
        let features = [
            (params.is_feature_nodrop(), "completions that are never dropped"),
            (params.is_feature_ext_arg(), "io_uring waits with a timeout"),
            (params.is_feature_submit_stable(), "submissions that are stable once submitted"),
            (params.is_feature_fast_poll(), "socket operations without worker threads"),
        ];
        for (present, feature) in features {
            if !present {
                return Err(SetupError::TooOld { feature });
            }
        }
        check_operations(&ring)?;
        register_buffers(&ring, &rx, config.rx_incremental)?;
        let wake_value = Box::new(AtomicU64::new(0));
        Ok(Uring { ring, _rx: rx, mailbox, wake_value, wake_armed: false, closing: false })
    }

    pub(crate) fn push(
        &mut self,
        user_data: u64,
        slot: &mut Slot,
        value: *mut u64,
    ) -> Result<(), PushError> {
        let entry = match &mut slot.request {
            Request::Connect(connect) => {
                let fd = connect.socket.as_ref().ok_or(PushError::Unfit)?.as_raw_fd();
                connect.timespec = timespec(connect.timeout);
                let raw = &connect.raw;
                let start = opcode::Connect::new(types::Fd(fd), raw.as_ptr(), raw.len()).build();
                let timeout = opcode::LinkTimeout::new(&raw const connect.timespec).build();
                let pair =
                    [start.user_data(user_data).flags(Flags::IO_LINK), timeout.user_data(IGNORE)];
                return self.submit(&pair);
            }
            _ => entry_of(slot, value)?,
        };
        self.submit(&[entry.user_data(user_data)])
    }

    pub(crate) fn cancel(&mut self, user_data: u64) -> Result<(), PushError> {
        self.submit(&[opcode::AsyncCancel::new(user_data).build().user_data(IGNORE)])
    }

    /// Puts linked entries into the queue, together or not at all.
    fn submit(&mut self, entries: &[squeue::Entry]) -> Result<(), PushError> {
        if self.try_submit(entries) {
            return Ok(());
        }
        // The queue is full: an extra enter in this turn makes room.
        self.enter_now();
        if self.try_submit(entries) { Ok(()) } else { Err(PushError::NoRoom) }
    }

    fn try_submit(&mut self, entries: &[squeue::Entry]) -> bool {
        let mut queue = self.ring.submission();
        // SAFETY: what the entries name stays in place until their last completion: iovecs,
        // holds, sockets, send queues and spare buffers are owned by the slot, watch values by
        // `Ops`, the wake value by `self`; none is freed before the completion is reaped or, when
        // the core is dropped with the kernel still busy, ever (see `Shared::shutdown`).
        unsafe { queue.push_multiple(entries) }.is_ok()
    }

    /// Enters only if there is something to submit or to run, as seen in shared memory.
    pub(crate) fn enter(&mut self) {
        if !self.wake_armed && !self.closing {
            self.arm_wake();
        }
        let queue = self.ring.submission();
        let wanted = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if wanted {
            self.enter_now();
        }
    }

    fn enter_now(&mut self) {
        let pending = self.ring.submission().len() as u32;
        // GETEVENTS runs deferred task work and fetches completions that overflowed.
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: the count is that of the queue, and there is no argument.
        let result =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(pending, 0, flags, None) };
        check_enter(result);
    }

    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) {
        let timespec = timespec(timeout.unwrap_or(Duration::ZERO));
        let args = match timeout {
            Some(_) => SubmitArgs::new().timespec(&timespec),
            None => SubmitArgs::new(),
        };
        check_enter(self.ring.submitter().submit_with_args(1, &args));
    }

    fn arm_wake(&mut self) {
        let Some(eventfd) = self.mailbox.eventfd().map(OwnedFd::as_raw_fd) else { return };
        let value = self.wake_value.as_ptr().cast();
        let read = opcode::Read::new(types::Fd(eventfd), value, 8).build().user_data(WAKE);
        self.wake_armed = self.submit(&[read]).is_ok();
    }

    pub(crate) fn reap(&mut self, into: &mut Vec<Cqe>) -> bool {
        let mut woken = false;
        for cqe in self.ring.completion() {
            match cqe.user_data() {
                WAKE => {
                    self.wake_armed = false;
                    woken = true;
                }
                IGNORE => {}
                user_data => {
                    into.push(Cqe { user_data, res: cqe.result(), flags: cqe.flags() });
                }
            }
        }
        woken || !into.is_empty()
    }

    /// Takes the wake-up read back, so that nothing of the ring's own is in flight any more.
    /// `false`: it is still being cancelled.
    pub(crate) fn disarm_wake(&mut self) -> bool {
        self.closing = true;
        if self.wake_armed {
            // Repeated while it lasts: the queue may have been full.
            let cancel = opcode::AsyncCancel::new(WAKE).build().user_data(IGNORE);
            let _ = self.submit(&[cancel]);
            self.enter_now();
        }
        !self.wake_armed
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // Not strictly needed, as closing the ring does it, but that may happen later. Failure
        // leaves the pages pinned by the kernel, not by us.
        let _ = self.ring.submitter().unregister_buf_ring(GROUP);
    }
}

/// The descriptor of a slot, if it is a real one.
fn os_fd(slot: &Slot) -> Result<RawFd, PushError> {
    match slot.fd.as_ref().map(|fd| fd.source()) {
        Some(Source::Os(fd)) => Ok(fd.as_raw_fd()),
        _ => Err(PushError::Unfit),
    }
}

fn entry_of(slot: &Slot, value: *mut u64) -> Result<squeue::Entry, PushError> {
    let fd = types::Fd(os_fd(slot)?);
    // A segment is laid out as an iovec (asserted in `iobuf`).
    let iovecs = slot.segments.as_ptr().cast::<libc::iovec>();
    let count = slot.segments.len() as u32;
    Ok(match &slot.request {
        Request::Read { offset } => match slot.segments.as_slice() {
            [one] if let Ok(len) = u32::try_from(one.len()) => {
                opcode::Read::new(fd, one.as_ptr(), len).offset(*offset).build()
            }
            _ => opcode::Readv::new(fd, iovecs, count).offset(*offset).build(),
        },
        Request::Write { offset, dsync } => {
            let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
            match slot.segments.as_slice() {
                [one] if let Ok(len) = u32::try_from(one.len()) => {
                    let write = opcode::Write::new(fd, one.as_ptr(), len);
                    write.offset(*offset).rw_flags(flags).build()
                }
                _ => {
                    let write = opcode::Writev::new(fd, iovecs, count);
                    write.offset(*offset).rw_flags(flags).build()
                }
            }
        }
        Request::Fsync { data_only } => {
            let flags = if *data_only { FsyncFlags::DATASYNC } else { FsyncFlags::empty() };
            opcode::Fsync::new(fd).flags(flags).build()
        }
        Request::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(fd, *len).offset(*offset).mode(*mode).build()
        }
        Request::Watch => opcode::Read::new(fd, value.cast(), 8).build(),
        Request::Recv { spare: Some(spare), .. } => {
            opcode::Recv::new(fd, spare.as_ptr(), SPARE_BYTES as u32).build()
        }
        Request::Recv { spare: None, .. } => opcode::RecvMulti::new(fd, GROUP).build(),
        Request::Send(tx) => {
            let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
            opcode::SendMsg::new(fd, tx.message()).flags(flags).build()
        }
        Request::None | Request::Connect(_) => return Err(PushError::Unfit),
    })
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::new().sec(duration.as_secs()).nsec(duration.subsec_nanos())
}

/// Some errors of an enter mean "later"; others mean that the ring is beyond repair.
fn check_enter(result: io::Result<usize>) {
    let Err(error) = result else { return };
    match error.raw_os_error() {
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME | libc::ENOMEM) => {}
        _ => panic!("io_uring_enter failed, this core cannot go on: {error}"),
    }
}

fn check_operations(ring: &IoUring) -> Result<(), SetupError> {
    let mut probe = io_uring::register::Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|e| SetupError::from_ring("probing io_uring operations", e))?;
    let needed = [
        (opcode::Read::CODE, "reads on the ring"),
        (opcode::Readv::CODE, "vectored reads on the ring"),
        (opcode::Write::CODE, "writes on the ring"),
        (opcode::Writev::CODE, "vectored writes on the ring"),
        (opcode::Fsync::CODE, "fsync on the ring"),
        (opcode::Fallocate::CODE, "fallocate on the ring"),
        (opcode::Connect::CODE, "connect on the ring"),
        (opcode::LinkTimeout::CODE, "linked timeouts on the ring"),
        (opcode::Recv::CODE, "receive on the ring"),
        (opcode::SendMsg::CODE, "sendmsg on the ring"),
        (opcode::AsyncCancel::CODE, "cancellation on the ring"),
    ];
    for (code, feature) in needed {
        if !probe.is_supported(code) {
            return Err(SetupError::TooOld { feature });
        }
    }
    Ok(())
}

fn register_buffers(ring: &IoUring, rx: &RxPool, incremental: bool) -> Result<(), SetupError> {
    let register = |flags| {
        // SAFETY: the address is that of the pool's ring with room for `count` entries; `Uring`
        // keeps the pool for longer than the ring.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(rx.ring_addr(), rx.count(), GROUP, flags)
        }
    };
    if incremental {
        match register(PBUF_RING_INC) {
            Ok(()) => return Ok(()),
            // Before 6.12: whole buffers do as well, with a little more overhead.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(SetupError::from_ring("rings of receive buffers", error)),
        }
    }
    register(0).map_err(|e| SetupError::from_ring("rings of receive buffers", e))
}
