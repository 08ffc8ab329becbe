//! The data directory: identities that outlive a restart, kept by one process at a time.
//!
//! ```text
//! penstock-data/
//!   lock          held (flock) while a process uses the directory; holds its process ID
//!   state.toml    identities; replaced as a whole: temporary file, fsync, rename, fsync directory
//!   volumes/      files of embedded volumes
//! ```
//!
//! **Invariant:** an identity is stored before anything is served under it, and a state file that
//! is damaged, truncated or missing beside existing volumes is an error, never a reason to mint
//! anew: a disk that changes its identity is another disk to every host.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use block::Identity;
use nvme::spec::Nqn;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::identity::{self, HostIdentity, SubsystemIdentity};

const STATE_FILE: &str = "state.toml";
const TEMPORARY_FILE: &str = "state.toml.new";
const LOCK_FILE: &str = "lock";
const VOLUMES_DIR: &str = "volumes";
/// The only version there is. A later one is refused, not guessed at.
const VERSION: u32 = 1;
const STATE_BYTES_MAX: u64 = 16 << 20;

const HEADER: &str = "# Identities of Penstock volumes. Written by penstock, replaced as a whole.\n\
                      # Keep it with the volumes: without it they are other disks to every host.\n";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process has it.
    #[error(
        "data directory {}: in use by another penstock{owner}; stop it, or give this one a \
         directory of its own with --data DIR",
        dir.display()
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// ` (process N)`, if known.
        owner: String,
    },
    /// The state file is there and cannot be trusted.
    #[error(
        "{}: {problem}; restore the file from a backup (identities are never made up anew, hosts \
         would see other disks)",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There are volumes and no state file.
    #[error(
        "{}: missing, but {} holds volumes; restore the file from a backup, or move the volumes \
         away to begin anew",
        path.display(),
        volumes.display()
    )]
    Lost {
        /// The file that is missing.
        path: PathBuf,
        /// The directory with volumes.
        volumes: PathBuf,
    },
    /// The system refused.
    #[error("data directory: cannot {doing} {}{}", path.display(), advice(source))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
}

/// What to do, where there is something; the system's words are the source.
fn advice(error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "run as a user who may write there, or choose a directory with --data DIR"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space, or choose a directory on another file system with --data DIR"
        }
        io::ErrorKind::ReadOnlyFilesystem => "choose a writable directory with --data DIR",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "it is no directory; choose another with --data DIR"
        }
        _ => return String::new(),
    };
    format!(" ({hint})")
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    /// How many volumes follow: a file cut off between two tables does not pass for a whole one.
    volume_count: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subsystem: Option<StoredSubsystem>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<StoredHost>,
    #[serde(default, rename = "volume", skip_serializing_if = "Vec::is_empty")]
    volumes: Vec<StoredVolume>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSubsystem {
    #[serde(with = "nqn_text")]
    nqn: Nqn,
    serial: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredHost {
    #[serde(with = "nqn_text")]
    nqn: Nqn,
    id: Uuid,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredVolume {
    name: String,
    nsid: u32,
    uuid: Uuid,
    nguid: Uuid,
    serial: String,
}

/// An NQN is stored as its text, and checked when it is read.
mod nqn_text {
    use nvme::spec::Nqn;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(nqn: &Nqn, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(nqn.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Nqn, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// A locked data directory with its state in memory.
#[derive(Debug)]
pub struct DataDir {
    dir: PathBuf,
    stored: Stored,
    changed: bool,
    created: bool,
    /// Unlocked by the system when the process ends, however it ends.
    _lock: File,
}

impl DataDir {
    /// Opens `dir`, creating it if needed, and locks it against other processes.
    pub fn open(dir: &Path) -> Result<DataDir, StateError> {
        let io = |doing: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { doing, path, source }
        };
        let existed = dir.is_dir();
        // Volumes hold other people's data: nobody else looks in.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io("create", dir))?;
        if !existed && let Some(parent) = dir.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            sync_dir(parent).map_err(io("sync", parent))?;
        }
        let lock = lock(dir)?;

        let path = dir.join(STATE_FILE);
        let (stored, created) = match read(&path) {
            Ok(text) => (parse(&path, &text)?, false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let volumes = dir.join(VOLUMES_DIR);
                if holds_data(&volumes) {
                    return Err(StateError::Lost { path, volumes });
                }
                let stored = Stored {
                    version: VERSION,
                    volume_count: 0,
                    subsystem: None,
                    host: None,
                    volumes: Vec::new(),
                };
                (stored, true)
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(StateError::Damaged { path, problem: error.to_string() });
            }
            Err(source) => return Err(StateError::Io { doing: "read", path, source }),
        };
        Ok(DataDir { dir: dir.to_owned(), stored, changed: created, created, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Whether there was no state before.
    pub fn is_new(&self) -> bool {
        self.created
    }

    /// The directory for files of embedded volumes, created if needed.
    pub fn volumes_dir(&self) -> Result<PathBuf, StateError> {
        let path = self.dir.join(VOLUMES_DIR);
        match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path) {
            Ok(()) => Ok(path),
            Err(source) => Err(StateError::Io { doing: "create", path, source }),
        }
    }

    /// Names of the volumes known here, in the order they were created.
    pub fn volume_names(&self) -> impl Iterator<Item = &str> {
        self.stored.volumes.iter().map(|volume| volume.name.as_str())
    }

    /// The subsystem: the stored one, minted if there is none. An NQN the operator chose is kept.
    pub fn subsystem(&mut self, chosen: Option<&Nqn>) -> SubsystemIdentity {
        let current = match &self.stored.subsystem {
            Some(stored) => SubsystemIdentity {
                nqn: stored.nqn.clone(),
                serial: serial_bytes(&stored.serial).unwrap_or([b' '; 20]),
            },
            None => {
                self.changed = true;
                identity::subsystem_from_uuid(Uuid::new_v4())
            }
        };
        let nqn = chosen.unwrap_or(&current.nqn).clone();
        self.changed |= nqn != current.nqn;
        let subsystem = SubsystemIdentity { nqn, serial: current.serial };
        self.stored.subsystem = Some(StoredSubsystem {
            nqn: subsystem.nqn.clone(),
            serial: serial_text(&subsystem.serial),
        });
        subsystem
    }

    /// This machine as a host: the stored identity, minted if there is none.
    pub fn host(&mut self) -> HostIdentity {
        if let Some(stored) = &self.stored.host {
            return HostIdentity { nqn: stored.nqn.clone(), id: *stored.id.as_bytes() };
        }
        self.changed = true;
        let id = Uuid::new_v4();
        let host = identity::host_from_uuid(id);
        self.stored.host = Some(StoredHost { nqn: host.nqn.clone(), id });
        host
    }

    /// The namespace ID and identity of volume `name`: the stored ones, minted if there are none.
    ///
    /// `nsid` is the operator's choice; it replaces a stored one. `Err` names the volume that has
    /// it already.
    pub fn volume(&mut self, name: &str, nsid: Option<u32>) -> Result<(u32, Identity), NsidTaken> {
        if let Some(nsid) = nsid
            && let Some(owner) =
                self.stored.volumes.iter().find(|other| other.nsid == nsid && other.name != name)
        {
            return Err(NsidTaken { nsid, owner: owner.name.clone() });
        }
        let free = (1..=u32::MAX)
            .find(|nsid| self.stored.volumes.iter().all(|other| other.nsid != *nsid))
            .unwrap_or(u32::MAX);
        if let Some(stored) = self.stored.volumes.iter_mut().find(|other| other.name == name) {
            if let Some(nsid) = nsid
                && nsid != stored.nsid
            {
                stored.nsid = nsid;
                self.changed = true;
            }
            let identity = Identity {
                uuid: *stored.uuid.as_bytes(),
                nguid: *stored.nguid.as_bytes(),
                serial: serial_bytes(&stored.serial).unwrap_or([b' '; 20]),
            };
            return Ok((stored.nsid, identity));
        }
        let uuid = Uuid::new_v4();
        let identity = identity::volume_from_uuid(uuid);
        let nsid = nsid.unwrap_or(free);
        self.stored.volumes.push(StoredVolume {
            name: name.to_owned(),
            nsid,
            uuid,
            nguid: uuid,
            serial: serial_text(&identity.serial),
        });
        self.changed = true;
        Ok((nsid, identity))
    }

    /// Makes everything minted durable. Called before anything is served under it.
    pub fn save(&mut self) -> Result<(), StateError> {
        if !self.changed {
            return Ok(());
        }
        self.stored.volume_count = self.stored.volumes.len();
        let body = toml::to_string(&self.stored).map_err(|error| StateError::Io {
            doing: "write",
            path: self.dir.join(STATE_FILE),
            source: io::Error::other(error),
        })?;
        replace(&self.dir, &format!("{HEADER}{body}"))?;
        self.changed = false;
        Ok(())
    }
}

/// A namespace ID that another stored volume has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("namespace ID {nsid} belongs to volume {owner:?} in the data directory; choose another")]
pub struct NsidTaken {
    /// The ID.
    pub nsid: u32,
    /// Whose it is.
    pub owner: String,
}

/// Replaces the state file as a whole. After a crash at any point the old or the new one is there.
fn replace(dir: &Path, text: &str) -> Result<(), StateError> {
    let temporary = dir.join(TEMPORARY_FILE);
    let path = dir.join(STATE_FILE);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| StateError::Io { doing: "write", path: temporary.clone(), source })?;
    std::fs::rename(&temporary, &path)
        .and_then(|()| sync_dir(dir))
        .map_err(|source| StateError::Io { doing: "replace", path, source })
}

/// Whether a file in `dir` was ever written to. A sparse file without a block has nothing to lose.
fn holds_data(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| entry.metadata().is_ok_and(|metadata| metadata.blocks() > 0))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn lock(dir: &Path) -> Result<File, StateError> {
    let path = dir.join(LOCK_FILE);
    let io = |doing: &'static str| {
        let path = path.clone();
        move |source| StateError::Io { doing, path, source }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // Who it is only helps the reader; the lock itself decides.
            let _ = (&mut file).take(32).read_to_string(&mut text);
            let owner = match text.trim().parse::<u32>() {
                Ok(pid) => format!(" (process {pid})"),
                Err(_) => String::new(),
            };
            return Err(StateError::InUse { dir: dir.to_owned(), owner });
        }
        Err(TryLockError::Error(source)) => {
            return Err(StateError::Io { doing: "lock", path, source });
        }
    }
    file.set_len(0).map_err(io("write"))?;
    file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(io("write"))?;
    Ok(file)
}

fn read(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let mut text = String::new();
    let read = file.take(STATE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if read as u64 > STATE_BYTES_MAX {
        let problem = format!("larger than {STATE_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<Stored, StateError> {
    let damaged = |problem: String| StateError::Damaged { path: path.to_owned(), problem };
    if text.trim().is_empty() {
        return Err(damaged("the file is empty".to_owned()));
    }

    // The version is looked at first: a newer file should say so, not complain about a key.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let describe = |error: toml::de::Error| {
        let line = error
            .span()
            .map(|span| text.as_bytes()[..span.start.min(text.len())].iter())
            .map(|bytes| bytes.filter(|byte| **byte == b'\n').count() + 1)
            .unwrap_or(1);
        damaged(format!("line {line}: {}", error.message().replace('\n', ", ")))
    };
    let Version { version } = toml::from_str(text).map_err(describe)?;
    if version != VERSION {
        return Err(damaged(format!(
            "written in format {version}, this penstock knows format {VERSION} only"
        )));
    }
    let stored: Stored = toml::from_str(text).map_err(describe)?;

    if stored.volume_count != stored.volumes.len() {
        return Err(damaged(format!(
            "it says it holds {} volumes and holds {}: it was cut off or edited",
            stored.volume_count,
            stored.volumes.len()
        )));
    }
    if let Some(subsystem) = &stored.subsystem
        && serial_bytes(&subsystem.serial).is_none()
    {
        return Err(damaged(format!(
            "subsystem.serial {:?} is no serial number of 1 to 20 ASCII characters",
            subsystem.serial
        )));
    }
    for (index, volume) in stored.volumes.iter().enumerate() {
        let others = &stored.volumes[..index];
        if volume.nsid == 0 || volume.nsid == u32::MAX {
            return Err(damaged(format!(
                "volume {:?} has namespace ID {}",
                volume.name, volume.nsid
            )));
        }
        if serial_bytes(&volume.serial).is_none() {
            return Err(damaged(format!(
                "volume {:?} has the serial number {:?}, which is not 1 to 20 ASCII characters",
                volume.name, volume.serial
            )));
        }
        let twin = others.iter().find(|other| {
            other.name == volume.name || other.nsid == volume.nsid || other.uuid == volume.uuid
        });
        if let Some(twin) = twin {
            return Err(damaged(format!(
                "volumes {:?} (namespace {}) and {:?} (namespace {}) share a name, namespace ID \
                 or UUID",
                twin.name, twin.nsid, volume.name, volume.nsid
            )));
        }
    }
    Ok(stored)
}

fn serial_text(serial: &[u8; 20]) -> String {
    String::from_utf8_lossy(serial).trim_end().to_owned()
}

fn serial_bytes(text: &str) -> Option<[u8; 20]> {
    let good = (1..=20).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b));
    let mut serial = [b' '; 20];
    good.then(|| serial[..text.len()].copy_from_slice(text.as_bytes()))?;
    Some(serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> DataDir {
        DataDir::open(dir).unwrap()
    }

    fn filled(dir: &Path) -> (SubsystemIdentity, HostIdentity, (u32, Identity)) {
        let mut data = open(dir);
        let all = (data.subsystem(None), data.host(), data.volume("vol0", None).unwrap());
        data.save().unwrap();
        all
    }

    #[test]
    fn identities_outlive_a_restart() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("new/data");
        let first = filled(&dir);
        let mut data = open(&dir);
        assert!(!data.is_new());
        assert_eq!(data.volume_names().collect::<Vec<_>>(), ["vol0"]);
        assert_eq!(data.subsystem(None), first.0);
        assert_eq!(data.host(), first.1);
        let (nsid, identity) = data.volume("vol0", None).unwrap();
        assert_eq!((nsid, identity.uuid, identity.nguid), (1, first.2.1.uuid, first.2.1.nguid));
        assert_eq!(identity.serial, first.2.1.serial);
        assert_eq!(data.volume("vol1", None).unwrap().0, 2);
    }

    #[test]
    fn a_chosen_nqn_is_kept() {
        let scratch = tempfile::tempdir().unwrap();
        let mut data = open(scratch.path());
        let chosen = data.subsystem(Some(&"nqn.2014-08.com.example:a".parse().unwrap()));
        data.save().unwrap();
        drop(data);
        assert_eq!(open(scratch.path()).subsystem(None), chosen);
    }

    #[test]
    fn a_chosen_nsid_is_kept_and_not_given_twice() {
        let scratch = tempfile::tempdir().unwrap();
        let mut data = open(scratch.path());
        assert_eq!(data.volume("a", Some(2)).unwrap().0, 2);
        assert_eq!(data.volume("b", None).unwrap().0, 1);
        assert_eq!(data.volume("c", None).unwrap().0, 3);
        let taken = data.volume("d", Some(2)).unwrap_err();
        assert_eq!(taken, NsidTaken { nsid: 2, owner: "a".to_owned() });
        assert_eq!(data.volume("a", Some(7)).unwrap().0, 7);
    }

    #[test]
    fn two_processes_do_not_share_a_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let _held = open(scratch.path());
        // flock belongs to the open file, so a second open in this process is refused alike.
        let message = DataDir::open(scratch.path()).unwrap_err().to_string();
        assert!(message.contains("in use by another penstock"), "{message}");
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        assert!(message.contains("--data"), "{message}");
    }

    #[test]
    fn every_truncation_is_noticed() {
        let scratch = tempfile::tempdir().unwrap();
        filled(scratch.path());
        let path = scratch.path().join(STATE_FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        // Two volumes, so that there is a cut between two tables.
        let mut data = open(scratch.path());
        data.volume("vol1", None).unwrap();
        data.save().unwrap();
        drop(data);
        let whole_of_two = std::fs::read_to_string(&path).unwrap();
        assert!(whole_of_two.len() > whole.len());
        assert!(parse(&path, &whole_of_two).is_ok());
        for len in 0..whole_of_two.trim_end().len() {
            let Err(error) = parse(&path, &whole_of_two[..len]) else {
                panic!("cut to {len} bytes and accepted:\n{}", &whole_of_two[..len]);
            };
            assert!(matches!(error, StateError::Damaged { .. }), "{error}");
        }
        let cut = &whole_of_two[..whole.len()];
        std::fs::write(&path, cut).unwrap();
        assert!(matches!(DataDir::open(scratch.path()), Err(StateError::Damaged { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), cut, "the evidence is left alone");
    }

    #[test]
    fn damage_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        filled(scratch.path());
        let path = scratch.path().join(STATE_FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        let cases = [
            (whole.replace("version = 1", "version = 2"), "format 2"),
            (whole.replace("volume_count = 1", "volume_count = 2"), "cut off or edited"),
            (whole.replace("nsid = 1", "nsid = 0"), "namespace ID 0"),
            (whole.replace("nsid = 1", "nsid = 1\ncolour = 3"), "unknown field `colour`"),
            (whole.replace("nqn.2014", "nqm.2014"), "an NQN begins with"),
            (whole.replace("serial = \"PS", "serial = \"\u{e4}"), "ASCII"),
            ("\u{0}\u{0}\u{0}".to_owned(), "line 1"),
            (String::new(), "empty"),
        ];
        for (text, expected) in cases {
            std::fs::write(&path, &text).unwrap();
            let message = DataDir::open(scratch.path()).unwrap_err().to_string();
            assert!(message.contains(expected), "{expected:?} not in {message:?}");
            assert!(message.contains("state.toml"), "{message}");
            assert!(message.contains("restore"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(DataDir::open(scratch.path()).unwrap_err(), StateError::Damaged { .. }));
    }

    #[test]
    fn lost_state_is_not_minted_anew_beside_volumes() {
        let scratch = tempfile::tempdir().unwrap();
        filled(scratch.path());
        std::fs::remove_file(scratch.path().join(STATE_FILE)).unwrap();
        let volumes = open(scratch.path()).volumes_dir().unwrap();
        assert!(DataDir::open(scratch.path()).is_ok(), "no volume in it yet");
        let volume = File::create(volumes.join("vol0.img")).unwrap();
        volume.set_len(1 << 20).unwrap();
        assert!(DataDir::open(scratch.path()).is_ok(), "nothing was ever written to it");
        (&volume).write_all(&[1; 4096]).unwrap();
        volume.sync_all().unwrap();
        let error = DataDir::open(scratch.path()).unwrap_err();
        assert!(matches!(error, StateError::Lost { .. }), "{error}");
        assert!(!scratch.path().join(STATE_FILE).exists());
    }

    #[test]
    fn a_crash_before_the_rename_leaves_the_old_state() {
        let scratch = tempfile::tempdir().unwrap();
        let first = filled(scratch.path());
        std::fs::write(scratch.path().join(TEMPORARY_FILE), "version = 1\nhalf").unwrap();
        let mut data = open(scratch.path());
        assert_eq!(data.subsystem(None), first.0);
        data.volume("vol1", None).unwrap();
        data.save().unwrap();
        assert!(!scratch.path().join(TEMPORARY_FILE).exists());
    }

    #[test]
    fn refusals_of_the_system_say_what_to_do() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let message = DataDir::open(&file.join("data")).unwrap_err().to_string();
        assert!(message.contains("--data DIR"), "{message}");
        let full = advice(&io::Error::from(io::ErrorKind::StorageFull));
        assert!(full.contains("free some space"), "{full}");
    }
}
