use std::collections::HashMap;
use std::sync::Arc;

use super::support::*;
use crate::psk::{Derivation, IdentityVersion, Suite};
use crate::tls::{AlertCode, Cause, Progress, Role, Server, Unknown, Used};

#[test]
fn both_suites_versions_and_derivations() {
    for (len, suite, group) in
        [(32, Suite::Aes128GcmSha256, "X25519MLKEM768"), (48, Suite::Aes256GcmSha384, "MLKEM1024")]
    {
        for version in [IdentityVersion::V0, IdentityVersion::V1] {
            for way in Derivation::ALL {
                let key = key(len, 0);
                let psk = psk(&key, version, way);
                let ends = talk(client(&psk), server(&[key]), usize::MAX);
                let (client, server) = (ends.client.unwrap(), ends.server.unwrap());
                assert_eq!((client.suite, server.suite), (suite, suite));
                assert_eq!(server.identity, psk.identity());
                assert_eq!(server.derivation, way, "the proof tells how the key was derived");
                assert_eq!(client.group, group, "a post-quantum group, as both have it");
                assert!(
                    client.tx.secret == server.rx.secret && client.rx.secret == server.tx.secret
                );
                assert!(client.tx.secret != client.rx.secret);
                assert_eq!((client.tx.seq, client.rx.seq), (server.rx.seq, server.tx.seq));
            }
        }
    }
}

#[test]
fn the_key_that_the_client_has_is_chosen_among_several() {
    let keys = [key(32, 1), key(48, 2), key(32, 3), key(32, 4)];
    for key in &keys {
        for way in Derivation::ALL {
            // Version 0: all keys have one identity.
            let psk = psk(key, IdentityVersion::V0, way);
            let ends = talk(client(&psk), server(&keys), usize::MAX);
            assert_eq!(ends.server.unwrap().derivation, way);
            assert!(ends.client.is_ok());
        }
    }
}

#[test]
fn any_cut_of_the_stream_is_the_same() {
    let key = key(48, 0);
    let psk = psk(&key, IdentityVersion::V1, Derivation::Rfc8446);
    for piece in [1, 2, 3, 5, 7, 64, 100, 1000] {
        let ends = talk(client(&psk), server(std::slice::from_ref(&key)), piece);
        assert!(ends.client.is_ok() && ends.server.is_ok(), "pieces of {piece}");
    }
}

#[test]
fn what_follows_the_handshake_is_left_over() {
    let key = key(32, 0);
    let psk = psk(&key, IdentityVersion::V1, Derivation::Rfc8446);
    let (mut client, mut server) = (client(&psk), server(&[key]));
    server.feed(&client.take()).unwrap();
    assert_eq!(client.feed(&server.take()).unwrap(), Progress::Done);
    let mut flight = client.take();
    let mut host =
        crate::tls::Session::new(&client.finish().unwrap(), crate::tls::KeyUpdates::Auto);
    flight.extend(seal(&mut host, b"first data"));
    assert_eq!(server.feed(&flight).unwrap(), Progress::Done);
    let extra = seal(&mut host, b", second data");
    assert_eq!(server.feed(&extra).unwrap(), Progress::Done);
    let done = server.finish().unwrap();
    let mut target = crate::tls::Session::new(&done, crate::tls::KeyUpdates::Auto);
    let (plain, result) = open(&mut target, &done.leftover);
    assert_eq!((plain.as_slice(), result), (&b"first data, second data"[..], Ok(())));
}

/// The library's serialised connection, whose layout is read: a new version has to be looked at.
#[test]
fn the_exported_state_has_the_known_layout() {
    let key = key(48, 0);
    let psk = psk(&key, IdentityVersion::V1, Derivation::Rfc8446);
    let ends = talk(client(&psk), server(&[key]), usize::MAX);
    // Two ends that disagree about the layout would not understand each other's records; that both
    // begin at 0 says that the numbers are where they are looked for.
    let (client, server) = (ends.client.unwrap(), ends.server.unwrap());
    assert_eq!((client.tx.seq, client.rx.seq, server.tx.seq, server.rx.seq), (0, 0, 0, 0));
    assert_eq!(client.tx.secret.expose().len(), 48);
}

#[test]
fn refusals_are_explained_and_told() {
    let (good, other, long) = (key(32, 0), key(32, 9), key(48, 0));
    let none = crate::key::TlsKey::new(crate::key::KeyHash::None, &[7; 32]).ok().unwrap();
    let v0 = |key| psk(key, IdentityVersion::V0, Derivation::Rfc8446);
    let v1 = |key| psk(key, IdentityVersion::V1, Derivation::Rfc8446);

    // Same identity, other key.
    let ends = talk(client(&v0(&good)), server(std::slice::from_ref(&other)), usize::MAX);
    let failure = ends.server.err().unwrap();
    assert_eq!(failure.alert, Some(AlertCode::DECRYPT_ERROR));
    assert!(
        matches!(&failure.cause, Cause::WrongKey { tried, .. } if tried[..] == Derivation::ALL)
    );
    let text = failure.to_string();
    for want in [v0(&good).identity(), "RFC 8446, libnvme < 1.16", "2 keys", "penstock key export"]
    {
        assert!(text.contains(want), "{text}");
    }
    assert!(!text.contains('\n'));
    let heard = ends.client.err().unwrap();
    assert!(matches!(&heard.cause, Cause::Alert { code: AlertCode::DECRYPT_ERROR, .. }), "{heard}");
    assert!(heard.to_string().contains("derived in the other way"), "{heard}");

    // Another digest.
    let ends = talk(client(&v1(&good)), server(std::slice::from_ref(&other)), usize::MAX);
    let failure = ends.server.err().unwrap();
    assert_eq!(failure.alert, Some(AlertCode::UNKNOWN_PSK_IDENTITY));
    assert!(failure.to_string().contains(v1(&other).identity()), "{failure}");
    assert!(failure.to_string().contains(v1(&good).identity()), "{failure}");
    assert!(matches!(failure.cause, Cause::OtherIdentity { .. }));

    // No key of that suite, no key any more, no such host, and keys that work all the same.
    let only_long = server(&[long]);
    for (server, why) in [
        (only_long, Unknown::Key),
        (server(&[]), Unknown::Expired),
        (Server::new(Arc::new(Store(HashMap::new()))).unwrap(), Unknown::Host),
    ] {
        let ends = talk(client(&v0(&good)), server, usize::MAX);
        let failure = ends.server.err().unwrap();
        assert!(matches!(&failure.cause, Cause::Unknown { why: w, .. } if *w == why), "{failure}");
        assert_eq!(failure.alert, Some(AlertCode::UNKNOWN_PSK_IDENTITY));
        let heard = ends.client.err().unwrap();
        assert!(matches!(
            &heard.cause,
            Cause::Alert { code: AlertCode::UNKNOWN_PSK_IDENTITY, used: Some(_), .. }
        ));
    }
    assert!(talk(client(&v1(&none)), server(&[none]), 9).server.is_ok());
}

/// Each line says what was offered and expected, and what to run; none has a line break.
#[test]
fn every_refusal_says_what_to_do() {
    let psk = psk(&key(32, 0), IdentityVersion::V1, Derivation::Libnvme);
    let identity = psk.identity();
    let used =
        Used { identity: identity.to_owned(), suite: psk.suite(), derivation: psk.derivation() };
    let received = || identity.to_owned();
    let export = "`penstock key export`";
    let alert =
        |code: u8, role| Cause::Alert { code: AlertCode(code), role, used: Some(used.clone()) };
    let (host, target) = (Role::Client, Role::Server);
    let generate = format!("penstock key generate --host {HOST}`");
    let import = format!("penstock key import --host {HOST}`");
    let cases: Vec<(Cause, Vec<&str>)> = vec![
        (Cause::Plaintext { first: 0, role: target }, vec!["00h", "nvme connect --tls", export]),
        (Cause::Plaintext { first: 1, role: host }, vec!["01h", "without TLS", "a listener"]),
        (Cause::NoPsk, vec!["expected one of `NVMe1R01", export]),
        (Cause::NotNvme { received: "x".to_owned() }, vec!["`x`", "expected `NVMe1R01", export]),
        (
            Cause::Unknown { received: received(), why: Unknown::Host },
            vec![identity, "not registered", &generate, &import, export],
        ),
        (
            Cause::Unknown { received: received(), why: Unknown::Key },
            vec![identity, "no key for this subsystem", &generate, export],
        ),
        (
            Cause::Unknown { received: received(), why: Unknown::Expired },
            vec![identity, "expired", &generate, export],
        ),
        (
            Cause::OtherIdentity {
                received: "other".to_owned(),
                expected: vec![(received(), Derivation::Libnvme)],
            },
            vec!["`other`", "expected", identity, "libnvme < 1.16", "its key is another", export],
        ),
        (
            Cause::WrongKey { received: received(), tried: Derivation::ALL.to_vec() },
            vec![identity, "2 keys", "RFC 8446, libnvme < 1.16", export],
        ),
        // A host that gives up, by what it says.
        (
            alert(51, target),
            vec!["decrypt_error (51)", identity, "libnvme < 1.16", "key has changed", export],
        ),
        (
            alert(40, target),
            vec!["handshake_failure", identity, "TLS_AES_128_GCM_SHA256", "journalctl -u tlshd"],
        ),
        (alert(47, target), vec!["illegal_parameter", "cipher suite or key exchange", export]),
        (alert(42, target), vec!["bad_certificate", "nvme connect --tls", export]),
        (alert(116, target), vec!["certificate_required", "nvme connect --tls", export]),
        (alert(90, target), vec!["user_canceled", "its time was over", export]),
        (alert(80, target), vec!["internal_error", identity, "journalctl -u tlshd", export]),
        (
            Cause::Alert { code: AlertCode(40), role: target, used: None },
            vec!["the host gave up", "handshake_failure", export],
        ),
        // And what a host says of a target; what to run depends on all that it offered, see there.
        (alert(115, host), vec!["the target refused", identity, "it has no key of our identity"]),
        (alert(51, host), vec!["the target refused", identity, "libnvme < 1.16", "differs"]),
        (
            Cause::Suite { agreed: 0x1303, role: target, used: used.clone() },
            vec![identity, "libnvme < 1.16", "1303h", "TLS_AES_128_GCM_SHA256", "--bits", export],
        ),
        (
            Cause::Suite { agreed: 0x1302, role: host, used: used.clone() },
            vec!["the target", identity, "1302h", "TLS_AES_128_GCM_SHA256", "--bits"],
        ),
        (Cause::TooLong { role: target }, vec!["16384 bytes", "TLS 1.3", "tlshd", export]),
        (Cause::TooLong { role: host }, vec!["the target sent", "a listener of NVMe/TCP"]),
        (
            Cause::Protocol { what: "words".to_owned(), role: target, used: None },
            vec!["with the host", "words", "TLS 1.3 with a pre-shared key", "tlshd", export],
        ),
        (
            Cause::Protocol { what: "words".to_owned(), role: host, used: Some(used.clone()) },
            vec!["with the target", identity, "words", "a listener of NVMe/TCP"],
        ),
    ];
    for (cause, wanted) in cases {
        let text = cause.to_string();
        for want in wanted {
            assert!(text.contains(want), "{want}: {text}");
        }
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
    }
}

/// A host that gives up after the target's answer: the target knows which key it had.
#[test]
fn a_host_that_gives_up_is_named() {
    let key = key(32, 0);
    let psk = psk(&key, IdentityVersion::V0, Derivation::Libnvme);
    let (mut host, mut target) = (client(&psk), server(std::slice::from_ref(&key)));
    assert_eq!(target.feed(&host.take()).unwrap(), Progress::Running);
    // "It sends the alert in the clear if it has no keys yet" (RFC 8446, section 6).
    let failure = target.feed(&AlertCode::HANDSHAKE_FAILURE.plain_record()).unwrap_err();
    let used = match &failure.cause {
        Cause::Alert { code: AlertCode::HANDSHAKE_FAILURE, role: Role::Server, used } => used,
        other => panic!("{other:?}"),
    };
    let used = used.as_ref().expect("a key was taken");
    assert_eq!((used.identity.as_str(), used.derivation), (psk.identity(), Derivation::Libnvme));
}

/// A first flight of which the extensions are these bytes.
fn hello(extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    // No session, one suite, no compression.
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    body.extend(extensions);
    let mut record = vec![22, 3, 1];
    record.extend((body.len() as u16 + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend((body.len() as u16).to_be_bytes());
    record.extend(body);
    record
}

#[test]
fn who_speaks_another_tls_or_a_broken_one_is_told_what_is_wrong() {
    // supported_versions: TLS 1.2 alone; TLS 1.3, and no pre-shared key; a list longer than the message.
    let old: &[u8] = &[0, 7, 0, 43, 0, 3, 2, 3, 3];
    let without_key: &[u8] = &[0, 7, 0, 43, 0, 3, 2, 3, 4];
    let broken: &[u8] = &[0, 99, 0, 43, 0, 3, 2, 3, 3];
    for (extensions, alert) in [
        (old, AlertCode::PROTOCOL_VERSION),
        (without_key, AlertCode::HANDSHAKE_FAILURE),
        (broken, AlertCode::DECODE_ERROR),
    ] {
        let mut target = server(&[key(32, 0)]);
        let failure = target.feed(&hello(extensions)).unwrap_err();
        assert_eq!(failure.alert, Some(alert), "{failure}");
        assert_eq!(target.take(), alert.plain_record());
    }
}

#[test]
fn plaintext_is_recognised() {
    let mut icreq = [0; 128];
    icreq[2] = 128;
    let mut target = server(&[key(32, 0)]);
    let failure = target.feed(&icreq).unwrap_err();
    assert_eq!(failure.cause, Cause::Plaintext { first: 0, role: Role::Server });
    assert!(failure.to_string().contains("nvme connect --tls"), "{failure}");
    assert!(failure.alert.is_none() && target.take().is_empty(), "nothing it would understand");
    assert_eq!(target.feed(&icreq).unwrap_err().cause, failure.cause, "it stays failed");

    let psk = psk(&key(32, 0), IdentityVersion::V0, Derivation::Rfc8446);
    let mut host = client(&psk);
    let failure = host.feed(&[1; 8]).unwrap_err();
    assert_eq!(failure.cause, Cause::Plaintext { first: 1, role: Role::Client });
}

#[test]
fn an_endless_handshake_is_ended() {
    let mut target = server(&[key(32, 0)]);
    // Records of a ClientHello that claims 64000 bytes.
    let mut bytes = vec![22, 3, 1, 0x10, 0, 1, 0, 0xFA, 0];
    bytes.resize(5 + 0x1000, 0);
    let failure = (0..8).find_map(|n| {
        if n > 0 {
            bytes[5..9].fill(0);
        }
        target.feed(&bytes).err()
    });
    let failure = failure.expect("32 KiB are too much");
    assert_eq!(failure.cause, Cause::TooLong { role: Role::Server }, "{failure}");
    assert!(target.take().ends_with(&[2, 50]));
}

/// A handshake may run on another thread than the connection it is for.
#[test]
fn handshakes_can_be_sent() {
    fn is_send<T: Send>() {}
    is_send::<Server>();
    is_send::<crate::tls::Client>();
    is_send::<crate::tls::Session>();
}
