use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::*;
use crate::spec::{
    AdminOpcode, Cap, Cc, Cns, Csts, ErrorEntry, FabricsType, Feature, GetLogPage,
    IdentifyController, IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent,
    LogPage, NSID_ALL, Property, SglDescriptor, SmartLog, Sqe,
};
use crate::subsys::discovery::{DiscoveryEntry, parse_header};
use crate::subsys::tests::sample;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A controller and the few lines a driver needs around it.
struct Rig {
    ctrl: Controller,
    now: Duration,
    out: Vec<u8>,
    data: Vec<u8>,
}

impl Rig {
    fn new(kind: ControllerKind, subsys: SubsystemInfo) -> Rig {
        let config = ControllerConfig {
            cntlid: 0x42,
            kind,
            hostnqn: Nqn::new("nqn.2014-08.org.nvmexpress:uuid:h").unwrap(),
            hostid: [9; 16],
            kato: MS(5000),
            subsys: Arc::new(subsys),
        };
        let ctrl = Controller::new(config, Duration::ZERO);
        Rig { ctrl, now: Duration::ZERO, out: Vec::new(), data: Vec::new() }
    }

    fn io() -> Rig {
        let mut rig = Rig::new(ControllerKind::Io, sample());
        rig.set(Property::CC, Cc::ENABLE.0).unwrap();
        assert!(rig.ctrl.is_ready());
        rig
    }

    fn discovery() -> Rig {
        let entry = DiscoveryEntry::tcp(
            crate::spec::discovery::SubsystemType::NVM,
            "127.0.0.1:4420".parse().unwrap(),
            1,
            Nqn::new("nqn.2024-01.io.penstock:db0").unwrap(),
        );
        let log = DiscoveryLog::new(7, &[entry.clone(), entry.clone(), entry]);
        let base = sample();
        let subsys = SubsystemInfo::discovery(
            *base.serial(),
            *base.model(),
            *base.firmware(),
            *base.limits(),
        )
        .unwrap();
        let mut rig = Rig::new(ControllerKind::Discovery(Arc::new(log)), subsys);
        rig.set(Property::CC, Cc::ENABLE.0).unwrap();
        rig
    }

    /// Runs a command the way a driver does and returns status (as a result) and dwords 0 and 1.
    fn run(&mut self, sqe: Sqe) -> Result<u64, Status> {
        assert!(Controller::needs_host_data(&sqe) as usize <= self.data.len());
        let data = core::mem::take(&mut self.data);
        match self.ctrl.admin(5, &sqe, &data, &mut self.out, self.now) {
            AdminOutcome::Complete { status, result } if status.is_success() => Ok(result),
            AdminOutcome::Complete { status, .. } => Err(status),
            AdminOutcome::ResetQueues { status, .. } => {
                assert!(status.is_success() && self.ctrl.is_ending());
                self.ctrl.queues_closed(self.now);
                Ok(0)
            }
            AdminOutcome::Abort { .. } => {
                self.ctrl.abort_done();
                Ok(ABORT_NOT_DONE)
            }
            outcome => {
                assert_eq!(outcome, AdminOutcome::Pending);
                Ok(u64::MAX)
            }
        }
    }

    fn get(&mut self, property: Property) -> Result<u64, Status> {
        let mut sqe = Sqe::fabrics(FabricsType::PROPERTY_GET);
        sqe.cdw10.set(u32::from(property == Property::CAP));
        sqe.cdw11.set(property.0);
        self.run(sqe)
    }

    fn set(&mut self, property: Property, value: u32) -> Result<u64, Status> {
        let mut sqe = Sqe::fabrics(FabricsType::PROPERTY_SET);
        sqe.cdw11.set(property.0);
        sqe.cdw12.set(value);
        self.run(sqe)
    }

    fn identify(&mut self, cns: Cns, nsid: u32) -> Result<Vec<u8>, Status> {
        let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
        sqe.nsid.set(nsid);
        sqe.cdw10.set(u32::from(cns.0));
        sqe.dptr = SglDescriptor::transport(4096);
        self.run(sqe)?;
        assert_eq!(self.out.len(), 4096);
        Ok(self.out.clone())
    }

    fn log_at(
        &mut self,
        lid: LogPage,
        offset: u64,
        len: u32,
        rae: bool,
    ) -> Result<Vec<u8>, Status> {
        let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
        sqe.nsid.set(NSID_ALL);
        GetLogPage {
            lid,
            lsp: 0,
            rae,
            len: u64::from(len),
            offset,
            offset_is_index: false,
            csi: 0,
            uuid_index: 0,
        }
        .apply(&mut sqe);
        sqe.dptr = SglDescriptor::transport(len);
        self.run(sqe)?;
        assert_eq!(self.out.len(), len as usize);
        Ok(self.out.clone())
    }

    fn log(&mut self, lid: LogPage, len: u32) -> Result<Vec<u8>, Status> {
        self.log_at(lid, 0, len, false)
    }

    fn set_feature(&mut self, fid: Feature, cdw11: u32) -> Result<u64, Status> {
        let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
        sqe.cdw10.set(u32::from(fid.0));
        sqe.cdw11.set(cdw11);
        sqe.dptr = SglDescriptor::transport(self.data.len() as u32);
        self.run(sqe)
    }

    fn get_feature(
        &mut self,
        fid: Feature,
        select: u32,
        cdw11: u32,
        len: u32,
    ) -> Result<u64, Status> {
        let mut sqe = Sqe::new(AdminOpcode::GET_FEATURES.0);
        sqe.cdw10.set(u32::from(fid.0) | select << 8);
        sqe.cdw11.set(cdw11);
        sqe.dptr = SglDescriptor::transport(len);
        self.run(sqe)
    }
}

fn connect(qid: u16) -> ConnectRequest {
    ConnectRequest {
        qid,
        queue_entries: 128,
        kato: MS(5000),
        sq_flow_disabled: true,
        hostid: [9; 16],
        cntlid: 0x42,
        subnqn: sample().nqn().clone(),
        hostnqn: Nqn::new("nqn.2014-08.org.nvmexpress:uuid:h").unwrap(),
    }
}

#[test]
fn linux_bring_up_in_order() {
    let mut rig = Rig::new(ControllerKind::Io, sample());
    let cap = Cap(rig.get(Property::CAP).unwrap());
    assert_eq!(cap.queue_entries_max(), 128);
    assert!(cap.has_nvm_command_set() && cap.0 & Cap::CRMS_CRWMS != 0 && cap.0 & Cap::CQR != 0);
    assert_eq!(cap.page_bytes_min(), 4096);
    rig.set(Property::CC, Cc::ENABLE.0 & !1).unwrap();
    assert_eq!(rig.identify(Cns::CONTROLLER, 0), Err(Status::COMMAND_SEQUENCE_ERROR.dnr()));
    assert!(rig.get(Property::CRTO).unwrap() > 0);
    rig.set(Property::CC, Cc::ENABLE.0).unwrap();
    assert!(Csts(rig.get(Property::CSTS).unwrap() as u32).rdy());
    assert_eq!(rig.get(Property::VS), Ok(0x20000));

    let bytes = rig.identify(Cns::CONTROLLER, 0).unwrap();
    let id = IdentifyController::ref_from_bytes(&bytes).unwrap();
    assert_eq!(id.cntlid.get(), 0x42);
    assert_eq!(id.ver.get(), 0x20000);
    assert_ne!(id.kas.get(), 0, "Linux refuses an I/O controller without keep alive");
    assert_eq!(id.ioccsz.get() * 16 - 64, 4096);
    assert_eq!((id.iorcsz.get(), id.icdoff.get(), id.msdbd), (1, 0, 1));
    assert_eq!(id.sgls.get() & 3, 1, "Linux needs SGL support");
    assert_eq!(id.maxcmd.get(), 128);
    assert_eq!(id.mdts, 8);
    assert_eq!((id.nn.get(), id.mnan.get()), (1024, 1024));
    assert_eq!((id.sqes, id.cqes, id.cntrltype), (0x66, 0x44, 1));
    assert_eq!(&id.sn, b"SER0001             ");
    assert_eq!(&id.fr, b"0.1     ");
    assert_eq!(id.cmic & IdentifyController::CMIC_ANA, 0);
    assert_eq!(id.subnqn, sample().nqn().to_field());
    assert_ne!(id.lpa & IdentifyController::LPA_EFFECTS, 0);
    assert_eq!(id.oacs.get(), 0);
    assert_eq!(id.crdt[0].get(), 0);

    let effects = rig.log(LogPage::COMMANDS_SUPPORTED, 4096).unwrap();
    assert_eq!(effects[4 * 6], 1, "Identify");
    assert_eq!(effects[1024 + 4], 3, "Write: supported, changes content");
    rig.log(LogPage::SMART, 512).unwrap();
    assert_eq!(rig.get_feature(Feature::TEMPERATURE_THRESHOLD, 0, 0, 0), Ok(0xffff));
    rig.run(Sqe::new(AdminOpcode::KEEP_ALIVE.0)).unwrap();
    assert_eq!(rig.set_feature(Feature::NUMBER_OF_QUEUES, 3 << 16 | 3), Ok(3 << 16 | 3));
    for qid in 1..=4 {
        rig.ctrl.connect_io(&connect(qid)).unwrap();
    }
    rig.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, id_oaes(&bytes)).unwrap();
    assert_eq!(rig.run(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0)), Ok(u64::MAX));

    let nvm = rig.identify(Cns::IOCS_CONTROLLER, 0).unwrap();
    assert_eq!(IdentifyControllerNvm::ref_from_bytes(&nvm).unwrap().wzsl, 13);
    let list = rig.identify(Cns::ACTIVE_NAMESPACES, 0).unwrap();
    assert_eq!(list[..16], [1, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    let rest = rig.identify(Cns::ACTIVE_NAMESPACES, 3).unwrap();
    assert_eq!(rest[..8], [9, 0, 0, 0, 0, 0, 0, 0]);

    let descriptors = rig.identify(Cns::NAMESPACE_DESCRIPTORS, 1).unwrap();
    assert_eq!(descriptors[..4], [2, 16, 0, 0]);
    assert_eq!(descriptors[4..20], [0x11; 16]);
    assert_eq!(descriptors[20..24], [3, 16, 0, 0]);
    assert_eq!(descriptors[24..40], [1; 16]);
    assert_eq!(descriptors[40..46], [4, 1, 0, 0, 0, 0]);
    let bytes = rig.identify(Cns::INDEPENDENT_NAMESPACE, 1).unwrap();
    let independent = IdentifyNamespaceIndependent::ref_from_bytes(&bytes).unwrap();
    assert_eq!((independent.nstat, independent.nmic, independent.nsfeat), (1, 1, 1 << 3));
    let bytes = rig.identify(Cns::INDEPENDENT_NAMESPACE, 3).unwrap();
    let independent = IdentifyNamespaceIndependent::ref_from_bytes(&bytes).unwrap();
    assert_eq!((independent.nsattr, independent.nsfeat), (1, 1 << 3 | 1 << 5));
    let bytes = rig.identify(Cns::NAMESPACE, 1).unwrap();
    let ns = IdentifyNamespace::ref_from_bytes(&bytes).unwrap();
    assert_eq!((ns.nsze.get(), ns.ncap.get(), ns.nuse.get()), (2048, 2048, 2048));
    assert_eq!((ns.lbaf[0].lbads, ns.flbas, ns.nlbaf_z), (9, 0, 0));
    assert_eq!((ns.npwg_z.get(), ns.npdg_z.get(), ns.nsfeat & 1 << 4), (7, 7, 1 << 4));
    assert_eq!((ns.dlfeat, ns.nmic, ns.nguid), (0b1001, 1, [0x11; 16]));
    rig.identify(Cns::IOCS_NAMESPACE, 1).unwrap();

    // nvme disconnect: CC.SHN, poll SHST.
    rig.set(Property::CC, Cc::ENABLE.with_shn(1).0).unwrap();
    assert!(Csts(rig.get(Property::CSTS).unwrap() as u32).is_shutdown_complete());
    assert_eq!(rig.ctrl.poll_event(), Some((5, Status::COMMAND_ABORT_REQUESTED, 0)));
    assert_eq!(rig.ctrl.deadline(), None, "keep alive ends with shutdown");
}

fn id_oaes(bytes: &[u8]) -> u32 {
    IdentifyController::ref_from_bytes(bytes).unwrap().oaes.get()
}

#[test]
fn identify_refusals() {
    let mut rig = Rig::io();
    let invalid_ns = Err(Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
    let invalid_field = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    for nsid in [0, 1025, NSID_ALL] {
        assert_eq!(rig.identify(Cns::NAMESPACE, nsid), invalid_ns, "{nsid}");
    }
    assert_eq!(rig.identify(Cns::NAMESPACE, 2), Ok(vec![0; 4096]), "inactive: zeroes");
    assert_eq!(rig.identify(Cns::NAMESPACE_DESCRIPTORS, 2), invalid_ns);
    assert_eq!(rig.identify(Cns::ACTIVE_NAMESPACES, 0xffff_fffe), invalid_ns);
    for cns in [0x04, 0x09, 0x10, 0x11, 0x12, 0x13, 0x14, 0x16, 0x17, 0x18, 0x19, 0x1c, 0xff] {
        assert_eq!(rig.identify(Cns(cns), 1), invalid_field, "{cns:x}");
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
fn admin_refusals() {
    let mut rig = Rig::io();
    let supported = [
        AdminOpcode::IDENTIFY,
        AdminOpcode::GET_LOG_PAGE,
        AdminOpcode::GET_FEATURES,
        AdminOpcode::SET_FEATURES,
        AdminOpcode::ABORT,
        AdminOpcode::ASYNC_EVENT_REQUEST,
        AdminOpcode::KEEP_ALIVE,
        AdminOpcode::FABRICS,
    ];
    for opcode in (0..=255).map(AdminOpcode).filter(|op| !supported.contains(op)) {
        assert_eq!(rig.run(Sqe::new(opcode.0)), Err(Status::INVALID_COMMAND_OPCODE.dnr()));
    }
    rig.data = vec![0; 1024];
    let mut connect = Sqe::fabrics(FabricsType::CONNECT);
    connect.dptr = SglDescriptor::in_capsule(0, 1024);
    assert_eq!(rig.run(connect), Err(Status::COMMAND_SEQUENCE_ERROR.dnr()));
    let disconnect = Sqe::fabrics(FabricsType::DISCONNECT);
    assert_eq!(rig.run(disconnect), Err(Status::INVALID_QUEUE_TYPE.dnr()));
    let auth = Sqe::fabrics(FabricsType::AUTHENTICATION_SEND);
    assert_eq!(rig.run(auth), Err(Status::INVALID_COMMAND_OPCODE.dnr()));
    let fused = Sqe { flags: 0x41, ..Sqe::new(AdminOpcode::KEEP_ALIVE.0) };
    assert_eq!(rig.run(fused), Err(Status::INVALID_FIELD_IN_COMMAND.dnr()));
    let mut size_2 = Sqe::fabrics(FabricsType::PROPERTY_GET);
    size_2.cdw10.set(2);
    assert_eq!(rig.run(size_2), Err(Status::INVALID_FIELD_IN_COMMAND.dnr()));

    assert_eq!(io_queue_fabrics(&disconnect), Ok(()));
    assert_eq!(io_queue_fabrics(&connect), Err(Status::COMMAND_SEQUENCE_ERROR.dnr()));
    assert!(io_queue_fabrics(&Sqe::fabrics(FabricsType::PROPERTY_GET)).is_err());
}

#[test]
fn log_pages() {
    let mut rig = Rig::io();
    let supported = rig.log(LogPage::SUPPORTED_LOG_PAGES, 1024).unwrap();
    let lids: Vec<usize> = (0..256).filter(|lid| supported[lid * 4] == 1).collect();
    assert_eq!(lids, [0, 1, 2, 3, 4, 5, 0x12]);
    for lid in (0..=255).map(LogPage).filter(|lid| !lids.contains(&usize::from(lid.0))) {
        assert_eq!(rig.log(lid, 512), Err(Status::INVALID_LOG_PAGE.dnr()), "{lid:?}");
    }
    let features = rig.log(LogPage::FEATURES_SUPPORTED, 1024).unwrap();
    assert_eq!(features[4 * 7], 1);
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
    let invalid = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
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
    assert_eq!(rig.run(sqe), Err(Status::INVALID_FIELD_IN_COMMAND.dnr()), "no SMART per namespace");
}

#[test]
fn features() {
    let mut rig = Rig::io();
    let invalid = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    let supported = [0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x0a, 0x0b, 0x0e, 0x0f, 0x16, 0x81];
    for fid in (0..=255u8).filter(|fid| !supported.contains(fid)) {
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
fn queues() {
    let mut rig = Rig::io();
    assert_eq!(rig.ctrl.io_queues_granted(), 64);
    assert_eq!(rig.set_feature(Feature::NUMBER_OF_QUEUES, 0xfffe << 16 | 0xfffe), Ok(0x3f_003f));
    let invalid = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    assert_eq!(rig.set_feature(Feature::NUMBER_OF_QUEUES, 0xffff), invalid);
    assert_eq!(rig.set_feature(Feature::NUMBER_OF_QUEUES, 7 << 16 | 1), Ok(1 << 16 | 1));
    assert_eq!(rig.get_feature(Feature::NUMBER_OF_QUEUES, 0, 0, 0), Ok(1 << 16 | 1));

    assert_eq!(rig.ctrl.connect_io(&connect(1)), Ok(()));
    assert_eq!(rig.ctrl.connect_io(&connect(1)), Err(ConnectReject::SEQUENCE));
    assert_eq!(rig.ctrl.connect_io(&connect(3)), Err(ConnectReject::QID));
    assert_eq!(rig.ctrl.connect_io(&connect(0)), Err(ConnectReject::QID));
    let change = |f: &dyn Fn(&mut ConnectRequest)| {
        let mut request = connect(2);
        f(&mut request);
        request
    };
    type Change<'a> = &'a dyn Fn(&mut ConnectRequest);
    let cases: [(Change<'_>, ConnectReject); 5] = [
        (&|r| r.cntlid = 1, ConnectReject::CNTLID),
        (&|r| r.subnqn = Nqn::discovery(), ConnectReject::SUBNQN),
        (&|r| r.hostnqn = Nqn::discovery(), ConnectReject::HOSTNQN),
        (&|r| r.hostid = [1; 16], ConnectReject::HOSTID),
        (&|r| r.queue_entries = 129, ConnectReject::SQSIZE),
    ];
    for (f, reject) in cases {
        assert_eq!(rig.ctrl.connect_io(&change(f)), Err(reject));
    }
    let sequence = Err(Status::COMMAND_SEQUENCE_ERROR.dnr());
    assert_eq!(rig.set_feature(Feature::NUMBER_OF_QUEUES, 0), sequence);
    rig.ctrl.disconnect_io(1);
    assert_eq!(rig.ctrl.io_queues_connected(), 0);
    rig.ctrl.disconnect_io(9999);
    assert_eq!(rig.ctrl.connect_io(&connect(1)), Ok(()));

    rig.set(Property::CC, 0).unwrap();
    assert_eq!(rig.ctrl.io_queues_connected(), 0, "a reset deletes the queues");
    assert_eq!(rig.ctrl.connect_io(&connect(1)), Err(ConnectReject::SEQUENCE));
}

#[test]
fn admitting_an_admin_queue() {
    let subsys = sample();
    let good = ConnectRequest { cntlid: 0xffff, ..connect(0) };
    assert_eq!(admit_admin(&good, &subsys), Ok(()));
    let cases = [
        (ConnectRequest { qid: 1, ..good.clone() }, ConnectReject::QID),
        (ConnectRequest { queue_entries: 129, ..good.clone() }, ConnectReject::SQSIZE),
        (ConnectRequest { kato: MS(600_001), ..good.clone() }, ConnectReject::KATO),
        (ConnectRequest { cntlid: 1, ..good.clone() }, ConnectReject::CNTLID),
    ];
    for (request, reject) in cases {
        assert_eq!(admit_admin(&request, &subsys), Err(reject));
    }
}

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
fn abort_is_truthful() {
    let mut rig = Rig::io();
    let mut aer = Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0);
    aer.cid.set(0x77);
    rig.run(aer).unwrap();
    let mut abort = Sqe::new(AdminOpcode::ABORT.0);
    abort.cdw10.set(0x77 << 16 | 1);
    assert_eq!(rig.run(abort), Ok(1), "another queue: not aborted");
    abort.cdw10.set(0x77 << 16);
    assert_eq!(rig.run(abort), Ok(0));
    assert_eq!(rig.ctrl.poll_event(), Some((5, Status::COMMAND_ABORT_REQUESTED, 0)));
    assert_eq!(rig.run(abort), Ok(1));
}

#[test]
fn keep_alive_expiry() {
    let mut rig = Rig::io();
    assert!(!rig.ctrl.is_expired(MS(9_999)));
    assert!(rig.ctrl.is_expired(MS(10_000)));
    rig.now = MS(7_000);
    rig.run(Sqe::new(AdminOpcode::KEEP_ALIVE.0)).unwrap();
    assert_eq!(rig.ctrl.deadline(), Some(MS(15_000)));
    rig.ctrl.touch(MS(10_001));
    assert_eq!(rig.ctrl.deadline(), Some(MS(20_000)));
}

#[test]
fn discovery_controller() {
    let mut rig = Rig::discovery();
    let bytes = rig.identify(Cns::CONTROLLER, 0).unwrap();
    let id = IdentifyController::ref_from_bytes(&bytes).unwrap();
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
    let invalid = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    assert_eq!(rig.identify(Cns::NAMESPACE, 1), invalid);
    assert_eq!(rig.log(LogPage::SMART, 512), Err(Status::INVALID_LOG_PAGE.dnr()));
    assert_eq!(
        rig.get_feature(Feature::NUMBER_OF_QUEUES, 0, 0, 0),
        Err(Status::INVALID_FIELD_IN_COMMAND.dnr())
    );
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

mod random {
    use proptest::prelude::*;

    use super::*;

    /// Random SQEs, biased towards real opcodes and plausible values so that depth is reached.
    fn sqes() -> impl Strategy<Value = Sqe> {
        let opcode = prop_oneof![
            Just(0x02u8),
            Just(0x06),
            Just(0x08),
            Just(0x09),
            Just(0x0a),
            Just(0x0c),
            Just(0x18),
            Just(0x7f),
            any::<u8>()
        ];
        let word = || prop_oneof![0u32..=0x20, any::<u32>(), Just(0x0046_0001)];
        let descriptor = prop_oneof![Just(0x5au8), Just(0x01), any::<u8>()];
        let len = prop_oneof![Just(4096u32), 0u32..2048, any::<u32>()];
        let flags = prop_oneof![Just(0x40u8), any::<u8>()];
        (any::<[u8; 64]>(), opcode, descriptor, len, flags, [word(), word(), word()], word())
            .prop_map(|(bytes, opcode, identifier, len, flags, [cdw10, cdw11, cdw12], nsid)| {
                let mut sqe = Sqe::from_bytes(&bytes);
                sqe.opcode = opcode;
                sqe.flags = flags;
                sqe.dptr.identifier = identifier;
                sqe.dptr.length.set(len);
                sqe.nsid.set(nsid);
                sqe.cdw10.set(cdw10);
                sqe.cdw11.set(cdw11);
                sqe.cdw12.set(cdw12);
                sqe
            })
    }

    proptest! {
        /// Whatever arrives: one outcome, never more data than the command has room for, events
        /// complete held slots only, and the bounds hold.
        #[test]
        fn admin(commands in proptest::collection::vec((sqes(), any::<bool>()), 1..60)) {
            for mut rig in [Rig::io(), Rig::discovery()] {
                let mut held = 0usize;
                for (slot, &(sqe, has_data)) in commands.iter().enumerate() {
                    let needed = Controller::needs_host_data(&sqe);
                    prop_assert!(needed <= 4096);
                    let data = vec![0xa5; if has_data { needed as usize } else { 0 }];
                    let room = rig.ctrl.host_data_max(&sqe);
                    match rig.ctrl.admin(slot as u16, &sqe, &data, &mut rig.out, rig.now) {
                        AdminOutcome::Complete { status, .. } => {
                            prop_assert!(status.is_success() || rig.out.is_empty());
                        }
                        AdminOutcome::ResetQueues { .. } => rig.ctrl.queues_closed(rig.now),
                        AdminOutcome::Abort { .. } => rig.ctrl.abort_done(),
                        AdminOutcome::SubsystemReset { .. } => break,
                        outcome => {
                            prop_assert_eq!(outcome, AdminOutcome::Pending);
                            held += 1;
                        }
                    }
                    prop_assert!(rig.out.len() <= room as usize);
                    while rig.ctrl.poll_event().is_some() {
                        held -= 1;
                    }
                    prop_assert!(held <= AER_MAX);
                    rig.now += MS(1);
                }
            }
        }

        /// A decoded I/O command lies inside its namespace.
        #[test]
        fn io(sqe in sqes(), opcode in prop_oneof![0u8..12, any::<u8>()], nsid in 0u32..12) {
            let subsys = sample();
            let mut sqe = sqe;
            sqe.opcode = opcode;
            sqe.nsid.set(nsid);
            if let Ok(command) = io::decode(&sqe, &subsys) {
                let ns = subsys.namespace(command.nsid()).unwrap();
                let (offset, len) = match command {
                    io::IoCommand::Read { offset, len, .. } | io::IoCommand::Write { offset, len, .. } => {
                        prop_assert!(len <= subsys.limits().mdts_bytes);
                        (offset, u64::from(len))
                    }
                    io::IoCommand::WriteZeroes { offset, len, .. } => (offset, len),
                    _ => (0, u64::from(ns.block_bytes)),
                };
                prop_assert!(len > 0 && offset % u64::from(ns.block_bytes) == 0);
                prop_assert!(len % u64::from(ns.block_bytes) == 0);
                prop_assert!(offset.checked_add(len).is_some_and(|end| end <= ns.size_bytes()));
            }
        }

        /// Any Connect is either a request or a refusal with an error status.
        #[test]
        fn connect_command(bytes in any::<[u8; 64]>(), data in proptest::collection::vec(any::<u8>(), 1020..1028)) {
            match ConnectRequest::parse(&Sqe::from_bytes(&bytes), &data) {
                Ok(request) => prop_assert!(request.queue_entries >= 2),
                Err(reject) => prop_assert!(!reject.status.is_success()),
            }
        }
    }
}
