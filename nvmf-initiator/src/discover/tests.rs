use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nvme::ctrl::{AdminOutcome, Controller, ControllerConfig, ControllerKind};
use nvme::fabrics::ConnectRequest;
use nvme::spec::discovery::SubsystemType;
use nvme::spec::{AsciiField, Cqe, FabricsType, Sqe, Status};
use nvme::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use nvme::subsys::{Limits, SubsystemInfo};
use nvme::tcp::{Target, TargetConfig, TargetEvent};

use super::*;

fn nqn(text: &str) -> Nqn {
    Nqn::new(text).unwrap()
}

fn config(addr: SocketAddr) -> DiscoverConfig {
    DiscoverConfig {
        addr,
        subnqn: Nqn::discovery(),
        hostnqn: nqn("nqn.2025-01.io.example:host"),
        hostid: [9; 16],
        timeout: Duration::from_secs(20),
        security: Security::default(),
    }
}

/// Serves one connection with a function.
fn serve<T: Send + 'static>(
    f: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (SocketAddr, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let accept = move || {
        let (socket, _) = listener.accept().unwrap();
        socket.set_nodelay(true).unwrap();
        f(socket)
    };
    (addr, thread::spawn(accept))
}

/// A discovery controller on a blocking socket. Says whether it was shut down in order.
fn controller(mut socket: TcpStream, log: Arc<DiscoveryLog>) -> bool {
    let field = AsciiField::new("1").unwrap();
    let model = AsciiField::new("fake").unwrap();
    let firmware = AsciiField::new("1").unwrap();
    let subsys = SubsystemInfo::discovery(field, model, firmware, Limits::default()).unwrap();
    let subsys = Arc::new(subsys);
    let mut qpair = Target::new(TargetConfig::default());
    let mut ctrl: Option<Controller> = None;
    let mut commands = std::collections::BTreeMap::new();
    let mut was_shut_down = false;
    let mut chunk = [0; 4096];
    loop {
        let len = socket.read(&mut chunk).unwrap_or(0);
        if len == 0 {
            return was_shut_down;
        }
        let mut input = &chunk[..len];
        while let Some(event) = qpair.next(&mut input).unwrap() {
            let slot = match event {
                TargetEvent::Initialized { reply } => {
                    socket.write_all(&reply).unwrap();
                    continue;
                }
                TargetEvent::Command { slot, sqe, in_capsule_len } => {
                    let data = vec![0; in_capsule_len as usize];
                    commands.insert(slot, (Sqe::from_bytes(&sqe), data));
                    if in_capsule_len > 0 {
                        continue;
                    }
                    slot
                }
                TargetEvent::Data { slot, offset, bytes } => {
                    let (_, data) = commands.get_mut(&slot).unwrap();
                    data[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                    continue;
                }
                TargetEvent::DataEnd { slot } => slot,
                other => panic!("{other:?}"),
            };
            let (sqe, data) = commands.remove(&slot).unwrap();
            let now = Duration::ZERO;
            let mut out = Vec::new();
            let (status, result) = match &mut ctrl {
                None => {
                    assert_eq!(sqe.fctype(), FabricsType::CONNECT);
                    let request = ConnectRequest::parse(&sqe, &data).unwrap();
                    ctrl = Some(Controller::new(
                        ControllerConfig {
                            cntlid: 5,
                            kind: ControllerKind::Discovery(Arc::clone(&log)),
                            hostnqn: request.hostnqn,
                            hostid: request.hostid,
                            kato: request.kato,
                            subsys: Arc::clone(&subsys),
                        },
                        now,
                    ));
                    (Status::SUCCESS, 5)
                }
                Some(ctrl) => match ctrl.admin(slot, &sqe, &data, &mut out, now) {
                    AdminOutcome::Complete { status, result } => (status, result),
                    AdminOutcome::ResetQueues { status, result, shutdown } => {
                        was_shut_down |= shutdown;
                        ctrl.queues_closed(now);
                        (status, result)
                    }
                    other => panic!("a client does not ask for that: {other:?}"),
                },
            };
            if !out.is_empty() {
                let head = qpair.c2h_data(slot, 0, out.len() as u32, true, false);
                socket.write_all(&head).unwrap();
                socket.write_all(&out).unwrap();
            }
            let cqe = Cqe::new(qpair.cid(slot), status, result).to_bytes();
            socket.write_all(&qpair.response(slot, &cqe)).unwrap();
            qpair.release(slot);
        }
    }
}

fn entries(count: u16) -> Vec<DiscoveryEntry> {
    let entry = |i: u16| {
        let addr = SocketAddr::from(([192, 0, 2, 1], 4420 + i));
        let subnqn = nqn(&format!("nqn.2025-01.io.example:volume{i}"));
        DiscoveryEntry::tcp(SubsystemType::NVM, addr, i, subnqn)
    };
    (0..count).map(entry).collect()
}

#[test]
fn reads_logs_of_any_length_and_shuts_the_controller_down() {
    for count in [0, 1, 4, 5, 37] {
        let log = Arc::new(DiscoveryLog::new(7, &entries(count)));
        let (addr, server) = serve(move |socket| controller(socket, log));
        let found = discover(&config(addr)).unwrap();
        assert_eq!(found.genctr, 7);
        let got: Result<Vec<_>, _> = found.entries.into_iter().collect();
        assert_eq!(got.unwrap(), entries(count));
        assert!(server.join().unwrap(), "no orderly shutdown");
    }
}

#[test]
fn a_refused_connection_names_the_address() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let error = discover(&config(addr)).unwrap_err();
    assert!(matches!(error, DiscoverError::Connect { .. }), "{error:?}");
    assert!(error.to_string().contains(&addr.to_string()));
}

#[test]
fn junk_is_a_fault_that_the_controller_is_told_about() {
    let (addr, server) = serve(|mut socket| {
        socket.write_all(&[0x5a; 4096]).unwrap();
        let mut all = Vec::new();
        let _ = socket.read_to_end(&mut all);
        all
    });
    let error = discover(&config(addr)).unwrap_err();
    assert!(matches!(error, DiscoverError::Protocol(_)), "{error:?}");
    let received = server.join().unwrap();
    // ICReq is 128 bytes; then H2CTermReq, PDU type 2.
    assert_eq!(received.get(128), Some(&2), "no H2CTermReq");
}

#[test]
fn a_controller_that_closes_or_stays_silent_ends_it() {
    let (addr, server) = serve(drop);
    let error = discover(&config(addr)).unwrap_err();
    assert!(matches!(error, DiscoverError::Closed | DiscoverError::Io(_)), "{error:?}");
    server.join().unwrap();

    let (addr, server) = serve(|mut socket| {
        let mut all = Vec::new();
        let _ = socket.read_to_end(&mut all);
    });
    let timeout = Duration::from_millis(30);
    let error = discover(&DiscoverConfig { timeout, ..config(addr) }).unwrap_err();
    assert!(matches!(error, DiscoverError::Timeout(t) if t == timeout), "{error:?}");
    server.join().unwrap();
}
