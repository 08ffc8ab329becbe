//! House rules that a compiler does not check.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::exec;

/// A longer source file wants to be two.
const LINES_MAX: usize = 1200;

/// Crates that hold no `unsafe` at all, by the file that has to say so.
const FORBID_UNSAFE: &[&str] = &[
    "nvme/src/lib.rs",
    "nvmf-target/src/lib.rs",
    "nvmf-initiator/src/lib.rs",
    "api/src/lib.rs",
    "daemon/src/lib.rs",
    "tools/penstock/src/main.rs",
    "tools/xtask/src/main.rs",
];

/// Marks of unfinished work, in two parts so that this file does not report itself.
const UNFINISHED: &[(&str, &str)] =
    &[("todo", "!("), ("unimplemented", "!("), ("TO", "DO"), ("FIX", "ME"), ("XX", "X:")];

/// Every breach in the files that are, or are about to be, under version control.
pub(super) fn violations(root: &Path) -> Result<Vec<String>> {
    let mut list = Command::new("git");
    list.arg("-C").arg(root);
    list.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list = exec::output(&mut list)?;
    let places = machine_places(root);
    let mut found = Vec::new();
    for path in list.split('\0').filter(|path| !path.is_empty() && *path != "Cargo.lock") {
        // A file deleted but not yet committed is still listed; a binary one has no lines.
        let Ok(text) = std::fs::read_to_string(root.join(path)) else { continue };
        found.extend(breaches(path, &text, &places));
    }
    Ok(found)
}

/// Folders that exist only on this machine: naming one in a file ties the file to it.
fn machine_places(root: &Path) -> Vec<String> {
    let mut places = vec![root.display().to_string()];
    places.extend(root.parent().map(|parent| parent.display().to_string()));
    places.extend(std::env::var("HOME"));
    // A place such as `/` or `/tmp` says nothing about a machine.
    places.retain(|place| place.len() > 1 && !place.starts_with("/tmp") && place.starts_with('/'));
    places.extend(["/home/", "/Users/"].map(str::to_owned));
    places
}

fn breaches(path: &str, text: &str, places: &[String]) -> Vec<String> {
    let is_rust = path.ends_with(".rs");
    let is_this = path.ends_with("check/house.rs");
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if !is_this && let Some(place) = places.iter().find(|place| names_place(line, place)) {
            found.push(format!("{path}:{number}: names a place of one machine, `{place}`"));
        }
        for (head, rest) in UNFINISHED.iter().filter(|_| is_rust) {
            if line.contains(&format!("{head}{rest}")) {
                found.push(format!("{path}:{number}: unfinished work, `{head}{rest}`"));
            }
        }
    }
    let lines = text.lines().count();
    if is_rust && lines > LINES_MAX {
        found.push(format!("{path}: {lines} lines, at most {LINES_MAX} are allowed"));
    }
    if FORBID_UNSAFE.contains(&path) && !text.contains("#![forbid(unsafe_code)]") {
        found.push(format!("{path}: has to say #![forbid(unsafe_code)]"));
    }
    found
}

/// Whether `line` has `place` as a path, not as the beginning of a longer name nor inside a path.
fn names_place(line: &str, place: &str) -> bool {
    line.match_indices(place).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + place.len()..].chars().next();
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-' || c == '.';
        !before.is_some_and(|c| is_word(c) || c == '/' || c == '}')
            && (place.ends_with('/') || after == Some('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        breaches(path, text, &["/srv/checkout".to_owned(), "/home/".to_owned()])
    }

    #[test]
    fn a_path_of_one_machine_is_reported_with_its_line() {
        let report = found("README.md", "fine\nsee /srv/checkout/main\n");
        assert_eq!(report, ["README.md:2: names a place of one machine, `/srv/checkout`"]);
        assert_eq!(found("a.sh", "cd /home/someone").len(), 1);
    }

    #[test]
    fn a_longer_name_or_a_path_inside_a_tree_is_no_breach() {
        assert!(found("a", "/srv/checkouts/x /a/srv/checkout/x $tree/home/x").is_empty());
    }

    #[test]
    fn unfinished_work_in_rust_is_reported() {
        for text in [concat!("    to", "do!()"), concat!("// TO", "DO later")] {
            assert_eq!(found("x/src/lib.rs", text).len(), 1, "{text}");
            assert!(found("notes.md", text).is_empty());
        }
    }

    #[test]
    fn a_long_file_is_reported() {
        assert!(found("x.rs", &"\n".repeat(LINES_MAX)).is_empty());
        assert_eq!(found("x.rs", &"\n".repeat(LINES_MAX + 1)).len(), 1);
    }

    #[test]
    fn a_crate_without_unsafe_has_to_say_so() {
        assert_eq!(found("nvme/src/lib.rs", "//! NVMe").len(), 1);
        assert!(found("nvme/src/lib.rs", "#![forbid(unsafe_code)]").is_empty());
        assert!(found("iobuf/src/lib.rs", "//! memory").is_empty());
    }
}
