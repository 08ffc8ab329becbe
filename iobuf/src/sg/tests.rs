use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::Pool;

/// A list cut into pieces of the given sizes, the pieces in an order chosen by `seed`: what a
/// guest's descriptors look like. `0xEE` everywhere.
fn scattered(pool: &Pool, sizes: &[usize], seed: usize) -> SgList {
    let total = sizes.iter().sum();
    let mut whole = SgList::default();
    pool.alloc(total, &mut whole).unwrap();
    whole.fill(0, total, 0xEE).unwrap();
    let mut pieces = Vec::new();
    let mut at = 0;
    for &size in sizes {
        pieces.push((at, size));
        at += size;
    }
    let count = pieces.len().max(1);
    pieces.rotate_left(seed % count);
    if seed % 2 == 1 {
        pieces.reverse();
    }
    let mut list = SgList::default();
    for (at, size) in pieces {
        list.append_range(&whole, at, size).unwrap();
    }
    list
}

fn bytes(list: &SgList) -> Vec<u8> {
    let mut all = vec![0; list.len()];
    list.copy_to_slice(0, &mut all).unwrap();
    all
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 7 + 1) as u8).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize),
    Fill(usize, usize, u8),
    CopyOut(usize, usize, usize),
    CopyIn(usize, usize, usize),
    Truncate(usize),
    Check(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..40_000usize;
    prop_oneof![
        (at.clone(), at.clone()).prop_map(|(o, l)| Step::Write(o, l)),
        (at.clone(), at.clone(), any::<u8>()).prop_map(|(o, l, b)| Step::Fill(o, l, b)),
        (at.clone(), at.clone(), at.clone()).prop_map(|(o, d, l)| Step::CopyOut(o, d, l)),
        (at.clone(), at.clone(), at.clone()).prop_map(|(o, d, l)| Step::CopyIn(o, d, l)),
        at.clone().prop_map(Step::Truncate),
        (at.clone(), at).prop_map(|(o, l)| Step::Check(o, l)),
    ]
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(cases(200))]

    /// Any sequence of operations on a scattered list does what it does on a `Vec`, and what a
    /// `Vec` refuses is refused without effect.
    #[test]
    fn a_list_is_a_vec(
        sizes in vec(1..9000usize, 1..12),
        other_sizes in vec(1..9000usize, 1..12),
        seed in 0..64usize,
        steps in vec(step(), 1..40),
    ) {
        let pool = Pool::new(1 << 20).unwrap();
        let mut list = scattered(&pool, &sizes, seed);
        let other = scattered(&pool, &other_sizes, seed / 2);
        let mut model = vec![0xEE; list.len()];
        let mut other_model = vec![0xEE; other.len()];
        for (n, step) in steps.iter().enumerate() {
            match *step {
                Step::Write(o, l) => {
                    let data = pattern(l, n);
                    let ok = list.copy_from_slice(o, &data).is_ok();
                    prop_assert_eq!(ok, o + l <= model.len());
                    if ok { model[o..o + l].copy_from_slice(&data); }
                }
                Step::Fill(o, l, b) => {
                    let ok = list.fill(o, l, b).is_ok();
                    prop_assert_eq!(ok, o + l <= model.len());
                    if ok { model[o..o + l].fill(b); }
                }
                Step::CopyOut(o, d, l) => {
                    let ok = list.copy_to(o, &other, d, l).is_ok();
                    prop_assert_eq!(ok, o + l <= model.len() && d + l <= other_model.len());
                    if ok { other_model[d..d + l].copy_from_slice(&model[o..o + l]); }
                }
                Step::CopyIn(o, d, l) => {
                    let ok = other.copy_to(o, &list, d, l).is_ok();
                    prop_assert_eq!(ok, o + l <= other_model.len() && d + l <= model.len());
                    if ok { model[d..d + l].copy_from_slice(&other_model[o..o + l]); }
                }
                Step::Truncate(l) => {
                    if l * 2 > model.len() {
                        list.truncate(l);
                        model.truncate(l);
                    }
                }
                Step::Check(o, l) => {
                    let mut seen = Vec::new();
                    let ok = list.for_each_chunk(o, l, &mut |b| seen.extend_from_slice(b)).is_ok();
                    prop_assert_eq!(ok, o + l <= model.len());
                    if ok { prop_assert_eq!(&seen, &model[o..o + l]); }
                    seen.clear();
                    let ok = list.for_each_piece(o, l, &mut |b| seen.extend_from_slice(b)).is_ok();
                    prop_assert_eq!(ok, o + l <= model.len());
                    if ok { prop_assert_eq!(&seen, &model[o..o + l]); }
                    let cut = l.min(model.len().saturating_sub(o));
                    let pieces: Vec<Segment> = list.range(o, l).collect();
                    prop_assert_eq!(pieces.iter().map(Segment::len).sum::<usize>(), cut);
                    prop_assert!(pieces.iter().all(|p| !p.is_empty()));
                }
            }
            prop_assert_eq!(list.len(), model.len());
        }
        prop_assert_eq!(bytes(&list), model);
        prop_assert_eq!(bytes(&other), other_model);
        drop(list);
        drop(other);
        prop_assert_eq!(pool.available(), pool.capacity());
    }
}

#[test]
fn offsets_that_wrap_are_refused() {
    let pool = Pool::new(1 << 20).unwrap();
    let mut list = SgList::default();
    pool.alloc(100, &mut list).unwrap();
    assert_eq!(list.fill(usize::MAX, 2, 0), Err(OutOfBounds));
    assert_eq!(list.fill(1, usize::MAX, 0), Err(OutOfBounds));
    assert_eq!(list.copy_from_slice(100, &[1]), Err(OutOfBounds));
    assert_eq!(list.copy_from_slice(100, &[]), Ok(()));
    assert_eq!(list.range(usize::MAX, usize::MAX).count(), 0);
    assert_eq!(SgList::default().append_range(&list, 50, 51), Err(OutOfBounds));
}

#[test]
fn alignment_looks_at_both_ends() {
    let pool = Pool::new(1 << 20).unwrap();
    let mut list = SgList::default();
    pool.alloc(8192, &mut list).unwrap();
    assert!(list.is_aligned(4096));
    let mut part = SgList::default();
    part.append_range(&list, 512, 1024).unwrap();
    assert!(part.is_aligned(512) && !part.is_aligned(1024));
    part.append_range(&list, 4096, 100).unwrap();
    assert!(!part.is_aligned(512));
}

#[test]
#[should_panic(expected = "segments of two holds in one list")]
fn two_pools_do_not_mix() {
    let (one, two) = (Pool::new(1 << 20).unwrap(), Pool::new(1 << 20).unwrap());
    let (mut a, mut b) = (SgList::default(), SgList::default());
    one.alloc(10, &mut a).unwrap();
    two.alloc(10, &mut b).unwrap();
    let _ = a.append_range(&b, 0, 10);
}

#[test]
fn comparing_counts_every_byte_and_none_outside() {
    let pool = Pool::new(4 << 20).unwrap();
    let (mut a, mut b) = (SgList::default(), SgList::default());
    pool.alloc(300_000, &mut a).unwrap();
    pool.alloc(200_000, &mut b).unwrap();
    let bytes: Vec<u8> = (0..200_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
    a.copy_from_slice(50_000, &bytes).unwrap();
    b.copy_from_slice(0, &bytes).unwrap();
    assert_eq!(a.is_equal(50_000, &b, 0, 200_000), Ok(true));
    for at in [0, 4095, 4096, 131_071, 199_999] {
        b.copy_from_slice(at, &[!bytes[at]]).unwrap();
        assert_eq!(a.is_equal(50_000, &b, 0, 200_000), Ok(false), "byte {at}");
        assert_eq!(a.is_equal(50_000, &b, 0, at), Ok(true), "before byte {at}");
        b.copy_from_slice(at, &bytes[at..=at]).unwrap();
    }
    assert_eq!(a.is_equal(50_000, &b, 0, 200_001), Err(OutOfBounds));
}
