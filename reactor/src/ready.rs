//! Which of many have something to do.

use std::cell::RefCell;

/// A set of small numbers: of the streams of a task, say, those that are to be looked at. Streams
/// put themselves in ([`Stream::mark_in`](crate::net::Stream::mark_in)), so that a task with
/// thousands of idle ones does not ask each of them in every turn.
///
/// ```
/// use reactor::Ready;
/// let ready = Ready::default();
/// ready.mark(70);
/// ready.mark(3);
/// assert_eq!(ready.next_from(0), Some(3));
/// assert_eq!(ready.next_from(4), Some(70));
/// ready.clear(70);
/// assert_eq!(ready.next_from(4), None);
/// ```
#[derive(Debug, Default)]
pub struct Ready(RefCell<Vec<u64>>);

impl Ready {
    /// Puts a number in. The memory is that of the largest number ever put in, in bits.
    #[inline]
    pub fn mark(&self, index: u32) {
        let (word, bit) = (index as usize / 64, index % 64);
        let mut words = self.0.borrow_mut();
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        words[word] |= 1 << bit;
    }

    /// Takes a number out.
    #[inline]
    pub fn clear(&self, index: u32) {
        if let Some(word) = self.0.borrow_mut().get_mut(index as usize / 64) {
            *word &= !(1 << (index % 64));
        }
    }

    /// The least number that is in and not below `from`.
    #[inline]
    pub fn next_from(&self, from: u32) -> Option<u32> {
        let words = self.0.borrow();
        let mut at = from as usize / 64;
        let mut word = words.get(at)? & u64::MAX << (from % 64);
        while word == 0 {
            at += 1;
            word = *words.get(at)?;
        }
        Some(at as u32 * 64 + word.trailing_zeros())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_out_in_order_once_they_are_in() {
        let ready = Ready::default();
        let numbers = [0, 1, 63, 64, 65, 127, 128, 1000, 4096];
        for number in numbers.iter().rev() {
            ready.mark(*number);
            ready.mark(*number);
        }
        let all = || {
            let mut from = 0;
            std::iter::from_fn(|| {
                let next = ready.next_from(from)?;
                from = next + 1;
                Some(next)
            })
            .collect::<Vec<_>>()
        };
        assert_eq!(all(), numbers);
        for number in [0, 64, 4096, 9999] {
            ready.clear(number);
        }
        assert_eq!(all(), [1, 63, 65, 127, 128, 1000]);
        assert_eq!(ready.next_from(u32::MAX), None);
    }
}
