//! Guest memory: what a virtual machine or another process lends us.

mod memory;
mod region;
mod slice;
mod view;

pub use memory::{BadMemory, GuestMemory};
pub use region::GuestRegion;
pub use slice::GuestSlice;
pub use view::{BadAddress, GuestView};

#[cfg(test)]
mod tests;
