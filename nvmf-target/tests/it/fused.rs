//! Fused Compare and Write: one step for everybody who writes, whatever else fails.

use std::time::Duration;

use block::fault::FaultPlan;
use block::{IoError, Op};
use nvme::host::authentication_receive;
use nvme::spec::{AdminOpcode, SglDescriptor, Sqe, Status};

use crate::host::{Data, Queue};
use crate::rig::{BLOCK, Rig, compare, pattern, status, write};

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Compare and Write of one block.
fn pair(slba: u64, old: &[u8], new: &[u8], in_capsule: [bool; 2]) -> [(Sqe, Data); 2] {
    let mut commands = [compare(slba, old), write(slba, new)];
    for (n, (sqe, data)) in commands.iter_mut().enumerate() {
        sqe.flags |= 1 << n;
        if let (true, Data::Fetched(bytes)) = (in_capsule[n], data.clone()) {
            sqe.dptr = SglDescriptor::in_capsule(0, bytes.len() as u32);
            *data = Data::Capsule(bytes);
        }
    }
    commands
}

fn send(queue: &Queue, commands: [(Sqe, Data); 2]) -> [u64; 2] {
    commands.map(|(sqe, data)| queue.send(sqe, data))
}

fn count_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().expect("8 bytes"))
}

/// The counter's block: every byte depends on the count, so that a torn one is seen.
fn counter(count: u64) -> Vec<u8> {
    let mut block = pattern(count, BLOCK);
    block[..8].copy_from_slice(&count.to_le_bytes());
    block
}

/// Counts up, over and over, with what it believes the count to be.
struct Client {
    queue: Queue,
    slba: u64,
    believed: u64,
    sent: Option<[u64; 2]>,
    read: Option<u64>,
    left: u32,
    counted: u64,
    refused: u64,
}

impl Client {
    fn step(&mut self, random: &mut Random) {
        if let Some(id) = self.read
            && let Some(done) = self.queue.take(id)
        {
            self.read = None;
            self.believed = count_of(&done.reply);
            assert_eq!(done.reply, counter(self.believed), "a torn block");
        }
        if let Some([first, second]) = self.sent
            && self.queue.is_done(second)
        {
            let first = self.queue.take(first).expect("the first ends before the second");
            let second = self.queue.take(second).expect("it is done");
            self.sent = None;
            match (status(&first), status(&second)) {
                (Ok(()), Ok(())) => {
                    self.counted += 1;
                    self.believed += 1;
                }
                (Err(a), Err(b)) => {
                    assert_eq!(a, Status::COMPARE_FAILURE.dnr());
                    assert_eq!(b, Status::ABORTED_FAILED_FUSED.dnr());
                    self.refused += 1;
                    let sqe = crate::rig::rw(nvme::spec::NvmOpcode::READ, self.slba, BLOCK);
                    self.read = Some(self.queue.send(sqe, Data::Reply(BLOCK)));
                }
                other => panic!("half a pair: {other:?}"),
            }
            self.left -= 1;
        }
        if self.left > 0 && self.sent.is_none() && self.read.is_none() {
            let (old, new) = (counter(self.believed), counter(self.believed + 1));
            let in_capsule = [random.below(2) == 0, random.below(2) == 0];
            self.sent = Some(send(&self.queue, pair(self.slba, &old, &new, in_capsule)));
        }
    }

    fn is_idle(&self) -> bool {
        self.left == 0 && self.sent.is_none() && self.read.is_none()
    }
}

fn hammer(seed: u64, rounds: u32) -> (u64, u64) {
    let mut rig = Rig::new(seed);
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let hosts = [rig.host(1, 3), rig.host(2, 3)];
    let slba = 1 + random.below(1000);
    rig.write(&hosts[0].io[0], slba, &counter(0));
    rig.faults.set(FaultPlan {
        delays_per_million: 200_000,
        delay_max: Duration::from_micros(1 + random.below(3000)),
        busy_per_million: 50_000,
        ..FaultPlan::default()
    });
    let queues = hosts.iter().flat_map(|host| &host.io);
    let mut clients: Vec<Client> = queues
        .flat_map(|queue| [queue.clone(), queue.clone()])
        .map(|queue| Client {
            queue,
            slba,
            believed: 0,
            sent: None,
            read: None,
            left: rounds,
            counted: 0,
            refused: 0,
        })
        .collect();
    // Others write next to it all the time, and are neither held up nor torn.
    let neighbour = hosts[1].io[2].clone();
    let mut last = None;
    rig.until("all counts", || {
        clients.iter_mut().for_each(|client| client.step(&mut random));
        if last.is_none_or(|id| neighbour.take(id).is_some()) {
            let (sqe, data) = write(slba - 1, &pattern(7, BLOCK));
            last = Some(neighbour.send(sqe, data));
        }
        clients.iter().all(Client::is_idle)
    });
    rig.faults.set(FaultPlan::default());
    let counted = clients.iter().map(|client| client.counted).sum();
    let refused = clients.iter().map(|client| client.refused).sum();
    let block = rig.read(&hosts[0].io[1], slba, BLOCK);
    assert_eq!(count_of(&block), counted, "seed {seed}: lost or doubled");
    assert_eq!(block, counter(counted), "seed {seed}: torn");
    (counted, refused)
}

#[test]
fn hosts_that_count_up_one_block_lose_and_double_nothing() {
    let only = std::env::var("PENSTOCK_SIM_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let seeds = only.map_or(1..21, |seed| seed..seed + 1);
    let (mut counted, mut refused) = (0, 0);
    for seed in seeds {
        let (done, not) = hammer(seed, 40);
        (counted, refused) = (counted + done, refused + not);
    }
    println!("{counted} counted, {refused} refused");
    assert!(counted > 1000 || only.is_some(), "only {counted} pairs succeeded");
    assert!(refused > 1000 || only.is_some(), "only {refused} pairs met another");
}

#[test]
fn other_writers_of_the_block_come_before_or_after() {
    let mut succeeded = 0;
    for seed in 0..60 {
        let mut rig = Rig::new(seed);
        let hosts = [rig.host(1, 2), rig.host(2, 2)];
        let (old, new) = (pattern(1, BLOCK), pattern(2, BLOCK));
        let other: Vec<Vec<u8>> = (10..16).map(|n| pattern(n, BLOCK)).collect();
        rig.write(&hosts[0].io[0], 8, &old);
        rig.faults.set(FaultPlan {
            delays_per_million: 500_000,
            delay_max: Duration::from_millis(2),
            ..FaultPlan::default()
        });
        let mut before = Vec::new();
        for (n, bytes) in other.iter().enumerate() {
            if n == (seed % 3) as usize {
                before.push((0, send(&hosts[0].io[0], pair(8, &old, &new, [false; 2]))));
            }
            let (sqe, data) = write(8, bytes);
            let id = hosts[1].io[n % 2].send(sqe, data);
            before.push((1 + n % 2, [id, id]));
        }
        let mut equal = None;
        for (queue, ids) in before {
            let queue = if queue == 0 { &hosts[0].io[0] } else { &hosts[1].io[queue - 1] };
            let first = rig.outcome(queue, ids[0]);
            if ids[0] != ids[1] {
                equal = Some(status(&first).is_ok());
                assert_eq!(equal, Some(status(&rig.outcome(queue, ids[1])).is_ok()));
            }
        }
        rig.faults.set(FaultPlan::default());
        let block = rig.read(&hosts[0].io[0], 8, BLOCK);
        // The pair comes before all of them, and the last of them stays, or it fails.
        assert!(other.contains(&block), "seed {seed}: a write was lost in the pair's middle");
        succeeded += u32::from(equal == Some(true));
    }
    assert!(succeeded > 5, "only {succeeded} pairs came first");
}

#[test]
fn failed_first_or_second_says_so_and_lets_others_on() {
    let mut rig = Rig::new(3);
    let host = rig.host(1, 2);
    let (old, new) = (pattern(1, BLOCK), pattern(2, BLOCK));
    rig.write(&host.io[0], 8, &old);
    for (only, want) in [
        (
            Op::Read,
            [Err(Status::UNRECOVERED_READ_ERROR.dnr()), Err(Status::ABORTED_FAILED_FUSED.dnr())],
        ),
        (Op::Write, [Ok(()), Err(Status::WRITE_FAULT.dnr())]),
    ] {
        rig.faults.set(FaultPlan {
            errors_per_million: 1_000_000,
            error: Some(IoError::Medium),
            only: Some(only),
            ..FaultPlan::default()
        });
        let ids = send(&host.io[0], pair(8, &old, &new, [false, true]));
        let found = ids.map(|id| status(&rig.outcome(&host.io[0], id)));
        assert_eq!(found, want);
        rig.faults.set(FaultPlan::default());
        assert_eq!(rig.read(&host.io[0], 8, BLOCK), old);
        rig.write(&host.io[1], 8, &old);
    }
    let ids = send(&host.io[1], pair(8, &old, &new, [true, false]));
    assert_eq!(ids.map(|id| status(&rig.outcome(&host.io[1], id))), [Ok(()), Ok(())]);
    assert_eq!(rig.read(&host.io[0], 8, BLOCK), new);
}

#[test]
fn halves_and_misfits_are_refused_and_change_nothing() {
    let mut rig = Rig::new(4);
    let host = rig.host(1, 1);
    let io = &host.io[0];
    let (old, new) = (pattern(1, 2 * BLOCK), pattern(2, 2 * BLOCK));
    rig.write(io, 8, &old);
    let [first, second] = pair(8, &old[..BLOCK], &new[..BLOCK], [false; 2]);
    // A second alone.
    let done = rig.command(io, second.0, second.1.clone());
    assert_eq!(status(&done), Err(Status::ABORTED_MISSING_FUSED.dnr()));
    // A first alone: it ends when something else comes, in the capsule or not.
    for in_capsule in [false, true] {
        let [first, _] = pair(8, &old[..BLOCK], &new[..BLOCK], [in_capsule; 2]);
        let id = io.send(first.0, first.1);
        rig.run_for(Duration::from_secs(1));
        assert!(!io.is_done(id), "it waits for its second");
        rig.read(io, 0, BLOCK);
        assert_eq!(status(&rig.outcome(io, id)), Err(Status::ABORTED_MISSING_FUSED.dnr()));
    }
    // Something between the two that is no I/O.
    let id = io.send(first.0, first.1.clone());
    let between = io.send(Sqe::from_bytes(&authentication_receive(64)), Data::None);
    let late = io.send(second.0, second.1.clone());
    for id in [id, late] {
        assert_eq!(status(&rig.outcome(io, id)), Err(Status::ABORTED_MISSING_FUSED.dnr()));
    }
    assert!(status(&rig.outcome(io, between)).is_err());
    // Ranges that differ.
    let other = pair(9, &old[..BLOCK], &new[..BLOCK], [false; 2])[1].clone();
    let ids = send(io, [first.clone(), other]);
    let misfit = Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
    assert_eq!(ids.map(|id| status(&rig.outcome(io, id))), [misfit; 2]);
    // More than is atomic.
    let ids = send(io, pair(8, &old, &new, [false; 2]));
    let too_long = Err(Status::ATOMIC_WRITE_UNIT_EXCEEDED.dnr());
    assert_eq!(ids.map(|id| status(&rig.outcome(io, id))), [too_long; 2]);
    assert_eq!(rig.read(io, 8, 2 * BLOCK), old, "nothing was written");
    // And the queue is as good as ever.
    let ids = send(io, [first, second]);
    assert_eq!(ids.map(|id| status(&rig.outcome(io, id))), [Ok(()), Ok(())]);
}

#[test]
fn lost_connection_gives_the_block_free_when_the_last_io_is_back() {
    for seed in 0..40 {
        let mut rig = Rig::new(seed);
        let hosts = [rig.host(1, 1), rig.host(2, 2)];
        let (old, new) = (pattern(1, BLOCK), pattern(2, BLOCK));
        rig.write(&hosts[0].io[0], 8, &old);
        rig.faults.hold();
        send(&hosts[0].io[0], pair(8, &old, &new, [seed % 2 == 0; 2]));
        rig.run_for(Duration::from_micros(10 * seed));
        if seed % 3 == 0 {
            rig.faults.release();
            rig.run_for(Duration::from_micros(seed));
            rig.faults.hold();
        }
        hosts[0].io[0].cut();
        hosts[0].admin.cut();
        rig.run_for(Duration::from_secs(1));
        let (sqe, data) = write(8, &pattern(3, BLOCK));
        let id = hosts[1].io[0].send(sqe, data);
        rig.run_for(Duration::from_secs(1));
        rig.faults.release();
        assert_eq!(status(&rig.outcome(&hosts[1].io[0], id)), Ok(()), "seed {seed}");
        let target = rig.target.clone();
        rig.until("the end of the first host", || target.connected().1 == 1);
        let block = rig.read(&hosts[1].io[1], 8, BLOCK);
        assert_eq!(block, pattern(3, BLOCK), "seed {seed}: the lost pair came after the write");
        let ids = send(&hosts[1].io[1], pair(8, &block, &new, [false; 2]));
        assert_eq!(ids.map(|id| status(&rig.outcome(&hosts[1].io[1], id))), [Ok(()), Ok(())]);
    }
}

#[test]
fn pair_waits_for_writes_of_its_block_that_are_at_the_volume() {
    let mut rig = Rig::new(9);
    let hosts = [rig.host(1, 1), rig.host(2, 4)];
    let (old, new) = (pattern(1, BLOCK), pattern(2, BLOCK));
    rig.write(&hosts[0].io[0], 8, &old);
    rig.write(&hosts[0].io[0], 9, &old);
    let slow = |delay| FaultPlan {
        delays_per_million: 1_000_000,
        delay_min: delay,
        delay_max: delay,
        ..FaultPlan::default()
    };
    rig.faults.set(slow(Duration::from_secs(10)));
    let (sqe, data) = write(8, &pattern(3, BLOCK));
    let writes: Vec<_> = hosts[1].io.iter().map(|q| q.send(sqe, data.clone())).collect();
    let faults = rig.faults.clone();
    rig.until("the writes at the volume", || faults.counters().delays == 4);
    rig.faults.set(FaultPlan::default());
    let ids = send(&hosts[0].io[0], pair(8, &old, &new, [false; 2]));
    rig.run_for(Duration::from_secs(5));
    assert_eq!(rig.faults.counters().submitted[Op::Read.index()], 0, "it does not look yet");
    // The next block's is another matter.
    let others = send(&hosts[0].io[0], pair(9, &old, &new, [false; 2]));
    assert_eq!(others.map(|id| status(&rig.outcome(&hosts[0].io[0], id))), [Ok(()), Ok(())]);
    assert!(writes.iter().zip(&hosts[1].io).all(|(id, queue)| !queue.is_done(*id)));
    let found = ids.map(|id| status(&rig.outcome(&hosts[0].io[0], id)));
    let want = [Status::COMPARE_FAILURE.dnr(), Status::ABORTED_FAILED_FUSED.dnr()].map(Err);
    assert_eq!(found, want, "the writes were there before it");
    assert_eq!(rig.read(&hosts[0].io[0], 8, BLOCK), pattern(3, BLOCK));
}

#[test]
fn first_that_is_aborted_takes_its_second_along() {
    let mut rig = Rig::new(12);
    let host = rig.host(1, 1);
    let io = &host.io[0];
    let (old, new) = (pattern(1, BLOCK), pattern(2, BLOCK));
    rig.write(io, 8, &old);
    let [first, second] = pair(8, &old, &new, [false; 2]);
    let id = io.send(first.0, first.1);
    rig.run_for(Duration::from_secs(1));
    let mut abort = Sqe::new(AdminOpcode::ABORT.0);
    // The queue has one command outstanding, and the host takes the first identifier.
    abort.cdw10.set(1);
    let done = rig.command(&host.admin, abort, Data::None);
    assert_eq!((status(&done), done.cqe.dw0()), (Ok(()), 0), "aborted");
    assert_eq!(status(&rig.outcome(io, id)), Err(Status::COMMAND_ABORT_REQUESTED));
    let done = rig.command(io, second.0, second.1);
    assert_eq!(status(&done), Err(Status::ABORTED_FAILED_FUSED.dnr()));
    assert_eq!(rig.read(io, 8, BLOCK), old);
    let ids = send(io, pair(8, &old, &new, [false; 2]));
    assert_eq!(ids.map(|id| status(&rig.outcome(io, id))), [Ok(()), Ok(())]);
}
