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

use crate::spec::{Cap, Cc, Csts, NSSR_RESET, Property, Status, VERSION_2_0};

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
}

impl Registers {
    pub(crate) fn new(queue_entries_max: u16, is_discovery: bool) -> Registers {
        let cap = u64::from(queue_entries_max - 1)
            | Cap::CQR
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
        }
    }

    pub(crate) fn note_subsystem_reset(&mut self) {
        self.subsystem_was_reset = true;
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    pub(crate) fn is_ending(&self) -> bool {
        matches!(self.state, State::Ending(_))
    }

    pub(crate) fn is_shut_down(&self) -> bool {
        matches!(self.state, State::ShutDown | State::Ending(Ending::Shutdown))
    }

    pub(crate) fn csts(&self) -> Csts {
        let state = match self.state {
            State::Disabled => 0,
            State::Fatal => Csts::CFS,
            State::Ready | State::Ending(Ending::Reset) => Csts::RDY,
            State::Ending(Ending::Shutdown) => Csts::RDY | Csts::SHST_OCCURRING,
            State::ShutDown => Csts::RDY | Csts::SHST_COMPLETE,
        };
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
            _ => Err(Status::INVALID_FIELD_IN_COMMAND.dnr()),
        }
    }

    fn write_cc(&mut self, new: Cc) -> Result<CcEffect, Status> {
        let old = self.cc;
        if new.en() && !old.en() && self.is_ending() {
            // "The host shall wait for CSTS.RDY to be 0 before setting EN to 1."
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        self.cc = new;
        if new.en() && !old.en() {
            self.state = if self.is_supported(new) { State::Ready } else { State::Fatal };
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
        let sizes_ok = self.is_discovery || (cc.iosqes() == 6 && cc.iocqes() == 4);
        cc.css() == 0 && cc.mps() == 0 && cc.ams() == 0 && sizes_ok
    }

    /// The I/O queues are closed: what ended, if anything was ending.
    pub(crate) fn finish(&mut self) -> Option<Ending> {
        let State::Ending(ending) = self.state else { return None };
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
        let mut r = Registers::new(128, false);
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
        let mut r = Registers::new(128, false);
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
        let mut r = Registers::new(128, false);
        assert_eq!(set(&mut r, Cc(0).with_shn(1)), CcEffect::None);
        assert!(Csts(csts(&r) as u32).is_shutdown_complete());
    }

    #[test]
    fn impossible_configuration_is_fatal() {
        for cc in [Cc::ENABLE.0 | 1 << 7, Cc::ENABLE.0 | 6 << 4, Cc::ENABLE.0 | 1 << 11, 1] {
            let mut r = Registers::new(128, false);
            set(&mut r, Cc(cc));
            assert_eq!(csts(&r), 2, "{cc:x}");
            set(&mut r, Cc(0));
            assert_eq!(csts(&r), 0);
        }
        let mut r = Registers::new(128, true);
        set(&mut r, Cc(1));
        assert!(r.is_ready(), "a discovery controller has no entry sizes");
    }

    #[test]
    fn properties() {
        let mut r = Registers::new(128, false);
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

        let mut discovery = Registers::new(128, true);
        assert_eq!(discovery.read(Property::CAP, true).unwrap() & Cap::NSSRS, 0);
        assert_eq!(discovery.read(Property::NSSR, false), Err(invalid));
        let reset = discovery.write(Property::NSSR, false, u64::from(NSSR_RESET));
        assert_eq!(reset, Err(invalid));
    }

    #[test]
    fn a_subsystem_reset_shows_until_the_host_clears_it() {
        let mut r = Registers::new(128, false);
        r.note_subsystem_reset();
        set(&mut r, Cc::ENABLE);
        assert_eq!(csts(&r), 0b1_0001);
        assert_eq!(r.write(Property::CSTS, false, 0b0_1111), Ok(CcEffect::None));
        assert_eq!(csts(&r), 0b1_0001, "everything else is read-only");
        assert_eq!(r.write(Property::CSTS, false, 0b1_0000), Ok(CcEffect::None));
        assert_eq!(csts(&r), 1);
    }
}
