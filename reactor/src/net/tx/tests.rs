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
    unsafe { tx.prepare(None, true) }.unwrap()
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

/// A layer that notes what it is given and frames it with a byte.
#[derive(Default)]
struct Noting {
    pieces: Vec<Vec<u8>>,
}

impl Layer for Noting {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let mut bytes = Vec::new();
        plain.append_to(0, plain.len(), &mut bytes).map_err(|_| LayerError("short"))?;
        out.push(b'<');
        out.extend_from_slice(&bytes);
        self.pieces.push(bytes);
        Ok(())
    }

    fn open(
        &mut self,
        _: &mut [u8],
        _: &mut dyn FnMut(crate::net::Plain<'_>),
    ) -> Result<(), LayerError> {
        Ok(())
    }
}

/// Seals the next message and has it sent; returns its length, or `None` if nothing waits.
fn seal_and_send(tx: &Tx, layer: &mut Noting, is_first: bool) -> Option<usize> {
    // SAFETY: nothing is in flight in these tests.
    if !unsafe { tx.prepare(Some(layer), is_first) }.unwrap() {
        return None;
    }
    let len = bytes_of(&message(tx));
    // SAFETY: as above.
    assert!(unsafe { tx.on_sent(len, true) });
    Some(len)
}

#[test]
fn a_large_payload_begins_a_piece_and_its_first_part_leaves_early() {
    let tx = Tx::new(8, 128 << 10).unwrap();
    let (memory, sg) = memory(128 << 10, 3);
    tx.push(&[1; 24], None, None, Some(0)).unwrap();
    tx.push(&[2; 24], Some((&sg, 0, 128 << 10)), Some(*b"tail"), Some(1)).unwrap();
    tx.push(&[3; 24], Some((&sg, 0, 4096)), None, Some(2)).unwrap();
    let mut layer = Noting::default();
    let mut lens = Vec::new();
    while !tx.is_idle() {
        lens.extend(seal_and_send(&tx, &mut layer, true));
        if lens.len() == 1 {
            assert_eq!(
                (tx.pop_sent(), tx.pop_sent()),
                (Some(0), None),
                "the second is not sealed yet"
            );
        }
    }
    assert_eq!(seal_and_send(&tx, &mut layer, true), None);
    let pieces: Vec<usize> = layer.pieces.iter().map(Vec::len).collect();
    let mut want = vec![24, 24];
    want.extend([SEAL_BYTES; 8]);
    // The rest of the first message's entries, and then the next message.
    want.extend([4, 24 + 4096]);
    assert_eq!(pieces, want);
    assert!(lens.iter().all(|len| *len <= SEALED_BYTES_FIRST), "{lens:?}");
    assert_eq!(lens.len(), 5, "one, three of the large payload, one");
    let mut bytes = [[1; 24], [2; 24]].concat();
    bytes.extend_from_slice(&memory.bytes);
    bytes.extend_from_slice(b"tail");
    bytes.extend_from_slice(&[3; 24]);
    bytes.extend_from_slice(&memory.bytes[..4096]);
    assert!(layer.pieces.concat() == bytes, "bytes differ");
    assert_eq!((tx.pop_sent(), tx.pop_sent(), tx.pop_sent()), (Some(1), Some(2), None));
    assert_eq!(memory.uses.get(), 3, "the list's own");
}

#[test]
fn behind_the_first_part_the_rest_leaves_at_once() {
    let tx = Tx::new(8, 128 << 10).unwrap();
    let (_memory, sg) = memory(120_000, 1);
    tx.push(&[2; 24], Some((&sg, 0, 120_000)), None, Some(1)).unwrap();
    let mut layer = Noting::default();
    let first = 24 + 3 * SEAL_BYTES;
    assert_eq!(seal_and_send(&tx, &mut layer, true), Some(first + 4));
    assert_eq!(seal_and_send(&tx, &mut layer, false), Some(120_024 - first + 5));
    assert_eq!(seal_and_send(&tx, &mut layer, false), None);
    assert_eq!(tx.pop_sent(), Some(1));
}

#[test]
fn small_pdus_share_full_pieces_and_leave_together() {
    let tx = Tx::new(64, 128 << 10).unwrap();
    let (_memory, sg) = memory(4096, 1);
    for token in 0..20 {
        tx.push(&[1; 24], Some((&sg, 0, 4096)), None, Some(token)).unwrap();
    }
    let mut layer = Noting::default();
    assert_eq!(seal_and_send(&tx, &mut layer, true), Some(20 * 4120 + 6));
    let pieces: Vec<usize> = layer.pieces.iter().map(Vec::len).collect();
    assert_eq!(pieces, [[SEAL_BYTES; 5].as_slice(), &[480]].concat());
    assert_eq!(seal_and_send(&tx, &mut layer, true), None);
}

#[test]
fn what_is_not_sealed_yet_is_forgotten_with_its_entry() {
    let (memory, sg) = memory(300_000, 2);
    let tx = Tx::new(8, 128 << 10).unwrap();
    tx.push(&[2; 24], Some((&sg, 0, 300_000)), None, Some(1)).unwrap();
    tx.push(&[3; 24], None, None, Some(2)).unwrap();
    let mut layer = Noting::default();
    assert!(seal_and_send(&tx, &mut layer, true).is_some() && !tx.is_idle());
    tx.abandon_waiting();
    assert_eq!((tx.pop_sent(), memory.uses.get()), (Some(2), 4), "the first is under way");
    tx.abandon();
    assert!(tx.is_idle());
    assert_eq!((tx.pop_sent(), memory.uses.get()), (Some(1), 2));
    let pieces = layer.pieces.len();
    assert_eq!(seal_and_send(&tx, &mut layer, true), None);
    assert_eq!(layer.pieces.len(), pieces);
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
    /// The same through a layer: it is given every byte in order, no piece is longer than a record, and
    /// a large payload begins one.
    #[test]
    fn a_layer_is_given_all_bytes_in_order(
        pdus in prop::collection::vec((1..=HEAD_BYTES_MAX, 0..100_000usize, any::<bool>()), 1..20),
        segments in 1..2000usize,
        waits in prop::collection::vec(any::<bool>(), 20),
    ) {
        let tx = Tx::new(32, 128 << 10).unwrap();
        let (memory, sg) = memory(100_000, segments);
        let (mut expected, mut starts) = (Vec::new(), Vec::new());
        let mut layer = Noting::default();
        for (n, (head, payload, tail)) in pdus.iter().enumerate() {
            let head = vec![n as u8; *head];
            let tail = tail.then_some(*b"tail");
            tx.push(&head, Some((&sg, 0, *payload)), tail, Some(n as u32)).unwrap();
            expected.extend(head);
            if *payload >= SEAL_BYTES {
                starts.push(expected.len());
            }
            expected.extend_from_slice(&memory.bytes[..*payload]);
            expected.extend(tail.into_iter().flatten());
            if waits[n] {
                seal_and_send(&tx, &mut layer, n % 2 == 0);
            }
        }
        while seal_and_send(&tx, &mut layer, true).is_some() {}
        prop_assert!(layer.pieces.concat() == expected);
        let mut at = 0;
        for piece in &layer.pieces {
            prop_assert!((1..=SEAL_BYTES).contains(&piece.len()));
            if starts.first() == Some(&at) {
                starts.remove(0);
            }
            at += piece.len();
        }
        prop_assert!(starts.is_empty(), "{starts:?} do not begin a piece");
        for n in 0..pdus.len() {
            prop_assert_eq!(tx.pop_sent(), Some(n as u32));
        }
        drop(tx);
        prop_assert_eq!(memory.uses.get(), segments as i32);
    }

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
