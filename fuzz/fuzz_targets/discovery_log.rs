//! What a discovery controller says to a host, and what ours says of the entries it was given.
//!
//! Invariants checked: no panic; a host asks for a bounded number of bytes and ends; an entry that
//! is understood is encoded and understood again; our own pages are.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nvme::host::{Authenticate, ConnectNames};
use nvme::host::discovery::{Client, ClientConfig, ClientState, RECORDS_MAX};
use nvme::spec::{Cqe, Nqn, Status};
use nvme::subsys::discovery::{
    DiscoveryEntry, DiscoveryLog, HEADER_LEN, parse_extended, parse_header, parse_records,
};
use penstock_fuzz::Input;

/// Entries that make sense among these bytes.
fn parse(bytes: &[u8]) -> Vec<DiscoveryEntry> {
    let entries: Vec<_> = parse_records(bytes).collect();
    assert_eq!(entries.len(), bytes.len() / 1024);
    let mut rest = bytes;
    while let Ok((entry, left)) = parse_extended(rest) {
        assert!(left.len() + 1024 < rest.len());
        assert_eq!(DiscoveryEntry::parse(&entry.encode()).as_ref(), Ok(&entry));
        rest = left;
    }
    entries.into_iter().filter_map(Result::ok).collect()
}

/// Our own log of `entries`, in every form.
fn serve(entries: &[DiscoveryEntry], generation: u64) {
    let log = DiscoveryLog::new(generation, entries);
    assert_eq!(log.records(), entries.len());
    for lsp in 0..8 {
        for portid in [None, Some(0), Some(1)] {
            let page = log.page(lsp, portid);
            let header = parse_header(&page, RECORDS_MAX).expect("our own header");
            assert_eq!(header.genctr, generation);
            let mut rest = &page[HEADER_LEN..];
            for _ in 0..header.records {
                if header.is_extended {
                    let (entry, left) = parse_extended(rest).expect("our own entry");
                    assert!(entries.contains(&entry));
                    rest = left;
                } else {
                    let (record, left) = rest.split_at(1024);
                    let entry = parse_records(record).next().expect("a record");
                    assert!(entries.contains(&entry.expect("our own entry")));
                    rest = left;
                }
            }
            assert!(rest.is_empty());
        }
    }
}

/// A host that reads the log of a controller which says anything.
fn read(input: &mut Input<'_>) {
    let mut client = Client::new(ClientConfig {
        names: ConnectNames {
            hostnqn: Nqn::new("nqn.2014-08.org.example:host").expect("a name"),
            hostid: [1; 16],
            subnqn: Nqn::discovery(),
        },
        command_timeout: Duration::from_secs(1),
        authenticate: Authenticate::Never,
        // Some stay, and are told of changes.
        kato: Duration::from_secs(u64::from(input.byte() % 3)),
    });
    let mut now = Duration::ZERO;
    let (mut commands, mut idle) = (0, 0);
    while client.deadline().is_some() || matches!(client.state(), ClientState::Reading) {
        if input.is_empty() || matches!(client.state(), ClientState::Failed(_)) {
            break;
        }
        let Some(command) = client.next_command(now) else {
            let next = client.deadline().unwrap_or(now).max(now + Duration::from_millis(1));
            now = next;
            idle += 1;
            assert!(idle < 1000, "a client that waits for nothing ends");
            continue;
        };
        idle = 0;
        commands += 1;
        assert!(command.read_len <= 4096 && commands < 20_000);
        let how = input.byte();
        let status = if how & 31 == 31 { Status::INTERNAL_ERROR } else { Status::SUCCESS };
        // CAP, CSTS and so on: mostly what lets the client go on.
        let result = match how >> 5 {
            0 | 1 => 0x0020_0200_ffff_u64 | 1 << 37,
            2 | 3 => 1,
            4 => 0x0002_0000,
            5 => 9,
            6 => 1 | 2 << 2,
            _ => u64::from(input.byte()) << (input.byte() % 64),
        };
        let tag = if how == 0xfe { command.tag + 1 } else { command.tag };
        let mut data = vec![0; command.read_len as usize];
        let count = usize::from(input.byte());
        let fill = input.take(count);
        let len = fill.len().min(data.len());
        data[..len].copy_from_slice(&fill[..len]);
        if how & 16 == 0 && data.len() == 4096 {
            // An Identify that says the right things.
            data[111] = 2;
            data[77] = 0;
        }
        let cqe = Cqe::new(tag, status, result).to_bytes();
        drop(client.on_completion(tag, &cqe, &data, now));
    }
    if let ClientState::Done(found) = client.state() {
        assert!(found.entries.len() as u64 <= RECORDS_MAX);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    match input.byte() % 3 {
        0 => read(&mut input),
        1 => {
            if let Ok(header) = parse_header(input.0, 1000) {
                assert!(header.records <= 1000);
            }
            parse(input.0);
        }
        _ => {
            // Small records become whole ones: text where text belongs.
            let mut bytes = Vec::new();
            let generation = u64::from(input.byte());
            while !input.is_empty() && bytes.len() < 64 << 10 {
                let mut record = vec![0; 1024];
                record[..3].copy_from_slice(&[3, 1 + input.byte() % 2, input.byte() % 5]);
                record[4] = input.byte() & 1;
                record[32..64].fill(b' ');
                record[32..36].copy_from_slice(b"4420");
                record[256..260].copy_from_slice(b"nqn.");
                let count = usize::from(input.byte() % 32);
                let name = input.take(count);
                record[260..260 + name.len()].copy_from_slice(name);
                record[512..768].fill(b' ');
                let count = usize::from(input.byte() % 16);
                let addr = input.take(count);
                record[512..512 + addr.len()].copy_from_slice(addr);
                if input.byte() & 1 == 1 {
                    let text: &[u8] = if record[1] == 1 { b"10.0.0.1" } else { b"fd00::1" };
                    record[512..768].fill(b' ');
                    record[512..512 + text.len()].copy_from_slice(text);
                }
                bytes.extend(record);
            }
            serve(&parse(&bytes), generation);
        }
    }
});
