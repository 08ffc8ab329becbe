//! Serve a local volume as a virtio-blk device, for trying frontends and measuring.
//!
//! ```text
//! cargo run --release -p virtio-blk --example serve_virtio_blk -- ram:64M /tmp/disk.sock [QUEUES [CORES]]
//! ```
//!
//! Runs until its standard input ends.

use std::error::Error;
use std::io::Read;
use std::sync::mpsc;
use std::thread;

use block::{Identity, VolumeSpec};
use reactor::{Core, CoreConfig, CoreHandle};
use virtio_blk::DeviceConfig;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [spec, socket, numbers @ ..] = arguments.as_slice() else {
        return Err("usage: serve VOLUME SOCKET [QUEUES [CORES]]".into());
    };
    let number = |at: usize| numbers.get(at).map_or(Ok(1), |text| text.parse::<u16>());
    let (queues, cores) = (number(0)?, usize::from(number(1)?));

    let volume = spec.parse::<VolumeSpec>()?.open(Identity::from_uuid([1; 16]))?;
    let mut handles = Vec::new();
    let mut threads = Vec::new();
    for index in 0..cores {
        let (sender, receiver) = mpsc::channel();
        threads.push(thread::spawn(move || {
            let core = Core::new(CoreConfig { pin_to: Some(index), ..CoreConfig::default() });
            let handle = core.as_ref().map(Core::handle).map_err(ToString::to_string);
            let is_alive = handle.is_ok() && sender.send(handle).is_ok();
            if let (Ok(mut core), true) = (core, is_alive) {
                core.run();
            }
        }));
        handles.push(receiver.recv()??);
    }

    let config =
        DeviceConfig { queues, queue_size_max: 1024, ..DeviceConfig::new("example", socket) };
    let device = virtio_blk::serve(config, volume, handles.clone())?;
    println!("serving {spec} on {socket}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    for queue in device.state()?.queues {
        println!("{queue:?}");
    }
    device.stop();
    handles.iter().for_each(CoreHandle::stop);
    for thread in threads {
        thread.join().map_err(|_| "a core has panicked")?;
    }
    Ok(())
}
