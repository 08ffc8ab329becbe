//! Serve local volumes as an NVMe controller, for trying clients and measuring.
//!
//! ```text
//! cargo run --release -p nvme-pci --example serve_nvme -- trapped|mapped /tmp/nvme.sock ram:64M [VOLUME..]
//! ```
//!
//! Runs on one core until its standard input ends; then it tells what it did. A line `attach NSID
//! VOLUME` or `detach NSID` changes the namespaces.

use std::error::Error;
use std::io::BufRead;
use std::sync::{Arc, mpsc};
use std::thread;

use block::{Identity, Volume, VolumeSpec};
use nvme_pci::{DeviceConfig, Doorbells};
use reactor::{Core, CoreConfig, CoreHandle};

fn open(spec: &str, nsid: u32) -> Result<Arc<dyn Volume>, Box<dyn Error>> {
    Ok(spec.parse::<VolumeSpec>()?.open(Identity::from_uuid([nsid as u8; 16]))?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [doorbells, socket, specs @ ..] = arguments.as_slice() else {
        return Err("usage: serve trapped|mapped SOCKET VOLUME [VOLUME..]".into());
    };
    let doorbells = match doorbells.as_str() {
        "mapped" => Doorbells::Mapped,
        _ => Doorbells::Trapped,
    };
    let mut volumes = Vec::new();
    for (nsid, spec) in (1..).zip(specs) {
        volumes.push((nsid, open(spec, nsid)?));
    }

    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        let core = Core::new(CoreConfig { pin_to: Some(0), ..CoreConfig::default() });
        let handle = core.as_ref().map(Core::handle).map_err(ToString::to_string);
        let is_alive = handle.is_ok() && sender.send(handle).is_ok();
        if let (Ok(mut core), true) = (core, is_alive) {
            core.run();
        }
    });
    let cores: Vec<CoreHandle> = vec![receiver.recv()??];

    let config = DeviceConfig { doorbells, ..DeviceConfig::new("example", socket) };
    let device = nvme_pci::serve(config, volumes, &cores)?;
    println!("serving {specs:?} on {socket}");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["attach", nsid, spec] => {
                let nsid = nsid.parse()?;
                println!("{:?}", device.attach(nsid, open(spec, nsid)?));
            }
            ["detach", nsid] => println!("{:?}", device.detach(nsid.parse()?)),
            ["unplug"] => println!("{}", device.unplug()),
            _ => println!("{:#?}", device.state()?),
        }
    }
    println!("{:#?}", device.state()?);
    device.stop();
    cores.iter().for_each(CoreHandle::stop);
    thread.join().map_err(|_| "a core has panicked")?;
    Ok(())
}
