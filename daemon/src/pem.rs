//! Certificates and their keys, from PEM files: what the management API's TLS is made of.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::private;

/// A file of certificates or with a key is not longer.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// A file of revocation lists, which has some 40 bytes for each certificate that was revoked.
const LISTS_BYTES_MAX: u64 = 16 << 20;

/// The certificates of a file, in its order.
///
/// # Errors
/// It cannot be read, is too long, is no PEM, or has no certificate.
pub fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    items(path, FILE_BYTES_MAX, "certificate", "CERTIFICATE")
}

/// The revocation lists of a file, in its order.
///
/// # Errors
/// It cannot be read, is too long, is no PEM, or has no revocation list.
pub fn revocations(path: &Path) -> anyhow::Result<Vec<CertificateRevocationListDer<'static>>> {
    items(path, LISTS_BYTES_MAX, "revocation list", "X509 CRL")
}

/// All items of a kind in a file, one at least.
fn items<T: PemObject>(path: &Path, most: u64, what: &str, label: &str) -> anyhow::Result<Vec<T>> {
    let read = || -> anyhow::Result<_> {
        let length = std::fs::metadata(path)?.len();
        ensure!(length <= most, "{length} bytes; allowed: at most {most}");
        let bytes = std::fs::read(path)?;
        let found: Result<Vec<_>, _> = T::pem_slice_iter(&bytes).collect();
        let found = found.map_err(|error| anyhow::anyhow!("is no PEM: {error}"))?;
        ensure!(!found.is_empty(), "no {what} in it; allowed: PEM, -----BEGIN {label}-----");
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
