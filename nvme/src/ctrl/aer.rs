//! Asynchronous events: held requests, raised events, masking until the log page is read.
//!
//! "Once an event of a type is reported, further ones are masked until the host clears it by
//! reading the log page with Retain Asynchronous Event cleared" (NVMe Base 2.0, "Asynchronous
//! Event Request command").

use std::collections::VecDeque;

use super::AER_MAX;
use crate::spec::{CHANGED_NAMESPACES_MAX, IdentifyController, LogPage, NSID_ALL, Status, event};
use crate::subsys::SubsystemInfo;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Event {
    /// Nothing to tell.
    #[default]
    Idle,
    /// To be told with the next request.
    Raised,
    /// Told; masked until the log page is read.
    Reported,
}

#[derive(Clone, Copy)]
struct Held {
    slot: u16,
    cid: u16,
}

impl core::fmt::Debug for Held {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "slot {} cid {:#x}", self.slot, self.cid)
    }
}

#[derive(Debug, Default)]
pub(crate) struct AsyncEvents {
    held: VecDeque<Held>,
    /// Requests ended without an event (abort, reset); at most `AER_MAX`, drained by `poll`.
    ended: VecDeque<u16>,
    namespaces: Event,
    discovery: Event,
    /// Changed Namespace List: ascending, unique.
    changed: Vec<u32>,
    /// More changed than the list holds.
    overflowed: bool,
}

impl AsyncEvents {
    /// Takes an Asynchronous Event Request; it is completed through `poll`.
    pub(crate) fn hold(&mut self, slot: u16, cid: u16) -> Result<(), Status> {
        if self.held.len() + self.ended.len() >= AER_MAX {
            return Err(Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED.dnr());
        }
        self.held.push_back(Held { slot, cid });
        Ok(())
    }

    /// Aborts the held request with this command identifier; false if there is none.
    pub(crate) fn abort(&mut self, cid: u16) -> bool {
        let Some(at) = self.held.iter().position(|held| held.cid == cid) else { return false };
        self.ended.extend(self.held.remove(at).map(|held| held.slot));
        true
    }

    /// Namespaces changed. `enabled` is the Asynchronous Event Configuration.
    pub(crate) fn namespaces_changed(&mut self, nsids: &[u32], enabled: u32) {
        for &nsid in nsids {
            if let Err(at) = self.changed.binary_search(&nsid) {
                self.changed.insert(at, nsid);
            }
        }
        if self.changed.len() > CHANGED_NAMESPACES_MAX {
            self.changed.clear();
            self.overflowed = true;
        }
        if self.overflowed {
            self.changed.clear();
        }
        if enabled & IdentifyController::OAES_NAMESPACE_ATTRIBUTE != 0
            && self.namespaces == Event::Idle
        {
            self.namespaces = Event::Raised;
        }
    }

    pub(crate) fn discovery_changed(&mut self, enabled: u32) {
        if enabled & IdentifyController::OAES_DISCOVERY_LOG != 0 && self.discovery == Event::Idle {
            self.discovery = Event::Raised;
        }
    }

    /// The Changed Namespace List as it is read now: "If more than 1,024 namespaces changed, the
    /// first entry is FFFFFFFFh and the rest zero".
    pub(crate) fn changed_list(&self) -> Vec<u32> {
        if self.overflowed { vec![NSID_ALL] } else { self.changed.clone() }
    }

    /// A log page was read without Retain Asynchronous Event.
    pub(crate) fn log_read(&mut self, lid: LogPage) {
        match lid {
            LogPage::CHANGED_NAMESPACES => {
                self.namespaces = Event::Idle;
                self.changed.clear();
                self.overflowed = false;
            }
            LogPage::DISCOVERY => self.discovery = Event::Idle,
            _ => {}
        }
    }

    pub(crate) fn poll(&mut self) -> Option<(u16, Status, u64)> {
        if let Some(slot) = self.ended.pop_front() {
            return Some((slot, Status::COMMAND_ABORT_REQUESTED, 0));
        }
        let (info, lid) = if self.namespaces == Event::Raised {
            (event::NOTICE_NAMESPACE_ATTRIBUTE, LogPage::CHANGED_NAMESPACES)
        } else if self.discovery == Event::Raised {
            (event::NOTICE_DISCOVERY_LOG, LogPage::DISCOVERY)
        } else {
            return None;
        };
        let held = self.held.pop_front()?;
        match lid {
            LogPage::DISCOVERY => self.discovery = Event::Reported,
            _ => self.namespaces = Event::Reported,
        }
        Some((held.slot, Status::SUCCESS, u64::from(event::dw0(event::TYPE_NOTICE, info, lid.0))))
    }

    /// Controller reset or shutdown: held requests end, events are forgotten.
    pub(crate) fn reset(&mut self) {
        let held = self.held.drain(..).map(|held| held.slot);
        self.ended.extend(held);
        self.namespaces = Event::Idle;
        self.discovery = Event::Idle;
        self.changed.clear();
        self.overflowed = false;
    }
}

/// Namespaces that came, went, or look different to a host, ascending.
pub(crate) fn changed_namespaces(old: &SubsystemInfo, new: &SubsystemInfo) -> Vec<u32> {
    let mut changed: Vec<u32> = Vec::new();
    for ns in old.namespaces() {
        let same = new.namespace(ns.nsid).is_some_and(|new_ns| {
            // Utilization changes by itself and is not an attribute.
            let mut new_ns = new_ns.clone();
            new_ns.used_bytes = ns.used_bytes;
            new_ns == *ns
        });
        if !same {
            changed.push(ns.nsid);
        }
    }
    let added = new.namespaces().iter().filter(|ns| old.namespace(ns.nsid).is_none());
    changed.extend(added.map(|ns| ns.nsid));
    changed.sort_unstable();
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subsys::tests::sample;

    const NS: u32 = IdentifyController::OAES_NAMESPACE_ATTRIBUTE;

    #[test]
    fn one_event_until_the_log_is_read() {
        let mut events = AsyncEvents::default();
        events.namespaces_changed(&[3], NS);
        assert_eq!(events.poll(), None, "no request is held");
        events.hold(7, 0x70).unwrap();
        events.hold(8, 0x80).unwrap();
        assert_eq!(events.poll(), Some((7, Status::SUCCESS, 0x0004_0002)));
        events.namespaces_changed(&[1, 3], NS);
        assert_eq!(events.poll(), None, "masked");
        assert_eq!(events.changed_list(), [1, 3]);
        events.log_read(LogPage::CHANGED_NAMESPACES);
        assert_eq!(events.changed_list(), []);
        assert_eq!(events.poll(), None);
        events.namespaces_changed(&[2], NS);
        assert_eq!(events.poll(), Some((8, Status::SUCCESS, 0x0004_0002)));
    }

    #[test]
    fn disabled_events_are_not_sent_but_listed() {
        let mut events = AsyncEvents::default();
        events.hold(0, 0).unwrap();
        events.namespaces_changed(&[3], 0);
        events.discovery_changed(0);
        assert_eq!(events.poll(), None);
        assert_eq!(events.changed_list(), [3]);
        events.discovery_changed(IdentifyController::OAES_DISCOVERY_LOG);
        assert_eq!(events.poll(), Some((0, Status::SUCCESS, 0x0070_f002)));
    }

    #[test]
    fn requests_are_bounded_abortable_and_end_at_reset() {
        let mut events = AsyncEvents::default();
        for slot in 0..AER_MAX as u16 {
            events.hold(slot, slot + 100).unwrap();
        }
        let limit = Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED.dnr();
        assert_eq!(events.hold(9, 109), Err(limit));
        assert!(!events.abort(99));
        assert!(events.abort(101));
        assert_eq!(events.hold(9, 109), Err(limit), "its completion is still due");
        assert_eq!(events.poll(), Some((1, Status::COMMAND_ABORT_REQUESTED, 0)));
        events.reset();
        let slots: Vec<u16> =
            core::iter::from_fn(|| events.poll()).map(|(slot, ..)| slot).collect();
        assert_eq!(slots, [0, 2, 3]);
    }

    #[test]
    fn a_list_that_overflows_says_so() {
        let mut events = AsyncEvents::default();
        let many: Vec<u32> = (1..=1024).collect();
        events.namespaces_changed(&many, NS);
        assert_eq!(events.changed_list(), many);
        events.namespaces_changed(&[2000], NS);
        events.namespaces_changed(&[5], NS);
        assert_eq!(events.changed_list(), [NSID_ALL]);
    }

    #[test]
    fn differences() {
        let old = sample();
        let mut list = old.namespaces().to_vec();
        list[0].used_bytes = Some(1);
        let mut new = old.with_namespaces(list.clone()).unwrap();
        assert_eq!(changed_namespaces(&old, &new), []);
        list[0].blocks += 8;
        list[2].nsid = 2;
        new = old.with_namespaces(list).unwrap();
        assert_eq!(changed_namespaces(&old, &new), [1, 2, 9]);
    }
}
