//! Reservations of a namespace by a few hosts.
//!
//! Invariants checked: no panic; a refused command changes nothing; what is stored can be taken up
//! again and says the same; nobody but registrants holds, and whoever is shut out was told.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme::subsys::reservation::{
    Access, AcquireAction, HostId, PersistChange, RegisterAction, Registrant, ReleaseAction,
    ReservationRequest, ReservationState, ReservationType, Reservations,
};
use penstock_fuzz::Input;

const HOSTS: u8 = 5;

fn host(n: u8) -> HostId {
    [n % HOSTS + 1; 16]
}

fn request(input: &mut Input<'_>) -> ReservationRequest {
    let (what, keys) = (input.byte(), input.byte());
    let (crkey, other) = (u64::from(keys & 3), u64::from(keys >> 2 & 3));
    let rtype = ReservationType::from_wire(what >> 4 & 7);
    let registers = [RegisterAction::Register, RegisterAction::Unregister, RegisterAction::Replace];
    let acquires = [AcquireAction::Acquire, AcquireAction::Preempt, AcquireAction::PreemptAndAbort];
    let persists = [PersistChange::Keep, PersistChange::Clear, PersistChange::Set];
    let pick = usize::from(what >> 2 & 3) % 3;
    match what & 3 {
        0 => ReservationRequest::Register {
            action: registers[pick],
            iekey: what >> 7 == 1,
            persist: persists[usize::from(keys >> 4) % 3],
            crkey,
            nrkey: other,
        },
        1 | 2 => ReservationRequest::Acquire {
            action: acquires[pick],
            rtype: rtype.unwrap_or(ReservationType::WriteExclusive),
            crkey,
            prkey: other,
        },
        _ if pick == 0 => ReservationRequest::Release { action: ReleaseAction::Clear, crkey },
        _ => ReservationRequest::Release { action: ReleaseAction::Release(rtype), crkey },
    }
}

/// A state of any bytes: taken up only if commands could have led to it.
fn restored(input: &mut Input<'_>) -> Reservations {
    let state = ReservationState {
        ptpl: input.byte() & 1 == 1,
        generation: u32::from(input.byte()),
        registrants: (0..input.byte() % 6)
            .map(|_| Registrant { host: host(input.byte()), key: u64::from(input.byte() & 3) })
            .collect(),
        rtype: ReservationType::from_wire(input.byte() % 8),
        holder: (input.byte() & 1 == 1).then(|| host(input.byte())),
    };
    match Reservations::from_state(state.clone()) {
        Ok(taken) => {
            // Without Persist Through Power Loss nothing outlives it.
            let kept = if state.ptpl { state } else { ReservationState::default() };
            assert_eq!(taken.to_state(), kept);
            taken
        }
        Err(_) => Reservations::new(),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut all = restored(&mut input);
    let controllers: Vec<(u16, HostId)> =
        (0..u16::from(input.byte() % 12)).map(|n| (n, host(n as u8))).collect();
    while !input.is_empty() {
        let from = host(input.byte());
        let request = request(&mut input);
        let before = all.to_state();
        match all.apply(&from, &request) {
            Err(status) => {
                assert!(!status.is_success());
                assert_eq!(all.to_state(), before, "a refused command changes nothing");
            }
            Ok(effect) => {
                let after = all.to_state();
                assert!(effect.changed || after == before);
                assert!(effect.preempted.iter().all(|host| {
                    *host != from && !after.registrants.iter().any(|entry| entry.host == *host)
                }));
                assert!(effect.notices.iter().all(|(host, _)| *host != from));
                assert!(!effect.abort_preempted || !effect.preempted.is_empty());
                // Whoever was shut out of a registration was told.
                for lost in before.registrants.iter().filter(|entry| entry.host != from) {
                    let stays = after.registrants.iter().any(|entry| entry.host == lost.host);
                    let told = effect.notices.iter().any(|(host, _)| *host == lost.host);
                    assert!(stays || told, "a host lost its registration without a word");
                }
            }
        }
        let state = all.to_state();
        let again = Reservations::from_state(state.clone()).expect("what is stored can be read");
        for n in 0..HOSTS {
            let host = host(n);
            let registered = state.registrants.iter().any(|entry| entry.host == host);
            assert!(!state.ptpl || again.rights(&host) == all.rights(&host));
            assert!(all.allows(&host, Access::Other));
            if !all.is_held() {
                assert!(all.allows(&host, Access::Read) && all.allows(&host, Access::Write));
            }
            if state.holder == Some(host) {
                assert!(registered && all.allows(&host, Access::Write));
            }
            if all.allows(&host, Access::Write) {
                assert!(all.allows(&host, Access::Read));
            }
        }
        for extended in [false, true] {
            let report = all.report(extended, &controllers);
            let (head, entry) = if extended { (64, 64) } else { (24, 24) };
            assert!(report.len() >= head && (report.len() - head) % entry == 0);
            let count = usize::from(u16::from_le_bytes([report[5], report[6]]));
            assert_eq!(count, (report.len() - head) / entry);
            assert!(count >= state.registrants.len());
        }
    }
});
