//! Asynchronous events through the commands.

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::*;
use crate::spec::ErrorEntry;
use crate::subsys::reservation::NoticeKind;

#[test]
fn namespace_changes_reach_the_host() {
    let mut rig = Rig::io();
    rig.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, 1 << 8).unwrap();
    rig.run(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0)).unwrap();
    let subsys = rig.ctrl.subsys().clone();
    let mut namespaces = subsys.namespaces().to_vec();
    namespaces[1].blocks *= 2;
    rig.ctrl.update_subsys(Arc::new(subsys.with_namespaces(namespaces).unwrap()));
    assert_eq!(rig.ctrl.poll_event(), Some((5, Status::SUCCESS, 0x0004_0002)));
    let list = rig.log_at(LogPage::CHANGED_NAMESPACES, 0, 4096, true).unwrap();
    assert_eq!(U32::ref_from_prefix(&list).unwrap().0.get(), 3);
    let list = rig.log(LogPage::CHANGED_NAMESPACES, 4096).unwrap();
    assert_eq!(list[..8], [3, 0, 0, 0, 0, 0, 0, 0], "retained by RAE");
    let list = rig.log(LogPage::CHANGED_NAMESPACES, 4096).unwrap();
    assert_eq!(list[..4], [0; 4]);
    let bytes = rig.identify(Cns::NAMESPACE, 3).unwrap();
    assert_eq!(IdentifyNamespace::ref_from_bytes(&bytes).unwrap().nsze.get(), 512);
}

#[test]
fn ana_changes_reach_the_host() {
    let mut rig = Rig::of(shared());
    rig.expect_events(1 << 8 | 1 << 11);
    rig.hold_request();
    let view = |state| {
        let mut second = AnaGroup::new(2, state);
        second.change_count = 5;
        let groups = vec![AnaGroup::new(1, AnaState::Optimized), second];
        Arc::new(shared().with_ana_groups(groups).unwrap())
    };
    rig.ctrl.update_subsys(view(AnaState::Inaccessible));
    assert_eq!(rig.event(), Some(0x000c_0302));
    let log = rig.log(LogPage::ANA, 128).unwrap();
    assert_eq!((log[0], log[56 + 16]), (6, 3), "change count; state of the second group");
    rig.ctrl.update_subsys(view(AnaState::Inaccessible));
    assert_eq!(rig.event(), None);
    rig.ctrl.update_subsys(view(AnaState::Optimized));
    assert_eq!(rig.event(), Some(0x000c_0302));
    assert_eq!(rig.event(), None, "and no Namespace Attribute Changed");
}

#[test]
fn reservation_notices_raise_an_event_until_all_are_read() {
    let mut rig = Rig::of(shared());
    rig.hold_request();
    rig.hold_request();
    rig.ctrl.reservation_notice(1, NoticeKind::ReservationReleased);
    rig.ctrl.reservation_notice(1, NoticeKind::ReservationPreempted);
    assert_eq!(rig.event(), Some(0x0080_0006), "needs no Asynchronous Event Configuration");
    assert_eq!(rig.event(), None);
    rig.log(LogPage::RESERVATION_NOTIFICATION, 64).unwrap();
    assert_eq!(rig.event(), Some(0x0080_0006), "one more page");
    rig.hold_request();
    rig.log_at(LogPage::RESERVATION_NOTIFICATION, 0, 64, true).unwrap();
    rig.ctrl.reservation_notice(3, NoticeKind::ReservationReleased);
    assert_eq!(rig.event(), None, "the event is retained");
    rig.log(LogPage::RESERVATION_NOTIFICATION, 64).unwrap();
    assert_eq!(rig.event(), None);
    rig.ctrl.reservation_notice(3, NoticeKind::ReservationReleased);
    assert_eq!(rig.event(), Some(0x0080_0006));
    rig.log(LogPage::RESERVATION_NOTIFICATION, 64).unwrap();
    rig.hold_request();
    rig.set_feature_of(1, Feature::RESERVATION_NOTIFICATION_MASK, 0b1110).unwrap();
    rig.ctrl.reservation_notice(1, NoticeKind::ReservationPreempted);
    assert_eq!(rig.event(), None, "masked");
}

#[test]
fn warnings_and_errors_reach_the_host() {
    let mut rig = Rig::io();
    rig.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, 1 << 8).unwrap();
    assert!(!rig.ctrl.has_health_events());
    rig.expect_events(0b1001);
    assert!(rig.ctrl.has_health_events());
    rig.ctrl.health_warning(0b0100);
    assert_eq!(rig.event(), None, "not enabled");
    rig.ctrl.health_warning(0b1100);
    assert_eq!(rig.event(), Some(0x0002_0001));
    assert_eq!(rig.log(LogPage::SMART, 512).unwrap()[0], 0b1100);
    rig.hold_request();
    rig.ctrl.set_health(HealthCounters { critical_warning: 1, ..HealthCounters::default() });
    assert_eq!(rig.event(), Some(0x0002_0201));

    rig.hold_request();
    rig.hold_request();
    rig.ctrl.internal_error(true);
    rig.ctrl.internal_error(true);
    assert_eq!(rig.event(), Some(0x0001_0300));
    rig.ctrl.internal_error(false);
    assert_eq!(rig.event(), Some(0x0001_0400));
    let bytes = rig.log(LogPage::ERROR_INFORMATION, 192).unwrap();
    let newest = ErrorEntry::ref_from_prefix(&bytes).unwrap().0;
    assert_eq!(
        (newest.error_count.get(), newest.sqid.get(), newest.cid.get()),
        (3, 0xffff, 0xffff)
    );
    assert_eq!((newest.trtype, newest.version), (0, 1));
}

#[test]
fn a_reset_ends_requests_and_forgets_events() {
    let mut rig = Rig::of(shared());
    rig.expect_events(1 << 8);
    rig.ctrl.reservation_notice(1, NoticeKind::ReservationReleased);
    rig.set(Property::CC, 0).unwrap();
    assert_eq!(rig.ctrl.poll_event(), Some((5, Status::COMMAND_ABORT_REQUESTED, 0)));
    rig.set(Property::CC, Cc::ENABLE.0).unwrap();
    rig.hold_request();
    assert_eq!(rig.event(), None);
    assert_eq!(rig.log(LogPage::RESERVATION_NOTIFICATION, 64).unwrap(), [0; 64]);
    assert_eq!(rig.get_feature(Feature::ASYNC_EVENT_CONFIGURATION, 0, 0, 0), Ok(0));
}

#[test]
fn requests_are_limited() {
    let mut rig = Rig::io();
    for _ in 0..AER_MAX {
        rig.hold_request();
    }
    let limit = Err(Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED.dnr());
    assert_eq!(rig.run(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0)), limit);
}
