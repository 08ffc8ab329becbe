//! Where the time of a run's requests went at the target, and a target to ask that is made for the
//! run.

use std::fmt;
use std::net::SocketAddr;

use anyhow::Context as _;
use serde::Serialize;

use crate::{Config, Daemon, Draft};

/// One request in so many is followed: often enough for a run of a second at a depth of 1, and seldom
/// enough to cost nothing that can be measured. A prime, so that it is not always the same place of
/// a batch.
pub const SAMPLE_EVERY: u32 = 127;

/// Where the time went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Breakdown {
    /// One request in so many was followed.
    pub every: u32,
    /// Reads, if one was followed.
    pub read: Option<Way>,
    /// All others, if one was followed.
    pub write: Option<Way>,
}

/// The way of one kind of request through the target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Way {
    /// Requests followed.
    pub requests: u64,
    /// Mean time at the target, in microseconds.
    pub total_us: f64,
    /// Stages in order.
    pub stages: Vec<Share>,
}

/// One stage's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Share {
    /// Its name.
    pub stage: String,
    /// Mean time, in microseconds.
    pub mean_us: f64,
    /// Of the time at the target.
    pub percent: f64,
}

impl Breakdown {
    /// What came between two answers of a target that followed one request in `every`.
    pub fn between(every: u32, before: &api::Breakdown, after: &api::Breakdown) -> Breakdown {
        Breakdown {
            every,
            read: way(&before.reads, &after.reads),
            write: way(&before.others, &after.others),
        }
    }
}

fn way(before: &api::StageTimes, after: &api::StageTimes) -> Option<Way> {
    let requests = after.requests.saturating_sub(before.requests);
    if requests == 0 {
        return None;
    }
    let earlier = |stage: &str| {
        before.stages.iter().find(|time| time.stage == stage).map_or(0, |time| time.total_ns)
    };
    let mean = |time: &api::StageTime| {
        time.total_ns.saturating_sub(earlier(&time.stage)) as f64 / 1e3 / requests as f64
    };
    let total_us: f64 = after.stages.iter().map(mean).sum();
    let percent = |us: f64| if total_us > 0.0 { us / total_us * 100.0 } else { 0.0 };
    let stages = after.stages.iter().map(|time| {
        let mean_us = mean(time);
        Share { stage: time.stage.clone(), mean_us, percent: percent(mean_us) }
    });
    Some(Way { requests, total_us, stages: stages.collect() })
}

impl fmt::Display for Breakdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut is_first = true;
        for (name, way) in [("read", &self.read), ("write", &self.write)] {
            let Some(way) = way else { continue };
            if !std::mem::take(&mut is_first) {
                writeln!(f)?;
            }
            writeln!(
                f,
                "at the target, a {name}, mean of {} (1 in {}):",
                way.requests, self.every
            )?;
            for share in &way.stages {
                writeln!(
                    f,
                    "  {:<8} {:>9.2} us {:>5.1} %  {}",
                    share.stage,
                    share.mean_us,
                    share.percent,
                    words(&share.stage)
                )?;
            }
            write!(f, "  {:<8} {:>9.2} us", "all", way.total_us)?;
        }
        if is_first {
            write!(f, "at the target: no request was followed to its end")?;
        }
        Ok(())
    }
}

/// What a stage is, for people.
fn words(stage: &str) -> &'static str {
    match stage {
        "receive" => "taking its bytes off the socket",
        "decrypt" => "opening TLS records",
        "parse" => "commands before it in the same bytes, and its own",
        "data" => "the rest of its data, waiting for the host where it was asked for",
        "queue" => "memory, its turn, room at the volume",
        "backend" => "the volume",
        "respond" => "building the answer",
        "encrypt" => "sealing TLS records",
        "send" => "waiting for the send before, and its own",
        _ => "",
    }
}

/// A target in this process with one volume, for a run that wants to know.
pub struct OwnTarget {
    daemon: Daemon,
    spec: String,
    subnqn: String,
}

impl OwnTarget {
    /// Serves `spec` on a free port of the loopback interface, on one core. Must be called inside a
    /// tokio runtime.
    pub fn start(spec: &str) -> anyhow::Result<OwnTarget> {
        let mut draft = Draft::new();
        draft.add_volume(&format!("bench={spec}"))?;
        draft.set_listen(&["127.0.0.1:0".to_owned()]);
        draft.set_target_cores("1");
        let config: Config = draft.check()?;
        let daemon = Daemon::start(config)?;
        let subsystem = daemon.subsystem().context("a target has a subsystem")?;
        Ok(OwnTarget { spec: spec.to_owned(), subnqn: subsystem.nqn.to_string(), daemon })
    }

    /// Where it listens.
    pub fn address(&self) -> anyhow::Result<SocketAddr> {
        self.daemon.io_addresses().first().copied().context("a target has a listener")
    }

    /// What its volume is.
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// Its subsystem; the volume is namespace 1.
    pub fn subnqn(&self) -> &str {
        &self.subnqn
    }

    /// Follows one request in `every`; 0: none.
    pub fn set_sampling(&self, every: u32) {
        self.daemon.set_sampling(every);
    }

    /// What was found so far.
    pub fn breakdown(&self) -> api::Breakdown {
        self.daemon.breakdown()
    }

    /// Ends it. Blocks.
    pub fn stop(self) -> anyhow::Result<()> {
        self.daemon.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(requests: u64, ns: [u64; 2]) -> api::StageTimes {
        let stages = ["receive", "send"].into_iter().zip(ns);
        let stages =
            stages.map(|(stage, total_ns)| api::StageTime { stage: stage.to_owned(), total_ns });
        api::StageTimes { requests, stages: stages.collect() }
    }

    #[test]
    fn what_was_before_the_run_does_not_count() {
        let of = |reads| api::Breakdown { reads, ..api::Breakdown::default() };
        let (before, after) = (of(times(10, [1_000, 1_000])), of(times(30, [41_000, 121_000])));
        let found = Breakdown::between(7, &before, &after);
        assert_eq!((found.every, &found.write), (7, &None));
        let way = found.read.clone().unwrap();
        assert_eq!((way.requests, way.total_us), (20, 8.0));
        assert_eq!((way.stages[0].mean_us, way.stages[0].percent), (2.0, 25.0));
        let text = found.to_string();
        assert!(text.contains("a read, mean of 20 (1 in 7)"), "{text}");
        assert!(text.contains("send          6.00 us  75.0 %"), "{text}");
        assert!(text.ends_with("all           8.00 us"), "{text}");
    }

    #[test]
    fn a_run_without_followed_requests_says_so() {
        let nothing = api::Breakdown::default();
        let found = Breakdown::between(7, &nothing, &nothing);
        assert_eq!(found.to_string(), "at the target: no request was followed to its end");
    }
}
