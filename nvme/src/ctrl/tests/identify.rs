//! Identify: what every data structure says, and what is refused.

use zerocopy::FromBytes;

use super::*;

/// Identify with the fields that few data structures use: CNTID and the CNS specific identifier.
fn identify_at(
    rig: &mut Rig,
    cns: Cns,
    nsid: u32,
    cntid: u16,
    specific: u16,
) -> Result<Vec<u8>, Status> {
    let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
    sqe.nsid.set(nsid);
    sqe.cdw10.set(u32::from(cns.0) | u32::from(cntid) << 16);
    sqe.cdw11.set(u32::from(specific));
    sqe.dptr = SglDescriptor::transport(4096);
    rig.run(sqe)?;
    Ok(rig.out.clone())
}

fn controller(rig: &mut Rig) -> IdentifyController {
    let bytes = rig.identify(Cns::CONTROLLER, 0).unwrap();
    IdentifyController::read_from_bytes(&bytes).unwrap()
}

fn namespace(rig: &mut Rig, nsid: u32) -> IdentifyNamespace {
    let bytes = rig.identify(Cns::NAMESPACE, nsid).unwrap();
    IdentifyNamespace::read_from_bytes(&bytes).unwrap()
}

fn independent(rig: &mut Rig, nsid: u32) -> IdentifyNamespaceIndependent {
    let bytes = rig.identify(Cns::INDEPENDENT_NAMESPACE, nsid).unwrap();
    IdentifyNamespaceIndependent::read_from_bytes(&bytes).unwrap()
}

#[test]
fn identify_refusals() {
    let mut rig = Rig::io();
    let invalid_ns = Err(INVALID_NAMESPACE);
    let invalid_field = Err(INVALID_FIELD);
    let of_namespaces = [
        Cns::NAMESPACE,
        Cns::NAMESPACE_DESCRIPTORS,
        Cns::IOCS_NAMESPACE,
        Cns::INDEPENDENT_NAMESPACE,
        Cns::ALLOCATED_NAMESPACE,
    ];
    for (cns, nsid) in
        of_namespaces.into_iter().flat_map(|cns| [0, 1025, NSID_ALL].map(|n| (cns, n)))
    {
        assert_eq!(rig.identify(cns, nsid).map(drop), invalid_ns, "{cns:?} {nsid}");
    }
    assert_eq!(rig.identify(Cns::NAMESPACE_CONTROLLERS, 0).map(drop), invalid_ns);
    assert_eq!(rig.identify(Cns::NAMESPACE_CONTROLLERS, NSID_ALL).map(drop), invalid_field);
    for cns in [Cns::NAMESPACE, Cns::ALLOCATED_NAMESPACE, Cns::NAMESPACE_CONTROLLERS] {
        let is_zero = rig.identify(cns, 2).map(|bytes| bytes.iter().all(|&b| b == 0));
        assert_eq!(is_zero, Ok(true), "inactive: zeroes");
    }
    assert_eq!(rig.identify(Cns::NAMESPACE_DESCRIPTORS, 2).map(drop), invalid_ns);
    for cns in [Cns::ACTIVE_NAMESPACES, Cns::IOCS_ACTIVE_NAMESPACES, Cns::ALLOCATED_NAMESPACES] {
        assert_eq!(rig.identify(cns, 0xffff_fffe).map(drop), invalid_ns);
        assert_eq!(rig.identify(cns, NSID_ALL).map(drop), invalid_ns);
    }
    let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
    sqe.cdw10.set(6);
    sqe.cdw11.set(2 << 24);
    sqe.dptr = SglDescriptor::transport(4096);
    assert_eq!(rig.run(sqe), Err(Status::INVALID_FIELD_IN_COMMAND.dnr()), "CSI 2");
    sqe.cdw10.set(1);
    for len in [0, 4092, 4100] {
        sqe.dptr = SglDescriptor::transport(len);
        assert_eq!(rig.run(sqe), Err(Status::DATA_SGL_LENGTH_INVALID.dnr()));
        assert!(rig.out.is_empty());
    }
}

#[test]
fn controller_without_ana() {
    let id = controller(&mut Rig::io());
    assert_eq!((id.cmic, id.oaes.get()), (0b0011, 1 << 8));
    assert_eq!((id.anatt, id.anacap, id.anagrpmax.get(), id.nanagrpid.get()), (0, 0, 0, 0));
    // 128-bit host identifiers, endurance groups, traffic based keep alive.
    assert_eq!((id.ctratt.get(), id.endgidmax.get()), (1 << 0 | 1 << 4 | 1 << 6, 1));
    assert_eq!((id.oacs.get(), id.sanicap.get(), id.acl_z, id.aerl_z), (0, 0, 3, 3));
    assert_eq!((id.lpa, id.elpe_z, id.nwpc), (0b110, 63, 1));
    assert_eq!((id.fuses.get(), id.acwu_z.get(), id.awun_z.get(), id.awupf_z.get()), (1, 0, 0, 0));
    assert_eq!(id.cdfs.get(), 1, "Copy Descriptor Format 0h");
    // Compare, DSM, Write Zeroes, Save/Select, Timestamp, Verify, Copy.
    assert_eq!(id.oncs.get(), 0b1_1101_1101);
}

#[test]
fn controller_with_ana_and_reservations() {
    let id = controller(&mut Rig::of(shared()));
    assert_eq!((id.cmic, id.oaes.get()), (0b1011, 1 << 8 | 1 << 11));
    assert_eq!((id.anatt, id.anacap), (10, 0b1_1111));
    assert_eq!((id.anagrpmax.get(), id.nanagrpid.get()), (128, 128));
    assert_ne!(id.oncs.get() & 1 << 5, 0, "reservations");
    assert!(id.mnan.get() != 0 && id.mnan.get() <= id.nn.get(), "Linux needs it for ANA");
    // Linux reads the whole ANA log at once.
    let log_len = 16 + id.nanagrpid.get() * 32 + id.mnan.get() * 4;
    assert!(log_len <= 4096 << id.mdts);
}

#[test]
fn optional_commands_follow_the_namespaces() {
    let mut namespaces = sample().namespaces().to_vec();
    for ns in &mut namespaces {
        ns.write_zeroes = false;
    }
    namespaces[2].write_uncorrectable = true;
    let oncs = controller(&mut Rig::of(sample().with_namespaces(namespaces).unwrap())).oncs.get();
    assert_eq!(oncs & 0b10_1010, 0b10, "Write Uncorrectable; no Write Zeroes, no reservations");
    let oncs = controller(&mut Rig::of(sample().with_namespaces(vec![]).unwrap())).oncs.get();
    assert_eq!(oncs & 0b10_1010, 0b10_1000, "what namespaces to come usually have");
}

#[test]
fn namespaces_tell_their_limits_and_groups() {
    let mut rig = Rig::of(shared());
    let one = namespace(&mut rig, 1);
    assert_eq!((one.mssrl.get(), one.mcl.get(), one.msrc_z), (8192, 65536, 127));
    assert_eq!((one.rescap, one.anagrpid.get(), one.endgid.get()), (0xff, 1, 1));
    assert_eq!((one.nmic, one.fpi, one.noiob.get(), one.nsattr), (1, 0, 0, 0));
    let three = namespace(&mut rig, 3);
    assert_eq!((three.rescap, three.anagrpid.get(), three.nsattr), (0xfe, 2, 1));
    assert_eq!(three.mssrl.get(), 1024, "in blocks of 4096 bytes");
    assert_eq!(namespace(&mut rig, 9).rescap, 0);
    let allocated = rig.identify(Cns::ALLOCATED_NAMESPACE, 3).unwrap();
    assert_eq!(allocated, rig.identify(Cns::NAMESPACE, 3).unwrap());
    let three = independent(&mut rig, 3);
    assert_eq!((three.rescap, three.anagrpid.get(), three.nsattr), (0xfe, 2, 1));
    assert_eq!((three.endgid.get(), three.nstat), (1, 1));
    assert_eq!(namespace(&mut Rig::io(), 3).anagrpid.get(), 0, "without ANA");

    let mut namespaces = shared().namespaces().to_vec();
    namespaces[0].write_protect = true;
    let mut rig = Rig::of(shared().with_namespaces(namespaces).unwrap());
    assert_eq!((namespace(&mut rig, 1).nsattr, independent(&mut rig, 1).nsattr), (1, 1));
}

#[test]
fn a_lost_path_does_not_know_the_utilization() {
    for (state, nuse) in [
        (AnaState::NonOptimized, 2048),
        (AnaState::Inaccessible, 0),
        (AnaState::PersistentLoss, 0),
        (AnaState::Change, 2048),
    ] {
        let groups = vec![AnaGroup::new(1, state), AnaGroup::new(2, AnaState::Optimized)];
        let mut rig = Rig::of(shared().with_ana_groups(groups).unwrap());
        let one = namespace(&mut rig, 1);
        assert_eq!((one.nsze.get(), one.ncap.get(), one.nuse.get()), (2048, 2048, nuse));
        assert_eq!(independent(&mut rig, 1).nstat, 1, "Linux needs it to keep the path");
    }
}

#[test]
fn lists_of_namespaces() {
    let mut rig = Rig::io();
    for cns in [Cns::ACTIVE_NAMESPACES, Cns::IOCS_ACTIVE_NAMESPACES, Cns::ALLOCATED_NAMESPACES] {
        let list = rig.identify(cns, 0).unwrap();
        assert_eq!(list[..16], [1, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(rig.identify(cns, 3).unwrap()[..8], [9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(rig.identify(cns, 9).unwrap()[..4], [0; 4]);
    }
}

#[test]
fn lists_of_controllers() {
    let mut rig = Rig::io();
    let wants = |cns: Cns, nsid| {
        let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
        sqe.nsid.set(nsid);
        sqe.cdw10.set(u32::from(cns.0));
        Controller::controllers_wanted(&sqe)
    };
    assert_eq!(wants(Cns::NAMESPACE_CONTROLLERS, 3), Some(ControllersWanted::Attached(3)));
    assert_eq!(wants(Cns::CONTROLLERS, 0), Some(ControllersWanted::All));
    assert_eq!(wants(Cns::CONTROLLER, 0), None);

    let list = identify_at(&mut rig, Cns::CONTROLLERS, 0, 0, 0).unwrap();
    assert_eq!(list[..6], [1, 0, 0x42, 0, 0, 0], "itself, if nobody said more");
    rig.ctrl.set_controllers(&[0x42, 7, 0x0100]);
    for cns in [Cns::CONTROLLERS, Cns::NAMESPACE_CONTROLLERS] {
        let list = identify_at(&mut rig, cns, 1, 0, 0).unwrap();
        assert_eq!(list[..10], [3, 0, 7, 0, 0x42, 0, 0, 1, 0, 0]);
        let list = identify_at(&mut rig, cns, 1, 8, 0).unwrap();
        assert_eq!(list[..8], [2, 0, 0x42, 0, 0, 1, 0, 0]);
        assert_eq!(identify_at(&mut rig, cns, 1, 0x0101, 0).unwrap()[..4], [0; 4]);
    }
    let many: Vec<u16> = (1..4000).collect();
    rig.ctrl.set_controllers(&many);
    let list = identify_at(&mut rig, Cns::CONTROLLERS, 0, 0, 0).unwrap();
    assert_eq!((list.len(), &list[..4]), (4096, &[0xff, 0x07, 1, 0][..]));
}

#[test]
fn endurance_groups_and_command_sets() {
    let mut rig = Rig::io();
    for (from, expected) in [(0, [1, 0, 1, 0]), (1, [1, 0, 1, 0]), (2, [0; 4])] {
        let list = identify_at(&mut rig, Cns::ENDURANCE_GROUPS, 0, 0, from).unwrap();
        assert_eq!(list[..4], expected);
    }
    for cntid in [0xffff, 0x42] {
        let sets = identify_at(&mut rig, Cns::COMMAND_SETS, 0, cntid, 0).unwrap();
        assert_eq!(sets[..16], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(identify_at(&mut rig, Cns::COMMAND_SETS, 0, 0x43, 0).map(drop), Err(INVALID_FIELD));
}

#[test]
fn command_set_specific_structures() {
    let mut rig = Rig::io();
    let bytes = rig.identify(Cns::IOCS_CONTROLLER, 0).unwrap();
    let id = IdentifyControllerNvm::ref_from_bytes(&bytes).unwrap();
    // 32 MiB in units of 4 KiB; no limits of Dataset Management.
    assert_eq!((id.vsl, id.wzsl, id.wusl), (13, 13, 13));
    assert_eq!((id.dmrl, id.dmrsl.get(), id.dmsl.get()), (0, 0, 0));
    for (cns, nsid) in [(Cns::IOCS_NAMESPACE, 1), (Cns::IOCS_NAMESPACE, 2)] {
        assert!(rig.identify(cns, nsid).unwrap().iter().all(|&b| b == 0), "no metadata");
    }
}
