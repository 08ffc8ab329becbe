//! A target in this process, on real sockets: for tests that are hosts themselves.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use block::Volume;
use nvmf_target::{
    Limits, ListenerKind, NamespaceConfig, Port, SubsystemConfig, Target, TargetConfig,
};
use reactor::{Core, CoreConfig, CoreHandle, Socket};

/// Subsystem that the rig serves.
pub const SUBNQN: &str = "nqn.2026-11.io.penstock:rig";

/// A running target; stopped when dropped.
pub struct Rig {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Its handle.
    pub target: Arc<Target>,
    cores: Vec<(CoreHandle, JoinHandle<()>)>,
    acceptor: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Rig {
    /// Serves `volumes` as namespaces 1, 2, … on `cores` cores of their own threads.
    ///
    /// # Errors
    /// No io_uring, no port, or a configuration that the target refuses.
    pub fn start(volumes: Vec<Arc<dyn Volume>>, cores: usize, limits: Limits) -> Result<Rig> {
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
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        let config = TargetConfig {
            subsystems: vec![SubsystemConfig {
                namespaces,
                ..SubsystemConfig::new(SUBNQN, "RIG0001")
            }],
            ports: vec![Port { id: 1, kind: ListenerKind::Io, addr }],
            limits,
            ..TargetConfig::default()
        };
        let target = Target::new(config, cores.clone())?;
        for start in starts {
            start.send(Arc::clone(&target)).ok().context("a core ended early")?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopping, accepted) = (Arc::clone(&stop), Arc::clone(&target));
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopping.load(Ordering::Acquire) {
                    return;
                }
                accepted.add_connection(Socket::from(stream), 1);
            }
        });
        let cores = cores.into_iter().zip(threads).collect();
        Ok(Rig { addr, target, cores, acceptor: Some(acceptor), stop })
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
        // One last connection lets the acceptor see the flag.
        drop(std::net::TcpStream::connect(self.addr));
        if let Some(acceptor) = self.acceptor.take() {
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
