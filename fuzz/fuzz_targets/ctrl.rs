//! A controller's life: properties, features, identify, logs, events, resets, in any order.
//!
//! Invariants checked: no panic; a command gives no more data than its buffer has, none if it
//! fails, and all of it if it is a log or a data structure; an event completes a request that is
//! held, once, and there are never more held than promised; what is asked of the driver is bounded.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nvme::ctrl::{
    ABORT_MAX, ADMIN_DATA_MAX, AER_MAX, AdminOutcome, Controller, ControllerConfig, ControllerKind,
    ErrorRecord, HealthCounters, Instance,
};
use nvme::spec::discovery::SubsystemType;
use nvme::spec::{AdminOpcode, FabricsType, Nqn, Property, Sqe, Status};
use nvme::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use nvme::subsys::reservation::NoticeKind;
use nvme::xfer;
use penstock_fuzz::{Input, nvm};

/// Identify, Get Log Page, features, AER, Abort, Keep Alive, Fabrics, what only PCI functions take
/// (queues and their doorbells; `nvme_device` has one), and what is not there.
const OPCODES: [u8; 17] = [
    0x06, 0x06, 0x02, 0x02, 0x09, 0x0a, 0x0c, 0x0c, 0x08, 0x18, 0x7f, 0x00, 0x01, 0x04, 0x05, 0x7c,
    0x38,
];

fn log(generation: u8) -> Arc<DiscoveryLog> {
    let entries: Vec<_> = (0..generation % 5)
        .map(|n| {
            let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 4420 + u16::from(n)));
            let nqn = Nqn::new(&format!("nqn.2026-11.io.penstock:{n}")).expect("a name");
            DiscoveryEntry::tcp(SubsystemType::NVM, addr, u16::from(n), nqn)
        })
        .collect();
    Arc::new(DiscoveryLog::new(u64::from(generation), &entries))
}

struct Driver {
    controller: Controller,
    now: Duration,
    out: Vec<u8>,
    /// Slots of the event requests that are held.
    held: Vec<u16>,
    next_slot: u16,
    aborts: u8,
}

impl Driver {
    fn command(&mut self, sqe: &Sqe, input: &mut Input<'_>) {
        let needed = Controller::needs_host_data(sqe);
        let limit = self.controller.host_data_max(sqe);
        assert!(needed <= ADMIN_DATA_MAX);
        let count = usize::from(input.byte());
        let mut data = input.take(count).to_vec();
        data.resize(needed as usize, 0);
        if let Some(_wanted) = Controller::controllers_wanted(sqe) {
            self.controller.set_controllers(&[9, 3, 3, 0xfff0]);
        }
        let slot = self.next_slot;
        self.next_slot = (slot + 1) % 500;
        let outcome = self.controller.admin(slot, sqe, &data, &mut self.out, self.now);
        let buffer = xfer::parse_data(sqe, 8192).map_or(0, |pointer| pointer.len());
        let len = self.out.len() as u32;
        assert!(len <= buffer && len <= limit, "{len} bytes for a buffer of {buffer}");
        match outcome {
            AdminOutcome::Complete { status, .. } => {
                assert!(status.is_success() || len == 0);
                let whole = [AdminOpcode::IDENTIFY.0, AdminOpcode::GET_LOG_PAGE.0];
                if status.is_success() && whole.contains(&sqe.opcode) {
                    assert_eq!(len, buffer.min(limit), "a transfer is never short");
                }
            }
            AdminOutcome::Pending => {
                assert!(!self.held.contains(&slot));
                self.held.push(slot);
                assert!(self.held.len() <= AER_MAX);
            }
            AdminOutcome::Abort { .. } => {
                self.aborts += 1;
                assert!(self.aborts <= ABORT_MAX);
            }
            AdminOutcome::SubsystemReset { status, .. } => {
                assert!(status.is_success());
                self.controller.note_subsystem_reset();
            }
            AdminOutcome::ResetQueues { status, .. } => {
                assert!(status.is_success() && self.controller.is_ending());
            }
            AdminOutcome::CrossReset { cntlid, .. } => {
                assert_ne!(cntlid, self.controller.cntlid());
            }
            AdminOutcome::Queue(_) | AdminOutcome::DoorbellBuffer { .. } => {
                panic!("queues of fabrics are connected");
            }
            AdminOutcome::SetWriteProtect { nsid, .. } => {
                assert!(self.controller.subsys().namespace(nsid).is_some());
            }
            AdminOutcome::ReservationPersistence { nsid, set } => {
                let subsys = self.controller.subsys();
                assert!(set.is_some() && nsid == u32::MAX || subsys.namespace(nsid).is_some());
            }
        }
        self.events();
    }

    /// Completes what is due.
    fn events(&mut self) {
        while let Some((slot, status, _)) = self.controller.poll_event() {
            let held = self.held.iter().position(|held| *held == slot);
            self.held.swap_remove(held.expect("an event needs a request that is held"));
            let aborted = [Status::SUCCESS.dnr(), Status::COMMAND_ABORT_REQUESTED.dnr()];
            let known = aborted.contains(&status.dnr());
            assert!(known, "event requests end with success or because they are aborted");
        }
    }

    /// Something that is not a command of the host.
    fn happening(&mut self, what: u8, input: &mut Input<'_>) {
        let controller = &mut self.controller;
        match what % 10 {
            0 => controller.update_subsys(Arc::new(nvm::subsystem(input.byte()))),
            1 => controller.update_discovery(log(input.byte())),
            2 => controller.health_warning(input.byte()),
            3 => controller.record_error(&ErrorRecord {
                sqid: input.byte().into(),
                cid: input.byte().into(),
                status: Status::INTERNAL_ERROR,
                opcode: 1,
                nsid: 1,
                lba: 7,
            }),
            4 => {
                let kinds = [
                    NoticeKind::RegistrationPreempted,
                    NoticeKind::ReservationReleased,
                    NoticeKind::ReservationPreempted,
                ];
                let kind = kinds[usize::from(input.byte()) % 3];
                controller.reservation_notice(u32::from(input.byte()) % 4, kind);
            }
            5 => controller.set_health(HealthCounters {
                critical_warning: input.byte(),
                temperature_kelvin: 200 + u16::from(input.byte()),
                ..HealthCounters::default()
            }),
            6 => {
                if controller.is_ending() {
                    controller.queues_closed(self.now);
                    assert!(!controller.is_ending() && controller.io_queues_connected() == 0);
                }
            }
            7 => {
                if self.aborts > 0 {
                    controller.abort_done();
                    self.aborts -= 1;
                }
            }
            8 => {
                self.now += Duration::from_millis(u64::from(input.byte()) * 50);
                let due = controller.deadline().is_some_and(|deadline| self.now >= deadline);
                assert_eq!(controller.is_expired(self.now), due);
            }
            _ => controller.internal_error(input.byte() & 1 == 1),
        }
        self.events();
    }
}

/// Property Set or Get, mostly of CC with a sound value.
fn property(input: &mut Input<'_>) -> Sqe {
    let what = input.byte();
    let mut sqe = Sqe::fabrics(if what & 1 == 1 {
        FabricsType::PROPERTY_GET
    } else {
        FabricsType::PROPERTY_SET
    });
    let properties = [Property::CC.0, Property::CC.0, 0x1c, 0, 8, 0x20, 0x68, 0x13];
    sqe.cdw11.set(properties[usize::from(what >> 1 & 7)]);
    sqe.cdw10.set(u32::from(what >> 4 & 1));
    let values = [
        0x0046_0001,
        0x0046_0000,
        0x0046_4001,
        0x0046_8001,
        0x4e56_4d65,
        u32::from(input.byte()) << (input.byte() % 25),
        0,
        u32::MAX,
    ];
    sqe.cdw12.set(values[usize::from(what >> 5)]);
    sqe
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let shape = input.byte();
    let is_discovery = input.byte() & 7 == 7;
    let config = ControllerConfig {
        cntlid: 9,
        kind: if is_discovery { ControllerKind::Discovery(log(2)) } else { ControllerKind::Io },
        hostnqn: Nqn::new("nqn.2014-08.org.example:host").expect("a name"),
        hostid: [1; 16],
        kato: Duration::from_secs(u64::from(input.byte() % 4) * 5),
        subsys: Arc::new(nvm::subsystem(shape)),
    };
    let mut driver = Driver {
        controller: Controller::new(config, Duration::ZERO),
        now: Duration::ZERO,
        out: Vec::new(),
        held: Vec::new(),
        next_slot: 0,
        aborts: 0,
    };
    if shape & 1 == 1 {
        driver.controller.set_instance(Instance { ciu: 1, cirn: 5 });
        driver.controller.set_port(1);
    }
    // Most inputs are about an enabled controller.
    if input.byte() & 15 != 0 {
        let mut enable = Sqe::fabrics(FabricsType::PROPERTY_SET);
        enable.cdw11.set(Property::CC.0);
        enable.cdw12.set(0x0046_0001);
        driver.command(&enable, &mut Input(&[]));
        assert!(driver.controller.is_ready());
    }
    while !input.is_empty() {
        let what = input.byte();
        match what >> 6 {
            0 => driver.happening(what, &mut input),
            1 if what & 3 == 0 => {
                let sqe = property(&mut input);
                driver.command(&sqe, &mut input);
            }
            _ => {
                let sqe = nvm::sqe(&mut input, &OPCODES);
                driver.command(&sqe, &mut input);
            }
        }
    }
});
