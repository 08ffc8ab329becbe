//! The client's memory, as it is mapped and unmapped for the device.
//!
//! The table is bounded twice: every map costs a row here, and every map with a file costs a
//! mapping of this process, of which the kernel allows some 65,000 for all devices together
//! (`vm.max_map_count`).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use iobuf::{GuestMemory, GuestRegion};
use rustix::io::Errno;

use super::wire::DmaMap;

/// Most maps, our `max_dma_maps`.
pub const MAPS_MAX: usize = 8192;

/// One map.
#[derive(Debug)]
pub struct Map {
    /// What the client said.
    pub request: DmaMap,
    /// The file behind it, to be handed to a successor of this process; None: the device cannot
    /// reach it, which is so for ROMs and for the doorbell page itself.
    pub file: Option<File>,
    region: Option<Arc<GuestRegion>>,
}

/// A file of the client.
#[derive(Clone, Debug)]
pub struct File {
    /// Under which key it is handed over.
    pub key: u64,
    /// The file.
    pub fd: Arc<OwnedFd>,
}

/// All maps of a client, by guest address.
#[derive(Debug, Default)]
pub struct Table {
    maps: BTreeMap<u64, Map>,
}

impl Table {
    /// Number of maps.
    pub fn len(&self) -> usize {
        self.maps.len()
    }

    /// Nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// All maps, by ascending address.
    pub fn iter(&self) -> impl Iterator<Item = &Map> {
        self.maps.values()
    }

    /// Whether there is a map just like this one.
    pub fn has(&self, request: &DmaMap) -> bool {
        self.maps.get(&request.address).is_some_and(|map| map.request == *request)
    }

    /// Add a map. True if the device's memory has changed by it.
    pub fn map(&mut self, request: DmaMap, file: Option<File>) -> Result<bool, Errno> {
        let DmaMap { flags, offset, address, size, .. } = request;
        let last = size.checked_sub(1).and_then(|more| address.checked_add(more));
        let last = last.ok_or(Errno::INVAL)?;
        if flags & !(DmaMap::READ | DmaMap::WRITE) != 0 {
            return Err(Errno::INVAL);
        }
        // "A command to map over an existing region must be failed by the server with EEXIST."
        let below = self.maps.range(..=last).next_back();
        if below.is_some_and(|(_, map)| map.request.address + (map.request.size - 1) >= address) {
            return Err(Errno::EXIST);
        }
        if self.maps.len() >= MAPS_MAX {
            return Err(Errno::NOSPC);
        }
        let is_reachable = flags & (DmaMap::READ | DmaMap::WRITE) != 0;
        let region = match &file {
            Some(file) if is_reachable => {
                let map = if flags & DmaMap::WRITE == 0 {
                    GuestRegion::map_read_only
                } else {
                    GuestRegion::map
                };
                let region = map(file.fd.as_fd(), offset, size, address, 0);
                Some(region.map_err(|error| {
                    error.raw_os_error().map_or(Errno::INVAL, Errno::from_raw_os_error)
                })?)
            }
            _ => None,
        };
        let has_changed = region.is_some();
        self.maps.insert(address, Map { request, file, region });
        Ok(has_changed)
    }

    /// Take a map away. It "must match exactly a previous mapping". True if the device's memory
    /// has changed by it. The map is given back so that its file is closed when nobody needs it.
    pub fn unmap(&mut self, address: u64, size: u64) -> Result<(Map, bool), Errno> {
        match self.maps.get(&address) {
            Some(map) if map.request.size == size => {
                let map = self.maps.remove(&address).expect("it was just there");
                let has_changed = map.region.is_some();
                Ok((map, has_changed))
            }
            _ => Err(Errno::NOENT),
        }
    }

    /// Take all maps away. True if the device's memory has changed by it.
    pub fn clear(&mut self) -> (Vec<Map>, bool) {
        let maps: Vec<Map> = std::mem::take(&mut self.maps).into_values().collect();
        let has_changed = maps.iter().any(|map| map.region.is_some());
        (maps, has_changed)
    }

    /// What the device can reach.
    pub fn memory(&self) -> GuestMemory {
        let regions = self.maps.values().filter_map(|map| map.region.clone()).collect();
        GuestMemory::new(regions).expect("maps do not overlap")
    }
}
