//! The pre-shared keys that a ClientHello offers, and the proof that its sender has one.
//!
//! RFC 8446, sections 4.1.2 and 4.2.11. The library has parsed and accepted the message before;
//! this reads only what is needed to choose a key, and takes nothing for granted.

use crate::kdf::is_equal;
use crate::psk::Psk;

const PRE_SHARED_KEY: u16 = 41;
const SUPPORTED_VERSIONS: u16 = 43;
const TLS_1_3: [u8; 2] = [3, 4];
const HANDSHAKE_CLIENT_HELLO: u8 = 1;
const RANDOM: std::ops::Range<usize> = 2..34;
/// Identities that are looked at; NVMe hosts offer one.
const OFFERS_MAX: usize = 4;

/// One key that the client claims to have.
pub(super) struct Offer<'a> {
    pub(super) identity: &'a [u8],
    binder: &'a [u8],
}

/// The offers of one ClientHello.
pub(super) struct Offers<'a> {
    pub(super) list: Vec<Offer<'a>>,
    /// The handshake message up to the binders, which is what they prove.
    proven: [&'a [u8]; 2],
    header: [u8; 4],
}

impl<'a> Offers<'a> {
    /// Reads the message body `body`; `None` if it offers no pre-shared key, or is malformed.
    pub(super) fn parse(body: &'a [u8]) -> Option<Offers<'a>> {
        let mut extensions = extensions(body)?;
        let mut last = None;
        while !extensions.is_empty() {
            last = Some((u16(&mut extensions)?, vector16(&mut extensions)?));
        }
        // "The pre_shared_key extension MUST be the last extension in the ClientHello."
        let Some((PRE_SHARED_KEY, mut offered)) = last else { return None };
        let mut identities = vector16(&mut offered)?;
        let proven_len = body.len() - offered.len();
        let mut binders = vector16(&mut offered)?;
        if !offered.is_empty() {
            return None;
        }
        let mut list = Vec::new();
        while !identities.is_empty() && list.len() < OFFERS_MAX {
            let identity = vector16(&mut identities)?;
            take(&mut identities, 4)?;
            list.push(Offer { identity, binder: vector8(&mut binders)? });
        }
        let [_, a, b, c] = u32::try_from(body.len()).ok()?.to_be_bytes();
        let (before, after) = body[..proven_len].split_at(RANDOM.start);
        let after = after.get(RANDOM.len()..)?;
        Some(Offers { list, proven: [before, after], header: [HANDSHAKE_CLIENT_HELLO, a, b, c] })
    }

    /// Whether the client has `psk` too. `random` is the message's, which `body` may lack.
    pub(super) fn is_proven(&self, offer: &Offer<'_>, psk: &Psk, random: &[u8; 32]) -> bool {
        let hash = psk.suite().hash();
        let len = hash.len_bytes();
        let early = hash.extract(psk.secret().expose());
        let empty = hash.digest(&[]);
        let [before, after] = self.proven;
        let transcript = hash.digest(&[&self.header, before, random, after]);
        let binder = hash
            .expand_label(&early, "ext binder", &[empty.expose()], len)
            .and_then(|key| hash.expand_label(&key, "finished", &[], len))
            .map(|key| hash.hmac(key.expose(), &[transcript.expose()]));
        binder.is_some_and(|binder| is_equal(binder.expose(), offer.binder))
    }
}

/// Whether TLS 1.3 is among the versions that the message body `body` offers.
pub(super) fn offers_tls_1_3(body: &[u8]) -> bool {
    let find = || {
        let mut extensions = extensions(body)?;
        while !extensions.is_empty() {
            let (kind, mut data) = (u16(&mut extensions)?, vector16(&mut extensions)?);
            if kind == SUPPORTED_VERSIONS {
                return Some(vector8(&mut data)?.chunks(2).any(|version| version == TLS_1_3));
            }
        }
        None
    };
    find().unwrap_or(false)
}

/// The extensions of a message body.
fn extensions(body: &[u8]) -> Option<&[u8]> {
    let mut rest = body;
    take(&mut rest, RANDOM.end)?;
    vector8(&mut rest)?;
    vector16(&mut rest)?;
    vector8(&mut rest)?;
    let extensions = vector16(&mut rest)?;
    rest.is_empty().then_some(extensions)
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

fn u16(rest: &mut &[u8]) -> Option<u16> {
    let (bytes, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(u16::from_be_bytes(*bytes))
}

fn vector8<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::from(*take(rest, 1)?.first()?);
    take(rest, len)
}

fn vector16<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::from(u16(rest)?);
    take(rest, len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A ClientHello body with these extensions.
    fn body(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut list = Vec::new();
        for (kind, data) in extensions {
            list.extend(kind.to_be_bytes());
            list.extend((data.len() as u16).to_be_bytes());
            list.extend(data);
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 1, 1, 0]);
        body.extend((list.len() as u16).to_be_bytes());
        body.extend(list);
        body
    }

    fn offer(identity: &[u8], binder: &[u8]) -> (u16, Vec<u8>) {
        let mut data = (identity.len() as u16 + 6).to_be_bytes().to_vec();
        data.extend((identity.len() as u16).to_be_bytes());
        data.extend(identity);
        data.extend([0; 4]);
        data.extend((binder.len() as u16 + 1).to_be_bytes());
        data.push(binder.len() as u8);
        data.extend(binder);
        (PRE_SHARED_KEY, data)
    }

    #[test]
    fn the_last_extension_is_read() {
        let body = body(&[(43, vec![2, 3, 4]), offer(b"name", &[9; 32])]);
        let offers = Offers::parse(&body).unwrap();
        assert_eq!(offers.list.len(), 1);
        assert_eq!(offers.list[0].identity, b"name");
        assert_eq!(offers.list[0].binder, [9; 32]);
        let proven: usize = offers.proven.iter().map(|part| part.len()).sum();
        assert_eq!(proven + 32, body.len() - 2 - 33, "all but the binders with their length");
    }

    #[test]
    fn the_offered_versions_are_read() {
        for (extensions, want) in [
            (vec![(43, vec![2, 3, 4])], true),
            (vec![(0, vec![1]), (43, vec![4, 3, 3, 3, 4])], true),
            (vec![(43, vec![2, 3, 3])], false),
            (vec![(43, vec![9, 3, 4])], false),
            (vec![(0, vec![3, 4])], false),
            (vec![], false),
        ] {
            assert_eq!(offers_tls_1_3(&body(&extensions)), want, "{extensions:?}");
        }
    }

    #[test]
    fn what_is_no_offer_is_none() {
        let good = body(&[offer(b"name", &[9; 32])]);
        assert!(Offers::parse(&good).is_some());
        for len in 0..good.len() {
            assert!(Offers::parse(&good[..len]).is_none(), "{len}");
        }
        let not_last = body(&[offer(b"name", &[9; 32]), (43, vec![2, 3, 4])]);
        assert!(Offers::parse(&not_last).is_none());
        assert!(Offers::parse(&body(&[])).is_none());
        let longer = [&good[..], &[0]].concat();
        assert!(Offers::parse(&longer).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Offers::parse(&bytes);
            let _ = offers_tls_1_3(&bytes);
            let _ = Offers::parse(&body(&[(PRE_SHARED_KEY, bytes)]));
        }
    }
}
