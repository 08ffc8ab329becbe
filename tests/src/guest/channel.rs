//! No guest and no device: the same loop over a [`block::Channel`], to see what a device adds.

use std::io;
use std::rc::Rc;

use block::{Busy, Channel, Io, Op};
use iobuf::GuestView;

use super::{BASE, DEPTH_MAX, Driver, IO_BYTES, Memory, broken};

/// A channel, driven as a disk.
pub struct ChannelDriver {
    channel: Box<dyn Channel>,
    view: Rc<GuestView>,
    #[expect(clippy::vec_box, reason = "the boxes move between here and the channel")]
    idle: Vec<Box<Io>>,
}

impl ChannelDriver {
    /// With data in `memory`, which has [`DEPTH_MAX`] times [`IO_BYTES`].
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn new(channel: Box<dyn Channel>, memory: &Memory) -> io::Result<ChannelDriver> {
        let idle = (0..DEPTH_MAX).map(|_| Box::new(Io::with_capacity(2))).collect();
        Ok(ChannelDriver { channel, view: memory.view()?, idle })
    }
}

impl Driver for ChannelDriver {
    fn issue(&mut self, slot: u16, offset: u64, write: bool) -> io::Result<()> {
        let mut io = self.idle.pop().ok_or_else(|| broken("a slot is used twice"))?;
        io.op = if write { Op::Write } else { Op::Read };
        (io.offset, io.len, io.tag, io.result) = (offset, IO_BYTES, slot.into(), Ok(()));
        let at = BASE + u64::from(slot) * IO_BYTES;
        self.view.append(&mut io.data, at, IO_BYTES).map_err(|error| broken(error.to_string()))?;
        self.channel.submit(io).map_err(|Busy(_)| broken("the channel is full"))
    }

    fn publish(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        let (idle, mut failed) = (&mut self.idle, None);
        self.channel.poll(&mut |mut io| {
            done.push(io.tag as u16);
            failed = failed.or(io.result.err());
            io.data.clear();
            idle.push(io);
        });
        match failed {
            Some(error) => Err(broken(format!("an I/O failed: {error:?}"))),
            None => Ok(()),
        }
    }
}
