//! TLS against implementations that are not ours: OpenSSL's and GnuTLS's command-line tools.
//!
//! A tool that is missing, or too old for a case, skips it with a word about it. Traffic stays on
//! the loopback.

use std::io::{BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crypto::psk::{Derivation, Identity, IdentityVersion, Psk, RetainedKey, Suite};
use crypto::tls::{
    Cause, Client, Established, Failure, KeyUpdates, Progress, PskLookup, Server, Session, Unknown,
    candidates,
};
use crypto::{KeyHash, TlsKey};

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:f8131bac-cdef-4165-866b-5998c1e67890";
const SUB: &str = "nqn.2024-05.io.example:subsys1";
const PATIENCE: Duration = Duration::from_secs(60);

fn key(suite: Suite, fill: u8) -> TlsKey {
    TlsKey::generate(suite, &std::array::from_fn(|n| n as u8 ^ fill))
}

fn psk(key: &TlsKey, version: IdentityVersion) -> Psk {
    let retained =
        RetainedKey::new(key, HOST, Derivation::Rfc8446).unwrap_or_else(|e| panic!("{e}"));
    retained.psk(version, HOST, SUB).unwrap_or_else(|e| panic!("{e}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Store(Vec<TlsKey>);

impl PskLookup for Store {
    fn find(&self, identity: &Identity<'_>) -> Result<Vec<Psk>, Unknown> {
        if identity.hostnqn != HOST {
            return Err(Unknown::Host);
        }
        Ok(candidates(&self.0, identity))
    }
}

/// The tool, if it is there; its version is printed once.
fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|p| p.is_file());
    if found.is_none() {
        println!("SKIPPED: there is no `{name}` (Debian packages openssl, gnutls-bin)");
    }
    found
}

/// A tool at work, ended with this.
struct Tool {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: String,
}

impl Tool {
    fn start(command: &mut Command) -> Tool {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the tool starts");
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let errors = sender.clone();
        std::thread::spawn(move || forward(stdout, |line| sender.send(line).is_ok()));
        std::thread::spawn(move || forward(stderr, |line| errors.send(line).is_ok()));
        let stdin = child.stdin.take();
        Tool { child, stdin, lines, seen: String::new() }
    }

    /// Waits until a line that contains `text` was printed, and returns it.
    fn wait_for(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push_str(&line);
                    self.seen.push('\n');
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {text:?} in time in:\n{}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("no {text:?} in:\n{}", self.seen),
            }
        }
    }

    fn type_line(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("not closed");
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).expect("the tool reads");
    }
}

fn forward(reader: impl std::io::BufRead, mut send: impl FnMut(String) -> bool) {
    for line in reader.split(b'\n').map_while(Result::ok) {
        if !send(String::from_utf8_lossy(&line).into_owned()) {
            break;
        }
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Our end of a connection.
struct Ours {
    stream: TcpStream,
    session: Session,
    plain: Vec<u8>,
}

/// What both handshakes have in common here.
trait Handshake: Sized {
    fn feed(&mut self, bytes: &[u8]) -> Result<Progress, Failure>;
    fn take(&mut self) -> Vec<u8>;
    fn finish(self) -> Option<Established>;
}

macro_rules! handshake {
    ($($name:ident),*) => {$(
        impl Handshake for $name {
            fn feed(&mut self, bytes: &[u8]) -> Result<Progress, Failure> {
                $name::feed(self, bytes)
            }
            fn take(&mut self) -> Vec<u8> {
                $name::take(self)
            }
            fn finish(self) -> Option<Established> {
                $name::finish(self)
            }
        }
    )*};
}

handshake!(Server, Client);

fn shake(mut stream: TcpStream, mut end: impl Handshake) -> Result<(Ours, Established), Failure> {
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out can be set");
    let mut buffer = [0; 4096];
    loop {
        stream.write_all(&end.take()).expect("the peer reads");
        let len = stream.read(&mut buffer).expect("the peer answers");
        assert!(len > 0, "the peer closed in the handshake");
        match end.feed(&buffer[..len]) {
            Ok(Progress::Running) => {}
            Ok(Progress::Done) => break,
            Err(failure) => {
                stream.write_all(&end.take()).expect("the peer reads");
                return Err(failure);
            }
        }
    }
    stream.write_all(&end.take()).expect("the peer reads");
    let done = end.finish().expect("it is done");
    let session = Session::new(&done, KeyUpdates::Auto);
    let mut ours = Ours { stream, session, plain: Vec::new() };
    ours.open(&mut done.leftover.clone());
    Ok((ours, done))
}

impl Ours {
    fn open(&mut self, wire: &mut [u8]) {
        let plain = &mut self.plain;
        let result = self.session.open(wire, &mut |p| plain.extend_from_slice(p.bytes()));
        result.unwrap_or_else(|e| panic!("{e}"));
    }

    fn send(&mut self, bytes: &[u8]) {
        let mut out = Vec::new();
        self.session.seal_slices(&[bytes], &mut out).unwrap_or_else(|e| panic!("{e}"));
        self.stream.write_all(&out).expect("the peer reads");
    }

    fn update_key(&mut self, both: bool) {
        let mut out = Vec::new();
        self.session.update_key(both, &mut out);
        self.stream.write_all(&out).expect("the peer reads");
    }

    /// Reads until `text` has come in.
    fn wait_for(&mut self, text: &[u8]) {
        let mut buffer = [0; 16 << 10];
        while !self.plain.windows(text.len()).any(|window| window == text) {
            let len = self.stream.read(&mut buffer).expect("the peer sends");
            assert!(len > 0, "the peer closed, after {:?}", String::from_utf8_lossy(&self.plain));
            self.open(&mut buffer[..len]);
        }
    }
}

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    (listener, port)
}

/// A session file for `-psk_session`: the form in which OpenSSL's tools take a key for SHA-384.
fn session_file(psk: &Psk) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let name = format!("penstock-interop-{}", std::process::id());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&folder).expect("the target folder can be written");
        folder
    });
    // SSL_SESSION in DER: version 1, TLS 1.3, suite, no identifier, the key.
    let secret = psk.secret().expose();
    let [high, low] = psk.suite().iana().to_be_bytes();
    let mut der = vec![2, 1, 1, 2, 2, 3, 4, 4, 2, high, low, 4, 0, 4, secret.len() as u8];
    der.extend_from_slice(secret);
    let mut file = vec![0x30, der.len() as u8];
    file.extend(der);
    let path = folder.join(format!("{:04x}.pem", psk.suite().iana()));
    let mut encode = Command::new("openssl")
        .arg("base64")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("openssl starts");
    encode.stdin.take().expect("a pipe").write_all(&file).expect("openssl reads");
    let output = encode.wait_with_output().expect("openssl ends");
    let body = String::from_utf8(output.stdout).expect("base64 is ASCII");
    let text = format!(
        "-----BEGIN SSL SESSION PARAMETERS-----\n{body}-----END SSL SESSION PARAMETERS-----\n"
    );
    std::fs::write(&path, text).expect("the target folder can be written");
    path
}

/// The key as options of `openssl s_client` and `s_server`.
fn openssl_key(command: &mut Command, psk: &Psk) {
    command.args(["-tls1_3", "-psk_identity", psk.identity()]);
    match psk.suite() {
        Suite::Aes128GcmSha256 => command.args(["-psk", &hex(psk.secret().expose())]),
        Suite::Aes256GcmSha384 => command.arg("-psk_session").arg(session_file(psk)),
    };
}

const CASES: [(Suite, IdentityVersion); 3] = [
    (Suite::Aes128GcmSha256, IdentityVersion::V0),
    (Suite::Aes128GcmSha256, IdentityVersion::V1),
    (Suite::Aes256GcmSha384, IdentityVersion::V1),
];

#[test]
fn openssl_as_host() {
    let Some(openssl) = tool("openssl") else { return };
    for (suite, version) in CASES {
        // The second time with a group that is not ours first: a HelloRetryRequest. With a key for
        // SHA-384 OpenSSL's client then fails, also against OpenSSL's own server (seen with
        // 3.0.19).
        let retry = (suite == Suite::Aes128GcmSha256).then_some("ffdhe2048:X25519");
        for groups in std::iter::once("X25519").chain(retry) {
            let key = key(suite, 0);
            let psk = psk(&key, version);
            let (listener, port) = listen();
            let mut command = Command::new(&openssl);
            command.args(["s_client", "-groups", groups, "-connect"]);
            command.arg(format!("127.0.0.1:{port}"));
            openssl_key(&mut command, &psk);
            let mut host = Tool::start(&mut command);
            let (stream, _) = listener.accept().expect("the host connects");
            let server = Server::new(Arc::new(Store(vec![key]))).unwrap_or_else(|e| panic!("{e}"));
            let (mut ours, done) = shake(stream, server).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((done.suite, done.identity.as_str()), (suite, psk.identity()));
            host.type_line("from the host");
            ours.wait_for(b"from the host\n");
            ours.send(b"from the target\n");
            host.wait_for("from the target");
            // New keys in both directions, asked for by us and by the host.
            ours.update_key(true);
            ours.send(b"under new keys\n");
            host.wait_for("under new keys");
            host.type_line("and answered");
            ours.wait_for(b"and answered\n");
            let counters = ours.session.counters();
            assert_eq!((counters.tx_key_updates, counters.rx_key_updates), (1, 1));
            host.type_line("K");
            host.wait_for("KEYUPDATE");
            host.type_line("and on");
            ours.wait_for(b"and on\n");
            ours.send(b"answered\n");
            host.wait_for("answered");
            let counters = ours.session.counters();
            assert_eq!((counters.tx_key_updates, counters.rx_key_updates), (2, 2));
            host.type_line("Q");
            let mut end = Vec::new();
            ours.stream.read_to_end(&mut end).expect("the host closes");
            ours.open(&mut end);
            assert!(ours.session.is_peer_closed(), "an orderly end");
            println!("openssl s_client, {suite}, {version:?}, {groups}: passed");
        }
    }
}

#[test]
fn openssl_as_target() {
    let Some(openssl) = tool("openssl") else { return };
    // With keys for SHA-256, P-384 is one of our groups that we send no share for: a
    // HelloRetryRequest. With those for SHA-384 it is the only one of OpenSSL 3.0 that we have.
    let cases = CASES.iter().flat_map(|case| ["P-256:P-384", "P-384"].map(|group| (*case, group)));
    for ((suite, version), group) in cases {
        let psk = psk(&key(suite, 0), version);
        let mut command = Command::new(&openssl);
        // The server reverses each line.
        command.args(["s_server", "-nocert", "-rev", "-accept", "127.0.0.1:0"]);
        command.args(["-groups", group]);
        openssl_key(&mut command, &psk);
        let mut target = Tool::start(&mut command);
        let line = target.wait_for("ACCEPT");
        let port = line.rsplit(':').next().and_then(|p| p.trim().parse::<u16>().ok());
        let Some(port) = port else { panic!("no port in {line:?}") };
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
        let client = Client::new(&psk).unwrap_or_else(|e| panic!("{e}"));
        let (mut ours, done) = shake(stream, client).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(done.suite, suite);
        ours.send(b"there and back\n");
        ours.wait_for(b"kcab dna ereht\n");
        ours.update_key(true);
        ours.send(b"keys\n");
        ours.wait_for(b"syek\n");
        ours.send(b"again\n");
        ours.wait_for(b"niaga\n");
        let counters = ours.session.counters();
        assert!(counters.tickets >= 1, "it sends a ticket: {counters:?}");
        assert_eq!((counters.tx_key_updates, counters.rx_key_updates), (1, 1));
        // It hears that nothing follows, and says so itself before it closes: neither is cut off.
        let mut end = Vec::new();
        ours.session.close(&mut end);
        ours.stream.write_all(&end).expect("the peer reads");
        target.wait_for("CONNECTION CLOSED");
        let mut rest = Vec::new();
        ours.stream.read_to_end(&mut rest).expect("the target closes");
        ours.open(&mut rest);
        assert!(ours.session.is_peer_closed(), "an orderly end");
        println!("openssl s_server, {suite}, {version:?}, {group}: passed");
    }
}

#[test]
fn openssl_is_told_why_it_is_refused() {
    let Some(openssl) = tool("openssl") else { return };
    let (good, bad) = (key(Suite::Aes128GcmSha256, 0), key(Suite::Aes128GcmSha256, 1));
    let v0 = psk(&bad, IdentityVersion::V0);
    let v1 = psk(&bad, IdentityVersion::V1);
    for (offered, alert) in [(&v0, "decrypt error"), (&v1, "unknown psk identity")] {
        let (listener, port) = listen();
        let mut command = Command::new(&openssl);
        command.args(["s_client", "-connect", &format!("127.0.0.1:{port}")]);
        openssl_key(&mut command, offered);
        let mut host = Tool::start(&mut command);
        let (stream, _) = listener.accept().expect("the host connects");
        let server =
            Server::new(Arc::new(Store(vec![good.clone()]))).unwrap_or_else(|e| panic!("{e}"));
        let failure = shake(stream, server).err().expect("refused");
        host.wait_for(alert);
        println!("openssl s_client heard `{alert}`; we say: {failure}");
    }
    // The other way round: a target with another key under the same identity.
    let mut command = Command::new(&openssl);
    command.args(["s_server", "-nocert", "-accept", "127.0.0.1:0"]);
    openssl_key(&mut command, &v0);
    let mut target = Tool::start(&mut command);
    let line = target.wait_for("ACCEPT");
    let port: u16 = line.rsplit(':').next().and_then(|p| p.trim().parse().ok()).expect("a port");
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    let ours = Client::new(&psk(&good, IdentityVersion::V0)).unwrap_or_else(|e| panic!("{e}"));
    let failure = shake(stream, ours).err().expect("refused");
    assert!(matches!(failure.cause, Cause::Alert { .. }), "{failure}");
}

/// As tlshd sets GnuTLS up for a key of 32 bytes.
const PRIORITIES: &str = "NORMAL:-COMP-ALL:-VERS-ALL:+VERS-TLS1.3:%NO_TICKETS:-CIPHER-ALL:\
                          +AES-128-GCM:+DHE-PSK:+ECDHE-PSK:+PSK";

// Only SHA-256: the tools set a key by a call that knows no other hash.
#[test]
fn gnutls_as_host() {
    let Some(gnutls) = tool("gnutls-cli") else { return };
    for version in [IdentityVersion::V0, IdentityVersion::V1] {
        let key = key(Suite::Aes128GcmSha256, 0);
        let psk = psk(&key, version);
        let (listener, port) = listen();
        let mut command = Command::new(&gnutls);
        command.args(["--port", &port.to_string(), "--priority", PRIORITIES]);
        command.args(["--pskusername", psk.identity(), "--pskkey", &hex(psk.secret().expose())]);
        let mut host = Tool::start(command.arg("127.0.0.1"));
        let (stream, _) = listener.accept().expect("the host connects");
        let server = Server::new(Arc::new(Store(vec![key]))).unwrap_or_else(|e| panic!("{e}"));
        let (mut ours, done) = shake(stream, server).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(done.identity, psk.identity());
        host.type_line("from the host");
        ours.wait_for(b"from the host\n");
        ours.send(b"from the target\n");
        host.wait_for("from the target");
        ours.update_key(false);
        ours.send(b"under a new key\n");
        host.wait_for("under a new key");
        println!("gnutls-cli, {version:?}: passed");
    }
}

#[test]
fn gnutls_as_target() {
    let Some(gnutls) = tool("gnutls-serv") else { return };
    let psk = psk(&key(Suite::Aes128GcmSha256, 0), IdentityVersion::V1);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("penstock-gnutls-{}.psk", std::process::id()));
    // A name with a colon has to be written in hexadecimal.
    let line = format!("#{}:{}\n", hex(psk.identity().as_bytes()), hex(psk.secret().expose()));
    std::fs::write(&file, line).expect("the target folder can be written");
    // It takes no port 0.
    let (listener, port) = listen();
    drop(listener);
    let mut command = Command::new(&gnutls);
    command.args(["--echo", "--port", &port.to_string(), "--priority", PRIORITIES, "--pskpasswd"]);
    let mut target = Tool::start(command.arg(&file));
    target.wait_for("listening on");
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    let client = Client::new(&psk).unwrap_or_else(|e| panic!("{e}"));
    let (mut ours, _) = shake(stream, client).unwrap_or_else(|e| panic!("{e}"));
    ours.send(b"there and back\n");
    ours.wait_for(b"there and back\n");
    ours.update_key(false);
    ours.send(b"under a new key\n");
    ours.wait_for(b"under a new key\n");
    let _ = std::fs::remove_file(&file);
    println!("gnutls-serv: passed");
}

#[test]
fn keys_of_no_hash_work_with_both_derivations() {
    // The same key, derived both ways, gives two keys of one identity; a peer may have either.
    let key = TlsKey::new(KeyHash::None, &[3; 32]).unwrap_or_else(|e| panic!("{e}"));
    let Some(openssl) = tool("openssl") else { return };
    for way in Derivation::ALL {
        let retained = RetainedKey::new(&key, HOST, way).unwrap_or_else(|e| panic!("{e}"));
        let psk = retained.psk(IdentityVersion::V1, HOST, SUB).unwrap_or_else(|e| panic!("{e}"));
        let (listener, port) = listen();
        let mut command = Command::new(&openssl);
        command.args(["s_client", "-connect", &format!("127.0.0.1:{port}")]);
        openssl_key(&mut command, &psk);
        let _host = Tool::start(&mut command);
        let (stream, _) = listener.accept().expect("the host connects");
        let server =
            Server::new(Arc::new(Store(vec![key.clone()]))).unwrap_or_else(|e| panic!("{e}"));
        let (_, done) = shake(stream, server).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(done.derivation, way);
    }
}
