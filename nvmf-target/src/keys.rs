//! The keys of hosts: who may speak TLS with which key.
//!
//! Shared by all cores and the control plane. It is read when a connection is made, never on the data
//! path, and a lookup costs the same however many hosts there are. A change is in force for the next
//! handshake; connections that exist keep the keys they have, so that a key is changed by adding the new
//! one, giving it to the host, and removing the old one.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use crypto::dhchap::{DhGroup, Expired};
use crypto::psk::{Identity, Psk};
use crypto::tls::{PskLookup, Unknown, candidates};
use crypto::{DhchapKey, Hash, TlsKey};

/// TLS keys that one host may have at the same time. Each is tried in both derivations.
pub const TLS_KEYS_MAX: usize = crypto::tls::CANDIDATES_MAX / 2;

/// Secrets for DH-HMAC-CHAP that one host may have at the same time.
pub const DHCHAP_KEYS_MAX: usize = 4;
/// Keys from authentication that one host may have at the same time, the last ones: one for each
/// subsystem that it connects to and does not yet.
const GENERATED_MAX: usize = 8;
/// For how long a key from authentication is good, in seconds: what Linux gives it.
const GENERATED_S: u64 = 3600;

/// A key of a host.
#[derive(Clone, PartialEq, Eq)]
pub struct HostTlsKey {
    /// The key as configured.
    pub key: TlsKey,
    /// The only subsystem it is good for; `None`: every one, the discovery subsystem too.
    pub subnqn: Option<String>,
    /// Seconds since 1970 from which on it is not taken any more.
    pub expires: Option<u64>,
}

/// What a host can prove to be itself with.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct HostKeys {
    /// For TLS; at most [`TLS_KEYS_MAX`] are looked at.
    pub tls: Vec<HostTlsKey>,
    /// For DH-HMAC-CHAP; at most [`DHCHAP_KEYS_MAX`] are looked at. A host that has one has to
    /// authenticate, on every queue.
    pub dhchap: Vec<HostDhchapKey>,
    /// What the controller proves itself to this host with.
    pub dhchap_controller: Option<HostDhchapKey>,
}

/// A secret of a host, or of the controller toward it.
#[derive(Clone, PartialEq, Eq)]
pub struct HostDhchapKey {
    /// The secret as configured.
    pub key: DhchapKey,
    /// Seconds since 1970 from which on it is not taken any more.
    pub expires: Option<u64>,
}

/// What is used in authentications, the preferred first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthPolicy {
    /// Hashes.
    pub hashes: Vec<Hash>,
    /// Groups.
    pub groups: Vec<DhGroup>,
}

impl Default for AuthPolicy {
    /// All, those first that are as strong as the others of the protocol and not slower.
    fn default() -> AuthPolicy {
        use DhGroup::{Ffdhe2048, Ffdhe3072, Ffdhe4096, Ffdhe6144, Ffdhe8192, Null};
        AuthPolicy {
            hashes: vec![Hash::Sha256, Hash::Sha384, Hash::Sha512],
            groups: vec![Ffdhe3072, Ffdhe4096, Ffdhe2048, Ffdhe6144, Ffdhe8192, Null],
        }
    }
}

/// A TLS key that an authentication has made.
struct Generated {
    psk: Psk,
    /// The secret that the host has proven itself with: it ends with that.
    from: DhchapKey,
    expires: u64,
}

/// What is in force of a host's secrets.
pub(crate) struct LiveSecrets {
    pub(crate) host: Vec<DhchapKey>,
    pub(crate) controller: Option<DhchapKey>,
    pub(crate) expired: Expired,
}

/// Seconds since 1970.
pub type Clock = fn() -> u64;

fn system_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// When a secret of a host ends, in seconds since 1970; `None`: the host has it no more.
fn end_of(keys: Option<&HostKeys>, secret: &DhchapKey) -> Option<u64> {
    let same = keys?.dhchap.iter().filter(|known| known.key == *secret);
    same.map(|known| known.expires.unwrap_or(u64::MAX)).max()
}

/// See the module's documentation.
pub struct KeyStore {
    hosts: RwLock<HashMap<String, Arc<HostKeys>>>,
    /// By host. Only hosts that have authenticated are here.
    generated: RwLock<HashMap<String, Vec<Generated>>>,
    policy: RwLock<AuthPolicy>,
    clock: Clock,
}

impl Default for KeyStore {
    fn default() -> KeyStore {
        KeyStore::with_clock(system_clock)
    }
}

impl std::fmt::Debug for KeyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyStore").field("hosts", &self.len()).finish_non_exhaustive()
    }
}

impl KeyStore {
    /// An empty store for which `clock` says what has expired.
    pub fn with_clock(clock: Clock) -> KeyStore {
        KeyStore {
            hosts: RwLock::default(),
            generated: RwLock::default(),
            policy: RwLock::default(),
            clock,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<String, Arc<HostKeys>>> {
        self.hosts.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<String, Arc<HostKeys>>> {
        self.hosts.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the keys of a host; without any it is not known any more.
    pub fn set(&self, hostnqn: &str, keys: HostKeys) {
        let old = if keys == HostKeys::default() {
            self.write().remove(hostnqn)
        } else {
            self.write().insert(hostnqn.to_owned(), Arc::new(keys))
        };
        // Wiped outside of the lock.
        drop(old);
        // What an old secret has made ends with it.
        let mut all = self.generated.write().unwrap_or_else(PoisonError::into_inner);
        let Some(of_host) = all.get_mut(hostnqn) else { return };
        let keys = self.get(hostnqn);
        of_host.retain_mut(|generated| match end_of(keys.as_deref(), &generated.from) {
            Some(end) => {
                generated.expires = generated.expires.min(end);
                true
            }
            None => false,
        });
        if of_host.is_empty() {
            all.remove(hostnqn);
        }
    }

    /// What is used in authentications from now on.
    pub fn set_policy(&self, policy: AuthPolicy) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// What is used in authentications.
    pub fn policy(&self) -> AuthPolicy {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The secrets of a host, and of the controller toward it, that have not expired.
    pub(crate) fn live_secrets(&self, keys: &HostKeys) -> LiveSecrets {
        let now = (self.clock)();
        let is_live = |key: &&HostDhchapKey| key.expires.is_none_or(|at| now < at);
        let host: Vec<DhchapKey> = keys
            .dhchap
            .iter()
            .filter(is_live)
            .take(DHCHAP_KEYS_MAX)
            .map(|k| k.key.clone())
            .collect();
        let controller = keys.dhchap_controller.as_ref();
        let live_controller = controller.filter(is_live).map(|key| key.key.clone());
        let expired = Expired {
            host: !keys.dhchap.iter().all(|key| is_live(&key)),
            controller: controller.is_some() && live_controller.is_none(),
        };
        LiveSecrets { host, controller: live_controller, expired }
    }

    /// An authentication by the secret `from` has made a TLS key for a host. It is not taken if the
    /// secret has been removed meanwhile.
    pub(crate) fn add_generated(&self, hostnqn: &str, psk: Psk, from: &DhchapKey) {
        let now = (self.clock)();
        let mut all = self.generated.write().unwrap_or_else(PoisonError::into_inner);
        // Who removes a secret does so before it looks for what that has made, under this lock.
        let Some(end) = end_of(self.get(hostnqn).as_deref(), from) else { return };
        let of_host = all.entry(hostnqn.to_owned()).or_default();
        of_host.retain(|old| now < old.expires);
        if of_host.len() == GENERATED_MAX {
            of_host.remove(0);
        }
        let expires = end.min(now + GENERATED_S);
        of_host.push(Generated { psk, from: from.clone(), expires });
    }

    fn find_generated(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        let now = (self.clock)();
        let all = self.generated.read().unwrap_or_else(PoisonError::into_inner);
        let of_host = all.get(identity.hostnqn).ok_or(Unknown::Key)?;
        let live: Vec<Psk> =
            of_host.iter().filter(|g| now < g.expires).map(|g| g.psk.clone()).collect();
        if live.is_empty() { Err(Unknown::Expired) } else { Ok(live) }
    }

    /// The keys of a host.
    pub fn get(&self, hostnqn: &str) -> Option<Arc<HostKeys>> {
        self.read().get(hostnqn).cloned()
    }

    /// Hosts with keys.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// Whether no host has a key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl PskLookup for KeyStore {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        if identity.is_generated {
            return self.find_generated(identity);
        }
        let keys = self.get(identity.hostnqn).ok_or(Unknown::Host)?;
        let meant: Vec<&HostTlsKey> = keys
            .tls
            .iter()
            .filter(|key| key.subnqn.as_deref().is_none_or(|subnqn| subnqn == identity.subnqn))
            .collect();
        if meant.is_empty() {
            return Err(Unknown::Key);
        }
        let now = (self.clock)();
        let live = meant.iter().filter(|key| key.expires.is_none_or(|expires| now < expires));
        let live: Vec<&TlsKey> = live.take(TLS_KEYS_MAX).map(|key| &key.key).collect();
        if live.is_empty() {
            return Err(Unknown::Expired);
        }
        Ok(candidates(live, identity))
    }
}

#[cfg(test)]
mod tests {
    use crypto::KeyHash;

    use super::*;

    const HOST: &str = "nqn.2014-08.org.example:host";
    const SUBSYSTEM: &str = "nqn.2014-08.org.example:sub";

    fn key(n: u8) -> HostTlsKey {
        let key = TlsKey::new(KeyHash::Sha256, &[n; 32]).expect("a key");
        HostTlsKey { key, subnqn: None, expires: None }
    }

    fn tls(keys: Vec<HostTlsKey>) -> HostKeys {
        HostKeys { tls: keys, ..HostKeys::default() }
    }

    fn find(store: &KeyStore, identity: &str) -> Result<usize, Unknown> {
        let identity = Identity::parse(identity.as_bytes()).expect("well formed");
        store.find(&identity).map(|keys| keys.len())
    }

    #[test]
    fn every_live_key_is_tried_in_both_derivations() {
        let store = KeyStore::with_clock(|| 1000);
        let identity = format!("NVMe0R01 {HOST} {SUBSYSTEM}");
        assert_eq!(find(&store, &identity), Err(Unknown::Host));
        store.set(HOST, tls(vec![key(1), key(2)]));
        assert_eq!(find(&store, &identity), Ok(4));
        let expired = HostTlsKey { expires: Some(1000), ..key(1) };
        store.set(HOST, tls(vec![expired.clone(), key(2)]));
        assert_eq!(find(&store, &identity), Ok(2), "the other one goes on");
        store.set(HOST, tls(vec![expired]));
        assert_eq!(find(&store, &identity), Err(Unknown::Expired));
        let other = HostTlsKey { subnqn: Some("nqn.2014-08.org.example:other".into()), ..key(1) };
        store.set(HOST, tls(vec![other]));
        assert_eq!(find(&store, &identity), Err(Unknown::Key));
        store.set(HOST, HostKeys::default());
        assert!(store.is_empty());
        assert_eq!(find(&store, &identity), Err(Unknown::Host));
    }

    #[test]
    fn more_keys_than_can_be_tried_are_not_tried() {
        let store = KeyStore::default();
        store.set(HOST, tls((0..20).map(key).collect()));
        let found = find(&store, &format!("NVMe0R01 {HOST} {SUBSYSTEM}"));
        assert_eq!(found, Ok(2 * TLS_KEYS_MAX));
    }
}
