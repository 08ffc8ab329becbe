//! The target against a host that is written out here, in a simulated world.

mod auth;
mod commands;
mod fence;
mod fused;
mod health;
mod host;
mod limits;
mod manage;
mod reservations;
mod rig;
mod sample;
mod silence;
mod tamper;
mod tls;
