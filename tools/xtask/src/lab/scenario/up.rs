//! `penstock up`: it proves itself, the lines it prints work as they are, it ends in order on
//! Ctrl-C, and the next start finds the data.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::super::Scene;
use super::super::guest::{Job, json};
use super::super::service::{Service, free_ports};
use super::super::tree::Kernel;
use super::fio_result;
use crate::exec;
use crate::report::Outcome;

const READY_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(20);

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    let [port, discovery_port] = free_ports()?;
    let start = |name: &str, data: &Path| {
        let mut command = scene.penstock();
        command.arg("up").arg("--data").arg(data).args(["--size", "128M"]);
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        command.args(["--discovery", &format!("127.0.0.1:{discovery_port}")]);
        Service::start(
            &format!("penstock up ({name})"),
            &command,
            &scene.path(&format!("{name}.log")),
        )
    };
    let data = scene.socket("data");

    let mut first = start("first", &data)?;
    first.wait_until("word that it runs", READY_LIMIT, |up| up.text().contains("Ctrl-C"))?;
    let text = first.text();
    ensure!(text.contains("every byte right"), "the first start did not prove itself:\n{text}");
    let lines = joined(&text);
    let hosts = host_lines(&lines)?;
    let nqn = hosts.iter().find_map(|(verb, line)| (*verb == "connect").then_some(line));
    let nqn = nqn.and_then(|line| line.split_whitespace().last()).context("no NQN")?;

    // A second one in its way is told so, and the first goes on.
    let mut second = start("in-the-way", &scene.socket("other-data"))?;
    let status = second.wait(STOP_LIMIT)?;
    ensure!(!status.success(), "two can listen on the same port");
    let refusal = second.text();
    ensure!(refusal.contains(&port.to_string()), "the refusal does not name {port}: {refusal}");
    first.must_run()?;

    let rows: String = hosts.iter().map(|(verb, line)| format!("{verb} {line}\n")).collect();
    let ports = [port, discovery_port].map(|port| port.to_string());
    let job =
        Job::new("up-lines.sh").network().args(&[&ports[0], &ports[1], nqn]).file("lines", rows);
    let results = scene.boot("host", Kernel::Backports, &job)?.finish()?;
    let sums = results.text("files.sha256")?;

    first.interrupt()?;
    let status = first.wait(STOP_LIMIT)?;
    ensure!(status.success(), "Ctrl-C ended it with {status}:\n{}", first.text());

    let mut again = start("again", &data)?;
    again.wait_until("word that it runs", READY_LIMIT, |up| up.text().contains("Ctrl-C"))?;
    let text = again.text();
    ensure!(text.contains("every byte right"), "the second start did not prove itself:\n{text}");
    ensure!(text.contains("found again"), "the second start did not find its pattern:\n{text}");
    let lines = joined(&text);
    // One machine sees the volume by both, one after the other.
    let machine = qemu_line(&lines, "vhost-user-blk-pci")?;
    let nvme = qemu_line(&lines, "vfio-user-pci")?;
    let controller = nvme.iter().skip_while(|word| *word != "-device").cloned();
    let job = Job::new("check-disk.sh")
        .args(&["/dev/vda", "/dev/nvme0n1"])
        .machine(machine)
        .devices(controller)
        .file("files.sha256", sums);
    scene.boot("machine", Kernel::Stable, &job)?.finish()?;
    let native = native_fio(scene, &lines)?;
    again.interrupt()?;
    let status = again.wait(STOP_LIMIT)?;
    ensure!(status.success(), "Ctrl-C ended it with {status}:\n{}", again.text());
    Ok(native)
}

/// Lines of the output, those that end with a backslash joined with the next.
fn joined(text: &str) -> Vec<String> {
    let text = text.replace("\\\n", " ");
    text.lines().map(|line| line.trim().to_owned()).collect()
}

/// What a Linux host is told to run, each with a word that says what it is.
fn host_lines(lines: &[String]) -> Result<Vec<(&'static str, String)>> {
    let wanted = [
        ("modprobe", "modprobe "),
        ("discover", "nvme discover "),
        ("connect-all", "nvme connect-all "),
        ("connect", "nvme connect "),
        ("list", "nvme list"),
        ("disconnect", "nvme disconnect "),
        ("fio", "fio --name=host "),
    ];
    wanted
        .iter()
        .map(|(verb, start)| {
            let line = lines.iter().find(|line| line.starts_with(start));
            let line = line.with_context(|| format!("no line starts with {start:?}: {lines:?}"))?;
            // The line's own time is for a person to watch.
            let more = if *verb == "fio" { " --runtime=1 --eta=never" } else { "" };
            Ok((*verb, format!("{line}{more}")))
        })
        .collect()
}

/// The words of the QEMU line with that kind of device, with the one change that there is no KVM
/// here.
fn qemu_line(lines: &[String], device: &str) -> Result<Vec<String>> {
    let program = "qemu-system-x86_64 ";
    let mut machines = lines.iter().filter_map(|line| line.strip_prefix(program));
    let line = machines.find(|line| line.contains(device));
    let words = words(line.with_context(|| format!("no QEMU line with {device}: {lines:?}"))?)?;
    Ok(words
        .iter()
        .filter(|word| *word != "...")
        .map(|word| word.replace("accel=kvm", "accel=tcg"))
        .collect())
}

/// Runs the line for libblkio with the fio that has it.
fn native_fio(scene: &Scene<'_>, lines: &[String]) -> Result<Outcome> {
    let line = lines
        .iter()
        .find_map(|line| line.strip_prefix("fio ").filter(|line| line.contains("=libblkio ")))
        .context("no fio line for libblkio")?;
    let mut fio = match scene.tree().fio_blkio() {
        Ok(fio) => fio,
        Err(why) => {
            return Ok(Outcome::Skipped(format!("all but the libblkio line passed: {why}")));
        }
    };
    let out = scene.path("native.json");
    fio.args(["--output-format=json", "--output"]).arg(&out).args(words(line)?).arg("--runtime=1");
    exec::run(fio.current_dir(&scene.folder))?;
    fio_result(&json(&std::fs::read_to_string(&out)?)?, "the libblkio line")?;
    Ok(Outcome::Passed)
}

/// Splits a line as a shell does.
fn words(line: &str) -> Result<Vec<String>> {
    if line.contains(['`', '$', ';', '|', '&', '<', '>']) {
        bail!("not a plain command line: {line}");
    }
    let script = format!("for word in {line}; do printf '%s\\n' \"$word\"; done");
    let text = exec::output(Command::new("sh").args(["-c", &script]))?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "x\n  qemu-system-x86_64 -machine q35,accel=kvm -m 2G \\\n    \
        -chardev 'socket,id=a,path=/x y' \\\n    -device vhost-user-blk-pci,chardev=a ...\n";

    #[test]
    fn the_qemu_line_is_taken_as_a_shell_would_take_it() {
        let words = qemu_line(&joined(TEXT), "vhost-user-blk-pci").unwrap();
        let expected =
            ["-machine", "q35,accel=tcg", "-m", "2G", "-chardev", "socket,id=a,path=/x y"];
        assert_eq!(words[..6], expected);
        assert_eq!(words.last().unwrap(), "vhost-user-blk-pci,chardev=a");
    }

    #[test]
    fn a_missing_line_is_named() {
        let error = host_lines(&joined("  modprobe nvme-tcp\n")).unwrap_err();
        assert!(error.to_string().contains("nvme discover"), "{error}");
        assert!(qemu_line(&joined(TEXT), "vfio-user-pci").is_err());
    }

    #[test]
    fn only_plain_lines_are_split() {
        assert_eq!(words("a 'b c'").unwrap(), ["a", "b c"]);
        assert!(words("a; b").is_err());
    }
}
