//! The steps of a run, their outcomes, and the summary at its end.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It ran and held.
    Passed,
    /// It ran and did not hold, or could not be run though it has to be.
    Failed(String),
    /// It could not run here, for this reason. Never counted as passed.
    Skipped(String),
}

struct Row {
    name: String,
    outcome: Outcome,
    took: Duration,
}

/// Collects the outcome of each step.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Runs one step, prints how it ended and records it. An error is a failure.
    pub(crate) fn step(&mut self, name: &str, run: impl FnOnce() -> Result<Outcome>) -> bool {
        println!("=== {name}");
        let start = Instant::now();
        let outcome = run().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        let took = start.elapsed();
        println!("--- {name}: {} ({:.1} s)", describe(&outcome), took.as_secs_f64());
        let passed = outcome == Outcome::Passed;
        self.rows.push(Row { name: name.to_owned(), outcome, took });
        passed
    }

    /// Records a step that is not run, with the reason.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("=== {name}\n--- {name}: skipped: {reason}");
        let outcome = Outcome::Skipped(reason.to_owned());
        self.rows.push(Row { name: name.to_owned(), outcome, took: Duration::ZERO });
    }

    /// Whether no step failed. Skipped steps do not fail a run, and a run of none does.
    pub(crate) fn is_success(&self) -> bool {
        !self.rows.is_empty() && !self.rows.iter().any(|r| matches!(r.outcome, Outcome::Failed(_)))
    }

    /// Prints the table and the closing line; says whether the run succeeded.
    pub(crate) fn finish(&self) -> bool {
        print!("\n{}", self.summary());
        self.is_success()
    }

    fn summary(&self) -> String {
        let width = self.rows.iter().map(|r| r.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        let (mut passed, mut failed, mut skipped) = (0, 0, 0);
        for row in &self.rows {
            match row.outcome {
                Outcome::Passed => passed += 1,
                Outcome::Failed(_) => failed += 1,
                Outcome::Skipped(_) => skipped += 1,
            }
            let seconds = row.took.as_secs_f64();
            // The rest of a long reason was printed when the step ended.
            let what = describe(&row.outcome);
            let what = what.lines().next().unwrap_or_default();
            let _ = writeln!(text, "{:width$}  {seconds:>7.1} s  {what}", row.name);
        }
        let _ = writeln!(text, "{passed} passed, {failed} failed, {skipped} skipped");
        text
    }
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Passed => "passed".to_owned(),
        Outcome::Failed(why) => format!("FAILED: {why}"),
        Outcome::Skipped(why) => format!("skipped: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_counts_each_kind_once() {
        let mut report = Report::default();
        assert!(report.step("good", || Ok(Outcome::Passed)));
        assert!(!report.step("bad", || anyhow::bail!("broke")));
        report.skip("absent", "no tool");
        assert!(!report.is_success());
        let summary = report.summary();
        assert_eq!(summary.lines().last(), Some("1 passed, 1 failed, 1 skipped"));
        assert!(summary.contains("FAILED: broke"));
        assert!(summary.contains("skipped: no tool"));
    }

    #[test]
    fn a_skipped_step_is_neither_passed_nor_a_failure() {
        let mut report = Report::default();
        report.skip("absent", "no tool");
        assert!(report.is_success());
        assert_eq!(report.summary().lines().last(), Some("0 passed, 0 failed, 1 skipped"));
    }

    #[test]
    fn a_run_without_steps_does_not_succeed() {
        assert!(!Report::default().is_success());
    }
}
