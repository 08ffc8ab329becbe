//! Two devices on one core: what a greedy guest asks for does not make a modest one wait.
//!
//! Waiting is counted in turns of the core, and the greedy one's share in bytes of a turn: both are
//! the device's doing, whatever the machine is busy with.

use std::sync::mpsc;
use std::time::Duration;

use block::{Identity, VolumeSpec};
use it::guest::virtio::{VirtioDisk, VirtioDriver};
use it::guest::{DEPTH_MAX, Driver};
use reactor::{Core, CoreConfig, CoreHandle, Progress, Spawner, Task};
use virtio_blk::{DeviceConfig, DeviceHandle};

const GREEDY_BYTES: u32 = 256 << 10;
const VOLUME_BYTES: u64 = 64 << 20;
/// Requests of the modest guest, one at a time.
const REQUESTS: u32 = 500;

#[derive(Debug, Default)]
struct Seen {
    /// Most turns that a request of the modest guest took.
    turns_max: u32,
    /// Most requests of the greedy guest that were done in a turn.
    greedy_max: usize,
    greedy_total: usize,
    modest_total: u32,
}

/// Both guests, on the devices' core, so that each turn of the core is one of theirs.
struct Guests {
    greedy: VirtioDriver,
    modest: VirtioDriver,
    is_begun: bool,
    turns: u32,
    done: Vec<u16>,
    seen: Seen,
    result: mpsc::Sender<Seen>,
}

impl Guests {
    fn turn(&mut self) -> std::io::Result<bool> {
        self.done.clear();
        self.greedy.reap(&mut self.done)?;
        if !self.is_begun {
            self.done.extend(0..DEPTH_MAX);
        } else {
            self.seen.greedy_max = self.seen.greedy_max.max(self.done.len());
            self.seen.greedy_total += self.done.len();
        }
        for (nth, slot) in self.done.drain(..).enumerate() {
            let offset = (nth as u64 * u64::from(GREEDY_BYTES)) % VOLUME_BYTES;
            self.greedy.issue(slot, offset, false)?;
        }
        self.greedy.publish()?;

        self.turns += 1;
        self.modest.reap(&mut self.done)?;
        if self.done.is_empty() && self.is_begun {
            return Ok(false);
        }
        if self.is_begun {
            self.seen.turns_max = self.seen.turns_max.max(self.turns);
            self.seen.modest_total += 1;
        }
        (self.turns, self.is_begun) = (0, true);
        self.modest.issue(0, 0, self.seen.modest_total.is_multiple_of(2))?;
        self.modest.publish()?;
        Ok(self.seen.modest_total == REQUESTS)
    }
}

impl Task for Guests {
    fn poll(&mut self, _: Duration) -> Progress {
        if self.turn().expect("both devices go on") {
            let _ = self.result.send(std::mem::take(&mut self.seen));
            return Progress::Done;
        }
        Progress::Worked
    }
}

fn disk(
    name: &str,
    folder: &std::path::Path,
    core: &CoreHandle,
) -> (DeviceHandle, std::path::PathBuf) {
    let socket = folder.join(name);
    let spec: VolumeSpec = format!("ram:{VOLUME_BYTES}").parse().expect("a volume");
    let volume = spec.open(Identity::from_uuid([name.len() as u8; 16])).expect("memory");
    let config = DeviceConfig { queue_size_max: 1024, ..DeviceConfig::new(name, &socket) };
    (virtio_blk::serve(config, volume, vec![core.clone()]).expect("a socket"), socket)
}

#[test]
fn a_greedy_guest_leaves_a_modest_one_its_share() {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut core = Core::new(CoreConfig::default()).unwrap();
        sender.send(core.handle()).unwrap();
        core.run();
    });
    let core = receiver.recv().unwrap();
    let folder = tempfile::tempdir().unwrap();
    // The greedy one is the first of each turn.
    let (greedy_device, greedy) = disk("greedy", folder.path(), &core);
    let (modest_device, modest) = disk("modest one", folder.path(), &core);
    let greedy = VirtioDisk::attach_for(&greedy, GREEDY_BYTES).unwrap();
    let modest = VirtioDisk::attach(&modest).unwrap();
    let (result, seen) = mpsc::channel();
    let start = move |spawner: &mut Spawner<'_>| {
        spawner.spawn(Box::new(Guests {
            greedy: greedy.driver().unwrap(),
            modest: modest.driver().unwrap(),
            is_begun: false,
            turns: 0,
            done: Vec::new(),
            seen: Seen::default(),
            result,
        }));
    };
    assert!(core.post(Box::new(start)).is_ok());
    let seen = seen.recv_timeout(Duration::from_secs(60)).unwrap();
    // In the turn after the one it was issued in.
    assert!(seen.turns_max <= 2, "{seen:?}");
    // 512 KiB a turn, and whatever was begun within them.
    assert!(seen.greedy_max <= 3, "{seen:?}");
    // And it does get them.
    assert!(seen.greedy_total >= REQUESTS as usize, "{seen:?}");
    greedy_device.stop();
    modest_device.stop();
    core.stop();
    thread.join().unwrap();
}
