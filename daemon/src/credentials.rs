//! What this process proves itself to targets with: keys from files that it alone can read.
//!
//! ```text
//!   psk=FILE, dhchap=FILE, dhchap_ctrl=FILE ──┐
//!                                             ├──► Security of the initiator
//!   keys of the data directory ───────────────┘
//! ```
//!
//! Keys are never in arguments, which every process of the machine can read. They are read before
//! the process gives up its access to files, and not again: who changes them at run time reads the
//! files himself ([`device_keys`]) and hands the keys over at the management socket (`renewed`).

use std::path::{Path, PathBuf};

use anyhow::bail;
use api::{Code, Problem, SecretString, SetDeviceKeys};
use crypto::nvme_cli::{Imported, import};
use crypto::{DhchapKey, SecretText, TlsKey};
use nvme::spec::Nqn;
use nvmf_initiator::{Dhchap, Security, Tls, TlsKeys};

use crate::state::State;
use crate::{keys, private};

/// A file of keys is not longer.
const FILE_BYTES_MAX: u64 = 16 << 10;
/// Keys for TLS of one file.
const TLS_KEYS_MAX: usize = 8;

/// Whether connections to a target are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsSetting {
    /// By a key that both ends were given.
    #[default]
    Required,
    /// By a key that an authentication makes.
    Concat,
    /// They are not.
    Off,
}

/// What to prove oneself with, as the operator says it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CredentialsConfig {
    /// Whether connections are encrypted.
    pub tls: TlsSetting,
    /// File with keys for TLS, the preferred first.
    pub psk: Option<PathBuf>,
    /// File with the secret of the host.
    pub dhchap: Option<PathBuf>,
    /// File with the secret that the controller has to prove itself with.
    pub dhchap_ctrl: Option<PathBuf>,
}

impl CredentialsConfig {
    /// Plaintext, and no proof.
    pub fn none() -> CredentialsConfig {
        CredentialsConfig { tls: TlsSetting::Off, ..CredentialsConfig::default() }
    }

    /// Reads the keys of `host` for `subsystem`: from the files, and what these do not give from the
    /// data directory `data`, which the caller has locked.
    pub fn load(
        &self,
        host: &Nqn,
        subsystem: &Nqn,
        data: Option<&Path>,
    ) -> anyhow::Result<Security> {
        let kept = match data {
            Some(dir) => keys::of_host(dir, host, subsystem)?,
            None => keys::OfHost::default(),
        };
        let dhchap = match &self.dhchap {
            Some(path) => Some(secret(path)?),
            None => kept.dhchap,
        };
        let controller_key = match &self.dhchap_ctrl {
            Some(path) => Some(secret(path)?),
            None => kept.dhchap_controller,
        };
        let dhchap = match (dhchap, controller_key) {
            (Some(key), controller_key) => Some(Dhchap { controller_key, ..Dhchap::new(key) }),
            (None, None) => None,
            (None, Some(_)) => bail!(
                "there is a secret for the controller and none for the host {host}, without which a \
                 controller does not prove itself: give dhchap=FILE as well"
            ),
        };
        let tls = match self.tls {
            TlsSetting::Off => Tls::Off,
            TlsSetting::Concat if dhchap.is_none() => bail!(
                "tls=concat takes the key for TLS from an authentication, and there is no secret for \
                 it: give dhchap=FILE"
            ),
            TlsSetting::Concat => Tls::Concatenate,
            TlsSetting::Required => {
                let keys = match &self.psk {
                    Some(path) => tls_keys(path)?,
                    None => kept.tls,
                };
                if keys.is_empty() {
                    bail!("{}", no_key(host));
                }
                Tls::Keys(TlsKeys::new(keys))
            }
        };
        Ok(Security { tls, dhchap })
    }

    /// The same for the discovery controllers of a target for which [`load`](Self::load) gave
    /// `target`. The keys of files are for them as well; those of the data directory are as far as they
    /// are not for one subsystem alone.
    pub fn load_discovery(
        &self,
        target: &Security,
        host: &Nqn,
        data: Option<&Path>,
    ) -> anyhow::Result<Security> {
        let (TlsSetting::Required, None, Some(dir)) = (self.tls, &self.psk, data) else {
            return Ok(target.clone());
        };
        let kept = keys::of_host(dir, host, &Nqn::discovery())?;
        if kept.tls.is_empty() {
            bail!("{}", no_key_for_discovery(host));
        }
        Ok(Security { tls: Tls::Keys(TlsKeys::new(kept.tls)), ..target.clone() })
    }
}

/// What hands a running device the keys of these files.
///
/// # Errors
/// A file cannot be read, others may use it, or it holds no keys of its kind.
pub fn device_keys(
    psk: Option<&Path>,
    dhchap: Option<&Path>,
    dhchap_ctrl: Option<&Path>,
) -> anyhow::Result<SetDeviceKeys> {
    let secret = |path: Option<&Path>| -> anyhow::Result<_> {
        Ok(path.map(secret).transpose()?.map(|key| text(&key.to_text())))
    };
    Ok(SetDeviceKeys {
        discovery_psk: None,
        psk: match psk {
            Some(path) => tls_keys(path)?.iter().map(|key| text(&key.to_text())).collect(),
            None => Vec::new(),
        },
        dhchap: secret(dhchap)?,
        dhchap_ctrl: secret(dhchap_ctrl)?,
        reauthenticate: false,
    })
}

/// The same with what a data directory has for `host` at `subsystem`, and at discovery controllers.
///
/// # Errors
/// There is no such directory, it is locked by another process, or damaged.
pub fn kept_device_keys(dir: &Path, host: &Nqn, subsystem: &Nqn) -> anyhow::Result<SetDeviceKeys> {
    if !dir.is_dir() {
        bail!("data directory {}: there is none", dir.display());
    }
    let _locked = State::open(dir)?;
    let kept = keys::of_host(dir, host, subsystem)?;
    let discovery = keys::of_host(dir, host, &Nqn::discovery())?;
    let texts = |keys: &[TlsKey]| keys.iter().map(|key| text(&key.to_text())).collect();
    Ok(SetDeviceKeys {
        psk: texts(&kept.tls),
        discovery_psk: Some(texts(&discovery.tls)),
        dhchap: kept.dhchap.map(|key| text(&key.to_text())),
        dhchap_ctrl: kept.dhchap_controller.map(|key| text(&key.to_text())),
        reauthenticate: false,
    })
}

fn text(key: &SecretText) -> SecretString {
    SecretString::new(key.expose().to_owned())
}

/// Whom keys are shown to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The target.
    Target,
    /// Discovery controllers, which may be asked in plaintext although the target is not.
    Discovery,
}

/// `old` with the keys of `request` in place of those of the same kind.
pub(crate) fn renewed(
    old: &Security,
    request: &SetDeviceKeys,
    part: Part,
) -> Result<Security, Problem> {
    let invalid = |what: &str, allowed: &str| Problem {
        error: Code::Invalid,
        what: what.to_owned(),
        allowed: allowed.to_owned(),
    };
    let secret = |field: &str, text: &SecretString| match import(text.expose()) {
        Ok(Imported::Dhchap(key)) => Ok(key),
        Ok(Imported::Tls(_)) => {
            Err(invalid(&format!("{field}: a key for TLS"), "what `nvme gen-dhchap-key` prints"))
        }
        Err(error) => {
            Err(invalid(&format!("{field}: {error}"), "what `nvme gen-dhchap-key` prints"))
        }
    };
    let mut new = old.clone();
    let psk = match (part, &request.discovery_psk) {
        (Part::Discovery, Some(own)) if own.is_empty() && !request.psk.is_empty() => {
            if matches!(old.tls, Tls::Keys(_)) {
                let what = "the keys for TLS are for one subsystem each, and none is for discovery";
                return Err(invalid(what, "a key for every subsystem"));
            }
            own
        }
        (Part::Discovery, Some(own)) => own,
        _ => &request.psk,
    };
    if psk.len() > TLS_KEYS_MAX {
        return Err(invalid(&format!("{} keys for TLS", psk.len()), "at most 8"));
    }
    let mut keys = Vec::with_capacity(psk.len());
    for text in psk {
        match import(text.expose()) {
            Ok(Imported::Tls(key)) => keys.push(key),
            Ok(Imported::Dhchap(_)) => {
                return Err(invalid("psk: a secret", "what `nvme gen-tls-key` prints"));
            }
            // The text is not shown: it is a key.
            Err(error) => {
                let what = format!("psk: {error}");
                return Err(invalid(&what, "what `nvme gen-tls-key` prints"));
            }
        }
    }
    match &mut new.tls {
        _ if keys.is_empty() => {}
        Tls::Keys(tls) => tls.keys = keys,
        Tls::Off if part == Part::Discovery => {}
        Tls::Off | Tls::Concatenate => {
            let what = "the device has no key for TLS, as it is one with tls=off or tls=concat";
            return Err(invalid(what, "the secrets of DH-HMAC-CHAP"));
        }
    }
    if let Some(text) = &request.dhchap {
        let key = secret("dhchap", text)?;
        let controller_key = new.dhchap.take().and_then(|dhchap| dhchap.controller_key);
        new.dhchap = Some(Dhchap { controller_key, ..Dhchap::new(key) });
    }
    if let Some(text) = &request.dhchap_ctrl {
        let key = secret("dhchap_ctrl", text)?;
        let Some(dhchap) = &mut new.dhchap else {
            let what =
                "a controller proves itself to a host that does, and the device has no secret";
            return Err(invalid(what, "dhchap as well"));
        };
        dhchap.controller_key = Some(key);
    }
    Ok(new)
}

/// What to do where there is no key.
fn no_key(host: &Nqn) -> String {
    format!(
        "no key for TLS to the target: `penstock key generate --host {host}` at the target makes one, \
         `penstock key export --emulator` there prints it for a file to give here with psk=FILE; or say \
         tls=off to connect in plaintext"
    )
}

fn no_key_for_discovery(host: &Nqn) -> String {
    format!(
        "no key for TLS to discovery controllers: those of {host} in the data directory are for one \
         subsystem each. Give the target and this data directory one for all of them (`penstock key \
         generate --host {host}` without --subsystem); or say discover_tls=off to ask them in plaintext"
    )
}

/// A key a line; blank lines and such that begin with `#` are skipped.
fn tls_keys(path: &Path) -> anyhow::Result<Vec<TlsKey>> {
    let text = private::read(path, FILE_BYTES_MAX)?;
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.trim().starts_with('#') {
            continue;
        }
        match import(line) {
            Ok(Imported::Tls(key)) => found.push(key),
            Ok(Imported::Dhchap(_)) => bail!(
                "{}:{}: this is a secret for DH-HMAC-CHAP; psk= takes what `nvme gen-tls-key` prints",
                path.display(),
                number + 1
            ),
            // The line is not shown: it has a key in it.
            Err(error) => bail!("{}:{}: {error}", path.display(), number + 1),
        }
    }
    if !(1..=TLS_KEYS_MAX).contains(&found.len()) {
        bail!("{} has {} keys; allowed: 1 to {TLS_KEYS_MAX}", path.display(), found.len());
    }
    Ok(found)
}

fn secret(path: &Path) -> anyhow::Result<DhchapKey> {
    match import(&private::read(path, FILE_BYTES_MAX)?) {
        Ok(Imported::Dhchap(key)) => Ok(key),
        Ok(Imported::Tls(_)) => bail!(
            "{}: this is a key for TLS; dhchap= takes what `nvme gen-dhchap-key` prints",
            path.display()
        ),
        Err(error) => bail!("{}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const TLS: &str = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
    const DHCHAP: &str = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";

    fn nqn(text: &str) -> Nqn {
        Nqn::new(text).unwrap()
    }

    struct Files(tempfile::TempDir);

    impl Files {
        fn put(&self, name: &str, text: &str, mode: u32) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    fn load(config: &CredentialsConfig) -> anyhow::Result<Security> {
        config.load(&nqn("nqn.2014-08.org.example:h"), &nqn("nqn.2014-08.org.example:s"), None)
    }

    fn refusal(config: CredentialsConfig) -> String {
        format!("{:#}", load(&config).unwrap_err())
    }

    #[test]
    fn keys_come_from_files_that_nobody_else_reads() {
        let files = Files(tempfile::tempdir().unwrap());
        let config = CredentialsConfig {
            psk: Some(files.put("psk", &format!("# mine\n{TLS}\n\n{TLS}\n"), 0o600)),
            dhchap: Some(files.put("secret", &format!("{DHCHAP}\n"), 0o400)),
            dhchap_ctrl: None,
            tls: TlsSetting::Required,
        };
        let Security { tls: Tls::Keys(keys), dhchap: Some(dhchap) } = load(&config).unwrap() else {
            panic!("keys and a secret were given");
        };
        assert_eq!(keys.keys.len(), 2);
        assert!(dhchap.key.to_text().expose() == DHCHAP && dhchap.controller_key.is_none());

        let open = files.put("open", TLS, 0o640);
        let why = refusal(CredentialsConfig { psk: Some(open), ..config.clone() });
        assert!(why.contains("mode 0640") && why.contains("chmod 600"), "{why}");
        let why = refusal(CredentialsConfig { psk: config.dhchap.clone(), ..config.clone() });
        assert!(why.contains("secret:1: this is a secret for DH-HMAC-CHAP"), "{why}");
        let broken = files.put("broken", "NVMeTLSkey-1:01:AAEC", 0o600);
        let why = refusal(CredentialsConfig { psk: Some(broken), ..config.clone() });
        assert!(!why.contains("AAEC") && why.contains("broken:1: "), "{why}");
        let nothing = files.put("nothing", "# none\n", 0o600);
        let why = refusal(CredentialsConfig { psk: Some(nothing), ..config.clone() });
        assert!(why.contains("has 0 keys; allowed: 1 to 8"), "{why}");
        let gone = Some(PathBuf::from("/nonexistent/psk"));
        let why = refusal(CredentialsConfig { psk: gone, ..config });
        assert!(why.contains("/nonexistent/psk"), "{why}");
    }

    #[test]
    fn without_a_key_the_line_says_what_to_do() {
        let why = refusal(CredentialsConfig::default());
        assert!(why.contains("psk=FILE") && why.contains("tls=off"), "{why}");
        let concat = CredentialsConfig { tls: TlsSetting::Concat, ..CredentialsConfig::default() };
        let why = refusal(concat);
        assert!(why.contains("dhchap=FILE"), "{why}");
        let files = Files(tempfile::tempdir().unwrap());
        let dhchap_ctrl = Some(files.put("secret", DHCHAP, 0o600));
        let why = refusal(CredentialsConfig { dhchap_ctrl, ..CredentialsConfig::none() });
        assert!(why.contains("none for the host"), "{why}");
        assert!(matches!(load(&CredentialsConfig::none()).unwrap().tls, Tls::Off));
    }

    #[test]
    fn new_keys_take_the_place_of_those_of_their_kind() {
        let files = Files(tempfile::tempdir().unwrap());
        let psk = files.put("psk", TLS, 0o600);
        let dhchap = files.put("secret", DHCHAP, 0o600);
        let old =
            load(&CredentialsConfig { psk: Some(psk.clone()), ..CredentialsConfig::default() })
                .unwrap();
        let two = files.put("two", &format!("{TLS}\n{TLS}\n"), 0o600);
        let request = device_keys(Some(&two), Some(&dhchap), None).unwrap();
        let new = renewed(&old, &request, Part::Target).unwrap();
        let Tls::Keys(tls) = &new.tls else { panic!("TLS stays") };
        assert!(tls.keys.len() == 2 && new.dhchap.as_ref().unwrap().controller_key.is_none());
        // What is not given stays.
        let request = device_keys(None, None, Some(&dhchap)).unwrap();
        let mutual = renewed(&new, &request, Part::Target).unwrap();
        let Tls::Keys(tls) = &mutual.tls else { panic!("TLS stays") };
        assert!(tls.keys.len() == 2 && mutual.dhchap.unwrap().controller_key.is_some());
        let why = |old: &Security, request| renewed(old, request, Part::Target).unwrap_err().what;
        assert!(why(&old, &request).contains("the device has no secret"));
        let request = device_keys(Some(&psk), None, None).unwrap();
        let plain = Security::default();
        assert!(why(&plain, &request).contains("tls=off"));
        assert!(matches!(renewed(&plain, &request, Part::Discovery).unwrap().tls, Tls::Off));
        let secret = SetDeviceKeys {
            psk: vec![SecretString::new(DHCHAP.to_owned())],
            ..SetDeviceKeys::default()
        };
        assert_eq!(why(&old, &secret), "psk: a secret");
        let broken = SetDeviceKeys {
            dhchap: Some(SecretString::new("DHHC-1:01:AAEC".to_owned())),
            ..SetDeviceKeys::default()
        };
        assert!(!why(&old, &broken).contains("AAEC"));
        assert!(device_keys(Some(&dhchap), None, None).is_err());
    }

    #[test]
    fn the_data_directory_gives_what_the_files_do_not() {
        use api::{AddKey, KeyKind};

        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("data");
        let (host, sub) = (nqn("nqn.2014-08.org.example:h"), nqn("nqn.2014-08.org.example:s"));
        let add = |kind, host: &Nqn, subsystem: Option<&Nqn>, bits| AddKey {
            kind,
            host: host.to_string(),
            subsystem: subsystem.map(Nqn::to_string),
            expires_in_s: None,
            key: None,
            bits: Some(bits),
        };
        let mut keys = crate::OfflineKeys::open(&dir).unwrap();
        let other = nqn("nqn.2014-08.org.example:other");
        for request in [
            add(KeyKind::Tls, &host, None, 256),
            add(KeyKind::Tls, &host, Some(&sub), 384),
            add(KeyKind::Tls, &host, Some(&other), 256),
            add(KeyKind::Tls, &other, None, 256),
            add(KeyKind::Dhchap, &host, None, 512),
        ] {
            keys.add(&request).unwrap();
        }
        drop(keys);
        let lens = |security: &Security| -> Vec<_> {
            let Tls::Keys(tls) = &security.tls else { panic!("there are keys") };
            tls.keys.iter().map(|key| key.secret().expose().len()).collect()
        };
        let credentials = CredentialsConfig::default();
        let security = credentials.load(&host, &sub, Some(&dir)).unwrap();
        // The newest first, so that a new key is used as soon as the target has it too.
        assert_eq!(lens(&security), [48, 32]);
        // What is for one subsystem is not for the discovery subsystem.
        let discovery = credentials.load_discovery(&security, &host, Some(&dir)).unwrap();
        assert_eq!(lens(&discovery), [32]);
        let given = kept_device_keys(&dir, &host, &sub).unwrap();
        assert_eq!(lens(&renewed(&discovery, &given, Part::Target).unwrap()), [48, 32]);
        assert_eq!(lens(&renewed(&security, &given, Part::Discovery).unwrap()), [32]);
        let alone = SetDeviceKeys { discovery_psk: Some(Vec::new()), ..given };
        let why = renewed(&discovery, &alone, Part::Discovery).unwrap_err().what;
        assert!(why.contains("none is for discovery"), "{why}");
        assert!(kept_device_keys(&dir.join("none"), &host, &sub).is_err());
        for security in [security, discovery] {
            assert_eq!(security.dhchap.unwrap().key.secret().expose().len(), 64);
        }
        let mut keys = crate::OfflineKeys::open(&dir).unwrap();
        let alone = nqn("nqn.2014-08.org.example:alone");
        keys.add(&add(KeyKind::Tls, &alone, Some(&sub), 256)).unwrap();
        drop(keys);
        let security = credentials.load(&alone, &sub, Some(&dir)).unwrap();
        let refused = credentials.load_discovery(&security, &alone, Some(&dir)).unwrap_err();
        let why = refused.to_string();
        assert!(why.contains("without --subsystem") && why.contains("discover_tls=off"), "{why}");
        // A file's keys are for both.
        let psk = Some(PathBuf::from("/nonexistent/read-already"));
        let from_file = CredentialsConfig { psk, ..credentials };
        let discovery = from_file.load_discovery(&security, &alone, Some(&dir)).unwrap();
        assert_eq!(lens(&discovery), [32]);
    }
}
