//! What this process proves itself to targets with: keys from files that it alone can read.
//!
//! ```text
//!   psk=FILE, dhchap=FILE, dhchap_ctrl=FILE ──┐
//!                                             ├──► Security of the initiator
//!   keys of the data directory ───────────────┘
//! ```
//!
//! Keys are never in arguments, which every process of the machine can read. They are read before
//! the process gives up its access to files, and not again.

use std::path::{Path, PathBuf};

use anyhow::bail;
use crypto::nvme_cli::{Imported, import};
use crypto::{DhchapKey, TlsKey};
use nvme::spec::Nqn;
use nvmf_initiator::{Dhchap, Security, Tls, TlsKeys};

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
