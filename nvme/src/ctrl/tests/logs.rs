//! Get Log Page.

use zerocopy::FromBytes;

use super::*;
use crate::spec::{EnduranceGroupLog, ErrorEntry, NvmOpcode, SmartLog};
use crate::subsys::reservation::NoticeKind;

#[test]
fn log_pages() {
    let mut rig = Rig::io();
    let supported = rig.log(LogPage::SUPPORTED_LOG_PAGES, 1024).unwrap();
    let lids: Vec<usize> = (0..256).filter(|lid| supported[lid * 4] == 1).collect();
    assert_eq!(lids, [0, 1, 2, 3, 4, 5, 9, 0x12, 0x80]);
    for lid in (0..=255).map(LogPage).filter(|lid| !lids.contains(&usize::from(lid.0))) {
        assert_eq!(rig.log(lid, 512), Err(Status::INVALID_LOG_PAGE.dnr()), "{lid:?}");
    }
    let supported = Rig::of(shared()).log(LogPage::SUPPORTED_LOG_PAGES, 1024).unwrap();
    assert_eq!(supported[0x0c * 4..][..4], [1, 0, 0, 0], "ANA where there are groups");
    let features = rig.log(LogPage::FEATURES_SUPPORTED, 1024).unwrap();
    assert_eq!(features[4 * 7..][..4], [1, 0, 0x20, 0], "scope: controller");
    assert_eq!(features[4 * 0x84..][..4], [0b101, 0, 0x10, 0], "scope: namespace; changes it");
    assert_eq!(features[4 * 8], 0, "interrupt coalescing is not for fabrics");

    let slots = rig.log(LogPage::FIRMWARE_SLOT, 512).unwrap();
    assert_eq!((slots[0], &slots[8..16]), (1, &b"0.1     "[..]));

    rig.ctrl.set_health(HealthCounters {
        bytes_read: 512_001,
        read_commands: 3,
        busy: Duration::from_secs(119),
        power_on: Duration::from_secs(7200),
        ..HealthCounters::default()
    });
    for count in 1..=70u16 {
        rig.ctrl.record_error(&ErrorRecord {
            sqid: 1,
            cid: count,
            status: Status::WRITE_FAULT.dnr(),
            opcode: 1,
            nsid: 1,
            lba: 8,
        });
    }
    let bytes = rig.log(LogPage::SMART, 512).unwrap();
    let smart = SmartLog::ref_from_bytes(&bytes).unwrap();
    assert_eq!(smart.data_units_read.get(), 2);
    assert_eq!((smart.host_reads.get(), smart.busy_minutes.get()), (3, 1));
    assert_eq!((smart.power_on_hours.get(), smart.available_spare), (2, 100));
    assert_eq!(smart.error_log_entries.get(), 70);
    let bytes = rig.log(LogPage::ERROR_INFORMATION, 4096).unwrap();
    let (newest, rest) = ErrorEntry::ref_from_prefix(&bytes).unwrap();
    assert_eq!((newest.error_count.get(), newest.cid.get()), (70, 70));
    assert_eq!(Status::from_wire(newest.status_raw.get()), Status::WRITE_FAULT.dnr());
    assert_eq!(ErrorEntry::ref_from_suffix(rest).unwrap().1.error_count.get(), 7);
}

#[test]
fn log_page_windows() {
    let mut rig = Rig::io();
    let whole = rig.log(LogPage::COMMANDS_SUPPORTED, 4096).unwrap();
    let tail = rig.log_at(LogPage::COMMANDS_SUPPORTED, 1024, 4096, false).unwrap();
    assert_eq!(tail[..3072], whole[1024..]);
    assert_eq!(tail[3072..], [0; 1024], "beyond the end: zeroes");
    assert!(rig.log_at(LogPage::SMART, 512, 4, false).is_ok());
    let invalid = Err(INVALID_FIELD);
    assert_eq!(rig.log_at(LogPage::SMART, 516, 4, false), invalid);
    assert_eq!(rig.log_at(LogPage::SMART, 2, 4, false), invalid);
    assert_eq!(rig.log_at(LogPage::SMART, u64::MAX - 3, 4, false), invalid);
    assert_eq!(rig.log(LogPage::SMART, (1 << 20) + 4), invalid, "more than MDTS");

    let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
    sqe.nsid.set(NSID_ALL);
    sqe.cdw10.set(2 | 127 << 16);
    sqe.dptr = SglDescriptor::transport(508);
    assert_eq!(rig.run(sqe), Err(Status::DATA_SGL_LENGTH_INVALID.dnr()));
    sqe.dptr = SglDescriptor::transport(512);
    sqe.nsid.set(1);
    assert_eq!(rig.run(sqe), Err(INVALID_FIELD), "no SMART per namespace");
}

#[test]
fn every_page_can_be_read_at_any_dword() {
    for (mut rig, is_io) in [(Rig::of(shared()), true), (Rig::discovery(), false)] {
        let supported = rig.log(LogPage::SUPPORTED_LOG_PAGES, 1024).unwrap();
        for lid in (0..256).filter(|lid| supported[lid * 4] == 1).map(|lid| LogPage(lid as u8)) {
            let get = GetLogPage { lsi: 1, rae: true, ..read(lid, 4096) };
            let whole = rig.log_page(get, NSID_ALL).unwrap();
            for offset in [4, 60, 64] {
                let part = rig.log_page(GetLogPage { offset, len: 8, ..get }, 0).unwrap();
                assert_eq!(part[..], whole[offset as usize..][..8], "{lid:?}");
            }
            let refused = [
                GetLogPage { offset: 2, ..get },
                GetLogPage { offset: 1 << 40, ..get },
                GetLogPage { offset: 1, offset_is_index: true, ..get },
                GetLogPage { offset_is_index: true, ..get },
            ];
            for get in refused {
                assert_eq!(rig.log_page(get, 0), Err(INVALID_FIELD), "{get:?}");
            }
            if is_io {
                for nsid in [1, 2, 5000] {
                    assert_eq!(rig.log_page(get, nsid), Err(INVALID_FIELD), "{lid:?}");
                }
            }
            // There are no UUID lists: the index means nothing.
            let uuid = GetLogPage { uuid_index: 5, ..get };
            assert!(rig.log_page(uuid, 0).unwrap() == whole, "{lid:?}");
        }
    }
}

#[test]
fn transfer_lengths_are_bounded_and_must_agree() {
    let mut rig = Rig::io();
    let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
    read(LogPage::SMART, 512).apply(&mut sqe);
    for len in [0, 4, 508, 516] {
        sqe.dptr = SglDescriptor::transport(len);
        assert_eq!(rig.run(sqe), Err(Status::DATA_SGL_LENGTH_INVALID.dnr()), "{len}");
    }
    sqe.cdw10.set(2 | 0xffff << 16);
    sqe.cdw11.set(0xffff);
    sqe.dptr = SglDescriptor::transport(u32::MAX);
    assert_eq!(rig.run(sqe), Err(INVALID_FIELD), "16 GiB");
    assert!(rig.ctrl.host_data_max(&sqe) <= 1 << 20);
}

#[test]
fn commands_supported() {
    let mut rig = Rig::of(shared());
    let page = rig.log(LogPage::COMMANDS_SUPPORTED, 4096).unwrap();
    let admin: Vec<usize> = (0..256).filter(|op| page[op * 4] & 1 != 0).collect();
    assert_eq!(admin, [0x02, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x18, 0x7f]);
    let io = |op: NvmOpcode| page[1024 + usize::from(op.0) * 4];
    for op in [NvmOpcode::COMPARE, NvmOpcode::VERIFY, NvmOpcode::RESERVATION_ACQUIRE] {
        assert_eq!(io(op), 1);
    }
    for op in [NvmOpcode::WRITE, NvmOpcode::COPY, NvmOpcode::DATASET_MANAGEMENT] {
        assert_eq!(io(op), 3, "content changes");
    }
    assert_eq!(io(NvmOpcode::WRITE_UNCORRECTABLE), 0);
    // Linux warns of anything but these two bits in I/O commands.
    let dwords = || page[1024..2048].chunks_exact(4);
    assert!(dwords().all(|entry| entry[0] & !3 == 0 && entry[1..] == [0; 3]));
    let other_set = GetLogPage { csi: 2, ..read(LogPage::COMMANDS_SUPPORTED, 4096) };
    assert_eq!(rig.log_page(other_set, 0), Err(INVALID_FIELD));
}

#[test]
fn endurance_group() {
    let mut rig = Rig::io();
    rig.ctrl.set_health(HealthCounters {
        bytes_read: 1_000_000_001,
        write_commands: 7,
        media_errors: 2,
        critical_warning: 0b11_1111,
        ..HealthCounters::default()
    });
    let get = |lsi| GetLogPage { lsi, ..read(LogPage::ENDURANCE_GROUP, 512) };
    let bytes = rig.log_page(get(1), 0).unwrap();
    let page = EnduranceGroupLog::ref_from_bytes(&bytes).unwrap();
    assert_eq!((page.critical_warning, page.available_spare), (0b1101, 100));
    assert_eq!((page.data_units_read.get(), page.host_writes.get()), (2, 7));
    assert_eq!(page.media_errors.get(), 2);
    let total = 2048 * 512 + 256 * 4096 + (1u128 << 49);
    assert_eq!(page.total_capacity.get(), total);
    for lsi in [0, 2, 0xffff] {
        assert_eq!(rig.log_page(get(lsi), 0), Err(INVALID_FIELD));
    }
}

#[test]
fn temperature_and_thresholds_make_a_warning() {
    let mut rig = Rig::io();
    let warning = |rig: &mut Rig| rig.log(LogPage::SMART, 512).unwrap()[0];
    rig.set_feature(Feature::TEMPERATURE_THRESHOLD, 1 << 20 | 270).unwrap();
    assert_eq!(warning(&mut rig), 0, "nothing measures it");
    let at =
        |temperature_kelvin| HealthCounters { temperature_kelvin, ..HealthCounters::default() };
    rig.ctrl.set_health(at(300));
    assert_eq!(warning(&mut rig), 0);
    rig.expect_events(2);
    rig.set_feature(Feature::TEMPERATURE_THRESHOLD, 300).unwrap();
    assert_eq!(rig.event(), Some(0x0002_0101));
    assert_eq!(warning(&mut rig), 2);
    rig.ctrl.set_health(at(270));
    assert_eq!(warning(&mut rig), 2, "too cold");
}

#[test]
fn ana_log_through_the_command() {
    let mut rig = Rig::of(shared());
    let page = rig.log(LogPage::ANA, 128).unwrap();
    assert_eq!((page[0], page[8]), (2, 2), "change count and groups");
    assert_eq!(page[16..20], [1, 0, 0, 0]);
    let groups_only = GetLogPage { lsp: 1, ..read(LogPage::ANA, 128) };
    let page = rig.log_page(groups_only, 0).unwrap();
    assert_eq!((page[16], page[20], page[48], page[52]), (1, 0, 2, 0));
    assert_eq!(Rig::io().log(LogPage::ANA, 128), Err(Status::INVALID_LOG_PAGE.dnr()));
}

#[test]
fn reservation_notices_are_read_one_by_one() {
    let mut rig = Rig::of(shared());
    rig.set_feature_of(1, Feature::RESERVATION_NOTIFICATION_MASK, 0b0100).unwrap();
    rig.ctrl.reservation_notice(1, NoticeKind::RegistrationPreempted);
    rig.ctrl.reservation_notice(1, NoticeKind::ReservationReleased);
    rig.ctrl.reservation_notice(3, NoticeKind::ReservationReleased);
    // Retain Asynchronous Event retains the event and not the page.
    let first = rig.log_at(LogPage::RESERVATION_NOTIFICATION, 0, 64, true).unwrap();
    assert_eq!(first[..13], [1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1]);
    let second = rig.log(LogPage::RESERVATION_NOTIFICATION, 64).unwrap();
    assert_eq!(second[..13], [2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3], "the other was masked");
    assert_eq!(rig.log(LogPage::RESERVATION_NOTIFICATION, 64).unwrap(), [0; 64]);
}
