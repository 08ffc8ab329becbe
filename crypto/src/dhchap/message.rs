//! The messages (NVMe Base Specification, "DH-HMAC-CHAP Security Messages").

use std::fmt;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ffdhe::{DhGroup, PUBLIC_LEN_MAX};
use crate::kdf::Hash;

/// Longest message that is sent: a Reply with SHA-512 and the largest group.
pub const MESSAGE_BYTES_MAX: usize = 16 + 2 * 64 + PUBLIC_LEN_MAX;

const COMMON: u8 = 0x00;
const DHCHAP: u8 = 0x01;

const NEGOTIATE: u8 = 0x00;
const CHALLENGE: u8 = 0x01;
const REPLY: u8 = 0x02;
const SUCCESS1: u8 = 0x03;
const SUCCESS2: u8 = 0x04;
const FAILURE2: u8 = 0xF0;
const FAILURE1: u8 = 0xF1;

/// Room for hash and for group identifiers in a protocol descriptor.
const IDS_MAX: usize = 30;

/// What all messages begin with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Head {
    auth_type: u8,
    auth_id: u8,
    reserved: [u8; 2],
    t_id: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawNegotiate {
    head: Head,
    sc_c: u8,
    napd: u8,
    authid: u8,
    reserved: u8,
    halen: u8,
    dhlen: u8,
    hashes: [u8; IDS_MAX],
    groups: [u8; IDS_MAX],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChallenge {
    head: Head,
    hl: u8,
    reserved: u8,
    hashid: u8,
    dhgid: u8,
    dhvlen: U16,
    seqnum: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawReply {
    head: Head,
    hl: u8,
    reserved: u8,
    cvalid: u8,
    reserved2: u8,
    dhvlen: U16,
    seqnum: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuccess1 {
    head: Head,
    hl: u8,
    reserved: u8,
    rvalid: u8,
    reserved2: [u8; 7],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuccess2 {
    head: Head,
    reserved: [u8; 10],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFailure {
    head: Head,
    rescode: u8,
    rescode_exp: u8,
}

const _: () = assert!(size_of::<Head>() == 6);
const _: () = assert!(size_of::<RawNegotiate>() == 8 + 64);
const _: () = assert!(size_of::<RawChallenge>() == 16);
const _: () = assert!(size_of::<RawReply>() == 16);
const _: () = assert!(size_of::<RawSuccess1>() == 16);
const _: () = assert!(size_of::<RawSuccess2>() == 16);
const _: () = assert!(size_of::<RawFailure>() == 8);

/// Why an authentication failed, as the other end is told. A peer may say any value.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub u8);

impl Reason {
    /// A proof does not hold.
    pub const FAILED: Reason = Reason(0x01);
    /// The authentication protocol is not usable.
    pub const PROTOCOL_NOT_USABLE: Reason = Reason(0x02);
    /// Secure channel concatenation is not possible, or required.
    pub const CONCATENATION_MISMATCH: Reason = Reason(0x03);
    /// No hash in common.
    pub const HASH_NOT_USABLE: Reason = Reason(0x04);
    /// No group in common.
    pub const GROUP_NOT_USABLE: Reason = Reason(0x05);
    /// A message does not parse, or has an impossible value.
    pub const INCORRECT_PAYLOAD: Reason = Reason(0x06);
    /// Another message was expected.
    pub const INCORRECT_MESSAGE: Reason = Reason(0x07);

    fn name(self) -> &'static str {
        match self {
            Reason::FAILED => "authentication failed",
            Reason::PROTOCOL_NOT_USABLE => "authentication protocol not usable",
            Reason::CONCATENATION_MISMATCH => "secure channel concatenation mismatch",
            Reason::HASH_NOT_USABLE => "hash function not usable",
            Reason::GROUP_NOT_USABLE => "DH group not usable",
            Reason::INCORRECT_PAYLOAD => "incorrect payload",
            Reason::INCORRECT_MESSAGE => "incorrect protocol message",
            _ => "unknown reason",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:02x}h)", self.name(), self.0)
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A message that parsed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    Negotiate {
        t_id: u16,
        sc_c: u8,
        authid: u8,
        hashes: &'a [u8],
        groups: &'a [u8],
    },
    Challenge {
        t_id: u16,
        hash: u8,
        group: u8,
        seqnum: u32,
        challenge: &'a [u8],
        public: &'a [u8],
    },
    Reply {
        t_id: u16,
        response: &'a [u8],
        /// Of a host that wants a proof, or a key for TLS.
        challenge: Option<&'a [u8]>,
        seqnum: u32,
        public: &'a [u8],
    },
    /// The length is told even if there is no response.
    Success1 {
        t_id: u16,
        hash_len: u8,
        response: Option<&'a [u8]>,
    },
    Success2 {
        t_id: u16,
    },
    Failure1 {
        t_id: u16,
        reason: Reason,
    },
    Failure2 {
        t_id: u16,
        reason: Reason,
    },
}

impl<'a> Message<'a> {
    /// Reads a message. Bytes behind it are ignored: it comes in a buffer of any size.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Message<'a>, Reason> {
        let (head, _) = Head::ref_from_prefix(bytes).map_err(|_| Reason::INCORRECT_PAYLOAD)?;
        let t_id = head.t_id.get();
        match (head.auth_type, head.auth_id) {
            (COMMON, NEGOTIATE) => {
                let (raw, _) = prefix::<RawNegotiate>(bytes)?;
                // More than one descriptor is allowed; ours is the first or none.
                let (halen, dhlen) = (usize::from(raw.halen), usize::from(raw.dhlen));
                let hashes = raw.hashes.get(..halen).ok_or(Reason::INCORRECT_PAYLOAD)?;
                let groups = raw.groups.get(..dhlen).ok_or(Reason::INCORRECT_PAYLOAD)?;
                if raw.napd == 0 {
                    return Err(Reason::PROTOCOL_NOT_USABLE);
                }
                let (sc_c, authid) = (raw.sc_c, raw.authid);
                Ok(Message::Negotiate { t_id, sc_c, authid, hashes, groups })
            }
            (DHCHAP, CHALLENGE) => {
                let (raw, rest) = prefix::<RawChallenge>(bytes)?;
                let (challenge, rest) = split(rest, raw.hl.into())?;
                let (public, _) = split(rest, raw.dhvlen.get().into())?;
                let (hash, group, seqnum) = (raw.hashid, raw.dhgid, raw.seqnum.get());
                Ok(Message::Challenge { t_id, hash, group, seqnum, challenge, public })
            }
            (DHCHAP, REPLY) => {
                let (raw, rest) = prefix::<RawReply>(bytes)?;
                let (response, rest) = split(rest, raw.hl.into())?;
                let (challenge, rest) = split(rest, raw.hl.into())?;
                let (public, _) = split(rest, raw.dhvlen.get().into())?;
                let challenge = flag(raw.cvalid)?.then_some(challenge);
                let seqnum = raw.seqnum.get();
                Ok(Message::Reply { t_id, response, challenge, seqnum, public })
            }
            (DHCHAP, SUCCESS1) => {
                let (raw, rest) = prefix::<RawSuccess1>(bytes)?;
                let response = match flag(raw.rvalid)? {
                    true => Some(split(rest, raw.hl.into())?.0),
                    false => None,
                };
                Ok(Message::Success1 { t_id, hash_len: raw.hl, response })
            }
            (DHCHAP, SUCCESS2) => {
                prefix::<RawSuccess2>(bytes)?;
                Ok(Message::Success2 { t_id })
            }
            (COMMON, FAILURE1) => {
                let (raw, _) = prefix::<RawFailure>(bytes)?;
                Ok(Message::Failure1 { t_id, reason: Reason(raw.rescode_exp) })
            }
            (COMMON, FAILURE2) => {
                let (raw, _) = prefix::<RawFailure>(bytes)?;
                Ok(Message::Failure2 { t_id, reason: Reason(raw.rescode_exp) })
            }
            _ => Err(Reason::INCORRECT_MESSAGE),
        }
    }

    /// Writes the message. Lengths are the caller's, and fit.
    pub(super) fn encode(&self) -> Vec<u8> {
        let head = |auth_type, auth_id, t_id: u16| Head {
            auth_type,
            auth_id,
            reserved: [0; 2],
            t_id: t_id.into(),
        };
        let hl = |hash: &[u8]| u8::try_from(hash.len()).expect("at most 64");
        let dhvlen =
            |value: &[u8]| U16::new(u16::try_from(value.len()).expect("at most the largest group"));
        match *self {
            Message::Negotiate { t_id, sc_c, authid, hashes, groups } => {
                let mut raw = RawNegotiate {
                    head: head(COMMON, NEGOTIATE, t_id),
                    sc_c,
                    napd: 1,
                    authid,
                    reserved: 0,
                    halen: hl(hashes),
                    dhlen: hl(groups),
                    hashes: [0; IDS_MAX],
                    groups: [0; IDS_MAX],
                };
                raw.hashes[..hashes.len()].copy_from_slice(hashes);
                raw.groups[..groups.len()].copy_from_slice(groups);
                raw.as_bytes().to_vec()
            }
            Message::Challenge { t_id, hash, group, seqnum, challenge, public } => {
                let raw = RawChallenge {
                    head: head(DHCHAP, CHALLENGE, t_id),
                    hl: hl(challenge),
                    reserved: 0,
                    hashid: hash,
                    dhgid: group,
                    dhvlen: dhvlen(public),
                    seqnum: seqnum.into(),
                };
                [raw.as_bytes(), challenge, public].concat()
            }
            Message::Reply { t_id, response, challenge, seqnum, public } => {
                let raw = RawReply {
                    head: head(DHCHAP, REPLY, t_id),
                    hl: hl(response),
                    reserved: 0,
                    cvalid: u8::from(challenge.is_some()),
                    reserved2: 0,
                    dhvlen: dhvlen(public),
                    seqnum: seqnum.into(),
                };
                // The challenge has its place whether it is valid or not.
                let none = [0; 64];
                let challenge = challenge.unwrap_or(&none[..response.len()]);
                [raw.as_bytes(), response, challenge, public].concat()
            }
            Message::Success1 { t_id, hash_len, response } => {
                let raw = RawSuccess1 {
                    head: head(DHCHAP, SUCCESS1, t_id),
                    hl: hash_len,
                    reserved: 0,
                    rvalid: u8::from(response.is_some()),
                    reserved2: [0; 7],
                };
                [raw.as_bytes(), response.unwrap_or_default()].concat()
            }
            Message::Success2 { t_id } => {
                let raw = RawSuccess2 { head: head(DHCHAP, SUCCESS2, t_id), reserved: [0; 10] };
                raw.as_bytes().to_vec()
            }
            Message::Failure1 { t_id, reason } => failure(head(COMMON, FAILURE1, t_id), reason),
            Message::Failure2 { t_id, reason } => failure(head(COMMON, FAILURE2, t_id), reason),
        }
    }
}

fn prefix<T>(bytes: &[u8]) -> Result<(&T, &[u8]), Reason>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_prefix(bytes).map_err(|_| Reason::INCORRECT_PAYLOAD)
}

fn split(bytes: &[u8], len: usize) -> Result<(&[u8], &[u8]), Reason> {
    bytes.split_at_checked(len).ok_or(Reason::INCORRECT_PAYLOAD)
}

fn flag(value: u8) -> Result<bool, Reason> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Reason::INCORRECT_PAYLOAD),
    }
}

fn failure(head: Head, reason: Reason) -> Vec<u8> {
    // The only reason code there is; what it was stands in the explanation.
    const AUTHENTICATION_FAILURE: u8 = 0x01;

    let raw = RawFailure { head, rescode: AUTHENTICATION_FAILURE, rescode_exp: reason.0 };
    raw.as_bytes().to_vec()
}

/// The identifier of a hash.
pub(super) fn hash_id(hash: Hash) -> u8 {
    match hash {
        Hash::Sha256 => 1,
        Hash::Sha384 => 2,
        Hash::Sha512 => 3,
    }
}

pub(super) fn hash_from_id(id: u8) -> Option<Hash> {
    [Hash::Sha256, Hash::Sha384, Hash::Sha512].into_iter().find(|hash| hash_id(*hash) == id)
}

/// The first of `ours` that the host offers.
pub(super) fn choose_hash(ours: &[Hash], offered: &[u8]) -> Option<Hash> {
    ours.iter().copied().find(|hash| offered.contains(&hash_id(*hash)))
}

pub(super) fn choose_group(ours: &[DhGroup], offered: &[u8]) -> Option<DhGroup> {
    ours.iter().copied().find(|group| offered.contains(&group.id()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::hex;

    /// By the layouts of the specification, as Linux and SPDK write them.
    #[test]
    fn golden_bytes() {
        let zeros = |n| "00".repeat(n);
        let cases = [
            (
                Message::Negotiate {
                    t_id: 0x1234,
                    sc_c: 0,
                    authid: 1,
                    hashes: &[1, 2, 3],
                    groups: &[0, 1, 2, 3, 4, 5],
                },
                format!(
                    "0000 0000 3412 00 01 01 00 03 06 010203{}000102030405{}",
                    zeros(27),
                    zeros(24)
                ),
            ),
            (
                Message::Challenge {
                    t_id: 0x1234,
                    hash: 1,
                    group: 0,
                    seqnum: 0x0A0B_0C0D,
                    challenge: &[0xC1; 32],
                    public: &[],
                },
                format!("0101 0000 3412 20 00 01 00 0000 0d0c0b0a {}", "c1".repeat(32)),
            ),
            (
                Message::Reply {
                    t_id: 0x1234,
                    response: &[0x11; 48],
                    challenge: Some(&[0xC2; 48]),
                    seqnum: 7,
                    public: &[0xDD; 256],
                },
                format!(
                    "0102 0000 3412 30 00 01 00 0001 07000000 {}{}{}",
                    "11".repeat(48),
                    "c2".repeat(48),
                    "dd".repeat(256)
                ),
            ),
            (
                Message::Reply {
                    t_id: 1,
                    response: &[0x11; 32],
                    challenge: None,
                    seqnum: 0,
                    public: &[],
                },
                format!(
                    "0102 0000 0100 20 00 00 00 0000 00000000 {}{}",
                    "11".repeat(32),
                    zeros(32)
                ),
            ),
            (
                Message::Success1 { t_id: 1, hash_len: 32, response: Some(&[0x22; 32]) },
                format!("0103 0000 0100 20 00 01 {}{}", zeros(7), "22".repeat(32)),
            ),
            (
                Message::Success1 { t_id: 1, hash_len: 64, response: None },
                format!("0103 0000 0100 40 00 00 {}", zeros(7)),
            ),
            (Message::Success2 { t_id: 1 }, format!("0104 0000 0100 {}", zeros(10))),
            (
                Message::Failure1 { t_id: 1, reason: Reason::GROUP_NOT_USABLE },
                "00f1 0000 0100 01 05".to_owned(),
            ),
            (
                Message::Failure2 { t_id: 1, reason: Reason::FAILED },
                "00f0 0000 0100 01 01".to_owned(),
            ),
        ];
        for (message, text) in cases {
            let bytes = hex(&text);
            assert_eq!(message.encode(), bytes, "{message:?}");
            assert_eq!(Message::parse(&bytes).as_ref(), Ok(&message));
            // It may come in a larger buffer, and not in a smaller one.
            let padded = [&bytes[..], &[0; 20]].concat();
            assert_eq!(Message::parse(&padded).as_ref(), Ok(&message));
            for len in 0..bytes.len() {
                assert_eq!(Message::parse(&bytes[..len]), Err(Reason::INCORRECT_PAYLOAD));
            }
            assert!(bytes.len() <= MESSAGE_BYTES_MAX);
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        let zeros = "00".repeat(64);
        for (text, want) in [
            ("0002 0000 0000 0000", Reason::INCORRECT_MESSAGE),
            ("0200 0000 0000 0000", Reason::INCORRECT_MESSAGE),
            (&format!("0000 0000 0000 00 00 01 00 00 00 {zeros}"), Reason::PROTOCOL_NOT_USABLE),
            (&format!("0000 0000 0000 00 01 01 00 1f 00 {zeros}"), Reason::INCORRECT_PAYLOAD),
            (&format!("0000 0000 0000 00 01 01 00 00 ff {zeros}"), Reason::INCORRECT_PAYLOAD),
            (
                &format!("0102 0000 0000 20 00 02 00 0000 00000000 {zeros}"),
                Reason::INCORRECT_PAYLOAD,
            ),
            (&format!("0103 0000 0000 20 00 09 {zeros}"), Reason::INCORRECT_PAYLOAD),
        ] {
            assert_eq!(Message::parse(&hex(text)), Err(want), "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// Whatever parses is what would have been written, up to reserved bytes.
        #[test]
        fn any_bytes_are_answered(
            kind in 0..7_usize,
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let head = [
                [0, NEGOTIATE], [1, CHALLENGE], [1, REPLY], [1, SUCCESS1], [1, SUCCESS2],
                [0, FAILURE1], [0, FAILURE2],
            ][kind];
            let bytes = [&head[..], &bytes].concat();
            if let Ok(message) = Message::parse(&bytes) {
                let again = message.encode();
                prop_assert_eq!(Message::parse(&again), Ok(message));
            }
        }
    }
}
