//! Asymmetric Namespace Access (NVMe Base 2.0, "Asymmetric Namespace Access Reporting"): the states
//! of the groups that namespaces are in, as the controllers of one port have them.
//!
//! ```text
//!   AnaTable (one per subsystem and port) ── groups() ─► SubsystemInfo::with_ana_groups
//!      ▲ set_state, namespaces_changed                     │ one controller's view
//!      operator                                            ├─► decode: refusals
//!                                                          └─► ana_log: log page 0Ch
//! ```

use super::SubsystemInfo;
use crate::spec::Status;

/// ANA groups a subsystem may have (NANAGRPID), and largest group identifier (ANAGRPMAX).
pub const ANA_GROUPS_MAX: u32 = 128;

/// ANA Transition Time (ANATT) in seconds: the longest that a group is in the Change state. A host
/// that sees it longer gives the controller up.
pub const ANATT_SECS: u8 = 10;

/// ANA Capabilities (ANACAP): all five states are reported (bits 4:0), and every namespace has a
/// group identifier other than 0 (bit 7). Bit 6 is clear: a namespace may change its group.
pub const ANACAP: u8 = 0b1001_1111;

/// Bytes of the ANA log before the first group.
const LOG_HEADER_LEN: usize = 16;
/// Bytes of an ANA Group Descriptor before its namespaces.
const GROUP_HEADER_LEN: usize = 32;

/// State of an ANA group relative to one controller.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u8)]
pub enum AnaState {
    /// ANA Optimized state: the path to prefer.
    #[default]
    Optimized = 0x01,
    /// ANA Non-Optimized state: works, others are better.
    NonOptimized = 0x02,
    /// ANA Inaccessible state: use another path; may change.
    Inaccessible = 0x03,
    /// ANA Persistent Loss state: this controller will never reach the group again.
    PersistentLoss = 0x04,
    /// ANA Change state: between two others, for at most ANATT.
    Change = 0x0f,
}

impl AnaState {
    /// From the value on the wire.
    #[must_use]
    pub const fn from_wire(value: u8) -> Option<AnaState> {
        match value {
            0x01 => Some(AnaState::Optimized),
            0x02 => Some(AnaState::NonOptimized),
            0x03 => Some(AnaState::Inaccessible),
            0x04 => Some(AnaState::PersistentLoss),
            0x0f => Some(AnaState::Change),
            _ => None,
        }
    }

    /// Whether a group of one controller may go from this state to another. Persistent Loss is for
    /// ever.
    #[must_use]
    pub fn may_become(self, to: AnaState) -> bool {
        self != AnaState::PersistentLoss || to == AnaState::PersistentLoss
    }

    /// The value on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self as u8
    }

    /// Status that every I/O command to a namespace of the group fails with; `None`: I/O works.
    /// Without Do Not Retry: the host is to retry, on another path or later.
    #[must_use]
    pub const fn refusal(self) -> Option<Status> {
        match self {
            AnaState::Optimized | AnaState::NonOptimized => None,
            AnaState::Inaccessible => Some(Status::ANA_INACCESSIBLE),
            AnaState::PersistentLoss => Some(Status::ANA_PERSISTENT_LOSS),
            AnaState::Change => Some(Status::ANA_TRANSITION),
        }
    }
}

/// An ANA group as the controllers of one port have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AnaGroup {
    /// Identifier (ANAGRPID), 1..=[`ANA_GROUPS_MAX`].
    pub id: u32,
    /// State.
    pub state: AnaState,
    /// Grows with every change of the state or of the namespaces in the group; from 1.
    pub change_count: u64,
}

impl AnaGroup {
    /// A group with its first change count.
    #[must_use]
    pub const fn new(id: u32, state: AnaState) -> AnaGroup {
        AnaGroup { id, state, change_count: 1 }
    }
}

/// An ANA state cannot be what was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidAna {
    /// Identifier out of range.
    #[error("ANA group {id} is not in 1..={ANA_GROUPS_MAX}")]
    GroupId {
        /// The identifier.
        id: u32,
    },
    /// The group is in Persistent Loss state.
    #[error("ANA group {id} is persistently lost on this port and stays so")]
    PersistentLoss {
        /// The identifier.
        id: u32,
    },
}

/// The ANA groups of a subsystem on one port, and the rules by which they change. A group once
/// there stays, so that change counts never go back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AnaTable {
    /// By identifier.
    groups: Vec<AnaGroup>,
}

impl Default for AnaTable {
    fn default() -> Self {
        AnaTable { groups: vec![AnaGroup::new(1, AnaState::Optimized)] }
    }
}

impl AnaTable {
    /// Group 1 alone, optimized: where namespaces are if nobody says otherwise.
    #[must_use]
    pub fn new() -> AnaTable {
        AnaTable::default()
    }

    /// The groups, for [`SubsystemInfo::with_ana_groups`].
    #[must_use]
    pub fn groups(&self) -> &[AnaGroup] {
        &self.groups
    }

    /// State of a group, if there is one with this identifier.
    #[must_use]
    pub fn state(&self, id: u32) -> Option<AnaState> {
        group(&self.groups, id).map(|group| group.state)
    }

    /// Changes the state of a group, which is made if it was not there. Returns whether anything
    /// is different now.
    ///
    /// # Errors
    /// [`InvalidAna`]: no such identifier, or the group is persistently lost.
    pub fn set_state(&mut self, id: u32, state: AnaState) -> Result<bool, InvalidAna> {
        let (group, is_new) = self.entry(id, state)?;
        if !group.state.may_become(state) {
            return Err(InvalidAna::PersistentLoss { id });
        }
        let changes = group.state != state;
        if changes {
            group.state = state;
            group.change_count = next_count(group.change_count);
        }
        Ok(changes || is_new)
    }

    /// A namespace came to the group or left it. The group is made, optimized, if it was not
    /// there. A namespace that moves is told of twice.
    ///
    /// # Errors
    /// [`InvalidAna::GroupId`].
    pub fn namespaces_changed(&mut self, id: u32) -> Result<(), InvalidAna> {
        let (group, is_new) = self.entry(id, AnaState::Optimized)?;
        if !is_new {
            group.change_count = next_count(group.change_count);
        }
        Ok(())
    }

    /// The group, made in this state if it was not there.
    fn entry(&mut self, id: u32, state: AnaState) -> Result<(&mut AnaGroup, bool), InvalidAna> {
        if id == 0 || id > ANA_GROUPS_MAX {
            return Err(InvalidAna::GroupId { id });
        }
        let found = self.groups.binary_search_by_key(&id, |group| group.id);
        if let Err(at) = found {
            self.groups.insert(at, AnaGroup::new(id, state));
        }
        let at = found.unwrap_or_else(|at| at);
        Ok((&mut self.groups[at], found.is_err()))
    }
}

/// 0 would say that changes are not counted.
fn next_count(count: u64) -> u64 {
    count.wrapping_add(1).max(1)
}

/// Asymmetric Namespace Access log page (0Ch) of a controller with this view of the subsystem:
/// the groups its namespaces are in, each with its namespaces in ascending order or, with `rgo`
/// (Return Groups Only), without. At most 16 + 32 * [`ANA_GROUPS_MAX`] bytes and 4 for each
/// namespace; takes time linear in the number of namespaces.
#[must_use]
pub fn ana_log(subsys: &SubsystemInfo, rgo: bool) -> Vec<u8> {
    let groups = subsys.ana_groups();
    let index_of = |id: u32| groups.binary_search_by_key(&id, |group| group.id).ok();
    // Namespaces per group, then where the next one of each group goes.
    let mut members = vec![0_usize; groups.len()];
    for ns in subsys.namespaces() {
        if let Some(at) = index_of(ns.ana_group) {
            members[at] += 1;
        }
    }
    let listed = |count: usize| if rgo { 0 } else { count };
    let mut out = vec![0; LOG_HEADER_LEN];
    let mut reported = 0_u16;
    let mut next = vec![0_usize; groups.len()];
    for (at, group) in groups.iter().enumerate().filter(|(at, _)| members[*at] > 0) {
        let count = listed(members[at]);
        let from = out.len();
        next[at] = from + GROUP_HEADER_LEN;
        out.resize(from + GROUP_HEADER_LEN + count * 4, 0);
        let header = &mut out[from..];
        header[0..4].copy_from_slice(&group.id.to_le_bytes());
        header[4..8].copy_from_slice(&(count as u32).to_le_bytes());
        header[8..16].copy_from_slice(&group.change_count.to_le_bytes());
        header[16] = group.state.to_wire();
        reported += 1;
    }
    if !rgo {
        for ns in subsys.namespaces() {
            if let Some(at) = index_of(ns.ana_group) {
                out[next[at]..][..4].copy_from_slice(&ns.nsid.to_le_bytes());
                next[at] += 4;
            }
        }
    }
    out[0..8].copy_from_slice(&subsys.ana_change_count().to_le_bytes());
    out[8..10].copy_from_slice(&reported.to_le_bytes());
    out
}

/// State of a group according to a host's copy of an ANA log, which may be cut short or followed by
/// anything; `None`: the log does not say.
#[must_use]
pub fn log_state(log: &[u8], group: u32) -> Option<AnaState> {
    let reported = u16::from_le_bytes(log.get(8..10)?.try_into().ok()?);
    let mut at = LOG_HEADER_LEN;
    for _ in 0..reported {
        let header = log.get(at..)?.get(..GROUP_HEADER_LEN)?;
        let word = |from: usize| header[from..].first_chunk().map(|word| u32::from_le_bytes(*word));
        if word(0)? == group {
            return AnaState::from_wire(header[16] & 0xf);
        }
        at = at.checked_add(GROUP_HEADER_LEN)?.checked_add((word(4)? as usize).checked_mul(4)?)?;
    }
    None
}

/// The group with this identifier in a list sorted by it.
pub(crate) fn group(groups: &[AnaGroup], id: u32) -> Option<&AnaGroup> {
    // Usually numbered from 1 without gaps.
    match groups.get((id as usize).wrapping_sub(1)) {
        Some(group) if group.id == id => Some(group),
        _ => groups.binary_search_by_key(&id, |group| group.id).ok().map(|at| &groups[at]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::subsys::tests::build;
    use crate::subsys::{InvalidSubsystem, Limits, NamespaceInfo};

    const STATES: [AnaState; 5] = [
        AnaState::Optimized,
        AnaState::NonOptimized,
        AnaState::Inaccessible,
        AnaState::PersistentLoss,
        AnaState::Change,
    ];

    fn namespaces(list: &[(u32, u32)]) -> Vec<NamespaceInfo> {
        let namespace =
            |&(nsid, ana_group)| NamespaceInfo { ana_group, ..NamespaceInfo::new(nsid, 512, 8) };
        list.iter().map(namespace).collect()
    }

    fn subsystem(list: &[(u32, u32)], groups: &[AnaGroup]) -> SubsystemInfo {
        let limits = Limits { namespaces_max: 1 << 16, ..Limits::default() };
        build(namespaces(list), limits).unwrap().with_ana_groups(groups.to_vec()).unwrap()
    }

    #[test]
    fn states_have_their_numbers_and_refusals() {
        let expected =
            [(1, None), (2, None), (3, Some(0x302)), (4, Some(0x301)), (0xf, Some(0x303))];
        for (state, (wire, refusal)) in STATES.into_iter().zip(expected) {
            assert_eq!(state.to_wire(), wire);
            assert_eq!(AnaState::from_wire(wire), Some(state));
            // The whole field: no Do Not Retry.
            assert_eq!(state.refusal().map(|status| status.0), refusal);
        }
        assert_eq!((0..=255).filter_map(AnaState::from_wire).count(), STATES.len());
    }

    #[test]
    fn changes_are_counted_per_group() {
        let mut table = AnaTable::new();
        assert_eq!(table.groups(), [AnaGroup::new(1, AnaState::Optimized)]);
        assert_eq!(table.set_state(1, AnaState::Optimized), Ok(false));
        assert_eq!(table.set_state(1, AnaState::Change), Ok(true));
        assert_eq!(table.set_state(1, AnaState::Inaccessible), Ok(true));
        assert_eq!(table.groups()[0].change_count, 3);
        // A new group has its first count, whatever state it begins in.
        assert_eq!(table.set_state(7, AnaState::NonOptimized), Ok(true));
        table.namespaces_changed(3).unwrap();
        table.namespaces_changed(7).unwrap();
        let found: Vec<_> = table.groups().iter().map(|g| (g.id, g.change_count)).collect();
        assert_eq!(found, [(1, 3), (3, 1), (7, 2)]);
        assert_eq!((table.state(3), table.state(4)), (Some(AnaState::Optimized), None));
        for id in [0, 129, u32::MAX] {
            assert_eq!(table.set_state(id, AnaState::Optimized), Err(InvalidAna::GroupId { id }));
            assert_eq!(table.namespaces_changed(id), Err(InvalidAna::GroupId { id }));
        }
    }

    #[test]
    fn persistent_loss_is_for_ever() {
        let mut table = AnaTable::new();
        assert_eq!(table.set_state(1, AnaState::PersistentLoss), Ok(true));
        assert_eq!(table.set_state(1, AnaState::PersistentLoss), Ok(false));
        for state in STATES.into_iter().filter(|state| *state != AnaState::PersistentLoss) {
            assert_eq!(table.set_state(1, state), Err(InvalidAna::PersistentLoss { id: 1 }));
        }
        assert_eq!(next_count(u64::MAX), 1);
    }

    #[test]
    fn groups_of_a_view_are_checked() {
        let base = || build(namespaces(&[(1, 1), (2, 5)]), Limits::default()).unwrap();
        let group = |id| AnaGroup::new(id, AnaState::Optimized);
        let refused = |groups: &[u32]| {
            base().with_ana_groups(groups.iter().map(|id| group(*id)).collect()).unwrap_err()
        };
        assert_eq!(refused(&[1]), InvalidSubsystem::UnknownAnaGroup { nsid: 2, group: 5 });
        assert_eq!(refused(&[1, 5, 1]), InvalidSubsystem::DuplicateAnaGroup(1));
        assert_eq!(refused(&[1, 5, 0]), InvalidSubsystem::AnaGroupId { id: 0, max: 128 });
        assert_eq!(refused(&[1, 5, 129]), InvalidSubsystem::AnaGroupId { id: 129, max: 128 });
        let view = base().with_ana_groups(vec![group(5), group(1)]).unwrap();
        assert_eq!(view.ana_groups(), [group(1), group(5)]);
        // Without groups nobody looks at the namespaces'.
        assert!(base().ana_groups().is_empty());
        assert_eq!(base().with_ana_groups(vec![]), Ok(base()));
        // Other namespaces must fit the groups, too.
        let moved = view.with_namespaces(namespaces(&[(3, 6)]));
        assert_eq!(moved, Err(InvalidSubsystem::UnknownAnaGroup { nsid: 3, group: 6 }));
        assert_eq!(view.with_namespaces(namespaces(&[])).unwrap().ana_groups().len(), 2);
    }

    #[test]
    fn a_restricted_view_keeps_the_states() {
        let group = |id, state| AnaGroup { id, state, change_count: 4 };
        let groups = [group(1, AnaState::Optimized), group(2, AnaState::Inaccessible)];
        let view = subsystem(&[(1, 2), (2, 1), (3, 2), (4, 1)], &groups);
        let part = view.restricted(|ns| ns.nsid >= 2);
        assert_eq!(part.namespaces().len(), 3);
        assert_eq!((part.nqn(), part.ana_groups()), (view.nqn(), view.ana_groups()));
        assert_eq!(part.ana_change_count(), 8);
        for ns in part.namespaces() {
            let index = part.namespace_index(ns.nsid).unwrap();
            assert_eq!(part.ana_refusal(index), part.ana_state(ns).refusal(), "{}", ns.nsid);
        }
        // Nothing that is impaired is left: the fast path again.
        let part = view.restricted(|ns| ns.ana_group == 1);
        assert!(!part.ana_impaired && part.ana_states.is_empty());
    }

    /// Golden bytes, laid out by hand after "Asymmetric Namespace Access Log Page".
    #[test]
    fn log_page() {
        let groups = [
            AnaGroup { id: 1, state: AnaState::Optimized, change_count: 3 },
            AnaGroup { id: 2, state: AnaState::Change, change_count: 0x0100 },
            AnaGroup { id: 9, state: AnaState::Inaccessible, change_count: 1 },
        ];
        let view = subsystem(&[(0x0201, 9), (3, 1), (2, 9)], &groups);
        let mut expected = vec![0; 16 + 32 + 4 + 32 + 8];
        // Counts add up; two groups: nothing is in group 2.
        (expected[0], expected[1], expected[8]) = (4, 1, 2);
        (expected[16], expected[20], expected[24], expected[32]) = (1, 1, 3, 1);
        expected[48] = 3;
        (expected[52], expected[56], expected[60], expected[68]) = (9, 2, 1, 3);
        (expected[84], expected[88], expected[89]) = (2, 1, 2);
        assert_eq!(ana_log(&view, false), expected);
        let mut groups_only = expected[..48].to_vec();
        groups_only[20] = 0;
        groups_only.extend_from_slice(&expected[52..84]);
        groups_only[48 + 4] = 0;
        assert_eq!(ana_log(&view, true), groups_only);
        let none = build(vec![], Limits::default()).unwrap();
        assert_eq!(ana_log(&none, false), [0; 16]);
    }

    proptest! {
        /// Every namespace is listed once, in its group, in order.
        #[test]
        fn log_page_lists_every_namespace(
            list in proptest::collection::btree_map(1u32..2000, 1u32..20, 0..300),
            rgo in any::<bool>(),
        ) {
            let list: Vec<(u32, u32)> = list.into_iter().collect();
            let groups: Vec<AnaGroup> =
                (1..20).map(|id| AnaGroup::new(id, STATES[id as usize % 5])).collect();
            let log = ana_log(&subsystem(&list, &groups), rgo);
            let word = |at: usize| u32::from_le_bytes(log[at..at + 4].try_into().unwrap());
            let (mut at, mut found, mut last) = (16, Vec::new(), 0);
            for _ in 0..log[8] {
                let (id, count) = (word(at), word(at + 4));
                prop_assert!(id > last);
                last = id;
                prop_assert_eq!(log[at + 16], STATES[id as usize % 5].to_wire());
                at += 32;
                for _ in 0..count {
                    found.push((word(at), id));
                    at += 4;
                }
            }
            prop_assert_eq!(at, log.len());
            prop_assert!(found.windows(2).all(|w| w[0].1 != w[1].1 || w[0].0 < w[1].0));
            found.sort_unstable();
            prop_assert_eq!(found, if rgo { vec![] } else { list });
        }
    }

    /// Ten thousand namespaces in one step per namespace: the log has the length it must have.
    #[test]
    fn ten_thousand_namespaces() {
        let list: Vec<(u32, u32)> = (1..=10_000).map(|nsid| (nsid, nsid % 128 + 1)).collect();
        let groups: Vec<AnaGroup> =
            (1..=128).map(|id| AnaGroup::new(id, AnaState::Inaccessible)).collect();
        let view = subsystem(&list, &groups);
        assert_eq!(ana_log(&view, false).len(), 16 + 128 * 32 + 10_000 * 4);
        assert_eq!(view.ana_states.len(), 10_000);
        assert_eq!(view.restricted(|ns| ns.nsid % 2 == 0).namespaces().len(), 5_000);
    }

    proptest::proptest! {
        #[test]
        fn a_host_finds_in_the_log_what_the_controller_put_there(
            rgo: bool,
            states in proptest::collection::vec(0..5usize, 3),
            junk in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            cut in 0..200usize,
            group: u32,
        ) {
            use AnaState::{Change, Inaccessible, NonOptimized, Optimized, PersistentLoss};
            let all = [Optimized, NonOptimized, Inaccessible, PersistentLoss, Change];
            let base = crate::subsys::tests::sample();
            let groups = (1..=3u32).map(|id| AnaGroup {
                id,
                state: all[states[id as usize - 1]],
                change_count: u64::from(id),
            });
            let subsys = base.with_ana_groups(groups.collect()).unwrap();
            let log = ana_log(&subsys, rgo);
            for ns in subsys.namespaces() {
                proptest::prop_assert_eq!(
                    log_state(&log, ns.ana_group),
                    Some(subsys.ana_state(ns))
                );
            }
            proptest::prop_assert_eq!(log_state(&log, 99), None);
            // No panic, whatever comes.
            let _ = log_state(&log[..cut.min(log.len())], group);
            let _ = log_state(&junk, group);
        }
    }
}
