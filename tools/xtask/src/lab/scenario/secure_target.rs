//! Our initiator with TLS and in-band authentication against the Linux kernel's target, which is in the
//! guest with its handshake agent: as `penstock bench`, and under emulated disks that fio drives.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::super::Scene;
use super::super::guest::Job;
use super::super::service::{Service, free_ports};
use super::super::tree::Kernel;
use super::{READY_LIMIT, fio_result, manage};
use crate::exec;
use crate::report::Outcome;

const NQN: &str = "nqn.2026-11.example.lab:kernel";
/// The 32 bytes 00h to 1fh; the two formats share them.
const KEY: &str = "01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
/// As many of another value.
const OTHER: &str = "00:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwfLJNij:";

pub(super) fn stable(scene: &Scene<'_>) -> Result<Outcome> {
    run(scene, Kernel::Stable)
}

pub(super) fn backports(scene: &Scene<'_>) -> Result<Outcome> {
    run(scene, Kernel::Backports)
}

fn host(n: u32) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{n:012}")
}

/// A file that nobody else can read.
fn private(scene: &Scene<'_>, name: &str, text: &str) -> Result<PathBuf> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    let path = scene.path(name);
    let mut options = std::fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&path)?.write_all(text.as_bytes())?;
    Ok(path)
}

/// Load that checks what it reads.
fn bench(
    scene: &Scene<'_>,
    port: u16,
    subnqn: &str,
    host: &str,
    more: &[(&str, &Path)],
) -> Command {
    let mut command = scene.penstock();
    command.args(["bench", "--connect", &format!("127.0.0.1:{port}"), "--subnqn", subnqn]);
    command.args(["--nsid", "1", "--hostnqn", host, "--rw", "randrw", "--verify", "--json"]);
    command.args(["--size", "8MiB", "--bs", "16KiB", "--iodepth", "8", "--runtime", "5"]);
    for (flag, path) in more {
        command.arg(flag).arg(path);
    }
    command
}

/// What the command says when it has to fail.
fn refusal(mut command: Command) -> Result<String> {
    let output = command.output().context("starting penstock bench")?;
    if output.status.success() {
        bail!("a host without the right key was served");
    }
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn run(scene: &Scene<'_>, kernel: Kernel) -> Result<Outcome> {
    let [tls_port, auth_port] = free_ports()?;
    let (tls, dhchap, other) =
        (format!("NVMeTLSkey-1:{KEY}"), format!("DHHC-1:{KEY}"), format!("DHHC-1:{OTHER}"));
    let args = [NQN, &host(1), &host(2), &host(3), &tls, &dhchap, &other];
    let mut job =
        Job::new("secure-target.sh").args(&args).forward(tls_port, 4420).forward(auth_port, 4421);
    job.limit = Duration::from_secs(600);
    let mut guest = scene.boot("guest", kernel, &job)?;
    guest.wait_until("the kernel's target", |console| {
        manage::last_line(console, "serving: ").is_some()
    })?;

    let psk = private(scene, "psk", &tls)?;
    let secret = private(scene, "secret", &dhchap)?;
    let controller = private(scene, "controller", &other)?;
    for version in ["v0", "v1"] {
        let subnqn = format!("{NQN}:{version}");
        let mut command = bench(scene, tls_port, &subnqn, &host(1), &[("--psk", &psk)]);
        exec::output(&mut command).with_context(|| format!("TLS with a key of {version}"))?;
    }
    let auth = format!("{NQN}:auth");
    let one_way = bench(scene, auth_port, &auth, &host(2), &[("--dhchap", &secret)]);
    let both = [("--dhchap", &*secret), ("--dhchap-ctrl", &*controller)];
    let mutual = bench(scene, auth_port, &auth, &host(3), &both);
    for (name, mut command) in [("one-way", one_way), ("mutual", mutual)] {
        exec::output(&mut command).with_context(|| format!("{name} DH-HMAC-CHAP"))?;
    }

    let wrong = private(scene, "wrong", &format!("NVMeTLSkey-1:{OTHER}"))?;
    let said =
        refusal(bench(scene, tls_port, &format!("{NQN}:v0"), &host(1), &[("--psk", &wrong)]))?;
    ensure!(said.contains("TLS: ") && said.contains("penstock key import"), "wrong key: {said}");
    let swapped = [("--dhchap", &*secret), ("--dhchap-ctrl", &*secret)];
    let said = refusal(bench(scene, auth_port, &auth, &host(3), &swapped))?;
    ensure!(said.contains("DH-HMAC-CHAP: "), "a controller with another secret: {said}");
    let disks = [
        Disk { name: "v0", port: tls_port, host: host(1), keys: vec![("psk", &*psk)] },
        Disk { name: "v1", port: tls_port, host: host(1), keys: vec![("psk", &*psk)] },
        Disk {
            name: "auth",
            port: auth_port,
            host: host(3),
            keys: vec![("dhchap", &*secret), ("dhchap_ctrl", &*controller)],
        },
    ];
    let outcome = emulated(scene, &disks)?;
    guest.kill()?;
    Ok(outcome)
}

/// A disk of the emulator on a subsystem of the guest's.
struct Disk<'a> {
    /// Of the subsystem.
    name: &'static str,
    port: u16,
    host: String,
    keys: Vec<(&'static str, &'a Path)>,
}

/// A contained emulator with these disks; fio writes on each, around the page cache, and reads back.
fn emulated(scene: &Scene<'_>, disks: &[Disk<'_>]) -> Result<Outcome> {
    if let Err(why) = scene.tree().fio_blkio() {
        return Ok(Outcome::Skipped(format!("the emulated disks: {why}")));
    }
    let mut command = scene.penstock();
    command.args(["emulate", "--cores", "1", "--containment", "on"]);
    let mut sockets = Vec::new();
    for Disk { name, port, host, keys } in disks {
        let socket = scene.socket(&format!("{name}.sock"));
        let mut device = format!(
            "{name}=virtio-blk,socket={},connect=127.0.0.1:{port},subnqn={NQN}:{name},nsid=1,\
             hostnqn={host}",
            socket.display()
        );
        for (key, path) in keys {
            device += &format!(",{key}={}", path.display());
        }
        if !keys.iter().any(|(key, _)| *key == "psk") {
            device += ",tls=off";
        }
        command.arg("--device").arg(device);
        sockets.push(socket);
    }
    let mut emulator = Service::start("penstock emulate", &command, &scene.path("emulate.log"))?;
    emulator.wait_until("disks of the kernel's target", READY_LIMIT, |emulator| {
        emulator.text().matches("device ready").count() == disks.len()
    })?;
    for (Disk { name, .. }, socket) in disks.iter().zip(&sockets) {
        let out = scene.path(&format!("fio-{name}.json"));
        let mut fio = scene.tree().fio_blkio().map_err(anyhow::Error::msg)?;
        fio.args(["--eta=never", "--output-format=json", "--output"]).arg(&out);
        fio.args(["--ioengine=libblkio", "--libblkio_driver=virtio-blk-vhost-user", "--thread=1"]);
        fio.arg(format!("--libblkio_path={}", socket.display())).arg(format!("--name={name}"));
        fio.args(["--rw=randrw", "--bsrange=512-64k", "--size=4m", "--iodepth=8"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]);
        fio.args(["--verify_state_save=0", "--randrepeat=0"]);
        exec::run(&mut fio).with_context(|| format!("fio on disk {name}"))?;
        let results = serde_json::from_str(&std::fs::read_to_string(&out)?)?;
        let (read, written) = fio_result(&results, name)?;
        ensure!(read > 0 && written > 0, "{name}: {written} bytes written, {read} read back");
    }
    emulator.must_run()?;
    Ok(Outcome::Passed)
}
