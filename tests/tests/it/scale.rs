//! Many hosts, many namespaces, many keep alives: what each of them costs, and who suffers.
//!
//! Too slow for the ordinary run, and they measure: `cargo xtask test` runs them one by one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use block::null::NullVolume;
use block::ram::RamVolume;
use block::{Identity, Volume};
use it::link::{Protection, associate};
use it::load::{self, Workload};
use it::process;
use it::rig::{Rig, SUBNQN};
use it::wire::{self, Connect, Init, Pdu, Queue};
use nvmf_target::Limits;
use rustix::process::{Resource, getrlimit, setrlimit};

const HOSTS: usize = 1000;
const IO_QUEUES: u16 = 4;
const CONNECTIONS: usize = HOSTS * (IO_QUEUES as usize + 1);
/// Bytes of memory for one idle connection, of both its ends.
const CONNECTION_BYTES_MAX: u64 = 32 << 10;
/// Bytes for one namespace.
const NAMESPACE_BYTES_MAX: u64 = 8 << 10;

fn hostnqn(n: usize) -> String {
    format!("nqn.2014-08.org.example:scale-{n}")
}

/// Both ends of all connections are in this process. `false`: the limit cannot be had.
pub(crate) fn allow_files(count: u64) -> bool {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count) {
        limit.current = limit.maximum.map(|maximum| maximum.max(count)).or(Some(count));
        limit.maximum = limit.current;
        if setrlimit(Resource::Nofile, limit).is_err() {
            println!("SKIPPED: {count} open files are not allowed here (RLIMIT_NOFILE)");
            return false;
        }
    }
    true
}

fn limits() -> Limits {
    Limits {
        connections: 2 * CONNECTIONS,
        controllers: 2 * HOSTS,
        handshakes_per_peer: 2 * CONNECTIONS,
        // The connections wait for each other on a slow machine.
        handshake: Duration::from_secs(60),
        ..Limits::default()
    }
}

pub(crate) fn resident() -> u64 {
    process::resident_bytes(std::process::id()).expect("our own memory")
}

/// All queues of one host; its memory is theirs alone.
fn connect(addr: SocketAddr, n: usize, entries: u16, kato_ms: u32) -> io::Result<Vec<Queue>> {
    let connect = Connect { entries, kato_ms, ..Connect::new(SUBNQN, &hostnqn(n)) };
    let (mut admin, cntlid) = connect.admin(addr, Init::default())?;
    admin.command(wire::number_of_queues(IO_QUEUES), &[], &[])?.ok()?;
    let mut queues = vec![admin];
    for qid in 1..=IO_QUEUES {
        queues.push(connect.io(addr, Init::default(), cntlid, qid)?);
    }
    Ok(queues)
}

/// All hosts from a few threads; returns their queues and how long each host took.
fn connect_all(addr: SocketAddr) -> (Vec<Vec<Queue>>, Vec<Duration>) {
    const THREADS: usize = 4;
    let threads: Vec<_> = (0..THREADS)
        .map(|first| {
            std::thread::spawn(move || {
                (first..HOSTS)
                    .step_by(THREADS)
                    .map(|n| {
                        let start = Instant::now();
                        let queues = connect(addr, n, 128, 0).expect("every host connects");
                        (queues, start.elapsed())
                    })
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).unzip()
}

/// What one host with one queue gets of 4 KiB reads at a depth of 32; `again`: not the first time.
fn iops(addr: SocketAddr, again: bool) -> f64 {
    let host = hostnqn(HOSTS + usize::from(again));
    let mut association =
        associate(addr, (SUBNQN, &host), 64, 1, &Protection::None).expect("a host");
    let work = Workload {
        write: false,
        block_bytes: 4096,
        depth: 32,
        in_capsule: true,
        span_bytes: 1 << 20,
        lba_bytes: 512,
        namespaces: 1,
        interval: Duration::ZERO,
    };
    load::run(&mut association.io, &work, Duration::from_millis(500)).expect("I/O").iops
}

#[test]
#[ignore = "slow; a step of its own"]
fn a_thousand_hosts() {
    if !allow_files(2 * CONNECTIONS as u64 + 500) {
        return;
    }
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 1 << 20, 512).expect("memory"));
    let rig = Rig::start(vec![volume], 2, limits()).expect("a target");
    let addr = rig.addr;
    drop(connect(addr, 0, 128, 0).expect("the first host"));
    let empty = || {
        process::wait_for(Duration::from_secs(60), || Ok(rig.target.connected() == (0, 0)))
            .expect("all of them go");
    };
    let alone = iops(addr, false);
    empty();
    let before = resident();

    // One host connects as fast as it can, over and over.
    let stop = Arc::new(AtomicBool::new(false));
    let hammered = Arc::new(AtomicU64::new(0));
    let hammer = {
        let (stop, hammered) = (Arc::clone(&stop), Arc::clone(&hammered));
        std::thread::spawn(move || {
            let host = Connect::new(SUBNQN, "nqn.2014-08.org.example:hammer");
            while !stop.load(Ordering::Acquire) {
                // What it is told is its own affair.
                if host.admin(addr, Init::default()).is_ok() {
                    hammered.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    let start = Instant::now();
    let (hosts, mut times) = connect_all(addr);
    let took = start.elapsed();
    stop.store(true, Ordering::Release);
    hammer.join().expect("no panic");
    times.sort_unstable();
    let (median, slowest) = (times[HOSTS / 2], times[HOSTS - 1]);
    println!(
        "{HOSTS} hosts, {CONNECTIONS} connections in {took:?}: {:.0} connections/s beside {} of a \
         greedy host; one host takes {median:?} (median), {slowest:?} (slowest)",
        CONNECTIONS as f64 / took.as_secs_f64(),
        hammered.load(Ordering::Relaxed),
    );
    assert!(slowest < Duration::from_secs(5), "a host was kept out for {slowest:?}");
    process::wait_for(Duration::from_secs(20), || Ok(rig.target.connected().0 == CONNECTIONS))
        .expect("the greedy host is gone");
    let full = resident();
    let each = full.saturating_sub(before) / CONNECTIONS as u64;
    println!("{each} bytes per connection ({} MiB)", (full - before) >> 20);
    assert!(each <= CONNECTION_BYTES_MAX, "{each} bytes per connection");

    // What is idle does not slow down what is not.
    let beside = iops(addr, true);
    println!("one busy queue: {alone:.0} IOPS alone, {beside:.0} beside {CONNECTIONS} idle ones");
    assert!(beside > alone / 5.0, "{alone:.0} IOPS become {beside:.0}");

    // Idle connections cost nothing but the clock's tick.
    let pid = std::process::id();
    let (from, used) = (Instant::now(), process::cpu_time(pid).expect("our own time"));
    process::wait_for(Duration::from_secs(10), || Ok(from.elapsed() > Duration::from_secs(2)))
        .expect("time goes by");
    let used = process::cpu_time(pid).expect("our own time") - used;
    let share = used.as_secs_f64() / from.elapsed().as_secs_f64();
    println!("idle: {:.1} % of a core", share * 100.0);
    assert!(share < 0.25, "idle connections take {share:.2} of a core");

    // Everything goes, and coming again takes no more memory.
    drop(hosts);
    empty();
    let emptied = resident();
    let (again, _) = connect_all(addr);
    let second = resident();
    drop(again);
    empty();
    println!(
        "memory: {} MiB before, {} with all, {} after, {} with all again",
        before >> 20,
        full >> 20,
        emptied >> 20,
        second >> 20
    );
    assert!(second < full + full / 10, "memory grows from {full} to {second}");
}

fn null_volumes(count: u32) -> Vec<Arc<dyn Volume>> {
    (1..=count)
        .map(|n| {
            let mut uuid = [7; 16];
            wire::put(&mut uuid, 0, &n.to_le_bytes());
            let volume = NullVolume::new(Identity::from_uuid(uuid), 1 << 30, 512);
            Arc::new(volume) as Arc<dyn Volume>
        })
        .collect()
}

/// What a target of `count` namespaces costs in bytes each, and how long a connect takes.
fn namespaces(count: u32) -> (u64, Duration, Rig) {
    let before = resident();
    let rig = Rig::start(null_volumes(count), 2, Limits::default()).expect("a target");
    let start = Instant::now();
    let mut queues = connect(rig.addr, 0, 32, 0).expect("a host");
    let took = start.elapsed();
    let admin = &mut queues[0];

    // The active namespace list, page by page.
    let (mut nsid, mut listed) = (0u32, 0);
    loop {
        let mut identify = wire::sqe(6);
        wire::put(&mut identify, 4, &nsid.to_le_bytes());
        identify[40] = 2;
        wire::sgl(&mut identify, 0x5a, 0, 4096);
        let page = admin.command(identify, &[], &[]).expect("Identify").ok().expect("success");
        let entries: Vec<u32> = page
            .data
            .chunks(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().expect("4 bytes")))
            .take_while(|entry| *entry != 0)
            .collect();
        assert!(entries.iter().copied().eq(nsid + 1..nsid + 1 + entries.len() as u32));
        listed += entries.len() as u32;
        if entries.len() < 1024 {
            break;
        }
        nsid = entries[1023];
    }
    assert_eq!(listed, count);
    // The last one is as good as the first.
    let last = queues[1].command(wire::io_sqe(2, count, 0, 8, 4096), &[], &[]).expect("a read");
    assert_eq!((last.status, last.data.len()), (0, 4096));
    ((resident().saturating_sub(before)) / u64::from(count), took, rig)
}

#[test]
#[ignore = "slow; a step of its own"]
fn ten_thousand_namespaces() {
    let (few, few_took, few_rig) = namespaces(1000);
    let (many, many_took, many_rig) = namespaces(10_000);
    println!("1,000 namespaces: {few} bytes each, a host connects in {few_took:?}");
    println!("10,000 namespaces: {many} bytes each, a host connects in {many_took:?}");
    assert!(many <= NAMESPACE_BYTES_MAX, "{many} bytes per namespace");
    assert!(many <= few + few / 2, "each of 10,000 takes {many} bytes, each of 1,000 {few}");
    assert!(many_took < Duration::from_secs(2), "a connect takes {many_took:?}");
    ana_log(many_rig.addr, 10_000);
    drop((few_rig, many_rig));
}

/// The ANA log, whole and in the form without namespaces; or, where Identify does not promise it
/// (CMIC bit 3), none.
fn ana_log(addr: SocketAddr, count: u32) {
    let (mut admin, _) =
        Connect::new(SUBNQN, &hostnqn(1)).admin(addr, Init::default()).expect("a controller");
    let mut identify = wire::sqe(6);
    identify[40] = 1;
    wire::sgl(&mut identify, 0x5a, 0, 4096);
    let page = admin.command(identify, &[], &[]).expect("Identify").ok().expect("success").data;
    let has_ana = page[76] & 1 << 3 != 0;
    for groups_only in [false, true] {
        let len = if groups_only { 16 + 32 } else { 16 + 32 + 4 * count };
        let mut log = wire::sqe(2);
        (log[40], log[41]) = (0x0c, u8::from(groups_only));
        let numd_z = len / 4 - 1;
        wire::put(&mut log, 42, &(numd_z as u16).to_le_bytes());
        wire::put(&mut log, 44, &((numd_z >> 16) as u16).to_le_bytes());
        wire::sgl(&mut log, 0x5a, 0, len);
        let answer = admin.command(log, &[], &[]).expect("the ANA log");
        if !has_ana {
            assert_eq!(answer.status, 0x4109, "Invalid Log Page");
            continue;
        }
        let page = answer.ok().expect("success").data;
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!((page.len() as u32, word(8) & 0xffff, word(16)), (len, 1, 1));
        assert_eq!(word(20), if groups_only { 0 } else { count });
        if !groups_only {
            assert!((0..count).all(|n| word(48 + 4 * n as usize) == n + 1));
        }
    }
}

/// Keep alives of all hosts arrive while two queues take all that the cores can give.
#[test]
#[ignore = "slow; a step of its own"]
fn keep_alives_beside_a_busy_data_path() {
    const KATO: Duration = Duration::from_secs(3);
    if !allow_files(2 * HOSTS as u64 + 500) {
        return;
    }
    let volume: Arc<dyn Volume> =
        Arc::new(NullVolume::new(Identity::from_uuid([7; 16]), 1 << 30, 512));
    let rig = Rig::start(vec![volume], 2, limits()).expect("a target");
    let addr = rig.addr;
    let mut hosts: Vec<Queue> = (0..HOSTS)
        .map(|n| {
            let kato_ms = KATO.as_millis() as u32;
            let connect = Connect { kato_ms, ..Connect::new(SUBNQN, &hostnqn(n)) };
            connect.admin(addr, Init::default()).expect("a controller").0
        })
        .collect();
    let stop = Arc::new(AtomicBool::new(false));
    let busy: Vec<_> = (0..2)
        .map(|n| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let work = Workload {
                    write: n == 0,
                    block_bytes: 65536,
                    depth: 64,
                    in_capsule: false,
                    span_bytes: 1 << 30,
                    lba_bytes: 512,
                    namespaces: 1,
                    interval: Duration::ZERO,
                };
                let mut association =
                    associate(addr, (SUBNQN, &hostnqn(HOSTS + n)), 128, 1, &Protection::None)
                        .expect("a host");
                let mut commands = 0.0;
                while !stop.load(Ordering::Acquire) {
                    let time = Duration::from_millis(250);
                    commands +=
                        load::run(&mut association.io, &work, time).expect("I/O").iops / 4.0;
                }
                commands
            })
        })
        .collect();
    let keep_alive = Pdu::capsule(&wire::sqe(0x18), &[], Default::default(), 4);
    let (start, mut rounds, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while start.elapsed() < 3 * KATO {
        let round = Instant::now();
        // All at once, as after a network that was stuck.
        for host in &mut hosts {
            host.send(&keep_alive).expect("room in the socket");
        }
        for host in &mut hosts {
            let answer = host.receive().expect("a PDU").expect("no host is lost");
            assert_eq!((answer.kind(), answer.status()), (wire::RESPONSE, 0));
        }
        slowest = slowest.max(round.elapsed());
        rounds += 1;
        process::wait_for(KATO, || Ok(round.elapsed() > KATO / 4)).expect("time goes by");
    }
    stop.store(true, Ordering::Release);
    let commands: f64 = busy.into_iter().map(|thread| thread.join().expect("no panic")).sum();
    println!(
        "{rounds} rounds of {HOSTS} keep alives, the slowest answered in {slowest:?}, beside \
         {commands:.0} transfers of 64 KiB"
    );
    process::wait_for(KATO, || Ok(rig.target.connected().1 == HOSTS)).expect("no host is lost");
    assert!(commands > 1000.0 && slowest < KATO / 2);
    // And whoever says nothing any more is.
    process::wait_for(3 * KATO, || Ok(rig.target.connected().1 == 0)).expect("all are given up");
}
