//! One run of the guest: boot, run a script, hand back its status and what it left in `/out`.
//!
//! QEMU emulates the processor (no KVM needed) and boots the kernel directly. The job, which is the
//! first process, the scripts and the arguments, is a second archive behind the image's. The result
//! comes back as a tar archive over a virtio-serial port, the console goes to a file.
//!
//! [`Guest::from_disk`] is the other way: firmware finds what to boot on a disk of ours, and the
//! console is all that is seen of it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::cpio::Archive;
use super::initramfs::Image;
use super::qmp::Qmp;
use super::service::Service;
use super::tree::Tree;
use crate::exec;

const CPUS: u32 = 2;
/// Time for QEMU to listen at its monitor, on a busy machine.
const MONITOR_LIMIT: Duration = Duration::from_secs(30);
const MEMORY: &str = "1G";

/// What a guest is to do.
pub(super) struct Job<'a> {
    /// File name of the script below `tests/lab`.
    pub(super) script: &'a str,
    /// The script's arguments; none may hold white space.
    pub(super) args: Vec<String>,
    /// More files for the guest's `/job`, by name.
    pub(super) files: Vec<(String, Vec<u8>)>,
    /// Whether the guest reaches this machine's 127.0.0.1, as 10.0.2.2.
    pub(super) has_network: bool,
    /// Ports of this machine's 127.0.0.1 that lead to ports of the guest.
    pub(super) forwards: Vec<(u16, u16)>,
    /// More words for the kernel's command line.
    pub(super) kernel_words: &'a str,
    /// QEMU arguments for the machine and its memory, in place of the usual ones.
    pub(super) machine: Option<Vec<String>>,
    /// Processors.
    pub(super) cpus: u32,
    /// QEMU arguments that add devices, or say more of the machine.
    pub(super) devices: Vec<String>,
    /// Whether a reset by the guest starts it again.
    pub(super) is_reset: bool,
    /// The guest is given up after this time.
    pub(super) limit: Duration,
}

impl<'a> Job<'a> {
    pub(super) fn new(script: &'a str) -> Self {
        // Several times what the longest script takes on two busy cores.
        let limit = Duration::from_secs(360);
        let (args, files, devices) = (Vec::new(), Vec::new(), Vec::new());
        let kernel_words = "";
        Self {
            script,
            args,
            files,
            has_network: false,
            forwards: Vec::new(),
            kernel_words,
            machine: None,
            cpus: CPUS,
            devices,
            is_reset: false,
            limit,
        }
    }

    pub(super) fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub(super) fn network(mut self) -> Self {
        self.has_network = true;
        self
    }

    /// Gives the guest a network, and leads a port of this machine to one of it.
    pub(super) fn forward(mut self, here: u16, there: u16) -> Self {
        self.has_network = true;
        self.forwards.push((here, there));
        self
    }

    /// Adds to the kernel's command line.
    pub(super) fn kernel_words(mut self, words: &'a str) -> Self {
        self.kernel_words = words;
        self
    }

    pub(super) fn file(mut self, name: &str, data: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), data.into()));
        self
    }

    /// Machine, memory and disks as somebody else asks for them.
    pub(super) fn machine(mut self, words: Vec<String>) -> Self {
        self.machine = Some(words);
        self
    }

    /// A number of processors of its own.
    pub(super) fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// More QEMU arguments.
    pub(super) fn devices(mut self, words: impl IntoIterator<Item = String>) -> Self {
        self.devices.extend(words);
        self
    }

    /// Adds a disk served by a vhost-user-blk server.
    pub(super) fn vhost_user_blk(self, socket: &Path) -> Self {
        self.vhost_user_blk_with(socket, "")
    }

    /// The same with more options of the device, each after a comma.
    pub(super) fn vhost_user_blk_with(mut self, socket: &Path, more: &str) -> Self {
        let id = format!("vhost{}", self.devices.len());
        self.devices.extend(vhost_user_blk(&id, socket, more));
        self
    }

    /// Adds an NVMe controller served by a vfio-user server.
    pub(super) fn vfio_user(mut self, socket: &Path) -> Self {
        self.devices.extend(vfio_user(socket, None));
        self
    }

    /// A reset by the guest starts it again, from the kernel on, and does not end it.
    pub(super) fn resets(mut self) -> Self {
        self.is_reset = true;
        self
    }
}

/// QEMU arguments for a disk served by a vhost-user-blk server, which may go and come again; `more`
/// are options of the device, each after a comma.
pub(super) fn vhost_user_blk(id: &str, socket: &Path, more: &str) -> [String; 4] {
    [
        "-chardev".to_owned(),
        format!("socket,id={id},path={},reconnect-ms=200", quoted(socket)),
        "-device".to_owned(),
        format!("vhost-user-blk-pci,chardev={id},num-queues={CPUS}{more}"),
    ]
}

/// QEMU arguments for an NVMe controller served by a vfio-user server.
pub(super) fn vfio_user(socket: &Path, bootindex: Option<u32>) -> [String; 2] {
    let mut device = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": socket},
    });
    if let Some(bootindex) = bootindex {
        device["bootindex"] = bootindex.into();
    }
    ["-device".to_owned(), device.to_string()]
}

/// A guest that runs.
pub(super) struct Guest {
    qemu: Service,
    /// The socket of QEMU's monitor, if it has one.
    monitor: Option<PathBuf>,
    folder: PathBuf,
    limit: Duration,
}

impl Guest {
    /// Boots the guest; `folder` receives its console and its results, `scripts` is `tests/lab`,
    /// `monitor` becomes the socket of QEMU's monitor.
    pub(super) fn start(
        tree: &Tree,
        image: &Image,
        scripts: &Path,
        (folder, monitor): (&Path, &Path),
        job: &Job<'_>,
    ) -> Result<Self> {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::create_dir_all(folder)?;
        let initrd = folder.join("initrd");
        fs::copy(&image.archive, &initrd)?;
        append_job(&initrd, scripts, job).context("cannot pack the guest's job")?;

        let mut qemu = machine(tree, folder, job.machine.as_deref(), job.cpus);
        qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", quoted(monitor))]);
        if !job.is_reset {
            qemu.arg("-no-reboot");
        }
        qemu.arg("-kernel").arg(&image.vmlinuz).arg("-initrd").arg(&initrd);
        let words = format!("console=ttyS0 quiet panic=-1 {}", job.kernel_words);
        qemu.args(["-append", words.trim_end()]);
        qemu.args(["-device", "virtio-serial-pci", "-chardev"]);
        qemu.arg(format!("file,id=result,path={}", quoted(&folder.join("result.tar"))));
        qemu.args(["-device", "virtserialport,chardev=result,name=result"]);
        if job.has_network {
            let mut net = "user,id=net0".to_owned();
            for (here, there) in &job.forwards {
                net.push_str(&format!(",hostfwd=tcp:127.0.0.1:{here}-:{there}"));
            }
            qemu.args(["-netdev", &net]);
            qemu.args(["-device", "virtio-net-pci,netdev=net0,romfile="]);
        } else {
            qemu.args(["-nic", "none"]);
        }
        qemu.args(&job.devices);
        let qemu = Service::start("QEMU", &qemu, &folder.join("qemu.log"))?;
        let monitor = Some(monitor.to_owned());
        Ok(Self { qemu, monitor, folder: folder.to_owned(), limit: job.limit })
    }

    /// Starts a machine whose firmware has to find something to boot on the disks in `devices`.
    pub(super) fn from_disk(
        tree: &Tree,
        folder: &Path,
        firmware: Firmware,
        devices: &[String],
        limit: Duration,
    ) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let mut qemu = machine(tree, folder, None, CPUS);
        if firmware == Firmware::Ovmf {
            // The firmware's variables are the machine's own; a new machine knows no boot order.
            let variables = folder.join("variables.fd");
            fs::copy(tree.path("usr/share/OVMF/OVMF_VARS_4M.fd"), &variables)?;
            let code = quoted(&tree.path("usr/share/OVMF/OVMF_CODE_4M.fd"));
            let flash = "if=pflash,format=raw";
            qemu.args(["-drive", &format!("{flash},unit=0,readonly=on,file={code}")]);
            qemu.args(["-drive", &format!("{flash},unit=1,file={}", quoted(&variables))]);
        }
        qemu.args(["-no-reboot", "-nic", "none"]).args(devices);
        let qemu = Service::start("QEMU", &qemu, &folder.join("qemu.log"))?;
        Ok(Self { qemu, monitor: None, folder: folder.to_owned(), limit })
    }

    /// Waits until the machine switches itself off, and returns all that its console showed.
    pub(super) fn off(mut self) -> Result<String> {
        let status = self
            .qemu
            .wait(self.limit)
            .with_context(|| format!("the guest's console ends:\n{}", self.end_of_console()))?;
        if !status.success() {
            bail!("QEMU ended ({status}):\n{}", self.qemu.text().trim());
        }
        Ok(self.console())
    }

    /// What the guest has written to its console so far.
    pub(super) fn console(&self) -> String {
        console(&self.folder)
    }

    /// QEMU's monitor.
    pub(super) fn qmp(&mut self) -> Result<Qmp> {
        let socket = self.monitor.clone().context("this QEMU has no monitor")?;
        self.qemu.wait_until("monitor", MONITOR_LIMIT, |_| socket.exists())?;
        Qmp::connect(&socket)
    }

    /// Waits until the script says `word` on a line of its own.
    pub(super) fn wait_for(&mut self, word: &str) -> Result<()> {
        self.wait_until(word, |console| console.lines().any(|line| line.trim() == word))
    }

    /// Waits until the console satisfies `is_true`.
    pub(super) fn wait_until(
        &mut self,
        what: &str,
        mut is_true: impl FnMut(&str) -> bool,
    ) -> Result<()> {
        let folder = self.folder.clone();
        self.qemu
            .wait_until(what, self.limit, |_| is_true(&console(&folder)))
            .with_context(|| format!("the guest's console ends:\n{}", self.end_of_console()))
    }

    /// Waits for the guest's end and checks that its script succeeded.
    pub(super) fn finish(mut self) -> Result<Results> {
        let status = self
            .qemu
            .wait(self.limit)
            .with_context(|| format!("the guest's console ends:\n{}", self.end_of_console()))?;
        let out = self.folder.join("out");
        fs::create_dir_all(&out)?;
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&out).arg("-xf").arg(self.folder.join("result.tar"));
        let unpacked = exec::output(&mut tar);
        // The image's copy is of no use any more; the logs stay.
        let _ = fs::remove_file(self.folder.join("initrd"));
        let _ = fs::remove_file(self.folder.join("result.tar"));
        let results = Results { folder: out };
        match (unpacked, results.text("exit-status").as_deref().map(str::trim)) {
            (Ok(_), Ok("0")) => Ok(results),
            (Ok(_), Ok(code)) => {
                bail!("the guest's script ended with {code}:\n{}", self.end_of_console())
            }
            _ => bail!(
                "the guest ended early (QEMU: {status}):\n{}\n{}",
                self.qemu.text().trim(),
                self.end_of_console()
            ),
        }
    }

    /// Ends the machine without a word, as a crash of its host's software would.
    pub(super) fn kill(mut self) -> Result<()> {
        self.qemu.kill()
    }

    fn end_of_console(&self) -> String {
        exec::tail(&self.folder.join("console.log"), 20)
    }
}

/// What a machine has in place of a kernel given by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Firmware {
    SeaBios,
    Ovmf,
}

/// QEMU with what every guest has: processors, memory, a console that is a file of `folder`.
fn machine(tree: &Tree, folder: &Path, words: Option<&[String]>, cpus: u32) -> Command {
    let mut qemu = tree.program("usr/bin/qemu-system-x86_64");
    for below in ["usr/share/qemu", "usr/share/seabios"] {
        qemu.arg("-L").arg(tree.path(below));
    }
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    match words {
        Some(words) => qemu.args(words),
        // A server of a device maps the guest's memory, so it has to be shared.
        None => qemu.args([
            "-machine",
            "q35,memory-backend=mem,accel=tcg",
            "-m",
            MEMORY,
            "-object",
            &format!("memory-backend-memfd,id=mem,size={MEMORY},share=on"),
        ]),
    };
    qemu.args(["-cpu", "max,la57=off", "-smp", &cpus.to_string()]);
    qemu.args(["-serial", &format!("file:{}", quoted(&folder.join("console.log")))]);
    qemu
}

fn console(folder: &Path) -> String {
    String::from_utf8_lossy(&fs::read(folder.join("console.log")).unwrap_or_default()).into_owned()
}

/// What a guest left in `/out`.
pub(super) struct Results {
    folder: PathBuf,
}

impl Results {
    /// A text file of the results.
    pub(super) fn text(&self, name: &str) -> Result<String> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("the guest left no {}", path.display()))
    }

    /// A JSON file of the results.
    pub(super) fn json(&self, name: &str) -> Result<serde_json::Value> {
        json(&self.text(name)?).with_context(|| format!("{name} is not JSON"))
    }

    /// Names of the result files that end so, in order.
    pub(super) fn names(&self, end: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(end) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Parses JSON after whatever warnings a program printed before it.
pub(super) fn json(text: &str) -> Result<serde_json::Value> {
    let start = text.find("\n{").map_or(0, |at| at + 1);
    let start = if text.starts_with('{') { 0 } else { start };
    Ok(serde_json::from_str(&text[start..])?)
}

/// A path as a value of a QEMU option, in which a comma separates options.
pub(super) fn quoted(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn append_job(initrd: &Path, scripts: &Path, job: &Job<'_>) -> Result<()> {
    let mut out = File::options().append(true).open(initrd)?;
    let mut archive = Archive::new(Vec::new());
    archive.file("init", 0o755, &fs::read(scripts.join("init"))?)?;
    for entry in fs::read_dir(scripts)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".sh") {
            archive.file(&format!("job/{name}"), 0o755, &fs::read(entry.path())?)?;
        }
    }
    archive.link("job/run", job.script.as_bytes())?;
    if let Some(arg) = job.args.iter().find(|arg| arg.contains(char::is_whitespace)) {
        bail!("argument {arg:?} holds white space");
    }
    archive.file("job/args", 0o644, format!("{}\n", job.args.join(" ")).as_bytes())?;
    for (name, data) in &job.files {
        archive.file(&format!("job/{name}"), 0o644, data)?;
    }
    out.write_all(&archive.finish()?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_found_behind_warnings() {
        assert_eq!(json("{\"a\":1}").unwrap()["a"], 1);
        assert_eq!(json("note: clock\n{\"a\":\n{}}").unwrap()["a"], serde_json::json!({}));
        assert!(json("nothing").is_err());
    }

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        assert_eq!(quoted(Path::new("/a,b")), "/a,,b");
    }
}
