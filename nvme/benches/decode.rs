//! What decoding one I/O command costs: `cargo bench -p nvme --bench decode`.
//!
//! Commands differ in LBA, length, direction and namespace, so that nothing is constant; the
//! median of several rounds is printed per command kind.

use std::hint::black_box;
use std::time::Instant;

use nvme::ctrl::io::decode;
use nvme::host::io;
use nvme::spec::{AsciiField, Nqn, Sqe};
use nvme::subsys::{Limits, NamespaceInfo, SubsystemInfo};

const COMMANDS: usize = 4096;
const ROUNDS: usize = 200;

fn subsystem(namespaces: u32, gap: u32) -> SubsystemInfo {
    let list = (0..namespaces).map(|n| {
        let mut ns = NamespaceInfo::new(1 + n * gap, 512, 1 << 30);
        ns.write_zeroes = true;
        ns
    });
    SubsystemInfo::new(
        Nqn::new("nqn.2024-01.io.penstock:bench").expect("a valid NQN"),
        AsciiField::new("1").expect("short ASCII"),
        AsciiField::new("Penstock").expect("short ASCII"),
        AsciiField::new("1").expect("short ASCII"),
        list.collect(),
        Limits { namespaces_max: 1 << 20, ..Limits::default() },
    )
    .expect("a possible subsystem")
}

fn measure(name: &str, subsys: &SubsystemInfo, make: impl Fn(u32, u64) -> [u8; 64]) {
    let namespaces = subsys.namespaces();
    let commands: Vec<Sqe> = (0..COMMANDS)
        .map(|n| {
            let nsid = namespaces[n * 7919 % namespaces.len()].nsid;
            Sqe::from_bytes(&make(nsid, (n as u64 * 104_729) % (1 << 29)))
        })
        .collect();
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for sqe in &commands {
                assert!(black_box(decode(black_box(sqe), subsys)).is_ok());
            }
            start.elapsed().as_nanos() as f64 / COMMANDS as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    let median = rounds[ROUNDS / 2];
    println!("{name:<34} {median:>7.2} ns  {:>7.1} M/s", 1000.0 / median);
}

fn main() {
    let one = subsystem(1, 1);
    let many = subsystem(1000, 1);
    let sparse = subsystem(1000, 3);
    let read = |nsid, slba| io::read(nsid, slba, 8, 4096, false);
    let write = |nsid, slba| io::write(nsid, slba, 8, 4096, true, false);
    let zeroes = |nsid, slba| io::write_zeroes(nsid, slba, 8, true, false);
    measure("read, 1 namespace", &one, read);
    measure("write in capsule, 1 namespace", &one, write);
    measure("write zeroes, 1 namespace", &one, zeroes);
    measure("read, 1000 namespaces", &many, read);
    measure("read, 1000 namespaces with gaps", &sparse, read);
}
