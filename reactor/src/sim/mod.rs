//! A seeded world in one thread: cores on a simulated kernel, files in memory, a faulty network, virtual time.

use std::net::SocketAddr;
use std::time::Duration;

use crate::core::{Core, CoreConfig};
use crate::fd::{Fd, Socket};

/// Faults of the simulated network. Default: none.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetFaults {
    /// Deliver in pieces cut at any byte.
    pub split: bool,
    /// Longest delay of a piece; pieces of one direction stay in order.
    pub delay_max: Duration,
    /// Chance, per piece sent and in millionths, that the connection is cut there.
    pub cut_per_million: u32,
    /// Chance, per connect and in millionths, that it is refused although somebody listens.
    pub refuse_per_million: u32,
}

/// Faults of the simulated files. Default: none, and every operation takes the same short time.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileFaults {
    /// Longest time an operation takes; completions come in random order.
    pub delay_max: Duration,
    /// Chance, per operation and in millionths, that it fails with `EIO`.
    pub error_per_million: u32,
    /// Chance, per read or write and in millionths, that it moves only part of the bytes.
    pub short_per_million: u32,
}

/// A file of a simulated world.
#[derive(Clone, Debug)]
pub struct SimFile {}

/// One end of a simulated connection.
#[derive(Debug)]
pub struct SimSocket {}

impl SimSocket {
    pub(crate) fn peer(&self) -> String {
        todo!()
    }
}

/// A seeded world.
#[derive(Clone)]
pub struct World {}

impl World {
    /// A world that replays exactly from `seed`.
    pub fn new(seed: u64) -> World {
        let _ = seed;
        todo!()
    }

    /// A core on this world's kernel, with the default configuration.
    pub fn core(&self) -> Core {
        self.core_with(CoreConfig::default())
    }

    /// A core on this world's kernel.
    pub fn core_with(&self, config: CoreConfig) -> Core {
        let _ = config;
        todo!()
    }

    /// Opens the file `name`, created with `size` zero bytes if it is new.
    pub fn file(&self, name: &str, size: u64) -> Fd {
        let _ = (name, size);
        todo!()
    }

    /// Listens on `addr`: `accept` gets the far end of every connect to it.
    pub fn listen(&self, addr: SocketAddr, accept: Box<dyn FnMut(Socket)>) {
        let _ = (addr, accept);
        todo!()
    }

    /// Stops listening: connects are refused from now on. Connections stay.
    pub fn unlisten(&self, addr: SocketAddr) {
        let _ = addr;
        todo!()
    }

    /// A connection between two ends, without a listener.
    pub fn socket_pair(&self) -> (Socket, Socket) {
        todo!()
    }

    /// Changes the network's faults.
    pub fn set_faults(&self, faults: NetFaults) {
        let _ = faults;
        todo!()
    }

    /// Changes the files' faults.
    pub fn set_file_faults(&self, faults: FileFaults) {
        let _ = faults;
        todo!()
    }

    /// Cuts every connection now.
    pub fn cut_all(&self) {
        todo!()
    }

    /// Power fails under all files: writes that no fsync or dsync covered are lost or torn, sector by sector.
    pub fn power_cut(&self) {
        todo!()
    }

    /// One step: every core takes turns, and when all are idle, time moves to the next event or deadline.
    ///
    /// `false`: nothing will ever happen again by itself; if tasks are not done, they are deadlocked.
    pub fn step(&self, cores: &mut [Core]) -> bool {
        let _ = cores;
        todo!()
    }

    /// Steps until `condition` holds. `false` if `limit` of virtual time passes first, or nothing happens any more.
    pub fn run_until(
        &self,
        cores: &mut [Core],
        limit: Duration,
        condition: &mut dyn FnMut() -> bool,
    ) -> bool {
        let _ = (cores, limit, condition);
        todo!()
    }

    /// Virtual time.
    pub fn now(&self) -> Duration {
        todo!()
    }

    /// A digest of everything that happened so far: equal seeds give equal fingerprints.
    pub fn fingerprint(&self) -> u64 {
        todo!()
    }
}
