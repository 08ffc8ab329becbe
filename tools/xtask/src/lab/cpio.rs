//! The archive format that the kernel takes as its first file system ("newc" cpio).
//!
//! Only what that needs: folders, regular files and symbolic links, all owned by root. Several
//! archives may follow each other in one image; a later entry replaces an earlier one.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

const TYPE_FOLDER: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_LINK: u32 = 0o120_000;

/// Writes one archive; [`Archive::finish`] ends it.
pub(super) struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    pub(super) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, TYPE_FOLDER | 0o755, &[])
    }

    /// `mode` holds the permission bits.
    pub(super) fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, TYPE_FILE | (mode & 0o7777), data)
    }

    pub(super) fn link(&mut self, name: &str, to: &[u8]) -> io::Result<()> {
        self.entry(name, TYPE_LINK | 0o777, to)
    }

    /// Adds what lies below `folder`, under the name `prefix`, in the order of the names.
    pub(super) fn tree(&mut self, folder: &Path, prefix: &str) -> io::Result<()> {
        let mut entries: Vec<_> = std::fs::read_dir(folder)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let base = entry.file_name();
            let base = base.to_str().ok_or_else(|| io::Error::other("file name is not UTF-8"))?;
            let name = if prefix.is_empty() { base.to_owned() } else { format!("{prefix}/{base}") };
            let path = entry.path();
            let meta = std::fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                self.folder(&name)?;
                self.tree(&path, &name)?;
            } else if meta.is_symlink() {
                self.link(&name, std::fs::read_link(&path)?.as_os_str().as_bytes())?;
            } else {
                self.file(&name, meta.permissions().mode(), &std::fs::read(&path)?)?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let too_big = |_| io::Error::other(format!("{name} is too big for the archive"));
        let size = u32::try_from(data.len()).map_err(too_big)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_big)?;
        self.inode += 1;
        // Inode, mode, uid, gid, links, time, size, four device numbers, name size, checksum.
        let links = 1;
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0]
            .map(|f| format!("{f:08x}"));
        let header = format!("070701{}", fields.concat());
        self.padded(&[header.as_bytes(), name.as_bytes(), &[0]])?;
        self.padded(&[data])
    }

    /// Writes the parts and fills up to the next multiple of four bytes.
    fn padded(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        for part in parts {
            self.out.write_all(part)?;
        }
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.out.write_all(&[0; 3][..len.next_multiple_of(4) - len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_110_byte_header_a_name_and_data_each_padded_to_four() {
        let mut archive = Archive::new(Vec::new());
        archive.file("init", 0o755, b"hello").unwrap();
        let bytes = archive.out;
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081ed");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000005");
        assert_eq!(&bytes[110..116], b"init\0\0");
        assert_eq!(&bytes[116..], b"hello\0\0\0");
    }

    #[test]
    fn every_archive_ends_with_the_trailer_on_a_four_byte_boundary() {
        let mut archive = Archive::new(Vec::new());
        archive.folder("a").unwrap();
        archive.link("a/b", b"c").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
