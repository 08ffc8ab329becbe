//! `penstock up`: everything on one machine, provisioned on the first start, found again later.

mod hints;

use std::fs::OpenOptions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use api::{AddKey, Key, KeyKind};
use block::VolumeSpec;
use nvme::spec::Nqn;
use nvme_pci::Doorbells;
use nvmf_initiator::PathPolicy;
use nvmf_target::{AuthDemand, Tls};
use uuid::Uuid;

use crate::config::{DEVICE_QUEUES, DeviceConfig, DeviceKind, Draft, Listen};
use crate::credentials::CredentialsConfig;
use crate::identity;
use crate::keys::KeyBook;
use crate::run::Daemon;
use crate::selfcheck::{self, Figures, SCRATCH_BYTES, Step};
use crate::serve::Hidden;
use crate::size;
use crate::state::State;

const FIRST_VOLUME: &str = "vol0";
/// Volumes are multiples of this, so that any logical block size fits.
const VOLUME_UNIT: u64 = 4096;
const SCRATCH_FILE: &str = "self-check.img";
const SCRATCH_DEVICE: &str = "self-check";
const SCRATCH_NSID: u32 = 1;
/// How long the devices may take to find the target in this very process.
const READY: Duration = Duration::from_secs(20);

/// What `penstock up` was told.
#[derive(Debug, Clone)]
pub struct UpConfig {
    /// Data directory.
    pub data: PathBuf,
    /// `ADDR:PORT[,advertise=ADDR:PORT]` of I/O listeners.
    pub listen: Vec<String>,
    /// The same of discovery listeners.
    pub discovery: Vec<String>,
    /// Size of the first volume, where there is none yet.
    pub size: String,
    /// Whether to prove the way from the device to the volume.
    pub self_check: bool,
}

/// A running `up`.
pub struct Up {
    /// Target and emulator.
    pub daemon: Daemon,
    /// The data directory.
    pub data: PathBuf,
    /// The volume that was made by this start, if one was.
    pub created: Option<String>,
    /// What the operator should know, one line each.
    pub notices: Vec<String>,
    /// Devices: each volume's disk of either kind.
    pub devices: Vec<Disk>,
    connect: SocketAddr,
    /// The listener of the devices.
    own: SocketAddr,
    check: Option<PathBuf>,
}

/// A volume as an emulated disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The volume's name.
    pub volume: String,
    /// What a machine sees.
    pub kind: DeviceKind,
    /// Where it connects to; absolute.
    pub socket: PathBuf,
}

impl Disk {
    /// The device's name: for a second device of a volume one that no volume can have.
    fn name(&self) -> String {
        match self.kind {
            DeviceKind::VirtioBlk => self.volume.clone(),
            DeviceKind::Nvme => format!("nvme:{}", self.volume),
        }
    }
}

impl Up {
    /// Opens or makes the data directory and the first volume, and starts target and emulator.
    /// Must be called inside a tokio runtime.
    pub fn start(config: &UpConfig) -> anyhow::Result<Up> {
        let size = size::parse(&config.size)
            .map_err(|allowed| anyhow!("--size {:?}: {allowed}", config.size))?;
        if !size.is_multiple_of(VOLUME_UNIT) {
            bail!("--size {:?}: allowed: a multiple of {VOLUME_UNIT} bytes", config.size);
        }
        let mut draft = Draft::new();
        draft.set_listen(&config.listen);
        draft.set_discovery(&config.discovery);
        // Flags are judged before anything is made; the volume stands in for those to come.
        let mut judged = draft.clone();
        judged.add_volume("first=null:1GiB")?;
        let judged = judged.check()?;
        let mut listeners = judged.target.iter().flat_map(|target| &target.listen);
        let takes_few =
            |listen: &Listen| listen.tls == Tls::Required || listen.auth == AuthDemand::Required;
        if listeners.any(takes_few) {
            bail!(
                "--listen ...,tls=required or auth=required: nobody can be given a key while \
                 `penstock up` runs; use tls=allowed here, or `penstock target`"
            );
        }

        let mut data = State::open(&config.data)?;
        let dir = std::path::absolute(&config.data)
            .with_context(|| format!("finding the path of {}", config.data.display()))?;
        let mut notices = Vec::new();
        let mut created = None;
        let mut names: Vec<String> = data.volume_names().map(str::to_owned).collect();
        let volumes_dir = data.volumes_dir()?.context("there is no directory for volumes")?;
        let volumes_dir = std::path::absolute(volumes_dir)?;
        if names.is_empty() {
            let path = volumes_dir.join(volume_file(FIRST_VOLUME));
            make_volume(&path, size)
                .with_context(|| format!("creating volume {FIRST_VOLUME:?}"))?;
            names.push(FIRST_VOLUME.to_owned());
            created = Some(FIRST_VOLUME.to_owned());
            // The file is there before its identity is: a start that ends between the two finds an
            // empty file without an identity, which is no loss.
            data.volume(FIRST_VOLUME, None)?;
            data.save()?;
            if let Some(free) = free_bytes(&dir)
                && free < size
            {
                notices.push(format!(
                    "{FIRST_VOLUME} may grow to {}, and its file system has {} free: writes fail \
                     when it is full",
                    size::show(size),
                    size::show(free)
                ));
            }
        }
        for name in &names {
            let path = volumes_dir.join(volume_file(name));
            if !path.exists() {
                bail!(
                    "volume {name:?}: its file {} is missing; put it back, or take its [[volume]] \
                     table out of {} to give it up",
                    path.display(),
                    dir.join("state.toml").display()
                );
            }
            draft.add_volume(&format!("{name}={}", file_spec(&path, None)?))?;
        }
        let mut settings = draft.check()?;
        // The devices' own way: encrypted, and in nobody's discovery log.
        let own = Listen {
            addr: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0),
            advertise: None,
            portid: None,
            tls: Tls::Required,
            // The device's key is proof.
            auth: AuthDemand::Registered,
            hidden: true,
        };
        settings.target.iter_mut().for_each(|target| target.listen.push(own));
        own_key(&dir, &data.host().nqn)?;

        let hidden = match config.self_check {
            true => {
                let subsystem = data.subsystem(None);
                Some(scratch(&dir, &subsystem.nqn)?)
            }
            false => None,
        };
        let scratch_nqn = hidden.as_ref().map(|hidden| hidden.subsystem.nqn.clone());
        let mut daemon = Daemon::start_with(settings, data, hidden)?;
        let listen =
            *daemon.io_addresses().first().ok_or_else(|| anyhow!("there is no listener"))?;
        let connect = reachable(listen);
        let own = *daemon.io_addresses().last().unwrap_or(&listen);
        let subnqn = match daemon.subsystem() {
            Some(subsystem) => subsystem.nqn,
            None => bail!("there is no subsystem"),
        };

        let mut devices = Vec::new();
        let wanted: Vec<_> =
            daemon.served().iter().map(|served| (served.name.clone(), served.nsid)).collect();
        for (name, nsid) in wanted {
            // The endings differ, so that no other volume's socket is in the way.
            for (kind, end) in [(DeviceKind::VirtioBlk, "sock"), (DeviceKind::Nvme, "nvme")] {
                let socket = dir.join(format!("{name}.{end}"));
                let disk = Disk { volume: name.clone(), kind, socket };
                daemon.add_device(device(&disk, own, &subnqn, nsid))?;
                devices.push(disk);
            }
        }
        let check = match scratch_nqn {
            Some(nqn) => {
                let socket = dir.join(format!("{SCRATCH_DEVICE}.sock"));
                let kind = DeviceKind::VirtioBlk;
                let disk = Disk { volume: SCRATCH_DEVICE.to_owned(), kind, socket };
                daemon.add_device(device(&disk, own, &nqn, SCRATCH_NSID))?;
                Some(disk.socket)
            }
            None => None,
        };
        Ok(Up { daemon, data: dir, created, notices, devices, connect, own, check })
    }

    /// The address that this machine's kernel reaches the target by.
    pub fn connect_address(&self) -> SocketAddr {
        self.connect
    }

    /// Waits until every device is served. Blocks.
    pub fn wait_ready(&self) -> anyhow::Result<()> {
        for disk in &self.devices {
            self.daemon.wait_device(&disk.name(), READY)?;
        }
        Ok(())
    }

    /// The self-check, if it was asked for: pattern through the scratch volume, then one look at
    /// each of the user's virtio disks. Blocks; `progress` gets the step, and bytes done and planned.
    pub fn self_check(
        &mut self,
        progress: &mut dyn FnMut(Step, u64, u64),
    ) -> anyhow::Result<Option<Figures>> {
        let Some(socket) = self.check.take() else { return Ok(None) };
        self.daemon.wait_device(SCRATCH_DEVICE, READY)?;
        let generation = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |since| since.as_nanos() as u64)
            .max(1);
        let figures = selfcheck::run(&socket, generation, progress);
        self.daemon.remove_device(SCRATCH_DEVICE);
        let figures = figures.context("self-check")?;
        let disks = self.devices.iter().filter(|disk| disk.kind == DeviceKind::VirtioBlk);
        for Disk { volume: name, socket, .. } in disks {
            let capacity = selfcheck::look(socket)
                .with_context(|| format!("self-check of device {name:?}"))?;
            let served = self.daemon.served().into_iter().find(|served| served.name == *name);
            if let Some(served) = served
                && served.geometry.bytes() != capacity
            {
                bail!(
                    "self-check of device {name:?}: the device has {capacity} bytes, the volume {}",
                    served.geometry.bytes()
                );
            }
        }
        Ok(Some(figures))
    }
}

impl Up {
    /// What is running, for people.
    pub fn overview(&self) -> String {
        let mut text = String::new();
        let mut line = |key: &str, value: String| text.push_str(&format!("{key:<11}{value}\n"));
        line("data", self.data.display().to_string());
        for served in self.daemon.served() {
            let fate = match self.created.as_deref() == Some(&served.name) {
                true => "created",
                false => "found again",
            };
            line(
                "volume",
                format!(
                    "{}: {}, {fate}, namespace {}, UUID {}",
                    served.name,
                    size::show(served.geometry.bytes()),
                    served.nsid,
                    Uuid::from_bytes(served.identity.uuid)
                ),
            );
        }
        if let Some(subsystem) = self.daemon.subsystem() {
            line("subsystem", subsystem.nqn.to_string());
        }
        for addr in self.daemon.io_addresses().iter().filter(|addr| **addr != self.own) {
            line("NVMe/TCP", addr.to_string());
        }
        for addr in self.daemon.discovery_addresses() {
            line("discovery", addr.to_string());
        }
        for Disk { volume, kind, socket } in &self.devices {
            let over = match kind {
                DeviceKind::VirtioBlk => "vhost-user",
                DeviceKind::Nvme => "vfio-user",
            };
            line("device", format!("{volume}: {kind} ({over}) at {}, over TLS", socket.display()));
        }
        text
    }

    /// The lines to use next, for people to copy.
    pub fn next_steps(&self) -> String {
        let discovery = self.daemon.discovery_addresses().first().copied().map(reachable);
        let nqn = self.daemon.subsystem().map(|subsystem| subsystem.nqn.to_string());
        let mut text = hints::kernel_host(discovery, self.connect, &nqn.unwrap_or_default());
        let socket = |kind| {
            let disk = self.devices.iter().find(|disk| disk.kind == kind)?;
            Some((&disk.volume, disk.socket.display().to_string()))
        };
        if let (Some((name, virtio)), Some((_, nvme))) =
            (socket(DeviceKind::VirtioBlk), socket(DeviceKind::Nvme))
        {
            text.push_str(&hints::qemu(name, &virtio, &nvme, DEVICE_QUEUES));
            text.push_str(&hints::fio(&virtio));
        }
        text
    }
}

/// Sees to it that the host of this directory has a key for TLS that is good for every subsystem.
fn own_key(dir: &Path, host: &Nqn) -> anyhow::Result<()> {
    let mut keys = KeyBook::open(Some(dir), Arc::default())?;
    let is_good = |key: &Key| key.kind == KeyKind::Tls && key.subsystem.is_none() && !key.expired;
    if keys.list(Some(host.as_str())).iter().any(is_good) {
        return Ok(());
    }
    let request = AddKey {
        kind: KeyKind::Tls,
        host: host.to_string(),
        subsystem: None,
        expires_in_s: None,
        key: None,
        bits: None,
    };
    keys.add(&request)
        .map_err(|problem| anyhow!("making the key of the devices: {}", problem.what))?;
    Ok(())
}

fn volume_file(name: &str) -> String {
    format!("{name}.img")
}

/// The specification of a file volume; commas in the path are doubled.
fn file_spec(path: &Path, size: Option<u64>) -> anyhow::Result<VolumeSpec> {
    let text = path.to_str().ok_or_else(|| {
        anyhow!("the path {} is not UTF-8; choose another directory with --data", path.display())
    })?;
    let size = size.map(|size| format!(",size={size}")).unwrap_or_default();
    Ok(format!("file:{}{size}", text.replace(',', ",,")).parse()?)
}

/// A new sparse file. What is there is never touched.
fn make_volume(path: &Path, size: u64) -> anyhow::Result<()> {
    let file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => file,
        // Left by a start that ended before the identity was stored; nothing was ever written.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).open(path)?
        }
        Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
    };
    file.set_len(size)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("giving {} {}", path.display(), size::show(size)))
}

/// The scratch volume of the self-check and the subsystem it is in.
fn scratch(dir: &Path, subnqn: &Nqn) -> anyhow::Result<Hidden> {
    let path = dir.join(SCRATCH_FILE);
    let used = std::fs::metadata(&path).map_or(0, |metadata| {
        use std::os::unix::fs::MetadataExt;
        metadata.blocks().saturating_mul(512)
    });
    let needed = SCRATCH_BYTES.saturating_sub(used);
    if let Some(free) = free_bytes(dir)
        && free < needed
    {
        bail!(
            "disk full: {} has {} free and the self-check needs {}; free some space, choose \
             another directory with --data DIR, or start with --skip-self-check",
            dir.display(),
            size::show(free),
            size::show(needed)
        );
    }
    let uuid = Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("{subnqn}/self-check").as_bytes());
    let volume = file_spec(&path, Some(SCRATCH_BYTES))?
        .open(identity::volume_from_uuid(uuid))
        .context("opening the scratch volume of the self-check")?;
    Ok(Hidden { subsystem: identity::subsystem_from_uuid(uuid), volume })
}

/// Bytes an unprivileged process may still use on the file system of `dir`.
fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The address to reach a listener by from this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

fn device(disk: &Disk, connect: SocketAddr, subnqn: &Nqn, nsid: u32) -> DeviceConfig {
    DeviceConfig {
        volume: None,
        name: disk.name(),
        kind: disk.kind,
        socket: disk.socket.clone(),
        connect: vec![connect.into()],
        discover: Vec::new(),
        discover_in_plaintext: false,
        ports: [connect.port()].into(),
        policy: PathPolicy::default(),
        subnqn: subnqn.clone(),
        nsids: vec![nsid],
        follows: false,
        host: None,
        ctrl_loss_timeout: None,
        queues: DEVICE_QUEUES,
        read_only: false,
        doorbells: Doorbells::default(),
        credentials: CredentialsConfig::default(),
    }
}

#[cfg(test)]
mod tests;
