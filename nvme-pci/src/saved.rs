//! A device's queues as bytes, for another machine.

use crate::record::{CqRecord, ENTRIES_MAX, QUEUES_MAX, RecordView, SqRecord};

/// A part of a saved state, which begins with its length, and what follows it.
pub(crate) fn part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*len) as usize)
}

/// The queues of a record, with doorbells and commands that were taken, as a list of numbers and
/// entries.
pub(crate) fn save_queues(record: &RecordView) -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |values: &[u64]| {
        values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
    };
    let (shadow, event_idx) = record.shadow().unwrap_or((u64::MAX, u64::MAX));
    put(&[shadow, event_idx]);
    for qid in 0..QUEUES_MAX {
        if let Some(cq) = record.cq(qid) {
            let vector = cq.vector.map_or(u64::MAX, u64::from);
            let (entries, kind) = (u64::from(cq.entries), u64::from(cq.is_contiguous));
            let head = u64::from(record.doorbell(qid, true));
            put(&[1, u64::from(qid), cq.address, entries, kind, vector, cq.tail, head]);
        }
    }
    for qid in 0..QUEUES_MAX {
        if let Some(sq) = record.sq(qid) {
            let (entries, kind) = (u64::from(sq.entries), u64::from(sq.is_contiguous));
            let tail = u64::from(record.doorbell(qid, false));
            let cqid = u64::from(sq.cqid);
            put(&[2, u64::from(qid), sq.address, entries, kind, cqid, sq.fetched, tail]);
        }
        for slot in 0..ENTRIES_MAX {
            // Completed ones are in the completion queue: the device is stopped.
            if let Some(saved) = record.slot(qid, slot).filter(|saved| saved.post == 0) {
                let words = saved.sqe.as_chunks::<8>().0;
                let mut values = vec![3, u64::from(qid), u64::from(slot), saved.seq];
                values.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
                put(&values);
            }
        }
    }
    out
}

/// Puts what [`save_queues`] gave into an empty record; `None` if it did not.
pub(crate) fn restore_queues(record: &RecordView, bytes: &[u8]) -> Option<()> {
    let (words, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return None;
    }
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let [shadow, event_idx, ref rest @ ..] = words[..] else { return None };
    if shadow != u64::MAX {
        record.set_shadow(Some((shadow, event_idx)));
    }
    let mut rest = rest;
    while let [kind, qid, more @ ..] = rest {
        let qid = u16::try_from(*qid).ok().filter(|qid| *qid < QUEUES_MAX)?;
        rest = match *kind {
            1 | 2 => {
                let [address, entries, contiguous, other, count, doorbell, more @ ..] = more else {
                    return None;
                };
                let entries = u16::try_from(*entries).ok().filter(|entries| *entries >= 2)?;
                let is_contiguous = *contiguous != 0;
                if *kind == 1 {
                    let vector = match *other {
                        u64::MAX => None,
                        vector => Some(u16::try_from(vector).ok()?),
                    };
                    let (address, tail) = (*address, *count);
                    let cq = CqRecord { address, entries, is_contiguous, vector, tail };
                    record.set_cq(qid, Some(&cq));
                } else {
                    let cqid = u16::try_from(*other).ok().filter(|cqid| *cqid < QUEUES_MAX)?;
                    let (address, fetched) = (*address, *count);
                    let sq = SqRecord { address, entries, is_contiguous, cqid, fetched };
                    record.set_sq(qid, Some(&sq));
                }
                record.ring(qid, *kind == 1, u32::try_from(*doorbell).ok()?);
                more
            }
            3 => {
                let [slot, seq, more @ ..] = more else { return None };
                let (sqe, more) = more.split_first_chunk::<8>()?;
                let slot = u16::try_from(*slot).ok()?;
                let sq = record.sq(qid)?;
                if slot >= ENTRIES_MAX || *seq == 0 || *seq > sq.fetched {
                    return None;
                }
                let mut bytes = [0; 64];
                for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(sqe) {
                    *to = word.to_le_bytes();
                }
                let fetched = sq.fetched;
                record.take(qid, slot, &bytes, *seq);
                record.set_fetched(qid, fetched);
                more
            }
            _ => return None,
        };
    }
    Some(())
}
