use proptest::prelude::*;

use super::*;
use crate::testing::hex;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:f8131bac-cdef-4165-866b-5998c1e67890";
const SUB: &str = "nqn.2024-05.io.example:subsys1";

fn key(len: u8, hash: KeyHash) -> TlsKey {
    TlsKey::new(hash, &(0..len).collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{e}"))
}

fn retained(key: &TlsKey, derivation: Derivation) -> RetainedKey {
    RetainedKey::new(key, HOST, derivation).unwrap_or_else(|e| panic!("{e}"))
}

fn psk(key: &RetainedKey, version: IdentityVersion) -> Psk {
    key.psk(version, HOST, SUB).unwrap_or_else(|e| panic!("{e}"))
}

/// As nvme-cli 2.16 (with and without `--compat`), nvme-cli 2.13 and SPDK derive from bytes 00..1f.
#[test]
fn sha256_vectors() {
    use Derivation::{Libnvme, Rfc8446};
    use IdentityVersion::{V0, V1};

    let key = key(32, KeyHash::Sha256);
    let standard = retained(&key, Rfc8446);
    let want = "0ed7eaea3ec0066cf043dba312df13fa09aeaf515c36830ae02257aa10774127";
    assert_eq!(standard.secret().expose(), hex(want));

    let v0 = psk(&standard, V0);
    assert_eq!(v0.identity(), format!("NVMe0R01 {HOST} {SUB}"));
    let want = "1e12553f6ea4d6d4e45716eb02ab67c987af3fde0a4f6b91f322e4d529acb641";
    assert_eq!(v0.secret().expose(), hex(want));
    let v1 = psk(&standard, V1);
    let digest = "2WOgoFMikZlgOCICXQXniPoamD4saTGGcsLEMVTIgGI=";
    assert_eq!(v1.identity(), format!("NVMe1R01 {HOST} {SUB} {digest}"));
    let want = "43769f251062aaba4fa07c38a05cf7c4be5222781d5537d0043e5f550d4cefd6";
    assert_eq!(v1.secret().expose(), hex(want));

    let compat = retained(&key, Libnvme);
    let v0 = psk(&compat, V0);
    assert_eq!(v0.identity(), format!("NVMe0R01 {HOST} {SUB}"), "the identity tells no difference");
    let want = "2b845175fb2e62c19877c8e4d6144a21f3c9269f3cbe720b0109c5a1aaea0fd8";
    assert_eq!(v0.secret().expose(), hex(want));
    let v1 = psk(&compat, V1);
    let digest = "F7QleqpsGX+2l4e0CnESlnjB47Bn1AkKr/MtoepPBOQ=";
    assert_eq!(v1.identity(), format!("NVMe1R01 {HOST} {SUB} {digest}"));
    let want = "9d7364b74ced3199af77907e167f74f31c363f20a2432c6c0ab2b6e1b2c9054a";
    assert_eq!(v1.secret().expose(), hex(want));
}

/// From bytes 00..2f.
#[test]
fn sha384_vectors() {
    let key = key(48, KeyHash::Sha384);
    let standard = retained(&key, Derivation::Rfc8446);
    let want = "31170ea302768863a19513e4907740677af86c45e0f85ede80cb8c5de038092d\
                d22bbcee62f8f70237136b48beee3335";
    assert_eq!(standard.secret().expose(), hex(want));
    let v0 = psk(&standard, IdentityVersion::V0);
    assert_eq!(v0.identity(), format!("NVMe0R02 {HOST} {SUB}"));
    let want = "9474a5eeecb9901aac4db83549dc267c22c59980dbd574037d423e9468c25a1a\
                c3d09cc1650ea300fc1a17751d9db042";
    assert_eq!(v0.secret().expose(), hex(want));
    let v1 = psk(&standard, IdentityVersion::V1);
    assert_eq!(v1.secret().expose()[..4], hex("cdf04225"));
    let compat = psk(&retained(&key, Derivation::Libnvme), IdentityVersion::V0);
    assert_eq!(compat.secret().expose()[..4], hex("993fbf6b"));
}

/// Hash 00: the retained key is the configured one, so that identities of version 1 agree too.
#[test]
fn without_a_hash_the_key_is_retained_as_it_is() {
    let key = key(32, KeyHash::None);
    let keys = Derivation::ALL.map(|d| retained(&key, d));
    assert!(keys.iter().all(|k| k.secret() == key.secret()));
    let [a, b] = keys.map(|k| psk(&k, IdentityVersion::V1));
    assert_eq!(a.identity(), b.identity());
    assert!(a.secret() != b.secret());
}

/// The key's own hash need not be its suite's.
#[test]
fn the_length_decides_the_suite() {
    let key = key(48, KeyHash::Sha256);
    let retained = retained(&key, Derivation::Rfc8446);
    assert_eq!(retained.secret().expose().len(), 48);
    assert_eq!(retained.suite(), Suite::Aes256GcmSha384);
}

#[test]
fn names_that_would_be_ambiguous_or_too_long_are_refused() {
    let key = key(32, KeyHash::Sha256);
    let long = "n".repeat(224);
    for name in ["", "nqn a", "nqn\0", &long] {
        let none = RetainedKey::new(&key, name, Derivation::Rfc8446).err();
        assert_eq!(none, Some(PskError::Name), "{name:?}");
    }
    let (host, sub) = ("h".repeat(122), "s".repeat(123));
    let (standard, compat) =
        (retained(&key, Derivation::Rfc8446), retained(&key, Derivation::Libnvme));
    assert!(standard.psk(IdentityVersion::V0, &host, &sub).is_ok(), "9 + 122 + 1 + 123 = 255");
    let sub = format!("{sub}s");
    let none = standard.psk(IdentityVersion::V0, &host, &sub).err();
    assert_eq!(none, Some(PskError::IdentityTooLong));
    assert!(compat.psk(IdentityVersion::V0, &host, &sub).is_ok());
    assert!(standard.psk(IdentityVersion::V1, &host, &sub).is_ok());
}

#[test]
fn identities_are_read_strictly() {
    let v1 = psk(&retained(&key(48, KeyHash::None), Derivation::Rfc8446), IdentityVersion::V1);
    let read = Identity::parse(v1.identity().as_bytes()).unwrap();
    assert_eq!((read.version, read.is_generated), (IdentityVersion::V1, false));
    assert_eq!((read.suite, read.hostnqn, read.subnqn), (Suite::Aes256GcmSha384, HOST, SUB));
    assert_eq!(read.digest.map(str::len), Some(64));
    let with_nul = Identity::parse(b"NVMe0G01 a b\0").unwrap();
    assert!(with_nul.is_generated && with_nul.subnqn == "b" && with_nul.digest.is_none());
    for text in [
        "",
        "NVMe",
        "NVMe0R01",
        "NVMe0R01 a",
        "NVMe0R01 a ",
        "NVMe0R01  b",
        "NVMe0R01 a b c",
        "NVMe0R03 a b",
        "NVMe0R10 a b",
        "NVMe2R01 a b",
        "NVMe0X01 a b",
        "nvme0R01 a b",
        "NVMe1R01 a b",
        "NVMe1R01 a b ",
        "NVMe1R01 a b c d",
        " NVMe0R01 a b",
        "NVMe0R01 a b\0\0",
    ] {
        assert_eq!(Identity::parse(text.as_bytes()), None, "{text:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// What is derived names whom it was derived for.
    #[test]
    fn identities_round_trip(
        host in "[!-~]{1,100}",
        sub in "[!-~]{1,100}",
        wide in any::<bool>(),
        v1 in any::<bool>(),
    ) {
        let key = key(if wide { 48 } else { 32 }, KeyHash::Sha256);
        let version = if v1 { IdentityVersion::V1 } else { IdentityVersion::V0 };
        let retained = RetainedKey::new(&key, &host, Derivation::Rfc8446).ok().unwrap();
        let psk = retained.psk(version, &host, &sub).ok().unwrap();
        let read = Identity::parse(psk.identity().as_bytes()).unwrap();
        prop_assert_eq!((read.hostnqn, read.subnqn), (&host[..], &sub[..]));
        prop_assert_eq!((read.version, read.suite), (version, psk.suite()));
    }

    #[test]
    fn any_identity_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = Identity::parse(&bytes);
    }
}
