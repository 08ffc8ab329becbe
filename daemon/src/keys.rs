//! The keys of hosts, as the operator keeps them.
//!
//! ```text
//!   penstock key ... ─► management API ─► KeyBook ─► keys      (mode 0600)
//!   penstock key ... --data DIR ──────────► KeyBook └► KeyStore of the running target
//! ```
//!
//! A change is durable before it is in force. Without a data directory keys end with the process.
//!
//! The file has a line for each key: name, kind, host, subsystem, end and begin of its life, and the
//! key in its interchange format; `-` where there is nothing. It is not TOML, so that key material
//! stays in buffers that are wiped. A new key is appended, so that the hundred-thousandth takes as
//! long as the first; any other change replaces the file as a whole. Each write ends with a line that
//! counts the keys: what stands behind the last of them was not finished and never in force.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use api::{AddKey, Code, ExportKeys, Exported, Key, KeyKind, Problem, RotateKey, SecretString};
use crypto::nvme_cli::{HostSetup, Imported, NvmeCli, SetupError, import};
use crypto::psk::{IdentityVersion, Suite};
use crypto::{DhchapKey, KeyHash, SecretText, TlsKey};
use nvme::spec::Nqn;
use nvmf_target::{DHCHAP_KEYS_MAX, HostDhchapKey, HostKeys, HostTlsKey, KeyStore, TLS_KEYS_MAX};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::identity::UUID_NQN;
use crate::private;
use crate::state::{State, StateError, replace};

const FILE: &str = "keys";
const TEMPORARY_FILE: &str = "keys.new";
/// Keys of one target; the file then has some 60 MB.
const KEYS_MAX: usize = 200_000;
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Longest line of a key, with the one behind it: two names of 223 bytes, a key, and numbers.
const LINE_BYTES_MAX: usize = 1024;
const HEAD: &str = "penstock-keys 1";
/// Longest overlap and lifetime that are believed: ten years.
const SECONDS_MAX: u64 = 10 * 366 * 86_400;

#[derive(Clone)]
enum Material {
    Tls(TlsKey),
    Dhchap(DhchapKey),
}

impl Material {
    fn text(&self) -> SecretText {
        match self {
            Material::Tls(key) => key.to_text(),
            Material::Dhchap(key) => key.to_text(),
        }
    }

    fn bits(&self) -> u32 {
        let len = match self {
            Material::Tls(key) => key.secret().expose().len(),
            Material::Dhchap(key) => key.secret().expose().len(),
        };
        8 * len as u32
    }
}

#[derive(Clone)]
struct Record {
    id: String,
    kind: KeyKind,
    host: Nqn,
    subsystem: Option<Nqn>,
    expires: Option<u64>,
    created: u64,
    material: Material,
}

const KINDS: [(KeyKind, &str); 3] = [
    (KeyKind::Tls, "tls"),
    (KeyKind::Dhchap, "dhchap"),
    (KeyKind::DhchapController, "dhchap-controller"),
];

fn kind_name(kind: KeyKind) -> &'static str {
    KINDS.iter().find(|(known, _)| *known == kind).map_or("", |(_, name)| name)
}

impl Record {
    fn is_expired(&self, now: u64) -> bool {
        self.expires.is_some_and(|at| now >= at)
    }

    fn shown(&self, now: u64) -> Key {
        Key {
            id: self.id.clone(),
            kind: self.kind,
            host: self.host.to_string(),
            subsystem: self.subsystem.as_ref().map(Nqn::to_string),
            bits: self.material.bits(),
            created_s: self.created,
            expires_s: self.expires,
            expired: self.is_expired(now),
        }
    }

    fn write(&self, out: &mut String) {
        let optional = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let text = self.material.text();
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{} {} {} {} {} {} {}",
            self.id,
            kind_name(self.kind),
            self.host,
            optional(self.subsystem.as_ref().map(Nqn::to_string)),
            optional(self.expires.map(|at| at.to_string())),
            self.created,
            text.expose(),
        );
    }

    fn parse(line: &str) -> Option<Record> {
        let mut parts = line.split(' ');
        let mut next = || parts.next().filter(|part| !part.is_empty());
        let id = next()?.to_owned();
        let kind = next()?;
        let (kind, _) = *KINDS.iter().find(|(_, name)| *name == kind)?;
        let host = Nqn::new(next()?).ok()?;
        let subsystem = match next()? {
            "-" => None,
            nqn => Some(Nqn::new(nqn).ok()?),
        };
        let expires = match next()? {
            "-" => None,
            at => Some(at.parse().ok()?),
        };
        let created = next()?.parse().ok()?;
        let material = match (kind, import(next()?).ok()?) {
            (KeyKind::Tls, Imported::Tls(key)) => Material::Tls(key),
            (KeyKind::Dhchap | KeyKind::DhchapController, Imported::Dhchap(key)) => {
                Material::Dhchap(key)
            }
            _ => return None,
        };
        Some(Record { id, kind, host, subsystem, expires, created, material })
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn problem(error: Code, what: impl Into<String>, allowed: impl Into<String>) -> Problem {
    Problem { error, what: what.into(), allowed: allowed.into() }
}

fn random(bytes: &mut [u8]) -> Result<(), Problem> {
    let filled = File::open("/dev/urandom").and_then(|mut file| file.read_exact(bytes));
    filled.map_err(|error| problem(Code::Failed, format!("no random bytes: {error}"), ""))
}

/// See the module's documentation.
pub(crate) struct KeyBook {
    dir: Option<PathBuf>,
    /// The file ends in something that was not finished: it is not appended to.
    is_torn: bool,
    records: Vec<Record>,
    store: Arc<KeyStore>,
}

impl KeyBook {
    /// Reads the keys of a data directory that the caller has locked; `None`: nothing is kept. Gives
    /// all of them to `store`.
    pub(crate) fn open(dir: Option<&Path>, store: Arc<KeyStore>) -> Result<KeyBook, StateError> {
        // Before the first of them is in memory; they may come later, too.
        private::keep_memory_private();
        let (records, is_torn) = match dir {
            Some(dir) => read(&dir.join(FILE))?,
            None => (Vec::new(), false),
        };
        let book = KeyBook { dir: dir.map(Path::to_owned), is_torn, records, store };
        let mut by_host: BTreeMap<&str, HostKeys> = BTreeMap::new();
        for record in &book.records {
            give(by_host.entry(record.host.as_str()).or_default(), record);
        }
        for (host, keys) in by_host {
            book.store.set(host, keys);
        }
        Ok(book)
    }

    /// Makes `records` durable, then puts the keys of `host` in force.
    fn commit(&mut self, records: Vec<Record>, host: &Nqn) -> Result<(), Problem> {
        if let Some(dir) = &self.dir {
            save(dir, &records).map_err(not_kept)?;
            self.is_torn = false;
        }
        self.records = records;
        self.put_in_force(host);
        Ok(())
    }

    /// The same for one more.
    fn commit_one(&mut self, record: Record) -> Result<(), Problem> {
        let host = record.host.clone();
        self.records.push(record);
        if let Some(dir) = &self.dir
            && (self.is_torn || append(dir, &self.records).is_err())
        {
            // Whatever was written of it stays behind what counts.
            self.is_torn = true;
            if let Err(error) = save(dir, &self.records) {
                self.records.pop();
                return Err(not_kept(error));
            }
            self.is_torn = false;
        }
        self.put_in_force(&host);
        Ok(())
    }

    fn put_in_force(&self, host: &Nqn) {
        let mut keys = HostKeys::default();
        for record in self.records.iter().filter(|record| record.host == *host) {
            give(&mut keys, record);
        }
        self.store.set(host.as_str(), keys);
    }

    /// All keys, or those of a host.
    pub(crate) fn list(&self, host: Option<&str>) -> Vec<Key> {
        let now = now();
        let meant = |record: &&Record| host.is_none_or(|host| record.host.as_str() == host);
        self.records.iter().filter(meant).map(|record| record.shown(now)).collect()
    }

    /// Makes or imports a key.
    pub(crate) fn add(&mut self, request: &AddKey) -> Result<Key, Problem> {
        let host = nqn("host", &request.host)?;
        let subsystem = request.subsystem.as_deref().map(|text| nqn("subsystem", text));
        let subsystem = subsystem.transpose()?;
        if subsystem.is_some() && request.kind != KeyKind::Tls {
            return Err(problem(
                Code::Invalid,
                "a secret for DH-HMAC-CHAP belongs to a host, whatever the subsystem",
                "leave the subsystem out",
            ));
        }
        let material = match &request.key {
            Some(text) => imported(request.kind, text)?,
            None => generated(request.kind, request.bits)?,
        };
        if request.key.is_some() && request.bits.is_some_and(|bits| bits != material.bits()) {
            let what = format!("the key has {} bits", material.bits());
            return Err(problem(Code::Invalid, what, "leave the length out"));
        }
        let expires = request.expires_in_s.map(|s| seconds(s).map(|s| now() + s)).transpose()?;
        let record = Record {
            id: self.new_id()?,
            kind: request.kind,
            host,
            subsystem,
            expires,
            created: now(),
            material,
        };
        self.insert(record)
    }

    fn new_id(&self) -> Result<String, Problem> {
        loop {
            let mut bytes = [0; 4];
            random(&mut bytes)?;
            let id = format!("{:08x}", u32::from_be_bytes(bytes));
            if self.records.iter().all(|record| record.id != id) {
                return Ok(id);
            }
        }
    }

    fn insert(&mut self, record: Record) -> Result<Key, Problem> {
        let now = now();
        let of_host =
            self.records.iter().filter(|r| r.host == record.host && r.kind == record.kind);
        let live = of_host.filter(|r| !r.is_expired(now)).count();
        let max = max_of(record.kind);
        if live >= max || self.records.len() >= KEYS_MAX {
            return Err(problem(
                Code::Conflict,
                format!("the host has {live} keys of this kind, of {KEYS_MAX} keys in all"),
                format!("at most {max} at the same time: `penstock key remove` an old one"),
            ));
        }
        let shown = record.shown(now);
        self.commit_one(record)?;
        tracing::info!(
            key = shown.id,
            host = shown.host,
            kind = kind_name(shown.kind),
            "key added"
        );
        Ok(shown)
    }

    fn record(&self, id: &str) -> Result<&Record, Problem> {
        self.records.iter().find(|record| record.id == id).ok_or_else(|| {
            problem(Code::NotFound, format!("there is no key {id:?}"), "see `penstock key list`")
        })
    }

    /// Takes a key away. Connections that were made with it stay.
    pub(crate) fn remove(&mut self, id: &str) -> Result<Key, Problem> {
        let record = self.record(id)?.clone();
        let mut records = self.records.clone();
        records.retain(|other| other.id != id);
        self.commit(records, &record.host)?;
        tracing::info!(key = id, host = %record.host, "key removed");
        let has_secret =
            self.records.iter().any(|r| r.host == record.host && r.kind == KeyKind::Dhchap);
        if record.kind == KeyKind::Dhchap && !has_secret {
            tracing::warn!(
                host = %record.host,
                "the host has no secret any more: without proof it is believed where a listener does \
                 not say auth=required, and refused where it does"
            );
        }
        Ok(record.shown(now()))
    }

    /// Makes a new key of the same kind; the old one is taken for some time yet. A controller has one
    /// secret toward a host: there the new one takes its place at once.
    pub(crate) fn rotate(&mut self, id: &str, request: &RotateKey) -> Result<Key, Problem> {
        let overlap = seconds(request.overlap_s)?;
        let old = self.record(id)?.clone();
        let end = now() + overlap;
        let mut records = self.records.clone();
        for record in records.iter_mut().filter(|record| record.id == id) {
            record.expires = Some(record.expires.map_or(end, |at| at.min(end)));
        }
        if old.kind == KeyKind::DhchapController && overlap > 0 {
            // The controller speaks, and cannot know which of two the host has.
            return Err(problem(
                Code::Invalid,
                "the controller proves itself with one secret, so that two of them cannot overlap",
                "an overlap of 0, at the time at which the host is given the new one: connections \
                 that exist stay, and those that the host makes in between fail and are repeated",
            ));
        }
        let record = Record {
            id: self.new_id()?,
            created: now(),
            expires: None,
            material: generated(old.kind, Some(old.material.bits()))?,
            ..old.clone()
        };
        let live = records
            .iter()
            .filter(|r| r.host == old.host && r.kind == old.kind && !r.is_expired(now()));
        if live.count() >= max_of(old.kind) || records.len() >= KEYS_MAX {
            let what = "the host has as many keys of this kind as it may";
            return Err(problem(Code::Conflict, what, "`penstock key remove` an old one"));
        }
        let shown = record.shown(now());
        records.push(record);
        self.commit(records, &old.host)?;
        tracing::info!(key = shown.id, old = id, host = shown.host, "key rotated");
        Ok(shown)
    }

    /// What a host has to run, with the newest of its keys.
    pub(crate) fn export(&self, request: &ExportKeys) -> Result<Exported, Problem> {
        let host = nqn("host", &request.host)?;
        let subsystem = nqn("subsystem", &request.subsystem)?;
        let identity = match request.identity {
            0 => IdentityVersion::V0,
            1 => IdentityVersion::V1,
            other => {
                return Err(problem(Code::Invalid, format!("identity version {other}"), "0 or 1"));
            }
        };
        let (addr, port) = request
            .address
            .rsplit_once(':')
            .and_then(|(addr, port)| Some((addr, port.parse::<u16>().ok()?)))
            .ok_or_else(|| {
                let what = format!("{:?} is no address", request.address);
                problem(Code::Invalid, what, "ADDR:PORT, such as 192.0.2.7:4420")
            })?;
        let addr = addr.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(addr);
        let now = now();
        let newest = |kind: KeyKind| {
            let fits = |record: &&Record| {
                record.host == host
                    && record.kind == kind
                    && !record.is_expired(now)
                    && record.subsystem.as_ref().is_none_or(|nqn| *nqn == subsystem)
            };
            self.records.iter().rev().find(fits).map(|record| &record.material)
        };
        let tls = match newest(KeyKind::Tls) {
            Some(Material::Tls(key)) if !request.concat => Some((key, identity)),
            _ => None,
        };
        let secret = |kind| match newest(kind) {
            Some(Material::Dhchap(key)) => Some(key),
            _ => None,
        };
        let (dhchap, controller) = (secret(KeyKind::Dhchap), secret(KeyKind::DhchapController));
        if tls.is_none() && dhchap.is_none() || request.concat && dhchap.is_none() {
            return Err(problem(
                Code::NotFound,
                format!("host {host} has no key for that"),
                format!("make one: penstock key generate --host {host}"),
            ));
        }
        if request.emulator {
            let dhchap_controller = controller.filter(|_| dhchap.is_some());
            return Ok(emulator_lines(request, tls.map(|(key, _)| key), dhchap, dhchap_controller));
        }
        let version = NvmeCli::parse(&request.nvme_cli).ok_or_else(|| {
            let what = format!("nvme-cli {:?} is no version", request.nvme_cli);
            problem(Code::Invalid, what, "such as 2.13, as `nvme version` says on the host")
        })?;
        let setup = HostSetup {
            version,
            hostnqn: host.as_str(),
            subnqn: subsystem.as_str(),
            address: (addr, port),
            tls,
            dhchap,
            dhchap_controller: controller.filter(|_| dhchap.is_some()),
            concatenate: request.concat,
        };
        let lines = setup.lines().map_err(|error| {
            let allowed = match error {
                SetupError::TooOld { .. } => {
                    "a later nvme-cli on the host, a secret for DH-HMAC-CHAP in place of the key for \
                     TLS, or no `--concat`"
                }
                SetupError::Psk(_) => "use identity version 1, or shorter names",
            };
            problem(Code::Invalid, error.to_string(), allowed)
        })?;
        Ok(Exported { lines: SecretString::new(lines.expose().to_owned()) })
    }
}

/// What makes the files of an emulator and uses them.
fn emulator_lines(
    request: &ExportKeys,
    tls: Option<&TlsKey>,
    dhchap: Option<&DhchapKey>,
    controller: Option<&DhchapKey>,
) -> Exported {
    // As long as it can get, so that growing leaves no copies.
    let mut lines = Zeroizing::new(String::with_capacity(4096));
    lines.push_str("umask 077\n");
    let mut keys = String::new();
    let mut file = |key: &str, name: &str, text: &SecretText| {
        // Writing to a string does not fail.
        let _ = writeln!(lines, "cat >{name} <<'END'\n{}\nEND", text.expose());
        let _ = write!(keys, ",{key}={name}");
    };
    if let Some(key) = tls {
        file("psk", "penstock.psk", &key.to_text());
    }
    if let Some(key) = dhchap {
        file("dhchap", "penstock.dhchap", &key.to_text());
    }
    if let Some(key) = controller {
        file("dhchap_ctrl", "penstock.dhchap-ctrl", &key.to_text());
    }
    if tls.is_none() {
        keys.push_str(if request.concat { ",tls=concat" } else { ",tls=off" });
    }
    let ExportKeys { host, subsystem, address, .. } = request;
    if !host.starts_with(UUID_NQN) {
        let id = Uuid::new_v5(&Uuid::NAMESPACE_URL, host.as_bytes());
        let _ = write!(keys, ",hostid={id}");
    }
    let _ = writeln!(
        lines,
        "penstock emulate --device disk=virtio-blk,socket=disk.sock,connect={address},\
         subnqn={subsystem},nsid=1,hostnqn={host}{keys}"
    );
    Exported { lines: SecretString::new(std::mem::take(&mut *lines)) }
}

/// Keys of a kind that a host may have at the same time.
fn max_of(kind: KeyKind) -> usize {
    match kind {
        KeyKind::Tls => TLS_KEYS_MAX,
        KeyKind::Dhchap => DHCHAP_KEYS_MAX,
        KeyKind::DhchapController => 1,
    }
}

/// Adds a key to what a host can prove itself with.
fn give(keys: &mut HostKeys, record: &Record) {
    match (&record.material, record.kind) {
        (Material::Tls(key), _) => keys.tls.push(HostTlsKey {
            key: key.clone(),
            subnqn: record.subsystem.as_ref().map(Nqn::to_string),
            expires: record.expires,
        }),
        (Material::Dhchap(key), kind) => {
            let secret = HostDhchapKey { key: key.clone(), expires: record.expires };
            if kind == KeyKind::Dhchap {
                keys.dhchap.push(secret);
            } else {
                // The last one: when it was made, those before it had expired.
                keys.dhchap_controller = Some(secret);
            }
        }
    }
}

fn nqn(what: &str, text: &str) -> Result<Nqn, Problem> {
    Nqn::new(text).map_err(|error| {
        problem(Code::Invalid, format!("{what} {text:?}: {error}"), "an NQN, as the host has it")
    })
}

fn seconds(seconds: u64) -> Result<u64, Problem> {
    if seconds <= SECONDS_MAX {
        return Ok(seconds);
    }
    Err(problem(Code::Invalid, format!("{seconds} s"), format!("at most {SECONDS_MAX} s")))
}

fn imported(kind: KeyKind, text: &SecretString) -> Result<Material, Problem> {
    let allowed = match kind {
        KeyKind::Tls => "what `nvme gen-tls-key` prints",
        _ => "what `nvme gen-dhchap-key` prints",
    };
    match (kind, import(text.expose())) {
        (KeyKind::Tls, Ok(Imported::Tls(key))) => Ok(Material::Tls(key)),
        (KeyKind::Dhchap | KeyKind::DhchapController, Ok(Imported::Dhchap(key))) => {
            Ok(Material::Dhchap(key))
        }
        (_, Ok(_)) => Err(problem(Code::Invalid, "this is a key of another kind", allowed)),
        (_, Err(error)) => Err(problem(Code::Invalid, error.to_string(), allowed)),
    }
}

fn generated(kind: KeyKind, bits: Option<u32>) -> Result<Material, Problem> {
    let mut bytes = Zeroizing::new([0; 64]);
    random(&mut *bytes)?;
    let wrong = |bits: u32, allowed: &str| {
        problem(Code::Invalid, format!("a key of {bits} bits"), allowed.to_owned())
    };
    if kind == KeyKind::Tls {
        let suite = match bits.unwrap_or(256) {
            256 => Suite::Aes128GcmSha256,
            384 => Suite::Aes256GcmSha384,
            bits => return Err(wrong(bits, "256 or 384")),
        };
        let (bytes, _) = bytes.split_first_chunk().expect("64 are more than 48");
        return Ok(Material::Tls(TlsKey::generate(suite, bytes)));
    }
    let hash = match bits.unwrap_or(256) {
        256 => KeyHash::Sha256,
        384 => KeyHash::Sha384,
        512 => KeyHash::Sha512,
        bits => return Err(wrong(bits, "256, 384 or 512")),
    };
    Ok(Material::Dhchap(DhchapKey::generate(hash, &bytes)))
}

fn not_kept(error: StateError) -> Problem {
    let error = format!("{:#}", anyhow::Error::new(error));
    problem(Code::Failed, format!("the keys cannot be kept: {error}"), "")
}

/// Adds the last of `records` to the file, which has the others.
fn append(dir: &Path, records: &[Record]) -> io::Result<()> {
    let Some(last) = records.last() else { return Ok(()) };
    let mut text = Zeroizing::new(String::with_capacity(LINE_BYTES_MAX));
    last.write(&mut text);
    let _ = writeln!(text, "end {}", records.len());
    let mut file = File::options().append(true).open(dir.join(FILE))?;
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

fn save(dir: &Path, records: &[Record]) -> Result<(), StateError> {
    // As long as it can get, so that growing leaves no copies: two names and a key in each line.
    let capacity = 256
        + records.len() * 320
        + records.iter().map(|r| 2 * r.host.as_str().len() + 256).sum::<usize>();
    let mut text = Zeroizing::new(String::with_capacity(capacity));
    let _ = writeln!(text, "{HEAD}");
    for record in records {
        record.write(&mut text);
    }
    let _ = writeln!(text, "end {}", records.len());
    replace(dir, FILE, TEMPORARY_FILE, text.as_bytes())
}

/// The keys of a file, and whether it ends in something that was not finished.
fn read(path: &Path) -> Result<(Vec<Record>, bool), StateError> {
    let damaged = |problem: String| StateError::Damaged { path: path.to_owned(), problem };
    let text = match private::read(path, FILE_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_missing() => return Ok((Vec::new(), false)),
        Err(error) => return Err(error.into()),
    };
    parse(&text).map_err(damaged)
}

fn parse(text: &str) -> Result<(Vec<Record>, bool), String> {
    let mut lines = text.split_inclusive('\n');
    if lines.next().map(str::trim_end) != Some(HEAD) {
        return Err(format!("it does not begin with {HEAD:?}"));
    }
    let mut records = Vec::new();
    // How many of them were counted, and where that stands.
    let mut counted = None;
    let mut at = HEAD.len() + 1;
    let mut number = 1;
    for line in lines {
        at += line.len();
        number += 1;
        let is_whole = line.ends_with('\n');
        let line = line.trim_end_matches('\n');
        if let Some(count) = line.strip_prefix("end ").filter(|_| is_whole) {
            if count.parse() != Ok(records.len()) {
                return Err(format!("it says {count} keys and has {}", records.len()));
            }
            counted = Some(records.len());
        } else if let Some(record) = Record::parse(line).filter(|_| is_whole) {
            records.push(record);
        } else if counted.is_none() || text.get(at - 1..).is_none_or(|rest| rest.contains("\nend "))
        {
            // The line is not shown: it has a key in it.
            return Err(match is_whole {
                true => format!("line {number} is no key"),
                false => "it is cut off".to_owned(),
            });
        } else {
            break;
        }
    }
    let Some(count) = counted else { return Err("it is cut off".to_owned()) };
    let is_torn = records.len() != count || at != text.len() || !text.ends_with('\n');
    records.truncate(count);
    Ok((records, is_torn))
}

/// What a host has in a data directory, to prove itself to a subsystem with.
#[derive(Default)]
pub(crate) struct OfHost {
    /// For TLS, the newest first.
    pub(crate) tls: Vec<TlsKey>,
    /// The newest secret.
    pub(crate) dhchap: Option<DhchapKey>,
    /// What the controller proves itself with.
    pub(crate) dhchap_controller: Option<DhchapKey>,
}

/// The keys of a host that have not expired, in a data directory that the caller has locked.
pub(crate) fn of_host(dir: &Path, host: &Nqn, subsystem: &Nqn) -> Result<OfHost, StateError> {
    private::keep_memory_private();
    let mut found = OfHost::default();
    let now = now();
    let (records, _) = read(&dir.join(FILE))?;
    let fits = |record: &&Record| {
        record.host == *host
            && !record.is_expired(now)
            && record.subsystem.as_ref().is_none_or(|nqn| nqn == subsystem)
    };
    for record in records.iter().rev().filter(fits) {
        match (&record.material, record.kind) {
            (Material::Tls(key), _) if found.tls.len() < TLS_KEYS_MAX => {
                found.tls.push(key.clone());
            }
            (Material::Tls(_), _) => {}
            (Material::Dhchap(key), KeyKind::DhchapController) => {
                found.dhchap_controller.get_or_insert_with(|| key.clone());
            }
            (Material::Dhchap(key), _) => {
                found.dhchap.get_or_insert_with(|| key.clone());
            }
        }
    }
    Ok(found)
}

/// The keys of a data directory that no process uses.
pub struct OfflineKeys {
    book: KeyBook,
    /// Holds the lock.
    _state: State,
}

impl OfflineKeys {
    /// Takes the directory; refused while a target uses it.
    pub fn open(dir: &Path) -> anyhow::Result<OfflineKeys> {
        let mut state = State::open(dir)?;
        state.save()?;
        let book = KeyBook::open(Some(dir), Arc::default())?;
        Ok(OfflineKeys { book, _state: state })
    }

    /// All keys, or those of a host.
    pub fn list(&self, host: Option<&str>) -> Vec<Key> {
        self.book.list(host)
    }

    /// Makes or imports a key.
    pub fn add(&mut self, request: &AddKey) -> Result<Key, Problem> {
        self.book.add(request)
    }

    /// Takes a key away.
    pub fn remove(&mut self, id: &str) -> Result<Key, Problem> {
        self.book.remove(id)
    }

    /// Makes a new key beside an old one.
    pub fn rotate(&mut self, id: &str, request: &RotateKey) -> Result<Key, Problem> {
        self.book.rotate(id, request)
    }

    /// What a host has to run.
    pub fn export(&self, request: &ExportKeys) -> Result<Exported, Problem> {
        self.book.export(request)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    const HOST: &str = "nqn.2014-08.org.example:host";
    const SUBSYSTEM: &str = "nqn.2014-08.org.example:sub";

    fn request(kind: KeyKind) -> AddKey {
        AddKey {
            kind,
            host: HOST.to_owned(),
            subsystem: None,
            expires_in_s: None,
            key: None,
            bits: None,
        }
    }

    fn export(concat: bool) -> ExportKeys {
        ExportKeys {
            host: HOST.to_owned(),
            subsystem: SUBSYSTEM.to_owned(),
            address: "192.0.2.7:4420".to_owned(),
            nvme_cli: "2.13".to_owned(),
            identity: 1,
            concat,
            emulator: false,
        }
    }

    #[test]
    fn keys_outlive_a_restart_and_nobody_else_reads_them() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("data");
        let ids = {
            let mut keys = OfflineKeys::open(&dir).unwrap();
            let kinds = KINDS.map(|(kind, _)| kind);
            kinds.map(|kind| keys.add(&request(kind)).unwrap().id)
        };
        let file = dir.join(FILE);
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        let store = Arc::new(KeyStore::default());
        let book = KeyBook::open(Some(&dir), store.clone()).unwrap();
        assert_eq!(book.list(None).iter().map(|key| key.id.clone()).collect::<Vec<_>>(), ids);
        assert!(book.list(Some("nqn.2014-08.org.example:other")).is_empty());
        let given = store.get(HOST).unwrap();
        assert_eq!((given.tls.len(), given.dhchap.len()), (1, 1));
        assert!(given.dhchap_controller.is_some());

        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = KeyBook::open(Some(&dir), store).err().unwrap().to_string();
        assert!(error.contains("others may use it") && error.contains("`chmod 600 "), "{error}");
    }

    #[test]
    fn a_damaged_file_is_refused_and_not_shown() {
        let scratch = tempfile::tempdir().unwrap();
        let mut keys = OfflineKeys::open(scratch.path()).unwrap();
        keys.add(&request(KeyKind::Tls)).unwrap();
        let text = std::fs::read_to_string(scratch.path().join(FILE)).unwrap();
        assert_eq!(parse(&text).map(|(records, torn)| (records.len(), torn)), Ok((1, false)));
        for len in 0..text.len() - 1 {
            let error = parse(&text[..len]).err().unwrap();
            assert!(!error.contains("NVMeTLSkey"), "{error}");
        }
        assert!(parse(&text.replace(" tls ", " dhchap ")).is_err());
    }

    #[test]
    fn what_was_not_finished_was_never_in_force() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let mut keys = OfflineKeys::open(dir).unwrap();
        keys.add(&request(KeyKind::Tls)).unwrap();
        let one = std::fs::read_to_string(dir.join(FILE)).unwrap();
        keys.add(&request(KeyKind::Dhchap)).unwrap();
        let two = std::fs::read_to_string(dir.join(FILE)).unwrap();
        assert!(two.starts_with(&one), "a new key is appended");
        drop(keys);
        for len in one.len()..=two.len() {
            let is_whole = len == two.len();
            let (records, is_torn) = parse(&two[..len]).unwrap_or_else(|e| panic!("{len}: {e}"));
            assert_eq!(records.len(), 1 + usize::from(is_whole), "{len}");
            assert_eq!(is_torn, len != one.len() && !is_whole, "{len}");
        }
        // What is wrong before the end is damage.
        assert!(parse(&two.replacen(" tls ", " tle ", 1)).is_err());
        assert!(parse(&two.replacen("end 1", "end 2", 1)).is_err());
        assert!(parse(&two.replacen(" dhchap ", " dhchop ", 1)).is_err());

        // The next key goes to a file that is whole again.
        std::fs::write(dir.join(FILE), &two[..two.len() - 3]).unwrap();
        let mut keys = OfflineKeys::open(dir).unwrap();
        assert_eq!(keys.list(None).len(), 1);
        keys.add(&request(KeyKind::DhchapController)).unwrap();
        drop(keys);
        let (records, is_torn) = read(&dir.join(FILE)).unwrap();
        assert_eq!((records.len(), is_torn), (2, false));
        assert_eq!(std::fs::metadata(dir.join(FILE)).unwrap().mode() & 0o777, 0o600);
    }

    mod scale {
        use std::time::{Duration, Instant};

        use super::*;

        fn resident() -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
        }

        /// What is kept of many hosts, how long a start takes for it, and what one more costs.
        #[test]
        #[ignore = "slow; a step of its own"]
        fn a_hundred_thousand_hosts_with_keys() {
            const HOSTS: usize = 100_000;
            const HOST_BYTES_MAX: u64 = 2048;

            let scratch = tempfile::tempdir().unwrap();
            let dir = scratch.path();
            let records: Vec<Record> = (0..HOSTS)
                .map(|n| Record {
                    id: format!("{n:08x}"),
                    kind: KeyKind::Tls,
                    host: Nqn::new(&format!("nqn.2014-08.org.example:host-{n}")).unwrap(),
                    subsystem: None,
                    expires: None,
                    created: 1_700_000_000,
                    material: generated(KeyKind::Tls, None).unwrap(),
                })
                .collect();
            save(dir, &records).unwrap();
            drop(records);
            let file = std::fs::metadata(dir.join(FILE)).unwrap().len();

            let (before, start) = (resident(), Instant::now());
            let store = Arc::new(KeyStore::default());
            let mut book = KeyBook::open(Some(dir), store.clone()).unwrap();
            let opened = start.elapsed();
            let bytes = resident().saturating_sub(before) / HOSTS as u64;
            assert_eq!(store.len(), HOSTS);

            let mut adds = [Duration::ZERO; 20];
            let mut last = String::new();
            for (n, took) in adds.iter_mut().enumerate() {
                let start = Instant::now();
                let host = format!("nqn.2014-08.org.example:new-{n}");
                last = book.add(&AddKey { host, ..request(KeyKind::Tls) }).unwrap().id;
                *took = start.elapsed();
            }
            adds.sort_unstable();
            let start = Instant::now();
            book.rotate(&last, &RotateKey { overlap_s: 60 }).unwrap();
            let rotated = start.elapsed();
            println!(
                "{HOSTS} hosts: a file of {} MiB, read in {opened:?}; {bytes} bytes of memory each; \
                 one more in {:?} (median), a rotation in {rotated:?}",
                file >> 20,
                adds[adds.len() / 2],
            );
            assert!(bytes < HOST_BYTES_MAX, "{bytes} bytes for each host");
            assert!(opened < Duration::from_secs(10), "read in {opened:?}");
            assert!(adds[adds.len() / 2] < Duration::from_secs(1), "one more in {adds:?}");
            drop(book);
            let again = KeyBook::open(Some(dir), Arc::default()).unwrap();
            assert_eq!(again.list(None).len(), HOSTS + adds.len() + 1);
        }
    }

    #[test]
    fn rotation_has_an_overlap() {
        let store = Arc::new(KeyStore::default());
        let mut book = KeyBook::open(None, store.clone()).unwrap();
        let old = book.add(&AddKey { bits: Some(384), ..request(KeyKind::Tls) }).unwrap();
        let new = book.rotate(&old.id, &RotateKey { overlap_s: 60 }).unwrap();
        assert_eq!((new.bits, new.expires_s), (384, None));
        let old_now = book.list(None).into_iter().find(|key| key.id == old.id).unwrap();
        assert!(old_now.expires_s.is_some() && !old_now.expired);
        assert_eq!(store.get(HOST).unwrap().tls.len(), 2);
        // Nothing of the old one is left when it is removed.
        book.remove(&old.id).unwrap();
        assert_eq!(store.get(HOST).unwrap().tls.len(), 1);
        book.remove(&new.id).unwrap();
        assert!(store.is_empty());
        assert_eq!(book.remove(&new.id).err().unwrap().error, Code::NotFound);
    }

    #[test]
    fn the_controllers_secret_ends_and_is_replaced_at_once() {
        let store = Arc::new(KeyStore::default());
        let mut book = KeyBook::open(None, store.clone()).unwrap();
        let kind = KeyKind::DhchapController;
        let request = AddKey { expires_in_s: Some(60), ..request(kind) };
        let old = book.add(&request).unwrap();
        let given = || store.get(HOST).unwrap().dhchap_controller.clone().unwrap();
        // The store is told of the end, whoever runs when it comes.
        assert_eq!(given().expires, old.expires_s);
        assert!(old.expires_s.is_some());
        let refused = book.rotate(&old.id, &RotateKey { overlap_s: 60 }).err().unwrap();
        assert!(refused.allowed.contains("an overlap of 0"), "{refused:?}");
        assert_eq!(book.list(None).len(), 1, "nothing has changed");
        let before = given().key;
        let new = book.rotate(&old.id, &RotateKey { overlap_s: 0 }).unwrap();
        assert!(given().key != before && given().expires.is_none());
        let ended: Vec<bool> = book.list(None).iter().map(|key| key.expired).collect();
        assert_eq!(ended, [true, false]);
        assert_eq!(book.add(&request).err().unwrap().error, Code::Conflict, "one at a time");
        book.remove(&new.id).unwrap();
        assert!(given().expires.is_some_and(|at| at <= now()), "the old one does not come back");
    }

    #[test]
    fn export_says_what_to_run() {
        let mut book = KeyBook::open(None, Arc::default()).unwrap();
        assert_eq!(book.export(&export(false)).err().unwrap().error, Code::NotFound);
        book.add(&request(KeyKind::Tls)).unwrap();
        let lines = book.export(&export(false)).unwrap().lines;
        assert!(lines.expose().contains("--tls --tls-key=NVMeTLSkey-1:01:"));
        assert_eq!(book.export(&export(true)).err().unwrap().error, Code::NotFound);
        book.add(&request(KeyKind::Dhchap)).unwrap();
        let lines = book.export(&export(true)).unwrap().lines;
        assert!(lines.expose().contains("--concat") && !lines.expose().contains("--tls"));
    }

    #[test]
    fn export_for_an_emulator_makes_its_files() {
        let mut book = KeyBook::open(None, Arc::default()).unwrap();
        book.add(&request(KeyKind::Dhchap)).unwrap();
        let for_emulator =
            |concat| ExportKeys { nvme_cli: String::new(), emulator: true, ..export(concat) };
        let lines = |book: &KeyBook, concat| {
            book.export(&for_emulator(concat)).unwrap().lines.expose().to_owned()
        };
        assert!(lines(&book, false).contains(",dhchap=penstock.dhchap,tls=off,hostid="));
        assert!(lines(&book, true).contains(",dhchap=penstock.dhchap,tls=concat,hostid="));
        book.add(&request(KeyKind::Tls)).unwrap();
        book.add(&request(KeyKind::DhchapController)).unwrap();
        let lines = lines(&book, false);
        assert!(lines.starts_with("umask 077\ncat >penstock.psk <<'END'\nNVMeTLSkey-1:01:"));
        // The line is one that the emulator takes.
        let device = lines.lines().last().unwrap().strip_prefix("penstock emulate --device ");
        let mut draft = crate::Draft::new();
        draft.add_device(device.unwrap()).unwrap();
        draft.keep_devices();
        let config = draft.check().unwrap();
        let credentials = &config.devices[0].credentials;
        assert_eq!(credentials.psk.as_deref(), Some(Path::new("penstock.psk")));
        assert_eq!(credentials.dhchap_ctrl.as_deref(), Some(Path::new("penstock.dhchap-ctrl")));
        assert_eq!(config.devices[0].host.as_ref().unwrap().nqn.as_str(), HOST);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut book = KeyBook::open(None, Arc::default()).unwrap();
        let mut refused = |request: AddKey| book.add(&request).err().unwrap().what;
        let tls = request(KeyKind::Tls);
        assert!(refused(AddKey { host: "me".into(), ..tls.clone() }).contains("host"));
        assert!(refused(AddKey { bits: Some(512), ..tls.clone() }).contains("512 bits"));
        let key = Some(SecretString::new("NVMeTLSkey-1:01:broken:".to_owned()));
        let what = refused(AddKey { key, ..tls.clone() });
        assert!(!what.contains("broken"), "{what}");
        let mut dhchap = request(KeyKind::Dhchap);
        dhchap.subsystem = Some(SUBSYSTEM.to_owned());
        assert!(refused(dhchap).contains("whatever the subsystem"));
        for _ in 0..TLS_KEYS_MAX {
            book.add(&tls).unwrap();
        }
        assert_eq!(book.add(&tls).err().unwrap().error, Code::Conflict);
    }
}
