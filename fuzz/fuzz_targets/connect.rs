//! Connect commands and their data.
//!
//! Invariants checked: no panic; what is accepted can be encoded and parsed again; a refusal is an
//! error, and one of Connect Invalid Parameters points into the command or its data; a queue is
//! connected once.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nvme::ctrl::{Controller, ControllerConfig, ControllerKind, admit_admin};
use nvme::fabrics::{ConnectReject, ConnectRequest};
use nvme::spec::{FabricsType, Property, Sqe, Status};
use penstock_fuzz::{Input, nvm};

fn judge(reject: ConnectReject) {
    assert!(!reject.status.is_success());
    let (offset, in_data) = (reject.dw0 & 0xffff, reject.dw0 >> 16);
    let points = reject.status.dnr() == Status::CONNECT_INVALID_PARAMETERS.dnr();
    assert!(points || reject.dw0 == 0);
    assert!(in_data < 2 && offset < if in_data == 1 { 1024 } else { 64 });
}

/// A Connect that is sound but for what the input says.
fn command(input: &mut Input<'_>, sound: &ConnectRequest) -> (Sqe, Vec<u8>) {
    let (sqe, data) = sound.encode();
    let (mut sqe, mut data) = (sqe.to_bytes(), data.to_vec());
    for _ in 0..input.byte() % 4 {
        let at = usize::from(input.byte()) % 24;
        sqe[40 + at] = input.byte();
    }
    for _ in 0..input.byte() % 8 {
        let at = usize::from(u16::from_le_bytes([input.byte(), input.byte()])) % data.len();
        data[at] = input.byte();
    }
    if input.byte() == 0 {
        data.truncate(usize::from(input.byte()) * 5);
    }
    if input.byte() == 1 {
        let from = input.take(data.len());
        data[..from.len()].copy_from_slice(from);
    }
    (Sqe::from_bytes(&sqe), data)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let subsys = Arc::new(nvm::subsystem(0));
    let sound = ConnectRequest {
        qid: u16::from(input.byte()) % 4,
        queue_entries: 32,
        kato: Duration::from_secs(5),
        sq_flow_disabled: input.byte() & 1 == 1,
        hostid: [1; 16],
        cntlid: if input.byte() & 1 == 1 { 0xffff } else { 9 },
        subnqn: subsys.nqn().clone(),
        hostnqn: nvme::spec::Nqn::new("nqn.2014-08.org.example:host").expect("a name"),
    };
    let mut controller: Option<Controller> = None;
    let mut connected = 0;
    while !input.is_empty() {
        let (sqe, data) = command(&mut input, &sound);
        let request = match ConnectRequest::parse(&sqe, &data) {
            Ok(request) => request,
            Err(reject) => {
                judge(reject);
                continue;
            }
        };
        let (again, data) = request.encode();
        assert_eq!(ConnectRequest::parse(&again, &data).as_ref(), Ok(&request));
        match admit_admin(&request, &subsys) {
            Ok(()) => {
                assert!(request.is_admin() && request.is_dynamic());
                let config = ControllerConfig {
                    cntlid: 9,
                    kind: ControllerKind::Io,
                    hostnqn: request.hostnqn.clone(),
                    hostid: request.hostid,
                    kato: request.kato,
                    subsys: Arc::clone(&subsys),
                };
                let mut new = Controller::new(config, Duration::ZERO);
                let mut enable = Sqe::fabrics(FabricsType::PROPERTY_SET);
                enable.cdw11.set(Property::CC.0);
                enable.cdw12.set(0x0046_0001);
                let _ = new.admin(0, &enable, &[], &mut Vec::new(), Duration::ZERO);
                assert!(new.is_ready());
                (controller, connected) = (Some(new), 0);
            }
            Err(reject) => judge(reject),
        }
        if let Some(controller) = &mut controller {
            match controller.connect_io(&request) {
                Ok(()) => {
                    assert!((1..=controller.io_queues_granted()).contains(&request.qid));
                    connected += 1;
                }
                Err(reject) => judge(reject),
            }
            assert_eq!(controller.io_queues_connected(), connected);
            // The same queue a second time.
            if connected > 0 && controller.connect_io(&request).is_ok() {
                panic!("queue {} is connected twice", request.qid);
            }
        }
    }
});
