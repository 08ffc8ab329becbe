//! Requests of 72 bytes answered by 24 bytes and a payload, over loopback TCP between two cores:
//! what a stream costs without any protocol. The server is a stream, or (`bare`) a spinning loop of
//! `recv` and one `sendmsg` for all answers up to 128 KiB. Prints rates and processor time per
//! answer, interleaved, as the machine's mood changes.
//!
//! `cargo bench -p reactor -- [PAYLOAD_BYTES]`. Expect about 0.6 us per 4 KiB and 3.8 us per send.

#![expect(clippy::unwrap_used, reason = "a failure ends the benchmark")]
#![expect(unsafe_code, reason = "reads the thread's clock")]

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use iobuf::SgList;
use reactor::net::{Rx, Stream, StreamConfig};
use reactor::{Core, CoreConfig};

const REQUEST: usize = 72;
const HEAD: usize = 24;
const RUN: Duration = Duration::from_millis(500);

fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer names `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn config(cpu: usize, rx_incremental: bool) -> CoreConfig {
    CoreConfig { pin_to: Some(cpu), rx_incremental, ..CoreConfig::default() }
}

/// Answers until the peer closes; returns answers and processor time.
fn serve(socket: TcpStream, payload: usize, incremental: bool) -> (u64, Duration) {
    let mut core = Core::new(config(0, incremental)).unwrap();
    let local = core.local();
    let mut stream = Stream::new(&local, socket.into(), StreamConfig::default()).unwrap();
    let mut sg = SgList::default();
    local.pool().alloc(payload, &mut sg).unwrap();
    let (mut bytes, mut wanted, mut answers) = (0, 0, 0);
    let start = cpu_time();
    loop {
        stream.poll();
        loop {
            match stream.recv() {
                Rx::Data(chunk) => bytes += chunk.len(),
                Rx::Empty => break,
                Rx::Eof | Rx::Failed(_) => return (answers, cpu_time() - start),
            }
        }
        wanted += bytes / REQUEST;
        bytes %= REQUEST;
        while wanted > 0 && stream.room() > 0 {
            stream.push(&[1; HEAD], Some((&sg, 0, payload)), None, Some(0)).unwrap();
            wanted -= 1;
            answers += 1;
        }
        stream.flush();
        while stream.sent().is_some() {}
        core.turn(true);
    }
}

/// The same by hand.
fn serve_bare(socket: TcpStream, payload: usize) -> (u64, Duration) {
    drop(Core::new(config(0, false)).unwrap()); // binds the thread
    socket.set_nonblocking(true).unwrap();
    socket.set_nodelay(true).unwrap();
    let mut buffer = vec![0; 256 << 10];
    let (head, body) = ([1; HEAD], vec![0; payload]);
    let batch = ((128 << 10) / (HEAD + payload)).max(1);
    let (mut bytes, mut answers) = (0, 0);
    let start = cpu_time();
    loop {
        match (&socket).read(&mut buffer) {
            Ok(0) => return (answers, cpu_time() - start),
            Ok(count) => bytes += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(_) => return (answers, cpu_time() - start),
        }
        let mut wanted = bytes / REQUEST;
        bytes %= REQUEST;
        answers += wanted as u64;
        while wanted > 0 {
            let count = wanted.min(batch);
            let mut slices: Vec<_> =
                (0..count).flat_map(|_| [IoSlice::new(&head), IoSlice::new(&body)]).collect();
            let mut slices = &mut slices[..];
            while !slices.is_empty() {
                match (&socket).write_vectored(slices) {
                    Ok(count) => IoSlice::advance_slices(&mut slices, count),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return (answers, cpu_time() - start),
                }
            }
            wanted -= count;
        }
    }
}

fn run(payload: usize, depth: usize, server: &'static str) {
    let incremental = server == "incremental";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    let (result, results) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let served = match server {
            "bare" => serve_bare(far, payload),
            _ => serve(far, payload, incremental),
        };
        result.send(served).unwrap();
    });
    let client = std::thread::spawn(move || {
        let mut core = Core::new(config(1, incremental)).unwrap();
        let mut stream = Stream::new(&core.local(), near.into(), StreamConfig::default()).unwrap();
        let (mut left, mut bytes, mut answers) = (depth, 0, 0u64);
        let start = Instant::now();
        while start.elapsed() < RUN {
            while left > 0 && stream.room() > 0 {
                stream.push(&[1; REQUEST], None, None, None).unwrap();
                left -= 1;
            }
            stream.flush();
            core.turn(true);
            stream.poll();
            while let Rx::Data(chunk) = stream.recv() {
                bytes += chunk.len();
            }
            let count = bytes / (HEAD + payload);
            bytes %= HEAD + payload;
            left += count;
            answers += count as u64;
        }
        (answers, start.elapsed())
    });
    let (answers, elapsed) = client.join().unwrap();
    let (served, cpu) = results.recv().unwrap();
    thread.join().unwrap();
    println!(
        "payload {payload:6} depth {depth:3} {server:11}: {:8.1} k/s, \
         server {:5.0} ns per answer",
        answers as f64 / elapsed.as_secs_f64() / 1e3,
        cpu.as_nanos() as f64 / served as f64,
    );
}

fn main() {
    let payload = std::env::args().filter_map(|arg| arg.parse().ok()).next();
    for payload in payload.map_or(vec![4096, 131_072], |payload| vec![payload]) {
        for depth in [1, 32, 128] {
            for server in ["bare", "whole", "incremental"].repeat(3) {
                run(payload, depth, server);
            }
        }
    }
}
