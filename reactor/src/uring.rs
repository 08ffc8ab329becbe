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
use iobuf::{Pool, Segment};

use crate::core::CoreConfig;
use crate::error::SetupError;
use crate::fd::{Fd, SharedFd, Source};
use crate::kernel::{Cqe, PushError};
use crate::mailbox::Mailbox;
use crate::ops::{Request, Slot};
use crate::registered::{PLACES, Places, Registered};
use crate::rx::{RxPool, SPARE_BYTES};

/// The registered buffer that is a part of the pool.
const POOL: u16 = 0;
/// The only buffer group.
const GROUP: u16 = 0;
/// Turns for which entries are put off that matter only to a core that sleeps: reads of the event
/// descriptors that wake it. Going to sleep submits them; a core that is always busy does it so often.
const PUT_OFF_MAX: u32 = 256;
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

/// What a core asks the kernel for.
const OPERATIONS: [(u8, &str); 11] = [
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

pub(crate) struct Uring {
    ring: IoUring,
    /// Dropped after the ring: the kernel reads its ring of buffers.
    _rx: Rc<RxPool>,
    mailbox: Arc<Mailbox>,
    /// The kernel stores here what it read from the mailbox's event descriptor.
    wake_value: Box<AtomicU64>,
    wake_armed: bool,
    closing: bool,
    /// Made when first asked for.
    polled: Option<Polled>,
    /// Places in the tables of registered files, made when first asked for. `Err`: there is no
    /// table, and nobody asks again.
    places: Option<Result<Rc<Places>, ()>>,
    entries: u32,
    restricted: bool,
    /// The part of the pool that is registered.
    arena: Option<Segment>,
    /// Reads and writes put into the queue since the last enter.
    transfers: u32,
    /// Linked entries are in the queue: they have to be submitted together.
    has_links: bool,
    /// Entries in the queue that are no reason to enter: see [`PUT_OFF_MAX`].
    lazy: u32,
    /// Turns in which only such entries were in the queue.
    put_off: u32,
}

/// The ring for devices that are polled. It takes reads and writes only, and entering it asks the
/// devices.
struct Polled {
    ring: IoUring,
    /// Operations with the kernel.
    flying: usize,
    /// Whether registered files are registered here, too.
    has_files: bool,
    /// Whether the pool is registered here, too.
    has_pool: bool,
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
            if config.restricted {
                // Restrictions can only be set on a ring that does not run yet.
                builder.setup_r_disabled();
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
        if config.restricted {
            restrict(&ring).map_err(|e| SetupError::from_ring("restrictions of io_uring", e))?;
        }
        let wake_value = Box::new(AtomicU64::new(0));
        Ok(Uring {
            ring,
            _rx: rx,
            mailbox,
            wake_value,
            wake_armed: false,
            closing: false,
            polled: None,
            places: None,
            entries: config.entries.min(SQ_ENTRIES_MAX),
            restricted: config.restricted,
            arena: None,
            transfers: 0,
            lazy: 0,
            put_off: 0,
            has_links: false,
        })
    }

    pub(crate) fn enable_polling(&mut self) -> io::Result<()> {
        if self.restricted {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if self.polled.is_some() {
            return Ok(());
        }
        let mut builder = IoUring::builder();
        builder.setup_iopoll().setup_single_issuer().setup_submit_all();
        let ring = builder.build(self.entries)?;
        // Files registered before this are used by their descriptors here.
        let has_files =
            self.places.is_none() && ring.submitter().register_files_sparse(PLACES).is_ok();
        let has_pool =
            self.arena.as_ref().is_some_and(|arena| register_arena(&ring, *arena).is_ok());
        self.polled = Some(Polled { ring, flying: 0, has_files, has_pool });
        Ok(())
    }

    pub(crate) fn register_pool(&mut self, pool: &Pool, bytes: usize) {
        let whole = pool.arena();
        let arena = Segment::new(whole.as_ptr(), whole.len().min(bytes));
        if register_arena(&self.ring, arena).is_ok() {
            self.arena = Some(arena);
        }
    }

    /// Whether a slot's memory is a part of the registered pool.
    fn is_registered(&self, slot: &Slot) -> bool {
        let (Some(arena), [one]) = (&self.arena, slot.segments.as_slice()) else { return false };
        let has_pool = match &self.polled {
            Some(polled) if slot.request.is_polled() => polled.has_pool,
            _ => true,
        };
        let start = one.as_ptr().addr().wrapping_sub(arena.as_ptr().addr());
        has_pool && start < arena.len() && one.len() <= arena.len() - start
    }

    pub(crate) fn register(&mut self, file: SharedFd) -> Fd {
        match self.try_register(&file) {
            Some(registered) => Fd::registered_as(file.0, registered),
            None => Fd::from(file),
        }
    }

    fn try_register(&mut self, file: &SharedFd) -> Option<Registered> {
        let Source::Os(fd) = &file.0 else { return None };
        let ring = &self.ring;
        let places = self.places.get_or_insert_with(|| {
            let made = ring.submitter().register_files_sparse(PLACES);
            made.map(|()| Places::new()).map_err(drop)
        });
        let registered = places.as_ref().ok()?.take()?;
        // On failure the place is emptied like any other that is left, and is free again.
        self.set_file(registered.index(), fd.as_raw_fd()).then_some(registered)
    }

    /// Puts a descriptor in a place of all tables; -1 empties it.
    fn set_file(&self, index: u32, fd: RawFd) -> bool {
        let set = |ring: &IoUring| ring.submitter().register_files_update(index, &[fd]).is_ok();
        let polled = self.polled.as_ref().filter(|polled| polled.has_files);
        set(&self.ring) && polled.is_none_or(|polled| set(&polled.ring))
    }

    /// Lets go of registered files that nobody uses any more.
    fn empty_places(&mut self) {
        let Some(Ok(places)) = &self.places else { return };
        while let Some(index) = places.next_left() {
            self.set_file(index, -1);
            places.put(index);
        }
    }

    /// What a submission names the slot's file by.
    fn target(&self, slot: &Slot) -> Result<Target, PushError> {
        let polled = self.polled.as_ref().filter(|_| slot.request.is_polled());
        let has_table = polled.is_none_or(|polled| polled.has_files);
        if let Some(Ok(places)) = &self.places
            && let Some(registered) = slot.fd.as_ref().and_then(|fd| fd.registered())
            && has_table
            && registered.is_of(places)
        {
            return Ok(Target::Fixed(types::Fixed(registered.index())));
        }
        os_fd(slot).map(|fd| Target::Fd(types::Fd(fd)))
    }

    pub(crate) fn must_stay(&self) -> bool {
        let has_left = matches!(&self.places, Some(Ok(places)) if places.has_left());
        has_left || self.polled.as_ref().is_some_and(|polled| polled.flying > 0)
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
            _ => entry_of(self.target(slot)?, slot, value, self.is_registered(slot))?,
        };
        let entry = entry.user_data(user_data);
        if slot.request.is_polled() {
            return self.submit_polled(&entry);
        }
        self.submit(&[entry])?;
        let is_transfer = matches!(slot.request, Request::Read { .. } | Request::Write { .. });
        self.transfers += u32::from(is_transfer);
        self.lazy += u32::from(matches!(slot.request, Request::Watch));
        Ok(())
    }

    pub(crate) fn cancel(&mut self, user_data: u64) -> Result<(), PushError> {
        self.submit(&[opcode::AsyncCancel::new(user_data).build().user_data(IGNORE)])
    }

    /// Puts linked entries into the queue, together or not at all.
    fn submit(&mut self, entries: &[squeue::Entry]) -> Result<(), PushError> {
        if !self.try_submit(entries) {
            // The queue is full: an extra enter in this turn makes room.
            self.enter_now();
            if !self.try_submit(entries) {
                return Err(PushError::NoRoom);
            }
        }
        self.has_links |= entries.len() > 1;
        Ok(())
    }

    fn submit_polled(&mut self, entry: &squeue::Entry) -> Result<(), PushError> {
        let Some(polled) = &mut self.polled else { return Err(PushError::Unfit) };
        // SAFETY: as in `try_submit`: the slot owns what the entry names until its completion is
        // reaped.
        let pushed = unsafe { polled.ring.submission().push(entry) }.is_ok();
        if pushed {
            polled.flying += 1;
            return Ok(());
        }
        // The next enter makes room.
        Err(PushError::NoRoom)
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
        let waiting = queue.len() as u32; // no more than the ring has entries, a u32
        let wanted = waiting > self.lazy || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        self.put_off += u32::from(waiting > 0);
        if wanted || self.put_off >= PUT_OFF_MAX {
            self.enter_now();
        }
        if let Some(polled) = &mut self.polled {
            polled.enter();
        }
        self.empty_places();
    }

    fn enter_now(&mut self) {
        let transfers = std::mem::take(&mut self.transfers);
        if !std::mem::take(&mut self.has_links) {
            for group in groups(transfers) {
                // SAFETY: the count is less than that of the queue, and there is no argument.
                let result =
                    unsafe { self.ring.submitter().enter::<libc::sigset_t>(group, 0, 0, None) };
                check_enter(result);
            }
        }
        let pending = self.ring.submission().len() as u32;
        // GETEVENTS runs deferred task work and fetches completions that overflowed.
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: the count is that of the queue, and there is no argument.
        let result =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(pending, 0, flags, None) };
        check_enter(result);
        (self.lazy, self.put_off) = (0, 0);
    }

    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) {
        let timespec = timespec(timeout.unwrap_or(Duration::ZERO));
        let args = match timeout {
            Some(_) => SubmitArgs::new().timespec(&timespec),
            None => SubmitArgs::new(),
        };
        check_enter(self.ring.submitter().submit_with_args(1, &args));
        (self.transfers, self.has_links) = (0, false);
        (self.lazy, self.put_off) = (0, 0);
    }

    fn arm_wake(&mut self) {
        let Some(eventfd) = self.mailbox.eventfd().map(OwnedFd::as_raw_fd) else { return };
        let value = self.wake_value.as_ptr().cast();
        let read = opcode::Read::new(types::Fd(eventfd), value, 8).build().user_data(WAKE);
        self.wake_armed = self.submit(&[read]).is_ok();
        self.lazy += u32::from(self.wake_armed);
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
        if let Some(polled) = &mut self.polled {
            polled.reap(into);
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

impl Polled {
    /// Submits, and asks the devices what they have finished.
    fn enter(&mut self) {
        if self.flying == 0 {
            return;
        }
        let pending = self.ring.submission().len() as u32;
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: the count is that of the queue, and there is no argument.
        let result =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(pending, 0, flags, None) };
        check_enter(result);
    }

    fn reap(&mut self, into: &mut Vec<Cqe>) {
        for cqe in self.ring.completion() {
            self.flying -= 1;
            into.push(Cqe { user_data: cqe.user_data(), res: cqe.result(), flags: cqe.flags() });
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel takes rings apart some time after they are closed; files that are still
        // registered would be open, and locked, until then.
        if let Some(Ok(_)) = &self.places {
            let _ = self.ring.submitter().unregister_files();
        }
        if let Some(polled) = self.polled.as_ref().filter(|polled| polled.has_files) {
            let _ = polled.ring.submitter().unregister_files();
        }
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

/// What names a file: its descriptor, or its place in the table.
#[derive(Clone, Copy)]
enum Target {
    Fd(types::Fd),
    Fixed(types::Fixed),
}

/// Builds an entry for either kind of target.
macro_rules! on {
    ($target:expr, |$fd:ident| $build:expr) => {
        match $target {
            Target::Fd($fd) => $build,
            Target::Fixed($fd) => $build,
        }
    };
}

/// `is_registered`: the slot's one segment lies in the registered pool.
fn entry_of(
    target: Target,
    slot: &Slot,
    value: *mut u64,
    is_registered: bool,
) -> Result<squeue::Entry, PushError> {
    // A segment is laid out as an iovec (asserted in `iobuf`).
    let iovecs = slot.segments.as_ptr().cast::<libc::iovec>();
    let count = slot.segments.len() as u32;
    Ok(match &slot.request {
        Request::Read { offset, .. } => match slot.segments.as_slice() {
            [one] if let Ok(len) = u32::try_from(one.len()) => {
                let at = one.as_ptr();
                if is_registered {
                    return Ok(on!(target, |fd| {
                        opcode::ReadFixed::new(fd, at, len, POOL).offset(*offset).build()
                    }));
                }
                on!(target, |fd| opcode::Read::new(fd, at, len).offset(*offset).build())
            }
            _ => on!(target, |fd| opcode::Readv::new(fd, iovecs, count).offset(*offset).build()),
        },
        Request::Write { offset, dsync, .. } => {
            let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
            match slot.segments.as_slice() {
                [one] if is_registered && let Ok(len) = u32::try_from(one.len()) => {
                    on!(target, |fd| {
                        let write = opcode::WriteFixed::new(fd, one.as_ptr(), len, POOL);
                        write.offset(*offset).rw_flags(flags).build()
                    })
                }
                [one] if let Ok(len) = u32::try_from(one.len()) => on!(target, |fd| {
                    let write = opcode::Write::new(fd, one.as_ptr(), len);
                    write.offset(*offset).rw_flags(flags).build()
                }),
                _ => on!(target, |fd| {
                    let write = opcode::Writev::new(fd, iovecs, count);
                    write.offset(*offset).rw_flags(flags).build()
                }),
            }
        }
        Request::Fsync { data_only } => {
            let flags = if *data_only { FsyncFlags::DATASYNC } else { FsyncFlags::empty() };
            on!(target, |fd| opcode::Fsync::new(fd).flags(flags).build())
        }
        Request::Fallocate { mode, offset, len } => {
            on!(target, |fd| opcode::Fallocate::new(fd, *len).offset(*offset).mode(*mode).build())
        }
        Request::Watch => on!(target, |fd| opcode::Read::new(fd, value.cast(), 8).build()),
        Request::Recv { spare: Some(spare), .. } => {
            on!(target, |fd| opcode::Recv::new(fd, spare.as_ptr(), SPARE_BYTES as u32).build())
        }
        Request::Recv { spare: None, .. } => {
            on!(target, |fd| opcode::RecvMulti::new(fd, GROUP).build())
        }
        Request::Send(tx) => {
            let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
            on!(target, |fd| opcode::SendMsg::new(fd, tx.message()).flags(flags).build())
        }
        Request::None | Request::Connect(_) => return Err(PushError::Unfit),
    })
}

/// What of so many reads and writes is submitted before the rest: groups that double, from one on.
///
/// The kernel tells a device of what is submitted together when it has prepared all of it. One by one
/// they cost an enter each; all together the device waits for the last, and then we for the device.
fn groups(count: u32) -> impl Iterator<Item = u32> {
    let doubled = |group: &u32| group.checked_mul(2);
    // Those up to one of `group` are `2 * group - 1`; at least one more is left for the end.
    std::iter::successors(Some(1_u32), doubled).take_while(move |group| *group <= count / 2)
}

/// Registers the pool's memory as buffer [`POOL`].
fn register_arena(ring: &IoUring, arena: Segment) -> io::Result<()> {
    let whole = libc::iovec { iov_base: arena.as_ptr().cast(), iov_len: arena.len() };
    // SAFETY: the range is one mapping, and the kernel keeps its pages for itself: what it does
    // with them later goes through slots, which hold the memory.
    unsafe { ring.submitter().register_buffers(&[whole]) }
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
    for (code, feature) in OPERATIONS {
        if !probe.is_supported(code) {
            return Err(SetupError::TooOld { feature });
        }
    }
    Ok(())
}

/// Starts a ring that was made disabled, for [`OPERATIONS`] only.
fn restrict(ring: &IoUring) -> io::Result<()> {
    use io_uring::register::Restriction;
    // `io_uring_register` operations, which the crate keeps to itself (linux/io_uring.h).
    const REGISTER_BUFFERS: u8 = 0;
    const UNREGISTER_FILES: u8 = 3;
    const REGISTER_FILES_UPDATE: u8 = 6;
    const REGISTER_FILES2: u8 = 13;
    const UNREGISTER_PBUF_RING: u8 = 23;
    let flags = Flags::FIXED_FILE | Flags::IO_LINK | Flags::BUFFER_SELECT;
    let fixed = [opcode::ReadFixed::CODE, opcode::WriteFixed::CODE];
    let mut allowed: Vec<Restriction> =
        OPERATIONS.iter().map(|(code, _)| *code).chain(fixed).map(Restriction::sqe_op).collect();
    let register = [
        REGISTER_BUFFERS,
        UNREGISTER_FILES,
        REGISTER_FILES_UPDATE,
        REGISTER_FILES2,
        UNREGISTER_PBUF_RING,
    ];
    allowed.extend(register.map(Restriction::register_op));
    allowed.push(Restriction::sqe_flags_allowed(flags.bits()));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What the operation is answered with.
    fn result(ring: &mut IoUring, entry: squeue::Entry) -> i32 {
        // SAFETY: the entries of these tests name static strings or nothing.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn transfers_are_submitted_in_groups_that_double() {
        for (count, before) in [
            (0, &[][..]),
            (1, &[]),
            (2, &[1]),
            (3, &[1]),
            (4, &[1, 2]),
            (8, &[1, 2, 4]),
            (15, &[1, 2, 4]),
            (16, &[1, 2, 4, 8]),
        ] {
            assert_eq!(groups(count).collect::<Vec<_>>(), before, "{count}");
        }
    }

    #[test]
    fn a_restricted_ring_opens_no_file_and_makes_no_socket() {
        let mut ring = IoUring::builder().setup_r_disabled().build(8).unwrap();
        restrict(&ring).unwrap();
        let here = types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(here, c"/dev/null".as_ptr()).flags(libc::O_RDONLY).build();
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        for refused in [open, socket, opcode::Nop::new().build()] {
            assert_eq!(result(&mut ring, refused), -libc::EACCES);
        }
        let cancel = opcode::AsyncCancel::new(7).build();
        assert_eq!(result(&mut ring, cancel), -libc::ENOENT);
        assert!(ring.submitter().unregister_eventfd().is_err(), "no other registration");
    }
}
