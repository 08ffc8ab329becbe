//! Memory lent to I/O.
//!
//! Every I/O in Penstock names its memory by an [`SgList`]: a list of [`Segment`]s (each has the
//! layout of `struct iovec`) and one [`Hold`] that keeps the memory behind them mapped. The memory
//! comes from one of two places:
//!
//! ```text
//!   Pool::alloc ───────► SgList ──► device, channel, ring ──► clear, drop: back to the pool
//!   GuestView::append ─► SgList ──► device, channel, ring ──► clear, drop: nothing to return
//!        ▲
//!   GuestMemory (shared by all cores) ──view()──► Rc<GuestView> (one core)
//! ```
//!
//! # Rules
//!
//! - A list owns what [`Pool::alloc`] put into it. Parts may be *shared* with another list
//!   ([`SgList::append_range`]) or with an operation in the kernel ([`Hold::retain`]); a chunk
//!   returns to the pool when the last user lets go.
//! - Nobody zeroes pool memory. Whoever exposes bytes to a peer must have overwritten them.
//! - Bytes that a guest or the kernel can change at any time are never a `&[u8]`: they are copied,
//!   or accessed by volatile and atomic operations. Pool memory at rest may be looked at in place
//!   ([`SgList::for_each_piece`]).
//! - No function panics because of an address, offset or length that a guest chose.
//!
//! # What this crate does not do
//!
//! No I/O, no thread, no clock. It knows nothing of NVMe or virtio.
//!
//! Start reading at [`SgList`], then [`Pool`], then [`GuestMemory`].

mod gather;
mod guest;
mod mapping;
mod pool;
mod raw;
mod sg;
mod shared;
mod sigbus;

pub use gather::Gather;
pub use guest::{BadAddress, BadMemory, GuestMemory, GuestRegion, GuestSlice, GuestView};
pub use pool::{Exhausted, Pool};
pub use sg::{Hold, OutOfBounds, Range, Segment, SgList};
pub use shared::SharedBytes;
