//! A host by hand: PDUs built byte by byte, right or wrong as a test wants them, and a blocking
//! connection that checks every byte of what a controller sends.
//!
//! Like [`load`](crate::load) it knows the wire format by itself; of the product it uses CRC32C
//! alone, which has published test vectors.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nvme::tcp::Crc32c;

/// PDU types that a host sends, and R2T, which it must not.
pub const ICREQ: u8 = 0;
/// Initialize Connection Response.
pub const ICRESP: u8 = 1;
/// Host to Controller Terminate Connection Request.
pub const H2C_TERM: u8 = 2;
/// Controller to Host Terminate Connection Request.
pub const C2H_TERM: u8 = 3;
/// Command Capsule.
pub const CAPSULE: u8 = 4;
/// Response Capsule.
pub const RESPONSE: u8 = 5;
/// Host to Controller Data.
pub const H2C_DATA: u8 = 6;
/// Controller to Host Data.
pub const C2H_DATA: u8 = 7;
/// Ready to Transfer.
pub const R2T: u8 = 9;

/// FLAGS: header digest, data digest, last PDU, success.
pub const HDGSTF: u8 = 1;
/// A data digest follows the data.
pub const DDGSTF: u8 = 2;
/// Last PDU of an R2T or of a command's data.
pub const LAST: u8 = 4;
/// No response capsule follows.
pub const SUCCESS: u8 = 8;

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// Puts `value` into `bytes` at `at`, little endian.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The digests in use on a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// Header digest.
    pub header: bool,
    /// Data digest.
    pub data: bool,
}

impl Digests {
    /// The four combinations.
    pub const ALL: [Digests; 4] = [
        Digests { header: false, data: false },
        Digests { header: true, data: false },
        Digests { header: false, data: true },
        Digests { header: true, data: true },
    ];
}

/// One PDU. Built right; a test then changes what it likes before [`Pdu::bytes`].
#[derive(Clone, Debug)]
pub struct Pdu {
    /// Header without digest.
    pub header: Vec<u8>,
    /// Bytes between the header with its digest, and the data.
    pub pad: usize,
    /// Data.
    pub data: Vec<u8>,
    /// A header digest follows the header.
    pub header_digest: bool,
    /// A data digest follows the data, if there is any.
    pub data_digest: bool,
    /// One bit of the header digest is wrong.
    pub spoil_header_digest: bool,
    /// One bit of the data digest is wrong.
    pub spoil_data_digest: bool,
}

impl Pdu {
    fn new(kind: u8, hlen: usize, data: &[u8], digests: Digests, align: usize) -> Pdu {
        let mut header = vec![0; hlen];
        (header[0], header[2]) = (kind, hlen as u8);
        let with_digest = hlen + if digests.header { 4 } else { 0 };
        let mut pad = 0;
        let mut plen = with_digest;
        if !data.is_empty() {
            let pdo = with_digest.next_multiple_of(align);
            header[3] = pdo as u8;
            pad = pdo - with_digest;
            plen = pdo + data.len() + if digests.data { 4 } else { 0 };
        }
        header[1] =
            u8::from(digests.header) * HDGSTF + u8::from(digests.data && !data.is_empty()) * DDGSTF;
        put(&mut header, 4, &(plen as u32).to_le_bytes());
        Pdu {
            header,
            pad,
            data: data.to_vec(),
            header_digest: digests.header,
            data_digest: digests.data,
            spoil_header_digest: false,
            spoil_data_digest: false,
        }
    }

    /// ICReq.
    #[must_use]
    pub fn icreq(digests: Digests, hpda_z: u8, maxr2t_z: u32) -> Pdu {
        let mut pdu = Pdu::new(ICREQ, 128, &[], Digests::default(), 4);
        pdu.header[10] = hpda_z;
        pdu.header[11] = u8::from(digests.header) | u8::from(digests.data) << 1;
        put(&mut pdu.header, 12, &maxr2t_z.to_le_bytes());
        pdu
    }

    /// CapsuleCmd with in-capsule `data`.
    #[must_use]
    pub fn capsule(sqe: &[u8; 64], data: &[u8], digests: Digests, align: usize) -> Pdu {
        let mut pdu = Pdu::new(CAPSULE, 72, data, digests, align);
        put(&mut pdu.header, 8, sqe);
        pdu
    }

    /// H2CData.
    #[must_use]
    pub fn h2c_data(
        (cccid, ttag): (u16, u16),
        datao: u32,
        data: &[u8],
        last: bool,
        digests: Digests,
        align: usize,
    ) -> Pdu {
        let mut pdu = Pdu::new(H2C_DATA, 24, data, digests, align);
        pdu.header[1] |= u8::from(last) * LAST;
        put(&mut pdu.header, 8, &cccid.to_le_bytes());
        put(&mut pdu.header, 10, &ttag.to_le_bytes());
        put(&mut pdu.header, 12, &datao.to_le_bytes());
        put(&mut pdu.header, 16, &(data.len() as u32).to_le_bytes());
        pdu
    }

    /// H2CTermReq, repeating `header` as the one in error.
    #[must_use]
    pub fn term_req(fes: u16, fei: u32, header: &[u8]) -> Pdu {
        let mut pdu = Pdu::new(H2C_TERM, 24, &[], Digests::default(), 4);
        put(&mut pdu.header, 4, &(24 + header.len() as u32).to_le_bytes());
        put(&mut pdu.header, 8, &fes.to_le_bytes());
        put(&mut pdu.header, 10, &fei.to_le_bytes());
        pdu.data = header.to_vec();
        pdu
    }

    /// A PDU of any type with a header of 24 bytes and nothing else.
    #[must_use]
    pub fn bare(kind: u8, digests: Digests) -> Pdu {
        Pdu::new(kind, 24, &[], digests, 4)
    }

    /// Sets PLEN.
    pub fn set_plen(&mut self, plen: u32) {
        put(&mut self.header, 4, &plen.to_le_bytes());
    }

    /// PLEN.
    #[must_use]
    pub fn plen(&self) -> u32 {
        u32_at(&self.header, 4)
    }

    /// The bytes on the wire: header, its digest, padding, data, its digest.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = self.header.clone();
        let spoil = |mut digest: [u8; 4], spoil| {
            digest[2] ^= u8::from(spoil) * 0x10;
            digest
        };
        if self.header_digest {
            all.extend(spoil(Crc32c::of(&self.header), self.spoil_header_digest));
        }
        if !self.data.is_empty() {
            all.resize(all.len() + self.pad, 0);
            all.extend(&self.data);
            if self.data_digest {
                all.extend(spoil(Crc32c::of(&self.data), self.spoil_data_digest));
            }
        }
        all
    }
}

/// A submission queue entry: opcode, PSDT "SGL", and a Transport SGL Data Block of no bytes.
#[must_use]
pub fn sqe(opcode: u8) -> [u8; 64] {
    let mut sqe = [0; 64];
    (sqe[0], sqe[1], sqe[39]) = (opcode, 0x40, 0x5a);
    sqe
}

/// Sets the data pointer: SGL identifier, address and length.
pub fn sgl(sqe: &mut [u8; 64], identifier: u8, address: u64, len: u32) {
    put(sqe, 24, &address.to_le_bytes());
    put(sqe, 32, &len.to_le_bytes());
    sqe[39] = identifier;
}

/// Read or write of `blocks` logical blocks from `slba`, `len` bytes by the transport.
#[must_use]
pub fn io_sqe(opcode: u8, nsid: u32, slba: u64, blocks: u32, len: u32) -> [u8; 64] {
    let mut entry = sqe(opcode);
    put(&mut entry, 4, &nsid.to_le_bytes());
    put(&mut entry, 40, &slba.to_le_bytes());
    put(&mut entry, 48, &(blocks - 1).to_le_bytes());
    sgl(&mut entry, 0x5a, 0, len);
    entry
}

/// How to open a connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Init {
    /// Digests to ask for; the controller must grant them.
    pub digests: Digests,
    /// HPDA, zero-based dwords.
    pub hpda_z: u8,
    /// MAXR2T, zero-based.
    pub maxr2t_z: u32,
}

/// A PDU of the controller, its digests and lengths checked.
#[derive(Clone, Debug)]
pub struct FromController {
    /// Header without digest.
    pub header: Vec<u8>,
    /// Data.
    pub data: Vec<u8>,
}

impl FromController {
    /// PDU type.
    #[must_use]
    pub fn kind(&self) -> u8 {
        self.header[0]
    }
    /// FLAGS.
    #[must_use]
    pub fn flags(&self) -> u8 {
        self.header[1]
    }
    /// FES and FEI of a C2HTermReq.
    #[must_use]
    pub fn fault(&self) -> (u16, u32) {
        (u16_at(&self.header, 8), u32_at(&self.header, 10))
    }
    /// Status code and type with DNR of a response capsule: the upper 15 bits of the last dword.
    #[must_use]
    pub fn status(&self) -> u16 {
        u16_at(&self.header, 22) >> 1
    }
    /// Command identifier of a response capsule.
    #[must_use]
    pub fn cid(&self) -> u16 {
        u16_at(&self.header, 20)
    }
    /// SQHD of a response capsule.
    #[must_use]
    pub fn sqhd(&self) -> u16 {
        u16_at(&self.header, 16)
    }
    /// Command identifier and transfer tag of an R2T.
    #[must_use]
    pub fn tags(&self) -> (u16, u16) {
        (u16_at(&self.header, 8), u16_at(&self.header, 10))
    }
    /// Offset and length of an R2T or C2HData.
    #[must_use]
    pub fn range(&self) -> (u32, u32) {
        (u32_at(&self.header, 12), u32_at(&self.header, 16))
    }
}

/// What came of a command.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Status with DNR (bit 14), without the phase bit; 0 is success.
    pub status: u16,
    /// Dwords 0 and 1.
    pub result: u64,
    /// Data for the host.
    pub data: Vec<u8>,
    /// SQHD, if a response capsule came.
    pub sqhd: Option<u16>,
    /// R2Ts received.
    pub r2ts: usize,
}

impl Answer {
    /// Success, or an error that names the status.
    ///
    /// # Errors
    /// The command failed.
    pub fn ok(self) -> io::Result<Answer> {
        match self.status {
            0 => Ok(self),
            status => Err(wrong(format!("a command failed with status {status:#x}"))),
        }
    }
}

/// A connection past ICResp.
#[derive(Debug)]
pub struct Queue {
    /// The socket.
    pub stream: TcpStream,
    /// Digests in use.
    pub digests: Digests,
    /// MAXH2CDATA.
    pub max_h2c_data: u32,
    /// Alignment of our data (CPDA) and of the controller's (HPDA), bytes.
    pub align_out: usize,
    align_in: usize,
    /// Bytes per H2CData PDU; MAXH2CDATA if that is less.
    pub piece: u32,
    next_cid: u16,
}

/// How long a test waits for an answer before it fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

impl Queue {
    /// Connects and exchanges ICReq and ICResp.
    ///
    /// # Errors
    /// Socket errors; `InvalidData` if ICResp is not right.
    pub fn open(addr: SocketAddr, init: Init) -> io::Result<Queue> {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&Pdu::icreq(init.digests, init.hpda_z, init.maxr2t_z).bytes())?;
        let mut icresp = [0; 128];
        stream.read_exact(&mut icresp)?;
        let dgst = u8::from(init.digests.header) | u8::from(init.digests.data) << 1;
        if icresp[..8] != [ICRESP, 0, 128, 0, 128, 0, 0, 0] || icresp[8..10] != [0, 0] {
            return Err(wrong(format!("ICResp begins with {:x?}", &icresp[..10])));
        }
        if icresp[11] != dgst || icresp[16..] != [0; 112] {
            return Err(wrong(format!("ICResp grants digests {:#x}", icresp[11])));
        }
        let max_h2c_data = u32_at(&icresp, 12);
        if max_h2c_data < 4096 || !max_h2c_data.is_multiple_of(4) {
            return Err(wrong(format!("MAXH2CDATA is {max_h2c_data}")));
        }
        Ok(Queue {
            stream,
            digests: init.digests,
            max_h2c_data,
            align_out: 4 * (usize::from(icresp[10]) + 1),
            align_in: 4 * (usize::from(init.hpda_z) + 1),
            piece: u32::MAX,
            next_cid: 0,
        })
    }

    /// A connection before ICReq.
    #[must_use]
    pub fn adopt(stream: TcpStream) -> Queue {
        Queue {
            stream,
            digests: Digests::default(),
            max_h2c_data: 0,
            align_out: 4,
            align_in: 4,
            piece: u32::MAX,
            next_cid: 0,
        }
    }

    /// Sends a PDU.
    ///
    /// # Errors
    /// Socket errors.
    pub fn send(&mut self, pdu: &Pdu) -> io::Result<()> {
        self.stream.write_all(&pdu.bytes())
    }

    /// Receives a PDU; `None` at the end of the connection.
    ///
    /// # Errors
    /// Socket errors but a reset, which is an end; `InvalidData` for a PDU that is not right.
    pub fn receive(&mut self) -> io::Result<Option<FromController>> {
        let mut header = vec![0; 8];
        match self.stream.read(&mut header[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e),
        }
        self.stream.read_exact(&mut header[1..])?;
        let (kind, flags, hlen, pdo) =
            (header[0], header[1], usize::from(header[2]), usize::from(header[3]));
        let plen = u32_at(&header, 4) as usize;
        if hlen != 24 || plen < 24 {
            return Err(wrong(format!("PDU type {kind:#x} with HLEN {hlen} and PLEN {plen}")));
        }
        header.resize(hlen, 0);
        self.stream.read_exact(&mut header[8..])?;
        if kind == C2H_TERM {
            let mut data = vec![0; plen - hlen];
            self.stream.read_exact(&mut data)?;
            return Ok(Some(FromController { header, data }));
        }
        let mut at = hlen;
        if (flags & HDGSTF != 0) != self.digests.header {
            return Err(wrong(format!("PDU type {kind:#x} with flags {flags:#x}")));
        }
        if self.digests.header {
            let mut digest = [0; 4];
            self.stream.read_exact(&mut digest)?;
            at += 4;
            if digest != Crc32c::of(&header) {
                return Err(wrong("the header digest of the controller does not match"));
            }
        }
        let mut data = Vec::new();
        if kind == C2H_DATA {
            let tail = if self.digests.data { 4 } else { 0 };
            if (flags & DDGSTF != 0) != self.digests.data || !pdo.is_multiple_of(self.align_in) {
                return Err(wrong(format!("C2HData with flags {flags:#x} and PDO {pdo}")));
            }
            let mut pad = vec![0; pdo.checked_sub(at).ok_or_else(|| wrong("PDO in the header"))?];
            self.stream.read_exact(&mut pad)?;
            data.resize(u32_at(&header, 16) as usize, 0);
            if plen != pdo + data.len() + tail {
                return Err(wrong(format!("C2HData with PLEN {plen} and PDO {pdo}")));
            }
            self.stream.read_exact(&mut data)?;
            let mut digest = [0; 4];
            self.stream.read_exact(&mut digest[..tail])?;
            if self.digests.data && digest != Crc32c::of(&data) {
                return Err(wrong("the data digest of the controller does not match"));
            }
        } else if plen != at {
            return Err(wrong(format!("PDU type {kind:#x} with PLEN {plen}")));
        }
        Ok(Some(FromController { header, data }))
    }

    /// Runs one command to its end: `in_capsule` data goes with it, `by_r2t` is what the
    /// controller may ask for. The next cid is put into `sqe`.
    ///
    /// # Errors
    /// Socket errors; `InvalidData` for anything from the controller that is not right.
    pub fn command(
        &mut self,
        mut sqe: [u8; 64],
        in_capsule: &[u8],
        by_r2t: &[u8],
    ) -> io::Result<Answer> {
        let cid = self.next_cid;
        self.next_cid = self.next_cid.wrapping_add(1) & 0x7fff;
        put(&mut sqe, 2, &cid.to_le_bytes());
        self.send(&Pdu::capsule(&sqe, in_capsule, self.digests, self.align_out))?;
        self.finish(cid, by_r2t)
    }

    /// Answers R2Ts and collects data until the command `cid` is over.
    ///
    /// # Errors
    /// As [`Queue::command`].
    pub fn finish(&mut self, cid: u16, by_r2t: &[u8]) -> io::Result<Answer> {
        let mut answer = Answer::default();
        loop {
            let pdu = self.receive()?.ok_or_else(|| wrong("the connection ended"))?;
            match pdu.kind() {
                RESPONSE if pdu.cid() == cid => {
                    answer.status = pdu.status();
                    answer.result = u64::from_le_bytes(pdu.header[8..16].try_into().expect("8"));
                    answer.sqhd = Some(pdu.sqhd());
                    return Ok(answer);
                }
                R2T if pdu.tags().0 == cid => {
                    answer.r2ts += 1;
                    self.serve(&pdu, by_r2t)?;
                }
                C2H_DATA if pdu.tags().0 == cid => {
                    if pdu.range().0 as usize != answer.data.len() {
                        return Err(wrong("C2HData out of order"));
                    }
                    answer.data.extend(&pdu.data);
                    if pdu.flags() & SUCCESS != 0 {
                        return Ok(answer);
                    }
                }
                C2H_TERM => {
                    let (fes, fei) = pdu.fault();
                    return Err(wrong(format!("C2HTermReq with FES {fes} and FEI {fei}")));
                }
                kind => return Err(wrong(format!("PDU type {kind:#x} for cid {cid}"))),
            }
        }
    }

    /// Sends what an R2T asks for, in pieces.
    fn serve(&mut self, r2t: &FromController, data: &[u8]) -> io::Result<()> {
        let (offset, len) = r2t.range();
        let wanted = data.get(offset as usize..(offset + len) as usize);
        let wanted = wanted.ok_or_else(|| wrong(format!("R2T for {len} bytes at {offset}")))?;
        let piece = self.piece.min(self.max_h2c_data) as usize;
        for (n, part) in wanted.chunks(piece).enumerate() {
            let at = offset + (n * piece) as u32;
            let last = at + part.len() as u32 == offset + len;
            let pdu = Pdu::h2c_data(r2t.tags(), at, part, last, self.digests, self.align_out);
            self.send(&pdu)?;
        }
        Ok(())
    }

    /// Property Get.
    ///
    /// # Errors
    /// As [`Queue::command`], or a refusal.
    pub fn property(&mut self, offset: u32) -> io::Result<u64> {
        let mut entry = sqe(0x7f);
        (entry[4], entry[40]) = (4, u8::from(offset == 0));
        put(&mut entry, 44, &offset.to_le_bytes());
        self.command(entry, &[], &[])?.ok().map(|answer| answer.result)
    }

    /// Property Set of 4 bytes.
    ///
    /// # Errors
    /// As [`Queue::command`], or a refusal.
    pub fn set_property(&mut self, offset: u32, value: u32) -> io::Result<()> {
        let mut entry = sqe(0x7f);
        put(&mut entry, 44, &offset.to_le_bytes());
        put(&mut entry, 48, &value.to_le_bytes());
        self.command(entry, &[], &[])?.ok().map(drop)
    }
}

/// A Connect command.
#[derive(Clone, Debug)]
pub struct Connect {
    /// Subsystem.
    pub subnqn: String,
    /// Host; its identifier is made from it.
    pub hostnqn: String,
    /// Entries of the queue.
    pub entries: u16,
    /// Keep alive timeout, milliseconds.
    pub kato_ms: u32,
    /// Submission queue flow control is off.
    pub no_flow_control: bool,
}

impl Connect {
    /// Of this host to this subsystem: 32 entries, no keep alive, no flow control.
    #[must_use]
    pub fn new(subnqn: &str, hostnqn: &str) -> Connect {
        Connect {
            subnqn: subnqn.into(),
            hostnqn: hostnqn.into(),
            entries: 32,
            kato_ms: 0,
            no_flow_control: true,
        }
    }

    /// The SQE for queue `qid`.
    #[must_use]
    pub fn sqe(&self, qid: u16) -> [u8; 64] {
        let mut entry = sqe(0x7f);
        entry[4] = 1;
        put(&mut entry, 42, &qid.to_le_bytes());
        put(&mut entry, 44, &(self.entries - 1).to_le_bytes());
        entry[46] = u8::from(self.no_flow_control) * 4;
        put(&mut entry, 48, &self.kato_ms.to_le_bytes());
        sgl(&mut entry, 0x01, 0, 1024);
        entry
    }

    /// The data, for a controller.
    #[must_use]
    pub fn data(&self, cntlid: u16) -> Vec<u8> {
        let mut data = vec![0; 1024];
        put(&mut data, 0, &Crc32c::of(self.hostnqn.as_bytes()).repeat(4));
        put(&mut data, 16, &cntlid.to_le_bytes());
        put(&mut data, 256, self.subnqn.as_bytes());
        put(&mut data, 512, self.hostnqn.as_bytes());
        data
    }

    /// Opens a connection and makes it the admin queue of a new, enabled controller.
    ///
    /// # Errors
    /// As [`Queue::command`], or a refusal.
    pub fn admin(&self, addr: SocketAddr, init: Init) -> io::Result<(Queue, u16)> {
        let mut queue = Queue::open(addr, init)?;
        let cntlid = queue.command(self.sqe(0), &self.data(0xffff), &[])?.ok()?.result as u16;
        queue.set_property(0x14, 0x0046_0001)?;
        if queue.property(0x1c)? & 1 == 0 {
            return Err(wrong("CSTS.RDY is not set behind CC.EN"));
        }
        Ok((queue, cntlid))
    }

    /// Opens a connection and makes it I/O queue `qid` of controller `cntlid`.
    ///
    /// # Errors
    /// As [`Queue::command`], or a refusal.
    pub fn io(&self, addr: SocketAddr, init: Init, cntlid: u16, qid: u16) -> io::Result<Queue> {
        let mut queue = Queue::open(addr, init)?;
        queue.command(self.sqe(qid), &self.data(cntlid), &[])?.ok()?;
        Ok(queue)
    }
}

/// Set Features, Number of Queues.
#[must_use]
pub fn number_of_queues(count: u16) -> [u8; 64] {
    let mut entry = sqe(0x09);
    entry[40] = 0x07;
    put(&mut entry, 44, &(count - 1).to_le_bytes());
    put(&mut entry, 46, &(count - 1).to_le_bytes());
    entry
}
