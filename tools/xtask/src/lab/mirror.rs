//! Where this machine gets Debian packages from, so that the lab uses the same place.

use std::fs;

/// The archive this machine's package manager is set to use, if one looks like Debian's.
/// Without it the set-up tool falls back to the default that it knows itself.
pub(super) fn of_this_machine() -> Option<String> {
    let mut files = vec!["/etc/apt/sources.list".into()];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
        more.sort();
        files.extend(more);
    }
    files.iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => one_line(&text),
            Some("sources") => stanzas(&text),
            _ => None,
        }
    })
}

/// Reads `deb [options] URI SUITE COMPONENT...` lines.
pub(super) fn one_line(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        if words.next()? != "deb" {
            return None;
        }
        let mut in_options = false;
        let uri = words.find(|word| {
            in_options |= word.starts_with('[');
            let is_option = in_options;
            in_options &= !word.ends_with(']');
            !is_option
        })?;
        accept(uri)
    })
}

/// Reads stanzas of `Name: value` lines, as files ending in `.sources` have.
fn stanzas(text: &str) -> Option<String> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let is_binary = field("Types")?.split_whitespace().any(|kind| kind == "deb");
        let is_enabled = !field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if !is_binary || !is_enabled {
            return None;
        }
        field("URIs")?.split_whitespace().find_map(accept)
    })
}

/// Security updates and other vendors' packages live in archives of other names.
fn accept(uri: &str) -> Option<String> {
    let uri = uri.trim_end_matches('/');
    (uri.contains("://") && uri.ends_with("/debian")).then(|| uri.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_sources() {
        let text = "# deb http://old.example/debian x main\n\
                    deb https://vendor.example/apt stable main\n\
                    deb-src http://src.example/debian trixie main\n\
                    deb [arch=amd64 signed-by=/x.gpg] http://mirror.example/debian/ trixie main\n";
        assert_eq!(one_line(text).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(one_line("deb http://mirror.example/ubuntu noble main"), None);
        assert_eq!(one_line("deb [never=closed"), None);
    }

    #[test]
    fn stanza_sources() {
        let text = "Types: deb\nURIs: http://a.example/debian-security\nSuites: trixie-security\n\n\
                    Types: deb\nEnabled: no\nURIs: http://b.example/debian\n\n\
                    Types: deb-src\nURIs: http://c.example/debian\n\n\
                    Types: deb deb-src\nURIs: http://d.example/debian\nSuites: trixie\n";
        assert_eq!(stanzas(text).as_deref(), Some("http://d.example/debian"));
        assert_eq!(stanzas(""), None);
    }
}
