//! Asynchronous events: held requests, raised events, masking until the log page is read.
//!
//! "Once an event of a type is reported, further ones are masked until the host clears it by
//! reading the log page with Retain Asynchronous Event cleared" (NVMe Base 2.0, "Asynchronous
//! Event Request command"). Each information of a type is masked by itself, so that a host that is
//! slow with one log page does not miss the others.
//!
//! ```text
//!   Idle ──raise──► Raised ──poll, a request is held──► Reported ──log read, RAE clear──► Idle
//!                     ▲                                    │
//!                     └── log read, but it says more than the host has seen ──┘
//! ```

use std::collections::VecDeque;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::AER_MAX;
use crate::spec::{
    CHANGED_NAMESPACES_MAX, IdentifyController, LogPage, NSID_ALL, Status, critical_warning, event,
};
use crate::subsys::SubsystemInfo;

/// What can be reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Error: Write to Invalid Doorbell Register.
    DoorbellRegister,
    /// Error: Invalid Doorbell Write Value.
    DoorbellValue,
    /// Error: Persistent Internal Error.
    PersistentError,
    /// Error: Transient Internal Error.
    TransientError,
    /// SMART: NVM Subsystem Reliability.
    Reliability,
    /// SMART: Temperature Threshold.
    Temperature,
    /// SMART: Spare Below Threshold.
    Spare,
    /// I/O command set: Reservation Log Page Available.
    ReservationLog,
    /// Notice: Asymmetric Namespace Access Change.
    Ana,
    /// Notice: Namespace Attribute Changed.
    Namespaces,
    /// Notice: Discovery Log Page Change.
    Discovery,
}

/// All of them, in the order in which they are reported.
pub(crate) const KINDS: [Kind; 11] = [
    Kind::DoorbellRegister,
    Kind::DoorbellValue,
    Kind::PersistentError,
    Kind::TransientError,
    Kind::Reliability,
    Kind::Temperature,
    Kind::Spare,
    Kind::ReservationLog,
    Kind::Ana,
    Kind::Namespaces,
    Kind::Discovery,
];

impl Kind {
    /// Event type and information.
    pub(crate) fn code(self) -> (u32, u32) {
        match self {
            Kind::DoorbellRegister => (event::TYPE_ERROR, event::ERROR_DOORBELL_REGISTER),
            Kind::DoorbellValue => (event::TYPE_ERROR, event::ERROR_DOORBELL_VALUE),
            Kind::PersistentError => (event::TYPE_ERROR, event::ERROR_PERSISTENT),
            Kind::TransientError => (event::TYPE_ERROR, event::ERROR_TRANSIENT),
            Kind::Reliability => (event::TYPE_SMART, event::SMART_RELIABILITY),
            Kind::Temperature => (event::TYPE_SMART, event::SMART_TEMPERATURE),
            Kind::Spare => (event::TYPE_SMART, event::SMART_SPARE),
            Kind::ReservationLog => (event::TYPE_IO_COMMAND, event::IO_COMMAND_RESERVATION_LOG),
            Kind::Ana => (event::TYPE_NOTICE, event::NOTICE_ANA),
            Kind::Namespaces => (event::TYPE_NOTICE, event::NOTICE_NAMESPACE_ATTRIBUTE),
            Kind::Discovery => (event::TYPE_NOTICE, event::NOTICE_DISCOVERY_LOG),
        }
    }

    /// The log page that tells more and whose reading clears the event.
    pub(crate) fn log_page(self) -> LogPage {
        match self {
            Kind::DoorbellRegister
            | Kind::DoorbellValue
            | Kind::PersistentError
            | Kind::TransientError => LogPage::ERROR_INFORMATION,
            Kind::Reliability | Kind::Temperature | Kind::Spare => LogPage::SMART,
            Kind::ReservationLog => LogPage::RESERVATION_NOTIFICATION,
            Kind::Ana => LogPage::ANA,
            Kind::Namespaces => LogPage::CHANGED_NAMESPACES,
            Kind::Discovery => LogPage::DISCOVERY,
        }
    }

    /// Bits of the Asynchronous Event Configuration, any of which enables it; 0: always enabled
    /// (reservation notices have a feature of their own, the Reservation Notification Mask).
    fn enabled_by(self) -> u32 {
        match self {
            Kind::DoorbellRegister
            | Kind::DoorbellValue
            | Kind::PersistentError
            | Kind::TransientError
            | Kind::ReservationLog => 0,
            Kind::Reliability => u32::from(critical_warning::RELIABILITY),
            Kind::Temperature => u32::from(critical_warning::TEMPERATURE),
            Kind::Spare => u32::from(critical_warning::SPARE),
            Kind::Ana => IdentifyController::OAES_ANA,
            Kind::Namespaces => IdentifyController::OAES_NAMESPACE_ATTRIBUTE,
            Kind::Discovery => IdentifyController::OAES_DISCOVERY_LOG,
        }
    }
}

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

/// Events as they are saved.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SavedEvents {
    config: U32,
    warning: u8,
    events: [u8; KINDS.len()],
}

#[derive(Debug, Default)]
pub(crate) struct AsyncEvents {
    held: VecDeque<Held>,
    /// Requests ended without an event (abort, reset); at most `AER_MAX`, drained by `poll`.
    ended: VecDeque<u16>,
    /// By [`Kind`].
    events: [Event; KINDS.len()],
    /// Asynchronous Event Configuration (feature 0Bh) in force.
    config: u32,
    /// Critical Warning bits as they were last.
    warning: u8,
    /// Changed Namespace List: ascending, unique.
    changed: Vec<u32>,
    /// More changed than the list holds.
    overflowed: bool,
    /// Version (generation counter, change count) of the ANA and discovery log pages whose head
    /// the host has read last.
    seen: [Option<u64>; 2],
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

    /// The Asynchronous Event Configuration.
    pub(crate) fn config(&self) -> u32 {
        self.config
    }

    /// Sets the Asynchronous Event Configuration. A critical warning that is there already is told
    /// as soon as its bit is enabled.
    pub(crate) fn configure(&mut self, config: u32) {
        let newly_enabled = config & !self.config;
        self.config = config;
        self.warn(self.warning & newly_enabled as u8);
    }

    /// Something happened; nothing is told if the host did not enable it.
    pub(crate) fn raise(&mut self, kind: Kind) {
        let is_enabled = kind.enabled_by() == 0 || self.config & kind.enabled_by() != 0;
        let event = &mut self.events[kind as usize];
        if is_enabled && *event == Event::Idle {
            *event = Event::Raised;
        }
    }

    /// The Critical Warning bits are these now. Only what is new is told.
    pub(crate) fn critical_warning(&mut self, warning: u8) {
        let new = warning & !self.warning;
        self.warning = warning;
        self.warn(new & self.config as u8);
    }

    fn warn(&mut self, bits: u8) {
        for kind in [Kind::Reliability, Kind::Temperature, Kind::Spare] {
            if u32::from(bits) & kind.enabled_by() != 0 {
                self.raise(kind);
            }
        }
    }

    /// Namespaces changed.
    pub(crate) fn namespaces_changed(&mut self, nsids: &[u32]) {
        for &nsid in nsids {
            if let Err(at) = self.changed.binary_search(&nsid) {
                self.changed.insert(at, nsid);
            }
        }
        if self.changed.len() > CHANGED_NAMESPACES_MAX {
            self.overflowed = true;
        }
        if self.overflowed {
            self.changed.clear();
        }
        self.raise(Kind::Namespaces);
    }

    /// Any namespace may have changed.
    pub(crate) fn all_changed(&mut self) {
        self.overflowed = true;
        self.changed.clear();
        self.raise(Kind::Namespaces);
    }

    /// The Changed Namespace List as it is read now: "If more than 1,024 namespaces changed, the
    /// first entry is FFFFFFFFh and the rest zero".
    pub(crate) fn changed_list(&self) -> Vec<u32> {
        if self.overflowed { vec![NSID_ALL] } else { self.changed.clone() }
    }

    /// The head of a log page of this version was read.
    pub(crate) fn version_read(&mut self, lid: LogPage, version: u64) {
        if let Some(seen) = seen_index(lid) {
            self.seen[seen] = Some(version);
        }
    }

    /// A log page was read without Retain Asynchronous Event. `version` is that of the page now,
    /// for those that have one; `has_more` says that there is another page to read.
    pub(crate) fn log_read(&mut self, lid: LogPage, version: u64, has_more: bool) {
        // Hosts read long pages in pieces, and say only with the last one that they are done. If
        // the page has changed since they read its head, they have to be told again.
        let is_stale = seen_index(lid).is_some_and(|seen| self.seen[seen] != Some(version));
        for kind in KINDS.into_iter().filter(|kind| kind.log_page() == lid) {
            let was_told = core::mem::take(&mut self.events[kind as usize]) != Event::Idle;
            if was_told && (is_stale || has_more) {
                self.raise(kind);
            }
        }
        if lid == LogPage::CHANGED_NAMESPACES {
            self.changed.clear();
            self.overflowed = false;
        }
    }

    pub(crate) fn poll(&mut self) -> Option<(u16, Status, u64)> {
        if let Some(slot) = self.ended.pop_front() {
            return Some((slot, Status::COMMAND_ABORT_REQUESTED, 0));
        }
        let kind = KINDS.into_iter().find(|&kind| self.events[kind as usize] == Event::Raised)?;
        let held = self.held.pop_front()?;
        self.events[kind as usize] = Event::Reported;
        let (event_type, info) = kind.code();
        let dw0 = event::dw0(event_type, info, kind.log_page().0);
        Some((held.slot, Status::SUCCESS, u64::from(dw0)))
    }

    /// What outlives this process. Held requests are the driver's to give again.
    pub(crate) fn save(&self) -> SavedEvents {
        let mut events = [0; KINDS.len()];
        for (to, from) in events.iter_mut().zip(self.events) {
            *to = from as u8;
        }
        SavedEvents { config: U32::new(self.config), warning: self.warning, events }
    }

    /// Takes up what [`AsyncEvents::save`] gave. Which namespaces have changed is not known any
    /// more: if a change was to be told, "all" is.
    pub(crate) fn restore(&mut self, saved: SavedEvents) {
        *self = AsyncEvents {
            config: saved.config.get(),
            warning: saved.warning,
            ..AsyncEvents::default()
        };
        for (to, from) in self.events.iter_mut().zip(saved.events) {
            *to = match from {
                1 => Event::Raised,
                2 => Event::Reported,
                _ => Event::Idle,
            };
        }
        self.overflowed = self.events[Kind::Namespaces as usize] != Event::Idle;
    }

    /// Controller reset or shutdown: held requests end, events are forgotten, and everything is
    /// disabled. What is wrong stays known, to be told when the host enables it.
    pub(crate) fn reset(&mut self) {
        let slots = self.held.drain(..).map(|held| held.slot);
        self.ended.extend(slots);
        let ended = core::mem::take(&mut self.ended);
        *self = AsyncEvents { ended, warning: self.warning, ..AsyncEvents::default() };
    }
}

fn seen_index(lid: LogPage) -> Option<usize> {
    match lid {
        LogPage::ANA => Some(0),
        LogPage::DISCOVERY => Some(1),
        _ => None,
    }
}

/// Namespaces that came, went, or look different to a host, ascending.
pub(crate) fn changed_namespaces(old: &SubsystemInfo, new: &SubsystemInfo) -> Vec<u32> {
    let mut changed: Vec<u32> = Vec::new();
    for ns in old.namespaces() {
        let same = new.namespace(ns.nsid).is_some_and(|new_ns| {
            // Utilization changes by itself and is not an attribute; the ANA group has an event
            // of its own.
            let mut new_ns = new_ns.clone();
            new_ns.used_bytes = ns.used_bytes;
            new_ns.ana_group = ns.ana_group;
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
    const DISCOVERY: u32 = IdentifyController::OAES_DISCOVERY_LOG;

    fn events(config: u32, requests: u16) -> AsyncEvents {
        let mut events = AsyncEvents::default();
        events.configure(config);
        for slot in 0..requests {
            events.hold(slot, slot + 100).unwrap();
        }
        events
    }

    fn told(events: &mut AsyncEvents) -> Vec<u64> {
        core::iter::from_fn(|| events.poll()).map(|(_, _, dw0)| dw0).collect()
    }

    #[test]
    fn one_event_until_the_log_is_read() {
        let mut events = events(NS, 0);
        events.namespaces_changed(&[3]);
        assert_eq!(events.poll(), None, "no request is held");
        events.hold(7, 0x70).unwrap();
        events.hold(8, 0x80).unwrap();
        assert_eq!(events.poll(), Some((7, Status::SUCCESS, 0x0004_0002)));
        events.namespaces_changed(&[1, 3]);
        assert_eq!(events.poll(), None, "masked");
        assert_eq!(events.changed_list(), [1, 3]);
        events.log_read(LogPage::CHANGED_NAMESPACES, 0, false);
        assert_eq!(events.changed_list(), []);
        assert_eq!(events.poll(), None);
        events.namespaces_changed(&[2]);
        assert_eq!(events.poll(), Some((8, Status::SUCCESS, 0x0004_0002)));
    }

    #[test]
    fn every_event_has_its_code_and_log_page() {
        let mut events = events(u32::MAX, 4);
        for kind in KINDS {
            events.raise(kind);
        }
        let mut dw0 = told(&mut events);
        for slot in 0..4 {
            events.hold(slot, slot).unwrap();
        }
        dw0.extend(told(&mut events));
        for slot in 9..12 {
            events.hold(slot, slot).unwrap();
        }
        dw0.extend(told(&mut events));
        assert_eq!(
            dw0,
            [
                0x0001_0000,
                0x0001_0100,
                0x0001_0300,
                0x0001_0400,
                0x0002_0001,
                0x0002_0101,
                0x0002_0201,
                0x0080_0006,
                0x000c_0302,
                0x0004_0002,
                0x0070_f002,
            ]
        );
    }

    #[test]
    fn disabled_events_are_not_sent_but_listed() {
        let mut events = events(0, 1);
        events.namespaces_changed(&[3]);
        events.raise(Kind::Discovery);
        assert_eq!(events.poll(), None);
        assert_eq!(events.changed_list(), [3]);
        events.configure(DISCOVERY);
        events.raise(Kind::Discovery);
        assert_eq!(events.poll(), Some((0, Status::SUCCESS, 0x0070_f002)));
    }

    #[test]
    fn critical_warnings_are_told_by_mask_when_they_appear() {
        let mut events = events(0b0000_1000, 4);
        events.critical_warning(0b0000_0101);
        assert_eq!(told(&mut events), [], "spare and reliability are not enabled");
        events.critical_warning(0b0000_1101);
        assert_eq!(told(&mut events), [0x0002_0001], "media is read-only");
        events.log_read(LogPage::SMART, 0, false);
        events.critical_warning(0b0000_1101);
        assert_eq!(told(&mut events), [], "nothing new");
        events.configure(0b0000_1001);
        assert_eq!(told(&mut events), [0x0002_0201], "enabled while the condition is there");
        events.critical_warning(0);
        events.log_read(LogPage::SMART, 0, false);
        events.critical_warning(0b0000_0001);
        assert_eq!(told(&mut events), [0x0002_0201], "it went and came back");
    }

    #[test]
    fn a_log_that_changed_while_it_was_read_is_told_again() {
        let mut events = events(DISCOVERY, 4);
        events.raise(Kind::Discovery);
        assert_eq!(told(&mut events).len(), 1);
        events.version_read(LogPage::DISCOVERY, 5);
        events.raise(Kind::Discovery);
        assert_eq!(told(&mut events), [], "masked: the log is not read to its end");
        events.log_read(LogPage::DISCOVERY, 6, false);
        assert_eq!(told(&mut events), [0x0070_f002], "the host has read the head of version 5");
        events.version_read(LogPage::DISCOVERY, 6);
        events.log_read(LogPage::DISCOVERY, 6, false);
        assert_eq!(told(&mut events), []);
        events.log_read(LogPage::DISCOVERY, 7, false);
        assert_eq!(told(&mut events), [], "nothing was raised");
    }

    #[test]
    fn requests_are_bounded_abortable_and_end_at_reset() {
        let mut events = events(0, AER_MAX as u16);
        let limit = Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED.dnr();
        assert_eq!(events.hold(9, 109), Err(limit));
        assert!(!events.abort(99));
        assert!(events.abort(101));
        assert_eq!(events.hold(9, 109), Err(limit), "its completion is still due");
        assert_eq!(events.poll(), Some((1, Status::COMMAND_ABORT_REQUESTED, 0)));
        events.critical_warning(1);
        events.configure(1);
        events.reset();
        let ends: Vec<_> = core::iter::from_fn(|| events.poll()).collect();
        let ended = [0, 2, 3].map(|slot| (slot, Status::COMMAND_ABORT_REQUESTED, 0));
        assert_eq!(ends, ended, "and no event");
        events.hold(0, 0).unwrap();
        events.configure(1);
        assert_eq!(told(&mut events), [0x0002_0201], "what is wrong is still known");
    }

    #[test]
    fn a_list_that_overflows_says_so() {
        let mut events = events(NS, 0);
        let many: Vec<u32> = (1..=1024).collect();
        events.namespaces_changed(&many);
        assert_eq!(events.changed_list(), many);
        events.namespaces_changed(&[2000]);
        events.namespaces_changed(&[5]);
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
