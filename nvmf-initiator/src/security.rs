//! What a host proves itself with, and what it asks of the target.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crypto::dhchap::DhGroup;
use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, PskError, RetainedKey};
use crypto::tls::KeyUpdates;
use crypto::{DhchapKey, Hash, TlsKey};

/// Most TLS keys of a host: an old and a new one, and some more.
const TLS_KEYS_MAX: usize = 8;

/// What a host proves itself with, and what it asks of the target. The default is plaintext without
/// any proof. Its `Debug` shows no key.
///
/// ```
/// use crypto::TlsKey;
/// use nvmf_initiator::{Security, Tls, TlsKeys};
/// let key = TlsKey::parse("NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:")?;
/// let security = Security { tls: Tls::Keys(TlsKeys::new(vec![key])), ..Security::default() };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct Security {
    /// Whether connections are encrypted.
    pub tls: Tls,
    /// What the host authenticates with when the controller asks; `None`: a controller that asks is
    /// not used.
    pub dhchap: Option<Dhchap>,
}

/// Whether connections are encrypted: all of them or none.
#[derive(Clone, Default)]
pub enum Tls {
    /// They are not.
    #[default]
    Off,
    /// They are, by keys that both ends were given.
    Keys(TlsKeys),
    /// They are, by a key that an authentication makes ("secure channel concatenation", NVMe Base 2.1):
    /// needs [`Security::dhchap`]. Each association makes a key of its own, on a connection that is
    /// in plaintext until then and ends with it.
    Concatenate,
}

/// Keys for TLS, and what is tried with them.
///
/// There are two forms of identities and two derivations in the field, and a target need not know all of
/// them. Each combination is a key of its own to the target, so when it refuses one the next is offered: for
/// each key both versions, the later one first, and of each both derivations, that of RFC 8446 first. What
/// a target took is offered first from then on.
#[derive(Clone)]
pub struct TlsKeys {
    /// The keys as configured, the preferred first; 1 to 8. With several a key is changed without a
    /// moment in which the two ends have none in common.
    pub keys: Vec<TlsKey>,
    /// Forms of identities, the preferred first.
    pub versions: Vec<IdentityVersion>,
    /// Derivations, the preferred first.
    pub derivations: Vec<Derivation>,
    /// When this end takes new traffic keys. A target that cannot follow (Linux, when this was written)
    /// ends the connection then, which is made anew; with [`KeyUpdates::Never`] that happens later,
    /// with every target.
    pub updates: KeyUpdates,
}

impl TlsKeys {
    /// These keys, with all that is tried.
    pub fn new(keys: Vec<TlsKey>) -> TlsKeys {
        TlsKeys {
            keys,
            versions: vec![IdentityVersion::V1, IdentityVersion::V0],
            derivations: Derivation::ALL.to_vec(),
            updates: KeyUpdates::Auto,
        }
    }
}

/// What a host authenticates with (DH-HMAC-CHAP).
#[derive(Clone)]
pub struct Dhchap {
    /// What the host proves itself with.
    pub key: DhchapKey,
    /// What the controller has to prove itself with; it is then asked to whether it asks the host or not.
    pub controller_key: Option<DhchapKey>,
    /// Hashes that are offered.
    pub hashes: Vec<Hash>,
    /// Groups that are offered.
    pub groups: Vec<DhGroup>,
}

impl Dhchap {
    /// With this secret, all hashes, and all groups but the null one: without an exchange, who listens
    /// can try secrets at leisure.
    pub fn new(key: DhchapKey) -> Dhchap {
        use DhGroup::{Ffdhe2048, Ffdhe3072, Ffdhe4096, Ffdhe6144, Ffdhe8192};
        Dhchap {
            key,
            controller_key: None,
            hashes: vec![Hash::Sha256, Hash::Sha384, Hash::Sha512],
            groups: vec![Ffdhe3072, Ffdhe4096, Ffdhe2048, Ffdhe6144, Ffdhe8192],
        }
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = match &self.tls {
            Tls::Off => "off",
            Tls::Keys(_) => "keys",
            Tls::Concatenate => "concatenate",
        };
        let is_mutual = self.dhchap.as_ref().map(|dhchap| dhchap.controller_key.is_some());
        f.debug_struct("Security").field("tls", &tls).field("dhchap_is_mutual", &is_mutual).finish()
    }
}

impl Security {
    /// Whether `self` may take the place of `old`: what it is good for, and whether connections are
    /// encrypted at all, stays as it was.
    pub(crate) fn replaces(
        &self,
        old: &Security,
    ) -> Result<(), (&'static str, String, &'static str)> {
        self.check()?;
        if std::mem::discriminant(&self.tls) == std::mem::discriminant(&old.tls) {
            return Ok(());
        }
        Err((
            "security.tls",
            "another kind".to_owned(),
            "keys for keys: TLS is on or off from the start",
        ))
    }

    /// What is wrong with it, and what is allowed.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String, &'static str)> {
        let dhchap = self.dhchap.as_ref();
        if dhchap.is_some_and(|d| d.hashes.is_empty() || d.groups.is_empty()) {
            return Err(("security.dhchap", "nothing".to_owned(), "a hash and a group at least"));
        }
        match &self.tls {
            Tls::Off => Ok(()),
            Tls::Keys(tls) => {
                let count = tls.keys.len();
                if !(1..=TLS_KEYS_MAX).contains(&count) {
                    return Err(("security.tls.keys", count.to_string(), "1 to 8"));
                }
                if tls.versions.is_empty() || tls.derivations.is_empty() {
                    let allowed = "a version and a derivation at least";
                    return Err(("security.tls", "nothing to offer".to_owned(), allowed));
                }
                Ok(())
            }
            Tls::Concatenate => {
                let can_make = dhchap.is_some_and(|dhchap| {
                    dhchap.hashes.iter().any(|hash| *hash != Hash::Sha512)
                        && dhchap.groups.iter().any(|group| *group != DhGroup::Null)
                });
                if can_make {
                    return Ok(());
                }
                Err((
                    "security.tls",
                    "a key by authentication".to_owned(),
                    "with a DH-HMAC-CHAP secret, SHA-256 or SHA-384, and a DH group",
                ))
            }
        }
    }
}

/// Pre-shared keys that a connection offers, one at a time.
pub(crate) struct Offers {
    psks: Vec<Psk>,
    /// The one that the target took last.
    best: AtomicUsize,
    /// It came from an authentication.
    is_generated: bool,
    pub(crate) updates: KeyUpdates,
}

impl Offers {
    /// What the keys give for a host at a subsystem.
    pub(crate) fn new(tls: &TlsKeys, hostnqn: &str, subnqn: &str) -> Result<Arc<Offers>, PskError> {
        let mut psks: Vec<Psk> = Vec::new();
        let mut refused = None;
        for key in &tls.keys {
            for version in &tls.versions {
                for derivation in &tls.derivations {
                    let psk = RetainedKey::new(key, hostnqn, *derivation)
                        .and_then(|retained| retained.psk(*version, hostnqn, subnqn));
                    match psk {
                        Ok(psk) if !psks.contains(&psk) => psks.push(psk),
                        Ok(_) => {}
                        // Long names do not fit an identity of version 0 in the standard derivation.
                        Err(error) => refused = Some(error),
                    }
                }
            }
        }
        match (psks.is_empty(), refused) {
            (true, Some(error)) => Err(error),
            _ => Ok(Arc::new(Offers {
                psks,
                best: AtomicUsize::new(0),
                is_generated: false,
                updates: tls.updates,
            })),
        }
    }

    /// The only key, from an authentication.
    pub(crate) fn generated(psk: Psk) -> Arc<Offers> {
        let updates = KeyUpdates::Auto;
        let psks = vec![psk];
        Arc::new(Offers { psks, best: AtomicUsize::new(0), is_generated: true, updates })
    }

    pub(crate) fn len(&self) -> usize {
        self.psks.len()
    }

    /// The key to begin with.
    pub(crate) fn best(&self) -> usize {
        // Relaxed: a hint. Whatever is read, all are tried.
        self.best.load(Ordering::Relaxed)
    }

    /// The key that is offered after `refused` others, when `first` was the first.
    pub(crate) fn get(&self, first: usize, refused: usize) -> Option<(usize, &Psk)> {
        if refused >= self.psks.len() {
            return None;
        }
        let index = (first + refused) % self.psks.len();
        self.psks.get(index).map(|psk| (index, psk))
    }

    /// One line on a target that took none of them: how it refused the first, what else was offered, and
    /// what to run.
    pub(crate) fn explain(&self, first: &str) -> String {
        let Some(psk) = self.psks.first() else { return first.to_owned() };
        let host = Identity::parse(psk.identity().as_bytes()).map_or("?", |i| i.hostnqn);
        if self.is_generated {
            return format!(
                "{first}; the key came from an authentication just before and is good there for an \
                 hour: both connections have to reach the same target, on a listener with tls=allowed"
            );
        }
        let ways: BTreeSet<_> = self.psks.iter().map(|psk| psk.derivation().to_string()).collect();
        let forms: BTreeSet<_> =
            self.psks.iter().filter_map(|psk| psk.identity().get(..8)).collect();
        let list = |set: &mut dyn Iterator<Item = &str>| set.collect::<Vec<_>>().join(", ");
        format!(
            "{first}; offered in all: {} ({}; as derived by {}); at the target, look at `penstock key \
             list --host {host}`, then give it this end's key by `penstock key import --host {host}`, \
             or this end what `penstock key export --emulator --host {host}` prints there",
            match self.psks.len() {
                1 => "1 key".to_owned(),
                count => format!("{count} keys"),
            },
            list(&mut forms.iter().copied()),
            list(&mut ways.iter().map(String::as_str)),
        )
    }

    /// The target has taken the key of this index.
    pub(crate) fn took(&self, index: usize) {
        self.best.store(index, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use crypto::KeyHash;

    use super::*;

    const HOST: &str = "nqn.2014-08.org.example:host";
    const SUBSYSTEM: &str = "nqn.2014-08.org.example:sub";

    fn key(hash: KeyHash) -> TlsKey {
        TlsKey::new(hash, &[7; 32]).unwrap()
    }

    #[test]
    fn every_form_is_offered_once_and_the_one_taken_comes_first() {
        let offers =
            Offers::new(&TlsKeys::new(vec![key(KeyHash::Sha256)]), HOST, SUBSYSTEM).unwrap();
        let shown = |offers: &Offers| -> Vec<_> {
            let all = (0..offers.len()).filter_map(|n| offers.get(offers.best(), n));
            all.map(|(_, psk)| (psk.identity()[4..5].to_owned(), psk.derivation())).collect()
        };
        let (rfc, old) = (Derivation::Rfc8446, Derivation::Libnvme);
        let pair = |version: &str, way| (version.to_owned(), way);
        let all = [pair("1", rfc), pair("1", old), pair("0", rfc), pair("0", old)];
        assert_eq!(shown(&offers), all);
        assert!(offers.get(0, 4).is_none());
        offers.took(3);
        assert_eq!(shown(&offers)[..2], [all[3].clone(), all[0].clone()]);
    }

    #[test]
    fn a_refusal_names_what_was_offered_and_what_to_run() {
        let keys = TlsKeys::new(vec![key(KeyHash::Sha256)]);
        let text = Offers::new(&keys, HOST, SUBSYSTEM).unwrap().explain("first");
        for want in [
            "first; offered in all: 4 keys (NVMe0R01, NVMe1R01; as derived by RFC 8446, libnvme < 1.16)",
            &format!("penstock key list --host {HOST}`"),
            &format!("penstock key import --host {HOST}`"),
            &format!("penstock key export --emulator --host {HOST}`"),
        ] {
            assert!(text.contains(want), "{want}: {text}");
        }
        let retained = RetainedKey::new(&key(KeyHash::Sha256), HOST, Derivation::Rfc8446).unwrap();
        let psk = retained.psk(IdentityVersion::V1, HOST, SUBSYSTEM).unwrap();
        let text = Offers::generated(psk).explain("first");
        assert!(text.contains("authentication") && text.contains("tls=allowed"), "{text}");
    }

    #[test]
    fn long_names_leave_version_1() {
        let host = format!("nqn.2014-08.org.example:{}", "h".repeat(150));
        let sub = format!("nqn.2014-08.org.example:{}", "s".repeat(150));
        let keys = TlsKeys {
            derivations: vec![Derivation::Rfc8446],
            ..TlsKeys::new(vec![key(KeyHash::None)])
        };
        let offers = Offers::new(&keys, &host, &sub).unwrap();
        assert_eq!(offers.len(), 1);
        assert!(offers.get(0, 0).unwrap().1.identity().starts_with("NVMe1R01 "));
        let keys = TlsKeys { versions: vec![IdentityVersion::V0], ..keys };
        assert_eq!(Offers::new(&keys, &host, &sub).err(), Some(PskError::IdentityTooLong));
    }

    #[test]
    fn debug_shows_no_key() {
        let dhchap = Dhchap::new(DhchapKey::new(KeyHash::None, &[0xAB; 32]).unwrap());
        let tls = Tls::Keys(TlsKeys::new(vec![key(KeyHash::None)]));
        let text = format!("{:?}", Security { tls, dhchap: Some(dhchap) });
        assert_eq!(text, "Security { tls: \"keys\", dhchap_is_mutual: Some(false) }");
    }

    #[test]
    fn keys_replace_keys_and_nothing_else() {
        let by = |n| Security {
            tls: Tls::Keys(TlsKeys::new(vec![TlsKey::new(KeyHash::None, &[n; 32]).unwrap()])),
            dhchap: None,
        };
        assert!(by(2).replaces(&by(1)).is_ok());
        assert_eq!(Security::default().replaces(&by(1)).unwrap_err().0, "security.tls");
        assert_eq!(by(1).replaces(&Security::default()).unwrap_err().0, "security.tls");
        let none = Security { tls: Tls::Keys(TlsKeys::new(Vec::new())), dhchap: None };
        assert_eq!(none.replaces(&by(1)).unwrap_err().0, "security.tls.keys");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let dhchap = Dhchap::new(DhchapKey::new(KeyHash::None, &[1; 32]).unwrap());
        let refused = |security: Security| security.check().unwrap_err().0;
        let none = Tls::Keys(TlsKeys::new(Vec::new()));
        assert_eq!(refused(Security { tls: none, dhchap: None }), "security.tls.keys");
        assert_eq!(refused(Security { tls: Tls::Concatenate, dhchap: None }), "security.tls");
        let null = Dhchap { groups: vec![DhGroup::Null], ..dhchap.clone() };
        let concatenate = |dhchap| Security { tls: Tls::Concatenate, dhchap: Some(dhchap) };
        assert_eq!(refused(concatenate(null)), "security.tls");
        assert!(concatenate(dhchap.clone()).check().is_ok());
        let nothing = Dhchap { hashes: Vec::new(), ..dhchap };
        assert_eq!(refused(Security { tls: Tls::Off, dhchap: Some(nothing) }), "security.dhchap");
    }
}
