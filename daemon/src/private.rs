//! Files that hold keys: nobody but their owner may use them.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::process::DumpableBehavior;
use zeroize::Zeroizing;

use crate::shell::word;

/// Why a file with keys is not used; says what to run.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// It cannot be read.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// Others may use it.
    #[error(
        "{}: it holds keys, and with mode {mode:04o} others may use it; wanted: mode 0600. Run \
         `chmod 600 {}`, and replace its keys: others may know them",
        path.display(),
        word(&path.to_string_lossy())
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Somebody else owns it, and may change it.
    #[error(
        "{}: it holds keys, and belongs to user {owner}; wanted: user {user}, as whom this runs, or \
         root. Run `chown {user} {}`",
        path.display(),
        word(&path.to_string_lossy())
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// User ID of its owner.
        owner: u32,
        /// User ID of this process.
        user: u32,
    },
    /// It is longer than what it should hold.
    #[error("{}: {bytes} bytes or more; allowed: at most {max}", path.display())]
    Long {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The longest that is read.
        max: u64,
    },
}

impl PrivateError {
    /// Whether there is no such file.
    pub fn is_missing(&self) -> bool {
        matches!(self, PrivateError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Who may read or change a file, as far as it is known: `Err` names what is wrong.
fn judge(path: &Path, mode: u32, owner: u32, user: u32) -> Result<(), PrivateError> {
    let path = || path.to_owned();
    if mode & 0o077 != 0 {
        return Err(PrivateError::Mode { path: path(), mode: mode & 0o7777 });
    }
    if owner != user && owner != 0 {
        return Err(PrivateError::Owner { path: path(), owner, user });
    }
    Ok(())
}

fn open(path: &Path) -> Result<(File, Metadata), PrivateError> {
    // Before the first key is in memory.
    keep_memory_private();
    let io = |source| PrivateError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // Of what is open, not of what has the name now.
    let metadata = file.metadata().map_err(io)?;
    judge(path, metadata.mode(), metadata.uid(), rustix::process::geteuid().as_raw())?;
    Ok((file, metadata))
}

/// Reads a file that nobody else may use, of at most `max` bytes; the text is wiped when dropped.
///
/// # Errors
/// It cannot be read, is longer, has a mode that lets others use it, or belongs to somebody else.
pub fn read(path: &Path, max: u64) -> Result<Zeroizing<String>, PrivateError> {
    let (file, metadata) = open(path)?;
    let long = |bytes| PrivateError::Long { path: path.to_owned(), bytes, max };
    if metadata.len() > max {
        return Err(long(metadata.len()));
    }
    // A pipe has no length. Growing would leave copies behind.
    let expected = if metadata.is_file() { metadata.len() } else { max };
    let mut text = Zeroizing::new(String::with_capacity(expected as usize + 1));
    file.take(max.saturating_add(1))
        .read_to_string(&mut text)
        .map_err(|source| PrivateError::Io { path: path.to_owned(), source })?;
    if text.len() as u64 > max {
        return Err(long(text.len() as u64));
    }
    Ok(text)
}

/// No memory image of this process is written when it crashes, and only who may trace any process
/// reads its memory: keys are in it. A process that is to be debugged after a crash is not to be given
/// keys.
pub(crate) fn keep_memory_private() {
    let hidden = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    if let Err(error) = hidden {
        tracing::warn!(%error, "a memory image of this process would have keys in it");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_others_may_use_is_refused_with_the_command_that_mends_it() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("the keys");
        assert!(read(&path, 9).unwrap_err().is_missing());
        std::fs::write(&path, "secret").unwrap();
        for mode in [0o640, 0o604, 0o620, 0o660, 0o644] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = read(&path, 9).unwrap_err().to_string();
            let shown = path.display();
            for part in [
                format!("{shown}: "),
                format!("mode {mode:04o}"),
                "wanted: mode 0600".to_owned(),
                format!("`chmod 600 '{shown}'`"),
            ] {
                assert!(error.contains(&part), "{part}: {error}");
            }
            assert!(!error.contains("secret") && !error.contains('\n'), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(&**read(&path, 6).unwrap(), "secret");
        assert!(matches!(read(&path, 5), Err(PrivateError::Long { bytes: 6, max: 5, .. })));
    }

    #[test]
    fn no_image_of_the_memory_is_written_once_a_file_of_keys_is_read() {
        let scratch = tempfile::tempdir().unwrap();
        assert!(read(&scratch.path().join("none"), 9).is_err());
        let now = rustix::process::dumpable_behavior().unwrap();
        assert_eq!(now, DumpableBehavior::NotDumpable);
    }

    #[test]
    fn what_somebody_else_owns_is_refused() {
        let path = Path::new("/k");
        assert!(judge(path, 0o100_600, 1000, 1000).is_ok());
        assert!(judge(path, 0o100_400, 0, 1000).is_ok());
        let error = judge(path, 0o100_600, 1001, 1000).unwrap_err().to_string();
        assert!(error.contains("belongs to user 1001; wanted: user 1000"), "{error}");
        assert!(error.contains("`chown 1000 /k`"), "{error}");
    }
}
