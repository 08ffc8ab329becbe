//! `cargo xtask check`: what can be said of the sources without running them.

mod edges;
mod house;
mod support;

use anyhow::{Result, bail};

use crate::report::{Outcome, Report};
use crate::{exec, install, workspace};

pub(crate) fn task() -> Result<bool> {
    let mut report = Report::default();
    add_steps(&mut report);
    Ok(report.finish())
}

/// Runs every check as a step of its own, cheapest first.
pub(crate) fn add_steps(report: &mut Report) {
    report.step("format", || {
        install::rust_component("rustfmt")?;
        exec::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;
        Ok(Outcome::Passed)
    });
    report.step("dependency direction", || refuse(&edges::violations(&workspace::metadata()?)));
    report.step("house rules", || refuse(&house::violations(&workspace::root()?)?));
    report.step("table of support", || refuse(&support::violations(&workspace::root()?)?));
    report.step("lints", || {
        install::rust_component("clippy")?;
        let mut clippy = workspace::cargo();
        clippy.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
        exec::run(&mut clippy)?;
        Ok(Outcome::Passed)
    });
    report.step("documentation", || {
        let mut doc = workspace::cargo();
        doc.args(["doc", "--workspace", "--no-deps"]);
        exec::run(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
        Ok(Outcome::Passed)
    });
}

fn refuse(violations: &[String]) -> Result<Outcome> {
    for violation in violations {
        eprintln!("{violation}");
    }
    match violations {
        [] => Ok(Outcome::Passed),
        [first, ..] => bail!("{} found, the first: {first}", violations.len()),
    }
}
