//! The composition root: configuration in, running cores out.
//!
//! Start reading at [`Config`].

#![forbid(unsafe_code)]

pub mod config;
pub mod identity;
pub mod size;
pub mod state;

pub use config::{Config, ConfigError, Draft};
