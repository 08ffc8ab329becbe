//! An NVMe controller as a PCI function, served over vfio-user.
//!
//! ```text
//!  client (QEMU)                           control thread
//!  ──────────── Unix socket ───────► vfio_user::{wire, session, server}
//!               guest memory                     │ function::Function
//!               eventfd per vector               ▼
//!                                     the PCI function: pci, device
//! ```
//!
//! [`function::Function`] is the seam: a transport (vfio-user, in software) on one side, a PCI
//! function on the other. Neither knows the other.
//!
//! Start reading at [`function`].

#![forbid(unsafe_code)]

pub mod dirty;
pub mod function;
pub mod pci;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vfio_user;
