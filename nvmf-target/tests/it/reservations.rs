//! Reservations: who is kept out, from when on, and what a restart keeps.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block::fault::{FaultPlan, FaultVolume};
use block::ram::RamVolume;
use block::{Identity, Op, Volume};
use nvme::spec::{NvmOpcode, SglDescriptor, Sqe, Status};
use nvme::subsys::reservation::ReservationState;
use nvmf_target::{NamespaceConfig, Request, ReservationStore, SubsystemConfig};

use crate::host::{Data, Done, Queue};
use crate::rig::{
    BLOCK, BLOCKS, Host, Rig, SUBNQN, compare, pattern, ranged, rw, status, structured, uuid, write,
};

/// RTYPE: Write Exclusive, Exclusive Access.
const WE: u32 = 1;
const EA: u32 = 2;
const CONFLICT: Result<(), Status> = Err(Status::RESERVATION_CONFLICT.dnr());

fn keys(a: u64, b: u64) -> Vec<u8> {
    [a.to_le_bytes(), b.to_le_bytes()].concat()
}

/// Registers `key`; `persist` is CPTPL.
fn register(key: u64, persist: u32) -> (Sqe, Data) {
    let (mut sqe, data) = structured(NvmOpcode::RESERVATION_REGISTER, &keys(0, key));
    sqe.cdw10.set(persist << 30);
    (sqe, data)
}

/// RACQA `action` (0: acquire, 1: preempt, 2: preempt and abort) of `rtype`.
fn acquire(action: u32, rtype: u32, key: u64, other: u64) -> (Sqe, Data) {
    let (mut sqe, data) = structured(NvmOpcode::RESERVATION_ACQUIRE, &keys(key, other));
    sqe.cdw10.set(action | rtype << 8);
    (sqe, data)
}

/// RRELA `action` (0: release, 1: clear) of `rtype`.
fn release(action: u32, rtype: u32, key: u64) -> (Sqe, Data) {
    let (mut sqe, data) = structured(NvmOpcode::RESERVATION_RELEASE, &key.to_le_bytes());
    sqe.cdw10.set(action | rtype << 8);
    (sqe, data)
}

fn report(rig: &mut Rig, queue: &Queue) -> Vec<u8> {
    let mut sqe = Sqe::new(NvmOpcode::RESERVATION_REPORT.0);
    sqe.nsid.set(1);
    sqe.dptr = SglDescriptor::transport(4096);
    sqe.cdw10.set(4096 / 4 - 1);
    sqe.cdw11.set(1);
    let done = rig.command(queue, sqe, Data::Reply(4096));
    assert_eq!(status(&done), Ok(()));
    done.reply
}

#[track_caller]
fn ok(rig: &mut Rig, queue: &Queue, command: (Sqe, Data)) {
    let done = rig.command(queue, command.0, command.1);
    assert_eq!(status(&done), Ok(()));
}

fn outcome(rig: &mut Rig, queue: &Queue, command: (Sqe, Data)) -> Result<(), Status> {
    let done: Done = rig.command(queue, command.0, command.1);
    status(&done)
}

fn reads(slba: u64) -> (Sqe, Data) {
    (rw(NvmOpcode::READ, slba, BLOCK), Data::Reply(BLOCK))
}

#[test]
fn reservation_keeps_others_out_of_every_kind_of_command() {
    let mut rig = Rig::new(1);
    let [a, b] = [rig.host(1, 1), rig.host(2, 2)];
    let (a, b) = (&a.io[0], &b.io[1]);
    let block = pattern(1, BLOCK);
    rig.write(a, 0, &block);
    ok(&mut rig, a, register(0xa, 0));
    ok(&mut rig, a, acquire(0, WE, 0xa, 0));
    let copy = || {
        let mut range = [0; 32];
        range[8] = 4;
        let (mut sqe, data) = structured(NvmOpcode::COPY, &range);
        sqe.cdw10.set(100);
        (sqe, data)
    };
    let deallocate = |attribute: u32| {
        let mut range = [0; 16];
        range[4] = 1;
        let (mut sqe, data) = structured(NvmOpcode::DATASET_MANAGEMENT, &range);
        sqe.cdw11.set(attribute);
        (sqe, data)
    };
    let flush = || {
        let mut sqe = Sqe::new(NvmOpcode::FLUSH.0);
        sqe.nsid.set(1);
        (sqe, Data::None)
    };
    for command in [
        write(0, &block),
        (ranged(NvmOpcode::WRITE_ZEROES, 0, 1), Data::None),
        copy(),
        deallocate(4),
        deallocate(1),
        flush(),
    ] {
        let opcode = command.0.opcode;
        assert_eq!(outcome(&mut rig, b, command), CONFLICT, "opcode {opcode:#x}");
    }
    for command in [reads(0), compare(0, &block), (ranged(NvmOpcode::VERIFY, 0, 1), Data::None)] {
        assert_eq!(outcome(&mut rig, b, command), Ok(()));
    }
    ok(&mut rig, a, release(0, WE, 0xa));
    ok(&mut rig, b, write(0, &block));
    ok(&mut rig, a, acquire(0, EA, 0xa, 0));
    for command in [reads(0), compare(0, &block), (ranged(NvmOpcode::VERIFY, 0, 1), Data::None)] {
        assert_eq!(outcome(&mut rig, b, command), CONFLICT);
    }
    // The holder feels nothing, on whatever queue, and its reads come through.
    ok(&mut rig, a, write(0, &block));
    assert_eq!(rig.read(a, 0, BLOCK), block);
    assert_eq!(outcome(&mut rig, b, acquire(0, WE, 0, 0)), CONFLICT, "it is not registered");
    ok(&mut rig, a, release(1, 0, 0xa));
    ok(&mut rig, b, write(0, &block));
}

#[test]
fn fused_pair_of_a_host_that_is_kept_out_changes_nothing() {
    let mut rig = Rig::new(2);
    let [a, b] = [rig.host(1, 1), rig.host(2, 1)];
    let (old, new) = (pattern(1, BLOCK), pattern(2, BLOCK));
    rig.write(&a.io[0], 5, &old);
    ok(&mut rig, &a.io[0], register(0xa, 0));
    ok(&mut rig, &a.io[0], acquire(0, WE, 0xa, 0));
    let mut commands = [compare(5, &old), write(5, &new)];
    commands[0].0.flags |= 1;
    commands[1].0.flags |= 2;
    let ids = commands.map(|(sqe, data)| b.io[0].send(sqe, data));
    assert_eq!(ids.map(|id| status(&rig.outcome(&b.io[0], id))), [Ok(()), CONFLICT]);
    assert_eq!(rig.read(&b.io[0], 5, BLOCK), old);
    ok(&mut rig, &a.io[0], write(5, &new));
}

/// A preempt is answered only when nothing of the preempted host can land any more: not what is at
/// the volume on any core, and not what still waits for memory, room or its data.
#[test]
fn no_old_write_lands_after_a_preempt_is_answered() {
    let mut kept_out = 0;
    for seed in 0..30 {
        let action = 1 + (seed % 2) as u32;
        let mut rig = Rig::new(seed);
        let [a, b] = [rig.host(1, 1), rig.host(2, 4)];
        ok(&mut rig, &a.io[0], register(0xa, 0));
        ok(&mut rig, &b.io[0], register(0xb, 0));
        ok(&mut rig, &b.io[0], acquire(0, WE, 0xb, 0));
        rig.faults.set(FaultPlan {
            delays_per_million: 500_000,
            delay_max: Duration::from_millis(50),
            busy_per_million: 300_000,
            ..FaultPlan::default()
        });
        let old: Vec<(usize, u64)> = (0..80)
            .map(|n| {
                let (sqe, data) = write(n, &pattern(1000 + n, BLOCK));
                (n as usize % 4, b.io[n as usize % 4].send(sqe, data))
            })
            .collect();
        rig.run_for(Duration::from_micros(seed * 20));
        ok(&mut rig, &a.io[0], acquire(action, WE, 0xa, 0xb));
        // From here on the new holder's data is what is there.
        rig.faults.set(FaultPlan::default());
        let mine = pattern(seed, 80 * BLOCK);
        rig.write(&a.io[0], 0, &mine);
        for (queue, id) in old {
            match status(&rig.outcome(&b.io[queue], id)) {
                Ok(()) => {}
                other => {
                    assert_eq!(other, CONFLICT);
                    kept_out += 1;
                }
            }
        }
        rig.run_for(Duration::from_secs(1));
        assert_eq!(rig.read(&a.io[0], 0, 80 * BLOCK), mine, "seed {seed}: an old write landed");
        assert_eq!(outcome(&mut rig, &b.io[1], write(0, &pattern(9, BLOCK))), CONFLICT);
    }
    assert!(kept_out > 20, "only {kept_out} writes had not reached the volume");
}

#[test]
fn acquire_waits_for_what_others_have_at_the_volume() {
    let mut rig = Rig::new(4);
    let [a, b] = [rig.host(1, 1), rig.host(2, 4)];
    ok(&mut rig, &a.io[0], register(0xa, 0));
    rig.faults.hold();
    let ids: Vec<u64> =
        b.io.iter()
            .map(|queue| {
                let (sqe, data) = write(3, &pattern(1, BLOCK));
                queue.send(sqe, data)
            })
            .collect();
    let faults = rig.faults.clone();
    rig.until("the writes", || faults.counters().submitted[Op::Write.index()] == 4);
    let (sqe, data) = acquire(0, WE, 0xa, 0);
    let id = a.io[0].send(sqe, data);
    rig.run_for(Duration::from_secs(2));
    assert!(!a.io[0].is_done(id), "old writes can still land");
    assert_eq!(outcome(&mut rig, &b.io[0], write(3, &pattern(2, BLOCK))), CONFLICT, "at once");
    rig.faults.release();
    assert_eq!(status(&rig.outcome(&a.io[0], id)), Ok(()));
    for (queue, id) in b.io.iter().zip(ids) {
        assert!(queue.is_done(id), "what was waited for is over");
    }
}

#[test]
fn hosts_are_told_on_every_controller() {
    let mut rig = Rig::new(5);
    let a = rig.host(1, 1);
    let [b, again] = [rig.host(2, 1), rig.host(2, 1)];
    ok(&mut rig, &a.io[0], register(0xa, 0));
    ok(&mut rig, &b.io[0], register(0xb, 0));
    ok(&mut rig, &b.io[0], acquire(0, WE, 0xb, 0));
    ok(&mut rig, &a.io[0], acquire(1, WE, 0xa, 0xb));
    for host in [&b, &again] {
        let page = rig.log_page(host, 0x80, 64);
        assert_ne!(page[8], 0, "a notice: {page:?}");
        assert_eq!(page[12], 1, "of namespace 1");
    }
    assert_eq!(rig.log_page(&a, 0x80, 64)[8], 0, "none for who did it");
}

#[test]
fn report_names_registrants_and_their_controllers() {
    let mut rig = Rig::new(6);
    let [a, b] = [rig.host(1, 1), rig.host(2, 1)];
    ok(&mut rig, &a.io[0], register(0xa, 0));
    ok(&mut rig, &b.io[0], register(0xb, 0));
    ok(&mut rig, &a.io[0], acquire(0, EA, 0xa, 0));
    let page = report(&mut rig, &b.io[0]);
    assert_eq!(u32::from_le_bytes(page[..4].try_into().expect("4 bytes")), 2, "generation");
    assert_eq!((page[4], page[5]), (EA as u8, 2), "type, registrants");
    let entries: Vec<&[u8]> = page[64..64 + 128].chunks(64).collect();
    for (n, host, key, holds) in [(0, 1, 0xa, 1), (1, 2, 0xb, 0)] {
        assert_eq!((entries[n][2] & 1, entries[n][8], entries[n][16]), (holds, key, host));
    }
}

/// Two subsystems, two volume objects, one volume.
#[test]
fn subsystems_share_the_reservation_of_their_volume() {
    const OTHER: &str = "nqn.2026-11.io.penstock:other";
    let ram: Arc<dyn Volume> = Arc::new(
        RamVolume::new(Identity::from_uuid(uuid(1)), (BLOCKS * BLOCK) as u64, BLOCK as u32)
            .expect("memory"),
    );
    let (other, faults) = FaultVolume::new(Arc::clone(&ram), 1);
    let mut rig = Rig::over(7, ram, |config| {
        let mut subsystem = SubsystemConfig::new(OTHER, "OTHER");
        subsystem.namespaces.push(NamespaceConfig::new(1, Arc::new(other)));
        config.subsystems.push(subsystem);
    });
    let [a, b] = [rig.host(1, 1), rig.host_of(2, OTHER, 1)];
    ok(&mut rig, &a.io[0], register(0xa, 0));
    faults.hold();
    let (sqe, data) = write(0, &pattern(1, BLOCK));
    let old = b.io[0].send(sqe, data);
    rig.until("the write", || faults.counters().submitted[Op::Write.index()] == 1);
    let (sqe, data) = acquire(0, WE, 0xa, 0);
    let id = a.io[0].send(sqe, data);
    rig.run_for(Duration::from_secs(1));
    assert!(!a.io[0].is_done(id), "a write through the other subsystem can land");
    faults.release();
    assert_eq!(status(&rig.outcome(&a.io[0], id)), Ok(()));
    assert!(b.io[0].is_done(old));
    assert_eq!(outcome(&mut rig, &b.io[0], write(0, &pattern(1, BLOCK))), CONFLICT);
}

/// What would be files.
#[derive(Default)]
struct Store {
    states: Mutex<BTreeMap<[u8; 16], ReservationState>>,
    is_full: AtomicBool,
}

impl ReservationStore for Store {
    fn load(&self, uuid: &[u8; 16]) -> io::Result<Option<ReservationState>> {
        Ok(self.states.lock().expect("no panic").get(uuid).cloned())
    }

    fn save(&self, uuid: &[u8; 16], state: &ReservationState) -> io::Result<()> {
        if self.is_full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.states.lock().expect("no panic").insert(*uuid, state.clone());
        Ok(())
    }
}

/// Waits for a command that the control thread, which is a real one, has a part in.
#[track_caller]
fn stored(rig: &mut Rig, queue: &Queue, command: (Sqe, Data)) -> Result<(), Status> {
    let id = queue.send(command.0, command.1);
    let begun = Instant::now();
    while !queue.is_done(id) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the control thread is stuck");
        rig.run_for(Duration::from_millis(1));
        std::thread::yield_now();
    }
    status(&queue.take(id).expect("it is done"))
}

fn with_store(seed: u64, store: &Arc<Store>) -> (Rig, Host, Host) {
    let mut rig = Rig::with(seed, |config| config.store = Some(store.clone()));
    let [a, b] = [rig.host(1, 1), rig.host(2, 1)];
    (rig, a, b)
}

#[test]
fn restart_keeps_what_was_to_be_kept_and_nothing_else() {
    let store = Arc::new(Store::default());
    let (mut rig, a, b) = with_store(8, &store);
    assert_eq!(stored(&mut rig, &a.io[0], register(0xa, 3)), Ok(()));
    assert_eq!(stored(&mut rig, &b.io[0], register(0xb, 0)), Ok(()));
    assert_eq!(stored(&mut rig, &a.io[0], acquire(0, WE, 0xa, 0)), Ok(()));
    // No farewell: the process is gone, what was answered is in the store.
    drop((rig, a, b));
    let (mut rig, a, b) = with_store(9, &store);
    assert_eq!(outcome(&mut rig, &b.io[0], write(0, &pattern(1, BLOCK))), CONFLICT);
    ok(&mut rig, &a.io[0], write(0, &pattern(1, BLOCK)));
    let page = report(&mut rig, &b.io[0]);
    assert_eq!((page[4], page[5], page[9]), (WE as u8, 2, 1), "type, registrants, PTPL");
    // Given up by the holder: gone for good, also after a restart.
    assert_eq!(stored(&mut rig, &a.io[0], register_replace(0xa, 0xc, 2)), Ok(()));
    drop((rig, a, b));
    let (mut rig, _a, b) = with_store(10, &store);
    ok(&mut rig, &b.io[0], write(0, &pattern(1, BLOCK)));
    assert_eq!(report(&mut rig, &b.io[0])[5], 0, "no registrants");
}

/// Replaces a key, with CPTPL.
fn register_replace(old: u64, new: u64, persist: u32) -> (Sqe, Data) {
    let (mut sqe, data) = structured(NvmOpcode::RESERVATION_REGISTER, &keys(old, new));
    sqe.cdw10.set(2 | persist << 30);
    (sqe, data)
}

#[test]
fn command_that_cannot_be_stored_fails_and_changes_nothing() {
    let store = Arc::new(Store::default());
    let (mut rig, a, b) = with_store(11, &store);
    assert_eq!(stored(&mut rig, &a.io[0], register(0xa, 3)), Ok(()));
    store.is_full.store(true, Ordering::Relaxed);
    let refused = stored(&mut rig, &a.io[0], acquire(0, WE, 0xa, 0));
    assert_eq!(refused, Err(Status::INTERNAL_ERROR));
    ok(&mut rig, &b.io[0], write(0, &pattern(1, BLOCK)));
    store.is_full.store(false, Ordering::Relaxed);
    assert_eq!(stored(&mut rig, &a.io[0], acquire(0, WE, 0xa, 0)), Ok(()));
    assert_eq!(outcome(&mut rig, &b.io[0], write(0, &pattern(1, BLOCK))), CONFLICT);
}

#[test]
fn without_a_store_nothing_is_promised_to_last() {
    let mut rig = Rig::new(12);
    let host = rig.host(1, 1);
    let refused = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    assert_eq!(outcome(&mut rig, &host.io[0], register(0xa, 3)), refused);
    assert_eq!(report(&mut rig, &host.io[0])[5], 0);
}

#[test]
fn namespace_that_comes_back_has_its_reservation() {
    let volume: Arc<dyn Volume> = Arc::new(
        RamVolume::new(Identity::from_uuid(uuid(9)), (BLOCKS * BLOCK) as u64, BLOCK as u32)
            .expect("memory"),
    );
    let mut rig = Rig::new(13);
    let change = |rig: &mut Rig, request: Request| {
        let change = rig.target.begin(request).expect("possible");
        rig.until("the change", || change.is_done());
    };
    let namespace = NamespaceConfig::new(2, volume);
    let attach = Request::Attach { nqn: SUBNQN.into(), namespace };
    change(&mut rig, attach.clone());
    let [a, b] = [rig.host(1, 1), rig.host(2, 1)];
    let on_2 = |(mut sqe, data): (Sqe, Data)| {
        sqe.nsid.set(2);
        (sqe, data)
    };
    ok(&mut rig, &a.io[0], on_2(register(0xa, 0)));
    ok(&mut rig, &a.io[0], on_2(acquire(0, WE, 0xa, 0)));
    assert_eq!(outcome(&mut rig, &b.io[0], on_2(write(0, &pattern(1, BLOCK)))), CONFLICT);
    ok(&mut rig, &b.io[0], write(0, &pattern(1, BLOCK)));
    change(&mut rig, Request::Detach { nqn: SUBNQN.into(), nsid: 2 });
    let gone = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    assert_eq!(outcome(&mut rig, &a.io[0], on_2(write(0, &pattern(1, BLOCK)))), gone);
    change(&mut rig, attach);
    assert_eq!(outcome(&mut rig, &b.io[0], on_2(write(0, &pattern(1, BLOCK)))), CONFLICT);
    ok(&mut rig, &a.io[0], on_2(write(0, &pattern(1, BLOCK))));
}
