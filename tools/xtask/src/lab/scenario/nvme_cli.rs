//! Every command of nvme-cli that asks a target something, each answer checked.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::super::Scene;
use super::super::guest::{Job, Results, json};
use super::super::tree::Kernel;
use super::manage::resize;
use super::{HOST_ADDRESS, SUBNQN, Target, file_volume};
use crate::report::Outcome;

const SIZE_MIB: u64 = 64;
/// What the script reads and writes between two looks at the SMART log: I/Os, and units of 512,000
/// bytes.
const COUNTED_IOS: u64 = 250;
const COUNTED_UNITS: u64 = 2;

/// Feature identifiers and what Get Features has to say of each, whatever SEL is.
const FEATURES: &[u8] = &[0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x0a, 0x0b, 0x0e, 0x0f, 0x16, 0x84];
const NO_FEATURES: &[u8] = &[
    0x08, 0x09, 0x0c, 0x0d, 0x10, 0x11, 0x17, 0x78, 0x79, 0x7a, 0x7b, 0x7c, 0x7d, 0x7e, 0x7f, 0x80,
];

// Status codes with their type, as nvme-cli prints them: all say Do Not Retry.
const INVALID_OPCODE: u16 = 0x4001;
const INVALID_FIELD: u16 = 0x4002;
const OUT_OF_RANGE: u16 = 0x4080;
const CONFLICT: u16 = 0x4083;
const INVALID_LOG_PAGE: u16 = 0x4109;
const COMPARE_FAILURE: u16 = 0x4285;
/// A second path might do better, so this one says nothing on retries.
const UNRECOVERED_READ: u16 = 0x281;

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    let (volume, image) = file_volume(scene, "disk", SIZE_MIB);
    let target = Target::new(scene, &[volume, "spare=ram:16M,block=4096".to_owned()])?;
    let mut service = target.start(scene)?;
    let ports = [target.port, target.discovery_port].map(|port| port.to_string());
    let job = Job::new("nvme-cli.sh").network().args(&[HOST_ADDRESS, &ports[0], &ports[1], SUBNQN]);
    let mut guest = scene.boot("guest", Kernel::Backports, &job)?;
    guest.wait_until("wish for a media error", |c| c.contains("--- media error"))?;
    resize(&image, SIZE_MIB / 2)?;
    guest.wait_until("media error", |c| c.contains("--- media is whole"))?;
    resize(&image, SIZE_MIB)?;
    let results = guest.finish()?;
    service.must_run()?;
    std::fs::remove_file(image)?;
    let said = Said::new(&results)?;
    identify(&said)?;
    logs(&said)?;
    features(&said)?;
    blocks(&said)?;
    reservations(&said)?;
    controller(&said, &target)?;
    said.all_asked()?;
    Ok(Outcome::Passed)
}

/// What nvme-cli said, by the name that the script gave to each command.
struct Said<'a> {
    results: &'a Results,
    rows: BTreeMap<String, i32>,
    asked: std::cell::RefCell<std::collections::BTreeSet<String>>,
}

impl Said<'_> {
    fn new(results: &Results) -> Result<Said<'_>> {
        let rows = results.text("commands")?;
        let rows = rows.lines().map(|line| {
            let (name, code) = line.split_once(' ').context("not a row of commands")?;
            Ok((name.to_owned(), code.trim().parse()?))
        });
        Ok(Said { results, rows: rows.collect::<Result<_>>()?, asked: Default::default() })
    }

    fn text(&self, name: &str) -> Result<(i32, String)> {
        let code = *self.rows.get(name).with_context(|| format!("the guest did not do {name}"))?;
        self.asked.borrow_mut().insert(name.to_owned());
        Ok((code, self.results.text(&format!("{name}.txt"))?))
    }

    /// The output of a command that has to succeed.
    fn done(&self, name: &str) -> Result<String> {
        match self.text(name)? {
            (0, text) => Ok(text),
            (code, text) => bail!("{name} ended with {code}: {}", text.trim()),
        }
    }

    fn json(&self, name: &str) -> Result<Value> {
        let text = self.done(name)?;
        json(&text).with_context(|| format!("{name} is not JSON: {text}"))
    }

    /// The command has to end with this status.
    fn refused(&self, name: &str, status: u16) -> Result<()> {
        let (code, text) = self.text(name)?;
        ensure!(code != 0, "{name} was not refused: {}", text.trim());
        let forms = [format!("(0x{status:x})"), format!("status: {status}\"")];
        ensure!(
            forms.iter().any(|form| text.contains(form)),
            "{name}: not status {status:#x}: {}",
            text.trim()
        );
        Ok(())
    }

    /// Every output was looked at.
    fn all_asked(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let left: Vec<&String> = self.rows.keys().filter(|name| !asked.contains(*name)).collect();
        ensure!(left.is_empty(), "nobody looked at {left:?}");
        Ok(())
    }
}

/// A number of a JSON answer.
fn number(value: &Value, key: &str) -> Result<u64> {
    value[key].as_u64().with_context(|| format!("no number {key} in {value}"))
}

fn is(value: &Value, key: &str, want: u64) -> Result<()> {
    let found = number(value, key)?;
    ensure!(found == want, "{key} is {found}, not {want}");
    Ok(())
}

fn identify(said: &Said<'_>) -> Result<()> {
    let ctrl = said.json("id-ctrl")?;
    ensure!(ctrl["subnqn"] == SUBNQN, "subnqn {}", ctrl["subnqn"]);
    let ctrl_id = number(&ctrl, "cntlid")?;
    is(&ctrl, "cntrltype", 1)?;
    ensure!(number(&ctrl, "kas")? > 0 && number(&ctrl, "maxcmd")? > 0, "kas or maxcmd");
    ensure!(number(&ctrl, "mnan")? <= number(&ctrl, "nn")?, "mnan above nn");
    // Compare, write zeroes, deallocate, verify and copy are done below.
    let oncs = number(&ctrl, "oncs")?;
    for (bit, name) in [(0, "compare"), (2, "dsm"), (3, "write zeroes"), (7, "verify"), (8, "copy")]
    {
        ensure!(oncs & 1 << bit != 0, "ONCS does not say {name}: {oncs:#x}");
    }
    ensure!(oncs & 1 << 1 == 0, "ONCS says write uncorrectable: {oncs:#x}");

    let ns = said.json("id-ns")?;
    for key in ["nsze", "ncap"] {
        is(&ns, key, SIZE_MIB * 2048)?;
    }
    ensure!(number(&ns, "nuse")? <= SIZE_MIB * 2048, "nuse");
    is(&ns["lbafs"][0], "ds", 9)?;
    let second = said.json("id-ns-2")?;
    is(&second, "nsze", 16 * 256)?;
    is(&second["lbafs"][0], "ds", 12)?;
    // A namespace that is not there is all zeros.
    let none = said.done("id-ns-none")?;
    ensure!(none.lines().any(|line| line.split_whitespace().eq(["nsze", ":", "0"])), "{none}");
    let descs = said.json("ns-descs")?;
    let descs = descs["ns-descs"].as_array().context("no descriptors")?;
    let uuid = descs.iter().find_map(|desc| desc["uuid"].as_str()).context("no UUID")?;
    ensure!(ns["nguid"] == uuid.replace('-', ""), "NGUID {} and UUID {uuid}", ns["nguid"]);
    ensure!(descs.iter().any(|desc| desc["Type"] == "csi" && desc["csi"] == "0"), "no CSI");
    for name in ["list-ns", "list-ns-all"] {
        let list = said.json(name)?;
        let list = list["nsid_list"].as_array().context("no list")?;
        ensure!(list.iter().map(|ns| ns["nsid"].as_u64()).eq([Some(1), Some(2)]), "{list:?}");
    }
    for name in ["list-ctrl", "list-ctrl-ns"] {
        let list = said.json(name)?;
        is(&list, "num_ctrl", 1)?;
        is(&list["ctrl_list"][0], "ctrl_id", ctrl_id)?;
    }
    is(&said.json("list-endgrp")?, "num_endgrp_id", 1)?;
    ensure!(number(&said.json("nvm-id-ctrl")?, "wzsl")? > 0, "wzsl");
    is(&said.json("nvm-id-ns")?, "pic", 0)?;
    let independent = said.json("cmdset-ind-id-ns")?;
    is(&independent, "anagrpid", number(&ns, "anagrpid")?)?;
    is(&independent, "nmic", number(&ns, "nmic")?)?;
    is(&independent, "nstat", 1)
}

fn logs(said: &Said<'_>) -> Result<()> {
    ensure!(said.done("fw-log")?.contains("\"Active Firmware Slot (afi)\":1"), "fw-log");
    let effects = said.done("effects-log")?;
    for name in
        ["Get Log Page", "Keep Alive", "Flush", "Write", "Read", "Compare", "Copy", "Verify"]
    {
        ensure!(effects.contains(&format!("({name})")), "{name} is not in {effects}");
    }
    let ana = said.json("ana-log")?;
    is(&ana, "ngrps", 1)?;
    let group = &ana["ANA DESC LIST "][0];
    ensure!(group["state"] == "optimized", "ana-log: {group}");
    is(group, "nnsids", 2)?;
    ensure!(said.json("changed-ns-list-log")?["nvme0"] == serde_json::json!({}), "changed ns");
    let pages = said.done("supported-log-pages")?;
    for page in ["0x0", "0x1", "0x2", "0x3", "0x4", "0x5", "0x9", "0xc", "0x12", "0x80"] {
        ensure!(pages.contains(&format!("\"lid_{page} \"")), "log page {page} is not in {pages}");
    }
    for page in ["0x6", "0xd"] {
        ensure!(!pages.contains(&format!("\"lid_{page} \"")), "log page {page} is in {pages}");
    }
    for name in ["self-test-log", "persistent-event-log"] {
        said.refused(name, INVALID_LOG_PAGE)?;
    }
    ensure!(said.done("endurance-log")?.contains("avl_spare"), "endurance-log");
    ensure!(said.done("resv-notif-log")?.contains("Empty Log Page"), "resv-notif-log");
    let effects = said.json("fid-support-effects-log")?;
    for fid in FEATURES {
        let key = format!("fid_{fid}");
        let has = effects["fid_support"].as_array().context("no features")?;
        let bits = has.iter().find_map(|one| one[&key].as_u64());
        ensure!(bits.is_some_and(|bits| bits & 1 == 1), "{key} is not supported: {effects}");
    }
    ensure!(entries(said, "error-log")?.is_empty(), "errors before there was any");

    let (before, after) = (said.json("smart-before")?, said.json("smart-after")?);
    for (key, by) in [
        ("host_read_commands", COUNTED_IOS),
        ("host_write_commands", COUNTED_IOS),
        ("data_units_read", COUNTED_UNITS),
        ("data_units_written", COUNTED_UNITS),
        ("media_errors", 0),
        ("num_err_log_entries", 0),
        ("critical_warning", 0),
    ] {
        let (was, now) = (number(&before, key)?, number(&after, key)?);
        ensure!(now == was + by, "smart-log: {key} went from {was} to {now}, not by {by}");
    }
    Ok(())
}

/// Entries of the error log that are in use.
fn entries(said: &Said<'_>, name: &str) -> Result<Vec<Value>> {
    let log = said.json(name)?;
    let all = log["errors"].as_array().context("no errors")?;
    Ok(all.iter().filter(|entry| entry["error_count"] != 0).cloned().collect())
}

fn features(said: &Said<'_>) -> Result<()> {
    let current = |fid: u8, want: u32| {
        let name = format!("feature-{fid:02x}-0");
        let text = said.done(&name)?.to_lowercase();
        let forms = [format!("\"0x{want:08x}\""), format!("\"{want:08x}\"")];
        ensure!(forms.iter().any(|form| text.contains(form)), "{name} is not {want:#x}: {text}");
        Ok(())
    };
    for fid in FEATURES {
        for select in 0..4 {
            said.done(&format!("feature-{fid:02x}-{select}"))?;
        }
    }
    for fid in NO_FEATURES {
        for select in 0..4 {
            said.refused(&format!("feature-{fid:02x}-{select}"), INVALID_FIELD)?;
        }
    }
    // Temperature threshold, write cache, two I/O queues, events of namespaces and ANA, 30 s.
    for (fid, want) in [(4, 0xffff), (6, 1), (7, 0x1_0001), (0xb, 0x900), (0xf, 30_000)] {
        current(fid, want)?;
    }
    said.done("set-threshold")?;
    ensure!(said.done("feature-04-set")?.contains("0x00000157"), "the threshold was not kept");
    ensure!(said.done("feature-0f-human")?.contains("30000"), "keep alive timeout");
    said.refused("set-unknown", INVALID_FIELD)?;
    // The short form of the host identifier is not for fabrics.
    for select in 0..3 {
        said.refused(&format!("feature-81-{select}"), INVALID_FIELD)?;
    }
    said.done("feature-81-3")?;
    let host = said.done("host-id")?;
    let host: String = host.split_whitespace().collect();
    ensure!(host == "11111111222243338444555555555555", "host identifier {host}");
    let has_reservations = number(&said.json("id-ns")?, "rescap")? != 0;
    for fid in [0x82, 0x83] {
        for select in 0..3 {
            let name = format!("feature-{fid:02x}-{select}");
            if has_reservations {
                said.done(&name)?;
            } else {
                said.refused(&name, INVALID_FIELD)?;
            }
        }
        said.done(&format!("feature-{fid:02x}-3"))?;
    }
    Ok(())
}

fn blocks(said: &Said<'_>) -> Result<()> {
    for name in [
        "write",
        "read",
        "read-same",
        "compare-same",
        "verify",
        "copy",
        "copy-same",
        "write-zeroes",
        "zeroes-same",
        "dsm",
        "flush",
    ] {
        said.done(name)?;
    }
    said.refused("compare-other", COMPARE_FAILURE)?;
    said.refused("verify-far", OUT_OF_RANGE)?;
    said.refused("write-far", OUT_OF_RANGE)?;
    for name in ["write-uncor", "io-unknown", "admin-unknown"] {
        said.refused(name, INVALID_OPCODE)?;
    }
    // The file was cut for a moment: one error for the script, more for those it waited with.
    said.refused("read-media", UNRECOVERED_READ)
        .or_else(|_| said.refused("read-media", 0x4000 | UNRECOVERED_READ))?;
    let block: u64 = said.results.text("media-block")?.trim().parse()?;
    let (media, last) = (said.json("smart-media")?, said.json("smart-last")?);
    is(&media, "media_errors", 1)?;
    is(&last, "media_errors", number(&last, "num_err_log_entries")?)?;
    let entries = entries(said, "error-log-after")?;
    ensure!(entries.len() == 2, "two errors give {} entries", entries.len());
    for (entry, count) in entries.iter().zip([2, 1]) {
        is(entry, "error_count", count)?;
        is(entry, "nsid", 1)?;
        is(entry, "lba", block)?;
        ensure!(number(entry, "status_field")? & 0x7ff == u64::from(UNRECOVERED_READ), "{entry}");
    }
    Ok(())
}

fn reservations(said: &Said<'_>) -> Result<()> {
    said.done("resv-write")?;
    let changes = ["resv-register", "resv-acquire", "resv-release", "resv-unregister"];
    if number(&said.json("id-ns")?, "rescap")? == 0 {
        let others = ["resv-wrong-key", "resv-report", "resv-report-last"];
        return changes.iter().chain(&others).try_for_each(|name| {
            let (code, text) = said.text(name)?;
            ensure!(code != 0 && text.contains("Invalid Command Opcode"), "{name}: {text}");
            Ok(())
        });
    }
    for name in changes {
        said.done(name)?;
    }
    said.refused("resv-wrong-key", CONFLICT)?;
    let report = said.json("resv-report")?;
    is(&report, "regctl", 1)?;
    is(&report, "rtype", 1)?;
    let holder = &report["regctlext"][0];
    is(holder, "rkey", 0x1234)?;
    is(holder, "rcsts", 1)?;
    is(&said.json("resv-report-last")?, "regctl", 0)
}

fn controller(said: &Said<'_>, target: &Target) -> Result<()> {
    let registers = said.done("show-regs")?;
    for line in ["version : 0x20000", "csts    : 0x1"] {
        ensure!(registers.contains(line), "show-regs: no {line}: {registers}");
    }
    for name in ["ns-rescan", "reset", "subsystem-reset", "read-after-resets", "connect-all"] {
        said.done(name)?;
    }
    for name in ["discover", "discover-ctrl"] {
        let log = said.json(name)?;
        let records = log["records"].as_array().context("no records")?;
        let port = target.port.to_string();
        ensure!(
            records.iter().any(|r| r["subnqn"] == SUBNQN && r["trsvcid"] == port.as_str()),
            "{name}: {log}"
        );
    }
    for name in ["disconnect", "disconnect-again"] {
        ensure!(said.done(name)?.contains("disconnected 1 controller"), "{name}");
    }
    Ok(())
}
