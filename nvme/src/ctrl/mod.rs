//! The controller: I/O command decoding.

pub mod io;
