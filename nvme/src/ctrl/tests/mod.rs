mod commands;
mod discovery;
mod events;
mod features;
mod identify;
mod logs;
mod random;
mod support;

use zerocopy::FromBytes;

use super::*;
use crate::spec::{
    AdminOpcode, Cap, Cc, Cns, Csts, FabricsType, Feature, GetLogPage, IdentifyController,
    IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent, LogPage, NSID_ALL,
    Property, SglDescriptor, Sqe,
};
use crate::subsys::ana::{AnaGroup, AnaState};
use crate::subsys::discovery::DiscoveryEntry;
use crate::subsys::tests::sample;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A command that is held.
const PENDING: u64 = u64::MAX;
/// A command that is the driver's; see [`Rig::asked`].
const ASKED: u64 = u64::MAX - 1;

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT.dnr();

/// A controller and the few lines a driver needs around it.
struct Rig {
    ctrl: Controller,
    now: Duration,
    out: Vec<u8>,
    data: Vec<u8>,
    /// What the driver was asked for last.
    asked: Option<AdminOutcome>,
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
        Rig { ctrl, now: Duration::ZERO, out: Vec::new(), data: Vec::new(), asked: None }
    }

    fn io() -> Rig {
        Rig::of(sample())
    }

    fn of(subsys: SubsystemInfo) -> Rig {
        let mut rig = Rig::new(ControllerKind::Io, subsys);
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
            AdminOutcome::Pending => Ok(PENDING),
            outcome => {
                self.asked = Some(outcome);
                Ok(ASKED)
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

    fn log_page(&mut self, get: GetLogPage, nsid: u32) -> Result<Vec<u8>, Status> {
        let mut sqe = Sqe::new(AdminOpcode::GET_LOG_PAGE.0);
        sqe.nsid.set(nsid);
        get.apply(&mut sqe);
        sqe.dptr = SglDescriptor::transport(get.len as u32);
        self.run(sqe)?;
        assert_eq!(self.out.len() as u64, get.len);
        Ok(self.out.clone())
    }

    fn log_at(
        &mut self,
        lid: LogPage,
        offset: u64,
        len: u32,
        rae: bool,
    ) -> Result<Vec<u8>, Status> {
        self.log_page(GetLogPage { offset, rae, ..read(lid, len) }, NSID_ALL)
    }

    fn log(&mut self, lid: LogPage, len: u32) -> Result<Vec<u8>, Status> {
        self.log_at(lid, 0, len, false)
    }

    fn set_feature(&mut self, fid: Feature, cdw11: u32) -> Result<u64, Status> {
        self.set_feature_of(0, fid, cdw11)
    }

    fn set_feature_of(&mut self, nsid: u32, fid: Feature, cdw11: u32) -> Result<u64, Status> {
        let mut sqe = Sqe::new(AdminOpcode::SET_FEATURES.0);
        sqe.nsid.set(nsid);
        sqe.cdw10.set(u32::from(fid.0));
        sqe.cdw11.set(cdw11);
        sqe.dptr = SglDescriptor::transport(self.data.len() as u32);
        self.run(sqe)
    }

    fn get_feature_of(&mut self, nsid: u32, fid: Feature, select: u32) -> Result<u64, Status> {
        let mut sqe = Sqe::new(AdminOpcode::GET_FEATURES.0);
        sqe.nsid.set(nsid);
        sqe.cdw10.set(u32::from(fid.0) | select << 8);
        self.run(sqe)
    }

    /// Enables these events and holds a request.
    fn expect_events(&mut self, config: u32) {
        self.set_feature(Feature::ASYNC_EVENT_CONFIGURATION, config).unwrap();
        self.hold_request();
    }

    fn hold_request(&mut self) {
        assert_eq!(self.run(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0)), Ok(PENDING));
    }

    /// Dword 0 of the event that is due.
    fn event(&mut self) -> Option<u64> {
        self.ctrl.poll_event().map(|(_, status, dw0)| {
            assert!(status.is_success());
            dw0
        })
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

/// A Get Log Page command for the head of a page.
fn read(lid: LogPage, len: u32) -> GetLogPage {
    GetLogPage {
        lid,
        lsp: 0,
        rae: false,
        len: u64::from(len),
        lsi: 0,
        offset: 0,
        offset_is_index: false,
        csi: 0,
        uuid_index: 0,
    }
}

/// The sample with reservations on namespaces 1 (kept through power loss) and 3, and two ANA
/// groups: namespace 3 in the second.
fn shared() -> SubsystemInfo {
    let mut namespaces = sample().namespaces().to_vec();
    (namespaces[0].reservations, namespaces[0].ptpl) = (true, true);
    namespaces[1].reservations = true;
    namespaces[1].ana_group = 2;
    let groups = [1, 2].map(|id| AnaGroup::new(id, AnaState::Optimized)).to_vec();
    let base = sample().with_ana_groups(groups).unwrap();
    base.with_namespaces(namespaces).unwrap()
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
    assert_eq!(rig.run(Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0)), Ok(PENDING));

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
