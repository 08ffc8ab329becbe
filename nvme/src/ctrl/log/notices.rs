//! The Reservation Notification log page (LID 80h): a queue of pages, one per notification.

use std::collections::VecDeque;

use zerocopy::FromZeros;
use zerocopy::little_endian::{U32, U64};

use crate::spec::ReservationNotificationLog;
use crate::subsys::reservation::NoticeKind;

/// Pages kept: the one to read and as many behind it as Number of Available Log Pages can say.
/// What comes when the queue is full is lost, and the last page has its count, so that the gap tells
/// the host (NVMe Base 2.1, section 5.1.12.1.32).
pub(crate) const NOTICES_MAX: usize = 256;

#[derive(Clone, Copy, Debug)]
struct Notice {
    count: u64,
    kind: NoticeKind,
    nsid: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Notices {
    queue: VecDeque<Notice>,
    /// Log Page Count of the last notification.
    count: u64,
}

impl Notices {
    pub(crate) fn push(&mut self, nsid: u32, kind: NoticeKind) {
        self.count += 1;
        if self.queue.len() < NOTICES_MAX {
            self.queue.push_back(Notice { count: self.count, kind, nsid });
        } else if let Some(last) = self.queue.back_mut() {
            last.count = self.count;
        }
    }

    /// The oldest page; an empty one if there is none.
    pub(crate) fn page(&self) -> ReservationNotificationLog {
        let mut page = ReservationNotificationLog::new_zeroed();
        if let Some(notice) = self.queue.front() {
            page.count = U64::new(notice.count);
            page.kind = notice.kind as u8;
            page.available = u8::try_from(self.queue.len() - 1).unwrap_or(u8::MAX);
            page.nsid = U32::new(notice.nsid);
        }
        page
    }

    /// The oldest page was read; whether there is another.
    pub(crate) fn pop(&mut self) -> bool {
        self.queue.pop_front();
        !self.queue.is_empty()
    }

    /// A Controller Level Reset: the count begins again.
    pub(crate) fn reset(&mut self) {
        *self = Notices::default();
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn pages_match_hand_built_bytes_in_order() {
        let mut notices = Notices::default();
        assert_eq!(notices.page().as_bytes(), [0; 64]);
        notices.push(0x0102, NoticeKind::RegistrationPreempted);
        notices.push(7, NoticeKind::ReservationPreempted);
        let first = notices.page();
        let head = [1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 2, 1, 0, 0];
        assert_eq!(first.as_bytes()[..16], head);
        assert_eq!(first.as_bytes()[16..], [0; 48]);
        assert!(notices.pop());
        assert_eq!(notices.page().as_bytes()[..13], [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 7]);
        assert!(!notices.pop() && !notices.pop());
        assert_eq!(notices.page().as_bytes(), [0; 64]);
    }

    #[test]
    fn the_queue_is_bounded_and_gaps_show() {
        let mut notices = Notices::default();
        for nsid in 1..=300 {
            notices.push(nsid, NoticeKind::ReservationReleased);
        }
        assert_eq!(notices.page().available, 255);
        let mut counts = vec![notices.page().count.get()];
        while notices.pop() {
            counts.push(notices.page().count.get());
        }
        let expected = (1..NOTICES_MAX as u64).chain([300]);
        assert!(counts.into_iter().eq(expected), "the last page counts what was lost");
        notices.push(1, NoticeKind::ReservationReleased);
        assert_eq!(notices.page().count.get(), 301);
    }
}
