//! A target that breaks the protocol: the association ends, nobody panics, and I/O is right once
//! the target behaves.

use std::time::Duration;

use nvme::spec::{NvmOpcode, Sqe};
use nvmf_initiator::Phase;

use crate::fake::{Answer, Script, is_op};
use crate::rig::{Rig, Setup, bytes_of, pattern};

/// A PDU header: type, flags, HLEN, PDO, PLEN; then what follows.
fn pdu(pdu_type: u8, flags: u8, hlen: u8, pdo: u8, plen: u32, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![pdu_type, flags, hlen, pdo];
    bytes.extend_from_slice(&plen.to_le_bytes());
    bytes.extend_from_slice(rest);
    bytes
}

const CAPSULE_RESP: u8 = 0x05;
const C2H_DATA: u8 = 0x07;
const R2T: u8 = 0x09;
const LAST: u8 = 0x04;
const LAST_SUCCESS: u8 = 0x0c;

fn response(cid: u16, status: u16) -> Vec<u8> {
    let mut cqe = [0; 16];
    cqe[12..14].copy_from_slice(&cid.to_le_bytes());
    cqe[14..].copy_from_slice(&(status << 1).to_le_bytes());
    pdu(CAPSULE_RESP, 0, 24, 0, 24, &cqe)
}

fn c2h(cid: u16, flags: u8, offset: u32, len: u32, data: usize) -> Vec<u8> {
    let mut rest = cid.to_le_bytes().to_vec();
    rest.extend_from_slice(&[0; 2]);
    rest.extend_from_slice(&offset.to_le_bytes());
    rest.extend_from_slice(&len.to_le_bytes());
    rest.extend_from_slice(&[0; 4]);
    rest.resize(16 + data, 0xab);
    pdu(C2H_DATA, flags, 24, 24, 24 + len, &rest)
}

fn r2t(cid: u16, ttag: u16, offset: u32, len: u32) -> Vec<u8> {
    let mut rest = cid.to_le_bytes().to_vec();
    rest.extend_from_slice(&ttag.to_le_bytes());
    rest.extend_from_slice(&offset.to_le_bytes());
    rest.extend_from_slice(&len.to_le_bytes());
    rest.extend_from_slice(&[0; 4]);
    pdu(R2T, 0, 24, 0, 24, &rest)
}

/// The first command is answered with these bytes; then the target is a good one.
fn once(opcode: NvmOpcode, bytes: impl Fn(u16) -> Vec<u8> + 'static) -> Script {
    let mut is_first = true;
    let on_io = move |sqe: &Sqe| {
        if is_first && is_op(sqe, opcode) {
            is_first = false;
            return Answer::Bytes(bytes(sqe.cid.get()));
        }
        Answer::Good
    };
    // Data is asked for in one go, so that the R2T of the script is the only wrong one.
    Script { on_io: Box::new(on_io), ..Script::default() }
}

/// Runs a write and a read under the script; both must be right in the end. Gives the number of
/// lost associations and of TermReqs.
fn survive(script: Script) -> (u64, u64) {
    let mut rig = Setup { script, ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 8192, &pattern(5, 16_384));
    rig.wait_ok(&disk, 1);
    disk.read(1, 8192, 16_384);
    let done = rig.wait_ok(&disk, 1);
    assert!(bytes_of(&done[0]) == pattern(5, 16_384));
    let result = (rig.state().losses, rig.fake.seen.get().term_reqs);
    rig.finish();
    result
}

type Bytes = fn(u16) -> Vec<u8>;

#[test]
fn every_breach_on_an_io_queue_ends_the_association_and_nothing_else() {
    let read = NvmOpcode::READ;
    let write = NvmOpcode::WRITE;
    let cases: Vec<(&str, NvmOpcode, Bytes)> = vec![
        ("junk", read, |_| vec![0xff; 4096]),
        ("zeros", write, |_| vec![0; 64]),
        ("response for a cid not in use", read, |cid| response(cid ^ 1, 0)),
        ("response for a cid out of range", read, |_| response(0xfff0, 0)),
        ("success without data", read, |cid| response(cid, 0)),
        ("data of another cid", read, |cid| c2h(cid + 1, LAST_SUCCESS, 0, 16_384, 16_384)),
        ("short data, then SUCCESS", read, |cid| c2h(cid, LAST_SUCCESS, 0, 4096, 4096)),
        ("short data, then a response", read, |cid| {
            [c2h(cid, LAST, 0, 4096, 4096), response(cid, 0)].concat()
        }),
        ("data beyond the buffer", read, |cid| c2h(cid, LAST_SUCCESS, 0, 16_388, 16_388)),
        ("data from beyond the buffer", read, |cid| c2h(cid, LAST, 16_384, 512, 512)),
        ("data with an overflowing offset", read, |cid| c2h(cid, LAST, u32::MAX - 3, 8, 8)),
        ("data with a gap", read, |cid| c2h(cid, LAST, 8192, 8192, 8192)),
        ("data twice", read, |cid| {
            [c2h(cid, 0, 0, 8192, 8192), c2h(cid, LAST_SUCCESS, 0, 16_384, 16_384)].concat()
        }),
        ("data longer than it says", read, |cid| c2h(cid, 0, 0, 4096, 8192)),
        ("PLEN of 4 GiB", read, |cid| {
            let mut bytes = c2h(cid, LAST, 0, 16_384, 16_384);
            bytes[4..8].fill(0xff);
            bytes
        }),
        ("R2T for a read", read, |cid| r2t(cid, 0, 0, 512)),
        ("data for a write", write, |cid| c2h(cid, LAST, 0, 512, 512)),
        ("R2T out of range", write, |cid| r2t(cid, 9, 0, 1 << 20)),
        ("R2T with an overflowing offset", write, |cid| r2t(cid, 9, u32::MAX - 3, 8)),
        ("R2T of nothing", write, |cid| r2t(cid, 9, 0, 0)),
        ("R2T for another cid", write, |cid| r2t(cid + 1, 9, 0, 512)),
        ("ICResp again", read, |_| pdu(0x01, 0, 128, 0, 128, &[0; 120])),
        ("a host's PDU", read, |_| pdu(0x04, 0, 72, 0, 72, &[0; 64])),
    ];
    for (name, opcode, bytes) in cases {
        let (losses, term_reqs) = survive(once(opcode, bytes));
        assert_eq!((losses, term_reqs), (1, 1), "{name}");
    }
}

#[test]
fn a_controller_that_gives_up_is_not_told_anything() {
    let term = |_| pdu(0x03, 0, 24, 0, 24, &[0; 16]);
    assert_eq!(survive(once(NvmOpcode::READ, term)), (1, 0));
}

/// The controller answers a write that it has asked data for before the data has come; the rest is
/// not sent.
#[test]
fn an_early_error_ends_the_command_only() {
    let early = |cid| [r2t_first(cid), response(cid, 0x4006)].concat();
    let mut rig = Setup { script: once(NvmOpcode::WRITE, early), ..Setup::default() }.start();
    let disk = rig.disk(1, 8);
    // All data is there before the script sees the command; asking for it again is out of sequence.
    disk.write(0, 0, &pattern(1, 16_384));
    rig.wait_ok(&disk, 1);
    assert_eq!(rig.state().losses, 1);
    rig.finish();
}

fn r2t_first(cid: u16) -> Vec<u8> {
    r2t(cid, 3, 0, 4096)
}

#[test]
fn greetings_that_are_none() {
    let ic_resp = |change: fn(&mut Vec<u8>)| {
        let mut bytes = pdu(0x01, 0, 128, 0, 128, &[0; 120]);
        bytes[12..16].copy_from_slice(&4096u32.to_le_bytes());
        change(&mut bytes);
        bytes
    };
    let greetings = [
        ("nothing, and the end", Vec::new()),
        ("junk", vec![0x17; 5000]),
        ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(10)),
        ("a response first", response(0, 0)),
        ("PLEN", ic_resp(|bytes| bytes[4] = 127)),
        ("PFV", ic_resp(|bytes| bytes[8] = 1)),
        ("CPDA", ic_resp(|bytes| bytes[10] = 32)),
        ("digests not asked for", ic_resp(|bytes| bytes[11] = 3)),
        ("MAXH2CDATA", ic_resp(|bytes| bytes[12..16].fill(0))),
        ("a stop in the middle", ic_resp(|bytes| bytes.truncate(60))),
        // Good, but then nothing: Connect is not answered.
        ("silence after it", ic_resp(|_| {})),
    ];
    for (name, greeting) in greetings {
        let script = Script { greeting: Some(greeting), ..Script::default() };
        let mut rig = Setup { script, ..Setup::default() }.start();
        let disk = rig.disk(1, 8);
        disk.write(0, 0, &[7; 512]);
        rig.run_for(Duration::from_secs(70));
        let state = rig.state();
        assert_eq!((state.phase, disk.done()), (Phase::Connecting, 0), "{name}");
        assert!(state.last_error.is_some(), "{name}: {state:?}");
        assert!((2..100).contains(&state.attempts), "{name}: {state:?}");
        rig.fake.script.borrow_mut().greeting = None;
        rig.wait_ok(&disk, 1);
        rig.finish();
    }
}

/// Any junk at any moment: an association may end, I/O is right.
#[test]
fn random_junk_in_random_places() {
    for seed in 1..40u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random >> 16
        };
        let mut left = 3;
        let on_io = move |sqe: &Sqe| {
            if left == 0 || next() % 3 != 0 {
                return Answer::Good;
            }
            left -= 1;
            let mut bytes = match next() % 4 {
                // Not one for the command itself: a controller that lies well cannot be found out.
                0 => response(sqe.cid.get() ^ 8, 0),
                1 => r2t(sqe.cid.get(), next() as u16, 0, 4096),
                2 => c2h(sqe.cid.get(), LAST_SUCCESS, 0, 4096, 4096),
                _ => (0..next() % 600).map(|_| next() as u8).collect(),
            };
            // One damaged byte, mostly in the header; then enough junk that no half PDU waits for
            // more.
            if !bytes.is_empty() {
                let at = (next() % bytes.len().min(24) as u64) as usize;
                bytes[at] ^= 1 << (next() % 8);
            }
            bytes.resize(bytes.len() + 20_000, 0xfe);
            Answer::Bytes(bytes)
        };
        let script = Script { on_io: Box::new(on_io), ..Script::default() };
        let mut rig: Rig = Setup { seed, script, ..Setup::default() }.start();
        let disk = rig.disk(1, 8);
        for tag in 0..8 {
            disk.write(tag, tag * 16_384, &pattern(tag + seed, 16_384));
        }
        let written = rig.wait(&disk, 8);
        for io in &written {
            assert_eq!(io.result, Ok(()), "seed {seed}: {io:?}");
        }
        for tag in 0..8 {
            let at = tag as usize * 16_384;
            let is_right = rig.fake.disk.borrow()[at..][..16_384] == pattern(tag + seed, 16_384);
            assert!(is_right, "seed {seed}: write {tag}");
        }
        rig.finish();
    }
}
