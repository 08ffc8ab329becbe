//! I/O commands of any bytes.
//!
//! Invariants checked: no panic; what is decoded lies inside its namespace and is allowed there;
//! the data pointer has what the command moves; an error is an error; a fused pair is two commands
//! in a row, and none is forgotten.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme::ctrl::io::{self, Fuse, FusedPairing, IoCommand, Paired};
use nvme::spec::{NSID_ALL, Sqe};
use nvme::subsys::SubsystemInfo;
use nvme::subsys::ana::AnaState;
use nvme::subsys::reservation::{Access, ReservationRequest};
use nvme::xfer;
use penstock_fuzz::{Input, nvm};

const OPCODES: [u8; 15] =
    [0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0c, 0x0d, 0x0e, 0x11, 0x15, 0x19, 0x7f, 0x80];

/// Byte range that a command names itself.
fn range(command: &IoCommand) -> Option<(u64, u64)> {
    match *command {
        IoCommand::Read { offset, len, .. }
        | IoCommand::Write { offset, len, .. }
        | IoCommand::Compare { offset, len, .. } => Some((offset, u64::from(len))),
        IoCommand::WriteZeroes { offset, len, .. }
        | IoCommand::Verify { offset, len, .. }
        | IoCommand::WriteUncorrectable { offset, len, .. } => Some((offset, len)),
        _ => None,
    }
}

fn judge(sqe: &Sqe, command: &IoCommand, subsys: &SubsystemInfo, input: &mut Input<'_>) {
    let limits = subsys.limits();
    let pointer = xfer::parse_data(sqe, limits.in_capsule_bytes).expect("checked with the command");
    if command.nsid() == NSID_ALL {
        // The one command that is about all namespaces, and has no data.
        assert!(matches!(command, IoCommand::Flush { .. }) && pointer.is_empty());
        assert!(!command.takes_data() && command.reply_len() == 0);
        let has_access =
            |ns| matches!(subsys.ana_state(ns), AnaState::Optimized | AnaState::NonOptimized);
        assert!(subsys.namespaces().iter().all(has_access));
        return;
    }
    let ns = subsys.namespace(command.nsid()).expect("only active namespaces");
    if let Some((offset, len)) = range(command) {
        assert!(len > 0 && offset.checked_add(len).expect("no overflow") <= ns.size_bytes());
        let block = u64::from(ns.block_bytes);
        assert!(offset % block == 0 && len % block == 0);
    }
    match *command {
        IoCommand::Read { len, .. } | IoCommand::Write { len, .. } => {
            assert!(pointer.len() == len && len <= limits.mdts_bytes);
        }
        IoCommand::Compare { len, .. } => assert_eq!(pointer.len(), len),
        _ => {}
    }
    assert!(pointer.len() >= command.host_data_len() || !command.takes_data());
    if command.reply_len() > 0 {
        assert!(!command.takes_data() && command.reply_len() <= pointer.len());
    }
    let changes = matches!(
        command,
        IoCommand::Write { .. }
            | IoCommand::WriteZeroes { .. }
            | IoCommand::Deallocate { .. }
            | IoCommand::Copy { .. }
            | IoCommand::WriteUncorrectable { .. }
    );
    if changes {
        assert!(!ns.refuses_writes() && command.access() == Access::Write);
    }
    let data = input.take(command.host_data_len() as usize);
    match *command {
        IoCommand::Deallocate { ranges, .. } => {
            assert!((1..=io::DSM_RANGES_MAX).contains(&ranges));
            for range in data.as_chunks::<16>().0 {
                if let Ok((offset, len)) = io::dsm_range(range, ns) {
                    assert!(offset.checked_add(len).expect("no overflow") <= ns.size_bytes());
                }
            }
        }
        IoCommand::Copy { offset, ranges, .. } => {
            let chunks = data.as_chunks::<32>().0;
            let at = |index: u16| chunks.get(usize::from(index)).copied();
            if let Ok(total) = io::copy_check(offset, ranges, ns, at) {
                assert!(offset.checked_add(total).expect("no overflow") <= ns.size_bytes());
                let sum: u64 = chunks[..usize::from(ranges)]
                    .iter()
                    .map(|range| {
                        let (from, len) = io::copy_range(range, ns).expect("checked with the rest");
                        assert!(from + len <= ns.size_bytes());
                        assert!(from + len <= offset || offset + total <= from, "no overlap");
                        len
                    })
                    .sum();
                assert_eq!(sum, total);
            }
        }
        _ => {}
    }
    match ReservationRequest::parse(command, data) {
        Ok(_) => assert!(data.len() >= command.host_data_len() as usize),
        Err(status) => assert!(!status.is_success()),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let subsys = nvm::subsystem(input.byte());
    let mut pairing = FusedPairing::new();
    let mut held = None;
    let mut slot = 0;
    while !input.is_empty() {
        let sqe = nvm::sqe(&mut input, &OPCODES);
        let command = io::decode(&sqe, &subsys);
        match &command {
            Ok(command) => judge(&sqe, command, &subsys, &mut input),
            Err(status) => assert!(!status.is_success()),
        }
        let fuse = Fuse::of(&sqe);
        if pairing.is_idle(fuse) {
            assert_eq!((fuse, held), (Fuse::None, None));
        }
        let before = held.take();
        let pair = pairing.accept(slot, fuse, command, &subsys);
        let settled = match pair.command {
            Paired::Alone => None,
            Paired::Held => {
                assert!(fuse == Fuse::First && command.is_ok());
                held = Some(slot);
                None
            }
            Paired::Both { first } => {
                assert!(matches!(command, Ok(IoCommand::Write { .. })));
                Some(first)
            }
            Paired::Refused(status) => {
                assert!(!status.is_success());
                None
            }
            Paired::BothRefused { first, first_status, status } => {
                assert!(!first_status.is_success() && !status.is_success());
                Some(first)
            }
        };
        // Whatever was held is either paired or an orphan, once.
        assert!(pair.orphan.is_none() || settled.is_none());
        assert_eq!(pair.orphan.map(|(slot, _)| slot).or(settled), before);
        slot = (slot + 1) % 1000;
    }
});
