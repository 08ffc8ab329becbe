//! Threads of the data path: one reactor core each.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use reactor::{Core, CoreConfig, CoreHandle, SetupError, Spawner};

/// Bytes of the receive buffers and rings each core is sure to touch are small; the pool is a bound,
/// not a reservation: its memory is taken when it is first used.
const POOL_BYTES: usize = 256 << 20;

/// What each core of a target takes of its pool at once, for the kernel to keep in place: I/O of 128
/// KiB at a depth of 128. Counts against the limit on locked memory (LimitMEMLOCK=).
const POOL_REGISTERED_BYTES: usize = 16 << 20;

/// Operations in flight on a core: two for each connection, and what its volumes have under way.
const RING_ENTRIES: u32 = 4096;

/// The same on a core of a target. All connections that a target takes (4,096) may be those of one
/// core, each with a receive and a send; without a place for its receive one would not be served.
const TARGET_RING_ENTRIES: u32 = 12_288;

/// How many cores a role gets if the operator does not say: the processors there are, shared with
/// the other role if this process has both, and no more than four, which serve more than a NIC.
pub fn default_count(roles: usize) -> u16 {
    let available = std::thread::available_parallelism().map_or(1, |count| count.get());
    (available / roles.max(1)).clamp(1, 4) as u16
}

/// The usual configuration of a core.
pub fn core_config() -> CoreConfig {
    CoreConfig { entries: RING_ENTRIES, pool_bytes: POOL_BYTES, ..CoreConfig::default() }
}

/// The configuration of a core that emulates devices, for guests nobody has to trust. It looks for
/// work for up to `busy_poll_us` microseconds before it sleeps.
pub fn emulator_config(busy_poll_us: Option<u16>) -> CoreConfig {
    CoreConfig { restricted: true, ..looking(busy_poll_us) }
}

fn looking(busy_poll_us: Option<u16>) -> CoreConfig {
    let config = core_config();
    let spin = busy_poll_us.map_or(config.spin, |micros| Duration::from_micros(micros.into()));
    CoreConfig { spin, ..config }
}

/// The configuration of a core that serves volumes: files and block devices read and write a little
/// of its pool at less cost. `busy_poll_us` as for [`emulator_config`].
pub fn target_config(busy_poll_us: Option<u16>) -> CoreConfig {
    CoreConfig {
        entries: TARGET_RING_ENTRIES,
        pool_registered_bytes: POOL_REGISTERED_BYTES,
        ..looking(busy_poll_us)
    }
}

/// Why the cores could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CoresError {
    /// The ring or its memory was refused; the text says what to do.
    #[error("{}", chain(.0))]
    Setup(SetupError),
    /// No thread.
    #[error(
        "cannot start a thread: {0}; raise the limit on processes (ulimit -u) or give fewer cores"
    )]
    Thread(std::io::Error),
    /// A core does not take messages.
    #[error("core {0} does not answer")]
    Silent(String),
}

/// The error and its source in one line.
fn chain(error: &SetupError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Running cores. Dropping them stops them and waits for their tasks.
#[derive(Debug)]
pub struct Cores {
    name: &'static str,
    handles: Vec<CoreHandle>,
    threads: Vec<JoinHandle<()>>,
}

/// Tells when a core's thread ends, also by a panic.
struct Farewell {
    name: String,
    ended: Option<Box<dyn Fn(String) + Send>>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if let Some(ended) = &self.ended {
            ended(std::mem::take(&mut self.name));
        }
    }
}

/// Runs `work` on a core and waits for its result. Not to be called on a core.
pub(crate) fn on<T: Send + 'static>(
    handle: &CoreHandle,
    work: impl FnOnce(&mut Spawner<'_>) -> T + Send + 'static,
) -> Result<T, CoresError> {
    let silent = || CoresError::Silent("of the device".to_owned());
    let (sender, receiver) = mpsc::channel();
    let message = move |spawner: &mut Spawner<'_>| {
        // The caller waits for this.
        let _ = sender.send(work(spawner));
    };
    handle.post(Box::new(message)).map_err(|_| silent())?;
    receiver.recv().map_err(|_| silent())
}

impl Cores {
    /// Starts `count` cores and waits until each has its ring. `ended` is called with the name of a
    /// core whose thread ends, wanted or not.
    pub fn start(
        name: &'static str,
        count: u16,
        config: &CoreConfig,
        ended: impl Fn(String) + Send + Clone + 'static,
    ) -> Result<Cores, CoresError> {
        let mut cores = Cores { name, handles: Vec::new(), threads: Vec::new() };
        for index in 0..count {
            let (ready, wait) = mpsc::channel();
            let config = config.clone();
            let farewell =
                Farewell { name: format!("{name}-{index}"), ended: Some(Box::new(ended.clone())) };
            let body = move || {
                let mut farewell = farewell;
                match Core::new(config) {
                    Ok(mut core) => {
                        // The starter waits for this; it cannot be gone.
                        let _ = ready.send(Ok(core.handle()));
                        core.run();
                    }
                    Err(error) => {
                        farewell.ended = None;
                        let _ = ready.send(Err(error));
                    }
                }
            };
            let thread = std::thread::Builder::new()
                .name(format!("{name}-{index}"))
                .spawn(body)
                .map_err(CoresError::Thread)?;
            cores.threads.push(thread);
            match wait.recv() {
                Ok(Ok(handle)) => cores.handles.push(handle),
                Ok(Err(error)) => return Err(CoresError::Setup(error)),
                Err(_) => return Err(CoresError::Silent(format!("{name}-{index}"))),
            }
        }
        Ok(cores)
    }

    /// Handles of the cores, in order.
    pub fn handles(&self) -> &[CoreHandle] {
        &self.handles
    }

    /// Runs `work` on core `index` and waits for its result. Not to be called on a core.
    pub fn on<T: Send + 'static>(
        &self,
        index: usize,
        work: impl FnOnce(&mut Spawner<'_>) -> T + Send + 'static,
    ) -> Result<T, CoresError> {
        let silent = || CoresError::Silent(format!("{}-{index}", self.name));
        let handle = self.handles.get(index).ok_or_else(silent)?;
        on(handle, work).map_err(|_| silent())
    }

    /// Asks the tasks to finish and waits until they have. `false` if a core ended by a panic.
    pub fn stop(mut self) -> bool {
        self.finish()
    }

    fn finish(&mut self) -> bool {
        for handle in &self.handles {
            handle.stop();
        }
        let mut good = true;
        for thread in self.threads.drain(..) {
            good &= thread.join().is_ok();
        }
        good
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_roles_look_for_work_as_long_as_they_are_told() {
        let usual = CoreConfig::default().spin;
        for (told, spin) in
            [(None, usual), (Some(0), Duration::ZERO), (Some(10_000), Duration::from_millis(10))]
        {
            assert_eq!(target_config(told).spin, spin);
            let emulator = emulator_config(told);
            assert_eq!((emulator.spin, emulator.restricted), (spin, true));
        }
    }
}
