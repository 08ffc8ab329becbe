//! Configuration space of the function: what firmware and drivers find before they know that it is
//! an NVMe controller.
//!
//! ```text
//!   00h  type 0 header: BAR0 (64-bit, registers and doorbells), BAR4 (64-bit, MSI-X)
//!   40h  power management: D0 and D3hot, no soft reset
//!   50h  MSI-X: table and pending bits in BAR4
//!   60h  PCI Express endpoint, version 2, function-level reset
//!  100h  no extended capability
//! ```
//!
//! Every byte has a mask of bits that a guest may write and one of bits that it clears by writing
//! ones; all else is fixed. Accesses of any length and alignment are taken, byte by byte.
//!
//! References are to the PCI Express Base Specification ("PCIe"), the PCI Local Bus Specification
//! 3.0 ("PCI") and the NVMe over PCIe Transport Specification.

/// Bytes of configuration space.
pub const CONFIG_BYTES: usize = 4096;
/// Bytes that can be anything but zero, and so the state that is worth saving.
pub const STATE_BYTES: usize = 256;
/// Bytes of an MSI-X table entry (PCI, section 6.8.2).
pub const MSIX_ENTRY_BYTES: u64 = 16;

const PM: usize = 0x40;
const MSIX: usize = 0x50;
const PCIE: usize = 0x60;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const BAR4: usize = 0x20;
const INTERRUPT_LINE: usize = 0x3C;
const INTERRUPT_PIN: usize = 0x3D;
const PMCSR: usize = PM + 4;
const MSIX_CONTROL: usize = MSIX + 2;
const DEVICE_CONTROL: usize = PCIE + 8;
const DEVICE_STATUS: usize = PCIE + 10;
const LINK_CONTROL: usize = PCIE + 16;
const DEVICE_CONTROL_2: usize = PCIE + 40;
const LINK_CONTROL_2: usize = PCIE + 48;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Parity, target abort, master abort and system errors: written as ones to clear.
const STATUS_ERRORS: u16 = 0xF900;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const DEVICE_CONTROL_FLR: u16 = 1 << 15;
const DEVICE_CONTROL_PAYLOAD: u16 = 7 << 5;

/// Who made the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor; the same as `VID` in Identify Controller.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem vendor; the same as `SSVID` in Identify Controller.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
    /// Revision.
    pub revision: u8,
}

/// What differs from function to function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Who made it.
    pub ids: Ids,
    /// Size of BAR0: a power of two, at least 4 KiB.
    pub bar0_bytes: u64,
    /// Vectors of the MSI-X table, 1 to 2,048.
    pub msix_vectors: u16,
}

impl Layout {
    /// Bytes of the MSI-X table, in whole pages.
    fn table_bytes(&self) -> u64 {
        (u64::from(self.msix_vectors) * MSIX_ENTRY_BYTES).next_multiple_of(4096)
    }

    /// Where the pending bits begin in BAR4; the table is at its beginning.
    pub fn pba_offset(&self) -> u64 {
        self.table_bytes()
    }

    /// Size of BAR4.
    pub fn bar4_bytes(&self) -> u64 {
        // A bit for each of at most 2,048 vectors fits in a page of its own.
        (self.table_bytes() + 4096).next_power_of_two()
    }
}

/// What a write has changed, for the function to act on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// A function-level reset has been started.
    pub starts_flr: bool,
    /// Bus master, memory space or INTx disable are other than before.
    pub command: bool,
    /// MSI-X enable or function mask are other than before.
    pub msix: bool,
    /// The power state is another one.
    pub power: bool,
}

/// Configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; STATE_BYTES],
    initial: [u8; STATE_BYTES],
    /// Bits that keep what is written.
    writable: [u8; STATE_BYTES],
    /// Bits that are cleared by writing ones.
    clearable: [u8; STATE_BYTES],
}

impl ConfigSpace {
    /// As after power-on.
    ///
    /// # Panics
    ///
    /// If `layout` is not possible.
    pub fn new(layout: &Layout) -> ConfigSpace {
        assert!(layout.bar0_bytes.is_power_of_two() && layout.bar0_bytes >= 4096);
        assert!((1..=2048).contains(&layout.msix_vectors));
        let mut space = ConfigSpace {
            bytes: [0; STATE_BYTES],
            initial: [0; STATE_BYTES],
            writable: [0; STATE_BYTES],
            clearable: [0; STATE_BYTES],
        };
        space.header(layout);

        // Power management (PCIe, section 7.5.2): version 3, no PME, no D1 or D2.
        space.put(PM, &[0x01, MSIX as u8, 0x03, 0x00]);
        // NoSoftRst: D3hot to D0 keeps the state.
        space.field(PMCSR, 0x0008, 0x0003);

        // MSI-X (PCIe, section 7.7.2).
        space.put(MSIX, &[0x11, PCIE as u8]);
        space.field(MSIX_CONTROL, layout.msix_vectors - 1, MSIX_ENABLE | MSIX_FUNCTION_MASK);
        space.put(MSIX + 4, &4u32.to_le_bytes());
        space.put(MSIX + 8, &(layout.pba_offset() as u32 | 4).to_le_bytes());

        space.express();
        space.initial = space.bytes;
        space
    }

    fn header(&mut self, layout: &Layout) {
        let ids = layout.ids;
        self.put(0x00, &ids.vendor.to_le_bytes());
        self.put(0x02, &ids.device.to_le_bytes());
        let command =
            COMMAND_MEMORY | COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE;
        self.field(COMMAND, 0, command);
        self.field(STATUS, STATUS_CAPABILITIES, 0);
        self.clear_by_ones(STATUS, STATUS_ERRORS);
        // Mass storage, non-volatile memory, NVM Express I/O controller.
        self.put(0x08, &[ids.revision, 0x02, 0x08, 0x01]);
        // Cache line size means nothing to PCIe functions but can be written (PCIe, 7.5.1.1.7).
        self.writable[0x0C] = 0xFF;
        self.bar(BAR0, layout.bar0_bytes);
        self.bar(BAR4, layout.bar4_bytes());
        self.put(0x2C, &ids.subsystem_vendor.to_le_bytes());
        self.put(0x2E, &ids.subsystem.to_le_bytes());
        self.put(0x34, &[PM as u8]);
        self.writable[INTERRUPT_LINE] = 0xFF;
        self.put(INTERRUPT_PIN, &[1]);
    }

    /// A 64-bit memory register, not prefetchable.
    fn bar(&mut self, at: usize, size_bytes: u64) {
        self.put(at, &[0b100]);
        let mask = !(size_bytes - 1);
        self.writable[at..at + 8].copy_from_slice(&mask.to_le_bytes());
    }

    /// PCI Express (PCIe, section 7.5.3).
    fn express(&mut self) {
        // Capability version 2, endpoint.
        self.put(PCIE, &[0x10, 0x00, 0x02, 0x00]);
        // Extended tags, role-based error reporting, function-level reset; payload up to 256 bytes.
        let device: u32 = 1 | 1 << 5 | 1 << 15 | 1 << 28;
        self.put(PCIE + 4, &device.to_le_bytes());
        // Relaxed ordering, no snoop and 512 byte read requests are on by default; bit 15 starts a
        // reset and reads as zero.
        self.field(DEVICE_CONTROL, 0x2810, 0x7FFF & !(1 << 9) & !(1 << 10));
        self.clear_by_ones(DEVICE_STATUS, 0x000F);
        // 8 GT/s, four lanes, no power states of the link.
        let link: u32 = 3 | 4 << 4;
        self.put(PCIE + 12, &link.to_le_bytes());
        self.field(LINK_CONTROL, 0, 0x00C8);
        self.field(LINK_CONTROL + 2, 3 | 4 << 4, 0);
        // Completion timeouts can be disabled, which endpoints must be able to.
        self.put(PCIE + 36, &(1u32 << 4).to_le_bytes());
        self.field(DEVICE_CONTROL_2, 0, 1 << 4);
        // 2.5, 5 and 8 GT/s.
        self.put(PCIE + 44, &0x0Eu32.to_le_bytes());
        self.field(LINK_CONTROL_2, 3, 0);
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn field(&mut self, at: usize, value: u16, writable: u16) {
        self.put(at, &value.to_le_bytes());
        self.writable[at..at + 2].copy_from_slice(&writable.to_le_bytes());
    }

    fn clear_by_ones(&mut self, at: usize, bits: u16) {
        self.clearable[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// A read by the guest. What lies beyond is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(bytes) = self.bytes.get(from..) {
            let len = data.len().min(bytes.len());
            data[..len].copy_from_slice(&bytes[..len]);
        }
    }

    /// A write by the guest.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Changes {
        let before = self.acted_on();
        let mut changes = Changes::default();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, &value) in (from..STATE_BYTES).zip(data) {
            let kept = self.bytes[at] & !self.writable[at] & !(value & self.clearable[at]);
            let written = match at {
                // D1 and D2 do not exist; a write of them is discarded (PCIe, section 7.5.2.2).
                PMCSR if matches!(value & 3, 1 | 2) => self.bytes[at] & 3,
                _ => value & self.writable[at],
            };
            self.bytes[at] = kept | written;
            let flr = (DEVICE_CONTROL_FLR >> 8) as u8;
            changes.starts_flr |= at == DEVICE_CONTROL + 1 && value & flr != 0;
        }
        let after = self.acted_on();
        changes.command = before.0 != after.0;
        changes.msix = before.1 != after.1;
        changes.power = before.2 != after.2;
        changes
    }

    fn acted_on(&self) -> (u16, u16, u8) {
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
        (
            self.word(COMMAND) & command,
            self.word(MSIX_CONTROL) & (MSIX_ENABLE | MSIX_FUNCTION_MASK),
            self.bytes[PMCSR] & 3,
        )
    }

    /// The function may read and write the guest's memory. Some clients that are no machines (test
    /// drivers) never enable the memory space of a register that they reach by message, so that
    /// there is no accessor for it.
    pub fn is_bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_MASTER != 0
    }

    /// The function must not raise INTx.
    pub fn is_intx_disabled(&self) -> bool {
        self.word(COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    /// Interrupts go by MSI-X, and INTx is not used. The mask of the function is the client's affair,
    /// as those of the vectors are.
    pub fn is_msix_enabled(&self) -> bool {
        self.word(MSIX_CONTROL) & MSIX_ENABLE != 0
    }

    /// D0; otherwise D3hot, in which a function does nothing but answer here.
    pub fn is_powered(&self) -> bool {
        self.bytes[PMCSR] & 3 == 0
    }

    /// Whether INTx is asserted, or would be if it were not disabled (PCI, section 6.2.3).
    pub fn set_intx_pending(&mut self, is_pending: bool) {
        let bit = STATUS_INTERRUPT as u8;
        self.bytes[STATUS] = self.bytes[STATUS] & !bit | if is_pending { bit } else { 0 };
    }

    /// A conventional reset.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// A function-level reset: all but what belongs to the link (PCIe, section 6.6.2).
    pub fn reset_function(&mut self) {
        let payload = self.bytes[DEVICE_CONTROL] & DEVICE_CONTROL_PAYLOAD as u8;
        let link = [self.bytes[LINK_CONTROL], self.bytes[LINK_CONTROL + 1]];
        self.reset();
        let control = self.bytes[DEVICE_CONTROL] & !(DEVICE_CONTROL_PAYLOAD as u8);
        self.bytes[DEVICE_CONTROL] = control | payload;
        self.put(LINK_CONTROL, &link);
    }

    /// The state, to be restored elsewhere.
    pub fn save(&self) -> [u8; STATE_BYTES] {
        self.bytes
    }

    /// Take up a saved state. What a guest cannot write stays as it is, whatever the state says.
    /// False if the state is that of another kind of function; then nothing has changed.
    pub fn restore(&mut self, state: &[u8; STATE_BYTES]) -> bool {
        let mut bytes = self.initial;
        for (at, byte) in bytes.iter_mut().enumerate() {
            let status = if at == STATUS { STATUS_INTERRUPT as u8 } else { 0 };
            let free = self.writable[at] | self.clearable[at] | status;
            if (*byte ^ state[at]) & !free != 0 {
                return false;
            }
            *byte = *byte & !free | state[at] & free;
        }
        self.bytes = bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUT: Layout = Layout {
        ids: Ids {
            vendor: 0x1B36,
            device: 0x0010,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
            revision: 2,
        },
        bar0_bytes: 0x4000,
        msix_vectors: 65,
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(&LAYOUT)
    }

    fn read<const N: usize>(space: &ConfigSpace, offset: u64) -> [u8; N] {
        let mut bytes = [0xEE; N];
        space.read(offset, &mut bytes);
        bytes
    }

    /// Written down from the specifications, as `lspci -xxx` would show it.
    #[test]
    fn after_power_on_it_is_an_nvme_endpoint() {
        let space = space();
        #[rustfmt::skip]
        let header = [
            0x36, 0x1B, 0x10, 0x00, 0x00, 0x00, 0x10, 0x00, 0x02, 0x02, 0x08, 0x01, 0, 0, 0, 0,
            0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xF4, 0x1A, 0x00, 0x11,
            0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0,
            // Power management.
            0x01, 0x50, 0x03, 0x00, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            // MSI-X: 65 vectors take 1,040 bytes, so the pending bits are in the second page.
            0x11, 0x60, 0x40, 0x00, 0x04, 0, 0, 0, 0x04, 0x10, 0, 0, 0, 0, 0, 0,
            // PCI Express.
            0x10, 0x00, 0x02, 0x00, 0x21, 0x80, 0x00, 0x10, 0x10, 0x28, 0, 0, 0x43, 0, 0, 0,
            0, 0, 0x43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x0E, 0, 0, 0,
            0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(read::<160>(&space, 0), header);
        assert_eq!(read::<3936>(&space, 160), [0; 3936]);
        assert_eq!(LAYOUT.bar4_bytes(), 0x2000);
    }

    #[test]
    fn bars_tell_their_size_and_keep_an_address() {
        let mut space = space();
        for (at, size) in [(0x10, 0x4000u32), (0x20, 0x2000)] {
            space.write(at, &[0xFF; 8]);
            let low = !(size - 1) | 0b100;
            assert_eq!(read::<4>(&space, at), low.to_le_bytes());
            assert_eq!(read::<4>(&space, at + 4), [0xFF; 4]);
            space.write(at, &0x0000_0038_FEBF_0123u64.to_le_bytes());
            assert_eq!(read::<8>(&space, at), 0x0000_0038_FEBF_0004u64.to_le_bytes());
        }
        // No I/O space, no other register, no ROM.
        for at in [0x18, 0x1C, 0x30] {
            space.write(at, &[0xFF; 4]);
            assert_eq!(read::<4>(&space, at), [0; 4]);
        }
    }

    #[test]
    fn what_a_write_changes_is_told_once() {
        let mut space = space();
        let none = Changes::default();
        assert_eq!(space.write(4, &[0x06, 0x04]), Changes { command: true, ..none });
        assert_eq!(space.write(4, &[0x06, 0x04]), none);
        assert!(space.is_bus_master() && space.is_intx_disabled());
        // SERR# concerns nobody. One byte alone is as good as two.
        assert_eq!(space.write(5, &[0x05]), none);
        assert_eq!(space.write(0x53, &[0xC0]), Changes { msix: true, ..none });
        assert!(space.is_msix_enabled());
        assert_eq!(read::<2>(&space, 0x52), [0x40, 0xC0]);
        assert_eq!(space.write(0x44, &[3]), Changes { power: true, ..none });
        assert!(!space.is_powered());
        for absent in [1, 2] {
            assert_eq!(space.write(0x44, &[absent]), none);
        }
        assert!(!space.is_powered());
        assert_eq!(space.write(0x44, &[0]), Changes { power: true, ..none });
    }

    #[test]
    fn a_function_level_reset_keeps_the_link_and_reads_as_zero() {
        let mut space = space();
        space.write(4, &[6, 4]);
        space.write(0x10, &[0xFF; 8]);
        space.write(0x70, &[0xC8]);
        let changes = space.write(0x68, &[0x3F, 0xA8]);
        assert_eq!(changes, Changes { starts_flr: true, ..Changes::default() });
        assert_eq!(read::<2>(&space, 0x68), [0x3F, 0x28]);
        space.reset_function();
        assert_eq!(read::<2>(&space, 0x68), [0x30, 0x28], "only the payload size is kept");
        assert_eq!(read::<2>(&space, 0x70), [0xC8, 0]);
        assert_eq!(read::<2>(&space, 4), [0, 0]);
        assert_eq!(read::<4>(&space, 0x10), [4, 0, 0, 0]);
        space.reset();
        assert_eq!(space.bytes, space.initial);
    }

    #[test]
    fn a_pending_intx_shows_in_status_and_cannot_be_written() {
        let mut space = space();
        space.set_intx_pending(true);
        space.write(6, &[0xFF; 2]);
        assert_eq!(read::<2>(&space, 6), [0x18, 0]);
        space.set_intx_pending(false);
        assert_eq!(read::<2>(&space, 6), [0x10, 0]);
    }

    #[test]
    fn a_state_is_restored_and_another_functions_is_not() {
        let mut source = space();
        source.write(4, &[6, 4]);
        source.write(0x10, &0xFEBF_0000u64.to_le_bytes());
        source.set_intx_pending(true);
        let state = source.save();
        let mut target = space();
        assert!(target.restore(&state));
        assert_eq!(target.bytes, source.bytes);
        let other = Layout { msix_vectors: 2, ..LAYOUT };
        let mut other = ConfigSpace::new(&other);
        let before = other.save();
        assert!(!other.restore(&state));
        assert_eq!(other.save(), before);
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_fixed(
            writes in proptest::collection::vec(
                (0u64..5000, proptest::collection::vec(any::<u8>(), 0..40)), 0..40),
        ) {
            let mut space = space();
            for (offset, data) in writes {
                space.write(offset, &data);
            }
            for at in 0..STATE_BYTES {
                let fixed = !space.writable[at] & !space.clearable[at];
                prop_assert_eq!(space.bytes[at] & fixed, space.initial[at] & fixed);
            }
            let state = space.save();
            prop_assert!(ConfigSpace::new(&LAYOUT).restore(&state));
            let mut all = [0; CONFIG_BYTES];
            space.read(0, &mut all);
            prop_assert_eq!(&all[..STATE_BYTES], &state);
        }

        #[test]
        fn a_write_in_pieces_is_the_same_as_at_once(
            offset in 0u64..250, data in proptest::collection::vec(any::<u8>(), 1..12), cut in 0usize..12,
        ) {
            let (mut whole, mut pieces) = (space(), space());
            whole.write(offset, &data);
            let (first, second) = data.split_at(cut.min(data.len()));
            pieces.write(offset, first);
            pieces.write(offset + first.len() as u64, second);
            prop_assert_eq!(whole.bytes, pieces.bytes);
        }

        #[test]
        fn reads_of_any_place_and_length_are_answered(offset: u64, len in 0usize..5000) {
            let mut data = vec![0xEE; len];
            space().read(offset, &mut data);
            prop_assert!(offset < 256 || data.iter().all(|byte| *byte == 0));
        }
    }
}
