//! A log of the guest pages that a device has written to, for live migration.
//!
//! Shared by the control thread, which reports and clears it, and the cores, which mark it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes of bitmaps in one log. Enough for 1 TiB of guest memory in pages of 4 KiB; a page of
/// a larger memory is larger.
pub const BITMAP_BYTES_MAX: u64 = 32 << 20;
/// Smallest page.
pub const PAGE_BYTES_MIN: u64 = 4096;

/// One range of guest addresses.
#[derive(Debug)]
struct Range {
    start: u64,
    /// Last address, so that a range may end with the address space.
    last: u64,
    /// One bit per page.
    words: Box<[AtomicU64]>,
}

/// Which pages of some ranges of guest addresses have been written to.
#[derive(Debug)]
pub struct DirtyLog {
    page_shift: u32,
    /// By ascending address, no overlap.
    ranges: Box<[Range]>,
}

/// Why a log cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLog {
    /// No bytes, or beyond the end of the address space.
    #[error("range of {len_bytes} bytes at {start:#x} cannot be logged")]
    Range {
        /// First address.
        start: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Two ranges overlap.
    #[error("ranges to log overlap at {0:#x}")]
    Overlap(u64),
}

impl DirtyLog {
    /// Log `ranges` (start and length in bytes) in pages of `page_bytes`, or larger ones where
    /// that would take too much memory. A page size that is no power of two is rounded up.
    pub fn new(page_bytes: u64, ranges: &[(u64, u64)]) -> Result<DirtyLog, BadLog> {
        let mut sorted = Vec::with_capacity(ranges.len());
        for &(start, len_bytes) in ranges {
            let last = len_bytes.checked_sub(1).and_then(|more| start.checked_add(more));
            sorted.push((start, last.ok_or(BadLog::Range { start, len_bytes })?));
        }
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[1].0 <= pair[0].1) {
            return Err(BadLog::Overlap(pair[1].0));
        }
        let smallest = page_bytes.clamp(PAGE_BYTES_MIN, 1 << 62).next_power_of_two();
        let mut page_shift = smallest.trailing_zeros();
        let words = |(start, last): &(u64, u64), shift: u32| ((last - start) >> shift) / 64 + 1;
        // The sum cannot overflow: ranges do not overlap, so it is less than 2^52 + their number.
        while sorted.iter().map(|range| words(range, page_shift)).sum::<u64>()
            > BITMAP_BYTES_MAX / 8 + sorted.len() as u64
        {
            page_shift += 1;
        }
        let ranges = sorted.iter().map(|range| Range {
            start: range.0,
            last: range.1,
            words: (0..words(range, page_shift)).map(|_| AtomicU64::new(0)).collect(),
        });
        Ok(DirtyLog { page_shift, ranges: ranges.collect() })
    }

    /// Bytes in a page of this log.
    pub fn page_bytes(&self) -> u64 {
        1 << self.page_shift
    }

    /// The device has written `len_bytes` bytes at `addr`. What lies in no range is not logged.
    pub fn mark(&self, addr: u64, len_bytes: u64) {
        let Some(last) = len_bytes.checked_sub(1).map(|more| addr.saturating_add(more)) else {
            return;
        };
        let first_range = self.ranges.partition_point(|range| range.last < addr);
        for range in &self.ranges[first_range..] {
            if range.start > last {
                break;
            }
            let from = (addr.max(range.start) - range.start) >> self.page_shift;
            let to = (last.min(range.last) - range.start) >> self.page_shift;
            for word in from / 64..=to / 64 {
                let low = if word == from / 64 { from % 64 } else { 0 };
                let high = if word == to / 64 { to % 64 } else { 63 };
                let bits = (u64::MAX >> (63 - high)) & (u64::MAX << low);
                // Release: who takes the bit also sees what was written to the page before. To load
                // first and leave a set bit alone would be wrong: it could be taken, and the page
                // read, before the write is seen.
                range.words[word as usize].fetch_or(bits, Ordering::Release);
            }
        }
    }

    /// Take the marks of the pages that `len_bytes` bytes at `addr` touch: calls `dirty` with
    /// address and length of each page that was marked. The mark is gone afterwards.
    pub fn take(&self, addr: u64, len_bytes: u64, mut dirty: impl FnMut(u64, u64)) {
        let Some(last) = len_bytes.checked_sub(1).map(|more| addr.saturating_add(more)) else {
            return;
        };
        let first_range = self.ranges.partition_point(|range| range.last < addr);
        for range in &self.ranges[first_range..] {
            if range.start > last {
                break;
            }
            let from = (addr.max(range.start) - range.start) >> self.page_shift;
            let to = (last.min(range.last) - range.start) >> self.page_shift;
            for index in from / 64..=to / 64 {
                let low = if index == from / 64 { from % 64 } else { 0 };
                let high = if index == to / 64 { to % 64 } else { 63 };
                let bits = (u64::MAX >> (63 - high)) & (u64::MAX << low);
                let word = &range.words[index as usize];
                if word.load(Ordering::Relaxed) & bits == 0 {
                    continue;
                }
                // Acquire: pairs with the release of `mark`.
                let mut taken = word.fetch_and(!bits, Ordering::Acquire) & bits;
                while taken != 0 {
                    let bit = u64::from(taken.trailing_zeros());
                    taken &= taken - 1;
                    let start = range.start + ((index * 64 + bit) << self.page_shift);
                    dirty(start, (range.last - start).min(self.page_bytes() - 1) + 1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn taken(log: &DirtyLog, addr: u64, len_bytes: u64) -> Vec<(u64, u64)> {
        let mut pages = Vec::new();
        log.take(addr, len_bytes, |start, len| pages.push((start, len)));
        pages
    }

    #[test]
    fn a_mark_is_taken_once_and_only_where_it_was_asked_for() {
        let log = DirtyLog::new(4096, &[(0x10_0000, 0x10_0000)]).unwrap();
        log.mark(0x10_0fff, 2);
        assert_eq!(taken(&log, 0x10_1000, 0x1000), [(0x10_1000, 4096)]);
        assert_eq!(taken(&log, 0x10_0000, 0x10_0000), [(0x10_0000, 4096)]);
        assert_eq!(taken(&log, 0, u64::MAX), []);
    }

    #[test]
    fn what_lies_outside_is_not_logged_and_does_no_harm() {
        let log = DirtyLog::new(4096, &[(0x2000, 0x1000), (u64::MAX - 0xfff, 0x1000)]).unwrap();
        log.mark(0, 0x2000);
        log.mark(0x3000, u64::MAX);
        log.mark(7, 0);
        assert_eq!(taken(&log, 0, u64::MAX), [(u64::MAX - 0xfff, 4096)]);
    }

    #[test]
    fn pages_grow_with_the_memory_so_that_the_bitmap_does_not() {
        let log = DirtyLog::new(4096, &[(0, u64::MAX)]).unwrap();
        let words: usize = log.ranges.iter().map(|range| range.words.len()).sum();
        assert!(words as u64 * 8 <= BITMAP_BYTES_MAX + 8);
        assert!(log.page_bytes() > 4096);
        log.mark(1 << 50, 1);
        assert_eq!(taken(&log, 0, u64::MAX), [(1 << 50, log.page_bytes())]);
        // A strange page size is not an error: the device says which it took.
        assert_eq!(DirtyLog::new(0, &[(0, 1)]).unwrap().page_bytes(), 4096);
        assert_eq!(DirtyLog::new(5000, &[(0, 1)]).unwrap().page_bytes(), 8192);
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        assert_eq!(
            DirtyLog::new(4096, &[(5, 0)]).unwrap_err(),
            BadLog::Range { start: 5, len_bytes: 0 }
        );
        assert_eq!(
            DirtyLog::new(4096, &[(u64::MAX, 2)]).unwrap_err(),
            BadLog::Range { start: u64::MAX, len_bytes: 2 }
        );
        assert_eq!(DirtyLog::new(4096, &[(0, 10), (9, 1)]).unwrap_err(), BadLog::Overlap(9));
    }

    proptest! {
        #[test]
        fn the_log_is_the_set_of_pages_written_to(
            marks in proptest::collection::vec((0u64..0x60_0000, 0u64..0x8000), 0..40),
            asked in (0u64..0x60_0000, 1u64..0x60_0000),
        ) {
            let ranges = [(0x10_0000u64, 0x10_0000u64), (0x30_0000, 0x5000), (0x40_0000, 0x10_0000)];
            let log = DirtyLog::new(4096, &ranges).unwrap();
            let mut model = BTreeSet::new();
            let is_logged = |page: u64| ranges.iter().any(|r| page >= r.0 && page < r.0 + r.1);
            for (addr, len) in marks {
                log.mark(addr, len);
                if len > 0 {
                    let pages = addr / 4096..=(addr + len - 1) / 4096;
                    model.extend(pages.map(|page| page * 4096).filter(|page| is_logged(*page)));
                }
            }
            let inside = asked.0 / 4096 * 4096..asked.0 + asked.1;
            let expected: Vec<(u64, u64)> =
                model.range(inside.clone()).map(|page| (*page, 4096)).collect();
            prop_assert_eq!(taken(&log, asked.0, asked.1), expected);
            model.retain(|page| !inside.contains(page));
            let rest: Vec<u64> = taken(&log, 0, u64::MAX).iter().map(|page| page.0).collect();
            prop_assert_eq!(rest, model.into_iter().collect::<Vec<_>>());
        }
    }
}
