//! What outlives a restart: identities and run-time changes, kept by one process at a time.
//!
//! ```text
//! penstock-data/
//!   lock          held (flock) while a process uses the directory; holds its process ID
//!   state.toml    replaced as a whole: temporary file, fsync, rename, fsync directory
//!   reservations/ one file per volume with reservations, replaced in the same way
//!   volumes/      files of embedded volumes
//! ```
//!
//! Without a directory nothing is kept, and identities are derived from names.
//!
//! **Invariant:** an identity is stored before anything is served under it, and a state file that
//! is damaged, truncated or missing beside existing volumes is an error, never a reason to mint
//! anew: a disk that changes its identity is another disk to every host.

mod format;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::Identity;
use nvme::spec::Nqn;
use uuid::Uuid;

use crate::config::DEFAULT_SUBSYSTEM;
use crate::identity::{self, HostIdentity, SubsystemIdentity};
use format::{StoredHost, StoredPort, StoredSubsystem, StoredVolume};
use format::{parse, serial_bytes, serial_text};

pub(crate) use format::{Change, Hosts, Stored, StoredAna, StoredReferral};

const STATE_FILE: &str = "state.toml";
const TEMPORARY_FILE: &str = "state.toml.new";
const LOCK_FILE: &str = "lock";
const VOLUMES_DIR: &str = "volumes";
const STATE_BYTES_MAX: u64 = 16 << 20;
/// Port IDs remembered, also of listeners that are gone for now.
const PORTS_KEPT: usize = 1024;

const HEADER: &str = "# Identities and run-time changes. Written by penstock, replaced as a whole.\n\
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
    /// A file with keys that others may use, or that cannot be read.
    #[error(transparent)]
    Private(#[from] crate::private::PrivateError),
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

/// The state, in memory and, if there is a data directory, on disk.
#[derive(Debug)]
pub struct State {
    stored: Stored,
    /// What is on disk is older than `stored`.
    changed: bool,
    created: bool,
    home: Option<Home>,
}

/// A locked data directory.
#[derive(Debug)]
struct Home {
    dir: PathBuf,
    /// Unlocked by the system when the process ends, however it ends.
    _lock: File,
}

impl State {
    /// Opens `dir`, creating it if needed, and locks it against other processes.
    pub fn open(dir: &Path) -> Result<State, StateError> {
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
                (Stored::new(), true)
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(StateError::Damaged { path, problem: error.to_string() });
            }
            Err(source) => return Err(StateError::Io { doing: "read", path, source }),
        };
        let home = Some(Home { dir: dir.to_owned(), _lock: lock });
        Ok(State { stored, changed: created, created, home })
    }

    /// A state that is nowhere kept.
    pub fn fleeting() -> State {
        State { stored: Stored::new(), changed: false, created: true, home: None }
    }

    /// The data directory, if there is one.
    pub fn path(&self) -> Option<&Path> {
        self.home.as_ref().map(|home| home.dir.as_path())
    }

    /// Whether there was no state before.
    pub fn is_new(&self) -> bool {
        self.created
    }

    /// Whether it outlives the process.
    pub fn is_kept(&self) -> bool {
        self.home.is_some()
    }

    /// The directory for files of embedded volumes, created if needed. `None` without a data
    /// directory.
    pub fn volumes_dir(&self) -> Result<Option<PathBuf>, StateError> {
        self.subdir(VOLUMES_DIR)
    }

    fn subdir(&self, name: &str) -> Result<Option<PathBuf>, StateError> {
        let Some(home) = &self.home else { return Ok(None) };
        let path = home.dir.join(name);
        match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path) {
            Ok(()) => Ok(Some(path)),
            Err(source) => Err(StateError::Io { doing: "create", path, source }),
        }
    }

    /// Names of the volumes known here, in the order they were created.
    pub fn volume_names(&self) -> impl Iterator<Item = &str> {
        self.stored.volumes.iter().map(|volume| volume.name.as_str())
    }

    /// All that is kept.
    pub(crate) fn stored(&self) -> &Stored {
        &self.stored
    }

    /// All that is kept, to be changed; [`State::save`] makes it durable.
    pub(crate) fn stored_mut(&mut self) -> &mut Stored {
        self.changed = true;
        &mut self.stored
    }

    /// The default subsystem: the stored one, minted if there is none. An NQN the operator chose is
    /// kept.
    pub fn subsystem(&mut self, chosen: Option<&Nqn>) -> SubsystemIdentity {
        self.named_subsystem(DEFAULT_SUBSYSTEM, chosen, "")
    }

    /// The same for subsystem `name`. `place` makes derived identities of two targets on one machine
    /// differ.
    pub(crate) fn named_subsystem(
        &mut self,
        name: &str,
        chosen: Option<&Nqn>,
        place: &str,
    ) -> SubsystemIdentity {
        if let Some(stored) = self.stored.subsystems.iter_mut().find(|other| other.name == name) {
            let nqn = chosen.unwrap_or(&stored.nqn).clone();
            self.changed |= nqn != stored.nqn;
            stored.nqn = nqn.clone();
            return SubsystemIdentity {
                nqn,
                serial: serial_bytes(&stored.serial).unwrap_or([b' '; 20]),
            };
        }
        let mut subsystem = match &self.home {
            Some(_) => identity::subsystem_from_uuid(Uuid::new_v4()),
            None if name == DEFAULT_SUBSYSTEM => identity::derive_subsystem(chosen, place),
            None => identity::derive_subsystem(chosen, &format!("{place} {name}")),
        };
        if let Some(chosen) = chosen {
            subsystem.nqn = chosen.clone();
        }
        self.stored.subsystems.push(StoredSubsystem {
            name: name.to_owned(),
            nqn: subsystem.nqn.clone(),
            serial: serial_text(&subsystem.serial),
            runtime: false,
            hosts: None,
        });
        self.changed = true;
        subsystem
    }

    /// The discovery subsystem's own NQN: the chosen one, the stored one, or a new one.
    pub(crate) fn discovery_nqn(&mut self, chosen: Option<&Nqn>, place: &str) -> Nqn {
        let nqn = match (chosen, &self.stored.discovery_nqn) {
            (Some(chosen), _) => chosen.clone(),
            (None, Some(stored)) => stored.clone(),
            (None, None) if self.is_kept() => identity::uuid_nqn(Uuid::new_v4()),
            (None, None) => identity::derive_discovery(place),
        };
        self.changed |= self.stored.discovery_nqn.as_ref() != Some(&nqn);
        self.stored.discovery_nqn = Some(nqn.clone());
        nqn
    }

    /// This machine as a host: the stored identity, minted if there is none.
    pub fn host(&mut self) -> HostIdentity {
        if let Some(stored) = &self.stored.host {
            return HostIdentity { nqn: stored.nqn.clone(), id: *stored.id.as_bytes() };
        }
        let host = match self.home {
            Some(_) => identity::host_from_uuid(Uuid::new_v4()),
            None => identity::derive_host(),
        };
        self.changed = true;
        self.stored.host =
            Some(StoredHost { nqn: host.nqn.clone(), id: Uuid::from_bytes(host.id) });
        host
    }

    /// The namespace ID and identity of volume `name` in the default subsystem; see
    /// `State::volume_in`.
    pub fn volume(&mut self, name: &str, nsid: Option<u32>) -> Result<(u32, Identity), NsidTaken> {
        self.volume_in(DEFAULT_SUBSYSTEM, name, nsid, &[])
    }

    /// The namespace ID and identity of volume `name` in `subsystem`: the stored ones, minted if
    /// there are none. A volume that was in another subsystem moves with its identity.
    ///
    /// `nsid` is the operator's choice; it replaces a stored one. `reserved` are choices for volumes
    /// to come. `Err` names the volume that has it already.
    pub(crate) fn volume_in(
        &mut self,
        subsystem: &str,
        name: &str,
        nsid: Option<u32>,
        reserved: &[u32],
    ) -> Result<(u32, Identity), NsidTaken> {
        let others = || {
            let here = |other: &&StoredVolume| other.subsystem == subsystem && other.name != name;
            self.stored.volumes.iter().filter(here)
        };
        if let Some(nsid) = nsid
            && let Some(owner) = others().find(|other| other.nsid == nsid)
        {
            return Err(NsidTaken { nsid, owner: owner.name.clone() });
        }
        let is_free =
            |nsid: u32| !reserved.contains(&nsid) && others().all(|other| other.nsid != nsid);
        let free = (1..u32::MAX).find(|nsid| is_free(*nsid)).unwrap_or(u32::MAX - 1);
        let known = self.stored.volumes.iter().position(|other| other.name == name);
        if let Some(index) = known {
            let kept = self.stored.volumes[index].nsid;
            let is_taken = others().any(|other| other.nsid == kept);
            let stored = &mut self.stored.volumes[index];
            let nsid = nsid.unwrap_or(if is_taken { free } else { kept });
            self.changed |= stored.nsid != nsid || stored.subsystem != subsystem;
            stored.nsid = nsid;
            stored.subsystem = subsystem.to_owned();
            let identity = Identity {
                uuid: *stored.uuid.as_bytes(),
                nguid: *stored.nguid.as_bytes(),
                serial: serial_bytes(&stored.serial).unwrap_or([b' '; 20]),
            };
            return Ok((nsid, identity));
        }
        let identity = match (&self.home, self.subsystem_nqn(subsystem)) {
            (None, Some(nqn)) => identity::derive_volume(nqn, name),
            _ => identity::volume_from_uuid(Uuid::new_v4()),
        };
        let nsid = nsid.unwrap_or(free);
        self.stored.volumes.push(StoredVolume {
            name: name.to_owned(),
            subsystem: subsystem.to_owned(),
            nsid,
            uuid: Uuid::from_bytes(identity.uuid),
            nguid: Uuid::from_bytes(identity.nguid),
            serial: serial_text(&identity.serial),
            attached: None,
            detached: None,
            write_protect: false,
            ana_group: None,
            hosts: None,
        });
        self.changed = true;
        Ok((nsid, identity))
    }

    fn subsystem_nqn(&self, name: &str) -> Option<&Nqn> {
        let subsystem = self.stored.subsystems.iter().find(|other| other.name == name)?;
        Some(&subsystem.nqn)
    }

    /// Port IDs of `listeners`, in order: the chosen ones, the stored ones, or the next free ones.
    /// Each listener is named by its kind and address as configured.
    pub(crate) fn ports(&mut self, listeners: &[(String, Option<u16>)]) -> Vec<u16> {
        let stored = std::mem::take(&mut self.stored.ports);
        // The same name twice (port 0, which is another port each time) gets a number.
        let mut names: Vec<String> = Vec::with_capacity(listeners.len());
        for (index, (name, _)) in listeners.iter().enumerate() {
            let earlier = listeners[..index].iter().filter(|(other, _)| other == name).count();
            names.push(if earlier == 0 { name.clone() } else { format!("{name}#{}", earlier + 1) });
        }
        let mut ids: Vec<Option<u16>> = listeners.iter().map(|(_, chosen)| *chosen).collect();
        for (index, name) in names.iter().enumerate() {
            let old = stored.iter().find(|port| port.listener == *name).map(|port| port.id);
            if ids[index].is_none() && !ids.contains(&old) {
                ids[index] = old;
            }
        }
        for index in 0..ids.len() {
            if ids[index].is_none() {
                // An ID that a listener had which is gone for now stays its own while there are others.
                let is_free = |id: &u16| !ids.contains(&Some(*id));
                let is_unused = |id: &u16| stored.iter().all(|port| port.id != *id);
                let id = (1..=u16::MAX).filter(is_free).find(is_unused);
                ids[index] = id.or_else(|| (1..=u16::MAX).find(is_free));
            }
        }
        let ids: Vec<u16> = ids.into_iter().flatten().collect();
        let mut ports: Vec<_> = std::iter::zip(&ids, names)
            .map(|(id, listener)| StoredPort { id: *id, listener })
            .collect();
        for old in &stored {
            if ports.iter().all(|port| port.id != old.id && port.listener != old.listener) {
                ports.push(old.clone());
            }
        }
        ports.truncate(PORTS_KEPT);
        self.changed |= ports != stored;
        self.stored.ports = ports;
        ids
    }

    /// Notes a start of the target; what was before is returned: starts with this one, time in
    /// service before it, starts without an orderly stop.
    pub(crate) fn power_up(&mut self) -> (u64, Duration, u64) {
        let mut power = self.stored.power.unwrap_or_default();
        power.cycles = power.cycles.saturating_add(1);
        if std::mem::replace(&mut power.running, true) {
            power.unsafe_shutdowns = power.unsafe_shutdowns.saturating_add(1);
        }
        self.stored.power = Some(power);
        self.changed = true;
        (power.cycles, Duration::from_secs(power.on_s), power.unsafe_shutdowns)
    }

    /// Notes the time in service. `stopped`: the target has ended in order.
    pub(crate) fn power_on(&mut self, total: Duration, stopped: bool) {
        if let Some(power) = &mut self.stored.power {
            power.on_s = total.as_secs();
            power.running &= !stopped;
            self.changed = true;
        }
    }

    /// Makes everything minted and changed durable. Called before anything is served under it.
    pub fn save(&mut self) -> Result<(), StateError> {
        let Some(home) = &self.home else { return Ok(()) };
        if !self.changed {
            return Ok(());
        }
        let body = toml::to_string(&self.stored).map_err(|error| StateError::Io {
            doing: "write",
            path: home.dir.join(STATE_FILE),
            source: io::Error::other(error),
        })?;
        replace(&home.dir, STATE_FILE, TEMPORARY_FILE, format!("{HEADER}{body}").as_bytes())?;
        self.changed = false;
        Ok(())
    }
}

/// A namespace ID that another stored volume has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("namespace ID {nsid} belongs to volume {owner:?}; choose another")]
pub struct NsidTaken {
    /// The ID.
    pub nsid: u32,
    /// Whose it is.
    pub owner: String,
}

/// Replaces a file as a whole. After a crash at any point the old or the new one is there.
pub(crate) fn replace(
    dir: &Path,
    name: &str,
    temporary: &str,
    bytes: &[u8],
) -> Result<(), StateError> {
    let temporary = dir.join(temporary);
    let path = dir.join(name);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
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

pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> State {
        State::open(dir).unwrap()
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
        let message = State::open(scratch.path()).unwrap_err().to_string();
        assert!(message.contains("in use by another penstock"), "{message}");
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        assert!(message.contains("--data"), "{message}");
    }

    #[test]
    fn every_truncation_is_noticed() {
        let scratch = tempfile::tempdir().unwrap();
        filled(scratch.path());
        let path = scratch.path().join(STATE_FILE);
        // Several tables of each kind, so that there are cuts between them.
        let mut data = open(scratch.path());
        data.volume("vol1", None).unwrap();
        data.named_subsystem("other", None, "");
        data.ports(&[("io 127.0.0.1:4420".to_owned(), None)]);
        data.power_up();
        data.save().unwrap();
        drop(data);
        let whole_of_two = std::fs::read_to_string(&path).unwrap();
        assert!(parse(&path, &whole_of_two).is_ok());
        for len in 0..whole_of_two.trim_end().len() {
            let Err(error) = parse(&path, &whole_of_two[..len]) else {
                panic!("cut to {len} bytes and accepted:\n{}", &whole_of_two[..len]);
            };
            assert!(matches!(error, StateError::Damaged { .. }), "{error}");
        }
        let cut = &whole_of_two[..whole_of_two.rfind("[end]").unwrap()];
        std::fs::write(&path, cut).unwrap();
        assert!(matches!(State::open(scratch.path()), Err(StateError::Damaged { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), cut, "the evidence is left alone");
    }

    #[test]
    fn damage_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        filled(scratch.path());
        let path = scratch.path().join(STATE_FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        let cases = [
            (whole.replace("version = 2", "version = 3"), "format 3"),
            (whole.replace("[end]", ""), "missing field `end`"),
            (whole.replace("nsid = 1", "nsid = 0"), "namespace ID 0"),
            (whole.replace("nsid = 1", "nsid = 1\ncolour = 3"), "unknown field `colour`"),
            (whole.replace("nqn.2014", "nqm.2014"), "an NQN begins with"),
            (whole.replace("serial = \"PS", "serial = \"\u{e4}"), "ASCII"),
            ("\u{0}\u{0}\u{0}".to_owned(), "line 1"),
            (String::new(), "empty"),
        ];
        for (text, expected) in cases {
            std::fs::write(&path, &text).unwrap();
            let message = State::open(scratch.path()).unwrap_err().to_string();
            assert!(message.contains(expected), "{expected:?} not in {message:?}");
            assert!(message.contains("state.toml"), "{message}");
            assert!(message.contains("restore"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(State::open(scratch.path()).unwrap_err(), StateError::Damaged { .. }));
    }

    const VERSION_1: &str = r#"version = 1
volume_count = 1

[subsystem]
nqn = "nqn.2014-08.org.nvmexpress:uuid:6f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"
serial = "PS0123456789ABCDEF"

[host]
nqn = "nqn.2014-08.org.nvmexpress:uuid:0f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"
id = "0f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"

[[volume]]
name = "vol0"
nsid = 3
uuid = "1f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"
nguid = "1f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"
serial = "1f5b8d2e5a0c4f0e9d3b"
"#;

    #[test]
    fn version_1_is_read_and_written_as_version_2() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(STATE_FILE);
        std::fs::write(&path, VERSION_1).unwrap();
        let look = |data: &mut State| {
            assert!(data.subsystem(None).nqn.as_str().contains("6f5b8d2e"));
            assert_eq!(&data.subsystem(None).serial, b"PS0123456789ABCDEF  ");
            assert_eq!(data.host().id[0], 0x0f);
            let (nsid, identity) = data.volume("vol0", None).unwrap();
            assert_eq!(
                (nsid, identity.uuid[0], &identity.serial),
                (3, 0x1f, b"1f5b8d2e5a0c4f0e9d3b")
            );
        };
        let mut data = open(scratch.path());
        look(&mut data);
        data.power_up();
        data.save().unwrap();
        drop(data);
        assert!(std::fs::read_to_string(&path).unwrap().contains("version = 2"));
        look(&mut open(scratch.path()));

        let cut = VERSION_1.replace("volume_count = 1", "volume_count = 2");
        std::fs::write(&path, cut).unwrap();
        let message = State::open(scratch.path()).unwrap_err().to_string();
        assert!(message.contains("cut off or edited"), "{message}");
    }

    #[test]
    fn namespace_ids_are_per_subsystem_and_a_volume_moves_with_its_identity() {
        let scratch = tempfile::tempdir().unwrap();
        let mut data = open(scratch.path());
        let (nsid, identity) = data.volume_in("a", "v", None, &[]).unwrap();
        assert_eq!(nsid, 1);
        assert_eq!(data.volume_in("b", "w", None, &[1]).unwrap().0, 2, "1 is for another");
        assert_eq!(data.volume_in("b", "x", None, &[]).unwrap().0, 1);
        let moved = data.volume_in("b", "v", None, &[]).unwrap();
        assert_eq!(moved, (3, identity), "1 is taken there");
        assert_eq!(data.volume_in("b", "v", None, &[]).unwrap(), moved);
    }

    #[test]
    fn ports_keep_their_ids() {
        let scratch = tempfile::tempdir().unwrap();
        let listener = |name: &str| (name.to_owned(), None);
        let (a, b, c) = (listener("io a"), listener("io b"), listener("discovery c"));
        let mut data = open(scratch.path());
        assert_eq!(data.ports(&[a.clone(), b.clone(), c.clone()]), [1, 2, 3]);
        data.save().unwrap();
        drop(data);
        let mut data = open(scratch.path());
        assert_eq!(data.ports(&[c.clone(), b.clone()]), [3, 2], "whatever the order");
        let new = listener("io d");
        assert_eq!(data.ports(&[new.clone(), b.clone()]), [4, 2], "1 is still that of a");
        assert_eq!(data.ports(&[a.clone(), (new.0.clone(), Some(2)), b]), [1, 2, 5]);
        assert_eq!(data.ports(&[a.clone(), a.clone(), a]), [1, 4, 6], "port 0 may be there twice");
    }

    #[test]
    fn starts_are_counted_and_those_without_a_stop_too() {
        let scratch = tempfile::tempdir().unwrap();
        let mut data = open(scratch.path());
        assert_eq!(data.power_up(), (1, Duration::ZERO, 0));
        data.power_on(Duration::from_secs(600), false);
        data.save().unwrap();
        drop(data);
        let mut data = open(scratch.path());
        assert_eq!(data.power_up(), (2, Duration::from_secs(600), 1), "no orderly stop");
        data.power_on(Duration::from_secs(700), true);
        data.save().unwrap();
        drop(data);
        assert_eq!(open(scratch.path()).power_up(), (3, Duration::from_secs(700), 1));
    }

    #[test]
    fn a_change_holds_until_the_configuration_says_something_new() {
        let mut change = None;
        Change::set(&mut change, 2, &1);
        assert_eq!(Change::resolve(&mut change, &1), (2, false));
        assert_eq!(Change::resolve(&mut change, &5), (5, true), "the file was edited since");
        assert_eq!(change, None);
        Change::set(&mut change, 2, &1);
        Change::set(&mut change, 1, &1);
        assert_eq!(change, None, "back to what the file says");
    }

    #[test]
    fn run_time_changes_are_read_back() {
        let scratch = tempfile::tempdir().unwrap();
        let mut data = open(scratch.path());
        data.volume("v", None).unwrap();
        let host: Nqn = "nqn.2014-08.com.example:h".parse().unwrap();
        let every = Hosts::of(None);
        let these = Hosts::of(Some(std::slice::from_ref(&host)));
        let stored = data.stored_mut();
        Change::set(&mut stored.volumes[0].hosts, these.clone(), &every);
        Change::set(&mut stored.volumes[0].ana_group, 2, &1);
        stored.volumes[0].attached = Some("ram:1M".to_owned());
        Change::set(
            &mut stored.referrals,
            vec![StoredReferral { addr: "192.0.2.1:8009".to_owned(), nqn: host.to_string() }],
            &Vec::new(),
        );
        let ana = StoredAna {
            subsystem: "default".to_owned(),
            port: 1,
            group: 2,
            to: "change".to_owned(),
            from: "optimized".to_owned(),
        };
        stored.ana.push(ana);
        let before = stored.clone();
        data.save().unwrap();
        drop(data);
        let data = open(scratch.path());
        assert_eq!(*data.stored(), before);
        assert_eq!(these.nqns(), Some(Some(vec![host])));
        drop(data);

        // A list that cannot be read must not become "every host".
        let path = scratch.path().join(STATE_FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole.replace("nqn.2014-08.com.example:h\"]", "nqm\"]")).unwrap();
        let message = State::open(scratch.path()).unwrap_err().to_string();
        assert!(message.contains("no list of NQNs"), "{message}");
    }

    #[test]
    fn lost_state_is_not_minted_anew_beside_volumes() {
        let scratch = tempfile::tempdir().unwrap();
        filled(scratch.path());
        std::fs::remove_file(scratch.path().join(STATE_FILE)).unwrap();
        let volumes = open(scratch.path()).volumes_dir().unwrap().unwrap();
        assert!(State::open(scratch.path()).is_ok(), "no volume in it yet");
        let volume = File::create(volumes.join("vol0.img")).unwrap();
        volume.set_len(1 << 20).unwrap();
        assert!(State::open(scratch.path()).is_ok(), "nothing was ever written to it");
        (&volume).write_all(&[1; 4096]).unwrap();
        volume.sync_all().unwrap();
        let error = State::open(scratch.path()).unwrap_err();
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
        let message = State::open(&file.join("data")).unwrap_err().to_string();
        assert!(message.contains("--data DIR"), "{message}");
        let full = advice(&io::Error::from(io::ErrorKind::StorageFull));
        assert!(full.contains("free some space"), "{full}");
    }
}
