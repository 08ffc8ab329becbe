//! The host's side of one qpair.

use zerocopy::little_endian::{U16, U32};

use super::framer::{Framer, Item, Whole, check_hlen, type_of, view};
use super::target::{header_without_digest, is_term_req_valid};
use super::{Fault, PduHead, align_bytes};
use crate::spec::pdu::{
    C2hData, CapsuleCmd, CapsuleResp, CommonHeader, DigestFlags, FatalErrorStatus, H2cData, IcReq,
    IcResp, MAXH2CDATA_MIN, PDA_Z_MAX, PduFlags, PduType, R2t, TermReq, offset,
};

/// Status Field of a completion whose data arrived damaged: Generic Command Status, Transient
/// Transport Error, without DNR (NVMe/TCP 1.0, section 3.5). In bits 15:01 of the last two bytes
/// of the CQE; bit 0, the phase tag, is not used over fabrics.
const TRANSIENT_TRANSPORT_ERROR: u16 = 0x22 << 1;

/// What a [`Host`] asks of its controller.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Commands that may be outstanding; their cids are below it.
    pub queue_depth: u16,
    /// Ask for the header digest; a controller that does not grant it is refused.
    pub header_digest: bool,
    /// Ask for the data digest; a controller that does not grant it is refused.
    pub data_digest: bool,
    /// R2T PDUs of one command that may be outstanding, at least 1 (one-based, unlike MAXR2T).
    pub max_r2t: u32,
    /// HPDA: alignment of the controller's data in dwords, zero-based, at most 31.
    pub hpda: u8,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self { queue_depth: 128, header_digest: false, data_digest: false, max_r2t: 1, hpda: 0 }
    }
}

/// The data transfer of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// None.
    None,
    /// Controller to host.
    Read {
        /// Bytes, as in the SGL descriptor of the command.
        len: u32,
    },
    /// Host to controller.
    Write {
        /// Bytes, as in the SGL descriptor of the command.
        len: u32,
        /// In the capsule, behind its header; else the controller asks for it with R2Ts.
        in_capsule: bool,
    },
}

/// What a controller sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent<'a> {
    /// The controller accepted the connection; commands may be sent.
    Initialized,
    /// Data of a command, to be copied to its buffer. In order and without gaps.
    Data {
        /// The command.
        cid: u16,
        /// Where it belongs in the command's buffer, bytes.
        offset: u32,
        /// The payload.
        bytes: &'a [u8],
    },
    /// The controller asks for data: the driver answers with H2CData PDUs ([`Host::h2c_data`]).
    R2t {
        /// The command.
        cid: u16,
        /// The controller's tag, to be repeated.
        ttag: u16,
        /// Start in the command's buffer, bytes.
        offset: u32,
        /// Bytes asked for.
        len: u32,
    },
    /// The command is over and its cid free. With a success status all its data has been
    /// transferred.
    Complete {
        /// The command.
        cid: u16,
        /// The completion queue entry, made up if the controller sent SUCCESS with the data, and
        /// with status Transient Transport Error if a data digest did not match.
        cqe: [u8; 16],
    },
    /// The controller sent C2HTermReq and is owed nothing but the end of the connection.
    Terminated {
        /// Its Fatal Error Status; 0 if the PDU was malformed.
        fes: u16,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// No command has this cid.
    Idle,
    /// No data, or data in the capsule.
    Plain,
    Read,
    Write,
}

#[derive(Clone, Copy, Debug)]
struct Command {
    kind: Kind,
    /// A C2HData PDU with LAST_PDU has arrived.
    last: bool,
    digest_error: bool,
    /// Bytes of the command's buffer, and how many of them have been received or asked for.
    len: u32,
    done: u32,
    /// R2Ts not yet answered whole.
    r2ts: u32,
}

impl Command {
    const IDLE: Self =
        Self { kind: Kind::Idle, last: false, digest_error: false, len: 0, done: 0, r2ts: 0 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Moved on by ICResp.
    Initializing,
    Ready,
}

/// The host's side of one qpair: builds what the host sends, reads what the controller sends. See
/// the [module](super) for how to drive it.
///
/// A command holds its cid from [`Host::command`] to [`HostEvent::Complete`].
#[derive(Debug)]
pub struct Host {
    rx: Framer,
    state: State,
    config: HostConfig,
    /// Alignment of our data (CPDA) and of the controller's (HPDA), bytes.
    align_out: u32,
    align_in: u32,
    max_h2c_data: u32,
    /// The C2HData PDU being received ends its command.
    success: bool,
    commands: Vec<Command>,
    busy: usize,
}

impl Host {
    /// A connection on which nothing has been sent; [`Host::icreq`] goes first.
    #[must_use]
    pub fn new(config: HostConfig) -> Self {
        let config = HostConfig {
            hpda: config.hpda.min(PDA_Z_MAX),
            max_r2t: config.max_r2t.max(1),
            ..config
        };
        Self {
            rx: Framer::new(),
            state: State::Initializing,
            align_out: 4,
            align_in: align_bytes(config.hpda),
            max_h2c_data: MAXH2CDATA_MIN,
            success: false,
            commands: vec![Command::IDLE; usize::from(config.queue_depth)],
            busy: 0,
            config,
        }
    }

    /// ICReq, the first PDU to send.
    #[must_use]
    pub fn icreq(&self) -> PduHead {
        let hlen = size_of::<IcReq>();
        let pdu = IcReq {
            ch: CommonHeader::fixed(PduType::IC_REQ, hlen),
            pfv: U16::ZERO,
            hpda_z: self.config.hpda,
            dgst: DigestFlags::new(self.config.header_digest, self.config.data_digest),
            maxr2t_z: U32::new(self.config.max_r2t - 1),
            reserved16: [0; 112],
        };
        PduHead::new(&pdu, false, hlen)
    }

    /// Takes bytes from the front of `input`, up to the end of the next event. `Ok(None)`: the
    /// input is used up. A fault is final and is returned again by each further call.
    #[inline]
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<HostEvent<'a>>, Fault> {
        loop {
            if self.rx.is_in_header() {
                let partial;
                let state = self.state;
                let header = match self.rx.header(input, |rx, ch| header_len(rx, ch, state))? {
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
                    Some(Item::Bytes { index: cid, offset, bytes }) => {
                        return Ok(Some(HostEvent::Data { cid, offset, bytes }));
                    }
                    Some(Item::End { index: cid, digest_ok }) => {
                        if let Some(event) = self.on_data_end(cid, digest_ok) {
                            return Ok(Some(event));
                        }
                    }
                }
            }
        }
    }

    /// Where the next bytes of the input belong, if they are data that can be put there without being
    /// handed to [`Host::next`] (there is no data digest): the cid, the offset in the command's data,
    /// and how many bytes of the PDU follow there.
    #[inline]
    #[must_use]
    pub fn incoming(&self) -> Option<(u16, u32, u32)> {
        self.rx.incoming()
    }

    /// The next `len` bytes of the input, no more than [`Host::incoming`] said, are where they belong.
    /// [`Host::next`] goes on behind them; it has an event for the last without more input.
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
    fn on_header<'a>(&mut self, header: &[u8]) -> Result<Option<HostEvent<'a>>, Fault> {
        match type_of(header) {
            PduType::C2H_DATA => self.on_c2h_data(header).map(|()| None),
            PduType::CAPSULE_RESP => self.on_capsule_resp(header).map(Some),
            PduType::R2T => self.on_r2t(header).map(Some),
            PduType::IC_RESP => self.on_ic_resp(view(header)).map(Some),
            PduType::C2H_TERM_REQ => Ok(Some(self.on_term_req(view(header)))),
            _ => Err(wrong_type()),
        }
    }

    fn on_ic_resp<'a>(&mut self, pdu: &IcResp) -> Result<HostEvent<'a>, Fault> {
        if pdu.ch.plen.get() as usize != size_of::<IcResp>() {
            return Err(Fault::field(offset::PLEN, "PLEN of ICResp is not 128"));
        }
        if pdu.pfv.get() != 0 {
            return Err(Fault::unsupported(offset::PFV, "PDU format version is not 0"));
        }
        if pdu.cpda_z > PDA_Z_MAX {
            return Err(Fault::field(offset::PDA, "CPDA is more than 31"));
        }
        let (header, data) = (pdu.dgst.header(), pdu.dgst.data());
        if header && !self.config.header_digest || data && !self.config.data_digest {
            return Err(Fault::field(offset::DGST, "controller enabled a digest not asked for"));
        }
        // "The host may refuse the connection establishment" (NVMe/TCP 1.0, section 3.3.1.1):
        // whoever asked for digests does not want to go on without them unnoticed.
        if header != self.config.header_digest || data != self.config.data_digest {
            return Err(Fault::unsupported(offset::DGST, "controller refused a digest asked for"));
        }
        let max_h2c_data = pdu.maxh2cdata.get();
        if max_h2c_data < MAXH2CDATA_MIN || !max_h2c_data.is_multiple_of(4) {
            return Err(Fault::field(
                offset::MAXH2CDATA,
                "MAXH2CDATA is below 4096 or not a multiple of 4",
            ));
        }
        self.max_h2c_data = max_h2c_data;
        self.align_out = align_bytes(pdu.cpda_z);
        self.rx.enable_digests(header, data);
        self.state = State::Ready;
        Ok(HostEvent::Initialized)
    }

    #[inline]
    fn on_c2h_data(&mut self, header: &[u8]) -> Result<(), Fault> {
        let pdu: &C2hData = view(header);
        self.rx.check_digest(header, size_of::<C2hData>())?;
        let flags = pdu.ch.flags;
        let (last, success) =
            (flags.contains(PduFlags::LAST_PDU), flags.contains(PduFlags::SUCCESS));
        if success && !last {
            return Err(Fault::field(offset::FLAGS, "SUCCESS without LAST_PDU"));
        }
        let layout = self.rx.data_layout(&pdu.ch, header.len(), self.align_in)?;
        let (datao, datal) = (pdu.datao.get(), pdu.datal.get());
        if layout.len != datal {
            return Err(Fault::field(offset::PLEN, "PLEN does not agree with PDO and DATAL"));
        }
        let cid = pdu.cccid.get();
        let command = active(&mut self.commands, cid)
            .ok_or_else(|| Fault::field(offset::CCCID, "CCCID is not that of a command"))?;
        if command.kind != Kind::Read {
            return Err(Fault::sequence("data for a command that reads none"));
        }
        if command.last {
            return Err(Fault::sequence("data after LAST_PDU"));
        }
        if datal == 0 {
            return Err(Fault::field(offset::DATAL, "DATAL is 0"));
        }
        let end = match datao.checked_add(datal) {
            Some(end) if end <= command.len => end,
            _ => {
                return Err(Fault::status(
                    FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE,
                    "data outside the command's buffer",
                ));
            }
        };
        if datao != command.done {
            return Err(Fault::sequence("data does not follow on that of the PDU before"));
        }
        // The tail of a buffer may have any length.
        if !datal.is_multiple_of(4) && end != command.len {
            return Err(Fault::field(offset::DATAL, "DATAL is not a multiple of 4"));
        }
        if success && end != command.len {
            return Err(Fault::sequence("SUCCESS before all data"));
        }
        command.done = end;
        command.last = last;
        self.success = success;
        self.rx.expect_data(cid, datao, layout);
        Ok(())
    }

    #[inline]
    fn on_capsule_resp<'a>(&mut self, header: &[u8]) -> Result<HostEvent<'a>, Fault> {
        let pdu: &CapsuleResp = view(header);
        self.rx.check_digest(header, size_of::<CapsuleResp>())?;
        check_plen(&pdu.ch, header.len())?;
        let cid = u16::from_le_bytes([pdu.cqe[12], pdu.cqe[13]]);
        let command = active(&mut self.commands, cid)
            .ok_or_else(|| Fault::field(offset::RCCQE_CID, "CID is not that of a command"))?;
        let status = u16::from_le_bytes([pdu.cqe[14], pdu.cqe[15]]);
        let mut cqe = pdu.cqe;
        if status >> 1 == 0 {
            // A success that does not fit what was transferred would be silent corruption.
            if command.done != command.len || command.r2ts > 0 {
                return Err(Fault::sequence("success before all data"));
            }
            if command.digest_error {
                cqe[14..16].copy_from_slice(&TRANSIENT_TRANSPORT_ERROR.to_le_bytes());
            }
        }
        *command = Command::IDLE;
        self.busy -= 1;
        Ok(HostEvent::Complete { cid, cqe })
    }

    #[inline]
    fn on_r2t<'a>(&mut self, header: &[u8]) -> Result<HostEvent<'a>, Fault> {
        let pdu: &R2t = view(header);
        self.rx.check_digest(header, size_of::<R2t>())?;
        check_plen(&pdu.ch, header.len())?;
        let (cid, ttag) = (pdu.cccid.get(), pdu.ttag.get());
        let (offset, len) = (pdu.r2to.get(), pdu.r2tl.get());
        let command = active(&mut self.commands, cid)
            .ok_or_else(|| Fault::field(offset::CCCID, "CCCID is not that of a command"))?;
        if command.kind != Kind::Write {
            return Err(Fault::sequence("R2T for a command that has no data to ask for"));
        }
        if len == 0 {
            return Err(Fault::field(offset::DATAL, "R2TL is 0"));
        }
        let end = match offset.checked_add(len) {
            Some(end) if end <= command.len => end,
            _ => {
                return Err(Fault::status(
                    FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE,
                    "R2T outside the command's buffer",
                ));
            }
        };
        if offset != command.done {
            return Err(Fault::sequence("R2T does not follow on the one before"));
        }
        if !len.is_multiple_of(4) && end != command.len {
            return Err(Fault::field(offset::DATAL, "R2TL is not a multiple of 4"));
        }
        if command.r2ts == self.config.max_r2t {
            return Err(Fault::status(
                FatalErrorStatus::R2T_LIMIT_EXCEEDED,
                "more R2Ts outstanding than MAXR2T",
            ));
        }
        command.done = end;
        command.r2ts += 1;
        Ok(HostEvent::R2t { cid, ttag, offset, len })
    }

    fn on_term_req<'a>(&mut self, pdu: &TermReq) -> HostEvent<'a> {
        // "The host shall ignore a C2HTermReq PDU with a PDU length (PLEN) that exceeds 152 bytes
        // ... and shall terminate the connection immediately" (NVMe/TCP 1.0, section 3.5).
        let fes = if is_term_req_valid(pdu) { pdu.fes.get() } else { 0 };
        self.rx.die(None, &[]);
        HostEvent::Terminated { fes }
    }

    /// All data of a C2HData PDU has arrived.
    #[inline]
    fn on_data_end<'a>(&mut self, cid: u16, digest_ok: bool) -> Option<HostEvent<'a>> {
        let command = &mut self.commands[usize::from(cid)];
        command.digest_error |= !digest_ok;
        if !self.success {
            return None;
        }
        // "The host synthesizes a Completion Queue Entry for the command with the Command Specific
        // field and the Status field both cleared to 0h" (NVMe/TCP 1.0, section 3.3.2.1).
        let mut cqe = [0; 16];
        cqe[12..14].copy_from_slice(&cid.to_le_bytes());
        if command.digest_error {
            cqe[14..16].copy_from_slice(&TRANSIENT_TRANSPORT_ERROR.to_le_bytes());
        }
        *command = Command::IDLE;
        self.busy -= 1;
        Some(HostEvent::Complete { cid, cqe })
    }

    #[cold]
    fn die(&mut self, fault: Fault, header: &[u8]) {
        self.rx.die(Some(fault), header_without_digest(header));
    }

    /// Registers a command under `cid` and builds its capsule's header. For in-capsule data the
    /// driver sends the data behind it and, if [`Host::data_digest`], its digest. The CID of `sqe`
    /// is set to `cid`. A transfer of 0 bytes is no transfer.
    ///
    /// # Panics
    ///
    /// If `cid` is not below the queue depth or is in use, or before [`HostEvent::Initialized`]:
    /// the driver's mistakes.
    #[inline]
    #[must_use]
    pub fn command(&mut self, cid: u16, sqe: &[u8; 64], transfer: Transfer) -> PduHead {
        assert!(self.state == State::Ready, "command before the connection is initialised");
        let command = &mut self.commands[usize::from(cid)];
        assert!(command.kind == Kind::Idle, "command on a cid that is in use");
        let (kind, len, in_capsule_len) = match transfer {
            Transfer::None | Transfer::Read { len: 0 } | Transfer::Write { len: 0, .. } => {
                (Kind::Plain, 0, 0)
            }
            Transfer::Write { len, in_capsule: true } => (Kind::Plain, 0, len),
            Transfer::Write { len, in_capsule: false } => (Kind::Write, len, 0),
            Transfer::Read { len } => (Kind::Read, len, 0),
        };
        *command = Command { kind, len, ..Command::IDLE };
        self.busy += 1;

        let hlen = size_of::<CapsuleCmd>();
        let mut flags = PduFlags::default();
        let mut head_len = self.rx.with_header_digest(hlen);
        let (mut pdo, mut plen) = (0, head_len);
        if in_capsule_len > 0 {
            flags = flags.with(PduFlags::DDGSTF, self.rx.data_digest());
            (pdo, plen) = self.rx.outgoing_layout(hlen, in_capsule_len, self.align_out);
            head_len = pdo;
        }
        let mut sqe = *sqe;
        sqe[2..4].copy_from_slice(&cid.to_le_bytes());
        let pdu =
            CapsuleCmd { ch: self.rx.common(PduType::CAPSULE_CMD, flags, hlen, pdo, plen), sqe };
        PduHead::new(&pdu, self.rx.header_digest(), head_len)
    }

    /// H2CData header for `len` bytes from `offset` of the data that the R2T with `ttag` asked
    /// for; the driver sends the data behind it and, if [`Host::data_digest`], its digest. An
    /// R2T's data is sent in order, `last` with its end, at most [`Host::max_h2c_data`] at once.
    /// If the command has completed with an error in the meantime there is nothing to send.
    ///
    /// # Panics
    ///
    /// If `len` is 0 or more than MAXH2CDATA: the driver's mistakes.
    #[inline]
    #[must_use]
    pub fn h2c_data(&mut self, cid: u16, ttag: u16, offset: u32, len: u32, last: bool) -> PduHead {
        assert!(len > 0 && len <= self.max_h2c_data, "H2CData of an impossible length");
        if last && let Some(command) = active(&mut self.commands, cid) {
            command.r2ts = command.r2ts.saturating_sub(1);
        }
        let hlen = size_of::<H2cData>();
        let (pdo, plen) = self.rx.outgoing_layout(hlen, len, self.align_out);
        let flags = PduFlags::default()
            .with(PduFlags::DDGSTF, self.rx.data_digest())
            .with(PduFlags::LAST_PDU, last);
        let pdu = H2cData {
            ch: self.rx.common(PduType::H2C_DATA, flags, hlen, pdo, plen),
            cccid: U16::new(cid),
            ttag: U16::new(ttag),
            datao: U32::new(offset),
            datal: U32::new(len),
            reserved20: [0; 4],
        };
        PduHead::new(&pdu, self.rx.header_digest(), pdo)
    }

    /// H2CTermReq for a fault that [`Host::next`] returned, with the header it was found in.
    #[must_use]
    pub fn term_req(&self, fault: &Fault) -> PduHead {
        fault.term_req(PduType::H2C_TERM_REQ, self.rx.header_in_error())
    }

    /// ICResp has been received: commands may be sent.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        self.state == State::Ready
    }

    /// MAXH2CDATA: most bytes in one H2CData PDU.
    #[inline]
    #[must_use]
    pub fn max_h2c_data(&self) -> u32 {
        self.max_h2c_data
    }

    /// Whether the data digest is in use: a digest follows the data of every capsule with data and
    /// every H2CData PDU.
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

    /// Whether `cid` is held by a command.
    #[inline]
    #[must_use]
    pub fn is_outstanding(&self, cid: u16) -> bool {
        self.commands.get(usize::from(cid)).is_some_and(|command| command.kind != Kind::Idle)
    }

    /// Commands that have not completed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.busy
    }
}

/// The command that holds `cid`.
#[inline]
fn active(commands: &mut [Command], cid: u16) -> Option<&mut Command> {
    commands.get_mut(usize::from(cid)).filter(|command| command.kind != Kind::Idle)
}

/// Checks PLEN of a PDU without data.
#[inline]
fn check_plen(ch: &CommonHeader, header_len: usize) -> Result<(), Fault> {
    if ch.plen.get() as usize != header_len {
        return Err(Fault::field(offset::PLEN, "PLEN is not that of the header"));
    }
    Ok(())
}

/// Length of the header that begins with `ch`, its digest included.
#[inline]
fn header_len(rx: &Framer, ch: &CommonHeader, state: State) -> Result<usize, Fault> {
    match (ch.pdu_type, state) {
        (PduType::C2H_DATA, State::Ready) => rx.check_length(ch, size_of::<C2hData>()),
        (PduType::CAPSULE_RESP, State::Ready) => rx.check_length(ch, size_of::<CapsuleResp>()),
        (PduType::R2T, State::Ready) => rx.check_length(ch, size_of::<R2t>()),
        (PduType::IC_RESP, State::Initializing) => check_hlen(ch, size_of::<IcResp>()),
        (PduType::C2H_TERM_REQ, _) => Ok(size_of::<TermReq>()),
        (PduType::IC_RESP, _) => Err(Fault::sequence("a second ICResp")),
        (PduType::C2H_DATA | PduType::CAPSULE_RESP | PduType::R2T, _) => {
            Err(Fault::sequence("a PDU before ICResp"))
        }
        _ => Err(wrong_type()),
    }
}

#[cold]
fn wrong_type() -> Fault {
    Fault::field(offset::PDU_TYPE, "not a PDU type that a controller sends")
}

#[cfg(test)]
mod tests;
