//! Keys as nvme-cli writes and reads them: import of its output, and the lines that set a Linux
//! host up.

use std::fmt::Write as _;

use zeroize::Zeroizing;

use crate::key::{DhchapKey, KeyError, TlsKey};
use crate::psk::{Derivation, IdentityVersion, PskError, RetainedKey};
use crate::secret::SecretText;

/// A version of nvme-cli.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NvmeCli {
    major: u16,
    minor: u16,
}

impl NvmeCli {
    /// The first version whose library derives keys as RFC 8446 says (libnvme 1.16).
    const STANDARD: NvmeCli = NvmeCli { major: 2, minor: 16 };
    /// The first that takes a key in the interchange format at connect. Before, `--tls_key` was the
    /// number of one that is in the keyring.
    const KEY_AT_CONNECT: NvmeCli = NvmeCli { major: 2, minor: 11 };
    /// The first whose `connect` has `--concat`.
    const CONCAT: NvmeCli = NvmeCli { major: 2, minor: 8 };
    /// The first whose `check-tls-key` has `--insert` and `--identity`.
    const INSERT: NvmeCli = NvmeCli { major: 2, minor: 7 };

    /// Reads a version such as `2.13`, `v3.0` or `2.13-2`, or the line that `nvme version` prints.
    pub fn parse(text: &str) -> Option<NvmeCli> {
        let text = text.trim();
        let text = text.strip_prefix("nvme version ").unwrap_or(text);
        let text = text.strip_prefix('v').unwrap_or(text);
        let mut parts = text.split(|c: char| !c.is_ascii_digit());
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        Some(NvmeCli { major, minor })
    }

    /// How it derives keys.
    pub fn derivation(self) -> Derivation {
        if self < NvmeCli::STANDARD { Derivation::Libnvme } else { Derivation::Rfc8446 }
    }
}

impl std::fmt::Display for NvmeCli {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Why there are no lines for a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// Its nvme-cli cannot do what is wanted.
    #[error("nvme-cli {has} cannot do that: {needs} is the first that has `{option}`")]
    TooOld {
        /// The version that it has.
        has: NvmeCli,
        /// The one that it needs.
        needs: NvmeCli,
        /// For this.
        option: &'static str,
    },
    /// There is no such key.
    #[error(transparent)]
    Psk(#[from] PskError),
}

/// What a host is to connect with.
pub struct HostSetup<'a> {
    /// The host's nvme-cli.
    pub version: NvmeCli,
    /// The host's name.
    pub hostnqn: &'a str,
    /// The subsystem's name.
    pub subnqn: &'a str,
    /// Address and port of the target.
    pub address: (&'a str, u16),
    /// Key and identity version for TLS. Version 0 is put in the keyring, where the kernel finds it
    /// by itself; version 1 is given at connect. Versions of nvme-cli that cannot give a key at connect
    /// get version 0, which every kernel finds.
    pub tls: Option<(&'a TlsKey, IdentityVersion)>,
    /// The host's secret for DH-HMAC-CHAP.
    pub dhchap: Option<&'a DhchapKey>,
    /// The controller's, if the host is to check it too.
    pub dhchap_controller: Option<&'a DhchapKey>,
    /// TLS with a key that authentication makes (Linux 6.15 and later); needs `dhchap`.
    pub concatenate: bool,
}

impl HostSetup<'_> {
    /// The lines to run on the host, as root. They contain the keys. For TLS a comment says which
    /// identity this version of nvme-cli makes of them.
    ///
    /// # Errors
    /// The version cannot do what is wanted, or the names are too long for an identity.
    pub fn lines(&self) -> Result<SecretText, SetupError> {
        let has = self.version;
        let since = |needs, option| {
            (has >= needs).then_some(()).ok_or(SetupError::TooOld { has, needs, option })
        };
        if self.tls.is_some() {
            since(NvmeCli::INSERT, "nvme check-tls-key --insert")?;
        }
        if self.concatenate {
            since(NvmeCli::CONCAT, "nvme connect --concat")?;
        }
        // Long enough for all of it, so that growing leaves no copies.
        let mut text = Zeroizing::new(String::with_capacity(4096));
        let (host, sub) = (quoted(self.hostnqn), quoted(self.subnqn));
        let mut key = Zeroizing::new(String::new());
        if let Some((tls, version)) = self.tls {
            let is_late = has < NvmeCli::KEY_AT_CONNECT;
            let version = if is_late { IdentityVersion::V0 } else { version };
            let way = has.derivation();
            let retained = RetainedKey::new(tls, self.hostnqn, way)?;
            let psk = retained.psk(version, self.hostnqn, self.subnqn)?;
            let _ = writeln!(
                text,
                "# nvme-cli {has} (keys derived as by {way}), TLS identity: {}",
                psk.identity()
            );
            let tls = tls.to_text();
            match version {
                IdentityVersion::V0 => write(
                    &mut text,
                    &[
                        "nvme check-tls-key --insert --identity=0 --hostnqn=",
                        &host,
                        " --subsysnqn=",
                        &sub,
                        " --keydata=",
                        tls.expose(),
                        "\n",
                    ],
                ),
                IdentityVersion::V1 => {
                    key.reserve(tls.expose().len() + 16);
                    write(&mut key, &[" --tls-key=", tls.expose()]);
                }
            }
        }
        let (address, port) = self.address;
        let mut transport = String::new();
        let _ = write!(transport, "--traddr={} --trsvcid={port}", quoted(address));
        write(
            &mut text,
            &["nvme connect --transport=tcp ", &transport, " --hostnqn=", &host, " --nqn=", &sub],
        );
        if self.tls.is_some() {
            write(&mut text, &[" --tls", &key]);
        }
        if let Some(secret) = self.dhchap {
            write(&mut text, &[" --dhchap-secret=", secret.to_text().expose()]);
        }
        if let Some(secret) = self.dhchap_controller {
            write(&mut text, &[" --dhchap-ctrl-secret=", secret.to_text().expose()]);
        }
        if self.concatenate && self.dhchap.is_some() {
            write(&mut text, &[" --concat"]);
        }
        write(&mut text, &["\n"]);
        Ok(SecretText::new(std::mem::take(&mut *text)))
    }
}

fn write(text: &mut String, parts: &[&str]) {
    parts.iter().for_each(|part| text.push_str(part));
}

/// As one word of a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/+=%@".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A key that was read from somewhere.
pub enum Imported {
    /// For TLS.
    Tls(TlsKey),
    /// For DH-HMAC-CHAP.
    Dhchap(DhchapKey),
}

/// Why a text has no key to import.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Nothing in it but blanks and comments.
    #[error("there is no key in it")]
    Nothing,
    /// More than one line that is no comment.
    #[error("there is more than one line in it: import one key at a time")]
    Several,
    /// An identity stands before the key: a line of a keyring's export.
    #[error(
        "this is a line of a keyring (`nvme tls-key --export`) with a derived key, from which the \
         configured one cannot be had: import what `nvme gen-tls-key` printed"
    )]
    Derived,
    /// Not a key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Reads the output of `nvme gen-tls-key` or `nvme gen-dhchap-key`, or a file that holds it; blank
/// lines and such that begin with `#` are skipped.
pub fn import(text: &str) -> Result<Imported, ImportError> {
    let mut lines =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let line = lines.next().ok_or(ImportError::Nothing)?;
    if lines.next().is_some() {
        return Err(ImportError::Several);
    }
    if line.starts_with("NVMe0") || line.starts_with("NVMe1") {
        return Err(ImportError::Derived);
    }
    if line.starts_with("DHHC-1:") {
        return Ok(Imported::Dhchap(DhchapKey::parse(line)?));
    }
    Ok(Imported::Tls(TlsKey::parse(line)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyHash;

    const KEY: &str = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";

    #[test]
    fn versions() {
        for (text, want, way) in [
            ("2.13", (2, 13), Derivation::Libnvme),
            ("nvme version 2.13 (git 2.13)", (2, 13), Derivation::Libnvme),
            ("2.15-1~bpo13", (2, 15), Derivation::Libnvme),
            ("v2.16", (2, 16), Derivation::Rfc8446),
            ("3.0-a.4", (3, 0), Derivation::Rfc8446),
        ] {
            let version = NvmeCli::parse(text).unwrap();
            assert_eq!((version.major, version.minor), want);
            assert_eq!(version.derivation(), way);
        }
        for text in ["", "2", "two", "-1.2", "99999999.1"] {
            assert_eq!(NvmeCli::parse(text), None, "{text}");
        }
    }

    /// Options as the tagged sources of nvme-cli have them: `fabrics.c` and `nvme.c` of 2.6 to 2.16.
    #[test]
    fn every_version_gets_lines_that_it_takes() {
        let tls = TlsKey::parse(KEY).ok().unwrap();
        let dhchap = DhchapKey::new(KeyHash::None, &[0; 32]).ok().unwrap();
        let lines = |minor: u16, tls, concatenate: bool| {
            let setup = HostSetup {
                version: NvmeCli { major: 2, minor },
                hostnqn: "nqn.2014-08.org.example:host",
                subnqn: "nqn.2014-08.org.example:sub",
                address: ("192.0.2.1", 4420),
                tls,
                dhchap: concatenate.then_some(&dhchap),
                dhchap_controller: None,
                concatenate,
            };
            setup.lines().map(|lines| lines.expose().to_owned())
        };
        for minor in 0..20 {
            for version in [IdentityVersion::V0, IdentityVersion::V1] {
                let Ok(lines) = lines(minor, Some((&tls, version)), false) else {
                    assert!(minor < 7, "2.{minor}");
                    continue;
                };
                assert!(minor >= 7, "2.{minor}");
                let at_connect = version == IdentityVersion::V1 && minor >= 11;
                assert_eq!(lines.contains("check-tls-key --insert"), !at_connect, "2.{minor}");
                assert_eq!(lines.contains(" --tls-key="), at_connect, "2.{minor}");
                assert_eq!(lines.contains("identity: NVMe1R01 "), at_connect, "2.{minor}");
                assert_eq!(lines.ends_with(" --tls\n"), !at_connect, "2.{minor}");
            }
            let concat = lines(minor, None, true);
            assert_eq!(concat.is_ok(), minor >= 8, "2.{minor}");
            if let Err(error) = concat {
                assert!(error.to_string().contains("2.8 is the first that has"), "{error}");
            }
        }
        let error = lines(6, Some((&tls, IdentityVersion::V1)), false).err().unwrap().to_string();
        assert!(error.contains("nvme-cli 2.6 cannot") && error.contains("--insert"), "{error}");
    }

    /// Options as `nvme check-tls-key --help` and `nvme connect --help` of 2.13 name them.
    #[test]
    fn lines_for_a_host() {
        let tls = TlsKey::parse(KEY).ok().unwrap();
        let dhchap = DhchapKey::new(KeyHash::None, &[0; 32]).ok().unwrap();
        let mut setup = HostSetup {
            version: NvmeCli { major: 2, minor: 13 },
            hostnqn: "nqn.2014-08.org.example:host",
            subnqn: "nqn.2014-08.org.example:it's",
            address: ("192.0.2.1", 4420),
            tls: Some((&tls, IdentityVersion::V0)),
            dhchap: None,
            dhchap_controller: None,
            concatenate: false,
        };
        let want = format!(
            "# nvme-cli 2.13 (keys derived as by libnvme < 1.16), TLS identity: NVMe0R01 \
             nqn.2014-08.org.example:host nqn.2014-08.org.example:it's\n\
             nvme check-tls-key --insert --identity=0 --hostnqn=nqn.2014-08.org.example:host \
             --subsysnqn='nqn.2014-08.org.example:it'\\''s' --keydata={KEY}\n\
             nvme connect --transport=tcp --traddr=192.0.2.1 --trsvcid=4420 \
             --hostnqn=nqn.2014-08.org.example:host --nqn='nqn.2014-08.org.example:it'\\''s' --tls\n"
        );
        assert_eq!(setup.lines().unwrap_or_else(|e| panic!("{e}")).expose(), want);

        setup.tls = Some((&tls, IdentityVersion::V1));
        setup.subnqn = "nqn.2014-08.org.example:sub";
        let lines = setup.lines().unwrap_or_else(|e| panic!("{e}"));
        assert!(lines.expose().ends_with(&format!("--tls --tls-key={KEY}\n")));
        assert_eq!(lines.expose().lines().count(), 2);
        assert!(lines.expose().contains("NVMe1R01 "));

        setup.tls = None;
        setup.dhchap = Some(&dhchap);
        setup.dhchap_controller = Some(&dhchap);
        setup.concatenate = true;
        let text = dhchap.to_text();
        let want =
            format!("--dhchap-secret={0} --dhchap-ctrl-secret={0} --concat\n", text.expose());
        let lines = setup.lines().unwrap_or_else(|e| panic!("{e}"));
        assert!(lines.expose().ends_with(&want) && !lines.expose().contains("--tls"));
        assert!(lines.expose().len() < 4096);
    }

    #[test]
    fn imports() {
        let read = |text: &str| match import(text) {
            Ok(Imported::Tls(key)) => Ok(key.to_text().expose().to_owned()),
            Ok(Imported::Dhchap(key)) => Ok(key.to_text().expose().to_owned()),
            Err(error) => Err(error),
        };
        let dhchap = KEY.replace("NVMeTLSkey", "DHHC");
        for key in [KEY, &dhchap] {
            assert_eq!(read(key).as_deref(), Ok(key));
            assert_eq!(read(&format!("# mine\n\n  {key} \r\n")).as_deref(), Ok(key));
        }
        assert_eq!(read("\n# nothing\n"), Err(ImportError::Nothing));
        assert_eq!(read(&format!("{KEY}\n{KEY}")), Err(ImportError::Several));
        assert_eq!(read(&format!("NVMe0R01 a b {KEY}")), Err(ImportError::Derived));
        assert!(matches!(read("key"), Err(ImportError::Key(KeyError::Prefix { .. }))));
    }
}
