//! Where a management API is: a Unix socket, or TCP with TLS and certificates on both ends.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use daemon::pem;
use hyper::Uri;
use rustls::pki_types::ServerName;
use rustls::version::TLS13;
use rustls::{AlertDescription, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use super::cli::Connection;

/// Port of `https` URLs that have none.
const HTTPS_PORT: u16 = 443;

/// Where to ask.
pub(super) enum Place {
    Socket(PathBuf),
    Tls {
        url: String,
        host: String,
        port: u16,
        name: ServerName<'static>,
        config: Arc<ClientConfig>,
    },
}

/// A way to the target.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Socket(path) => write!(f, "{}", path.display()),
            Place::Tls { url, .. } => f.write_str(url),
        }
    }
}

impl Place {
    /// What the flags name.
    pub(super) fn of(connection: &Connection) -> anyhow::Result<Place> {
        let text = connection.api.as_str();
        let allowed = "allowed: the path of a socket, or https://HOST:PORT";
        match text.split_once("://") {
            None => return Ok(Place::Socket(text.into())),
            Some(("https", _)) => {}
            Some(("http", _)) => {
                bail!("--api {text:?}: there is no management API on TCP without TLS; {allowed}")
            }
            Some(_) => bail!("--api {text:?}: is no place; {allowed}"),
        }
        let url: Uri =
            text.parse().map_err(|error| anyhow!("--api {text:?}: {error}; {allowed}"))?;
        let Some(host) = url.host().filter(|_| matches!(url.path(), "" | "/")) else {
            bail!("--api {text:?}: is no place; {allowed}")
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone())
            .map_err(|_| anyhow!("--api {text:?}: {host:?} is no name or address; {allowed}"))?;
        let needed = |file: &Option<PathBuf>, flag: &str| {
            file.clone().with_context(|| {
                format!(
                    "--api {text}: the management API on TCP takes clients with a certificate alone; \
                     give {flag} FILE as well"
                )
            })
        };
        let cert = needed(&connection.api_cert, "--api-cert")?;
        let key = needed(&connection.api_key, "--api-key")?;
        let ca = needed(&connection.api_ca, "--api-ca")?;
        Ok(Place::Tls {
            url: text.to_owned(),
            port: url.port_u16().unwrap_or(HTTPS_PORT),
            host,
            name,
            config: Arc::new(config(&cert, &key, &ca)?),
        })
    }

    /// Connects.
    pub(super) async fn connect(&self) -> anyhow::Result<Box<dyn Stream>> {
        match self {
            Place::Socket(path) => {
                let stream = UnixStream::connect(path).await.map_err(|error| {
                    let advice = match error.kind() {
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                            ": is the target running? Start it with `penstock target --api PATH`, \
                             and give the same path here with --api or PENSTOCK_API"
                        }
                        io::ErrorKind::PermissionDenied => {
                            ": the socket is for the target's user alone"
                        }
                        _ => "",
                    };
                    anyhow!("management API at {self}: {error}{advice}")
                })?;
                Ok(Box::new(stream))
            }
            Place::Tls { host, port, name, config, .. } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(|error| {
                    let advice = match error.kind() {
                        io::ErrorKind::ConnectionRefused => {
                            ": is the target running, with `--api-listen`?"
                        }
                        _ => "",
                    };
                    anyhow!("management API at {self}: {error}{advice}")
                })?;
                let connector = TlsConnector::from(config.clone());
                let stream = connector.connect(name.clone(), stream).await;
                Ok(Box::new(stream.map_err(|error| self.explain(&error))?))
            }
        }
    }

    /// An error on the way, with what to do where TLS says what is wrong.
    pub(super) fn explain(&self, error: &(dyn std::error::Error + 'static)) -> anyhow::Error {
        let mut text = error.to_string();
        let mut next = Some(error);
        while let Some(cause) = next {
            if let Some(cause) = tls_error(cause) {
                text = match cause {
                    rustls::Error::AlertReceived(
                        alert @ (AlertDescription::CertificateRequired
                        | AlertDescription::UnknownCA
                        | AlertDescription::BadCertificate
                        | AlertDescription::CertificateExpired
                        | AlertDescription::CertificateRevoked
                        | AlertDescription::CertificateUnknown
                        | AlertDescription::UnsupportedCertificate
                        | AlertDescription::DecryptError
                        | AlertDescription::AccessDenied),
                    ) => format!(
                        "the target refuses this client's certificate ({alert:?}): --api-cert has to be \
                         in force, not revoked, and of an authority that the target was given as \
                         --api-client-ca; the target's log says more"
                    ),
                    rustls::Error::InvalidCertificate(problem) => format!(
                        "the target's certificate is not trusted ({problem}): --api-ca has to be its \
                         authority, and the URL a name or address that is in it"
                    ),
                    rustls::Error::InvalidMessage(_) => format!("no TLS is spoken there ({cause})"),
                    other => other.to_string(),
                };
            }
            next = cause.source();
        }
        anyhow!("management API at {self}: {text}")
    }
}

/// The error of TLS that an error of I/O stands for.
fn tls_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e rustls::Error> {
    error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}

fn config(cert: &Path, key: &Path, ca: &Path) -> anyhow::Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = pem::certificates(cert).context("--api-cert")?;
    let key = pem::key(key).context("--api-key")?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(pem::roots(ca).context("--api-ca")?)
        .with_client_auth_cert(chain, key)
        .context("--api-cert and --api-key")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
