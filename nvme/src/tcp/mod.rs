//! NVMe/TCP qpair machines.
