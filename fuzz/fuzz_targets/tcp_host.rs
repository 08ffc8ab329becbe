//! The host's side of an NVMe/TCP connection reads hostile bytes.
//!
//! Invariants checked: no panic; the input is used up when no event is left; data comes in order
//! and within the command's buffer; a command completes once, and with success only when all its
//! data has been transferred; and the events are the same however the stream is cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme::tcp::{
    Crc32c, Fault, Host, HostConfig, HostEvent, Target, TargetConfig, TargetEvent, Transfer,
};
use penstock_fuzz::{Input, Peer, cut};

const CIDS: u16 = 8;

/// What the driver knows of a command: bytes transferred of bytes wanted.
#[derive(Clone, Copy, Default)]
struct Command {
    done: u32,
    len: u32,
    read: bool,
    busy: bool,
}

/// Everything that must not depend on how the stream is cut.
#[derive(Default, PartialEq, Debug)]
struct Outcome {
    notes: Vec<(u8, u16, u32)>,
    payload: Vec<u8>,
    fault: Option<Fault>,
}

fn run(config: &HostConfig, stream: &[u8], seed: u64, piece_max: usize) -> Outcome {
    let mut host = Host::new(config.clone());
    let mut commands = [Command::default(); CIDS as usize];
    let mut outcome = Outcome::default();
    cut(stream, seed, piece_max, |mut piece| {
        loop {
            match host.next(&mut piece) {
                Ok(Some(event)) => on_event(&mut host, &mut commands, event, &mut outcome),
                Ok(None) => {
                    assert!(piece.is_empty());
                    return true;
                }
                Err(fault) => {
                    assert!((24..=152).contains(&host.term_req(&fault).len()));
                    outcome.fault = Some(fault);
                    return false;
                }
            }
        }
    });
    assert_eq!(host.outstanding(), commands.iter().filter(|command| command.busy).count());
    outcome
}

/// Sends the command that `cid` always has; what it transfers depends on the cid.
fn command(host: &mut Host, commands: &mut [Command; CIDS as usize], cid: u16) {
    let len = 4 + 8 * u32::from(cid);
    let transfer = match cid % 4 {
        0 => Transfer::None,
        1 => Transfer::Write { len, in_capsule: true },
        2 => Transfer::Read { len },
        _ => Transfer::Write { len, in_capsule: false },
    };
    let _ = host.command(cid, &[0; 64], transfer);
    commands[usize::from(cid)] = Command {
        done: 0,
        len: if cid % 4 >= 2 { len } else { 0 },
        read: cid % 4 == 2,
        busy: true,
    };
}

fn on_event(
    host: &mut Host,
    commands: &mut [Command; CIDS as usize],
    event: HostEvent<'_>,
    outcome: &mut Outcome,
) {
    match event {
        HostEvent::Initialized => {
            outcome.notes.push((0, 0, host.max_h2c_data()));
            for cid in 0..CIDS {
                command(host, commands, cid);
            }
        }
        HostEvent::Terminated { fes } => outcome.notes.push((1, fes, 0)),
        HostEvent::Data { cid, offset, bytes } => {
            outcome.payload.extend(bytes);
            let command = &mut commands[usize::from(cid)];
            assert!(command.busy && command.read && offset == command.done && !bytes.is_empty());
            command.done += bytes.len() as u32;
            assert!(command.done <= command.len);
        }
        HostEvent::R2t { cid, ttag, offset, len } => {
            outcome.notes.push((2, cid, offset));
            let command = &mut commands[usize::from(cid)];
            assert!(command.busy && !command.read && offset == command.done && len > 0);
            command.done += len;
            assert!(command.done <= command.len);
            // Some are left unanswered, to come to MAXR2T.
            if ttag % 4 != 3 {
                let piece = len.min(host.max_h2c_data());
                let _ = host.h2c_data(cid, ttag, offset, piece, piece == len);
            }
        }
        HostEvent::Complete { cid, cqe } => {
            let status = u16::from_le_bytes([cqe[14], cqe[15]]) >> 1;
            outcome.notes.push((3, cid, u32::from(status)));
            let entry = &mut commands[usize::from(cid)];
            assert!(entry.busy);
            assert!(status != 0 || entry.done == entry.len, "success without all data");
            entry.busy = false;
            command(host, commands, cid);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (flags, pda, seed) = (input.byte(), input.byte(), u64::from(input.byte()));
    let (header_digest, data_digest) = (flags & 1 == 1, flags & 2 == 2);
    let config = HostConfig {
        queue_depth: CIDS,
        header_digest,
        data_digest,
        max_r2t: 1 + u32::from(flags >> 6),
        hpda: if flags & 4 == 4 { pda } else { 0 },
    };
    let mut stream = Vec::new();
    if flags & 8 == 0 {
        let mut target = Target::new(TargetConfig { cpda: pda >> 3, ..TargetConfig::default() });
        let icreq = Host::new(config.clone()).icreq();
        match target.next(&mut &*icreq) {
            Ok(Some(TargetEvent::Initialized { reply })) => stream.extend(&*reply),
            other => panic!("{other:?}"),
        }
    }
    if flags & 16 == 16 {
        let align = 4 * (1 + usize::from(config.hpda.min(31)));
        let peer = Peer { header_digest, data_digest, align, digest: &Crc32c::of };
        stream.extend(peer.pdus(input, &[5, 7, 9, 5, 7, 9, 1, 3]));
    } else {
        stream.extend(input.0);
    }
    let whole = run(&config, &stream, seed, usize::MAX);
    assert_eq!(whole, run(&config, &stream, seed, 1 + usize::from(pda)));
    assert_eq!(whole, run(&config, &stream, seed, 1));
});
