//! Cores that run in threads of their own.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use reactor::{Core, CoreConfig, CoreHandle};

/// Cores of the usual size, for a device or a volume to be on.
pub struct Cores {
    /// One for each.
    pub handles: Vec<CoreHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Cores {
    /// Starts so many.
    pub fn start(count: usize) -> Cores {
        let (mut handles, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let (sender, receiver) = mpsc::channel();
            threads.push(thread::spawn(move || {
                let mut core = Core::new(CoreConfig::default()).expect("a ring");
                sender.send(core.handle()).expect("the test waits");
                core.run();
            }));
            handles.push(receiver.recv().expect("a core"));
        }
        Cores { handles, threads }
    }

    /// Ends them, and waits until they have.
    pub fn stop(self) {
        self.handles.iter().for_each(CoreHandle::stop);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a core ends well"));
    }
}
