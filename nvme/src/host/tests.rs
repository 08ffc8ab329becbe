use std::sync::Arc;

use proptest::prelude::*;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::discovery::{Client, ClientConfig, ClientState};
use super::*;
use crate::ctrl::{
    AdminOutcome, CROSS_RESET_IMMEDIATE, Controller, ControllerConfig, ControllerKind,
    HealthCounters, Instance, admit_admin,
};
use crate::spec::discovery::SubsystemType;
use crate::spec::{
    AdminOpcode, Cap, Cns, Cqe, IdentifyController, IdentifyNamespace, LbaFormat, NSID_ALL,
    SglDescriptor, Sqe,
};
use crate::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use crate::subsys::tests::sample;
use crate::subsys::{NamespaceInfo, SubsystemInfo};

const MS: fn(u64) -> Duration = Duration::from_millis;

fn names() -> ConnectNames {
    ConnectNames {
        hostnqn: Nqn::new("nqn.2014-08.org.nvmexpress:uuid:h").unwrap(),
        hostid: [9; 16],
        subnqn: sample().nqn().clone(),
    }
}

fn config(nsid: u32) -> SessionConfig {
    SessionConfig {
        names: names(),
        nsid,
        kato: MS(5000),
        queues_wanted: 4,
        queue_entries: 64,
        command_timeout: MS(3000),
        authenticate: Authenticate::Never,
    }
}

/// The controller behind an admin queue: what a driver does, without the wire.
struct Peer {
    subsys: Arc<SubsystemInfo>,
    kind: ControllerKind,
    ctrl: Option<Controller>,
    /// Answer to a Cross-Controller Reset; `None`: not supported. And what was asked.
    cross_reset: Option<(Status, u64)>,
    ended: Option<(u16, Instance)>,
    /// Completions on their way to the host.
    replies: Vec<(u16, Cqe, Vec<u8>)>,
}

impl Peer {
    fn io() -> Peer {
        Peer {
            subsys: Arc::new(sample()),
            kind: ControllerKind::Io,
            ctrl: None,
            cross_reset: None,
            ended: None,
            replies: Vec::new(),
        }
    }

    fn discovery(entries: &[DiscoveryEntry]) -> Peer {
        let base = sample();
        let subsys = SubsystemInfo::discovery(
            *base.serial(),
            *base.model(),
            *base.firmware(),
            *base.limits(),
        );
        let kind = ControllerKind::Discovery(Arc::new(DiscoveryLog::new(1, entries)));
        Peer { subsys: Arc::new(subsys.unwrap()), kind, ..Peer::io() }
    }

    fn ctrl(&mut self) -> &mut Controller {
        self.ctrl.as_mut().expect("connected")
    }

    fn submit(&mut self, command: &AdminCommand, now: Duration) {
        let sqe = Sqe::from_bytes(&command.sqe);
        assert_eq!(sqe.cid.get(), command.tag);
        let payload = command.write.clone().unwrap_or_default();
        let mut out = Vec::new();
        let (status, result) = match &mut self.ctrl {
            None => {
                let request = ConnectRequest::parse(&sqe, &payload).unwrap();
                admit_admin(&request, &self.subsys).unwrap();
                let config = ControllerConfig {
                    cntlid: 0x17,
                    kind: self.kind.clone(),
                    hostnqn: request.hostnqn,
                    hostid: request.hostid,
                    kato: request.kato,
                    subsys: self.subsys.clone(),
                };
                let mut ctrl = Controller::new(config, now);
                if self.cross_reset.is_some() {
                    ctrl.set_instance(NEW);
                }
                self.ctrl = Some(ctrl);
                (Status::SUCCESS, 0x17)
            }
            Some(ctrl) => match ctrl.admin(command.tag, &sqe, &payload, &mut out, now) {
                AdminOutcome::Complete { status, result } => (status, result),
                AdminOutcome::ResetQueues { status, result, .. } => {
                    ctrl.queues_closed(now);
                    (status, result)
                }
                AdminOutcome::CrossReset { cntlid, instance } => {
                    self.ended = Some((cntlid, instance));
                    self.cross_reset.expect("supported")
                }
                outcome => {
                    assert_eq!(outcome, AdminOutcome::Pending);
                    return;
                }
            },
        };
        assert!(out.len() <= command.read_len as usize);
        self.replies.push((command.tag, Cqe::new(command.tag, status, result), out));
    }

    fn events(&mut self) {
        while let Some((slot, status, result)) = self.ctrl().poll_event() {
            self.replies.push((slot, Cqe::new(slot, status, result), Vec::new()));
        }
    }
}

/// Runs both until neither has anything to say.
fn settle(session: &mut Session, peer: &mut Peer, now: Duration) {
    loop {
        let mut progressed = false;
        while let Some(command) = session.next_command(now) {
            peer.submit(&command, now);
            progressed = true;
        }
        peer.events();
        for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
            session.on_completion(tag, &cqe.to_bytes(), &data, now).unwrap();
            progressed = true;
        }
        if !progressed {
            return;
        }
    }
}

fn ready(session: &Session) -> &ReadyInfo {
    match session.state() {
        SessionState::Ready(info) => info,
        state => panic!("not ready: {state:?}"),
    }
}

const NEW: Instance = Instance { ciu: 2, cirn: 22 };
const OLD: OldController = OldController {
    cntlid: 0x16,
    instance: Some(Instance { ciu: 1, cirn: 0xa1b2_c3d4_e5f6_0718 }),
    safe_at: Duration::from_secs(60),
};

fn after_loss(cross_reset: Option<(Status, u64)>, old: OldController) -> (Session, Peer) {
    let mut peer = Peer { cross_reset, ..Peer::io() };
    let mut session = Session::new(SessionConfig { kato: MS(0), ..config(1) }, MS(0));
    session.end_old(old);
    settle(&mut session, &mut peer, MS(0));
    (session, peer)
}

#[test]
fn old_controller_is_ended_before_the_new_one_is_used() {
    let gone = (Status::INVALID_CONTROLLER_IDENTIFIER.dnr(), 0);
    for answer in [(Status::SUCCESS, CROSS_RESET_IMMEDIATE), gone] {
        let (session, peer) = after_loss(Some(answer), OLD);
        assert_eq!(peer.ended, OLD.instance.map(|instance| (OLD.cntlid, instance)));
        assert_eq!(ready(&session).controller.instance, Some(NEW));
    }
}

#[test]
fn old_controller_that_cannot_be_ended_is_outlived() {
    let unnamed = OldController { instance: None, ..OLD };
    let busy = (Status::COMMAND_INTERRUPTED, 0);
    let not_immediate = (Status::SUCCESS, 0);
    for (cross_reset, old) in
        [(None, OLD), (Some(busy), OLD), (Some(not_immediate), OLD), (Some(busy), unnamed)]
    {
        let (mut session, mut peer) = after_loss(cross_reset, old);
        assert_eq!(session.state(), SessionState::Connecting, "{cross_reset:?}");
        assert_eq!(session.deadline(), Some(OLD.safe_at));
        settle(&mut session, &mut peer, OLD.safe_at - MS(1));
        assert_eq!(session.state(), SessionState::Connecting, "{cross_reset:?}");
        settle(&mut session, &mut peer, OLD.safe_at);
        ready(&session);
    }
}

#[test]
fn session_against_controller() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(1), MS(0));
    assert_eq!(session.state(), SessionState::Connecting);
    settle(&mut session, &mut peer, MS(0));

    let info = ready(&session).clone();
    assert_eq!((info.cntlid, info.queues, info.queue_entries), (0x17, 4, 64));
    assert_eq!((info.in_capsule_bytes, info.transfer_bytes_max), (4096, 1 << 20));
    let ns = info.namespace.as_ref().unwrap();
    assert_eq!((ns.block_bytes, ns.blocks, ns.uuid, ns.nguid), (512, 2048, [1; 16], [0x11; 16]));
    assert!(ns.write_cache && ns.deallocate && ns.write_zeroes && ns.deallocated_reads_zero);
    assert!(!ns.read_only);
    assert_eq!((ns.write_zeroes_blocks_max, ns.deallocate_granularity_bytes), (65536, 4096));
    assert_eq!(info.controller.model.as_str(), "Penstock");

    // The queues that were granted can be connected.
    for qid in 1..=info.queues {
        let (sqe, data) = io_connect(&names(), info.cntlid, qid, info.queue_entries);
        let request = ConnectRequest::parse(&Sqe::from_bytes(&sqe), &data).unwrap();
        peer.ctrl().connect_io(&request).unwrap();
    }

    // Keep alive at half the timeout keeps the association alive.
    let mut now = MS(0);
    for _ in 0..20 {
        let deadline = session.deadline().unwrap();
        assert!(deadline > now && deadline <= now + MS(2500), "{deadline:?}");
        now = deadline;
        settle(&mut session, &mut peer, now);
        assert!(!peer.ctrl().is_expired(now));
    }

    // The namespace grows: event, log page, identify again.
    let mut namespaces = sample().namespaces().to_vec();
    namespaces[0].blocks = 4096;
    peer.ctrl().update_subsys(Arc::new(sample().with_namespaces(namespaces).unwrap()));
    settle(&mut session, &mut peer, now);
    assert!(!session.take_changed());
    now = session.deadline().unwrap();
    settle(&mut session, &mut peer, now);
    assert!(session.take_changed() && !session.take_changed());
    assert_eq!(ready(&session).namespace.as_ref().unwrap().blocks, 4096);

    session.shutdown(now);
    assert_eq!(session.state(), SessionState::ShuttingDown);
    settle(&mut session, &mut peer, now);
    assert_eq!(session.state(), SessionState::Closed);
    assert_eq!(session.deadline(), None);
    assert!(!peer.ctrl().is_ready());
}

#[test]
fn ana_state_is_known_and_followed() {
    use crate::subsys::ana::{AnaGroup, AnaState};
    let with = |state| {
        let group = AnaGroup { id: 1, state, change_count: 1 };
        Arc::new(sample().with_ana_groups(vec![group]).unwrap())
    };
    let mut peer = Peer::io();
    peer.subsys = with(AnaState::NonOptimized);
    let mut session = Session::new(config(1), MS(0));
    settle(&mut session, &mut peer, MS(0));
    let info = ready(&session);
    assert_eq!(info.controller.ana.unwrap().transition_time, Duration::from_secs(10));
    assert_eq!(info.namespace.as_ref().unwrap().ana, Some(AnaState::NonOptimized));
    let mut now = MS(0);
    for state in [AnaState::Inaccessible, AnaState::Change, AnaState::Optimized] {
        peer.ctrl().update_subsys(with(state));
        settle(&mut session, &mut peer, now);
        now += EVENT_PAUSE;
        settle(&mut session, &mut peer, now);
        assert!(session.take_changed());
        assert_eq!(ready(&session).namespace.as_ref().unwrap().ana, Some(state));
        now += EVENT_PAUSE;
    }
    // An I/O error is as good as an event.
    session.rescan(now);
    settle(&mut session, &mut peer, now + EVENT_PAUSE);
    assert!(!session.take_changed());
}

#[test]
fn a_session_of_no_namespace_lists_them() {
    let mut peer = Peer::io();
    let with = |nsids: &[u32]| {
        let like = sample().namespaces()[0].clone();
        let one = |nsid: &u32| NamespaceInfo { nsid: *nsid, ..like.clone() };
        Arc::new(sample().with_namespaces(nsids.iter().map(one).collect()).unwrap())
    };
    peer.subsys = with(&[]);
    let mut session = Session::new(config(NSID_ALL), MS(0));
    settle(&mut session, &mut peer, MS(0));
    let info = ready(&session);
    assert_eq!((info.namespace.is_none(), &info.attached[..], info.queues), (true, &[][..], 0));
    let mut now = MS(0);
    for nsids in [&[3][..], &[1, 3, 7], &[1]] {
        peer.ctrl().update_subsys(with(nsids));
        settle(&mut session, &mut peer, now);
        assert!(!session.take_changed());
        now += EVENT_PAUSE;
        settle(&mut session, &mut peer, now);
        assert!(session.take_changed());
        assert_eq!(ready(&session).attached, nsids);
        now += EVENT_PAUSE;
    }
    // Nothing is asked but keep alive while nothing happens.
    assert_eq!(session.deadline(), Some(MS(2500)));
}

/// Answers of a controller to a session of no namespace, one step after the other: it does not know
/// events of its health, as Linux's target, and then none at all.
#[test]
fn a_list_is_read_from_time_to_time_where_nothing_tells() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(NSID_ALL), MS(0));
    let mut refused = 0;
    let mut now = MS(0);
    let mut lists = 0;
    while now <= MS(60_000) {
        let mut progressed = false;
        while let Some(command) = session.next_command(now) {
            progressed = true;
            let sqe = Sqe::from_bytes(&command.sqe);
            let is = |opcode: AdminOpcode| sqe.opcode == opcode.0;
            lists += u32::from(is(AdminOpcode::IDENTIFY) && sqe.cdw10.get() == 2);
            if is(AdminOpcode::SET_FEATURES) && sqe.cdw10.get() == 0x0b {
                refused += 1;
                let status = Status::INVALID_FIELD_IN_COMMAND.dnr();
                let cqe = Cqe::new(command.tag, status, 0);
                peer.replies.push((command.tag, cqe, Vec::new()));
            } else {
                peer.submit(&command, now);
            }
        }
        for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
            session.on_completion(tag, &cqe.to_bytes(), &data, now).unwrap();
            progressed = true;
        }
        if !progressed {
            now = session.deadline().unwrap();
        }
    }
    assert_eq!(refused, 1, "it has no events of health to leave out");
    assert!((6..=8).contains(&lists), "{lists} in a minute");
}

#[test]
fn lists_out_of_order_are_refused() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(NSID_ALL), MS(0));
    while let Some(command) = session.next_command(MS(0)) {
        let is_list = Sqe::from_bytes(&command.sqe).opcode == AdminOpcode::IDENTIFY.0
            && Sqe::from_bytes(&command.sqe).cdw10.get() == 2;
        peer.submit(&command, MS(0));
        for (tag, cqe, mut data) in core::mem::take(&mut peer.replies) {
            if is_list {
                data[..12].copy_from_slice(&[5, 0, 0, 0, 9, 0, 0, 0, 9, 0, 0, 0]);
            }
            let told = session.on_completion(tag, &cqe.to_bytes(), &data, MS(0));
            if is_list {
                let what = "namespace out of order";
                assert_eq!(told, Err(SessionError::Invalid { what, value: 9 }));
                return;
            }
            told.unwrap();
        }
    }
    panic!("no list was read");
}

#[test]
fn wear_is_read_once_a_minute_and_made_up_by_nobody() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(1), MS(0));
    settle(&mut session, &mut peer, MS(0));
    assert_eq!(ready(&session).wear, None, "a page that says nothing");
    let worn = HealthCounters {
        percentage_used: 255,
        available_spare_percent: 3,
        available_spare_threshold_percent: 5,
        critical_warning: 0b1010_1111,
        ..HealthCounters::default()
    };
    peer.ctrl().set_health(worn);
    // An event tells of the warnings.
    settle(&mut session, &mut peer, MS(0));
    settle(&mut session, &mut peer, MS(1000));
    assert!(session.take_changed());
    let wear = Wear {
        percentage_used: 255,
        spare_percent: 3,
        spare_threshold_percent: 5,
        critical_warning: 0b0010_1101,
    };
    assert_eq!(ready(&session).wear, Some(wear));
    let impossible = HealthCounters { available_spare_percent: 101, ..worn };
    peer.ctrl().set_health(impossible);
    while ready(&session).wear.is_some() {
        let now = session.deadline().unwrap();
        assert!(now <= MS(62_000), "not asked again");
        settle(&mut session, &mut peer, now);
    }
}

/// Longer than from an event to what follows from it.
const EVENT_PAUSE: Duration = Duration::from_millis(60);

#[test]
fn a_ready_session_ends_controllers_on_other_paths() {
    let refused = (Status::INTERNAL_ERROR, 0);
    for (answer, want) in [
        ((Status::SUCCESS, CROSS_RESET_IMMEDIATE), true),
        ((Status::INVALID_CONTROLLER_IDENTIFIER.dnr(), 0), true),
        ((Status::SUCCESS, 0), false),
        (refused, false),
    ] {
        let mut peer = Peer { cross_reset: Some(answer), ..Peer::io() };
        let mut session = Session::new(config(1), MS(0));
        assert!(!session.end_other(OLD), "not ready");
        settle(&mut session, &mut peer, MS(0));
        assert!(session.end_other(OLD) && !session.end_other(OLD), "one at a time");
        assert_eq!(session.deadline(), Some(Duration::ZERO));
        settle(&mut session, &mut peer, MS(0));
        assert_eq!(peer.ended, Some((OLD.cntlid, OLD.instance.unwrap())));
        assert_eq!((session.take_other_ended(), session.take_other_ended()), (Some(want), None));
        ready(&session);
    }
    let mut peer = Peer::io();
    let mut session = Session::new(config(1), MS(0));
    settle(&mut session, &mut peer, MS(0));
    assert!(!session.end_other(OLD), "the target cannot");
}

#[test]
fn what_a_namespace_can_do() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(1), MS(0));
    settle(&mut session, &mut peer, MS(0));
    let ns = ready(&session).namespace.as_ref().unwrap();
    assert!(ns.compare && ns.compare_and_write);
    assert_eq!(ns.verify_blocks_max, 65536, "VSL is 32 MiB");
    let copy = CopyLimits { ranges_max: 128, range_blocks_max: 8192, blocks_max: 65536 };
    assert_eq!((ns.copy, ns.rescap), (Some(copy), 0));

    let mut controller = good_controller();
    controller.oncs = U16::new(0x1a1);
    controller.cdfs = U16::new(1);
    let mut id = good_namespace();
    (id.mssrl, id.mcl, id.msrc_z, id.rescap) = (U16::new(64), U32::new(100), 255, 0x7f);
    let session = scan(controller.clone(), &id).unwrap();
    let ns = ready(&session).namespace.as_ref().unwrap();
    let copy = CopyLimits { ranges_max: 128, range_blocks_max: 64, blocks_max: 100 };
    assert_eq!((ns.copy, ns.rescap), (Some(copy), 0x7f));
    assert!(ns.compare && !ns.compare_and_write, "FUSES is 0");
    assert_eq!(ns.verify_blocks_max, 65536, "VSL 0: no limit");
    controller.cdfs = U16::new(2);
    let session = scan(controller, &id).unwrap();
    assert_eq!(ready(&session).namespace.as_ref().unwrap().copy, None, "no format that is known");
    let session = scan(good_controller(), &id).unwrap();
    let ns = ready(&session).namespace.as_ref().unwrap();
    assert_eq!((ns.compare, ns.verify_blocks_max, ns.copy, ns.rescap), (false, 0, None, 0));
}

#[test]
fn per_namespace_write_cache_and_protection() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(3), MS(0));
    settle(&mut session, &mut peer, MS(0));
    let ns = ready(&session).namespace.as_ref().unwrap();
    assert!(ns.read_only && !ns.write_cache, "VWCNP");
    assert_eq!((ns.block_bytes, ns.write_zeroes_blocks_max), (4096, 8192), "WZSL is 32 MiB");
}

#[test]
fn a_namespace_that_is_not_there() {
    let mut peer = Peer::io();
    let mut session = Session::new(config(2), MS(0));
    let mut failed = None;
    for _ in 0..40 {
        let Some(command) = session.next_command(MS(0)) else { break };
        peer.submit(&command, MS(0));
        for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
            failed = session.on_completion(tag, &cqe.to_bytes(), &data, MS(0)).err().or(failed);
        }
    }
    assert_eq!(failed, Some(SessionError::NoNamespace(2)));
    assert_eq!(session.state(), SessionState::Failed(&SessionError::NoNamespace(2)));
    assert!(session.next_command(MS(0)).is_none());
}

#[test]
fn silence_is_noticed() {
    let mut session = Session::new(config(1), MS(0));
    session.next_command(MS(0)).unwrap();
    assert_eq!(session.deadline(), Some(MS(3000)));
    assert!(session.next_command(MS(2999)).is_none());
    assert_eq!(session.state(), SessionState::Connecting);
    assert!(session.next_command(MS(3000)).is_none());
    assert!(matches!(session.state(), SessionState::Failed(SessionError::Timeout { .. })));

    let mut peer = Peer::io();
    let mut session = Session::new(config(1), MS(0));
    settle(&mut session, &mut peer, MS(0));
    let keep_alive = session.next_command(MS(2500)).unwrap();
    assert_eq!(Sqe::from_bytes(&keep_alive.sqe).opcode, AdminOpcode::KEEP_ALIVE.0);
    assert!(session.next_command(MS(7500)).is_none());
    let error = SessionError::Timeout { what: "Keep Alive", after: MS(5000) };
    assert_eq!(session.state(), SessionState::Failed(&error));
}

#[test]
fn refusals_are_put_in_words() {
    let mut session = Session::new(config(1), MS(0));
    let command = session.next_command(MS(0)).unwrap();
    let reject = crate::fabrics::ConnectReject::UNKNOWN_SUBSYSTEM;
    let cqe = Cqe::new(command.tag, reject.status, u64::from(reject.dw0));
    let error = session.on_completion(command.tag, &cqe.to_bytes(), &[], MS(0)).unwrap_err();
    assert!(error.to_string().contains("no such subsystem"), "{error}");
    assert!(!error.is_permanent());
    assert!(
        SessionError::Refused { status: Status::CONNECT_INVALID_HOST.dnr(), dw0: 0 }.is_permanent()
    );
}

#[test]
fn a_controller_that_never_gets_ready_or_fails() {
    for (csts, expected) in [
        (0u64, SessionError::Timeout { what: "CSTS.RDY", after: MS(5000) }),
        (2, SessionError::Fatal),
    ] {
        let mut session = Session::new(config(1), MS(0));
        let mut now = MS(0);
        let mut polls = 0;
        let error = loop {
            let Some(command) = session.next_command(now) else {
                now = session.deadline().unwrap();
                continue;
            };
            let result = match polls {
                0 => 0x17,
                1 => Cap::CSS_NVM | 127,
                _ => csts,
            };
            polls += 1;
            let cqe = Cqe::new(command.tag, Status::SUCCESS, result);
            if let Err(error) = session.on_completion(command.tag, &cqe.to_bytes(), &[], now) {
                break error;
            }
        };
        assert_eq!(error, expected);
        assert!(polls < 600, "polling is paced: {polls}");
    }
}

/// A session one step before Identify Controller, and the tag of that step.
fn at_identify() -> (Session, AdminCommand) {
    let mut session = Session::new(config(1), MS(0));
    for result in [0x17, Cap::CSS_NVM | 127, 0, 1, 0x20000] {
        let command = session.next_command(MS(0)).unwrap();
        let cqe = Cqe::new(command.tag, Status::SUCCESS, result);
        session.on_completion(command.tag, &cqe.to_bytes(), &[], MS(0)).unwrap();
    }
    let command = session.next_command(MS(0)).unwrap();
    assert_eq!(command.read_len, 4096);
    (session, command)
}

fn good_controller() -> IdentifyController {
    let mut id = IdentifyController::new_zeroed();
    id.cntlid = U16::new(0x17);
    id.cntrltype = 1;
    id.kas = U16::new(10);
    id.ioccsz = U32::new(4);
    id.iorcsz = U32::new(1);
    id.sgls = U32::new(1);
    id.maxcmd = U16::new(128);
    id
}

#[test]
fn impossible_controllers_are_refused() {
    let ok = Cqe::new(0, Status::SUCCESS, 0).to_bytes();
    let (mut session, command) = at_identify();
    session.on_completion(command.tag, &ok, good_controller().as_bytes(), MS(0)).unwrap();

    type Damage = fn(&mut IdentifyController);
    let damages: [(&str, Damage); 8] = [
        ("controller ID", |id| id.cntlid = U16::new(1)),
        ("KAS", |id| id.kas = U16::ZERO),
        ("IOCCSZ", |id| id.ioccsz = U32::new(3)),
        ("IOCCSZ", |id| id.ioccsz = U32::new(u32::MAX)),
        ("IORCSZ", |id| id.iorcsz = U32::ZERO),
        ("SGLS", |id| id.sgls = U32::ZERO),
        ("ICDOFF", |id| id.icdoff = U16::new(1)),
        ("controller type", |id| id.cntrltype = 2),
    ];
    for (name, damage) in damages {
        let (mut session, command) = at_identify();
        let mut id = good_controller();
        damage(&mut id);
        let error = session.on_completion(command.tag, &ok, id.as_bytes(), MS(0)).unwrap_err();
        assert!(error.to_string().contains(name), "{name}: {error}");
        assert!(error.is_permanent());
    }
    let (mut session, command) = at_identify();
    let error = session.on_completion(command.tag, &ok, &[0; 4095], MS(0)).unwrap_err();
    assert!(matches!(error, SessionError::Length { len: 4095, expected: 4096, .. }));
    let (mut session, _) = at_identify();
    assert_eq!(session.on_completion(7, &ok, &[], MS(0)), Err(SessionError::UnknownTag(7)));
}

fn good_namespace() -> IdentifyNamespace {
    let mut id = IdentifyNamespace::new_zeroed();
    id.nsze = U64::new(1024);
    id.lbaf[0] = LbaFormat { ms: U16::ZERO, lbads: 9, rp: 0 };
    id
}

/// Brings a session to Identify Namespace, answers it with `id`, and the rest with success.
fn scan(
    mut controller: IdentifyController,
    id: &IdentifyNamespace,
) -> Result<Session, SessionError> {
    let (mut session, command) = at_identify();
    controller.cntlid = U16::new(0x17);
    let ok = |tag, result| Cqe::new(tag, Status::SUCCESS, result).to_bytes();
    session.on_completion(command.tag, &ok(0, 0), controller.as_bytes(), MS(0))?;
    while let Some(command) = session.next_command(MS(0)) {
        let sqe = Sqe::from_bytes(&command.sqe);
        let is_namespace =
            sqe.opcode == AdminOpcode::IDENTIFY.0 && sqe.cdw10.get() == u32::from(Cns::NAMESPACE.0);
        let zeroes = vec![0; command.read_len as usize];
        let data = if is_namespace { id.as_bytes() } else { &zeroes };
        if sqe.opcode != AdminOpcode::ASYNC_EVENT_REQUEST.0 {
            session.on_completion(command.tag, &ok(command.tag, 0), data, MS(0))?;
        }
    }
    Ok(session)
}

#[test]
fn impossible_namespaces_are_refused() {
    let session = scan(good_controller(), &good_namespace()).unwrap();
    let info = ready(&session);
    let ns = info.namespace.as_ref().unwrap();
    assert_eq!((info.queues, ns.block_bytes, ns.blocks), (1, 512, 1024));
    assert_eq!(info.transfer_bytes_max, u32::MAX, "MDTS 0: no limit");

    type Damage = fn(&mut IdentifyNamespace);
    let damages: [(&str, Damage); 8] = [
        ("no active namespace", |id| id.nsze = U64::ZERO),
        ("LBADS", |id| id.lbaf[0].lbads = 8),
        ("LBADS", |id| id.lbaf[0].lbads = 17),
        ("LBADS", |id| id.lbaf[0].lbads = 255),
        ("metadata", |id| id.lbaf[0].ms = U16::new(8)),
        ("protection", |id| id.dps = 1),
        ("size", |id| id.nsze = U64::new(u64::MAX)),
        ("LBADS", |id| id.flbas = 0x6f),
    ];
    for (name, damage) in damages {
        let mut id = good_namespace();
        damage(&mut id);
        let error = scan(good_controller(), &id).unwrap_err();
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
    let mut controller = good_controller();
    controller.mdts = 1;
    let mut id = good_namespace();
    id.lbaf[0].lbads = 16;
    let error = scan(controller, &id).unwrap_err();
    assert!(error.to_string().contains("MDTS"), "{error}");
}

#[test]
fn shutdown_before_the_controller_is_enabled() {
    let mut session = Session::new(config(1), MS(0));
    session.next_command(MS(0)).unwrap();
    session.shutdown(MS(0));
    assert_eq!(session.state(), SessionState::Closed);
}

fn entries(count: u16) -> Vec<DiscoveryEntry> {
    let nqn = |n| Nqn::new(&format!("nqn.2024-01.io.penstock:db{n}")).unwrap();
    let addr = "127.0.0.1:4420".parse().unwrap();
    (0..count).map(|n| DiscoveryEntry::tcp(SubsystemType::NVM, addr, n, nqn(n))).collect()
}

/// Runs a client; `between` is called before each command is submitted.
fn discover(peer: &mut Peer, mut between: impl FnMut(&mut Peer, &Sqe)) -> Client {
    let names = ConnectNames { subnqn: Nqn::discovery(), ..names() };
    let mut client = Client::new(ClientConfig {
        names,
        command_timeout: MS(1000),
        kato: MS(0),
        authenticate: Authenticate::Never,
    });
    while let Some(command) = client.next_command(MS(0)) {
        between(peer, &Sqe::from_bytes(&command.sqe));
        peer.submit(&command, MS(0));
        for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
            let _ = client.on_completion(tag, &cqe.to_bytes(), &data, MS(0));
        }
    }
    client
}

#[test]
fn discovery_client_against_controller() {
    for count in [0, 1, 3, 4, 5, 9] {
        let mut peer = Peer::discovery(&entries(count));
        let client = discover(&mut peer, |_, _| {});
        let ClientState::Done(result) = client.state() else { panic!("{:?}", client.state()) };
        let found: Vec<_> = result.entries.iter().cloned().map(Result::unwrap).collect();
        assert_eq!(found, entries(count));
        assert!(!peer.ctrl().is_ready(), "shut down");
    }
}

#[test]
fn a_log_that_changes_is_read_again_within_bounds() {
    let mut changes = 0;
    let mut peer = Peer::discovery(&entries(6));
    let client = discover(&mut peer, |peer, sqe| {
        let is_record = sqe.opcode == AdminOpcode::GET_LOG_PAGE.0 && sqe.cdw12.get() != 0;
        if is_record && changes < 2 {
            changes += 1;
            peer.ctrl().update_discovery(Arc::new(DiscoveryLog::new(
                1 + changes,
                &entries(6 - changes as u16),
            )));
        }
    });
    let ClientState::Done(result) = client.state() else { panic!("{:?}", client.state()) };
    assert_eq!((result.genctr, result.entries.len()), (3, 4));

    let mut genctr = 1;
    let mut peer = Peer::discovery(&entries(1));
    let client = discover(&mut peer, |peer, sqe| {
        if sqe.opcode == AdminOpcode::GET_LOG_PAGE.0 {
            genctr += 1;
            peer.ctrl().update_discovery(Arc::new(DiscoveryLog::new(genctr, &entries(1))));
        }
    });
    assert_eq!(client.state(), ClientState::Failed(&SessionError::Unstable(11)));
}

/// A client that stays, and the log that it has.
fn watch(peer: &mut Peer) -> Client {
    let names = ConnectNames { subnqn: Nqn::discovery(), ..names() };
    let mut client = Client::new(ClientConfig {
        names,
        command_timeout: MS(1000),
        kato: MS(4000),
        authenticate: Authenticate::Never,
    });
    watch_on(&mut client, peer, MS(0));
    assert!(client.take_read() && !client.take_read());
    client
}

/// Runs both until neither has anything to say.
fn watch_on(client: &mut Client, peer: &mut Peer, now: Duration) {
    loop {
        let mut progressed = false;
        while let Some(command) = client.next_command(now) {
            peer.submit(&command, now);
            progressed = true;
        }
        peer.events();
        for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
            client.on_completion(tag, &cqe.to_bytes(), &data, now).unwrap();
            progressed = true;
        }
        if !progressed {
            return;
        }
    }
}

fn records(client: &Client) -> usize {
    match client.state() {
        ClientState::Done(log) => log.entries.len(),
        state => panic!("{state:?}"),
    }
}

#[test]
fn a_persistent_client_is_told_of_changes_and_keeps_alive() {
    let mut peer = Peer::discovery(&entries(3));
    let mut client = watch(&mut peer);
    assert_eq!(records(&client), 3);
    let mut now = MS(0);
    for (round, count) in [5, 0, 9].into_iter().enumerate() {
        // Nothing happens but keep alives, for longer than the controller waits for them.
        for _ in 0..5 {
            now = client.deadline().expect("a keep alive").max(now);
            watch_on(&mut client, &mut peer, now);
            assert!(!client.take_read());
        }
        assert!(now >= MS(4000) && !peer.ctrl().is_expired(now));
        let log = DiscoveryLog::new(2 + round as u64, &entries(count));
        peer.ctrl().update_discovery(Arc::new(log));
        watch_on(&mut client, &mut peer, now);
        // Soon, not at once: several changes often come together.
        now += EVENT_LATE;
        watch_on(&mut client, &mut peer, now);
        assert!(client.take_read());
        assert_eq!(records(&client), usize::from(count));
    }
}

const EVENT_LATE: Duration = Duration::from_millis(50);

#[test]
fn a_log_that_never_rests_is_read_once_a_second() {
    let mut peer = Peer::discovery(&entries(1));
    let mut client = watch(&mut peer);
    let (mut reads, mut now) = (0, MS(0));
    for round in 0..1000 {
        now = MS(round * 10);
        let log = DiscoveryLog::new(2 + round, &entries(1 + (round % 3) as u16));
        peer.ctrl().update_discovery(Arc::new(log));
        watch_on(&mut client, &mut peer, now);
        reads += u64::from(client.take_read());
    }
    assert!((9..=10).contains(&reads), "{reads} reads until {now:?}");
}

#[test]
fn a_controller_that_tells_nothing_is_asked_every_minute() {
    let mut peer = Peer::discovery(&entries(1));
    let names = ConnectNames { subnqn: Nqn::discovery(), ..names() };
    let mut client = Client::new(ClientConfig {
        names,
        command_timeout: MS(1000),
        kato: MS(4000),
        authenticate: Authenticate::Never,
    });
    let (mut now, mut refused) = (MS(0), 0);
    let mut reads = Vec::new();
    while now < MS(130_000) {
        while let Some(command) = client.next_command(now) {
            let sqe = Sqe::from_bytes(&command.sqe);
            let opcodes = [AdminOpcode::SET_FEATURES.0, AdminOpcode::KEEP_ALIVE.0];
            if opcodes.contains(&sqe.opcode) {
                refused += 1;
                let cqe = Cqe::new(command.tag, Status::INVALID_COMMAND_OPCODE.dnr(), 0);
                client.on_completion(command.tag, &cqe.to_bytes(), &[], now).unwrap();
                continue;
            }
            assert_ne!(sqe.opcode, AdminOpcode::ASYNC_EVENT_REQUEST.0);
            peer.submit(&command, now);
            for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
                client.on_completion(tag, &cqe.to_bytes(), &data, now).unwrap();
            }
        }
        if client.take_read() {
            reads.push(now);
        }
        now = client.deadline().expect("the next reading");
    }
    assert_eq!((reads.as_slice(), refused), (&[MS(0), MS(60_000), MS(120_000)][..], 2));
}

#[test]
fn a_persistent_client_notices_silence() {
    let mut peer = Peer::discovery(&entries(2));
    let mut client = watch(&mut peer);
    let at = client.deadline().expect("a keep alive");
    let command = client.next_command(at).expect("it");
    assert_eq!(Sqe::from_bytes(&command.sqe).opcode, AdminOpcode::KEEP_ALIVE.0);
    assert_eq!(client.deadline(), Some(at + MS(4000)));
    assert_eq!(client.next_command(at + MS(4000)), None);
    let error = SessionError::Timeout { what: "Keep Alive", after: MS(4000) };
    assert_eq!(client.state(), ClientState::Failed(&error));
    assert_eq!(client.deadline(), None);
}

#[test]
fn a_discovery_controller_is_no_io_controller() {
    let mut peer = Peer::discovery(&[]);
    let mut session = Session::new(
        SessionConfig { names: ConnectNames { subnqn: Nqn::discovery(), ..names() }, ..config(1) },
        MS(0),
    );
    let mut error = None;
    while let Some(command) = session.next_command(MS(0)) {
        peer.submit(&command, MS(0));
        for (tag, cqe, data) in core::mem::take(&mut peer.replies) {
            error = session.on_completion(tag, &cqe.to_bytes(), &data, MS(0)).err();
        }
    }
    assert!(error.unwrap().to_string().contains("controller type"));
}

/// How a hostile controller answers one command.
#[derive(Clone, Debug)]
struct Answer {
    tag: Option<u16>,
    cqe: [u8; 16],
    is_success: bool,
    length_off: i8,
    damage: Vec<(u16, u8)>,
    wait_ms: u16,
}

fn answers() -> impl Strategy<Value = Vec<Answer>> {
    let answer = (
        prop_oneof![9 => Just(None), 1 => any::<u16>().prop_map(Some)],
        prop_oneof![
            any::<[u8; 16]>(),
            Just([0x17, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Just([1, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        ],
        prop::bool::weighted(0.9),
        prop_oneof![9 => Just(0i8), 1 => any::<i8>()],
        proptest::collection::vec((0u16..4096, any::<u8>()), 0..24),
        prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
    )
        .prop_map(|(tag, cqe, is_success, length_off, damage, wait_ms)| Answer {
            tag,
            cqe,
            is_success,
            length_off,
            damage,
            wait_ms,
        });
    proptest::collection::vec(answer, 1..60)
}

/// The answer to a command: plausible identify data with damage, or what the strategy says.
fn forge(command: &AdminCommand, answer: &Answer) -> (u16, [u8; 16], Vec<u8>) {
    let sqe = Sqe::from_bytes(&command.sqe);
    let mut data = match (sqe.opcode, sqe.cdw10.get()) {
        (0x06, 1) => good_controller().as_bytes().to_vec(),
        (0x06, 0) => good_namespace().as_bytes().to_vec(),
        _ => vec![0; 4096],
    };
    data.truncate(command.read_len as usize);
    for &(at, byte) in &answer.damage {
        if let Some(b) = data.get_mut(usize::from(at)) {
            *b = byte;
        }
    }
    let len = data.len().saturating_add_signed(isize::from(answer.length_off));
    data.resize(len, 0xff);
    let mut cqe = answer.cqe;
    if answer.is_success {
        cqe[14..].fill(0);
    }
    (answer.tag.unwrap_or(command.tag), cqe, data)
}

proptest! {
    /// Whatever a controller answers: no panic, no endless loop, and what a ready session says is
    /// usable.
    #[test]
    fn hostile_controller(answers in answers(), shutdown_after in 0usize..60) {
        let mut session = Session::new(config(1), MS(0));
        let names = ConnectNames { subnqn: Nqn::discovery(), ..names() };
        let kato = if shutdown_after % 2 == 0 { MS(0) } else { MS(2000) };
        let mut client = Client::new(ClientConfig {
            names,
            command_timeout: MS(1000),
            kato,
            authenticate: Authenticate::Never,
        });
        let mut now = MS(0);
        for (round, answer) in answers.iter().enumerate() {
            if round == shutdown_after {
                session.shutdown(now);
            }
            let mut commands = Vec::new();
            while let Some(command) = session.next_command(now) {
                commands.push(command);
            }
            prop_assert!(commands.len() <= usize::from(TAGS));
            for command in commands {
                let (tag, cqe, data) = forge(&command, answer);
                let _ = session.on_completion(tag, &cqe, &data, now);
            }
            for _ in 0..TAGS {
                let Some(command) = client.next_command(now) else { break };
                let (tag, cqe, data) = forge(&command, answer);
                let _ = client.on_completion(tag, &cqe, &data, now);
            }
            if let SessionState::Ready(info) = session.state() {
                let ns = info.namespace.as_ref().unwrap();
                prop_assert!(ns.block_bytes.is_power_of_two());
                prop_assert!((512..=65536).contains(&ns.block_bytes));
                prop_assert!(ns.blocks > 0 && ns.blocks.checked_mul(u64::from(ns.block_bytes)).is_some());
                prop_assert!(info.transfer_bytes_max >= ns.block_bytes);
                prop_assert!(info.queue_entries >= 2 && info.queue_entries <= 64);
                prop_assert!((1..=4).contains(&info.queues));
                prop_assert!((1..=65536).contains(&ns.write_zeroes_blocks_max));
            }
            now += MS(u64::from(answer.wait_ms) + 1);
            if let Some(deadline) = session.deadline() {
                now = now.max(deadline);
            }
        }
    }

    /// Only what was asked for is believed: a descriptor list of any bytes is parsed to its end.
    #[test]
    fn hostile_descriptors(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
        let (mut session, command) = at_identify();
        let ok = Cqe::new(0, Status::SUCCESS, 0).to_bytes();
        session.on_completion(command.tag, &ok, good_controller().as_bytes(), MS(0)).unwrap();
        while let Some(command) = session.next_command(MS(0)) {
            let data = &bytes[..command.read_len as usize];
            let _ = session.on_completion(command.tag, &ok, data, MS(0));
        }
    }
}

/// The SQE of every admin command says where its data is, in a way a controller accepts.
#[test]
fn data_descriptors() {
    let (_, command) = at_identify();
    let sqe = Sqe::from_bytes(&command.sqe);
    assert_eq!(sqe.dptr, SglDescriptor::transport(4096));
    let mut session = Session::new(config(1), MS(0));
    let connect = session.next_command(MS(0)).unwrap();
    assert_eq!(Sqe::from_bytes(&connect.sqe).dptr, SglDescriptor::in_capsule(0, 1024));
    assert_eq!(connect.write.unwrap().len(), 1024);
    assert!(IdentifyController::ref_from_bytes(good_controller().as_bytes()).is_ok());
}

#[test]
fn nothing_is_sent_between_connect_and_the_end_of_the_authentication() {
    let mut peer = Peer::io();
    let authenticate = Authenticate::Always;
    let mut session = Session::new(SessionConfig { authenticate, ..config(1) }, MS(0));
    settle(&mut session, &mut peer, MS(0));
    assert_eq!(session.authentication(), Some(Authentication::default()));
    assert_eq!(session.next_command(MS(2000)), None);
    session.authenticated();
    settle(&mut session, &mut peer, MS(2000));
    assert_eq!(session.authentication(), None);
    ready(&session);
}

#[test]
fn authentication_commands_have_the_fields_of_the_specification() {
    let send = authentication_send(72);
    assert_eq!((send[0], send[4]), (0x7f, 5));
    assert_eq!(send[40..48], [0, 1, 1, 0xe9, 72, 0, 0, 0]);
    assert_eq!((send[32], send[39]), (72, SglDescriptor::DATA_BLOCK_OFFSET));
    let receive = authentication_receive(4096);
    assert_eq!((receive[4], receive[39]), (6, SglDescriptor::TRANSPORT_DATA_BLOCK));
    assert_eq!(receive[44..48], [0, 16, 0, 0]);
    let asked = Authentication::asked(0x0006_0001);
    assert!(asked.is_required && asked.is_concatenation_required);
    assert_eq!(Authentication::asked(0xffff), Authentication::default());
}
