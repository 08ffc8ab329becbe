//! Certificates and their keys, from PEM files: what the management API's TLS is made of.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::private;

/// A file of certificates or with a key is not longer.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The certificates of a file, in its order.
///
/// # Errors
/// It cannot be read, is too long, is no PEM, or has no certificate.
pub fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = || -> anyhow::Result<_> {
        let length = std::fs::metadata(path)?.len();
        ensure!(length <= FILE_BYTES_MAX, "{length} bytes; allowed: at most {FILE_BYTES_MAX}");
        let bytes = std::fs::read(path)?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
        let found = found.map_err(|error| anyhow::anyhow!("is no PEM: {error}"))?;
        ensure!(
            !found.is_empty(),
            "no certificate in it; allowed: PEM, -----BEGIN CERTIFICATE-----"
        );
        Ok(found)
    };
    read().with_context(|| path.display().to_string())
}

/// The one key of a file that nobody else may use.
///
/// # Errors
/// It cannot be read, others may use it ([`private::PrivateError`]), or it has no key that is not
/// encrypted.
pub fn key(path: &Path) -> anyhow::Result<PrivateKeyDer<'static>> {
    let text = private::read(path, FILE_BYTES_MAX)?;
    match PrivateKeyDer::from_pem_slice(text.as_bytes()) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) => bail!(
            "{}: no private key in it; allowed: PEM, -----BEGIN PRIVATE KEY-----, without a passphrase",
            path.display()
        ),
        // The error has none of the text.
        Err(_) => bail!("{}: is no PEM", path.display()),
    }
}

/// The certificates of a file as those that others are judged by.
///
/// # Errors
/// As of [`certificates`], and if one is no certificate of an authority.
pub fn roots(path: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .with_context(|| format!("{}: a certificate makes no sense", path.display()))?;
    }
    Ok(roots)
}
