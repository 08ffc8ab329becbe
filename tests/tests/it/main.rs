//! The one integration test binary.

mod yardstick;
