//! iobuf
