//! Whatever a host may send.

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

proptest! {
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
