//! What the device is: the features it offers and its configuration space
//! (Virtual I/O Device 1.2, section 5.2).
//!
//! Built once from a volume's geometry and read by every session and queue. Nothing here knows
//! how the bytes travel.

use block::{Geometry, Identity, Wear};
use virtio_bindings::{virtio_blk as blk, virtio_config as config, virtio_ring as ring};

/// The unit of every sector number and capacity of this device, whatever the block size is
/// (Virtual I/O Device 1.2, section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;
/// Most data segments the device accepts in one request, announced as `seg_max`.
pub const SEG_MAX: u32 = 126;
/// Most segments of one discard or write zeroes request, announced as `max_discard_seg` and
/// `max_write_zeroes_seg`.
pub const RANGES_MAX: usize = 16;
/// Most I/Os that one request is cut into when it is longer than the volume takes at once.
/// Enough for `SEG_MAX` segments of a page each on a volume that takes one page at once.
pub const PARTS_MAX: usize = 128;
/// Length of the answer to a GET_ID request.
pub const ID_BYTES: usize = blk::VIRTIO_BLK_ID_BYTES as usize;
/// Length of the answer to a GET_LIFETIME request.
pub const LIFETIME_BYTES: usize = 6;
/// Length of the configuration space as this device fills it. A driver that asks beyond reads
/// zeros, up to [`CONFIG_BYTES_MAX`].
pub const CONFIG_BYTES: usize = 60;
/// Most bytes of configuration space that can be asked for; what a vhost-user message can carry.
pub const CONFIG_BYTES_MAX: usize = 256;
/// Offset of `writeback`, the one field a driver may write.
pub const CONFIG_WRITEBACK_OFFSET: usize = 32;

const DISCARD_BYTES_MAX: u64 = 1 << 30;
/// Not longer than 65,536 blocks of 512 bytes, which one NVMe Write Zeroes command can carry.
const WRITE_ZEROES_BYTES_MAX: u64 = 32 << 20;

/// Feature bits, by the names of the specification.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Maximum size of any single segment is in `size_max`.
    pub const SIZE_MAX: Features = Features::bit(blk::VIRTIO_BLK_F_SIZE_MAX);
    /// Maximum number of segments in a request is in `seg_max`.
    pub const SEG_MAX: Features = Features::bit(blk::VIRTIO_BLK_F_SEG_MAX);
    /// Device is read-only.
    pub const RO: Features = Features::bit(blk::VIRTIO_BLK_F_RO);
    /// Block size of the disk is in `blk_size`.
    pub const BLK_SIZE: Features = Features::bit(blk::VIRTIO_BLK_F_BLK_SIZE);
    /// Cache flush command support.
    pub const FLUSH: Features = Features::bit(blk::VIRTIO_BLK_F_FLUSH);
    /// Device exports information on optimal I/O alignment.
    pub const TOPOLOGY: Features = Features::bit(blk::VIRTIO_BLK_F_TOPOLOGY);
    /// Device can toggle its cache between writeback and writethrough modes.
    pub const CONFIG_WCE: Features = Features::bit(blk::VIRTIO_BLK_F_CONFIG_WCE);
    /// Device supports multiqueue.
    pub const MQ: Features = Features::bit(blk::VIRTIO_BLK_F_MQ);
    /// Device can support discard command.
    pub const DISCARD: Features = Features::bit(blk::VIRTIO_BLK_F_DISCARD);
    /// Device can support write zeroes command.
    pub const WRITE_ZEROES: Features = Features::bit(blk::VIRTIO_BLK_F_WRITE_ZEROES);
    /// Device supports providing storage lifetime information.
    pub const LIFETIME: Features = Features::bit(15);
    /// The driver can use descriptors with the INDIRECT flag set.
    pub const INDIRECT_DESC: Features = Features::bit(ring::VIRTIO_RING_F_INDIRECT_DESC);
    /// `used_event` and `avail_event` fields are used.
    pub const EVENT_IDX: Features = Features::bit(ring::VIRTIO_RING_F_EVENT_IDX);
    /// VHOST_USER_F_PROTOCOL_FEATURES: the vhost-user protocol features can be negotiated.
    /// It shares the word with the device's own bits and never reaches a driver.
    pub const PROTOCOL_FEATURES: Features = Features::bit(30);
    /// Compliance with version 1 of the specification.
    pub const VERSION_1: Features = Features::bit(config::VIRTIO_F_VERSION_1);

    /// VHOST_F_LOG_ALL: mark pages that are written. As the one before, it never reaches a driver.
    pub const LOG_ALL: Features = Features::bit(26);
    /// Support for the packed virtqueue layout.
    pub const RING_PACKED: Features = Features::bit(config::VIRTIO_F_RING_PACKED);

    const fn bit(bit: u32) -> Features {
        Features(1 << bit)
    }

    /// Without the bits that are between frontend and device.
    pub const fn for_driver(self) -> Features {
        self.without(Features(Features::PROTOCOL_FEATURES.0 | Features::LOG_ALL.0))
    }

    /// Whether all bits of `other` are set.
    pub const fn has(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits that are set here and not in `other`.
    pub const fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }
}

impl std::ops::BitOr for Features {
    type Output = Features;

    fn bitor(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for Features {
    fn bitor_assign(&mut self, other: Features) {
        self.0 |= other.0;
    }
}

impl std::fmt::Debug for Features {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What the owner of the device chooses; the rest follows from the volume.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Number of virtqueues.
    pub queues: u16,
    /// Answer to GET_ID: up to 20 ASCII characters. Empty: the volume's serial number.
    pub serial: String,
    /// Refuse everything that changes the volume, even if the volume itself allows it.
    pub read_only: bool,
}

/// A virtio-blk device as its driver sees it.
#[derive(Clone, Debug)]
pub struct Device {
    features: Features,
    config: [u8; CONFIG_BYTES],
    limits: Limits,
    queues: u16,
    block_bytes: u64,
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Length of the volume.
    pub capacity_bytes: u64,
    /// Writes, discards and write zeroes are refused.
    pub read_only: bool,
    /// Longest I/O that the volume takes; a longer request is cut.
    pub io_bytes_max: u64,
    /// Longest range of a discard request.
    pub discard_bytes_max: u64,
    /// Longest range of a write zeroes request.
    pub write_zeroes_bytes_max: u64,
    /// Answer to GET_ID, padded with NUL.
    pub serial: [u8; ID_BYTES],
    /// Answer to GET_LIFETIME, where the volume knows.
    pub lifetime: Option<[u8; LIFETIME_BYTES]>,
}

impl Device {
    /// Describe a device over a volume.
    pub fn new(geometry: &Geometry, identity: &Identity, options: &DeviceOptions) -> Device {
        let block_bytes = u64::from(geometry.block_bytes.max(512));
        let capacity_bytes = geometry.blocks.saturating_mul(block_bytes);
        let read_only = geometry.read_only || options.read_only;
        // A cut must fall on a block boundary.
        let io_bytes_max =
            (u64::from(geometry.io_bytes_max) / block_bytes * block_bytes).max(block_bytes);
        let limits = Limits {
            capacity_bytes,
            read_only,
            io_bytes_max,
            discard_bytes_max: DISCARD_BYTES_MAX,
            write_zeroes_bytes_max: WRITE_ZEROES_BYTES_MAX,
            serial: serial(&options.serial, identity),
            lifetime: None,
        };

        let mut features = Features::VERSION_1
            | Features::RING_PACKED
            | Features::LOG_ALL
            | Features::INDIRECT_DESC
            | Features::EVENT_IDX
            | Features::PROTOCOL_FEATURES
            | Features::SIZE_MAX
            | Features::SEG_MAX
            | Features::BLK_SIZE
            | Features::TOPOLOGY
            | Features::FLUSH
            | Features::CONFIG_WCE
            | Features::MQ;
        if read_only {
            features |= Features::RO;
        } else {
            if geometry.deallocate {
                features |= Features::DISCARD;
            }
            if geometry.write_zeroes {
                features |= Features::WRITE_ZEROES;
            }
        }

        let mut device = Device {
            features,
            config: [0; CONFIG_BYTES],
            limits,
            queues: options.queues,
            block_bytes,
        };
        device.fill_config(geometry);
        device
    }

    /// The same device, which tells its driver how worn the volume is. A volume that knows, whatever it
    /// says, makes the feature; it stays.
    #[must_use]
    pub fn with_lifetime(mut self, wear: Option<Wear>) -> Device {
        if wear.is_some() {
            self.features |= Features::LIFETIME;
        }
        self.limits.lifetime = wear.map(|wear| lifetime(&wear));
        self
    }

    /// The same with what is known of the wear now. What was offered stays.
    #[must_use]
    pub fn worn(mut self, wear: Option<Wear>) -> Device {
        self.limits.lifetime = wear.map(|wear| lifetime(&wear));
        self
    }

    /// The same device over a volume that has another size now. What was offered stays, and so does
    /// the block size: a volume with another one is none that a driver could go on with.
    pub fn resized(&self, geometry: &Geometry, options: &DeviceOptions) -> Option<Device> {
        let block_bytes = u64::from(geometry.block_bytes.max(512));
        if block_bytes != self.block_bytes {
            return None;
        }
        let mut device = self.clone();
        device.limits.capacity_bytes = geometry.blocks.saturating_mul(block_bytes);
        device.limits.read_only = geometry.read_only || options.read_only;
        let io_bytes_max = u64::from(geometry.io_bytes_max) / block_bytes * block_bytes;
        device.limits.io_bytes_max = io_bytes_max.max(block_bytes);
        device.config = [0; CONFIG_BYTES];
        device.fill_config(geometry);
        Some(device)
    }

    /// Whether a driver could not tell it from `other`.
    pub fn is_alike(&self, other: &Device) -> bool {
        self.config == other.config && self.limits == other.limits
    }

    /// Every bit that may be negotiated, those of vhost-user included.
    pub fn features(&self) -> Features {
        self.features
    }

    /// What requests are checked against.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Number of virtqueues.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Whether `writeback` reads 1 before a driver has written it.
    pub fn write_cache(&self) -> bool {
        self.config[CONFIG_WRITEBACK_OFFSET] == 1
    }

    /// Copy configuration space from `offset` into `out`; zeros beyond what the device defines,
    /// because a driver may know a longer structure than this device fills. `writeback` is the
    /// current value of that field.
    ///
    /// False, with `out` unspecified, when the range ends beyond [`CONFIG_BYTES_MAX`].
    #[must_use]
    pub fn read_config(&self, offset: usize, writeback: bool, out: &mut [u8]) -> bool {
        let Some(end) = offset.checked_add(out.len()) else { return false };
        if end > CONFIG_BYTES_MAX {
            return false;
        }
        for (at, byte) in (offset..).zip(out.iter_mut()) {
            *byte = match at {
                CONFIG_WRITEBACK_OFFSET => u8::from(writeback),
                _ => self.config.get(at).copied().unwrap_or(0),
            };
        }
        true
    }

    /// `struct virtio_blk_config` (Virtual I/O Device 1.2, section 5.2.4), little endian.
    fn fill_config(&mut self, geometry: &Geometry) {
        let block_bytes = u64::from(geometry.block_bytes.max(512));
        let limits = self.limits;
        let physical_bytes = u64::from(geometry.physical_block_bytes).max(block_bytes);
        let physical_block_exp = (physical_bytes / block_bytes).checked_ilog2().unwrap_or(0);
        let physical_blocks = u16::try_from(physical_bytes / block_bytes).unwrap_or(1);
        let discard_alignment = u64::from(geometry.deallocate_granularity_bytes).max(block_bytes);
        let seg_bytes_max =
            limits.io_bytes_max.saturating_mul(PARTS_MAX as u64) / u64::from(SEG_MAX);
        // Pages are what drivers merge into segments.
        let size_max = (seg_bytes_max / 4096 * 4096).clamp(4096, 1 << 22);

        let config = &mut self.config;
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &(limits.capacity_bytes / SECTOR_BYTES).to_le_bytes());
        put(8, &(size_max as u32).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(block_bytes as u32).to_le_bytes());
        put(24, &[physical_block_exp as u8]);
        put(26, &physical_blocks.to_le_bytes());
        put(CONFIG_WRITEBACK_OFFSET, &[u8::from(geometry.write_cache)]);
        put(34, &self.queues.to_le_bytes());
        if self.features.has(Features::DISCARD) {
            put(36, &((limits.discard_bytes_max / SECTOR_BYTES) as u32).to_le_bytes());
            put(40, &(RANGES_MAX as u32).to_le_bytes());
            put(44, &((discard_alignment / SECTOR_BYTES) as u32).to_le_bytes());
        }
        if self.features.has(Features::WRITE_ZEROES) {
            put(48, &((limits.write_zeroes_bytes_max / SECTOR_BYTES) as u32).to_le_bytes());
            put(52, &(RANGES_MAX as u32).to_le_bytes());
            let may_unmap = geometry.deallocate && geometry.deallocated_reads_zero;
            put(56, &[u8::from(may_unmap)]);
        }
    }
}

/// `struct virtio_blk_lifetime` (Virtual I/O Device 1.3, section 5.2.6), whose fields are those of
/// JEDEC eMMC 5.1: PRE_EOL_INFO says how much of the reserved blocks is consumed (1: normal, 2: 80 %,
/// 3: 90 %), DEVICE_LIFE_TIME_EST the life used in steps of 10 % (1: up to 10 %, .. 11: all of it).
/// What a volume knows is about all of its cells, so that both estimates say it.
fn lifetime(wear: &Wear) -> [u8; LIFETIME_BYTES] {
    const SPARE_IS_LOW: u8 = 1;
    let pre_eol: u16 = match wear.spare_percent {
        _ if wear.critical_warning & SPARE_IS_LOW != 0 => 3,
        0..=10 => 3,
        11..=20 => 2,
        _ => 1,
    };
    let estimate = u16::from(wear.percentage_used / 10 + 1).min(11);
    let mut bytes = [0; LIFETIME_BYTES];
    for (to, word) in bytes.chunks_exact_mut(2).zip([pre_eol, estimate, estimate]) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn serial(chosen: &str, identity: &Identity) -> [u8; ID_BYTES] {
    let from = match chosen.is_empty() {
        true => identity.serial.trim_ascii_end(),
        false => chosen.as_bytes(),
    };
    let mut serial = [0; ID_BYTES];
    for (to, from) in serial.iter_mut().zip(from) {
        *to = *from;
    }
    serial
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn geometry() -> Geometry {
        Geometry {
            physical_block_bytes: 4096,
            io_bytes_max: 1 << 20,
            read_only: false,
            write_cache: true,
            deallocate: true,
            write_zeroes: true,
            deallocate_granularity_bytes: 4096,
            deallocated_reads_zero: true,
            ..Geometry::new(512, 0x12345)
        }
    }

    pub(crate) fn identity() -> Identity {
        Identity { uuid: [1; 16], nguid: [2; 16], serial: *b"PENSTOCK-1          " }
    }

    pub(crate) fn options() -> DeviceOptions {
        DeviceOptions { queues: 4, serial: String::new(), read_only: false }
    }

    #[test]
    fn configuration_space_is_laid_out_as_specified() {
        let device = Device::new(&geometry(), &identity(), &options());
        let mut config = [0xff; 60];
        assert!(device.read_config(0, true, &mut config));
        let mut expected = [0u8; 60];
        expected[..3].copy_from_slice(&[0x45, 0x23, 0x01]); // capacity
        expected[8..12].copy_from_slice(&0x10_4000u32.to_le_bytes()); // size_max
        expected[12..16].copy_from_slice(&126u32.to_le_bytes()); // seg_max
        expected[20..24].copy_from_slice(&512u32.to_le_bytes()); // blk_size
        expected[24] = 3; // physical_block_exp
        expected[26] = 8; // min_io_size
        expected[32] = 1; // writeback
        expected[34] = 4; // num_queues
        expected[36..40].copy_from_slice(&(1u32 << 21).to_le_bytes()); // max_discard_sectors
        expected[40] = 16; // max_discard_seg
        expected[44] = 8; // discard_sector_alignment
        expected[48..52].copy_from_slice(&(1u32 << 16).to_le_bytes()); // max_write_zeroes_sectors
        expected[52] = 16; // max_write_zeroes_seg
        expected[56] = 1; // write_zeroes_may_unmap
        assert_eq!(config, expected);
    }

    #[test]
    fn size_max_keeps_the_longest_request_within_the_parts() {
        for io_bytes_max in [4096, 128 << 10, 1 << 20, 8 << 20] {
            let geometry = Geometry { io_bytes_max, ..geometry() };
            let device = Device::new(&geometry, &identity(), &options());
            let mut size_max = [0; 4];
            assert!(device.read_config(8, true, &mut size_max));
            let request = u64::from(u32::from_le_bytes(size_max)) * u64::from(SEG_MAX);
            let room = u64::from(io_bytes_max) * PARTS_MAX as u64;
            assert!(request <= room, "{io_bytes_max}");
        }
    }

    #[test]
    fn any_range_up_to_256_bytes_can_be_read() {
        let device = Device::new(&geometry(), &identity(), &options());
        let mut all = [0xff; 256];
        assert!(device.read_config(0, false, &mut all));
        assert_eq!(all[32], 0, "the current value of writeback, not the initial one");
        assert!(all[60..].iter().all(|b| *b == 0));
        for len in [57, 60, 96] {
            let mut out = vec![0xff; len];
            assert!(device.read_config(0, false, &mut out));
            assert_eq!(out[..], all[..len]);
        }
        let mut part = [0; 3];
        assert!(device.read_config(33, true, &mut part));
        assert_eq!(part, [0, 4, 0]);
        assert!(device.read_config(253, true, &mut part));
        assert!(!device.read_config(254, true, &mut part));
        assert!(!device.read_config(usize::MAX, true, &mut part));
    }

    #[test]
    fn features_follow_the_volume() {
        let all = Device::new(&geometry(), &identity(), &options()).features();
        assert!(all.has(Features::DISCARD | Features::WRITE_ZEROES | Features::VERSION_1));
        assert!(!all.has(Features::RO));
        assert_eq!(all.without(all.for_driver()).0, 1 << 26 | 1 << 30, "of vhost-user itself");

        let read_only = DeviceOptions { read_only: true, ..options() };
        let ro = Device::new(&geometry(), &identity(), &read_only).features();
        assert!(ro.has(Features::RO));
        assert_eq!(ro.0 & (Features::DISCARD | Features::WRITE_ZEROES).0, 0);

        let plain = Geometry { deallocate: false, write_zeroes: false, ..geometry() };
        let plain = Device::new(&plain, &identity(), &options());
        assert!(!plain.features().has(Features::DISCARD));
        let mut config = [0xff; 24];
        assert!(plain.read_config(36, true, &mut config));
        assert_eq!(config, [0; 24]);
    }

    #[test]
    fn lifetime_is_told_in_the_steps_of_jedec() {
        let wear = |percentage_used, spare_percent, critical_warning| Wear {
            percentage_used,
            spare_percent,
            spare_threshold_percent: 5,
            critical_warning,
        };
        for (wear, want) in [
            (wear(0, 100, 0), [1, 1]),
            (wear(9, 21, 0), [1, 1]),
            (wear(10, 20, 0), [2, 2]),
            (wear(99, 11, 0), [2, 10]),
            (wear(100, 10, 0), [3, 11]),
            (wear(255, 0, 0), [3, 11]),
            (wear(55, 90, 1), [3, 6]),
        ] {
            let device = Device::new(&geometry(), &identity(), &options());
            assert!(!device.features().has(Features::LIFETIME));
            let device = device.with_lifetime(Some(wear));
            assert!(device.features().has(Features::LIFETIME));
            let [pre_eol, estimate] = want;
            let bytes = [pre_eol, 0, estimate, 0, estimate, 0];
            assert_eq!(device.limits().lifetime, Some(bytes), "{wear:?}");
            let unknown = device.clone().worn(None);
            assert!(unknown.features().has(Features::LIFETIME) && !unknown.is_alike(&device));
        }
    }

    #[test]
    fn serial_is_the_owners_or_the_volumes() {
        let device = Device::new(&geometry(), &identity(), &options());
        assert_eq!(&device.limits().serial, b"PENSTOCK-1\0\0\0\0\0\0\0\0\0\0");
        let named = DeviceOptions { serial: "abcdefghijklmnopqrstuvwxyz".into(), ..options() };
        let device = Device::new(&geometry(), &identity(), &named);
        assert_eq!(&device.limits().serial, b"abcdefghijklmnopqrst");
    }
}
