//! What the integration tests share: a core that is turned until something holds.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![allow(unsafe_code, reason = "one system call")]

pub(crate) mod xor;

use std::io;
use std::time::{Duration, Instant};

use iobuf::SgList;
use reactor::{Completion, Core, CoreConfig, Errno, Local, Outcome, Port, Progress, Task};

/// Longest time that anything here may take; far more than it does.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Wakes its core now and then, so that a wait that would last for ever fails instead.
struct Watchdog(Duration);

impl Task for Watchdog {
    fn poll(&mut self, now: Duration) -> Progress {
        if now < self.0 {
            return Progress::Idle;
        }
        self.0 = now + Duration::from_millis(50);
        Progress::Worked
    }

    fn deadline(&self) -> Option<Duration> {
        Some(self.0)
    }
}

pub(crate) fn small() -> CoreConfig {
    CoreConfig {
        entries: 64,
        spin: Duration::ZERO,
        rx_buffers: 4,
        rx_buffer_bytes: 16 << 10,
        pool_bytes: 4 << 20,
        mailbox_depth: 16,
        ..CoreConfig::default()
    }
}

pub(crate) fn core_with(config: CoreConfig) -> Core {
    let mut core = match Core::new(config) {
        Ok(core) => core,
        Err(error) => panic!("these tests need io_uring: {error}"),
    };
    core.spawn(Box::new(Watchdog(Duration::ZERO)));
    core
}

pub(crate) fn core() -> Core {
    core_with(small())
}

/// Turns the core until `f` gives something.
pub(crate) fn until<T>(core: &mut Core, mut f: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = f() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "it does not happen");
        core.turn(true);
    }
}

/// The next completion of a port.
pub(crate) fn next(core: &mut Core, port: &mut Port) -> Completion {
    until(core, || port.next())
}

/// The bytes that the completion says were moved, and its token.
pub(crate) fn bytes(completion: Completion) -> (u64, u32) {
    match completion.result {
        Ok(Outcome::Bytes(bytes)) => (completion.token, bytes),
        other => panic!("not bytes: {other:?}"),
    }
}

pub(crate) fn errno(completion: Completion) -> (u64, Errno) {
    match completion.result {
        Err(errno) => (completion.token, errno),
        other => panic!("not an error: {other:?}"),
    }
}

/// A list of pool memory that holds `content`.
pub(crate) fn list(local: &Local, content: &[u8]) -> SgList {
    let mut sg = SgList::default();
    local.pool().alloc(content.len(), &mut sg).unwrap();
    sg.copy_from_slice(0, content).unwrap();
    sg
}

pub(crate) fn content(sg: &SgList) -> Vec<u8> {
    let mut bytes = vec![0; sg.len()];
    sg.copy_to_slice(0, &mut bytes).unwrap();
    bytes
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Processor time of the calling thread.
pub(crate) fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer names `time`.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
