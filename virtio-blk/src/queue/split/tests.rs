use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::queue::CHAIN_MAX;
use crate::testing::{Buffer, TestMemory, TestQueue};

const RING_AT: u64 = 0x1000;
const DATA_AT: u64 = 0x10000;

struct Pair {
    memory: TestMemory,
    driver: TestQueue,
    device: SplitQueue,
    chain: Chain,
}

fn config(driver: &TestQueue, size: u16, event_idx: bool) -> RingConfig {
    RingConfig {
        size,
        address: driver.address(),
        base: 0,
        event_idx,
        indirect: true,
        packed: false,
    }
}

fn pair(size: u16, event_idx: bool) -> Pair {
    let memory = TestMemory::new(0x40000);
    let driver = TestQueue::new(memory.view(), memory.base() + RING_AT, size, event_idx);
    let device = SplitQueue::new(memory.view(), &config(&driver, size, event_idx), None).unwrap();
    Pair { memory, driver, device, chain: Chain::new() }
}

impl Pair {
    fn data(&self) -> u64 {
        self.memory.base() + DATA_AT
    }

    fn pop(&mut self) -> Result<bool, Broken> {
        self.device.pop(&mut self.chain)
    }

    /// A broken chain of one head that is made by `fill`.
    fn breaks(fill: impl Fn(&mut Pair)) -> Broken {
        let mut pair = pair(8, false);
        fill(&mut pair);
        pair.driver.publish();
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
        assert_eq!(pair.pop(), Ok(false));
        let head = match indirect {
            true => pair.driver.add_indirect(pair.memory.view(), table, &buffers).unwrap(),
            false => pair.driver.add(&buffers).unwrap(),
        };
        assert_eq!(pair.pop(), Ok(false), "nothing is published");
        pair.driver.publish();
        assert_eq!(pair.pop(), Ok(true));
        assert_eq!(pair.chain.token.id, head);
        let piece = |addr, len| Piece { addr, len };
        assert_eq!(pair.chain.readable, [piece(at, 16), piece(at + 200, 512)]);
        assert_eq!(pair.chain.writable, [piece(at + 1000, 4096), piece(at + 9000, 1)]);
        assert!(pair.chain.is_ordered);
        assert_eq!(pair.pop(), Ok(false));

        pair.device.unpop(pair.chain.token).unwrap();
        assert_eq!(pair.pop(), Ok(true), "a chain that was put back comes again");

        pair.device.push_used(pair.chain.token, 4097).unwrap();
        assert_eq!(pair.driver.pop_used(), None, "nothing is published");
        pair.device.publish().unwrap();
        assert_eq!(pair.driver.pop_used(), Some((head, 4097)));
        assert_eq!(pair.device.publish(), Ok(false), "nothing new");
    }
}

#[test]
fn readable_after_writable_is_noticed() {
    let mut pair = pair(8, false);
    let at = pair.data();
    pair.driver.add(&[Buffer::writable(at, 1), Buffer::readable(at, 16)]).unwrap();
    pair.driver.publish();
    assert_eq!(pair.pop(), Ok(true));
    assert!(!pair.chain.is_ordered);
}

#[test]
fn a_table_across_two_regions_is_followed() {
    use std::os::fd::AsFd;
    let memory = TestMemory::new(0x20000);
    let base = memory.base();
    // The same memory as two regions that meet in the middle of the table.
    let cut = 0x10000 + 40;
    let map = |offset: u64, size| {
        iobuf::GuestRegion::map(memory.fd().as_fd(), offset, size, base + offset, offset).unwrap()
    };
    let regions = vec![map(0, cut), map(cut, 0x20000 - cut)];
    let split = iobuf::GuestMemory::new(regions).unwrap().view();

    let mut driver = TestQueue::new(memory.view(), base + RING_AT, 8, false);
    let mut device = SplitQueue::new(&split, &config(&driver, 8, false), None).unwrap();
    let buffers: Vec<_> = (0..6).map(|i| Buffer::readable(base + 512 * i, 512)).collect();
    driver.add_indirect(memory.view(), base + 0x10000, &buffers).unwrap();
    driver.publish();
    let mut chain = Chain::new();
    assert_eq!(device.pop(&mut chain), Ok(true));
    assert_eq!(chain.readable.len(), 6);
    assert_eq!(chain.readable[5], Piece { addr: base + 512 * 5, len: 512 });
}

#[test]
fn what_breaks_a_queue() {
    assert_eq!(Pair::breaks(|p| p.driver.push_head(8)), Broken::Head);
    assert_eq!(
        Pair::breaks(|p| {
            p.driver.set_desc(0, p.data(), 16, NEXT, 8);
            p.driver.push_head(0);
        }),
        Broken::Next
    );
    // A loop of two.
    assert_eq!(
        Pair::breaks(|p| {
            p.driver.set_desc(0, p.data(), 16, NEXT, 1);
            p.driver.set_desc(1, p.data(), 16, NEXT, 0);
            p.driver.push_head(0);
        }),
        Broken::Loop
    );
    let indirect = |len: u32, flags: u16, inner: (u16, u16)| {
        Pair::breaks(move |p| {
            let table = p.data();
            p.driver.set_desc(0, table, len, flags, 0);
            let mut desc = vec![0; 12];
            desc.extend(inner.0.to_le_bytes());
            desc.extend(inner.1.to_le_bytes());
            p.memory.write(table, &desc);
            p.driver.push_head(0);
        })
    };
    assert_eq!(indirect(0, INDIRECT, (0, 0)), Broken::IndirectLength);
    assert_eq!(indirect(17, INDIRECT, (0, 0)), Broken::IndirectLength);
    assert_eq!(indirect(16, INDIRECT | NEXT, (0, 0)), Broken::IndirectNested);
    assert_eq!(indirect(16, INDIRECT, (INDIRECT, 0)), Broken::IndirectNested);
    assert_eq!(indirect(16, INDIRECT, (NEXT, 1)), Broken::Next);
    assert_eq!(indirect(16, INDIRECT, (NEXT, 0)), Broken::Loop);
    assert_eq!(indirect(u32::MAX - 15, INDIRECT, (NEXT, 0)), Broken::Loop);
    assert_eq!(
        Pair::breaks(|p| {
            p.driver.set_desc(0, u64::MAX - 8, 32, INDIRECT, 0);
            p.driver.push_head(0);
        }),
        Broken::IndirectAddress
    );
    assert_eq!(Pair::breaks(|p| p.driver.publish_index(9)), Broken::AvailableIndex);
}

#[test]
fn indirect_needs_the_feature() {
    let mut pair = pair(8, false);
    let config = RingConfig { indirect: false, ..config(&pair.driver, 8, false) };
    pair.device = SplitQueue::new(pair.memory.view(), &config, None).unwrap();
    let at = pair.data();
    pair.driver.add_indirect(pair.memory.view(), at, &[Buffer::writable(at, 1)]).unwrap();
    pair.driver.publish();
    assert_eq!(pair.pop(), Err(Broken::IndirectNotNegotiated));
}

#[test]
fn rings_must_be_in_memory_and_aligned() {
    let memory = TestMemory::new(0x10000);
    let driver = TestQueue::new(memory.view(), memory.base(), 8, false);
    let good = config(&driver, 8, false);
    let at = good.address;
    let refused = |address| {
        let config = RingConfig { address, ..good };
        SplitQueue::new(memory.view(), &config, None).expect_err("refused")
    };
    let end = memory.base() + 0x10000;
    for address in [
        RingAddress { descriptor: at.descriptor + 8, ..at },
        RingAddress { available: at.available + 1, ..at },
        RingAddress { used: at.used + 2, ..at },
        RingAddress { descriptor: end - 16 * 8 + 16, ..at },
        RingAddress { available: end - 20, ..at },
        RingAddress { used: end - 68, ..at },
        RingAddress { used: u64::MAX - 3, ..at },
        RingAddress { used: 0, ..at },
    ] {
        assert_eq!(refused(address), Broken::RingAddress, "{address:?}");
    }
    for size in [0, 3, 2048] {
        let config = RingConfig { size, ..good };
        assert!(SplitQueue::new(memory.view(), &config, None).is_err(), "{size}");
    }
    assert!(SplitQueue::new(memory.view(), &good, None).is_ok());
}

#[test]
fn events_wrap() {
    // event, new, old
    assert!(need_event(0, 1, 0));
    assert!(!need_event(1, 1, 0));
    assert!(need_event(0xffff, 0, 0xffff));
    assert!(need_event(2, 5, 0));
    assert!(!need_event(7, 5, 0));
    assert!(need_event(0xfffe, 3, 0xfff0));
}

#[test]
fn interrupts_only_when_the_driver_wants_them() {
    for event_idx in [false, true] {
        let mut pair = pair(8, event_idx);
        let at = pair.data();
        let round = |pair: &mut Pair| {
            pair.driver.add(&[Buffer::writable(at, 1)]).unwrap();
            pair.driver.publish();
            assert_eq!(pair.pop(), Ok(true));
            pair.device.push_used(pair.chain.token, 1).unwrap();
            pair.device.publish().unwrap()
        };
        assert!(round(&mut pair), "the first one always: a driver may have waited before us");
        pair.driver.pop_used().unwrap();
        assert!(!pair.driver.arm());
        assert!(round(&mut pair));
        // Behind the event index, or with NO_INTERRUPT set: not wanted.
        pair.driver.disarm();
        assert!(!round(&mut pair));
        assert!(!round(&mut pair));
        assert!(pair.driver.arm(), "the device was faster");
        while pair.driver.pop_used().is_some() {}
        assert!(!pair.driver.arm());
        assert!(round(&mut pair));
    }
}

#[test]
fn notifications_only_when_armed() {
    for event_idx in [false, true] {
        let mut pair = pair(8, event_idx);
        let at = pair.data();
        let add = |pair: &mut Pair| {
            pair.driver.add(&[Buffer::writable(at, 1)]).unwrap();
            pair.driver.publish()
        };
        assert_eq!(pair.device.arm(), Ok(false));
        assert!(add(&mut pair), "armed");
        pair.device.disarm();
        assert!(!add(&mut pair), "not armed any more");
        assert_eq!(pair.device.arm(), Ok(true), "work is there");
        assert_eq!(pair.pop(), Ok(true));
        assert_eq!(pair.pop(), Ok(true));
        assert_eq!(pair.device.arm(), Ok(false));
        assert!(add(&mut pair));
    }
}

#[test]
fn goes_on_behind_what_was_used() {
    let mut pair = pair(4, true);
    let at = pair.data();
    for round in 0..70_000u32 {
        let head = pair.driver.add(&[Buffer::writable(at, 1)]).unwrap();
        pair.driver.publish();
        assert_eq!(pair.pop(), Ok(true));
        pair.device.push_used(pair.chain.token, round).unwrap();
        pair.device.publish().unwrap();
        assert_eq!(pair.driver.pop_used(), Some((head, round)));
        if round % 7919 == 0 {
            let base = u32::from(pair.device.next_avail());
            let config = RingConfig { base, ..config(&pair.driver, 4, true) };
            pair.device = SplitQueue::new(pair.memory.view(), &config, None).unwrap();
        }
    }
}

/// Neither side ever waits for the other while that waits for it: each goes to sleep only after
/// arming and looking again, and wakes the other only when asked to.
#[test]
fn no_wakeup_is_lost() {
    const ROUNDS: u32 = 20_000;
    for event_idx in [false, true] {
        let Pair { memory, mut driver, .. } = pair(16, event_idx);
        let shared = memory.memory().clone();
        let config = config(&driver, 16, event_idx);
        let (kick, kicked) = mpsc::channel();
        let (call, called) = mpsc::channel();
        let device = std::thread::spawn(move || {
            let mut queue = SplitQueue::new(&shared.view(), &config, None).unwrap();
            let mut chain = Chain::new();
            let (mut done, mut waits) = (0, 0u32);
            while done < ROUNDS {
                while queue.pop(&mut chain).unwrap() {
                    queue.push_used(chain.token, 1).unwrap();
                    done += 1;
                }
                if queue.publish().unwrap() {
                    call.send(()).unwrap();
                }
                if done < ROUNDS && !queue.arm().unwrap() {
                    waits += 1;
                    kicked.recv_timeout(Duration::from_secs(20)).expect("a kick");
                }
                queue.disarm();
            }
            waits
        });
        let at = memory.base() + DATA_AT;
        let (mut added, mut done) = (0, 0);
        while done < ROUNDS {
            // Depths from 1 to 7.
            while added < ROUNDS && added - done < 1 + done % 7 {
                driver.add(&[Buffer::writable(at, 1)]).unwrap();
                added += 1;
            }
            if driver.publish() {
                kick.send(()).unwrap();
            }
            driver.disarm();
            while driver.pop_used().is_some() {
                done += 1;
            }
            if done < added && !driver.arm() {
                called.recv_timeout(Duration::from_secs(20)).expect("a call");
            }
        }
        assert!(device.join().unwrap() > 0, "the device slept at least once");
    }
}

/// The chain walk, written once more without any cleverness.
fn oracle(memory: &TestMemory, table: u64, count: u64, head: u16, outer: bool) -> Option<Chain> {
    let mut chain = Chain::new();
    let mut index = u64::from(head);
    for _ in 0..count.min(CHAIN_MAX as u64) {
        if index >= count {
            return None;
        }
        let mut bytes = [0; 16];
        memory.view().read(table.checked_add(16 * index)?, &mut bytes).ok()?;
        let addr = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
        let next = u16::from_le_bytes(bytes[14..].try_into().unwrap());
        if flags & INDIRECT != 0 {
            if !outer || flags & NEXT != 0 || len == 0 || len % 16 != 0 {
                return None;
            }
            let inner = oracle(memory, addr, u64::from(len) / 16, 0, false)?;
            chain.is_ordered &= inner.readable.is_empty() || chain.writable.is_empty();
            chain.is_ordered &= inner.is_ordered;
            chain.readable.extend(inner.readable);
            chain.writable.extend(inner.writable);
            return Some(chain);
        }
        if len > 0 && flags & WRITE != 0 {
            chain.writable.push(Piece { addr, len });
        } else if len > 0 {
            chain.is_ordered &= chain.writable.is_empty();
            chain.readable.push(Piece { addr, len });
        }
        if flags & NEXT == 0 {
            return Some(chain);
        }
        index = u64::from(next);
    }
    None
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let base = 0x4000_0000u64;
    let addr = prop_oneof![
        4 => (0u64..0x4000).prop_map(move |x| base + x * 16),
        1 => any::<u64>(),
        1 => Just(base + 0x40000 - 16),
    ];
    let len = prop_oneof![3 => (0u32..40).prop_map(|x| x * 16), 1 => any::<u32>()];
    let flags = prop_oneof![
        5 => 0u16..4,
        1 => Just(INDIRECT),
        1 => 0u16..8,
        1 => any::<u16>(),
    ];
    (addr, len, flags, prop_oneof![6 => 0u16..18, 1 => any::<u16>()])
}

proptest! {
    #[test]
    fn any_ring_is_walked_as_the_rules_say(
        table in prop::collection::vec(descriptor(), 16),
        inner in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![9 => 0u16..16, 1 => any::<u16>()], 1..16),
    ) {
        let mut pair = pair(16, false);
        for (index, (addr, len, flags, next)) in (0u16..).zip(&table) {
            pair.driver.set_desc(index, *addr, *len, *flags, *next);
        }
        // What an indirect descriptor may point to: everything from here on, repeated.
        for (at, (addr, len, flags, next)) in (0..).zip(inner.iter().cycle().take(0x1000)) {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            pair.memory.write(pair.memory.base() + 0x10000 + 16 * at, &bytes);
        }
        for head in &heads {
            pair.driver.push_head(*head);
        }
        pair.driver.publish();
        for head in heads {
            let table = pair.driver.address().descriptor;
            let expected = oracle(&pair.memory, table, 16, head, true);
            let popped = pair.pop();
            let Some(expected) = expected else {
                prop_assert!(popped.is_err());
                break;
            };
            prop_assert_eq!(popped, Ok(true));
            prop_assert_eq!(pair.chain.token.id, head);
            prop_assert_eq!(&pair.chain.readable, &expected.readable);
            prop_assert_eq!(&pair.chain.writable, &expected.writable);
            prop_assert_eq!(pair.chain.is_ordered, expected.is_ordered);
        }
    }

    #[test]
    fn any_available_index_is_an_answer(
        start in any::<u16>(),
        index in any::<u16>(),
    ) {
        let memory = TestMemory::new(0x10000);
        let mut driver = TestQueue::new(memory.view(), memory.base(), 16, true);
        let config = RingConfig { base: u32::from(start), ..config(&driver, 16, true) };
        let mut device = SplitQueue::new(memory.view(), &config, None).unwrap();
        driver.publish_index(index);
        let ahead = index.wrapping_sub(start);
        let mut chain = Chain::new();
        let mut taken = 0;
        let end = loop {
            match device.pop(&mut chain) {
                Ok(true) => taken += 1,
                Ok(false) => break Ok(()),
                Err(broken) => break Err(broken),
            }
        };
        match ahead {
            0..=16 => prop_assert_eq!((end, taken), (Ok(()), ahead)),
            _ => prop_assert_eq!((end, taken), (Err(Broken::AvailableIndex), 0)),
        }
    }
}
