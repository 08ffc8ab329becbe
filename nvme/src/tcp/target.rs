//! The controller's side of one qpair.

use zerocopy::little_endian::{U16, U32};

use super::framer::{Framer, Item, Whole, check_hlen, type_of, view};
use super::{Fault, PduHead, align_bytes};
use crate::spec::pdu::{
    ADMIN_IN_CAPSULE_BYTES_MAX, C2hData, CapsuleCmd, CapsuleResp, CommonHeader, DigestFlags,
    FatalErrorStatus, H2cData, IcReq, IcResp, MAXH2CDATA_MIN, PDA_Z_MAX, PduFlags, PduType, R2t,
    TERM_REQ_DATA_BYTES_MAX, TermReq, offset,
};

/// Opcode of a Fabrics command, byte 0 of the SQE (NVMe Base 2.0, Fabrics command set).
const OPCODE_FABRICS: u8 = 0x7f;

/// What a [`Target`] offers its host.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// MAXH2CDATA, bytes. Rounded down to a multiple of 4, raised to 4,096.
    pub max_h2c_data: u32,
    /// Most bytes of in-capsule data. Admin and Fabrics commands may always have 8,192 of them
    /// (NVMe/TCP 1.0, section 3.3.1), so this stays 8,192 until the queue is known to be an I/O
    /// queue ([`Target::set_limits`]).
    pub in_capsule_max: u32,
    /// CPDA: alignment of the host's data in dwords, zero-based, at most 31. Linux hosts refuse
    /// anything but 0.
    pub cpda: u8,
    /// Commands that may be outstanding: the queue depth and some slack for hosts that reuse a
    /// place before they have seen the controller give it back.
    pub slots: u16,
    /// Grant the header digest to hosts that ask for it.
    pub allow_header_digest: bool,
    /// Grant the data digest to hosts that ask for it.
    pub allow_data_digest: bool,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            max_h2c_data: 128 << 10,
            in_capsule_max: ADMIN_IN_CAPSULE_BYTES_MAX,
            cpda: 0,
            slots: 64,
            allow_header_digest: true,
            allow_data_digest: true,
        }
    }
}

/// What a host sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent<'a> {
    /// The host asked to initialise the connection.
    Initialized {
        /// The ICResp to send.
        reply: PduHead,
    },
    /// A command, which now holds `slot` until [`Target::release`].
    Command {
        /// Its slot; the cid is in [`Target::cid`].
        slot: u16,
        /// The submission queue entry.
        sqe: [u8; 64],
        /// Bytes of in-capsule data that follow as `Data` events, unless the slot is released.
        in_capsule_len: u32,
    },
    /// Payload of a capsule or of an H2CData PDU, to be copied to the command's buffer.
    Data {
        /// The command's slot.
        slot: u16,
        /// Where it belongs in the command's data, bytes.
        offset: u32,
        /// The payload.
        bytes: &'a [u8],
    },
    /// All in-capsule data, or all that the R2T asked for, has arrived; digests matched.
    DataEnd {
        /// The command's slot.
        slot: u16,
    },
    /// As `DataEnd`, but a data digest did not match: the command is to be completed with
    /// Transient Transport Error (NVMe/TCP 1.0, section 3.5; a host may retry it).
    DataDigestError {
        /// The command's slot.
        slot: u16,
    },
    /// The host sent H2CTermReq and is owed nothing but the end of the connection.
    Terminated {
        /// Its Fatal Error Status; 0 if the PDU was malformed.
        fes: u16,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// On the free list, if below the limit.
    Free,
    /// The driver's, from `Command` to `release`.
    Busy,
    /// Released, but the host still owes data for it; that is swallowed. Moved on by its last byte.
    Draining,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    usage: Use,
    digest_error: bool,
    cid: u16,
    /// The R2T outstanding or served last asked for `r2t_start..r2t_end`; `r2t_next` is the offset
    /// that comes next. Nothing is outstanding if `r2t_next == r2t_end`.
    r2t_start: u32,
    r2t_next: u32,
    r2t_end: u32,
}

impl Slot {
    const FREE: Self = Self {
        usage: Use::Free,
        digest_error: false,
        cid: 0,
        r2t_start: 0,
        r2t_next: 0,
        r2t_end: 0,
    };
}

/// The controller's side of one qpair: reads what the host sends, builds what the controller sends.
/// See the [module](super) for how to drive it.
///
/// A command holds a slot from [`TargetEvent::Command`] to [`Target::release`]. The slot's number
/// is the transfer tag of its R2T, of which there is one at a time. A driver may release a slot
/// while the host still sends data for it; that data is swallowed and the slot is reused only
/// afterwards. It should not do so with an R2T outstanding unless it must: a host that then never
/// sends the data keeps the slot from being reused.
#[derive(Debug)]
pub struct Target {
    rx: Framer,
    initialized: bool,
    /// Alignment of the host's data (CPDA) and of ours (HPDA), bytes.
    align_in: u32,
    align_out: u32,
    in_capsule_max: u32,
    config: TargetConfig,
    slots: Vec<Slot>,
    free: Vec<u16>,
    busy: usize,
}

impl Target {
    /// A connection on which nothing has been received.
    #[must_use]
    pub fn new(config: TargetConfig) -> Self {
        let cpda = config.cpda.min(PDA_Z_MAX);
        let max_h2c_data = (config.max_h2c_data & !3).max(MAXH2CDATA_MIN);
        let config = TargetConfig { cpda, max_h2c_data, ..config };
        let mut target = Self {
            rx: Framer::new(),
            initialized: false,
            align_in: align_bytes(cpda),
            align_out: 4,
            in_capsule_max: 0,
            slots: Vec::new(),
            free: Vec::new(),
            busy: 0,
            config,
        };
        target.set_limits(target.config.slots, target.config.in_capsule_max);
        target
    }

    /// New limits, when Connect has told what queue this is. Slots in use stay so; those beyond
    /// the limit go when they are released.
    pub fn set_limits(&mut self, slots: u16, in_capsule_max: u32) {
        self.in_capsule_max = in_capsule_max;
        self.config.slots = slots;
        if self.slots.len() < usize::from(slots) {
            self.slots.resize(usize::from(slots), Slot::FREE);
        }
        self.free.clear();
        self.free.reserve_exact(usize::from(slots));
        // Lowest last: slots are handed out from the end, and low ones stay warm in the cache.
        let free = |slot: &u16| self.slots[usize::from(*slot)].usage == Use::Free;
        self.free.extend((0..slots).rev().filter(free));
    }

    /// Takes bytes from the front of `input`, up to the end of the next event. `Ok(None)`: the
    /// input is used up. A fault is final and is returned again by each further call.
    #[inline]
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<TargetEvent<'a>>, Fault> {
        loop {
            if self.rx.is_in_header() {
                let partial;
                let initialized = self.initialized;
                let header =
                    match self.rx.header(input, |rx, ch| header_len(rx, ch, initialized))? {
                        Whole::Input(header) => header,
                        Whole::Partial(bytes, len) => {
                            partial = bytes;
                            &partial[..len]
                        }
                        Whole::No => return Ok(None),
                    };
                match self.on_header(header) {
                    Ok(None) => {}
                    Ok(event) => return Ok(event),
                    Err(fault) => {
                        self.die(fault, header);
                        return Err(fault);
                    }
                }
            } else if let Some(over) = self.rx.dead(input) {
                return over.map(|()| None);
            } else {
                match self.rx.data(input) {
                    None => return Ok(None),
                    Some(Item::Bytes { index: slot, offset, bytes }) => {
                        if self.slots[usize::from(slot)].usage == Use::Busy {
                            return Ok(Some(TargetEvent::Data { slot, offset, bytes }));
                        }
                    }
                    Some(Item::End { index: slot, digest_ok }) => {
                        if let Some(event) = self.on_data_end(slot, digest_ok) {
                            return Ok(Some(event));
                        }
                    }
                }
            }
        }
    }

    /// Where the next bytes of the input belong, if they are data that can be put there without being
    /// handed to [`Target::next`] (there is no data digest): the slot, the offset in the command's data,
    /// and how many bytes of the PDU follow there.
    #[inline]
    #[must_use]
    pub fn incoming(&self) -> Option<(u16, u32, u32)> {
        let incoming = self.rx.incoming();
        incoming.filter(|(slot, ..)| self.slots[usize::from(*slot)].usage == Use::Busy)
    }

    /// The next `len` bytes of the input, no more than [`Target::incoming`] said, are where they belong.
    /// [`Target::next`] goes on behind them; it has an event for the last without more input.
    ///
    /// # Panics
    ///
    /// If no such data is expected: a mistake of the driver.
    #[inline]
    pub fn placed(&mut self, len: u32) {
        self.rx.placed(len);
    }

    /// One whole header; what it announces is in `self.rx` afterwards.
    #[inline]
    fn on_header<'a>(&mut self, header: &[u8]) -> Result<Option<TargetEvent<'a>>, Fault> {
        match type_of(header) {
            PduType::CAPSULE_CMD => self.on_capsule_cmd(header).map(Some),
            PduType::H2C_DATA => self.on_h2c_data(header).map(|()| None),
            PduType::IC_REQ => self.on_ic_req(view(header)).map(Some),
            PduType::H2C_TERM_REQ => Ok(Some(self.on_term_req(view(header)))),
            _ => Err(wrong_type()),
        }
    }

    fn on_ic_req<'a>(&mut self, pdu: &IcReq) -> Result<TargetEvent<'a>, Fault> {
        if pdu.ch.plen.get() as usize != size_of::<IcReq>() {
            return Err(Fault::field(offset::PLEN, "PLEN of ICReq is not 128"));
        }
        if pdu.pfv.get() != 0 {
            return Err(Fault::unsupported(offset::PFV, "PDU format version is not 0"));
        }
        if pdu.hpda_z > PDA_Z_MAX {
            return Err(Fault::field(offset::PDA, "HPDA is more than 31"));
        }
        // MAXR2T is not needed: there is never more than one R2T of a command outstanding.
        let header_digest = pdu.dgst.header() && self.config.allow_header_digest;
        let data_digest = pdu.dgst.data() && self.config.allow_data_digest;
        self.align_out = align_bytes(pdu.hpda_z);
        self.rx.enable_digests(header_digest, data_digest);
        self.initialized = true;
        let hlen = size_of::<IcResp>();
        let reply = IcResp {
            ch: CommonHeader::fixed(PduType::IC_RESP, hlen),
            pfv: U16::ZERO,
            cpda_z: self.config.cpda,
            dgst: DigestFlags::new(header_digest, data_digest),
            maxh2cdata: U32::new(self.config.max_h2c_data),
            reserved16: [0; 112],
        };
        Ok(TargetEvent::Initialized { reply: PduHead::new(&reply, false, hlen) })
    }

    #[inline]
    fn on_capsule_cmd<'a>(&mut self, header: &[u8]) -> Result<TargetEvent<'a>, Fault> {
        let pdu: &CapsuleCmd = view(header);
        self.rx.check_digest(header, size_of::<CapsuleCmd>())?;
        let plen = pdu.ch.plen.get() as usize;
        let mut data = None;
        // Without data DDGSTF and PDO mean nothing.
        if plen != header.len() {
            if plen < header.len() {
                return Err(Fault::field(offset::PLEN, "PLEN ends inside the header"));
            }
            let layout = self.rx.data_layout(&pdu.ch, header.len(), self.align_in)?;
            let max = match pdu.sqe[0] {
                OPCODE_FABRICS => self.in_capsule_max.max(ADMIN_IN_CAPSULE_BYTES_MAX),
                _ => self.in_capsule_max,
            };
            if layout.len == 0 {
                return Err(Fault::field(offset::PLEN, "PLEN ends before the data"));
            }
            if layout.len > max {
                return Err(Fault::field(
                    offset::PLEN,
                    "more in-capsule data than the queue takes",
                ));
            }
            data = Some(layout);
        }
        let Some(slot) = self.free.pop() else {
            return Err(Fault::sequence("more commands outstanding than the queue has"));
        };
        self.slots[usize::from(slot)] = Slot {
            usage: Use::Busy,
            cid: u16::from_le_bytes([pdu.sqe[2], pdu.sqe[3]]),
            ..Slot::FREE
        };
        self.busy += 1;
        let mut in_capsule_len = 0;
        if let Some(layout) = data {
            in_capsule_len = layout.len;
            self.rx.expect_data(slot, 0, layout);
        }
        Ok(TargetEvent::Command { slot, sqe: pdu.sqe, in_capsule_len })
    }

    #[inline]
    fn on_h2c_data(&mut self, header: &[u8]) -> Result<(), Fault> {
        let pdu: &H2cData = view(header);
        self.rx.check_digest(header, size_of::<H2cData>())?;
        let layout = self.rx.data_layout(&pdu.ch, header.len(), self.align_in)?;
        let (datao, datal) = (pdu.datao.get(), pdu.datal.get());
        if layout.len != datal {
            return Err(Fault::field(offset::PLEN, "PLEN does not agree with PDO and DATAL"));
        }
        let ttag = pdu.ttag.get();
        let slot = match self.slots.get_mut(usize::from(ttag)) {
            Some(slot) if slot.usage != Use::Free && slot.r2t_end > 0 => slot,
            _ => return Err(Fault::field(offset::TTAG, "TTAG is not that of an R2T")),
        };
        if pdu.cccid.get() != slot.cid {
            return Err(Fault::field(offset::CCCID, "CCCID is not that of the R2T"));
        }
        if datal == 0 {
            return Err(Fault::field(offset::DATAL, "DATAL is 0"));
        }
        if datal > self.config.max_h2c_data {
            return Err(Fault::status(
                FatalErrorStatus::DATA_TRANSFER_LIMIT_EXCEEDED,
                "DATAL is more than MAXH2CDATA",
            ));
        }
        let end = match datao.checked_add(datal) {
            Some(end) if datao >= slot.r2t_start && end <= slot.r2t_end => end,
            _ => {
                return Err(Fault::status(
                    FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE,
                    "data outside the range of its R2T",
                ));
            }
        };
        if datao != slot.r2t_next {
            return Err(Fault::sequence("data does not follow on that of the PDU before"));
        }
        // The tail of a buffer may have any length: it is what the R2T asked for.
        if !datal.is_multiple_of(4) && end != slot.r2t_end {
            return Err(Fault::field(offset::DATAL, "DATAL is not a multiple of 4"));
        }
        if pdu.ch.flags.contains(PduFlags::LAST_PDU) != (end == slot.r2t_end) {
            return Err(Fault::sequence("LAST_PDU is not at the end of the R2T"));
        }
        slot.r2t_next = end;
        self.rx.expect_data(ttag, datao, layout);
        Ok(())
    }

    fn on_term_req<'a>(&mut self, pdu: &TermReq) -> TargetEvent<'a> {
        // "The controller shall ignore a H2CTermReq PDU with a PDU length (PLEN) that exceeds 152
        // bytes ... and shall terminate the connection immediately" (NVMe/TCP 1.0, section 3.5).
        let fes = if is_term_req_valid(pdu) { pdu.fes.get() } else { 0 };
        self.rx.die(None, &[]);
        TargetEvent::Terminated { fes }
    }

    /// All data of a PDU for `slot` has arrived.
    #[inline]
    fn on_data_end<'a>(&mut self, slot: u16, digest_ok: bool) -> Option<TargetEvent<'a>> {
        let entry = &mut self.slots[usize::from(slot)];
        entry.digest_error |= !digest_ok;
        if entry.r2t_next != entry.r2t_end {
            return None;
        }
        if entry.usage == Use::Draining {
            self.retire(slot);
            return None;
        }
        if std::mem::take(&mut entry.digest_error) {
            return Some(TargetEvent::DataDigestError { slot });
        }
        Some(TargetEvent::DataEnd { slot })
    }

    /// The host owes nothing for `slot` any more, and the driver has released it.
    #[inline]
    fn retire(&mut self, slot: u16) {
        self.slots[usize::from(slot)].usage = Use::Free;
        if slot < self.config.slots {
            self.free.push(slot);
        }
    }

    #[cold]
    fn die(&mut self, fault: Fault, header: &[u8]) {
        self.rx.die(Some(fault), header_without_digest(header));
    }

    /// R2T that asks for `len` bytes of the data of `slot` from `offset`. The transfer tag is the
    /// slot. Both should be multiples of 4 (NVMe/TCP 1.0, Figure 28), except at the end of the
    /// data.
    ///
    /// # Panics
    ///
    /// If the slot is not in use, an R2T of it is outstanding, `len` is 0, or `offset` is not
    /// where the R2T before ended: the driver's mistakes.
    #[inline]
    #[must_use]
    pub fn r2t(&mut self, slot: u16, offset: u32, len: u32) -> PduHead {
        let entry = &mut self.slots[usize::from(slot)];
        assert!(entry.usage == Use::Busy, "R2T for a slot that is not in use");
        assert!(entry.r2t_next == entry.r2t_end, "R2T while another is outstanding");
        assert!(offset == entry.r2t_end && len > 0, "R2T out of sequence");
        let end = offset.checked_add(len).expect("a command's data is less than 4 GiB");
        (entry.r2t_start, entry.r2t_next, entry.r2t_end) = (offset, offset, end);
        let cccid = U16::new(entry.cid);
        let hlen = size_of::<R2t>();
        let plen = self.rx.with_header_digest(hlen);
        let pdu = R2t {
            ch: self.rx.common(PduType::R2T, PduFlags::default(), hlen, 0, plen),
            cccid,
            ttag: U16::new(slot),
            r2to: U32::new(offset),
            r2tl: U32::new(len),
            reserved20: [0; 4],
        };
        PduHead::new(&pdu, self.rx.header_digest(), plen)
    }

    /// C2HData header for `len` bytes of the data of `slot` from `offset`; the driver sends the
    /// data behind it and, if [`Target::data_digest`], its digest. A command's data is sent in
    /// order from offset 0, `last` with its end; `len` should be a multiple of 4 but at the end.
    /// `success` (only with `last`) says that the command has succeeded with DW0 0 and that no
    /// response capsule follows; only for a queue without SQHD updates (NVMe/TCP 1.0, section
    /// 3.3.2.1).
    ///
    /// # Panics
    ///
    /// If the slot is not in use, `len` is 0 or more than 4 GiB less header, or `success` comes
    /// without `last`: the driver's mistakes.
    #[inline]
    #[must_use]
    pub fn c2h_data(
        &mut self,
        slot: u16,
        offset: u32,
        len: u32,
        last: bool,
        success: bool,
    ) -> PduHead {
        let entry = &self.slots[usize::from(slot)];
        assert!(entry.usage == Use::Busy, "data for a slot that is not in use");
        assert!(len > 0 && (last || !success), "data PDU without data, or SUCCESS before the end");
        let hlen = size_of::<C2hData>();
        let (pdo, plen) = self.rx.outgoing_layout(hlen, len, self.align_out);
        let flags = PduFlags::default()
            .with(PduFlags::DDGSTF, self.rx.data_digest())
            .with(PduFlags::LAST_PDU, last)
            .with(PduFlags::SUCCESS, success);
        let pdu = C2hData {
            ch: self.rx.common(PduType::C2H_DATA, flags, hlen, pdo, plen),
            cccid: U16::new(entry.cid),
            reserved10: [0; 2],
            datao: U32::new(offset),
            datal: U32::new(len),
            reserved20: [0; 4],
        };
        PduHead::new(&pdu, self.rx.header_digest(), pdo)
    }

    /// Response capsule for the command in `slot`; the CID of `cqe` is set to the command's. The
    /// slot stays in use until [`Target::release`].
    ///
    /// # Panics
    ///
    /// If the slot is not in use: the driver's mistake.
    #[inline]
    #[must_use]
    pub fn response(&mut self, slot: u16, cqe: &[u8; 16]) -> PduHead {
        let entry = &self.slots[usize::from(slot)];
        assert!(entry.usage == Use::Busy, "response for a slot that is not in use");
        let mut cqe = *cqe;
        cqe[12..14].copy_from_slice(&entry.cid.to_le_bytes());
        let hlen = size_of::<CapsuleResp>();
        let plen = self.rx.with_header_digest(hlen);
        let ch = self.rx.common(PduType::CAPSULE_RESP, PduFlags::default(), hlen, 0, plen);
        PduHead::new(&CapsuleResp { ch, cqe }, self.rx.header_digest(), plen)
    }

    /// The driver is done with `slot`: no event for it comes any more until it is handed out with
    /// another command.
    ///
    /// # Panics
    ///
    /// If the slot is not in use: the driver's mistake.
    #[inline]
    pub fn release(&mut self, slot: u16) {
        let entry = &mut self.slots[usize::from(slot)];
        assert!(entry.usage == Use::Busy, "release of a slot that is not in use");
        self.busy -= 1;
        if entry.r2t_next != entry.r2t_end || self.rx.receiving() == Some(slot) {
            entry.usage = Use::Draining;
        } else {
            self.retire(slot);
        }
    }

    /// C2HTermReq for a fault that [`Target::next`] returned, with the header it was found in.
    #[must_use]
    pub fn term_req(&self, fault: &Fault) -> PduHead {
        fault.term_req(PduType::C2H_TERM_REQ, self.rx.header_in_error())
    }

    /// ICReq has been received; everything before it but H2CTermReq is a fault.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        self.initialized
    }

    /// Whether the data digest is in use: a digest follows the data of every C2HData PDU.
    #[inline]
    #[must_use]
    pub fn data_digest(&self) -> bool {
        self.rx.data_digest()
    }

    /// Whether the header digest is in use; the heads built here have it already.
    #[must_use]
    pub fn header_digest(&self) -> bool {
        self.rx.header_digest()
    }

    /// The command identifier that the host gave the command in `slot`.
    #[inline]
    #[must_use]
    pub fn cid(&self, slot: u16) -> u16 {
        self.slots[usize::from(slot)].cid
    }

    /// Commands that the driver has not released.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.busy
    }
}

/// Length of the header that begins with `ch`, its digest included.
#[inline]
fn header_len(rx: &Framer, ch: &CommonHeader, initialized: bool) -> Result<usize, Fault> {
    match ch.pdu_type {
        PduType::CAPSULE_CMD if initialized => rx.check_length(ch, size_of::<CapsuleCmd>()),
        PduType::H2C_DATA if initialized => rx.check_length(ch, size_of::<H2cData>()),
        PduType::IC_REQ if !initialized => check_hlen(ch, size_of::<IcReq>()),
        PduType::H2C_TERM_REQ => Ok(size_of::<TermReq>()),
        PduType::IC_REQ => Err(Fault::sequence("a second ICReq")),
        PduType::CAPSULE_CMD | PduType::H2C_DATA => Err(Fault::sequence("a PDU before ICReq")),
        _ => Err(wrong_type()),
    }
}

#[cold]
fn wrong_type() -> Fault {
    Fault::field(offset::PDU_TYPE, "not a PDU type that a host sends")
}

/// Whether the lengths of a TermReq are such that it may be looked at (NVMe/TCP 1.0, section 3.5).
pub(super) fn is_term_req_valid(pdu: &TermReq) -> bool {
    let hlen = size_of::<TermReq>();
    usize::from(pdu.ch.hlen) == hlen
        && (hlen..=hlen + TERM_REQ_DATA_BYTES_MAX).contains(&(pdu.ch.plen.get() as usize))
}

/// The PDU header proper of a header that the framer took.
#[cold]
pub(super) fn header_without_digest(header: &[u8]) -> &[u8] {
    let hlen = usize::from(view::<CommonHeader>(header).hlen);
    &header[..hlen.min(header.len())]
}

#[cfg(test)]
mod tests;
