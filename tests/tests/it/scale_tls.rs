//! Many strangers at the door of TLS, and many hosts with keys: what each of them costs, and who
//! suffers.
//!
//! Too slow for the ordinary run, and they measure: `cargo xtask test` runs them one by one.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::ram::RamVolume;
use block::{Identity, Volume};
use crypto::psk::{Derivation, IdentityVersion, Psk, RetainedKey};
use crypto::{KeyHash, TlsKey};
use it::process;
use it::rig::{Rig, SUBNQN};
use it::secure::{self, Tunnel};
use it::wire::{self, Connect, Init, Queue};
use nvmf_target::{HostKeys, HostTlsKey, KeyStore, Limits, Tls};

use crate::scale::{allow_files, resident};

/// Handshakes that are begun and not ended.
const STRANGERS: usize = 10_000;
/// Bytes of memory for a connection that has sent a part of its first flight.
const HALF_OPEN_BYTES_MAX: u64 = 16 << 10;
/// Bytes for one handshake that was answered, with what the allocator keeps; 512 on each of the cores.
const ANSWERED_BYTES_MAX: u64 = 96 << 10;
const CORES: usize = 2;
const ANSWERED_MAX: usize = CORES * 512;
/// How long a sound host may take to connect beside all that, and one I/O of it. Each of its two
/// connections may find 5,000 others before it at its core, which takes up 2,560 in a second.
const PATIENCE: Duration = Duration::from_secs(15);

fn hostnqn(n: usize) -> String {
    format!("nqn.2014-08.org.example:tls-{n}")
}

fn tls_key(n: usize) -> TlsKey {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
    TlsKey::new(KeyHash::Sha256, &bytes).expect("a key")
}

fn psk(n: usize) -> Psk {
    let key = tls_key(n);
    let retained = RetainedKey::new(&key, &hostnqn(n), Derivation::Rfc8446).expect("a name");
    retained.psk(IdentityVersion::V1, &hostnqn(n), SUBNQN).expect("short names")
}

fn keys(hosts: usize) -> Arc<KeyStore> {
    let store = KeyStore::default();
    for n in 0..hosts {
        let tls = vec![HostTlsKey { key: tls_key(n), subnqn: None, expires: None }];
        store.set(&hostnqn(n), HostKeys { tls, ..HostKeys::default() });
    }
    Arc::new(store)
}

fn rig(limits: Limits, keys: Arc<KeyStore>) -> Rig {
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 8 << 20, 512).expect("memory"));
    let secure = (Tls::Required, keys);
    Rig::start_secure(&[Ipv4Addr::LOCALHOST.into()], vec![volume], CORES, limits, secure)
        .expect("a target")
}

/// A host with TLS: its queues, and what carries them.
struct Host {
    io: Queue,
    _admin: Queue,
    _tunnel: Tunnel,
    took: Duration,
}

fn host(addr: SocketAddr, n: usize) -> io::Result<Host> {
    let start = Instant::now();
    let tunnel = Tunnel::start(addr, &psk(n))?;
    let connect = Connect::new(SUBNQN, &hostnqn(n));
    let (mut admin, cntlid) = connect.admin(tunnel.addr, Init::default())?;
    admin.command(wire::number_of_queues(1), &[], &[])?.ok()?;
    let io = connect.io(tunnel.addr, Init::default(), cntlid, 1)?;
    Ok(Host { io, _admin: admin, _tunnel: tunnel, took: start.elapsed() })
}

/// Writes and reads back; how long that took.
fn verify(host: &mut Host, slba: u64, stamp: u8) -> io::Result<Duration> {
    let start = Instant::now();
    let bytes: Vec<u8> = (0..4096).map(|n| (n as u8).wrapping_mul(stamp | 1)).collect();
    let mut sqe = wire::io_sqe(1, 1, slba, 8, 4096);
    wire::sgl(&mut sqe, 0x01, 0, 4096);
    host.io.command(sqe, &bytes, &[])?.ok()?;
    let read = host.io.command(wire::io_sqe(2, 1, slba, 8, 4096), &[], &[])?.ok()?;
    if read.data != bytes {
        return Err(io::Error::other("what was read is not what was written"));
    }
    Ok(start.elapsed())
}

/// Strangers, in a process of their own.
struct Strangers {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Strangers {
    /// They are there, and have sent all of `flight` but the last byte.
    fn begin(addr: SocketAddr, flight: &[u8]) -> Strangers {
        let mut child = Command::new(env!("CARGO_BIN_EXE_strangers"))
            .args([addr.to_string(), STRANGERS.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let said = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut strangers = Strangers { child, said };
        let hex: String = flight.iter().map(|byte| format!("{byte:02x}")).collect();
        strangers.tell(&hex, "begun");
        strangers
    }

    fn tell(&mut self, line: &str, answer: &str) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "{line}").expect("it listens");
        let mut said = String::new();
        self.said.read_line(&mut said).expect("it answers");
        assert_eq!(said.trim(), answer);
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        // Gone already if it failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Strangers who send all but the last byte of what a sound host has sent, then the last byte, and
/// then nothing, beside a host that verifies and hosts that come.
fn flood(limits: Limits, all_are_held: bool) {
    let handshake = limits.handshake;
    let rig = rig(limits, keys(16));
    let addr = rig.addr;
    let mut first = host(addr, 0).expect("a host");
    let slowest_alone = (0..100).map(|n| verify(&mut first, n * 8, n as u8).expect("I/O")).max();
    let before = resident();

    let stop = Arc::new(AtomicBool::new(false));
    let verifier = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            let (mut count, mut slowest) = (0u64, Duration::ZERO);
            while !stop.load(Ordering::Acquire) {
                let took = verify(&mut first, count % 1000 * 8, count as u8).expect("I/O goes on");
                slowest = slowest.max(took);
                count += 1;
            }
            (first, count, slowest)
        })
    };
    let flight = secure::first_flight(&psk(1)).expect("a first flight");
    let start = Instant::now();
    let mut strangers = Strangers::begin(addr, &flight);
    let opened = start.elapsed();
    let newcomer = host(addr, 2).expect("a host connects beside half-open handshakes");
    let second = newcomer.took;
    let there = rig.target.connected().0;
    let half_open = resident().saturating_sub(before);
    let each = half_open / there.max(1) as u64;
    println!(
        "{STRANGERS} handshakes begun in {opened:?}, {there} connections kept: {each} bytes each \
         ({} MiB); a host connects in {second:?}",
        half_open >> 20
    );
    assert!(second < PATIENCE, "a host was kept out for {second:?}");
    assert!(each < HALF_OPEN_BYTES_MAX, "{each} bytes for a half-open handshake");
    if all_are_held {
        // A core's inbox may be full for a moment.
        assert!(there > STRANGERS * 9 / 10, "the limits allow all of them: {there}");
    }

    let start = Instant::now();
    strangers.tell("last", "whole");
    // Comes while they are served, and again when they all have been.
    let third = host(addr, 3).expect("a host connects beside a crowd of handshakes");
    let busy = third.took;
    let dropped = || rig.target.status().limits.handshakes_dropped;
    process::wait_for(Duration::from_secs(60), || {
        Ok(!all_are_held || dropped() >= (there - ANSWERED_MAX - 10) as u64)
    })
    .expect("all are served");
    let served = start.elapsed();
    let fourth = host(addr, 4).expect("a host connects when every place is taken");
    let answered = resident().saturating_sub(before);
    println!(
        "all flights whole, served in {served:?}: {} MiB, {} dropped for newer ones; a host \
         connects in {busy:?} meanwhile and in {:?} afterwards",
        answered >> 20,
        dropped(),
        fourth.took,
    );
    assert!(busy < PATIENCE && fourth.took < PATIENCE, "hosts were kept out");
    let most = half_open + ANSWERED_MAX as u64 * ANSWERED_BYTES_MAX;
    assert!(answered < most, "{answered} bytes with all that are answered, {most} allowed");

    stop.store(true, Ordering::Release);
    let (mut first, count, slowest) = verifier.join().expect("I/O went on");
    println!(
        "meanwhile {count} blocks verified, the slowest in {slowest:?} (alone {:?})",
        slowest_alone.unwrap_or_default()
    );
    assert!(count > 100 && slowest < PATIENCE, "{count} blocks, the slowest in {slowest:?}");

    // Time is up for all of them, and for nobody else: 2 connections of each of 4 hosts stay.
    process::wait_for(handshake + Duration::from_secs(30), || Ok(rig.target.connected() == (8, 4)))
        .expect("strangers go when their time is up");
    verify(&mut first, 0, 1).expect("I/O");
    let after = resident().saturating_sub(before);
    println!("{} MiB when they are gone", after >> 20);
    drop((strangers, newcomer, third, fourth));
}

#[test]
#[ignore = "slow; a step of its own"]
fn ten_thousand_half_open_handshakes_that_are_all_held() {
    if !allow_files(STRANGERS as u64 + 500) {
        return;
    }
    let limits = Limits {
        connections: 2 * STRANGERS,
        handshakes_per_peer: STRANGERS,
        handshake: Duration::from_secs(60),
        ..Limits::default()
    };
    flood(limits, true);
}

#[test]
#[ignore = "slow; a step of its own"]
fn ten_thousand_half_open_handshakes_at_the_usual_limits() {
    if !allow_files(STRANGERS as u64 + 500) {
        return;
    }
    flood(Limits::default(), false);
}

/// What a store of so many hosts takes of memory each, how long a handshake of one of them takes,
/// and a host's way to its first I/O.
fn registered(hosts: usize) -> (u64, Duration, Duration) {
    const ROUNDS: usize = 101;

    let before = resident();
    let store = keys(hosts);
    let bytes = resident().saturating_sub(before) / hosts as u64;
    let rig = rig(Limits::default(), store);
    // From all over the store, each another one.
    let chosen = |n: usize| n * 7919 % hosts;
    let mut handshakes: Vec<Duration> = (0..ROUNDS)
        .map(|n| {
            let psk = psk(chosen(n));
            let stream = TcpStream::connect(rig.addr).expect("a connection");
            let start = Instant::now();
            secure::handshake(&stream, &psk).expect("a host that is registered");
            start.elapsed()
        })
        .collect();
    let mut admissions: Vec<Duration> =
        (0..ROUNDS).map(|n| host(rig.addr, chosen(n)).expect("a host").took).collect();
    handshakes.sort_unstable();
    admissions.sort_unstable();
    (bytes, handshakes[ROUNDS / 2], admissions[ROUNDS / 2])
}

#[test]
#[ignore = "slow; a step of its own"]
fn a_hundred_thousand_registered_hosts() {
    // So much that what the first store leaves behind is no part of the second one's memory.
    const MANY: usize = 100_000;
    const HOST_BYTES_MAX: u64 = 1024;

    let (many_bytes, many_shake, many_admission) = registered(MANY);
    let (_, few_shake, few_admission) = registered(1_000);
    println!(
        "1,000 hosts: handshake {few_shake:?}, two queues {few_admission:?}; 100,000 hosts: \
         handshake {many_shake:?}, two queues {many_admission:?}, {many_bytes} bytes each"
    );
    assert!(many_bytes < HOST_BYTES_MAX, "{many_bytes} bytes for each host");
    let room = Duration::from_millis(2);
    assert!(many_shake < few_shake * 2 + room, "{few_shake:?} become {many_shake:?}");
    assert!(
        many_admission < few_admission * 2 + room,
        "{few_admission:?} become {many_admission:?}"
    );
}
