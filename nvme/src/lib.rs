//! NVMe and NVMe over Fabrics protocol code, sans-IO.
#![forbid(unsafe_code)]

pub mod spec;
pub mod tcp;
