//! What works: bring-up, every operation, every way that data travels.

use std::time::Duration;

use block::{Io, IoError, Op, Volume};
use nvme::subsys::Limits;
use nvmf_initiator::{Phase, RemoteConfig};

use crate::fake::{self, Script, UUID};
use crate::rig::{Rig, Setup, bytes_of, pattern};

const MIB: usize = 1 << 20;

#[test]
fn bring_up_publishes_what_the_controller_says() {
    let mut rig = Setup::default().start();
    assert_eq!(rig.state().phase, Phase::Connecting);
    assert_eq!(rig.volume.geometry().blocks, 0);
    rig.until_live();
    let state = rig.volume.wait_ready(Duration::ZERO).unwrap();
    assert_eq!(
        (state.generation, state.paths[0].queues, state.losses, state.attempts),
        (1, 1, 0, 1)
    );
    assert_eq!(state.paths[0].in_capsule_bytes, 4096);
    assert_eq!(state.paths[0].transfer_bytes_max, 1 << 20);
    assert_eq!(
        state.paths[0].queue_entries, 128,
        "the controller has fewer than the 129 asked for"
    );
    assert_eq!(state.last_error, None);
    let geometry = rig.volume.geometry();
    assert_eq!((geometry.block_bytes, geometry.blocks), (512, 16 << 10));
    assert!(geometry.write_cache && geometry.write_zeroes && geometry.deallocate);
    assert!(!geometry.read_only && geometry.deallocated_reads_zero);
    assert_eq!(rig.volume.identity().uuid, UUID);
    assert_eq!(&rig.volume.identity().serial, b"0001                ");
    rig.finish();
}

/// Writes and reads of all sizes, checked on both sides. The channel is closed afterwards.
fn all_sizes(setup: Setup) -> Rig {
    let mut rig = setup.start();
    let disk = rig.disk(1, 16);
    for (i, len) in [512, 4096, 4608, 8192, 65_536, 131_072, 262_144, MIB, 3 * MIB + 512]
        .into_iter()
        .enumerate()
    {
        let data = pattern(len as u64, len);
        let offset = (i * 8192) as u64;
        disk.write(1, offset, &data);
        rig.wait_ok(&disk, 1);
        assert!(rig.fake.disk.borrow()[offset as usize..][..len] == data, "write of {len}");
        disk.read(2, offset, len);
        let done = rig.wait_ok(&disk, 1);
        assert!(bytes_of(&done[0]) == data, "read of {len}");
    }
    // Many at once, so that PDUs share sends and answers overtake each other.
    for tag in 0..16 {
        disk.write(tag, tag * 65_536, &pattern(tag, 16_384));
    }
    rig.wait_ok(&disk, 16);
    for tag in 0..16 {
        disk.read(tag, tag * 65_536, 16_384);
    }
    for (tag, io) in rig.wait_ok(&disk, 16).into_iter().enumerate() {
        assert!(bytes_of(&io) == pattern(tag as u64, 16_384), "read {tag}");
    }
    disk.close();
    rig.run_for(Duration::from_millis(1));
    rig
}

#[test]
fn all_sizes_with_each_combination_of_digests() {
    for (header_digest, data_digest) in [(false, false), (true, false), (false, true), (true, true)]
    {
        let config = move |config| RemoteConfig { header_digest, data_digest, ..config };
        let rig = all_sizes(Setup { config: Box::new(config), ..Setup::default() });
        let seen = rig.fake.seen.get();
        assert!(seen.in_capsule > 0 && seen.r2ts > 0, "{seen:?}");
        assert_eq!(rig.state().losses, 0);
        rig.finish();
    }
}

#[test]
fn data_travels_in_small_pieces() {
    for uses_success in [true, false] {
        let script = Script {
            r2t_bytes: 12_288,
            max_h2c_data: 4096,
            c2h_bytes: 1000,
            uses_success,
            delay_max: Duration::from_millis(2),
            ..Script::default()
        };
        let rig = all_sizes(Setup { script, ..Setup::default() });
        let seen = rig.fake.seen.get();
        assert!(seen.r2ts > (3 * MIB / 12_288) as u64, "{seen:?}");
        rig.finish();
    }
}

#[test]
fn nothing_in_capsules() {
    let limits = Limits { in_capsule_bytes: 0, ..Limits::default() };
    let mut rig = all_sizes(Setup { limits, ..Setup::default() });
    assert_eq!(rig.fake.seen.get().in_capsule, 0);
    // The range of a Deallocate has no memory of its own and is asked for as well.
    let disk = rig.disk(1, 4);
    disk.write(0, 0, &[1; 8192]);
    rig.wait_ok(&disk, 1);
    disk.op(1, Op::Deallocate, 4096, 4096);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow()[..4096] == [1; 4096]);
    assert!(rig.fake.disk.borrow()[4096..8192] == [0; 4096]);
    rig.finish();
}

#[test]
fn requests_larger_than_mdts_are_split() {
    let limits = Limits { mdts_bytes: 8192, ..Limits::default() };
    let config = |config| RemoteConfig { queue_depth: 7, ..config };
    let rig = all_sizes(Setup { limits, config: Box::new(config), ..Setup::default() });
    let seen = rig.fake.seen.get();
    assert_eq!(seen.longest_bytes, 8192);
    assert!(seen.writes > (3 * MIB / 8192) as u64);
    assert_eq!(seen.deepest, 7);
    assert_eq!(rig.state().paths[0].queue_entries, 8, "one entry of the queue stays empty");
    rig.finish();
}

#[test]
fn flush_zeroes_and_deallocate() {
    let mut rig = Setup { blocks: 160 << 10, ..Setup::default() }.start();
    let disk = rig.disk(1, 4);
    let size = rig.fake.disk.borrow().len();
    rig.fake.disk.borrow_mut().fill(7);
    disk.op(0, Op::WriteZeroes, 512, 1024);
    disk.op(1, Op::Deallocate, 4096, 4096);
    disk.op(2, Op::Flush, 0, 0);
    rig.wait_ok(&disk, 3);
    {
        let bytes = rig.fake.disk.borrow();
        let zeros: Vec<usize> = (0..size).filter(|i| bytes[*i] == 0).collect();
        assert_eq!(zeros, (512..1536).chain(4096..8192).collect::<Vec<_>>());
    }
    // More blocks than one command can name: 80 MiB are three of 32 MiB at most.
    let before = rig.fake.seen.get();
    assert_eq!((before.write_zeroes, before.deallocates, before.flushes), (1, 1, 1));
    disk.op(0, Op::WriteZeroes, 0, size as u64);
    rig.wait_ok(&disk, 1);
    assert_eq!(rig.fake.seen.get().write_zeroes, 1 + 3);
    assert!(rig.fake.disk.borrow().iter().all(|byte| *byte == 0));
    rig.fake.disk.borrow_mut().fill(7);
    disk.op(0, Op::Deallocate, 0, size as u64);
    rig.wait_ok(&disk, 1);
    assert!(rig.fake.disk.borrow().iter().all(|byte| *byte == 0));
    // FUA travels.
    let mut io = Io { fua: true, ..Io::new(Op::Write, 0, 512) };
    rig.cores[1].local().pool().alloc(512, &mut io.data).unwrap();
    disk.submit(Box::new(io));
    rig.wait_ok(&disk, 1);
    assert_eq!(rig.fake.seen.get().fua, 1);
    rig.finish();
}

#[test]
fn refusals_come_back_through_poll_without_a_command() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 8);
    let size = 8 << 20;
    // Held until the geometry is known, then refused.
    disk.read(0, size, 512);
    disk.read(1, size - 512, 1024);
    disk.write(2, 100, &[0; 512]);
    disk.submit(Box::new(Io { tag: 3, ..Io::new(Op::Write, 0, 512) }));
    disk.read(4, 0, 0);
    disk.op(5, Op::WriteZeroes, 0, 0);
    let results: Vec<_> = rig.wait(&disk, 6).iter().map(|io| io.result).collect();
    let (range, misaligned) = (Err(IoError::OutOfRange), Err(IoError::Misaligned));
    assert_eq!(results, [range, range, misaligned, misaligned, Ok(()), Ok(())]);
    let seen = rig.fake.seen.get();
    assert_eq!((seen.reads, seen.writes, seen.write_zeroes), (0, 0, 0));
    assert_eq!(rig.volume.counters().errors, 4);
    rig.finish();
}

#[test]
fn more_than_the_depth_is_busy_and_comes_later() {
    let script = Script { delay_max: Duration::from_millis(1), ..Script::default() };
    let mut rig = Setup { script, ..Setup::default() }.start();
    let disk = rig.disk(1, 4);
    for tag in 0..40 {
        disk.write(tag, tag * 512, &pattern(tag, 512));
    }
    rig.wait_ok(&disk, 40);
    assert!(disk.busy() > 0);
    assert!(rig.fake.seen.get().deepest <= 4);
    for tag in 0..40 {
        assert!(rig.fake.disk.borrow()[tag as usize * 512..][..512] == pattern(tag, 512));
    }
    let counters = rig.volume.counters();
    assert_eq!((counters.commands, counters.write_bytes), (40, 40 * 512));
    assert_eq!((counters.errors, counters.retries, counters.resends), (0, 0, 0));
    rig.finish();
}

#[test]
fn each_core_has_its_own_queue() {
    let config = |config| RemoteConfig { queues: 3, ..config };
    let mut rig = Setup { hosts: 3, config: Box::new(config), ..Setup::default() }.start();
    let disks: Vec<_> = (1..=3).map(|core| rig.disk(core, 8)).collect();
    for (i, disk) in disks.iter().enumerate() {
        for tag in 0..8 {
            let at = i as u64 * 8 + tag;
            disk.write(tag, at * 4096, &pattern(at, 4096));
        }
    }
    for disk in &disks {
        rig.wait_ok(disk, 8);
    }
    assert_eq!(rig.fake.seen.get().io_connects, 3);
    assert_eq!(rig.state().paths[0].queues, 3);
    for at in 0..24 {
        assert!(rig.fake.disk.borrow()[at as usize * 4096..][..4096] == pattern(at, 4096));
    }
    let error = rig.volume.open(&rig.cores[1].local(), 1).err().unwrap();
    assert!(error.to_string().contains("all 3 I/O queues"), "{error}");
    rig.finish();
}

#[test]
fn a_closed_channel_leaves_its_queue_to_the_next() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 4);
    disk.write(0, 0, &[1; 512]);
    rig.wait_ok(&disk, 1);
    disk.close();
    rig.run_for(Duration::from_millis(1));
    let disk = rig.disk(1, 4);
    disk.read(0, 0, 512);
    let done = rig.wait_ok(&disk, 1);
    assert_eq!(bytes_of(&done[0]), [1; 512]);
    // What the first one did still counts.
    let counters = rig.volume.counters();
    assert_eq!((counters.write_bytes, counters.read_bytes), (512, 512));
    rig.finish();
}

#[test]
fn a_namespace_that_grows_is_noticed() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 4);
    rig.until_live();
    let old_size = 8 << 20;
    disk.read(0, old_size, 512);
    rig.wait_errors(&disk, 1, IoError::OutOfRange);
    let larger = rig.fake.subsys.borrow().with_namespaces(vec![fake::namespace(32 << 10)]);
    rig.fake.disk.borrow_mut().resize(16 << 20, 5);
    *rig.fake.subsys.borrow_mut() = std::sync::Arc::new(larger.unwrap());
    rig.cores[crate::rig::TARGET].handle().wake();
    rig.until("the new size", |volume| volume.geometry().blocks == 32 << 10);
    disk.read(0, old_size, 512);
    let done = rig.wait_ok(&disk, 1);
    assert_eq!(bytes_of(&done[0]), [5; 512]);
    assert_eq!(rig.state().losses, 0);
    rig.finish();
}

#[test]
fn an_idle_association_stays_alive() {
    let mut rig = Setup::default().start();
    let disk = rig.disk(1, 4);
    rig.until_live();
    rig.run_for(Duration::from_secs(60));
    disk.read(0, 0, 512);
    rig.wait_ok(&disk, 1);
    let seen = rig.fake.seen.get();
    assert_eq!((seen.associations, rig.state().losses), (1, 0));
    assert!(seen.keep_alives >= 20, "{seen:?}");
    rig.finish();
}
