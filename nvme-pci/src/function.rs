//! The seam between a PCI function and the transport that connects it to a machine.
//!
//! The transport (`vfio_user`) owns the client: its socket, its session, its file descriptors. The
//! function owns what the guest sees: configuration space, registers, queues, interrupts. One
//! control thread owns both and calls the function; whatever runs on other cores is the function's
//! own business.
//!
//! # Contract
//!
//! - No call blocks. A call that needs other cores to let go of something first answers
//!   [`Step::Pending`]; the transport then makes no further call that can be pending before
//!   [`Function::poll`] has said [`Event::Done`]. There is at most one pending call at a time.
//!   The exception is [`Function::detach`], which may come at any time and replaces what is
//!   pending: its `Done` is the only one that still comes.
//! - The transport calls [`Function::poll`] each time the waker that the function was built with
//!   has fired, until it answers `None`.
//! - The transport checks that an access lies within the region before it makes it, and that a
//!   vector exists before it names it. Everything else about an access is the guest's doing, and
//!   the function's to judge: a guest cannot be told of an error, so an access that the device does
//!   not define reads as zeros (or ones) and writes nothing.
//! - A pending call is bounded in time: what does not come back by itself is aborted.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use iobuf::GuestMemory;

use crate::dirty::DirtyLog;

/// A region of a PCI device, as VFIO numbers them (`linux/vfio.h`, `VFIO_PCI_*_REGION_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region(pub u32);

impl Region {
    /// Base address register 0: the controller's registers and doorbells.
    pub const BAR0: Region = Region(0);
    /// Base address register 4: the MSI-X table and pending bits.
    pub const BAR4: Region = Region(4);
    /// The expansion ROM.
    pub const ROM: Region = Region(6);
    /// Configuration space.
    pub const CONFIG: Region = Region(7);
    /// Number of regions: six base address registers, ROM, configuration space and VGA.
    pub const COUNT: u32 = 9;
}

/// What a region is to the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes in the region; 0: there is no such region.
    pub size_bytes: u64,
    /// The client may read it.
    pub is_readable: bool,
    /// The client may write it.
    pub is_writable: bool,
    /// Page-aligned parts that the client may map from [`Function::region_fd`] instead of asking
    /// for accesses. The offset in the region is also the offset in that file.
    pub mappable: Vec<Area>,
}

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// First byte in the region.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u64,
}

/// A kind of interrupt, as VFIO numbers them (`linux/vfio.h`, `VFIO_PCI_*_IRQ_INDEX`). The two
/// kinds that are notices to the client itself, ERR and REQ, belong to the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irq {
    /// The INTx line.
    Intx,
    /// The vectors of the MSI-X table.
    Msix,
}

/// Whether a call has done all of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// It has.
    Done,
    /// [`Event::Done`] follows.
    Pending,
}

/// What a function has to say for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The pending call has done its work.
    Done,
    /// The function cannot go on for a reason of its own, and needs a reset. The client is told
    /// by its ERR interrupt.
    Failed,
}

/// Which reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// A conventional reset of the whole function, configuration space included, asked for by the
    /// client (DEVICE_RESET). A function-level reset is a write to configuration space, and so the
    /// function's own matter.
    Conventional,
}

/// A saved state that does not fit this function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadState {
    /// Not a state of this kind of device, or of a version that is not known.
    #[error("the state is not one of this device, or of a version that is not known")]
    Unknown,
    /// Cut short, too long, or damaged.
    #[error("the state is damaged")]
    Damaged,
    /// Of a device with other namespaces, queues or identity.
    #[error("the state is that of a device with other properties")]
    Mismatch,
    /// The guest is using the device, which has to be reset before.
    #[error("the device is in use and has to be reset before")]
    InUse,
}

/// A PCI function, to the transport that connects it. See the [module](self) for the contract.
pub trait Function: Send {
    /// What the region is. Constant for the life of the function.
    fn region(&self, region: Region) -> RegionInfo;

    /// The file that the mappable areas of a region are in.
    fn region_fd(&self, region: Region) -> Option<BorrowedFd<'_>>;

    /// Most vectors of this kind: 0 or 1 for INTx, the size of the table for MSI-X. Constant for
    /// the life of the function.
    fn vectors(&self, irq: Irq) -> u32;

    /// The guest, or the client itself, reads `data.len()` bytes at `offset`. Any length and
    /// alignment can come.
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]);

    /// The guest, or the client itself, writes. Any length and alignment can come. Pending if the
    /// write must not be confirmed before something has come to rest, such as a function-level
    /// reset.
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> Step;

    /// Reset to the state after power-on, keeping memory and eventfds of the client. Done when no
    /// I/O of before the reset can touch memory or volume any more.
    fn reset(&mut self, reset: Reset) -> Step;

    /// Use another memory table from now on. If `has_removed`, regions have gone: done when
    /// nothing holds them any more, so that the client may use the memory for something else.
    fn set_memory(&mut self, memory: &GuestMemory, has_removed: bool) -> Step;

    /// Signal `eventfd` when the vector is raised; None: nobody listens. It does not block.
    fn set_trigger(&mut self, irq: Irq, vector: u32, eventfd: Option<Arc<OwnedFd>>);

    /// Mask or unmask a vector on behalf of the client. A vector that was raised meanwhile is
    /// signalled when it is unmasked. INTx masks itself each time it is signalled (it is a level,
    /// an eventfd is not), and is signalled again at the unmask if it is still asserted.
    fn set_masked(&mut self, irq: Irq, vector: u32, is_masked: bool);

    /// Signal a vector now, without reason: the client tests its wiring.
    fn trigger(&mut self, irq: Irq, vector: u32);

    /// Log every write to guest memory from now on, or no more. Done when every core does so.
    fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>) -> Step;

    /// Stop or start the device as a whole, as a pause of the machine does. Stopped is done when
    /// it touches neither memory nor eventfds any more and has nothing in flight; queues,
    /// registers and configuration space stay as they are, and doorbells rung meanwhile are seen
    /// after the start.
    fn set_running(&mut self, is_running: bool) -> Step;

    /// The state of the stopped device, for [`Function::restore`] in another process or machine.
    fn save(&mut self) -> Vec<u8>;

    /// Take up a saved state. The device is stopped, and its memory and eventfds may be set before
    /// or after. On an error the state is as after a reset; one that is in use is left as it is.
    fn restore(&mut self, state: &[u8]) -> Result<(), BadState>;

    /// The client is gone, and with it memory and eventfds. Done when nothing touches them any
    /// more and the function is as after power-on, running, without dirty log.
    fn detach(&mut self) -> Step;

    /// What has happened since the last call.
    fn poll(&mut self) -> Option<Event>;
}
