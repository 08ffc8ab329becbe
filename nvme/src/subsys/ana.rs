//! Asymmetric Namespace Access (NVMe Base 2.0, "Asymmetric Namespace Access Reporting"): the states
//! of the groups that namespaces are in, as the controllers of one port have them.

use crate::spec::Status;

/// ANA groups a subsystem may have (NANAGRPID), and largest group identifier (ANAGRPMAX).
pub const ANA_GROUPS_MAX: u32 = 128;

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

/// The group with this identifier in a list sorted by it.
pub(crate) fn group(groups: &[AnaGroup], id: u32) -> Option<&AnaGroup> {
    // Usually numbered from 1 without gaps.
    match groups.get((id as usize).wrapping_sub(1)) {
        Some(group) if group.id == id => Some(group),
        _ => groups.binary_search_by_key(&id, |group| group.id).ok().map(|at| &groups[at]),
    }
}
