//! Compare, Verify and Copy.

use std::sync::Arc;
use std::time::Duration;

use block::fault::{FaultPlan, FaultVolume};
use block::ram::RamVolume;
use block::{Identity, IoError, Op};
use nvme::spec::{Nqn, NvmOpcode, Status};
use nvmf_target::NamespaceConfig;

use crate::host::Data;
use crate::rig::{
    BLOCK, BLOCKS, Host, Rig, compare, hostnqn, pattern, ranged, status, structured, uuid,
};

/// A transfer that is longer than the pieces it is cut into, and not a multiple of them.
const LONG: usize = (400 << 10) + BLOCK;

fn start(seed: u64) -> (Rig, Host) {
    let mut rig = Rig::new(seed);
    let host = rig.host(1, 2);
    (rig, host)
}

fn media_error(only: Op) -> FaultPlan {
    FaultPlan {
        errors_per_million: 1_000_000,
        error: Some(IoError::Medium),
        only: Some(only),
        ..FaultPlan::default()
    }
}

#[test]
fn compare_tells_equal_from_different_in_any_byte() {
    let (mut rig, host) = start(1);
    let io = &host.io[0];
    let bytes = pattern(7, LONG);
    rig.write(io, 3, &bytes);
    let (sqe, data) = compare(3, &bytes);
    assert_eq!(status(&rig.command(io, sqe, data)), Ok(()));
    for at in [0, 131_071, 131_072, 300_001, LONG - 1] {
        let mut other = bytes.clone();
        other[at] ^= 0x10;
        let (sqe, data) = compare(3, &other);
        let done = rig.command(io, sqe, data);
        assert_eq!(status(&done), Err(Status::COMPARE_FAILURE.dnr()), "byte {at}");
    }
    // In the capsule, too.
    let (mut sqe, _) = compare(3, &bytes[..4096]);
    sqe.dptr = nvme::spec::SglDescriptor::in_capsule(0, 4096);
    let done = rig.command(io, sqe, Data::Capsule(bytes[..4096].to_vec()));
    assert_eq!(status(&done), Ok(()));
    assert_eq!(rig.read(io, 3, LONG), bytes, "nothing was written");
}

#[test]
fn compare_and_verify_of_what_cannot_be_read() {
    let (mut rig, host) = start(2);
    let io = &host.io[0];
    let bytes = pattern(1, LONG);
    rig.write(io, 0, &bytes);
    rig.faults.set(media_error(Op::Read));
    let (sqe, data) = compare(0, &bytes);
    let done = rig.command(io, sqe, data);
    assert_eq!(status(&done), Err(Status::UNRECOVERED_READ_ERROR.dnr()));
    let done = rig.command(io, ranged(NvmOpcode::VERIFY, 0, 8), Data::None);
    assert_eq!(status(&done), Err(Status::UNRECOVERED_READ_ERROR.dnr()));
    rig.faults.set(FaultPlan::default());
    let done = rig.command(io, ranged(NvmOpcode::VERIFY, 0, 8), Data::None);
    assert_eq!(status(&done), Ok(()));
}

#[test]
fn verify_reads_all_of_a_long_range_in_pieces() {
    let (mut rig, host) = start(3);
    let io = &host.io[0];
    let before = rig.faults.counters().submitted[Op::Read.index()];
    let done = rig.command(io, ranged(NvmOpcode::VERIFY, 5, BLOCKS - 5), Data::None);
    assert_eq!(status(&done), Ok(()));
    let reads = rig.faults.counters().submitted[Op::Read.index()] - before;
    assert_eq!(reads, ((BLOCKS - 5) * BLOCK).div_ceil(128 << 10) as u64);
    let done = rig.command(io, ranged(NvmOpcode::VERIFY, 5, BLOCKS - 4), Data::None);
    assert_eq!(status(&done), Err(Status::LBA_OUT_OF_RANGE.dnr()));
}

fn copy(to: u64, ranges: &[(u64, usize)]) -> (nvme::spec::Sqe, Data) {
    let mut bytes = Vec::new();
    for (slba, blocks) in ranges {
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&slba.to_le_bytes());
        bytes.extend_from_slice(&(*blocks as u16 - 1).to_le_bytes());
        bytes.extend_from_slice(&[0; 14]);
    }
    let (mut sqe, data) = structured(NvmOpcode::COPY, &bytes);
    sqe.cdw10.set(to as u32);
    sqe.cdw12.set(ranges.len() as u32 - 1);
    (sqe, data)
}

#[test]
fn copy_strings_its_sources_together() {
    let (mut rig, host) = start(4);
    let io = &host.io[0];
    let bytes = pattern(9, 1000 * BLOCK);
    rig.write(io, 0, &bytes);
    let ranges = [(900, 1), (10, 700), (0, 3), (899, 1), (100, 256)];
    let (sqe, data) = copy(5000, &ranges);
    let done = rig.command(io, sqe, data);
    assert_eq!((status(&done), done.cqe.dw0()), (Ok(()), 0));
    let mut want = Vec::new();
    for (slba, blocks) in ranges {
        want.extend_from_slice(&bytes[slba as usize * BLOCK..][..blocks * BLOCK]);
    }
    assert_eq!(rig.read(io, 5000, want.len()), want);
    assert_eq!(rig.read(io, 0, bytes.len()), bytes, "the source stays");
    let behind = 5000 + (want.len() / BLOCK) as u64;
    assert_eq!(rig.read(io, behind, 8 * BLOCK), [0; 8 * BLOCK], "not a block too many");
}

#[test]
fn copy_refuses_as_a_whole_before_it_writes() {
    let (mut rig, host) = start(5);
    let io = &host.io[0];
    let bytes = pattern(3, 64 * BLOCK);
    rig.write(io, 0, &bytes);
    for (to, ranges, why) in [
        (70, vec![(0, 8), (BLOCKS as u64 - 4, 8)], Status::LBA_OUT_OF_RANGE),
        (BLOCKS as u64 - 10, vec![(0, 8), (20, 8)], Status::LBA_OUT_OF_RANGE),
        (70, vec![(0, 8), (20, 60)], Status::OVERLAPPING_IO_RANGE),
        (70, vec![(0, 8); 129], Status::COMMAND_SIZE_LIMIT_EXCEEDED),
        (70, vec![(0, 8193)], Status::COMMAND_SIZE_LIMIT_EXCEEDED),
    ] {
        let (sqe, data) = copy(to, &ranges);
        assert_eq!(status(&rig.command(io, sqe, data)), Err(why.dnr()), "{ranges:?}");
    }
    let writes = rig.faults.counters().submitted[Op::Write.index()];
    assert_eq!(writes, 1, "only the test's own");
    assert_eq!(rig.read(io, 0, bytes.len()), bytes);
}

#[test]
fn copy_that_fails_says_at_which_source() {
    let (mut rig, host) = start(6);
    let io = &host.io[0];
    rig.write(io, 0, &pattern(3, 64 * BLOCK));
    rig.faults.set(media_error(Op::Write));
    let (sqe, data) = copy(1000, &[(0, 8), (20, 8)]);
    let done = rig.command(io, sqe, data);
    assert_eq!((status(&done), done.cqe.dw0()), (Err(Status::WRITE_FAULT.dnr()), 0));
    rig.faults.set(FaultPlan::default());
    // The third source fails: hold the volume's writes until two sources are copied.
    rig.faults.hold();
    let (sqe, data) = copy(1000, &[(0, 8), (20, 8), (40, 8)]);
    let id = io.send(sqe, data);
    let counters = |rig: &Rig, op: Op| rig.faults.counters().submitted[op.index()];
    let reads = counters(&rig, Op::Read);
    let faults = rig.faults.clone();
    rig.until("the first read", || faults.counters().submitted[Op::Read.index()] > reads);
    rig.faults.release();
    rig.until("the third read", || faults.counters().submitted[Op::Read.index()] == reads + 3);
    rig.faults.set(media_error(Op::Write));
    let done = rig.outcome(io, id);
    assert_eq!((status(&done), done.cqe.dw0()), (Err(Status::WRITE_FAULT.dnr()), 2));
}

#[test]
fn connection_lost_in_the_middle_leaves_nothing_behind() {
    let (mut rig, host) = start(7);
    let free: Vec<usize> = rig.cores.iter().map(|c| c.local().pool().available()).collect();
    rig.faults.hold();
    let bytes = pattern(3, LONG);
    let (sqe, data) = compare(0, &bytes);
    host.io[0].send(sqe, data);
    let (sqe, data) = copy(1000, &[(0, 300), (400, 8)]);
    host.io[0].send(sqe, data);
    host.io[1].send(ranged(NvmOpcode::VERIFY, 0, 4000), Data::None);
    let faults = rig.faults.clone();
    rig.until("all at the volume", || faults.counters().submitted[Op::Read.index()] == 3);
    host.io.iter().chain([&host.admin]).for_each(|queue| queue.cut());
    rig.run_for(Duration::from_secs(5));
    assert_eq!(rig.target.connected().1, 1, "the association waits for its I/O");
    rig.faults.release();
    let target = rig.target.clone();
    rig.until("the end of the association", || target.connected() == (0, 0));
    assert_eq!(rig.faults.counters().submitted[Op::Write.index()], 0, "no copy goes on");
    for (core, free) in rig.cores.iter().zip(free).take(2) {
        assert!(core.local().pool().available() >= free, "memory is missing");
    }
}

#[test]
fn more_compares_than_memory_all_end() {
    let mut rig = Rig::new(8);
    let hosts: Vec<Host> = (1..=4).map(|n| rig.host(n, 2)).collect();
    let bytes = pattern(5, 1 << 20);
    rig.write(&hosts[0].io[0], 0, &bytes);
    // 256 MiB of data and a buffer for each: much more than the pools of two cores have.
    let mut sent = Vec::new();
    for queue in hosts.iter().flat_map(|host| &host.io) {
        for _ in 0..32 {
            let (sqe, data) = compare(0, &bytes);
            sent.push((queue.clone(), queue.send(sqe, data)));
        }
    }
    for (queue, id) in sent {
        assert_eq!(status(&rig.outcome(&queue, id)), Ok(()));
    }
}

fn flush(nsid: u32) -> (nvme::spec::Sqe, Data) {
    let mut sqe = nvme::spec::Sqe::new(NvmOpcode::FLUSH.0);
    sqe.nsid.set(nsid);
    (sqe, Data::None)
}

#[test]
fn flush_of_all_namespaces_flushes_each_that_the_host_sees() {
    let volumes: Vec<_> = (2..=4)
        .map(|n| {
            let ram = RamVolume::new(Identity::from_uuid(uuid(n)), 1 << 20, BLOCK as u32);
            FaultVolume::new(Arc::new(ram.expect("memory")), 1)
        })
        .collect();
    let faults: Vec<_> = volumes.iter().map(|(_, faults)| faults.clone()).collect();
    let mut rig = Rig::with(9, |config| {
        for ((volume, _), nsid) in volumes.into_iter().zip([3, 7, 8]) {
            let mut ns = NamespaceConfig::new(nsid, Arc::new(volume));
            if nsid == 7 {
                ns.hosts = Some(vec![Nqn::new(&hostnqn(2)).expect("well formed")]);
            }
            config.subsystems[0].namespaces.push(ns);
        }
    });
    let [a, b] = [rig.host(1, 1), rig.host(2, 1)];
    let flushes = |rig: &Rig| {
        let all = [&rig.faults, &faults[0], &faults[1], &faults[2]];
        all.map(|faults| faults.counters().completed[Op::Flush.index()])
    };
    let (sqe, data) = flush(u32::MAX);
    assert_eq!(status(&rig.command(&a.io[0], sqe, data.clone())), Ok(()));
    assert_eq!(flushes(&rig), [1, 1, 0, 1]);
    assert_eq!(status(&rig.command(&b.io[0], sqe, data.clone())), Ok(()));
    assert_eq!(flushes(&rig), [2, 2, 1, 2]);
    let (one, _) = flush(7);
    assert_eq!(status(&rig.command(&b.io[0], one, data.clone())), Ok(()));
    assert_eq!(flushes(&rig), [2, 2, 2, 2]);
    // One that fails is told, whichever it is.
    faults[2].set(FaultPlan { error: Some(IoError::Gone), ..media_error(Op::Flush) });
    assert_eq!(status(&rig.command(&a.io[0], sqe, data)), Err(Status::INTERNAL_ERROR));
}
