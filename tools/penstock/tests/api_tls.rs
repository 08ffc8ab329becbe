//! The management API on TCP: who has a certificate of the operator's authority, and nobody else.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use rustix::process::{Pid, Signal, kill_process};
use rustls::{ClientConfig, ClientConnection};
use tempfile::TempDir;

/// An authority, and where its certificate is.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert: PathBuf,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let cert = dir.join(format!("{name}.pem"));
        std::fs::write(&cert, params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { issuer: Issuer::new(params, key), cert }
    }

    /// Writes its list of certificates that it has revoked, in force until a year, to `NAME`.
    fn revoke(&self, dir: &Path, name: &str, serials: &[u64], until: i32) {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(serials.len() as u64 + 1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let pem = list.signed_by(&self.issuer).unwrap().pem().unwrap();
        // As a whole, as who renews it does: it is read at any moment.
        std::fs::write(dir.join("new"), pem).unwrap();
        std::fs::rename(dir.join("new"), dir.join(name)).unwrap();
    }

    /// Writes a certificate and its key to `NAME.pem` and `NAME.key`.
    fn issue(&self, dir: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let path = dir.join(format!("{name}.key"));
        std::fs::write(&path, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(dir.join(format!("{name}.pem")), cert.pem()).unwrap();
    }
}

fn penstock() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock"));
    for name in ["RUST_LOG", "PENSTOCK_API", "PENSTOCK_API_CERT", "PENSTOCK_API_KEY"] {
        command.env_remove(name);
    }
    command.env_remove("PENSTOCK_API_CA");
    command
}

/// A target with the management API on TCP, its authorities, and clients of several kinds.
struct Rig {
    child: Child,
    scratch: TempDir,
    operators: Authority,
    addr: SocketAddr,
    log: Receiver<String>,
}

fn revoking_target(dir: &Path) -> Command {
    let mut command = target(dir);
    command.arg("--api-client-crl").arg(dir.join("revoked.pem"));
    command
}

fn target(dir: &Path) -> Command {
    let mut command = penstock();
    command
        .args(["target", "--volume", "a=ram:1MiB", "--cores", "1", "--listen", "127.0.0.1:0"])
        .args(["--api-listen", "127.0.0.1:0", "--api-cert"])
        .arg(dir.join("server.pem"))
        .arg("--api-key")
        .arg(dir.join("server.key"))
        .arg("--api-client-ca")
        .arg(dir.join("operators.pem"))
        .stderr(Stdio::piped());
    command
}

impl Rig {
    fn start() -> Rig {
        let scratch = tempfile::tempdir().unwrap();
        let operators = Authority::new(scratch.path(), "operators");
        Rig::start_as(scratch, operators, target)
    }

    fn start_as(scratch: TempDir, operators: Authority, target: fn(&Path) -> Command) -> Rig {
        let dir = scratch.path();
        let strangers = Authority::new(dir, "strangers");
        operators.issue(dir, "server", |_| ());
        operators.issue(dir, "good", |_| ());
        strangers.issue(dir, "stranger", |_| ());
        operators.issue(dir, "expired", |params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2020, 2, 1);
        });
        operators.issue(dir, "early", |params| params.not_before = date_time_ymd(2999, 1, 1));
        operators.issue(dir, "no-client", |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        });
        let mut child = target(dir).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut addr = None;
        loop {
            let line = lines.next().expect("it says that it listens").unwrap();
            if let Some((_, rest)) = line.split_once("https://") {
                addr = Some(rest.trim().parse().unwrap());
            }
            if line.contains("listening for NVMe/TCP") {
                break;
            }
        }
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Rig { child, scratch, operators, addr: addr.expect("it says where"), log }
    }

    fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// A command of a client, with the certificate of a name.
    fn run(&self, url: &str, who: &str, ca: &str, line: &str) -> Output {
        let dir = self.dir();
        penstock()
            .args(line.split(' '))
            .args(["--api", url, "--api-cert"])
            .arg(dir.join(format!("{who}.pem")))
            .arg("--api-key")
            .arg(dir.join(format!("{who}.key")))
            .arg("--api-ca")
            .arg(dir.join(format!("{ca}.pem")))
            .output()
            .unwrap()
    }

    fn url(&self) -> String {
        format!("https://{}", self.addr)
    }

    #[track_caller]
    fn refused(&self, who: &str, ca: &str) -> String {
        let output = self.run(&self.url(), who, ca, "volume attach b --spec ram:1M");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        assert!(text.contains(&self.url()), "{text}");
        text
    }

    #[track_caller]
    fn served(&self, line: &str) -> String {
        let output = self.run(&self.url(), "good", "operators", line);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// Waits for a line of the target's log.
    #[track_caller]
    fn logged(&self, part: &str) -> String {
        loop {
            let line = self.log.recv_timeout(Duration::from_secs(60)).expect(part);
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Sends bytes without TLS and reads until the end.
    fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Ended by its signal handler; the test does not depend on how.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// What a client without a certificate gets for its request.
fn without_certificate(rig: &Rig) -> std::io::Result<Vec<u8>> {
    let roots = daemon::pem::roots(&rig.operators.cert).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "127.0.0.1".try_into().unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(rig.addr).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut stream = rustls::StreamOwned::new(client, stream);
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: penstock\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_certificate_of_the_authority_is_all_it_takes_and_nothing_less() {
    let rig = Rig::start();
    assert!(rig.served("status").contains("VOLUME"));
    rig.served("volume attach second --spec ram:1M");
    assert!(rig.served("volume list").contains("second"));
    assert!(rig.served("key generate --host nqn.2014-08.com.example:h").contains("example:h"));

    let text = rig.refused("stranger", "operators");
    assert!(text.contains("UnknownCA") && text.contains("--api-client-ca"), "{text}");
    assert!(rig.logged("has refused a client").contains("UnknownIssuer"));
    let text = rig.refused("expired", "operators");
    assert!(text.contains("CertificateExpired") && text.contains("in force"), "{text}");
    rig.logged("expired");
    rig.refused("early", "operators");
    rig.logged("not valid yet");
    rig.refused("no-client", "operators");
    rig.logged("has refused a client");
    let error = without_certificate(&rig).unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    rig.logged("no certificate");

    // The other way round: a target that is not whom the client means.
    let text = rig.refused("good", "strangers");
    assert!(text.contains("UnknownIssuer") && text.contains("--api-ca"), "{text}");
    let url = format!("https://localhost:{}", rig.addr.port());
    let output = rig.run(&url, "good", "operators", "status");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("a name or address that is in it"), "{text}");

    let volumes = rig.served("volume list");
    assert!(!volumes.lines().any(|line| line.starts_with("b ")), "refused is refused: {volumes}");
}

#[test]
fn what_is_no_tls_1_3_gets_a_plain_answer() {
    let rig = Rig::start();
    let answer = rig.raw(b"GET /v1/status HTTP/1.1\r\nhost: penstock\r\n\r\n");
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("speaks TLS alone") && !answer.contains("ram:"), "{answer}");
    rig.logged("it does not speak TLS");

    // A ClientHello of TLS 1.2: no supported_versions; one suite, a group, a signature scheme.
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 29, // supported_groups: x25519
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms: ecdsa_secp256r1_sha256
    ];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xC0, 0x2B, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut record = vec![22, 3, 1];
    record.extend((body.len() as u16 + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend((body.len() as u16).to_be_bytes());
    record.extend(body);
    // Fatal alert, protocol_version.
    assert_eq!(rig.raw(&record), [21, 3, 3, 0, 2, 2, 70]);
    // A record that makes no sense is the end, at once or when there was time for more.
    assert!(!rig.raw(&[22, 3, 1, 0, 5, 9, 9, 9, 9, 9]).starts_with(&[22]));
    assert!(rig.served("status").contains("VOLUME"));
}

#[test]
fn renewed_certificates_are_taken_up() {
    let rig = Rig::start();
    let dir = rig.dir();
    let second = Authority::new(dir, "second");
    second.issue(dir, "new", |_| ());
    assert!(!rig.run(&rig.url(), "good", "second", "status").status.success());
    // In the middle of a renewal certificate and key do not fit: the old ones go on.
    std::fs::rename(dir.join("new.pem"), dir.join("server.pem")).unwrap();
    rig.served("status");
    rig.logged("keeps its old certificates");
    std::fs::rename(dir.join("new.key"), dir.join("server.key")).unwrap();
    let output = rig.run(&rig.url(), "good", "second", "status");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    rig.logged("taken up its new certificates");
}

#[test]
fn a_revoked_certificate_is_refused_and_lists_are_taken_up() {
    const IN_FORCE: i32 = 2999;

    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let operators = Authority::new(dir, "operators");
    // A target that is to know what is revoked does not start without knowing.
    operators.issue(dir, "server", |_| ());
    let output = revoking_target(dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--api-client-crl"), "{text}");
    std::fs::copy(dir.join("server.pem"), dir.join("revoked.pem")).unwrap();
    let output = revoking_target(dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("no revocation list in it") && text.contains("X509 CRL"), "{text}");

    operators.issue(dir, "leaver", |params| params.serial_number = Some(77.into()));
    operators.revoke(dir, "revoked.pem", &[], IN_FORCE);
    let rig = Rig::start_as(scratch, operators, revoking_target);
    let dir = rig.dir();
    assert!(rig.served("status").contains("VOLUME"));
    let output = rig.run(&rig.url(), "leaver", "operators", "status");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // From now on, without a restart.
    rig.operators.revoke(dir, "revoked.pem", &[76, 77], IN_FORCE);
    let text = rig.refused("leaver", "operators");
    assert!(text.contains("CertificateRevoked") && text.contains("not revoked"), "{text}");
    rig.logged("is revoked by a list of --api-client-crl");
    rig.served("status");
    // A list that makes no sense changes nothing: who is revoked stays so.
    std::fs::write(dir.join("revoked.pem"), "nothing").unwrap();
    rig.refused("leaver", "operators");
    rig.logged("keeps its old certificates");
    rig.served("status");
    // An old list, or one of somebody else, says nothing of anybody.
    rig.operators.revoke(dir, "revoked.pem", &[77], 2021);
    rig.refused("good", "operators");
    rig.logged("a list of --api-client-crl has expired");
    Authority::new(dir, "others").revoke(dir, "revoked.pem", &[], IN_FORCE);
    rig.refused("good", "operators");
    rig.logged("--api-client-crl has no list of an authority");
    rig.operators.revoke(dir, "revoked.pem", &[77], IN_FORCE);
    rig.served("status");
    rig.refused("leaver", "operators");
}

#[test]
fn files_that_are_not_as_they_should_be_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let operators = Authority::new(dir, "operators");
    operators.issue(dir, "server", |_| ());
    let refused = || {
        let output = target(dir).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        text
    };
    let key = dir.join("server.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let text = refused();
    assert!(text.contains("--api-key") && text.contains("mode 0644"), "{text}");
    assert!(text.contains(&format!("`chmod 600 {}`", key.display())), "{text}");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let pem = std::fs::read(dir.join("server.pem")).unwrap();
    std::fs::write(dir.join("server.pem"), "nothing").unwrap();
    assert!(refused().contains("no certificate in it"));
    std::fs::write(dir.join("server.pem"), &pem).unwrap();
    std::fs::write(&key, &pem).unwrap();
    assert!(refused().contains("no private key in it"));
    operators.issue(dir, "other", |_| ());
    std::fs::rename(dir.join("other.key"), &key).unwrap();
    let text = refused();
    assert!(text.contains("--api-cert") && text.contains("--api-key"), "{text}");
}
