//! No heap allocation per I/O: after warm-up a core serves without the allocator.

use std::sync::Arc;
use std::time::Duration;

use block::null::NullVolume;
use block::ram::RamVolume;
use block::{Identity, Volume};
use it::link::{Protection, associate};
use it::load::{self, Workload};
use it::rig::{Rig, SUBNQN};
use nvmf_target::Limits;

use crate::counting;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:a110ca7e-0000-4000-8000-000000000001";
const SPAN_BYTES: u64 = 16 << 20;

fn allocations_while_serving(volume: Arc<dyn Volume>, works: &[Workload]) -> u64 {
    let rig = Rig::start(vec![volume], 1, Limits::default()).expect("a target");
    rig.on_cores(counting::count_this_thread).expect("room in the mailbox");
    let mut association =
        associate(rig.addr, (SUBNQN, HOST), 128, 1, &Protection::None).expect("a connection");
    for work in works {
        load::run(&mut association.io, work, Duration::from_millis(300)).expect("warm-up");
    }
    let before = counting::counted();
    assert!(before > 0, "the core's allocations are not counted: connecting needs some");
    let mut commands = 0.0;
    for work in works {
        let figures = load::run(&mut association.io, work, Duration::from_millis(300));
        commands += figures.expect("I/O").iops * 0.3;
    }
    assert!(commands > 1000.0, "only {commands} commands: nothing was measured");
    counting::counted() - before
}

fn works() -> Vec<Workload> {
    [
        (false, 4096, 1),
        (false, 4096, 128),
        (true, 4096, 128),
        (false, 131_072, 32),
        (true, 131_072, 32),
    ]
    .map(|(write, block_bytes, depth)| Workload {
        write,
        block_bytes,
        depth,
        in_capsule: block_bytes <= 8192,
        span_bytes: SPAN_BYTES,
        lba_bytes: 512,
        namespaces: 1,
        interval: Duration::ZERO,
    })
    .to_vec()
}

#[test]
fn target_allocates_nothing_per_io_on_a_null_volume() {
    let volume = NullVolume::new(Identity::from_uuid([7; 16]), SPAN_BYTES, 512);
    assert_eq!(allocations_while_serving(Arc::new(volume), &works()), 0);
}

#[test]
fn target_allocates_nothing_per_io_on_a_ram_volume() {
    let volume = RamVolume::new(Identity::from_uuid([7; 16]), SPAN_BYTES, 512).expect("memory");
    assert_eq!(allocations_while_serving(Arc::new(volume), &works()), 0);
}
