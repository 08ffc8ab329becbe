//! The send queue against a sink that takes as many bytes as it likes.

use std::cell::Cell;

use proptest::prelude::*;

use super::*;

/// Memory that knows its users.
struct Memory {
    bytes: Box<[u8]>,
    uses: Cell<i32>,
}

impl Hold for Memory {
    fn retain(&self, segments: &[Segment]) {
        self.uses.set(self.uses.get() + segments.len() as i32);
    }
    fn release(&self, segments: &[Segment]) {
        self.uses.set(self.uses.get() - segments.len() as i32);
    }
}

fn memory(len: usize, pieces: usize) -> (Rc<Memory>, SgList) {
    let bytes = (0..len).map(|i| i as u8).collect();
    let memory = Rc::new(Memory { bytes, uses: Cell::new(pieces as i32) });
    let mut sg = SgList::default();
    let base = memory.bytes.as_ptr().cast_mut();
    for piece in 0..pieces {
        let (from, to) = (len * piece / pieces, len * (piece + 1) / pieces);
        // SAFETY: the bytes live as long as the hold, and a use of each piece was counted.
        unsafe { sg.append(&memory, Segment::new(base.wrapping_add(from), to - from)) };
    }
    (memory, sg)
}

/// The prepared message's segments.
fn message(tx: &Tx) -> Vec<Segment> {
    // SAFETY: nothing is in flight in these tests.
    let message = unsafe { &*tx.message.get() };
    message.iovecs[message.at..].to_vec()
}

fn prepare(tx: &Tx) -> bool {
    // SAFETY: nothing is in flight in these tests.
    unsafe { tx.prepare(None) }.unwrap()
}

fn on_sent(tx: &Tx, bytes: usize) -> bool {
    // SAFETY: nothing is in flight in these tests.
    unsafe { tx.on_sent(bytes, false) }
}

fn read(segment: Segment) -> Vec<u8> {
    // SAFETY: segments of a prepared message are alive until they are sent.
    unsafe { std::slice::from_raw_parts(segment.as_ptr(), segment.len()) }.to_vec()
}

fn bytes_of(segments: &[Segment]) -> usize {
    segments.iter().map(Segment::len).sum()
}

#[test]
fn small_pdus_are_coalesced_up_to_the_cap_and_large_ones_go_alone() {
    let tx = Tx::new(64, 10_000).unwrap();
    let (_memory, sg) = memory(9_990, 1);
    for token in 0..3 {
        tx.push(&[1; 10], Some((&sg, 0, 90)), None, Some(token)).unwrap();
    }
    tx.push(&[1; 10], Some((&sg, 0, 9_990)), None, Some(3)).unwrap();
    tx.push(&[1; 10], None, None, Some(4)).unwrap();
    assert!(prepare(&tx));
    assert_eq!(bytes_of(&message(&tx)), 300);
    assert!(on_sent(&tx, 300));
    assert!(prepare(&tx));
    assert_eq!(bytes_of(&message(&tx)), 10_000);
    assert!(on_sent(&tx, 10_000));
    assert!(prepare(&tx));
    assert_eq!(bytes_of(&message(&tx)), 10);
    assert!(on_sent(&tx, 10));
    assert!(!prepare(&tx));
    let tokens: Vec<_> = std::iter::from_fn(|| tx.pop_sent()).collect();
    assert_eq!(tokens, [0, 1, 2, 3, 4]);
}

#[test]
fn a_pdu_longer_than_the_cap_goes_whole() {
    let tx = Tx::new(4, 100).unwrap();
    let (_memory, sg) = memory(5_000, 3);
    tx.push(b"head", Some((&sg, 0, 5_000)), Some(*b"tail"), None).unwrap();
    tx.push(b"next", None, None, None).unwrap();
    assert!(prepare(&tx));
    assert_eq!(bytes_of(&message(&tx)), 5_008);
}

#[test]
fn heads_without_payload_become_one_segment() {
    let tx = Tx::new(64, 10_000).unwrap();
    for _ in 0..50 {
        tx.push(&[7; 72], None, Some([8; 4]), None).unwrap();
    }
    assert!(prepare(&tx));
    let message = message(&tx);
    assert_eq!((message.len(), bytes_of(&message)), (1, 50 * 76));
}

#[test]
fn a_payload_of_more_segments_than_the_kernel_takes_is_spread_over_sends() {
    let tx = Tx::new(4, 1 << 20).unwrap();
    let (memory, sg) = memory(5_000, 2_500);
    tx.push(b"h", Some((&sg, 0, 5_000)), Some(*b"tail"), Some(1)).unwrap();
    tx.push(b"next", None, None, Some(2)).unwrap();
    let mut sent = Vec::new();
    while prepare(&tx) {
        let segments = message(&tx);
        assert!(segments.len() <= IOVECS_MAX);
        for segment in &segments {
            sent.extend(read(*segment));
        }
        assert!(on_sent(&tx, bytes_of(&segments)));
    }
    let mut expected = b"h".to_vec();
    expected.extend_from_slice(&memory.bytes);
    expected.extend_from_slice(b"tailnext");
    assert!(sent == expected);
    assert_eq!((tx.pop_sent(), tx.pop_sent()), (Some(1), Some(2)));
    assert_eq!(memory.uses.get(), 2_500, "the list's own");
}

#[test]
fn entries_without_a_byte_end_at_once() {
    let tx = Tx::new(4, 100).unwrap();
    tx.push(&[], None, None, Some(1)).unwrap();
    tx.push(&[], None, None, Some(2)).unwrap();
    assert!(!prepare(&tx));
    assert_eq!((tx.pop_sent(), tx.pop_sent()), (Some(1), Some(2)));
}

#[test]
fn abandoning_gives_memory_back_and_tokens_out() {
    let (memory, sg) = memory(100, 2);
    let tx = Tx::new(8, 50).unwrap();
    for token in 0..4 {
        tx.push(b"head", Some((&sg, 0, 100)), None, Some(token)).unwrap();
    }
    assert!(prepare(&tx));
    tx.abandon_waiting();
    assert_eq!(memory.uses.get(), 4, "the list's and the entry in flight");
    assert_eq!(tx.pop_sent(), Some(1));
    tx.abandon();
    assert_eq!(memory.uses.get(), 2);
    assert_eq!(std::iter::from_fn(|| tx.pop_sent()).count(), 3);
    tx.push(b"head", Some((&sg, 0, 100)), None, None).unwrap();
    drop(tx);
    assert_eq!(memory.uses.get(), 2);
}

#[test]
#[should_panic(expected = "payload of 10 bytes at 95")]
fn a_payload_outside_of_its_list_is_a_mistake_of_the_caller() {
    let (_memory, sg) = memory(100, 2);
    let _ = Tx::new(8, 50).unwrap().push(b"head", Some((&sg, 95, 10)), None, None);
}

#[derive(Clone, Debug)]
enum Step {
    Push {
        head: usize,
        payload: usize,
        tail: bool,
    },
    /// In thousandths of what is offered.
    Send(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..=HEAD_BYTES_MAX, 0..3000usize, any::<bool>())
            .prop_map(|(head, payload, tail)| Step::Push { head, payload, tail }),
        (1..=1000usize).prop_map(Step::Send),
    ]
}

proptest! {
    /// Whatever is pushed and however sends are cut short: the bytes come out as they went in,
    /// also while pushes go on during a send, and tokens come in order, never early.
    #[test]
    fn bytes_and_tokens_stay_in_order(steps in prop::collection::vec(step(), 1..200)) {
        let tx = Tx::new(6, 2_000).unwrap();
        let (memory, sg) = memory(3_000, 5);
        let (mut expected, mut ends) = (Vec::new(), Vec::new());
        let mut sent = Vec::new();
        let mut in_flight = false;
        let mut tokens = 0;
        for step in steps {
            match step {
                Step::Push { head, payload, tail } => {
                    let head = vec![ends.len() as u8; head];
                    let tail = tail.then_some(*b"tail");
                    let part = (&sg, 3_000 - payload, payload);
                    match tx.push(&head, Some(part), tail, Some(ends.len() as u32)) {
                        Err(Full) => prop_assert_eq!(tx.room(), 0),
                        Ok(()) => {
                            expected.extend(head);
                            expected.extend_from_slice(&memory.bytes[3_000 - payload..]);
                            expected.extend(tail.into_iter().flatten());
                            ends.push(expected.len());
                        }
                    }
                }
                Step::Send(part) => {
                    if !in_flight {
                        in_flight = prepare(&tx);
                    }
                    if in_flight {
                        let offered: Vec<u8> = message(&tx).into_iter().flat_map(read).collect();
                        let count = (offered.len() * part).div_ceil(1000);
                        sent.extend_from_slice(&offered[..count]);
                        in_flight = !on_sent(&tx, count);
                    }
                }
            }
            while let Some(token) = tx.pop_sent() {
                prop_assert_eq!(token, tokens);
                prop_assert!(ends[tokens as usize] <= sent.len());
                tokens += 1;
            }
            prop_assert!(expected.starts_with(&sent));
        }
        drop(tx);
        prop_assert_eq!(memory.uses.get(), 5);
    }
}
