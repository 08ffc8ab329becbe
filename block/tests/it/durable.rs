//! What was acknowledged is there after the process was killed, at any moment.
//!
//! A killed process loses nothing that the kernel has, so this shows that an acknowledgement never
//! comes before the data is out of the process, and that a successor waits for what is still in
//! flight. What a loss of power does is shown on the simulated kernel.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, io};

use block::Op;
use block::uring::{FileOptions, FileVolume};
use tempfile::TempDir;

use crate::harness::{Bench, identity};

const CHILD: &str = "PENSTOCK_TEST_DURABLE_FILE";
const BLOCK: usize = 4096;
const BLOCKS: u64 = 256;

/// What write number `n` puts into its block.
fn content(n: u64) -> Vec<u8> {
    let mut bytes = vec![n as u8; BLOCK];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    bytes
}

fn open(path: &Path) -> FileVolume {
    let options = FileOptions { size_bytes: Some(BLOCKS * BLOCK as u64), ..FileOptions::default() };
    FileVolume::open(path, identity(), &options).unwrap()
}

/// The process that is killed: writes one block after the other, and says which is durable.
#[test]
fn child() {
    let Some(path) = env::var_os(CHILD) else { return };
    let volume = open(Path::new(&path));
    let mut bench = Bench::real(&volume, 4);
    for n in 1.. {
        let offset = n % BLOCKS * BLOCK as u64;
        let fua = n % 2 == 0;
        bench.write(offset, &content(n), fua).unwrap();
        if !fua {
            bench.range(Op::Flush, 0, 0, false).unwrap();
        }
        // By hand: what is printed the usual way is captured.
        if io::stderr().write_all(format!("durable {n}\n").as_bytes()).is_err() {
            return; // nobody listens any more
        }
    }
}

#[test]
fn acknowledged_writes_survive_the_death_of_the_process() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    for rounds in [3, 150, 700] {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "durable::child", "--nocapture"])
            .env(CHILD, &path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut last = 0;
        let numbers = |line: &str| line.strip_prefix("durable ").map(|n| n.parse::<u64>().unwrap());
        while last < rounds {
            let line = lines.next().expect("the child lives").unwrap();
            last = numbers(&line).unwrap_or(last);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said until the end counts.
        for line in lines.map_while(Result::ok) {
            last = numbers(&line).unwrap_or(last);
        }
        let volume = open(&path);
        let mut bench = Bench::real(&volume, 4);
        for n in (1..=last).rev().take(BLOCKS as usize - 1) {
            let seen = bench.read(n % BLOCKS * BLOCK as u64, BLOCK).unwrap();
            let newer = content(n + BLOCKS);
            assert!(seen == content(n) || seen == newer, "write {n} of {last} is lost");
        }
    }
}
