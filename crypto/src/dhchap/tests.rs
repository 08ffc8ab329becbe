//! Both ends with each other, and what a third party or a bad end may do.

use proptest::prelude::*;

use super::machine::generate_for_test;
use super::*;
use crate::kdf::Hash;
use crate::key::{DhchapKey, KeyHash};
use crate::psk::IdentityVersion;
use crate::secret::Secret;
use crate::testing::hex;

const HOST: &str = "nqn.2014-08.org.example:host";
const SUB: &str = "nqn.2014-08.org.example:sub";
const HASHES: [Hash; 3] = [Hash::Sha256, Hash::Sha384, Hash::Sha512];

fn key(hash: KeyHash, fill: u8) -> DhchapKey {
    DhchapKey::new(hash, &[fill; 48]).unwrap_or_else(|e| panic!("{e}"))
}

fn random(fill: u8) -> [u8; ENTROPY_LEN] {
    std::array::from_fn(|n| fill ^ (n as u8).wrapping_mul(31))
}

fn host_config() -> HostConfig {
    HostConfig {
        hostnqn: HOST.to_owned(),
        subnqn: SUB.to_owned(),
        host_key: key(KeyHash::Sha256, 1),
        controller_key: None,
        hashes: HASHES.to_vec(),
        groups: DhGroup::ALL.to_vec(),
        concatenation: Concatenation::No,
        t_id: 77,
    }
}

fn controller_config() -> ControllerConfig {
    ControllerConfig {
        hostnqn: HOST.to_owned(),
        subnqn: SUB.to_owned(),
        host_keys: vec![key(KeyHash::Sha256, 1)],
        controller_key: Some(key(KeyHash::Sha512, 2)),
        expired: Expired::default(),
        hashes: vec![Hash::Sha256],
        groups: vec![DhGroup::Null],
        concatenation: Concatenation::No,
    }
}

/// Lets both ends talk; `meddle` sees each message with its number.
fn talk(
    host: HostConfig,
    controller: ControllerConfig,
    mut meddle: impl FnMut(usize, &mut Vec<u8>),
) -> (Status, Status) {
    let mut host = Host::new(host, &random(3));
    let mut controller = Controller::new(controller, &random(200));
    let mut number = 0;
    while let Some(mut message) = host.next_message() {
        assert!(message.len() <= MESSAGE_BYTES_MAX);
        meddle(number, &mut message);
        number += 1;
        if let Some(task) = controller.on_message(&message) {
            assert!(controller.next_message().is_none(), "it waits for the result");
            controller.on_computed(task.run());
        }
        let Some(mut message) = controller.next_message() else { break };
        assert!(message.len() <= MESSAGE_BYTES_MAX);
        meddle(number, &mut message);
        number += 1;
        if let Some(task) = host.on_message(&message) {
            host.on_computed(task.run());
        }
    }
    (host.status().clone(), controller.status().clone())
}

fn done(status: Status) -> Outcome {
    match status {
        Status::Done(outcome) => outcome,
        Status::Running => panic!("still running"),
        Status::Failed(failure) => panic!("{failure}"),
    }
}

fn failed(status: Status) -> Failure {
    match status {
        Status::Failed(failure) => failure,
        Status::Done(_) => panic!("ended well"),
        Status::Running => panic!("still running"),
    }
}

#[test]
fn all_hashes_groups_and_directions() {
    for hash in HASHES {
        for group in DhGroup::ALL {
            for is_mutual in [false, true] {
                let host = HostConfig {
                    controller_key: is_mutual.then(|| key(KeyHash::Sha512, 2)),
                    ..host_config()
                };
                let controller = ControllerConfig {
                    hashes: vec![hash],
                    groups: vec![group],
                    ..controller_config()
                };
                let (host, controller) = talk(host, controller, |_, _| {});
                let (host, controller) = (done(host), done(controller));
                assert!(host == controller);
                assert_eq!((host.hash, host.group), (hash, group));
                assert_eq!(host.is_mutual, is_mutual);
                assert!(host.generated.is_none());
            }
        }
    }
}

#[test]
fn the_controller_prefers_and_the_key_hash_is_another_matter() {
    for key_hash in [KeyHash::None, KeyHash::Sha256, KeyHash::Sha384, KeyHash::Sha512] {
        let host = HostConfig { host_key: key(key_hash, 9), ..host_config() };
        let controller = ControllerConfig {
            // Old and new secret while it is changed.
            host_keys: vec![key(KeyHash::Sha256, 1), key(key_hash, 9)],
            hashes: vec![Hash::Sha512, Hash::Sha256],
            groups: vec![DhGroup::Ffdhe2048, DhGroup::Null],
            ..controller_config()
        };
        let (host, controller) = talk(host, controller, |_, _| {});
        let outcome = done(controller);
        assert_eq!((outcome.hash, outcome.group), (Hash::Sha512, DhGroup::Ffdhe2048));
        assert_eq!(outcome.key_index, 1);
        done(host);
    }
}

#[test]
fn concatenation_gives_both_ends_one_key() {
    for (hash, code) in [(Hash::Sha256, "01"), (Hash::Sha384, "02")] {
        for is_mutual in [false, true] {
            for concatenation in [Concatenation::New, Concatenation::Replace] {
                let host = HostConfig {
                    controller_key: is_mutual.then(|| key(KeyHash::Sha512, 2)),
                    concatenation,
                    ..host_config()
                };
                let controller = ControllerConfig {
                    hashes: vec![Hash::Sha512, hash],
                    groups: vec![DhGroup::Null, DhGroup::Ffdhe3072],
                    concatenation,
                    ..controller_config()
                };
                let (host, controller) = talk(host, controller, |_, _| {});
                let (host, controller) = (done(host), done(controller));
                assert_eq!((host.is_mutual, controller.is_mutual), (is_mutual, is_mutual));
                let psk = host.generated.unwrap().psk(IdentityVersion::V1, HOST, SUB).unwrap();
                let other = controller.generated.unwrap();
                assert!(other.psk(IdentityVersion::V1, HOST, SUB).unwrap() == psk);
                assert!(psk.identity().starts_with(&format!("NVMe1G{code} {HOST} {SUB} ")));
            }
        }
    }
}

/// The values of the Linux kernel's own test (drivers/nvme/common/tests/auth_kunit.c).
#[test]
fn generated_key_vectors() {
    let cases = [
        (
            Hash::Sha256,
            "1733c59fa7f48fcf37f5f26fc4ff0268ad4f78e030f4f3b0bfd1d47e7bb1447a",
            "OldoKuTfKddMuyCznAZojkWD7P4D9/AtzDzLimtOxqI=",
            "3c17da628474a04d2247c4cab47968c915388193f7c071bd9489cc3666cd7cc8",
        ),
        (
            Hash::Sha384,
            "f14b2dd3234c459694d3bc63f8968bd6b37c2c6de849e22e11874900 1ce4bbe8\
             640b9e3a748cb11ce4b1d71d359cce39",
            "cffMWk8TSS7HOQebjgYEIkrPrjWPV4JE5cdPB8WhEvY4JBW5YynKyv66XscN4A9n",
            "277475323353 7b3fa50eb7d16a8e43457d85f4906c005b2236616c5d80939d08\
             98fff15bb8b77119d2be0aac423e7590",
        ),
    ];
    for (hash, psk, digest, tls) in cases {
        let len = hash.len_bytes();
        let bytes = |f: fn(u8) -> u8| (0..len as u8).map(f).collect::<Vec<_>>();
        let session = Secret::new(&bytes(|n| b'A' + n)).unwrap();
        let (c1, c2) = (bytes(|n| n), bytes(|n| 0xFF - n));
        let key = generate_for_test(hash, &session, &c1, &c2).unwrap();
        assert_eq!(key.secret().expose(), hex(psk));
        let out = key.psk(IdentityVersion::V1, "hostnqn", "subsysnqn").unwrap();
        assert!(out.identity().ends_with(&format!(" hostnqn subsysnqn {digest}")));
        assert_eq!(out.secret().expose(), hex(tls));
    }
}

/// The reason, whether the host or the controller found it, and a word of the explanation.
#[test]
fn refusals_have_their_reasons() {
    struct Case {
        host: HostConfig,
        controller: ControllerConfig,
        reason: Reason,
        by_host: bool,
        word: &'static str,
    }
    let case =
        |host, controller, reason, by_host, word| Case { host, controller, reason, by_host, word };
    let (host, ctrl) = (host_config, controller_config);
    let wrong = || key(KeyHash::Sha256, 99);
    let expired = Expired { host: true, controller: true };
    let concatenated = || HostConfig { concatenation: Concatenation::New, ..host() };
    let cases = [
        case(
            HostConfig { host_key: wrong(), ..host() },
            ctrl(),
            Reason::FAILED,
            false,
            "penstock key export",
        ),
        case(
            host(),
            ControllerConfig { host_keys: vec![], ..ctrl() },
            Reason::FAILED,
            false,
            "penstock key generate",
        ),
        case(
            host(),
            ControllerConfig { host_keys: vec![], expired, ..ctrl() },
            Reason::FAILED,
            false,
            "has expired: make another",
        ),
        case(
            HostConfig { host_key: wrong(), ..host() },
            ControllerConfig { expired, ..ctrl() },
            Reason::FAILED,
            false,
            "(1 tried, another has expired)",
        ),
        case(
            HostConfig { controller_key: Some(wrong()), ..host() },
            ControllerConfig { controller_key: None, expired, ..ctrl() },
            Reason::FAILED,
            false,
            "whose secret has expired",
        ),
        case(
            HostConfig { hostnqn: "nqn.2014-08.org.example:other".to_owned(), ..host() },
            ctrl(),
            Reason::FAILED,
            false,
            "another secret",
        ),
        case(
            HostConfig { controller_key: Some(wrong()), ..host() },
            ctrl(),
            Reason::FAILED,
            true,
            "--dhchap-ctrl-secret",
        ),
        case(
            HostConfig { controller_key: Some(wrong()), ..host() },
            ControllerConfig { controller_key: None, ..ctrl() },
            Reason::FAILED,
            false,
            "--dhchap-ctrl-secret",
        ),
        case(
            HostConfig { hashes: vec![Hash::Sha512], ..host() },
            ctrl(),
            Reason::HASH_NOT_USABLE,
            false,
            "Sha256",
        ),
        case(
            HostConfig { groups: vec![DhGroup::Ffdhe2048], ..host() },
            ctrl(),
            Reason::GROUP_NOT_USABLE,
            false,
            "Null",
        ),
        case(concatenated(), ctrl(), Reason::CONCATENATION_MISMATCH, false, "secure channel"),
        case(
            concatenated(),
            ControllerConfig { concatenation: Concatenation::Replace, ..ctrl() },
            Reason::CONCATENATION_MISMATCH,
            false,
            "secure channel",
        ),
        case(
            concatenated(),
            ControllerConfig { concatenation: Concatenation::New, ..ctrl() },
            Reason::GROUP_NOT_USABLE,
            false,
            "[]",
        ),
    ];
    for Case { host, controller, reason, by_host, word } in cases {
        let (host, controller) = talk(host, controller, |_, _| {});
        let (host, controller) = (failed(host), failed(controller));
        assert_eq!((host.reason, controller.reason), (reason, reason), "{host} / {controller}");
        assert_eq!((host.is_peers, controller.is_peers), (!by_host, by_host));
        let text = if by_host { host.to_string() } else { controller.to_string() };
        let advice = ["penstock key export", "--auth-hash", "--auth-group", "tls=allowed"];
        let host = host.to_string();
        assert!(advice.iter().any(|advice| host.contains(advice)), "what to run: {host}");
        assert!(text.contains(word) && !text.contains('\n'), "{text}");
    }
}

#[test]
fn our_own_challenge_is_not_answered() {
    let host = HostConfig { controller_key: Some(key(KeyHash::Sha512, 2)), ..host_config() };
    let mut challenge = Vec::new();
    let (_, controller) = talk(host, controller_config(), |number, message| match number {
        1 => challenge = message[16..48].to_vec(),
        2 => message[48..80].copy_from_slice(&challenge),
        _ => {}
    });
    assert!(failed(controller).to_string().contains("our own challenge"));
}

#[test]
fn weak_values_are_refused_by_both() {
    let controller =
        || ControllerConfig { groups: vec![DhGroup::Ffdhe2048], ..controller_config() };
    for fill in [0x00, 0xFF] {
        let (host, _) = talk(host_config(), controller(), |number, message| {
            if number == 1 {
                message[48..].fill(fill);
            }
        });
        assert!(failed(host).to_string().contains("gives the secret away"));
        let (_, controller) = talk(host_config(), controller(), |number, message| {
            if number == 2 {
                message[80..].fill(fill);
            }
        });
        assert!(failed(controller).to_string().contains("gives the secret away"));
    }
}

#[test]
fn messages_out_of_order_end_it() {
    let mut host = Host::new(host_config(), &random(3));
    let negotiate = host.next_message().unwrap();
    let mut controller = Controller::new(controller_config(), &random(4));
    assert!(controller.next_message().is_none(), "the host begins");
    controller.on_message(&negotiate);
    controller.on_message(&negotiate);
    assert_eq!(failed(controller.status().clone()).reason, Reason::INCORRECT_MESSAGE);
    let failure = controller.next_message().unwrap();
    assert_eq!(failure[..2], [0, 0xF1]);
    // What comes later changes nothing.
    controller.on_message(&negotiate);
    assert!(controller.next_message().is_none());
    assert_eq!(failed(controller.status().clone()).reason, Reason::INCORRECT_MESSAGE);

    host.on_message(&failure);
    assert!(failed(host.status().clone()).is_peers);
    assert!(host.next_message().is_none(), "no failure message for one");
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 200, ..Default::default()
    })]

    /// A changed byte is never good for both ends, but where nothing is said in it.
    #[test]
    fn a_changed_byte_is_noticed(number in 0_usize..5, at in 0_usize..112, change in 1_u8..) {
        let host = HostConfig { controller_key: Some(key(KeyHash::Sha512, 2)), ..host_config() };
        let mut is_changed = false;
        let (host, controller) = talk(host, controller_config(), |n, message| {
            if n == number && at < message.len() {
                message[at] ^= change;
                is_changed = true;
            }
        });
        let is_good = matches!(host, Status::Done(_)) && matches!(controller, Status::Done(_));
        if is_good && is_changed {
            // Reserved bytes, offers that are not taken, and the count of descriptors.
            let is_free = match number {
                0 => true,
                1 => [2, 3, 7].contains(&at),
                2 => [2, 3, 7, 9].contains(&at),
                3 => [2, 3, 7].contains(&at) || (9..16).contains(&at),
                _ => [2, 3].contains(&at) || at >= 6,
            };
            prop_assert!(is_free, "message {number}, byte {at}");
        }
    }

    #[test]
    fn any_message_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut host = Host::new(host_config(), &random(3));
        let mut controller = Controller::new(controller_config(), &random(4));
        prop_assert!(host.on_message(&bytes).is_none());
        prop_assert!(controller.on_message(&bytes).is_none());
        prop_assert!(!matches!(host.status(), Status::Done(_)));
        prop_assert!(!matches!(controller.status(), Status::Done(_)));
    }
}
