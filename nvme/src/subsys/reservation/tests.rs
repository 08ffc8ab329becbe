//! Reservations: the tables of the specification, and random commands against a model.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const A: HostId = [0xa; 16];
const B: HostId = [0xb; 16];
const C: HostId = [0xc; 16];
const D: HostId = [0xd; 16];

fn register(nrkey: u64) -> ReservationRequest {
    ReservationRequest::Register {
        action: RegisterAction::Register,
        iekey: false,
        persist: PersistChange::Keep,
        crkey: 0,
        nrkey,
    }
}

fn unregister(crkey: u64) -> ReservationRequest {
    ReservationRequest::Register {
        action: RegisterAction::Unregister,
        iekey: false,
        persist: PersistChange::Keep,
        crkey,
        nrkey: 0,
    }
}

fn replace(crkey: u64, nrkey: u64, iekey: bool) -> ReservationRequest {
    ReservationRequest::Register {
        action: RegisterAction::Replace,
        iekey,
        persist: PersistChange::Keep,
        crkey,
        nrkey,
    }
}

fn acquire(rtype: ReservationType, crkey: u64) -> ReservationRequest {
    ReservationRequest::Acquire { action: AcquireAction::Acquire, rtype, crkey, prkey: 0 }
}

fn preempt(rtype: ReservationType, crkey: u64, prkey: u64) -> ReservationRequest {
    ReservationRequest::Acquire { action: AcquireAction::Preempt, rtype, crkey, prkey }
}

fn release(rtype: ReservationType, crkey: u64) -> ReservationRequest {
    ReservationRequest::Release { action: ReleaseAction::Release(Some(rtype)), crkey }
}

fn clear(crkey: u64) -> ReservationRequest {
    ReservationRequest::Release { action: ReleaseAction::Clear, crkey }
}

/// Hosts A, B and C registered with keys 1, 2 and 2; A has reserved if `held` says so.
fn three(held: Option<ReservationType>) -> Reservations {
    let mut all = Reservations::new();
    for (host, key) in [(A, 1), (B, 2), (C, 2)] {
        all.apply(&host, &register(key)).unwrap();
    }
    if let Some(rtype) = held {
        all.apply(&A, &acquire(rtype, 1)).unwrap();
    }
    all
}

fn hosts(all: &Reservations) -> Vec<HostId> {
    all.state().registrants.iter().map(|r| r.host).collect()
}

use ReservationType::{
    ExclusiveAccess as Ea, ExclusiveAccessAllRegistrants as EaAll,
    ExclusiveAccessRegistrantsOnly as EaRo, WriteExclusive as We,
    WriteExclusiveAllRegistrants as WeAll, WriteExclusiveRegistrantsOnly as WeRo,
};

/// "Command Behavior in the Presence of a Reservation": (type, who, may read, may write).
#[test]
fn conflicts_are_those_of_the_table() {
    let table = [
        (We, (A, true, true), (B, true, false), (D, true, false)),
        (Ea, (A, true, true), (B, false, false), (D, false, false)),
        (WeRo, (A, true, true), (B, true, true), (D, true, false)),
        (EaRo, (A, true, true), (B, true, true), (D, false, false)),
        (WeAll, (A, true, true), (B, true, true), (D, true, false)),
        (EaAll, (A, true, true), (B, true, true), (D, false, false)),
    ];
    for (rtype, holder, registrant, other) in table {
        let all = three(Some(rtype));
        for (host, read, write) in [holder, registrant, other] {
            assert_eq!(all.rights(&host), Rights { read, write }, "{rtype:?} {host:x?}");
            assert_eq!(all.allows(&host, Access::Read), read);
            assert_eq!(all.allows(&host, Access::Write), write);
            assert!(all.allows(&host, Access::Other));
        }
    }
    let free = three(None);
    assert!(!free.is_held() && free.allows(&D, Access::Write));
}

#[test]
fn types_have_their_numbers() {
    for (at, rtype) in ReservationType::ALL.into_iter().enumerate() {
        assert_eq!(usize::from(rtype.to_wire()), at + 1);
        assert_eq!(ReservationType::from_wire(rtype.to_wire()), Some(rtype));
    }
    for value in [0, 7, 255] {
        assert_eq!(ReservationType::from_wire(value), None);
    }
}

#[test]
fn registering() {
    let mut all = Reservations::new();
    assert_eq!(all.apply(&A, &register(0)), Err(INVALID_FIELD));
    assert!(all.apply(&A, &register(1)).unwrap().changed);
    // The same key again: no error. Another: a conflict.
    assert!(all.apply(&A, &register(1)).is_ok());
    assert_eq!(all.apply(&A, &register(2)), Err(CONFLICT));
    assert_eq!(all.apply(&A, &replace(2, 3, false)), Err(CONFLICT));
    assert!(all.apply(&A, &replace(1, 3, false)).is_ok());
    assert!(all.apply(&A, &replace(99, 4, true)).is_ok());
    assert_eq!(all.apply(&A, &replace(4, 0, false)), Err(INVALID_FIELD));
    assert_eq!(all.state().registrants, [Registrant { host: A, key: 4 }]);
    // Who is not registered has nothing to replace, unless he does not care what is there.
    assert_eq!(all.apply(&B, &replace(4, 5, false)), Err(CONFLICT));
    assert!(all.apply(&B, &replace(0, 5, true)).is_ok());
    assert_eq!(all.apply(&C, &unregister(0)), Err(CONFLICT));
    assert_eq!(all.apply(&B, &unregister(4)), Err(CONFLICT));
    assert!(all.apply(&B, &unregister(5)).is_ok());
    assert_eq!(hosts(&all), [A]);
    // Six commands succeeded, and each counts.
    assert_eq!(all.state().generation, 6);
}

#[test]
fn power_loss_state() {
    let with = |persist| ReservationRequest::Register {
        action: RegisterAction::Register,
        iekey: false,
        persist,
        crkey: 0,
        nrkey: 1,
    };
    let mut all = Reservations::new();
    all.apply(&A, &with(PersistChange::Set)).unwrap();
    all.apply(&A, &acquire(We, 1)).unwrap();
    assert!(all.state().ptpl);
    let kept = Reservations::from_state(all.to_state()).unwrap();
    assert_eq!(kept, all);
    all.apply(&A, &with(PersistChange::Keep)).unwrap();
    assert!(all.state().ptpl);
    all.apply(&A, &with(PersistChange::Clear)).unwrap();
    assert_eq!(Reservations::from_state(all.to_state()), Ok(Reservations::new()));
    // A refused command changes nothing of it.
    assert_eq!(all.apply(&B, &replace(0, 1, false)), Err(CONFLICT));
    assert!(!all.state().ptpl);
}

#[test]
fn acquiring() {
    for rtype in ReservationType::ALL {
        let mut all = three(None);
        assert_eq!(all.apply(&D, &acquire(rtype, 1)), Err(CONFLICT), "not registered");
        assert_eq!(all.apply(&A, &acquire(rtype, 2)), Err(CONFLICT), "not its key");
        assert!(all.apply(&A, &acquire(rtype, 1)).unwrap().changed);
        assert_eq!(all.state().generation, 3, "Acquire does not count");
        assert!(!all.apply(&A, &acquire(rtype, 1)).unwrap().changed);
        let again = all.apply(&B, &acquire(rtype, 2));
        assert_eq!(again.is_ok(), rtype.is_all_registrants(), "all registrants hold it");
        for other in ReservationType::ALL.into_iter().filter(|other| *other != rtype) {
            assert_eq!(all.apply(&A, &acquire(other, 1)), Err(CONFLICT));
        }
    }
}

#[test]
fn releasing() {
    for rtype in ReservationType::ALL {
        let mut all = three(Some(rtype));
        assert_eq!(all.apply(&D, &release(rtype, 1)), Err(CONFLICT));
        assert_eq!(all.apply(&A, &release(rtype, 7)), Err(CONFLICT));
        let wrong = if rtype == We { Ea } else { We };
        assert_eq!(all.apply(&A, &release(wrong, 1)), Err(INVALID_FIELD));
        let none = ReservationRequest::Release { action: ReleaseAction::Release(None), crkey: 1 };
        assert_eq!(all.apply(&A, &none), Err(INVALID_FIELD));
        let effect = all.apply(&B, &release(rtype, 2)).unwrap();
        if rtype.is_all_registrants() {
            let told = |host| (host, NoticeKind::ReservationReleased);
            assert_eq!(effect.notices, [told(A), told(C)], "any registrant is a holder");
            assert!(!all.is_held());
        } else {
            assert_eq!(effect, ReservationEffect::default());
            assert!(all.is_held());
            let effect = all.apply(&A, &release(rtype, 1)).unwrap();
            let told = if rtype.is_single() { vec![] } else { vec![B, C] };
            assert_eq!(effect.notices.iter().map(|(h, _)| *h).collect::<Vec<_>>(), told);
            assert!(effect.changed && !all.is_held());
        }
        assert_eq!(all.state().generation, 3, "Release does not count");
        // With nothing held it is no error.
        assert!(!all.apply(&A, &release(rtype, 1)).unwrap().changed);
    }
}

#[test]
fn clearing() {
    for held in [None, Some(We), Some(EaRo), Some(WeAll)] {
        let mut all = three(held);
        assert_eq!(all.apply(&D, &clear(1)), Err(CONFLICT));
        // Every registrant may clear, holder or not.
        let effect = all.apply(&B, &clear(2)).unwrap();
        let told = |host| (host, NoticeKind::ReservationPreempted);
        assert_eq!(effect.notices, [told(A), told(C)]);
        assert_eq!(effect.preempted, [A, C]);
        assert!(!effect.abort_preempted);
        assert_eq!(all.state().generation, 4);
        assert!(all.state().registrants.is_empty() && !all.is_held());
    }
}

#[test]
fn a_holder_that_unregisters_releases() {
    for rtype in ReservationType::ALL {
        let mut all = three(Some(rtype));
        let effect = all.apply(&A, &unregister(1)).unwrap();
        let told = |host| (host, NoticeKind::ReservationReleased);
        assert_eq!(all.is_held(), rtype.is_all_registrants());
        match rtype {
            WeRo | EaRo => assert_eq!(effect.notices, [told(B), told(C)]),
            _ => assert_eq!(effect.notices, []),
        }
        all.apply(&B, &unregister(2)).unwrap();
        all.apply(&C, &unregister(2)).unwrap();
        assert!(!all.is_held(), "the last holder is gone");
    }
}

#[test]
fn preempting_registrations() {
    // No reservation: registrations go, nothing is acquired.
    let mut all = three(None);
    assert_eq!(all.apply(&A, &preempt(We, 1, 9)), Err(CONFLICT), "no such key");
    assert_eq!(all.apply(&A, &preempt(We, 1, 0)), Err(CONFLICT));
    assert_eq!(all.state().generation, 3);
    let effect = all.apply(&A, &preempt(We, 1, 2)).unwrap();
    let told = |host| (host, NoticeKind::RegistrationPreempted);
    assert_eq!(effect.notices, [told(B), told(C)]);
    assert_eq!((hosts(&all), all.is_held(), all.state().generation), (vec![A], false, 4));

    // A reservation of somebody else with another key stays.
    let mut all = three(Some(Ea));
    all.apply(&D, &register(4)).unwrap();
    let effect = all.apply(&D, &preempt(We, 4, 2)).unwrap();
    assert_eq!(effect.preempted, [B, C]);
    assert_eq!(hosts(&all), [A, D]);
    assert_eq!((all.state().rtype, all.state().holder), (Some(Ea), Some(A)));
    assert_eq!(all.apply(&D, &preempt(We, 4, 0)), Err(INVALID_FIELD));

    // A host can unregister itself that way, and is not told.
    let mut all = three(None);
    let effect = all.apply(&B, &preempt(We, 2, 2)).unwrap();
    assert_eq!((effect.notices, hosts(&all)), (vec![told(C)], vec![A]));
}

#[test]
fn preempting_a_reservation() {
    for held in [We, Ea, WeRo, EaRo] {
        for rtype in ReservationType::ALL {
            let mut all = three(Some(held));
            let effect = all.apply(&B, &preempt(rtype, 2, 1)).unwrap();
            let mut told = vec![(A, NoticeKind::RegistrationPreempted)];
            if held != rtype {
                told.push((C, NoticeKind::ReservationReleased));
            }
            assert_eq!((effect.notices, effect.preempted), (told, vec![A]));
            assert_eq!((hosts(&all), all.state().rtype), (vec![B, C], Some(rtype)));
            assert_eq!(all.state().holder, (!rtype.is_all_registrants()).then_some(B));
            assert_eq!(all.state().generation, 4);
            assert!(!all.allows(&A, Access::Write), "a preempted host cannot write");
        }
    }
}

#[test]
fn preempting_oneself_changes_the_type() {
    // The holder shares its key with another host, which loses its registration.
    let mut all = three(None);
    all.apply(&B, &acquire(We, 2)).unwrap();
    let effect = all.apply(&B, &preempt(EaRo, 2, 2)).unwrap();
    assert_eq!(
        effect.notices,
        [(C, NoticeKind::RegistrationPreempted), (A, NoticeKind::ReservationReleased)]
    );
    assert_eq!((all.state().rtype, all.state().holder), (Some(EaRo), Some(B)));
    assert_eq!(hosts(&all), [A, B]);
}

#[test]
fn preempting_all_registrants() {
    for held in [WeAll, EaAll] {
        // Key 0: all others, and the reservation.
        let mut all = three(Some(held));
        let effect = all.apply(&C, &preempt(We, 2, 0)).unwrap();
        let told = |host| (host, NoticeKind::RegistrationPreempted);
        assert_eq!(effect.notices, [told(A), told(B)]);
        assert_eq!(hosts(&all), [C]);
        assert_eq!((all.state().rtype, all.state().holder), (Some(We), Some(C)));
        // A key: its registrants; the reservation is the others'.
        let mut all = three(Some(held));
        all.apply(&A, &preempt(We, 1, 2)).unwrap();
        assert_eq!((hosts(&all), all.state().rtype), (vec![A], Some(held)));
        assert_eq!(all.apply(&A, &preempt(We, 1, 2)), Err(CONFLICT));
        // The last registrants take the reservation with them.
        all.apply(&A, &preempt(We, 1, 1)).unwrap();
        assert!(!all.is_held());
    }
}

#[test]
fn preempt_and_abort() {
    let with = |prkey| ReservationRequest::Acquire {
        action: AcquireAction::PreemptAndAbort,
        rtype: We,
        crkey: 1,
        prkey,
    };
    let mut all = three(Some(We));
    let effect = all.apply(&A, &with(2)).unwrap();
    assert!(effect.abort_preempted);
    assert_eq!((effect.preempted, all.state().generation), (vec![B, C], 4));
    let effect = all.apply(&A, &with(1)).unwrap();
    assert!(!effect.abort_preempted, "nobody to abort");
}

#[test]
fn registrants_are_bounded() {
    let mut all = Reservations::new();
    for n in 0..REGISTRANTS_MAX {
        all.apply(&[n as u8; 16], &register(1)).unwrap();
    }
    let full = Status::INTERNAL_ERROR.dnr();
    assert_eq!(all.apply(&[0xff; 16], &register(1)), Err(full));
    assert_eq!(all.apply(&[0xff; 16], &replace(0, 1, true)), Err(full));
    assert_eq!(all.state().generation as usize, REGISTRANTS_MAX);
    all.apply(&[0; 16], &unregister(1)).unwrap();
    assert!(all.apply(&[0xff; 16], &register(1)).is_ok());
}

#[test]
fn the_generation_wraps() {
    let state = ReservationState { ptpl: true, generation: u32::MAX, ..Default::default() };
    let mut all = Reservations::from_state(state).unwrap();
    all.apply(&A, &register(1)).unwrap();
    assert_eq!(all.state().generation, 0);
}

#[test]
fn hostile_states_are_refused() {
    let registrant = |host, key| Registrant { host, key };
    let state = |registrants: Vec<Registrant>, rtype, holder| ReservationState {
        ptpl: true,
        generation: 1,
        registrants,
        rtype,
        holder,
    };
    let refused = |state| Reservations::from_state(state).unwrap_err();
    let two = || vec![registrant(A, 1), registrant(B, 1)];
    assert!(Reservations::from_state(state(two(), Some(We), Some(A))).is_ok());
    assert!(Reservations::from_state(state(two(), Some(WeAll), None)).is_ok());
    for (rtype, holder) in
        [(Some(We), None), (Some(We), Some(C)), (Some(EaAll), Some(A)), (None, Some(A))]
    {
        assert_eq!(refused(state(two(), rtype, holder)), InvalidReservations::Holder);
    }
    assert_eq!(refused(state(vec![], Some(WeAll), None)), InvalidReservations::Holder);
    let twice = vec![registrant(A, 1), registrant(A, 2)];
    assert_eq!(refused(state(twice, None, None)), InvalidReservations::Twice);
    assert_eq!(refused(state(vec![registrant(A, 0)], None, None)), InvalidReservations::ZeroKey);
    let many = (0..=REGISTRANTS_MAX).map(|n| registrant([n as u8; 16], 1)).collect();
    assert_eq!(refused(state(many, None, None)), InvalidReservations::TooMany(129));
}

/// Golden bytes, laid out by hand after "Reservation Status Extended Data Structure" and
/// "Registered Controller Extended Data Structure".
#[test]
fn report_extended() {
    let mut all = Reservations::new();
    for (host, key) in [(A, 0x0102_0304_0506_0708), (B, 2)] {
        all.apply(&host, &register(key)).unwrap();
    }
    all.apply(&B, &acquire(EaRo, 2)).unwrap();
    let report = all.report(true, &[(7, B), (0x1234, A), (5, B), (9, D)]);
    assert_eq!(report.len(), 64 + 3 * 64);
    let mut head = [0; 64];
    head[0] = 2;
    head[4] = 4;
    head[5] = 3;
    assert_eq!(report[..64], head);
    let mut first = [0; 64];
    first[0..2].copy_from_slice(&[0x34, 0x12]);
    first[8..16].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
    first[16..32].copy_from_slice(&A);
    assert_eq!(report[64..128], first);
    let mut second = [0; 64];
    second[0] = 5;
    second[2] = 1;
    second[8] = 2;
    second[16..32].copy_from_slice(&B);
    assert_eq!(report[128..192], second);
    second[0] = 7;
    assert_eq!(report[192..], second);
    // A registrant without a controller is reported, too.
    let report = all.report(true, &[]);
    assert_eq!(report.len(), 64 + 2 * 64);
    assert_eq!(report[64..66], [0xff, 0xff]);
}

#[test]
fn report_short() {
    let host = |id: u8| {
        let mut host = [0; 16];
        host[0] = id;
        host
    };
    let mut all = Reservations::new();
    let with_ptpl = ReservationRequest::Register {
        action: RegisterAction::Register,
        iekey: false,
        persist: PersistChange::Set,
        crkey: 0,
        nrkey: 0x11,
    };
    all.apply(&host(1), &with_ptpl).unwrap();
    all.apply(&host(1), &acquire(WeAll, 0x11)).unwrap();
    let report = all.report(false, &[(3, host(1))]);
    let mut expected = [0; 48];
    (expected[0], expected[4], expected[5], expected[9]) = (1, 5, 1, 1);
    (expected[24], expected[26], expected[32], expected[40]) = (3, 1, 1, 0x11);
    assert_eq!(report, expected);
}

#[test]
fn requests_are_parsed_from_commands_and_data() {
    let mut data = [0; 20];
    data[0] = 1;
    data[8] = 2;
    let command = IoCommand::ReservationRegister {
        nsid: 1,
        action: RegisterAction::Replace,
        iekey: true,
        persist: PersistChange::Set,
    };
    assert_eq!(
        ReservationRequest::parse(&command, &data),
        Ok(ReservationRequest::Register {
            action: RegisterAction::Replace,
            iekey: true,
            persist: PersistChange::Set,
            crkey: 1,
            nrkey: 2
        })
    );
    let too_short = Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(ReservationRequest::parse(&command, &data[..15]), too_short);
    let command =
        IoCommand::ReservationAcquire { nsid: 1, action: AcquireAction::Preempt, rtype: We };
    assert_eq!(ReservationRequest::parse(&command, &data), Ok(preempt(We, 1, 2)));
    let command = IoCommand::ReservationRelease { nsid: 1, action: ReleaseAction::Clear };
    assert_eq!(ReservationRequest::parse(&command, &data[..8]), Ok(clear(1)));
    assert_eq!(ReservationRequest::parse(&command, &data[..7]), too_short);
    assert_eq!(ReservationRequest::parse(&IoCommand::Flush { nsid: 1 }, &data), Err(INVALID_FIELD));
}

/// What the specification says, as sets: registrants, the holders among them, and the rest.
#[derive(Clone, Debug, Default)]
struct Model {
    keys: BTreeMap<HostId, u64>,
    rtype: Option<ReservationType>,
    holders: BTreeSet<HostId>,
    generation: u32,
    ptpl: bool,
}

type Told = BTreeSet<(HostId, u8)>;

impl Model {
    fn unregister(&mut self, gone: &BTreeSet<HostId>) {
        self.keys.retain(|host, _| !gone.contains(host));
        self.settle();
    }

    /// Holders are registrants; without holders there is no reservation; with All Registrants
    /// every registrant is one.
    fn settle(&mut self) {
        if matches!(self.rtype, Some(WeAll | EaAll)) {
            self.holders = self.keys.keys().copied().collect();
        }
        let keys = &self.keys;
        self.holders.retain(|host| keys.contains_key(host));
        if self.holders.is_empty() {
            self.rtype = None;
        }
    }

    fn others(&self, host: HostId, kind: NoticeKind) -> Told {
        self.keys.keys().filter(|h| **h != host).map(|h| (*h, kind as u8)).collect()
    }

    fn step(&mut self, host: HostId, request: &ReservationRequest) -> Result<Told, Status> {
        let key = self.keys.get(&host).copied();
        match *request {
            ReservationRequest::Register { action, iekey, persist, crkey, nrkey } => {
                let mut told = Told::new();
                let knows = key.is_some() && (iekey || key == Some(crkey));
                match action {
                    RegisterAction::Unregister => {
                        if !knows {
                            return Err(CONFLICT);
                        }
                        let before = self.rtype;
                        self.unregister(&BTreeSet::from([host]));
                        if matches!(before, Some(WeRo | EaRo)) && self.rtype.is_none() {
                            told = self.others(host, NoticeKind::ReservationReleased);
                        }
                    }
                    _ if nrkey == 0 => return Err(INVALID_FIELD),
                    RegisterAction::Register if key.is_some_and(|key| key != nrkey) => {
                        return Err(CONFLICT);
                    }
                    RegisterAction::Replace if !(knows || key.is_none() && iekey) => {
                        return Err(CONFLICT);
                    }
                    RegisterAction::Register | RegisterAction::Replace => {
                        self.keys.insert(host, nrkey);
                        self.settle();
                    }
                }
                self.generation += 1;
                match persist {
                    PersistChange::Keep => {}
                    PersistChange::Clear => self.ptpl = false,
                    PersistChange::Set => self.ptpl = true,
                }
                Ok(told)
            }
            ReservationRequest::Acquire { crkey, .. }
            | ReservationRequest::Release { crkey, .. }
                if key != Some(crkey) =>
            {
                Err(CONFLICT)
            }
            ReservationRequest::Acquire { action: AcquireAction::Acquire, rtype, .. } => {
                if self.rtype.is_none() {
                    (self.rtype, self.holders) = (Some(rtype), BTreeSet::from([host]));
                    self.settle();
                } else if self.rtype != Some(rtype) || !self.holders.contains(&host) {
                    return Err(CONFLICT);
                }
                Ok(Told::new())
            }
            ReservationRequest::Acquire { rtype, prkey, .. } => {
                let is_all = matches!(self.rtype, Some(WeAll | EaAll));
                let named: BTreeSet<HostId> =
                    self.keys.iter().filter(|(_, k)| **k == prkey).map(|(h, _)| *h).collect();
                let taken = if is_all {
                    prkey == 0
                } else if self.rtype.is_some() && prkey == 0 {
                    return Err(INVALID_FIELD);
                } else {
                    !self.holders.is_disjoint(&named)
                };
                let mut gone =
                    if is_all && taken { self.keys.keys().copied().collect() } else { named };
                if gone.is_empty() {
                    return Err(CONFLICT);
                }
                if taken {
                    gone.remove(&host);
                }
                let before = self.rtype;
                let mut told: Told = gone
                    .iter()
                    .filter(|h| **h != host)
                    .map(|h| (*h, NoticeKind::RegistrationPreempted as u8))
                    .collect();
                self.unregister(&gone);
                if taken {
                    (self.rtype, self.holders) = (Some(rtype), BTreeSet::from([host]));
                    self.settle();
                    if before != Some(rtype) {
                        told.extend(self.others(host, NoticeKind::ReservationReleased));
                    }
                }
                self.generation += 1;
                Ok(told)
            }
            ReservationRequest::Release { action: ReleaseAction::Release(rtype), .. } => {
                if !self.holders.contains(&host) {
                    return Ok(Told::new());
                }
                if rtype != self.rtype {
                    return Err(INVALID_FIELD);
                }
                (self.rtype, self.holders) = (None, BTreeSet::new());
                Ok(match rtype {
                    None | Some(We | Ea) => Told::new(),
                    Some(_) => self.others(host, NoticeKind::ReservationReleased),
                })
            }
            ReservationRequest::Release { action: ReleaseAction::Clear, .. } => {
                let told = self.others(host, NoticeKind::ReservationPreempted);
                self.keys.clear();
                self.settle();
                self.generation += 1;
                Ok(told)
            }
        }
    }

    fn rights(&self, host: HostId) -> Rights {
        let registered = self.keys.contains_key(&host);
        match self.rtype {
            None => Rights { read: true, write: true },
            _ if self.holders.contains(&host) => Rights { read: true, write: true },
            Some(We) => Rights { read: true, write: false },
            Some(Ea) => Rights { read: false, write: false },
            Some(WeRo | WeAll) => Rights { read: true, write: registered },
            Some(EaRo | EaAll) => Rights { read: registered, write: registered },
        }
    }
}

fn rtypes() -> impl Strategy<Value = ReservationType> {
    (1u8..=6).prop_map(|value| ReservationType::from_wire(value).unwrap())
}

fn requests() -> impl Strategy<Value = ReservationRequest> {
    let keys = 0u64..4;
    prop_oneof![
        (0..3usize, any::<bool>(), 0..3usize, keys.clone(), keys.clone()).prop_map(
            |(action, iekey, persist, crkey, nrkey)| {
                use RegisterAction::{Register, Replace, Unregister};
                ReservationRequest::Register {
                    action: [Register, Unregister, Replace][action],
                    iekey,
                    persist: [PersistChange::Keep, PersistChange::Clear, PersistChange::Set]
                        [persist],
                    crkey,
                    nrkey,
                }
            }
        ),
        (0..3usize, rtypes(), keys.clone(), keys.clone()).prop_map(
            |(action, rtype, crkey, prkey)| {
                use AcquireAction::{Acquire, Preempt, PreemptAndAbort};
                let action = [Acquire, Preempt, PreemptAndAbort][action];
                ReservationRequest::Acquire { action, rtype, crkey, prkey }
            }
        ),
        (0..4usize, rtypes(), keys).prop_map(|(action, rtype, crkey)| {
            use ReleaseAction::{Clear, Release};
            let action = [Release(Some(rtype)), Release(Some(rtype)), Release(None), Clear][action];
            ReservationRequest::Release { action, crkey }
        }),
    ]
}

proptest! {
    #[test]
    fn commands_do_what_the_model_does(
        steps in proptest::collection::vec((0u8..5, requests()), 1..60)
    ) {
        let (mut all, mut model) = (Reservations::new(), Model::default());
        for (host, request) in steps {
            let host = [host; 16];
            let before = all.clone();
            let expected = model.step(host, &request);
            let got = all.apply(&host, &request);
            prop_assert_eq!(got.as_ref().err(), expected.as_ref().err());
            let state = all.state().clone();
            if let (Ok(effect), Ok(told)) = (got, expected) {
                let notices: Told = effect.notices.iter().map(|(h, k)| (*h, *k as u8)).collect();
                prop_assert_eq!(notices.len(), effect.notices.len());
                prop_assert_eq!(notices, told);
                prop_assert_eq!(effect.changed, before.state() != &state
                    || before.state().generation != state.generation);
                for gone in &effect.preempted {
                    prop_assert!(*gone != host && before.key_of(gone).is_some());
                    prop_assert!(all.key_of(gone).is_none());
                    prop_assert!(!all.is_held() || !all.allows(gone, Access::Write));
                }
                let is_abort = matches!(request, ReservationRequest::Acquire {
                    action: AcquireAction::PreemptAndAbort, .. });
                prop_assert_eq!(effect.abort_preempted, is_abort && !effect.preempted.is_empty());
            } else {
                prop_assert_eq!(before.state(), &state);
            }
            let keys: BTreeMap<HostId, u64> =
                state.registrants.iter().map(|r| (r.host, r.key)).collect();
            prop_assert_eq!(&keys, &model.keys);
            prop_assert_eq!(state.registrants.len(), keys.len());
            prop_assert_eq!((state.rtype, state.generation, state.ptpl),
                (model.rtype, model.generation, model.ptpl));
            for host in (0..6).map(|n| [n; 16]) {
                prop_assert_eq!(all.rights(&host), model.rights(host));
                prop_assert_eq!(all.is_holder(&host), model.holders.contains(&host));
            }
            // What is kept is what is read back.
            let kept = Reservations::from_state(ReservationState { ptpl: true, ..state.clone() });
            prop_assert_eq!(kept.unwrap().to_state(), ReservationState { ptpl: true, ..state });
            let report = all.report(true, &[(1, [0; 16]), (2, [0; 16]), (3, [4; 16])]);
            prop_assert_eq!(report.len() % 64, 0);
            prop_assert_eq!(usize::from(report[5]) + 1, report.len() / 64);
        }
    }

    /// A state from a damaged store is refused or sound.
    #[test]
    fn any_state_is_refused_or_sound(
        registrants in proptest::collection::vec((0u8..4, 0u64..3), 0..4),
        rtype in proptest::option::of(rtypes()),
        holder in proptest::option::of(0u8..4),
        step in requests(),
    ) {
        let state = ReservationState {
            ptpl: true,
            generation: 0,
            registrants: registrants
                .into_iter()
                .map(|(host, key)| Registrant { host: [host; 16], key })
                .collect(),
            rtype,
            holder: holder.map(|host| [host; 16]),
        };
        if let Ok(mut all) = Reservations::from_state(state) {
            let _ = all.apply(&[0; 16], &step);
            prop_assert_eq!(Reservations::check(all.state()), Ok(()));
        }
    }
}
