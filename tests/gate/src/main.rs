//! Work of a known amount for `cargo xtask bench gate`, which counts its instructions.
//!
//! ```text
//! gate                   the names of the workloads, one a line
//! gate WORKLOAD COUNT    do COUNT requests of it and end
//! ```
//!
//! Each workload is one thread without a clock, a socket or a file of its own, so that the same
//! program takes the same instructions each time. Only what is done inside [`counted`] is counted:
//! neither the handshake before it, whose keys are random, nor the simulated kernel beside it, which
//! takes a hundred times what our side of it does. What the set-up takes all the same is left out by
//! running two counts and taking the difference.
//!
//! The names are what revisions are compared by: a workload that does something else gets another
//! name. The gate builds this program once against each revision, so it uses only what has been
//! there for long.
#![forbid(unsafe_code)]

mod device;
mod fabric;
mod record;

use std::process::ExitCode;

/// One kind of work: its name, and what does so many requests of it.
type Work = (&'static str, fn(u64));

const WORKS: &[Work] = &[
    // The two ends of a qpair's protocol machine, back to back: 4 KiB with its headers.
    ("tcp-read-4k", |count| fabric::machines(count, false, false)),
    ("tcp-write-4k", |count| fabric::machines(count, true, false)),
    ("tcp-write-4k-digests", |count| fabric::machines(count, true, true)),
    // Initiator, network, target and a null volume on the simulated kernel.
    ("path-read-4k-qd1", |count| {
        fabric::path(count, fabric::Shape { write: false, bytes: 4096, depth: 1 })
    }),
    ("path-read-4k-qd32", |count| {
        fabric::path(count, fabric::Shape { write: false, bytes: 4096, depth: 32 })
    }),
    ("path-write-4k-qd32", |count| {
        fabric::path(count, fabric::Shape { write: true, bytes: 4096, depth: 32 })
    }),
    ("path-read-128k-qd8", |count| {
        fabric::path(count, fabric::Shape { write: false, bytes: 131_072, depth: 8 })
    }),
    // The record layer of TLS.
    ("tls-4k", |count| record::seal_and_open(count, 4096)),
    ("tls-16k", |count| record::seal_and_open(count, 16384)),
    // Devices: rings in guest memory, a volume that does nothing.
    ("virtio-read-4k-qd1", |count| device::virtio(count, 1)),
    ("virtio-read-4k-qd32", |count| device::virtio(count, 32)),
    ("nvme-read-4k-qd1", |count| device::nvme(count, 1)),
    ("nvme-read-4k-qd32", |count| device::nvme(count, 32)),
];

/// The name that callgrind is told to count in. Not inlined, so that there is one.
#[inline(never)]
pub(crate) fn counted<T>(work: impl FnOnce() -> T) -> T {
    work()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => {
            WORKS.iter().for_each(|(name, _)| println!("{name}"));
            ExitCode::SUCCESS
        }
        [name, count] => {
            let work = WORKS.iter().find(|(known, _)| known == name);
            let (Some((_, work)), Ok(count)) = (work, count.parse()) else {
                eprintln!("gate: no workload {name:?}, or {count:?} is no number");
                return ExitCode::from(2);
            };
            work(count);
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: gate [WORKLOAD COUNT]");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_does_what_it_is_asked_for() {
        for (name, work) in WORKS {
            println!("{name}");
            // Panics if a request fails or is lost.
            work(70);
        }
    }
}
