//! Guest, device and initiator on one core of this process, for machines that have no third core:
//! one for the target, one for all the rest.
//!
//! ```text
//!  this thread ── orders ──► GuestTask ─ ring ─► device's task ─ Channel ─► initiator's task ─► target
//!                            ╰───────────────────── one reactor core ─────────────────────╯
//! ```
//!
//! The guest's own work counts against the device here; three busy threads on two cores would
//! measure the scheduler instead.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use block::Volume;
use nvme::spec::Nqn;
use nvmf_initiator::{RemoteConfig, RemoteVolume};
use reactor::{Core, CoreConfig, CoreHandle, Progress, Receiver, Spawner, Task};

use super::channel::ChannelDriver;
use super::nvme::NvmeDisk;
use super::virtio::VirtioDisk;
use super::{DEPTH_MAX, Driver, IO_BYTES, Memory, Run, Work};
use crate::load::Figures;

/// What the guest sees of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Face {
    /// Nothing: the loop drives the initiator itself.
    Bare,
    /// A virtio-blk disk.
    VirtioBlk,
    /// An NVMe controller.
    Nvme,
}

enum Device {
    None,
    VirtioBlk(virtio_blk::DeviceHandle),
    Nvme(nvme_pci::DeviceHandle),
}

/// A guest of a remote namespace, on a core of its own.
pub struct Inside {
    handle: CoreHandle,
    thread: Option<JoinHandle<()>>,
    device: Device,
    remote: Arc<RemoteVolume>,
    orders: Option<reactor::Sender<(Work, Duration)>>,
    results: mpsc::Receiver<io::Result<Figures>>,
}

impl Inside {
    /// Connects to namespace 1 of `subnqn` at `addr`; everything runs on processor `core`. The
    /// device's socket is made at `socket`.
    ///
    /// # Errors
    /// Of any part; the target does not answer within ten seconds.
    pub fn start(
        face: Face,
        addr: SocketAddr,
        subnqn: &str,
        core: usize,
        socket: &Path,
    ) -> Result<Inside> {
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let config = CoreConfig { pin_to: Some(core), ..CoreConfig::default() };
            let made = Core::new(config);
            // The starter waits for this.
            let _ = sender.send(made.as_ref().map(Core::handle).map_err(ToString::to_string));
            if let Ok(mut core) = made {
                core.run();
            }
        });
        let handle = receiver.recv()?.map_err(|error| anyhow!("a core: {error}"))?;

        let host = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-0000000000f";
        let host = format!("{host}{}", face as u8);
        let host = (host.parse::<Nqn>()?, [face as u8 + 1; 16]);
        let config =
            RemoteConfig { queues: 2, ..RemoteConfig::new(addr, subnqn.parse()?, 1, host) };
        let remote = on(&handle, move |spawner| {
            let (remote, task) = RemoteVolume::start(config, spawner.local())?;
            spawner.spawn(task);
            Ok::<_, nvmf_initiator::ConfigError>(remote)
        })??;
        remote
            .wait_ready(Duration::from_secs(10))
            .map_err(|_| anyhow!("the target at {addr} does not answer"))?;

        let volume: Arc<dyn Volume> = remote.clone();
        let cores = vec![handle.clone()];
        let (orders, order_receiver) = reactor::channel(&handle, 1);
        let (result_sender, results) = mpsc::channel();
        let post = Post { orders: order_receiver, results: result_sender };
        let device = match face {
            Face::Bare => {
                on(&handle, move |spawner| -> io::Result<()> {
                    let channel = volume.open(spawner.local(), DEPTH_MAX.into())?;
                    let memory = Memory::new(IO_BYTES * u64::from(DEPTH_MAX))?;
                    let driver = ChannelDriver::new(channel, &memory)?;
                    spawner.spawn(post.guest(Box::new(driver)));
                    Ok(())
                })??;
                Device::None
            }
            Face::VirtioBlk => {
                let config = virtio_blk::DeviceConfig {
                    queue_size_max: virtio_blk::QUEUE_SIZE_MAX,
                    ..virtio_blk::DeviceConfig::new("bench", socket)
                };
                let device = virtio_blk::serve(config, volume, cores)?;
                let disk = VirtioDisk::attach(socket).context("attaching the virtio-blk disk")?;
                on(&handle, move |spawner| -> io::Result<()> {
                    spawner.spawn(post.guest(Box::new(disk.driver()?)));
                    Ok(())
                })??;
                Device::VirtioBlk(device)
            }
            Face::Nvme => {
                let config = nvme_pci::DeviceConfig::new("bench", socket);
                let device = nvme_pci::serve(config, vec![(1, volume)], &cores)?;
                let disk = NvmeDisk::attach(socket).context("attaching the NVMe controller")?;
                on(&handle, move |spawner| -> io::Result<()> {
                    spawner.spawn(post.guest(Box::new(disk.driver()?)));
                    Ok(())
                })??;
                Device::Nvme(device)
            }
        };
        Ok(Inside { handle, thread: Some(thread), device, remote, orders: Some(orders), results })
    }

    /// Runs `work` for `time`.
    ///
    /// # Errors
    /// The disk's; no result within ten seconds more.
    pub fn run(&self, work: Work, time: Duration) -> Result<Figures> {
        let orders = self.orders.as_ref().context("stopped")?;
        if orders.send((work, time)).is_err() {
            bail!("the guest has ended");
        }
        let limit = time + Duration::from_secs(10);
        Ok(self.results.recv_timeout(limit).context("the guest does not finish")??)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.orders = None;
        match std::mem::replace(&mut self.device, Device::None) {
            Device::None => {}
            Device::VirtioBlk(device) => device.stop(),
            Device::Nvme(device) => device.stop(),
        }
        self.remote.shutdown();
        let _ = self.remote.wait_stopped(Duration::from_secs(3));
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Runs `work` on the core and waits for it.
fn on<T: Send + 'static>(
    handle: &CoreHandle,
    work: impl FnOnce(&mut Spawner<'_>) -> T + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    let message = move |spawner: &mut Spawner<'_>| {
        // The caller waits for this.
        let _ = sender.send(work(spawner));
    };
    handle.post(Box::new(message)).map_err(|_| anyhow!("the core takes no message"))?;
    Ok(receiver.recv()?)
}

/// A guest's ways to who measures.
struct Post {
    orders: Receiver<(Work, Duration)>,
    results: mpsc::Sender<io::Result<Figures>>,
}

impl Post {
    fn guest(self, driver: Box<dyn Driver>) -> Box<GuestTask> {
        Box::new(GuestTask { driver: Some(driver), run: None, post: self })
    }
}

/// The guest: a measurement each time it is told to.
struct GuestTask {
    driver: Option<Box<dyn Driver>>,
    run: Option<Run<Box<dyn Driver>>>,
    post: Post,
}

impl Task for GuestTask {
    fn poll(&mut self, _: Duration) -> Progress {
        if let Some(run) = &mut self.run {
            let result = match run.step() {
                Ok(None) => return Progress::Worked,
                Ok(Some(figures)) => Ok(figures),
                Err(error) => Err(error),
            };
            self.driver = self.run.take().map(|run| run.driver);
            let _ = self.post.results.send(result);
            return Progress::Worked;
        }
        if let Some((work, time)) = self.post.orders.try_recv()
            && let Some(driver) = self.driver.take()
        {
            self.run = Some(Run::new(driver, work, time));
            return Progress::Worked;
        }
        if self.post.orders.is_disconnected() { Progress::Done } else { Progress::Idle }
    }

    fn arm(&mut self) -> bool {
        self.run.is_some()
    }
}
