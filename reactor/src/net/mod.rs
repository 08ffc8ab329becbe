//! Connected byte streams: the seam between a protocol machine and its socket.
//!
//! ```text
//!   push ─► entries: head and tail bytes in an arena, payload where it is
//!             │ flush / end of the last send            recv ◄─ chunks ◄─ poll ◄─ recorded CQEs
//!             ▼                                                   ▲
//!   (Layer::seal) ─► one sendmsg in flight ─► sent tokens   (Layer::open)
//!                                             recv_to ◄─────(Layer::open_to, into place)
//! ```

mod layer;
mod stream;
mod tx;

pub use self::layer::{Layer, LayerError, Placed, Plain};
pub use self::stream::{Rx, SendPending, Stream, StreamConfig};
pub use self::tx::HEAD_BYTES_MAX;
pub use crate::rx::RxChunk;
pub use iobuf::Gather;

pub(crate) use self::tx::Tx;
