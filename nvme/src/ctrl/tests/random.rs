//! Whatever a host may send.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::ctrl::QueueChange;
use crate::subsys::Limits;
use crate::subsys::tests::{build, sample};
use crate::xfer::Transport;

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
        // Only PCI functions take these.
        Just(0x00),
        Just(0x01),
        Just(0x04),
        Just(0x05),
        Just(0x7c),
        any::<u8>()
    ];
    let word = || prop_oneof![0u32..=0x20, 0x80u32..=0x84, any::<u32>(), Just(0x0046_0001)];
    let descriptor = prop_oneof![Just(0x5au8), Just(0x01), any::<u8>()];
    let len = prop_oneof![Just(4096u32), 0u32..2048, any::<u32>()];
    let flags = prop_oneof![Just(0x40u8), any::<u8>()];
    (any::<[u8; 64]>(), opcode, descriptor, len, flags, [word(), word(), word()], word()).prop_map(
        |(bytes, opcode, identifier, len, flags, [cdw10, cdw11, cdw12], nsid)| {
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
        },
    )
}

/// A controller of a PCI function, enabled.
fn function() -> Controller {
    let limits = Limits { io_queues_max: 4, transport: Transport::Pcie, ..Limits::default() };
    let config = ControllerConfig {
        cntlid: 1,
        kind: ControllerKind::Io,
        hostnqn: Nqn::discovery(),
        hostid: [0; 16],
        kato: Duration::ZERO,
        subsys: Arc::new(build(sample().namespaces().to_vec(), limits).unwrap()),
    };
    let mut ctrl = Controller::new(config, Duration::ZERO);
    for (offset, value) in [(0x24, 0x001f_001f), (0x28, 0x1000), (0x30, 0x2000), (0x14, 0x46_0001)]
    {
        let _ = ctrl.register_write(offset, value);
    }
    assert!(ctrl.is_ready());
    ctrl
}

proptest! {
    /// Commands of a host that waits for nothing, and a driver that answers late and in any order:
    /// the driver is never asked for what contradicts what it has, or has been asked for.
    #[test]
    fn queue_commands(steps in proptest::collection::vec((0usize..9, 0u32..6, 0u32..6, any::<bool>()), 1..200)) {
        let mut ctrl = function();
        let (mut sqs, mut cqs) = (BTreeMap::new(), BTreeSet::new());
        let mut begun: Vec<QueueChange> = Vec::new();
        let id = |change: &QueueChange| match *change {
            QueueChange::CreateCq(cq) => (cq.qid, true),
            QueueChange::DeleteCq(qid) => (qid, true),
            QueueChange::CreateSq(sq) => (sq.qid, false),
            QueueChange::DeleteSq(qid) => (qid, false),
        };
        for (what, qid, cqid, is_done) in steps {
            if what >= 5 {
                if begun.is_empty() {
                    continue;
                }
                let change = begun.swap_remove(qid as usize % begun.len());
                if !is_done {
                    ctrl.queue_unchanged(&change);
                    continue;
                }
                ctrl.queue_changed(&change);
                match change {
                    QueueChange::CreateCq(cq) => prop_assert!(cqs.insert(cq.qid)),
                    QueueChange::CreateSq(sq) => {
                        prop_assert!(sqs.insert(sq.qid, sq.cqid).is_none());
                        prop_assert!(cqs.contains(&sq.cqid));
                    }
                    QueueChange::DeleteCq(qid) => {
                        prop_assert!(cqs.remove(&qid) && !sqs.values().any(|cqid| *cqid == qid));
                    }
                    QueueChange::DeleteSq(qid) => prop_assert!(sqs.remove(&qid).is_some()),
                }
                continue;
            }
            let mut sqe = Sqe { opcode: [0x05, 0x01, 0x04, 0x00, 0x7c][what], ..Sqe::default() };
            sqe.set_prps(0x4000, 0x8000);
            sqe.cdw10.set(qid | 7 << 16);
            sqe.cdw11.set(1 | if what == 1 { cqid << 16 } else { 0 });
            let mut out = Vec::new();
            match ctrl.admin(0, &sqe, &[], &mut out, Duration::ZERO) {
                AdminOutcome::Queue(change) => {
                    prop_assert!(!begun.iter().any(|other| id(other) == id(&change)));
                    begun.push(change);
                }
                AdminOutcome::DoorbellBuffer { .. } => prop_assert_eq!(what, 4),
                AdminOutcome::Complete { status, .. } => prop_assert!(!status.is_success()),
                outcome => panic!("{outcome:?}"),
            }
            prop_assert!(begun.len() <= 8);
        }
        begun.iter().for_each(|change| ctrl.queue_unchanged(change));
        let told = (sqs.into_keys().collect::<Vec<_>>(), cqs.into_iter().collect::<Vec<_>>());
        prop_assert_eq!(ctrl.queue_ids(), told);
    }

    /// Whatever arrives: one outcome, never more data than the command has room for, events
    /// complete held slots only, and the bounds hold.
    #[test]
    fn admin(commands in proptest::collection::vec((sqes(), any::<bool>()), 1..60)) {
        for mut rig in [Rig::io(), Rig::of(shared()), Rig::discovery()] {
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
                    AdminOutcome::SetWriteProtect { nsid, .. }
                    | AdminOutcome::ReservationPersistence { nsid, set: None } => {
                        prop_assert!(rig.ctrl.subsys().namespace(nsid).is_some());
                    }
                    AdminOutcome::ReservationPersistence { .. } => {}
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
