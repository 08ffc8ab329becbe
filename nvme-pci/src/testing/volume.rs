//! A volume that misbehaves as it is told to.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use block::{Busy, Channel, Geometry, Identity, Io, IoError, Volume, VolumeSpec};

/// A RAM disk that keeps its I/O for as long as it is told to, and can be opened on one core only.
pub struct TestVolume {
    inner: Arc<dyn Volume>,
    is_held: Arc<AtomicBool>,
    is_of_one_core: bool,
    /// The thread that was first.
    owner: Mutex<Option<ThreadId>>,
}

impl TestVolume {
    /// Of so many MiB. `is_of_one_core`: the first thread to open it is the only one that can.
    pub fn new(mib: u64, uuid: u8, is_of_one_core: bool) -> Arc<TestVolume> {
        let spec: VolumeSpec = format!("ram:{mib}M").parse().expect("a volume");
        Arc::new(TestVolume {
            inner: spec.open(Identity::from_uuid([uuid; 16])).expect("memory for a volume"),
            is_held: Arc::default(),
            is_of_one_core,
            owner: Mutex::default(),
        })
    }

    /// Keeps I/O, or lets it go. A core that sleeps has to be woken for the latter.
    pub fn hold(&self, is_held: bool) {
        self.is_held.store(is_held, Ordering::SeqCst);
    }
}

impl Volume for TestVolume {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn open(&self, local: &reactor::Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        let mut owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        let me = thread::current().id();
        if self.is_of_one_core && *owner.get_or_insert(me) != me {
            return Err(io::Error::other("no more queues"));
        }
        let inner = self.inner.open(local, depth)?;
        let (is_held, kept, aborted) = (Arc::clone(&self.is_held), VecDeque::new(), Vec::new());
        Ok(Box::new(Opened { inner, is_held, kept, aborted, depth: depth as usize }))
    }
}

struct Opened {
    inner: Box<dyn Channel>,
    is_held: Arc<AtomicBool>,
    kept: VecDeque<Box<Io>>,
    #[expect(clippy::vec_box, reason = "the boxes are the device's")]
    aborted: Vec<Box<Io>>,
    depth: usize,
}

impl Channel for Opened {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Busy> {
        if self.in_flight() >= self.depth {
            return Err(Busy(io));
        }
        self.kept.push_back(io);
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        for mut io in self.aborted.drain(..) {
            io.result = Err(IoError::Aborted);
            done(io);
        }
        while !self.is_held.load(Ordering::SeqCst)
            && let Some(io) = self.kept.pop_front()
        {
            if let Err(Busy(io)) = self.inner.submit(io) {
                self.kept.push_front(io);
                break;
            }
        }
        self.inner.poll(done);
    }

    fn in_flight(&self) -> usize {
        self.kept.len() + self.aborted.len() + self.inner.in_flight()
    }

    fn abort(&mut self) {
        self.aborted.extend(self.kept.drain(..));
    }
}
