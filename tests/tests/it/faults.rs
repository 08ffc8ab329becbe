//! The fault matrix (`it::faults`), cell by cell: against the protocol machine alone, and on the
//! sockets of a running target, while another host does verified I/O and notices nothing.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::ram::RamVolume;
use block::{Identity, Volume};
use it::faults::{
    ASKED, Fei, Ground, IO_IN_CAPSULE, MAX_H2C_DATA, Row, STATES, State, Verdict, host, rows,
};
use it::process;
use it::rig::{Rig, SUBNQN};
use it::wire::{self, Connect, Digests, FromController, Init, Pdu, Queue};
use nvme::tcp::{Target, TargetConfig, TargetEvent};
use nvmf_target::Limits;

/// Transient Transport Error.
const DAMAGED: u16 = 0x22;

/// What a machine made of a stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    icresp: bool,
    commands: usize,
    ends: usize,
    digest_errors: usize,
    terminated: bool,
    fault: Option<(u16, u32)>,
}

fn feed(target: &mut Target, mut bytes: &[u8], seen: &mut Seen) {
    loop {
        match target.next(&mut bytes) {
            Ok(None) => break,
            Ok(Some(TargetEvent::Initialized { .. })) => seen.icresp = true,
            Ok(Some(TargetEvent::Command { .. })) => seen.commands += 1,
            Ok(Some(TargetEvent::Data { .. })) => {}
            Ok(Some(TargetEvent::DataEnd { .. })) => seen.ends += 1,
            Ok(Some(TargetEvent::DataDigestError { .. })) => seen.digest_errors += 1,
            Ok(Some(TargetEvent::Terminated { .. })) => seen.terminated = true,
            Err(fault) => {
                seen.fault = Some((fault.fes.get(), fault.fei));
                break;
            }
        }
    }
}

/// A machine in `state`, and what is known of it.
fn machine(state: State, digests: Digests, cpda: u8) -> (Target, Ground) {
    let mut target = Target::new(TargetConfig {
        max_h2c_data: MAX_H2C_DATA,
        slots: 8,
        cpda,
        ..TargetConfig::default()
    });
    let align = 4 * (usize::from(cpda) + 1);
    let mut ground = Ground { state, digests, align, tags: (0x55, 3) };
    let mut seen = Seen::default();
    if state != State::Fresh {
        feed(&mut target, &Pdu::icreq(digests, 0, 0).bytes(), &mut seen);
        assert!(seen.icresp);
    }
    match state {
        State::Fresh | State::Initialized => {}
        State::Admin => target.set_limits(16, 8192),
        State::Io | State::Asked => target.set_limits(16, IO_IN_CAPSULE),
    }
    if state == State::Asked {
        let mut bytes = &asking(digests, align).bytes()[..];
        let Ok(Some(TargetEvent::Command { slot, .. })) = target.next(&mut bytes) else {
            panic!("a sound command")
        };
        let _ = target.r2t(slot, 0, ASKED);
        ground.tags = (target.cid(slot), slot);
    }
    (target, ground)
}

/// The write that gets to [`State::Asked`].
fn asking(digests: Digests, align: usize) -> Pdu {
    let mut sqe = wire::io_sqe(1, 1, 64, ASKED / 512, ASKED);
    sqe[2] = 0x55;
    Pdu::capsule(&sqe, &[], digests, align)
}

/// The FEI that the specification wants for the last of `pdus`.
fn fei(fei: Fei, pdus: &[Pdu]) -> u32 {
    match fei {
        Fei::None => 0,
        Fei::At(offset) => offset,
        Fei::Digest => {
            let bytes = pdus.last().expect("a row has a PDU").bytes();
            let hlen = pdus.last().expect("a row has a PDU").header.len();
            u32::from_le_bytes(bytes[hlen..hlen + 4].try_into().expect("4 bytes"))
        }
    }
}

fn judge_machine(
    row: &Row,
    state: State,
    verdict: Verdict,
    digests: Digests,
    cpda: u8,
    step: usize,
) {
    let (mut target, ground) = machine(state, digests, cpda);
    let pdus = (row.pdus)(&ground);
    let mut seen = Seen::default();
    for pdu in &pdus {
        for piece in pdu.bytes().chunks(step) {
            feed(&mut target, piece, &mut seen);
        }
    }
    let cell = format!("{} in {state:?} with {digests:?}, CPDA {cpda}", row.name);
    // What came before the PDU in error is answered, or not, as if it were alone.
    match verdict {
        Verdict::Ends(fes, wanted) => {
            assert_eq!(seen.fault, Some((fes, fei(wanted, &pdus))), "{cell}: {seen:?}");
        }
        Verdict::Silent => {
            assert!(seen.terminated && seen.fault.is_none(), "{cell}: {seen:?}");
            // Whatever follows is nobody's business any more.
            feed(&mut target, &[4; 300], &mut seen);
            assert!(seen.fault.is_none() && seen.commands == 0, "{cell}: {seen:?}");
        }
        Verdict::Status(status) => {
            let asked = state == State::Asked && pdus[0].header[0] == wire::H2C_DATA;
            let has_data = pdus.iter().any(|pdu| !pdu.data.is_empty());
            let damaged = usize::from(status == DAMAGED);
            let wanted = Seen {
                commands: usize::from(!asked),
                ends: usize::from(has_data) - damaged,
                digest_errors: damaged,
                ..Seen::default()
            };
            assert_eq!(seen, wanted, "{cell}");
        }
        Verdict::Answer => {
            assert_eq!(seen, Seen { icresp: true, ..Seen::default() }, "{cell}");
        }
        Verdict::Waits => assert_eq!(seen, Seen::default(), "{cell}"),
    }
    if let Some(fault) = seen.fault {
        // A fault is final: the header in error is repeated, and nothing else is looked at.
        let mut after = Seen::default();
        feed(&mut target, &Pdu::term_req(1, 0, &[]).bytes(), &mut after);
        assert_eq!(after, Seen { fault: Some(fault), ..Seen::default() }, "{cell}");
    }
}

#[test]
fn every_cell_of_the_machine() {
    let mut cells = 0;
    for row in rows() {
        for (state, verdict) in STATES.into_iter().zip(row.verdicts) {
            for digests in Digests::ALL.into_iter().filter(|digests| row.needs.met(*digests)) {
                for step in [usize::MAX, 1] {
                    judge_machine(&row, state, verdict, digests, 0, step);
                    cells += 1;
                }
            }
        }
    }
    println!("{cells} cells");
    assert!(cells > 2000);
}

/// Rows that move PDO are about an alignment of 4; all others hold for any.
#[test]
fn every_cell_with_every_cpda() {
    for row in
        rows().iter().filter(|row| !row.name.contains("PDO") && !row.name.contains("without it"))
    {
        for (state, verdict) in STATES.into_iter().zip(row.verdicts) {
            for digests in Digests::ALL.into_iter().filter(|digests| row.needs.met(*digests)) {
                for cpda in 1..=31 {
                    judge_machine(row, state, verdict, digests, cpda, usize::MAX);
                }
            }
        }
    }
}

/// A host that is cut off in the middle of a sound PDU: nothing is answered, nothing is a fault.
#[test]
fn truncated_pdus_are_waited_for() {
    for row in rows() {
        for (state, verdict) in STATES.into_iter().zip(row.verdicts) {
            if !matches!(verdict, Verdict::Status(0) | Verdict::Answer | Verdict::Waits) {
                continue;
            }
            for digests in [Digests::ALL[0], Digests::ALL[3]] {
                let (mut target, ground) = machine(state, digests, 0);
                let bytes: Vec<u8> =
                    (row.pdus)(&ground).iter().flat_map(|pdu| pdu.bytes()).collect();
                let mut seen = Seen::default();
                feed(&mut target, &bytes[..bytes.len() - 1], &mut seen);
                assert_eq!((seen.fault, seen.ends, seen.terminated), (None, 0, false));
                feed(&mut target, &bytes[bytes.len() - 1..], &mut seen);
                assert_eq!(seen.fault, None, "{}", row.name);
            }
        }
    }
}

/// A connection in `state`, with what keeps its controller alive.
struct Place {
    queue: Option<Queue>,
    /// Of [`State::Fresh`].
    raw: Option<std::net::TcpStream>,
    _admin: Option<Queue>,
    ground: Ground,
}

fn reach(addr: SocketAddr, state: State, digests: Digests) -> io::Result<Place> {
    let init = Init { digests, ..Init::default() };
    let connect = Connect::new(SUBNQN, &host("faulty"));
    let mut place = Place {
        queue: None,
        raw: None,
        _admin: None,
        ground: Ground { state, digests, align: 4, tags: (0x55, 3) },
    };
    match state {
        State::Fresh => {
            let stream = std::net::TcpStream::connect(addr)?;
            stream.set_read_timeout(Some(wire::PATIENCE))?;
            place.raw = Some(stream);
        }
        State::Initialized => place.queue = Some(Queue::open(addr, init)?),
        State::Admin => place.queue = Some(connect.admin(addr, init)?.0),
        State::Io | State::Asked => {
            let (mut admin, cntlid) = connect.admin(addr, init)?;
            admin.command(wire::number_of_queues(1), &[], &[])?.ok()?;
            place.queue = Some(connect.io(addr, init, cntlid, 1)?);
            place._admin = Some(admin);
        }
    }
    if let (State::Asked, Some(queue)) = (state, &mut place.queue) {
        queue.send(&asking(digests, 4))?;
        let r2t = queue.receive()?.expect("an R2T");
        assert_eq!((r2t.kind(), r2t.range()), (wire::R2T, (0, ASKED)));
        place.ground.tags = r2t.tags();
    }
    Ok(place)
}

/// Everything until the end of the connection.
fn until_the_end(queue: &mut Queue) -> Vec<FromController> {
    let mut all = Vec::new();
    while let Some(pdu) = queue.receive().expect("sound PDUs until the end") {
        all.push(pdu);
    }
    all
}

fn judge_socket(addr: SocketAddr, row: &Row, state: State, verdict: Verdict, digests: Digests) {
    let cell = format!("{} in {state:?} with {digests:?}", row.name);
    let mut place = reach(addr, state, digests).unwrap_or_else(|e| panic!("{cell}: {e}"));
    let pdus = (row.pdus)(&place.ground);
    let bytes: Vec<u8> = pdus.iter().flat_map(|pdu| pdu.bytes()).collect();
    // A connection that has had its answer already may not take the rest.
    let send = |mut stream: &std::net::TcpStream, bytes: &[u8]| drop(stream.write_all(bytes));
    let mut queue = match (place.queue.take(), place.raw.take()) {
        (Some(queue), _) => {
            send(&queue.stream, &bytes);
            queue
        }
        (None, Some(stream)) => {
            send(&stream, &bytes);
            if verdict == Verdict::Answer {
                let mut icresp = [0; 128];
                io::Read::read_exact(&mut &stream, &mut icresp).expect("ICResp");
                assert_eq!((icresp[0], icresp[2], icresp[4]), (wire::ICRESP, 128, 128), "{cell}");
                return;
            }
            Queue::adopt(stream)
        }
        (None, None) => unreachable!("a place has a connection"),
    };
    match verdict {
        Verdict::Ends(fes, wanted) => {
            // Something more to be ignored.
            send(&queue.stream, &Pdu::icreq(digests, 0, 0).bytes());
            let all = until_the_end(&mut queue);
            let [term] = &all[..] else { panic!("{cell}: {all:x?}") };
            assert_eq!(term.kind(), wire::C2H_TERM, "{cell}");
            assert_eq!(term.fault(), (fes, fei(wanted, &pdus)), "{cell}");
            // Where no PDU is wanted it is the first of them that is in error, and not the last.
            let repeated = pdus.iter().any(|pdu| pdu.header.starts_with(&term.data));
            assert!(term.data.len() >= 8 && repeated, "{cell}: {term:x?}");
        }
        Verdict::Silent => assert!(until_the_end(&mut queue).is_empty(), "{cell}"),
        Verdict::Status(status) => {
            let answer = queue.receive().expect(&cell).expect(&cell);
            assert_eq!((answer.kind(), answer.status()), (wire::RESPONSE, status), "{cell}");
            let cid = u16::from(pdus[0].header[10]);
            let asked = pdus[0].header[0] == wire::H2C_DATA;
            assert_eq!(answer.cid(), if asked { place.ground.tags.0 } else { cid }, "{cell}");
            still_answers(&mut queue, state, &cell);
        }
        Verdict::Waits => {
            let rest = ASKED as usize / 2;
            let data = vec![1; rest];
            let pdu = Pdu::h2c_data(place.ground.tags, rest as u32, &data, true, digests, 4);
            queue.send(&pdu).expect(&cell);
            let answer = queue.receive().expect(&cell).expect(&cell);
            assert_eq!((answer.kind(), answer.status()), (wire::RESPONSE, 0), "{cell}");
        }
        Verdict::Answer => unreachable!("only fresh connections get ICResp"),
    }
}

/// The connection of a refused command goes on.
fn still_answers(queue: &mut Queue, state: State, cell: &str) {
    let entry = match state {
        State::Io | State::Asked => wire::io_sqe(2, 1, 0, 1, 512),
        _ => {
            let mut entry = wire::sqe(0x7f);
            (entry[4], entry[44]) = (4, 8);
            entry
        }
    };
    let answer = queue.command(entry, &[], &[]).unwrap_or_else(|e| panic!("{cell}: {e}"));
    assert!(state == State::Initialized || answer.status == 0, "{cell}: {answer:?}");
}

/// Writes and reads back, until told to stop; returns how often, and the slowest round.
pub(crate) fn witness(
    addr: SocketAddr,
    nth: u64,
    digests: Digests,
    stop: &AtomicBool,
) -> io::Result<(u64, Duration)> {
    let init = Init { digests, ..Init::default() };
    let connect = Connect::new(SUBNQN, &host("witness"));
    let (mut admin, cntlid) = connect.admin(addr, init)?;
    admin.command(wire::number_of_queues(1), &[], &[])?.ok()?;
    let mut queue = connect.io(addr, init, cntlid, 1)?;
    let (mut rounds, mut slowest) = (0u64, Duration::ZERO);
    while !stop.load(Ordering::Acquire) {
        let start = Instant::now();
        let data: Vec<u8> = (0..8192u64).map(|i| (i.wrapping_mul(rounds + 7) >> 3) as u8).collect();
        // Out of the way of the faulty hosts' writes, and of the other witnesses'.
        let slba = 4096 + nth * 1024 + rounds % 64 * 16;
        let mut write = wire::io_sqe(1, 1, slba, 16, 8192);
        if rounds % 2 == 0 {
            queue.command(write, &[], &data)?.ok()?;
        } else {
            wire::sgl(&mut write, 0x01, 0, 8192);
            queue.command(write, &data, &[])?.ok()?;
        }
        let read = queue.command(wire::io_sqe(2, 1, slba, 16, 8192), &[], &[])?.ok()?;
        if read.data != data {
            return Err(io::Error::other(format!("round {rounds} read something else")));
        }
        rounds += 1;
        slowest = slowest.max(start.elapsed());
    }
    Ok((rounds, slowest))
}

fn rig() -> Rig {
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 8 << 20, 512).expect("memory"));
    let limits = Limits {
        h2c_data_bytes: MAX_H2C_DATA,
        in_capsule_bytes: IO_IN_CAPSULE,
        ..Limits::default()
    };
    Rig::start(vec![volume], 2, limits).expect("a target")
}

#[test]
fn every_cell_on_a_socket() {
    let rig = rig();
    let addr = rig.addr;
    let stop = Arc::new(AtomicBool::new(false));
    let mut nth = 0..;
    let witnesses = Digests::ALL.map(|digests| {
        let (stop, nth) = (Arc::clone(&stop), nth.next().unwrap_or_default());
        std::thread::spawn(move || witness(addr, nth, digests, &stop))
    });
    let mut cells = 0;
    for row in rows() {
        for (state, verdict) in STATES.into_iter().zip(row.verdicts) {
            for digests in [Digests::ALL[0], Digests::ALL[3]] {
                if row.needs.met(digests) {
                    judge_socket(addr, &row, state, verdict, digests);
                    cells += 1;
                }
            }
        }
    }
    stop.store(true, Ordering::Release);
    for witness in witnesses {
        let (rounds, slowest) =
            witness.join().expect("no panic").expect("the other hosts notice nothing");
        println!("{cells} cells; {rounds} rounds of verified I/O, the slowest in {slowest:?}");
        assert!(rounds > 100 && slowest < Duration::from_secs(5));
    }
    process::wait_for(Duration::from_secs(20), || Ok(rig.target.connected() == (0, 0)))
        .expect("nothing is left of the faulty connections");
}
