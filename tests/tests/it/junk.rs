//! Junk on the target's port: other hosts' I/O goes on, memory does not grow, nothing panics.
//!
//! `PENSTOCK_SMOKE_SECONDS` sets how long (5 here; the test command says 60).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use block::ram::RamVolume;
use block::{Identity, Volume};
use it::link::{Protection, associate};
use it::load::{self, Workload};
use it::process;
use it::rig::{Rig, SUBNQN};
use nvmf_target::Limits;

const GOOD_HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:0ddba11e-0000-4000-8000-000000000001";
const BAD_HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:0bad0bad-0000-4000-8000-000000000002";
const SPAN_BYTES: u64 = 8 << 20;
/// What the process may grow by: the pools of two cores that are used more fully, not a leak.
const GROWTH_BYTES_MAX: u64 = 48 << 20;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn icreq() -> Vec<u8> {
    let mut pdu = vec![0u8; 128];
    pdu[2] = 128;
    pdu[4] = 128;
    pdu
}

/// A capsule of a random but plausible command, whose fields may then be spoiled.
fn capsule(random: &mut Random) -> Vec<u8> {
    let data = random.below(3) * random.below(5000);
    let mut pdu = vec![4, 0, 72, if data > 0 { 72 } else { 0 }];
    pdu.extend_from_slice(&(72 + data as u32).to_le_bytes());
    let mut sqe = [0u8; 64];
    sqe[0] = *[0, 1, 2, 8, 9, 0x7f, 6, 2, 9, 0x0a, 0x0c].get(random.below(11)).expect("in range");
    sqe[1] = 0x40;
    sqe[2..4].copy_from_slice(&(random.below(64) as u16).to_le_bytes());
    sqe[4] = random.below(3) as u8;
    let len = if data > 0 { data } else { random.below(1 << 20) };
    sqe[32..36].copy_from_slice(&(len as u32).to_le_bytes());
    sqe[39] = if data > 0 { 0x01 } else { 0x5a };
    sqe[40..48].copy_from_slice(&(random.below(1 << 15) as u64).to_le_bytes());
    sqe[48..50].copy_from_slice(&(random.below(300) as u16).to_le_bytes());
    pdu.extend_from_slice(&sqe);
    pdu.extend_from_slice(&random.bytes(data));
    pdu
}

/// One connection's worth of junk. Errors of the socket are what junk deserves.
fn misbehave(addr: SocketAddr, random: &mut Random) -> std::io::Result<()> {
    let mut stream = match random.below(4) {
        // Past Connect: the I/O queue of a sound association turns bad.
        0 => match associate(addr, (SUBNQN, BAD_HOST), 32, 1, &Protection::None) {
            Ok(mut association) => association.io.remove(0).into_stream(),
            Err(_) => return Ok(()),
        },
        _ => {
            let mut stream = TcpStream::connect(addr)?;
            if random.below(5) > 0 {
                stream.write_all(&icreq())?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                stream.read_exact(&mut [0; 128])?;
            }
            stream
        }
    };
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    for _ in 0..1 + random.below(20) {
        let mut junk = match random.below(6) {
            0 => {
                let len = random.below(70_000);
                random.bytes(len)
            }
            1 => icreq(),
            _ => capsule(random),
        };
        for _ in 0..random.below(4) {
            let at = random.below(junk.len().clamp(1, 96));
            if let Some(byte) = junk.get_mut(at) {
                *byte = random.next() as u8;
            }
        }
        let cut = random.below(junk.len() + 1);
        let (first, second) = junk.split_at(cut);
        stream.write_all(first)?;
        if random.below(10) == 0 {
            return Ok(());
        }
        stream.write_all(second)?;
        if random.below(2) == 0 && matches!(stream.read(&mut [0; 4096]), Ok(0)) {
            return Ok(());
        }
    }
    Ok(())
}

#[test]
fn junk_on_the_port_hurts_nobody_else() {
    let seconds = std::env::var("PENSTOCK_SMOKE_SECONDS").ok().and_then(|s| s.parse().ok());
    let limit = Duration::from_secs(seconds.unwrap_or(5));
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), SPAN_BYTES, 512).expect("memory"));
    let limits = Limits { handshake: Duration::from_secs(2), ..Limits::default() };
    let rig = Rig::start(vec![volume], 2, limits).expect("a target");
    let addr = rig.addr;

    let mut good = associate(addr, (SUBNQN, GOOD_HOST), 32, 1, &Protection::None)
        .expect("a sound host connects");
    let work = |write| Workload {
        write,
        block_bytes: 4096,
        depth: 8,
        in_capsule: true,
        span_bytes: SPAN_BYTES,
        lba_bytes: 512,
        namespaces: 1,
        interval: Duration::ZERO,
    };
    load::run(&mut good.io, &work(true), Duration::from_millis(200)).expect("I/O before the junk");
    let before = process::resident_bytes(std::process::id()).expect("our own memory");

    let stop = Arc::new(AtomicBool::new(false));
    let sessions = Arc::new(AtomicU64::new(0));
    let vandals: Vec<_> = (1..=3)
        .map(|seed| {
            let (stop, sessions) = (Arc::clone(&stop), Arc::clone(&sessions));
            std::thread::spawn(move || {
                let mut random = Random(0x1234_5678_9abc_def1 * seed);
                while !stop.load(Ordering::Relaxed) {
                    // A closed or reset connection is the target's right.
                    drop(misbehave(addr, &mut random));
                    sessions.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let start = Instant::now();
    let (mut rounds, mut slowest) = (0, f64::MAX);
    while start.elapsed() < limit {
        for write in [true, false] {
            let figures = load::run(&mut good.io, &work(write), Duration::from_millis(250))
                .expect("a sound host's I/O goes on");
            slowest = figures.iops.min(slowest);
        }
        rounds += 1;
    }
    stop.store(true, Ordering::Relaxed);
    vandals.into_iter().for_each(|v| v.join().expect("vandals do not panic"));
    let after = process::resident_bytes(std::process::id()).expect("our own memory");
    let sessions = sessions.load(Ordering::Relaxed);
    println!(
        "{sessions} junk connections, {rounds} rounds of sound I/O, slowest {slowest:.0} IOPS, \
         memory {} -> {} KiB",
        before >> 10,
        after >> 10
    );
    assert!(sessions > 20, "the vandals were idle: {sessions} connections");
    assert!(after < before + GROWTH_BYTES_MAX, "memory grew from {before} to {after}");

    drop(good);
    // Everything the vandals left behind goes: half-open connections by the handshake's time-out.
    process::wait_for(Duration::from_secs(20), || Ok(rig.target.connected() == (0, 0)))
        .expect("no connection or association is left");
}
