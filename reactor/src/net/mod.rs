//! Connected byte streams: the seam between a protocol machine and its socket.

mod layer;
mod stream;

pub use self::layer::{Gather, Layer, LayerError, Plain};
pub use self::stream::{HEAD_BYTES_MAX, Rx, RxChunk, Stream, StreamConfig};
