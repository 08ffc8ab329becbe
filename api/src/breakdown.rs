//! Where requests spend their time in a target.

use serde::{Deserialize, Serialize};

/// What a target found so far by following requests, over all of its cores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breakdown {
    /// One request in so many is followed; 0: none.
    pub every: u32,
    /// Read commands.
    pub reads: StageTimes,
    /// All other I/O commands.
    pub others: StageTimes,
}

/// What the followed requests of one kind took.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes {
    /// Requests followed to their end since the target's start.
    pub requests: u64,
    /// Their stages, in the order in which a request goes through them.
    pub stages: Vec<StageTime>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// `receive`, `decrypt`, `parse`, `data`, `queue`, `backend`, `respond`, `encrypt` or `send`.
    pub stage: String,
    /// Nanoseconds that all those requests spent in it.
    pub total_ns: u64,
}

/// Which requests to follow from now on. Not kept over a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetSampling {
    /// One in so many; 0: none.
    pub every: u32,
}
