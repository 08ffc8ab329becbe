//! The registers: CAP, VS, CC, CSTS, NSSR, CRTO, and the states they go through.
//!
//! ```text
//!             EN 0→1                     EN 1→0
//!   Disabled ────────► Ready (RDY=1) ────────────► Ending(Reset) ──finish──► Disabled
//!      │ EN 0→1, bad configuration │ SHN                RDY still 1
//!      ▼                           ▼
//!    Fatal (CFS=1)            Ending(Shutdown) ──finish──► ShutDown (SHST=10b)
//!                               SHST=01b                      │ EN 1→0 ─► Ending(Reset)
//! ```

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::queues::AdminQueues;
use crate::spec::{Cap, Cc, Csts, NSSR_RESET, Property, Status, VERSION_2_0};
use crate::xfer::{MEMORY_PAGE_BYTES, Transport};

/// Worst time for CSTS.RDY to change, in units of 500 ms: 15 s. Enabling is immediate; disabling
/// waits for I/O in flight.
const READY_TIMEOUT: u64 = 30;

/// What is being brought to an end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ending {
    /// Controller reset by CC.EN.
    Reset,
    /// Shutdown by CC.SHN.
    Shutdown,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// CC.EN is 0. The host moves on by setting it.
    Disabled,
    /// CSTS.CFS: CC.EN was set with an impossible configuration. The host resets.
    Fatal,
    /// Commands are processed. The host moves on by CC.EN or CC.SHN.
    Ready,
    /// I/O queues are being closed. The driver moves on by `finish`.
    Ending(Ending),
    /// Shut down; CC.EN is still 1. The host resets or goes away.
    ShutDown,
}

/// What a write to CC asks the driver to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CcEffect {
    /// Nothing.
    None,
    /// The controller was enabled (PCIe: with the admin queues that AQA, ASQ and ACQ say).
    Enabled,
    /// Close the I/O queues, then `finish`.
    CloseQueues(Ending),
    /// End every controller of the subsystem.
    SubsystemReset,
}

#[derive(Debug)]
pub(crate) struct Registers {
    cap: Cap,
    cc: Cc,
    state: State,
    is_discovery: bool,
    /// CSTS.NSSRO: set by the driver, cleared by the host.
    subsystem_was_reset: bool,
    /// Fatal for a reason that is not the host's configuration.
    has_failed: bool,
    transport: Transport,
    /// Registers that only a PCI function has.
    pcie: PcieRegisters,
}

/// Registers that only a PCI function has. "A Controller Reset does not affect AQA, ASQ and ACQ"
/// (NVMe Base 2.0, "Controller Level Reset"): they keep what the host wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct PcieRegisters {
    aqa: u32,
    asq: u64,
    acq: u64,
    interrupt_mask: u32,
}

/// Registers as they are saved.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SavedRegisters {
    asq: U64,
    acq: U64,
    aqa: U32,
    interrupt_mask: U32,
    cc: U32,
    state: u8,
    subsystem_was_reset: u8,
    reserved: [u8; 2],
}

/// Bits of AQA that exist: ACQS 27:16 and ASQS 11:0.
const AQA_BITS: u32 = 0x0fff_0fff;

impl Registers {
    pub(crate) fn new(
        queue_entries_max: u16,
        is_discovery: bool,
        transport: Transport,
    ) -> Registers {
        // Queues of a PCI function may be anywhere, page by page. MPSMIN and MPSMAX are 0 (4 KiB),
        // and so is DSTRD: doorbells are 4 bytes apart.
        let contiguous = match transport {
            Transport::Fabrics => Cap::CQR,
            Transport::Pcie => 0,
        };
        let cap = u64::from(queue_entries_max - 1)
            | contiguous
            | READY_TIMEOUT << 24
            | Cap::CSS_NVM
            | Cap::CRMS_CRWMS
            | if is_discovery { 0 } else { Cap::NSSRS };
        Registers {
            cap: Cap(cap),
            cc: Cc(0),
            state: State::Disabled,
            is_discovery,
            subsystem_was_reset: false,
            has_failed: false,
            transport,
            pcie: PcieRegisters::default(),
        }
    }

    /// The dword at `offset` of a PCI function's registers; what is not there reads as 0.
    pub(crate) fn read_dword(&self, offset: u32) -> u32 {
        let (whole, is_8_bytes) = match Property(offset & !7) {
            property @ (Property::CAP | Property::ASQ | Property::ACQ) => (property, true),
            _ => (Property(offset & !3), false),
        };
        let value = self.read(whole, is_8_bytes).unwrap_or(0);
        if is_8_bytes && offset & 4 != 0 { (value >> 32) as u32 } else { value as u32 }
    }

    /// A write of a dword at `offset` of a PCI function's registers; 64-bit ones are written in two
    /// halves. What is not there, or cannot be written now, is not.
    pub(crate) fn write_dword(&mut self, offset: u32, value: u32) -> CcEffect {
        let half = |old: u64| match offset & 4 {
            0 => old & !0xffff_ffff | u64::from(value),
            _ => old & 0xffff_ffff | u64::from(value) << 32,
        };
        let (property, is_8_bytes, value) = match Property(offset & !7) {
            Property::ASQ => (Property::ASQ, true, half(self.pcie.asq)),
            Property::ACQ => (Property::ACQ, true, half(self.pcie.acq)),
            _ => (Property(offset & !3), false, u64::from(value)),
        };
        self.write(property, is_8_bytes, value).unwrap_or(CcEffect::None)
    }

    /// Where a PCI host has put its admin queues; `None` if they cannot be there.
    fn admin_queues(&self) -> Option<AdminQueues> {
        let PcieRegisters { aqa, asq, acq, .. } = self.pcie;
        let (sq_entries, cq_entries) = ((aqa & 0xfff) + 1, (aqa >> 16 & 0xfff) + 1);
        let is_aligned = (asq | acq) & (MEMORY_PAGE_BYTES - 1) == 0;
        // "The minimum size of a queue is two entries."
        (is_aligned && sq_entries >= 2 && cq_entries >= 2).then_some(AdminQueues {
            sq_address: asq,
            sq_entries,
            cq_address: acq,
            cq_entries,
        })
    }

    /// Whether CC has the sizes of entries that I/O queues have: 64 and 16 bytes.
    pub(crate) fn has_entry_sizes(&self) -> bool {
        self.cc.iosqes() == 6 && self.cc.iocqes() == 4
    }

    /// The admin queues while the controller is enabled.
    pub(crate) fn enabled_queues(&self) -> Option<AdminQueues> {
        match self.state {
            State::Ready | State::Ending(_) | State::ShutDown => self.admin_queues(),
            State::Disabled | State::Fatal => None,
        }
    }

    /// Bits set keep the pin or message of that number quiet (INTMS, INTMC).
    pub(crate) fn interrupt_mask(&self) -> u32 {
        self.pcie.interrupt_mask
    }

    /// The configuration is impossible: Controller Fatal Status, and nothing runs.
    pub(crate) fn enable_failed(&mut self) {
        self.state = State::Fatal;
    }

    /// Controller Fatal Status although there may be queues: the host resets, which closes them.
    pub(crate) fn fail(&mut self) {
        self.has_failed = true;
    }

    /// What outlives this process, for `restore`.
    pub(crate) fn save(&self) -> SavedRegisters {
        let state = match self.state {
            State::Disabled => 0,
            State::Fatal => 1,
            State::Ready => 2,
            State::Ending(Ending::Reset) => 3,
            State::Ending(Ending::Shutdown) => 4,
            State::ShutDown => 5,
        };
        SavedRegisters {
            asq: U64::new(self.pcie.asq),
            acq: U64::new(self.pcie.acq),
            aqa: U32::new(self.pcie.aqa),
            interrupt_mask: U32::new(self.pcie.interrupt_mask),
            cc: U32::new(self.cc.0),
            state,
            subsystem_was_reset: u8::from(self.subsystem_was_reset),
            reserved: [0; 2],
        }
    }

    /// Takes up what [`Registers::save`] gave; `None` if it did not.
    pub(crate) fn restore(&mut self, saved: &SavedRegisters) -> Option<()> {
        self.state = match saved.state {
            0 => State::Disabled,
            1 => State::Fatal,
            2 => State::Ready,
            3 => State::Ending(Ending::Reset),
            4 => State::Ending(Ending::Shutdown),
            5 => State::ShutDown,
            _ => return None,
        };
        self.cc = Cc(saved.cc.get());
        self.subsystem_was_reset = saved.subsystem_was_reset != 0;
        // What failed was the predecessor's.
        self.has_failed = false;
        self.pcie = PcieRegisters {
            aqa: saved.aqa.get() & AQA_BITS,
            asq: saved.asq.get(),
            acq: saved.acq.get(),
            interrupt_mask: saved.interrupt_mask.get(),
        };
        Some(())
    }

    pub(crate) fn note_subsystem_reset(&mut self) {
        self.subsystem_was_reset = true;
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state == State::Ready && !self.has_failed
    }

    pub(crate) fn is_ending(&self) -> bool {
        matches!(self.state, State::Ending(_))
    }

    pub(crate) fn is_shut_down(&self) -> bool {
        matches!(self.state, State::ShutDown | State::Ending(Ending::Shutdown))
    }

    pub(crate) fn csts(&self) -> Csts {
        let mut state = match self.state {
            State::Disabled => 0,
            State::Fatal => Csts::CFS,
            State::Ready | State::Ending(Ending::Reset) => Csts::RDY,
            State::Ending(Ending::Shutdown) => Csts::RDY | Csts::SHST_OCCURRING,
            State::ShutDown => Csts::RDY | Csts::SHST_COMPLETE,
        };
        if self.has_failed {
            state |= Csts::CFS;
        }
        Csts(if self.subsystem_was_reset { state | Csts::NSSRO } else { state })
    }

    /// Property Get. `is_8_bytes` is the size the host asked for and must be the property's.
    pub(crate) fn read(&self, property: Property, is_8_bytes: bool) -> Result<u64, Status> {
        let (value, has_8_bytes) = match property {
            Property::CAP => (self.cap.0, true),
            Property::VS => (u64::from(VERSION_2_0), false),
            Property::CC => (u64::from(self.cc.0), false),
            Property::CSTS => (u64::from(self.csts().0), false),
            // Written only; reads as zero.
            Property::NSSR if !self.is_discovery => (0, false),
            // CRIMT 31:16 is 0 (CRMS bit 1 is clear), CRWMT 15:0 in units of 500 ms.
            Property::CRTO => (READY_TIMEOUT, false),
            Property::INTMS | Property::INTMC if self.is_pcie() => {
                (u64::from(self.pcie.interrupt_mask), false)
            }
            Property::AQA if self.is_pcie() => (u64::from(self.pcie.aqa), false),
            Property::ASQ if self.is_pcie() => (self.pcie.asq, true),
            Property::ACQ if self.is_pcie() => (self.pcie.acq, true),
            _ => return Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
        };
        if has_8_bytes == is_8_bytes {
            Ok(value)
        } else {
            Err(Status::INVALID_FIELD_IN_COMMAND.dnr())
        }
    }

    /// Property Set.
    pub(crate) fn write(
        &mut self,
        property: Property,
        is_8_bytes: bool,
        value: u64,
    ) -> Result<CcEffect, Status> {
        match property {
            Property::CC if !is_8_bytes => self.write_cc(Cc(value as u32)),
            // NSSRO is the one field of CSTS that a host writes: 1 clears it.
            Property::CSTS if !is_8_bytes => {
                self.subsystem_was_reset &= value & u64::from(Csts::NSSRO) == 0;
                Ok(CcEffect::None)
            }
            // Only the value "NVMe" does anything. CAP.NSSRS is clear in discovery controllers.
            Property::NSSR if !is_8_bytes && !self.is_discovery => {
                let is_reset = value == u64::from(NSSR_RESET);
                Ok(if is_reset { CcEffect::SubsystemReset } else { CcEffect::None })
            }
            Property::INTMS if self.is_pcie() && !is_8_bytes => {
                self.pcie.interrupt_mask |= value as u32;
                Ok(CcEffect::None)
            }
            Property::INTMC if self.is_pcie() && !is_8_bytes => {
                self.pcie.interrupt_mask &= !(value as u32);
                Ok(CcEffect::None)
            }
            // "These shall not be modified while CC.EN is 1": then nothing is written.
            Property::AQA | Property::ASQ | Property::ACQ if self.is_pcie() => {
                if !self.cc.en() {
                    match property {
                        Property::AQA => self.pcie.aqa = value as u32 & AQA_BITS,
                        Property::ASQ => self.pcie.asq = value,
                        _ => self.pcie.acq = value,
                    }
                }
                Ok(CcEffect::None)
            }
            _ => Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
        }
    }

    fn is_pcie(&self) -> bool {
        self.transport == Transport::Pcie
    }

    fn write_cc(&mut self, new: Cc) -> Result<CcEffect, Status> {
        let old = self.cc;
        if new.en() && !old.en() && self.is_ending() {
            // "The host shall wait for CSTS.RDY to be 0 before setting EN to 1."
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        self.cc = new;
        if new.en() && !old.en() {
            self.has_failed = false;
            if !self.is_supported(new) {
                self.state = State::Fatal;
            } else {
                self.state = State::Ready;
                if new.shn() == 0 {
                    return Ok(CcEffect::Enabled);
                }
            }
        }
        if !new.en() && old.en() {
            return Ok(match self.state {
                // No queue can exist and nothing runs: there is nothing to wait for.
                State::Fatal => {
                    self.state = State::Disabled;
                    CcEffect::None
                }
                // The driver is closing queues already; `finish` ends both.
                State::Ending(_) => {
                    self.state = State::Ending(Ending::Reset);
                    CcEffect::None
                }
                State::Disabled | State::Ready | State::ShutDown => {
                    self.state = State::Ending(Ending::Reset);
                    CcEffect::CloseQueues(Ending::Reset)
                }
            });
        }
        if new.shn() != 0 {
            match self.state {
                State::Ready => {
                    self.state = State::Ending(Ending::Shutdown);
                    return Ok(CcEffect::CloseQueues(Ending::Shutdown));
                }
                State::Disabled | State::Fatal => self.state = State::ShutDown,
                State::Ending(_) | State::ShutDown => {}
            }
        }
        Ok(CcEffect::None)
    }

    /// Whether this configuration exists: NVM Command Set, 4 KiB pages, round robin, entries of
    /// 64 and 16 bytes. A discovery controller has no I/O queues, so entry sizes do not matter.
    fn is_supported(&self, cc: Cc) -> bool {
        // A PCI host need not say the sizes of entries before it creates an I/O queue, which is where
        // they are looked at again.
        let sizes_ok = self.is_discovery
            || (cc.iosqes() == 6 && cc.iocqes() == 4)
            || (self.is_pcie() && cc.iosqes() == 0 && cc.iocqes() == 0);
        let queues_ok = !self.is_pcie() || self.admin_queues().is_some();
        cc.css() == 0 && cc.mps() == 0 && cc.ams() == 0 && sizes_ok && queues_ok
    }

    /// The I/O queues are closed: what ended, if anything was ending.
    pub(crate) fn finish(&mut self) -> Option<Ending> {
        let State::Ending(ending) = self.state else { return None };
        self.has_failed &= ending != Ending::Reset;
        self.state = match ending {
            Ending::Reset => State::Disabled,
            Ending::Shutdown => State::ShutDown,
        };
        Some(ending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(registers: &mut Registers, cc: Cc) -> CcEffect {
        registers.write(Property::CC, false, u64::from(cc.0)).unwrap()
    }

    fn csts(registers: &Registers) -> u64 {
        registers.read(Property::CSTS, false).unwrap()
    }

    #[test]
    fn enable_reset_enable() {
        let mut r = Registers::new(128, false, Transport::Fabrics);
        assert_eq!(csts(&r), 0);
        // Linux first writes everything but EN.
        assert_eq!(set(&mut r, Cc(Cc::ENABLE.0 & !1)), CcEffect::None);
        assert_eq!(csts(&r), 0);
        set(&mut r, Cc::ENABLE);
        assert!(r.is_ready());
        assert_eq!(set(&mut r, Cc(Cc::ENABLE.0 & !1)), CcEffect::CloseQueues(Ending::Reset));
        assert!(!r.is_ready());
        assert_eq!(csts(&r), 1, "still ready until the queues are closed");
        assert_eq!(
            r.write(Property::CC, false, u64::from(Cc::ENABLE.0)),
            Err(Status::COMMAND_SEQUENCE_ERROR)
        );
        assert_eq!(r.finish(), Some(Ending::Reset));
        assert_eq!(csts(&r), 0);
        set(&mut r, Cc::ENABLE);
        assert!(r.is_ready());
        assert_eq!(r.finish(), None);
    }

    #[test]
    fn shutdown_then_reset() {
        let mut r = Registers::new(128, false, Transport::Fabrics);
        set(&mut r, Cc::ENABLE);
        let effect = set(&mut r, Cc::ENABLE.with_shn(1));
        assert_eq!(effect, CcEffect::CloseQueues(Ending::Shutdown));
        assert_eq!(csts(&r), 0b0101);
        assert!(!r.is_ready() && r.is_shut_down());
        assert_eq!(set(&mut r, Cc::ENABLE.with_shn(2)), CcEffect::None);
        assert_eq!(r.finish(), Some(Ending::Shutdown));
        assert_eq!(csts(&r), 0b1001);
        assert_eq!(set(&mut r, Cc(0)), CcEffect::CloseQueues(Ending::Reset));
        r.finish();
        assert_eq!(csts(&r), 0);
        assert!(!r.is_shut_down());
    }

    #[test]
    fn shutdown_of_a_controller_that_was_never_enabled() {
        let mut r = Registers::new(128, false, Transport::Fabrics);
        assert_eq!(set(&mut r, Cc(0).with_shn(1)), CcEffect::None);
        assert!(Csts(csts(&r) as u32).is_shutdown_complete());
    }

    #[test]
    fn impossible_configuration_is_fatal() {
        for cc in [Cc::ENABLE.0 | 1 << 7, Cc::ENABLE.0 | 6 << 4, Cc::ENABLE.0 | 1 << 11, 1] {
            let mut r = Registers::new(128, false, Transport::Fabrics);
            set(&mut r, Cc(cc));
            assert_eq!(csts(&r), 2, "{cc:x}");
            set(&mut r, Cc(0));
            assert_eq!(csts(&r), 0);
        }
        let mut r = Registers::new(128, true, Transport::Fabrics);
        set(&mut r, Cc(1));
        assert!(r.is_ready(), "a discovery controller has no entry sizes");
    }

    #[test]
    fn properties() {
        let mut r = Registers::new(128, false, Transport::Fabrics);
        assert_eq!(r.read(Property::CAP, true), Ok(0x0800_0030_1e01_007f));
        assert_eq!(r.read(Property::VS, false), Ok(0x0002_0000));
        assert_eq!(r.read(Property::CRTO, false), Ok(30));
        assert_eq!(r.read(Property::NSSR, false), Ok(0));
        let invalid = Status::INVALID_FIELD_IN_COMMAND.dnr();
        assert_eq!(r.read(Property::CAP, false), Err(invalid));
        assert_eq!(r.read(Property::CC, true), Err(invalid));
        assert_eq!(r.read(Property(0x24), false), Err(invalid));
        assert_eq!(r.write(Property::CAP, true, 0), Err(invalid));
        assert_eq!(r.write(Property::CC, true, 0), Err(invalid));
        assert_eq!(r.write(Property::NSSR, true, u64::from(NSSR_RESET)), Err(invalid));
        assert_eq!(r.write(Property::NSSR, false, 0), Ok(CcEffect::None));
        let reset = r.write(Property::NSSR, false, u64::from(NSSR_RESET));
        assert_eq!(reset, Ok(CcEffect::SubsystemReset));

        let mut discovery = Registers::new(128, true, Transport::Fabrics);
        assert_eq!(discovery.read(Property::CAP, true).unwrap() & Cap::NSSRS, 0);
        assert_eq!(discovery.read(Property::NSSR, false), Err(invalid));
        let reset = discovery.write(Property::NSSR, false, u64::from(NSSR_RESET));
        assert_eq!(reset, Err(invalid));
    }

    #[test]
    fn a_subsystem_reset_shows_until_the_host_clears_it() {
        let mut r = Registers::new(128, false, Transport::Fabrics);
        r.note_subsystem_reset();
        set(&mut r, Cc::ENABLE);
        assert_eq!(csts(&r), 0b1_0001);
        assert_eq!(r.write(Property::CSTS, false, 0b0_1111), Ok(CcEffect::None));
        assert_eq!(csts(&r), 0b1_0001, "everything else is read-only");
        assert_eq!(r.write(Property::CSTS, false, 0b1_0000), Ok(CcEffect::None));
        assert_eq!(csts(&r), 1);
    }
}
