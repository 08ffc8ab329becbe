//! Controller properties (NVMe Base 2.0, "Controller Properties"): the registers a PCIe function
//! has in BAR0 and a fabrics host reads by Property Get.

/// Offset of a property in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Property(pub u32);

impl Property {
    /// Controller Capabilities (8 bytes).
    pub const CAP: Property = Property(0x00);
    /// Version (4 bytes).
    pub const VS: Property = Property(0x08);
    /// Interrupt Mask Set (4 bytes; PCIe).
    pub const INTMS: Property = Property(0x0c);
    /// Interrupt Mask Clear (4 bytes; PCIe).
    pub const INTMC: Property = Property(0x10);
    /// Controller Configuration (4 bytes).
    pub const CC: Property = Property(0x14);
    /// Controller Status (4 bytes).
    pub const CSTS: Property = Property(0x1c);
    /// NVM Subsystem Reset (4 bytes).
    pub const NSSR: Property = Property(0x20);
    /// Admin Queue Attributes (4 bytes; PCIe).
    pub const AQA: Property = Property(0x24);
    /// Admin Submission Queue Base Address (8 bytes; PCIe).
    pub const ASQ: Property = Property(0x28);
    /// Admin Completion Queue Base Address (8 bytes; PCIe).
    pub const ACQ: Property = Property(0x30);
    /// Controller Ready Timeouts (4 bytes).
    pub const CRTO: Property = Property(0x68);
}

/// Version 2.0.0 as in VS and Identify Controller VER: MJR 31:16, MNR 15:8, TER 7:0.
pub const VERSION_2_0: u32 = 0x0002_0000;

/// Value that requests an NVM Subsystem Reset ("NVMe").
pub const NSSR_RESET: u32 = 0x4e56_4d65;

/// Controller Capabilities (CAP).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cap(pub u64);

impl Cap {
    /// Contiguous Queues Required; always set for message-based transports.
    pub const CQR: u64 = 1 << 16;
    /// NVM Subsystem Reset Supported.
    pub const NSSRS: u64 = 1 << 36;
    /// Command Sets Supported bit 0: NVM Command Set, or a discovery controller.
    pub const CSS_NVM: u64 = 1 << 37;
    /// Controller Ready Modes Supported bit 0: Controller Ready With Media.
    pub const CRMS_CRWMS: u64 = 1 << 59;

    /// Maximum Queue Entries Supported, one-based.
    #[must_use]
    pub const fn queue_entries_max(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }
    /// Timeout (TO): the worst time for CSTS.RDY to change, in milliseconds.
    #[must_use]
    pub const fn timeout_ms(self) -> u64 {
        (self.0 >> 24 & 0xff) * 500
    }
    /// Memory Page Size Minimum in bytes: the unit of MDTS.
    #[must_use]
    pub const fn page_bytes_min(self) -> u64 {
        4096 << (self.0 >> 48 & 0xf)
    }
    /// Whether the NVM Command Set (or discovery) is supported.
    #[must_use]
    pub const fn has_nvm_command_set(self) -> bool {
        self.0 & Self::CSS_NVM != 0
    }
}

/// Controller Configuration (CC).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cc(pub u32);

impl Cc {
    /// What a host writes: enabled, NVM Command Set, 4 KiB pages, round robin, 64-byte SQEs,
    /// 16-byte CQEs.
    pub const ENABLE: Cc = Cc(1 | 6 << 16 | 4 << 20);

    /// Enable.
    #[must_use]
    pub const fn en(self) -> bool {
        self.0 & 1 != 0
    }
    /// I/O Command Set Selected.
    #[must_use]
    pub const fn css(self) -> u32 {
        self.0 >> 4 & 7
    }
    /// Memory Page Size (0 = 4 KiB).
    #[must_use]
    pub const fn mps(self) -> u32 {
        self.0 >> 7 & 0xf
    }
    /// Arbitration Mechanism Selected.
    #[must_use]
    pub const fn ams(self) -> u32 {
        self.0 >> 11 & 7
    }
    /// Shutdown Notification: 00b none, 01b normal, 10b abrupt.
    #[must_use]
    pub const fn shn(self) -> u32 {
        self.0 >> 14 & 3
    }
    /// The same with this shutdown notification.
    #[must_use]
    pub const fn with_shn(self, shn: u32) -> Cc {
        Cc(self.0 & !(3 << 14) | (shn & 3) << 14)
    }
    /// I/O Submission Queue Entry Size as a power of two.
    #[must_use]
    pub const fn iosqes(self) -> u32 {
        self.0 >> 16 & 0xf
    }
    /// I/O Completion Queue Entry Size as a power of two.
    #[must_use]
    pub const fn iocqes(self) -> u32 {
        self.0 >> 20 & 0xf
    }
}

/// Controller Status (CSTS).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Csts(pub u32);

impl Csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Controller Fatal Status.
    pub const CFS: u32 = 1 << 1;
    /// Shutdown Status: processing is occurring (01b).
    pub const SHST_OCCURRING: u32 = 1 << 2;
    /// Shutdown Status: complete (10b).
    pub const SHST_COMPLETE: u32 = 2 << 2;
    /// NVM Subsystem Reset Occurred; writing 1 clears it.
    pub const NSSRO: u32 = 1 << 4;

    /// Ready.
    #[must_use]
    pub const fn rdy(self) -> bool {
        self.0 & Self::RDY != 0
    }
    /// Controller Fatal Status.
    #[must_use]
    pub const fn cfs(self) -> bool {
        self.0 & Self::CFS != 0
    }
    /// Whether shutdown processing is complete.
    #[must_use]
    pub const fn is_shutdown_complete(self) -> bool {
        self.0 >> 2 & 3 == 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields() {
        // MQES 127, CQR, TO 30 (15 s), CSS NVM, CRWMS.
        let cap = Cap(127 | Cap::CQR | 30 << 24 | Cap::CSS_NVM | Cap::CRMS_CRWMS);
        assert_eq!(cap.0, 0x0800_0020_1e01_007f);
        assert_eq!(cap.queue_entries_max(), 128);
        assert_eq!(cap.timeout_ms(), 15_000);
        assert_eq!(cap.page_bytes_min(), 4096);
        assert_eq!(Cc::ENABLE.0, 0x0046_0001);
        assert_eq!((Cc::ENABLE.iosqes(), Cc::ENABLE.iocqes()), (6, 4));
        let cc = Cc::ENABLE.with_shn(1);
        assert_eq!(cc.0, 0x0046_4001);
        assert_eq!((cc.shn(), cc.css(), cc.mps(), cc.ams()), (1, 0, 0, 0));
        assert!(Csts(0b1001).rdy() && Csts(0b1001).is_shutdown_complete() && Csts(2).cfs());
    }
}
