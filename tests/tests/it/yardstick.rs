//! The benchmark's own parts: a yardstick must be right before it measures.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use it::bare;
use it::link::Link;
use it::load::{self, Workload};

fn bare_iops(write: bool, block_bytes: usize, depth: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address");
    let stop = Arc::new(AtomicBool::new(false));
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        bare::serve(stream, block_bytes, &stop)
    });
    let mut links = [Link::bare(addr).expect("the server")];
    let work = Workload {
        write,
        block_bytes,
        depth,
        in_capsule: true,
        span_bytes: 1 << 20,
        lba_bytes: 512,
        namespaces: 1,
        interval: Duration::ZERO,
    };
    let figures = load::run(&mut links, &work, Duration::from_millis(50)).expect("a run");
    drop(links);
    server.join().expect("no panic").expect("no socket error");
    assert!(figures.p50_us > 0.0 && figures.p99_us >= figures.p50_us, "{figures:?}");
    figures.iops
}

#[test]
fn bare_loop_answers_reads_and_writes_of_any_depth() {
    for (write, block_bytes, depth) in
        [(false, 4096, 1), (true, 4096, 7), (false, 131_072, 3), (true, 131_072, 32)]
    {
        assert!(bare_iops(write, block_bytes, depth) > 0.0);
    }
}

#[test]
fn load_generator_refuses_what_is_no_response() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address");
    let server = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().expect("a client");
        stream.write_all(&[0xee; 24]).expect("room in the socket");
        stream
    });
    let mut links = [Link::bare(addr).expect("the server")];
    let work = Workload {
        write: false,
        block_bytes: 4096,
        depth: 1,
        in_capsule: true,
        span_bytes: 1 << 20,
        lba_bytes: 512,
        namespaces: 1,
        interval: Duration::ZERO,
    };
    let error = load::run(&mut links, &work, Duration::from_secs(5)).expect_err("junk");
    assert!(error.to_string().contains("PDU type 0xee"), "{error}");
    drop(server.join());
}
