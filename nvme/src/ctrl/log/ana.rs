//! Which changes of ANA groups an event tells.

use crate::subsys::SubsystemInfo;

/// Whether a host has to be told that ANA information changed: the state of a group it has
/// namespaces in, or the group of a namespace. Namespaces that come or go are told by the
/// Namespace Attribute Changed event.
pub(crate) fn has_changed(old: &SubsystemInfo, new: &SubsystemInfo) -> bool {
    old.namespaces().iter().any(|ns| {
        new.namespace(ns.nsid).is_some_and(|new_ns| {
            new_ns.ana_group != ns.ana_group || new.ana_state(new_ns) != old.ana_state(ns)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subsys::ana::{AnaGroup, AnaState};
    use crate::subsys::tests::sample;

    fn grouped(states: [AnaState; 3]) -> SubsystemInfo {
        let base = sample();
        let mut namespaces = base.namespaces().to_vec();
        namespaces[1].ana_group = 2;
        let groups = (1..=3).map(|id| AnaGroup {
            id,
            state: states[id as usize - 1],
            change_count: u64::from(id),
        });
        let base = base.with_ana_groups(groups.collect()).unwrap();
        base.with_namespaces(namespaces).unwrap()
    }

    #[test]
    fn changes_that_concern_a_host() {
        use AnaState::{Inaccessible, NonOptimized, Optimized};
        let old = grouped([Optimized; 3]);
        assert!(!has_changed(&old, &old));
        assert!(!has_changed(&old, &grouped([Optimized, Optimized, Inaccessible])), "no namespace");
        assert!(has_changed(&old, &grouped([Optimized, NonOptimized, Optimized])));
        let mut namespaces = old.namespaces().to_vec();
        namespaces.pop();
        let fewer = old.with_namespaces(namespaces.clone()).unwrap();
        assert!(!has_changed(&old, &fewer) && !has_changed(&fewer, &old));
        namespaces[0].ana_group = 3;
        assert!(has_changed(&old, &old.with_namespaces(namespaces).unwrap()), "moved");
    }
}
