//! The transport's choices on sockets: digests, alignments, flow control, every way to move data,
//! and what an SGL descriptor may say.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use block::ram::RamVolume;
use block::{Identity, Volume};
use it::process;
use it::rig::{Rig, SUBNQN};
use it::wire::{self, Connect, Digests, Init, Pdu, Queue};
use nvmf_target::Limits;

const HOST: &str = "nqn.2014-08.org.example:transport";
const READ: u8 = 2;
const WRITE: u8 = 1;
const DNR: u16 = 0x4000;
const INVALID_FIELD: u16 = DNR | 0x02;
const SGL_LENGTH: u16 = DNR | 0x0f;
const SGL_TYPE: u16 = DNR | 0x11;
const SGL_OFFSET: u16 = DNR | 0x16;

fn rig(limits: Limits) -> Rig {
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 16 << 20, 512).expect("memory"));
    Rig::start(vec![volume], 1, limits).expect("a target")
}

/// An admin queue and one I/O queue.
fn associate(rig: &Rig, connect: &Connect, init: Init) -> (Queue, Queue) {
    let (mut admin, cntlid) = connect.admin(rig.addr, init).expect("a controller");
    admin.command(wire::number_of_queues(1), &[], &[]).expect("an answer").ok().expect("success");
    let io = connect.io(rig.addr, init, cntlid, 1).expect("an I/O queue");
    (admin, io)
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

#[test]
fn every_digest_and_alignment_moves_data_both_ways() {
    // Small enough that one R2T needs many H2CData PDUs.
    let rig = rig(Limits { h2c_data_bytes: 4096, ..Limits::default() });
    for digests in Digests::ALL {
        for hpda_z in 0..32u8 {
            let connect =
                Connect { no_flow_control: hpda_z % 2 == 0, ..Connect::new(SUBNQN, HOST) };
            let init = Init { digests, hpda_z, maxr2t_z: u32::from(hpda_z) };
            let (mut admin, mut io) = associate(&rig, &connect, init);
            assert_eq!(io.max_h2c_data, 4096);
            // Any multiple of 4 below MAXH2CDATA is the host's right.
            io.piece = 4096 - 4 * u32::from(hpda_z);
            let data = pattern(hpda_z.into(), 65536);
            let answer = io
                .command(wire::io_sqe(WRITE, 1, 0, 128, 65536), &[], &data)
                .expect("a write")
                .ok()
                .expect("success");
            assert_eq!(answer.r2ts, 1, "one R2T for all of a command's data");
            let small = pattern(u64::from(hpda_z) + 99, 8192);
            let mut sqe = wire::io_sqe(WRITE, 1, 128, 16, 8192);
            wire::sgl(&mut sqe, 0x01, 0, 8192);
            io.command(sqe, &small, &[]).expect("a write").ok().expect("success");

            let read = wire::io_sqe(READ, 1, 0, 144, 144 * 512);
            let answer = io.command(read, &[], &[]).expect("a read").ok().expect("success");
            assert!(answer.data == [data, small].concat(), "{digests:?}, HPDA {hpda_z}");
            // Only where the host does not need the queue's head may data stand for the response.
            assert_eq!(answer.sqhd.is_none(), connect.no_flow_control);
            let mut identify = wire::sqe(6);
            identify[40] = 1;
            wire::sgl(&mut identify, 0x5a, 0, 4096);
            let answer =
                admin.command(identify, &[], &[]).expect("Identify").ok().expect("success");
            assert_eq!(answer.data.len(), 4096);
            assert_eq!(answer.sqhd.is_none(), connect.no_flow_control);
        }
    }
}

/// Large writes come unasked, more of them than one connection may have in memory: what does not fit
/// waits in the socket, and all of it arrives where it belongs.
#[test]
fn large_writes_in_capsules_wait_for_memory() {
    const BYTES: usize = 128 << 10;
    let limits = Limits { buffer_bytes_per_connection: 3 * BYTES, ..Limits::default() };
    assert!(limits.in_capsule_bytes as usize >= BYTES, "the default takes them");
    let rig = rig(limits);
    let (_admin, mut io) = associate(&rig, &Connect::new(SUBNQN, HOST), Init::default());
    let count = 64;
    let data = pattern(11, count * BYTES);
    let blocks = BYTES as u64 / 512;
    for (cid, part) in data.chunks(BYTES).enumerate() {
        let lba = cid as u64 * blocks;
        let mut sqe = wire::io_sqe(WRITE, 1, lba, blocks as u32, BYTES as u32);
        wire::sgl(&mut sqe, 0x01, 0, BYTES as u32);
        wire::put(&mut sqe, 2, &(cid as u16).to_le_bytes());
        io.send(&Pdu::capsule(&sqe, part, Digests::default(), 4)).expect("room or patience");
    }
    for _ in 0..count {
        let pdu = io.receive().expect("sound PDUs").expect("an answer");
        assert_eq!((pdu.kind(), pdu.status()), (wire::RESPONSE, 0));
    }
    for (n, part) in data.chunks(BYTES).enumerate() {
        let read = wire::io_sqe(READ, 1, n as u64 * blocks, blocks as u32, BYTES as u32);
        let answer = io.command(read, &[], &[]).expect("a read").ok().expect("success");
        assert!(answer.data == part, "write number {n}");
    }
}

#[test]
fn the_queue_head_follows_and_wraps() {
    let rig = rig(Limits::default());
    for entries in [2, 3, 7, 128] {
        let connect = Connect { entries, no_flow_control: false, ..Connect::new(SUBNQN, HOST) };
        let mut queue = Queue::open(rig.addr, Init::default()).expect("a connection");
        let answer = queue.command(connect.sqe(0), &connect.data(0xffff), &[]).expect("Connect");
        assert_eq!((answer.status, answer.sqhd), (0, Some(1 % entries)));
        for n in 2..400u16 {
            // Sound, with data, and refused: all of them take an entry.
            let answer = match n % 3 {
                0 => queue.command(wire::sqe(0x02), &[], &[]).expect("refused before CC.EN"),
                1 => queue.command(wire::sqe(0xff), &[], &[]).expect("no such command"),
                _ => {
                    let mut get = wire::sqe(0x7f);
                    (get[4], get[44]) = (4, 8);
                    queue.command(get, &[], &[]).expect("Property Get")
                }
            };
            assert_eq!(answer.sqhd, Some(n % entries), "command {n} of {entries} entries");
        }
    }
    // Without flow control the Connect response says so, and the field is of no use after that.
    let connect = Connect::new(SUBNQN, HOST);
    let mut queue = Queue::open(rig.addr, Init::default()).expect("a connection");
    let answer = queue.command(connect.sqe(0), &connect.data(0xffff), &[]).expect("Connect");
    assert_eq!((answer.status, answer.sqhd), (0, Some(0xffff)));
    let mut get = wire::sqe(0x7f);
    (get[4], get[44]) = (4, 8);
    assert_eq!(queue.command(get, &[], &[]).expect("Property Get").sqhd, Some(0));
    // The same for I/O queues.
    for no_flow_control in [true, false] {
        let connect = Connect { entries: 5, no_flow_control, ..Connect::new(SUBNQN, HOST) };
        let (_admin, mut io) = associate(&rig, &connect, Init::default());
        for n in 2..30u16 {
            let answer = io.command(wire::io_sqe(READ, 1, 0, 1, 512), &[], &[]).expect("a read");
            let wanted = if no_flow_control { None } else { Some(n % 5) };
            assert_eq!((answer.status, answer.sqhd), (0, wanted));
        }
    }
}

fn status(queue: &mut Queue, sqe: [u8; 64], in_capsule: &[u8], by_r2t: &[u8]) -> u16 {
    queue.command(sqe, in_capsule, by_r2t).expect("an answer").status
}

/// `sqe` with another data pointer.
fn pointing(mut sqe: [u8; 64], identifier: u8, address: u64, len: u32) -> [u8; 64] {
    wire::sgl(&mut sqe, identifier, address, len);
    sqe
}

#[test]
fn any_legal_sgl_and_no_other() {
    let rig = rig(Limits::default());
    let (mut admin, mut io) = associate(&rig, &Connect::new(SUBNQN, HOST), Init::default());
    let data = pattern(5, 16384);

    // In the capsule, anywhere in it.
    let places = [(0, 8, 4096), (512, 8, 4608), (512, 8, 16384), (12288, 8, 16384), (4, 1, 516)];
    for (offset, blocks, capsule) in places.into_iter().chain([(0, 32, 16384)]) {
        let len = blocks * 512;
        let sqe = pointing(wire::io_sqe(WRITE, 1, 64, blocks, len), 0x01, offset, len);
        let what = format!("{len} bytes at {offset} of {capsule}");
        assert_eq!(status(&mut io, sqe, &data[..capsule], &[]), 0, "{what}");
        let read = wire::io_sqe(READ, 1, 64, blocks, len);
        let got = io.command(read, &[], &[]).expect("a read").ok().expect("success").data;
        assert!(got == data[offset as usize..][..len as usize], "{what}");
    }
    // By the transport; the address means nothing then. The largest transfer, and one more block.
    let large = pattern(6, 1 << 20);
    let sqe = pointing(wire::io_sqe(WRITE, 1, 0, 2048, 1 << 20), 0x5a, u64::MAX, 1 << 20);
    assert_eq!(status(&mut io, sqe, &[], &large), 0);
    let read = wire::io_sqe(READ, 1, 0, 2048, 1 << 20);
    assert!(io.command(read, &[], &[]).expect("a read").data == large);
    let beyond = wire::io_sqe(READ, 1, 0, 2049, (1 << 20) + 512);
    assert_eq!(status(&mut io, beyond, &[], &[]), INVALID_FIELD);

    // Data for the host: lengths, and descriptors that are not the transport's.
    let read = wire::io_sqe(READ, 1, 0, 8, 4096);
    for (identifier, len, wanted) in [
        (0x5a, 0, SGL_LENGTH),
        (0x5a, 4095, SGL_LENGTH),
        (0x5a, 4097, SGL_LENGTH),
        (0x5a, u32::MAX, SGL_LENGTH),
        (0x01, 4096, SGL_TYPE),
        (0x00, 4096, SGL_TYPE),
        (0x20, 16, SGL_TYPE),
        (0x30, 16, SGL_TYPE),
        (0x40, 4096, SGL_TYPE),
        (0x5b, 4096, SGL_TYPE),
    ] {
        let got = status(&mut io, pointing(read, identifier, 0, len), &[], &[]);
        assert_eq!(got, wanted, "read with {identifier:02x} of {len}");
    }
    let mut identify = wire::sqe(6);
    identify[40] = 1;
    for (identifier, wanted) in
        [(0x5a, 0), (0x01, SGL_TYPE), (0x20, SGL_TYPE), (0x40, SGL_TYPE), (0x00, SGL_TYPE)]
    {
        let got = status(&mut admin, pointing(identify, identifier, 0, 4096), &[], &[]);
        assert_eq!(got, wanted, "Identify with {identifier:02x}");
    }

    // Data from the host that is nowhere.
    let write = wire::io_sqe(WRITE, 1, 0, 8, 4096);
    assert_eq!(status(&mut io, pointing(write, 0x01, 0, 4096), &[], &[]), SGL_OFFSET);
    assert_eq!(status(&mut io, pointing(write, 0x5a, 0, 4095), &[], &[]), SGL_LENGTH);
    // A command without data ignores what came along; one with a length is wrong.
    let mut flush = wire::sqe(0);
    flush[4] = 1;
    assert_eq!(status(&mut io, flush, &data[..512], &[]), 0);
    assert_eq!(status(&mut io, pointing(flush, 0x5a, 0, 512), &[], &[]), SGL_LENGTH);
    // None of the refusals has changed a byte.
    assert!(io.command(read, &[], &[]).expect("a read").data == large[..4096]);
}

/// A host that goes away in the middle of a write: nothing of it lands, nothing of it stays.
#[test]
fn a_write_cut_anywhere_leaves_nothing() {
    let rig = rig(Limits { h2c_data_bytes: 4096, ..Limits::default() });
    let connect = Connect::new(SUBNQN, HOST);
    for digests in [Digests::ALL[0], Digests::ALL[3]] {
        let init = Init { digests, ..Init::default() };
        let sqe = pointing(wire::io_sqe(WRITE, 1, 0, 8, 4096), 0x01, 0, 4096);
        let capsule = Pdu::capsule(&sqe, &[0xee; 4096], digests, 4).bytes();
        for cut in [1, 7, 8, 71, 72, 75, 76, 77, 600, capsule.len() - 4, capsule.len() - 1] {
            let (_admin, io) = associate(&rig, &connect, init);
            (&io.stream).write_all(&capsule[..cut]).expect("room in the socket");
        }
        // The same with the data asked for by an R2T.
        let asked = Pdu::h2c_data((0, 0), 0, &[0xee; 4096], false, digests, 4).bytes().len();
        for cut in [0, 1, 24, 28, 29, 2000, asked - 1] {
            let (_admin, mut io) = associate(&rig, &connect, init);
            let sqe = wire::io_sqe(WRITE, 1, 0, 16, 8192);
            io.send(&Pdu::capsule(&sqe, &[], digests, 4)).expect("room in the socket");
            let r2t = io.receive().expect("a PDU").expect("an R2T");
            let data = Pdu::h2c_data(r2t.tags(), 0, &[0xee; 4096], false, digests, 4).bytes();
            (&io.stream).write_all(&data[..cut]).expect("room in the socket");
        }
    }
    process::wait_for(Duration::from_secs(20), || Ok(rig.target.connected() == (0, 0)))
        .expect("all of it is gone");
    let (_admin, mut io) = associate(&rig, &connect, Init::default());
    let read = io.command(wire::io_sqe(READ, 1, 0, 16, 8192), &[], &[]).expect("a read");
    assert!(read.data.iter().all(|byte| *byte == 0), "part of a write has landed");
}

/// A host may reuse an entry before it has seen the head move: that is given slack. One that goes
/// far beyond its queue is cut off.
#[test]
fn overrun_queues_have_slack() {
    let rig = rig(Limits::default());
    let connect = Connect { entries: 16, ..Connect::new(SUBNQN, HOST) };
    for (commands, is_cut) in [(16, false), (32, false), (400, true)] {
        let (_admin, mut io) = associate(&rig, &connect, Init::default());
        // Writes wait for data that never comes, so that all of them stay outstanding.
        let mut r2ts = 0;
        for cid in 0..commands as u16 {
            let mut sqe = wire::io_sqe(WRITE, 1, 0, 1, 512);
            wire::put(&mut sqe, 2, &cid.to_le_bytes());
            if io.send(&Pdu::capsule(&sqe, &[], Digests::default(), 4)).is_err() {
                assert!(is_cut);
                break;
            }
        }
        while r2ts < commands {
            match io.receive().expect("sound PDUs") {
                Some(pdu) if pdu.kind() == wire::R2T => r2ts += 1,
                Some(pdu) => {
                    assert_eq!((pdu.kind(), pdu.fault()), (wire::C2H_TERM, (2, 0)));
                    break;
                }
                None => break,
            }
        }
        assert_eq!(r2ts < commands, is_cut, "{r2ts} R2Ts for {commands} commands");
    }
}

/// Data that was asked for comes behind what the host had sent before: a write with its data in the
/// capsule finds memory then, however many others wait for theirs.
#[test]
fn a_capsule_passes_data_that_was_asked_for() {
    const LARGE: usize = 32 << 10;
    let usual = Limits { in_capsule_bytes: 8192, ..Limits::default() };
    for limits in [
        Limits { buffer_bytes_per_connection: 4 * LARGE, ..usual.clone() },
        Limits { buffer_bytes_per_host: 4 * LARGE, ..usual },
    ] {
        let rig = rig(limits);
        let (_admin, mut io) = associate(&rig, &Connect::new(SUBNQN, HOST), Init::default());
        let write = |cid: u16, blocks: usize| {
            let len = (512 * blocks) as u32;
            let mut sqe = wire::io_sqe(WRITE, 1, 64 * u64::from(cid), blocks as u32, len);
            wire::put(&mut sqe, 2, &cid.to_le_bytes());
            sqe
        };
        // As many large ones as the target asks for; it has said so before it answers the small one.
        let (large, small) = (12, 12_u16);
        for cid in 0..large {
            let sqe = write(cid, LARGE / 512);
            io.send(&Pdu::capsule(&sqe, &[], Digests::default(), 4)).expect("room");
        }
        let mut asked = Vec::new();
        let r2t = io.receive().expect("sound PDUs").expect("an R2T");
        asked.push(r2t.tags());
        let data = pattern(3, LARGE);
        let mut sqe = write(small, 16);
        wire::sgl(&mut sqe, 0x01, 0, 8192);
        io.send(&Pdu::capsule(&sqe, &data[..8192], Digests::default(), 4)).expect("room");
        let (mut done, mut is_small_done) = (0, false);
        while done < large || !is_small_done {
            while let Some(tags) = asked.pop() {
                io.send(&Pdu::h2c_data(tags, 0, &data, true, Digests::default(), 4)).expect("room");
            }
            let pdu = io.receive().expect("the target goes on").expect("an answer");
            match pdu.kind() {
                wire::R2T => asked.push(pdu.tags()),
                _ => {
                    assert_eq!((pdu.kind(), pdu.status()), (wire::RESPONSE, 0));
                    is_small_done |= pdu.cid() == small;
                    done += u16::from(pdu.cid() != small);
                }
            }
        }
    }
}

/// The same where not one host but several of them have asked for all that the pool can give: each
/// may hold half of what the ones before it have left.
#[test]
fn a_capsule_passes_data_that_was_asked_of_other_hosts() {
    const LARGE: usize = 1 << 20;
    const FLUSH: u8 = 0x00;
    // The pool of the core is the only bound.
    let limits = Limits {
        in_capsule_bytes: 8192,
        buffer_bytes_per_connection: 1 << 30,
        buffer_bytes_per_host: 1 << 30,
        ..Limits::default()
    };
    let rig = rig(limits);
    let mut hosts = Vec::new();
    for (n, writes) in [36, 20, 12, 8, 8].into_iter().enumerate() {
        let connect = Connect { entries: 64, ..Connect::new(SUBNQN, &format!("{HOST}:{n}")) };
        let (admin, mut io) = associate(&rig, &connect, Init::default());
        let send = |io: &mut Queue, opcode, cid: u16, len: usize| {
            let mut sqe = wire::io_sqe(opcode, 1, 0, (len / 512).max(1) as u32, len as u32);
            wire::put(&mut sqe, 2, &cid.to_le_bytes());
            io.send(&Pdu::capsule(&sqe, &[], Digests::default(), 4)).expect("room");
        };
        for cid in 0..writes {
            send(&mut io, WRITE, cid, LARGE);
        }
        // Needs no memory: when it is answered, all before it has been asked for or waits.
        send(&mut io, FLUSH, writes, 0);
        while io.receive().expect("sound PDUs").expect("an answer").kind() == wire::R2T {}
        hosts.push((admin, io));
    }
    for (n, (_, io)) in hosts.iter_mut().enumerate() {
        let mut sqe = wire::io_sqe(WRITE, 1, 0, 16, 8192);
        wire::sgl(&mut sqe, 0x01, 0, 8192);
        wire::put(&mut sqe, 2, &50_u16.to_le_bytes());
        io.send(&Pdu::capsule(&sqe, &pattern(3, 8192), Digests::default(), 4)).expect("room");
        let answer = loop {
            let pdu = io.receive().unwrap_or_else(|error| panic!("host {n}: {error}"));
            match pdu.expect("an answer") {
                pdu if pdu.kind() == wire::R2T => {}
                pdu => break pdu,
            }
        };
        assert_eq!((answer.kind(), answer.status(), answer.cid()), (wire::RESPONSE, 0, 50));
    }
}
