//! The discovery controller.

use zerocopy::FromBytes;

use super::*;
use crate::subsys::discovery::{parse_extended, parse_header};

#[test]
fn discovery_controller() {
    let mut rig = Rig::discovery();
    let bytes = rig.identify(Cns::CONTROLLER, 0).unwrap();
    let id = IdentifyController::ref_from_bytes(&bytes).unwrap();
    assert_eq!((id.lpa, id.ctratt.get(), id.fuses.get(), id.nwpc), (0b100, 0b100_0001, 0, 0));
    assert_ne!(id.kas.get(), 0, "persistent discovery controllers have a keep alive timer");
    assert_eq!((id.cntrltype, id.dctype, id.oaes.get()), (2, 1, 1 << 31));
    assert_eq!((id.nn.get(), id.cmic, id.oncs.get(), id.vwc), (0, 0, 0, 0));
    assert_eq!(&id.subnqn[..37], b"nqn.2014-08.org.nvmexpress.discovery\0");

    // nvme-cli: 20 bytes, then 4 KiB pieces from offset 1024, then the header again.
    let header = rig.log_at(LogPage::DISCOVERY, 0, 20, true).unwrap();
    assert_eq!(parse_header(&header, 100).unwrap().records, 3);
    let records = rig.log_at(LogPage::DISCOVERY, 1024, 3072, true).unwrap();
    assert_eq!(records[..3], [3, 1, 2]);
    let last = rig.log_at(LogPage::DISCOVERY, 3072, 4096, true).unwrap();
    assert_eq!((&last[..3], &last[1024..1028]), (&[3u8, 1, 2][..], &[0u8; 4][..]));
    let invalid = Err(INVALID_FIELD);
    for cns in (0..=255).map(Cns).filter(|&cns| cns != Cns::CONTROLLER) {
        assert_eq!(rig.identify(cns, 1), invalid, "{cns:?}");
    }
    assert_eq!(rig.log(LogPage::SMART, 512), Err(Status::INVALID_LOG_PAGE.dnr()));
    assert_eq!(rig.get_feature(Feature::NUMBER_OF_QUEUES, 0, 0, 0), Err(INVALID_FIELD));
    let abort = Sqe::new(AdminOpcode::ABORT.0);
    assert_eq!(rig.run(abort), Err(Status::INVALID_COMMAND_OPCODE.dnr()));

    rig.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, 1 << 31).unwrap();
    rig.run(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0)).unwrap();
    rig.ctrl.update_discovery(Arc::new(DiscoveryLog::new(8, &[])));
    assert_eq!(rig.ctrl.poll_event(), Some((5, Status::SUCCESS, 0x0070_f002)));
    let header = rig.log(LogPage::DISCOVERY, 20).unwrap();
    assert_eq!(parse_header(&header, 100).unwrap().genctr, 8);
    assert_eq!(rig.ctrl.connect_io(&connect(1)), Err(ConnectReject::SUBNQN));
}

#[test]
fn log_specific_parameters() {
    let mut rig = Rig::discovery();
    let supported = rig.log(LogPage::SUPPORTED_LOG_PAGES, 1024).unwrap();
    let lids: Vec<usize> = (0..256).filter(|lid| supported[lid * 4] & 1 != 0).collect();
    assert_eq!(lids, [0, 0x70]);
    assert_eq!(supported[0x70 * 4..][..4], [1, 0, 0b011, 0], "EXTDLPES, PLEOS, no ALLSUBES");

    let with = |lsp| GetLogPage { lsp, ..read(LogPage::DISCOVERY, 8192) };
    let extended = rig.log_page(with(1), 0).unwrap();
    assert!(parse_header(&extended, 9).unwrap().is_extended);
    assert!(parse_extended(&extended[1024..]).is_ok());
    assert_eq!(parse_header(&rig.log_page(with(2), 0).unwrap(), 9).unwrap().records, 0);
    rig.ctrl.set_port(1);
    assert_eq!(parse_header(&rig.log_page(with(2), 0).unwrap(), 9).unwrap().records, 3);
    rig.ctrl.set_port(2);
    assert_eq!(parse_header(&rig.log_page(with(2), 0).unwrap(), 9).unwrap().records, 0);
    assert_eq!(parse_header(&rig.log_page(with(4), 0).unwrap(), 9).unwrap().records, 3);
}

#[test]
fn a_host_is_told_until_it_has_read_the_newest_log() {
    let mut rig = Rig::discovery();
    rig.expect_events(1 << 31);
    rig.hold_request();
    let log = |genctr| Arc::new(DiscoveryLog::new(genctr, &[]));
    rig.ctrl.update_discovery(log(8));
    assert_eq!(rig.event(), Some(0x0070_f002));
    rig.log_at(LogPage::DISCOVERY, 0, 20, true).unwrap();
    rig.ctrl.update_discovery(log(9));
    assert_eq!(rig.event(), None, "masked: the host is reading");
    rig.log_at(LogPage::DISCOVERY, 1024, 1024, false).unwrap();
    assert_eq!(rig.event(), Some(0x0070_f002), "it has read the header of log 8");
    rig.hold_request();
    rig.log(LogPage::DISCOVERY, 1024).unwrap();
    assert_eq!(rig.event(), None);
    rig.ctrl.update_discovery(log(10));
    assert_eq!(rig.event(), Some(0x0070_f002));
}

#[test]
fn a_persistent_discovery_controller_lives_by_keep_alive() {
    let mut rig = Rig::discovery();
    assert_eq!(rig.ctrl.deadline(), Some(MS(10_000)));
    rig.now = MS(9_000);
    rig.run(Sqe::new(AdminOpcode::KEEP_ALIVE.0)).unwrap();
    assert_eq!(rig.ctrl.deadline(), Some(MS(15_000)));
    rig.set_feature(Feature::KEEP_ALIVE_TIMER, 0).unwrap();
    assert_eq!(rig.get_feature(Feature::KEEP_ALIVE_TIMER, 0, 0, 0), Ok(0));
    assert_eq!(rig.ctrl.deadline(), Some(MS(9_000 + 120_000)), "two minutes without a command");
    assert_eq!(rig.get(Property::CAP).unwrap() & Cap::NSSRS, 0);
    assert_eq!(rig.get(Property::NSSR), Err(INVALID_FIELD));
}
