//! Authentication messages, of either end.
//!
//! Invariants checked: no panic; messages are bounded; a transaction that nobody touched ends as
//! the keys say; two ends that are both done agree; with other keys, neither is.
#![no_main]

use crypto::dhchap::{
    Concatenation, Controller, ControllerConfig, DhGroup, ENTROPY_LEN, Expired, Host, HostConfig,
    MESSAGE_BYTES_MAX, Status,
};
use crypto::{DhchapKey, Hash, KeyHash};
use libfuzzer_sys::fuzz_target;
use penstock_fuzz::Input;

const HOST: &str = "nqn.2014-08.org.example:host";
const SUB: &str = "nqn.2014-08.org.example:sub";
const HASHES: [Hash; 3] = [Hash::Sha256, Hash::Sha384, Hash::Sha512];

fn key(fill: u8) -> DhchapKey {
    DhchapKey::generate(KeyHash::Sha256, &[fill; 64])
}

/// Changes a message as the input says, or puts another in its place. Whether it did.
fn change(message: &mut Vec<u8>, input: &mut Input<'_>) -> bool {
    let before = message.clone();
    match input.byte() % 8 {
        0 => {
            let at = usize::from(input.byte());
            if let Some(byte) = message.get_mut(at) {
                *byte ^= input.byte();
            }
        }
        1 => message.truncate(usize::from(input.byte())),
        2 => {
            let len = usize::from(input.byte());
            *message = input.take(len).to_vec();
        }
        3 => {
            // The right head, and anything behind it.
            message.truncate(6);
            let len = usize::from(input.byte());
            message.extend_from_slice(input.take(len));
        }
        _ => {}
    }
    *message != before
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (how, pick) = (input.byte(), input.byte());
    let is_right = how & 1 == 0;
    let is_mutual = how & 2 == 0;
    // The smallest group only now and then: it takes a millisecond.
    let with_group = how & 0x1c == 0;
    let groups = if with_group { vec![DhGroup::Ffdhe2048] } else { vec![DhGroup::Null] };
    let concatenation =
        if with_group && how & 0x20 == 0 { Concatenation::New } else { Concatenation::No };
    let hashes = match concatenation {
        Concatenation::No => vec![HASHES[usize::from(pick % 3)]],
        _ => vec![HASHES[usize::from(pick % 2)]],
    };
    let mut host = Host::new(
        HostConfig {
            hostnqn: HOST.to_owned(),
            subnqn: SUB.to_owned(),
            host_key: key(1),
            controller_key: is_mutual.then(|| key(2)),
            hashes: HASHES.to_vec(),
            groups: DhGroup::ALL.to_vec(),
            concatenation,
            t_id: 5,
        },
        &[1 + pick / 2; ENTROPY_LEN],
    );
    let mut controller = Controller::new(
        ControllerConfig {
            hostnqn: HOST.to_owned(),
            subnqn: SUB.to_owned(),
            host_keys: vec![key(9), key(if is_right { 1 } else { 3 })],
            controller_key: Some(key(2)),
            expired: Expired::default(),
            hashes,
            groups,
            concatenation,
        },
        &[254 - pick / 2; ENTROPY_LEN],
    );
    let (mut is_changed, mut messages) = (false, 0);
    while let Some(mut message) = host.next_message() {
        messages += 1;
        // Three of a transaction, and that it failed after all.
        assert!(messages <= 4 && message.len() <= MESSAGE_BYTES_MAX);
        is_changed |= change(&mut message, &mut input);
        if let Some(task) = controller.on_message(&message) {
            controller.on_computed(task.run());
        }
        let Some(mut message) = controller.next_message() else { break };
        assert!(message.len() <= MESSAGE_BYTES_MAX);
        is_changed |= change(&mut message, &mut input);
        if let Some(task) = host.on_message(&message) {
            host.on_computed(task.run());
        }
    }
    match (host.status(), controller.status()) {
        (Status::Done(host), Status::Done(controller)) => {
            assert!(is_right, "with another key nobody is let in");
            assert!(host.hash == controller.hash && host.group == controller.group);
            assert_eq!(host.is_mutual, is_mutual);
            assert!(host.generated == controller.generated || is_changed);
        }
        (_, Status::Done(_)) => assert!(is_right),
        (Status::Done(_), _) => assert!(is_changed && is_right || !is_mutual && is_changed),
        _ => assert!(is_changed || !is_right, "untouched, it ends well"),
    }
});
