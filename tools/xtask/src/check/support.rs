//! What `docs/support.md` says that no test of one crate can see: that the tests it names exist, and
//! which status codes the sources of the controllers send.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::exec;

const DOCUMENT: &str = "docs/support.md";

/// Sources of what answers hosts. Tests in them count as well: they expect what is sent.
const CONTROLLERS: &[&str] =
    &["nvme/src/ctrl", "nvme/src/subsys", "nvme/src/xfer", "nvmf-target/src", "nvme-pci/src"];

/// Where every refusal of Connect has a name, sent or not.
const CONNECT: &str = "nvme/src/fabrics.rs";

/// Every row that names a test nobody wrote, or a status code that is sent although it says not, or
/// the other way round.
pub(super) fn violations(root: &Path) -> Result<Vec<String>> {
    let document = std::fs::read_to_string(root.join(DOCUMENT)).context(DOCUMENT)?;
    let mut list = Command::new("git");
    list.arg("-C").arg(root);
    list.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.rs"]);
    let list = exec::output(&mut list)?;
    let mut sources = Sources::default();
    for path in list.split('\0').filter(|path| !path.is_empty()) {
        // A file deleted but not yet committed is still listed.
        if let Ok(text) = std::fs::read_to_string(root.join(path)) {
            sources.add(path, &text);
        }
    }
    Ok(check(&document, &sources))
}

/// What the sources have of what the document speaks of.
#[derive(Default)]
struct Sources {
    /// Names of the functions marked as tests.
    tests: BTreeSet<String>,
    /// Status codes named in controllers.
    statuses: BTreeSet<String>,
    /// Status codes that refuse a Connect.
    connect: BTreeSet<String>,
}

impl Sources {
    fn add(&mut self, path: &str, text: &str) {
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line == "#[test]" {
                is_test = true;
            } else if let Some(rest) = line.strip_prefix("fn ") {
                if is_test {
                    self.tests.insert(word(rest).to_owned());
                }
                is_test = false;
            }
        }
        let named = || text.split("Status::").skip(1).map(|rest| word(rest).to_owned());
        if CONTROLLERS.iter().any(|part| path.starts_with(part)) {
            self.statuses.extend(named());
        }
        if path == CONNECT {
            self.connect.extend(named());
        }
    }
}

/// The identifier at the head of `text`.
fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

fn check(document: &str, sources: &Sources) -> Vec<String> {
    let mut found = Vec::new();
    for (index, line) in document.lines().enumerate().filter(|(_, line)| line.starts_with("| ")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let place = format!("{DOCUMENT}:{}", index + 1);
        let tests = cells.iter().filter_map(|cell| cell.strip_prefix('`')?.strip_suffix('`'));
        found.extend(
            tests
                .filter(|test| !sources.tests.contains(*test))
                .map(|test| format!("{place}: there is no test `{test}`")),
        );
        // Type, code, name, whether it is sent.
        let [_, _, _, name, sent, ..] = cells[..] else { continue };
        let in_controllers = sources.statuses.contains(name);
        if sent == "sent" && !in_controllers && !sources.connect.contains(name) {
            found.push(format!("{place}: nothing sends {name}"));
        }
        if sent == "not sent" && in_controllers {
            found.push(format!("{place}: {name} is in the sources of the controllers"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        let mut sources = Sources::default();
        sources.add("nvme/src/ctrl/x.rs", "return Err(Status::OUT_OF_RANGE.dnr());");
        sources.add("nvme/src/host/x.rs", "status.is(Status::BUSY)\n#[test]\nfn hosts() {");
        sources.add("nvme/src/fabrics.rs", "Self::plain(Status::REFUSED);");
        sources.add("a.rs", "#[test]\n#[cfg(unix)]\n    fn one() {\n}\nfn helper() {\n");
        sources
    }

    #[test]
    fn tests_that_exist_are_fine_and_others_are_reported_with_their_line() {
        let fine = "| 1h | a | `one` | |\n| 2h | b | `hosts` | |\n";
        assert_eq!(check(fine, &sources()), [""; 0]);
        let report = check("text\n| 1h | a | `helper` | |\n| 2h | b | `two` | |\n", &sources());
        assert_eq!(
            report,
            [
                "docs/support.md:2: there is no test `helper`",
                "docs/support.md:3: there is no test `two`",
            ]
        );
    }

    #[test]
    fn status_codes_are_looked_for_where_controllers_are() {
        let row = |name, sent| format!("| 0h | 01h | {name} | {sent} | `one` |\n");
        for (name, sent) in [
            ("OUT_OF_RANGE", "sent"),
            ("BUSY", "not sent"),
            ("REFUSED", "sent"),
            ("REFUSED", "not sent"),
        ] {
            assert_eq!(check(&row(name, sent), &sources()), [""; 0], "{name} {sent}");
        }
        for (name, sent) in [("OUT_OF_RANGE", "not sent"), ("BUSY", "sent")] {
            assert_eq!(check(&row(name, sent), &sources()).len(), 1, "{name} {sent}");
        }
    }
}
