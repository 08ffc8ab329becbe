//! What the SMART and Error Information logs say of I/O.

use std::time::Duration;

use block::fault::FaultPlan;
use block::{IoError, Op};
use nvme::spec::{NvmOpcode, Status};
use nvmf_target::PowerHistory;

use crate::host::Data;
use crate::rig::{BLOCK, Rig, compare, pattern, ranged, rw, status, write};

const HOUR: Duration = Duration::from_secs(3600);

const ERRORS: u8 = 0x01;
const SMART: u8 = 0x02;

fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn u64_at(page: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"))
}

fn failing(error: IoError, only: Op) -> FaultPlan {
    FaultPlan {
        errors_per_million: 1_000_000,
        error: Some(error),
        only: Some(only),
        ..FaultPlan::default()
    }
}

#[test]
fn failed_commands_of_every_queue_stand_in_the_error_log() {
    let mut rig = Rig::new(1);
    let host = rig.host(1, 4);
    let other = rig.host(2, 1);
    assert_eq!(rig.log_page(&host, ERRORS, 64), [0; 64], "nothing failed yet");
    rig.faults.set(failing(IoError::Medium, Op::Read));
    for (n, queue) in host.io.iter().enumerate() {
        let slba = 100 + n as u64;
        let done = rig.command(queue, rw(NvmOpcode::READ, slba, BLOCK), Data::Reply(BLOCK));
        assert_eq!(status(&done), Err(Status::UNRECOVERED_READ_ERROR.dnr()));
    }
    // What the host itself got wrong is none of the log's business.
    let done = rig.command(&host.io[0], ranged(NvmOpcode::VERIFY, 1 << 40, 1), Data::None);
    assert_eq!(status(&done), Err(Status::LBA_OUT_OF_RANGE.dnr()));
    rig.faults.set(failing(IoError::Gone, Op::Write));
    let (sqe, data) = write(77, &pattern(1, 2 * BLOCK));
    assert_eq!(status(&rig.command(&host.io[2], sqe, data)), Err(Status::INTERNAL_ERROR));
    let page = rig.log_page(&host, ERRORS, 64 * 6);
    let entry = |n: usize| &page[n * 64..][..64];
    for (n, (sqid, opcode, lba, code)) in [
        (3, 1, 77, Status::INTERNAL_ERROR),
        (4, 2, 103, Status::UNRECOVERED_READ_ERROR.dnr()),
        (3, 2, 102, Status::UNRECOVERED_READ_ERROR.dnr()),
        (2, 2, 101, Status::UNRECOVERED_READ_ERROR.dnr()),
        (1, 2, 100, Status::UNRECOVERED_READ_ERROR.dnr()),
    ]
    .into_iter()
    .enumerate()
    {
        let entry = entry(n);
        assert_eq!(u64_at(entry, 0), 5 - n as u64, "error count");
        assert_eq!(u16_at(entry, 8), sqid, "queue");
        assert_eq!(Status::from_wire(u16_at(entry, 12)), code);
        assert_eq!((u64_at(entry, 16), entry[24], entry[31]), (lba, 1, opcode), "entry {n}");
    }
    assert_eq!(entry(5), [0; 64]);
    assert_eq!(rig.log_page(&other, ERRORS, 64), [0; 64], "another controller's");
    let smart = rig.log_page(&host, SMART, 512);
    assert_eq!(u64_at(&smart, 160), 4, "media errors");
    assert_eq!(u64_at(&smart, 176), 5, "error log entries");
}

#[test]
fn smart_counts_units_and_commands_by_kind() {
    let mut rig = Rig::new(2);
    let host = rig.host(1, 2);
    let bytes = pattern(1, 1000 * BLOCK);
    rig.write(&host.io[0], 0, &bytes);
    rig.write(&host.io[1], 2000, &bytes[..BLOCK]);
    rig.read(&host.io[0], 0, 1000 * BLOCK);
    let (sqe, data) = compare(0, &bytes);
    assert_eq!(status(&rig.command(&host.io[1], sqe, data)), Ok(()));
    let done = rig.command(&host.io[0], ranged(NvmOpcode::VERIFY, 0, 3000), Data::None);
    assert_eq!(status(&done), Ok(()));
    let smart = rig.log_page(&host, SMART, 512);
    assert_eq!(u64_at(&smart, 32), 5, "thousands of units read, compared and verified");
    assert_eq!(u64_at(&smart, 48), 2, "thousands of units written, rounded up");
    assert_eq!(u64_at(&smart, 64), 2, "a Read and a Compare");
    assert_eq!(u64_at(&smart, 80), 2, "two Writes");
}

#[test]
fn power_and_busy_time_go_on_from_where_they_were() {
    let history = PowerHistory { power_cycles: 7, power_on: 40 * HOUR, unsafe_shutdowns: 2 };
    let mut rig = Rig::with(3, |config| config.power = history);
    let host = rig.host(1, 2);
    let smart = rig.log_page(&host, SMART, 512);
    let [cycles, hours, unsafe_shutdowns] = [112, 128, 144].map(|at| u64_at(&smart, at));
    assert_eq!((cycles, hours, unsafe_shutdowns), (7, 40, 2));
    assert_eq!(u64_at(&smart, 96), 0, "busy minutes");
    // Two queues have something outstanding for the same ninety minutes.
    rig.faults.hold();
    let sent: Vec<_> = host
        .io
        .iter()
        .map(|queue| {
            let (sqe, data) = write(1, &pattern(1, BLOCK));
            (queue.clone(), queue.send(sqe, data))
        })
        .collect();
    rig.run_for(HOUR * 3 / 2);
    let smart = rig.log_page(&host, SMART, 512);
    assert!((89..=90).contains(&u64_at(&smart, 96)), "while it goes on");
    rig.faults.release();
    for (queue, id) in sent {
        assert_eq!(status(&rig.outcome(&queue, id)), Ok(()));
    }
    rig.run_for(HOUR);
    let smart = rig.log_page(&host, SMART, 512);
    assert!((89..=90).contains(&u64_at(&smart, 96)), "not a minute while idle");
    assert_eq!(u64_at(&smart, 128), 42, "hours");
    let kelvin = u16_at(&smart, 1);
    assert!(kelvin == 0 || (200..=450).contains(&kelvin), "{kelvin} K");
}
