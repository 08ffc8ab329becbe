//! Which crate of the workspace may import which, and where the heavy crates may appear.
//!
//! The table is the picture in the design: protocol and cryptography import nothing of ours, the
//! data path goes `block -> reactor -> iobuf`, the ends never import each other, and `daemon`
//! composes them. Dev-dependencies obey the same rule: a test that needs more belongs in `it`.

use cargo_metadata::{DependencyKind, Metadata};

/// A crate and the crates of the workspace it may import.
const ALLOWED: &[(&str, &[&str])] = &[
    ("nvme", &[]),
    ("crypto", &["iobuf"]),
    ("iobuf", &[]),
    ("reactor", &["iobuf"]),
    ("block", &["reactor", "iobuf"]),
    ("nvmf-target", &["block", "reactor", "iobuf", "nvme", "crypto"]),
    ("nvmf-initiator", &["block", "reactor", "iobuf", "nvme", "crypto"]),
    ("nvme-pci", &["block", "reactor", "iobuf", "nvme"]),
    ("virtio-blk", &["block", "reactor", "iobuf"]),
    ("api", &[]),
    (
        "daemon",
        &[
            "api",
            "block",
            "crypto",
            "iobuf",
            "nvme",
            "nvme-pci",
            "nvmf-initiator",
            "nvmf-target",
            "reactor",
            "virtio-blk",
        ],
    ),
    ("penstock", &["api", "daemon"]),
    ("xtask", &[]),
];

/// May import anything of ours: the integration tests, and work that is counted.
const UNBOUND: &[&str] = &["it", "gate"];

/// Crates of the data path and the protocols, which must stay free of [`HEAVY`].
const BELOW_DAEMON: &[&str] = &[
    "nvme",
    "crypto",
    "iobuf",
    "reactor",
    "block",
    "nvmf-target",
    "nvmf-initiator",
    "nvme-pci",
    "virtio-blk",
];

/// Runtimes, HTTP, serialisation and argument parsing live in `api`, `daemon` or above.
const HEAVY: &[&str] = &["tokio", "axum", "hyper", "serde", "serde_json", "toml", "clap"];

/// One dependency as its manifest states it.
struct Edge {
    from: String,
    to: String,
    is_local: bool,
    is_dev: bool,
}

/// Every dependency of the workspace that is not in the picture, one line each.
pub(super) fn violations(metadata: &Metadata) -> Vec<String> {
    let members = metadata.workspace_packages();
    let names: Vec<&str> = members.iter().map(|package| package.name.as_str()).collect();
    let edges = members.iter().flat_map(|package| {
        package.dependencies.iter().map(|dependency| Edge {
            from: package.name.to_string(),
            to: dependency.name.clone(),
            is_local: dependency.path.is_some(),
            is_dev: dependency.kind == DependencyKind::Development,
        })
    });
    judge(&names, edges)
}

fn judge(members: &[&str], edges: impl IntoIterator<Item = Edge>) -> Vec<String> {
    let mut found: Vec<String> = members
        .iter()
        .filter(|name| !UNBOUND.contains(name) && allowed(name).is_none())
        .map(|name| format!("crate `{name}` has no place in the dependency picture"))
        .collect();
    for Edge { from, to, is_local, is_dev } in edges {
        if is_local {
            let in_picture = allowed(&from).is_none_or(|list| list.contains(&to.as_str()));
            if !in_picture {
                found.push(format!("crate `{from}` must not import `{to}`"));
            }
        } else if !is_dev && BELOW_DAEMON.contains(&from.as_str()) && HEAVY.contains(&to.as_str()) {
            found.push(format!("crate `{from}` is below `daemon` and must not use `{to}`"));
        }
    }
    found
}

fn allowed(name: &str) -> Option<&'static [&'static str]> {
    ALLOWED.iter().find(|(from, _)| *from == name).map(|(_, list)| *list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(from: &str, to: &str, is_dev: bool) -> Edge {
        Edge { from: from.to_owned(), to: to.to_owned(), is_local: true, is_dev }
    }

    fn external(from: &str, to: &str, is_dev: bool) -> Edge {
        Edge { from: from.to_owned(), to: to.to_owned(), is_local: false, is_dev }
    }

    #[test]
    fn the_workspace_as_it_is_has_its_members_in_the_picture() {
        let metadata = crate::workspace::metadata().unwrap();
        assert_eq!(violations(&metadata), Vec::<String>::new());
    }

    #[test]
    fn edges_of_the_picture_pass() {
        let edges = [
            local("block", "reactor", false),
            local("nvmf-initiator", "crypto", false),
            local("daemon", "virtio-blk", false),
            local("penstock", "daemon", false),
            local("it", "penstock", false),
            external("daemon", "tokio", false),
            external("nvme", "zerocopy", false),
        ];
        assert_eq!(judge(&["block", "it"], edges), Vec::<String>::new());
    }

    #[test]
    fn an_upward_edge_is_reported_with_both_names() {
        let found = judge(&[], [local("reactor", "block", false)]);
        assert_eq!(found, ["crate `reactor` must not import `block`"]);
    }

    #[test]
    fn the_ends_never_import_each_other_not_even_in_their_tests() {
        for (from, to) in [("nvmf-target", "nvmf-initiator"), ("virtio-blk", "nvmf-initiator")] {
            assert_eq!(judge(&[], [local(from, to, false)]).len(), 1);
            assert_eq!(judge(&[], [local(from, to, true)]).len(), 1);
        }
    }

    #[test]
    fn virtio_blk_does_not_know_nvme_and_nvme_knows_nobody() {
        assert_eq!(judge(&[], [local("virtio-blk", "nvme", false)]).len(), 1);
        assert_eq!(judge(&[], [local("nvme", "iobuf", false)]).len(), 1);
    }

    #[test]
    fn runtimes_and_serialisation_stay_out_of_the_data_path() {
        let found = judge(&[], [external("block", "tokio", false)]);
        assert_eq!(found, ["crate `block` is below `daemon` and must not use `tokio`"]);
        assert_eq!(judge(&[], [external("nvme", "serde", false)]).len(), 1);
        // A test may well read JSON.
        assert_eq!(judge(&[], [external("nvme", "serde_json", true)]).len(), 0);
    }

    #[test]
    fn a_new_crate_needs_a_place_first() {
        let found = judge(&["util"], []);
        assert_eq!(found, ["crate `util` has no place in the dependency picture"]);
    }
}
