//! A device in this process, without a transport: the host calls the function itself.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use block::Volume;

use super::host::{Bus, TestHost};
use crate::function::{Event, Function, Irq, Region, Step};
use crate::vfio_user::server::ClientState;
use crate::{AttachError, Device, DeviceState};

/// How long a call or an answer may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A device, and what a transport would remember of it.
pub struct Direct {
    /// The function.
    pub device: Device,
    /// It may say that it has failed.
    pub may_fail: bool,
    /// It has said that it has failed.
    pub has_failed: bool,
    waits: bool,
}

impl Direct {
    /// Without memory, eventfds and client.
    pub fn new(device: Device) -> Direct {
        Direct { device, may_fail: false, has_failed: false, waits: false }
    }

    /// Hears what the function has to say.
    pub fn pump(&mut self) {
        while let Some(said) = self.device.poll() {
            match said {
                Event::Done => self.waits = false,
                Event::Failed => {
                    assert!(self.may_fail, "the function has failed");
                    self.has_failed = true;
                }
            }
        }
    }

    /// Waits until a call is done.
    pub fn finish(&mut self, step: Step) {
        self.waits = step == Step::Pending;
        self.until("end of a call", |direct| !direct.waits);
    }

    fn until(&mut self, what: &str, mut is_true: impl FnMut(&mut Direct) -> bool) {
        let end = Instant::now() + LIMIT;
        while !is_true(self) {
            assert!(Instant::now() < end, "no {what}");
            self.pump();
            thread::yield_now();
        }
    }

    fn answer<T>(&mut self, what: &str, receiver: &mpsc::Receiver<T>) -> T {
        let mut found = None;
        self.until(what, |_| {
            found = receiver.try_recv().ok();
            found.is_some()
        });
        found.expect("just found")
    }

    /// What the device is doing.
    pub fn state(&mut self) -> DeviceState {
        let (sender, receiver) = mpsc::channel();
        self.device.ask_state(ClientState::default(), sender);
        self.answer("state", &receiver)
    }

    /// Attaches a volume, as an operator does.
    ///
    /// # Errors
    /// What the operator would be told.
    pub fn attach(&mut self, nsid: u32, volume: Arc<dyn Volume>) -> Result<(), AttachError> {
        let (sender, receiver) = mpsc::channel();
        self.device.attach_namespace(nsid, volume)?;
        self.device.tell_when_done(sender);
        self.answer("word of the volume", &receiver)
    }

    /// Detaches a namespace and waits for it.
    pub fn detach(&mut self, nsid: u32) {
        let (sender, receiver) = mpsc::channel();
        if self.device.detach_namespace(nsid).is_ok() {
            self.device.tell_when_done(sender);
            self.answer("end of the namespace", &receiver).expect("others stay as they are");
        }
    }
}

impl Bus for Direct {
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        self.pump();
        self.device.read(region, offset, data);
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        self.pump();
        let step = self.device.write(region, offset, data);
        self.finish(step);
    }

    fn idle(&mut self) {
        self.pump();
    }
}

impl TestHost<Direct> {
    /// Gives the device memory and eventfds, and enables the function.
    pub fn plug_in(&mut self) {
        let step = self.bus.device.set_memory(&self.memory, false);
        self.bus.finish(step);
        for (vector, eventfd) in (0..).zip(&self.vectors) {
            let eventfd = eventfd.try_clone().expect("a file descriptor");
            self.bus.device.set_trigger(Irq::Msix, vector, Some(Arc::new(eventfd)));
        }
        self.enable_function();
    }
}
