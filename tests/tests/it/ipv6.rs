//! The target and its discovery controller over IPv6, beside IPv4.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;

use block::ram::RamVolume;
use block::{Identity, Volume};
use it::rig::{Rig, SUBNQN};
use it::wire::{self, Connect, Digests, Init, Queue};
use nvme::spec::DISCOVERY_NQN;
use nvme::subsys::discovery::{DiscoveryEntry, parse_header, parse_records};
use nvmf_target::Limits;

const HOST: &str = "nqn.2014-08.org.example:ipv6";

/// A target on ::1 and 127.0.0.1; `None`, with the reason printed, where there is no IPv6.
fn rig() -> Option<Rig> {
    if let Err(error) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        println!("SKIPPED: no IPv6 here: {error}");
        return None;
    }
    let volume: Arc<dyn Volume> =
        Arc::new(RamVolume::new(Identity::from_uuid([7; 16]), 1 << 20, 512).expect("memory"));
    let listen: [IpAddr; 2] = [Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()];
    Some(Rig::start_on(&listen, vec![volume], 1, Limits::default()).expect("a target"))
}

#[test]
fn data_moves_over_ipv6() {
    let Some(rig) = rig() else { return };
    assert!(rig.addr.is_ipv6());
    for (n, digests) in Digests::ALL.into_iter().enumerate() {
        let init = Init { digests, ..Init::default() };
        let connect = Connect::new(SUBNQN, HOST);
        let (mut admin, cntlid) = connect.admin(rig.addr, init).expect("a controller");
        admin.command(wire::number_of_queues(1), &[], &[]).expect("queues").ok().expect("success");
        let mut io = connect.io(rig.addr, init, cntlid, 1).expect("an I/O queue");
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 3) as u8 ^ n as u8).collect();
        let write = wire::io_sqe(1, 1, 0, 128, 65536);
        io.command(write, &[], &data).expect("a write").ok().expect("success");
        let read = io.command(wire::io_sqe(2, 1, 0, 128, 65536), &[], &[]).expect("a read");
        assert!(read.status == 0 && read.data == data);
    }
}

/// The discovery log as the controller at `addr` tells it.
fn discover(addr: SocketAddr) -> Vec<DiscoveryEntry> {
    let get = |queue: &mut Queue, offset: u64, len: u32| {
        let mut log = wire::sqe(2);
        log[40] = 0x70;
        wire::put(&mut log, 42, &((len / 4 - 1) as u16).to_le_bytes());
        wire::put(&mut log, 48, &offset.to_le_bytes());
        wire::sgl(&mut log, 0x5a, 0, len);
        queue.command(log, &[], &[]).expect("the log").ok().expect("success").data
    };
    let connect = Connect::new(DISCOVERY_NQN, HOST);
    let (mut admin, _) = connect.admin(addr, Init::default()).expect("a discovery controller");
    let header = parse_header(&get(&mut admin, 0, 20), 100).expect("a header");
    let records = get(&mut admin, 1024, header.records as u32 * 1024);
    parse_records(&records).map(|entry| entry.expect("a sound entry")).collect()
}

#[test]
fn discovery_names_addresses_of_both_families() {
    let Some(rig) = rig() else { return };
    for asked in &rig.addrs {
        let entries = discover(*asked);
        let mut told: Vec<SocketAddr> = entries
            .iter()
            .filter(|entry| entry.subnqn.as_str() == SUBNQN)
            .map(|entry| entry.socket_addr().expect("an address"))
            .collect();
        told.sort_unstable();
        let mut wanted = rig.addrs.clone();
        wanted.sort_unstable();
        assert_eq!(told, wanted, "asked at {asked}");
        // And each of them is where it says.
        for addr in told {
            Connect::new(SUBNQN, HOST).admin(addr, Init::default()).expect("a controller");
        }
        let own = entries.iter().find(|entry| entry.subnqn.as_str() != SUBNQN);
        assert_eq!(own.and_then(DiscoveryEntry::socket_addr), Some(*asked), "{entries:?}");
    }
}
