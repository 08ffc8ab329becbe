use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::queue::inflight::InflightLayout;
use crate::testing::{Buffer, TestMemory, TestPackedQueue};

const DATA_AT: u64 = 0x10000;

struct Pair {
    memory: TestMemory,
    driver: TestPackedQueue,
    device: PackedQueue,
    chain: Chain,
}

fn config(driver: &TestPackedQueue, event_idx: bool) -> RingConfig {
    RingConfig {
        size: driver.size(),
        address: driver.address(),
        base: driver.base_after_crash(),
        event_idx,
        indirect: true,
        packed: true,
    }
}

fn pair(size: u16, event_idx: bool) -> Pair {
    let memory = TestMemory::new(0x40000);
    let driver = TestPackedQueue::new(memory.view(), memory.base(), size, event_idx);
    let device = PackedQueue::new(memory.view(), &config(&driver, event_idx), None).unwrap();
    Pair { memory, driver, device, chain: Chain::new() }
}

impl Pair {
    fn data(&self) -> u64 {
        self.memory.base() + DATA_AT
    }

    fn pop(&mut self) -> Result<bool, Broken> {
        self.device.pop(&mut self.chain)
    }

    /// What descriptors with these lengths, flags and addresses lead to.
    fn breaks(descriptors: &[(u64, u32, u16)]) -> Broken {
        let mut pair = pair(4, false);
        for (addr, len, flags) in descriptors {
            let (index, avail) = pair.driver.next_flags();
            pair.driver.set_desc(index, pair.data() + addr, *len, 1, flags | avail);
        }
        pair.pop().expect_err("this breaks the queue")
    }
}

#[test]
fn chains_come_out_as_they_went_in() {
    for indirect in [false, true] {
        let mut pair = pair(8, true);
        let (at, table) = (pair.data(), pair.data() + 0x1000);
        let buffers = [
            Buffer::readable(at, 16),
            Buffer::readable(at + 100, 0),
            Buffer::readable(at + 200, 512),
            Buffer::writable(at + 1000, 4096),
            Buffer::writable(at + 9000, 1),
        ];
        // Several laps, so that chains cross the end of the ring.
        for round in 0..30u32 {
            assert_eq!(pair.pop(), Ok(false));
            let id = match indirect {
                true => pair.driver.add_indirect(pair.memory.view(), table, &buffers).unwrap(),
                false => pair.driver.add(&buffers).unwrap(),
            };
            assert_eq!(pair.pop(), Ok(false), "nothing is published");
            pair.driver.publish();
            assert_eq!(pair.pop(), Ok(true));
            assert_eq!(pair.chain.token.id, id);
            assert_eq!(pair.chain.token.descriptors, if indirect { 1 } else { 5 });
            let piece = |addr, len| Piece { addr, len };
            assert_eq!(pair.chain.readable, [piece(at, 16), piece(at + 200, 512)]);
            assert_eq!(pair.chain.writable, [piece(at + 1000, 4096), piece(at + 9000, 1)]);
            assert!(pair.chain.is_ordered);
            assert_eq!(pair.pop(), Ok(false));

            pair.device.unpop(pair.chain.token).unwrap();
            assert_eq!(pair.pop(), Ok(true), "a chain that was put back comes again");

            pair.device.push_used(pair.chain.token, round).unwrap();
            assert_eq!(pair.driver.pop_used(), None, "nothing is published");
            pair.device.publish().unwrap();
            assert_eq!(pair.driver.pop_used(), Some((id, round)));
            assert_eq!(pair.device.publish(), Ok(false));
        }
    }
}

#[test]
fn a_batch_in_another_order_is_seen_at_once() {
    let mut pair = pair(8, false);
    let at = pair.data();
    for _ in 0..50 {
        let one = pair.driver.add(&[Buffer::writable(at, 1)]).unwrap();
        let two = pair.driver.add(&[Buffer::writable(at, 2), Buffer::writable(at, 3)]).unwrap();
        let four = pair.driver.add(&[Buffer::writable(at, 2); 4]).unwrap();
        assert!(pair.driver.add(&[Buffer::writable(at, 2); 2]).is_none(), "full");
        pair.driver.publish();
        let mut tokens = Vec::new();
        while pair.pop().unwrap() {
            tokens.push(pair.chain.token);
        }
        assert_eq!(tokens.len(), 3);
        for token in tokens.iter().rev() {
            pair.device.push_used(*token, u32::from(token.id)).unwrap();
            assert_eq!(pair.driver.pop_used(), None);
        }
        assert!(pair.device.publish().unwrap());
        for id in [four, two, one] {
            assert_eq!(pair.driver.pop_used(), Some((id, u32::from(id))));
        }
    }
}

#[test]
fn rules_that_drivers_break() {
    assert_eq!(Pair::breaks(&[(0, 1, NEXT); 4]), Broken::Loop);
    assert_eq!(Pair::breaks(&[(0, 16, INDIRECT | NEXT)]), Broken::IndirectNested);
    assert_eq!(Pair::breaks(&[(0, 16, NEXT), (0, 16, INDIRECT)]), Broken::IndirectNested);
    assert_eq!(Pair::breaks(&[(0, 0, INDIRECT)]), Broken::IndirectLength);
    assert_eq!(Pair::breaks(&[(0, 17, INDIRECT)]), Broken::IndirectLength);
    assert_eq!(Pair::breaks(&[(1 << 40, 16, INDIRECT)]), Broken::IndirectAddress);
    assert_eq!(Pair::breaks(&[(0, 16 * 1025, INDIRECT)]), Broken::Loop);

    let mut pair = pair(4, false);
    let at = pair.data();
    let config = RingConfig { indirect: false, ..config(&pair.driver, false) };
    pair.device = PackedQueue::new(pair.memory.view(), &config, None).unwrap();
    pair.driver.add_indirect(pair.memory.view(), at, &[Buffer::writable(at, 1)]).unwrap();
    pair.driver.publish();
    assert_eq!(pair.pop(), Err(Broken::IndirectNotNegotiated));

    // An indirect table within an indirect table.
    let mut pair = self::pair(4, false);
    let mut inner = at.to_le_bytes().to_vec();
    inner.extend([16, 0, 0, 0, 0, 0, 4, 0]);
    pair.memory.write(at, &inner);
    let (index, avail) = pair.driver.next_flags();
    pair.driver.set_desc(index, at, 16, 0, INDIRECT | avail);
    assert_eq!(pair.pop(), Err(Broken::IndirectNested));
}

#[test]
fn rings_must_be_in_memory_and_aligned() {
    let memory = TestMemory::new(0x10000);
    let driver = TestPackedQueue::new(memory.view(), memory.base(), 8, false);
    let good = config(&driver, false);
    let at = good.address;
    let end = memory.base() + 0x10000;
    for address in [
        RingAddress { descriptor: at.descriptor + 8, ..at },
        RingAddress { available: at.available + 2, ..at },
        RingAddress { used: at.used + 2, ..at },
        RingAddress { descriptor: end - 16 * 8 + 16, ..at },
        RingAddress { available: end, ..at },
        RingAddress { used: u64::MAX - 3, ..at },
    ] {
        let config = RingConfig { address, ..good };
        let broken = PackedQueue::new(memory.view(), &config, None).expect_err("refused");
        assert_eq!(broken, Broken::RingAddress, "{address:?}");
    }
    for size in [0, 1025] {
        let config = RingConfig { size, ..good };
        assert!(PackedQueue::new(memory.view(), &config, None).is_err(), "{size}");
    }
    let config = RingConfig { base: 8, ..good };
    assert!(PackedQueue::new(memory.view(), &config, None).is_err(), "a place outside");
}

/// Wherever it stops, another one goes on there; also with the base that some frontends give to
/// new rings.
#[test]
fn goes_on_where_it_stopped() {
    for packs in [1, 2, 3] {
        let mut pair = pair(6, true);
        let at = pair.data();
        let mut base = 0;
        for round in 0..40u32 {
            let config = RingConfig { base, ..config(&pair.driver, true) };
            pair.device = PackedQueue::new(pair.memory.view(), &config, None).unwrap();
            let id = pair.driver.add(&vec![Buffer::writable(at, 1); packs]).unwrap();
            pair.driver.publish();
            if round % 3 == 0 {
                // It was published before the device was there.
                let config = RingConfig { base, ..config };
                pair.device = PackedQueue::new(pair.memory.view(), &config, None).unwrap();
            }
            assert_eq!(pair.pop(), Ok(true), "round {round}");
            pair.device.push_used(pair.chain.token, round).unwrap();
            assert!(pair.device.publish().unwrap());
            assert_eq!(pair.driver.pop_used(), Some((id, round)));
            base = pair.device.base();
            assert_eq!(base & 0xffff, base >> 16, "all is given back");
        }
    }
}

/// A driver that asked for an event at one place is told when that is passed, and not before.
#[test]
fn interrupts_come_when_asked_for() {
    let mut pair = pair(8, true);
    let at = pair.data();
    for round in 0..100 {
        for chains in 1..=8u64 {
            let want = 1 + (round + chains) % chains;
            assert!(!pair.driver.arm());
            // Asked for the first of them only by `arm`; here for one further on.
            for _ in 0..chains {
                pair.driver.add(&[Buffer::writable(at, 1)]).unwrap();
            }
            pair.driver.publish();
            let mut told = 0;
            for done in 0..chains {
                assert!(pair.pop().unwrap());
                pair.device.push_used(pair.chain.token, 1).unwrap();
                if pair.device.publish().unwrap() {
                    assert_eq!(done + 1, if told == 0 { 1 } else { want }, "at the one asked for");
                    told += 1;
                }
            }
            assert_eq!(told, 1, "once");
            while pair.driver.pop_used().is_some() {}
        }
    }
    // A driver that wants none, and one that says so again.
    for wants in [false, true] {
        match wants {
            true => drop(pair.driver.arm()),
            false => pair.driver.disarm(),
        }
        pair.driver.add(&[Buffer::writable(at, 1)]).unwrap();
        pair.driver.publish();
        assert!(pair.pop().unwrap());
        pair.device.push_used(pair.chain.token, 1).unwrap();
        assert_eq!(pair.device.publish(), Ok(wants));
        pair.driver.pop_used().unwrap();
    }
}

/// Neither side ever waits for the other while that waits for it.
#[test]
fn no_wakeup_is_lost() {
    const ROUNDS: u32 = 20_000;
    for event_idx in [false, true] {
        let Pair { memory, mut driver, .. } = pair(16, event_idx);
        let shared = memory.memory().clone();
        let config = config(&driver, event_idx);
        let (kick, kicked) = mpsc::channel();
        let (call, called) = mpsc::channel();
        let device = std::thread::spawn(move || {
            let mut queue = PackedQueue::new(&shared.view(), &config, None).unwrap();
            let mut chain = Chain::new();
            let mut done = 0;
            while done < ROUNDS {
                while queue.pop(&mut chain).unwrap() {
                    queue.push_used(chain.token, 1).unwrap();
                    done += 1;
                }
                if queue.publish().unwrap() {
                    call.send(()).unwrap();
                }
                if done < ROUNDS && !queue.arm().unwrap() {
                    kicked.recv_timeout(Duration::from_secs(20)).expect("a kick");
                    queue.disarm();
                }
            }
        });
        let at = memory.base() + DATA_AT;
        let (mut sent, mut done) = (0, 0);
        while done < ROUNDS {
            let mut is_new = false;
            while sent < ROUNDS && driver.add(&[Buffer::writable(at, 1)]).is_some() {
                sent += 1;
                is_new = true;
                if sent % 7 == 0 {
                    break;
                }
            }
            if is_new && driver.publish() {
                // The device may have done all of it and gone.
                let _ = kick.send(());
            }
            while driver.pop_used().is_some() {
                done += 1;
            }
            if done < ROUNDS && !driver.arm() && driver.outstanding() > 0 {
                called.recv_timeout(Duration::from_secs(20)).expect("a call");
                driver.disarm();
            }
        }
        device.join().unwrap();
    }
}

/// A record of 8 entries with a chain of two in flight, the first two of them.
fn layout_of_a_chain() -> Vec<u8> {
    let mut bytes = vec![0; 32 + 8 * 32];
    (bytes[10], bytes[12], bytes[14]) = (8, 2, 2);
    (bytes[20], bytes[21]) = (1, 1);
    for entry in 0..8 {
        bytes[32 + entry * 32 + 2] = entry as u8 + 1;
    }
    (bytes[32], bytes[32 + 4], bytes[32 + 6]) = (1, 1, 2);
    bytes[32 + 18] = NEXT as u8;
    bytes
}

#[test]
fn a_record_is_taken_over() {
    let memory = TestMemory::new(0x2000);
    let driver = TestPackedQueue::new(memory.view(), memory.base(), 8, true);
    let file = TestMemory::new(32 + 8 * 32);
    file.write(file.base(), &layout_of_a_chain());
    file.write(file.base() + 8, &[1]);
    let slice = || Some(file.view().slice(file.base(), file.len()).unwrap());
    let mut queue = PackedQueue::new(memory.view(), &config(&driver, true), slice()).unwrap();
    let mut chain = Chain::new();
    // Its length may change under us; it is what it was.
    file.write(file.base() + 32 + 6, &[7]);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert_eq!(chain.token, Token { id: 0, descriptors: 2, entry: 0 });
    queue.push_used(chain.token, 1).unwrap();
    queue.publish().unwrap();
    assert_eq!(queue.pop(&mut chain), Ok(false));
    assert_eq!(queue.base(), 0x8002_8002);
}

proptest! {
    /// Whatever stands in the ring and in the record: an error or a chain within bounds, and never
    /// more descriptors taken than there are.
    #[test]
    fn any_ring_and_record_is_survived(
        descriptors in prop::collection::vec(
            (0u64..8, 0u32..70, any::<u16>(), any::<u16>()), 8),
        record in prop::collection::vec(any::<u8>(), 0..32 + 8 * 32),
        small in prop::collection::vec((0usize..32 + 8 * 32, 0u8..10), 0..40),
        late in prop::collection::vec((0usize..32 + 8 * 32, any::<u8>()), 0..20),
        recorded: bool,
        base: u32,
    ) {
        let memory = TestMemory::new(0x2000);
        let driver = TestPackedQueue::new(memory.view(), memory.base(), 8, true);
        for (index, (addr, len, id, flags)) in (0u16..).zip(&descriptors) {
            driver.set_desc(index, memory.base() + addr * 64, *len, *id, *flags & 0x8087);
        }
        let layout = InflightLayout { queues: 1, queue_size: 8 };
        let file = TestMemory::new(layout.record_bytes(true));
        file.write(file.base(), &record);
        for (at, byte) in small {
            file.write(file.base() + at as u64, &[byte]);
        }
        if let Some(flags) = record.first() {
            // Often a record that a device could have left: a chain of two, one free list.
            if flags % 2 == 0 {
                let fresh = layout_of_a_chain();
                file.write(file.base(), &fresh);
            }
        }
        // A version that is known, so that the rest is looked at.
        file.write(file.base() + 8, &[1, 0]);
        let slice = file.view().slice(file.base(), file.len()).unwrap();
        let config = RingConfig { base, ..config(&driver, true) };
        let queue = PackedQueue::new(memory.view(), &config, recorded.then_some(slice));
        let Ok(mut queue) = queue else { return Ok(()) };
        let mut chain = Chain::new();
        let (mut taken, mut tokens) = (0u32, Vec::new());
        for round in 0..40 {
            match queue.pop(&mut chain) {
                Ok(true) => taken += u32::from(chain.token.descriptors),
                Ok(false) | Err(_) => break,
            }
            tokens.push(chain.token);
            prop_assert!(taken <= 8, "{taken} descriptors of 8");
            // What was judged does not change any more.
            if let Some((at, byte)) = late.get(round) {
                file.write(file.base() + *at as u64, &[*byte]);
            }
        }
        for token in tokens {
            // An error stops the queue; it must not be more.
            let _ = queue.push_used(token, 1);
        }
        let _ = queue.publish();
    }
}
