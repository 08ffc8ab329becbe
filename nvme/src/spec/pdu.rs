//! NVMe/TCP PDU headers.
