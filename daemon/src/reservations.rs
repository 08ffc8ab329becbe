//! Reservations kept through a loss of power: one file per volume in the data directory.
//!
//! ```text
//! reservations/
//!   <uuid>.toml       of the volume with this UUID; replaced as a whole, like state.toml
//! ```
//!
//! **Invariant:** a file that cannot be read for certain is an error. "No reservation" would let
//! hosts write that a cluster has shut out.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nvme::subsys::reservation::{Registrant, ReservationState, ReservationType, Reservations};
use nvmf_target::ReservationStore;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::state;

/// The only version there is. A later one is refused, not guessed at.
const VERSION: u32 = 1;
/// Far more than the largest table of registrants takes.
const FILE_BYTES_MAX: u64 = 1 << 20;

const HEADER: &str = "# Reservations of one volume. Written by penstock, replaced as a whole.\n";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    ptpl: bool,
    generation: u32,
    /// Reservation type on the wire; 0: none is held.
    rtype: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    holder: Option<Uuid>,
    /// How many registrants follow: a file cut off between two does not pass for a whole one.
    registrant_count: usize,
    #[serde(default, rename = "registrant", skip_serializing_if = "Vec::is_empty")]
    registrants: Vec<StoredRegistrant>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredRegistrant {
    host: Uuid,
    /// Hexadecimal: TOML's integers are signed.
    key: String,
}

/// The store of a data directory.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store in data directory `dir`, which this process has locked.
    pub(crate) fn new(dir: &Path) -> Store {
        Store { dir: dir.join("reservations") }
    }

    fn name(uuid: &[u8; 16]) -> String {
        format!("{}.toml", Uuid::from_bytes(*uuid))
    }
}

impl ReservationStore for Store {
    fn load(&self, uuid: &[u8; 16]) -> io::Result<Option<ReservationState>> {
        let path = self.dir.join(Store::name(uuid));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = String::new();
        file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
        parse(&text).map(Some).map_err(|problem| {
            let path = path.display();
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{path}: {problem}; restore the file from a backup, or remove it if no host \
                     relies on the reservations of this volume"
                ),
            )
        })
    }

    fn save(&self, uuid: &[u8; 16], reservations: &ReservationState) -> io::Result<()> {
        let is_new = !self.dir.is_dir();
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        if is_new && let Some(parent) = self.dir.parent() {
            state::sync_dir(parent)?;
        }
        let name = Store::name(uuid);
        let text = toml::to_string(&stored(reservations)).map_err(io::Error::other)?;
        let text = format!("{HEADER}{text}");
        state::replace(&self.dir, &name, &format!("{name}.new"), text.as_bytes())
            .map_err(io::Error::other)
    }
}

fn stored(state: &ReservationState) -> Stored {
    let registrants = state.registrants.iter().map(|registrant| StoredRegistrant {
        host: Uuid::from_bytes(registrant.host),
        key: format!("{:#x}", registrant.key),
    });
    Stored {
        version: VERSION,
        ptpl: state.ptpl,
        generation: state.generation,
        rtype: state.rtype.map_or(0, ReservationType::to_wire),
        holder: state.holder.map(Uuid::from_bytes),
        registrant_count: state.registrants.len(),
        registrants: registrants.collect(),
    }
}

fn parse(text: &str) -> Result<ReservationState, String> {
    let stored: Stored = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    if stored.version != VERSION {
        return Err(format!("version {} is not known, only {VERSION} is", stored.version));
    }
    if stored.registrant_count != stored.registrants.len() {
        return Err(format!(
            "{} registrants are announced and {} are there",
            stored.registrant_count,
            stored.registrants.len()
        ));
    }
    let rtype = match stored.rtype {
        0 => None,
        value => Some(
            ReservationType::from_wire(value)
                .ok_or_else(|| format!("{value} is no reservation type"))?,
        ),
    };
    let mut registrants = Vec::with_capacity(stored.registrants.len());
    for registrant in &stored.registrants {
        let key = registrant.key.strip_prefix("0x");
        let key = key.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let key = key.ok_or_else(|| format!("{:?} is no reservation key", registrant.key))?;
        registrants.push(Registrant { host: registrant.host.into_bytes(), key });
    }
    let state = ReservationState {
        ptpl: stored.ptpl,
        generation: stored.generation,
        registrants,
        rtype,
        holder: stored.holder.map(Uuid::into_bytes),
    };
    // What no sequence of commands leads to was written by somebody else.
    Reservations::from_state(state.clone()).map_err(|error| error.to_string())?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = [7; 16];

    fn sample() -> ReservationState {
        ReservationState {
            ptpl: true,
            generation: u32::MAX,
            registrants: vec![
                Registrant { host: [1; 16], key: u64::MAX },
                Registrant { host: [2; 16], key: 0x10 },
            ],
            rtype: Some(ReservationType::ExclusiveAccess),
            holder: Some([2; 16]),
        }
    }

    fn file(dir: &Path) -> PathBuf {
        dir.join("reservations").join(Store::name(&UUID))
    }

    #[test]
    fn what_is_saved_is_loaded_and_the_last_counts() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::new(scratch.path());
        assert_eq!(store.load(&UUID).unwrap(), None);
        store.save(&UUID, &sample()).unwrap();
        assert_eq!(store.load(&UUID).unwrap(), Some(sample()));
        let none = ReservationState::default();
        store.save(&UUID, &none).unwrap();
        assert_eq!(Store::new(scratch.path()).load(&UUID).unwrap(), Some(none));
        assert_eq!(store.load(&[8; 16]).unwrap(), None, "another volume's are not touched");
    }

    #[test]
    fn a_file_cut_off_anywhere_is_no_smaller_table() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::new(scratch.path());
        store.save(&UUID, &sample()).unwrap();
        let whole = std::fs::read(file(scratch.path())).unwrap();
        for len in 0..whole.len() {
            std::fs::write(file(scratch.path()), &whole[..len]).unwrap();
            // The last line feed may be missing.
            if let Ok(state) = store.load(&UUID) {
                assert_eq!(state, Some(sample()), "cut at {len}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_an_error_that_names_the_file() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::new(scratch.path());
        store.save(&UUID, &sample()).unwrap();
        let whole = std::fs::read_to_string(file(scratch.path())).unwrap();
        for (from, to, why) in [
            ("version = 1", "version = 2", "version 2"),
            ("rtype = 2", "rtype = 9", "no reservation type"),
            ("rtype = 2", "rtype = 0", "holder"),
            ("registrant_count = 2", "registrant_count = 3", "3 registrants"),
            ("0x10", "10", "no reservation key"),
            ("0x10", "0x0", "key 0"),
            ("ptpl = true", "ptpl = true\ncolour = 1", "colour"),
        ] {
            let text = whole.replacen(from, to, 1);
            assert_ne!(text, whole, "{from}");
            std::fs::write(file(scratch.path()), text).unwrap();
            let error = store.load(&UUID).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("reservations/"), "{to}: {error}");
        }
        std::fs::write(file(scratch.path()), [0xff; 10]).unwrap();
        assert!(store.load(&UUID).is_err());
    }

    #[test]
    fn a_crash_before_the_rename_leaves_the_old_table() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::new(scratch.path());
        store.save(&UUID, &sample()).unwrap();
        let half = file(scratch.path()).with_extension("toml.new");
        std::fs::write(&half, "version = 1\nhalf").unwrap();
        assert_eq!(store.load(&UUID).unwrap(), Some(sample()));
        store.save(&UUID, &ReservationState::default()).unwrap();
        assert!(!half.exists());
    }
}
