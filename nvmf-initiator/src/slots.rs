//! The commands of an admin queue: what they send, and the data that comes back.

use iobuf::SgList;
use nvme::host::AdminCommand;
use nvme::tcp::Transfer;
use reactor::Local;

use crate::link::{Link, Loss};

/// Longest data of an admin command, in either direction (Identify, log pages).
const DATA_BYTES: usize = 4096;

/// A command on the queue; its place is its tag and cid.
struct Slot {
    data: Vec<u8>,
    read_len: usize,
    received: usize,
}

/// See the [module](self).
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// Data of Connect or of an authentication; no other command here sends any.
    write_data: SgList,
}

impl Slots {
    /// For commands with tags below `count`.
    pub(crate) fn new(count: u16) -> Slots {
        let slot = |_| Slot { data: vec![0; DATA_BYTES], read_len: 0, received: 0 };
        Slots { slots: (0..count).map(slot).collect(), write_data: SgList::with_capacity(1) }
    }

    /// Queues a command. The link must have room.
    pub(crate) fn send(
        &mut self,
        command: &AdminCommand,
        link: &mut Link,
        local: &Local,
    ) -> Result<(), Loss> {
        let read_len = command.read_len as usize;
        let slot = self.slots.get_mut(usize::from(command.tag));
        let Some(slot) = slot.filter(|slot| read_len <= slot.data.len()) else {
            return Err(Loss::Command("an admin command too big".to_owned()));
        };
        (slot.read_len, slot.received) = (read_len, 0);
        let Some(data) = &command.write else {
            let transfer = match command.read_len {
                0 => Transfer::None,
                len => Transfer::Read { len },
            };
            let head = link.host.command(command.tag, &command.sqe, transfer);
            return link.push(&head, None, None);
        };
        let no_memory = || Loss::Command("the core's buffer pool is exhausted".to_owned());
        local.pool().alloc(data.len(), &mut self.write_data).map_err(|_| no_memory())?;
        self.write_data.copy_from_slice(0, data).map_err(|_| no_memory())?;
        let transfer = Transfer::Write { len: data.len() as u32, in_capsule: true };
        let head = link.host.command(command.tag, &command.sqe, transfer);
        // The stream keeps the memory until it is sent, so the list may be used for something else.
        link.push(&head, Some((&self.write_data, 0, data.len())), None)?;
        self.write_data.clear();
        Ok(())
    }

    /// A piece of a command's data has come.
    pub(crate) fn on_data(&mut self, cid: u16, offset: u32, bytes: &[u8]) -> Result<(), Loss> {
        let start = offset as usize;
        let end = start + bytes.len();
        // The qpair machine lets no byte through that the command did not ask for.
        let slot = self.slots.get_mut(usize::from(cid));
        let place = slot.and_then(|slot| {
            slot.received = end;
            slot.data.get_mut(start..end)
        });
        let Some(place) = place else {
            return Err(Loss::Command("data for no buffer".to_owned()));
        };
        place.copy_from_slice(bytes);
        Ok(())
    }

    /// The data of a command that is complete.
    pub(crate) fn data(&self, cid: u16) -> &[u8] {
        match self.slots.get(usize::from(cid)) {
            Some(slot) => &slot.data[..slot.received.min(slot.read_len)],
            None => &[],
        }
    }
}
