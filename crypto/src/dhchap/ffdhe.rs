//! Diffie-Hellman over the groups of RFC 7919, appendix A.

use std::sync::OnceLock;

use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};
use zeroize::Zeroizing;

use crate::kdf::Hash;
use crate::secret::Secret;

/// A group, by the identifier of DH-HMAC-CHAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DhGroup {
    /// No exchange.
    Null,
    /// 2048 bits.
    Ffdhe2048,
    /// 3072 bits.
    Ffdhe3072,
    /// 4096 bits.
    Ffdhe4096,
    /// 6144 bits.
    Ffdhe6144,
    /// 8192 bits.
    Ffdhe8192,
}

/// A group's definition: p = 2^b - 2^(b-64) + ([2^(b-130) e] + x) 2^64 - 1.
struct Definition {
    bits: u32,
    x: u64,
    /// Length of private exponents: at least twice the security that RFC 7919 gives the group.
    private_len: usize,
}

const DEFINITIONS: [Definition; 5] = [
    Definition { bits: 2048, x: 560_316, private_len: 32 },
    Definition { bits: 3072, x: 2_625_351, private_len: 36 },
    Definition { bits: 4096, x: 5_736_041, private_len: 42 },
    Definition { bits: 6144, x: 15_705_020, private_len: 48 },
    Definition { bits: 8192, x: 10_965_728, private_len: 52 },
];

/// Random bytes that a private exponent is made of.
pub(super) const PRIVATE_LEN_MAX: usize = 52;
/// Largest public value.
pub(super) const PUBLIC_LEN_MAX: usize = 1024;

impl DhGroup {
    /// All, from none to the strongest.
    pub const ALL: [DhGroup; 6] = [
        DhGroup::Null,
        DhGroup::Ffdhe2048,
        DhGroup::Ffdhe3072,
        DhGroup::Ffdhe4096,
        DhGroup::Ffdhe6144,
        DhGroup::Ffdhe8192,
    ];

    pub(super) fn id(self) -> u8 {
        self as u8
    }

    pub(super) fn from_id(id: u8) -> Option<DhGroup> {
        DhGroup::ALL.get(usize::from(id)).copied()
    }

    fn definition(self) -> Option<&'static Definition> {
        DEFINITIONS.get((self as usize).checked_sub(1)?)
    }

    /// Length of a public value in bytes.
    pub(super) fn public_len(self) -> usize {
        self.definition().map_or(0, |d| d.bits as usize / 8)
    }

    fn params(self) -> Option<&'static BoxedMontyParams> {
        static PARAMS: [OnceLock<BoxedMontyParams>; 5] = [const { OnceLock::new() }; 5];
        let definition = self.definition()?;
        let cell = &PARAMS[self as usize - 1];
        Some(cell.get_or_init(|| {
            let prime = BoxedUint::from_be_slice(&prime(definition), definition.bits);
            let odd = Odd::new(prime.expect("as many bytes as bits")).into_option();
            BoxedMontyParams::new(odd.expect("ends with 64 ones"))
        }))
    }
}

/// The prime, big-endian.
fn prime(definition: &Definition) -> Vec<u8> {
    const LIMB: usize = 64;
    let limbs = definition.bits as usize / LIMB;
    // e as a fixed-point number with 64 bits more than needed, by its series: the sum of 1/n!. It
    // has as many limbs as the prime: 2 bits before the point, b-130 and 64 behind it.
    let point = definition.bits as usize - 130 + LIMB;
    let mut term = vec![0_u64; limbs];
    term[point / LIMB] = 1 << (point % LIMB);
    let mut e = term.clone();
    for n in 1_u64.. {
        let mut rest = 0_u128;
        for limb in term.iter_mut().rev() {
            let value = rest << LIMB | u128::from(*limb);
            *limb = (value / u128::from(n)) as u64;
            rest = value % u128::from(n);
        }
        if term.iter().all(|limb| *limb == 0) {
            break;
        }
        let mut carry = false;
        for (sum, limb) in e.iter_mut().zip(&term) {
            let (value, first) = sum.overflowing_add(*limb);
            let (value, second) = value.overflowing_add(u64::from(carry));
            (*sum, carry) = (value, first | second);
        }
    }
    // [2^(b-130) e] without the limb of guard bits, plus x; below and above it 64 ones. The lower
    // ones are the definition's -1, which borrows.
    let mut middle = e[1..].to_vec();
    let mut carry = definition.x - 1;
    for limb in &mut middle {
        let (sum, overflow) = limb.overflowing_add(carry);
        (*limb, carry) = (sum, u64::from(overflow));
    }
    // The middle has b-128 bits; the limb above it was never filled.
    middle.truncate(limbs - 2);
    let words = [&[u64::MAX], &middle[..], &[u64::MAX]].concat();
    words.iter().rev().flat_map(|word| word.to_be_bytes()).collect()
}

/// An exponentiation or two: milliseconds, for a thread that may take them.
pub struct DhTask {
    group: DhGroup,
    hash: Hash,
    private: Zeroizing<[u8; PRIVATE_LEN_MAX]>,
    wants_public: bool,
    peer: Option<Vec<u8>>,
}

/// What came out of a [`DhTask`].
pub struct DhDone {
    /// g^x, big-endian, in the group's length.
    pub(super) public: Option<Vec<u8>>,
    /// The hash of the peer's value to the x.
    pub(super) session: Option<Secret>,
}

impl DhTask {
    /// `None` without a group, or if the peer's value is none of the group.
    pub(super) fn new(
        group: DhGroup,
        hash: Hash,
        private: &[u8; PRIVATE_LEN_MAX],
        wants_public: bool,
        peer: Option<&[u8]>,
    ) -> Option<DhTask> {
        if peer.is_some_and(|value| !is_public_value(group, value)) {
            return None;
        }
        let private = Zeroizing::new(*private);
        group.definition()?;
        Some(DhTask { group, hash, private, wants_public, peer: peer.map(<[u8]>::to_vec) })
    }

    /// Does it.
    pub fn run(self) -> DhDone {
        let public = self.wants_public.then(|| self.power(&[2]).to_vec());
        let session = self.peer.as_ref().map(|value| {
            // "The shared secret is padded to the length of the prime", and hashed.
            self.hash.digest(&[&self.power(value)])
        });
        DhDone { public, session }
    }

    /// `base` to the private exponent, in a time that depends on the group only.
    fn power(&self, base: &[u8]) -> Zeroizing<Box<[u8]>> {
        let (params, definition) = self
            .group
            .params()
            .zip(self.group.definition())
            .expect("a task without a group is not made");
        let private = &self.private[..definition.private_len];
        let bits = u32::try_from(definition.private_len * 8).expect("a few hundred");
        let exponent = BoxedUint::from_be_slice(private, bits).expect("as many bytes as bits");
        let exponent = Zeroizing::new(exponent);
        let base = BoxedUint::from_be_slice(base, definition.bits).expect("not longer than p");
        let power = BoxedMontyForm::new(base, params).pow_bounded_exp(&exponent, bits).retrieve();
        Zeroizing::new(Zeroizing::new(power).to_be_bytes())
    }
}

/// 1 < `value` < p - 1, in the group's length.
pub(super) fn is_public_value(group: DhGroup, value: &[u8]) -> bool {
    let Some((params, definition)) = group.params().zip(group.definition()) else { return false };
    if value.len() != group.public_len() {
        return false;
    }
    let Ok(value) = BoxedUint::from_be_slice(value, definition.bits) else { return false };
    let one = BoxedUint::one_with_precision(definition.bits);
    let most = params.modulus().as_ref().wrapping_sub(&one);
    value > one && value < most
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of the primes as OpenSSL 3.0 prints them (`openssl genpkey -genparam -algorithm DH
    /// -pkeyopt group:ffdhe2048 -text` and so on).
    #[test]
    fn primes() {
        let want = PRIME_HASHES;
        for (definition, want) in DEFINITIONS.iter().zip(want) {
            let prime = prime(definition);
            assert_eq!(prime.len() * 8, definition.bits as usize);
            assert!(prime.starts_with(&[0xFF; 8]) && prime.ends_with(&[0xFF; 8]));
            let hash = Hash::Sha256.digest(&[&prime]);
            assert_eq!(hash.expose(), crate::testing::hex(want), "{} bits", definition.bits);
        }
    }

    const PRIME_HASHES: [&str; 5] = [
        "9cd3b7f336872f46c09428d1bbc19877a4d440512cda8d1c1cf0cd6e33698966",
        "0eaf67db3a839156d5013494a5318a772b5697d270d721f37f092efc69ea5a17",
        "4648414224ac881b3d0dc59b466f96d06a558278776807797ecf1f66ff397b3e",
        "227ac9066b3ddd9e193670cda2388fa884f65ba0cf98b742d1fe77a6687c79c7",
        "770b14efaf6f049929c523113b3fa99a8d11dab1b18af3609590122075d19833",
    ];

    #[test]
    fn both_ends_agree_in_every_group() {
        for group in &DhGroup::ALL[1..] {
            let (a, b) = ([0x5A; PRIVATE_LEN_MAX], [0xA7; PRIVATE_LEN_MAX]);
            let task = |private, peer: Option<&[u8]>| {
                DhTask::new(*group, Hash::Sha384, private, peer.is_none(), peer).unwrap().run()
            };
            let (public_a, public_b) = (task(&a, None).public, task(&b, None).public);
            let (public_a, public_b) = (public_a.unwrap(), public_b.unwrap());
            assert_eq!(public_a.len(), group.public_len());
            let session = task(&a, Some(&public_b)).session.unwrap();
            assert!(session == task(&b, Some(&public_a)).session.unwrap());
            assert_eq!(session.expose().len(), 48);
        }
        let none = DhTask::new(DhGroup::Null, Hash::Sha256, &[1; PRIVATE_LEN_MAX], true, None);
        assert!(none.is_none());
    }

    #[test]
    fn values_that_give_the_secret_away_are_refused() {
        let group = DhGroup::Ffdhe2048;
        let prime = prime(&DEFINITIONS[0]);
        let mut value = vec![0; 256];
        assert!(!is_public_value(group, &value), "0");
        value[255] = 1;
        assert!(!is_public_value(group, &value), "1");
        value[255] = 2;
        assert!(is_public_value(group, &value), "2");
        assert!(!is_public_value(group, &value[1..]) && !is_public_value(group, &[0; 257]));
        let mut value = prime.clone();
        assert!(!is_public_value(group, &value), "p");
        value[255] -= 1;
        assert!(!is_public_value(group, &value), "p - 1");
        value[255] -= 1;
        assert!(is_public_value(group, &value), "p - 2");
        assert!(!is_public_value(group, &[0xFF; 256]), "more than p");
        let task = DhTask::new(group, Hash::Sha256, &[1; PRIVATE_LEN_MAX], false, Some(&prime));
        assert!(task.is_none());
    }
}
