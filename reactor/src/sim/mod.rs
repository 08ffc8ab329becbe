//! A seeded world in one thread: cores on a simulated kernel, files in memory, a faulty network,
//! virtual time.
//!
//! The loop, the slab of operations, the ports and the streams are those of production; only the
//! kernel below them is simulated, at the level of completions. Everything random comes from the
//! seed, so a failure replays:
//!
//! ```
//! use reactor::sim::{NetFaults, World};
//! # use std::time::Duration;
//! let world = World::new(42);
//! world.set_faults(NetFaults { split: true, ..NetFaults::default() });
//! let mut cores = [world.core(), world.core()];
//! // cores[0].spawn(..): tasks as in production
//! while world.step(&mut cores) {}
//! ```
//!
//! Not simulated: addresses already in use, half-open connections, file permissions, alignment
//! rules of direct I/O.

mod file;
mod kernel;
mod net;
mod rng;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::file::File;
use self::net::{EndId, Net};
use self::rng::{Rng, mix};
use crate::core::{Core, CoreConfig};
use crate::fd::{Fd, Socket, SocketKind};
use crate::rx::RxPool;

pub(crate) use self::kernel::SimKernel;

/// Virtual time that one step of all cores takes: time passes although cores are busy.
const STEP: Duration = Duration::from_micros(1);

/// Faults of the simulated network. Default: none, and every byte takes the same short time.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetFaults {
    /// Deliver in pieces cut at any byte; also cuts sends short, takes half of them at once, and ends
    /// multishot receives.
    pub split: bool,
    /// Longest delay of a piece; pieces of one direction stay in order.
    pub delay_max: Duration,
    /// Chance, per piece sent and in millionths, that the connection is cut there.
    pub cut_per_million: u32,
    /// Chance, per connect and in millionths, that it is refused although somebody listens.
    pub refuse_per_million: u32,
    /// Chance, per connect and in millionths, that nobody answers it.
    pub lost_per_million: u32,
}

/// Faults of the simulated files. Default: none, and every operation takes the same short time.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileFaults {
    /// Longest time an operation takes; completions come in random order.
    pub delay_max: Duration,
    /// Chance, per operation and in millionths, that it fails with `EIO`. A write that fails leaves
    /// some of its sectors written.
    pub error_per_million: u32,
    /// Chance, per read or write and in millionths, that it moves only some of its sectors.
    pub short_per_million: u32,
}

/// What all cores of a world share. Sockets must be `Send` to travel in messages, hence the lock;
/// it is never contended, as a world lives in one thread.
pub(crate) struct State {
    now: Duration,
    rng: Rng,
    net: Net,
    files: Vec<File>,
    file_names: BTreeMap<String, usize>,
    file_faults: FileFaults,
    events: Vec<u64>,
    /// Far ends of connects, for the listeners.
    accepts: VecDeque<(SocketAddr, Socket)>,
    fingerprint: u64,
}

impl State {
    fn note(&mut self, word: u64) {
        self.fingerprint = mix(self.fingerprint ^ word).wrapping_add(word);
    }
}

#[derive(Clone)]
pub(crate) struct WorldState(Arc<Mutex<State>>);

impl WorldState {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked is over; others do not share its world.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file of a simulated world, as [`Fd`] of an operation.
#[derive(Clone)]
pub struct SimFile {
    _world: WorldState,
    index: usize,
}

impl SimFile {
    pub(crate) fn index(&self) -> usize {
        self.index
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimFile").field(&self.index).finish()
    }
}

/// A simulated event descriptor. `Fd::from` makes it one for [`Port::watch`](crate::Port::watch).
#[derive(Clone)]
pub struct SimEvent {
    world: WorldState,
    index: usize,
}

impl SimEvent {
    /// Adds one to the counter.
    pub fn signal(&self) {
        self.world.lock().events[self.index] += 1;
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }
}

impl fmt::Debug for SimEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimEvent").field(&self.index).finish()
    }
}

/// One end of a simulated connection. Dropping it closes that end.
pub(crate) struct SimSocket {
    world: WorldState,
    end: EndId,
}

impl SimSocket {
    fn new(world: &WorldState, end: EndId) -> SimSocket {
        SimSocket { world: world.clone(), end }
    }

    pub(crate) fn end(&self) -> EndId {
        self.end
    }

    pub(crate) fn peer(&self) -> String {
        self.world.lock().net.peer(self.end)
    }

    pub(crate) fn set_reset_on_close(&self, resets: bool) {
        self.world.lock().net.set_reset_on_close(self.end, resets);
    }
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimSocket").field(&self.end).finish()
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        let mut state = self.world.lock();
        let state = &mut *state;
        state.net.close(self.end, state.now, &mut state.rng);
    }
}

/// What a simulated core needs of its world.
#[derive(Clone)]
pub(crate) struct SimCore(WorldState);

impl SimCore {
    pub(crate) fn now(&self) -> Duration {
        self.0.lock().now
    }

    pub(crate) fn random_u64(&self) -> u64 {
        self.0.lock().rng.next()
    }

    pub(crate) fn kernel(&self, rx: Rc<RxPool>) -> SimKernel {
        SimKernel::new(self.0.clone(), rx)
    }
}

type Accept = Box<dyn FnMut(Socket)>;

/// A seeded world. Clones name the same world.
#[derive(Clone)]
pub struct World {
    state: WorldState,
    listeners: Rc<RefCell<BTreeMap<SocketAddr, Accept>>>,
}

impl World {
    /// A world that replays exactly from `seed`.
    pub fn new(seed: u64) -> World {
        let state = State {
            now: Duration::from_secs(1),
            rng: Rng::new(seed),
            net: Net::default(),
            files: Vec::new(),
            file_names: BTreeMap::new(),
            file_faults: FileFaults::default(),
            events: Vec::new(),
            accepts: VecDeque::new(),
            fingerprint: 0,
        };
        World { state: WorldState(Arc::new(Mutex::new(state))), listeners: Rc::default() }
    }

    /// A core on this world's kernel, with small buffers.
    pub fn core(&self) -> Core {
        self.core_with(CoreConfig {
            entries: 512,
            rx_buffer_bytes: 64 << 10,
            pool_bytes: 16 << 20,
            mailbox_depth: 64,
            ..CoreConfig::default()
        })
    }

    /// A core on this world's kernel. It is not bound to a processor.
    ///
    /// # Panics
    ///
    /// If the configuration is out of range or memory is out.
    pub fn core_with(&self, config: CoreConfig) -> Core {
        match Core::simulated(config, SimCore(self.state.clone())) {
            Ok(core) => core,
            Err(error) => panic!("a simulated core: {error}"),
        }
    }

    /// Opens the file `name`, created with `size` zero bytes if it is new.
    pub fn file(&self, name: &str, size: u64) -> Fd {
        let mut state = self.state.lock();
        let state = &mut *state;
        let files = &mut state.files;
        let index = *state.file_names.entry(name.to_owned()).or_insert_with(|| {
            files.push(File::new(size as usize));
            files.len() - 1
        });
        Fd::from(SimFile { _world: self.state.clone(), index })
    }

    /// What a read of the file would give now: `len` bytes from `offset`, fewer at its end.
    pub fn peek(&self, name: &str, offset: u64, len: usize) -> Vec<u8> {
        let state = self.state.lock();
        match state.file_names.get(name) {
            Some(index) => state.files[*index].read(offset as usize, len).to_vec(),
            None => Vec::new(),
        }
    }

    /// Size of a file in bytes; zero if there is none of this name.
    pub fn file_size(&self, name: &str) -> u64 {
        let state = self.state.lock();
        state.file_names.get(name).map_or(0, |index| state.files[*index].size() as u64)
    }

    /// A new event descriptor.
    pub fn event(&self) -> SimEvent {
        let mut state = self.state.lock();
        state.events.push(0);
        SimEvent { world: self.state.clone(), index: state.events.len() - 1 }
    }

    /// Listens on `addr`: `accept` gets the far end of every connect to it, from inside
    /// [`World::step`].
    pub fn listen(&self, addr: SocketAddr, accept: Box<dyn FnMut(Socket)>) {
        self.state.lock().net.listening.insert(addr);
        self.listeners.borrow_mut().insert(addr, accept);
    }

    /// Stops listening: connects are refused from now on. Connections stay.
    pub fn unlisten(&self, addr: SocketAddr) {
        self.state.lock().net.listening.remove(&addr);
        self.listeners.borrow_mut().remove(&addr);
    }

    /// A connection between two ends, without a listener.
    pub fn socket_pair(&self) -> (Socket, Socket) {
        let ends = self.state.lock().net.connect(["far end".to_owned(), "near end".to_owned()]);
        let [near, far] = ends.map(|end| Socket(SocketKind::Sim(SimSocket::new(&self.state, end))));
        (near, far)
    }

    /// Changes the network's faults.
    pub fn set_faults(&self, faults: NetFaults) {
        self.state.lock().net.faults = faults;
    }

    /// Changes the files' faults.
    pub fn set_file_faults(&self, faults: FileFaults) {
        self.state.lock().file_faults = faults;
    }

    /// Cuts every connection now.
    pub fn cut_all(&self) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.net.cut_all(state.now, &mut state.rng);
    }

    /// Power fails under all files: of what no sync covered, each sector keeps any version written
    /// since. Operations in flight fail. Drop the cores of the machine that lost power before.
    pub fn power_cut(&self) {
        let mut state = self.state.lock();
        let state = &mut *state;
        for file in &mut state.files {
            file.power_cut(&mut state.rng);
        }
    }

    /// One step: each core takes one turn, beginning with a random one. When all are idle, time
    /// moves to the next event or deadline.
    ///
    /// `false`: nothing will ever happen again by itself. If tasks are not done then (see
    /// [`Core::tasks`]), they wait for the test, or are deadlocked.
    pub fn step(&self, cores: &mut [Core]) -> bool {
        let first = {
            let mut state = self.state.lock();
            state.now += STEP;
            state.rng.below(cores.len() as u64) as usize
        };
        let mut progressed = self.accept();
        for index in 0..cores.len() {
            progressed |= cores[(first + index) % cores.len()].turn(false);
        }
        // Asked of all, like the real loop before it sleeps.
        let mut has_work = false;
        if !progressed {
            for core in cores.iter_mut() {
                has_work |= core.arm() || core.is_notified();
            }
        }
        let accepts = !self.state.lock().accepts.is_empty();
        let next = if progressed || has_work || accepts {
            Some(Duration::ZERO)
        } else {
            let events = cores.iter().filter_map(|core| core.shared().next_event());
            events.chain(cores.iter().filter_map(Core::deadline)).min()
        };
        if !progressed {
            cores.iter_mut().for_each(Core::disarm);
        }
        if let Some(next) = next {
            let mut state = self.state.lock();
            state.now = state.now.max(next);
        }
        next.is_some()
    }

    /// Steps until `condition` holds. `false` if `limit` of virtual time passes before, or nothing
    /// happens any more.
    pub fn run_until(
        &self,
        cores: &mut [Core],
        limit: Duration,
        condition: &mut dyn FnMut() -> bool,
    ) -> bool {
        let end = self.now() + limit;
        loop {
            if condition() {
                return true;
            }
            if self.now() >= end || !self.step(cores) {
                return condition();
            }
        }
    }

    /// Virtual time.
    pub fn now(&self) -> Duration {
        self.state.lock().now
    }

    /// A digest of every completion so far and its time: equal seeds give equal fingerprints.
    pub fn fingerprint(&self) -> u64 {
        self.state.lock().fingerprint
    }

    /// Hands the far ends of connects to their listeners.
    fn accept(&self) -> bool {
        let mut accepted = false;
        loop {
            let next = self.state.lock().accepts.pop_front();
            let Some((addr, socket)) = next else { return accepted };
            accepted = true;
            // Taken out while it runs: it may listen or unlisten itself.
            let listener = self.listeners.borrow_mut().remove(&addr);
            let Some(mut listener) = listener else { continue };
            listener(socket);
            if self.state.lock().net.listening.contains(&addr) {
                self.listeners.borrow_mut().entry(addr).or_insert(listener);
            }
        }
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("now", &self.now()).finish_non_exhaustive()
    }
}
