//! A target in this process, on real sockets: for tests that are hosts themselves.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use block::Volume;
use nvmf_target::{
    KeyStore, Limits, ListenerKind, NamespaceConfig, Port, SubsystemConfig, Target, TargetConfig,
    Tls,
};
use reactor::{Core, CoreConfig, CoreHandle, Socket};

/// Subsystem that the rig serves.
pub const SUBNQN: &str = "nqn.2026-11.io.penstock:rig";

/// A running target; stopped when dropped.
pub struct Rig {
    /// Where it listens first.
    pub addr: SocketAddr,
    /// Where it listens: port identifiers 1, 2, … in this order.
    pub addrs: Vec<SocketAddr>,
    /// Its handle.
    pub target: Arc<Target>,
    cores: Vec<(CoreHandle, JoinHandle<()>)>,
    acceptors: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Rig {
    /// Serves `volumes` as namespaces 1, 2, … on `cores` cores of their own threads.
    ///
    /// # Errors
    /// No io_uring, no port, or a configuration that the target refuses.
    pub fn start(volumes: Vec<Arc<dyn Volume>>, cores: usize, limits: Limits) -> Result<Rig> {
        Rig::start_on(&[Ipv4Addr::LOCALHOST.into()], volumes, cores, limits)
    }

    /// The same with a port of its own for each of the addresses.
    ///
    /// # Errors
    /// As [`Rig::start`], or an address that this machine does not have.
    pub fn start_on(
        listen: &[IpAddr],
        volumes: Vec<Arc<dyn Volume>>,
        cores: usize,
        limits: Limits,
    ) -> Result<Rig> {
        Rig::start_secure(listen, volumes, cores, limits, (Tls::Off, Arc::default()))
    }

    /// The same with TLS on all ports, and keys of hosts.
    ///
    /// # Errors
    /// As [`Rig::start_on`].
    pub fn start_secure(
        listen: &[IpAddr],
        volumes: Vec<Arc<dyn Volume>>,
        cores: usize,
        limits: Limits,
        (tls, keys): (Tls, Arc<KeyStore>),
    ) -> Result<Rig> {
        let (to_us, handles) = mpsc::channel();
        let (mut starts, mut threads) = (Vec::new(), Vec::new());
        // A receive and a send for each connection, and what the volumes have under way.
        let per_core = limits.connections.div_ceil(cores) * 2 + 1024;
        let entries = u32::try_from(per_core).unwrap_or(u32::MAX).min(16384);
        for n in 0..cores {
            let (start, wait) = mpsc::channel::<Arc<Target>>();
            starts.push(start);
            let to_us = to_us.clone();
            threads.push(std::thread::Builder::new().name(format!("core-{n}")).spawn(
                move || {
                    let mut core = match Core::new(CoreConfig { entries, ..CoreConfig::default() })
                    {
                        Ok(core) => core,
                        Err(error) => {
                            drop(to_us.send((n, Err(error))));
                            return;
                        }
                    };
                    drop(to_us.send((n, Ok(core.handle()))));
                    let Ok(target) = wait.recv() else { return };
                    let task = target.core_task(n, &core.local()).expect("one task per core");
                    core.spawn(task);
                    core.run();
                },
            )?);
        }
        let mut found = Vec::new();
        for _ in 0..cores {
            let (n, handle) = handles.recv().context("a core ended early")?;
            found.push((n, handle.context("starting a core")?));
        }
        found.sort_by_key(|(n, _)| *n);
        let cores: Vec<CoreHandle> = found.into_iter().map(|(_, handle)| handle).collect();
        let namespaces = volumes
            .into_iter()
            .zip(1..)
            .map(|(volume, nsid)| NamespaceConfig::new(nsid, volume))
            .collect();
        let listeners = listen
            .iter()
            .map(|ip| TcpListener::bind((*ip, 0)))
            .collect::<std::io::Result<Vec<_>>>()
            .context("listening")?;
        let addrs = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<std::io::Result<Vec<SocketAddr>>>()?;
        let addr = *addrs.first().context("no address to listen on")?;
        let ports = (1..).zip(&addrs).map(|(id, addr)| Port {
            id,
            kind: ListenerKind::Io,
            addr: *addr,
            tls,
            auth: nvmf_target::AuthDemand::default(),
            hidden: false,
        });
        let config = TargetConfig {
            subsystems: vec![SubsystemConfig {
                namespaces,
                ..SubsystemConfig::new(SUBNQN, "RIG0001")
            }],
            ports: ports.collect(),
            limits,
            keys,
            ..TargetConfig::default()
        };
        let target = Target::new(config, cores.clone())?;
        for start in starts {
            start.send(Arc::clone(&target)).ok().context("a core ended early")?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let acceptors = (1..)
            .zip(listeners)
            .map(|(port, listener)| {
                let (stopping, accepted) = (Arc::clone(&stop), Arc::clone(&target));
                std::thread::spawn(move || {
                    for stream in listener.incoming().map_while(Result::ok) {
                        if stopping.load(Ordering::Acquire) {
                            return;
                        }
                        accepted.add_connection(Socket::from(stream), port);
                    }
                })
            })
            .collect();
        let cores = cores.into_iter().zip(threads).collect();
        Ok(Rig { addr, addrs, target, cores, acceptors, stop })
    }

    /// Runs `f` on every core.
    ///
    /// # Errors
    /// A core's mailbox is full.
    pub fn on_cores(&self, f: fn()) -> Result<()> {
        for (handle, _) in &self.cores {
            handle.post(Box::new(move |_| f())).ok().context("a core's mailbox is full")?;
        }
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // One last connection lets each acceptor see the flag.
        for (addr, acceptor) in self.addrs.iter().zip(self.acceptors.drain(..)) {
            drop(std::net::TcpStream::connect(addr));
            drop(acceptor.join());
        }
        for (handle, thread) in self.cores.drain(..) {
            handle.stop();
            if thread.join().is_err() && !std::thread::panicking() {
                panic!("a core of the target panicked");
            }
        }
    }
}
