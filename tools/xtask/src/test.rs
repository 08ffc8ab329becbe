//! `cargo xtask test`: everything that has to hold, on a machine that may lack the tools for it.

use anyhow::Result;

use crate::report::{Outcome, Report};
use crate::{check, exec, fuzz, install, lab, workspace};

pub(crate) fn task(no_lab: bool) -> Result<bool> {
    println!(
        "Checks, tests{} of the workspace; tools that are missing are installed first.",
        if no_lab { "" } else { " and guest lab" }
    );
    let mut report = Report::default();
    report.step("tools", || {
        install::debian_packages(&[("git", "git"), ("cc", "gcc")])?;
        install::cargo_tool("nextest", "cargo-nextest")?;
        Ok(Outcome::Passed)
    });
    check::add_steps(&mut report);
    report.step("tests", || {
        let profile = if std::env::var_os("CI").is_some() { "ci" } else { "default" };
        let mut tests = workspace::cargo();
        exec::run(tests.args(["nextest", "run", "--workspace", "--profile", profile]))?;
        Ok(Outcome::Passed)
    });
    report.step("documentation tests", || {
        exec::run(workspace::cargo().args(["test", "--workspace", "--doc", "--quiet"]))?;
        Ok(Outcome::Passed)
    });
    report.step("fuzz smoke", fuzz::smoke);
    let is_built = report.step("release build", || {
        exec::run(workspace::cargo().args(["build", "--release", "-p", "penstock"]))?;
        Ok(Outcome::Passed)
    });
    if no_lab {
        report.skip("lab", "left out by --no-lab");
    } else {
        lab::add_steps(&mut report, is_built);
    }
    Ok(report.finish())
}
