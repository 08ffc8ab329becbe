//! Reading `/proc` and `/sys` below a root folder, with bounds.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Most bytes of a file that are read. The longest we look at is `/proc/cpuinfo` of a large machine,
/// of which the beginning does.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Most entries of a folder that are looked at: more than any machine has CPUs or queues.
const ENTRIES_MAX: usize = 8192;

/// Longest value that is shown.
const SHOWN_CHARS_MAX: usize = 120;

/// A machine's files.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(super) fn new(root: &Path) -> Tree {
        Tree { root: root.to_owned() }
    }

    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// A file's text. `None` if there is none or it is no regular file.
    pub(super) fn raw(&self, below: &str) -> Option<String> {
        let path = self.path(below);
        // A pipe in a made-up tree would never end.
        if !fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file of one value, fit to be shown: one line, blanks folded, no control characters.
    pub(super) fn text(&self, below: &str) -> Option<String> {
        let raw = self.raw(below)?;
        let words: Vec<&str> = raw.split_whitespace().collect();
        let text: String =
            words.join(" ").chars().filter(|c| !c.is_control()).take(SHOWN_CHARS_MAX).collect();
        (!text.is_empty()).then_some(text)
    }

    pub(super) fn number(&self, below: &str) -> Option<i64> {
        self.text(below)?.parse().ok()
    }

    /// Names in a folder, sorted, the numbers in them by value. Names that no kernel gives are left
    /// out: they end up in commands.
    pub(super) fn names(&self, below: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(below)) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .take(ENTRIES_MAX)
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| is_plain(name))
            .collect();
        names.sort_by_cached_key(|name| {
            let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
            let (head, number) = name.split_at(name.len() - digits);
            (head.to_owned(), number.parse::<u64>().unwrap_or(u64::MAX), name.clone())
        });
        names
    }

    /// Names in a folder that are `prefix` and a number.
    pub(super) fn numbered(&self, below: &str, prefix: &str) -> Vec<(String, usize)> {
        self.names(below)
            .into_iter()
            .filter_map(|name| {
                let number = name.strip_prefix(prefix)?.parse().ok()?;
                Some((name, number))
            })
            .collect()
    }

    pub(super) fn exists(&self, below: &str) -> bool {
        self.path(below).exists()
    }
}

/// Of what the kernel makes names of devices, and a shell takes for nothing but itself.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(['.', '-'])
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:@+,".contains(c))
}

/// The numbers of a list such as `0-3,8`. Nonsense in it counts for nothing.
pub(super) fn list(text: &str) -> Vec<usize> {
    let mut numbers: Vec<usize> = text
        .trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.trim().split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first <= last && last < ENTRIES_MAX).then_some(first..=last)
        })
        .take(ENTRIES_MAX)
        .flatten()
        .take(ENTRIES_MAX)
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The alternative in brackets: `none` of `[none] mq-deadline`.
pub(super) fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_nonsense_in_them_is_not() {
        assert_eq!(list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(list("1,1,0"), [0, 1]);
        assert_eq!(list(""), [0; 0]);
        assert_eq!(list("3-1,x,-,7-,5"), [5]);
        assert_eq!(list("0-18446744073709551615,4"), [4]);
        assert!(list(&"0-8191,".repeat(10_000)).len() <= ENTRIES_MAX);
    }

    #[test]
    fn the_alternative_in_brackets_is_found() {
        assert_eq!(chosen("[none] mq-deadline"), Some("none"));
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("none"), None);
        assert_eq!(chosen("[] ]["), Some(""));
    }

    #[test]
    fn names_that_a_shell_would_take_for_more_are_left_out() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["eth10", "eth2", "a;reboot", "$(x)", "..x", "-rf", "wl p"] {
            fs::create_dir(scratch.path().join(name)).unwrap();
        }
        assert_eq!(Tree::new(scratch.path()).names("."), ["eth2", "eth10"]);
    }
}
