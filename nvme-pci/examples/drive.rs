//! Drive a device from this process as a guest would: 4 KiB random reads on one queue.
//!
//! ```text
//! cargo run --release -p nvme-pci --features testing --example serve_nvme -- mapped /tmp/nvme.sock null:64M
//! cargo run --release -p nvme-pci --features testing --example drive -- mapped /tmp/nvme.sock [SECONDS]
//! ```
//!
//! `mapped` writes doorbells to the page that the device lets it map, `shadow` uses shadow doorbells
//! and rings by message when asked to, `trapped` always rings by message. Prints depth, thousands of
//! I/Os a second and microseconds an I/O takes, for depths 1, 32 and 128; then what one I/O takes
//! after pauses, by which the device sleeps.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use nvme::spec::NvmOpcode;
use nvme_pci::testing::{TestClient, TestHost, transfer};

const MEMORY: u64 = 64 << 20;
const DATA: u64 = 0x100_0000;
const PAUSES: u32 = 50;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mode, socket, rest @ ..] = arguments.as_slice() else {
        return Err("usage: drive mapped|shadow|trapped SOCKET [SECONDS]".into());
    };
    let seconds: f64 = rest.first().map_or(Ok(2.0), |text| text.parse())?;
    let mut host = TestHost::connect(Path::new(socket), MEMORY, 2);
    if mode == "mapped" {
        host.map_doorbells();
    }
    host.enable(32);
    host.create_queues(1, 1024);
    if mode == "shadow" {
        host.use_shadow_doorbells();
    }
    for depth in [1u64, 32, 128] {
        let (done, elapsed) = run(&mut host, depth, seconds);
        let rate = done as f64 / elapsed.as_secs_f64();
        println!("depth {depth}: {:.0} kIOPS, {:.1} us", rate / 1e3, depth as f64 * 1e6 / rate);
    }
    let mut took: Vec<Duration> = (0..PAUSES)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            let start = Instant::now();
            host.push(1, &transfer(NvmOpcode::READ, 1, 0, 8, DATA));
            host.kick(1);
            while host.pop(1).is_none() {}
            host.release(1);
            start.elapsed()
        })
        .collect();
    took.sort_unstable();
    let at = |share: usize| took[took.len() * share / 100];
    println!("after a pause of 20 ms: median {:?}, 95 % {:?}", at(50), at(95));
    Ok(())
}

/// Keeps so many reads in flight. Returns how many were done, in which time.
fn run(host: &mut TestHost<TestClient>, depth: u64, seconds: f64) -> (u64, Duration) {
    let start = Instant::now();
    let (mut sent, mut done, mut random) = (0u64, 0u64, 1u64);
    loop {
        let mut is_new = false;
        let is_over = start.elapsed().as_secs_f64() > seconds;
        while sent - done < depth && !is_over {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let block = (random >> 33) % (32 << 8);
            let at = DATA + sent % depth * 8192;
            host.push(1, &transfer(NvmOpcode::READ, 1, block * 8, 8, at));
            sent += 1;
            is_new = true;
        }
        if is_new {
            host.kick(1);
        }
        let before = done;
        while let Some(cqe) = host.pop(1) {
            assert!(cqe.status().is_success());
            done += 1;
        }
        if done > before {
            host.release(1);
        }
        if is_over {
            while done < sent {
                done += u64::from(host.pop(1).is_some());
            }
            host.release(1);
            return (done, start.elapsed());
        }
    }
}
