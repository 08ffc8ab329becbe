//! The composition root: configuration in, running cores out.
//!
//! Start reading at [`Config`], then [`bench`].

#![forbid(unsafe_code)]

pub mod bench;
pub mod config;
pub mod cores;
pub mod discover;
pub mod identity;
pub mod size;
pub mod state;

pub use config::{Config, ConfigError, Draft};
