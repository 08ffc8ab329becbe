//! The controller's side of an NVMe/TCP connection reads hostile bytes.
//!
//! Invariants checked: no panic; the input is used up when no event is left; payload comes in
//! order and only where it was announced or asked for; slots are bounded; and the events are the
//! same however the stream is cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme::tcp::{Crc32c, Fault, Host, HostConfig, Target, TargetConfig, TargetEvent};
use penstock_fuzz::{Input, Peer, cut};

const SLOTS: u16 = 6;
const LEN_MAX: u32 = 1 << 20;

/// What the driver knows of the command in a slot: payload may come for `next..end`.
#[derive(Clone, Copy, Default)]
struct Command {
    next: u32,
    end: u32,
    busy: bool,
}

/// Everything that must not depend on how the stream is cut.
#[derive(Default, PartialEq, Debug)]
struct Outcome {
    notes: Vec<(u8, u16, u32)>,
    sent: Vec<u8>,
    payload: Vec<u8>,
    fault: Option<Fault>,
}

fn run(config: &TargetConfig, stream: &[u8], seed: u64, piece_max: usize) -> Outcome {
    let mut target = Target::new(config.clone());
    let mut commands = [Command::default(); SLOTS as usize];
    let mut outcome = Outcome::default();
    cut(stream, seed, piece_max, |mut piece| {
        loop {
            match target.next(&mut piece) {
                Ok(Some(event)) => on_event(&mut target, &mut commands, event, &mut outcome),
                Ok(None) => {
                    assert!(piece.is_empty());
                    return true;
                }
                Err(fault) => {
                    assert!((24..=152).contains(&target.term_req(&fault).len()));
                    outcome.fault = Some(fault);
                    return false;
                }
            }
        }
    });
    assert_eq!(target.outstanding(), commands.iter().filter(|command| command.busy).count());
    outcome
}

fn on_event(
    target: &mut Target,
    commands: &mut [Command; SLOTS as usize],
    event: TargetEvent<'_>,
    outcome: &mut Outcome,
) {
    let slot = match event {
        TargetEvent::Initialized { reply } => {
            outcome.sent.extend(&*reply);
            return;
        }
        TargetEvent::Terminated { fes } => {
            outcome.notes.push((0, fes, 0));
            return;
        }
        TargetEvent::Command { slot, sqe, in_capsule_len } => {
            outcome.notes.push((1, slot, in_capsule_len));
            let command = &mut commands[usize::from(slot)];
            assert!(!command.busy, "a slot is handed out once");
            *command = Command { next: 0, end: in_capsule_len, busy: true };
            let len = u32::from_le_bytes([sqe[32], sqe[33], sqe[34], 0]) % LEN_MAX;
            match sqe[0] % 4 {
                // Refused at once, whatever is still to come.
                0 => finish(target, command, slot, outcome),
                1 if len > 0 && in_capsule_len == 0 => {
                    outcome.sent.extend(&*target.r2t(slot, 0, len));
                    command.end = len;
                    // Given up with the R2T outstanding.
                    if sqe[1] == 0xff {
                        finish(target, command, slot, outcome);
                    }
                }
                2 if len > 0 && in_capsule_len == 0 => {
                    let head = target.c2h_data(slot, 0, len, true, sqe[1] & 1 == 1);
                    outcome.sent.extend(&*head);
                    finish(target, command, slot, outcome);
                }
                _ if in_capsule_len == 0 => finish(target, command, slot, outcome),
                _ => {}
            }
            return;
        }
        TargetEvent::Data { slot, offset, bytes } => {
            outcome.payload.extend(bytes);
            let command = &mut commands[usize::from(slot)];
            assert!(command.busy && offset == command.next && !bytes.is_empty());
            command.next += bytes.len() as u32;
            assert!(command.next <= command.end);
            return;
        }
        TargetEvent::DataEnd { slot } => {
            outcome.notes.push((2, slot, 0));
            slot
        }
        TargetEvent::DataDigestError { slot } => {
            outcome.notes.push((3, slot, 0));
            slot
        }
    };
    let command = &mut commands[usize::from(slot)];
    assert!(command.busy && command.next == command.end);
    finish(target, command, slot, outcome);
}

fn finish(target: &mut Target, command: &mut Command, slot: u16, outcome: &mut Outcome) {
    outcome.sent.extend(&*target.response(slot, &[0; 16]));
    target.release(slot);
    command.busy = false;
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (flags, pda, seed) = (input.byte(), input.byte(), u64::from(input.byte()));
    let (header, data_digest) = (flags & 1 == 1, flags & 2 == 2);
    let config = TargetConfig {
        slots: SLOTS,
        cpda: if flags & 4 == 4 { pda } else { 0 },
        allow_header_digest: header,
        allow_data_digest: data_digest,
        ..TargetConfig::default()
    };
    let mut stream = Vec::new();
    if flags & 8 == 0 {
        let host = HostConfig {
            header_digest: header,
            data_digest,
            hpda: pda >> 3,
            ..HostConfig::default()
        };
        stream.extend(&*Host::new(host).icreq());
    }
    if flags & 16 == 16 {
        let align = 4 * (1 + usize::from(config.cpda.min(31)));
        let peer = Peer { header_digest: header, data_digest, align, digest: &Crc32c::of };
        stream.extend(peer.pdus(input, &[4, 6, 4, 6, 4, 6, 0, 2]));
    } else {
        stream.extend(input.0);
    }
    let whole = run(&config, &stream, seed, usize::MAX);
    assert_eq!(whole, run(&config, &stream, seed, 1 + usize::from(pda)));
    assert_eq!(whole, run(&config, &stream, seed, 1));
});
