use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

#[test]
fn sizes_get_the_segments_they_deserve() {
    let pool = Pool::new(1 << 20).unwrap();
    let segments = |len: usize| {
        let mut list = SgList::default();
        pool.alloc(len, &mut list).unwrap();
        assert_eq!(list.len(), len);
        assert!(list.segments().iter().all(|s| s.as_ptr().addr().is_multiple_of(PAGE_BYTES)));
        list.segments().iter().map(Segment::len).collect::<Vec<_>>()
    };
    assert_eq!(segments(0), []);
    assert_eq!(segments(1), [1]);
    assert_eq!(segments(4096), [4096]);
    assert_eq!(segments(8192), [4096, 4096]);
    assert_eq!(segments(12288), [12288]);
    assert_eq!(segments(16384), [16384]);
    assert_eq!(segments(32768), [16384, 16384]);
    assert_eq!(segments(131072), [131072]);
    assert_eq!(segments(262144 + 512), [131072, 131072, 512]);
    assert_eq!(pool.available(), pool.capacity());
}

#[test]
fn exhaustion_is_all_or_nothing_and_falls_back_to_other_chunks() {
    let pool = Pool::new(256 << 10).unwrap();
    assert_eq!(pool.capacity(), 256 << 10);
    let mut big = SgList::default();
    assert_eq!(pool.alloc((256 << 10) + 1, &mut big), Err(Exhausted));
    assert!(big.is_empty() && pool.available() == pool.capacity());
    // 31 small chunks in one block, the other block whole: 128 KiB + 4 KiB can be had, in two
    // pieces.
    let small: Vec<SgList> = (0..31)
        .map(|_| {
            let mut list = SgList::default();
            pool.alloc(4096, &mut list).unwrap();
            list
        })
        .collect();
    pool.alloc(132 << 10, &mut big).unwrap();
    assert_eq!(big.segments().len(), 2);
    assert_eq!(pool.available(), 0);
    drop(small);
    // Only 4 KiB chunks are left: a big request takes them.
    let mut next = SgList::default();
    pool.alloc(100 << 10, &mut next).unwrap();
    assert_eq!(next.segments().len(), 25);
}

#[test]
fn a_retained_chunk_is_not_given_out_again() {
    let pool = Pool::new(128 << 10).unwrap();
    let mut list = SgList::default();
    pool.alloc(128 << 10, &mut list).unwrap();
    let hold = list.hold().unwrap();
    let in_kernel: Vec<Segment> = list.range(5000, 100).collect();
    hold.retain(&in_kernel);
    list.clear();
    assert_eq!(pool.alloc(1, &mut list), Err(Exhausted));
    hold.release(&in_kernel);
    assert_eq!(pool.alloc(1, &mut list), Ok(()));
}

#[test]
#[should_panic(expected = "released twice")]
fn a_double_release_is_loud() {
    let pool = Pool::new(128 << 10).unwrap();
    let mut list = SgList::default();
    pool.alloc(100, &mut list).unwrap();
    let (hold, segments) = (list.hold().unwrap(), list.segments().to_vec());
    list.clear();
    hold.release(&segments);
}

#[test]
fn the_arena_outlives_the_pool_handle() {
    let pool = Pool::new(128 << 10).unwrap();
    let mut list = SgList::default();
    pool.alloc(10, &mut list).unwrap();
    drop(pool);
    list.copy_from_slice(0, &[7; 10]).unwrap();
    let mut back = [0; 10];
    list.copy_to_slice(0, &mut back).unwrap();
    assert_eq!(back, [7; 10]);
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(usize),
    Free(usize),
    Share(usize, usize, usize),
    Truncate(usize, usize),
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(cases(64))]

    /// Whatever is allocated, shared, cut and freed: lists never get each other's memory, the count
    /// of free bytes is right, and all of it comes back.
    #[test]
    fn chunks_are_given_to_one_owner(steps in vec(prop_oneof![
        3 => (1..300_000usize).prop_map(Step::Alloc),
        3 => (1..20_000usize).prop_map(Step::Alloc),
        4 => any::<usize>().prop_map(Step::Free),
        1 => any::<[usize; 3]>().prop_map(|[i, o, l]| Step::Share(i, o, l)),
        1 => any::<[usize; 2]>().prop_map(|[i, l]| Step::Truncate(i, l)),
    ], 1..120)) {
        let pool = Pool::new(1 << 20).unwrap();
        // Each list with the byte it was filled with; shared lists carry the owner's byte.
        let mut lists: Vec<(u8, SgList)> = Vec::new();
        for (n, step) in steps.into_iter().enumerate() {
            let count = lists.len();
            match step {
                Step::Alloc(len) => {
                    let before = pool.available();
                    let mut list = SgList::default();
                    match pool.alloc(len, &mut list) {
                        Ok(()) => {
                            prop_assert_eq!(list.len(), len);
                            prop_assert!(before - pool.available() >= len);
                            list.fill(0, len, n as u8).unwrap();
                            lists.push((n as u8, list));
                        }
                        Err(Exhausted) => {
                            prop_assert!(list.is_empty());
                            prop_assert_eq!(pool.available(), before);
                        }
                    }
                }
                Step::Free(i) if count > 0 => {
                    lists.swap_remove(i % count);
                }
                Step::Share(i, o, l) if count > 0 => {
                    let (byte, source) = &lists[i % count];
                    if !source.is_empty() {
                        let o = o % source.len();
                        let l = l % (source.len() - o + 1);
                        let mut list = SgList::default();
                        list.append_range(source, o, l).unwrap();
                        let byte = *byte;
                        lists.push((byte, list));
                    }
                }
                Step::Truncate(i, l) if count > 0 => {
                    let list = &mut lists[i % count].1;
                    let l = l % (list.len() + 1);
                    list.truncate(l);
                }
                _ => {}
            }
            for (byte, list) in &lists {
                let mut clean = true;
                list.for_each_chunk(0, list.len(), &mut |b| clean &= b.iter().all(|x| x == byte))
                    .unwrap();
                prop_assert!(clean, "a list's memory was given to another");
            }
        }
        lists.clear();
        prop_assert_eq!(pool.available(), pool.capacity());
    }
}
