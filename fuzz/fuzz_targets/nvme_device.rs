//! A guest has a whole NVMe function in its hands, with its cores: registers, configuration space,
//! batches of admin commands, memory that comes and goes, resets at any time.
//!
//! Invariants checked: no panic, on no core; what is under way is bounded; the cores have the queues
//! that the guest was told of, and each once; after an orderly reset it can be used.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use nvme_pci::testing::{Cores, wild};

static CORES: OnceLock<Cores> = OnceLock::new();

fuzz_target!(|data: &[u8]| wild(&CORES.get_or_init(|| Cores::start(2)).handles, data));
