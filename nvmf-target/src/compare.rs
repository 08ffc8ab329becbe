//! Comparing two buffers without trusting either to hold still.

use iobuf::{OutOfBounds, SgList};

/// Bytes looked at in one go: what lies on the stack, twice.
const CHUNK: usize = 4096;

/// Whether `len` bytes of `a` from `at_a` equal those of `b` from `at_b`.
///
/// # Errors
/// A buffer is shorter than that.
pub(crate) fn is_equal(
    a: &SgList,
    at_a: usize,
    b: &SgList,
    at_b: usize,
    len: usize,
) -> Result<bool, OutOfBounds> {
    let (mut left, mut right) = ([0; CHUNK], [0; CHUNK]);
    let mut done = 0;
    while done < len {
        let part = CHUNK.min(len - done);
        a.copy_to_slice(at_a + done, &mut left[..part])?;
        b.copy_to_slice(at_b + done, &mut right[..part])?;
        if left[..part] != right[..part] {
            return Ok(false);
        }
        done += part;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use iobuf::Pool;

    use super::*;

    #[test]
    fn every_byte_counts_and_none_outside() {
        let pool = Pool::new(4 << 20).expect("memory");
        let (mut a, mut b) = (SgList::default(), SgList::default());
        pool.alloc(300_000, &mut a).expect("room");
        pool.alloc(200_000, &mut b).expect("room");
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        a.copy_from_slice(50_000, &bytes).expect("inside");
        b.copy_from_slice(0, &bytes).expect("inside");
        assert_eq!(is_equal(&a, 50_000, &b, 0, 200_000), Ok(true));
        for at in [0, 4095, 4096, 131_071, 199_999] {
            b.copy_from_slice(at, &[!bytes[at]]).expect("inside");
            assert_eq!(is_equal(&a, 50_000, &b, 0, 200_000), Ok(false), "byte {at}");
            assert_eq!(is_equal(&a, 50_000, &b, 0, at), Ok(true), "before byte {at}");
            b.copy_from_slice(at, &bytes[at..=at]).expect("inside");
        }
        assert_eq!(is_equal(&a, 50_000, &b, 0, 200_001), Err(OutOfBounds));
    }
}
