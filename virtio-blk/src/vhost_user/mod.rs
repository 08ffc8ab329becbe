//! vhost-user
pub mod session;
pub mod wire;
