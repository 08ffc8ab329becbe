//! Get Features and Set Features.

use super::*;
use crate::spec::WriteProtectState;

#[test]
fn features() {
    let mut rig = Rig::io();
    let invalid = Err(INVALID_FIELD);
    let supported = [0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x0a, 0x0b, 0x0e, 0x0f, 0x16, 0x81];
    let of_namespaces = [0x82, 0x83, 0x84];
    let refused = |fid: &u8| !supported.contains(fid) && !of_namespaces.contains(fid);
    for fid in (0..=255u8).filter(refused) {
        for select in 0..4 {
            assert_eq!(rig.get_feature(Feature(fid), select, 0, 4096), invalid, "{fid:x}");
        }
        assert_eq!(rig.set_feature(Feature(fid), 0), invalid, "{fid:x}");
    }
    for fid in supported {
        for select in 0..4 {
            let cdw11 = u32::from(fid == 0x81);
            assert!(rig.get_feature(Feature(fid), select, cdw11, 512).is_ok(), "{fid:x} {select}");
        }
        assert_eq!(rig.get_feature(Feature(fid), 4, 0, 0), invalid);
    }

    rig.set_feature(Feature::ARBITRATION, 0x0102_0304).unwrap();
    assert_eq!(rig.get_feature(Feature::ARBITRATION, 0, 0, 0), Ok(0x0102_0304));
    assert_eq!(rig.get_feature(Feature::ARBITRATION, 1, 0, 0), Ok(0));
    assert_eq!(rig.get_feature(Feature::ARBITRATION, 3, 0, 0), Ok(4), "changeable");
    assert_eq!(rig.get_feature(Feature::VOLATILE_WRITE_CACHE, 0, 0, 0), Ok(1));
    assert_eq!(rig.get_feature(Feature::VOLATILE_WRITE_CACHE, 3, 0, 0), Ok(0));
    let fixed = Err(Status::FEATURE_NOT_CHANGEABLE.dnr());
    assert_eq!(rig.set_feature(Feature::VOLATILE_WRITE_CACHE, 0), fixed);
    assert_eq!(rig.set_feature(Feature::POWER_MANAGEMENT, 1), invalid);
    assert_eq!(rig.set_feature(Feature::ERROR_RECOVERY, 1 << 16), invalid);

    rig.set_feature(Feature::TEMPERATURE_THRESHOLD, 1 << 20 | 300).unwrap();
    assert_eq!(rig.get_feature(Feature::TEMPERATURE_THRESHOLD, 0, 1 << 20, 0), Ok(300));
    assert_eq!(rig.get_feature(Feature::TEMPERATURE_THRESHOLD, 0, 0, 0), Ok(0xffff));
    assert_eq!(rig.get_feature(Feature::TEMPERATURE_THRESHOLD, 0, 1 << 16, 0), invalid);

    assert_eq!(rig.set_feature(Feature::KEEP_ALIVE_TIMER, 1050), Ok(0));
    assert_eq!(rig.get_feature(Feature::KEEP_ALIVE_TIMER, 0, 0, 0), Ok(1100));
    let too_long = Err(Status::KEEP_ALIVE_TIMEOUT_INVALID.dnr());
    assert_eq!(rig.set_feature(Feature::KEEP_ALIVE_TIMER, 600_001), too_long);
    assert_eq!(rig.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, 1 << 11), invalid);

    rig.data = vec![0x10, 0x20, 0, 0, 0, 0, 0xff, 0xff];
    rig.set_feature(Feature::TIMESTAMP, 0).unwrap();
    rig.now += MS(5);
    rig.get_feature(Feature::TIMESTAMP, 0, 0, 8).unwrap();
    assert_eq!(rig.out, [0x15, 0x20, 0, 0, 0, 0, 2, 0]);
    let short = Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(rig.get_feature(Feature::TIMESTAMP, 0, 0, 4), short);
    assert_eq!(rig.set_feature(Feature::TIMESTAMP, 0), short, "no data");

    rig.data = vec![0; 512];
    rig.data[0] = 1;
    rig.set_feature(Feature::HOST_BEHAVIOR, 0).unwrap();
    rig.get_feature(Feature::HOST_BEHAVIOR, 0, 0, 512).unwrap();
    assert_eq!((rig.out[0], rig.out.len()), (1, 512));
    rig.data = vec![0; 512];
    rig.data[2] = 1;
    assert_eq!(rig.set_feature(Feature::HOST_BEHAVIOR, 0), invalid);

    rig.get_feature(Feature::HOST_IDENTIFIER, 0, 1, 16).unwrap();
    assert_eq!(rig.out, [9; 16]);
    assert_eq!(rig.get_feature(Feature::HOST_IDENTIFIER, 0, 0, 8), invalid);
    rig.data = vec![1; 16];
    let sequence = Err(Status::COMMAND_SEQUENCE_ERROR.dnr());
    assert_eq!(rig.set_feature(Feature::HOST_IDENTIFIER, 1), sequence);

    let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
    sqe.cdw10.set(1 | 1 << 31);
    assert_eq!(rig.run(sqe), Err(Status::FEATURE_NOT_SAVEABLE.dnr()));
    sqe.cdw10.set(1);
    sqe.nsid.set(1);
    assert_eq!(rig.run(sqe), Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC.dnr()));

    rig.set(Property::CC, 0).unwrap();
    rig.set(Property::CC, Cc::ENABLE.0).unwrap();
    assert_eq!(rig.get_feature(Feature::ARBITRATION, 0, 0, 0), Ok(0), "reset restores defaults");
}

#[test]
fn capabilities_are_told() {
    let mut rig = Rig::of(shared());
    let fixed =
        [Feature::POWER_MANAGEMENT, Feature::VOLATILE_WRITE_CACHE, Feature::HOST_IDENTIFIER];
    let of_namespaces = [0x05, 0x82, 0x83, 0x84].map(Feature);
    let mut count = 0;
    for fid in (0..=255).map(Feature) {
        let Ok(capabilities) = rig.get_feature_of(1, fid, 3) else { continue };
        count += 1;
        assert_eq!(capabilities & 1, 0, "{fid:?} is not saveable");
        assert_eq!(capabilities & 2 != 0, of_namespaces.contains(&fid), "{fid:?}");
        assert_eq!(capabilities & 4 == 0, fixed.contains(&fid), "{fid:?}");
        let mut save = Sqe::new(AdminOpcode::SET_FEATURES.0);
        save.nsid.set(1);
        save.cdw10.set(u32::from(fid.0) | 1 << 31);
        assert_eq!(rig.run(save), Err(Status::FEATURE_NOT_SAVEABLE.dnr()), "{fid:?}");
    }
    assert_eq!(count, 15);
}

#[test]
fn namespace_identifiers_are_checked() {
    let mut rig = Rig::of(shared());
    let not_specific = Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC.dnr());
    assert_eq!(rig.set_feature_of(1, Feature::ARBITRATION, 0), not_specific);
    assert_eq!(rig.set_feature_of(2, Feature::ARBITRATION, 0), not_specific);
    assert_eq!(rig.set_feature_of(1025, Feature::ARBITRATION, 0), Err(INVALID_NAMESPACE));
    assert_eq!(rig.set_feature_of(NSID_ALL, Feature::ARBITRATION, 0), Ok(0));
    assert_eq!(rig.get_feature_of(1, Feature::ARBITRATION, 0), Ok(0));
    assert_eq!(rig.get_feature_of(1025, Feature::ARBITRATION, 0), Err(INVALID_NAMESPACE));
    for fid in [0x82, 0x83, 0x84].map(Feature) {
        for nsid in [0, 1025] {
            assert_eq!(rig.get_feature_of(nsid, fid, 0), Err(INVALID_NAMESPACE), "{fid:?} {nsid}");
            assert_eq!(rig.set_feature_of(nsid, fid, 0), Err(INVALID_NAMESPACE), "{fid:?} {nsid}");
        }
        let all = match fid {
            Feature::NAMESPACE_WRITE_PROTECTION => INVALID_NAMESPACE,
            _ => INVALID_FIELD,
        };
        assert_eq!(rig.get_feature_of(NSID_ALL, fid, 0), Err(all), "{fid:?}");
        assert_eq!(rig.get_feature_of(2, fid, 0), Err(INVALID_FIELD), "{fid:?}: inactive");
        assert_eq!(rig.set_feature_of(2, fid, 0), Err(INVALID_FIELD), "{fid:?}: inactive");
    }
    let mut discovery = Rig::discovery();
    let fid = Feature::KEEP_ALIVE_TIMER;
    assert_eq!(discovery.set_feature_of(1, fid, 5000), Err(INVALID_NAMESPACE));
}

#[test]
fn error_recovery_of_one_and_of_all_namespaces() {
    let mut rig = Rig::io();
    let fid = Feature::ERROR_RECOVERY;
    rig.set_feature_of(3, fid, 7).unwrap();
    rig.set_feature_of(9, fid, 8).unwrap();
    let values = |rig: &mut Rig| [1, 3, 9, 0].map(|nsid| rig.get_feature_of(nsid, fid, 0).unwrap());
    assert_eq!(values(&mut rig), [0, 7, 8, 0]);
    assert_eq!(rig.get_feature_of(3, fid, 1), Ok(0), "default");
    rig.set_feature_of(NSID_ALL, fid, 5).unwrap();
    assert_eq!(values(&mut rig), [5; 4]);
    assert_eq!(rig.set_feature_of(3, fid, 1 << 16), Err(INVALID_FIELD), "DULBE");
    assert_eq!(rig.get_feature_of(2, fid, 0), Err(INVALID_FIELD));
    assert_eq!(rig.set_feature_of(2, fid, 0), Err(INVALID_FIELD));

    // A namespace that comes back is another one.
    rig.set_feature_of(9, fid, 6).unwrap();
    let all = rig.ctrl.subsys().clone();
    let fewer = all.restricted(|ns| ns.nsid != 9);
    rig.ctrl.update_subsys(Arc::new(fewer));
    rig.ctrl.update_subsys(all);
    assert_eq!(rig.get_feature_of(9, fid, 0), Ok(5));
}

#[test]
fn reservation_notification_mask() {
    let mut rig = Rig::of(shared());
    let fid = Feature::RESERVATION_NOTIFICATION_MASK;
    assert_eq!(rig.set_feature_of(1, fid, 0xff), Ok(0));
    assert_eq!(rig.get_feature_of(1, fid, 0), Ok(0b1110), "the bits that exist");
    assert_eq!(rig.get_feature_of(1, fid, 1), Ok(0));
    assert_eq!(rig.get_feature_of(3, fid, 0), Ok(0));
    assert_eq!(rig.set_feature_of(NSID_ALL, fid, 0b0010), Ok(0));
    assert_eq!([1, 3].map(|nsid| rig.get_feature_of(nsid, fid, 0)), [Ok(0b0010); 2]);
    assert_eq!(rig.get_feature_of(9, fid, 0), Err(INVALID_FIELD), "no reservations there");
    assert_eq!(rig.set_feature_of(9, fid, 0), Err(INVALID_FIELD));
    rig.set(Property::CC, 0).unwrap();
    rig.set(Property::CC, Cc::ENABLE.0).unwrap();
    assert_eq!(rig.get_feature_of(1, fid, 0), Ok(0), "reset");
}

#[test]
fn reservation_persistence_is_the_drivers() {
    let mut rig = Rig::of(shared());
    let fid = Feature::RESERVATION_PERSISTENCE;
    let asks = |nsid, set| Some(AdminOutcome::ReservationPersistence { nsid, set });
    assert_eq!(rig.get_feature_of(1, fid, 0), Ok(ASKED));
    assert_eq!(rig.asked.take(), asks(1, None));
    assert_eq!(rig.set_feature_of(1, fid, 1), Ok(ASKED));
    assert_eq!(rig.asked.take(), asks(1, Some(true)));
    assert_eq!(rig.set_feature_of(NSID_ALL, fid, 0), Ok(ASKED));
    assert_eq!(rig.asked.take(), asks(NSID_ALL, Some(false)));
    assert_eq!(rig.get_feature_of(1, fid, 1), Ok(0), "default");
    // Namespace 3 has reservations that cannot be kept, 9 none.
    assert_eq!(rig.get_feature_of(3, fid, 0), Ok(0));
    assert_eq!(rig.set_feature_of(3, fid, 0), Ok(0));
    assert_eq!(rig.set_feature_of(3, fid, 1), Err(INVALID_FIELD));
    assert_eq!(rig.get_feature_of(9, fid, 0), Err(INVALID_FIELD));
    assert_eq!(rig.set_feature_of(9, fid, 0), Err(INVALID_FIELD));
    assert_eq!(rig.asked, None);
}

#[test]
fn namespace_write_protection_is_the_drivers() {
    let mut rig = Rig::of(shared());
    let fid = Feature::NAMESPACE_WRITE_PROTECTION;
    assert_eq!(rig.get_feature_of(1, fid, 0), Ok(0));
    assert_eq!(rig.set_feature_of(1, fid, 0), Ok(0), "as it is");
    assert_eq!(rig.set_feature_of(1, fid, 1), Ok(ASKED));
    let state = WriteProtectState::WriteProtect;
    assert_eq!(rig.asked.take(), Some(AdminOutcome::SetWriteProtect { nsid: 1, state }));
    for state in 2..8 {
        assert_eq!(rig.set_feature_of(1, fid, state), Err(INVALID_FIELD), "{state}");
    }
    assert_eq!(rig.set_feature_of(NSID_ALL, fid, 1), Err(INVALID_NAMESPACE));

    let mut namespaces = shared().namespaces().to_vec();
    namespaces[0].write_protect = true;
    rig.ctrl.update_subsys(Arc::new(shared().with_namespaces(namespaces).unwrap()));
    assert_eq!([0, 1, 2].map(|select| rig.get_feature_of(1, fid, select)), [Ok(1), Ok(0), Ok(0)]);
    assert_eq!(rig.set_feature_of(1, fid, 1), Ok(0));
    assert_eq!(rig.set_feature_of(1, fid, 0), Ok(ASKED));
    let state = WriteProtectState::NoWriteProtect;
    assert_eq!(rig.asked.take(), Some(AdminOutcome::SetWriteProtect { nsid: 1, state }));
}

#[test]
fn defaults_are_what_the_association_began_with() {
    let mut rig = Rig::io();
    rig.set_feature(Feature::KEEP_ALIVE_TIMER, 30_000).unwrap();
    let kato = [0, 1, 2].map(|select| rig.get_feature(Feature::KEEP_ALIVE_TIMER, select, 0, 0));
    assert_eq!(kato, [Ok(30_000), Ok(5000), Ok(5000)]);
    rig.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, 1 << 8 | 0x1f).unwrap();
    let fid = Feature::ASYNC_EVENT_CONFIGURATION;
    assert_eq!([0, 1].map(|select| rig.get_feature(fid, select, 0, 0)), [Ok(0x11f), Ok(0)]);
    let not_offered = [1 << 9, 1 << 11, 1 << 31];
    for bit in not_offered {
        assert_eq!(rig.set_feature(fid, bit), Err(INVALID_FIELD), "{bit:x}");
    }
    assert_eq!(Rig::of(shared()).set_feature(fid, 1 << 11), Ok(0), "ANA");
    let mut discovery = Rig::discovery();
    assert_eq!(discovery.set_feature(fid, 1 << 31), Ok(0));
    assert_eq!(discovery.set_feature(fid, 1), Err(INVALID_FIELD), "no SMART log");
}

#[test]
fn features_of_namespaces_without_access() {
    let of_reservations =
        [Feature::RESERVATION_NOTIFICATION_MASK, Feature::RESERVATION_PERSISTENCE];
    let protection = Feature::NAMESPACE_WRITE_PROTECTION;
    for (state, status) in [
        (AnaState::Inaccessible, Status::ANA_INACCESSIBLE),
        (AnaState::PersistentLoss, Status::ANA_PERSISTENT_LOSS),
        (AnaState::Change, Status::ANA_TRANSITION),
    ] {
        // Namespace 3 is in the second group.
        let groups = vec![AnaGroup::new(1, AnaState::NonOptimized), AnaGroup::new(2, state)];
        let mut rig = Rig::of(shared().with_ana_groups(groups).unwrap());
        for fid in of_reservations.into_iter().chain([Feature::ERROR_RECOVERY]) {
            for select in 0..3 {
                assert_eq!(rig.get_feature_of(3, fid, select), Err(status), "{fid:?}");
            }
            assert!(rig.get_feature_of(3, fid, 3).is_ok(), "{fid:?}: capabilities");
            assert_eq!(rig.set_feature_of(3, fid, 0), Err(status), "{fid:?}");
            assert_eq!(rig.set_feature_of(NSID_ALL, fid, 0), Err(status), "{fid:?}");
            assert!(rig.get_feature_of(1, fid, 0).is_ok(), "{fid:?}: the other group");
            assert!(rig.set_feature_of(1, fid, 0).is_ok(), "{fid:?}: the other group");
        }
        assert_eq!(rig.get_feature_of(3, protection, 0), Ok(0));
        let set = rig.set_feature_of(3, protection, 1);
        let is_lost = state == AnaState::PersistentLoss;
        assert_eq!(set, if is_lost { Err(status) } else { Ok(ASKED) });
        assert_eq!(rig.set_feature(Feature::ARBITRATION, 7), Ok(0), "of the controller");
    }
}
