//! The job files of `fio-jobs/`, each for a few seconds, on every engine they are made for.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::super::Scene;
use super::super::guest::{Job, json};
use super::super::tree::Kernel;
use super::{HOST_ADDRESS, SUBNQN, Target, emulator, fio_result};
use crate::exec;
use crate::report::Outcome;

const VOLUME_SIZE: &str = "64M";
/// Time for each job; the job files themselves ask for more.
const RUNTIME_S: &str = "2";

pub(super) fn run(scene: &Scene<'_>) -> Result<Outcome> {
    let folder = scene.lab.checkout.join("fio-jobs");
    let jobs = job_files(&folder)?;
    let volumes = ["remote", "disk", "native"].map(|name| format!("{name}=ram:{VOLUME_SIZE}"));
    let target = Target::new(scene, &volumes)?;
    let mut service = target.start(scene)?;

    let socket = scene.socket("disk.sock");
    let mut device = emulator(scene, &socket, &target, 2)?;
    let port = target.port.to_string();
    let mut job = Job::new("fio-jobs.sh")
        .network()
        .args(&[HOST_ADDRESS, &port, SUBNQN, RUNTIME_S])
        .vhost_user_blk(&socket);
    for path in jobs.iter().chain([&folder.join("engine/kernel.fio")]) {
        let name = path.file_name().context("job file without a name")?.to_string_lossy();
        job = job.file(&name, fs::read(path)?);
    }
    let results = scene.boot("guest", Kernel::Backports, &job)?.finish()?;
    let names = results.names(".json")?;
    ensure!(
        names.len() == 2 * jobs.len(),
        "{} results of {} jobs on 2 disks",
        names.len(),
        jobs.len()
    );
    for name in &names {
        fio_result(&results.json(name)?, name)?;
    }
    device.must_run()?;

    if let Err(why) = scene.tree().fio_blkio() {
        return Ok(Outcome::Skipped(format!("the guest's part passed; natively: {why}")));
    }
    let socket = scene.socket("native.sock");
    let mut device = emulator(scene, &socket, &target, 3)?;
    for path in &jobs {
        native(scene, path, &socket)?;
        device.must_run()?;
    }
    service.must_run()?;
    Ok(Outcome::Passed)
}

/// Runs one job on this machine, with fio itself as the disk's driver.
pub(super) fn native(scene: &Scene<'_>, path: &Path, socket: &Path) -> Result<()> {
    let folder = path.parent().context("job file without a folder")?;
    let stem = path.file_stem().context("job file without a name")?.to_string_lossy();
    let out = scene.path(&format!("native-{stem}.json"));
    let mut fio = scene.tree().fio_blkio().map_err(anyhow::Error::msg)?;
    fio.args(["--output-format=json", "--output"]).arg(&out);
    // fio keeps what one file says of all jobs from the next file: the two have to be one.
    let both = scene.path(&format!("native-{stem}.fio"));
    fs::write(&both, [fs::read(folder.join("engine/libblkio.fio"))?, fs::read(path)?].concat())?;
    fio.arg("--eta=never").arg(&both).env("SOCKET", socket).env("RUNTIME", RUNTIME_S);
    fio.current_dir(&scene.folder);
    exec::run(&mut fio)?;
    fio_result(&json(&fs::read_to_string(&out)?)?, &stem)?;
    Ok(())
}

fn job_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "fio") {
            files.push(path);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "{} holds no job files", folder.display());
    Ok(files)
}
