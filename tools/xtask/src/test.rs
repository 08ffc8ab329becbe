//! `cargo xtask test`: everything that has to hold, on a machine that may lack the tools for it.

use anyhow::Result;

use crate::report::{Outcome, Report};
use crate::{bench, check, exec, fuzz, install, lab, workspace};

pub(crate) fn task(no_lab: bool) -> Result<bool> {
    println!(
        "Checks, tests{} of the workspace; tools that are missing are installed first.",
        if no_lab { "" } else { " and guest lab" }
    );
    let mut report = Report::default();
    report.step("tools", || {
        // The last two are what TLS is tested against.
        install::debian_packages(&[
            ("git", "git"),
            ("cc", "gcc"),
            ("openssl", "openssl"),
            ("gnutls-cli", "gnutls-bin"),
        ])?;
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
    report.step("block devices", block_devices);
    report.step("scale", || {
        // One after the other, since they measure.
        let mut scale = workspace::cargo();
        scale.args(["nextest", "run", "--workspace", "--run-ignored", "only", "--no-capture"]);
        exec::run(scale.args(["-E", "test(/(^|::)scale(_tls)?::/)"]))?;
        Ok(Outcome::Passed)
    });
    report.step("documentation tests", || {
        exec::run(workspace::cargo().args(["test", "--workspace", "--doc", "--quiet"]))?;
        Ok(Outcome::Passed)
    });
    report.step("fuzz smoke", fuzz::smoke);
    report.step("junk smoke", || {
        let mut smoke = workspace::cargo();
        smoke.env("PENSTOCK_SMOKE_SECONDS", "60");
        smoke.args(["nextest", "run", "--workspace", "--no-capture"]);
        exec::run(smoke.args(["-E", "package(it) & test(junk::)"]))?;
        Ok(Outcome::Passed)
    });
    let is_built = report.step("release build", || {
        bench::build()?;
        Ok(Outcome::Passed)
    });
    report.step("bench target", || {
        if !is_built {
            return Ok(Outcome::Skipped("the release build failed".to_owned()));
        }
        // A guard with room for a noisy machine, on which the 99th percentile is the first to go, and for
        // processors whose cipher is a third as fast; the goals are what `cargo xtask bench target` checks.
        let args = ["--rounds", "3", "--millis", "200", "--at-least", "0.3"].map(str::to_owned);
        bench::run(bench::Comparison::Target, &args)?;
        Ok(Outcome::Passed)
    });
    if no_lab {
        report.skip("lab", "left out by --no-lab");
    } else {
        lab::add_steps(&mut report, is_built);
    }
    Ok(report.finish())
}

/// Tests on a loop device, which only root on a kernel that has them can make.
fn block_devices() -> Result<Outcome> {
    if !install::is_root() {
        return Ok(Outcome::Skipped("loop devices need root".to_owned()));
    }
    let probe = std::process::Command::new("losetup").arg("--find").output();
    match probe {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            return Ok(Outcome::Skipped(format!("no loop device: {}", why.trim())));
        }
        Err(e) => return Ok(Outcome::Skipped(format!("no losetup: {e}"))),
    }
    let mut tests = workspace::cargo();
    // The whole workspace, so that nothing is built again for another set of features.
    tests.args(["nextest", "run", "--workspace", "--run-ignored", "only"]);
    exec::run(tests.args(["-E", "package(block) & test(device::)"]))?;
    Ok(Outcome::Passed)
}
